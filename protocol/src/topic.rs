//! What an MQTT topic means to us, and the rules for topic names and filters.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    Digest, FilePath, PackageId, chunk, limits,
    package::{LegacyId, PACKAGES},
    path::PathError,
};

/// Where every channel topic starts.
pub const CHANNELS: &str = "mpypi/channels/";
/// Where every node's topics start.
pub const NODES: &str = "mpypi/nodes/";

/// Where every edge's topic starts.
pub const EDGES: &str = "mpypi/edges/";
/// Where every root's topic starts.
pub const ROOTS: &str = "mpypi/keys/root/";

/// The name of a channel: letters, digits, `.`, `_` and `-`, first a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelName(String);

/// The name of a node, which is its MQTT client id. Holds no `/`, `+`, `#` or control character: an id
/// with one can connect, but has no topic of its own. It is no file name: `..` and `C:` are good node names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(String);

/// A text is not a channel name or node name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a [`ChannelName`].
    #[error(
        "`{}` is no channel name: use 1 to {} letters, digits, `.`, `_` and `-`, a letter or digit first",
        .0.escape_debug(), limits::CHANNEL_NAME
    )]
    Channel(String),
    /// Not a [`NodeId`].
    #[error(
        "`{}` is no node name: use 1 to {} bytes without `/`, `+`, `#` and control characters",
        .0.escape_debug(), limits::NODE_NAME
    )]
    Node(String),
}

/// What a topic is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Topic {
    /// `mpypi/channels/<channel>`: the channel's update list.
    Channel(ChannelName),
    /// `mpypi/channels/<channel>/rollout`, and below: what publishers say to each other about a rollout.
    Rollout(ChannelName, RolloutSubject),
    /// `mpypi/packages/<id>` in the current layout.
    Package(PackageId),
    /// `mpypi/chunks/<sha256>/<number>`: a piece of the package with this digest.
    Chunk(Digest, u32),
    /// `mpypi/packages/<id>` in an earlier layout.
    Legacy(LegacyId),
    /// `mpypi/channels/<channel>/history/<sequence>`: a list that the channel had, or has.
    History(ChannelName, u64),
    /// `mpypi/keys/root/<version>`: a root of trust.
    Root(u64),
    /// `mpypi/nodes/<node>/<subject>`
    Node(NodeId, NodeSubject),
    /// `mpypi/edges/<edge>`: what a broker that takes its channels from another one says of itself there, when it
    /// comes; not retained.
    Edge(NodeId),
    /// Any other topic. Some of them may mean something to a later version.
    Other(String),
}

/// What a topic of a channel's rollout is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RolloutSubject {
    /// Retained: what was wanted of it, and what was decided.
    Record,
    /// Retained while there is one: who steers it.
    Lease,
    /// What someone else wants of who steers it, not retained.
    Order,
}

/// What a node's topic is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeSubject {
    /// What the node is and has, see [`Info`](crate::node::Info).
    Info,
    /// Where its update stands, see [`State`](crate::node::State).
    State,
    /// Retained `1` while connected, `0` by last will.
    Online,
    /// An update list for this node alone, applied at once and not retained.
    Cmd,
    /// Lines of text, not retained.
    Log,
    /// A nonce, by which a node without a clock asks for the time; not retained.
    Challenge,
    /// The answer to it, see [`TimeAnswer`](crate::signed::TimeAnswer); not retained.
    Time,
}

/// Why a topic name or filter is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// MQTT 4.7.3: at least one character.
    #[error("a topic must not be empty")]
    Empty,
    /// Longer than [`limits::TOPIC`].
    #[error("a topic of {length} bytes is longer than {}", limits::TOPIC)]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// More levels than [`limits::TOPIC_LEVELS`].
    #[error("a topic of {levels} levels has more than {}", limits::TOPIC_LEVELS)]
    TooDeep {
        /// How many levels it has.
        levels: usize,
    },
    /// MQTT 4.7.3: no U+0000; MQTT 1.5.4 lets a receiver refuse other control characters, and we do.
    #[error("topic `{}` holds the control character {character:?}", topic.escape_debug())]
    Control {
        /// The topic as given.
        topic: String,
        /// The character.
        character: char,
    },
    /// MQTT 4.7.1: wildcards are for filters, alone in their level, `#` last.
    #[error("wildcard in `{topic}` where none may be")]
    Wildcard {
        /// The topic or filter as given.
        topic: String,
    },
    /// MQTT 5, 4.8.2: `$share/<name>/<filter>`, the name without wildcards.
    #[error("`{filter}` is no shared subscription: it goes `$share/<name>/<filter>`")]
    Shared {
        /// The filter as given.
        filter: String,
    },
    /// Below `mpypi/channels/` or `mpypi/nodes/`, with a name that is none.
    #[error("topic `{topic}`: {problem}")]
    Name {
        /// The topic as given.
        topic: String,
        /// What is wrong with the name.
        problem: NameError,
    },
    /// Where a number is to be, something else.
    #[error("topic `{topic}` should end in a whole number, from 1 for roots, without leading zeros")]
    Number {
        /// The topic as given.
        topic: String,
    },
    /// Below `mpypi/packages/`, with a path that is none.
    #[error("topic `{topic}`: {problem}")]
    Path {
        /// The topic as given.
        topic: String,
        /// What is wrong with the path.
        problem: PathError,
    },
    /// Below `mpypi/packages/`, with something other than a digest where one should be.
    #[error("topic `{topic}` should end in a digest of 64 lowercase hexadecimal digits")]
    Digest {
        /// The topic as given.
        topic: String,
    },
    /// Below `mpypi/chunks/`, with something other than a digest and a number below [`limits::CHUNKS`].
    #[error(
        "topic `{topic}` should end in a digest of 64 lowercase hexadecimal digits and a number below {}, without leading zeros",
        limits::CHUNKS
    )]
    Chunk {
        /// The topic as given.
        topic: String,
    },
}

impl ChannelName {
    /// Checks `name` and keeps it.
    ///
    /// # Errors
    /// [`NameError::Channel`]
    pub fn new(name: impl Into<String>) -> Result<ChannelName, NameError> {
        let name = name.into();
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if (1..=limits::CHANNEL_NAME).contains(&name.len())
            && name.chars().all(good)
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        {
            Ok(ChannelName(name))
        } else {
            Err(NameError::Channel(start(&name)))
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The topic of the channel's update list.
    #[must_use]
    pub fn topic(&self) -> String {
        format!("{CHANNELS}{self}")
    }

    /// The topic that keeps the list of this sequence when another has replaced it.
    #[must_use]
    pub fn history(&self, sequence: u64) -> String {
        format!("{CHANNELS}{self}/history/{sequence}")
    }

    /// The sequence of the list that the channel's history keeps on `topic`, if it is such a topic.
    #[must_use]
    pub fn history_sequence(&self, topic: &str) -> Option<u64> {
        let digits = topic.strip_prefix(CHANNELS)?.strip_prefix(self.as_str())?.strip_prefix("/history/")?;
        let sequence = digits.parse().ok()?;
        (self.history(sequence) == topic).then_some(sequence)
    }

    /// The topic for `subject` of the channel's rollout.
    #[must_use]
    pub fn rollout(&self, subject: RolloutSubject) -> String {
        let end = match subject {
            RolloutSubject::Record => "",
            RolloutSubject::Lease => "/lease",
            RolloutSubject::Order => "/order",
        };
        format!("{CHANNELS}{self}/rollout{end}")
    }
}

impl NodeId {
    /// Checks `name` and keeps it.
    ///
    /// # Errors
    /// [`NameError::Node`]
    pub fn new(name: impl Into<String>) -> Result<NodeId, NameError> {
        let name = name.into();
        let bad = |c: char| matches!(c, '/' | '+' | '#') || c.is_control();
        if (1..=limits::NODE_NAME).contains(&name.len()) && !name.contains(bad) {
            Ok(NodeId(name))
        } else {
            Err(NameError::Node(start(&name)))
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The node's topic for `subject`.
    #[must_use]
    pub fn topic(&self, subject: NodeSubject) -> String {
        format!("{NODES}{self}/{subject}")
    }
}

/// Enough of a refused text to recognise it.
fn start(text: &str) -> String {
    text.chars().take(80).collect()
}

macro_rules! text_type {
    ($type:ty) => {
        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

text_type!(ChannelName);
text_type!(NodeId);

impl fmt::Display for NodeSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NodeSubject::Info => "info",
            NodeSubject::State => "state",
            NodeSubject::Online => "online",
            NodeSubject::Cmd => "cmd",
            NodeSubject::Log => "log",
            NodeSubject::Challenge => "challenge",
            NodeSubject::Time => "time",
        })
    }
}

impl Topic {
    /// What the topic name `name` means.
    ///
    /// # Errors
    /// `name` is no MQTT topic name, or names a channel, package or node that cannot be.
    pub fn parse(name: &str) -> Result<Topic, TopicError> {
        check_name(name)?;
        if let Some(channel) = name.strip_prefix(CHANNELS).filter(|rest| !rest.contains('/')) {
            return ChannelName::new(channel)
                .map(Topic::Channel)
                .map_err(|problem| TopicError::Name { topic: name.to_owned(), problem });
        }
        let history = name.strip_prefix(CHANNELS).and_then(|rest| rest.split_once("/history/"));
        if let Some((channel, sequence)) = history.filter(|(_, sequence)| !sequence.contains('/')) {
            let channel = ChannelName::new(channel)
                .map_err(|problem| TopicError::Name { topic: name.to_owned(), problem })?;
            return Ok(Topic::History(channel, number(name, sequence)?));
        }
        if let Some(version) = name.strip_prefix(ROOTS).filter(|rest| !rest.contains('/')) {
            return match number(name, version)? {
                0 => Err(TopicError::Number { topic: name.to_owned() }),
                version => Ok(Topic::Root(version)),
            };
        }
        let rollout = name.strip_prefix(CHANNELS).and_then(|rest| rest.split_once("/rollout"));
        if let Some((channel, end)) = rollout {
            let subject = match end {
                "" => RolloutSubject::Record,
                "/lease" => RolloutSubject::Lease,
                "/order" => RolloutSubject::Order,
                _ => return Ok(Topic::Other(name.to_owned())),
            };
            return ChannelName::new(channel)
                .map(|channel| Topic::Rollout(channel, subject))
                .map_err(|problem| TopicError::Name { topic: name.to_owned(), problem });
        }
        if let Some(id) = name.strip_prefix(PACKAGES) {
            return parse_package(name, id);
        }
        if let Some(rest) = name.strip_prefix(chunk::CHUNKS) {
            return parse_chunk(rest).ok_or(TopicError::Chunk { topic: name.to_owned() });
        }
        if let Some((node, subject)) = name.strip_prefix(NODES).and_then(|rest| rest.split_once('/')) {
            let subject = match subject {
                "info" => NodeSubject::Info,
                "state" => NodeSubject::State,
                "online" => NodeSubject::Online,
                "cmd" => NodeSubject::Cmd,
                "log" => NodeSubject::Log,
                "challenge" => NodeSubject::Challenge,
                "time" => NodeSubject::Time,
                _ => return Ok(Topic::Other(name.to_owned())),
            };
            return NodeId::new(node)
                .map(|node| Topic::Node(node, subject))
                .map_err(|problem| TopicError::Name { topic: name.to_owned(), problem });
        }
        if let Some(edge) = name.strip_prefix(EDGES).filter(|rest| !rest.contains('/')) {
            return NodeId::new(edge)
                .map(Topic::Edge)
                .map_err(|problem| TopicError::Name { topic: name.to_owned(), problem });
        }
        Ok(Topic::Other(name.to_owned()))
    }
}

/// The one way to write a number: two topics never mean the same.
fn number(topic: &str, text: &str) -> Result<u64, TopicError> {
    let number: Option<u64> = text.parse().ok();
    number.filter(|number| number.to_string() == text).ok_or(TopicError::Number { topic: topic.to_owned() })
}

fn parse_chunk(rest: &str) -> Option<Topic> {
    let (package, digits) = rest.split_once('/')?;
    let number: u32 = digits.parse().ok()?;
    let is_good =
        number.to_string() == digits && usize::try_from(number).is_ok_and(|number| number < limits::CHUNKS);
    Some(Topic::Chunk(package.parse().ok()?, number)).filter(|_| is_good)
}

fn parse_package(topic: &str, id: &str) -> Result<Topic, TopicError> {
    let digest = || TopicError::Digest { topic: topic.to_owned() };
    let path = |text: &str| {
        FilePath::new(text).map_err(|problem| TopicError::Path { topic: topic.to_owned(), problem })
    };
    if let Some(rest) = id.strip_prefix("wheel/") {
        return Ok(Topic::Package(PackageId::Wheel(rest.parse().map_err(|_| digest())?)));
    }
    if let Some(rest) = id.strip_prefix("firmware/") {
        return Ok(Topic::Package(PackageId::Firmware(rest.parse().map_err(|_| digest())?)));
    }
    if let Some(rest) = id.strip_prefix("src/") {
        let split = rest.rsplit_once('/').and_then(|(path, last)| Some((path, last.parse::<Digest>().ok()?)));
        return match split {
            Some((file, digest)) => Ok(Topic::Package(PackageId::Src(path(file)?, digest))),
            None if ends_like_a_digest(rest) => Err(digest()),
            None => Ok(Topic::Legacy(LegacyId::Src(path(rest)?))),
        };
    }
    match id.parse() {
        Ok(digest) => Ok(Topic::Legacy(LegacyId::Digest(digest))),
        Err(_) if ends_like_a_digest(id) => Err(digest()),
        Err(_) => Ok(Topic::Legacy(LegacyId::Path(path(id)?))),
    }
}

/// Whether the last level is a digest but for the case of its letters: never meant as a file's name.
fn ends_like_a_digest(id: &str) -> bool {
    let last = id.rsplit('/').next().unwrap_or_default();
    last.len() == 64 && last.bytes().all(|digit| digit.is_ascii_hexdigit())
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Topic::Channel(channel) => f.write_str(&channel.topic()),
            Topic::Rollout(channel, subject) => f.write_str(&channel.rollout(*subject)),
            Topic::Package(id) => f.write_str(&id.topic()),
            Topic::Legacy(id) => f.write_str(&id.topic()),
            Topic::Chunk(package, number) => f.write_str(&chunk::topic(package, *number)),
            Topic::History(channel, sequence) => f.write_str(&channel.history(*sequence)),
            Topic::Root(version) => f.write_str(&crate::root::topic(*version)),
            Topic::Node(node, subject) => f.write_str(&node.topic(*subject)),
            Topic::Edge(edge) => write!(f, "{EDGES}{edge}"),
            Topic::Other(name) => f.write_str(name),
        }
    }
}

/// Checks that `name` can be published to: MQTT 3.1.1 and 5, section 4.7, and our limits.
///
/// # Errors
/// Says which rule `name` breaks.
pub fn check_name(name: &str) -> Result<(), TopicError> {
    check_text(name)?;
    if name.contains(['+', '#']) {
        return Err(TopicError::Wildcard { topic: name.to_owned() });
    }
    Ok(())
}

/// The name and the filter of a shared subscription, `$share/<name>/<filter>` (MQTT 5, section 4.8.2).
#[must_use]
pub fn split_shared(filter: &str) -> Option<(&str, &str)> {
    filter.strip_prefix("$share/")?.split_once('/')
}

/// Checks that `filter` can be subscribed to: MQTT 3.1.1 and 5, sections 4.7.1 and 4.8.2, and our limits.
///
/// # Errors
/// Says which rule `filter` breaks.
pub fn check_filter(filter: &str) -> Result<(), TopicError> {
    check_text(filter)?;
    let wanted = match (filter.starts_with("$share/"), split_shared(filter)) {
        (false, _) => filter,
        (true, Some((name, wanted)))
            if !name.is_empty() && !name.contains(['+', '#']) && !wanted.is_empty() =>
        {
            wanted
        }
        (true, _) => return Err(TopicError::Shared { filter: filter.to_owned() }),
    };
    let mut levels = wanted.split('/').peekable();
    while let Some(level) = levels.next() {
        let good = match level {
            "#" => levels.peek().is_none(),
            "+" => true,
            _ => !level.contains(['+', '#']),
        };
        if !good {
            return Err(TopicError::Wildcard { topic: filter.to_owned() });
        }
    }
    Ok(())
}

/// Whether a checked `filter` matches a checked topic `name`: MQTT section 4.7, `$`-topics (4.7.2) included.
#[must_use]
pub fn matches(filter: &str, name: &str) -> bool {
    if name.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut levels = name.split('/');
    for level in filter.split('/') {
        match (level, levels.next()) {
            ("#", _) => return true,
            ("+", Some(_)) => {}
            (level, Some(found)) if level == found => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

fn check_text(text: &str) -> Result<(), TopicError> {
    if text.is_empty() {
        return Err(TopicError::Empty);
    }
    if text.len() > limits::TOPIC {
        return Err(TopicError::TooLong { length: text.len() });
    }
    if let Some(character) = text.chars().find(|c| c.is_control()) {
        return Err(TopicError::Control { topic: text.to_owned(), character });
    }
    let levels = text.split('/').count();
    if levels > limits::TOPIC_LEVELS {
        return Err(TopicError::TooDeep { levels });
    }
    Ok(())
}
