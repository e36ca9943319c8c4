//! `$SYS`: how the broker is, as messages. Names and units are mosquitto's, for the tools that know them.
//!
//! The values are kept in memory beside the index and served like retained messages; those that changed are
//! sent to their subscribers every [`EVERY`].

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use mpypi_protocol::{Digest, topic};

use crate::{
    connection::Shared,
    door::{Admitted, Kind},
    index::{
        Step,
        writer::{Op, Reply, Settled, Submission},
    },
    mailbox::Mailbox,
    message::{Message, Payload, Refusal},
    metrics::Gauges,
    mpyblox,
    packet::{Properties, Publish, Qos, Reason},
    pulse::BROKER,
};

/// How often the values are looked at; mosquitto's default too.
pub const EVERY: Duration = Duration::from_secs(10);
/// What all topics here start with.
pub const PREFIX: &str = "$SYS/";

/// The values at present.
#[derive(Debug, Default)]
pub struct Sys {
    /// Held to read or replace values.
    values: RwLock<BTreeMap<Arc<str>, Bytes>>,
}

impl Sys {
    /// The message of `topic`.
    #[must_use]
    pub fn get(&self, topic: &str) -> Option<Message> {
        let values = self.values.read().unwrap_or_else(PoisonError::into_inner);
        values.get_key_value(topic).map(|(topic, value)| message(topic, value))
    }

    /// The first message after topic `after` that matches `filter`.
    #[must_use]
    pub fn next(&self, filter: &str, after: Option<&str>) -> Step {
        let values = self.values.read().unwrap_or_else(PoisonError::into_inner);
        let found = values
            .iter()
            .find(|(name, _)| after.is_none_or(|after| ***name > *after) && topic::matches(filter, name));
        found.map_or(Step::End, |(topic, value)| Step::Found(message(topic, value)))
    }

    /// Replaces the values, and returns those that changed.
    fn replace(&self, new: BTreeMap<Arc<str>, Bytes>) -> Vec<(Arc<str>, Bytes)> {
        let mut values = self.values.write().unwrap_or_else(PoisonError::into_inner);
        let changed = new.iter().filter(|(name, value)| values.get(*name) != Some(value));
        let changed = changed.map(|(name, value)| (name.clone(), value.clone())).collect();
        *values = new;
        changed
    }
}

/// Keeps the values up to date and tells subscribers, until dropped.
pub async fn keep(shared: &Shared) {
    loop {
        tokio::time::sleep(EVERY).await;
        for (topic, value) in renew(shared) {
            say(shared, &topic, value).await;
        }
    }
}

/// Brings the values up to date, and returns those that changed.
pub fn renew(shared: &Shared) -> Vec<(Arc<str>, Bytes)> {
    match Gauges::look(shared) {
        Ok(gauges) => shared.index.sys().replace(values(shared, &gauges)),
        Err(error) => {
            tracing::error!(%error, "cannot say how the broker is");
            Vec::new()
        }
    }
}

/// Sends a message of the broker itself, past the door; says whether the writer took it.
pub(crate) async fn say(shared: &Shared, topic: &str, payload: Bytes) -> bool {
    submit(shared, topic, payload, Kind::Live).await
}

/// The same, with a message that is kept.
pub(crate) async fn retain(shared: &Shared, topic: &str, payload: Bytes) -> bool {
    submit(shared, topic, payload, Kind::Retained).await
}

/// The same, if the topic's record still has version `expected`, 0 for none; returns when it is durable.
///
/// # Errors
/// Somebody else was faster, or the index does not take it.
pub(crate) async fn settle(
    shared: &Shared,
    topic: &str,
    payload: Bytes,
    expected: u64,
) -> Result<(), Refusal> {
    let answers = Arc::new(Mailbox::new(&shared.limits));
    let reply = Reply { to: answers.clone(), packet_id: 0 };
    let submission = Submission {
        reply: Some(reply),
        expected: Some(expected),
        ..submission(topic, payload, Kind::Retained)
    };
    let stopped = || Refusal::new(Reason::ServerShuttingDown, "the index has stopped");
    shared.ops.send(Op::Publish(Box::new(submission))).await.map_err(|_| stopped())?;
    loop {
        match answers.pop_settled() {
            Some(Settled::Published { result, .. }) => return result,
            Some(Settled::Changed(_)) => {}
            None => tokio::select! {
                () = answers.arrived() => {}
                () = shared.ops.closed() => return Err(stopped()),
            },
        }
    }
}

async fn submit(shared: &Shared, topic: &str, payload: Bytes, kind: Kind) -> bool {
    let op = Op::Publish(Box::new(submission(topic, payload, kind)));
    shared.ops.send(op).await.is_ok()
}

fn submission(topic: &str, payload: Bytes, kind: Kind) -> Submission {
    let retain = matches!(kind, Kind::Retained);
    let digest = retain.then(|| Digest::of(&payload));
    let publish = Publish {
        topic: topic.to_owned(),
        payload,
        qos: if retain { Qos::AtLeastOnce } else { Qos::AtMostOnce },
        retain,
        packet_id: 0,
        duplicate: false,
        properties: Properties::default(),
    };
    let admitted = Ok(Admitted { publish, kind, digest });
    let topic = topic.into();
    Submission { admitted, topic, origin: BROKER, reply: None, place: None, expected: None }
}

fn values(shared: &Shared, gauges: &Gauges) -> BTreeMap<Arc<str>, Bytes> {
    let metrics = &shared.metrics;
    let away = metrics.sessions_away.load(Ordering::Relaxed);
    let numbers = [
        ("bytes/received", metrics.bytes_received.value()),
        ("bytes/sent", metrics.bytes_sent.value()),
        ("clients/connected", gauges.clients as u64),
        ("clients/disconnected", away),
        ("clients/total", gauges.clients as u64 + away),
        ("messages/received", metrics.messages_received.value()),
        ("messages/sent", metrics.messages_sent.value()),
        ("publish/messages/received", metrics.messages_received.value()),
        ("publish/messages/sent", metrics.messages_sent.value()),
        ("retained messages/count", gauges.index.messages),
        ("store/messages/bytes", gauges.index.bytes),
        ("store/messages/count", gauges.index.messages),
        ("subscriptions/count", gauges.subscriptions as u64),
    ];
    let texts = [
        ("version", format!("mpypi-broker version {}", env!("CARGO_PKG_VERSION"))),
        ("uptime", format!("{} seconds", gauges.uptime.as_secs())),
    ];
    let mpyblox = mpyblox::WORDS.iter().zip(gauges.mpyblox);
    let mpyblox = mpyblox.map(|(word, nodes)| (format!("mpyblox/{word}"), nodes.to_string()));
    numbers
        .into_iter()
        .map(|(name, number)| (name.to_owned(), number.to_string()))
        .chain(texts.map(|(name, text)| (name.to_owned(), text)))
        .chain(mpyblox)
        .map(|(name, value)| (format!("{PREFIX}broker/{name}").into(), Bytes::from(value)))
        .collect()
}

fn message(topic: &Arc<str>, value: &Bytes) -> Message {
    Message {
        topic: topic.clone(),
        payload: Payload::Inline(value.clone()),
        qos: Qos::AtMostOnce,
        retain: true,
        properties: Properties::default(),
        expires_ms: None,
        origin: None,
        version: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_name_and_by_wildcard_and_only_changes_are_told() {
        let sys = Sys::default();
        let values = |uptime: &'static str| {
            let values = [("$SYS/broker/uptime", uptime), ("$SYS/broker/version", "1")];
            values.into_iter().map(|(name, value)| (name.into(), Bytes::from(value))).collect()
        };
        assert_eq!(sys.replace(values("0")).len(), 2);
        assert_eq!(sys.replace(values("10")), [("$SYS/broker/uptime".into(), Bytes::from("10"))]);
        assert_eq!(sys.get("$SYS/broker/uptime").unwrap().payload, Payload::Inline(Bytes::from("10")));
        assert!(sys.get("$SYS/broker/never").is_none());
        let all = |filter: &str| {
            let mut found = Vec::<String>::new();
            while let Step::Found(message) = sys.next(filter, found.last().map(String::as_str)) {
                found.push(message.topic.to_string());
            }
            found
        };
        assert_eq!(all("$SYS/#"), ["$SYS/broker/uptime", "$SYS/broker/version"]);
        assert_eq!(all("$SYS/+/version"), ["$SYS/broker/version"]);
        assert!(all("#").is_empty() && all("+/broker/version").is_empty());
    }
}
