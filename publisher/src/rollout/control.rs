//! What a rollout does next: decided from what is retained and the time, without asking anybody, and without a memory of
//! its own. So it decides the same whoever asks, and however often.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
pub use mpypi_protocol::record::{Counts, Standing};
use mpypi_protocol::{
    ChannelName, NodeId, Rollout, UpdateList,
    limits::REVOKED,
    list::Release,
    node::{Info, Phase, State},
    record::Step,
    rollout::Percent,
};

use super::{OnFailure, Order, Record, Status};
use crate::status::NodeStatus;

/// What is known.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// What is retained of the rollout.
    pub record: &'a Record,
    /// What the channel retains.
    pub list: &'a UpdateList,
    /// What nodes say of themselves, those of other channels perhaps among them.
    pub nodes: &'a BTreeMap<NodeId, NodeStatus>,
    /// What time it is.
    pub now: Timestamp,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// Publish the packages of the present list, with this rollout.
    Step(Box<Rollout>),
    /// Publish the packages of the release of this sequence, and say that these are bad.
    PutBack {
        /// The sequence of the release before.
        base: u64,
        /// Sequences of the lists of this rollout.
        revoked: Vec<u64>,
    },
    /// Retain this.
    Record(Box<Record>),
    /// Look again when something arrives, and at this time, if there is one.
    Wait(Option<Timestamp>),
    /// There is nothing left to do.
    Over,
}

impl View<'_> {
    /// What to do next.
    #[must_use]
    pub fn next(&self) -> Next {
        let record = self.record;
        match record.status {
            Status::Running => match self.step() {
                Some(present) if present.percent != record.percent() => {
                    Next::Step(Box::new(record.rollout()))
                }
                Some(_) => self.watch(),
                None => self.superseded(),
            },
            Status::Paused => match self.step() {
                Some(present) if present.percent != Percent::NONE => Next::Step(Box::new(record.rollout())),
                Some(_) => Next::Over,
                None => self.superseded(),
            },
            Status::RollingBack => match (self.step(), record.base) {
                (Some(_), Some(base)) => {
                    let last = self.sequence().max(record.first);
                    // The latest are those that nodes run.
                    let first = record.first.max(last.saturating_add(1).saturating_sub(REVOKED as u64));
                    Next::PutBack { base, revoked: (first..=last).collect() }
                }
                (Some(_), None) => {
                    let reason = "there is no release before it".to_owned();
                    self.record(Record { status: Status::Paused, reason: Some(reason), ..record.clone() })
                }
                (None, _) if self.is_put_back() => self.watch_back(),
                (None, _) => self.superseded(),
            },
            Status::Done | Status::RolledBack | Status::Superseded => Next::Over,
        }
    }

    /// What becomes of the record when someone gives an order; `None` where there is nothing to do about it.
    #[must_use]
    pub fn ordered(&self, order: Order) -> Option<Record> {
        let record = self.record;
        let reason = |text: &str| Some(text.to_owned());
        match (order, record.status) {
            (Order::Pause, Status::Running) => {
                Some(Record { status: Status::Paused, reason: reason("someone paused it"), ..record.clone() })
            }
            (Order::Resume, Status::Paused) => {
                let counts = self.counts();
                let excused = counts.failed + counts.rolled_back;
                Some(Record { status: Status::Running, reason: None, excused, ..record.clone() })
            }
            (Order::Abort, Status::Running | Status::Paused) => Some(Record {
                status: Status::RollingBack,
                reason: reason("someone aborted it"),
                ..record.clone()
            }),
            _ => None,
        }
    }

    /// How the nodes stand that the present list is for. Where it is for nobody, those that an earlier one was for.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.standings().for_each(|(_, standing)| counts.add(standing));
        counts
    }

    /// How each of these nodes stands.
    pub fn standings(&self) -> impl Iterator<Item = (&NodeId, Standing)> {
        let step = Step::new(self.record, self.list);
        self.nodes.iter().filter_map(move |(id, node)| Some((id, step.standing(id.as_str(), node.heard())?)))
    }

    /// The present step: watches how it goes.
    fn watch(&self) -> Next {
        let (record, policy) = (self.record, &self.record.policy);
        let counts = self.counts();
        let elapsed = self.elapsed();
        let is_late = elapsed >= policy.wait;
        let bad = counts.failed + counts.rolled_back + if is_late { counts.silent } else { 0 };
        let bad = bad.saturating_sub(record.excused);
        if exceeds(bad, policy.max_failures, counts.nodes) {
            let mut parts = Vec::new();
            for (count, what) in
                [(counts.failed, "failed"), (counts.rolled_back, "rolled back"), (counts.silent, "silent")]
            {
                parts.extend((count > 0).then(|| format!("{count} {what}")));
            }
            let what = parts.join(", ");
            return self.fail(format!("{what}: more than {}% of {}", policy.max_failures, counts.nodes));
        }
        if !is_late {
            return Next::Wait(Some(self.after(policy.wait)));
        }
        // Who waits for an order may never get one; who waits for the night is waited for.
        let needed = if policy.optional { counts.nodes - counts.waiting } else { counts.nodes };
        if counts.succeeded * 10_000 >= usize::from(policy.min_success.hundredths()) * needed {
            let last = record.step + 1 == policy.steps.len();
            return self.record(match last {
                true => Record { status: Status::Done, reason: None, ..record.clone() },
                false => Record { step: record.step + 1, ..record.clone() },
            });
        }
        if counts.waiting > 0 && !policy.optional {
            return Next::Wait(None);
        }
        if elapsed >= policy.patience {
            let share = format!("{} of {}", counts.succeeded, needed);
            return self.fail(format!("only {share} have it in time, less than {}%", policy.min_success));
        }
        Next::Wait(Some(self.after(policy.patience)))
    }

    fn fail(&self, reason: String) -> Next {
        let record = self.record;
        let status = match (record.policy.on_failure, record.base) {
            (OnFailure::RollBack, Some(_)) => Status::RollingBack,
            _ => Status::Paused,
        };
        self.record(Record { status, reason: Some(reason), ..record.clone() })
    }

    /// The release before is published: waits until nobody who is there runs the bad one.
    fn watch_back(&self) -> Next {
        let record = self.record;
        let left = self.nodes.values().filter(|node| {
            let is_back = |state: &State| match state.sequence {
                Some(sequence) if (record.first..self.sequence()).contains(&sequence) => false,
                Some(sequence) if sequence == self.sequence() => {
                    matches!(state.phase, Phase::Idle | Phase::Failed | Phase::RolledBack)
                }
                _ => true,
            };
            node.online != Some(false)
                && node.channel().as_ref() == Some(&record.channel)
                && !node.state.as_ref().is_none_or(is_back)
        });
        let left = left.count();
        if left == 0 || self.elapsed() >= record.policy.patience {
            let reason = match (left, &record.reason) {
                (0, reason) => reason.clone(),
                (left, Some(reason)) => Some(format!("{reason}; {left} did not come back in time")),
                (left, None) => Some(format!("{left} did not come back in time")),
            };
            return self.record(Record { status: Status::RolledBack, reason, ..record.clone() });
        }
        Next::Wait(Some(self.after(record.policy.patience)))
    }

    fn superseded(&self) -> Next {
        let reason = match self.release() {
            Some(release) => format!("release {} was published meanwhile", release.sequence),
            None => "the channel has another list".to_owned(),
        };
        self.record(Record { status: Status::Superseded, reason: Some(reason), ..self.record.clone() })
    }

    fn record(&self, record: Record) -> Next {
        Next::Record(Box::new(record))
    }

    fn release(&self) -> Option<&Release> {
        self.list.release()
    }

    fn sequence(&self) -> u64 {
        self.release().map_or(0, |release| release.sequence)
    }

    /// The rollout of the present list, if it is this one.
    #[must_use]
    pub fn step(&self) -> Option<Rollout> {
        Step::new(self.record, self.list).rollout().cloned()
    }

    fn is_put_back(&self) -> bool {
        self.release().is_some_and(|release| revoked(release).contains(&self.record.first))
    }

    /// When nodes may have begun with the present list: when it was made, or when it says that they may.
    fn begun(&self) -> Timestamp {
        let made = self.release().and_then(|release| release.created).unwrap_or(self.now);
        self.step().and_then(|rollout| rollout.not_before).map_or(made, |time| time.max(made))
    }

    /// Seconds since then.
    fn elapsed(&self) -> u64 {
        self.now.duration_since(self.begun()).as_secs().max(0).unsigned_abs()
    }

    /// So many seconds after then.
    fn after(&self, seconds: u64) -> Timestamp {
        let seconds = SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
        self.begun().checked_add(seconds).unwrap_or(Timestamp::MAX)
    }
}

/// Whether `bad` of `all` are more than `most`.
fn exceeds(bad: usize, most: Percent, all: usize) -> bool {
    bad * 10_000 > usize::from(most.hundredths()) * all
}

/// The sequences that a release says are bad.
#[must_use]
pub fn revoked(release: &Release) -> Vec<u64> {
    release.revoked.clone()
}

/// The nodes of a channel that run Mpy-BLOX: they cannot tell whose turn it is.
#[must_use]
pub fn legacy(nodes: &BTreeMap<NodeId, NodeStatus>, channel: &ChannelName) -> usize {
    let is_legacy = |node: &&NodeStatus| {
        node.info.as_ref().is_some_and(Info::is_mpyblox)
            && node.channel().is_none_or(|followed| followed == *channel)
    };
    nodes.values().filter(is_legacy).count()
}

#[cfg(test)]
mod tests;
