//! How commands reach a broker's index, whether it runs or not.
//!
//! A running broker listens on a Unix socket in its data folder, for its owner alone. What is asked and
//! answered is JSON, a line each. Without a running broker, a command opens the index itself and asks the
//! same questions of it, through the same code, over a pair of sockets: see [`Link`].
//!
//! Only the index is asked of the broker. Files are the commands' business: a broker shut into its folder need
//! not reach where a backup goes.

mod link;
mod server;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use self::{
    link::{Link, LinkError, Missing, Upload},
    server::{Asked, Socket, collect, serve},
};
use crate::{
    index::{
        Index,
        check::{Checked, Problem},
        collect::Garbage,
        snapshot::Kept,
        writer::Op,
    },
    limits::Limits,
    packet::Properties,
};

/// The socket, in the data folder.
pub const SOCKET: &str = "control.sock";

/// What may be asked. A connection carries one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// All retained messages at one moment. Blobs stay until the connection is closed.
    Snapshot {
        /// Whether to tell small payloads too.
        payloads: bool,
    },
    /// Retain the messages that follow: a [`Put`] and its payload each, until the asker sends no more.
    Put,
    /// Remove packages that no list has named for long.
    Gc {
        /// Only say what would go.
        dry_run: bool,
        /// How many lists of each channel count; the broker's setting if not said.
        keep: Option<usize>,
        /// For how many seconds what is seen stays; the broker's setting if not said.
        grace: Option<u64>,
    },
    /// Look whether the index is in order.
    Check {
        /// Read every blob.
        deep: bool,
    },
}

/// A message to retain; `size` bytes of payload follow its line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Put {
    /// Its topic.
    pub topic: String,
    /// Its QoS.
    pub qos: u8,
    /// Its properties; the expiry is what is left of it.
    pub properties: Properties,
    /// Bytes of its payload.
    pub size: u64,
    /// The version that its topic has; 0 for an empty topic. If it is another by then, the message is refused.
    pub expected: u64,
}

/// What is answered: any number of lines, the last of them [`Answer::Done`] or [`Answer::Failed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "lowercase")]
pub enum Answer {
    /// A retained message.
    Kept(Kept),
    /// What became of the message put as the `number`th.
    Put {
        /// Counted from 0.
        number: u64,
        /// Why it was refused.
        refused: Option<String>,
    },
    /// A package that goes, or would.
    Garbage(Garbage),
    /// Something is not in order.
    Problem(Problem),
    /// How far a check is.
    Checked(Checked),
    /// Everything is done.
    Done(Done),
    /// It cannot be done.
    Failed {
        /// Why not.
        error: String,
    },
}

/// What was done in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Messages told, put, removed or looked at.
    pub messages: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

/// What requests are served from.
#[derive(Debug, Clone)]
pub struct Engine {
    /// The index.
    pub index: Index,
    /// Its writer.
    pub ops: mpsc::Sender<Op>,
    /// The limits.
    pub limits: Arc<Limits>,
    /// Ends everything.
    pub shutdown: CancellationToken,
}
