//! All retained messages as they are at one moment, for backups.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use mpypi_protocol::{Digest, Topic, UpdateList};
use redb::ReadableTable;
use serde::{Deserialize, Serialize};

use super::{
    Index, IndexError,
    record::{Body, RECORDS, Record},
};
use crate::packet::Properties;

/// A retained message as it is written into a backup: one line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Its topic.
    pub topic: String,
    /// The QoS it was published with.
    pub qos: u8,
    /// The digest of its payload.
    pub sha256: Digest,
    /// Bytes of its payload.
    pub size: u64,
    /// Its place in the order of the index's changes.
    pub version: u64,
    /// For a channel's list with a release: the release's sequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// When it means nothing any more, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// Its properties.
    #[serde(default, skip_serializing_if = "is_plain")]
    pub properties: Properties,
    /// Its payload in base64, unless that is a file, or was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
    /// Whether its payload is a file named by its digest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub blob: bool,
}

fn is_plain(properties: &Properties) -> bool {
    *properties == Properties::default()
}

/// While it lives, no blob is removed.
#[derive(Debug)]
pub struct Pin(Arc<AtomicUsize>);

impl Pin {
    pub(super) fn new(pins: &Arc<AtomicUsize>) -> Pin {
        pins.fetch_add(1, Ordering::SeqCst);
        Pin(pins.clone())
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Index {
    /// Keeps all blobs where they are. Take it before the snapshot that names them.
    #[must_use]
    pub fn pin(&self) -> Pin {
        self.blobs.pin()
    }

    /// Hands every retained message to `take`, as all of them are at one moment, until that says no.
    /// Messages that cannot be read are logged and left out.
    ///
    /// # Errors
    /// The database fails.
    pub fn snapshot(
        &self,
        payloads: bool,
        now_ms: u64,
        mut take: impl FnMut(Kept) -> bool,
    ) -> Result<(), IndexError> {
        let transaction = self.store.begin_read()?;
        for item in transaction.open_table(RECORDS)?.iter()? {
            let (key, value) = item?;
            let Some(record) = Record::read_or_skip(key.value(), value.value()) else { continue };
            if !record.is_expired(now_ms) && !take(self.kept(key.value(), record, payloads)) {
                break;
            }
        }
        Ok(())
    }

    fn kept(&self, topic: &str, record: Record, with_payload: bool) -> Kept {
        let size = record.size();
        let sequence = match Topic::parse(topic) {
            Ok(Topic::Channel(_)) => self.bytes(&record.body).ok().and_then(|bytes| {
                let list = UpdateList::parse(&bytes).ok()?;
                list.release().map(|release| release.sequence)
            }),
            _ => None,
        };
        let (sha256, payload, blob) = match record.body {
            Body::Inline(bytes) => {
                (Digest::of(&bytes), with_payload.then(|| BASE64_STANDARD.encode(&bytes)), false)
            }
            Body::Blob { digest, .. } => (Digest::from(digest), None, true),
        };
        Kept {
            topic: topic.to_owned(),
            qos: record.qos,
            sha256,
            size,
            version: record.version,
            sequence,
            expires_ms: record.expires_ms,
            properties: record.properties,
            payload,
            blob,
        }
    }
}
