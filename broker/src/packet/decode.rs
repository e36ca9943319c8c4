//! Bytes from a client to packets.

use std::num::NonZeroU32;

use bytes::{Buf, Bytes, BytesMut};

use super::{
    Connect, Packet, PacketError, Properties, Publish, Qos, Reason, RetainHandling, Secret, Subscribe,
    SubscriptionOptions, Unsubscribe, Version, property,
};
use crate::limits::Limits;

/// One packet's bytes, cut from the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The first byte: packet type and flags.
    pub first: u8,
    /// Everything after the fixed header.
    pub body: Bytes,
}

/// What the start of a stream holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Framing {
    /// A whole packet, taken from the buffer.
    Whole(Frame),
    /// The start of a packet that needs so many bytes in all; `None` until the header is whole.
    Part(Option<usize>),
}

/// Takes the first packet from `buffer` if it is there whole. Nothing is reserved on the word of a header.
///
/// # Errors
/// No client sends what the first byte says, the length is malformed, or the packet is larger than the limit
/// for its type.
pub fn frame(buffer: &mut BytesMut, limits: &Limits) -> Result<Framing, PacketError> {
    buffer.first().map_or(Ok(()), |first| check_first(*first))?;
    let is_publish = buffer.first().is_some_and(|first| first >> 4 == 3);
    let limit = if is_publish { limits.packet } else { limits.control_packet };
    let mut length = 0_usize;
    for index in 0..4 {
        let Some(&byte) = buffer.get(1 + index) else { return Ok(Framing::Part(None)) };
        length |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            let header = 2 + index;
            let total = header + length;
            if total > limit {
                return Err(PacketError {
                    reason: Reason::PacketTooLarge,
                    text: format!("a packet of {total} bytes is larger than {limit}"),
                });
            }
            if buffer.len() < total {
                return Ok(Framing::Part(Some(total)));
            }
            let first = buffer[0];
            let mut whole = buffer.split_to(total);
            whole.advance(header);
            return Ok(Framing::Whole(Frame { first, body: whole.freeze() }));
        }
    }
    Err(PacketError::malformed("the packet's length takes more than four bytes"))
}

/// Reads a frame. `version` is what the connection speaks; a CONNECT brings its own.
///
/// # Errors
/// The frame is malformed, or of a type that clients do not send.
pub fn decode(frame: Frame, version: Version, limits: &Limits) -> Result<Packet, PacketError> {
    let mut reader = Reader { bytes: frame.body, version, most_properties: limits.properties };
    check_first(frame.first)?;
    let (kind, flags) = (frame.first >> 4, frame.first & 0x0f);
    if frame.first == SUBSCRIBE_OF_EARLY_MPYBLOX && version == Version::V3 {
        return Err(wrong_flags(frame.first));
    }
    let packet = match kind {
        1 => Packet::Connect(Box::new(connect(&mut reader)?)),
        3 => {
            let (publish, alias) = publish(&mut reader, flags)?;
            Packet::Publish(publish, alias)
        }
        4 => Packet::PubAck(acknowledgement(&mut reader, REASONS_OF_RECEIVER)?.0),
        5 => {
            let (id, reason) = acknowledgement(&mut reader, REASONS_OF_RECEIVER)?;
            Packet::PubRec { id, refused: reason >= 0x80 }
        }
        6 => Packet::PubRel(acknowledgement(&mut reader, REASONS_OF_RELEASE)?.0),
        7 => Packet::PubComp(acknowledgement(&mut reader, REASONS_OF_RELEASE)?.0),
        8 => Packet::Subscribe(subscribe(&mut reader)?),
        10 => Packet::Unsubscribe(unsubscribe(&mut reader)?),
        12 => Packet::PingReq,
        14 => disconnect(&mut reader)?,
        _ => return Err(unexpected(kind)),
    };
    if reader.bytes.has_remaining() {
        return Err(PacketError::malformed(format!(
            "{} bytes too many in a packet of type {kind}",
            reader.bytes.remaining()
        )));
    }
    Ok(packet)
}

/// The first byte of a SUBSCRIBE of early Mpy-BLOX devices, whose own MQTT 5 client leaves the reserved bits 0 that
/// have to be 0010. [MQTT-3.8.1-1] says to close; but nobody updates such a device in the field any more unless
/// it is served. This is the only exception, in MQTT 5 only: the bits carry no meaning, and any other value is
/// malformed.
const SUBSCRIBE_OF_EARLY_MPYBLOX: u8 = 0x80;

/// 2.1.2 and 2.1.3: types that a client sends, and their flags; but for [`SUBSCRIBE_OF_EARLY_MPYBLOX`].
fn check_first(first: u8) -> Result<(), PacketError> {
    if first == SUBSCRIBE_OF_EARLY_MPYBLOX {
        return Ok(());
    }
    let (kind, flags) = (first >> 4, first & 0x0f);
    let expected = match kind {
        1 | 4 | 5 | 7 | 12 | 14 => 0,
        3 => flags,
        6 | 8 | 10 => 0b0010,
        _ => return Err(unexpected(kind)),
    };
    match flags == expected {
        true => Ok(()),
        false => Err(wrong_flags(first)),
    }
}

fn wrong_flags(first: u8) -> PacketError {
    PacketError::malformed(format!("flags {:#06b} in a packet of type {}", first & 0x0f, first >> 4))
}

fn unexpected(kind: u8) -> PacketError {
    PacketError::protocol(match kind {
        15 => "AUTH was never agreed on".to_owned(),
        _ => format!("a client does not send packets of type {kind}"),
    })
}

fn connect(reader: &mut Reader) -> Result<Connect, PacketError> {
    /// Characters of an unknown protocol's name that are shown.
    const SHOWN: usize = 16;
    let name = reader.text()?;
    let level = reader.byte()?;
    let version = match (name.as_str(), level) {
        ("MQTT", 4) => Version::V3,
        ("MQTT", 5) => Version::V5,
        ("MQTT" | "MQIsdp", _) => {
            return Err(PacketError {
                reason: Reason::UnsupportedProtocolVersion,
                text: format!(
                    "protocol `{}` level {level} is not served",
                    name.chars().take(SHOWN).collect::<String>().escape_debug()
                ),
            });
        }
        // [MQTT-3.1.2-1]: perhaps it speaks something else; [MQTT-3.1.4-1] of 3.1.1: no CONNACK.
        _ => return Err(PacketError::protocol("a CONNECT of another protocol")),
    };
    reader.version = version;
    let flags = reader.byte()?;
    let (has_user, has_password) = (flags & 0x80 != 0, flags & 0x40 != 0);
    let (will_retain, has_will, clean_start) = (flags & 0x20 != 0, flags & 0x04 != 0, flags & 0x02 != 0);
    let will_qos = Qos::from_number(flags >> 3 & 0x03);
    let bad_will = !has_will && (will_retain || will_qos != Some(Qos::AtMostOnce));
    // [MQTT-3.1.2-22]: without a user name there is no password (3.1.1 only).
    let bad_password = version == Version::V3 && has_password && !has_user;
    let (Some(will_qos), 0, false, false) = (will_qos, flags & 0x01, bad_will, bad_password) else {
        return Err(PacketError::malformed(format!("connect flags {flags:#010b}")));
    };
    let keep_alive = reader.number16()?;
    let mut connect = Connect {
        version,
        client_id: String::new(),
        clean_start,
        // 3.1.2.11.2: without the property it ends with the connection.
        session_expiry: if version == Version::V3 && !clean_start { u32::MAX } else { 0 },
        keep_alive,
        will: None,
        will_delay: 0,
        receive_maximum: u16::MAX,
        maximum_packet_size: None,
        user: None,
        password: None,
        wants_auth_exchange: false,
        wants_problems: true,
    };
    reader.properties(|id, value| {
        match (id, value) {
            (property::RECEIVE_MAXIMUM, Value::Short(number)) => connect.receive_maximum = number,
            (property::MAXIMUM_PACKET_SIZE, Value::Long(number)) => {
                connect.maximum_packet_size = Some(number);
            }
            (property::AUTH_METHOD, Value::Text(_)) => connect.wants_auth_exchange = true,
            (property::REQUEST_PROBLEM, Value::Byte(byte)) => connect.wants_problems = byte == 1,
            (property::SESSION_EXPIRY, Value::Long(seconds)) => connect.session_expiry = seconds,
            (property::REQUEST_RESPONSE, Value::Byte(_))
            | (property::TOPIC_ALIAS_MAXIMUM, Value::Short(_))
            | (property::AUTH_DATA, Value::Binary(_))
            | (property::USER, Value::Pair(..)) => {}
            _ => return false,
        }
        true
    })?;
    connect.client_id = reader.text()?;
    if has_will {
        let mut properties = Properties::default();
        reader.properties(|id, value| match (id, value) {
            (property::WILL_DELAY, Value::Long(seconds)) => {
                connect.will_delay = seconds;
                true
            }
            (id, value) => properties.take(id, value),
        })?;
        connect.will = Some(Publish {
            topic: reader.text()?,
            // It stays as long as the client; the rest of the packet need not.
            payload: Bytes::copy_from_slice(&reader.binary()?),
            qos: will_qos,
            retain: will_retain,
            packet_id: 0,
            duplicate: false,
            properties,
        });
    }
    if has_user {
        connect.user = Some(reader.text()?);
    }
    if has_password {
        // A copy, so that it does not keep the whole packet.
        connect.password = Some(Secret(Bytes::copy_from_slice(&reader.binary()?)));
    }
    Ok(connect)
}

fn publish(reader: &mut Reader, flags: u8) -> Result<(Publish, Option<u16>), PacketError> {
    let qos = Qos::from_number(flags >> 1 & 0x03).ok_or_else(|| PacketError::malformed("QoS 3"))?;
    let duplicate = flags & 0x08 != 0;
    if duplicate && qos == Qos::AtMostOnce {
        return Err(PacketError::malformed("a duplicate at QoS 0"));
    }
    let topic = reader.text()?;
    let packet_id = if qos == Qos::AtMostOnce { 0 } else { reader.packet_id()? };
    let mut properties = Properties::default();
    let mut alias = None;
    reader.properties(|id, value| match (id, value) {
        (property::TOPIC_ALIAS, Value::Short(number)) => {
            alias = Some(number);
            true
        }
        (id, value) => properties.take(id, value),
    })?;
    let payload = reader.bytes.split_off(0);
    let retain = flags & 0x01 != 0;
    Ok((Publish { topic, payload, qos, retain, packet_id, duplicate, properties }, alias))
}

/// [MQTT-3.4.2-1], [MQTT-3.5.2-1]: the reasons in a PUBACK and a PUBREC.
const REASONS_OF_RECEIVER: &[u8] = &[0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99];
/// [MQTT-3.6.2-1], [MQTT-3.7.2-1]: the reasons in a PUBREL and a PUBCOMP.
const REASONS_OF_RELEASE: &[u8] = &[0x00, 0x92];

/// PUBACK, PUBREC, PUBREL and PUBCOMP: an id and, in MQTT 5, perhaps one of `reasons`, and properties that
/// change nothing for a broker.
fn acknowledgement(reader: &mut Reader, reasons: &[u8]) -> Result<(u16, u8), PacketError> {
    let id = reader.packet_id()?;
    let mut reason = 0;
    if reader.version == Version::V5 && reader.bytes.has_remaining() {
        reason = reader.byte()?;
        if !reasons.contains(&reason) {
            return Err(PacketError::protocol(format!("reason {reason:#04x} does not belong here")));
        }
        if reader.bytes.has_remaining() {
            reader.properties(|id, value| {
                matches!(
                    (id, value),
                    (property::REASON_STRING, Value::Text(_)) | (property::USER, Value::Pair(..))
                )
            })?;
        }
    }
    Ok((id, reason))
}

fn subscribe(reader: &mut Reader) -> Result<Subscribe, PacketError> {
    let packet_id = reader.packet_id()?;
    let mut identifier = None;
    reader.properties(|id, value| match (id, value) {
        (property::SUBSCRIPTION_ID, Value::Variable(number)) => {
            identifier = NonZeroU32::new(number);
            true
        }
        (property::USER, Value::Pair(..)) => true,
        _ => false,
    })?;
    let mut filters = Vec::new();
    while reader.bytes.has_remaining() {
        let filter = reader.text()?;
        let byte = reader.byte()?;
        let bad = || PacketError::malformed(format!("subscription options {byte:#010b}"));
        let options = SubscriptionOptions {
            qos: Qos::from_number(byte & 0x03).ok_or_else(bad)?,
            no_local: byte & 0x04 != 0,
            retain_as_published: byte & 0x08 != 0,
            retain_handling: match byte >> 4 & 0x03 {
                0 => RetainHandling::Send,
                1 => RetainHandling::SendIfNew,
                2 => RetainHandling::DoNotSend,
                _ => return Err(bad()),
            },
            identifier,
        };
        if byte & 0xc0 != 0 || (reader.version == Version::V3 && byte & 0xfc != 0) {
            return Err(bad());
        }
        filters.push((filter, options));
    }
    if filters.is_empty() {
        return Err(PacketError::protocol("a SUBSCRIBE without a filter"));
    }
    Ok(Subscribe { packet_id, filters })
}

fn unsubscribe(reader: &mut Reader) -> Result<Unsubscribe, PacketError> {
    let packet_id = reader.packet_id()?;
    reader.properties(|id, value| matches!((id, value), (property::USER, Value::Pair(..))))?;
    let mut filters = Vec::new();
    while reader.bytes.has_remaining() {
        filters.push(reader.text()?);
    }
    if filters.is_empty() {
        return Err(PacketError::protocol("an UNSUBSCRIBE without a filter"));
    }
    Ok(Unsubscribe { packet_id, filters })
}

fn disconnect(reader: &mut Reader) -> Result<Packet, PacketError> {
    let (mut with_will, mut session_expiry) = (false, None);
    if reader.version == Version::V5 && reader.bytes.has_remaining() {
        // 3.14.2.1: any reason but 0x00 means the will is to be published.
        with_will = reader.byte()? != 0;
        if reader.bytes.has_remaining() {
            reader.properties(|id, value| match (id, value) {
                (property::SESSION_EXPIRY, Value::Long(seconds)) => {
                    session_expiry = Some(seconds);
                    true
                }
                (property::REASON_STRING, Value::Text(_)) | (property::USER, Value::Pair(..)) => true,
                _ => false,
            })?;
        }
    }
    Ok(Packet::Disconnect { with_will, session_expiry })
}

/// A property's value, of the type its id prescribes.
enum Value {
    Byte(u8),
    Short(u16),
    Long(u32),
    Variable(u32),
    Text(String),
    Binary(Bytes),
    Pair(String, String),
}

impl Value {
    /// Whether the property `id` can have this value: flags are 0 or 1 (3.1.2.11.6, 3.1.2.11.7, 3.3.2.3.2), and
    /// these maxima (3.1.2.11.3, 3.1.2.11.4) and identifiers (3.8.2.1.2) are not 0.
    fn is_possible(&self, id: u8) -> bool {
        match (id, self) {
            (
                property::PAYLOAD_FORMAT | property::REQUEST_PROBLEM | property::REQUEST_RESPONSE,
                Value::Byte(byte),
            ) => *byte <= 1,
            (property::RECEIVE_MAXIMUM, Value::Short(number)) => *number > 0,
            (property::MAXIMUM_PACKET_SIZE, Value::Long(number))
            | (property::SUBSCRIPTION_ID, Value::Variable(number)) => *number > 0,
            _ => true,
        }
    }
}

impl Properties {
    /// Takes a property of a message; false if it is none.
    fn take(&mut self, id: u8, value: Value) -> bool {
        match (id, value) {
            (property::PAYLOAD_FORMAT, Value::Byte(byte)) => self.payload_format = Some(byte),
            (property::MESSAGE_EXPIRY, Value::Long(seconds)) => self.expiry = Some(seconds),
            (property::CONTENT_TYPE, Value::Text(text)) => self.content_type = Some(text),
            (property::RESPONSE_TOPIC, Value::Text(text)) => self.response_topic = Some(text),
            (property::CORRELATION_DATA, Value::Binary(data)) => self.correlation_data = Some(data.to_vec()),
            (property::USER, Value::Pair(name, value)) => self.user.push((name, value)),
            _ => return false,
        }
        true
    }
}

struct Reader {
    bytes: Bytes,
    version: Version,
    most_properties: usize,
}

impl Reader {
    fn need(&self, count: usize) -> Result<(), PacketError> {
        match self.bytes.remaining() >= count {
            true => Ok(()),
            false => Err(PacketError::malformed("a packet ends in the middle of a field")),
        }
    }

    fn byte(&mut self) -> Result<u8, PacketError> {
        self.need(1)?;
        Ok(self.bytes.get_u8())
    }

    fn number16(&mut self) -> Result<u16, PacketError> {
        self.need(2)?;
        Ok(self.bytes.get_u16())
    }

    fn number32(&mut self) -> Result<u32, PacketError> {
        self.need(4)?;
        Ok(self.bytes.get_u32())
    }

    /// [MQTT-2.3.1-1]: not zero.
    fn packet_id(&mut self) -> Result<u16, PacketError> {
        match self.number16()? {
            0 => Err(PacketError::malformed("packet id 0")),
            id => Ok(id),
        }
    }

    fn variable(&mut self) -> Result<u32, PacketError> {
        let mut number = 0;
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            number |= u32::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(PacketError::malformed("a variable number takes more than four bytes"))
    }

    fn binary(&mut self) -> Result<Bytes, PacketError> {
        let length = usize::from(self.number16()?);
        self.need(length)?;
        Ok(self.bytes.split_to(length))
    }

    /// Section 1.5.4 (1.5.3 in 3.1.1): UTF-8, never with U+0000.
    fn text(&mut self) -> Result<String, PacketError> {
        let bytes = self.binary()?;
        match std::str::from_utf8(&bytes) {
            Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
            Ok(_) => Err(PacketError::malformed("a text holds U+0000")),
            Err(_) => Err(PacketError::malformed("a text is not UTF-8")),
        }
    }

    /// Reads MQTT 5's properties and hands each to `take`, which says whether it belongs here. All but user
    /// properties may stand only once (2.2.2.2).
    fn properties(&mut self, mut take: impl FnMut(u8, Value) -> bool) -> Result<(), PacketError> {
        if self.version == Version::V3 {
            return Ok(());
        }
        let length = self.variable()? as usize;
        if length > self.most_properties {
            return Err(PacketError {
                reason: Reason::PacketTooLarge,
                text: format!("properties of {length} bytes are larger than {}", self.most_properties),
            });
        }
        self.need(length)?;
        let mut part =
            Reader { bytes: self.bytes.split_to(length), version: self.version, most_properties: 0 };
        let mut seen = 0_u64;
        while part.bytes.has_remaining() {
            // Ids are variable numbers, all below 128 so far.
            let id = part.byte()?;
            let value = match id {
                0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28 | 0x29 | 0x2a => Value::Byte(part.byte()?),
                0x13 | 0x21 | 0x22 | 0x23 => Value::Short(part.number16()?),
                0x02 | 0x11 | 0x18 | 0x27 => Value::Long(part.number32()?),
                0x0b => Value::Variable(part.variable()?),
                0x03 | 0x08 | 0x12 | 0x15 | 0x1a | 0x1c | 0x1f => Value::Text(part.text()?),
                0x09 | 0x16 => Value::Binary(part.binary()?),
                0x26 => Value::Pair(part.text()?, part.text()?),
                _ => return Err(PacketError::malformed(format!("property {id:#04x} does not exist"))),
            };
            if id != property::USER && seen & (1 << id) != 0 {
                return Err(PacketError::protocol(format!("property {id:#04x} stands twice")));
            }
            seen |= 1 << id;
            if !value.is_possible(id) {
                return Err(PacketError::protocol(format!("property {id:#04x} cannot have this value")));
            }
            // 2.2.2.2: malformed, where what stands twice is a protocol error.
            if !take(id, value) {
                return Err(PacketError::malformed(format!("property {id:#04x} does not belong here")));
            }
        }
        Ok(())
    }
}
