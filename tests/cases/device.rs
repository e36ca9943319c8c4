//! The MicroPython agent on MicroPython's Unix port, against real brokers: the same updates, reports and refusals
//! as the simulated one, over a line that may be anything.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use mpypi_protocol::{
    Digest, FilePath,
    node::{Info, Phase, State},
    wheel::{RecordLine, dist_info, write_record},
};
use mpypi_tests::{
    Authority, Client, Deadline, Kind, Output, Running, Secure, Server, Validity, World, micropython, peer,
    run,
};
use serde_json::{Value, json};

/// Where the agent is, and the scripts that run it.
pub(crate) fn device(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../device").join(name)
}

pub(crate) fn script(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("device").join(name).to_str().unwrap().to_owned()
}

/// Where MicroPython finds its own modules and the agent's.
pub(crate) fn path() -> String {
    format!(".frozen:{}", device("").display())
}

/// Runs a script with the agent's sources on its path.
pub(crate) fn python(arguments: &[&str]) -> Output {
    micropython(arguments, &[("MICROPYPATH", &path())])
}

/// One device, its files in the world's folder `root`.
pub(crate) fn options(world: &World, broker: &str, more: Value) -> String {
    fs::create_dir_all(world.path("root")).unwrap();
    let mut options = json!({
        "server": broker, "channel": "dev", "node": "board", "root": world.text("root"), "how": "follow",
        "confirm_after": 0, "limits": {"RECONNECT_FIRST": 10, "RETRY_FIRST": 10, "RETRY_MOST": 40, "LOOK": 20},
    });
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    // As a file: MicroPython keeps arguments as names, which must be short.
    world.write("options.json", options.to_string()).to_str().unwrap().to_owned()
}

/// Runs the device until there is nothing more to do. Returns the lines that it said.
pub(crate) fn update(world: &World, broker: &str, more: Value) -> Vec<Value> {
    said(&python(&[&script("node.py"), &options(world, broker, more)]).expect_code(0))
}

pub(crate) fn said(output: &Output) -> Vec<Value> {
    output.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// The phase it ended in, and why, if something was refused: the first word.
pub(crate) fn result(lines: &[Value]) -> (String, String) {
    let last = lines.last().unwrap();
    let word = last["error"].as_str().unwrap_or_default().split(':').next().unwrap_or_default();
    (last["phase"].as_str().unwrap().to_owned(), word.to_owned())
}

pub(crate) fn idle() -> (String, String) {
    ("idle".to_owned(), String::new())
}

fn channel(world: &World) {
    world.write("dev/src/main.py", "import blink\n");
    world.write("dev/src/old.py", "# leaves with the next release\n");
    world.write("dev/src/assets/logo.bin", [0, 1, 2, 255].repeat(5000));
    world.write("dev/src/lib/empty.py", "");
    world.write("dev/wheels/blink/pyproject.toml", "[project]\nname = \"blink\"\nversion = \"1.0.0\"\n");
    world.write("dev/wheels/blink/blink/__init__.py", "__version__ = '1.0.0'\n");
    world.write("dev/wheels/blink/blink/led.py", "PIN = 2\n".repeat(800));
}

/// What a device of that channel has, apart from the wheel's dist-info.
fn expected(world: &World) -> BTreeMap<String, Vec<u8>> {
    let mut files = world.files("dev/src");
    for (path, content) in world.files("dev/wheels/blink/blink") {
        files.insert(format!("lib/blink/{path}"), content);
    }
    files
}

pub(crate) fn files(world: &World) -> BTreeMap<String, Vec<u8>> {
    let mut files = world.files("root");
    files.retain(|path, _| !path.contains(".dist-info/"));
    files
}

fn publish(world: &World, broker: &str) -> Value {
    run("mpypi", &["publish", &world.text("dev"), "--broker", broker, "--json"]).expect_code(0).json()
}

pub(crate) fn state(client: &mut Client) -> State {
    State::parse(&client.retained("mpypi/nodes/board/state").unwrap().payload).unwrap()
}

pub(crate) fn info(client: &mut Client) -> Info {
    Info::parse(&client.retained("mpypi/nodes/board/info").unwrap().payload).unwrap()
}

#[test]
fn a_board_installs_upgrades_and_rests() {
    for mosquitto in [false, true] {
        let world = World::new();
        let server = if mosquitto { Server::mosquitto(&world) } else { Server::start(&world) };
        channel(&world);
        publish(&world, &server.url());
        assert_eq!(result(&update(&world, &server.url(), json!({}))), idle());
        assert_eq!(files(&world), expected(&world));

        world.write("dev/src/main.py", "import blink  # changed\n");
        world.write("dev/wheels/blink/pyproject.toml", "[project]\nname = \"blink\"\nversion = \"1.1.0\"\n");
        fs::remove_file(world.path("dev/src/old.py")).unwrap();
        publish(&world, &server.url());
        assert_eq!(result(&update(&world, &server.url(), json!({}))), idle());
        assert_eq!(files(&world), expected(&world));

        let mut reader = Client::connect(server.address, "reader");
        let told = state(&mut reader);
        assert_eq!((told.phase, told.sequence, told.attempt), (Phase::Idle, Some(2), 0));
        let info = info(&mut reader);
        assert_eq!(info.versions, BTreeMap::from([("blink".to_owned(), "1.1.0".to_owned())]));
        assert_eq!((info.channel.unwrap().as_str(), info.free.is_some()), ("dev", true));
        assert!(info.extra["mpy"].is_u64(), "{:?}", info.extra);
        assert_eq!(reader.retained("mpypi/nodes/board/online").unwrap().payload, b"0");

        // With nothing changed, no file is written: not even the list.
        let before = written(&world.path("root"));
        assert_eq!(result(&update(&world, &server.url(), json!({}))), idle());
        assert_eq!(written(&world.path("root")), before);
    }
}

/// When each file was written.
fn written(root: &Path) -> BTreeMap<PathBuf, std::time::SystemTime> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    found.insert(path.clone(), fs::metadata(&path).unwrap().modified().unwrap());
                }
            }
        }
    }
    found
}

#[test]
fn a_release_that_is_not_confirmed_is_taken_back_and_not_tried_again() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world);
    publish(&world, &server.url());
    assert_eq!(result(&update(&world, &server.url(), json!({}))), idle());
    let old = files(&world);
    world.write("dev/src/main.py", "raise SystemExit\n");
    publish(&world, &server.url());
    let never = json!({"confirm_after": null});
    let mut phases = Vec::new();
    for _ in 0..4 {
        phases.push(result(&update(&world, &server.url(), never.clone())).0);
    }
    assert_eq!(phases, ["confirming", "confirming", "confirming", "rolled_back"]);
    assert_eq!(files(&world), old);
    let told = state(&mut Client::connect(server.address, "reader"));
    assert_eq!((told.phase, told.sequence), (Phase::RolledBack, Some(2)));
    assert!(told.error.unwrap().starts_with("not-confirmed: "));
    assert_eq!(result(&update(&world, &server.url(), json!({}))).0, "rolled_back");
    // Until the next one.
    world.write("dev/src/main.py", "print(3)\n");
    publish(&world, &server.url());
    assert_eq!(result(&update(&world, &server.url(), json!({}))), idle());
    assert_eq!(files(&world), expected(&world));
}

/// Waits for the state that `wanted` likes.
pub(crate) fn await_state(client: &mut Client, wanted: impl Fn(&State) -> bool) -> State {
    let patience = Deadline::new();
    loop {
        patience.check("the board did not say what was awaited");
        let message = client.message().unwrap();
        if message.topic.ends_with("/state") {
            let state = State::parse(&message.payload).unwrap();
            if wanted(&state) {
                return state;
            }
        }
    }
}

pub(crate) fn start(world: &World, broker: &str, more: Value) -> Running {
    let arguments = [&script("node.py"), &options(world, broker, more)];
    Running::start_with("micropython", &arguments.map(String::as_str), &[("MICROPYPATH", &path())])
}

#[test]
fn a_board_that_is_connected_follows_orders() {
    let world = World::new();
    let server = Server::start(&world);
    let mut operator = Client::connect(server.address, "operator");
    assert!(operator.subscribe("mpypi/nodes/board/state", 1) <= 1);
    let run = json!({"how": "run", "confirm_after": null});
    let node = start(&world, &server.url(), run.clone());
    await_state(&mut operator, |state| state.phase == Phase::Idle);
    channel(&world);
    publish(&world, &server.url());
    await_state(&mut operator, |state| state.phase == Phase::Restarting);
    let _ = node.wait().expect_code(0);

    // The new release waits for the application. An operator does not like it.
    let node = start(&world, &server.url(), run.clone());
    await_state(&mut operator, |state| state.phase == Phase::Confirming);
    operator.post("mpypi/nodes/board/cmd", br#"[{"type":"rollback"}]"#, 0, false);
    assert_eq!(result(&said(&node.wait().expect_code(0))).0, "restarting");
    let again = json!({"how": "run"});
    // Taking it back changes what runs: the device restarts once more.
    assert_eq!(result(&said(&start(&world, &server.url(), again.clone()).wait())).0, "restarting");
    assert_eq!(files(&world), BTreeMap::new());
    let node = start(&world, &server.url(), again.clone());
    let told = await_state(&mut operator, |state| state.phase == Phase::RolledBack);
    assert_eq!(told.error.unwrap(), "told-to: an operator rolled this release back");

    // Then they do: what was refused is tried once more.
    operator.post("mpypi/nodes/board/cmd", br#"[{"type":"check"}]"#, 0, false);
    let _ = node.wait().expect_code(0);
    let node = start(&world, &server.url(), again);
    await_state(&mut operator, |state| state.phase == Phase::Idle && state.sequence == Some(1));
    assert_eq!(files(&world), expected(&world));

    // A check repairs what was damaged; a list to this board alone is installed; a restart is a restart.
    fs::write(world.path("root/main.py"), "damaged").unwrap();
    operator.post("mpypi/nodes/board/cmd", br#"[{"type":"check"}]"#, 0, false);
    await_state(&mut operator, |state| state.phase == Phase::Restarting);
    let _ = node.wait().expect_code(0);
    assert_eq!(files(&world), expected(&world));
    let node = start(&world, &server.url(), run);
    await_state(&mut operator, |state| state.phase == Phase::Confirming);
    operator.post("mpypi/nodes/board/cmd", br#"[{"type":"restart"}]"#, 0, false);
    assert_eq!(result(&said(&node.wait().expect_code(0))).0, "restarting");
}

/// A wheel of these files, made by hand: nobody checks what is in it.
pub(crate) fn wheel(name: &str, version: &str, members: &[(&str, &[u8])]) -> Vec<u8> {
    let info = dist_info(name, version);
    let metadata = format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n").into_bytes();
    let mut all: Vec<(String, Vec<u8>)> =
        members.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
    all.push((format!("{info}/METADATA"), metadata));
    let record = format!("{info}/RECORD");
    let mut lines = String::new();
    for (path, bytes) in &all {
        match FilePath::new(path.clone()) {
            Ok(path) => {
                let (digest, size) = (Some(Digest::of(bytes)), Some(bytes.len() as u64));
                lines += &write_record(&[RecordLine { path, digest, size }]);
            }
            Err(_) => lines += &format!("{path},,\n"),
        }
    }
    lines += &format!("{record},,\n");
    all.push((record, lines.into_bytes()));
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (path, bytes) in &all {
        let stored =
            zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        archive.start_file(path.clone(), stored).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

pub(crate) fn release(sequence: u64) -> Value {
    json!({"type": "release", "channel": "dev", "sequence": sequence, "version": sequence.to_string()})
}

pub(crate) fn src(path: &str, content: &[u8]) -> Value {
    json!({"type": "src", "path": path, "pkg_sha256": Digest::of(content), "size": content.len()})
}

/// Retains a list, and its packages before.
pub(crate) fn retain(client: &mut Client, list: &[Value], packages: &[(&Value, &[u8])]) {
    for (entry, content) in packages {
        let digest = entry["pkg_sha256"].as_str().unwrap();
        let topic = match entry["path"].as_str() {
            Some(path) => format!("mpypi/packages/src/{path}/{digest}"),
            None => format!("mpypi/packages/wheel/{digest}"),
        };
        assert!(client.retain(&topic, content));
    }
    assert!(client.retain("mpypi/channels/dev", Value::from(list.to_vec()).to_string().as_bytes()));
}

#[test]
fn what_cannot_be_right_is_refused_with_its_reason_and_changes_nothing() {
    let world = World::new();
    // A broker that checks nothing.
    let server = Server::mosquitto(&world);
    let mut client = Client::connect(server.address, "publisher");
    let good = src("main.py", b"print(1)\n");
    retain(&mut client, &[release(5), good.clone()], &[(&good, b"print(1)\n")]);
    assert_eq!(result(&update(&world, &server.url(), json!({}))), idle());
    let old = files(&world);
    assert_eq!(old.len(), 1);

    let mut refuse = |word: &str, list: Vec<Value>, packages: &[(&Value, &[u8])]| {
        retain(&mut client, &list, packages);
        for _ in 0..2 {
            let lines = update(&world, &server.url(), json!({"limits": {"FETCH_STALL": 150, "ATTEMPTS": 2}}));
            assert_eq!(result(&lines), ("failed".to_owned(), word.to_owned()), "{lines:?}");
        }
        let told = state(&mut client);
        assert_eq!(told.phase, Phase::Failed);
        assert!(told.error.unwrap().starts_with(&format!("{word}: ")));
        assert_eq!(files(&world), old, "{word}");
    };
    let new = b"print(2)\n";
    let entry = src("main.py", new);
    refuse("wrong-hash", vec![release(6), entry.clone()], &[(&entry, b"print(3)\n")]);
    let mut lie = src("main.py", b"print(22)\n");
    lie["size"] = json!(9);
    refuse("wrong-size", vec![release(7), lie.clone()], &[(&lie, b"print(22)\n")]);
    lie["size"] = json!(900);
    refuse("wrong-size", vec![release(8), lie.clone()], &[]);
    let (path, lost) = ("lost.py", src("lost.py", b"nobody sent it"));
    assert_eq!(lost["path"], path);
    refuse("missing-package", vec![release(9), entry.clone(), lost], &[(&entry, new)]);
    refuse("rollback", vec![release(4), good.clone()], &[]);
    refuse("rollback", vec![release(9), good.clone()], &[]);
    refuse("rollback", vec![good.clone()], &[]);
    let mut expired = release(10);
    expired["expires"] = json!("2026-01-01T00:00:00Z");
    refuse("expired", vec![expired, entry.clone()], &[]);
    let mut other = release(11);
    other["channel"] = json!("stable");
    refuse("wrong-channel", vec![other, entry.clone()], &[]);
    refuse("bad-list", vec![release(12), entry.clone(), entry.clone()], &[]);
    refuse("bad-list", vec![release(12), src("../boot.py", new)], &[]);
    let mut huge = src("main.py", b"huge");
    huge["size"] = json!(u64::MAX);
    refuse("no-space", vec![release(13), huge], &[]);
    let mut wrong = |word: &str, sequence: u64, bytes: &[u8], tag: Option<&str>| {
        let mut entry = json!({
            "type": "wheel", "name": "blink", "version": "1.0", "pkg_sha256": Digest::of(bytes),
            "size": bytes.len(),
        });
        if let Some(tag) = tag {
            entry["tag"] = json!(tag);
        }
        refuse(word, vec![release(sequence), entry.clone()], &[(&entry, bytes)]);
    };
    let sound = wheel("blink", "1.0", &[("blink.py", b"x = 1\n")]);
    wrong("no-fit", 14, &sound, Some("mpy5-bytecode-any"));
    wrong("escapes-root", 15, &wheel("blink", "1.0", &[("../boot.py", b"x = 1\n")]), None);
    wrong("bad-wheel", 16, &wheel("blink", "1.1", &[("blink.py", b"x = 1\n")]), None);
    wrong("bad-wheel", 17, &sound[..sound.len() - 1], None);

    // After all that, a good one.
    retain(&mut client, &[release(18), entry.clone()], &[(&entry, new)]);
    assert_eq!(result(&update(&world, &server.url(), json!({}))), idle());
    assert_eq!(files(&world)["main.py"], new);
}

/// A signing key made by openssl: its name, and its modulus in hexadecimal.
pub(crate) fn signing_key(world: &World, name: &str) -> (String, String) {
    let key = world.text(&format!("{name}.key"));
    openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072", "-out", &key]);
    let modulus = openssl(&["rsa", "-in", &key, "-noout", "-modulus"]);
    let modulus = String::from_utf8(modulus).unwrap().trim().strip_prefix("Modulus=").unwrap().to_lowercase();
    (name.to_owned(), modulus)
}

pub(crate) fn openssl(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("openssl").args(arguments).output().expect("openssl is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The list with a signature of `key`, which says it is by `name`.
pub(crate) fn signed(world: &World, list: &[Value], key: &str, name: &str) -> String {
    let text = Value::from(list.to_vec()).to_string();
    let covered = text.strip_suffix(']').unwrap();
    let (file, signature) = (world.write("covered", covered), world.text("covered.sig"));
    let key = world.text(&format!("{key}.key"));
    openssl(&["dgst", "-sha256", "-sign", &key, "-out", &signature, file.to_str().unwrap()]);
    let sig = String::from_utf8(openssl(&["base64", "-A", "-in", &signature])).unwrap();
    // Its place is behind the last entry, and it must begin like this.
    let entry = format!(
        r#"{{"type":"signature","key":"{name}","alg":"rsa3072-pkcs1v15-sha256","sig":"{}"}}"#,
        sig.trim()
    );
    format!("{covered},{entry}]")
}

#[test]
fn a_board_with_keys_installs_nothing_that_they_did_not_sign() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let mut client = Client::connect(server.address, "publisher");
    let (name, modulus) = signing_key(&world, "dev-2026");
    let (stranger, _) = signing_key(&world, "stranger");
    world.write("keys.json", json!({&name: modulus}).to_string());
    let keys = json!({"keys": world.text("keys.json")});
    let inline = json!({"keys": {&name: modulus}});
    let entry = src("main.py", b"print(1)\n");
    retain(&mut client, &[release(1), entry.clone()], &[(&entry, b"print(1)\n")]);
    let list = |sequence| vec![release(sequence), entry.clone()];
    let mut refuse = |word: &str, payload: &str| {
        assert!(client.retain("mpypi/channels/dev", payload.as_bytes()));
        let lines = update(&world, &server.url(), keys.clone());
        assert_eq!(result(&lines), ("failed".to_owned(), word.to_owned()), "{lines:?} {payload}");
        assert!(files(&world).is_empty());
    };
    refuse("unsigned", &Value::from(list(1)).to_string());
    let good = signed(&world, &list(2), &name, &name);
    refuse("bad-signature", &good.replace("\"sequence\":2", "\"sequence\":3"));
    refuse("bad-signature", &signed(&world, &list(2), &stranger, &name));
    refuse("unknown-key", &signed(&world, &list(2), &stranger, &stranger));
    refuse("bad-signature", &good.replace("rsa3072-pkcs1v15-sha256", "none"));
    let at = good.find("\"sig\":\"").unwrap() + 7;
    refuse("bad-signature", &format!("{}{}", &good[..at], &good[at + 4..]));
    refuse("bad-signature", &format!("{}{}\"}}]", &good[..at], ""));
    // Only at the end, and nothing behind it: neither white space nor more.
    refuse("bad-list", &format!("{good} "));
    refuse("bad-list", &good.replace("\"}]", "\"} ]"));
    let at = good.rfind(",{\"type\":\"signature\"").unwrap();
    refuse("bad-list", &format!("{}{},{}]", &good[..at], &good[at..good.len() - 1], entry));
    refuse("unsigned", &good.replace(",{\"type\":\"signature\"", ", {\"type\":\"signature\""));
    assert!(client.retain("mpypi/channels/dev", good.as_bytes()));
    assert_eq!(result(&update(&world, &server.url(), keys)), idle());
    assert_eq!(files(&world)["main.py"], b"print(1)\n");
    assert!(client.retain("mpypi/channels/dev", signed(&world, &list(3), &name, &name).as_bytes()));
    assert_eq!(result(&update(&world, &server.url(), inline)), idle());
}

#[test]
fn a_broker_must_prove_who_it_is() {
    for kind in Secure::KINDS {
        let world = World::new();
        let ca = Authority::new(&world, "ca");
        ca.server(&world, "broker", &["localhost"], Validity::Now);
        let _ = Authority::new(&world, "other");
        ca.client(&world, "board");
        let trust = world.text("ca.pem");
        let der = world.text("ca.der");
        openssl(&["x509", "-in", &trust, "-outform", "der", "-out", &der]);
        channel(&world);
        let broker = Secure::start(kind, &world, None);
        publish(&world, &broker.server.url());
        let refuse = |url: &str, ca: &str, why: &str| {
            let lines = update(&world, url, json!({"ca": ca}));
            let lost = &lines[lines.len() - 2]["lost"];
            let said = lost[0].as_str().unwrap();
            assert!(
                said.starts_with("the broker cannot be trusted: ") && said.contains(why),
                "{kind:?} {said}"
            );
            assert!(lost[1].as_str().unwrap().contains("is `ca` the CA that made its certificate"));
            assert!(files(&world).is_empty());
        };
        let url = broker.url("localhost");
        refuse(&url, &world.text("other.pem"), "not correctly signed by the trusted CA");
        refuse(&broker.url("127.0.0.1"), &trust, "does not match");
        assert_eq!(result(&update(&world, &url, json!({"ca": der}))), idle());
        assert_eq!(files(&world), expected(&world));
        drop(broker);

        // One that wants to know in turn.
        let broker = Secure::start(kind, &world, Some(&trust));
        let url = broker.url("localhost");
        let lines = update(&world, &url, json!({"ca": trust}));
        assert_eq!(result(&lines).0, "lost", "{kind:?}");
        let shows = json!({"ca": trust, "cert": world.text("board.pem"), "key": world.text("board.key")});
        if kind == Kind::Mosquitto {
            // It kept nothing, so this is another release 1.
            fs::remove_dir_all(world.path("root")).unwrap();
            publish(&world, &broker.server.url());
        }
        assert_eq!(result(&update(&world, &url, shows)).0, "idle");
        drop(broker);

        ca.server(&world, "broker", &["localhost"], Validity::Past);
        let broker = Secure::start(kind, &world, None);
        fs::remove_dir_all(world.path("root")).unwrap();
        refuse(&broker.url("localhost"), &trust, "expired");
    }
}

/// A line to a broker that lets each connection live for a number of bytes, either way, that `life` says.
pub(crate) fn cutting_line(target: SocketAddr, mut life: impl FnMut() -> u64 + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(broker)) = (client, TcpStream::connect(target)) else { return };
            let left = Arc::new(Mutex::new(life()));
            for (from, to) in [(&client, &broker), (&broker, &client)] {
                let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                let left = left.clone();
                thread::spawn(move || {
                    let mut buffer = [0; 4096];
                    while let Ok(count @ 1..) = from.read(&mut buffer) {
                        let pass = {
                            let mut left = left.lock().unwrap();
                            let pass = (*left).min(count as u64);
                            *left -= pass;
                            pass as usize
                        };
                        if to.write_all(&buffer[..pass]).is_err() || pass < count {
                            break;
                        }
                    }
                    from.shutdown(std::net::Shutdown::Both).ok();
                    to.shutdown(std::net::Shutdown::Both).ok();
                });
            }
        }
    });
    address
}

#[test]
fn two_hundred_boards_on_lines_that_break_at_random_bytes_converge() {
    let world = World::new();
    let server = Server::start(&world);
    world.write("dev/src/main.py", "import blink\n");
    world.write("dev/src/big.bin", [3, 1, 4, 1, 5].repeat(1000));
    world.write("dev/wheels/blink/pyproject.toml", "[project]\nname = \"blink\"\nversion = \"1.0.0\"\n");
    world.write("dev/wheels/blink/blink/__init__.py", "X = 1\n".repeat(200));
    publish(&world, &server.url());
    // Two at a time; every fourth life is long enough for anything.
    let halves = [0, 100].map(|first| {
        let mut random = fastrand::Rng::with_seed(first);
        let address = cutting_line(server.address, move || match random.u8(0..4) {
            0 => u64::MAX,
            _ => random.u64(0..12_000),
        });
        let root = world.path(&format!("boards-{first}"));
        fs::create_dir(&root).unwrap();
        let options = json!({
            "server": format!("mqtt://{address}"), "root": root, "first": first, "last": first + 100,
            "limits": {"RETRY_FIRST": 1, "RETRY_MOST": 4, "NAP_MOST": 4, "LOOK": 20, "GOODBYE": 200},
        });
        let options = world.write(&format!("options-{first}.json"), options.to_string());
        let arguments = [&script("drops.py"), options.to_str().unwrap()];
        Running::start_with("micropython", &arguments, &[("MICROPYPATH", &path())])
    });
    let mut losses = 0;
    for half in halves {
        let lines = said(&half.wait().expect_code(0));
        assert_eq!(lines.len(), 100);
        assert!(lines.iter().all(|line| line["phase"] == "idle"), "{lines:?}");
        losses += lines.iter().map(|line| line["losses"].as_u64().unwrap()).sum::<u64>();
    }
    assert!(losses > 200, "the lines broke only {losses} times");
    let wanted = expected(&world);
    for seed in 0..200 {
        let mut found = world.files(&format!("boards-{}/{seed}", seed / 100 * 100));
        found.retain(|path, _| !path.contains(".dist-info/"));
        assert_eq!(found, wanted, "seed {seed}");
    }
}

/// A broker that answers each connection with the next of these scripts, once CONNECT has come, and then waits.
fn hostile_broker(scripts: Vec<Vec<u8>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for script in scripts {
            let (mut client, _) = listener.accept().unwrap();
            thread::spawn(move || {
                let mut buffer = [0; 1024];
                if client.read(&mut buffer).is_ok_and(|count| count > 0) {
                    client.write_all(&script).ok();
                    while client.read(&mut buffer).is_ok_and(|count| count > 0) {}
                }
            });
        }
    });
    address
}

/// Runs a small device against a hostile broker. Returns what became of each connection.
fn meet(world: &World, scripts: Vec<Vec<u8>>) -> Vec<String> {
    let times = scripts.len();
    let address = hostile_broker(scripts);
    fs::create_dir_all(world.path("root")).unwrap();
    let options = json!({
        "server": format!("mqtt://{address}"), "root": world.text("root"), "times": times,
        "limits": {"HANDSHAKE": 40, "READ": 40, "WRITE": 40, "FETCH_STALL": 40, "GOODBYE": 40, "NAP_MOST": 4, "LOOK": 10},
    });
    let options = world.write("options.json", options.to_string());
    let output = python(&["-X", "heapsize=256k", &script("strangers.py"), options.to_str().unwrap()]);
    let lines: Vec<String> =
        output.expect_code(0).stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), times);
    lines
}

const CONNACK: [u8; 4] = [0x20, 2, 0, 0];

/// A PUBLISH with this first byte, of this topic, with these bytes behind it, that says it is `more` bytes longer.
pub(crate) fn message(first: u8, topic: &str, behind: &[u8], more: usize) -> Vec<u8> {
    let mut packet = vec![first];
    let mut left = 2 + topic.len() + behind.len() + more;
    loop {
        packet.push((left & 0x7f) as u8 | if left > 0x7f { 0x80 } else { 0 });
        left >>= 7;
        if left == 0 {
            break;
        }
    }
    packet.extend((topic.len() as u16).to_be_bytes());
    packet.extend(topic.bytes());
    packet.extend(behind);
    packet
}

#[test]
fn a_hostile_broker_is_left_and_told_apart_from_a_silent_one() {
    let world = World::new();
    let after = |bytes: &[u8]| [&CONNACK[..], bytes].concat();
    let channel = "mpypi/channels/dev";
    let cases = [
        (vec![], "the broker does not answer as one"),
        (vec![0x20, 2, 0, 5], "the broker refused the connection: it wants another user name or password"),
        (vec![0x20, 2, 0, 77], "the broker refused the connection: it says 77"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "the broker sent a packet that MQTT does not know"),
        (vec![0x20], "the broker said nothing for"),
        (vec![0x20, 3, 0, 0, 0], "the broker sent a packet that MQTT does not know"),
        (vec![0x21, 2, 0, 0], "the broker sent a packet that MQTT does not know"),
        (after(&[0x30, 0xff, 0xff, 0xff, 0xff, 1]), "the broker sent a length that is none"),
        (
            after(&[0x30, 0xff, 0xff, 0xff, 0x7f]),
            "the broker sent a packet of 268435455 bytes, more than 16777216",
        ),
        (after(&[0x30, 0x80]), "the broker said nothing for"),
        (after(&message(0x34, channel, &[0, 1], 0)), "the broker sent a message at QoS 2"),
        (after(&message(0x36, channel, &[0, 1], 0)), "the broker sent a message at QoS 3"),
        (after(&message(0x32, channel, &[0, 0], 0)), "the broker sent a message at QoS 1 without a number"),
        (after(&[0x30, 1, 0]), "the broker sent a message without a topic"),
        (after(&message(0x30, "", b"x", 0)), "the broker sent a message with a topic that is none"),
        (
            after(&message(0x30, &"t".repeat(2000), b"x", 0)),
            "the broker sent a message with a topic that is none",
        ),
        (after(&[0x30, 4, 0, 9, b'a', b'b']), "the broker sent a message with a topic that is none"),
        (after(&[0x30, 5, 0, 2, 0xff, 0xfe, 1]), "the broker sent a topic that is not UTF-8"),
        (after(&[0x90, 2, 0, 1]), "the broker sent a packet that MQTT does not know"),
        (after(&[0x90, 60]), "the broker sent a packet that MQTT does not know"),
        (after(&[0xc0, 0]), "the broker sent a packet that MQTT does not know"),
        (after(&[0x82, 3, 0, 1, 1]), "the broker sent a packet that MQTT does not know"),
        (after(&[]), "channel `dev` has no list"),
        // A list that ends in the middle; one that is larger than its limit, of which nothing comes.
        (after(&message(0x31, channel, b"[{\"type\":", 5)), "the broker said nothing for"),
        (after(&message(0x31, channel, b"[", 2 << 20)), "failed: bad-list: a list of 2097153"),
        (after(&message(0x31, channel, &vec![b'['; 1 << 20], 0)), "failed: bad-list: "),
        (
            after(&message(0x31, channel, &vec![b'['; (1 << 20) + 1], 0)),
            "failed: bad-list: a list of 1048577",
        ),
        (
            after(&message(0x31, channel, &[b"[\"", &[b'a'; 1 << 20][..1 << 19]].concat(), 0)),
            "failed: bad-list: ",
        ),
        (
            after(&message(0x31, channel, format!("[{}1]", "{},".repeat(9000)).as_bytes(), 0)),
            "failed: bad-list: ",
        ),
        (
            after(&message(
                0x31,
                channel,
                format!("[{}]", vec!["{\"type\":\"x\"}"; 9000].join(",")).as_bytes(),
                0,
            )),
            "failed: bad-list: more than 4096 entries",
        ),
        (after(&message(0x31, channel, b"[]", 0)), "idle: "),
    ];
    let lines = meet(&world, cases.iter().map(|(script, _)| script.clone()).collect());
    for (line, (script, wanted)) in lines.iter().zip(&cases) {
        assert!(
            line.starts_with(wanted),
            "{line} instead of {wanted} at {:?}",
            &script[..script.len().min(40)]
        );
    }
}

#[test]
fn hundreds_of_random_answers_never_stop_a_board() {
    let world = World::new();
    let mut random = fastrand::Rng::with_seed(7);
    let scripts = (0..300).map(|_| {
        let mut script = CONNACK.to_vec();
        for _ in 0..random.usize(1..6) {
            let mut bytes: Vec<u8> = (0..random.usize(0..200)).map(|_| random.u8(..)).collect();
            match random.u8(0..3) {
                0 => script.extend(bytes),
                kind => {
                    let topic = if kind == 1 { "mpypi/channels/dev" } else { "mpypi/nodes/board/cmd" };
                    if random.bool() {
                        // Nearly a list.
                        bytes = format!(r#"[{{"type":"src","path":"a","pkg_sha256":"{}"}}]"#, Digest::EMPTY)
                            .into();
                        let at = random.usize(0..bytes.len());
                        bytes[at] = random.u8(..);
                    }
                    script.extend(message(0x30 | random.u8(0..2), topic, &bytes, 0));
                }
            }
        }
        script
    });
    let lines = meet(&world, scripts.collect());
    let count = |start: &str| lines.iter().filter(|line| line.starts_with(start)).count();
    assert!(count("the broker sent ") > 30 && count("failed: bad-list: ") > 30, "{lines:?}");
    assert_eq!(count("bug"), 0);
}

/// A device that runs the agent in its own `lib`, started again and again as long as it restarts, from its boot.py on.
fn switched_on(world: &World, broker: &str) -> Vec<Value> {
    let options = options(world, broker, json!({"how": "check", "boot": true}));
    let own = format!(".frozen:{}", world.text("root/lib"));
    for _ in 0..12 {
        let output = micropython(&[&script("node.py"), &options], &[("MICROPYPATH", &own)]);
        let lines: Vec<Value> =
            output.stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        if lines.last().is_some_and(|last| last["phase"] != "restarting") {
            return lines;
        }
    }
    panic!("the board does not come to rest");
}

/// A channel that carries the agent, which says that it is this version.
fn carry_agent(world: &World, version: &str) {
    for (path, content) in files_in(&device("")) {
        let content = String::from_utf8(content).unwrap();
        world.write(&format!("dev/wheels/mpypi/{path}"), content.replace("0.1.0", version));
    }
}

fn files_in(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for name in ["pyproject.toml", "mpypi"] {
        let path = folder.join(name);
        if path.is_file() {
            files.insert(name.to_owned(), fs::read(path).unwrap());
            continue;
        }
        for item in fs::read_dir(path).unwrap() {
            let item = item.unwrap();
            let inner = format!("{name}/{}", item.file_name().to_str().unwrap());
            files.insert(inner, fs::read(item.path()).unwrap());
        }
    }
    files
}

#[test]
fn the_agent_updates_itself_and_comes_back_from_one_that_does_not_work() {
    let world = World::new();
    let server = Server::start(&world);
    let mut reader = Client::connect(server.address, "reader");
    let agent = |reader: &mut Client| info(reader).agent.unwrap();
    for (path, content) in files_in(&device("")) {
        world.write(&format!("root/lib/{path}"), content);
    }
    fs::remove_file(world.path("root/lib/pyproject.toml")).unwrap();
    carry_agent(&world, "0.1.0");
    publish(&world, &server.url());
    assert_eq!(result(&switched_on(&world, &server.url())), idle());
    assert_eq!(agent(&mut reader), "mpypi/0.1.0");

    carry_agent(&world, "0.2.0");
    publish(&world, &server.url());
    assert_eq!(result(&switched_on(&world, &server.url())), idle());
    assert_eq!(agent(&mut reader), "mpypi/0.2.0");
    let told = info(&mut reader).versions;
    assert_eq!(told, BTreeMap::from([("mpypi".to_owned(), "0.2.0".to_owned())]));

    carry_agent(&world, "0.3.0");
    world.write("dev/wheels/mpypi/mpypi/listen.py", "this is no Python");
    publish(&world, &server.url());
    assert_eq!(result(&switched_on(&world, &server.url())).0, "rolled_back");
    assert_eq!(agent(&mut reader), "mpypi/0.2.0");
    assert!(state(&mut reader).error.unwrap().starts_with("not-confirmed: "));

    // A release that does not carry the agent leaves it where it is.
    fs::remove_dir_all(world.path("dev/wheels/mpypi")).unwrap();
    world.write("dev/src/main.py", "print(4)\n");
    publish(&world, &server.url());
    assert_eq!(result(&switched_on(&world, &server.url())), idle());
    assert_eq!(result(&switched_on(&world, &server.url())), idle());
    assert_eq!(world.files("root")["main.py"], b"print(4)\n");
}

#[test]
fn an_application_in_asyncio_has_its_turn_while_the_agent_updates() {
    let world = World::new();
    let server = Server::start(&world);
    world.write("dev/src/big.bin", vec![7; 600_000]);
    publish(&world, &server.url());
    let mut options: Value =
        serde_json::from_str(&fs::read_to_string(options(&world, &server.url(), json!({}))).unwrap())
            .unwrap();
    for key in ["how", "limits"] {
        options.as_object_mut().unwrap().remove(key);
    }
    let options = world.write("options.json", options.to_string());
    for wanted in ["restarting", "idle"] {
        let output = python(&[&script("beside.py"), options.to_str().unwrap()]).expect_code(0);
        let said: Value = serde_json::from_str(output.stdout.trim()).unwrap();
        assert_eq!(said["phase"], wanted);
        if wanted == "restarting" {
            let turns = said["turns"]["downloading"].as_u64().unwrap();
            // An agent that gives it none leaves it one or two.
            assert!(turns >= 5, "{said}");
        }
    }
}

#[test]
fn the_agent_keeps_to_the_golden_vectors() {
    let world = World::new();
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/vectors");
    let arguments = [script("vectors.py"), vectors.to_str().unwrap().to_owned(), world.text("scratch")];
    let output = python(&arguments.each_ref().map(String::as_str)).expect_code(0).stdout;
    assert!(output.trim().parse::<u32>().is_ok_and(|cases| cases > 300), "{output}");
}

/// A server of the files below a folder, as mip wants one.
fn serve_files(folder: PathBuf) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                client.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            let request = String::from_utf8(request).unwrap();
            let content = fs::read(folder.join(request.split(' ').nth(1).unwrap().trim_start_matches('/')));
            let status = if content.is_ok() { "200 OK" } else { "404 Not Found" };
            write!(client, "HTTP/1.0 {status}\r\n\r\n").unwrap();
            client.write_all(&content.unwrap_or_default()).unwrap();
        }
    });
    address
}

#[test]
fn mip_installs_the_agent() {
    let world = World::new();
    let address = serve_files(device(""));
    let target = world.text("lib");
    let code = format!("import mip; mip.install('http://{address}/package.json', target='{target}')");
    let _ = python(&["-c", &code]).expect_code(0);
    let mut wanted = files_in(&device(""));
    wanted.remove("pyproject.toml");
    assert_eq!(world.files("lib"), wanted);
    let package: Value = serde_json::from_slice(&fs::read(device("package.json")).unwrap()).unwrap();
    let project = fs::read_to_string(device("pyproject.toml")).unwrap();
    let module = fs::read_to_string(device("mpypi/__init__.py")).unwrap();
    let version = package["version"].as_str().unwrap();
    assert!(project.contains(&format!("\nversion = \"{version}\"\n")));
    assert!(module.contains(&format!("\n__version__ = \"{version}\"\n")));
}

#[test]
fn mpremote_installs_the_agent_as_the_readme_says_and_it_updates() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world);
    publish(&world, &server.url());
    fs::create_dir(world.path("root")).unwrap();
    let [board, tool] = ["micropython", "mpremote"].map(|name| peer(name).to_str().unwrap().to_owned());
    let (root, package) = (world.text("root"), device("package.json").to_str().unwrap().to_owned());
    let mut arguments = vec![&*board, &tool, &root];
    // A serial line, MicroPython behind it.
    let script = script("serial.py");
    arguments.insert(0, &script);
    arguments.extend(["fs", "mkdir", ":lib", "+", "mip", "install", "--target=lib", &package]);
    let output = Command::new("python3").args(&arguments).output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(result(&switched_on(&world, &server.url())), idle());
    let mut found = files(&world);
    found.retain(|path, _| !path.starts_with("lib/mpypi/"));
    assert_eq!(found, expected(&world));
}

/// The agent as an installation for small boards has it: precompiled.
pub(crate) fn compiled(world: &World) -> String {
    for item in fs::read_dir(device("mpypi")).unwrap() {
        let path = item.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let target = world.write(&format!("compiled/mpypi/{}", name.replace(".py", ".mpy")), "");
        let arguments = [
            "-O3",
            "-s",
            name.trim_end_matches(".py"),
            path.to_str().unwrap(),
            "-o",
            target.to_str().unwrap(),
        ];
        let _ = run("mpy-cross", &arguments).expect_code(0);
    }
    world.text("compiled")
}

/// A channel with one package of 1 MiB: a file, or a wheel of sixteen of a kind that deflate makes smaller.
fn mebibyte(world: &World, wheel: bool) {
    let mut random = fastrand::Rng::with_seed(9);
    let mut bytes = |count: usize| -> Vec<u8> { (0..count).map(|_| random.u8(0..=255)).collect() };
    if !wheel {
        world.write("dev/src/big.bin", bytes(1 << 20));
        return;
    }
    world.write("dev/wheels/big/pyproject.toml", "[project]\nname = \"big\"\nversion = \"1\"\n");
    for n in 0..16 {
        let part = [bytes(64 << 10), b"and this is what deflate likes\n".repeat(200)].concat();
        world.write(&format!("dev/wheels/big/big/part{n}.bin"), part);
    }
}

/// Runs a device with a heap of this size until it is idle; `more` goes to its script. Returns all that it said.
pub(crate) fn small(path: &str, heap: &str, arguments: &[&str]) -> String {
    let path = format!(".frozen:{path}");
    let heap = format!("heapsize={heap}");
    let script = script("small.py");
    let arguments = [&["-X", &heap, &script], arguments].concat();
    let mut said = String::new();
    for _ in 0..3 {
        let output = micropython(&arguments, &[("MICROPYPATH", &path)]);
        said += &output.stdout;
        if output.code != Some(7) {
            assert_eq!(output.code, Some(0), "{said}{}", output.stderr);
            assert!(said.ends_with("idle\n"), "{said}");
            return said;
        }
    }
    panic!("{said}");
}

#[test]
fn a_mebibyte_fits_through_a_heap_of_64_kib() {
    for wheel in [false, true] {
        let world = World::new();
        let server = Server::start(&world);
        mebibyte(&world, wheel);
        publish(&world, &server.url());
        fs::create_dir(world.path("root")).unwrap();
        let said = small(&compiled(&world), "64k", &[&server.url(), &world.text("root"), "-", "-"]);
        // Not at the second or third try.
        assert!(!said.contains("no-memory"), "{said}");
        let sent = if wheel { "dev/wheels/big/big" } else { "dev/src" };
        let below = if wheel { "root/lib/big" } else { "root" };
        assert_eq!(world.files(below), world.files(sent));
    }
}

#[test]
fn a_signed_mebibyte_fits_by_tls_through_a_heap_of_96_kib_and_takes_16_kib_of_it() {
    for wheel in [false, true] {
        let world = World::new();
        let ca = Authority::new(&world, "ca");
        ca.server(&world, "broker", &["localhost"], Validity::Now);
        let broker = Secure::start(Kind::Ours, &world, None);
        mebibyte(&world, wheel);
        publish(&world, &broker.server.url());
        let (name, modulus) = signing_key(&world, "dev-2026");
        world.write("keys.json", json!({&name: modulus}).to_string());
        let mut client = Client::connect(broker.server.address, "publisher");
        let list = client.retained("mpypi/channels/dev").unwrap().payload;
        let mut list: Vec<Value> = serde_json::from_slice(&list).unwrap();
        list[0]["sequence"] = json!(2);
        assert!(client.retain("mpypi/channels/dev", signed(&world, &list, &name, &name).as_bytes()));
        let path = compiled(&world);
        let url = broker.url("localhost");
        for measure in [false, true] {
            let root = world.text(if measure { "measured" } else { "root" });
            fs::create_dir(&root).unwrap();
            let mut arguments = vec![&*url, &root, ca.pem(&world).leak(), world.text("keys.json").leak()];
            if measure {
                arguments.push("heap");
            }
            let said = small(&path, if measure { "256k" } else { "96k" }, &arguments);
            assert!(!said.contains("no-memory"), "{said}");
            if let Some(line) = said.lines().find(|line| line.starts_with("heap ")) {
                let numbers: Vec<u64> = line.split(' ').filter_map(|part| part.parse().ok()).collect();
                let [start, peak] = numbers[..] else { panic!("{line}") };
                assert!(peak - start <= 16 << 10, "{line}: {} bytes", peak - start);
                println!("{line}: {} bytes", peak - start);
            }
        }
    }
}

#[test]
fn a_board_sends_pings_and_leaves_a_broker_that_does_not_answer_them() {
    let world = World::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let limits =
        json!({"KEEP_ALIVE": 1, "PONG": 50, "RECONNECT_FIRST": 10, "RECONNECT_MOST": 20, "LOOK": 20});
    let url = format!("mqtt://{}", listener.local_addr().unwrap());
    let node = start(&world, &url, json!({"how": "run", "limits": limits}));
    let connection = |answers: usize| {
        let (mut client, _) = listener.accept().unwrap();
        client.set_read_timeout(Some(mpypi_tests::PATIENCE)).unwrap();
        client.write_all(&CONNACK).unwrap();
        let (mut pings, mut byte) = (0, [0]);
        let mut last = 1;
        while client.read(&mut byte).unwrap() > 0 {
            if (last, byte[0]) == (0xc0, 0) {
                pings += 1;
                if pings <= answers {
                    client.write_all(&[0xd0, 0]).unwrap();
                }
            }
            last = byte[0];
        }
        pings
    };
    // It goes on as long as it is answered, and comes back.
    assert_eq!(connection(1), 2);
    assert_eq!(connection(0), 1);
    drop(node);
}
