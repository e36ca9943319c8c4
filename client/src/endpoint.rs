//! A broker and how it is reached → a stream of bytes, or why there is none, and what to do about it.

use std::{fmt, io, net::IpAddr, num::NonZeroU64, path::PathBuf, sync::Arc};

use mpypi_protocol::{BrokerUrl, address::Security};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{self, AlertDescription, CertificateError, ClientConfig, pki_types::ServerName},
};

use crate::{
    args::TrustArgs,
    limits,
    meter::{Meter, Metered},
    trust::{self, TrustError},
};

/// A broker, and all that is needed to connect to it, again and again.
#[derive(Clone)]
pub struct Endpoint {
    url: BrokerUrl,
    tls: Option<Tls>,
    /// What people should know about this way to reach it.
    warnings: Vec<String>,
    meter: Option<Arc<Meter>>,
    /// Bytes per second that a connection takes from the broker, if not all that come.
    rate: Option<NonZeroU64>,
    /// The largest packet that it takes, in bytes, as far as we were told.
    packet: Option<usize>,
}

#[derive(Clone)]
struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    ca: Option<PathBuf>,
    has_certificate: bool,
}

/// A stream of bytes, plain or TLS.
pub(crate) type Stream = Box<dyn ReadWrite>;

pub(crate) trait ReadWrite: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ReadWrite for T {}

impl Endpoint {
    /// The broker at `url`. Files are read only for TLS.
    ///
    /// # Errors
    /// Says which file is wrong.
    pub fn new(url: BrokerUrl, trust: &TrustArgs) -> Result<Endpoint, TrustError> {
        let mut warnings = Vec::new();
        let tls = match url.security {
            Security::Tls => Some(Tls {
                config: trust::config(trust)?,
                name: server_name(&url.host)?,
                ca: trust.ca.clone(),
                has_certificate: trust.cert.is_some(),
            }),
            Security::Plain => {
                if url.credentials.is_some() && !url.is_loopback() {
                    warnings.push(format!(
                        "the password travels in clear to {url}; with `mqtts://` nobody on the way can read it"
                    ));
                }
                if trust.cert.is_some() {
                    warnings
                        .push(format!("{url} speaks no TLS, so the client certificate is not shown to it"));
                }
                None
            }
        };
        Ok(Endpoint { url, tls, warnings, meter: None, rate: None, packet: None })
    }

    /// The same, of which `meter` counts what every connection carries.
    #[must_use]
    pub fn metered(&self, meter: Arc<Meter>) -> Endpoint {
        Endpoint { meter: Some(meter), ..self.clone() }
    }

    /// The same, each connection of which takes at most so many bytes per second from the broker.
    #[must_use]
    pub fn paced(&self, rate: NonZeroU64) -> Endpoint {
        Endpoint { rate: Some(rate), ..self.clone() }
    }

    /// The same, which takes no larger packet than this, in bytes, whatever it says itself.
    #[must_use]
    pub fn taking(&self, packet: usize) -> Endpoint {
        Endpoint { packet: Some(packet), ..self.clone() }
    }

    /// The largest packet that it takes, in bytes, as far as we were told.
    #[must_use]
    pub fn packet(&self) -> Option<usize> {
        self.packet
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> &BrokerUrl {
        &self.url
    }

    /// What people should know before they connect, one sentence each.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Connects, without a limit in time.
    pub(crate) async fn stream(&self) -> Result<Stream, ConnectError> {
        let BrokerUrl { host, port, .. } = &self.url;
        let addresses = lookup_host((host.as_str(), *port)).await.map_err(ConnectError::Lookup)?;
        let mut last = None;
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    stream.set_nodelay(true).map_err(ConnectError::Tcp)?;
                    return self.secure(Metered::new(stream, self.meter.clone(), self.rate)).await;
                }
                Err(error) => last = Some(error),
            }
        }
        let nowhere = || io::Error::new(io::ErrorKind::NotFound, "its name has no address");
        Err(ConnectError::Tcp(last.unwrap_or_else(nowhere)))
    }

    async fn secure(&self, stream: Metered) -> Result<Stream, ConnectError> {
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let connector = TlsConnector::from(Arc::clone(&tls.config));
        match connector.connect(tls.name.clone(), stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(self.failure(error, Moment::Handshake)),
        }
    }

    /// What an error of the stream means, at a moment before the broker's greeting.
    pub(crate) fn failure(&self, error: io::Error, moment: Moment) -> ConnectError {
        match (self.tls.as_ref(), tls_error(&error)) {
            (Some(tls), Some(error)) => ConnectError::Tls(TlsError::of(error, tls)),
            _ => match error.kind() {
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe => ConnectError::HungUp(moment),
                _ => ConnectError::Tcp(error),
            },
        }
    }

    pub(crate) fn is_plain(&self) -> bool {
        self.tls.is_none()
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.url, f)
    }
}

/// What the broker's certificate must be for. An IPv6 address there has no zone: that is our end's business.
fn server_name(host: &str) -> Result<ServerName<'static>, TrustError> {
    let address = host.split('%').next().and_then(|address| address.parse::<IpAddr>().ok());
    match address {
        Some(address) => Ok(ServerName::IpAddress(address.into())),
        None => ServerName::try_from(host.to_owned()).map_err(|_| TrustError::Host { host: host.to_owned() }),
    }
}

/// The TLS error in what a stream says, if it is one.
pub(crate) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// When a broker hangs up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// After our CONNECT, without TLS.
    Plain,
    /// In the TLS handshake.
    Handshake,
    /// After our CONNECT, with TLS.
    Secured,
}

/// Why there is no connection to a broker.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody knows the host's name.
    #[error("{0}")]
    Lookup(io::Error),
    /// Nobody listens there, or the network is down.
    #[error("{0}")]
    Tcp(io::Error),
    /// It takes too long.
    #[error("no answer for {} s", limits::CONNECT.as_secs())]
    Silent,
    /// It hung up before it said anything of use.
    #[error("it closed the connection{}", match .0 { Moment::Handshake => " in the TLS handshake", _ => "" })]
    HungUp(Moment),
    /// A plain connection to a port of TLS.
    #[error("it speaks TLS there")]
    SpeaksTls,
    /// There is no trust, on one side or the other.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl ConnectError {
    /// Whether trying again may help.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        !matches!(self, ConnectError::SpeaksTls | ConnectError::Tls(_))
    }

    /// What to do about it, if it is about TLS.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            ConnectError::Lookup(_) | ConnectError::Tcp(_) | ConnectError::Silent => return None,
            ConnectError::HungUp(Moment::Plain) => {
                "is it a broker? If that port speaks TLS, write `mqtts://` instead of `mqtt://`"
            }
            ConnectError::HungUp(Moment::Handshake) => {
                "if that port speaks no TLS, write `mqtt://` instead of `mqtts://`; if it does, its log says why"
            }
            ConnectError::HungUp(Moment::Secured) => {
                "its log says why; if it wants a client certificate, give one with `--cert` and `--key`"
            }
            ConnectError::SpeaksTls => "write `mqtts://` instead of `mqtt://`",
            ConnectError::Tls(error) => return error.hint(),
        };
        Some(hint.to_owned())
    }
}

/// Why two sides that speak TLS do not get together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// Its certificate comes from somebody else.
    #[error("its certificate is from a CA that is not trusted here")]
    UnknownCa {
        /// The one CA that is trusted, if it is not the system's.
        ca: Option<PathBuf>,
    },
    /// Its certificate is for another host.
    #[error("its certificate is for {}, not for `{host}`", names(presented))]
    Name {
        /// What the certificate should be for.
        host: String,
        /// What it is for.
        presented: Vec<String>,
    },
    /// Its certificate is too old.
    #[error("its certificate has expired")]
    Expired,
    /// Its certificate is too new, or our clock is too slow.
    #[error("its certificate is not valid yet")]
    NotYet,
    /// There is something else about its certificate.
    #[error("its certificate cannot be used: {0}")]
    Certificate(String),
    /// What it says is no TLS.
    #[error("it does not speak TLS there")]
    NotTls,
    /// It ends the handshake, for one of several reasons.
    #[error("it refused the TLS handshake")]
    NotAgreed,
    /// It wants to know who we are.
    #[error("it wants a client certificate")]
    Wanted,
    /// It does not believe who we are.
    #[error("it does not accept our client certificate ({0})")]
    Refused(String),
    /// Something else, on either side.
    #[error("TLS failed: {0}")]
    Other(String),
}

fn names(presented: &[String]) -> String {
    let quoted: Vec<String> = presented.iter().map(|name| format!("`{}`", plain_name(name))).collect();
    match quoted.is_empty() {
        true => "no host at all".to_owned(),
        false => quoted.join(", "),
    }
}

/// `DnsName("hub")` and `IpAddress(10.0.0.1)`, as webpki shows them, without what is not the name.
fn plain_name(name: &str) -> String {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(name);
    inner.trim_matches('"').escape_debug().to_string()
}

impl TlsError {
    fn of(error: &rustls::Error, tls: &Tls) -> TlsError {
        use rustls::Error;
        match error {
            Error::InvalidCertificate(error) => match error {
                CertificateError::UnknownIssuer => TlsError::UnknownCa { ca: tls.ca.clone() },
                CertificateError::NotValidForName => {
                    TlsError::Name { host: tls.name.to_str().into_owned(), presented: Vec::new() }
                }
                CertificateError::NotValidForNameContext { presented, .. } => {
                    TlsError::Name { host: tls.name.to_str().into_owned(), presented: presented.clone() }
                }
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => TlsError::Expired,
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    TlsError::NotYet
                }
                other => TlsError::Certificate(other.to_string()),
            },
            Error::InvalidMessage(_) => TlsError::NotTls,
            Error::AlertReceived(alert) => match alert {
                AlertDescription::CertificateRequired | AlertDescription::NoCertificate => TlsError::Wanted,
                // Before TLS 1.3 there is no other word for a missing certificate.
                AlertDescription::HandshakeFailure => TlsError::NotAgreed,
                AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied
                | AlertDescription::DecryptError
                    if tls.has_certificate =>
                {
                    TlsError::Refused(format!("{alert:?}"))
                }
                alert => TlsError::Other(format!("it says {alert:?}")),
            },
            other => TlsError::Other(other.to_string()),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            TlsError::UnknownCa { ca: None } => "give the broker's CA with `--ca` or MPYPI_CA",
            TlsError::UnknownCa { ca: Some(ca) } => {
                return Some(format!(
                    "`{}` is not the CA that made it: give the broker's own with `--ca`",
                    ca.display()
                ));
            }
            TlsError::Name { presented, .. } => match presented.is_empty() {
                true => {
                    "make it a certificate with its host in subjectAltName; other names in it do not count"
                }
                false => {
                    "connect to the broker by a name that its certificate is for, or give it another one"
                }
            },
            TlsError::Expired => "renew the broker's certificate; or is this machine's clock wrong?",
            TlsError::NotYet => "is this machine's clock wrong?",
            TlsError::Certificate(_) => {
                "a broker needs a version 3 certificate for a server, which is not a CA's own"
            }
            TlsError::NotTls => "write `mqtt://` instead of `mqtts://`, or name the port that speaks TLS",
            TlsError::NotAgreed => {
                "it may want a client certificate (`--cert` and `--key`), or a cipher that is not spoken here; its log \
                 says which"
            }
            TlsError::Wanted => "give one with `--cert` and its key with `--key`",
            TlsError::Refused(_) => {
                "give one with `--cert` and `--key` that the broker's CA made, and that is valid"
            }
            TlsError::Other(_) => return None,
        };
        Some(hint.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(url: &str, trust: &TrustArgs) -> Vec<String> {
        Endpoint::new(url.parse().unwrap(), trust).unwrap().warnings().to_vec()
    }

    #[test]
    fn a_password_in_clear_is_worth_a_warning_unless_it_stays_on_this_machine() {
        let none = TrustArgs::default();
        let warned = warnings("mqtt://ann:secret@hub.local", &none);
        assert!(warned[0].contains("password travels in clear to mqtt://hub.local:1883"), "{warned:?}");
        assert!(!warned[0].contains("secret"));
        assert!(warnings("mqtt://ann:secret@127.0.0.1", &none).is_empty());
        assert!(warnings("mqtt://hub.local", &none).is_empty());
    }

    #[test]
    fn a_certificate_that_nobody_will_see_is_worth_a_warning() {
        let trust = TrustArgs { cert: Some("c.pem".into()), key: Some("k.pem".into()), ca: None };
        assert_eq!(warnings("mqtt://127.0.0.1", &trust).len(), 1);
    }

    #[test]
    fn a_certificate_is_for_a_name_or_an_address_without_its_zone() {
        assert_eq!(server_name("fe80::1%eth0").unwrap().to_str(), "fe80::1");
        assert_eq!(server_name("hub.local").unwrap().to_str(), "hub.local");
        assert!(matches!(server_name("a..b"), Err(TrustError::Host { .. })));
    }

    #[test]
    fn the_names_of_a_certificate_are_shown_as_people_write_them() {
        let presented = vec!["DnsName(\"hub\")".to_owned(), "IpAddress(10.0.0.1)".to_owned()];
        assert_eq!(names(&presented), "`hub`, `10.0.0.1`");
    }
}
