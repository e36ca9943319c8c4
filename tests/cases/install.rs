//! `mpypi install`: the first wheel on a device that runs Mpy-BLOX, with its stand-in.

use mpypi_tests::{
    Client, Output, Running, Server, World,
    mpyblox::{Blox, Rest, wheel},
    peer, run, run_with,
};
use serde_json::json;

const NODE: &str = "esp32-0a1b2c";

fn project(world: &World, folder: &str, name: &str, version: &str) {
    let text = format!("[project]\nname = \"{name}\"\nversion = \"{version}\"\n");
    world.write(&format!("{folder}/pyproject.toml"), text);
    world.write(&format!("{folder}/{name}/__init__.py"), format!("V = '{version}'\n"));
}

fn install(world: &World, server: &Server, wheel: &str, more: &[&str]) -> Output {
    let wheel = world.text(wheel);
    let arguments = ["install", "--node", NODE, &wheel, "--broker", &server.url(), "--json"];
    let mpy_cross = peer("mpy-cross");
    run_with("mpypi", &[&arguments[..], more].concat(), &[("MPY_CROSS", mpy_cross.to_str().unwrap())])
}

/// A device on a channel with nothing in it.
fn device(world: &World, server: &Server) -> Blox {
    Client::connect(server.address, "hand").retain("mpypi/channels/dev", b"[]");
    let mut node = Blox::start(world, server, NODE, "dev", &[]);
    assert_eq!(node.rest(), Rest::Running);
    node
}

fn retain_info(server: &Server, node: &Blox) {
    let uname = json!({"sysname": "esp32", "machine": "ESP32 module", "version": "v1.25.0"});
    let info = json!({"uname": uname, "versions": node.versions()}).to_string();
    let mut client = Client::connect(server.address, "keeper");
    assert!(client.retain(&format!("mpypi/nodes/{NODE}/info"), info.as_bytes()));
}

fn first_install_upgrade_and_nothing(server: &Server, world: &World) {
    project(world, "blink", "blink", "1.0");
    let mut node = device(world, server);
    retain_info(server, &node);
    let first = install(world, server, "blink", &[]).expect_code(0).json();
    assert_eq!((&first["name"], &first["version"]), (&"blink".into(), &"1.0".into()));
    assert_eq!((&first["already"], &first["carrier"]), (&false.into(), &"mpy-blox".into()));
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 1));
    assert_eq!(node.versions(), json!({"mpy-blox": "0.6.0", "blink": "1.0"}));
    retain_info(server, &node);

    let again = install(world, server, "blink", &[]).expect_code(0).json();
    assert_eq!((&again["already"], &again["bytes_sent"]), (&true.into(), &0.into()));
    project(world, "blink", "blink", "1.1");
    let upgrade = install(world, server, "blink", &[]).expect_code(0).json();
    assert_eq!((&upgrade["already"], &upgrade["carrier"]), (&false.into(), &json!(null)));
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 2));
    assert_eq!(node.versions(), json!({"mpy-blox": "0.6.0", "blink": "1.1"}));
}

#[test]
fn a_wheel_is_installed_upgraded_and_then_left_alone() {
    let world = World::new();
    first_install_upgrade_and_nothing(&Server::start(&world), &world);
}

#[test]
fn a_wheel_is_installed_upgraded_and_then_left_alone_with_mosquitto_as_the_broker() {
    let world = World::new();
    first_install_upgrade_and_nothing(&Server::mosquitto(&world), &world);
}

#[test]
fn a_device_that_hangs_for_want_of_a_wheel_is_freed() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    project(&world, "dev/wheels/blink", "blink", "1.0");
    let publish = ["publish", &world.text("dev"), "--broker", &server.url(), "--json"];
    let _ = run("mpypi", &publish).expect_code(0);
    let mut node = Blox::start(&world, &server, NODE, "dev", &[]);
    assert!(matches!(node.rest(), Rest::Hangs(_)));
    // Nothing that it said of itself was kept.
    let unknown = install(&world, &server, "dev/wheels/blink", &[]).expect_code(1).stderr;
    assert!(unknown.contains(&format!("error: node `{NODE}` is not known here")), "{unknown}");
    assert!(unknown.contains("`--carrier NAME`"), "{unknown}");
    let freed =
        install(&world, &server, "dev/wheels/blink", &["--carrier", "mpy-blox"]).expect_code(0).json();
    assert_eq!((&freed["carrier"], &freed["bytes_sent"]), (&"mpy-blox".into(), &0.into()));
    assert_eq!((node.rest(), node.resets()), (Rest::Running, 1));
}

#[test]
fn a_project_of_a_channel_is_installed_as_the_channel_carries_it() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    project(&world, "dev/wheels/blink", "blink", "1.0");
    world.write("dev/channel.toml", "compile = \"mpy\"\ntargets = [\"bytecode-esp32\", \"bytecode-rp2\"]\n");
    let mut node = device(&world, &server);
    retain_info(&server, &node);
    let several = install(&world, &server, "dev/wheels/blink", &[]).expect_code(1).stderr;
    assert!(several.contains("makes 2 wheels: mpy6-bytecode-esp32, mpy6-bytecode-rp2"), "{several}");
    let wrong =
        install(&world, &server, "dev/wheels/blink", &["--tag", "mpy6-bytecode-rp2"]).expect_code(1).stderr;
    assert!(wrong.contains("the wheel is for `mpy6-bytecode-rp2`"), "{wrong}");
    let none = install(&world, &server, "dev/wheels/blink", &["--tag", "py3-none-any"]).expect_code(1).stderr;
    assert!(none.contains("makes no wheel for `py3-none-any`"), "{none}");
    let _ = install(&world, &server, "dev/wheels/blink", &["--tag", "mpy6-bytecode-esp32"]).expect_code(0);
    assert_eq!(node.rest(), Rest::Running);
    retain_info(&server, &node);
    assert!(world.path(NODE).join("lib/blink/__init__.mpy").exists());

    // From then on the channel may carry it.
    world.write("dev/channel.toml", "compile = \"mpy\"\ntargets = [\"bytecode-esp32\"]\n");
    project(&world, "dev/wheels/blink", "blink", "1.1");
    let publish = ["publish", &world.text("dev"), "--broker", &server.url(), "--json"];
    let mpy_cross = peer("mpy-cross");
    let _ = run_with("mpypi", &publish, &[("MPY_CROSS", mpy_cross.to_str().unwrap())]).expect_code(0);
    node.until("reset");
    assert_eq!((node.rest(), node.versions()["blink"].as_str()), (Rest::Running, Some("1.1")));
}

#[test]
fn a_wheel_as_other_tools_build_it_is_repacked_so_that_it_installs_and_upgrades() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let mut node = device(&world, &server);
    retain_info(&server, &node);
    for (version, resets) in [("1.0", 1), ("2.0", 2), ("3.0", 3)] {
        let content = format!("V = '{version}'\n");
        let licenses = [("licenses/LICENSE", "free\n"), ("entry_points.txt", "\n")];
        let described = "License-File: LICENSE\nDescription-Content-Type: text/plain\n\nBlinks.\n";
        let files = [("blink/__init__.py", &*content)];
        let foreign = wheel("blink", version, "py3-none-any", &files, &licenses, described);
        world.write("blink.whl", foreign);
        let _ = install(&world, &server, "blink.whl", &[]).expect_code(0);
        assert_eq!((node.rest(), node.resets()), (Rest::Running, resets));
        assert_eq!(node.versions(), json!({"mpy-blox": "0.6.0", "blink": version}));
        retain_info(&server, &node);
    }
    let left = std::fs::read_dir(world.path(NODE).join("lib")).unwrap();
    let mut left: Vec<_> = left.map(|item| item.unwrap().file_name().into_string().unwrap()).collect();
    left.retain(|name| name.starts_with("blink"));
    left.sort();
    assert_eq!(left, ["blink", "blink-3.0.dist-info"]);
}

#[test]
fn errors_say_what_to_do() {
    let world = World::new();
    let server = Server::start(&world);
    project(&world, "blink", "blink", "1.0");
    let nothing = install(&world, &server, "no such", &[]).expect_code(1).stderr;
    assert!(nothing.contains("no such` cannot be opened"), "{nothing}");
    world.write("notes/README.md", "no project");
    let neither = install(&world, &server, "notes", &[]).expect_code(1).stderr;
    assert!(neither.contains("is neither a `.whl` nor a folder with a `pyproject.toml`"), "{neither}");

    // One of ours would take the order for all that it should have.
    let root = world.text("agent");
    let arguments = ["run", "--broker", &server.url(), "--node", NODE, "--root", &root];
    let agent = Running::start("mpypi-agent", &arguments);
    let mut client = Client::connect(server.address, "reader");
    client.subscribe(&format!("mpypi/nodes/{NODE}/info"), 1);
    client.message().unwrap();
    let ours = install(&world, &server, "blink", &[]).expect_code(1).stderr;
    assert!(ours.contains(&format!("error: node `{NODE}` runs `mpypi-agent/")), "{ours}");
    assert!(
        ours.contains("hint: put the wheel into the folder of its channel, and `mpypi publish` that"),
        "{ours}"
    );
    agent.signal("-TERM");
    let _ = agent.wait();
}

#[test]
fn a_device_that_is_off_is_not_waited_for_where_the_broker_knows_and_else_not_for_ever() {
    let world = World::new();
    project(&world, "blink", "blink", "1.0");
    let away = |server: &Server| {
        let node = device(&world, server);
        retain_info(server, &node);
    };
    let mosquitto = Server::mosquitto(&world);
    away(&mosquitto);
    let off = install(&world, &mosquitto, "blink", &[]).expect_code(1).stderr;
    assert!(off.contains(&format!("error: node `{NODE}` is not connected")), "{off}");
    let ours = Server::start(&world);
    away(&ours);
    let late = install(&world, &ours, "blink", &["--timeout", "100ms"]).expect_code(3).stderr;
    assert!(late.contains("did not say within 100ms that it has blink 1.0"), "{late}");
    assert!(late.contains("hint: it may be off"), "{late}");
}
