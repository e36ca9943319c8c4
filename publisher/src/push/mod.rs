//! Firmware for devices that know no lists: projectMM's are told over HTTP where their image is, in the order of the
//! channel's rollout and no more than so many at a time, and are watched until they run it. What they say of themselves is
//! published as any node says it.
//!
//! | module | does |
//! |---|---|
//! | `turn` | list, device and time → whose turn it is. No I/O, no clock |
//! | `courier` | what a device says → what to do next. No I/O, no clock |
//! | `visit` | asks one device, and tells it |
//!
//! Nothing is remembered between two runs: the list says when it was made, and each device what it runs.

mod courier;
mod turn;
mod visit;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    convert::Infallible,
    fmt,
    time::Duration,
};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use mpypi_client::{Brokers, args::TrustArgs, http, trust::TrustError};
use mpypi_protocol::{
    ChannelName, Digest, NodeId, Trust, UpdateList, rollout::RolloutError, signed::Distrust,
    topic::NodeSubject,
};
use tokio::{sync::mpsc, task::JoinSet};

use self::{
    courier::{Seen, choose, state},
    turn::{Offer, Turn},
    visit::{Visit, Word, look},
};
use crate::{
    keys::{Keys, KeysError},
    limits,
    link::{Link, LinkError, Signal},
    publish::backoff,
    retained::{self, AskError},
    signing::walk,
};

/// What is pushed, and to whom.
#[derive(Debug, Clone)]
pub struct Options {
    /// The broker that has the channel, and is told of the devices.
    pub brokers: Brokers,
    /// The channel.
    pub channel: ChannelName,
    /// Where roots are kept: whose lists are believed.
    pub keys: Keys,
    /// Where devices fetch packages from: below it is `/packages/<sha256>`.
    pub gateway: String,
    /// The devices. Where no rollout says otherwise, they are updated in this order.
    pub devices: Vec<Target>,
    /// Whom to trust where a device speaks HTTPS.
    pub trust: TrustArgs,
    /// How long a device may take.
    pub timeout: Duration,
    /// How many devices are updated at a time.
    pub parallel: usize,
    /// When more than so many failed, no other is begun with.
    pub max_failures: Option<usize>,
    /// Whether this is the order that a release may wait for.
    pub orders: Orders,
    /// How long a device is waited for whose turn is later.
    pub wait: Duration,
}

/// Whether somebody orders devices to take what waits for an order, and at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    /// Nobody does.
    None,
    /// Somebody does.
    Given,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// What it is called among the nodes.
    pub node: NodeId,
    /// Where it speaks HTTP, as `http://10.0.0.7`.
    pub url: String,
    /// What it is labelled with, for queries.
    pub labels: BTreeMap<String, String>,
    /// How far its local time is ahead of UTC, in minutes.
    pub utc_offset: Option<i32>,
}

/// What became of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Became {
    /// It runs the new image.
    Updated {
        /// What it ran before.
        from: String,
        /// What it runs now.
        to: String,
    },
    /// It runs what the channel has, or something newer.
    UpToDate {
        /// Which.
        version: String,
    },
    /// It is not its turn.
    Held {
        /// When it is, if time alone has to pass.
        until: Option<Timestamp>,
    },
    /// It was its turn, and too many others had failed.
    Left,
    /// The channel has nothing for its hardware.
    NoImage {
        /// Its hardware.
        key: String,
    },
    /// It does not run the new image.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What became of the devices, as they were named.
pub type Results = Vec<(NodeId, Became)>;

/// Takes note of what happens meanwhile.
pub trait Observer {
    /// A device went on.
    fn device(&mut self, node: &NodeId, text: &str);

    /// All devices were seen to, as far as it is their turn; [`follow`] begins again later.
    fn round(&mut self, _results: &Results) {}

    /// [`follow`] cannot go on now; it tries again after a pause.
    fn lost(&mut self, _error: &PushError, _pause: Duration) {}
}

/// Nothing can be pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The broker cannot be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The channel has no list that can be read, or no firmware in it.
    #[error("channel `{0}` has no firmware")]
    NoFirmware(ChannelName),
    /// Nobody takes a list that has expired.
    #[error("what channel `{channel}` has was believed until {expires}")]
    Expired {
        /// The channel.
        channel: ChannelName,
        /// Until when it was believed.
        expires: Timestamp,
    },
    /// Whose turn it is cannot be read.
    #[error("nobody may take what the channel has: {0}")]
    Rollout(#[from] RolloutError),
    /// The list is not signed by who may.
    #[error("what channel `{channel}` has is not believed: {problem}")]
    Untrusted {
        /// The channel.
        channel: ChannelName,
        /// Why not.
        problem: Distrust,
    },
    /// The key folder cannot be read.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// A file about trust cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The broker does not let this user say how devices stand.
    #[error("the broker does not let this user write `{topic}`: {reason}")]
    NotAllowed {
        /// The topic.
        topic: String,
        /// Why.
        reason: String,
    },
}

impl From<LinkError> for PushError {
    fn from(error: LinkError) -> PushError {
        PushError::Ask(error.into())
    }
}

impl PushError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            PushError::Ask(error) => error.hint(),
            PushError::Keys(error) => error.hint(),
            PushError::Trust(error) => error.hint().map(str::to_owned),
            PushError::NoFirmware(_) => {
                Some("publish one with images below `firmware/`, as firmware-esp32-v3.0.0.bin".to_owned())
            }
            PushError::Expired { .. } => Some("publish the release again".to_owned()),
            PushError::Rollout(_) => Some("start the rollout again: `mpypi rollout`".to_owned()),
            PushError::Untrusted { .. } => {
                Some("see `mpypi verify`, and who else can write to this broker".to_owned())
            }
            PushError::NotAllowed { .. } => {
                Some("log in as an admin: `--broker mqtt://user:password@host:port`".to_owned())
            }
        }
    }

    /// Whether it may be otherwise later, without anything done here.
    fn is_passing(&self) -> bool {
        match self {
            PushError::Ask(AskError::Link(error)) => error.is_passing(),
            PushError::NoFirmware(_) | PushError::Expired { .. } | PushError::Rollout(_) => true,
            PushError::Untrusted { .. } => true,
            PushError::Ask(AskError::Refused { .. })
            | PushError::Keys(_)
            | PushError::Trust(_)
            | PushError::NotAllowed { .. } => false,
        }
    }
}

impl fmt::Display for Became {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Became::Updated { from, to } => write!(f, "updated from {from} to {to}"),
            Became::UpToDate { version } => write!(f, "up to date at {version}"),
            Became::Held { until: Some(until) } => write!(f, "held: its turn is at {until}"),
            Became::Held { until: None } => f.write_str("held: it is not its turn"),
            Became::Left => f.write_str("left alone: too many others failed"),
            Became::NoImage { key } => write!(f, "the channel has no image for `{key}`"),
            Became::Failed { reason } => write!(f, "failed: {reason}"),
        }
    }
}

impl Became {
    /// Whether all is as the channel says it should be.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self, Became::Updated { .. } | Became::UpToDate { .. } | Became::Held { .. })
    }

    /// In a word, for programs.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Became::Updated { .. } => "updated",
            Became::UpToDate { .. } => "up-to-date",
            Became::Held { .. } => "held",
            Became::Left => "left",
            Became::NoImage { .. } => "no-image",
            Became::Failed { .. } => "failed",
        }
    }
}

/// Pushes the channel's firmware to each device whose turn it is.
///
/// # Errors
/// See [`PushError`]. That a device fails is none.
pub async fn push(options: &Options, observer: &mut impl Observer) -> Result<Results, PushError> {
    let mut link = Link::connect_any(&options.brokers).await?;
    let round = round(options, &mut link, observer).await?;
    link.close().await;
    Ok(round.results)
}

/// Pushes again whenever the channel has another list, when a device's turn comes, and now and then, for devices that were
/// away. It ends when it is dropped.
///
/// # Errors
/// See [`PushError`]; what may pass is waited for.
pub async fn follow(options: &Options, observer: &mut impl Observer) -> Result<Infallible, PushError> {
    let mut losses = 0;
    loop {
        let error = match follow_connected(options, observer, &mut losses).await {
            Ok(never) => match never {},
            Err(error) if error.is_passing() => error,
            Err(error) => return Err(error),
        };
        losses += 1;
        let pause = backoff(losses);
        observer.lost(&error, pause);
        tokio::time::sleep(pause).await;
    }
}

async fn follow_connected(
    options: &Options,
    observer: &mut impl Observer,
    losses: &mut u32,
) -> Result<Infallible, PushError> {
    let mut link = Link::connect_any(&options.brokers).await?;
    loop {
        let Done { results, due, list } = round(options, &mut link, observer).await?;
        *losses = 0;
        observer.round(&results);
        let again = now().checked_add(limits::PUSH_AGAIN).unwrap_or(Timestamp::MAX);
        let again = due.map_or(again, |due| due.min(again));
        loop {
            let left = again.duration_since(now());
            if left <= SignedDuration::ZERO {
                break;
            }
            match link.next_within(left.unsigned_abs()).await? {
                Some(Signal::Message { topic, payload })
                    if topic == options.channel.topic() && Some(Digest::of(&payload)) != list =>
                {
                    break;
                }
                _ => {}
            }
        }
    }
}

/// Sees to every device once.
async fn round<'a, O: Observer>(
    options: &'a Options,
    link: &'a mut Link,
    observer: &'a mut O,
) -> Result<Done, PushError> {
    let now = now();
    let (payload, roots) = retained::channel(link, &options.channel).await?;
    let chain = walk(options.keys.roots()?.0, &roots);
    let trust = match chain.last() {
        Some(root) if root.delegation(&options.channel).is_some() => Trust::Root(root.clone().into()),
        _ => Trust::Anyone,
    };
    let list = match &payload {
        None => UpdateList::default(),
        Some(payload) => match trust.verify(&options.channel, payload, Some(now)) {
            Ok(verified) => verified.into_list(),
            Err(problem) => return Err(PushError::Untrusted { channel: options.channel.clone(), problem }),
        },
    };
    let offer = Offer::of(&list, &options.channel, now)?;
    // Whatever comes there now, and is something else, makes this round an old one.
    link.subscribe(&[options.channel.topic()]);
    let (say, words) = mpsc::channel(limits::PUSH_WORDS);
    let mut round = Round {
        options,
        agent: http::agent(&options.trust, 0)?,
        offer,
        list: payload.as_deref().map(Digest::of),
        link,
        observer,
        results: vec![None; options.devices.len()],
        unacknowledged: HashMap::new(),
        words,
        say,
        is_old: false,
    };
    let due = round.run().await?;
    Ok(Done { results: round.results(), due, list: round.list })
}

/// What came of a round.
struct Done {
    results: Results,
    /// When the next device's turn is.
    due: Option<Timestamp>,
    /// The list it was about.
    list: Option<Digest>,
}

/// All devices while they are updated.
struct Round<'a, O> {
    options: &'a Options,
    agent: ureq::Agent,
    offer: Offer,
    list: Option<Digest>,
    link: &'a mut Link,
    observer: &'a mut O,
    results: Vec<Option<Became>>,
    /// The topics of what the broker has not acknowledged yet.
    unacknowledged: HashMap<u64, String>,
    words: mpsc::Receiver<Word>,
    say: mpsc::Sender<Word>,
    /// Whether the channel has another list meanwhile: nobody is begun with.
    is_old: bool,
}

/// What a task came to.
enum Task {
    Greeted(Result<Seen, String>),
    Visited(Became),
}

impl<O: Observer> Round<'_, O> {
    /// Looks at every device, then updates those whose turn it is, and waits for those whose turn comes soon. When the next
    /// of the others is due.
    async fn run(&mut self) -> Result<Option<Timestamp>, PushError> {
        let mut greet: VecDeque<usize> = (0..self.options.devices.len()).collect();
        let mut turns: BTreeSet<(Timestamp, u32, usize)> = BTreeSet::new();
        let mut tasks: JoinSet<(usize, Task)> = JoinSet::new();
        let (mut greeting, mut updating, mut failures) = (0, 0, 0);
        let began = now();
        let patience = began.checked_add(self.options.wait).unwrap_or(Timestamp::MAX);
        loop {
            while greeting < limits::PUSH_GREETINGS
                && let Some(index) = greet.pop_front()
            {
                let (agent, url) = (self.agent.clone(), self.options.devices[index].url.clone());
                tasks.spawn(async move { (index, Task::Greeted(look(&agent, &url).await)) });
                greeting += 1;
            }
            if self.options.max_failures.is_some_and(|most| failures > most) {
                for (.., index) in std::mem::take(&mut turns) {
                    self.results[index] = Some(Became::Left);
                }
            }
            let mut next = None;
            if greeting == 0 && !self.is_old {
                while updating < self.options.parallel
                    && let Some((at, _, index)) = turns.first().copied()
                    && at <= now()
                {
                    turns.pop_first();
                    updating += 1;
                    let visit = self.visit(index);
                    tasks.spawn(async move { (index, Task::Visited(visit.update().await)) });
                }
                let first = turns.first().map(|(at, ..)| *at);
                next = first.filter(|at| updating < self.options.parallel && *at <= patience);
            }
            if tasks.is_empty() && next.is_none() {
                break;
            }
            let pause = next.map_or(limits::SILENCE, |at| at.duration_since(now()).unsigned_abs());
            tokio::select! {
                Some(word) = self.words.recv() => self.hear(word)?,
                Some(done) = tasks.join_next() => {
                    let (index, task) = match done {
                        Ok(done) => done,
                        Err(stopped) => std::panic::resume_unwind(stopped.into_panic()),
                    };
                    let became = match task {
                        Task::Greeted(seen) => {
                            greeting -= 1;
                            match self.greeted(index, seen)? {
                                Ok(turn) => {
                                    // Of those whose turn it is, none comes first because it answered first.
                                    let turn = if turn <= now() { began } else { turn };
                                    turns.insert((turn, self.offer.position(&self.options.devices[index]), index));
                                    continue;
                                }
                                Err(became) => became,
                            }
                        }
                        Task::Visited(became) => {
                            updating -= 1;
                            became
                        }
                    };
                    failures += usize::from(matches!(became, Became::Failed { .. }));
                    self.results[index] = Some(became);
                }
                signal = self.link.next_within(pause) => self.noted(signal?)?,
            }
        }
        let due = turns.first().map(|(at, ..)| *at);
        for (at, _, index) in turns {
            self.results[index] = Some(Became::Held { until: Some(at) });
        }
        // What the devices said last is still to be told.
        while let Ok(word) = self.words.try_recv() {
            self.hear(word)?;
        }
        while !self.unacknowledged.is_empty() {
            let signal = self.link.next().await?;
            self.noted(Some(signal))?;
        }
        Ok(due)
    }

    /// A device said what it is, or did not. When its turn is, or what has become of it.
    fn greeted(
        &mut self,
        index: usize,
        seen: Result<Seen, String>,
    ) -> Result<Result<Timestamp, Became>, PushError> {
        let target = &self.options.devices[index];
        let seen = match seen {
            Ok(seen) => seen,
            Err(reason) => {
                // What it ran when it was last seen, nobody takes back.
                self.keep(&target.node, NodeSubject::Online, b"0".to_vec())?;
                return Ok(Err(Became::Failed { reason }));
            }
        };
        let info = match seen.info(target, &self.options.channel) {
            Ok(info) => info,
            Err(error) => return Ok(Err(Became::Failed { reason: error.to_string() })),
        };
        self.keep(&target.node, NodeSubject::Info, info.to_bytes())?;
        self.keep(&target.node, NodeSubject::Online, b"1".to_vec())?;
        let Some(image) = choose(&self.offer.images, &seen.key) else {
            let became = Became::NoImage { key: seen.key.clone() };
            let state = state(Some(&seen), "", None, Some(&became));
            self.keep(&target.node, NodeSubject::State, state.to_bytes())?;
            return Ok(Err(became));
        };
        let wanted = image.version.clone();
        let now = now();
        let turn = match seen.is_newest(&wanted) && !seen.is_busy() {
            true => Err(Became::UpToDate { version: seen.version.clone() }),
            false => match self.offer.turn(target, &info, self.options.orders, now) {
                Turn::At(at) => Ok(at),
                Turn::Never => Err(Became::Held { until: None }),
            },
        };
        let became = match &turn {
            Ok(at) if *at <= now => return Ok(turn),
            Ok(at) => Became::Held { until: Some(*at) },
            Err(became) => became.clone(),
        };
        let state = state(Some(&seen), &wanted, self.offer.sequence, Some(&became));
        self.keep(&target.node, NodeSubject::State, state.to_bytes())?;
        Ok(turn)
    }

    fn visit(&self, index: usize) -> Visit {
        Visit {
            target: self.options.devices[index].clone(),
            channel: self.options.channel.clone(),
            images: self.offer.images.clone().into(),
            sequence: self.offer.sequence,
            gateway: self.options.gateway.clone(),
            timeout: self.options.timeout,
            agent: self.agent.clone(),
            say: self.say.clone(),
            shown: None,
        }
    }

    fn hear(&mut self, word: Word) -> Result<(), PushError> {
        match word {
            Word::Keep(node, subject, payload) => self.keep(&node, subject, payload)?,
            Word::Told(node, text) => self.observer.device(&node, &text),
        }
        Ok(())
    }

    fn keep(&mut self, node: &NodeId, subject: NodeSubject, payload: Vec<u8>) -> Result<(), PushError> {
        let topic = node.topic(subject);
        let number = self.link.publish(&topic, Bytes::from(payload))?;
        self.unacknowledged.insert(number, topic);
        Ok(())
    }

    fn noted(&mut self, signal: Option<Signal>) -> Result<(), PushError> {
        match signal {
            Some(Signal::Acknowledged(number, result)) => {
                let topic = self.unacknowledged.remove(&number);
                if let (Some(topic), Err(refusal)) = (topic, result) {
                    return Err(PushError::NotAllowed { topic, reason: refusal.to_string() });
                }
            }
            Some(Signal::Message { topic, payload }) if topic == self.options.channel.topic() => {
                self.is_old |= self.list != Some(Digest::of(&payload));
            }
            _ => {}
        }
        Ok(())
    }

    fn results(&mut self) -> Results {
        let nodes = self.options.devices.iter().map(|target| target.node.clone());
        // Everybody was greeted, at least.
        nodes.zip(self.results.drain(..).map(|became| became.unwrap_or(Became::Left))).collect()
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the driver's clock")]
fn now() -> Timestamp {
    Timestamp::now()
}
