//! The stream of a client: any bytes, in any pieces, in both versions.
//!
//! The first byte chooses the version, the second how the rest is cut.

#![no_main]

use bytes::{BufMut, BytesMut};
use libfuzzer_sys::fuzz_target;
use mpypi_broker::{
    Limits,
    packet::{Frame, Framing, Head, Packet, PacketError, Publish, Version, decode, frame},
};

/// Small, so that a few bytes reach beyond them.
fn limits() -> Limits {
    Limits { packet: 2048, control_packet: 512, properties: 128, client_id: 64, ..Limits::default() }
}

/// The packets of a stream, and why it ended, if it did.
type Read = (Vec<Packet>, Option<PacketError>);

/// Reads what `buffer` holds. What is left of it is the start of one packet within the limits.
fn read(buffer: &mut BytesMut, version: Version, read: &mut Read) {
    let limits = limits();
    while read.1.is_none() {
        let before = buffer.clone();
        match frame(buffer, &limits) {
            Ok(Framing::Whole(whole)) => {
                assert!(before.len() - buffer.len() >= whole.body.len() + 2, "a frame from nowhere");
                assert!(before.ends_with(buffer), "more was taken than the frame");
                match decode(whole.clone(), version, &limits) {
                    Ok(packet) => {
                        check(&whole, &packet, version, &limits);
                        read.0.push(packet);
                    }
                    Err(error) => read.1 = Some(error),
                }
            }
            Ok(Framing::Part(total)) => {
                assert_eq!(*buffer, before, "a part was taken");
                match total {
                    Some(total) => assert!(buffer.len() < total && total <= limits.packet),
                    None => assert!(buffer.len() < 5),
                }
                return;
            }
            Err(error) => read.1 = Some(error),
        }
    }
}

/// What holds of every packet that was let through.
fn check(frame: &Frame, packet: &Packet, version: Version, limits: &Limits) {
    match packet {
        Packet::Connect(connect) => {
            assert!(frame.body.len() <= limits.control_packet && connect.client_id.len() < frame.body.len());
            assert!(connect.receive_maximum > 0 && connect.maximum_packet_size != Some(0));
            if let Some(will) = &connect.will {
                again(will, connect.version, limits);
            }
        }
        Packet::Publish(publish, _) => {
            assert_eq!(publish.packet_id == 0, publish.qos as u8 == 0);
            again(publish, version, limits);
        }
        Packet::PubAck(id) | Packet::PubRec { id, .. } | Packet::PubRel(id) | Packet::PubComp(id) => {
            assert_ne!(*id, 0);
        }
        Packet::Subscribe(subscribe) => {
            assert!(subscribe.packet_id != 0 && !subscribe.filters.is_empty());
            let bytes: usize = subscribe.filters.iter().map(|(filter, _)| filter.len() + 3).sum();
            assert!(bytes <= frame.body.len(), "filters from nowhere");
        }
        Packet::Unsubscribe(unsubscribe) => {
            assert!(unsubscribe.packet_id != 0 && !unsubscribe.filters.is_empty());
        }
        _ => {}
    }
}

/// A message is written as it was read, and read again as the same.
fn again(publish: &Publish, version: Version, limits: &Limits) {
    assert!(!publish.topic.contains('\0') && publish.topic.len() <= usize::from(u16::MAX));
    assert!(publish.properties.memory() <= limits.properties * 64, "properties grow in memory");
    // A will has no packet id.
    let id = if publish.qos as u8 == 0 { 0 } else { publish.packet_id.max(1) };
    let size = publish.payload.len() as u64;
    let head = Head {
        topic: &publish.topic,
        qos: publish.qos,
        retain: publish.retain,
        duplicate: publish.duplicate,
        packet_id: id,
        properties: &publish.properties,
        expiry: publish.properties.expiry,
        identifiers: &[],
    };
    let mut bytes = BytesMut::from(&head.to_bytes(version, size)[..]);
    bytes.put_slice(&publish.payload);
    // Ours may say more than it was told, as the length of no properties.
    let wide = Limits { packet: limits.packet + 64, ..limits.clone() };
    let Ok(Framing::Whole(whole)) = frame(&mut bytes, &wide) else { panic!("not a packet: {bytes:?}") };
    assert!(bytes.is_empty(), "the head announces another size");
    match decode(whole, version, &wide) {
        Ok(Packet::Publish(mut read, None)) => {
            read.packet_id = publish.packet_id;
            assert_eq!(&read, publish);
        }
        other => panic!("written as {other:?}: {publish:?}"),
    }
}

fuzz_target!(|data: &[u8]| {
    let [version, cut, stream @ ..] = data else { return };
    let version = if version % 2 == 0 { Version::V3 } else { Version::V5 };
    let mut whole = Read::default();
    read(&mut BytesMut::from(stream), version, &mut whole);
    let (mut buffer, mut pieces) = (BytesMut::new(), Read::default());
    for piece in stream.chunks(usize::from(*cut).max(1)) {
        buffer.put_slice(piece);
        read(&mut buffer, version, &mut pieces);
    }
    assert_eq!(pieces, whole, "another meaning in pieces of {cut}");
});
