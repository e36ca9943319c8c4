//! Home Assistant, in whose place mosquitto's clients and an impatient test stand: what it is told, and what its button does.

use mpypi_protocol::{Digest, PackageId};
use mpypi_tests::{Client, Options, Running, Server, World, run, run_with};
use serde_json::{Value, json};

/// A release of one file for channel `dev`.
fn publish(server: &Server, sequence: u64, more: Value) {
    let content = format!("# {sequence}\n").into_bytes();
    let digest = Digest::of(&content);
    let mut publisher = Client::connect(server.address, "publisher");
    assert!(publisher.retain(&PackageId::Src("main.py".parse().unwrap(), digest).topic(), &content));
    let mut release = json!({"type": "release", "channel": "dev", "sequence": sequence, "version": "1.0.0"});
    release.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let src =
        json!({"type": "src", "path": "main.py", "pkg_sha256": digest.to_string(), "size": content.len()});
    assert!(publisher.retain("mpypi/channels/dev", json!([release, src]).to_string().as_bytes()));
}

/// The first state at `topic` that is as `wanted`.
#[track_caller]
fn state(server: &Server, topic: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let mut home = Client::connect(server.address, "home");
    home.subscribe(topic, 1);
    loop {
        let received = home.message().expect("Home Assistant is told no such thing");
        match serde_json::from_slice(&received.payload) {
            Ok(state) if wanted(&state) => return state,
            _ => {}
        }
    }
}

/// The first message at `topic`, as mosquitto's client has it.
fn first(server: &Server, topic: &str) -> String {
    let port = server.port();
    let output = run("mosquitto_sub", &["-p", &port, "-t", topic, "-C", "1", "-W", "60", "-q", "1"]);
    output.expect_code(0).stdout
}

/// Waits until nothing is retained at `topic`.
#[track_caller]
fn is_taken_back(server: &Server, topic: &str) {
    let mut home = Client::connect(server.address, "home");
    home.subscribe(topic, 1);
    home.fence();
    if !home.waits() {
        return;
    }
    while !home.message().expect("it stays there").payload.is_empty() {}
}

#[test]
fn home_assistant_sees_every_node_as_an_update_and_its_button_installs_what_waits_for_an_order() {
    let world = World::new();
    let server = Server::start_with(&world, &["--home-assistant"]);
    publish(&server, 1, json!({}));
    let (url, root) = (server.url(), world.text("node"));
    let arguments = ["run", "--broker", &url, "--root", &root, "--node", "kitchen", "--channel", "dev"];
    let agent = Running::start("mpypi-agent", &arguments);
    let config: Value =
        serde_json::from_str(&first(&server, "homeassistant/update/mpypi_kitchen/config")).unwrap();
    assert_eq!(config["device"]["name"], "kitchen");
    let topic = config["state_topic"].as_str().unwrap();
    let up_to_date = |name: &'static str| {
        move |state: &Value| state["installed_version"] == name && state["latest_version"] == name
    };
    state(&server, topic, up_to_date("1.0.0 (1)"));
    // The same version for people, and yet an update.
    publish(&server, 2, json!({"rollout": {"id": "00000000000000fe", "percent": 100, "optional": true}}));
    let offered = state(&server, topic, |state| state["latest_version"] == "1.0.0 (2)");
    assert_eq!(offered["installed_version"], "1.0.0 (1)");
    assert_eq!(offered["in_progress"], false);
    assert_eq!(offered["title"], "dev");
    assert_eq!(offered["release_summary"], "1 file");
    let mut node = Client::connect(server.address, "looks");
    node.subscribe("mpypi/nodes/kitchen/state", 1);
    while !String::from_utf8(node.message().unwrap().payload).unwrap().contains("\"held\":2") {}
    let [command, install] = ["command_topic", "payload_install"].map(|key| config[key].as_str().unwrap());
    let port = server.port();
    let _ = run("mosquitto_pub", &["-p", &port, "-t", command, "-m", install, "-q", "1"]).expect_code(0);
    state(&server, topic, up_to_date("1.0.0 (2)"));
    agent.signal("-TERM");
    assert_eq!(agent.wait().code, Some(0));
    // A node that is forgotten is no update any more.
    let mut operator = Client::connect(server.address, "operator");
    for subject in ["info", "state", "online"] {
        assert!(operator.retain(&format!("mpypi/nodes/kitchen/{subject}"), b""));
    }
    is_taken_back(&server, "homeassistant/update/mpypi_kitchen/config");
    is_taken_back(&server, topic);
}

#[test]
fn without_the_flag_nothing_is_told_and_what_was_told_is_taken_back_but_nothing_of_others() {
    let world = World::new();
    let server = Server::start_with(&world, &["--home-assistant"]);
    let mut node = Client::connect(server.address, "kitchen");
    let state = br#"{"phase":"idle","sequence":1,"version":"1.0.0"}"#;
    assert!(node.retain("mpypi/nodes/kitchen/state", state));
    let topic = "homeassistant/update/mpypi_kitchen/config";
    assert!(first(&server, topic).contains("mpypi-broker"));
    let foreign = "homeassistant/update/mpypi_other/config";
    assert!(node.retain(foreign, b"{}"));
    server.kill();
    let server = Server::start(&world);
    is_taken_back(&server, topic);
    let mut client = Client::connect(server.address, "looks");
    assert!(client.retained("mpypi/nodes/kitchen/state").is_some());
    assert!(client.retained(foreign).is_some());
}

#[test]
fn home_assistant_may_log_in_as_a_publisher_and_nodes_see_nothing_of_it() {
    let world = World::new();
    let data = world.text("data");
    let mut tokens = Vec::new();
    for (name, role) in [("home", "publisher"), ("kitchen", "node")] {
        let usual = ["user", "add", name, "--role", role, "--token", "--data", &data];
        tokens.push(run_with("mpypi-broker", &usual, &[]).expect_code(0).stdout.trim().to_owned());
    }
    let server = Server::start_with(&world, &["--home-assistant"]);
    let connect = |at: usize, id: &str, will: Option<(String, String)>| {
        let login = Some((id.to_owned(), tokens[at].clone()));
        let (client, code) =
            Client::try_connect(server.address, &Options { login, will, ..Options::id(id) }).unwrap();
        assert_eq!(code, 0);
        client
    };
    // As it comes: with a will, then with its birth.
    let status = "homeassistant/status".to_owned();
    let mut home = connect(0, "home", Some((status.clone(), "offline".to_owned())));
    assert!(home.retain(&status, b"online"));
    for filter in ["homeassistant/+/+/config", "homeassistant/+/+/+/config", "mpypi/nodes/kitchen/online"] {
        assert_eq!(home.subscribe(filter, 1), 1, "{filter}");
    }
    let mut node = connect(1, "kitchen", None);
    assert_eq!(node.subscribe("homeassistant/#", 1), 0x80);
    assert_eq!(node.subscribe("homeassistant/update/mpypi_kitchen/state", 1), 0x80);
}
