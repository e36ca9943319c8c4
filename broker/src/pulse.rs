//! The broker's pulse: a message through the writer and the bus, as any client's would go.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{sync::Mutex, time::timeout};

use crate::{
    bus::{SharedSubscriptions, Tickets},
    clock::{self, Now},
    connection::Shared,
    limits::Limits,
    listener::Listener,
    mailbox::{Mail, Mailbox},
    message::{Payload, SessionId},
    packet::SubscriptionOptions,
    sys,
};

/// Who sends what the broker itself has to say. Clients' sessions count from 1, and listeners of its own far above.
pub const BROKER: SessionId = SessionId(0);
/// Who brings what an upstream broker has. Nobody counts so far, [listeners](crate::listener) included.
pub const MIRROR: SessionId = SessionId(u64::MAX >> 1);
/// The topic of a beat. Clients may listen, and hear nothing of interest.
const TOPIC: &str = "$mpypi/pulse";
/// How long a beat may take before the broker counts as ill.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a beat counts: looking often must not cost more.
const FRESH: Duration = Duration::from_secs(1);

/// Feels whether messages get through.
#[derive(Debug)]
pub struct Pulse {
    listener: Listener,
    /// Held for one beat, so that only one is under way.
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    number: u64,
    felt: Option<(Now, Result<Duration, Ill>)>,
}

/// What does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ill {
    /// The index's writer takes nothing, or has ended.
    #[error("the index's writer does not answer")]
    Writer,
    /// What the writer announced does not arrive.
    #[error("messages do not come through")]
    Bus,
}

impl Pulse {
    /// Starts to listen.
    #[must_use]
    pub fn new(subscriptions: &SharedSubscriptions, tickets: &Tickets, limits: &Limits) -> Pulse {
        let mailbox = Arc::new(Mailbox::new(limits));
        let listener = Listener::new(subscriptions, tickets, [TOPIC], SubscriptionOptions::LIVE, mailbox);
        Pulse { listener, last: Mutex::default() }
    }

    /// How long a message takes through the broker.
    ///
    /// # Errors
    /// Says what did not answer in time.
    pub async fn feel(&self, shared: &Shared) -> Result<Duration, Ill> {
        let mut last = self.last.lock().await;
        let now = clock::now();
        if let Some((when, felt)) = last.felt
            && now.instant.duration_since(when.instant) < FRESH
        {
            return felt;
        }
        last.number += 1;
        let number = last.number.to_be_bytes();
        let send = sys::say(shared, TOPIC, Bytes::copy_from_slice(&number));
        let felt = match timeout(PATIENCE, send).await {
            Ok(true) => match timeout(PATIENCE, self.hear(&number)).await {
                Ok(()) => Ok(clock::now().instant.duration_since(now.instant)),
                Err(_) => Err(Ill::Bus),
            },
            _ => Err(Ill::Writer),
        };
        last.felt = Some((clock::now(), felt));
        felt
    }

    /// Waits for the beat of this number; earlier ones were given up.
    async fn hear(&self, number: &[u8]) {
        let mailbox = self.listener.mailbox();
        loop {
            match mailbox.pop() {
                Some(Mail::Delivery(delivery)) => match &delivery.message.payload {
                    Payload::Inline(bytes) if **bytes == *number => return,
                    _ => {}
                },
                Some(_) => {}
                None => mailbox.arrived().await,
            }
        }
    }
}
