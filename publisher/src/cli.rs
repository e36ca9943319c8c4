//! The whole command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use mpypi_client::BrokerArgs;
use mpypi_protocol::ChannelName;

use crate::{
    commands::{install, publish, push, rehearse, rollout, status, watch},
    publish::Harm,
};

/// Publish folders of MicroPython code to devices, through any MQTT broker.
#[derive(Debug, Parser)]
#[command(name = "mpypi", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  mpypi publish channels/dev              publish a channel's folder to 127.0.0.1
  mpypi publish channels/dev --dry-run    show what would be sent
  mpypi watch channels/dev                publish at every change
  mpypi rehearse channels/dev --against stable
                                          what the release does to a hundred simulated devices
  mpypi rollout channels/dev --steps 1%,10%,100%
                                          publish to few devices first, and go on while all is well
  mpypi status dev                        show the release of a channel and its devices
  mpypi status --broker mqtts://hub.local --ca ca.pem
                                          ask a broker over TLS, whose certificate a private CA made

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done, but without the effect that was waited for.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Publish a folder as a channel's new release
    Publish(publish::Args),
    /// Publish a folder now and whenever something in it changes
    Watch(watch::Args),
    /// Show channels, their releases and their devices
    Status(status::Args),
    /// Publish a release to simulated devices on a bad day, and say whether it harms any
    Rehearse(rehearse::Args),
    /// Update devices with projectMM to a channel's firmware
    Push(push::Args),
    /// Publish a release to few devices first, and stop by itself when it goes wrong
    Rollout(rollout::Args),
    /// Put a first wheel on a device that runs Mpy-BLOX
    Install(install::Args),
}

/// What is published, and where, by `publish` and `watch`.
#[derive(Debug, Args)]
pub(crate) struct Source {
    /// The channel's folder
    pub(crate) folder: PathBuf,
    #[command(flatten)]
    pub(crate) broker: BrokerArgs,
    /// The channel's name [default: `name` in channel.toml, or the folder's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) channel: Option<ChannelName>,
    /// Publish even what would leave devices that run Mpy-BLOX waiting or starting again for ever
    #[arg(long)]
    force: bool,
}

impl Source {
    pub(crate) fn harm(&self) -> Harm {
        if self.force { Harm::Forced } else { Harm::Refused }
    }
}

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    /// What failed, for people; see [`hint`](crate::report::hint).
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Publish(args) => publish::run(args).await,
            Command::Watch(args) => watch::run(args).await,
            Command::Status(args) => status::run(args).await,
            Command::Rehearse(args) => rehearse::run(args).await,
            Command::Push(args) => push::run(args).await,
            Command::Rollout(args) => rollout::run(args).await,
            Command::Install(args) => install::run(args).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
