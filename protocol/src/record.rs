//! What is retained of a rollout, and how the nodes of a step stand: what a publisher decides by, and others show.
//!
//! Of a channel's rollout, `mpypi/channels/<channel>/rollout` retains the [`Record`]; what someone else wants of who steers
//! it is an [`Order`] at `…/rollout/order`, which is not retained.

use std::{collections::BTreeMap, fmt};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    ChannelName, Entry, Query, Rollout, UpdateList, limits,
    node::{Info, Phase, State},
    query::Facts,
    rollout::{Consent, Percent, RolloutId, Window},
    wheel::normalized_name,
};

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

/// How the nodes of a step stand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counts {
    /// Those that it is for, and that are there.
    pub nodes: usize,
    /// They run it.
    pub succeeded: usize,
    /// They are about to get it, or getting it.
    pub pending: usize,
    /// They wait for their time of day, or for an order.
    pub waiting: usize,
    /// They could not apply it.
    pub failed: usize,
    /// They applied it and took it back.
    pub rolled_back: usize,
    /// They began with it and have not been heard of since.
    pub silent: usize,
    /// They were not connected when it came: they do not count.
    pub absent: usize,
}

/// How one node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It runs the release.
    Succeeded,
    /// It is about to get it, or getting it.
    Pending,
    /// It waits for its time of day, or for an order.
    Waiting,
    /// It could not apply it.
    Failed,
    /// It applied it and took it back.
    RolledBack,
    /// It began with it and has not been heard of since.
    Silent,
    /// It was not connected when it came.
    Absent,
}

/// A rollout and the list that its channel has now.
#[derive(Debug, Clone)]
pub struct Step<'a> {
    record: &'a Record,
    list: &'a UpdateList,
    rollout: Option<Rollout>,
}

/// What was heard of a node.
#[derive(Debug, Clone, Copy, Default)]
pub struct Heard<'a> {
    /// What it is and has.
    pub info: Option<&'a Info>,
    /// Where its update stands.
    pub state: Option<&'a State>,
    /// Whether it is connected.
    pub online: Option<bool>,
}

impl Heard<'_> {
    /// The channel the node follows, as far as it says; of one that runs Mpy-BLOX the broker says it.
    #[must_use]
    pub fn channel(&self) -> Option<ChannelName> {
        let said = self.info.and_then(|info| info.channel.clone());
        let seen = || ChannelName::new(self.state?.extra.get("channel")?.as_str()?).ok();
        said.or_else(seen)
    }
}

impl<'a> Step<'a> {
    /// The rollout that `record` is of, where its channel has `list`.
    #[must_use]
    pub fn new(record: &'a Record, list: &'a UpdateList) -> Step<'a> {
        let said = list.release().and_then(|release| Rollout::of(release).ok().flatten());
        Step { record, list, rollout: said.filter(|rollout| rollout.id == record.id) }
    }

    /// What the list says of the rollout, if it is one of this rollout's.
    #[must_use]
    pub fn rollout(&self) -> Option<&Rollout> {
        self.rollout.as_ref()
    }

    /// The sequence of the channel's list; 0 if it has none.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.list.release().map_or(0, |release| release.sequence)
    }

    /// The sequence of the rollout's last list.
    #[must_use]
    pub fn last(&self) -> u64 {
        match self.rollout {
            Some(_) => self.sequence(),
            None => self.sequence().saturating_sub(1),
        }
    }

    /// How a node stands, if the step is for it. Where it is for nobody: if an earlier one was.
    #[must_use]
    pub fn standing(&self, node: &str, heard: Heard<'_>) -> Option<Standing> {
        if heard.channel().as_ref() != Some(&self.record.channel) {
            return None;
        }
        let state = heard.state;
        let touched = state
            .and_then(|state| state.sequence)
            .is_some_and(|sequence| (self.record.first..=self.last()).contains(&sequence));
        if let (true, Some(state)) = (touched, state) {
            return Some(match (state.phase, heard.online) {
                (Phase::Idle, _) => Standing::Succeeded,
                (Phase::Failed, _) => Standing::Failed,
                (Phase::RolledBack, _) => Standing::RolledBack,
                (_, Some(false)) => Standing::Silent,
                _ => Standing::Pending,
            });
        }
        let (rollout, info) = (self.rollout.as_ref()?, heard.info?);
        let running = state.filter(|state| state.phase == Phase::Idle);
        let running = running.map_or((None, None), |state| (state.sequence, state.version.as_deref()));
        if !rollout.admits(&Facts::of(node, info, running)) {
            return None;
        }
        if info.is_mpyblox() {
            return Some(self.legacy(info, state));
        }
        let is_held = state.is_some_and(|state| state.held == Some(self.sequence()));
        Some(match heard.online {
            // Nobody says that it cannot read the list, either.
            _ if is_held && state.is_some_and(|state| state.error.is_some()) => Standing::Failed,
            Some(true) if is_held => Standing::Waiting,
            Some(true) => Standing::Pending,
            _ => Standing::Absent,
        })
    }

    /// A node that runs Mpy-BLOX: the broker that adapts lists for it says what it is served; what it made of that, its
    /// versions say.
    fn legacy(&self, info: &Info, state: Option<&State>) -> Standing {
        let Some(state) = state else { return Standing::Absent };
        if state.held.is_some() || state.phase != Phase::Idle {
            return Standing::Pending;
        }
        let mut versions: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for entry in self.list.entries() {
            if let Entry::Wheel(wheel) = entry {
                versions.entry(normalized_name(&wheel.name)).or_default().push(&wheel.version);
            }
        }
        let has = |(name, version): (&String, &String)| {
            versions.get(&normalized_name(name)).is_none_or(|listed| listed.contains(&version.as_str()))
        };
        if info.versions.iter().all(has) { Standing::Succeeded } else { Standing::Pending }
    }
}

impl Counts {
    /// Counts one more node that stands so.
    pub fn add(&mut self, standing: Standing) {
        let place = match standing {
            Standing::Succeeded => &mut self.succeeded,
            Standing::Pending => &mut self.pending,
            Standing::Waiting => &mut self.waiting,
            Standing::Failed => &mut self.failed,
            Standing::RolledBack => &mut self.rolled_back,
            Standing::Silent => &mut self.silent,
            Standing::Absent => &mut self.absent,
        };
        *place += 1;
        self.nodes += usize::from(standing != Standing::Absent);
    }
}
