//! Whether a broker is fit to be the index, found out by trying it.
//!
//! | module | does |
//! |---|---|
//! | [`probes`] | tries it over real connections, and clears up: what was seen |
//! | [`judge`] | what that means: verdicts. No I/O, no clock |
//! | [`engines`] | which broker it is, and what is known of such. No I/O |
//!
//! Everything is tried below a name of its own, where packages are, since packages are what has to work; but for what happens
//! where a user may not write: that is tried at a node of that name, and at a topic that is none of ours. No channel, root or
//! node of anybody's is touched.

pub mod engines;
pub mod judge;
pub mod probes;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::link::Mqtt;

pub use engines::{Engine, Recognised};
pub use judge::{Row, Verdict};
pub use probes::{Doctor, Options};

/// What was seen of the brokers; the judges' only input.
#[derive(Debug, Clone, Serialize)]
pub struct Observations {
    /// Each address, in the order in which they were named.
    pub addresses: Vec<Address>,
    /// The number of the address at which all was tried that is not about several: the first that let us in.
    pub examined: usize,
    /// What it said of itself when it let us in, in MQTT 5.
    pub greeting: Option<Greeting>,
    /// What it says below `$SYS`.
    pub sys: BTreeMap<String, String>,
    /// A small message of every byte there is, asked for by its topic.
    pub plain: Fate,
    /// One whose topic has a dot.
    pub dots: Fate,
    /// One whose topic has a space.
    pub spaces: Fate,
    /// Several, asked for by one wildcard.
    pub wildcard: Wildcard,
    /// A message for who listens, at QoS 1.
    pub live: Live,
    /// Ever larger messages.
    pub largest: Largest,
    /// Messages with an end; only MQTT 5 has such.
    pub expiry: Option<Expiry>,
    /// A message that was cleared.
    pub cleared: Cleared,
    /// What becomes of a message where this user may not write, in each version of MQTT.
    pub denied: Vec<(Mqtt, Denied)>,
    /// Of several addresses, which shows what was published at which.
    pub agreement: Option<Agreement>,
    /// By how many seconds the broker's clock is ahead of ours, if it says.
    pub clock: Option<i64>,
}

/// One address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Address {
    /// Its URL, without the password.
    pub url: String,
    /// Why it lets nobody in who speaks 3.1.1, if so.
    pub four: Option<String>,
    /// The same for MQTT 5.
    pub five: Option<String>,
}

impl Address {
    /// Whether it let us in.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.four.is_none() || self.five.is_none()
    }

    /// The version of MQTT to speak there.
    #[must_use]
    pub fn best(&self) -> Mqtt {
        if self.five.is_none() { Mqtt::Five } else { Mqtt::Four }
    }
}

/// What CONNACK says (MQTT 5, 3.2.2.3); what it leaves out is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Greeting {
    /// Largest packet that it takes, in bytes.
    pub maximum_packet_size: Option<u32>,
    /// Highest QoS, if not 2.
    pub maximum_qos: Option<u8>,
    /// Whether it retains.
    pub retain_available: Option<bool>,
    /// The keep-alive that it wants, in seconds.
    pub server_keep_alive: Option<u16>,
    /// Most topic aliases.
    pub topic_alias_maximum: Option<u16>,
    /// Most messages without an acknowledgement.
    pub receive_maximum: Option<u16>,
    /// Whether filters may have wildcards.
    pub wildcard_subscription_available: Option<bool>,
    /// Whether there are shared subscriptions.
    pub shared_subscription_available: Option<bool>,
    /// The client id that it gives to who has none.
    pub assigned_client_id: Option<String>,
    /// What else it says.
    pub user_properties: Vec<(String, String)>,
}

/// What became of a message that was to be retained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "fate", rename_all = "kebab-case")]
pub enum Fate {
    /// It is there, to the byte, under its topic.
    Kept,
    /// It was acknowledged and is not there.
    Dropped,
    /// It is there with other bytes.
    Garbled,
    /// It is there under another topic.
    Renamed {
        /// Which.
        topic: String,
    },
    /// It was acknowledged as refused.
    Refused {
        /// Why.
        reason: String,
    },
    /// The connection ended.
    Closed {
        /// How.
        reason: String,
    },
    /// It was acknowledged; whether it is there cannot be asked.
    Unreadable,
    /// There was no answer in time.
    Silent,
    /// It was not tried, since messages are not kept at all.
    Untried,
}

/// Several messages, asked for by one wildcard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Wildcard {
    /// How many are there.
    pub there: usize,
    /// How many came.
    pub came: usize,
    /// Whether the filter was accepted.
    pub accepted: bool,
}

/// A message for who listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "live", rename_all = "kebab-case")]
pub enum Live {
    /// It came.
    Came {
        /// At this QoS; it was published, and asked for, at 1.
        qos: u8,
    },
    /// It did not.
    Missing {
        /// Why, if that is known.
        reason: Option<String>,
    },
    /// It was not tried.
    Untried,
}

/// Ever larger messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Largest {
    /// The largest that was kept, in bytes.
    pub kept: u64,
    /// The largest that was to be tried, in bytes.
    pub limit: u64,
    /// The smallest that was not kept, in bytes, and what became of it.
    pub lost: Option<(u64, Fate)>,
}

/// Messages with an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Expiry {
    /// For how many seconds the one was to be kept that is there.
    pub asked: u32,
    /// For how many it still will be, some seconds later: `None` if it does not say.
    pub left: Option<u32>,
    /// Whether it is there at all.
    pub kept: bool,
    /// Whether the other is gone, whose time is over.
    pub gone: bool,
}

/// A message that was cleared by an empty one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "cleared", rename_all = "kebab-case")]
pub enum Cleared {
    /// It is gone.
    Gone,
    /// It is there.
    Still,
    /// The broker did not take the empty message.
    Refused {
        /// Why.
        reason: String,
    },
    /// It was not tried.
    Untried,
}

/// What becomes of a message where this user may not write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "denied", rename_all = "kebab-case")]
pub enum Denied {
    /// It is refused, with a reason.
    Refused {
        /// Which.
        reason: String,
    },
    /// The connection is closed.
    Closed {
        /// How.
        reason: String,
    },
    /// It is acknowledged, and does not come back.
    Dropped,
    /// This user may write wherever it was tried.
    Nowhere,
    /// It is acknowledged; whether it is there cannot be asked.
    Unknown,
}

/// Of several addresses, which shows what was published at which.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Agreement {
    /// How long it was waited for, in milliseconds.
    pub within: u64,
    /// What became of the message published at each address, by the number of the address.
    pub published: BTreeMap<usize, Fate>,
    /// After how many milliseconds the address of the first number showed what was published at that of the second; `None`:
    /// not in time.
    #[serde(serialize_with = "as_list")]
    pub seen: BTreeMap<(usize, usize), Option<u64>>,
}

fn as_list<S: serde::Serializer>(
    seen: &BTreeMap<(usize, usize), Option<u64>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Sight {
        at: usize,
        of: usize,
        after_ms: Option<u64>,
    }
    serializer.collect_seq(seen.iter().map(|((at, of), after)| Sight { at: *at, of: *of, after_ms: *after }))
}
