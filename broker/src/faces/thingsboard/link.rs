//! A device's session by MQTT, with its way to the index: the one place that a connection knows of this face.

use std::{num::NonZeroU32, sync::Arc};

use mpypi_protocol::{
    NodeId,
    topic::{self, NodeSubject},
};

use super::{
    ask::Ask,
    desk,
    session::{Answer, Piece, Session},
};
use crate::{
    access::devices::Device,
    connection::Shared,
    index::IndexError,
    listener::Listener,
    mailbox::{Delivery, Mailbox},
    message::Refusal,
    packet::{Publish, Reason, SubscriptionOptions},
    sys,
};

/// What marks a delivery as one for the link, not for its client: no client can call a subscription so.
const NEWS: NonZeroU32 = NonZeroU32::MAX;

/// A device's session.
#[derive(Debug)]
pub struct Link {
    node: NodeId,
    device: Device,
    session: Session,
    _listener: Listener,
}

/// What came of a message of the device.
#[derive(Debug)]
pub struct Taken {
    /// What to answer it.
    pub answers: Vec<Answer>,
    /// What to acknowledge.
    pub result: Result<(), Refusal>,
    /// Why to send it away then, if so.
    pub end: Option<&'static str>,
}

/// Whether a topic or filter is one that a device's messages end at, here: all but ours.
#[must_use]
pub fn is_ours(topic: &str) -> bool {
    !topic.starts_with("mpypi/")
}

/// Whether a filter is one of this API.
#[must_use]
pub fn is_filter(filter: &str) -> bool {
    filter.starts_with("v1/") || filter.starts_with("v2/")
}

impl Link {
    /// Begins the session of `node`, whose news come into `mailbox`.
    ///
    /// # Errors
    /// The index fails.
    pub async fn begin(
        shared: &Shared,
        node: NodeId,
        device: Device,
        mailbox: &Arc<Mailbox>,
    ) -> Result<Link, IndexError> {
        // Before looking: what changes between the two is then seen twice, never missed.
        let listener = listen(shared, &device, mailbox);
        let session = Session::new(desk::assigned(shared, &node, &device).await?);
        let link = Link { node, device, session, _listener: listener };
        link.say_online(shared, "1").await;
        Ok(link)
    }

    /// Whether what came is for the link.
    #[must_use]
    pub fn is_news(delivery: &Delivery) -> bool {
        delivery.identifiers.first() == Some(&NEWS)
    }

    /// Looks what the device is to have now; says what to tell it, if it listens to [`ATTRIBUTES`](super::session::ATTRIBUTES).
    ///
    /// # Errors
    /// The index fails.
    pub async fn look_again(&mut self, shared: &Shared) -> Result<Vec<Answer>, IndexError> {
        Ok(self.session.assign(desk::assigned(shared, &self.node, &self.device).await?))
    }

    /// Takes a message of the device. `most` bytes fit into an answer.
    pub async fn take(&mut self, shared: &Shared, publish: &Publish, most: u64) -> Taken {
        let done = |result| Taken { answers: Vec::new(), result, end: None };
        if let Err(error) = topic::check_name(&publish.topic) {
            return done(Err(Refusal::new(Reason::TopicNameInvalid, error.to_string())));
        }
        let ask = match Ask::parse(&publish.topic, &publish.payload) {
            Ok(ask) => ask,
            Err(error) => return done(Err(Refusal::new(Reason::PayloadFormatInvalid, error.to_string()))),
        };
        match ask {
            Ask::Attributes(id, keys) => match desk::own(&shared.index, &self.node) {
                Ok(own) => {
                    let answer = self.session.attributes(id, &keys, &own);
                    Taken { answers: vec![answer], result: Ok(()), end: None }
                }
                Err(error) => {
                    tracing::error!(%error, node = %self.node, "cannot read a device's attributes");
                    done(Err(Refusal::new(Reason::UnspecifiedError, "the index failed")))
                }
            },
            Ask::Learn(new) => done(desk::learn(shared, &self.node, &self.device, &new).await),
            Ask::Telemetry(report) => {
                done(desk::report(shared, &self.node, &self.device, &report, self.session.assigned()).await)
            }
            Ask::Chunk(chunk) => match self.session.chunk(&chunk, most) {
                Piece::Served(answer) => Taken { answers: vec![answer], result: Ok(()), end: None },
                Piece::Refused(answer, reason) => {
                    Taken { answers: vec![answer], result: Ok(()), end: Some(reason) }
                }
            },
            Ask::Other => done(Ok(())),
        }
    }

    /// Ends the session.
    pub async fn end(self, shared: &Shared) {
        self.say_online(shared, "0").await;
    }

    /// Says whether the node is there, as others have their last will do.
    async fn say_online(&self, shared: &Shared, online: &'static str) {
        sys::retain(shared, &self.node.topic(NodeSubject::Online), online.into()).await;
    }
}

/// Has new lists of a device's channels come into `mailbox`.
#[must_use]
pub fn listen(shared: &Shared, device: &Device, mailbox: &Arc<Mailbox>) -> Listener {
    let topics = std::iter::once(&device.channel).chain(&device.software).map(|name| name.topic());
    let options = SubscriptionOptions {
        retain_as_published: true,
        identifier: Some(NEWS),
        ..SubscriptionOptions::LIVE
    };
    Listener::new(&shared.subscriptions, &shared.tickets, topics, options, mailbox.clone())
}
