//! What a device says about itself.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{
    ChannelName, limits,
    tag::{self, Runtime},
};

/// Where a node's update stands: the phases of the agent's state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// On the release it should have, or on none yet.
    Idle,
    /// Fetching the packages it lacks.
    Downloading,
    /// Checking and unpacking what was fetched.
    Verifying,
    /// Committed: files are being replaced.
    Installing,
    /// Starting the new release.
    Restarting,
    /// Waiting for the new release to prove itself.
    Confirming,
    /// The release was refused or could not be applied; the old one runs.
    Failed,
    /// The release was applied, did not prove itself, and was taken back.
    RolledBack,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Idle => "idle",
            Phase::Downloading => "downloading",
            Phase::Verifying => "verifying",
            Phase::Installing => "installing",
            Phase::Restarting => "restarting",
            Phase::Confirming => "confirming",
            Phase::Failed => "failed",
            Phase::RolledBack => "rolled back",
        })
    }
}

/// The retained payload of `mpypi/nodes/<node>/state`. `sequence` and `version` name the release that the
/// phase is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Where the update stands.
    pub phase: Phase,
    /// The release's sequence number; absent before the first release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// The release's version, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Package bytes received for this release.
    #[serde(default)]
    pub done: u64,
    /// Package bytes this release needs in all, beyond what the node had.
    #[serde(default)]
    pub total: u64,
    /// Why the phase is `failed` or `rolled_back`: a stable word, `: `, then details for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How often this release was tried, from 1.
    #[serde(default)]
    pub attempt: u32,
    /// The sequence of a newer list that the node accepted and does not apply, or not yet: its rollout says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<u64>,
    /// Keys of later versions, kept.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The payload of `mpypi/nodes/<node>/info`: Mpy-BLOX's object and what our agents add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// What `os.uname()` says.
    pub uname: Uname,
    /// Installed packages and their versions.
    #[serde(default)]
    pub versions: BTreeMap<String, String>,
    /// The channel the node follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<ChannelName>,
    /// The agent's name and version, as `mpypi-agent/0.1.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// Free space for packages, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<u64>,
    /// What the node is labelled with, for [queries](crate::query).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// How far its local time is ahead of UTC, in minutes: windows of rollouts are local times then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utc_offset: Option<i32>,
    /// Keys of later versions (`runtime`, `mpy`, `firmware` among them), kept.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Part of [`Info`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uname {
    /// The platform, as `esp32` or `linux`.
    pub sysname: String,
    /// The board.
    pub machine: String,
    /// The version of the interpreter or system.
    pub version: String,
}

/// A node's message cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Larger than [`limits::NODE_MESSAGE`].
    #[error("a message of {size} bytes is larger than {}", limits::NODE_MESSAGE)]
    TooLarge {
        /// Its size in bytes.
        size: usize,
    },
    /// Not the JSON object expected; says where.
    #[error("not a node message")]
    Json(#[from] serde_json::Error),
}

impl State {
    /// Reads a state message.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub fn parse(payload: &[u8]) -> Result<State, NodeError> {
        parse(payload)
    }

    /// The state as the payload of a message.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }
}

impl Info {
    /// Reads an info message.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub fn parse(payload: &[u8]) -> Result<Info, NodeError> {
        parse(payload)
    }

    /// The info as the payload of a message.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }

    /// What the node runs, as far as wheels are concerned: its `mpy` is `sys.implementation._mpy`.
    #[must_use]
    pub fn runtime(&self) -> Runtime {
        let mpy = self.extra.get("mpy").and_then(Value::as_u64).and_then(|number| number.try_into().ok());
        Runtime { mpy, platform: tag::platform(&self.uname.sysname) }
    }

    /// Whether the node runs Mpy-BLOX: it says what it is and has, but not which agent it runs, as all of ours do.
    #[must_use]
    pub fn is_mpyblox(&self) -> bool {
        self.agent.is_none()
    }
}

fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T, NodeError> {
    if payload.len() > limits::NODE_MESSAGE {
        return Err(NodeError::TooLarge { size: payload.len() });
    }
    Ok(serde_json::from_slice(payload)?)
}

fn to_bytes<T: Serialize>(message: &T) -> Vec<u8> {
    serde_json::to_vec(message).expect("text keys and plain values always make JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_names_no_agent_is_mpyblox() {
        let uname = r#""uname":{"sysname":"esp32","machine":"ESP32 module","version":"v1.22.0"}"#;
        let info = |rest: &str| Info::parse(format!("{{{uname},{rest}}}").as_bytes());
        assert!(info(r#""versions":{"mpy-blox":"0.6.0"}"#).unwrap().is_mpyblox());
        assert!(!info(r#""versions":{},"agent":"mpypi/0.1.0""#).unwrap().is_mpyblox());
        assert!(info(r#""versions":[]"#).is_err() && Info::parse(br#"{"versions":{}}"#).is_err());
    }
}
