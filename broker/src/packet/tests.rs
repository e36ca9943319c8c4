//! The codec against any bytes, any cut of the stream, and rumqttc's codec.

use bytes::{BufMut, BytesMut};
use proptest::{collection::vec, option, prelude::*};
use rumqttc::v5::mqttbytes::{QoS, v5};

use super::*;
use crate::limits::Limits;

fn qos(number: u8) -> QoS {
    rumqttc::v5::mqttbytes::qos(number).unwrap()
}

fn text() -> impl Strategy<Value = String> {
    "[a-zäß/+# ]{0,20}"
}

fn message() -> impl Strategy<Value = (String, Vec<u8>, u8, bool, u16, Properties)> {
    let properties = (
        option::of(0..2_u8),
        option::of(any::<u32>()),
        option::of(text()),
        option::of(text()),
        option::of(vec(any::<u8>(), 0..20)),
        vec((text(), text()), 0..3),
    );
    let properties = properties.prop_map(
        |(payload_format, expiry, content_type, response_topic, correlation_data, user)| Properties {
            payload_format,
            expiry,
            content_type,
            response_topic,
            correlation_data,
            user,
        },
    );
    // rumqttc refuses to write an empty topic, and to read properties that are there but empty.
    ("[a-zä/]{1,200}", vec(any::<u8>(), 0..300), 0..3_u8, any::<bool>(), 1..=u16::MAX, properties)
}

fn theirs(properties: &Properties) -> v5::PublishProperties {
    let Properties { payload_format, expiry, content_type, response_topic, correlation_data, user } =
        properties.clone();
    v5::PublishProperties {
        payload_format_indicator: payload_format,
        message_expiry_interval: expiry,
        topic_alias: None,
        response_topic,
        correlation_data: correlation_data.map(Bytes::from),
        user_properties: user,
        subscription_identifiers: Vec::new(),
        content_type,
    }
}

/// All packets in `bytes`, or where and why it ended.
fn read(buffer: &mut BytesMut, packets: &mut Vec<Result<Packet, PacketError>>) {
    let limits = Limits::default();
    while !packets.last().is_some_and(Result::is_err) {
        match frame(buffer, &limits) {
            Ok(Framing::Whole(frame)) => packets.push(decode(frame, Version::V5, &limits)),
            Ok(Framing::Part(_)) => return,
            Err(error) => packets.push(Err(error)),
        }
    }
}

fn decode_one(bytes: &[u8], version: Version) -> Result<Packet, PacketError> {
    let limits = Limits::default();
    let mut buffer = BytesMut::from(bytes);
    let Framing::Whole(whole) = frame(&mut buffer, &limits)? else { panic!("half a packet") };
    assert!(buffer.is_empty());
    decode(whole, version, &limits)
}

/// Packets with a true length around any inside.
fn plausible() -> impl Strategy<Value = Vec<u8>> {
    let packet = (any::<u8>(), vec(any::<u8>(), 0..60)).prop_map(|(first, body)| {
        let mut packet = vec![first, body.len() as u8];
        packet.extend(body);
        packet
    });
    vec(packet, 0..6).prop_map(|packets| packets.concat())
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(first: u8, body in vec(any::<u8>(), 0..200)) {
        for version in [Version::V3, Version::V5] {
            let frame = Frame { first, body: Bytes::from(body.clone()) };
            let _ = decode(frame, version, &Limits::default());
        }
    }

    #[test]
    fn a_stream_gives_the_same_packets_wherever_it_is_cut(
        bytes in prop_oneof![plausible(), vec(any::<u8>(), 0..200)],
        cuts in vec(0..200_usize, 0..8),
    ) {
        let mut whole = Vec::new();
        read(&mut BytesMut::from(&bytes[..]), &mut whole);
        let mut cuts: Vec<_> = cuts.into_iter().filter(|cut| *cut < bytes.len()).collect();
        cuts.sort_unstable();
        let (mut buffer, mut packets, mut start) = (BytesMut::new(), Vec::new(), 0);
        for end in cuts.into_iter().chain([bytes.len()]) {
            buffer.put_slice(&bytes[start..end]);
            start = end;
            read(&mut buffer, &mut packets);
        }
        prop_assert_eq!(packets, whole);
    }

    #[test]
    fn a_message_of_rumqttc_is_read_as_it_was_meant(
        (topic, payload, level, retain, id, properties) in message()
    ) {
        let mut publish = v5::Publish::new(&*topic, qos(level), payload.clone(), Some(theirs(&properties)));
        publish.retain = retain;
        publish.pkid = if level == 0 { 0 } else { id };
        let mut bytes = BytesMut::new();
        v5::Packet::Publish(publish.clone()).write(&mut bytes, None).unwrap();
        let expected = Publish {
            topic,
            payload: Bytes::from(payload),
            qos: Qos::from_number(level).unwrap(),
            retain,
            packet_id: publish.pkid,
            duplicate: false,
            properties,
        };
        prop_assert_eq!(decode_one(&bytes, Version::V5), Ok(Packet::Publish(expected, None)));
    }

    #[test]
    fn rumqttc_reads_a_message_of_ours_as_it_was_meant(
        (topic, payload, level, retain, id, properties) in message()
    ) {
        let qos_ours = Qos::from_number(level).unwrap();
        let mut bytes = BytesMut::new();
        let head = Head {
            topic: &topic,
            qos: qos_ours,
            retain,
            duplicate: false,
            packet_id: id,
            properties: &properties,
            expiry: properties.expiry,
            identifiers: &[],
        };
        bytes.put(head.to_bytes(Version::V5, payload.len() as u64));
        bytes.put_slice(&payload);
        let v5::Packet::Publish(read) = v5::Packet::read(&mut bytes, None).unwrap() else { panic!() };
        prop_assert_eq!(&read.topic[..], topic.as_bytes());
        prop_assert_eq!(&read.payload[..], &payload[..]);
        prop_assert_eq!((read.qos, read.retain), (qos(level), retain));
        prop_assert_eq!(read.pkid, if level == 0 { 0 } else { id });
        let none = properties == Properties::default();
        prop_assert_eq!(read.properties, (!none).then(|| theirs(&properties)));
        prop_assert!(bytes.is_empty());
    }

    #[test]
    fn rumqttc_reads_our_answers(id in 1..=u16::MAX, reason in "[a-zäöü]{1,400}") {
        let read = |bytes: Bytes| v5::Packet::read(&mut BytesMut::from(&bytes[..]), None).unwrap();
        let cut = {
            let end = (0..=256).rev().find(|end| reason.is_char_boundary(*end)).unwrap();
            reason.get(..end).unwrap_or(&reason).to_owned()
        };
        let refused = Reason::PayloadFormatInvalid;
        match read(puback(Version::V5, id, refused, &reason)) {
            v5::Packet::PubAck(ack) => {
                prop_assert_eq!((ack.pkid, ack.reason), (id, v5::PubAckReason::PayloadFormatInvalid));
                prop_assert_eq!(ack.properties.unwrap().reason_string, Some(cut.clone()));
            }
            other => prop_assert!(false, "{:?}", other),
        }
        match read(refuse(Version::V5, Reason::QuotaExceeded, &reason)) {
            v5::Packet::ConnAck(ack) => {
                prop_assert_eq!(ack.code, v5::ConnectReturnCode::QuotaExceeded);
                prop_assert_eq!(ack.properties.unwrap().reason_string, Some(cut));
            }
            other => prop_assert!(false, "{:?}", other),
        }
        match read(suback(Version::V5, id, &[Ok(Qos::AtLeastOnce), Err(Reason::TopicFilterInvalid)])) {
            v5::Packet::SubAck(ack) => prop_assert_eq!(
                ack.return_codes,
                vec![
                    v5::SubscribeReasonCode::Success(QoS::AtLeastOnce),
                    v5::SubscribeReasonCode::TopicFilterInvalid
                ]
            ),
            other => prop_assert!(false, "{:?}", other),
        }
    }
}

#[test]
fn rumqttc_reads_the_limits_in_our_connack() {
    let limits = Limits::default();
    let welcome = Welcome {
        session_present: true,
        session_expiry: Some(7),
        assigned_id: Some("auto-1".to_owned()),
        has_room: true,
    };
    let bytes = accept(Version::V5, &limits, &welcome);
    let read = v5::Packet::read(&mut BytesMut::from(&bytes[..]), None).unwrap();
    let v5::Packet::ConnAck(ack) = read else { panic!("{read:?}") };
    let properties = ack.properties.unwrap();
    assert_eq!(properties.receive_max, Some(limits.inbound_window));
    assert_eq!(properties.max_packet_size, Some(limits.packet as u32));
    assert_eq!(properties.assigned_client_identifier.as_deref(), Some("auto-1"));
    assert!(ack.session_present);
    assert_eq!(properties.session_expiry_interval, Some(7));
    assert_eq!(properties.topic_alias_max, Some(limits.topic_aliases));
    let said = [("mpypi-serves", "mpy-blox".to_owned()), ("mpypi-package", limits.package.to_string())];
    let said = said.map(|(key, value): (&str, _)| (key.to_owned(), value));
    assert_eq!(properties.user_properties, said);
    let bare = accept(Version::V5, &limits, &Welcome { has_room: false, ..welcome.clone() });
    let length = |(key, value): &(String, String)| 5 + key.len() + value.len();
    assert_eq!(bare.len() + said.iter().map(length).sum::<usize>(), bytes.len());
    assert_eq!(&accept(Version::V3, &limits, &welcome)[..], [0x20, 2, 1, 0]);
}

#[test]
fn a_connect_of_rumqttc_is_read_as_it_was_meant() {
    let connect = v5::Connect {
        keep_alive: 7,
        client_id: "dev".to_owned(),
        clean_start: true,
        properties: Some(v5::ConnectProperties {
            receive_maximum: Some(5),
            max_packet_size: Some(1000),
            request_problem_info: Some(0),
            session_expiry_interval: Some(9),
            ..v5::ConnectProperties::new()
        }),
    };
    let will = v5::LastWill::new("t", "bye", QoS::AtLeastOnce, true, None);
    let login = v5::Login::new("user", "secret");
    let mut bytes = BytesMut::new();
    v5::Packet::Connect(connect, Some(will), Some(login)).write(&mut bytes, None).unwrap();
    let Ok(Packet::Connect(read)) = decode_one(&bytes, Version::V3) else { panic!() };
    assert_eq!((read.version, read.keep_alive, &*read.client_id), (Version::V5, 7, "dev"));
    assert_eq!((read.receive_maximum, read.maximum_packet_size), (5, Some(1000)));
    assert!(read.clean_start && !read.wants_problems);
    assert_eq!((read.session_expiry, read.will_delay), (9, 0));
    let will = read.will.unwrap();
    assert_eq!(
        (&*will.topic, &will.payload[..], will.qos, will.retain),
        ("t", &b"bye"[..], Qos::AtLeastOnce, true)
    );
}

fn connect(name: &[u8], level: u8, flags: u8, rest: &[u8]) -> Vec<u8> {
    let mut body = vec![0, name.len() as u8];
    body.extend(name);
    body.extend([level, flags, 0, 0]);
    body.extend(rest);
    [&[0x10, body.len() as u8][..], &body].concat()
}

#[test]
fn what_a_subscription_is_called_and_what_stands_for_a_topic_is_read_and_written() {
    let subscribe = decode_one(&[0x82, 9, 0, 1, 2, 0x0b, 5, 0, 1, b'a', 2], Version::V5);
    let Ok(Packet::Subscribe(subscribe)) = subscribe else { panic!("{subscribe:?}") };
    assert_eq!(subscribe.filters[0].1.identifier, NonZeroU32::new(5));
    assert!(
        decode_one(&[0x82, 9, 0, 1, 2, 0x0b, 0, 0, 1, b'a', 2], Version::V5).is_err(),
        "0 is no identifier"
    );
    let publish = decode_one(&[0x30, 6, 0, 0, 3, 0x23, 0, 7], Version::V5);
    assert!(matches!(publish, Ok(Packet::Publish(publish, Some(7))) if publish.topic.is_empty()));
    let head = Head {
        topic: "t",
        qos: Qos::ExactlyOnce,
        retain: false,
        duplicate: true,
        packet_id: 3,
        properties: &Properties::default(),
        expiry: None,
        identifiers: &[NonZeroU32::MIN, NonZeroU32::new(200).unwrap()],
    };
    let bytes = head.to_bytes(Version::V5, 0);
    assert_eq!(&bytes[..], [0x3c, 11, 0, 1, b't', 0, 3, 5, 0x0b, 1, 0x0b, 0xc8, 1]);
    assert_eq!(&head.to_bytes(Version::V3, 0)[..], [0x3c, 5, 0, 1, b't', 0, 3]);
}

#[test]
fn a_3_1_1_session_is_kept_for_ever_unless_it_is_clean_and_a_5_one_for_as_long_as_it_says() {
    let expiry = |bytes: Vec<u8>| match decode_one(&bytes, Version::V3) {
        Ok(Packet::Connect(connect)) => connect.session_expiry,
        other => panic!("{other:?}"),
    };
    assert_eq!(expiry(connect(b"MQTT", 4, 0, &[0, 1, b'x'])), u32::MAX);
    assert_eq!(expiry(connect(b"MQTT", 4, 2, &[0, 1, b'x'])), 0);
    assert_eq!(expiry(connect(b"MQTT", 5, 0, &[0, 0, 1, b'x'])), 0);
    assert_eq!(expiry(connect(b"MQTT", 5, 0, &[5, 0x11, 0, 0, 1, 0, 0, 1, b'x'])), 256);
    let goodbye = decode_one(&[0xe0, 7, 4, 5, 0x11, 0, 0, 0, 9], Version::V5);
    assert_eq!(goodbye, Ok(Packet::Disconnect { with_will: true, session_expiry: Some(9) }));
}

#[test]
fn a_connect_that_breaks_a_rule_is_refused() {
    let id = [0, 1, b'x'];
    let refused = |bytes: Vec<u8>| decode_one(&bytes, Version::V3).unwrap_err().reason;
    for (name, level) in [(&b"MQIsdp"[..], 3), (b"MQTT", 3), (b"MQTT", 6), (b"MQTT", 0x84)] {
        assert_eq!(refused(connect(name, level, 2, &id)), Reason::UnsupportedProtocolVersion);
    }
    assert_eq!(refused(connect(b"HTTP", 4, 2, &id)), Reason::ProtocolError, "another protocol");
    assert_eq!(refused(connect(b"MQTT", 4, 0x03, &id)), Reason::MalformedPacket, "the reserved flag");
    assert_eq!(
        refused(connect(b"MQTT", 4, 0x0a, &id)),
        Reason::MalformedPacket,
        "a will's QoS without a will"
    );
    assert_eq!(
        refused(connect(b"MQTT", 4, 0x22, &id)),
        Reason::MalformedPacket,
        "a will's retain without one"
    );
    assert_eq!(refused(connect(b"MQTT", 4, 0x1e, &id)), Reason::MalformedPacket, "a will at QoS 3");
    let password = [&id[..], &[0, 1, b'p']].concat();
    assert_eq!(refused(connect(b"MQTT", 4, 0x42, &password)), Reason::MalformedPacket, "a password alone");
    let password = [&[0][..], &password].concat();
    assert!(decode_one(&connect(b"MQTT", 5, 0x42, &password), Version::V3).is_ok(), "MQTT 5 allows it");
    let twice = [&[10, 0x21, 0, 1, 0x21, 0, 1, 0x17, 1, 0x19, 0][..], &id].concat();
    assert_eq!(refused(connect(b"MQTT", 5, 2, &twice)), Reason::ProtocolError, "a property twice");
    let zero = [&[3, 0x21, 0, 0][..], &id].concat();
    assert_eq!(refused(connect(b"MQTT", 5, 2, &zero)), Reason::ProtocolError, "receive maximum 0");
    let foreign = [&[3, 0x23, 0, 1][..], &id].concat();
    assert_eq!(refused(connect(b"MQTT", 5, 2, &foreign)), Reason::MalformedPacket, "a topic alias");
}

#[test]
fn what_no_client_sends_is_refused_at_its_first_byte() {
    for first in [0x00, 0x0a, 0x11, 0x20, 0x61, 0x81, 0x90, 0xb0, 0xc1, 0xd0, 0xf0] {
        let mut start = BytesMut::from(&[first][..]);
        assert!(frame(&mut start, &Limits::default()).is_err(), "{first:#x}");
    }
}

#[test]
fn an_acknowledgement_has_one_of_its_own_reasons() {
    for (first, good, bad) in [(0x40, 0x97, 0x92), (0x50, 0x10, 0x01), (0x62, 0x92, 0x80), (0x70, 0x92, 0x10)]
    {
        assert!(decode_one(&[first, 3, 0, 1, good], Version::V5).is_ok(), "{first:#x} {good:#x}");
        assert!(decode_one(&[first, 3, 0, 1, bad], Version::V5).is_err(), "{first:#x} {bad:#x}");
    }
}

#[test]
fn reserved_bits_are_refused_in_the_version_that_reserves_them() {
    let subscribe = |options: u8, version: Version| match version {
        Version::V3 => decode_one(&[0x82, 6, 0, 1, 0, 1, b'a', options], version),
        Version::V5 => decode_one(&[0x82, 7, 0, 1, 0, 0, 1, b'a', options], version),
    };
    for options in [0x04, 0x08, 0x10, 0x20] {
        assert!(subscribe(options, Version::V3).is_err(), "{options:#x}");
        assert!(subscribe(options, Version::V5).is_ok(), "{options:#x}");
    }
    for options in [0x03, 0x30, 0x40, 0x80] {
        assert!(subscribe(options, Version::V3).is_err(), "{options:#x}");
        assert!(subscribe(options, Version::V5).is_err(), "{options:#x}");
    }
    for bytes in [
        &[0x80, 6, 0, 1, 0, 1, b'a', 0][..], // SUBSCRIBE without its flag
        &[0x60, 2, 0, 1],                    // PUBREL without its flag
        &[0x38, 3, 0, 1, b'a'],              // a duplicate at QoS 0
        &[0x36, 5, 0, 1, b'a', 0, 1],        // QoS 3
        &[0x32, 5, 0, 1, b'a', 0, 0],        // packet id 0
        &[0x82, 2, 0, 1],                    // no filter
        &[0xc0, 1, 0],                       // a PINGREQ with something in it
        &[0x30, 3, 0, 1, 0],                 // U+0000
        &[0x30, 3, 0, 1, 0xff],              // not UTF-8
    ] {
        assert!(decode_one(bytes, Version::V3).is_err(), "{bytes:?}");
    }
}

#[test]
fn only_a_publish_may_be_large_and_its_properties_may_not() {
    let limits = Limits { packet: 10_000, control_packet: 100, properties: 50, ..Limits::default() };
    let header = |first: u8| frame(&mut BytesMut::from(&[first, 0x80, 0x08][..]), &limits); // 1024 bytes
    assert_eq!(header(0x32), Ok(Framing::Part(Some(1027))));
    for first in [0x10, 0x82, 0xa2, 0xe0, 0xc0, 0x40] {
        assert_eq!(header(first).unwrap_err().reason, Reason::PacketTooLarge);
    }
    let mut body = vec![0, 1, b't', 60];
    (0..12).for_each(|_| body.extend([0x26, 0, 0, 0, 0]));
    let error = decode(Frame { first: 0x30, body: Bytes::from(body) }, Version::V5, &limits).unwrap_err();
    assert_eq!(error.reason, Reason::PacketTooLarge);
}

#[test]
fn a_will_does_not_keep_the_rest_of_its_connect_in_memory() {
    let mut rest = vec![0, 1, b'x', 0, 1, b't', 0, 1, b'w', 0xff, 0xff];
    rest.extend(vec![b'u'; 0xffff]);
    let mut body = b"\0\x04MQTT\x04\x86\0\0".to_vec();
    body.extend(rest);
    let body = Bytes::from(body);
    let decoded = decode(Frame { first: 0x10, body: body.clone() }, Version::V3, &Limits::default());
    let Ok(Packet::Connect(connect)) = decoded else { panic!("{decoded:?}") };
    let held = connect.will.as_ref().unwrap().payload.as_ptr() as usize;
    assert!(!(body.as_ptr() as usize..body.as_ptr() as usize + body.len()).contains(&held));
}

#[test]
fn of_all_wrong_flags_only_those_of_an_early_mpyblox_subscribe_pass() {
    let filter = [0, 1, b't', 0];
    for version in [Version::V3, Version::V5] {
        let properties: &[u8] = if version == Version::V5 { &[0] } else { &[] };
        let subscribe = [&[0, 1], properties, &filter[..]].concat();
        let unsubscribe = [&[0, 1], properties, &filter[..3]].concat();
        for flags in 0..16 {
            let whole = |kind: u8, body: &[u8]| [&[kind << 4 | flags, body.len() as u8], body].concat();
            let passes = decode_one(&whole(8, &subscribe), version).is_ok();
            assert_eq!(
                passes,
                flags == 0b0010 || (flags == 0 && version == Version::V5),
                "{version:?} {flags:#06b}"
            );
            let passes = decode_one(&whole(10, &unsubscribe), version).is_ok();
            assert_eq!(passes, flags == 0b0010, "{version:?} {flags:#06b}");
        }
    }
}
