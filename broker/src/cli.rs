//! The whole command line of `mpypi-broker`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use mpypi_broker::{
    faces::thingsboard::checksum::Algorithm,
    gateway::HttpEndpoint,
    listen::{Endpoint, tls::ClientAuth},
};
use mpypi_protocol::{BrokerUrl, ChannelName};

/// An MQTT broker whose retained messages are a durable package index.
#[derive(Debug, Parser)]
#[command(
    name = "mpypi-broker",
    version,
    after_help = "Exit codes: 0 done, or stopped on request; 1 failed, or not all in order; 2 usage.\n\nExamples:\n  \
        mpypi-broker serve\n  \
        mpypi-broker serve --listen 127.0.0.1:0 --data /var/lib/mpypi\n  \
        mpypi-broker init --tls --name hub.local\n  \
        mpypi-broker cert node kitchen\n  \
        mpypi-broker user add ci --role publisher --token\n  \
        mpypi-broker user add kitchen --role node < password.txt\n  \
        mpypi-broker serve --upstream mqtts://site-7:SECRET@hub.example --upstream-channel stable\n  \
        mpypi-broker gateway --upstream mqtts://gateway:SECRET@hub.example --http 127.0.0.1:8080\n  \
        mpypi-broker device add thermostat-7 --channel stable\n  \
        mpypi-broker backup /media/usb/mpypi\n  \
        mpypi-broker gc --dry-run\n  \
        mpypi-broker check --deep\n  \
        MPYPI_LOG=debug mpypi-broker serve"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve MQTT 3.1.1 and 5 until SIGINT or SIGTERM
    Serve(ServeArgs),
    /// Serve HTTP from a broker or cluster elsewhere, without being a broker; several side by side show the same
    ///
    /// Everything that is read here comes from there, and everything that is written here goes there, with this gateway's
    /// login; what is kept here is a copy, made again when it is lost. `/healthz` says 503 until the copy is whole.
    Gateway(GatewayArgs),
    /// Add, remove and list users; a running broker notices
    User(UserArgs),
    /// Add, move, remove and list devices that speak ThingsBoard's API; a running broker notices
    Device(DeviceArgs),
    /// Write a configuration file, and with `--tls` certificates, where `serve` finds them
    Init(InitArgs),
    /// Make certificates for nodes, and renew the broker's; a running broker notices
    Cert(CertArgs),
    /// Back up all retained messages and who may log in, also while the broker runs
    ///
    /// The folder holds one whole backup at any time. Backing up into it again copies only what is new, so it
    /// may be called from cron as often as you like; every byte is read and checked each time.
    Backup(BackupArgs),
    /// Put a backup back, into a running broker or an empty folder; removes nothing
    ///
    /// Puts back each message whose topic holds nothing. A channel with a release as new or newer stays.
    Restore(RestoreArgs),
    /// Remove packages that none of a channel's last lists names; a running broker does it daily
    Gc(GcArgs),
    /// Look whether users, rules, disk and index are in order; changes nothing
    Check(CheckArgs),
}

/// The folder that the commands work on.
#[derive(Debug, Args)]
pub(crate) struct Data {
    /// Folder of the index
    #[arg(long, value_name = "DIR", default_value = "data", env = "MPYPI_DATA", hide_env_values = true)]
    pub data: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// Folder of the backup, made if it is not there
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Leave `users.toml`, `rules.toml`, `devices.toml` and `broker.toml` out
    #[arg(long)]
    pub no_users: bool,
    #[command(flatten)]
    pub data: Data,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// Folder of the backup
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Also put back what differs from what its topic holds now
    #[arg(long)]
    pub replace: bool,
    /// Only say what would be put back
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub data: Data,
}

#[derive(Debug, Args)]
pub(crate) struct GcArgs {
    /// Only say what would go
    #[arg(long)]
    pub dry_run: bool,
    /// What the last N lists of any channel name stays [default: the broker's setting, 10]
    #[arg(long, value_name = "N")]
    pub keep: Option<usize>,
    /// What was uploaded or named so recently stays, as 90s, 30m, 12h or 7d [default: the broker's setting, 7d]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub grace: Option<Duration>,
    #[command(flatten)]
    pub data: Data,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Read every payload, and compare its digest
    #[arg(long)]
    pub deep: bool,
    #[command(flatten)]
    pub data: Data,
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time: write it as 90s, 30m, 12h or 7d");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let unit: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(wrong)
}

#[derive(Debug, Default, Args)]
pub(crate) struct ServeArgs {
    /// Where to listen, as `mqtt://`, `mqtts://`, `ws://` or `wss://` and an address, or ADDRESS:PORT for `mqtt://`;
    /// may be given more than once. Port 0 picks a free port, which is printed [default: 127.0.0.1:1883]
    #[arg(long, value_name = "URL")]
    pub listen: Vec<Endpoint>,
    /// Where to answer HTTP, as ADDRESS:PORT or with `https://` before it; may be given more than once: packages,
    /// `mip`, PyPI's simple index, `/healthz`, `/metrics`; port 0 picks a free port
    #[arg(long, value_name = "URL")]
    pub http: Vec<HttpEndpoint>,
    /// Where to show `--promoter-channel` [default: 127.0.0.1:9090]
    #[arg(long, value_name = "URL")]
    pub promoter: Option<HttpEndpoint>,
    /// Let everyone read that channel there who can reach it, also where there are users: those devices cannot log in
    #[arg(long)]
    pub unsafe_promoter: bool,
    /// Show every node to Home Assistant as an update, by MQTT discovery
    #[arg(long)]
    pub home_assistant: bool,
    #[command(flatten)]
    pub upstream: UpstreamArgs,
    /// Folder of the index, made if it is not there [default: data]
    #[arg(long, value_name = "DIR", env = "MPYPI_DATA", hide_env_values = true)]
    pub data: Option<PathBuf>,
    /// Authorities, as PEM, whose certificates make a client the node they are made out to, without a password
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// Whether clients over TLS must show such a certificate [default: optional]
    #[arg(long, value_enum, value_name = "WHEN")]
    pub tls_client_auth: Option<ClientCertificates>,
    /// Largest package, in bytes; at most what fits into a packet [default: 8388608]
    #[arg(long, value_name = "BYTES")]
    pub max_package: Option<u64>,
    #[command(flatten)]
    pub site: SiteArgs,
}

/// What a broker and a gateway are told alike.
#[derive(Debug, Default, Args)]
pub(crate) struct SiteArgs {
    /// Channel to show to ota-promoter's devices, as its server shows a folder
    #[arg(long, value_name = "CHANNEL")]
    pub promoter_channel: Option<ChannelName>,
    /// Configuration file; what is said here counts before it [default: broker.toml in the folder of the index]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Certificate for `https://`, `mqtts://` and `wss://`, with those that lead to its authority, as PEM; noticed when
    /// renewed
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate, as PEM
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Let everyone in who can reach a listener on another address than loopback, while there are no users
    #[arg(long)]
    pub unsafe_open: bool,
    /// Log as JSON lines
    #[arg(long)]
    pub log_json: bool,
}

/// The broker whose channels are served here. More is said in `[upstream]` of the configuration file.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct UpstreamArgs {
    /// Serve the channels of this broker, also while it is away, as `mqtts://[USER[:PASSWORD]@]HOST[:PORT]`; may be given
    /// more than once: one that answers is stayed with
    #[arg(long, value_name = "URL", env = "MPYPI_UPSTREAM", hide_env_values = true)]
    pub upstream: Vec<BrokerUrl>,
    /// Trust it if the CA in this PEM file vouches for it, and no other [default: the system's CAs]
    #[arg(long, value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,
    /// Take this channel; may be given more than once [default: all]
    #[arg(long, value_name = "CHANNEL")]
    pub upstream_channel: Vec<ChannelName>,
    /// Take only what this root of trust vouches for
    #[arg(long, value_name = "FILE")]
    pub upstream_pin: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct GatewayArgs {
    #[command(flatten)]
    pub upstream: UpstreamArgs,
    /// Where to answer HTTP, as ADDRESS:PORT or with `https://` before it; may be given more than once; port 0 picks a
    /// free port [default: 127.0.0.1:8080]
    #[arg(long, value_name = "URL")]
    pub http: Vec<HttpEndpoint>,
    /// Folder of the copy, and of `users.toml` for who may log in here [default: a new one, removed in the end]
    #[arg(long, value_name = "DIR", env = "MPYPI_DATA", hide_env_values = true)]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    pub site: SiteArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ClientCertificates {
    /// Who shows none logs in with a password
    Optional,
    /// Who shows none gets no connection
    Required,
}

impl From<ClientCertificates> for ClientAuth {
    fn from(when: ClientCertificates) -> ClientAuth {
        match when {
            ClientCertificates::Optional => ClientAuth::Optional,
            ClientCertificates::Required => ClientAuth::Required,
        }
    }
}

/// The folder that commands with commands of their own work on.
#[derive(Debug, Args)]
pub(crate) struct At {
    /// Folder of the index, where users, devices and what `init --tls` made lie, too
    #[arg(
        long,
        value_name = "DIR",
        default_value = "data",
        env = "MPYPI_DATA",
        hide_env_values = true,
        global = true
    )]
    pub data: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Folder of the index
    #[arg(value_name = "DIR", default_value = "data", env = "MPYPI_DATA", hide_env_values = true)]
    pub data: PathBuf,
    /// Make a certificate authority and a certificate of the broker, and listen with TLS
    #[arg(long)]
    pub tls: bool,
    /// Host name or address by which clients know the broker; may be given more than once [default: localhost,
    /// 127.0.0.1, ::1 and this host's name]
    #[arg(long, value_name = "HOST", requires = "tls")]
    pub name: Vec<String>,
    /// Write over what is there, but never over a certificate authority
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CertArgs {
    #[command(flatten)]
    pub at: At,
    #[command(subcommand)]
    pub command: CertCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CertCommand {
    /// Make a key and a certificate with which a node may be itself, without a password
    Node {
        /// The node's name
        name: String,
        /// Make others where the node has some already; those go on to be good
        #[arg(long)]
        force: bool,
    },
    /// Make a new certificate for the broker's key; nobody is disconnected
    Renew {
        /// Host name or address, instead of those in the old one; may be given more than once
        #[arg(long, value_name = "HOST")]
        name: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct UserArgs {
    #[command(flatten)]
    pub at: At,
    #[command(subcommand)]
    pub command: UserCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum UserCommand {
    /// Add a user, or give one another role, password or token
    ///
    /// The password is read from standard input: its first line. Once there is a user, everybody has to log in.
    Add {
        /// The user's name; a node's is its MQTT client id too
        name: String,
        /// What the user may do
        #[arg(long, value_enum)]
        role: UserRole,
        /// Make a bearer token, print it once, and take no password
        #[arg(long)]
        token: bool,
    },
    /// Remove a user; whoever is connected as this user is sent away
    Remove {
        /// The user's name
        name: String,
    },
    /// List all users
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    #[command(flatten)]
    pub at: At,
    #[command(subcommand)]
    pub command: DeviceCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// Add a device that logs in with an access token, by MQTT or HTTP
    ///
    /// What it calls firmware is its channel's image, or the channel's files if there is no image.
    Add {
        /// The name of its node
        node: String,
        /// The channel that it follows
        #[arg(long, value_name = "NAME")]
        channel: ChannelName,
        /// A token that the device has already: 16 to 128 letters, digits, `-`, `.`, `_` or `~` [default: a new one,
        /// which is printed]
        #[arg(long, value_name = "TOKEN")]
        token: Option<String>,
        /// Another channel, for what ThingsBoard calls software
        #[arg(long, value_name = "NAME")]
        software: Option<ChannelName>,
        /// Its hardware: which of several images it takes
        #[arg(long, value_name = "NAME")]
        target: Option<String>,
        /// The checksum that it is given: md5, sha256, sha384, sha512, crc32, murmur3_32 or murmur3_128
        #[arg(long, value_name = "ALGORITHM", default_value = "sha256")]
        checksum: Algorithm,
    },
    /// Have a device follow another channel
    Move {
        /// The name of its node
        node: String,
        /// The channel that it is to follow
        #[arg(long, value_name = "NAME")]
        channel: ChannelName,
    },
    /// Give a device a new token; the old one is worth nothing any more
    Rotate {
        /// The name of its node
        node: String,
    },
    /// Remove a device; if it is connected, it is sent away
    Remove {
        /// The name of its node
        node: String,
    },
    /// Add or change many devices: one a line, as `node,channel[,token[,target]]`
    ///
    /// Prints `node,token` for those that get a new token.
    Import {
        /// The list; `-` for standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// List all devices
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum UserRole {
    /// Everything
    Admin,
    /// Reads everything of ours; writes channels, packages and orders to nodes
    Publisher,
    /// A device: reads channels and packages, writes only below its own name
    Node,
    /// Reads everything of ours, writes nothing
    Viewer,
    /// A broker that takes its channels from this one: reads channels and packages, speaks for its nodes
    Edge,
}
