//! The driver of [`agree`]: reads what was published back through every address of a cluster, and publishes
//! again what is missing.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use bytes::Bytes;
use mpypi_client::{Brokers, Endpoint};
use mpypi_protocol::{ChannelName, Digest, UpdateList, list::Piece};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    agree::{self, Agreement, Next, Seen, Served, Standing, View},
    history, limits,
    link::{Link, LinkError},
    report::count,
    retained::{self, AskError},
};

/// A message that every broker is to retain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its topic.
    pub topic: String,
    /// The digest of its payload.
    pub digest: Digest,
    /// Its payload; `None` where the source, or a broker that has it, is asked for it.
    pub payload: Option<Bytes>,
}

impl Message {
    /// A package, or a chunk of one, that was published.
    #[must_use]
    pub fn piece(piece: Piece) -> Message {
        Message { topic: piece.topic, digest: piece.digest, payload: None }
    }

    /// A message whose payload is at hand.
    #[must_use]
    pub fn of(topic: String, payload: Bytes) -> Message {
        Message { topic, digest: Digest::of(&payload), payload: Some(payload) }
    }
}

/// How several brokers stand in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// How it ended.
    pub end: End,
    /// How each stands, by its URL.
    pub brokers: Vec<(String, Standing)>,
    /// How often something was published again.
    pub repairs: u32,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All have all of it, but for those that may be down.
    Agreed,
    /// Somebody else published.
    Raced,
    /// They do not agree.
    Disagreed,
}

impl Verdict {
    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let brokers = self.brokers.iter().map(|(url, standing)| {
            let mut value = json!({ "url": url });
            if let (Some(object), Ok(Value::Object(standing))) =
                (value.as_object_mut(), serde_json::to_value(standing))
            {
                object.extend(standing);
            }
            value
        });
        let brokers: Vec<Value> = brokers.collect();
        json!({ "agreed": self.end == End::Agreed, "repairs": self.repairs, "brokers": brokers })
    }
}

/// Brokers do not agree on what was published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{done}, but {verdict}")]
pub struct Disagreement {
    /// What was done, as half a sentence.
    pub done: String,
    /// Whether that is seen by devices.
    pub stands: Stands,
    /// Who has what.
    pub verdict: Verdict,
}

/// Whether devices see what was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stands {
    /// Those at brokers that have it.
    Published,
    /// No device does: the list was not sent.
    Nothing,
}

impl Disagreement {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        let brokers = &self.verdict.brokers;
        let stale = brokers.iter().any(|(_, standing)| matches!(standing, Standing::Stale { .. }));
        let again = match self.stands {
            Stands::Published => "publish again with `--repair`",
            Stands::Nothing => "publish again",
        };
        let hint = match stale {
            true => format!("restart the node that is stale: nothing reaches what it serves; then {again}"),
            false => format!(
                "when that broker is back, {again}; or leave its address out, or let some be down with `--may-be-down`"
            ),
        };
        // All acknowledged it, and none has it.
        let has_nothing =
            |standing: &Standing| matches!(standing, Standing::Lacks { .. } | Standing::Stale { .. });
        match brokers.iter().all(|(_, standing)| has_nothing(standing)) {
            true => format!(
                "see that this user may publish: NATS and mosquitto acknowledge what they deny; if so, {hint}"
            ),
            false => hint,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let odd = self.brokers.iter().filter(|(_, standing)| *standing != Standing::Agrees);
        let odd: Vec<String> = odd.map(|(url, standing)| format!("{url} {standing}")).collect();
        let all = count(self.brokers.len(), "broker");
        write!(f, "{} of {all} do not have all of it: {}", odd.len(), odd.join("; "))
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Standing::Agrees => f.write_str("has all of it"),
            Standing::Lacks { messages, example } => {
                write!(f, "lacks {}, `{example}` among them", count(*messages, "message"))
            }
            Standing::Stale { messages, serves } => {
                write!(f, "is stale: it still serves {serves} and lacks {}", count(*messages, "message"))
            }
            Standing::Unreachable { reason } => write!(f, "cannot be reached: {reason}"),
        }
    }
}

impl fmt::Display for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.sequence, self.created) {
            (Some(sequence), Some(created)) => write!(f, "release {sequence}, made {created}"),
            (Some(sequence), None) => write!(f, "release {sequence}"),
            (None, _) => f.write_str("no release"),
        }
    }
}

/// What every broker is to retain.
struct Wanted<'a> {
    messages: &'a [Message],
    asked: Arc<Asked>,
}

struct Asked {
    topics: Vec<String>,
    digests: Vec<Digest>,
    /// The list that is among them.
    list: Option<Listed>,
}

struct Listed {
    channel: ChannelName,
    /// Its number.
    at: usize,
    age: Option<(u64, u64)>,
}

/// Reads `messages` back through all `brokers`, publishes again what is missing, and says how they stand. If the list of
/// `channel` is among them, what a broker has in its place is told. `source` has payloads that the messages lack.
pub async fn settle(
    brokers: &Brokers,
    channel: Option<&ChannelName>,
    messages: &[Message],
    mut source: impl FnMut(usize) -> Option<Bytes>,
    mut tell: impl FnMut(&str),
) -> Verdict {
    let list = channel.and_then(|channel| {
        let topic = channel.topic();
        let at = messages.iter().position(|message| message.topic == topic)?;
        let age = messages[at].payload.as_deref().and_then(age);
        Some(Listed { channel: channel.clone(), at, age })
    });
    let asked = Asked {
        topics: messages.iter().map(|message| message.topic.clone()).collect(),
        digests: messages.iter().map(|message| message.digest).collect(),
        list,
    };
    let wanted = Wanted { messages, asked: Arc::new(asked) };
    let started = now();
    let mut agreement = Agreement::new(brokers.patience(), brokers.may_be_down());
    if brokers.are_several() {
        let (messages, brokers) = (count(messages.len(), "message"), brokers.count());
        tell(&format!("reading {messages} back through {brokers} brokers"));
    }
    loop {
        let views = look_at_all(brokers, &wanted.asked).await;
        let next = agreement.next(started.elapsed(), &views);
        let end = match next {
            Next::Agreed => End::Agreed,
            Next::Raced => End::Raced,
            Next::GiveUp => End::Disagreed,
            Next::Repair { through, messages } => {
                let url =
                    brokers.iter().nth(through).map(|broker| broker.url().to_string()).unwrap_or_default();
                tell(&format!("publishing {} again through {url}", count(messages.len(), "message")));
                // Whether it helped, the next look tells.
                if let Err(error) = wanted.repair(brokers, through, &messages, &views, &mut source).await {
                    tell(&error.to_string());
                }
                continue;
            }
            Next::Wait(pause) => {
                tell(&waits(brokers, &views, &wanted.asked));
                tokio::time::sleep(pause).await;
                continue;
            }
        };
        let topics: Vec<&str> = wanted.asked.topics.iter().map(String::as_str).collect();
        let stands =
            |(broker, view): (&Endpoint, &View)| (broker.url().to_string(), agree::standing(view, &topics));
        let brokers = brokers.iter().zip(&views).map(stands).collect();
        return Verdict { end, brokers, repairs: agreement.repairs() };
    }
}

/// A connection to the broker that has the newest list of `channel`, of those that answer: what follows on an older one
/// would be another release of the same number.
///
/// # Errors
/// See [`Link::connect_any`].
pub async fn connect(brokers: &Brokers, channel: &ChannelName) -> Result<Link, LinkError> {
    Ok(newest(brokers, channel).await?.1)
}

/// That broker, and a connection to it.
///
/// # Errors
/// See [`Link::connect_any`].
pub async fn newest(brokers: &Brokers, channel: &ChannelName) -> Result<(Endpoint, Link), LinkError> {
    if !brokers.are_several() {
        let broker = brokers.first();
        return Ok((broker.clone(), Link::connect(broker).await?));
    }
    let mut looks = JoinSet::new();
    for (number, broker) in brokers.iter().enumerate() {
        let (broker, channel) = (broker.clone(), channel.clone());
        looks.spawn(async move {
            let read = async {
                let mut link = Link::connect(&broker).await?;
                match retained::list(&mut link, &channel).await {
                    Ok(list) => Ok((link, list)),
                    // Who reads there is told.
                    Err(AskError::Refused { .. }) => Ok((link, None)),
                    Err(AskError::Link(error)) => Err(error),
                }
            };
            let after = limits::AGREE_LOOK;
            let silent = |_| LinkError::Silent { url: broker.url().to_string(), after };
            let read = timeout(after, read).await.map_err(silent).and_then(|read| read);
            (number, broker, read)
        });
    }
    let (mut found, mut failed) = (Vec::new(), Vec::new());
    while let Some(look) = looks.join_next().await {
        match look {
            Ok((number, broker, Ok((link, list)))) => {
                found.push((list.as_deref().and_then(age), Reverse(number), broker, link));
            }
            Ok((number, _, Err(error))) => failed.push((number, error)),
            Err(_) => {}
        }
    }
    found.sort_by_key(|(age, number, ..)| (*age, *number));
    failed.sort_by_key(|(number, _)| *number);
    match (found.pop(), failed.into_iter().next()) {
        (Some((.., broker, link)), _) => {
            for (.., link) in found {
                link.close().await;
            }
            Ok((broker, link))
        }
        (None, Some((_, error))) => Err(error),
        (None, None) => unreachable!("each broker was found or failed"),
    }
}

/// Whether a list is older than another: a broker that serves it lags behind, or goes back.
#[must_use]
pub fn is_older(list: Option<&[u8]>, than: Option<&[u8]>) -> bool {
    than.and_then(age).is_some_and(|than| list.and_then(age) < Some(than))
}

/// Epoch and sequence of a list.
fn age(payload: &[u8]) -> Option<(u64, u64)> {
    let list = UpdateList::parse(payload).ok()?;
    let release = list.release()?;
    Some((release.epoch, release.sequence))
}

async fn look_at_all(brokers: &Brokers, asked: &Arc<Asked>) -> Vec<View> {
    let mut looks = JoinSet::new();
    for (number, broker) in brokers.iter().enumerate() {
        let (broker, asked) = (broker.clone(), asked.clone());
        looks.spawn(async move { (number, look(&broker, &asked).await) });
    }
    let nobody = View::Unreachable { reason: "it was not asked".to_owned(), passing: true };
    let mut views = vec![nobody; brokers.count()];
    while let Some(look) = looks.join_next().await {
        if let Ok((number, view)) = look {
            views[number] = view;
        }
    }
    views
}

/// What one broker has.
async fn look(broker: &Endpoint, asked: &Asked) -> View {
    let read = async {
        let mut link = Link::connect(broker).await?;
        let found = retained::digests(&mut link, &asked.topics).await?;
        let list = match &asked.list {
            Some(Listed { channel, at, .. })
                if found.get(&asked.topics[*at]) != Some(&asked.digests[*at]) =>
            {
                Some(retained::list(&mut link, channel).await?)
            }
            _ => None,
        };
        link.close().await;
        Ok::<_, AskError>((found, list))
    };
    match timeout(limits::AGREE_LOOK, read).await {
        Ok(Ok((found, list))) => View::Seen(seen(asked, &found, list)),
        Ok(Err(error)) => {
            let passing = match &error {
                AskError::Link(error) => error.is_passing(),
                AskError::Refused { .. } => false,
            };
            View::Unreachable { reason: reason(&error), passing }
        }
        Err(_) => View::Unreachable {
            reason: format!("it did not answer for {} s", limits::AGREE_LOOK.as_secs()),
            passing: true,
        },
    }
}

/// An error without the broker's URL, which stands before it.
fn reason(error: &AskError) -> String {
    match error {
        AskError::Link(LinkError::Unreachable { problem, .. }) => problem.to_string(),
        AskError::Link(LinkError::Lost { reason, .. }) => reason.clone(),
        error => error.to_string(),
    }
}

/// What of it is missing. `list` is what is retained in place of the list, where that is another.
fn seen(asked: &Asked, found: &HashMap<String, Digest>, list: Option<Option<Bytes>>) -> Seen {
    let is_missing = |(topic, digest): (&String, &Digest)| found.get(topic) != Some(digest);
    let each = asked.topics.iter().zip(&asked.digests);
    let mut lacks: BTreeSet<usize> =
        each.enumerate().filter(|(_, pair)| is_missing(*pair)).map(|(number, _)| number).collect();
    let (Some(Listed { at, age: ours, .. }), Some(list)) = (&asked.list, list) else {
        return Seen { lacks, serves: None, newer: false };
    };
    // It came in between.
    if list.as_ref().is_some_and(|payload| Digest::of(payload) == asked.digests[*at]) {
        lacks.remove(at);
        return Seen { lacks, serves: None, newer: false };
    }
    let theirs = list.as_deref().and_then(age);
    let parsed = list.as_deref().and_then(|payload| UpdateList::parse(payload).ok());
    let release = parsed.as_ref().and_then(UpdateList::release);
    let serves = Served {
        sequence: release.map(|release| release.sequence),
        created: release.and_then(|release| release.created),
    };
    Seen { lacks, serves: Some(serves), newer: theirs.is_some() && theirs >= *ours }
}

/// Who is waited for.
fn waits(brokers: &Brokers, views: &[View], asked: &Asked) -> String {
    let topics: Vec<&str> = asked.topics.iter().map(String::as_str).collect();
    let odd = brokers.iter().zip(views).filter_map(|(broker, view)| {
        let standing = agree::standing(view, &topics);
        (standing != Standing::Agrees).then(|| format!("{}, which {standing}", broker.url()))
    });
    format!("waiting for {}", odd.collect::<Vec<_>>().join("; "))
}

impl Wanted<'_> {
    /// Publishes messages again, through one address. Payloads come from the source, or from a broker that has them.
    async fn repair(
        &self,
        brokers: &Brokers,
        through: usize,
        messages: &BTreeSet<usize>,
        views: &[View],
        source: &mut impl FnMut(usize) -> Option<Bytes>,
    ) -> Result<(), AskError> {
        let broker = brokers.iter().nth(through).unwrap_or_else(|| brokers.first());
        let mut link = Link::connect(broker).await?;
        for number in messages {
            let message = &self.messages[*number];
            let payload = match message.payload.clone().or_else(|| source(*number)) {
                Some(payload) => Some(payload),
                None => self.fetch(brokers, *number, views).await?,
            };
            let Some(payload) = payload.filter(|payload| Digest::of(payload) == message.digest) else {
                continue;
            };
            // What a broker refuses, it lacks at the next look.
            let _ = history::put(&mut link, message.topic.clone(), payload).await?;
        }
        link.close().await;
        Ok(())
    }

    /// The payload of a message, from any broker that has it.
    async fn fetch(
        &self,
        brokers: &Brokers,
        number: usize,
        views: &[View],
    ) -> Result<Option<Bytes>, AskError> {
        for (broker, view) in brokers.iter().zip(views) {
            let View::Seen(seen) = view else { continue };
            if seen.lacks.contains(&number) {
                continue;
            }
            let mut link = Link::connect(broker).await?;
            let found = retained::one(&mut link, &self.messages[number].topic).await?;
            link.close().await;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

#[expect(clippy::disallowed_methods, reason = "this is a driver")]
fn now() -> Instant {
    Instant::now()
}
