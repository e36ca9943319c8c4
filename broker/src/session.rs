//! One client's session: packets and time in, effects out. No socket, no clock, no index.
//!
//! The connection feeds it with packets, with what became of the client's messages, and with messages for
//! the client; it carries out the effects in order.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mpypi_protocol::topic::{self, TopicError};

use crate::{
    access::Identity,
    clock::Now,
    faces::thingsboard::link,
    index::{
        Step,
        sessions::{Change, End, InFlight, Kept, Pending, QUEUE_IDS, Queued, Subscription},
        writer::Settled,
    },
    limits::Limits,
    mailbox::Delivery,
    message::{Message, Part, Payload, Refusal, SessionId},
    packet::{
        self, Connect, Packet, PacketError, Properties, Publish, Qos, Reason, RetainHandling, Subscribe,
        SubscriptionOptions, Unsubscribe, Version,
    },
};

/// The state of one client's session, while it has a connection.
#[derive(Debug)]
pub struct Session {
    /// Tells it from all others.
    pub id: SessionId,
    /// The protocol it speaks.
    pub version: Version,
    /// The client's id.
    pub client_id: String,
    identity: Identity,
    limits: Arc<Limits>,
    keep_alive: Option<Duration>,
    heard: Instant,
    will: Option<Publish>,
    will_delay: u32,
    /// Seconds to keep the session after the connection.
    expiry: u32,
    largest: u64,
    wants_problems: bool,
    window: usize,
    /// The newest version of the index that a replay has shown to the client.
    replayed: u64,
    subscriptions: BTreeMap<String, SubscriptionOptions>,
    /// Topics by alias, from 1 on; empty where there is none.
    aliases: Vec<String>,
    /// QoS of the client's messages that the index has not settled.
    settling: HashMap<u16, Qos>,
    unsettled: usize,
    /// QoS 2 messages of the client that it has not released.
    unreleased: HashSet<u16>,
    /// QoS 1 and 2 messages to the client that it has not acknowledged.
    in_flight: BTreeMap<u16, Flight>,
    last_packet_id: u16,
    replays: VecDeque<Replay>,
    live_first: bool,
    /// A SUBSCRIBE that came before the index had settled what the client published.
    subscribing: Option<Box<Subscribe>>,
    /// What only a kept session has.
    queue: Option<Box<Queue>>,
    /// Whether the client runs Mpy-BLOX, which never connects again by itself.
    is_mpyblox: bool,
    /// Whether the client speaks ThingsBoard's device API.
    is_thing: bool,
    closing: bool,
    ended: Option<Reason>,
}

/// A message to the client that it has not acknowledged.
#[derive(Debug)]
struct Flight {
    stage: Stage,
    /// Its place in the queue, if it came from there.
    order: Option<u64>,
    /// What to keep if the connection ends, if it came past a kept session's queue.
    kept: Option<Box<InFlight>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Sent at this QoS.
    Sent(Qos),
    /// The client has said PUBREC; the index is to know it before we go on.
    Received,
    /// The client is to say PUBCOMP.
    Released,
}

/// How far a kept session is with its queue in the index.
#[derive(Debug)]
struct Queue {
    /// Whether there may be more.
    waits: bool,
    /// The place of the last message taken out.
    after: u64,
    /// Messages up to this place were perhaps sent before.
    sent: u64,
    /// Packet ids in the queue that do not follow from a place there.
    taken_ids: Vec<u16>,
    /// Filters whose retained messages are all sent, but not all acknowledged.
    replayed: Vec<String>,
}

/// What the connection is to do for the session.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send these bytes.
    Send(Bytes),
    /// Send a PUBLISH: its head, then its payload.
    Deliver(Bytes, Payload),
    /// Send an answer of a face: a PUBLISH's head, then its payload.
    Answer(Bytes, Part),
    /// Hand a message of the client to the face that it speaks to.
    Face(Publish),
    /// Take note of what the client says of itself, on its own `info`.
    Introduce(Bytes),
    /// Hand a message of the client to the door.
    Admit(Publish),
    /// Answer a message of the client with this refusal, in its turn.
    Deny(Publish, Refusal),
    /// Make live messages of this filter arrive.
    Subscribe(String, SubscriptionOptions),
    /// Stop live messages of this filter.
    Unsubscribe(String),
    /// Have the index change the kept session.
    Change(Change),
    /// Send everything, then close.
    Close,
}

/// What is left when the connection has ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Leaving {
    /// The will, if it is to be published at once.
    pub will: Option<Publish>,
    /// What becomes of a kept session.
    pub end: Option<End>,
}

/// Retained messages that a subscription has yet to get, one at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// The filter.
    pub filter: String,
    /// The topic of the last one looked at.
    pub after: Option<String>,
    /// Only messages that changed after this version of the index.
    pub since: u64,
    options: SubscriptionOptions,
    catching_up: bool,
}

impl Session {
    /// The session that `connect` opens.
    #[must_use]
    pub fn new(
        id: SessionId,
        client_id: String,
        identity: Identity,
        connect: &Connect,
        limits: Arc<Limits>,
        now: Instant,
    ) -> Session {
        Session {
            id,
            version: connect.version,
            client_id,
            identity,
            // 3.1.2.10: one and a half times what the client said; 0 is for ever.
            keep_alive: (connect.keep_alive > 0)
                .then(|| Duration::from_millis(u64::from(connect.keep_alive) * 1500)),
            heard: now,
            will: connect.will.clone(),
            will_delay: connect.will_delay,
            expiry: Session::granted_expiry(connect.session_expiry, &limits),
            largest: connect.maximum_packet_size.map_or(u64::MAX, u64::from),
            wants_problems: connect.wants_problems,
            window: usize::from(connect.receive_maximum.min(limits.outbound_window)),
            replayed: 0,
            limits,
            subscriptions: BTreeMap::new(),
            aliases: Vec::new(),
            settling: HashMap::new(),
            unsettled: 0,
            unreleased: HashSet::new(),
            in_flight: BTreeMap::new(),
            last_packet_id: 0,
            replays: VecDeque::new(),
            live_first: false,
            subscribing: None,
            queue: None,
            is_mpyblox: false,
            is_thing: false,
            closing: false,
            ended: None,
        }
    }

    /// For how many seconds a session is kept that is to be kept for `asked`.
    #[must_use]
    pub fn granted_expiry(asked: u32, limits: &Limits) -> u32 {
        asked.min(u32::try_from(limits.session_expiry.as_secs()).unwrap_or(u32::MAX))
    }

    /// Goes on where a session is that is kept beyond its connections.
    pub fn resume(&mut self, kept: Kept, effects: &mut Vec<Effect>) {
        self.unreleased = kept.unreleased.into_iter().collect();
        self.queue = Some(Box::new(Queue {
            waits: false,
            after: 0,
            sent: kept.sent,
            taken_ids: kept.taken_ids,
            replayed: Vec::new(),
        }));
        let mut lost = Vec::new();
        for (filter, Subscription { options, pending }) in kept.subscriptions {
            // Rights may have changed since.
            if !self.identity.may_subscribe(without_share(&filter)) {
                lost.push(filter);
                continue;
            }
            if let Some(pending) = pending {
                let after = match pending {
                    Pending::All => None,
                    Pending::After(topic) => Some(topic),
                };
                let filter = filter.clone();
                self.replays.push_back(Replay { filter, after, since: 0, options, catching_up: false });
            }
            self.subscriptions.insert(filter, options);
        }
        if !lost.is_empty() {
            let change = Change::Unsubscribe { packet_id: None, answer: Vec::new(), filters: lost };
            self.change(change, effects);
        }
    }

    /// Takes note that the client could not be heard until `now`, because the broker did not read.
    pub fn unheard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// When the client must have sent something, if ever.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.keep_alive.map(|keep_alive| self.heard + keep_alive)
    }

    /// Whether the session has room for another packet of the client.
    #[must_use]
    pub fn wants_packets(&self) -> bool {
        let has_room = self.unsettled < usize::from(self.limits.inbound_window);
        !self.closing && self.subscribing.is_none() && has_room
    }

    /// Whether nothing of the client waits for the index any more.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.unsettled == 0
    }

    /// Whether the client can take another message.
    #[must_use]
    pub fn wants_messages(&self) -> bool {
        !self.closing && self.in_flight.len() < self.window
    }

    /// Why the broker ended the session, if it did.
    #[must_use]
    pub fn ended(&self) -> Option<Reason> {
        self.ended
    }

    /// What is left to do. Ask once, when the connection has ended.
    pub fn leave(&mut self) -> Leaving {
        let mut will = self.will.take();
        let Some(queue) = self.queue.take() else { return Leaving { will, end: None } };
        let is_delayed = self.will_delay > 0 && self.expiry > 0;
        let delayed = if is_delayed { will.take() } else { None };
        let passed = queue.replayed.into_iter().map(|filter| (filter, None));
        let left = self.replays.drain(..).filter(|replay| !replay.catching_up);
        let left = left.map(|replay| {
            let pending = replay.after.map_or(Pending::All, Pending::After);
            (replay.filter, Some(pending))
        });
        let mut in_flight: Vec<_> = std::mem::take(&mut self.in_flight)
            .into_values()
            .filter_map(|flight| flight.kept.map(|kept| *kept))
            .collect();
        // In the order in which they were sent: ids go round.
        in_flight.sort_by_key(|sent| sent.packet_id <= self.last_packet_id);
        let end = End {
            expiry: self.expiry,
            sent: queue.after,
            will: delayed.map(|will| (will, self.will_delay)),
            in_flight,
            pending: passed.chain(left).collect(),
        };
        Leaving { will, end: Some(end) }
    }

    /// The filters of all subscriptions.
    pub fn filters(&self) -> impl Iterator<Item = &str> {
        self.subscriptions.keys().map(String::as_str)
    }

    /// Takes a packet of the client.
    pub fn packet(&mut self, now: Instant, packet: Packet, effects: &mut Vec<Effect>) {
        if self.closing {
            return;
        }
        self.heard = now;
        match packet {
            Packet::Connect(_) => self.end(Reason::ProtocolError, "a second CONNECT", effects),
            Packet::Publish(publish, alias) => self.publish(publish, alias, effects),
            Packet::PubAck(id) => self.acknowledged(id, effects),
            Packet::PubRec { id, refused } => self.received(id, refused, effects),
            Packet::PubRel(id) => {
                let is_known = self.unreleased.remove(&id);
                if is_known && self.queue.is_some() {
                    // Before the client uses the id for another message.
                    return self.change(Change::Released(id), effects);
                }
                let reason = if is_known { Reason::Success } else { Reason::PacketIdentifierNotFound };
                effects.push(Effect::Send(packet::pubcomp(self.version, id, reason)));
            }
            Packet::PubComp(id) => match self.in_flight.get(&id).map(|flight| flight.stage) {
                Some(Stage::Released) => self.done(id, effects),
                Some(_) => self.end(Reason::ProtocolError, "PUBCOMP without PUBREL", effects),
                None => {}
            },
            // What the client has published before it subscribes is then retained, and no live message. A kept
            // session's subscription takes its turn in the index anyway.
            Packet::Subscribe(subscribe) if self.queue.is_none() && self.unsettled > 0 => {
                self.subscribing = Some(Box::new(subscribe));
            }
            Packet::Subscribe(subscribe) => self.subscribe(subscribe, effects),
            Packet::Unsubscribe(unsubscribe) => self.unsubscribe(unsubscribe, effects),
            Packet::PingReq => effects.push(Effect::Send(packet::pingresp())),
            Packet::Disconnect { with_will, session_expiry } => {
                if let Some(asked) = session_expiry {
                    if self.expiry == 0 && asked > 0 {
                        // 3.14.2.2.2
                        let text = "a session that was to end cannot be kept";
                        return self.end(Reason::ProtocolError, text, effects);
                    }
                    self.expiry = Session::granted_expiry(asked, &self.limits);
                }
                if !with_will {
                    self.will = None; // [MQTT-3.1.2-10]
                }
                self.closing = true;
                effects.push(Effect::Close);
            }
        }
    }

    fn acknowledged(&mut self, id: u16, effects: &mut Vec<Effect>) {
        match self.in_flight.get(&id).map(|flight| flight.stage) {
            Some(Stage::Sent(Qos::AtLeastOnce)) => self.done(id, effects),
            Some(_) => self.end(Reason::ProtocolError, "PUBACK for a QoS 2 message", effects),
            None => {}
        }
    }

    fn received(&mut self, id: u16, refused: bool, effects: &mut Vec<Effect>) {
        let Some(flight) = self.in_flight.get_mut(&id) else {
            if refused {
                return; // [MQTT-4.3.3-4]: PUBREL answers only what is no refusal
            }
            let answer = packet::pubrel(self.version, id, Reason::PacketIdentifierNotFound);
            return effects.push(Effect::Send(answer));
        };
        match (flight.stage, flight.order) {
            (Stage::Sent(Qos::ExactlyOnce), _) if refused => return self.done(id, effects),
            (Stage::Sent(Qos::ExactlyOnce), Some(order)) => {
                flight.stage = Stage::Received;
                return self.change(Change::Received(order, id), effects);
            }
            (Stage::Sent(Qos::ExactlyOnce), None) => {
                flight.stage = Stage::Released;
                if let Some(kept) = &mut flight.kept {
                    kept.message = None;
                }
            }
            (Stage::Sent(_), _) => {
                return self.end(Reason::ProtocolError, "PUBREC for a QoS 1 message", effects);
            }
            (Stage::Received, _) => return,
            (Stage::Released, _) => {}
        }
        effects.push(Effect::Send(packet::pubrel(self.version, id, Reason::Success)));
    }

    /// The client has a message for good.
    fn done(&mut self, id: u16, effects: &mut Vec<Effect>) {
        let Some(flight) = self.in_flight.remove(&id) else { return };
        if let Some(order) = flight.order {
            effects.push(Effect::Change(Change::Acknowledged(order)));
        }
        self.finish_replays(effects);
    }

    /// Takes note of replays that need not be done again.
    fn finish_replays(&mut self, effects: &mut Vec<Effect>) {
        let Some(queue) = &mut self.queue else { return };
        if !queue.replayed.is_empty() && self.in_flight.values().all(|flight| flight.order.is_some()) {
            let filters = std::mem::take(&mut queue.replayed);
            effects.push(Effect::Change(Change::Replayed(filters)));
        }
    }

    /// Has the index change the session, which goes on when that is done.
    fn change(&mut self, change: Change, effects: &mut Vec<Effect>) {
        self.unsettled += 1;
        effects.push(Effect::Change(change));
    }

    /// Takes bytes that are no packet.
    pub fn bad_packet(&mut self, error: &PacketError, effects: &mut Vec<Effect>) {
        self.end(error.reason, &error.text, effects);
    }

    /// Takes what became of something that it asked for.
    pub fn settled(&mut self, settled: Settled, effects: &mut Vec<Effect>) {
        self.unsettled = self.unsettled.saturating_sub(1);
        if self.closing {
            return;
        }
        match settled {
            Settled::Published { packet_id, result } => self.published(packet_id, result, effects),
            Settled::Changed(change) => self.changed(change, effects),
        }
        if self.unsettled == 0
            && !self.closing
            && let Some(subscribe) = self.subscribing.take()
        {
            self.subscribe(*subscribe, effects);
        }
    }

    fn changed(&mut self, change: Change, effects: &mut Vec<Effect>) {
        match change {
            Change::Subscribe { packet_id, answer, subscriptions } => {
                effects.push(Effect::Send(packet::suback(self.version, packet_id, &answer)));
                for (filter, Subscription { options, pending }) in subscriptions {
                    if pending.is_some() && self.subscriptions.contains_key(&filter) {
                        self.replay(filter, options);
                    }
                }
            }
            Change::Unsubscribe { packet_id: Some(id), answer, .. } => {
                effects.push(Effect::Send(packet::unsuback(self.version, id, &answer)));
            }
            Change::Received(_, id) => {
                if let Some(flight) = self.in_flight.get_mut(&id) {
                    flight.stage = Stage::Released;
                    effects.push(Effect::Send(packet::pubrel(self.version, id, Reason::Success)));
                }
            }
            Change::Released(id) => {
                effects.push(Effect::Send(packet::pubcomp(self.version, id, Reason::Success)));
            }
            Change::Unsubscribe { .. } | Change::Replayed(_) | Change::Acknowledged(_) | Change::End(_) => {}
        }
    }

    fn published(&mut self, id: u16, result: Result<(), Refusal>, effects: &mut Vec<Effect>) {
        match (result, self.settling.remove(&id)) {
            (Ok(()), None | Some(Qos::AtMostOnce)) => {}
            // It is in the log; a device that was sent away would be deaf until somebody resets it.
            (Err(_), None | Some(Qos::AtMostOnce)) if self.is_mpyblox => {}
            (Ok(()), Some(Qos::AtLeastOnce)) => {
                effects.push(Effect::Send(packet::puback(self.version, id, Reason::Success, "")));
            }
            (Ok(()), Some(Qos::ExactlyOnce)) => {
                effects.push(Effect::Send(packet::pubrec(self.version, id, Reason::Success, "")));
            }
            // Without a reason code there is only one way not to claim success.
            (Err(refusal), None | Some(Qos::AtMostOnce)) => self.end(refusal.reason, &refusal.text, effects),
            (Err(refusal), _) if self.version == Version::V3 => {
                self.end(refusal.reason, &refusal.text, effects);
            }
            (Err(refusal), Some(Qos::AtLeastOnce)) => {
                let answer = self
                    .explain(&refusal.text, |text| packet::puback(self.version, id, refusal.reason, text));
                effects.push(Effect::Send(answer));
            }
            (Err(refusal), Some(Qos::ExactlyOnce)) => {
                self.unreleased.remove(&id);
                let answer = self
                    .explain(&refusal.text, |text| packet::pubrec(self.version, id, refusal.reason, text));
                effects.push(Effect::Send(answer));
            }
        }
    }

    /// Whether a live message may be older than what a replay has shown of its topic. If the index holds
    /// something newer, the client must not get this one: the newer one has come, or will.
    #[must_use]
    pub fn may_be_outdated(&self, message: &Message) -> bool {
        message.retain && message.version < self.replayed
    }

    /// Takes a live message for the client.
    pub fn deliver(&mut self, now: Now, delivery: &Delivery, effects: &mut Vec<Effect>) {
        let Delivery { message, qos, retain, identifiers } = delivery;
        let outgoing = Outgoing { message, qos: *qos, retain: *retain, identifiers, place: None };
        self.send(now, outgoing, effects);
    }

    /// Takes the news that messages wait in the session's queue.
    pub fn queue_waits(&mut self) {
        if let Some(queue) = &mut self.queue {
            queue.waits = true;
        }
    }

    /// After which place in its queue the session wants the next message, if it wants one.
    #[must_use]
    pub fn next_queued(&self) -> Option<u64> {
        self.queue.as_ref().filter(|queue| queue.waits).map(|queue| queue.after)
    }

    /// Takes the next message of its queue. One that `is_outdated` is not sent: the client has seen a newer one.
    pub fn queued(&mut self, now: Now, found: Option<Queued>, is_outdated: bool, effects: &mut Vec<Effect>) {
        let Some(queue) = &mut self.queue else { return };
        let Some(Queued { order, sent }) = found else {
            queue.waits = false;
            return;
        };
        queue.after = order;
        let id = sent.packet_id;
        let Some(message) = &sent.message else {
            self.in_flight.insert(id, Flight { stage: Stage::Released, order: Some(order), kept: None });
            return effects.push(Effect::Send(packet::pubrel(self.version, id, Reason::Success)));
        };
        let duplicate = order <= queue.sent;
        let outgoing = Outgoing {
            message,
            qos: sent.qos,
            retain: sent.retain,
            identifiers: &sent.identifiers,
            place: Some((order, id, duplicate)),
        };
        // Rights may have changed since it was put there.
        let is_wanted = !is_outdated && self.identity.may_subscribe(&message.topic);
        if !is_wanted || !self.send(now, outgoing, effects) {
            effects.push(Effect::Change(Change::Acknowledged(order)));
        }
    }

    /// Which retained message the session wants next. Live messages and replays take turns; `live` says
    /// whether a live one waits.
    pub fn next_replay(&mut self, live: bool) -> Option<Replay> {
        self.live_first = !self.live_first;
        if live && self.live_first {
            return None;
        }
        self.replays.pop_front()
    }

    /// Takes what the index said to a replay.
    pub fn replayed(&mut self, now: Now, mut replay: Replay, found: Step, effects: &mut Vec<Effect>) {
        let is_exact = !replay.filter.contains(['+', '#']);
        match found {
            Step::End => return self.replay_ended(replay, effects),
            Step::Later(after) => replay.after = Some(after),
            Step::Found(message) => {
                let retain = !replay.catching_up || replay.options.retain_as_published;
                let qos = message.qos.min(replay.options.qos);
                // What a kept session missed at QoS 1 and 2 waits in its queue.
                let is_queued = replay.catching_up && self.queue.is_some() && qos > Qos::AtMostOnce;
                if !is_queued {
                    self.replayed = self.replayed.max(message.version);
                    let identifiers: Vec<_> = replay.options.identifier.into_iter().collect();
                    let identifiers = &identifiers;
                    let outgoing = Outgoing { message: &message, qos, retain, identifiers, place: None };
                    self.send(now, outgoing, effects);
                }
                replay.after = Some(message.topic.to_string());
            }
        }
        match is_exact {
            // An exact filter is answered once.
            true => self.replay_ended(replay, effects),
            false => self.replays.push_front(replay),
        }
    }

    fn replay_ended(&mut self, replay: Replay, effects: &mut Vec<Effect>) {
        if let Some(queue) = &mut self.queue
            && !replay.catching_up
        {
            queue.replayed.push(replay.filter);
            self.finish_replays(effects);
        }
    }

    /// Takes the news that retained messages changed after `since` were left out: reads them again.
    pub fn lagging(&mut self, since: u64) {
        // A replay under way reads each message as it is then, but has passed some topics already.
        for (filter, options) in &self.subscriptions {
            if topic::split_shared(filter).is_some() {
                continue; // a message that did not fit there ended the connection
            }
            let waiting = self
                .replays
                .iter_mut()
                .find(|replay| replay.catching_up && replay.after.is_none() && replay.filter == *filter);
            match waiting {
                Some(replay) => replay.since = replay.since.min(since),
                None => self.replays.push_back(Replay {
                    filter: filter.clone(),
                    after: None,
                    since,
                    options: *options,
                    catching_up: true,
                }),
            }
        }
    }

    /// Takes the time.
    pub fn tick(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.end(Reason::KeepAliveTimeout, "nothing heard for one and a half keep-alives", effects);
        }
    }

    /// Ends the session from the broker's side; the will is published.
    pub fn end(&mut self, reason: Reason, text: &str, effects: &mut Vec<Effect>) {
        if self.closing {
            return;
        }
        tracing::info!(client = self.client_id, ?reason, "closing: {text}");
        self.closing = true;
        self.ended = Some(reason);
        // 3.1.2.11.7: here a reason string is allowed even if the client asked for none.
        let with_text = packet::disconnect(self.version, reason, text);
        effects.push(Effect::Send(match with_text.len() as u64 > self.largest {
            true => packet::disconnect(self.version, reason, ""),
            false => with_text,
        }));
        effects.push(Effect::Close);
    }

    fn publish(&mut self, mut publish: Publish, alias: Option<u16>, effects: &mut Vec<Effect>) {
        if let Err((reason, text)) = self.resolve(&mut publish, alias) {
            return self.end(reason, text, effects);
        }
        if self.is_own_info(&publish.topic) && !publish.payload.is_empty() {
            // What a node is and has is kept, also of those that cannot say so: Mpy-BLOX never sets the flag.
            publish.retain = true;
            effects.push(Effect::Introduce(publish.payload.clone()));
        }
        let id = publish.packet_id;
        match publish.qos {
            // 4.3.3: a QoS 2 message that is still unreleased is the same message again.
            Qos::ExactlyOnce if self.unreleased.contains(&id) => {
                if !self.settling.contains_key(&id) {
                    effects.push(Effect::Send(packet::pubrec(self.version, id, Reason::Success, "")));
                }
                return;
            }
            // Some 3.1.1 clients send again while they wait.
            Qos::AtLeastOnce if publish.duplicate && self.settling.get(&id) == Some(&publish.qos) => return,
            Qos::AtLeastOnce | Qos::ExactlyOnce if self.settling.contains_key(&id) => {
                return self.end(Reason::PacketIdentifierInUse, "a packet id that is in use", effects);
            }
            Qos::ExactlyOnce if self.unreleased.len() >= self.most_unreleased() => {
                return self.end(Reason::ReceiveMaximumExceeded, "too many unreleased messages", effects);
            }
            Qos::ExactlyOnce => {
                self.unreleased.insert(id);
            }
            _ => {}
        }
        if publish.qos != Qos::AtMostOnce {
            self.settling.insert(id, publish.qos);
        }
        self.unsettled += 1;
        if self.is_thing && link::is_ours(&publish.topic) {
            return effects.push(Effect::Face(publish));
        }
        effects.push(match self.identity.may_publish(&publish.topic) {
            true => Effect::Admit(publish),
            false => {
                let text = format!("{} may not publish to `{}`", self.identity, publish.topic);
                Effect::Deny(publish, Refusal::new(Reason::NotAuthorized, text))
            }
        });
    }

    /// Whether a topic is where this client says what it is and has.
    fn is_own_info(&self, topic: &str) -> bool {
        let node = topic.strip_suffix("/info").and_then(|topic| topic.strip_prefix(topic::NODES));
        node.is_some_and(|node| node == self.client_id)
    }

    /// Takes the news that the client runs Mpy-BLOX, or that it does not.
    pub fn runs_mpyblox(&mut self, is_mpyblox: bool) {
        self.is_mpyblox = is_mpyblox;
    }

    /// Takes the news that the client speaks ThingsBoard's device API.
    pub fn speaks_to_face(&mut self) {
        self.is_thing = true;
    }

    /// Whether the client subscribed to `topic`.
    #[must_use]
    pub fn listens_to(&self, topic: &str) -> bool {
        self.filters().any(|filter| topic::matches(filter, topic))
    }

    /// The largest payload that an answer of a face may have, in bytes.
    #[must_use]
    pub fn largest_answer(&self) -> u64 {
        /// Of everything around it: the header, a face's topic, no properties.
        const AROUND: u64 = 128;
        self.largest.min(self.limits.packet as u64).saturating_sub(AROUND)
    }

    /// Sends an answer of a face, at QoS 0 and whatever the client subscribed to.
    pub fn answer(&mut self, topic: &str, content: Part, effects: &mut Vec<Effect>) {
        let head = packet::Head {
            topic,
            qos: Qos::AtMostOnce,
            retain: false,
            duplicate: false,
            packet_id: 0,
            properties: &Properties::default(),
            expiry: None,
            identifiers: &[],
        };
        let head = head.to_bytes(self.version, content.len());
        if head.len() as u64 + content.len() > self.largest {
            // [MQTT-3.1.2-25]
            tracing::debug!(client = self.client_id, topic, "an answer larger than the client takes");
            return;
        }
        effects.push(Effect::Answer(head, content));
    }

    /// Reads the lists of all its channels again.
    pub fn read_channels_again(&mut self) {
        let channels: Vec<_> =
            self.channels().map(|filter| (filter.to_owned(), self.subscriptions[filter])).collect();
        channels.into_iter().for_each(|(filter, options)| self.replay(filter, options));
    }

    /// The topics of all channels that it follows.
    pub fn channels(&self) -> impl Iterator<Item = &str> {
        self.filters().filter(|filter| filter.starts_with(topic::CHANNELS) && !filter.contains(['+', '#']))
    }

    /// Puts the topic in for its alias: 3.3.2.3.4.
    fn resolve(&mut self, publish: &mut Publish, alias: Option<u16>) -> Result<(), (Reason, &'static str)> {
        let Some(alias) = alias else {
            return match publish.topic.is_empty() && self.version == Version::V5 {
                true => Err((Reason::ProtocolError, "a message without topic and alias")),
                false => Ok(()),
            };
        };
        if alias == 0 || alias > self.limits.topic_aliases {
            return Err((Reason::TopicAliasInvalid, "a topic alias beyond the maximum"));
        }
        let at = usize::from(alias) - 1;
        if publish.topic.is_empty() {
            publish.topic = self.aliases.get(at).cloned().unwrap_or_default();
            return match publish.topic.is_empty() {
                true => Err((Reason::ProtocolError, "a topic alias that stands for nothing")),
                false => Ok(()),
            };
        }
        if publish.topic.len() > mpypi_protocol::limits::TOPIC {
            return Err((Reason::TopicNameInvalid, "a topic that is too long"));
        }
        if self.aliases.len() <= at {
            self.aliases.resize(at + 1, String::new());
        }
        self.aliases[at].clone_from(&publish.topic);
        Ok(())
    }

    /// 3.1.1 has no receive maximum: its clients may have far more under way than we settle at once.
    fn most_unreleased(&self) -> usize {
        match self.version {
            Version::V3 => self.limits.unreleased,
            Version::V5 => usize::from(self.limits.inbound_window),
        }
    }

    /// What `encode` makes of `text`; without it if the client wants no reasons, or none as long.
    fn explain(&self, text: &str, encode: impl Fn(&str) -> Bytes) -> Bytes {
        let packet = encode(if self.wants_problems { text } else { "" });
        // [MQTT-3.4.2-2], [MQTT-3.5.2-2]
        if packet.len() as u64 > self.largest { encode("") } else { packet }
    }

    fn subscribe(&mut self, subscribe: Subscribe, effects: &mut Vec<Effect>) {
        if subscribe.filters.len() > self.limits.subscriptions {
            return self.end(Reason::QuotaExceeded, "more filters at once than one client may have", effects);
        }
        // All of them before any counts.
        for (filter, options) in &subscribe.filters {
            if options.no_local && topic::split_shared(filter).is_some() {
                // [MQTT-3.8.3-4]
                return self.end(Reason::ProtocolError, "a shared subscription without local", effects);
            }
            if let Err(error) = topic::check_filter(filter)
                && self.is_violation(&error)
            {
                return self.end(Reason::MalformedPacket, &error.to_string(), effects);
            }
        }
        let mut answer = Vec::with_capacity(subscribe.filters.len());
        let mut accepted = Vec::new();
        for (filter, options) in subscribe.filters {
            let is_new = !self.subscriptions.contains_key(&filter);
            let is_shared = topic::split_shared(&filter).is_some();
            let is_face = self.is_thing && link::is_filter(&filter);
            let verdict = if topic::check_filter(&filter).is_err() {
                Err(Reason::TopicFilterInvalid)
            } else if is_face && (!is_new || self.subscriptions.len() < self.limits.subscriptions) {
                // ThingsBoard's maximum. Nobody but the face sends anything there.
                self.subscriptions.insert(filter, options);
                answer.push(Ok(options.qos.min(Qos::AtLeastOnce)));
                continue;
            } else if !self.identity.may_subscribe(without_share(&filter)) {
                tracing::info!(client = self.client_id, filter, "{} may not subscribe", self.identity);
                Err(Reason::NotAuthorized)
            } else if is_new && self.subscriptions.len() >= self.limits.subscriptions {
                Err(Reason::QuotaExceeded)
            } else {
                Ok(options.qos)
            };
            answer.push(verdict);
            if verdict.is_ok() {
                self.subscriptions.insert(filter.clone(), options);
                let wanted = match options.retain_handling {
                    // 4.8.2: those who share get no retained messages.
                    _ if is_shared => false,
                    RetainHandling::Send => true,
                    RetainHandling::SendIfNew => is_new,
                    RetainHandling::DoNotSend => false,
                };
                accepted.push((filter, Subscription { options, pending: wanted.then_some(Pending::All) }));
            }
        }
        let packet_id = subscribe.packet_id;
        if self.queue.is_some() {
            // What is retained now comes when the index knows of the subscription.
            return self.change(Change::Subscribe { packet_id, answer, subscriptions: accepted }, effects);
        }
        // Live first: what changes between the two is then seen twice, never missed.
        for (filter, subscription) in &accepted {
            effects.push(Effect::Subscribe(filter.clone(), subscription.options));
        }
        effects.push(Effect::Send(packet::suback(self.version, packet_id, &answer)));
        for (filter, subscription) in accepted {
            if subscription.pending.is_some() {
                self.replay(filter, subscription.options);
            }
        }
    }

    /// Whether a filter is one that no client may send, which ends the connection (4.13.1; in 3.1.1
    /// [MQTT-4.8.0-1]); all others are merely refused. 3.1.1 knows no shared subscriptions.
    fn is_violation(&self, error: &TopicError) -> bool {
        match error {
            TopicError::Empty | TopicError::Wildcard { .. } => true, // [MQTT-4.7.3-1], [MQTT-4.7.1-1]
            TopicError::Shared { .. } => self.version == Version::V5, // [MQTT-4.8.2-1]
            _ => false,
        }
    }

    /// Has the retained messages of a subscription sent, from the first on.
    fn replay(&mut self, filter: String, options: SubscriptionOptions) {
        self.replays.retain(|replay| replay.filter != filter || replay.catching_up);
        self.replays.push_back(Replay { filter, after: None, since: 0, options, catching_up: false });
    }

    fn unsubscribe(&mut self, unsubscribe: Unsubscribe, effects: &mut Vec<Effect>) {
        // All of them before any counts: who is gone from here is not looked for when the connection ends.
        for filter in &unsubscribe.filters {
            if let Err(error) = topic::check_filter(filter)
                && self.is_violation(&error)
            {
                return self.end(Reason::MalformedPacket, &error.to_string(), effects);
            }
        }
        let mut answer = Vec::with_capacity(unsubscribe.filters.len());
        let mut filters = Vec::new();
        for filter in unsubscribe.filters {
            if self.subscriptions.remove(&filter).is_none() {
                answer.push(Reason::NoSubscriptionExisted);
                continue;
            }
            self.replays.retain(|replay| replay.filter != filter);
            answer.push(Reason::Success);
            filters.push(filter);
        }
        let packet_id = unsubscribe.packet_id;
        if self.queue.is_some() && !filters.is_empty() {
            let change = Change::Unsubscribe { packet_id: Some(packet_id), answer, filters };
            return self.change(change, effects);
        }
        effects.extend(filters.into_iter().map(Effect::Unsubscribe));
        effects.push(Effect::Send(packet::unsuback(self.version, packet_id, &answer)));
    }

    /// Sends a message, and says whether it did: not one that has expired, or is larger than the client takes.
    fn send(&mut self, now: Now, outgoing: Outgoing<'_>, effects: &mut Vec<Effect>) -> bool {
        let Outgoing { message, qos, retain, identifiers, place } = outgoing;
        // 3.3.2.3.3: what is left, in seconds.
        let left = message.expires_ms.map(|expires| expires.saturating_sub(now.unix_ms).div_ceil(1000));
        if left == Some(0) {
            return false;
        }
        let (packet_id, duplicate) = match place {
            Some((_, id, duplicate)) => (id, duplicate),
            None if qos == Qos::AtMostOnce => (0, false),
            None => (self.free_packet_id(), false),
        };
        let head = packet::Head {
            topic: &message.topic,
            qos,
            retain,
            duplicate,
            packet_id,
            properties: &message.properties,
            expiry: left.map(|left| u32::try_from(left).unwrap_or(u32::MAX)),
            identifiers,
        };
        let size = message.payload.len();
        let head = head.to_bytes(self.version, size);
        if head.len() as u64 + size > self.largest {
            // [MQTT-3.1.2-25]: as if it had been sent.
            tracing::debug!(client = self.client_id, topic = &*message.topic, "larger than the client takes");
            return false;
        }
        if packet_id != 0 {
            let kept = (self.queue.is_some() && place.is_none()).then(|| {
                let (message, identifiers) = (Some(message.clone()), identifiers.to_vec());
                Box::new(InFlight { packet_id, message, qos, retain, identifiers })
            });
            let order = place.map(|(order, ..)| order);
            self.in_flight.insert(packet_id, Flight { stage: Stage::Sent(qos), order, kept });
        }
        effects.push(Effect::Deliver(head, message.payload.clone()));
        true
    }

    /// A packet id that is not in use. There is one: the window is far smaller than the number of ids.
    fn free_packet_id(&mut self) -> u16 {
        // The ids up to there are those of messages in the queue.
        let (first, taken) = match &self.queue {
            Some(queue) => (QUEUE_IDS + 1, &*queue.taken_ids),
            None => (1, &[][..]),
        };
        loop {
            self.last_packet_id = self.last_packet_id.checked_add(1).unwrap_or(first).max(first);
            let id = self.last_packet_id;
            if !self.in_flight.contains_key(&id) && !taken.contains(&id) {
                return id;
            }
        }
    }
}

/// A message on its way out.
struct Outgoing<'m> {
    message: &'m Message,
    qos: Qos,
    retain: bool,
    identifiers: &'m [NonZeroU32],
    /// Its place in the queue, its packet id, and whether it was perhaps sent before.
    place: Option<(u64, u16, bool)>,
}

/// The filter of a subscription, shared or not.
fn without_share(filter: &str) -> &str {
    topic::split_shared(filter).map_or(filter, |(_, filter)| filter)
}

#[cfg(test)]
mod tests;
