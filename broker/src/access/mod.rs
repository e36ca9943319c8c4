//! Who may do what. Policy only: a client shows who it is once, and is asked about for every packet.
//!
//! | role | reads | writes |
//! |---|---|---|
//! | `admin` | everything | everything |
//! | `publisher` | everything below `mpypi/` and `homeassistant/` | channels, their history and rollouts, packages, chunks of them, roots, every node's `cmd` and `time`, `homeassistant/status` |
//! | `viewer` | everything below `mpypi/`, `homeassistant/` and `$SYS/` | nothing |
//! | `edge` | channels, their history, packages, chunks, roots, every node's `cmd` and `time` | every node's `info`, `state`, `online`, `log`, `challenge`; what edges say of themselves |
//! | `node` | channels, packages, chunks, roots, its own topics | its own `info`, `state`, `online`, `log`, `challenge` |
//! | guest over HTTP | one channel, packages and chunks by their digest | nothing |
//!
//! A rule file may narrow which channels a node reads.

pub mod devices;
pub mod gate;
pub mod users;

use std::fmt;

use mpypi_protocol::{ChannelName, NodeId, Topic, topic::NodeSubject};
use serde::{Deserialize, Serialize};

/// What someone may do in general.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Everything.
    Admin,
    /// Publishes releases.
    Publisher,
    /// A broker that takes its channels from here.
    Edge,
    /// A device.
    Node,
    /// Looks on.
    Viewer,
}

/// What Home Assistant reads, to which whoever gives orders to nodes may log in.
const HOME: &str = "homeassistant/#";
/// Where it says whether it is there.
const HOME_STATUS: &str = "homeassistant/status";

/// Someone who is let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// There are no users: whoever can connect may do everything.
    Anyone,
    /// An administrator.
    Admin,
    /// A publisher.
    Publisher,
    /// A viewer.
    Viewer,
    /// A broker that takes its channels from here, and speaks for its nodes.
    Edge,
    /// A device, and which channels it may read.
    Node(NodeId, Channels),
    /// Who did not log in, where one channel is shown to everybody.
    Guest(ChannelName),
}

/// Which channels a node may read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Channels {
    /// All.
    All,
    /// These.
    Only(Vec<ChannelName>),
}

impl Identity {
    /// Whether a message may be published to `topic`.
    #[must_use]
    pub fn may_publish(&self, topic: &str) -> bool {
        let Ok(topic) = Topic::parse(topic) else {
            return matches!(self, Identity::Anyone | Identity::Admin);
        };
        match (self, topic) {
            (Identity::Anyone | Identity::Admin, _) => true,
            (Identity::Viewer | Identity::Guest(_), _) => false,
            (Identity::Publisher, topic) => {
                matches!(
                    topic,
                    Topic::Channel(_)
                        | Topic::History(..)
                        | Topic::Rollout(..)
                        | Topic::Package(_)
                        | Topic::Chunk(..)
                        | Topic::Legacy(_)
                        | Topic::Root(_)
                        | Topic::Node(_, NodeSubject::Cmd | NodeSubject::Time)
                ) || matches!(&topic, Topic::Other(name) if name == HOME_STATUS)
            }
            (Identity::Edge, topic) => match topic {
                Topic::Node(_, subject) => !matches!(subject, NodeSubject::Cmd | NodeSubject::Time),
                topic => matches!(topic, Topic::Edge(_)),
            },
            // `cmd` and `time` are what others tell the node.
            (Identity::Node(own, _), Topic::Node(node, subject)) => {
                *own == node && !matches!(subject, NodeSubject::Cmd | NodeSubject::Time)
            }
            (Identity::Node(..), _) => false,
        }
    }

    /// Whether everything that `filter` matches may be read.
    #[must_use]
    pub fn may_subscribe(&self, filter: &str) -> bool {
        match self {
            Identity::Anyone | Identity::Admin => true,
            Identity::Viewer if covers("$SYS/#", filter) => true,
            Identity::Publisher | Identity::Viewer => covers("mpypi/#", filter) || covers(HOME, filter),
            Identity::Edge => [
                "mpypi/channels/+",
                "mpypi/channels/+/history/+",
                "mpypi/packages/#",
                "mpypi/chunks/#",
                "mpypi/keys/root/+",
                "mpypi/nodes/+/cmd",
                "mpypi/nodes/+/time",
            ]
            .iter()
            .any(|pattern| covers(pattern, filter)),
            Identity::Node(own, channels) => {
                let channel = match channels {
                    Channels::All => covers("mpypi/channels/+", filter),
                    Channels::Only(names) => names.iter().any(|name| name.topic() == filter),
                };
                // Under a wildcard, packages of other channels would show themselves.
                let package = match channels {
                    Channels::All => of_a_package(filter),
                    Channels::Only(_) => of_a_package(filter) && !filter.contains(['+', '#']),
                };
                // What a channel had before is read by those who may read the channel.
                let history = match channels {
                    Channels::All => covers("mpypi/channels/+/history/+", filter),
                    Channels::Only(names) => {
                        names.iter().any(|name| covers(&format!("{}/history/+", name.topic()), filter))
                    }
                };
                let root = covers("mpypi/keys/root/+", filter);
                channel || history || package || root || covers(&format!("mpypi/nodes/{own}/#"), filter)
            }
            Identity::Guest(channel) => {
                channel.topic() == filter || (of_a_package(filter) && !filter.contains(['+', '#']))
            }
        }
    }

    /// Whether the client may call itself `client_id`; an empty one asks for a name. A node may not take another's name, nor another's
    /// connection with it.
    #[must_use]
    pub fn may_be(&self, client_id: &str) -> bool {
        match self {
            Identity::Node(own, _) => own.as_str() == client_id || client_id.is_empty(),
            _ => true,
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::Anyone => f.write_str("anyone"),
            Identity::Admin => f.write_str("an admin"),
            Identity::Publisher => f.write_str("a publisher"),
            Identity::Viewer => f.write_str("a viewer"),
            Identity::Edge => f.write_str("an edge"),
            Identity::Node(node, _) => write!(f, "node `{node}`"),
            Identity::Guest(_) => f.write_str("who is not logged in"),
        }
    }
}

/// Whether `filter` is for packages, or chunks of them, alone.
fn of_a_package(filter: &str) -> bool {
    covers("mpypi/packages/#", filter) || covers("mpypi/chunks/#", filter)
}

/// Whether `pattern` matches every topic that `filter` matches.
fn covers(pattern: &str, filter: &str) -> bool {
    let mut levels = filter.split('/');
    for wanted in pattern.split('/') {
        match (wanted, levels.next()) {
            ("#", _) => return true,
            ("+", Some(level)) if level != "#" => {}
            (wanted, Some(level)) if wanted == level => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::topic::matches;
    use proptest::prelude::*;

    use super::*;

    fn node(channels: Channels) -> Identity {
        Identity::Node(NodeId::new("kitchen").unwrap(), channels)
    }

    #[test]
    fn each_role_writes_what_it_must_and_nothing_else() {
        let package =
            "mpypi/packages/src/main.py/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let chunk = "mpypi/chunks/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/7";
        // Topic: admin, publisher, viewer, edge, node.
        let table: &[(&str, [bool; 5])] = &[
            ("mpypi/channels/dev", [true, true, false, false, false]),
            ("mpypi/channels/dev/rollout", [true, true, false, false, false]),
            ("mpypi/channels/dev/rollout/lease", [true, true, false, false, false]),
            ("mpypi/channels/dev/rollout/order", [true, true, false, false, false]),
            (package, [true, true, false, false, false]),
            (chunk, [true, true, false, false, false]),
            ("mpypi/chunks/else", [true, false, false, false, false]),
            ("mpypi/nodes/kitchen/info", [true, false, false, true, true]),
            ("mpypi/nodes/kitchen/state", [true, false, false, true, true]),
            ("mpypi/nodes/kitchen/online", [true, false, false, true, true]),
            ("mpypi/nodes/kitchen/log", [true, false, false, true, true]),
            ("mpypi/nodes/kitchen/cmd", [true, true, false, false, false]),
            ("mpypi/channels/dev/history/7", [true, true, false, false, false]),
            ("mpypi/keys/root/2", [true, true, false, false, false]),
            ("mpypi/nodes/kitchen/challenge", [true, false, false, true, true]),
            ("mpypi/nodes/kitchen/time", [true, true, false, false, false]),
            ("mpypi/edges/site-7", [true, false, false, true, false]),
            ("mpypi/nodes/kitchen/other", [true, false, false, false, false]),
            ("mpypi/nodes/cellar/info", [true, false, false, true, false]),
            ("mpypi/nodes/cellar/cmd", [true, true, false, false, false]),
            ("mpypi/nodes/kitchen", [true, false, false, false, false]),
            ("mpypi/else", [true, false, false, false, false]),
            ("home/light", [true, false, false, false, false]),
            ("homeassistant/status", [true, true, false, false, false]),
            ("homeassistant/update/mpypi_kitchen/config", [true, false, false, false, false]),
            ("homeassistant/update/mpypi_kitchen/state", [true, false, false, false, false]),
        ];
        let roles =
            [Identity::Admin, Identity::Publisher, Identity::Viewer, Identity::Edge, node(Channels::All)];
        for (topic, expected) in table {
            let found = roles.each_ref().map(|role| role.may_publish(topic));
            assert_eq!(found, *expected, "{topic}");
            assert!(Identity::Anyone.may_publish(topic));
        }
    }

    #[test]
    fn each_role_reads_what_it_must_and_nothing_else() {
        let only = || node(Channels::Only(vec![ChannelName::new("stable").unwrap()]));
        // Filter: admin, publisher, viewer, edge, node, node narrowed to `stable`.
        let table: &[(&str, [bool; 6])] = &[
            ("mpypi/channels/stable", [true, true, true, true, true, true]),
            ("mpypi/channels/dev", [true, true, true, true, true, false]),
            ("mpypi/channels/stable/history/7", [true, true, true, true, true, true]),
            ("mpypi/channels/dev/history/7", [true, true, true, true, true, false]),
            ("mpypi/keys/root/2", [true, true, true, true, true, true]),
            ("mpypi/keys/#", [true, true, true, false, false, false]),
            ("mpypi/channels/+", [true, true, true, true, true, false]),
            ("mpypi/channels/#", [true, true, true, false, false, false]),
            ("mpypi/packages/wheel/x", [true, true, true, true, true, true]),
            ("mpypi/packages/#", [true, true, true, true, true, false]),
            ("mpypi/chunks/x/7", [true, true, true, true, true, true]),
            ("mpypi/chunks/#", [true, true, true, true, true, false]),
            ("mpypi/nodes/kitchen/cmd", [true, true, true, true, true, true]),
            ("mpypi/nodes/kitchen/#", [true, true, true, false, true, true]),
            ("mpypi/nodes/cellar/cmd", [true, true, true, true, false, false]),
            ("mpypi/nodes/+/cmd", [true, true, true, true, false, false]),
            ("mpypi/+/kitchen/cmd", [true, true, true, false, false, false]),
            ("+/nodes/kitchen/cmd", [true, false, false, false, false, false]),
            ("mpypi/#", [true, true, true, false, false, false]),
            ("#", [true, false, false, false, false, false]),
            ("home/light", [true, false, false, false, false, false]),
            ("homeassistant/#", [true, true, true, false, false, false]),
            ("homeassistant/+/+/config", [true, true, true, false, false, false]),
            ("$SYS/#", [true, false, true, false, false, false]),
            ("$SYS/broker/uptime", [true, false, true, false, false, false]),
        ];
        let roles = [
            Identity::Admin,
            Identity::Publisher,
            Identity::Viewer,
            Identity::Edge,
            node(Channels::All),
            only(),
        ];
        for (filter, expected) in table {
            let found = roles.each_ref().map(|role| role.may_subscribe(filter));
            assert_eq!(found, *expected, "{filter}");
        }
    }

    #[test]
    fn a_node_cannot_take_anothers_name() {
        assert!(node(Channels::All).may_be("kitchen"));
        assert!(!node(Channels::All).may_be("cellar"));
        assert!(Identity::Publisher.may_be("anything"));
    }

    proptest! {
        #[test]
        fn a_covered_filter_matches_nothing_that_its_cover_does_not(
            pattern in "[ab+](/[ab+]){0,2}(/#)?",
            filter in "[ab+](/[ab+]){0,2}(/#)?",
            name in "[ab](/[ab]){0,3}",
        ) {
            if covers(&pattern, &filter) && matches(&filter, &name) {
                prop_assert!(matches(&pattern, &name));
            }
        }
    }
}
