//! `mpypi publish`

use std::{io::stdout, path::PathBuf};

use mpypi_protocol::ChannelName;

use super::{Stopped, interrupted, print};
use crate::{
    cli::Broker,
    progress::{Lines, Progress, Stage},
    publish::{Mode, Options, publish},
    report::{self, wants_color},
};

const EXAMPLES: &str = "\
A channel's folder holds `src/` (files sent as they are) and `wheels/` (projects with a pyproject.toml, or \
.whl files). A folder with neither is sent as it is. Files that .gitignore, .promoterignore or `ignore` in \
channel.toml name are left out. Only packages that the broker lacks are sent; the new release stands when all \
of them are there.

channel.toml is optional: name, version, tag, ignore = [\"*.md\"], expires (days).

Examples:
  mpypi publish channels/dev
  mpypi publish channels/dev --broker mqtt://ann:secret@hub.local:1883
  mpypi publish build/out --channel nightly --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The channel's folder
    folder: PathBuf,
    #[command(flatten)]
    broker: Broker,
    /// The channel's name [default: `name` in channel.toml, or the folder's name]
    #[arg(long, value_name = "NAME")]
    channel: Option<ChannelName>,
    /// Ask the broker what it has and show what would be sent, but send nothing
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let options = Options {
        broker: args.broker.broker,
        channel: args.channel,
        mode: if args.dry_run { Mode::DryRun } else { Mode::Publish },
    };
    let mut progress = Progress::new(if args.json { Lines::Hidden } else { Lines::Shown });
    let outcome = tokio::select! {
        outcome = publish(&args.folder, &options, &mut progress) => Some(outcome),
        stop = interrupted() => stop.map(|()| None)?,
    };
    let stage = progress.stage();
    progress.clear();
    let Some(outcome) = outcome else {
        let stopped = match stage {
            Stage::Before => Stopped::BeforeTheList,
            Stage::Committing => Stopped::DuringTheList,
        };
        return Err(stopped.into());
    };
    let outcome = outcome?;
    match args.json {
        true => print(&format!("{}\n", report::json(&outcome))),
        false => {
            let diff = report::diff(&outcome.diff, wants_color(&stdout()));
            print(&format!("{diff}{}\n", report::sentence(&outcome)))
        }
    }
}
