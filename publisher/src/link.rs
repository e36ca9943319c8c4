//! One connection: what a publisher asks for, and what it is told. MQTT 5, which gives reasons; 3.1.1 with a broker that
//! speaks nothing else.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use mpypi_client::{Brokers, ConnectError, Endpoint, Line, LineError, V4, V5, endpoint::Moment};
use mpypi_protocol::{BrokerUrl, greeting, limits::PACKET, topic::CHANNELS};
use rumqttc::{
    self as four, Outgoing,
    v5::{
        Event, Request, StateError,
        mqttbytes::{
            Error as MqttError, QoS,
            v5::{
                ConnAck, ConnAckProperties, Connect, ConnectProperties, ConnectReturnCode,
                DisconnectReasonCode, Filter, LastWill, Login, Packet, PubAckReason, Publish,
                PublishProperties, Subscribe, SubscribeReasonCode, Unsubscribe,
            },
        },
    },
};
use serde::Serialize;
use tokio::time::timeout;

use crate::limits;

/// Bytes of a PUBLISH beside topic and payload, at most: header, topic length, packet id, no properties.
const OVERHEAD: usize = 10;

/// A connection to a broker. Dropping it closes it without a word; [`Link::close`] says goodbye.
#[derive(Debug)]
pub struct Link {
    url: BrokerUrl,
    wire: Wire,
    /// The largest packet that the broker takes, in bytes: as it says, or we were told.
    packet: usize,
    /// The largest package, or chunk of one, that it takes, in bytes.
    package: u64,
    adapts: bool,
    /// Publishes that have no packet id yet, in order.
    submitted: VecDeque<u64>,
    /// Publishes that wait for their PUBACK, by packet id.
    unacknowledged: HashMap<u16, u64>,
    next: u64,
    greeting: Option<Box<ConnAckProperties>>,
    last: Arrival,
}

/// A version of MQTT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Mqtt {
    /// 3.1.1, which devices speak.
    #[serde(rename = "3.1.1")]
    Four,
    /// 5, which has reasons.
    #[serde(rename = "5")]
    Five,
}

impl std::fmt::Display for Mqtt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mqtt::Four => "3.1.1",
            Mqtt::Five => "5",
        })
    }
}

/// Whether each message that comes is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receipt {
    /// QoS 0.
    None,
    /// QoS 1.
    Each,
}

/// How a message came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Arrival {
    /// Its QoS.
    pub qos: u8,
    /// Whether it was retained, and not passed on as it was published.
    pub retained: bool,
    /// For how many seconds it is kept, if it says so.
    pub expiry: Option<u32>,
}

/// A connection, in the version of MQTT that the broker speaks.
#[derive(Debug)]
enum Wire {
    Five(Box<Line<V5>>),
    Four(Box<Line<V4>>),
}

/// Whether the broker keeps a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retain {
    Kept,
    Passing,
}

/// Who got a message, as far as the broker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Somebody, or nobody: most brokers do not say.
    Unknown,
    /// Nobody (PUBACK 0x10).
    Nobody,
}

/// What a broker said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signal {
    /// A message on a topic subscribed to.
    Message {
        /// The topic.
        topic: String,
        /// The payload.
        payload: Bytes,
    },
    /// A SUBSCRIBE was answered: whether each filter was accepted.
    Subscribed(Vec<bool>),
    /// An UNSUBSCRIBE was answered.
    Unsubscribed,
    /// A publish was accepted, or refused.
    Acknowledged(u64, Result<Heard, Refusal>),
}

/// Why a broker refused something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The MQTT 5 reason code.
    pub code: u8,
    /// What the code means, in words.
    pub meaning: &'static str,
    /// What the broker says about it.
    pub reason: Option<String>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.reason {
            Some(reason) => write!(f, "{reason} ({} 0x{:02x})", self.meaning, self.code),
            None => write!(f, "{} (0x{:02x})", self.meaning, self.code),
        }
    }
}

/// What went wrong with a connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers there, or not in a way that can be trusted.
    #[error("broker {url} cannot be reached: {problem}")]
    Unreachable {
        /// The broker.
        url: String,
        /// Why.
        problem: ConnectError,
    },
    /// The broker has no time for us.
    #[error("broker {url} cannot be reached: it is busy")]
    Busy {
        /// The broker.
        url: String,
    },
    /// The broker does not want us.
    #[error("broker {url} refused the connection: {reason}")]
    Refused {
        /// The broker.
        url: String,
        /// Why.
        reason: &'static str,
    },
    /// Something that does not speak MQTT.
    #[error("{url} does not answer as an MQTT broker: {reason}")]
    NotMqtt {
        /// What it is not.
        url: String,
        /// Why.
        reason: String,
    },
    /// The connection broke.
    #[error("the connection to broker {url} was lost: {reason}")]
    Lost {
        /// The broker.
        url: String,
        /// Why.
        reason: String,
    },
    /// The broker closed the connection and said why.
    #[error("broker {url} closed the connection: {refusal}")]
    Closed {
        /// The broker.
        url: String,
        /// Why.
        refusal: Refusal,
    },
    /// The broker owes an answer and says nothing.
    #[error("broker {url} did not answer for {} s", after.as_secs())]
    Silent {
        /// The broker.
        url: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The broker takes no packet of that size.
    #[error("a packet of {size} bytes is more than broker {url} takes ({limit})")]
    TooLarge {
        /// The broker.
        url: String,
        /// The packet's size in bytes.
        size: usize,
        /// The broker's limit in bytes.
        limit: usize,
    },
}

impl LinkError {
    /// Whether a new connection may help.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            LinkError::Unreachable { problem, .. } => problem.is_passing(),
            LinkError::Busy { .. } | LinkError::Lost { .. } | LinkError::Silent { .. } => true,
            // Server busy, shutting down, keep-alive timeout, rate too high, administrative action.
            LinkError::Closed { refusal, .. } => {
                matches!(refusal.code, 0x00 | 0x80 | 0x89 | 0x8b | 0x8d | 0x96 | 0x98 | 0x9f | 0xa0)
            }
            LinkError::Refused { .. } | LinkError::NotMqtt { .. } | LinkError::TooLarge { .. } => false,
        }
    }

    /// The same without the broker's URL, where that stands before it.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            LinkError::Unreachable { problem, .. } => problem.to_string(),
            LinkError::Busy { .. } => "it is busy".to_owned(),
            LinkError::Refused { reason, .. } => format!("it refused the connection: {reason}"),
            LinkError::NotMqtt { reason, .. } => format!("it does not answer as an MQTT broker: {reason}"),
            LinkError::Lost { reason, .. } => reason.clone(),
            LinkError::Closed { refusal, .. } => format!("the broker closed it: {refusal}"),
            LinkError::Silent { after, .. } => format!("it did not answer for {} s", after.as_secs()),
            LinkError::TooLarge { limit, .. } => {
                format!("it says that it takes no packet above {limit} bytes")
            }
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            LinkError::Unreachable { problem, .. } if problem.hint().is_some() => return problem.hint(),
            LinkError::Unreachable { .. } | LinkError::Busy { .. } => {
                "is the broker running? Start one with `make broker`, or name another with `--broker` or \
                 MPYPI_BROKER"
            }
            LinkError::Refused { .. } => {
                "give a user and password: `--broker mqtt://user:password@host:port`"
            }
            LinkError::TooLarge { .. } => "raise the broker's packet limit",
            LinkError::Closed { refusal, .. } => return refusal.hint(),
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

impl Refusal {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self.code {
            0x87 => "log in as a user who may publish: `--broker mqtt://user:password@host:port`",
            0x95 => {
                "say with `--max-packet SIZE` what the broker takes, and what is larger goes in chunks; or raise its limit"
            }
            0x97 => {
                "the broker is full, or a limit of it was reached: make room or raise the limit, then run again"
            }
            0x99 => {
                "the broker checked what arrived and found it wrong: run again; if it stays, update both sides"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

impl Link {
    /// Connects, with a clean start and a client id of its own.
    ///
    /// # Errors
    /// [`LinkError::Unreachable`], [`LinkError::Refused`] or [`LinkError::NotMqtt`]
    pub async fn connect(endpoint: &Endpoint) -> Result<Link, LinkError> {
        Link::open(endpoint, None, limits::KEEP_ALIVE).await
    }

    /// Connects to the first of several that answers.
    ///
    /// # Errors
    /// What one says that is no reason to ask another, or what the first one says if none answers.
    pub async fn connect_any(brokers: &Brokers) -> Result<Link, LinkError> {
        let mut first = None;
        for endpoint in brokers.iter() {
            match Link::connect(endpoint).await {
                Err(error) if error.is_passing() => _ = first.get_or_insert(error),
                done => return done,
            }
        }
        Err(first.unwrap_or_else(|| unreachable!("there is at least one broker")))
    }

    /// Connects. When the connection ends without a goodbye, the broker clears what is retained on `topic`; it notices the
    /// end after one and a half times `keep_alive`.
    ///
    /// # Errors
    /// As [`Link::connect`].
    pub async fn connect_clearing(
        endpoint: &Endpoint,
        topic: &str,
        keep_alive: Duration,
    ) -> Result<Link, LinkError> {
        Link::open(endpoint, Some(topic), keep_alive).await
    }

    /// Connects in one version of MQTT, with a clean start, as `id`; with an empty one the broker gives a name.
    ///
    /// # Errors
    /// As [`Link::connect`]; also that the broker does not speak this version.
    pub async fn connect_in(endpoint: &Endpoint, mqtt: Mqtt, id: &str) -> Result<Link, LinkError> {
        match mqtt {
            Mqtt::Four => Link::open_four(endpoint, id, None, limits::KEEP_ALIVE).await,
            Mqtt::Five => {
                let opened = Link::open_five(endpoint, id, None, limits::KEEP_ALIVE).await;
                opened.map_err(|(Declined::Version(error) | Declined::Other(error))| error)
            }
        }
    }

    async fn open(
        endpoint: &Endpoint,
        clears: Option<&str>,
        keep_alive: Duration,
    ) -> Result<Link, LinkError> {
        let id = format!("mpypi-{}-{:08x}", std::process::id(), fastrand::u32(..));
        let error = match Link::open_five(endpoint, &id, clears, keep_alive).await {
            Ok(link) => return Ok(link),
            Err(Declined::Other(error)) => return Err(error),
            Err(Declined::Version(error)) => error,
        };
        match Link::open_four(endpoint, &id, clears, keep_alive).await {
            // It was not about the version: what it said first is what it says to whom it understands.
            Err(LinkError::NotMqtt { .. } | LinkError::Unreachable { .. }) => Err(error),
            done => done,
        }
    }

    async fn open_five(
        endpoint: &Endpoint,
        id: &str,
        clears: Option<&str>,
        keep_alive: Duration,
    ) -> Result<Link, Declined> {
        let url = endpoint.url();
        let will = clears.map(|topic| LastWill::new(topic, Vec::new(), QoS::AtLeastOnce, true, None));
        let properties =
            ConnectProperties { max_packet_size: Some(PACKET as u32), ..ConnectProperties::new() };
        let hello = Connect {
            keep_alive: keep_alive.as_secs() as u16,
            client_id: id.to_owned(),
            clean_start: true,
            properties: Some(properties),
        };
        let login = url.credentials.as_ref().map(|(user, password)| Login::new(user, password));
        let hello = Packet::Connect(hello, will, login);
        let opened = Line::open(endpoint, V5::new(PACKET as u32), hello).await;
        let (mut line, packet) = opened.map_err(|error| match &error {
            // A broker of 3.1.1 answers in 3.1.1, with less than what is read here, and hangs up.
            LineError::Mqtt(_)
            | LineError::Connect(ConnectError::HungUp(Moment::Plain | Moment::Secured)) => {
                Declined::Version(connect_error(url, error))
            }
            _ => Declined::Other(connect_error(url, error)),
        })?;
        let greeting = match packet {
            Packet::ConnAck(greeting) if greeting.code == ConnectReturnCode::Success => greeting,
            Packet::ConnAck(refusal) => {
                let is_version = matches!(
                    refusal.code,
                    ConnectReturnCode::UnsupportedProtocolVersion | ConnectReturnCode::RefusedProtocolVersion
                );
                let error = refused(url, &refusal);
                return Err(if is_version { Declined::Version(error) } else { Declined::Other(error) });
            }
            other => return Err(Declined::Other(not_mqtt(url, &other))),
        };
        let properties = greeting.properties.as_ref();
        let limit = properties.and_then(|properties| properties.max_packet_size);
        let serves = (greeting::SERVES.to_owned(), greeting::MPY_BLOX.to_owned());
        let said = properties.map(|properties| properties.user_properties.as_slice()).unwrap_or_default();
        let adapts = said.contains(&serves);
        let package = said.iter().find(|(key, _)| key == greeting::PACKAGE);
        let package = package.and_then(|(_, bytes)| bytes.parse().ok()).unwrap_or(u64::MAX);
        // MQTT 5, 3.2.2.3.14: the broker's keep-alive takes the place of ours.
        let servers = properties.and_then(|properties| properties.server_keep_alive);
        let keep_alive = servers.map_or(keep_alive, |seconds| Duration::from_secs(seconds.into()));
        let said = greeting.properties.clone().map(Box::new);
        line.accept(Some(Packet::ConnAck(greeting)), keep_alive);
        let packet = limit.map_or(PACKET, |limit| PACKET.min(limit as usize));
        let wire = Wire::Five(Box::new(line));
        Ok(Link { package, adapts, greeting: said, ..Link::new(endpoint, wire, packet) })
    }

    async fn open_four(
        endpoint: &Endpoint,
        id: &str,
        clears: Option<&str>,
        keep_alive: Duration,
    ) -> Result<Link, LinkError> {
        let url = endpoint.url();
        let mut hello = four::Connect::new(id);
        hello.keep_alive = keep_alive.as_secs() as u16;
        hello.clean_session = true;
        hello.last_will =
            clears.map(|topic| four::LastWill::new(topic, Vec::new(), four::QoS::AtLeastOnce, true));
        let login = url.credentials.as_ref();
        hello.login = login.map(|(user, password)| four::Login::new(user, password));
        // Packet ids of all requests are drawn from this range, so it must be wide; callers bound what is on its way.
        let version = V4::new(u16::MAX, PACKET);
        let opened = Line::open(endpoint, version, four::Packet::Connect(hello)).await;
        let (mut line, packet) = opened.map_err(|error| connect_error(url, error))?;
        match packet {
            four::Packet::ConnAck(greeting) if greeting.code == four::ConnectReturnCode::Success => {}
            four::Packet::ConnAck(refusal) => {
                let url = url.to_string();
                return Err(match refusal.code {
                    four::ConnectReturnCode::ServiceUnavailable => LinkError::Busy { url },
                    four::ConnectReturnCode::BadUserNamePassword => {
                        LinkError::Refused { url, reason: "bad user name or password" }
                    }
                    four::ConnectReturnCode::NotAuthorized => {
                        LinkError::Refused { url, reason: "not authorized" }
                    }
                    four::ConnectReturnCode::BadClientId => {
                        LinkError::Refused { url, reason: "client identifier not valid" }
                    }
                    _ => LinkError::Refused { url, reason: "it speaks neither MQTT 5 nor 3.1.1" },
                });
            }
            other => return Err(not_mqtt(url, &other)),
        }
        line.accept(None, keep_alive);
        Ok(Link::new(endpoint, Wire::Four(Box::new(line)), PACKET))
    }

    fn new(endpoint: &Endpoint, wire: Wire, packet: usize) -> Link {
        Link {
            url: endpoint.url().clone(),
            wire,
            packet: endpoint.packet().map_or(packet, |told| packet.min(told)),
            package: u64::MAX,
            adapts: false,
            submitted: VecDeque::new(),
            unacknowledged: HashMap::new(),
            next: 0,
            greeting: None,
            last: Arrival::default(),
        }
    }

    /// Where the broker is.
    #[must_use]
    pub fn url(&self) -> &BrokerUrl {
        &self.url
    }

    /// Whether the broker serves Mpy-BLOX nodes a list that they can take, in place of the channel's.
    #[must_use]
    pub fn adapts_for_mpyblox(&self) -> bool {
        self.adapts
    }

    /// The largest packet that the broker takes, in bytes.
    #[must_use]
    pub fn packet(&self) -> usize {
        self.packet
    }

    /// The largest payload that it takes on `topic`, in bytes. Brokers of ours say how large a package may be.
    #[must_use]
    pub fn room(&self, topic: &str) -> u64 {
        let most = if topic.starts_with(CHANNELS) { u64::MAX } else { self.package };
        most.min(self.packet.saturating_sub(topic.len() + OVERHEAD) as u64)
    }

    /// Whether it takes a payload of `size` bytes on `topic`.
    #[must_use]
    pub fn takes(&self, topic: &str, size: u64) -> bool {
        size <= self.room(topic)
    }

    /// What the broker said of itself when it let us in; nothing in 3.1.1.
    #[must_use]
    pub fn greeting(&self) -> Option<&ConnAckProperties> {
        self.greeting.as_deref()
    }

    /// How the message of the last [`Signal::Message`] came.
    #[must_use]
    pub fn arrival(&self) -> Arrival {
        self.last
    }

    /// Subscribes at QoS 0; answered by [`Signal::Subscribed`].
    pub fn subscribe(&mut self, filters: &[String]) {
        self.subscribe_with(filters, Receipt::None);
    }

    /// Subscribes; answered by [`Signal::Subscribed`].
    pub fn subscribe_with(&mut self, filters: &[String], receipt: Receipt) {
        let (five, four) = match receipt {
            Receipt::None => (QoS::AtMostOnce, four::QoS::AtMostOnce),
            Receipt::Each => (QoS::AtLeastOnce, four::QoS::AtLeastOnce),
        };
        match &mut self.wire {
            Wire::Five(line) => {
                let filters = filters.iter().map(|filter| Filter::new(filter.as_str(), five));
                line.request(Request::Subscribe(Subscribe::new_many(filters, None)));
            }
            Wire::Four(line) => {
                let filters = filters.iter().map(|filter| four::SubscribeFilter::new(filter.clone(), four));
                line.request(four::Request::Subscribe(four::Subscribe::new_many(filters)));
            }
        }
    }

    /// Unsubscribes; answered by [`Signal::Unsubscribed`].
    pub fn unsubscribe(&mut self, filter: &str) {
        match &mut self.wire {
            Wire::Five(line) => line.request(Request::Unsubscribe(Unsubscribe::new(filter, None))),
            Wire::Four(line) => line.request(four::Request::Unsubscribe(four::Unsubscribe::new(filter))),
        }
    }

    /// Publishes retained at QoS 1; answered by [`Signal::Acknowledged`] with the number returned.
    ///
    /// # Errors
    /// [`LinkError::TooLarge`]
    pub fn publish(&mut self, topic: &str, payload: Bytes) -> Result<u64, LinkError> {
        self.send(topic, payload, Retain::Kept, None)
    }

    /// Publishes retained at QoS 1, to be forgotten after so many seconds, which only MQTT 5 can say; answered likewise.
    ///
    /// # Errors
    /// [`LinkError::TooLarge`]
    pub fn publish_for(&mut self, topic: &str, payload: Bytes, seconds: u32) -> Result<u64, LinkError> {
        self.send(topic, payload, Retain::Kept, Some(seconds))
    }

    /// Publishes at QoS 1 to whoever listens now; answered likewise.
    ///
    /// # Errors
    /// [`LinkError::TooLarge`]
    pub fn tell(&mut self, topic: &str, payload: Bytes) -> Result<u64, LinkError> {
        self.send(topic, payload, Retain::Passing, None)
    }

    fn send(
        &mut self,
        topic: &str,
        payload: Bytes,
        retain: Retain,
        expiry: Option<u32>,
    ) -> Result<u64, LinkError> {
        let size = topic.len() + payload.len() + OVERHEAD;
        if size > self.packet {
            return Err(LinkError::TooLarge { url: self.url.to_string(), size, limit: self.packet });
        }
        let kept = retain == Retain::Kept;
        match &mut self.wire {
            Wire::Five(line) => {
                let properties = expiry.map(|seconds| PublishProperties {
                    message_expiry_interval: Some(seconds),
                    ..PublishProperties::default()
                });
                let mut publish = Publish::new(topic, QoS::AtLeastOnce, payload, properties);
                publish.retain = kept;
                line.request(Request::Publish(publish));
            }
            Wire::Four(line) => {
                let mut publish = four::Publish::new(topic, four::QoS::AtLeastOnce, []);
                (publish.retain, publish.payload) = (kept, payload);
                line.request(four::Request::Publish(publish));
            }
        }
        self.next += 1;
        self.submitted.push_back(self.next);
        Ok(self.next)
    }

    /// What the broker says next, which it owes us.
    ///
    /// # Errors
    /// The connection ended, or the broker is silent.
    pub async fn next(&mut self) -> Result<Signal, LinkError> {
        let after = limits::SILENCE;
        self.next_within(after).await?.ok_or_else(|| LinkError::Silent { url: self.url.to_string(), after })
    }

    /// What the broker says next, or `None` if it says nothing for `quiet`.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn next_within(&mut self, quiet: Duration) -> Result<Option<Signal>, LinkError> {
        loop {
            let signal = match &mut self.wire {
                Wire::Five(line) => match timeout(quiet, line.next()).await {
                    Err(_) => return Ok(None),
                    Ok(Ok(event)) => self.signal(event),
                    Ok(Err(error)) => return Err(self.end_error(error)),
                },
                Wire::Four(line) => match timeout(quiet, line.next()).await {
                    Err(_) => return Ok(None),
                    Ok(Ok(event)) => self.signal_four(event),
                    Ok(Err(LineError::Mqtt(four::StateError::AwaitPingResp))) => {
                        return Err(self.lost("no answer to a ping"));
                    }
                    Ok(Err(error)) => return Err(self.lost(error.to_string())),
                },
            };
            if signal.is_some() {
                return Ok(signal);
            }
        }
    }

    /// Says goodbye and closes the connection.
    pub async fn close(self) {
        let gone = async {
            match self.wire {
                Wire::Five(mut line) => {
                    line.request(Request::Disconnect);
                    while let Ok(event) = line.next().await {
                        if event == Event::Outgoing(Outgoing::Disconnect) {
                            break;
                        }
                    }
                    line.close().await;
                }
                Wire::Four(mut line) => {
                    line.request(four::Request::Disconnect(four::Disconnect));
                    while let Ok(event) = line.next().await {
                        if event == four::Event::Outgoing(Outgoing::Disconnect) {
                            break;
                        }
                    }
                    line.close().await;
                }
            }
        };
        // If the goodbye does not get through, the broker notices by itself.
        let _ = timeout(limits::GOODBYE, gone).await;
    }

    fn signal(&mut self, event: Event) -> Option<Signal> {
        match event {
            Event::Outgoing(Outgoing::Publish(id)) => {
                self.sent(id);
                None
            }
            Event::Incoming(Packet::PubAck(ack)) => {
                let number = self.unacknowledged.remove(&ack.pkid)?;
                let reason = ack.properties.and_then(|properties| properties.reason_string);
                let result = match publish_code(ack.reason) {
                    None if ack.reason == PubAckReason::NoMatchingSubscribers => Ok(Heard::Nobody),
                    None => Ok(Heard::Unknown),
                    Some((code, meaning)) => Err(Refusal { code, meaning, reason }),
                };
                Some(Signal::Acknowledged(number, result))
            }
            Event::Incoming(Packet::Publish(message)) => {
                let expiry = message.properties.and_then(|properties| properties.message_expiry_interval);
                self.last = Arrival { qos: message.qos as u8, retained: message.retain, expiry };
                Some(Signal::Message {
                    // MQTT 1.5.4: a topic is UTF-8; anything else matches nothing we ask for.
                    topic: String::from_utf8_lossy(&message.topic).into_owned(),
                    payload: message.payload,
                })
            }
            Event::Incoming(Packet::SubAck(ack)) => Some(Signal::Subscribed(
                ack.return_codes.iter().map(|code| matches!(code, SubscribeReasonCode::Success(_))).collect(),
            )),
            Event::Incoming(Packet::UnsubAck(_)) => Some(Signal::Unsubscribed),
            _ => None,
        }
    }

    fn signal_four(&mut self, event: four::Event) -> Option<Signal> {
        match event {
            four::Event::Outgoing(Outgoing::Publish(id)) => {
                self.sent(id);
                None
            }
            // 3.1.1 has no word for a refusal: whether it is kept, only reading tells.
            four::Event::Incoming(four::Packet::PubAck(ack)) => {
                let number = self.unacknowledged.remove(&ack.pkid)?;
                Some(Signal::Acknowledged(number, Ok(Heard::Unknown)))
            }
            four::Event::Incoming(four::Packet::Publish(message)) => {
                self.last = Arrival { qos: message.qos as u8, retained: message.retain, expiry: None };
                Some(Signal::Message { topic: message.topic, payload: message.payload })
            }
            four::Event::Incoming(four::Packet::SubAck(ack)) => {
                let accepted = |code: &four::SubscribeReasonCode| *code != four::SubscribeReasonCode::Failure;
                Some(Signal::Subscribed(ack.return_codes.iter().map(accepted).collect()))
            }
            four::Event::Incoming(four::Packet::UnsubAck(_)) => Some(Signal::Unsubscribed),
            _ => None,
        }
    }

    fn sent(&mut self, id: u16) {
        if let Some(number) = self.submitted.pop_front() {
            self.unacknowledged.insert(id, number);
        }
    }

    fn lost(&self, reason: impl Into<String>) -> LinkError {
        LinkError::Lost { url: self.url.to_string(), reason: reason.into() }
    }

    fn end_error(&self, error: LineError<StateError>) -> LinkError {
        match error {
            LineError::Mqtt(StateError::ServerDisconnect { reason_code, reason_string }) => {
                let refusal = Refusal {
                    code: reason_code as u8,
                    meaning: disconnect_code(reason_code),
                    reason: reason_string,
                };
                LinkError::Closed { url: self.url.to_string(), refusal }
            }
            LineError::Mqtt(StateError::AwaitPingResp) => self.lost("no answer to a ping"),
            // A PUBACK: mosquitto says so there, and the library does not know that it may.
            LineError::Mqtt(StateError::Deserialization(MqttError::InvalidConnectReturnCode(
                code @ 0x95,
            ))) => {
                let refusal = Refusal { code, meaning: "packet too large", reason: None };
                LinkError::Closed { url: self.url.to_string(), refusal }
            }
            error => self.lost(error.to_string()),
        }
    }
}

/// Why there is no connection by MQTT 5.
enum Declined {
    /// It may be that the broker speaks 3.1.1 only.
    Version(LinkError),
    /// There is none by 3.1.1 either.
    Other(LinkError),
}

fn not_mqtt(url: &BrokerUrl, packet: &impl std::fmt::Debug) -> LinkError {
    LinkError::NotMqtt { url: url.to_string(), reason: format!("it says {packet:?}") }
}

fn connect_error<E: std::error::Error>(url: &BrokerUrl, error: LineError<E>) -> LinkError {
    let url = url.to_string();
    match error {
        LineError::Connect(problem) => LinkError::Unreachable { url, problem },
        error => LinkError::NotMqtt { url, reason: error.to_string() },
    }
}

fn refused(url: &BrokerUrl, refusal: &ConnAck) -> LinkError {
    let url = url.to_string();
    match refusal.code {
        ConnectReturnCode::ServerUnavailable | ConnectReturnCode::ServerBusy => LinkError::Busy { url },
        code => LinkError::Refused { url, reason: connect_code(code) },
    }
}

/// Code and meaning of a PUBACK that refuses.
fn publish_code(reason: PubAckReason) -> Option<(u8, &'static str)> {
    Some(match reason {
        PubAckReason::Success | PubAckReason::NoMatchingSubscribers => return None,
        PubAckReason::UnspecifiedError => (0x80, "unspecified error"),
        PubAckReason::ImplementationSpecificError => (0x83, "implementation specific error"),
        PubAckReason::NotAuthorized => (0x87, "not authorized"),
        PubAckReason::TopicNameInvalid => (0x90, "topic name invalid"),
        PubAckReason::PacketIdentifierInUse => (0x91, "packet identifier in use"),
        PubAckReason::QuotaExceeded => (0x97, "quota exceeded"),
        PubAckReason::PayloadFormatInvalid => (0x99, "payload format invalid"),
    })
}

fn connect_code(code: ConnectReturnCode) -> &'static str {
    match code {
        ConnectReturnCode::BadUserNamePassword => "bad user name or password",
        ConnectReturnCode::NotAuthorized => "not authorized",
        ConnectReturnCode::Banned => "banned",
        ConnectReturnCode::ClientIdentifierNotValid | ConnectReturnCode::BadClientId => {
            "client identifier not valid"
        }
        ConnectReturnCode::UnsupportedProtocolVersion | ConnectReturnCode::RefusedProtocolVersion => {
            "it does not speak MQTT 5"
        }
        ConnectReturnCode::QuotaExceeded | ConnectReturnCode::ConnectionRateExceeded => "quota exceeded",
        _ => "it gives no reason we know",
    }
}

fn disconnect_code(code: DisconnectReasonCode) -> &'static str {
    match code {
        DisconnectReasonCode::NormalDisconnection => "normal disconnection",
        DisconnectReasonCode::MalformedPacket => "malformed packet",
        DisconnectReasonCode::ProtocolError => "protocol error",
        DisconnectReasonCode::NotAuthorized => "not authorized",
        DisconnectReasonCode::ServerBusy => "server busy",
        DisconnectReasonCode::ServerShuttingDown => "server shutting down",
        DisconnectReasonCode::KeepAliveTimeout => "keep alive timeout",
        DisconnectReasonCode::SessionTakenOver => "session taken over",
        DisconnectReasonCode::TopicNameInvalid => "topic name invalid",
        DisconnectReasonCode::ReceiveMaximumExceeded => "receive maximum exceeded",
        DisconnectReasonCode::PacketTooLarge => "packet too large",
        DisconnectReasonCode::MessageRateTooHigh => "message rate too high",
        DisconnectReasonCode::QuotaExceeded => "quota exceeded",
        DisconnectReasonCode::AdministrativeAction => "administrative action",
        DisconnectReasonCode::PayloadFormatInvalid => "payload format invalid",
        DisconnectReasonCode::RetainNotSupported => "retain not supported",
        DisconnectReasonCode::QoSNotSupported => "QoS not supported",
        _ => "no reason we know",
    }
}
