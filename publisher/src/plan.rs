//! What to publish: decided from what the broker retains and what the folder holds, without asking anybody.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use mpypi_protocol::{
    ChannelName, Digest, Entry, KeyId, Rollout, UpdateList,
    list::{COMMIT, ListError, Piece, Release},
    rollout,
};
use serde::Serialize;

use crate::{signing::signer, wheel::pack::ANY};

/// What the folder says a release should be.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The channel.
    pub channel: ChannelName,
    /// The release's version; its sequence number if `None`.
    pub version: Option<String>,
    /// How many days devices may believe in the release; for ever if `None`.
    pub expires_days: Option<u32>,
    /// The release's sequence number; one more than the present one's if `None`.
    pub sequence: Option<u64>,
    /// The epoch that its lists are of.
    pub epoch: u64,
    /// The digest of the present list's payload.
    pub previous: Option<Digest>,
    /// Releases that must not run any more.
    pub revoked: Vec<u64>,
    /// Who signs it, if anybody does.
    pub signer: Option<KeyId>,
    /// Its packages, in order.
    pub entries: Vec<Entry>,
    /// Whose turn it is to take it; everybody's if `None`.
    pub rollout: Option<Rollout>,
    /// The commit that its files were taken from. Another one with the same files is no reason for a new list.
    pub commit: Option<String>,
}

/// Whether a broker is believed to have the packages that its list names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// As our brokers make sure of: only what is new is asked for.
    List,
    /// It may have lost some: all are asked for.
    Nothing,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// The broker retains what the folder holds.
    UpToDate(Box<Release>),
    /// A new list.
    Publish(Box<Plan>),
}

/// A new list, and how to get there.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The list's release.
    pub release: Release,
    /// The list, as it is sent.
    pub list: Bytes,
    /// What the broker may lack of the list's packages: what the present list does not name, or all.
    pub unknown: Vec<Piece>,
    /// What changes for devices.
    pub diff: Diff,
}

/// What changes between two lists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Diff {
    /// In the new list only.
    pub added: Vec<Change>,
    /// In both, with other bytes.
    pub changed: Vec<Change>,
    /// In the old list only: devices will remove it.
    pub removed: Vec<Change>,
}

/// One entry of a [`Diff`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The `type` of the entry.
    #[serde(rename = "type")]
    pub kind: String,
    /// The path or name of the package.
    pub name: String,
    /// The tag or target of the devices it is for, unless it is for all.
    #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The version, where the package has one: the new one, or the old one of what is removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The size in bytes, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// Why there can be no new list.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The sequence number wanted is not greater than the present one.
    #[error("release {wanted} would not be newer than release {present}, which the channel has")]
    NotNewer {
        /// The one wanted.
        wanted: u64,
        /// The one there is.
        present: u64,
    },
    /// The present list has the last sequence number there is.
    #[error("the channel has used up its sequence numbers")]
    NoSequence,
    /// The entries contradict each other.
    #[error("the list would not be valid")]
    List(#[from] ListError),
    /// Neither list has a release.
    #[error("the channel has no release: publish its folder")]
    NoRelease,
    /// A time that cannot be written.
    #[error("the release would expire at a time that cannot be written")]
    Expires(#[from] jiff::Error),
}

/// Compares the `present` list with what is `wanted`, at time `now`. With [`Trust::Nothing`] there is always a
/// plan.
///
/// # Errors
/// See [`PlanError`].
pub fn decide(
    present: Option<&UpdateList>,
    wanted: &Wanted,
    trust: Trust,
    now: Timestamp,
) -> Result<Decision, PlanError> {
    let now = Timestamp::from_second(now.as_second())?;
    let release = present.and_then(UpdateList::release);
    let entries = |list: &UpdateList| -> Vec<Entry> {
        let is_package = |entry: &&Entry| !matches!(entry, Entry::Release(_) | Entry::Signature(_));
        list.entries().iter().filter(is_package).cloned().collect()
    };
    let old = present.map(entries).unwrap_or_default();
    if let Some(release) = release
        && trust == Trust::List
        && old == wanted.entries
        && release.epoch == wanted.epoch
        && wanted.revoked.iter().all(|sequence| release.revoked.contains(sequence))
        && wanted.signer.as_ref().map(KeyId::as_str) == present.and_then(signer)
        && release.extra.get(rollout::KEY) == wanted.rollout.as_ref().map(Rollout::to_value).as_ref()
        && wanted.sequence.is_none_or(|sequence| sequence == release.sequence)
        && wanted.version.as_ref().is_none_or(|version| *version == release.version)
        && is_fresh(release, wanted.expires_days, now)
    {
        return Ok(Decision::UpToDate(Box::new(release.clone())));
    }

    let last = match release {
        // Whoever used the numbers up, with a key that was stolen: in a new epoch they begin anew.
        Some(release) if release.epoch < wanted.epoch && release.sequence == u64::MAX => 0,
        Some(release) => release.sequence,
        None => 0,
    };
    let sequence = match wanted.sequence {
        Some(sequence)
            if sequence <= last && release.is_some_and(|release| release.epoch >= wanted.epoch) =>
        {
            return Err(PlanError::NotNewer { wanted: sequence, present: last });
        }
        Some(sequence) => sequence,
        None => last.checked_add(1).ok_or(PlanError::NoSequence)?,
    };
    let rollout = wanted.rollout.iter().map(|rollout| (rollout::KEY.to_owned(), rollout.to_value()));
    let commit = wanted.commit.iter().map(|commit| (COMMIT.to_owned(), commit.as_str().into()));
    let release = Release {
        channel: wanted.channel.clone(),
        sequence,
        version: wanted.version.clone().unwrap_or_else(|| sequence.to_string()),
        created: Some(now),
        expires: wanted.expires_days.map(|days| now.checked_add(days_of(days))).transpose()?,
        epoch: wanted.epoch,
        previous: wanted.previous,
        revoked: wanted.revoked.clone(),
        extra: rollout.chain(commit).collect(),
    };
    let mut all = vec![Entry::Release(release.clone())];
    all.extend(wanted.entries.iter().cloned());
    let list = UpdateList::new(all)?;
    let bytes = list.to_bytes();
    let named: HashSet<(String, Digest)> = present
        .filter(|_| trust == Trust::List)
        .into_iter()
        .flat_map(UpdateList::pieces)
        .map(|piece| (piece.topic, piece.digest))
        .collect();
    let is_known = |piece: &Piece| named.contains(&(piece.topic.clone(), piece.digest));
    let unknown = list.pieces().filter(|piece| !is_known(piece)).collect();
    let diff = diff(&old, &wanted.entries);
    Ok(Decision::Publish(Box::new(Plan { release, list: bytes.into(), unknown, diff })))
}

/// A new list with the packages of `from`, to take the place of `present`: with another rollout, or none, and what is bad;
/// of an epoch, and with the digest of the list that it replaces.
///
/// # Errors
/// See [`PlanError`].
pub fn relist(
    present: &UpdateList,
    from: &UpdateList,
    rollout: Option<&Rollout>,
    revoked: &[u64],
    (epoch, previous): (u64, Option<Digest>),
    now: Timestamp,
) -> Result<(Release, Bytes), PlanError> {
    let now = Timestamp::from_second(now.as_second())?;
    let (old, last) = (from.release(), present.release().map_or(0, |release| release.sequence));
    let channel = present.release().or(old).map(|release| release.channel.clone());
    let sequence = last.checked_add(1).ok_or(PlanError::NoSequence)?;
    // It stays good for as long as it was meant to.
    let life = old.and_then(|old| Some(old.expires?.duration_since(old.created?)));
    let mut extra = old.map(|old| old.extra.clone()).unwrap_or_default();
    extra.shift_remove(rollout::KEY);
    extra.extend(rollout.map(|rollout| (rollout::KEY.to_owned(), rollout.to_value())));
    let revoked = match (revoked, old) {
        ([], Some(old)) => old.revoked.clone(),
        (revoked, _) => revoked.to_vec(),
    };
    let release = Release {
        channel: channel.ok_or(PlanError::NoRelease)?,
        sequence,
        version: old.map_or_else(|| sequence.to_string(), |old| old.version.clone()),
        created: Some(now),
        expires: life.map(|life| now.checked_add(life)).transpose()?,
        epoch,
        previous,
        revoked,
        extra,
    };
    let mut all = vec![Entry::Release(release.clone())];
    let is_package = |entry: &&Entry| !matches!(entry, Entry::Release(_) | Entry::Signature(_));
    all.extend(from.entries().iter().filter(is_package).cloned());
    let list = UpdateList::new(all)?;
    Ok((release, list.to_bytes().into()))
}

/// Whether the release need not be renewed: it expires as wanted, and more than half of its time is left.
fn is_fresh(release: &Release, expires_days: Option<u32>, now: Timestamp) -> bool {
    match (expires_days, release.expires) {
        (None, None) => true,
        (Some(days), Some(expires)) => {
            let left = expires.duration_since(now);
            left > days_of(days) / 2 && left <= days_of(days)
        }
        _ => false,
    }
}

fn days_of(days: u32) -> SignedDuration {
    SignedDuration::from_hours(24 * i64::from(days))
}

fn diff(old: &[Entry], new: &[Entry]) -> Diff {
    let keyed = |entries: &[Entry]| -> HashMap<(String, String, Option<String>), Entry> {
        entries.iter().map(|entry| (key(entry), entry.clone())).collect()
    };
    let (before, after) = (keyed(old), keyed(new));
    let mut diff = Diff::default();
    for entry in new {
        match before.get(&key(entry)) {
            None => diff.added.push(change(entry)),
            Some(old) if old != entry => diff.changed.push(change(entry)),
            Some(_) => {}
        }
    }
    diff.removed = old.iter().filter(|entry| !after.contains_key(&key(entry))).map(change).collect();
    diff
}

/// What makes two entries speak of the same thing: type, name, and the devices it is for.
fn key(entry: &Entry) -> (String, String, Option<String>) {
    let (name, target) = match entry {
        Entry::Wheel(wheel) => (wheel.name.clone(), wheel.tag.clone()),
        Entry::Src(src) => (src.path.to_string(), None),
        Entry::Firmware(image) => (image.name.clone(), image.target.clone()),
        Entry::Signature(signature) => (signature.key.clone(), None),
        Entry::Unknown(map) => (serde_json::to_string(map).unwrap_or_default(), None),
        _ => (String::new(), None),
    };
    (entry.kind().to_owned(), name, target)
}

fn change(entry: &Entry) -> Change {
    let (kind, name, target) = key(entry);
    let target = target.filter(|target| target != ANY);
    let version = match entry {
        Entry::Wheel(wheel) => Some(wheel.version.clone()),
        Entry::Firmware(image) => Some(image.version.clone()),
        _ => None,
    };
    Change { kind, name, target, version, size: entry.package().and_then(|(_, size)| size) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mpypi_protocol::{Chunks, FilePath, list::Src};

    fn src(path: &str, content: &str) -> Entry {
        Entry::Src(Src {
            path: FilePath::new(path).unwrap(),
            digest: Digest::of(content.as_bytes()),
            size: Some(content.len() as u64),
            chunks: None,
            extra: Default::default(),
        })
    }

    fn wanted(entries: Vec<Entry>) -> Wanted {
        Wanted {
            channel: ChannelName::new("dev").unwrap(),
            version: None,
            expires_days: None,
            sequence: None,
            epoch: 0,
            previous: None,
            revoked: Vec::new(),
            signer: None,
            entries,
            rollout: None,
            commit: None,
        }
    }

    fn at(time: &str) -> Timestamp {
        time.parse().unwrap()
    }

    fn plan(present: Option<&UpdateList>, wanted: &Wanted) -> Plan {
        match decide(present, wanted, Trust::List, at("2026-11-20T10:00:00.5Z")).unwrap() {
            Decision::Publish(plan) => *plan,
            Decision::UpToDate(release) => panic!("up to date at {}", release.sequence),
        }
    }

    fn list(plan: &Plan) -> UpdateList {
        UpdateList::parse(&plan.list).unwrap()
    }

    #[test]
    fn the_first_release_has_sequence_1_and_names_everything() {
        let plan = plan(None, &wanted(vec![src("empty.py", ""), src("main.py", "x")]));
        assert_eq!((plan.release.sequence, plan.release.version.as_str()), (1, "1"));
        assert!(plan.list.starts_with(
            br#"[{"type":"release","channel":"dev","sequence":1,"version":"1","created":"2026-11-20T10:00:00Z"},"#
        ));
        assert_eq!(plan.unknown.len(), 1, "an empty file is never sent");
        assert_eq!(plan.diff.added.len(), 2);
    }

    #[test]
    fn the_same_entries_are_up_to_date() {
        let wanted = wanted(vec![src("main.py", "x")]);
        let first = list(&plan(None, &wanted));
        let again = decide(Some(&first), &wanted, Trust::List, at("2030-01-01T00:00:00Z")).unwrap();
        assert!(matches!(again, Decision::UpToDate(release) if release.sequence == 1));
    }

    #[test]
    fn only_packages_that_the_present_list_does_not_name_are_unknown() {
        let first = list(&plan(None, &wanted(vec![src("a.py", "a"), src("b.py", "b"), src("c.py", "c")])));
        let second = plan(Some(&first), &wanted(vec![src("a.py", "a"), src("b.py", "B"), src("d.py", "c")]));
        assert_eq!((second.release.sequence, second.release.version.as_str()), (2, "2"));
        let unknown: Vec<_> = second.unknown.iter().map(|piece| piece.topic.clone()).collect();
        let topic = |path: &str, content: &[u8]| format!("mpypi/packages/src/{path}/{}", Digest::of(content));
        assert_eq!(unknown, [topic("b.py", b"B"), topic("d.py", b"c")]);
        let names = |changes: &[Change]| changes.iter().map(|c| c.name.clone()).collect::<Vec<_>>();
        let Diff { added, changed, removed } = &second.diff;
        assert_eq!(
            (names(added), names(changed), names(removed)),
            (vec!["d.py".into()], vec!["b.py".into()], vec!["c.py".into()])
        );
    }

    #[test]
    fn of_a_package_in_other_chunks_than_before_the_chunks_are_unknown() {
        let in_chunks = |size: u64| {
            let mut entry = src("a.bin", &"x".repeat(5000));
            entry.set_chunks(Some(Chunks::cut(&[b'x'; 5000], size).unwrap()));
            wanted(vec![entry])
        };
        let whole = list(&plan(None, &wanted(vec![src("a.bin", &"x".repeat(5000))])));
        let cut = plan(Some(&whole), &in_chunks(2048));
        assert_eq!(cut.unknown.len(), 3);
        let cut = list(&cut);
        let again = decide(Some(&cut), &in_chunks(2048), Trust::List, at("2030-01-01T00:00:00Z")).unwrap();
        assert!(matches!(again, Decision::UpToDate(_)));
        let unknown = plan(Some(&cut), &in_chunks(4096)).unknown;
        assert_eq!(unknown.iter().map(|piece| piece.size).collect::<Vec<_>>(), [Some(4096), Some(904)]);
    }

    #[test]
    fn a_new_version_is_a_new_release_even_of_the_same_files() {
        let first = list(&plan(None, &wanted(vec![src("main.py", "x")])));
        let wanted = Wanted { version: Some("1.4".into()), ..wanted(vec![src("main.py", "x")]) };
        let second = plan(Some(&first), &wanted);
        assert_eq!((second.release.sequence, second.release.version.as_str()), (2, "1.4"));
        assert_eq!((second.unknown.len(), second.diff), (0, Diff::default()));
    }

    #[test]
    fn a_release_that_expires_is_renewed_when_half_of_its_time_is_over() {
        let wanted = Wanted { expires_days: Some(10), ..wanted(vec![src("main.py", "x")]) };
        let first = plan(None, &wanted);
        assert_eq!(first.release.expires, Some(at("2026-11-30T10:00:00Z")));
        let later = |time| decide(Some(&list(&first)), &wanted, Trust::List, at(time)).unwrap();
        assert!(matches!(later("2026-11-24T00:00:00Z"), Decision::UpToDate(_)));
        assert!(matches!(later("2026-11-26T00:00:00Z"), Decision::Publish(_)));
    }

    #[test]
    fn a_list_without_release_is_followed_by_sequence_1() {
        let present = UpdateList::new(vec![src("main.py", "x")]).unwrap();
        assert_eq!(plan(Some(&present), &wanted(vec![src("main.py", "x")])).release.sequence, 1);
        let empty = UpdateList::parse(b"[]").unwrap();
        assert_eq!(plan(Some(&empty), &wanted(vec![src("main.py", "x")])).release.sequence, 1);
    }

    #[test]
    fn entries_of_a_type_we_do_not_know_are_not_carried_over_and_show_in_the_diff() {
        let payload =
            br#"[{"type":"release","channel":"dev","sequence":7,"version":"7"},{"type":"poem","x":1}]"#;
        let present = UpdateList::parse(payload).unwrap();
        let plan = plan(Some(&present), &wanted(vec![src("main.py", "x")]));
        assert_eq!(plan.release.sequence, 8);
        assert!(!plan.list.windows(4).any(|w| w == b"poem"));
        assert_eq!(plan.diff.removed[0].kind, "poem");
    }

    #[test]
    fn a_channel_that_lost_count_can_be_told_where_to_go_on() {
        let wanted = |sequence| Wanted { sequence, ..wanted(vec![src("main.py", "x")]) };
        assert_eq!(plan(None, &wanted(Some(42))).release.sequence, 42);
        let first = list(&plan(None, &wanted(None)));
        assert_eq!(plan(Some(&first), &wanted(Some(42))).release.sequence, 42, "though nothing else changed");
        let second = list(&plan(Some(&first), &wanted(Some(42))));
        let decide =
            |number| decide(Some(&second), &wanted(Some(number)), Trust::List, at("2026-11-20T10:00:00Z"));
        assert!(matches!(decide(42), Ok(Decision::UpToDate(_))));
        assert!(matches!(decide(41), Err(PlanError::NotNewer { wanted: 41, present: 42 })));
    }

    #[test]
    fn a_broker_that_is_not_trusted_is_asked_for_everything() {
        let wanted = wanted(vec![src("main.py", "x"), src("empty.py", "")]);
        let first = list(&plan(None, &wanted));
        let decided = decide(Some(&first), &wanted, Trust::Nothing, at("2026-11-20T10:00:00Z")).unwrap();
        let Decision::Publish(plan) = decided else { panic!("there is always a plan") };
        assert_eq!((plan.unknown.len(), plan.release.sequence, &plan.diff), (1, 2, &Diff::default()));
    }

    #[test]
    fn the_last_sequence_number_cannot_be_followed() {
        let payload =
            format!(r#"[{{"type":"release","channel":"dev","sequence":{},"version":"1"}}]"#, u64::MAX);
        let present = UpdateList::parse(payload.as_bytes()).unwrap();
        let wanted = wanted(vec![src("main.py", "x")]);
        let error = decide(Some(&present), &wanted, Trust::List, at("2026-11-20T10:00:00Z"));
        assert!(matches!(error, Err(PlanError::NoSequence)));
    }
}
