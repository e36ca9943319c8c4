//! One client's connection: bytes in, bytes out, deadlines. What they mean is the session's business.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use mpypi_protocol::{
    PackageId, Topic,
    package::LegacyId,
    topic::{self, NodeSubject, TopicError},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    access::{
        Identity,
        gate::{Gate, Login, Shown},
    },
    bus::{SharedSubscriptions, Tickets},
    clock::{self, Now},
    door::{admit, is_heavy},
    edge::Edge,
    faces::thingsboard::{
        desk::Desk,
        link::{Link, Taken},
        session::{ATTRIBUTES, Answer},
    },
    fleet::Fleet,
    index::{
        Index, IndexError, Step,
        sessions::{Change, Kept, Opening, Queued},
        writer::{Op, Reply, Settled, Submission},
    },
    limits::Limits,
    listen::Arrival,
    mailbox::{Delivery, Mail, Mailbox},
    message::{Message, Payload, Refusal, SessionId},
    metrics::Metrics,
    mpyblox::{Meaning, Seat, Served, SharedDesk},
    outbox::Outbox,
    packet::{self, Connect, Framing, Packet, Publish, Qos, Reason, Secret, Version, Welcome},
    pulse::Pulse,
    registry::{Member, Membership, NotEntered, Registry},
    server::Access,
    session::{Effect, Leaving, Replay, Session},
    subscriptions::Receiver,
    sys,
};

/// Bytes waiting to be sent above which no further message is fetched for the client.
const OUT_ENOUGH: u64 = 64 * 1024;
/// Bytes waiting to be sent above which nothing further is read from the client.
const OUT_FULL: u64 = 256 * 1024;
/// Room made in the read buffer at a time, in bytes, while a client sends much.
const READ: usize = 16 * 1024;
/// The same for a client of which nothing is expected: most are idle, and this is held for each.
const READ_IDLE: usize = 256;
/// Messages fetched before others have their turn.
const TURN: usize = 64;
/// For the last bytes to a client that is being closed.
pub(crate) const FAREWELL: Duration = Duration::from_secs(2);
/// The same while the broker stops, and everyone waits for the slowest.
pub(crate) const FAREWELL_AT_STOP: Duration = Duration::from_millis(250);
/// While a large packet is received, how often to look whether others wait for its place.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Bytes that one place stands for, see [`Shared::places`].
pub const PLACE: usize = 1024;

/// What all connections share.
#[derive(Debug)]
pub struct Shared {
    /// The limits.
    pub limits: Arc<Limits>,
    /// For reading retained messages.
    pub index: Index,
    /// To the index's writer.
    pub ops: mpsc::Sender<Op>,
    /// How far the bus is.
    pub tickets: Tickets,
    /// Read by the dispatcher.
    pub subscriptions: SharedSubscriptions,
    /// Places for large packets, one for each [`PLACE`] bytes.
    pub places: Arc<Semaphore>,
    /// Places for clients.
    pub clients: Arc<Semaphore>,
    /// Places for connections, whatever they are.
    pub sockets: Arc<Semaphore>,
    /// Places for HTTP connections.
    pub http: Arc<Semaphore>,
    /// Ends every connection.
    pub shutdown: CancellationToken,
    /// Who is let in.
    pub gate: Gate,
    /// Who is let in while there are no users.
    pub access: Access,
    /// Who is connected.
    pub registry: Registry,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Whether messages get through.
    pub pulse: Pulse,
    /// What is known of all nodes.
    pub fleet: Fleet,
    /// How nodes that run Mpy-BLOX are served.
    pub mpyblox: SharedDesk,
    /// How devices that speak ThingsBoard's API are served.
    pub things: Desk,
    /// The upstream, if there is one.
    pub edge: Option<Arc<Edge>>,
}

/// Serves one client until it has gone.
pub async fn serve<S>(socket: S, arrival: Arrival, shared: &Shared)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut reader, mut writer) = tokio::io::split(socket);
    let peer = arrival.peer;
    // Each step has its own place on the heap, while it lasts: most connections are idle, in the second.
    let entered = Box::pin(enter(&mut reader, &mut writer, arrival, shared)).await;
    let Some(mut entered) = entered else { return };
    let end = Box::pin(entered.converse(&mut reader, &mut writer)).await;
    let client = entered.connection.session.client_id.clone();
    // The id is free before the last bytes are taken: whoever waits for it need not wait for them.
    drop(entered);
    match end {
        Ok(()) => {
            let stopping = shared.shutdown.is_cancelled();
            let patience = if stopping { FAREWELL_AT_STOP } else { FAREWELL };
            Box::pin(farewell(&mut reader, &mut writer, patience)).await;
        }
        Err(error) => tracing::debug!(%peer, client, %error, "lost"),
    }
    tracing::debug!(%peer, client, "gone");
}

/// A client that is in.
struct Entered<'s> {
    connection: Connection<'s>,
    membership: Membership<'s>,
    /// The client's place among all that may be there.
    _place: OwnedSemaphorePermit,
}

impl Entered<'_> {
    async fn converse(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> std::io::Result<()> {
        let end = self.connection.run(reader, writer, &self.membership.member).await;
        self.connection.leave().await;
        end
    }
}

/// Lets a client in, or tells it why not.
async fn enter<'s>(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    arrival: Arrival,
    shared: &'s Shared,
) -> Option<Box<Entered<'s>>> {
    let mut buffer = BytesMut::new();
    let Arrival { id, peer, deadline, .. } = arrival;
    let handshake = timeout_at(deadline.into(), handshake(reader, &mut buffer, &arrival, shared));
    let greeting = tokio::select! {
        greeting = handshake => greeting,
        () = shared.shutdown.cancelled() => return None,
    };
    let Greeted { mut connect, identity, login, place } = match greeting {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(refused)) => {
            refuse(reader, writer, peer, &refused, &shared.metrics).await;
            return None;
        }
        Err(_) => {
            shared.metrics.strangers.one();
            tracing::info!(%peer, "no CONNECT in time");
            return None;
        }
    };
    let assigned = connect.client_id.is_empty().then(|| match &identity {
        Identity::Node(node, _) => node.to_string(),
        _ => format!("auto-{:016x}", fastrand::u64(..)),
    });
    let mut client_id = assigned.as_ref().unwrap_or(&connect.client_id).clone();
    let device = login.as_ref().and_then(Login::device).map(|(node, device)| (node.clone(), device.clone()));
    let asked_expiry = connect.session_expiry;
    if let Some((node, _)) = &device {
        // It may call itself what it likes and is one node; what it is to have, it is told anew each time.
        client_id = node.to_string();
        (connect.session_expiry, connect.clean_start, connect.will) = (0, true, None);
    }
    let granted = Session::granted_expiry(connect.session_expiry, &shared.limits);
    let mut welcome = Welcome {
        session_present: false,
        session_expiry: (granted != asked_expiry).then_some(granted),
        assigned_id: assigned,
        has_room: true,
    };
    let fits = |welcome: &Welcome| {
        let size = packet::accept(connect.version, &shared.limits, welcome).len();
        connect.maximum_packet_size.is_none_or(|largest| size <= largest as usize)
    };
    welcome.has_room = fits(&welcome);
    if !fits(&welcome) {
        // [MQTT-3.1.2-24]
        let text = "our CONNACK is larger than the largest packet that the client takes";
        refuse(
            reader,
            writer,
            peer,
            &Refused::answered(&connect, Reason::PacketTooLarge, text),
            &shared.metrics,
        )
        .await;
        return None;
    }
    let owner = login.as_ref().map(|login| login.name.clone());
    let by_right = matches!(identity, Identity::Node(..));
    let membership = match shared.registry.enter(&client_id, id, login, by_right).await {
        Ok(membership) => membership,
        Err(reason @ (NotEntered::Replaced | NotEntered::Closed)) => {
            tracing::debug!(%peer, client = client_id, ?reason, "gone before it was let in");
            return None;
        }
        Err(not_entered) => {
            let (reason, text) = match not_entered {
                NotEntered::Foreign => (Reason::ClientIdentifierNotValid, "another user has this client id"),
                _ => (Reason::ServerBusy, "an earlier connection of this client does not go"),
            };
            let refused = Refused::answered(&connect, reason, text);
            refuse(reader, writer, peer, &refused, &shared.metrics).await;
            return None;
        }
    };
    let kept = match open_session(&connect, &client_id, owner, by_right, shared).await {
        Ok(kept) => kept,
        Err(Refusal { reason, text }) => {
            let refused = Refused::answered(&connect, reason, text);
            refuse(reader, writer, peer, &refused, &shared.metrics).await;
            return None;
        }
    };
    shared.metrics.connects.one();
    tracing::debug!(%peer, client = client_id, version = ?connect.version, "connected");
    welcome.session_present = kept.as_ref().is_some_and(|kept| kept.present);
    let now = clock::now();
    let id = kept.as_ref().map_or(membership.member.id, |kept| kept.id);
    let mailbox = kept.as_ref().map(|kept| kept.mailbox.clone());
    let mailbox = mailbox.unwrap_or_else(|| Arc::new(Mailbox::new(&shared.limits)));
    let mut effects = Vec::new();
    let mut session = Session::new(id, client_id, identity, &connect, shared.limits.clone(), now.instant);
    let mut link = None;
    if let Some((node, device)) = device {
        match Box::pin(Link::begin(shared, node, device, &mailbox)).await {
            Ok(begun) => link = Some(Box::new(begun)),
            Err(error) => {
                tracing::error!(%error, "cannot look up what a device is to have");
                let refused = Refused::answered(&connect, Reason::UnspecifiedError, "the index failed");
                refuse(reader, writer, peer, &refused, &shared.metrics).await;
                return None;
            }
        }
        session.speaks_to_face();
    }
    if let Some(kept) = kept {
        session.resume(kept, &mut effects);
    }
    let mut connection = Connection {
        shared,
        session,
        mailbox,
        outbox: Outbox::default(),
        // What else the buffer holds is small; the rest of it goes.
        buffer: BytesMut::from(&buffer[..]),
        place: Place::None,
        part_since: None,
        room: READ_IDLE,
        progress: now.instant,
        now,
        closing: false,
        seat: None,
        link,
    };
    connection.outbox.push(packet::accept(connect.version, &shared.limits, &welcome));
    connection.carry_out(effects).await;
    Some(Box::new(Entered { connection, membership, _place: place }))
}

/// Opens the client's session, if it is, or is to be, one that outlives its connection.
async fn open_session(
    connect: &Connect,
    client_id: &str,
    owner: Option<String>,
    by_right: bool,
    shared: &Shared,
) -> Result<Option<Kept>, Refusal> {
    let failed = |error: IndexError| {
        tracing::error!(%error, "cannot look for a session");
        Refusal::new(Reason::UnspecifiedError, "the index failed")
    };
    let expiry = Session::granted_expiry(connect.session_expiry, &shared.limits);
    if expiry == 0 && !shared.index.has_session(client_id).map_err(failed)? {
        return Ok(None);
    }
    let opening = Opening {
        client_id: client_id.to_owned(),
        owner,
        by_right,
        clean_start: connect.clean_start,
        expiry,
    };
    let (reply, opened) = oneshot::channel();
    let stopped = || Refusal::new(Reason::ServerShuttingDown, "the index has stopped");
    shared.ops.send(Op::Open(Box::new(opening), reply)).await.map_err(|_| stopped())?;
    opened.await.map_err(|_| stopped())?
}

/// A client that may come in.
struct Greeted {
    connect: Connect,
    identity: Identity,
    login: Option<Login>,
    place: OwnedSemaphorePermit,
}

/// Why a client did not get in.
struct Refused {
    version: Version,
    reason: Reason,
    text: String,
    /// The largest CONNACK that may be sent: none to bytes that are no CONNECT.
    largest: usize,
}

impl Refused {
    /// Bytes that are no CONNECT get no answer.
    fn silent(text: impl Into<String>) -> Refused {
        Refused { version: Version::V3, reason: Reason::ProtocolError, text: text.into(), largest: 0 }
    }

    fn answered(connect: &Connect, reason: Reason, text: impl Into<String>) -> Refused {
        let largest = connect.maximum_packet_size.map_or(usize::MAX, |size| size as usize);
        Refused { version: connect.version, reason, text: text.into(), largest }
    }
}

/// Tells a client why it did not get in.
async fn refuse(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    peer: SocketAddr,
    refused: &Refused,
    metrics: &Metrics,
) {
    tracing::info!(%peer, "refused: {}", refused.text);
    match refused.largest {
        0 => metrics.strangers.one(),
        _ => metrics.connects_refused.one(refused.reason),
    }
    let connack = |text| packet::refuse(refused.version, refused.reason, text);
    let answer = [&*refused.text, ""].map(connack).into_iter().find(|bytes| bytes.len() <= refused.largest);
    // The answer is smaller than any socket's buffer: it waits for nobody.
    if let Some(answer) = answer
        && writer.write_all(&answer).await.is_ok()
    {
        farewell(reader, writer, FAREWELL).await;
    }
}

async fn handshake(
    reader: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
    arrival: &Arrival,
    shared: &Shared,
) -> Result<Greeted, Refused> {
    let limits = &shared.limits;
    let frame = loop {
        // Before anything is held for it: what is not a CONNECT goes no further.
        if buffer.first().is_some_and(|first| *first != 0x10) {
            return Err(Refused::silent("the first packet is no CONNECT"));
        }
        match packet::frame(buffer, limits) {
            Ok(Framing::Whole(frame)) => break frame,
            Ok(Framing::Part(_)) => {}
            Err(error) => return Err(Refused::silent(error.text)),
        }
        buffer.reserve(1024);
        match reader.read_buf(buffer).await {
            Ok(0) => return Err(Refused::silent("closed before its CONNECT")),
            Ok(count) => shared.metrics.bytes_received.add(count as u64),
            Err(error) => return Err(Refused::silent(error.to_string())),
        }
    };
    let connect = match packet::decode(frame, Version::V3, limits) {
        Ok(Packet::Connect(connect)) => *connect,
        Ok(_) => return Err(Refused::silent("the first packet is no CONNECT")),
        Err(error) => {
            let is_answered = error.reason == Reason::UnsupportedProtocolVersion;
            let largest = if is_answered { usize::MAX } else { 0 };
            return Err(Refused { version: Version::V3, reason: error.reason, text: error.text, largest });
        }
    };
    let refuse = |reason, text: &str| Err(Refused::answered(&connect, reason, text));
    if connect.wants_auth_exchange {
        return refuse(Reason::BadAuthenticationMethod, "enhanced authentication is not offered");
    }
    if connect.client_id.is_empty() && connect.version == Version::V3 && !connect.clean_start {
        return refuse(Reason::ClientIdentifierNotValid, "an empty client id needs a clean session");
    }
    if connect.client_id.len() > limits.client_id {
        let text = format!("a client id is at most {} bytes", limits.client_id);
        return refuse(Reason::ClientIdentifierNotValid, &text);
    }
    let password = connect.password.clone().map(|Secret(bytes)| bytes);
    let shown =
        Shown { name: connect.user.clone(), password, token: None, certificate: arrival.certificate.clone() };
    let (identity, login) = match shared.gate.identify(arrival.peer.ip(), shown).await {
        Ok(known) => known,
        Err(refusal) => return refuse(refusal.reason, &refusal.text),
    };
    let is_device = login.as_ref().is_some_and(|login| login.device().is_some());
    if !is_device && !identity.may_be(&connect.client_id) {
        let text = format!("{identity} may only be called so");
        return refuse(Reason::ClientIdentifierNotValid, &text);
    }
    // Later there is nobody left to tell.
    if let Some(will) = connect.will.as_ref().filter(|_| !is_device) {
        if !identity.may_publish(&will.topic) {
            let text = format!("the will: {identity} may not publish to `{}`", will.topic);
            return refuse(Reason::NotAuthorized, &text);
        }
        if let Err(refusal) = admit(will.clone(), limits) {
            // 3.1.1 has no code for what must not be there at all, and says to close: [MQTT-3.1.4-1].
            let check = topic::check_name(&will.topic);
            if connect.version == Version::V3
                && matches!(check, Err(TopicError::Empty | TopicError::Wildcard { .. }))
            {
                return Err(Refused::silent(format!("the will: {refusal}")));
            }
            return refuse(refusal.reason, &format!("the will: {refusal}"));
        }
    }
    match shared.clients.clone().try_acquire_owned() {
        Ok(place) => Ok(Greeted { connect, identity, login, place }),
        Err(_) => refuse(Reason::QuotaExceeded, "too many clients"),
    }
}

/// Lets the client read what was sent: a socket closed with bytes unread would take it back.
pub(crate) async fn farewell(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    patience: Duration,
) {
    /// Bytes of a closed client that are read and thrown away.
    const DRAIN: usize = 1024 * 1024;
    let drain = async {
        writer.shutdown().await.ok();
        // On the heap: this must not make every connection's task larger.
        let mut scratch = vec![0; 4096];
        let mut drained = 0;
        while drained < DRAIN {
            match reader.read(&mut scratch).await {
                Ok(0) | Err(_) => break,
                Ok(count) => drained += count,
            }
        }
    };
    timeout(patience, drain).await.ok();
}

/// A large packet's place among all that are being received.
enum Place {
    None,
    Waiting(std::pin::Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>),
    Taken(OwnedSemaphorePermit),
}

struct Connection<'s> {
    shared: &'s Shared,
    session: Session,
    mailbox: Arc<Mailbox>,
    outbox: Outbox,
    buffer: BytesMut,
    place: Place,
    /// Since when the buffer holds the start of a packet, and how many bytes the packet has in all.
    part_since: Option<(Instant, usize)>,
    /// Room to make in the buffer before the next read.
    room: usize,
    /// When the client last took bytes, or had taken all.
    progress: Instant,
    /// The moment of this turn: clocks are read once in each, and after every wait.
    now: Now,
    closing: bool,
    /// What only a node that runs Mpy-BLOX has.
    seat: Option<Box<Seat>>,
    /// What only a device that speaks ThingsBoard's API has.
    link: Option<Box<Link>>,
}

/// What woke a connection.
enum Woken {
    Read(std::io::Result<usize>),
    Wrote(std::io::Result<usize>),
    Place(OwnedSemaphorePermit),
    Kicked,
    Nothing,
}

/// What [`Connection::fetch_one`] came to.
enum Fetched {
    One,
    SearchedInVain,
    Nothing,
    /// A list for a node that runs Mpy-BLOX, and where it comes from.
    List(Box<(Source, Message)>),
    /// What a device is to have may have changed.
    News,
}

/// Where a message comes from that is to be sent.
enum Source {
    Replay(Replay),
    Live(Delivery),
    Queued(Queued),
}

impl Connection<'_> {
    async fn run(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
        member: &Member,
    ) -> std::io::Result<()> {
        // Both are set up once, not at each turn: all connections share the timers' lock.
        let mut kicked = pin!(member.kick.cancelled());
        let mut alarm = pin!(sleep_until(self.now.instant.into()));
        let mut alarm_at = None;
        loop {
            self.settle().await;
            self.receive().await;
            let mut more = self.fetch().await;
            more |= self.flush(writer).await;
            if self.is_done() {
                return Ok(());
            }
            let reading =
                self.session.wants_packets() && self.outbox.weight() < OUT_FULL && !self.place.is_waiting();
            if !reading {
                self.unheard(self.now.instant);
            }
            let deadline = self.deadline();
            // Deadlines mostly move on: one that rings early is set again then.
            if alarm_at.is_none_or(|at| deadline < at) {
                alarm.as_mut().reset(deadline.into());
                alarm_at = Some(deadline);
            }
            self.buffer.reserve(if reading { self.room } else { 0 });
            // In this order, so that what has come is seen before a deadline for it; each turn looks at all
            // deadlines anyway.
            let woken = tokio::select! {
                biased;
                () = &mut kicked, if !self.closing => Woken::Kicked,
                // Before waiting to write: a full outbox ends reading, but nothing would end a long replay.
                result = reader.read_buf(&mut self.buffer), if reading => Woken::Read(result),
                result = self.outbox.write(writer, &self.shared.index), if !self.outbox.is_empty() => {
                    Woken::Wrote(result)
                }
                place = self.place.taken(), if self.place.is_waiting() => match place {
                    Ok(place) => Woken::Place(place),
                    Err(_) => Woken::Kicked,
                },
                () = self.mailbox.arrived() => Woken::Nothing,
                () = tokio::task::yield_now(), if more => Woken::Nothing,
                () = &mut alarm => {
                    alarm_at = None;
                    Woken::Nothing
                }
            };
            self.now = clock::now();
            let now = self.now.instant;
            if !reading {
                self.unheard(now);
            }
            let mut effects = Vec::new();
            match woken {
                Woken::Read(Ok(0)) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                Woken::Read(result) => {
                    let count = result?;
                    self.shared.metrics.bytes_received.add(count as u64);
                    self.room = if count >= self.room { READ } else { READ_IDLE };
                }
                Woken::Wrote(result) => self.wrote(result?),
                Woken::Place(place) => self.place = Place::Taken(place),
                Woken::Kicked => {
                    let (reason, text) = match (self.shared.shutdown.is_cancelled(), member.is_revoked()) {
                        (true, _) => (Reason::ServerShuttingDown, "the broker stops"),
                        (_, true) => (Reason::NotAuthorized, "no longer let in as this user"),
                        _ => (Reason::SessionTakenOver, "the client id connected again"),
                    };
                    if reason == Reason::SessionTakenOver {
                        // On the heap: this must not make every connection's task larger.
                        Box::pin(self.hear_out(reader)).await;
                    }
                    self.session.end(reason, text, &mut effects);
                }
                Woken::Nothing => {}
            }
            self.session.tick(now, &mut effects);
            self.look_after_seat(now);
            self.check_stalls(now, &mut effects)?;
            self.carry_out(effects).await;
        }
    }

    /// Takes what the client has sent already. Whoever says DISCONNECT and connects again at once must not
    /// find that the second came first: its will would be published, and its session kept.
    async fn hear_out(&mut self, reader: &mut (impl AsyncRead + Unpin)) {
        if self.session.wants_packets() && !self.place.is_waiting() {
            self.buffer.reserve(READ);
            tokio::select! {
                biased;
                _ = reader.read_buf(&mut self.buffer) => self.receive().await,
                () = std::future::ready(()) => {}
            }
        }
    }

    /// Takes what became of what the session asked for.
    async fn settle(&mut self) {
        while let Some(settled) = self.mailbox.pop_settled() {
            let mut effects = Vec::new();
            self.session.settled(settled, &mut effects);
            self.carry_out(effects).await;
        }
    }

    /// While the broker itself makes the client wait, the client is not late.
    fn unheard(&mut self, now: Instant) {
        self.session.unheard(now);
        self.part_since = self.part_since.map(|(_, total)| (now, total));
    }

    /// Takes whole packets out of the buffer.
    async fn receive(&mut self) {
        while self.session.wants_packets() && !self.place.is_waiting() {
            let now = self.now.instant;
            let mut effects = Vec::new();
            match packet::frame(&mut self.buffer, &self.shared.limits) {
                Ok(Framing::Whole(frame)) => {
                    self.part_since = None;
                    if self.buffer.is_empty() {
                        // A large packet's memory goes with the packet.
                        self.buffer = BytesMut::new();
                    }
                    match packet::decode(frame, self.session.version, &self.shared.limits) {
                        Ok(packet) => self.session.packet(now, packet, &mut effects),
                        Err(error) => self.session.bad_packet(&error, &mut effects),
                    }
                }
                Ok(Framing::Part(total)) => {
                    if self.buffer.is_empty() {
                        return;
                    }
                    let total = total.unwrap_or_default();
                    let (since, _) = self.part_since.unwrap_or((now, 0));
                    self.part_since = Some((since, total));
                    if total > Limits::SMALL_PACKET && matches!(self.place, Place::None) {
                        let size = u32::try_from(total.div_ceil(PLACE)).unwrap_or(u32::MAX);
                        let places = self.shared.places.clone();
                        self.place = Place::Waiting(Box::pin(places.acquire_many_owned(size)));
                    }
                    return;
                }
                Err(error) => self.session.bad_packet(&error, &mut effects),
            }
            self.carry_out(effects).await;
        }
    }

    /// Fetches messages for the client until enough wait to be sent; says whether there may be more now.
    async fn fetch(&mut self) -> bool {
        for _ in 0..TURN {
            if !self.session.wants_messages() || self.outbox.weight() >= OUT_ENOUGH {
                return false;
            }
            let mut effects = Vec::new();
            match self.fetch_one(self.now, &mut effects) {
                Ok(Fetched::One) => {}
                Ok(Fetched::List(found)) => Box::pin(self.serve_list(*found, &mut effects)).await,
                Ok(Fetched::News) => Box::pin(self.tell_news(&mut effects)).await,
                Ok(Fetched::Nothing) => return false,
                // That was a long look, and there may be thousands of them.
                Ok(Fetched::SearchedInVain) => return true,
                Err(error) => {
                    tracing::error!(%error, client = self.session.client_id, "cannot read the index");
                    self.session.end(Reason::UnspecifiedError, "cannot read the index", &mut effects);
                }
            }
            self.carry_out(effects).await;
        }
        true
    }

    /// Sends what the socket takes at once, which mostly is all there is: then nothing is due, no alarm is set,
    /// and the turn is the only one for a message. Says whether that made room for more messages.
    async fn flush(&mut self, writer: &mut (impl AsyncWrite + Unpin)) -> bool {
        let was_full = self.outbox.weight() >= OUT_ENOUGH;
        tokio::select! {
            biased;
            result = self.outbox.write(writer, &self.shared.index), if !self.outbox.is_empty() => match result {
                Ok(count) => {
                    self.wrote(count);
                    was_full
                }
                // It fails again below, once what the client has said before is heard.
                Err(_) => false,
            },
            () = std::future::ready(()) => false,
        }
    }

    fn wrote(&mut self, count: usize) {
        self.shared.metrics.bytes_sent.add(count as u64);
        self.progress = self.now.instant;
    }

    /// Fetches the next message, retained or live.
    fn fetch_one(&mut self, now: Now, effects: &mut Vec<Effect>) -> Result<Fetched, IndexError> {
        if let Some(replay) = self.session.next_replay(!self.mailbox.is_empty()) {
            let found = self.look_up(&replay, now.unix_ms)?;
            let in_vain = matches!(found, Step::Later(_));
            let found = match found {
                Step::Found(message) if self.is_list(&message, now) => {
                    return Ok(Fetched::List(Box::new((Source::Replay(replay), message))));
                }
                found => found,
            };
            self.session.replayed(now, replay, found, effects);
            return Ok(if in_vain { Fetched::SearchedInVain } else { Fetched::One });
        }
        if let Some(after) = self.session.next_queued() {
            let found = self.shared.index.queued(self.session.id, after)?;
            let is_outdated = match found.as_ref().and_then(|queued| queued.sent.message.as_ref()) {
                Some(message) => self.is_outdated(message)?,
                None => false,
            };
            let message = found.as_ref().and_then(|queued| queued.sent.message.clone());
            if let (Some(queued), Some(message), false) = (&found, message, is_outdated)
                && self.is_list(&message, now)
            {
                return Ok(Fetched::List(Box::new((Source::Queued(queued.clone()), message))));
            }
            self.session.queued(now, found, is_outdated, effects);
            return Ok(Fetched::One);
        }
        match self.mailbox.pop() {
            Some(Mail::Queued) => self.session.queue_waits(),
            Some(Mail::Delivery(delivery)) if Link::is_news(&delivery) => return Ok(Fetched::News),
            Some(Mail::Delivery(delivery)) => {
                if !self.is_outdated(&delivery.message)? {
                    if self.is_list(&delivery.message, now) {
                        let message = Message::clone(&delivery.message);
                        return Ok(Fetched::List(Box::new((Source::Live(delivery), message))));
                    }
                    self.session.deliver(now, &delivery, effects);
                }
            }
            Some(Mail::Lagging(since)) => {
                self.shared.metrics.lagging.one();
                self.session.lagging(since);
                if self.link.is_some() {
                    return Ok(Fetched::News);
                }
            }
            Some(Mail::Overflow) => {
                let text = "messages came faster than they were taken";
                self.session.end(Reason::QuotaExceeded, text, effects);
            }
            None => return Ok(Fetched::Nothing),
        }
        Ok(Fetched::One)
    }

    /// Tells a device what changed of what it is to have.
    async fn tell_news(&mut self, effects: &mut Vec<Effect>) {
        let Some(link) = &mut self.link else { return };
        match link.look_again(self.shared).await {
            Ok(answers) if self.session.listens_to(ATTRIBUTES) => {
                self.shared.metrics.messages_sent.add(answers.len() as u64);
                answers
                    .into_iter()
                    .for_each(|Answer { topic, content }| self.session.answer(&topic, content, effects));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::error!(%error, client = self.session.client_id, "cannot read the index");
                self.session.end(Reason::UnspecifiedError, "cannot read the index", effects);
            }
        }
    }

    /// Has a device's message answered by the face that it speaks to.
    async fn face(&mut self, publish: Publish) -> Vec<Effect> {
        let mut effects = Vec::new();
        let Some(link) = &mut self.link else { return effects };
        self.shared.metrics.messages_received.one();
        let Taken { answers, result, end } =
            link.take(self.shared, &publish, self.session.largest_answer()).await;
        self.place = Place::None;
        self.now = clock::now(); // it may have waited for the index
        self.unheard(self.now.instant);
        self.session.settled(Settled::Published { packet_id: publish.packet_id, result }, &mut effects);
        for Answer { topic, content } in answers {
            self.shared.metrics.messages_sent.one();
            self.session.answer(&topic, content, &mut effects);
        }
        if let Some(reason) = end {
            self.session.end(Reason::ImplementationSpecificError, reason, &mut effects);
        }
        effects
    }

    /// Whether the client must not get a live message, because it may have got a newer one of the same topic.
    fn is_outdated(&self, message: &Message) -> Result<bool, IndexError> {
        Ok(self.session.may_be_outdated(message) && !self.shared.index.is_current(message)?)
    }

    fn look_up(&self, replay: &Replay, now_ms: u64) -> Result<Step, IndexError> {
        let index = &self.shared.index;
        if replay.filter.contains(['+', '#']) {
            return index.next(&replay.filter, replay.after.as_deref(), replay.since, now_ms);
        }
        let own = self.seat.as_ref().and_then(|seat| seat.file(&replay.filter));
        let found = match own.map_or_else(|| index.get(&replay.filter, now_ms), |own| Ok(Some(own)))? {
            Some(message) => Some(message),
            None => match self.of_its_channels(&replay.filter, now_ms)? {
                Some(message) => Some(message),
                None => index.stand_in(&replay.filter, now_ms)?,
            },
        };
        Ok(match found {
            Some(message) if replay.since == 0 || message.version > replay.since => Step::Found(message),
            _ => Step::End,
        })
    }

    /// What a topic of an earlier layout stands for that has only a file's path: the file in the channel that
    /// the client follows.
    fn of_its_channels(&self, topic: &str, now_ms: u64) -> Result<Option<Message>, IndexError> {
        let path = match Topic::parse(topic) {
            Ok(Topic::Legacy(LegacyId::Path(path) | LegacyId::Src(path))) => path,
            _ => return Ok(None),
        };
        let index = &self.shared.index;
        for channel in self.session.channels() {
            let Some(list) = index.get(channel, now_ms)? else { continue };
            if let Some(digest) = self.shared.mpyblox.digest(index, &list, &path)? {
                let found = index.get(&PackageId::Src(path, digest).topic(), now_ms)?;
                return Ok(found.map(|message| Message { topic: Arc::from(topic), ..message }));
            }
        }
        Ok(None)
    }

    /// Whether a message is a list that is to be looked at first, because of who gets it. Takes note of what
    /// else such a node gets.
    fn is_list(&mut self, message: &Message, now: Now) -> bool {
        let Some(seat) = &mut self.seat else { return false };
        match seat.meaning(&message.topic) {
            Meaning::List => return true,
            Meaning::Package => self.shared.mpyblox.fetch(seat, now.instant),
            Meaning::Order => {
                if let Payload::Inline(list) = &message.payload
                    && self.shared.mpyblox.order(seat, list)
                {
                    self.session.read_channels_again();
                }
            }
            Meaning::Nothing => {}
        }
        false
    }

    /// Sends a list as a node takes it that runs Mpy-BLOX.
    async fn serve_list(&mut self, found: (Source, Message), effects: &mut Vec<Effect>) {
        let now = self.now;
        let (source, message) = found;
        let Some(mut seat) = self.seat.take() else { return };
        let (desk, index) = (self.shared.mpyblox.clone(), self.shared.index.clone());
        let place = self.shared.mpyblox.place().await;
        let work = tokio::task::spawn_blocking(move || {
            let served = desk.serve(&mut seat, message, &index, now);
            (seat, served)
        });
        let done = work.await;
        drop(place);
        self.now = clock::now();
        let (seat, served) = match done {
            Ok((seat, Ok(served))) => (seat, served),
            failed => {
                let error = failed.map(|(_, served)| served.err());
                tracing::error!(?error, client = self.session.client_id, "cannot look at a list");
                return self.session.end(Reason::UnspecifiedError, "cannot read the index", effects);
            }
        };
        let Served { message, errand, state, is_adapted } = served;
        if is_adapted {
            self.shared.metrics.mpyblox_adapted.one();
        }
        match source {
            Source::Replay(replay) => self.session.replayed(now, replay, Step::Found(message), effects),
            Source::Live(delivery) => {
                let delivery = Delivery { message: Arc::new(message), ..delivery };
                self.session.deliver(now, &delivery, effects);
            }
            Source::Queued(mut queued) => {
                queued.sent.message = Some(message);
                self.session.queued(now, Some(queued), false, effects);
            }
        }
        if let Some(errand) = errand {
            self.shared.metrics.mpyblox_errands.one();
            let identifiers = Vec::new();
            let message = Arc::new(errand);
            let delivery = Delivery { message, qos: Qos::AtMostOnce, retain: false, identifiers };
            self.session.deliver(now, &delivery, effects);
        }
        if let Some(state) = state {
            sys::retain(self.shared, &seat.topic(NodeSubject::State), state).await;
        }
        self.seat = Some(seat);
    }

    /// Frees a node that runs Mpy-BLOX and has waited too long for itself.
    fn look_after_seat(&mut self, now: Instant) {
        let Some(seat) = &mut self.seat else { return };
        match seat.due(self.shared.limits.mpyblox_patience) {
            Some(due) if due <= now && self.outbox.is_empty() => {
                self.shared.mpyblox.stick(seat);
                self.session.read_channels_again();
            }
            // It has yet to get the last of it.
            Some(due) if due <= now => seat.still_fetches(now),
            _ => {}
        }
    }

    async fn carry_out(&mut self, effects: Vec<Effect>) {
        let mut effects = VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            match effect {
                // In its place among the others.
                Effect::Face(publish) => {
                    let answers = Box::pin(self.face(publish)).await;
                    answers.into_iter().rev().for_each(|effect| effects.push_front(effect));
                }
                Effect::Answer(head, content) => self.send(|outbox| {
                    outbox.push(head);
                    outbox.push_part(content);
                }),
                Effect::Send(bytes) => self.send(|outbox| outbox.push(bytes)),
                Effect::Deliver(head, payload) => {
                    self.shared.metrics.messages_sent.one();
                    self.send(|outbox| {
                        outbox.push(head);
                        outbox.push_payload(payload);
                    });
                }
                Effect::Introduce(info) => {
                    let (desk, index) = (&self.shared.mpyblox, &self.shared.index);
                    match desk.sit_down(&self.session.client_id, &info, index, self.now) {
                        Ok(seat) => self.seat = seat,
                        Err(error) => tracing::error!(%error, "cannot look up what a node said before"),
                    }
                    self.session.runs_mpyblox(self.seat.is_some());
                }
                Effect::Admit(publish) => self.submit(publish, None).await,
                Effect::Deny(publish, refusal) => self.submit(publish, Some(refusal)).await,
                Effect::Subscribe(filter, options) => {
                    let since = self.shared.tickets.next();
                    let receiver = Receiver { mailbox: self.mailbox.clone(), options, since };
                    self.subscriptions().insert(&filter, self.session.id, receiver);
                }
                Effect::Unsubscribe(filter) => self.subscriptions().remove(&filter, self.session.id),
                Effect::Change(change) => {
                    let op = Op::Change(self.session.id, change, self.mailbox.clone());
                    if self.shared.ops.send(op).await.is_err() {
                        tracing::debug!("the index has stopped");
                    }
                }
                Effect::Close => {
                    self.closing = true;
                    self.progress = self.now.instant;
                }
            }
        }
    }

    /// Has a message of the client judged, or refused in its turn.
    async fn submit(&mut self, publish: Publish, refusal: Option<Refusal>) {
        self.shared.metrics.messages_received.one();
        let reply = Some(Reply { to: self.mailbox.clone(), packet_id: publish.packet_id });
        let place = match std::mem::replace(&mut self.place, Place::None) {
            Place::Taken(place) => Some(place),
            // While a place is waited for, no packet is taken.
            Place::None | Place::Waiting(_) => None,
        };
        // On the heap: an idle connection needs no room for it.
        Box::pin(hand_over(self.shared, self.session.id, publish, refusal, reply, place)).await;
        self.now = clock::now(); // it may have waited for the index
        self.unheard(self.now.instant);
    }

    fn send(&mut self, push: impl FnOnce(&mut Outbox)) {
        if self.outbox.is_empty() {
            self.progress = self.now.instant;
        }
        push(&mut self.outbox);
    }

    fn subscriptions(&self) -> std::sync::RwLockWriteGuard<'_, crate::subscriptions::Subscriptions> {
        self.shared.subscriptions.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next moment at which something is overdue.
    fn deadline(&self) -> Instant {
        /// Without any deadline, look again after this time.
        const IDLE: Duration = Duration::from_secs(3600);
        let stall = (self.closing || !self.outbox.is_empty()).then(|| self.write_deadline());
        let keep_alive = self.session.deadline();
        let part = self.read_deadline();
        let now = self.now.instant;
        let look_again = matches!(self.place, Place::Taken(_)).then_some(now + LOOK_AGAIN);
        let seat = self.seat.as_ref().and_then(|seat| seat.due(self.shared.limits.mpyblox_patience));
        [stall, keep_alive, part, look_again, seat].into_iter().flatten().min().unwrap_or(now + IDLE)
    }

    /// Whether there is nothing left to do for the client: who sees its connection closed also finds what it
    /// published.
    fn is_done(&self) -> bool {
        let settled = self.session.is_settled() || self.write_deadline() <= self.now.instant;
        self.closing && self.outbox.is_empty() && settled
    }

    fn write_deadline(&self) -> Instant {
        self.progress + if self.closing { FAREWELL } else { self.shared.limits.write_stall }
    }

    fn read_deadline(&self) -> Option<Instant> {
        let (since, total) = self.part_since?;
        let limits = &self.shared.limits;
        let is_contended = matches!(self.place, Place::Taken(_))
            && self.shared.places.available_permits() < limits.packet.div_ceil(PLACE);
        let seconds = |bytes: usize, rate: u64| Duration::from_secs(bytes as u64 / rate.max(1));
        Some(match is_contended {
            true => {
                since + limits.contended_stall + seconds(self.buffer.len(), limits.slowest_contended_upload)
            }
            false => since + limits.read_stall + seconds(total, limits.slowest_upload),
        })
    }

    fn check_stalls(&mut self, now: Instant, effects: &mut Vec<Effect>) -> std::io::Result<()> {
        if !self.outbox.is_empty() && self.write_deadline() <= now {
            self.shared.metrics.stuck.one();
            tracing::info!(client = self.session.client_id, "closing: it takes no bytes");
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        if self.read_deadline().is_some_and(|deadline| deadline <= now) {
            self.session.end(Reason::ProtocolError, "a packet never ended", effects);
        }
        Ok(())
    }

    /// Leaves behind what outlives the connection, and publishes the will.
    async fn leave(&mut self) {
        if let Some(reason) = self.session.ended() {
            self.shared.metrics.ended.one(reason);
        }
        if let Some(link) = self.link.take() {
            Box::pin(link.end(self.shared)).await;
        }
        let Leaving { will, end } = self.session.leave();
        if let Some(will) = will {
            Box::pin(hand_over(self.shared, self.session.id, will, None, None, None)).await;
        }
        if let Some(end) = end {
            let change = Change::End(Box::new(end));
            self.shared.ops.send(Op::Change(self.session.id, change, self.mailbox.clone())).await.ok();
        }
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        if self.session.id.is_kept() {
            return;
        }
        let mut subscriptions = self.subscriptions();
        for filter in self.session.filters() {
            subscriptions.remove(filter, self.session.id);
        }
    }
}

/// Has the door check a message that is not refused already, and hands it to the index's writer.
async fn hand_over(
    shared: &Shared,
    origin: SessionId,
    publish: Publish,
    refusal: Option<Refusal>,
    reply: Option<Reply>,
    place: Option<OwnedSemaphorePermit>,
) {
    let topic = publish.topic.as_str().into();
    let admitted = match refusal {
        Some(refusal) => Err(refusal),
        None if !is_heavy(&publish) => admit(publish, &shared.limits),
        None => {
            let limits = shared.limits.clone();
            let work = tokio::task::spawn_blocking(move || admit(publish, &limits));
            work.await.unwrap_or_else(|error| {
                tracing::error!(%error, "checking a message failed");
                Err(Refusal::new(Reason::UnspecifiedError, "the message could not be checked"))
            })
        }
    };
    if shared
        .ops
        .send(Op::Publish(Box::new(Submission { admitted, topic, origin, reply, place, expected: None })))
        .await
        .is_err()
    {
        tracing::debug!("the index has stopped");
    }
}

impl Place {
    fn is_waiting(&self) -> bool {
        matches!(self, Place::Waiting(_))
    }

    /// The place that is waited for. Ask only while waiting.
    async fn taken(&mut self) -> Result<OwnedSemaphorePermit, AcquireError> {
        match self {
            Place::Waiting(place) => place.await,
            _ => std::future::pending().await,
        }
    }
}
