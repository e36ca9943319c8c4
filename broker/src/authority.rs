//! A private certificate authority, for brokers and devices of one owner.
//!
//! In a folder lie the authority (`ca.pem`, `ca.key`), the broker's certificate (`server.pem`, `server.key`), and
//! below `nodes/` those made for nodes, also as DER for devices that read no PEM. All keys are ECDSA P-256 and
//! readable by their owner alone.

use std::{
    fs,
    io::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use mpypi_protocol::{Digest, NodeId};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use time::OffsetDateTime;
use x509_parser::{extensions::GeneralName, pem::Pem};

use crate::clock::Now;

/// How long an authority is good for: devices have it built in.
const AUTHORITY: Duration = Duration::from_secs(3650 * DAY);
/// How long other certificates are good for: the longest that all known clients accept.
const LEAF: Duration = Duration::from_secs(825 * DAY);
/// How far back certificates start, for clients whose clocks are behind.
const EARLIER: Duration = Duration::from_secs(DAY);
const DAY: u64 = 24 * 3600;

/// Names in a certificate of the broker.
pub const NAMES: usize = 100;

/// The authority's certificate.
pub const CA: &str = "ca.pem";
/// The broker's certificate.
pub const SERVER: &str = "server.pem";
/// Its key.
pub const SERVER_KEY: &str = "server.key";
const CA_KEY: &str = "ca.key";
const NODES: &str = "nodes";

/// Something went wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file cannot be read or written.
    #[error("cannot use `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is something already.
    #[error("`{}` is there already", .0.display())]
    Exists(PathBuf),
    /// There is no authority.
    #[error("there is no certificate authority: `{}` is missing", .0.display())]
    Missing(PathBuf),
    /// A file holds something else.
    #[error("`{}` holds no {wanted} in PEM", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
    },
    /// Nothing that a certificate can be made out to.
    #[error("`{}` is no host name or address", .0.escape_debug())]
    Name(String),
    /// Too few or too many names.
    #[error("a certificate has 1 to {NAMES} names")]
    Names,
    /// A certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// There is no randomness.
    #[error("no randomness to be had: {0}")]
    Random(String),
}

/// A private certificate authority.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// Where a node's certificate was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFiles {
    /// The authority, which the node is to trust.
    pub ca: PathBuf,
    /// The certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Authority {
    /// Makes an authority in `folder`, named after `host`.
    ///
    /// # Errors
    /// There is one already, or it cannot be written.
    pub fn create(folder: &Path, host: &str, now: Now) -> Result<Authority, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = params(&format!("mpypi authority of {host}"), AUTHORITY, now)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        // The key last: with it there is an authority.
        for name in [CA, CA_KEY] {
            absent(&folder.join(name))?;
        }
        write(&folder.join(CA), certificate.pem().as_bytes(), Readers::All)?;
        write(&folder.join(CA_KEY), key.serialize_pem().as_bytes(), Readers::Owner)?;
        Ok(Authority { folder: folder.to_owned(), issuer: Issuer::new(params, key) })
    }

    /// The authority in `folder`.
    ///
    /// # Errors
    /// There is none, or it is not in order.
    pub fn open(folder: &Path) -> Result<Authority, AuthorityError> {
        let key = read_key(&folder.join(CA_KEY))?;
        let path = folder.join(CA);
        let issuer = Issuer::from_ca_cert_pem(&read(&path)?, key)
            .map_err(|_| AuthorityError::Content { path, wanted: "certificate" })?;
        Ok(Authority { folder: folder.to_owned(), issuer })
    }

    /// Whether there is an authority in `folder`.
    #[must_use]
    pub fn exists(folder: &Path) -> bool {
        folder.join(CA_KEY).exists()
    }

    /// Makes the broker's key, and a certificate for these host names and addresses.
    ///
    /// # Errors
    /// A name is none, or a file cannot be written.
    pub fn issue_server(&self, names: &[String], now: Now) -> Result<(), AuthorityError> {
        let key = KeyPair::generate()?;
        let certificate = self.server(names, &key, now)?;
        write(&self.folder.join(SERVER_KEY), key.serialize_pem().as_bytes(), Readers::Owner)?;
        write(&self.folder.join(SERVER), certificate.as_bytes(), Readers::All)
    }

    /// Makes a new certificate for the broker's key, and for the names of the old one unless others are given. Returns
    /// them.
    ///
    /// # Errors
    /// There is no certificate, a name is none, or a file cannot be written.
    pub fn renew_server(&self, names: &[String], now: Now) -> Result<Vec<String>, AuthorityError> {
        let path = self.folder.join(SERVER);
        let key = read_key(&self.folder.join(SERVER_KEY))?;
        let names = match names {
            [] => names_in(&path)?,
            names => names.to_vec(),
        };
        write(&path, self.server(&names, &key, now)?.as_bytes(), Readers::All)?;
        Ok(names)
    }

    /// Makes a key and a certificate with which `node` may be itself.
    ///
    /// # Errors
    /// The node has one already and is not to get `another`, or a file cannot be written.
    pub fn issue_node(&self, node: &NodeId, another: bool, now: Now) -> Result<NodeFiles, AuthorityError> {
        let folder = self.folder.join(NODES);
        let name = file_name(node);
        let file = |ending: &str| folder.join(format!("{name}.{ending}"));
        let files = NodeFiles { ca: self.folder.join(CA), cert: file("pem"), key: file("key") };
        if !another {
            absent(&files.cert)?;
            absent(&files.key)?;
        }
        let key = KeyPair::generate()?;
        let mut params = params(node.as_str(), LEAF, now)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if is_host(node.as_str())
            && let Ok(name) = node.as_str().try_into()
        {
            params.subject_alt_names = vec![SanType::DnsName(name)];
        }
        let certificate = leaf(params).signed_by(&key, &self.issuer)?;
        write(&files.key, key.serialize_pem().as_bytes(), Readers::Owner)?;
        write(&files.cert, certificate.pem().as_bytes(), Readers::All)?;
        write(&file("key.der"), key.serialized_der(), Readers::Owner)?;
        write(&file("cert.der"), certificate.der(), Readers::All)?;
        Ok(files)
    }

    fn server(&self, names: &[String], key: &KeyPair, now: Now) -> Result<String, AuthorityError> {
        let first = match names {
            [first, ..] if names.len() <= NAMES => first,
            _ => return Err(AuthorityError::Names),
        };
        let mut params = params(first, LEAF, now)?;
        for name in names {
            let san = match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) if is_host(name) => SanType::DnsName(name.as_str().try_into()?),
                Err(_) => return Err(AuthorityError::Name(name.clone())),
            };
            params.subject_alt_names.push(san);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        Ok(leaf(params).signed_by(key, &self.issuer)?.pem())
    }
}

/// Fails if there is something at `path`.
///
/// # Errors
/// [`AuthorityError::Exists`]
pub fn absent(path: &Path) -> Result<(), AuthorityError> {
    match path.symlink_metadata() {
        Ok(_) => Err(AuthorityError::Exists(path.to_owned())),
        Err(_) => Ok(()),
    }
}

/// Who may read a file that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// Whoever the folder lets in.
    All,
    /// Its owner alone.
    Owner,
}

/// Writes a file beside, then renames it; makes its folder if need be.
///
/// # Errors
/// It cannot be written.
pub fn write(path: &Path, content: &[u8], readers: Readers) -> Result<(), AuthorityError> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let write = || {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
        // One left by an earlier attempt may let others read.
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mode = if readers == Readers::Owner { 0o600 } else { 0o644 };
        let mut file = fs::OpenOptions::new().create_new(true).write(true).mode(mode).open(&beside)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        crate::index::blobs::sync_folder(folder)
    };
    write().map_err(|source| AuthorityError::File { path: path.to_owned(), source })
}

fn params(name: &str, lasting: Duration, now: Now) -> Result<CertificateParams, AuthorityError> {
    // RFC 5280, 4.1.2.2: positive, at most 20 bytes, and never the same twice.
    let mut serial = [0; 16];
    getrandom::fill(&mut serial).map_err(|error| AuthorityError::Random(error.to_string()))?;
    serial[0] = serial[0] & 0x3f | 0x40;
    let now = i64::try_from(now.unix_ms / 1000).unwrap_or(i64::MAX);
    let start = OffsetDateTime::from_unix_timestamp(now).unwrap_or(OffsetDateTime::UNIX_EPOCH) - EARLIER;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    (params.not_before, params.not_after) = (start, start + lasting);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

fn leaf(mut params: CertificateParams) -> CertificateParams {
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

/// Whether a DNS name may be written so.
fn is_host(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    name.len() <= 253 && name.strip_prefix("*.").unwrap_or(name).split('.').all(is_label)
}

/// A file's name for a node, whose own name need not be one.
fn file_name(node: &NodeId) -> String {
    let name = node.as_str();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    match name.chars().all(is_plain) && !name.starts_with('.') {
        true => name.to_owned(),
        false => format!("node-{}", &Digest::of(name.as_bytes()).to_string()[..16]),
    }
}

fn names_in(path: &Path) -> Result<Vec<String>, AuthorityError> {
    let bad = || AuthorityError::Content { path: path.to_owned(), wanted: "certificate with names" };
    let text = read(path)?;
    let pem = Pem::iter_from_buffer(text.as_bytes()).next().and_then(Result::ok).ok_or_else(bad)?;
    let certificate = pem.parse_x509().map_err(|_| bad())?;
    let names = certificate.subject_alternative_name().map_err(|_| bad())?.ok_or_else(bad)?;
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match <[u8; 4]>::try_from(*bytes) {
            Ok(v4) => Some(IpAddr::from(v4).to_string()),
            Err(_) => Some(IpAddr::from(<[u8; 16]>::try_from(*bytes).ok()?).to_string()),
        },
        _ => None,
    };
    Ok(names.value.general_names.iter().filter_map(name).collect())
}

fn read_key(path: &Path) -> Result<KeyPair, AuthorityError> {
    KeyPair::from_pem(&read(path)?)
        .map_err(|_| AuthorityError::Content { path: path.to_owned(), wanted: "private key" })
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => AuthorityError::Missing(path.to_owned()),
        _ => AuthorityError::File { path: path.to_owned(), source },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::clock;

    fn authority(folder: &Path) -> Authority {
        Authority::create(folder, "test", clock::now()).unwrap()
    }

    fn der(path: &Path) -> Vec<u8> {
        Pem::iter_from_buffer(&fs::read(path).unwrap()).next().unwrap().unwrap().contents
    }

    #[test]
    fn keys_are_for_their_owner_alone_and_an_authority_is_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let made = authority(folder.path());
        made.issue_server(&["hub.local".into()], clock::now()).unwrap();
        made.issue_node(&NodeId::new("kitchen").unwrap(), false, clock::now()).unwrap();
        for name in ["ca.key", "server.key", "nodes/kitchen.key", "nodes/kitchen.key.der"] {
            let mode = fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let again = Authority::create(folder.path(), "test", clock::now());
        assert!(matches!(again, Err(AuthorityError::Exists(_))));
    }

    #[test]
    fn a_renewed_certificate_keeps_names_and_key_and_has_another_serial_number() {
        let folder = tempfile::tempdir().unwrap();
        authority(folder.path());
        let authority = Authority::open(folder.path()).unwrap();
        let names = ["hub.local", "10.0.0.1", "fd00::1"].map(str::to_owned);
        authority.issue_server(&names, clock::now()).unwrap();
        let path = folder.path().join(SERVER);
        let before = der(&path);
        assert_eq!(authority.renew_server(&[], clock::now()).unwrap(), names);
        let after = der(&path);
        let parse = |bytes| x509_parser::parse_x509_certificate(bytes).unwrap().1;
        let (before, after) = (parse(&before), parse(&after));
        assert_eq!(before.public_key(), after.public_key());
        assert_ne!(before.serial, after.serial);
    }

    #[test]
    fn certificates_last_as_long_as_clients_accept_and_are_for_one_purpose() {
        let folder = tempfile::tempdir().unwrap();
        let authority = authority(folder.path());
        authority.issue_server(&["hub".into()], clock::now()).unwrap();
        let node = authority.issue_node(&NodeId::new("kitchen").unwrap(), false, clock::now()).unwrap();
        for (path, days, is_server, is_client) in [
            (folder.path().join(CA), 3650, false, false),
            (folder.path().join(SERVER), 825, true, false),
            (node.cert, 825, false, true),
        ] {
            let bytes = der(&path);
            let (_, found) = x509_parser::parse_x509_certificate(&bytes).unwrap();
            let validity = found.validity();
            assert!(validity.is_valid());
            let seconds = validity.not_after.timestamp() - validity.not_before.timestamp();
            assert_eq!(seconds, days * 24 * 3600, "{}", path.display());
            let usage = found.extended_key_usage().unwrap().map(|usage| usage.value.clone());
            let usage = usage.map_or((false, false), |usage| (usage.server_auth, usage.client_auth));
            assert_eq!(usage, (is_server, is_client));
            assert_eq!(found.is_ca(), !is_server && !is_client);
        }
    }

    #[test]
    fn what_is_no_name_of_a_host_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let authority = authority(folder.path());
        for name in ["", "a b", "hub/x", "-hub", "http://hub", "hub:8883", "hüb"] {
            let made = authority.issue_server(&[name.to_owned()], clock::now());
            assert!(matches!(made, Err(AuthorityError::Name(_))), "{name}");
        }
        assert!(matches!(authority.issue_server(&[], clock::now()), Err(AuthorityError::Names)));
    }

    #[test]
    fn a_nodes_name_never_leads_out_of_the_folder() {
        for name in ["..", ".hidden", "C:", "küche", "a b"] {
            let found = file_name(&NodeId::new(name).unwrap());
            assert!(found.starts_with("node-"), "{name}: {found}");
        }
        assert_eq!(file_name(&NodeId::new("kitchen-1.a").unwrap()), "kitchen-1.a");
    }
}
