//! Unpacks a verified wheel into staging, by its RECORD.
//!
//! RECORD decides: every file it names must be in the archive with the digest it says, and nothing else is
//! installed. A member that RECORD does not name is ignored, as Mpy-BLOX and PEP 427's signature files want.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::{self, BufReader, Read, Seek},
};

use mpypi_protocol::{
    Digest, FilePath,
    digest::Hasher,
    list::Wheel,
    path::PathError,
    wheel::{ROOT, RecordLine, WheelTextError, normalized_name, parse_headers, parse_record},
};
use zip::{ZipArchive, result::ZipError};

use crate::{
    flash::{Flash, Reader},
    journal::staged,
    limits,
    refusal::Refusal,
};

/// What is wrong with a wheel.
#[derive(Debug, thiserror::Error)]
pub enum WheelError {
    /// Not a zip archive, or a truncated one.
    #[error("not a whole zip archive")]
    Archive(#[source] ZipError),
    /// Too many members.
    #[error("{found} members are more than {}", limits::WHEEL_MEMBERS)]
    Members {
        /// How many.
        found: usize,
    },
    /// Two members of one name.
    #[error("two members have the same name")]
    Twice,
    /// No dist-info folder with a RECORD, or more than one.
    #[error("{found} RECORD files instead of one")]
    Records {
        /// How many.
        found: usize,
    },
    /// RECORD or METADATA is not a text of a wheel.
    #[error("bad text")]
    Text(#[source] WheelTextError),
    /// RECORD or METADATA is too large or not UTF-8.
    #[error("`{member}` is no text of at most {} bytes", limits::WHEEL_TEXT)]
    NoText {
        /// Which one.
        member: String,
    },
    /// METADATA names another package or version than the list.
    #[error("METADATA says {key} `{found}`, the list says `{expected}`")]
    Metadata {
        /// `Name` or `Version`.
        key: &'static str,
        /// What the list says.
        expected: String,
        /// What METADATA says.
        found: String,
    },
    /// RECORD names a file without a digest.
    #[error("RECORD has no digest for `{path}`")]
    Unhashed {
        /// The file.
        path: FilePath,
    },
    /// RECORD names a file twice, or as a folder of another.
    #[error("RECORD names `{path}` twice")]
    Conflict {
        /// The file.
        path: FilePath,
    },
    /// RECORD names a file that is not there.
    #[error("`{path}` is in RECORD and not in the archive")]
    Absent {
        /// The file.
        path: FilePath,
    },
    /// A member cannot be unpacked.
    #[error("cannot unpack `{path}`")]
    Member {
        /// The file.
        path: FilePath,
        /// Why.
        source: io::Error,
    },
    /// A member has another digest than RECORD says.
    #[error("`{path}` does not have the digest that RECORD says")]
    WrongHash {
        /// The file.
        path: FilePath,
    },
    /// A member has another size than RECORD says.
    #[error("`{path}` does not have the {size} bytes that RECORD says")]
    WrongSize {
        /// The file.
        path: FilePath,
        /// What RECORD says.
        size: u64,
    },
    /// It unpacks to more than this device takes.
    #[error("it unpacks to more than {} bytes", limits::WHEEL_UNPACKED)]
    Bomb,
}

/// The files of the wheel staged under its digest, each with its digest, relative to the device's root.
/// Those for which `have` is not true have been written to staging, verified and synced.
///
/// # Errors
/// The wheel is refused, or the flash fails. Nothing half written is left under a digest.
pub fn unpack<F: Flash>(
    flash: &mut F,
    wheel: &Wheel,
    mut have: impl FnMut(&F, &FilePath, &Digest) -> io::Result<bool>,
) -> Result<BTreeMap<FilePath, Digest>, Refusal> {
    let bad = |problem| Refusal::BadWheel { name: wheel.name.clone(), problem };
    let escapes =
        |problem: PathError| Refusal::EscapesRoot { name: wheel.name.clone(), problem: problem.to_string() };
    let archive_path = staged(&wheel.digest, 0);
    // The archive is read and its members are written piece by piece, on the same flash.
    let shared = RefCell::new(flash);
    let mut archive = open(&shared, &archive_path).map_err(bad)?;
    let record = record_name(&archive).map_err(bad)?;
    check_metadata(&mut archive, &record, wheel).map_err(bad)?;
    let text = member_text(&mut archive, record.as_str()).map_err(bad)?;
    let lines = parse_record(&text).map_err(|error| match error {
        WheelTextError::Path { problem, .. } => escapes(problem),
        error => bad(WheelError::Text(error)),
    })?;

    let mut files = BTreeMap::new();
    let mut unpacked = 0;
    for RecordLine { path, digest, size } in lines {
        let digest = match digest {
            Some(digest) => digest,
            None if path == record => Digest::of(text.as_bytes()),
            None => return Err(bad(WheelError::Unhashed { path })),
        };
        let target = path.below(ROOT).map_err(escapes)?;
        if files.insert(target.clone(), digest).is_some() {
            return Err(bad(WheelError::Conflict { path }));
        }
        let Some(index) = archive.index_for_name(path.as_str()) else {
            return Err(bad(WheelError::Absent { path }));
        };
        if have(&shared.borrow(), &target, &digest)? {
            continue;
        }
        let member = Member { path: &path, index, digest, size, allowed: limits::WHEEL_UNPACKED - unpacked };
        unpacked += write_member(&shared, &mut archive, &member)?.map_err(bad)?;
    }
    Ok(files)
}

struct Member<'a> {
    path: &'a FilePath,
    index: usize,
    digest: Digest,
    size: Option<u64>,
    /// What may still be unpacked, in bytes.
    allowed: u64,
}

type Archive<'a, F> = ZipArchive<BufReader<Reader<'a, &'a mut F>>>;

fn open<'a, F: Flash>(flash: &'a RefCell<&'a mut F>, path: &'a str) -> Result<Archive<'a, F>, WheelError> {
    let reader = Reader::open(flash, path).map_err(|error| WheelError::Archive(error.into()))?;
    let archive =
        ZipArchive::new(BufReader::with_capacity(limits::PIECE, reader)).map_err(WheelError::Archive)?;
    if archive.len() > limits::WHEEL_MEMBERS {
        return Err(WheelError::Members { found: archive.len() });
    }
    if archive.has_duplicate_names() {
        return Err(WheelError::Twice);
    }
    Ok(archive)
}

/// The one `<name>.dist-info/RECORD`.
fn record_name<R: Read + Seek>(archive: &ZipArchive<R>) -> Result<FilePath, WheelError> {
    let is_record = |name: &str| {
        name.strip_suffix(".dist-info/RECORD").is_some_and(|stem| !stem.is_empty() && !stem.contains('/'))
    };
    let mut names = Vec::new();
    for name in archive.file_names() {
        let name = name.map_err(WheelError::Archive)?;
        if is_record(&name) {
            names.push(name.into_owned());
        }
    }
    match (names.len(), names.pop().and_then(|name| FilePath::new(name).ok())) {
        (1, Some(name)) => Ok(name),
        (found, _) => Err(WheelError::Records { found }),
    }
}

/// A device that installs something else than the list says would never see that it is up to date.
fn check_metadata<R: Read + Seek>(
    archive: &mut ZipArchive<R>,
    record: &FilePath,
    wheel: &Wheel,
) -> Result<(), WheelError> {
    let member = record.as_str().replace("/RECORD", "/METADATA");
    let text = member_text(archive, &member)?;
    let headers = parse_headers(&text).map_err(WheelError::Text)?;
    let value = |key: &str| {
        let header = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(key));
        header.map(|(_, value)| value.as_str()).unwrap_or_default()
    };
    let wrong = |key, expected: &str| {
        Err(WheelError::Metadata { key, expected: expected.to_owned(), found: value(key).to_owned() })
    };
    if normalized_name(value("Name")) != normalized_name(&wheel.name) {
        return wrong("Name", &wheel.name);
    }
    if value("Version") != wheel.version {
        return wrong("Version", &wheel.version);
    }
    Ok(())
}

fn member_text<R: Read + Seek>(archive: &mut ZipArchive<R>, name: &str) -> Result<String, WheelError> {
    let member = archive.by_name(name).map_err(WheelError::Archive)?;
    let mut text = String::new();
    match member.take(limits::WHEEL_TEXT + 1).read_to_string(&mut text) {
        Ok(length) if length as u64 <= limits::WHEEL_TEXT => Ok(text),
        _ => Err(WheelError::NoText { member: name.to_owned() }),
    }
}

/// Writes one member to staging: bounded, hashed, and only then named by its digest. Returns its size.
/// The outer error is the flash's, the inner one the wheel's.
fn write_member<F: Flash, R: Read + Seek>(
    flash: &RefCell<&mut F>,
    archive: &mut ZipArchive<R>,
    member: &Member<'_>,
) -> io::Result<Result<u64, WheelError>> {
    let target = staged(&member.digest, 0);
    let part = format!("{target}.part");
    flash.borrow_mut().create(&part)?;
    let mut hasher = Hasher::default();
    let unpacked = copy_member(flash, archive, member, &part, &mut hasher)?;
    let verified = unpacked.and_then(|size| match member.size {
        Some(said) if said != size => Err(WheelError::WrongSize { path: member.path.clone(), size: said }),
        _ if hasher.finish() != member.digest => Err(WheelError::WrongHash { path: member.path.clone() }),
        _ => Ok(size),
    });
    let mut flash = flash.borrow_mut();
    if verified.is_err() {
        flash.remove(&part)?;
    } else {
        flash.sync(&part)?;
        flash.rename(&part, &target)?;
    }
    Ok(verified)
}

fn copy_member<F: Flash, R: Read + Seek>(
    flash: &RefCell<&mut F>,
    archive: &mut ZipArchive<R>,
    member: &Member<'_>,
    part: &str,
    hasher: &mut Hasher,
) -> io::Result<Result<u64, WheelError>> {
    let cannot = |source| WheelError::Member { path: member.path.clone(), source };
    let mut source = match archive.by_index(member.index) {
        Ok(source) => source,
        Err(error) => return Ok(Err(cannot(error.into()))),
    };
    let mut piece = [0; limits::PIECE];
    let mut size = 0;
    loop {
        let length = match source.read(&mut piece) {
            Ok(0) => return Ok(Ok(size)),
            Ok(length) => length,
            Err(error) => return Ok(Err(cannot(error))),
        };
        size += length as u64;
        if size > member.allowed {
            return Ok(Err(WheelError::Bomb));
        }
        if let Some(said) = member.size.filter(|said| size > *said) {
            return Ok(Err(WheelError::WrongSize { path: member.path.clone(), size: said }));
        }
        hasher.update(&piece[..length]);
        flash.borrow_mut().append(part, &piece[..length])?;
    }
}

#[cfg(test)]
mod tests;
