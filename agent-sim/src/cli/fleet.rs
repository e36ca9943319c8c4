//! `mpypi-agent fleet`

use std::{
    env, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use mpypi_agent_sim::{
    device::{Hardware, Traits},
    fleet::{
        FleetOptions, Home, Member,
        expect::Expectation,
        github, html,
        profile::{Abi, Profile},
        report::Report,
    },
    limits,
    update::Timing,
};
use mpypi_client::args::parse_time;
use mpypi_protocol::NodeId;

use super::{Common, Failure, brokers, print, run_fleet};

const EXAMPLES: &str = "\
Examples:
  mpypi-agent fleet --nodes 50 --releases 1 --for 60s
      ends when each has applied or refused one release, with exit code 3 if any refused it
  mpypi-agent fleet --nodes 2000 --profile cellular --for 3m --expect applied=100% --expect bricked=0
      slow, lossy, sleeping devices for a minute and a half, then time to converge
  mpypi-agent fleet --nodes 500 --profile bad-day.toml --seed 7 --for 2m --report fleet.json --junit fleet.xml
      faults of your own, the same for each run of one seed, with reports for programs
  mpypi-agent fleet --profile hostile --seed 7 --node 83 --for 2m
      what befell the 83rd of them, alone and step by step

A profile is one of lab, home-wifi, cellular and hostile, or a TOML file: `--show-profile NAME` prints one to start with.
A file may have these besides:
  [agents]
  old = \"10%\"                # know nothing of rollouts, optional packages, revoked releases and roots
  mpy-blox = \"5%\"            # have Mpy-BLOX 0.6; other brokers than mpypi's do not serve it
  [intruder]                  # sits between broker and devices, strikes so many messages, and goes when faults end
  swapped-packages = \"2%\"
  endless-data = \"1%\"        # packages longer than announced, messages that never end
  old-lists = \"3%\"           # a list that a newer one had replaced
  corrupted-lists = \"3%\"     # any bit of a signed one; unsigned ones come in part
  forged-lists = \"3%\"        # with --pin or --keys only: devices without believe anyone";

/// Run many devices in one process.
///
/// Each runs the same agent as `run`, with its own connection, its own name (`device-1`, `device-2`, …) and its own flash,
/// in memory unless `--disk` is given. Runs until Ctrl-C or SIGTERM, or as long as `--releases` and `--for` say; then starts
/// every device once more and compares each of its files with the release, and prints what became of them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// How many devices.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::NODES)))]
    nodes: u32,
    /// Only the device of this number, with every step it takes.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::NODES)))]
    node: Option<u32>,
    /// What befalls them: lab, home-wifi, cellular, hostile, or a TOML file.
    #[arg(long, value_name = "NAME|FILE")]
    profile: Option<String>,
    /// Print a profile that comes with the program, and exit.
    #[arg(long, value_name = "NAME")]
    show_profile: Option<String>,
    /// When faults end, after the start; half of `--for` unless given.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    faults_for: Option<Duration>,
    /// What to expect, as applied=100%, bricked=0, failed<=1% or bytes<=10%; exit code 3 if it is not so.
    #[arg(long, value_name = "WHAT")]
    expect: Vec<Expectation>,
    /// Write a report as JSON to this file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write a report as JUnit XML to this file.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write a report for people to this file: one page of HTML with plots, which needs nothing else.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Tell GitHub: annotations beside the pull request, and a summary of the step.
    #[arg(long)]
    github: bool,
    /// Print the JSON Schema of the report, and exit.
    #[arg(long)]
    show_schema: bool,
    /// What their names start with.
    #[arg(long, default_value = "device-")]
    prefix: String,
    /// Keep their files below this directory; unless given, they are in memory.
    #[arg(long, value_name = "DIR", visible_alias = "dir")]
    disk: Option<PathBuf>,
    /// End when every device has applied or refused this many different releases; with a profile, when its faults are over,
    /// so many were seen, and every device has applied the newest.
    #[arg(long, value_name = "K")]
    releases: Option<usize>,
    /// End after this time, as 500ms, 60s, 5m or 1h.
    #[arg(long = "for", value_name = "TIME", value_parser = parse_time)]
    time: Option<Duration>,
    /// What `.mpy` files they load: `sys.implementation._mpy` of the MicroPython they stand for, or `none`. Of
    /// several, separated by commas, the devices take one each, in turn.
    #[arg(long, value_name = "NUMBER,…", default_value = "6", value_delimiter = ',')]
    mpy: Vec<Abi>,
    /// The platforms they stand for, as `esp32`; several likewise.
    #[arg(long, value_name = "NAME,…", default_value = "mpypi-sim", value_delimiter = ',')]
    platform: Vec<String>,
    /// Decides everything random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Whether everything was as expected.
pub(crate) fn run(args: Args) -> Result<bool, Failure> {
    if let Some(name) = &args.show_profile {
        let text = Profile::ready(name).ok_or_else(|| no_profile(name))?;
        print(text.trim_end())?;
        return Ok(true);
    }
    if args.show_schema {
        print(&Report::schema())?;
        return Ok(true);
    }
    // Where it may not be raised, connections beyond it fail and say so.
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let profile = args.profile.as_deref().map(read_profile).transpose()?;
    let mut members = Vec::new();
    let (mut mpys, mut platforms) = (args.mpy.iter().cycle(), args.platform.iter().cycle());
    for number in 1..=args.nodes.max(args.node.unwrap_or_default()) {
        let node = NodeId::new(format!("{}{number}", args.prefix))?;
        let home = match &args.disk {
            Some(dir) => Home::Disk(dir.join(node.as_str())),
            None => Home::Memory,
        };
        let usual = Hardware::default();
        let hardware = Hardware {
            sysname: platforms.next().cloned().unwrap_or(usual.sysname),
            mpy: mpys.next().map_or(usual.mpy, |mpy| mpy.0),
            agent: usual.agent,
        };
        members.push(Member {
            node,
            home,
            hardware,
            traits: Traits::default(),
            number: number.into(),
            desk: None,
        });
    }
    members.retain(|member| args.node.is_none_or(|only| member.number == u64::from(only)));
    let options = FleetOptions {
        trust: args.common.trust()?,
        brokers: brokers(args.common.broker)?,
        channel: args.common.channel,
        members,
        timing: Timing { confirm_after: Some(args.common.confirm_after), ..Timing::default() },
        calm_at: args.faults_for.or(args.time.map(|time| time / 2)),
        profile,
        seed: args.seed,
        releases: args.releases,
        time: args.time,
        trace: args.node.is_some(),
    };
    let summary = run_fleet(options, None)?;
    let report = Report::of(&summary, &args.expect, args.seed, args.profile.as_deref());
    if let Some(path) = &args.report {
        write(path, &report.json())?;
    }
    if let Some(path) = &args.junit {
        write(path, &report.junit()?)?;
    }
    if let Some(path) = &args.html {
        write(path, &html::page(&report))?;
    }
    if args.github {
        tell_github(&report)?;
    }
    if args.common.json {
        print(&report.json())?;
    } else {
        if summary.nodes.len() <= limits::TOLD_ONE_BY_ONE {
            print(&summary.table())?;
        } else {
            print(report.overview().trim_end())?;
        }
        if !args.expect.is_empty() {
            print(report.verdicts().trim_end())?;
        }
    }
    if !report.good {
        // Nobody is left to tell if this fails.
        let _ = write!(io::stderr(), "{}", report.troubles(limits::TOLD_ONE_BY_ONE));
    }
    Ok(report.good)
}

/// Annotations go to standard error, where GitHub reads them too and scripts do not; the summary goes to the file that
/// GitHub names.
fn tell_github(report: &Report<'_>) -> anyhow::Result<()> {
    // Nobody is left to tell if this fails.
    let _ = write!(io::stderr(), "{}", github::annotations(report));
    let Some(path) = env::var_os("GITHUB_STEP_SUMMARY").map(PathBuf::from) else { return Ok(()) };
    let file = fs::OpenOptions::new().create(true).append(true).open(&path);
    file.and_then(|mut file| file.write_all(github::summary(report).as_bytes()))
        .with_context(|| format!("cannot write the summary `{}`", path.display()))
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write the report `{}`", path.display()))
}

fn read_profile(name: &str) -> Result<Profile, Failure> {
    let text = match Profile::ready(name) {
        Some(text) => text.to_owned(),
        None => match fs::read_to_string(name) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(no_profile(name)),
            Err(error) => {
                return Err(anyhow::Error::from(error)
                    .context(format!("cannot read profile `{name}`"))
                    .into());
            }
        },
    };
    Ok(Profile::parse(&text).with_context(|| format!("profile `{name}`"))?)
}

fn no_profile(name: &str) -> Failure {
    let ready: Vec<_> = Profile::READY.iter().map(|(name, _)| format!("`{name}`")).collect();
    Failure {
        error: anyhow::anyhow!("there is no profile `{name}`"),
        hint: Some(format!("use one of {}, or the path of a TOML file", ready.join(", "))),
    }
}
