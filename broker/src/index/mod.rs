//! The index: the durable store of retained messages.
//!
//! Records (topic → message) live in redb; payloads above [`INLINE`] bytes are [`blobs`], files named by
//! digest. One thread, the [`writer`], owns every change and commits many at once. Readers see only what is
//! committed, and read it wherever they are.

pub mod blobs;
pub mod check;
pub mod collect;
mod record;
pub mod sessions;
pub mod snapshot;
mod store;
pub mod writer;

use std::{ops::Bound, path::Path, sync::Arc};

use bytes::Bytes;
use mpypi_protocol::{
    Digest, PackageId, Topic,
    package::{LegacyId, PACKAGES},
    topic,
};
use redb::{ReadableTable, ReadableTableMetadata};

use self::{
    blobs::Blobs,
    collect::Notes,
    record::{BYTES, Body, EXPIRIES, FORMAT, GONE, LEGACY, META, PRESENT_FORMAT, RECORDS, REFS, Record},
    store::Store,
};
use crate::{
    clock,
    message::{Message, Payload},
    sys::{self, Sys},
};

/// Payloads up to this many bytes are kept inside their record.
pub const INLINE: usize = 16 * 1024;

/// The index cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The data folder cannot be used.
    #[error("cannot use `{path}` for the index")]
    Folder {
        /// The folder or file.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Another broker has the index open.
    #[error("the index in `{path}` is in use by another broker")]
    InUse {
        /// The data folder.
        path: String,
    },
    /// The database fails.
    #[error("the index's database fails")]
    Database(#[from] redb::Error),
    /// The database could not be opened again after a failure.
    #[error("the index is closed after a failure")]
    Closed,
    /// Another version of the broker wrote the index.
    #[error("the index in `{path}` has format {found}, this broker reads format {PRESENT_FORMAT}")]
    Format {
        /// The data folder.
        path: String,
        /// The format found.
        found: u64,
    },
    /// The list of a channel cannot be read.
    #[error("the list in `{topic}` is damaged")]
    List {
        /// The channel's topic.
        topic: String,
    },
    /// A record cannot be read: the disk or the file is damaged.
    #[error("the record of `{topic}` is damaged")]
    Damaged {
        /// Its topic.
        topic: String,
        /// How.
        source: postcard::Error,
    },
}

impl IndexError {
    /// Whether the disk, a quota or a limit of the process takes no more bytes.
    #[must_use]
    pub fn is_full(&self) -> bool {
        use std::io::ErrorKind;
        let source = match self {
            IndexError::Database(redb::Error::Io(source)) | IndexError::Folder { source, .. } => source,
            _ => return false,
        };
        matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
    }

    /// Whether the database failed before and works no more until it is opened again.
    fn is_stale(&self) -> bool {
        use redb::Error::{DatabaseClosed, PreviousIo};
        matches!(self, IndexError::Closed | IndexError::Database(PreviousIo | DatabaseClosed))
    }
}

macro_rules! database_errors {
    ($($error:ident),*) => {$(
        impl From<redb::$error> for IndexError {
            fn from(error: redb::$error) -> IndexError {
                IndexError::Database(error.into())
            }
        }
    )*};
}

database_errors!(CommitError, SetDurabilityError, StorageError, TableError, TransactionError);

/// Reads the index. Clones share it.
#[derive(Debug, Clone)]
pub struct Index {
    store: Arc<Store>,
    blobs: Arc<Blobs>,
    sys: Arc<Sys>,
    folder: Arc<Path>,
}

/// What the index holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Retained messages.
    pub messages: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Payloads that are files.
    pub blobs: u64,
}

/// What [`Index::next`] found.
#[derive(Debug)]
pub enum Step {
    /// The next match.
    Found(Message),
    /// None among the records looked at; go on after this topic.
    Later(String),
    /// No more matches.
    End,
}

impl Index {
    /// Opens the index in `folder`, making it if need be, and removes what a crash left behind.
    ///
    /// # Errors
    /// The folder cannot be used, is in use, or holds a damaged index.
    pub fn open(folder: &Path) -> Result<Index, IndexError> {
        let at = |path: &Path| {
            let path = path.display().to_string();
            move |source| IndexError::Folder { path, source }
        };
        blobs::create_folder(folder).map_err(at(folder))?;
        let store = Store::open(folder)?;
        let blobs = Blobs::open(folder).map_err(at(folder))?;
        let transaction = store.begin_write()?;
        Notes::begin(&transaction, clock::now().unix_ms)?;
        {
            let records = transaction.open_table(RECORDS)?;
            transaction.open_table(LEGACY)?;
            transaction.open_table(EXPIRIES)?;
            transaction.open_table(GONE)?;
            let mut meta = transaction.open_table(META)?;
            let found = meta.get(FORMAT)?.map(|format| format.value());
            match found {
                Some(PRESENT_FORMAT) => {}
                Some(found) => {
                    return Err(IndexError::Format { path: folder.display().to_string(), found });
                }
                None => {
                    meta.insert(FORMAT, PRESENT_FORMAT)?;
                }
            }
            if meta.get(BYTES)?.is_none() {
                let mut bytes = 0;
                for item in records.iter()? {
                    let (key, value) = item?;
                    bytes +=
                        Record::read_or_skip(key.value(), value.value()).map_or(0, |record| record.size());
                }
                meta.insert(BYTES, bytes)?;
            }
            let refs = transaction.open_table(REFS)?;
            let swept = blobs.sweep(|digest| Ok(refs.get(digest.as_bytes())?.is_some()))?;
            if swept > 0 {
                tracing::info!(blobs = swept, "removed blobs that no message names");
            }
        }
        transaction.commit()?;
        // A new file's name must survive a power cut as surely as what is written into it.
        blobs::sync_folder(folder).map_err(at(folder))?;
        Ok(Index {
            store: Arc::new(store),
            blobs: Arc::new(blobs),
            sys: Arc::default(),
            folder: Arc::from(folder),
        })
    }

    /// The folder of the index.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes of the database; what is kept as files is beside it.
    #[must_use]
    pub fn file_size(&self) -> u64 {
        std::fs::metadata(self.folder.join(store::FILE)).map_or(0, |file| file.len())
    }

    /// What the broker says of itself.
    #[must_use]
    pub fn sys(&self) -> &Sys {
        &self.sys
    }

    /// What the index holds.
    ///
    /// # Errors
    /// The database fails.
    pub fn totals(&self) -> Result<Totals, IndexError> {
        self.store.read(|transaction| {
            Ok(Totals {
                messages: transaction.open_table(RECORDS)?.len()?,
                bytes: transaction.open_table(META)?.get(BYTES)?.map_or(0, |bytes| bytes.value()),
                blobs: transaction.open_table(REFS)?.len()?,
            })
        })
    }

    /// The retained message of `topic`, unless it has expired.
    ///
    /// # Errors
    /// The database fails.
    pub fn get(&self, topic: &str, now_ms: u64) -> Result<Option<Message>, IndexError> {
        if topic.starts_with(sys::PREFIX) {
            return Ok(self.sys.get(topic));
        }
        self.store.read(|transaction| {
            let records = transaction.open_table(RECORDS)?;
            let Some(value) = records.get(topic)? else { return Ok(None) };
            let record = Record::read(topic, value.value())?;
            Ok((!record.is_expired(now_ms)).then(|| record.into_message(topic)))
        })
    }

    /// Whether `message` is still what its topic holds: for a message that cleared it, nothing.
    ///
    /// # Errors
    /// The database fails.
    pub fn is_current(&self, message: &Message) -> Result<bool, IndexError> {
        self.store.read(|transaction| {
            let records = transaction.open_table(RECORDS)?;
            let value = records.get(&*message.topic)?;
            let record = value.map(|value| Record::read(&message.topic, value.value())).transpose()?;
            Ok(record.map(|record| record.version) == message.record())
        })
    }

    /// The first retained message after topic `after` that matches `filter` and changed after `since`.
    ///
    /// Looks at a bounded number of records, each as it is now: who asks again and again sees every message
    /// that was there all along, and never an older one after a newer one.
    ///
    /// # Errors
    /// The database fails.
    pub fn next(
        &self,
        filter: &str,
        after: Option<&str>,
        since: u64,
        now_ms: u64,
    ) -> Result<Step, IndexError> {
        if filter.starts_with(sys::PREFIX) {
            return Ok(self.sys.next(filter, after));
        }
        let (mut found, later) = self.some(filter, after, since, now_ms, 1)?;
        Ok(match (found.pop(), later) {
            (Some(message), _) => Step::Found(message),
            (None, Some(topic)) => Step::Later(topic),
            (None, None) => Step::End,
        })
    }

    /// As [`Index::next`], at most so many at once, and the topic to go on after, if that may bring more. Of what the broker
    /// says of itself there is nothing here.
    ///
    /// # Errors
    /// The database fails.
    fn some(
        &self,
        filter: &str,
        after: Option<&str>,
        since: u64,
        now_ms: u64,
        most: usize,
    ) -> Result<(Vec<Message>, Option<String>), IndexError> {
        let prefix = &filter[..filter.find(['+', '#']).unwrap_or(filter.len())];
        // `a/#` matches `a` itself, which is shorter than the prefix `a/`.
        let parent = filter.strip_suffix("/#").filter(|parent| !parent.contains(['+', '#']));
        let start = match after {
            Some(after) => Bound::Excluded(after),
            None => Bound::Included(parent.unwrap_or(prefix)),
        };
        self.store.read(|transaction| {
            let records = transaction.open_table(RECORDS)?;
            let range = records.range::<&str>((start, Bound::Unbounded))?;
            let mut found = Vec::new();
            for (looked_at, item) in range.enumerate() {
                let (key, value) = item?;
                let name = key.value();
                if !name.starts_with(prefix) && Some(name) != parent {
                    // Between `a` and `a/` lie names such as `a b`; after the prefix lies nothing of ours.
                    if name > prefix {
                        return Ok((found, None));
                    }
                } else if topic::matches(filter, name) {
                    let Some(record) = Record::read_or_skip(name, value.value()) else { continue };
                    if record.version > since && !record.is_expired(now_ms) {
                        found.push(record.into_message(name));
                    }
                }
                if looked_at >= SCAN || found.len() >= most {
                    return Ok((found, Some(name.to_owned())));
                }
            }
            Ok((found, None))
        })
    }

    /// Hands every retained message that matches `filter` and changed after `since` to `take`, in the order of their
    /// topics. So many are read at once: each as it is when that is done. Of what the broker says of itself there is
    /// nothing here.
    ///
    /// # Errors
    /// The database fails, or `take` does: then the rest is left.
    pub fn each<E: From<IndexError>>(
        &self,
        filter: &str,
        since: u64,
        now_ms: u64,
        at_once: usize,
        mut take: impl FnMut(Message) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut after: Option<String> = None;
        loop {
            let (found, later) = self.some(filter, after.as_deref(), since, now_ms, at_once)?;
            found.into_iter().try_for_each(&mut take)?;
            match later {
                Some(topic) => after = Some(topic),
                None => return Ok(()),
            }
        }
    }

    /// Topics of nodes that were cleared after the version `since`, in that order and at most so many, with the version of each
    /// clear: those that an upstream may not have been told of.
    ///
    /// # Errors
    /// The database fails.
    pub fn gone(&self, since: u64, most: usize) -> Result<Vec<(u64, String)>, IndexError> {
        self.store.read(|transaction| {
            let gone = transaction.open_table(GONE)?;
            let range = gone.range((Bound::Excluded(since), Bound::Unbounded))?;
            let found = range.take(most).map(|item| {
                let (version, topic) = item?;
                Ok((version.value(), topic.value().to_owned()))
            });
            found.collect()
        })
    }

    /// What an exact subscription to `topic` is answered where nothing is retained there: a channel nobody
    /// published has an empty list, and earlier layouts' package ids lead to the present ones.
    ///
    /// # Errors
    /// The database fails.
    pub fn stand_in(&self, topic: &str, now_ms: u64) -> Result<Option<Message>, IndexError> {
        let found = match Topic::parse(topic) {
            Ok(Topic::Channel(_)) => {
                let empty = Message {
                    topic: Arc::from(topic),
                    payload: Payload::Inline(Bytes::from_static(b"[]")),
                    qos: crate::packet::Qos::AtLeastOnce,
                    retain: true,
                    properties: Default::default(),
                    expires_ms: None,
                    origin: None,
                    version: 0,
                };
                return Ok(Some(empty));
            }
            Ok(Topic::Legacy(LegacyId::Digest(digest))) => {
                let wheel = self.get(&PackageId::Wheel(digest).topic(), now_ms)?;
                match wheel {
                    Some(wheel) => Some(wheel),
                    None => self.get(&PackageId::Firmware(digest).topic(), now_ms)?,
                }
            }
            Ok(Topic::Legacy(LegacyId::Path(path) | LegacyId::Src(path))) => {
                let digest = self.store.read(|transaction| {
                    let legacy = transaction.open_table(LEGACY)?;
                    Ok(legacy.get(path.as_str())?.map(|digest| digest.value()))
                })?;
                match digest {
                    Some(digest) => {
                        self.get(&format!("{PACKAGES}src/{path}/{}", Digest::from(digest)), now_ms)?
                    }
                    None => None,
                }
            }
            _ => None,
        };
        Ok(found.map(|message| Message { topic: Arc::from(topic), ..message }))
    }

    /// All bytes of a message's payload.
    ///
    /// # Errors
    /// The blob cannot be read.
    pub fn payload(&self, payload: &Payload) -> Result<Bytes, IndexError> {
        match payload {
            Payload::Inline(bytes) => Ok(bytes.clone()),
            Payload::Blob(digest, len) => {
                self.bytes(&Body::Blob { digest: *digest.as_bytes(), len: *len }).map(Bytes::from)
            }
        }
    }

    /// All bytes of a payload.
    fn bytes(&self, body: &Body) -> Result<Vec<u8>, IndexError> {
        let (digest, len) = match body {
            Body::Inline(bytes) => return Ok(bytes.clone()),
            Body::Blob { digest, len } => (Digest::from(*digest), *len),
        };
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < len {
            let chunk = self.chunk(&digest, len, bytes.len() as u64);
            let chunk = chunk.map_err(|source| IndexError::Folder { path: digest.to_string(), source })?;
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Opens a blob of `len` bytes, to be read in pieces.
    ///
    /// # Errors
    /// Its file is not there.
    pub fn open_blob(&self, digest: &Digest, len: u64) -> std::io::Result<blobs::Blob> {
        self.blobs.open_blob(digest, len)
    }

    /// A piece of a blob, at most [`blobs::CHUNK`] bytes from `offset`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn chunk(&self, digest: &Digest, len: u64, offset: u64) -> std::io::Result<Bytes> {
        self.blobs.chunk(digest, len, offset)
    }
}

/// Records looked at in one step of a wildcard subscription.
const SCAN: usize = 1024;
