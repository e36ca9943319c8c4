//! One MQTT 5 connection, by rumqttc: packets out, signals in.
//!
//! rumqttc's `poll` must not be dropped half-way: a packet that waits for the socket would be lost. So a task
//! of its own polls, and this side only ever waits on channels, which may be abandoned at any time. Neither
//! direction can block the other: what is asked for at a time is bounded, and the queues have room for it.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use mpypi_protocol::{BrokerUrl, limits::PACKET};
use rumqttc::{
    NetworkOptions, Outgoing,
    v5::{
        AsyncClient, ConnectionError, Event, EventLoop, MqttOptions, StateError,
        mqttbytes::{
            Error, QoS,
            v5::{
                ConnectProperties, ConnectReturnCode, DisconnectReasonCode, Filter, Packet, PubAckReason,
                SubscribeReasonCode,
            },
        },
    },
};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinHandle,
    time::timeout,
};

use crate::limits;

/// Bytes of a PUBLISH beside topic and payload, at most: header, topic length, packet id, no properties.
const OVERHEAD: usize = 10;

/// A connection to a broker. Dropping it closes it without a word; [`Link::close`] says goodbye.
#[derive(Debug)]
pub struct Link {
    url: BrokerUrl,
    client: AsyncClient,
    events: UnboundedReceiver<Result<Event, ConnectionError>>,
    task: JoinHandle<()>,
    /// The broker's largest packet.
    packet: usize,
    /// Publishes that have no packet id yet, in order.
    submitted: VecDeque<u64>,
    /// Publishes that wait for their PUBACK, by packet id.
    unacknowledged: HashMap<u16, u64>,
    next: u64,
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
    Acknowledged(u64, Result<(), Refusal>),
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
    /// Nobody answers there.
    #[error("broker {url} cannot be reached: {reason}")]
    Unreachable {
        /// The broker.
        url: String,
        /// Why.
        reason: String,
    },
    /// The broker does not want us.
    #[error("broker {url} refused the connection: {reason}")]
    Refused {
        /// The broker.
        url: String,
        /// Why.
        reason: &'static str,
    },
    /// Something that does not speak MQTT 5.
    #[error("{url} does not answer as an MQTT 5 broker: {reason}")]
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
            LinkError::Unreachable { .. } | LinkError::Lost { .. } | LinkError::Silent { .. } => true,
            // Server busy, shutting down, keep-alive timeout, rate too high, administrative action.
            LinkError::Closed { refusal, .. } => {
                matches!(refusal.code, 0x00 | 0x80 | 0x89 | 0x8b | 0x8d | 0x96 | 0x98 | 0x9f | 0xa0)
            }
            LinkError::Refused { .. } | LinkError::NotMqtt { .. } | LinkError::TooLarge { .. } => false,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            LinkError::Unreachable { .. } => {
                "is the broker running? Start one with `make broker`, or name another with `--broker` or \
                 MPYPI_BROKER"
            }
            LinkError::Refused { .. } => {
                "give a user and password: `--broker mqtt://user:password@host:port`"
            }
            LinkError::TooLarge { .. } => "raise the broker's packet limit, or split the package",
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
            0x95 => "raise the broker's packet limit, or split the package",
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
    pub async fn connect(url: &BrokerUrl) -> Result<Link, LinkError> {
        let id = format!("mpypi-{}-{:08x}", std::process::id(), fastrand::u32(..));
        let host = match url.host.contains(':') {
            true => format!("[{}]", url.host),
            false => url.host.clone(),
        };
        let mut options = MqttOptions::new(id, host, url.port);
        options.set_clean_start(true).set_keep_alive(limits::KEEP_ALIVE);
        options.set_connection_timeout(limits::CONNECT.as_secs());
        let mut network = NetworkOptions::new();
        network.set_tcp_nodelay(true);
        options.set_network_options(network);
        let mut properties = ConnectProperties::new();
        properties.max_packet_size = Some(PACKET as u32);
        options.set_connect_properties(properties);
        if let Some((user, password)) = &url.credentials {
            options.set_credentials(user, password);
        }
        // Room for every request that is under way at a time, so that asking seldom waits.
        let (client, event_loop) = AsyncClient::new(options, limits::UNASKS_IN_FLIGHT);
        let (sender, events) = unbounded_channel();
        let task = tokio::spawn(poll(event_loop, sender));
        let mut link = Link {
            url: url.clone(),
            client,
            events,
            task,
            packet: PACKET,
            submitted: VecDeque::new(),
            unacknowledged: HashMap::new(),
            next: 0,
        };
        match link.events.recv().await {
            Some(Ok(Event::Incoming(Packet::ConnAck(greeting)))) => {
                let limit = greeting.properties.and_then(|properties| properties.max_packet_size);
                link.packet = limit.map_or(PACKET, |limit| PACKET.min(limit as usize));
                Ok(link)
            }
            Some(Err(error)) => Err(link.connect_error(error)),
            other => Err(LinkError::NotMqtt { url: url.to_string(), reason: format!("{other:?}") }),
        }
    }

    /// Subscribes at QoS 0; answered by [`Signal::Subscribed`].
    ///
    /// # Errors
    /// [`LinkError::Lost`]
    pub async fn subscribe(&mut self, filters: &[String]) -> Result<(), LinkError> {
        let filters: Vec<Filter> =
            filters.iter().map(|filter| Filter::new(filter.as_str(), QoS::AtMostOnce)).collect();
        let sent = self.client.subscribe_many(filters).await;
        sent.map_err(|_| self.ended())
    }

    /// Unsubscribes; answered by [`Signal::Unsubscribed`].
    ///
    /// # Errors
    /// [`LinkError::Lost`]
    pub async fn unsubscribe(&mut self, filter: &str) -> Result<(), LinkError> {
        let sent = self.client.unsubscribe(filter).await;
        sent.map_err(|_| self.ended())
    }

    /// Publishes retained at QoS 1; answered by [`Signal::Acknowledged`] with the number returned.
    ///
    /// # Errors
    /// [`LinkError::TooLarge`] or [`LinkError::Lost`]
    pub async fn publish(&mut self, topic: &str, payload: Bytes) -> Result<u64, LinkError> {
        let size = topic.len() + payload.len() + OVERHEAD;
        if size > self.packet {
            return Err(LinkError::TooLarge { url: self.url.to_string(), size, limit: self.packet });
        }
        let sent = self.client.publish_bytes(topic, QoS::AtLeastOnce, true, payload).await;
        sent.map_err(|_| self.ended())?;
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
            let Ok(event) = timeout(quiet, self.events.recv()).await else { return Ok(None) };
            match event {
                Some(Ok(event)) => {
                    if let Some(signal) = self.signal(event) {
                        return Ok(Some(signal));
                    }
                }
                Some(Err(error)) => return Err(self.end_error(error)),
                None => return Err(self.ended()),
            }
        }
    }

    /// Says goodbye and closes the connection.
    pub async fn close(mut self) {
        if self.client.disconnect().await.is_err() {
            return;
        }
        let gone = async {
            while let Some(Ok(event)) = self.events.recv().await {
                if event == Event::Outgoing(Outgoing::Disconnect) {
                    break;
                }
            }
        };
        // If the goodbye does not get through, the broker notices by itself.
        let _ = timeout(limits::GOODBYE, gone).await;
    }

    fn signal(&mut self, event: Event) -> Option<Signal> {
        match event {
            Event::Outgoing(Outgoing::Publish(id)) => {
                if let Some(number) = self.submitted.pop_front() {
                    self.unacknowledged.insert(id, number);
                }
                None
            }
            Event::Incoming(Packet::PubAck(ack)) => {
                let number = self.unacknowledged.remove(&ack.pkid)?;
                let reason = ack.properties.and_then(|properties| properties.reason_string);
                let result = match publish_code(ack.reason) {
                    None => Ok(()),
                    Some((code, meaning)) => Err(Refusal { code, meaning, reason }),
                };
                Some(Signal::Acknowledged(number, result))
            }
            Event::Incoming(Packet::Publish(message)) => Some(Signal::Message {
                // MQTT 1.5.4: a topic is UTF-8; anything else matches nothing we ask for.
                topic: String::from_utf8_lossy(&message.topic).into_owned(),
                payload: message.payload,
            }),
            Event::Incoming(Packet::SubAck(ack)) => Some(Signal::Subscribed(
                ack.return_codes.iter().map(|code| matches!(code, SubscribeReasonCode::Success(_))).collect(),
            )),
            Event::Incoming(Packet::UnsubAck(_)) => Some(Signal::Unsubscribed),
            _ => None,
        }
    }

    /// Why nobody polls any more.
    fn ended(&mut self) -> LinkError {
        while let Ok(event) = self.events.try_recv() {
            if let Err(error) = event {
                return self.end_error(error);
            }
        }
        self.lost("it ended")
    }

    fn lost(&self, reason: impl Into<String>) -> LinkError {
        LinkError::Lost { url: self.url.to_string(), reason: reason.into() }
    }

    fn connect_error(&self, error: ConnectionError) -> LinkError {
        let url = self.url.to_string();
        match error {
            ConnectionError::Io(error) => LinkError::Unreachable { url, reason: error.to_string() },
            ConnectionError::Timeout(_) => LinkError::Unreachable {
                url,
                reason: format!("no answer for {} s", limits::CONNECT.as_secs()),
            },
            ConnectionError::ConnectionRefused(code) => match code {
                ConnectReturnCode::ServerUnavailable | ConnectReturnCode::ServerBusy => {
                    LinkError::Unreachable { url, reason: "it is busy".to_owned() }
                }
                code => LinkError::Refused { url, reason: connect_code(code) },
            },
            ConnectionError::MqttState(StateError::ConnectionAborted | StateError::Io(_)) => {
                LinkError::Unreachable { url, reason: "it closed the connection".to_owned() }
            }
            error => LinkError::NotMqtt { url, reason: error.to_string() },
        }
    }

    fn end_error(&self, error: ConnectionError) -> LinkError {
        match error {
            ConnectionError::MqttState(StateError::ServerDisconnect { reason_code, reason_string }) => {
                let refusal = Refusal {
                    code: reason_code as u8,
                    meaning: disconnect_code(reason_code),
                    reason: reason_string,
                };
                LinkError::Closed { url: self.url.to_string(), refusal }
            }
            ConnectionError::MqttState(StateError::ConnectionAborted) => self.lost("the broker closed it"),
            ConnectionError::MqttState(StateError::AwaitPingResp) => self.lost("no answer to a ping"),
            ConnectionError::MqttState(
                StateError::Io(error) | StateError::Deserialization(Error::Io(error)),
            )
            | ConnectionError::Io(error) => self.lost(error.to_string()),
            error => self.lost(error.to_string()),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Polls until the connection ends. What arrived before the end comes before the error.
async fn poll(mut event_loop: EventLoop, events: UnboundedSender<Result<Event, ConnectionError>>) {
    loop {
        match event_loop.poll().await {
            Ok(event) => {
                if events.send(Ok(event)).is_err() {
                    return;
                }
            }
            Err(error) => {
                for event in event_loop.state.events.drain(..) {
                    let _ = events.send(Ok(event));
                }
                let _ = events.send(Err(error));
                return;
            }
        }
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
