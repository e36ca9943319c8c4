//! Fleets on a bad day: faults, expectations, reports and exit codes, as CI uses them.

use std::{
    collections::BTreeSet,
    fs,
    sync::{Arc, Mutex},
};

use mpypi_protocol::node::{Phase, State};
use mpypi_tests::{Client, Output, Proxy, Running, Server, Verdict, World, run};
use serde_json::Value;

/// A channel of some files and a wheel.
fn channel(world: &World, main: &str) {
    world.write("dev/src/main.py", main);
    world.write("dev/src/data/table.bin", [1, 2, 3, 5].repeat(3000));
    world.write("dev/src/none.py", "");
    world.write("dev/wheels/blink/pyproject.toml", "[project]\nname = \"blink\"\nversion = \"1.0.0\"\n");
    world.write("dev/wheels/blink/blink/__init__.py", "__version__ = '1.0.0'\n");
}

fn publish(world: &World, server: &Server) {
    let _ = run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
}

fn fleet(server: &Server, arguments: &[&str]) -> Output {
    run(
        "mpypi-agent",
        &[&["fleet", "--broker", &server.url(), "--confirm-after", "100ms"], arguments].concat(),
    )
}

/// Waits until so many devices say that they are on the release of this number.
fn wait_until_applied(server: &Server, devices: usize, sequence: u64) {
    let mut client = Client::connect(server.address, "watcher");
    client.subscribe("mpypi/nodes/+/state", 0);
    let mut applied = BTreeSet::new();
    while applied.len() < devices {
        let message = client.message().expect("devices apply the release");
        let state = State::parse(&message.payload).unwrap();
        if (state.phase, state.sequence) == (Phase::Idle, Some(sequence))
            && message.topic.contains("/device-")
        {
            applied.insert(message.topic);
        }
    }
}

#[test]
fn after_a_hostile_day_every_device_has_the_release_and_not_a_wrong_byte() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "print(1)\n");
    publish(&world, &server);
    let (report, junit) = (world.text("fleet.json"), world.text("fleet.xml"));
    let until =
        ["--nodes", "120", "--profile", "hostile", "--seed", "7", "--faults-for", "8s", "--for", "100s"];
    let releases = ["--releases", "1", "--report", &report, "--junit", &junit];
    let expected = ["--expect", "applied=100%", "--expect", "bricked=0", "--expect", "unfinished=0"];
    let fleet = fleet(&server, &[&until[..], &releases, &expected].concat()).expect_code(0);
    assert!(fleet.stdout.contains("applied=100%") && !fleet.stdout.contains("NOT MET"), "{}", fleet.stdout);

    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert_eq!((&report["schema"], &report["good"]), (&"mpypi-fleet/1".into(), &true.into()));
    for blow in ["power_cuts", "crashes", "naps"] {
        assert!(report["blows"][blow].as_u64().unwrap() > 0, "{blow}: {}", report["blows"]);
    }
    assert!(report["blows"]["connections"].as_u64().unwrap() > 120, "no connection broke");
    assert!(report["platforms"].as_object().unwrap().len() > 2, "{}", report["platforms"]);
    let junit = fs::read_to_string(junit).unwrap();
    assert!(junit.contains(r#"tests="3""#) && junit.contains(r#"failures="0""#), "{junit}");
}

/// A channel that one key signs, under a root; its devices' options.
fn signed_channel(world: &World, server: &Server) -> [String; 2] {
    let passphrase = world.write("passphrase", "correct horse").to_str().unwrap().to_owned();
    let keys = |arguments: &[&str]| {
        let whose = ["--keys", &world.text("keys"), "--passphrase-file", &passphrase];
        run("mpypi", &[&["keys"], arguments, &whose].concat()).expect_code(0).stdout
    };
    let _ = keys(&["new", "--ed25519", "r1", "dev-2026"]);
    let _ = keys(&["root", "new", "--key", "r1"]);
    let _ = keys(&["delegate", "dev", "--key", "dev-2026"]);
    let _ = keys(&["root", "sign"]);
    let _ = keys(&["root", "publish", "--broker", &server.url()]);
    let root = keys(&["export"]);
    world.write("dev/channel.toml", "key = \"dev-2026\"\n");
    ["--pin".to_owned(), world.write("root.json", root).to_str().unwrap().to_owned()]
}

fn publish_signed(world: &World, server: &Server) {
    let (keys, passphrase) = (world.text("keys"), world.text("passphrase"));
    let whose = ["--keys", &keys, "--passphrase-file", &passphrase];
    let publish = ["publish", &world.text("dev"), "--broker", &server.url()];
    let _ = run("mpypi", &[&publish[..], &whose].concat()).expect_code(0);
}

#[test]
fn whoever_sits_between_broker_and_devices_brings_nothing_onto_any_of_them() {
    let world = World::new();
    let server = Server::start(&world);
    let [pin, root] = signed_channel(&world, &server);
    channel(&world, "print(1)\n");
    publish_signed(&world, &server);
    let profile = "join = \"1s\"\ncheck = \"300ms\"\n[intruder]\nswapped-packages = \"10%\"\n\
                   endless-data = \"5%\"\nold-lists = \"20%\"\ncorrupted-lists = \"20%\"\nforged-lists = \"20%\"\n";
    let profile = world.write("intruder.toml", profile);
    let (profile, report) = (profile.to_str().unwrap(), world.text("fleet.json"));
    let page = world.text("fleet.html");
    let options =
        ["--nodes", "60", "--profile", profile, "--seed", "11", "--faults-for", "5s", "--for", "100s"];
    let expected = ["--releases", "2", "--expect", "applied=100%", "--expect", "bricked=0"];
    let reports = ["--report", &report, "--html", &page, &pin, &root];
    let beside = ["fleet", "--broker", &server.url(), "--confirm-after", "50ms"];
    let fleet = Running::start("mpypi-agent", &[&beside[..], &options, &expected, &reports].concat());
    wait_until_applied(&server, 30, 1);
    channel(&world, "print(2)\n");
    publish_signed(&world, &server);
    let fleet = fleet.wait().expect_code(0);
    assert!(fleet.stdout.contains("attacks: corrupted-lists "), "{}", fleet.stdout);

    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let attacks = report["attacks"].as_object().unwrap();
    let all = [
        "swapped-packages",
        "longer-packages",
        "endless-data",
        "old-lists",
        "corrupted-lists",
        "forged-lists",
    ];
    assert!(all.iter().all(|attack| attacks[*attack].as_u64() > Some(0)), "{attacks:?}");
    let refusals = report["refusals"].as_object().unwrap();
    for word in ["wrong-hash", "wrong-size", "rollback", "bad-signature", "unknown-key", "unsigned"] {
        assert!(refusals.get(word).and_then(Value::as_u64) > Some(0), "{word}: {refusals:?}");
    }
    // What was refused is no release that anybody failed to apply.
    assert_eq!(report["releases"].as_array().unwrap().len(), 2, "{}", report["releases"]);
    assert!(fs::read_to_string(page).unwrap().contains("<h2>Attacks</h2>"));

    let alone = ["--node", "7", "--profile", profile, "--seed", "11", "--faults-for", "2s", "--for", "60s"];
    let alone =
        self::fleet(&server, &[&alone[..], &["--releases", "1", &pin, &root]].concat()).expect_code(0);
    assert!(alone.stderr.contains(", under attack ("), "{}", alone.stderr);
}

#[test]
fn old_agents_and_devices_with_mpy_blox_converge_beside_the_others() {
    let world = World::new();
    let server = Server::start(&world);
    let change = |version: &str| {
        world.write("dev/src/main.py", format!("print('{version}')\n"));
        let project = format!("[project]\nname = \"blink\"\nversion = \"{version}\"\n");
        world.write("dev/wheels/blink/pyproject.toml", project);
        world.write("dev/wheels/blink/blink/__init__.py", format!("__version__ = '{version}'\n"));
        world.write("dev/wheels/blink/blink/same.py", "SAME = 1\n");
        publish(&world, &server);
    };
    change("1.0.0");
    let profile = "[agents]\nold = \"30%\"\nmpy-blox = \"30%\"\n[platforms]\nesp32 = \"100%\"\n";
    let profile = world.write("mixed.toml", profile);
    let (profile, report, disk) =
        (profile.to_str().unwrap(), world.text("fleet.json"), world.text("devices"));
    let options =
        ["--nodes", "20", "--profile", profile, "--seed", "4", "--faults-for", "0s", "--for", "100s"];
    let expected = ["--releases", "2", "--expect", "applied=100%", "--expect", "bricked=0"];
    let more = ["--report", &report, "--disk", &disk, "--broker", &server.url(), "--confirm-after", "50ms"];
    let fleet = Running::start("mpypi-agent", &[&["fleet"], &options[..], &expected, &more].concat());
    // Of those with Mpy-BLOX the broker alone says where they stand.
    wait_until_applied(&server, 10, 1);
    change("1.1.0");
    let _ = fleet.wait().expect_code(0);

    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    for agent in ["current", "old", "mpy-blox"] {
        let cohorts = report["cohorts"].as_array().unwrap();
        let cohort = cohorts.iter().find(|cohort| cohort["by"] == "agent" && cohort["name"] == agent);
        let cohort = cohort.unwrap_or_else(|| panic!("no {agent}: {cohorts:?}"));
        assert_eq!((cohort["nodes"].as_u64() > Some(1), &cohort["nodes"]), (true, &cohort["applied"]));
    }
    for n in 1..=20 {
        let files = world.files(&format!("devices/device-{n}"));
        assert_eq!(files["main.py"], b"print('1.1.0')\n", "device {n}");
        assert_eq!(files["lib/blink/__init__.py"], b"__version__ = '1.1.0'\n", "device {n}");
    }
}

#[test]
fn a_device_that_stops_leaves_when_its_last_state_is_acknowledged_and_not_before() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "print(1)\n");
    publish(&world, &server);
    // Publishes of QoS 1 without an acknowledgement, and those that a goodbye found.
    let counts = Arc::new(Mutex::new((0i64, Vec::new())));
    let seen = counts.clone();
    let line = Proxy::start(server.address, move |client, packet| {
        let (open, left) = &mut *seen.lock().unwrap();
        match (client, packet[0] >> 4, packet[0] & 0x06) {
            (true, 3, 0x02) => *open += 1,
            (false, 4, _) => *open -= 1,
            (true, 14, _) => left.push(*open),
            _ => {}
        }
        Verdict::Pass
    });
    let options = ["--nodes", "1", "--releases", "1", "--for", "60s", "--confirm-after", "50ms"];
    let _ = run("mpypi-agent", &[&["fleet", "--broker", &line.url()], &options[..]].concat()).expect_code(0);
    assert_eq!(counts.lock().unwrap().1, [0]);
    let mut reader = Client::connect(server.address, "reader");
    let state = State::parse(&reader.retained("mpypi/nodes/device-1/state").unwrap().payload).unwrap();
    assert_eq!((state.phase, state.sequence), (Phase::Idle, Some(1)));
}

#[test]
fn a_release_that_breaks_some_devices_is_noticed_and_each_of_them_can_be_seen_alone() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "print(1)\n");
    publish(&world, &server);
    let profile = world.write("bad.toml", "[application]\nbroken = \"20%\"\n");
    let profile = profile.to_str().unwrap();
    let junit = world.text("fleet.xml");
    let options = ["--nodes", "60", "--profile", profile, "--seed", "3", "--for", "6s", "--junit", &junit];
    let fleet =
        fleet(&server, &[&options[..], &["--expect", "applied=100%", "--json"]].concat()).expect_code(3);
    let report = fleet.json();
    let metrics = &report["metrics"];
    let rolled_back = metrics["rolled_back"].as_u64().unwrap();
    assert!((4..=24).contains(&rolled_back), "{metrics}");
    assert_eq!(metrics["applied"].as_u64().unwrap() + rolled_back, 60, "{metrics}");
    assert_eq!(metrics["bricked"], 0);
    assert_eq!(report["expectations"][0]["met"], false);
    let junit = fs::read_to_string(junit).unwrap();
    let failures = rolled_back + 1;
    assert!(junit.contains(&format!(r#"failures="{failures}""#)), "{junit}");

    let number = report["troubled"][0]["number"].to_string();
    let name = report["troubled"][0]["device"].as_str().unwrap();
    let alone =
        ["--node", &number, "--profile", profile, "--seed", "3", "--for", "3s", "--expect", "applied=1"];
    let alone = self::fleet(&server, &alone).expect_code(3);
    assert!(alone.stderr.contains(&format!("{name}  the application crashes")), "{}", alone.stderr);
    assert!(alone.stderr.contains("rolled back: not-confirmed: "), "{}", alone.stderr);
    // Every message and connection of it.
    for step in [" s  has a connection", "mpypi/channels/dev, "] {
        assert!(alone.stderr.contains(step), "{step}: {}", alone.stderr);
    }
    let sound = (1..=60).find(|n| {
        let name = format!("device-{n}");
        report["troubled"].as_array().unwrap().iter().all(|troubled| troubled["device"] != name.as_str())
    });
    let sound = sound.unwrap().to_string();
    let alone =
        ["--node", &sound, "--profile", profile, "--seed", "3", "--releases", "1", "--faults-for", "0s"];
    let _ = self::fleet(&server, &alone).expect_code(0);
}

#[test]
fn an_upgrade_of_one_file_costs_a_tenth_of_the_release_at_the_socket() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "print(1)\n");
    for n in 0..16 {
        world.write(&format!("dev/src/page_{n}.html"), format!("{n}-----").repeat(600));
    }
    publish(&world, &server);
    let options = [
        "--nodes",
        "40",
        "--profile",
        "lab",
        "--faults-for",
        "0s",
        "--releases",
        "2",
        "--for",
        "100s",
        "--broker",
        &server.url(),
    ];
    let expected =
        ["--expect", "applied=100%", "--expect", "bytes<=10%", "--json", "--confirm-after", "50ms"];
    let fleet = Running::start("mpypi-agent", &[&["fleet"], &options[..], &expected].concat());
    wait_until_applied(&server, 40, 1);
    channel(&world, "print(2)\n");
    publish(&world, &server);
    let report = fleet.wait().expect_code(0).json();
    let [first, second] = [0, 1].map(|n| &report["releases"][n]);
    assert_eq!((&first["applied"], &second["applied"]), (&40.into(), &40.into()));
    assert!(first["wire_bytes"].as_u64() >= first["size"].as_u64().map(|size| size * 40), "{first}");
}

#[test]
fn a_release_is_rehearsed_in_one_command_beside_what_devices_have() {
    let world = World::new();
    channel(&world, "print(1)\n");
    world.write("stable/src/main.py", "print(0)\n");
    world.write("stable/src/leaves.py", "print(0)\n");
    let (dev, report) = (world.text("dev"), world.text("fleet.json"));
    let unsteady = world
        .write("unsteady.toml", "join = \"1s\"\n[link]\nlatency = \"0ms..50ms\"\ndisconnects = \"3s\"\n");
    let unsteady = unsteady.to_str().unwrap();
    let options = ["--nodes", "60", "--profile", unsteady, "--for", "12s", "--against", "stable"];
    let more = ["--expect", "applied=100%", "--expect", "bricked=0", "--report", &report];
    let good = run("mpypi", &[&["rehearse", &dev], &options[..], &more].concat()).expect_code(0);
    assert!(good.stdout.contains("release 2: applied by 60 of 60 nodes"), "{}", good.stdout);
    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert_eq!(report["releases"].as_array().unwrap().len(), 2);

    let profile = world.write("bad.toml", "[application]\nbroken = \"50%\"\n");
    let options = ["--nodes", "20", "--for", "6s", "--profile", profile.to_str().unwrap()];
    let bad = run("mpypi", &[&["rehearse", &dev], &options[..]].concat()).expect_code(3);
    assert!(bad.stderr.contains("it should not go to devices as it is"), "{}", bad.stderr);
    assert!(bad.stdout.contains("NOT MET"), "{}", bad.stdout);

    world.write("dev/channel.toml", "compil = \"mpy\"\n");
    let wrong = run("mpypi", &["rehearse", &dev]).expect_code(1);
    assert!(wrong.stderr.contains("unknown key `compil`"), "{}", wrong.stderr);
}

/// How many devices see the broker killed; more in `make soak`.
fn devices() -> usize {
    std::env::var("MPYPI_NODES").ok().and_then(|number| number.parse().ok()).unwrap_or(150)
}

#[test]
fn a_fleet_outlives_a_broker_that_is_killed_five_times_during_a_rollout() {
    let world = World::new();
    let mut server = Server::start(&world);
    let address = server.address.to_string();
    channel(&world, "print(1)\n");
    publish(&world, &server);
    let (devices, report) = (devices(), world.text("fleet.json"));
    let count = devices.to_string();
    let options =
        ["--nodes", &count, "--profile", "home-wifi", "--seed", "5", "--faults-for", "3s", "--for", "10m"];
    let expected = ["--expect", "applied=100%", "--expect", "bricked=0", "--report", &report];
    let options =
        [&["fleet", "--broker", &server.url(), "--confirm-after", "100ms"], &options[..], &expected];
    let fleet = Running::start("mpypi-agent", &options.concat());
    wait_until_applied(&server, devices, 1);
    channel(&world, "print(2)\n");
    publish(&world, &server);
    for tenth in 1..=5 {
        // In the middle of it: more have the release each time.
        wait_until_applied(&server, devices * tenth / 10, 2);
        server.kill();
        server = Server::start_with(&world, &["--listen", &address]);
    }
    // It goes on until told: who is done says so again to the broker that forgot, when it comes back.
    wait_until_applied(&server, devices, 2);
    fleet.signal("-INT");
    let fleet = fleet.wait().expect_code(0);
    // Shown by `--nocapture`: how they came back.
    println!("{}", fleet.stdout);
    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert_eq!(report["metrics"]["applied"], devices);
    let reconnects = &report["reconnects"];
    let came_back = reconnects["count"].as_u64().unwrap() as usize;
    // Who is still waiting when the broker is killed again comes back once for both.
    assert!(came_back > devices, "{reconnects}");
    // Pauses are drawn anew for each: they do not come back all at once.
    let bins = reconnects["after"].as_array().unwrap();
    let largest = bins.iter().map(|bin| bin["count"].as_u64().unwrap() as usize).max().unwrap();
    assert!(largest < came_back * 9 / 10, "a herd: {reconnects}");
    assert!(fleet.stdout.contains("reconnected: "), "{}", fleet.stdout);
}

#[test]
fn what_is_no_profile_or_expectation_is_refused_before_anything_is_done() {
    let world = World::new();
    let unknown = run("mpypi-agent", &["fleet", "--profile", "moon"]).expect_code(1);
    assert!(unknown.stderr.contains("there is no profile `moon`"), "{}", unknown.stderr);
    assert!(unknown.stderr.contains("hint: use one of `lab`"), "{}", unknown.stderr);
    let wrong = world.write("wrong.toml", "[link]\nlost = \"3\"\n");
    let wrong = run("mpypi-agent", &["fleet", "--profile", wrong.to_str().unwrap()]).expect_code(1);
    assert!(wrong.stderr.contains("from 0% to 100%"), "{}", wrong.stderr);
    let usage = run("mpypi-agent", &["fleet", "--expect", "aplied=100%"]).expect_code(2);
    assert!(usage.stderr.contains("applied=100%"), "{}", usage.stderr);
    let shown = run("mpypi-agent", &["fleet", "--show-profile", "cellular"]).expect_code(0);
    assert!(shown.stdout.contains("[link]"), "{}", shown.stdout);
}
