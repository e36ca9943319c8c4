//! `mpypi verify`

use std::io::stdout;

use mpypi_client::BrokerArgs;
use mpypi_protocol::ChannelName;
use serde_json::json;

use super::{Stopped, endpoint, interrupted, print};
use crate::{
    cli::KeyArgs,
    report::{count, painted, wants_color},
    verify::{Check, verify},
};

const EXAMPLES: &str = "\
Asks any broker for everything about a channel and checks it as a device would, and more: the chain of roots from the \
one in the key folder on (or from the first one retained), their expiry, the list's signature, epoch and expiry, the \
history, and the bytes of every package. Exit code 1 if anything is not as it should be.

Examples:
  mpypi verify dev
  mpypi verify stable --broker mqtts://hub.local --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The channel
    channel: ChannelName,
    #[command(flatten)]
    broker: BrokerArgs,
    #[command(flatten)]
    keys: KeyArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let broker = endpoint(args.broker)?;
    let keys = args.keys.folder();
    let checks = tokio::select! {
        checks = verify(&broker, &args.channel, &keys) => checks?,
        stop = interrupted() => {
            stop?;
            return Err(Stopped::Reading.into());
        }
    };
    let bad = checks.iter().filter(|check| check.trouble.is_some()).count();
    if args.json {
        let all: Vec<_> = checks
            .iter()
            .map(|Check { what, trouble }| json!({ "check": what, "good": trouble.is_none(), "trouble": trouble }))
            .collect();
        print(&format!("{}\n", json!({ "channel": args.channel, "good": bad == 0, "checks": all })))?;
    } else {
        let color = wants_color(&stdout());
        let line = |Check { what, trouble }: &Check| match trouble {
            None => format!("{} {what}\n", painted("ok ", "32", color)),
            Some(trouble) => {
                format!("{} {what}: {}\n", painted("BAD", "31;1", color), trouble.escape_debug())
            }
        };
        print(&checks.iter().map(line).collect::<String>())?;
    }
    match bad {
        0 => Ok(()),
        _ => anyhow::bail!("channel `{}` fails {}", args.channel, count(bad, "check")),
    }
}
