//! One client's session: packets, answers of the index, messages, replays and time in any order that a connection
//! could feed them in.

#![no_main]

use std::{
    collections::{BTreeSet, VecDeque},
    sync::LazyLock,
    time::{Duration, Instant},
};

use arbitrary::Arbitrary;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mpypi_broker::{
    Limits,
    access::Identity,
    clock::{self, Now},
    index::{Step, writer::Settled},
    mailbox::Delivery,
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
    wants_problems: bool,
    steps: Vec<Event>,
}

#[derive(Debug, Arbitrary)]
enum Event {
    Publish {
        topic: u8,
        qos: u8,
        id: u8,
        retain: bool,
        duplicate: bool,
    },
    PubAck(u8),
    PubRec(u8),
    PubRel(u8),
    PubComp(u8),
    Subscribe {
        id: u8,
        filters: Vec<(u8, u8)>,
        has_identifier: bool,
    },
    Unsubscribe {
        id: u8,
        filters: Vec<u8>,
    },
    PingReq,
    Disconnect {
        with_will: bool,
    },
    Connect,
    /// The index settles the next message.
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
    limits: Limits,
    version: Version,
    window: usize,
    largest: u64,
    /// QoS of the messages handed to the index, with their ids, oldest first.
    settling: VecDeque<(u16, Qos)>,
    /// Messages to the client that it has not acknowledged.
    in_flight: BTreeSet<u16>,
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
                    // MQTT 3.1.1 has no DISCONNECT from a broker: nothing is sent then.
                    if let [first @ (0x40 | 0x50), _, high, low, ..] = bytes[..] {
                        let answer = (first, u16::from_be_bytes([high, low]));
                        assert!(owed == Some(answer) || first == 0x50, "{answer:x?} was not owed");
                        answered += usize::from(owed == Some(answer));
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
                    self.settling.push_back((publish.packet_id, publish.qos));
                    assert!(self.settling.len() <= usize::from(self.limits.inbound_window));
                }
                Effect::Subscribe(filter, _) => {
                    self.filters.insert(filter.clone());
                    assert!(self.filters.len() <= self.limits.subscriptions);
                }
                Effect::Unsubscribe(filter) => assert!(self.filters.remove(filter), "{filter} was not there"),
                Effect::Close => self.closed = true,
            }
        }
        if let (Some(owed), false) = (owed, self.closed) {
            assert_eq!(answered, 1, "{owed:x?} was owed: {effects:?}");
        }
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
        assert!(id != 0 && self.in_flight.insert(id), "packet id {id} twice");
        assert!(self.in_flight.len() <= self.window, "more in flight than the window");
    }
}

fuzz_target!(|input: Input| {
    let limits = limits();
    let version = if input.v5 { Version::V5 } else { Version::V3 };
    let connect = Connect {
        version,
        client_id: "c".to_owned(),
        clean_start: true,
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
    let mut observer = Observer {
        version,
        window: usize::from(connect.receive_maximum.min(limits.outbound_window)),
        largest: connect.maximum_packet_size.map_or(u64::MAX, u64::from),
        limits,
        settling: VecDeque::new(),
        in_flight: BTreeSet::new(),
        filters: BTreeSet::new(),
        closed: false,
    };
    for event in input.steps {
        step(event, &mut session, &mut observer, &mut now);
        assert_eq!(session.is_settled(), observer.settling.is_empty());
        assert!(session.filters().eq(observer.filters.iter().map(String::as_str)));
        assert!(!observer.closed || !(session.wants_packets() || session.wants_messages()));
    }
    // Whoever ends properly has no will; taken once, it is gone.
    assert!(session.take_will().is_none() || input.has_will);
    assert!(session.take_will().is_none());
});

fn step(event: Event, session: &mut Session, observer: &mut Observer, now: &mut Now) {
    let mut effects = Vec::new();
    let mut owed = None;
    let packet = match event {
        Event::Publish { topic, qos, id, retain, duplicate } => {
            Packet::Publish(publish(topic, qos, id, retain, duplicate))
        }
        Event::PubAck(id) => Packet::PubAck(small(id)),
        Event::PubRec(id) => Packet::PubRec(small(id)),
        Event::PubRel(id) => Packet::PubRel(small(id)),
        Event::PubComp(id) => Packet::PubComp(small(id)),
        Event::Subscribe { id, filters, has_identifier } => Packet::Subscribe(Subscribe {
            packet_id: small(id),
            has_identifier: has_identifier && observer.version == Version::V5,
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
        Event::Disconnect { with_will } => Packet::Disconnect { with_will },
        Event::Connect => return session_end(session, observer, effects),
        Event::Settle { refused } => {
            let Some((packet_id, qos)) = observer.settling.pop_front() else { return };
            let result = match refused {
                true => Err(Refusal::new(Reason::QuotaExceeded, "because")),
                false => Ok(()),
            };
            session.settled(Settled { packet_id, result }, &mut effects);
            owed = match qos {
                Qos::AtMostOnce => None,
                Qos::AtLeastOnce => Some((0x40, packet_id)),
                Qos::ExactlyOnce => Some((0x50, packet_id)),
            };
            // It may have been closed before: then nothing is said.
            owed = owed.filter(|_| !observer.closed);
            return observer.watch(&effects, owed);
        }
        Event::Deliver { topic, qos: level, retain, version, expires } => {
            if session.wants_messages() {
                let expires = expires.map(|seconds| now.unix_ms + u64::from(seconds) * 1000);
                let message = message(topic, level, retain, version, expires);
                session.may_be_outdated(&message);
                let delivery = Delivery { qos: qos(level), retain, message: message.into() };
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
    if let Packet::PubAck(id) = &packet {
        observer.in_flight.remove(id);
    }
    session.packet(now.instant, packet, &mut effects);
    observer.watch(&effects, None);
}

fn session_end(session: &mut Session, observer: &mut Observer, mut effects: Vec<Effect>) {
    session.end(Reason::SessionTakenOver, "because", &mut effects);
    observer.watch(&effects, None);
    assert!(observer.closed, "ended, and still there");
}
