//! What the broker remembers of Mpy-BLOX nodes, each bounded and all together: what they fetched, what was
//! delivered to them.

use std::collections::{BTreeMap, HashMap, VecDeque};

use mpypi_protocol::{Digest, NodeId};

use super::plan::{Device, aside};

/// Nodes that are remembered; of more, those that did nothing for longest are forgotten.
pub const NODES: usize = 16 * 1024;
/// Within this time, in milliseconds…
pub const WINDOW: u64 = 3600 * 1000;
/// …so many installations of one release are a loop.
pub const LOOP: usize = 3;
/// Packages of a node that are remembered when it no longer finds them.
const LOST: usize = 16;
/// Deliveries to a node that are counted.
const DELIVERIES: usize = 32;

/// What is remembered of one node. All but `lost` is about one list, and forgotten with the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    list: Option<Digest>,
    /// When the node came back after it had fetched packages of the list, in milliseconds since 1970.
    pub installs: VecDeque<u64>,
    /// The list that the node installs again and again.
    pub looping: Option<Digest>,
    /// The list whose packages the node took without coming back.
    pub stuck: Option<Digest>,
    fetched: Option<Digest>,
    tried: VecDeque<(Digest, u8)>,
    /// The list that an operator ordered the node to install.
    pub ordered: Option<Digest>,
    /// Whether the node took anything that was delivered.
    pub took: bool,
    /// Packages that the node had and no longer finds, or had in another version at that time.
    pub lost: BTreeMap<String, String>,
    /// How the node stood when it was last served, in a word; empty if there was nothing to say.
    pub word: &'static str,
    /// The digest of what was said of it then.
    pub said: Option<Digest>,
    used: u64,
}

impl History {
    /// Begins with a list: what was about another one is over.
    pub fn begin(&mut self, list: Digest) {
        if self.list != Some(list) {
            let lost = std::mem::take(&mut self.lost);
            *self = History { list: Some(list), lost, used: self.used, ..History::default() };
        }
    }

    /// How often something was delivered.
    #[must_use]
    pub fn attempts(&self, key: &Digest) -> u8 {
        self.tried.iter().find(|(tried, _)| tried == key).map_or(0, |(_, times)| *times)
    }

    /// Counts a delivery.
    pub fn deliver(&mut self, key: Digest) {
        let times = self.attempts(&key).saturating_add(1);
        self.count(key, times);
    }

    /// Takes it for certain that a delivery would fail again.
    pub fn give_up(&mut self, key: Digest) {
        self.count(key, u8::MAX);
    }

    fn count(&mut self, key: Digest, times: u8) {
        self.tried.retain(|(tried, _)| *tried != key);
        self.tried.push_back((key, times));
        if self.tried.len() > DELIVERIES {
            self.tried.pop_front();
        }
    }

    /// Takes note that the node fetches packages of the list itself.
    pub fn fetch(&mut self) {
        self.fetched = self.list;
    }

    /// Takes note that the node has started again, and says what it has.
    fn start(&mut self, now_ms: u64) {
        if let Some(list) = self.fetched.take()
            && self.list == Some(list)
        {
            self.installs.push_back(now_ms);
            while self.installs.front().is_some_and(|at| at.saturating_add(WINDOW) < now_ms) {
                self.installs.pop_front();
            }
            if self.installs.len() >= LOOP {
                self.looping = Some(list);
                self.installs.truncate(LOOP);
            }
        }
    }

    /// Takes an operator's word: everything may be tried again.
    pub fn forgive(&mut self) {
        let lost = std::mem::take(&mut self.lost);
        *self = History { lost, used: self.used, ..History::default() };
    }
}

/// All nodes that there is something to remember of.
#[derive(Debug, Default)]
pub struct Histories {
    nodes: HashMap<NodeId, History>,
    uses: u64,
}

impl Histories {
    /// The history of a node, to be added to.
    pub fn of(&mut self, node: &NodeId) -> &mut History {
        if self.nodes.len() >= NODES && !self.nodes.contains_key(node) {
            self.forget_some();
        }
        self.uses += 1;
        let history = self.nodes.entry(node.clone()).or_default();
        history.used = self.uses;
        history
    }

    /// The history of a node, if there is one.
    pub fn find(&mut self, node: &NodeId) -> Option<&mut History> {
        self.nodes.get_mut(node)
    }

    /// Forgets the quarter that did nothing for longest: so it is not looked for at each new node.
    fn forget_some(&mut self) {
        let mut uses: Vec<_> = self.nodes.values().map(|history| history.used).collect();
        let (_, quarter, _) = uses.select_nth_unstable(NODES / 4);
        let quarter = *quarter;
        self.nodes.retain(|_, history| history.used > quarter);
    }

    /// Takes what a node says of itself when it has started, and what it said the time before; completes
    /// `device`.
    pub fn start(&mut self, node: &NodeId, device: &mut Device, before: Option<&Device>, now_ms: u64) {
        let has = |name: &String| device.versions.contains_key(name);
        // What we have given another name is not lost, nor is that name once its folder has a package again.
        let is_aside = |name: &String, version: &String| {
            has(&aside(name, version)) || name.strip_suffix(&aside("", version)).is_some()
        };
        let is_found = |(name, version): (&String, &String)| has(name) || is_aside(name, version);
        let lost: BTreeMap<_, _> = match before {
            Some(before) if !before.versions.iter().all(is_found) => {
                let is_gone = |(name, version): &(&String, &String)| {
                    device.versions.get(*name) != Some(*version) && !is_aside(name, version)
                };
                let gone = before.versions.iter().filter(is_gone).take(LOST);
                gone.map(|(name, version)| (name.clone(), version.clone())).collect()
            }
            _ => BTreeMap::new(),
        };
        if lost.is_empty() && !self.nodes.contains_key(node) {
            return;
        }
        let history = self.of(node);
        history.start(now_ms);
        if !lost.is_empty() {
            history.lost = lost;
        } else if history.lost.iter().all(is_found) {
            history.lost.clear();
        }
        device.lost.clone_from(&history.lost);
    }

    /// How many nodes stand how.
    #[must_use]
    pub fn words(&self) -> BTreeMap<&'static str, u64> {
        let mut words = BTreeMap::new();
        for history in self.nodes.values().filter(|history| !history.word.is_empty()) {
            *words.entry(history.word).or_default() += 1;
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(versions: &[(&str, &str)]) -> Device {
        let versions = versions.iter().map(|(name, version)| (name.to_string(), version.to_string()));
        Device { versions: versions.collect(), ..Device::default() }
    }

    fn node(n: usize) -> NodeId {
        NodeId::new(format!("esp32-{n}")).unwrap()
    }

    fn install(histories: &mut Histories, list: Digest, now_ms: u64) -> Option<Digest> {
        let history = histories.of(&node(1));
        history.begin(list);
        history.fetch();
        histories.start(&node(1), &mut device(&[]), None, now_ms);
        histories.of(&node(1)).looping
    }

    #[test]
    fn three_installations_within_an_hour_are_a_loop_until_the_next_list_or_an_operators_word() {
        let mut histories = Histories::default();
        let (list, next) = (Digest::of(b"1"), Digest::of(b"2"));
        assert_eq!(install(&mut histories, list, 0), None);
        assert_eq!(install(&mut histories, list, 1), None);
        assert_eq!(install(&mut histories, list, WINDOW), Some(list));
        // It stays so however long it lasts.
        histories.start(&node(1), &mut device(&[]), None, 9 * WINDOW);
        histories.of(&node(1)).begin(list);
        assert_eq!(histories.of(&node(1)).looping, Some(list));
        let mut forgiven = histories.of(&node(1)).clone();
        forgiven.forgive();
        assert_eq!((forgiven.looping, forgiven.installs.len()), (None, 0));
        histories.of(&node(1)).begin(next);
        assert_eq!(histories.of(&node(1)).looping, None);
    }

    #[test]
    fn installations_far_apart_and_mere_starts_are_no_loop() {
        let mut histories = Histories::default();
        let list = Digest::of(b"1");
        for n in 0..10 {
            assert_eq!(install(&mut histories, list, n * (WINDOW / 2 + 1)), None);
        }
        for n in 0..10 {
            histories.start(&node(1), &mut device(&[]), None, n);
        }
        assert_eq!(histories.of(&node(1)).looping, None);
    }

    #[test]
    fn deliveries_are_counted_until_the_next_list() {
        let mut history = History::default();
        history.begin(Digest::of(b"list"));
        let key = Digest::of(b"wheel");
        history.deliver(key);
        history.deliver(key);
        assert_eq!(history.attempts(&key), 2);
        history.give_up(key);
        assert_eq!(history.attempts(&key), u8::MAX);
        history.begin(Digest::of(b"another"));
        assert_eq!(history.attempts(&key), 0);
        for n in 0..1000_u32 {
            history.deliver(Digest::of(&n.to_be_bytes()));
        }
        assert_eq!(history.tried.len(), DELIVERIES);
    }

    #[test]
    fn packages_that_vanish_are_remembered_until_they_are_back() {
        let mut histories = Histories::default();
        let before = device(&[("demo", "1.0"), ("zeta", "1.0"), ("core", "1")]);
        let mut wedged = device(&[("core", "1")]);
        histories.start(&node(1), &mut wedged, Some(&before), 0);
        let lost = device(&[("demo", "1.0"), ("zeta", "1.0")]).versions;
        assert_eq!(wedged.lost, lost);
        let (mut again, same) = (device(&[("core", "1")]), device(&[("core", "1")]));
        histories.start(&node(1), &mut again, Some(&same), 1);
        assert_eq!(again.lost, lost, "what it said the time before was wedged already");
        let mut repaired = device(&[("demo", "2.0"), ("zeta", "1.0"), ("core", "1")]);
        histories.start(&node(1), &mut repaired, Some(&again), 2);
        assert!(repaired.lost.is_empty());
        // An upgrade loses nothing, nor does a new name.
        let mut renamed = device(&[("demo.replaced-1.0", "1.0"), ("zeta", "1.0"), ("core", "1")]);
        histories.start(&node(2), &mut renamed, Some(&before), 3);
        assert!(renamed.lost.is_empty());
        let mut again = device(&[("demo", "1.0"), ("zeta", "1.0"), ("core", "1")]);
        histories.start(&node(2), &mut again, Some(&renamed), 3);
        assert!(again.lost.is_empty());
        histories.start(&node(2), &mut repaired, Some(&before), 3);
        assert!(repaired.lost.is_empty() && histories.find(&node(2)).is_none());
    }

    #[test]
    fn any_number_of_nodes_takes_bounded_memory_and_those_that_do_something_are_kept() {
        let mut histories = Histories::default();
        histories.of(&node(0)).looping = Some(Digest::EMPTY);
        for n in 1..3 * NODES {
            histories.of(&node(n));
            histories.of(&node(0));
            assert!(histories.nodes.len() <= NODES);
        }
        assert_eq!(histories.of(&node(0)).looping, Some(Digest::EMPTY));
        let many: Vec<_> = (0..1000).map(|n| (format!("p{n}"), "1".to_owned())).collect();
        let before = Device { versions: many.into_iter().collect(), ..Device::default() };
        let mut wedged = device(&[]);
        histories.start(&node(1), &mut wedged, Some(&before), 0);
        assert_eq!(wedged.lost.len(), LOST);
    }
}
