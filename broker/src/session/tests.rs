//! A session, driven by hand.

use proptest::prelude::*;

use super::*;
use crate::clock;

struct Driven {
    session: Session,
    now: Now,
}

fn connect(version: Version) -> Connect {
    Connect {
        version,
        client_id: "c".to_owned(),
        clean_start: true,
        keep_alive: 10,
        will: Some(publish("will", Qos::AtLeastOnce, 0)),
        receive_maximum: u16::MAX,
        maximum_packet_size: None,
        user: None,
        password: None,
        wants_auth_exchange: false,
        wants_problems: true,
    }
}

fn publish(topic: &str, qos: Qos, packet_id: u16) -> Publish {
    Publish {
        topic: topic.to_owned(),
        payload: Bytes::from_static(b"x"),
        qos,
        retain: false,
        packet_id,
        duplicate: false,
        properties: Default::default(),
    }
}

fn message(topic: &str, version: u64) -> Message {
    Message {
        topic: topic.into(),
        payload: Payload::Inline(Bytes::from_static(b"x")),
        qos: Qos::AtLeastOnce,
        retain: version > 0,
        properties: Default::default(),
        expires_ms: None,
        origin: None,
        version,
    }
}

fn subscribe(filter: &str, retain_handling: RetainHandling) -> Packet {
    let options = SubscriptionOptions {
        qos: Qos::ExactlyOnce,
        no_local: false,
        retain_as_published: false,
        retain_handling,
    };
    Packet::Subscribe(Subscribe {
        packet_id: 9,
        has_identifier: false,
        filters: vec![(filter.to_owned(), options)],
    })
}

impl Driven {
    fn new(version: Version) -> Driven {
        Driven::with(&connect(version))
    }

    fn with(connect: &Connect) -> Driven {
        let now = clock::now();
        let identity = Identity::Anyone;
        let session =
            Session::new(SessionId(1), "c".to_owned(), identity, connect, Limits::default(), now.instant);
        Driven { session, now }
    }

    fn packet(&mut self, packet: Packet) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.session.packet(self.now.instant, packet, &mut effects);
        effects
    }

    fn settled(&mut self, packet_id: u16, result: Result<(), Reason>) -> Vec<Effect> {
        let mut effects = Vec::new();
        let result = result.map_err(|reason| Refusal::new(reason, "because"));
        self.session.settled(Settled { packet_id, result }, &mut effects);
        effects
    }

    fn deliver(&mut self, message: Message) -> Vec<Effect> {
        let mut effects = Vec::new();
        let delivery = Delivery { qos: message.qos, retain: false, message: message.into() };
        self.session.deliver(self.now, &delivery, &mut effects);
        effects
    }

    fn wait(&mut self, seconds: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.now.instant += Duration::from_secs(seconds);
        self.session.tick(self.now.instant, &mut effects);
        effects
    }

    /// Answers replays from `index` until there is none; the topics sent.
    fn replay(&mut self, index: &[Message]) -> Vec<String> {
        let mut sent = Vec::new();
        while let Some(replay) = self.session.next_replay(false) {
            let found = index
                .iter()
                .filter(|message| topic::matches(&replay.filter, &message.topic))
                .filter(|message| message.version > replay.since)
                .find(|message| replay.after.as_deref().is_none_or(|after| &*message.topic > after));
            let found = found.cloned().map_or(Step::End, Step::Found);
            if let Step::Found(message) = &found {
                sent.push(message.topic.to_string());
            }
            self.session.replayed(self.now, replay, found, &mut Vec::new());
        }
        sent
    }
}

fn closes(effects: &[Effect]) -> bool {
    effects.contains(&Effect::Close)
}

fn sent(effects: &[Effect]) -> Vec<&[u8]> {
    let bytes = effects.iter().filter_map(|effect| match effect {
        Effect::Send(bytes) if !bytes.is_empty() => Some(&bytes[..]),
        _ => None,
    });
    bytes.collect()
}

#[test]
fn a_message_is_acknowledged_when_the_index_has_settled_it_and_not_before() {
    let mut driven = Driven::new(Version::V3);
    let message = publish("t", Qos::AtLeastOnce, 7);
    assert_eq!(driven.packet(Packet::Publish(message.clone())), [Effect::Admit(message)]);
    assert_eq!(sent(&driven.settled(7, Ok(()))), [[0x40, 2, 0, 7]]);
}

#[test]
fn a_refusal_is_a_reason_in_mqtt_5_and_the_end_in_3_1_1() {
    let refuse = |version, qos| {
        let mut driven = Driven::new(version);
        driven.packet(Packet::Publish(publish("t", qos, 7)));
        driven.settled(7, Err(Reason::PayloadFormatInvalid))
    };
    for qos in [Qos::AtLeastOnce, Qos::ExactlyOnce] {
        let answer = refuse(Version::V3, qos);
        assert!(closes(&answer) && sent(&answer).is_empty(), "nothing that looks like success");
        let answer = refuse(Version::V5, qos);
        assert!(!closes(&answer));
        assert_eq!(sent(&answer)[0][2..5], [0, 7, 0x99]);
    }
    for version in [Version::V3, Version::V5] {
        assert!(closes(&refuse(version, Qos::AtMostOnce)));
    }
}

#[test]
fn reasons_stay_out_of_acknowledgements_for_a_client_that_wants_none_but_not_out_of_disconnect() {
    let mut driven = Driven::with(&Connect { wants_problems: false, ..connect(Version::V5) });
    for (id, qos) in [(1, Qos::AtLeastOnce), (2, Qos::ExactlyOnce)] {
        driven.packet(Packet::Publish(publish("t", qos, id)));
        let answer = driven.settled(id, Err(Reason::PayloadFormatInvalid));
        assert_eq!(sent(&answer)[0][1..], [4, 0, id as u8, 0x99, 0]);
    }
    let end = driven.packet(Packet::Connect(connect(Version::V5).into()));
    assert!(sent(&end)[0].len() > 4, "3.1.2.11.7 allows it there");
}

#[test]
fn no_reason_makes_a_packet_larger_than_the_client_takes() {
    let mut driven = Driven::with(&Connect { maximum_packet_size: Some(8), ..connect(Version::V5) });
    driven.packet(Packet::Publish(publish("t", Qos::AtLeastOnce, 1)));
    assert_eq!(sent(&driven.settled(1, Err(Reason::QuotaExceeded)))[0].len(), 6);
    let mut effects = Vec::new();
    driven.session.end(Reason::ProtocolError, "a long explanation", &mut effects);
    assert_eq!(sent(&effects)[0].len(), 4);
}

#[test]
fn a_qos_2_message_is_admitted_once_until_it_is_released() {
    let mut driven = Driven::new(Version::V3);
    let message = publish("t", Qos::ExactlyOnce, 7);
    assert_eq!(driven.packet(Packet::Publish(message.clone())).len(), 1);
    assert!(driven.packet(Packet::Publish(message.clone())).is_empty(), "the PUBREC is under way");
    assert_eq!(sent(&driven.settled(7, Ok(()))), [[0x50, 2, 0, 7]]);
    assert_eq!(sent(&driven.packet(Packet::Publish(message.clone()))), [[0x50, 2, 0, 7]]);
    assert_eq!(sent(&driven.packet(Packet::PubRel(7))), [[0x70, 2, 0, 7]]);
    assert_eq!(driven.packet(Packet::Publish(message.clone())), [Effect::Admit(message)]);
}

#[test]
fn after_a_refusing_pubrec_the_packet_id_is_free() {
    let mut driven = Driven::new(Version::V5);
    let message = publish("t", Qos::ExactlyOnce, 7);
    driven.packet(Packet::Publish(message.clone()));
    driven.settled(7, Err(Reason::QuotaExceeded));
    assert_eq!(driven.packet(Packet::Publish(message.clone())), [Effect::Admit(message)]);
    let mut driven = Driven::new(Version::V5);
    assert_eq!(sent(&driven.packet(Packet::PubRel(3)))[0][2..5], [0, 3, 0x92]);
}

#[test]
fn a_3_1_1_client_may_have_more_qos_2_messages_under_way_than_are_settled_at_once() {
    let mut driven = Driven::new(Version::V3);
    for id in 1..=200 {
        assert!(!closes(&driven.packet(Packet::Publish(publish("t", Qos::ExactlyOnce, id)))), "{id}");
        driven.settled(id, Ok(()));
    }
    let mut driven = Driven::new(Version::V5);
    let closed = (1..=200).find(|id| {
        let closed = closes(&driven.packet(Packet::Publish(publish("t", Qos::ExactlyOnce, *id))));
        driven.settled(*id, Ok(()));
        closed
    });
    assert_eq!(closed, Some(65), "an MQTT 5 client was told a receive maximum of 64");
}

#[test]
fn a_duplicate_while_the_first_is_under_way_is_answered_once() {
    let mut driven = Driven::new(Version::V3);
    driven.packet(Packet::Publish(publish("t", Qos::AtLeastOnce, 7)));
    let again = Publish { duplicate: true, ..publish("t", Qos::AtLeastOnce, 7) };
    assert!(driven.packet(Packet::Publish(again)).is_empty());
    assert_eq!(sent(&driven.settled(7, Ok(()))).len(), 1);
    driven.packet(Packet::Publish(publish("t", Qos::AtLeastOnce, 7)));
    assert!(closes(&driven.packet(Packet::Publish(publish("u", Qos::AtLeastOnce, 7)))), "not a duplicate");
}

#[test]
fn nothing_is_read_while_the_window_is_full() {
    let mut driven = Driven::new(Version::V3);
    for id in 1..=64 {
        assert!(driven.session.wants_packets());
        driven.packet(Packet::Publish(publish("t", Qos::AtLeastOnce, id)));
    }
    assert!(!driven.session.wants_packets());
    driven.settled(1, Ok(()));
    assert!(driven.session.wants_packets());
}

#[test]
fn no_more_is_sent_than_the_client_said_it_takes_unacknowledged() {
    let mut driven = Driven::with(&Connect { receive_maximum: 2, ..connect(Version::V5) });
    for _ in 0..2 {
        assert!(driven.session.wants_messages());
        assert_eq!(driven.deliver(message("t", 0)).len(), 1);
    }
    assert!(!driven.session.wants_messages());
    driven.packet(Packet::PubAck(99));
    assert!(!driven.session.wants_messages(), "nobody has that id");
    driven.packet(Packet::PubAck(1));
    assert!(driven.session.wants_messages());
}

#[test]
fn a_message_larger_than_the_client_takes_is_left_out_and_holds_no_packet_id() {
    let mut driven =
        Driven::with(&Connect { maximum_packet_size: Some(20), receive_maximum: 1, ..connect(Version::V5) });
    assert!(driven.deliver(message(&"t".repeat(30), 0)).is_empty());
    assert!(driven.session.wants_messages());
    assert_eq!(driven.deliver(message("t", 0)).len(), 1);
}

#[test]
fn silence_for_one_and_a_half_keep_alives_ends_the_session_and_keeps_the_will() {
    let mut driven = Driven::new(Version::V5);
    assert!(driven.wait(14).is_empty());
    driven.packet(Packet::PingReq);
    assert!(driven.wait(14).is_empty());
    let end = driven.wait(1);
    assert!(closes(&end));
    assert_eq!(sent(&end)[0][2], 0x8d);
    assert!(driven.session.take_will().is_some());
    let mut forever = Driven::with(&Connect { keep_alive: 0, ..connect(Version::V5) });
    assert!(forever.wait(1_000_000).is_empty());
}

#[test]
fn a_client_that_the_broker_does_not_read_is_not_silent() {
    let mut driven = Driven::new(Version::V5);
    driven.now.instant += Duration::from_secs(100);
    driven.session.unheard(driven.now.instant);
    assert!(driven.wait(14).is_empty());
    assert!(closes(&driven.wait(1)));
}

#[test]
fn a_will_is_forgotten_by_a_plain_disconnect_only() {
    let mut driven = Driven::new(Version::V5);
    assert_eq!(driven.packet(Packet::Disconnect { with_will: true }), [Effect::Close]);
    assert!(driven.session.take_will().is_some());
    let mut driven = Driven::new(Version::V5);
    driven.packet(Packet::Disconnect { with_will: false });
    assert!(driven.session.take_will().is_none());
    assert!(driven.packet(Packet::PingReq).is_empty(), "nothing after a DISCONNECT");
}

#[test]
fn what_a_client_must_not_send_ends_the_session() {
    for packet in [
        Packet::Connect(connect(Version::V5).into()),
        Packet::PubRec(1),
        Packet::PubComp(1),
        Packet::Subscribe(Subscribe { packet_id: 1, has_identifier: true, filters: Vec::new() }),
    ] {
        for version in [Version::V3, Version::V5] {
            let mut driven = Driven::new(version);
            assert!(closes(&driven.packet(packet.clone())), "{packet:?}");
            assert!(driven.session.take_will().is_some());
            assert!(driven.packet(Packet::PingReq).is_empty());
        }
    }
}

#[test]
fn each_filter_of_a_subscribe_is_answered_for_itself_and_live_messages_come_first() {
    let mut driven = Driven::new(Version::V5);
    let options = SubscriptionOptions {
        qos: Qos::ExactlyOnce,
        no_local: false,
        retain_as_published: false,
        retain_handling: RetainHandling::Send,
    };
    let filters = ["a/#", "a/#/b", "$share/g/a"].map(|filter| (filter.to_owned(), options));
    let effects = driven.packet(Packet::Subscribe(Subscribe {
        packet_id: 9,
        has_identifier: false,
        filters: filters.into(),
    }));
    assert!(matches!(&effects[0], Effect::Subscribe(filter, _) if filter == "a/#"));
    assert_eq!(sent(&effects), [[0x90, 6, 0, 9, 0, 1, 0x8f, 0x9e]]);
    assert_eq!(driven.replay(&[message("a/b", 1), message("b", 2)]), ["a/b"]);
}

#[test]
fn subscriptions_beyond_the_limit_are_refused_and_too_many_at_once_end_the_session() {
    let mut driven = Driven::new(Version::V5);
    for n in 0..1024 {
        driven.packet(subscribe(&format!("a/{n}"), RetainHandling::DoNotSend));
    }
    let refused = driven.packet(subscribe("a/1024", RetainHandling::DoNotSend));
    assert_eq!(sent(&refused)[0].last(), Some(&0x97));
    let again = driven.packet(subscribe("a/7", RetainHandling::DoNotSend));
    assert_eq!(sent(&again)[0].last(), Some(&1), "one it has already");
    let Packet::Subscribe(mut storm) = subscribe("a", RetainHandling::Send) else { panic!() };
    storm.filters = vec![storm.filters[0].clone(); 1025];
    assert!(closes(&driven.packet(Packet::Subscribe(storm))));
}

#[test]
fn retain_handling_says_when_retained_messages_are_sent() {
    let index = [message("a", 1)];
    let mut driven = Driven::new(Version::V5);
    driven.packet(subscribe("a", RetainHandling::DoNotSend));
    assert!(driven.replay(&index).is_empty());
    driven.packet(subscribe("a", RetainHandling::SendIfNew));
    assert!(driven.replay(&index).is_empty());
    driven.packet(subscribe("a", RetainHandling::Send));
    assert_eq!(driven.replay(&index), ["a"]);
    driven.packet(subscribe("b", RetainHandling::SendIfNew));
    assert!(driven.replay(&[message("b", 1)]) == ["b"]);
}

#[test]
fn unsubscribing_stops_replays_and_says_what_was_not_there() {
    let mut driven = Driven::new(Version::V5);
    driven.packet(subscribe("a/+", RetainHandling::Send));
    let filters = vec!["a/+".to_owned(), "never".to_owned()];
    let effects = driven.packet(Packet::Unsubscribe(Unsubscribe { packet_id: 5, filters }));
    assert_eq!(effects[0], Effect::Unsubscribe("a/+".to_owned()));
    assert_eq!(effects.len(), 2, "what was not there costs nothing");
    assert_eq!(sent(&effects), [[0xb0, 5, 0, 5, 0, 0, 0x11]]);
    assert!(driven.replay(&[message("a/b", 1)]).is_empty());
}

#[test]
fn who_lags_reads_again_what_changed_since_also_what_a_replay_under_way_has_passed() {
    let mut driven = Driven::new(Version::V5);
    driven.packet(subscribe("a/+", RetainHandling::Send));
    let replay = driven.session.next_replay(false).unwrap();
    driven.session.replayed(driven.now, replay, Step::Found(message("a/m", 5)), &mut Vec::new());
    driven.session.lagging(8);
    driven.session.lagging(7);
    let index = [message("a/a", 8), message("a/b", 3), message("a/z", 9)];
    assert_eq!(driven.replay(&index), ["a/z", "a/a", "a/z"]);
}

#[test]
fn a_live_message_is_doubted_if_a_replay_has_shown_a_newer_version_of_anything() {
    let mut driven = Driven::new(Version::V5);
    assert!(!driven.session.may_be_outdated(&message("a", 1)));
    driven.packet(subscribe("#", RetainHandling::Send));
    driven.replay(&[message("a", 5)]);
    assert!(driven.session.may_be_outdated(&message("a", 4)));
    assert!(!driven.session.may_be_outdated(&message("a", 5)));
    assert!(!driven.session.may_be_outdated(&message("a", 0)), "not retained");
}

#[test]
fn an_expiry_is_what_is_left_and_what_has_expired_is_not_sent() {
    let mut driven = Driven::new(Version::V5);
    let mut kept = message("t", 1);
    kept.properties.expiry = Some(100);
    kept.expires_ms = Some(driven.now.unix_ms + 1_500);
    let effects = driven.deliver(kept.clone());
    let [Effect::Deliver(head, _)] = &effects[..] else { panic!("{effects:?}") };
    assert!(head.ends_with(&[5, 2, 0, 0, 0, 2]), "two seconds: {head:?}");
    driven.now.unix_ms += 1_500;
    assert!(driven.deliver(kept).is_empty());
}

proptest! {
    #[test]
    fn packet_ids_in_use_are_never_given_again(
        acknowledgements in prop::collection::vec(prop::option::of(1..80_u16), 1..300)
    ) {
        let mut driven = Driven::new(Version::V3);
        let mut in_use = HashSet::new();
        for acknowledged in acknowledgements {
            if let Some(id) = acknowledged {
                driven.packet(Packet::PubAck(id));
                in_use.remove(&id);
            } else if driven.session.wants_messages() {
                let effects = driven.deliver(message("t", 0));
                let [Effect::Deliver(head, _)] = &effects[..] else { panic!() };
                let id = u16::from_be_bytes([head[head.len() - 2], head[head.len() - 1]]);
                prop_assert!(id != 0 && in_use.insert(id));
            }
        }
    }
}
