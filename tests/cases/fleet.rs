//! Releases on their way to devices: the whole of it, with the programs as users run them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use mpypi_protocol::{Digest, PackageId, node::State};
use mpypi_tests::{Client, Output, Proxy, Running, Server, Verdict, World, run};
use serde_json::Value;

/// A channel with a wheel project, some files, one of them empty, and what is not to be sent.
fn channel(world: &World) {
    world.write("dev/src/main.py", "import blink\n");
    world.write("dev/src/old.py", "# leaves with the next release\n");
    world.write("dev/src/assets/logo.bin", [0, 1, 2, 255].repeat(5000));
    world.write("dev/src/lib/empty.py", "");
    world.write("dev/src/.gitignore", "*.tmp\n");
    world.write("dev/src/scratch.tmp", "not sent");
    world.write("dev/wheels/blink/pyproject.toml", "[project]\nname = \"blink\"\nversion = \"1.0.0\"\n");
    world.write("dev/wheels/blink/blink/__init__.py", "__version__ = '1.0.0'\n");
    world.write("dev/wheels/blink/blink/led.py", "PIN = 2\n");
}

/// What a device of that channel has, apart from the wheel's dist-info.
fn expected(world: &World) -> BTreeMap<String, Vec<u8>> {
    let mut files = world.files("dev/src");
    files.remove("scratch.tmp");
    for (path, content) in world.files("dev/wheels/blink/blink") {
        files.insert(format!("lib/blink/{path}"), content);
    }
    files
}

fn device(world: &World, folder: &str) -> BTreeMap<String, Vec<u8>> {
    let mut files = world.files(folder);
    files.retain(|path, _| !path.contains(".dist-info/"));
    files
}

fn publish(world: &World, broker: &str) -> Value {
    run("mpypi", &["publish", &world.text("dev"), "--broker", broker, "--json"]).expect_code(0).json()
}

fn fleet(world: &World, broker: &str, nodes: &str, folder: &str) -> Output {
    let folder = world.text(folder);
    let arguments = ["fleet", "--broker", broker, "--channel", "dev", "--nodes", nodes, "--dir", &folder];
    let bounds = ["--releases", "1", "--for", "60s", "--confirm-after", "50ms", "--json"];
    run("mpypi-agent", &[&arguments[..], &bounds].concat())
}

/// Bytes and result of each device.
fn results(fleet: &Value) -> Vec<(u64, String)> {
    let row = |row: &Value| (row["bytes"].as_u64().unwrap(), row["result"].as_str().unwrap().to_owned());
    fleet["results"].as_array().unwrap().iter().map(row).collect()
}

fn state(client: &mut Client, node: &str) -> State {
    let state = client.retained(&format!("mpypi/nodes/{node}/state")).unwrap();
    State::parse(&state.payload).unwrap()
}

fn first_install_upgrade_and_rest(world: &World, server: &Server) {
    channel(world);
    let first = publish(world, &server.url());
    assert_eq!((&first["published"], &first["sequence"]), (&true.into(), &1.into()));
    let all = first["bytes_sent"].as_u64().unwrap();

    let installed = fleet(world, &server.url(), "5", "devices").expect_code(0).json();
    assert_eq!(results(&installed), vec![(all, "applied".to_owned()); 5]);
    for n in 1..=5 {
        assert_eq!(device(world, &format!("devices/device-{n}")), expected(world), "device {n}");
    }

    world.write("dev/src/main.py", "import blink  # changed\n");
    std::fs::remove_file(world.path("dev/src/old.py")).unwrap();
    let second = publish(world, &server.url());
    assert_eq!((&second["sequence"], &second["packages"]["sent"]), (&2.into(), &1.into()));
    let upgraded = fleet(world, &server.url(), "5", "devices").expect_code(0).json();
    let only_main = std::fs::metadata(world.path("dev/src/main.py")).unwrap().len();
    assert_eq!(results(&upgraded), vec![(only_main, "applied".to_owned()); 5]);
    for n in 1..=5 {
        let files = device(world, &format!("devices/device-{n}"));
        assert_eq!(files, expected(world), "device {n}");
        assert!(!files.contains_key("old.py"));
    }
    let mut reader = Client::connect(server.address, "reader");
    let state = state(&mut reader, "device-3");
    assert_eq!((state.phase.to_string(), state.sequence), ("idle".to_owned(), Some(2)));
    assert_eq!(reader.retained("mpypi/nodes/device-3/online").unwrap().payload, b"0");

    // A third time, with nothing changed: not a byte of a package on either line.
    let package_bytes = Arc::new(AtomicU64::new(0));
    let seen = package_bytes.clone();
    let line = Proxy::start(server.address, move |_, packet| {
        if packet[0] >> 4 == 3 && packet.windows(15).any(|part| part == b"mpypi/packages/") {
            seen.fetch_add(packet.len() as u64, Ordering::SeqCst);
        }
        Verdict::Pass
    });
    let third = publish(world, &line.url());
    assert_eq!((&third["published"], &third["sequence"]), (&false.into(), &2.into()));
    let resting = fleet(world, &line.url(), "5", "devices").expect_code(0).json();
    assert_eq!(results(&resting), vec![(0, "applied".to_owned()); 5]);
    assert_eq!(package_bytes.load(Ordering::SeqCst), 0);
}

#[test]
fn five_devices_install_upgrade_and_rest() {
    let world = World::new();
    let server = Server::start(&world);
    first_install_upgrade_and_rest(&world, &server);
}

#[test]
fn five_devices_install_upgrade_and_rest_with_mosquitto_as_the_broker() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    first_install_upgrade_and_rest(&world, &server);
}

#[test]
fn fifty_devices_in_one_process_all_apply() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world);
    publish(&world, &server.url());
    let fleet = fleet(&world, &server.url(), "50", "devices").expect_code(0).json();
    assert_eq!(results(&fleet).len(), 50);
    assert_eq!(fleet["applied"], true);
}

#[test]
fn a_package_corrupted_on_its_way_is_refused_and_the_old_release_runs_on() {
    for mosquitto in [false, true] {
        let world = World::new();
        let server = if mosquitto { Server::mosquitto(&world) } else { Server::start(&world) };
        channel(&world);
        publish(&world, &server.url());
        let _ = fleet(&world, &server.url(), "2", "devices").expect_code(0);
        let old = expected(&world);

        world.write("dev/src/main.py", "import blink  # the new one\n");
        world.write("dev/src/another.py", "# sound\n");
        publish(&world, &server.url());
        let corrupted = Arc::new(AtomicBool::new(true));
        let on = corrupted.clone();
        let line = Proxy::start(server.address, move |client, packet| {
            let is_main = packet.windows(27).any(|part| part == b"mpypi/packages/src/main.py/");
            if client || packet[0] >> 4 != 3 || !is_main.to_owned() || !on.load(Ordering::SeqCst) {
                return Verdict::Pass;
            }
            let mut packet = packet.to_vec();
            *packet.last_mut().unwrap() ^= 1;
            Verdict::Replace(packet)
        });
        let refused = fleet(&world, &line.url(), "2", "devices").expect_code(3).json();
        for row in refused["results"].as_array().unwrap() {
            assert_eq!(row["result"], "failed");
            assert!(row["error"].as_str().unwrap().starts_with("wrong-hash"), "{row}");
        }
        let mut reader = Client::connect(server.address, "reader");
        for n in 1..=2 {
            assert_eq!(device(&world, &format!("devices/device-{n}")), old);
            let state = state(&mut reader, &format!("device-{n}"));
            assert_eq!((state.phase.to_string(), state.sequence), ("failed".to_owned(), Some(2)));
            assert!(state.error.unwrap().starts_with("wrong-hash"));
        }
        // The next release is another story.
        corrupted.store(false, Ordering::SeqCst);
        world.write("dev/src/main.py", "import blink  # the third one\n");
        publish(&world, &server.url());
        let _ = fleet(&world, &line.url(), "2", "devices").expect_code(0);
        assert_eq!(device(&world, "devices/device-1"), expected(&world));
    }
}

/// A release with one entry, put on the broker by hand, as no publisher of ours would.
fn forge(client: &mut Client, sequence: u64, entry: &str, package: Option<(PackageId, &[u8])>) {
    if let Some((id, bytes)) = package {
        assert!(client.retain(&id.topic(), bytes));
    }
    let release =
        format!(r#"{{"type":"release","channel":"dev","sequence":{sequence},"version":"{sequence}"}}"#);
    assert!(client.retain("mpypi/channels/dev", format!("[{release},{entry}]").as_bytes()));
}

#[test]
fn releases_that_lie_are_refused_with_the_reason_and_the_old_one_runs_on() {
    let world = World::new();
    // mosquitto takes anything: the devices are on their own.
    let server = Server::mosquitto(&world);
    channel(&world);
    publish(&world, &server.url());
    let _ = fleet(&world, &server.url(), "1", "devices").expect_code(0);
    let old = expected(&world);
    let mut forger = Client::connect(server.address, "forger");

    let file = b"print('longer than announced')\n";
    let digest = Digest::of(file);
    let id = PackageId::Src("main.py".parse().unwrap(), digest);
    let src =
        |size: usize| format!(r#"{{"type":"src","path":"main.py","pkg_sha256":"{digest}","size":{size}}}"#);
    let wheel = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        (
            format!(r#"{{"type":"wheel","name":"blink","version":"2","pkg_sha256":"{digest}"}}"#),
            PackageId::Wheel(digest),
        )
    };
    // Half a wheel is what is left of ours after its first half.
    let whole = {
        let list = forger.retained("mpypi/channels/dev").unwrap().payload;
        let list = mpypi_protocol::UpdateList::parse(&list).unwrap();
        let (id, _) = list.packages().find(|(id, _)| matches!(id, PackageId::Wheel(_))).unwrap();
        forger.retained(&id.topic()).unwrap().payload
    };
    let half = &whole[..whole.len() / 2];
    let (half_entry, half_id) = wheel(half);
    let escape =
        format!(r#"{{"type":"src","path":"../escaped.py","pkg_sha256":"{digest}","size":{}}}"#, file.len());

    type Lie<'a> = (&'static str, String, Option<(PackageId, &'a [u8])>);
    let cases: [Lie<'_>; 4] = [
        ("wrong-size", src(file.len() - 1), Some((id.clone(), file))),
        ("wrong-size", src(file.len() + 1), Some((id, file))),
        ("bad-wheel", half_entry, Some((half_id, half))),
        ("bad-list", escape, None),
    ];
    for (n, (reason, entry, package)) in cases.into_iter().enumerate() {
        forge(&mut forger, n as u64 + 2, &entry, package);
        let refused = fleet(&world, &server.url(), "1", "devices").expect_code(3);
        let row = &refused.json()["results"][0];
        assert!(row["error"].as_str().unwrap().starts_with(reason), "{entry}: {row}");
        assert_eq!(device(&world, "devices/device-1"), old, "{entry}");
        assert!(state(&mut forger, "device-1").error.unwrap().starts_with(reason), "{entry}");
    }
    assert!(!world.path("devices/escaped.py").exists());
}

#[test]
fn an_older_list_never_takes_a_device_back() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    channel(&world);
    publish(&world, &server.url());
    let mut replayer = Client::connect(server.address, "replayer");
    let first = replayer.retained("mpypi/channels/dev").unwrap().payload;
    world.write("dev/src/main.py", "import blink  # newer\n");
    publish(&world, &server.url());
    let _ = fleet(&world, &server.url(), "1", "devices").expect_code(0);
    assert!(replayer.retain("mpypi/channels/dev", &first));
    let refused = fleet(&world, &server.url(), "1", "devices").expect_code(3).json();
    assert!(refused["results"][0]["error"].as_str().unwrap().starts_with("rollback"), "{refused}");
    assert_eq!(device(&world, "devices/device-1"), expected(&world));
}

#[test]
fn devices_outlive_a_broker_killed_under_them_and_follow_it_when_it_is_back() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world);
    publish(&world, &server.url());
    let address = server.address.to_string();
    let folder = world.text("devices");
    let arguments =
        ["fleet", "--broker", &server.url(), "--channel", "dev", "--nodes", "5", "--dir", &folder];
    let bounds = ["--releases", "2", "--for", "60s", "--confirm-after", "50ms", "--json"];
    let running = Running::start("mpypi-agent", &[&arguments[..], &bounds].concat());

    let mut reader = Client::connect(server.address, "reader");
    reader.subscribe("mpypi/nodes/+/state", 1);
    let mut idle = std::collections::BTreeSet::new();
    while idle.len() < 5 {
        let message = reader.message().unwrap();
        let state = State::parse(&message.payload).unwrap();
        if state.sequence == Some(1) && state.phase.to_string() == "idle" {
            idle.insert(message.topic);
        }
    }
    server.kill();
    // The same address again, which takes moment and luck only if somebody else wants it.
    let server = Server::start_with(&world, &["--listen", &address]);
    let mut others = Client::connect(address.parse().unwrap(), "publisher");
    others.ping();
    world.write("dev/src/main.py", "import blink  # after the crash\n");
    publish(&world, &server.url());
    let ended = running.wait().expect_code(0).json();
    assert_eq!(results(&ended).len(), 10);
    for n in 1..=5 {
        assert_eq!(device(&world, &format!("devices/device-{n}")), expected(&world), "device {n}");
    }
}

#[test]
fn a_device_that_is_told_to_stop_says_that_it_is_gone() {
    for signal in ["-INT", "-TERM"] {
        let world = World::new();
        let server = Server::start(&world);
        let mut reader = Client::connect(server.address, "reader");
        reader.subscribe("mpypi/nodes/kitchen/online", 1);
        let root = world.text("kitchen");
        let arguments = ["run", "--broker", &server.url(), "--root", &root, "--node", "kitchen"];
        let agent = Running::start("mpypi-agent", &arguments);
        assert_eq!(reader.message().unwrap().payload, b"1");
        agent.signal(signal);
        assert_eq!(reader.message().unwrap().payload, b"0");
        let _ = agent.wait().expect_code(0);
    }
}

#[test]
fn a_device_without_a_broker_says_so_with_a_hint() {
    let world = World::new();
    let root = world.text("node");
    let arguments = ["run", "--broker", "mqtt://127.0.0.1:1", "--root", &root, "--once"];
    let agent = Running::start("mpypi-agent", &arguments);
    // It would try for ever.
    agent.signal("-TERM");
    let ended = agent.wait();
    assert_ne!(ended.code, Some(0));
}

#[test]
fn a_broker_that_lost_its_index_goes_on_where_the_devices_are() {
    let world = World::new();
    channel(&world);
    {
        let server = Server::start(&world);
        publish(&world, &server.url());
        world.write("dev/src/main.py", "import blink  # second\n");
        publish(&world, &server.url());
        let _ = fleet(&world, &server.url(), "1", "devices").expect_code(0);
    }
    std::fs::remove_dir_all(world.path("data")).unwrap();
    let server = Server::start(&world);
    world.write("dev/src/main.py", "import blink  # third\n");
    assert_eq!(publish(&world, &server.url())["sequence"], 1);
    let refused = fleet(&world, &server.url(), "1", "devices").expect_code(3).json();
    let error = refused["results"][0]["error"].as_str().unwrap();
    assert!(error.starts_with("rollback: ") && error.contains('2'), "{error}");

    let folder = world.text("dev");
    let arguments = ["publish", &folder, "--broker", &server.url(), "--sequence"];
    let _ = run("mpypi", &[&arguments[..], &["3"]].concat()).expect_code(0);
    let _ = fleet(&world, &server.url(), "1", "devices").expect_code(0);
    assert_eq!(device(&world, "devices/device-1"), expected(&world));
    let older = run("mpypi", &[&arguments[..], &["2"]].concat()).expect_code(1).stderr;
    assert!(older.contains("not be newer than release 3") && older.contains("hint: "), "{older}");
}

#[test]
fn nobody_reading_what_a_fleet_says_is_no_reason_to_die() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world);
    publish(&world, &server.url());
    let agent = mpypi_tests::program("mpypi-agent");
    let folder = world.text("devices");
    let line = r#""$0" fleet --nodes 3 --dir "$1" --releases 1 --for 60s --broker "$2" 2>&1 | head -n 1; echo "${PIPESTATUS[0]}""#;
    let arguments = ["-c", line, agent.to_str().unwrap(), &folder, &server.url()];
    let output = std::process::Command::new("bash").args(arguments).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.lines().last(), Some("0"), "{output}");
    assert_eq!(device(&world, "devices/device-3"), expected(&world));
}
