//! A fleet without network and clock, for tests: the devices are the real ones, the broker is a map, time is a number.
//! The same seed gives the same run, to the last byte of its trace.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::{Digest, NodeId, Topic, node::Phase};

use crate::{
    backoff::Backoff,
    device::{Device, Hardware, Output},
    flash::{Flash, Loss, Memory, PowerCut, Tear},
    fleet::profile::Profile,
    limits,
    node::is_package,
    testing::{Files, Release, channel, files},
    update::{Event, Report, Source, Timing},
    weather::{Cargo, Falling, Fate, Turn, Weather},
};

/// What each node's flash holds, in bytes.
const CAPACITY: u64 = 1 << 20;
/// How long the device takes to start.
const START: Duration = Duration::from_millis(300);
/// What a right clock says when the simulation begins, in seconds since 1970: 2026-11-20.
const EPOCH: i64 = 1_795_132_800;

pub(crate) struct Simulation {
    now: Duration,
    nodes: Vec<Node>,
    retained: BTreeMap<String, Bytes>,
    /// What happens next, to which node; only in the life it was meant for.
    queue: BTreeMap<(Duration, u64), (usize, u64, Next)>,
    count: u64,
    profile: Profile,
    trace: String,
}

struct Node {
    number: usize,
    weather: Weather,
    backoff: Backoff,
    rng: fastrand::Rng,
    state: State,
    /// Counts starts and connections: what was meant for an earlier one does not arrive.
    life: u64,
    connection: u64,
    /// The next tick that is queued.
    tick_at: Option<Duration>,
}

enum State {
    Off(Memory),
    On(Box<Device<PowerCut<Memory>>>, Vec<String>),
    Turning,
}

enum Next {
    Start,
    Connect,
    Message(u64, String, Bytes),
    Turn(u64, Turn),
    Tick,
}

impl Simulation {
    pub(crate) fn new(profile: &Profile, seed: u64, nodes: usize, calm_at: Option<Duration>) -> Simulation {
        let mut simulation = Simulation {
            now: Duration::ZERO,
            nodes: Vec::new(),
            retained: [(channel().topic(), Bytes::from_static(b"[]"))].into(),
            queue: BTreeMap::new(),
            count: 0,
            profile: profile.clone(),
            trace: String::new(),
        };
        for number in 0..nodes {
            let weather = Weather::draw(profile, seed, number as u64, calm_at);
            let join = weather.join();
            let mut flash = Memory::new(CAPACITY);
            let (name, hardware) = (name(number), weather.hardware(Hardware::default()));
            weather.history().write(&mut flash, &name, &channel(), &hardware).unwrap();
            simulation.nodes.push(Node {
                number,
                weather,
                backoff: Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_MOST),
                rng: fastrand::Rng::with_seed(seed ^ number as u64),
                state: State::Off(flash),
                life: 0,
                connection: 0,
                tick_at: None,
            });
            simulation.after(number, join, Next::Start);
        }
        simulation
    }

    /// Retains a release, as a publisher does: packages first.
    pub(crate) fn publish(&mut self, release: &Release) {
        self.retained.extend(release.packages.clone());
        let topic = channel().topic();
        self.retained.insert(topic.clone(), release.list.clone());
        for number in 0..self.nodes.len() {
            if matches!(&self.nodes[number].state, State::On(_, filters) if filters.contains(&topic)) {
                self.send(number, topic.clone());
            }
        }
    }

    /// Lets time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= end) {
            let ((at, _), (number, life, next)) = entry.remove_entry();
            self.now = at;
            if self.nodes[number].life == life {
                self.happen(number, next);
            }
        }
        self.now = end;
    }

    /// Everything that was reported, in order.
    pub(crate) fn trace(&self) -> &str {
        &self.trace
    }

    /// Each node's files and where its update stands, if it is on.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = (usize, Files, Option<&Report>)> {
        self.nodes.iter().map(|node| match &node.state {
            State::Off(flash) => (node.number, files(flash), None),
            State::On(device, _) => {
                (node.number, files(device.store().flash().inner()), Some(device.report()))
            }
            State::Turning => unreachable!("only while something happens"),
        })
    }

    /// What a node has when it has all of `release`: with that, what is its owner's.
    pub(crate) fn goal(&self, number: usize, release: &Release) -> Files {
        let mut goal = self.nodes[number].weather.history().owned();
        goal.extend(release.files.clone());
        goal
    }

    /// An operator tells every node that took a release back to look again, and says how many there were.
    pub(crate) fn tell_those_that_rolled_back(&mut self) -> usize {
        let told: Vec<_> = self
            .nodes()
            .filter(|(_, _, report)| report.is_some_and(|report| report.state.phase == Phase::RolledBack))
            .map(|(number, ..)| number)
            .collect();
        for number in &told {
            let payload = Bytes::from_static(br#"[{"type":"check"}]"#);
            self.give(*number, Event::List { source: Source::Cmd, payload, wall: None });
        }
        told.len()
    }

    fn after(&mut self, number: usize, time: Duration, next: Next) {
        self.count += 1;
        let life = self.nodes[number].life;
        self.queue.insert((self.now + time, self.count), (number, life, next));
    }

    fn note(&mut self, number: usize, what: impl std::fmt::Display) {
        let _ = writeln!(self.trace, "{:>12} {number:>4} {what}", self.now.as_micros());
    }

    fn happen(&mut self, number: usize, next: Next) {
        match next {
            Next::Start => self.start(number),
            Next::Connect => self.connect(number),
            Next::Message(connection, topic, payload) if self.nodes[number].connection == connection => {
                self.message(number, &topic, payload);
            }
            Next::Turn(connection, turn) if self.nodes[number].connection == connection => {
                self.note(number, format_args!("{turn:?}"));
                match turn {
                    Turn::Break => self.disconnect(number),
                    Turn::Sleep(time) => self.turn_off(number, None, time),
                }
            }
            Next::Message(..) | Next::Turn(..) => {}
            Next::Tick => {
                self.nodes[number].tick_at = None;
                self.give(number, Event::Tick);
            }
        }
    }

    fn start(&mut self, number: usize) {
        let now = self.now;
        let node = &mut self.nodes[number];
        let State::Off(mut flash) = std::mem::replace(&mut node.state, State::Turning) else {
            panic!("a device that is on is started");
        };
        flash.resize(node.weather.room(now).map_or(CAPACITY, |room| flash.used() + room));
        let flash = match node.weather.next_cut(now) {
            Some(cut) => PowerCut::new(flash, cut.at, if cut.torn { Tear::Torn } else { Tear::Clean })
                .losing(cut.loses),
            None => PowerCut::never(flash),
        };
        let check = self.profile.check.map_or(limits::CHECK, |check| check.0);
        let timing = Timing { check, ..Timing::default() };
        let name = name(number);
        let seed = node.rng.u64(..);
        let hardware = node.weather.hardware(Hardware::default());
        let mut device = Box::new(Device::off(flash, &name, channel(), hardware, timing, seed));
        let outputs = device.start(now);
        if device.store().flash().is_off() {
            self.note(number, "power lost while it started");
            self.nodes[number].state = State::Off(lost(device.into_flash()));
            return self.after(number, START, Next::Start);
        }
        let outputs = outputs.unwrap_or_else(|error| panic!("node {number} is bricked: {error}"));
        self.nodes[number].state = State::On(device, Vec::new());
        self.carry_out(number, outputs);
        self.after(number, Duration::ZERO, Next::Connect);
        self.look_on(number);
    }

    fn connect(&mut self, number: usize) {
        let now = self.now;
        let node = &mut self.nodes[number];
        node.connection += 1;
        let connection = node.connection;
        if let Some((at, turn)) = node.weather.next_turn(now) {
            self.after(number, at.saturating_sub(now), Next::Turn(connection, turn));
        }
        self.give(number, Event::Connected);
    }

    fn disconnect(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        node.connection += 1;
        if let State::On(_, filters) = &mut node.state {
            filters.clear();
        }
        let again = node.backoff.next(&mut node.rng);
        self.after(number, again, Next::Connect);
        self.give(number, Event::Disconnected);
    }

    /// The device is off for `time`; what it had not synced is lost in the way `loss` says.
    fn turn_off(&mut self, number: usize, loss: Option<Loss>, time: Duration) {
        let node = &mut self.nodes[number];
        node.life += 1;
        node.connection += 1;
        node.tick_at = None;
        let State::On(device, _) = std::mem::replace(&mut node.state, State::Turning) else { return };
        let mut flash = device.into_flash().into_inner();
        if let Some(loss) = loss {
            flash.lose(loss);
        }
        node.state = State::Off(flash);
        self.after(number, time, Next::Start);
    }

    fn message(&mut self, number: usize, topic: &str, payload: Bytes) {
        let seconds = EPOCH + i64::try_from(self.now.as_secs()).unwrap();
        let clock = self.nodes[number].weather.clock(seconds);
        let wall = clock.map(|seconds| Timestamp::from_second(seconds).unwrap());
        let event = match Topic::parse(topic).unwrap() {
            Topic::Package(_) | Topic::Chunk(..) => Event::Package { topic: topic.to_owned(), payload },
            _ => Event::List { source: Source::Channel, payload, wall },
        };
        self.give(number, event);
    }

    fn give(&mut self, number: usize, event: Event) {
        let now = self.now;
        let State::On(device, _) = &mut self.nodes[number].state else { return };
        let outputs = device.handle(now, event);
        if device.store().flash().is_off() {
            self.note(number, "power lost");
            let State::On(device, _) = std::mem::replace(&mut self.nodes[number].state, State::Turning)
            else {
                return;
            };
            let node = &mut self.nodes[number];
            (node.life, node.connection, node.tick_at) = (node.life + 1, node.connection + 1, None);
            node.state = State::Off(lost(device.into_flash()));
            self.after(number, START, Next::Start);
            return;
        }
        let outputs = outputs.unwrap_or_else(|error| panic!("node {number} is bricked: {error}"));
        self.carry_out(number, outputs);
        self.look_on(number);
    }

    /// Sets the next tick; lets the application crash.
    fn look_on(&mut self, number: usize) {
        let now = self.now;
        let node = &mut self.nodes[number];
        let State::On(device, _) = &node.state else { return };
        let report = device.report();
        if report.state.phase == Phase::Confirming
            && let Some(list) = report.list
            && node.weather.crashes(now, list, report.state.version.as_deref())
        {
            self.note(number, "crashed");
            self.turn_off(number, None, START);
            return;
        }
        if let Some(deadline) = device.deadline()
            && node.tick_at.is_none_or(|at| deadline < at || at <= now)
        {
            node.tick_at = Some(deadline);
            self.after(number, deadline.saturating_sub(now), Next::Tick);
        }
    }

    fn carry_out(&mut self, number: usize, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Subscribe(new) => {
                    for filter in new {
                        if let State::On(_, filters) = &mut self.nodes[number].state
                            && !filters.contains(&filter)
                        {
                            filters.push(filter.clone());
                        }
                        self.send(number, filter);
                    }
                }
                Output::Unsubscribe(old) => {
                    if let State::On(_, filters) = &mut self.nodes[number].state {
                        filters.retain(|filter| !old.contains(filter));
                    }
                }
                Output::Report(Report { state, list, .. }) => {
                    let list = list.map(|list: Digest| list.short()).unwrap_or_default();
                    let what = String::from_utf8(state.to_bytes()).unwrap();
                    self.note(number, format_args!("{list} {what}"));
                }
                Output::Log(line) => self.note(number, line),
                Output::Retain(..) => {}
                Output::Refused(word) => self.note(number, format_args!("refuses: {word}")),
                Output::Introduce(_) => self.note(number, "introduces itself"),
            }
        }
    }

    /// Sends what is retained at `topic` on its way to a node.
    fn send(&mut self, number: usize, topic: String) {
        let Some(payload) = self.retained.get(&topic).cloned() else { return };
        let now = self.now;
        let node = &mut self.nodes[number];
        let connection = node.connection;
        let cargo = match is_package(&topic) {
            true => Cargo::Package,
            false => Cargo::List,
        };
        let Fate { falling, attack } = node.weather.fall(now, payload, cargo);
        let gives_up_at = node.weather.gives_up_at();
        if let Some(attack) = attack {
            self.note(number, format_args!("attack: {}", attack.word()));
            if let Some(at) = gives_up_at {
                self.after(number, at.saturating_sub(now), Next::Turn(connection, Turn::Break));
            }
        }
        for Falling { at, payload } in falling {
            self.after(number, at.saturating_sub(now), Next::Message(connection, topic.clone(), payload));
        }
    }
}

fn name(number: usize) -> NodeId {
    NodeId::new(format!("n{number}")).unwrap()
}

/// What is left of a flash that lost power.
fn lost(flash: PowerCut<Memory>) -> Memory {
    let loss = if flash.loses() { Loss::Everything } else { Loss::Nothing };
    let mut flash = flash.into_inner();
    flash.lose(loss);
    flash
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::release;

    const NODES: usize = 60;
    const SEEDS: u64 = 10;

    /// More of it in `make soak`.
    fn from_environment(name: &str, otherwise: u64) -> u64 {
        std::env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
    }

    const CALM: Duration = Duration::from_secs(60);

    /// What a trace of a hostile day tells of.
    const STRUCK: [&str; 14] = [
        "power lost",
        "crashed",
        "Break",
        "Sleep",
        "attack: swapped-packages",
        "attack: longer-packages",
        "attack: endless-data",
        "attack: old-lists",
        "attack: corrupted-lists",
        "refuses: wrong-hash",
        "refuses: wrong-size",
        "refuses: bad-list",
        "refuses: rollback",
        "refuses: no-space",
    ];

    fn releases() -> [Release; 2] {
        let big = vec![b'x'; 9000];
        let first: &[(&str, &[u8])] = &[("main.py", b"one"), ("data/a.bin", &big), ("data/b.txt", b"b")];
        let second: &[(&str, &[u8])] = &[("main.py", b"two"), ("data/a.bin", &big), ("new/c.txt", b"c")];
        [
            release(1, first, &[("blink", "1.0", &[("blink/__init__.py", b"x = 1"), ("blink/old.py", b"")])]),
            release(2, second, &[("blink", "2.0", &[("blink/__init__.py", b"x = 2")])]),
        ]
    }

    /// A fleet on a hostile day, two releases, and what became of it when it was over.
    fn hostile(seed: u64, nodes: usize) -> (Simulation, usize) {
        let profile = Profile::parse(Profile::ready("hostile").unwrap()).unwrap();
        let [first, second] = releases();
        let mut simulation = Simulation::new(&profile, seed, nodes, Some(CALM));
        simulation.publish(&first);
        simulation.run(CALM / 2);
        simulation.publish(&second);
        simulation.run(CALM);
        // Power that fails three times before a release is confirmed looks like a release that fails.
        let told = simulation.tell_those_that_rolled_back();
        simulation.run(CALM);
        (simulation, told)
    }

    #[test]
    fn the_same_seed_gives_the_same_trace_and_another_seed_another() {
        let [(one, _), (same, _), (other, _)] = [1, 1, 2].map(|seed| hostile(seed, NODES));
        assert!(one.trace().lines().count() > NODES * 10, "{}", one.trace());
        assert!(one.trace() == same.trace(), "two runs of one seed differ");
        assert!(one.trace() != other.trace(), "the seed decides nothing");
    }

    #[test]
    fn after_a_hostile_day_every_node_has_the_release_and_not_a_wrong_byte() {
        let [_, second] = releases();
        let mut faults = BTreeMap::new();
        let nodes = usize::try_from(from_environment("MPYPI_NODES", NODES as u64)).unwrap();
        for seed in 1..=from_environment("MPYPI_SEEDS", SEEDS) {
            let (simulation, told) = hostile(seed, nodes);
            assert!(told * 20 < nodes, "seed {seed}: {told} nodes rolled back");
            for word in STRUCK {
                *faults.entry(word).or_insert(0) += simulation.trace().matches(word).count();
            }
            for (number, found, report) in simulation.nodes() {
                let phase = report.map(|report| report.state.phase);
                let wrong = found != simulation.goal(number, &second) || phase != Some(Phase::Idle);
                let own = |line: &&str| line[13..].trim_start().starts_with(&format!("{number} "));
                let story = || simulation.trace().lines().filter(own).collect::<Vec<_>>().join("\n");
                assert!(!wrong, "seed {seed}, node {number}: {phase:?}, {:?}\n{}", found.keys(), story());
            }
        }
        assert!(faults.values().all(|count| *count > 10), "a fault did not strike: {faults:?}");
    }
}
