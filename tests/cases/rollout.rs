//! Rollouts that stop themselves: the publisher, brokers and fleets as their users run them.

use std::{collections::BTreeMap, env, fs};

use mpypi_protocol::{
    NodeId, Rollout, UpdateList,
    node::{Phase, State},
    rollout::Percent,
};
use mpypi_tests::{Client, Deadline, Kind, Output, Running, Server, World, mpyblox::Blox, run};
use serde_json::Value;

const KINDS: [Kind; 2] = [Kind::Ours, Kind::Mosquitto];

fn broker(kind: Kind, world: &World) -> Server {
    match kind {
        Kind::Ours => Server::start(world),
        Kind::Mosquitto => Server::mosquitto(world),
    }
}

/// The channel `dev` with this version.
fn channel(world: &World, version: &str) {
    world.write("dev/src/main.py", format!("print('{version}')\n"));
    world.write("dev/channel.toml", format!("version = \"{version}\"\n"));
}

/// Devices that run version 1.0, named `device-1` and so on; version 2.0 crashes on a share of them. One more, that nothing
/// befalls, is what the fleet compares them with.
fn fleet(world: &World, server: &Server, nodes: usize, broken: &str, seed: u64) -> Running {
    channel(world, "1.0");
    let _ = run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
    let profile = format!("[application]\nbroken = \"{broken}\"\nbroken-version = \"2.0\"\n");
    let profile = world.write("crash.toml", profile);
    let (nodes_text, seed) = (nodes.to_string(), seed.to_string());
    let options = ["fleet", "--broker", &server.url(), "--profile", profile.to_str().unwrap()];
    let more = ["--nodes", &nodes_text, "--seed", &seed, "--confirm-after", "100ms", "--for", "1h"];
    let fleet = Running::start("mpypi-agent", &[&options[..], &more].concat());
    let mut watch = Watch::start(server);
    watch.until("devices start with version 1.0", |states| {
        states.values().filter(|state| runs(state, "1.0")).count() == nodes
    });
    channel(world, "2.0");
    fleet
}

fn runs(state: &State, version: &str) -> bool {
    state.phase == Phase::Idle && state.version.as_deref() == Some(version)
}

fn count(states: &BTreeMap<String, State>, version: &str) -> usize {
    states.values().filter(|state| runs(state, version)).count()
}

fn rollout(world: &World, server: &Server, more: &[&str]) -> Output {
    start(world, server, more).wait()
}

fn start(world: &World, server: &Server, more: &[&str]) -> Running {
    Running::start("mpypi", &[&["rollout", &world.text("dev"), "--broker", &server.url()], more].concat())
}

fn told(server: &Server, order: &str) -> Output {
    run("mpypi", &["rollout", order, "dev", "--broker", &server.url(), "--json"])
}

/// Everything that devices say of their updates, and what publishers say of theirs.
struct Watch {
    client: Client,
    states: BTreeMap<String, State>,
}

impl Watch {
    fn start(server: &Server) -> Watch {
        let mut client = Client::connect(server.address, "watch");
        client.subscribe("mpypi/nodes/+/state", 0);
        Watch { client, states: BTreeMap::new() }
    }

    fn until(&mut self, what: &str, mut is: impl FnMut(&BTreeMap<String, State>) -> bool) {
        let deadline = Deadline::new();
        while !is(&self.states) {
            deadline.check(what);
            let message = self.client.message().unwrap_or_else(|| panic!("{what}: {:?}", self.states));
            let state = State::parse(&message.payload).unwrap();
            let node = message.topic.split('/').nth(2).unwrap().to_owned();
            if !node.starts_with("mpypi-reference") {
                self.states.insert(node, state);
            }
        }
    }
}

/// The list of `dev`, and whom it is for.
fn list(server: &Server) -> (UpdateList, Option<Rollout>) {
    let mut client = Client::connect(server.address, "reader");
    let list = UpdateList::parse(&client.retained("mpypi/channels/dev").unwrap().payload).unwrap();
    let rollout = Rollout::of(list.release().unwrap()).unwrap();
    (list, rollout)
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number")).try_into().unwrap()
}

#[test]
fn a_release_that_works_reaches_every_device_in_steps() {
    for kind in KINDS {
        let world = World::new();
        let server = broker(kind, &world);
        let _fleet = fleet(&world, &server, 30, "0%", 1);
        let done = rollout(&world, &server, &["--steps", "20%,100%", "--wait", "1s"]).expect_code(0);
        assert!(done.stderr.contains("step 1 of 2 (20%)"), "{}", done.stderr);
        assert!(done.stdout.starts_with("dev: version 2.0, done"), "{}", done.stdout);
        Watch::start(&server).until("all run it", |states| count(states, "2.0") == 30);
        let status = run("mpypi", &["rollout", "status", "dev", "--broker", &server.url(), "--json"]);
        let status = status.expect_code(0).json();
        assert_eq!(
            (&status["status"], &status["nodes"]["succeeded"]),
            (&"done".into(), &31.into()),
            "{status}"
        );
        assert_eq!(status["steered-by"], Value::Null, "the lease is given back");
    }
}

#[test]
fn a_release_that_crashes_stops_by_itself_and_leaves_nobody_broken() {
    for kind in KINDS {
        let world = World::new();
        let server = broker(kind, &world);
        let _fleet = fleet(&world, &server, 60, "25%", 4);
        let steps = ["--steps", "30%,100%", "--wait", "2s", "--json"];
        let stopped = rollout(&world, &server, &steps).expect_code(3);
        let outcome = stopped.json();
        assert_eq!(outcome["status"], "paused", "{outcome}");
        assert!(outcome["reason"].as_str().unwrap().contains("rolled back"), "{outcome}");
        assert!(stopped.stderr.contains("hint: `mpypi rollout resume dev`"), "{}", stopped.stderr);
        let (_, now) = list(&server);
        let now = now.unwrap();
        assert_eq!(now.percent, Percent::NONE, "nobody else gets it");
        // Whoever was not in keeps what it has; whoever crashed has what it had.
        let step: Percent = outcome["steps"][number(&outcome["step"]) - 1].as_str().unwrap().parse().unwrap();
        let mut watch = Watch::start(&server);
        watch.until("all rest", |states| {
            states.len() == 60
                && states.values().all(|state| matches!(state.phase, Phase::Idle | Phase::RolledBack))
        });
        for (node, state) in &watch.states {
            if runs(state, "2.0") || state.phase == Phase::RolledBack {
                assert!(step.admits(now.id.position(node)), "{node} was not in: {state:?}");
            }
        }
        assert!(watch.states.values().any(|state| state.phase == Phase::RolledBack));
    }
}

#[test]
fn the_release_before_is_put_back_by_itself_where_that_is_wanted() {
    let world = World::new();
    let server = Server::start(&world);
    let _fleet = fleet(&world, &server, 60, "25%", 9);
    let steps = ["--steps", "40%,100%", "--wait", "2s", "--rollback-on-failure", "--json"];
    let outcome = rollout(&world, &server, &steps).expect_code(3).json();
    assert_eq!(outcome["status"], "rolled-back", "{outcome}");
    Watch::start(&server).until("all run what they had", |states| count(states, "1.0") == 60);
    let (list, now) = list(&server);
    let release = list.release().unwrap();
    assert_eq!((release.version.as_str(), now), ("1.0", None));
    let revoked: Vec<u64> = serde_json::from_value(release.extra["revoked"].clone()).unwrap();
    assert_eq!(revoked, (2..release.sequence).collect::<Vec<_>>());
}

#[test]
fn killed_after_everything_that_it_does_it_ends_the_same_when_it_is_run_again() {
    killed_again_and_again(Kind::Ours);
}

#[test]
fn killed_after_everything_that_it_does_it_ends_the_same_on_mosquitto_too() {
    killed_again_and_again(Kind::Mosquitto);
}

fn killed_again_and_again(kind: Kind) {
    {
        let world = World::new();
        let server = broker(kind, &world);
        let _fleet = fleet(&world, &server, 12, "0%", 2);
        let mut watch = Client::connect(server.address, "killer");
        watch.subscribe("mpypi/channels/#", 1);
        let mut seen = Vec::new();
        let mut runs = 0;
        loop {
            runs += 1;
            assert!(runs < 20, "it gets nowhere: {seen:?}");
            let rollout = start(&world, &server, &["--steps", "50%,100%", "--wait", "1s"]);
            // A new list, or a new record: what was decided is done, and what follows from it is not.
            let mut record = None;
            while record.is_none() {
                let message = watch.message().expect("it does something");
                let counts = ["mpypi/channels/dev", "mpypi/channels/dev/rollout"].contains(&&*message.topic);
                if counts && !seen.contains(&message.payload) {
                    seen.push(message.payload.clone());
                    record = Some(message);
                }
            }
            let record = record.unwrap();
            let is_first_look = runs == 1 && seen.len() == 1;
            if record.topic.ends_with("/rollout") && record.payload.windows(6).any(|text| text == b"\"done\"")
            {
                let _ = rollout.wait().expect_code(0);
                break;
            }
            // The list of version 1.0, which was there.
            if !is_first_look {
                rollout.signal("-KILL");
                let _ = rollout.wait();
            }
        }
        assert!(runs >= 5, "{runs}");
        Watch::start(&server).until("all run it", |states| count(states, "2.0") == 12);
    }
}

#[test]
fn of_two_who_steer_one_waits_and_takes_over_when_the_other_is_gone() {
    let world = World::new();
    let server = Server::start(&world);
    let _fleet = fleet(&world, &server, 10, "0%", 3);
    let mut lease = Client::connect(server.address, "lease");
    lease.subscribe("mpypi/channels/dev/rollout/lease", 1);
    let mut holder = || loop {
        let holder = String::from_utf8(lease.message().expect("somebody steers").payload).unwrap();
        if !holder.is_empty() {
            return holder;
        }
    };
    let steps = ["--steps", "50%,100%", "--wait", "4s"];
    let first = start(&world, &server, &steps);
    let one = holder();
    let mut record = Client::connect(server.address, "record");
    record.subscribe("mpypi/channels/dev/rollout", 1);
    record.message().expect("it is under way");
    let second = start(&world, &server, &steps);
    let status = loop {
        // Both are connected now: the second says nothing, and changes nothing.
        let status = told(&server, "status").json();
        if status["percent"] == "50" {
            break status;
        }
    };
    assert_eq!(status["steered-by"], one.as_str());
    first.signal("-KILL");
    let _ = first.wait();
    let other = holder();
    assert_ne!(one, other);
    let done = second.wait().expect_code(0);
    assert!(done.stdout.contains("done"), "{}", done.stdout);
    Watch::start(&server).until("all run it", |states| count(states, "2.0") == 10);
}

#[test]
fn a_rollout_is_paused_resumed_and_aborted_from_elsewhere() {
    let world = World::new();
    let server = Server::start(&world);
    let _fleet = fleet(&world, &server, 20, "0%", 5);
    let none = told(&server, "pause").expect_code(1);
    assert!(none.stderr.contains("channel `dev` has no rollout"), "{}", none.stderr);

    let steering = start(&world, &server, &["--steps", "50%,100%", "--wait", "1h"]);
    let mut watch = Watch::start(&server);
    watch.until("the first step is there", |states| count(states, "2.0") > 0);
    let paused = told(&server, "pause").expect_code(0).json();
    assert_eq!(paused["status"], "paused", "{paused}");
    let stopped = steering.wait().expect_code(3);
    assert!(stopped.stderr.contains("someone paused it"), "{}", stopped.stderr);
    assert_eq!(list(&server).1.unwrap().percent, Percent::NONE);
    let again = rollout(&world, &server, &[]).expect_code(3);
    assert!(again.stderr.contains("is paused: someone paused it"), "{}", again.stderr);
    let again = told(&server, "pause").expect_code(1);
    assert!(again.stderr.contains("there is nothing to pause"), "{}", again.stderr);

    // Another release is not begun on top of it.
    channel(&world, "3.0");
    let other = rollout(&world, &server, &[]).expect_code(1);
    assert!(other.stderr.contains("is at another rollout, of version 2.0"), "{}", other.stderr);

    let resumed = Running::start("mpypi", &["rollout", "resume", "dev", "--broker", &server.url()]);
    let mut record = Client::connect(server.address, "record");
    record.subscribe("mpypi/channels/dev/rollout", 1);
    while !record.message().unwrap().payload.windows(9).any(|text| text == b"\"running\"") {}
    let aborted = told(&server, "abort").expect_code(0).json();
    assert_eq!(aborted["status"], "rolled-back", "{aborted}");
    let _ = resumed.wait().expect_code(3);
    Watch::start(&server).until("all run what they had", |states| count(states, "1.0") == 20);
}

#[test]
fn only_devices_that_the_query_asks_for_take_it_and_a_new_one_takes_what_others_had() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "1.0");
    let _ = run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
    let device = |name: &str, more: &[&str]| {
        let root = world.text(name);
        let options = ["run", "--broker", &server.url(), "--node", name, "--root", &root];
        Running::start("mpypi-agent", &[&options[..], &["--confirm-after", "50ms"], more].concat())
    };
    let _kitchen = device("kitchen", &["--label", "room=kitchen"]);
    let _bath = device("bath", &["--label", "room=bath", "--utc-offset", "60"]);
    let mut watch = Watch::start(&server);
    watch.until("both start with version 1.0", |states| count(states, "1.0") == 2);
    channel(&world, "2.0");
    let only = ["--only", "label.room = kitchen and version < 2", "--steps", "100%", "--wait", "1s"];
    let outcome = rollout(&world, &server, &[&only[..], &["--json"]].concat()).expect_code(0).json();
    assert_eq!(outcome["nodes"]["nodes"], 1, "{outcome}");
    let file = |name: &str| fs::read_to_string(world.path(name).join("main.py")).unwrap();
    watch.until("the kitchen runs it", |states| states.get("kitchen").is_some_and(|s| runs(s, "2.0")));
    watch.until("the bath holds it", |states| states.get("bath").is_some_and(|state| state.held.is_some()));
    assert_eq!((file("kitchen"), file("bath")), ("print('2.0')\n".into(), "print('1.0')\n".into()));
    let _cellar = device("cellar", &[]);
    watch.until("a new one runs what others had", |states| {
        states.get("cellar").is_some_and(|state| runs(state, "1.0") && state.held.is_some())
    });
    assert_eq!(file("cellar"), "print('1.0')\n");
    let wrong = rollout(&world, &server, &["--only", "size > 3"]).expect_code(2);
    assert!(wrong.stderr.contains("`size` is no field"), "{}", wrong.stderr);
}

#[test]
fn what_a_channel_has_is_rolled_out_by_its_name_as_channel_toml_says_for_a_folder() {
    let world = World::new();
    let server = Server::start(&world);
    let _fleet = fleet(&world, &server, 8, "0%", 6);
    let settings = "version = \"2.0\"\n[rollout]\nsteps = \"100%\"\nwait = \"1s\"\n";
    world.write("dev/channel.toml", settings);
    let outcome = rollout(&world, &server, &["--json"]).expect_code(0).json();
    assert_eq!((&outcome["steps"][0], outcome["steps"].as_array().unwrap().len()), (&"100".into(), 1));
    let before = list(&server).0;
    let present =
        ["rollout", "dev", "--broker", &server.url(), "--steps", "50%,100%", "--wait", "1s", "--json"];
    let outcome = run("mpypi", &present).expect_code(0).json();
    assert_eq!(
        (&outcome["status"], &outcome["nodes"]["succeeded"]),
        (&"done".into(), &9.into()),
        "{outcome}"
    );
    let after = list(&server).0;
    assert!(after.packages().eq(before.packages()));
    let unknown = run("mpypi", &["rollout", "moon", "--broker", &server.url()]).expect_code(1);
    assert!(unknown.stderr.contains("channel `moon`"), "{}", unknown.stderr);
}

#[test]
fn devices_with_mpyblox_wait_for_their_turn_on_a_broker_of_ours_and_others_are_asked_about() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "1.0");
    let _ = run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
    let name = "esp32-0a1b2c";
    let node = NodeId::new(name).unwrap();
    let file = || fs::read_to_string(world.path(name).join("main.py")).unwrap_or_default();
    let mut blox = Blox::start(&world, &server, name, "dev", &[]);
    while file() != "print('1.0')\n" {
        blox.rest();
    }
    channel(&world, "2.0");
    let steering = start(&world, &server, &["--steps", "100%", "--wait", "1h", "--only", "node = nobody"]);
    let mut watch = Watch::start(&server);
    watch.until("the broker holds it", |states| states.get(name).is_some_and(|state| state.held.is_some()));
    assert_eq!(file(), "print('1.0')\n");
    let mut record = Client::connect(server.address, "record");
    record.subscribe("mpypi/channels/dev/rollout", 1);
    record.message().expect("it is steered");
    let _ = told(&server, "abort").expect_code(0);
    let _ = steering.wait().expect_code(3);
    let steering = start(&world, &server, &["--steps", "100%", "--wait", "1h"]);
    while file() != "print('2.0')\n" {
        blox.rest();
    }
    drop(steering);
    let (_, now) = list(&server);
    assert!(now.is_some_and(|now| now.percent.admits(now.id.position(node.as_str()))));

    let foreign = Server::mosquitto(&world);
    let _ =
        run("mpypi", &["publish", &world.text("dev"), "--broker", &foreign.url(), "--force"]).expect_code(0);
    let info = r#"{"uname":{"sysname":"esp32","machine":"x","version":"v1.22.0"},"versions":{}}"#;
    assert!(Client::connect(foreign.address, "any").retain("mpypi/nodes/old/info", info.as_bytes()));
    let options = ["--force", "--steps", "100%", "--wait", "1s", "--patience", "2s"];
    channel(&world, "3.0");
    let refused = rollout(&world, &foreign, &options).expect_code(1);
    assert!(refused.stderr.contains("1 node of channel `dev` cannot be held back"), "{}", refused.stderr);
    assert!(refused.stderr.contains("`--yes`"), "{}", refused.stderr);
    let _ = rollout(&world, &foreign, &[&options[..], &["--yes"]].concat()).expect_code(0);
}

/// The bar: 2,000 devices, five seeds, 5 % of them broken. Smaller here, whole in `make soak`.
#[test]
fn a_release_that_crashes_on_one_device_in_twenty_stops_within_its_first_steps() {
    let set = |name: &str, otherwise: usize| {
        env::var(name).ok().map_or(otherwise, |number| number.parse().unwrap())
    };
    let (nodes, seeds) = (set("MPYPI_ROLLOUT_NODES", 300), set("MPYPI_SEEDS", 1));
    for seed in 1..=seeds as u64 {
        let kind = KINDS[seed as usize % 2];
        let world = World::new();
        let server = broker(kind, &world);
        let _fleet = fleet(&world, &server, nodes, "5%", seed);
        let steps = ["--steps", "10%,50%,100%", "--wait", "3s", "--rollback-on-failure", "--json"];
        let outcome = rollout(&world, &server, &steps).expect_code(3).json();
        let step = number(&outcome["step"]);
        assert!(step <= 2, "seed {seed}: {outcome}");
        assert_eq!(outcome["status"], "rolled-back", "seed {seed}: {outcome}");
        let mut watch = Watch::start(&server);
        watch.until("all run what they had", |states| count(states, "1.0") == nodes);
        eprintln!("{kind:?}, seed {seed}: stopped at step {step}: {}", outcome["reason"]);
    }
}
