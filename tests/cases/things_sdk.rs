//! Clients that others wrote for ThingsBoard, unmodified: its SDK for Python by MQTT and HTTP, and MicroPython's.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use mpypi_protocol::node::{Phase, State};
use mpypi_tests::{Client, Output, Proxy, Running, Server, Verdict, World, run_with};
use serde_json::json;

use crate::things::{broker_with_device, image, parsed, publish};

fn script(name: &str) -> String {
    format!("{}/things/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn sdk(world: &World, way: &str, address: &str, token: &str, chunk: &str, more: &[&str]) -> Output {
    std::fs::create_dir_all(world.path("board")).unwrap();
    let (script, board) = (script("sdk.py"), world.text("board"));
    let mut arguments = vec![&*script, way, address, token, chunk, &board];
    arguments.extend(more);
    run_with("python/bin/python", &arguments, &[])
}

fn state(server: &Server) -> State {
    let mut client = Client::connect(server.address, "looks");
    parsed(&mut client, "mpypi/nodes/kitchen/state", |bytes| State::parse(bytes).unwrap())
}

#[test]
fn thingsboards_sdk_updates_by_mqtt_and_by_http_whole_and_in_pieces() {
    let updates = |way: &str, chunk: &str| {
        let world = World::new();
        let (server, token) = broker_with_device(&world, &[]);
        let bytes = image(1, 100_000);
        publish(&world, &server, "1.10", &bytes);
        let address = if way == "http" { server.http.unwrap() } else { server.address };
        let done = sdk(&world, way, &address.to_string(), &token, chunk, &[]).expect_code(0).json();
        let states = done["states"].as_array().unwrap();
        assert_eq!(states.last(), Some(&json!("UPDATED")), "{way} {chunk}: {states:?}");
        assert!(world.files("board")["dev"] == bytes, "{way} {chunk}: byte for byte");
        let state = state(&server);
        assert_eq!((state.phase, state.sequence), (Phase::Idle, Some(1)), "{way} {chunk}");
    };
    std::thread::scope(|scope| {
        for (way, chunk) in [("mqtt", "0"), ("mqtt", "4096"), ("http", "0"), ("http", "4096")] {
            scope.spawn(move || updates(way, chunk));
        }
    });
}

/// A line on which so many pieces of firmware come garbled.
fn garbling(server: &Server, pieces: usize) -> (Proxy, Arc<AtomicUsize>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    let line = Proxy::start(server.address, move |is_client, packet| {
        let is_piece = !is_client && packet.windows(15).any(|name| name == b"v2/fw/response/");
        if !is_piece || count.fetch_add(1, Ordering::SeqCst) >= pieces {
            return Verdict::Pass;
        }
        let mut garbled = packet.to_vec();
        *garbled.last_mut().unwrap() ^= 1;
        Verdict::Replace(garbled)
    });
    (line, seen)
}

#[test]
fn thingsboards_sdk_recovers_from_a_garbled_piece() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    let bytes = image(1, 20_000);
    publish(&world, &server, "2", &bytes);
    let (line, _) = garbling(&server, 1);
    let address = line.address.to_string();
    let done = sdk(&world, "mqtt", &address, &token, "4096", &[]).expect_code(0).json();
    let states: Vec<_> =
        done["states"].as_array().unwrap().iter().filter_map(|state| state.as_str()).collect();
    let mut expected = vec!["IDLE", "DOWNLOADING", "DOWNLOADED", "FAILED"];
    expected.extend(["DOWNLOADING", "DOWNLOADED", "VERIFIED", "UPDATING", "UPDATED"]);
    assert_eq!(states, expected);
    assert!(world.files("board")["dev"] == bytes);
    assert_eq!((state(&server).phase, state(&server).version.as_deref()), (Phase::Idle, Some("2")));
}

#[test]
fn a_checksum_that_is_always_wrong_is_a_failure_and_nothing_more() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &["--checksum", "murmur3_128"]);
    publish(&world, &server, "2", &image(1, 20_000));
    let (line, seen) = garbling(&server, usize::MAX);
    let address = line.address.to_string();
    let mut client = Client::connect(server.address, "looks");
    client.subscribe("mpypi/nodes/kitchen/state", 1);
    sdk(&world, "mqtt", &address, &token, "4096", &["--failures", "2"]).expect_code(0);
    assert!(!world.path("board/dev").exists());
    client.fence();
    let mut states = Vec::new();
    while client.waits() {
        states.push(State::parse(&client.message().unwrap().payload).unwrap());
    }
    let failed = states.iter().filter(|state| state.phase == Phase::Failed);
    assert!(failed.clone().count() >= 2);
    for state in failed {
        assert_eq!(state.error.as_deref(), Some("device: Checksum verification failed!"));
    }
    // It is sent a piece for each that it asks for, and nothing beyond.
    let tries = states.iter().map(|state| state.attempt).max().unwrap();
    assert!(seen.load(Ordering::SeqCst) <= 5 * tries as usize, "{tries}");
}

#[test]
fn a_micropython_board_with_anothers_client_reads_and_is_told() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    publish(&world, &server, "1.9", &image(1, 5000));
    let peers = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/peers/things");
    let arguments = [&*script("board.py"), &server.port(), &token];
    let board = Running::start_with("micropython", &arguments, &[("MICROPYPATH", peers)]);
    // Once it listens, it is told of the next release.
    let mut client = Client::connect(server.address, "looks");
    let deadline = mpypi_tests::Deadline::new();
    while !client
        .retained("mpypi/nodes/kitchen/info")
        .is_some_and(|info| String::from_utf8_lossy(&info.payload).contains("listens"))
    {
        deadline.check("the board listens");
    }
    publish(&world, &server, "1.10", &image(2, 5000));
    let said = board.wait().expect_code(0).stdout;
    let (read, told) = said.split_once('\n').unwrap();
    let read: serde_json::Value = serde_json::from_str(read).unwrap();
    assert_eq!(read["client"], json!({"fw_version": "1.10"}));
    assert_eq!(read["shared"]["fw_size"], 5000);
    assert_eq!(told.trim(), "1.10");
}
