//! What clients of the broker get: mosquitto's, an outsider's codec, and bytes by hand.

use mpypi_protocol::Digest;
use mpypi_tests::{Client, Options, Server, World, run};

fn wheel_topic(payload: &[u8]) -> String {
    format!("mpypi/packages/wheel/{}", Digest::of(payload))
}

/// Bytes that no text tool leaves alone, `size` of them.
fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..size).map(|_| random.u8(..)).collect()
}

#[test]
fn mosquitto_sub_reads_the_list_and_every_package_byte_for_byte() {
    let world = World::new();
    let server = Server::start(&world);
    let mut publisher = Client::connect(server.address, "publisher");
    // Empty ones cannot be; one for each way a payload is kept, and one byte around it.
    let packages: Vec<_> = [1, 100, 16 * 1024, 16 * 1024 + 1, 64 * 1024, 64 * 1024 + 1, 3_000_000]
        .iter()
        .map(|size| noise(*size, *size as u64))
        .collect();
    for package in &packages {
        assert!(publisher.retain(&wheel_topic(package), package));
    }
    let entries: Vec<_> = packages
        .iter()
        .enumerate()
        .map(|(n, package)| {
            format!(
                r#"{{"type":"wheel","name":"p{n}","version":"1","pkg_sha256":"{}"}}"#,
                Digest::of(package)
            )
        })
        .collect();
    let list = format!("[{}]", entries.join(","));
    assert!(publisher.retain("mpypi/channels/dev", list.as_bytes()));

    for version in ["mqttv5", "mqttv311"] {
        for qos in ["0", "1"] {
            let read = |topic: &str| {
                let arguments = [
                    "-V",
                    version,
                    "-q",
                    qos,
                    "-p",
                    &server.port(),
                    "-t",
                    topic,
                    "-C",
                    "1",
                    "-W",
                    "30",
                    "-F",
                    "%r %q %x",
                ];
                run("mosquitto_sub", &arguments).expect_code(0).stdout
            };
            let expected = |payload: &[u8]| {
                let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("1 {qos} {hex}\n")
            };
            assert!(read("mpypi/channels/dev") == expected(list.as_bytes()), "{version} {qos}: the list");
            for package in &packages {
                assert!(
                    read(&wheel_topic(package)) == expected(package),
                    "{version} {qos}: {}",
                    package.len()
                );
            }
        }
    }
}

#[test]
fn a_package_with_a_wrong_digest_is_refused_and_changes_nothing() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "reader");
    let package = noise(100, 1);
    let topic = wheel_topic(&package);
    for version in ["mqttv311", "mqttv5"] {
        for qos in ["0", "1", "2"] {
            run(
                "mosquitto_pub",
                &["-V", version, "-q", qos, "-p", &server.port(), "-r", "-t", &topic, "-m", "other"],
            );
            assert_eq!(client.retained(&topic), None, "{version} {qos}");
        }
    }
    let refused = run(
        "mosquitto_pub",
        &["-V", "mqttv5", "-q", "1", "-p", &server.port(), "-r", "-t", &topic, "-m", "other"],
    );
    assert!(refused.stderr.contains("Payload format invalid"), "{}", refused.stderr);
    assert!(client.retain(&topic, &package));
    run("mosquitto_pub", &["-q", "1", "-p", &server.port(), "-r", "-t", &topic, "-m", "other"]);
    assert_eq!(client.retained(&topic).unwrap().payload, package);
}

#[test]
fn a_list_that_is_older_broken_or_names_a_missing_package_is_refused_and_changes_nothing() {
    let world = World::new();
    let server = Server::start(&world);
    let mut reader = Client::connect(server.address, "reader");
    let release = |n: u32, more: &str| {
        format!(r#"[{{"type":"release","channel":"dev","sequence":{n},"version":"{n}"}}{more}]"#)
    };
    let missing = format!(r#",{{"type":"src","path":"main.py","pkg_sha256":"{}"}}"#, Digest::of(b"x"));
    assert!(reader.retain("mpypi/channels/dev", release(5, "").as_bytes()));
    for list in [
        release(4, ""),
        release(5, r#",{"type":"new"}"#),
        release(6, &missing),
        "[]".to_owned(),
        "{}".to_owned(),
        "[".to_owned(),
        String::new(),
    ] {
        let mut publisher = Client::connect(server.address, "publisher");
        assert!(!publisher.retain("mpypi/channels/dev", list.as_bytes()), "{list}");
        let kept = reader.retained("mpypi/channels/dev").unwrap().payload;
        assert_eq!(kept, release(5, "").into_bytes(), "{list}");
    }
    let mut publisher = Client::connect(server.address, "publisher");
    assert!(publisher.retain("mpypi/channels/dev", release(5, "").as_bytes()), "the same again is fine");
    assert!(publisher.retain(
        "mpypi/packages/src/main.py/2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
        b"x"
    ));
    assert!(publisher.retain("mpypi/channels/dev", release(6, &missing).as_bytes()));
    let topic = "mpypi/packages/src/main.py/2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881";
    assert!(!publisher.retain(topic, b""), "a package that a list names stays");
    assert!(reader.retained(topic).is_some());
}

#[test]
fn a_channel_that_nobody_published_has_an_empty_list() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "device");
    let list = client.retained("mpypi/channels/never").unwrap();
    assert_eq!((list.payload.as_slice(), list.retain), (&b"[]"[..], true));
    client.subscribe("mpypi/channels/+", 0);
    client.fence();
    assert_eq!(client.retained("mpypi/channels/no such"), None);
}

#[test]
fn a_thousand_retained_packages_are_all_replayed_under_one_wildcard() {
    let world = World::new();
    let server = Server::start(&world);
    let mut publisher = Client::connect(server.address, "publisher");
    let mut topics: Vec<_> = (0..1000_u64)
        .map(|n| {
            let package = noise(if n % 10 == 0 { 20_000 } else { 200 }, n);
            let topic = wheel_topic(&package);
            publisher.post(&topic, &package, 1, true).unwrap();
            if n >= 50 {
                publisher.acknowledged().unwrap();
            }
            topic
        })
        .collect();
    (0..50).for_each(|_| assert!(publisher.acknowledged().is_some()));
    topics.sort();
    for (filter, qos) in
        [("mpypi/packages/#", 1), ("mpypi/packages/wheel/+", 0), ("#", 1), ("+/packages/+/+", 0)]
    {
        let mut reader = Client::connect(server.address, "reader");
        reader.subscribe(filter, qos);
        let mut seen: Vec<_> = (0..1000).map(|_| reader.message().unwrap()).collect();
        assert!(seen.iter().all(|m| m.retain && wheel_topic(&m.payload) == m.topic), "{filter}");
        seen.sort_by(|a, b| a.topic.cmp(&b.topic));
        assert!(seen.iter().map(|message| &message.topic).eq(&topics), "{filter}");
    }
}

#[test]
fn owners_ids_of_packages_lead_to_the_present_ones() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "old");
    let (wheel, file) = (noise(50, 1), noise(60, 2));
    assert!(client.retain(&wheel_topic(&wheel), &wheel));
    assert!(client.retain(&format!("mpypi/packages/src/lib/a.py/{}", Digest::of(&file)), &file));
    let list = format!(r#"[{{"type":"src","path":"lib/a.py","pkg_sha256":"{}"}}]"#, Digest::of(&file));
    assert!(client.retain("mpypi/channels/dev", list.as_bytes()));
    let by_digest = client.retained(&format!("mpypi/packages/{}", Digest::of(&wheel))).unwrap();
    assert_eq!(by_digest.payload, wheel);
    assert_eq!(client.retained("mpypi/packages/lib/a.py").unwrap().payload, file);
    assert_eq!(client.retained("mpypi/packages/lib/b.py"), None);
}

#[test]
fn live_messages_reach_each_subscriber_once_at_the_right_qos_and_without_the_retain_flag() {
    let world = World::new();
    let server = Server::start(&world);
    let mut reader = Client::connect(server.address, "reader");
    reader.subscribe("a/#", 0);
    assert_eq!(reader.subscribe("a/+", 2), 2);
    let mut publisher = Client::connect(server.address, "publisher");
    assert!(publisher.retain("a/b", b"kept"));
    publisher.post("a/b", b"live", 0, false).unwrap();
    let received = [reader.message().unwrap(), reader.message().unwrap()];
    assert_eq!(
        (received[0].payload.as_slice(), received[0].qos, received[0].retain),
        (&b"kept"[..], 1, false)
    );
    assert_eq!(
        (received[1].payload.as_slice(), received[1].qos, received[1].retain),
        (&b"live"[..], 0, false)
    );
    reader.unsubscribe("a/#");
    reader.unsubscribe("a/+");
    assert!(publisher.retain("a/b", b"later"));
    reader.fence();
    assert_eq!(reader.retained("a/b").unwrap().payload, b"later", "and nothing came in between");
}

#[test]
fn a_will_is_published_when_its_client_is_lost_or_replaced_but_not_when_it_leaves() {
    let world = World::new();
    let server = Server::start(&world);
    let mut reader = Client::connect(server.address, "reader");
    reader.subscribe("mpypi/nodes/+/online", 1);
    let with_will = |id: &str| {
        let topic = format!("mpypi/nodes/{id}/online");
        let options = Options { will: Some((topic, "0".to_owned())), ..Options::id(id) };
        Client::try_connect(server.address, &options).unwrap().0
    };
    with_will("lost").reset();
    assert_eq!(reader.message().unwrap().topic, "mpypi/nodes/lost/online");
    let mut first = with_will("twice");
    let mut second = with_will("twice");
    assert!(first.is_closed());
    assert_eq!(reader.message().unwrap().topic, "mpypi/nodes/twice/online");
    second.ping();
    let mut leaving = with_will("leaving");
    leaving.send(&[0xe0, 0]);
    assert!(leaving.is_closed());
    assert_eq!(reader.retained("mpypi/nodes/leaving/online"), None);
    assert_eq!(reader.retained("mpypi/nodes/lost/online").unwrap().payload, b"0");
}

#[test]
fn what_a_client_published_is_there_when_its_goodbye_is_answered() {
    let world = World::new();
    let server = Server::start(&world);
    let mut reader = Client::connect(server.address, "reader");
    for n in 0..50 {
        let mut leaving = Client::connect(server.address, "leaving");
        leaving.post("last/word", n.to_string().as_bytes(), 0, true).unwrap();
        leaving.send(&[0xe0, 0]);
        assert!(leaving.is_closed());
        assert_eq!(reader.retained("last/word").unwrap().payload, n.to_string().as_bytes());
    }
}

#[test]
fn keep_alive_zero_lives_and_a_silent_client_with_a_keep_alive_is_lost() {
    let world = World::new();
    let server = Server::start(&world);
    let mut forever = Client::connect(server.address, "forever");
    let options = Options { keep_alive: 1, ..Options::id("silent") };
    let mut silent = Client::try_connect(server.address, &options).unwrap().0;
    assert!(silent.is_closed());
    forever.ping();
}

#[test]
fn a_qos_2_message_sent_twice_is_delivered_once() {
    let world = World::new();
    let server = Server::start(&world);
    let mut reader = Client::connect(server.address, "reader");
    reader.subscribe("once", 1);
    let mut publisher = Client::open(server.address);
    publisher.send(&Client::connect_packet(&Options::id("publisher")));
    let publish = |first: u8| [&[first, 9, 0, 4], &b"once"[..], &[0, 7, b'!']].concat();
    publisher.packet(); // CONNACK
    publisher.send(&publish(0x34));
    publisher.packet(); // PUBREC
    publisher.send(&publish(0x3c));
    publisher.packet(); // PUBREC again
    publisher.send(&[0x62, 2, 0, 7]);
    publisher.packet(); // PUBCOMP
    publisher.post("once", b"end", 0, false).unwrap();
    assert_eq!(reader.message().unwrap().payload, b"!");
    assert_eq!(reader.message().unwrap().payload, b"end");
}

#[test]
fn a_retained_message_with_an_expiry_vanishes_but_a_list_must_not_have_one_and_keeps_its_packages() {
    let world = World::new();
    let server = Server::start(&world);
    let port = server.port();
    let publish = |topic: &str, message: &str| {
        let expiry = ["-D", "publish", "message-expiry-interval", "1"];
        let arguments = ["-V", "mqttv5", "-q", "1", "-p", &port, "-r", "-t", topic, "-m", message];
        run("mosquitto_pub", &[&arguments[..], &expiry[..]].concat()).stderr
    };
    assert_eq!(publish("soon/gone", "x"), "");
    let mut reader = Client::connect(server.address, "reader");
    while reader.retained("soon/gone").is_some() {}
    assert!(publish("mpypi/channels/dev", r#"[{"type":"new"}]"#).contains("Implementation specific error"));
    assert_eq!(reader.retained("mpypi/channels/dev").unwrap().payload, b"[]");
    // As Mpy-BLOX's own tools publish: a package with an expiry. Named by a list, it stays.
    let digest = Digest::of(b"x");
    let list = format!(r#"[{{"type":"wheel","name":"x","version":"1","pkg_sha256":"{digest}"}}]"#);
    assert_eq!(publish(&wheel_topic(b"x"), "x"), "");
    assert!(reader.retain("mpypi/channels/dev", list.as_bytes()));
    assert_eq!(publish("soon/gone", "x"), "");
    while reader.retained("soon/gone").is_some() {}
    assert_eq!(reader.retained(&wheel_topic(b"x")).unwrap().payload, b"x");
}

#[test]
fn whoever_subscribes_while_a_topic_changes_never_sees_an_older_value_after_a_newer_one() {
    const TOPICS: usize = 4;
    const VALUES: usize = 1500;
    let world = World::new();
    let server = Server::start(&world);
    let mut writer = Client::connect(server.address, "writer");
    let address = server.address;
    let readers: Vec<_> = (0..4)
        .map(|n| {
            std::thread::spawn(move || {
                let mut finished = 0;
                let mut reader = Client::connect(address, &format!("reader-{n}"));
                let mut seen = [0; TOPICS];
                let mut messages = 0;
                reader.subscribe(if n % 2 == 0 { "race/+" } else { "#" }, 0);
                // Subscribing again replays again, in the middle of live messages.
                while finished < TOPICS {
                    let message = reader.message().unwrap();
                    let topic: usize = message.topic.rsplit('/').next().unwrap().parse().unwrap();
                    let value: usize = String::from_utf8(message.payload).unwrap().parse().unwrap();
                    assert!(value >= seen[topic], "{value} after {}", seen[topic]);
                    finished += usize::from(value == VALUES && seen[topic] < VALUES);
                    seen[topic] = value;
                    messages += 1;
                    if messages % 20 == 0 {
                        reader.subscribe(if n % 2 == 0 { "race/+" } else { "#" }, 0);
                    }
                }
            })
        })
        .collect();
    for value in 1..=VALUES {
        for topic in 0..TOPICS {
            writer.post(&format!("race/{topic}"), value.to_string().as_bytes(), 1, true).unwrap();
        }
        if value > 10 {
            (0..TOPICS).for_each(|_| assert!(writer.acknowledged().is_some()));
        }
    }
    (0..10 * TOPICS).for_each(|_| assert!(writer.acknowledged().is_some()));
    for reader in readers {
        reader.join().unwrap();
    }
}

#[test]
fn a_topic_that_names_a_digest_in_an_earlier_layout_takes_only_those_bytes() {
    let world = World::new();
    let server = Server::start(&world);
    let mut reader = Client::connect(server.address, "reader");
    let topic = format!("mpypi/packages/{}", Digest::of(b"right"));
    assert!(!Client::connect(server.address, "a").retain(&topic, b"wrong"));
    assert_eq!(reader.retained(&topic), None);
    assert!(Client::connect(server.address, "b").retain(&topic, b"right"));
    assert_eq!(reader.retained(&topic).unwrap().payload, b"right");
}

#[test]
fn a_will_that_could_not_be_published_is_refused_at_once() {
    let world = World::new();
    let server = Server::start(&world);
    let connect = |topic: &str, message: &str| {
        let will = Some((topic.to_owned(), message.to_owned()));
        Client::try_connect(server.address, &Options { will, ..Options::id("will") })
    };
    for (topic, message) in [("$SYS/x", "x"), ("mpypi/channels/dev", "{}"), (&wheel_topic(b"right"), "wrong")]
    {
        let (_, code) = connect(topic, message).unwrap();
        assert_ne!(code, 0, "{topic}");
    }
    for topic in ["a/#", ""] {
        assert!(connect(topic, "x").is_none(), "[MQTT-3.1.4-1]: {topic}");
    }
}

#[test]
fn both_signals_stop_the_broker_cleanly_and_tell_mqtt_5_clients_why() {
    for signal in ["-INT", "-TERM"] {
        let world = World::new();
        let server = Server::start(&world);
        let mut client = Client::connect(server.address, "old");
        let mut modern = Client::open(server.address);
        modern.send(&[0x10, 16, 0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 0, 0, 0, 3, b'n', b'e', b'w']);
        let mut byte = [0; 1024];
        let connack = std::io::Read::read(&mut modern.stream(), &mut byte).unwrap();
        assert_eq!((connack > 4, byte[0], byte[3]), (true, 0x20, 0));
        assert_eq!(server.stop(signal), Some(0));
        assert!(client.is_closed());
        let farewell = std::io::Read::read(&mut modern.stream(), &mut byte).unwrap();
        assert_eq!((farewell > 2, byte[0], byte[2]), (true, 0xe0, 0x8b), "{signal}");
    }
}

#[test]
fn a_taken_address_or_folder_is_an_error_with_a_hint() {
    let world = World::new();
    let server = Server::start(&world);
    let address = server.address.to_string();
    let other = world.path("other");
    let taken = run("mpypi-broker", &["serve", "--listen", &address, "--data", other.to_str().unwrap()])
        .expect_code(1);
    assert!(taken.stderr.contains("hint: is a broker running already?"), "{}", taken.stderr);
    let data = world.path("data");
    let used = run("mpypi-broker", &["serve", "--listen", "127.0.0.1:0", "--data", data.to_str().unwrap()])
        .expect_code(1);
    assert!(used.stderr.contains("in use by another broker"), "{}", used.stderr);
    let open = run("mpypi-broker", &["serve", "--listen", "0.0.0.0:0", "--data", other.to_str().unwrap()])
        .expect_code(1);
    assert!(open.stderr.contains("--unsafe-open"), "{}", open.stderr);
}
