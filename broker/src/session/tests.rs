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
        session_expiry: 0,
        keep_alive: 10,
        will: Some(publish("will", Qos::AtLeastOnce, 0)),
        will_delay: 0,
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
        identifier: None,
    };
    Packet::Subscribe(Subscribe { packet_id: 9, filters: vec![(filter.to_owned(), options)] })
}

impl Driven {
    fn new(version: Version) -> Driven {
        Driven::with(&connect(version))
    }

    fn with(connect: &Connect) -> Driven {
        let now = clock::now();
        let name = "c".to_owned();
        let session =
            Session::new(SessionId(1), name, Identity::Anyone, connect, Arc::default(), now.instant);
        Driven { session, now }
    }

    /// A kept session.
    fn kept(change: impl FnOnce(&mut Kept)) -> (Driven, Vec<Effect>) {
        let mut kept = Kept {
            id: SessionId::kept(1),
            present: true,
            mailbox: Arc::new(crate::mailbox::Mailbox::new(&Limits::default())),
            subscriptions: Vec::new(),
            unreleased: Vec::new(),
            sent: 0,
            taken_ids: Vec::new(),
        };
        change(&mut kept);
        let now = clock::now();
        let connect = Connect { session_expiry: 100, ..connect(Version::V5) };
        let identity = Identity::Node("c".parse().unwrap(), crate::access::Channels::All);
        let name = "c".to_owned();
        let mut session = Session::new(kept.id, name, identity, &connect, Arc::default(), now.instant);
        let mut effects = Vec::new();
        session.resume(kept, &mut effects);
        (Driven { session, now }, effects)
    }

    fn publish(&mut self, publish: Publish) -> Vec<Effect> {
        self.packet(Packet::Publish(publish, None))
    }

    fn changed(&mut self, change: Change) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.session.settled(Settled::Changed(change), &mut effects);
        effects
    }

    /// Hands the session the next message of its queue.
    fn queued(&mut self, order: u64, packet_id: u16, message: Option<Message>, qos: Qos) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.session.queue_waits();
        assert!(self.session.next_queued().is_some_and(|after| after < order));
        let sent = InFlight { packet_id, message, qos, retain: false, identifiers: Vec::new() };
        self.session.queued(self.now, Some(Queued { order, sent }), false, &mut effects);
        effects
    }

    fn packet(&mut self, packet: Packet) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.session.packet(self.now.instant, packet, &mut effects);
        effects
    }

    fn settled(&mut self, packet_id: u16, result: Result<(), Reason>) -> Vec<Effect> {
        let mut effects = Vec::new();
        let result = result.map_err(|reason| Refusal::new(reason, "because"));
        self.session.settled(Settled::Published { packet_id, result }, &mut effects);
        effects
    }

    fn deliver(&mut self, message: Message) -> Vec<Effect> {
        let mut effects = Vec::new();
        let identifiers = Vec::new();
        let delivery = Delivery { qos: message.qos, retain: false, message: message.into(), identifiers };
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
    assert_eq!(driven.publish(message.clone()), [Effect::Admit(message)]);
    assert_eq!(sent(&driven.settled(7, Ok(()))), [[0x40, 2, 0, 7]]);
}

#[test]
fn a_refusal_is_a_reason_in_mqtt_5_and_the_end_in_3_1_1() {
    let refuse = |version, qos| {
        let mut driven = Driven::new(version);
        driven.publish(publish("t", qos, 7));
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
        driven.publish(publish("t", qos, id));
        let answer = driven.settled(id, Err(Reason::PayloadFormatInvalid));
        assert_eq!(sent(&answer)[0][1..], [4, 0, id as u8, 0x99, 0]);
    }
    let end = driven.packet(Packet::Connect(connect(Version::V5).into()));
    assert!(sent(&end)[0].len() > 4, "3.1.2.11.7 allows it there");
}

#[test]
fn no_reason_makes_a_packet_larger_than_the_client_takes() {
    let mut driven = Driven::with(&Connect { maximum_packet_size: Some(8), ..connect(Version::V5) });
    driven.publish(publish("t", Qos::AtLeastOnce, 1));
    assert_eq!(sent(&driven.settled(1, Err(Reason::QuotaExceeded)))[0].len(), 6);
    let mut effects = Vec::new();
    driven.session.end(Reason::ProtocolError, "a long explanation", &mut effects);
    assert_eq!(sent(&effects)[0].len(), 4);
}

#[test]
fn a_qos_2_message_is_admitted_once_until_it_is_released() {
    let mut driven = Driven::new(Version::V3);
    let message = publish("t", Qos::ExactlyOnce, 7);
    assert_eq!(driven.publish(message.clone()).len(), 1);
    assert!(driven.publish(message.clone()).is_empty(), "the PUBREC is under way");
    assert_eq!(sent(&driven.settled(7, Ok(()))), [[0x50, 2, 0, 7]]);
    assert_eq!(sent(&driven.publish(message.clone())), [[0x50, 2, 0, 7]]);
    assert_eq!(sent(&driven.packet(Packet::PubRel(7))), [[0x70, 2, 0, 7]]);
    assert_eq!(driven.publish(message.clone()), [Effect::Admit(message)]);
}

#[test]
fn after_a_refusing_pubrec_the_packet_id_is_free() {
    let mut driven = Driven::new(Version::V5);
    let message = publish("t", Qos::ExactlyOnce, 7);
    driven.publish(message.clone());
    driven.settled(7, Err(Reason::QuotaExceeded));
    assert_eq!(driven.publish(message.clone()), [Effect::Admit(message)]);
    let mut driven = Driven::new(Version::V5);
    assert_eq!(sent(&driven.packet(Packet::PubRel(3)))[0][2..5], [0, 3, 0x92]);
}

#[test]
fn a_3_1_1_client_may_have_more_qos_2_messages_under_way_than_are_settled_at_once() {
    let mut driven = Driven::new(Version::V3);
    for id in 1..=200 {
        assert!(!closes(&driven.publish(publish("t", Qos::ExactlyOnce, id))), "{id}");
        driven.settled(id, Ok(()));
    }
    let mut driven = Driven::new(Version::V5);
    let closed = (1..=200).find(|id| {
        let closed = closes(&driven.publish(publish("t", Qos::ExactlyOnce, *id)));
        driven.settled(*id, Ok(()));
        closed
    });
    assert_eq!(closed, Some(65), "an MQTT 5 client was told a receive maximum of 64");
}

#[test]
fn a_duplicate_while_the_first_is_under_way_is_answered_once() {
    let mut driven = Driven::new(Version::V3);
    driven.publish(publish("t", Qos::AtLeastOnce, 7));
    let again = Publish { duplicate: true, ..publish("t", Qos::AtLeastOnce, 7) };
    assert!(driven.publish(again).is_empty());
    assert_eq!(sent(&driven.settled(7, Ok(()))).len(), 1);
    driven.publish(publish("t", Qos::AtLeastOnce, 7));
    assert!(closes(&driven.publish(publish("u", Qos::AtLeastOnce, 7))), "not a duplicate");
}

#[test]
fn nothing_is_read_while_the_window_is_full() {
    let mut driven = Driven::new(Version::V3);
    for id in 1..=64 {
        assert!(driven.session.wants_packets());
        driven.publish(publish("t", Qos::AtLeastOnce, id));
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
    assert!(driven.session.leave().will.is_some());
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
    assert_eq!(driven.packet(Packet::Disconnect { with_will: true, session_expiry: None }), [Effect::Close]);
    assert!(driven.session.leave().will.is_some());
    let mut driven = Driven::new(Version::V5);
    driven.packet(Packet::Disconnect { with_will: false, session_expiry: None });
    assert!(driven.session.leave().will.is_none());
    assert!(driven.packet(Packet::PingReq).is_empty(), "nothing after a DISCONNECT");
}

#[test]
fn what_a_client_must_not_send_ends_the_session() {
    for packet in [
        Packet::Connect(connect(Version::V5).into()),
        Packet::PubRec { id: 1, refused: false },
        Packet::Publish(publish("", Qos::AtMostOnce, 0), Some(1)),
        Packet::Publish(publish("t", Qos::AtMostOnce, 0), Some(0)),
        Packet::Publish(publish("t", Qos::AtMostOnce, 0), Some(33)),
        Packet::Publish(publish("", Qos::AtMostOnce, 0), None),
        Packet::Disconnect { with_will: true, session_expiry: Some(1) },
    ] {
        for version in [Version::V3, Version::V5] {
            if version == Version::V3 && matches!(packet, Packet::Publish(_, None)) {
                continue; // the door refuses it
            }
            let mut driven = Driven::new(version);
            driven.deliver(message("t", 0)); // with packet id 1, at QoS 1
            assert!(closes(&driven.packet(packet.clone())), "{packet:?}");
            assert!(driven.session.leave().will.is_some());
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
        identifier: None,
    };
    let filters =
        ["a/#", "a/\u{1}", "$share/g/a/#", "$share/g/\u{1}"].map(|filter| (filter.to_owned(), options));
    let effects = driven.packet(Packet::Subscribe(Subscribe { packet_id: 9, filters: filters.into() }));
    assert!(matches!(&effects[0], Effect::Subscribe(filter, _) if filter == "a/#"));
    assert!(matches!(&effects[1], Effect::Subscribe(filter, _) if filter == "$share/g/a/#"));
    assert_eq!(sent(&effects), [[0x90, 7, 0, 9, 0, 2, 0x8f, 2, 0x8f]]);
    assert_eq!(driven.replay(&[message("a/b", 1), message("b", 2)]), ["a/b"]);
}

#[test]
fn a_filter_that_no_client_may_send_ends_the_session() {
    for (filter, closed_in_3, closed_in_5) in [
        ("", true, true),
        ("a/#/b", true, true),
        ("a+", true, true),
        ("$share/g", false, true), // 3.1.1 knows no shared subscriptions
        ("$share/g/", false, true),
        ("a/\u{7f}", false, false),
    ] {
        for (version, closed) in [(Version::V3, closed_in_3), (Version::V5, closed_in_5)] {
            let subscribe = subscribe(filter, RetainHandling::Send);
            let unsubscribe =
                Packet::Unsubscribe(Unsubscribe { packet_id: 9, filters: vec![filter.to_owned()] });
            for packet in [subscribe, unsubscribe] {
                let effects = Driven::new(version).packet(packet.clone());
                assert_eq!(closes(&effects), closed, "{version:?} {packet:?}");
            }
        }
    }
}

#[test]
fn who_subscribes_after_publishing_gets_what_it_published_as_retained() {
    let mut driven = Driven::new(Version::V5);
    driven.packet(Packet::Publish(Publish { retain: true, ..publish("a", Qos::AtMostOnce, 0) }, None));
    driven.packet(Packet::Publish(publish("a", Qos::AtLeastOnce, 7), None));
    assert!(driven.packet(subscribe("a", RetainHandling::Send)).is_empty(), "the index has not settled both");
    assert!(!driven.session.wants_packets(), "what follows comes after it");
    assert!(driven.settled(0, Ok(())).is_empty());
    let effects = driven.settled(7, Ok(()));
    assert_eq!(sent(&effects)[0][..2], [0x40, 2]);
    assert!(matches!(&effects[1], Effect::Subscribe(filter, _) if filter == "a"));
    assert_eq!(sent(&effects)[1][0], 0x90);
    assert!(driven.session.wants_packets());
    assert_eq!(driven.replay(&[message("a", 1)]), ["a"]);
}

#[test]
fn answers_that_fit_no_message_are_ignored_and_those_out_of_order_end_the_session() {
    let mut driven = Driven::new(Version::V5);
    assert!(driven.packet(Packet::PubRec { id: 1, refused: true }).is_empty(), "nothing follows a refusal");
    assert!(driven.packet(Packet::PubComp(1)).is_empty());
    driven.deliver(message("t", 0)); // with packet id 1, at QoS 1
    assert!(closes(&driven.packet(Packet::PubComp(1))));
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
    assert_eq!(sent(&again)[0].last(), Some(&2), "one it has already");
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

#[test]
fn a_qos_2_message_is_released_when_the_client_has_it_and_forgotten_when_it_is_complete() {
    let mut driven = Driven::with(&Connect { receive_maximum: 1, ..connect(Version::V5) });
    driven.deliver(Message { qos: Qos::ExactlyOnce, ..message("t", 0) });
    let pubrec = Packet::PubRec { id: 1, refused: false };
    for _ in 0..2 {
        assert_eq!(sent(&driven.packet(pubrec.clone())), [[0x62, 2, 0, 1]]);
        assert!(!driven.session.wants_messages(), "4.9: until PUBCOMP");
    }
    assert!(driven.packet(Packet::PubComp(1)).is_empty());
    assert!(driven.session.wants_messages());
    assert_eq!(sent(&driven.packet(pubrec))[0][..5], [0x62, 4, 0, 1, 0x92], "nobody knows it any more");
    driven.deliver(Message { qos: Qos::ExactlyOnce, ..message("t", 0) });
    assert!(driven.packet(Packet::PubRec { id: 2, refused: true }).is_empty());
    assert!(driven.session.wants_messages(), "the client does not take it");
}

#[test]
fn a_topic_alias_stands_for_the_topic_it_came_with_last() {
    let mut driven = Driven::new(Version::V5);
    let mut topic = |topic: &str, alias| {
        let effects = driven.packet(Packet::Publish(publish(topic, Qos::AtMostOnce, 0), alias));
        match &effects[..] {
            [Effect::Admit(publish)] => publish.topic.clone(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(topic("a", Some(32)), "a");
    assert_eq!(topic("", Some(32)), "a");
    assert_eq!(topic("b", Some(32)), "b");
    assert_eq!(topic("", Some(32)), "b");
    assert_eq!(topic("c", None), "c");
}

#[test]
fn a_kept_session_answers_what_it_changes_when_the_index_has_it() {
    let (mut driven, _) = Driven::kept(|kept| kept.unreleased = vec![5]);
    let effects = driven.packet(subscribe("mpypi/channels/+", RetainHandling::Send));
    let [Effect::Change(change @ Change::Subscribe { .. })] = &effects[..] else { panic!("{effects:?}") };
    assert!(driven.session.next_replay(false).is_none(), "nothing before SUBACK");
    assert_eq!(sent(&driven.changed(change.clone())), [[0x90, 4, 0, 9, 0, 2]]);
    assert_eq!(driven.replay(&[message("mpypi/channels/a", 1)]), ["mpypi/channels/a"]);

    let again = Publish { duplicate: true, ..publish("mpypi/nodes/c/log", Qos::ExactlyOnce, 5) };
    assert_eq!(sent(&driven.publish(again)), [[0x50, 2, 0, 5]], "it came before the last connection ended");
    assert_eq!(driven.packet(Packet::PubRel(5)), [Effect::Change(Change::Released(5))]);
    assert_eq!(sent(&driven.changed(Change::Released(5))), [[0x70, 2, 0, 5]]);
    assert_eq!(sent(&driven.packet(Packet::PubRel(5)))[0][2..5], [0, 5, 0x92]);
}

#[test]
fn what_waits_in_the_queue_is_sent_with_its_id_and_leaves_the_queue_when_the_client_has_it() {
    let (mut driven, _) = Driven::kept(|kept| kept.sent = 10);
    let mine = || Some(message("mpypi/nodes/c/cmd", 0));
    let first = |effects: &[Effect]| match effects {
        [Effect::Deliver(head, _)] => (head[0], u16::from_be_bytes([head[21], head[22]])),
        other => panic!("{other:?}"),
    };
    assert_eq!(first(&driven.queued(10, 7, mine(), Qos::AtLeastOnce)), (0x3a, 7), "perhaps sent before");
    assert_eq!(first(&driven.queued(11, 8, mine(), Qos::ExactlyOnce)), (0x34, 8));
    assert_eq!(
        sent(&driven.queued(12, 9, None, Qos::ExactlyOnce)),
        [[0x62, 2, 0, 9]],
        "it said PUBREC already"
    );
    assert_eq!(driven.packet(Packet::PubAck(7)), [Effect::Change(Change::Acknowledged(10))]);
    let pubrec = Packet::PubRec { id: 8, refused: false };
    assert_eq!(driven.packet(pubrec.clone()), [Effect::Change(Change::Received(11, 8))]);
    assert!(driven.packet(pubrec).is_empty(), "the index is not done");
    assert_eq!(sent(&driven.changed(Change::Received(11, 8))), [[0x62, 2, 0, 8]]);
    assert_eq!(driven.packet(Packet::PubComp(8)), [Effect::Change(Change::Acknowledged(11))]);
    assert_eq!(driven.packet(Packet::PubComp(9)), [Effect::Change(Change::Acknowledged(12))]);
    let foreign = Some(message("mpypi/nodes/other/log", 0));
    let skipped = driven.queued(13, 10, foreign, Qos::AtLeastOnce);
    assert_eq!(skipped, [Effect::Change(Change::Acknowledged(13))], "the client may no longer read it");
    assert!(driven.session.leave().end.unwrap().in_flight.is_empty());
}

#[test]
fn what_a_connection_leaves_half_done_is_kept() {
    let (mut driven, _) = Driven::kept(|_| {});
    for filter in ["mpypi/channels/dev", "mpypi/packages/#"] {
        let [Effect::Change(change)] = &driven.packet(subscribe(filter, RetainHandling::Send))[..] else {
            panic!()
        };
        driven.changed(change.clone());
    }
    let replay = driven.session.next_replay(false).unwrap();
    let found = Step::Found(Message { qos: Qos::ExactlyOnce, ..message("mpypi/channels/dev", 3) });
    driven.session.replayed(driven.now, replay, found, &mut Vec::new());
    let replay = driven.session.next_replay(false).unwrap();
    driven.session.replayed(driven.now, replay, Step::Found(message("mpypi/packages/a", 4)), &mut Vec::new());
    driven.packet(Packet::PubRec { id: QUEUE_IDS + 1, refused: false });
    driven.queued(77, 7, Some(message("mpypi/nodes/c/cmd", 0)), Qos::AtLeastOnce);
    let Leaving { will, end: Some(end) } = driven.session.leave() else { panic!() };
    assert!(will.is_some(), "it has no delay");
    assert_eq!((end.expiry, end.sent, end.will), (100, 77, None));
    let ids: Vec<_> = end.in_flight.iter().map(|sent| (sent.packet_id, sent.message.is_some())).collect();
    assert_eq!(ids, [(QUEUE_IDS + 1, false), (QUEUE_IDS + 2, true)], "what is in the queue stays there");
    let after = Pending::After("mpypi/packages/a".to_owned());
    assert_eq!(
        end.pending,
        [("mpypi/channels/dev".to_owned(), None), ("mpypi/packages/#".to_owned(), Some(after.clone()))]
    );
    // The next connection goes on there, as far as the client still may.
    let subscription = |filter: &str, pending| {
        let Packet::Subscribe(subscribe) = subscribe(filter, RetainHandling::Send) else { panic!() };
        (filter.to_owned(), Subscription { options: subscribe.filters[0].1, pending })
    };
    let (mut driven, effects) = Driven::kept(|kept| {
        kept.subscriptions =
            vec![subscription("mpypi/packages/#", Some(after)), subscription("#", Some(Pending::All))];
        kept.taken_ids = vec![QUEUE_IDS + 1];
    });
    let gone = Change::Unsubscribe { packet_id: None, answer: Vec::new(), filters: vec!["#".to_owned()] };
    assert_eq!(effects, [Effect::Change(gone)]);
    assert_eq!(
        driven.replay(&[message("mpypi/packages/a", 4), message("mpypi/packages/b", 5)]),
        ["mpypi/packages/b"]
    );
    assert!(driven.packet(Packet::PubAck(QUEUE_IDS + 1)).is_empty(), "that id is taken");
    let done = driven.packet(Packet::PubAck(QUEUE_IDS + 2));
    assert_eq!(done, [Effect::Change(Change::Replayed(vec!["mpypi/packages/#".to_owned()]))]);
}

#[test]
fn a_will_with_a_delay_waits_with_the_session_and_not_without_one() {
    let (mut driven, _) = Driven::kept(|_| {});
    driven.session.will_delay = 30;
    let Leaving { will: None, end: Some(end) } = driven.session.leave() else { panic!() };
    assert!(end.will.is_some_and(|(_, delay)| delay == 30));
    let (mut driven, _) = Driven::kept(|_| {});
    driven.session.will_delay = 30;
    driven.packet(Packet::Disconnect { with_will: true, session_expiry: Some(0) });
    let Leaving { will: Some(_), end: Some(end) } = driven.session.leave() else { panic!() };
    assert_eq!((end.expiry, end.will), (0, None), "3.1.3.2.2: the session ends, and the will is due");
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

#[test]
fn a_subscribe_that_ends_the_session_leaves_no_subscription() {
    let (mut kept, _) = Driven::kept(|_| {});
    for driven in [&mut Driven::new(Version::V5), &mut kept] {
        let options = SubscriptionOptions {
            qos: Qos::AtLeastOnce,
            no_local: true,
            retain_as_published: false,
            retain_handling: RetainHandling::Send,
            identifier: None,
        };
        let filters = ["a", "$share/g/b"].map(|filter| (filter.to_owned(), options)).to_vec();
        let effects = driven.packet(Packet::Subscribe(Subscribe { packet_id: 9, filters }));
        assert!(closes(&effects) && effects.len() == 2, "{effects:?}");
        assert_eq!(driven.session.filters().count(), 0);
    }
}

#[test]
fn an_unsubscribe_that_ends_the_session_leaves_every_subscription_to_its_end() {
    const LIST: &str = "mpypi/channels/dev";
    let (mut kept, _) = Driven::kept(|_| {});
    for driven in [&mut Driven::new(Version::V5), &mut kept] {
        let _ = driven.packet(subscribe(LIST, RetainHandling::DoNotSend));
        let filters = vec![LIST.to_owned(), "b/#/c".to_owned()];
        let effects = driven.packet(Packet::Unsubscribe(Unsubscribe { packet_id: 9, filters }));
        assert!(closes(&effects) && !effects.contains(&Effect::Unsubscribe(LIST.to_owned())), "{effects:?}");
        assert_eq!(driven.session.filters().collect::<Vec<_>>(), [LIST]);
    }
}
