//! A device on an MQTT 3.1.1 connection. No policy here: events in, outputs out, and a clock.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    pin::Pin,
    time::{Duration, Instant},
};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::{BrokerUrl, ChannelName, NodeId, Topic, limits as wire, topic::NodeSubject};
use rumqttc::{
    AsyncClient, ConnectReturnCode, ConnectionError, EventLoop, LastWill, MqttOptions, Outgoing, Packet, QoS,
    SubscribeFilter, SubscribeReasonCode,
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    device::{Device, Output},
    flash::Flash,
    limits,
    store::BootError,
    update::{Event, Report, Source, Timing},
};

/// Who a node is, and where it connects to.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The broker.
    pub broker: BrokerUrl,
    /// The node, which is also the MQTT client id.
    pub node: NodeId,
    /// The channel it follows.
    pub channel: ChannelName,
    /// The times it goes by.
    pub timing: Timing,
    /// Decides the lengths of its pauses.
    pub seed: u64,
}

/// What the owner of a node is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Happening {
    /// The update went on.
    Report(Report),
    /// Something for people.
    Log(String),
    /// There is a connection.
    Connected,
    /// There is none any more, or still none.
    Lost {
        /// Why.
        trouble: Trouble,
        /// When it is tried again.
        again_in: Duration,
    },
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What happened.
    pub error: String,
    /// What can be done about it.
    pub hint: String,
}

/// The one clock of this program.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// A clock that starts now.
    #[expect(clippy::disallowed_methods, reason = "this is the driver's clock")]
    #[must_use]
    pub fn start() -> Clock {
        Clock { start: Instant::now() }
    }

    /// Time since the start.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// The time of day.
    #[expect(clippy::disallowed_methods, reason = "this is the driver's clock")]
    #[must_use]
    pub fn wall(&self) -> Timestamp {
        Timestamp::now()
    }
}

/// Runs a node until `stop` is cancelled. Connections are made again for ever.
///
/// # Errors
/// The device does not start: its records are damaged or its flash failed.
pub async fn run<F: Flash>(
    options: NodeOptions,
    flash: F,
    clock: Clock,
    mut observe: impl FnMut(Happening),
    stop: CancellationToken,
) -> Result<(), BootError> {
    let NodeOptions { node, channel, timing, seed, .. } = options.clone();
    let (mut device, outputs) = Device::start(flash, &node, channel, timing, seed, clock.now())?;
    let mut connection = Connection::open(&options, Duration::ZERO);
    let mut backoff = Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_MOST);
    let mut rng = fastrand::Rng::with_seed(seed);
    connection.send(outputs, &mut observe);
    let mut since = Duration::ZERO;
    loop {
        let wait = device.deadline().map(|deadline| deadline.saturating_sub(clock.now()));
        let incoming = tokio::select! {
            () = stop.cancelled() => break,
            incoming = connection.next() => incoming,
            () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {
                Incoming::Events(vec![Event::Tick])
            }
        };
        let events = match incoming {
            Incoming::Events(events) => events,
            Incoming::Message { topic, payload, retained } => {
                options.event(&topic, payload, retained, clock).into_iter().collect()
            }
            Incoming::Connected => {
                since = clock.now();
                observe(Happening::Connected);
                vec![Event::Connected]
            }
            Incoming::Lost(error) => {
                // A connection that breaks at once, again and again, is no success.
                if connection.connected && clock.now() >= since + limits::RECONNECT_MOST {
                    backoff.reset();
                }
                let again_in = backoff.next(&mut rng);
                observe(Happening::Lost { trouble: explain(&error, &options.broker), again_in });
                connection = Connection::open(&options, again_in);
                vec![Event::Disconnected]
            }
        };
        let mut refused = false;
        for event in events {
            refused |= matches!(event, Event::SubscriptionRefused { .. });
            let outputs = device.handle(clock.now(), event)?;
            connection.send(outputs, &mut observe);
        }
        if refused {
            let BrokerUrl { host, port, .. } = &options.broker;
            observe(Happening::Log(format!(
                "hint: use `--broker mqtt://user:password@{host}:{port}`, or let the node `{node}` read \
                 channels, packages and its own topics"
            )));
        }
    }
    connection.say_goodbye().await;
    Ok(())
}

impl NodeOptions {
    fn topic(&self, subject: NodeSubject) -> String {
        self.node.topic(subject)
    }

    /// What a message means to the device, if anything.
    fn event(&self, topic: &str, payload: Bytes, retained: bool, clock: Clock) -> Option<Event> {
        let wall = Some(clock.wall());
        match Topic::parse(topic).ok()? {
            Topic::Channel(channel) if channel == self.channel => {
                Some(Event::List { source: Source::Channel, payload, wall })
            }
            // A retained order would be carried out again after every reconnect.
            Topic::Node(node, NodeSubject::Cmd) if node == self.node && !retained => {
                Some(Event::List { source: Source::Cmd, payload, wall })
            }
            Topic::Package(id) => Some(Event::Package { id, payload }),
            _ => None,
        }
    }

    fn mqtt(&self) -> MqttOptions {
        // rumqttc joins host and port with `:`.
        let host = match self.broker.host.contains(':') {
            true => format!("[{}]", self.broker.host),
            false => self.broker.host.clone(),
        };
        let mut mqtt = MqttOptions::new(self.node.as_str(), host, self.broker.port);
        mqtt.set_keep_alive(limits::KEEP_ALIVE)
            .set_clean_session(true)
            .set_max_packet_size(wire::PACKET, wire::PACKET)
            .set_inflight(8)
            .set_last_will(LastWill::new(self.topic(NodeSubject::Online), "0", QoS::AtLeastOnce, true));
        if let Some((user, password)) = &self.broker.credentials {
            mqtt.set_credentials(user.clone(), password.clone());
        }
        mqtt
    }
}

/// One connection, from the attempt to its end. The next one is a new value: nothing queued for the old
/// one is ever sent on the new one.
struct Connection {
    node: NodeId,
    client: AsyncClient,
    /// The event loop is moved through this future, so that nothing is lost when another branch of the
    /// `select!` wins.
    polling: Polling,
    connected: bool,
    /// Filters of SUBSCRIBE packets that were queued, and then sent with an id.
    queued: VecDeque<Vec<String>>,
    sent: HashMap<u16, Vec<String>>,
}

type Polling = Pin<Box<dyn Future<Output = (EventLoop, Result<rumqttc::Event, ConnectionError>)> + Send>>;

enum Incoming {
    Events(Vec<Event>),
    Message { topic: String, payload: Bytes, retained: bool },
    Connected,
    Lost(ConnectionError),
}

impl Connection {
    fn open(options: &NodeOptions, after: Duration) -> Connection {
        let (client, mut event_loop) = AsyncClient::new(options.mqtt(), limits::REQUESTS);
        let mut network = event_loop.network_options();
        network.set_tcp_nodelay(true);
        event_loop.set_network_options(network);
        let polling = Box::pin(async move {
            tokio::time::sleep(after).await;
            poll(event_loop).await
        });
        Connection {
            node: options.node.clone(),
            client,
            polling,
            connected: false,
            queued: VecDeque::new(),
            sent: HashMap::new(),
        }
    }

    async fn next(&mut self) -> Incoming {
        let (event_loop, event) = (&mut self.polling).await;
        self.polling = Box::pin(poll(event_loop));
        match event {
            Err(error) => Incoming::Lost(error),
            Ok(rumqttc::Event::Incoming(Packet::ConnAck(_))) => {
                self.connected = true;
                Incoming::Connected
            }
            Ok(rumqttc::Event::Incoming(Packet::Publish(publish))) => {
                Incoming::Message { topic: publish.topic, payload: publish.payload, retained: publish.retain }
            }
            Ok(rumqttc::Event::Incoming(Packet::SubAck(ack))) => {
                let filters = self.sent.remove(&ack.pkid).unwrap_or_default();
                let refused = filters
                    .into_iter()
                    .zip(ack.return_codes)
                    .filter(|(_, code)| *code == SubscribeReasonCode::Failure)
                    .map(|(filter, _)| Event::SubscriptionRefused { filter });
                Incoming::Events(refused.collect())
            }
            Ok(rumqttc::Event::Outgoing(Outgoing::Subscribe(id))) => {
                if let Some(filters) = self.queued.pop_front() {
                    self.sent.insert(id, filters);
                }
                Incoming::Events(Vec::new())
            }
            Ok(_) => Incoming::Events(Vec::new()),
        }
    }

    /// Queues what the device wants to say. Never waits: this is the task that sends it.
    fn send(&mut self, outputs: Vec<Output>, observe: &mut impl FnMut(Happening)) {
        for output in outputs {
            match &output {
                Output::Report(report) => observe(Happening::Report(report.clone())),
                Output::Log(line) => observe(Happening::Log(line.clone())),
                _ => {}
            }
            // Without a connection nothing is kept: the device says it all again when there is one.
            if self.connected
                && let Err(error) = self.request(output)
            {
                observe(Happening::Log(format!("cannot queue a request: {error}")));
            }
        }
    }

    fn request(&mut self, output: Output) -> Result<(), rumqttc::ClientError> {
        let topic = |subject| self.node.topic(subject);
        match output {
            Output::Subscribe(filters) => {
                let wanted =
                    filters.iter().map(|filter| SubscribeFilter::new(filter.clone(), QoS::AtLeastOnce));
                self.client.try_subscribe_many(wanted)?;
                self.queued.push_back(filters);
                Ok(())
            }
            Output::Unsubscribe(filters) => {
                filters.into_iter().try_for_each(|filter| self.client.try_unsubscribe(filter))
            }
            Output::Introduce(info) => {
                let online = topic(NodeSubject::Online);
                self.client.try_publish(online, QoS::AtLeastOnce, true, "1")?;
                self.client.try_publish(topic(NodeSubject::Info), QoS::AtLeastOnce, true, info.to_bytes())
            }
            Output::Report(report) => {
                let state = report.state.to_bytes();
                self.client.try_publish(topic(NodeSubject::State), QoS::AtLeastOnce, true, state)
            }
            Output::Log(line) => {
                self.client.try_publish(topic(NodeSubject::Log), QoS::AtMostOnce, false, line)
            }
        }
    }

    /// Publishes `online` = `0` and disconnects, within [`limits::GOODBYE`].
    async fn say_goodbye(mut self) {
        let online = self.node.topic(NodeSubject::Online);
        if !self.connected
            || self.client.try_publish(online, QoS::AtLeastOnce, true, "0").is_err()
            || self.client.try_disconnect().is_err()
        {
            return;
        }
        let gone = async {
            loop {
                let (event_loop, event) = (&mut self.polling).await;
                self.polling = Box::pin(poll(event_loop));
                // The broker closes the connection when it has read everything. Closing it here, with its
                // last acknowledgements unread, would reset it, and lose what the broker has not read.
                if event.is_err() {
                    return;
                }
            }
        };
        // Too slow a broker notices by itself.
        let _ = tokio::time::timeout(limits::GOODBYE, gone).await;
    }
}

async fn poll(mut event_loop: EventLoop) -> (EventLoop, Result<rumqttc::Event, ConnectionError>) {
    let event = event_loop.poll().await;
    (event_loop, event)
}

fn explain(error: &ConnectionError, broker: &BrokerUrl) -> Trouble {
    let is_there = format!("is there a broker at {broker}? start one with `mpypi-broker serve`");
    let (error, hint) = match error {
        ConnectionError::Io(error) => (format!("cannot reach {broker}: {error}"), is_there),
        ConnectionError::NetworkTimeout | ConnectionError::FlushTimeout => {
            (format!("{broker} does not answer"), is_there)
        }
        ConnectionError::ConnectionRefused(code) => {
            let (reason, hint) = match code {
                ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized => (
                    "it wants another user name or password",
                    "use `--broker mqtt://user:password@host:port`",
                ),
                ConnectReturnCode::BadClientId => {
                    ("it does not accept this node's name", "use another `--node`")
                }
                ConnectReturnCode::ServiceUnavailable => ("it is not available", "look at its log"),
                _ => ("it does not speak MQTT 3.1.1", "use a broker that does"),
            };
            (format!("{broker} refused the connection: {reason}"), hint.to_owned())
        }
        ConnectionError::MqttState(error) => (format!("lost the connection to {broker}: {error}"), is_there),
        other => (format!("lost the connection to {broker}: {other}"), is_there),
    };
    Trouble { error, hint }
}
