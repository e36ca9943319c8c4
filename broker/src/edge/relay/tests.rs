use proptest::prelude::*;

use super::*;

/// The index of a site, whose versions count changes.
#[derive(Debug, Default)]
struct Shelf {
    records: BTreeMap<String, Kept>,
    /// What was cleared, by version.
    gone: BTreeMap<u64, String>,
    version: u64,
}

impl Library for Shelf {
    fn get(&self, topic: &str) -> Option<Kept> {
        self.records.get(topic).cloned()
    }
}

/// A relay between a site and what its upstream retains.
struct Bench {
    relay: Relay,
    shelf: Shelf,
    /// Up to which version the upstream was told of clears.
    cleared: u64,
    upstream: BTreeMap<String, Bytes>,
    /// Sent and not acknowledged.
    flight: VecDeque<(u64, Message)>,
    subscribed: BTreeSet<String>,
    handed: Vec<(String, Bytes)>,
    acknowledged: Vec<u16>,
    is_connected: bool,
    sent: usize,
    looped: Option<Vec<NodeId>>,
    live: Vec<Message>,
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

impl Bench {
    fn new(part: Part) -> Bench {
        Bench {
            relay: Relay::new(node("site"), part, 0),
            shelf: Shelf::default(),
            cleared: 0,
            upstream: BTreeMap::new(),
            flight: VecDeque::new(),
            subscribed: BTreeSet::new(),
            handed: Vec::new(),
            acknowledged: Vec::new(),
            is_connected: false,
            sent: 0,
            looped: None,
            live: Vec::new(),
        }
    }

    fn handle(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for effect in self.relay.handle(event, &self.shelf) {
                match effect {
                    Effect::Send(number, message) => {
                        assert!(self.is_connected);
                        let same =
                            |(_, flying): &&(u64, Message)| flying.retain && flying.topic == message.topic;
                        assert!(!message.retain || self.flight.iter().find(same).is_none(), "two of a topic");
                        self.sent += 1;
                        self.flight.push_back((number, message));
                        assert!(self.flight.len() <= IN_FLIGHT);
                    }
                    Effect::Subscribe(filters) => {
                        assert!(filters.len() <= SUBSCRIBE_FILTERS);
                        self.subscribed.extend(filters);
                        events.push_back(Event::Subscribed(Vec::new()));
                    }
                    Effect::Unsubscribe(filters) => {
                        self.subscribed.retain(|filter| !filters.contains(filter))
                    }
                    Effect::Scan => {
                        for (topic, kept) in &self.shelf.records {
                            events.push_back(Event::Found { topic: topic.clone(), version: kept.version });
                        }
                        for (version, topic) in self.shelf.gone.range(self.cleared + 1..) {
                            events.push_back(Event::Gone { topic: topic.clone(), version: *version });
                        }
                        events.push_back(Event::Scanned);
                    }
                    Effect::Hand { topic, payload, id, .. } => {
                        self.handed.push((topic, payload));
                        events.push_back(Event::Settled { id, is_done: true });
                    }
                    Effect::Acknowledge(id) => self.acknowledged.push(id),
                    Effect::Loop(chain) => self.looped = Some(chain),
                    Effect::Reconnect | Effect::Tell(_) => {}
                }
            }
        }
        self.cleared = self.cleared.max(self.relay.carried());
    }

    /// Somebody at the site retains a message; an empty one clears.
    fn retain(&mut self, topic: &str, payload: &str) {
        let payload = Bytes::copy_from_slice(payload.as_bytes());
        let is_same = self.shelf.get(topic).is_some_and(|kept| kept.payload == payload);
        if !is_same {
            self.shelf.version += 1;
        }
        let version = match self.shelf.get(topic) {
            Some(kept) if is_same => kept.version,
            _ => self.shelf.version,
        };
        match payload.is_empty() {
            true => {
                if self.shelf.records.remove(topic).is_some() {
                    self.shelf.gone.insert(self.shelf.version, topic.to_owned());
                }
            }
            false => {
                drop(self.shelf.records.insert(topic.to_owned(), Kept { payload: payload.clone(), version }));
            }
        }
        self.handle(Event::Local { topic: topic.to_owned(), version: Some(version), payload });
    }

    fn say(&mut self, topic: &str, payload: &str) {
        let payload = Bytes::copy_from_slice(payload.as_bytes());
        self.handle(Event::Local { topic: topic.to_owned(), version: None, payload });
    }

    /// The upstream takes and acknowledges so many messages.
    fn acknowledge(&mut self, count: usize) {
        for _ in 0..count {
            let Some((number, message)) = self.flight.pop_front() else { return };
            self.take(message);
            self.handle(Event::Acknowledged(number));
        }
    }

    fn take(&mut self, message: Message) {
        match (message.retain, message.payload.is_empty()) {
            (false, _) => self.live.push(message),
            (true, true) => drop(self.upstream.remove(&message.topic)),
            (true, false) => drop(self.upstream.insert(message.topic, message.payload)),
        }
    }

    fn connect(&mut self, present: bool) {
        self.is_connected = true;
        self.handle(Event::Connected { present });
    }

    /// The line breaks: of what was sent, the upstream got the first few.
    fn lose(&mut self, got: usize) {
        self.is_connected = false;
        for (_, message) in std::mem::take(&mut self.flight).into_iter().take(got) {
            self.take(message);
        }
        self.handle(Event::Lost);
    }

    fn restart(&mut self) {
        self.lose(0);
        self.relay = Relay::new(node("site"), self.relay.part, self.relay.carried());
    }

    fn nodes(&self) -> BTreeMap<String, Bytes> {
        self.shelf.records.iter().map(|(topic, kept)| (topic.clone(), kept.payload.clone())).collect()
    }
}

#[test]
fn after_a_long_silence_the_upstream_gets_the_latest_of_each_topic_once() {
    let mut bench = Bench::new(Part::Edge);
    for n in 0..100 {
        bench.retain("mpypi/nodes/lamp/state", &format!("{{\"n\":{n}}}"));
        bench.retain("mpypi/nodes/door/state", &format!("{{\"n\":{n}}}"));
    }
    bench.connect(false);
    bench.acknowledge(usize::MAX);
    assert_eq!(bench.upstream, bench.nodes());
    assert_eq!(bench.sent, 3, "two states and a hello");
    bench.restart();
    bench.retain("mpypi/nodes/door/state", "new");
    bench.restart();
    bench.connect(true);
    bench.acknowledge(usize::MAX);
    assert_eq!((bench.sent, &bench.upstream), (5, &bench.nodes()), "only what is new");
}

#[test]
fn an_upstream_that_forgot_is_told_everything_again() {
    let mut bench = Bench::new(Part::Edge);
    bench.connect(false);
    bench.retain("mpypi/nodes/lamp/info", "{}");
    bench.acknowledge(usize::MAX);
    bench.lose(0);
    bench.upstream.clear();
    bench.connect(false);
    bench.acknowledge(usize::MAX);
    assert_eq!(bench.upstream, bench.nodes());
}

#[test]
fn orders_come_down_for_the_sites_nodes_alone_and_retained_ones_for_none() {
    let mut bench = Bench::new(Part::Edge);
    bench.retain("mpypi/nodes/lamp/online", "1");
    bench.connect(false);
    let expected = ["mpypi/nodes/+/time", "mpypi/nodes/lamp/cmd"];
    assert_eq!(bench.subscribed.iter().collect::<Vec<_>>(), expected);
    let order = |topic: &str, retain, id| Event::Down {
        topic: topic.to_owned(),
        payload: Bytes::from_static(b"[]"),
        retain,
        id,
    };
    let first = bench.relay.handle(order("mpypi/nodes/lamp/cmd", false, 1), &bench.shelf);
    assert!(
        matches!(first[..], [Effect::Hand { id: 1, .. }]),
        "acknowledged when the index has it: {first:?}"
    );
    bench.handle(Event::Settled { id: 1, is_done: true });
    bench.handle(order("mpypi/nodes/lamp/cmd", true, 2));
    bench.handle(order("mpypi/nodes/elsewhere/cmd", false, 3));
    bench.handle(order("mpypi/channels/dev", false, 4));
    assert!(bench.handed.is_empty());
    assert_eq!(bench.acknowledged, [1, 2, 3, 4]);
}

#[test]
fn of_many_nodes_orders_are_asked_for_once() {
    let mut bench = Bench::new(Part::Edge);
    for n in 0..2 * BY_NAME {
        bench.retain(&format!("mpypi/nodes/n{n}/online"), "1");
    }
    bench.connect(false);
    let expected = ["mpypi/nodes/+/cmd", "mpypi/nodes/+/time"];
    assert_eq!(bench.subscribed.iter().collect::<Vec<_>>(), expected);
    bench.acknowledge(usize::MAX);
    assert_eq!(bench.upstream.len(), 2 * BY_NAME);
}

#[test]
fn a_node_that_is_forgotten_here_is_forgotten_there() {
    let mut bench = Bench::new(Part::Edge);
    bench.connect(false);
    bench.retain("mpypi/nodes/lamp/info", "{}");
    bench.acknowledge(usize::MAX);
    bench.retain("mpypi/nodes/lamp/info", "");
    bench.acknowledge(usize::MAX);
    assert!(bench.upstream.is_empty());
    assert!(!bench.subscribed.contains("mpypi/nodes/lamp/cmd"));
}

#[test]
fn a_node_that_is_forgotten_while_the_line_is_down_and_before_a_restart_is_forgotten_there() {
    let mut bench = Bench::new(Part::Edge);
    bench.connect(false);
    for topic in ["mpypi/nodes/lamp/info", "mpypi/nodes/lamp/state", "mpypi/nodes/door/state"] {
        bench.retain(topic, "{}");
    }
    bench.acknowledge(usize::MAX);
    bench.lose(0);
    bench.retain("mpypi/nodes/lamp/info", "");
    bench.retain("mpypi/nodes/lamp/state", "");
    bench.retain("mpypi/nodes/door/state", "");
    bench.retain("mpypi/nodes/door/state", "back");
    bench.restart();
    bench.connect(true);
    bench.acknowledge(usize::MAX);
    assert_eq!(bench.upstream, bench.nodes());
    assert_eq!(bench.upstream.keys().collect::<Vec<_>>(), ["mpypi/nodes/door/state"]);
    assert!(!bench.subscribed.contains("mpypi/nodes/lamp/cmd"), "nobody is there");
    let sent = bench.sent;
    bench.restart();
    bench.connect(true);
    bench.acknowledge(usize::MAX);
    assert_eq!(bench.sent, sent + 1, "once: a hello");
}

#[test]
fn a_clear_that_was_sent_again_and_never_acknowledged_is_sent_after_another_restart() {
    let mut bench = Bench::new(Part::Edge);
    let lamp = "mpypi/nodes/lamp/state";
    bench.connect(false);
    bench.retain(lamp, "{}");
    bench.acknowledge(usize::MAX);
    bench.retain(lamp, "");
    for _ in 0..2 {
        bench.restart();
        // Cleared once more, which changes nothing here.
        bench.retain(lamp, "");
        bench.connect(true);
    }
    bench.restart();
    bench.connect(true);
    bench.acknowledge(usize::MAX);
    assert!(bench.upstream.is_empty());
}

#[test]
fn a_node_that_moved_to_another_site_is_not_forgotten_again_when_the_upstream_forgets_the_session() {
    let mut bench = Bench::new(Part::Edge);
    bench.connect(false);
    bench.retain("mpypi/nodes/lamp/state", "{}");
    bench.retain("mpypi/nodes/lamp/state", "");
    bench.acknowledge(usize::MAX);
    assert!(bench.upstream.is_empty());
    bench.upstream.insert("mpypi/nodes/lamp/state".to_owned(), Bytes::from_static(b"of another site"));
    for _ in 0..2 {
        bench.lose(0);
        bench.connect(false);
        // Killed in the middle of telling everything again.
        bench.restart();
        bench.connect(false);
        bench.acknowledge(usize::MAX);
        assert_eq!(bench.upstream["mpypi/nodes/lamp/state"], "of another site");
    }
}

#[test]
fn what_was_not_heard_of_while_the_line_was_down_goes_up_when_it_is_mended() {
    let mut bench = Bench::new(Part::Edge);
    bench.connect(false);
    bench.lose(0);
    // Nobody told the relay of this one, but that there was something.
    bench.shelf.version += 1;
    let missed = Kept { payload: Bytes::from_static(b"{}"), version: bench.shelf.version };
    bench.shelf.records.insert("mpypi/nodes/lamp/info".to_owned(), missed);
    bench.handle(Event::Behind);
    bench.retain("mpypi/nodes/door/info", "{}");
    bench.connect(true);
    bench.acknowledge(usize::MAX);
    assert_eq!(bench.upstream, bench.nodes());
}

#[test]
fn an_edge_that_hears_of_itself_is_in_a_loop_and_others_are_passed_on() {
    let mut bench = Bench::new(Part::Edge);
    bench.connect(false);
    bench.say("mpypi/edges/below", "[\"below\"]");
    bench.acknowledge(usize::MAX);
    let hellos: Vec<_> = bench.live.iter().map(|message| (&*message.topic, &*message.payload)).collect();
    assert_eq!(
        hellos,
        [("mpypi/edges/site", &b"[\"site\"]"[..]), ("mpypi/edges/below", &b"[\"below\",\"site\"]"[..])]
    );
    assert_eq!(bench.looped, None);
    bench.say("mpypi/edges/below", "[\"below\",\"site\",\"above\"]");
    assert_eq!(bench.looped.as_ref().map(Vec::len), Some(3));
    bench.looped = None;
    bench.say("mpypi/edges/site", "[\"site\"]");
    assert!(bench.looped.is_some());
}

#[test]
fn a_gateway_brings_up_orders_and_what_it_wrote_and_takes_the_rest() {
    let mut bench = Bench::new(Part::Gateway);
    bench.connect(false);
    assert_eq!(bench.subscribed.len(), 3);
    bench.retain("mpypi/nodes/lamp/state", "new");
    bench.say("mpypi/nodes/lamp/cmd", "[]");
    let state = |payload: &'static str| Event::Down {
        topic: "mpypi/nodes/lamp/state".to_owned(),
        payload: Bytes::from_static(payload.as_bytes()),
        retain: true,
        id: 0,
    };
    bench.handle(state("old"));
    assert!(bench.handed.is_empty(), "what it says itself is newer");
    bench.acknowledge(usize::MAX);
    assert_eq!(bench.live.len(), 1);
    bench.handle(state("newer"));
    assert_eq!(bench.handed.len(), 1);
}

#[derive(Debug, Clone)]
enum Step {
    Retain(u8, u8),
    Say,
    Acknowledge(usize),
    Connect,
    Lose(usize),
    Forget,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..6u8, 0..9u8).prop_map(|(topic, value)| Step::Retain(topic, value)),
        1 => Just(Step::Say),
        2 => (0..9usize).prop_map(Step::Acknowledge),
        2 => Just(Step::Connect),
        1 => (0..9usize).prop_map(Step::Lose),
        1 => Just(Step::Forget),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #[test]
    fn whatever_befalls_the_line_the_upstream_ends_with_what_the_site_has(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut bench = Bench::new(Part::Edge);
        let mut has_session = false;
        for step in steps {
            match step {
                Step::Retain(topic, value) => {
                    let subject = ["info", "state"][usize::from(topic % 2)];
                    let value = if value == 0 { String::new() } else { value.to_string() };
                    bench.retain(&format!("mpypi/nodes/n{}/{subject}", topic / 2), &value);
                }
                Step::Say => bench.say("mpypi/nodes/n0/log", "hello"),
                Step::Acknowledge(count) => bench.acknowledge(count),
                Step::Connect if !bench.is_connected => {
                    bench.connect(has_session);
                    has_session = true;
                }
                Step::Connect => {}
                Step::Lose(got) => bench.lose(got),
                Step::Forget => {
                    bench.lose(0);
                    bench.upstream.clear();
                    has_session = false;
                }
                Step::Restart => bench.restart(),
            }
        }
        if !bench.is_connected {
            bench.connect(has_session);
        }
        bench.acknowledge(usize::MAX);
        prop_assert_eq!(&bench.upstream, &bench.nodes());
        prop_assert_eq!(bench.relay.carried(), bench.relay.seen);
        prop_assert_eq!(bench.relay.standing().waiting, 0);
    }
}
