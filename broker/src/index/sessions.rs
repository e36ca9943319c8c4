//! What of a session outlives its connection: subscriptions, messages that the client has not acknowledged,
//! QoS 2 messages that it has not released, a will that waits.
//!
//! The writer makes every change, in the transaction of the message it belongs to: a QoS 1 or 2 message for
//! a kept session is in the session's queue before its publisher is told that it was taken. The connection
//! reads the queue as its client takes messages. Packet ids follow from a message's place in the queue, so a
//! message that is sent again, even by a broker that was killed, has the id it had before [MQTT-4.4.0-1].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU32,
    sync::{Arc, PoisonError, RwLockWriteGuard},
};

use bytes::Bytes;
use redb::{ReadTransaction, ReadableTable, Table, TableDefinition, TableError, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::{
    Index, IndexError,
    blobs::Blobs,
    record::{Body, Record},
};
use crate::{
    bus::SharedSubscriptions,
    limits::Limits,
    mailbox::Mailbox,
    message::{Message, Refusal, SessionId},
    packet::{Properties, Publish, Qos, Reason, SubscriptionOptions},
    subscriptions::{Found, Receiver, Subscriptions},
};

/// Client id → [`SessionRecord`].
const SESSIONS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("sessions");
/// Session and filter → [`Subscription`].
const SUBSCRIPTIONS: TableDefinition<'static, (u64, &str), &[u8]> = TableDefinition::new("subscriptions");
/// Session and packet id of each QoS 2 message that its client has not released.
const UNRELEASED: TableDefinition<'static, (u64, u16), ()> = TableDefinition::new("unreleased");
/// Session and order → [`Entry`].
const QUEUES: TableDefinition<'static, (u64, u64), &[u8]> = TableDefinition::new("queues");
/// Number of a body → its topic and [`Record`].
const BODIES: TableDefinition<'static, u64, (&str, &[u8])> = TableDefinition::new("bodies");
/// Number of a body → how many entries name it.
const BODY_REFS: TableDefinition<'static, u64, u64> = TableDefinition::new("body_refs");

/// Packet ids of messages in a queue are 1 to this; what is sent past the queue has higher ones.
pub const QUEUE_IDS: u16 = 0x7fff;
/// The order of a session's first message: lower ones are for what is put back at its front.
const FIRST: u64 = 1 << 32;

/// Asks for a session.
#[derive(Debug, Clone)]
pub struct Opening {
    /// The client's id.
    pub client_id: String,
    /// The user's name.
    pub owner: Option<String>,
    /// Whether the client id is the user's by right, whoever used it before.
    pub by_right: bool,
    /// Whether an earlier session is to be forgotten.
    pub clean_start: bool,
    /// Seconds to keep it after the connection.
    pub expiry: u32,
}

/// A session that is kept.
#[derive(Debug)]
pub struct Kept {
    /// Tells it from all others.
    pub id: SessionId,
    /// Whether there was one already.
    pub present: bool,
    /// Where live messages arrive.
    pub mailbox: Arc<Mailbox>,
    /// Its subscriptions, and what of their retained messages is still to be sent.
    pub subscriptions: Vec<(String, Subscription)>,
    /// QoS 2 messages of the client that it has not released.
    pub unreleased: Vec<u16>,
    /// Messages up to this place in the queue were perhaps sent before.
    pub sent: u64,
    /// Packet ids in the queue that do not follow from a place there.
    pub taken_ids: Vec<u16>,
}

/// A subscription of a kept session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscription {
    /// What the client asked for.
    pub options: SubscriptionOptions,
    /// Retained messages it has yet to get.
    pub pending: Option<Pending>,
}

/// Which retained messages a subscription has yet to get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pending {
    /// All.
    All,
    /// Those after this topic.
    After(String),
}

/// A change of a kept session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// New subscriptions, whose SUBACK is `answer`.
    Subscribe {
        /// The packet that is answered.
        packet_id: u16,
        /// What to answer.
        answer: Vec<Result<Qos, Reason>>,
        /// The new subscriptions.
        subscriptions: Vec<(String, Subscription)>,
    },
    /// Subscriptions that end, whose UNSUBACK is `answer`.
    Unsubscribe {
        /// The packet that is answered, if the client asked for it.
        packet_id: Option<u16>,
        /// What to answer.
        answer: Vec<Reason>,
        /// Their filters.
        filters: Vec<String>,
    },
    /// All retained messages of these filters have been taken.
    Replayed(Vec<String>),
    /// The client has the message at this place in the queue.
    Acknowledged(u64),
    /// The client has said PUBREC to the message at this place in the queue.
    Received(u64, u16),
    /// The client has released its QoS 2 message.
    Released(u16),
    /// The connection has ended.
    End(Box<End>),
}

impl Change {
    /// Whether the session goes on only when the disk has it.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        !self.may_be_lost() && !matches!(self, Change::End(_))
    }

    /// Whether nothing is wrong if it is lost in a crash: messages are then sent once more, as QoS 1 allows.
    pub(super) fn may_be_lost(&self) -> bool {
        matches!(self, Change::Replayed(_) | Change::Acknowledged(_))
    }
}

/// What a connection leaves behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Seconds to keep the session; 0 ends it too.
    pub expiry: u32,
    /// Messages up to this place in the queue were sent.
    pub sent: u64,
    /// A will, and how many seconds it waits.
    pub will: Option<(Publish, u32)>,
    /// Messages sent past the queue that the client has not acknowledged, in order.
    pub in_flight: Vec<InFlight>,
    /// Retained messages yet to be sent, by filter; `None` for those that were.
    pub pending: Vec<(String, Option<Pending>)>,
}

/// A message sent past the queue that its client has not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InFlight {
    /// Its packet id.
    pub packet_id: u16,
    /// The message; `None` once the client has said PUBREC.
    pub message: Option<Message>,
    /// The QoS it was sent with.
    pub qos: Qos,
    /// The retain flag it was sent with.
    pub retain: bool,
    /// The identifiers it was sent with.
    pub identifiers: Vec<NonZeroU32>,
}

/// A message in a kept session's queue.
#[derive(Debug, Clone)]
pub struct Queued {
    /// Its place in the queue.
    pub order: u64,
    /// What it is; without a message once the client has said PUBREC.
    pub sent: InFlight,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct SessionRecord {
    number: u64,
    owner: Option<String>,
    expiry: u32,
    /// When the connection ended, in milliseconds since 1970; `None` while there is one.
    ended_ms: Option<u64>,
    sent: u64,
    will: Option<StoredWill>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredWill {
    due_ms: u64,
    topic: String,
    payload: Vec<u8>,
    qos: Qos,
    retain: bool,
    properties: Properties,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    packet_id: u16,
    qos: Qos,
    retain: bool,
    identifiers: Vec<NonZeroU32>,
    /// `None` once the client has said PUBREC.
    body: Option<u64>,
}

/// What the writer knows of all kept sessions without looking.
#[derive(Debug)]
pub(super) struct Sessions {
    subscriptions: SharedSubscriptions,
    blobs: Arc<Blobs>,
    limits: Arc<Limits>,
    /// Session of each client id.
    numbers: HashMap<String, u64>,
    saved: HashMap<u64, Saved>,
    /// When which session's will is due.
    wills: BTreeSet<(u64, u64)>,
    last_number: u64,
    last_body: u64,
    /// Bodies that entries name now.
    gained: Vec<Body>,
    /// Bodies that no entry names any more.
    freed: Vec<Body>,
    /// Wills to publish.
    due: Vec<Publish>,
}

#[derive(Debug)]
struct Saved {
    client_id: String,
    record: SessionRecord,
    mailbox: Arc<Mailbox>,
    /// Bytes in the database of each message that waits.
    waiting: BTreeMap<u64, usize>,
    bytes: usize,
    next: u64,
}

/// The tables of one transaction.
pub(super) struct Tables<'t> {
    sessions: Table<'t, &'static str, &'static [u8]>,
    subscriptions: Table<'t, (u64, &'static str), &'static [u8]>,
    unreleased: Table<'t, (u64, u16), ()>,
    queues: Table<'t, (u64, u64), &'static [u8]>,
    bodies: Table<'t, u64, (&'static str, &'static [u8])>,
    body_refs: Table<'t, u64, u64>,
}

impl<'t> Tables<'t> {
    pub(super) fn open(transaction: &'t WriteTransaction) -> Result<Tables<'t>, IndexError> {
        Ok(Tables {
            sessions: transaction.open_table(SESSIONS)?,
            subscriptions: transaction.open_table(SUBSCRIPTIONS)?,
            unreleased: transaction.open_table(UNRELEASED)?,
            queues: transaction.open_table(QUEUES)?,
            bodies: transaction.open_table(BODIES)?,
            body_refs: transaction.open_table(BODY_REFS)?,
        })
    }

    /// Writes down a session.
    fn save(&mut self, client_id: &str, record: &SessionRecord) -> Result<(), IndexError> {
        self.sessions.insert(client_id, to_bytes(record).as_slice())?;
        Ok(())
    }

    /// Counts one entry less for a body; hands it back if it was the last.
    fn forget_body(&mut self, body: u64) -> Result<Option<Body>, IndexError> {
        let left = self.body_refs.get(body)?.map_or(0, |count| count.value()).saturating_sub(1);
        if left > 0 {
            self.body_refs.insert(body, left)?;
            return Ok(None);
        }
        self.body_refs.remove(body)?;
        let Some(stored) = self.bodies.remove(body)? else { return Ok(None) };
        let (topic, bytes) = stored.value();
        Ok(Record::read_or_skip(topic, bytes).map(|record| record.body))
    }
}

/// Hands the bodies of all queues' messages to `take`.
pub(super) fn bodies(transaction: &ReadTransaction, mut take: impl FnMut(Body)) -> Result<(), IndexError> {
    let bodies = match transaction.open_table(BODIES) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(()),
        bodies => bodies?,
    };
    for item in bodies.iter()? {
        let (_, value) = item?;
        let (topic, bytes) = value.value();
        if let Some(record) = Record::read_or_skip(topic, bytes) {
            take(record.body);
        }
    }
    Ok(())
}

impl Sessions {
    pub(super) fn new(
        subscriptions: SharedSubscriptions,
        blobs: Arc<Blobs>,
        limits: Arc<Limits>,
    ) -> Sessions {
        Sessions {
            subscriptions,
            blobs,
            limits,
            numbers: HashMap::new(),
            saved: HashMap::new(),
            wills: BTreeSet::new(),
            last_number: 0,
            last_body: 0,
            gained: Vec::new(),
            freed: Vec::new(),
            due: Vec::new(),
        }
    }

    /// Forgets everything that is not on the disk. Those who are connected have to come back.
    pub(super) fn reset(&mut self) {
        self.saved.values().for_each(|saved| saved.mailbox.overflow());
        self.trie().forget_kept();
        let (subscriptions, blobs, limits) =
            (self.subscriptions.clone(), self.blobs.clone(), self.limits.clone());
        *self = Sessions::new(subscriptions, blobs, limits);
    }

    /// Reads all sessions. Those that had a connection when the broker was killed have lost it `now`.
    pub(super) fn load(&mut self, tables: &mut Tables<'_>, now_ms: u64) -> Result<(), IndexError> {
        let mut lost = Vec::new();
        for item in tables.sessions.iter()? {
            let (key, value) = item?;
            let client_id = key.value().to_owned();
            let record: SessionRecord = read(&client_id, value.value())?;
            let number = record.number;
            if record.ended_ms.is_none() {
                lost.push(number);
            }
            if let Some(will) = &record.will {
                self.wills.insert((will.due_ms, number));
            }
            self.last_number = self.last_number.max(number);
            self.numbers.insert(client_id.clone(), number);
            let mailbox = Arc::new(Mailbox::new(&self.limits));
            mailbox.close();
            // A place is not taken twice: what is new there would pass for what was sent before.
            let next = FIRST.max(record.sent + 1);
            let saved = Saved { client_id, record, mailbox, waiting: BTreeMap::new(), bytes: 0, next };
            self.saved.insert(number, saved);
        }
        for item in tables.queues.iter()? {
            let (key, value) = item?;
            let (number, order) = key.value();
            let entry: Entry = read("a queue", value.value())?;
            let size = match entry.body {
                Some(body) => match tables.bodies.get(body)? {
                    Some(stored) => memory(stored.value().1),
                    None => 0,
                },
                None => 0,
            };
            if let Some(saved) = self.saved.get_mut(&number) {
                saved.waiting.insert(order, size);
                saved.bytes += size;
                saved.next = saved.next.max(order + 1);
            }
        }
        self.last_body = tables.bodies.last()?.map_or(0, |(number, _)| number.value());
        for item in tables.subscriptions.iter()? {
            let (key, value) = item?;
            let (number, filter) = key.value();
            let subscription: Subscription = read(filter, value.value())?;
            if let Some(saved) = self.saved.get(&number) {
                let receiver = saved.receiver(subscription.options);
                self.trie().insert(filter, SessionId::kept(number), receiver);
            }
        }
        for number in &lost {
            if let Some(saved) = self.saved.get_mut(number) {
                saved.record.ended_ms = Some(now_ms);
                saved.record.sent = saved.next - 1;
            }
        }
        // Last, since the disk may be full: all that counts is in memory by now.
        for saved in lost.iter().filter_map(|number| self.saved.get(number)) {
            tables.save(&saved.client_id, &saved.record)?;
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn limits(&mut self, limits: Limits) {
        self.limits = Arc::new(limits);
    }

    /// How many there are, and how many of them have no connection.
    pub(super) fn count(&self) -> (usize, usize) {
        let away = self.saved.values().filter(|saved| saved.record.ended_ms.is_some());
        (self.saved.len(), away.count())
    }

    /// When the next will is due, in milliseconds since 1970.
    pub(super) fn next_will(&self) -> Option<u64> {
        self.wills.first().map(|(due, _)| *due)
    }

    /// Bodies that entries name now, and those that none names any more.
    pub(super) fn take_bodies(&mut self) -> (Vec<Body>, Vec<Body>) {
        (std::mem::take(&mut self.gained), std::mem::take(&mut self.freed))
    }

    /// Wills to publish now.
    pub(super) fn take_wills(&mut self) -> Vec<Publish> {
        std::mem::take(&mut self.due)
    }

    /// Opens a session; hands back none if it ends with its connection.
    pub(super) fn open(
        &mut self,
        tables: &mut Tables<'_>,
        opening: Opening,
        now_ms: u64,
    ) -> Result<Result<Option<Kept>, Refusal>, IndexError> {
        let mut present = self.numbers.get(&opening.client_id).copied();
        if let Some(saved) = present.and_then(|number| self.saved.get(&number)) {
            let is_foreign = saved.record.owner != opening.owner;
            if is_foreign && !opening.by_right && saved.record.owner.is_some() {
                let text = "this client id has a session of another user";
                return Ok(Err(Refusal::new(Reason::ClientIdentifierNotValid, text)));
            }
            if opening.clean_start || is_foreign || saved.is_expired(now_ms) {
                let number = saved.record.number;
                self.discard(tables, number)?;
                present = None;
            }
        }
        let number = match present {
            Some(number) => number,
            None if opening.expiry == 0 => return Ok(Ok(None)),
            None if self.saved.len() >= self.limits.sessions => {
                let text = format!("{} sessions are kept already", self.limits.sessions);
                return Ok(Err(Refusal::new(Reason::QuotaExceeded, text)));
            }
            None => self.create(&opening),
        };
        let Some(saved) = self.saved.get_mut(&number) else { return Ok(Ok(None)) };
        if let Some(will) = saved.record.will.take() {
            // [MQTT-3.1.3-9]: the client is back in time.
            self.wills.remove(&(will.due_ms, number));
        }
        saved.record.ended_ms = None;
        saved.record.expiry = opening.expiry;
        tables.save(&saved.client_id, &saved.record)?;
        saved.mailbox.open();
        if !saved.waiting.is_empty() {
            saved.mailbox.queued();
        }
        let mut kept = Kept {
            id: SessionId::kept(number),
            present: present.is_some(),
            mailbox: saved.mailbox.clone(),
            subscriptions: Vec::new(),
            unreleased: Vec::new(),
            sent: saved.record.sent,
            taken_ids: Vec::new(),
        };
        for item in tables.subscriptions.range((number, "")..(number + 1, ""))? {
            let (key, value) = item?;
            let (_, filter) = key.value();
            kept.subscriptions.push((filter.to_owned(), read(filter, value.value())?));
        }
        for item in tables.unreleased.range((number, 0)..=(number, u16::MAX))? {
            kept.unreleased.push(item?.0.value().1);
        }
        for item in tables.queues.range((number, 0)..(number, FIRST))? {
            kept.taken_ids.push(read::<Entry>("a queue", item?.1.value())?.packet_id);
        }
        Ok(Ok(Some(kept)))
    }

    fn create(&mut self, opening: &Opening) -> u64 {
        self.last_number += 1;
        let record = SessionRecord {
            number: self.last_number,
            owner: opening.owner.clone(),
            expiry: opening.expiry,
            ended_ms: None,
            sent: 0,
            will: None,
        };
        let saved = Saved {
            client_id: opening.client_id.clone(),
            record,
            mailbox: Arc::new(Mailbox::new(&self.limits)),
            waiting: BTreeMap::new(),
            bytes: 0,
            next: FIRST,
        };
        self.numbers.insert(opening.client_id.clone(), self.last_number);
        self.saved.insert(self.last_number, saved);
        self.last_number
    }

    /// Makes a change. One for a session that is no more changes nothing.
    pub(super) fn change(
        &mut self,
        tables: &mut Tables<'_>,
        id: SessionId,
        change: &Change,
        now_ms: u64,
    ) -> Result<(), IndexError> {
        let number = id.number();
        let Some(saved) = self.saved.get_mut(&number) else {
            if let Change::End(end) = change {
                self.due.extend(end.will.iter().map(|(will, _)| will.clone()));
            }
            return Ok(());
        };
        match change {
            Change::Subscribe { subscriptions, .. } => {
                for (filter, subscription) in subscriptions {
                    tables
                        .subscriptions
                        .insert((number, filter.as_str()), to_bytes(subscription).as_slice())?;
                    let receiver = saved.receiver(subscription.options);
                    write(&self.subscriptions).insert(filter, id, receiver);
                }
            }
            Change::Unsubscribe { filters, .. } => {
                for filter in filters {
                    tables.subscriptions.remove((number, filter.as_str()))?;
                    write(&self.subscriptions).remove(filter, id);
                }
            }
            Change::Replayed(filters) => {
                for filter in filters {
                    tables.set_pending(number, filter, None)?;
                }
            }
            Change::Acknowledged(order) => {
                if let Some(size) = saved.waiting.remove(order) {
                    saved.bytes -= size;
                }
                let entry = tables.queues.remove((number, *order))?;
                let body = entry.map(|entry| read::<Entry>("a queue", entry.value())).transpose()?;
                if let Some(body) = body.and_then(|entry| entry.body) {
                    self.freed.extend(tables.forget_body(body)?);
                }
            }
            Change::Received(order, _) => {
                let entry = tables.queues.get((number, *order))?;
                let entry = entry.map(|entry| read::<Entry>("a queue", entry.value())).transpose()?;
                if let Some(entry) = entry {
                    let released = Entry { body: None, ..entry.clone() };
                    tables.queues.insert((number, *order), to_bytes(&released).as_slice())?;
                    if let Some(body) = entry.body {
                        self.freed.extend(tables.forget_body(body)?);
                    }
                }
            }
            Change::Released(packet_id) => {
                tables.unreleased.remove((number, *packet_id))?;
            }
            Change::End(end) => self.end(tables, number, end, now_ms)?,
        }
        Ok(())
    }

    fn end(
        &mut self,
        tables: &mut Tables<'_>,
        number: u64,
        end: &End,
        now_ms: u64,
    ) -> Result<(), IndexError> {
        let Some(saved) = self.saved.get_mut(&number) else { return Ok(()) };
        saved.mailbox.close();
        if end.expiry == 0 {
            self.due.extend(end.will.iter().map(|(will, _)| will.clone()));
            return self.discard(tables, number);
        }
        saved.record.expiry = end.expiry;
        saved.record.ended_ms = Some(now_ms);
        saved.record.sent = saved.record.sent.max(end.sent);
        saved.record.will = end.will.as_ref().map(|(will, delay)| {
            // 3.1.3.2.2: or when the session ends, if that is sooner.
            let due_ms = now_ms + u64::from(*delay.min(&end.expiry)) * 1000;
            self.wills.insert((due_ms, number));
            StoredWill {
                due_ms,
                topic: will.topic.clone(),
                payload: will.payload.to_vec(),
                qos: will.qos,
                retain: will.retain,
                properties: will.properties.clone(),
            }
        });
        for (filter, pending) in &end.pending {
            tables.set_pending(number, filter, pending.clone())?;
        }
        let front = saved.waiting.first_key_value().map_or(FIRST, |(order, _)| (*order).min(FIRST));
        if !end.in_flight.is_empty() {
            saved.record.sent = saved.record.sent.max(front - 1);
        }
        tables.save(&saved.client_id, &saved.record)?;
        for (order, sent) in (front - end.in_flight.len() as u64..).zip(&end.in_flight) {
            let Saved { waiting, bytes, .. } = saved;
            let mut body = None;
            if let Some(message) = &sent.message {
                let record = Record::of(message);
                if !self.blobs.has(&record.body) {
                    continue; // replaced long ago: what took its place waits already, or will be found
                }
                self.last_body += 1;
                body = Some(self.last_body);
                let stored = record.to_bytes();
                waiting.insert(order, memory(&stored));
                *bytes += memory(&stored);
                tables.bodies.insert(self.last_body, (&*message.topic, stored.as_slice()))?;
                tables.body_refs.insert(self.last_body, 1)?;
                self.gained.push(record.body);
            } else {
                waiting.insert(order, 0);
            }
            let entry = Entry {
                packet_id: sent.packet_id,
                qos: sent.qos,
                retain: sent.retain,
                identifiers: sent.identifiers.clone(),
                body,
            };
            tables.queues.insert((number, order), to_bytes(&entry).as_slice())?;
        }
        Ok(())
    }

    /// Takes note of a QoS 2 message of a session's client, in the transaction that keeps the message.
    pub(super) fn remember(
        &self,
        tables: &mut Tables<'_>,
        id: SessionId,
        packet_id: u16,
    ) -> Result<(), IndexError> {
        if self.saved.contains_key(&id.number()) {
            tables.unreleased.insert((id.number(), packet_id), ())?;
        }
        Ok(())
    }

    /// Puts a message into the queues of sessions. Those with no room are given up.
    pub(super) fn enqueue(
        &mut self,
        tables: &mut Tables<'_>,
        receivers: &[Found],
        message: &Publish,
        retain: bool,
        record: &Record,
    ) -> Result<(), IndexError> {
        let stored = record.to_bytes();
        let size = memory(&stored);
        let body = self.last_body + 1;
        let mut refs = 0;
        for found in receivers {
            let number = found.id.number();
            let Some(saved) = self.saved.get_mut(&number) else { continue };
            let oldest = saved.waiting.first_key_value().map_or(saved.next, |(order, _)| *order);
            let is_full = saved.waiting.len() >= self.limits.session_messages
                || (!saved.waiting.is_empty() && saved.bytes + size > self.limits.session_bytes)
                || saved.next - oldest.max(FIRST) >= u64::from(QUEUE_IDS);
            if is_full {
                tracing::warn!(client = saved.client_id, "too many messages wait: its session is given up");
                saved.mailbox.overflow();
                self.discard(tables, number)?;
                continue;
            }
            let order = saved.next;
            saved.next += 1;
            saved.waiting.insert(order, size);
            saved.bytes += size;
            let place = u16::try_from((order - FIRST) % u64::from(QUEUE_IDS)).unwrap_or_default();
            let entry = Entry {
                packet_id: place + 1,
                qos: found.qos(message.qos),
                retain: retain && found.receiver.options.retain_as_published,
                identifiers: found.identifiers.clone(),
                body: Some(body),
            };
            tables.queues.insert((number, order), to_bytes(&entry).as_slice())?;
            refs += 1;
        }
        if refs > 0 {
            self.last_body = body;
            tables.bodies.insert(body, (message.topic.as_str(), stored.as_slice()))?;
            tables.body_refs.insert(body, refs)?;
            self.gained.push(record.body.clone());
        }
        Ok(())
    }

    /// Whether a will is due or a session over.
    pub(super) fn is_due(&self, now_ms: u64) -> bool {
        self.next_will().is_some_and(|due| due <= now_ms)
            || self.saved.values().any(|saved| saved.is_expired(now_ms))
    }

    /// Takes out the wills that are due, and ends the sessions that are over.
    pub(super) fn expire(&mut self, tables: &mut Tables<'_>, now_ms: u64) -> Result<(), IndexError> {
        while let Some((due, number)) = self.wills.first().copied().filter(|(due, _)| *due <= now_ms) {
            self.wills.remove(&(due, number));
            let Some(saved) = self.saved.get_mut(&number) else { continue };
            self.due.extend(saved.record.will.take().map(StoredWill::into_publish));
            tables.save(&saved.client_id, &saved.record)?;
        }
        let over: Vec<_> =
            self.saved.values().filter(|saved| saved.is_expired(now_ms)).map(|s| s.record.number).collect();
        for number in over {
            self.discard(tables, number)?;
        }
        Ok(())
    }

    /// Ends a session, and has its will published if that still waits.
    fn discard(&mut self, tables: &mut Tables<'_>, number: u64) -> Result<(), IndexError> {
        let Some(saved) = self.saved.remove(&number) else { return Ok(()) };
        self.numbers.remove(&saved.client_id);
        tables.sessions.remove(saved.client_id.as_str())?;
        let mut filters = Vec::new();
        for item in tables.subscriptions.range((number, "")..(number + 1, ""))? {
            filters.push(item?.0.value().1.to_owned());
        }
        for filter in filters {
            tables.subscriptions.remove((number, filter.as_str()))?;
            self.trie().remove(&filter, SessionId::kept(number));
        }
        tables.unreleased.retain_in((number, 0)..=(number, u16::MAX), |_, ()| false)?;
        let mut bodies = Vec::new();
        for item in tables.queues.extract_from_if((number, 0)..=(number, u64::MAX), |_, _| true)? {
            bodies.extend(read::<Entry>("a queue", item?.1.value())?.body);
        }
        for body in bodies {
            self.freed.extend(tables.forget_body(body)?);
        }
        if let Some(will) = saved.record.will {
            self.wills.remove(&(will.due_ms, number));
            self.due.push(will.into_publish());
        }
        Ok(())
    }

    fn trie(&self) -> RwLockWriteGuard<'_, Subscriptions> {
        write(&self.subscriptions)
    }
}

fn write(subscriptions: &SharedSubscriptions) -> RwLockWriteGuard<'_, Subscriptions> {
    subscriptions.write().unwrap_or_else(PoisonError::into_inner)
}

impl Tables<'_> {
    fn set_pending(&mut self, number: u64, filter: &str, pending: Option<Pending>) -> Result<(), IndexError> {
        let Some(stored) = self.subscriptions.get((number, filter))? else { return Ok(()) };
        let present: Subscription = read(filter, stored.value())?;
        drop(stored);
        let changed = Subscription { pending, ..present };
        self.subscriptions.insert((number, filter), to_bytes(&changed).as_slice())?;
        Ok(())
    }
}

impl Saved {
    fn receiver(&self, options: SubscriptionOptions) -> Receiver {
        Receiver { mailbox: self.mailbox.clone(), options, since: 0 }
    }

    fn is_expired(&self, now_ms: u64) -> bool {
        let ended = self.record.ended_ms.filter(|_| self.record.expiry < u32::MAX);
        ended.is_some_and(|ended| ended + u64::from(self.record.expiry) * 1000 <= now_ms)
    }
}

impl StoredWill {
    fn into_publish(self) -> Publish {
        Publish {
            topic: self.topic,
            payload: Bytes::from(self.payload),
            qos: self.qos,
            retain: self.retain,
            packet_id: 0,
            duplicate: false,
            properties: self.properties,
        }
    }
}

/// Reads of connections.
impl Index {
    /// Whether a session of this client is kept.
    ///
    /// # Errors
    /// The database fails.
    pub fn has_session(&self, client_id: &str) -> Result<bool, IndexError> {
        let transaction = self.store.begin_read()?;
        Ok(transaction.open_table(SESSIONS)?.get(client_id)?.is_some())
    }

    /// The first message after place `after` in the queue of a kept session.
    ///
    /// # Errors
    /// The database fails.
    pub fn queued(&self, id: SessionId, after: u64) -> Result<Option<Queued>, IndexError> {
        let number = id.number();
        let transaction = self.store.begin_read()?;
        let queues = transaction.open_table(QUEUES)?;
        let Some(item) = queues.range((number, after + 1)..=(number, u64::MAX))?.next() else {
            return Ok(None);
        };
        let (key, value) = item?;
        let Entry { packet_id, qos, retain, identifiers, body } = read("a queue", value.value())?;
        let message = match body {
            Some(body) => read_body(&transaction, body)?,
            None => None,
        };
        let sent = InFlight { packet_id, message, qos, retain, identifiers };
        Ok(Some(Queued { order: key.value().1, sent }))
    }
}

fn read_body(transaction: &ReadTransaction, body: u64) -> Result<Option<Message>, IndexError> {
    let bodies = transaction.open_table(BODIES)?;
    let Some(stored) = bodies.get(body)? else { return Ok(None) };
    let (topic, bytes) = stored.value();
    Ok(Some(Record::read(topic, bytes)?.into_message(topic)))
}

/// Bytes that a stored message takes in the database.
fn memory(stored: &[u8]) -> usize {
    stored.len()
}

fn to_bytes(value: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(value).expect("nothing here that postcard cannot write")
}

fn read<T: for<'d> Deserialize<'d>>(what: &str, bytes: &[u8]) -> Result<T, IndexError> {
    postcard::from_bytes(bytes).map_err(|source| IndexError::Damaged { topic: what.to_owned(), source })
}
