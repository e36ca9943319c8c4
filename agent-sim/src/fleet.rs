//! Many nodes in one process: each the same agent code, with its own connection, its own flash and its own fate.

mod blox;
pub mod expect;
pub mod github;
pub mod history;
pub mod html;
mod member;
mod plot;
pub mod profile;
mod reconnects;
pub mod report;
mod tally;
mod view;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::FutureExt as _;
use mpypi_client::{Brokers, Meter};
use mpypi_protocol::{ChannelName, Digest, Trust, node::Phase};
use tokio::{task::JoinSet, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

pub use blox::Herald;
pub use member::{Found, Home, Member, Storage};
pub use reconnects::{Bin, Reconnects};
pub use tally::{
    Cohorts, Fate, NodeResult, Outcome, PHASES, Record, Sample, Standing, Summary, Tally, Until,
};
pub use view::{Bars, Lines, View};

use self::{
    history::History,
    member::{live, reference},
    profile::{Abi, Profile},
};
use crate::{
    device::{Agent, Hardware},
    flash::{Disk, Memory},
    limits,
    node::{Clock, Happening, NodeOptions},
    update::Timing,
    weather::{Lists, Weather},
};

/// A fleet.
#[derive(Debug, Clone)]
pub struct FleetOptions {
    /// The broker, or several addresses of one, over which the nodes spread.
    pub brokers: Brokers,
    /// The channel all of it follows.
    pub channel: ChannelName,
    /// Whose lists it believes.
    pub trust: Trust,
    /// Its nodes.
    pub members: Vec<Member>,
    /// The times its nodes go by.
    pub timing: Timing,
    /// What befalls them. With one, nodes whose weather is fair run along, to compare the others with.
    pub profile: Option<Profile>,
    /// When faults end, after the start.
    pub calm_at: Option<Duration>,
    /// Decides what befalls whom, and the lengths of all pauses.
    pub seed: u64,
    /// End when every node finished so many releases; with a profile, when its faults are over, so many were
    /// seen, and each applied the newest.
    pub releases: Option<usize>,
    /// End after this time.
    pub time: Option<Duration>,
    /// Tell every step of every node.
    pub trace: bool,
}

/// A fleet cannot run.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// A node's root cannot be used.
    #[error("cannot open the directory `{}`", path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A node's task ended without an answer.
    #[error("a node died of a fault of this program")]
    Died,
}

/// Runs a fleet until `stop` is cancelled, or as long as its options say. Returns when every node has
/// stopped, and was looked at.
///
/// # Errors
/// See [`FleetError`].
pub async fn run(
    options: FleetOptions,
    view: Box<dyn View>,
    stop: CancellationToken,
) -> Result<Summary, FleetError> {
    let clock = Clock::start();
    let stop = stop.child_token();
    let profile = options.profile.clone().unwrap_or_default();
    let timing =
        Timing { check: profile.check.map_or(options.timing.check, |check| check.0), ..options.timing };
    let lists = match options.trust {
        Trust::Anyone => Lists::Unsigned,
        Trust::Keys(_) | Trust::Root(_) => Lists::Signed,
    };
    let weather = |member: &Member| match &options.profile {
        Some(profile) => {
            Weather::draw(profile, options.seed, member.number, options.calm_at).with_lists(lists)
        }
        None => Weather::calm(),
    };
    let mut members: Vec<_> = options.members.iter().map(|m| (m.clone(), weather(m))).collect();
    let count = members.len();
    if options.profile.is_some() {
        let mut kinds: Vec<_> =
            members.iter().map(|(m, weather)| weather.hardware(m.hardware.clone())).collect();
        // What such a node has is held beside the list alone, which somebody else has to verify.
        for kind in kinds.iter_mut().filter(|kind| kind.agent == Agent::MpyBlox) {
            kind.agent = Agent::Current;
        }
        kinds.sort();
        kinds.dedup();
        let fair = |(number, kind)| (reference(kind, number), Weather::calm());
        members.extend(kinds.into_iter().enumerate().map(fair));
    }
    let blank = |(member, weather): &(Member, Weather)| {
        let hardware = weather.hardware(member.hardware.clone());
        let cohorts = cohorts(&hardware, weather);
        NodeResult::new(member.node.clone(), member.number, hardware.sysname, cohorts)
    };
    let meters: Vec<_> = members.iter().map(|_| Arc::new(Meter::default())).collect();
    let until = if options.profile.is_some() { Until::Applied } else { Until::Ended };
    let tally = Tally::new(members.iter().take(count).map(blank).collect(), options.releases, until);
    let calm_at = options.calm_at.filter(|_| options.profile.is_some()).unwrap_or_default();
    // Held for the few instructions it takes to note what a node did; never across an `.await`.
    let board = Arc::new(Mutex::new(Board {
        tally,
        view,
        calm_at,
        meters: meters.clone(),
        past: Digest::of(&History::past()),
        lies: BTreeSet::new(),
        finds: Vec::new(),
    }));
    let herald = Arc::new(Herald::default());
    let mut tasks = JoinSet::new();
    for (index, (member, weather)) in members.into_iter().enumerate() {
        let node_options = NodeOptions {
            brokers: options.brokers.map(|broker| broker.metered(meters[index].clone())),
            node: member.node,
            channel: options.channel.clone(),
            trust: options.trust.clone(),
            hardware: member.hardware.clone(),
            desk: member.desk.clone(),
            // Those whose weather is fair hear of it first, and they are few.
            herald: (index >= count).then(|| herald.clone()),
            traits: member.traits,
            timing: timing.clone(),
            // Each its own, and all from one.
            seed: options.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(member.number),
            trace: options.trace,
        };
        let hardware = weather.hardware(member.hardware);
        let agent = hardware.agent;
        let (told, done) = (board.clone(), stop.clone());
        let observe = move |happening| {
            let mut board = told.lock().unwrap_or_else(PoisonError::into_inner);
            if index < count && board.note(clock.now(), index, &happening) {
                done.cancel();
            }
        };
        // Boxed: what a task holds is in memory once, and not once more wherever it is handed on.
        let (node_options, weather) = (Box::new(node_options), Box::new(weather));
        let (board, stop) = (board.clone(), stop.clone());
        let tell = move |found| {
            let mut board = board.lock().unwrap_or_else(PoisonError::into_inner);
            board.found(index, hardware, found);
        };
        let memory = match weather.cuts_power() {
            true => Memory::new(limits::MEMORY_FLASH),
            false => Memory::lasting(limits::MEMORY_FLASH),
        };
        let disk = match member.home {
            Home::Disk(path) => Some(Disk::open(&path).map_err(|source| FleetError::Root { path, source })?),
            Home::Memory => None,
        };
        let herald = herald.clone();
        match (disk, agent) {
            (Some(disk), Agent::MpyBlox) => {
                tasks.spawn(blox::live(node_options, disk, weather, clock, observe, stop, herald).map(tell))
            }
            (None, Agent::MpyBlox) => {
                tasks.spawn(blox::live(node_options, memory, weather, clock, observe, stop, herald).map(tell))
            }
            (Some(disk), _) => tasks.spawn(live(node_options, disk, weather, clock, observe, stop).map(tell)),
            (None, _) => tasks.spawn(live(node_options, memory, weather, clock, observe, stop).map(tell)),
        };
    }
    watch(&mut tasks, &board, &options, clock, &stop).await?;
    let mut board = board.lock().unwrap_or_else(PoisonError::into_inner);
    board.view.end();
    board.compare(count);
    // Whoever waits a certain time expects to see something; whoever presses Ctrl-C may not.
    let releases = options.releases.unwrap_or(usize::from(options.time.is_some()));
    Ok(board.tally.summary(clock.now(), releases))
}

/// Waits until all nodes have stopped; counts how they stand meanwhile.
async fn watch(
    tasks: &mut JoinSet<()>,
    board: &Mutex<Board>,
    options: &FleetOptions,
    clock: Clock,
    stop: &CancellationToken,
) -> Result<(), FleetError> {
    let limit = async {
        match options.time {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(limit);
    let mut samples = tokio::time::interval(limits::SAMPLE);
    samples.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut died = None;
    loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                None => break,
                Some(Ok(())) => {}
                Some(Err(_)) => {
                    died = Some(FleetError::Died);
                    stop.cancel();
                }
            },
            _ = samples.tick(), if !stop.is_cancelled() => {
                let mut board = board.lock().unwrap_or_else(PoisonError::into_inner);
                if board.sample(clock.now()) {
                    stop.cancel();
                }
            }
            () = &mut limit, if !stop.is_cancelled() => stop.cancel(),
        }
    }
    board.lock().unwrap_or_else(PoisonError::into_inner).sample(clock.now());
    died.map_or(Ok(()), Err)
}

/// What a node has in common with others.
fn cohorts(hardware: &Hardware, weather: &Weather) -> Cohorts {
    let mut cohorts = vec![
        ("platform", hardware.sysname.clone()),
        ("abi", Abi(hardware.mpy).to_string()),
        ("history", weather.history().word().to_owned()),
        ("agent", hardware.agent.word().to_owned()),
    ];
    cohorts.extend(weather.faults().into_iter().map(|fault| ("fault", fault.to_owned())));
    cohorts
}

struct Board {
    tally: Tally,
    view: Box<dyn View>,
    /// When the faults are over.
    calm_at: Duration,
    meters: Vec<Arc<Meter>>,
    /// The list that nodes may have had before: no release of this fleet.
    past: Digest,
    /// What an intruder made which node take for the channel's list.
    lies: BTreeSet<(usize, Digest)>,
    /// What nodes had in the end, and what they are.
    finds: Vec<(usize, Hardware, Result<Found, String>)>,
}

impl Board {
    /// Notes what happened; whether that was the last thing waited for.
    fn note(&mut self, now: Duration, index: usize, happening: &Happening) -> bool {
        let Board { tally, view, meters, calm_at, past, lies, .. } = self;
        let is_lie = |list: Option<Digest>| list.is_some_and(|list| lies.contains(&(index, list)));
        match happening {
            Happening::Report(report) if report.list == Some(*past) => {}
            // No release failed. Should a node fall for it, that is one, and none of the fleet's.
            Happening::Report(report) if report.state.phase == Phase::Failed && is_lie(report.list) => {}
            Happening::Report(report) => {
                tally.traffic(index, meters[index].read());
                tally.report(now, index, report);
                view.report(tally.node(index), index, report);
                return tally.is_complete() && now >= *calm_at;
            }
            Happening::Log(line) => view.log(tally.node(index), line),
            Happening::Blow(blow) => {
                tally.blow(index, *blow);
                view.blow(tally.node(index), *blow);
            }
            Happening::Attack { attack, lists } => {
                tally.attack(*attack);
                lies.extend(lists.iter().map(|list| (index, *list)));
            }
            Happening::Refused(word) => tally.refused(word),
            Happening::Trace(line) => view.trace(now, tally.node(index), line),
            Happening::Connected => tally.connected(now, index),
            Happening::Lost { trouble, again_in } => {
                // One line for an outage, not one for each node and attempt.
                if tally.lost(now, index, trouble) {
                    let line = format!("{}; trying again in {:.1} s", trouble.error, again_in.as_secs_f64());
                    view.log(tally.node(index), &line);
                }
            }
        }
        false
    }

    /// Counts how the fleet stands; whether there is nothing more to wait for.
    fn sample(&mut self, now: Duration) -> bool {
        let wire = self.meters.iter().take(self.tally.nodes().len()).map(|meter| meter.read().received).sum();
        let sample = self.tally.sample(now, wire);
        self.view.sample(&self.tally, &sample);
        self.tally.is_complete() && now >= self.calm_at
    }

    fn found(&mut self, index: usize, hardware: Hardware, found: Result<Found, String>) {
        self.finds.push((index, hardware, found));
    }

    /// Holds what each of the first `count` nodes has beside what the others of its kind have whose weather was fair.
    fn compare(&mut self, count: usize) {
        let finds = std::mem::take(&mut self.finds);
        let fair: Vec<_> = finds.iter().filter(|(index, ..)| *index >= count).collect();
        let fair = |hardware: &Hardware, found: &Found| {
            let mut alike = fair.iter().filter(|(_, other, _)| other == hardware);
            alike.find_map(|(_, _, fair)| fair.as_ref().ok().filter(|fair| fair.list == found.list))
        };
        for (index, hardware, found) in finds.iter().filter(|(index, ..)| *index < count) {
            let found = match found {
                Ok(found) if fair(hardware, found).is_some_and(|fair| fair.files != found.files) => {
                    Err("its files are not those of its release".to_owned())
                }
                found => found.clone(),
            };
            self.tally.traffic(*index, self.meters[*index].read());
            self.tally.found(*index, found);
        }
    }
}
