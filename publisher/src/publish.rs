//! Publishing: packages first, each acknowledged; then the list, which is the commit; then the list is read
//! back. Killed anywhere, the old release stands, and the next run sends only what is missing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_client::Brokers;
use mpypi_protocol::{
    ChannelName, Digest, Entry, NodeId, PackageId, Rollout, UpdateList,
    list::{ListError, Release},
    node::Info,
    signed::Distrust,
};
use tokio::sync::mpsc;

use crate::{
    channel::{Cache, Channel, ChannelError, Package},
    cut::{CutError, Desk, Parcel, cut, parcels},
    history, limits,
    link::{Link, LinkError, Refusal, Signal},
    lint::{Broker, Finding, Ground, Inside, Severity, for_promoter, lint},
    plan::{Decision, Diff, Plan, PlanError, Trust, Wanted, decide},
    report::{count, size},
    retained::{self, AskError},
    settle::{self, Disagreement, End, Message, Stands, Verdict, settle},
    signing::{self, Authority, Signing, SigningError},
};

/// Where and how to publish.
#[derive(Debug, Clone)]
pub struct Options {
    /// The broker, or several that are to agree.
    pub brokers: Brokers,
    /// The channel's name, before what the folder says.
    pub channel: Option<ChannelName>,
    /// Whether anything is sent.
    pub mode: Mode,
    /// Whether the broker is believed to have what its list names.
    pub trust: Trust,
    /// The release's sequence number, if the broker lost count.
    pub sequence: Option<u64>,
    /// What becomes of a release that would harm Mpy-BLOX nodes.
    pub harm: Harm,
    /// Whether the list is signed, and with what.
    pub signing: Signing,
    /// Whose turn it is to take the release; everybody's if `None`.
    pub rollout: Option<Rollout>,
    /// The commit that the folder was taken from, if it was.
    pub commit: Option<String>,
}

/// What becomes of a release that would harm Mpy-BLOX nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// It is not published.
    Refused,
    /// It is published, with warnings.
    Forced,
}

/// Whether anything is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Publish.
    Publish,
    /// Only compare, and say what would be sent.
    DryRun,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The channel.
    pub channel: ChannelName,
    /// The sequence number of the release that stands, or of the one that would be published.
    pub sequence: u64,
    /// Its version.
    pub version: String,
    /// The commit that it was made of, if it says one.
    pub commit: Option<String>,
    /// What was done.
    pub done: Done,
    /// How many packages the release has, empty files included.
    pub packages: usize,
    /// How many packages were sent, or would be.
    pub sent: usize,
    /// How many bytes these packages have.
    pub bytes_sent: u64,
    /// What changed for devices.
    pub diff: Diff,
    /// What it does to Mpy-BLOX nodes.
    pub lint: Vec<Finding>,
    /// That all brokers have all of it, where there are several.
    pub agreed: Option<Verdict>,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// A new release stands, and was read back.
    Published,
    /// The broker already retained what the folder holds; nothing was sent.
    UpToDate,
    /// A new release would have been published.
    WouldPublish,
    /// A new release would have been refused, for what it would do to Mpy-BLOX nodes.
    WouldRefuse,
}

/// What happens meanwhile, for people.
#[derive(Debug)]
pub enum Event<'a> {
    /// Something in the folder that people should know.
    Warning(&'a str),
    /// Something done without being asked.
    Note(&'a str),
    /// What the release does to Mpy-BLOX nodes.
    Finding(&'a Finding),
    /// So many bytes of a git repository have come.
    Fetching {
        /// How many.
        bytes: u64,
    },
    /// Files of wheels are being compiled.
    Compiling {
        /// How many are done.
        done: usize,
        /// How many there are.
        files: usize,
    },
    /// These packages are going to be sent.
    Sending {
        /// How many.
        packages: usize,
        /// Their bytes.
        bytes: u64,
    },
    /// The broker has so many more bytes of them now.
    Taken(u64),
    /// The broker has this package now.
    Sent {
        /// Which.
        package: &'a Package,
        /// How many bytes of it were sent: where it lies in chunks, those that were missing.
        bytes: u64,
    },
    /// All packages are there; the list is being sent.
    Committing,
    /// The connection was lost; it is tried again after a pause.
    Lost {
        /// Why.
        error: &'a LinkError,
        /// The pause.
        pause: Duration,
    },
}

/// Takes note of [`Event`]s.
pub trait Observer {
    /// Something happened.
    fn event(&mut self, event: Event<'_>);
}

impl Observer for () {
    fn event(&mut self, _event: Event<'_>) {}
}

/// Why nothing was published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The folder is no channel.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// There can be no new list.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The broker cannot be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The list cannot be signed.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// There is no way to cut a package so that the broker takes it.
    #[error(transparent)]
    Cut(#[from] CutError),
    /// The broker takes no list of that size.
    #[error(
        "the list of release {sequence} on channel `{channel}` has {list} bytes, and the broker takes {room}"
    )]
    ListTooLarge {
        /// The channel.
        channel: ChannelName,
        /// The release.
        sequence: u64,
        /// The list's size in bytes.
        list: usize,
        /// The largest that the broker takes there, in bytes.
        room: u64,
    },
    /// It would harm Mpy-BLOX nodes.
    #[error("release {sequence} of channel `{channel}` would harm {}", nodes(findings))]
    Harmful {
        /// The channel.
        channel: ChannelName,
        /// The release.
        sequence: u64,
        /// How. At least one is a refusal.
        findings: Vec<Finding>,
    },
    /// The history has no such release.
    #[error("channel `{channel}` keeps no release {sequence}")]
    NoSuchRelease {
        /// The channel.
        channel: ChannelName,
        /// The release.
        sequence: u64,
        /// Those it keeps.
        kept: Vec<u64>,
    },
    /// A channel has nothing to take over.
    #[error("channel `{channel}` has no release")]
    Empty {
        /// The channel.
        channel: ChannelName,
    },
    /// What is to be published again is not believed.
    #[error("what is to be published again is not believed: {0}")]
    Untrusted(Distrust),
    /// The broker lost packages.
    #[error("the broker lost {} that the release needs, `{}` among them", count(packages.len(), "package"), packages[0])]
    Lost {
        /// Which. At least one.
        packages: Vec<PackageId>,
    },
    /// The broker does not take a package.
    #[error("the broker refused package `{package}`: {refusal}")]
    PackageRefused {
        /// The package.
        package: PackageId,
        /// Why.
        refusal: Refusal,
    },
    /// The broker does not take the list.
    #[error("the broker refused release {sequence} of channel `{channel}`: {refusal}")]
    ListRefused {
        /// The channel.
        channel: ChannelName,
        /// The release.
        sequence: u64,
        /// Why.
        refusal: Refusal,
    },
    /// Someone else published meanwhile.
    #[error(
        "someone else published to channel `{channel}` at the same time: {found} is theirs, ours was left"
    )]
    Raced {
        /// The channel.
        channel: ChannelName,
        /// What is there now.
        found: String,
    },
    /// The broker acknowledged the list and does not have it.
    #[error("the broker acknowledged release {sequence} of channel `{channel}` and does not retain it")]
    NotRetained {
        /// The channel.
        channel: ChannelName,
        /// The release.
        sequence: u64,
    },
    /// Not every broker has it.
    #[error(transparent)]
    Disagreement(#[from] Box<Disagreement>),
    /// Connections were lost too often.
    #[error("gave up after {attempts} lost connections")]
    GaveUp {
        /// How many.
        attempts: u32,
        /// The last one.
        source: Box<LinkError>,
        /// Bytes of the largest package, or chunk, that was on its way then.
        largest: Option<u64>,
    },
}

impl From<LinkError> for PublishError {
    fn from(error: LinkError) -> Self {
        PublishError::Ask(error.into())
    }
}

impl PublishError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            PublishError::Channel(error) => error.hint(),
            PublishError::Ask(error) => error.hint(),
            PublishError::Signing(error) => error.hint(),
            PublishError::Harmful { .. } => {
                Some(
                    "follow the remedies above, or publish it all the same with `--force`; a node that is gone is \
                     forgotten when its retained `mpypi/nodes/<node>/info` is cleared"
                        .to_owned(),
                )
            }
            PublishError::PackageRefused { refusal, .. } | PublishError::ListRefused { refusal, .. } => {
                refusal.hint()
            }
            PublishError::Disagreement(error) => Some(error.hint()),
            PublishError::Cut(CutError::TooMany { .. }) => {
                Some("raise the broker's packet limit, or leave the package out".to_owned())
            }
            PublishError::Cut(CutError::Lies { package, .. }) => Some(format!(
                "devices of other channels and earlier releases may need these chunks: raise `--max-packet`, or the broker's limit; \
                 or, if none does, clear what is retained below `mpypi/chunks/{}/`",
                package.digest()
            )),
            PublishError::ListTooLarge { .. } => Some(
                "put files into a wheel, which is one package however many it holds, or raise the broker's packet \
                 limit; the fewer chunks, as with a larger `--chunk`, the shorter the list"
                    .to_owned(),
            ),
            PublishError::Raced { .. } => Some("run again to publish this folder on top of it".to_owned()),
            // Brokers that cannot say what they take hang up.
            PublishError::GaveUp { largest: Some(largest), .. } if *largest > limits::CHUNK => Some(format!(
                "run again: what the broker acknowledged is not sent again; if it is that it takes nothing as large as \
                 {}, which was on its way, say with `--max-packet SIZE` what it takes",
                size(*largest)
            )),
            PublishError::GaveUp { .. } => {
                Some("run again: what the broker acknowledged is not sent again".to_owned())
            }
            PublishError::NotRetained { .. } => {
                Some("turn retained messages on at the broker: they are the index".to_owned())
            }
            PublishError::Plan(PlanError::NotNewer { present, .. }) => {
                Some(format!("devices accept only what is newer: use a number above {present}"))
            }
            PublishError::Plan(PlanError::List(ListError::TooLarge { .. } | ListError::TooMany { .. })) => {
                Some(
                    "put files into a wheel, which is one package however many it holds, or leave some out"
                        .to_owned(),
                )
            }
            PublishError::NoSuchRelease { kept, .. } => {
                let kept: Vec<_> = kept.iter().map(ToString::to_string).collect();
                Some(match kept.is_empty() {
                    true => "its history is empty: it begins with the second release, and holds what came before the present one"
                        .to_owned(),
                    false => format!("it keeps {}", kept.join(", ")),
                })
            }
            PublishError::Lost { .. } => Some("publish the folder again: what is missing is sent".to_owned()),
            PublishError::Empty { .. } | PublishError::Untrusted(_) | PublishError::Plan(_) => None,
        }
    }

    /// Whether a new connection may help, without a change of the folder.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            PublishError::Ask(AskError::Link(error)) => error.is_passing(),
            PublishError::GaveUp { .. } | PublishError::Raced { .. } | PublishError::Disagreement(_) => true,
            // The folder is being written to: it will be complete in a moment.
            PublishError::Channel(ChannelError::Changed { .. }) => true,
            _ => false,
        }
    }

    fn lost(self) -> Result<LinkError, PublishError> {
        match self {
            PublishError::Ask(AskError::Link(error)) if error.is_passing() => Ok(error),
            other => Err(other),
        }
    }
}

impl AskError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            AskError::Link(error) => error.hint(),
            AskError::Refused { .. } => {
                Some("log in as a user who may: `--broker mqtt://user:password@host:port`".to_owned())
            }
        }
    }
}

/// The packages of parcels, those of one package in a row.
fn whole(parcels: &[Parcel<'_>]) -> Vec<PackageId> {
    let mut packages: Vec<PackageId> = parcels.iter().map(|parcel| parcel.package.id.clone()).collect();
    packages.dedup();
    packages
}

/// The nodes of the findings that refuse, counted.
fn nodes(findings: &[Finding]) -> String {
    let refusals = findings.iter().filter(|finding| finding.severity == Severity::Refusal);
    let nodes: HashSet<_> = refusals.flat_map(|finding| &finding.nodes).collect();
    count(nodes.len(), "Mpy-BLOX node")
}

/// Reads `folder` and publishes it.
///
/// # Errors
/// See [`PublishError`]. After an error the old release stands, or the new one: never half of one.
pub async fn publish(
    folder: &Path,
    options: &Options,
    observer: &mut impl Observer,
) -> Result<Outcome, PublishError> {
    let (channel, _) = load(folder, options, Cache::default(), observer).await;
    let channel = channel?;
    for warning in &channel.warnings {
        observer.event(Event::Warning(warning));
    }
    for note in &channel.notes {
        observer.event(Event::Note(note));
    }
    publish_channel(&channel, options, observer).await
}

/// Reads `folder` on a thread of its own.
pub(crate) async fn load(
    folder: &Path,
    options: &Options,
    mut cache: Cache,
    observer: &mut impl Observer,
) -> (Result<Channel, ChannelError>, Cache) {
    let (folder, name): (PathBuf, _) = (folder.to_owned(), options.channel.clone());
    let (say, mut compiling) = mpsc::unbounded_channel();
    let read = move || {
        #[expect(clippy::disallowed_methods, reason = "this is the driver that gives the reader its time")]
        let now = std::time::SystemTime::now();
        // Nobody listens any more if the whole publish is given up.
        let mut tell = |done, files| {
            let _ = say.send((done, files));
        };
        let channel = Channel::load(&folder, name.as_ref(), &mut cache, now, &mut tell);
        (channel, cache)
    };
    let reader = tokio::task::spawn_blocking(read);
    // Ends when the reader does.
    while let Some((done, files)) = compiling.recv().await {
        observer.event(Event::Compiling { done, files });
    }
    match reader.await {
        Ok(read) => read,
        Err(stopped) => std::panic::resume_unwind(stopped.into_panic()),
    }
}

/// Publishes a channel that was read before.
///
/// # Errors
/// See [`publish`].
pub async fn publish_channel(
    channel: &Channel,
    options: &Options,
    observer: &mut impl Observer,
) -> Result<Outcome, PublishError> {
    #[expect(clippy::disallowed_methods, reason = "this is the driver that gives the plan its time")]
    let now = Timestamp::now();
    let mut run = Run {
        channel,
        options,
        observer,
        now,
        authority: None,
        plan: None,
        signed: false,
        ground: None,
        harm: None,
        lint: Vec::new(),
        agreed: None,
        stands: None,
        entries: None,
        sent: HashSet::new(),
        on_its_way: None,
        bytes: 0,
        connected: false,
    };
    let mut losses = 0;
    loop {
        let sent = run.sent.len();
        let error = match run.attempt().await {
            Ok(outcome) => return Ok(outcome),
            // Never reached: the user is there and can do something about it now.
            Err(error) if !run.connected => return Err(error),
            Err(error) => error.lost()?,
        };
        losses = if run.sent.len() > sent { 1 } else { losses + 1 };
        if losses == limits::ATTEMPTS {
            let largest = run.on_its_way;
            return Err(PublishError::GaveUp { attempts: losses, source: Box::new(error), largest });
        }
        let pause = backoff(losses);
        run.observer.event(Event::Lost { error: &error, pause });
        tokio::time::sleep(pause).await;
    }
}

/// The pause after so many losses in a row: it doubles, and chance takes up to half of it away.
pub(crate) fn backoff(losses: u32) -> Duration {
    let pause = limits::BACKOFF.saturating_mul(1 << (losses.clamp(1, 16) - 1)).min(limits::BACKOFF_MAX);
    pause.mul_f64(1.0 - fastrand::f64() / 2.0)
}

/// One publish, over as many connections as it takes.
struct Run<'a, O> {
    channel: &'a Channel,
    options: &'a Options,
    observer: &'a mut O,
    now: Timestamp,
    /// Who signs, once the broker was asked whether the channel has keys.
    authority: Option<Authority>,
    /// Whether the plan's list is signed, where it is to be.
    signed: bool,
    /// What the channel retained when the plan was made, and the plan: it stays the same to the end.
    plan: Option<(Option<Bytes>, Plan)>,
    /// The Mpy-BLOX nodes that the release is judged for, once they were asked for.
    ground: Option<Nodes>,
    /// How bad it is for them, unless force is used.
    harm: Option<Severity>,
    /// What it does to them.
    lint: Vec<Finding>,
    /// How several brokers stand.
    agreed: Option<Verdict>,
    /// The release that stands and is what the folder holds: the plan is needed only if packages of it are lost.
    stands: Option<Release>,
    /// What the list says of each package, once it is known what the broker takes.
    entries: Option<Vec<Entry>>,
    /// The topics of what the broker acknowledged.
    sent: HashSet<String>,
    /// Bytes of the largest that is not acknowledged yet.
    on_its_way: Option<u64>,
    bytes: u64,
    connected: bool,
}

/// Who may be harmed.
struct Nodes {
    nodes: BTreeMap<NodeId, Info>,
    broker: Broker,
    /// What the wheels of the release say inside.
    inside: HashMap<Digest, Inside>,
    /// Its files that are no text, if that matters to anybody.
    binary: BTreeSet<Digest>,
}

impl<O: Observer> Run<'_, O> {
    async fn attempt(&mut self) -> Result<Outcome, PublishError> {
        let mut link = settle::connect(&self.options.brokers, &self.channel.name).await?;
        self.connected = true;
        let (present, roots) = retained::channel(&mut link, &self.channel.name).await?;
        let list = present.as_ref().and_then(|payload| UpdateList::parse(payload).ok());
        if self.authority.is_none() {
            let (named, name) = (self.channel.settings.key.as_ref(), &self.channel.name);
            let signing = &self.options.signing;
            let authority = Authority::find(signing, named, name, list.as_ref(), &roots, self.now)?;
            self.authority = Some(authority);
        }
        if self.entries.is_none() {
            let wish = self.options.brokers.chunk();
            self.entries = Some(cut(&mut link, &self.channel.packages, list.as_ref(), wish).await?);
        }
        let all = parcels(&self.channel.packages, self.entries());
        let answers = present.is_some();
        if self.ground.is_none() {
            self.ground = Some(self.nodes(&mut link, answers).await?);
        }
        let plan = match &self.plan {
            None => match self.decide(present.as_ref())? {
                Decision::UpToDate(release) => {
                    link.close().await;
                    self.judge(present.as_ref(), &[]);
                    self.agree(present.as_ref(), &all).await?;
                    return Ok(self.up_to_date(*release));
                }
                Decision::Publish(plan) => self.plan.insert((present.clone(), *plan)).1.clone(),
            },
            // The connection was lost after the list was sent, before it was acknowledged.
            Some((_, plan)) if present.as_ref() == Some(&plan.list) => {
                link.close().await;
                let plan = plan.clone();
                self.agree(Some(&plan.list), &all).await?;
                return Ok(self.published(&plan));
            }
            // Nobody who has what it was answers: others may.
            Some((base, _)) if settle::is_older(present.as_deref(), base.as_deref()) => {
                let reason = "it serves an older list than it did before".to_owned();
                return Err(LinkError::Lost { url: link.url().to_string(), reason }.into());
            }
            Some((base, _)) if *base != present => return Err(self.raced(present)),
            Some((_, plan)) => plan.clone(),
        };

        self.list_fits(&link, &plan)?;
        // After a lost connection everything is asked for again: not every broker still has, after a
        // restart, what it acknowledged before.
        let found = retained::pieces(&mut link, &self.channel.name, answers, &plan.unknown).await?;
        let unknown: HashSet<&str> = plan.unknown.iter().map(|piece| piece.topic.as_str()).collect();
        let is_missing = |topic: &String| unknown.contains(topic.as_str()) && !found.contains(topic);
        let missing: Vec<Parcel<'_>> =
            all.iter().filter(|parcel| is_missing(&parcel.piece.topic)).cloned().collect();
        let lacking = whole(&missing);
        let harm = self.judge(present.as_ref(), &lacking);
        if missing.is_empty()
            && self.sent.is_empty()
            && let Some(release) = self.stands.take()
        {
            link.close().await;
            self.agree(present.as_ref(), &all).await?;
            return Ok(self.up_to_date(release));
        }
        let (packages, bytes) = (lacking.len(), missing.iter().map(Parcel::size).sum());
        if self.options.mode == Mode::DryRun {
            link.close().await;
            let done = if harm == Severity::Refusal { Done::WouldRefuse } else { Done::WouldPublish };
            return Ok(self.outcome(&plan.release, done, (packages, bytes), plan.diff));
        }
        if harm == Severity::Refusal {
            link.close().await;
            return Err(PublishError::Harmful {
                channel: self.channel.name.clone(),
                sequence: plan.release.sequence,
                findings: std::mem::take(&mut self.lint),
            });
        }
        let plan = self.signed(plan).await?;
        self.list_fits(&link, &plan)?;
        if !missing.is_empty() {
            self.observer.event(Event::Sending { packages, bytes });
            self.send(&mut link, missing.into()).await?;
        }
        // The list names nothing that a node has lost already.
        let sent: Vec<Parcel<'_>> =
            all.iter().filter(|parcel| self.sent.contains(&parcel.piece.topic)).cloned().collect();
        if self.options.brokers.are_several() {
            self.agree_before(present.as_ref(), &sent, &plan).await?;
        }
        self.observer.event(Event::Committing);
        self.keep_history(&mut link, plan.release.sequence).await?;
        self.commit(&mut link, &plan).await?;

        let standing = retained::list(&mut link, &self.channel.name).await?;
        let is_ours = link.adapts_for_mpyblox();
        link.close().await;
        let several = self.options.brokers.are_several();
        let base = self.plan.as_ref().and_then(|(base, _)| base.as_ref());
        match standing.as_ref() {
            Some(list) if *list == plan.list => {
                // Our broker takes no list that names a package it lacks. Others are asked for what they were sent.
                match (several, is_ours) {
                    (true, _) => self.agree(Some(&plan.list), &all).await?,
                    (false, false) if !sent.is_empty() => self.agree(Some(&plan.list), &sent).await?,
                    (false, _) => {}
                }
                Ok(self.published(&plan))
            }
            // A node that lags behind the one that acknowledged it; what becomes of it is looked at through all.
            same if several && same == base => {
                self.agree(Some(&plan.list), &all).await?;
                Ok(self.published(&plan))
            }
            same if same == base => Err(PublishError::NotRetained {
                channel: self.channel.name.clone(),
                sequence: plan.release.sequence,
            }),
            _ => Err(self.raced(standing)),
        }
    }

    /// Makes sure that every broker has the packages that were sent, before the list names them.
    async fn agree_before(
        &mut self,
        base: Option<&Bytes>,
        sent: &[Parcel<'_>],
        plan: &Plan,
    ) -> Result<(), PublishError> {
        let verdict = self.settle(base, sent).await;
        if verdict.end == End::Agreed {
            return Ok(());
        }
        if verdict.end == End::Raced {
            return Err(self.raced(None));
        }
        let (sequence, channel) = (plan.release.sequence, &self.channel.name);
        let done = format!(
            "packages of release {sequence} of channel `{channel}` were sent, the old release stands"
        );
        Err(Box::new(Disagreement { done, stands: Stands::Nothing, verdict }).into())
    }

    /// Makes sure that every broker has the list, and packages.
    async fn agree(&mut self, list: Option<&Bytes>, packages: &[Parcel<'_>]) -> Result<(), PublishError> {
        if self.options.mode == Mode::DryRun {
            return Ok(());
        }
        // One broker that nothing was sent to has nothing to lose.
        if !self.options.brokers.are_several() && self.sent.is_empty() {
            return Ok(());
        }
        let verdict = self.settle(list, packages).await;
        match verdict.end {
            End::Agreed => {
                if self.options.brokers.are_several() {
                    self.agreed = Some(verdict);
                }
                Ok(())
            }
            End::Raced => Err(self.raced(None)),
            End::Disagreed => {
                let release = list.and_then(|list| UpdateList::parse(list).ok());
                let sequence =
                    release.as_ref().and_then(UpdateList::release).map_or(0, |release| release.sequence);
                let done = format!("release {sequence} of channel `{}` is published", self.channel.name);
                Err(Box::new(Disagreement { done, stands: Stands::Published, verdict }).into())
            }
        }
    }

    async fn settle(&mut self, list: Option<&Bytes>, packages: &[Parcel<'_>]) -> Verdict {
        let Run { channel, observer, options, plan, .. } = self;
        let mut messages: Vec<Message> =
            packages.iter().map(|parcel| Message::piece(parcel.piece.clone())).collect();
        messages.extend(list.map(|list| Message::of(channel.name.topic(), list.clone())));
        // The list that this one replaced is part of the history.
        let base = plan.as_ref().and_then(|(base, _)| base.as_ref()).filter(|base| Some(*base) != list);
        if let Some(base) = base
            && let Ok(parsed) = UpdateList::parse(base)
            && let Some(release) = parsed.release()
        {
            messages.push(Message::of(channel.name.history(release.sequence), base.clone()));
        }
        let mut desk = Desk::default();
        let source = |number: usize| packages.get(number).and_then(|parcel| parcel.bytes(&mut desk).ok());
        let tell = |text: &str| observer.event(Event::Note(text));
        settle(&options.brokers, Some(&channel.name), &messages, source, tell).await
    }

    /// What the list says of each package.
    fn entries(&self) -> &[Entry] {
        self.entries.as_deref().unwrap_or_default()
    }

    /// Whether the broker takes the list, also as a part of the history, which comes when it is replaced.
    fn list_fits(&self, link: &Link, plan: &Plan) -> Result<(), PublishError> {
        let (channel, sequence) = (self.channel.name.clone(), plan.release.sequence);
        let room = link.room(&channel.history(sequence));
        match plan.list.len() {
            list if list as u64 > room => Err(PublishError::ListTooLarge { channel, sequence, list, room }),
            _ => Ok(()),
        }
    }

    /// The plan with its list signed. It is signed once: after a lost connection, the same bytes go out.
    async fn signed(&mut self, plan: Plan) -> Result<Plan, PublishError> {
        if let (false, Some(authority)) = (self.signed, &self.authority) {
            let list = authority.sign(&self.options.signing, &plan.list).await?;
            if let Some((_, plan)) = &mut self.plan {
                plan.list = list.clone();
            }
            self.signed = true;
            return Ok(Plan { list, ..plan });
        }
        Ok(plan)
    }

    /// Makes sure that the list about to be replaced stays readable.
    async fn keep_history(&mut self, link: &mut Link, next: u64) -> Result<(), PublishError> {
        let base = self.plan.as_ref().and_then(|(base, _)| base.clone());
        if let Some(warning) = history::keep(link, &self.channel.name, base.as_ref(), next).await? {
            self.observer.event(Event::Warning(&warning));
        }
        Ok(())
    }

    /// The Mpy-BLOX nodes of the channel, and what concerns them.
    async fn nodes(&mut self, link: &mut Link, answers: bool) -> Result<Nodes, PublishError> {
        let broker = if link.adapts_for_mpyblox() { Broker::Adapting } else { Broker::Plain };
        let nodes = match retained::mpyblox(link, &self.channel.name, answers).await {
            Ok(nodes) => nodes,
            Err(refused @ AskError::Refused { .. }) => {
                let warning = format!("{refused}: what the release does to Mpy-BLOX nodes is not known");
                self.observer.event(Event::Warning(&warning));
                BTreeMap::new()
            }
            Err(error) => return Err(error.into()),
        };
        let mut inside = HashMap::new();
        for package in self.channel.packages.iter().filter(|_| !nodes.is_empty()) {
            if let PackageId::Wheel(digest) = package.id {
                let contents = Inside::of(&package.bytes()?);
                inside.insert(digest, contents.map_err(|source| self.channel.unreadable(package, source))?);
            }
        }
        let mut binary = BTreeSet::new();
        for package in self.channel.packages.iter().filter(|_| self.channel.for_promoter) {
            if let PackageId::Src(_, digest) = &package.id
                && std::str::from_utf8(&package.bytes()?).is_err()
            {
                binary.insert(*digest);
            }
        }
        Ok(Nodes { nodes, broker, inside, binary })
    }

    /// Says, once, what the release does to Mpy-BLOX nodes; how bad it is, unless force is used. `missing` is what the
    /// broker does not have of the release.
    fn judge(&mut self, present: Option<&Bytes>, missing: &[PackageId]) -> Severity {
        if let Some(harm) = self.harm {
            return harm;
        }
        let Some(Nodes { nodes, broker, inside, binary }) = &self.ground else { return Severity::Note };
        let entries = self.entries.as_deref().unwrap_or_default();
        let before = present.and_then(|payload| UpdateList::parse(payload).ok());
        let had: HashSet<PackageId> =
            before.iter().flat_map(UpdateList::packages).map(|(package, _)| package).collect();
        let lost: Vec<PackageId> = missing.iter().filter(|package| had.contains(package)).cloned().collect();
        self.lint =
            lint(&Ground { entries, inside, before: before.as_ref(), nodes, broker: *broker, lost: &lost });
        if self.channel.for_promoter {
            let mut more = for_promoter(entries, before.as_ref(), binary);
            self.lint.append(&mut more);
            self.lint.sort_by_key(|finding| finding.severity);
        }
        for finding in &self.lint {
            self.observer.event(Event::Finding(finding));
        }
        let harm = match (self.options.harm, self.lint.first()) {
            (Harm::Refused, Some(worst)) => worst.severity,
            _ => Severity::Note,
        };
        *self.harm.insert(harm)
    }

    fn decide(&mut self, present: Option<&Bytes>) -> Result<Decision, PublishError> {
        let authority = self.authority.clone();
        let (epoch, signer) = authority.as_ref().map_or((0, None), |authority| {
            (authority.epoch, authority.key.as_ref().map(|key| key.id.clone()))
        });
        let previous = signing::previous(present);
        // A list that devices do not believe does not stand, whatever it says.
        let stands = match (present, &authority, &signer) {
            (Some(payload), Some(authority), Some(_)) => {
                let verified = authority.trust.verify(&self.channel.name, payload, Some(self.now));
                if let Err(error) = &verified
                    && **payload != *b"[]"
                {
                    let warning = format!("devices do not believe what the channel retains: {error}");
                    self.observer.event(Event::Warning(&warning));
                }
                verified.is_ok()
            }
            _ => true,
        };
        let present = match present.map(|payload| UpdateList::parse(payload)).transpose() {
            Ok(list) => list,
            Err(error) => {
                let warning = format!("what the channel retains is no update list and is replaced: {error}");
                self.observer.event(Event::Warning(&warning));
                None
            }
        };
        let settings = &self.channel.settings;
        let wanted = Wanted {
            channel: self.channel.name.clone(),
            version: settings.version.clone(),
            expires_days: settings.expires_days,
            sequence: self.options.sequence,
            epoch,
            previous,
            revoked: Vec::new(),
            signer,
            entries: self.entries().to_vec(),
            rollout: self.options.rollout.clone(),
            commit: self.options.commit.clone(),
        };
        if !stands {
            return Ok(decide(present.as_ref(), &wanted, Trust::Nothing, self.now)?);
        }
        let decision = decide(present.as_ref(), &wanted, Trust::List, self.now)?;
        // A Mpy-BLOX node waits for ever for what a broker lost, so others' brokers are asked for everything.
        let waits = self
            .ground
            .as_ref()
            .is_some_and(|ground| ground.broker == Broker::Plain && !ground.nodes.is_empty());
        if self.options.trust == Trust::List && !waits {
            return Ok(decision);
        }
        if let Decision::UpToDate(release) = decision {
            self.stands = Some(*release);
        }
        Ok(decide(present.as_ref(), &wanted, Trust::Nothing, self.now)?)
    }

    fn up_to_date(&self, release: Release) -> Outcome {
        self.outcome(&release, Done::UpToDate, (0, 0), Diff::default())
    }

    /// Sends packages, a bounded number of packets and bytes ahead of the acknowledgements. Meanwhile nobody
    /// else may publish to the channel.
    async fn send(&mut self, link: &mut Link, mut queue: VecDeque<Parcel<'_>>) -> Result<(), PublishError> {
        let channel = self.channel.name.topic();
        link.subscribe(std::slice::from_ref(&channel));
        let mut in_flight: HashMap<u64, Parcel<'_>> = HashMap::new();
        // How many parcels of each package, and bytes, are still to be acknowledged.
        let mut owed: HashMap<PackageId, (usize, u64)> = HashMap::new();
        for parcel in &queue {
            let (parcels, bytes) = owed.entry(parcel.package.id.clone()).or_default();
            (*parcels, *bytes) = (*parcels + 1, *bytes + parcel.size());
        }
        let mut desk = Desk::default();
        let mut bytes = 0;
        let mut left = false;
        loop {
            while in_flight.len() < limits::IN_FLIGHT
                && let Some(parcel) = queue.pop_front_if(|parcel| {
                    in_flight.is_empty() || bytes + parcel.size() <= limits::IN_FLIGHT_BYTES
                })
            {
                let number = link.publish(&parcel.piece.topic, parcel.bytes(&mut desk)?)?;
                bytes += parcel.size();
                in_flight.insert(number, parcel);
            }
            if in_flight.is_empty() && !left {
                link.unsubscribe(&channel);
                left = true;
            }
            self.on_its_way = in_flight.values().map(Parcel::size).max();
            let (number, result) = match link.next().await? {
                Signal::Acknowledged(number, result) => (number, result),
                Signal::Message { topic, payload } if topic == channel => match self.is_base(&payload) {
                    true => continue,
                    false => return Err(self.raced(Some(payload))),
                },
                Signal::Unsubscribed => return Ok(()),
                _ => continue,
            };
            let Some(parcel) = in_flight.remove(&number) else { continue };
            let package = parcel.package;
            if let Err(refusal) = result {
                return Err(PublishError::PackageRefused { package: package.id.clone(), refusal });
            }
            bytes -= parcel.size();
            self.bytes += parcel.size();
            self.observer.event(Event::Taken(parcel.size()));
            self.sent.insert(parcel.piece.topic);
            if let Some((parcels, bytes)) = owed.get_mut(&package.id) {
                *parcels -= 1;
                if *parcels == 0 {
                    self.observer.event(Event::Sent { package, bytes: *bytes });
                }
            }
        }
    }

    /// Whether `payload` is what the channel retained when the plan was made.
    fn is_base(&self, payload: &Bytes) -> bool {
        self.plan.as_ref().and_then(|(base, _)| base.as_ref()) == Some(payload)
    }

    /// Sends the list and waits until the broker has it.
    async fn commit(&mut self, link: &mut Link, plan: &Plan) -> Result<(), PublishError> {
        let number = link.publish(&self.channel.name.topic(), plan.list.clone())?;
        let refusal = loop {
            match link.next().await? {
                Signal::Acknowledged(done, Ok(_)) if done == number => return Ok(()),
                Signal::Acknowledged(done, Err(refusal)) if done == number => break refusal,
                _ => {}
            }
        };
        // Was someone faster?
        let base = self.plan.as_ref().and_then(|(base, _)| base.clone());
        match retained::list(link, &self.channel.name).await {
            Ok(standing) if standing != base => Err(self.raced(standing)),
            _ => Err(PublishError::ListRefused {
                channel: self.channel.name.clone(),
                sequence: plan.release.sequence,
                refusal,
            }),
        }
    }

    fn raced(&self, standing: Option<Bytes>) -> PublishError {
        let list = standing.as_deref().and_then(|payload| UpdateList::parse(payload).ok());
        let found = match list.as_ref().and_then(UpdateList::release) {
            Some(release) => format!("release {}", release.sequence),
            None => "what is there now".to_owned(),
        };
        PublishError::Raced { channel: self.channel.name.clone(), found }
    }

    fn published(&self, plan: &Plan) -> Outcome {
        let mut all = parcels(&self.channel.packages, self.entries());
        all.retain(|parcel| self.sent.contains(&parcel.piece.topic));
        self.outcome(&plan.release, Done::Published, (whole(&all).len(), self.bytes), plan.diff.clone())
    }

    fn outcome(
        &self,
        release: &Release,
        done: Done,
        (sent, bytes_sent): (usize, u64),
        diff: Diff,
    ) -> Outcome {
        Outcome {
            channel: self.channel.name.clone(),
            sequence: release.sequence,
            version: release.version.clone(),
            commit: release.commit().map(str::to_owned),
            done,
            packages: self.channel.packages.len(),
            sent,
            bytes_sent,
            diff,
            lint: self.lint.clone(),
            agreed: self.agreed.clone(),
        }
    }
}
