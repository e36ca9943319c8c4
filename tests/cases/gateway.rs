//! Gateways: HTTP to a cluster, mosquitto or three nodes of NATS, by programs that are no brokers and know nothing of each other.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use mpypi_protocol::{Digest, UpdateList};
use mpypi_tests::{Client, Cluster, Deadline, Server, World, clock, face::until, http::Web, run};
use serde_json::Value;

/// A channel's folder with one project.
fn project(world: &World, version: &str) {
    let text = format!("[project]\nname = \"blink\"\nversion = \"{version}\"\n");
    world.write("dev/wheels/blink/pyproject.toml", text);
    world.write("dev/wheels/blink/blink/__init__.py", format!("VERSION = \"{version}\"\n"));
    world.write("dev/src/main.py", "import blink\n");
}

fn publish(world: &World, url: &str) {
    let _ = run("mpypi", &["publish", &world.text("dev"), "--broker", url]).expect_code(0);
}

fn health(gateway: &Server) -> (u16, Value) {
    let (code, text) = gateway.get("/healthz");
    (code, serde_json::from_str(&text).unwrap())
}

fn list(client: &mut Client) -> UpdateList {
    UpdateList::parse(&client.retained("mpypi/channels/dev").unwrap().payload).unwrap()
}

/// Puts a wheel where `twine` would, and returns the answer's status and text.
fn upload(gateway: &Server, name: &str, version: &str) -> (u16, String) {
    let (file, wheel) = wheel(name, version);
    let digest = Digest::of(&wheel);
    let mut body = Vec::new();
    for (field, value) in [(":action", "file_upload"), ("sha256_digest", &digest.to_string())] {
        body.extend(
            format!("--x\r\nContent-Disposition: form-data; name=\"{field}\"\r\n\r\n{value}\r\n").bytes(),
        );
    }
    body.extend(
        format!(
            "--x\r\nContent-Disposition: form-data; name=\"content\"; filename=\"{file}\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        )
        .bytes(),
    );
    body.extend(wheel);
    body.extend(b"\r\n--x--\r\n");
    let kind = [("Content-Type", "multipart/form-data; boundary=x")];
    let answer = Web::open(gateway.http.unwrap()).ask("POST", "/upload/dev", &kind, &body);
    (answer.code, String::from_utf8_lossy(&answer.body).into_owned())
}

/// A wheel of one module.
fn wheel(name: &str, version: &str) -> (String, Vec<u8>) {
    let world = World::new();
    world.write("x/pyproject.toml", format!("[project]\nname = \"{name}\"\nversion = \"{version}\"\n"));
    world.write(&format!("x/{name}/__init__.py"), format!("VERSION = '{version}'\n"));
    let server = Server::start(&world);
    world.write("c/channel.toml", "name = \"dev\"\n");
    std::fs::create_dir_all(world.path("c/wheels")).unwrap();
    std::fs::rename(world.path("x"), world.path("c/wheels/x")).unwrap();
    let _ = run("mpypi", &["publish", &world.text("c"), "--broker", &server.url()]).expect_code(0);
    let mut client = Client::connect(server.address, "reader");
    let (id, _) = list(&mut client).packages().next().unwrap();
    let bytes = client.retained(&id.topic()).unwrap().payload;
    (format!("{name}-{version}-py3-none-any.whl"), bytes)
}

#[test]
fn two_gateways_side_by_side_show_the_same_and_what_comes_through_one_is_in_both() {
    let [hub_world, one_world, other_world, world] = [World::new(), World::new(), World::new(), World::new()];
    let hub = Server::mosquitto(&hub_world);
    project(&world, "1.0");
    publish(&world, &hub.url());
    let gateways =
        [Server::gateway(&one_world, &hub.url(), &[]), Server::gateway(&other_world, &hub.url(), &[])];
    for gateway in &gateways {
        until("the gateway is ready", || health(gateway).0 == 200);
    }
    let mut client = Client::connect(hub.address, "reader");
    let same = |path: &str| {
        let [one, other] = gateways.each_ref().map(|gateway| Web::get(gateway.http.unwrap(), path, &[]));
        assert_eq!((one.code, &one.body), (200, &other.body), "{path}");
        one.body
    };
    let packages = |client: &mut Client| {
        for (id, _) in list(client).packages() {
            let bytes = same(&format!("/packages/{}", id.digest()));
            assert_eq!(bytes, client.retained(&id.topic()).unwrap().payload);
        }
    };
    same("/simple/blink/");
    packages(&mut client);

    // A release by the cluster is in both.
    project(&world, "1.1");
    publish(&world, &hub.url());
    for gateway in &gateways {
        until("release 2 shows", || health(gateway).1["upstream"]["channels"]["dev"]["sequence"] == 2);
    }
    packages(&mut client);
    assert!(String::from_utf8_lossy(&same("/simple/blink/")).contains("1.1"));

    // An upload through one is in the cluster, and in the other.
    let (code, text) = upload(&gateways[0], "extra", "2.0");
    assert_eq!(code, 200, "{text}");
    assert_eq!(list(&mut client).release().unwrap().sequence, 3);
    for gateway in &gateways {
        until("release 3 shows", || health(gateway).1["upstream"]["channels"]["dev"]["sequence"] == 3);
    }
    assert!(String::from_utf8_lossy(&same("/simple/extra/")).contains("2.0"));
    packages(&mut client);

    // Two at once: both are in the end.
    let [one, other] = &gateways;
    let outcomes = std::thread::scope(|scope| {
        let both =
            [scope.spawn(|| upload(one, "left", "1.0")), scope.spawn(|| upload(other, "right", "1.0"))];
        both.map(|thread| thread.join().unwrap())
    });
    for (code, text) in outcomes {
        assert_eq!(code, 200, "{text}");
    }
    assert_eq!(list(&mut client).release().unwrap().sequence, 5);
    until("both show both", || {
        gateways.iter().all(|gateway| health(gateway).1["upstream"]["channels"]["dev"]["sequence"] == 5)
    });
    for path in ["/simple/left/", "/simple/right/", "/simple/extra/", "/simple/blink/"] {
        same(path);
    }
}

#[test]
fn two_gateways_to_three_nodes_of_nats_serve_on_while_one_node_is_killed_and_show_what_comes_later() {
    let [hub_world, one_world, other_world, world] = [World::new(), World::new(), World::new(), World::new()];
    let mut hub = Cluster::start(&hub_world, 3);
    let urls: Vec<String> = (0..3).map(|node| hub.url(node)).collect();
    project(&world, "1.0");
    publish(&world, &hub.urls());
    // Each begins at another node.
    let start = |world: &World, [first, second, third]: [usize; 3]| {
        let others = ["--upstream", &urls[second], "--upstream", &urls[third]];
        Server::gateway(world, &urls[first], &others)
    };
    let gateways = [start(&one_world, [0, 1, 2]), start(&other_world, [1, 2, 0])];
    for gateway in &gateways {
        until("the gateway is ready", || health(gateway).0 == 200);
    }
    let get = |gateway: &Server, path: &str| {
        let answer = Web::get(gateway.http.unwrap(), path, &[]);
        (answer.code, answer.body)
    };
    let parsed = list(&mut Client::connect(hub.address(0), "reader"));
    let packages: Vec<_> = parsed.packages().map(|(id, _)| *id.digest()).collect();
    let simple = get(&gateways[0], "/simple/blink/");
    assert_eq!(simple.0, 200);

    // Somebody reads from both all along.
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let deadline = Deadline::new();
            let mut rounds = 0;
            while !is_over.load(Ordering::SeqCst) {
                for gateway in &gateways {
                    assert_eq!(get(gateway, "/simple/blink/"), simple);
                    for digest in &packages {
                        let (code, body) = get(gateway, &format!("/packages/{digest}"));
                        assert_eq!((code, Digest::of(&body)), (200, *digest));
                    }
                    assert_eq!(health(gateway).0, 200);
                }
                rounds += 1;
                deadline.check("the gateway does not move");
            }
            rounds
        });
        // The first one's.
        hub.kill(0);
        let deadline = Deadline::new();
        loop {
            let upstream = health(&gateways[0]).1["upstream"].take();
            let is_elsewhere = upstream["url"].as_str().is_some_and(|url| !url.starts_with(&urls[0]));
            if (is_elsewhere && upstream["connected"] == true) || reader.is_finished() {
                break;
            }
            deadline.check("the gateway does not move");
        }
        is_over.store(true, Ordering::SeqCst);
        assert!(reader.join().unwrap() > 0);
    });

    // What is published now shows in both. A survivor may be stuck until the third is back, which `mpypi publish` says; and
    // nobody may tell a subscriber what the dead one owed.
    let folder = world.text("dev");
    let shows = |version: &str| {
        gateways
            .iter()
            .all(|gateway| String::from_utf8_lossy(&get(gateway, "/simple/blink/").1).contains(version))
    };
    let is_published = (1..5).any(|minor| {
        if minor == 3 {
            hub.restart(0);
        }
        let version = format!("1.{minor}");
        project(&world, &version);
        let bounds = ["--may-be-down", "1", "--agree-within", "15s"];
        let output = run("mpypi", &[&["publish", &folder, "--broker", &hub.urls()], &bounds[..]].concat());
        let started = clock();
        while output.code == Some(0) && started.elapsed() < Duration::from_secs(15) {
            if shows(&version) {
                return true;
            }
            std::thread::yield_now();
        }
        println!("{version}: {:?} {}", output.code, output.stderr);
        false
    });
    assert!(is_published);

    // An upload through one is in the cluster, and in the other.
    let deadline = Deadline::new();
    while upload(&gateways[0], "extra", "2.0").0 != 200 {
        deadline.check("the cluster takes no upload");
    }
    until("the upload shows in both", || {
        gateways
            .iter()
            .all(|gateway| String::from_utf8_lossy(&get(gateway, "/simple/extra/").1).contains("2.0"))
    });
    assert_eq!(get(&gateways[0], "/simple/extra/"), get(&gateways[1], "/simple/extra/"));
    // One of the survivors may be stuck, or slow to say what it has.
    let found = |node: usize| {
        let found = Client::connect(hub.address(node), "reader").retained_at("mpypi/channels/dev", 0)?;
        let is_there = String::from_utf8_lossy(&found.payload).contains("\"extra\"");
        UpdateList::parse(&found.payload).ok().filter(|_| is_there)
    };
    let mut served = None;
    until("the cluster has the upload", || {
        served = found(1).or_else(|| found(2));
        served.is_some()
    });
    for (id, _) in served.unwrap().packages() {
        let path = format!("/packages/{}", id.digest());
        let (code, body) = get(&gateways[0], &path);
        assert_eq!((code, Digest::of(&body)), (200, *id.digest()));
        assert_eq!(get(&gateways[1], &path), (code, body));
    }
}

#[test]
fn a_gateway_takes_nodes_from_its_cluster_and_brings_up_what_devices_say_to_it() {
    let [hub_world, world] = [World::new(), World::new()];
    let hub = Server::mosquitto(&hub_world);
    let mut client = Client::connect(hub.address, "reader");
    assert!(client.retain("mpypi/nodes/lamp/state", b"{\"phase\":\"idle\",\"sequence\":1}"));
    project(&world, "1.0");
    publish(&world, &hub.url());
    let data = world.text("gateway");
    let token = "abcdefghijklmnop-1";
    let added = ["device", "add", "thermostat", "--channel", "dev", "--token", token, "--data", &data];
    let _ = run("mpypi-broker", &added).expect_code(0);
    let gateway = Server::gateway(&world, &hub.url(), &["--data", &data]);
    until("the gateway is ready", || health(&gateway).0 == 200);
    let telemetry = br#"{"current_fw_title":"dev","current_fw_version":"1","fw_state":"DOWNLOADING"}"#;
    let path = format!("/api/v1/{token}/telemetry");
    let json = [("Content-Type", "application/json")];
    let answer = Web::open(gateway.http.unwrap()).ask("POST", &path, &json, telemetry);
    assert_eq!(answer.code, 200, "{}", String::from_utf8_lossy(&answer.body));
    until("the device's state is in the cluster", || {
        client.retained("mpypi/nodes/thermostat/state").is_some()
    });
    assert_eq!(gateway.stop("-TERM"), Some(0));
    // What the cluster has of other nodes came here.
    let checked = run("mpypi-broker", &["check", "--data", &data]).expect_code(0);
    assert!(checked.stdout.contains("message"), "{}", checked.stdout);
}

#[test]
fn a_gateway_without_its_cluster_says_so_and_leaves_nothing_behind() {
    let world = World::new();
    let refused = run("mpypi-broker", &["gateway", "--http", "127.0.0.1:0"]).expect_code(1);
    assert!(refused.stderr.contains("it is not said where the upstream is"), "{}", refused.stderr);
    let gateway = Server::gateway(&world, "mqtt://127.0.0.1:1", &[]);
    until("it says why", || health(&gateway).1["upstream"]["problem"].is_string());
    assert_eq!(health(&gateway).0, 503);
    let (code, text) = upload(&gateway, "extra", "1.0");
    assert_eq!(code, 503, "{text}");
    assert_eq!(gateway.stop("-TERM"), Some(0));
}
