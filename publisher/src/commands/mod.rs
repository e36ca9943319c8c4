//! The subcommands, one file each.

pub(crate) mod clock;
pub(crate) mod doctor;
pub(crate) mod install;
pub(crate) mod keys;
pub(crate) mod log;
pub(crate) mod publish;
pub(crate) mod push;
pub(crate) mod rehearse;
pub(crate) mod reissue;
pub(crate) mod rollout;
pub(crate) mod status;
pub(crate) mod verify;
pub(crate) mod watch;

use std::io::{self, Write, stderr};

use mpypi_client::{BrokerArgs, Brokers, Endpoint};

use crate::{
    cli::PlaceArgs,
    report::{count, painted, say, wants_color},
};

/// SIGINT or SIGTERM came before the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stopped {
    /// Before the list was sent.
    #[error("stopped: the old release stands")]
    BeforeTheList,
    /// After it was sent, before it was read back.
    #[error("stopped while the list was on its way: either the old or the new release stands")]
    DuringTheList,
    /// While a device was waited for.
    #[error("stopped: the device may still get the order and install the wheel")]
    Waiting,
    /// While a rollout was steered.
    #[error("stopped: the rollout stands where it was, and nobody steers it")]
    Steering,
    /// Where nothing is written.
    #[error("stopped")]
    Reading,
}

impl Stopped {
    /// What to do about it.
    pub(crate) fn hint(self) -> Option<String> {
        match self {
            Stopped::BeforeTheList | Stopped::DuringTheList => {
                Some("run again to complete it: what the broker has is not sent again".to_owned())
            }
            Stopped::Steering => Some("run it again, here or elsewhere, to go on from there".to_owned()),
            Stopped::Waiting | Stopped::Reading => None,
        }
    }
}

/// The brokers of the command line. Says what people should know about the way there.
fn brokers(args: BrokerArgs) -> anyhow::Result<Brokers> {
    let brokers = args.brokers()?;
    for warning in brokers.iter().flat_map(Endpoint::warnings) {
        say(&format!("{} {warning}", painted("warning:", "33;1", wants_color(&stderr()))));
    }
    Ok(brokers)
}

/// The brokers that are to agree on what is published.
fn places(args: PlaceArgs) -> anyhow::Result<Brokers> {
    let brokers = brokers(args.broker)?;
    if args.may_be_down >= brokers.count() {
        anyhow::bail!(
            "`--may-be-down {}` leaves nobody of {}",
            args.may_be_down,
            count(brokers.count(), "broker")
        );
    }
    let brokers = brokers.with_down(args.may_be_down).within(args.agree_within);
    Ok(match args.max_packet {
        Some(packet) => brokers.taking(packet),
        None => brokers,
    })
}

/// Writes to stdout. A reader that went away (`mpypi status | head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Does what reads and writes nothing, until it is done or somebody stops it.
async fn reading<T, E>(work: impl Future<Output = Result<T, E>>) -> anyhow::Result<T>
where
    anyhow::Error: From<E>,
{
    tokio::select! {
        done = work => Ok(done?),
        stop = interrupted() => {
            stop?;
            Err(Stopped::Reading.into())
        }
    }
}

/// Returns at SIGINT or SIGTERM.
async fn interrupted() -> io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result,
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
