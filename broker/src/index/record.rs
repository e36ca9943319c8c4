//! How a retained message is written down.

use std::{error::Error, sync::Arc};

use bytes::Bytes;
use mpypi_protocol::Digest;
use redb::{AccessGuard, ReadableTable, StorageError, TableDefinition};
use serde::{Deserialize, Serialize};

use super::IndexError;
use crate::{
    message::{Message, Payload},
    packet::{Properties, Qos},
};

/// Topic → [`Record`].
pub(super) const RECORDS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("records");
/// Digest of a blob → how many records name it.
pub(super) const REFS: TableDefinition<'static, &[u8; 32], u64> = TableDefinition::new("refs");
/// Path of a src file → the digest that the newest list of any channel gives it.
pub(super) const LEGACY: TableDefinition<'static, &str, [u8; 32]> = TableDefinition::new("legacy");
/// When a record expires, in milliseconds since 1970, and its topic.
pub(super) const EXPIRIES: TableDefinition<'static, (u64, &str), ()> = TableDefinition::new("expiries");
/// Version of the change that cleared a node's topic → the topic, until an upstream has been told.
pub(super) const GONE: TableDefinition<'static, u64, &str> = TableDefinition::new("gone");
/// [`VERSION`] → the version of the newest change; [`FORMAT`] → how all of it is written down.
pub(super) const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");
/// A key in [`META`].
pub(super) const VERSION: &str = "version";
/// A key in [`META`]: bytes of all retained payloads.
pub(super) const BYTES: &str = "bytes";
/// A key in [`META`].
pub(super) const FORMAT: &str = "format";
/// What stands at [`FORMAT`]: changes with the tables or with [`Record`].
pub(super) const PRESENT_FORMAT: u64 = 1;

/// A topic and its [`Record`].
type Item<'t> = (AccessGuard<'t, &'static str>, AccessGuard<'t, &'static [u8]>);

/// The records of all topics that start with `prefix`.
pub(super) fn below<'t>(
    records: &'t impl ReadableTable<&'static str, &'static [u8]>,
    prefix: &'static str,
) -> Result<impl Iterator<Item = Result<Item<'t>, StorageError>>, IndexError> {
    let from_there = records.range::<&str>(prefix..)?;
    // An error is no end: whoever asks is to hear of it.
    Ok(from_there
        .take_while(move |item| item.as_ref().map_or(true, |(key, _)| key.value().starts_with(prefix))))
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) version: u64,
    pub(super) qos: u8,
    pub(super) body: Body,
    pub(super) properties: Properties,
    pub(super) expires_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Body {
    Inline(Vec<u8>),
    Blob { digest: [u8; 32], len: u64 },
}

impl Body {
    /// The digest of the payload.
    pub(super) fn digest(&self) -> Digest {
        match self {
            Body::Inline(bytes) => Digest::of(bytes),
            Body::Blob { digest, .. } => Digest::from(*digest),
        }
    }

    /// Bytes of the payload.
    pub(super) fn len(&self) -> u64 {
        match self {
            Body::Inline(bytes) => bytes.len() as u64,
            Body::Blob { len, .. } => *len,
        }
    }
}

impl Record {
    pub(super) fn read(topic: &str, bytes: &[u8]) -> Result<Record, IndexError> {
        postcard::from_bytes(bytes).map_err(|source| IndexError::Damaged { topic: topic.to_owned(), source })
    }

    /// Reads a record among many: a damaged one is logged, and must not keep the others back.
    pub(super) fn read_or_skip(topic: &str, bytes: &[u8]) -> Option<Record> {
        Record::read(topic, bytes)
            .inspect_err(|error| tracing::error!(%error, cause = ?error.source(), "skipped"))
            .ok()
    }

    pub(super) fn of(message: &Message) -> Record {
        Record {
            version: message.version,
            qos: message.qos as u8,
            body: match &message.payload {
                Payload::Inline(bytes) => Body::Inline(bytes.to_vec()),
                Payload::Blob(digest, len) => Body::Blob { digest: *digest.as_bytes(), len: *len },
            },
            properties: message.properties.clone(),
            expires_ms: message.expires_ms,
        }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a record holds nothing that postcard cannot write")
    }

    /// Bytes of the payload.
    pub(super) fn size(&self) -> u64 {
        match &self.body {
            Body::Inline(bytes) => bytes.len() as u64,
            Body::Blob { len, .. } => *len,
        }
    }

    pub(super) fn is_expired(&self, now_ms: u64) -> bool {
        self.expires_ms.is_some_and(|expires| expires <= now_ms)
    }

    pub(super) fn into_message(self, topic: &str) -> Message {
        Message {
            topic: Arc::from(topic),
            payload: match self.body {
                Body::Inline(bytes) => Payload::Inline(Bytes::from(bytes)),
                Body::Blob { digest, len } => Payload::Blob(Digest::from(digest), len),
            },
            qos: Qos::from_number(self.qos).unwrap_or(Qos::AtMostOnce),
            // Only what changed the index has a version there.
            retain: self.version > 0,
            properties: self.properties,
            expires_ms: self.expires_ms,
            origin: None,
            version: self.version,
        }
    }
}
