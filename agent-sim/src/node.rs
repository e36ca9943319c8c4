//! A device on an MQTT 3.1.1 connection. No policy here: events in, outputs out, and a clock.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_client::{Brokers, Endpoint, Line, LineError, V4};
use mpypi_protocol::{
    ChannelName, Digest, NodeId, Topic, Trust,
    chunk::CHUNKS,
    limits as wire,
    node::{Phase, State},
    package::PACKAGES,
    topic::NodeSubject,
};
use rumqttc::{
    Connect, ConnectReturnCode, Disconnect, LastWill, Login, Outgoing, Packet, Publish, QoS, Request,
    StateError, Subscribe, SubscribeFilter, SubscribeReasonCode, Unsubscribe,
};
use tokio::sync::{MutexGuard, mpsc};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    choice::Choice,
    device::{Device, Hardware, Mac, Output, Traits},
    face::desk::{Ask, Desk},
    flash::Flash,
    fleet::Herald,
    limits,
    store::BootError,
    update::{Event, Report, Source, Timing},
    weather::{Attack, Blow, Cargo, Falling, Fate, Turn, Weather},
};

/// Who a node is, and where it connects to.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The broker, or several addresses of one: it is at one of them at a time.
    pub brokers: Brokers,
    /// The node, which is also the MQTT client id.
    pub node: NodeId,
    /// The channel it follows.
    pub channel: ChannelName,
    /// Whose lists it believes.
    pub trust: Trust,
    /// What it is.
    pub hardware: Hardware,
    /// What it was told about itself.
    pub traits: Traits,
    /// The times it goes by.
    pub timing: Timing,
    /// Decides the lengths of its pauses.
    pub seed: u64,
    /// Whether every message and fault is told, as [`Happening::Trace`].
    pub trace: bool,
    /// Where those ask who stand before it, if anybody does.
    pub desk: Option<Desk>,
    /// Who is told of every list of the channel that it accepts.
    pub herald: Option<Arc<Herald>>,
}

/// What the owner of a node is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Happening {
    /// The update went on.
    Report(Report),
    /// Something for people.
    Log(String),
    /// A step that only who looks at this node alone wants to see.
    Trace(String),
    /// Something befell it.
    Blow(Blow),
    /// An intruder did something to a message for it.
    Attack {
        /// What.
        attack: Attack,
        /// The lists that come of it, if it was one: no release of the channel's.
        lists: Vec<Digest>,
    },
    /// It refused a list, a root or a release, for the reason of this word.
    Refused(String),
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

/// Why a node does not run any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to stop.
    Stopped,
    /// Its flash lost power.
    PowerLost,
    /// Its application crashed: it starts again at once.
    Crashed,
    /// It sleeps for so long.
    Asleep(Duration),
}

/// Runs a node until `stop` is cancelled or its weather ends it. Connections are made again for ever.
///
/// # Errors
/// The device does not start: its records are damaged or its flash failed.
pub async fn run<F: Flash>(
    options: &NodeOptions,
    flash: F,
    clock: Clock,
    weather: &mut Weather,
    mut observe: impl FnMut(Happening),
    stop: &CancellationToken,
) -> Result<Ended, BootError> {
    let mut asks = match &options.desk {
        Some(desk) => Some(desk.open().await),
        None => None,
    };
    let NodeOptions { node, channel, trust, hardware, traits, timing, seed, .. } = options.clone();
    let confirm_after = timing.confirm_after;
    let mut device = Device::off(flash, &node, channel, hardware, timing, seed)
        .with_traits(traits)
        .believing(trust)
        .with_several(options.brokers.are_several());
    if let Some(desk) = &options.desk {
        device = device.with_face(desk.options().clone(), confirm_after, (clock.now(), clock.wall()));
    }
    let mut device = Box::new(device);
    let outputs = device.start(clock.now());
    if device.store().flash().is_off() {
        return Ok(Ended::PowerLost);
    }
    let outputs = outputs?;
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut choice = Choice::new(options.brokers.count(), &mut rng);
    let mut connection = Connection::open(options, options.at(&choice), Duration::ZERO);
    let mut backoff = Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_MOST);
    connection.send(outputs, &mut observe);
    let mut since = Duration::ZERO;
    let mut turn = None;
    // When it leaves a broker that is behind others.
    let mut leaves = None;
    let mut falling = Falls::default();
    let ended = loop {
        // Before anything else may happen, its confirmation not least.
        if let Report { state: State { phase: Phase::Confirming, version, .. }, list: Some(list), .. } =
            device.report()
            && weather.crashes(clock.now(), *list, version.as_deref())
        {
            return Ok(Ended::Crashed);
        }
        // Who reads slowly leaves what comes at its socket, and the broker with it.
        let deaf = weather.deaf_until(clock.now()).filter(|_| connection.is_open());
        leaves = match device.is_behind() && connection.is_open() {
            true => leaves.or_else(|| Some(clock.now() + choice.stay(&mut rng))),
            false => None,
        };
        let due = [device.deadline(), falling.next(), turn.map(|(at, _)| at), deaf, leaves];
        let due = due.into_iter().flatten().min();
        let wait = due.map(|due| due.saturating_sub(clock.now()));
        let incoming = tokio::select! {
            () = stop.cancelled() => break Ended::Stopped,
            incoming = connection.next(), if deaf.is_none() => incoming,
            Some(ask) = next_ask(&mut asks) => {
                let outputs = device.answer(clock.now(), ask);
                if device.store().flash().is_off() {
                    return Ok(Ended::PowerLost);
                }
                connection.send(outputs?, &mut observe);
                continue;
            }
            () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {
                Incoming::Events(vec![Event::Tick])
            }
        };
        let now = clock.now();
        let mut events: Vec<_> = falling
            .take(now)
            .filter_map(|message| options.event(message, weather.clock(clock.wall().as_second())))
            .collect();
        let incoming = match turn {
            Some((at, Turn::Sleep(time))) if at <= now => break Ended::Asleep(time),
            Some((at, Turn::Break)) if at <= now && connection.is_open() => Incoming::Lost(Loss::Weather),
            _ if leaves.is_some_and(|at| at <= now) => Incoming::Lost(Loss::Behind),
            _ => incoming,
        };
        match incoming {
            Incoming::Events(new) => events.extend(new),
            Incoming::Message(message) => {
                let cargo = options.cargo(&message);
                let fate = weather.fall(now, message.payload.clone(), cargo);
                if options.trace {
                    observe(Happening::Trace(message.told(now, &fate)));
                }
                let Fate { falling: fallen, attack } = fate;
                if let Some(attack) = attack {
                    let lists = fallen.iter().filter(|_| cargo == Cargo::List);
                    let lists = lists.map(|falling| Digest::of(&falling.payload)).collect();
                    observe(Happening::Attack { attack, lists });
                }
                if let Some(at) = weather.gives_up_at() {
                    let breaks = (at, Turn::Break);
                    turn = Some(turn.filter(|(earlier, _)| *earlier < at).unwrap_or(breaks));
                }
                for Falling { at, payload } in fallen {
                    let message = Message { payload, ..message.clone() };
                    match at <= now {
                        true => {
                            events.extend(options.event(message, weather.clock(clock.wall().as_second())));
                        }
                        false => falling.add(at, message),
                    }
                }
            }
            Incoming::Connected => {
                since = now;
                choice.answered();
                turn = weather.next_turn(now);
                observe(Happening::Connected);
                if options.trace {
                    let until = match turn {
                        Some((at, Turn::Break)) => {
                            format!(", which breaks in {:.2} s", at.saturating_sub(now).as_secs_f64())
                        }
                        Some((at, Turn::Sleep(_))) => {
                            format!(", until it sleeps in {:.2} s", at.saturating_sub(now).as_secs_f64())
                        }
                        None => String::new(),
                    };
                    observe(Happening::Trace(format!("has a connection{until}")));
                }
                events.push(Event::Connected);
            }
            Incoming::Lost(error) => {
                // A connection that breaks at once, again and again, is no success.
                if connection.is_open() && now >= since + limits::RECONNECT_MOST {
                    backoff.reset();
                }
                let again_in = backoff.next(&mut rng);
                if options.trace {
                    let text = format!("has none; tries again in {:.2} s", again_in.as_secs_f64());
                    observe(Happening::Trace(text));
                }
                observe(Happening::Lost { trouble: explain(&error, options.at(&choice)), again_in });
                match error {
                    Loss::Behind => choice.left(&mut rng),
                    _ => choice.lost(&mut rng),
                }
                leaves = None;
                connection = Connection::open(options, options.at(&choice), again_in);
                (turn, falling) = (None, Falls::default());
                events.push(Event::Disconnected);
            }
        }
        let mut refused = false;
        for event in events {
            refused |= matches!(event, Event::SubscriptionRefused { .. });
            let heard = match (&event, &options.herald) {
                (Event::List { source: Source::Channel, payload, .. }, Some(herald)) => {
                    Some((herald, payload.clone()))
                }
                _ => None,
            };
            let outputs = device.handle(clock.now(), event);
            if let (Some((herald, list)), Some(seen)) = (heard, device.store().seen())
                && seen.list == Digest::of(&list)
            {
                herald.tell(&list);
            }
            if device.store().flash().is_off() {
                return Ok(Ended::PowerLost);
            }
            connection.send(outputs?, &mut observe);
        }
        if refused {
            let url = options.at(&choice).url();
            let (scheme, host, port) = (url.security.scheme(), &url.host, url.port);
            observe(Happening::Log(format!(
                "hint: use `--broker {scheme}://user:password@{host}:{port}`, or let the node `{node}` read \
                 channels, packages and its own topics"
            )));
        }
    };
    connection.say_goodbye().await;
    Ok(ended)
}

/// What somebody before the device asks next; nobody ever does where there is no desk.
async fn next_ask(asks: &mut Option<MutexGuard<'_, mpsc::Receiver<Ask>>>) -> Option<Ask> {
    match asks {
        Some(asks) => asks.recv().await,
        None => None,
    }
}

/// Messages that have not arrived yet, in the order in which they will.
pub(crate) struct Falls<M> {
    messages: BTreeMap<(Duration, u64), M>,
    count: u64,
}

impl<M> Default for Falls<M> {
    fn default() -> Self {
        Falls { messages: BTreeMap::new(), count: 0 }
    }
}

impl<M> Falls<M> {
    /// When the next one arrives.
    pub(crate) fn next(&self) -> Option<Duration> {
        self.messages.first_key_value().map(|((at, _), _)| *at)
    }

    /// Sends one on its way, which arrives `at` this time.
    pub(crate) fn add(&mut self, at: Duration, message: M) {
        self.count += 1;
        self.messages.insert((at, self.count), message);
    }

    /// Takes out what has arrived.
    pub(crate) fn take(&mut self, now: Duration) -> impl Iterator<Item = M> + use<M> {
        let rest = self.messages.split_off(&(now, u64::MAX));
        std::mem::replace(&mut self.messages, rest).into_values()
    }
}

impl NodeOptions {
    fn cargo(&self, message: &Message) -> Cargo {
        match &message.topic {
            topic if is_package(topic) => Cargo::Package,
            topic if *topic == self.channel.topic() => Cargo::List,
            _ => Cargo::Other,
        }
    }

    fn topic(&self, subject: NodeSubject) -> String {
        self.node.topic(subject)
    }

    /// What a message means to the device, if anything, when its clock says `clock`, in seconds since 1970.
    fn event(&self, message: Message, clock: Option<i64>) -> Option<Event> {
        let Message { topic, payload, retained } = message;
        let wall = clock.and_then(|seconds| Timestamp::from_second(seconds).ok());
        if let Some(sequence) = self.channel.history_sequence(&topic) {
            return Some(Event::List { source: Source::History(sequence), payload, wall });
        }
        match Topic::parse(&topic).ok()? {
            Topic::Channel(channel) if channel == self.channel => {
                Some(Event::List { source: Source::Channel, payload, wall })
            }
            // A retained order would be carried out again after every reconnect.
            Topic::Node(node, NodeSubject::Cmd) if node == self.node && !retained => {
                Some(Event::List { source: Source::Cmd, payload, wall })
            }
            Topic::Package(_) | Topic::Chunk(..) => Some(Event::Package { topic, payload }),
            Topic::Root(number) => Some(Event::Root { number, payload }),
            // As with orders, what is retained is old.
            Topic::Other(topic) if !retained && self.mac().is_some_and(|mac| mac.set() == topic) => {
                Some(Event::WantsFirmware)
            }
            _ => None,
        }
    }

    fn mac(&self) -> Option<&Mac> {
        self.desk.as_ref()?.options().mac.as_ref()
    }

    /// The broker at the address chosen.
    fn at(&self, choice: &Choice) -> &Endpoint {
        self.brokers.iter().nth(choice.at()).unwrap_or_else(|| self.brokers.first())
    }

    fn hello(&self, broker: &Endpoint) -> Packet {
        let mut hello = Connect::new(self.node.as_str());
        hello.keep_alive = limits::KEEP_ALIVE.as_secs() as u16;
        hello.clean_session = true;
        hello.last_will = Some(LastWill::new(self.topic(NodeSubject::Online), "0", QoS::AtLeastOnce, true));
        let credentials = broker.url().credentials.as_ref();
        hello.login = credentials.map(|(user, password)| Login::new(user, password));
        Packet::Connect(hello)
    }

    /// Connects after a pause.
    async fn connect(self, broker: Endpoint, pause: Duration) -> Result<Line<V4>, Loss> {
        tokio::time::sleep(pause).await;
        let version = V4::new(limits::IN_FLIGHT, wire::PACKET);
        let (mut line, packet) = Line::open(&broker, version, self.hello(&broker)).await?;
        match packet {
            Packet::ConnAck(greeting) if greeting.code == ConnectReturnCode::Success => {
                line.accept(None, limits::KEEP_ALIVE);
                Ok(line)
            }
            Packet::ConnAck(refusal) => Err(Loss::Refused(refusal.code)),
            _ => Err(Loss::NotMqtt),
        }
    }
}

/// One connection, from the attempt to its end. The next one is a new value: nothing queued for the old
/// one is ever sent on the new one.
struct Connection {
    node: NodeId,
    stage: Stage,
    /// Filters of SUBSCRIBE packets that were queued, and then sent with an id.
    queued: VecDeque<Vec<String>>,
    several: bool,
    sent: HashMap<u16, Vec<String>>,
}

enum Stage {
    Opening(Pin<Box<dyn Future<Output = Result<Line<V4>, Loss>> + Send>>),
    Open(Box<Line<V4>>),
}

/// Why there is no connection, or none any more.
#[derive(Debug)]
enum Loss {
    Line(LineError<StateError>),
    Refused(ConnectReturnCode),
    NotMqtt,
    /// A fault of the profile.
    Weather,
    /// It has an older list than others.
    Behind,
}

impl From<LineError<StateError>> for Loss {
    fn from(error: LineError<StateError>) -> Loss {
        Loss::Line(error)
    }
}

#[derive(Clone)]
struct Message {
    topic: String,
    payload: Bytes,
    retained: bool,
}

impl Message {
    /// What became of it on its way, for who looks at this node alone.
    fn told(&self, now: Duration, fate: &Fate) -> String {
        let what = match fate.attack {
            Some(attack) => {
                format!("{}, {} B, under attack ({})", self.topic, self.payload.len(), attack.word())
            }
            None => format!("{}, {} B", self.topic, self.payload.len()),
        };
        let is_changed = |falling: &Falling| fate.attack.is_none() && falling.payload != self.payload;
        let when = |falling: &Falling| {
            let changed = if is_changed(falling) { ", a byte of it changed" } else { "" };
            format!("arrives in {:.3} s{changed}", falling.at.saturating_sub(now).as_secs_f64())
        };
        match &fate.falling[..] {
            [] if fate.attack == Some(Attack::EndlessData) => format!("{what}: never ends"),
            [] => format!("{what}: is lost"),
            fallen => format!("{what}: {}", fallen.iter().map(when).collect::<Vec<_>>().join(", and again ")),
        }
    }
}

enum Incoming {
    Events(Vec<Event>),
    Message(Message),
    Connected,
    Lost(Loss),
}

impl Connection {
    fn open(options: &NodeOptions, broker: &Endpoint, after: Duration) -> Connection {
        Connection {
            node: options.node.clone(),
            stage: Stage::Opening(Box::pin(options.clone().connect(broker.clone(), after))),
            queued: VecDeque::new(),
            several: options.brokers.are_several(),
            sent: HashMap::new(),
        }
    }

    /// What happens next. May be dropped and called again: nothing is lost.
    async fn next(&mut self) -> Incoming {
        let event = match &mut self.stage {
            Stage::Opening(opening) => match opening.await {
                Ok(line) => {
                    self.stage = Stage::Open(Box::new(line));
                    return Incoming::Connected;
                }
                Err(loss) => return Incoming::Lost(loss),
            },
            Stage::Open(line) => line.next().await,
        };
        match event {
            Err(error) => Incoming::Lost(error.into()),
            Ok(rumqttc::Event::Incoming(Packet::Publish(publish))) => {
                let Publish { topic, payload, retain, .. } = publish;
                Incoming::Message(Message { topic, payload, retained: retain })
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

    fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open(_))
    }

    /// Queues what the device wants to say. Never waits: this is the task that sends it.
    fn send(&mut self, outputs: Vec<Output>, observe: &mut impl FnMut(Happening)) {
        for output in outputs {
            match &output {
                Output::Report(report) => observe(Happening::Report(report.clone())),
                Output::Log(line) => observe(Happening::Log(line.clone())),
                Output::Refused(word) => {
                    observe(Happening::Refused(word.clone()));
                    continue;
                }
                _ => {}
            }
            // Without a connection nothing is kept: the device says it all again when there is one.
            if let Stage::Open(line) = &self.stage {
                match line.waiting() < limits::REQUESTS {
                    true => self.request(output),
                    false => observe(Happening::Log("cannot queue a request: too many wait".to_owned())),
                }
            }
        }
    }

    fn request(&mut self, output: Output) {
        match output {
            Output::Subscribe(filters) => {
                let several = self.several;
                let wanted = filters
                    .iter()
                    .map(|filter| SubscribeFilter::new(filter.clone(), quality(filter, several)));
                self.ask(Request::Subscribe(Subscribe::new_many(wanted)));
                self.queued.push_back(filters);
            }
            Output::Unsubscribe(filters) => {
                for filter in filters {
                    self.ask(Request::Unsubscribe(Unsubscribe::new(filter)));
                }
            }
            Output::Introduce(info) => {
                self.retain(NodeSubject::Online, "1");
                self.retain(NodeSubject::Info, info.to_bytes());
            }
            Output::Report(report) => self.retain(NodeSubject::State, report.state.to_bytes()),
            Output::Retain(topic, payload) => {
                let mut publish = Publish::new(topic, QoS::AtLeastOnce, payload);
                publish.retain = true;
                self.ask(Request::Publish(publish));
            }
            Output::Refused(_) => {}
            Output::Log(line) => {
                self.ask(Request::Publish(Publish::new(
                    self.node.topic(NodeSubject::Log),
                    QoS::AtMostOnce,
                    line,
                )));
            }
        }
    }

    fn retain(&mut self, subject: NodeSubject, payload: impl Into<Vec<u8>>) {
        let mut publish = Publish::new(self.node.topic(subject), QoS::AtLeastOnce, payload);
        publish.retain = true;
        self.ask(Request::Publish(publish));
    }

    fn ask(&mut self, request: Request) {
        if let Stage::Open(line) = &mut self.stage {
            line.request(request);
        }
    }

    /// Publishes `online` = `0` and disconnects when the broker has acknowledged that and everything before it, its last
    /// state above all; within [`limits::LAST_STATE`] and [`limits::GOODBYE`].
    async fn say_goodbye(mut self) {
        if !self.is_open() {
            return;
        }
        self.retain(NodeSubject::Online, "0");
        let Stage::Open(mut line) = self.stage else { return };
        let acknowledged = async { while line.unacknowledged() > 0 && line.next().await.is_ok() {} };
        // Too slow a broker has it in its socket, and reads it before it reads the goodbye.
        let _ = tokio::time::timeout(limits::LAST_STATE, acknowledged).await;
        line.request(Request::Disconnect(Disconnect));
        // The broker closes the connection when it has read everything. Closing it here, with its
        // last acknowledgements unread, would reset it, and lose what the broker has not read.
        let gone = async { while line.next().await.is_ok() {} };
        // Too slow a broker notices by itself.
        let _ = tokio::time::timeout(limits::GOODBYE, gone).await;
    }
}

/// A package that does not come is asked for again, so none needs to be acknowledged; on clusters, which keep account of what
/// is, that is many times dearer, and the account is what a node that is lost takes along: there the list is asked for more
/// often instead.
fn quality(filter: &str, several: bool) -> QoS {
    if several || is_package(filter) { QoS::AtMostOnce } else { QoS::AtLeastOnce }
}

/// Whether a package is retained there, or a chunk of one.
pub(crate) fn is_package(topic: &str) -> bool {
    topic.starts_with(PACKAGES) || topic.starts_with(CHUNKS)
}

fn explain(loss: &Loss, broker: &Endpoint) -> Trouble {
    let url = broker.url();
    let is_there = || format!("is there a broker at {url}? start one with `mpypi-broker serve`");
    let (error, hint) = match loss {
        Loss::Line(LineError::Connect(error)) => {
            (format!("cannot reach {url}: {error}"), error.hint().unwrap_or_else(is_there))
        }
        Loss::Line(error) => (format!("lost the connection to {url}: {error}"), is_there()),
        Loss::Weather => (format!("lost the connection to {url}: a simulated fault"), String::new()),
        Loss::Behind => (format!("left {url}, which is behind others"), String::new()),
        Loss::NotMqtt => (format!("{url} does not answer as a broker"), is_there()),
        Loss::Refused(code) => {
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
            (format!("{url} refused the connection: {reason}"), hint.to_owned())
        }
    };
    Trouble { error, hint }
}
