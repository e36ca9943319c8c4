//! Devices that speak ThingsBoard's API: what they are told, what they fetch, and what they are in the index.

use mpypi_protocol::{
    Digest,
    node::{Info, Phase, State},
};
use mpypi_tests::{Client, Deadline, Options, Received, Server, World, run};
use serde_json::{Value, json};

const ATTRIBUTES: &str = "v1/devices/me/attributes";
const TELEMETRY: &str = "v1/devices/me/telemetry";

/// A broker with one device on channel `dev`, and its token.
pub(crate) fn broker_with_device(world: &World, more: &[&str]) -> (Server, String) {
    let token = add_device(world, "kitchen", more);
    (Server::start_with(world, &["--http", "127.0.0.1:0"]), token)
}

pub(crate) fn add_device(world: &World, node: &str, more: &[&str]) -> String {
    let data = world.text("data");
    let mut arguments = vec!["device", "add", node, "--channel", "dev", "--data", &data];
    arguments.extend(more);
    run("mpypi-broker", &arguments).expect_code(0).stdout.trim().to_owned()
}

/// Publishes this image as a release of channel `dev`.
pub(crate) fn publish(world: &World, server: &Server, version: &str, image: &[u8]) {
    world.write("dev/channel.toml", format!("version = \"{version}\"\n"));
    world.write("dev/firmware/thing.bin", image);
    run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
}

/// Bytes that are like no others.
pub(crate) fn image(seed: u64, size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..size).map(|_| random.u8(..)).collect()
}

/// A device's connection.
struct Thing(Client);

impl Thing {
    fn options(token: &str) -> Options {
        // No client id, no password.
        Options { login: Some((token.to_owned(), String::new())), ..Options::id("") }
    }

    #[track_caller]
    fn connect(server: &Server, token: &str) -> Thing {
        let (client, code) = Client::try_connect(server.address, &Thing::options(token)).expect("a CONNACK");
        assert_eq!(code, 0, "CONNACK");
        Thing(client)
    }

    /// Publishes at QoS 1 and returns when the broker has it.
    #[track_caller]
    fn say(&mut self, topic: &str, payload: &Value) {
        let id = self.0.post(topic, payload.to_string().as_bytes(), 1, false);
        assert_eq!(self.0.acknowledged(), id);
    }

    #[track_caller]
    fn ask(&mut self, topic: &str, payload: &str) -> Received {
        self.0.post(topic, payload.as_bytes(), 0, false).expect("a connection");
        self.0.message().expect("an answer")
    }

    #[track_caller]
    fn attributes(&mut self, keys: &Value) -> Value {
        let answer = self.ask(&format!("{ATTRIBUTES}/request/7"), &keys.to_string());
        assert_eq!(answer.topic, format!("{ATTRIBUTES}/response/7"));
        serde_json::from_slice(&answer.payload).unwrap()
    }

    #[track_caller]
    fn chunk(&mut self, download: u64, index: u64, size: &str) -> Vec<u8> {
        let answer = self.ask(&format!("v2/fw/request/{download}/chunk/{index}"), size);
        assert_eq!(answer.topic, format!("v2/fw/response/{download}/chunk/{index}"));
        answer.payload
    }
}

/// Waits until a node is said to be there, or not.
fn wait_online(client: &mut Client, node: &str, online: &[u8]) {
    let deadline = Deadline::new();
    let topic = format!("mpypi/nodes/{node}/online");
    while client.retained(&topic).is_none_or(|message| message.payload != online) {
        deadline.check("the node is not said to be there, or gone");
    }
}

pub(crate) fn parsed<T>(client: &mut Client, topic: &str, parse: impl Fn(&[u8]) -> T) -> T {
    parse(&client.retained(topic).expect("a retained message").payload)
}

#[test]
fn a_device_reads_what_it_is_to_have_and_hears_of_a_new_release() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    let mut thing = Thing::connect(&server, &token);
    assert_eq!(thing.attributes(&json!({})), json!({}), "nothing was published");
    for filter in [ATTRIBUTES, "v1/devices/me/attributes/response/+", "v2/fw/response/+"] {
        assert_eq!(thing.0.subscribe(filter, 2), 1, "{filter}");
    }
    let first = image(1, 100_000);
    publish(&world, &server, "1.10", &first);
    let told = thing.0.message().unwrap();
    assert_eq!(told.topic, ATTRIBUTES);
    let expected = json!({
        "fw_title": "dev", "fw_version": "1.10", "fw_tag": "dev 1.10", "fw_size": 100_000,
        "fw_checksum_algorithm": "SHA256", "fw_checksum": Digest::of(&first).to_string(),
    });
    assert_eq!(serde_json::from_slice::<Value>(&told.payload).unwrap(), expected);
    let read =
        thing.attributes(&json!({"sharedKeys": "fw_title,fw_version,fw_url", "clientKeys": "fw_title"}));
    assert_eq!(read, json!({"shared": {"fw_title": "dev", "fw_version": "1.10"}}));
    assert_eq!(thing.attributes(&json!({"clientKeys": "fw_title"})), json!({}));
    assert_eq!(thing.attributes(&Value::Object(Default::default())), json!({"shared": expected}));
}

#[test]
fn an_image_comes_in_pieces_and_a_download_ends_with_what_it_began_with() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    let (old, new) = (image(1, 300_000), image(2, 10_000));
    publish(&world, &server, "1", &old);
    let mut thing = Thing::connect(&server, &token);
    // Nothing of it is subscribed to.
    let mut fetched = thing.chunk(1, 0, "16384");
    publish(&world, &server, "2", &new);
    for index in 1.. {
        match thing.chunk(1, index, "") {
            piece if piece.is_empty() => break,
            piece => fetched.extend(piece),
        }
    }
    assert!(fetched == old, "byte for byte what the download began with");
    assert!(thing.chunk(2, 0, "") == new, "all at once, if no size was ever said");
    assert_eq!(thing.chunk(2, 1, ""), b"");
    assert_eq!(thing.chunk(2, u64::MAX, "4096"), b"");
    // Pieces across the borders of what is read from disk at a time.
    let piece = thing.chunk(1, 2, "100001");
    assert!(piece == old[200_002..]);
}

#[test]
fn a_device_that_gets_no_package_hears_why_and_is_sent_away() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    let error = |size: &str| {
        let mut thing = Thing::connect(&server, &token);
        let answer = thing.ask("v2/fw/request/1/chunk/0", size);
        assert_eq!(answer.topic, "v2/fw/error");
        assert!(thing.0.is_closed());
        String::from_utf8(answer.payload).unwrap()
    };
    assert_eq!(error("4096"), "NOT_FOUND");
    world.write("dev/src/main.py", "print(1)\n");
    run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
    assert_eq!(error("4096"), "FAILURE");
    publish(&world, &server, "3", &image(3, 5000));
    assert_eq!(error("99999999999"), "PAYLOAD_TOO_LARGE");
}

#[test]
fn a_token_of_nobody_is_refused_and_one_that_changes_ends_its_connection() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    let code = |token: &str| Client::try_connect(server.address, &Thing::options(token)).unwrap().1;
    assert_eq!(code("not-a-token-of-anybody"), 4);
    assert_eq!(code(&token.to_uppercase()), 4);
    // MQTT 5, with the token as user name and no password.
    let mut client = Client::open(server.address);
    client.send(b"\x10\x16\x00\x04MQTT\x05\x82\x00\x00\x00\x00\x00\x00\x07unknown");
    let mut connack = [0; 4];
    std::io::Read::read_exact(&mut client.stream(), &mut connack).unwrap();
    assert_eq!((connack[0], connack[3]), (0x20, 0x86));

    let mut thing = Thing::connect(&server, &token);
    let data = world.text("data");
    let rotated = run("mpypi-broker", &["device", "rotate", "kitchen", "--data", &data]).expect_code(0);
    assert!(thing.0.is_closed(), "the old token is worth nothing any more");
    let mut thing = Thing::connect(&server, rotated.stdout.trim());
    let moved = ["device", "move", "kitchen", "--channel", "stable", "--data", &data];
    run("mpypi-broker", &moved).expect_code(0);
    assert!(thing.0.is_closed());
    let mut thing = Thing::connect(&server, rotated.stdout.trim());
    run("mpypi-broker", &["device", "remove", "kitchen", "--data", &data]).expect_code(0);
    assert!(thing.0.is_closed());
}

#[test]
fn thousands_of_devices_are_provided_for_by_a_file() {
    let world = World::new();
    let data = world.text("data");
    let list: String = (0..3000).map(|n| format!("thing-{n},dev\n")).collect();
    let list = world.write("list.csv", format!("node,channel,token\n{list}own,dev,aT3kJw0bq8Zr1MxCv5Ln\n"));
    let import = ["device", "import", list.to_str().unwrap(), "--data", &data];
    let made = run("mpypi-broker", &import).expect_code(0).stdout;
    assert_eq!(made.lines().count(), 3000);
    let again = run("mpypi-broker", &import).expect_code(0).stdout;
    assert_eq!(again, "", "who has a token keeps it");
    let server = Server::start(&world);
    let (name, token) = made.lines().nth(1234).unwrap().split_once(',').unwrap();
    let thing = Thing::connect(&server, token);
    let own = Thing::connect(&server, "aT3kJw0bq8Zr1MxCv5Ln");
    let mut client = Client::connect(server.address, "looks");
    wait_online(&mut client, name, b"1");
    drop((thing, own));
    for (name, problem) in
        [("short", "a token of 9 bytes should have 16 to 128"), ("kitchen/7", "`kitchen/7`")]
    {
        let add = ["device", "add", name, "--channel", "dev", "--token", "guess-me!", "--data", &data];
        let refused = run("mpypi-broker", &add).expect_code(1);
        assert!(refused.stderr.contains(problem), "{}", refused.stderr);
    }
}

#[test]
fn a_device_is_a_node_like_every_other_and_its_version_stays_a_text() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &["--target", "esp32"]);
    let first = image(1, 5000);
    publish(&world, &server, "1.10", &first);
    let mut client = Client::connect(server.address, "looks");
    let mut thing = Thing::connect(&server, &token);
    wait_online(&mut client, "kitchen", b"1");
    let state = |client: &mut Client| {
        parsed(client, "mpypi/nodes/kitchen/state", |bytes| State::parse(bytes).unwrap())
    };
    let report = |word: &str| json!({"current_fw_title": "dev", "current_fw_version": "1.9", "fw_state": word, "fw_error": "no"});
    for (word, phase) in [
        ("DOWNLOADING", Phase::Downloading),
        ("VERIFIED", Phase::Verifying),
        ("DOWNLOADED", Phase::Verifying),
        ("UPDATING", Phase::Installing),
        ("FAILED", Phase::Failed),
    ] {
        thing.say(TELEMETRY, &json!({"ts": 1, "values": report(word)}));
        let state = state(&mut client);
        assert_eq!((state.phase, state.sequence, state.version.as_deref()), (phase, Some(1), Some("1.10")));
        assert_eq!(state.error.as_deref(), (word == "FAILED").then_some("device: no"));
    }
    // As cOTA does it: the attributes are new, the last state still names the old version.
    thing.say(ATTRIBUTES, &json!({"fw_title": "dev", "fw_version": "1.10", "fw_url": "x"}));
    thing.say(TELEMETRY, &json!([report("UPDATED")]));
    let updated = state(&mut client);
    assert_eq!(
        (updated.phase, updated.sequence, updated.version.as_deref()),
        (Phase::Idle, Some(1), Some("1.10"))
    );
    let info = parsed(&mut client, "mpypi/nodes/kitchen/info", |bytes| Info::parse(bytes).unwrap());
    assert_eq!(info.versions, [("dev".to_owned(), "1.10".to_owned())].into());
    assert_eq!(info.channel.as_ref().map(ToString::to_string).as_deref(), Some("dev"));
    let status = run("mpypi", &["status", "dev", "--broker", &server.url(), "--json"]).expect_code(0);
    assert!(status.stdout.contains("kitchen"), "{}", status.stdout);
    // What it says of itself is there when it comes back, also after the broker was killed.
    server.kill();
    let server = Server::start(&world);
    let mut thing = Thing::connect(&server, &token);
    let keys = json!({"clientKeys": "fw_title,fw_version"});
    assert_eq!(thing.attributes(&keys), json!({"client": {"fw_title": "dev", "fw_version": "1.10"}}));
    let mut client = Client::connect(server.address, "looks");
    drop(thing);
    wait_online(&mut client, "kitchen", b"0");
}

#[test]
fn what_devices_say_goes_nowhere_else_and_what_nobody_understands_does_no_harm() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    publish(&world, &server, "1", &image(1, 5000));
    let mut spy = Client::connect(server.address, "spy");
    for filter in ["v1/#", "v2/#", "else/#"] {
        assert_eq!(spy.subscribe(filter, 1), 1);
    }
    let mut thing = Thing::connect(&server, &token);
    assert_eq!(thing.0.subscribe("v1/devices/me/rpc/request/+", 1), 1);
    assert_eq!(thing.0.subscribe("#", 1), 0x80, "others' messages are not for it");
    assert_eq!(thing.0.subscribe("mpypi/channels/stable", 1), 0x80);
    let limits = json!({"method": "getSessionLimits", "params": {"timeout": 5000}});
    thing.say("v1/devices/me/rpc/request/1", &limits);
    thing.say("v1/devices/me/rpc/response/1", &json!({}));
    thing.say("v1/devices/me/claim", &json!({"secretKey": "x"}));
    thing.say("v1/gateway/connect", &json!({"device": "x"}));
    thing.say("v2/fw/request/1/chunk/-1", &json!({}));
    thing.say("else/where", &json!({}));
    thing.say(TELEMETRY, &json!({"temperature": 21.5}));
    thing.say(ATTRIBUTES, &json!({"model": "T-1000", "battery": 3.3}));
    assert_eq!(thing.attributes(&json!({"clientKeys": "battery"})), json!({"client": {"battery": 3.3}}));
    let refused: [(&str, String); 4] = [
        (TELEMETRY, "21.5".to_owned()),
        (ATTRIBUTES, "[]".to_owned()),
        (ATTRIBUTES, format!("{{\"x\":\"{}\"}}", "y".repeat(20_000))),
        (ATTRIBUTES, "{".repeat(60_000)),
    ];
    for (topic, payload) in refused {
        let mut thing = Thing::connect(&server, &token);
        thing.0.post(topic, payload.as_bytes(), 1, false);
        assert!(thing.0.is_closed(), "{topic}");
    }
    // Somebody else's message on such a topic is not for the device either.
    let mut thing = Thing::connect(&server, &token);
    assert_eq!(thing.0.subscribe(ATTRIBUTES, 1), 1);
    assert!(spy.retain(ATTRIBUTES, b"{\"fw_version\":\"evil\"}"));
    spy.fence();
    thing.0.fence();
    assert!(!thing.0.waits());
    assert_eq!(
        spy.message().unwrap().payload,
        b"{\"fw_version\":\"evil\"}",
        "the first that comes to it at all"
    );
}

#[test]
fn every_checksum_is_there_for_devices_that_check_no_other() {
    let world = World::new();
    let names = ["md5", "sha256", "sha384", "sha512", "crc32", "murmur3_32", "murmur3_128"];
    let tokens = names.map(|name| add_device(&world, name, &["--checksum", name]));
    let server = Server::start(&world);
    publish(&world, &server, "1", b"hello world");
    let expected = ["5eb63bbb", "b94d27b9", "fdbd8e75", "309ecc48", "85114a0d", "0f8f925e", "0e617feb"];
    for ((name, token), start) in names.into_iter().zip(tokens).zip(expected) {
        let mut thing = Thing::connect(&server, &token);
        let read = thing.attributes(&json!({"sharedKeys": "fw_checksum,fw_checksum_algorithm"}));
        assert_eq!(read["shared"]["fw_checksum_algorithm"], name.to_uppercase());
        let sum = read["shared"]["fw_checksum"].as_str().unwrap();
        assert!(sum.starts_with(start), "{name}: {sum}");
    }
}

#[test]
fn software_comes_from_a_channel_of_its_own() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &["--software", "apps"]);
    publish(&world, &server, "1", b"firmware");
    world.write("apps/channel.toml", "version = \"2\"\n");
    world.write("apps/firmware/app.bin", "software");
    run("mpypi", &["publish", &world.text("apps"), "--broker", &server.url()]).expect_code(0);
    let mut thing = Thing::connect(&server, &token);
    let read = thing.attributes(&json!({"sharedKeys": "fw_title,sw_title,sw_version,sw_size"}));
    let shared = json!({"fw_title": "dev", "sw_title": "apps", "sw_version": "2", "sw_size": 8});
    assert_eq!(read, json!({"shared": shared}));
    let answer = thing.ask("v2/sw/request/1/chunk/0", "4");
    assert_eq!((answer.topic.as_str(), &answer.payload[..]), ("v2/sw/response/1/chunk/0", &b"soft"[..]));
}

/// The broker's memory in kB.
fn memory(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn many_devices_that_download_at_once_cost_no_copy_each() {
    const DEVICES: usize = 64;
    let world = World::new();
    let data = world.text("data");
    let list: String = (0..DEVICES).map(|n| format!("thing-{n},dev\n")).collect();
    let list = world.write("list.csv", list);
    let import = ["device", "import", list.to_str().unwrap(), "--data", &data];
    let made = run("mpypi-broker", &import).expect_code(0).stdout;
    let server = Server::start(&world);
    let image = image(1, 1024 * 1024);
    publish(&world, &server, "1", &image);
    let things: Vec<Thing> =
        made.lines().map(|line| Thing::connect(&server, line.split_once(',').unwrap().1)).collect();
    let before = memory(&server);
    std::thread::scope(|scope| {
        for (n, mut thing) in things.into_iter().enumerate() {
            let (image, server) = (&image, &server);
            scope.spawn(move || {
                let mut fetched = Vec::new();
                for index in 0.. {
                    match thing.chunk(1, index, "16384") {
                        piece if piece.is_empty() => break,
                        piece => fetched.extend(piece),
                    }
                }
                assert!(fetched == *image);
                // Some ask for all of it again and again, and read nothing.
                if n % 8 == 0 {
                    for index in 0..1000 {
                        let topic = format!("v2/fw/request/{index}/chunk/0");
                        thing.0.post(&topic, b"", 0, false);
                    }
                    let grown = memory(server).saturating_sub(before);
                    assert!(grown < 48 * 1024, "{grown} kB");
                }
            });
        }
    });
    let grown = memory(&server).saturating_sub(before);
    assert!(grown < 48 * 1024, "{grown} kB");
}

#[test]
fn a_rollout_holds_a_device_back_until_its_turn() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    publish(&world, &server, "1", &image(1, 5000));
    let mut client = Client::connect(server.address, "publisher");
    let list = client.retained("mpypi/channels/dev").unwrap().payload;
    let list: Vec<Value> = serde_json::from_slice(&list).unwrap();
    let step = |client: &mut Client, sequence: u64, percent: u32| {
        let mut list = list.clone();
        list[0]["sequence"] = sequence.into();
        list[0]["rollout"] = json!({"id": "0123456789abcdef", "percent": percent});
        assert!(client.retain("mpypi/channels/dev", Value::Array(list).to_string().as_bytes()));
    };
    let mut thing = Thing::connect(&server, &token);
    assert_eq!(thing.0.subscribe(ATTRIBUTES, 1), 1);
    step(&mut client, 2, 0);
    let gone: Value = serde_json::from_slice(&thing.0.message().unwrap().payload).unwrap();
    assert!(gone["deleted"].as_array().unwrap().contains(&json!("fw_version")), "{gone}");
    assert_eq!(thing.attributes(&json!({})), json!({}));
    step(&mut client, 3, 100);
    let told: Value = serde_json::from_slice(&thing.0.message().unwrap().payload).unwrap();
    assert_eq!(told["fw_version"], "1");
}
