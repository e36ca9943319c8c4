//! `mpypi push`

use std::time::Duration;

use mpypi_client::{BrokerArgs, args::parse_time};
use mpypi_protocol::{ChannelName, NodeId};
use serde_json::json;

use super::{brokers, print, reading};
use crate::{
    push::{Became, Options, Target, push},
    report::say,
};

const EXAMPLES: &str = "\
Devices with projectMM know no lists. This tells each of them, over HTTP, where the newest image of the channel for its \
hardware is, waits until it runs it, and goes on with the next. What they say is published as nodes say it: `mpypi \
status` shows them like all others. The broker must let this user write that.

Examples:
  mpypi push dev --gateway http://hub.local:8080 --device lamp=http://10.0.0.7 --device sign=http://10.0.0.8

Exit codes: 0 all run what the channel has, 1 failed, 2 wrong usage, 3 some device does not.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The channel whose firmware is pushed
    channel: ChannelName,
    #[command(flatten)]
    broker: BrokerArgs,
    /// Where devices fetch packages from: the broker's HTTP gateway, as they reach it
    #[arg(long, value_name = "URL", value_parser = parse_url)]
    gateway: String,
    /// A device: what it is called, and where it speaks HTTP; may be given more than once
    #[arg(long = "device", value_name = "NAME=URL", required = true, value_parser = parse_target)]
    devices: Vec<Target>,
    /// How long a device may take, as 90s or 5m
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_time)]
    timeout: Duration,
    /// Print the outcome as one JSON object; errors go to standard error as always
    #[arg(long)]
    json: bool,
}

/// Some device does not run what it should.
#[derive(Debug, thiserror::Error)]
#[error("{0} of the devices do not run what channel `{1}` has")]
pub(crate) struct NotAll(usize, ChannelName);

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let trust = args.broker.trust.clone();
    let options = Options {
        brokers: brokers(args.broker)?,
        channel: args.channel,
        gateway: args.gateway,
        devices: args.devices,
        trust,
        timeout: args.timeout,
    };
    let mut told = |node: &NodeId, text: &str| say(&format!("{node}  {text}"));
    let results = reading(push(&options, &mut told)).await?;
    let rows = results.iter().map(|(node, became)| match args.json {
        true => json!({ "node": node, "good": became.is_good(), "result": became.to_string() }).to_string(),
        false => format!("{node}  {became}"),
    });
    let rows: Vec<_> = rows.collect();
    match args.json {
        true => print(&format!("{{\"devices\":[{}]}}\n", rows.join(",")))?,
        false => print(&format!("{}\n", rows.join("\n")))?,
    }
    match results.iter().filter(|(_, became): &&(NodeId, Became)| !became.is_good()).count() {
        0 => Ok(()),
        count => Err(NotAll(count, options.channel).into()),
    }
}

fn parse_target(text: &str) -> Result<Target, String> {
    let (node, url) = text.split_once('=').ok_or("use a name and a URL, as lamp=http://10.0.0.7")?;
    let node = NodeId::new(node).map_err(|error| error.to_string())?;
    Ok(Target { node, url: parse_url(url)? })
}

fn parse_url(text: &str) -> Result<String, String> {
    let good = ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme));
    good.then(|| text.trim_end_matches('/').to_owned())
        .ok_or_else(|| "use a URL, as http://10.0.0.7".to_owned())
}
