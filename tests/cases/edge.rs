//! Edges: a broker that takes its channels from another one, ours or mosquitto, and what becomes of a site when the line,
//! the upstream or the edge itself goes.

use std::{
    env, fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
};

use mpypi_protocol::{Digest, KeyId, PackageId, UpdateList, key::Algorithm};
use mpypi_publisher::keys::Keys;
use mpypi_tests::{
    Client, Cluster, Deadline, Options, Output, Proxy, Server, Verdict, World, bytes,
    disk::{Cut, Disk, Journal},
    free_address, run, run_with,
};
use serde_json::Value;

const HTTP: [&str; 2] = ["--http", "127.0.0.1:0"];

fn topic(package: &[u8]) -> String {
    PackageId::Wheel(Digest::of(package)).topic()
}

fn list(channel: &str, sequence: u64, packages: &[Vec<u8>]) -> Vec<u8> {
    let entry = |(n, package): (usize, &Vec<u8>)| {
        let (digest, size) = (Digest::of(package), package.len());
        format!(r#",{{"type":"wheel","name":"p{n}","version":"1","pkg_sha256":"{digest}","size":{size}}}"#)
    };
    let entries: String = packages.iter().enumerate().map(entry).collect();
    format!(
        r#"[{{"type":"release","channel":"{channel}","sequence":{sequence},"version":"{sequence}"}}{entries}]"#
    )
    .into_bytes()
}

fn release(client: &mut Client, channel: &str, sequence: u64, packages: &[Vec<u8>]) {
    for package in packages {
        assert!(client.retain(&topic(package), package));
    }
    assert!(client.retain(&format!("mpypi/channels/{channel}"), &list(channel, sequence, packages)));
}

/// An edge of `upstream` on a free port, with its HTTP.
fn edge(world: &World, upstream: &str, more: &[&str]) -> Server {
    Server::start_with(world, &[&["--upstream", upstream], &HTTP[..], more].concat())
}

/// Waits until `topic` at `address` holds what `is` wants, and returns it.
#[track_caller]
fn until(address: SocketAddr, topic: &str, is: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let deadline = Deadline::new();
    let mut client = Client::connect(address, "until");
    // What is there, and what comes.
    client.subscribe(topic, 1);
    loop {
        deadline.check(&format!("`{topic}` does not come"));
        let message = client.message().expect("a broker that is there");
        if message.topic == topic && is(&message.payload) {
            return message.payload;
        }
    }
}

#[track_caller]
fn until_release(address: SocketAddr, channel: &str, sequence: u64) -> Vec<u8> {
    until(address, &format!("mpypi/channels/{channel}"), |payload| has(payload, sequence))
}

fn has(payload: &[u8], sequence: u64) -> bool {
    let list = UpdateList::parse(payload).ok();
    list.and_then(|list| Some(list.release()?.sequence == sequence)).unwrap_or_default()
}

fn upstream(edge: &Server) -> Value {
    let health: Value = serde_json::from_str(&edge.get("/healthz").1).unwrap();
    health["upstream"].clone()
}

/// Waits until what an edge says of its upstream is as `is` wants it.
#[track_caller]
fn until_upstream(edge: &Server, what: &str, is: impl Fn(&Value) -> bool) {
    let deadline = Deadline::new();
    while !is(&upstream(edge)) {
        deadline.check(&format!("{what}: {}", upstream(edge)));
        std::thread::yield_now();
    }
}

fn metric(server: &Server, name: &str) -> u64 {
    let (_, text) = server.get("/metrics");
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap()
}

/// A channel of files in the world's folder `dev`.
fn channel(world: &World, version: &str, size: usize) {
    world.write("dev/src/main.py", format!("print('{version}')\n"));
    world.write("dev/src/table.bin", bytes(version.len() as u64, size));
    world.write("dev/channel.toml", format!("version = \"{version}\"\n"));
}

fn publish(world: &World, url: &str) -> Output {
    run("mpypi", &["publish", &world.text("dev"), "--broker", url])
}

fn fleet(world: &World, url: &str, nodes: usize) -> Value {
    let (folder, nodes) = (world.text("devices"), nodes.to_string());
    let arguments = ["fleet", "--broker", url, "--channel", "dev", "--nodes", &nodes, "--dir", &folder];
    let bounds = ["--releases", "1", "--for", "60s", "--confirm-after", "50ms", "--json"];
    run("mpypi-agent", &[&arguments[..], &bounds].concat()).expect_code(0).json()
}

/// What is retained of all nodes.
fn nodes(address: SocketAddr) -> std::collections::BTreeMap<String, Vec<u8>> {
    let mut client = Client::connect(address, "nodes");
    client.subscribe("mpypi/nodes/#", 0);
    let mut found = std::collections::BTreeMap::new();
    // They come some at a time, until none does.
    loop {
        client.fence();
        if !client.waits() {
            return found;
        }
        while client.waits() {
            let message = client.message().unwrap();
            found.insert(message.topic, message.payload);
        }
    }
}

/// A line that can be cut and mended; cut, nothing gets through.
fn line(to: SocketAddr) -> (Proxy, Arc<AtomicBool>) {
    let cut = Arc::new(AtomicBool::new(false));
    let seen = cut.clone();
    let proxy = Proxy::start(to, move |_, _| match seen.load(Ordering::SeqCst) {
        true => Verdict::Cut,
        false => Verdict::Pass,
    });
    (proxy, cut)
}

#[test]
fn a_site_rolls_out_while_its_upstream_is_away_and_the_upstream_hears_of_it_later() {
    let (hub_world, world) = (World::new(), World::new());
    let address = free_address();
    let hub = Server::start_at(&hub_world, address, &[]);
    let edge = edge(&world, &hub.url(), &[]);
    channel(&world, "1.0", 50_000);
    publish(&world, &hub.url()).expect_code(0);
    until_release(edge.address, "dev", 1);
    hub.kill();

    // The whole rollout, and more: new devices install, states change, orders are given.
    let done = fleet(&world, &edge.url(), 10);
    assert_eq!(done["applied"], true, "{done}");
    channel(&world, "1.1", 50_000);
    publish(&world, &edge.url()).expect_code(1);
    let mut local = Client::connect(edge.address, "local");
    assert!(local.retain("mpypi/nodes/lamp/info", b"{\"name\":\"lamp\"}"));
    assert!(local.retain("mpypi/nodes/lamp/info", b"{\"name\":\"lamp 2\"}"));

    let hub = Server::start_at(&hub_world, address, &[]);
    until(hub.address, "mpypi/nodes/lamp/info", |payload| payload.ends_with(b"2\"}"));
    until_upstream(&edge, "all of it goes up", |seen| seen["waiting"] == 0 && seen["connected"] == true);
    assert_eq!(nodes(hub.address), nodes(edge.address));
    assert!(nodes(hub.address).len() > 20);
    // What the channel becomes there comes here.
    publish(&world, &hub.url()).expect_code(0);
    until_release(edge.address, "dev", 2);
}

#[test]
fn nobody_but_its_upstream_writes_a_mirrored_channel_and_others_are_the_sites_own() {
    let (hub_world, world) = (World::new(), World::new());
    let hub = Server::start(&hub_world);
    let edge = edge(&world, &hub.url(), &["--upstream-channel", "dev"]);
    channel(&world, "1.0", 100);
    publish(&world, &hub.url()).expect_code(0);
    let served = until_release(edge.address, "dev", 1);
    channel(&world, "1.1", 100);
    let refused = publish(&world, &edge.url()).expect_code(1);
    let reason = format!("channel `dev` comes from {}: publish there", hub.url());
    assert!(refused.stderr.contains(&reason), "{}", refused.stderr);
    // By MQTT 3.1.1 too, which has no word for it: the log has.
    let mut client = Client::connect(edge.address, "publisher");
    assert!(!client.retain("mpypi/channels/dev", &list("dev", 9, &[])));
    assert!(edge.log().contains(&reason));
    assert_eq!(until_release(edge.address, "dev", 1), served);
    // And a list of the site's own goes nowhere else.
    let mut client = Client::connect(edge.address, "publisher");
    release(&mut client, "local", 1, &[bytes(1, 100)]);
    let mut reader = Client::connect(hub.address, "reader");
    release(&mut reader, "other", 1, &[]);
    channel(&world, "1.2", 100);
    publish(&world, &hub.url()).expect_code(0);
    until_release(edge.address, "dev", 2);
    assert_eq!(reader.retained("mpypi/channels/local").unwrap().payload, b"[]");
    assert_eq!(client.retained("mpypi/channels/other").unwrap().payload, b"[]");
}

#[test]
fn an_edge_killed_at_any_step_of_a_mirror_serves_the_old_release_or_the_new_one() {
    let hub_world = World::new();
    let hub = Server::start(&hub_world);
    let mut publisher = Client::connect(hub.address, "publisher");
    let old: Vec<_> = (0..3).map(|n| bytes(n, 30_000)).collect();
    release(&mut publisher, "dev", 1, &old);
    let base = World::new();
    let first = edge(&base, &hub.url(), &[]);
    until_release(first.address, "dev", 1);
    assert_eq!(first.stop("-TERM"), Some(0));
    let new: Vec<_> = old[1..].iter().cloned().chain((10..14).map(|n| bytes(n, 30_000))).collect();
    release(&mut publisher, "dev", 2, &new);

    let (mut steps, mut fetched) = (0, Vec::new());
    loop {
        let world = World::new();
        copy(&base.path("data"), &world.path("data"));
        // Every message that comes is a step; the edge dies while it has this one in hand.
        let (reached, step) = mpsc::channel();
        let seen = AtomicUsize::new(0);
        let proxy = Proxy::start(hub.address, move |is_client, packet| {
            if !is_client && packet[0] >> 4 == 3 && seen.fetch_add(1, Ordering::SeqCst) == steps {
                reached.send(()).ok();
            }
            Verdict::Pass
        });
        let edge = Server::start_with(&world, &["--upstream", &proxy.url()]);
        let mut watch = Client::connect(edge.address, "watch");
        watch.subscribe("mpypi/channels/dev", 0);
        let is_over = loop {
            if step.try_recv().is_ok() {
                break false;
            }
            watch.ping();
            if watch.waits() && has(&watch.message().unwrap().payload, 2) {
                break true;
            }
        };
        edge.kill();
        // As it lies on disk: a list, and all that it names.
        run("mpypi-broker", &["check", "--deep", "--data", &world.text("data")]).expect_code(0);

        // What it had is not fetched again.
        let count = Arc::new(AtomicU64::new(0));
        let counted = count.clone();
        let proxy = Proxy::start(hub.address, move |is_client, packet| {
            if !is_client && packet[0] >> 4 == 3 && packet.len() > 30_000 {
                counted.fetch_add(1, Ordering::SeqCst);
            }
            Verdict::Pass
        });
        let edge = Server::start_with(&world, &["--upstream", &proxy.url()]);
        let found = until_release(edge.address, "dev", 2);
        assert_eq!(found, list("dev", 2, &new));
        let mut client = Client::connect(edge.address, "reader");
        for package in &new {
            assert_eq!(client.retained(&topic(package)).unwrap().payload, *package);
        }
        fetched.push(count.load(Ordering::SeqCst));
        if is_over {
            break;
        }
        steps += 1;
    }
    assert!(steps >= 5, "a list and four packages: {steps}");
    assert!(fetched.iter().all(|count| *count <= 4), "only what is new: {fetched:?}");
    assert_eq!(fetched.last(), Some(&0), "all of it was there: {fetched:?}");
}

/// The release that an edge serves, if it has one. Everything that it names has to be there.
fn whole_release(edge: &Server) -> Option<u64> {
    let mut reader = Client::connect(edge.address, "reader");
    let list = UpdateList::parse(&reader.retained("mpypi/channels/dev").unwrap().payload).unwrap();
    for (id, _) in list.packages() {
        let found = reader.retained(&id.topic()).map(|found| Digest::of(&found.payload));
        assert_eq!(found, Some(*id.digest()), "of {:?}", list.release());
    }
    list.release().map(|release| release.sequence)
}

#[test]
fn an_edge_whose_power_is_cut_at_any_sync_of_a_mirror_serves_a_whole_release_and_ends_with_the_newest() {
    let seed = env::var("MPYPI_SEED").map_or_else(|_| fastrand::u64(..1000), |seed| seed.parse().unwrap());
    println!("MPYPI_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let [hub_world, world] = [World::new(), World::new()];
    let hub = Server::start(&hub_world);
    let mut publisher = Client::connect(hub.address, "publisher");
    let packages: Vec<_> = (0..5).map(|n| bytes(n, 20_000)).collect();
    world.write("data/broker.toml", format!("[upstream]\nurl = \"{}\"\n", hub.url()));
    let data = world.path("data");
    let shim = world.path("journal.so");
    Journal::build_shim(&shim);
    let mut cuts = 0;
    // What of it the disk had when the power went; with the last of it, the edge goes on.
    let mut cut = |disk: &Disk, cut: Cut, before: u64, newest: u64| {
        let left = world.path("left");
        fs::create_dir(&left).unwrap();
        disk.write_after(cut, &mut random, &left);
        let edge = Server::start_on(&left, world.path("left.log"), &[]);
        let found = whole_release(&edge).unwrap_or_default();
        assert!((before..=newest).contains(&found), "{cut:?}: release {found}");
        until_release(edge.address, "dev", newest);
        assert_eq!(whole_release(&edge), Some(newest));
        edge.kill();
        fs::remove_dir_all(&left).unwrap();
        cuts += 1;
    };
    for (newest, packages) in [(1, &packages[..3]), (2, &packages[1..])] {
        release(&mut publisher, "dev", newest, packages);
        let journal = Journal::new(&shim, world.path(&format!("journal-{newest}")), &data);
        let mut disk = Disk::of(&data);
        let edge = Server::start_on(&data, world.path("broker.log"), &journal.environment());
        until_release(edge.address, "dev", newest);
        edge.kill();
        // Between two syncs nothing more can be lost than right before the second.
        for record in journal.records() {
            if record.is_sync() {
                cut(&disk, Cut::LosesSome, newest - 1, newest);
            }
            disk.apply(&record);
            if record.is_sync() {
                cut(&disk, Cut::LosesAll, newest - 1, newest);
            }
        }
    }
    println!("{cuts} power cuts");
    assert!(cuts > 20);
}

#[test]
fn another_list_under_the_same_number_is_refused_and_the_edge_says_so() {
    let [hub_world, world] = [World::new(), World::new()];
    let hub = Server::mosquitto(&hub_world);
    let mut publisher = Client::connect(hub.address, "publisher");
    let (first, second) = (bytes(1, 1000), bytes(2, 1000));
    release(&mut publisher, "dev", 7, std::slice::from_ref(&first));
    let edge = edge(&world, &hub.url(), &[]);
    until_release(edge.address, "dev", 7);
    release(&mut publisher, "dev", 7, std::slice::from_ref(&second));
    let is_said = |seen: &Value| {
        seen["channels"]["dev"]["held"].as_str().is_some_and(|why| {
            why.starts_with("the upstream has another list as release 7 of `dev` than it had")
        })
    };
    until_upstream(&edge, "health does not say so", is_said);
    assert_eq!(metric(&edge, "mpypi_upstream_held_lists"), 1);
    assert!(edge.log().contains("the upstream has another list as release 7"), "{}", edge.log());
    let mut reader = Client::connect(edge.address, "reader");
    let kept = list("dev", 7, std::slice::from_ref(&first));
    assert_eq!(reader.retained("mpypi/channels/dev").unwrap().payload, kept);
    // Also for one that was started anew and whose channel was cleared there meanwhile.
    assert_eq!(edge.stop("-TERM"), Some(0));
    let edge = Server::start_with(&world, &[&["--upstream", &hub.url()], &HTTP[..]].concat());
    until_upstream(&edge, "health does not say so after a restart", is_said);
    assert!(publisher.retain("mpypi/channels/dev", b""));
    until(edge.address, "mpypi/channels/dev", |payload| payload == b"[]" || payload.is_empty());
    release(&mut publisher, "dev", 7, std::slice::from_ref(&second));
    until_upstream(&edge, "health does not say so after a clear", is_said);
    // The very same is no other list, and what is higher is news.
    release(&mut publisher, "dev", 7, std::slice::from_ref(&first));
    assert_eq!(until_release(edge.address, "dev", 7), kept);
    until_upstream(&edge, "nothing is held back", |seen| seen["channels"]["dev"]["held"].is_null());
    release(&mut publisher, "dev", 8, std::slice::from_ref(&second));
    until_release(edge.address, "dev", 8);
}

#[test]
fn a_node_that_a_site_forgets_while_its_line_is_down_is_forgotten_upstream_although_the_edge_was_killed() {
    let [hub_world, world] = [World::new(), World::new()];
    let hub = Server::start(&hub_world);
    let (line, cut) = line(hub.address);
    let first = edge(&world, &line.url(), &[]);
    let mut local = Client::connect(first.address, "local");
    let topics = ["info", "state", "online"].map(|subject| format!("mpypi/nodes/lamp/{subject}"));
    for topic in topics.iter().map(String::as_str).chain(["mpypi/nodes/door/state"]) {
        assert!(local.retain(topic, b"{}"));
    }
    until(hub.address, "mpypi/nodes/door/state", |payload| payload == b"{}");
    until_upstream(&first, "all is up", |seen| seen["waiting"] == 0);
    cut.store(true, Ordering::SeqCst);
    for topic in &topics {
        assert!(local.retain(topic, b""));
    }
    first.kill();
    assert_eq!(nodes(hub.address).len(), 4);
    cut.store(false, Ordering::SeqCst);
    let edge = edge(&world, &line.url(), &[]);
    until_upstream(&edge, "it is connected", |seen| seen["connected"] == true);
    let deadline = Deadline::new();
    while nodes(hub.address) != nodes(edge.address) {
        deadline.check("the upstream still has what the site forgot");
    }
    assert_eq!(nodes(hub.address).keys().collect::<Vec<_>>(), ["mpypi/nodes/door/state"]);
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let kind = item.file_type().unwrap();
        if kind.is_dir() {
            copy(&item.path(), &to.join(item.file_name()));
        } else if kind.is_file() {
            fs::copy(item.path(), to.join(item.file_name())).unwrap();
        }
    }
}

#[test]
fn two_edges_in_a_chain_bring_releases_down_states_up_and_orders_to_who_was_away() {
    let [hub_world, middle_world, world] = [World::new(), World::new(), World::new()];
    let address = free_address();
    let hub = Server::start(&hub_world);
    let middle = Server::start_at(&middle_world, address, &["--upstream", &hub.url()]);
    let edge = edge(&world, &middle.url(), &[]);
    let mut publisher = Client::connect(hub.address, "publisher");
    let packages = [bytes(1, 100_000), bytes(2, 200)];
    release(&mut publisher, "dev", 1, &packages);
    assert_eq!(until_release(edge.address, "dev", 1), list("dev", 1, &packages));

    let mut lamp = Client::resume(edge.address, "lamp");
    lamp.subscribe("mpypi/nodes/lamp/cmd", 1);
    assert!(lamp.retain("mpypi/nodes/lamp/online", b"1"));
    assert!(lamp.retain("mpypi/nodes/lamp/state", b"{\"phase\":\"idle\"}"));
    until(hub.address, "mpypi/nodes/lamp/state", |payload| payload.starts_with(b"{\"phase\""));
    until_upstream(&edge, "the states are up", |seen| seen["waiting"] == 0);

    // Down it goes, twice; then the middle is away, then the device.
    let order = |client: &mut Client, text: &str| {
        client.post("mpypi/nodes/lamp/cmd", text.as_bytes(), 1, false).unwrap();
        client.acknowledged().unwrap();
    };
    order(&mut publisher, "[{\"type\":\"check\"}]");
    assert_eq!(lamp.message().unwrap().payload, b"[{\"type\":\"check\"}]");
    middle.kill();
    drop(lamp);
    order(&mut publisher, "[{\"type\":\"restart\"}]");
    let _middle = Server::start_at(&middle_world, address, &["--upstream", &hub.url()]);
    let mut lamp = Client::resume(edge.address, "lamp");
    assert!(lamp.session_present);
    // At least once: the first may come again, if its acknowledgement was lost with the middle.
    while lamp.message().unwrap().payload != b"[{\"type\":\"restart\"}]" {}
    // What a node forgets is forgotten everywhere.
    assert!(lamp.retain("mpypi/nodes/lamp/state", b""));
    let deadline = Deadline::new();
    while publisher.retained("mpypi/nodes/lamp/state").is_some() {
        deadline.check("the state stays at the hub");
    }
}

#[test]
fn edges_that_would_mirror_themselves_notice_it_and_stop() {
    let [one_world, other_world] = [World::new(), World::new()];
    let (first, second) = (free_address(), free_address());
    let one = Server::start_at(
        &one_world,
        first,
        &[&["--upstream", &format!("mqtt://{second}")], &HTTP[..]].concat(),
    );
    let other = Server::start_at(
        &other_world,
        second,
        &[&["--upstream", &format!("mqtt://{first}")], &HTTP[..]].concat(),
    );
    let deadline = Deadline::new();
    let is_loop = |server: &Server| upstream(server)["loop"] == true;
    while !is_loop(&one) && !is_loop(&other) {
        deadline.check("a loop of two");
    }
    let noticed = if is_loop(&one) { &one } else { &other };
    assert!(noticed.log().contains("this broker is its own upstream"), "{}", noticed.log());
    assert_eq!(metric(noticed, "mpypi_upstream_loop"), 1);
    drop((one, other));
    let alone = Server::start_at(
        &one_world,
        first,
        &[&["--upstream", &format!("mqtt://{first}")], &HTTP[..]].concat(),
    );
    until_upstream(&alone, "a loop of one", |seen| seen["loop"] == true);
    // It goes on to serve what it has.
    assert!(Client::connect(alone.address, "node").retain("home/light", b"on"));
}

#[test]
fn of_mosquitto_an_edge_takes_releases_and_clears_and_never_an_older_one() {
    let (hub_world, world) = (World::new(), World::new());
    let hub = Server::mosquitto(&hub_world);
    let mut publisher = Client::connect(hub.address, "publisher");
    let packages: Vec<_> = (0..20).map(|n| bytes(n, 20_000)).collect();
    release(&mut publisher, "dev", 5, &packages);
    release(&mut publisher, "old", 1, &packages[..1]);
    let edge = edge(&world, &hub.url(), &[]);
    assert_eq!(until_release(edge.address, "dev", 5), list("dev", 5, &packages));
    until_release(edge.address, "old", 1);

    // A list before its packages, as no publisher of ours does.
    let late = bytes(100, 5000);
    assert!(publisher.retain("mpypi/channels/dev", &list("dev", 6, std::slice::from_ref(&late))));
    until_upstream(&edge, "it waits", |seen| seen["channels"]["dev"]["missing"] == 1);
    let mut reader = Client::connect(edge.address, "reader");
    assert!(has(&reader.retained("mpypi/channels/dev").unwrap().payload, 5));
    assert!(publisher.retain(&topic(&late), &late));
    until_release(edge.address, "dev", 6);
    until_upstream(&edge, "it is taken", |seen| seen["channels"]["dev"]["sequence"] == 6);

    assert!(publisher.retain("mpypi/channels/dev", &list("dev", 4, &packages[..1])));
    assert!(publisher.retain("mpypi/channels/old", b""));
    let deadline = Deadline::new();
    while reader.retained("mpypi/channels/old").unwrap().payload != b"[]" {
        deadline.check("the clear is not carried");
    }
    assert!(has(&reader.retained("mpypi/channels/dev").unwrap().payload, 6));
    assert!(
        edge.log().contains("the upstream has release 4 of `dev`, which had release 6"),
        "{}",
        edge.log()
    );

    // States go up, and no channel ever does.
    assert!(reader.retain("mpypi/nodes/reader/state", b"{\"phase\":\"idle\"}"));
    until(hub.address, "mpypi/nodes/reader/state", |payload| !payload.is_empty());
    assert!(has(&publisher.retained("mpypi/channels/dev").unwrap().payload, 4));
}

#[test]
fn of_three_nats_nodes_an_edge_takes_releases_and_goes_on_when_one_is_killed() {
    let [hub_world, world] = [World::new(), World::new()];
    let mut hub = Cluster::start(&hub_world, 3);
    let urls: Vec<_> = (0..3).map(|node| hub.url(node)).collect();
    let edge = edge(&world, &urls[0], &["--upstream", &urls[1], "--upstream", &urls[2]]);
    let mut publisher = Client::connect(hub.address(1), "publisher");
    let packages: Vec<_> = (0..12).map(|n| bytes(n, 60_000)).collect();
    release(&mut publisher, "dev", 1, &packages[..8]);
    assert_eq!(until_release(edge.address, "dev", 1), list("dev", 1, &packages[..8]));
    let mut lamp = Client::connect(edge.address, "lamp");
    assert!(lamp.retain("mpypi/nodes/lamp/state", b"{\"phase\":\"idle\"}"));
    until(hub.address(1), "mpypi/nodes/lamp/state", |payload| !payload.is_empty());
    // The node that the edge is connected to.
    hub.kill(0);
    drop(publisher);
    // What a cluster acknowledges while a node dies may be lost: a publisher says it until it is there.
    let deadline = Deadline::new();
    let mut reader = Client::connect(edge.address, "reader");
    while !has(&reader.retained("mpypi/channels/dev").unwrap().payload, 2) {
        deadline.check("release 2 does not come");
        if let Some((mut publisher, 0)) = Client::try_connect(hub.address(1), &Options::id("publisher")) {
            let all = packages[4..].iter().all(|package| publisher.retain(&topic(package), package));
            let _ = all && publisher.retain("mpypi/channels/dev", &list("dev", 2, &packages[4..]));
        }
    }
    for package in &packages[4..] {
        assert_eq!(reader.retained(&topic(package)).unwrap().payload, *package);
    }
}

#[test]
fn a_package_lost_on_the_line_holds_its_list_back_until_it_comes() {
    let (hub_world, world) = (World::new(), World::new());
    let hub = Server::start(&hub_world);
    let mut publisher = Client::connect(hub.address, "publisher");
    let packages = [bytes(1, 40_000), bytes(2, 40_000)];
    release(&mut publisher, "dev", 1, &packages);
    // Garbled the first time, as by a bad disk of a cluster's node.
    let garbled = AtomicBool::new(false);
    let proxy = Proxy::start(hub.address, move |is_client, packet| {
        if !is_client && packet[0] >> 4 == 3 && packet.len() > 40_000 && !garbled.swap(true, Ordering::SeqCst)
        {
            let mut packet = packet.to_vec();
            *packet.last_mut().unwrap() ^= 1;
            return Verdict::Replace(packet);
        }
        Verdict::Pass
    });
    let edge = edge(&world, &proxy.url(), &[]);
    assert_eq!(until_release(edge.address, "dev", 1), list("dev", 1, &packages));
    assert!(edge.log().contains("was not kept"), "{}", edge.log());
}

#[test]
fn many_devices_on_an_edge_cost_its_upstream_one_download() {
    let count: usize = env::var("MPYPI_EDGE_NODES").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    let [hub_world, world] = [World::new(), World::new()];
    let hub = Server::start_with(&hub_world, &HTTP);
    channel(&world, "1.0", 200_000);
    publish(&world, &hub.url()).expect_code(0);
    let edge = edge(&world, &hub.url(), &[]);
    until_release(edge.address, "dev", 1);
    let (before, at_edge) = (metric(&hub, "mpypi_sent_bytes_total"), metric(&edge, "mpypi_sent_bytes_total"));
    let done = fleet(&world, &edge.url(), count);
    assert_eq!(done["applied"], true, "{done}");
    until_upstream(&edge, "the states are up", |seen| seen["waiting"] == 0);
    let after = metric(&hub, "mpypi_sent_bytes_total");
    let served = metric(&edge, "mpypi_sent_bytes_total") - at_edge;
    let package = 200_000;
    println!(
        "{count} devices took {served} bytes from their edge; the release cost the upstream {before} bytes, once, and \
         its rollout {} bytes of acknowledgements",
        after - before
    );
    assert!(served > count as u64 * package, "{served}");
    assert!((package..package + 20_000).contains(&before), "one download: {before}");
    // Of the rollout, the upstream sent acknowledgements of states: a few bytes for each.
    assert!(after - before < count as u64 * 500, "{} bytes", after - before);
    assert_eq!(nodes(hub.address).len(), 3 * count);
}

#[test]
fn an_edge_that_pins_a_root_takes_what_is_signed_and_nothing_else() {
    let [hub_world, world] = [World::new(), World::new()];
    let hub = Server::mosquitto(&hub_world);
    let keys = Keys::new(world.path("keys"), Some(world.write("passphrase", "correct horse")));
    for name in ["r1", "dev-2026"] {
        keys.make(&KeyId::new(name).unwrap(), Algorithm::Ed25519).unwrap();
    }
    let (folder, url) = (world.text("keys"), hub.url());
    let secret = [("MPYPI_KEY_PASSPHRASE", "correct horse"), ("MPYPI_KEYS", &folder)];
    for arguments in [
        &["root", "new", "--key", "r1", "--threshold", "1"][..],
        &["delegate", "dev", "--key", "dev-2026"],
        &["root", "sign"],
        &["root", "publish", "--broker", &url],
    ] {
        let all = [&["keys"][..], arguments].concat();
        let _ = run_with("mpypi", &all, &secret).expect_code(0);
    }
    let root = run_with("mpypi", &["keys", "export"], &secret).expect_code(0);
    let pin = world.write("root.json", root.stdout);
    let edge = edge(&world, &hub.url(), &["--upstream-pin", pin.to_str().unwrap()]);

    // Whoever can write to the hub can write this.
    let mut attacker = Client::connect(hub.address, "attacker");
    release(&mut attacker, "dev", 3, &[bytes(1, 1000)]);
    until_upstream(&edge, "it is held back", |seen| {
        seen["channels"]["dev"]["held"].as_str().is_some_and(|why| why.starts_with("unsigned"))
    });
    let mut reader = Client::connect(edge.address, "reader");
    assert_eq!(reader.retained("mpypi/channels/dev").unwrap().payload, b"[]");
    assert!(attacker.retain("mpypi/channels/dev", b""));
    channel(&world, "1.0", 100);
    world.write("dev/channel.toml", "key = \"dev-2026\"\n");
    let arguments = ["publish", &world.text("dev"), "--broker", &url, "--sequence", "4"];
    let _ = run_with("mpypi", &arguments, &secret).expect_code(0);
    until_release(edge.address, "dev", 4);
    assert!(reader.retained("mpypi/keys/root/1").is_some());
    run("mpypi", &["verify", "dev", "--broker", &edge.url()]).expect_code(0);
}

#[test]
fn a_hub_with_users_lets_an_edge_do_its_work_and_no_more() {
    let [hub_world, world] = [World::new(), World::new()];
    let token = |name: &str, role: &str| {
        let data = hub_world.text("data");
        let arguments = ["user", "add", name, "--role", role, "--token", "--data", &data];
        run("mpypi-broker", &arguments).expect_code(0).stdout.trim().to_owned()
    };
    let (site, ci) = (token("site-7", "edge"), token("ci", "publisher"));
    let hub = Server::start(&hub_world);
    let login = |user: &str, secret: &str| format!("mqtt://{user}:{secret}@{}", hub.address);
    let edge = edge(&world, &login("site-7", &site), &[]);
    channel(&world, "1.0", 100);
    publish(&world, &login("ci", &ci)).expect_code(0);
    until_release(edge.address, "dev", 1);
    let mut lamp = Client::connect(edge.address, "lamp");
    lamp.subscribe("mpypi/nodes/lamp/cmd", 1);
    assert!(lamp.retain("mpypi/nodes/lamp/state", b"{\"phase\":\"idle\"}"));
    until_upstream(&edge, "the state is up", |seen| seen["waiting"] == 0 && seen["nodes"] == 1);
    let options = |name: &str, secret: &str| Options {
        login: Some((name.to_owned(), secret.to_owned())),
        ..Options::id(&format!("{name}-test"))
    };
    let mut operator = Client::try_connect(hub.address, &options("ci", &ci)).unwrap().0;
    assert!(operator.retained("mpypi/nodes/lamp/state").is_some());
    operator.post("mpypi/nodes/lamp/cmd", b"[]", 1, false);
    assert_eq!(lamp.message().unwrap().payload, b"[]");
    // Whoever has the edge's password writes no channel.
    let mut thief = Client::try_connect(hub.address, &options("site-7", &site)).unwrap().0;
    assert!(!thief.retain("mpypi/channels/dev", &list("dev", 9, &[])));
}

#[test]
fn an_upstream_that_is_not_there_or_not_named_is_said_clearly() {
    let world = World::new();
    let edge = edge(&world, "mqtt://127.0.0.1:1", &[]);
    until_upstream(&edge, "it says so", |seen| seen["connected"] == false && seen["problem"].is_string());
    assert_eq!(edge.get("/healthz").0, 200, "the site is served all the same");
    assert_eq!(metric(&edge, "mpypi_upstream_connected"), 0);
    assert_eq!(edge.stop("-TERM"), Some(0));

    for (settings, expected) in [
        ("[upstream]\nchannels = [\"dev\"]\n", "it is not said where the upstream is"),
        ("[upstream]\nurl = \"mqtt://hub\"\nchannels = []\n", "no channel of the upstream is chosen"),
        ("[upstream]\nurl = \"hub\"\n", "does not start with `mqtt://`"),
        ("[upstream]\nurl = \"mqtts://hub\"\nca = \"nowhere.pem\"\n", "nowhere.pem"),
        ("[upstream]\nurl = \"mqtt://hub\"\npin = \"broker.toml\"\n", "is no root to pin"),
        ("[upstream]\nurl = \"mqtt://hub\"\nwindow = \"always\"\n", "a window is two times of day"),
    ] {
        world.write("data/broker.toml", settings);
        let checked = run("mpypi-broker", &["check", "--data", &world.text("data")]).expect_code(1);
        assert!(checked.stdout.contains(expected), "{settings}: {}", checked.stdout);
    }
    world.write(
        "data/broker.toml",
        "[upstream]\nurl = [\"mqtt://a\", \"mqtt://b\"]\nwindow = \"22:00-04:00\"\n",
    );
    let checked = run("mpypi-broker", &["check", "--data", &world.text("data")]).expect_code(0);
    assert!(checked.stdout.contains("upstream mqtt://a:1883, mqtt://b:1883"), "{}", checked.stdout);
}

#[test]
fn an_edge_moves_to_another_address_of_its_upstream_when_one_is_gone() {
    let [hub_world, world] = [World::new(), World::new()];
    let hub = Server::mosquitto(&hub_world);
    let (line, cut) = line(hub.address);
    let edge = edge(&world, &line.url(), &["--upstream", &hub.url()]);
    let mut publisher = Client::connect(hub.address, "publisher");
    release(&mut publisher, "dev", 1, &[bytes(1, 1000)]);
    until_release(edge.address, "dev", 1);
    cut.store(true, Ordering::SeqCst);
    release(&mut publisher, "dev", 2, &[bytes(2, 1000)]);
    until_release(edge.address, "dev", 2);
}
