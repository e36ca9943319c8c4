//! Making a backup.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, BufWriter, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use mpypi_protocol::{Digest, digest::Hasher};
use serde::Serialize;

use super::{
    BackupError, FILES, Progress, at,
    manifest::{BLOBS, Line, Lines, MESSAGES},
};
use crate::{
    clock,
    control::{Answer, Link, Missing, Request},
    index::{blobs::sync_folder, check::hash, snapshot::Kept},
};

/// Held while a backup is made, so that there is one at a time.
const LOCK: &str = ".lock";

/// What a backup came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Saved {
    /// Messages it holds.
    pub messages: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Blobs copied now.
    pub copied: u64,
    /// Blobs that were there from before.
    pub reused: u64,
    /// Blobs that are no longer needed and were removed.
    pub removed: u64,
    /// Topics left out because their payload is damaged in the index and nowhere else.
    pub damaged: Vec<String>,
}

/// Backs the index of `data` up into `folder`, with the files of users and rules unless told not to.
///
/// # Errors
/// It cannot be done; a backup that was there before is as it was.
pub fn save(
    data: &Path,
    folder: &Path,
    with_files: bool,
    mut progress: impl FnMut(Progress),
) -> Result<Saved, BackupError> {
    let mut link = Link::open(data, Missing::Refuse)?;
    let _lock = claim(folder)?;
    let blobs = folder.join(BLOBS);
    let path = folder.join(MESSAGES);
    let beside = folder.join(format!("{MESSAGES}.new"));
    // For the owner alone: it holds payloads, and what passwords are checked by.
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true).mode(0o600);
    let file = options.open(&beside).map_err(at(&beside))?;
    let mut lines = Lines::begin(BufWriter::new(file), clock::now().unix_ms).map_err(at(&beside))?;
    if with_files {
        for name in FILES {
            match fs::read_to_string(data.join(name)) {
                Ok(text) => {
                    lines.write(&Line::File { name: name.to_owned(), text }).map_err(at(&beside))?;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(BackupError::File { path: data.join(name), source }),
            }
        }
    }
    let (mut saved, mut done) = (Saved::default(), Progress::default());
    let (mut good, mut bad) = (HashSet::new(), HashSet::new());
    link.ask(&Request::Snapshot { payloads: true }, |answer| {
        let Answer::Kept(kept) = answer else { return Ok(()) };
        done.messages += 1;
        done.bytes += kept.size;
        progress(done);
        if kept.blob && !good.contains(&kept.sha256) {
            match bad.contains(&kept.sha256) || !keep_blob(data, &blobs, &kept, &mut saved)? {
                true => bad.insert(kept.sha256),
                false => good.insert(kept.sha256),
            };
        }
        if bad.contains(&kept.sha256) {
            saved.damaged.push(kept.topic);
            return Ok(());
        }
        saved.messages += 1;
        saved.bytes += kept.size;
        lines.write(&Line::Message(kept)).map_err(at(&beside))
    })?;
    let file = lines.end().and_then(|file| Ok(file.into_inner()?)).map_err(at(&beside))?;
    file.sync_all().map_err(at(&beside))?;
    sync_folder(&blobs).map_err(at(&blobs))?;
    fs::rename(&beside, &path).map_err(at(&path))?;
    sync_folder(folder).map_err(at(folder))?;
    saved.removed = remove_others(&blobs, &good)?;
    Ok(saved)
}

/// Makes the folder if need be, and keeps others out of it.
fn claim(folder: &Path) -> Result<File, BackupError> {
    let is_backup = folder.join(MESSAGES).exists() || folder.join(LOCK).exists();
    let is_empty = match fs::read_dir(folder) {
        Ok(mut items) => items.next().is_none(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(at(folder)(error)),
    };
    if !is_backup && !is_empty {
        return Err(BackupError::Foreign(folder.to_owned()));
    }
    let blobs = folder.join(BLOBS);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&blobs).map_err(at(&blobs))?;
    let path = folder.join(LOCK);
    let lock = File::create(&path).map_err(at(&path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(BackupError::Busy(folder.to_owned())),
        Err(TryLockError::Error(source)) => Err(BackupError::File { path, source }),
    }
}

/// Has the blob of a message in the backup, checked; says whether it could be had.
fn keep_blob(data: &Path, blobs: &Path, kept: &Kept, saved: &mut Saved) -> Result<bool, BackupError> {
    let name = kept.sha256.to_string();
    let path = blobs.join(&name);
    let is_there =
        File::open(&path).and_then(|mut file| hash(&mut file)).is_ok_and(|found| found == kept.sha256);
    if is_there {
        saved.reused += 1;
        return Ok(true);
    }
    let source = data.join("blobs").join(&name);
    let beside = blobs.join(format!("{name}.new"));
    let from = match File::open(&source) {
        Ok(from) => from,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(at(source)(error)),
    };
    if copy(from, &source, &beside)? != kept.sha256 {
        fs::remove_file(&beside).map_err(at(&beside))?;
        return Ok(false);
    }
    fs::rename(&beside, &path).map_err(at(&path))?;
    saved.copied += 1;
    Ok(true)
}

/// Copies a file, and says the digest of what was copied.
fn copy(mut from: File, source: &Path, to: &Path) -> Result<Digest, BackupError> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true).mode(0o600);
    let mut file = options.open(to).map_err(at(to))?;
    let mut hasher = Hasher::default();
    let mut piece = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut piece).map_err(at(source))?;
        if count == 0 {
            break;
        }
        hasher.update(&piece[..count]);
        file.write_all(&piece[..count]).map_err(at(to))?;
    }
    file.sync_all().map_err(at(to))?;
    Ok(hasher.finish())
}

/// Removes blobs that the backup does not need, and what was left half written.
fn remove_others(blobs: &Path, needed: &HashSet<Digest>) -> Result<u64, BackupError> {
    let mut removed = 0;
    for item in fs::read_dir(blobs).map_err(at(blobs))? {
        let path: PathBuf = item.map_err(at(blobs))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let digest = name.strip_suffix(".new").unwrap_or(name).parse::<Digest>();
        if digest.is_ok_and(|digest| name.ends_with(".new") || !needed.contains(&digest)) {
            fs::remove_file(&path).map_err(at(&path))?;
            removed += 1;
        }
    }
    Ok(removed)
}
