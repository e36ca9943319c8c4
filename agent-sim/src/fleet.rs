//! Many nodes in one process: each the same agent code, with its own connection and its own directory.

pub mod profile;
mod tally;
mod view;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mpypi_client::Endpoint;
use mpypi_protocol::{ChannelName, NodeId};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use tally::{NodeResult, Outcome, Record, Summary, Tally};
pub use view::{Bars, Lines, View};

use crate::{
    device::Hardware,
    flash::Disk,
    node::{self, Clock, Happening, NodeOptions},
    store::BootError,
    update::Timing,
    weather::Weather,
};

/// A fleet.
#[derive(Debug, Clone)]
pub struct FleetOptions {
    /// The broker.
    pub broker: Endpoint,
    /// The channel all of it follows.
    pub channel: ChannelName,
    /// Its nodes.
    pub members: Vec<Member>,
    /// The times its nodes go by.
    pub timing: Timing,
    /// Decides the lengths of their pauses.
    pub seed: u64,
    /// End when every node finished so many releases.
    pub releases: Option<usize>,
    /// End after this time.
    pub time: Option<Duration>,
}

/// One node of a fleet.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its name.
    pub node: NodeId,
    /// Its root directory.
    pub root: PathBuf,
    /// What it is.
    pub hardware: Hardware,
}

/// A fleet cannot run.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// A node's root cannot be used.
    #[error("cannot open the directory `{}`", path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A node does not start.
    #[error("node `{node}` does not start")]
    Boot {
        /// Which.
        node: NodeId,
        /// Its root.
        path: PathBuf,
        /// Why.
        source: BootError,
    },
    /// A node's task ended without an answer.
    #[error("node `{node}` died")]
    Died {
        /// Which.
        node: NodeId,
    },
}

/// Runs a fleet until `stop` is cancelled, or as long as its options say. Returns when every node has
/// stopped.
///
/// # Errors
/// See [`FleetError`].
pub async fn run(
    options: FleetOptions,
    view: Box<dyn View>,
    stop: CancellationToken,
) -> Result<Summary, FleetError> {
    let clock = Clock::start();
    let stop = stop.child_token();
    let names = options.members.iter().map(|member| member.node.clone()).collect();
    // Held for the few instructions it takes to note what a node did; never across an `.await`.
    let board = Arc::new(Mutex::new(Board { tally: Tally::new(names, options.releases), view }));
    let mut tasks = JoinSet::new();
    for (index, member) in options.members.iter().cloned().enumerate() {
        let Member { node, root: path, hardware } = member;
        let disk = Disk::open(&path).map_err(|source| FleetError::Root { path: path.clone(), source })?;
        let node_options = NodeOptions {
            broker: options.broker.clone(),
            node: node.clone(),
            channel: options.channel.clone(),
            hardware,
            timing: options.timing.clone(),
            // Each its own, and all from one.
            seed: options.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(index as u64),
        };
        let (board, done, stop) = (board.clone(), stop.clone(), stop.clone());
        let observe = move |happening| {
            let mut board = board.lock().unwrap_or_else(PoisonError::into_inner);
            if board.note(clock.now(), index, &happening) {
                done.cancel();
            }
        };
        tasks.spawn(async move {
            let mut weather = Weather::calm();
            let ended = node::run(&node_options, disk, clock, &mut weather, observe, &stop).await;
            ended.map(drop).map_err(|source| FleetError::Boot { node, path, source })
        });
    }
    let limit = async {
        match options.time {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(limit);
    let mut failure = None;
    loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                None => break,
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => {
                    failure.get_or_insert(error);
                    stop.cancel();
                }
                Some(Err(_)) => {
                    let node = options.members[0].node.clone();
                    failure.get_or_insert(FleetError::Died { node });
                    stop.cancel();
                }
            },
            () = &mut limit, if !stop.is_cancelled() => stop.cancel(),
        }
    }
    let mut board = board.lock().unwrap_or_else(PoisonError::into_inner);
    board.view.end();
    match failure {
        Some(error) => Err(error),
        None => {
            // Whoever waits a certain time expects to see something; whoever presses Ctrl-C may not.
            let releases = options.releases.unwrap_or(usize::from(options.time.is_some()));
            Ok(board.tally.summary(clock.now(), releases))
        }
    }
}

struct Board {
    tally: Tally,
    view: Box<dyn View>,
}

impl Board {
    /// Notes what happened; whether that was the last thing waited for.
    fn note(&mut self, now: Duration, index: usize, happening: &Happening) -> bool {
        let Board { tally, view } = self;
        match happening {
            Happening::Report(report) => {
                tally.report(now, index, report);
                view.report(tally.node(index), index, report);
                return tally.is_complete();
            }
            Happening::Log(line) => view.log(tally.node(index), line),
            Happening::Connected => tally.connected(),
            Happening::Lost { trouble, again_in } => {
                // One line for an outage, not one for each node and attempt.
                if tally.lost(trouble) {
                    let line = format!("{}; trying again in {:.1} s", trouble.error, again_in.as_secs_f64());
                    view.log(tally.node(index), &line);
                }
            }
        }
        false
    }
}
