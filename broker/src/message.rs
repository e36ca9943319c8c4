//! A message on its way from one client to others.

use std::sync::Arc;

use bytes::Bytes;
use mpypi_protocol::Digest;

use crate::packet::{Properties, Qos, Reason};

/// Tells sessions apart, also those that use a client id one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl SessionId {
    const KEPT: u64 = 1 << 63;
    const OWN: u64 = 1 << 62;

    /// The id of a session that outlives its connections.
    #[must_use]
    pub fn kept(number: u64) -> SessionId {
        SessionId(number | SessionId::KEPT)
    }

    /// Whether the session outlives its connection.
    #[must_use]
    pub fn is_kept(self) -> bool {
        self.0 & SessionId::KEPT != 0
    }

    /// The id of one of the broker's own [listeners](crate::listener). Clients' sessions count from 1, and never so far.
    #[must_use]
    pub fn own(number: u64) -> SessionId {
        SessionId(number | SessionId::OWN)
    }

    /// Whether it is one of the broker's own.
    #[must_use]
    pub fn is_own(self) -> bool {
        !self.is_kept() && self.0 & SessionId::OWN != 0
    }

    /// The number of a kept session.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0 & !SessionId::KEPT
    }
}

/// A message that was let in, shared by all who get it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// A checked topic name.
    pub topic: Arc<str>,
    /// What it says.
    pub payload: Payload,
    /// The QoS it was published with.
    pub qos: Qos,
    /// Whether it was published to be retained.
    pub retain: bool,
    /// Its properties; the expiry among them is what the publisher said, not what is left.
    pub properties: Properties,
    /// When it means nothing any more, in milliseconds since 1970.
    pub expires_ms: Option<u64>,
    /// Who sent it; `None` for a message out of the index.
    pub origin: Option<SessionId>,
    /// Its place in the order of the index's changes; 0 if it changed nothing there.
    pub version: u64,
}

impl Message {
    /// The version of its topic's record right after this message; `None` if it left no record.
    #[must_use]
    pub fn record(&self) -> Option<u64> {
        (self.version > 0 && !self.payload.is_empty()).then_some(self.version)
    }
}

/// The bytes of a message, never copied per receiver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// In memory, shared.
    Inline(Bytes),
    /// In the index's blob store, read in pieces as the receiver takes them.
    Blob(Digest, u64),
}

impl Payload {
    /// The payload's size in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Payload::Inline(bytes) => bytes.len() as u64,
            Payload::Blob(_, len) => *len,
        }
    }

    /// Whether there are no bytes at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Some of a payload's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Of which payload.
    pub payload: Payload,
    /// The first of them.
    pub from: u64,
    /// The first that is not one of them any more.
    pub to: u64,
}

impl Part {
    /// The bytes of `payload` from `from` to before `to`, as far as it has them.
    #[must_use]
    pub fn new(payload: Payload, from: u64, to: u64) -> Part {
        let to = to.min(payload.len());
        Part { from: from.min(to), to, payload }
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.to - self.from
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.from == self.to
    }
}

impl From<Bytes> for Part {
    fn from(bytes: Bytes) -> Part {
        let to = bytes.len() as u64;
        Part { payload: Payload::Inline(bytes), from: 0, to }
    }
}

/// An error and all its causes in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Why a message was not let in. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// What to tell an MQTT 5 client.
    pub reason: Reason,
    /// What is wrong, and what to do about it.
    pub text: String,
}

impl Refusal {
    /// A refusal for `reason`.
    #[must_use]
    pub fn new(reason: Reason, text: impl Into<String>) -> Refusal {
        Refusal { reason, text: text.into() }
    }
}
