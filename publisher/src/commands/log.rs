//! `mpypi log`

use std::io::stdout;

use serde_json::{Value, json};

use super::{brokers, print, reading};
use crate::{
    cli::Subject,
    reissue::{Page, log},
    report::{count, painted, short, wants_color},
};

const EXAMPLES: &str = "\
The newest list comes first. Each says which list it replaced; the one before it must be that list, to the byte. Where \
the channel has keys, each must be signed by one that some root let sign. Exit code 1 if anything is not so.

Examples:
  mpypi log dev
  mpypi log dev --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    subject: Subject,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Subject { channel, broker, keys, json: as_json } = args.subject;
    let (brokers, keys) = (brokers(broker)?, keys.folder());
    let pages = reading(log(&brokers, &channel, &keys)).await?;
    let troubles = pages.iter().map(|page| page.trouble.len()).sum();
    if as_json {
        let lists: Vec<Value> = pages.iter().map(page_json).collect();
        print(&format!("{}\n", json!({ "channel": channel, "good": troubles == 0, "lists": lists })))?;
    } else {
        print(&pages.iter().map(|page| text(page, wants_color(&stdout()))).collect::<String>())?;
    }
    match troubles {
        0 => Ok(()),
        _ => anyhow::bail!("the history of channel `{}` has {}", channel, count(troubles, "fault")),
    }
}

pub(crate) fn page_json(page: &Page) -> Value {
    json!({
        "sequence": page.sequence,
        "epoch": page.epoch,
        "version": page.version,
        "created": page.created.map(|time| time.to_string()),
        "digest": page.digest,
        "packages": page.packages,
        "commit": page.commit,
        "signer": page.signer,
        "trouble": page.trouble,
    })
}

fn text(page: &Page, color: bool) -> String {
    let Page { sequence, epoch, version, created, digest, packages, commit, signer, trouble } = page;
    let epoch = if *epoch > 0 { format!(" of epoch {epoch}") } else { String::new() };
    let created = created.map(|time| time.to_string()).unwrap_or_else(|| "at no known time".to_owned());
    let commit = commit.as_deref().map(|commit| format!(", of commit {}", short(commit))).unwrap_or_default();
    let signer =
        signer.as_ref().map_or("not signed".to_owned(), |key| format!("signed by {}", key.escape_debug()));
    let mut text = format!(
        "release {sequence}{epoch} (version {}) {created} {}, {}{commit}, {signer}\n",
        version.escape_debug(),
        digest.short(),
        count(*packages, "package"),
    );
    for trouble in trouble {
        text += &format!("  {} {}\n", painted("!", "31;1", color), trouble.escape_debug());
    }
    text
}
