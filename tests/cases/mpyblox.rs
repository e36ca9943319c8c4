//! Devices that run Mpy-BLOX, unmodified: its stand-in on MicroPython, with the broker and the publisher as
//! users run them.

use std::process::Command;

use mpypi_protocol::{
    Digest, PackageId,
    node::{Phase, State},
};
use mpypi_tests::{
    Client, Server, World,
    mpyblox::{Blox, Rest, wheel},
    peer, run,
};
use serde_json::{Value, json};

const NODE: &str = "esp32-0a1b2c";
const ANY: &str = "py3-none-any";

/// A channel with a wheel and a file.
fn channel(world: &World, version: &str) {
    world.write("dev/src/main.py", format!("import blink  # {version}\n"));
    project(world, "blink", version);
}

fn project(world: &World, name: &str, version: &str) {
    let text = format!("[project]\nname = \"{name}\"\nversion = \"{version}\"\n");
    world.write(&format!("dev/wheels/{name}/pyproject.toml"), text);
    world.write(&format!("dev/wheels/{name}/{name}.py"), format!("VERSION = '{version}'\n"));
}

fn publish(world: &World, server: &Server) -> Value {
    run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url(), "--json"]).expect_code(0).json()
}

fn device(world: &World, server: &Server) -> Blox {
    Blox::start(world, server, NODE, "dev", &[])
}

fn file(world: &World, path: &str) -> String {
    std::fs::read_to_string(world.path(NODE).join(path)).unwrap_or_default()
}

/// What the channel holds for everybody else.
fn published(client: &mut Client) -> String {
    String::from_utf8(client.retained("mpypi/channels/dev").unwrap().payload).unwrap()
}

/// What the broker says of the node, once it says what starts with `word`; nothing is wrong if that is empty.
fn told(server: &Server, word: &str) -> State {
    let mut client = Client::connect(server.address, "listener");
    client.subscribe(&format!("mpypi/nodes/{NODE}/state"), 1);
    loop {
        let state = State::parse(&client.message().unwrap().payload).unwrap();
        let error = state.error.as_deref();
        if error.map_or(word.is_empty() && state.phase == Phase::Idle, |error| {
            !word.is_empty() && error.starts_with(word)
        }) {
            return state;
        }
    }
}

/// A list as Mpy-BLOX's own script makes it, with its packages, by hand.
struct Hand {
    client: Client,
    entries: Vec<Value>,
}

impl Hand {
    fn new(server: &Server) -> Hand {
        Hand { client: Client::connect(server.address, "hand"), entries: Vec::new() }
    }

    fn wheel(&mut self, name: &str, version: &str, content: &[u8]) -> &mut Hand {
        let digest = Digest::of(content);
        assert!(self.client.retain(&PackageId::Wheel(digest).topic(), content));
        let digest = digest.to_string();
        self.entries.push(json!({"type": "wheel", "name": name, "version": version, "pkg_sha256": digest}));
        self
    }

    fn src(&mut self, path: &str, content: &str) -> &mut Hand {
        let digest = Digest::of(content.as_bytes());
        if !content.is_empty() {
            let id = PackageId::Src(path.parse().unwrap(), digest);
            assert!(self.client.retain(&id.topic(), content.as_bytes()));
        }
        self.entries.push(json!({"type": "src", "path": path, "pkg_sha256": digest.to_string()}));
        self
    }

    /// To the channel.
    fn publish(&mut self) -> String {
        let list = Value::Array(std::mem::take(&mut self.entries)).to_string();
        assert!(self.client.retain("mpypi/channels/dev", list.as_bytes()));
        list
    }

    /// To the node's `cmd`.
    fn command(&mut self) {
        let list = Value::Array(std::mem::take(&mut self.entries)).to_string();
        self.order(&list);
    }

    fn order(&mut self, list: &str) {
        let id = self.client.post(&format!("mpypi/nodes/{NODE}/cmd"), list.as_bytes(), 1, false);
        assert_eq!(self.client.acknowledged(), id);
    }
}

fn plain(name: &str, version: &str) -> Vec<u8> {
    let file = format!("{name}/__init__.py");
    wheel(name, version, ANY, &[(&file, &format!("V = '{version}'\n"))], &[], "")
}

fn with_licenses(name: &str, version: &str) -> Vec<u8> {
    let file = format!("{name}/__init__.py");
    wheel(
        name,
        version,
        ANY,
        &[(&file, &format!("V = '{version}'\n"))],
        &[("licenses/LICENSE", "free\n")],
        "",
    )
}

#[test]
fn the_stand_in_has_every_documented_quirk() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/mpyblox/quirks.py");
    let output = Command::new(peer("micropython")).args(["-X", "heapsize=64M", script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.lines().filter(|line| line.starts_with("ok - ")).count() > 60, "{text}");
}

#[test]
fn the_stand_in_of_fleets_comes_to_the_same_files() {
    let world = World::new();
    let server = Server::start(&world);
    let profile = "[agents]\nmpy-blox = \"100%\"\n[platforms]\nesp32 = \"100%\"\n";
    let profile = world.write("blox.toml", profile);
    let (profile, disk) = (profile.to_str().unwrap(), world.text("fleet"));
    for version in ["1.0", "1.1"] {
        channel(&world, version);
        publish(&world, &server);
        let mut device = device(&world, &server);
        while device.versions()["blink"] != version {
            let _ = device.until("info");
        }
        assert_eq!(device.rest(), Rest::Running);
        drop(device);
        let one = ["fleet", "--broker", &server.url(), "--nodes", "1", "--profile", profile, "--disk", &disk];
        let until = ["--faults-for", "0s", "--releases", "1", "--for", "60s", "--expect", "applied=1"];
        let _ = run("mpypi-agent", &[&one[..], &until].concat()).expect_code(0);
        assert_eq!(world.files("fleet/device-1"), world.files(NODE), "{version}");
    }
}

#[test]
fn a_fresh_node_installs_a_wheel_and_files_then_upgrades_then_rests() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "1.0.0");
    publish(&world, &server);
    let mut node = device(&world, &server);
    assert_eq!(node.rest(), Rest::Running);
    assert_eq!(node.resets(), 2, "the wheel first, then the file");
    assert_eq!(node.versions(), json!({"mpy-blox": "0.6.0", "blink": "1.0.0"}));
    assert_eq!(file(&world, "main.py"), "import blink  # 1.0.0\n");
    assert_eq!(file(&world, "lib/blink.py"), "VERSION = '1.0.0'\n");
    // In the end it has the very list that was published.
    let mut client = Client::connect(server.address, "reader");
    let list = published(&mut client);
    assert_eq!(node.lists().last().unwrap(), &("mpypi/channels/dev".to_owned(), list));
    assert_eq!(told(&server, "").extra["channel"], "dev");

    channel(&world, "1.1.0");
    publish(&world, &server);
    node.until("reset");
    assert_eq!(node.rest(), Rest::Running);
    assert_eq!(node.resets(), 3, "one for all of it");
    assert_eq!(node.versions(), json!({"mpy-blox": "0.6.0", "blink": "1.1.0"}));
    assert_eq!(file(&world, "main.py"), "import blink  # 1.1.0\n");
    assert!(!world.path(NODE).join("lib/blink-1.0.0.dist-info").exists());

    // Started again, it finds nothing to do.
    drop(node);
    let mut node = device(&world, &server);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 0));
}

#[test]
fn several_new_wheels_come_one_after_the_other_before_any_file() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "1.0.0");
    project(&world, "alpha", "1");
    project(&world, "omega", "0");
    publish(&world, &server);
    let mut node = device(&world, &server);
    for _ in 0..3 {
        assert!(!world.path(NODE).join("main.py").exists());
        node.until("reset");
    }
    node.until("reset");
    assert_eq!(node.rest(), Rest::Running);
    let expected = json!({"mpy-blox": "0.6.0", "alpha": "1", "blink": "1.0.0", "omega": "0"});
    assert_eq!((node.versions(), node.resets()), (expected, 4));
}

#[test]
fn files_alone_are_served_as_they_were_published() {
    let world = World::new();
    let server = Server::start(&world);
    world.write("dev/src/main.py", "print(1)\n");
    publish(&world, &server);
    let mut node = device(&world, &server);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 1));
    assert_eq!(file(&world, "main.py"), "print(1)\n");
    let mut client = Client::connect(server.address, "reader");
    let list = published(&mut client);
    assert!(node.lists().iter().all(|(_, got)| *got == list));
    assert!(!server.log().contains("WARN"), "there is nothing to tell: {}", server.log());
}

#[test]
fn an_empty_channel_lets_a_node_boot() {
    let world = World::new();
    let server = Server::start(&world);
    let mut node = device(&world, &server);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 0));
}

#[test]
fn a_channel_serves_our_agents_and_mpyblox_side_by_side() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "1.0.0");
    world.write("dev/src/empty.py", "");
    publish(&world, &server);
    let mut node = device(&world, &server);
    node.until("reset");
    node.until("reset");
    assert_eq!(node.rest(), Rest::Running);
    assert_eq!(node.versions()["blink"], "1.0.0");
    assert_eq!(file(&world, "main.py"), "import blink  # 1.0.0\n");
    // What would have made it wait for ever is left out, and said.
    assert!(!world.path(NODE).join("empty.py").exists());
    told(&server, "left-out: `empty.py` is empty");

    let folder = world.text("devices");
    let arguments =
        ["fleet", "--broker", &server.url(), "--channel", "dev", "--nodes", "2", "--dir", &folder];
    let bounds = ["--releases", "1", "--for", "60s", "--confirm-after", "50ms", "--json"];
    let _ = run("mpypi-agent", &[&arguments[..], &bounds].concat()).expect_code(0);
    for n in 1..=2 {
        let files = world.files(&format!("devices/device-{n}"));
        assert!(files.contains_key("empty.py") && files.contains_key("lib/blink.py"));
    }
}

#[test]
fn what_cannot_be_installed_is_held_back_with_its_reason_and_the_node_runs_on() {
    let body = wheel("demo", "2.0", ANY, &[("demo.py", "V = 2\n")], &[], "\nA description\n");
    let cases: [(&str, &str, Vec<u8>, &str); 4] = [
        ("demo", "2.0", body.clone(), "METADATA is not `Key: value`"),
        ("demo", "2.0.0", plain("demo", "2.0"), "METADATA says `Version: 2.0`"),
        ("other", "2.0", plain("demo", "2.0"), "METADATA says `Name: demo`"),
        ("demo", "2.0", b"no wheel at all".to_vec(), "zip archive"),
    ];
    for (name, version, content, reason) in cases {
        let world = World::new();
        let server = Server::start_with(&world, &["--http", "127.0.0.1:0"]);
        let mut hand = Hand::new(&server);
        hand.wheel("demo", "1.0", &plain("demo", "1.0")).publish();
        let mut node = device(&world, &server);
        node.until("reset");
        assert_eq!(node.rest(), Rest::Running);

        // At run time and at the next start.
        hand.wheel(name, version, &content).src("main.py", "new\n").publish();
        node.until("list");
        assert_eq!(node.rest(), Rest::Running);
        drop(node);
        let mut node = device(&world, &server);
        assert_eq!((node.rest(), node.resets()), (Rest::Running, 0), "{reason}");
        assert_eq!(node.versions()["demo"], "1.0");
        assert_eq!(file(&world, "main.py"), "", "a release is applied whole or not at all");
        let told_state = told(&server, "held-back: wheel `");
        assert_eq!(told_state.phase, Phase::Failed);
        assert!(told_state.error.as_ref().unwrap().contains(reason), "{told_state:?}");
        assert!(server.log().contains(reason), "{}", server.log());
        let (_, metrics) = server.get("/metrics");
        assert!(metrics.contains("mpypi_mpyblox_nodes{state=\"held-back\"} 1\n"), "{metrics}");
        let status = run("mpypi", &["status", "dev", "--broker", &server.url()]).expect_code(0).stdout;
        assert!(status.contains(NODE) && status.contains("held-back: "), "{status}");

        // The next release that it can take frees it.
        hand.wheel("demo", "3.0", &plain("demo", "3.0")).src("main.py", "new\n").publish();
        node.until("reset");
        assert_eq!(node.rest(), Rest::Running);
        assert_eq!((node.versions()["demo"].as_str(), &*file(&world, "main.py")), (Some("3.0"), "new\n"));
        told(&server, "");
        let (_, metrics) = server.get("/metrics");
        assert!(metrics.contains("mpypi_mpyblox_nodes{state=\"held-back\"} 0\n"), "{metrics}");
    }
}

#[test]
fn a_node_that_installs_the_same_release_again_and_again_keeps_what_it_has() {
    let world = World::new();
    let server = Server::start_with(&world, &["--http", "127.0.0.1:0"]);
    let mut hand = Hand::new(&server);
    hand.src("settings.json", "{}\n").src("main.py", "1\n").publish();
    let mut node = Blox::start(&world, &server, NODE, "dev", &["spoils=settings.json"]);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 3));
    let state = told(&server, "looping: installed 3 times");
    assert_eq!((state.phase, state.attempt), (Phase::Failed, 3));
    assert!(server.log().contains("looping: "));
    let (_, metrics) = server.get("/metrics");
    assert!(metrics.contains("mpypi_mpyblox_nodes{state=\"looping\"} 1\n"), "{metrics}");
    let status = run("mpypi", &["status", "--broker", &server.url()]).expect_code(0).stdout;
    assert!(status.contains("looping: "), "{status}");

    // It stays so, however often it starts.
    drop(node);
    let mut node = Blox::start(&world, &server, NODE, "dev", &["spoils=settings.json"]);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 0));

    // An operator's word frees it: three times more.
    hand.order(r#"[{"type":"check"}]"#);
    node.until("reset");
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 3));

    // So does a new release.
    hand.src("main.py", "2\n").publish();
    node.until("reset");
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 4));
    assert_eq!(file(&world, "main.py"), "2\n");
    told(&server, "");
}

#[test]
fn a_node_that_licenses_wedged_is_repaired() {
    let world = World::new();
    let server = Server::start(&world);
    let mut hand = Hand::new(&server);
    let zeta = plain("zeta", "1.0");
    hand.wheel("demo", "1.0", &with_licenses("demo", "1.0")).wheel("zeta", "1.0", &zeta).publish();
    let mut node = device(&world, &server);
    node.until("reset");
    node.until("reset");
    assert_eq!(node.rest(), Rest::Running);
    assert_eq!(node.versions(), json!({"mpy-blox": "0.6.0", "demo": "1.0", "zeta": "1.0"}));

    // By a `cmd`, as Mpy-BLOX's own script sends it: nobody looks at that.
    hand.wheel("demo", "2.0", &plain("demo", "2.0")).command();
    node.until("error");
    drop(node);
    assert!(!world.path(NODE).join("lib/demo-1.0.dist-info/METADATA").exists());

    let mut node = device(&world, &server);
    let seen = node.until("info");
    assert_eq!(seen["versions"], json!({}), "it finds nothing any more");
    node.until("reset"); // repaired
    // The channel still says 1.0; a downgrade is an upgrade to it.
    assert_eq!(node.rest(), Rest::Running);
    let versions = node.versions();
    assert_eq!(
        (&versions["demo"], &versions["zeta"], &versions["mpy-blox"]),
        (&json!("1.0"), &json!("1.0"), &json!("0.6.0"))
    );
    assert!(server.log().contains("no longer finds packages"));
    told(&server, "");

    // It upgrades as ever.
    hand.wheel("demo", "3.0", &plain("demo", "3.0")).wheel("zeta", "1.1", &plain("zeta", "1.1")).publish();
    while node.versions()["zeta"] != "1.1" {
        node.until("info");
    }
    assert_eq!(node.rest(), Rest::Running);
    assert_eq!(node.versions()["demo"], "3.0");
}

#[test]
fn a_wheel_with_licenses_is_upgraded_without_wedging() {
    let world = World::new();
    let server = Server::start(&world);
    let mut hand = Hand::new(&server);
    hand.wheel("demo", "1.0", &with_licenses("demo", "1.0")).publish();
    let mut node = device(&world, &server);
    node.until("reset");
    assert_eq!(node.rest(), Rest::Running);
    for version in ["2.0", "3.0"] {
        hand.wheel("demo", version, &with_licenses("demo", version)).publish();
        while node.versions()["demo"] != version {
            node.until("info");
        }
        assert_eq!(node.rest(), Rest::Running);
    }
    assert_eq!(file(&world, "lib/demo/__init__.py"), "V = '3.0'\n");
    assert!(node.said().iter().all(|event| event["event"] != "error"));
}

#[test]
fn a_broker_killed_in_the_middle_of_a_first_install_goes_on_with_it() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "1.0.0");
    publish(&world, &server);
    let mut node = device(&world, &server);
    node.until("subscribe");
    server.kill();
    assert!(matches!(node.rest(), Rest::Deaf | Rest::Running));
    drop(node); // it never connects again by itself
    let server = Server::start(&world);
    let mut node = device(&world, &server);
    while node.versions()["blink"] != "1.0.0" || file(&world, "main.py").is_empty() {
        node.event();
    }
    while node.rest() != Rest::Running {}
    drop(node);
    let mut node = device(&world, &server);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 0));
}

#[test]
fn a_node_that_waits_for_ever_is_freed_and_not_asked_again() {
    let world = World::new();
    let data = world.text("data");
    let config = world.write("broker.toml", "[limits]\nmpyblox_patience = \"300ms\"\n");
    let config = config.to_str().unwrap().to_owned();
    let server = Server::launch(
        &world,
        &["serve", "--listen", "127.0.0.1:0", "--data", &data, "--config", &config],
        1,
    );
    let mut hand = Hand::new(&server);
    // Nobody can see from here which folders it has.
    hand.src("data/x.json", "{}\n").publish();
    let mut node = device(&world, &server);
    assert!(matches!(node.rest(), Rest::Hangs(_)));
    assert_eq!(node.rest(), Rest::Running);
    told(&server, "stuck: ");
    drop(node);
    let mut node = device(&world, &server);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 0));
    // With the folder there, an operator's word is enough.
    std::fs::create_dir(world.path(NODE).join("data")).unwrap();
    hand.order(r#"[{"type":"check"}]"#);
    node.until("reset");
    assert_eq!(node.rest(), Rest::Running);
    assert_eq!(file(&world, "data/x.json"), "{}\n");
}

#[test]
fn a_node_that_is_not_to_update_by_itself_does_not() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "1.0.0");
    publish(&world, &server);
    let mut node = Blox::start(&world, &server, NODE, "dev", &["auto=0"]);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 0));
    let fetched = |event: &&Value| event["topic"].as_str().is_some_and(|topic| topic.contains("packages"));
    assert_eq!(node.said().iter().find(fetched), None);
}

#[test]
fn a_wheel_that_a_node_never_gets_is_given_up_and_it_runs_on() {
    let world = World::new();
    let server = Server::start(&world);
    let mut hand = Hand::new(&server);
    // No auto-update: it never takes what is delivered, but starts again and again.
    hand.wheel("demo", "1.0", &plain("demo", "1.0")).publish();
    for start in 1..=5 {
        let mut node = Blox::start(&world, &server, NODE, "dev", &["auto=0"]);
        assert_eq!(node.rest(), Rest::Running);
        assert_eq!(node.lists().len(), if start <= 3 { 2 } else { 1 }, "start {start}");
    }
    let error = told(&server, "held-back: wheel `demo` 1.0").error.unwrap();
    assert!(error.contains("may be set not to update by itself"), "{error}");
}

#[test]
fn earlier_generations_are_served() {
    for options in [
        &["layout=flat", "mqtt=4", "info=0"][..],
        &["layout=path", "mqtt=4", "info=0"],
        &["layout=path", "mqtt=4"],
        &["layout=digest", "mqtt=5", "subscribe_flags=0"],
        &["keep_alive=30"],
    ] {
        let world = World::new();
        let server = Server::start(&world);
        let mut hand = Hand::new(&server);
        hand.wheel("demo", "1.0", &plain("demo", "1.0")).publish();
        // It has the package already: they had no way to be given one.
        let mut node = device(&world, &server);
        node.until("reset");
        assert_eq!(node.rest(), Rest::Running);
        drop(node);
        hand.wheel("demo", "2.0", &plain("demo", "2.0")).src("lib/x.py", "1\n").publish();
        let mut node = Blox::start(&world, &server, NODE, "dev", options);
        assert_eq!((node.rest(), node.resets()), (Rest::Running, 1), "{options:?}");
        assert_eq!(file(&world, "lib/demo/__init__.py"), "V = '2.0'\n", "{options:?}");
        assert_eq!(file(&world, "lib/x.py"), "1\n", "{options:?}");
    }
}

#[test]
fn an_earlier_generation_gets_the_file_of_its_own_channel() {
    let world = World::new();
    let server = Server::start(&world);
    let mut hand = Hand::new(&server);
    hand.src("main.py", "stable\n");
    let list = Value::Array(std::mem::take(&mut hand.entries)).to_string();
    assert!(hand.client.retain("mpypi/channels/stable", list.as_bytes()));
    hand.src("main.py", "dev\n").publish();
    for layout in ["layout=flat", "layout=path"] {
        for channel in ["stable", "dev"] {
            let id = format!("{channel}-{}", &layout[7..]);
            let mut node = Blox::start(&world, &server, &id, channel, &[layout, "mqtt=4", "info=0"]);
            assert_eq!((node.rest(), node.resets()), (Rest::Running, 1));
            let found = std::fs::read_to_string(world.path(&id).join("main.py")).unwrap();
            assert_eq!(found, format!("{channel}\n"));
        }
    }
}

#[test]
fn info_is_kept_although_it_comes_without_the_flag_but_only_the_nodes_own() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "esp32-1");
    let info = br#"{"uname":{"sysname":"esp32","machine":"","version":""},"versions":{}}"#;
    for (topic, payload) in [("esp32-1/info", &info[..]), ("esp32-2/info", info), ("esp32-1/log", b"text")] {
        let id = client.post(&format!("mpypi/nodes/{topic}"), payload, 1, false);
        assert_eq!(client.acknowledged(), id);
    }
    let mut reader = Client::connect(server.address, "reader");
    assert_eq!(reader.retained("mpypi/nodes/esp32-1/info").unwrap().payload, info);
    assert_eq!(reader.retained("mpypi/nodes/esp32-2/info"), None);
    assert_eq!(reader.retained("mpypi/nodes/esp32-1/log"), None);
    // Nothing at all says nothing.
    let id = client.post("mpypi/nodes/esp32-1/info", b"", 1, false);
    assert_eq!(client.acknowledged(), id);
    assert!(reader.retained("mpypi/nodes/esp32-1/info").is_some());
}

#[test]
fn what_one_node_says_changes_nothing_for_another() {
    let world = World::new();
    let server = Server::start(&world);
    let mut hand = Hand::new(&server);
    let list = hand.wheel("demo", "1.0", &plain("demo", "1.0")).publish();
    let mut watcher = Client::connect(server.address, "watcher");
    watcher.subscribe("mpypi/nodes/+/cmd", 1);

    let mut victim = Client::connect(server.address, "victim");
    let ours =
        br#"{"uname":{"sysname":"linux","machine":"","version":""},"versions":{},"agent":"mpypi-agent/1"}"#;
    victim.post("mpypi/nodes/victim/info", ours, 1, true);
    assert!(victim.acknowledged().is_some());
    victim.subscribe("mpypi/nodes/victim/cmd", 0);
    victim.subscribe("mpypi/channels/dev", 0);
    assert_eq!(victim.message().unwrap().payload, list.as_bytes());

    let mut evil = Client::connect(server.address, "evil");
    let blox = br#"{"uname":{"sysname":"esp32","machine":"","version":""},"versions":{"core":"1"}}"#;
    for name in ["victim", "evil", "hand", "watcher"] {
        assert!(evil.retain(&format!("mpypi/nodes/{name}/info"), blox));
    }
    for _ in 0..10 {
        evil.subscribe("mpypi/channels/dev", 0);
        evil.fence();
    }
    let mut errands = 0;
    while evil.waits() {
        errands += usize::from(!evil.message().unwrap().retain);
    }
    assert_eq!(errands, 3, "to itself, and not for ever");
    victim.fence();
    watcher.fence();
    assert!(!victim.waits() && !watcher.waits());
    // Whoever only reads gets what was published.
    assert_eq!(published(&mut watcher), list);
    victim.subscribe("mpypi/channels/dev", 0);
    assert_eq!(victim.message().unwrap().payload, list.as_bytes());
}

#[test]
fn a_refused_message_does_not_send_a_node_away_that_would_never_come_back() {
    let world = World::new();
    let server = Server::start(&world);
    let mut node = Client::connect(server.address, "esp32-1");
    let info = br#"{"uname":{"sysname":"esp32","machine":"","version":""},"versions":{}}"#;
    node.post("mpypi/nodes/esp32-1/info", info, 0, false);
    node.post("mpypi/channels/no such", b"x", 0, false);
    // Settled by then: an answer keeps its place.
    assert!(node.retain("mpypi/nodes/esp32-1/online", b"1"));
    let mut other = Client::connect(server.address, "other");
    other.post("mpypi/channels/no such", b"x", 0, false);
    assert!(other.is_closed());
}

#[test]
fn twenty_nodes_are_served_at_once() {
    let world = World::new();
    let server = Server::start(&world);
    let mut hand = Hand::new(&server);
    hand.wheel("demo", "1.0", &plain("demo", "1.0")).src("main.py", "1\n").publish();
    let mut nodes: Vec<_> =
        (0..20).map(|n| Blox::start(&world, &server, &format!("esp32-{n}"), "dev", &[])).collect();
    for node in &mut nodes {
        node.until("reset");
        node.until("reset");
        assert_eq!(node.rest(), Rest::Running);
    }
}

/// What a release of a careless publisher may hold for a package.
fn careless(random: &mut fastrand::Rng, hand: &mut Hand, name: &str) {
    let version = format!("{}.0", random.u8(1..5));
    let file = format!("{name}/__init__.py");
    let content = format!("# {}\n", random.u32(..));
    let files = [(&*file, &*content)];
    let licenses = [("licenses/LICENSE", "free\n")];
    let (said, made) = match random.u8(..9) {
        0..=2 => (&version, wheel(name, &version, ANY, &files, &[], "")),
        3..=4 => (&version, wheel(name, &version, ANY, &files, &licenses, "")),
        5 => (&version, wheel(name, &version, ANY, &files, &[], "\nA description\n")),
        6 => (&version, wheel(name, &format!("{version}.0"), ANY, &files, &[], "")),
        7 => (&version, wheel(name, &version, "mpy6-bytecode-rp2", &files, &[], "")),
        _ => return,
    };
    hand.wheel(name, said, &made);
}

/// However careless the releases: a node always boots, starts again only a few times for each, and takes the next good
/// one whole.
fn survives_careless_releases(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let world = World::new();
    let mut server = Server::start(&world);
    let mut hand = Hand::new(&server);
    let mut node = device(&world, &server);
    assert_eq!(node.rest(), Rest::Running);
    for release in 0..6 {
        let is_good = release == 5;
        for name in ["alpha", "beta", "gamma"] {
            match is_good {
                true => drop(hand.wheel(name, "9.0", &plain(name, "9.0"))),
                false => careless(&mut random, &mut hand, name),
            }
        }
        for path in ["main.py", "lib/x.py"] {
            if random.bool() || is_good {
                hand.src(path, &format!("# {release} {}\n", random.u8(..4)));
            }
        }
        if random.bool() {
            hand.src("empty.py", "");
        }
        let before = match random.u8(..3) {
            // The release comes while it runs…
            0 => {
                hand.publish();
                node.until("list");
                node.resets()
            }
            // …while it is off: power lost in the middle of writing is nothing that it survives…
            1 => {
                drop(node);
                hand.publish();
                node = device(&world, &server);
                0
            }
            // …and while the broker is, too.
            _ => {
                drop(node);
                hand.publish();
                drop(hand);
                server.kill();
                server = Server::start(&world);
                hand = Hand::new(&server);
                node = device(&world, &server);
                0
            }
        };
        assert_eq!(node.rest(), Rest::Running, "seed {seed}, release {release}");
        // For each wheel at most a new name, and itself; then all the rest.
        let resets = node.resets() - before;
        assert!(resets <= 7, "seed {seed}, release {release}: {resets} starts");
        assert!(node.said().iter().all(|event| event["event"] != "error"), "seed {seed}, release {release}");
    }
    let versions = node.versions();
    for name in ["alpha", "beta", "gamma"] {
        assert_eq!(versions[name], "9.0", "seed {seed}: {versions}");
        assert_eq!(file(&world, &format!("lib/{name}/__init__.py")), "V = '9.0'\n", "seed {seed}");
    }
    assert!(file(&world, "main.py").starts_with("# 5 ") && file(&world, "lib/x.py").starts_with("# 5 "));
}

#[test]
fn careless_releases_never_hang_a_node_and_never_loop_it() {
    let rounds = std::env::var("MPYPI_ROUNDS").map_or(5, |rounds| rounds.parse().unwrap());
    let first = std::env::var("MPYPI_SEED").map_or(0, |seed| seed.parse().unwrap());
    (first..first + rounds).for_each(survives_careless_releases);
}
