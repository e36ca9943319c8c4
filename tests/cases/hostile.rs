//! What must not kill, wedge or slow the broker for others. The first tests are named after what does kill
//! or wedge the stock rumqttd 0.20.

use mpypi_tests::{Client, Options, Server, World};

/// Runs `attack` against a fresh broker, then expects it to serve old and new clients as before.
#[track_caller]
fn survives(attack: impl FnOnce(&Server)) {
    let world = World::new();
    let mut server = Server::start(&world);
    let mut before = Client::connect(server.address, "before");
    before.subscribe("pulse", 1);
    attack(&server);
    assert!(server.is_running());
    let mut after = Client::connect(server.address, "after");
    assert!(after.retain("pulse", b"beat"));
    assert_eq!(before.message().unwrap().payload, b"beat");
    assert_eq!(after.retained("pulse").unwrap().payload, b"beat");
}

fn v5(id: &str) -> Vec<u8> {
    let mut packet =
        vec![0x10, 13 + u8::try_from(id.len()).unwrap(), 0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 0, 0, 0];
    packet.push(u8::try_from(id.len()).unwrap());
    packet.extend(id.as_bytes());
    packet
}

#[test]
fn a_topic_that_starts_with_a_letter_outside_ascii_is_served() {
    survives(|server| {
        let mut client = Client::connect(server.address, "é");
        client.subscribe("é/+", 1);
        assert!(client.retain("é/x", b"1"));
        assert_eq!(client.message().unwrap().topic, "é/x");
        let will = Options { will: Some(("é/will".to_owned(), "gone".to_owned())), ..Options::id("will") };
        drop(Client::try_connect(server.address, &will).unwrap());
        assert_eq!(client.message().unwrap().topic, "é/will");
    });
}

#[test]
fn properties_of_an_mqtt_5_message_do_not_reach_a_3_1_1_subscriber() {
    survives(|server| {
        let mut reader = Client::connect(server.address, "reader");
        reader.subscribe("t", 1);
        let mut writer = Client::open(server.address);
        writer.send(&v5("w"));
        // PUBLISH, QoS 0, topic `t`, with a content type and a user property.
        writer.send(&[
            0x30, 19, 0, 1, b't', 12, 3, 0, 2, b'a', b'b', 0x26, 0, 1, b'k', 0, 1, b'v', b'h', b'e', b'y',
        ]);
        assert_eq!(reader.message().unwrap().payload, b"hey");
    });
}

#[test]
fn client_ids_with_wildcards_and_slashes_connect_again_and_again() {
    survives(|server| {
        for id in ["a/b", "#", "+", "$SYS", "a b", "é/ü", &"x".repeat(1000)] {
            for _ in 0..3 {
                let mut client = Client::connect(server.address, id);
                client.ping();
            }
        }
    });
}

#[test]
fn a_reset_between_connect_and_connack_frees_the_client_id() {
    survives(|server| {
        for _ in 0..50 {
            let mut client = Client::open(server.address);
            client.send(&Client::connect_packet(&Options::id("abrupt")));
            client.reset();
        }
        Client::connect(server.address, "abrupt").ping();
    });
}

#[test]
fn two_hundred_queued_messages_and_then_disconnect() {
    survives(|server| {
        let mut client = Client::connect(server.address, "leaver");
        client.subscribe("flood", 1);
        for _ in 0..300 {
            client.post("flood", &[0; 100], 0, false).unwrap();
        }
        client.send(&[0xe0, 0]);
        drop(client);
    });
}

#[test]
fn an_idle_connection_keeps_nobody_out() {
    survives(|server| {
        let idle: Vec<_> = (0..20).map(|_| Client::open(server.address)).collect();
        Client::connect(server.address, "other").ping();
        drop(idle);
    });
}

#[test]
fn packets_that_only_a_broker_sends_end_that_connection_alone() {
    survives(|server| {
        for packet in [
            [0x20, 2, 0, 0],
            [0xb0, 2, 0, 1],
            [0x90, 2, 0, 1],
            [0xd0, 0, 0, 0],
            [0xf0, 0, 0, 0],
            [0, 0, 0, 0],
        ] {
            let mut client = Client::connect(server.address, "confused");
            client.send(&packet);
            assert!(client.is_closed());
            let mut client = Client::open(server.address);
            client.send(&v5("confused5"));
            client.send(&packet);
            let mut all = Vec::new();
            std::io::Read::read_to_end(&mut client.stream(), &mut all).unwrap();
            assert_eq!(all[0], 0x20, "a CONNACK, then a DISCONNECT");
        }
    });
}

#[test]
fn one_leaves_and_another_comes_a_thousand_times() {
    survives(|server| {
        for n in 0..1000 {
            let mut client = Client::connect(server.address, if n % 2 == 0 { "a" } else { "b" });
            client.send(&[0xe0, 0]);
        }
    });
}

#[test]
fn the_last_who_shares_a_subscription_leaves_with_messages_unacknowledged() {
    survives(|server| {
        let mut publisher = Client::connect(server.address, "publisher");
        for n in 0..20 {
            let mut member = Client::connect(server.address, &format!("member-{}", n % 3));
            assert_eq!(member.subscribe("$share/g/a", 1), 1);
            for _ in 0..5 {
                assert!(publisher.post("a", b"x", 1, false).is_some());
                assert!(publisher.acknowledged().is_some());
            }
            assert!(member.packet().is_some(), "a message that stays unacknowledged");
        }
    });
}

#[test]
fn filters_we_do_not_serve_are_refused_and_those_nobody_may_send_end_the_connection() {
    survives(|server| {
        let mut client = Client::connect(server.address, "client");
        for filter in ["$share/g", "$share//a", "$share/g+/a", "a/\u{1}"] {
            assert_eq!(client.subscribe(filter, 1), 0x80, "{filter}");
        }
        for filter in ["a/#/b", "a#", "+a", "", "a/b+", "$share/g/a#"] {
            let mut client = Client::connect(server.address, "wrong");
            let length = u8::try_from(filter.len()).unwrap();
            client.send(&[&[0x82, length + 5, 0, 1, 0, length], filter.as_bytes(), &[1]].concat());
            assert!(client.is_closed(), "[MQTT-4.8.0-1]: {filter}");
        }
        assert_eq!(client.subscribe("good/#", 1), 1);
        for topic in ["a/#", "a/+", "$SYS/x", "mpypi/channels/no such"] {
            let mut client = Client::connect(server.address, "publisher");
            assert!(!client.retain(topic, b"x"), "{topic}");
        }
    });
}

#[test]
fn a_million_bytes_of_noise_on_every_stage_of_a_connection() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    survives(|server| {
        for round in 0..400 {
            let mut client = Client::open(server.address);
            if round % 2 == 0 {
                client.send(&Client::connect_packet(&Options::id("noise")));
            } else if round % 3 == 0 {
                client.send(&v5("noise"));
            }
            let mut noise: Vec<u8> = (0..2500).map(|_| random.u8(..)).collect();
            // Mostly packets of real types, with wrong insides.
            for start in (0..noise.len() - 8).step_by(8) {
                noise[start] =
                    [0x30, 0x32, 0x34, 0x82, 0xa2, 0x62, 0x40, 0xe0, 0xc0, 0x3b][random.usize(..10)];
                noise[start + 1] = 6;
            }
            client.try_send(&noise).ok(); // it may have been thrown out before the end
        }
    });
}

#[test]
fn a_packet_over_the_limit_is_refused_before_it_is_held() {
    survives(|server| {
        let mut client = Client::connect(server.address, "large");
        client.send(&[0x32, 0xff, 0xff, 0xff, 0x7f]);
        assert!(client.is_closed());
        let mut stranger = Client::open(server.address);
        stranger.send(&[0x10, 0xff, 0xff, 0xff, 0x7f]);
        assert!(stranger.is_closed());
    });
}

#[test]
fn a_reader_that_reads_nothing_holds_up_nobody_and_gets_everything_later() {
    survives(|server| {
        let mut stuck = Client::connect(server.address, "stuck");
        stuck.subscribe("data/#", 0);
        let mut quick = Client::connect(server.address, "quick");
        quick.subscribe("data/#", 0);
        let mut writer = Client::connect(server.address, "writer");
        for n in 0..1500 {
            assert!(writer.retain(&format!("data/{n}"), &[n as u8; 20_000]));
        }
        // Retained messages are not lost by a full queue: they are read from the index, some perhaps twice.
        for reader in [&mut quick, &mut stuck] {
            let mut topics = std::collections::BTreeSet::new();
            while topics.len() < 1500 {
                topics.insert(reader.message().unwrap().topic);
            }
        }
    });
}

#[test]
fn a_subscribe_of_a_million_filters_is_refused_before_it_is_held() {
    survives(|server| {
        for first in [0x82, 0xa2, 0x10, 0xe0] {
            let mut client = Client::connect(server.address, "storm");
            client.send(&[first, 0xff, 0xff, 0xff, 0x03]); // 8 MiB
            assert!(client.is_closed(), "{first:#x}");
        }
        let mut client = Client::connect(server.address, "storm");
        let mut filters = vec![0x82, 0, 0, 0, 0, 1];
        (0..2000).for_each(|_| filters.extend([0, 1, b'a', 0]));
        let length = filters.len() - 4;
        filters.splice(1..4, [(length & 0x7f) as u8 | 0x80, (length >> 7) as u8 & 0x7f]);
        client.send(&filters);
        assert!(client.is_closed());
    });
}

#[test]
fn a_live_message_too_large_to_wait_in_memory_is_refused_and_a_retained_one_passes() {
    survives(|server| {
        let large = vec![7; 2 * 1024 * 1024];
        let mut client = Client::connect(server.address, "large");
        client.post("large", &large, 1, false).unwrap();
        assert!(client.is_closed());
        let mut client = Client::connect(server.address, "large");
        assert!(client.retain("large", &large));
    });
}

#[test]
fn a_client_id_beyond_the_limit_is_refused_with_a_code() {
    survives(|server| {
        let (_, code) = Client::try_connect(server.address, &Options::id(&"x".repeat(1025))).unwrap();
        assert_eq!(code, 2);
    });
}

#[test]
fn what_a_stranger_sends_makes_no_line_of_its_own_in_the_log() {
    survives(|server| {
        let mut client = Client::connect(server.address, "id\n2026 ERROR forged id");
        client.post("topic\n2026 ERROR forged topic", b"", 1, true).unwrap();
        assert!(client.is_closed());
        let mut client = Client::open(server.address);
        client.send(b"\x10\x16\0\x10x\n2026 ERROR nam\x04\x02\0\0");
        let log = server.log();
        assert!(log.contains("forged topic"), "{log}");
        assert!(log.lines().all(|line| !line.starts_with("2026 ERROR")), "{log}");
    });
}

#[cfg(target_os = "linux")]
#[test]
fn answers_that_nobody_reads_hold_little_memory() {
    let resident = |server: &Server| -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    survives(|server| {
        let before = resident(server);
        let mut all: Vec<_> = (0..8).map(|n| Client::connect(server.address, &n.to_string())).collect();
        let pings = [0xc0, 0].repeat(32 * 1024);
        for client in &mut all {
            client.stream().set_write_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
            // Until nothing more is taken, or far more than the sockets hold.
            for _ in 0..400 {
                if client.try_send(&pings).is_err() {
                    break;
                }
            }
        }
        let grown = resident(server).saturating_sub(before);
        assert!(grown < 16 * 1024, "{grown} KiB for 8 clients");
    });
}

#[test]
fn large_packets_that_never_come_make_room_for_one_that_does() {
    survives(|server| {
        // More than may be received at once, announced and not sent.
        let stuck: Vec<_> = (0..20)
            .map(|n| {
                let mut client = Client::connect(server.address, &n.to_string());
                client.send(&[0x30, 0xf0, 0xff, 0xff, 0x07, 0, 1, b'x']);
                client
            })
            .collect();
        let mut client = Client::connect(server.address, "honest");
        assert!(client.retain("large", &[7; 300_000]));
        drop(stuck);
    });
}
