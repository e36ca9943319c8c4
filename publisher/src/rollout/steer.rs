//! The driver of a rollout: reads what is retained, asks [`control`](super::control) and [`lease`](super::lease) what to do,
//! does it, and looks again.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_client::Brokers;
use mpypi_protocol::{
    ChannelName, Digest, NodeId, Rollout, Topic, UpdateList,
    list::Release,
    node::{Info, State},
    rollout::Percent,
    signed::Distrust,
    topic::{NodeSubject, ROOTS, RolloutSubject},
};
use tokio::time::Instant;

use super::{
    Order, Record, Status,
    control::{Counts, Next, View},
    lease::Lease,
};
use crate::{
    limits,
    link::{Link, LinkError, Refusal, Signal},
    plan::{PlanError, relist},
    publish::backoff,
    retained::{self, AskError},
    settle::{self, Disagreement, End, Message, Stands, Verdict, settle},
    signing::{Authority, Signing, SigningError},
    status::NodeStatus,
};

/// What is steered, and to what end.
#[derive(Debug, Clone)]
pub struct Steering {
    /// The broker, or several that are to agree.
    pub brokers: Brokers,
    /// The channel.
    pub channel: ChannelName,
    /// What is retained first, if the rollout begins now.
    pub begin: Option<Record>,
    /// What is wanted of the rollout that is under way.
    pub order: Option<Order>,
    /// What lists are signed with, where the channel has keys.
    pub signing: Signing,
}

/// How a rollout stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Standings {
    /// What is retained of it.
    pub record: Record,
    /// The sequence of the channel's list.
    pub sequence: u64,
    /// For how many of the nodes that list is; `None` if it is none of the rollout.
    pub percent: Option<Percent>,
    /// How the nodes stand.
    pub counts: Counts,
    /// Who steers it, if somebody else does.
    pub steered_by: Option<String>,
}

impl Standings {
    fn of(view: &View<'_>, steered_by: Option<String>) -> Standings {
        Standings {
            record: view.record.clone(),
            sequence: view.list.release().map_or(0, |release| release.sequence),
            percent: view.step().map(|rollout| rollout.percent),
            counts: view.counts(),
            steered_by,
        }
    }
}

/// What happens meanwhile, for people.
#[derive(Debug)]
pub enum Event<'a> {
    /// It was looked at.
    Looked(&'a Standings),
    /// A list was published, for so many of the nodes; `None`: the release before.
    Published {
        /// Its sequence.
        sequence: u64,
        /// For how many.
        percent: Option<Percent>,
    },
    /// It stands otherwise from now on.
    Recorded(&'a Record),
    /// Brokers do not agree on what was published: their nodes stay where they are.
    Behind(&'a Verdict),
    /// The connection was lost; it is tried again after a pause.
    Lost {
        /// Why.
        error: &'a LinkError,
        /// The pause.
        pause: Duration,
    },
}

/// Takes note of [`Event`]s.
pub trait Observer {
    /// Something happened.
    fn event(&mut self, event: Event<'_>);
}

impl Observer for () {
    fn event(&mut self, _event: Event<'_>) {}
}

/// Why a rollout is not steered.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// The broker cannot be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// Nothing is retained of one.
    #[error("channel `{0}` has no rollout")]
    None(ChannelName),
    /// What is retained of it is nothing that this version writes.
    #[error("what the broker retains of the rollout of channel `{channel}` cannot be read")]
    Record {
        /// The channel.
        channel: ChannelName,
        /// Why not.
        source: serde_json::Error,
    },
    /// The channel's list is none.
    #[error("channel `{0}` retains no update list")]
    List(ChannelName),
    /// There is nothing to do about the order.
    #[error("the rollout of channel `{channel}` is {status}: there is nothing to {}", word(*order))]
    Order {
        /// The channel.
        channel: ChannelName,
        /// How it stands.
        status: Status,
        /// What was wanted.
        order: Order,
    },
    /// Who steers it does not answer.
    #[error("`{holder}` steers the rollout and does not answer")]
    NoAnswer {
        /// Who.
        holder: String,
    },
    /// There can be no next list.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The next list cannot be signed.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// What is retained is not what somebody signed who may, and is not signed again.
    #[error("what channel `{channel}` retains is not signed again: {problem}")]
    Untrusted {
        /// The channel.
        channel: ChannelName,
        /// Why not.
        problem: Distrust,
    },
    /// The broker does not take what was published.
    #[error("the broker refused to retain `{topic}`: {refusal}")]
    Refused {
        /// The topic.
        topic: String,
        /// Why.
        refusal: Refusal,
    },
    /// Not every broker has what was published last.
    #[error(transparent)]
    Disagreement(#[from] Box<Disagreement>),
    /// Connections were lost too often.
    #[error("gave up after {attempts} lost connections: the rollout stands where it was")]
    GaveUp {
        /// How many.
        attempts: u32,
        /// The last one.
        source: Box<LinkError>,
    },
}

impl From<LinkError> for SteerError {
    fn from(error: LinkError) -> Self {
        SteerError::Ask(error.into())
    }
}

impl SteerError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            SteerError::Ask(error) => error.hint(),
            SteerError::None(channel) => Some(format!("start one with `mpypi rollout {channel}`")),
            SteerError::Record { .. } => Some("update mpypi, or start another rollout".to_owned()),
            SteerError::Order { channel, status: Status::Paused, .. } => Some(format!(
                "`mpypi rollout resume {channel}` goes on, `abort` puts the release before back"
            )),
            SteerError::NoAnswer { .. } => Some("try again: when it is gone, the broker says so".to_owned()),
            SteerError::GaveUp { .. } => Some("run again to go on from there".to_owned()),
            SteerError::Refused { refusal, .. } => refusal.hint(),
            SteerError::Signing(error) => error.hint(),
            SteerError::Disagreement(error) => Some(error.hint()),
            SteerError::Untrusted { .. } => Some(
                "see `mpypi verify`, and who else can write to this broker; then publish again".to_owned(),
            ),
            SteerError::List(_) | SteerError::Order { .. } | SteerError::Plan(_) => None,
        }
    }

    fn lost(self) -> Result<LinkError, SteerError> {
        match self {
            SteerError::Ask(AskError::Link(error)) if error.is_passing() => Ok(error),
            other => Err(other),
        }
    }
}

fn word(order: Order) -> &'static str {
    match order {
        Order::Pause => "pause",
        Order::Resume => "resume",
        Order::Abort => "abort",
    }
}

/// Steers a rollout until there is nothing left to do, or watches whoever does.
///
/// # Errors
/// See [`SteerError`]. The rollout stands where it was, and goes on when it is steered again.
pub async fn steer(steering: &Steering, observer: &mut impl Observer) -> Result<Standings, SteerError> {
    let own = format!("mpypi-{}-{:08x}", std::process::id(), fastrand::u32(..));
    let mut lease = Lease::new(own);
    let mut wish = Wish { begin: steering.begin.clone(), order: steering.order, told: None };
    let mut losses = 0;
    let mut connected = false;
    loop {
        let before = now();
        let error = match attempt(steering, &mut lease, &mut wish, observer, &mut connected).await {
            Ok(standings) => return Ok(standings),
            Err(error) if !connected => return Err(error),
            Err(error) => error.lost()?,
        };
        lease.lost();
        // A rollout may take days: what counts is losses in a row.
        losses = if now().duration_since(before) > limits::ROLLOUT_REFRESH { 1 } else { losses + 1 };
        if losses > limits::STEER_ATTEMPTS {
            return Err(SteerError::GaveUp { attempts: losses, source: Box::new(error) });
        }
        let pause = backoff(losses);
        observer.event(Event::Lost { error: &error, pause });
        tokio::time::sleep(pause).await;
    }
}

/// How the rollout of a channel stands, without steering it.
///
/// # Errors
/// See [`SteerError`].
pub async fn look(brokers: &Brokers, channel: &ChannelName) -> Result<(Standings, Known), SteerError> {
    let mut link = Link::connect_any(brokers).await?;
    let mut known = Known::new(channel.clone());
    known.read_all(&mut link).await?;
    link.close().await;
    let (record, list) = known.parts()?;
    let view = View { record, list, nodes: &known.nodes, now: wall() };
    let standings = Standings::of(&view, known.lease.clone());
    Ok((standings, known))
}

/// The list that takes the place of `present`, with the packages of `from`, or its own.
///
/// # Errors
/// What is retained is not believed, or cannot be signed.
pub(super) async fn sign_again(
    signing: &Signing,
    channel: &ChannelName,
    (present, from): (&Bytes, Option<&Bytes>),
    roots: &BTreeMap<u64, Bytes>,
    rollout: Option<&Rollout>,
    revoked: &[u64],
) -> Result<(Release, Bytes), SteerError> {
    let now = wall();
    let list = UpdateList::parse(present).ok().filter(|list| list.release().is_some());
    let list = list.ok_or_else(|| SteerError::List(channel.clone()))?;
    let (authority, signing) = Authority::any(signing, channel, Some(&list), roots, now)?;
    let source = authority
        .believed(from.unwrap_or(present), channel)
        .map_err(|problem| SteerError::Untrusted { channel: channel.clone(), problem })?;
    let bond = (authority.epoch, Some(Digest::of(present)));
    let (release, bytes) = relist(&list, &source, rollout, revoked, bond, now)?;
    Ok((release, authority.sign(&signing, &bytes).await?))
}

/// What is to be done beside steering.
struct Wish {
    begin: Option<Record>,
    order: Option<Order>,
    /// Whom the order was passed on to, when, and how it stood then.
    told: Option<(Instant, Status)>,
}

async fn attempt(
    steering: &Steering,
    lease: &mut Lease,
    wish: &mut Wish,
    observer: &mut impl Observer,
    connected: &mut bool,
) -> Result<Standings, SteerError> {
    let topic = steering.channel.rollout(RolloutSubject::Lease);
    let (broker, link) = settle::newest(&steering.brokers, &steering.channel).await?;
    link.close().await;
    let link = Link::connect_clearing(&broker, &topic, limits::LEASE_KEEP_ALIVE).await?;
    *connected = true;
    let brokers = steering.brokers.clone();
    let mut run = Run { brokers, link, known: Known::new(steering.channel.clone()), started: now() };
    run.known.read_all(&mut run.link).await?;
    if let Some(holder) = run.known.lease.clone() {
        lease.heard(Duration::ZERO, holder.as_bytes());
    }
    run.known.heard.clear();
    let mut refresh = now();
    loop {
        if now().duration_since(refresh) >= limits::ROLLOUT_REFRESH {
            refresh = now();
            run.link.subscribe(&[Known::node_filter(NodeSubject::Info)]);
            run.link.subscribe(&[Known::node_filter(NodeSubject::State)]);
            run.link.subscribe(&[Known::node_filter(NodeSubject::Online)]);
        }
        let at = now().duration_since(run.started);
        for payload in std::mem::take(&mut run.known.heard) {
            lease.heard(at, &payload);
        }
        if let Some(standings) = run.turn(&steering.signing, lease, wish, observer).await? {
            if lease.other().is_none() {
                run.publish(&topic, Bytes::new()).await?;
            }
            run.agree().await?;
            run.link.close().await;
            return Ok(standings);
        }
        run.listen().await?;
    }
}

/// One connection.
struct Run {
    brokers: Brokers,
    link: Link,
    known: Known,
    started: Instant,
}

impl Run {
    /// Does what is to be done now; says how it ended, if it did.
    async fn turn(
        &mut self,
        signing: &Signing,
        lease: &mut Lease,
        wish: &mut Wish,
        observer: &mut impl Observer,
    ) -> Result<Option<Standings>, SteerError> {
        let channel = self.known.channel.clone();
        if lease.claims() {
            let topic = channel.rollout(RolloutSubject::Lease);
            self.publish(&topic, lease.own().to_owned().into()).await?;
            return Ok(None);
        }
        let steers = lease.is_held(now().duration_since(self.started));
        if steers && let Some(begin) = wish.begin.take() {
            let is_retained = matches!(&self.known.record, Some(Ok(record)) if record.id == begin.id);
            if !is_retained {
                self.record(begin, observer).await?;
            }
        }
        let orders = std::mem::take(&mut self.known.orders);
        let (record, list) = match self.known.parts() {
            Ok(parts) => parts,
            // Whoever steers has yet to begin it.
            Err(SteerError::None(_)) if wish.begin.is_some() => return Ok(None),
            Err(error) => return Err(error),
        };
        let view = View { record, list, nodes: &self.known.nodes, now: wall() };
        let standings = Standings::of(&view, lease.other().map(str::to_owned));
        observer.event(Event::Looked(&standings));
        if !steers {
            return self.follow(lease, wish, standings).await;
        }
        if let Some(order) = wish.order.take() {
            let Some(record) = view.ordered(order) else {
                return Err(SteerError::Order { channel, status: record.status, order });
            };
            self.record(record, observer).await?;
            return Ok(None);
        }
        if let Some(record) = orders.into_iter().find_map(|order| view.ordered(order)) {
            self.record(record, observer).await?;
            return Ok(None);
        }
        match view.next() {
            Next::Wait(_) => {}
            Next::Over => return Ok(Some(standings)),
            Next::Record(record) => self.record(*record, observer).await?,
            Next::Step(rollout) => {
                let (release, bytes) = self.relist(signing, None, Some(&rollout), &[]).await?;
                self.publish_list(bytes, observer).await?;
                let (sequence, percent) = (release.sequence, Some(rollout.percent));
                observer.event(Event::Published { sequence, percent });
            }
            Next::PutBack { base, revoked } => {
                let record = record.clone();
                match self.history(base).await? {
                    Some(before) => {
                        let (release, bytes) = self.relist(signing, Some(before), None, &revoked).await?;
                        self.publish_list(bytes, observer).await?;
                        let sequence = release.sequence;
                        observer.event(Event::Published { sequence, percent: None });
                    }
                    None => {
                        let before = record.reason.clone().unwrap_or_default();
                        let reason = format!("{before}; release {base} is not in the channel's history");
                        let record = Record { base: None, reason: Some(reason), ..record };
                        self.record(Record { status: Status::Paused, ..record }, observer).await?;
                    }
                }
            }
        }
        Ok(None)
    }

    /// Somebody else steers, or nobody does yet: says when there is nothing left to see.
    async fn follow(
        &mut self,
        lease: &Lease,
        wish: &mut Wish,
        standings: Standings,
    ) -> Result<Option<Standings>, SteerError> {
        let Some(holder) = lease.other() else { return Ok(None) };
        let status = standings.record.status;
        match (wish.order, wish.told) {
            (Some(order), None) => {
                let topic = self.known.channel.rollout(RolloutSubject::Order);
                let payload = serde_json::to_vec(&order).unwrap_or_default();
                let number = self.link.tell(&topic, payload.into())?;
                self.acknowledged(&topic, number).await?;
                wish.told = Some((now(), status));
                return Ok(None);
            }
            (Some(_), Some((_, before))) if status != before => wish.order = None,
            (Some(_), Some((at, _))) if now().duration_since(at) > limits::ORDER_ANSWER => {
                return Err(SteerError::NoAnswer { holder: holder.to_owned() });
            }
            (Some(_), Some(_)) => return Ok(None),
            (None, _) => {}
        }
        let is_over = match status {
            Status::Paused => self.known.percent() == Some(Percent::NONE),
            status => !status.is_under_way(),
        };
        Ok((is_over && wish.begin.is_none()).then_some(standings))
    }

    async fn record(&mut self, record: Record, observer: &mut impl Observer) -> Result<(), SteerError> {
        let topic = self.known.channel.rollout(RolloutSubject::Record);
        let payload = Bytes::from(record.to_bytes());
        self.publish(&topic, payload.clone()).await?;
        self.known.take(&topic, payload);
        observer.event(Event::Recorded(&record));
        self.settle(observer).await;
        Ok(())
    }

    async fn publish_list(&mut self, list: Bytes, observer: &mut impl Observer) -> Result<(), SteerError> {
        let topic = self.known.channel.topic();
        if let Some((present, Ok(parsed))) = &self.known.list
            && let Some(release) = parsed.release()
        {
            let (history, present) = (self.known.channel.history(release.sequence), present.clone());
            self.publish(&history, present).await?;
        }
        self.publish(&topic, list.clone()).await?;
        self.known.take(&topic, list);
        self.settle(observer).await;
        Ok(())
    }

    /// Sees to it that every broker of several has what was published. Where one does not, its nodes stay where they are, and
    /// the rollout goes by what they say.
    async fn settle(&mut self, observer: &mut impl Observer) {
        if let Some(verdict) = self.verdict().await.filter(|verdict| verdict.end == End::Disagreed) {
            observer.event(Event::Behind(&verdict));
        }
    }

    /// The same, in the end.
    async fn agree(&mut self) -> Result<(), SteerError> {
        match self.verdict().await {
            Some(verdict) if verdict.end == End::Disagreed => {
                let done = format!("the rollout of channel `{}` is over", self.known.channel);
                Err(Box::new(Disagreement { done, stands: Stands::Published, verdict }).into())
            }
            _ => Ok(()),
        }
    }

    async fn verdict(&mut self) -> Option<Verdict> {
        if !self.brokers.are_several() {
            return None;
        }
        let channel = self.known.channel.clone();
        let list = self.known.payload().map(|list| Message::of(channel.topic(), list.clone()));
        let record = match &self.known.record {
            Some(Ok(record)) => {
                let topic = channel.rollout(RolloutSubject::Record);
                Some(Message::of(topic, record.to_bytes().into()))
            }
            _ => None,
        };
        let messages: Vec<Message> = list.into_iter().chain(record).collect();
        Some(settle(&self.brokers, Some(&channel), &messages, |_| None, |_| {}).await)
    }

    /// The next list, signed where the channel has keys: what it has now, or another list of its history, once more. A broker
    /// is not believed: what is signed again was signed by somebody who may.
    async fn relist(
        &mut self,
        signing: &Signing,
        from: Option<Bytes>,
        rollout: Option<&Rollout>,
        revoked: &[u64],
    ) -> Result<(Release, Bytes), SteerError> {
        let mut roots = BTreeMap::new();
        for (topic, payload) in retained::all(&mut self.link, &[format!("{ROOTS}+")]).await? {
            match Topic::parse(&topic) {
                Ok(Topic::Root(version)) => _ = roots.insert(version, payload),
                _ => self.known.take(&topic, payload),
            }
        }
        let channel = self.known.channel.clone();
        let payload = self.known.payload().cloned().ok_or_else(|| SteerError::List(channel.clone()))?;
        sign_again(signing, &channel, (&payload, from.as_ref()), &roots, rollout, revoked).await
    }

    /// The payload of the list of this sequence, from the channel's history.
    async fn history(&mut self, sequence: u64) -> Result<Option<Bytes>, SteerError> {
        let wanted = self.known.channel.history(sequence);
        let mut found = None;
        for (topic, payload) in retained::all(&mut self.link, std::slice::from_ref(&wanted)).await? {
            match topic == wanted {
                true => found = Some(payload),
                false => self.known.take(&topic, payload),
            }
        }
        let is_it = |payload: &Bytes| {
            let list = UpdateList::parse(payload).ok();
            list.as_ref().and_then(UpdateList::release).is_some_and(|release| release.sequence == sequence)
        };
        Ok(found.filter(is_it))
    }

    /// Publishes retained, and waits until the broker has it.
    async fn publish(&mut self, topic: &str, payload: Bytes) -> Result<(), SteerError> {
        let number = self.link.publish(topic, payload)?;
        self.acknowledged(topic, number).await
    }

    async fn acknowledged(&mut self, topic: &str, wanted: u64) -> Result<(), SteerError> {
        loop {
            match self.link.next().await? {
                Signal::Acknowledged(number, result) if number == wanted => {
                    let refused = |refusal| SteerError::Refused { topic: topic.to_owned(), refusal };
                    return result.map(drop).map_err(refused);
                }
                Signal::Message { topic, payload } => self.known.take(&topic, payload),
                _ => {}
            }
        }
    }

    /// Takes in what arrives, until nothing does for a moment or it is time to look.
    async fn listen(&mut self) -> Result<(), SteerError> {
        let until = now() + limits::ROLLOUT_LOOK;
        let mut quiet = limits::ROLLOUT_LOOK;
        while now() < until
            && let Some(signal) = self.link.next_within(quiet).await?
        {
            if let Signal::Message { topic, payload } = signal {
                self.known.take(&topic, payload);
                quiet = limits::ROLLOUT_PAUSE;
            }
        }
        Ok(())
    }
}

/// What is known of a channel, its rollout and its nodes.
#[derive(Debug)]
pub struct Known {
    channel: ChannelName,
    /// What is retained of the rollout.
    pub record: Option<Result<Record, serde_json::Error>>,
    list: Option<(Bytes, Result<UpdateList, ()>)>,
    /// What nodes said.
    pub nodes: BTreeMap<NodeId, NodeStatus>,
    lease: Option<String>,
    heard: VecDeque<Bytes>,
    orders: Vec<Order>,
}

impl Known {
    /// Nothing yet.
    #[must_use]
    pub fn new(channel: ChannelName) -> Known {
        Known {
            channel,
            record: None,
            list: None,
            nodes: BTreeMap::new(),
            lease: None,
            heard: VecDeque::new(),
            orders: Vec::new(),
        }
    }

    /// The channel's list, if it has one that can be read.
    #[must_use]
    pub fn list(&self) -> Option<&UpdateList> {
        self.list.as_ref().and_then(|(_, list)| list.as_ref().ok())
    }

    /// The payload of the channel's list.
    #[must_use]
    pub fn payload(&self) -> Option<&Bytes> {
        self.list.as_ref().map(|(payload, _)| payload)
    }

    /// Reads everything that is retained; what comes later comes by itself.
    ///
    /// # Errors
    /// See [`AskError`].
    pub async fn read_all(&mut self, link: &mut Link) -> Result<(), AskError> {
        let subjects = [RolloutSubject::Record, RolloutSubject::Lease, RolloutSubject::Order];
        let mut filters: Vec<String> =
            subjects.into_iter().map(|subject| self.channel.rollout(subject)).collect();
        filters.push(self.channel.topic());
        let subjects = [NodeSubject::Info, NodeSubject::State, NodeSubject::Online];
        filters.extend(subjects.map(Known::node_filter));
        for (topic, payload) in retained::all(link, &filters).await? {
            self.take(&topic, payload);
        }
        Ok(())
    }

    fn node_filter(subject: NodeSubject) -> String {
        format!("mpypi/nodes/+/{subject}")
    }

    fn take(&mut self, topic: &str, payload: Bytes) {
        match Topic::parse(topic) {
            Ok(Topic::Channel(channel)) if channel == self.channel => {
                let list = UpdateList::parse(&payload).map_err(drop);
                self.list = (!payload.is_empty()).then_some((payload, list));
            }
            Ok(Topic::Rollout(channel, subject)) if channel == self.channel => match subject {
                RolloutSubject::Record => {
                    self.record = (!payload.is_empty()).then(|| Record::parse(&payload));
                }
                RolloutSubject::Lease => {
                    let holder = String::from_utf8_lossy(&payload).into_owned();
                    self.lease = Some(holder).filter(|holder| !holder.is_empty());
                    self.heard.push_back(payload);
                }
                RolloutSubject::Order => self.orders.extend(serde_json::from_slice::<Order>(&payload)),
            },
            Ok(Topic::Node(id, subject)) => {
                let node = self.nodes.entry(id).or_default();
                match subject {
                    NodeSubject::Info => node.info = Info::parse(&payload).ok(),
                    NodeSubject::State => node.state = State::parse(&payload).ok(),
                    NodeSubject::Online => node.online = Some(&*payload == b"1"),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn parts(&self) -> Result<(&Record, &UpdateList), SteerError> {
        let channel = || self.channel.clone();
        let record = match &self.record {
            Some(Ok(record)) => record,
            Some(Err(error)) => {
                let source = serde::de::Error::custom(error);
                return Err(SteerError::Record { channel: channel(), source });
            }
            None => return Err(SteerError::None(channel())),
        };
        Ok((record, self.list().ok_or_else(|| SteerError::List(channel()))?))
    }

    fn percent(&self) -> Option<Percent> {
        let release = self.list()?.release()?;
        Some(Rollout::of(release).ok()??.percent)
    }
}

#[expect(clippy::disallowed_methods, reason = "this is a driver")]
fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "this is a driver")]
fn wall() -> Timestamp {
    Timestamp::now()
}
