//! Zip archives: written in exactly one way, read with a bound on everything.

use std::{
    collections::BTreeMap,
    io::{Cursor, Read},
};

use flate2::{Compress, Compression, Crc, FlushCompress};
use mpypi_protocol::{FilePath, limits::PACKAGE, path::PathError};

use crate::limits;

/// Why bytes are no archive that we read, or files none that we write.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Not a zip archive, or one that uses more than `stored` and `deflate`.
    #[error("not a zip archive that a device can read")]
    Zip(#[from] zip::result::ZipError),
    /// A file of the archive is damaged.
    #[error("`{path}` in the archive is damaged")]
    Damaged {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A name that leads out of the folder it is unpacked into, or that a device cannot store.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A name that is not UTF-8.
    #[error("`{name}` is no UTF-8 name")]
    NotUtf8 {
        /// The name, as far as it can be shown.
        name: String,
    },
    /// A symbolic link.
    #[error("`{path}` is a symbolic link")]
    Link {
        /// Its name.
        path: String,
    },
    /// More files than [`limits::WHEEL_FILES`].
    #[error("{count} files are more than {}", limits::WHEEL_FILES)]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// The files are larger than they may be, or the archive is.
    #[error("{what} larger than {limit} bytes")]
    TooLarge {
        /// What is.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
}

/// The files of an archive by name, whatever their order and however it says them. Folders are left out.
///
/// # Errors
/// See [`ArchiveError`]. No archive makes this use more memory than the limits allow.
pub fn read(archive: &[u8]) -> Result<BTreeMap<FilePath, Vec<u8>>, ArchiveError> {
    if archive.len() as u64 > limits::INPUT {
        return Err(ArchiveError::TooLarge { what: "the wheel is", limit: limits::INPUT });
    }
    let mut zip = zip::ZipArchive::new(Cursor::new(archive))?;
    if zip.len() > limits::WHEEL_FILES {
        return Err(ArchiveError::TooMany { count: zip.len() });
    }
    let mut files = BTreeMap::new();
    let mut room = limits::WHEEL_UNPACKED;
    for index in 0..zip.len() {
        let member = zip.by_index(index)?;
        let name = std::str::from_utf8(member.name_raw()).map_err(|_| ArchiveError::NotUtf8 {
            name: String::from_utf8_lossy(member.name_raw()).into_owned(),
        })?;
        let name = name.to_owned();
        if name.ends_with('/') {
            FilePath::new(name.trim_end_matches('/'))?;
            continue;
        }
        if member.is_symlink() {
            return Err(ArchiveError::Link { path: name });
        }
        let path = FilePath::new(name.as_str())?;
        // What the headers say about sizes is not believed: a bomb ends where the room does.
        let mut content = Vec::new();
        member
            .take(room + 1)
            .read_to_end(&mut content)
            .map_err(|source| ArchiveError::Damaged { path: name, source })?;
        room = room.checked_sub(content.len() as u64).ok_or(ArchiveError::TooLarge {
            what: "the files of the wheel are",
            limit: limits::WHEEL_UNPACKED,
        })?;
        files.insert(path, content);
    }
    Ok(files)
}

const LOCAL: u32 = 0x0403_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
/// Version 2.0 of the format is all that deflate needs; "made by" says Unix, for the permissions.
const VERSION: u16 = 20;
const MADE_BY: u16 = 3 << 8 | VERSION;
/// Bit 11: the name is UTF-8. Set only where it makes a difference.
const UTF8: u16 = 1 << 11;
const STORED: u16 = 0;
const DEFLATED: u16 = 8;
/// 1980-01-01 00:00, the first moment a zip archive can name.
const TIME: u16 = 0;
const DATE: u16 = 1 << 5 | 1;
/// A regular file, `rw-r--r--`.
const MODE: u32 = 0o100_644 << 16;

/// Writes `files` in the order given: no extra field, comment, data descriptor, folder or zip64 record.
///
/// # Errors
/// The files or the archive are too large to be a package.
pub fn write(files: &[(FilePath, Vec<u8>)]) -> Result<Vec<u8>, ArchiveError> {
    let unpacked: u64 = files.iter().map(|(_, content)| content.len() as u64).sum();
    if unpacked > limits::WHEEL_UNPACKED {
        let what = "the files of the wheel are";
        return Err(ArchiveError::TooLarge { what, limit: limits::WHEEL_UNPACKED });
    }
    let (mut archive, mut central) = (Vec::new(), Vec::new());
    for (path, content) in files {
        let name = path.as_str().as_bytes();
        let deflated = deflate(content);
        let (method, data) = match deflated.len() < content.len() {
            true => (DEFLATED, deflated.as_slice()),
            false => (STORED, content.as_slice()),
        };
        let mut crc = Crc::new();
        crc.update(content);
        let mut shared = Vec::new();
        shared.extend(VERSION.to_le_bytes());
        shared.extend(if path.as_str().is_ascii() { 0 } else { UTF8 }.to_le_bytes());
        shared.extend(method.to_le_bytes());
        shared.extend(TIME.to_le_bytes());
        shared.extend(DATE.to_le_bytes());
        shared.extend(crc.sum().to_le_bytes());
        shared.extend((data.len() as u32).to_le_bytes());
        shared.extend((content.len() as u32).to_le_bytes());
        shared.extend((name.len() as u16).to_le_bytes());
        shared.extend(0u16.to_le_bytes()); // extra field

        let offset = archive.len() as u32;
        archive.extend(LOCAL.to_le_bytes());
        archive.extend(&shared);
        archive.extend(name);
        archive.extend(data);

        central.extend(CENTRAL.to_le_bytes());
        central.extend(MADE_BY.to_le_bytes());
        central.extend(&shared);
        central.extend(0u16.to_le_bytes()); // comment
        central.extend(0u16.to_le_bytes()); // disk
        central.extend(0u16.to_le_bytes()); // internal attributes
        central.extend(MODE.to_le_bytes());
        central.extend(offset.to_le_bytes());
        central.extend(name);
    }
    let (offset, count) = (archive.len() as u32, files.len() as u16);
    archive.extend(&central);
    archive.extend(END.to_le_bytes());
    archive.extend(0u16.to_le_bytes()); // this disk
    archive.extend(0u16.to_le_bytes()); // disk of the directory
    archive.extend(count.to_le_bytes());
    archive.extend(count.to_le_bytes());
    archive.extend((central.len() as u32).to_le_bytes());
    archive.extend(offset.to_le_bytes());
    archive.extend(0u16.to_le_bytes()); // comment
    match archive.len() as u64 > PACKAGE {
        true => Err(ArchiveError::TooLarge { what: "the wheel is", limit: PACKAGE }),
        false => Ok(archive),
    }
}

/// Deflates such that no match reaches back further than [`limits::WINDOW`]: a device needs no larger window to
/// unpack it. The compressor, whose own window is always 32 KiB, starts anew after each of ours (`Z_FULL_FLUSH`).
/// Nothing says so in the archive: a device tries a small window first.
fn deflate(content: &[u8]) -> Vec<u8> {
    let mut compress = Compress::new(Compression::new(9), false);
    let mut deflated = Vec::new();
    let mut windows = content.chunks(limits::WINDOW).peekable();
    while let Some(window) = windows.next() {
        let flush = if windows.peek().is_some() { FlushCompress::Full } else { FlushCompress::Finish };
        // Room for what does not compress, and for the flush.
        deflated.reserve(2 * limits::WINDOW);
        let before = compress.total_in();
        compress.compress_vec(window, &mut deflated, flush).expect("compressing never fails");
        assert_eq!(compress.total_in() - before, window.len() as u64, "there is room for a window");
    }
    deflated
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn files(files: &[(&str, &[u8])]) -> Vec<(FilePath, Vec<u8>)> {
        files.iter().map(|(name, content)| (FilePath::new(*name).unwrap(), content.to_vec())).collect()
    }

    fn u16_at(bytes: &[u8], at: usize) -> u16 {
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn every_byte_of_an_archive_is_accounted_for() {
        let text = b"print('blink')\n".repeat(20);
        let files = files(&[("a.py", b"x"), ("b/c.py", &text), ("é.py", b"")]);
        let archive = write(&files).unwrap();
        let mut at = 0;
        for (path, content) in &files {
            assert_eq!(u32_at(&archive, at), LOCAL);
            assert_eq!(u16_at(&archive, at + 4), 20, "version needed");
            let flags = u16_at(&archive, at + 6);
            assert_eq!(flags, if path.as_str().is_ascii() { 0 } else { UTF8 }, "no data descriptor");
            assert_eq!(u16_at(&archive, at + 8), if content.len() > 100 { DEFLATED } else { STORED });
            assert_eq!(u32_at(&archive, at + 10), 0x0021_0000, "1980-01-01 00:00");
            assert_eq!(u32_at(&archive, at + 22) as usize, content.len());
            assert_eq!(u16_at(&archive, at + 26) as usize, path.as_str().len());
            assert_eq!(u16_at(&archive, at + 28), 0, "extra field");
            at += 30 + path.as_str().len() + u32_at(&archive, at + 18) as usize;
        }
        let directory = at;
        for (path, _) in &files {
            assert_eq!(u32_at(&archive, at), CENTRAL);
            assert_eq!(u16_at(&archive, at + 30), 0, "extra field");
            assert_eq!(u16_at(&archive, at + 32), 0, "comment");
            assert_eq!(u32_at(&archive, at + 38), 0o100_644 << 16);
            at += 46 + path.as_str().len();
        }
        assert_eq!(u32_at(&archive, at), END);
        assert_eq!(u16_at(&archive, at + 10), 3);
        assert_eq!(u32_at(&archive, at + 12) as usize, at - directory);
        assert_eq!(u32_at(&archive, at + 16) as usize, directory);
        assert_eq!(u16_at(&archive, at + 20), 0, "comment");
        assert_eq!(archive.len(), at + 22, "nothing follows");
    }

    #[test]
    fn what_is_written_can_be_read() {
        let files = files(&[("a.py", b"x"), ("b/c.py", &[7; 100_000]), ("é.py", b"")]);
        let archive = write(&files).unwrap();
        assert_eq!(read(&archive).unwrap(), files.into_iter().collect());
    }

    #[test]
    fn a_window_of_four_kib_is_enough_to_unpack_what_is_written() {
        // The same page again and again: a compressor that may look back further would find it there.
        let digest = |n: u32| *mpypi_protocol::Digest::of(&n.to_le_bytes()).as_bytes();
        let page: Vec<u8> = (0..limits::WINDOW as u32 / 32 + 1).flat_map(digest).collect();
        let content = page.repeat(3);
        assert!(deflate(&content).len() >= content.len());
        // And what is within the window is found.
        assert!(deflate(&page[..1000].repeat(12)).len() < 5000);
    }

    #[test]
    fn a_bomb_is_refused_without_being_unpacked() {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file("bomb.py", options).unwrap();
        for _ in 0..40 {
            zip.write_all(&[0; 1024 * 1024]).unwrap();
        }
        let archive = zip.finish().unwrap().into_inner();
        assert!(archive.len() < 100_000);
        assert!(matches!(read(&archive), Err(ArchiveError::TooLarge { .. })));
    }

    #[test]
    fn no_cut_of_an_archive_is_read_as_one() {
        let archive = write(&files(&[("a.py", b"some text"), ("b.py", b"x")])).unwrap();
        for end in 0..archive.len() {
            assert!(read(&archive[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_path_that_leads_out_is_refused() {
        for name in ["../boot.py", "/boot.py", "a/../../b", "a\\b", "../evil/"] {
            let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
            let options = zip::write::SimpleFileOptions::default();
            match name.ends_with('/') {
                true => zip.add_directory(name, options).unwrap(),
                false => zip.start_file(name, options).unwrap(),
            }
            let archive = zip.finish().unwrap().into_inner();
            assert!(read(&archive).is_err(), "{name}");
        }
    }
}
