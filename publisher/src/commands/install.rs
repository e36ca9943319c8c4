//! `mpypi install`

use std::{path::PathBuf, time::Duration};

use mpypi_client::{BrokerArgs, args::parse_time};
use mpypi_protocol::{NodeId, Tag};

use super::{Stopped, brokers, interrupted, print};
use crate::{
    install::{Options, install},
    progress::{Lines, Progress},
    report,
};

const EXAMPLES: &str = "\
A device that runs Mpy-BLOX takes no list with a wheel that it does not have. This publishes the wheel, orders it \
from this one device under the name of a package that the device has, and waits until it says that the wheel is \
there. From then on its channel may carry the wheel. Brokers of ours do this by themselves.

A project below the `wheels/` of a channel is packed, or compiled, as that channel carries it.

Examples:
  mpypi install --node esp32-a1b2c3 channels/dev/wheels/blink
  mpypi install --node esp32-a1b2c3 blink-1.0-py3-none-any.whl --timeout 5m
  mpypi install --node esp32-a1b2c3 blink --broker mqtt://hub.local --carrier mpy-blox
                            a broker that kept nothing of what the device said of itself

Exit codes: 0 installed, 1 failed, 2 wrong usage, 3 ordered, and the device did not say in time that it is there.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The device's name: its MQTT client id
    #[arg(long)]
    node: NodeId,
    /// A `.whl`, or the folder of a project with a pyproject.toml
    #[arg(value_name = "WHEEL")]
    wheel: PathBuf,
    #[command(flatten)]
    broker: BrokerArgs,
    /// The tag to pack a project with, or to choose a wheel by, where a channel carries several
    #[arg(long, value_parser = |text: &str| Tag::new(text).map(|tag| tag.to_string()))]
    tag: Option<String>,
    /// Order it under the name of this package that the device has [default: one that the device names]
    #[arg(long, value_name = "NAME")]
    carrier: Option<String>,
    /// Wait so long until the device says that it is there, as 30s or 5m
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = parse_time)]
    timeout: Duration,
    /// Print the outcome as one JSON object; errors go to standard error as always
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let options = Options {
        brokers: brokers(args.broker)?,
        node: args.node,
        wheel: args.wheel,
        tag: args.tag,
        carrier: args.carrier,
        timeout: args.timeout,
    };
    let mut progress = Progress::new(if args.json { Lines::Hidden } else { Lines::Shown });
    let installed = tokio::select! {
        installed = install(&options, &mut progress) => Some(installed),
        stop = interrupted() => stop.map(|()| None)?,
    };
    progress.clear();
    let Some(installed) = installed else { return Err(Stopped::Waiting.into()) };
    let installed = installed?;
    match args.json {
        true => print(&format!("{}\n", report::installed_json(&installed))),
        false => print(&format!("{}\n", report::installed_sentence(&installed))),
    }
}
