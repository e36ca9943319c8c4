//! Payloads as files named by their digest, written beside and renamed, read in shared pieces.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use mpypi_protocol::Digest;

use super::{IndexError, record::Body, snapshot::Pin};

/// Bytes read, and handed to a socket, at once: most packages are one piece, for which a reader is woken once.
pub const CHUNK: u64 = 256 * 1024;

/// Bytes of recently read pieces that are kept for the next reader.
const CACHE: usize = 16 * 1024 * 1024;

/// The folder of blobs.
#[derive(Debug)]
pub struct Blobs {
    folder: PathBuf,
    scratch: PathBuf,
    /// Held for a look-up or an insertion, never while reading a file.
    recent: Mutex<Recent>,
    pins: Arc<AtomicUsize>,
}

/// A blob that is being read: it stays readable also when it is removed meanwhile.
#[derive(Debug)]
pub struct Blob {
    file: File,
    digest: Digest,
    len: u64,
    blobs: Arc<Blobs>,
}

/// Recently read pieces; the one unused for longest goes first.
#[derive(Debug, Default)]
struct Recent {
    pieces: HashMap<(Digest, u64), (Bytes, u64)>,
    bytes: usize,
    uses: u64,
}

impl Blobs {
    /// Opens the store below `data` and forgets half-written files.
    ///
    /// # Errors
    /// The folders cannot be made or read.
    pub fn open(data: &Path) -> io::Result<Blobs> {
        let (folder, scratch) = (data.join("blobs"), data.join("tmp"));
        create_folder(&folder)?;
        match fs::remove_dir_all(&scratch) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir_all(&scratch)?,
        }
        Ok(Blobs { folder, scratch, recent: Mutex::default(), pins: Arc::default() })
    }

    /// Writes and syncs a blob. Its name survives a power cut only after [`Blobs::sync`].
    ///
    /// # Errors
    /// The disk is full or fails; nothing remains then.
    pub fn write(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(digest);
        if fs::metadata(&path).is_ok_and(|found| found.len() == bytes.len() as u64) {
            return Ok(());
        }
        let beside = self.scratch.join(digest.to_string());
        let written = File::create(&beside).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&beside, &path)).inspect_err(|_| {
            fs::remove_file(&beside).ok();
        })
    }

    /// Whether the bytes of `body` are there.
    pub(super) fn has(&self, body: &Body) -> bool {
        match body {
            Body::Inline(_) => true,
            Body::Blob { digest, len } => {
                fs::metadata(self.path(&Digest::from(*digest))).is_ok_and(|found| found.len() == *len)
            }
        }
    }

    /// Makes the names of all written blobs durable.
    ///
    /// # Errors
    /// The disk fails.
    pub fn sync(&self) -> io::Result<()> {
        sync_folder(&self.folder)
    }

    pub(super) fn pin(&self) -> Pin {
        Pin::new(&self.pins)
    }

    /// Whether somebody reads blobs that may have lost their last record: none may be removed now.
    pub(super) fn is_pinned(&self) -> bool {
        self.pins.load(Ordering::SeqCst) > 0
    }

    /// Bytes of a blob's file.
    pub(super) fn size(&self, digest: &Digest) -> io::Result<u64> {
        Ok(fs::metadata(self.path(digest))?.len())
    }

    pub(super) fn open_file(&self, digest: &Digest) -> io::Result<File> {
        File::open(self.path(digest))
    }

    /// Forgets a blob.
    pub fn remove(&self, digest: &Digest) {
        if let Err(error) = fs::remove_file(self.path(digest)) {
            tracing::warn!(%digest, %error, "cannot remove a blob");
        }
    }

    /// At most [`CHUNK`] bytes from `offset` of the blob, which has `len` bytes.
    ///
    /// # Errors
    /// The file is not there, too short, or cannot be read.
    pub fn chunk(&self, digest: &Digest, len: u64, offset: u64) -> io::Result<Bytes> {
        self.read(digest, len, offset, |piece| File::open(self.path(digest))?.read_exact_at(piece, offset))
    }

    /// Opens a blob of `len` bytes.
    ///
    /// # Errors
    /// The file is not there.
    pub fn open_blob(self: &Arc<Blobs>, digest: &Digest, len: u64) -> io::Result<Blob> {
        Ok(Blob { file: self.open_file(digest)?, digest: *digest, len, blobs: self.clone() })
    }

    /// A piece from memory, or as `read` fills it.
    fn read(
        &self,
        digest: &Digest,
        len: u64,
        offset: u64,
        read: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<Bytes> {
        let key = (*digest, offset);
        if let Some(piece) = self.lock().find(&key) {
            return Ok(piece);
        }
        let size = len.saturating_sub(offset).min(CHUNK);
        let mut piece = vec![0; usize::try_from(size).unwrap_or_default()];
        read(&mut piece)?;
        let piece = Bytes::from(piece);
        self.lock().keep(key, piece.clone());
        Ok(piece)
    }

    /// Removes every blob that `is_named` does not know, and says how many.
    pub(super) fn sweep(
        &self,
        mut is_named: impl FnMut(&Digest) -> Result<bool, IndexError>,
    ) -> Result<usize, IndexError> {
        let folder = |source| IndexError::Folder { path: self.folder.display().to_string(), source };
        let mut swept = 0;
        for item in fs::read_dir(&self.folder).map_err(folder)? {
            let name = item.map_err(folder)?.file_name();
            let Some(digest) = name.to_str().and_then(|name| name.parse::<Digest>().ok()) else { continue };
            if !is_named(&digest)? {
                self.remove(&digest);
                swept += 1;
            }
        }
        Ok(swept)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.to_string())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Blob {
    /// Some bytes from `offset`; pieces begin at multiples of [`CHUNK`], so that readers share them.
    ///
    /// # Errors
    /// The file is too short, or cannot be read.
    pub fn piece(&self, offset: u64) -> io::Result<Bytes> {
        let start = offset - offset % CHUNK;
        let piece =
            self.blobs.read(&self.digest, self.len, start, |piece| self.file.read_exact_at(piece, start))?;
        let skipped = usize::try_from(offset - start).unwrap_or(usize::MAX).min(piece.len());
        Ok(piece.slice(skipped..))
    }
}

impl Recent {
    fn find(&mut self, key: &(Digest, u64)) -> Option<Bytes> {
        self.uses += 1;
        let (piece, used) = self.pieces.get_mut(key)?;
        *used = self.uses;
        Some(piece.clone())
    }

    fn keep(&mut self, key: (Digest, u64), piece: Bytes) {
        self.bytes += piece.len();
        if let Some((old, _)) = self.pieces.insert(key, (piece, self.uses)) {
            self.bytes -= old.len();
        }
        while self.bytes > CACHE {
            let oldest = self.pieces.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key);
            let Some((piece, _)) = oldest.and_then(|key| self.pieces.remove(&key)) else { break };
            self.bytes -= piece.len();
        }
    }
}

/// Makes `folder` and those above it, with names that survive a power cut.
pub(super) fn create_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = match folder.parent() {
        Some(above) if above != Path::new("") => above,
        _ => Path::new("."),
    };
    create_folder(above)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    sync_folder(above)
}

/// Makes the names in `folder` durable.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_read_back_in_pieces_and_half_written_ones_are_forgotten() {
        let data = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(data.path()).unwrap();
        let bytes: Vec<u8> = (0..CHUNK as usize + 10).map(|n| n as u8).collect();
        let digest = Digest::of(&bytes);
        blobs.write(&digest, &bytes).unwrap();
        for _ in 0..2 {
            let first = blobs.chunk(&digest, bytes.len() as u64, 0).unwrap();
            let second = blobs.chunk(&digest, bytes.len() as u64, CHUNK).unwrap();
            assert_eq!([first, second].concat(), bytes);
        }
        fs::write(data.path().join("tmp/half"), b"x").unwrap();
        Blobs::open(data.path()).unwrap();
        assert!(!data.path().join("tmp/half").exists());
    }

    #[test]
    fn recent_pieces_stay_within_their_bytes() {
        let mut recent = Recent::default();
        for n in 0..1000 {
            recent.keep((Digest::EMPTY, n), Bytes::from(vec![0; CHUNK as usize]));
        }
        assert!(recent.bytes <= CACHE);
        assert_eq!(recent.pieces.len(), CACHE / CHUNK as usize);
    }
}
