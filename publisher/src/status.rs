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
    compare::through_each,
    link::Link,
    retained::{self, AskError},
    settle::is_older,
};

/// Channels and nodes, each in the order of their names.
#[derive(Debug, Default)]
pub struct Status {
    /// The channels asked for, or all.
    pub channels: BTreeMap<ChannelName, ChannelStatus>,
    /// Nodes of these channels. Of all channels: all nodes, those that follow none among them.
    pub nodes: BTreeMap<NodeId, NodeStatus>,
    /// Who of several brokers differs from what is shown.
    pub behind: Vec<Behind>,
}

/// A broker that does not serve the newest list that another has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Behind {
    /// Which.
    pub broker: String,
    /// Of which channel; `None` if nothing can be read there.
    pub channel: Option<ChannelName>,
    /// What it serves, or why nothing can be read.
    pub why: String,
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

/// Asks the broker about `channels`, or about all of them if there are none. Of several brokers all are asked, and the newest
/// list that any of them has is shown.
///
/// # Errors
/// See [`AskError`]: nothing can be read at any of them.
pub async fn status(brokers: &Brokers, channels: &[ChannelName]) -> Result<Status, AskError> {
    let mut filters: Vec<String> = channels.iter().map(ChannelName::topic).collect();
    if channels.is_empty() {
        filters.push("mpypi/channels/+".to_owned());
    }
    filters.extend(["info", "state", "online"].map(|subject| format!("mpypi/nodes/+/{subject}")));
    let mut read = through_each(brokers, |one| {
        let filters = filters.clone();
        async move {
            let mut link = Link::connect(one.first()).await?;
            let messages = retained::all(&mut link, &filters).await?;
            link.close().await;
            Ok::<_, AskError>(messages)
        }
    })
    .await;
    if read.iter().all(|(_, read)| read.is_err())
        && let Err(error) = read.swap_remove(0).1
    {
        return Err(error);
    }
    let mut behind = Vec::new();
    let mut seen = Vec::new();
    for (broker, read) in read {
        match read {
            Ok(messages) => seen.push((broker, messages)),
            Err(error) => {
                let why = match &error {
                    AskError::Link(error) => error.reason(),
                    error => error.to_string(),
                };
                behind.push(Behind { broker, channel: None, why });
            }
        }
    }
    let (messages, others) = merge(seen);
    behind.extend(others);
    Ok(Status { behind, ..Status::of(channels, messages) })
}

/// What several brokers retain as if they were one: the newest list of each channel, and of all else what the first has
/// that has it. Also who serves another list.
fn merge(seen: Vec<(String, Vec<(String, Bytes)>)>) -> (Vec<(String, Bytes)>, Vec<Behind>) {
    let mut merged: BTreeMap<String, Bytes> = BTreeMap::new();
    for (topic, payload) in seen.iter().flat_map(|(_, messages)| messages) {
        let is_list = matches!(Topic::parse(topic), Ok(Topic::Channel(_)));
        match merged.get(topic) {
            Some(present) if !is_list || !is_older(Some(present), Some(payload)) => {}
            _ => _ = merged.insert(topic.clone(), payload.clone()),
        }
    }
    let mut behind = Vec::new();
    for (topic, newest) in &merged {
        let Ok(Topic::Channel(channel)) = Topic::parse(topic) else { continue };
        let at = |payload: &[u8]| {
            let list = UpdateList::parse(payload).ok();
            list.as_ref().and_then(UpdateList::release).map(|release| release.sequence)
        };
        for (broker, messages) in &seen {
            let own = messages.iter().find(|(other, _)| other == topic).map(|(_, payload)| payload);
            let why = match own.map(|own| (own, at(own))) {
                Some((own, _)) if own == newest => continue,
                None if **newest == *b"[]" => continue,
                Some((_, Some(sequence))) if Some(sequence) != at(newest) => {
                    format!("still serves release {sequence}")
                }
                Some((_, Some(sequence))) => format!("serves release {sequence} with other bytes"),
                Some((_, None)) | None => "serves no release".to_owned(),
            };
            behind.push(Behind { broker: broker.clone(), channel: Some(channel.clone()), why });
        }
    }
    (merged.into_iter().collect(), behind)
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
    fn of_several_brokers_the_newest_list_is_shown_and_who_differs_is_named() {
        let list = |sequence: u64, version: &str| {
            let text = format!(
                r#"[{{"type":"release","channel":"dev","sequence":{sequence},"version":"{version}"}}]"#
            );
            ("mpypi/channels/dev".to_owned(), Bytes::from(text))
        };
        let state = |text: &str| message("mpypi/nodes/a/state", text);
        let seen = vec![
            ("a".to_owned(), vec![list(1, "1"), state("first")]),
            ("b".to_owned(), vec![list(2, "1"), state("second"), message("mpypi/channels/new", "[]")]),
            ("c".to_owned(), vec![list(2, "2")]),
            ("d".to_owned(), vec![]),
        ];
        let (merged, behind) = merge(seen);
        assert_eq!(
            merged,
            [
                message("mpypi/channels/dev", std::str::from_utf8(&list(2, "1").1).unwrap()),
                message("mpypi/channels/new", "[]"),
                state("first")
            ]
        );
        let found: Vec<_> = behind.iter().map(|one| format!("{} {}", one.broker, one.why)).collect();
        let expected =
            ["a still serves release 1", "c serves release 2 with other bytes", "d serves no release"];
        assert_eq!(found, expected);
    }

    #[test]
    fn of_one_channel_only_its_nodes_are_shown() {
        let dev = [ChannelName::new("dev").unwrap(), ChannelName::new("new").unwrap()];
        let status = Status::of(&dev, messages());
        assert!(matches!(status.channels[&dev[1]], ChannelStatus::Nothing));
        assert_eq!(status.nodes.keys().map(NodeId::as_str).collect::<Vec<_>>(), ["a", "m"]);
    }
}
