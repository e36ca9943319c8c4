//! What is known of all nodes, channels and rollouts: news and time in, answers out. No I/O, no clock.
//!
//! Each change has a number. Of each node, channel and rollout only the last change is kept in the order of all, so who
//! reads on from a number gets every last state, however far behind it is, and costs nothing meanwhile.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use mpypi_protocol::{
    ChannelName, NodeId, Root, UpdateList,
    node::{Info, Phase, State},
    record::{Counts, Heard, Record, Standing, Step},
    topic::{NodeSubject, RolloutSubject},
};
use serde_json::Value;

use super::{limits, log::Log};

/// How many words there are for where a node's update stands.
pub const WORDS: usize = 9;

/// Where a node's update stands, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Word {
    /// See [`Phase::Idle`].
    Idle,
    /// See [`Phase::Downloading`].
    Downloading,
    /// See [`Phase::Verifying`].
    Verifying,
    /// See [`Phase::Installing`].
    Installing,
    /// See [`Phase::Restarting`].
    Restarting,
    /// See [`Phase::Confirming`].
    Confirming,
    /// See [`Phase::Failed`].
    Failed,
    /// See [`Phase::RolledBack`].
    RolledBack,
    /// The node never said it, or in a way nobody can read.
    Unknown,
}

/// The same for the nodes of a release: how many stand where.
pub type Tally = [u64; WORDS];

/// A node, as far as it is known.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its name.
    pub id: NodeId,
    /// What it is and has. Of its packages, those of a node with Mpy-BLOX alone.
    pub info: Option<Info>,
    /// Where its update stands.
    pub state: Option<State>,
    /// Whether it is connected; `None` if it never said so.
    pub online: Option<bool>,
    /// When something new was last heard of it, in milliseconds since 1970; `None`: not since the broker started.
    pub changed: Option<u64>,
    /// Its updates since the broker started, the oldest first.
    pub updates: VecDeque<Update>,
    /// The number of its last change.
    number: u64,
    /// The versions in the index of what was heard of it: info, state, online.
    versions: [u64; 3],
}

/// An attempt of a node to update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// To which release.
    pub sequence: Option<u64>,
    /// Its version.
    pub version: Option<String>,
    /// Which attempt, from 1.
    pub attempt: u32,
    /// Bytes that it needs.
    pub total: u64,
    /// Why it ended otherwise than it should have.
    pub error: Option<String>,
    /// Its phases, and when it came to each, in milliseconds since 1970.
    pub steps: Vec<(Phase, u64)>,
}

/// What the nodes of one release have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Release {
    /// The channel that they follow.
    pub channel: Option<ChannelName>,
    /// The release's sequence.
    pub sequence: Option<u64>,
    /// The release's version.
    pub version: Option<String>,
}

/// A channel's list.
#[derive(Debug, Clone)]
pub struct Channel {
    /// The channel.
    pub name: ChannelName,
    /// Its list.
    pub list: Arc<UpdateList>,
    /// The digest of the list's payload.
    pub digest: mpypi_protocol::Digest,
    /// Bytes of all its packages.
    pub size: u64,
}

/// A channel's rollout.
#[derive(Debug, Clone)]
pub struct Rollout {
    /// What is retained of it.
    pub record: Record,
    /// How its nodes stood when that was last looked at.
    pub counts: Counts,
}

/// What is new.
#[derive(Debug)]
pub enum News {
    /// A node said what it is and has; `None`: nothing is retained of that any more, or nothing readable.
    Info(NodeId, Option<Box<Info>>),
    /// A node said where its update stands.
    State(NodeId, Option<Box<State>>),
    /// A node came or went.
    Online(NodeId, Option<bool>),
    /// A channel has another list.
    Channel(ChannelName, Option<Channel>),
    /// A root of trust is retained.
    Root(Arc<Root>),
    /// A rollout stands otherwise.
    Record(ChannelName, Option<Box<Record>>),
    /// Somebody steers a rollout, or nobody any more.
    Lease(ChannelName, bool),
}

/// Whether news happened now, or was found in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heed {
    /// It happens now.
    Live,
    /// It was there already.
    Found,
}

/// Something that changed, in its last state.
#[derive(Debug, Clone)]
pub enum Change {
    /// A node.
    Node(Arc<Node>),
    /// Nothing is retained of a node any more.
    NodeGone(NodeId),
    /// A channel.
    Channel(ChannelName),
    /// A rollout.
    Rollout(ChannelName),
    /// Nothing is retained of a rollout any more.
    RolloutGone(ChannelName),
    /// How many nodes stand where.
    Overview,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Subject {
    Node(NodeId),
    Channel(ChannelName),
    Rollout(ChannelName),
    Overview,
    /// The one of that name is gone; it may be back under a later number.
    NodeGone(NodeId),
    RolloutGone(ChannelName),
}

/// How many nodes stood where at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// All nodes.
    pub nodes: u64,
    /// Those connected.
    pub online: u64,
    /// Where their updates stood.
    pub phases: Tally,
    /// On which releases, those with most nodes first; at most [`limits::SAMPLE_RELEASES`].
    pub releases: Vec<(Arc<Release>, u64)>,
}

/// All of it.
#[derive(Debug)]
pub struct View {
    nodes: BTreeMap<NodeId, Arc<Node>>,
    channels: BTreeMap<ChannelName, Channel>,
    rollouts: BTreeMap<ChannelName, Rollout>,
    leases: BTreeMap<ChannelName, bool>,
    root: Option<Arc<Root>>,
    /// The number of the last change.
    number: u64,
    /// Each subject once, at its last change.
    changes: BTreeMap<u64, Subject>,
    /// Where channels, rollouts and the overview are in `changes`.
    places: HashMap<String, u64>,
    /// Where in `changes` are those that are gone, the oldest first.
    gone: VecDeque<u64>,
    /// Who has read no further than this may have missed that something is gone.
    forgotten: u64,
    tallies: BTreeMap<Arc<Release>, Tally>,
    online: u64,
    /// Nodes that stand failed or rolled back now, by reason.
    failing: BTreeMap<String, u64>,
    /// Failures since the broker started, by reason.
    failures: BTreeMap<String, u64>,
    samples: VecDeque<Sample>,
    /// The last change that the overview counted.
    counted: u64,
    /// What nodes logged.
    pub log: Log,
}

impl Word {
    /// All words, in their order.
    pub const ALL: [Word; WORDS] = [
        Word::Idle,
        Word::Downloading,
        Word::Verifying,
        Word::Installing,
        Word::Restarting,
        Word::Confirming,
        Word::Failed,
        Word::RolledBack,
        Word::Unknown,
    ];

    /// The word, as in a node's state.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Word::Idle => "idle",
            Word::Downloading => "downloading",
            Word::Verifying => "verifying",
            Word::Installing => "installing",
            Word::Restarting => "restarting",
            Word::Confirming => "confirming",
            Word::Failed => "failed",
            Word::RolledBack => "rolled_back",
            Word::Unknown => "unknown",
        }
    }
}

impl From<Phase> for Word {
    fn from(phase: Phase) -> Word {
        match phase {
            Phase::Idle => Word::Idle,
            Phase::Downloading => Word::Downloading,
            Phase::Verifying => Word::Verifying,
            Phase::Installing => Word::Installing,
            Phase::Restarting => Word::Restarting,
            Phase::Confirming => Word::Confirming,
            Phase::Failed => Word::Failed,
            Phase::RolledBack => Word::RolledBack,
        }
    }
}

/// The stable word that an error of a node's state starts with; `other` for what is none.
#[must_use]
pub fn reason(error: &str) -> &str {
    let word = error.split(':').next().unwrap_or_default().trim();
    let is_word =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
    match (1..=limits::REASON).contains(&word.len()) && word.bytes().all(is_word) {
        true => word,
        false => limits::OTHER,
    }
}

impl Node {
    fn new(id: NodeId) -> Node {
        let (updates, versions) = (VecDeque::new(), [0; 3]);
        Node { id, info: None, state: None, online: None, changed: None, updates, number: 0, versions }
    }

    /// What was heard of it.
    #[must_use]
    pub fn heard(&self) -> Heard<'_> {
        Heard { info: self.info.as_ref(), state: self.state.as_ref(), online: self.online }
    }

    /// Where its update stands.
    #[must_use]
    pub fn word(&self) -> Word {
        self.state.as_ref().map_or(Word::Unknown, |state| state.phase.into())
    }

    /// The release that this is about.
    #[must_use]
    pub fn release(&self) -> Release {
        let state = self.state.as_ref();
        Release {
            channel: self.heard().channel(),
            sequence: state.and_then(|state| state.sequence),
            version: state.and_then(|state| state.version.clone()),
        }
    }

    /// The stable word for why its last update came to nothing, if it stands so.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        let state = self.state.as_ref()?;
        let error = state.error.as_deref();
        let is_bad = matches!(state.phase, Phase::Failed | Phase::RolledBack);
        (is_bad || error.is_some()).then(|| reason(error.unwrap_or_default()))
    }

    /// The reason, if its phase says that its update came to nothing.
    fn failure(&self) -> Option<&str> {
        self.reason().filter(|_| matches!(self.word(), Word::Failed | Word::RolledBack))
    }

    fn is_nothing(&self) -> bool {
        self.info.is_none() && self.state.is_none() && self.online.is_none()
    }

    /// Notes how its update goes on.
    fn note(&mut self, before: Option<&State>, now: u64) {
        let Some(state) = &self.state else { return };
        let is_same = |update: &Update| {
            (update.sequence, update.attempt) == (state.sequence, state.attempt) && !update.is_over()
        };
        if !self.updates.back().is_some_and(is_same) {
            let moved = before.is_none_or(|before| {
                (before.sequence, before.attempt, before.phase)
                    != (state.sequence, state.attempt, state.phase)
            });
            if !moved {
                return;
            }
            self.updates.push_back(Update {
                sequence: state.sequence,
                version: None,
                attempt: state.attempt,
                total: 0,
                error: None,
                steps: Vec::new(),
            });
            if self.updates.len() > limits::UPDATES {
                self.updates.pop_front();
            }
        }
        let Some(update) = self.updates.back_mut() else { return };
        update.version.clone_from(&state.version);
        update.total = update.total.max(state.total);
        update.error.clone_from(&state.error);
        let is_new = update.steps.last().is_none_or(|(phase, _)| *phase != state.phase);
        if is_new && update.steps.len() < limits::STEPS {
            update.steps.push((state.phase, now));
        }
    }
}

impl Update {
    /// Whether nothing more comes of it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.steps.last(), Some((Phase::Idle | Phase::Failed | Phase::RolledBack, _)))
    }
}

impl Default for View {
    fn default() -> View {
        View {
            nodes: BTreeMap::new(),
            channels: BTreeMap::new(),
            rollouts: BTreeMap::new(),
            leases: BTreeMap::new(),
            root: None,
            number: 0,
            changes: BTreeMap::new(),
            places: HashMap::new(),
            gone: VecDeque::new(),
            forgotten: 0,
            tallies: BTreeMap::new(),
            online: 0,
            failing: BTreeMap::new(),
            failures: BTreeMap::new(),
            samples: VecDeque::new(),
            counted: 0,
            log: Log::default(),
        }
    }
}

impl View {
    /// Takes in what is new, which has this version in the index, at `now`, in milliseconds since 1970.
    pub fn take(&mut self, news: News, version: u64, heed: Heed, now: u64) {
        match news {
            News::Info(id, info) => self.node(id, 0, version, heed, now, |node| {
                node.info = info.map(|info| lean(*info));
            }),
            News::State(id, state) => self.node(id, 1, version, heed, now, |node| {
                node.state = state.map(|mut state| {
                    state.extra.retain(|key, _| key == "channel" || key == "by");
                    *state
                });
            }),
            News::Online(id, online) => {
                self.node(id, 2, version, heed, now, |node| node.online = online);
            }
            News::Channel(name, channel) => {
                match channel {
                    Some(channel) => drop(self.channels.insert(name.clone(), channel)),
                    None => drop(self.channels.remove(&name)),
                }
                self.touch(Subject::Channel(name.clone()));
                self.recount(&name);
            }
            News::Root(root) => {
                if self.root.as_ref().is_none_or(|known| known.version() < root.version()) {
                    self.root = Some(root);
                    let channels: Vec<_> = self.channels.keys().cloned().collect();
                    channels.into_iter().for_each(|name| self.touch(Subject::Channel(name)));
                }
            }
            News::Record(name, Some(record)) => {
                let rollout = Rollout { record: *record, counts: Counts::default() };
                self.rollouts.insert(name.clone(), rollout);
                self.recount(&name);
                self.touch(Subject::Rollout(name));
            }
            News::Record(name, None) => {
                if self.rollouts.remove(&name).is_some() {
                    if let Some(place) = self.places.remove(&place(&Subject::Rollout(name.clone()))) {
                        self.changes.remove(&place);
                    }
                    self.bury(Subject::RolloutGone(name));
                }
            }
            News::Lease(name, is_held) => {
                if self.leases.insert(name.clone(), is_held).unwrap_or_default() != is_held
                    && self.rollouts.contains_key(&name)
                {
                    self.touch(Subject::Rollout(name));
                }
            }
        }
    }

    /// Forgets what is not retained any more of nodes and rollouts: `is_there` knows the topics that are.
    pub fn keep_only(&mut self, is_there: impl Fn(&str) -> bool, now: u64) {
        let mut lost = Vec::new();
        for (id, node) in &self.nodes {
            for (at, subject) in
                [NodeSubject::Info, NodeSubject::State, NodeSubject::Online].into_iter().enumerate()
            {
                if !is_there(&id.topic(subject)) {
                    let id = id.clone();
                    let news = match subject {
                        NodeSubject::Info => News::Info(id, None),
                        NodeSubject::State => News::State(id, None),
                        _ => News::Online(id, None),
                    };
                    lost.push((news, node.versions[at]));
                }
            }
        }
        for name in self.rollouts.keys() {
            if !is_there(&name.rollout(RolloutSubject::Record)) {
                lost.push((News::Record(name.clone(), None), 0));
            }
        }
        for name in self.leases.keys() {
            if !is_there(&name.rollout(RolloutSubject::Lease)) {
                lost.push((News::Lease(name.clone(), false), 0));
            }
        }
        for (news, version) in lost {
            self.take(news, version, Heed::Found, now);
        }
    }

    fn node(
        &mut self,
        id: NodeId,
        subject: usize,
        version: u64,
        heed: Heed,
        now: u64,
        change: impl FnOnce(&mut Node),
    ) {
        let before = self.nodes.get(&id).cloned();
        let mut node = before.clone().unwrap_or_else(|| Arc::new(Node::new(id.clone())));
        // What was found in the index may be newer than what is still on its way here.
        if version < node.versions[subject] {
            return;
        }
        let node_mut = Arc::make_mut(&mut node);
        change(node_mut);
        node_mut.versions[subject] = version;
        let is_new = before.as_ref().is_none_or(|before| {
            (&before.info, &before.state, before.online) != (&node.info, &node.state, node.online)
        });
        if node.is_nothing() {
            return self.forget(&id);
        }
        if !is_new {
            self.nodes.insert(id, node);
            return;
        }
        if heed == Heed::Live {
            let before = before.as_ref().and_then(|before| before.state.as_ref());
            let node = Arc::make_mut(&mut node);
            node.changed = Some(now);
            if before != node.state.as_ref() {
                let key = |state: &State| (state.phase, state.sequence, state.attempt);
                let is_news = before.map(key) != node.state.as_ref().map(key);
                node.note(before, now);
                if let Some(reason) = node.failure().filter(|_| is_news) {
                    count(&mut self.failures, reason);
                }
            }
        }
        if let Some(before) = &before {
            self.tally(before, false);
            self.changes.remove(&before.number);
        }
        self.tally(&node, true);
        self.number += 1;
        Arc::make_mut(&mut node).number = self.number;
        self.changes.insert(self.number, Subject::Node(id.clone()));
        self.nodes.insert(id, node);
    }

    fn forget(&mut self, id: &NodeId) {
        let Some(node) = self.nodes.remove(id) else { return };
        self.tally(&node, false);
        self.changes.remove(&node.number);
        self.log.forget(id);
        self.bury(Subject::NodeGone(id.clone()));
    }

    /// Adds a node to what is counted, or takes it out.
    fn tally(&mut self, node: &Node, is_in: bool) {
        let release = Arc::new(node.release());
        let word = node.word() as usize;
        match is_in {
            true => self.tallies.entry(release).or_default()[word] += 1,
            false => {
                if let Some(tally) = self.tallies.get_mut(&release) {
                    tally[word] = tally[word].saturating_sub(1);
                    if *tally == Tally::default() {
                        self.tallies.remove(&release);
                    }
                }
            }
        }
        if node.online == Some(true) {
            self.online = if is_in { self.online + 1 } else { self.online.saturating_sub(1) };
        }
        if let Some(reason) = node.failure() {
            match is_in {
                true => count(&mut self.failing, reason),
                false => {
                    let known = if self.failing.contains_key(reason) { reason } else { limits::OTHER };
                    if let Some(nodes) = self.failing.get_mut(known) {
                        *nodes = nodes.saturating_sub(1);
                    }
                    self.failing.retain(|_, nodes| *nodes > 0);
                }
            }
        }
    }

    /// Puts a subject at the end of all changes.
    fn touch(&mut self, subject: Subject) {
        self.number += 1;
        if let Some(before) = self.places.insert(place(&subject), self.number) {
            self.changes.remove(&before);
        }
        self.changes.insert(self.number, subject);
    }

    fn bury(&mut self, subject: Subject) {
        self.number += 1;
        self.changes.insert(self.number, subject);
        self.gone.push_back(self.number);
        if self.gone.len() > limits::GONE
            && let Some(oldest) = self.gone.pop_front()
        {
            self.changes.remove(&oldest);
            self.forgotten = oldest;
        }
    }

    fn recount(&mut self, channel: &ChannelName) {
        let counts = self.counts(channel);
        if let (Some(rollout), Some(counts)) = (self.rollouts.get_mut(channel), counts)
            && rollout.counts != counts
        {
            rollout.counts = counts;
            self.touch(Subject::Rollout(channel.clone()));
        }
    }

    /// How the nodes of a channel's rollout stand now.
    #[must_use]
    pub fn counts(&self, channel: &ChannelName) -> Option<Counts> {
        let (rollout, channel) = (self.rollouts.get(channel)?, self.channels.get(channel)?);
        let step = Step::new(&rollout.record, &channel.list);
        let mut counts = Counts::default();
        let standing =
            |node: &Arc<Node>| -> Option<Standing> { step.standing(node.id.as_str(), node.heard()) };
        self.nodes.values().filter_map(standing).for_each(|standing| counts.add(standing));
        Some(counts)
    }

    /// Looks at what many small changes come to: once in [`limits::TICK`]. `samples`: whether it is time for one.
    pub fn tick(&mut self, now: u64, samples: bool) {
        if self.number != self.counted {
            let under_way: Vec<_> = self.rollouts.keys().cloned().collect();
            for channel in under_way {
                self.recount(&channel);
            }
            self.touch(Subject::Overview);
            self.counted = self.number;
        }
        if samples {
            let sample = self.sample(now);
            let is_same = |last: &Sample| Sample { at: sample.at, ..last.clone() } == sample;
            if !self.samples.back().is_some_and(is_same) {
                self.samples.push_back(sample);
                if self.samples.len() > limits::SAMPLES {
                    self.samples.pop_front();
                }
            }
        }
    }

    fn sample(&self, at: u64) -> Sample {
        let mut releases: Vec<_> =
            self.releases().map(|(release, tally)| (release.clone(), tally.iter().sum::<u64>())).collect();
        releases.sort_by(|(one, few), (other, many)| many.cmp(few).then_with(|| one.cmp(other)));
        releases.truncate(limits::SAMPLE_RELEASES);
        Sample { at, nodes: self.nodes.len() as u64, online: self.online, phases: self.phases(), releases }
    }

    /// The number of the last change.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// What changed after the change of this number, in order and each with its number, at most `most`; `None` if what
    /// is gone since is no longer known.
    #[must_use]
    pub fn since(&self, number: u64, most: usize) -> Option<Vec<(u64, Change)>> {
        if number < self.forgotten || number > self.number {
            return None;
        }
        let all = self.changes.range(number.saturating_add(1)..).take(most);
        let change = |(number, subject): (&u64, &Subject)| {
            let change = match subject {
                Subject::Node(id) => Change::Node(self.nodes.get(id)?.clone()),
                Subject::Channel(name) => Change::Channel(name.clone()),
                Subject::Rollout(name) => Change::Rollout(name.clone()),
                Subject::Overview => Change::Overview,
                Subject::NodeGone(id) => Change::NodeGone(id.clone()),
                Subject::RolloutGone(name) => Change::RolloutGone(name.clone()),
            };
            Some((*number, change))
        };
        Some(all.filter_map(change).collect())
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// How many nodes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// One node.
    #[must_use]
    pub fn find(&self, id: &NodeId) -> Option<&Arc<Node>> {
        self.nodes.get(id)
    }

    /// All channels that somebody published to, by name.
    pub fn channels(&self) -> impl Iterator<Item = &Channel> {
        self.channels.values()
    }

    /// One of them.
    #[must_use]
    pub fn channel(&self, name: &ChannelName) -> Option<&Channel> {
        self.channels.get(name)
    }

    /// The newest root of trust.
    #[must_use]
    pub fn root(&self) -> Option<&Root> {
        self.root.as_deref()
    }

    /// How many nodes follow each channel.
    #[must_use]
    pub fn followers(&self) -> HashMap<&ChannelName, u64> {
        let mut followers = HashMap::new();
        for (release, tally) in &self.tallies {
            if let Some(channel) = &release.channel {
                *followers.entry(channel).or_default() += tally.iter().sum::<u64>();
            }
        }
        followers
    }

    /// All rollouts, by their channels.
    pub fn rollouts(&self) -> impl Iterator<Item = &Rollout> {
        self.rollouts.values()
    }

    /// The rollout of a channel.
    #[must_use]
    pub fn rollout(&self, channel: &ChannelName) -> Option<&Rollout> {
        self.rollouts.get(channel)
    }

    /// Whether somebody steers the rollout of a channel.
    #[must_use]
    pub fn is_steered(&self, channel: &ChannelName) -> bool {
        self.leases.get(channel).copied().unwrap_or_default()
    }

    /// How many nodes are connected.
    #[must_use]
    pub fn online(&self) -> u64 {
        self.online
    }

    /// How many nodes stand where.
    #[must_use]
    pub fn phases(&self) -> Tally {
        self.tallies
            .values()
            .fold(Tally::default(), |sum, tally| std::array::from_fn(|at| sum[at] + tally[at]))
    }

    /// How many nodes of each release stand where.
    pub fn releases(&self) -> impl Iterator<Item = (&Arc<Release>, &Tally)> {
        self.tallies.iter()
    }

    /// How many nodes' channels have a newer release than theirs.
    #[must_use]
    pub fn behind(&self) -> u64 {
        let is_behind = |(release, _): &(&Arc<Release>, &Tally)| self.is_behind(release);
        self.tallies.iter().filter(is_behind).map(|(_, tally)| tally.iter().sum::<u64>()).sum()
    }

    /// Whether a release's channel has a newer one.
    #[must_use]
    pub fn is_behind(&self, release: &Release) -> bool {
        let channel = release.channel.as_ref().and_then(|channel| self.channels.get(channel));
        let present = channel.and_then(|channel| channel.list.release());
        present.is_some_and(|present| release.sequence.is_none_or(|sequence| sequence < present.sequence))
    }

    /// How many nodes stand failed or rolled back now, by reason.
    #[must_use]
    pub fn failing(&self) -> &BTreeMap<String, u64> {
        &self.failing
    }

    /// How often updates came to nothing since the broker started, by reason.
    #[must_use]
    pub fn failures(&self) -> &BTreeMap<String, u64> {
        &self.failures
    }

    /// How many nodes stood where over time.
    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.samples.iter()
    }
}

/// What is needed of what a node said.
fn lean(mut info: Info) -> Info {
    info.extra.retain(|key, value| key == "mpy" && matches!(value, Value::Number(_)));
    if !info.is_mpyblox() {
        info.versions.clear();
    }
    info
}

/// Counts one more for a reason; beyond so many, for none in particular.
fn count(reasons: &mut BTreeMap<String, u64>, reason: &str) {
    let is_known = reasons.contains_key(reason) || reasons.len() < limits::REASONS;
    *reasons.entry(if is_known { reason } else { limits::OTHER }.to_owned()).or_default() += 1;
}

/// What tells a channel, a rollout and the overview apart.
fn place(subject: &Subject) -> String {
    match subject {
        Subject::Channel(name) => format!("channel {name}"),
        Subject::Rollout(name) => format!("rollout {name}"),
        _ => String::new(),
    }
}
