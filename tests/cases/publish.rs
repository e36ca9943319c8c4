//! The publisher: what it does when it is stopped anywhere, and what it tells.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicUsize, Ordering},
};

use mpypi_protocol::UpdateList;
use mpypi_tests::{Client, Proxy, Running, Server, Verdict, World, kill_once_known, run};

fn release(world: &World, n: u32) {
    world.write("dev/src/main.py", format!("RELEASE = {n}\n"));
    world.write("dev/src/big.bin", vec![n as u8; 40_000]);
    world.write("dev/src/same.py", "# in every release\n");
    world.write("dev/wheels/app/pyproject.toml", format!("[project]\nname = \"app\"\nversion = \"{n}\"\n"));
    world.write("dev/wheels/app/app.py", format!("VERSION = {n}\n"));
}

fn publish(world: &World, broker: &str) -> serde_json::Value {
    run("mpypi", &["publish", &world.text("dev"), "--broker", broker, "--json"]).expect_code(0).json()
}

/// A list's packages that are not on the broker.
fn missing(client: &mut Client, list: &UpdateList) -> usize {
    list.packages().filter(|(id, _)| client.retained(&id.topic()).is_none()).count()
}

/// Publishes release 2 over a line on which the publisher is killed when it sends its packet number `step`;
/// then again, on a sound line. Returns whether the publisher got through before.
fn killed_at(step: usize, new_list: &UpdateList, mosquitto: bool) -> bool {
    let world = World::new();
    let server = if mosquitto { Server::mosquitto(&world) } else { Server::start(&world) };
    release(&world, 1);
    publish(&world, &server.url());
    let mut client = Client::connect(server.address, "checker");
    let old = client.retained("mpypi/channels/dev").unwrap().payload;
    release(&world, 2);

    let pid = Arc::new(AtomicU32::new(0));
    let (count, victim) = (Arc::new(AtomicUsize::new(0)), pid.clone());
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let seen = acknowledged.clone();
    let line = Proxy::start(server.address, move |is_client, packet| {
        if !is_client && packet[0] >> 4 == 4 {
            seen.fetch_add(1, Ordering::SeqCst);
        }
        if !is_client || count.fetch_add(1, Ordering::SeqCst) != step {
            return Verdict::Pass;
        }
        kill_once_known(&victim);
        Verdict::Cut
    });
    let folder = world.text("dev");
    let publisher = Running::start("mpypi", &["publish", &folder, "--broker", &line.url(), "--json"]);
    pid.store(publisher.pid(), Ordering::SeqCst);
    let finished = publisher.wait().code == Some(0);

    let present = client.retained("mpypi/channels/dev").unwrap().payload;
    if present == old {
        // The old release stands, whole, and the next run sends what is missing and nothing else.
        assert_eq!(missing(&mut client, &UpdateList::parse(&old).unwrap()), 0, "step {step}");
        let lacking = missing(&mut client, new_list);
        let again = publish(&world, &server.url());
        assert_eq!(again["published"], true, "step {step}");
        let sent = usize::try_from(again["packages"]["sent"].as_u64().unwrap()).unwrap();
        // What was sent and not acknowledged may have come in after we looked.
        assert!(sent <= lacking, "step {step}: {sent} sent, {lacking} lacking");
        // The old list went into the history before the new one was to go out.
        let history = usize::from(client.retained("mpypi/channels/dev/history/1").is_some());
        let new = acknowledged.load(Ordering::SeqCst) + sent;
        assert!(
            new <= 3 + history,
            "step {step}: of three new packages, {new} were sent or acknowledged before"
        );
    } else {
        // The list had gone out, so all else had before it.
        assert_eq!(publish(&world, &server.url())["published"], false, "step {step}");
    }
    let list = UpdateList::parse(&client.retained("mpypi/channels/dev").unwrap().payload).unwrap();
    assert!(list.packages().eq(new_list.packages()), "step {step}");
    assert_eq!(missing(&mut client, &list), 0, "step {step}");
    assert!(!finished || present != old, "step {step}");
    finished
}

fn killed_at_every_step(mosquitto: bool) {
    let new_list = {
        let world = World::new();
        let server = Server::start(&world);
        release(&world, 2);
        publish(&world, &server.url());
        UpdateList::parse(
            &Client::connect(server.address, "c").retained("mpypi/channels/dev").unwrap().payload,
        )
        .unwrap()
    };
    let steps = (0..).take_while(|step| !killed_at(*step, &new_list, mosquitto)).count();
    // CONNECT, at least one SUBSCRIBE, three new packages, the list.
    assert!(steps >= 6, "only {steps} steps");
    println!("{steps} steps");
}

#[test]
fn a_publisher_killed_at_every_step_leaves_the_old_release_and_the_next_run_completes() {
    killed_at_every_step(false);
}

#[test]
fn a_publisher_killed_at_every_step_with_mosquitto_as_the_broker() {
    killed_at_every_step(true);
}

#[test]
fn a_line_that_breaks_again_and_again_costs_time_and_nothing_else() {
    let world = World::new();
    let server = Server::start(&world);
    release(&world, 1);
    let passed = Arc::new(AtomicUsize::new(0));
    let line = Proxy::start(server.address, move |client, packet| {
        // The second package after each CONNECT does not get through, twice.
        let is_package = client && packet[0] >> 4 == 3;
        let n = if is_package { passed.fetch_add(1, Ordering::SeqCst) } else { 0 };
        if is_package && (n == 1 || n == 3) { Verdict::Cut } else { Verdict::Pass }
    });
    assert_eq!(publish(&world, &line.url())["published"], true);
    let list = Client::connect(server.address, "c").retained("mpypi/channels/dev").unwrap().payload;
    let mut client = Client::connect(server.address, "c2");
    assert_eq!(missing(&mut client, &UpdateList::parse(&list).unwrap()), 0);
}

#[test]
fn a_dry_run_says_what_would_be_sent_and_sends_nothing() {
    let world = World::new();
    let server = Server::start(&world);
    release(&world, 1);
    let folder = world.text("dev");
    let plan = run("mpypi", &["publish", &folder, "--broker", &server.url(), "--dry-run", "--json"]);
    let plan = plan.expect_code(0).json();
    assert_eq!((&plan["dry_run"], &plan["published"]), (&true.into(), &false.into()));
    assert_eq!(plan["packages"]["total"], 4);
    let mut client = Client::connect(server.address, "c");
    assert_eq!(client.retained("mpypi/channels/dev").unwrap().payload, b"[]");
}

#[test]
fn errors_say_what_to_do() {
    let world = World::new();
    let server = Server::start(&world);
    release(&world, 1);
    let publish = |folder: &str, broker: &str| {
        run("mpypi", &["publish", &world.text(folder), "--broker", broker]).expect_code(1).stderr
    };
    let unreachable = publish("dev", "mqtt://127.0.0.1:1");
    assert!(unreachable.contains("error: ") && unreachable.contains("hint: "), "{unreachable}");
    let nowhere = publish("no such", &server.url());
    assert!(nowhere.contains("no such"), "{nowhere}");
    world.write("dev/channel.toml", "versoin = \"1\"\n");
    let typo = publish("dev", &server.url());
    assert!(typo.contains("did you mean `version`?"), "{typo}");
    assert_eq!(run("mpypi", &["publish"]).code, Some(2));
}

#[test]
fn watch_publishes_each_save_and_only_what_changed() {
    let world = World::new();
    let server = Server::start(&world);
    release(&world, 1);
    let mut reader = Client::connect(server.address, "reader");
    reader.subscribe("mpypi/channels/dev", 1);
    assert_eq!(reader.message().unwrap().payload, b"[]");
    let mut next = |expected: u64| {
        let list = UpdateList::parse(&reader.message().unwrap().payload).unwrap();
        assert_eq!(list.release().unwrap().sequence, expected);
        list.packages().map(|(id, _)| id.to_string()).collect::<Vec<_>>().join(" ")
    };
    let watch = Running::start("mpypi", &["watch", &world.text("dev"), "--broker", &server.url()]);
    assert!(next(1).contains("src/main.py/"));
    // As editors save: beside, then renamed over.
    world.write("dev/src/main.py.new", "RELEASE = 'saved'\n");
    std::fs::rename(world.path("dev/src/main.py.new"), world.path("dev/src/main.py")).unwrap();
    let mut packages = next(2);
    // A slow machine may have seen the file beside in a release of its own.
    let mut sequence = 2;
    while packages.contains("main.py.new") {
        sequence += 1;
        packages = next(sequence);
    }
    // A folder that was not there when the watch began.
    world.write("dev/src/new/deep/file.py", "NEW = True\n");
    while !packages.contains("src/new/deep/file.py/") {
        sequence += 1;
        packages = next(sequence);
    }
    watch.signal("-TERM");
    let _ = watch.wait().expect_code(0);
}

#[test]
fn what_a_broker_lost_is_sent_again_by_a_repair() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    release(&world, 1);
    publish(&world, &server.url());
    let mut client = Client::connect(server.address, "client");
    let list = UpdateList::parse(&client.retained("mpypi/channels/dev").unwrap().payload).unwrap();
    let folder = world.text("dev");
    let repair = || {
        let arguments = ["publish", &folder, "--broker", &server.url(), "--repair", "--json"];
        run("mpypi", &arguments).expect_code(0).json()
    };
    let whole = repair();
    assert_eq!((&whole["unchanged"], &whole["sequence"]), (&true.into(), &1.into()));

    let (lost, _) = list.packages().last().unwrap();
    assert!(client.retain(&lost.topic(), b""));
    assert_eq!(
        publish(&world, &server.url())["unchanged"],
        true,
        "the list names it, so it is not asked for"
    );
    let repaired = repair();
    assert_eq!((&repaired["sequence"], &repaired["packages"]["sent"]), (&2.into(), &1.into()));
    assert_eq!(missing(&mut client, &list), 0);
}
