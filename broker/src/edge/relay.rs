//! Policy of the relay: what of the site's nodes goes up, and what comes down for them.
//!
//! | at an [edge](Part::Edge) | goes |
//! |---|---|
//! | a node's `info`, `state`, `online` | up: what the index has when it is sent, so the latest of each |
//! | a node's `log`, `challenge` | up, the last [`LIVE`] of those that wait |
//! | `cmd` and `time` of the site's nodes | down, acknowledged when the index has it |
//! | what an edge below says of itself | up, with this edge's name behind it |
//!
//! A [gateway](Part::Gateway) has no nodes: it takes what the cluster has of them, brings up what it wrote itself, and orders.
//!
//! Nothing that is retained waits in memory: a topic is marked, and read when it is its turn. How far the upstream has been
//! told is one number, the index's version: after a restart what is newer is marked again, also what was cleared, which the
//! index notes until the upstream knows. If the upstream has forgotten this edge's session, all is that is here; but not again
//! what was cleared, which may be another site's by now.
//!
//! No I/O and no clock: events in, effects out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use mpypi_protocol::{
    NodeId, Topic,
    limits::{NODE_MESSAGE, SUBSCRIBE_FILTERS},
    topic::{EDGES, NODES, NodeSubject},
};

use super::Part;

/// Messages sent up that were not acknowledged.
pub const IN_FLIGHT: usize = 64;
/// Messages that are not retained and wait to go up.
pub const LIVE: usize = 256;
/// Nodes whose orders are asked for by name; with more, those of all nodes are, and others' left.
pub const BY_NAME: usize = 500;
/// SUBSCRIBE packets that were not answered.
pub const SUBSCRIBES: usize = 4;
/// Most edges, one above the other.
pub const CHAIN: usize = 16;

/// What the index has of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The message.
    pub payload: Bytes,
    /// Its version.
    pub version: u64,
}

/// What is in the index.
pub trait Library {
    /// What is retained on a topic.
    fn get(&self, topic: &str) -> Option<Kept>;
}

/// A message on its way up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its topic.
    pub topic: String,
    /// The message.
    pub payload: Bytes,
    /// Whether it is to be retained.
    pub retain: bool,
}

/// What happens.
#[derive(Debug, Clone)]
pub enum Event {
    /// There is a connection; whether the upstream goes on with an earlier session of it.
    Connected {
        /// Whether.
        present: bool,
    },
    /// There is none any more.
    Lost,
    /// Somebody here published a message.
    Local {
        /// Its topic.
        topic: String,
        /// Its place in the order of the index's changes, if it is retained.
        version: Option<u64>,
        /// What it says.
        payload: Bytes,
    },
    /// Something that was published here was not heard of.
    Behind,
    /// The index has this on a node's topic.
    Found {
        /// The topic.
        topic: String,
        /// Its version.
        version: u64,
    },
    /// A node's topic was cleared, which the upstream was never told; something may have come there since.
    Gone {
        /// The topic.
        topic: String,
        /// The clear's place in the order of the index's changes.
        version: u64,
    },
    /// All that the index has was found.
    Scanned,
    /// The upstream has acknowledged a message.
    Acknowledged(u64),
    /// A SUBSCRIBE was answered; these filters were not granted.
    Subscribed(Vec<String>),
    /// A message came from upstream.
    Down {
        /// Its topic.
        topic: String,
        /// What it says.
        payload: Bytes,
        /// Whether it was retained there.
        retain: bool,
        /// By which it is acknowledged; 0 for one that is not.
        id: u16,
    },
    /// What became of a message that came down.
    Settled {
        /// By which it is acknowledged.
        id: u16,
        /// Whether it may be: what the index has no room for comes again.
        is_done: bool,
    },
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Publish upstream at QoS 1; answered by [`Event::Acknowledged`] with the number.
    Send(u64, Message),
    /// Subscribe upstream at QoS 1.
    Subscribe(Vec<String>),
    /// Unsubscribe upstream.
    Unsubscribe(Vec<String>),
    /// Look through the index: [`Event::Found`] for each node's topic, [`Event::Gone`] for what was cleared and not told, then
    /// [`Event::Scanned`].
    Scan,
    /// Hand a message to whom it is for; answered by [`Event::Settled`].
    Hand {
        /// Its topic.
        topic: String,
        /// What it says.
        payload: Bytes,
        /// Whether it is kept.
        retain: bool,
        /// By which it is acknowledged.
        id: u16,
    },
    /// Acknowledge a message.
    Acknowledge(u16),
    /// Begin the connection anew.
    Reconnect,
    /// This broker is its own upstream: by way of these edges.
    Loop(Vec<NodeId>),
    /// Say something to people.
    Tell(String),
}

/// How it goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// The site's nodes.
    pub nodes: usize,
    /// Topics and messages that the upstream does not have yet.
    pub waiting: usize,
    /// Messages that were not retained and were dropped.
    pub dropped: u64,
}

/// The relay.
#[derive(Debug)]
pub struct Relay {
    name: NodeId,
    part: Part,
    is_connected: bool,
    /// The highest version seen.
    seen: u64,
    /// If the index is yet to be looked through: what is newer than this is marked then.
    scan: Option<u64>,
    /// Topics to send, each with the lowest version of it that the upstream does not have.
    marked: BTreeMap<String, u64>,
    live: VecDeque<Message>,
    flight: BTreeMap<u64, Flight>,
    /// Topics of `flight`, and the version of each that was sent.
    flying: BTreeMap<String, u64>,
    next: u64,
    nodes: BTreeSet<NodeId>,
    /// Filters to ask for.
    filters: VecDeque<String>,
    /// SUBSCRIBEs that were not answered.
    owed: usize,
    dropped: u64,
}

/// A message that was sent and not acknowledged.
#[derive(Debug)]
enum Flight {
    /// What was retained on a marked topic, as of this version.
    Marked(String, u64),
    /// A message that is not in the index.
    Live(Message),
}

impl Relay {
    /// The relay of the edge or gateway `name`, whose upstream has everything up to the version `carried`.
    #[must_use]
    pub fn new(name: NodeId, part: Part, carried: u64) -> Relay {
        Relay {
            name,
            part,
            is_connected: false,
            seen: carried,
            // What changed after that is marked once the index has been looked through.
            scan: (part == Part::Edge).then_some(carried),
            marked: BTreeMap::new(),
            live: VecDeque::new(),
            flight: BTreeMap::new(),
            flying: BTreeMap::new(),
            next: 0,
            nodes: BTreeSet::new(),
            filters: VecDeque::new(),
            owed: 0,
            dropped: 0,
        }
    }

    /// Takes an event.
    pub fn handle(&mut self, event: Event, library: &impl Library) -> Vec<Effect> {
        let mut out = Vec::new();
        match event {
            Event::Connected { present } => self.connected(present, &mut out),
            Event::Lost => self.lost(),
            Event::Local { topic, version, payload } => self.local(topic, version, payload, &mut out),
            Event::Behind if self.part == Part::Edge => {
                self.scan = Some(self.carried());
                if self.is_connected {
                    out.push(Effect::Scan);
                }
            }
            Event::Behind => {}
            Event::Found { topic, version } => self.found(topic, version, &mut out),
            Event::Gone { topic, version } => self.gone(topic, version),
            Event::Scanned => self.scan = None,
            Event::Acknowledged(number) => self.acknowledged(number, library, &mut out),
            Event::Subscribed(refused) => {
                self.owed = self.owed.saturating_sub(1);
                for filter in refused {
                    out.push(Effect::Tell(format!("the upstream does not let this edge read `{filter}`")));
                }
            }
            Event::Down { topic, payload, retain, id } => self.down(topic, payload, retain, id, &mut out),
            Event::Settled { id, is_done } => match is_done {
                true if id > 0 => out.push(Effect::Acknowledge(id)),
                true => {}
                false => out.push(Effect::Reconnect),
            },
        }
        self.send(library, &mut out);
        out
    }

    /// The version of the index up to which the upstream has everything.
    #[must_use]
    pub fn carried(&self) -> u64 {
        let flying = self.flight.values().filter_map(|flight| match flight {
            Flight::Marked(_, version) => Some(*version),
            Flight::Live(_) => None,
        });
        let lowest = self.marked.values().copied().chain(flying).min();
        let carried = lowest.map_or(self.seen, |version| version.saturating_sub(1));
        match self.scan {
            // What was not found yet may be as old as that.
            Some(from) => carried.min(from),
            None => carried,
        }
    }

    /// How it goes.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let waiting = self.marked.len() + self.live.len() + self.flight.len();
        Standing { nodes: self.nodes.len(), waiting, dropped: self.dropped }
    }

    fn connected(&mut self, present: bool, out: &mut Vec<Effect>) {
        self.is_connected = true;
        self.owed = 0;
        self.filters.clear();
        match self.part {
            Part::Edge => {
                // Who forgot the session may have forgotten everything.
                self.scan = Some(if present { self.carried() } else { 0 });
                self.nodes.clear();
                self.filters.push_back(format!("{NODES}+/time"));
                out.push(Effect::Scan);
                let hello = self.hello(&self.name, vec![self.name.clone()]);
                self.live.push_front(hello);
            }
            Part::Gateway => {
                let subjects = [NodeSubject::Info, NodeSubject::State, NodeSubject::Online];
                self.filters.extend(subjects.map(|subject| format!("{NODES}+/{subject}")));
            }
        }
    }

    fn hello(&self, edge: &NodeId, chain: Vec<NodeId>) -> Message {
        let payload = serde_json::to_vec(&chain).unwrap_or_default().into();
        Message { topic: format!("{EDGES}{edge}"), payload, retain: false }
    }

    fn lost(&mut self) {
        self.is_connected = false;
        self.flying.clear();
        // The newest of what was not acknowledged first, so that it ends up behind the older.
        for (_, flight) in std::mem::take(&mut self.flight).into_iter().rev() {
            match flight {
                Flight::Marked(topic, version) => self.mark(topic, version),
                Flight::Live(message) if message.topic.starts_with(EDGES) => {}
                Flight::Live(message) => self.live.push_front(message),
            }
        }
        self.bound();
    }

    /// Keeps what waits within its bound: the oldest goes.
    fn bound(&mut self) {
        while self.live.len() > LIVE {
            self.live.pop_front();
            self.dropped += 1;
        }
    }

    /// Notes that the upstream does not have this version of a topic, unless it is on its way there.
    fn mark(&mut self, topic: String, version: u64) {
        if self.flying.get(&topic).is_some_and(|sent| version <= *sent) {
            // It is told with what is on its way, and not before that is acknowledged.
            for flight in self.flight.values_mut() {
                if let Flight::Marked(flying, from) = flight
                    && *flying == topic
                {
                    *from = version.min(*from);
                }
            }
            return;
        }
        let marked = self.marked.entry(topic).or_insert(version);
        *marked = version.min(*marked);
    }

    fn local(&mut self, topic: String, version: Option<u64>, payload: Bytes, out: &mut Vec<Effect>) {
        match Topic::parse(&topic) {
            Ok(Topic::Edge(edge)) if self.part == Part::Edge => {
                let mut chain: Vec<NodeId> = serde_json::from_slice(&payload).unwrap_or_default();
                if edge == self.name || chain.contains(&self.name) || chain.len() >= CHAIN {
                    return out.push(Effect::Loop(chain));
                }
                chain.push(self.name.clone());
                let hello = self.hello(&edge, chain);
                self.live.push_back(hello);
                self.bound();
            }
            Ok(Topic::Node(node, subject)) if goes_up(self.part, subject) => {
                if payload.len() > NODE_MESSAGE {
                    out.push(Effect::Tell(format!(
                        "`{topic}` stays here: it has {} bytes, of at most {NODE_MESSAGE}",
                        payload.len()
                    )));
                    return;
                }
                match version {
                    Some(version) => {
                        // What was published again as it was is upstream already.
                        if version > self.carried() || self.marked.contains_key(&topic) || payload.is_empty()
                        {
                            self.mark(topic, version);
                        }
                        self.seen = self.seen.max(version);
                        self.meet(node, out);
                    }
                    None => {
                        self.live.push_back(Message { topic, payload, retain: false });
                        self.bound();
                    }
                }
            }
            _ => {}
        }
    }

    fn found(&mut self, topic: String, version: u64, out: &mut Vec<Effect>) {
        let Ok(Topic::Node(node, subject)) = Topic::parse(&topic) else { return };
        if !goes_up(self.part, subject) {
            return;
        }
        if self.scan.is_some_and(|from| version > from) {
            self.mark(topic, version);
        }
        self.seen = self.seen.max(version);
        self.meet(node, out);
    }

    fn gone(&mut self, topic: String, version: u64) {
        if matches!(Topic::parse(&topic), Ok(Topic::Node(_, subject)) if goes_up(self.part, subject)) {
            self.mark(topic, version);
        }
        self.seen = self.seen.max(version);
    }

    /// Asks for the orders of a node that is new here.
    fn meet(&mut self, node: NodeId, out: &mut Vec<Effect>) {
        if self.part == Part::Gateway || self.nodes.contains(&node) {
            return;
        }
        self.nodes.insert(node.clone());
        match self.nodes.len() {
            1..=BY_NAME => self.filters.push_back(node.topic(NodeSubject::Cmd)),
            count if count == BY_NAME + 1 => {
                self.filters.push_back(format!("{NODES}+/cmd"));
                // Otherwise an order would come twice.
                let named = self.nodes.iter().filter(|other| **other != node);
                let named: Vec<_> = named.map(|node| node.topic(NodeSubject::Cmd)).collect();
                self.filters.retain(|filter| !named.contains(filter));
                out.extend(named.chunks(SUBSCRIBE_FILTERS).map(|some| Effect::Unsubscribe(some.to_vec())));
            }
            _ => {}
        }
    }

    fn acknowledged(&mut self, number: u64, library: &impl Library, out: &mut Vec<Effect>) {
        let Some(Flight::Marked(topic, _)) = self.flight.remove(&number) else { return };
        self.flying.remove(&topic);
        let Ok(Topic::Node(node, _)) = Topic::parse(&topic) else { return };
        let subjects = [NodeSubject::Info, NodeSubject::State, NodeSubject::Online];
        if self.part == Part::Edge
            && self.nodes.len() <= BY_NAME
            && subjects.iter().all(|subject| library.get(&node.topic(*subject)).is_none())
        {
            // Also one from before a restart, whose orders the upstream's session asks for.
            self.nodes.remove(&node);
            out.push(Effect::Unsubscribe(vec![node.topic(NodeSubject::Cmd)]));
        }
    }

    fn down(&mut self, topic: String, payload: Bytes, retain: bool, id: u16, out: &mut Vec<Effect>) {
        let is_for_us = match (self.part, Topic::parse(&topic)) {
            // A retained order would be carried out at every start.
            (Part::Edge, Ok(Topic::Node(node, NodeSubject::Cmd | NodeSubject::Time))) => {
                !retain && self.nodes.contains(&node)
            }
            // What this gateway has yet to say counts before what it hears.
            (
                Part::Gateway,
                Ok(Topic::Node(_, NodeSubject::Info | NodeSubject::State | NodeSubject::Online)),
            ) => !self.marked.contains_key(&topic) && !self.flying.contains_key(&topic),
            _ => false,
        };
        match is_for_us {
            true => out.push(Effect::Hand { topic, payload, retain: self.part == Part::Gateway, id }),
            false if id > 0 => out.push(Effect::Acknowledge(id)),
            false => {}
        }
    }

    /// Sends and asks for as much as may be under way.
    fn send(&mut self, library: &impl Library, out: &mut Vec<Effect>) {
        if !self.is_connected {
            return;
        }
        while self.owed < SUBSCRIBES && !self.filters.is_empty() {
            let some = self.filters.len().min(SUBSCRIBE_FILTERS);
            out.push(Effect::Subscribe(self.filters.drain(..some).collect()));
            self.owed += 1;
        }
        while self.flight.len() < IN_FLIGHT {
            let (message, flight) = if let Some(message) = self.live.pop_front() {
                (message.clone(), Flight::Live(message))
            } else {
                // One message of a topic at a time, so that the last is the latest.
                let flying = &self.flying;
                let free = self.marked.iter().find(|(topic, _)| !flying.contains_key(*topic));
                let Some((topic, version)) = free.map(|(topic, version)| (topic.clone(), *version)) else {
                    return;
                };
                self.marked.remove(&topic);
                let kept = library.get(&topic);
                let sent = kept.as_ref().map_or(version, |kept| kept.version);
                self.flying.insert(topic.clone(), sent);
                self.seen = self.seen.max(sent);
                let payload = kept.map_or(Bytes::new(), |kept| kept.payload);
                (Message { topic: topic.clone(), payload, retain: true }, Flight::Marked(topic, version))
            };
            self.next += 1;
            self.flight.insert(self.next, flight);
            out.push(Effect::Send(self.next, message));
        }
    }
}

/// Whether what is said about a node under this subject goes up.
fn goes_up(part: Part, subject: NodeSubject) -> bool {
    match subject {
        NodeSubject::Info
        | NodeSubject::State
        | NodeSubject::Online
        | NodeSubject::Log
        | NodeSubject::Challenge => true,
        // Who asks a gateway to give an order asks the cluster.
        NodeSubject::Cmd | NodeSubject::Time => part == Part::Gateway,
    }
}

#[cfg(test)]
mod tests;
