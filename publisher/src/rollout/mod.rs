//! Rollouts: a release goes to few nodes first, then to more, and stops by itself when it goes wrong.
//!
//! Nodes decide for themselves whose turn it is, from the signed list. What is left to do is to publish the list of
//! the next step when the present one went well, and another when it did not. Everything that is known about it is
//! retained: the list says which step it is, the nodes' states say how it goes, and [`Record`] says what was wanted and
//! what was decided. So a rollout goes on from there whoever steers it, on whichever machine.
//!
//! | module | does |
//! |---|---|
//! | [`control`] | record, list, nodes and time → what to do next. No I/O, no clock |
//! | [`lease`] | who steers, if several want to. No I/O, no clock |
//! | [`start`] | puts a release in place, for nobody at first |
//! | [`steer`](mod@steer) | asks the first two again and again, and does what they say |

pub mod control;
pub mod lease;
pub mod start;
pub mod steer;

use std::fmt;

use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Query, Rollout,
    rollout::{Consent, Percent, RolloutId, Window},
};
use serde::{Deserialize, Serialize};

use crate::limits;

/// How a rollout is to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Policy {
    /// How many of the nodes at each step; each more than the one before.
    pub steps: Vec<Percent>,
    /// How long a step takes at least, in seconds.
    pub wait: u64,
    /// When a step that does not come to [`min_success`](Policy::min_success) is given up, in seconds.
    pub patience: u64,
    /// More than that of a step's nodes failed: the rollout stops.
    pub max_failures: Percent,
    /// At least that of a step's nodes must have the release before the next step.
    pub min_success: Percent,
    /// What becomes of a rollout that goes wrong.
    pub on_failure: OnFailure,
    /// For which nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only: Option<Query>,
    /// When at the earliest.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "utc")]
    pub not_before: Option<Timestamp>,
    /// At which time of day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
    /// Each node waits for a time of its own, up to so many seconds.
    #[serde(default)]
    pub jitter: u32,
    /// Whether each node waits for an order.
    #[serde(default)]
    pub optional: bool,
}

/// What becomes of a rollout that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// Nobody else gets the release.
    Pause,
    /// That, and who has it gets the one before.
    RollBack,
}

/// What is retained of a rollout at `mpypi/channels/<channel>/rollout`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Record {
    /// Which rollout: the list of each of its steps has it.
    pub id: RolloutId,
    /// The channel.
    pub channel: ChannelName,
    /// The version of the release, for people.
    pub version: String,
    /// How it is to go.
    pub policy: Policy,
    /// Where it stands.
    pub status: Status,
    /// Which of the policy's steps, from 0.
    pub step: usize,
    /// The sequence of its first list.
    pub first: u64,
    /// The sequence of the release that it replaces, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<u64>,
    /// So many failures do not count any more: someone resumed it all the same.
    #[serde(default)]
    pub excused: usize,
    /// Why it stands so, if it does not simply go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Where a rollout stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// At one of its steps.
    Running,
    /// Stopped: nobody else gets the release.
    Paused,
    /// The release before is being put back.
    RollingBack,
    /// All steps went well.
    Done,
    /// The release before is back.
    RolledBack,
    /// Someone published another release.
    Superseded,
}

/// What someone wants of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Stop.
    Pause,
    /// Go on, whatever failed so far.
    Resume,
    /// Put the release before back.
    Abort,
}

/// A time as text, in UTC.
mod utc {
    use jiff::Timestamp;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        time: &Option<Timestamp>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => serializer.collect_str(time),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Timestamp>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(D::Error::custom)).transpose()
    }
}

impl Policy {
    /// Why it makes no sense, if it does not.
    #[must_use]
    pub fn problem(&self) -> Option<&'static str> {
        let rises = self.steps.windows(2).all(|pair| pair[0] < pair[1]);
        match self.steps.first() {
            None => Some("a rollout has at least one step"),
            Some(first) if *first == Percent::NONE || !rises => {
                Some("each step is for more nodes than the one before, as `1%,10%,50%,100%`")
            }
            _ if self.steps.len() > limits::ROLLOUT_STEPS => Some("a rollout has at most 32 steps"),
            _ if self.patience < self.wait => Some("the patience is at least as long as the wait"),
            _ => None,
        }
    }

    /// The rollout for nodes, for so many of them.
    #[must_use]
    pub fn rollout(&self, id: RolloutId, percent: Percent, base: Option<u64>) -> Rollout {
        Rollout {
            percent,
            only: self.only.clone(),
            not_before: self.not_before,
            window: self.window,
            jitter: self.jitter,
            consent: if self.optional { Consent::Ordered } else { Consent::Implied },
            base,
            ..Rollout::new(id)
        }
    }
}

impl Record {
    /// Reads a record.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(payload: &[u8]) -> Result<Record, serde_json::Error> {
        let record: Record = serde_json::from_slice(payload)?;
        let problem = record.policy.problem();
        let problem =
            problem.or((record.step >= record.policy.steps.len()).then_some("there is no such step"));
        match problem {
            Some(problem) => Err(serde::de::Error::custom(problem)),
            None => Ok(record),
        }
    }

    /// The record as the payload of a message.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("text keys and plain values always make JSON")
    }

    /// For how many nodes the present step is.
    #[must_use]
    pub fn percent(&self) -> Percent {
        self.policy.steps.get(self.step).copied().unwrap_or(Percent::ALL)
    }

    /// The rollout for the nodes of the present step, or for nobody where it is stopped.
    #[must_use]
    pub fn rollout(&self) -> Rollout {
        let percent = if self.status == Status::Running { self.percent() } else { Percent::NONE };
        self.policy.rollout(self.id.clone(), percent, self.base)
    }
}

impl Status {
    /// Whether there is something left to steer.
    #[must_use]
    pub fn is_under_way(self) -> bool {
        matches!(self, Status::Running | Status::Paused | Status::RollingBack)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Running => "running",
            Status::Paused => "paused",
            Status::RollingBack => "rolling back",
            Status::Done => "done",
            Status::RolledBack => "rolled back",
            Status::Superseded => "superseded",
        })
    }
}
