//! One client's session: packets and time in, effects out. No socket, no clock, no index.
//!
//! The connection feeds it with packets, with what became of the client's messages, and with messages for
//! the client; it carries out the effects in order.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use mpypi_protocol::topic;

use crate::{
    access::Identity,
    clock::Now,
    index::{Step, writer::Settled},
    limits::Limits,
    mailbox::Delivery,
    message::{Message, Payload, Refusal, SessionId},
    packet::{
        self, Connect, Packet, PacketError, Publish, Qos, Reason, RetainHandling, Subscribe,
        SubscriptionOptions, Unsubscribe, Version,
    },
};

/// The state of one client's session, from CONNECT to the end of its connection.
#[derive(Debug)]
pub struct Session {
    /// Tells it from all others.
    pub id: SessionId,
    /// The protocol it speaks.
    pub version: Version,
    /// The client's id.
    pub client_id: String,
    identity: Identity,
    limits: Limits,
    keep_alive: Option<Duration>,
    heard: Instant,
    will: Option<Publish>,
    largest: u64,
    wants_problems: bool,
    window: usize,
    /// The newest version of the index that a replay has shown to the client.
    replayed: u64,
    subscriptions: BTreeMap<String, SubscriptionOptions>,
    /// QoS of the client's messages that the index has not settled.
    settling: HashMap<u16, Qos>,
    unsettled: usize,
    /// QoS 2 messages of the client that it has not released.
    unreleased: HashSet<u16>,
    /// QoS 1 messages to the client that it has not acknowledged.
    unacknowledged: HashSet<u16>,
    last_packet_id: u16,
    replays: VecDeque<Replay>,
    live_first: bool,
    closing: bool,
}

/// What the connection is to do for the session.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send these bytes.
    Send(Bytes),
    /// Send a PUBLISH: its head, then its payload.
    Deliver(Bytes, Payload),
    /// Hand a message of the client to the door.
    Admit(Publish),
    /// Answer a message of the client with this refusal, in its turn.
    Deny(Publish, Refusal),
    /// Make live messages of this filter arrive.
    Subscribe(String, SubscriptionOptions),
    /// Stop live messages of this filter.
    Unsubscribe(String),
    /// Send everything, then close.
    Close,
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
        limits: Limits,
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
            largest: connect.maximum_packet_size.map_or(u64::MAX, u64::from),
            wants_problems: connect.wants_problems,
            window: usize::from(connect.receive_maximum.min(limits.outbound_window)),
            replayed: 0,
            limits,
            subscriptions: BTreeMap::new(),
            settling: HashMap::new(),
            unsettled: 0,
            unreleased: HashSet::new(),
            unacknowledged: HashSet::new(),
            last_packet_id: 0,
            replays: VecDeque::new(),
            live_first: false,
            closing: false,
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
        !self.closing && self.unsettled < usize::from(self.limits.inbound_window)
    }

    /// Whether nothing of the client waits for the index any more.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.unsettled == 0
    }

    /// Whether the client can take another message.
    #[must_use]
    pub fn wants_messages(&self) -> bool {
        !self.closing && self.unacknowledged.len() < self.window
    }

    /// The will, if it is still to be published. Ask once the connection has ended.
    pub fn take_will(&mut self) -> Option<Publish> {
        self.will.take()
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
            Packet::Publish(publish) => self.publish(publish, effects),
            Packet::PubAck(id) => {
                self.unacknowledged.remove(&id);
            }
            // We never send at QoS 2.
            Packet::PubRec(_) | Packet::PubComp(_) => {
                self.end(Reason::ProtocolError, "nothing was sent at QoS 2", effects);
            }
            Packet::PubRel(id) => {
                let reason = match self.unreleased.remove(&id) {
                    true => Reason::Success,
                    false => Reason::PacketIdentifierNotFound,
                };
                effects.push(Effect::Send(packet::pubcomp(self.version, id, reason)));
            }
            Packet::Subscribe(subscribe) => self.subscribe(subscribe, effects),
            Packet::Unsubscribe(unsubscribe) => self.unsubscribe(unsubscribe, effects),
            Packet::PingReq => effects.push(Effect::Send(packet::pingresp())),
            Packet::Disconnect { with_will } => {
                if !with_will {
                    self.will = None; // [MQTT-3.1.2-10]
                }
                self.closing = true;
                effects.push(Effect::Close);
            }
        }
    }

    /// Takes bytes that are no packet.
    pub fn bad_packet(&mut self, error: &PacketError, effects: &mut Vec<Effect>) {
        self.end(error.reason, &error.text, effects);
    }

    /// Takes what became of a message of the client.
    pub fn settled(&mut self, settled: Settled, effects: &mut Vec<Effect>) {
        self.unsettled = self.unsettled.saturating_sub(1);
        if self.closing {
            return;
        }
        let id = settled.packet_id;
        match (settled.result, self.settling.remove(&id)) {
            (Ok(()), None | Some(Qos::AtMostOnce)) => {}
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
        self.send(now, &delivery.message, delivery.qos, delivery.retain, effects);
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
        match found {
            Step::End => return,
            Step::Later(after) => replay.after = Some(after),
            Step::Found(message) => {
                let retain = !replay.catching_up || replay.options.retain_as_published;
                let qos = message.qos.min(replay.options.qos);
                self.replayed = self.replayed.max(message.version);
                self.send(now, &message, qos, retain, effects);
                replay.after = Some(message.topic.to_string());
            }
        }
        // An exact filter is answered once.
        if replay.filter.contains(['+', '#']) {
            self.replays.push_front(replay);
        }
    }

    /// Takes the news that retained messages changed after `since` were left out: reads them again.
    pub fn lagging(&mut self, since: u64) {
        // A replay under way reads each message as it is then, but has passed some topics already.
        for (filter, options) in &self.subscriptions {
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
        // 3.1.2.11.7: here a reason string is allowed even if the client asked for none.
        let with_text = packet::disconnect(self.version, reason, text);
        effects.push(Effect::Send(match with_text.len() as u64 > self.largest {
            true => packet::disconnect(self.version, reason, ""),
            false => with_text,
        }));
        effects.push(Effect::Close);
    }

    fn publish(&mut self, publish: Publish, effects: &mut Vec<Effect>) {
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
        effects.push(match self.identity.may_publish(&publish.topic) {
            true => Effect::Admit(publish),
            false => {
                let text = format!("{} may not publish to `{}`", self.identity, publish.topic);
                Effect::Deny(publish, Refusal::new(Reason::NotAuthorized, text))
            }
        });
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
        if subscribe.has_identifier {
            // 3.2.2.3.12: CONNACK said that they are not available.
            let text = "subscription identifiers were not offered";
            return self.end(Reason::SubscriptionIdentifiersNotSupported, text, effects);
        }
        if subscribe.filters.len() > self.limits.subscriptions {
            return self.end(Reason::QuotaExceeded, "more filters at once than one client may have", effects);
        }
        let mut granted = Vec::with_capacity(subscribe.filters.len());
        let mut accepted = Vec::new();
        for (filter, mut options) in subscribe.filters {
            options.qos = options.qos.min(Qos::AtLeastOnce);
            let is_new = !self.subscriptions.contains_key(&filter);
            let verdict = if filter.starts_with("$share/") {
                Err(Reason::SharedSubscriptionsNotSupported)
            } else if topic::check_filter(&filter).is_err() {
                Err(Reason::TopicFilterInvalid)
            } else if !self.identity.may_subscribe(&filter) {
                tracing::info!(client = self.client_id, filter, "{} may not subscribe", self.identity);
                Err(Reason::NotAuthorized)
            } else if is_new && self.subscriptions.len() >= self.limits.subscriptions {
                Err(Reason::QuotaExceeded)
            } else {
                Ok(options.qos)
            };
            granted.push(verdict);
            if verdict.is_ok() {
                self.subscriptions.insert(filter.clone(), options);
                accepted.push((filter, options, is_new));
            }
        }
        // Live first: what changes between the two is then seen twice, never missed.
        for (filter, options, _) in &accepted {
            effects.push(Effect::Subscribe(filter.clone(), *options));
        }
        effects.push(Effect::Send(packet::suback(self.version, subscribe.packet_id, &granted)));
        for (filter, options, is_new) in accepted {
            let wanted = match options.retain_handling {
                RetainHandling::Send => true,
                RetainHandling::SendIfNew => is_new,
                RetainHandling::DoNotSend => false,
            };
            if wanted {
                self.replays.retain(|replay| replay.filter != filter || replay.catching_up);
                self.replays.push_back(Replay { filter, after: None, since: 0, options, catching_up: false });
            }
        }
    }

    fn unsubscribe(&mut self, unsubscribe: Unsubscribe, effects: &mut Vec<Effect>) {
        let mut reasons = Vec::with_capacity(unsubscribe.filters.len());
        for filter in unsubscribe.filters {
            if self.subscriptions.remove(&filter).is_none() {
                reasons.push(Reason::NoSubscriptionExisted);
                continue;
            }
            self.replays.retain(|replay| replay.filter != filter);
            reasons.push(Reason::Success);
            effects.push(Effect::Unsubscribe(filter));
        }
        effects.push(Effect::Send(packet::unsuback(self.version, unsubscribe.packet_id, &reasons)));
    }

    fn send(&mut self, now: Now, message: &Message, qos: Qos, retain: bool, effects: &mut Vec<Effect>) {
        let mut properties = message.properties.clone();
        if let Some(expires) = message.expires_ms {
            // 3.3.2.3.3: what is left, in seconds.
            let left = expires.saturating_sub(now.unix_ms).div_ceil(1000);
            if left == 0 {
                return;
            }
            properties.expiry = Some(u32::try_from(left).unwrap_or(u32::MAX));
        }
        let qos = qos.min(Qos::AtLeastOnce);
        let id = if qos == Qos::AtMostOnce { 0 } else { self.free_packet_id() };
        let size = message.payload.len();
        let head = packet::publish_head(self.version, &message.topic, qos, retain, id, &properties, size);
        if head.len() as u64 + size > self.largest {
            // [MQTT-3.1.2-25]: as if it had been sent.
            tracing::debug!(client = self.client_id, topic = &*message.topic, "larger than the client takes");
            return;
        }
        if id != 0 {
            self.unacknowledged.insert(id);
        }
        effects.push(Effect::Deliver(head, message.payload.clone()));
    }

    /// A packet id that is not in use. There is one: the window is far smaller than the number of ids.
    fn free_packet_id(&mut self) -> u16 {
        loop {
            self.last_packet_id = self.last_packet_id.checked_add(1).unwrap_or(1);
            if !self.unacknowledged.contains(&self.last_packet_id) {
                return self.last_packet_id;
            }
        }
    }
}

#[cfg(test)]
mod tests;
