//! Questions about what a broker retains.
//!
//! MQTT has no "nothing there": a broker that retains nothing says nothing. So every question ends with one
//! whose answer is sure to come, and what did not come before it is not there.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use bytes::Bytes;
use mpypi_protocol::{
    ChannelName, Chunks, Digest, NodeId, Topic,
    digest::Hasher,
    limits::{ROOT, SUBSCRIBE_FILTERS},
    list::Piece,
    node::{Info, State},
    topic::{NodeSubject, ROOTS},
};

use crate::{
    limits,
    link::{Link, LinkError, Signal},
};

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The connection failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The broker does not let us read.
    #[error("the broker does not let this user read `{topic}`")]
    Refused {
        /// The topic or filter.
        topic: String,
    },
}

/// What `channel` retains now, `None` if nothing. Our brokers always retain something, at least `[]`.
///
/// # Errors
/// See [`AskError`].
pub async fn list(link: &mut Link, channel: &ChannelName) -> Result<Option<Bytes>, AskError> {
    list_beside(link, channel, |_, _| {}).await
}

async fn list_beside(
    link: &mut Link,
    channel: &ChannelName,
    mut beside: impl FnMut(&str, Bytes),
) -> Result<Option<Bytes>, AskError> {
    let filter = channel.topic();
    let mut found = None;
    let mut subscribed = false;
    link.subscribe(std::slice::from_ref(&filter));
    while !subscribed || found.is_none() {
        let signal = match subscribed {
            true => link.next_within(limits::QUIET).await?,
            false => Some(link.next().await?),
        };
        match signal {
            Some(Signal::Message { topic, payload }) if topic == filter => found = Some(payload),
            Some(Signal::Message { topic, payload }) => beside(&topic, payload),
            Some(Signal::Subscribed(accepted)) if !accepted.contains(&true) => {
                return Err(AskError::Refused { topic: filter });
            }
            Some(Signal::Subscribed(_)) => subscribed = true,
            Some(_) => {}
            None => break,
        }
    }
    // On a slow line the answer may take longer than the quiet; it cannot take longer than this.
    link.unsubscribe(&filter);
    loop {
        match link.next().await? {
            Signal::Message { topic, payload } if topic == filter => found = Some(payload),
            Signal::Message { topic, payload } => beside(&topic, payload),
            Signal::Unsubscribed => return Ok(found.filter(|payload| !payload.is_empty())),
            _ => {}
        }
    }
}

/// What `channel` retains now, and the roots that the broker retains, by version. On a broker that does not let us read
/// roots there are none.
///
/// # Errors
/// See [`AskError`].
pub async fn channel(
    link: &mut Link,
    channel: &ChannelName,
) -> Result<(Option<Bytes>, BTreeMap<u64, Bytes>), AskError> {
    let filter = format!("{ROOTS}+");
    let mut roots = BTreeMap::new();
    // What is retained there comes before the answer to what is asked for next.
    link.subscribe(std::slice::from_ref(&filter));
    loop {
        match link.next().await? {
            Signal::Message { topic, payload } => note_root(&mut roots, &topic, payload),
            Signal::Subscribed(_) => break,
            _ => {}
        }
    }
    let list = list_beside(link, channel, |topic, payload| note_root(&mut roots, topic, payload)).await?;
    link.unsubscribe(&filter);
    loop {
        match link.next().await? {
            Signal::Message { topic, payload } => note_root(&mut roots, &topic, payload),
            Signal::Unsubscribed => return Ok((list, roots)),
            _ => {}
        }
    }
}

fn note_root(roots: &mut BTreeMap<u64, Bytes>, topic: &str, payload: Bytes) {
    if let Ok(Topic::Root(version)) = Topic::parse(topic)
        && !payload.is_empty()
        && payload.len() <= ROOT
    {
        roots.insert(version, payload);
    }
}

/// The topics of those of `pieces` that the broker retains, with the right bytes. `answers` says that it retains a list
/// for `channel`, and so has an answer to end with.
///
/// # Errors
/// See [`AskError`].
pub async fn pieces(
    link: &mut Link,
    channel: &ChannelName,
    answers: bool,
    pieces: &[Piece],
) -> Result<HashSet<String>, AskError> {
    let mut found = HashSet::new();
    for batch in pieces.chunks(limits::ASK_BATCH) {
        let topics: Vec<String> = batch.iter().map(|piece| piece.topic.clone()).collect();
        let wanted: HashMap<&str, Digest> =
            batch.iter().map(|piece| (piece.topic.as_str(), piece.digest)).collect();
        let fence = channel.topic();
        let mut ended = !answers;
        let mut take = |signal: &Signal| {
            if let Signal::Message { topic, payload } = signal {
                match wanted.get(topic.as_str()) {
                    Some(digest) if Digest::of(payload) == *digest => drop(found.insert(topic.clone())),
                    Some(_) => {}
                    None => ended |= *topic == fence,
                }
            }
            (ended, found.len())
        };

        let mut owed = 0;
        let windows = topics.chunks(SUBSCRIBE_FILTERS).map(<[String]>::to_vec);
        for window in windows.chain(answers.then(|| vec![fence.clone()])) {
            while owed == limits::ASKS_IN_FLIGHT {
                let signal = link.next().await?;
                take(&signal);
                owed -= usize::from(matches!(signal, Signal::Subscribed(_)));
            }
            link.subscribe(&window);
            owed += 1;
        }
        let mut over = !answers;
        while owed > 0 || !over {
            let signal = match owed {
                0 => link.next_within(limits::QUIET).await?,
                _ => Some(link.next().await?),
            };
            let Some(signal) = signal else { break };
            over = take(&signal).0;
            owed -= usize::from(matches!(signal, Signal::Subscribed(_)));
        }

        for topic in topics.iter().chain(answers.then_some(&fence)) {
            while owed == limits::UNASKS_IN_FLIGHT {
                let signal = link.next().await?;
                take(&signal);
                owed -= usize::from(signal == Signal::Unsubscribed);
            }
            link.unsubscribe(topic);
            owed += 1;
        }
        while owed > 0 {
            let signal = link.next().await?;
            take(&signal);
            owed -= usize::from(signal == Signal::Unsubscribed);
        }
    }
    Ok(found)
}

/// The digests of what the broker retains on `topics`, by topic: each asked for by its name and at QoS 0, a window of
/// them at a time.
///
/// # Errors
/// See [`AskError`].
pub async fn digests(link: &mut Link, topics: &[String]) -> Result<HashMap<String, Digest>, AskError> {
    let mut found = HashMap::new();
    read(link, topics, |topic, payload| _ = found.insert(topic, Digest::of(&payload))).await?;
    Ok(found)
}

/// What the broker retains on `topics`, by topic: asked for likewise.
///
/// # Errors
/// See [`AskError`].
pub async fn some(link: &mut Link, topics: &[String]) -> Result<HashMap<String, Bytes>, AskError> {
    let mut found = HashMap::new();
    read(link, topics, |topic, payload| _ = found.insert(topic, payload)).await?;
    Ok(found)
}

/// The digest of what the chunks of a package are together, as the broker retains them; `None` if one is missing.
///
/// # Errors
/// See [`AskError`].
pub async fn joined(link: &mut Link, package: &Digest, chunks: &Chunks) -> Result<Option<Digest>, AskError> {
    let topics: Vec<String> = chunks.pieces(package).map(|piece| piece.topic).collect();
    let mut hasher = Hasher::default();
    // In their order, and few at a time.
    for topics in topics.chunks(SUBSCRIBE_FILTERS) {
        let found = some(link, topics).await?;
        for topic in topics {
            let Some(part) = found.get(topic) else { return Ok(None) };
            hasher.update(part);
        }
    }
    Ok(Some(hasher.finish()))
}

/// What the broker retains on `topic`.
///
/// # Errors
/// See [`AskError`].
pub async fn one(link: &mut Link, topic: &str) -> Result<Option<Bytes>, AskError> {
    Ok(some(link, &[topic.to_owned()]).await?.remove(topic))
}

async fn read(
    link: &mut Link,
    topics: &[String],
    mut take: impl FnMut(String, Bytes),
) -> Result<(), AskError> {
    for batch in topics.chunks(limits::ASK_BATCH) {
        let mut open: HashSet<&str> = batch.iter().map(String::as_str).collect();
        let mut windows = batch.chunks(SUBSCRIBE_FILTERS);
        let mut owed: VecDeque<&[String]> = VecDeque::new();
        loop {
            while owed.len() < limits::ASKS_IN_FLIGHT
                && let Some(window) = windows.next()
            {
                link.subscribe(window);
                owed.push_back(window);
            }
            // The last answers may come behind the last SUBACK, or never.
            let signal = match (owed.is_empty(), open.is_empty()) {
                (true, true) => break,
                (true, false) => link.next_within(limits::QUIET).await?,
                (false, _) => Some(link.next().await?),
            };
            match signal {
                None => break,
                Some(Signal::Message { topic, payload })
                    if open.remove(topic.as_str()) && !payload.is_empty() =>
                {
                    take(topic, payload);
                }
                Some(Signal::Subscribed(accepted)) => {
                    let window = owed.pop_front().unwrap_or_default();
                    if let Some((topic, _)) = window.iter().zip(&accepted).find(|(_, accepted)| !**accepted) {
                        return Err(AskError::Refused { topic: topic.clone() });
                    }
                }
                Some(_) => {}
            }
        }
        let mut leaving = batch.iter();
        let mut owed = 0;
        loop {
            while owed < limits::UNASKS_IN_FLIGHT
                && let Some(topic) = leaving.next()
            {
                link.unsubscribe(topic);
                owed += 1;
            }
            if owed == 0 {
                break;
            }
            match link.next().await? {
                Signal::Message { topic, payload } if open.remove(topic.as_str()) && !payload.is_empty() => {
                    take(topic, payload);
                }
                Signal::Unsubscribed => owed -= 1,
                _ => {}
            }
        }
    }
    Ok(())
}

/// Everything retained under `filters`, wildcards included, by topic.
///
/// # Errors
/// See [`AskError`].
pub async fn all(link: &mut Link, filters: &[String]) -> Result<Vec<(String, Bytes)>, AskError> {
    // A channel that nobody uses: our brokers answer it with `[]`, after everything asked before.
    let fence = format!("mpypi/channels/fence-{:08x}", fastrand::u32(..));
    let mut found = Vec::new();
    before(link, filters, &fence, |topic, payload| found.push((topic, payload))).await?;
    Ok(found)
}

/// The Mpy-BLOX nodes that follow `channel`, or of which nobody says what they follow. `answers` says that the broker retains
/// a list for `channel`.
///
/// # Errors
/// See [`AskError`].
pub async fn mpyblox(
    link: &mut Link,
    channel: &ChannelName,
    answers: bool,
) -> Result<BTreeMap<NodeId, Info>, AskError> {
    let fence = match answers {
        true => channel.topic(),
        false => format!("mpypi/channels/fence-{:08x}", fastrand::u32(..)),
    };
    let mut nodes = BTreeMap::new();
    survey(link, "mpypi/nodes/+/info", &fence, |topic, payload| {
        let info = Info::parse(&payload).ok().filter(Info::is_mpyblox);
        if let (Ok(Topic::Node(node, NodeSubject::Info)), Some(info)) = (Topic::parse(&topic), info)
            && info.channel.as_ref().is_none_or(|other| other == channel)
        {
            nodes.insert(node, info);
        }
    })
    .await?;
    // Such a node says nothing of its channel: a broker of ours does, in the state that it keeps for it.
    if !nodes.is_empty() && link.adapts_for_mpyblox() {
        survey(link, "mpypi/nodes/+/state", &fence, |topic, payload| {
            let state = State::parse(&payload).ok();
            let followed = state.and_then(|state| state.extra.get("channel")?.as_str().map(str::to_owned));
            if let (Ok(Topic::Node(node, NodeSubject::State)), Some(followed)) =
                (Topic::parse(&topic), followed)
                && followed != channel.as_str()
            {
                nodes.remove(&node);
            }
        })
        .await?;
    }
    Ok(nodes)
}

/// Everything retained under `filter` that comes before the answer to `fence`; the subscriptions are given up then.
async fn survey(
    link: &mut Link,
    filter: &str,
    fence: &str,
    take: impl FnMut(String, Bytes),
) -> Result<(), AskError> {
    let found = before(link, &[filter.to_owned()], fence, take).await;
    for filter in [filter, fence] {
        link.unsubscribe(filter);
    }
    for _ in 0..2 {
        while link.next().await? != Signal::Unsubscribed {}
    }
    found
}

/// Everything retained under `filters` that comes before the answer to `fence`.
async fn before(
    link: &mut Link,
    filters: &[String],
    fence: &str,
    mut take: impl FnMut(String, Bytes),
) -> Result<(), AskError> {
    let mut refused = None;
    let mut owed = 0;
    for filter in filters.iter().map(String::as_str).chain([fence]) {
        link.subscribe(&[filter.to_owned()]);
        owed += 1;
    }
    let mut answered = 0;
    let mut ended = false;
    while owed > 0 || !ended {
        let signal = match owed {
            0 => link.next_within(limits::QUIET).await?,
            _ => Some(link.next().await?),
        };
        match signal {
            None => break,
            Some(Signal::Message { topic, .. }) if topic == fence => ended = true,
            Some(Signal::Message { topic, payload }) => take(topic, payload),
            Some(Signal::Subscribed(accepted)) => {
                if let Some(filter) = filters.get(answered).filter(|_| !accepted.contains(&true)) {
                    refused.get_or_insert_with(|| AskError::Refused { topic: filter.clone() });
                }
                answered += 1;
                owed -= 1;
            }
            Some(_) => {}
        }
    }
    match refused {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
