//! What became of each release on each node.

use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use mpypi_protocol::{Digest, NodeId, node::Phase};
use serde::Serialize;

use crate::{node::Trouble, update::Report};

/// Counts along while a fleet runs.
#[derive(Debug)]
pub struct Tally {
    nodes: Vec<NodeResult>,
    releases: Option<usize>,
    ever_connected: bool,
    trouble: Option<Trouble>,
}

/// One node's releases, in the order they came.
#[derive(Debug, Clone)]
pub struct NodeResult {
    /// The node.
    pub node: NodeId,
    /// Its releases.
    pub records: Vec<Record>,
}

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
    /// When its list was seen.
    pub started: Duration,
    /// When it was applied or given up.
    pub ended: Option<Duration>,
    /// What became of it.
    pub outcome: Outcome,
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
    /// For these nodes, waiting for so many releases on each.
    #[must_use]
    pub fn new(nodes: Vec<NodeId>, releases: Option<usize>) -> Tally {
        let nodes = nodes.into_iter().map(|node| NodeResult { node, records: Vec::new() }).collect();
        Tally { nodes, releases, ever_connected: false, trouble: None }
    }

    /// What is known of a node.
    #[must_use]
    pub fn node(&self, index: usize) -> &NodeResult {
        &self.nodes[index]
    }

    /// Notes a report of a node.
    pub fn report(&mut self, now: Duration, index: usize, report: &Report) {
        // At the start nothing is known of the channel yet.
        let Some(list) = report.list else { return };
        let records = &mut self.nodes[index].records;
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
                started: now,
                ended: None,
                outcome: Outcome::Unfinished,
            });
        }
        let Some(record) = records.iter_mut().find(|record| record.list == list) else { return };
        record.bytes = record.bytes.max(report.state.done);
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
            record.outcome = outcome;
        }
    }

    /// Notes a connection.
    pub fn connected(&mut self) {
        self.ever_connected = true;
        self.trouble = None;
    }

    /// Notes that a connection was lost or not made; whether that is news.
    pub fn lost(&mut self, trouble: &Trouble) -> bool {
        self.trouble.replace(trouble.clone()).as_ref() != Some(trouble)
    }

    /// Whether every node finished as many releases as are waited for.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.releases.is_some_and(|releases| self.nodes.iter().all(|node| node.finished() >= releases))
    }

    /// The result, after `time`, where each node had to apply `releases`.
    #[must_use]
    pub fn summary(&self, time: Duration, releases: usize) -> Summary {
        Summary {
            nodes: self.nodes.clone(),
            releases,
            time,
            ever_connected: self.ever_connected,
            trouble: self.trouble.clone(),
        }
    }
}

impl NodeResult {
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
        self.records.iter().all(|record| good(&record.outcome)) && self.finished() >= releases
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

#[derive(Serialize)]
struct JsonSummary<'a> {
    applied: bool,
    seconds: f64,
    results: Vec<JsonRecord<'a>>,
}

#[derive(Serialize)]
struct JsonRecord<'a> {
    device: &'a NodeId,
    sequence: Option<u64>,
    version: Option<&'a str>,
    list: Digest,
    bytes: u64,
    seconds: Option<f64>,
    result: &'static str,
    error: Option<&'a str>,
}

impl Summary {
    /// Whether every node applied everything it should.
    #[must_use]
    pub fn all_applied(&self) -> bool {
        self.nodes.iter().all(|node| node.is_good(self.releases))
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

    /// The same as JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let seconds = |time: Duration| (time.as_secs_f64() * 1000.0).round() / 1000.0;
        let mut results = Vec::new();
        for NodeResult { node, records } in &self.nodes {
            results.extend(records.iter().map(|record| JsonRecord {
                device: node,
                sequence: record.sequence,
                version: record.version.as_deref(),
                list: record.list,
                bytes: record.bytes,
                seconds: record.time().map(seconds),
                result: record.outcome.word(),
                error: record.outcome.error(),
            }));
        }
        let summary = JsonSummary { applied: self.all_applied(), seconds: seconds(self.time), results };
        serde_json::to_string_pretty(&summary).expect("plain values always make JSON")
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
            extra: serde_json::Map::new(),
        };
        Report { state, list: Some(Digest::of(list.as_bytes())) }
    }

    fn tally(releases: usize) -> Tally {
        Tally::new(vec![NodeId::new("a").unwrap(), NodeId::new("b").unwrap()], Some(releases))
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
        let json: serde_json::Value = serde_json::from_str(&summary.json()).unwrap();
        assert_eq!(json["results"][3]["error"], "wrong-hash: x");
        assert_eq!(json["results"][3]["result"], "failed");
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
    fn a_release_that_a_newer_one_replaced_does_not_count() {
        let mut tally = tally(1);
        tally.report(at(1), 0, &report("one", 1, Phase::Downloading, 0, None));
        tally.report(at(2), 0, &report("two", 2, Phase::Downloading, 0, None));
        assert_eq!(tally.node(0).records[0].outcome, Outcome::Replaced);
        assert_eq!(tally.node(0).finished(), 0);
    }
}
