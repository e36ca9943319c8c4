//! What the API answers, as JSON. What there is none of is `null`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use mpypi_protocol::{
    Digest, Entry, UpdateList, list,
    node::Phase,
    record::{self, OnFailure, Status},
    rollout,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fleet::{
    limits,
    log::Line,
    view::{self, Node, Tally, View, Word},
};

/// Why a request was refused, or failed (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemDetails {
    /// The status in words.
    title: String,
    /// The status.
    status: u16,
    /// What is wrong.
    detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

/// Where a node's update stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = Phase)]
pub enum PhaseWord {
    /// On the release it should have, or on none yet.
    Idle,
    /// Fetching the packages it lacks.
    Downloading,
    /// Checking and unpacking what was fetched.
    Verifying,
    /// Files are being replaced.
    Installing,
    /// Starting the new release.
    Restarting,
    /// Waiting for the new release to prove itself.
    Confirming,
    /// The release was refused or could not be applied; the old one runs.
    Failed,
    /// The release was applied, did not prove itself, and was taken back.
    RolledBack,
    /// It never said.
    Unknown,
}

impl From<Word> for PhaseWord {
    fn from(word: Word) -> PhaseWord {
        match word {
            Word::Idle => PhaseWord::Idle,
            Word::Downloading => PhaseWord::Downloading,
            Word::Verifying => PhaseWord::Verifying,
            Word::Installing => PhaseWord::Installing,
            Word::Restarting => PhaseWord::Restarting,
            Word::Confirming => PhaseWord::Confirming,
            Word::Failed => PhaseWord::Failed,
            Word::RolledBack => PhaseWord::RolledBack,
            Word::Unknown => PhaseWord::Unknown,
        }
    }
}

impl From<Phase> for PhaseWord {
    fn from(phase: Phase) -> PhaseWord {
        Word::from(phase).into()
    }
}

/// Who asks.
#[derive(Debug, Serialize, ToSchema)]
pub struct Me {
    /// The name that was logged in with.
    pub name: Option<String>,
    /// The role; `anyone` where there are no users.
    pub role: &'static str,
    /// The node, if it is one.
    pub node: Option<String>,
    /// What the role lets do.
    pub may: May,
}

/// What a role lets do.
#[derive(Debug, Serialize, ToSchema)]
pub struct May {
    /// Give orders to nodes and rollouts.
    pub order: bool,
    /// Publish to channels.
    pub publish: bool,
}

/// How many nodes stand where.
#[derive(Debug, Serialize, ToSchema)]
pub struct Overview {
    /// When that was looked at.
    #[schema(format = DateTime)]
    pub at: String,
    /// All nodes.
    pub nodes: u64,
    /// Those connected.
    pub online: u64,
    /// Those not connected, or never heard to be.
    pub offline: u64,
    /// Those whose channel has a newer release than theirs.
    pub behind: u64,
    /// By phase: all nine words.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub phases: BTreeMap<&'static str, u64>,
    /// By release, those with most nodes first; beyond 32 all in one, with version `other` and without a channel.
    pub releases: Vec<ReleaseCount>,
    /// Nodes that stand failed or rolled back, by the stable word for why.
    pub failures: Vec<FailureCount>,
    /// Channels that were published to.
    pub channels: u64,
    /// Rollouts under way.
    pub rollouts: u64,
}

/// The nodes of a release.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReleaseCount {
    /// The channel that they follow.
    pub channel: Option<String>,
    /// Its sequence.
    pub sequence: Option<u64>,
    /// Its version.
    pub version: Option<String>,
    /// How many.
    pub nodes: u64,
    /// How many of them stand where: the words that occur.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub phases: BTreeMap<&'static str, u64>,
}

/// Nodes that failed for one reason.
#[derive(Debug, Serialize, ToSchema)]
pub struct FailureCount {
    /// The stable word.
    pub reason: String,
    /// How many.
    pub nodes: u64,
}

/// How many nodes stood where over time.
#[derive(Debug, Serialize, ToSchema)]
pub struct Samples {
    /// Seconds from one look to the next.
    pub every: u64,
    /// Looks that found something else than the one before, the oldest first.
    pub samples: Vec<SampleRow>,
}

/// How many nodes stood where at one time.
#[derive(Debug, Serialize, ToSchema)]
pub struct SampleRow {
    /// When.
    #[schema(format = DateTime)]
    pub at: String,
    /// All nodes.
    pub nodes: u64,
    /// Those connected.
    pub online: u64,
    /// By phase: all nine words.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub phases: BTreeMap<&'static str, u64>,
    /// By release: at most the eight with most nodes.
    pub releases: Vec<SampleRelease>,
}

/// The nodes of a release at one time.
#[derive(Debug, Serialize, ToSchema)]
pub struct SampleRelease {
    /// The channel that they followed.
    pub channel: Option<String>,
    /// Its sequence.
    pub sequence: Option<u64>,
    /// Its version.
    pub version: Option<String>,
    /// How many.
    pub nodes: u64,
}

/// A node.
#[derive(Debug, Serialize, ToSchema)]
pub struct NodeRow {
    /// Its name.
    pub node: String,
    /// The channel that it follows.
    pub channel: Option<String>,
    /// Whether it is connected; `null` if it never said so.
    pub online: Option<bool>,
    /// Where its update stands.
    pub phase: PhaseWord,
    /// The sequence of the release that this is about.
    pub sequence: Option<u64>,
    /// Its version.
    pub version: Option<String>,
    /// The sequence of a release that it holds back.
    pub held: Option<u64>,
    /// Bytes received for the release.
    pub done: u64,
    /// Bytes that it needs in all.
    pub total: u64,
    /// Which attempt, from 1.
    pub attempt: u32,
    /// Why it failed, was rolled back or is held.
    pub error: Option<String>,
    /// The stable word of that.
    pub reason: Option<String>,
    /// Its agent and that one's version.
    pub agent: Option<String>,
    /// What it runs, as tags of wheels say it.
    pub runtime: Option<String>,
    /// Its platform.
    pub platform: Option<String>,
    /// Its board.
    pub machine: Option<String>,
    /// The version of its interpreter or system.
    pub firmware: Option<String>,
    /// What it is labelled with.
    pub labels: BTreeMap<String, String>,
    /// Bytes free for packages.
    pub free: Option<u64>,
    /// When something new was last heard of it; `null`: not since the broker started.
    #[schema(format = DateTime)]
    pub changed: Option<String>,
}

/// Some of the nodes.
#[derive(Debug, Serialize, ToSchema)]
pub struct NodePage {
    /// How many there are in all.
    pub total: u64,
    /// How many of them come before these.
    pub offset: u64,
    /// At most how many are here.
    pub limit: u64,
    /// These.
    pub nodes: Vec<NodeRow>,
}

/// A node with all that is known of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct NodeDetail {
    /// Its row.
    #[serde(flatten)]
    pub row: NodeRow,
    /// Its `info`, as it published it.
    #[schema(value_type = Option<Object>)]
    pub info: Option<serde_json::Value>,
    /// Its `state`, as it published it.
    #[schema(value_type = Option<Object>)]
    pub state: Option<serde_json::Value>,
    /// The release that its channel has now.
    pub latest: Option<Latest>,
    /// Its updates since the broker started, the oldest first; at most 16.
    pub history: Vec<UpdateRow>,
    /// What it logged last, the oldest first; at most 100 lines.
    pub log: Vec<LogLine>,
}

/// The release that a channel has.
#[derive(Debug, Serialize, ToSchema)]
pub struct Latest {
    /// Its sequence.
    pub sequence: u64,
    /// Its version.
    pub version: String,
}

/// An attempt of a node to update.
#[derive(Debug, Serialize, ToSchema)]
pub struct UpdateRow {
    /// To which release.
    pub sequence: Option<u64>,
    /// Its version.
    pub version: Option<String>,
    /// Which attempt, from 1.
    pub attempt: u32,
    /// When it began.
    #[schema(format = DateTime)]
    pub began: String,
    /// When it came to an end.
    #[schema(format = DateTime)]
    pub ended: Option<String>,
    /// The last phase of it.
    pub phase: PhaseWord,
    /// Bytes that it needed.
    pub total: u64,
    /// Why it came to nothing.
    pub error: Option<String>,
    /// Its phases.
    pub steps: Vec<StepRow>,
}

/// A phase of an update.
#[derive(Debug, Serialize, ToSchema)]
pub struct StepRow {
    /// Which.
    pub phase: PhaseWord,
    /// Since when.
    #[schema(format = DateTime)]
    pub at: String,
}

/// A line that a node logged.
#[derive(Debug, Serialize, ToSchema)]
pub struct LogLine {
    /// When it came.
    #[schema(format = DateTime)]
    pub at: String,
    /// What it says.
    pub text: String,
}

/// What a node logged.
#[derive(Debug, Serialize, ToSchema)]
pub struct LogLines {
    /// The node.
    pub node: String,
    /// Its last lines, the oldest first.
    pub lines: Vec<LogLine>,
}

/// An order to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Read the channel again now.
    Check,
    /// Install what waits for an order or for its time.
    Install,
    /// Go back to the release before the present one.
    Rollback,
    /// Restart.
    Restart,
}

/// What a node is to do.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// This.
    pub action: Action,
}

/// An order to a node that was sent.
#[derive(Debug, Serialize, ToSchema)]
pub struct Commanded {
    /// The node.
    pub node: String,
    /// The order.
    pub action: Action,
    /// Whether the node is connected: one that is not gets the order only if it keeps its session.
    pub online: Option<bool>,
}

/// A release of a channel.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ReleaseRow {
    /// The channel.
    pub channel: String,
    /// Its sequence; a list of Mpy-BLOX's own tools has none.
    pub sequence: Option<u64>,
    /// Its version.
    pub version: Option<String>,
    /// When it was made.
    #[schema(format = DateTime)]
    pub created: Option<String>,
    /// When devices stop believing that it is the newest.
    #[schema(format = DateTime)]
    pub expires: Option<String>,
    /// The epoch of the channel's keys.
    pub epoch: u64,
    /// The digest of the list.
    pub digest: String,
    /// The digest of the list that it replaced.
    pub previous: Option<String>,
    /// The key that signed it.
    pub signed_by: Option<String>,
    /// Sequences of releases that must not run any more.
    pub revoked: Vec<u64>,
    /// How many packages it names.
    pub packages: u64,
    /// Bytes of all of them.
    pub size: u64,
    /// For whom it is, if not for all at once.
    pub rollout: Option<Turn>,
}

/// For whom a release is.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Turn {
    /// The rollout that it is a step of.
    pub id: String,
    /// For how many percent of the nodes.
    pub percent: String,
    /// For which nodes, as a query.
    pub only: Option<String>,
}

/// A channel.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChannelRow {
    /// Its present release.
    #[serde(flatten)]
    pub release: ReleaseRow,
    /// How many nodes follow it.
    pub nodes: u64,
    /// The keys of which one has to sign its releases; none if nobody need sign.
    pub keys: Vec<String>,
}

/// All channels.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChannelList {
    /// By name.
    pub channels: Vec<ChannelRow>,
}

/// A channel and what is in it.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChannelDetail {
    /// The channel.
    #[serde(flatten)]
    pub channel: ChannelRow,
    /// What its list names.
    pub entries: Vec<EntryRow>,
}

/// What a list names.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct EntryRow {
    /// What it is.
    pub kind: EntryKind,
    /// Its name; a file's is its path.
    pub name: String,
    /// Its version.
    pub version: Option<String>,
    /// Where a file goes on the device.
    pub path: Option<String>,
    /// The devices that a wheel is for, as its tag says it.
    pub tag: Option<String>,
    /// The hardware that firmware is for.
    pub target: Option<String>,
    /// The digest of its bytes.
    pub digest: Option<String>,
    /// Its size in bytes.
    pub size: Option<u64>,
    /// Whether devices take it only if somebody there chose it.
    pub optional: bool,
}

/// What an entry of a list is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// A wheel.
    Wheel,
    /// A file.
    Src,
    /// A firmware image.
    Firmware,
    /// Something of a later version.
    Other,
}

/// The releases of a channel.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReleaseList {
    /// The channel.
    pub channel: String,
    /// The newest first.
    pub releases: Vec<PastRelease>,
}

/// A release that a channel has, or had.
#[derive(Debug, Serialize, ToSchema)]
pub struct PastRelease {
    /// The release.
    #[serde(flatten)]
    pub release: ReleaseRow,
    /// Whether the channel has it now.
    pub present: bool,
}

/// A release and what is in it.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReleaseDetail {
    /// The release.
    #[serde(flatten)]
    pub release: ReleaseRow,
    /// What its list names.
    pub entries: Vec<EntryRow>,
}

/// What differs between two releases.
#[derive(Debug, Serialize, ToSchema)]
pub struct Diff {
    /// The channel.
    pub channel: String,
    /// The earlier one's sequence; 0: nothing.
    pub from: u64,
    /// The later one's; 0: a list without a sequence.
    pub to: u64,
    /// What came.
    pub added: Vec<EntryRow>,
    /// What went.
    pub removed: Vec<EntryRow>,
    /// What has other bytes.
    pub changed: Vec<Changed>,
    /// How many entries are the same.
    pub unchanged: u64,
    /// Bytes of what came or has other bytes.
    pub bytes: u64,
}

/// An entry that has other bytes.
#[derive(Debug, Serialize, ToSchema)]
pub struct Changed {
    /// What it is.
    pub kind: EntryKind,
    /// Its name.
    pub name: String,
    /// As it was.
    pub from: EntryRow,
    /// As it is.
    pub to: EntryRow,
}

/// What was published.
#[derive(Debug, Serialize, ToSchema)]
pub struct Published {
    /// The channel.
    pub channel: String,
    /// The new release's sequence, or the present one's if nothing changed.
    pub sequence: Option<u64>,
    /// Whether there is a new release.
    pub changed: bool,
    /// What was in the form.
    pub packages: Vec<EntryRow>,
}

/// A package that channels have now.
#[derive(Debug, Serialize, ToSchema)]
pub struct PackageRow {
    /// What it is.
    #[serde(flatten)]
    pub entry: EntryRow,
    /// The channels that have it.
    pub channels: Vec<String>,
}

/// Some of the packages.
#[derive(Debug, Serialize, ToSchema)]
pub struct PackagePage {
    /// How many there are in all.
    pub total: u64,
    /// How many of them come before these.
    pub offset: u64,
    /// At most how many are here.
    pub limit: u64,
    /// These.
    pub packages: Vec<PackageRow>,
}

/// A rollout.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct RolloutRow {
    /// The channel.
    pub channel: String,
    /// Which rollout: 16 hexadecimal digits.
    pub id: String,
    /// The version of the release.
    pub version: String,
    /// Where it stands.
    pub status: StatusWord,
    /// Why it stands so, if it does not simply go on.
    pub reason: Option<String>,
    /// Which step, from 0.
    pub step: u64,
    /// The steps, in percent of the nodes.
    pub steps: Vec<String>,
    /// For how many percent of the nodes the channel's list is; `null` if it is none of the rollout.
    pub percent: Option<String>,
    /// Seconds that a step takes at least.
    pub wait: u64,
    /// Seconds after which a step is given up.
    pub patience: u64,
    /// With more failures than this percentage of a step's nodes, it stops.
    pub max_failures: String,
    /// At least this percentage must have it before the next step.
    pub min_success: String,
    /// What becomes of it when it goes wrong.
    pub on_failure: OnFailureWord,
    /// For which nodes, as a query.
    pub only: Option<String>,
    /// At which time of day.
    pub window: Option<String>,
    /// Each node waits for a time of its own, up to so many seconds.
    pub jitter: u64,
    /// Whether nodes wait for an order.
    pub optional: bool,
    /// The sequence of its first list.
    pub first: u64,
    /// The sequence of the release that it replaces.
    pub base: Option<u64>,
    /// The sequence of the channel's list.
    pub sequence: u64,
    /// Whether somebody steers it, and obeys orders.
    pub steered: bool,
    /// How its nodes stand.
    pub counts: CountsRow,
}

/// Where a rollout stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StatusWord {
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

/// What becomes of a rollout that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailureWord {
    /// Nobody else gets the release.
    Pause,
    /// That, and who has it gets the one before.
    RollBack,
}

/// How the nodes of a rollout's step stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct CountsRow {
    /// Those that it is for, and that are there.
    pub nodes: u64,
    /// They run it.
    pub succeeded: u64,
    /// They are about to get it, or getting it.
    pub pending: u64,
    /// They wait for their time of day, or for an order.
    pub waiting: u64,
    /// They could not apply it.
    pub failed: u64,
    /// They applied it and took it back.
    pub rolled_back: u64,
    /// They began with it and have not been heard of since.
    pub silent: u64,
    /// They were not connected when it came: they do not count.
    pub absent: u64,
}

/// All rollouts.
#[derive(Debug, Serialize, ToSchema)]
pub struct RolloutList {
    /// By their channels.
    pub rollouts: Vec<RolloutRow>,
}

/// What someone wants of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OrderWord {
    /// Stop.
    Pause,
    /// Go on, whatever failed so far.
    Resume,
    /// Put the release before back.
    Abort,
}

/// What is wanted of a rollout.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RolloutOrder {
    /// This.
    pub order: OrderWord,
}

/// An order to who steers a rollout that was sent.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ordered {
    /// The channel.
    pub channel: String,
    /// The order.
    pub order: OrderWord,
}

/// A time in milliseconds since 1970, as text.
#[must_use]
pub fn time(unix_ms: u64) -> String {
    let time = i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    time.unwrap_or(Timestamp::MAX).to_string()
}

/// A tally with all words.
fn phases(tally: &Tally) -> BTreeMap<&'static str, u64> {
    Word::ALL.iter().zip(tally).map(|(word, nodes)| (word.as_str(), *nodes)).collect()
}

impl Overview {
    /// What a view comes to.
    #[must_use]
    pub fn of(view: &View, now: u64) -> Overview {
        let (kept, other) = top_releases(view);
        let row = |release: Option<&view::Release>, tally: &Tally| ReleaseCount {
            channel: release.and_then(|release| release.channel.as_ref()).map(ToString::to_string),
            sequence: release.and_then(|release| release.sequence),
            version: match release {
                Some(release) => release.version.clone(),
                None => Some(limits::OTHER.to_owned()),
            },
            nodes: tally.iter().sum(),
            phases: phases(tally).into_iter().filter(|(_, nodes)| *nodes > 0).collect(),
        };
        let mut releases: Vec<_> = kept.iter().map(|(release, tally)| row(Some(release), tally)).collect();
        releases.extend((other != Tally::default()).then(|| row(None, &other)));
        let failures = view.failing().iter();
        let failures = failures.map(|(reason, nodes)| FailureCount { reason: reason.clone(), nodes: *nodes });
        let under_way = view.rollouts().filter(|rollout| rollout.record.status.is_under_way());
        Overview {
            at: time(now),
            nodes: view.len() as u64,
            online: view.online(),
            offline: (view.len() as u64).saturating_sub(view.online()),
            behind: view.behind(),
            phases: phases(&view.phases()),
            releases,
            failures: failures.collect(),
            channels: view.channels().count() as u64,
            rollouts: under_way.count() as u64,
        }
    }
}

/// The [`limits::RELEASES`] releases with most nodes, most first, and all others together.
#[must_use]
pub fn top_releases(view: &View) -> (Vec<(&view::Release, Tally)>, Tally) {
    let mut all: Vec<_> = view.releases().map(|(release, tally)| (&**release, *tally)).collect();
    let nodes = |tally: &Tally| tally.iter().sum::<u64>();
    all.sort_by(|(one, few), (other, many)| nodes(many).cmp(&nodes(few)).then_with(|| other.cmp(one)));
    let rest = all.split_off(all.len().min(limits::RELEASES));
    let add = |sum: Tally, (_, tally): (_, Tally)| std::array::from_fn(|at| sum[at] + tally[at]);
    (all, rest.into_iter().fold(Tally::default(), add))
}

impl From<&view::Sample> for SampleRow {
    fn from(sample: &view::Sample) -> SampleRow {
        let release = |(release, nodes): &(std::sync::Arc<view::Release>, u64)| SampleRelease {
            channel: release.channel.as_ref().map(ToString::to_string),
            sequence: release.sequence,
            version: release.version.clone(),
            nodes: *nodes,
        };
        SampleRow {
            at: time(sample.at),
            nodes: sample.nodes,
            online: sample.online,
            phases: phases(&sample.phases),
            releases: sample.releases.iter().map(release).collect(),
        }
    }
}

impl From<&Node> for NodeRow {
    fn from(node: &Node) -> NodeRow {
        let (info, state) = (node.info.as_ref(), node.state.as_ref());
        let uname = info.map(|info| &info.uname);
        NodeRow {
            node: node.id.to_string(),
            channel: node.heard().channel().map(|channel| channel.to_string()),
            online: node.online,
            phase: node.word().into(),
            sequence: state.and_then(|state| state.sequence),
            version: state.and_then(|state| state.version.clone()),
            held: state.and_then(|state| state.held),
            done: state.map_or(0, |state| state.done),
            total: state.map_or(0, |state| state.total),
            attempt: state.map_or(0, |state| state.attempt),
            error: state.and_then(|state| state.error.clone()),
            reason: node.reason().map(str::to_owned),
            agent: info.and_then(|info| info.agent.clone()),
            runtime: info.map(|info| info.runtime().to_string()),
            platform: uname.map(|uname| uname.sysname.clone()),
            machine: uname.map(|uname| uname.machine.clone()),
            firmware: uname.map(|uname| uname.version.clone()),
            labels: info.map(|info| info.labels.clone()).unwrap_or_default(),
            free: info.and_then(|info| info.free),
            changed: node.changed.map(time),
        }
    }
}

impl From<&view::Update> for UpdateRow {
    fn from(update: &view::Update) -> UpdateRow {
        let first = update.steps.first().map_or(0, |(_, at)| *at);
        let last = update.steps.last();
        UpdateRow {
            sequence: update.sequence,
            version: update.version.clone(),
            attempt: update.attempt,
            began: time(first),
            ended: last.filter(|_| update.is_over()).map(|(_, at)| time(*at)),
            phase: last.map_or(PhaseWord::Unknown, |(phase, _)| (*phase).into()),
            total: update.total,
            error: update.error.clone(),
            steps: update
                .steps
                .iter()
                .map(|(phase, at)| StepRow { phase: (*phase).into(), at: time(*at) })
                .collect(),
        }
    }
}

impl From<&Line> for LogLine {
    fn from(line: &Line) -> LogLine {
        LogLine { at: time(line.at), text: line.text.to_string() }
    }
}

impl ReleaseRow {
    /// The release that a list of a channel is.
    #[must_use]
    pub fn of(channel: &str, list: &UpdateList, digest: &Digest, size: u64) -> ReleaseRow {
        let release = list.release();
        let signature = list.entries().iter().find_map(|entry| match entry {
            Entry::Signature(signature) => Some(signature.key.clone()),
            _ => None,
        });
        let turn = release.and_then(|release| rollout::Rollout::of(release).ok().flatten());
        ReleaseRow {
            channel: channel.to_owned(),
            sequence: release.map(|release| release.sequence),
            version: release.map(|release| release.version.clone()),
            created: release.and_then(|release| release.created).map(|time| time.to_string()),
            expires: release.and_then(|release| release.expires).map(|time| time.to_string()),
            epoch: release.map_or(0, |release| release.epoch),
            digest: digest.to_string(),
            previous: release.and_then(|release| release.previous.as_ref()).map(ToString::to_string),
            signed_by: signature,
            revoked: release.map(|release| release.revoked.clone()).unwrap_or_default(),
            packages: list.packages().count() as u64,
            size,
            rollout: turn.map(|turn| Turn {
                id: turn.id.to_string(),
                percent: turn.percent.to_string(),
                only: turn.only.map(|only| only.to_string()),
            }),
        }
    }
}

impl EntryRow {
    /// What an entry is; none for a release, a signature or an order.
    #[must_use]
    pub fn of(entry: &Entry) -> Option<EntryRow> {
        let row = |kind, name: &str, version: Option<&str>, digest: Option<&Digest>, size| EntryRow {
            kind,
            name: name.to_owned(),
            version: version.map(str::to_owned),
            path: None,
            tag: None,
            target: None,
            digest: digest.map(ToString::to_string),
            size,
            optional: false,
        };
        Some(match entry {
            Entry::Wheel(wheel) => EntryRow {
                tag: wheel.tag.clone(),
                optional: wheel.is_optional(),
                ..row(EntryKind::Wheel, &wheel.name, Some(&wheel.version), Some(&wheel.digest), wheel.size)
            },
            Entry::Src(list::Src { path, digest, size, .. }) => EntryRow {
                path: Some(path.to_string()),
                ..row(EntryKind::Src, path.as_str(), None, Some(digest), *size)
            },
            Entry::Firmware(image) => EntryRow {
                target: image.target.clone(),
                optional: image.is_optional(),
                ..row(EntryKind::Firmware, &image.name, Some(&image.version), Some(&image.digest), image.size)
            },
            Entry::Unknown(_) => row(EntryKind::Other, entry.kind(), None, None, None),
            _ => return None,
        })
    }

    /// What it is of its list: two of a list differ in it.
    #[must_use]
    pub fn key(&self) -> (EntryKind, String, Option<String>) {
        let name = match self.kind {
            EntryKind::Wheel => mpypi_protocol::wheel::normalized_name(&self.name),
            _ => self.name.clone(),
        };
        (self.kind, name, self.tag.clone().or_else(|| self.target.clone()))
    }
}

impl RolloutRow {
    /// The rollout of a channel.
    #[must_use]
    pub fn of(view: &View, rollout: &view::Rollout, counts: record::Counts) -> RolloutRow {
        let record::Record { policy, .. } = &rollout.record;
        let record = &rollout.record;
        let channel = view.channel(&record.channel);
        let step = channel.map(|channel| record::Step::new(record, &channel.list));
        let count = |count: usize| count as u64;
        RolloutRow {
            channel: record.channel.to_string(),
            id: record.id.to_string(),
            version: record.version.clone(),
            status: match record.status {
                Status::Running => StatusWord::Running,
                Status::Paused => StatusWord::Paused,
                Status::RollingBack => StatusWord::RollingBack,
                Status::Done => StatusWord::Done,
                Status::RolledBack => StatusWord::RolledBack,
                Status::Superseded => StatusWord::Superseded,
            },
            reason: record.reason.clone(),
            step: record.step as u64,
            steps: policy.steps.iter().map(ToString::to_string).collect(),
            percent: step.as_ref().and_then(|step| Some(step.rollout()?.percent.to_string())),
            wait: policy.wait,
            patience: policy.patience,
            max_failures: policy.max_failures.to_string(),
            min_success: policy.min_success.to_string(),
            on_failure: match policy.on_failure {
                OnFailure::Pause => OnFailureWord::Pause,
                OnFailure::RollBack => OnFailureWord::RollBack,
            },
            only: policy.only.as_ref().map(ToString::to_string),
            window: policy.window.map(|window| window.to_string()),
            jitter: policy.jitter.into(),
            optional: policy.optional,
            first: record.first,
            base: record.base,
            sequence: step.as_ref().map_or(0, record::Step::sequence),
            steered: view.is_steered(&record.channel),
            counts: CountsRow {
                nodes: count(counts.nodes),
                succeeded: count(counts.succeeded),
                pending: count(counts.pending),
                waiting: count(counts.waiting),
                failed: count(counts.failed),
                rolled_back: count(counts.rolled_back),
                silent: count(counts.silent),
                absent: count(counts.absent),
            },
        }
    }
}
