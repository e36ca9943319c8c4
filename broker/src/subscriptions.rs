//! Who subscribed to what: a trie of filter levels.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{mailbox::Mailbox, message::SessionId, packet::SubscriptionOptions};

/// All subscriptions of all sessions, each to a checked filter.
#[derive(Debug, Default)]
pub struct Subscriptions {
    root: Node,
}

/// Someone who gets a message: whose mailbox, and what the matching subscription asked for.
#[derive(Debug, Clone)]
pub struct Receiver {
    /// Where the message goes.
    pub mailbox: Arc<Mailbox>,
    /// Of several matching subscriptions of one session, the one with the highest QoS.
    pub options: SubscriptionOptions,
    /// The bus's ticket of the first message that came after the subscription: earlier ones are in the index,
    /// or were for others.
    pub since: u64,
}

#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Node>,
    receivers: BTreeMap<SessionId, Receiver>,
}

/// A walk through the trie.
struct Search {
    origin: Option<SessionId>,
    ticket: u64,
    found: BTreeMap<SessionId, Receiver>,
}

impl Subscriptions {
    /// Adds or replaces a subscription; one that is replaced goes on from where it was.
    pub fn insert(&mut self, filter: &str, id: SessionId, receiver: Receiver) {
        let mut node = &mut self.root;
        for level in filter.split('/') {
            node = node.children.entry(level.into()).or_default();
        }
        let since = node.receivers.get(&id).map_or(receiver.since, |present| present.since);
        node.receivers.insert(id, Receiver { since, ..receiver });
    }

    /// Removes a subscription, if it is there, and the levels that only it needed.
    pub fn remove(&mut self, filter: &str, id: SessionId) {
        let levels: Vec<_> = filter.split('/').collect();
        self.root.remove(&levels, id);
    }

    /// Everyone who gets the message that `ticket` stands for, on topic `name` from `origin`, each once.
    #[must_use]
    pub fn receivers(
        &self,
        name: &str,
        origin: Option<SessionId>,
        ticket: u64,
    ) -> BTreeMap<SessionId, Receiver> {
        let mut search = Search { origin, ticket, found: BTreeMap::new() };
        let levels: Vec<_> = name.split('/').collect();
        self.root.find(&levels, !name.starts_with('$'), &mut search);
        search.found
    }

    /// Everyone, once for each of their subscriptions.
    pub fn all(&self) -> impl Iterator<Item = &Receiver> {
        let mut nodes = vec![&self.root];
        std::iter::from_fn(move || {
            let node = nodes.pop()?;
            nodes.extend(node.children.values());
            Some(node.receivers.values())
        })
        .flatten()
    }
}

impl Node {
    fn find(&self, levels: &[&str], wildcards: bool, search: &mut Search) {
        let [level, rest @ ..] = levels else {
            self.collect(search);
            // `a/#` matches `a` too: MQTT 4.7.1.2.
            if let Some(node) = self.children.get("#") {
                node.collect(search);
            }
            return;
        };
        if let Some(node) = self.children.get(*level) {
            node.find(rest, true, search);
        }
        if wildcards {
            if let Some(node) = self.children.get("+") {
                node.find(rest, true, search);
            }
            if let Some(node) = self.children.get("#") {
                node.collect(search);
            }
        }
    }

    fn collect(&self, search: &mut Search) {
        for (id, receiver) in &self.receivers {
            let is_own = receiver.options.no_local && search.origin == Some(*id);
            if is_own || search.ticket < receiver.since {
                continue;
            }
            let best = search.found.entry(*id).or_insert_with(|| receiver.clone());
            if receiver.options.qos > best.options.qos {
                *best = receiver.clone();
            }
        }
    }

    fn remove(&mut self, levels: &[&str], id: SessionId) {
        let [level, rest @ ..] = levels else {
            self.receivers.remove(&id);
            return;
        };
        if let Some(node) = self.children.get_mut(*level) {
            node.remove(rest, id);
            if node.children.is_empty() && node.receivers.is_empty() {
                self.children.remove(*level);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::topic;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        limits::Limits,
        packet::{Qos, RetainHandling},
    };

    fn receiver(qos: Qos) -> Receiver {
        let options = SubscriptionOptions {
            qos,
            no_local: false,
            retain_as_published: false,
            retain_handling: RetainHandling::Send,
        };
        Receiver { mailbox: Arc::new(Mailbox::new(&Limits::default())), options, since: 0 }
    }

    #[test]
    fn overlapping_subscriptions_give_one_message_at_the_highest_qos() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.insert("a/#", SessionId(1), receiver(Qos::AtMostOnce));
        subscriptions.insert("a/+", SessionId(1), receiver(Qos::AtLeastOnce));
        let found = subscriptions.receivers("a/b", None, 0);
        assert_eq!(found.len(), 1);
        assert_eq!(found[&SessionId(1)].options.qos, Qos::AtLeastOnce);
    }

    #[test]
    fn no_local_keeps_a_message_from_its_sender_unless_another_subscription_wants_it() {
        let mut subscriptions = Subscriptions::default();
        let mut no_local = receiver(Qos::AtLeastOnce);
        no_local.options.no_local = true;
        subscriptions.insert("a/#", SessionId(1), no_local);
        assert!(subscriptions.receivers("a/b", Some(SessionId(1)), 0).is_empty());
        assert_eq!(subscriptions.receivers("a/b", Some(SessionId(2)), 0).len(), 1);
        subscriptions.insert("a/b", SessionId(1), receiver(Qos::AtMostOnce));
        let found = subscriptions.receivers("a/b", Some(SessionId(1)), 0);
        assert_eq!(found[&SessionId(1)].options.qos, Qos::AtMostOnce);
    }

    #[test]
    fn a_message_from_before_the_subscription_does_not_come_after_it() {
        let mut subscriptions = Subscriptions::default();
        let since = |since| Receiver { since, ..receiver(Qos::AtMostOnce) };
        subscriptions.insert("a/+", SessionId(1), since(7));
        assert!(subscriptions.receivers("a/b", None, 6).is_empty());
        assert_eq!(subscriptions.receivers("a/b", None, 7).len(), 1);
        subscriptions.insert("a/+", SessionId(1), since(9));
        assert_eq!(subscriptions.receivers("a/b", None, 7).len(), 1, "renewed, not new");
    }

    #[test]
    fn removing_all_subscriptions_leaves_nothing_behind() {
        let mut subscriptions = Subscriptions::default();
        for filter in ["a/#", "a/+/c", "a"] {
            subscriptions.insert(filter, SessionId(1), receiver(Qos::AtMostOnce));
        }
        for filter in ["a/#", "a/+/c", "a", "never"] {
            subscriptions.remove(filter, SessionId(1));
        }
        assert!(subscriptions.root.children.is_empty());
    }

    proptest! {
        #[test]
        fn the_trie_agrees_with_the_definition_of_matching(
            filters in prop::collection::vec("[ab+$]?(/[ab+]?){0,3}(/#)?", 1..8),
            name in "[ab$]?(/[ab]?){0,3}",
        ) {
            let mut subscriptions = Subscriptions::default();
            let filters: Vec<_> =
                filters.into_iter().filter(|filter| topic::check_filter(filter).is_ok()).collect();
            for (n, filter) in filters.iter().enumerate() {
                subscriptions.insert(filter, SessionId(n as u64), receiver(Qos::AtMostOnce));
            }
            let found: Vec<_> = subscriptions.receivers(&name, None, 0).into_keys().collect();
            let expected: Vec<_> = (0..filters.len())
                .filter(|n| topic::matches(&filters[*n], &name))
                .map(|n| SessionId(n as u64))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
