//! A private CA and what it vouches for, on disk as programs want it.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use crate::World;

/// A CA. Its certificate is at `<name>.pem` in the world.
#[derive(Debug)]
pub struct Authority {
    name: String,
    issuer: Issuer<'static, KeyPair>,
}

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// Always.
    Now,
    /// It was once.
    Past,
    /// It will be.
    Future,
}

impl Authority {
    /// A new CA.
    #[must_use]
    pub fn new(world: &World, name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("the test CA {name}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        world.write(&format!("{name}.pem"), params.self_signed(&key).unwrap().pem());
        world.write(&format!("{name}.key"), key.serialize_pem());
        Authority { name: name.to_owned(), issuer: Issuer::new(params, key) }
    }

    /// Where its certificate is.
    #[must_use]
    pub fn pem(&self, world: &World) -> String {
        world.text(&format!("{}.pem", self.name))
    }

    /// A certificate for a server at `hosts`, names or addresses: `<name>.pem` and `<name>.key`.
    pub fn server(&self, world: &World, name: &str, hosts: &[&str], validity: Validity) {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        (params.not_before, params.not_after) = match validity {
            Validity::Now => (date_time_ymd(2020, 1, 1), date_time_ymd(2120, 1, 1)),
            Validity::Past => (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1)),
            Validity::Future => (date_time_ymd(2119, 1, 1), date_time_ymd(2120, 1, 1)),
        };
        self.issue(world, name, params, ExtendedKeyUsagePurpose::ServerAuth);
    }

    /// A certificate for the client `name`: `<name>.pem` and `<name>.key`.
    pub fn client(&self, world: &World, name: &str) {
        self.issue(world, name, CertificateParams::default(), ExtendedKeyUsagePurpose::ClientAuth);
    }

    fn issue(
        &self,
        world: &World,
        name: &str,
        mut params: CertificateParams,
        purpose: ExtendedKeyUsagePurpose,
    ) {
        let key = KeyPair::generate().unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![purpose];
        world.write(&format!("{name}.pem"), params.signed_by(&key, &self.issuer).unwrap().pem());
        world.write(&format!("{name}.key"), key.serialize_pem());
    }
}
