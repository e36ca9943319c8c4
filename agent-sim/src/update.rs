//! The update, as a state machine: events and time in, effects out. No file, no socket, no clock.
//!
//! ```text
//! Idle → Downloading → Verifying → Installing → Restarting → Confirming → Idle
//!             ↓ ↑            ↓                                    ↓
//!          (pause)         Failed                             RolledBack
//! ```
//! Times are durations since any fixed start.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Digest, Entry, NodeId, Rollout, Root, Runtime, Trust, UpdateList,
    list::Command,
    node::{Phase, State},
    query::Facts,
    rollout::{Consent, Moment, RolloutId},
    root::{self, SignedRoot},
    topic::NodeSubject,
};

use crate::{
    accept::Accepted,
    backoff::Backoff,
    device::{Agent, FIRMWARE, Traits},
    journal::{Refused, Seen},
    limits,
    refusal::{Refusal, Verdict},
    store::{Boot, Need, Staged},
    window::{Item, Window},
};

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// The device started, or started again.
    Booted(Box<Start>),
    /// There is a connection to the broker.
    Connected,
    /// There is none any more.
    Disconnected,
    /// A list arrived.
    List {
        /// How.
        source: Source,
        /// Its bytes.
        payload: Bytes,
        /// What the device's clock says, if it has one that is set.
        wall: Option<Timestamp>,
    },
    /// A root arrived.
    Root {
        /// As which number it is retained.
        number: u64,
        /// Its bytes.
        payload: Bytes,
    },
    /// A package arrived, or a chunk of one.
    Package {
        /// Which topic it came on.
        topic: String,
        /// Its bytes.
        payload: Bytes,
    },
    /// The broker refused a subscription.
    SubscriptionRefused {
        /// Which.
        filter: String,
    },
    /// The store did what it was told to.
    Done(Answer),
    /// The store could not.
    Failed(Refusal),
    /// Somebody wants the newest firmware that fits; the update of packages has nothing to do with it.
    WantsFirmware,
    /// Somebody at the device chose what it is to have; not while a release is under way.
    Apply(Box<Accepted>),
    /// The application says that the new release works.
    Confirmed,
    /// Time has passed.
    Tick,
}

/// What a device knows when it starts.
#[derive(Debug)]
pub struct Start {
    /// What its store found.
    pub boot: Boot,
    /// What is installed.
    pub running: Running,
    /// The newest list accepted before.
    pub seen: Option<Seen>,
    /// The newest root verified before.
    pub root: Option<SignedRoot>,
}

/// How a list arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Retained, on the channel's topic.
    Channel,
    /// On the node's `cmd` topic, for this node alone.
    Cmd,
    /// Retained, in the channel's history, as that of this sequence.
    History(u64),
}

/// Which release runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Running {
    /// Its sequence.
    pub sequence: Option<u64>,
    /// Its version.
    pub version: Option<String>,
    /// The digest of its list.
    pub list: Option<Digest>,
    /// The rollout that its list was a step of.
    pub rollout: Option<RolloutId>,
    /// How many files of it are on the device.
    pub files: usize,
}

/// What is to be done.
#[derive(Debug)]
pub enum Effect {
    /// Subscribe, with at most [`SUBSCRIBE_FILTERS`](mpypi_protocol::limits::SUBSCRIBE_FILTERS) filters.
    Subscribe(Vec<String>),
    /// Unsubscribe, likewise.
    Unsubscribe(Vec<String>),
    /// Publish what the device is and has.
    Introduce,
    /// Publish where the update stands.
    Report(Report),
    /// Tell the store; its answer is the next event.
    Store(Action),
    /// Restart the device; the next event is [`Event::Booted`].
    Restart,
    /// Say something to people.
    Log(String),
    /// Count a list, a root or a release that was refused, by the word of its [`Refusal`].
    Count(String),
}

/// Where the update stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The state message.
    pub state: State,
    /// The list it is about, once one was judged.
    pub list: Option<Digest>,
    /// Bytes of all packages that the list has for this device, once it was looked at.
    pub size: Option<u64>,
}

/// What the store is told.
#[derive(Debug)]
pub enum Action {
    /// Note the newest list accepted.
    Remember(Seen),
    /// Keep a root that was verified.
    KeepRoot(Arc<Root>),
    /// Note that the list is not to be tried again.
    Refuse(String),
    /// Forget that.
    Forgive,
    /// Drop what was fetched.
    Discard,
    /// Say what must be fetched.
    Survey(Accepted),
    /// Verify a package, or a chunk of one, and keep it.
    Receive(Item, Bytes),
    /// Unpack, and work out what has to change.
    Stage(Accepted),
    /// Put the new release in place.
    Commit(Staged),
    /// Keep it.
    Confirm,
    /// Take it back at the next start.
    GiveUp(Refusal),
}

/// What the store did.
#[derive(Debug)]
pub enum Answer {
    /// Noted.
    Noted,
    /// The root is kept, or cannot be.
    RootKept(Result<Arc<Root>, Refusal>),
    /// What must be fetched.
    Surveyed(Vec<Need>),
    /// The package, or chunk, is verified.
    Received(Item),
    /// The release is verified.
    Staged(Staged),
    /// The release is in place, and the device has to restart.
    Committed,
    /// The release is what is installed.
    Kept(Running),
}

/// The times that the update goes by. [`Timing::default`] takes them from [`limits`].
#[derive(Debug, Clone)]
pub struct Timing {
    /// How long to wait for any package asked for.
    pub stall: Duration,
    /// How often a release is tried in a row.
    pub attempts: u32,
    /// The first and the longest pause between tries.
    pub retry: (Duration, Duration),
    /// How long a new release must run to be confirmed; `None`: the application has to say so.
    pub confirm_after: Option<Duration>,
    /// The shortest time between two reports of progress.
    pub progress: Duration,
    /// How often the channel's list is asked for although none came, about.
    pub check: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            stall: limits::FETCH_STALL,
            attempts: limits::ATTEMPTS,
            retry: (limits::RETRY_FIRST, limits::RETRY_MOST),
            confirm_after: Some(limits::CONFIRM_AFTER),
            progress: limits::PROGRESS,
            check: limits::CHECK,
        }
    }
}

/// The update of one device.
#[derive(Debug)]
pub struct Updater {
    node: NodeId,
    channel: ChannelName,
    trust: Trust,
    runtime: Runtime,
    agent: Agent,
    traits: Traits,
    cmd: String,
    timing: Timing,
    rng: fastrand::Rng,
    backoff: Backoff,
    connected: bool,
    /// Whether there are several addresses of its broker.
    several: bool,
    /// Whether the channel's list there is older than one that was seen.
    behind: bool,
    /// When to ask for the channel's list, while there is a connection.
    check_at: Duration,
    running: Running,
    seen: Option<Seen>,
    activity: Activity,
    /// Whether the channel's list only says what there is, and somebody at the device chooses.
    asks: bool,
    /// Whether somebody takes care of firmware.
    takes_firmware: bool,
    /// The newest list of the channel that the device may take.
    offer: Option<Accepted>,
    /// A list that is not to be applied, or not yet.
    held: Option<Held>,
    /// A list that came while a release was being put in place.
    queued: Option<Arrived>,
    /// The next list is to be compared with the device even if it is what is installed.
    recheck: bool,
    /// How often the list named here was tried.
    tried: Option<(Digest, u32)>,
    shown: Report,
    published: Option<(Report, Duration)>,
}

#[derive(Debug)]
enum Activity {
    /// Nothing to do; [`Updater::shown`] says why.
    Resting,
    /// The store looks what is missing.
    Surveying(Job),
    /// Packages are on their way.
    Fetching {
        job: Job,
        window: Window,
        stall_at: Duration,
        /// Connections lost since the last package came.
        losses: u32,
    },
    /// Trouble that may pass.
    Pausing { job: Job, until: Duration },
    /// The store unpacks and plans.
    Staging(Job),
    /// The store puts files in place.
    Committing(Job),
    /// The commit failed; the restart shows what became of it.
    Recovering { job: Job, refusal: Refusal },
    /// The device restarts.
    Restarting,
    /// The new release runs.
    Confirming { confirm_at: Option<Duration>, keeping: bool },
}

/// A list that is accepted and not applied: whose turn it is, it says itself.
#[derive(Debug)]
struct Held {
    release: Accepted,
    /// What it says; `None` if that cannot be read.
    rollout: Option<Rollout>,
    seen_at: Duration,
    /// What the device's clock said then.
    wall: Option<Timestamp>,
    /// Whether an operator ordered it.
    ordered: bool,
    /// When to look again.
    until: Option<Duration>,
    /// The base that was asked for.
    base: Option<u64>,
}

/// A list that came.
#[derive(Debug)]
struct Arrived {
    source: Source,
    payload: Bytes,
    at: Duration,
    wall: Option<Timestamp>,
}

#[derive(Debug, Clone)]
struct Job {
    release: Accepted,
    /// Tries in a row.
    tries: u32,
}

type Effects = Vec<Effect>;

impl Updater {
    /// The update of `node`, which runs `runtime`, following `channel`. `seed` decides the lengths of pauses.
    #[must_use]
    pub fn new(node: &NodeId, channel: ChannelName, runtime: Runtime, timing: Timing, seed: u64) -> Updater {
        let (first, most) = timing.retry;
        let state = State {
            phase: Phase::Idle,
            sequence: None,
            version: None,
            done: 0,
            total: 0,
            error: None,
            attempt: 0,
            held: None,
            extra: serde_json::Map::new(),
        };
        Updater {
            node: node.clone(),
            channel,
            trust: Trust::Anyone,
            runtime,
            agent: Agent::Current,
            traits: Traits::default(),
            cmd: node.topic(NodeSubject::Cmd),
            timing,
            rng: fastrand::Rng::with_seed(seed),
            backoff: Backoff::new(first, most),
            connected: false,
            several: false,
            behind: false,
            check_at: Duration::ZERO,
            running: Running::default(),
            seen: None,
            activity: Activity::Resting,
            asks: false,
            takes_firmware: false,
            offer: None,
            held: None,
            queued: None,
            recheck: false,
            tried: None,
            shown: Report { state, list: None, size: None },
            published: None,
        }
    }

    /// The same, beside which somebody takes care of firmware. If it `asks`, the channel's list is only noted: what it
    /// brings is installed when told to, by a list on `cmd` or [`Event::Apply`].
    #[must_use]
    pub fn asking(self, asks: bool) -> Updater {
        Updater { asks, takes_firmware: true, ..self }
    }

    /// The newest list of the channel that was accepted since the start, or [`recall`](Updater::recall)ed, where somebody
    /// chooses at the device.
    #[must_use]
    pub fn offer(&self) -> Option<&Accepted> {
        self.offer.as_ref()
    }

    /// Notes the list that was offered before the start, judged anew, until the channel's comes: whether it still is to be
    /// believed. It may be older than the newest list seen, which may be held; somebody must have signed it who may, and
    /// it must not have expired.
    pub fn recall(&mut self, payload: &[u8], wall: Option<Timestamp>) -> bool {
        let Ok(list) = UpdateList::parse(payload) else { return false };
        let time = self.time(&list, wall);
        let verified = self.trust.verify(&self.channel, payload, time).map_err(Refusal::from);
        let judge = |list| Accepted::judge(list, &self.channel, &self.runtime, None, time);
        self.offer = verified.and_then(judge).ok().filter(|_| self.takes_firmware);
        self.offer.is_some()
    }

    /// What is under way, if anything is.
    #[must_use]
    pub fn under_way(&self) -> Option<&Accepted> {
        self.job().map(|job| &job.release)
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_resting(&self) -> bool {
        matches!(self.activity, Activity::Resting)
    }

    /// Whether there is a connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// The same, which believes lists of nobody else. A root is where its walk begins, unless it got further before.
    #[must_use]
    pub fn believing(self, trust: Trust) -> Updater {
        Updater { trust, ..self }
    }

    /// The same on a device with another agent.
    #[must_use]
    pub fn of_agent(self, agent: Agent) -> Updater {
        Updater { agent, ..self }
    }

    /// The same, with several addresses of its broker. One of them may be behind the others: a list that is older than one
    /// that was seen is no failure there, and changes nothing.
    #[must_use]
    pub fn with_several(self, several: bool) -> Updater {
        Updater { several, ..self }
    }

    /// Whether the broker at which it is, one of several, has an older list than was seen before.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.behind
    }

    /// Tells the device about itself.
    pub fn set_traits(&mut self, traits: Traits) {
        self.traits = traits;
    }

    /// Where the update stands.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.shown
    }

    /// When to send [`Event::Tick`], at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let activity = match &self.activity {
            Activity::Fetching { stall_at, .. } if self.connected => Some(*stall_at),
            Activity::Pausing { until, .. } => Some(*until),
            Activity::Confirming { confirm_at, keeping: false, .. } => *confirm_at,
            _ => None,
        };
        let progress = match &self.published {
            Some((report, at)) if *report != self.shown => Some(*at + self.timing.progress),
            _ => None,
        };
        let check = self.connected.then_some(self.check_at);
        let turn = match self.activity {
            Activity::Resting => self.held.as_ref().and_then(|held| held.until),
            _ => None,
        };
        activity.into_iter().chain(progress).chain(check).chain(turn).min()
    }

    /// Takes an event in; says what is to be done, in this order.
    pub fn handle(&mut self, now: Duration, event: Event) -> Effects {
        let mut effects = Effects::new();
        let out = &mut effects;
        match event {
            Event::Booted(start) => self.booted(now, *start, out),
            Event::Connected => self.greet(now, out),
            Event::Disconnected => self.disconnected(out),
            Event::List { source, payload, wall } => self.list(now, source, payload, wall, out),
            Event::Root { number, payload } => self.root(number, &payload, out),
            Event::Package { topic, payload } => self.package(now, topic, payload, out),
            Event::SubscriptionRefused { filter } => self.subscription_refused(now, filter, out),
            Event::Done(answer) => self.done(now, answer, out),
            Event::Failed(refusal) => self.failed(now, refusal, out),
            Event::WantsFirmware => {}
            Event::Apply(release) => self.apply(*release, out),
            Event::Confirmed => self.keep(out),
            Event::Tick => self.tick(now, out),
        }
        if self.asks {
            self.take_queued(now, out);
        }
        self.publish(now, out);
        effects
    }

    fn booted(&mut self, now: Duration, start: Start, out: &mut Effects) {
        let Start { boot, running, seen, root } = start;
        self.running = running;
        self.seen = seen;
        if let (Trust::Root(pinned), Some(root)) = (&self.trust, root)
            && root.draft().version > pinned.version()
        {
            self.trust = Trust::Root(Root::trusted(root).into());
        }
        // Whether it is its turn, the list says that comes next.
        self.held = None;
        let before = std::mem::replace(&mut self.activity, Activity::Resting);
        let recovers = matches!((&boot, &before), (Boot::Rest, Activity::Recovering { .. }));
        match (boot, before) {
            (Boot::Rest, Activity::Recovering { job, refusal }) => self.give_up(now, job, refusal, out),
            (Boot::Rest, _) => self.rest_on_running(),
            (Boot::Confirming { seen }, _) => {
                self.show_release(Phase::Confirming, &seen);
                let confirm_at = self.timing.confirm_after.map(|after| now + after);
                self.activity = Activity::Confirming { confirm_at, keeping: false };
            }
            (Boot::RolledBack { seen }, _) => self.rest_on_refused(&seen),
        }
        self.take_queued(now, out);
        // Truth is what is retained, not what came before the restart. A commit that failed has its tries: the
        // same list once more would give it new ones, for ever.
        if self.connected && !recovers {
            out.push(Effect::Introduce);
            self.ask_for_root(out);
            out.push(Effect::Subscribe(vec![self.channel.topic()]));
        }
    }

    /// Asks for the root after the present one, before the list that may need it. It stays asked for: a root that is
    /// published while the device is connected arrives by itself.
    fn ask_for_root(&self, out: &mut Effects) {
        if let Trust::Root(root) = &self.trust {
            out.push(Effect::Subscribe(vec![root::topic(root.version().saturating_add(1))]));
        }
    }

    fn root(&mut self, number: u64, payload: &Bytes, out: &mut Effects) {
        let Trust::Root(root) = &self.trust else { return };
        // Nothing is what a cleared topic says; an earlier number was asked for before.
        if payload.is_empty() || number <= root.version() {
            return;
        }
        match SignedRoot::parse(payload).and_then(|next| root.next(number, next)) {
            // It is on flash before it is believed: after a restart, too, nothing before it counts.
            Ok(next) => out.push(Effect::Store(Action::KeepRoot(next.into()))),
            Err(error) => {
                let refusal = Refusal::BadRoot(error);
                out.push(Effect::Count(refusal.word()));
                out.push(Effect::Log(format!("root {number} is refused: {}", refusal.text())));
                if matches!(self.activity, Activity::Resting) {
                    self.show_failed(&refusal);
                }
            }
        }
    }

    /// Goes on with a root that is kept.
    fn go_on_with(&mut self, root: Arc<Root>, out: &mut Effects) {
        out.push(Effect::Log(format!("root {} is believed from now on", root.version())));
        out.push(Effect::Unsubscribe(vec![root::topic(root.version())]));
        self.trust = Trust::Root(root);
        if self.connected {
            self.ask_for_root(out);
            // Whoever signed the newest list may do so no longer, or may do so now.
            out.push(Effect::Subscribe(vec![self.channel.topic()]));
        }
    }

    fn greet(&mut self, now: Duration, out: &mut Effects) {
        self.connected = true;
        self.check_later(now);
        self.published = None;
        out.push(Effect::Introduce);
        self.ask_for_root(out);
        out.push(Effect::Subscribe(vec![self.cmd.clone(), self.channel.topic()]));
        if let Activity::Fetching { window, stall_at, .. } = &mut self.activity {
            *stall_at = now + self.timing.stall;
            let topics = window.topics();
            if !topics.is_empty() {
                out.push(Effect::Subscribe(topics));
            }
        }
    }

    /// The list is what the broker retains; whether its last change arrived, only asking tells.
    fn check_later(&mut self, now: Duration) {
        self.check_at = now + self.timing.check.mul_f64(0.75 + self.rng.f64() / 2.0);
    }

    fn disconnected(&mut self, out: &mut Effects) {
        self.behind = false;
        self.connected = false;
        if let Activity::Fetching { losses, .. } = &mut self.activity {
            *losses += 1;
            if *losses >= self.timing.attempts {
                // The next connection brings the list, and with it another try.
                let refusal = Refusal::ConnectionLost { times: *losses };
                out.push(Effect::Log(refusal.text()));
                self.show_failed(&refusal);
                self.activity = Activity::Resting;
            }
        }
    }

    fn list(
        &mut self,
        now: Duration,
        source: Source,
        payload: Bytes,
        wall: Option<Timestamp>,
        out: &mut Effects,
    ) {
        if let Source::History(sequence) = source {
            return self.base(sequence, &payload, out);
        }
        let list = match UpdateList::parse(&payload) {
            Ok(list) => list,
            Err(_) if payload.is_empty() => {
                out.push(Effect::Log("the channel has no list any more; nothing changes".into()));
                return;
            }
            Err(error) => {
                self.refuse_list(&Refusal::BadList(error), None, Digest::of(&payload), out);
                return;
            }
        };
        // Orders need no signature: all they can do is to have the device look again, restart, or take back what it has
        // not confirmed.
        if source == Source::Cmd {
            for entry in list.entries() {
                if let Entry::Command(command, _) = entry {
                    self.command(now, *command, out);
                }
            }
            // Orders alone are no list: nothing is to be removed because of them.
            if list.release().is_none() && list.packages().next().is_none() {
                return;
            }
        }
        match self.activity {
            Activity::Resting
            | Activity::Surveying(_)
            | Activity::Fetching { .. }
            | Activity::Pausing { .. }
                if self.may_judge(source) =>
            {
                self.judge(now, list, &payload, source, (now, wall), out);
            }
            Activity::Resting
            | Activity::Surveying(_)
            | Activity::Fetching { .. }
            | Activity::Pausing { .. }
            | Activity::Staging(_)
            | Activity::Committing(_)
            | Activity::Recovering { .. }
            | Activity::Restarting
            | Activity::Confirming { .. } => self.queued = Some(Arrived { source, payload, at: now, wall }),
        }
    }

    /// What was chosen at the device is not given up for a list that only says what there is.
    fn may_judge(&self, source: Source) -> bool {
        !self.asks || source == Source::Cmd || matches!(self.activity, Activity::Resting)
    }

    fn apply(&mut self, release: Accepted, out: &mut Effects) {
        if !matches!(self.activity, Activity::Resting) {
            out.push(Effect::Log("not installing what was chosen: an update is under way".into()));
            return;
        }
        self.tried = None;
        self.backoff.reset();
        self.shown.state.done = 0;
        self.survey(Job { release, tries: 1 }, out);
    }

    fn command(&mut self, now: Duration, command: Command, out: &mut Effects) {
        match (command, &self.activity) {
            // Old agents pass over it, as over any entry that they do not know.
            (Command::Install, _) if self.agent == Agent::Old => {}
            (Command::Install, Activity::Resting) if self.held.is_some() => {
                if let Some(held) = &mut self.held {
                    held.ordered = true;
                }
                self.take_turn(now, out);
                if self.held.is_some() {
                    out.push(Effect::Log(
                        "not installing: the release is not for this node, or not yet".into(),
                    ));
                }
            }
            (Command::Install, _) => {
                out.push(Effect::Log("nothing to install: no release waits for an order".into()));
            }
            (Command::Check, _) => {
                self.recheck = true;
                self.tried = None;
                if let Some(seen) = &mut self.seen {
                    seen.refused = None;
                }
                out.push(Effect::Store(Action::Forgive));
                out.push(Effect::Subscribe(vec![self.channel.topic()]));
            }
            (Command::Rollback, Activity::Confirming { keeping: false, .. }) => {
                out.push(Effect::Store(Action::GiveUp(Refusal::ToldTo)));
                out.push(Effect::Restart);
                self.activity = Activity::Restarting;
            }
            (Command::Rollback, _) => {
                out.push(Effect::Log("nothing to roll back: no release waits for confirmation".into()));
            }
            (Command::Restart, Activity::Resting | Activity::Confirming { .. }) => {
                out.push(Effect::Restart);
                self.activity = Activity::Restarting;
            }
            (Command::Restart, _) => {
                out.push(Effect::Log("not restarting: an update is under way and will".into()));
            }
        }
    }

    /// What time it is when `list` is judged, as far as it is known: no earlier than the newest list was made. TUF 1.0,
    /// 5.3.11: the times of an earlier epoch are forgotten, they were perhaps a thief's.
    fn time(&self, list: &UpdateList, wall: Option<Timestamp>) -> Option<Timestamp> {
        let epoch = match &self.trust {
            Trust::Root(root) => root.delegation(&self.channel).map_or(0, |delegation| delegation.epoch),
            Trust::Anyone | Trust::Keys(_) => list.release().map_or(0, |release| release.epoch),
        };
        let seen = self.seen.as_ref().filter(|seen| seen.channel == self.channel && seen.epoch == epoch);
        wall.max(seen.and_then(|seen| seen.created))
    }

    /// Judges a list that came `at` a time, when the clock said `wall`.
    fn judge(
        &mut self,
        now: Duration,
        list: UpdateList,
        payload: &Bytes,
        source: Source,
        (at, wall): (Duration, Option<Timestamp>),
        out: &mut Effects,
    ) {
        let (digest, time) = (Digest::of(payload), self.time(&list, wall));
        let name = list.release().map(|release| (release.sequence, release.version.clone()));
        let empty = name.is_none() && list.packages().next().is_none();
        let verified = self.trust.verify(&self.channel, payload, time).map_err(Refusal::from);
        let accepted = verified.and_then(|verified| {
            let verified = match self.agent {
                Agent::Old => verified.to_old_readers(),
                Agent::Current | Agent::MpyBlox => verified,
            };
            Accepted::judge(verified, &self.channel, &self.runtime, self.seen.as_ref(), time)
        });
        if source == Source::Channel && self.several {
            self.behind = matches!(accepted, Err(Refusal::Older { .. } | Refusal::OldEpoch { .. }));
        }
        let release = match accepted {
            Ok(release) => release,
            Err(refusal) if self.behind => {
                out.push(Effect::Log(format!("this broker is behind others: {}", refusal.text())));
                return;
            }
            Err(refusal) => {
                // A new root took away the right to sign what is being fetched.
                if self.job().is_some_and(|job| job.release.digest() == digest) {
                    self.abandon(out);
                }
                return self.refuse_list(&refusal, name, digest, out);
            }
        };
        if self.job().is_some_and(|job| job.release.digest() == digest) {
            return;
        }
        if empty && self.running.files == 0 {
            // What a channel that nobody published to answers.
            self.abandon(out);
            self.held = None;
            self.rest_on_running();
            return;
        }
        if self.asks && source == Source::Channel {
            self.remember(&release, out);
            self.offer_in_turn(now, release, (at, wall), out);
            return;
        }
        if self.running.list == Some(digest) && !self.recheck {
            self.abandon(out);
            self.held = None;
            self.remember(&release, out);
            self.note_offer(release);
            // The same list once more, as after the restart, leaves what is told about its download.
            if self.shown.list != Some(digest) || self.shown.state.phase != Phase::Idle {
                self.rest_on_running();
                self.shown.list = Some(digest);
            }
            return;
        }
        if self.is_refused(&release) {
            self.abandon(out);
            self.held = None;
            // The next step of a rollout brings what the last one did.
            self.remember(&release, out);
            if let Some(seen) = self.seen.clone() {
                self.rest_on_refused(&seen);
            }
            return;
        }
        self.remember(&release, out);
        let before = self.held.take().filter(|held| held.release.digest() == digest);
        let held = match (before, release.rollout()) {
            (_, Ok(None)) => {
                self.note_offer(release.clone());
                return self.begin(release, out);
            }
            (Some(held), Ok(Some(_))) => Held { wall: held.wall.or(wall), ..held },
            (None, Ok(rollout)) => Held::new(release, rollout, at, wall),
            (_, Err(error)) => {
                let refusal = Refusal::BadRollout(error);
                out.push(Effect::Log(format!("a list is held: {}", refusal.text())));
                self.abandon(out);
                self.held = Some(Held::new(release, None, at, wall));
                self.rest_on_running();
                self.shown.state.error = Some(refusal.text());
                return;
            }
        };
        self.held = Some(held);
        self.take_turn(now, out);
    }

    /// Applies the list that is held if it is the node's turn now; sees to it that it is looked at again if it may be later.
    fn take_turn(&mut self, now: Duration, out: &mut Effects) {
        let Some(mut held) = self.held.take() else { return };
        match self.turn(now, &held) {
            Turn::Now => {
                self.note_offer(held.release.clone());
                return self.begin(held.release, out);
            }
            Turn::At(until) => held.until = Some(until),
            Turn::Never => held.until = None,
        }
        self.abandon(out);
        // A node without anything is of no use: meanwhile it takes what others had before.
        let base = held.rollout.as_ref().and_then(|rollout| rollout.base);
        let base = base.filter(|_| self.running.list.is_none() && self.running.files == 0);
        if let Some(base) = base {
            held.base = Some(base);
            out.push(Effect::Subscribe(vec![self.channel.history(base)]));
        }
        self.held = Some(held);
        self.rest_on_running();
    }

    /// Whether it is the node's turn to apply a list.
    fn turn(&self, now: Duration, held: &Held) -> Turn {
        // A bad release is left whoever's turn it is.
        if self.running.sequence.is_some_and(|running| held.release.revokes(running)) {
            return Turn::Now;
        }
        let Some(rollout) = &held.rollout else { return Turn::Never };
        let is_in = self.running.rollout.as_ref() == Some(&rollout.id);
        if !is_in && !rollout.admits(&self.facts()) {
            return Turn::Never;
        }
        if is_in || (rollout.consent == Consent::Ordered && !held.ordered) {
            return if is_in { Turn::Now } else { Turn::Never };
        }
        let since = now.saturating_sub(held.seen_at);
        let moment = Moment {
            since: since.as_secs(),
            wall: held.wall.and_then(|wall| wall.checked_add(since).ok()),
            utc_offset: self.traits.utc_offset.unwrap_or_default(),
        };
        let ordered = Rollout { window: None, jitter: 0, ..rollout.clone() };
        match (if held.ordered { &ordered } else { rollout }).wait(self.node.as_str(), moment) {
            0 => Turn::Now,
            // Seconds are whole: a fraction of one may be over already.
            seconds => Turn::At(held.seen_at + Duration::from_secs(since.as_secs() + seconds)),
        }
    }

    fn facts(&self) -> Facts<'_> {
        Facts {
            node: self.node.as_str().into(),
            runtime: Some(self.runtime.to_string().into()),
            channel: Some(self.channel.as_str().into()),
            version: self.running.version.as_deref().map(Into::into),
            sequence: self.running.sequence,
            agent: self.agent.said().map(Into::into),
            firmware: Some(FIRMWARE.into()),
            labels: std::borrow::Cow::Borrowed(&self.traits.labels),
        }
    }

    /// A list of the channel's history came: what a node without anything takes while it waits for its turn.
    fn base(&mut self, sequence: u64, payload: &Bytes, out: &mut Effects) {
        out.push(Effect::Unsubscribe(vec![self.channel.history(sequence)]));
        let is_wanted = self.held.as_ref().is_some_and(|held| held.base == Some(sequence));
        if !is_wanted || payload.is_empty() || !matches!(self.activity, Activity::Resting) {
            return;
        }
        // It is older than what this node has seen, and may have expired: the newest list vouches for it by its name. But
        // somebody has signed it who may.
        let judge = |list| Accepted::judge(list, &self.channel, &self.runtime, None, None);
        let verified = self.trust.verify(&self.channel, payload, None).map_err(Refusal::from);
        let release = verified.and_then(judge);
        let release = release.and_then(|release| match release.sequence() {
            Some(found) if found == sequence => Ok(release),
            found => {
                let found = found.map_or_else(|| "without a sequence".to_owned(), |found| found.to_string());
                Err(Refusal::WrongBase { wanted: sequence, found })
            }
        });
        match release {
            Ok(release) => {
                out.push(Effect::Log(format!("taking release {sequence} until it is this node's turn")));
                self.begin(release, out);
            }
            Err(refusal) => out.push(Effect::Log(format!("no base: {}", refusal.text()))),
        }
    }

    /// Offers a list to who chooses at the device, unless it is not the node's turn. That somebody chooses is the order
    /// that a release may wait for.
    fn offer_in_turn(
        &mut self,
        now: Duration,
        release: Accepted,
        (at, wall): (Duration, Option<Timestamp>),
        out: &mut Effects,
    ) {
        let rollout = match release.rollout() {
            Ok(None) => {
                self.note_offer(release);
                return;
            }
            Ok(rollout) => rollout,
            Err(error) => {
                out.push(Effect::Log(format!("a list is held: {}", Refusal::BadRollout(error).text())));
                return;
            }
        };
        let held = Held { ordered: true, ..Held::new(release, rollout, at, wall) };
        if matches!(self.turn(now, &held), Turn::Now) {
            self.note_offer(held.release);
        }
    }

    /// Keeps the newest list for who chooses at the device. Nobody else asks for it, and of a fleet's thousands each
    /// would have its own.
    fn note_offer(&mut self, release: Accepted) {
        self.offer = Some(release).filter(|_| self.takes_firmware);
    }

    /// Applies a list.
    fn begin(&mut self, release: Accepted, out: &mut Effects) {
        self.recheck = false;
        self.abandon(out);
        for skipped in release.skipped(self.takes_firmware) {
            out.push(Effect::Log(format!("skipping {skipped}")));
        }
        self.backoff.reset();
        self.shown.state.done = 0;
        self.survey(Job { release, tries: 1 }, out);
    }

    /// Whether a list, or another step of its rollout, was tried and is not to be tried again.
    fn is_refused(&self, release: &Accepted) -> bool {
        let new = release.seen();
        self.seen.as_ref().is_some_and(|seen| seen.refused.is_some() && is_same(seen, &new))
    }

    fn remember(&mut self, release: &Accepted, out: &mut Effects) {
        let mut seen = release.seen();
        match &self.seen {
            Some(before) if is_same(before, &seen) => seen.refused = before.refused.clone(),
            _ => {}
        }
        if self.seen.as_ref() != Some(&seen) {
            self.seen = Some(seen.clone());
            out.push(Effect::Store(Action::Remember(seen)));
        }
    }

    fn survey(&mut self, job: Job, out: &mut Effects) {
        let digest = job.release.digest();
        let tries = match self.tried {
            Some((tried, count)) if tried == digest => count + 1,
            _ => 1,
        };
        self.tried = Some((digest, tries));
        self.show_release(Phase::Downloading, &job.release.seen());
        self.shown.size = Some(job.release.size());
        self.shown.state.attempt = tries;
        self.shown.state.total = self.shown.state.done;
        out.push(Effect::Store(Action::Survey(job.release.clone())));
        self.activity = Activity::Surveying(job);
    }

    fn package(&mut self, now: Duration, topic: String, payload: Bytes, out: &mut Effects) {
        let Activity::Fetching { window, stall_at, .. } = &mut self.activity else { return };
        // Nothing is what a cleared topic says; it may be published again while we wait.
        if payload.is_empty() {
            return;
        }
        let size = payload.len() as u64;
        let Some(next) = window.take(&topic, payload) else { return };
        *stall_at = now + self.timing.stall;
        self.shown.state.done += size;
        if next.as_ref().is_some_and(|(item, _)| item.need.size.is_none()) {
            self.shown.state.total += size;
        }
        out.push(Effect::Unsubscribe(vec![topic]));
        out.extend(next.map(|(item, payload)| Effect::Store(Action::Receive(item, payload))));
        // What came before its turn waits, and others may come meanwhile.
        self.fetch_on(now, out);
    }

    fn subscription_refused(&mut self, now: Duration, filter: String, out: &mut Effects) {
        let refusal = Refusal::NotAllowed { filter };
        out.push(Effect::Log(format!("error: {}", refusal.text())));
        let Refusal::NotAllowed { filter } = &refusal else { return };
        let ours = [&self.cmd, &self.channel.topic()].contains(&filter);
        let fetching = match &self.activity {
            Activity::Fetching { window, .. } => window.topics().contains(filter),
            _ => false,
        };
        match std::mem::replace(&mut self.activity, Activity::Resting) {
            Activity::Fetching { job, window, .. } if fetching => {
                unsubscribe(&window, out);
                self.give_up(now, job, refusal, out);
            }
            Activity::Resting if ours => self.show_failed(&refusal),
            other => self.activity = other,
        }
    }

    fn done(&mut self, now: Duration, answer: Answer, out: &mut Effects) {
        let answer = match answer {
            Answer::RootKept(Ok(root)) => return self.go_on_with(root, out),
            Answer::RootKept(Err(refusal)) => {
                out.push(Effect::Log(format!("cannot keep a root: {}", refusal.text())));
                return;
            }
            answer => answer,
        };
        let before = std::mem::replace(&mut self.activity, Activity::Resting);
        self.activity = match (answer, before) {
            (Answer::Surveyed(needs), Activity::Surveying(job)) => {
                let size: u64 = needs.iter().filter_map(Need::left).fold(0, u64::saturating_add);
                self.shown.state.total = self.shown.state.total.saturating_add(size);
                Activity::Fetching {
                    job,
                    window: Window::new(needs),
                    stall_at: now + self.timing.stall,
                    losses: 0,
                }
            }
            (Answer::Received(item), mut fetching @ Activity::Fetching { .. }) => {
                if let Activity::Fetching { job, window, losses, .. } = &mut fetching {
                    let next = window.stored(&item);
                    out.extend(next.map(|(item, payload)| Effect::Store(Action::Receive(item, payload))));
                    *losses = 0;
                    // What is kept of a package is never fetched again: there is an end to it.
                    if item.chunk.is_some() && !item.completes() {
                        job.tries = 1;
                    }
                }
                fetching
            }
            (Answer::Staged(staged), Activity::Staging(job)) => {
                self.shown.state.phase = Phase::Installing;
                self.publish(now, out);
                out.push(Effect::Store(Action::Commit(staged)));
                Activity::Committing(job)
            }
            (Answer::Kept(running), Activity::Committing(_) | Activity::Confirming { .. }) => {
                self.installed(now, running, out);
                return;
            }
            (Answer::Committed, Activity::Committing(_)) => {
                self.shown.state.phase = Phase::Restarting;
                self.publish(now, out);
                out.push(Effect::Restart);
                Activity::Restarting
            }
            // An answer to something that was abandoned meanwhile.
            (_, before) => before,
        };
        self.fetch_on(now, out);
    }

    /// Asks for packages up to the window; goes on to verification when there are none left.
    fn fetch_on(&mut self, now: Duration, out: &mut Effects) {
        let Activity::Fetching { job, window, stall_at, .. } = &mut self.activity else { return };
        let topics = window.ask();
        if !topics.is_empty() {
            *stall_at = now + self.timing.stall;
            // Without a connection they are asked for when there is one.
            if self.connected {
                out.push(Effect::Subscribe(topics));
            }
        } else if window.is_done() {
            self.shown.state.phase = Phase::Verifying;
            let job = job.clone();
            self.publish(now, out);
            out.push(Effect::Store(Action::Stage(job.release.clone())));
            self.activity = Activity::Staging(job);
        }
    }

    fn failed(&mut self, now: Duration, refusal: Refusal, out: &mut Effects) {
        match std::mem::replace(&mut self.activity, Activity::Resting) {
            Activity::Surveying(job) | Activity::Staging(job) => self.give_up(now, job, refusal, out),
            Activity::Fetching { job, window, .. } => {
                unsubscribe(&window, out);
                self.give_up(now, job, refusal, out);
            }
            Activity::Committing(job) => {
                out.push(Effect::Log(format!("{}; restarting to see what became of it", refusal.text())));
                out.push(Effect::Restart);
                self.activity = Activity::Recovering { job, refusal };
            }
            Activity::Confirming { .. } => {
                out.push(Effect::Log(format!("cannot confirm: {}; restarting", refusal.text())));
                out.push(Effect::Restart);
                self.activity = Activity::Restarting;
            }
            other => {
                out.push(Effect::Log(refusal.text()));
                self.activity = other;
            }
        }
        self.take_queued(now, out);
    }

    /// The release cannot be applied now: try again later, or not.
    fn give_up(&mut self, now: Duration, job: Job, refusal: Refusal, out: &mut Effects) {
        let verdict = refusal.verdict();
        out.push(Effect::Count(refusal.word()));
        let tries = match verdict {
            Verdict::Refetch => limits::FETCHES,
            _ => self.timing.attempts,
        };
        match verdict {
            Verdict::Retry | Verdict::Refetch if job.tries < tries => {
                let pause = self.backoff.next(&mut self.rng);
                self.show_release(Phase::Downloading, &job.release.seen());
                out.push(Effect::Log(format!(
                    "{}; try {} of {tries} follows in {:.1} s",
                    refusal.text(),
                    job.tries + 1,
                    pause.as_secs_f64()
                )));
                self.activity = Activity::Pausing { job, until: now + pause };
            }
            Verdict::Retry | Verdict::Refetch | Verdict::Bug => {
                self.show_failed(&refusal);
                // What was fetched would stay for the next try; here the application needs the room.
                if matches!(refusal, Refusal::NoSpace { .. } | Refusal::Full) {
                    out.push(Effect::Store(Action::Discard));
                }
            }
            Verdict::Reject => {
                let error = refusal.text();
                self.show_failed(&refusal);
                if let Some(seen) = &mut self.seen {
                    seen.refused = Some(Refused { error: error.clone(), rolled_back: false });
                }
                out.push(Effect::Store(Action::Refuse(error)));
            }
        }
    }

    fn keep(&mut self, out: &mut Effects) {
        if let Activity::Confirming { keeping, .. } = &mut self.activity
            && !*keeping
        {
            *keeping = true;
            out.push(Effect::Store(Action::Confirm));
        }
    }

    fn installed(&mut self, now: Duration, running: Running, out: &mut Effects) {
        self.running = running;
        let list = self.running.list;
        let State { done, total, attempt, .. } = self.shown.state;
        self.rest_on_running();
        self.shown.list = list;
        (self.shown.state.done, self.shown.state.total, self.shown.state.attempt) = (done, total, attempt);
        if self.connected {
            out.push(Effect::Introduce);
        }
        self.take_queued(now, out);
    }

    /// Looks at a list that came while the last one was being put in place.
    fn take_queued(&mut self, now: Duration, out: &mut Effects) {
        let is_due = |arrived: &Arrived| {
            matches!(self.activity, Activity::Resting | Activity::Pausing { .. })
                && self.may_judge(arrived.source)
        };
        if !self.queued.as_ref().is_some_and(is_due) {
            return;
        }
        if let Some(Arrived { source, payload, at, wall }) = self.queued.take()
            && let Ok(list) = UpdateList::parse(&payload)
        {
            let digest = Digest::of(&payload);
            if self.running.list != Some(digest) {
                // People see that the last one arrived before the next one starts.
                out.push(Effect::Report(self.shown.clone()));
                self.judge(now, list, &payload, source, (at, wall), out);
            }
        }
    }

    fn tick(&mut self, now: Duration, out: &mut Effects) {
        if self.connected && now >= self.check_at {
            self.check_later(now);
            out.push(Effect::Subscribe(vec![self.channel.topic()]));
        }
        let is_due = |held: &Held| held.until.is_some_and(|until| now >= until);
        if matches!(self.activity, Activity::Resting) && self.held.as_ref().is_some_and(is_due) {
            self.take_turn(now, out);
            return;
        }
        match std::mem::replace(&mut self.activity, Activity::Resting) {
            Activity::Fetching { job, window, stall_at, .. } if self.connected && now >= stall_at => {
                unsubscribe(&window, out);
                let topic = window.topics().into_iter().next().unwrap_or_default();
                self.give_up(now, job, Refusal::MissingPackage { topic }, out);
            }
            Activity::Pausing { job, until } if now >= until => {
                self.survey(Job { tries: job.tries + 1, ..job }, out);
            }
            other => {
                let due = matches!(&other, Activity::Confirming { confirm_at: Some(at), .. } if now >= *at);
                self.activity = other;
                if due {
                    self.keep(out);
                }
            }
        }
    }

    fn refuse_list(
        &mut self,
        refusal: &Refusal,
        name: Option<(u64, String)>,
        digest: Digest,
        out: &mut Effects,
    ) {
        out.push(Effect::Count(refusal.word()));
        out.push(Effect::Log(format!("a list is refused: {}", refusal.text())));
        // It changes nothing: what is under way goes on, and is what the state is about.
        if matches!(self.activity, Activity::Resting) {
            let (sequence, version) = name.unzip();
            self.shown.state =
                State { sequence, version, done: 0, total: 0, held: None, ..self.shown.state.clone() };
            self.shown.list = Some(digest);
            self.show_failed(refusal);
        }
    }

    fn job(&self) -> Option<&Job> {
        match &self.activity {
            Activity::Surveying(job)
            | Activity::Fetching { job, .. }
            | Activity::Pausing { job, .. }
            | Activity::Staging(job)
            | Activity::Committing(job)
            | Activity::Recovering { job, .. } => Some(job),
            Activity::Resting | Activity::Restarting | Activity::Confirming { .. } => None,
        }
    }

    /// Another list replaces the one being fetched.
    fn abandon(&mut self, out: &mut Effects) {
        if let Activity::Fetching { window, .. } = &self.activity {
            unsubscribe(window, out);
        }
        self.activity = Activity::Resting;
    }

    fn rest_on_running(&mut self) {
        self.activity = Activity::Resting;
        self.shown.list = None;
        self.shown.state = State {
            phase: Phase::Idle,
            sequence: self.running.sequence,
            version: self.running.version.clone(),
            done: 0,
            total: 0,
            error: None,
            attempt: 0,
            held: self.held.as_ref().and_then(|held| held.release.sequence()),
            extra: serde_json::Map::new(),
        };
    }

    fn rest_on_refused(&mut self, seen: &Seen) {
        let rolled_back = seen.refused.as_ref().is_some_and(|refused| refused.rolled_back);
        self.show_release(if rolled_back { Phase::RolledBack } else { Phase::Failed }, seen);
        self.shown.state.error = seen.refused.as_ref().map(|refused| refused.error.clone());
        self.activity = Activity::Resting;
    }

    fn show_release(&mut self, phase: Phase, seen: &Seen) {
        let same = self.shown.list == Some(seen.list);
        let before = self.shown.state.clone();
        self.shown.list = Some(seen.list);
        self.shown.size = self.shown.size.filter(|_| same);
        self.shown.state = State {
            phase,
            sequence: seen.sequence,
            version: seen.version.clone(),
            done: if same { before.done } else { 0 },
            total: if same { before.total } else { 0 },
            attempt: if same { before.attempt } else { 0 },
            held: None,
            error: None,
            extra: before.extra,
        };
    }

    fn show_failed(&mut self, refusal: &Refusal) {
        self.shown.state.phase = Phase::Failed;
        self.shown.state.error = Some(refusal.text());
    }

    /// Reports a change at once, and mere progress at a bounded rate.
    fn publish(&mut self, now: Duration, out: &mut Effects) {
        // The store's answer, which says how much there is to fetch, is the next event.
        if matches!(self.activity, Activity::Surveying(_)) {
            return;
        }
        let due = match &self.published {
            None => true,
            Some((report, _)) if *report == self.shown => false,
            Some((report, at)) => {
                let without_bytes = |report: &Report| Report {
                    state: State { done: 0, total: 0, ..report.state.clone() },
                    list: report.list,
                    size: report.size,
                };
                without_bytes(report) != without_bytes(&self.shown) || now >= *at + self.timing.progress
            }
        };
        if due {
            self.published = Some((self.shown.clone(), now));
            out.push(Effect::Report(self.shown.clone()));
        }
    }
}

/// Whose turn it is.
enum Turn {
    /// This node's.
    Now,
    /// This node's, at that time.
    At(Duration),
    /// Others', as long as nothing changes.
    Never,
}

impl Held {
    fn new(release: Accepted, rollout: Option<Rollout>, at: Duration, wall: Option<Timestamp>) -> Held {
        Held { release, rollout, seen_at: at, wall, ordered: false, until: None, base: None }
    }
}

/// Whether two lists are the same, or steps of the same rollout.
fn is_same(one: &Seen, other: &Seen) -> bool {
    one.channel == other.channel
        && (one.list == other.list || one.rollout.is_some() && one.rollout == other.rollout)
}

fn unsubscribe(window: &Window, out: &mut Effects) {
    let topics = window.topics();
    if !topics.is_empty() {
        out.push(Effect::Unsubscribe(topics));
    }
}

#[cfg(test)]
mod tests;
