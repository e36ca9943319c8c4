//! Putting a backup back. Nothing is ever removed.

use std::{
    collections::{BTreeSet, HashMap},
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use mpypi_protocol::Topic;
use serde::Serialize;

use super::{
    BackupError, Contents, Progress, at,
    manifest::{Line, each, open},
};
use crate::{
    clock,
    control::{Answer, Link, LinkError, Missing, Put, Request},
    index::{blobs::sync_folder, snapshot::Kept},
};

/// What becomes of a message of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is put back, into a topic that is empty.
    Put,
    /// It is put back, and replaces what its topic holds.
    Replace,
    /// Its topic holds just that.
    Same,
    /// Its topic holds something else, which stays.
    Differs,
    /// Its channel has a release that is newer, or as new, which stays.
    Newer,
    /// It has expired since.
    Expired,
}

/// What putting a backup back means.
#[derive(Debug)]
pub struct Planned {
    /// Each message of the backup, in its order: what becomes of it, and the version its topic has now.
    pub verdicts: Vec<(Verdict, u64)>,
}

/// What putting a backup back came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Restored {
    /// Messages put back.
    pub messages: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Topics whose message was refused, and why.
    pub refused: Vec<(String, String)>,
    /// Files put back.
    pub files: Vec<String>,
    /// Files that were there already and stayed as they are.
    pub files_kept: Vec<String>,
}

/// Compares a backup with the index of `data`. Nothing is changed.
///
/// # Errors
/// The index cannot be asked.
pub fn plan(data: &Path, contents: &Contents, replace: bool) -> Result<Planned, BackupError> {
    let mut present = HashMap::new();
    match Link::open(data, Missing::Refuse) {
        Ok(mut link) => {
            link.ask(&Request::Snapshot { payloads: false }, |answer| {
                if let Answer::Kept(kept) = answer {
                    present.insert(kept.topic.clone(), kept);
                }
                Ok::<(), LinkError>(())
            })?;
        }
        Err(LinkError::Nothing(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let now_ms = clock::now().unix_ms;
    let verdicts = contents.messages.iter().map(|kept| {
        let present = present.get(&kept.topic);
        (judge(kept, present, replace, now_ms), present.map_or(0, |present| present.version))
    });
    Ok(Planned { verdicts: verdicts.collect() })
}

fn judge(kept: &Kept, present: Option<&Kept>, replace: bool, now_ms: u64) -> Verdict {
    if kept.expires_ms.is_some_and(|expires| expires <= now_ms) {
        return Verdict::Expired;
    }
    let Some(present) = present else { return Verdict::Put };
    if present.sha256 == kept.sha256 && present.qos == kept.qos && present.properties == kept.properties {
        return Verdict::Same;
    }
    if is_channel(&kept.topic) && present.sequence.is_some() && present.sequence >= kept.sequence {
        return Verdict::Newer;
    }
    if replace { Verdict::Replace } else { Verdict::Differs }
}

fn is_channel(topic: &str) -> bool {
    matches!(Topic::parse(topic), Ok(Topic::Channel(_)))
}

/// In which turn a message is put back: packages first, then roots one after the other (they are sorted as texts, so those
/// of equally many digits), then the lists that need both.
fn turn(topic: &str) -> usize {
    match Topic::parse(topic) {
        Ok(Topic::Root(version)) => version.to_string().len(),
        Ok(Topic::Channel(_)) => usize::MAX,
        _ => 0,
    }
}

/// Puts back what `planned` says, packages before the lists that name them, and the files of users and rules
/// where there are none.
///
/// # Errors
/// The index or the backup fails on the way; what was put back until then stays.
pub fn put_back(
    data: &Path,
    folder: &Path,
    contents: &Contents,
    planned: &Planned,
    mut progress: impl FnMut(Progress),
) -> Result<Restored, BackupError> {
    let mut restored = Restored::default();
    let link = Link::open(data, Missing::Create)?;
    let is_live = link.is_live();
    let mut upload = link.upload()?;
    let (mut sent, mut done) = (Vec::new(), Progress::default());
    let damaged = |problem: String| BackupError::Damaged { path: folder.to_owned(), problem };
    let turns: BTreeSet<usize> = contents.messages.iter().map(|kept| turn(&kept.topic)).collect();
    for its_turn in turns {
        let mut verdicts = planned.verdicts.iter();
        let mut failed = None;
        each(folder, |line| {
            let Line::Message(kept) = line else { return Ok(()) };
            let (verdict, expected) = verdicts.next().ok_or("it was changed just now")?;
            if !matches!(verdict, Verdict::Put | Verdict::Replace) || turn(&kept.topic) != its_turn {
                return Ok(());
            }
            let mut payload = open(folder, &kept)?;
            let put = put(&kept, *expected);
            if let Err(error) = upload.put(&put, &mut payload) {
                failed = Some(error);
                return Err(String::new());
            }
            done.messages += 1;
            done.bytes += kept.size;
            progress(done);
            sent.push((kept.topic, kept.size));
            Ok(())
        })
        .or_else(|error| match failed {
            // The broker's last words say more.
            Some(_) => Ok(()),
            None => Err(error),
        })?;
        if failed.is_some() {
            break;
        }
    }
    let refused = upload.finish()?;
    restored.messages = sent.len() as u64 - refused.len() as u64;
    restored.bytes = sent.iter().map(|(_, size)| size).sum();
    for (number, why) in refused {
        let found = usize::try_from(number).ok().and_then(|number| sent.get(number));
        let (topic, size) = found.ok_or_else(|| damaged("the broker speaks of another".to_owned()))?;
        restored.bytes -= size;
        restored.refused.push((topic.clone(), why));
    }
    for (name, text) in &contents.files {
        // Who runs a broker decides who may log in.
        match !is_live && put_file(data, name, text)? {
            true => restored.files.push(name.clone()),
            false => restored.files_kept.push(name.clone()),
        }
    }
    Ok(restored)
}

fn put(kept: &Kept, expected: u64) -> Put {
    let mut properties = kept.properties.clone();
    if let Some(expires) = kept.expires_ms {
        let left = expires.saturating_sub(clock::now().unix_ms).div_ceil(1000);
        properties.expiry = Some(u32::try_from(left).unwrap_or(u32::MAX).max(1));
    }
    Put { topic: kept.topic.clone(), qos: kept.qos, properties, size: kept.size, expected }
}

/// Writes a file that is not there; says whether it was not.
fn put_file(data: &Path, name: &str, text: &str) -> Result<bool, BackupError> {
    let path = data.join(name);
    match OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        file => {
            let written = file.and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()?;
                sync_folder(data)
            });
            written.map(|()| true).map_err(at(path))
        }
    }
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::Digest;

    use super::*;

    #[test]
    fn what_is_newer_stays_and_what_differs_is_replaced_only_when_told() {
        let kept = |topic: &str, payload: &[u8], sequence| Kept {
            topic: topic.to_owned(),
            qos: 1,
            sha256: Digest::of(payload),
            size: payload.len() as u64,
            version: 1,
            sequence,
            expires_ms: None,
            properties: Default::default(),
            payload: None,
            blob: false,
        };
        let (old, new) = (kept("t", b"old", None), kept("t", b"new", None));
        assert_eq!(judge(&old, None, false, 0), Verdict::Put);
        assert_eq!(judge(&old, Some(&old), true, 0), Verdict::Same);
        assert_eq!(judge(&old, Some(&new), false, 0), Verdict::Differs);
        assert_eq!(judge(&old, Some(&new), true, 0), Verdict::Replace);
        let list = |payload: &[u8], sequence| kept("mpypi/channels/dev", payload, sequence);
        for (backed_up, present, expected) in [
            (Some(1), Some(2), Verdict::Newer),
            (Some(2), Some(2), Verdict::Newer),
            (None, Some(2), Verdict::Newer),
            (Some(3), Some(2), Verdict::Replace),
            (Some(3), None, Verdict::Replace),
            (None, None, Verdict::Replace),
        ] {
            let verdict = judge(&list(b"a", backed_up), Some(&list(b"b", present)), true, 0);
            assert_eq!(verdict, expected, "{backed_up:?} {present:?}");
        }
        let expiring = Kept { expires_ms: Some(10), ..old };
        assert_eq!(judge(&expiring, None, true, 10), Verdict::Expired);
    }
}
