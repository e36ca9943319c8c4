//! The broker's own ears: it listens on the bus beside any client, and as one would.

use std::sync::{Arc, PoisonError};

use crate::{
    bus::{SharedSubscriptions, Tickets},
    mailbox::Mailbox,
    message::SessionId,
    packet::SubscriptionOptions,
    subscriptions::Receiver,
};

/// Has what matches some filters come into a mailbox, until it is dropped.
#[derive(Debug)]
pub struct Listener {
    mailbox: Arc<Mailbox>,
    id: SessionId,
    filters: Vec<String>,
    subscriptions: SharedSubscriptions,
}

impl Listener {
    /// Begins to listen, as `options` say. What the index retains already does not come: read it afterwards, and what changes
    /// between the two is seen twice, never missed.
    #[must_use]
    pub fn new(
        subscriptions: &SharedSubscriptions,
        tickets: &Tickets,
        filters: impl IntoIterator<Item = impl Into<String>>,
        options: SubscriptionOptions,
        mailbox: Arc<Mailbox>,
    ) -> Listener {
        let filters: Vec<String> = filters.into_iter().map(Into::into).collect();
        let mut all = subscriptions.write().unwrap_or_else(PoisonError::into_inner);
        let id = all.own_id();
        for filter in &filters {
            let receiver = Receiver { mailbox: mailbox.clone(), options, since: tickets.next() };
            all.insert(filter, id, receiver);
        }
        drop(all);
        Listener { mailbox, id, filters, subscriptions: subscriptions.clone() }
    }

    /// Where what it hears comes.
    #[must_use]
    pub fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut all = self.subscriptions.write().unwrap_or_else(PoisonError::into_inner);
        for filter in &self.filters {
            all.remove(filter, self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Runtime;

    use super::*;
    use crate::{bus, limits::Limits};

    #[test]
    fn a_listener_is_no_client_and_ends_when_it_is_dropped() {
        let (runtime, subscriptions) = (Runtime::new().unwrap(), SharedSubscriptions::default());
        let (_, _, tickets) = bus::start(subscriptions.clone(), runtime.handle().clone()).unwrap();
        let listen = || {
            let (options, mailbox) = (SubscriptionOptions::LIVE, Arc::new(Mailbox::new(&Limits::default())));
            Listener::new(&subscriptions, &tickets, ["a/b", "a/+"], options, mailbox)
        };
        let hear = || subscriptions.read().unwrap().receivers("a/b", None, u64::MAX).len();
        let (one, other) = (listen(), listen());
        assert_eq!((hear(), subscriptions.read().unwrap().of_clients()), (2, 0));
        drop(one);
        assert_eq!(hear(), 1);
        drop(other);
        assert_eq!((hear(), subscriptions.read().unwrap().all().count()), (0, 0));
    }
}
