//! Releases that the broker makes itself: what a channel has, with packages that came over HTTP. They pass the door and the
//! writer, as from any publisher.

use std::sync::Arc;

use axum::http::StatusCode;
use bytes::Bytes;
use mpypi_protocol::{
    ChannelName, Digest, Entry, UpdateList,
    list::{COMMIT, Release},
    wheel::normalized_name,
};
use tokio::sync::OwnedSemaphorePermit;

use super::catalog::Listed;
use crate::{
    clock,
    gateway::{Gateway, Problem},
    message::chain,
    packet::Reason,
};

/// How often a list is made again that somebody else replaced in the meantime.
const ATTEMPTS: usize = 5;

/// What became of packages that were to be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    /// The sequence of the channel's release, if it has one.
    pub sequence: Option<u64>,
    /// Whether it is a new one.
    pub changed: bool,
}

/// Adds packages to a channel, in one release: each instead of the wheel of the same project and tag, or of the file of the same
/// path, if there is one. `version` is what people call the release. `place` is given back when the packages are settled.
///
/// # Errors
/// The channel's lists are signed, the list would be none, or others publish there all the time.
pub async fn add(
    gateway: &Arc<Gateway>,
    channel: &ChannelName,
    packages: &[(Entry, Bytes)],
    version: Option<&str>,
    place: OwnedSemaphorePermit,
) -> Result<Added, Problem> {
    let index = &gateway.shared.index;
    let mut place = Some(place);
    for _ in 0..ATTEMPTS {
        let listed = gateway.catalog.list(index, channel)?;
        // Refused before anything is kept for it.
        let Some((list, sequence)) = with(&listed, packages, version)? else {
            let sequence = listed.list.release().map(|release| release.sequence);
            return Ok(Added { sequence, changed: false });
        };
        if let Some(_place) = place.take() {
            for (entry, content) in packages {
                // What is empty cannot be retained, and need not be.
                if let Some((id, _)) = entry.package().filter(|(id, _)| *id.digest() != Digest::EMPTY) {
                    gateway.publish(id.topic(), content.clone(), None, None).await?;
                }
            }
        }
        keep(gateway, &listed).await?;
        let payload = Bytes::from(list.to_bytes());
        match gateway.publish(channel.topic(), payload, Some(listed.version), None).await {
            Ok(()) => return Ok(Added { sequence, changed: true }),
            // Somebody else published in the meantime: once more, with what is there now.
            Err(refusal) if refusal.reason == Reason::ImplementationSpecificError => {}
            Err(refusal) => return Err(refusal.into()),
        }
    }
    Err(Problem::new(StatusCode::CONFLICT, format!("others publish to `{channel}` all the time"))
        .hint("try again later"))
}

/// Keeps the list that is about to be replaced in the channel's history, as publishers do.
async fn keep(gateway: &Arc<Gateway>, listed: &Listed) -> Result<(), Problem> {
    let Some(release) = listed.list.release() else { return Ok(()) };
    let index = &gateway.shared.index;
    let present = index.get(&listed.channel.topic(), clock::now().unix_ms)?;
    // Otherwise somebody else replaced it, and the next attempt reads what is there now.
    if let Some(message) = present.filter(|message| message.version == listed.version) {
        let payload = index.payload(&message.payload)?;
        gateway.publish(listed.channel.history(release.sequence), payload, None, None).await?;
    }
    Ok(())
}

/// Whether one entry takes the place of another.
fn is_same(one: &Entry, other: &Entry) -> bool {
    match (one, other) {
        (Entry::Wheel(one), Entry::Wheel(other)) => {
            normalized_name(&one.name) == normalized_name(&other.name) && one.tag == other.tag
        }
        (Entry::Src(one), Entry::Src(other)) => one.path == other.path,
        _ => false,
    }
}

/// The channel's list with these packages, and its sequence; `None` if it has all of them already.
fn with(
    listed: &Listed,
    packages: &[(Entry, Bytes)],
    version: Option<&str>,
) -> Result<Option<(UpdateList, Option<u64>)>, Problem> {
    let Listed { channel, list, .. } = listed;
    let conflict = |detail: String| Problem::new(StatusCode::CONFLICT, detail);
    if list.entries().iter().any(|entry| matches!(entry, Entry::Signature(_))) {
        return Err(conflict(format!("the lists of `{channel}` are signed, and the broker has no key"))
            .hint("put it into the channel's folder, and `mpypi publish` that"));
    }
    let digest = |entry: &Entry| entry.package().map(|(id, _)| *id.digest());
    let mut entries = list.entries().to_vec();
    let mut is_new =
        version.is_some_and(|version| list.release().is_none_or(|release| release.version != version));
    for (new, _) in packages {
        let Some(old) = entries.iter_mut().find(|old| is_same(old, new)) else {
            is_new = true;
            entries.push(new.clone());
            continue;
        };
        if digest(old) == digest(new) {
            continue;
        }
        if let (Entry::Wheel(old), Entry::Wheel(new)) = (&*old, new)
            && old.version == new.version
        {
            return Err(conflict(format!("`{channel}` has other bytes as `{}` {}", new.name, new.version))
                .hint("devices compare versions: raise the wheel's"));
        }
        is_new = true;
        *old = new.clone();
    }
    if !is_new {
        return Ok(None);
    }
    let mut release = next(listed)?;
    if let (Some(release), Some(version)) = (&mut release, version) {
        version.clone_into(&mut release.version);
    }
    let sequence = release.as_ref().map(|release| release.sequence);
    entries.retain(|entry| !matches!(entry, Entry::Release(_)));
    entries.splice(0..0, release.map(Entry::Release));
    let list = UpdateList::new(entries)
        .map_err(|error| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, chain(&error)))?;
    Ok(Some((list, sequence)))
}

/// The release after the present one. A list of Mpy-BLOX's own tools has none, and gets none.
fn next(listed: &Listed) -> Result<Option<Release>, Problem> {
    let now = clock::now().unix_ms;
    let now = jiff::Timestamp::from_millisecond(i64::try_from(now).unwrap_or(i64::MAX)).ok();
    let Some(old) = listed.list.release() else {
        let first = Release {
            channel: listed.channel.clone(),
            sequence: 1,
            version: "1".to_owned(),
            created: now,
            expires: None,
            epoch: 0,
            previous: listed.digest,
            revoked: Vec::new(),
            extra: Default::default(),
        };
        return Ok(listed.list.entries().is_empty().then_some(first));
    };
    let too_high = || Problem::new(StatusCode::CONFLICT, "there is no sequence after the present release's");
    let sequence = old.sequence.checked_add(1).ok_or_else(too_high)?;
    let is_counted = old.version == old.sequence.to_string();
    let mut release = Release {
        sequence,
        version: if is_counted { sequence.to_string() } else { old.version.clone() },
        created: now,
        // As long as the last one was good for.
        expires: match (old.created, old.expires, now) {
            (Some(created), Some(expires), Some(now)) => {
                now.checked_add(expires.duration_since(created)).ok()
            }
            _ => None,
        },
        previous: listed.digest,
        ..old.clone()
    };
    // A new release to all, not the next step of the last one's rollout.
    release.extra.shift_remove("rollout");
    // Nor what some commit had.
    release.extra.shift_remove(COMMIT);
    Ok(Some(release))
}
