//! `mpypi verify`

use std::io::stdout;

use serde_json::json;

use super::{brokers, print, reading};
use crate::{
    cli::Subject,
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
    #[command(flatten)]
    subject: Subject,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Subject { channel, broker, keys, json: as_json } = args.subject;
    let (brokers, keys) = (brokers(broker)?, keys.folder());
    let checks = reading(verify(&brokers, &channel, &keys)).await?;
    let bad = checks.iter().filter(|check| check.trouble.is_some()).count();
    if as_json {
        let all: Vec<_> = checks
            .iter()
            .map(|Check { what, trouble }| json!({ "check": what, "good": trouble.is_none(), "trouble": trouble }))
            .collect();
        print(&format!("{}\n", json!({ "channel": channel, "good": bad == 0, "checks": all })))?;
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
        _ => anyhow::bail!("channel `{}` fails {}", channel, count(bad, "check")),
    }
}
