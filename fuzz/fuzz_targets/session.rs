//! One client's session: packets, answers of the index, messages, replays and time in any order that a connection
//! could feed them in.

#![no_main]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use arbitrary::Arbitrary;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mpypi_broker::{
    Limits,
    access::Identity,
    clock::{self, Now},
    index::{
        Step,
        sessions::{Change, InFlight, Kept, QUEUE_IDS, Queued},
        writer::Settled,
    },
    mailbox::{Delivery, Mailbox},
    message::{Message, Payload, Refusal, SessionId},
    packet::{
        Connect, Packet, Publish, Qos, Reason, RetainHandling, Subscribe, SubscriptionOptions, Unsubscribe,
        Version,
    },
    session::{Effect, Session},
};

#[derive(Debug, Arbitrary)]
struct Input {
    v5: bool,
    keep_alive: u8,
    receive_maximum: u8,
    largest: Option<u8>,
    has_will: bool,
    /// Whether the session is kept beyond its connection, and what QoS 2 messages it has not released.
    kept: Option<Vec<u8>>,
    wants_problems: bool,
    steps: Vec<Event>,
}

#[derive(Debug, Arbitrary)]
enum Event {
    Publish {
        topic: u8,
        alias: Option<u8>,
        qos: u8,
        id: u8,
        retain: bool,
        duplicate: bool,
    },
    /// These acknowledge the `nth` message that is in flight, or one that is not.
    PubAck(u8),
    PubRec {
        nth: u8,
        refused: bool,
    },
    PubRel(u8),
    PubComp(u8),
    Subscribe {
        id: u8,
        filters: Vec<(u8, u8)>,
    },
    Unsubscribe {
        id: u8,
        filters: Vec<u8>,
    },
    PingReq,
    Disconnect {
        with_will: bool,
        session_expiry: Option<u8>,
    },
    Connect,
    /// The index settles what it was asked first.
    Settle {
        refused: bool,
    },
    Deliver {
        topic: u8,
        qos: u8,
        retain: bool,
        version: u8,
        expires: Option<u8>,
    },
    /// The connection asks which retained message is wanted, and finds one, none, or none so far.
    Replay {
        live: bool,
        found: u8,
        version: u8,
    },
    /// A message is put into the kept session's queue in the index.
    Enqueue {
        topic: u8,
        qos: u8,
        is_received: bool,
    },
    /// The connection reads that queue.
    Queue {
        is_outdated: bool,
    },
    Lagging(u8),
    Wait(u8),
    End,
}

/// Small, so that a few events reach them.
fn limits() -> Limits {
    Limits { inbound_window: 4, unreleased: 6, outbound_window: 3, subscriptions: 4, ..Limits::default() }
}

/// Topics and filters, good and bad ones.
const TOPICS: [&str; 6] = ["a", "a/b", "mpypi/channels/dev", "é/x", "$SYS/x", ""];
const FILTERS: [&str; 9] = ["a", "a/b", "#", "a/+", "+/#", "a/#/b", "$share/g/a", "", "é/#"];

/// One reading of the clock for the whole run: the same input always does the same.
static START: LazyLock<Now> = LazyLock::new(clock::now);

fn qos(number: u8) -> Qos {
    Qos::from_number(number % 3).expect("0, 1 or 2")
}

fn pick<'t>(from: &[&'t str], n: u8) -> &'t str {
    from[usize::from(n) % from.len()]
}

fn publish(topic: u8, level: u8, id: u8, retain: bool, duplicate: bool) -> Publish {
    let qos = qos(level);
    Publish {
        topic: pick(&TOPICS, topic).to_owned(),
        payload: Bytes::from_static(b"payload"),
        qos,
        retain,
        // What the decoder lets through.
        packet_id: if qos == Qos::AtMostOnce { 0 } else { small(id) },
        duplicate: duplicate && qos != Qos::AtMostOnce,
        properties: Default::default(),
    }
}

/// What the index was asked for, and has not done.
enum Asked {
    Message(u16, Qos),
    Change(Change),
}

/// How far a message to the client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Sent(u8),
    Released,
}

/// Few packet ids, so that they meet again.
fn small(id: u8) -> u16 {
    u16::from(id % 8) + 1
}

fn message(topic: u8, level: u8, retain: bool, version: u8, expires_ms: Option<u64>) -> Message {
    Message {
        topic: pick(&TOPICS, topic).into(),
        payload: Payload::Inline(Bytes::from_static(b"payload")),
        qos: qos(level),
        retain,
        properties: Default::default(),
        expires_ms,
        origin: None,
        version: u64::from(version),
    }
}

/// What a careful observer knows of the session.
struct Observer {
    limits: Arc<Limits>,
    version: Version,
    is_kept: bool,
    window: usize,
    largest: u64,
    asked: VecDeque<Asked>,
    /// Messages to the client that it has not acknowledged.
    in_flight: BTreeMap<u16, Stage>,
    /// The kept session's queue, by place.
    queue: BTreeMap<u64, InFlight>,
    last_place: u64,
    filters: BTreeSet<String>,
    closed: bool,
}

impl Observer {
    /// Looks at the effects of one event; `owed` is the answer that must be among them unless the session ends.
    fn watch(&mut self, effects: &[Effect], owed: Option<(u8, u16)>) {
        let mut answered = 0;
        for effect in effects {
            assert!(!self.closed, "{effect:?} after the end");
            match effect {
                Effect::Send(bytes) => {
                    let Some((first, id)) = answer(bytes) else { continue };
                    // A QoS 2 message that comes again is answered again; what nobody knows is answered, too.
                    assert!(first != 0x40 || owed == Some((first, id)), "{first:#x} {id} was not owed");
                    answered += usize::from(owed == Some((first, id)));
                    if let (0x62, Some(stage)) = (first, self.in_flight.get_mut(&id)) {
                        *stage = Stage::Released;
                    }
                }
                Effect::Deliver(head, payload) => {
                    assert!(
                        head.len() as u64 + payload.len() <= self.largest,
                        "larger than the client takes"
                    );
                    self.deliver(head);
                }
                Effect::Admit(publish) | Effect::Deny(publish, _) => {
                    assert!(self.version == Version::V3 || !publish.topic.is_empty(), "no topic");
                    self.ask(Asked::Message(publish.packet_id, publish.qos));
                }
                Effect::Change(change) => self.change(change),
                Effect::Subscribe(filter, _) => self.subscribe(filter),
                Effect::Unsubscribe(filter) => assert!(self.filters.remove(filter), "{filter} was not there"),
                Effect::Introduce(_) => {}
                // Only a device of ThingsBoard's does, and nobody said that this client is one.
                Effect::Face(_) | Effect::Answer(..) => panic!("this client speaks to no face: {effect:?}"),
                Effect::Close => self.closed = true,
            }
        }
        if let (Some(owed), false) = (owed, self.closed) {
            assert_eq!(answered, 1, "{owed:x?} was owed: {effects:?}");
        }
    }

    fn ask(&mut self, asked: Asked) {
        self.asked.push_back(asked);
        assert!(self.asked.len() <= usize::from(self.limits.inbound_window));
    }

    fn subscribe(&mut self, filter: &str) {
        self.filters.insert(filter.to_owned());
        assert!(self.filters.len() <= self.limits.subscriptions);
    }

    fn change(&mut self, change: &Change) {
        match change {
            Change::Subscribe { subscriptions, .. } => {
                subscriptions.iter().for_each(|(filter, _)| self.subscribe(filter));
            }
            Change::Unsubscribe { filters, .. } => {
                filters
                    .iter()
                    .for_each(|filter| assert!(self.filters.remove(filter), "{filter} was not there"));
            }
            Change::Acknowledged(order) => {
                assert!(self.queue.remove(order).is_some(), "{order} was taken before");
            }
            Change::Received(order, id) => {
                assert_eq!(self.queue[order].packet_id, *id);
                assert!(self.in_flight.contains_key(id), "PUBREC to nothing");
            }
            Change::Replayed(filters) => assert!(!filters.is_empty()),
            Change::Released(_) => {}
            Change::End(_) => panic!("only a connection that has ended says so"),
        }
        if change.is_answered() {
            self.ask(Asked::Change(change.clone()));
        }
    }

    fn fly(&mut self, id: u16, stage: Stage) {
        assert!(id != 0 && self.in_flight.insert(id, stage).is_none(), "packet id {id} twice");
        assert!(self.in_flight.len() <= self.window, "more in flight than the window");
    }

    /// The id of a message that is in flight, or one that is none.
    fn nth(&self, nth: u8) -> u16 {
        self.in_flight.keys().nth(usize::from(nth % 8)).copied().unwrap_or_else(|| small(nth))
    }

    fn deliver(&mut self, head: &[u8]) {
        let level = head[0] >> 1 & 3;
        if level == 0 {
            return;
        }
        let header = 1 + head[1..].iter().position(|byte| byte & 0x80 == 0).expect("a length") + 1;
        let topic = usize::from(u16::from_be_bytes([head[header], head[header + 1]]));
        let at = header + 2 + topic;
        let id = u16::from_be_bytes([head[at], head[at + 1]]);
        self.fly(id, Stage::Sent(level));
    }
}

/// The first byte and the packet id of what answers or goes on with something.
fn answer(bytes: &[u8]) -> Option<(u8, u16)> {
    let [first @ (0x40 | 0x50 | 0x62 | 0x70 | 0x90 | 0xb0), rest @ ..] = bytes else { return None };
    let header = rest.iter().position(|byte| byte & 0x80 == 0)? + 1;
    Some((*first, u16::from_be_bytes([*rest.get(header)?, *rest.get(header + 1)?])))
}

fuzz_target!(|input: Input| {
    let limits = Arc::new(limits());
    let version = if input.v5 { Version::V5 } else { Version::V3 };
    let connect = Connect {
        version,
        client_id: "c".to_owned(),
        clean_start: input.kept.is_none(),
        session_expiry: if input.kept.is_some() { 100 } else { 0 },
        will_delay: u32::from(input.keep_alive % 2),
        keep_alive: u16::from(input.keep_alive),
        will: input.has_will.then(|| publish(1, 1, 0, true, false)),
        receive_maximum: u16::from(input.receive_maximum).max(1),
        maximum_packet_size: input.largest.map(|size| u32::from(size).max(1)),
        user: None,
        password: None,
        wants_auth_exchange: false,
        wants_problems: input.wants_problems,
    };
    let mut now = *START;
    let mut session =
        Session::new(SessionId(1), "c".to_owned(), Identity::Anyone, &connect, limits.clone(), now.instant);
    if let Some(unreleased) = &input.kept {
        let kept = Kept {
            id: SessionId::kept(1),
            present: true,
            mailbox: Arc::new(Mailbox::new(&limits)),
            subscriptions: Vec::new(),
            unreleased: unreleased.iter().take(limits.unreleased).map(|id| small(*id)).collect(),
            sent: 2,
            taken_ids: vec![QUEUE_IDS + 2],
        };
        session.resume(kept, &mut Vec::new());
    }
    let mut observer = Observer {
        version,
        is_kept: input.kept.is_some(),
        window: usize::from(connect.receive_maximum.min(limits.outbound_window)),
        largest: connect.maximum_packet_size.map_or(u64::MAX, u64::from),
        limits,
        asked: VecDeque::new(),
        in_flight: BTreeMap::new(),
        queue: BTreeMap::new(),
        last_place: 0,
        filters: BTreeSet::new(),
        closed: false,
    };
    for event in input.steps {
        step(event, &mut session, &mut observer, &mut now);
        assert_eq!(session.is_settled(), observer.asked.is_empty());
        assert!(session.filters().eq(observer.filters.iter().map(String::as_str)));
        assert!(!observer.closed || !(session.wants_packets() || session.wants_messages()));
    }
    let left = session.leave();
    assert!(left.will.is_none() || input.has_will);
    assert_eq!(left.end.is_some(), observer.is_kept);
    if let Some(end) = left.end {
        assert!(end.will.is_none() || input.has_will && left.will.is_none(), "a will twice");
        let ids: BTreeSet<_> = end.in_flight.iter().map(|sent| sent.packet_id).collect();
        assert_eq!(ids.len(), end.in_flight.len(), "packet ids twice");
        let past: BTreeSet<_> = observer.in_flight.keys().copied().filter(|id| *id > QUEUE_IDS).collect();
        assert_eq!(ids, past, "what was sent past the queue and not acknowledged");
    }
    let again = session.leave();
    assert!(again.will.is_none() && again.end.is_none());
});

fn step(event: Event, session: &mut Session, observer: &mut Observer, now: &mut Now) {
    let mut effects = Vec::new();

    let packet = match event {
        Event::Publish { topic, alias, qos, id, retain, duplicate } => {
            let alias = alias.filter(|_| observer.version == Version::V5).map(u16::from);
            Packet::Publish(publish(topic, qos, id, retain, duplicate), alias)
        }
        Event::PubAck(nth) => Packet::PubAck(observer.nth(nth)),
        Event::PubRec { nth, refused } => Packet::PubRec { id: observer.nth(nth), refused },
        Event::PubRel(id) => Packet::PubRel(small(id)),
        Event::PubComp(nth) => Packet::PubComp(observer.nth(nth)),
        Event::Subscribe { id, filters } => Packet::Subscribe(Subscribe {
            packet_id: small(id),
            filters: filters
                .into_iter()
                .map(|(filter, options)| {
                    let options = SubscriptionOptions {
                        qos: qos(options),
                        no_local: options & 4 != 0,
                        retain_as_published: options & 8 != 0,
                        retain_handling: match options >> 4 & 3 {
                            0 => RetainHandling::SendIfNew,
                            1 => RetainHandling::DoNotSend,
                            _ => RetainHandling::Send,
                        },
                        identifier: None,
                    };
                    (pick(&FILTERS, filter).to_owned(), options)
                })
                .collect(),
        }),
        Event::Unsubscribe { id, filters } => Packet::Unsubscribe(Unsubscribe {
            packet_id: small(id),
            filters: filters.into_iter().map(|filter| pick(&FILTERS, filter).to_owned()).collect(),
        }),
        Event::PingReq => Packet::PingReq,
        Event::Disconnect { with_will, session_expiry } => {
            Packet::Disconnect { with_will, session_expiry: session_expiry.map(u32::from) }
        }
        Event::Connect => return session_end(session, observer, effects),
        Event::Settle { refused } => {
            let Some(asked) = observer.asked.pop_front() else { return };
            let owed = match &asked {
                Asked::Message(_, Qos::AtMostOnce) => None,
                Asked::Message(id, Qos::AtLeastOnce) => Some((0x40, *id)),
                Asked::Message(id, Qos::ExactlyOnce) => Some((0x50, *id)),
                Asked::Change(Change::Subscribe { packet_id, .. }) => Some((0x90, *packet_id)),
                Asked::Change(Change::Unsubscribe { packet_id, .. }) => packet_id.map(|id| (0xb0, id)),
                Asked::Change(Change::Received(_, id)) => Some((0x62, *id)),
                Asked::Change(Change::Released(id)) => Some((0x70, *id)),
                Asked::Change(change) => panic!("{change:?} needs no answer"),
            };
            let settled = match asked {
                Asked::Message(packet_id, _) if refused => {
                    let result = Err(Refusal::new(Reason::QuotaExceeded, "because"));
                    Settled::Published { packet_id, result }
                }
                Asked::Message(packet_id, _) => Settled::Published { packet_id, result: Ok(()) },
                Asked::Change(change) => Settled::Changed(change),
            };
            session.settled(settled, &mut effects);
            // It may have been closed before: then nothing is said.
            return observer.watch(&effects, owed.filter(|_| !observer.closed));
        }
        Event::Deliver { topic, qos: level, retain, version, expires } => {
            if session.wants_messages() {
                let expires = expires.map(|seconds| now.unix_ms + u64::from(seconds) * 1000);
                let message = message(topic, level, retain, version, expires);
                let _ = session.may_be_outdated(&message);
                let identifiers = Vec::new();
                let delivery = Delivery { qos: qos(level), retain, message: message.into(), identifiers };
                session.deliver(*now, &delivery, &mut effects);
            }
            return observer.watch(&effects, None);
        }
        Event::Replay { live, found, version } => {
            if session.wants_messages()
                && let Some(replay) = session.next_replay(live)
            {
                assert!(observer.filters.contains(&replay.filter), "a replay of what was unsubscribed");
                let found = match found % 4 {
                    0 => Step::End,
                    1 => Step::Later("a".to_owned()),
                    _ => Step::Found(message(found, found >> 2, true, version, None)),
                };
                session.replayed(*now, replay, found, &mut effects);
            }
            return observer.watch(&effects, None);
        }
        Event::Enqueue { topic, qos: level, is_received } => {
            if observer.is_kept && observer.last_place < u64::from(QUEUE_IDS) {
                observer.last_place += 1;
                let place = observer.last_place;
                let message = (!is_received).then(|| message(topic, level, false, 0, None));
                let qos = if is_received { Qos::ExactlyOnce } else { qos(level).max(Qos::AtLeastOnce) };
                let packet_id = u16::try_from(place).expect("a place for each id");
                let identifiers = Vec::new();
                observer
                    .queue
                    .insert(place, InFlight { packet_id, message, qos, retain: false, identifiers });
                session.queue_waits();
            }
            return;
        }
        Event::Queue { is_outdated } => {
            if session.wants_messages()
                && let Some(after) = session.next_queued()
            {
                let next = observer.queue.range(after + 1..).next();
                let next = next.map(|(order, sent)| Queued { order: *order, sent: sent.clone() });
                if let Some(Queued { sent, .. }) = &next
                    && sent.message.is_none()
                {
                    // It goes on with PUBREL where an earlier connection left it.
                    observer.fly(sent.packet_id, Stage::Sent(2));
                }
                session.queued(*now, next, is_outdated, &mut effects);
            }
            return observer.watch(&effects, None);
        }
        Event::Lagging(since) => return session.lagging(u64::from(since)),
        Event::Wait(seconds) => {
            now.instant += Duration::from_secs(u64::from(seconds));
            now.unix_ms += u64::from(seconds) * 1000;
            let due: Option<Instant> = session.deadline();
            session.tick(now.instant, &mut effects);
            let is_late = due.is_some_and(|due| due <= now.instant);
            observer.watch(&effects, None);
            assert!(!is_late || observer.closed, "late, and still there");
            return;
        }
        Event::End => return session_end(session, observer, effects),
    };
    // A connection reads no further than the session wants.
    if !session.wants_packets() {
        return;
    }
    let ended = match &packet {
        Packet::PubAck(id) => Some((*id, Stage::Sent(1))),
        Packet::PubRec { id, refused: true } => Some((*id, Stage::Sent(2))),
        Packet::PubComp(id) => Some((*id, Stage::Released)),
        _ => None,
    };
    // Once it has said PUBREC, and the index is to know it, a refusal comes too late.
    let is_received =
        |asked: &Asked, id| matches!(asked, Asked::Change(Change::Received(_, known)) if *known == id);
    if let Some((id, stage)) = ended
        && observer.in_flight.get(&id) == Some(&stage)
        && !observer.asked.iter().any(|asked| is_received(asked, id))
    {
        observer.in_flight.remove(&id);
    }
    session.packet(now.instant, packet, &mut effects);
    observer.watch(&effects, None);
}

fn session_end(session: &mut Session, observer: &mut Observer, mut effects: Vec<Effect>) {
    session.end(Reason::SessionTakenOver, "because", &mut effects);
    observer.watch(&effects, None);
    assert!(observer.closed, "ended, and still there");
}
