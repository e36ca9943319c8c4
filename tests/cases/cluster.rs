//! A cluster of NATS as the index: what it acknowledged and lost, and who says so.

use std::{collections::BTreeMap, env, fs, net::SocketAddr, thread, time::Duration};

use mpypi_protocol::{
    Digest, UpdateList,
    node::{Phase, State},
};
use mpypi_tests::{
    Client, Cluster, Deadline, Output, PATIENCE, Proxy, Running, Server, Verdict, World, clock, face::until,
    run,
};

/// Rounds of killing, unless `MPYPI_CLUSTER_ROUNDS` says otherwise.
const ROUNDS: u64 = 2;
/// Packages of a release.
const PACKAGES: usize = 300;

fn number(name: &str, usual: u64) -> u64 {
    env::var(name).ok().map_or(usual, |text| text.parse().unwrap())
}

/// Writes a channel of so many files; `round` is in each of them.
fn write_channel(world: &World, files: usize, round: u64) {
    for number in 0..files {
        let text = format!("# {round}, {number}\n{}", "x = 1\n".repeat(number % 50));
        world.write(&format!("dev/src/part{number}.py"), text);
    }
}

/// A client that is not ours. Each is another one: a cluster sends away who comes to a second node while the first still has them.
fn auditor(address: SocketAddr) -> Client {
    Client::connect(address, &format!("auditor-{:08x}", fastrand::u32(..)))
}

/// The list of `dev` that a broker retains, if it has one.
fn list(address: SocketAddr) -> Option<Vec<u8>> {
    let mut client = auditor(address);
    Some(client.retained_at("mpypi/channels/dev", 0)?.payload)
}

/// What of a list a broker lacks: each package, read by its topic.
fn lacks(address: SocketAddr, list: &[u8]) -> Vec<String> {
    let list = UpdateList::parse(list).unwrap();
    let mut client = auditor(address);
    let is_missing = |(id, _): &(mpypi_protocol::PackageId, Option<u64>)| {
        let found = client.retained_at(&id.topic(), 0);
        found.is_none_or(|found| Digest::of(&found.payload) != *id.digest())
    };
    list.packages().filter(is_missing).map(|(id, _)| id.topic()).collect()
}

fn publish(world: &World, brokers: &str, more: &[&str]) -> Running {
    let folder = world.text("dev");
    Running::start("mpypi", &[&["publish", &folder, "--broker", brokers, "--json"], more].concat())
}

/// Publishes with `--json`, and says what each broker has in the end.
fn standings(output: &Output) -> BTreeMap<String, String> {
    let outcome = output.json();
    let brokers = outcome["agreement"]["brokers"].as_array().unwrap().clone();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    brokers.iter().map(|broker| (text(&broker["url"]), text(&broker["state"]))).collect()
}

#[test]
fn what_is_published_to_three_nodes_is_read_back_from_each_of_them() {
    let world = World::new();
    let cluster = Cluster::start(&world, 3);
    write_channel(&world, 20, 1);
    let published = publish(&world, &cluster.urls(), &[]).wait().expect_code(0);
    assert_eq!(published.json()["agreement"]["agreed"], true, "{}", published.stdout);
    assert_eq!(standings(&published).into_values().collect::<Vec<_>>(), ["agrees"; 3]);
    let served = list(cluster.address(0)).unwrap();
    for node in 0..3 {
        assert_eq!(list(cluster.address(node)).as_ref(), Some(&served));
        assert_eq!(lacks(cluster.address(node), &served), Vec::<String>::new());
    }
    // What a node lost is there again after the next publish, although nothing changed.
    let parsed = UpdateList::parse(&served).unwrap();
    let (lost, _) = parsed.packages().next().unwrap();
    assert!(Client::connect(cluster.address(1), "a-thief").retain(&lost.topic(), b""));
    assert_eq!(lacks(cluster.address(1), &served), [lost.topic()]);
    let repaired = publish(&world, &cluster.urls(), &[]).wait().expect_code(0);
    assert_eq!((&repaired.json()["unchanged"], &repaired.json()["sequence"]), (&true.into(), &1.into()));
    for node in 0..3 {
        assert_eq!(lacks(cluster.address(node), &served), Vec::<String>::new());
    }
}

#[test]
fn after_a_node_was_killed_at_any_moment_a_publish_that_succeeds_left_nothing_missing_on_a_survivor() {
    let seed = number("MPYPI_SEED", fastrand::u64(..1000));
    println!("MPYPI_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut agreed, mut repairs, mut not) = (0, 0, Vec::new());
    let rounds = number("MPYPI_CLUSTER_ROUNDS", ROUNDS);
    for round in 1..=rounds {
        let world = World::new();
        let mut cluster = Cluster::start(&world, 3);
        write_channel(&world, PACKAGES, round);
        let (victim, after) = (random.usize(..3), Duration::from_millis(random.u64(..2500)));
        let publisher = publish(&world, &cluster.urls(), &["--may-be-down", "1"]);
        wait(after);
        cluster.kill(victim);
        let output = publisher.wait();
        let survivors: Vec<usize> = (0..3).filter(|node| *node != victim).collect();
        match output.code {
            Some(0) => {
                agreed += 1;
                // Who chooses a new leader takes no clients for a moment.
                for node in &survivors {
                    assert!(cluster.is_ready(*node, PATIENCE), "round {round}");
                }
                repairs += output.json()["agreement"]["repairs"].as_u64().unwrap();
                let served = list(cluster.address(survivors[0])).expect("a list");
                for node in survivors {
                    assert_eq!(list(cluster.address(node)).as_ref(), Some(&served), "round {round}");
                    assert_eq!(lacks(cluster.address(node), &served), Vec::<String>::new(), "round {round}");
                }
            }
            // It says who has not got it; or that nobody took it.
            Some(1 | 3) => {
                if !output.stdout.is_empty() {
                    let found = standings(&output);
                    let odd = survivors.iter().filter(|node| found[&cluster.url(**node)] != "agrees");
                    assert!(odd.count() > 0, "round {round}: {output:?}");
                }
                let why = output.stderr.lines().find(|line| line.starts_with("error:"));
                not.push((round, why.expect("a reason").to_owned()));
            }
            other => panic!("round {round}: {other:?}: {}", output.stderr),
        }
        println!("round {round}: {agreed} succeeded, {repairs} times something was published again");
    }
    println!(
        "{agreed} of {rounds} publishes succeeded, {repairs} times something was published again; not: {not:#?}"
    );
}

/// A broker that acknowledges what it is told to retain, and goes on serving what it had.
pub(crate) fn frozen(broker: &Server) -> Proxy {
    Proxy::start(broker.address, |is_client, packet| match is_client && packet[0] >> 4 == 3 {
        // Bit 0 of a PUBLISH: retain.
        true => Verdict::Replace([&[packet[0] & !1], &packet[1..]].concat()),
        false => Verdict::Pass,
    })
}

#[test]
fn a_node_that_goes_on_serving_an_old_list_is_named_with_the_release_and_its_time() {
    let world = World::new();
    // Brokers that know nothing of each other: each gets what is published through its own address.
    let homes = [World::new(), World::new()];
    let [fresh, stale] = homes.each_ref().map(Server::mosquitto);
    write_channel(&world, 3, 1);
    let both = format!("{},{}", fresh.url(), stale.url());
    publish(&world, &both, &[]).wait().expect_code(0);
    assert_eq!(list(fresh.address), list(stale.address), "what one lacks is published through it");
    let old = list(stale.address).unwrap();
    let created = UpdateList::parse(&old).unwrap().release().unwrap().created.unwrap();

    write_channel(&world, 3, 2);
    publish(&world, &fresh.url(), &[]).wait().expect_code(0);
    let frozen = frozen(&stale);
    let both = format!("{},{}", fresh.url(), frozen.url());
    let unchanged = publish(&world, &both, &["--agree-within", "2s"]).wait().expect_code(3);
    let agreement = &unchanged.json()["agreement"];
    let (first, second) = (&agreement["brokers"][0], &agreement["brokers"][1]);
    assert_eq!((&agreement["agreed"], &first["state"]), (&false.into(), &"agrees".into()));
    assert_eq!((&second["state"], &second["serves"]["sequence"]), (&"stale".into(), &1.into()));
    let text = format!("{} is stale: it still serves release 1, made {created}", frozen.url());
    assert!(unchanged.stderr.contains(&text), "{}", unchanged.stderr);

    // Nothing new is put where it cannot come to all: the old release stands.
    write_channel(&world, 3, 3);
    let before = list(fresh.address);
    let refused = publish(&world, &both, &["--agree-within", "2s"]).wait().expect_code(1);
    assert!(
        refused.stderr.contains("the old release stands") && refused.stderr.contains(&text),
        "{}",
        refused.stderr
    );
    assert_eq!(list(fresh.address), before);
    // When it takes messages again, all of it comes to it.
    let both = format!("{},{}", fresh.url(), stale.url());
    publish(&world, &both, &[]).wait().expect_code(0);
    assert_ne!(list(fresh.address), before);
    assert_eq!(list(fresh.address), list(stale.address));
}

#[test]
fn what_is_published_follows_the_newest_list_that_any_node_has_and_never_one_that_a_node_went_back_to() {
    let world = World::new();
    let homes = [World::new(), World::new()];
    let [fresh, stale] = homes.each_ref().map(Server::mosquitto);
    for round in 1..=3 {
        write_channel(&world, 2, round);
        publish(&world, &fresh.url(), &[]).wait().expect_code(0);
        if round == 1 {
            publish(&world, &stale.url(), &["--sequence", "1"]).wait().expect_code(0);
        }
    }
    write_channel(&world, 2, 4);
    // The stale one is named first.
    let both = format!("{},{}", stale.url(), fresh.url());
    let published = publish(&world, &both, &[]).wait().expect_code(0);
    assert_eq!(published.json()["sequence"], 4);
    assert_eq!(list(fresh.address), list(stale.address));
    let before = list(fresh.address).unwrap();
    let back = run("mpypi", &["rollback", "dev", "--to", "3", "--broker", &both, "--json"]).expect_code(0);
    assert_eq!(back.json()["sequence"], 5);
    assert_ne!(list(stale.address).unwrap(), before);
    assert_eq!(list(fresh.address), list(stale.address));
}

/// What `mpypi` finds wrong, by broker.
fn troubles(output: &Output, key: &str) -> Vec<(String, String)> {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let report = output.json();
    let rows = report[key].as_array().unwrap().iter().filter(|row| row["trouble"].is_string());
    rows.map(|row| (text(&row["broker"]), text(&row["trouble"]))).collect()
}

/// Puts everything that one broker retains on another, as a bridge would.
fn copy(from: &Server, to: &Server) {
    let (mut reader, mut writer) =
        (Client::connect(from.address, "a-copier"), Client::connect(to.address, "a-copier"));
    assert_eq!(reader.subscribe("mpypi/#", 0), 0);
    reader.fence();
    while reader.waits() {
        let message = reader.message().unwrap();
        assert!(writer.retain(&message.topic, &message.payload));
    }
}

#[test]
fn who_looks_through_all_addresses_is_told_which_of_them_serves_something_else() {
    let world = World::new();
    let homes = [World::new(), World::new(), World::new()];
    let servers = homes.each_ref().map(Server::mosquitto);
    let [fresh, stale, other] = &servers;
    let all = format!("{},{},{}", stale.url(), fresh.url(), other.url());
    let keys = world.text("keys");
    let look = |command: &str| run("mpypi", &[command, "dev", "--broker", &all, "--json", "--keys", &keys]);
    write_channel(&world, 3, 1);
    publish(&world, &fresh.url(), &[]).wait().expect_code(0);
    copy(fresh, stale);
    copy(fresh, other);
    let same = look("verify").expect_code(0);
    let checks = same.json()["checks"].as_array().unwrap().clone();
    assert!(checks.iter().all(|check| check["broker"].is_null()), "{checks:?}");
    assert!(same.stdout.contains("3 brokers retain the same list, roots and history"), "{}", same.stdout);
    assert_eq!(troubles(&look("log").expect_code(0), "differ"), []);

    // One stays behind.
    write_channel(&world, 3, 2);
    publish(&world, &fresh.url(), &[]).wait().expect_code(0);
    copy(fresh, other);
    let created = |server: &Server| {
        UpdateList::parse(&list(server.address).unwrap()).unwrap().release().unwrap().created.unwrap()
    };
    let behind = format!(
        "still serves release 1 (made {}), where {} serves release 2 (made {}); lacks 1 earlier list, 1 among them",
        created(stale),
        fresh.url(),
        created(fresh)
    );
    let named = [(stale.url(), behind)];
    assert_eq!(troubles(&look("verify").expect_code(1), "checks"), named);
    let log = look("log").expect_code(1);
    assert_eq!(troubles(&log, "differ"), named);
    assert_eq!(log.json()["lists"][0]["sequence"], 2, "the newest is shown, whoever is named first");
    let status = run("mpypi", &["status", "dev", "--broker", &all, "--json"]).expect_code(0);
    assert_eq!(status.json()["channels"][0]["sequence"], 2);
    assert_eq!(troubles(&status, "differ"), [(stale.url(), "still serves release 1".to_owned())]);

    // Another lost a package, and then is gone.
    copy(fresh, stale);
    let served = UpdateList::parse(&list(other.address).unwrap()).unwrap();
    let (lost, _) = served.packages().next().unwrap();
    assert!(Client::connect(other.address, "a-thief").retain(&lost.topic(), b""));
    let missing = format!("1 package missing, `{lost}` among them");
    assert_eq!(troubles(&look("verify").expect_code(1), "checks"), [(other.url(), missing)]);
    let [_, _, other] = servers;
    let gone = other.url();
    other.kill();
    let found = troubles(&look("verify").expect_code(1), "checks");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].0 == gone && found[0].1.contains("refused"), "{found:?}");
    let status = run("mpypi", &["status", "dev", "--broker", &all]).expect_code(0).stdout;
    assert!(status.contains(&format!("! {gone}: ")), "{status}");
}

/// The state of a node, as a broker retains it, once it is what is waited for.
fn state(address: SocketAddr, node: &str, is_it: impl Fn(&State) -> bool) -> State {
    let deadline = Deadline::new();
    let mut client = Client::connect(address, "an-observer");
    loop {
        let found = client.retained_at(&format!("mpypi/nodes/{node}/state"), 0);
        if let Some(state) = found.and_then(|found| State::parse(&found.payload).ok()).filter(&is_it) {
            return state;
        }
        deadline.check("the node does not get there");
    }
}

#[test]
fn a_device_whose_broker_is_behind_stays_at_what_it_has_and_takes_what_comes_next() {
    let world = World::new();
    let homes = [World::new(), World::new()];
    let [fresh, stale] = homes.each_ref().map(Server::mosquitto);
    write_channel(&world, 2, 1);
    for broker in [&fresh, &stale] {
        publish(&world, &broker.url(), &[]).wait().expect_code(0);
    }
    write_channel(&world, 2, 2);
    publish(&world, &fresh.url(), &[]).wait().expect_code(0);
    let root = world.text("node");
    let arguments = ["run", "--root", &root, "--node", "kitchen", "--confirm-after", "50ms", "--broker"];
    run("mpypi-agent", &[&arguments[..], &[&fresh.url(), "--once"]].concat()).expect_code(0);
    let second = world.files("dev/src");
    assert_eq!(world.files("node"), second);

    let address = fresh.address;
    fresh.kill();
    let both = format!("mqtt://{address},{}", stale.url());
    let agent = Running::start("mpypi-agent", &[&arguments[..], &[both.as_str()]].concat());
    // It has read the older list when it says that it has nothing to do.
    let resting = state(stale.address, "kitchen", |state| state.phase == Phase::Idle);
    assert_eq!((resting.sequence, resting.error), (Some(2), None));
    write_channel(&world, 2, 3);
    publish(&world, &stale.url(), &["--sequence", "3"]).wait().expect_code(0);
    state(stale.address, "kitchen", |state| state.phase == Phase::Idle && state.sequence == Some(3));
    agent.signal("-TERM");
    let output = agent.wait();
    assert_eq!(world.files("node"), world.files("dev/src"));
    assert!(!output.stderr.contains("failed"), "{}", output.stderr);
}

/// Waits until each of so many devices has the file as it is in the channel's folder now, and is not on trial with it.
fn until_all_have_it(world: &World, nodes: usize) {
    let wanted = world.files("dev/src")["part1.py"].clone();
    for number in 1..=nodes {
        let folder = world.path(&format!("fleet/device-{number}"));
        until(&format!("device {number} of {nodes} has not got the release"), || {
            fs::read(folder.join("part1.py")).is_ok_and(|found| found == wanted)
                && !folder.join(".mpypi/journal.json").exists()
        });
    }
}

#[test]
fn a_fleet_on_three_nodes_of_which_one_is_killed_in_a_rollout_converges_and_nobody_goes_back() {
    let nodes = number("MPYPI_CLUSTER_NODES", 30) as usize;
    let world = World::new();
    let mut cluster = Cluster::start(&world, 3);
    write_channel(&world, 8, 1);
    publish(&world, &cluster.urls(), &[]).wait().expect_code(0);
    let (urls, count) = (cluster.urls(), nodes.to_string());
    let (report, disk) = (world.text("fleet.json"), world.text("fleet"));
    let fleet = Running::start(
        "mpypi-agent",
        &[
            "fleet",
            "--broker",
            &urls,
            "--nodes",
            &count,
            "--confirm-after",
            "50ms",
            "--check",
            "10s",
            "--for",
            "20m",
            "--report",
            &report,
            "--disk",
            &disk,
            "--expect",
            "applied=100%",
            "--expect",
            "bricked=0",
        ],
    );
    until_all_have_it(&world, nodes);

    write_channel(&world, 8, 2);
    let folder = world.text("dev");
    let rollout = Running::start(
        "mpypi",
        &[
            "rollout",
            &folder,
            "--broker",
            &urls,
            "--may-be-down",
            "1",
            "--steps",
            "10%,50%,100%",
            "--wait",
            "1s",
            "--patience",
            "5m",
            "--max-failures",
            "100%",
            "--min-success",
            "50%",
            "--json",
        ],
    );
    // The release for nobody is 2; then come its steps.
    let sequence =
        |address| UpdateList::parse(&list(address)?).ok()?.release().map(|release| release.sequence);
    until("the rollout does not begin", || sequence(cluster.address(0)) >= Some(3));
    cluster.kill(1 + fastrand::usize(..2));
    let rollout = rollout.wait();
    assert_eq!(rollout.code, Some(0), "{}{}", rollout.stdout, rollout.stderr);
    // What a device says may be lost with the node that it said it to; what it has is in its folder.
    until_all_have_it(&world, nodes);
    fleet.signal("-TERM");
    let fleet = fleet.wait();
    assert_eq!(fleet.code, Some(0), "{}{}", fleet.stdout, fleet.stderr);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let mut at: BTreeMap<&str, u64> = BTreeMap::new();
    for row in report["results"].as_array().unwrap() {
        let (node, sequence) = (row["device"].as_str().unwrap(), row["sequence"].as_u64().unwrap());
        let before = at.insert(node, sequence).unwrap_or(0);
        assert!(sequence >= before, "{node} went back from {before} to {sequence}");
    }
    assert_eq!(at.len(), nodes);
    println!("{}", fleet.stdout);
}

#[test]
fn a_micropython_device_goes_by_several_addresses_and_never_back_with_one_that_is_behind() {
    let world = World::new();
    let homes = [World::new(), World::new()];
    let [fresh, stale] = homes.each_ref().map(Server::mosquitto);
    write_channel(&world, 2, 1);
    for broker in [&fresh, &stale] {
        publish(&world, &broker.url(), &[]).wait().expect_code(0);
    }
    write_channel(&world, 2, 2);
    publish(&world, &fresh.url(), &[]).wait().expect_code(0);
    let second = world.files("dev/src");
    fs::create_dir(world.path("board")).unwrap();
    let root = world.text("board/");
    let code = "import mpypi, sys\nfor n in range(2): mpypi.run(server=sys.argv[1], channel='dev', node='board', \
                root=sys.argv[2], confirm_after=50, restart=lambda: sys.exit(9))";
    let script = world.write("board.py", code).to_str().unwrap().to_owned();
    let device = concat!(env!("CARGO_MANIFEST_DIR"), "/../device");
    let start = |servers: &str| {
        Running::start_with("micropython", &[&script, servers, &root], &[("MICROPYPATH", device)])
    };
    // Restarts once it has the release, which is the end of it here; then it confirms.
    start(&fresh.url()).wait().expect_code(9);
    assert_eq!(world.files("board"), second);
    let gone = fresh.address;
    fresh.kill();
    let board = start(&format!("mqtt://{gone}, {}", stale.url()));
    let resting = state(stale.address, "board", |state| state.phase == Phase::Idle);
    assert_eq!((resting.sequence, resting.error), (Some(2), None));
    write_channel(&world, 2, 3);
    publish(&world, &stale.url(), &["--sequence", "3"]).wait().expect_code(0);
    let output = board.wait().expect_code(9);
    assert!(output.stdout.contains("is behind others"), "{}", output.stdout);
    assert_eq!(world.files("board"), world.files("dev/src"));
}

/// One row of the table in docs/brokers.md. What is published to `brokers` comes to devices from `serving`.
fn engine(world: &World, name: &str, brokers: &str, serving: &str, nodes: u64) {
    for number in 0..20 {
        world.write(&format!("dev/src/part{number}.py"), format!("# part {number:02}\n").repeat(800));
    }
    let started = clock();
    publish(world, brokers, &[]).wait().expect_code(0);
    for address in serving.split(',').filter_map(|url| url.strip_prefix("mqtt://")?.parse().ok()) {
        until("what was published does not come", || list(address).is_some_and(|list| list != b"[]"));
    }
    let published = started.elapsed();
    let (nodes, report) = (nodes.to_string(), world.text(&format!("{name}.json")));
    let fleet =
        ["fleet", "--broker", serving, "--nodes", &nodes, "--confirm-after", "50ms", "--releases", "1"];
    let more = ["--for", "10m", "--report", &report, "--expect", "applied=100%", "--expect", "bricked=0"];
    run("mpypi-agent", &[&fleet[..], &more].concat()).expect_code(0);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let mut seconds: Vec<f64> = Vec::new();
    let mut bytes = 0;
    for row in report["results"].as_array().unwrap() {
        seconds.push(row["seconds"].as_f64().unwrap());
        bytes += row["wire_bytes"].as_u64().unwrap();
    }
    seconds.sort_by(f64::total_cmp);
    let at = |share: usize| seconds[(seconds.len() - 1) * share / 100];
    println!(
        "| {name} | {:.1} | {nodes} | {:.2} | {:.2} | {:.2} | {} |",
        published.as_secs_f64(),
        at(50),
        at(95),
        at(100),
        bytes / seconds.len() as u64
    );
}

#[test]
#[ignore = "makes a table: `make engines`"]
fn the_same_fleet_on_each_engine() {
    let nodes = number("MPYPI_ENGINE_NODES", 200);
    println!(
        "| engine | publish (s) | devices | median (s) | 95% (s) | last (s) | bytes each |\n|---|---|---|---|---|---|---|"
    );
    let world = World::new();
    let alone = |name: &str, brokers: &str| engine(&world, name, brokers, brokers, nodes);
    let home = World::new();
    alone("ours", &Server::start(&home).url());
    alone("mosquitto", &Server::mosquitto(&home).url());
    for count in [1, 3] {
        let home = World::new();
        alone(&format!("NATS, {count}"), &Cluster::start(&home, count).urls());
    }
    let (home, site) = (World::new(), World::new());
    let cluster = Cluster::start(&home, 3);
    let addresses: Vec<String> = (0..3).map(|node| cluster.url(node)).collect();
    let upstream: Vec<&str> = addresses.iter().flat_map(|url| ["--upstream", url]).collect();
    let edge = Server::start_with(&site, &upstream);
    engine(&world, "an edge of NATS, 3", &cluster.urls(), &edge.url(), nodes);
}

#[expect(clippy::disallowed_methods, reason = "the moment of a kill is real time, and any is right")]
fn wait(time: Duration) {
    thread::sleep(time);
}
