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
}

#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Node>,
    receivers: BTreeMap<SessionId, Receiver>,
}

impl Subscriptions {
    /// Adds or replaces a subscription.
    pub fn insert(&mut self, filter: &str, id: SessionId, receiver: Receiver) {
        let mut node = &mut self.root;
        for level in filter.split('/') {
            node = node.children.entry(level.into()).or_default();
        }
        node.receivers.insert(id, receiver);
    }

    /// Removes a subscription, if it is there, and the levels that only it needed.
    pub fn remove(&mut self, filter: &str, id: SessionId) {
        let levels: Vec<_> = filter.split('/').collect();
        self.root.remove(&levels, id);
    }

    /// Everyone who gets a message on topic `name`, each once.
    #[must_use]
    pub fn receivers(&self, name: &str) -> BTreeMap<SessionId, Receiver> {
        let mut found = BTreeMap::new();
        let levels: Vec<_> = name.split('/').collect();
        self.root.find(&levels, !name.starts_with('$'), &mut found);
        found
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
    fn find(&self, levels: &[&str], wildcards: bool, found: &mut BTreeMap<SessionId, Receiver>) {
        let [level, rest @ ..] = levels else {
            self.collect(found);
            // `a/#` matches `a` too: MQTT 4.7.1.2.
            if let Some(node) = self.children.get("#") {
                node.collect(found);
            }
            return;
        };
        if let Some(node) = self.children.get(*level) {
            node.find(rest, true, found);
        }
        if wildcards {
            if let Some(node) = self.children.get("+") {
                node.find(rest, true, found);
            }
            if let Some(node) = self.children.get("#") {
                node.collect(found);
            }
        }
    }

    fn collect(&self, found: &mut BTreeMap<SessionId, Receiver>) {
        for (id, receiver) in &self.receivers {
            let best = found.entry(*id).or_insert_with(|| receiver.clone());
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
        Receiver { mailbox: Arc::new(Mailbox::new(&Limits::default())), options }
    }

    #[test]
    fn overlapping_subscriptions_give_one_message_at_the_highest_qos() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.insert("a/#", SessionId(1), receiver(Qos::AtMostOnce));
        subscriptions.insert("a/+", SessionId(1), receiver(Qos::AtLeastOnce));
        let found = subscriptions.receivers("a/b");
        assert_eq!(found.len(), 1);
        assert_eq!(found[&SessionId(1)].options.qos, Qos::AtLeastOnce);
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
            let found: Vec<_> = subscriptions.receivers(&name).into_keys().collect();
            let expected: Vec<_> = (0..filters.len())
                .filter(|n| topic::matches(&filters[*n], &name))
                .map(|n| SessionId(n as u64))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
