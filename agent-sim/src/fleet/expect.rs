//! What a fleet is expected to come to.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::Serialize;

use super::tally::{Fate, Summary};

/// Something that is counted at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Nodes that run the newest release, every byte of it right.
    Applied,
    /// Nodes on which the newest release failed.
    Failed,
    /// Nodes that took the newest release back.
    RolledBack,
    /// Nodes that do not start any more, or have a wrong byte.
    Bricked,
    /// Nodes on which nothing became of the newest release yet.
    Unfinished,
    /// Bytes that a node's sockets received for the newest release, beside what all of the release takes: of all nodes
    /// that applied it, together.
    Bytes,
}

/// How a number is to stand to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    Exactly,
    AtLeast,
    AtMost,
}

/// Something that is expected, as `applied=100%`.
#[derive(Debug, Clone, PartialEq)]
pub struct Expectation {
    metric: Metric,
    relation: Relation,
    value: f64,
    /// Whether the value is a share, in percent.
    is_share: bool,
}

/// What became of an expectation.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Verdict {
    /// What was expected.
    pub expected: String,
    /// What was found, in the same unit.
    pub found: String,
    /// Whether that is it.
    pub met: bool,
}

/// A fleet's numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, JsonSchema)]
pub struct Metrics {
    /// All nodes.
    pub nodes: usize,
    /// Nodes that run the newest release, every byte of it right.
    pub applied: usize,
    /// Nodes on which the newest release failed; an older one runs.
    pub failed: usize,
    /// Nodes that took the newest release back.
    pub rolled_back: usize,
    /// Nodes that do not start any more, or have a wrong byte.
    pub bricked: usize,
    /// Nodes on which nothing became of the newest release yet.
    pub unfinished: usize,
    /// Bytes that the sockets of nodes which applied the newest release received for it.
    pub wire_bytes: u64,
    /// Bytes of all of its packages, once for each of these nodes; 0 if the release is not known.
    pub full_bytes: u64,
}

impl Metrics {
    /// Counts.
    #[must_use]
    pub fn of(summary: &Summary) -> Metrics {
        let mut metrics = Metrics { nodes: summary.nodes.len(), ..Metrics::default() };
        for node in &summary.nodes {
            match summary.fate_of(node) {
                Fate::Bricked => metrics.bricked += 1,
                Fate::Failed => metrics.failed += 1,
                Fate::RolledBack => metrics.rolled_back += 1,
                Fate::Unfinished => metrics.unfinished += 1,
                Fate::Applied => {
                    let record = summary.newest_of(node);
                    metrics.applied += 1;
                    metrics.wire_bytes += record.map_or(0, |record| record.wire);
                    metrics.full_bytes += record.and_then(|record| record.size).unwrap_or_default();
                }
            }
        }
        metrics
    }
}

impl Expectation {
    /// Holds the numbers beside it.
    #[must_use]
    pub fn judge(&self, metrics: &Metrics) -> Verdict {
        let (count, whole) = match self.metric {
            Metric::Applied => (metrics.applied as f64, metrics.nodes as f64),
            Metric::Failed => (metrics.failed as f64, metrics.nodes as f64),
            Metric::RolledBack => (metrics.rolled_back as f64, metrics.nodes as f64),
            Metric::Bricked => (metrics.bricked as f64, metrics.nodes as f64),
            Metric::Unfinished => (metrics.unfinished as f64, metrics.nodes as f64),
            Metric::Bytes => (metrics.wire_bytes as f64, metrics.full_bytes as f64),
        };
        let (number, found) = match self.is_share {
            true => (count / whole * 100.0, format!("{}%", (count / whole * 1e4).floor() / 100.0)),
            false => (count, format!("{count}")),
        };
        let met = match self.relation {
            // Shares are not rounded: 9,999 of 10,000 are not all.
            Relation::Exactly => number == self.value,
            Relation::AtLeast => number >= self.value,
            Relation::AtMost => number <= self.value,
        };
        let found = if number.is_nan() { "nothing to compare with".to_owned() } else { found };
        Verdict { expected: self.to_string(), found, met }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Metric::Applied => "applied",
            Metric::Failed => "failed",
            Metric::RolledBack => "rolled-back",
            Metric::Bricked => "bricked",
            Metric::Unfinished => "unfinished",
            Metric::Bytes => "bytes",
        })
    }
}

impl fmt::Display for Expectation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let relation = match self.relation {
            Relation::Exactly => "=",
            Relation::AtLeast => ">=",
            Relation::AtMost => "<=",
        };
        let unit = if self.is_share { "%" } else { "" };
        write!(f, "{}{relation}{}{unit}", self.metric, self.value)
    }
}

impl FromStr for Expectation {
    type Err = String;

    fn from_str(text: &str) -> Result<Expectation, String> {
        let wrong = || {
            format!(
                "`{text}` is no expectation: write one as `applied=100%`, `bricked=0`, `failed<=1%` or `bytes<=10%`, \
                 of `applied`, `failed`, `rolled-back`, `bricked`, `unfinished` and `bytes`"
            )
        };
        let split = text.find(['=', '<', '>']).ok_or_else(wrong)?;
        let (name, rest) = text.split_at(split);
        let metric = [
            Metric::Applied,
            Metric::Failed,
            Metric::RolledBack,
            Metric::Bricked,
            Metric::Unfinished,
            Metric::Bytes,
        ]
        .into_iter()
        .find(|metric| metric.to_string() == name)
        .ok_or_else(wrong)?;
        let (relation, value) =
            match (rest.strip_prefix(">="), rest.strip_prefix("<="), rest.strip_prefix('=')) {
                (Some(value), ..) => (Relation::AtLeast, value),
                (_, Some(value), _) => (Relation::AtMost, value),
                (_, _, Some(value)) => (Relation::Exactly, value),
                _ => return Err(wrong()),
            };
        let number = value.strip_suffix('%').unwrap_or(value);
        let value: f64 = number.parse().ok().filter(|value| *value >= 0.0).ok_or_else(wrong)?;
        Ok(Expectation { metric, relation, value, is_share: rest.ends_with('%') })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: Metrics = Metrics {
        nodes: 10_000,
        applied: 9_999,
        failed: 1,
        rolled_back: 0,
        bricked: 0,
        unfinished: 0,
        wire_bytes: 900,
        full_bytes: 10_000,
    };

    fn met(text: &str) -> bool {
        text.parse::<Expectation>().unwrap().judge(&METRICS).met
    }

    #[test]
    fn an_expectation_is_held_beside_what_was_found() {
        for text in
            ["applied>=99.9%", "applied=9999", "bricked=0", "failed<=1", "bytes<=10%", "unfinished=0%"]
        {
            assert!(met(text), "{text}");
        }
        for text in ["applied=100%", "applied=10000", "failed=0", "bytes<=8.9%", "rolled-back>=1"] {
            assert!(!met(text), "{text}");
        }
        let verdict = "applied=100%".parse::<Expectation>().unwrap().judge(&METRICS);
        assert_eq!((verdict.expected.as_str(), verdict.found.as_str()), ("applied=100%", "99.99%"));
    }

    #[test]
    fn what_cannot_be_compared_is_not_met() {
        let nothing = Metrics::default();
        let verdict = "bytes<=10%".parse::<Expectation>().unwrap().judge(&nothing);
        assert!(!verdict.met && verdict.found.starts_with("nothing"));
    }

    #[test]
    fn what_is_no_expectation_is_refused_with_examples() {
        for text in
            ["applied", "applied=", "applied==1", "appplied=1", "applied=-1", "applied<5", "bricked=x%"]
        {
            assert!(text.parse::<Expectation>().unwrap_err().contains("applied=100%"), "{text}");
        }
    }
}
