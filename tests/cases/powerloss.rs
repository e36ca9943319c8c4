//! What an acknowledgement is worth when the power goes: whatever the disk had not been told to keep is lost,
//! wholly or in part, and the broker starts on the rest.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    net::{SocketAddr, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use bytes::BytesMut;
use mpypi_protocol::{Digest, PackageId, UpdateList};
use mpypi_tests::{
    PATIENCE, Server, World,
    disk::{Cut, Disk, Journal},
    fill,
};
use rumqttc::v5::mqttbytes::{
    Error, QoS, qos,
    v5::{
        Connect, ConnectProperties, Filter, Packet, PubAck, PubAckReason, PubComp, PubRec, PubRecReason,
        PubRel, Publish, PublishProperties, Subscribe,
    },
};

/// Cuts in all; `MPYPI_ROUNDS` asks for another number.
const ROUNDS: usize = 200;
/// Brokers that live and die beside each other.
const LANES: usize = 2;
/// Cuts of one life, each at another moment of it.
const CUTS: usize = 10;
/// Clients that publish at once, each on topics and a channel of its own.
const PUBLISHERS: usize = 3;
/// Topics of each.
const TOPICS: usize = 12;
/// Messages that each has under way.
const WINDOW: usize = 8;
/// A life ends after so many acknowledgements, at most.
const ACKNOWLEDGED: usize = 300;
/// Largest payload, in bytes: well beyond where payloads leave the database for files.
const LARGE: usize = 90_000;
/// An expiry that no test lives to see, and one that it may, in seconds.
const LONG: u32 = 10_000;
const SHORT: u32 = 1;

/// Topics of messages that are not retained, for a client that is away; each message has one of its own.
const QUEUE: &str = "queue/";
/// The client that is away.
const AWAY: &str = "away";

/// What became of a topic: everything that was sent there, in order.
type History = Vec<Sent>;

#[derive(Debug, Clone)]
struct Sent {
    /// The digest of the payload; `None` for one that clears.
    payload: Option<Digest>,
    expiry: Option<u32>,
    /// How long the journal was when the answer was in.
    acknowledged: Option<u64>,
}

/// Everything one publisher sent, by topic.
type Known = BTreeMap<String, History>;

/// An MQTT 5 client on rumqttc's codec, an outsider's, that waits for nothing by itself.
struct Client {
    stream: TcpStream,
    buffer: BytesMut,
}

impl Client {
    fn connect(to: SocketAddr, id: &str) -> Option<Client> {
        Client::connect_with(to, id, true)
    }

    /// Goes on in a session that is kept for ever, or starts one.
    fn resume(to: SocketAddr, id: &str) -> Option<Client> {
        Client::connect_with(to, id, false)
    }

    fn connect_with(to: SocketAddr, id: &str, clean_start: bool) -> Option<Client> {
        let stream = TcpStream::connect(to).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut client = Client { stream, buffer: BytesMut::new() };
        let expiry = (!clean_start).then_some(u32::MAX);
        let properties = ConnectProperties { session_expiry_interval: expiry, ..ConnectProperties::new() };
        let connect =
            Connect { keep_alive: 0, client_id: id.to_owned(), clean_start, properties: Some(properties) };
        client.send(&Packet::Connect(connect, None, None))?;
        matches!(client.packet()?, Packet::ConnAck(_)).then_some(client)
    }

    fn subscribe_to_queue(&mut self) {
        let mut subscribe = Subscribe::new(Filter::new(format!("{QUEUE}#"), QoS::ExactlyOnce), None);
        subscribe.pkid = 1;
        self.send(&Packet::Subscribe(subscribe)).unwrap();
    }

    fn send(&mut self, packet: &Packet) -> Option<()> {
        let mut bytes = BytesMut::new();
        packet.write(&mut bytes, None).unwrap();
        self.stream.write_all(&bytes).ok()
    }

    /// The next packet; `None` if the broker is gone.
    fn packet(&mut self) -> Option<Packet> {
        loop {
            match Packet::read(&mut self.buffer, None) {
                Ok(packet) => return Some(packet),
                Err(Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("not a packet: {error}"),
            }
            if !fill(&mut self.stream, &mut self.buffer) {
                return None;
            }
        }
    }
}

/// One publisher at work.
struct Publisher<'w> {
    client: Client,
    n: usize,
    random: fastrand::Rng,
    known: &'w Mutex<Known>,
    journal: &'w Journal,
    acknowledged: &'w AtomicUsize,
    last_id: u16,
    /// Messages sent to the client that is away.
    queued: usize,
    /// Packet id → topic and place in its history.
    under_way: BTreeMap<u16, (String, usize)>,
}

impl Publisher<'_> {
    /// Publishes until the broker is gone.
    fn work(&mut self, sequence: &mut u64) -> Option<()> {
        loop {
            if self.random.u8(..10) == 0 {
                self.release(sequence)?;
                continue;
            }
            if self.random.u8(..5) == 0 {
                // For a client that is away: its session takes it.
                self.queued += 1;
                let topic = format!("{QUEUE}{}/{:08}", self.n, self.queued);
                let size = self.random.usize(1..20_000);
                let payload: Vec<u8> = (0..size).map(|_| self.random.u8(..)).collect();
                self.publish(topic, payload, None)?;
                continue;
            }
            let topic = format!("load/{}/{}", self.n, self.random.usize(..TOPICS));
            let (size, expiry) = match self.random.u8(..20) {
                0..=9 => (self.random.usize(1..2000), None),
                10..=13 => (self.random.usize(17_000..LARGE), None),
                14..=15 => (self.random.usize(1..40_000), Some(LONG)),
                16 => (self.random.usize(1..40_000), Some(SHORT)),
                _ => (0, None),
            };
            let payload: Vec<u8> = (0..size).map(|_| self.random.u8(..)).collect();
            self.publish(topic, payload, expiry)?;
        }
    }

    /// A release: some packages, then the list that names them and some of the release before; then the packages
    /// that no list names any more are forgotten.
    fn release(&mut self, sequence: &mut u64) -> Option<()> {
        let channel = format!("c{}", self.n);
        let wheels = "mpypi/packages/wheel/";
        let has = |topic: &str, history: &History| {
            topic.starts_with(wheels) && history.last().unwrap().payload.is_some()
        };
        let mut old: Vec<String> = {
            let known = self.known.lock().unwrap();
            known
                .iter()
                .filter(|(topic, history)| has(topic, history))
                .map(|(topic, _)| topic.clone())
                .collect()
        };
        let mut names: Vec<Digest> = Vec::new();
        for _ in 0..self.random.usize(1..5) {
            let size = self.random.usize(1..40_000);
            let payload: Vec<u8> = (0..size).map(|_| self.random.u8(..)).collect();
            let digest = Digest::of(&payload);
            names.push(digest);
            let expiry = self.random.bool().then_some(LONG);
            self.publish(PackageId::Wheel(digest).topic(), payload, expiry)?;
        }
        self.settle()?;
        if !old.is_empty() && self.random.bool() {
            let kept = old.swap_remove(self.random.usize(..old.len()));
            names.push(kept[wheels.len()..].parse().unwrap());
        }
        *sequence += 1;
        let mut list = format!(
            r#"[{{"type":"release","channel":"{channel}","sequence":{sequence},"version":"{sequence}"}}"#
        );
        for (i, digest) in names.iter().enumerate() {
            list += &format!(r#",{{"type":"wheel","name":"p{i}","version":"1","pkg_sha256":"{digest}"}}"#);
        }
        list += "]";
        self.publish(format!("mpypi/channels/{channel}"), list.into_bytes(), None)?;
        self.settle()?;
        for topic in old {
            self.publish(topic, Vec::new(), None)?;
        }
        Some(())
    }

    fn publish(&mut self, topic: String, payload: Vec<u8>, expiry: Option<u32>) -> Option<()> {
        self.last_id = self.last_id % 60_000 + 1;
        let properties =
            PublishProperties { message_expiry_interval: expiry, ..PublishProperties::default() };
        let digest = (!payload.is_empty()).then(|| Digest::of(&payload));
        let level = qos(self.random.u8(1..3)).unwrap();
        let mut publish = Publish::new(&topic, level, payload, expiry.map(|_| properties));
        (publish.retain, publish.pkid) = (!topic.starts_with(QUEUE), self.last_id);
        {
            let mut known = self.known.lock().unwrap();
            let history = known.entry(topic.clone()).or_default();
            history.push(Sent { payload: digest, expiry, acknowledged: None });
            self.under_way.insert(self.last_id, (topic, history.len() - 1));
        }
        self.client.send(&Packet::Publish(publish))?;
        while self.under_way.len() >= WINDOW {
            self.answer()?;
        }
        Some(())
    }

    /// Waits until everything is acknowledged.
    fn settle(&mut self) -> Option<()> {
        while !self.under_way.is_empty() {
            self.answer()?;
        }
        Some(())
    }

    fn answer(&mut self) -> Option<()> {
        let id = match self.client.packet()? {
            Packet::PubAck(ack) => {
                assert_eq!(ack.reason, PubAckReason::Success, "{:?}", ack.properties);
                ack.pkid
            }
            Packet::PubRec(received) => {
                assert_eq!(received.reason, PubRecReason::Success, "{:?}", received.properties);
                self.client.send(&Packet::PubRel(PubRel::new(received.pkid, None)))?;
                received.pkid
            }
            Packet::PubComp(_) => return Some(()),
            // The broker is asked to stop: nothing more will be answered.
            Packet::Disconnect(_) => return None,
            other => panic!("expected an acknowledgement, got {other:?}"),
        };
        let position = self.journal.position();
        let (topic, place) = self.under_way.remove(&id).expect("an answer to what was sent");
        let mut known = self.known.lock().unwrap();
        known.get_mut(&topic).unwrap()[place].acknowledged = Some(position);
        self.acknowledged.fetch_add(1, Ordering::SeqCst);
        Some(())
    }
}

/// A message found after a cut.
struct Found {
    payload: Vec<u8>,
    expiry: Option<u32>,
}

/// Every retained message that a broker holds.
fn everything(server: &Server) -> BTreeMap<String, Found> {
    /// Asked for last, so that its answer comes when all others have.
    const LAST: &str = "mpypi/channels/never";
    let mut client = Client::connect(server.address, "reader").unwrap();
    for (id, filter) in [(1, "#"), (2, LAST)] {
        let mut subscribe = Subscribe::new(Filter::new(filter, QoS::AtMostOnce), None);
        subscribe.pkid = id;
        client.send(&Packet::Subscribe(subscribe)).unwrap();
    }
    let mut found = BTreeMap::new();
    loop {
        match client.packet().expect("a broker that goes on") {
            Packet::Publish(publish) if publish.topic == LAST => return found,
            Packet::Publish(publish) => {
                assert!(publish.retain);
                let expiry = publish.properties.and_then(|properties| properties.message_expiry_interval);
                let topic = String::from_utf8(publish.topic.to_vec()).unwrap();
                found.insert(topic, Found { payload: publish.payload.to_vec(), expiry });
            }
            Packet::SubAck(_) => {}
            other => panic!("expected a message, got {other:?}"),
        }
    }
}

/// Subscribes the client that is away, and sees that the broker knows it.
fn subscribe_away(to: SocketAddr) {
    let mut client = Client::resume(to, AWAY).unwrap();
    client.subscribe_to_queue();
    while !matches!(client.packet().unwrap(), Packet::SubAck(_)) {}
}

/// Everything that waits for the client that is away, by topic, and takes it.
fn everything_queued(server: &Server) -> BTreeMap<String, Digest> {
    /// Published last, so that it comes when all others have.
    const LAST: &str = "queue/last";
    let mut client = Client::resume(server.address, AWAY).unwrap();
    // The cut may have come before the session, or its subscription, was there.
    client.subscribe_to_queue();
    let end = fastrand::u64(..).to_string();
    let mut last = Publish::new(LAST, QoS::AtLeastOnce, end.clone(), None);
    last.pkid = 2;
    client.send(&Packet::Publish(last)).unwrap();
    let (mut found, mut newest) = (BTreeMap::new(), BTreeMap::new());
    loop {
        match client.packet().expect("a broker that goes on") {
            Packet::Publish(publish) => {
                match publish.qos {
                    QoS::AtMostOnce => panic!("{publish:?}"),
                    QoS::AtLeastOnce => client.send(&Packet::PubAck(PubAck::new(publish.pkid, None))),
                    QoS::ExactlyOnce => client.send(&Packet::PubRec(PubRec::new(publish.pkid, None))),
                }
                .unwrap();
                if publish.topic == LAST {
                    match publish.payload == end {
                        true => return found,
                        false => continue, // of an earlier life, whose end came before it was taken for good
                    }
                }
                let topic = String::from_utf8(publish.topic.to_vec()).unwrap();
                let (publisher, _) = topic.rsplit_once('/').unwrap();
                let before = newest.insert(publisher.to_owned(), topic.clone());
                assert!(before.as_ref().is_none_or(|before| *before < topic), "{topic} after {before:?}");
                found.insert(topic, Digest::of(&publish.payload));
            }
            Packet::PubRel(release) => {
                client.send(&Packet::PubComp(PubComp::new(release.pkid, None))).unwrap();
            }
            Packet::PubAck(_) | Packet::SubAck(_) => {}
            other => panic!("expected a message, got {other:?}"),
        }
    }
}

/// Compares what a broker holds with what was acknowledged before `cut`, and returns it as what is known now.
fn check(server: &Server, all: &[Mutex<Known>], cut: u64) -> Vec<Known> {
    let found = everything(server);
    let mut queued = everything_queued(server);
    let mut now = vec![Known::new(); all.len()];
    for (known, now) in all.iter().zip(&mut now) {
        for (topic, history) in known.lock().unwrap().iter() {
            if topic.starts_with(QUEUE) {
                let sent = &history[0];
                let is_acknowledged = sent.acknowledged.is_some_and(|position| position <= cut);
                match queued.remove(topic) {
                    Some(digest) => assert_eq!(sent.payload, Some(digest), "`{topic}` is not what was sent"),
                    None => assert!(!is_acknowledged, "what was acknowledged is lost: `{topic}`"),
                }
                // It may come once more: the next cut may lose that it was taken.
                now.insert(topic.clone(), vec![Sent { acknowledged: None, ..sent.clone() }]);
                continue;
            }
            let is_before = |sent: &Sent| sent.acknowledged.is_some_and(|position| position <= cut);
            let last = history.iter().rposition(is_before);
            // Nothing was there before the first message, unless an answer says that it has been replaced.
            let may_be = &history[last.unwrap_or(0)..];
            let Some(found) = found.get(topic) else {
                let may_be_gone =
                    |sent: &Sent| sent.payload.is_none() || sent.expiry.is_some_and(|expiry| expiry <= SHORT);
                assert!(
                    last.is_none() || may_be.iter().any(may_be_gone),
                    "what was acknowledged is lost: `{topic}`: {may_be:?}"
                );
                continue;
            };
            let digest = Digest::of(&found.payload);
            let sent = may_be.iter().find(|sent| sent.payload == Some(digest));
            let sent = sent.unwrap_or_else(|| panic!("`{topic}` holds {digest}, not one of {may_be:?}"));
            match (sent.expiry, found.expiry) {
                (None, None) => {}
                (Some(sent), Some(found)) if (1..=sent).contains(&found) => {}
                // A list that names a package takes its expiry away.
                (Some(_), None) if topic.starts_with("mpypi/packages/") => {}
                (sent, found) => panic!("`{topic}` expires in {found:?} s, sent with {sent:?}"),
            }
            now.insert(
                topic.clone(),
                vec![Sent { expiry: found.expiry, acknowledged: Some(0), ..sent.clone() }],
            );
        }
    }
    assert!(queued.is_empty(), "never sent: {:?}", queued.keys());
    for (topic, message) in &found {
        assert!(now.iter().any(|known| known.contains_key(topic)), "`{topic}` was never sent");
        if topic.starts_with("mpypi/channels/") {
            for (id, _) in UpdateList::parse(&message.payload).unwrap().packages() {
                assert!(found.contains_key(&id.topic()), "`{topic}` names `{id}`, which is not there");
            }
        }
    }
    now
}

/// Starts a broker, loads it, kills it, and cuts its life at `CUTS` moments; the next life begins where the last
/// cut left the disk.
fn lane(world: &World, shim: &std::path::Path, seed: u64, rounds: usize) -> BTreeMap<&'static str, usize> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut all: Vec<Mutex<Known>> = (0..PUBLISHERS).map(|_| Mutex::default()).collect();
    let mut sequences = [0; PUBLISHERS];
    let mut tally = BTreeMap::new();
    let folder = |name: String| {
        fs::create_dir(world.path(&name)).unwrap();
        world.path(&name)
    };
    let mut data = folder(format!("{seed}-start"));
    for life in 0..rounds.div_ceil(CUTS) {
        let log = world.path(&format!("{seed}.log"));
        let journal = Journal::new(shim, world.path(&format!("{seed}-{life}.journal")), &data);
        let mut disk = Disk::of(&data);
        let server = Server::start_on(&data, log.clone(), &journal.environment());
        let started = journal.position();
        subscribe_away(server.address);
        let acknowledged = AtomicUsize::new(0);
        let enough = random.usize(1..ACKNOWLEDGED);
        let address = server.address;
        thread::scope(|scope| {
            for (n, (known, sequence)) in all.iter().zip(&mut sequences).enumerate() {
                let (journal, acknowledged) = (&journal, &acknowledged);
                let random = fastrand::Rng::with_seed(random.u64(..));
                scope.spawn(move || {
                    let client = Client::connect(address, &format!("publisher-{n}")).unwrap();
                    let under_way = BTreeMap::new();
                    Publisher {
                        client,
                        n,
                        random,
                        known,
                        journal,
                        acknowledged,
                        last_id: 0,
                        queued: life * 10_000,
                        under_way,
                    }
                    .work(sequence);
                });
            }
            while acknowledged.load(Ordering::SeqCst) < enough {
                thread::yield_now();
            }
            server.kill();
        });
        let records = journal.records();
        let mut next = None;
        // In order, so that the disk is worked out only once.
        let mut cuts: Vec<_> = (0..CUTS).map(|_| random.usize(..=records.len())).collect();
        cuts.sort_unstable();
        let continued = random.usize(..CUTS);
        let mut applied = 0;
        for (round, at) in cuts.into_iter().enumerate() {
            records[applied..at].iter().for_each(|record| disk.apply(record));
            applied = at;
            let position = at.checked_sub(1).map_or(0, |last| records[last].end);
            let cut = [Cut::LosesAll, Cut::LosesSome, Cut::LosesSome, Cut::LosesNothing][random.usize(..4)];
            let left = folder(format!("{seed}-{life}-{round}"));
            disk.write_after(cut, &mut random, &left);
            println!(
                "MPYPI_SEED={seed} life {life} round {round}: {cut:?} after {at} of {} changes, byte {position} \
                 of the journal, started at {started}; {}",
                records.len(),
                left.display()
            );
            let server = Server::start_on(&left, log.clone(), &[]);
            let now = check(&server, &all, position);
            server.kill();
            *tally
                .entry(match cut {
                    Cut::LosesAll => "lost all that was not synced",
                    Cut::LosesSome => "lost some of it",
                    Cut::LosesNothing => "killed",
                })
                .or_default() += 1;
            if round == continued {
                next = Some((left, now));
            } else {
                fs::remove_dir_all(left).unwrap();
            }
        }
        fs::remove_dir_all(&data).unwrap();
        let (left, now) = next.unwrap();
        data = left;
        all = now.into_iter().map(Mutex::new).collect();
    }
    tally
}

#[test]
fn what_was_acknowledged_is_there_after_hundreds_of_power_cuts_under_load() {
    let seed = std::env::var("MPYPI_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("MPYPI_SEED={seed}");
    let world = World::new();
    let shim = world.path("journal.so");
    Journal::build_shim(&shim);
    let rounds = std::env::var("MPYPI_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES as u64)
            .map(|n| {
                scope.spawn({
                    let (world, shim) = (&world, &shim);
                    move || lane(world, shim, seed.wrapping_add(n), rounds.div_ceil(LANES))
                })
            })
            .collect();
        for lane in lanes {
            println!("{:?}", lane.join().unwrap());
        }
    });
}

#[test]
fn the_journal_of_a_broker_tells_all_that_it_did_to_its_files() {
    let world = World::new();
    let shim = world.path("journal.so");
    Journal::build_shim(&shim);
    fs::create_dir(world.path("data")).unwrap();
    let journal = Journal::new(&shim, world.path("journal"), &world.path("data"));
    let mut disk = Disk::of(&world.path("data"));
    let server = Server::start_on(&world.path("data"), world.path("broker.log"), &journal.environment());
    let known = Mutex::default();
    let acknowledged = AtomicUsize::new(0);
    thread::scope(|scope| {
        let client = Client::connect(server.address, "publisher").unwrap();
        let (journal, known, acknowledged) = (&journal, &known, &acknowledged);
        scope.spawn(move || {
            let random = fastrand::Rng::with_seed(7);
            let under_way = BTreeMap::new();
            Publisher {
                client,
                n: 0,
                random,
                known,
                journal,
                acknowledged,
                last_id: 0,
                queued: 0,
                under_way,
            }
            .work(&mut 0);
        });
        while acknowledged.load(Ordering::SeqCst) < ACKNOWLEDGED {
            thread::yield_now();
        }
        assert_eq!(server.stop("-TERM"), Some(0));
    });
    journal.records().iter().for_each(|record| disk.apply(record));
    fs::create_dir(world.path("again")).unwrap();
    disk.write_after(Cut::LosesNothing, &mut fastrand::Rng::with_seed(0), &world.path("again"));
    let files = world.files("data");
    assert!(files.len() > 10, "{:?}", files.keys());
    assert!(files == world.files("again"), "the journal does not tell all");
}

#[test]
fn a_power_cut_at_any_moment_of_the_first_two_starts_leaves_an_index_that_opens() {
    let world = World::new();
    let shim = world.path("journal.so");
    Journal::build_shim(&shim);
    fs::create_dir(world.path("data")).unwrap();
    let mut random = fastrand::Rng::with_seed(1);
    for start in 0..2 {
        let journal = Journal::new(&shim, world.path(&format!("journal-{start}")), &world.path("data"));
        let mut disk = Disk::of(&world.path("data"));
        let server = Server::start_on(&world.path("data"), world.path("broker.log"), &journal.environment());
        server.kill();
        let records = journal.records();
        assert!(records.len() > 3);
        for at in 0..=records.len() {
            for cut in [Cut::LosesAll, Cut::LosesSome, Cut::LosesNothing] {
                println!("start {start}: {cut:?} after {at} of {} changes", records.len());
                let left = world.path("left");
                fs::create_dir(&left).unwrap();
                disk.write_after(cut, &mut random, &left);
                let server = Server::start_on(&left, world.path("left.log"), &[]);
                assert!(everything(&server).is_empty());
                server.kill();
                fs::remove_dir_all(&left).unwrap();
            }
            records.get(at).iter().for_each(|record| disk.apply(record));
        }
    }
}
