//! What became of each release on each node.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use comfy_table::{CellAlignment, Table, presets};
use mpypi_client::Traffic;
use mpypi_protocol::{Digest, NodeId, node::Phase};

use super::{member::Found, reconnects::Reconnects};
use crate::{
    node::Trouble,
    update::Report,
    weather::{Attack, Blow},
};

/// Counts along while a fleet runs: what is asked for at each report costs the same however large the fleet is.
#[derive(Debug)]
pub struct Tally {
    nodes: Vec<NodeResult>,
    releases: Option<usize>,
    until: Until,
    /// How many nodes finished as many releases as are waited for.
    complete: usize,
    /// The lists that any node has seen, and the newest of them: the one with the highest sequence, or the last.
    seen: BTreeSet<Digest>,
    newest: Option<(Option<u64>, Digest)>,
    /// How many nodes have applied that.
    on_newest: usize,
    standing: Standing,
    samples: Vec<Sample>,
    reconnects: Reconnects,
    attacks: BTreeMap<Attack, u64>,
    refusals: BTreeMap<String, u64>,
    ever_connected: bool,
    trouble: Option<Trouble>,
}

/// What is waited for of each release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// That it is applied or given up.
    Ended,
    /// That every node has applied the newest, once so many were seen: what failed is tried again, and who comes late
    /// sees the newest alone.
    Applied,
}

/// What became of one node.
#[derive(Debug, Clone)]
pub struct NodeResult {
    /// The node.
    pub node: NodeId,
    /// Its number in its fleet.
    pub number: u64,
    /// What its `info` calls its platform.
    pub platform: String,
    /// What it has in common with others: in which respect, and what.
    pub cohorts: Cohorts,
    /// Its releases, in the order they came.
    pub records: Vec<Record>,
    /// Where its update stands, and since when.
    pub phase: Option<(Phase, Duration)>,
    /// Bytes that its sockets received and sent.
    pub traffic: Traffic,
    /// Connections made.
    pub connects: u32,
    /// Whether it has one.
    pub is_online: bool,
    /// Since when it has none, although it did not end it.
    lost_at: Option<Duration>,
    /// Power cuts, crashes and naps that befell it.
    pub blows: [u32; 3],
    /// What it has in the end; an error if it does not start, or has a wrong byte.
    pub found: Option<Result<Found, String>>,
}

/// What nodes have in common with others: in which respect, as `platform`, and what, as `esp32`.
pub type Cohorts = Vec<(&'static str, String)>;

/// What the newest release came to on a node, by what is on its flash in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// It runs it, every byte of it right.
    Applied,
    /// It failed; the old one runs.
    Failed,
    /// It was taken back.
    RolledBack,
    /// The node does not start any more, or has a wrong byte.
    Bricked,
    /// Nothing became of it yet.
    Unfinished,
}

/// How a fleet stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Nodes in each phase, in the order of [`PHASES`].
    pub phases: [usize; PHASES.len()],
    /// Package bytes received.
    pub bytes: u64,
    /// Nodes that are connected.
    pub online: usize,
    /// Bytes that the sockets of all nodes received.
    pub wire: u64,
    /// Connections made so far.
    pub connections: u64,
    /// Tries of a release so far, beyond the first of each node.
    pub retries: u64,
}

/// How a fleet stood at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// When.
    pub at: Duration,
    /// How.
    pub standing: Standing,
    /// Nodes on the newest release that any node has seen.
    pub newest: usize,
}

/// All phases, in the order in which a node goes through them.
pub const PHASES: [Phase; 8] = [
    Phase::Downloading,
    Phase::Verifying,
    Phase::Installing,
    Phase::Restarting,
    Phase::Confirming,
    Phase::Idle,
    Phase::Failed,
    Phase::RolledBack,
];

/// One release on one node.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The digest of its list.
    pub list: Digest,
    /// Its sequence.
    pub sequence: Option<u64>,
    /// Its version.
    pub version: Option<String>,
    /// Package bytes received for it.
    pub bytes: u64,
    /// Bytes that the node's sockets received from when its list was seen until it was applied or given up.
    pub wire: u64,
    /// Bytes of all its packages, those included that the node had, once that was known.
    pub size: Option<u64>,
    /// How often it was tried.
    pub attempts: u32,
    /// When its list was seen.
    pub started: Duration,
    /// When it was applied or given up.
    pub ended: Option<Duration>,
    /// What became of it.
    pub outcome: Outcome,
    /// Bytes that the node's sockets had received before.
    received_before: u64,
}

/// What became of a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing yet.
    Unfinished,
    /// It is installed and confirmed.
    Applied,
    /// It was not installed.
    Failed(String),
    /// It was installed and taken back.
    RolledBack(String),
    /// A newer one came before it was installed.
    Replaced,
}

/// What became of a fleet.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Its nodes.
    pub nodes: Vec<NodeResult>,
    /// The newest list that any of them has seen.
    pub newest: Option<Digest>,
    /// How it stood meanwhile.
    pub samples: Vec<Sample>,
    /// How nodes came back that lost their connections.
    pub reconnects: Reconnects,
    /// What intruders did, and how often.
    pub attacks: BTreeMap<Attack, u64>,
    /// How often nodes refused a list, a root or a release, by the word of the reason.
    pub refusals: BTreeMap<String, u64>,
    /// How many releases each had to apply.
    pub releases: usize,
    /// How long it ran.
    pub time: Duration,
    /// Whether any node was ever connected.
    pub ever_connected: bool,
    /// The last trouble with the connection.
    pub trouble: Option<Trouble>,
}

impl Tally {
    /// For these nodes, of which nothing is known yet, waiting for so many releases on each.
    #[must_use]
    pub fn new(nodes: Vec<NodeResult>, releases: Option<usize>, until: Until) -> Tally {
        Tally {
            complete: if releases == Some(0) { nodes.len() } else { 0 },
            nodes,
            seen: BTreeSet::new(),
            newest: None,
            on_newest: 0,
            releases,
            until,
            standing: Standing::default(),
            samples: Vec::new(),
            reconnects: Reconnects::default(),
            attacks: BTreeMap::new(),
            refusals: BTreeMap::new(),
            ever_connected: false,
            trouble: None,
        }
    }

    /// What is known of a node.
    #[must_use]
    pub fn node(&self, index: usize) -> &NodeResult {
        &self.nodes[index]
    }

    /// What is known of all.
    #[must_use]
    pub fn nodes(&self) -> &[NodeResult] {
        &self.nodes
    }

    /// How the fleet stands.
    #[must_use]
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Notes how the fleet stands now, its sockets having received `wire` bytes.
    pub fn sample(&mut self, now: Duration, wire: u64) -> Sample {
        self.standing.wire = wire;
        let sample = Sample { at: now, standing: self.standing, newest: self.on_newest };
        self.samples.push(sample);
        sample
    }

    /// Package bytes a second, lately.
    #[must_use]
    pub fn throughput(&self) -> f64 {
        let [.., before, last] = &self.samples[..] else { return 0.0 };
        let time = last.at.saturating_sub(before.at).as_secs_f64();
        let bytes = last.standing.bytes.saturating_sub(before.standing.bytes) as f64;
        if time > 0.0 { bytes / time } else { 0.0 }
    }

    /// What nodes' last releases failed with, the commonest first, and how many. Looks at every node.
    #[must_use]
    pub fn errors(&self) -> Vec<(&str, usize)> {
        let mut errors: BTreeMap<&str, usize> = BTreeMap::new();
        for error in self.nodes.iter().filter_map(|node| node.records.last()?.outcome.error()) {
            *errors.entry(word(error)).or_default() += 1;
        }
        let mut errors: Vec<_> = errors.into_iter().collect();
        errors.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        errors
    }

    /// The node that has been under way for longest, with its phase. Looks at every node.
    #[must_use]
    pub fn straggler(&self) -> Option<(&NodeId, Phase, Duration)> {
        let resting = |phase| matches!(phase, Phase::Idle | Phase::Failed | Phase::RolledBack);
        let under_way = self.nodes.iter().filter_map(|node| {
            let (phase, since) = node.phase.filter(|(phase, _)| !resting(*phase))?;
            Some((&node.node, phase, since))
        });
        under_way.min_by_key(|(_, _, since)| *since)
    }

    /// Notes what a node's sockets carried in all.
    pub fn traffic(&mut self, index: usize, traffic: Traffic) {
        self.nodes[index].traffic = traffic;
    }

    /// Notes what befell a node.
    pub fn blow(&mut self, index: usize, blow: Blow) {
        self.nodes[index].blows[blow as usize] += 1;
        // It is off, and will be back when it is on again: no matter of its connection.
        self.nodes[index].lost_at = None;
        self.offline(index);
    }

    /// Notes what an intruder did.
    pub fn attack(&mut self, attack: Attack) {
        *self.attacks.entry(attack).or_default() += 1;
    }

    /// Notes that a node refused something, for the reason of this word.
    pub fn refused(&mut self, word: &str) {
        match self.refusals.get_mut(word) {
            Some(count) => *count += 1,
            None => drop(self.refusals.insert(word.to_owned(), 1)),
        }
    }

    /// Notes what a node has in the end.
    pub fn found(&mut self, index: usize, found: Result<Found, String>) {
        self.nodes[index].found = Some(found);
    }

    /// Notes a report of a node.
    pub fn report(&mut self, now: Duration, index: usize, report: &Report) {
        let node = &mut self.nodes[index];
        let phase = report.state.phase;
        let place = |phase| PHASES.iter().position(|other| *other == phase).unwrap_or_default();
        match node.phase {
            Some((before, _)) if before == phase => {}
            before => {
                if let Some((before, _)) = before {
                    self.standing.phases[place(before)] -= 1;
                }
                self.standing.phases[place(phase)] += 1;
                node.phase = Some((phase, now));
            }
        }
        // At the start nothing is known of the channel yet.
        let Some(list) = report.list else { return };
        let was_complete = self.releases.is_some_and(|releases| node.finished() >= releases);
        let was_applied = node.has_applied(list);
        let received = node.traffic.received;
        let records = &mut node.records;
        if records.iter().all(|record| record.list != list) {
            for record in records.iter_mut().filter(|record| record.outcome == Outcome::Unfinished) {
                record.outcome = Outcome::Replaced;
                record.ended = Some(now);
            }
            records.push(Record {
                list,
                sequence: report.state.sequence,
                version: report.state.version.clone(),
                bytes: 0,
                wire: 0,
                size: None,
                attempts: 0,
                // What came before is no part of it.
                received_before: received,
                started: now,
                ended: None,
                outcome: Outcome::Unfinished,
            });
        }
        let Some(record) = records.iter_mut().find(|record| record.list == list) else { return };
        self.standing.bytes += report.state.done.saturating_sub(record.bytes);
        record.bytes = record.bytes.max(report.state.done);
        record.size = record.size.or(report.size);
        // The first try is none again.
        self.standing.retries +=
            u64::from(report.state.attempt.max(1).saturating_sub(record.attempts.max(1)));
        record.attempts = record.attempts.max(report.state.attempt);
        let error = || report.state.error.clone().unwrap_or_default();
        let outcome = match report.state.phase {
            Phase::Idle => Outcome::Applied,
            Phase::Failed => Outcome::Failed(error()),
            Phase::RolledBack => Outcome::RolledBack(error()),
            Phase::Downloading
            | Phase::Verifying
            | Phase::Installing
            | Phase::Restarting
            | Phase::Confirming => Outcome::Unfinished,
        };
        // Looking again at what is applied does not make it unfinished.
        if record.outcome != outcome && record.outcome != Outcome::Applied {
            record.ended = (outcome != Outcome::Unfinished).then_some(now);
            record.wire = received.saturating_sub(record.received_before);
            record.outcome = outcome;
        }
        let is_new = self.seen.insert(list);
        if is_new && self.newest.is_none_or(|(sequence, _)| report.state.sequence >= sequence) {
            self.newest = Some((report.state.sequence, list));
            self.on_newest = 0;
        }
        let is_applied = node.has_applied(list);
        if self.newest.is_some_and(|(_, newest)| newest == list) && is_applied && (is_new || !was_applied) {
            self.on_newest += 1;
        }
        let is_complete = self.releases.is_some_and(|releases| node.finished() >= releases);
        self.complete = self.complete + usize::from(is_complete) - usize::from(was_complete);
    }

    /// Notes a connection.
    pub fn connected(&mut self, now: Duration, index: usize) {
        let node = &mut self.nodes[index];
        node.connects += 1;
        if let Some(lost_at) = node.lost_at.take() {
            self.reconnects.note(lost_at, now);
        }
        self.standing.online += usize::from(!std::mem::replace(&mut node.is_online, true));
        self.standing.connections += 1;
        self.ever_connected = true;
        self.trouble = None;
    }

    fn offline(&mut self, index: usize) {
        self.standing.online -= usize::from(std::mem::take(&mut self.nodes[index].is_online));
    }

    /// Notes that a connection was lost or not made; whether that is news.
    pub fn lost(&mut self, now: Duration, index: usize, trouble: &Trouble) -> bool {
        if self.nodes[index].is_online {
            self.nodes[index].lost_at = Some(now);
            self.offline(index);
        }
        self.trouble.replace(trouble.clone()).as_ref() != Some(trouble)
    }

    /// Whether every node finished as many releases as are waited for.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let Some(releases) = self.releases else { return false };
        match self.until {
            Until::Ended => self.complete == self.nodes.len(),
            Until::Applied => self.seen.len() >= releases && self.on_newest == self.nodes.len(),
        }
    }

    /// The result, after `time`, where each node had to apply `releases`.
    #[must_use]
    pub fn summary(&self, time: Duration, releases: usize) -> Summary {
        Summary {
            nodes: self.nodes.clone(),
            newest: self.newest.map(|(_, list)| list),
            samples: self.samples.clone(),
            reconnects: self.reconnects.clone(),
            attacks: self.attacks.clone(),
            refusals: self.refusals.clone(),
            releases,
            time,
            ever_connected: self.ever_connected,
            trouble: self.trouble.clone(),
        }
    }
}

impl NodeResult {
    /// Of a node that did nothing yet.
    #[must_use]
    pub fn new(node: NodeId, number: u64, platform: String, cohorts: Cohorts) -> NodeResult {
        NodeResult {
            node,
            number,
            platform,
            cohorts,
            records: Vec::new(),
            phase: None,
            traffic: Traffic::default(),
            connects: 0,
            is_online: false,
            lost_at: None,
            blows: [0; 3],
            found: None,
        }
    }

    fn has_applied(&self, list: Digest) -> bool {
        self.records.iter().any(|record| record.list == list && record.outcome == Outcome::Applied)
    }

    fn finished(&self) -> usize {
        let finished = |outcome: &Outcome| match outcome {
            Outcome::Applied | Outcome::Failed(_) | Outcome::RolledBack(_) => true,
            Outcome::Unfinished | Outcome::Replaced => false,
        };
        self.records.iter().filter(|record| finished(&record.outcome)).count()
    }

    /// Whether it applied all releases it saw, and saw so many.
    fn is_good(&self, releases: usize) -> bool {
        let good = |outcome: &Outcome| matches!(outcome, Outcome::Applied | Outcome::Replaced);
        !matches!(self.found, Some(Err(_)))
            && self.records.iter().all(|record| good(&record.outcome))
            && self.finished() >= releases
    }
}

impl Record {
    /// What people call the release.
    #[must_use]
    pub fn label(&self) -> String {
        label(self.sequence, &self.list)
    }

    /// The time from its list to its end.
    #[must_use]
    pub fn time(&self) -> Option<Duration> {
        self.ended.map(|ended| ended.saturating_sub(self.started))
    }
}

/// What people call a release: its sequence, or the start of its list's digest.
pub(crate) fn label(sequence: Option<u64>, list: &Digest) -> String {
    sequence.map_or_else(|| list.short(), |sequence| sequence.to_string())
}

impl Outcome {
    /// One of `unfinished`, `applied`, `failed`, `rolled_back` and `replaced`.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Unfinished => "unfinished",
            Outcome::Applied => "applied",
            Outcome::Failed(_) => "failed",
            Outcome::RolledBack(_) => "rolled_back",
            Outcome::Replaced => "replaced",
        }
    }

    /// Why, for what went wrong.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        match self {
            Outcome::Failed(error) | Outcome::RolledBack(error) => Some(error),
            Outcome::Unfinished | Outcome::Applied | Outcome::Replaced => None,
        }
    }
}

/// The stable word that an error begins with.
pub(super) fn word(error: &str) -> &str {
    error.split(':').next().unwrap_or_default()
}

impl Summary {
    /// Whether every node applied everything it should, and has it.
    #[must_use]
    pub fn all_applied(&self) -> bool {
        self.nodes.iter().all(|node| node.is_good(self.releases))
    }

    /// What the newest release came to on a node. What is on its flash counts, not what was told of it.
    #[must_use]
    pub fn fate_of(&self, node: &NodeResult) -> Fate {
        let has =
            matches!(&node.found, Some(Ok(found)) if found.list == self.newest && self.newest.is_some());
        match (&node.found, self.newest_of(node).map(|record| &record.outcome)) {
            (Some(Err(_)), _) => Fate::Bricked,
            _ if has => Fate::Applied,
            (_, Some(Outcome::Failed(_))) => Fate::Failed,
            (_, Some(Outcome::RolledBack(_))) => Fate::RolledBack,
            _ => Fate::Unfinished,
        }
    }

    /// What is known of the newest release on a node.
    #[must_use]
    pub fn newest_of<'a>(&self, node: &'a NodeResult) -> Option<&'a Record> {
        node.records.iter().find(|record| Some(record.list) == self.newest)
    }

    /// What a node did not come to, if it should have.
    #[must_use]
    pub fn trouble_of(&self, node: &NodeResult) -> Option<String> {
        match (&node.found, self.newest_of(node)) {
            (Some(Err(error)), _) => Some(format!("bricked: {error}")),
            (Some(Ok(found)), _) if found.list == self.newest => None,
            (_, Some(record)) => Some(match record.outcome.error() {
                Some(error) => format!("{}: {error}", record.outcome.word()),
                None => record.outcome.word().to_owned(),
            }),
            (_, None) => Some("saw no list".to_owned()),
        }
    }

    /// A table for people: one row for each node and release.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::ASCII_BORDERS_ONLY_CONDENSED);
        table.set_header(["device", "release", "bytes received", "time (s)", "result"]);
        for node in &self.nodes {
            for record in &node.records {
                let release = match &record.version {
                    Some(version) => format!("{} ({version})", record.label()),
                    None => record.label(),
                };
                let time =
                    record.time().map_or_else(|| "-".to_owned(), |time| format!("{:.2}", time.as_secs_f64()));
                let word = record.outcome.word().replace('_', " ");
                let result = match record.outcome.error() {
                    Some(error) => format!("{word}: {error}"),
                    None => word,
                };
                table.add_row([node.node.to_string(), release, record.bytes.to_string(), time, result]);
            }
            if node.records.is_empty() {
                table.add_row([node.node.as_str(), "-", "0", "-", "saw no release"]);
            }
        }
        for column in [2, 3] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.trim_fmt()
    }
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::node::State;

    use super::*;

    fn report(list: &str, sequence: u64, phase: Phase, done: u64, error: Option<&str>) -> Report {
        let state = State {
            phase,
            sequence: Some(sequence),
            version: Some("1.0".into()),
            done,
            total: 9,
            error: error.map(str::to_owned),
            attempt: 1,
            held: None,
            extra: serde_json::Map::new(),
        };
        Report { state, list: Some(Digest::of(list.as_bytes())), size: Some(9) }
    }

    fn tally(releases: usize) -> Tally {
        let node = |name, number| {
            NodeResult::new(NodeId::new(name).unwrap(), number, "esp32".to_owned(), Vec::new())
        };
        Tally::new(vec![node("a", 1), node("b", 2)], Some(releases), Until::Ended)
    }

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_fleet_is_complete_when_every_node_finished_its_releases() {
        let mut tally = tally(2);
        for node in [0, 1] {
            assert!(!tally.is_complete());
            tally.report(at(1), node, &report("one", 1, Phase::Downloading, 0, None));
            tally.report(at(3), node, &report("one", 1, Phase::Idle, 9, None));
            tally.report(at(4), node, &report("two", 2, Phase::Failed, 4, Some("wrong-hash: x")));
        }
        assert!(tally.is_complete());
        let summary = tally.summary(at(5), 2);
        assert!(!summary.all_applied());
        let first = &summary.nodes[1].records[0];
        assert_eq!((first.bytes, first.time(), &first.outcome), (9, Some(at(2)), &Outcome::Applied));
        assert!(summary.table().contains("failed: wrong-hash: x"), "{}", summary.table());
    }

    #[test]
    fn a_release_that_is_tried_again_and_applied_is_applied() {
        let mut tally = tally(1);
        tally.report(at(1), 0, &report("one", 1, Phase::Failed, 0, Some("missing-package: x")));
        tally.report(at(2), 0, &report("one", 1, Phase::Downloading, 0, None));
        assert_eq!(tally.node(0).records[0].outcome, Outcome::Unfinished);
        tally.report(at(3), 0, &report("one", 1, Phase::Idle, 9, None));
        assert_eq!(tally.node(0).records[0].outcome, Outcome::Applied);
        // A later report of the same does not change when it ended.
        tally.report(at(8), 0, &report("one", 1, Phase::Idle, 0, None));
        assert_eq!((tally.node(0).records[0].time(), tally.node(0).records[0].bytes), (Some(at(2)), 9));
    }

    #[test]
    fn where_what_fails_is_tried_again_a_fleet_is_complete_when_all_have_the_newest() {
        let mut tally = Tally { until: Until::Applied, ..tally(2) };
        tally.report(at(1), 0, &report("one", 1, Phase::Idle, 9, None));
        tally.report(at(1), 1, &report("one", 1, Phase::Failed, 9, Some("no-space: x")));
        tally.report(at(2), 0, &report("two", 2, Phase::Idle, 9, None));
        assert_eq!((tally.is_complete(), tally.sample(at(2), 0).newest), (false, 1));
        tally.report(at(3), 1, &report("two", 2, Phase::Failed, 9, Some("no-space: x")));
        assert!(!tally.is_complete());
        tally.report(at(4), 1, &report("two", 2, Phase::Idle, 9, None));
        tally.report(at(5), 1, &report("two", 2, Phase::Idle, 9, None));
        assert_eq!((tally.is_complete(), tally.sample(at(5), 0).newest), (true, 2));
    }

    #[test]
    fn connections_that_are_lost_are_timed_and_those_that_end_with_the_power_are_not() {
        let mut tally = tally(1);
        let trouble = Trouble { error: "gone".into(), hint: String::new() };
        for node in [0, 1] {
            tally.connected(at(1), node);
        }
        assert!(tally.lost(at(2), 0, &trouble));
        // An attempt that fails is no second loss.
        assert!(!tally.lost(at(3), 0, &trouble));
        tally.blow(1, Blow::PowerCut);
        assert_eq!(tally.standing().online, 0);
        for node in [0, 1] {
            tally.connected(at(4), node);
        }
        assert_eq!((tally.standing().online, tally.standing().connections), (2, 4));
        let bins = tally.summary(at(5), 1).reconnects.bins();
        assert_eq!(bins.iter().map(|bin| bin.count).sum::<usize>(), 1);
        assert_eq!(bins.last().map(|bin| bin.from), Some(at(2)));
    }

    #[test]
    fn a_release_that_a_newer_one_replaced_does_not_count() {
        let mut tally = tally(1);
        tally.report(at(1), 0, &report("one", 1, Phase::Downloading, 0, None));
        tally.report(at(2), 0, &report("two", 2, Phase::Downloading, 0, None));
        assert_eq!(tally.node(0).records[0].outcome, Outcome::Replaced);
        assert_eq!(tally.node(0).finished(), 0);
    }
}
