//! Sessions that outlive their connection, and the broker's process.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use bytes::BytesMut;
use mpypi_tests::{Client, Deadline, Options, Server, World};
use rumqttc::mqttbytes::{
    QoS,
    v4::{Packet, PubComp, PubRec, PubRel, Publish},
};

const CMD: &str = "mpypi/nodes/kitchen/cmd";

/// The packet's bytes.
fn bytes(packet: &Packet) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    match packet {
        Packet::Publish(publish) => publish.write(&mut bytes),
        Packet::PubRec(rec) => rec.write(&mut bytes),
        Packet::PubRel(rel) => rel.write(&mut bytes),
        Packet::PubComp(comp) => comp.write(&mut bytes),
        other => panic!("{other:?}"),
    }
    .unwrap();
    bytes.to_vec()
}

fn pubrec(id: u16) -> Vec<u8> {
    bytes(&Packet::PubRec(PubRec::new(id)))
}

fn pubrel(id: u16) -> Vec<u8> {
    bytes(&Packet::PubRel(PubRel::new(id)))
}

fn pubcomp(id: u16) -> Vec<u8> {
    bytes(&Packet::PubComp(PubComp::new(id)))
}

fn exactly_once(topic: &str, id: u16, dup: bool, payload: &str) -> Vec<u8> {
    let mut publish = Publish::new(topic, QoS::ExactlyOnce, payload);
    (publish.pkid, publish.dup) = (id, dup);
    bytes(&Packet::Publish(publish))
}

/// Ends the broker in one way or the other, or leaves it, and goes on with its data.
fn interrupt(server: Server, world: &World, how: &str) -> Server {
    match how {
        "line" => return server,
        "kill" => server.kill(),
        signal => assert_eq!(server.stop(signal), Some(0)),
    }
    Server::start(world)
}

#[test]
fn a_node_that_was_away_gets_each_order_it_missed_once_whatever_became_of_the_broker() {
    for how in ["line", "kill", "-TERM"] {
        let world = World::new();
        let mut server = Server::start(&world);
        let mut node = Client::resume(server.address, "kitchen");
        assert!(!node.session_present);
        assert_eq!(node.subscribe(CMD, 1), 1);
        drop(node);
        let mut operator = Client::connect(server.address, "operator");
        for order in ["first", "second", "third"] {
            let id = operator.post(CMD, order.as_bytes(), 1, false);
            assert_eq!(operator.acknowledged(), id);
        }
        server = interrupt(server, &world, how);
        let mut node = Client::resume(server.address, "kitchen");
        assert!(node.session_present, "{how}");
        for order in ["first", "second", "third"] {
            assert_eq!(node.message().unwrap().payload, order.as_bytes(), "{how}");
        }
        node.ping();
        let mut node = Client::resume(server.address, "kitchen");
        let mut operator = Client::connect(server.address, "operator");
        operator.post(CMD, b"last", 1, false).unwrap();
        assert_eq!(node.message().unwrap().payload, b"last", "{how}: nothing twice");
        // A clean start forgets all of it.
        assert!(!Client::connect(server.address, "kitchen").session_present);
        assert!(!Client::resume(server.address, "kitchen").session_present);
    }
}

#[test]
fn what_is_new_after_an_interruption_is_no_duplicate() {
    for how in ["line", "kill", "-TERM"] {
        let world = World::new();
        let mut server = Server::start(&world);
        let mut node = Client::resume(server.address, "kitchen");
        node.subscribe(CMD, 1);
        for _ in 0..2 {
            let mut publisher = Client::connect(server.address, "publisher");
            let id = publisher.post(CMD, b"[]", 1, false);
            assert_eq!(publisher.acknowledged(), id);
            let Some(Packet::Publish(publish)) = node.packet() else { panic!() };
            assert!(!publish.dup, "[MQTT-3.3.1-2]: {how}");
            node.send(&[0x40, 2, (publish.pkid >> 8) as u8, publish.pkid as u8]);
            node.ping();
            server = interrupt(server, &world, how);
            node = Client::resume(server.address, "kitchen");
            assert!(node.session_present);
            if how == "kill" {
                // An acknowledgement may be lost with the broker: the message then comes once more.
                node.fence();
            }
        }
    }
}

#[test]
fn who_disconnects_and_is_back_at_once_leaves_no_will() {
    let world = World::new();
    let server = Server::start(&world);
    let will = Some(("gone/c".to_owned(), "lost".to_owned()));
    let options = Options { will, ..Options::id("c") };
    for _ in 0..50 {
        let (mut client, _) = Client::try_connect(server.address, &options).unwrap();
        client.send(&[0xe0, 0]);
        let _back = Client::connect(server.address, "c");
    }
    assert_eq!(Client::connect(server.address, "observer").retained("gone/c"), None);
}

#[test]
fn a_channel_a_node_was_interrupted_in_comes_again_without_a_new_subscription() {
    let world = World::new();
    let mut server = Server::start(&world);
    assert!(Client::connect(server.address, "p").retain("mpypi/channels/dev", b"[ ]"));
    let mut node = Client::resume(server.address, "kitchen");
    node.subscribe("mpypi/channels/dev", 1);
    let Some(Packet::Publish(unacknowledged)) = node.packet() else { panic!() };
    drop(node);
    for how in ["line", "kill"] {
        server = interrupt(server, &world, how);
        let mut node = Client::resume(server.address, "kitchen");
        let Some(Packet::Publish(again)) = node.packet() else { panic!() };
        assert_eq!((again.pkid, &again.payload), (unacknowledged.pkid, &unacknowledged.payload), "{how}");
        assert!(again.dup, "{how}");
    }
    let mut node = Client::resume(server.address, "kitchen");
    assert_eq!(node.message().unwrap().payload, b"[ ]");
    node.ping();
    assert!(Client::connect(server.address, "p").retain("mpypi/channels/dev", b"[]"));
    let mut node = Client::resume(server.address, "kitchen");
    assert_eq!(node.message().unwrap().payload, b"[]");
}

#[test]
fn a_qos_2_message_to_a_client_is_sent_once_wherever_it_is_interrupted() {
    for how in ["line", "kill"] {
        let world = World::new();
        let mut server = Server::start(&world);
        Client::resume(server.address, "kitchen").subscribe(CMD, 2);
        let mut operator = Client::connect(server.address, "operator");
        operator.send(&exactly_once(CMD, 1, false, "once"));
        assert_eq!(operator.packet(), Some(Packet::PubRec(PubRec::new(1))));
        let mut id = 0;
        for dup in [false, true] {
            let mut node = Client::resume(server.address, "kitchen");
            let Some(Packet::Publish(publish)) = node.packet() else { panic!() };
            // A broker that was killed cannot know that it has not sent it yet.
            assert_eq!((publish.dup, publish.qos), (dup, QoS::ExactlyOnce), "{how}");
            assert!(id == 0 || id == publish.pkid, "{how}: [MQTT-4.4.0-1]");
            id = publish.pkid;
            server = interrupt(server, &world, how);
        }
        let mut node = Client::resume(server.address, "kitchen");
        assert!(matches!(node.packet(), Some(Packet::Publish(publish)) if publish.pkid == id));
        node.send(&pubrec(id));
        assert_eq!(node.packet(), Some(Packet::PubRel(PubRel::new(id))), "{how}");
        for _ in 0..2 {
            server = interrupt(server, &world, how);
            let mut node = Client::resume(server.address, "kitchen");
            assert_eq!(node.packet(), Some(Packet::PubRel(PubRel::new(id))), "{how}: not the message again");
        }
        let mut node = Client::resume(server.address, "kitchen");
        assert_eq!(node.packet(), Some(Packet::PubRel(PubRel::new(id))));
        node.send(&pubcomp(id));
        node.ping();
        let mut node = Client::resume(server.address, "kitchen");
        node.fence();
        assert!(!node.waits());
    }
}

#[test]
fn a_qos_2_message_from_a_client_is_taken_once_wherever_it_is_interrupted() {
    for how in ["line", "kill"] {
        let world = World::new();
        let mut server = Server::start(&world);
        Client::resume(server.address, "listener").subscribe("home/#", 1);
        for payload in ["a", "b"] {
            for dup in [false, true, true] {
                let mut client = Client::resume(server.address, "sender");
                client.send(&exactly_once("home/x", 7, dup, payload));
                assert_eq!(client.packet(), Some(Packet::PubRec(PubRec::new(7))), "{how}");
                server = interrupt(server, &world, how);
            }
            for _ in 0..2 {
                let mut client = Client::resume(server.address, "sender");
                client.send(&pubrel(7));
                assert_eq!(client.packet(), Some(Packet::PubComp(PubComp::new(7))), "{how}");
                server = interrupt(server, &world, how);
            }
        }
        let mut listener = Client::resume(server.address, "listener");
        for payload in [b"a", b"b"] {
            assert_eq!(listener.message().unwrap().payload, payload, "{how}");
        }
        listener.fence();
        assert!(!listener.waits(), "{how}");
    }
}

#[test]
fn each_message_reaches_one_of_those_who_share_a_subscription() {
    let world = World::new();
    let server = Server::start(&world);
    let share = "$share/workers/home/+";
    let mut publisher = Client::connect(server.address, "p");
    assert!(publisher.retain("home/old", b"x"), "who shares gets nothing that is retained");
    Client::resume(server.address, "away").subscribe(share, 1);
    let mut members: Vec<_> = (0..3).map(|n| Client::connect(server.address, &format!("m{n}"))).collect();
    for member in &mut members {
        assert_eq!(member.subscribe(share, 1), 1);
    }
    for n in 0..90 {
        publisher.post("home/x", format!("{n}").as_bytes(), 1, false).unwrap();
        publisher.acknowledged().unwrap();
    }
    let mut seen = BTreeSet::new();
    for member in &mut members {
        for _ in 0..30 {
            let payload = String::from_utf8(member.message().unwrap().payload).unwrap();
            assert!(seen.insert(payload.clone()), "{payload} twice");
        }
        member.fence();
        assert!(!member.waits());
    }
    assert_eq!(seen.len(), 90);
    drop(members);
    // With nobody else there, the one that is away gets it when it is back.
    let deadline = Deadline::new();
    loop {
        publisher.post("home/x", b"late", 1, false).unwrap();
        publisher.acknowledged().unwrap();
        let mut away = Client::resume(server.address, "away");
        away.ping();
        if away.waits() {
            assert_eq!(away.message().unwrap().payload, b"late");
            break;
        }
        deadline.check("the broker still sees members that have gone");
    }
}

/// Where the broker is now.
type Address = Arc<Mutex<SocketAddr>>;

fn connect(address: &Address, id: &str) -> Option<Client> {
    let address = *address.lock().unwrap();
    let options = Options { clean: false, ..Options::id(id) };
    let (client, code) = Client::try_connect(address, &options)?;
    (code == 0).then_some(client)
}

/// Takes messages as a proper client does, until the one that says `end`; counts how often each came.
fn listen(address: &Address, counts: &Mutex<BTreeMap<String, usize>>) {
    let mut held = BTreeSet::new();
    let mut connections = 0;
    loop {
        let Some(mut client) = connect(address, "listener") else { continue };
        assert!(client.session_present || connections == 0, "the session is lost");
        if connections == 0 {
            client.subscribe("home/#", 2);
        }
        connections += 1;
        while let Some(packet) = client.packet() {
            let answer = match packet {
                Packet::Publish(publish) => {
                    let payload = String::from_utf8(publish.payload.to_vec()).unwrap();
                    if payload == "end" {
                        return;
                    }
                    let is_new = publish.qos != QoS::ExactlyOnce || held.insert(publish.pkid);
                    if is_new {
                        *counts.lock().unwrap().entry(payload).or_default() += 1;
                    }
                    match publish.qos {
                        QoS::ExactlyOnce => pubrec(publish.pkid),
                        _ => vec![0x40, 2, (publish.pkid >> 8) as u8, publish.pkid as u8],
                    }
                }
                Packet::PubRel(rel) => {
                    held.remove(&rel.pkid);
                    pubcomp(rel.pkid)
                }
                other => panic!("{other:?}"),
            };
            if client.try_send(&answer).is_err() {
                break;
            }
        }
    }
}

/// Sends numbered messages as a proper client does, each until it is complete; `done` says how many are.
fn speak(address: &Address, stop: &AtomicBool, qos: u8, done: &AtomicUsize) {
    let id = format!("speaker-{qos}");
    let mut number = 0;
    // Whether the present message was sent before, and whether the broker has it.
    let (mut sent, mut received) = (false, false);
    while !stop.load(Ordering::SeqCst) {
        let Some(mut client) = connect(address, &id) else { continue };
        while !stop.load(Ordering::SeqCst) {
            let payload = format!("{qos}-{number}");
            let packet_id = (number % 60_000 + 1) as u16;
            let packet = match (received, qos) {
                (true, _) => pubrel(packet_id),
                (false, 2) => exactly_once("home/x", packet_id, sent, &payload),
                _ => {
                    let mut publish = Publish::new("home/x", QoS::AtLeastOnce, payload);
                    (publish.pkid, publish.dup) = (packet_id, sent);
                    bytes(&Packet::Publish(publish))
                }
            };
            sent = true;
            if client.try_send(&packet).is_err() {
                break;
            }
            match client.packet() {
                Some(Packet::PubRec(_)) => received = true,
                Some(Packet::PubAck(_) | Packet::PubComp(_)) => {
                    (sent, received) = (false, false);
                    number += 1;
                    done.store(number, Ordering::SeqCst);
                }
                Some(other) => panic!("{other:?}"),
                None => break,
            }
        }
    }
}

#[test]
fn a_kept_session_misses_nothing_and_sees_qos_2_once_however_often_the_broker_is_killed() {
    const KILLS: usize = 12;
    let world = World::new();
    let mut server = Server::start(&world);
    let address: Address = Arc::new(Mutex::new(server.address));
    let stop = Arc::new(AtomicBool::new(false));
    let (counts, done) = (Arc::new(Mutex::default()), [(); 2].map(|()| Arc::new(AtomicUsize::new(0))));
    let listener = {
        let (address, counts) = (address.clone(), counts.clone());
        thread::spawn(move || listen(&address, &counts))
    };
    let deadline = Deadline::new();
    while counts.lock().unwrap().is_empty() {
        // Once it has subscribed, it hears of something.
        let mut client = Client::connect(server.address, "p");
        client.post("home/x", b"hello", 1, false).unwrap();
        client.acknowledged().unwrap();
        deadline.check("the listener hears nothing");
    }
    let speakers: Vec<_> = [1_u8, 2]
        .into_iter()
        .map(|qos| {
            let (address, stop) = (address.clone(), stop.clone());
            let done = done[usize::from(qos) - 1].clone();
            thread::spawn(move || speak(&address, &stop, qos, &done))
        })
        .collect();
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..KILLS {
        let goal = done[0].load(Ordering::SeqCst) + random.usize(1..40);
        let deadline = Deadline::new();
        while done[0].load(Ordering::SeqCst) < goal {
            thread::yield_now();
            deadline.check("nothing is acknowledged any more");
        }
        server.kill();
        server = Server::start(&world);
        *address.lock().unwrap() = server.address;
    }
    stop.store(true, Ordering::SeqCst);
    for speaker in speakers {
        speaker.join().unwrap();
    }
    let mut client = Client::connect(server.address, "p");
    client.post("home/x", b"end", 1, false).unwrap();
    listener.join().unwrap();
    let counts = counts.lock().unwrap();
    for (qos, done) in [(1, &done[0]), (2, &done[1])] {
        let done = done.load(Ordering::SeqCst);
        assert!(done > KILLS, "{done}");
        for number in 0..done {
            let count = counts.get(&format!("{qos}-{number}")).copied().unwrap_or_default();
            assert!(count > 0, "QoS {qos}: {number} was acknowledged and never came");
            assert!(qos == 1 || count == 1, "QoS 2: {number} came {count} times");
        }
    }
}
