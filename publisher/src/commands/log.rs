//! `mpypi log`

use std::io::stdout;

use mpypi_client::Brokers;
use serde_json::{Value, json};

use super::{brokers, print, reading, verify::line};
use crate::{
    cli::Subject,
    compare::compare,
    publish::PublishError,
    reissue::{Page, log},
    report::{count, painted, short, wants_color},
    retained::AskError,
    settle::newest,
};

const EXAMPLES: &str = "\
The newest list comes first. Each says which list it replaced; the one before it must be that list, to the byte. Where \
the channel has keys, each must be signed by one that some root let sign. Of several brokers, that with the newest list is \
shown, and one that retains something else is named. Exit code 1 if anything is not so.

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
    let read = async {
        let (at, link) = newest(&brokers, &channel).await.map_err(AskError::from)?;
        link.close().await;
        let pages = log(&Brokers::from(at), &channel, &keys).await?;
        Ok::<_, PublishError>((pages, compare(&brokers, &channel).await?))
    };
    let (pages, mut odd) = reading(read).await?;
    odd.retain(|finding| finding.trouble.is_some());
    let faults = pages.iter().map(|page| page.trouble.len()).sum::<usize>();
    let troubles = faults + odd.len();
    if as_json {
        let lists: Vec<Value> = pages.iter().map(page_json).collect();
        let mut value = json!({ "channel": channel, "good": troubles == 0, "lists": lists });
        if brokers.are_several() {
            let odd =
                odd.iter().map(|finding| json!({ "broker": finding.broker, "trouble": finding.trouble }));
            value["differ"] = odd.collect();
        }
        print(&format!("{value}\n"))?;
    } else {
        let color = wants_color(&stdout());
        print(&pages.iter().map(|page| text(page, color)).collect::<String>())?;
        print(&odd.iter().map(|finding| line(finding, color)).collect::<String>())?;
    }
    match (faults, odd.len()) {
        (0, 0) => Ok(()),
        (0, odd) => anyhow::bail!(
            "of {} addresses, {odd} cannot be read or have something else",
            brokers.iter().count()
        ),
        (faults, _) => anyhow::bail!("the history of channel `{}` has {}", channel, count(faults, "fault")),
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
