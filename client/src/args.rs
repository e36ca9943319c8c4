//! What the command line says about a broker, or a file that it names.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use mpypi_protocol::{
    BrokerUrl,
    address::AddressError,
    limits::{CHUNK_MIN, PACKAGE, PACKET},
};
use serde::Deserialize;

use crate::{brokers::Brokers, endpoint::Endpoint, limits, trust::TrustError};

/// Where the broker is, and whom to trust there.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct BrokerArgs {
    /// The broker, as `mqtt://[USER[:PASSWORD]@]HOST[:PORT]`, or `mqtts://` for TLS; several, with commas, where they are
    /// nodes of one cluster [default: mqtt://127.0.0.1:1883]
    #[arg(long, value_name = "URL,…", env = "MPYPI_BROKER", hide_env_values = true, value_delimiter = ',')]
    pub broker: Vec<BrokerUrl>,
    /// A TOML file that says so where `--broker` does not: `[brokers]` with `urls`, and `ca`, `cert`, `key`, `max-packet` and
    /// `chunk`
    #[arg(long, value_name = "FILE", env = "MPYPI_CONFIG")]
    pub config: Option<PathBuf>,
    /// Whom to trust.
    #[command(flatten)]
    pub trust: TrustArgs,
}

/// Whom to trust at an `mqtts://` broker, and who we are there.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct TrustArgs {
    /// Trust an `mqtts://` broker if the CA in this PEM file vouches for it, and no other [default: the system's CAs]
    #[arg(long, value_name = "FILE", env = "MPYPI_CA")]
    pub ca: Option<PathBuf>,
    /// The client certificate to show an `mqtts://` broker, a PEM file
    #[arg(long, value_name = "FILE", env = "MPYPI_CERT", requires = "key")]
    pub cert: Option<PathBuf>,
    /// The private key of `--cert`, a PEM file
    #[arg(long, value_name = "FILE", env = "MPYPI_KEY", requires = "cert")]
    pub key: Option<PathBuf>,
}

/// What `--config` names.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    brokers: Table,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Table {
    urls: Vec<String>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    max_packet: Option<toml::Value>,
    chunk: Option<toml::Value>,
}

/// What is said of the brokers cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BrokersError {
    /// A file of certificates or a key.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The file that `--config` names cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is none of brokers.
    #[error("`{}` does not say which brokers there are", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<toml::de::Error>,
    },
    /// It names none, or something else.
    #[error("`{}` names a broker that is none", path.display())]
    Url {
        /// The file.
        path: PathBuf,
        /// Why it is none.
        source: AddressError,
    },
    /// It says how large packets or chunks are, in a way that cannot be.
    #[error("`{}`, `{key}`: {problem}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Why it cannot be.
        problem: String,
    },
    /// It names none, or too many are named.
    #[error("there are {found} brokers, and there can be 1 to {}", limits::BROKERS)]
    Count {
        /// How many are named.
        found: usize,
    },
}

impl BrokersError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        match self {
            BrokersError::Trust(error) => error.hint(),
            BrokersError::Config { .. } | BrokersError::Url { .. } => {
                Some("write `[brokers]` and below it `urls = [\"mqtts://a.example\", \"mqtts://b.example\"]`")
            }
            BrokersError::Read { .. } | BrokersError::Size { .. } | BrokersError::Count { .. } => None,
        }
    }
}

impl BrokerArgs {
    /// One broker, and whom to trust there.
    #[must_use]
    pub fn one(broker: BrokerUrl, trust: TrustArgs) -> BrokerArgs {
        BrokerArgs { broker: vec![broker], config: None, trust }
    }

    /// Reads the files named.
    ///
    /// # Errors
    /// Says which file is wrong.
    pub fn brokers(self) -> Result<Brokers, BrokersError> {
        let (mut urls, mut trust) = (self.broker, self.trust);
        let (mut packet, mut chunk) = (None, None);
        if let (true, Some(path)) = (urls.is_empty(), &self.config) {
            let table = read(path)?;
            let text = |value: toml::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let wrong = |key| move |problem| BrokersError::Size { path: path.clone(), key, problem };
            let said = table.max_packet.map(|value| parse_packet(&text(value))).transpose();
            packet = said.map_err(wrong("max-packet"))?;
            chunk = table.chunk.map(|value| parse_chunk(&text(value))).transpose().map_err(wrong("chunk"))?;
            for url in table.urls {
                let path = || path.clone();
                urls.push(url.parse().map_err(|source| BrokersError::Url { path: path(), source })?);
            }
            // What the file names is where the file is.
            let beside =
                |file: PathBuf| path.parent().map_or_else(|| file.clone(), |folder| folder.join(&file));
            trust.ca = trust.ca.or(table.ca.map(beside));
            if trust.cert.is_none() {
                (trust.cert, trust.key) = (table.cert.map(beside), table.key.map(beside));
            }
        } else if urls.is_empty() {
            urls.push(BrokerUrl::here());
        }
        if urls.len() > limits::BROKERS {
            return Err(BrokersError::Count { found: urls.len() });
        }
        let endpoints: Result<Vec<_>, _> = urls.into_iter().map(|url| Endpoint::new(url, &trust)).collect();
        let mut brokers = Brokers::new(endpoints?).ok_or(BrokersError::Count { found: 0 })?;
        if let Some(packet) = packet {
            brokers = brokers.taking(packet);
        }
        if let Some(chunk) = chunk {
            brokers = brokers.in_chunks_of(chunk);
        }
        Ok(brokers)
    }
}

fn read(path: &Path) -> Result<Table, BrokersError> {
    let text =
        fs::read_to_string(path).map_err(|source| BrokersError::Read { path: path.to_owned(), source })?;
    let config: Config = toml::from_str(&text)
        .map_err(|source| BrokersError::Config { path: path.to_owned(), source: Box::new(source) })?;
    Ok(config.brokers)
}

/// Reads the largest packet that a broker takes, as `131072`, `128K` or `1M`; in bytes.
///
/// # Errors
/// Says what it can be.
pub fn parse_packet(text: &str) -> Result<usize, String> {
    let size = parse_size(text, limits::PACKET_LEAST, PACKET as u64)?;
    usize::try_from(size).map_err(|error| error.to_string())
}

/// Reads the size of chunks, as `65536` or `64K`; in bytes.
///
/// # Errors
/// Says what it can be.
pub fn parse_chunk(text: &str) -> Result<u64, String> {
    parse_size(text, CHUNK_MIN, PACKAGE)
}

/// Reads a size of `least` to `most` bytes, as `65536`, `64K` or `1M`.
///
/// # Errors
/// Says what it can be.
pub fn parse_size(text: &str, least: u64, most: u64) -> Result<u64, String> {
    let (number, unit) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 1024),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 1024 * 1024),
        _ => (text, 1),
    };
    let size = number.parse().ok().and_then(|number: u64| number.checked_mul(unit));
    let size = size.filter(|size| (least..=most).contains(size));
    size.ok_or_else(|| {
        format!("use a size from {}K to {}M, as 65536, 64K or 1M", least / 1024, most / (1024 * 1024))
    })
}

/// Reads `500ms`, `60s`, `5m` or `1h`.
///
/// # Errors
/// Says what a time is.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..split].parse().map_err(|_| "use a time as 500ms, 60s, 5m or 1h".to_owned())?;
    let unit = match &text[split..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("use a time as 500ms, 60s, 5m or 1h".to_owned()),
    };
    number.checked_mul(unit).map(Duration::from_millis).ok_or_else(|| "this is too long".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(args: BrokerArgs) -> Vec<String> {
        args.brokers().unwrap().iter().map(|broker| broker.url().to_string()).collect()
    }

    #[test]
    fn a_file_says_how_large_packets_and_chunks_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mpypi.toml");
        let brokers = |text: &str| {
            fs::write(&path, format!("[brokers]\nurls = [\"mqtt://a\", \"mqtt://b\"]\n{text}\n")).unwrap();
            BrokerArgs { config: Some(path.clone()), ..BrokerArgs::default() }.brokers()
        };
        let sized = brokers("max-packet = \"128K\"\nchunk = 32768").unwrap();
        assert!(sized.iter().all(|broker| broker.packet() == Some(128 * 1024)));
        assert_eq!(sized.chunk(), Some(32 * 1024));
        let plain = brokers("").unwrap();
        assert_eq!((plain.first().packet(), plain.chunk()), (None, None));
        for (key, value) in
            [("max-packet", "\"1K\""), ("max-packet", "\"17M\""), ("chunk", "1023"), ("chunk", "[1]")]
        {
            let error = brokers(&format!("{key} = {value}")).unwrap_err();
            assert!(
                matches!(error, BrokersError::Size { key: wrong, .. } if wrong == key),
                "{value}: {error}"
            );
        }
    }

    #[test]
    fn a_file_names_brokers_where_the_command_line_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mpypi.toml");
        fs::write(&path, "[brokers]\nurls = [\"mqtt://a\", \"mqtt://b:1900\"]\n").unwrap();
        let args = |broker: Vec<BrokerUrl>| BrokerArgs {
            broker,
            config: Some(path.clone()),
            trust: TrustArgs::default(),
        };
        assert_eq!(urls(args(Vec::new())), ["mqtt://a:1883", "mqtt://b:1900"]);
        assert_eq!(urls(args(vec!["mqtt://c".parse().unwrap()])), ["mqtt://c:1883"]);
        assert_eq!(urls(BrokerArgs::default()), ["mqtt://127.0.0.1:1883"]);
        fs::write(&path, "[brokers]\nurls = [\"http://a\"]\n").unwrap();
        assert!(matches!(args(Vec::new()).brokers(), Err(BrokersError::Url { .. })));
        fs::write(&path, "[brokers]\nurls = []\n").unwrap();
        assert!(matches!(args(Vec::new()).brokers(), Err(BrokersError::Count { found: 0 })));
        fs::write(&path, "[broker]\nurl = \"mqtt://a\"\n").unwrap();
        let error = args(Vec::new()).brokers().unwrap_err();
        assert!(error.hint().unwrap().contains("[brokers]"), "{error}");
    }
}
