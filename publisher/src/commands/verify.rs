//! `mpypi verify`

use std::io::stdout;

use serde_json::json;

use super::{brokers, print, reading};
use crate::{
    cli::Subject,
    compare::{Finding, verify_each},
    report::{count, painted, wants_color},
};

const EXAMPLES: &str = "\
Asks any broker for everything about a channel and checks it as a device would, and more: the chain of roots from the \
one in the key folder on (or from the first one retained), their expiry, the list's signature, epoch and expiry, the \
history, and the bytes of every package. Of several brokers each is asked, and one that retains something else is named. \
Exit code 1 if anything is not as it should be.

Examples:
  mpypi verify dev
  mpypi verify stable --broker mqtts://hub.local --json
  mpypi verify dev --broker mqtt://a.local,mqtt://b.local,mqtt://c.local";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    subject: Subject,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Subject { channel, broker, keys, json: as_json } = args.subject;
    let (brokers, keys) = (brokers(broker)?, keys.folder());
    let findings = reading(verify_each(&brokers, &channel, &keys)).await?;
    let bad = findings.iter().filter(|finding| finding.trouble.is_some()).count();
    if as_json {
        let all: Vec<_> = findings
            .iter()
            .map(|Finding { broker, what, trouble }| {
                json!({ "check": what, "broker": broker, "good": trouble.is_none(), "trouble": trouble })
            })
            .collect();
        print(&format!("{}\n", json!({ "channel": channel, "good": bad == 0, "checks": all })))?;
    } else {
        let color = wants_color(&stdout());
        print(&findings.iter().map(|finding| line(finding, color)).collect::<String>())?;
    }
    match bad {
        0 => Ok(()),
        _ => anyhow::bail!("channel `{}` fails {}", channel, count(bad, "check")),
    }
}

/// A finding for people.
pub(crate) fn line(Finding { broker, what, trouble }: &Finding, color: bool) -> String {
    let at = broker.as_ref().map(|broker| format!("{broker}: ")).unwrap_or_default();
    match trouble {
        None => format!("{} {at}{what}\n", painted("ok ", "32", color)),
        Some(trouble) => {
            format!("{} {at}{what}: {}\n", painted("BAD", "31;1", color), trouble.escape_debug())
        }
    }
}
