//! The one thread that changes the index: takes what waits, judges each message, commits all of it at once,
//! then announces and acknowledges in the same order.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLockReadGuard, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use mpypi_protocol::{
    ChannelName, Chunks, Digest, Entry, FilePath, PackageId, Root, Topic, UpdateList,
    chunk::CHUNKS,
    list::Piece,
    root::SignedRoot,
    topic::{CHANNELS, NODES},
};
use redb::{Durability, ReadableTable, ReadableTableMetadata, Table, WriteTransaction};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    INLINE, Index, IndexError,
    collect::{COLLECTED, Notes},
    record::{BYTES, Body, EXPIRIES, GONE, LEGACY, META, RECORDS, REFS, Record, VERSION, below},
    sessions::{self, Change, Kept, Opening, Sessions},
};
use crate::{
    bus::SharedSubscriptions,
    clock::{self, Now},
    door::{Admitted, Kind, Present, admit, may_be_believed, may_follow, may_replace},
    edge::Owned,
    limits::Limits,
    mailbox::Mailbox,
    message::{Message, Payload, Refusal, SessionId},
    metrics::{self, Metrics},
    packet::{Properties, Publish, Qos, Reason},
    pulse::{BROKER, MIRROR},
    subscriptions::{Found, Subscriptions},
};

/// Messages that wait for the writer before their senders do.
pub const QUEUE: usize = 1024;

/// Most messages in one commit.
const BATCH_MESSAGES: usize = 512;
/// Most payload bytes in one commit.
const BATCH_BYTES: usize = 32 * 1024 * 1024;
/// Most clears that wait for an upstream to be told; with more, the oldest are not.
const GONE_MOST: u64 = 100_000;
/// Bytes of packages that one commit makes whole of their chunks; what a list has beyond that follows, so many at a time.
const JOIN_BYTES: u64 = if cfg!(test) { 64 * 1024 } else { 32 * 1024 * 1024 };
/// How long a blob that no record names stays for readers in the middle of it.
const BLOB_GRACE: Duration = Duration::from_secs(60);
/// How long nothing is written after a failure for want of space; longer if opening the database takes long.
const FULL_PAUSE: Duration = Duration::from_secs(1);
/// How often expired messages and forgotten blobs are looked for.
const SWEEP: Duration = Duration::from_secs(15);
/// How long nothing is written before the database is left as one that needs no repair if the process dies: then it
/// opens at once, and otherwise only when all of it has been read.
const REST: Duration = Duration::from_secs(2);
/// Most expired messages removed at once; the rest waits for the next time.
const SWEEP_MESSAGES: usize = 10_000;

/// Something for the writer to do.
#[derive(Debug)]
pub enum Op {
    /// Judges a message, keeps it and announces it.
    Publish(Box<Submission>),
    /// Opens a session; answers none if it ends with its connection.
    Open(Box<Opening>, oneshot::Sender<Result<Option<Kept>, Refusal>>),
    /// Changes a kept session, and says so there if the change is one that is answered.
    Change(SessionId, Change, Arc<Mailbox>),
    /// Forgets packages.
    Collect(Collect),
    /// Makes packages whole of their chunks.
    Join(Vec<(PackageId, Chunks)>),
}

/// A message for the writer.
#[derive(Debug)]
pub struct Submission {
    /// The message, or why the door refused it: refusals wait in line, since answers keep the order of
    /// what they answer [MQTT-4.6.0-2].
    pub admitted: Result<Admitted, Refusal>,
    /// The message's topic, for the log.
    pub topic: Arc<str>,
    /// Who sent it.
    pub origin: SessionId,
    /// Whom to tell what became of it.
    pub reply: Option<Reply>,
    /// The message's place among large packets, given back when it is settled.
    pub place: Option<OwnedSemaphorePermit>,
    /// The version that the topic must have, 0 for none; `None` for a message that does not care.
    pub expected: Option<u64>,
}

/// Packages to forget, unless they were seen or named again.
#[derive(Debug)]
pub struct Collect {
    /// Their topics.
    pub topics: Vec<String>,
    /// What was seen at or after this time stays, in milliseconds since 1970.
    pub since_ms: u64,
    /// Takes what was removed, once that is durable; dropped if nothing was.
    pub reply: oneshot::Sender<Collected>,
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Packages.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Whom to tell what became of a message.
#[derive(Debug)]
pub struct Reply {
    /// Takes the answer.
    pub to: Arc<Mailbox>,
    /// Which message is meant.
    pub packet_id: u16,
}

/// What became of something that a session asked for.
#[derive(Debug)]
pub enum Settled {
    /// A message is durable and announced, or refused without a trace.
    Published {
        /// Which message is meant; 0 for one at QoS 0.
        packet_id: u16,
        /// What became of it.
        result: Result<(), Refusal>,
    },
    /// The session has changed, durably.
    Changed(Change),
}

/// Takes messages that were let in to those who listen, and to those it was the turn of among those who share
/// a subscription.
pub type Announce = Box<dyn FnMut(Arc<Message>, Vec<Found>) + Send>;

/// The version up to which an upstream has been told what was cleared of nodes.
pub type Told = Box<dyn Fn() -> u64 + Send>;

/// The index's writer.
pub struct Writer {
    index: Index,
    limits: Arc<Limits>,
    announce: Announce,
    subscriptions: SharedSubscriptions,
    sessions: Sessions,
    channels: HashMap<ChannelName, ChannelState>,
    /// The newest root retained.
    root: Option<Root>,
    version: u64,
    /// Blobs that lost their last record, and when they go.
    forgotten: HashMap<Digest, Instant>,
    metrics: Arc<Metrics>,
    /// Blobs written for the commit under way.
    written: Vec<Digest>,
    /// Packages made whole by the commit under way, to be announced before the lists that name them.
    joined: Vec<(Arc<Message>, Vec<Found>)>,
    /// Whether more packages are to be made whole than one commit takes.
    is_joining: bool,
    /// Whether the commit under way refuses messages because the disk is nearly full.
    refused_for_space: bool,
    /// Ends of connections that could not be noted.
    postponed: Vec<(SessionId, Change)>,
    /// Set after a failure for want of space.
    pause: Option<Pause>,
    /// What only an upstream broker may change.
    owned: Option<Arc<Owned>>,
    /// How far an upstream is that is to hear of nodes that are cleared.
    told: Option<Told>,
    /// When the database was last written, if it has not been left at rest since.
    unrested: Option<Instant>,
}

/// For how long the database is left alone.
#[derive(Debug, Clone, Copy)]
struct Pause {
    until: Instant,
    /// Whether it could be opened again, and be read.
    is_open: bool,
}

/// What the writer must know of a channel to judge its next list.
#[derive(Debug)]
struct ChannelState {
    epoch: u64,
    sequence: Option<u64>,
    digest: Digest,
    packages: HashSet<PackageId>,
    /// How packages are cut, by their digests.
    chunks: HashMap<Digest, Chunks>,
}

impl ChannelState {
    fn of(list: &UpdateList, digest: Digest) -> ChannelState {
        ChannelState {
            epoch: list.release().map_or(0, |release| release.epoch),
            sequence: list.release().map(|release| release.sequence),
            digest,
            packages: list.packages().map(|(id, _)| id).collect(),
            chunks: list.cut().map(|(id, chunks)| (*id.digest(), chunks.clone())).collect(),
        }
    }

    /// The packages that the list cuts.
    fn cut(&self) -> impl Iterator<Item = (&PackageId, &Chunks)> {
        self.packages.iter().filter_map(|id| Some((id, self.chunks.get(id.digest())?)))
    }

    /// Where everything is retained that the list names.
    fn topics(&self) -> impl Iterator<Item = String> {
        let whole = self.packages.iter().map(PackageId::topic);
        let pieces = self.chunks.iter().flat_map(|(package, chunks)| chunks.pieces(package));
        whole.chain(pieces.map(|piece| piece.topic))
    }
}

impl Writer {
    /// A writer for `index`, which must have no other. Puts the subscriptions of kept sessions into
    /// `subscriptions`.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn new(
        index: Index,
        limits: Arc<Limits>,
        subscriptions: SharedSubscriptions,
        announce: Announce,
    ) -> Result<Writer, IndexError> {
        let sessions = Sessions::new(subscriptions.clone(), index.blobs.clone(), limits.clone());
        let mut writer = Writer {
            index,
            limits,
            announce,
            subscriptions,
            sessions,
            channels: HashMap::new(),
            root: None,
            version: 0,
            forgotten: HashMap::new(),
            metrics: Arc::default(),
            written: Vec::new(),
            joined: Vec::new(),
            is_joining: false,
            refused_for_space: false,
            postponed: Vec::new(),
            pause: None,
            owned: None,
            told: None,
            unrested: None,
        };
        writer.load(clock::now())?;
        Ok(writer)
    }

    /// Counts in `metrics` what it does.
    #[must_use]
    pub fn counting(self, metrics: Arc<Metrics>) -> Writer {
        let writer = Writer { metrics, ..self };
        writer.count_sessions();
        writer
    }

    /// Leaves to an upstream broker what it owns.
    #[must_use]
    pub fn leaving(self, owned: Option<Arc<Owned>>) -> Writer {
        Writer { owned, ..self }
    }

    /// Notes which topics of nodes are cleared, with the clear itself, until an upstream has been told.
    #[must_use]
    pub fn noting(self, told: Option<Told>) -> Writer {
        Writer { told, ..self }
    }

    fn count_sessions(&self) {
        let (all, away) = self.sessions.count();
        self.metrics.sessions.store(all as u64, Ordering::Relaxed);
        self.metrics.sessions_away.store(away as u64, Ordering::Relaxed);
    }

    fn load(&mut self, now: Now) -> Result<(), IndexError> {
        match self.load_sessions(now) {
            // Nobody could read any more otherwise.
            Err(error) if error.is_full() => self.index.store.renew()?,
            done => done?,
        }
        let transaction = self.index.store.begin_read()?;
        let meta = transaction.open_table(META)?;
        self.version = meta.get(VERSION)?.map_or(0, |version| version.value());
        self.channels.clear();
        let records = transaction.open_table(RECORDS)?;
        for item in below(&records, CHANNELS)? {
            let (key, value) = item?;
            let Ok(Topic::Channel(channel)) = Topic::parse(key.value()) else { continue };
            let payload = self.index.bytes(&Record::read(key.value(), value.value())?.body)?;
            match UpdateList::parse(&payload) {
                Ok(list) => {
                    self.channels.insert(channel, ChannelState::of(&list, Digest::of(&payload)));
                }
                Err(error) => tracing::error!(%channel, %error, "the channel's retained list is damaged"),
            }
        }
        self.root = None;
        loop {
            let next = self.root.as_ref().map_or(1, |root| root.version().saturating_add(1));
            let topic = mpypi_protocol::root::topic(next);
            let Some(value) = records.get(topic.as_str())? else { return Ok(()) };
            let payload = self.index.bytes(&Record::read(&topic, value.value())?.body)?;
            let follows =
                SignedRoot::parse(&payload).ok().and_then(|root| may_follow(self.root.as_ref(), &root).ok());
            let Some(root) = follows else {
                tracing::error!(topic, "a retained root does not follow from the one before it");
                return Ok(());
            };
            self.root = Some(root);
        }
    }

    fn load_sessions(&mut self, now: Now) -> Result<(), IndexError> {
        let transaction = self.begin_write(now)?;
        self.sessions.load(&mut sessions::Tables::open(&transaction)?, now.unix_ms)?;
        transaction.commit()?;
        Ok(())
    }

    /// Works until all senders are gone. Call it on a thread of its own, inside a tokio runtime's context.
    ///
    /// # Errors
    /// The database fails; nothing after the last acknowledged message is in it.
    pub fn run(mut self, mut ops: mpsc::Receiver<Op>) -> Result<(), IndexError> {
        let runtime = tokio::runtime::Handle::current();
        let mut swept = clock::now().instant;
        loop {
            let patience = self.patience(clock::now());
            let first = runtime.block_on(async { tokio::time::timeout(patience, ops.recv()).await });
            let now = clock::now();
            match first {
                Ok(None) => return Ok(()),
                Ok(Some(first)) => {
                    let mut bytes = first.size();
                    let mut batch = vec![first];
                    while batch.len() < BATCH_MESSAGES && bytes < BATCH_BYTES {
                        let Ok(op) = ops.try_recv() else { break };
                        bytes += op.size();
                        batch.push(op);
                    }
                    let done = self.settle(batch, now);
                    self.recover(done)?;
                }
                Err(_) => {}
            }
            let done = self.look_after(&mut swept, now);
            self.recover(done)?;
        }
    }

    fn begin_write(&mut self, now: Now) -> Result<WriteTransaction, IndexError> {
        self.unrested = Some(now.instant);
        self.index.store.begin_write()
    }

    /// When the database is to be left at rest; not before it can be written for sure.
    fn rest_due(&self) -> Option<Instant> {
        self.unrested.filter(|_| self.pause.is_none()).map(|since| since + REST)
    }

    /// Does what is due by itself.
    fn look_after(&mut self, swept: &mut Instant, now: Now) -> Result<(), IndexError> {
        if !self.is_writable(now)? {
            return Ok(());
        }
        if self.rest_due().is_some_and(|due| due <= now.instant) {
            self.index.store.rest()?;
            self.unrested = None;
        }
        let is_swept = now.instant.duration_since(*swept) < SWEEP;
        if !is_swept || self.patience(now).is_zero() {
            self.expire_sessions(now)?;
        }
        if !is_swept {
            *swept = now.instant;
            self.count_sessions();
            self.sweep(now)?;
        }
        // What a list cuts that is not whole: at once after it came, and now and then, for what a full disk or a crash prevented.
        if !is_swept || self.is_joining {
            let cut = self.to_join(now)?;
            self.is_joining = false;
            if let Some((first, _)) = cut.first() {
                let first = first.topic();
                self.settle(vec![Op::Join(cut)], now)?;
                // Where there is no room, the next sweep is soon enough.
                self.is_joining = self.index.get(&first, now.unix_ms)?.is_some();
            }
        }
        let wills = self.sessions.take_wills();
        if !wills.is_empty() {
            let wills = wills.into_iter().map(|will| Op::publish(will, &self.limits));
            self.settle(wills.collect(), now)?;
        }
        Ok(())
    }

    /// Goes on after a failure for want of space: opens the database again, and leaves it alone for a while.
    fn recover(&mut self, done: Result<(), IndexError>) -> Result<(), IndexError> {
        match done {
            Err(error) if error.is_full() || error.is_stale() => {
                tracing::error!(?error, "the index's disk is full: nothing more is kept for now");
                self.metrics.commits_failed.one();
                self.metrics.is_full.store(true, Ordering::Relaxed);
                let now = clock::now().instant;
                for digest in std::mem::take(&mut self.written) {
                    self.forgotten.entry(digest).or_insert(now);
                }
                self.renew()
            }
            done => done,
        }
    }

    /// Opens the database again. If that fails for want of space too, it is tried again later.
    fn renew(&mut self) -> Result<(), IndexError> {
        let before = clock::now();
        // What is in memory may be ahead of the disk: clients with a session come back to what is kept of it.
        self.sessions.reset();
        let renewed = self.index.store.renew().and_then(|()| self.load(before));
        let now = clock::now().instant;
        let until = now + FULL_PAUSE.max(4 * now.duration_since(before.instant));
        match renewed {
            Ok(()) => self.pause = Some(Pause { until, is_open: true }),
            Err(error) if error.is_full() || error.is_stale() => {
                self.pause = Some(Pause { until, is_open: false });
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Whether the database can be written, as far as is known.
    fn is_writable(&mut self, now: Now) -> Result<bool, IndexError> {
        match self.pause {
            Some(pause) if now.instant < pause.until => Ok(false),
            Some(pause) if !pause.is_open => {
                self.renew()?;
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// How long to wait for something to do.
    fn patience(&self, now: Now) -> Duration {
        let will =
            self.sessions.next_will().map(|due| Duration::from_millis(due.saturating_sub(now.unix_ms)));
        let rest = self.rest_due().map(|due| due.saturating_duration_since(now.instant));
        let pause = self.pause.map(|pause| pause.until.saturating_duration_since(now.instant));
        let join = self.is_joining.then_some(Duration::ZERO);
        // Nothing is due while nothing can be written.
        [will, rest, join].into_iter().flatten().fold(SWEEP, Duration::min).max(pause.unwrap_or_default())
    }

    fn expire_sessions(&mut self, now: Now) -> Result<(), IndexError> {
        if !self.sessions.is_due(now.unix_ms) {
            return Ok(());
        }
        let transaction = self.begin_write(now)?;
        {
            let mut tables = Tables::open(&transaction)?;
            self.sessions.expire(tables.sessions()?, now.unix_ms)?;
            self.settle_bodies(&mut tables, now)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Judges and commits `batch`, then answers and announces.
    fn settle(&mut self, mut batch: Vec<Op>, now: Now) -> Result<(), IndexError> {
        for op in &mut batch {
            if let (Some(owned), Op::Publish(submission)) = (&self.owned, op)
                && submission.origin != MIRROR
                && submission.admitted.is_ok()
                && let Some(refusal) = owned.refusal(&submission.topic)
            {
                submission.admitted = Err(refusal);
            }
        }
        let without_disk = !batch.iter().any(|op| self.stores(op)) || !self.is_writable(now)?;
        let (outcomes, failure) = match without_disk {
            true => (batch.iter().map(|op| self.pass_on(op)).collect(), None),
            false => match self.commit(&batch, now) {
                Ok(outcomes) => {
                    self.pause = None;
                    (outcomes, None)
                }
                Err(error) => (batch.iter().map(|op| self.pass_on(op)).collect(), Some(error)),
            },
        };
        let is_full = failure.as_ref().is_none_or(|error| error.is_full() || error.is_stale());
        let failed = || match is_full {
            true => Refusal::new(Reason::QuotaExceeded, "the broker's disk is full: try again later"),
            false => Refusal::new(Reason::UnspecifiedError, "the index failed, nothing was kept"),
        };
        for (op, outcome) in batch.into_iter().zip(outcomes) {
            match (op, outcome) {
                (Op::Publish(submission), Outcome::Published(version, chosen)) => {
                    self.answer(*submission, version, chosen, now);
                }
                (Op::Publish(submission), _) => self.answer(*submission, Err(failed()), Vec::new(), now),
                (Op::Open(_, reply), Outcome::Opened(result)) => drop(reply.send(result)),
                (Op::Open(_, reply), _) => drop(reply.send(Err(failed()))),
                (Op::Change(_, change, mailbox), Outcome::Changed) if change.is_answered() => {
                    mailbox.settled(Settled::Changed(change));
                }
                (Op::Change(..), Outcome::Changed) => {}
                (Op::Change(id, change @ Change::End(_), _), _) => self.postponed.push((id, change)),
                // Nobody may wait for an answer that does not come.
                (Op::Change(_, change, mailbox), _) if change.is_answered() => mailbox.overflow(),
                (Op::Change(..), _) => {}
                (Op::Collect(collect), Outcome::Collected(collected)) => {
                    collect.reply.send(collected).ok(); // who asked may have gone
                }
                (Op::Collect(_) | Op::Join(_), _) => {}
            }
        }
        self.announce_joined(u64::MAX);
        failure.map_or(Ok(()), Err)
    }

    /// Announces a message that was kept, and tells its sender what became of it.
    fn answer(&mut self, op: Submission, version: Result<u64, Refusal>, chosen: Vec<Found>, now: Now) {
        let Submission { admitted, topic, origin, reply, place, .. } = op;
        let result = admitted.and_then(|admitted| {
            let version = version?;
            self.announce_joined(version);
            let message = message(admitted, topic.clone(), origin, version, now);
            (self.announce)(Arc::new(message), chosen);
            Ok(())
        });
        match &result {
            Err(refusal) => {
                self.metrics.publishes_refused.one(refusal.reason);
                // Quoted: nothing is known yet of what a refused topic holds.
                tracing::info!(topic = shown(&topic), "refused: {refusal}");
            }
            Ok(()) if origin == BROKER => {}
            Ok(()) => self.metrics.publishes.one(),
        }
        drop(place);
        if let Some(Reply { to, packet_id }) = reply {
            to.settled(Settled::Published { packet_id, result });
        }
    }

    /// Announces the packages that were made whole before this version of the index.
    fn announce_joined(&mut self, version: u64) {
        for (message, chosen) in self.joined.extract_if(.., |(message, _)| message.version < version) {
            (self.announce)(message, chosen);
        }
    }

    /// Whether the disk has to know of it.
    fn stores(&self, op: &Op) -> bool {
        let Op::Publish(submission) = op else { return true };
        submission.admitted.as_ref().is_ok_and(|admitted| {
            let Submission { topic, origin, .. } = &**submission;
            let qos = admitted.publish.qos;
            !matches!(admitted.kind, Kind::Live)
                || (origin.is_kept() && qos == Qos::ExactlyOnce)
                || self.subscriptions().may_queue(topic, *origin, qos)
        })
    }

    /// What becomes of something while the disk is out of it: only what it need not know of goes on.
    fn pass_on(&self, op: &Op) -> Outcome {
        match op {
            Op::Publish(submission) if !self.stores(op) => {
                Outcome::Published(Ok(0), self.subscriptions().chosen(&submission.topic))
            }
            _ => Outcome::Failed,
        }
    }

    /// What becomes of each. An error means that nothing was kept.
    fn commit(&mut self, batch: &[Op], now: Now) -> Result<Vec<Outcome>, IndexError> {
        let start = clock::now().instant;
        let mut transaction = self.begin_write(now)?;
        if self.postponed.is_empty()
            && batch.iter().all(|op| matches!(op, Op::Change(_, change, _) if change.may_be_lost()))
        {
            transaction.set_durability(Durability::None)?;
        }
        self.written.clear();
        self.joined.clear();
        self.refused_for_space = false;
        let mut free = metrics::disk(self.index.folder()).map_or(u64::MAX, |(free, _)| free);
        let outcomes = {
            let mut tables = Tables::open(&transaction)?;
            let mut outcomes = Vec::with_capacity(batch.len());
            for (id, change) in &self.postponed {
                self.sessions.change(tables.sessions()?, *id, change, now.unix_ms)?;
            }
            for op in batch {
                let outcome = match op {
                    Op::Publish(submission) => self.publish(&mut tables, submission, now, &mut free)?,
                    Op::Open(opening, _) => {
                        let opening = Opening::clone(opening);
                        Outcome::Opened(self.sessions.open(tables.sessions()?, opening, now.unix_ms)?)
                    }
                    Op::Change(id, change, _) => {
                        self.sessions.change(tables.sessions()?, *id, change, now.unix_ms)?;
                        Outcome::Changed
                    }
                    Op::Collect(collect) => Outcome::Collected(self.collect(&mut tables, collect, now)?),
                    Op::Join(cut) => {
                        for (id, chunks) in cut {
                            let joined = self.join(&mut tables, [(id.clone(), chunks)], now, &mut free)?;
                            if let Err(refusal) = joined {
                                tracing::warn!(package = %id, "cannot make a package whole: {refusal}");
                            }
                        }
                        Outcome::Changed
                    }
                };
                outcomes.push(outcome);
            }
            self.settle_bodies(&mut tables, now)?;
            tables.meta.insert(VERSION, self.version)?;
            tables.count_bytes()?;
            outcomes
        };
        if !self.written.is_empty() {
            self.index
                .blobs
                .sync()
                .map_err(|source| IndexError::Folder { path: "blobs".to_owned(), source })?;
        }
        transaction.commit()?;
        self.postponed.clear();
        self.metrics.is_full.store(self.refused_for_space, Ordering::Relaxed);
        #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
        self.metrics.commit_messages.observe(batch.len() as f64);
        self.metrics.commit_seconds.observe(clock::now().instant.duration_since(start).as_secs_f64());
        Ok(outcomes)
    }

    /// Keeps a message and puts it into the queues of those who are to get it.
    fn publish(
        &mut self,
        tables: &mut Tables<'_>,
        op: &Submission,
        now: Now,
        free: &mut u64,
    ) -> Result<Outcome, IndexError> {
        let Ok(admitted) = &op.admitted else { return Ok(Outcome::Published(Ok(0), Vec::new())) };
        let refused = |refusal| Ok(Outcome::Published(Err(refusal), Vec::new()));
        if let Some(expected) = op.expected
            && tables.read(&op.topic)?.map_or(0, |present| present.version) != expected
        {
            let text = "somebody else published there in the meantime";
            return refused(Refusal::new(Reason::ImplementationSpecificError, text));
        }
        let is_live = matches!(admitted.kind, Kind::Live);
        if is_live && *free < self.limits.disk_reserve / 2 {
            let queued = self.subscriptions().queued(&op.topic, Some(op.origin), admitted.publish.qos);
            if !queued.is_empty() {
                return refused(self.no_room(*free));
            }
        }
        let version = match self.apply(tables, op, admitted, now, free)? {
            Ok(version) => version,
            Err(refusal) => return refused(refusal),
        };
        let Admitted { publish, digest, kind } = admitted;
        if op.origin.is_kept()
            && publish.qos == Qos::ExactlyOnce
            && let Some(reply) = &op.reply
        {
            self.sessions.remember(tables.sessions()?, op.origin, reply.packet_id)?;
        }
        let (mut queued, chosen): (Vec<_>, Vec<_>) = {
            let chosen = self.subscriptions().chosen(&publish.topic);
            chosen.into_iter().partition(|found| found.is_queued(publish.qos))
        };
        queued.extend(self.subscriptions().queued(&publish.topic, Some(op.origin), publish.qos));
        if !queued.is_empty() {
            let retain = !matches!(kind, Kind::Live);
            let record = Record {
                version,
                qos: publish.qos as u8,
                body: body(publish, digest.as_ref().filter(|_| retain)),
                properties: publish.properties.clone(),
                expires_ms: expiry(publish.properties.expiry, now),
            };
            self.sessions.enqueue(tables.sessions()?, &queued, publish, retain, &record)?;
        }
        Ok(Outcome::Published(Ok(version), chosen))
    }

    /// Counts what the queues of sessions gained and lost among the blobs.
    fn settle_bodies(&mut self, tables: &mut Tables<'_>, now: Now) -> Result<(), IndexError> {
        let (gained, freed) = self.sessions.take_bodies();
        for body in gained {
            if let Body::Blob { digest, .. } = body {
                tables.count(&digest, 1)?;
            }
        }
        for body in freed {
            self.release(tables, &body, now)?;
        }
        Ok(())
    }

    fn subscriptions(&self) -> RwLockReadGuard<'_, Subscriptions> {
        self.subscriptions.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The message's version, or why it is refused.
    fn apply(
        &mut self,
        tables: &mut Tables<'_>,
        op: &Submission,
        admitted: &Admitted,
        now: Now,
        free: &mut u64,
    ) -> Result<Result<u64, Refusal>, IndexError> {
        let Admitted { publish, kind, digest } = admitted;
        let mut followed = None;
        match kind {
            Kind::Live => return Ok(Ok(0)),
            Kind::List(channel, list) => {
                let present = self.channels.get(channel);
                let digest = digest.unwrap_or(Digest::EMPTY);
                let known = present.is_some_and(|present| present.digest == digest);
                let believed = may_be_believed(self.root.as_ref(), channel, &publish.payload, now.unix_ms);
                if let (false, Err(refusal)) = (known, believed) {
                    return Ok(Err(refusal));
                }
                // A mirror has what its upstream has, also if that was published twice under one number.
                let number = list.release().map(|release| (release.epoch, release.sequence));
                let is_same = |present: &&ChannelState| {
                    present.sequence.map(|sequence| (present.epoch, sequence)) == number
                };
                let present = present.filter(|present| op.origin != MIRROR || !is_same(present));
                let mut failure = None;
                let verdict = may_replace(
                    list,
                    &digest,
                    present.map(|present| Present {
                        epoch: present.epoch,
                        sequence: present.sequence,
                        digest: &present.digest,
                    }),
                    |piece| match tables.has(piece, now) {
                        Ok(has) => Ok(has),
                        Err(error) => {
                            failure = Some(error);
                            Err(Refusal::new(Reason::UnspecifiedError, "the index failed"))
                        }
                    },
                );
                if let Some(error) = failure {
                    return Err(error);
                }
                if let Err(refusal) = verdict {
                    return Ok(Err(refusal));
                }
                if let Err(refusal) = self.join(tables, list.cut(), now, free)? {
                    return Ok(Err(refusal));
                }
            }
            Kind::ForgetPackage(id) => {
                if self.is_named(id) {
                    let text = "a channel names this package: publish a list without it first";
                    return Ok(Err(Refusal::new(Reason::PayloadFormatInvalid, text)));
                }
            }
            Kind::ForgetChunk(package, number) => {
                if self.named_chunk(package, *number).is_some() {
                    let text = "a channel names this chunk: publish a list without its package first";
                    return Ok(Err(Refusal::new(Reason::PayloadFormatInvalid, text)));
                }
            }
            Kind::Chunk(package, number) => {
                let named = self.named_chunk(package, *number);
                if named.is_some_and(|named| Some(named) != *digest) {
                    let text = "a channel names other bytes for this chunk: publish a list without its package first";
                    return Ok(Err(Refusal::new(Reason::PayloadFormatInvalid, text)));
                }
            }
            Kind::History(channel, sequence) if !publish.payload.is_empty() => {
                let is_present = |state: &&ChannelState| state.sequence == Some(*sequence);
                let present = self.channels.get(channel).filter(is_present).map(|state| Some(state.digest));
                let kept = tables.read(&publish.topic)?;
                let body = body(publish, digest.as_ref());
                if present.is_some_and(|present| present != *digest)
                    || kept.is_some_and(|kept| kept.body != body)
                {
                    let text = "the past does not change: release {sequence} was another list";
                    let text = text.replace("{sequence}", &sequence.to_string());
                    return Ok(Err(Refusal::new(Reason::PayloadFormatInvalid, text)));
                }
            }
            Kind::Root(root) => {
                let kept = tables.read(&publish.topic)?;
                if kept.is_none_or(|kept| kept.body != body(publish, digest.as_ref())) {
                    match may_follow(self.root.as_ref(), root) {
                        Ok(root) => followed = Some(root),
                        Err(refusal) => return Ok(Err(refusal)),
                    }
                }
            }
            Kind::History(..) | Kind::Package(_) | Kind::Retained => {}
        }
        if publish.payload.is_empty() {
            if let Some(old) = tables.remove(&publish.topic)? {
                self.release(tables, &old.body, now)?;
                self.version += 1;
                if let Some(told) = &self.told
                    && op.origin != MIRROR
                    && publish.topic.starts_with(NODES)
                {
                    tables.note_gone(self.version, &publish.topic, told())?;
                }
            }
            return Ok(Ok(self.version));
        }
        let old = tables.read(&publish.topic)?;
        let mut properties = publish.properties.clone();
        // Mpy-BLOX's tools publish packages with an expiry; but a package that a list names has to stay.
        let is_named = match kind {
            Kind::Package(id) => self.is_named(id),
            Kind::Chunk(package, number) => self.named_chunk(package, *number).is_some(),
            _ => false,
        };
        if is_named {
            properties.expiry = None;
        }
        let expires_ms = expiry(properties.expiry, now);
        let body = body(publish, digest.as_ref());
        if old.is_none() && tables.records.len()? >= self.limits.retained {
            let text = format!("the index holds {} messages already", self.limits.retained);
            return Ok(Err(Refusal::new(Reason::QuotaExceeded, text)));
        }
        // What replaces a small message takes hardly any room, and devices go on telling their state.
        let reserve = match (&old, &body) {
            (Some(_), Body::Inline(_)) => self.limits.disk_reserve / 2,
            _ => self.limits.disk_reserve,
        };
        let size = publish.payload.len() as u64;
        if free.saturating_sub(reserve) < size {
            return Ok(Err(self.no_room(*free)));
        }
        *free -= size;
        if let Body::Blob { digest, .. } = &body {
            self.written.push(Digest::from(*digest));
            if let Err(error) = self.index.blobs.write(&Digest::from(*digest), &publish.payload) {
                tracing::error!(%error, topic = publish.topic, "cannot keep a payload");
                let text = format!("the broker's disk does not take the message: {error}");
                return Ok(Err(Refusal::new(Reason::QuotaExceeded, text)));
            }
        }
        if let Some(old) = &old
            && old.body == body
            && old.qos == publish.qos as u8
            && old.properties == properties
            && old.expires_ms.is_none()
            && expires_ms.is_none()
        {
            tables.notes.saw(&publish.topic, now.unix_ms)?;
            return Ok(Ok(old.version));
        }
        if let Body::Blob { digest, .. } = &body {
            tables.count(digest, 1)?;
        }
        if let Some(old) = old {
            self.release(tables, &old.body, now)?;
        }
        self.version += 1;
        let record = Record { version: self.version, qos: publish.qos as u8, body, properties, expires_ms };
        tables.insert(&publish.topic, &record)?;
        tables.notes.saw(&publish.topic, now.unix_ms)?;
        if let Some(root) = followed {
            tracing::info!(version = root.version(), "a root of trust is in force");
            self.root = Some(root);
        }
        if let (Kind::List(channel, list), Some(digest)) = (kind, digest) {
            for entry in list.entries() {
                if let Entry::Src(src) = entry {
                    tables.name(&src.path, &src.digest)?;
                }
            }
            let state = ChannelState::of(list, *digest);
            let before = self.channels.get(channel).into_iter().flat_map(ChannelState::topics);
            for topic in before.chain(state.topics()) {
                tables.keep(&topic)?;
                tables.saw(&topic, now)?;
            }
            tables.notes.list(channel.as_str(), self.version, list.packages().map(|(id, _)| id))?;
            self.channels.insert(channel.clone(), state);
        }
        Ok(Ok(self.version))
    }

    /// Packages that lists cut and that are not whole, as many as one commit takes.
    fn to_join(&self, now: Now) -> Result<Vec<(PackageId, Chunks)>, IndexError> {
        let (mut found, mut bytes) = (Vec::new(), 0);
        for (id, chunks) in self.channels.values().flat_map(ChannelState::cut) {
            if bytes < JOIN_BYTES && self.index.get(&id.topic(), now.unix_ms)?.is_none() {
                bytes += chunks.total();
                found.push((id.clone(), chunks.clone()));
            }
        }
        Ok(found)
    }

    /// Makes packages whole, beside their chunks: for whoever asks for them over HTTP, and for agents that know of no chunks.
    fn join<'c>(
        &mut self,
        tables: &mut Tables<'_>,
        cut: impl IntoIterator<Item = (PackageId, &'c Chunks)>,
        now: Now,
        free: &mut u64,
    ) -> Result<Result<(), Refusal>, IndexError> {
        let mut bytes = 0;
        for (id, chunks) in cut {
            let digest = *id.digest();
            if tables.has(&Piece { topic: id.topic(), digest, size: Some(chunks.total()) }, now)? {
                continue;
            }
            let mut whole = Vec::new();
            for piece in chunks.pieces(&digest) {
                let Some(record) = tables.read(&piece.topic)? else { continue };
                match self.index.bytes(&record.body) {
                    Ok(bytes) => whole.extend(bytes),
                    Err(error) => {
                        tracing::error!(%error, topic = piece.topic, "cannot read a chunk");
                        let text = format!("the broker cannot read `{}`: publish it again", piece.topic);
                        return Ok(Err(Refusal::new(Reason::UnspecifiedError, text)));
                    }
                }
            }
            if Digest::of(&whole) != digest {
                let text =
                    format!("the chunks of package `{id}` are not its bytes: no device could install it");
                return Ok(Err(Refusal::new(Reason::PayloadFormatInvalid, text)));
            }
            if bytes >= JOIN_BYTES {
                self.is_joining = true;
                continue;
            }
            bytes += chunks.total();
            let publish = Publish {
                topic: id.topic(),
                payload: whole.into(),
                qos: Qos::AtLeastOnce,
                retain: true,
                packet_id: 0,
                duplicate: false,
                properties: Properties::default(),
            };
            let topic: Arc<str> = publish.topic.as_str().into();
            let admitted = Ok(Admitted { publish, kind: Kind::Package(id), digest: Some(digest) });
            let op = Submission { admitted, topic, origin: BROKER, reply: None, place: None, expected: None };
            let Outcome::Published(version, chosen) = self.publish(tables, &op, now, free)? else { continue };
            match (version, op.admitted) {
                (Ok(version), Ok(admitted)) => {
                    let message = message(admitted, op.topic, BROKER, version, now);
                    self.joined.push((Arc::new(message), chosen));
                }
                (Err(refusal), _) | (_, Err(refusal)) => return Ok(Err(refusal)),
            }
        }
        Ok(Ok(()))
    }

    /// Whether the present list of any channel names a package.
    fn is_named(&self, id: &PackageId) -> bool {
        self.channels.values().any(|state| state.packages.contains(id))
    }

    /// The digest of a chunk that the present list of any channel names.
    fn named_chunk(&self, package: &Digest, number: u32) -> Option<Digest> {
        let mut cut = self.channels.values().filter_map(|state| state.chunks.get(package));
        cut.find_map(|chunks| Some(chunks.chunk(number)?.digest))
    }

    /// Counts one record less for the blob of `body`, and remembers it for removal if it was the last.
    fn release(&mut self, tables: &mut Tables<'_>, body: &Body, now: Now) -> Result<(), IndexError> {
        if let Body::Blob { digest, .. } = body
            && tables.count(digest, -1)? == 0
        {
            self.forgotten.insert(Digest::from(*digest), now.instant + BLOB_GRACE);
        }
        Ok(())
    }

    /// Forgets packages that are still garbage.
    fn collect(
        &mut self,
        tables: &mut Tables<'_>,
        collect: &Collect,
        now: Now,
    ) -> Result<Collected, IndexError> {
        let mut collected = Collected::default();
        for topic in &collect.topics {
            let is_old = tables.notes.seen(topic)?.is_some_and(|seen| seen < collect.since_ms);
            let is_named = match Topic::parse(topic) {
                Ok(Topic::Package(id)) => self.is_named(&id),
                Ok(Topic::Chunk(package, number)) => self.named_chunk(&package, number).is_some(),
                _ => false,
            };
            if is_old
                && !is_named
                && let Some(old) = tables.remove(topic)?
            {
                collected.messages += 1;
                collected.bytes += old.size();
                self.release(tables, &old.body, now)?;
            }
        }
        tables.meta.insert(COLLECTED, now.unix_ms)?;
        Ok(collected)
    }

    fn no_room(&mut self, free: u64) -> Refusal {
        self.refused_for_space = true;
        let text = format!("the broker's disk is full: only {free} bytes are free");
        Refusal::new(Reason::QuotaExceeded, text)
    }

    /// Forgets expired messages, and blobs past their grace time.
    fn sweep(&mut self, now: Now) -> Result<(), IndexError> {
        let expired: Vec<(u64, String)> = {
            let transaction = self.index.store.begin_read()?;
            let expiries = transaction.open_table(EXPIRIES)?;
            let end = now.unix_ms.saturating_add(1);
            let due = expiries.range::<(u64, &str)>(..(end, ""))?;
            let due = due.take(SWEEP_MESSAGES).map(|item| {
                let (key, _) = item?;
                let (expires, topic) = key.value();
                Ok((expires, topic.to_owned()))
            });
            due.collect::<Result<_, redb::StorageError>>()?
        };
        // Whoever copies blobs may still need them: another time.
        let due: Vec<_> = self
            .forgotten
            .iter()
            .filter(|(_, due)| **due <= now.instant && !self.index.blobs.is_pinned())
            .map(|(digest, _)| *digest)
            .collect();
        if expired.is_empty() && due.is_empty() {
            return Ok(());
        }
        let transaction = self.begin_write(now)?;
        let mut unnamed = Vec::new();
        {
            let mut tables = Tables::open(&transaction)?;
            for (expires, topic) in &expired {
                let old = tables.read(topic)?.filter(|old| old.is_expired(now.unix_ms));
                if let Some(old) = old {
                    tables.remove(topic)?;
                    self.release(&mut tables, &old.body, now)?;
                }
                tables.expiries.remove((*expires, topic.as_str()))?;
            }
            for digest in due {
                self.forgotten.remove(&digest);
                // It may have come back in the meantime.
                if tables.refs.get(digest.as_bytes())?.is_none() {
                    unnamed.push(digest);
                }
            }
            tables.count_bytes()?;
        }
        transaction.commit()?;
        for digest in unnamed {
            self.index.blobs.remove(&digest);
        }
        Ok(())
    }
}

/// What becomes of an [`Op`].
enum Outcome {
    /// The message's version or why it is refused, and whose turn it is among those who share.
    Published(Result<u64, Refusal>, Vec<Found>),
    Opened(Result<Option<Kept>, Refusal>),
    Changed,
    Collected(Collected),
    /// Nothing was kept of it.
    Failed,
}

impl Op {
    /// A message of the broker's own, such as a will: nobody waits for an answer.
    fn publish(publish: Publish, limits: &Limits) -> Op {
        let topic = publish.topic.as_str().into();
        let admitted = admit(publish, limits);
        Op::Publish(Box::new(Submission {
            admitted,
            topic,
            origin: BROKER,
            reply: None,
            place: None,
            expected: None,
        }))
    }

    fn size(&self) -> usize {
        match self {
            Op::Publish(submission) => {
                submission.admitted.as_ref().map_or(0, |admitted| admitted.publish.payload.len())
            }
            _ => 0,
        }
    }
}

/// How a payload is kept: in a blob if it is large and its digest known.
fn body(publish: &Publish, digest: Option<&Digest>) -> Body {
    match digest.filter(|_| publish.payload.len() > INLINE) {
        Some(digest) => Body::Blob { digest: *digest.as_bytes(), len: publish.payload.len() as u64 },
        None => Body::Inline(publish.payload.to_vec()),
    }
}

fn message(admitted: Admitted, topic: Arc<str>, origin: SessionId, version: u64, now: Now) -> Message {
    let Admitted { publish, kind, digest } = admitted;
    let size = publish.payload.len();
    let payload = match digest {
        Some(digest) if size > INLINE => Payload::Blob(digest, size as u64),
        // A small payload is a part of a large read buffer, which must not wait with it.
        _ if size <= INLINE => Payload::Inline(Bytes::copy_from_slice(&publish.payload)),
        _ => Payload::Inline(publish.payload),
    };
    Message {
        topic,
        payload,
        qos: publish.qos,
        retain: !matches!(kind, Kind::Live),
        expires_ms: expiry(publish.properties.expiry, now),
        properties: publish.properties,
        origin: Some(origin),
        version,
    }
}

fn expiry(seconds: Option<u32>, now: Now) -> Option<u64> {
    seconds.map(|seconds| now.unix_ms + u64::from(seconds) * 1000)
}

/// As much of a topic as the log shows.
fn shown(topic: &str) -> &str {
    /// Bytes.
    const SHOWN: usize = 200;
    &topic[..topic.floor_char_boundary(SHOWN)]
}

/// The tables of one transaction.
struct Tables<'t> {
    transaction: &'t WriteTransaction,
    /// Opened when first needed.
    sessions: Option<sessions::Tables<'t>>,
    records: Table<'t, &'static str, &'static [u8]>,
    expiries: Table<'t, (u64, &'static str), ()>,
    refs: Table<'t, &'static [u8; 32], u64>,
    legacy: Table<'t, &'static str, [u8; 32]>,
    meta: Table<'t, &'static str, u64>,
    gone: Table<'t, u64, &'static str>,
    notes: Notes<'t>,
    /// By how much the payloads have grown, in bytes.
    grown: i64,
}

impl<'t> Tables<'t> {
    fn open(transaction: &'t WriteTransaction) -> Result<Tables<'t>, IndexError> {
        Ok(Tables {
            transaction,
            sessions: None,
            records: transaction.open_table(RECORDS)?,
            expiries: transaction.open_table(EXPIRIES)?,
            refs: transaction.open_table(REFS)?,
            legacy: transaction.open_table(LEGACY)?,
            meta: transaction.open_table(META)?,
            gone: transaction.open_table(GONE)?,
            notes: Notes::open(transaction)?,
            grown: 0,
        })
    }

    fn sessions(&mut self) -> Result<&mut sessions::Tables<'t>, IndexError> {
        Ok(match &mut self.sessions {
            Some(tables) => tables,
            none => none.insert(sessions::Tables::open(self.transaction)?),
        })
    }

    /// Whether a package or chunk is there, with the right bytes.
    fn has(&self, piece: &Piece, now: Now) -> Result<bool, IndexError> {
        let is_it = |record: &Record| {
            !record.is_expired(now.unix_ms)
                && record.body.digest() == piece.digest
                // Of a whole package that lies, devices say so; of chunks that do, others are made whole.
                && (!piece.topic.starts_with(CHUNKS) || piece.size == Some(record.body.len()))
        };
        Ok(self.read(&piece.topic)?.as_ref().is_some_and(is_it))
    }

    /// Notes that a package or chunk was named, if it is there.
    fn saw(&mut self, topic: &str, now: Now) -> Result<(), IndexError> {
        match self.records.get(topic)?.is_some() {
            true => self.notes.saw(topic, now.unix_ms),
            false => Ok(()),
        }
    }

    /// Takes the expiry from the record of `topic`, if it has one.
    fn keep(&mut self, topic: &str) -> Result<(), IndexError> {
        let Some(mut record) = self.read(topic)?.filter(|record| record.expires_ms.is_some()) else {
            return Ok(());
        };
        self.remove(topic)?;
        record.expires_ms = None;
        record.properties.expiry = None;
        self.insert(topic, &record)
    }

    /// The record of `topic`. A damaged one counts as none: a new message may take its place.
    fn read(&self, topic: &str) -> Result<Option<Record>, IndexError> {
        let value = self.records.get(topic)?;
        Ok(value.and_then(|value| Record::read_or_skip(topic, value.value())))
    }

    fn insert(&mut self, topic: &str, record: &Record) -> Result<(), IndexError> {
        self.remove(topic)?;
        if let Some(expires) = record.expires_ms {
            self.expiries.insert((expires, topic), ())?;
        }
        self.records.insert(topic, record.to_bytes().as_slice())?;
        self.grown += record.size().cast_signed();
        Ok(())
    }

    /// Adds to the total what has come and gone in this transaction.
    fn count_bytes(&mut self) -> Result<(), IndexError> {
        let bytes = self.meta.get(BYTES)?.map_or(0, |bytes| bytes.value());
        self.meta.insert(BYTES, bytes.saturating_add_signed(self.grown))?;
        Ok(())
    }

    /// Removes the record of `topic`, and returns it.
    fn remove(&mut self, topic: &str) -> Result<Option<Record>, IndexError> {
        self.notes.forget(topic)?;
        let old = self.records.remove(topic)?;
        let old = old.and_then(|value| Record::read_or_skip(topic, value.value()));
        self.grown -= old.as_ref().map_or(0, |old| old.size().cast_signed());
        if let Some(expires) = old.as_ref().and_then(|old| old.expires_ms) {
            self.expiries.remove((expires, topic))?;
        }
        Ok(old)
    }

    /// Notes that a node's topic was cleared, and forgets of which clears the upstream has been told.
    fn note_gone(&mut self, version: u64, topic: &str, told: u64) -> Result<(), IndexError> {
        self.gone.retain_in(..=told, |_, _| false)?;
        self.gone.insert(version, topic)?;
        if self.gone.len()? > GONE_MOST
            && let Some((_, oldest)) = self.gone.pop_first()?
        {
            tracing::error!(
                topic = oldest.value(),
                "too much was cleared: the upstream will not be told of this"
            );
        }
        Ok(())
    }

    fn name(&mut self, path: &FilePath, digest: &Digest) -> Result<(), IndexError> {
        self.legacy.insert(path.as_str(), digest.as_bytes())?;
        Ok(())
    }

    /// Changes the count of records that name a blob, and returns it.
    fn count(&mut self, digest: &[u8; 32], change: i64) -> Result<u64, IndexError> {
        let present = self.refs.get(digest)?.map_or(0, |count| count.value());
        let count = present.saturating_add_signed(change);
        match count {
            0 => self.refs.remove(digest)?,
            _ => self.refs.insert(digest, count)?,
        };
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
