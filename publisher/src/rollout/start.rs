//! The start of a rollout: the release is put in place for nobody. Nothing happens on any node until it is steered, so whoever
//! is killed here leaves nothing half done.

use std::path::PathBuf;

use bytes::Bytes;
use mpypi_client::Brokers;
use mpypi_protocol::{
    ChannelName, Rollout, UpdateList,
    list::Release,
    rollout::{Percent, RolloutId},
};

use super::{
    Policy, Record, Status, control,
    steer::{Known, SteerError, sign_again},
};
use crate::{
    channel::Cache,
    limits,
    link::{Link, Signal},
    plan::Trust,
    publish::{self, Harm, Mode, Observer, Options, PublishError, publish_channel},
    retained, settle,
    signing::Signing,
};

/// What is to be rolled out.
#[derive(Debug, Clone)]
pub enum Target {
    /// The content of a folder.
    Folder(PathBuf),
    /// What the channel has.
    Present(ChannelName),
}

/// How it is to start.
#[derive(Debug, Clone)]
pub struct Start {
    /// The broker, or several that are to agree.
    pub brokers: Brokers,
    /// What is rolled out.
    pub target: Target,
    /// The channel's name, before what a folder says.
    pub channel: Option<ChannelName>,
    /// How it is to go.
    pub policy: Policy,
    /// What becomes of a release that would harm Mpy-BLOX nodes.
    pub harm: Harm,
    /// What becomes of nodes that cannot be held back.
    pub unheld: Unheld,
    /// What lists are signed with, where the channel has keys.
    pub signing: Signing,
}

/// What becomes of Mpy-BLOX nodes where the broker does not hold them back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unheld {
    /// They are a reason not to start.
    Refused,
    /// They get the release at once.
    Accepted,
}

/// What there is to steer.
#[derive(Debug, Clone)]
pub struct Started {
    /// The channel.
    pub channel: ChannelName,
    /// What is to be retained first; `None` where a rollout goes on that was under way.
    pub begin: Option<Record>,
}

/// Why a rollout does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The release cannot be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The broker cannot be asked, or has nothing.
    #[error(transparent)]
    Steer(#[from] SteerError),
    /// Another one is under way.
    #[error("channel `{channel}` is at another rollout, of version {version}, which is {status}")]
    UnderWay {
        /// The channel.
        channel: ChannelName,
        /// What it rolls out.
        version: String,
        /// How it stands.
        status: Status,
    },
    /// It was stopped.
    #[error("the rollout of version {version} on channel `{channel}` is paused{}", reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default())]
    Paused {
        /// The channel.
        channel: ChannelName,
        /// What it rolls out.
        version: String,
        /// Why.
        reason: Option<String>,
    },
    /// Nodes with Mpy-BLOX on a broker that does not adapt lists for them.
    #[error(
        "{} of channel `{channel}` cannot be held back: they run Mpy-BLOX, and this broker serves them every release at once",
        crate::report::count(*nodes, "node")
    )]
    CannotHold {
        /// The channel.
        channel: ChannelName,
        /// How many.
        nodes: usize,
    },
}

impl StartError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            StartError::Publish(error) => error.hint(),
            StartError::Steer(error) => error.hint(),
            StartError::UnderWay { channel, .. } => Some(format!(
                "look at it with `mpypi rollout status {channel}`, end it with `mpypi rollout abort {channel}`"
            )),
            StartError::Paused { channel, .. } => Some(format!(
                "`mpypi rollout resume {channel}` goes on, `mpypi rollout abort {channel}` puts the release before back"
            )),
            StartError::CannotHold { .. } => Some(
                "let them have it at once with `--yes`, or use a broker of ours, which holds them back"
                    .to_owned(),
            ),
        }
    }
}

/// Puts a release in place, for nobody; or finds that it was.
///
/// # Errors
/// See [`StartError`].
pub async fn start(start: &Start, observer: &mut impl Observer) -> Result<Started, StartError> {
    let folder = match &start.target {
        Target::Present(_) => None,
        Target::Folder(folder) => {
            let options = options(start, Mode::DryRun, None);
            let (channel, _) = publish::load(folder, &options, Cache::default(), observer).await;
            Some(channel.map_err(PublishError::from)?)
        }
    };
    let channel = match (&folder, &start.target) {
        (Some(channel), _) => channel.name.clone(),
        (None, Target::Present(channel)) => channel.clone(),
        (None, Target::Folder(_)) => unreachable!("a folder was read"),
    };
    let mut link = settle::connect(&start.brokers, &channel).await.map_err(SteerError::from)?;
    let mut known = Known::new(channel.clone());
    known.read_all(&mut link).await.map_err(SteerError::from)?;
    let release = known.list().and_then(UpdateList::release);
    let present = release.and_then(|release| Rollout::of(release).ok()?);

    // The same packages: what is there is what is wanted.
    let same = match &folder {
        None => true,
        Some(folder) => {
            let listed: Vec<_> = known.list().into_iter().flat_map(UpdateList::packages).collect();
            let wanted = folder.packages.iter().map(|package| (package.id.clone(), Some(package.size)));
            listed == wanted.collect::<Vec<_>>()
        }
    };
    let record = known.record.as_ref().and_then(|record| record.as_ref().ok());
    let record = record.filter(|record| present.as_ref().is_some_and(|present| present.id == record.id));
    match (record, &present) {
        (Some(record), _) if record.status.is_under_way() && !same => {
            let (version, status) = (record.version.clone(), record.status);
            link.close().await;
            return Err(StartError::UnderWay { channel, version, status });
        }
        (Some(record), _) if record.status == Status::Paused => {
            let (version, reason) = (record.version.clone(), record.reason.clone());
            link.close().await;
            return Err(StartError::Paused { channel, version, reason });
        }
        (Some(record), _) if record.status.is_under_way() => {
            link.close().await;
            return Ok(Started { channel, begin: None });
        }
        // It was put in place by somebody who got no further.
        (None, Some(present)) if same && present.percent == Percent::NONE => {
            let begin = release.map(|release| begin(start, release, present));
            link.close().await;
            return Ok(Started { channel, begin });
        }
        _ => {}
    }

    if !link.adapts_for_mpyblox() && start.unheld == Unheld::Refused {
        let nodes = control::legacy(&known.nodes, &channel);
        if nodes > 0 {
            link.close().await;
            return Err(StartError::CannotHold { channel, nodes });
        }
    }
    // A release that never reached everybody is nothing to go back to.
    let base = match (&present, release) {
        (Some(present), _) if present.percent != Percent::ALL => present.base,
        (_, release) => release.map(|release| release.sequence),
    };
    if let (Some(release), Some(payload)) = (release, known.payload().cloned()) {
        keep(&mut link, &channel.history(release.sequence), payload).await?;
    }
    let rollout = start.policy.rollout(RolloutId::from_bits(fastrand::u64(..)), Percent::NONE, base);
    let begin = match folder {
        Some(folder) => {
            link.close().await;
            let options = options(start, Mode::Publish, Some(rollout.clone()));
            let outcome = publish_channel(&folder, &options, observer).await?;
            record_of(start, &channel, (outcome.sequence, outcome.version), &rollout)
        }
        None => {
            let payload = known.payload().cloned().ok_or_else(|| SteerError::List(channel.clone()))?;
            let (_, roots) = retained::channel(&mut link, &channel).await.map_err(SteerError::from)?;
            let (release, bytes) =
                sign_again(&start.signing, &channel, (&payload, None), &roots, Some(&rollout), &[]).await?;
            keep(&mut link, &channel.topic(), bytes).await?;
            link.close().await;
            begin(start, &release, &rollout)
        }
    };
    Ok(Started { channel, begin: Some(begin) })
}

fn begin(start: &Start, release: &Release, rollout: &Rollout) -> Record {
    record_of(start, &release.channel, (release.sequence, release.version.clone()), rollout)
}

fn record_of(
    start: &Start,
    channel: &ChannelName,
    (sequence, version): (u64, String),
    rollout: &Rollout,
) -> Record {
    Record {
        id: rollout.id.clone(),
        channel: channel.clone(),
        version,
        policy: start.policy.clone(),
        status: Status::Running,
        step: 0,
        first: sequence,
        base: rollout.base,
        excused: 0,
        reason: None,
    }
}

fn options(start: &Start, mode: Mode, rollout: Option<Rollout>) -> Options {
    Options {
        brokers: start.brokers.clone(),
        channel: start.channel.clone(),
        mode,
        trust: Trust::List,
        sequence: None,
        harm: start.harm,
        signing: start.signing.clone(),
        rollout,
        commit: None,
    }
}

/// Publishes retained, and waits until the broker has it.
async fn keep(link: &mut Link, topic: &str, payload: Bytes) -> Result<(), SteerError> {
    let wanted = link.publish(topic, payload)?;
    loop {
        if let Signal::Acknowledged(number, result) = link.next().await?
            && number == wanted
        {
            return result
                .map(drop)
                .map_err(|refusal| SteerError::Refused { topic: topic.to_owned(), refusal });
        }
    }
}

/// How long a step that does not get to where it should is waited for, if nobody says: three times its wait.
#[must_use]
pub fn patience(wait: u64) -> u64 {
    wait.saturating_mul(limits::ROLLOUT_PATIENCE)
}
