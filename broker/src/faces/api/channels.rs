//! Channels: what is in them, what was, what differs, and what all of them have.

use std::{collections::BTreeMap, sync::Arc};

use axum::{Json, extract::State, http::HeaderMap, response::Response};
use mpypi_protocol::{ChannelName, Digest, UpdateList};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{
    Asked, AtChannel, AtSequence, Reach, Tag, cut, page,
    shape::{
        Changed, ChannelDetail, ChannelList, ChannelRow, Diff, EntryKind, EntryRow, PackagePage, PackageRow,
        PastRelease, ReleaseDetail, ReleaseList, ReleaseRow,
    },
};
use crate::{
    clock,
    fleet::{
        size,
        view::{self, View},
    },
    gateway::{Caller, Gateway, Here, Problem},
    index::Index,
    message::Message,
};

/// Releases of a channel's history that are shown.
const HISTORY: usize = 100;

impl ChannelRow {
    /// A channel as the view knows it.
    #[must_use]
    pub fn of(view: &View, channel: &view::Channel) -> ChannelRow {
        let followers = view.followers().get(&channel.name).copied().unwrap_or_default();
        ChannelRow::followed(view, channel, followers)
    }

    fn followed(view: &View, channel: &view::Channel, nodes: u64) -> ChannelRow {
        let delegation = view.root().and_then(|root| root.delegation(&channel.name));
        let keys = delegation.map(|delegation| delegation.keys.iter().map(ToString::to_string).collect());
        let release = ReleaseRow::of(channel.name.as_str(), &channel.list, &channel.digest, channel.size);
        ChannelRow { release, nodes, keys: keys.unwrap_or_default() }
    }
}

/// All channels that somebody published to.
#[utoipa::path(get, path = "/api/channels", operation_id = "channels", responses(
    (status = 200, description = "Those that the caller may read", body = ChannelList),
    (status = 304, description = "Nothing changed"),
))]
pub(super) async fn list(
    State(gateway): Here,
    caller: Caller,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let reach = Reach::of(&caller)?;
    let view = gateway.shared.fleet.look().await;
    let tag = Tag::of(&gateway, view.number(), &reach);
    if let Some(same) = tag.same(&headers) {
        return Ok(same);
    }
    let followers = view.followers();
    let readable = view.channels().filter(|channel| caller.reads(&channel.name.topic()).is_ok());
    let row = |channel: &view::Channel| {
        let nodes = if reach == Reach::All { followers.get(&channel.name).copied() } else { None };
        ChannelRow::followed(&view, channel, nodes.unwrap_or_default())
    };
    Ok(tag.answer(ChannelList { channels: readable.map(row).collect() }))
}

fn unknown(channel: &ChannelName) -> Problem {
    Problem::not_found(format!("nobody has published to channel `{channel}`"))
        .hint(format!("publish a folder to it: `mpypi publish channels/{channel}`"))
}

/// What a list names, with sizes from the index where the list says none.
fn entries(index: &Index, list: &UpdateList) -> Vec<EntryRow> {
    let now = clock::now().unix_ms;
    let row = |entry| {
        let mut row = EntryRow::of(entry)?;
        if let (None, Some((id, _))) = (row.size, entry.package()) {
            let stored = index.get(&id.topic(), now).ok().flatten().map(|message| message.payload.len());
            row.size = stored.or((*id.digest() == Digest::EMPTY).then_some(0));
        }
        Some(row)
    };
    list.entries().iter().filter_map(row).collect()
}

/// A channel and what is in it.
#[utoipa::path(get, path = "/api/channels/{channel}", operation_id = "channel",
    params(("channel" = String, Path, description = "Its name")), responses(
    (status = 200, description = "Its present release", body = ChannelDetail),
    (status = 404, description = "Nobody has published there"),
))]
pub(super) async fn one(
    State(gateway): Here,
    caller: Caller,
    AtChannel(channel): AtChannel,
) -> Result<Json<ChannelDetail>, Problem> {
    caller.reads(&channel.topic())?;
    let reach = Reach::of(&caller)?;
    let (row, list) = {
        let view = gateway.shared.fleet.look().await;
        let found = view.channel(&channel).ok_or_else(|| unknown(&channel))?;
        let mut row = ChannelRow::of(&view, found);
        if reach != Reach::All {
            row.nodes = 0;
        }
        (row, found.list.clone())
    };
    let index = gateway.shared.index.clone();
    let entries = gateway.catalog.work(move || entries(&index, &list)).await?;
    Ok(Json(ChannelDetail { channel: row, entries }))
}

/// A release of a channel, read from the index or known already.
struct Found {
    list: Arc<UpdateList>,
    digest: Digest,
    size: u64,
}

impl Found {
    fn row(&self, channel: &ChannelName) -> ReleaseRow {
        ReleaseRow::of(channel.as_str(), &self.list, &self.digest, self.size)
    }

    fn sequence(&self) -> Option<u64> {
        self.list.release().map(|release| release.sequence)
    }

    fn read(index: &Index, message: &Message) -> Result<Option<Found>, Problem> {
        let payload = index.payload(&message.payload)?;
        let Ok(list) = UpdateList::parse(&payload) else { return Ok(None) };
        let (digest, size) = (Digest::of(&payload), size(index, &list));
        Ok(Some(Found { list: Arc::new(list), digest, size }))
    }
}

/// The release that a channel has now.
async fn present(gateway: &Gateway, channel: &ChannelName) -> Result<Found, Problem> {
    let view = gateway.shared.fleet.look().await;
    let found = view.channel(channel).ok_or_else(|| unknown(channel))?;
    Ok(Found { list: found.list.clone(), digest: found.digest, size: found.size })
}

/// What a channel's history keeps beside the present release, the newest first.
async fn past(gateway: &Gateway, channel: &ChannelName, present: Option<u64>) -> Result<Vec<Found>, Problem> {
    let (index, channel) = (gateway.shared.index.clone(), channel.clone());
    let work = move || -> Result<Vec<Found>, Problem> {
        let (filter, now) = (format!("{}/history/+", channel.topic()), clock::now().unix_ms);
        let mut kept = BTreeMap::new();
        index.each(&filter, 0, now, 1, |message| {
            if let Some(sequence) = channel.history_sequence(&message.topic)
                && Some(sequence) != present
            {
                kept.insert(sequence, message);
                if kept.len() > HISTORY {
                    kept.pop_first();
                }
            }
            Ok::<_, Problem>(())
        })?;
        kept.values().rev().filter_map(|message| Found::read(&index, message).transpose()).collect()
    };
    gateway.catalog.work(work).await?
}

/// A release of a channel by its sequence.
async fn find(gateway: &Gateway, channel: &ChannelName, sequence: u64) -> Result<Found, Problem> {
    let present = present(gateway, channel).await?;
    if present.sequence() == Some(sequence) {
        return Ok(present);
    }
    let (index, topic) = (gateway.shared.index.clone(), channel.history(sequence));
    let work = move || match index.get(&topic, clock::now().unix_ms)? {
        Some(message) => Found::read(&index, &message),
        None => Ok(None),
    };
    gateway.catalog.work(work).await??.ok_or_else(|| {
        Problem::not_found(format!("channel `{channel}` keeps no release {sequence}"))
            .hint(format!("`/api/channels/{channel}/releases` lists those that it keeps"))
    })
}

/// The releases that a channel has and had.
#[utoipa::path(get, path = "/api/channels/{channel}/releases", operation_id = "releases",
    params(("channel" = String, Path, description = "Its name")), responses(
    (status = 200, description = "The newest first", body = ReleaseList),
    (status = 404, description = "Nobody has published there"),
))]
pub(super) async fn releases(
    State(gateway): Here,
    caller: Caller,
    AtChannel(channel): AtChannel,
) -> Result<Json<ReleaseList>, Problem> {
    caller.reads(&channel.history(1))?;
    let present = present(&gateway, &channel).await?;
    let past = past(&gateway, &channel, present.sequence()).await?;
    let mut releases = vec![PastRelease { release: present.row(&channel), present: true }];
    releases.extend(past.iter().map(|found| PastRelease { release: found.row(&channel), present: false }));
    Ok(Json(ReleaseList { channel: channel.to_string(), releases }))
}

/// A release of a channel, and what is in it.
#[utoipa::path(get, path = "/api/channels/{channel}/releases/{sequence}", operation_id = "release",
    params(
        ("channel" = String, Path, description = "The channel's name"),
        ("sequence" = u64, Path, description = "The release's sequence"),
    ), responses(
    (status = 200, description = "The release", body = ReleaseDetail),
    (status = 400, description = "The sequence is none"),
    (status = 404, description = "It is not kept"),
))]
pub(super) async fn release(
    State(gateway): Here,
    caller: Caller,
    AtChannel(channel): AtChannel,
    AtSequence(sequence): AtSequence,
) -> Result<Json<ReleaseDetail>, Problem> {
    caller.reads(&channel.history(sequence))?;
    let found = find(&gateway, &channel, sequence).await?;
    let (index, list) = (gateway.shared.index.clone(), found.list.clone());
    let entries = gateway.catalog.work(move || entries(&index, &list)).await?;
    Ok(Json(ReleaseDetail { release: found.row(&channel), entries }))
}

/// Which releases are compared.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct Between {
    /// The sequence of the earlier one; that before `to` if nothing is said, 0 for nothing.
    #[param(minimum = 0)]
    from: Option<u64>,
    /// The sequence of the later one; the present one if nothing is said.
    #[param(minimum = 0)]
    to: Option<u64>,
}

/// What differs between two releases of a channel.
#[utoipa::path(get, path = "/api/channels/{channel}/diff", operation_id = "diff",
    params(("channel" = String, Path, description = "Its name"), Between), responses(
    (status = 200, description = "What differs", body = Diff),
    (status = 400, description = "A parameter makes no sense"),
    (status = 404, description = "A release is not kept"),
))]
pub(super) async fn diff(
    State(gateway): Here,
    caller: Caller,
    AtChannel(channel): AtChannel,
    Asked(Between { from, to }): Asked<Between>,
) -> Result<Json<Diff>, Problem> {
    caller.reads(&channel.history(1))?;
    let later = match to {
        Some(sequence) => find(&gateway, &channel, sequence).await?,
        None => present(&gateway, &channel).await?,
    };
    let earlier = match (from, later.sequence()) {
        (Some(0), _) | (None, None) => None,
        (Some(sequence), _) => Some(find(&gateway, &channel, sequence).await?),
        (None, Some(sequence)) => {
            let present = present(&gateway, &channel).await?.sequence();
            let past = past(&gateway, &channel, present).await?;
            past.into_iter().find(|found| found.sequence() < Some(sequence))
        }
    };
    let sequence = |found: Option<&Found>| found.and_then(Found::sequence).unwrap_or_default();
    let (from, to) = (sequence(earlier.as_ref()), sequence(Some(&later)));
    let index = gateway.shared.index.clone();
    let work = move || {
        let read = |found: &Found| entries(&index, &found.list);
        (earlier.as_ref().map(read).unwrap_or_default(), read(&later))
    };
    let (before, after) = gateway.catalog.work(work).await?;
    Ok(Json(Diff { channel: channel.to_string(), from, to, ..between(before, after) }))
}

/// What differs between what two lists name.
fn between(before: Vec<EntryRow>, after: Vec<EntryRow>) -> Diff {
    let mut diff = Diff {
        channel: String::new(),
        from: 0,
        to: 0,
        added: Vec::new(),
        removed: Vec::new(),
        changed: Vec::new(),
        unchanged: 0,
        bytes: 0,
    };
    let mut before: BTreeMap<_, _> = before.into_iter().map(|row| (row.key(), row)).collect();
    for to in after {
        match before.remove(&to.key()) {
            Some(from) if from.digest == to.digest => diff.unchanged += 1,
            Some(from) => {
                diff.bytes += to.size.unwrap_or_default();
                diff.changed.push(Changed { kind: to.kind, name: to.name.clone(), from, to });
            }
            None => {
                diff.bytes += to.size.unwrap_or_default();
                diff.added.push(to);
            }
        }
    }
    diff.removed = before.into_values().collect();
    diff
}

/// Which packages are wanted.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct Wanted {
    /// A text in the name, version, tag or target; case does not matter.
    q: Option<String>,
    /// What they are.
    kind: Option<EntryKind>,
    /// A channel that has them.
    channel: Option<String>,
    /// How many to leave out.
    #[param(minimum = 0, maximum = 1_000_000)]
    offset: Option<u64>,
    /// How many to answer at most; 100 if nothing is said.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
}

/// The packages that channels have now.
#[utoipa::path(get, path = "/api/packages", operation_id = "packages", params(Wanted), responses(
    (status = 200, description = "Those of the page, by kind and name", body = PackagePage),
    (status = 304, description = "Nothing changed"),
    (status = 400, description = "A parameter makes no sense"),
))]
pub(super) async fn packages(
    State(gateway): Here,
    caller: Caller,
    headers: HeaderMap,
    Asked(wanted): Asked<Wanted>,
) -> Result<Response, Problem> {
    let (offset, limit) = page(wanted.offset, wanted.limit)?;
    let (tag, lists) = {
        let view = gateway.shared.fleet.look().await;
        let tag = Tag::of(&gateway, view.number(), &Reach::of(&caller)?);
        if let Some(same) = tag.same(&headers) {
            return Ok(same);
        }
        let is_wanted = |channel: &&view::Channel| {
            wanted.channel.as_deref().is_none_or(|wanted| wanted == channel.name.as_str())
                && caller.reads(&channel.name.topic()).is_ok()
        };
        let lists = view.channels().filter(is_wanted);
        (tag, lists.map(|channel| (channel.name.clone(), channel.list.clone())).collect::<Vec<_>>())
    };
    let text = wanted.q.as_deref().unwrap_or_default().trim().to_lowercase();
    let mut found: BTreeMap<_, PackageRow> = BTreeMap::new();
    for (channel, list) in &lists {
        for entry in list.entries().iter().filter_map(EntryRow::of) {
            let says = [Some(&entry.name), entry.version.as_ref(), entry.tag.as_ref(), entry.target.as_ref()];
            let says = says.into_iter().flatten().any(|said| said.to_lowercase().contains(&text));
            if entry.digest.is_none() || !says || wanted.kind.is_some_and(|kind| kind != entry.kind) {
                continue;
            }
            let key = (entry.key(), entry.version.clone(), entry.digest.clone());
            let row = found.entry(key).or_insert_with(|| PackageRow { entry, channels: Vec::new() });
            row.channels.push(channel.to_string());
        }
    }
    let total = found.len() as u64;
    let packages = cut(found.into_values().collect(), offset, limit).collect();
    Ok(tag.answer(PackagePage { total, offset, limit, packages }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Vec<EntryRow> {
        let list = UpdateList::parse(text.as_bytes()).unwrap();
        list.entries().iter().filter_map(EntryRow::of).collect()
    }

    #[test]
    fn two_lists_differ_in_what_came_went_and_has_other_bytes() {
        let wheel = |name: &str, bytes: &str, size: u64| {
            let digest = Digest::of(bytes.as_bytes());
            format!(
                r#"{{"type":"wheel","name":"{name}","version":"1","pkg_sha256":"{digest}","size":{size}}}"#
            )
        };
        let before =
            rows(&format!("[{},{},{}]", wheel("a", "1", 1), wheel("b_b", "2", 2), wheel("c", "3", 4)));
        let after =
            rows(&format!("[{},{},{}]", wheel("a", "1", 1), wheel("B-b", "5", 8), wheel("d", "4", 16)));
        let diff = between(before, after);
        let names = |rows: &[EntryRow]| rows.iter().map(|row| row.name.clone()).collect::<Vec<_>>();
        assert_eq!((names(&diff.added), names(&diff.removed)), (vec!["d".to_owned()], vec!["c".to_owned()]));
        assert_eq!(diff.changed.len(), 1);
        assert_eq!((diff.changed[0].from.size, diff.changed[0].to.size), (Some(2), Some(8)));
        assert_eq!((diff.unchanged, diff.bytes), (1, 24));
    }
}
