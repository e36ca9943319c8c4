//! `mpypi-agent fleet`

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use mpypi_agent_sim::{
    device::Hardware,
    fleet::{FleetOptions, Member},
    limits,
    update::Timing,
};
use mpypi_protocol::NodeId;

use super::{Common, Failure, Mpy, endpoint, parse_mpy, parse_time, print, run_fleet};

const EXAMPLES: &str = "\
Examples:
  mpypi-agent fleet --nodes 50 --releases 1 --for 60s
      ends when each has applied or refused one release, with exit code 3 if any refused it
  mpypi-agent fleet --nodes 5 --dir fleet --json
      keep the devices' files in fleet/, print a report for programs at the end
  mpypi-agent fleet --nodes 6 --mpy 11014,4870 --platform esp32,rp2
      by turns ESP32 and Pico W, which take different wheels of one channel";

/// Run many devices in one process.
///
/// Each has its own connection, its own name (`device-1`, `device-2`, …) and its own directory. Runs until Ctrl-C
/// or SIGTERM, or as long as `--releases` and `--for` say; then prints what each device did with each release.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// How many devices.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::NODES)))]
    nodes: u32,
    /// What their names start with.
    #[arg(long, default_value = "device-")]
    prefix: String,
    /// Keep their directories here; unless given, they are temporary.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// End when every device has applied or refused this many different releases.
    #[arg(long, value_name = "K")]
    releases: Option<usize>,
    /// End after this time, as 500ms, 60s, 5m or 1h.
    #[arg(long = "for", value_name = "TIME", value_parser = parse_time)]
    time: Option<Duration>,
    /// What `.mpy` files they load: `sys.implementation._mpy` of the MicroPython they stand for, or `none`. Of
    /// several, separated by commas, the devices take one each, in turn.
    #[arg(long, value_name = "NUMBER,…", default_value = "6", value_delimiter = ',', value_parser = parse_mpy)]
    mpy: Vec<Mpy>,
    /// The platforms they stand for, as `esp32`; several likewise.
    #[arg(long, value_name = "NAME,…", default_value = "mpypi-sim", value_delimiter = ',')]
    platform: Vec<String>,
    /// Decides everything random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Whether every device applied every release.
pub(crate) fn run(args: Args) -> Result<bool, Failure> {
    let mut temporary = None;
    let dir = match args.dir {
        Some(dir) => dir,
        None => {
            let dir = tempfile::Builder::new().prefix("mpypi-fleet-").tempdir();
            let dir = temporary.insert(dir.context("cannot make a temporary directory")?);
            dir.path().to_owned()
        }
    };
    let mut members = Vec::new();
    let (mut mpys, mut platforms) = (args.mpy.iter().cycle(), args.platform.iter().cycle());
    for number in 1..=args.nodes {
        let node = NodeId::new(format!("{}{number}", args.prefix))?;
        let root = dir.join(node.as_str());
        let usual = Hardware::default();
        let hardware = Hardware {
            sysname: platforms.next().cloned().unwrap_or(usual.sysname),
            mpy: mpys.next().map_or(usual.mpy, |mpy| mpy.0),
        };
        members.push(Member { node, root, hardware });
    }
    let summary = run_fleet(FleetOptions {
        broker: endpoint(args.common.broker)?,
        channel: args.common.channel,
        members,
        timing: Timing { confirm_after: Some(args.common.confirm_after), ..Timing::default() },
        seed: args.seed,
        releases: args.releases,
        time: args.time,
    })?;
    match args.common.json {
        true => print(&summary.json())?,
        false => print(&summary.table())?,
    }
    Ok(summary.all_applied())
}
