//! Where a broker is: `mqtt://[user[:password]@]host[:port]`, or `mqtts://` for TLS.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use percent_encoding::percent_decode_str;

/// A broker's address, with what is needed to log in there. Its [`Display`](fmt::Display) leaves the
/// password out.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl {
    /// Whether TLS is spoken there.
    pub security: Security,
    /// A host name or address; an IPv6 address without its brackets.
    pub host: String,
    /// The TCP port; unless given, 1883, and 8883 with TLS.
    pub port: u16,
    /// User name and password, if given.
    pub credentials: Option<(String, String)>,
}

/// Whether what is said on the way to a broker and back is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// `mqtt://` or `tcp://`: everybody on the way can read and change it.
    Plain,
    /// `mqtts://` or `ssl://`: the broker proves who it is, and nobody else can read it.
    Tls,
}

/// Why a text is no [`BrokerUrl`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Another scheme, or none.
    #[error("`{found}` does not start with `mqtt://` or `mqtts://`")]
    Scheme {
        /// What was found, without credentials.
        found: String,
    },
    /// `ws` or `wss`, which this version cannot reach.
    #[error("`{scheme}://` is not supported by this version, only `mqtt://` and `mqtts://`")]
    Unsupported {
        /// The scheme.
        scheme: String,
    },
    /// No host between `//` and the port.
    #[error("the address names no host")]
    Host,
    /// The host is no name and no address.
    #[error("`{}` is no host: use a name, an IPv4 address or an IPv6 address in brackets", found.escape_debug())]
    HostName {
        /// What was found.
        found: String,
    },
    /// The port is no number from 1 to 65535.
    #[error("`{found}` is no port")]
    Port {
        /// What was found.
        found: String,
    },
    /// Something follows the port.
    #[error("`{found}` after the port means nothing here")]
    Rest {
        /// What was found.
        found: String,
    },
    /// Percent-encoding that is not UTF-8.
    #[error("the user name or password is not UTF-8")]
    Credentials,
}

impl BrokerUrl {
    /// The port of MQTT over TCP.
    pub const PORT: u16 = 1883;
    /// The port of MQTT over TLS.
    pub const TLS_PORT: u16 = 8883;

    /// The broker of this machine, where most people's first one is.
    #[must_use]
    pub fn here() -> BrokerUrl {
        BrokerUrl {
            security: Security::Plain,
            host: "127.0.0.1".to_owned(),
            port: BrokerUrl::PORT,
            credentials: None,
        }
    }

    /// Whether the host is this machine, by its address or as `localhost`: what is said stays here.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        match self.host.parse::<IpAddr>() {
            Ok(address) => address.to_canonical().is_loopback(),
            Err(_) => self.host.eq_ignore_ascii_case("localhost"),
        }
    }
}

impl Security {
    /// The scheme of an address.
    #[must_use]
    pub fn scheme(self) -> &'static str {
        match self {
            Security::Plain => "mqtt",
            Security::Tls => "mqtts",
        }
    }

    /// The port, unless an address names another.
    #[must_use]
    pub fn port(self) -> u16 {
        match self {
            Security::Plain => BrokerUrl::PORT,
            Security::Tls => BrokerUrl::TLS_PORT,
        }
    }
}

impl FromStr for BrokerUrl {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) => (scheme, rest),
            None => {
                let found = text.rsplit('@').next().unwrap_or_default().to_owned();
                return Err(AddressError::Scheme { found });
            }
        };
        let security = match scheme {
            "mqtt" | "tcp" => Security::Plain,
            "mqtts" | "ssl" => Security::Tls,
            "ws" | "wss" => return Err(AddressError::Unsupported { scheme: scheme.to_owned() }),
            _ => return Err(AddressError::Scheme { found: format!("{scheme}://…") }),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, place) = match rest.rsplit_once('@') {
            Some((login, place)) => {
                let (user, password) = login.split_once(':').unwrap_or((login, ""));
                (Some((decode(user)?, decode(password)?)), place)
            }
            None => (None, rest),
        };
        if let Some((_, path)) = place.split_once('/') {
            return Err(AddressError::Rest { found: path.to_owned() });
        }
        let (host, port, good) = match place.strip_prefix('[').and_then(|v6| v6.split_once(']')) {
            Some((host, port)) => (host, port, is_ipv6(host)),
            None => {
                let (host, port) = place.split_at(place.rfind(':').unwrap_or(place.len()));
                (host, port, is_host(host))
            }
        };
        let port = match port {
            "" => None,
            port => match port.strip_prefix(':') {
                Some(port) => Some(port),
                None => return Err(AddressError::HostName { found: place.to_owned() }),
            },
        };
        if host.is_empty() {
            return Err(AddressError::Host);
        }
        if !good {
            return Err(AddressError::HostName { found: host.to_owned() });
        }
        let port = match port {
            None => security.port(),
            Some(text) => match text.parse() {
                Ok(0) | Err(_) => return Err(AddressError::Port { found: text.to_owned() }),
                Ok(port) => port,
            },
        };
        Ok(BrokerUrl { security, host: host.to_owned(), port, credentials })
    }
}

fn is_host(text: &str) -> bool {
    let bad = |c: char| c.is_whitespace() || c.is_control() || "[]:?#\\%".contains(c);
    !text.contains(bad)
}

/// An IPv6 address, with or without the zone that a link-local one needs.
fn is_ipv6(text: &str) -> bool {
    text.split('%').next().is_some_and(|address| address.parse::<Ipv6Addr>().is_ok())
}

fn decode(text: &str) -> Result<String, AddressError> {
    let decoded = percent_decode_str(text).decode_utf8().map_err(|_| AddressError::Credentials)?;
    Ok(decoded.into_owned())
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BrokerUrl { security, host, port, .. } = self;
        match host.contains(':') {
            true => write!(f, "{}://[{host}]:{port}", security.scheme()),
            false => write!(f, "{}://{host}:{port}", security.scheme()),
        }
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_read_and_never_shown() {
        let url: BrokerUrl = "mqtt://ann:p%40ss@[::1]:1900/".parse().unwrap();
        assert_eq!(url.credentials, Some(("ann".into(), "p@ss".into())));
        assert_eq!((url.host.as_str(), url.port), ("::1", 1900));
        assert_eq!(format!("{url} {url:?}"), "mqtt://[::1]:1900 mqtt://[::1]:1900");
    }

    #[test]
    fn with_tls_the_port_is_another_and_the_scheme_is_shown() {
        for (text, shown) in [
            ("mqtts://hub.local", "mqtts://hub.local:8883"),
            ("ssl://ann:x@[fe80::1%eth0]", "mqtts://[fe80::1%eth0]:8883"),
            ("mqtts://10.0.0.2:1883", "mqtts://10.0.0.2:1883"),
            ("tcp://hub", "mqtt://hub:1883"),
        ] {
            let url: BrokerUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(url.security == Security::Tls, shown.starts_with("mqtts"));
        }
    }

    #[test]
    fn only_addresses_of_this_machine_are_loopback() {
        let is_loopback = |text: &str| text.parse::<BrokerUrl>().unwrap().is_loopback();
        for here in [
            "mqtt://127.0.0.1",
            "mqtt://127.8.9.1:1",
            "mqtt://[::1]",
            "mqtt://[::ffff:127.0.0.1]",
            "mqtt://LocalHost",
        ] {
            assert!(is_loopback(here), "{here}");
        }
        for elsewhere in
            ["mqtt://hub", "mqtt://10.0.0.1", "mqtt://localhost.example", "mqtt://[::2]", "mqtt://0.0.0.0"]
        {
            assert!(!is_loopback(elsewhere), "{elsewhere}");
        }
    }

    #[test]
    fn what_cannot_be_reached_is_refused_with_the_reason() {
        let error = |text: &str| text.parse::<BrokerUrl>().unwrap_err();
        assert_eq!(error("wss://hub"), AddressError::Unsupported { scheme: "wss".into() });
        assert_eq!(error("ann:secret@hub"), AddressError::Scheme { found: "hub".into() });
        assert_eq!(error("mqtt://:1883"), AddressError::Host);
        assert_eq!(error("mqtt://hub:0"), AddressError::Port { found: "0".into() });
        assert_eq!(error("mqtt://hub:1883/x"), AddressError::Rest { found: "x".into() });
    }

    #[test]
    fn an_ipv6_address_is_never_taken_for_a_host_and_a_port() {
        for text in
            ["mqtt://::1", "mqtt://fe80::1:1883", "mqtt://[::1", "mqtt://[::1]1883", "mqtt://[hub]:1883"]
        {
            let error = text.parse::<BrokerUrl>().unwrap_err();
            assert!(matches!(error, AddressError::HostName { .. }), "{text}: {error}");
        }
    }
}
