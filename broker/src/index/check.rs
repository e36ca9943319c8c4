//! Whether the index is in order. Nothing is changed.

use std::{collections::HashMap, io};

use mpypi_protocol::{Digest, Topic, UpdateList, digest::Hasher};
use redb::{ReadableTable, ReadableTableMetadata};
use serde::{Deserialize, Serialize};

use super::{
    Index, IndexError,
    blobs::CHUNK,
    record::{BYTES, Body, EXPIRIES, META, RECORDS, REFS, Record},
    sessions,
};

/// Something in the index that is not in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The topic or blob that is meant.
    pub at: String,
    /// What is wrong.
    pub problem: String,
}

/// How far a check is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Messages looked at.
    pub messages: u64,
    /// Of so many.
    pub of: u64,
    /// Bytes of blobs read.
    pub bytes: u64,
}

/// How deep to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Blobs are there and have the right size.
    Sizes,
    /// Blobs have the right bytes.
    Digests,
}

impl Index {
    /// Looks at everything, as it is at one moment. `found` gets each problem, and `None` after each message;
    /// it ends the check by saying no.
    ///
    /// # Errors
    /// The database fails.
    pub fn check(
        &self,
        depth: Depth,
        mut found: impl FnMut(Option<Problem>, Checked) -> bool,
    ) -> Result<Checked, IndexError> {
        let _pin = self.pin();
        let transaction = self.store.begin_read()?;
        let records = transaction.open_table(RECORDS)?;
        let expiries = transaction.open_table(EXPIRIES)?;
        let refs = transaction.open_table(REFS)?;
        let mut checked = Checked { of: records.len()?, ..Checked::default() };
        let mut counts = HashMap::<[u8; 32], u64>::new();
        let (mut size, mut expiring) = (0, 0);
        let problem = |at: &str, problem: String| Some(Problem { at: at.to_owned(), problem });
        for item in records.iter()? {
            let (key, value) = item?;
            let topic = key.value();
            checked.messages += 1;
            let record = match Record::read(topic, value.value()) {
                Ok(record) => record,
                Err(_) => {
                    if !found(problem(topic, "the record is damaged".to_owned()), checked) {
                        return Ok(checked);
                    }
                    continue;
                }
            };
            size += record.size();
            let mut problems = Vec::new();
            if let Some(expires) = record.expires_ms {
                expiring += 1;
                if expiries.get((expires, topic))?.is_none() {
                    problems.push("it expires, and nobody would notice".to_owned());
                }
            }
            if let Body::Blob { digest, len } = &record.body {
                let count = counts.entry(*digest).or_default();
                *count += 1;
                if *count == 1 {
                    match self.check_blob(&Digest::from(*digest), *len, depth) {
                        Ok(()) if depth == Depth::Digests => checked.bytes += len,
                        Ok(()) => {}
                        Err(text) => problems.push(text),
                    }
                }
            }
            if let Ok(Topic::Channel(_)) = Topic::parse(topic) {
                match self.bytes(&record.body).map(|bytes| UpdateList::parse(&bytes)) {
                    Ok(Ok(list)) => {
                        for piece in list.pieces() {
                            let at = &piece.topic;
                            let text = match records.get(at.as_str())? {
                                None => format!("its list names `{at}`, which is not there"),
                                Some(value) => match Record::read(at, value.value()) {
                                    Ok(record) if record.body.digest() != piece.digest => {
                                        format!("its list names `{at}`, which has other bytes")
                                    }
                                    _ => continue, // said of the record, if it is damaged
                                },
                            };
                            problems.push(text);
                        }
                    }
                    Ok(Err(error)) => problems.push(format!("its list is damaged: {error}")),
                    Err(_) => {} // said of the blob
                }
            }
            for text in problems {
                if !found(problem(topic, text), checked) {
                    return Ok(checked);
                }
            }
            if !found(None, checked) {
                return Ok(checked);
            }
        }
        sessions::bodies(&transaction, |body| {
            if let Body::Blob { digest, .. } = body {
                *counts.entry(digest).or_default() += 1;
            }
        })?;
        let mut last = Vec::new();
        for item in refs.iter()? {
            let (key, value) = item?;
            let (present, real) = (value.value(), counts.remove(key.value()).unwrap_or_default());
            if present != real {
                let text = format!("{real} messages name this blob, counted are {present}");
                last.push(problem(&Digest::from(*key.value()).to_string(), text));
            }
        }
        for (digest, real) in counts {
            let text = format!("{real} messages name this blob, counted are none");
            last.push(problem(&Digest::from(digest).to_string(), text));
        }
        if expiries.len()? != expiring {
            let text = format!("{expiring} messages expire, noted are {}", expiries.len()?);
            last.push(problem("expiries", text));
        }
        let noted = transaction.open_table(META)?.get(BYTES)?.map_or(0, |bytes| bytes.value());
        if noted != size {
            last.push(problem("bytes", format!("the payloads have {size} bytes, noted are {noted}")));
        }
        for problem in last {
            if !found(problem, checked) {
                break;
            }
        }
        Ok(checked)
    }

    fn check_blob(&self, digest: &Digest, len: u64, depth: Depth) -> Result<(), String> {
        let said = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => format!("its blob {digest} is not there"),
            _ => format!("its blob {digest} cannot be read: {error}"),
        };
        let found = self.blobs.size(digest).map_err(said)?;
        if found != len {
            return Err(format!("its blob {digest} has {found} bytes instead of {len}"));
        }
        if depth == Depth::Digests {
            let mut file = self.blobs.open_file(digest).map_err(said)?;
            let read = hash(&mut file).map_err(said)?;
            if read != *digest {
                return Err(format!("its blob {digest} has other bytes: their digest is {read}"));
            }
        }
        Ok(())
    }
}

/// The digest of what `from` holds.
///
/// # Errors
/// It cannot be read.
pub fn hash(from: &mut impl io::Read) -> io::Result<Digest> {
    let mut hasher = Hasher::default();
    let mut piece = vec![0; usize::try_from(CHUNK).unwrap_or(usize::MAX)];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => hasher.update(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
