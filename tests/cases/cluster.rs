//! A cluster of NATS as the index: what it acknowledged and lost, and who says so.

use std::{collections::BTreeMap, env, net::SocketAddr, thread, time::Duration};

use mpypi_protocol::{Digest, UpdateList};
use mpypi_tests::{Client, Cluster, Output, Proxy, Running, Server, Verdict, World, run};

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

/// The list of `dev` that a broker retains, if it has one.
fn list(address: SocketAddr) -> Option<Vec<u8>> {
    let mut client = Client::connect(address, "an-auditor");
    Some(client.retained_at("mpypi/channels/dev", 0)?.payload)
}

/// What of a list a broker lacks: each package, read by its topic with a client that is not ours.
fn lacks(address: SocketAddr, list: &[u8]) -> Vec<String> {
    let list = UpdateList::parse(list).unwrap();
    let mut client = Client::connect(address, "an-auditor");
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
                repairs += output.json()["agreement"]["repairs"].as_u64().unwrap();
                let served = list(cluster.address(survivors[0])).expect("a list");
                for node in survivors {
                    assert_eq!(list(cluster.address(node)).as_ref(), Some(&served), "round {round}");
                    assert_eq!(lacks(cluster.address(node), &served), Vec::<String>::new(), "round {round}");
                }
            }
            // It says who has not got it; and so it is.
            Some(1 | 3) => {
                let found = standings(&output);
                let odd = survivors.iter().filter(|node| found[&cluster.url(**node)] != "agrees");
                assert!(odd.count() > 0, "round {round}: {output:?}");
                not.push((round, output.stderr.lines().last().unwrap_or_default().to_owned()));
            }
            other => panic!("round {round}: {other:?}: {}", output.stderr),
        }
    }
    println!(
        "{agreed} of {rounds} publishes succeeded, {repairs} times something was published again; not: {not:#?}"
    );
}

/// A broker that acknowledges what it is told to retain, and goes on serving what it had.
fn frozen(broker: &Server) -> Proxy {
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

#[expect(clippy::disallowed_methods, reason = "the moment of a kill is real time, and any is right")]
fn wait(time: Duration) {
    thread::sleep(time);
}
