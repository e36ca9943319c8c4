//! Everything about a channel, checked on any broker.

use jiff::Timestamp;
use mpypi_client::Brokers;
use mpypi_protocol::{ChannelName, Chunks, Digest, Entry, PackageId, Trust, UpdateList, list::Piece};

use crate::{
    keys::Keys,
    link::Link,
    publish::PublishError,
    reissue::log,
    report::count,
    retained,
    signing::{SigningError, walk},
};

/// One thing that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What.
    pub what: String,
    /// What is wrong, if anything is.
    pub trouble: Option<String>,
}

/// Checks a channel.
///
/// # Errors
/// It cannot be read. What is wrong with it is no error, but a [`Check`].
pub async fn verify(
    brokers: &Brokers,
    channel: &ChannelName,
    keys: &Keys,
) -> Result<Vec<Check>, PublishError> {
    #[expect(clippy::disallowed_methods, reason = "this is the driver that gives the checks their time")]
    let now = Timestamp::now();
    let chain = keys.roots().map_err(SigningError::from)?.0;
    let mut link = Link::connect_any(brokers).await?;
    let (present, roots) = retained::channel(&mut link, channel).await?;
    let mut checks = Vec::new();
    let mut check = |what: String, trouble: Option<String>| checks.push(Check { what, trouble });
    let root = walk(chain.clone(), &roots).last().cloned();
    let last = roots.keys().next_back().copied();
    match (&root, last) {
        (None, None) => check("no roots: lists need no signature".into(), None),
        (None, Some(last)) => {
            check(
                "the chain of roots".into(),
                Some(format!("root {last} is retained, and root 1 is not, or is none")),
            );
        }
        (Some(root), last) => {
            let version = root.version();
            let behind = last.unwrap_or(0).max(chain.len() as u64);
            let trouble = (behind > version).then(|| format!("root {} does not follow from it", version + 1));
            let trouble = trouble.or_else(|| {
                (!roots.contains_key(&version)).then(|| "the broker does not retain it".to_owned())
            });
            check(format!("the chain of roots up to root {version}"), trouble);
            let expires = root.expires();
            check(
                format!("root {version} is believed until {expires}"),
                (expires <= now).then(|| "that is over".to_owned()),
            );
        }
    }
    let trust = match &root {
        Some(root) if root.delegation(channel).is_some() => Trust::Root(root.clone().into()),
        _ => Trust::Anyone,
    };
    let list = match &present {
        None => {
            check("the channel's list".into(), Some("there is none".into()));
            None
        }
        Some(payload) => {
            let what = match &trust {
                Trust::Anyone => "the channel's list".to_owned(),
                _ => "the channel's list and its signature".to_owned(),
            };
            check(what, trust.verify(channel, payload, Some(now)).err().map(|error| error.to_string()));
            UpdateList::parse(payload).ok()
        }
    };
    if let Some(release) = list.as_ref().and_then(UpdateList::release)
        && let Some(expires) = release.expires
    {
        let what = format!("release {} is believed until {expires}", release.sequence);
        check(what, (expires <= now).then(|| "that is over".to_owned()));
    }
    if let Some(release) = list.as_ref().and_then(UpdateList::release)
        && let Some(commit) = release.commit()
    {
        check(format!("release {} says that it was made of commit {commit}", release.sequence), None);
    }
    if let Some(list) = &list {
        let all: Vec<Piece> = list.pieces().collect();
        // Each is fetched, and its bytes are hashed.
        let found = retained::pieces(&mut link, channel, true, &all).await?;
        let mut lost = Vec::new();
        for entry in list.entries() {
            let pieces = entry.pieces();
            let missing = pieces.iter().position(|piece| !found.contains(&piece.topic));
            match (missing, entry.package(), entry.chunks()) {
                (Some(_), Some((id, _)), None) => lost.push(format!("`{id}`")),
                (Some(number), Some((id, _)), Some(_)) => {
                    lost.push(format!("chunk {number} of the {} of `{id}`", pieces.len()));
                }
                _ => {}
            }
        }
        let trouble =
            |first: &String| format!("{} missing, {first} among them", count(lost.len(), "package"));
        let packages = list.packages().filter(|(id, _)| *id.digest() != Digest::EMPTY).count();
        check(format!("the bytes of {}", count(packages, "package")), lost.first().map(trouble));
        let cut: Vec<(PackageId, &Chunks)> = list
            .entries()
            .iter()
            .filter(|entry| entry.pieces().iter().all(|piece| found.contains(&piece.topic)))
            .filter_map(Entry::cut)
            .collect();
        if !cut.is_empty() {
            let mut wrong = None;
            for (id, chunks) in &cut {
                if retained::joined(&mut link, id.digest(), chunks).await? != Some(*id.digest()) {
                    wrong.get_or_insert_with(|| format!("those of `{id}` are another one together"));
                }
            }
            let chunks = cut.iter().map(|(_, chunks)| u64::from(chunks.count())).sum::<u64>();
            let what = format!("{chunks} chunks make {}", count(cut.len(), "package"));
            check(what, wrong);
        }
    }
    link.close().await;
    let pages = log(brokers, channel, keys).await?;
    let trouble = pages
        .iter()
        .flat_map(|page| page.trouble.iter().map(|trouble| format!("release {}: {trouble}", page.sequence)));
    let trouble: Vec<_> = trouble.collect();
    check(
        format!("the history of {}", count(pages.len(), "list")),
        (!trouble.is_empty()).then(|| trouble.join("; ")),
    );
    Ok(checks)
}
