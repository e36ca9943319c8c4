//! Who may do what, from outside.

use std::io::Read;

use mpypi_protocol::Digest;
use mpypi_tests::{Client, Options, Server, World, run};

/// Adds a user before or while the broker runs; returns the token.
fn add(world: &World, name: &str, role: &str) -> String {
    let arguments = ["user", "add", name, "--role", role, "--token", "--data", &world.text("data")];
    run("mpypi-broker", &arguments).expect_code(0).stdout.trim().to_owned()
}

fn options(id: &str, user: &str, password: &str) -> Options {
    Options { login: Some((user.to_owned(), password.to_owned())), ..Options::id(id) }
}

fn connect(server: &Server, user: &str, password: &str) -> Client {
    let (client, code) = Client::try_connect(server.address, &options(user, user, password)).unwrap();
    assert_eq!(code, 0, "{user}");
    client
}

#[test]
fn each_role_does_what_it_must_and_is_told_when_it_may_not() {
    let world = World::new();
    let tokens: Vec<_> = ["admin", "publisher", "viewer", "node"]
        .iter()
        .map(|role| add(&world, &format!("the-{role}"), role))
        .collect();
    let server = Server::start(&world);
    let mut admin = connect(&server, "the-admin", &tokens[0]);
    let mut publisher = connect(&server, "the-publisher", &tokens[1]);
    let mut viewer = connect(&server, "the-viewer", &tokens[2]);
    let mut node = connect(&server, "the-node", &tokens[3]);

    let package = format!("mpypi/packages/wheel/{}", Digest::of(b"x"));
    assert!(publisher.retain(&package, b"x"));
    assert!(publisher.retain("mpypi/channels/dev", b"[]"));
    assert!(node.retain("mpypi/nodes/the-node/online", b"1"));
    assert!(admin.retain("home/light", b"on"));
    assert_eq!(node.retained(&package).unwrap().payload, b"x");
    assert_eq!(viewer.retained("mpypi/nodes/the-node/online").unwrap().payload, b"1");
    assert!(node.retained("mpypi/channels/dev").is_some());

    for filter in
        ["#", "mpypi/#", "mpypi/nodes/#", "mpypi/nodes/+/cmd", "mpypi/nodes/other/cmd", "+/+/the-node/cmd"]
    {
        assert_eq!(node.subscribe(filter, 0), 0x80, "{filter}");
    }
    assert_eq!(viewer.subscribe("#", 0), 0x80);
    assert_eq!(node.subscribe("mpypi/nodes/the-node/cmd", 1), 1);
    assert!(publisher.post("mpypi/nodes/the-node/cmd", b"[]", 1, false).is_some());
    assert_eq!(node.message().unwrap().payload, b"[]");

    // MQTT 3.1.1 has no word for no: the connection ends, and nothing was published.
    let refused = |user: &str, token: &str, topic: &str| {
        let mut client = connect(&server, user, token);
        assert!(!client.retain(topic, b"x"), "{user}: {topic}");
    };
    refused("the-node", &tokens[3], "mpypi/nodes/other/state");
    refused("the-node", &tokens[3], "mpypi/nodes/the-node/cmd");
    refused("the-node", &tokens[3], "mpypi/channels/dev");
    refused("the-node", &tokens[3], &package);
    refused("the-viewer", &tokens[2], "mpypi/channels/dev");
    refused("the-publisher", &tokens[1], "mpypi/nodes/the-node/state");
    assert_eq!(admin.retained("mpypi/nodes/other/state"), None);
    // MQTT 5 has.
    let arguments =
        ["-V", "mqttv5", "-q", "1", "-p", &server.port(), "-r", "-i", "the-node", "-u", "the-node"];
    let denied = ["-P", &tokens[3], "-t", "mpypi/channels/dev", "-m", "[]"];
    let denied = run("mosquitto_pub", &[&arguments[..], &denied].concat());
    assert!(denied.stderr.contains("Not authorized"), "{}", denied.stderr);
}

#[test]
fn strangers_wrong_passwords_and_borrowed_names_are_refused_each_in_its_way() {
    let world = World::new();
    let token = add(&world, "kitchen", "node");
    add(&world, "cellar", "node");
    let server = Server::start(&world);
    let code = |options: &Options| Client::try_connect(server.address, options).unwrap().1;
    assert_eq!(code(&Options::id("stranger")), 5);
    assert_eq!(code(&options("kitchen", "kitchen", "wrong")), 4);
    assert_eq!(code(&options("kitchen", "nobody", &token)), 4);
    assert_eq!(code(&options("cellar", "kitchen", &token)), 2, "another node's client id");
    let will = Some(("mpypi/nodes/cellar/online".to_owned(), "0".to_owned()));
    assert_eq!(code(&Options { will, ..options("kitchen", "kitchen", &token) }), 5, "another node's will");
    assert_eq!(code(&options("kitchen", "kitchen", &token)), 0);
    let wrong = ["-V", "mqttv5", "-p", &server.port(), "-u", "kitchen", "-P", "wrong", "-t", "t", "-m", "x"];
    let wrong = run("mosquitto_pub", &wrong);
    assert!(
        wrong.stderr.contains("Bad User Name or Password") || wrong.stderr.contains("Bad username"),
        "{}",
        wrong.stderr
    );
    assert!(!server.log().contains(&token));
}

#[test]
fn a_fleet_and_its_publisher_log_in_and_a_rule_narrows_what_a_node_reads() {
    let world = World::new();
    let publisher = add(&world, "ci", "publisher");
    let node = add(&world, "kitchen", "node");
    world.write("data/rules.toml", "[[rules]]\nnodes = \"kit*\"\nchannels = [\"stable\"]\n");
    let server = Server::start(&world);
    world.write("app/src/main.py", "print(1)\n");
    let as_user = |name: &str, token: &str| format!("mqtt://{name}:{token}@{}", server.address);
    for channel in ["dev", "stable"] {
        let arguments =
            ["publish", &world.text("app"), "--channel", channel, "--broker", &as_user("ci", &publisher)];
        let _ = run("mpypi", &arguments).expect_code(0);
    }
    let agent = |channel: &str| {
        let (root, broker) = (world.text("kitchen"), as_user("kitchen", &node));
        let arguments =
            ["run", "--broker", &broker, "--root", &root, "--node", "kitchen", "--channel", channel];
        run("mpypi-agent", &[&arguments[..], &["--once", "--confirm-after", "10ms"]].concat())
    };
    let _ = agent("stable").expect_code(0);
    assert_eq!(std::fs::read(world.path("kitchen/main.py")).unwrap(), b"print(1)\n");
    let mut kitchen = connect(&server, "kitchen", &node);
    assert_eq!(kitchen.subscribe("mpypi/channels/dev", 0), 0x80);
}

#[test]
fn a_removed_user_is_sent_away_and_a_new_one_let_in_while_the_broker_runs() {
    let world = World::new();
    let first = add(&world, "first", "viewer");
    let server = Server::start(&world);
    let mut connected = connect(&server, "first", &first);
    connected.ping();
    let second = add(&world, "second", "viewer");
    let _ = run("mpypi-broker", &["user", "remove", "first", "--data", &world.text("data")]).expect_code(0);
    assert!(connected.is_closed());
    connect(&server, "second", &second).ping();
    assert_eq!(Client::try_connect(server.address, &options("first", "first", &first)).unwrap().1, 4);
    // Without its last user a broker lets nobody in, rather than everybody.
    let _ = run("mpypi-broker", &["user", "remove", "second", "--data", &world.text("data")]).expect_code(0);
    let mut code = 0;
    while code == 0 {
        // Let in just before, it may be sent away without a CONNACK.
        let answer = Client::try_connect(server.address, &options("second", "second", &second));
        code = answer.map_or(0, |(_, code)| code);
    }
    assert_eq!(Client::try_connect(server.address, &Options::id("anyone")).unwrap().1, 5);
}

#[test]
fn the_first_user_ends_the_time_when_everybody_was_let_in() {
    let world = World::new();
    let server = Server::start(&world);
    let mut anyone = Client::connect(server.address, "anyone");
    anyone.ping();
    let token = add(&world, "admin", "admin");
    assert!(anyone.is_closed());
    connect(&server, "admin", &token).ping();
    assert_eq!(Client::try_connect(server.address, &Options::id("anyone")).unwrap().1, 5);
}

#[test]
fn guessing_passwords_is_slow_and_does_not_keep_those_out_who_know_theirs() {
    let world = World::new();
    let token = add(&world, "honest", "viewer");
    let server = Server::start(&world);
    connect(&server, "honest", &token).ping();
    let guess =
        |password: &str| Client::try_connect(server.address, &options("g", "honest", password)).unwrap().1;
    assert_eq!(guess("the first"), 4);
    let (answered, answers) = std::sync::mpsc::channel();
    for n in 0..40 {
        let (address, answered) = (server.address, answered.clone());
        std::thread::spawn(move || {
            let guess = options(&format!("g{n}"), "honest", &n.to_string());
            let code = Client::try_connect(address, &guess).map(|(_, code)| code);
            answered.send(code).ok();
        });
    }
    connect(&server, "honest", &token).ping();
    // Most are too many at once and not even looked at; nobody waits here for the slow ones.
    for _ in 0..20 {
        match answers.recv().unwrap() {
            Some(3) => return,
            code => assert_ne!(code, Some(0)),
        }
    }
    panic!("twenty guesses were looked at");
}

#[test]
fn with_users_any_address_may_be_listened_on() {
    let world = World::new();
    add(&world, "admin", "admin");
    let server = Server::start_with(&world, &["--listen", "0.0.0.0:0"]);
    assert_eq!(server.stop("-TERM"), Some(0));
}

#[test]
fn the_list_of_users_says_who_they_are_and_nothing_that_lets_one_in() {
    let world = World::new();
    let token = add(&world, "ci", "publisher");
    let data = world.text("data");
    let list = run("mpypi-broker", &["user", "list", "--data", &data, "--json"]).expect_code(0);
    assert_eq!(list.json()["users"][0]["role"], "publisher");
    let file = std::fs::read_to_string(world.path("data/users.toml")).unwrap();
    assert!(!list.stdout.contains(&token) && !file.contains(&token));
    let unknown = run("mpypi-broker", &["user", "remove", "nobody", "--data", &data]).expect_code(1);
    assert!(unknown.stderr.contains("there is no user `nobody`"), "{}", unknown.stderr);
    world.write("data/users.toml", "[users.x]\nrole = \"king\"\n");
    let broken = run("mpypi-broker", &["serve", "--listen", "127.0.0.1:0", "--data", &data]).expect_code(1);
    assert!(broken.stderr.contains("users.toml"), "{}", broken.stderr);
}

/// Who may: admin, publisher, viewer, the node `kitchen`.
const ROLES: [&str; 4] = ["admin", "publisher", "viewer", "kitchen"];

#[test]
fn what_each_role_may_publish_holds_by_every_route() {
    let world = World::new();
    let tokens = ROLES.map(|name| add(&world, name, if name == "kitchen" { "node" } else { name }));
    let server = Server::start(&world);
    let mut admin = connect(&server, "admin", &tokens[0]);
    assert_eq!(admin.subscribe("#", 1), 1);
    let package = format!("mpypi/packages/wheel/{}", Digest::of(b"[]"));
    // Each payload is one that the door lets in; only rights decide.
    let table: &[(&str, [bool; 4])] = &[
        ("mpypi/channels/dev", [true, true, false, false]),
        (&package, [true, true, false, false]),
        ("mpypi/nodes/kitchen/info", [true, false, false, true]),
        ("mpypi/nodes/kitchen/state", [true, false, false, true]),
        ("mpypi/nodes/kitchen/online", [true, false, false, true]),
        ("mpypi/nodes/kitchen/log", [true, false, false, true]),
        ("mpypi/nodes/kitchen/cmd", [true, true, false, false]),
        ("mpypi/nodes/cellar/info", [true, false, false, false]),
        ("mpypi/nodes/cellar/cmd", [true, true, false, false]),
        ("mpypi/nodes/kitchen/info/more", [true, false, false, false]),
        ("mpypi/nodes/kitchen", [true, false, false, false]),
        ("home/light", [true, false, false, false]),
    ];
    for (topic, expected) in table {
        for (n, name) in ROLES.iter().enumerate() {
            // An admin that listens keeps its id.
            let id = if *name == "admin" { "another-admin" } else { name };
            let may = expected[n];
            for qos in 0..3 {
                let (mut client, code) =
                    Client::try_connect(server.address, &options(id, name, &tokens[n])).unwrap();
                assert_eq!(code, 0);
                client.post(topic, b"[]", qos, true).unwrap();
                if may {
                    match qos {
                        0 => client.ping(),
                        _ => assert!(client.packet().is_some(), "{name} to {topic} at QoS {qos}"),
                    }
                } else {
                    // MQTT 3.1.1 has no other way to say no.
                    assert!(client.is_closed(), "{name} to {topic} at QoS {qos}");
                }
            }
            let will = Some(((*topic).to_owned(), "[]".to_owned()));
            let with_will = Options { will, ..options(id, name, &tokens[n]) };
            let (client, code) = Client::try_connect(server.address, &with_will).unwrap();
            assert_eq!(code, if may { 0 } else { 5 }, "{name} with a will for {topic}");
            client.reset();
            // MQTT 5: by the topic's alias too, and the refusal has a name. The alias stands although the message
            // was refused.
            let mut raw = Client::open(server.address);
            raw.send(&v5_connect(id, name, &tokens[n]));
            let first = [&[0x33, 0, 0, topic.len() as u8][..], topic.as_bytes(), &[0, 1, 3, 0x23, 0, 1]];
            let second = [0x33, 10, 0, 0, 0, 2, 3, 0x23, 0, 1, b'[', b']'];
            let mut first = [&first.concat()[..], b"[]"].concat();
            first[1] = first.len() as u8 - 2;
            raw.send(&[&first[..], &second].concat());
            let answers = reasons(&mut raw, 2);
            assert!(answers.iter().all(|reason| (*reason < 0x80) == may), "{name} to {topic}: {answers:x?}");
            assert!(may || answers.iter().all(|reason| *reason == 0x87), "{answers:x?}");
        }
    }
    // Only what was allowed arrived, and each as often as somebody may have sent it.
    admin.fence();
    while admin.waits() {
        let received = admin.message().unwrap();
        assert!(table.iter().any(|(topic, _)| *topic == received.topic), "{received:?}");
    }
}

#[test]
fn what_each_role_may_read_holds_by_every_route() {
    let world = World::new();
    let tokens = ROLES.map(|name| add(&world, name, if name == "kitchen" { "node" } else { name }));
    add(&world, "cellar", "node");
    world.write("data/rules.toml", "[[rules]]\nnodes = \"kitchen\"\nchannels = [\"stable\"]\n");
    let server = Server::start(&world);
    // Filter: admin, publisher, viewer, the node, which reads one channel.
    let table: &[(&str, [bool; 4])] = &[
        ("mpypi/channels/stable", [true, true, true, true]),
        ("mpypi/channels/dev", [true, true, true, false]),
        ("mpypi/channels/+", [true, true, true, false]),
        ("mpypi/packages/wheel/x", [true, true, true, true]),
        ("mpypi/packages/#", [true, true, true, false]),
        ("mpypi/nodes/kitchen/#", [true, true, true, true]),
        ("mpypi/nodes/kitchen/+", [true, true, true, true]),
        ("mpypi/nodes/cellar/cmd", [true, true, true, false]),
        ("mpypi/nodes/cellar/#", [true, true, true, false]),
        ("mpypi/nodes/+/cmd", [true, true, true, false]),
        ("mpypi/+/kitchen/cmd", [true, true, true, false]),
        ("mpypi/#", [true, true, true, false]),
        ("+/nodes/kitchen/cmd", [true, false, false, false]),
        ("#", [true, false, false, false]),
        ("home/light", [true, false, false, false]),
    ];
    for (n, name) in ROLES.iter().enumerate() {
        let mut client = connect(&server, name, &tokens[n]);
        let mut kept = {
            let kept = Options { clean: false, ..options(&format!("kept-{name}"), name, &tokens[n]) };
            // A node has one name, so its kept session comes when the other has gone.
            (*name != "kitchen").then(|| Client::try_connect(server.address, &kept).unwrap().0)
        };
        for (filter, expected) in table {
            let code = if expected[n] { 1 } else { 0x80 };
            assert_eq!(client.subscribe(filter, 1), code, "{name} to {filter}");
            let shared = format!("$share/g/{filter}");
            assert_eq!(client.subscribe(&shared, 1), code, "{name} to {shared}");
            if let Some(kept) = &mut kept {
                assert_eq!(kept.subscribe(filter, 1), code, "{name}, kept, to {filter}");
            }
        }
    }
}

#[test]
fn nobody_reads_a_nodes_orders_by_its_name_its_session_or_what_it_once_was_allowed() {
    let world = World::new();
    let kitchen = add(&world, "kitchen", "node");
    let viewer = add(&world, "eve", "viewer");
    let operator = add(&world, "operator", "publisher");
    let cellar = add(&world, "cellar", "node");
    let server = Server::start(&world);
    let kept = |id: &str, user: &str, password: &str| Options { clean: false, ..options(id, user, password) };
    let connect_kept = |options: &Options| Client::try_connect(server.address, options).unwrap();
    let (mut node, _) = connect_kept(&kept("kitchen", "kitchen", &kitchen));
    assert_eq!(node.subscribe("mpypi/nodes/kitchen/cmd", 1), 1);
    assert_eq!(node.subscribe("mpypi/channels/dev", 1), 1);
    assert_eq!(node.message().unwrap().payload, b"[]");
    // Neither while the node is there, nor when it has gone, nor with a clean start, which would end its session.
    assert_eq!(connect_kept(&kept("kitchen", "eve", &viewer)).1, 2);
    drop(node);
    assert_eq!(connect_kept(&kept("kitchen", "eve", &viewer)).1, 2);
    assert_eq!(connect_kept(&options("kitchen", "eve", &viewer)).1, 2);
    let mut operator = connect(&server, "operator", &operator);
    operator.post("mpypi/nodes/kitchen/cmd", b"[]", 1, false).unwrap();
    operator.acknowledged().unwrap();
    assert!(operator.retain("mpypi/channels/dev", b"[ ]"));
    // Narrowed meanwhile, the node gets its orders and no news of a channel that is not its any more.
    let mut cellar = connect(&server, "cellar", &cellar);
    world.write("data/rules.toml", "[[rules]]\nnodes = \"*\"\nchannels = [\"stable\"]\n");
    assert!(cellar.is_closed(), "who is connected comes again with the new rights");
    let (mut node, _) = connect_kept(&kept("kitchen", "kitchen", &kitchen));
    assert!(node.session_present);
    assert_eq!(node.message().unwrap().topic, "mpypi/nodes/kitchen/cmd");
    assert!(operator.retain("mpypi/channels/dev", b"[  ]"));
    node.fence();
    assert!(!node.waits());
}

/// CONNECT of MQTT 5, with a clean start, that wants no reason strings.
fn v5_connect(id: &str, user: &str, password: &str) -> Vec<u8> {
    let text = |text: &str| [&[0, text.len() as u8], text.as_bytes()].concat();
    let body = [&b"\0\x04MQTT\x05\xc2\0\0\x02\x17\0"[..], &text(id), &text(user), &text(password)].concat();
    [&[0x10, body.len() as u8][..], &body].concat()
}

/// The reasons of the next PUBACKs.
fn reasons(client: &mut Client, count: usize) -> Vec<u8> {
    let mut reasons = Vec::new();
    while reasons.len() < count {
        let mut head = [0; 2];
        client.stream().read_exact(&mut head).unwrap();
        assert!(head[1] < 0x80, "a short packet");
        let mut body = vec![0; usize::from(head[1])];
        client.stream().read_exact(&mut body).unwrap();
        match head[0] {
            0x20 => assert_eq!(body[1], 0, "CONNACK"),
            0x40 => reasons.push(body.get(2).copied().unwrap_or_default()),
            other => panic!("a packet of type {other:#x}"),
        }
    }
    reasons
}
