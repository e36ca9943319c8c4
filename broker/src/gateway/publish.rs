//! What comes in over HTTP goes through the door and to the index's writer, as from any MQTT client.

use std::time::Duration;

use bytes::Bytes;
use tokio::{sync::OwnedSemaphorePermit, time::sleep};

use super::Gateway;
use crate::{
    clock,
    door::admit,
    edge::{Edge, Part},
    index::IndexError,
    message::Refusal,
    packet::Reason,
    pulse::{BROKER, MIRROR},
    submit::{By, live, retained, submit},
};

/// How often is looked whether the mirror has what somebody else published.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// So many times.
const CAUGHT_UP: usize = 200;
/// After how long whoever published upstream at the same moment has been heard there.
const SETTLED: Duration = Duration::from_millis(500);

impl Gateway {
    /// Publishes a message for those who listen now, or whose session waits for it.
    ///
    /// # Errors
    /// It was refused.
    pub async fn tell(&self, topic: String, payload: Bytes) -> Result<(), Refusal> {
        match self.upstream() {
            Some(upstream) => upstream.publish(topic, payload, false).await,
            None => submit(&self.shared, live(topic, payload), By::origin(BROKER)).await,
        }
    }

    /// Publishes a retained message, and waits until it is durable. With `expected`, only if that is the version of
    /// what the topic holds, 0 for nothing. `place` is given back when it is settled.
    ///
    /// # Errors
    /// It was refused, and nothing changed.
    pub async fn publish(
        &self,
        topic: String,
        payload: Bytes,
        expected: Option<u64>,
        place: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Refusal> {
        if let Some(upstream) = self.upstream() {
            return self.publish_upstream(upstream, topic, payload, expected).await;
        }
        let publish = retained(topic, payload);
        submit(&self.shared, publish, By { origin: BROKER, expected, place }).await
    }

    /// The cluster that this is a gateway to, if it is one.
    fn upstream(&self) -> Option<&Edge> {
        self.shared.edge.as_deref().filter(|edge| edge.part() == Part::Gateway)
    }

    /// The same with the cluster that this is a gateway to. It has no conditions; so it is asked what it retains once
    /// others that published at the same moment have been heard.
    async fn publish_upstream(
        &self,
        upstream: &Edge,
        topic: String,
        payload: Bytes,
        expected: Option<u64>,
    ) -> Result<(), Refusal> {
        let conflict = || {
            let text = "somebody else published there in the meantime";
            Refusal::new(Reason::ImplementationSpecificError, text)
        };
        if let Some(expected) = expected {
            let present = self.present(&topic)?;
            if present.as_ref().map_or(0, |(version, _)| *version) != expected {
                return Err(conflict());
            }
            if let Some((_, present)) = present {
                let there = upstream.read(topic.clone()).await?;
                if there != present {
                    self.catch_up(&topic, &there).await;
                    return Err(conflict());
                }
            }
        }
        // What the door would refuse, the cluster must not have either.
        let publish = retained(topic.clone(), payload.clone());
        admit(publish, &self.shared.limits)?;
        upstream.publish(topic.clone(), payload.clone(), true).await?;
        if expected.is_some() {
            sleep(SETTLED).await;
            let there = upstream.read(topic.clone()).await?;
            if there != payload {
                self.catch_up(&topic, &there).await;
                return Err(conflict());
            }
        }
        // Who asked sees it here at once.
        submit(&self.shared, retained(topic, payload), By::origin(MIRROR)).await
    }

    /// What the index has of a topic, and its version.
    fn present(&self, topic: &str) -> Result<Option<(u64, Bytes)>, Refusal> {
        let index = &self.shared.index;
        let read = || {
            let Some(message) = index.get(topic, clock::now().unix_ms)? else { return Ok(None) };
            Ok(Some((message.version, index.payload(&message.payload)?)))
        };
        read().map_err(|error: IndexError| {
            tracing::error!(topic, %error, "cannot look what is here");
            Refusal::new(Reason::UnspecifiedError, "the index failed")
        })
    }

    /// Waits until the index has what the upstream has, or for long enough.
    async fn catch_up(&self, topic: &str, there: &Bytes) {
        for _ in 0..CAUGHT_UP {
            if self.present(topic).is_ok_and(|present| present.is_some_and(|(_, present)| present == *there))
            {
                return;
            }
            sleep(LOOK_AGAIN).await;
        }
    }
}
