//! Garbage: packages, and chunks of packages, that none of the last lists of any channel names.
//!
//! The writer notes which packages each list of a channel named (`HISTORY`), and when a package was last
//! uploaded or in a list that came or went (`SEEN`). A package is garbage if none of the last lists of any
//! channel names it and it was not seen for the grace time, which is what protects packages whose list is
//! still to come.

use std::collections::HashSet;

use mpypi_protocol::{
    ChannelName, Digest, FilePath, PackageId, Topic, UpdateList,
    chunk::CHUNKS,
    package::{LegacyId, PACKAGES},
    topic::CHANNELS,
};
use redb::{ReadableTable, Table, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::{
    Index, IndexError,
    record::{META, RECORDS, Record, below},
};

/// Channel and version of a list → the topics of the packages it named, as postcard.
const HISTORY: TableDefinition<'static, (&str, u64), &[u8]> = TableDefinition::new("history");
/// Topic of a package or chunk → when it was last uploaded or named, in milliseconds since 1970.
const SEEN: TableDefinition<'static, &str, u64> = TableDefinition::new("seen");
/// A key in [`META`]: when garbage was last collected, in milliseconds since 1970.
pub(super) const COLLECTED: &str = "collected";
/// A key in [`META`]: since when [`SEEN`] is kept.
const SEEN_SINCE: &str = "seen-since";

/// Lists of a channel that are remembered: the most that can be asked to be kept.
pub const REMEMBERED: usize = 100;

/// A package, or a chunk of one, that may go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Garbage {
    /// Its topic.
    pub topic: String,
    /// Bytes of its payload.
    pub size: u64,
    /// When it was last uploaded or named, in milliseconds since 1970.
    pub seen_ms: u64,
}

/// What stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// What the last so many lists of each channel name, at most [`REMEMBERED`].
    pub lists: usize,
    /// What was seen at or after this time, in milliseconds since 1970.
    pub since_ms: u64,
}

impl Index {
    /// Packages and chunks that may go.
    ///
    /// # Errors
    /// The database fails.
    pub fn garbage(&self, rules: Rules) -> Result<Vec<Garbage>, IndexError> {
        let transaction = self.store.begin_read()?;
        let records = transaction.open_table(RECORDS)?;
        let seen = transaction.open_table(SEEN)?;
        let mut named = Named::default();
        for item in below(&records, CHANNELS)? {
            let (key, value) = item?;
            // What a channel had before can be gone back to.
            if !matches!(Topic::parse(key.value()), Ok(Topic::Channel(_) | Topic::History(..))) {
                continue;
            }
            // A list that cannot be read names who knows what: nothing may go then.
            let record = Record::read(key.value(), value.value())?;
            match UpdateList::parse(&self.bytes(&record.body)?) {
                Ok(list) => list.packages().for_each(|(id, _)| named.add(&id)),
                Err(_) => return Err(IndexError::List { topic: key.value().to_owned() }),
            }
        }
        let (mut channel, mut lists) = (String::new(), 0);
        for item in transaction.open_table(HISTORY)?.iter()?.rev() {
            let (key, value) = item?;
            if key.value().0 != channel {
                (channel, lists) = (key.value().0.to_owned(), 0);
            }
            lists += 1;
            if lists <= rules.lists {
                let topics = read(key.value().0, value.value())?;
                topics.iter().filter_map(|topic| Topic::parse(topic).ok()).for_each(|topic| {
                    if let Topic::Package(id) = topic {
                        named.add(&id);
                    }
                });
            }
        }
        let mut garbage = Vec::new();
        for item in below(&records, CHUNKS)?.chain(below(&records, PACKAGES)?) {
            let (key, value) = item?;
            let topic = key.value();
            let Some(record) = Record::read_or_skip(topic, value.value()) else { continue };
            let Some(seen_ms) = seen.get(topic)?.map(|seen| seen.value()) else { continue };
            if seen_ms < rules.since_ms && !named.has(topic) {
                garbage.push(Garbage { topic: topic.to_owned(), size: record.size(), seen_ms });
            }
        }
        Ok(garbage)
    }

    /// The packages that the last `lists` lists of a channel name, the newest list's first.
    ///
    /// # Errors
    /// The database fails.
    pub fn named_lately(&self, channel: &ChannelName, lists: usize) -> Result<Vec<PackageId>, IndexError> {
        let channel = channel.as_str();
        let transaction = self.store.begin_read()?;
        let mut named = Vec::new();
        let history = transaction.open_table(HISTORY)?;
        for item in history.range((channel, 0)..=(channel, u64::MAX))?.rev().take(lists) {
            let (_, value) = item?;
            let topics = read(channel, value.value())?;
            named.extend(topics.iter().filter_map(|topic| match Topic::parse(topic) {
                Ok(Topic::Package(id)) => Some(id),
                _ => None,
            }));
        }
        Ok(named)
    }

    /// When garbage was last collected, in milliseconds since 1970; 0 for never.
    ///
    /// # Errors
    /// The database fails.
    pub fn collected_ms(&self) -> Result<u64, IndexError> {
        let transaction = self.store.begin_read()?;
        Ok(transaction.open_table(META)?.get(COLLECTED)?.map_or(0, |ms| ms.value()))
    }
}

/// Packages that a list names.
#[derive(Debug, Default)]
struct Named {
    topics: HashSet<String>,
    digests: HashSet<Digest>,
    paths: HashSet<FilePath>,
}

impl Named {
    fn add(&mut self, id: &PackageId) {
        self.topics.insert(id.topic());
        self.digests.insert(*id.digest());
        if let PackageId::Src(path, _) = id {
            self.paths.insert(path.clone());
        }
    }

    /// Whether `topic` holds a package that is named, also under an earlier layout's id.
    fn has(&self, topic: &str) -> bool {
        match Topic::parse(topic) {
            Ok(Topic::Package(_)) => self.topics.contains(topic),
            Ok(Topic::Chunk(package, _)) => self.digests.contains(&package),
            Ok(Topic::Legacy(LegacyId::Digest(digest))) => self.digests.contains(&digest),
            Ok(Topic::Legacy(LegacyId::Src(path) | LegacyId::Path(path))) => self.paths.contains(&path),
            _ => true, // not ours to remove
        }
    }
}

/// The writer's notes, in one transaction.
pub(super) struct Notes<'t> {
    history: Table<'t, (&'static str, u64), &'static [u8]>,
    seen: Table<'t, &'static str, u64>,
}

impl<'t> Notes<'t> {
    pub(super) fn open(transaction: &'t WriteTransaction) -> Result<Notes<'t>, IndexError> {
        Ok(Notes { history: transaction.open_table(HISTORY)?, seen: transaction.open_table(SEEN)? })
    }

    /// Begins to take notes in an index that has none: every package counts as seen now.
    pub(super) fn begin(transaction: &WriteTransaction, now_ms: u64) -> Result<(), IndexError> {
        let mut notes = Notes::open(transaction)?;
        let mut meta = transaction.open_table(META)?;
        if meta.get(SEEN_SINCE)?.is_some() {
            return Ok(());
        }
        meta.insert(SEEN_SINCE, now_ms)?;
        let records = transaction.open_table(RECORDS)?;
        for item in below(&records, CHUNKS)?.chain(below(&records, PACKAGES)?) {
            let (key, _) = item?;
            notes.saw(key.value(), now_ms)?;
        }
        Ok(())
    }

    /// Notes that a package was uploaded or named.
    pub(super) fn saw(&mut self, topic: &str, now_ms: u64) -> Result<(), IndexError> {
        if topic.starts_with(PACKAGES) || topic.starts_with(CHUNKS) {
            self.seen.insert(topic, now_ms)?;
        }
        Ok(())
    }

    /// When a package was last uploaded or named.
    pub(super) fn seen(&self, topic: &str) -> Result<Option<u64>, IndexError> {
        Ok(self.seen.get(topic)?.map(|seen| seen.value()))
    }

    /// Forgets a package that has gone.
    pub(super) fn forget(&mut self, topic: &str) -> Result<(), IndexError> {
        self.seen.remove(topic)?;
        Ok(())
    }

    /// Notes what a new list names, and forgets the oldest beyond [`REMEMBERED`].
    pub(super) fn list(
        &mut self,
        channel: &str,
        version: u64,
        named: impl Iterator<Item = PackageId>,
    ) -> Result<(), IndexError> {
        let topics: Vec<_> = named.map(|id| id.topic()).collect();
        let bytes = postcard::to_stdvec(&topics).expect("topics can be written");
        self.history.insert((channel, version), bytes.as_slice())?;
        let mut versions = Vec::new();
        for item in self.history.range((channel, 0)..=(channel, u64::MAX))?.rev() {
            versions.push(item?.0.value().1);
        }
        for version in versions.into_iter().skip(REMEMBERED) {
            self.history.remove((channel, version))?;
        }
        Ok(())
    }
}

fn read(channel: &str, bytes: &[u8]) -> Result<Vec<String>, IndexError> {
    postcard::from_bytes(bytes)
        .map_err(|source| IndexError::Damaged { topic: format!("the history of {channel}"), source })
}
