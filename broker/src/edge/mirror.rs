//! Policy of the mirror: what to fetch of what the upstream retains, and when to keep it.
//!
//! A list that comes is put aside until every package it names is in the index, and every package of the release that it
//! gives to empty nodes, its `base`; then it is kept. Packages are asked for a few at a time; one that does not come is
//! asked for again, later and later, while its list waits. A newer list takes the place of one that waits.
//!
//! | what comes | what becomes of it |
//! |---|---|
//! | a list with a lower number than the channel had | left, and said so |
//! | another list with the number that the channel had | left, and said so: a number never comes twice. A [gateway](Part::Gateway) shows what there is, and says so |
//! | a list that its keys do not vouch for | waits: the root that lets its key sign may be on its way |
//! | nothing, where there was a list | the channel keeps what it has: a broker that forgot is no order |
//! | an empty message on a channel, live | the channel is cleared, as there |
//! | a root | kept after the one before it |
//!
//! No I/O and no clock: events and time in, effects out.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Digest, Root, Topic, Trust, UpdateList, limits,
    list::Piece,
    rollout::Rollout,
    root::{self, SignedRoot},
    topic::{CHANNELS, ROOTS},
};

use super::{
    Hours, Part, includes,
    memory::{Number, Taken},
};
use crate::access::Channels;

/// Packages asked for at once.
pub const FETCHES: usize = 8;
/// Bytes of packages asked for at once, as far as lists tell; a larger package is asked for alone.
pub const FETCH_BYTES: u64 = 16 * 1024 * 1024;
/// How long nothing may come at all while a package is owed.
pub const ANSWER: Duration = Duration::from_secs(15);
/// The slowest line that a package is waited for on while other things come, in bytes per second.
pub const SLOWEST: u64 = 1024;
/// After how long a package that did not come is asked for again the first time; each time twice as long.
pub const AGAIN: Duration = Duration::from_secs(2);
/// The longest such time.
pub const AGAIN_MOST: Duration = Duration::from_secs(300);
/// How often what only empty nodes need is asked for before its list goes without.
pub const BASE_TRIES: u32 = 4;
/// After how long a list that was refused is tried again.
pub const HELD: Duration = Duration::from_secs(60);
/// How often is looked whether all that lists name is still there.
pub const LOOK: Duration = Duration::from_secs(3600);
/// How often the upstream is asked again for all lists: what it owed when a node of its cluster died, the others do not bring.
pub const ASK: Duration = Duration::from_secs(300);
/// How long nothing comes before what came is taken for all.
pub const QUIET: Duration = Duration::from_secs(1);
/// Roots that wait for one before them.
const ROOTS_WAITING: usize = 64;

/// What is mirrored.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which channels.
    pub channels: Channels,
    /// Whose signatures count, if not those of whoever can write upstream.
    pub pin: Option<Root>,
    /// When packages are fetched, if not always.
    pub hours: Option<Hours>,
    /// For whom.
    pub part: Part,
}

/// One moment.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Since the start.
    pub now: Duration,
    /// The time of day, in milliseconds since 1970.
    pub unix_ms: u64,
}

/// What is in the index.
pub trait Library {
    /// Whether something is retained on a topic.
    fn has(&self, topic: &str) -> bool;

    /// What is retained on a topic.
    fn get(&self, topic: &str) -> Option<Bytes>;

    /// Whether a package, or a chunk of one, is retained, with its own bytes.
    fn holds(&self, piece: &Piece) -> bool;
}

/// What happens.
#[derive(Debug, Clone)]
pub enum Event {
    /// There is a connection, on which nothing is subscribed to.
    Connected,
    /// There is none any more.
    Lost,
    /// So many filters were answered, of which these are not granted.
    Subscribed {
        /// Answered.
        filters: usize,
        /// Not granted.
        refused: Vec<String>,
    },
    /// The upstream's message on a topic.
    Message {
        /// The topic.
        topic: String,
        /// The message.
        payload: Bytes,
    },
    /// What became of something that was to be kept.
    Settled {
        /// Its topic.
        topic: String,
        /// Or why the index did not take it.
        result: Result<(), String>,
    },
    /// Time has passed; so many bytes have come since the start.
    Tick {
        /// Bytes.
        heard: u64,
    },
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Subscribe upstream, at QoS 0.
    Subscribe(Vec<String>),
    /// Unsubscribe upstream.
    Unsubscribe(String),
    /// Keep a message; answered by [`Event::Settled`].
    Keep {
        /// Its topic.
        topic: String,
        /// The message.
        payload: Bytes,
    },
    /// Clear what a channel retains.
    Clear(String),
    /// A channel's list was kept, or is the present one already.
    Took(ChannelName, Taken),
    /// Say something to people.
    Tell(Tell),
}

/// What people are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tell {
    /// How it goes.
    News(String),
    /// What does not go.
    Trouble(String),
}

/// How a channel stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The channel.
    pub channel: ChannelName,
    /// The sequence of its release here, if it has one.
    pub sequence: Option<u64>,
    /// The sequence of the release that is on its way, if one is.
    pub coming: Option<u64>,
    /// What it still lacks.
    pub missing: usize,
    /// Bytes of it, as far as lists tell.
    pub bytes: u64,
    /// Why it is held back, if it is.
    pub held: Option<String>,
}

/// The mirror.
#[derive(Debug)]
pub struct Mirror {
    options: Options,
    /// The newest root that follows from the pinned one.
    trusted: Option<Root>,
    is_connected: bool,
    /// Filters that were not answered.
    owed: usize,
    taken: BTreeMap<ChannelName, Taken>,
    /// Why the upstream's list of a channel was left.
    left: BTreeMap<ChannelName, String>,
    /// Lists that are not kept yet.
    coming: BTreeMap<ChannelName, Coming>,
    /// Lists that the index has not settled yet.
    keeping: BTreeMap<ChannelName, Bytes>,
    /// By topic.
    fetches: BTreeMap<String, Fetch>,
    /// Roots that came and were not kept yet.
    roots: BTreeMap<u64, Bytes>,
    heard: (u64, Duration),
    looked: Duration,
    asked: Duration,
    is_whole: bool,
}

/// A list on its way.
#[derive(Debug)]
struct Coming {
    payload: Bytes,
    list: UpdateList,
    missing: Lacks,
    base: Base,
    stage: Stage,
}

/// The release for empty nodes that a list names.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Base {
    /// There is none, or all of it is here, or it is not to be had.
    Settled,
    /// Its list is not here.
    Wanted(String),
    /// Its list is here; these of its packages are not.
    Lacks(Lacks),
}

/// Packages, or chunks of them, that are not here, by their topics.
type Lacks = BTreeMap<String, Lack>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lack {
    digest: Digest,
    size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// It waits for packages, or for the index.
    Gathering,
    /// It was refused, and is tried again.
    Held { why: String, since: Duration },
}

/// Something asked for.
#[derive(Debug, Clone, Copy)]
struct Fetch {
    size: u64,
    tries: u32,
    stage: Asked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// Upstream.
    Since(Duration),
    /// It came, and the index has it.
    Came,
    /// It did not come, and is asked for again then.
    Again(Duration),
}

impl Mirror {
    /// A mirror that has had `taken` releases, over what `library` has.
    #[must_use]
    pub fn new(options: Options, mut taken: BTreeMap<ChannelName, Taken>, library: &impl Library) -> Mirror {
        for (channel, taken) in &mut taken {
            if let Some(here) = present(library, channel).filter(|here| here.number >= taken.number) {
                *taken = here;
            }
        }
        let mut trusted = options.pin.clone();
        while let Some(root) = &trusted {
            let version = root.version().saturating_add(1);
            let next = library.get(&root::topic(version)).and_then(|bytes| SignedRoot::parse(&bytes).ok());
            match next.and_then(|next| root.next(version, next).ok()) {
                Some(next) => trusted = Some(next),
                None => break,
            }
        }
        Mirror {
            options,
            trusted,
            is_connected: false,
            owed: 0,
            taken,
            left: BTreeMap::new(),
            coming: BTreeMap::new(),
            keeping: BTreeMap::new(),
            fetches: BTreeMap::new(),
            roots: BTreeMap::new(),
            heard: (0, Duration::ZERO),
            looked: Duration::ZERO,
            asked: Duration::ZERO,
            is_whole: false,
        }
    }

    /// Takes an event.
    pub fn handle(&mut self, moment: Moment, event: Event, library: &impl Library) -> Vec<Effect> {
        let mut out = Vec::new();
        match event {
            Event::Connected => self.connected(moment, &mut out),
            Event::Lost => {
                self.is_connected = false;
                // What was asked for is asked for again; what came is on its way into the index.
                self.fetches.retain(|_, fetch| !matches!(fetch.stage, Asked::Since(_)));
            }
            Event::Subscribed { filters, refused } => {
                self.owed = self.owed.saturating_sub(filters);
                for filter in refused {
                    self.refused(moment, &filter, &mut out);
                }
            }
            Event::Message { topic, payload } => self.message(moment, &topic, payload, library, &mut out),
            Event::Settled { topic, result } => self.settled(moment, &topic, result, library, &mut out),
            Event::Tick { heard } => self.tick(moment, heard, library, &mut out),
        }
        self.schedule(moment, &mut out);
        out
    }

    /// Whether all that the upstream has was taken, or is held back for a reason, since this mirror began.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whether time matters within the next second.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.is_connected && (!self.is_whole || !self.fetches.is_empty() || !self.coming.is_empty())
    }

    /// How each channel stands.
    #[must_use]
    pub fn standings(&self) -> Vec<Standing> {
        let names: BTreeSet<_> =
            self.taken.keys().chain(self.coming.keys()).chain(self.left.keys()).collect();
        let standing = |channel: &ChannelName| {
            let coming = self.coming.get(channel);
            Standing {
                channel: channel.clone(),
                sequence: self.taken.get(channel).map(|taken| taken.number.sequence),
                coming: coming.and_then(|coming| Some(number_of(&coming.list)?.sequence)),
                missing: coming.map_or(0, |coming| coming.lacks().count()),
                bytes: coming.map_or(0, |coming| coming.lacks().map(|(_, size)| size).sum()),
                held: match coming.map(|coming| &coming.stage) {
                    Some(Stage::Held { why, .. }) => Some(why.clone()),
                    _ => self.left.get(channel).cloned(),
                },
            }
        };
        names.into_iter().map(standing).collect()
    }

    fn connected(&mut self, moment: Moment, out: &mut Vec<Effect>) {
        self.is_connected = true;
        self.heard.1 = moment.now;
        self.owed = 0;
        self.ask(moment, out);
    }

    /// Asks for roots and lists.
    fn ask(&mut self, moment: Moment, out: &mut Vec<Effect>) {
        self.asked = moment.now;
        let mut filters = vec![format!("{ROOTS}+")];
        match &self.options.channels {
            Channels::All => filters.push(format!("{CHANNELS}+")),
            Channels::Only(names) => filters.extend(names.iter().map(ChannelName::topic)),
        }
        self.owed += filters.len();
        out.extend(filters.chunks(limits::SUBSCRIBE_FILTERS).map(|some| Effect::Subscribe(some.to_vec())));
    }

    fn refused(&mut self, moment: Moment, filter: &str, out: &mut Vec<Effect>) {
        if self.fetches.contains_key(filter) {
            self.did_not_come(moment, filter, out);
        }
        out.push(trouble(format!("the upstream does not let this edge read `{filter}`")));
    }

    fn message(
        &mut self,
        moment: Moment,
        topic: &str,
        payload: Bytes,
        library: &impl Library,
        out: &mut Vec<Effect>,
    ) {
        match Topic::parse(topic) {
            Ok(Topic::Channel(channel)) if includes(&self.options.channels, &channel) => {
                self.left.remove(&channel);
                self.list(moment, channel, payload, library, out);
            }
            Ok(Topic::Root(version))
                if (1..=limits::ROOT).contains(&payload.len())
                    && self.roots.len() < ROOTS_WAITING
                    && !library.has(topic) =>
            {
                self.roots.insert(version, payload);
                self.next_root(library, out);
            }
            Ok(found @ (Topic::Package(_) | Topic::Chunk(..) | Topic::History(..)))
                if !payload.is_empty() =>
            {
                if !self.fetches.get(topic).is_some_and(|fetch| matches!(fetch.stage, Asked::Since(_))) {
                    return;
                }
                out.push(Effect::Unsubscribe(topic.to_owned()));
                // The index knows a package by its topic; a chunk is known by the list alone.
                let digest = matches!(found, Topic::Chunk(..)).then(|| Digest::of(&payload));
                let mut lacks = self.coming.values().filter_map(|coming| coming.lack(topic));
                if digest.is_some_and(|digest| lacks.all(|lack| lack.digest != digest)) {
                    let why = "has other bytes upstream than the list says: asked for again later";
                    out.push(trouble(format!("`{topic}` {why}")));
                    return self.did_not_come(moment, topic, out);
                }
                if let Some(fetch) = self.fetches.get_mut(topic) {
                    fetch.stage = Asked::Came;
                }
                out.push(Effect::Keep { topic: topic.to_owned(), payload });
            }
            _ => {}
        }
    }

    fn list(
        &mut self,
        moment: Moment,
        channel: ChannelName,
        payload: Bytes,
        library: &impl Library,
        out: &mut Vec<Effect>,
    ) {
        let has_some = library.has(&channel.topic());
        if payload.is_empty() {
            self.coming.remove(&channel);
            if has_some {
                out.push(Effect::Clear(channel.topic()));
                out.push(news(format!("channel `{channel}` was cleared upstream")));
            }
            return;
        }
        let list = match UpdateList::parse(&payload) {
            Ok(list) if payload.len() <= limits::LIST => list,
            Ok(_) => return out.push(trouble(format!("the list of `{channel}` is too large"))),
            Err(error) => {
                return out.push(trouble(format!("`{channel}` has no update list upstream: {error}")));
            }
        };
        // What our brokers answer for a channel that nobody has published to.
        if list.entries().is_empty() && !has_some {
            return;
        }
        let number = number_of(&list);
        if !self.may_come(&channel, number, &payload, library, out) {
            return;
        }
        let waiting = self.coming.get(&channel);
        if waiting
            .is_some_and(|waiting| waiting.payload == payload && !matches!(waiting.stage, Stage::Held { .. }))
            || waiting.is_some_and(|waiting| number_of(&waiting.list) > number)
        {
            return;
        }
        let missing = lacking(&list, library);
        let base = match base_of(&list, &channel) {
            Some(topic) => base(topic, library),
            None => Base::Settled,
        };
        self.coming.insert(channel.clone(), Coming { payload, list, missing, base, stage: Stage::Gathering });
        self.advance(moment, &channel, library, out);
    }

    /// Whether a list with this number may follow what the channel had; says so if not.
    fn may_come(
        &mut self,
        channel: &ChannelName,
        number: Option<Number>,
        payload: &[u8],
        library: &impl Library,
        out: &mut Vec<Effect>,
    ) -> bool {
        let Some(before) = self.taken.get(channel).copied().or_else(|| present(library, channel)) else {
            return true;
        };
        let had = shown(before.number);
        let why = match number {
            Some(number) if number > before.number => return true,
            Some(number) if number == before.number => {
                if before.list.is_none_or(|list| list == Digest::of(payload)) {
                    return true;
                }
                let why = format!(
                    "the upstream has another list as {had} of `{channel}` than it had: publish it under a higher number"
                );
                if self.options.part == Part::Gateway {
                    out.push(trouble(why));
                    return true;
                }
                why
            }
            found => {
                let found = found.map_or("no release".to_owned(), shown);
                format!("the upstream has {found} of `{channel}`, which had {had}: left alone")
            }
        };
        out.push(trouble(why.clone()));
        self.left.insert(channel.clone(), why);
        false
    }

    /// Keeps a list if nothing that it names is missing.
    fn advance(
        &mut self,
        moment: Moment,
        channel: &ChannelName,
        library: &impl Library,
        out: &mut Vec<Effect>,
    ) {
        let Some(coming) = self.coming.get_mut(channel) else { return };
        let is_held = matches!(coming.stage, Stage::Held { .. }) || self.keeping.contains_key(channel);
        if is_held || coming.lacks().next().is_some() || coming.wants().is_some() {
            return;
        }
        if library.get(&channel.topic()).is_some_and(|present| present == coming.payload) {
            if let Some(taken) = taken_of(&coming.list, &coming.payload) {
                self.taken.insert(channel.clone(), taken);
                out.push(Effect::Took(channel.clone(), taken));
            }
            self.coming.remove(channel);
            return;
        }
        // While this one came, another with its number may have been kept.
        let (number, payload) = (number_of(&coming.list), coming.payload.clone());
        if self.options.part == Part::Edge && !self.may_come(channel, number, &payload, library, out) {
            self.coming.remove(channel);
            return;
        }
        let Some(coming) = self.coming.get_mut(channel) else { return };
        if let Some(root) = &self.trusted {
            let now = i64::try_from(moment.unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
            if let Err(error) = Trust::Root(root.clone().into()).verify(channel, &coming.payload, now) {
                return hold(coming, channel, moment, error.to_string(), out);
            }
        }
        self.keeping.insert(channel.clone(), coming.payload.clone());
        out.push(Effect::Keep { topic: channel.topic(), payload: coming.payload.clone() });
    }

    fn settled(
        &mut self,
        moment: Moment,
        topic: &str,
        result: Result<(), String>,
        library: &impl Library,
        out: &mut Vec<Effect>,
    ) {
        match (Topic::parse(topic), result) {
            (Ok(Topic::Channel(channel)), result) => {
                let kept = self.keeping.remove(&channel).unwrap_or_default();
                let is_newest = self.coming.get(&channel).is_some_and(|coming| coming.payload == kept);
                match result {
                    Ok(()) => {
                        let list = UpdateList::parse(&kept).ok();
                        match list.and_then(|list| taken_of(&list, &kept)) {
                            Some(taken) => {
                                self.taken.insert(channel.clone(), taken);
                                out.push(Effect::Took(channel.clone(), taken));
                                let release = shown(taken.number);
                                out.push(news(format!("`{channel}` has {release} of the upstream")));
                            }
                            None => out.push(news(format!("`{channel}` has the upstream's list"))),
                        }
                        if is_newest {
                            self.coming.remove(&channel);
                        }
                    }
                    Err(why) => {
                        if let Some(coming) = self.coming.get_mut(&channel).filter(|_| is_newest) {
                            hold(coming, &channel, moment, why, out);
                        }
                    }
                }
                self.advance(moment, &channel, library, out);
            }
            (Ok(Topic::Root(version)), result) => {
                let payload = self.roots.remove(&version);
                match result {
                    Ok(()) => {
                        out.push(news(format!("root of trust {version} came from upstream")));
                        self.follow(version, payload);
                        self.retry(moment, library, out);
                        self.next_root(library, out);
                    }
                    Err(why) => out.push(trouble(format!("root {version} of the upstream: {why}"))),
                }
            }
            (_, Ok(())) => {
                self.fetches.remove(topic);
                for coming in self.coming.values_mut() {
                    coming.missing.remove(topic);
                    match &mut coming.base {
                        Base::Wanted(wanted) if wanted == topic => {
                            coming.base = base(topic.to_owned(), library);
                        }
                        Base::Lacks(lacks) => drop(lacks.remove(topic)),
                        _ => {}
                    }
                }
                self.advance_all(moment, library, out);
            }
            (found, Err(why)) => {
                let why = format!("what the upstream has as `{topic}` was not kept: {why}");
                out.push(trouble(why.clone()));
                self.did_not_come(moment, topic, out);
                // Somebody cut the package anew up there: it may be a long time until this can be had.
                if matches!(found, Ok(Topic::Chunk(..))) {
                    let needs = |coming: &&mut Coming| coming.missing.contains_key(topic);
                    for coming in self.coming.values_mut().filter(needs) {
                        coming.stage = Stage::Held { why: why.clone(), since: moment.now };
                    }
                }
                self.advance_all(moment, library, out);
            }
        }
    }

    fn advance_all(&mut self, moment: Moment, library: &impl Library, out: &mut Vec<Effect>) {
        let channels: Vec<_> = self.coming.keys().cloned().collect();
        for channel in channels {
            self.advance(moment, &channel, library, out);
        }
    }

    /// Keeps the root after the newest, if it has come and may be believed.
    fn next_root(&mut self, library: &impl Library, out: &mut Vec<Effect>) {
        while let Some((&version, payload)) = self.roots.first_key_value() {
            let topic = root::topic(version);
            if library.has(&topic) {
                self.roots.remove(&version);
                continue;
            }
            if version > 1 && !library.has(&root::topic(version - 1)) {
                return;
            }
            if let Err(why) = self.may_follow(version, payload) {
                out.push(trouble(format!("root {version} of the upstream is not believed: {why}")));
                self.roots.clear();
                return;
            }
            // One at a time: the next is looked at when this one is kept.
            return out.push(Effect::Keep { topic, payload: payload.clone() });
        }
    }

    fn may_follow(&self, version: u64, payload: &[u8]) -> Result<(), String> {
        let Some(trusted) = &self.trusted else { return Ok(()) };
        let root = SignedRoot::parse(payload).map_err(|error| error.to_string())?;
        match &self.options.pin {
            Some(pin) if version == pin.version() => match root.covered() == pin_covered(pin) {
                true => Ok(()),
                false => Err("it is not the one that is pinned".to_owned()),
            },
            // Those before the pinned one lead to it, which the index checks.
            Some(pin) if version < pin.version() => Ok(()),
            _ => trusted.next(version, root).map(drop).map_err(|error| error.to_string()),
        }
    }

    fn follow(&mut self, version: u64, payload: Option<Bytes>) {
        let root = payload.and_then(|payload| SignedRoot::parse(&payload).ok());
        if let (Some(trusted), Some(root)) = (&self.trusted, root)
            && let Ok(next) = trusted.next(version, root)
        {
            self.trusted = Some(next);
        }
    }

    /// Tries again what was held back.
    fn retry(&mut self, moment: Moment, library: &impl Library, out: &mut Vec<Effect>) {
        for coming in self.coming.values_mut() {
            if let Stage::Held { .. } = coming.stage {
                coming.stage = Stage::Gathering;
            }
        }
        self.advance_all(moment, library, out);
    }

    fn tick(&mut self, moment: Moment, heard: u64, library: &impl Library, out: &mut Vec<Effect>) {
        let now = moment.now;
        if heard != self.heard.0 {
            self.heard = (heard, now);
        }
        let quiet = now.saturating_sub(self.heard.1);
        if self.is_connected {
            let late = self.fetches.iter().filter(|(_, fetch)| fetch.is_late(now, quiet));
            let late: Vec<String> = late.map(|(topic, _)| topic.clone()).collect();
            for topic in late {
                out.push(Effect::Unsubscribe(topic.clone()));
                out.push(trouble(format!("`{topic}` does not come from upstream: asked for again later")));
                self.did_not_come(moment, &topic, out);
            }
            if now >= self.asked + ASK {
                self.ask(moment, out);
            }
        }
        let is_due =
            |coming: &Coming| matches!(&coming.stage, Stage::Held { since, .. } if now >= *since + HELD);
        if self.coming.values().any(is_due) {
            self.retry(moment, library, out);
        }
        if now >= self.looked + LOOK {
            self.looked = now;
            for channel in self.taken.keys().cloned().collect::<Vec<_>>() {
                if let Some(payload) = library.get(&channel.topic()) {
                    self.list(moment, channel, payload, library, out);
                }
            }
        }
        self.advance_all(moment, library, out);
        let is_still = self.is_connected && self.owed == 0 && quiet >= QUIET && self.roots.is_empty();
        let is_held = |coming: &Coming| matches!(coming.stage, Stage::Held { .. });
        self.is_whole |= is_still && self.coming.values().all(is_held);
    }

    /// Asks for something again later; what only empty nodes need is given up in the end.
    fn did_not_come(&mut self, moment: Moment, topic: &str, out: &mut Vec<Effect>) {
        let Some(fetch) = self.fetches.get_mut(topic) else { return };
        fetch.tries += 1;
        let pause = AGAIN.saturating_mul(1 << fetch.tries.min(16)) / 2;
        fetch.stage = Asked::Again(moment.now + pause.min(AGAIN_MOST));
        if fetch.tries < BASE_TRIES {
            return;
        }
        for (channel, coming) in &mut self.coming {
            let is_of_base = match &coming.base {
                Base::Wanted(wanted) => wanted == topic,
                Base::Lacks(lacks) => lacks.contains_key(topic),
                Base::Settled => false,
            };
            if is_of_base {
                coming.base = Base::Settled;
                out.push(trouble(format!(
                    "the release of `{channel}` for empty nodes is not to be had: it goes without"
                )));
            }
        }
    }

    /// Asks for as much as may be asked for now.
    fn schedule(&mut self, moment: Moment, out: &mut Vec<Effect>) {
        // What nobody needs any more.
        let coming = &self.coming;
        self.fetches.retain(|topic, fetch| {
            fetch.stage == Asked::Came || coming.values().any(|coming| coming.needs(topic)) || {
                if matches!(fetch.stage, Asked::Since(_)) {
                    out.push(Effect::Unsubscribe(topic.clone()));
                }
                false
            }
        });
        if !self.is_connected {
            return;
        }
        let is_open = self.options.hours.is_none_or(|hours| {
            let now = i64::try_from(moment.unix_ms / 1000).unwrap_or(i64::MAX);
            hours.window.opens_in(now, hours.utc_offset) == 0
        });
        let active = |fetch: &&Fetch| !matches!(fetch.stage, Asked::Again(_));
        let (mut count, mut bytes) = (0, 0);
        for fetch in self.fetches.values().filter(active) {
            (count, bytes) = (count + 1, bytes + fetch.size);
        }
        let mut asks = Vec::new();
        let wanted = self.coming.values().flat_map(|coming| {
            let lists = coming.wants().map(|topic| (topic, 0));
            lists.into_iter().chain(coming.lacks().filter(move |_| is_open))
        });
        for (topic, size) in wanted {
            if count >= FETCHES || (count > 0 && bytes + size > FETCH_BYTES) {
                break;
            }
            let tries = match self.fetches.get(topic) {
                Some(Fetch { stage: Asked::Again(at), tries, .. }) if *at <= moment.now => *tries,
                Some(_) => continue,
                None => 0,
            };
            self.fetches.insert(topic.to_owned(), Fetch { size, tries, stage: Asked::Since(moment.now) });
            asks.push(topic.to_owned());
            (count, bytes) = (count + 1, bytes + size);
        }
        self.owed += asks.len();
        out.extend(asks.chunks(limits::SUBSCRIBE_FILTERS).map(|some| Effect::Subscribe(some.to_vec())));
    }
}

impl Coming {
    /// Packages that are not here, of the list and then of its base.
    fn lacks(&self) -> impl Iterator<Item = (&str, u64)> {
        let base = match &self.base {
            Base::Lacks(lacks) => Some(lacks),
            _ => None,
        };
        self.missing.iter().chain(base.into_iter().flatten()).map(|(topic, lack)| (topic.as_str(), lack.size))
    }

    /// What is to come on a topic.
    fn lack(&self, topic: &str) -> Option<&Lack> {
        self.missing.get(topic).or_else(|| match &self.base {
            Base::Lacks(lacks) => lacks.get(topic),
            _ => None,
        })
    }

    /// The list of its base, if that is not here.
    fn wants(&self) -> Option<&str> {
        match &self.base {
            Base::Wanted(topic) => Some(topic),
            _ => None,
        }
    }

    fn needs(&self, topic: &str) -> bool {
        self.lack(topic).is_some() || self.wants() == Some(topic)
    }
}

impl Fetch {
    /// Whether it should have come, where nothing has for so long.
    fn is_late(&self, now: Duration, quiet: Duration) -> bool {
        let Asked::Since(since) = self.stage else { return false };
        let waited = now.saturating_sub(since);
        let longest = ANSWER + Duration::from_secs(self.size.max(limits::PACKAGE / 8) / SLOWEST);
        waited >= ANSWER && quiet >= ANSWER || waited >= longest
    }
}

fn hold(coming: &mut Coming, channel: &ChannelName, moment: Moment, why: String, out: &mut Vec<Effect>) {
    let is_new = !matches!(&coming.stage, Stage::Held { why: before, .. } if *before == why);
    if is_new {
        out.push(trouble(format!("the list of `{channel}` is held back: {why}")));
    }
    coming.stage = Stage::Held { why, since: moment.now };
}

/// The epoch and sequence of a list, if it has a release.
fn number_of(list: &UpdateList) -> Option<Number> {
    list.release().map(|release| Number { epoch: release.epoch, sequence: release.sequence })
}

/// The same, with the list's digest.
fn taken_of(list: &UpdateList, payload: &[u8]) -> Option<Taken> {
    Some(Taken { number: number_of(list)?, list: Some(Digest::of(payload)) })
}

/// The release that a channel has here.
fn present(library: &impl Library, channel: &ChannelName) -> Option<Taken> {
    let payload = library.get(&channel.topic())?;
    taken_of(&UpdateList::parse(&payload).ok()?, &payload)
}

/// What a list needs that is not here.
fn lacking(list: &UpdateList, library: &impl Library) -> Lacks {
    let lack =
        |piece: Piece| (piece.topic, Lack { digest: piece.digest, size: piece.size.unwrap_or_default() });
    list.pieces().filter(|piece| !library.holds(piece)).map(lack).collect()
}

/// Where the release is that a list gives to empty nodes.
fn base_of(list: &UpdateList, channel: &ChannelName) -> Option<String> {
    let base = Rollout::of(list.release()?).ok()??.base?;
    Some(channel.history(base))
}

fn base(topic: String, library: &impl Library) -> Base {
    match library.get(&topic).map(|payload| UpdateList::parse(&payload)) {
        Some(Ok(list)) => Base::Lacks(lacking(&list, library)),
        Some(Err(_)) => Base::Settled,
        None => Base::Wanted(topic),
    }
}

fn pin_covered(pin: &Root) -> Vec<u8> {
    SignedRoot::parse(pin.payload()).map(|root| root.covered().to_vec()).unwrap_or_default()
}

fn shown(number: Number) -> String {
    match number.epoch {
        0 => format!("release {}", number.sequence),
        epoch => format!("release {} of epoch {epoch}", number.sequence),
    }
}

fn news(text: String) -> Effect {
    Effect::Tell(Tell::News(text))
}

fn trouble(text: String) -> Effect {
    Effect::Tell(Tell::Trouble(text))
}

#[cfg(test)]
mod tests;
