//! The whole command line of `mpypi-broker`.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

/// An MQTT broker whose retained messages are a durable package index.
#[derive(Debug, Parser)]
#[command(
    name = "mpypi-broker",
    version,
    after_help = "Exit codes: 0 stopped on request, 1 failed, 2 usage.\n\nExamples:\n  \
        mpypi-broker serve\n  \
        mpypi-broker serve --listen 127.0.0.1:0 --data /var/lib/mpypi\n  \
        mpypi-broker user add ci --role publisher --token\n  \
        mpypi-broker user add kitchen --role node < password.txt\n  \
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
    /// Add, remove and list users; a running broker notices
    User(UserArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Address to listen on; may be given more than once. Port 0 picks a free port, which is printed
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:1883")]
    pub listen: Vec<SocketAddr>,
    /// Folder of the index, made if it is not there
    #[arg(long, value_name = "DIR", default_value = "data", env = "MPYPI_DATA", hide_env_values = true)]
    pub data: PathBuf,
    /// Largest package, in bytes; at most what fits into a packet
    #[arg(long, value_name = "BYTES", default_value_t = mpypi_protocol::limits::PACKAGE)]
    pub max_package: u64,
    /// Let everyone in who can reach a listener on another address than loopback, while there are no users
    #[arg(long)]
    pub unsafe_open: bool,
    /// Log as JSON lines
    #[arg(long)]
    pub log_json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UserArgs {
    /// Folder of the index, where `users.toml` lies too
    #[arg(
        long,
        value_name = "DIR",
        default_value = "data",
        env = "MPYPI_DATA",
        hide_env_values = true,
        global = true
    )]
    pub data: PathBuf,
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
}
