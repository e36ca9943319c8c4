//! What comes in over HTTP goes through the door and to the index's writer, as from any MQTT client.

use std::sync::Arc;

use bytes::Bytes;
use tokio::{sync::OwnedSemaphorePermit, task::spawn_blocking};

use super::Gateway;
use crate::{
    door::{admit, is_heavy},
    index::writer::{Op, Reply, Settled, Submission},
    mailbox::Mailbox,
    message::Refusal,
    packet::{Properties, Publish, Qos, Reason},
    pulse::BROKER,
};

impl Gateway {
    /// Publishes a message for those who listen now, or whose session waits for it.
    ///
    /// # Errors
    /// It was refused.
    pub async fn tell(&self, topic: String, payload: Bytes) -> Result<(), Refusal> {
        self.submit(topic, payload, false, None, None).await
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
        self.submit(topic, payload, true, expected, place).await
    }

    async fn submit(
        &self,
        topic: String,
        payload: Bytes,
        retain: bool,
        expected: Option<u64>,
        place: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Refusal> {
        let shared = &self.shared;
        let publish = Publish {
            topic,
            payload,
            qos: Qos::AtLeastOnce,
            retain,
            packet_id: 0,
            duplicate: false,
            properties: Properties::default(),
        };
        let topic = publish.topic.as_str().into();
        let admitted = if is_heavy(&publish) {
            let limits = shared.limits.clone();
            let failed = |_| Refusal::new(Reason::UnspecifiedError, "the message could not be checked");
            spawn_blocking(move || admit(publish, &limits)).await.map_err(failed)?
        } else {
            admit(publish, &shared.limits)
        };
        let to = Arc::new(Mailbox::new(&shared.limits));
        let reply = Some(Reply { to: to.clone(), packet_id: 0 });
        let submission = Submission { admitted, topic, origin: BROKER, reply, place, expected };
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
}
