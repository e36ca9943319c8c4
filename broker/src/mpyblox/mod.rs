//! Mpy-BLOX nodes, served unmodified.
//!
//! Mpy-BLOX installs what its channel lists, and much of what a list may hold makes it wait for ever or start
//! again for ever: a wheel that it does not have yet, a version that is not METADATA's, an empty file. Users
//! have it in the field and cannot change it, so a session that says by its `info` that it is such a node is
//! served a list that it can take:
//!
//! | the list has | the node gets |
//! |---|---|
//! | nothing that would hurt it | the list, byte for byte |
//! | an empty file, or a wheel for another platform | the list without it |
//! | a wheel that it does not have | what it has, then the wheel once, under another's name |
//! | an upgrade of a wheel with folders in its dist-info | the same; first the old one gets another name |
//! | a wheel that it cannot install, or did not in [`plan::ATTEMPTS`] tries | what it has |
//! | a rollout in which it is not its turn | what it has |
//! | what it installed [`history::LOOP`] times within an hour | what it has, until it is freed |
//! | packages that it took without starting again | what it has, until it is freed |
//!
//! Whose turn it is in a rollout such a node cannot tell; the broker does, whenever it serves the list. A release that waits
//! for an order waits for an `install` on its `cmd`.
//!
//! A new list frees a node, and so does a `check` that an operator sends to its `cmd` while it is connected.
//! When it has all wheels that were new to it, it gets the list as it is. A node that no longer finds
//! packages, since an upgrade left half a dist-info folder behind, gets the texts that are missing there.
//!
//! What is sent once goes out on the channel, not retained and to that session alone, after a list that has
//! nothing to do: so the device has booted whatever becomes of it, and a device that is not to update by
//! itself only logs it. That an entry was left out, and why, is in the log, in the metrics, in
//! `$SYS/broker/mpyblox/` and in the node's retained `state`, which the broker writes for such nodes
//! (`"by":"broker"`, with the channel).
//!
//! Nothing of this is kept when the broker stops: what was tried may then be tried as often again, and a node
//! that was wedged before, by somebody else or while the broker was away, is not recognised.
//!
//! What is inferred of Mpy-BLOX beyond what it documents, from its source: that it finds its packages by
//! reading one dist-info folder after the other, and ends at the first in which METADATA, WHEEL or RECORD
//! cannot be read; that an upgrade removes its predecessor's folder last; that a package's name is what its
//! METADATA says.
//!
//! | module | holds |
//! |---|---|
//! | [`plan`] | policy: list, node and history in, what to serve out |
//! | [`wheel`] | a wheel as Mpy-BLOX reads it |
//! | [`survey`] | a list with what the index knows of its wheels |
//! | [`history`] | what is remembered of nodes |

pub mod history;
pub mod plan;
pub mod survey;
pub mod wheel;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::{
    Digest, Entry, FilePath, NodeId, UpdateList, limits,
    list::Command,
    node::{Info, State},
    package::PACKAGES as PACKAGE_TOPICS,
    topic::{CHANNELS, NodeSubject},
};

use tokio::sync::{Semaphore, SemaphorePermit};

use self::{
    history::Histories,
    plan::{Device, Known, PACKAGES, Plan, Serve},
    survey::{Library, Survey},
};
use crate::{
    clock::Now,
    index::{Index, IndexError},
    message::{Message, Payload},
    packet::{Properties, Qos},
};

/// How nodes may stand that are not simply served: the words of [`plan::Verdict`].
pub const WORDS: [&str; 5] = ["delivering", "left-out", "held-back", "looping", "stuck"];

/// What all connections of such nodes share.
#[derive(Debug, Default)]
pub struct Desk {
    /// Held to look at one list or wheel: so that many nodes at once make us read it once.
    library: Mutex<Library>,
    /// Held to look up or note a few values.
    histories: Mutex<Histories>,
    /// Places for those who look.
    looking: Looking,
}

/// Lists that are looked at at once: each takes a thread.
#[derive(Debug)]
struct Looking(Semaphore);

impl Default for Looking {
    fn default() -> Looking {
        /// More would wait for the same lock.
        const AT_ONCE: usize = 4;
        Looking(Semaphore::new(AT_ONCE))
    }
}

/// A session of such a node.
#[derive(Debug)]
pub struct Seat {
    node: NodeId,
    info: Info,
    device: Device,
    /// What was sent last, of which packages may be fetched.
    sent: Option<Sent>,
    /// Since when the node has fetched all that it asked for so far.
    fetched: Option<Instant>,
    /// Files that no topic has, by their topics.
    files: Vec<(String, Bytes)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    List(Digest),
    Errand(Digest),
}

/// What a session gets for a list.
#[derive(Debug)]
pub struct Served {
    /// The list, in place of the one published.
    pub message: Message,
    /// Whether it is another one.
    pub is_adapted: bool,
    /// What follows it, once.
    pub errand: Option<Message>,
    /// What the node's state becomes, if it changes.
    pub state: Option<Bytes>,
}

impl Device {
    /// What an info says, if it is that of a Mpy-BLOX node. One with more packages than such a device can
    /// hold, or with longer names, is none.
    #[must_use]
    pub fn of(info: &[u8]) -> Option<Device> {
        let info = Info::parse(info).ok().filter(Info::is_mpyblox)?;
        let is_short = |text: &String| text.len() <= limits::TEXT;
        let versions = info.versions;
        let is_plausible = versions.len() <= PACKAGES
            && versions.iter().all(|(name, version)| is_short(name) && is_short(version))
            && is_short(&info.uname.sysname);
        is_plausible.then(|| Device { sysname: info.uname.sysname, versions, lost: BTreeMap::new() })
    }
}

impl Desk {
    /// Takes what a client says of itself on its own `info`. None if it is no Mpy-BLOX node.
    ///
    /// # Errors
    /// The index fails.
    pub fn sit_down(
        &self,
        client_id: &str,
        info: &[u8],
        index: &Index,
        now: Now,
    ) -> Result<Option<Box<Seat>>, IndexError> {
        let (Some(mut device), Ok(node), Ok(info)) =
            (Device::of(info), NodeId::new(client_id), Info::parse(info))
        else {
            return Ok(None);
        };
        let before = match index.get(&node.topic(NodeSubject::Info), now.unix_ms)? {
            Some(message) => Device::of(&index.payload(&message.payload)?),
            None => None,
        };
        self.histories().start(&node, &mut device, before.as_ref(), now.unix_ms);
        if !device.lost.is_empty() {
            let lost: Vec<_> = device.lost.keys().collect();
            tracing::warn!(%node, ?lost, "a Mpy-BLOX node no longer finds packages that it had");
        }
        Ok(Some(Box::new(Seat { node, info, device, sent: None, fetched: None, files: Vec::new() })))
    }

    /// A place to call [`Desk::serve`]; none if the broker stops.
    pub async fn place(&self) -> Option<SemaphorePermit<'_>> {
        self.looking.0.acquire().await.ok()
    }

    /// The digest that a channel's list gives for a file.
    ///
    /// # Errors
    /// The index fails.
    pub fn digest(
        &self,
        index: &Index,
        list: &Message,
        path: &FilePath,
    ) -> Result<Option<Digest>, IndexError> {
        let mut library = self.library.lock().unwrap_or_else(PoisonError::into_inner);
        let list = library.list(index, &list.payload)?;
        Ok(list.and_then(|(_, list)| {
            list.entries().iter().find_map(|entry| match entry {
                Entry::Src(src) if src.path == *path => Some(src.digest),
                _ => None,
            })
        }))
    }

    /// What `seat` gets for a channel's list. Reads the index, and perhaps many wheels there: not for the
    /// threads of the network.
    ///
    /// # Errors
    /// The index fails.
    pub fn serve(
        &self,
        seat: &mut Seat,
        message: Message,
        index: &Index,
        now: Now,
    ) -> Result<Served, IndexError> {
        let plain = |message| Ok(Served { message, is_adapted: false, errand: None, state: None });
        let (survey, known, lost) = {
            let mut library = self.library.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(survey) = library.survey(index, &message.payload, now.unix_ms)? else {
                return plain(message);
            };
            let known = library.find(index, &changing(&survey, &seat.device), now.unix_ms)?;
            let lost = library.find(index, &seat.device.lost, now.unix_ms)?;
            (survey, known, lost)
        };
        let Plan { serve, errand, verdict } = self.plan(seat, &survey, &known, &lost, now);
        let is_adapted = serve != Serve::AsItIs;
        let message = match serve {
            Serve::AsItIs => message,
            Serve::Adapted(list) => Message { payload: Payload::Inline(list), ..message },
        };
        seat.sent = Some(Sent::List(survey.digest));
        seat.fetched = None;
        seat.files.clear();
        let errand = errand.map(|errand| {
            seat.sent = Some(Sent::Errand(errand.key));
            seat.files = errand.files;
            Message {
                topic: message.topic.clone(),
                payload: Payload::Inline(errand.list),
                qos: Qos::AtMostOnce,
                retain: false,
                properties: Properties::default(),
                expires_ms: None,
                origin: None,
                version: 0,
            }
        });
        let channel = message.topic.strip_prefix(CHANNELS).unwrap_or_default();
        let state = self.state(seat, &verdict.state(&survey.list, channel), index, now)?;
        Ok(Served { message, is_adapted, errand, state })
    }

    fn plan(&self, seat: &Seat, survey: &Survey, known: &Known, lost: &Known, now: Now) -> Plan {
        let mut histories = self.histories();
        let mut none = history::History::default();
        let history = match histories.find(&seat.node) {
            Some(history) => history,
            None => &mut none,
        };
        history.begin(survey.digest);
        let wall = i64::try_from(now.unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let ordered = history.ordered == Some(survey.digest);
        let plan = match plan::is_turn(&survey.list, seat.node.as_str(), &seat.info, wall, ordered) {
            true => plan::plan(survey, &seat.device, history, known, lost),
            false => plan::wait(survey, &seat.device),
        };
        let (word, said) = match plan.verdict.text() {
            Some(text) => (plan.verdict.word(), Some(Digest::of(text.as_bytes()))),
            None => ("", None),
        };
        if let Some(text) = plan.verdict.text().filter(|_| history.said != said) {
            tracing::warn!(node = %seat.node, "Mpy-BLOX, {text}");
        }
        if plan.errand.is_some() || history.said != said {
            let history = histories.of(&seat.node);
            history.begin(survey.digest);
            (history.word, history.said) = (word, said);
            if let Some(errand) = &plan.errand {
                history.deliver(errand.key);
            }
        }
        plan
    }

    /// The node's new state, if there is one to tell: the broker speaks for nodes that have none of their
    /// own.
    fn state(
        &self,
        seat: &Seat,
        state: &State,
        index: &Index,
        now: Now,
    ) -> Result<Option<Bytes>, IndexError> {
        let state = state.to_bytes();
        let Some(present) = index.get(&seat.node.topic(NodeSubject::State), now.unix_ms)? else {
            return Ok(Some(state.into()));
        };
        let present = index.payload(&present.payload)?;
        let is_ours = State::parse(&present)
            .is_ok_and(|state| state.extra.get(plan::WRITER).is_some_and(|by| by == plan::BROKER));
        Ok((is_ours && present != state).then(|| state.into()))
    }

    /// Takes note that the node asks for a package.
    pub fn fetch(&self, seat: &mut Seat, now: Instant) {
        seat.fetched = Some(now);
        let mut histories = self.histories();
        match seat.sent {
            Some(Sent::List(list)) => {
                let history = histories.of(&seat.node);
                history.begin(list);
                history.fetch();
            }
            Some(Sent::Errand(_)) => histories.of(&seat.node).took = true,
            None => {}
        }
    }

    /// Takes note that the node fetched packages and is still there, long after it should have started again.
    pub fn stick(&self, seat: &mut Seat) {
        seat.fetched = None;
        let mut histories = self.histories();
        let history = histories.of(&seat.node);
        match seat.sent.take() {
            Some(Sent::List(list)) => history.stuck = Some(list),
            Some(Sent::Errand(key)) => history.give_up(key),
            None => {}
        }
    }

    /// Takes an order that an operator sends to the node's `cmd`; says whether to read the channel again.
    pub fn order(&self, seat: &Seat, list: &[u8]) -> bool {
        let Ok(list) = UpdateList::parse(list) else { return false };
        let is = |wanted| {
            list.entries().iter().any(|entry| matches!(entry, Entry::Command(found, _) if *found == wanted))
        };
        let (check, install) = (is(Command::Check), is(Command::Install));
        if check && let Some(history) = self.histories().find(&seat.node) {
            history.forgive();
        }
        if install && let Some(Sent::List(list)) = seat.sent {
            let mut histories = self.histories();
            let history = histories.of(&seat.node);
            history.begin(list);
            history.ordered = Some(list);
        }
        check || install
    }

    /// How many nodes stand how, but for those that are simply served.
    #[must_use]
    pub fn words(&self) -> [u64; WORDS.len()] {
        let words = self.histories().words();
        WORDS.map(|word| words.get(word).copied().unwrap_or_default())
    }

    fn histories(&self) -> MutexGuard<'_, Histories> {
        self.histories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Packages of the device that the list would change, with the versions that it has.
fn changing(survey: &Survey, device: &Device) -> BTreeMap<String, String> {
    let mut changing = BTreeMap::new();
    for candidates in survey.packages() {
        for (_, wheel) in &candidates {
            if let Some(version) = device.versions.get(&wheel.name)
                && (*version != wheel.version || candidates.len() > 1)
            {
                changing.insert(wheel.name.clone(), version.clone());
            }
        }
    }
    changing
}

impl Seat {
    /// What a topic is to such a node.
    #[must_use]
    pub fn meaning(&self, topic: &str) -> Meaning {
        if topic.starts_with(CHANNELS) {
            Meaning::List
        } else if topic.starts_with(PACKAGE_TOPICS) {
            Meaning::Package
        } else if topic == self.node.topic(NodeSubject::Cmd) {
            Meaning::Order
        } else {
            Meaning::Nothing
        }
    }

    /// A file that is only for this session.
    #[must_use]
    pub fn file(&self, topic: &str) -> Option<Message> {
        let (topic, content) = self.files.iter().find(|(name, _)| name == topic)?;
        Some(Message {
            topic: topic.as_str().into(),
            payload: Payload::Inline(content.clone()),
            qos: Qos::AtMostOnce,
            retain: true,
            properties: Properties::default(),
            expires_ms: None,
            origin: None,
            version: 0,
        })
    }

    /// When the node should have started again, if it fetched packages and may take so long.
    #[must_use]
    pub fn due(&self, patience: Duration) -> Option<Instant> {
        self.fetched.map(|fetched| fetched + patience)
    }

    /// Takes note that the node has yet to get what it asked for.
    pub fn still_fetches(&mut self, now: Instant) {
        self.fetched = Some(now);
    }

    /// The node's topic for `subject`.
    #[must_use]
    pub fn topic(&self, subject: NodeSubject) -> String {
        self.node.topic(subject)
    }
}

/// What a topic is to a Mpy-BLOX node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// A channel's list.
    List,
    /// A package.
    Package,
    /// What an operator tells it.
    Order,
    /// Nothing.
    Nothing,
}

/// Shared by all connections.
pub type SharedDesk = Arc<Desk>;
