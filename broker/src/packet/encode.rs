//! Packets to bytes for a client.

use std::num::NonZeroU32;

use bytes::{BufMut, Bytes, BytesMut};
use mpypi_protocol::greeting;

use super::{Properties, Qos, Reason, Version, property};
use crate::limits::Limits;

/// What an accepted client is told in CONNACK.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Welcome {
    /// Whether its session goes on.
    pub session_present: bool,
    /// Seconds that its session is kept, where it asked for something else.
    pub session_expiry: Option<u32>,
    /// The id we gave it, if it had none.
    pub assigned_id: Option<String>,
    /// Whether the client takes a packet large enough to hear what else we do: it must not be told otherwise
    /// (3.2.2.3.10).
    pub has_room: bool,
}

/// CONNACK for a client that may come in. In MQTT 5 it learns our limits too.
#[must_use]
pub fn accept(version: Version, limits: &Limits, welcome: &Welcome) -> Bytes {
    let present = u8::from(welcome.session_present);
    if version == Version::V3 {
        return Bytes::copy_from_slice(&[0x20, 2, present, 0]);
    }
    let mut properties = BytesMut::new();
    properties.put_u8(property::RECEIVE_MAXIMUM);
    properties.put_u16(limits.inbound_window);
    properties.put_u8(property::MAXIMUM_PACKET_SIZE);
    properties.put_u32(u32::try_from(limits.packet).unwrap_or(u32::MAX));
    properties.put_u8(property::TOPIC_ALIAS_MAXIMUM);
    properties.put_u16(limits.topic_aliases);
    if let Some(seconds) = welcome.session_expiry {
        properties.put_u8(property::SESSION_EXPIRY);
        properties.put_u32(seconds);
    }
    if let Some(id) = &welcome.assigned_id {
        properties.put_u8(property::ASSIGNED_CLIENT_ID);
        put_text(&mut properties, id);
    }
    if welcome.has_room {
        properties.put_u8(property::USER);
        put_text(&mut properties, greeting::SERVES);
        put_text(&mut properties, greeting::MPY_BLOX);
        properties.put_u8(property::USER);
        put_text(&mut properties, greeting::PACKAGE);
        put_text(&mut properties, &limits.package.to_string());
    }
    connack(present, Reason::Success, &properties)
}

/// CONNACK for a client that may not come in. In MQTT 5 it learns why.
#[must_use]
pub fn refuse(version: Version, reason: Reason, text: &str) -> Bytes {
    if version == Version::V3 {
        return Bytes::copy_from_slice(&[0x20, 2, 0, reason.v3_connect()]);
    }
    let mut properties = BytesMut::new();
    put_reason_string(&mut properties, text);
    connack(0, reason, &properties)
}

fn connack(present: u8, reason: Reason, properties: &[u8]) -> Bytes {
    let mut body = BytesMut::new();
    body.put_u8(present);
    body.put_u8(reason as u8);
    put_variable(&mut body, properties.len());
    body.put_slice(properties);
    packet(0x20, &body)
}

/// Everything of a PUBLISH before its payload.
#[derive(Debug, Clone, Copy)]
pub struct Head<'m> {
    /// The topic.
    pub topic: &'m str,
    /// The QoS.
    pub qos: Qos,
    /// The retain flag.
    pub retain: bool,
    /// Whether it was perhaps sent before.
    pub duplicate: bool,
    /// Identifies the packet; 0 at QoS 0.
    pub packet_id: u16,
    /// The message's properties.
    pub properties: &'m Properties,
    /// Seconds left until the message means nothing.
    pub expiry: Option<u32>,
    /// What the client calls the subscriptions that brought the message.
    pub identifiers: &'m [NonZeroU32],
}

impl Head<'_> {
    /// The bytes, for a payload of `payload` bytes.
    #[must_use]
    pub fn to_bytes(&self, version: Version, payload: u64) -> Bytes {
        let properties = match version {
            Version::V3 => BytesMut::new(),
            Version::V5 => self.properties(),
        };
        let id = if self.qos == Qos::AtMostOnce { 0 } else { 2 };
        let body = 2 + self.topic.len() + id + properties.len();
        let length = body + usize::try_from(payload).unwrap_or(usize::MAX / 2);
        // Once, and as large as it will be: this is done for each receiver of each message.
        let mut head = BytesMut::with_capacity(1 + variable_size(length) + body);
        let flags = u8::from(self.duplicate) << 3 | (self.qos as u8) << 1 | u8::from(self.retain);
        head.put_u8(0x30 | flags);
        put_variable(&mut head, length);
        put_text(&mut head, self.topic);
        if self.qos != Qos::AtMostOnce {
            head.put_u16(self.packet_id);
        }
        head.put(properties);
        head.freeze()
    }

    /// MQTT 5's properties, their length before them.
    fn properties(&self) -> BytesMut {
        let message = self.properties;
        let mut properties = BytesMut::new();
        if let Some(byte) = message.payload_format {
            properties.put_slice(&[property::PAYLOAD_FORMAT, byte]);
        }
        if let Some(seconds) = self.expiry {
            properties.put_u8(property::MESSAGE_EXPIRY);
            properties.put_u32(seconds);
        }
        if let Some(text) = &message.content_type {
            properties.put_u8(property::CONTENT_TYPE);
            put_text(&mut properties, text);
        }
        if let Some(text) = &message.response_topic {
            properties.put_u8(property::RESPONSE_TOPIC);
            put_text(&mut properties, text);
        }
        if let Some(data) = &message.correlation_data {
            properties.put_u8(property::CORRELATION_DATA);
            put_binary(&mut properties, data);
        }
        for identifier in self.identifiers {
            properties.put_u8(property::SUBSCRIPTION_ID);
            put_variable(&mut properties, identifier.get() as usize);
        }
        for (name, value) in &message.user {
            properties.put_u8(property::USER);
            put_text(&mut properties, name);
            put_text(&mut properties, value);
        }
        let mut with_length = BytesMut::with_capacity(variable_size(properties.len()) + properties.len());
        put_variable(&mut with_length, properties.len());
        with_length.put(properties);
        with_length
    }
}

/// PUBACK
#[must_use]
pub fn puback(version: Version, packet_id: u16, reason: Reason, text: &str) -> Bytes {
    acknowledgement(0x40, version, packet_id, reason, text)
}

/// PUBREC
#[must_use]
pub fn pubrec(version: Version, packet_id: u16, reason: Reason, text: &str) -> Bytes {
    acknowledgement(0x50, version, packet_id, reason, text)
}

/// PUBREL
#[must_use]
pub fn pubrel(version: Version, packet_id: u16, reason: Reason) -> Bytes {
    acknowledgement(0x62, version, packet_id, reason, "")
}

/// PUBCOMP
#[must_use]
pub fn pubcomp(version: Version, packet_id: u16, reason: Reason) -> Bytes {
    acknowledgement(0x70, version, packet_id, reason, "")
}

/// SUBACK: the QoS granted or why not, for each filter.
#[must_use]
pub fn suback(version: Version, packet_id: u16, granted: &[Result<Qos, Reason>]) -> Bytes {
    let mut body = BytesMut::new();
    body.put_u16(packet_id);
    if version == Version::V5 {
        body.put_u8(0);
    }
    for grant in granted {
        body.put_u8(match (grant, version) {
            (Ok(qos), _) => *qos as u8,
            (Err(reason), Version::V5) => *reason as u8,
            (Err(_), Version::V3) => 0x80,
        });
    }
    packet(0x90, &body)
}

/// UNSUBACK: for each filter, whether there was such a subscription.
#[must_use]
pub fn unsuback(version: Version, packet_id: u16, reasons: &[Reason]) -> Bytes {
    let mut body = BytesMut::new();
    body.put_u16(packet_id);
    if version == Version::V5 {
        body.put_u8(0);
        body.extend(reasons.iter().map(|reason| *reason as u8));
    }
    packet(0xb0, &body)
}

/// PINGRESP
#[must_use]
pub fn pingresp() -> Bytes {
    Bytes::from_static(&[0xd0, 0])
}

/// DISCONNECT with a reason. MQTT 3.1.1 has none from a server: nothing is sent.
#[must_use]
pub fn disconnect(version: Version, reason: Reason, text: &str) -> Bytes {
    if version == Version::V3 {
        return Bytes::new();
    }
    let mut properties = BytesMut::new();
    put_reason_string(&mut properties, text);
    let mut body = BytesMut::new();
    body.put_u8(reason as u8);
    put_variable(&mut body, properties.len());
    body.put(properties);
    packet(0xe0, &body)
}

fn acknowledgement(first: u8, version: Version, packet_id: u16, reason: Reason, text: &str) -> Bytes {
    let mut body = BytesMut::new();
    body.put_u16(packet_id);
    if version == Version::V5 && reason != Reason::Success {
        body.put_u8(reason as u8);
        let mut properties = BytesMut::new();
        put_reason_string(&mut properties, text);
        put_variable(&mut body, properties.len());
        body.put(properties);
    }
    packet(first, &body)
}

fn packet(first: u8, body: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(body.len() + 5);
    bytes.put_u8(first);
    put_variable(&mut bytes, body.len());
    bytes.put_slice(body);
    bytes.freeze()
}

/// A reason string no longer than [`REASON_STRING`] bytes; none if `text` is empty.
fn put_reason_string(properties: &mut BytesMut, text: &str) {
    /// Longest reason string sent, in bytes: clients read it on small heaps.
    const REASON_STRING: usize = 256;
    let mut end = text.len().min(REASON_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    if end > 0 {
        properties.put_u8(property::REASON_STRING);
        put_text(properties, &text[..end]);
    }
}

fn put_text(bytes: &mut BytesMut, text: &str) {
    put_binary(bytes, text.as_bytes());
}

/// At most 65535 bytes, which all that was read from a packet keeps to.
fn put_binary(bytes: &mut BytesMut, data: &[u8]) {
    let length = u16::try_from(data.len()).unwrap_or(u16::MAX);
    bytes.put_u16(length);
    bytes.put_slice(&data[..usize::from(length)]);
}

/// How many bytes [`put_variable`] takes.
fn variable_size(number: usize) -> usize {
    (number.max(1).ilog2() / 7) as usize + 1
}

fn put_variable(bytes: &mut BytesMut, mut number: usize) {
    loop {
        let byte = (number & 0x7f) as u8;
        number >>= 7;
        if number == 0 {
            bytes.put_u8(byte);
            return;
        }
        bytes.put_u8(byte | 0x80);
    }
}
