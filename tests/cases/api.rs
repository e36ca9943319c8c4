//! The fleet API, from outside: what it says of channels, nodes and rollouts, what it has done to them, and what it tells as
//! it happens.

use std::collections::BTreeMap;

use mpypi_protocol::Digest;
use mpypi_tests::{
    Client, Options, Running, Server, World,
    face::eventually,
    http::{Answer, Events, Web},
    run,
};
use serde_json::{Value, json};

const HTTP: [&str; 2] = ["--http", "127.0.0.1:0"];

fn get(server: &Server, path: &str) -> Answer {
    Web::get(server.http.unwrap(), path, &[])
}

fn post(server: &Server, path: &str, body: &Value) -> Answer {
    let headers = [("Content-Type", "application/json")];
    Web::open(server.http.unwrap()).ask("POST", path, &headers, body.to_string().as_bytes())
}

/// What is at `path` once `is_it` holds of it: what was acknowledged is in the index, and about to be where the API looks.
#[track_caller]
fn until(server: &Server, path: &str, is_it: impl Fn(&Value) -> bool) -> Value {
    eventually(path, || {
        let answer = get(server, path);
        Some(answer).filter(|answer| answer.code == 200).map(|answer| answer.json()).filter(&is_it)
    })
}

/// Has a node say what it is and where it stands.
fn say(client: &mut Client, node: &str, platform: &str, room: &str, state: &Value) {
    let info = json!({
        "uname": { "sysname": platform, "machine": "a board", "version": "v1.22.0" },
        "channel": "dev", "agent": "mpypi/0.1.0", "labels": { "room": room }, "free": 1000, "other": [1],
    });
    assert!(client.retain(&format!("mpypi/nodes/{node}/info"), info.to_string().as_bytes()));
    assert!(client.retain(&format!("mpypi/nodes/{node}/state"), state.to_string().as_bytes()));
    assert!(client.retain(&format!("mpypi/nodes/{node}/online"), b"1"));
}

fn state(phase: &str, sequence: u64, error: Option<&str>) -> Value {
    json!({ "phase": phase, "sequence": sequence, "version": format!("1.{sequence}"), "done": 5, "total": 10,
        "attempt": 1, "error": error })
}

/// The names of the nodes of a page.
fn names(page: &Value) -> Vec<&str> {
    page["nodes"].as_array().unwrap().iter().map(|row| row["node"].as_str().unwrap()).collect()
}

/// A channel's folder with these settings, published.
fn publish(world: &World, server: &Server, version: &str, files: &[(&str, &str)]) {
    let _ = std::fs::remove_dir_all(world.path("dev/src"));
    world.write("dev/channel.toml", format!("version = \"{version}\"\n"));
    for (path, content) in files {
        world.write(&format!("dev/src/{path}"), content);
    }
    let _ = run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
}

#[test]
fn nodes_are_found_by_what_they_say_and_come_a_page_at_a_time() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    publish(&world, &server, "1.3", &[("main.py", "print(1)\n")]);
    let mut client = Client::connect(server.address, "client");
    say(&mut client, "a", "esp32", "kitchen", &state("idle", 1, None));
    say(&mut client, "b", "esp32", "cellar", &state("failed", 2, Some("bad-hash: package `x`")));
    say(&mut client, "c", "rp2", "kitchen", &state("downloading", 2, None));
    say(&mut client, "d d", "rp2", "attic", &state("rolled_back", 2, Some("Crash")));
    assert!(client.retain("mpypi/nodes/quiet/online", b"0"));
    // What nobody can read counts as never said.
    assert!(client.retain("mpypi/nodes/quiet/state", b"{}"));
    let all = until(&server, "/api/nodes", |page| page["total"] == 5);
    assert_eq!(names(&all), ["a", "b", "c", "d d", "quiet"]);
    let row = &until(&server, "/api/nodes?q=b&phase=failed", |page| page["total"] == 1)["nodes"][0];
    assert_eq!(
        *row,
        json!({ "node": "b", "channel": "dev", "online": true, "phase": "failed", "sequence": 2,
            "version": "1.2", "held": null, "done": 5, "total": 10, "attempt": 1,
            "error": "bad-hash: package `x`", "reason": "bad-hash", "agent": "mpypi/0.1.0",
            "runtime": "py3-none-esp32", "platform": "esp32", "machine": "a board",
            "firmware": "v1.22.0", "labels": { "room": "cellar" }, "free": 1000,
            "changed": row["changed"] })
    );
    assert!(row["changed"].as_str().unwrap().ends_with('Z'));
    for (query, expected) in [
        ("phase=failed,rolled_back", vec!["b", "d d"]),
        ("phase=unknown", vec!["quiet"]),
        ("channel=dev&online=true", vec!["a", "b", "c", "d d"]),
        ("online=false", vec!["quiet"]),
        ("channel=stable", vec![]),
        ("release=1.2", vec!["b", "c", "d d"]),
        ("release=1", vec!["a"]),
        ("label=room%3Dkitchen", vec!["a", "c"]),
        ("label=room", vec!["a", "b", "c", "d d"]),
        ("label=room%3Dkitchen,room", vec!["a", "c"]),
        ("reason=bad-hash", vec!["b"]),
        ("reason=other", vec!["d d"]),
        ("q=CELLAR", vec!["b"]),
        ("q=hash", vec!["b"]),
        ("query=runtime~%27*esp32%27+and+not+label.room+%3D+cellar", vec!["a"]),
        ("query=version+%3C+1.2", vec!["a"]),
        ("sort=-node", vec!["quiet", "d d", "c", "b", "a"]),
        ("sort=platform&phase=idle,failed,downloading", vec!["a", "b", "c"]),
        ("sort=-phase&channel=dev", vec!["d d", "b", "c", "a"]),
        ("offset=1&limit=2", vec!["b", "c"]),
        ("offset=18446744073709551615", vec![]),
    ] {
        let page = get(&server, &format!("/api/nodes?{query}")).expect(200).json();
        assert_eq!(names(&page), expected, "{query}");
    }
    // Nothing of it is guessed.
    for query in [
        "phase=sleeping",
        "sort=size",
        "limit=0",
        "limit=1001",
        "limit=x",
        "offset=-1",
        "online=maybe",
        "query=(",
        "no=1",
        "q=a&q=b",
    ] {
        let answer = get(&server, &format!("/api/nodes?{query}")).expect(400);
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{query}");
        assert!(answer.json()["hint"].is_string(), "{query}: {}", answer.text());
    }
    let overview = get(&server, "/api/overview").expect(200).json();
    assert_eq!(overview["nodes"], 5);
    assert_eq!((&overview["online"], &overview["offline"]), (&json!(4), &json!(1)));
    assert_eq!(overview["phases"]["rolled_back"], 1);
    assert_eq!(
        overview["failures"],
        json!([{ "reason": "bad-hash", "nodes": 1 }, { "reason": "other", "nodes": 1 }])
    );
    assert_eq!(
        overview["releases"][0],
        json!({ "channel": "dev", "sequence": 2, "version": "1.2", "nodes": 3,
        "phases": { "downloading": 1, "failed": 1, "rolled_back": 1 } })
    );
    assert_eq!(overview["behind"], 0);
    // Who has it already is not sent it again.
    let first = get(&server, "/api/nodes?phase=idle").expect(200);
    let tag = first.header("etag").unwrap().to_owned();
    let again =
        |tag: &str| Web::get(server.http.unwrap(), "/api/nodes?phase=idle", &[("If-None-Match", tag)]).code;
    assert_eq!(
        eventually("the overview is counted", || (again(&tag) == 304 || again(&tag) == 200).then_some(())),
        ()
    );
    // What is cleared is gone, and what stays is there after a start from the index.
    assert!(client.retain("mpypi/nodes/quiet/online", b"") && client.retain("mpypi/nodes/quiet/state", b""));
    let _ = until(&server, "/api/nodes", |page| page["total"] == 4);
    drop(server);
    let server = Server::start_with(&world, &HTTP);
    let all = get(&server, "/api/nodes?sort=-node").expect(200).json();
    assert_eq!(names(&all), ["d d", "c", "b", "a"]);
    assert_eq!(all["nodes"][0]["changed"], Value::Null, "nothing was heard of it since the start");
}

#[test]
fn what_became_of_a_nodes_updates_is_told_with_times_and_its_last_lines() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    publish(&world, &server, "1.1", &[("main.py", "print(1)\n")]);
    let mut client = Client::connect(server.address, "client");
    for (phase, error) in [
        ("downloading", None),
        ("downloading", None),
        ("verifying", None),
        ("installing", None),
        ("failed", Some("flash-full: 10 of 20 bytes")),
    ] {
        say(&mut client, "kitchen", "esp32", "kitchen", &state(phase, 1, error));
    }
    let mut second = state("downloading", 1, None);
    second["attempt"] = json!(2);
    say(&mut client, "kitchen", "esp32", "kitchen", &second);
    client.post("mpypi/nodes/kitchen/log", b"first line\nsecond line", 1, false);
    let node = until(&server, "/api/nodes/kitchen", |node| {
        node["attempt"] == 2 && node["log"].as_array().unwrap().len() == 2
    });
    let history = node["history"].as_array().unwrap();
    assert_eq!(history.len(), 2, "{history:?}");
    let phases: Vec<_> = history[0]["steps"].as_array().unwrap().iter().map(|step| &step["phase"]).collect();
    assert_eq!(phases, ["downloading", "verifying", "installing", "failed"]);
    assert_eq!(history[0]["error"], "flash-full: 10 of 20 bytes");
    assert!(history[0]["ended"].is_string() && history[1]["ended"].is_null());
    assert_eq!((&history[1]["attempt"], &history[1]["phase"]), (&json!(2), &json!("downloading")));
    assert_eq!(node["log"][1]["text"], "second line");
    // As it published it, whatever is in it.
    assert_eq!((&node["info"]["other"], &node["state"]["done"]), (&json!([1]), &json!(5)));
    assert_eq!(node["latest"], json!({ "sequence": 1, "version": "1.1" }));
    let lines = get(&server, "/api/nodes/kitchen/log").expect(200).json();
    assert_eq!(lines["lines"][0]["text"], "first line");
    assert!(get(&server, "/api/nodes/nobody").expect(404).json()["hint"].is_string());
}

#[test]
fn releases_are_listed_and_compared() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    assert_eq!(get(&server, "/api/channels").expect(200).json(), json!({ "channels": [] }));
    let _ = get(&server, "/api/channels/dev").expect(404);
    publish(&world, &server, "1", &[("main.py", "print(1)\n"), ("old.py", "pass\n"), ("same.py", "\n")]);
    publish(&world, &server, "2", &[("main.py", "print(20)\n"), ("new.py", "pass\n\n"), ("same.py", "\n")]);
    let channel = until(&server, "/api/channels/dev", |channel| channel["sequence"] == 2);
    assert_eq!(
        (&channel["version"], &channel["packages"], &channel["size"]),
        (&json!("2"), &json!(3), &json!(17))
    );
    assert_eq!((&channel["signed_by"], &channel["keys"]), (&Value::Null, &json!([])));
    let entry = json!({ "kind": "src", "name": "main.py", "version": null, "path": "main.py", "tag": null,
        "target": null, "digest": Digest::of(b"print(20)\n"), "size": 10, "optional": false });
    assert_eq!(channel["entries"][0], entry);
    let releases = get(&server, "/api/channels/dev/releases").expect(200).json();
    let told: Vec<_> = releases["releases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (&row["sequence"], &row["present"]))
        .collect();
    assert_eq!(told, [(&json!(2), &json!(true)), (&json!(1), &json!(false))]);
    let first = get(&server, "/api/channels/dev/releases/1").expect(200).json();
    assert_eq!(first["entries"].as_array().unwrap().len(), 3);
    assert_eq!(releases["releases"][0]["previous"], first["digest"]);
    let _ = get(&server, "/api/channels/dev/releases/7").expect(404);
    let _ = get(&server, "/api/channels/dev/releases/x").expect(400);
    let diff = get(&server, "/api/channels/dev/diff").expect(200).json();
    assert_eq!(diff, get(&server, "/api/channels/dev/diff?from=1&to=2").expect(200).json());
    assert_eq!(
        (&diff["from"], &diff["to"], &diff["unchanged"], &diff["bytes"]),
        (&json!(1), &json!(2), &json!(1), &json!(16))
    );
    assert_eq!(
        (&diff["added"][0]["name"], &diff["removed"][0]["name"]),
        (&json!("new.py"), &json!("old.py"))
    );
    assert_eq!((&diff["changed"][0]["from"]["size"], &diff["changed"][0]["to"]), (&json!(9), &entry));
    let all = get(&server, "/api/channels/dev/diff?from=0&to=1").expect(200).json();
    assert_eq!(all["added"].as_array().unwrap().len(), 3);
    let packages = get(&server, "/api/packages?q=MAIN").expect(200).json();
    assert_eq!((&packages["total"], &packages["packages"][0]["channels"]), (&json!(1), &json!(["dev"])));
    assert_eq!(get(&server, "/api/packages?kind=wheel").expect(200).json()["total"], 0);
    assert_eq!(
        get(&server, "/api/packages?limit=2&offset=2").expect(200).json()["packages"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn an_order_to_a_node_goes_out_on_its_cmd_and_only_if_there_is_such_a_node() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    let mut node = Client::connect(server.address, "kitchen");
    assert!(node.retain("mpypi/nodes/kitchen/online", b"1"));
    node.subscribe("mpypi/nodes/+/cmd", 1);
    let _ = until(&server, "/api/nodes/kitchen", |_| true);
    for action in ["check", "install", "rollback", "restart"] {
        let answer = post(&server, "/api/nodes/kitchen/cmd", &json!({ "action": action })).expect(202);
        assert_eq!(answer.json(), json!({ "node": "kitchen", "action": action, "online": true }));
        let message = node.message().unwrap();
        assert_eq!(message.topic, "mpypi/nodes/kitchen/cmd");
        assert_eq!(message.payload, format!(r#"[{{"type":"{action}"}}]"#).as_bytes());
    }
    let _ = post(&server, "/api/nodes/nobody/cmd", &json!({ "action": "check" })).expect(404);
    let _ = post(&server, "/api/nodes/kitchen/cmd", &json!({ "action": "explode" })).expect(400);
    let _ = post(&server, "/api/nodes/kitchen/cmd", &json!({ "action": "check", "more": 1 })).expect(400);
    node.fence();
    assert!(!node.waits(), "what was refused was not sent");
}

#[test]
fn a_rollout_is_shown_and_pauses_as_when_its_own_command_is_told() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    publish(&world, &server, "1", &[("main.py", "print(1)\n")]);
    let mut client = Client::connect(server.address, "client");
    for at in 0..20 {
        say(&mut client, &format!("node-{at}"), "esp32", "kitchen", &state("idle", 1, None));
    }
    world.write("dev/src/main.py", "print(2)\n");
    let options = ["--steps", "50%,100%", "--wait", "1h", "--broker", &server.url()];
    let steering = Running::start("mpypi", &[&["rollout", &world.text("dev")], &options[..]].concat());
    let rollout = until(&server, "/api/channels/dev/rollout", |rollout| {
        rollout["percent"] == "50" && rollout["steered"] == true && rollout["counts"]["nodes"] != 0
    });
    assert_eq!((&rollout["status"], &rollout["steps"]), (&json!("running"), &json!(["50", "100"])));
    let counts = &rollout["counts"];
    assert_eq!(counts["pending"], counts["nodes"], "they do not move: {counts}");
    // It is what its own command says.
    let told = run("mpypi", &["rollout", "status", "dev", "--broker", &server.url(), "--json"]).json();
    assert_eq!(told["nodes"]["nodes"], counts["nodes"], "{told}");
    let _ = post(&server, "/api/channels/dev/rollout", &json!({ "order": "resume" })).expect(409);
    let mut events = Events::open(server.http.unwrap(), "/api/events", &[]).unwrap();
    let _ = post(&server, "/api/channels/dev/rollout", &json!({ "order": "pause" })).expect(202);
    let _ = events.until(|event| event.name == "rollout" && event.data["status"] == "paused");
    assert_eq!(steering.wait().code, Some(3));
    let all = until(&server, "/api/rollouts", |all| all["rollouts"][0]["steered"] == false);
    assert_eq!(all["rollouts"][0]["reason"], "someone paused it");
    // Nobody is there to resume it: lists have to be published, and perhaps signed.
    let refused =
        post(&server, "/api/channels/dev/rollout", &json!({ "order": "resume" })).expect(409).json();
    assert!(refused["hint"].as_str().unwrap().contains("mpypi rollout resume dev"), "{refused}");
    let _ = post(&server, "/api/channels/stable/rollout", &json!({ "order": "pause" })).expect(404);
}

#[test]
fn every_node_comes_to_its_last_state_with_who_listens_however_slowly_and_whenever_they_come_back() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    let address = server.http.unwrap();
    let mut slow = Events::open(address, "/api/events", &[]).unwrap();
    assert_eq!(slow.event().unwrap().name, "hello");
    let mut client = Client::connect(server.address, "client");
    // More changes than any queue has room for; `slow` reads none of them meanwhile.
    for turn in 1..=60 {
        for at in 0..100 {
            let topic = format!("mpypi/nodes/node-{at:02}/state");
            client.post(&topic, state("downloading", turn, None).to_string().as_bytes(), 0, true);
        }
        client.fence();
    }
    for at in 0..100 {
        let topic = format!("mpypi/nodes/node-{at:02}/state");
        assert!(client.retain(&topic, state("idle", 100, None).to_string().as_bytes()));
    }
    let mut last = BTreeMap::new();
    let mut id = None;
    while last.len() < 100 || !last.values().all(|row: &Value| row["sequence"] == 100) {
        let event = slow.event().expect("the stream goes on");
        if event.name == "node" {
            last.insert(event.data["node"].as_str().unwrap().to_owned(), event.data.clone());
        }
        id = event.id.or(id);
    }
    drop(slow);
    // Who comes back hears what changed meanwhile, each once, and that one has gone.
    assert!(client.retain("mpypi/nodes/node-07/state", state("failed", 101, None).to_string().as_bytes()));
    assert!(client.retain("mpypi/nodes/node-07/state", state("idle", 102, None).to_string().as_bytes()));
    assert!(client.retain("mpypi/nodes/node-08/state", b""));
    let _ = until(&server, "/api/nodes", |page| page["total"] == 99);
    let id = id.unwrap();
    let mut back = Events::open(address, "/api/events", &[("Last-Event-ID", &id)]).unwrap();
    assert_eq!(back.event().unwrap().name, "hello");
    let changed = back.until(|event| event.name != "overview");
    assert_eq!((changed.name.as_str(), &changed.data["sequence"]), ("node", &json!(102)));
    let gone = back.until(|event| event.name != "overview");
    assert_eq!((gone.name.as_str(), gone.data), ("node-gone", json!({ "node": "node-08" })));
    // What cannot be gone on from is said so.
    for id in ["00000000-1", "nonsense", &id.replace('-', "-9999")] {
        let mut lost = Events::open(address, "/api/events", &[("Last-Event-ID", id)]).unwrap();
        assert_eq!(lost.event().unwrap().name, "hello");
        assert_eq!(lost.event().unwrap().name, "resync", "{id}");
    }
    // Its lines come to who asks for them.
    let mut lines = Events::open(address, "/api/events?node=node-07", &[]).unwrap();
    client.post("mpypi/nodes/node-07/log", b"hello\nworld", 1, false);
    client.post("mpypi/nodes/node-09/log", b"not asked for", 1, false);
    let line = lines.until(|event| event.name == "log");
    assert_eq!((&line.data["node"], &line.data["text"]), (&json!("node-07"), &json!("hello")));
    assert_eq!(lines.until(|event| event.name == "log").data["text"], "world");
    // And all of it ends with the broker.
    drop(server);
    while back.event().is_some() {}
}

#[test]
fn who_listens_hears_what_they_may_and_no_more_when_they_are_sent_away() {
    let world = World::new();
    let token = |name: &str, role: &str| {
        let arguments = ["user", "add", name, "--role", role, "--token", "--data", &world.text("data")];
        run("mpypi-broker", &arguments).expect_code(0).stdout.trim().to_owned()
    };
    let (admin, viewer, kitchen) =
        (token("admin", "admin"), token("viewer", "viewer"), token("kitchen", "node"));
    world.write("data/rules.toml", "[[rules]]\nnodes = \"kitchen\"\nchannels = [\"stable\"]\n");
    world.write("data/broker.toml", "[limits]\nhttp_events = 3\n");
    let server = Server::start_with(&world, &HTTP);
    let login = Some(("admin".to_owned(), admin.clone()));
    let options = Options { login, ..Options::id("admin") };
    let (mut client, _) = Client::try_connect(server.address, &options).unwrap();
    let listen = |token: &str, query: &str| {
        let login = format!("Bearer {token}");
        Events::open(server.http.unwrap(), &format!("/api/events{query}"), &[("Authorization", &login)])
    };
    assert_eq!(listen(&kitchen, "?node=cellar").err(), Some(403));
    assert_eq!(listen("nonsense", "").err(), Some(401));
    let (mut all, mut own) = (listen(&viewer, "").unwrap(), listen(&kitchen, "?node=kitchen").unwrap());
    let third = listen(&viewer, "").unwrap();
    assert_eq!(listen(&admin, "").err(), Some(503), "there are three places");
    drop(third);
    assert!(client.retain("mpypi/nodes/cellar/online", b"1"));
    assert!(client.retain("mpypi/channels/dev", b"[]"));
    assert!(client.retain("mpypi/channels/stable", b"[]"));
    assert!(client.retain("mpypi/nodes/kitchen/online", b"1"));
    let mut heard = Vec::new();
    while heard.last() != Some(&"node kitchen".to_owned()) {
        let event = all.event().unwrap();
        let what = event.data["node"].as_str().or(event.data["channel"].as_str()).unwrap_or_default();
        heard.push(format!("{} {what}", event.name));
    }
    for expected in ["node cellar", "channel dev", "channel stable"] {
        assert!(heard.contains(&expected.to_owned()), "{heard:?}");
    }
    let next = |events: &mut Events| events.event().map(|event| (event.name, event.data));
    assert_eq!(next(&mut own).unwrap().0, "hello");
    assert_eq!(next(&mut own).unwrap().1["channel"], "stable");
    assert_eq!(next(&mut own).unwrap().1["node"], "kitchen");
    // A login that is taken away ends it, with the next thing to tell at the latest.
    let arguments = ["user", "remove", "viewer", "--data", &world.text("data")];
    let _ = run("mpypi-broker", &arguments).expect_code(0);
    eventually("the viewer is sent away", || {
        client.post("mpypi/nodes/cellar/online", b"0", 0, true);
        client.post("mpypi/nodes/cellar/online", b"1", 0, true);
        client.fence();
        match all.event() {
            Some(_) => None,
            None => Some(()),
        }
    });
}

#[test]
fn devices_of_thingsboards_are_nodes_like_all_others() {
    let world = World::new();
    let token = crate::things::add_device(&world, "thermostat", &[]);
    let server = Server::start_with(&world, &HTTP);
    crate::things::publish(&world, &server, "3.0", b"image");
    let told = json!({ "current_fw_title": "dev", "current_fw_version": "3.0", "fw_state": "UPDATED" });
    let path = format!("/api/v1/{token}/telemetry");
    let _ = post(&server, &path, &told).expect(200);
    let node = until(&server, "/api/nodes/thermostat", |node| node["phase"] == "idle");
    assert_eq!((&node["channel"], &node["version"]), (&json!("dev"), &json!("3.0")));
    let list = get(&server, "/api/channels/dev").expect(200).json();
    assert_eq!((&list["nodes"], &list["entries"][0]["kind"]), (&json!(1), &json!("firmware")));
}
