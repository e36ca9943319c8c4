//! A broker that takes its channels from another one, its **upstream**, and serves them to its site: also while
//! nobody answers there.
//!
//! | module | holds |
//! |---|---|
//! | [`mirror`] | policy: what to fetch of what the upstream retains, and when to keep it |
//! | [`relay`] | policy: what of the site's nodes goes up, and what comes down for them |
//! | [`memory`] | what of both outlives the process: `edge.json` |
//! | [`line`](mod@line) | one connection to the upstream, and what it says |
//! | [`fetch`], [`carry`] | the drivers of the two policies, each with a connection of its own |
//! | [`view`] | how it goes, for `/healthz` and `/metrics` |
//!
//! Two connections, so that a package that comes slowly holds up no order and no state. Both speak MQTT 3.1.1, which
//! every cluster does; packages are asked for by exact topic at QoS 0, a few at a time, and again if they do not come.
//!
//! Invariants: the index is the queue, in both directions, so nothing waits in memory that cannot be read again; a list is
//! kept after everything it names; a lower number is never taken; no channel is ever written upstream, but by a
//! [gateway](Part::Gateway) for whom somebody asked over HTTP.
//!
//! What an upstream's rollout consists of beside its list, its record, its lease and its orders, stays there: devices
//! decide by the list, and operators work where the channel is.

pub mod carry;
pub mod fetch;
pub mod line;
pub mod memory;
pub mod mirror;
pub mod relay;
pub mod view;

use std::{num::NonZeroU64, sync::Arc, time::Duration};

use bytes::Bytes;
use mpypi_client::{Endpoint, Meter};
use mpypi_protocol::{ChannelName, NodeId, Root, Topic, rollout::Window};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::{
    access::Channels,
    connection::Shared,
    edge::{memory::Memory, view::View},
    message::Refusal,
    packet::Reason,
};

/// What a gateway's callers ask of the upstream that may wait for it at once.
const ASKS: usize = 64;

/// Where the upstream is and what is taken from it.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its addresses: one is kept to while it answers.
    pub endpoints: Vec<Endpoint>,
    /// Which channels.
    pub channels: Channels,
    /// Whose signatures count, if not those of whoever can write upstream.
    pub pin: Option<Root>,
    /// Bytes per second that are taken, if not all that come.
    pub bandwidth: Option<NonZeroU64>,
    /// The time of day at which packages are fetched.
    pub window: Option<Hours>,
    /// What this broker is called there; a name of its own, made once, unless given.
    pub name: Option<NodeId>,
    /// What it is to those it serves.
    pub part: Part,
}

/// A time of day, somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hours {
    /// From when to when.
    pub window: Window,
    /// How far local time is ahead of UTC, in minutes.
    pub utc_offset: i32,
}

/// What a broker with an upstream is to those it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The broker of a site, with nodes of its own.
    Edge,
    /// HTTP to a cluster: without nodes of its own, and one of several that show the same.
    Gateway,
}

/// The upstream, as the rest of the broker knows it.
#[derive(Debug)]
pub struct Edge {
    config: Config,
    /// What this broker is called there.
    name: NodeId,
    memory: Memory,
    /// What came from there.
    meter: Arc<Meter>,
    view: View,
    publishes: mpsc::Sender<Upload>,
    reads: mpsc::Sender<Read>,
    /// Told when this broker turns out to be its own upstream.
    looped: Notify,
}

/// The other ends of what an [`Edge`] is asked.
#[derive(Debug)]
pub struct Desk {
    publishes: mpsc::Receiver<Upload>,
    reads: mpsc::Receiver<Read>,
}

/// A message that is to be retained upstream.
#[derive(Debug)]
struct Upload {
    topic: String,
    payload: Bytes,
    retain: bool,
    /// Told when the upstream has acknowledged it.
    reply: oneshot::Sender<()>,
}

/// A question what the upstream retains on a topic.
#[derive(Debug)]
struct Read {
    topic: String,
    reply: oneshot::Sender<Bytes>,
}

impl Edge {
    /// Looks up what is remembered of an upstream in `folder`.
    ///
    /// # Errors
    /// It cannot be read, or not be written.
    pub fn open(config: Config, folder: &std::path::Path) -> std::io::Result<(Arc<Edge>, Desk)> {
        let memory = Memory::open(folder)?;
        let name = config.name.clone().unwrap_or_else(|| memory.name());
        let (publishes, uploads) = mpsc::channel(ASKS);
        let (reads, asked) = mpsc::channel(ASKS);
        let edge = Edge {
            config,
            name,
            memory,
            meter: Arc::default(),
            view: View::default(),
            publishes,
            reads,
            looped: Notify::new(),
        };
        Ok((Arc::new(edge), Desk { publishes: uploads, reads: asked }))
    }

    /// How it goes.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// What came from upstream, in bytes.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.meter.read().received
    }

    /// What this broker is to those it serves.
    #[must_use]
    pub fn part(&self) -> Part {
        self.config.part
    }

    /// Where the upstream is.
    #[must_use]
    pub fn upstream(&self) -> String {
        let urls: Vec<_> = self.config.endpoints.iter().map(|endpoint| endpoint.url().to_string()).collect();
        urls.join(", ")
    }

    /// What the index leaves to the upstream.
    #[must_use]
    pub fn owned(&self) -> Owned {
        Owned { channels: self.config.channels.clone(), upstream: self.upstream() }
    }

    /// The version of the index up to which the upstream, for good, has been told what was cleared of nodes; `None` for a
    /// gateway, which has none.
    #[must_use]
    pub fn told(&self) -> Option<u64> {
        (self.config.part == Part::Edge).then(|| self.memory.saved())
    }

    /// Does all of it, until dropped.
    pub async fn run(self: Arc<Edge>, shared: Arc<Shared>, desk: Desk) {
        let Desk { publishes, reads } = desk;
        tokio::join!(fetch::run(&self, &shared, reads), carry::run(&self, &shared, publishes));
    }

    /// Publishes a message upstream, and waits until it is acknowledged.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn publish(&self, topic: String, payload: Bytes, retain: bool) -> Result<(), Refusal> {
        let (reply, done) = oneshot::channel();
        let ask = async {
            self.publishes.send(Upload { topic, payload, retain, reply }).await.ok()?;
            done.await.ok()
        };
        self.answered(ask).await
    }

    /// What the upstream retains on a topic on which it retains something.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn read(&self, topic: String) -> Result<Bytes, Refusal> {
        let (reply, done) = oneshot::channel();
        let ask = async {
            self.reads.send(Read { topic, reply }).await.ok()?;
            done.await.ok()
        };
        self.answered(ask).await
    }

    async fn answered<T>(&self, ask: impl Future<Output = Option<T>>) -> Result<T, Refusal> {
        /// For an answer that somebody over HTTP waits for.
        const PATIENCE: Duration = Duration::from_secs(20);
        let silent = || {
            let text = format!(
                "{} does not answer: try again later; if it is that it takes no message of this size, `mpypi publish` sends \
                 it in chunks",
                self.upstream()
            );
            // Over HTTP, a 503.
            Refusal::new(Reason::ServerShuttingDown, text)
        };
        tokio::time::timeout(PATIENCE, ask).await.ok().flatten().ok_or_else(silent)
    }
}

/// What only the upstream may change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owned {
    channels: Channels,
    upstream: String,
}

impl Owned {
    /// Why nobody else may publish to `topic`, if it is owned.
    #[must_use]
    pub fn refusal(&self, topic: &str) -> Option<Refusal> {
        let what = match Topic::parse(topic) {
            Ok(Topic::Channel(channel) | Topic::History(channel, _) | Topic::Rollout(channel, _))
                if includes(&self.channels, &channel) =>
            {
                format!("channel `{channel}` comes")
            }
            Ok(Topic::Root(_)) => "roots of trust come".to_owned(),
            _ => return None,
        };
        let text = format!("{what} from {}: publish there", self.upstream);
        Some(Refusal::new(Reason::NotAuthorized, text))
    }
}

/// Whether `channel` is one of `channels`.
fn includes(channels: &Channels, channel: &ChannelName) -> bool {
    match channels {
        Channels::All => true,
        Channels::Only(names) => names.contains(channel),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_mirrored_is_the_upstreams() {
        let only = Channels::Only(vec![ChannelName::new("dev").unwrap()]);
        let owned = |channels| Owned { channels, upstream: "mqtt://hub:1883".to_owned() };
        for (topic, chosen, all) in [
            ("mpypi/channels/dev", true, true),
            ("mpypi/channels/dev/history/3", true, true),
            ("mpypi/channels/dev/rollout", true, true),
            ("mpypi/channels/dev/rollout/order", true, true),
            ("mpypi/channels/local", false, true),
            ("mpypi/keys/root/1", true, true),
            ("mpypi/nodes/kitchen/cmd", false, false),
            ("home/light", false, false),
        ] {
            assert_eq!(owned(only.clone()).refusal(topic).is_some(), chosen, "{topic}");
            assert_eq!(owned(Channels::All).refusal(topic).is_some(), all, "{topic}");
        }
        let refusal = owned(only).refusal("mpypi/channels/dev").unwrap();
        assert_eq!(refusal.text, "channel `dev` comes from mqtt://hub:1883: publish there");
    }
}
