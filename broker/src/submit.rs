//! A message of a part of the broker itself, on its way through the door to the index's writer, and what became of it.

use std::sync::Arc;

use bytes::Bytes;
use tokio::{sync::OwnedSemaphorePermit, task::spawn_blocking};

use crate::{
    connection::Shared,
    door::{Admitted, Kind, admit, is_heavy},
    index::writer::{Op, Reply, Settled, Submission},
    mailbox::Mailbox,
    message::{Refusal, SessionId},
    packet::{Properties, Publish, Qos, Reason},
};

/// Who submits a message, and on which condition.
#[derive(Debug)]
pub struct By {
    /// Who.
    pub origin: SessionId,
    /// The version that the topic must have, 0 for none; `None` for a message that does not care.
    pub expected: Option<u64>,
    /// The message's place among large packets, given back when it is settled.
    pub place: Option<OwnedSemaphorePermit>,
}

impl By {
    /// `origin`, on no condition.
    #[must_use]
    pub fn origin(origin: SessionId) -> By {
        By { origin, expected: None, place: None }
    }
}

/// A message that is to be retained.
#[must_use]
pub fn retained(topic: String, payload: Bytes) -> Publish {
    Publish {
        topic,
        payload,
        qos: Qos::AtLeastOnce,
        retain: true,
        packet_id: 0,
        duplicate: false,
        properties: Properties::default(),
    }
}

/// A message for those who listen now, or whose session waits for it.
#[must_use]
pub fn live(topic: String, payload: Bytes) -> Publish {
    Publish { retain: false, ..retained(topic, payload) }
}

/// Publishes a message, and waits until it is durable.
///
/// # Errors
/// It was refused, and nothing changed.
pub async fn submit(shared: &Shared, publish: Publish, by: By) -> Result<(), Refusal> {
    let topic = publish.topic.as_str().into();
    let admitted = if is_heavy(&publish) {
        let limits = shared.limits.clone();
        let failed = |_| Refusal::new(Reason::UnspecifiedError, "the message could not be checked");
        spawn_blocking(move || admit(publish, &limits)).await.map_err(failed)?
    } else {
        admit(publish, &shared.limits)
    };
    settle(shared, admitted, topic, by).await
}

/// Clears what a topic retains, past the door, which keeps channels from being cleared.
///
/// # Errors
/// The index does not take it.
pub async fn clear(shared: &Shared, publish: Publish, by: By) -> Result<(), Refusal> {
    let topic = publish.topic.as_str().into();
    settle(shared, Ok(Admitted { publish, kind: Kind::Retained, digest: None }), topic, by).await
}

async fn settle(
    shared: &Shared,
    admitted: Result<Admitted, Refusal>,
    topic: Arc<str>,
    by: By,
) -> Result<(), Refusal> {
    let By { origin, expected, place } = by;
    let to = Arc::new(Mailbox::new(&shared.limits));
    let reply = Some(Reply { to: to.clone(), packet_id: 0 });
    let submission = Submission { admitted, topic, origin, reply, place, expected };
    let stopped = || Refusal::new(Reason::ServerShuttingDown, "the index has stopped");
    shared.ops.send(Op::Publish(Box::new(submission))).await.map_err(|_| stopped())?;
    loop {
        if let Some(Settled::Published { result, .. }) = to.pop_settled() {
            return result;
        }
        tokio::select! {
            () = to.arrived() => {}
            () = shared.ops.closed() => return Err(stopped()),
        }
    }
}
