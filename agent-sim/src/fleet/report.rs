//! What a fleet came to, for programs: JSON and JUnit. For people: [`html`](super::html); for a pull request:
//! [`github`](super::github).

use std::{collections::BTreeMap, time::Duration};

use mpypi_protocol::{Digest, NodeId};
use quick_junit::{NonSuccessKind, Report as JunitReport, TestCase, TestCaseStatus, TestSuite};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde::Serialize;

use super::{
    expect::{Expectation, Metrics, Verdict},
    reconnects::Reconnects,
    tally::{Fate, NodeResult, Outcome, PHASES, Sample, Summary, word},
};
use crate::limits;

/// The version of the JSON: keys may come, none goes or changes its meaning within one.
pub const SCHEMA: &str = "mpypi-fleet/1";

/// What a fleet came to.
///
/// `schema` is `mpypi-fleet/1`. Within that version keys may be added; none is removed, and none changes its meaning.
/// Times are seconds since the fleet started, sizes are bytes.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(title = "mpypi-fleet/1")]
pub struct Report<'a> {
    /// The version of this format.
    schema: &'static str,
    /// Whether every expectation was met; without any, whether every node applied every release it saw.
    pub good: bool,
    /// Whether every node applied every release it saw.
    applied: bool,
    /// What decided everything random.
    pub(super) seed: u64,
    /// The profile: a name or a file.
    pub(super) profile: Option<&'a str>,
    /// How long the fleet ran.
    pub(super) seconds: f64,
    /// The fleet's numbers in the end.
    pub(super) metrics: Metrics,
    /// What was expected and found.
    pub(super) expectations: Vec<Verdict>,
    /// The releases that nodes saw, by sequence.
    pub(super) releases: Vec<Release<'a>>,
    /// What became of the newest release, by platform.
    platforms: BTreeMap<&'a str, Platform>,
    /// What became of the newest release, by what nodes have in common.
    pub(super) cohorts: Vec<Cohort<'a>>,
    /// How many releases failed on nodes in the end, by the word their error starts with.
    pub(super) errors: BTreeMap<&'a str, usize>,
    /// How often nodes refused a list, a root or a release, by the word of the reason; each of them may be tried again.
    pub(super) refusals: &'a BTreeMap<String, u64>,
    /// How often an intruder struck, by what he did.
    pub(super) attacks: BTreeMap<&'static str, u64>,
    /// What befell the fleet.
    pub(super) blows: Blows,
    /// How nodes came back whose connections broke.
    pub(super) reconnects: Comebacks,
    /// How the fleet stood, over time.
    pub(super) samples: Vec<Moment>,
    /// Each release on each node.
    results: Vec<Row<'a>>,
    /// The nodes that did not come to what they should.
    pub(super) troubled: Vec<Troubled<'a>>,
    /// What alone shows one of them again, but for its number.
    #[serde(skip)]
    pub(super) again: String,
}

/// One release on all nodes.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Release<'a> {
    /// The SHA-256 of its list.
    #[schemars(with = "String")]
    pub(super) list: Digest,
    /// Its sequence.
    pub(super) sequence: Option<u64>,
    /// Its version, for people.
    pub(super) version: Option<&'a str>,
    /// Bytes of all its packages: a full download.
    pub(super) size: Option<u64>,
    /// Nodes that applied it.
    pub(super) applied: usize,
    /// Nodes on which it failed.
    pub(super) failed: usize,
    /// Nodes that took it back.
    pub(super) rolled_back: usize,
    /// Bytes that sockets received for it, of nodes that applied it.
    pub(super) wire_bytes: u64,
    /// Bytes of a full download, of the same nodes.
    pub(super) full_bytes: u64,
    /// Tries, of all nodes.
    pub(super) attempts: u64,
    /// When the first node saw it.
    pub(super) seen_seconds: f64,
    /// From its list to its end, of nodes that applied it: half took no longer.
    pub(super) median_seconds: Option<f64>,
    /// 95 % took no longer.
    pub(super) p95_seconds: Option<f64>,
    /// None took longer.
    pub(super) slowest_seconds: Option<f64>,
}

/// The nodes of one platform.
#[derive(Debug, Default, Serialize, JsonSchema)]
struct Platform {
    /// How many there are.
    nodes: usize,
    /// How many came to what they should.
    applied: usize,
    /// How many do not start any more, or have a wrong byte.
    bricked: usize,
}

/// Nodes that have something in common.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(super) struct Cohort<'a> {
    /// In which respect: `platform`, `abi`, `history`, `agent` or `fault`.
    pub(super) by: &'a str,
    /// What it is.
    pub(super) name: &'a str,
    /// How many there are.
    pub(super) nodes: usize,
    /// Of these, how many run the newest release, every byte of it right.
    pub(super) applied: usize,
    /// On how many it failed.
    pub(super) failed: usize,
    /// How many took it back.
    pub(super) rolled_back: usize,
    /// How many do not start any more, or have a wrong byte.
    pub(super) bricked: usize,
    /// How many are not done with it.
    pub(super) unfinished: usize,
    /// From its list to its end, of those that applied it: half took no longer.
    pub(super) median_seconds: Option<f64>,
}

/// What befell the fleet.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(super) struct Blows {
    /// Power cuts.
    pub(super) power_cuts: u64,
    /// Crashes of the application before it confirmed a release.
    pub(super) crashes: u64,
    /// Times that a node went to sleep.
    pub(super) naps: u64,
    /// Connections made.
    pub(super) connections: u64,
}

/// How nodes came back whose connections broke.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Comebacks {
    /// How often that was.
    pub(super) count: usize,
    /// Most of them within a tenth of a second.
    pub(super) crowd: usize,
    /// By how long nodes were without a connection.
    pub(super) after: Vec<After>,
    /// The same, as lines of text.
    #[serde(skip)]
    text: String,
}

/// Nodes that came back after a time in this range.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct After {
    /// At least so long.
    pub(super) from_seconds: f64,
    /// Less than so long.
    pub(super) to_seconds: f64,
    /// How many.
    pub(super) count: usize,
}

/// How the fleet stood at a moment.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Moment {
    /// When.
    pub(super) seconds: f64,
    /// Nodes that applied the newest release that any node had seen by then.
    pub(super) applied: usize,
    /// Package bytes received by then.
    pub(super) bytes: u64,
    /// Bytes that all sockets had received by then.
    pub(super) wire_bytes: u64,
    /// Nodes that were connected.
    pub(super) online: usize,
    /// Connections made by then.
    pub(super) connections: u64,
    /// Tries of a release by then, beyond the first of each node.
    pub(super) retries: u64,
    /// Nodes in each phase.
    pub(super) phases: BTreeMap<String, usize>,
}

/// One release on one node.
#[derive(Debug, Serialize, JsonSchema)]
struct Row<'a> {
    /// The node.
    #[schemars(with = "String")]
    device: &'a NodeId,
    /// Its platform.
    platform: &'a str,
    /// The release's sequence.
    sequence: Option<u64>,
    /// Its version, for people.
    version: Option<&'a str>,
    /// The SHA-256 of its list.
    #[schemars(with = "String")]
    list: Digest,
    /// Package bytes received for it.
    bytes: u64,
    /// Bytes that the node's sockets received for it.
    wire_bytes: u64,
    /// How often it was tried.
    attempts: u32,
    /// From its list to its end, if it ended.
    seconds: Option<f64>,
    /// `unfinished`, `applied`, `failed`, `rolled_back` or `replaced`.
    result: &'static str,
    /// Why it failed or was taken back: a stable word, `: `, then details for people.
    error: Option<&'a str>,
}

/// A node that did not come to what it should.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Troubled<'a> {
    /// The node.
    #[schemars(with = "String")]
    pub(super) device: &'a NodeId,
    /// Its number, for `--node`.
    pub(super) number: u64,
    /// What it came to instead.
    pub(super) trouble: String,
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
        let mut platforms: BTreeMap<&str, Platform> = BTreeMap::new();
        let mut errors: BTreeMap<&str, usize> = BTreeMap::new();
        let mut blows = Blows::default();
        let mut troubled = Vec::new();
        for node in &summary.nodes {
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
                number: node.number,
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
            cohorts: cohorts(summary),
            errors,
            refusals: &summary.refusals,
            attacks: summary.attacks.iter().map(|(attack, count)| (attack.word(), *count)).collect(),
            blows,
            reconnects: Comebacks::of(&summary.reconnects),
            samples: samples(&summary.samples),
            results: rows(&summary.nodes),
            troubled,
            again: again(seed, profile),
        }
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain values always make JSON")
    }

    /// The JSON Schema of that JSON: what each key means.
    #[must_use]
    pub fn schema() -> String {
        let generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
        let schema = generator.into_root_schema_for::<Report<'_>>();
        serde_json::to_string_pretty(&schema).expect("plain values always make JSON")
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
            for Troubled { device, number, trouble } in self.troubled.iter().take(limits::NAMED) {
                let again = format!("to see it alone: {} --node {number}", self.again);
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
                lines +=
                    &format!(", {each} bytes each at the socket: {share:.1} % of a full download ({size})");
            }
            for (count, word) in [(release.failed, "failed"), (release.rolled_back, "rolled back")] {
                if count > 0 {
                    lines += &format!(", {word} on {count}");
                }
            }
            lines.push('\n');
        }
        for (what, counts) in [("attacks", all(&self.attacks)), ("refused", all(self.refusals))] {
            if !self.attacks.is_empty() && !counts.is_empty() {
                lines += &format!("{what}: {counts}\n");
            }
        }
        lines + &self.reconnects.text
    }
}

/// What there is, and how often.
fn all(counts: &BTreeMap<impl AsRef<str>, u64>) -> String {
    let counts: Vec<_> = counts.iter().map(|(what, count)| format!("{} {count}", what.as_ref())).collect();
    counts.join(", ")
}

impl Comebacks {
    fn of(reconnects: &Reconnects) -> Comebacks {
        let after = reconnects.bins().into_iter().map(|bin| After {
            from_seconds: seconds(bin.from),
            to_seconds: seconds(bin.to),
            count: bin.count,
        });
        Comebacks {
            count: reconnects.count(),
            crowd: reconnects.crowd(),
            after: after.collect(),
            text: reconnects.text(),
        }
    }
}

impl Moment {
    fn of(sample: &Sample) -> Moment {
        let phases = PHASES.iter().zip(sample.standing.phases).filter(|(_, count)| *count > 0);
        Moment {
            seconds: seconds(sample.at),
            applied: sample.newest,
            bytes: sample.standing.bytes,
            wire_bytes: sample.standing.wire,
            online: sample.standing.online,
            connections: sample.standing.connections,
            retries: sample.standing.retries,
            phases: phases.map(|(phase, count)| (phase.to_string().replace(' ', "_"), count)).collect(),
        }
    }
}

/// All of a short run; of a longer one every nth, and the last.
fn samples(samples: &[Sample]) -> Vec<Moment> {
    let every = samples.len().div_ceil(limits::SAMPLES).max(1);
    let mut moments: Vec<_> = samples.iter().step_by(every).map(Moment::of).collect();
    if every > 1 {
        moments.extend(samples.last().map(Moment::of));
    }
    moments
}

/// What shows a node of this fleet alone.
fn again(seed: u64, profile: Option<&str>) -> String {
    let profile = profile.map(|profile| format!(" --profile {profile}")).unwrap_or_default();
    format!("mpypi-agent fleet{profile} --seed {seed}")
}

fn cohorts(summary: &Summary) -> Vec<Cohort<'_>> {
    let mut cohorts: BTreeMap<(&str, &str), (Cohort<'_>, Vec<Duration>)> = BTreeMap::new();
    for node in &summary.nodes {
        let fate = summary.fate_of(node);
        let time = summary.newest_of(node).and_then(super::tally::Record::time);
        for (by, name) in &node.cohorts {
            let empty = || (Cohort { by, name, ..Cohort::default() }, Vec::new());
            let (cohort, times) = cohorts.entry((by, name)).or_insert_with(empty);
            cohort.nodes += 1;
            match fate {
                Fate::Applied => cohort.applied += 1,
                Fate::Failed => cohort.failed += 1,
                Fate::RolledBack => cohort.rolled_back += 1,
                Fate::Bricked => cohort.bricked += 1,
                Fate::Unfinished => cohort.unfinished += 1,
            }
            times.extend(time.filter(|_| fate == Fate::Applied));
        }
    }
    cohorts
        .into_values()
        .map(|(mut cohort, mut times)| {
            times.sort();
            cohort.median_seconds = quantile(&times, 0.5);
            cohort
        })
        .collect()
}

/// What so large a share of these times, which are sorted, does not exceed.
fn quantile(times: &[Duration], share: f64) -> Option<f64> {
    let place = (times.len() as f64 * share).ceil() as usize;
    times.get(place.saturating_sub(1)).copied().map(seconds)
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
            full_bytes: 0,
            attempts: 0,
            seen_seconds: seconds(record.started),
            median_seconds: None,
            p95_seconds: None,
            slowest_seconds: None,
        };
        let place = releases.entry((record.sequence, record.list));
        let (release, times) = place.or_insert_with(|| (empty(), Vec::new()));
        release.size = release.size.max(record.size);
        release.attempts += u64::from(record.attempts);
        release.seen_seconds = release.seen_seconds.min(seconds(record.started));
        match &record.outcome {
            Outcome::Applied => {
                release.applied += 1;
                release.wire_bytes += record.wire;
                release.full_bytes += record.size.unwrap_or_default();
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
            release.median_seconds = quantile(&times, 0.5);
            release.p95_seconds = quantile(&times, 0.95);
            release.slowest_seconds = quantile(&times, 1.0);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What programs rely on. Where this fails, keys may have come; if one went or changed its meaning, the version
    /// must change. `mpypi-agent fleet --show-schema` prints the new text.
    #[test]
    fn the_schema_of_the_report_is_what_programs_were_told() {
        let told = include_str!("../../schemas/mpypi-fleet-1.json");
        assert!(Report::schema() == told.trim_end(), "{}", Report::schema());
    }
}
