//! The whole command line of `mpypi-broker`.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};

/// An MQTT broker whose retained messages are a durable package index.
#[derive(Debug, Parser)]
#[command(
    name = "mpypi-broker",
    version,
    after_help = "Exit codes: 0 stopped on request, 1 failed, 2 usage.\n\nExamples:\n  \
        mpypi-broker serve\n  \
        mpypi-broker serve --listen 127.0.0.1:0 --data /var/lib/mpypi\n  \
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
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Address to listen on; may be given more than once. Port 0 picks a free port, which is printed
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:1883")]
    pub listen: Vec<SocketAddr>,
    /// Folder of the index, made if it is not there
    #[arg(long, value_name = "DIR", default_value = "data", env = "MPYPI_DATA")]
    pub data: PathBuf,
    /// Largest package, in bytes; at most what fits into a packet
    #[arg(long, value_name = "BYTES", default_value_t = mpypi_protocol::limits::PACKAGE)]
    pub max_package: u64,
    /// Let everyone in who can reach a listener on another address than loopback. There are no credentials
    /// in this version
    #[arg(long)]
    pub unsafe_open: bool,
    /// Log as JSON lines
    #[arg(long)]
    pub log_json: bool,
}
