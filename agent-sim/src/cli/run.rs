//! `mpypi-agent run`

use std::path::PathBuf;

use mpypi_agent_sim::{
    device::{Hardware, Traits},
    fleet::{FleetOptions, Home, Member, profile::Abi, report::Report},
};
use mpypi_protocol::{NodeId, limits};

use super::{Common, Failure, face, print, run_fleet};

const EXAMPLES: &str = "\
Examples:
  mpypi-agent run
      follow channel `dev` of the broker on this machine, files in node/, until Ctrl-C
  mpypi-agent run --broker mqtt://kitchen:secret@hub.local --node kitchen --root /tmp/kitchen
      log in as the node `kitchen`
  mpypi-agent run --channel stable --once --json
      apply one release, print the result, exit
  mpypi-agent run --label room=kitchen --utc-offset 60
      be in rollouts for kitchens, whose windows are in local time
  mpypi-agent run --mpy 11014 --platform esp32
      take the wheels that an ESP32 with MicroPython 1.23 or later takes
  mpypi-agent run --http 127.0.0.1:8090 --updates ask
      offer what the channel has to local screens and scripts, and install what they choose
  mpypi-agent run --http 127.0.0.1:8090 --firmware-key esp32 --firmware-version 3.0.0
      take firmware from projectMM's tools, and newer images from the channel";

/// Run one device in a directory.
///
/// The directory is the device's flash: the release's files are in it as on a device, and what the agent keeps
/// for itself is in `.mpypi/`. Runs until Ctrl-C or SIGTERM.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// The directory that is the device's flash.
    #[arg(long, value_name = "DIR", default_value = "node")]
    root: PathBuf,
    /// The device's name and MQTT client id; this machine's name unless given.
    #[arg(long)]
    node: Option<NodeId>,
    /// What `.mpy` files it loads: `sys.implementation._mpy` of the MicroPython it stands for, or `none`.
    #[arg(long, value_name = "NUMBER", default_value = "6")]
    mpy: Abi,
    /// The platform it stands for, as `esp32`: what wheels for one platform must name.
    #[arg(long, value_name = "NAME", default_value = "mpypi-sim")]
    platform: String,
    /// A label, for rollouts that ask for it: `--only 'label.room = kitchen'`. May be given more than once.
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// How far its local time is ahead of UTC, in minutes, for rollouts with a window.
    #[arg(long, value_name = "MINUTES", allow_hyphen_values = true,
        value_parser = clap::value_parser!(i32).range(-14 * 60..=14 * 60))]
    utc_offset: Option<i32>,
    /// Exit when one release is applied or has failed.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    face: face::Args,
}

/// Whether every release was applied.
pub(crate) fn run(args: Args) -> Result<bool, Failure> {
    let node = args.node.unwrap_or_else(this_machine);
    let (desk, faces) = args.face.open(args.common.broker.trust.clone())?;
    let (brokers, timing) = args.common.brokers()?;
    let options = FleetOptions {
        trust: args.common.trust()?,
        brokers,
        channel: args.common.channel,
        seed: node
            .as_str()
            .bytes()
            .fold(0, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(byte.into())),
        members: vec![Member {
            node,
            home: Home::Disk(args.root.clone()),
            number: 1,
            hardware: Hardware { sysname: args.platform, mpy: args.mpy.0, ..Hardware::default() },
            traits: Traits { labels: args.labels.into_iter().collect(), utc_offset: args.utc_offset },
            desk,
        }],
        timing,
        profile: None,
        calm_at: None,
        releases: args.once.then_some(1),
        trace: false,
        time: None,
    };
    let summary = run_fleet(options, faces)?;
    if let Some(Err(error)) = &summary.nodes[0].found {
        return Err(Failure {
            error: anyhow::anyhow!("node `{}` does not start: {error}", summary.nodes[0].node),
            hint: Some(format!(
                "remove `{}` to start this device from nothing",
                args.root.join(mpypi_agent_sim::journal::FOLDER).display()
            )),
        });
    }
    if args.common.json {
        print(&Report::of(&summary, &[], 0, None).json())?;
    }
    Ok(summary.all_applied())
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let good = |c: char| !c.is_whitespace() && !c.is_control() && !"'\"()=!<>~".contains(c);
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && name.chars().all(good) && text.len() <= limits::TEXT => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(format!("use `<name>=<value>`, as `room=kitchen`, of at most {} bytes", limits::TEXT)),
    }
}

/// The host's name, without what a node's name cannot have.
fn this_machine() -> NodeId {
    let uname = rustix::system::uname();
    let name: String = uname.nodename().to_string_lossy().replace(['/', '+', '#'], "-");
    NodeId::new(format!("sim-{name}")).unwrap_or_else(|_| NodeId::new("sim").expect("a plain word is a name"))
}
