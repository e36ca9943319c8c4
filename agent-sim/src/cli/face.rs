//! What stands before a device: its local interfaces, and its firmware.

use std::{
    io::{self, Write},
    net::SocketAddr,
    path::PathBuf,
};

use clap::ValueEnum;
use mpypi_agent_sim::{
    device::{FaceOptions, Mac},
    face::{
        desk::Desk,
        http::{Faces, HttpOptions},
    },
    firmware::FirmwareOptions,
    limits,
};
use mpypi_client::args::TrustArgs;

use super::Failure;

/// What stands before a device.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "The device's own interfaces")]
#[group(id = "face")]
pub(super) struct Args {
    /// Speak the App Store API and projectMM's firmware update here, as 127.0.0.1:8090; may be given more than once
    #[arg(long, value_name = "ADDRESS")]
    http: Vec<SocketAddr>,
    /// Let only those in who show this token, as `Authorization: Bearer TOKEN`
    #[arg(long, value_name = "TOKEN", env = "MPYPI_HTTP_TOKEN", hide_env_values = true, requires = "http")]
    http_token: Option<String>,
    /// Let other machines replace all that is on the device, without a token
    #[arg(long, requires = "http")]
    unsafe_open: bool,
    /// Let pages of this site speak to the device, as https://hub.local; may be given more than once
    #[arg(long, value_name = "ORIGIN", requires = "http")]
    allow_origin: Vec<String>,
    /// Answer to this name, beside addresses and this machine's own; may be given more than once
    #[arg(long, value_name = "NAME", requires = "http")]
    allow_host: Vec<String>,
    /// Install files of this folder when told to
    #[arg(long, value_name = "DIR", requires = "http")]
    local_files: Option<PathBuf>,
    /// What becomes of the channel's releases
    #[arg(long, value_enum, default_value_t = Updates::Auto)]
    updates: Updates,
    /// The hardware that firmware must be for, as esp32-eth; then the channel's newer images are installed, too
    #[arg(long, value_name = "KEY")]
    firmware_key: Option<String>,
    /// The firmware that is on the device from the start
    #[arg(long, value_name = "VERSION", default_value = env!("CARGO_PKG_VERSION"))]
    firmware_version: String,
    /// The size of each of the two slots for firmware, in bytes; 0: it cannot be replaced
    #[arg(long, value_name = "BYTES", default_value_t = limits::SLOT)]
    firmware_slot: u64,
    /// Show the firmware to Home Assistant, on projectMM's topics, as the device with this MAC address
    #[arg(long, value_name = "MAC", value_parser = Mac::new)]
    home_assistant: Option<Mac>,
}

/// What becomes of the channel's releases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Updates {
    /// They are installed; what is optional, when somebody chose it
    Auto,
    /// They are offered; all of it is installed when somebody chose it, or by an order on `cmd`
    Ask,
}

impl Args {
    /// The device's side and the faces, listening; none if nothing of it is wanted.
    pub(super) fn open(self, trust: TrustArgs) -> Result<(Option<Desk>, Option<Faces>), Failure> {
        let options = FaceOptions {
            asks: self.updates == Updates::Ask,
            firmware: FirmwareOptions {
                key: self.firmware_key,
                version: self.firmware_version,
                slot: self.firmware_slot.min(limits::CONTENT),
            },
            mac: self.home_assistant,
        };
        let unseen = self.http.is_empty() && options.mac.is_none();
        if unseen && !options.asks && options.firmware.key.is_none() {
            return Ok((None, None));
        }
        let (desk, bell) = Desk::new(options);
        if self.http.is_empty() {
            return Ok((Some(desk), None));
        }
        let options = HttpOptions {
            addresses: self.http,
            token: self.http_token,
            unsafe_open: self.unsafe_open,
            origins: self.allow_origin,
            hosts: self.allow_host,
            local_files: self.local_files,
            trust,
        };
        let faces = Faces::bind(options, bell)
            .map_err(|error| Failure { hint: error.hint().map(str::to_owned), error: error.into() })?;
        for address in faces.addresses() {
            // Nobody is left to tell if this fails.
            let _ = writeln!(io::stderr(), "listening on http://{address}");
        }
        Ok((Some(desk), Some(faces)))
    }
}
