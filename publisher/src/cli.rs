//! The whole command line.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use mpypi_client::{
    BrokerArgs, Brokers,
    args::{parse_chunk, parse_packet, parse_time},
};
use mpypi_protocol::{ChannelName, KeyId};

use crate::{
    commands::{
        clock, doctor, install, keys, log, publish, push, rehearse, reissue, rollout, status, verify, watch,
    },
    keys::Keys,
    publish::Harm,
    signing::Signing,
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
  mpypi rollback dev --to 41              go back, deliberately, to what release 41 was
  mpypi keys new dev-2026                 make a key that signs a channel's releases
  mpypi rollout channels/dev --steps 1%,10%,100%
                                          publish to few devices first, and go on while all is well
  mpypi status dev                        show the release of a channel and its devices
  mpypi doctor --broker mqtt://a.local,mqtt://b.local
                                          try whether these brokers can be the index, and agree
  mpypi status --broker mqtts://hub.local --ca ca.pem
                                          ask a broker over TLS, whose certificate a private CA made

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done, but without the effect that was waited for.";

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one, for as long as the program runs")]
enum Command {
    /// Publish a folder as a channel's new release
    Publish(Box<publish::Args>),
    /// Publish a folder now and whenever something in it changes
    Watch(Box<watch::Args>),
    /// Show channels, their releases and their devices
    Status(status::Args),
    /// Publish a release to simulated devices on a bad day, and say whether it harms any
    Rehearse(rehearse::Args),
    /// Update devices with projectMM to a channel's firmware
    Push(push::Args),
    /// Publish an earlier release of a channel again, under a new number
    Rollback(reissue::RollbackArgs),
    /// Publish what one channel has on another: the very same bytes
    Promote(reissue::PromoteArgs),
    /// Show the lists that a channel had, who signed them, and whether their chain is whole
    Log(log::Args),
    /// Check everything about a channel: roots, signature, history, every package
    Verify(verify::Args),
    /// Try whether brokers are fit for mpypi, and say what is wrong with them
    Doctor(doctor::Args),
    /// Make, list, rotate, revoke and export keys, and the roots that say who may sign
    Keys(keys::Args),
    /// Tell devices without a clock what time it is, signed
    Clock(clock::Args),
    /// Publish a release to few devices first, and stop by itself when it goes wrong
    Rollout(Box<rollout::Args>),
    /// Put a first wheel on a device that runs Mpy-BLOX
    Install(install::Args),
}

/// What is published, and where, by `publish` and `watch`.
#[derive(Debug, Args)]
pub(crate) struct Source {
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
    #[command(flatten)]
    pub(crate) cut: CutArgs,
    /// The channel's name [default: `name` in channel.toml, or the folder's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) channel: Option<ChannelName>,
    /// The key that signs the list [default: `key` in channel.toml]
    #[arg(long = "sign-with", value_name = "KEY")]
    pub(crate) signer: Option<KeyId>,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
    /// Publish even what would leave devices that run Mpy-BLOX waiting or starting again for ever
    #[arg(long)]
    force: bool,
}

/// Where something is published.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlaceArgs {
    #[command(flatten)]
    pub(crate) broker: BrokerArgs,
    /// With several brokers, how many of them may be unreachable while the others have all of it
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub(crate) may_be_down: usize,
    /// With several brokers, how long they may take until each has all of it, as 500ms or 2m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    pub(crate) agree_within: Duration,
    /// The largest packet that the broker takes, as 131072, 128K or 1M: a package that does not fit in goes in chunks
    /// [default: what the broker says, which only MQTT 5 lets it; at most 16M]
    #[arg(long, value_name = "SIZE", value_parser = parse_packet)]
    pub(crate) max_packet: Option<usize>,
}

/// How what does not fit into a packet is cut.
#[derive(Debug, Clone, Args)]
pub(crate) struct CutArgs {
    /// How large chunks of packages are that do not fit into a packet; packages that lie there in chunks keep them
    /// [default: 64K, less where the broker takes less]
    #[arg(long, value_name = "SIZE", value_parser = parse_chunk)]
    chunk: Option<u64>,
}

impl CutArgs {
    /// The same brokers, for which packages are cut so.
    pub(crate) fn applied(&self, brokers: Brokers) -> Brokers {
        match self.chunk {
            Some(chunk) => brokers.in_chunks_of(chunk),
            None => brokers,
        }
    }
}

/// Which channel of which broker is looked at, by `log` and `verify`.
#[derive(Debug, Args)]
pub(crate) struct Subject {
    /// The channel
    pub(crate) channel: ChannelName,
    #[command(flatten)]
    pub(crate) broker: BrokerArgs,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Who signs, where no folder says it.
#[derive(Debug, Args)]
pub(crate) struct SignArgs {
    /// The key that signs [default: one of the folder that may]
    #[arg(long = "sign-with", value_name = "KEY")]
    pub(crate) signer: Option<KeyId>,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
}

impl SignArgs {
    /// Signing with that key.
    pub(crate) fn signing(self) -> Signing {
        self.keys.signing(self.signer)
    }
}

/// Where keys are.
#[derive(Debug, Clone, Args)]
pub(crate) struct KeyArgs {
    /// The key folder
    #[arg(long, value_name = "DIR", default_value = "keys", env = "MPYPI_KEYS", global = true)]
    keys: PathBuf,
    /// A file whose first line is the passphrase of private keys [default: MPYPI_KEY_PASSPHRASE, or asked for]
    #[arg(long, value_name = "FILE", global = true)]
    passphrase_file: Option<PathBuf>,
}

impl KeyArgs {
    /// The key folder.
    pub(crate) fn folder(&self) -> Keys {
        Keys::new(&self.keys, self.passphrase_file.clone())
    }

    /// Signing with a key of it.
    pub(crate) fn signing(&self, key: Option<KeyId>) -> Signing {
        Signing::With(self.folder(), key)
    }
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
            Command::Publish(args) => publish::run(*args).await,
            Command::Watch(args) => watch::run(*args).await,
            Command::Status(args) => status::run(args).await,
            Command::Rehearse(args) => rehearse::run(args).await,
            Command::Push(args) => push::run(args).await,
            Command::Rollback(args) => reissue::rollback(args).await,
            Command::Promote(args) => reissue::promote(args).await,
            Command::Log(args) => log::run(args).await,
            Command::Verify(args) => verify::run(args).await,
            Command::Doctor(args) => doctor::run(args).await,
            Command::Keys(args) => keys::run(args).await,
            Command::Clock(args) => clock::run(args).await,
            Command::Rollout(args) => rollout::run(*args).await,
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
