//! The few file-system operations a device has.
//!
//! Paths are relative to the device's root and `/`-separated; `""` is the root itself. Nothing is durable
//! before it was synced: a file's bytes by [`Flash::sync`] of the file, its name by [`Flash::sync`] of the
//! folder it stands in. A rename is atomic.

mod disk;
mod memory;
mod power;

use std::{
    cell::RefCell,
    io::{self, Read, Seek, SeekFrom},
};

use mpypi_protocol::{Digest, digest::Hasher};

pub use disk::Disk;
pub use memory::{Loss, Memory};
pub use power::{PowerCut, Tear};

use crate::limits;

/// A device's file system.
pub trait Flash {
    /// What stands at `path`, if anything.
    ///
    /// # Errors
    /// Of the file system.
    fn kind(&self, path: &str) -> io::Result<Option<Kind>>;

    /// Reads into `buffer` from `offset`; returns how many bytes, 0 at the end.
    ///
    /// # Errors
    /// Of the file system; `NotFound` if there is no such file.
    fn read(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// The names in the folder `path`, sorted.
    ///
    /// # Errors
    /// Of the file system; `NotFound` if there is no such folder.
    fn list(&self, path: &str) -> io::Result<Vec<String>>;

    /// Free space in bytes.
    ///
    /// # Errors
    /// Of the file system.
    fn free(&self) -> io::Result<u64>;

    /// Makes an empty file, in place of any that stands there.
    ///
    /// # Errors
    /// Of the file system.
    fn create(&mut self, path: &str) -> io::Result<()>;

    /// Writes `bytes` at the end of a file.
    ///
    /// # Errors
    /// Of the file system; `StorageFull` if they do not fit.
    fn append(&mut self, path: &str, bytes: &[u8]) -> io::Result<()>;

    /// Cuts off what a file has beyond `length` bytes. After a power cut it may be there again.
    ///
    /// # Errors
    /// Of the file system; `NotFound` if there is no such file.
    fn truncate(&mut self, path: &str, length: u64) -> io::Result<()>;

    /// Makes a file's bytes or a folder's names survive a power cut.
    ///
    /// # Errors
    /// Of the file system.
    fn sync(&mut self, path: &str) -> io::Result<()>;

    /// Gives a file another name, replacing any file that has it.
    ///
    /// # Errors
    /// Of the file system.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// Of the file system.
    fn remove(&mut self, path: &str) -> io::Result<()>;

    /// Makes a folder, whose parent exists.
    ///
    /// # Errors
    /// Of the file system.
    fn make_folder(&mut self, path: &str) -> io::Result<()>;

    /// Removes an empty folder.
    ///
    /// # Errors
    /// Of the file system; `DirectoryNotEmpty` if it is not empty.
    fn remove_folder(&mut self, path: &str) -> io::Result<()>;

    /// Whether its power failed: then nothing of it works any more.
    fn is_off(&self) -> bool {
        false
    }
}

/// What stands at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file of so many bytes.
    File(u64),
    /// A folder.
    Folder,
    /// A link or a device: never read, written or entered.
    Other,
}

impl<F: Flash + ?Sized> Flash for &mut F {
    fn kind(&self, path: &str) -> io::Result<Option<Kind>> {
        (**self).kind(path)
    }
    fn read(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        (**self).read(path, offset, buffer)
    }
    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        (**self).list(path)
    }
    fn free(&self) -> io::Result<u64> {
        (**self).free()
    }
    fn create(&mut self, path: &str) -> io::Result<()> {
        (**self).create(path)
    }
    fn append(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        (**self).append(path, bytes)
    }
    fn truncate(&mut self, path: &str, length: u64) -> io::Result<()> {
        (**self).truncate(path, length)
    }
    fn sync(&mut self, path: &str) -> io::Result<()> {
        (**self).sync(path)
    }
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        (**self).rename(from, to)
    }
    fn remove(&mut self, path: &str) -> io::Result<()> {
        (**self).remove(path)
    }
    fn make_folder(&mut self, path: &str) -> io::Result<()> {
        (**self).make_folder(path)
    }
    fn remove_folder(&mut self, path: &str) -> io::Result<()> {
        (**self).remove_folder(path)
    }
    fn is_off(&self) -> bool {
        (**self).is_off()
    }
}

/// The folder that `path` stands in; `""` for one in the root.
#[must_use]
pub fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// The digest of the file at `path`; `None` if there is no file.
///
/// # Errors
/// Of the file system.
pub fn digest(flash: &impl Flash, path: &str) -> io::Result<Option<Digest>> {
    if !matches!(flash.kind(path)?, Some(Kind::File(_))) {
        return Ok(None);
    }
    let mut hasher = Hasher::default();
    for_each_piece(flash, path, |piece| {
        hasher.update(piece);
        Ok(())
    })?;
    Ok(Some(hasher.finish()))
}

/// The whole file at `path`, at most `limit` bytes; `None` if there is no file.
///
/// # Errors
/// Of the file system; `FileTooLarge` beyond the limit.
pub fn read_all(flash: &impl Flash, path: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
    match flash.kind(path)? {
        Some(Kind::File(size)) if size > limit => Err(io::ErrorKind::FileTooLarge.into()),
        Some(Kind::File(_)) => {
            let mut bytes = Vec::new();
            for_each_piece(flash, path, |piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            })?;
            Ok(Some(bytes))
        }
        _ => Ok(None),
    }
}

/// Copies the file at `from` to `to`, and syncs it.
///
/// # Errors
/// Of the file system.
pub fn copy(flash: &mut impl Flash, from: &str, to: &str) -> io::Result<()> {
    flash.create(to)?;
    let mut piece = [0; limits::PIECE];
    let mut offset = 0;
    loop {
        let length = flash.read(from, offset, &mut piece)?;
        if length == 0 {
            return flash.sync(to);
        }
        flash.append(to, &piece[..length])?;
        offset += length as u64;
    }
}

/// Hands the file at `path` to `take`, piece by piece.
///
/// # Errors
/// Of the file system, and of `take`.
pub fn for_each_piece(
    flash: &impl Flash,
    path: &str,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut piece = [0; limits::PIECE];
    let mut offset = 0;
    loop {
        let length = flash.read(path, offset, &mut piece)?;
        if length == 0 {
            return Ok(());
        }
        take(&piece[..length])?;
        offset += length as u64;
    }
}

/// A file as a reader that can seek, on a flash that is written to meanwhile.
pub struct Reader<'a, F> {
    flash: &'a RefCell<F>,
    path: &'a str,
    size: u64,
    offset: u64,
}

impl<'a, F: Flash> Reader<'a, F> {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// Of the file system; `NotFound` if there is no file.
    pub fn open(flash: &'a RefCell<F>, path: &'a str) -> io::Result<Reader<'a, F>> {
        match flash.borrow().kind(path)? {
            Some(Kind::File(size)) => Ok(Reader { flash, path, size, offset: 0 }),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl<F: Flash> Read for Reader<'_, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.flash.borrow().read(self.path, self.offset, buffer)?;
        self.offset += length as u64;
        Ok(length)
    }
}

impl<F: Flash> Seek for Reader<'_, F> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(distance) => self.size.checked_add_signed(distance),
            SeekFrom::Current(distance) => self.offset.checked_add_signed(distance),
        };
        self.offset = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.offset)
    }
}
