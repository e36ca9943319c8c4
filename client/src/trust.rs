//! Files of certificates and a key → whom to believe, and who we are.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_rustls::rustls::{
    self, ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
};

use crate::{args::TrustArgs, limits};

/// What cannot be trusted, or used to be trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no PEM, or damaged.
    #[error("`{}` is not in PEM form: {problem}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file without a certificate.
    #[error("`{}` holds no certificate", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// A certificate that cannot vouch for others.
    #[error("`{}` holds a certificate that cannot be used as a CA: {problem}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: rustls::Error,
    },
    /// A file without a private key.
    #[error("`{}` holds no private key", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// A certificate and a key that do not belong together, or cannot be used.
    #[error("`{}` and `{}` are no certificate with its key: {problem}", cert.display(), key.display())]
    Pair {
        /// The file of the certificate.
        cert: PathBuf,
        /// The file of the key.
        key: PathBuf,
        /// Why.
        problem: rustls::Error,
    },
    /// The system trusts nobody.
    #[error("this system has no CAs to trust{}", problem.as_ref().map(|text| format!(": {text}")).unwrap_or_default())]
    NoSystemRoots {
        /// Why, if it is known.
        problem: Option<String>,
    },
    /// A host for which there can be no certificate.
    #[error("there can be no certificate for a host named `{host}`")]
    Host {
        /// The host.
        host: String,
    },
}

impl TrustError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            TrustError::NoKey { .. } => Some("the key must be there unencrypted, as `BEGIN PRIVATE KEY`"),
            TrustError::NoCertificate { .. } | TrustError::Pem { .. } => {
                Some("certificates are expected as `BEGIN CERTIFICATE`, in base64")
            }
            TrustError::NoSystemRoots { .. } => {
                Some("give the broker's CA with `--ca`, or install the system's, as `ca-certificates`")
            }
            TrustError::Pair { .. } => Some("give the key that the certificate was made for"),
            TrustError::Read { .. } | TrustError::Certificate { .. } | TrustError::Host { .. } => None,
        }
    }
}

/// What `args` say, as rustls needs it.
pub(crate) fn config(args: &TrustArgs) -> Result<Arc<ClientConfig>, TrustError> {
    let roots = match &args.ca {
        Some(path) => private(path)?,
        None => system()?,
    };
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has what TLS 1.2 and 1.3 need")
        .with_root_certificates(roots);
    let config = match (&args.cert, &args.key) {
        (Some(cert), Some(key)) => {
            let chain = certificates(cert)?;
            let pair = |problem| TrustError::Pair { cert: cert.clone(), key: key.clone(), problem };
            config.with_client_auth_cert(chain, private_key(key)?).map_err(pair)?
        }
        _ => config.with_no_client_auth(),
    };
    Ok(Arc::new(config))
}

/// Whom `args` say to trust.
pub(crate) fn roots(args: &TrustArgs) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let Some(path) = &args.ca else {
        let found = rustls_native_certs::load_native_certs();
        return Ok(found.certs);
    };
    // They are looked at as those of a broker are.
    private(path)?;
    certificates(path)
}

/// The CAs of one file, and no others.
fn private(path: &Path) -> Result<RootCertStore, TrustError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        let wrong = |problem| TrustError::Certificate { path: path.to_owned(), problem };
        roots.add(certificate).map_err(wrong)?;
    }
    Ok(roots)
}

/// The CAs of the system. One of them that cannot be read is no reason to trust none.
fn system() -> Result<RootCertStore, TrustError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    match roots.is_empty() {
        true => Err(TrustError::NoSystemRoots { problem: found.errors.first().map(ToString::to_string) }),
        false => Ok(roots),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let text = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(TrustError::NoCertificate { path: path.to_owned() }),
        Ok(found) => Ok(found),
        Err(error) => Err(TrustError::Pem { path: path.to_owned(), problem: error.to_string() }),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TrustError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| match error {
        pem::Error::NoItemsFound => TrustError::NoKey { path: path.to_owned() },
        error => TrustError::Pem { path: path.to_owned(), problem: error.to_string() },
    })
}

fn read(path: &Path) -> Result<Vec<u8>, TrustError> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(limits::PEM + 1).read_to_end(&mut bytes)?;
        match bytes.len() as u64 > limits::PEM {
            true => Err(io::Error::other(format!("it has more than {} bytes", limits::PEM))),
            false => Ok(bytes),
        }
    };
    read().map_err(|source| TrustError::Read { path: path.to_owned(), source })
}
