//! Tries brokers over real connections, one for each probe: a broker that hangs up ends one of them and not the examination.
//!
//! What is published is noted before it is sent, so that [`Doctor::clean`] clears it whenever the examination ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_client::{Brokers, ConnectError, Endpoint, endpoint::Moment};
use mpypi_protocol::{Digest, limits::SUBSCRIBE_FILTERS};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Address, Agreement, Cleared, Denied, Expiry, Fate, Greeting, Largest, Live, Observations, Wildcard,
};
use crate::{
    limits,
    link::{Link, LinkError, Mqtt, Receipt, Signal},
    report::size,
};

/// Below which topic a broker is tried, and how far.
#[derive(Debug, Clone)]
pub struct Options {
    /// The topic; a name of the examination's own comes below it.
    pub below: String,
    /// Largest payload that is tried, in bytes.
    pub largest: u64,
    /// How long several addresses may take to show what was published at another.
    pub agree_within: Duration,
}

/// No address lets us in.
#[derive(Debug, thiserror::Error)]
pub enum DoctorError {
    /// The only one does not.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// None of several.
    #[error("none of {} brokers lets us in: {}", .0.len(), .0.iter().map(|(url, reason)| format!("{url}: {reason}")).collect::<Vec<_>>().join("; "))]
    Nobody(Vec<(String, String)>),
}

impl DoctorError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            DoctorError::Link(error) => error.hint(),
            DoctorError::Nobody(_) => None,
        }
    }
}

/// Where packages are: topics below it may be published by whoever may publish.
pub const BELOW: &str = "mpypi/packages/src";

/// An examination, and what it left at the brokers so far.
pub struct Doctor<'a> {
    places: Vec<Place>,
    options: Options,
    /// The name of this examination, in every topic.
    name: String,
    /// Where something was published: to be cleared.
    left: BTreeSet<String>,
    /// Where something was refused or dropped: to be looked at.
    doubtful: BTreeSet<String>,
    tell: Box<dyn FnMut(&str) + 'a>,
}

/// A broker, and how it lets us in.
#[derive(Debug, Clone)]
struct Place {
    endpoint: Endpoint,
    ways: BTreeMap<Mqtt, Name>,
}

/// What we call ourselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    /// As the broker likes.
    Given,
    /// By a name of our own, another for each connection.
    Own,
    /// As the user: some brokers want a device to be called so.
    User,
}

impl Name {
    fn id(self, endpoint: &Endpoint) -> Option<String> {
        match self {
            Name::Given => Some(String::new()),
            Name::Own => Some(format!("mpypi-doctor-{:08x}", fastrand::u32(..))),
            Name::User => endpoint.url().credentials.as_ref().map(|(user, _)| user.clone()),
        }
    }
}

/// What is read on a topic.
enum Read {
    Found(Bytes),
    Elsewhere(String),
    Nothing,
    Refused,
}

impl Place {
    /// Connects in one version, however it lets us in.
    async fn enter(endpoint: &Endpoint, mqtt: Mqtt) -> Result<(Link, Name), LinkError> {
        let mut first = None;
        for name in [Name::Given, Name::Own, Name::User] {
            let Some(id) = name.id(endpoint) else { continue };
            match Link::connect_in(endpoint, mqtt, &id).await {
                Ok(link) => return Ok((link, name)),
                // It may be the name: another is tried.
                Err(error @ LinkError::Refused { reason: "client identifier not valid", .. })
                | Err(
                    error @ LinkError::Unreachable {
                        problem: ConnectError::HungUp(Moment::Plain | Moment::Secured),
                        ..
                    },
                ) => _ = first.get_or_insert(error),
                Err(error) => return Err(first.unwrap_or(error)),
            }
        }
        Err(first.unwrap_or_else(|| unreachable!("the first name is always tried")))
    }

    async fn open(&self, mqtt: Mqtt) -> Result<Link, LinkError> {
        let name = self.ways.get(&mqtt).copied().unwrap_or(Name::Given);
        Link::connect_in(&self.endpoint, mqtt, &name.id(&self.endpoint).unwrap_or_default()).await
    }

    /// The version of MQTT to speak here, if it lets us in.
    fn best(&self) -> Option<Mqtt> {
        self.ways.keys().next_back().copied()
    }
}

impl<'a> Doctor<'a> {
    /// An examination of `brokers`; `tell` is told what is tried.
    #[must_use]
    pub fn new(brokers: &Brokers, options: Options, tell: impl FnMut(&str) + 'a) -> Doctor<'a> {
        Doctor {
            places: brokers
                .iter()
                .map(|endpoint| Place { endpoint: endpoint.clone(), ways: BTreeMap::new() })
                .collect(),
            options,
            name: format!("mpypi-doctor-{:08x}", fastrand::u32(..)),
            left: BTreeSet::new(),
            doubtful: BTreeSet::new(),
            tell: Box::new(tell),
        }
    }

    /// Tries everything. Whatever comes of it, [`Doctor::clean`] is to follow.
    ///
    /// # Errors
    /// No address lets us in.
    pub async fn examine(&mut self) -> Result<Observations, DoctorError> {
        let (addresses, greeting) = self.greet().await?;
        let examined = self.places.iter().position(|place| place.best().is_some()).unwrap_or_default();
        let mqtt = self.places[examined].best().unwrap_or(Mqtt::Four);
        let mut seen = Observations {
            addresses,
            examined,
            greeting,
            sys: BTreeMap::new(),
            plain: Fate::Untried,
            dots: Fate::Untried,
            spaces: Fate::Untried,
            wildcard: Wildcard { there: 0, came: 0, accepted: true },
            live: Live::Untried,
            largest: Largest { kept: 0, limit: self.options.largest, lost: None },
            expiry: None,
            cleared: Cleared::Untried,
            denied: Vec::new(),
            agreement: None,
            clock: None,
        };
        self.tell("what it says of itself");
        (seen.sys, seen.clock) = self.sys(examined, mqtt).await;
        self.tell("whether it keeps a message");
        // Every byte there is: text is no proof.
        let every: Bytes = (0..=u8::MAX).collect::<Vec<u8>>().into();
        let plain = self.topic("plain", &every);
        seen.plain = self.trial(examined, mqtt, &plain, every, limits::DOCTOR_PROBE).await;
        if seen.plain == Fate::Kept {
            let aging = match self.places[examined].ways.contains_key(&Mqtt::Five) {
                true => self.age(examined).await,
                false => None,
            };
            self.tell("dots and spaces in topics");
            seen.dots = self.small(examined, mqtt, "main.py").await;
            seen.spaces = self.small(examined, mqtt, "with space").await;
            self.tell("QoS 1, for who listens");
            seen.live = self.live(examined, mqtt).await;
            self.tell("wildcards");
            seen.wildcard = self.wildcard(examined, mqtt).await;
            seen.largest = self.largest(examined, mqtt).await;
            self.tell("clearing");
            seen.cleared = self.cleared(examined, mqtt, &plain).await;
            self.tell("messages with an end");
            if let Some(aging) = aging {
                seen.expiry = self.aged(examined, aging).await;
            }
        }
        self.tell("what this user may not write");
        seen.denied = self.denied(examined, &seen.plain).await;
        if self.places.len() > 1 && seen.plain == Fate::Kept {
            self.tell("whether all addresses show the same");
            seen.agreement = Some(self.agreement().await);
        }
        Ok(seen)
    }

    fn tell(&mut self, what: &str) {
        (self.tell)(what);
    }

    /// A topic of this examination that a package with this payload would have.
    fn topic(&self, what: &str, payload: &[u8]) -> String {
        format!("{}/{}/{what}/{}", self.options.below, self.name, Digest::of(payload))
    }

    /// Connects to each address in each version.
    async fn greet(&mut self) -> Result<(Vec<Address>, Option<Greeting>), DoctorError> {
        self.tell("connecting");
        let mut greetings = JoinSet::new();
        for (number, place) in self.places.iter().enumerate() {
            for mqtt in [Mqtt::Four, Mqtt::Five] {
                let endpoint = place.endpoint.clone();
                greetings.spawn(async move { (number, mqtt, Place::enter(&endpoint, mqtt).await) });
            }
        }
        let mut said = BTreeMap::new();
        let mut failed = BTreeMap::new();
        while let Some(greeted) = greetings.join_next().await {
            match greeted {
                Ok((number, mqtt, Ok((link, name)))) => {
                    self.places[number].ways.insert(mqtt, name);
                    if let Some(greeting) = greeting(&link) {
                        said.insert(number, greeting);
                    }
                    link.close().await;
                }
                Ok((number, mqtt, Err(error))) => _ = failed.insert((number, mqtt), error),
                Err(_) => {}
            }
        }
        let addresses = self.places.iter().enumerate().map(|(number, place)| {
            let why = |mqtt| failed.get(&(number, mqtt)).map(|error: &LinkError| why(error, mqtt));
            Address { url: place.endpoint.url().to_string(), four: why(Mqtt::Four), five: why(Mqtt::Five) }
        });
        let addresses: Vec<Address> = addresses.collect();
        match self.places.iter().position(|place| place.best().is_some()) {
            Some(examined) => Ok((addresses, said.remove(&examined))),
            // What a broker says in MQTT 5, it says with a reason; one of 3.1.1 alone says nothing of use there.
            None if addresses.len() == 1 => {
                let five = failed
                    .remove(&(0, Mqtt::Five))
                    .filter(|error| matches!(error, LinkError::Refused { .. }));
                let error = five.or_else(|| failed.remove(&(0, Mqtt::Four)));
                Err(error.unwrap_or_else(|| unreachable!("it did not let us in")).into())
            }
            None => {
                let reasons =
                    addresses.into_iter().map(|address| (address.url, address.four.unwrap_or_default()));
                Err(DoctorError::Nobody(reasons.collect()))
            }
        }
    }

    /// What it says below `$SYS`, and by how many seconds its clock is ahead.
    async fn sys(&self, at: usize, mqtt: Mqtt) -> (BTreeMap<String, String>, Option<i64>) {
        let mut found = BTreeMap::new();
        let filters =
            ["$SYS/broker/version", "$SYS/brokers/+/version", "$SYS/brokers/+/datetime"].map(str::to_owned);
        let read = async {
            let mut link = self.places[at].open(mqtt).await?;
            for filter in &filters {
                link.subscribe(std::slice::from_ref(filter));
            }
            let mut owed = filters.len();
            loop {
                let signal = match owed {
                    0 => link.next_within(limits::QUIET).await?,
                    _ => Some(link.next().await?),
                };
                match signal {
                    None => break,
                    Some(Signal::Message { topic, payload }) => {
                        found.insert(topic, String::from_utf8_lossy(&payload).into_owned());
                    }
                    Some(Signal::Subscribed(_)) => owed -= 1,
                    Some(_) => {}
                }
            }
            link.close().await;
            Ok::<_, LinkError>(())
        };
        // A broker that says nothing here, or hangs up, says nothing of itself.
        let _ = timeout(limits::DOCTOR_PROBE, read).await;
        let datetime = found.iter().find(|(topic, _)| topic.ends_with("/datetime"));
        let clock = datetime.and_then(|(_, text)| ahead(text));
        (found, clock)
    }

    /// Publishes a message, and asks for it by its topic.
    async fn trial(&mut self, at: usize, mqtt: Mqtt, topic: &str, payload: Bytes, limit: Duration) -> Fate {
        self.left.insert(topic.to_owned());
        let tried = async {
            let mut link = self.places[at].open(mqtt).await?;
            let sent = payload.clone();
            let fate = match put(&mut link, topic, sent).await? {
                Err(reason) => Fate::Refused { reason },
                Ok(()) => match read(&mut link, topic).await? {
                    Read::Found(found) if found == payload => Fate::Kept,
                    Read::Found(_) => Fate::Garbled,
                    Read::Elsewhere(topic) => Fate::Renamed { topic },
                    Read::Nothing => Fate::Dropped,
                    Read::Refused => Fate::Unreadable,
                },
            };
            link.close().await;
            Ok::<_, LinkError>(fate)
        };
        let fate = match timeout(limit, tried).await {
            Ok(Ok(fate)) => fate,
            // It says so itself, and it was not sent.
            Ok(Err(error @ LinkError::TooLarge { .. })) => Fate::Refused { reason: error.reason() },
            Ok(Err(error)) => Fate::Closed { reason: error.reason() },
            Err(_) => Fate::Silent,
        };
        // To clear what was refused would be refused as well. What seems to be dropped may be there for others.
        if matches!(fate, Fate::Refused { .. } | Fate::Closed { .. }) {
            self.left.remove(topic);
            self.doubtful.insert(topic.to_owned());
        }
        fate
    }

    /// The same with a small message of this name.
    async fn small(&mut self, at: usize, mqtt: Mqtt, what: &str) -> Fate {
        let payload = Bytes::from(format!("{} {what}", self.name));
        let topic = self.topic(what, &payload);
        self.trial(at, mqtt, &topic, payload, limits::DOCTOR_PROBE).await
    }

    /// Publishes a message to who listens, at QoS 1.
    async fn live(&mut self, at: usize, mqtt: Mqtt) -> Live {
        let payload = Bytes::from(format!("{} live", self.name));
        let topic = self.topic("live", &payload);
        self.left.insert(topic.clone());
        let place = &self.places[at];
        let tried = async {
            let (mut listener, mut speaker) = (place.open(mqtt).await?, place.open(mqtt).await?);
            listener.subscribe_with(std::slice::from_ref(&topic), Receipt::Each);
            while !matches!(listener.next().await?, Signal::Subscribed(_)) {}
            if let Err(reason) = put(&mut speaker, &topic, payload.clone()).await? {
                return Ok(Live::Missing { reason: Some(reason) });
            }
            loop {
                match listener.next_within(limits::DOCTOR_LIVE).await? {
                    None => return Ok(Live::Missing { reason: None }),
                    Some(Signal::Message { payload: found, .. }) if found == payload => break,
                    Some(_) => {}
                }
            }
            let qos = listener.arrival().qos;
            listener.close().await;
            speaker.close().await;
            Ok::<_, LinkError>(Live::Came { qos })
        };
        match timeout(limits::DOCTOR_PROBE, tried).await {
            Ok(Ok(live)) => live,
            Ok(Err(error)) => Live::Missing { reason: Some(error.reason()) },
            Err(_) => Live::Missing { reason: Some("it did not answer in time".to_owned()) },
        }
    }

    /// Publishes several messages, and asks for all by one filter.
    async fn wildcard(&mut self, at: usize, mqtt: Mqtt) -> Wildcard {
        let payload = |number| Bytes::from(format!("{} {number}", self.name));
        let messages: Vec<(String, Bytes)> = (0..limits::DOCTOR_WILD)
            .map(|number| (self.topic(&format!("wild/{number}"), &payload(number)), payload(number)))
            .collect();
        self.left.extend(messages.iter().map(|(topic, _)| topic.clone()));
        let filter = format!("{}/{}/wild/#", self.options.below, self.name);
        let mut seen = Wildcard { there: 0, came: 0, accepted: true };
        let place = &self.places[at];
        let tried = async {
            let mut link = place.open(mqtt).await?;
            for (topic, payload) in &messages {
                seen.there += usize::from(put(&mut link, topic, payload.clone()).await?.is_ok());
            }
            let mut open: BTreeMap<&str, &Bytes> =
                messages.iter().map(|(topic, payload)| (topic.as_str(), payload)).collect();
            let mut came = |topic: &str, payload: &Bytes| {
                let is_it = open.get(topic).is_some_and(|wanted| *wanted == payload);
                is_it && open.remove(topic).is_some()
            };
            seen.accepted = ask(&mut link, &filter, |topic, payload| {
                seen.came += usize::from(came(topic, payload));
                seen.came < messages.len()
            })
            .await?;
            link.close().await;
            Ok::<_, LinkError>(())
        };
        // What came until then came.
        let _ = timeout(limits::DOCTOR_PROBE, tried).await;
        seen
    }

    /// Publishes ever larger messages, then between the largest that was kept and the smallest that was not.
    async fn largest(&mut self, at: usize, mqtt: Mqtt) -> Largest {
        let limit = self.options.largest;
        let mut seen = Largest { kept: 0, limit, lost: None };
        let mut next = limits::DOCTOR_FIRST.min(limit);
        for _ in 0..limits::DOCTOR_SIZES {
            self.tell(&format!("a message of {}", size(next)));
            let mut payload = vec![0; usize::try_from(next).unwrap_or(usize::MAX)];
            fastrand::Rng::with_seed(next).fill(&mut payload);
            let payload = Bytes::from(payload);
            let topic = self.topic("large", &payload);
            let fate = self.trial(at, mqtt, &topic, payload, limits::DOCTOR_PROBE + limits::SILENCE).await;
            // Nothing large waits for the end.
            if self.left.contains(&topic) && clear(&self.places[at], mqtt, std::slice::from_ref(&topic)).await
            {
                self.left.remove(&topic);
                self.doubtful.insert(topic);
            }
            match fate {
                Fate::Kept => seen.kept = next,
                fate => seen.lost = Some((next, fate)),
            }
            next = match &seen.lost {
                None if seen.kept >= limit => break,
                None => seen.kept.saturating_mul(2).min(limit),
                Some((lost, _)) if lost - seen.kept <= (lost / limits::DOCTOR_RESOLUTION).max(1) => break,
                Some((lost, _)) => seen.kept.midpoint(*lost),
            };
        }
        seen
    }

    /// Publishes a message that is to be there later, and one that is to be gone.
    async fn age(&mut self, at: usize) -> Option<(String, String, Instant)> {
        let message = |what: &str| {
            let payload = Bytes::from(format!("{} {what}", self.name));
            (self.topic(what, &payload), payload)
        };
        let messages = [(message("long"), limits::DOCTOR_LONG), (message("short"), limits::DOCTOR_SHORT)];
        self.left.extend(messages.iter().map(|((topic, _), _)| topic.clone()));
        let place = &self.places[at];
        let sent = async {
            let mut link = place.open(Mqtt::Five).await?;
            for ((topic, payload), seconds) in &messages {
                let number = link.publish_for(topic, payload.clone(), *seconds)?;
                acknowledged(&mut link, number).await?.ok();
            }
            link.close().await;
            Ok::<_, LinkError>(())
        };
        timeout(limits::DOCTOR_PROBE, sent).await.ok()?.ok()?;
        let [((long, _), _), ((short, _), _)] = messages;
        Some((long, short, now()))
    }

    /// Looks at them when the time of the one is over.
    async fn aged(&self, at: usize, (long, short, since): (String, String, Instant)) -> Option<Expiry> {
        sleep_until(since + limits::DOCTOR_AGE).await;
        let place = &self.places[at];
        let looked = async {
            let mut link = place.open(Mqtt::Five).await?;
            let kept = matches!(read(&mut link, &long).await?, Read::Found(_));
            let left = link.arrival().expiry.filter(|_| kept);
            link.close().await;
            let mut link = place.open(Mqtt::Five).await?;
            let gone = gone(&mut link, &short).await?;
            link.close().await;
            Ok::<_, LinkError>(Expiry { asked: limits::DOCTOR_LONG, left, kept, gone })
        };
        timeout(limits::DOCTOR_PROBE, looked).await.ok()?.ok()
    }

    /// Clears a message that is there, and looks.
    async fn cleared(&self, at: usize, mqtt: Mqtt, topic: &str) -> Cleared {
        let place = &self.places[at];
        let tried = async {
            let mut link = place.open(mqtt).await?;
            if let Err(reason) = put(&mut link, topic, Bytes::new()).await? {
                return Ok(Cleared::Refused { reason });
            }
            let gone = gone(&mut link, topic).await?;
            link.close().await;
            Ok::<_, LinkError>(if gone { Cleared::Gone } else { Cleared::Still })
        };
        match timeout(limits::DOCTOR_PROBE, tried).await {
            Ok(Ok(cleared)) => cleared,
            Ok(Err(error)) => Cleared::Refused { reason: error.reason() },
            Err(_) => Cleared::Refused { reason: "it did not answer in time".to_owned() },
        }
    }

    /// Publishes where a publisher has no business, in each version.
    async fn denied(&mut self, at: usize, plain: &Fate) -> Vec<(Mqtt, Denied)> {
        let payload = Bytes::from(format!("{} denied", self.name));
        // What nobody asks for at a node that is none, which a publisher may read; and what is nowhere of ours.
        let mut topics = vec![format!("mpypi/nodes/{}/doctor", self.name), format!("{}/denied", self.name)];
        if *plain != Fate::Kept {
            topics.insert(0, self.topic("denied", &payload));
        }
        let mut all = Vec::new();
        for mqtt in self.places[at].ways.keys().copied().collect::<Vec<_>>() {
            let mut denied = Denied::Nowhere;
            for topic in &topics {
                let fate = self.trial(at, mqtt, topic, payload.clone(), limits::DOCTOR_PROBE).await;
                denied = match fate {
                    Fate::Kept | Fate::Garbled | Fate::Renamed { .. } => continue,
                    Fate::Refused { reason } => Denied::Refused { reason },
                    Fate::Closed { reason } => Denied::Closed { reason },
                    Fate::Dropped => Denied::Dropped,
                    Fate::Unreadable | Fate::Silent | Fate::Untried => {
                        denied = Denied::Unknown;
                        continue;
                    }
                };
                break;
            }
            all.push((mqtt, denied));
        }
        all
    }

    /// Publishes at each address, and asks all others for it.
    async fn agreement(&mut self) -> Agreement {
        let open: Vec<(usize, Mqtt)> = self
            .places
            .iter()
            .enumerate()
            .filter_map(|(number, place)| Some((number, place.best()?)))
            .collect();
        let mut published = BTreeMap::new();
        let mut wanted = BTreeMap::new();
        for (at, mqtt) in &open {
            let payload = Bytes::from(format!("{} at {at}", self.name));
            let topic = self.topic(&format!("at-{at}"), &payload);
            let fate = self.trial(*at, *mqtt, &topic, payload, limits::DOCTOR_PROBE).await;
            if fate == Fate::Kept {
                wanted.insert(topic, (*at, now()));
            }
            published.insert(*at, fate);
        }
        let (within, mut looks) = (self.options.agree_within, JoinSet::new());
        for (at, mqtt) in open {
            let (place, wanted) = (self.places[at].clone(), wanted.clone());
            looks.spawn(async move { (at, watch(&place, mqtt, wanted, within).await) });
        }
        let mut seen = BTreeMap::new();
        while let Some(look) = looks.join_next().await {
            let Ok((at, sights)) = look else { continue };
            seen.extend(sights.into_iter().filter(|(of, _)| *of != at).map(|(of, after)| ((at, of), after)));
        }
        Agreement { within: u64::try_from(within.as_millis()).unwrap_or(u64::MAX), published, seen }
    }

    /// Clears everything that the probes left, at every address. Returns the topics on which something stayed. It may be
    /// dropped, and called again.
    pub async fn clean(&mut self) -> Vec<String> {
        let mut cleaning = JoinSet::new();
        for place in &self.places {
            let Some(mqtt) = place.best() else { continue };
            let (place, left, doubtful) = (place.clone(), self.left.clone(), self.doubtful.clone());
            cleaning.spawn(async move {
                match timeout(limits::DOCTOR_CLEAN, clean(&place, mqtt, left.clone(), doubtful)).await {
                    Ok(left) => left,
                    Err(_) => left,
                }
            });
        }
        let mut left = BTreeSet::new();
        while let Some(cleaned) = cleaning.join_next().await {
            left.extend(cleaned.unwrap_or_default());
        }
        self.left = left;
        self.left.iter().cloned().collect()
    }

    /// The topics on which something may be left.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        self.left.iter().cloned().collect()
    }
}

impl std::fmt::Debug for Doctor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Doctor").field("name", &self.name).field("left", &self.left).finish_non_exhaustive()
    }
}

/// Why an address lets nobody in who speaks this version.
fn why(error: &LinkError, mqtt: Mqtt) -> String {
    match error {
        // A broker of 3.1.1 answers in 3.1.1, or hangs up.
        LinkError::NotMqtt { .. }
        | LinkError::Unreachable { problem: ConnectError::HungUp(Moment::Plain | Moment::Secured), .. }
            if mqtt == Mqtt::Five =>
        {
            "it does not let in who speaks it".to_owned()
        }
        error => error.reason(),
    }
}

/// What a broker said of itself.
fn greeting(link: &Link) -> Option<Greeting> {
    let said = link.greeting()?;
    let flag = |value: Option<u8>| value.map(|value| value != 0);
    Some(Greeting {
        maximum_packet_size: said.max_packet_size,
        maximum_qos: said.max_qos,
        retain_available: flag(said.retain_available),
        server_keep_alive: said.server_keep_alive,
        topic_alias_maximum: said.topic_alias_max,
        receive_maximum: said.receive_max,
        wildcard_subscription_available: flag(said.wildcard_subscription_available),
        shared_subscription_available: flag(said.shared_subscription_available),
        assigned_client_id: said.assigned_client_identifier.clone(),
        user_properties: said.user_properties.clone(),
    })
}

/// By how many seconds a clock that shows `text` is ahead of ours.
fn ahead(text: &str) -> Option<i64> {
    // Without an offset it is its host's own time, of which nothing is known.
    let time: Timestamp = text.trim().parse().ok()?;
    #[expect(clippy::disallowed_methods, reason = "this is the driver that compares clocks")]
    let now = Timestamp::now();
    Some(time.as_second() - now.as_second())
}

/// Publishes retained, and waits for the acknowledgement: `Err` with the reason if it is one of refusal.
async fn put(link: &mut Link, topic: &str, payload: Bytes) -> Result<Result<(), String>, LinkError> {
    let number = link.publish(topic, payload)?;
    acknowledged(link, number).await
}

async fn acknowledged(link: &mut Link, number: u64) -> Result<Result<(), String>, LinkError> {
    loop {
        if let Signal::Acknowledged(this, result) = link.next().await?
            && this == number
        {
            return Ok(result.map(drop).map_err(|refusal| refusal.to_string()));
        }
    }
}

/// What is retained on `topic`. What is acknowledged may show a moment later: it is asked for more than once.
async fn read(link: &mut Link, topic: &str) -> Result<Read, LinkError> {
    for _ in 0..limits::DOCTOR_READS {
        let mut found = None;
        let accepted = ask(link, topic, |on, payload| {
            found.get_or_insert((on.to_owned(), payload.clone()));
            false
        })
        .await?;
        match found {
            Some((on, payload)) if on == topic => return Ok(Read::Found(payload)),
            Some((on, _)) => return Ok(Read::Elsewhere(on)),
            None if !accepted => return Ok(Read::Refused),
            None => {}
        }
    }
    Ok(Read::Nothing)
}

/// Whether nothing is retained on `topic`, now or in a moment.
async fn gone(link: &mut Link, topic: &str) -> Result<bool, LinkError> {
    for _ in 0..limits::DOCTOR_READS {
        let mut is_there = false;
        ask(link, topic, |_, _| {
            is_there = true;
            false
        })
        .await?;
        if !is_there {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Asks for what `filter` matches, until `take` has enough or nothing more comes; says whether it may be asked for.
async fn ask(
    link: &mut Link,
    filter: &str,
    mut take: impl FnMut(&str, &Bytes) -> bool,
) -> Result<bool, LinkError> {
    link.subscribe(&[filter.to_owned()]);
    let (mut accepted, mut more) = (None, true);
    while accepted.is_none() || more {
        let signal = match accepted {
            None => Some(link.next().await?),
            Some(_) => link.next_within(limits::QUIET).await?,
        };
        match signal {
            Some(Signal::Message { topic, payload }) if !payload.is_empty() => {
                more = more && take(&topic, &payload)
            }
            Some(Signal::Subscribed(codes)) => {
                let is_accepted = codes.contains(&true);
                more = more && is_accepted;
                accepted = Some(is_accepted);
            }
            Some(_) => {}
            None => break,
        }
    }
    let accepted = accepted.unwrap_or_default();
    if accepted {
        // On a slow line the answer may take longer than the quiet; it cannot take longer than this.
        link.unsubscribe(filter);
        loop {
            match link.next().await? {
                Signal::Message { topic, payload } if more && !payload.is_empty() => {
                    more = take(&topic, &payload)
                }
                Signal::Unsubscribed => break,
                _ => {}
            }
        }
    }
    Ok(accepted)
}

/// After how many milliseconds a broker shows each of these messages as retained, by the number of where it was published.
async fn watch(
    place: &Place,
    mqtt: Mqtt,
    wanted: BTreeMap<String, (usize, Instant)>,
    within: Duration,
) -> BTreeMap<usize, Option<u64>> {
    let mut seen: BTreeMap<usize, Option<u64>> = wanted.values().map(|(of, _)| (*of, None)).collect();
    let mut open: BTreeSet<String> = wanted.keys().cloned().collect();
    let look = async {
        while !open.is_empty() {
            let asked: Vec<String> = open.iter().cloned().collect();
            let mut link = place.open(mqtt).await?;
            for window in asked.chunks(SUBSCRIBE_FILTERS) {
                link.subscribe(window);
            }
            // A message that only passes by says nothing of what is retained.
            while let Some(signal) = link.next_within(limits::QUIET).await? {
                if let Signal::Message { topic, .. } = signal
                    && link.arrival().retained
                    && open.remove(&topic)
                    && let Some((of, since)) = wanted.get(&topic)
                {
                    let after = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
                    seen.insert(*of, Some(after));
                    if open.is_empty() {
                        break;
                    }
                }
            }
            link.close().await;
        }
        Ok::<_, LinkError>(())
    };
    // What was seen until then was seen.
    let _ = timeout(within, look).await;
    seen
}

/// Clears messages; says whether all of that was acknowledged.
async fn clear(place: &Place, mqtt: Mqtt, topics: &[String]) -> bool {
    let cleared = async {
        let mut link = place.open(mqtt).await?;
        let mut all = true;
        for topic in topics {
            all &= put(&mut link, topic, Bytes::new()).await?.is_ok();
        }
        link.close().await;
        Ok::<_, LinkError>(all)
    };
    matches!(timeout(limits::DOCTOR_PROBE, cleared).await, Ok(Ok(true)))
}

/// Clears what is `left`, and looks at that and at what is `doubtful`. Returns the topics on which something stayed.
async fn clean(
    place: &Place,
    mqtt: Mqtt,
    mut left: BTreeSet<String>,
    doubtful: BTreeSet<String>,
) -> BTreeSet<String> {
    let mut asked = [left.clone(), doubtful];
    for _ in 0..limits::DOCTOR_READS {
        let all: Vec<String> = left.iter().cloned().collect();
        // Where one of them ends the connection, the others are cleared without it.
        if !clear(place, mqtt, &all).await {
            for topic in &all {
                clear(place, mqtt, std::slice::from_ref(topic)).await;
            }
        }
        left = BTreeSet::new();
        for topics in &asked {
            let topics: Vec<String> = topics.iter().cloned().collect();
            match present(place, mqtt, &topics).await {
                Some(found) => left.extend(found),
                None => {
                    for topic in &topics {
                        // What cannot be asked for is not there.
                        left.extend(
                            present(place, mqtt, std::slice::from_ref(topic)).await.unwrap_or_default(),
                        );
                    }
                }
            }
        }
        if left.is_empty() {
            break;
        }
        asked = [left.clone(), BTreeSet::new()];
    }
    left
}

/// On which of these topics something is retained; `None` if that cannot be asked.
async fn present(place: &Place, mqtt: Mqtt, topics: &[String]) -> Option<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    if topics.is_empty() {
        return Some(found);
    }
    let look = async {
        let mut link = place.open(mqtt).await?;
        let mut windows = topics.chunks(SUBSCRIBE_FILTERS);
        let mut owed = 0;
        loop {
            if owed == 0
                && let Some(window) = windows.next()
            {
                link.subscribe(window);
                owed += 1;
            }
            let signal = match owed {
                0 => link.next_within(limits::QUIET).await?,
                _ => Some(link.next().await?),
            };
            match signal {
                Some(Signal::Message { topic, payload }) if !payload.is_empty() => _ = found.insert(topic),
                Some(Signal::Subscribed(_)) => owed -= 1,
                Some(_) => {}
                None => break,
            }
        }
        link.close().await;
        Ok::<_, LinkError>(())
    };
    matches!(timeout(limits::DOCTOR_PROBE, look).await, Ok(Ok(()))).then_some(found)
}

#[expect(clippy::disallowed_methods, reason = "this is the driver that gives the probes their time")]
fn now() -> Instant {
    Instant::now()
}
