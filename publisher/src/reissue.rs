//! Publishes again what a broker has: an earlier list of the same channel, or the list of another one. Not a package is
//! sent; the very same digests get a new sequence.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_client::Brokers;
use mpypi_protocol::{
    ChannelName, Digest, Entry, PackageId, Root, Trust, UpdateList,
    list::{Piece, Release},
    signed::Distrust,
};

use crate::{
    history,
    keys::Keys,
    link::Link,
    plan::{Decision, Plan, Trust as Belief, Wanted, decide},
    publish::PublishError,
    retained,
    settle::{self, Disagreement, End, Message, Stands, settle},
    signing::{self, Authority, Signing, signer, walk},
};

/// What to publish again, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// The broker, or several that are to agree.
    pub brokers: Brokers,
    /// The channel that gets a new list.
    pub channel: ChannelName,
    /// Where its packages come from.
    pub source: Source,
    /// Whether the releases after the one that is gone back to are revoked: no device may go on with them.
    pub revoke: bool,
    /// The key folder, and the key to sign with: any that may sign, unless one is named.
    pub keys: Keys,
    /// The key's name.
    pub key: Option<mpypi_protocol::KeyId>,
}

/// Where the packages of a list come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The list of this sequence in the channel's history.
    History(u64),
    /// What another channel has now.
    Channel(ChannelName),
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Reissued {
    /// The release that stands now.
    pub release: Release,
    /// The sequence that its packages had before.
    pub of: Option<u64>,
    /// How many packages it has.
    pub packages: usize,
    /// Whether there was anything to do.
    pub published: bool,
}

/// Does it.
///
/// # Errors
/// See [`PublishError`]. After an error the old release stands, or the new one.
pub async fn reissue(options: &Options) -> Result<Reissued, PublishError> {
    #[expect(clippy::disallowed_methods, reason = "this is the driver that gives the plan its time")]
    let now = Timestamp::now();
    let Options { channel, keys, .. } = options;
    let mut link = settle::connect(&options.brokers, channel).await?;
    let (present, roots) = retained::channel(&mut link, channel).await?;
    let list = present.as_ref().and_then(|payload| UpdateList::parse(payload).ok());
    let signing = Signing::With(keys.clone(), options.key.clone());
    let (authority, signing) = Authority::any(&signing, channel, list.as_ref(), &roots, now)?;
    let (payload, from) = match &options.source {
        Source::History(sequence) => {
            let mut kept = history::read(&mut link, channel).await?;
            let found = kept.remove(sequence).ok_or_else(|| PublishError::NoSuchRelease {
                channel: channel.clone(),
                sequence: *sequence,
                kept: kept.keys().copied().collect(),
            })?;
            (found, channel)
        }
        Source::Channel(other) => {
            let found = retained::list(&mut link, other).await?;
            (found.ok_or_else(|| PublishError::Empty { channel: other.clone() })?, other)
        }
    };
    let source = authority.believed(&payload, from).map_err(PublishError::Untrusted)?;
    let before = source.release().cloned();
    let lifetime =
        before.as_ref().and_then(|release| Some(release.expires?.duration_since(release.created?)));
    let revoked = match (options.revoke, before.as_ref(), list.as_ref().and_then(UpdateList::release)) {
        (true, Some(back), Some(present)) => {
            let most = mpypi_protocol::limits::REVOKED as u64;
            let first = (back.sequence + 1).max((present.sequence + 1).saturating_sub(most));
            (first..=present.sequence).collect()
        }
        _ => Vec::new(),
    };
    let wanted = Wanted {
        channel: channel.clone(),
        version: before.as_ref().map(|release| release.version.clone()),
        expires_days: lifetime.map(|time| u32::try_from(time.as_hours() / 24).unwrap_or(u32::MAX).max(1)),
        sequence: None,
        epoch: authority.epoch,
        previous: signing::previous(present.as_ref()),
        revoked,
        signer: authority.key.as_ref().map(|key| key.id.clone()),
        entries: packages_of(&source),
        rollout: None,
        commit: before.as_ref().and_then(Release::commit).map(str::to_owned),
    };
    let plan = match decide(list.as_ref(), &wanted, Belief::List, now)? {
        Decision::UpToDate(release) => {
            link.close().await;
            let packages = wanted.entries.len();
            let of = before.map(|release| release.sequence);
            return Ok(Reissued { release: *release, of, packages, published: false });
        }
        Decision::Publish(plan) => *plan,
    };
    if options.brokers.are_several() {
        // What one of them lacks, another may have.
        agree(options, &plan, Stands::Nothing, present.as_ref(), &wanted.entries).await?;
    } else {
        let found = retained::pieces(&mut link, channel, present.is_some(), &plan.unknown).await?;
        let unknown: HashSet<&str> = plan.unknown.iter().map(|piece| piece.topic.as_str()).collect();
        let is_lost = |piece: &Piece| unknown.contains(piece.topic.as_str()) && !found.contains(&piece.topic);
        let lost = wanted.entries.iter().filter(|entry| entry.pieces().iter().any(is_lost));
        let lost: Vec<PackageId> = lost.filter_map(|entry| Some(entry.package()?.0)).collect();
        if !lost.is_empty() {
            return Err(PublishError::Lost { packages: lost });
        }
    }
    let plan = Plan { list: authority.sign(&signing, &plan.list).await?, ..plan };
    // What a broker does not keep is missing from the history, and no reason to leave devices on a bad release.
    let _ = history::keep(&mut link, channel, present.as_ref(), plan.release.sequence).await?;
    if let Err(refusal) = history::put(&mut link, channel.topic(), plan.list.clone()).await? {
        let (channel, sequence) = (channel.clone(), plan.release.sequence);
        return Err(PublishError::ListRefused { channel, sequence, refusal });
    }
    let standing = retained::list(&mut link, channel).await?;
    link.close().await;
    if options.brokers.are_several() {
        agree(options, &plan, Stands::Published, present.as_ref(), &wanted.entries).await?;
    }
    match standing {
        Some(list) if list == plan.list || options.brokers.are_several() => Ok(Reissued {
            packages: wanted.entries.len(),
            of: before.map(|release| release.sequence),
            release: plan.release,
            published: true,
        }),
        _ => Err(PublishError::NotRetained { channel: channel.clone(), sequence: plan.release.sequence }),
    }
}

/// Makes sure that every broker has what the list names, and the list that it is to replace; once it is published, the list
/// as well. Packages come from brokers that have them.
async fn agree(
    options: &Options,
    plan: &Plan,
    stands: Stands,
    present: Option<&Bytes>,
    entries: &[Entry],
) -> Result<(), PublishError> {
    let channel = &options.channel;
    let mut messages: Vec<Message> = entries.iter().flat_map(Entry::pieces).map(Message::piece).collect();
    let before = present.and_then(|payload| UpdateList::parse(payload).ok());
    match (stands, present, before.as_ref().and_then(UpdateList::release)) {
        (Stands::Nothing, Some(payload), _) => messages.push(Message::of(channel.topic(), payload.clone())),
        (Stands::Nothing, None, _) => {}
        (Stands::Published, present, release) => {
            messages.push(Message::of(channel.topic(), plan.list.clone()));
            if let (Some(payload), Some(release)) = (present, release) {
                messages.push(Message::of(channel.history(release.sequence), payload.clone()));
            }
        }
    }
    let sequence = plan.release.sequence;
    let verdict = settle(&options.brokers, Some(channel), &messages, |_| None, |_| {}).await;
    match verdict.end {
        End::Agreed => Ok(()),
        End::Raced => {
            let found = "what is there now".to_owned();
            Err(PublishError::Raced { channel: channel.clone(), found })
        }
        End::Disagreed => {
            let done = match stands {
                Stands::Published => format!("release {sequence} of channel `{channel}` is published"),
                Stands::Nothing => format!("channel `{channel}` stays as it was"),
            };
            Err(Box::new(Disagreement { done, stands, verdict }).into())
        }
    }
}

/// The packages of a list, without what is about the list itself.
fn packages_of(list: &UpdateList) -> Vec<Entry> {
    let is_package = |entry: &&Entry| !matches!(entry, Entry::Release(_) | Entry::Signature(_));
    list.entries().iter().filter(is_package).cloned().collect()
}

/// One list of a channel's past or present, as an auditor sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Its sequence.
    pub sequence: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Its version.
    pub version: String,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// The digest of its payload.
    pub digest: Digest,
    /// How many packages it has.
    pub packages: usize,
    /// The commit that it was made of, if it says one.
    pub commit: Option<String>,
    /// Who says to have signed it.
    pub signer: Option<String>,
    /// What is wrong with it, or with what comes before it.
    pub trouble: Vec<String>,
}

/// A channel's history, the newest list first, each held against the one before it and against every root of `chain` and
/// of what the broker retains.
///
/// # Errors
/// See [`PublishError`].
pub async fn log(brokers: &Brokers, channel: &ChannelName, keys: &Keys) -> Result<Vec<Page>, PublishError> {
    let mut link = Link::connect_any(brokers).await?;
    let (present, roots) = retained::channel(&mut link, channel).await?;
    let kept = history::read(&mut link, channel).await?;
    link.close().await;
    // Every root that was ever reached: a list was good if one of them let its key sign.
    let chain = walk(keys.roots().map_err(signing::SigningError::from)?.0, &roots);
    Ok(pages(channel, present, kept, &chain))
}

/// The same, from what was read.
fn pages(
    channel: &ChannelName,
    present: Option<Bytes>,
    kept: BTreeMap<u64, Bytes>,
    chain: &[Root],
) -> Vec<Page> {
    let mut lists: Vec<(Bytes, Option<u64>)> =
        kept.into_iter().map(|(sequence, payload)| (payload, Some(sequence))).collect();
    lists.extend(present.filter(|payload| **payload != *b"[]").map(|payload| (payload, None)));
    let mut pages = Vec::new();
    for (payload, topic) in lists {
        let digest = Digest::of(&payload);
        let list = match UpdateList::parse(&payload) {
            Ok(list) => list,
            Err(error) => {
                pages.push((
                    Page {
                        sequence: topic.unwrap_or_default(),
                        epoch: 0,
                        version: String::new(),
                        created: None,
                        digest,
                        packages: 0,
                        commit: None,
                        signer: None,
                        trouble: vec![format!("no update list: {error}")],
                    },
                    None,
                    false,
                ));
                continue;
            }
        };
        let Some(release) = list.release() else { continue };
        let (mut trouble, mut is_unsigned) = (Vec::new(), false);
        if topic.is_some_and(|topic| topic != release.sequence) {
            trouble.push(format!("is retained as release {}", topic.unwrap_or_default()));
        }
        if release.channel != *channel {
            trouble.push(format!("is for channel `{}`", release.channel));
        }
        let delegating: Vec<_> = chain.iter().filter(|root| root.delegation(channel).is_some()).collect();
        if !delegating.is_empty() {
            let verify =
                |root: &&Root| Trust::Root((*root).clone().into()).verify(channel, &payload, None).map(drop);
            let verdicts: Vec<_> = delegating.iter().map(verify).collect();
            // What only lacks an end of its expiry was good once.
            if verdicts.iter().all(Result::is_err)
                && let Some(Err(error)) = verdicts.last()
            {
                is_unsigned = trouble.is_empty() && matches!(error, Distrust::Unsigned);
                trouble.push(error.to_string());
            }
        }
        pages.push((
            Page {
                sequence: release.sequence,
                epoch: release.epoch,
                version: release.version.clone(),
                created: release.created,
                digest,
                packages: packages_of(&list).len(),
                commit: release.commit().map(str::to_owned),
                signer: signer(&list).map(str::to_owned),
                trouble,
            },
            release.previous,
            is_unsigned,
        ));
    }
    pages.sort_by_key(|(page, ..)| (page.epoch, page.sequence));
    // What was published before the channel had keys is vouched for by the first list that is signed, which says what it replaced.
    let mut vouched = None;
    for (page, previous, is_unsigned) in pages.iter_mut().rev() {
        if *is_unsigned && vouched == Some(page.digest) {
            page.trouble.clear();
        }
        vouched = previous.filter(|_| page.trouble.is_empty());
    }
    for at in 1..pages.len() {
        let before = pages[at - 1].0.digest;
        if let Some(previous) = pages[at].1.filter(|previous| *previous != before) {
            pages[at].0.trouble.push(format!(
                "says that it replaced {}, and before it is {}: a list is missing, or was put there",
                previous.short(),
                before.short()
            ));
        }
    }
    pages.into_iter().rev().map(|(page, ..)| page).collect()
}
