//! MQTT control packets as a broker sees them: bytes from clients to meaning, meaning to bytes for clients.
//!
//! Both versions share one set of types: 3.1.1 leaves properties empty. rumqttd's own codec keeps the packet
//! id and QoS of a PUBLISH to itself, so it cannot serve a connection layer outside its crate; this one
//! also validates everything the standards call malformed, and never copies a payload.

mod decode;
mod encode;

use std::num::NonZeroU32;

use bytes::Bytes;

pub use decode::{Frame, Framing, decode, frame};
pub use encode::{
    Head, Welcome, accept, disconnect, pingresp, puback, pubcomp, pubrec, pubrel, refuse, suback, unsuback,
};

/// The protocol version a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// MQTT 3.1.1
    V3,
    /// MQTT 5
    V5,
}

/// Quality of service of a message or subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[repr(u8)]
pub enum Qos {
    /// At most once.
    AtMostOnce = 0,
    /// At least once.
    AtLeastOnce = 1,
    /// Exactly once.
    ExactlyOnce = 2,
}

impl Qos {
    /// The level with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Qos> {
        match number {
            0 => Some(Qos::AtMostOnce),
            1 => Some(Qos::AtLeastOnce),
            2 => Some(Qos::ExactlyOnce),
            _ => None,
        }
    }
}

/// A packet that a client may send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// The first packet of a connection.
    Connect(Box<Connect>),
    /// A message. In MQTT 5 a topic alias may stand for its topic, or be given to it.
    Publish(Publish, Option<u16>),
    /// Acknowledges a QoS 1 message of ours.
    PubAck(u16),
    /// First answer to a QoS 2 message of ours.
    PubRec {
        /// Identifies the message.
        id: u16,
        /// The client does not take it: nothing follows.
        refused: bool,
    },
    /// The client releases its QoS 2 message.
    PubRel(u16),
    /// Last answer to a QoS 2 message of ours.
    PubComp(u16),
    /// Asks for messages.
    Subscribe(Subscribe),
    /// Wants messages no longer.
    Unsubscribe(Unsubscribe),
    /// Shows that the client lives.
    PingReq,
    /// The client leaves.
    Disconnect {
        /// Whether its will is to be published all the same (MQTT 5, reason 0x04).
        with_will: bool,
        /// Seconds that its session is to be kept, if it changed its mind.
        session_expiry: Option<u32>,
    },
}

/// What a CONNECT says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    /// The version asked for.
    pub version: Version,
    /// The client's id; empty asks for one.
    pub client_id: String,
    /// Whether an earlier session is to be forgotten.
    pub clean_start: bool,
    /// Seconds that the session is to be kept after the connection; `u32::MAX` for ever, as 3.1.1 has it
    /// without a clean session.
    pub session_expiry: u32,
    /// Seconds between packets; 0 for no limit.
    pub keep_alive: u16,
    /// What to publish when the client is lost.
    pub will: Option<Publish>,
    /// Seconds that the will waits for the client to come back.
    pub will_delay: u32,
    /// How many QoS 1 and 2 messages the client takes at once.
    pub receive_maximum: u16,
    /// The largest packet the client takes, in bytes.
    pub maximum_packet_size: Option<u32>,
    /// The user's name.
    pub user: Option<String>,
    /// The user's password.
    pub password: Option<Secret>,
    /// Whether an AUTH exchange is asked for, which we do not offer.
    pub wants_auth_exchange: bool,
    /// Whether reason strings are welcome beyond CONNACK and DISCONNECT (3.1.2.11.7).
    pub wants_problems: bool,
}

/// Bytes that must not be shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub Bytes);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a PUBLISH or a will says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// A topic name as it came: UTF-8 without NUL, not yet checked for more.
    pub topic: String,
    /// The message.
    pub payload: Bytes,
    /// How surely it is to be handled.
    pub qos: Qos,
    /// Whether it becomes the topic's retained message.
    pub retain: bool,
    /// Identifies the packet; 0 at QoS 0.
    pub packet_id: u16,
    /// Whether this may be the second time.
    pub duplicate: bool,
    /// MQTT 5's properties that travel with the message.
    pub properties: Properties,
}

/// MQTT 5's properties that travel with a message.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Properties {
    /// 1 if the payload says it is UTF-8.
    pub payload_format: Option<u8>,
    /// Seconds until the message means nothing.
    pub expiry: Option<u32>,
    /// What the payload is, for the receiver.
    pub content_type: Option<String>,
    /// Where an answer should go.
    pub response_topic: Option<String>,
    /// Tells the answer from others.
    pub correlation_data: Option<Vec<u8>>,
    /// Names and values for the receiver, in order.
    pub user: Vec<(String, String)>,
}

impl Properties {
    /// About how many bytes they take in memory, beyond their own size.
    #[must_use]
    pub fn memory(&self) -> usize {
        let texts = [&self.content_type, &self.response_topic].into_iter().flatten();
        let pairs = self.user.iter().map(|pair| pair.0.len() + pair.1.len() + size_of_val(pair));
        texts.map(String::len).chain(pairs).chain(self.correlation_data.iter().map(Vec::len)).sum()
    }
}

/// What a SUBSCRIBE says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscribe {
    /// Identifies the packet.
    pub packet_id: u16,
    /// Filters as they came, with what the client wants of each.
    pub filters: Vec<(String, SubscriptionOptions)>,
}

/// What a client wants of a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SubscriptionOptions {
    /// The highest QoS of messages.
    pub qos: Qos,
    /// Whether its own messages stay away.
    pub no_local: bool,
    /// Whether live messages keep the retain flag they were published with.
    pub retain_as_published: bool,
    /// Which retained messages it wants now.
    pub retain_handling: RetainHandling,
    /// What the client calls the subscription; its messages say so.
    pub identifier: Option<NonZeroU32>,
}

impl SubscriptionOptions {
    /// What the broker wants for itself: messages as they come.
    pub const LIVE: SubscriptionOptions = SubscriptionOptions {
        qos: Qos::AtMostOnce,
        no_local: false,
        retain_as_published: false,
        retain_handling: RetainHandling::DoNotSend,
        identifier: None,
    };
}

/// Which retained messages a SUBSCRIBE asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum RetainHandling {
    /// All that match.
    Send,
    /// All that match, if the subscription is new.
    SendIfNew,
    /// None.
    DoNotSend,
}

/// What an UNSUBSCRIBE says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsubscribe {
    /// Identifies the packet.
    pub packet_id: u16,
    /// Filters as they came.
    pub filters: Vec<String>,
}

/// MQTT 5 reason codes that we use. [`Reason::v3_connect`] gives the CONNACK code of 3.1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the standard's, section 2.4")]
pub enum Reason {
    Success = 0x00,
    NoSubscriptionExisted = 0x11,
    UnspecifiedError = 0x80,
    MalformedPacket = 0x81,
    ProtocolError = 0x82,
    ImplementationSpecificError = 0x83,
    UnsupportedProtocolVersion = 0x84,
    ClientIdentifierNotValid = 0x85,
    BadUserNameOrPassword = 0x86,
    NotAuthorized = 0x87,
    BadAuthenticationMethod = 0x8c,
    ServerBusy = 0x89,
    ServerShuttingDown = 0x8b,
    KeepAliveTimeout = 0x8d,
    SessionTakenOver = 0x8e,
    TopicFilterInvalid = 0x8f,
    TopicNameInvalid = 0x90,
    PacketIdentifierInUse = 0x91,
    PacketIdentifierNotFound = 0x92,
    ReceiveMaximumExceeded = 0x93,
    TopicAliasInvalid = 0x94,
    PacketTooLarge = 0x95,
    QuotaExceeded = 0x97,
    PayloadFormatInvalid = 0x99,
}

impl Reason {
    /// The CONNACK return code of MQTT 3.1.1 nearest to the reason (section 3.2.2.3).
    #[must_use]
    pub fn v3_connect(self) -> u8 {
        match self {
            Reason::Success => 0,
            Reason::UnsupportedProtocolVersion => 1,
            Reason::ClientIdentifierNotValid => 2,
            Reason::BadUserNameOrPassword => 4,
            Reason::NotAuthorized => 5,
            _ => 3,
        }
    }
}

/// Bytes that are no packet a client may send. The connection cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct PacketError {
    /// What to tell an MQTT 5 client.
    pub reason: Reason,
    /// What is wrong.
    pub text: String,
}

impl PacketError {
    fn malformed(text: impl Into<String>) -> PacketError {
        PacketError { reason: Reason::MalformedPacket, text: text.into() }
    }

    fn protocol(text: impl Into<String>) -> PacketError {
        PacketError { reason: Reason::ProtocolError, text: text.into() }
    }
}

/// Ids of MQTT 5 properties (section 2.2.2.2) that a broker reads or writes.
mod property {
    pub(super) const PAYLOAD_FORMAT: u8 = 0x01;
    pub(super) const MESSAGE_EXPIRY: u8 = 0x02;
    pub(super) const CONTENT_TYPE: u8 = 0x03;
    pub(super) const RESPONSE_TOPIC: u8 = 0x08;
    pub(super) const CORRELATION_DATA: u8 = 0x09;
    pub(super) const SUBSCRIPTION_ID: u8 = 0x0b;
    pub(super) const SESSION_EXPIRY: u8 = 0x11;
    pub(super) const ASSIGNED_CLIENT_ID: u8 = 0x12;
    pub(super) const AUTH_METHOD: u8 = 0x15;
    pub(super) const AUTH_DATA: u8 = 0x16;
    pub(super) const REQUEST_PROBLEM: u8 = 0x17;
    pub(super) const WILL_DELAY: u8 = 0x18;
    pub(super) const REQUEST_RESPONSE: u8 = 0x19;
    pub(super) const REASON_STRING: u8 = 0x1f;
    pub(super) const RECEIVE_MAXIMUM: u8 = 0x21;
    pub(super) const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
    pub(super) const TOPIC_ALIAS: u8 = 0x23;
    pub(super) const USER: u8 = 0x26;
    pub(super) const MAXIMUM_PACKET_SIZE: u8 = 0x27;
}

#[cfg(test)]
mod tests;
