//! `mpypi rehearse`

use std::{path::PathBuf, time::Duration};

use mpypi_client::args::parse_time;
use mpypi_protocol::ChannelName;

use super::{Stopped, interrupted};
use crate::{
    progress::{Lines, Progress},
    rehearse::{Rehearsal, rehearse},
};

const EXAMPLES: &str = "\
Starts a throw-away broker and simulated devices, publishes what the devices have now, then the release, while faults \
strike, and says whether every device came to what was expected. Nothing outside this machine is touched. For a \
pipeline: one step, before `mpypi publish`.

Examples:
  mpypi rehearse channels/dev
  mpypi rehearse channels/dev --against channels/stable --nodes 500 --profile cellular --for 5m
  mpypi rehearse channels/dev --expect 'applied>=99%' --expect bricked=0 --report fleet.json --junit fleet.xml

Exit codes: 0 as expected, 1 failed to run, 2 wrong usage, 3 not as expected.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The channel's folder
    folder: PathBuf,
    /// The channel's name [default: `name` in channel.toml, or the folder's name]
    #[arg(long, value_name = "NAME")]
    channel: Option<ChannelName>,
    /// The folder of what devices have installed, or its name beside the channel's [default: nothing]
    #[arg(long, value_name = "FOLDER")]
    against: Option<PathBuf>,
    /// How many devices
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    nodes: u32,
    /// What befalls them: lab, home-wifi, cellular, hostile, or a TOML file; see `mpypi-agent fleet`
    #[arg(long, value_name = "NAME|FILE", default_value = "home-wifi")]
    profile: String,
    /// Decides everything random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Take so long at most, as 90s or 5m; faults end after half of it
    #[arg(long = "for", value_name = "TIME", default_value = "2m", value_parser = parse_time)]
    time: Duration,
    /// What to expect, as applied=100% or failed<=1% [default: applied=100% and bricked=0]
    #[arg(long, value_name = "WHAT")]
    expect: Vec<String>,
    /// Write a report as JSON to this file
    #[arg(long, value_name = "FILE")]
    report: Option<String>,
    /// Write a report as JUnit XML to this file
    #[arg(long, value_name = "FILE")]
    junit: Option<String>,
    /// Write a report for people to this file: one page of HTML with plots
    #[arg(long, value_name = "FILE")]
    html: Option<String>,
    /// Tell GitHub: annotations beside the pull request, and a summary of the step
    #[arg(long)]
    github: bool,
    /// Print the report as JSON on standard output
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let beside = |name: PathBuf| match args.folder.parent().map(|parent| parent.join(&name)) {
        Some(path) if !name.is_dir() && path.is_dir() => path,
        _ => name,
    };
    let mut more = Vec::new();
    for (flag, file) in [("--report", args.report), ("--junit", args.junit), ("--html", args.html)] {
        more.extend(file.into_iter().flat_map(|file| [flag.to_owned(), file]));
    }
    more.extend(args.github.then(|| "--github".to_owned()));
    more.extend(args.json.then(|| "--json".to_owned()));
    let rehearsal = Rehearsal {
        against: args.against.map(beside),
        folder: args.folder,
        channel: args.channel,
        nodes: args.nodes,
        profile: args.profile,
        seed: args.seed,
        time: args.time,
        expect: match args.expect.is_empty() {
            true => vec!["applied=100%".to_owned(), "bricked=0".to_owned()],
            false => args.expect,
        },
        more,
    };
    let mut progress = Progress::new(if args.json { Lines::Hidden } else { Lines::Shown });
    let ended = tokio::select! {
        ended = rehearse(&rehearsal, &mut progress) => Some(ended),
        stop = interrupted() => stop.map(|()| None)?,
    };
    progress.clear();
    match ended {
        Some(ended) => Ok(ended?),
        None => Err(Stopped::Reading.into()),
    }
}
