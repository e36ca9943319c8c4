//! What channels retain, and where their nodes stand.

use std::collections::BTreeMap;

use bytes::Bytes;
use mpypi_client::Brokers;
use mpypi_protocol::{
    ChannelName, NodeId, Topic, UpdateList,
    node::{Info, State},
    record::Heard,
    topic::NodeSubject,
};

use crate::{
    link::Link,
    retained::{self, AskError},
};

/// Channels and nodes, each in the order of their names.
#[derive(Debug, Default)]
pub struct Status {
    /// The channels asked for, or all.
    pub channels: BTreeMap<ChannelName, ChannelStatus>,
    /// Nodes of these channels. Of all channels: all nodes, those that follow none among them.
    pub nodes: BTreeMap<NodeId, NodeStatus>,
}

/// What a channel retains.
#[derive(Debug)]
pub enum ChannelStatus {
    /// Nothing, or `[]`: nothing was published.
    Nothing,
    /// An update list.
    List(UpdateList),
    /// Something else, and why it is no list.
    Invalid(String),
}

/// What a node said about itself. What it did not say, or said in a way nobody can read, is `None`.
#[derive(Debug, Default)]
pub struct NodeStatus {
    /// What it is and has.
    pub info: Option<Info>,
    /// Where its update stands.
    pub state: Option<State>,
    /// Whether it is connected.
    pub online: Option<bool>,
}

/// Asks the broker about `channels`, or about all of them if there are none.
///
/// # Errors
/// See [`AskError`].
pub async fn status(brokers: &Brokers, channels: &[ChannelName]) -> Result<Status, AskError> {
    let mut link = Link::connect_any(brokers).await?;
    let mut filters: Vec<String> = channels.iter().map(ChannelName::topic).collect();
    if channels.is_empty() {
        filters.push("mpypi/channels/+".to_owned());
    }
    filters.extend(["info", "state", "online"].map(|subject| format!("mpypi/nodes/+/{subject}")));
    let messages = retained::all(&mut link, &filters).await?;
    link.close().await;
    Ok(Status::of(channels, messages))
}

impl Status {
    fn of(channels: &[ChannelName], messages: Vec<(String, Bytes)>) -> Status {
        let mut status = Status::default();
        for channel in channels {
            status.channels.insert(channel.clone(), ChannelStatus::Nothing);
        }
        for (topic, payload) in messages {
            match Topic::parse(&topic) {
                Ok(Topic::Channel(channel)) => {
                    drop(status.channels.insert(channel, channel_status(&payload)))
                }
                Ok(Topic::Node(id, subject)) => {
                    let node = status.nodes.entry(id).or_default();
                    match subject {
                        NodeSubject::Info => node.info = Info::parse(&payload).ok(),
                        NodeSubject::State => node.state = State::parse(&payload).ok(),
                        NodeSubject::Online => node.online = Some(&*payload == b"1"),
                        NodeSubject::Cmd | NodeSubject::Log | NodeSubject::Challenge | NodeSubject::Time => {}
                    }
                }
                _ => {}
            }
        }
        if !channels.is_empty() {
            status.nodes.retain(|_, node| node.channel().is_some_and(|name| channels.contains(&name)));
        }
        status
    }
}

fn channel_status(payload: &[u8]) -> ChannelStatus {
    match UpdateList::parse(payload) {
        Ok(list) if list.entries().is_empty() => ChannelStatus::Nothing,
        Ok(list) => ChannelStatus::List(list),
        Err(error) => ChannelStatus::Invalid(error.to_string()),
    }
}

impl NodeStatus {
    /// The channel the node follows, as far as it says; of one that runs Mpy-BLOX the broker says it.
    #[must_use]
    pub fn channel(&self) -> Option<ChannelName> {
        self.heard().channel()
    }

    /// What was heard of it.
    #[must_use]
    pub fn heard(&self) -> Heard<'_> {
        Heard { info: self.info.as_ref(), state: self.state.as_ref(), online: self.online }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(topic: &str, payload: &str) -> (String, Bytes) {
        (topic.to_owned(), Bytes::copy_from_slice(payload.as_bytes()))
    }

    fn messages() -> Vec<(String, Bytes)> {
        vec![
            message(
                "mpypi/channels/dev",
                r#"[{"type":"release","channel":"dev","sequence":3,"version":"1.4"}]"#,
            ),
            message("mpypi/channels/odd", "{}"),
            message(
                "mpypi/nodes/a/info",
                r#"{"uname":{"sysname":"","machine":"","version":""},"channel":"dev"}"#,
            ),
            message("mpypi/nodes/a/state", r#"{"phase":"idle","sequence":3}"#),
            message("mpypi/nodes/a/online", "1"),
            message("mpypi/nodes/m/info", r#"{"uname":{"sysname":"","machine":"","version":""}}"#),
            message("mpypi/nodes/m/state", r#"{"phase":"failed","by":"broker","channel":"dev"}"#),
            message("mpypi/nodes/b/state", "not JSON"),
            message("mpypi/nodes/b/online", "0"),
        ]
    }

    #[test]
    fn of_all_channels_every_node_is_shown_whatever_it_says() {
        let status = Status::of(&[], messages());
        assert_eq!(status.channels.len(), 2);
        assert!(matches!(status.channels[&ChannelName::new("odd").unwrap()], ChannelStatus::Invalid(_)));
        let node = |name| &status.nodes[&NodeId::new(name).unwrap()];
        assert_eq!(node("a").state.as_ref().and_then(|state| state.sequence), Some(3));
        assert_eq!((node("b").online, node("b").state.is_some()), (Some(false), false));
    }

    #[test]
    fn of_one_channel_only_its_nodes_are_shown() {
        let dev = [ChannelName::new("dev").unwrap(), ChannelName::new("new").unwrap()];
        let status = Status::of(&dev, messages());
        assert!(matches!(status.channels[&dev[1]], ChannelStatus::Nothing));
        assert_eq!(status.nodes.keys().map(NodeId::as_str).collect::<Vec<_>>(), ["a", "m"]);
    }
}
