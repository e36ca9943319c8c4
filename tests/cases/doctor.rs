//! `mpypi doctor` against brokers as they are, and against what is none.

use std::{
    collections::BTreeMap,
    io::Read,
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::mpsc,
    thread,
};

use mpypi_tests::{Client, Cluster, Options, Output, PATIENCE, Proxy, Running, Server, Verdict, World, run};
use serde_json::Value;

use crate::cluster::frozen;

/// Examines brokers; `--max` is low where the test is not about sizes.
fn doctor(brokers: &str, more: &[&str]) -> Output {
    run("mpypi", &[&["doctor", "--broker", brokers, "--json"], more].concat())
}

const SMALL: [&str; 2] = ["--max", "128K"];

/// What each check says: its verdict, and why.
fn checks(output: &Output) -> BTreeMap<String, (String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let report = output.json();
    let rows = report["checks"].as_array().unwrap();
    rows.iter().map(|row| (text(&row["check"]), (text(&row["verdict"]), text(&row["why"])))).collect()
}

#[track_caller]
fn expect(output: &Output, expected: &[(&str, &str, &str)]) {
    let found = checks(output);
    for (check, verdict, why) in expected {
        let (found, reason) = &found[*check];
        assert_eq!(found, verdict, "{check}: {reason}");
        assert!(reason.contains(why), "{check}: {reason}");
    }
}

/// The checks with this verdict.
fn with(output: &Output, verdict: &str) -> Vec<String> {
    let found = checks(output).into_iter().filter(|(_, (found, _))| found == verdict);
    found.map(|(check, _)| check).collect()
}

/// Every topic on which a broker retains something, as an outsider sees it who may read all.
fn retained(address: SocketAddr, login: Option<(&str, &str)>) -> Vec<String> {
    let login = login.map(|(user, password)| (user.to_owned(), password.to_owned()));
    let options = Options { login, ..Options::id("an-auditor") };
    let (client, code) = Client::try_connect(address, &options).unwrap();
    assert_eq!(code, 0);
    all_of(client, "#")
}

/// The same of some topics.
fn retained_below(address: SocketAddr, filter: &str) -> Vec<String> {
    all_of(Client::connect(address, "an-auditor"), filter)
}

fn all_of(mut client: Client, filter: &str) -> Vec<String> {
    assert_ne!(client.subscribe(filter, 0), 0x80);
    client.fence();
    let mut topics = Vec::new();
    while client.waits() {
        topics.push(client.message().unwrap().topic);
    }
    topics
}

fn add_user(world: &World, name: &str, role: &str) -> String {
    let arguments = ["user", "add", name, "--role", role, "--token", "--data", &world.text("data")];
    run("mpypi-broker", &arguments).expect_code(0).stdout.trim().to_owned()
}

#[test]
fn our_broker_is_fit_and_nothing_is_left_there() {
    let world = World::new();
    let server = Server::start(&world);
    let output = doctor(&server.url(), &[]).expect_code(0);
    assert_eq!(with(&output, "ok").len(), 12, "{}", output.stdout);
    // Who may write all cannot say what happens to who may not, and nobody says what time it is.
    assert_eq!(with(&output, "unknown"), ["clock", "denied"]);
    let report = output.json();
    let keys: Vec<&String> = report.as_object().unwrap().keys().collect();
    let expected = ["schema", "fit", "broker", "engine", "checks", "advice", "largest", "left", "observed"];
    assert_eq!(keys, expected);
    assert_eq!(
        (&report["schema"], &report["fit"], &report["left"]),
        (&1.into(), &true.into(), &Value::Array(vec![]))
    );
    assert_eq!(
        (&report["engine"]["engine"], &report["largest"]),
        (&"mpypi".into(), &(8 * 1024 * 1024).into())
    );
    assert_eq!(retained(server.address, None), Vec::<String>::new());
}

#[test]
fn a_lower_packet_limit_of_ours_is_found_and_named() {
    let world = World::new();
    world.write("data/broker.toml", "[limits]\npacket = 300000\npackage = 200000\n");
    let server = Server::start(&world);
    let output = doctor(&server.url(), &[]).expect_code(0);
    expect(&output, &[("greeting", "ok", "packets up to 293.0 KiB"), ("largest", "weak", "come back; ")]);
    let largest = output.json()["largest"].as_u64().unwrap();
    assert!((180_000..=200_000).contains(&largest), "{largest}");
    let report = output.json();
    let row = report["checks"].as_array().unwrap().iter().find(|row| row["check"] == "largest").unwrap();
    assert!(row["hint"].as_str().unwrap().contains("broker.toml"), "{row}");
    assert_eq!(retained(server.address, None), Vec::<String>::new());
}

#[test]
fn a_publisher_of_ours_is_fit_and_a_node_is_told_to_log_in_as_somebody_else() {
    let world = World::new();
    let [ci, kitchen, admin] = [("ci", "publisher"), ("kitchen", "node"), ("root", "admin")]
        .map(|(user, role)| add_user(&world, user, role));
    let server = Server::start(&world);
    let login = |user: &str, password: &str| format!("mqtt://{user}:{password}@{}", server.address);
    let publisher = doctor(&login("ci", &ci), &SMALL).expect_code(0);
    expect(&publisher, &[("retained", "ok", ""), ("denied", "ok", "5: refused (")]);
    assert!(!publisher.stdout.contains(&ci), "no password is shown");
    let node = doctor(&login("kitchen", &kitchen), &SMALL).expect_code(3);
    expect(
        &node,
        &[("retained", "no", "this user may not write packages: "), ("dots", "unknown", "not tried")],
    );
    assert!(node.stderr.contains("is not fit for mpypi: retained"), "{}", node.stderr);
    // People get a line for each check, and what to do.
    let text = run("mpypi", &["doctor", "--broker", &login("kitchen", &kitchen)]).expect_code(3).stdout;
    assert!(text.contains("\nok    mqtt-3.1.1  spoken, as devices do\n"), "{text}");
    assert!(text.contains("hint: log in as a user who may write packages"), "{text}");
    assert!(!text.contains('\x1b'), "no colours in a pipe");
    let stranger = run("mpypi", &["doctor", "--broker", &login("ci", "wrong")]).expect_code(1);
    assert!(stranger.stderr.contains("bad user name or password"), "{}", stranger.stderr);
    assert_eq!(retained(server.address, Some(("root", &admin))), Vec::<String>::new());
}

#[test]
fn mosquitto_is_fit_and_what_to_know_of_it_is_said() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let output = doctor(&server.url(), &SMALL).expect_code(0);
    assert_eq!(with(&output, "ok").len(), 12, "{}", output.stdout);
    let report = output.json();
    assert_eq!(report["engine"]["engine"], "mosquitto");
    let advice = report["advice"].as_array().unwrap();
    let is_said = |what: &str| advice.iter().any(|one| one["text"].as_str().unwrap().contains(what));
    assert!(is_said("autosave_on_changes") && is_said("direction `both`"), "{advice:?}");
    assert_eq!(retained(server.address, None), Vec::<String>::new());
}

#[test]
fn a_small_message_limit_of_mosquitto_is_found() {
    let world = World::new();
    let server = Server::mosquitto_with(&world, "persistence false\nmessage_size_limit 100000\n");
    let output = doctor(&server.url(), &[]).expect_code(0);
    expect(&output, &[("largest", "weak", "come back; ")]);
    let largest = output.json()["largest"].as_u64().unwrap();
    assert!((93_000..=100_000).contains(&largest), "{largest}");
    let tiny = Server::mosquitto_with(&World::new(), "persistence false\nmessage_size_limit 10000\n");
    let output = doctor(&tiny.url(), &[]).expect_code(3);
    expect(&output, &[("largest", "no", "come back; "), ("retained", "ok", "")]);
    for broker in [server, tiny] {
        assert_eq!(retained(broker.address, None), Vec::<String>::new());
    }
}

#[test]
fn what_mosquitto_denies_is_told_from_what_it_keeps() {
    let world = World::new();
    let rules = "topic read #\nuser ci\ntopic read #\ntopic readwrite mpypi/packages/#\n";
    let acl = world.write("acl", rules);
    let server = Server::mosquitto_with(&world, &format!("persistence false\nacl_file {}\n", acl.display()));
    // Nobody has a password there: whoever says so is `ci`.
    let ci = doctor(&format!("mqtt://ci:x@{}", server.address), &SMALL).expect_code(0);
    let why = "3.1.1: acknowledged all the same, and does not come back; 5: refused (";
    expect(&ci, &[("retained", "ok", ""), ("denied", "weak", why)]);
    // Where only 3.1.1 is spoken, nothing but reading back tells.
    let old = Proxy::start(server.address, |is_client, packet| {
        // The version is the byte behind the name in a CONNECT.
        let is_five = is_client && packet[0] == 0x10 && packet.windows(5).any(|part| part == b"MQTT\x05");
        if is_five { Verdict::Cut } else { Verdict::Pass }
    });
    let guest = doctor(&old.url(), &SMALL).expect_code(3);
    expect(&guest, &[("mqtt-5", "weak", ""), ("retained", "no", "acknowledged, and is not there")]);
    assert_eq!(retained(server.address, None), Vec::<String>::new());
}

#[test]
fn where_packages_are_not_for_this_user_another_topic_is_tried_and_nothing_else_is_written() {
    let world = World::new();
    let acl = world.write("acl", "topic readwrite trial/#\n");
    let server = Server::mosquitto_with(&world, &format!("persistence false\nacl_file {}\n", acl.display()));
    let elsewhere = [&SMALL[..], &["--below", "trial/run"]].concat();
    let output = doctor(&server.url(), &elsewhere).expect_code(0);
    expect(
        &output,
        &[("retained", "ok", ""), ("spaces", "ok", ""), ("wildcard", "ok", ""), ("clear", "ok", "")],
    );
    expect(&output, &[("denied", "weak", "5: refused (")]);
    assert_eq!(
        output.json()["engine"]["by"],
        "the client ids that it gives",
        "`$SYS` is not for this user, either"
    );
    assert_eq!(retained_below(server.address, "trial/#"), Vec::<String>::new());
}

#[test]
fn one_node_of_nats_is_fit_with_its_weaknesses() {
    let world = World::new();
    let cluster = Cluster::start(&world, 1);
    let output = doctor(&cluster.url(0), &SMALL).expect_code(0);
    let expected = [
        ("mqtt-5", "weak", "not spoken"),
        ("spaces", "weak", "the connection ends"),
        ("wildcard", "weak", "all 24 messages come"),
        ("dots", "ok", ""),
        ("clear", "ok", ""),
        ("expiry", "unknown", "only MQTT 5 has it"),
    ];
    expect(&output, &expected);
    assert_eq!(with(&output, "no"), Vec::<String>::new());
    assert_eq!(output.json()["engine"]["engine"], "nats");
    assert_eq!(retained(cluster.address(0), None), Vec::<String>::new());
}

fn signal(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

#[test]
fn three_nodes_of_nats_agree_and_one_that_hangs_is_named() {
    let world = World::new();
    let mut cluster = Cluster::start(&world, 3);
    let output = doctor(&cluster.urls(), &SMALL).expect_code(0);
    expect(
        &output,
        &[("reach", "ok", "all 3 addresses"), ("agreement", "ok", "each of 3 shows what is published")],
    );
    for node in 0..3 {
        assert_eq!(retained(cluster.address(node), None), Vec::<String>::new());
    }
    // Its kernel takes connections; it says nothing. The others take clients when they have chosen who leads.
    signal(cluster.pid(2), "-STOP");
    let are_ready = (0..2).all(|node| cluster.is_ready(node, PATIENCE));
    let output = doctor(&cluster.urls(), &[&SMALL[..], &["--agree-within", "1s"]].concat());
    signal(cluster.pid(2), "-CONT");
    assert!(are_ready);
    let output = output.expect_code(3);
    let silent = format!("{}: no answer for 5 s", cluster.url(2));
    expect(&output, &[("reach", "no", &silent)]);
}

#[test]
fn an_address_that_shows_nothing_of_the_others_is_named() {
    let homes = [World::new(), World::new()];
    let [one, other] = homes.each_ref().map(Server::mosquitto);
    let second = Proxy::start(one.address, |_, _| Verdict::Pass);
    let frozen = frozen(&one);
    let four = [one.url(), second.url(), other.url(), frozen.url()].join(",");
    let output = doctor(&four, &[&SMALL[..], &["--agree-within", "1s"]].concat()).expect_code(3);
    let stale = format!("{} is stale: it shows nothing of what is published at the others", other.url());
    let forgets = format!("{}: acknowledged, and not kept", frozen.url());
    expect(&output, &[("reach", "ok", ""), ("agreement", "no", &stale), ("agreement", "no", &forgets)]);
    for broker in [one, other] {
        assert_eq!(retained(broker.address, None), Vec::<String>::new());
    }
}

#[test]
fn what_is_no_broker_or_says_nothing_is_said_to_be_so_and_not_waited_for() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let closing = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            // It reads what is said, and hangs up.
            let _ = TcpStream::read(&mut stream, &mut [0; 64]);
        }
    });
    let quiet = format!("mqtt://{}", silent.local_addr().unwrap());
    let output = run("mpypi", &["doctor", "--broker", &format!("mqtt://{closing}")]).expect_code(1);
    assert!(output.stderr.contains("hint: is it a broker?"), "{}", output.stderr);
    let both = format!("{quiet},mqtt://{closing}");
    let output = run("mpypi", &["doctor", "--broker", &both]).expect_code(1);
    assert!(output.stderr.contains("none of 2 brokers lets us in"), "{}", output.stderr);
    assert!(output.stderr.contains(&format!("{quiet}: no answer for 5 s")), "{}", output.stderr);
    for wrong in [&["--below", "mpypi/channels"], &["--max", "1G"], &["--engine", "other"]] {
        run("mpypi", &[&["doctor"][..], wrong].concat()).expect_code(2);
    }
}

#[test]
fn who_stops_it_in_the_middle_leaves_nothing_behind() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let (large, is_large) = mpsc::channel();
    let proxy = Proxy::start(server.address, move |is_client, packet| {
        if is_client && packet[0] >> 4 == 3 && packet.len() > 1024 * 1024 {
            large.send(()).ok();
        }
        Verdict::Pass
    });
    let doctor = Running::start("mpypi", &["doctor", "--broker", &proxy.url()]);
    is_large.recv().unwrap();
    assert_ne!(retained(server.address, None), Vec::<String>::new());
    doctor.signal("-INT");
    let output = doctor.wait().expect_code(1);
    assert!(output.stderr.contains("stopped") && !output.stderr.contains("may be left"), "{}", output.stderr);
    assert_eq!(retained(server.address, None), Vec::<String>::new());
}
