//! Who subscribed to what: tries of filter levels.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use mpypi_protocol::topic;

use crate::{
    mailbox::Mailbox,
    message::SessionId,
    packet::{Qos, SubscriptionOptions},
};

/// All subscriptions of all sessions, each to a checked filter.
#[derive(Debug, Default)]
pub struct Subscriptions {
    /// Of sessions that end with their connection.
    passing: Trie<Receivers>,
    /// Of kept sessions: the writer looks them up for every message, whoever else listens.
    kept: Trie<Receivers>,
    /// Shared ones, of both.
    shared: Trie<BTreeMap<Box<str>, Group>>,
    /// Listeners of the broker's own so far.
    own: u64,
}

/// Someone who subscribed: whose mailbox, and what they asked for.
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

/// A session that gets a message.
#[derive(Debug, Clone)]
pub struct Found {
    /// Which.
    pub id: SessionId,
    /// How.
    pub receiver: Receiver,
    /// What it calls all its subscriptions that match.
    pub identifiers: Vec<NonZeroU32>,
}

impl Found {
    /// The QoS at which a message of `qos` goes there.
    #[must_use]
    pub fn qos(&self, qos: Qos) -> Qos {
        qos.min(self.receiver.options.qos)
    }

    /// Whether a message of `qos` goes there by way of the session's queue in the index.
    #[must_use]
    pub fn is_queued(&self, qos: Qos) -> bool {
        self.id.is_kept() && self.qos(qos) > Qos::AtMostOnce
    }
}

type Receivers = BTreeMap<SessionId, Receiver>;

/// Sessions that share a subscription: each message goes to one of them.
#[derive(Debug, Default)]
struct Group {
    members: Receivers,
    turns: AtomicUsize,
}

/// What may stand in a trie.
trait Leaf: Default {
    fn is_nothing(&self) -> bool;
}

impl<K, V> Leaf for BTreeMap<K, V> {
    fn is_nothing(&self) -> bool {
        self.is_empty()
    }
}

#[derive(Debug)]
struct Trie<T> {
    children: HashMap<Box<str>, Trie<T>>,
    here: T,
}

impl<T: Default> Default for Trie<T> {
    fn default() -> Self {
        Trie { children: HashMap::new(), here: T::default() }
    }
}

impl Subscriptions {
    /// An id for one of the broker's own listeners, which none had before.
    pub fn own_id(&mut self) -> SessionId {
        self.own += 1;
        SessionId::own(self.own)
    }

    /// Adds or replaces a subscription; one that is replaced goes on from where it was.
    pub fn insert(&mut self, filter: &str, id: SessionId, receiver: Receiver) {
        let receivers = match topic::split_shared(filter) {
            Some((group, filter)) => &mut self.shared.at(filter).entry(group.into()).or_default().members,
            None if id.is_kept() => self.kept.at(filter),
            None => self.passing.at(filter),
        };
        let since = receivers.get(&id).map_or(receiver.since, |present| present.since);
        receivers.insert(id, Receiver { since, ..receiver });
    }

    /// Removes a subscription, if it is there, and the levels that only it needed.
    pub fn remove(&mut self, filter: &str, id: SessionId) {
        let forget = |receivers: &mut Receivers| {
            receivers.remove(&id);
        };
        match topic::split_shared(filter) {
            Some((name, filter)) => self.shared.change(filter, |groups| {
                let Some(group) = groups.get_mut(name) else { return };
                forget(&mut group.members);
                if group.members.is_empty() {
                    groups.remove(name);
                }
            }),
            None if id.is_kept() => self.kept.change(filter, forget),
            None => self.passing.change(filter, forget),
        }
    }

    /// Removes all subscriptions of kept sessions.
    pub fn forget_kept(&mut self) {
        self.kept = Trie::default();
        self.shared.prune(&mut |groups| {
            groups.retain(|_, group| {
                group.members.retain(|id, _| !id.is_kept());
                !group.members.is_empty()
            });
        });
    }

    /// Everyone who gets the message that `ticket` stands for, on topic `name` from `origin`, each once; but
    /// for those who share a subscription.
    #[must_use]
    pub fn receivers(&self, name: &str, origin: Option<SessionId>, ticket: u64) -> Vec<Found> {
        let mut found = collect(&self.passing, name, origin, ticket);
        // What goes through their queues needs no ticket: the writer knew its order.
        found.append(&mut collect(&self.kept, name, origin, ticket));
        found
    }

    /// The sessions into whose queue a message of `qos` on topic `name` from `origin` goes, each once; but for
    /// those who share a subscription.
    #[must_use]
    pub fn queued(&self, name: &str, origin: Option<SessionId>, qos: Qos) -> Vec<Found> {
        let mut found = collect(&self.kept, name, origin, u64::MAX);
        found.retain(|found| found.is_queued(qos));
        found
    }

    /// Whether such a message may go into any queue, that of one who shares a subscription included.
    #[must_use]
    pub fn may_queue(&self, name: &str, origin: SessionId, qos: Qos) -> bool {
        if qos == Qos::AtMostOnce {
            return false;
        }
        let mut is_shared = false;
        self.shared.visit(name, &mut |groups| {
            is_shared |= groups.values().any(|group| group.members.keys().any(|id| id.is_kept()));
        });
        is_shared || !self.queued(name, Some(origin), qos).is_empty()
    }

    /// Of all who share a subscription that matches `name`, the one whose turn it is: those who can take a
    /// message at once come before those who are away.
    #[must_use]
    pub fn chosen(&self, name: &str) -> Vec<Found> {
        let mut chosen = Vec::new();
        self.shared.visit(name, &mut |groups| {
            for group in groups.values() {
                let ready = || group.members.iter().filter(|(_, receiver)| receiver.mailbox.has_room());
                let turn = group.turns.fetch_add(1, Ordering::Relaxed);
                let found = match ready().count() {
                    0 => group.members.iter().nth(turn % group.members.len().max(1)),
                    count => ready().nth(turn % count),
                };
                if let Some((id, receiver)) = found {
                    let identifiers = receiver.options.identifier.into_iter().collect();
                    chosen.push(Found { id: *id, receiver: receiver.clone(), identifiers });
                }
            }
        });
        chosen
    }

    /// Everyone but those who share, once for each of their subscriptions.
    pub fn all(&self) -> impl Iterator<Item = &Receiver> {
        self.each().map(|(_, receiver)| receiver)
    }

    /// How many of them are clients', not the broker's own.
    #[must_use]
    pub fn of_clients(&self) -> usize {
        self.each().filter(|(id, _)| !id.is_own()).count()
    }

    fn each(&self) -> impl Iterator<Item = (&SessionId, &Receiver)> {
        let mut tries = vec![&self.passing, &self.kept];
        std::iter::from_fn(move || {
            let trie = tries.pop()?;
            tries.extend(trie.children.values());
            Some(trie.here.iter())
        })
        .flatten()
    }
}

fn collect(trie: &Trie<Receivers>, name: &str, origin: Option<SessionId>, ticket: u64) -> Vec<Found> {
    let mut matching = Vec::new();
    trie.visit(name, &mut |receivers| matching.extend((!receivers.is_empty()).then_some(receivers)));
    let gets = |(id, receiver): &(&SessionId, &Receiver)| {
        let is_own = receiver.options.no_local && origin == Some(**id);
        !is_own && ticket >= receiver.since
    };
    let found = |(id, receiver): (&SessionId, &Receiver)| {
        let identifiers = receiver.options.identifier.into_iter().collect();
        Found { id: *id, receiver: receiver.clone(), identifiers }
    };
    // Mostly one filter matches, of thousands of sessions: nobody can be in it twice.
    if let [receivers] = matching[..] {
        return receivers.iter().filter(gets).map(found).collect();
    }
    let mut all: BTreeMap<SessionId, Found> = BTreeMap::new();
    for (id, receiver) in matching.into_iter().flatten().filter(gets) {
        match all.entry(*id) {
            Entry::Vacant(entry) => drop(entry.insert(found((id, receiver)))),
            Entry::Occupied(mut entry) => {
                let present = entry.get_mut();
                if receiver.options.qos > present.receiver.options.qos {
                    present.receiver = receiver.clone();
                }
                // 3.3.2.3.8: of all subscriptions that match.
                present.identifiers.extend(receiver.options.identifier);
            }
        }
    }
    all.into_values().collect()
}

impl<T: Leaf> Trie<T> {
    /// What stands at `filter`, made if need be.
    fn at(&mut self, filter: &str) -> &mut T {
        let mut node = self;
        for level in filter.split('/') {
            node = node.children.entry(level.into()).or_default();
        }
        &mut node.here
    }

    /// Changes what stands at `filter`, if anything does, and forgets the levels that nothing needs then.
    fn change(&mut self, filter: &str, change: impl FnOnce(&mut T)) {
        let (level, rest) =
            filter.split_once('/').map_or((filter, None), |(level, rest)| (level, Some(rest)));
        let Some(child) = self.children.get_mut(level) else { return };
        match rest {
            Some(rest) => child.change(rest, change),
            None => change(&mut child.here),
        }
        if child.children.is_empty() && child.here.is_nothing() {
            self.children.remove(level);
        }
    }

    /// Changes everything, and forgets the levels that nothing needs then.
    fn prune(&mut self, change: &mut impl FnMut(&mut T)) {
        change(&mut self.here);
        self.children.retain(|_, child| {
            child.prune(change);
            !child.children.is_empty() || !child.here.is_nothing()
        });
    }

    /// Calls `visit` with what stands at each filter that matches `name`.
    fn visit<'t>(&'t self, name: &str, visit: &mut impl FnMut(&'t T)) {
        let levels: Vec<_> = name.split('/').collect();
        // 4.7.2: no wildcard at the start matches a `$`.
        self.find(&levels, !name.starts_with('$'), visit);
    }

    fn find<'t>(&'t self, levels: &[&str], wildcards: bool, visit: &mut impl FnMut(&'t T)) {
        let [level, rest @ ..] = levels else {
            visit(&self.here);
            // `a/#` matches `a` too: MQTT 4.7.1.2.
            if let Some(child) = self.children.get("#") {
                visit(&child.here);
            }
            return;
        };
        if let Some(child) = self.children.get(*level) {
            child.find(rest, true, visit);
        }
        if wildcards {
            if let Some(child) = self.children.get("+") {
                child.find(rest, true, visit);
            }
            if let Some(child) = self.children.get("#") {
                visit(&child.here);
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
            identifier: None,
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
        assert_eq!(found[0].qos(Qos::ExactlyOnce), Qos::AtLeastOnce);
    }

    #[test]
    fn those_who_share_a_subscription_take_turns_and_who_is_away_comes_last() {
        let mut subscriptions = Subscriptions::default();
        let away = receiver(Qos::AtLeastOnce);
        away.mailbox.close();
        subscriptions.insert("$share/g/a/#", SessionId::kept(7), away);
        let chosen = |subscriptions: &Subscriptions| {
            let chosen = subscriptions.chosen("a/b");
            chosen.iter().map(|found| found.id).collect::<Vec<_>>()
        };
        assert_eq!(chosen(&subscriptions), [SessionId::kept(7)], "better than nobody");
        for n in [1, 2] {
            subscriptions.insert("$share/g/a/#", SessionId(n), receiver(Qos::AtLeastOnce));
        }
        subscriptions.insert("$share/h/a/b", SessionId(2), receiver(Qos::AtLeastOnce));
        let all: Vec<_> = (0..12).map(|_| chosen(&subscriptions)).collect();
        let count = |id| all.iter().filter(|chosen| chosen.contains(&SessionId(id))).count();
        assert!(
            all.iter().all(|chosen| chosen.len() == 2 && chosen[0] == SessionId(2)
                || chosen.len() == 2 && chosen[1] == SessionId(2)),
            "group h has one member: {all:?}"
        );
        assert!(count(1) >= 4);
        assert!(subscriptions.receivers("a/b", None, 0).is_empty());
        for (filter, id) in [
            ("$share/g/a/#", SessionId::kept(7)),
            ("$share/g/a/#", SessionId(1)),
            ("$share/g/a/#", SessionId(2)),
        ] {
            subscriptions.remove(filter, id);
        }
        assert_eq!(chosen(&subscriptions), [SessionId(2)]);
        subscriptions.remove("$share/h/a/b", SessionId(2));
        assert!(subscriptions.shared.children.is_empty());
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
        assert_eq!(found[0].receiver.options.qos, Qos::AtMostOnce);
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
        assert!(subscriptions.passing.children.is_empty());
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
            let found: Vec<_> = subscriptions.receivers(&name, None, 0).iter().map(|found| found.id).collect();
            let expected: Vec<_> = (0..filters.len())
                .filter(|n| topic::matches(&filters[*n], &name))
                .map(|n| SessionId(n as u64))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
