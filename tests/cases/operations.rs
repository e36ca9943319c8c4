//! What an operator does: looks, backs up, puts back, cleans, checks, and runs out of disk.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::{UnixDatagram, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use mpypi_protocol::{Digest, PackageId};
use mpypi_tests::{Client, Deadline, Options, Output, PATIENCE, Server, World, bytes, program, run};

fn topic(package: &[u8]) -> String {
    PackageId::Wheel(Digest::of(package)).topic()
}

fn list(channel: &str, sequence: u64, packages: &[&[u8]]) -> Vec<u8> {
    let names: String = packages
        .iter()
        .enumerate()
        .map(|(n, package)| {
            let digest = Digest::of(package);
            format!(r#",{{"type":"wheel","name":"p{n}","version":"1","pkg_sha256":"{digest}"}}"#)
        })
        .collect();
    format!(r#"[{{"type":"release","channel":"{channel}","sequence":{sequence},"version":"1"}}{names}]"#)
        .into_bytes()
}

fn publish(client: &mut Client, channel: &str, sequence: u64, packages: &[&[u8]]) {
    for package in packages {
        assert!(client.retain(&topic(package), package));
    }
    assert!(client.retain(&format!("mpypi/channels/{channel}"), &list(channel, sequence, packages)));
}

/// Runs `mpypi-broker` on the world's folder `data`.
fn command(world: &World, arguments: &[&str]) -> Output {
    let data = world.text("data");
    run("mpypi-broker", &[arguments, &["--data", &data]].concat())
}

/// The value of a metric.
fn metric(server: &Server, name: &str) -> Option<u64> {
    let (code, text) = server.get("/metrics");
    assert_eq!(code, 200);
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn metrics_and_health_tell_what_has_happened() {
    let world = World::new();
    let server = Server::start_with(&world, &["--http", "127.0.0.1:0"]);
    let mut client = Client::connect(server.address, "writer");
    let package = bytes(1, 50_000);
    publish(&mut client, "dev", 1, &[&package]);
    assert_eq!(client.retained(&topic(&package)).unwrap().payload, package);
    assert!(!client.retain("mpypi/channels/dev", b"no list"));
    Client::open(server.address).send(b"GET / HTTP/1.1\r\n\r\n");

    let (code, health) = server.get("/healthz");
    let health: serde_json::Value = serde_json::from_str(&health).unwrap();
    assert_eq!((code, &health["healthy"], &health["stores"]), (200, &true.into(), &true.into()));
    for (name, expected) in [
        ("mpypi_connects_total", 1),
        ("mpypi_received_messages_total", 3),
        ("mpypi_sent_messages_total", 1),
        ("mpypi_publishes_total", 2),
        ("mpypi_publishes_refused_total{reason=\"0x99\"}", 1),
        ("mpypi_sessions_ended_total{reason=\"0x99\"}", 1),
        ("mpypi_retained_messages", 2),
        ("mpypi_retained_bytes", 50_000 + list("dev", 1, &[&package]).len() as u64),
        ("mpypi_blobs", 1),
        ("mpypi_commit_seconds_count", 2),
        ("mpypi_disk_full", 0),
    ] {
        assert_eq!(metric(&server, name), Some(expected), "{name}");
    }
    assert!(metric(&server, "mpypi_received_bytes_total").unwrap() > 50_000);
    assert!(metric(&server, "mpypi_sent_bytes_total").unwrap() > 50_000);
    assert!(metric(&server, "mpypi_disk_free_bytes").unwrap() > 0);
    assert_eq!(server.get("/else").0, 404);
    assert_eq!(server.stop("-TERM"), Some(0));
}

#[test]
fn http_listens_to_other_machines_only_with_users_or_when_told() {
    let world = World::new();
    let data = world.text("data");
    let arguments = ["serve", "--listen", "127.0.0.1:0", "--http", "0.0.0.0:0", "--data", &data];
    let refused = run("mpypi-broker", &arguments).expect_code(1);
    assert!(refused.stderr.contains("http://0.0.0.0:0"), "{}", refused.stderr);
    drop(Server::start_with(&world, &["--http", "0.0.0.0:0", "--unsafe-open"]));
    command(&world, &["user", "add", "ci", "--role", "publisher", "--token"]).expect_code(0);
    let _server = Server::start_with(&world, &["--http", "0.0.0.0:0"]);
}

#[test]
fn sys_topics_are_retained_change_with_time_and_are_nobodys_to_write() {
    let world = World::new();
    let token = command(&world, &["user", "add", "v", "--role", "viewer", "--token"]).expect_code(0);
    let node = command(&world, &["user", "add", "n", "--role", "node", "--token"]).expect_code(0);
    let server = Server::start(&world);
    let enter = |name: &str, token: &Output| {
        let login = Some((name.to_owned(), token.stdout.trim().to_owned()));
        Client::try_connect(server.address, &Options { login, ..Options::id(name) }).unwrap().0
    };
    let mut viewer = enter("v", &token);
    assert_eq!(enter("n", &node).subscribe("$SYS/#", 0), 0x80);
    let version = viewer.retained("$SYS/broker/version").unwrap();
    assert!(version.payload.starts_with(b"mpypi-broker version "));
    assert_eq!(viewer.subscribe("$SYS/#", 0), 0);
    let mut found = std::collections::BTreeMap::new();
    for _ in 0..20 {
        let message = viewer.message().unwrap();
        assert!(message.retain, "{}", message.topic);
        found.insert(message.topic, message.payload);
    }
    assert_eq!(found["$SYS/broker/uptime"], b"0 seconds");
    assert_eq!(found["$SYS/broker/retained messages/count"], b"0");
    // Ten seconds later.
    loop {
        let message = viewer.message().unwrap();
        assert!(!message.retain && message.topic.starts_with("$SYS/broker/"), "{}", message.topic);
        if message.topic == "$SYS/broker/clients/connected" {
            assert_eq!(message.payload, b"1");
            break;
        }
    }
    assert!(!viewer.retain("$SYS/broker/version", b"mine"));
}

#[test]
fn a_backup_taken_under_load_is_whole_and_fills_an_empty_folder() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "writer");
    let first = [bytes(1, 50_000), bytes(2, 100)];
    publish(&mut client, "dev", 1, &[&first[0], &first[1]]);
    assert!(client.retain("home/light", b"on"));
    command(&world, &["user", "list"]).expect_code(0);
    world.write("data/rules.toml", "# nothing\n");

    // A publisher that never pauses: whatever list a backup holds, its packages are in it too.
    let stop = Arc::new(AtomicBool::new(false));
    let loading = {
        let (stop, address) = (stop.clone(), server.address);
        thread::spawn(move || {
            let mut client = Client::connect(address, "load");
            let mut sequence = 0;
            let mut before = None;
            while !stop.load(Ordering::SeqCst) {
                sequence += 1;
                let packages = [bytes(1000 + sequence, 30_000), bytes(2000 + sequence, 300)];
                publish(&mut client, "busy", sequence, &[&packages[0], &packages[1]]);
                // Also what is in the middle of being forgotten.
                if let Some(before) = before.replace(topic(&packages[0])) {
                    assert!(client.retain(&before, b""));
                }
            }
            sequence
        })
    };
    let backup = world.text("backup");
    for round in 0..3 {
        let saved = command(&world, &["backup", &backup, "--json"]).expect_code(0).json();
        assert_eq!(saved["damaged"], serde_json::json!([]));
        assert!(round == 0 || saved["reused"].as_u64() > Some(0), "{saved}");
    }
    stop.store(true, Ordering::SeqCst);
    assert!(loading.join().unwrap() > 0);
    let mode = fs::metadata(world.path("backup/messages.jsonl")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(server);

    let new = world.text("new");
    let put = run("mpypi-broker", &["restore", &backup, "--data", &new, "--json"]).expect_code(0).json();
    assert_eq!(put["restored"]["refused"], serde_json::json!([]));
    assert_eq!(put["restored"]["files"], serde_json::json!(["rules.toml"]));
    run("mpypi-broker", &["check", "--deep", "--data", &new]).expect_code(0);
    fs::rename(world.path("data"), world.path("old")).unwrap();
    fs::rename(world.path("new"), world.path("data")).unwrap();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "reader");
    for package in &first {
        assert_eq!(client.retained(&topic(package)).unwrap().payload, *package);
    }
    assert_eq!(client.retained("home/light").unwrap().payload, b"on");
    let first = [&*first[0], &*first[1]];
    assert_eq!(client.retained("mpypi/channels/dev").unwrap().payload, list("dev", 1, &first));
}

#[test]
fn a_damaged_backup_changes_nothing_and_a_foreign_folder_is_left_alone() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "writer");
    let package = bytes(1, 50_000);
    publish(&mut client, "dev", 1, &[&package]);
    let backup = world.text("backup");
    command(&world, &["backup", &backup]).expect_code(0);
    let blob = world.path(&format!("backup/blobs/{}", Digest::of(&package)));
    let messages = world.path("backup/messages.jsonl");
    let whole = fs::read(&messages).unwrap();
    let restore = || {
        let refused = run("mpypi-broker", &["restore", &backup, "--data", &world.text("new")]).expect_code(1);
        assert!(refused.stderr.contains("damaged"), "{}", refused.stderr);
        assert!(!world.path("new").exists());
    };
    // Every way to lose or change a part of it.
    let mut changed = package.clone();
    changed[7] ^= 1;
    fs::write(&blob, &changed).unwrap();
    restore();
    fs::write(&blob, &package[1..]).unwrap();
    restore();
    fs::remove_file(&blob).unwrap();
    restore();
    fs::write(&blob, &package).unwrap();
    fs::write(&messages, &whole[..whole.len() - 1]).unwrap();
    restore();
    fs::write(
        &messages,
        String::from_utf8(whole.clone()).unwrap().replace("mpypi/channels", "other/channel"),
    )
    .unwrap();
    restore();
    // The next backup repairs the folder.
    fs::write(&blob, &changed).unwrap();
    command(&world, &["backup", &backup]).expect_code(0);
    run("mpypi-broker", &["restore", &backup, "--data", &world.text("new")]).expect_code(0);

    world.write("mine/letter.txt", "dear");
    let refused = command(&world, &["backup", &world.text("mine")]).expect_code(1);
    assert!(refused.stderr.contains("hint: "), "{}", refused.stderr);
    assert_eq!(world.files("mine").len(), 1);
    command(&world, &["restore", &world.text("mine")]).expect_code(1);
}

#[test]
fn a_blob_that_is_damaged_in_the_index_is_kept_from_the_backup_before() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "writer");
    let (package, lost) = (bytes(1, 50_000), bytes(2, 50_000));
    assert!(client.retain(&topic(&package), &package));
    let backup = world.text("backup");
    command(&world, &["backup", &backup]).expect_code(0);
    assert!(client.retain(&topic(&lost), &lost));
    for package in [&package, &lost] {
        let blob = world.path(&format!("data/blobs/{}", Digest::of(package)));
        fs::write(blob, b"damaged").unwrap();
    }
    let saved = command(&world, &["backup", &backup, "--json"]).expect_code(1);
    assert_eq!(saved.json()["damaged"], serde_json::json!([topic(&lost)]));
    assert_eq!(saved.json()["messages"], 1);
    run("mpypi-broker", &["restore", &backup, "--data", &world.text("new")]).expect_code(0);
    assert_eq!(fs::read(world.path(&format!("new/blobs/{}", Digest::of(&package)))).unwrap(), package);
}

#[test]
fn a_running_broker_gets_back_what_is_missing_and_keeps_what_is_newer() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "writer");
    let [a, b, c] = [1, 2, 3].map(|seed| bytes(seed, 50_000));
    publish(&mut client, "dev", 1, &[&a]);
    publish(&mut client, "stable", 5, &[&b]);
    assert!(client.retain("home/light", b"on") && client.retain("home/door", b"open"));
    assert!(client.retain("home/window", b"shut"));
    let backup = world.text("backup");
    command(&world, &["backup", &backup]).expect_code(0);

    publish(&mut client, "dev", 2, &[&c]);
    assert!(client.retain(&topic(&a), b""));
    assert!(client.retain("home/light", b"") && client.retain("home/door", b"closed"));
    let mut listener = Client::connect(server.address, "listener");
    listener.subscribe("home/#", 1);
    for _ in ["door", "window"] {
        assert!(listener.message().unwrap().retain);
    }

    let planned = command(&world, &["restore", &backup, "--dry-run", "--json"]).expect_code(0).json();
    assert_eq!(planned["put"], serde_json::json!(["home/light", topic(&a)]));
    assert_eq!(planned["differs"], serde_json::json!(["home/door"]));
    assert_eq!(planned["newer"], serde_json::json!(["mpypi/channels/dev"]));
    assert_eq!(client.retained("home/light"), None);

    let done = command(&world, &["restore", &backup]).expect_code(0);
    assert!(done.stdout.contains("2 messages put back"), "{}", done.stdout);
    assert!(done.stdout.contains("kept: `mpypi/channels/dev`"), "{}", done.stdout);
    let light = listener.message().unwrap();
    assert_eq!((&*light.topic, &*light.payload, light.retain), ("home/light", &b"on"[..], false));
    assert_eq!(client.retained(&topic(&a)).unwrap().payload, a);
    assert_eq!(client.retained("home/door").unwrap().payload, b"closed");
    assert_eq!(client.retained("mpypi/channels/dev").unwrap().payload, list("dev", 2, &[&c]));

    command(&world, &["restore", &backup, "--replace"]).expect_code(0);
    let door = listener.message().unwrap();
    assert_eq!((&*door.topic, &*door.payload), ("home/door", &b"open"[..]));
    assert_eq!(client.retained("mpypi/channels/dev").unwrap().payload, list("dev", 2, &[&c]));
    assert_eq!(client.retained("mpypi/channels/stable").unwrap().payload, list("stable", 5, &[&b]));
    let again = command(&world, &["restore", &backup, "--replace", "--json"]).expect_code(0).json();
    assert_eq!(again["restored"]["messages"], 0);
}

#[test]
fn garbage_is_what_no_late_list_names_and_nobody_just_uploaded() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "writer");
    let packages: Vec<_> = (0..5).map(|seed| bytes(seed, 30_000)).collect();
    for (n, package) in packages.iter().enumerate() {
        publish(&mut client, "dev", n as u64 + 1, &[package]);
    }
    publish(&mut client, "stable", 1, &[&packages[1]]);
    let early = bytes(100, 100);
    assert!(client.retain(&topic(&early), &early));
    assert!(client.retain("home/light", b"on"));
    let legacy = |package: &[u8]| format!("mpypi/packages/{}", Digest::of(package));
    for package in [&packages[0], &packages[1]] {
        assert!(client.retain(&legacy(package), package));
    }

    // All of it is new.
    assert_eq!(command(&world, &["gc", "--json"]).expect_code(0).json()["messages"], 0);
    // Ten lists count, and there are five: only what none ever named.
    let found = command(&world, &["gc", "--dry-run", "--grace", "0s", "--json"]).expect_code(0).json();
    assert_eq!(found["packages"].as_array().unwrap().len(), 1);
    assert_eq!(found["packages"][0]["topic"], topic(&early));
    // Two lists count: 3 and 4 are named there, 1 on another channel.
    let arguments = ["gc", "--keep", "2", "--grace", "0s", "--json"];
    let plan = command(&world, &[&arguments[..], &["--dry-run"]].concat()).expect_code(0).json();
    let done = command(&world, &arguments).expect_code(0).json();
    assert_eq!((&plan["packages"], &plan["bytes"]), (&done["packages"], &done["bytes"]));
    let mut gone: Vec<_> = done["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["topic"].as_str().unwrap().to_owned())
        .collect();
    gone.sort();
    let mut expected = vec![topic(&packages[0]), topic(&packages[2]), topic(&early), legacy(&packages[0])];
    expected.sort();
    assert_eq!(gone, expected);
    assert_eq!((&done["messages"], &done["bytes"]), (&4.into(), &90_100.into()));
    let is_there = |client: &mut Client, topic: &str| client.retained(topic).is_some();
    for (n, stays) in [(0, false), (1, true), (2, false), (3, true), (4, true)] {
        assert_eq!(is_there(&mut client, &topic(&packages[n])), stays, "{n}");
    }
    assert!(is_there(&mut client, &legacy(&packages[1])) && is_there(&mut client, "home/light"));

    // Without the broker it goes the same way, and history is remembered.
    assert_eq!(server.stop("-TERM"), Some(0));
    let done = command(&world, &["gc", "--keep", "1", "--grace", "0s", "--json"]).expect_code(0).json();
    assert_eq!(done["packages"][0]["topic"], topic(&packages[3]));
    assert_eq!(done["messages"], 1);
    let refused = command(&world, &["gc", "--keep", "1000"]).expect_code(1);
    assert!(refused.stderr.contains("are remembered"), "{}", refused.stderr);
    command(&world, &["check"]).expect_code(0);
}

#[test]
fn check_finds_what_is_wrong_whether_the_broker_runs_or_not() {
    let world = World::new();
    let missing = command(&world, &["check"]).expect_code(1);
    assert!(missing.stdout.contains("there is no index"), "{}", missing.stdout);
    assert!(!world.path("data").exists());
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "writer");
    let packages = [1, 2, 3].map(|seed| bytes(seed, 30_000));
    publish(&mut client, "dev", 1, &[&packages[0], &packages[1], &packages[2]]);
    assert!(client.retain("home/light", b"on"));
    let good = command(&world, &["check", "--deep", "--json"]).expect_code(0).json();
    assert_eq!(good["ok"], true);

    let blob = |n: usize| world.path(&format!("data/blobs/{}", Digest::of(&packages[n])));
    fs::write(blob(0), bytes(9, 30_000)).unwrap();
    command(&world, &["check"]).expect_code(0);
    let expect = |depth: &[&str], texts: &[&str]| {
        let found = command(&world, &[&["check"], depth].concat()).expect_code(1);
        for text in texts {
            assert!(found.stdout.contains(text), "{text}: {}", found.stdout);
        }
    };
    expect(&["--deep"], &["has other bytes"]);
    fs::write(blob(1), b"short").unwrap();
    fs::remove_file(blob(2)).unwrap();
    let all = ["has 5 bytes instead of 30000", "is not there"];
    expect(&[], &all);
    assert_eq!(server.stop("-TERM"), Some(0));
    expect(&[], &all);
    expect(&["--deep"], &["has other bytes", "is not there"]);
    world.write("data/users.toml", "[users.a]\nrole = \"king\"\n");
    expect(&[], &["wrong  users: ", "line 2"]);
}

#[test]
fn commands_find_the_broker_by_a_socket_for_its_owner_alone() {
    let world = World::new();
    let server = Server::start(&world);
    let socket = world.path("data/control.sock");
    let found = fs::metadata(&socket).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    // Whoever says nonsense or goes away in the middle hurts nobody.
    for said in
        ["", "x", "nonsense\n", "{\"ask\":\"snapshot\",\"payloads\":true}\n", "{\"ask\":\"put\"}\n{}\n"]
    {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(said.as_bytes()).unwrap();
    }
    let mut stream = BufReader::new(UnixStream::connect(&socket).unwrap());
    stream.get_mut().write_all(b"{\"ask\":\"else\"}\n").unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    assert!(line.contains("\"failed\"") && line.contains("not a request"), "{line}");
    command(&world, &["check"]).expect_code(0);
    // One that was killed leaves its socket, which is in nobody's way.
    server.kill();
    assert!(socket.exists());
    let found = command(&world, &["check"]).expect_code(0);
    assert!(found.stdout.contains("no broker runs"), "{}", found.stdout);
    let server = Server::start(&world);
    let found = command(&world, &["check"]).expect_code(0);
    assert!(found.stdout.contains("the running broker"), "{}", found.stdout);
    assert_eq!(server.stop("-TERM"), Some(0));
    assert!(!socket.exists());
}

#[test]
fn a_data_folder_with_a_long_path_has_its_socket_too() {
    let world = World::new();
    let data = world.path(&"long/".repeat(40));
    let log = fs::File::create(world.path("long.log")).unwrap();
    let mut broker = Command::new(program("mpypi-broker"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(&data)
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(broker.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let found = run("mpypi-broker", &["check", "--data", data.to_str().unwrap()]);
    broker.kill().unwrap();
    broker.wait().unwrap();
    assert!(found.expect_code(0).stdout.contains("the running broker"));
}

#[test]
fn a_file_limit_that_stops_the_database_refuses_messages_and_loses_nothing_acknowledged() {
    let world = World::new();
    // No file may grow beyond some 10 MiB, as on a full disk; the signal for it would end any program.
    let script = r#"trap '' XFSZ; ulimit -S -f 20480; exec "$0" "$@""#;
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).arg(program("mpypi-broker"));
    let mut server = Server::start_as(&world, shell, &["--http", "127.0.0.1:0"]);
    let away = Options { clean: false, ..Options::id("away") };
    let (mut session, _) = Client::try_connect(server.address, &away).unwrap();
    session.subscribe("live", 1);
    drop(session);
    let here = Options { clean: false, ..Options::id("here") };
    let (mut session, _) = Client::try_connect(server.address, &here).unwrap();
    session.subscribe("orders", 1);
    let mut client = Client::connect(server.address, "writer");
    client.post("live", b"early", 1, false).unwrap();
    assert!(client.acknowledged().is_some());
    let value = |n: usize| bytes(n as u64, 16_000);
    let kept = (0..10_000).take_while(|n| client.retain(&format!("fill/{n}"), &value(*n))).count();
    assert!((100..9_999).contains(&kept), "{kept}");
    assert!(server.is_running());
    assert!(metric(&server, "mpypi_publishes_refused_total{reason=\"0x97\"}").unwrap() > 0);
    // Everything acknowledged is served, and what is live still passes.
    let mut reader = Client::connect(server.address, "reader");
    for n in 0..kept {
        assert!(reader.retained(&format!("fill/{n}")).is_some_and(|found| found.payload == value(n)), "{n}");
    }
    reader.subscribe("now", 1);
    let mut client = Client::connect(server.address, "talker");
    client.post("now", b"x", 0, false).unwrap();
    assert_eq!(reader.message().unwrap().payload, b"x");
    // Whoever had a session comes back to it, when there is room again.
    assert!(session.is_closed());
    let pid = server.pid().try_into().unwrap();
    rlimit::prlimit(pid, rlimit::Resource::FSIZE, Some((rlimit::INFINITY, rlimit::INFINITY)), None).unwrap();
    let deadline = Deadline::new();
    while !Client::connect(server.address, "again").retain("fill/more", &value(1)) {
        deadline.check("it never recovers");
    }
    assert_eq!(metric(&server, "mpypi_disk_full"), Some(0));
    let (mut session, code) = Client::try_connect(server.address, &here).unwrap();
    assert_eq!(code, 0);
    let mut client = Client::connect(server.address, "writer");
    client.post("orders", b"go", 1, false).unwrap();
    assert!(client.acknowledged().is_some());
    assert_eq!(session.message().unwrap().payload, b"go");
    server.kill();
    let server = Server::start(&world);
    let mut reader = Client::connect(server.address, "reader");
    for n in 0..kept {
        assert!(reader.retained(&format!("fill/{n}")).is_some_and(|found| found.payload == value(n)), "{n}");
    }
    assert_eq!(reader.retained("fill/more").unwrap().payload, value(1));
    let (mut session, code) = Client::try_connect(server.address, &away).unwrap();
    assert_eq!(code, 0);
    assert_eq!(session.message().unwrap().payload, b"early");
    drop(server);
    command(&world, &["check", "--deep"]).expect_code(0);
}

#[test]
fn a_service_manager_hears_that_it_serves_lives_and_stops() {
    let world = World::new();
    let path = world.path("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = Command::new(program("mpypi-broker"));
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "100000");
    let server = Server::start_as(&world, command, &[]);
    let hear = || {
        let mut scratch = [0; 256];
        let count = manager.recv(&mut scratch).unwrap();
        String::from_utf8_lossy(&scratch[..count]).trim_end().to_owned()
    };
    assert_eq!(hear(), "READY=1");
    assert_eq!([hear(), hear()], ["WATCHDOG=1", "WATCHDOG=1"]);
    let stopped = server.stop("-TERM");
    let last = loop {
        match hear() {
            beat if beat == "WATCHDOG=1" => {}
            other => break other,
        }
    };
    assert_eq!((&*last, stopped), ("STOPPING=1", Some(0)));
}

#[test]
fn the_service_file_is_one_that_systemd_understands() {
    let world = World::new();
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/mpypi-broker.service");
    let unit = fs::read_to_string(unit).unwrap();
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/")).unwrap();
    let arguments: Vec<_> = start.split(' ').skip(1).collect();
    // The command line is one that the broker understands, too.
    let help = run("mpypi-broker", &[&arguments[..], &["--help"]].concat()).expect_code(0);
    assert!(help.stdout.contains("Usage: "));
    let installed = world.text("mpypi-broker");
    fs::copy(program("mpypi-broker"), &installed).unwrap();
    let path = world.write("mpypi-broker.service", unit.replace("/usr/local/bin/mpypi-broker", &installed));
    match Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(path).output() {
        Err(error) => eprintln!("skipped: `systemd-analyze`: {error}"),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && !said.contains("mpypi-broker.service:"), "{said}");
        }
    }
}

/// A small disk of its own for the world's folder `data`, if this system lets us have one.
struct SmallDisk {
    keeper: Child,
}

impl SmallDisk {
    fn new(world: &World, size: &str) -> Option<SmallDisk> {
        let data = world.path("data");
        fs::create_dir_all(&data).unwrap();
        let script = r#"mount -t tmpfs -o "size=$1" tmpfs "$0" && echo ready && exec cat"#;
        let keeper = Command::new("unshare")
            .args(["-rm", "sh", "-c", script])
            .arg(&data)
            .arg(size)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn();
        let mut keeper = match keeper {
            Ok(keeper) => keeper,
            Err(error) => {
                eprintln!("skipped: no small disk to be had: `unshare`: {error}");
                return None;
            }
        };
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line != "ready\n" {
            eprintln!("skipped: no small disk to be had: this system lets us mount none");
            keeper.wait().unwrap();
            return None;
        }
        Some(SmallDisk { keeper })
    }

    /// What runs `mpypi-broker` where the disk is.
    fn command(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--preserve-credentials", "-U", "-m", "-t", &self.keeper.id().to_string()]);
        command.arg(program("mpypi-broker"));
        command
    }

    /// A path on the disk, as this process sees it.
    fn path(&self, path: &Path) -> std::path::PathBuf {
        Path::new(&format!("/proc/{}/root", self.keeper.id())).join(path.strip_prefix("/").unwrap())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        self.keeper.kill().ok();
        self.keeper.wait().ok();
    }
}

#[test]
fn a_full_disk_refuses_messages_recovers_when_there_is_room_and_survives_kill_9() {
    let world = World::new();
    let Some(disk) = SmallDisk::new(&world, "64m") else { return };
    let start = || Server::start_as(&world, disk.command(), &["--http", "127.0.0.1:0"]);
    let server = start();
    let filler = disk.path(&world.path("data/filler"));
    let package = |n: usize| bytes(n as u64, 1024 * 1024);
    let post = |server: &Server, n: usize| {
        let mut client = Client::connect(server.address, &format!("writer-{n}"));
        client.retain(&topic(&package(n)), &package(n))
    };
    let check = |server: &Server, count: usize| {
        let mut reader = Client::connect(server.address, "reader");
        for n in 0..count {
            assert!(
                reader.retained(&topic(&package(n))).is_some_and(|found| found.payload == package(n)),
                "{n}"
            );
        }
    };
    // The reserve of 32 MiB is left.
    let first = (0..64).take_while(|n| post(&server, *n)).count();
    assert!((20..32).contains(&first), "{first}");
    assert_eq!(metric(&server, "mpypi_disk_full"), Some(1));
    assert_eq!(server.get("/healthz").0, 200, "it lives");
    check(&server, first);
    // Somebody else takes half of it.
    let mut node = Client::connect(server.address, "node");
    assert!(node.retain("mpypi/nodes/node/online", b"1"), "small messages still fit");
    assert!(node.retain("home/light", b"on"));
    let mut file = fs::File::create(&filler).unwrap();
    file.write_all(&vec![0; 10 * 1024 * 1024]).unwrap();
    // Devices go on telling how they are, and what is cleared is cleared. Nothing new comes in.
    assert!(node.retain("mpypi/nodes/node/online", b"0"));
    assert!(node.retain("home/light", b""));
    assert!(!node.retain("home/light", b"on"));
    // Now even the reserve is taken, by somebody else: nothing whatever fits.
    let room = vec![0; 64 * 1024];
    while file.write_all(&room).is_ok() {}
    drop(file);
    assert!(!post(&server, first));
    let mut client = Client::connect(server.address, "clearer");
    client.retain("home/light", b"on");
    check(&server, first);
    server.kill();
    // A broker starts on a full disk too, and there is everything.
    let server = start();
    check(&server, first);
    assert!(!post(&server, first));
    fs::remove_file(&filler).unwrap();
    let mut client = Client::connect(server.address, "clearer");
    assert!(client.retain(&topic(&package(0)), b""));
    assert_eq!(client.retained(&topic(&package(0))), None);
    server.kill();
    // What lost its last record goes with the restart.
    let server = start();
    assert!(post(&server, first), "there is room again, without more ado");
    assert_eq!(metric(&server, "mpypi_retained_messages"), Some(first as u64 + 1));
}

#[test]
fn an_address_in_use_for_http_is_an_error_with_its_name() {
    let world = World::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let arguments = ["serve", "--listen", "127.0.0.1:0", "--http", &address, "--data", &world.text("data")];
    let refused = run("mpypi-broker", &arguments).expect_code(1);
    assert!(refused.stderr.contains(&address), "{}", refused.stderr);
}
