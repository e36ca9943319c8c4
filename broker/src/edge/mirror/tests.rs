use proptest::prelude::*;

use mpypi_protocol::Chunks;

use super::*;

/// An index that keeps what it is told.
#[derive(Debug, Default)]
struct Shelf(BTreeMap<String, Bytes>);

impl Library for Shelf {
    fn has(&self, topic: &str) -> bool {
        self.0.contains_key(topic)
    }

    fn get(&self, topic: &str) -> Option<Bytes> {
        self.0.get(topic).cloned()
    }

    fn holds(&self, piece: &Piece) -> bool {
        self.0.get(&piece.topic).is_some_and(|bytes| Digest::of(bytes) == piece.digest)
    }
}

fn everything() -> Options {
    Options { channels: Channels::All, pin: None, hours: None, part: Part::Edge }
}

fn dev() -> ChannelName {
    ChannelName::new("dev").unwrap()
}

fn package(n: u8) -> (String, Bytes) {
    let bytes = Bytes::from(vec![n; 10 + usize::from(n)]);
    (format!("mpypi/packages/wheel/{}", Digest::of(&bytes)), bytes)
}

fn list(sequence: u64, packages: &[u8], rollout: &str) -> Bytes {
    let names: String = packages
        .iter()
        .map(|n| {
            let (_, bytes) = package(*n);
            let (digest, size) = (Digest::of(&bytes), bytes.len());
            format!(
                r#",{{"type":"wheel","name":"p{n}","version":"1","pkg_sha256":"{digest}","size":{size}}}"#
            )
        })
        .collect();
    let release = format!(
        r#"{{"type":"release","channel":"dev","sequence":{sequence},"version":"{sequence}"{rollout}}}"#
    );
    format!("[{release}{names}]").into()
}

/// A mirror beside what the upstream retains and what is kept here.
struct Bench {
    mirror: Mirror,
    upstream: BTreeMap<String, Bytes>,
    shelf: Shelf,
    now: Duration,
    heard: u64,
    /// Topics that the upstream does not bring.
    mute: BTreeSet<String>,
    subscribed: BTreeSet<String>,
    told: Vec<String>,
    /// How often each topic was brought.
    brought: BTreeMap<String, u32>,
    unix_ms: u64,
}

impl Bench {
    fn new(options: Options) -> Bench {
        let shelf = Shelf::default();
        Bench {
            mirror: Mirror::new(options, BTreeMap::new(), &shelf),
            upstream: BTreeMap::new(),
            shelf,
            now: Duration::ZERO,
            heard: 0,
            mute: BTreeSet::new(),
            subscribed: BTreeSet::new(),
            told: Vec::new(),
            brought: BTreeMap::new(),
            unix_ms: 0,
        }
    }

    fn all() -> Bench {
        Bench::new(everything())
    }

    fn release(&mut self, sequence: u64, packages: &[u8]) {
        self.upstream.extend(packages.iter().map(|n| package(*n)));
        self.publish(&dev().topic(), list(sequence, packages, ""));
    }

    fn publish(&mut self, topic: &str, payload: Bytes) {
        match payload.is_empty() {
            true => drop(self.upstream.remove(topic)),
            false => drop(self.upstream.insert(topic.to_owned(), payload.clone())),
        }
        let is_asked = |filter: &String| mpypi_protocol::topic::matches(filter, topic);
        if self.subscribed.iter().any(is_asked) {
            self.handle(Event::Message { topic: topic.to_owned(), payload });
        }
    }

    fn handle(&mut self, event: Event) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let moment = Moment { now: self.now, unix_ms: self.unix_ms };
            for effect in self.mirror.handle(moment, event, &self.shelf) {
                match effect {
                    Effect::Subscribe(filters) => {
                        let count = filters.len();
                        for filter in filters {
                            for (topic, payload) in &self.upstream {
                                if mpypi_protocol::topic::matches(&filter, topic)
                                    && !self.mute.contains(topic)
                                {
                                    *self.brought.entry(topic.clone()).or_default() += 1;
                                    self.heard += payload.len() as u64;
                                    let (topic, payload) = (topic.clone(), payload.clone());
                                    events.push_back(Event::Message { topic, payload });
                                }
                            }
                            self.subscribed.insert(filter);
                        }
                        events.push_back(Event::Subscribed { filters: count, refused: Vec::new() });
                    }
                    Effect::Unsubscribe(filter) => drop(self.subscribed.remove(&filter)),
                    Effect::Keep { topic, payload } => {
                        let result = self.keep(&topic, payload);
                        events.push_back(Event::Settled { topic, result });
                    }
                    Effect::Clear(topic) => drop(self.shelf.0.remove(&topic)),
                    Effect::Took(..) => {}
                    Effect::Tell(Tell::News(text) | Tell::Trouble(text)) => self.told.push(text),
                }
            }
        }
    }

    /// What the index does: it checks packages, and that a list has all of its own.
    fn keep(&mut self, topic: &str, payload: Bytes) -> Result<(), String> {
        match Topic::parse(topic).unwrap() {
            Topic::Package(id) if *id.digest() != Digest::of(&payload) => {
                return Err("other bytes".to_owned());
            }
            Topic::Channel(_) => {
                let list = UpdateList::parse(&payload).unwrap();
                let missing: Vec<_> = list.pieces().filter(|piece| !self.shelf.holds(piece)).collect();
                assert!(missing.is_empty(), "kept before {missing:?}");
                let before = self.sequence();
                assert!(list.release().unwrap().sequence >= before.unwrap_or_default(), "after {before:?}");
            }
            _ => {}
        }
        self.shelf.0.insert(topic.to_owned(), payload);
        Ok(())
    }

    fn connect(&mut self) {
        self.subscribed.clear();
        self.handle(Event::Connected);
    }

    fn lose(&mut self) {
        self.subscribed.clear();
        self.handle(Event::Lost);
    }

    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            self.unix_ms += 1000;
            self.handle(Event::Tick { heard: self.heard });
        }
    }

    fn sequence(&self) -> Option<u64> {
        let payload = self.shelf.get(&dev().topic())?;
        Some(UpdateList::parse(&payload).unwrap().release().unwrap().sequence)
    }
}

#[test]
fn a_list_waits_for_its_packages_and_what_is_here_is_not_fetched_again() {
    let mut bench = Bench::all();
    bench.release(1, &[1, 2, 3]);
    bench.connect();
    assert_eq!(bench.sequence(), Some(1));
    bench.release(2, &[1, 2, 4]);
    assert_eq!(bench.sequence(), Some(2));
    bench.lose();
    bench.connect();
    for n in 1..=4 {
        assert_eq!(bench.brought[&package(n).0], 1, "package {n}");
    }
    bench.pass(3);
    assert!(bench.mirror.is_whole());
    assert!(!bench.subscribed.iter().any(|filter| filter.contains("packages")), "{:?}", bench.subscribed);
}

#[test]
fn a_package_that_does_not_come_is_asked_for_again_while_the_old_list_stands() {
    let mut bench = Bench::all();
    bench.release(1, &[1]);
    bench.connect();
    bench.mute.insert(package(2).0);
    bench.release(2, &[2, 3]);
    bench.pass(60);
    assert_eq!(bench.sequence(), Some(1));
    assert!(bench.shelf.has(&package(3).0));
    let standing = &bench.mirror.standings()[0];
    assert_eq!((standing.sequence, standing.coming, standing.missing), (Some(1), Some(2), 1));
    bench.mute.clear();
    bench.pass(AGAIN_MOST.as_secs() + 1);
    assert_eq!(bench.sequence(), Some(2));
    assert!(bench.told.iter().any(|text| text.contains("does not come")));
}

#[test]
fn wrong_bytes_are_left_and_the_right_ones_taken() {
    let mut bench = Bench::all();
    bench.release(1, &[1]);
    bench.upstream.insert(package(1).0, Bytes::from_static(b"other bytes"));
    bench.connect();
    assert_eq!(bench.sequence(), None);
    bench.upstream.extend([package(1)]);
    bench.pass(10);
    assert_eq!(bench.sequence(), Some(1));
}

#[test]
fn chunks_are_fetched_one_by_one_checked_by_the_list_and_not_again_when_they_are_here() {
    let mut bench = Bench::all();
    let package: Vec<u8> = (0..3000_u16).flat_map(u16::to_le_bytes).collect();
    let (digest, chunks) = (Digest::of(&package), Chunks::cut(&package, 2048).unwrap());
    let topics: Vec<_> = chunks.pieces(&digest).map(|piece| piece.topic).collect();
    let bytes: Vec<_> = package.chunks(2048).map(Bytes::copy_from_slice).collect();
    bench.upstream.extend(topics.iter().cloned().zip(bytes.iter().cloned()));
    bench.upstream.insert(topics[1].clone(), Bytes::from_static(b"other bytes"));
    // An earlier cut of the same package.
    bench.shelf.0.insert(topics[0].clone(), Bytes::copy_from_slice(&package[..1024]));
    let text = format!(
        r#"[{{"type":"release","channel":"dev","sequence":1,"version":"1"}},
            {{"type":"src","path":"a.bin","pkg_sha256":"{digest}","size":{}}}]"#,
        package.len()
    );
    let mut entries = UpdateList::parse(text.as_bytes()).unwrap().entries().to_vec();
    entries[1].set_chunks(Some(chunks));
    let list = UpdateList::new(entries).unwrap().to_bytes();
    bench.publish(&dev().topic(), list.into());
    bench.connect();
    assert_eq!(bench.sequence(), None);
    assert!(bench.told.iter().any(|text| text.contains("other bytes upstream")), "{:?}", bench.told);
    assert!(!bench.shelf.has(&topics[1]), "wrong bytes are not kept");
    bench.upstream.insert(topics[1].clone(), bytes[1].clone());
    bench.lose();
    bench.connect();
    bench.pass(10);
    assert_eq!(bench.sequence(), Some(1));
    assert_eq!(topics.iter().map(|topic| bench.brought[topic]).collect::<Vec<_>>(), [1, 2, 1]);
    assert!(topics.iter().zip(&bytes).all(|(topic, bytes)| bench.shelf.get(topic).as_ref() == Some(bytes)));
}

#[test]
fn a_lower_number_is_never_taken_also_after_a_clear() {
    let mut bench = Bench::all();
    bench.release(7, &[1]);
    bench.connect();
    bench.release(6, &[2]);
    assert_eq!(bench.sequence(), Some(7));
    bench.publish(&dev().topic(), Bytes::new());
    assert_eq!(bench.sequence(), None, "a clear is carried");
    bench.release(6, &[2]);
    assert_eq!(bench.sequence(), None);
    bench.release(7, &[1]);
    assert_eq!(bench.sequence(), Some(7), "the very list that it had");
}

#[test]
fn another_list_under_a_number_that_was_taken_is_left_and_said_also_after_a_clear_and_a_restart() {
    let held = |bench: &Bench| bench.mirror.standings()[0].held.clone();
    let first = list(7, &[1], "");
    for twice in [false, true] {
        let mut bench = Bench::all();
        bench.release(7, &[1]);
        bench.connect();
        bench.release(7, &[2]);
        assert_eq!(bench.shelf.get(&dev().topic()), Some(first.clone()));
        assert!(held(&bench).is_some_and(|why| why.contains("another list as release 7 of `dev`")));
        assert!(bench.told.last().unwrap().contains("another list"), "{:?}", bench.told);
        assert!(!bench.shelf.has(&package(2).0), "nothing of it is fetched");
        if twice {
            bench.publish(&dev().topic(), Bytes::new());
            assert_eq!((bench.sequence(), held(&bench)), (None, None));
        }
        let taken = bench.mirror.taken.clone();
        bench.mirror = Mirror::new(everything(), taken, &bench.shelf);
        bench.lose();
        bench.release(7, &[2]);
        bench.connect();
        bench.pass(3);
        assert_eq!(bench.sequence(), (!twice).then_some(7));
        assert!(held(&bench).is_some() && bench.mirror.is_whole());
        bench.release(7, &[1]);
        assert_eq!((bench.shelf.get(&dev().topic()), held(&bench)), (Some(first.clone()), None));
        bench.release(8, &[2]);
        assert_eq!((bench.sequence(), held(&bench)), (Some(8), None));
    }
}

#[test]
fn what_an_edge_remembers_may_be_lost_and_yet_no_number_comes_twice() {
    let mut bench = Bench::all();
    bench.release(7, &[1]);
    bench.connect();
    bench.lose();
    bench.mirror = Mirror::new(everything(), BTreeMap::new(), &bench.shelf);
    bench.release(7, &[2]);
    bench.connect();
    assert_eq!(bench.shelf.get(&dev().topic()), Some(list(7, &[1], "")));
}

#[test]
fn of_two_lists_with_one_number_on_their_way_the_one_that_is_kept_stays() {
    let mut bench = Bench::all();
    bench.connect();
    bench.shelf.0.extend([package(1), package(2)]);
    let moment = Moment { now: bench.now, unix_ms: bench.unix_ms };
    let came = |payload| Event::Message { topic: dev().topic(), payload };
    let first = list(7, &[1], "");
    let effects = bench.mirror.handle(moment, came(first.clone()), &bench.shelf);
    let keep = Effect::Keep { topic: dev().topic(), payload: first.clone() };
    assert_eq!(effects, [keep]);
    // The index has not answered yet.
    assert_eq!(bench.mirror.handle(moment, came(list(7, &[2], "")), &bench.shelf), []);
    bench.shelf.0.insert(dev().topic(), first.clone());
    bench.handle(Event::Settled { topic: dev().topic(), result: Ok(()) });
    assert_eq!(bench.shelf.get(&dev().topic()), Some(first));
    assert!(bench.mirror.standings()[0].held.is_some() && bench.mirror.coming.is_empty());
}

#[test]
fn a_gateway_shows_what_its_cluster_has_also_if_that_was_published_twice_under_one_number() {
    let mut bench = Bench::new(Options { part: Part::Gateway, ..everything() });
    bench.release(7, &[1]);
    bench.connect();
    bench.release(7, &[2]);
    assert_eq!(bench.shelf.get(&dev().topic()), Some(list(7, &[2], "")));
    assert!(bench.told.iter().any(|text| text.contains("another list as release 7")));
}

#[test]
fn an_upstream_that_forgot_clears_nothing() {
    let mut bench = Bench::all();
    bench.release(7, &[1]);
    bench.connect();
    bench.lose();
    bench.upstream.clear();
    bench.connect();
    bench.pass(60);
    assert_eq!(bench.sequence(), Some(7));
    bench.publish(&dev().topic(), Bytes::from_static(b"[]"));
    assert_eq!(bench.sequence(), Some(7), "a channel that nobody published to has an empty list");
}

#[test]
fn a_list_that_nobody_brought_is_asked_for_in_the_end() {
    let mut bench = Bench::all();
    bench.release(1, &[1]);
    bench.connect();
    // As when a node of a cluster dies with what it owed.
    bench.upstream.extend([package(2), (dev().topic(), list(2, &[2], ""))]);
    bench.pass(ASK.as_secs() - 1);
    assert_eq!(bench.sequence(), Some(1));
    bench.pass(1);
    assert_eq!(bench.sequence(), Some(2));
}

#[test]
fn what_empty_nodes_take_is_here_before_the_list_that_says_so_or_given_up() {
    let rollout = r#","rollout":{"id":"0123456789abcdef","percent":10,"base":1}"#;
    for has_base in [true, false] {
        let mut bench = Bench::all();
        bench.upstream.extend([package(1), package(2)]);
        bench.upstream.insert(dev().topic(), list(2, &[2], rollout));
        if has_base {
            bench.upstream.insert(dev().history(1), list(1, &[1], ""));
        }
        bench.connect();
        assert_eq!(bench.sequence().is_some(), has_base);
        bench.pass(120);
        assert_eq!(bench.sequence(), Some(2));
        assert_eq!(bench.shelf.has(&package(1).0), has_base);
        assert_eq!(bench.shelf.has(&dev().history(1)), has_base);
    }
}

#[test]
fn packages_are_fetched_in_their_hours_and_what_needs_none_is_taken_at_any() {
    let hours = Hours { window: "01:00-02:00".parse().unwrap(), utc_offset: 0 };
    let mut bench = Bench::new(Options { hours: Some(hours), ..everything() });
    bench.release(1, &[1]);
    bench.connect();
    bench.pass(60);
    assert_eq!(bench.sequence(), None);
    bench.shelf.0.extend([package(2)]);
    bench.release(2, &[2]);
    assert_eq!(bench.sequence(), Some(2), "nothing to fetch");
    bench.release(3, &[3]);
    bench.pass(60);
    assert_eq!(bench.sequence(), Some(2));
    bench.unix_ms = 3600 * 1000;
    bench.pass(1);
    assert_eq!(bench.sequence(), Some(3));
}

#[test]
fn only_chosen_channels_are_asked_for() {
    let mut bench = Bench::new(Options { channels: Channels::Only(vec![dev()]), ..everything() });
    bench.release(1, &[1]);
    bench.upstream.insert("mpypi/channels/other".to_owned(), Bytes::from_static(b"[{}]"));
    bench.connect();
    assert_eq!(bench.subscribed.iter().collect::<Vec<_>>(), ["mpypi/channels/dev", "mpypi/keys/root/+"]);
    assert_eq!(bench.sequence(), Some(1));
}

/// Something that happens upstream or on the way.
#[derive(Debug, Clone)]
enum Blow {
    Release(Vec<u8>),
    Old(u64),
    Lose,
    Connect,
    Mute(u8),
    Garble(u8),
    Pass(u64),
    Restart,
}

fn blow() -> impl Strategy<Value = Blow> {
    prop_oneof![
        prop::collection::vec(1..12u8, 0..6).prop_map(Blow::Release),
        (1..20u64).prop_map(Blow::Old),
        Just(Blow::Lose),
        Just(Blow::Connect),
        (1..12u8).prop_map(Blow::Mute),
        (1..12u8).prop_map(Blow::Garble),
        (1..40u64).prop_map(Blow::Pass),
        Just(Blow::Restart),
    ]
}

proptest! {
    /// [`Bench::keep`] sees to it that no list is kept before its packages, and none after a newer one.
    #[test]
    fn whatever_befalls_the_line_the_mirror_ends_with_what_the_upstream_has(
        blows in prop::collection::vec(blow(), 1..40),
    ) {
        let mut bench = Bench::all();
        let (mut newest, mut last) = (0, Vec::new());
        for blow in blows {
            match blow {
                Blow::Release(mut packages) => {
                    packages.sort_unstable();
                    packages.dedup();
                    newest += 1;
                    bench.release(newest, &packages);
                    last = packages;
                }
                // A node of a cluster that is behind.
                Blow::Old(sequence) if sequence < newest => {
                    let payload = list(sequence, &[1], "");
                    bench.handle(Event::Message { topic: dev().topic(), payload });
                }
                Blow::Old(_) => {}
                Blow::Lose => bench.lose(),
                Blow::Connect => bench.connect(),
                Blow::Mute(n) => drop(bench.mute.insert(package(n).0)),
                Blow::Garble(n) => {
                    let topic = package(n).0;
                    if bench.upstream.contains_key(&topic) {
                        bench.upstream.insert(topic, Bytes::from_static(b"garbled"));
                    }
                }
                Blow::Pass(seconds) => bench.pass(seconds),
                Blow::Restart => {
                    let taken = bench.mirror.taken.clone();
                    bench.subscribed.clear();
                    bench.mirror = Mirror::new(bench.mirror.options.clone(), taken, &bench.shelf);
                }
            }
        }
        bench.mute.clear();
        bench.upstream.extend((1..12).map(package));
        bench.lose();
        bench.connect();
        bench.pass(2 * AGAIN_MOST.as_secs());
        prop_assert_eq!(bench.sequence(), (newest > 0).then_some(newest));
        for n in last {
            prop_assert!(bench.shelf.has(&package(n).0));
        }
        prop_assert!(bench.mirror.coming.is_empty() && bench.mirror.fetches.is_empty());
    }
}
