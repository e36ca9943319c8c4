//! What comes to a session from elsewhere: live messages, a bounded queue that the bus fills, and answers of
//! the index's writer. Emptied by the connection.

use std::{
    collections::VecDeque,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::{
    index::writer::Settled,
    limits::Limits,
    message::{Message, Payload},
    packet::Qos,
};

/// What comes to one session. A kept session has it also while nobody is connected: then it is closed.
///
/// A retained message that does not fit is not lost: the mailbox notes that the session lags behind the
/// index, and the session reads there what it missed. Any other message that does not fit ends the
/// connection.
#[derive(Debug)]
pub struct Mailbox {
    /// Held to push or pop one message.
    inner: Mutex<Inner>,
    arrived: Notify,
    max_messages: usize,
    max_bytes: usize,
}

/// A message for one session.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The message.
    pub message: Arc<Message>,
    /// The lower of the message's and the subscription's QoS.
    pub qos: Qos,
    /// The retain flag to send.
    pub retain: bool,
    /// What the client calls the subscriptions that brought the message.
    pub identifiers: Vec<NonZeroU32>,
}

/// What a mailbox has for its session.
#[derive(Debug)]
pub enum Mail {
    /// The next message.
    Delivery(Delivery),
    /// Messages wait in the session's queue in the index.
    Queued,
    /// Retained messages changed after this version of the index were left out.
    Lagging(u64),
    /// A message was lost: the connection cannot go on.
    Overflow,
}

#[derive(Debug, Default)]
struct Inner {
    queue: VecDeque<Delivery>,
    bytes: usize,
    settled: VecDeque<Settled>,
    queued: bool,
    lagging: Option<u64>,
    overflow: bool,
    closed: bool,
}

impl Mailbox {
    /// An empty mailbox.
    #[must_use]
    pub fn new(limits: &Limits) -> Mailbox {
        Mailbox {
            inner: Mutex::default(),
            arrived: Notify::new(),
            max_messages: limits.queue_messages,
            max_bytes: limits.queue_bytes,
        }
    }

    /// Empties it for a new connection.
    pub fn open(&self) {
        *self.lock() = Inner::default();
    }

    /// Empties it, and lets nothing more in.
    pub fn close(&self) {
        *self.lock() = Inner { closed: true, ..Inner::default() };
    }

    /// Whether someone is there who can take another message.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let inner = self.lock();
        !inner.closed && !inner.overflow && inner.lagging.is_none() && inner.queue.len() < self.max_messages
    }

    /// Puts a message in, or notes that it did not fit.
    pub fn push(&self, delivery: Delivery) {
        let size = memory(&delivery);
        self.change(|inner| {
            // A message larger than the whole queue still passes, alone.
            let full = inner.queue.len() >= self.max_messages
                || (!inner.queue.is_empty() && inner.bytes + size > self.max_bytes);
            match delivery.message.record() {
                Some(version) if full || inner.lagging.is_some() => inner.lag(version - 1),
                // A cleared topic is not in the index: who misses the message cannot read it there.
                None if full => inner.overflow = true,
                _ => {
                    inner.bytes += size;
                    inner.queue.push_back(delivery);
                }
            }
        });
    }

    /// Notes that messages wait in the session's queue in the index.
    pub fn queued(&self) {
        self.change(|inner| inner.queued = true);
    }

    /// Notes that messages after `version` of the index may be missing.
    pub fn lag(&self, version: u64) {
        self.change(|inner| inner.lag(version));
    }

    /// Notes that a message was lost.
    pub fn overflow(&self) {
        self.change(|inner| inner.overflow = true);
    }

    /// Puts in what became of something that the session asked of the index. The session bounds how much it
    /// asks for at once.
    pub fn settled(&self, settled: Settled) {
        let mut inner = self.lock();
        if !inner.closed {
            inner.settled.push_back(settled);
            drop(inner);
            self.arrived.notify_one();
        }
    }

    /// Whether no message waits.
    pub fn is_empty(&self) -> bool {
        !self.lock().has_mail()
    }

    /// Takes out the next message, or what stands for one.
    pub fn pop(&self) -> Option<Mail> {
        let mut inner = self.lock();
        if inner.overflow {
            return Some(Mail::Overflow);
        }
        if std::mem::take(&mut inner.queued) {
            return Some(Mail::Queued);
        }
        if let Some(delivery) = inner.queue.pop_front() {
            inner.bytes -= memory(&delivery);
            return Some(Mail::Delivery(delivery));
        }
        inner.lagging.take().map(Mail::Lagging)
    }

    /// Takes out the next answer.
    pub fn pop_settled(&self) -> Option<Settled> {
        self.lock().settled.pop_front()
    }

    /// Waits until an answer, or a first message, came since the last wait.
    pub async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Changes what waits for the session. Who has not taken what waits already is not told again.
    fn change(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.lock();
        if inner.closed {
            return;
        }
        let waited = inner.has_mail();
        change(&mut inner);
        drop(inner);
        if !waited {
            self.arrived.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn has_mail(&self) -> bool {
        !self.queue.is_empty() || self.queued || self.lagging.is_some() || self.overflow
    }

    fn lag(&mut self, version: u64) {
        self.lagging = Some(self.lagging.map_or(version, |lagging| lagging.min(version)));
    }
}

/// Bytes a waiting message holds in memory; a blob waits on disk.
fn memory(delivery: &Delivery) -> usize {
    let message = &delivery.message;
    let payload = match &message.payload {
        Payload::Inline(bytes) => bytes.len(),
        Payload::Blob(..) => 0,
    };
    payload + message.topic.len() + message.properties.memory()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn delivery(version: u64, size: usize) -> Delivery {
        let message = Message {
            topic: "t".into(),
            payload: Payload::Inline(Bytes::from(vec![0; size])),
            qos: Qos::AtMostOnce,
            retain: version > 0,
            properties: Default::default(),
            expires_ms: None,
            origin: None,
            version,
        };
        Delivery { message: Arc::new(message), qos: Qos::AtMostOnce, retain: false, identifiers: Vec::new() }
    }

    fn mailbox() -> Mailbox {
        Mailbox::new(&Limits { queue_messages: 2, queue_bytes: 100, ..Limits::default() })
    }

    #[test]
    fn a_retained_message_that_does_not_fit_is_read_from_the_index_later() {
        let mailbox = mailbox();
        (1..=5).for_each(|version| mailbox.push(delivery(version, 1)));
        assert!(matches!(mailbox.pop(), Some(Mail::Delivery(d)) if d.message.version == 1));
        mailbox.push(delivery(6, 1)); // there is room, but 3 to 5 come first
        assert!(matches!(mailbox.pop(), Some(Mail::Delivery(d)) if d.message.version == 2));
        assert!(matches!(mailbox.pop(), Some(Mail::Lagging(2))));
        assert!(mailbox.pop().is_none());
    }

    #[test]
    fn a_live_message_that_does_not_fit_ends_the_session() {
        let mailbox = mailbox();
        (0..3).for_each(|_| mailbox.push(delivery(0, 1)));
        assert!(matches!(mailbox.pop(), Some(Mail::Overflow)));
    }

    #[test]
    fn a_message_larger_than_the_queue_passes_alone() {
        let mailbox = mailbox();
        mailbox.push(delivery(0, 1000));
        assert!(matches!(mailbox.pop(), Some(Mail::Delivery(_))));
        mailbox.push(delivery(0, 60));
        mailbox.push(delivery(0, 60));
        assert!(matches!(mailbox.pop(), Some(Mail::Overflow)));
    }
}
