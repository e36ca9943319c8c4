//! A small MQTT 3.1.1 client on rumqttc's codec, an outsider's; it never does anything by itself.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use bytes::BytesMut;
use rumqttc::mqttbytes::{
    Error, QoS,
    v4::{Connect, LastWill, Login, Packet, PubAck, Publish, Subscribe, Unsubscribe},
};

use crate::PATIENCE;

/// A connected client.
#[derive(Debug)]
pub struct Client {
    /// Whether an earlier session goes on.
    pub session_present: bool,
    stream: TcpStream,
    buffer: BytesMut,
    last_id: u16,
    /// Messages that came while something else was awaited.
    waiting: std::collections::VecDeque<Received>,
}

/// How to connect.
#[derive(Debug, Clone)]
pub struct Options {
    /// Client id.
    pub id: String,
    /// Whether an earlier session is forgotten, and this one ends with its connection.
    pub clean: bool,
    /// Seconds; 0 for none.
    pub keep_alive: u16,
    /// Topic and message of the will, retained at QoS 1.
    pub will: Option<(String, String)>,
    /// User name and password.
    pub login: Option<(String, String)>,
}

/// A message that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Its topic.
    pub topic: String,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Its retain flag.
    pub retain: bool,
    /// Its QoS.
    pub qos: u8,
}

impl Options {
    /// A plain client without keep-alive.
    #[must_use]
    pub fn id(id: &str) -> Options {
        Options { id: id.to_owned(), clean: true, keep_alive: 0, will: None, login: None }
    }
}

impl Client {
    /// Connects, and expects to be let in.
    #[track_caller]
    #[must_use]
    pub fn connect(address: SocketAddr, id: &str) -> Client {
        let (client, code) = Client::try_connect(address, &Options::id(id)).expect("a CONNACK");
        assert_eq!(code, 0, "CONNACK");
        client
    }

    /// Connects, and says what CONNACK said; `None` if there was none, or nobody listens.
    #[must_use]
    pub fn try_connect(address: SocketAddr, options: &Options) -> Option<(Client, u8)> {
        let mut client = Client::try_open(address)?;
        client.try_send(&Client::connect_packet(options)).ok()?;
        match client.packet()? {
            Packet::ConnAck(ack) => {
                client.session_present = ack.session_present;
                Some((client, ack.code as u8))
            }
            other => panic!("expected CONNACK, got {other:?}"),
        }
    }

    /// Connects with a session that is kept.
    #[track_caller]
    #[must_use]
    pub fn resume(address: SocketAddr, id: &str) -> Client {
        let options = Options { clean: false, ..Options::id(id) };
        let (client, code) = Client::try_connect(address, &options).expect("a CONNACK");
        assert_eq!(code, 0, "CONNACK");
        client
    }

    /// A TCP connection on which nothing was said.
    #[must_use]
    pub fn open(address: SocketAddr) -> Client {
        Client::try_open(address).expect("a broker that listens")
    }

    /// The same, if anybody listens.
    #[must_use]
    pub fn try_open(address: SocketAddr) -> Option<Client> {
        let stream = TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Some(Client {
            session_present: false,
            stream,
            buffer: BytesMut::new(),
            last_id: 0,
            waiting: Default::default(),
        })
    }

    /// The bytes of a CONNECT.
    #[must_use]
    pub fn connect_packet(options: &Options) -> Vec<u8> {
        let mut connect = Connect::new(&*options.id);
        connect.keep_alive = options.keep_alive;
        connect.clean_session = options.clean;
        connect.last_will = options
            .will
            .as_ref()
            .map(|(topic, message)| LastWill::new(topic, message.as_bytes(), QoS::AtLeastOnce, true));
        connect.login = options.login.as_ref().map(|(user, password)| Login::new(user, password));
        let mut bytes = BytesMut::new();
        connect.write(&mut bytes).unwrap();
        bytes.to_vec()
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).unwrap();
    }

    /// Sends bytes as they are; fails if the broker has closed.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends a PUBLISH and does not wait; returns its packet id, 0 at QoS 0. `None` if the broker is gone.
    pub fn post(&mut self, topic: &str, payload: &[u8], qos: u8, retain: bool) -> Option<u16> {
        let mut publish = Publish::new(topic, rumqttc::mqttbytes::qos(qos).unwrap(), payload);
        publish.retain = retain;
        if qos > 0 {
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
            publish.pkid = self.last_id;
        }
        let mut bytes = BytesMut::new();
        publish.write(&mut bytes).unwrap();
        self.try_send(&bytes).ok()?;
        Some(publish.pkid)
    }

    /// Waits for the next PUBACK and returns its packet id; `None` if the broker is gone.
    pub fn acknowledged(&mut self) -> Option<u16> {
        match self.reply()? {
            Packet::PubAck(ack) => Some(ack.pkid),
            other => panic!("expected PUBACK, got {other:?}"),
        }
    }

    /// Publishes a retained message at QoS 1; says whether it was acknowledged.
    pub fn retain(&mut self, topic: &str, payload: &[u8]) -> bool {
        self.post(topic, payload, 1, true).is_some_and(|id| self.acknowledged() == Some(id))
    }

    /// Subscribes and returns the code granted.
    #[track_caller]
    pub fn subscribe(&mut self, filter: &str, qos: u8) -> u8 {
        let mut subscribe = Subscribe::new(filter, rumqttc::mqttbytes::qos(qos).unwrap());
        self.last_id += 1;
        subscribe.pkid = self.last_id;
        let mut bytes = BytesMut::new();
        subscribe.write(&mut bytes).unwrap();
        self.send(&bytes);
        match self.reply() {
            Some(Packet::SubAck(ack)) => match ack.return_codes[0] {
                rumqttc::mqttbytes::v4::SubscribeReasonCode::Success(qos) => qos as u8,
                rumqttc::mqttbytes::v4::SubscribeReasonCode::Failure => 0x80,
            },
            other => panic!("expected SUBACK, got {other:?}"),
        }
    }

    /// Unsubscribes.
    #[track_caller]
    pub fn unsubscribe(&mut self, filter: &str) {
        let mut unsubscribe = Unsubscribe::new(filter);
        self.last_id += 1;
        unsubscribe.pkid = self.last_id;
        let mut bytes = BytesMut::new();
        unsubscribe.write(&mut bytes).unwrap();
        self.send(&bytes);
        assert!(matches!(self.reply(), Some(Packet::UnsubAck(_))));
    }

    /// Asks for a sign of life and waits for it.
    #[track_caller]
    pub fn ping(&mut self) {
        self.send(&[0xc0, 0]);
        assert_eq!(self.reply(), Some(Packet::PingResp));
    }

    /// The next message, acknowledged if it must be; `None` if the broker is gone.
    pub fn message(&mut self) -> Option<Received> {
        if let Some(received) = self.waiting.pop_front() {
            return Some(received);
        }
        match self.packet()? {
            Packet::Publish(publish) => Some(self.receive(publish)),
            other => panic!("expected a message, got {other:?}"),
        }
    }

    /// The retained message of `topic`, if there is one: everything that comes before the answer to a ping is
    /// in, since both brokers answer an exact subscription before what follows it.
    #[track_caller]
    pub fn retained(&mut self, topic: &str) -> Option<Received> {
        self.retained_at(topic, 1)
    }

    /// The same at QoS 0, which is cheap on brokers that keep account of what is acknowledged.
    #[track_caller]
    pub fn retained_at(&mut self, topic: &str, qos: u8) -> Option<Received> {
        self.subscribe(topic, qos);
        self.fence();
        let found = self.waiting.iter().position(|received| received.topic == topic && received.retain);
        let found = found.and_then(|at| self.waiting.remove(at));
        self.unsubscribe(topic);
        found
    }

    /// Whether a message has come that nobody has looked at.
    #[must_use]
    pub fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Waits until what was asked before is answered: two pings, so that messages fetched after the first
    /// is answered are in before the second.
    #[track_caller]
    pub fn fence(&mut self) {
        self.ping();
        self.ping();
    }

    /// Whether the broker has closed the connection: no packet comes any more.
    #[must_use]
    pub fn is_closed(&mut self) -> bool {
        loop {
            match self.packet() {
                None => return true,
                Some(Packet::Publish(_)) => {}
                Some(other) => panic!("expected the end, got {other:?}"),
            }
        }
    }

    /// Closes with RST instead of FIN.
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).unwrap();
    }

    /// The stream itself.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The next packet that is no message; messages wait.
    fn reply(&mut self) -> Option<Packet> {
        loop {
            match self.packet()? {
                Packet::Publish(publish) => {
                    let received = self.receive(publish);
                    self.waiting.push_back(received);
                }
                other => return Some(other),
            }
        }
    }

    fn receive(&mut self, publish: Publish) -> Received {
        if publish.qos == QoS::AtLeastOnce {
            let mut bytes = BytesMut::new();
            PubAck::new(publish.pkid).write(&mut bytes).unwrap();
            self.try_send(&bytes).ok();
        }
        Received {
            topic: publish.topic,
            payload: publish.payload.to_vec(),
            retain: publish.retain,
            qos: publish.qos as u8,
        }
    }

    /// The next packet; `None` if the broker is gone.
    ///
    /// # Panics
    /// Nothing came for [`PATIENCE`], or it was no packet.
    pub fn packet(&mut self) -> Option<Packet> {
        loop {
            match Packet::read(&mut self.buffer, usize::MAX) {
                Ok(packet) => return Some(packet),
                Err(Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("not a packet: {error}: {:?}", &self.buffer[..]),
            }
            if !fill(&mut self.stream, &mut self.buffer) {
                return None;
            }
        }
    }
}

/// Reads what has come, and says whether the broker is still there.
///
/// # Panics
/// Nothing came for [`PATIENCE`].
pub fn fill(stream: &mut TcpStream, buffer: &mut BytesMut) -> bool {
    let mut scratch = [0; 64 * 1024];
    match stream.read(&mut scratch) {
        Ok(0) => false,
        Ok(count) => {
            buffer.extend_from_slice(&scratch[..count]);
            true
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            panic!("nothing came for {} s", PATIENCE.as_secs())
        }
        Err(_) => false,
    }
}
