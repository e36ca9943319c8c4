//! A release on a fleet of its own, before it goes to devices: a throw-away broker, simulated devices with faults, and
//! what was expected of them.
//!
//! Broker and fleet are the programs `mpypi-broker` and `mpypi-agent`, beside this one or on PATH: they meet as bytes on
//! topics here as anywhere.

use std::{
    env, io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use mpypi_client::{Endpoint, args::TrustArgs};
use mpypi_protocol::{
    BrokerUrl, ChannelName,
    node::{Phase, State},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    limits,
    plan::Trust,
    publish::{Harm, Mode, Observer, Options, PublishError, publish},
    signing::Signing,
    status::status,
};

/// What is rehearsed, and how.
#[derive(Debug, Clone)]
pub struct Rehearsal {
    /// The channel's folder.
    pub folder: PathBuf,
    /// The channel's name, before what the folder says.
    pub channel: Option<ChannelName>,
    /// The folder of what devices have installed; nothing if there is none.
    pub against: Option<PathBuf>,
    /// How many devices.
    pub nodes: u32,
    /// What befalls them: a name or a file, as `mpypi-agent fleet --profile` takes it.
    pub profile: String,
    /// Decides everything random.
    pub seed: u64,
    /// How long it takes at most; faults end after half of it.
    pub time: Duration,
    /// What is expected, as `mpypi-agent fleet --expect` takes it.
    pub expect: Vec<String>,
    /// More for `mpypi-agent fleet`: where reports go.
    pub more: Vec<String>,
}

/// A rehearsal was no success.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// A program is not there.
    #[error("cannot start `{name}`")]
    Program {
        /// Its name.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The throw-away broker does not listen.
    #[error("the throw-away broker did not start")]
    Broker,
    /// The folder for it cannot be made.
    #[error("cannot make a temporary folder")]
    Scratch(#[source] io::Error),
    /// The release cannot be published.
    #[error(transparent)]
    Publish(#[from] Box<PublishError>),
    /// The fleet did not come to what was expected.
    #[error("the release did not do what was expected: it should not go to devices as it is")]
    NotAsExpected,
    /// The fleet did not run.
    #[error("the fleet did not run: {status}")]
    Fleet {
        /// How it ended.
        status: ExitStatus,
    },
    /// The fleet cannot be waited for.
    #[error("cannot wait for the fleet")]
    Wait(#[source] io::Error),
}

impl RehearsalError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            RehearsalError::Program { name, .. } => Some(format!(
                "put `{name}` beside `mpypi` or on PATH: `cargo build --workspace` makes all programs"
            )),
            RehearsalError::Publish(error) => error.hint(),
            _ => None,
        }
    }
}

/// Rehearses a release. `observer` is told of what is published.
///
/// # Errors
/// See [`RehearsalError`]. Broker and fleet are stopped in any case.
pub async fn rehearse(rehearsal: &Rehearsal, observer: &mut impl Observer) -> Result<(), RehearsalError> {
    let scratch = tempfile::Builder::new().prefix("mpypi-rehearsal-").tempdir();
    let scratch = scratch.map_err(RehearsalError::Scratch)?;
    let (_broker, endpoint) = start_broker(scratch.path()).await?;
    let mut options = Options {
        brokers: endpoint.clone().into(),
        channel: rehearsal.channel.clone(),
        mode: Mode::DryRun,
        trust: Trust::List,
        sequence: None,
        harm: Harm::Refused,
        signing: Signing::Never,
        rollout: None,
        commit: None,
    };
    // Whatever is wrong with the release shows before anything is started.
    let planned = publish(&rehearsal.folder, &options, &mut ()).await.map_err(Box::new)?;
    options.channel = Some(planned.channel.clone());
    options.mode = Mode::Publish;
    let first = rehearsal.against.as_ref().unwrap_or(&rehearsal.folder);
    let first = publish(first, &options, observer).await.map_err(Box::new)?;
    let mut fleet = start_fleet(rehearsal, &endpoint, &planned.channel)?;
    if rehearsal.against.is_some() {
        tokio::select! {
            ended = fleet.wait() => return judge(ended.map_err(RehearsalError::Wait)?),
            () = installed(&endpoint, rehearsal, first.sequence) => {}
        }
        publish(&rehearsal.folder, &options, observer).await.map_err(Box::new)?;
    }
    judge(fleet.wait().await.map_err(RehearsalError::Wait)?)
}

fn judge(status: ExitStatus) -> Result<(), RehearsalError> {
    match status.code() {
        Some(0) => Ok(()),
        Some(3) => Err(RehearsalError::NotAsExpected),
        _ => Err(RehearsalError::Fleet { status }),
    }
}

/// Waits until all devices have the release of this number, or for a quarter of the rehearsal: some may never get there.
async fn installed(broker: &Endpoint, rehearsal: &Rehearsal, sequence: u64) {
    #[expect(clippy::disallowed_methods, reason = "this is a driver")]
    let until = Instant::now() + rehearsal.time / 4;
    let mut looks = interval(limits::REHEARSAL_LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        if looks.tick().await >= until {
            return;
        }
        let Ok(status) = status(&broker.clone().into(), &[]).await else { continue };
        let has = |state: &&State| state.phase == Phase::Idle && state.sequence == Some(sequence);
        let count = status.nodes.values().filter_map(|node| node.state.as_ref()).filter(has).count();
        if count >= rehearsal.nodes as usize {
            return;
        }
    }
}

async fn start_broker(scratch: &Path) -> Result<(Child, Endpoint), RehearsalError> {
    let name = "mpypi-broker";
    let log = scratch.join("broker.log");
    let log = std::fs::File::create(log).map_err(RehearsalError::Scratch)?;
    let mut broker = Command::new(program(name))
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(scratch.join("data"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| RehearsalError::Program { name, source })?;
    let out = broker.stdout.take().ok_or(RehearsalError::Broker)?;
    let mut lines = BufReader::new(out).lines();
    let line = match timeout(limits::BROKER_START, lines.next_line()).await {
        Ok(Ok(Some(line))) => line,
        _ => return Err(RehearsalError::Broker),
    };
    let url: Option<BrokerUrl> = line.strip_prefix("listening on ").and_then(|url| url.parse().ok());
    let endpoint = url.and_then(|url| Endpoint::new(url, &TrustArgs::default()).ok());
    endpoint.map(|endpoint| (broker, endpoint)).ok_or(RehearsalError::Broker)
}

fn start_fleet(
    rehearsal: &Rehearsal,
    broker: &Endpoint,
    channel: &ChannelName,
) -> Result<Child, RehearsalError> {
    let name = "mpypi-agent";
    let releases = if rehearsal.against.is_some() { "2" } else { "1" };
    let milliseconds = |time: Duration| format!("{}ms", time.as_millis());
    let mut fleet = Command::new(program(name));
    fleet.args(["fleet", "--broker", &broker.url().to_string(), "--channel", channel.as_str()]);
    fleet.args(["--nodes", &rehearsal.nodes.to_string(), "--profile", &rehearsal.profile]);
    fleet.args(["--seed", &rehearsal.seed.to_string(), "--releases", releases]);
    fleet.args(["--for", &milliseconds(rehearsal.time), "--faults-for", &milliseconds(rehearsal.time / 2)]);
    for expected in &rehearsal.expect {
        fleet.args(["--expect", expected]);
    }
    fleet.args(&rehearsal.more).stdin(Stdio::null()).kill_on_drop(true);
    fleet.spawn().map_err(|source| RehearsalError::Program { name, source })
}

/// One of our programs: beside this one, or as PATH finds it.
fn program(name: &str) -> PathBuf {
    let here = env::current_exe().ok().and_then(|program| Some(program.parent()?.join(name)));
    here.filter(|program| program.is_file()).unwrap_or_else(|| name.into())
}
