//! What the command line says about a broker.

use std::{path::PathBuf, time::Duration};

use mpypi_protocol::BrokerUrl;

use crate::{endpoint::Endpoint, trust::TrustError};

/// Where the broker is, and whom to trust there.
#[derive(Debug, Clone, clap::Args)]
pub struct BrokerArgs {
    /// The broker, as `mqtt://[USER[:PASSWORD]@]HOST[:PORT]`, or `mqtts://` for TLS
    #[arg(
        long,
        value_name = "URL",
        env = "MPYPI_BROKER",
        hide_env_values = true,
        default_value = "mqtt://127.0.0.1:1883"
    )]
    pub broker: BrokerUrl,
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

impl BrokerArgs {
    /// Reads the files named.
    ///
    /// # Errors
    /// Says which file is wrong.
    pub fn endpoint(self) -> Result<Endpoint, TrustError> {
        Endpoint::new(self.broker, &self.trust)
    }
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
