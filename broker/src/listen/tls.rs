//! Certificates: ours, and those of nodes. Files that change are read again, for connections to come.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use mpypi_protocol::NodeId;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use x509_parser::{extensions::GeneralName, prelude::FromDer};

use crate::clock;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A certificate that ends sooner is warned of.
const SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// Where certificates are. All files are PEM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// Our certificate, then those between it and its authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Authorities whose certificates nodes may show instead of a password.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
    /// Whether clients must show one.
    #[serde(default)]
    pub client_auth: ClientAuth,
}

/// Whether a client must show a certificate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientAuth {
    /// Who shows none logs in with a password.
    #[default]
    Optional,
    /// Who shows none gets no connection.
    Required,
}

/// Certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("`{}` holds no {wanted} in PEM", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
    },
    /// Certificate and key cannot be used together.
    #[error("cannot use the certificate `{}` with the key `{}`", cert.display(), key.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// The authorities cannot be used.
    #[error("cannot use the authorities in `{}`: {problem}", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
    /// A certificate is demanded, and none would be believed.
    #[error("client certificates are required, but there is no `client_ca` to check them with")]
    NoAuthority,
}

/// The TLS of all listeners, as its files say now.
#[derive(Debug)]
pub struct Tls {
    files: Files,
    /// Held to read or replace the pointer.
    current: RwLock<Arc<Current>>,
    seen: Stamps,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    /// The file of the authorities, as it was read.
    authorities: Vec<CertificateDer<'static>>,
    /// Grows when the authorities change.
    generation: u64,
}

/// When the files changed last, and how large they were.
type Stamps = [Option<(SystemTime, u64)>; 3];

/// Reads the files when they change. Files that are not in order change nothing.
#[derive(Debug)]
pub struct Watch {
    tls: Arc<Tls>,
    seen: Stamps,
}

/// A certificate that a client showed, signed by one of the authorities.
#[derive(Debug)]
pub struct ClientCertificate {
    tls: Arc<Tls>,
    chain: Vec<CertificateDer<'static>>,
    /// With which authorities it was last found good.
    trusted: AtomicU64,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Says which file is not in order.
    pub fn load(files: Files) -> Result<Tls, TlsError> {
        let seen = stamps(&files);
        let current = Arc::new(read(&files, None)?);
        Ok(Tls { files, current: RwLock::new(current), seen })
    }

    /// Makes a connection one of TLS, and hands back the certificate that the client showed, if it did.
    ///
    /// # Errors
    /// The connection fails, or the two have no TLS in common.
    pub async fn accept(
        self: &Arc<Tls>,
        socket: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, Option<Arc<ClientCertificate>>)> {
        let current = self.current();
        let stream = TlsAcceptor::from(current.config.clone()).accept(socket).await?;
        let certificate = stream.get_ref().1.peer_certificates().map(|chain| {
            let trusted = AtomicU64::new(current.generation);
            Arc::new(ClientCertificate { tls: self.clone(), chain: chain.to_vec(), trusted })
        });
        Ok((stream, certificate))
    }

    /// Whether nobody gets a connection without a certificate of one of the authorities.
    #[must_use]
    pub fn requires_certificate(&self) -> bool {
        self.files.client_auth == ClientAuth::Required
    }

    /// Follows the files from how they were first read.
    #[must_use]
    pub fn watch(self: &Arc<Tls>) -> Watch {
        Watch { tls: self.clone(), seen: self.seen }
    }

    fn current(&self) -> Arc<Current> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Watch {
    /// Follows the files whenever they change; says so once the authorities did.
    pub async fn authorities_changed(&mut self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let now = stamps(&self.tls.files);
            if now == self.seen {
                continue;
            }
            self.seen = now;
            let before = self.tls.current();
            match read(&self.tls.files, Some(&before)) {
                Ok(current) => {
                    let are_new = current.generation != before.generation;
                    *self.tls.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(current);
                    tracing::info!("certificates read again: new connections use them");
                    if are_new {
                        return;
                    }
                }
                Err(error) => {
                    let error = anyhow::Error::from(error);
                    tracing::error!("certificates stay as they were: {error:#}");
                }
            }
        }
    }
}

impl ClientCertificate {
    /// The node that the certificate was made out to: its common name, or the first of its DNS names.
    ///
    /// # Errors
    /// There is no name, or none that a node can have.
    pub fn node(&self) -> Result<NodeId, String> {
        let name = name_in(&self.chain[0]).ok_or("it names nobody: give it a common name")?;
        NodeId::new(&name).map_err(|error| error.to_string())
    }

    /// Whether one of the authorities of now has signed it.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        let current = self.tls.current();
        if self.trusted.load(Ordering::Relaxed) == current.generation {
            return true;
        }
        let now = UnixTime::since_unix_epoch(Duration::from_millis(clock::now().unix_ms));
        let is_good = current.verifier.as_ref().is_some_and(|verifier| {
            verifier.verify_client_cert(&self.chain[0], &self.chain[1..], now).is_ok()
        });
        if is_good {
            self.trusted.store(current.generation, Ordering::Relaxed);
        }
        is_good
    }
}

/// When a file changed last, and how large it is; something else if it changed again.
pub(crate) fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let found = fs::metadata(path).ok()?;
    Some((found.modified().ok()?, found.len()))
}

fn stamps(files: &Files) -> Stamps {
    [Some(&files.cert), Some(&files.key), files.client_ca.as_ref()].map(|path| stamp(path?))
}

fn read(files: &Files, before: Option<&Current>) -> Result<Current, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let authorities = match &files.client_ca {
        Some(path) => certificates(path)?,
        None if files.client_auth == ClientAuth::Required => return Err(TlsError::NoAuthority),
        None => Vec::new(),
    };
    let generation = match before {
        Some(before) if before.authorities == authorities => before.generation,
        Some(before) => before.generation + 1,
        None => 1,
    };
    let verifier = match (&files.client_ca, before) {
        (Some(_), Some(before)) if before.generation == generation => before.verifier.clone(),
        (Some(path), _) => Some(verifier(path, &authorities, files.client_auth, &provider)?),
        (None, _) => None,
    };
    let pair = |source| TlsError::Pair { cert: files.cert.clone(), key: files.key.clone(), source };
    let key = own_key(files, &provider, pair)?;
    warn_of_end(&files.cert, &key);
    let builder =
        ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(pair)?;
    let is_anonymous = verifier.is_none();
    let builder = match verifier.clone() {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    if is_anonymous {
        // A fleet that comes back need not do all of the handshake again, and we need not remember it.
        config.ticketer = match before {
            Some(before) => before.config.ticketer.clone(),
            None => ring::Ticketer::new().map_err(pair)?,
        };
        config.send_tls13_tickets = 1;
    } else {
        // Who resumes shows no certificate, so that it could not be looked at again.
        config.send_tls13_tickets = 0;
    }
    Ok(Current { config: Arc::new(config), verifier, authorities, generation })
}

fn own_key(
    files: &Files,
    provider: &CryptoProvider,
    pair: impl Fn(rustls::Error) -> TlsError,
) -> Result<CertifiedKey, TlsError> {
    let chain = certificates(&files.cert)?;
    let bytes = read_file(&files.key)?;
    let key = PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|_| TlsError::Content { path: files.key.clone(), wanted: "private key" })?;
    CertifiedKey::from_der(chain, key, provider).map_err(pair)
}

fn verifier(
    path: &Path,
    authorities: &[CertificateDer<'static>],
    auth: ClientAuth,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let failed = |problem: String| TlsError::Authorities { path: path.to_owned(), problem };
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).map_err(|error| failed(error.to_string()))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let builder = match auth {
        ClientAuth::Optional => builder.allow_unauthenticated(),
        ClientAuth::Required => builder,
    };
    builder.build().map_err(|error| failed(error.to_string()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read_file(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(TlsError::Content { path: path.to_owned(), wanted: "certificate" }),
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::File { path: path.to_owned(), source })
}

fn name_in(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let common = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    if let Some(name) = common.filter(|name| !name.is_empty()) {
        return Some(name.to_owned());
    }
    let names = certificate.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    })
}

fn warn_of_end(path: &Path, key: &CertifiedKey) {
    let end = key.end_entity_cert().ok().and_then(|own| {
        let (_, own) = x509_parser::certificate::X509Certificate::from_der(own).ok()?;
        u64::try_from(own.validity().not_after.timestamp()).ok()
    });
    let left = end.map(|end| Duration::from_secs(end.saturating_sub(clock::now().unix_ms / 1000)));
    match left {
        Some(Duration::ZERO) => {
            tracing::error!(certificate = %path.display(), "has ended: clients refuse it")
        }
        Some(left) if left < SOON => {
            let days = left.as_secs() / (24 * 3600);
            tracing::warn!(certificate = %path.display(), days, "ends soon: renew it");
        }
        _ => {}
    }
}
