//! What ships in `deploy`, `contrib` and beside them: read by the programs that it is for, or by their schemas, and used as it is
//! by devices, a publisher and an edge. Places and ports are others; what is not replaced here is what users get.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use mpypi_protocol::{
    Digest, UpdateList,
    node::{Phase, State},
};
use mpypi_tests::{
    Authority, Client, Cluster, Deadline, Options, Running, Server, Validity, World, program, run, run_with,
};

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Who reads a file.
#[derive(Debug, Clone, Copy)]
enum Reader {
    /// Kubernetes.
    Kubernetes,
    /// Whoever has this schema.
    Schema(&'static str),
    /// systemd.
    Unit,
    /// A test of its own, which runs it.
    Used,
}

/// A file, who reads it, and what would break it: a text, and what stands there then.
type Shipped = (&'static str, Reader, &'static [(&'static str, &'static str)]);

/// All files of settings that ship.
const SHIPPED: &[Shipped] = &[
    (
        ".github/workflows/ci.yml",
        Reader::Schema("vendor.github-workflows"),
        &[
            ("runs-on: ubuntu-24.04", "run-on: ubuntu-24.04"),
            ("timeout-minutes: 60", "timeout-minutes: soon"),
        ],
    ),
    (
        "action.yml",
        Reader::Schema("vendor.github-actions"),
        &[("using: composite", "using: composit"), ("description:", "describes:")],
    ),
    (
        "contrib/ci/gitlab.yml",
        Reader::Schema("vendor.gitlab-ci"),
        &[("when: always", "when: sometimes"), ("script:", "scripts:")],
    ),
    ("contrib/mpypi-broker.service", Reader::Unit, UNIT),
    (
        "deploy/compose.yaml",
        Reader::Schema("vendor.compose-spec"),
        &[("tmpfs: [", "tmpsf: ["), ("restart: unless-stopped", "restart: [3]")],
    ),
    (
        "deploy/kubernetes/nats.yaml",
        Reader::Kubernetes,
        &[("replicas: 3", "replicas: three"), ("podManagementPolicy:", "podManagmentPolicy:")],
    ),
    ("deploy/mosquitto/edge.conf", Reader::Used, &[]),
    ("deploy/mosquitto/hub.conf", Reader::Used, &[]),
    ("deploy/nats/node.conf", Reader::Used, &[]),
    ("deploy/nats/users.conf", Reader::Used, &[]),
    ("deploy/systemd/nats-mpypi.service", Reader::Unit, UNIT),
];

const UNIT: &[(&str, &str)] = &[
    ("ExecStart=", "ExecStrat="),
    ("Restart=on-failure", "Restart=sometimes"),
    ("[Install]", "[Instal]"),
    ("RestartSec=2", "RestartSec=a while"),
];

fn shipped(path: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(path)).unwrap()
}

/// Why a reader does not take a file with this text.
fn complaint(world: &World, path: &str, reader: Reader, text: &str) -> Option<String> {
    let file = world.write(path, text);
    let file = file.to_str().unwrap();
    let output = match reader {
        Reader::Kubernetes => run("kubernetes-validate", &["--strict", file]),
        Reader::Schema(schema) => run("check-jsonschema", &["--builtin-schema", schema, file]),
        Reader::Unit => return unit(world, path, text),
        Reader::Used => return None,
    };
    (output.code != Some(0)).then(|| format!("{path}: {}{}", output.stdout, output.stderr))
}

/// What systemd says of a unit; where there is none, what can be seen without it.
fn unit(world: &World, path: &str, text: &str) -> Option<String> {
    if let Some(odd) = text.lines().find(|line| !is_unit_line(line)) {
        return Some(format!("{path}: {odd}"));
    }
    // It looks for the program, too.
    let text = text.lines().map(|line| match line.strip_prefix("ExecStart=") {
        Some(command) => {
            let arguments = command.split_once(' ').map_or("", |(_, arguments)| arguments);
            format!("ExecStart={} {arguments}\n", program("mpypi-broker").display())
        }
        None => format!("{line}\n"),
    });
    let file = world.write(path, text.collect::<String>());
    let verify = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output().ok()?;
    let said = String::from_utf8_lossy(&verify.stderr).into_owned();
    let name = file.file_name().unwrap().to_str().unwrap();
    // Units of this machine may be odd for reasons of their own.
    said.lines().any(|line| line.contains(name)).then_some(said)
}

/// Whether a line may stand in a unit of ours: what is misspelled is passed over by systemd, with a word in its log.
fn is_unit_line(line: &str) -> bool {
    const SECTIONS: [&str; 3] = ["[Unit]", "[Service]", "[Install]"];
    const KEYS: &str = "After Description Wants WantedBy \
        Environment EnvironmentFile ExecReload ExecStart KillSignal LimitNOFILE Restart RestartSec TimeoutStartSec TimeoutStopSec Type \
        User WatchdogSec \
        CapabilityBoundingSet DynamicUser LockPersonality MemoryDenyWriteExecute NoNewPrivileges PrivateDevices PrivateTmp \
        ProtectClock ProtectControlGroups ProtectHome ProtectHostname ProtectKernelLogs ProtectKernelModules \
        ProtectKernelTunables ProtectProc ProtectSystem RemoveIPC RestrictAddressFamilies RestrictNamespaces RestrictRealtime \
        RestrictSUIDSGID StateDirectory StateDirectoryMode SystemCallArchitectures SystemCallErrorNumber SystemCallFilter UMask";
    if line.is_empty() || line.starts_with('#') {
        return true;
    }
    match line.split_once('=') {
        None => SECTIONS.contains(&line),
        Some((key, value)) => {
            let is_number = |name: &str| key != name || value.parse::<u32>().is_ok();
            KEYS.split_whitespace().any(|known| known == key)
                && is_number("RestartSec")
                && (key != "Restart" || ["always", "no", "on-abnormal", "on-failure"].contains(&value))
        }
    }
}

#[test]
fn each_file_that_ships_is_taken_by_its_reader_and_not_if_it_were_broken() {
    let world = World::new();
    let check = |(path, reader, breakages): &Shipped| {
        let text = shipped(path);
        assert_eq!(complaint(&world, path, *reader, &text), None);
        for (from, to) in *breakages {
            assert!(text.contains(from), "{path} says nothing of `{from}`");
            let broken = text.replace(from, to);
            assert!(complaint(&world, path, *reader, &broken).is_some(), "{path} with `{to}`");
        }
    };
    // Most of it is Pythons that start.
    thread::scope(|scope| {
        for file in SHIPPED {
            scope.spawn(|| check(file));
        }
    });
}

#[test]
fn no_file_of_settings_ships_that_nobody_reads_here() {
    let known: BTreeSet<PathBuf> = SHIPPED.iter().map(|(path, ..)| Path::new(ROOT).join(path)).collect();
    let mut folders: Vec<_> = ["deploy", "contrib", ".github"].map(|name| Path::new(ROOT).join(name)).into();
    let mut snippets = 0;
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            match path.extension().and_then(|extension| extension.to_str()) {
                _ if path.is_dir() => folders.push(path),
                Some("yaml" | "yml" | "service" | "conf") => {
                    assert!(known.contains(&path), "{} is in no table of this test", path.display());
                }
                Some("md") => snippets += check_snippets(&path),
                _ => {}
            }
        }
    }
    snippets += check_snippets(&Path::new(ROOT).join("README.md"));
    for item in fs::read_dir(Path::new(ROOT).join("docs")).unwrap() {
        let path = item.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "md") {
            snippets += check_snippets(&path);
        }
    }
    assert!(snippets > 0);
}

/// Holds what a page shows in YAML against the schema of whom its first line names, and counts it.
fn check_snippets(page: &Path) -> usize {
    let world = World::new();
    let text = fs::read_to_string(page).unwrap();
    let mut count = 0;
    for block in text.split("\n```yaml\n").skip(1) {
        let block = block.split("\n```").next().unwrap();
        let schema = match block.lines().next().unwrap_or_default() {
            first if first.starts_with("# .github/workflows/") => "vendor.github-workflows",
            first if first.starts_with("# .gitlab-ci.yml") => "vendor.gitlab-ci",
            first => panic!("{}: a first line that says which file it is, not `{first}`", page.display()),
        };
        assert_eq!(
            complaint(&world, "snippet.yml", Reader::Schema(schema), block),
            None,
            "{}",
            page.display()
        );
        count += 1;
    }
    count
}

#[test]
fn the_brokers_unit_starts_a_broker_that_serves() {
    let world = World::new();
    let unit = shipped("contrib/mpypi-broker.service");
    let line =
        unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/mpypi-broker ")).unwrap();
    let data = world.text("data");
    let line = line.replace("/var/lib/mpypi", &data).replace("127.0.0.1:8080", "127.0.0.1:0");
    let arguments: Vec<&str> = line.split(' ').chain(["--listen", "127.0.0.1:0"]).collect();
    let broker = Server::launch(&world, &arguments, 2);
    assert_eq!(broker.get("/healthz").0, 200);
    assert_eq!(broker.stop("-TERM"), Some(0));
}

/// What ships in `deploy`, with other places, as the file `to`.
fn deployed(world: &World, name: &str, to: &str, places: &[(&str, &str)]) -> PathBuf {
    let mut text = shipped(&format!("deploy/{name}"));
    for (usual, here) in places {
        assert!(text.contains(usual), "{name} says nothing of {usual}");
        text = text.replace(usual, here);
    }
    world.write(&format!("deploy/{to}"), text)
}

/// Devices of the tests: the first is the one that the files name.
const DEVICES: [&str; 3] = ["kitchen", "hall", "cellar"];

/// The passwords are those that ship, which users are told to change.
fn password(user: &str) -> String {
    format!("change-me-{user}")
}

/// A client of a user, under a name of its own: NATS keeps one waiting that comes again and again under the same.
fn enter(address: SocketAddr, user: &str) -> Client {
    let options = Options {
        login: Some((user.to_owned(), password(user))),
        ..Options::id(&format!("{user}-{:08x}", fastrand::u32(..)))
    };
    let (client, code) = Client::try_connect(address, &options).expect("a CONNACK");
    assert_eq!(code, 0, "{user}");
    client
}

/// The addresses of a broker, for a user.
fn urls(addresses: &[SocketAddr], user: &str) -> String {
    let url = |address: &SocketAddr| format!("mqtt://{user}:{}@{address}", password(user));
    addresses.iter().map(url).collect::<Vec<_>>().join(",")
}

fn write_channel(world: &World, version: u32) {
    for number in 0..3 {
        world.write(&format!("dev/src/part{number}.py"), format!("# {version}\n").repeat(100 * number + 1));
    }
}

fn publish(world: &World, brokers: &str) {
    run("mpypi", &["publish", &world.text("dev"), "--broker", brokers]).expect_code(0);
}

/// Waits until `topic` retains what `is` wants; brokers of several nodes take a moment.
#[track_caller]
fn until(client: &mut Client, topic: &str, is: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let deadline = Deadline::new();
    loop {
        if let Some(found) = client.retained_at(topic, 0).filter(|found| is(&found.payload)) {
            return found.payload;
        }
        deadline.check(&format!("`{topic}` is not what it should be"));
    }
}

fn is_at(payload: &[u8], sequence: u64) -> bool {
    State::parse(payload).is_ok_and(|state| state.phase == Phase::Idle && state.sequence == Some(sequence))
}

/// What each may do at a broker with users, and what not, whatever it acknowledges.
fn check_rights(world: &World, addresses: &[SocketAddr]) {
    let address = addresses[0];
    write_channel(world, 1);
    publish(world, &urls(addresses, "publisher"));
    let [mut kitchen, mut hall, mut publisher] =
        ["kitchen", "hall", "publisher"].map(|user| enter(address, user));
    let (root, chunk) = ("mpypi/keys/root/1", format!("mpypi/chunks/{}/0", Digest::of(b"a large package")));
    assert!(publisher.retain(root, b"a root"));
    assert!(publisher.retain(&chunk, b"a chunk"));

    // A device reads channels, packages, chunks of them and roots.
    let list = until(&mut kitchen, "mpypi/channels/dev", |list| UpdateList::parse(list).is_ok());
    let packages: Vec<_> = UpdateList::parse(&list).unwrap().packages().map(|(id, _)| id).collect();
    for id in &packages {
        until(&mut kitchen, &id.topic(), |package| Digest::of(package) == *id.digest());
    }
    until(&mut kitchen, root, |root| root == b"a root");
    until(&mut kitchen, &chunk, |chunk| chunk == b"a chunk");
    // It says what is its own.
    for client in [(&mut kitchen, "kitchen"), (&mut hall, "hall")] {
        for subject in ["info", "state", "online"] {
            let topic = format!("mpypi/nodes/{}/{subject}", client.1);
            assert!(client.0.retain(&topic, b"{}"));
            until(&mut publisher, &topic, |payload| payload == b"{}");
        }
    }

    // It hears its own orders, and nothing that another is told or says.
    assert_eq!(kitchen.subscribe("mpypi/nodes/kitchen/cmd", 1), 1);
    for filter in ["mpypi/nodes/hall/cmd", "mpypi/nodes/hall/#", "mpypi/nodes/+/cmd", "mpypi/nodes/#", "#"] {
        kitchen.subscribe(filter, 0);
    }
    assert_eq!(hall.subscribe("mpypi/nodes/hall/cmd", 1), 1);
    let order = |publisher: &mut Client, node: &str, text: &[u8]| {
        publisher.post(&format!("mpypi/nodes/{node}/cmd"), text, 1, false).unwrap();
        publisher.acknowledged().unwrap();
    };
    order(&mut publisher, "hall", b"for the hall");
    assert_eq!(hall.message().unwrap().payload, b"for the hall");
    order(&mut publisher, "kitchen", b"for the kitchen");
    loop {
        let heard = kitchen.message().unwrap();
        assert!(!heard.topic.starts_with("mpypi/nodes/hall"), "{heard:?}");
        if heard.payload == b"for the kitchen" {
            break;
        }
    }
    drop(kitchen);

    // It writes nothing else: whatever it is answered, nothing changes.
    let package = packages[0].topic();
    let history = "mpypi/channels/dev/history/1";
    let others =
        ["mpypi/nodes/hall/state", "mpypi/nodes/hall/online", "mpypi/channels/dev", "mpypi/channels/mine"];
    let topics: Vec<&str> =
        others.into_iter().chain([history, &package, &chunk, root, "mpypi/elsewhere"]).collect();
    let read = |publisher: &mut Client| -> Vec<Option<Vec<u8>>> {
        topics.iter().map(|topic| publisher.retained_at(topic, 0).map(|found| found.payload)).collect()
    };
    let before = read(&mut publisher);
    assert!(before[..3].iter().all(Option::is_some), "{before:?}");
    let mut acknowledged = 0;
    for payload in [&b"[]"[..], b""] {
        for topic in topics.iter().copied().chain(["mpypi/nodes/hall/cmd"]) {
            // One that is thrown out comes again.
            let mut kitchen = enter(address, "kitchen");
            acknowledged += usize::from(kitchen.retain(topic, payload));
        }
    }
    println!("{acknowledged} of {} denied publishes were acknowledged", 2 * (topics.len() + 1));
    // What it may do after that is done after that.
    let mut kitchen = enter(address, "kitchen");
    assert!(kitchen.retain("mpypi/nodes/kitchen/state", b"{\"last\":1}"));
    until(&mut publisher, "mpypi/nodes/kitchen/state", |payload| payload == b"{\"last\":1}");
    assert_eq!(read(&mut publisher), before);
    order(&mut publisher, "hall", b"the last");
    assert_eq!(hall.message().unwrap().payload, b"the last", "nobody else gives orders");
    let (folder, brokers) = (world.text("dev"), urls(addresses, "kitchen"));
    let arguments = ["publish", &folder, "--broker", &brokers, "--sequence", "9", "--agree-within", "2s"];
    let denied = run("mpypi", &arguments);
    assert_ne!(denied.code, Some(0), "{denied:?}");
    assert!(denied.stderr.contains("may publish"), "{}", denied.stderr);
    assert_eq!(read(&mut publisher), before);
    // Nobody comes in without a password, or with another's.
    for login in [None, Some(("kitchen".to_owned(), password("hall")))] {
        let options = Options { login, ..Options::id("stranger") };
        assert!(Client::try_connect(address, &options).is_none_or(|(_, code)| code != 0));
    }
    assert!(publisher.retain(root, b""));
    drop((kitchen, hall));
    check_fleet(world, addresses, &mut publisher);
}

/// Devices, each with its user, follow a channel; an edge with its own brings it to its site, and up what that says.
fn check_fleet(world: &World, addresses: &[SocketAddr], publisher: &mut Client) {
    let site = World::new();
    let upstream = urls(addresses, "edge-1");
    let upstream: Vec<&str> = upstream.split(',').flat_map(|url| ["--upstream", url]).collect();
    let edge = Server::start_with(&site, &upstream);
    let agents = DEVICES.map(|device| {
        let root = world.text(&format!("devices/{device}"));
        let brokers = urls(addresses, device);
        let usual =
            ["run", "--broker", &brokers, "--node", device, "--root", &root, "--confirm-after", "50ms"];
        Running::start("mpypi-agent", &[&usual[..], &["--check", "5s"]].concat())
    });
    for sequence in [1, 2] {
        if sequence == 2 {
            write_channel(world, 2);
            publish(world, &urls(addresses, "publisher"));
        }
        for device in DEVICES {
            until(publisher, &format!("mpypi/nodes/{device}/state"), |state| is_at(state, sequence));
        }
    }
    for (agent, device) in agents.into_iter().zip(DEVICES) {
        agent.signal("-TERM");
        agent.wait().expect_code(0);
        assert_eq!(world.files(&format!("devices/{device}")), world.files("dev/src"));
    }
    let list = publisher.retained_at("mpypi/channels/dev", 0).unwrap().payload;
    let mut local = Client::connect(edge.address, "lamp");
    until(&mut local, "mpypi/channels/dev", |found| found == list);
    for (id, _) in UpdateList::parse(&list).unwrap().packages() {
        assert!(local.retained(&id.topic()).is_some());
    }
    local.subscribe("mpypi/nodes/lamp/cmd", 1);
    assert!(local.retain("mpypi/nodes/lamp/state", b"{\"phase\":\"idle\"}"));
    until(publisher, "mpypi/nodes/lamp/state", |state| state == b"{\"phase\":\"idle\"}");
    let deadline = Deadline::new();
    // The edge asks for the orders of a node when it hears of it.
    while !local.waits() {
        publisher.post("mpypi/nodes/lamp/cmd", b"[{\"type\":\"check\"}]", 1, false).unwrap();
        publisher.acknowledged().unwrap();
        local.fence();
        deadline.check("orders do not come down");
    }
    // An edge's password writes no channel, and gives no orders.
    let mut thief = enter(addresses[0], "edge-1");
    thief.retain("mpypi/channels/dev", b"[]");
    drop(thief);
    let mut thief = enter(addresses[0], "edge-1");
    thief.retain("mpypi/nodes/lamp/cmd", b"[]");
    drop(thief);
    let mut thief = enter(addresses[0], "edge-1");
    assert!(thief.retain("mpypi/nodes/lamp/online", b"2"));
    until(publisher, "mpypi/nodes/lamp/online", |payload| payload == b"2");
    assert_eq!(publisher.retained_at("mpypi/channels/dev", 0).unwrap().payload, list);
    assert_eq!(publisher.retained_at("mpypi/nodes/lamp/cmd", 0), None);
}

/// The users of NATS that ship, and more devices like the one among them.
fn nats_users(world: &World) {
    let text = shipped("deploy/nats/users.conf");
    let (head, rest) = text.split_once("    { user: \"kitchen\"").unwrap();
    let (kitchen, tail) = rest.split_once("] } }\n").unwrap();
    let block =
        |device: &str| format!("    {{ user: \"kitchen\"{kitchen}] }} }}\n").replace("kitchen", device);
    let blocks: String = DEVICES.iter().map(|device| block(device)).collect();
    world.write("deploy/nats/users.conf", format!("{head}{blocks}{tail}"));
}

#[test]
fn three_nodes_of_nats_with_the_settings_that_ship_let_each_do_what_is_its_own() {
    let world = World::new();
    // As they are, first.
    deployed(&world, "nats/users.conf", "nats/users.conf", &[]);
    let node = deployed(&world, "nats/node.conf", "nats/node.conf", &[]);
    let variables = [("NATS_NAME", "nats-0"), ("NATS_STORE", &*world.text("store"))];
    run_with("nats-server", &["-t", "-c", node.to_str().unwrap()], &variables).expect_code(0);
    for (from, to) in
        [("max_payload:", "max_paiload:"), ("write_deadline: \"5m\"", "write_deadline: \"soon\"")]
    {
        let broken = deployed(&world, "nats/node.conf", "nats/broken.conf", &[(from, to)]);
        let tried = run_with("nats-server", &["-t", "-c", broken.to_str().unwrap()], &variables);
        assert_ne!(tried.code, Some(0), "{to}");
    }
    // The line for TLS: the second key is not that of the certificate.
    let ca = Authority::new(&world, "ca");
    for (number, name) in ["nats", "other"].into_iter().enumerate() {
        ca.server(&world, name, &["nats-0"], Validity::Now);
        let (certificate, key) = (world.text("nats.pem"), world.text(&format!("{name}.key")));
        let places =
            [("# tls {", "tls {"), ("/etc/nats/tls.crt", &*certificate), ("/etc/nats/tls.key", &*key)];
        let secure = deployed(&world, "nats/node.conf", "nats/tls.conf", &places);
        let tried = run_with("nats-server", &["-t", "-c", secure.to_str().unwrap()], &variables);
        assert_eq!(tried.code == Some(0), number == 0, "{name}: {}", tried.stderr);
    }

    nats_users(&world);
    let secret = password("publisher");
    let cluster = Cluster::start_by(&world, 3, Some(("publisher", &secret)), |place| {
        let at = |address: SocketAddr| format!("listen: \"{address}\"");
        let (clients, route, mqtt) = (at(place.clients), at(place.route), at(place.mqtt));
        let usual: Vec<_> = (0..3).map(|node| format!("nats://nats-{node}:6222")).collect();
        let mut places = vec![
            ("listen: \"0.0.0.0:4222\"", clients.as_str()),
            ("listen: \"0.0.0.0:6222\"", &route),
            ("listen: \"0.0.0.0:1883\"", &mqtt),
        ];
        places.extend(usual.iter().map(String::as_str).zip(place.routes.iter().map(String::as_str)));
        deployed(&world, "nats/node.conf", &format!("nats/{}.conf", place.name), &places)
    });
    check_rights(&world, &[0, 1, 2].map(|node| cluster.address(node)));
}

/// mosquitto with the hub's settings that ship, and a password for everybody.
fn mosquitto_hub(world: &World) -> Server {
    let passwords = world.text("passwords");
    for (number, user) in DEVICES.iter().chain(&["publisher", "edge-1"]).enumerate() {
        let create: &[&str] = if number == 0 { &["-c"] } else { &[] };
        let secret = password(user);
        run("mosquitto_passwd", &[create, &["-b", &passwords, user, &secret]].concat()).expect_code(0);
    }
    let acl = deployed(world, "mosquitto/acl", "mosquitto/acl", &[]);
    Server::mosquitto_by(world, |port| {
        let listener = format!("listener {port} 127.0.0.1\nuser root");
        let folder = format!("{}/", world.text("hub"));
        fs::create_dir_all(&folder).unwrap();
        let places = [
            ("/var/lib/mosquitto/", &*folder),
            ("/etc/mosquitto/passwords", &passwords),
            ("/etc/mosquitto/acl", acl.to_str().unwrap()),
            ("listener 1883", &listener),
        ];
        deployed(world, "mosquitto/hub.conf", "mosquitto/hub.conf", &places).to_str().unwrap().to_owned()
    })
}

#[test]
fn mosquitto_with_the_settings_that_ship_lets_each_do_what_is_its_own() {
    let world = World::new();
    let hub = mosquitto_hub(&world);
    check_rights(&world, &[hub.address]);
}

#[test]
fn mosquitto_at_a_site_with_the_settings_that_ship_mirrors_its_hub_and_carries_what_devices_say() {
    let [world, site] = [World::new(), World::new()];
    let hub = mosquitto_hub(&world);
    write_channel(&world, 1);
    publish(&world, &urls(&[hub.address], "publisher"));
    let edge = Server::mosquitto_by(&site, |port| {
        let folder = format!("{}/", site.text("edge"));
        fs::create_dir_all(&folder).unwrap();
        let (listener, up) =
            (format!("listener {port} 127.0.0.1\nuser root"), format!("address {}", hub.address));
        let secret = format!("remote_password {}", password("edge-1"));
        let places = [
            ("/var/lib/mosquitto/", &*folder),
            ("listener 1883 127.0.0.1", &listener),
            ("address hub.local:1883", &*up),
            ("remote_password change-me", &*secret),
        ];
        deployed(&site, "mosquitto/edge.conf", "mosquitto/edge.conf", &places).to_str().unwrap().to_owned()
    });
    let mut local = Client::connect(edge.address, "local");
    let list = until(&mut local, "mpypi/channels/dev", |list| UpdateList::parse(list).is_ok());
    for (id, _) in UpdateList::parse(&list).unwrap().packages() {
        until(&mut local, &id.topic(), |package| Digest::of(package) == *id.digest());
    }
    let root = world.text("node");
    run("mpypi-agent", &["run", "--once", "--root", &root, "--node", "lamp", "--broker", &edge.url()])
        .expect_code(0);
    assert_eq!(world.files("node"), world.files("dev/src"));
    let mut publisher = enter(hub.address, "publisher");
    until(&mut publisher, "mpypi/nodes/lamp/state", |state| is_at(state, 1));
    let mut lamp = Client::connect(edge.address, "lamp");
    lamp.subscribe("mpypi/nodes/lamp/cmd", 1);
    publisher.post("mpypi/nodes/lamp/cmd", b"[]", 1, false).unwrap();
    publisher.acknowledged().unwrap();
    assert_eq!(lamp.message().unwrap().payload, b"[]");
}
