//! What a fleet came to, for programs: JSON and JUnit.

use std::{collections::BTreeMap, time::Duration};

use mpypi_protocol::{Digest, NodeId};
use quick_junit::{NonSuccessKind, Report as JunitReport, TestCase, TestCaseStatus, TestSuite};
use serde::Serialize;

use super::{
    expect::{Expectation, Metrics, Verdict},
    tally::{NodeResult, Outcome, PHASES, Sample, Summary, word},
};

/// The version of the JSON: keys may come, none goes or changes its meaning within one.
pub const SCHEMA: &str = "mpypi-fleet/1";

/// Most nodes that a JUnit report names: CI shows each.
const NAMED: usize = 100;

/// A fleet's report.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    schema: &'static str,
    /// Whether every expectation was met; without any, whether every node applied every release it saw.
    pub good: bool,
    /// Whether every node applied every release it saw.
    applied: bool,
    seed: u64,
    profile: Option<&'a str>,
    seconds: f64,
    metrics: Metrics,
    expectations: Vec<Verdict>,
    releases: Vec<Release<'a>>,
    platforms: BTreeMap<&'a str, Cohort>,
    errors: BTreeMap<&'a str, usize>,
    blows: Blows,
    samples: Vec<Moment>,
    results: Vec<Row<'a>>,
    /// The nodes that did not come to what they should.
    troubled: Vec<Troubled<'a>>,
}

/// One release on all nodes.
#[derive(Debug, Serialize)]
struct Release<'a> {
    list: Digest,
    sequence: Option<u64>,
    version: Option<&'a str>,
    /// Bytes of all its packages.
    size: Option<u64>,
    applied: usize,
    failed: usize,
    rolled_back: usize,
    /// Bytes that sockets received for it, of nodes that applied it.
    wire_bytes: u64,
    /// Tries, of all nodes.
    attempts: u64,
    /// Seconds from its list to its end, of nodes that applied it.
    median_seconds: Option<f64>,
    p95_seconds: Option<f64>,
    slowest_seconds: Option<f64>,
}

/// The nodes of one platform.
#[derive(Debug, Default, Serialize)]
struct Cohort {
    nodes: usize,
    applied: usize,
    bricked: usize,
}

/// What befell the fleet.
#[derive(Debug, Default, Serialize)]
struct Blows {
    power_cuts: u64,
    crashes: u64,
    naps: u64,
    connections: u64,
}

/// How the fleet stood at a moment.
#[derive(Debug, Serialize)]
struct Moment {
    seconds: f64,
    applied: usize,
    bytes: u64,
    phases: BTreeMap<String, usize>,
}

#[derive(Debug, Serialize)]
struct Row<'a> {
    device: &'a NodeId,
    platform: &'a str,
    sequence: Option<u64>,
    version: Option<&'a str>,
    list: Digest,
    bytes: u64,
    wire_bytes: u64,
    attempts: u32,
    seconds: Option<f64>,
    result: &'static str,
    error: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct Troubled<'a> {
    device: &'a NodeId,
    number: usize,
    trouble: String,
}

impl<'a> Report<'a> {
    /// Of a fleet that had this seed and profile.
    #[must_use]
    pub fn of(
        summary: &'a Summary,
        expectations: &[Expectation],
        seed: u64,
        profile: Option<&'a str>,
    ) -> Report<'a> {
        let metrics = Metrics::of(summary);
        let expectations: Vec<_> = expectations.iter().map(|expected| expected.judge(&metrics)).collect();
        let applied = summary.all_applied();
        let mut platforms: BTreeMap<&str, Cohort> = BTreeMap::new();
        let mut errors: BTreeMap<&str, usize> = BTreeMap::new();
        let mut blows = Blows::default();
        let mut troubled = Vec::new();
        for (index, node) in summary.nodes.iter().enumerate() {
            let trouble = summary.trouble_of(node);
            let cohort = platforms.entry(&node.platform).or_default();
            cohort.nodes += 1;
            cohort.applied += usize::from(trouble.is_none());
            cohort.bricked += usize::from(matches!(node.found, Some(Err(_))));
            for error in node.records.iter().filter_map(|record| record.outcome.error()) {
                *errors.entry(word(error)).or_default() += 1;
            }
            let [power_cuts, crashes, naps] = node.blows.map(u64::from);
            blows.power_cuts += power_cuts;
            blows.crashes += crashes;
            blows.naps += naps;
            blows.connections += u64::from(node.connects);
            troubled.extend(trouble.map(|trouble| Troubled {
                device: &node.node,
                number: index + 1,
                trouble,
            }));
        }
        Report {
            schema: SCHEMA,
            good: match expectations.is_empty() {
                true => applied,
                false => expectations.iter().all(|verdict| verdict.met),
            },
            applied,
            seed,
            profile,
            seconds: seconds(summary.time),
            metrics,
            expectations,
            releases: releases(&summary.nodes),
            platforms,
            errors,
            blows,
            samples: summary.samples.iter().map(Moment::of).collect(),
            results: rows(&summary.nodes),
            troubled,
        }
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain values always make JSON")
    }

    /// For CI: a test for each expectation, and one for each node that did not come to what it should, up to a number.
    ///
    /// # Errors
    /// It cannot be written as XML.
    pub fn junit(&self) -> Result<String, quick_junit::SerializeError> {
        let mut suite = TestSuite::new("fleet");
        for verdict in &self.expectations {
            suite.add_test_case(case(&verdict.expected, (!verdict.met).then_some(&*verdict.found), ""));
        }
        if self.expectations.is_empty() {
            let found = format!("{} of {} nodes did", self.metrics.applied, self.metrics.nodes);
            let name = "every node applied every release";
            suite.add_test_case(case(name, (!self.applied).then_some(&*found), ""));
        }
        if !self.good {
            for Troubled { device, number, trouble } in self.troubled.iter().take(NAMED) {
                let again =
                    format!("to see it alone: mpypi-agent fleet --seed {} --node {number} …", self.seed);
                suite.add_test_case(case(device.as_str(), Some(trouble), &again));
            }
        }
        let mut report = JunitReport::new("mpypi-agent fleet");
        report.add_test_suite(suite);
        report.to_string()
    }

    /// What was expected and found, a line each.
    #[must_use]
    pub fn verdicts(&self) -> String {
        let line = |verdict: &Verdict| {
            let mark = if verdict.met { "met" } else { "NOT MET" };
            format!("{:<20} {:>10}  {mark}\n", verdict.expected, verdict.found)
        };
        self.expectations.iter().map(line).collect()
    }

    /// What did not come to what it should, a line each, with what shows it alone; up to `most`.
    #[must_use]
    pub fn troubles(&self, most: usize) -> String {
        let mut lines = String::new();
        for Troubled { device, number, trouble } in self.troubled.iter().take(most) {
            lines += &format!("{device} (--seed {} --node {number}): {trouble}\n", self.seed);
        }
        if self.troubled.len() > most {
            lines += &format!("… and {} more\n", self.troubled.len() - most);
        }
        lines
    }

    /// One line for each release.
    #[must_use]
    pub fn overview(&self) -> String {
        let mut lines = String::new();
        for release in &self.releases {
            let name = release.sequence.map_or_else(|| release.list.short(), |sequence| sequence.to_string());
            lines +=
                &format!("release {name}: applied by {} of {} nodes", release.applied, self.metrics.nodes);
            if let (Some(median), Some(slowest)) = (release.median_seconds, release.slowest_seconds) {
                lines += &format!(", in {median:.2} s (median) to {slowest:.2} s");
            }
            if let (Some(size @ 1..), 1..) = (release.size, release.applied) {
                let each = release.wire_bytes / release.applied as u64;
                let share = each as f64 / size as f64 * 100.0;
                lines += &format!(", {each} bytes each at the socket: {share:.1} % of its {size}");
            }
            for (count, word) in [(release.failed, "failed"), (release.rolled_back, "rolled back")] {
                if count > 0 {
                    lines += &format!(", {word} on {count}");
                }
            }
            lines.push('\n');
        }
        lines
    }
}

impl Moment {
    fn of(sample: &Sample) -> Moment {
        let phases = PHASES.iter().zip(sample.standing.phases).filter(|(_, count)| *count > 0);
        Moment {
            seconds: seconds(sample.at),
            applied: sample.newest,
            bytes: sample.standing.bytes,
            phases: phases.map(|(phase, count)| (phase.to_string().replace(' ', "_"), count)).collect(),
        }
    }
}

fn rows(nodes: &[NodeResult]) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for node in nodes {
        rows.extend(node.records.iter().map(|record| Row {
            device: &node.node,
            platform: &node.platform,
            sequence: record.sequence,
            version: record.version.as_deref(),
            list: record.list,
            bytes: record.bytes,
            wire_bytes: record.wire,
            attempts: record.attempts,
            seconds: record.time().map(seconds),
            result: record.outcome.word(),
            error: record.outcome.error(),
        }));
    }
    rows
}

fn releases(nodes: &[NodeResult]) -> Vec<Release<'_>> {
    let mut releases: BTreeMap<(Option<u64>, Digest), (Release<'_>, Vec<Duration>)> = BTreeMap::new();
    for record in nodes.iter().flat_map(|node| &node.records) {
        let empty = || Release {
            list: record.list,
            sequence: record.sequence,
            version: record.version.as_deref(),
            size: None,
            applied: 0,
            failed: 0,
            rolled_back: 0,
            wire_bytes: 0,
            attempts: 0,
            median_seconds: None,
            p95_seconds: None,
            slowest_seconds: None,
        };
        let place = releases.entry((record.sequence, record.list));
        let (release, times) = place.or_insert_with(|| (empty(), Vec::new()));
        release.size = release.size.max(record.size);
        release.attempts += u64::from(record.attempts);
        match &record.outcome {
            Outcome::Applied => {
                release.applied += 1;
                release.wire_bytes += record.wire;
                times.extend(record.time());
            }
            Outcome::Failed(_) => release.failed += 1,
            Outcome::RolledBack(_) => release.rolled_back += 1,
            Outcome::Unfinished | Outcome::Replaced => {}
        }
    }
    releases
        .into_values()
        .map(|(mut release, mut times)| {
            times.sort();
            let at = |share: f64| {
                let place = (times.len() as f64 * share).ceil() as usize;
                times.get(place.saturating_sub(1)).copied().map(seconds)
            };
            release.median_seconds = at(0.5);
            release.p95_seconds = at(0.95);
            release.slowest_seconds = at(1.0);
            release
        })
        .collect()
}

fn case(name: &str, failure: Option<&str>, description: &str) -> TestCase {
    let status = match failure {
        None => TestCaseStatus::success(),
        Some(message) => {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status.set_message(message);
            status.set_description(description);
            status
        }
    };
    TestCase::new(name, status)
}

/// In seconds, to the millisecond.
fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}
