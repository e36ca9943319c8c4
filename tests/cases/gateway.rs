//! Gateways: HTTP to a cluster, here mosquitto, by programs that are no brokers and know nothing of each other.

use mpypi_protocol::{Digest, UpdateList};
use mpypi_tests::{Client, Deadline, Server, World, http::Web, run};
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

#[track_caller]
fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Deadline::new();
    while !is() {
        deadline.check(what);
        std::thread::yield_now();
    }
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
