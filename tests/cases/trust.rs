//! Who may release: every attack of TUF 1.0, 1.5.2, and of the Uptane Standard, 4.2 and 4.3, against the Rust agent, with a
//! broker in the attacker's hands (mosquitto, which retains whatever it is given); and what our broker refuses at its door.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use mpypi_protocol::{
    ChannelName, Digest, KeyId, PackageId, Root, Trust, UpdateList,
    key::Algorithm,
    list::Signature,
    node::State,
    root::{Delegation, Draft, SignedRoot, topic},
    signed::{join, signature},
};
use mpypi_publisher::keys::{Keys, secret::Secret};
use mpypi_tests::{Client, Output, Server, World, run, run_with};
use serde_json::Value;

const PASSPHRASE: &str = "correct horse";
const CREATED: &str = "2026-11-01T10:00:00Z";
const FAR: &str = "2126-11-01T10:00:00Z";

/// A channel that one key signs, under a root of which two of three keys suffice; a broker that belongs to the attacker, and
/// a device that has release 1.
struct Trial {
    world: World,
    server: Server,
    attacker: Client,
    keys: Keys,
}

fn id(name: &str) -> KeyId {
    KeyId::new(name).unwrap()
}

fn channel() -> ChannelName {
    ChannelName::new("dev").unwrap()
}

impl Trial {
    fn new() -> Trial {
        let world = World::new();
        let server = Server::mosquitto(&world);
        Trial::on(world, server)
    }

    fn on(world: World, server: Server) -> Trial {
        let passphrase = world.write("passphrase", PASSPHRASE);
        let keys = Keys::new(world.path("keys"), Some(passphrase));
        for name in ["r1", "r2", "r3", "dev-2026", "dev-2027", "stable-2026"] {
            // Devices of this kind know them; RSA is shown with those that need it, it takes long to make.
            keys.make(&id(name), Algorithm::Ed25519).unwrap();
        }
        let attacker = Client::connect(server.address, "attacker");
        let mut trial = Trial { world, server, attacker, keys };
        let root = trial.root(1, |_| {}, &["r1", "r2"]);
        trial.keys.write_root(&root).unwrap();
        trial.world.write("root.json", root.payload());
        assert!(trial.retain(&topic(1), root.payload()));
        trial.world.write("dev/src/main.py", "print(1)\n");
        trial.world.write("dev/src/helper.py", "# one\n");
        trial.world.write("dev/channel.toml", "key = \"dev-2026\"\n");
        trial.publish().expect_code(0);
        trial
    }

    fn retain(&mut self, topic: &str, payload: &[u8]) -> bool {
        self.attacker.retain(topic, payload)
    }

    fn secret(&self, name: &str) -> Secret {
        let pem = fs::read_to_string(self.keys.folder().join(format!("{name}.pem"))).unwrap();
        Secret::unlock(&pem, PASSPHRASE).unwrap()
    }

    fn signature(&self, name: &str, covered: &[u8]) -> Signature {
        let bytes = self.secret(name).sign(covered).unwrap();
        signature(&id(name), Algorithm::Ed25519, &bytes)
    }

    /// Root `version` with a change, signed by some.
    fn root(&self, version: u64, change: impl FnOnce(&mut Draft), signers: &[&str]) -> SignedRoot {
        let public = |name: &&str| (id(name), self.keys.key(&id(name)).unwrap().public);
        let delegation =
            |key: &str| Delegation { keys: vec![id(key)], epoch: 0, expires: FAR.parse().unwrap() };
        let mut draft = Draft {
            version,
            created: CREATED.parse().unwrap(),
            expires: FAR.parse().unwrap(),
            threshold: 2,
            root_keys: ["r1", "r2", "r3"].map(id).to_vec(),
            keys: ["r1", "r2", "r3", "dev-2026", "dev-2027", "stable-2026"].iter().map(public).collect(),
            delegations: BTreeMap::from([
                ("dev".parse().unwrap(), delegation("dev-2026")),
                ("stable".parse().unwrap(), delegation("stable-2026")),
            ]),
        };
        change(&mut draft);
        let covered = draft.covered().unwrap();
        let signatures: Vec<_> = signers.iter().map(|name| self.signature(name, &covered)).collect();
        draft.signed(&signatures).unwrap()
    }

    /// A list with these entries behind its release, signed.
    fn list(&self, sequence: u64, more: &str, entries: &str, signer: Option<&str>) -> Vec<u8> {
        let entries = if entries.is_empty() { String::new() } else { format!(",{entries}") };
        let created = match more.contains(r#""created""#) {
            true => String::new(),
            false => format!(r#","created":"{CREATED}""#),
        };
        let covered = format!(
            r#"[{{"type":"release","channel":"dev","sequence":{sequence},"version":"{sequence}"{created}{more}}}{entries}"#
        );
        let signatures = signer.map(|name| self.signature(name, covered.as_bytes()));
        join(covered.as_bytes(), signatures.as_slice())
    }

    fn publish(&self) -> Output {
        self.publish_to(&self.server.url(), &[])
    }

    fn publish_to(&self, broker: &str, more: &[&str]) -> Output {
        let arguments = ["publish", &self.world.text("dev"), "--broker", broker, "--json"];
        run(
            "mpypi",
            &[&arguments[..], &self.folder(), more].concat().iter().map(|s| &**s).collect::<Vec<_>>(),
        )
    }

    fn folder(&self) -> [&'static str; 4] {
        // Leaked: a test is short.
        let text = |name: &str| -> &'static str { Box::leak(self.world.text(name).into_boxed_str()) };
        ["--keys", text("keys"), "--passphrase-file", text("passphrase")]
    }

    fn mpypi(&self, arguments: &[&str]) -> Output {
        let url = self.server.url();
        run("mpypi", &[arguments, &["--broker", &url], &self.folder()].concat())
    }

    /// Lets the device run until it has installed or refused what it is given.
    fn device(&self) -> Output {
        let (pin, root, url) = (self.world.text("root.json"), self.world.text("device"), self.server.url());
        let arguments = ["run", "--pin", &pin, "--root", &root, "--node", "kitchen", "--broker", &url];
        run("mpypi-agent", &[&arguments[..], &["--once", "--confirm-after", "20ms", "--json"]].concat())
    }

    /// The device takes what there is.
    #[track_caller]
    fn takes(&self) {
        self.device().expect_code(0);
    }

    /// The device refuses what there is for this reason, and keeps what it has.
    #[track_caller]
    fn refuses(&mut self, word: &str) {
        let before = self.files();
        let output = self.device().expect_code(3);
        let state = self.state();
        let error = state.error.unwrap_or_default();
        assert_eq!(error.split(':').next(), Some(word), "{error}\n{}", output.stderr);
        assert_eq!(self.files(), before);
    }

    fn state(&mut self) -> State {
        State::parse(&self.attacker.retained("mpypi/nodes/kitchen/state").unwrap().payload).unwrap()
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        self.world.files("device")
    }

    /// What the channel retains.
    fn present(&mut self) -> Vec<u8> {
        self.attacker.retained("mpypi/channels/dev").unwrap().payload.to_vec()
    }

    /// The next release, published by those who may.
    fn next_release(&self, text: &str) {
        self.world.write("dev/src/main.py", text);
        self.publish().expect_code(0);
    }

    /// Goes on to the next root, as those who may.
    fn go_on(&mut self, root: &SignedRoot) {
        self.keys.write_root(root).unwrap();
        assert!(self.retain(&topic(root.draft().version), root.payload()));
    }
}

fn src(path: &str, content: &[u8]) -> String {
    let digest = Digest::of(content);
    format!(r#"{{"type":"src","path":"{path}","pkg_sha256":"{digest}","size":{}}}"#, content.len())
}

fn package(path: &str, content: &[u8]) -> String {
    PackageId::Src(path.parse().unwrap(), Digest::of(content)).topic()
}

/// TUF 1.0, 1.5.2: arbitrary software installation.
#[test]
fn arbitrary_software_is_not_installed() {
    let mut trial = Trial::new();
    trial.takes();
    let evil = b"import os\n";
    trial.retain(&package("main.py", evil), evil);
    for (signer, word) in
        [(None, "unsigned"), (Some("stable-2026"), "unknown-key"), (Some("r1"), "unknown-key")]
    {
        let list = trial.list(2, "", &src("main.py", evil), signer);
        trial.retain("mpypi/channels/dev", &list);
        trial.refuses(word);
    }
    // Their own key, under the name of one that is believed.
    let list = trial.list(2, "", &src("main.py", evil), Some("stable-2026"));
    let text = String::from_utf8(list).unwrap().replace("stable-2026", "dev-2026");
    trial.retain("mpypi/channels/dev", text.as_bytes());
    trial.refuses("bad-signature");
    // The right list, and other bytes where a package of it should be.
    trial.world.write("dev/src/new.py", "good = 1\n");
    let list = trial.list(2, "", &src("new.py", b"good = 1\n"), Some("dev-2026"));
    trial.retain(&package("new.py", b"good = 1\n"), b"evil = 1\n");
    trial.retain("mpypi/channels/dev", &list);
    trial.refuses("wrong-hash");
}

/// TUF 1.0, 1.5.2: endless data.
#[test]
fn endless_data_ends_at_what_was_signed() {
    let mut trial = Trial::new();
    trial.takes();
    let list = trial.list(2, "", &src("main.py", b"print(2)\n"), Some("dev-2026"));
    trial.retain(&package("main.py", b"print(2)\n"), &vec![b'#'; 3 << 20]);
    trial.retain("mpypi/channels/dev", &list);
    trial.refuses("wrong-size");
    let padding = format!(r#"{{"type":"note","text":"{}"}}"#, "x".repeat(2 << 20));
    let endless = trial.list(3, "", &padding, Some("dev-2026"));
    trial.retain("mpypi/channels/dev", &endless);
    trial.refuses("bad-list");
    // A root without an end, before a list that is in order.
    trial.retain(&topic(2), &vec![b'['; 1 << 20]);
    trial.world.write("dev/src/main.py", "print(4)\n");
    trial.publish_to(&trial.server.url(), &["--sequence", "4"]).expect_code(0);
    let output = trial.device().expect_code(0);
    assert!(output.stderr.contains("bad-root"), "{}", output.stderr);
}

/// TUF 1.0, 1.5.2: extraneous dependencies.
#[test]
fn extraneous_dependencies_are_not_installed() {
    let mut trial = Trial::new();
    trial.takes();
    let evil = b"spy = True\n";
    trial.retain(&package("spy.py", evil), evil);
    let text = String::from_utf8(trial.present()).unwrap();
    let with = text.replacen(r#"{"type":"src""#, &format!(r#"{},{{"type":"src""#, src("spy.py", evil)), 1);
    assert_ne!(with, text);
    trial.retain("mpypi/channels/dev", with.as_bytes());
    trial.refuses("bad-signature");
    // Behind the signature, nothing is read either.
    let behind = format!("{},{}]", text.strip_suffix(']').unwrap(), src("spy.py", evil));
    trial.retain("mpypi/channels/dev", behind.as_bytes());
    trial.refuses("bad-list");
    trial.retain("mpypi/channels/dev", text.as_bytes());
    trial.takes();
    assert!(!trial.files().contains_key("spy.py"));
}

/// TUF 1.0, 1.5.2: fast-forward, and vulnerability to key compromises; Uptane: compromise of one key. 5.3.11: a new root that
/// takes the key away and raises the epoch ends both.
#[test]
fn a_stolen_channel_key_can_do_harm_until_the_next_root_and_not_after() {
    let mut trial = Trial::new();
    trial.takes();
    // Without the key, no number helps.
    let text = String::from_utf8(trial.present()).unwrap();
    let forward = text.replace(r#""sequence":1"#, &format!(r#""sequence":{}"#, u64::MAX));
    trial.retain("mpypi/channels/dev", forward.as_bytes());
    trial.refuses("bad-signature");
    // With it, the device is theirs: nothing newer can ever come, and all that expires has.
    let evil = b"stolen = True\n";
    trial.retain(&package("main.py", evil), evil);
    let late = r#","created":"2099-12-31T00:00:00Z""#;
    let stolen = trial.list(u64::MAX, late, &src("main.py", evil), Some("dev-2026"));
    trial.retain("mpypi/channels/dev", &stolen);
    trial.takes();
    assert_eq!(trial.files()["main.py"], evil);

    let revoking = trial.root(
        2,
        |draft| {
            draft.keys.remove(&id("dev-2026"));
            let delegation = draft.delegations.get_mut(&"dev".parse().unwrap()).unwrap();
            (delegation.keys, delegation.epoch) = (vec![id("dev-2027")], 1);
        },
        &["r1", "r3"],
    );
    trial.go_on(&revoking);
    // What the thief signed is not even kept to: the state says so, and the next release comes through.
    trial.refuses("unknown-key");
    trial.world.write("dev/channel.toml", "key = \"dev-2027\"\n");
    trial.next_release("print('ours again')\n");
    trial.takes();
    assert_eq!(trial.files()["main.py"], b"print('ours again')\n");
    assert_eq!(trial.state().sequence, Some(1), "numbers begin anew in a new epoch");
    // The thief puts theirs back.
    trial.retain("mpypi/channels/dev", &stolen);
    trial.refuses("unknown-key");
}

/// TUF 1.0, 1.5.2: indefinite freeze.
#[test]
fn a_freeze_ends_at_the_expiry_of_the_list_of_the_delegation_and_of_the_root() {
    let mut trial = Trial::new();
    trial.takes();
    let past = r#","expires":"2026-11-02T00:00:00Z""#;
    let old = trial.list(2, past, &src("main.py", b"x"), Some("dev-2026"));
    trial.retain("mpypi/channels/dev", &old);
    trial.refuses("expired");
    let over: jiff::Timestamp = "2026-11-02T00:00:00Z".parse().unwrap();
    let delegation = trial.root(
        2,
        |draft| draft.delegations.values_mut().for_each(|delegation| delegation.expires = over),
        &["r1", "r2"],
    );
    trial.retain(&topic(2), delegation.payload());
    let list = trial.list(3, "", &src("main.py", b"x"), Some("dev-2026"));
    trial.retain("mpypi/channels/dev", &list);
    trial.refuses("expired-root");
    let root = trial.root(3, |draft| draft.expires = over, &["r1", "r2"]);
    trial.retain(&topic(3), root.payload());
    trial.refuses("expired-root");
    // 5.3.10: an expired root is walked over, only the last one's expiry counts.
    let renewed = trial.root(4, |_| {}, &["r1", "r2"]);
    trial.retain(&topic(4), renewed.payload());
    trial.retain(&package("main.py", b"x"), b"x");
    trial.takes();
}

/// TUF 1.0, 1.5.2: mix-and-match; Uptane: mixed bundles.
#[test]
fn parts_of_two_releases_do_not_mix() {
    let mut trial = Trial::new();
    let first = trial.present();
    trial.takes();
    trial.world.write("dev/src/helper.py", "# two\n");
    trial.next_release("print(2)\n");
    let second = trial.present();
    let end = |list: &[u8]| list.windows(20).rposition(|part| part == br#",{"type":"signature""#).unwrap();
    // The entries of one release with the signature of the other.
    for (entries, signature) in [(&first, &second), (&second, &first)] {
        let mixed = [&entries[..end(entries)], &signature[end(signature)..]].concat();
        trial.retain("mpypi/channels/dev", &mixed);
        trial.refuses("bad-signature");
    }
    // The right list, and the old bytes of one of its packages.
    trial.retain(&package("helper.py", b"# two\n"), b"# one\n");
    trial.retain("mpypi/channels/dev", &second);
    trial.refuses("wrong-hash");
}

/// TUF 1.0, 1.5.2: rollback, of lists and of roots.
#[test]
fn a_release_and_a_root_that_were_replaced_do_not_come_back() {
    let mut trial = Trial::new();
    let first = trial.present();
    trial.takes();
    trial.next_release("print(2)\n");
    trial.takes();
    trial.retain("mpypi/channels/dev", &first);
    trial.refuses("rollback");
    // Another list under the number that was seen, signed by somebody who had the key then.
    let other = trial.list(2, "", &src("main.py", b"print(1)\n"), Some("dev-2026"));
    trial.retain("mpypi/channels/dev", &other);
    trial.refuses("rollback");
    // A root as the next one that says what the first one did, signed by enough of them: but it is root 1.
    let rotated =
        trial.root(2, |draft| drop(draft.delegations.remove(&"dev".parse().unwrap())), &["r1", "r2"]);
    trial.go_on(&rotated);
    trial.refuses("unknown-key");
    let old = fs::read(trial.world.path("root.json")).unwrap();
    trial.retain(&topic(3), &old);
    let output = trial.device().expect_code(3);
    assert!(output.stderr.contains("bad-root"), "{}", output.stderr);
    // Roots 2 and up are taken away: the device knows what it has seen.
    for version in [2, 3] {
        trial.retain(&topic(version), b"");
    }
    trial.refuses("unknown-key");
}

/// TUF 1.0, 1.5.2: slow retrieval; Uptane: slow retrieval. Nothing waits for ever, and what is not all there changes nothing.
#[test]
fn what_comes_too_slowly_is_given_up_and_the_old_release_runs_on() {
    let mut trial = Trial::new();
    trial.takes();
    // The packages never come: the broker has them, and says nothing.
    let list = trial.list(2, "", &src("never.py", b"never\n"), Some("dev-2026"));
    trial.retain("mpypi/channels/dev", &list);
    let before = trial.files();
    let (pin, folder, url) = (trial.world.text("root.json"), trial.world.text("device"), trial.server.url());
    let arguments = ["run", "--pin", &pin, "--root", &folder, "--node", "kitchen", "--broker", &url];
    let device = mpypi_tests::Running::start("mpypi-agent", &arguments);
    let deadline = mpypi_tests::Deadline::new();
    loop {
        deadline.check("the device does not say that it waits");
        let state = trial.attacker.retained("mpypi/nodes/kitchen/state").map(|message| message.payload);
        let state = state.and_then(|payload| State::parse(&payload).ok());
        if state.is_some_and(|state| state.sequence == Some(2) && state.phase.to_string() == "downloading") {
            break;
        }
    }
    // Meanwhile the honest publisher is heard.
    trial.world.write("dev/src/main.py", "print(3)\n");
    trial.publish().expect_code(0);
    loop {
        deadline.check("the device does not go on");
        let state = trial.attacker.retained("mpypi/nodes/kitchen/state").map(|message| message.payload);
        let state = state.and_then(|payload| State::parse(&payload).ok()).unwrap();
        if state.sequence == Some(3) && state.phase.to_string() == "idle" {
            break;
        }
    }
    device.signal("-TERM");
    assert_eq!(device.wait().code, Some(0));
    assert_ne!(trial.files(), before);
    assert!(!trial.files().contains_key("never.py"));
}

/// TUF 1.0, 1.5.2: wrong software installation; Uptane: arbitrary software on the wrong ECU.
#[test]
fn what_was_signed_for_others_is_not_installed() {
    let mut trial = Trial::new();
    trial.takes();
    let wheel = format!(
        r#"{{"type":"wheel","name":"blink","version":"1","pkg_sha256":"{}","size":3,"tag":"mpy6_3-xtensawin-esp32"}}"#,
        Digest::of(b"xyz")
    );
    let list = trial.list(2, "", &wheel, Some("dev-2026"));
    trial.retain("mpypi/channels/dev", &list);
    trial.refuses("no-fit");
    // What is meant for another channel, signed by the key of that channel, and by one that may sign for both.
    let stable = String::from_utf8(trial.list(3, "", "", None)).unwrap().replace("dev", "stable");
    let covered = stable.strip_suffix(']').unwrap();
    for (signer, word) in [("stable-2026", "unknown-key"), ("dev-2026", "wrong-channel")] {
        let list = join(covered.as_bytes(), &[trial.signature(signer, covered.as_bytes())]);
        trial.retain("mpypi/channels/dev", &list);
        trial.refuses(word);
    }
}

/// Uptane: partial bundle installation.
#[test]
fn of_a_release_that_is_not_all_there_nothing_is_installed() {
    let mut trial = Trial::new();
    trial.takes();
    let (there, missing) = (b"there = 1\n", b"missing = 1\n");
    trial.retain(&package("a.py", there), there);
    let entries = format!("{},{}", src("a.py", there), src("b.py", missing));
    let list = trial.list(2, "", &entries, Some("dev-2026"));
    trial.retain("mpypi/channels/dev", &list);
    // A wrong package in the place of the missing one: waiting for it takes long, refusing it does not.
    trial.retain(&package("b.py", missing), there);
    trial.refuses("wrong-size");
    trial.retain(&package("b.py", missing), missing);
    trial.takes();
    assert_eq!(trial.files().keys().collect::<Vec<_>>(), ["a.py", "b.py"]);
}

/// Uptane: drop request. Who withholds a release, or clears the channel, changes nothing on the device; when it comes through,
/// it is installed.
#[test]
fn a_release_that_was_withheld_is_installed_when_it_comes_through() {
    let mut trial = Trial::new();
    trial.takes();
    let before = trial.files();
    trial.next_release("print(2)\n");
    let second = trial.present();
    trial.retain("mpypi/channels/dev", b"");
    // With nothing retained, the device waits; it is told to stop.
    let (pin, folder, url) = (trial.world.text("root.json"), trial.world.text("device"), trial.server.url());
    let arguments = ["run", "--pin", &pin, "--root", &folder, "--node", "kitchen", "--broker", &url];
    let device =
        mpypi_tests::Running::start("mpypi-agent", &[&arguments[..], &["--confirm-after", "20ms"]].concat());
    let deadline = mpypi_tests::Deadline::new();
    while trial.attacker.retained("mpypi/nodes/kitchen/online").is_none_or(|online| online.payload != b"1") {
        deadline.check("the device does not come online");
    }
    trial.retain("mpypi/channels/dev", b"[]");
    assert_eq!(trial.files(), before);
    trial.retain("mpypi/channels/dev", &second);
    while trial.state().sequence != Some(2) || trial.state().phase.to_string() != "idle" {
        deadline.check("the device does not take what came through");
    }
    device.signal("-TERM");
    // It refused `[]`, which nobody signed, and so did not apply all that it saw.
    assert_eq!(device.wait().code, Some(3));
    assert_eq!(trial.files()["main.py"], b"print(2)\n");
}

/// The history is chained: who changes, adds or takes away a list of it is found out.
#[test]
fn a_history_that_was_tampered_with_is_found_out() {
    let mut trial = Trial::new();
    trial.next_release("print(2)\n");
    trial.next_release("print(3)\n");
    let good = trial.mpypi(&["log", "dev", "--json"]).expect_code(0).json();
    let sequences: Vec<_> = good["lists"].as_array().unwrap().iter().map(|list| &list["sequence"]).collect();
    assert_eq!(sequences, [3, 2, 1]);
    assert_eq!(good["lists"][1]["signer"], "dev-2026");
    trial.mpypi(&["verify", "dev"]).expect_code(0);

    let history = |sequence: u64| format!("mpypi/channels/dev/history/{sequence}");
    let kept = trial.attacker.retained(&history(2)).unwrap().payload.to_vec();
    let text = String::from_utf8(kept.clone()).unwrap();
    // Changed, signed anew with a key that was stolen, and gone.
    let forged = trial.list(2, "", &src("main.py", b"print(2)\n"), Some("dev-2026"));
    for (payload, trouble) in [
        (text.replace("main.py", "boot.py").into_bytes(), "bad-signature"),
        (forged, "says that it replaced"),
        (Vec::new(), "says that it replaced"),
    ] {
        trial.retain(&history(2), &payload);
        for command in ["log", "verify"] {
            let output = trial.mpypi(&[command, "dev", "--json"]).expect_code(1);
            assert!(output.stdout.contains(trouble), "{command}: {}", output.stdout);
            assert_eq!(output.json()["good"], false);
        }
    }
    let changed = text.replace("main.py", "boot.py");
    trial.retain(&history(2), changed.as_bytes());
    let output = trial.mpypi(&["rollback", "dev", "--to", "2"]).expect_code(1);
    assert!(output.stderr.contains("bad-signature"), "{}", output.stderr);
    trial.retain(&history(2), &kept);
    trial.mpypi(&["verify", "dev"]).expect_code(0);
}

/// A rollback that is meant: the same packages under a new number, signed anew.
#[test]
fn a_deliberate_rollback_is_a_new_release_of_what_was() {
    for ours in [true, false] {
        let world = World::new();
        let server = if ours { Server::start(&world) } else { Server::mosquitto(&world) };
        let mut trial = Trial::on(world, server);
        trial.takes();
        trial.next_release("print('bad')\n");
        trial.takes();
        let outcome =
            trial.mpypi(&["rollback", "dev", "--to", "1", "--revoke", "--json"]).expect_code(0).json();
        assert_eq!((&outcome["sequence"], &outcome["of"]), (&3.into(), &1.into()));
        assert_eq!(outcome["revoked"], serde_json::json!([2]));
        trial.takes();
        assert_eq!(trial.files()["main.py"], b"print(1)\n");
        let list = UpdateList::parse(&trial.present()).unwrap();
        assert_eq!(list.release().unwrap().revoked, [2]);
        let missing = trial.mpypi(&["rollback", "dev", "--to", "7"]).expect_code(1);
        assert!(missing.stderr.contains("hint: it keeps 1, 2"), "{}", missing.stderr);
        let promoted = trial.mpypi(&["promote", "dev", "stable", "--json"]).expect_code(0).json();
        assert_eq!((&promoted["sequence"], &promoted["of"]), (&1.into(), &3.into()));
        trial.mpypi(&["verify", "stable"]).expect_code(0);
        trial.mpypi(&["log", "dev"]).expect_code(0);
    }
}

/// Each step of a rollout is a list of its own: signed, and only where what it says again was signed.
#[test]
fn each_step_of_a_rollout_is_signed_and_nothing_is_signed_that_nobody_signed() {
    let mut trial = Trial::new();
    let (pin, url) = (trial.world.text("root.json"), trial.server.url());
    let fleet = ["fleet", "--pin", &pin, "--broker", &url, "--nodes", "4", "--confirm-after", "20ms"];
    let _fleet = mpypi_tests::Running::start("mpypi-agent", &fleet);
    let deadline = mpypi_tests::Deadline::new();
    let runs = |attacker: &mut Client, sequence: u64| {
        (1..=4).all(|number| {
            let state = attacker.retained(&format!("mpypi/nodes/device-{number}/state"));
            let state = state.and_then(|message| State::parse(&message.payload).ok());
            state.is_some_and(|state| state.sequence == Some(sequence) && state.phase.to_string() == "idle")
        })
    };
    while !runs(&mut trial.attacker, 1) {
        deadline.check("the fleet does not start");
    }
    trial.world.write("dev/src/main.py", "print(2)\n");
    let folder = trial.world.text("dev");
    let outcome = trial.mpypi(&["rollout", &folder, "--steps", "50%,100%", "--wait", "1s", "--json"]);
    assert_eq!(outcome.expect_code(0).json()["status"], "done");
    let list = UpdateList::parse(&trial.present()).unwrap();
    let sequence = list.release().unwrap().sequence;
    assert!(sequence >= 4, "a list for nobody, for half, for all: {sequence}");
    while !runs(&mut trial.attacker, sequence) {
        deadline.check("the fleet does not take the release");
    }
    trial.mpypi(&["verify", "dev"]).expect_code(0);
    // The broker offers something else to be rolled out: it gets no signature.
    let forged = trial.list(sequence + 1, "", &src("main.py", b"evil"), Some("stable-2026"));
    trial.retain("mpypi/channels/dev", &forged);
    let output = trial.mpypi(&["rollout", "dev", "--steps", "100%", "--wait", "1s"]).expect_code(1);
    assert!(output.stderr.contains("is not signed again: unknown-key"), "{}", output.stderr);
    assert_eq!(trial.present(), forged);
}

#[test]
fn our_broker_refuses_at_its_door_what_devices_would_refuse() {
    let world = World::new();
    let server = Server::start(&world);
    let mut trial = Trial::on(world, server);
    let address = trial.server.address;
    // Refused means closed in MQTT 3.1.1.
    let refused = |topic: &str, payload: &[u8]| {
        assert!(!Client::connect(address, "someone").retain(topic, payload), "{topic}");
    };
    refused("mpypi/channels/dev", &trial.list(2, "", "", None));
    refused("mpypi/channels/dev", &trial.list(2, "", "", Some("stable-2026")));
    refused("mpypi/channels/dev", &trial.list(2, r#","epoch":1"#, "", Some("dev-2026")));
    refused(
        "mpypi/channels/stable",
        br#"[{"type":"release","channel":"stable","sequence":1,"version":"1"}]"#,
    );
    let first = trial.present();
    trial.next_release("print(2)\n");
    refused("mpypi/channels/dev", &first);
    // The past stays as it was.
    refused("mpypi/channels/dev/history/1", &trial.list(1, "", "", Some("dev-2026")));
    refused("mpypi/channels/dev/history/2", &trial.list(2, "", "", Some("dev-2026")));
    refused("mpypi/channels/dev/history/3", &first);
    // Roots follow from each other, and stay.
    refused(&topic(1), b"");
    refused(&topic(1), trial.root(1, |draft| draft.threshold = 1, &["r1", "r2"]).payload());
    refused(&topic(2), trial.root(2, |_| {}, &["r1"]).payload());
    refused(&topic(3), trial.root(3, |_| {}, &["r1", "r2"]).payload());
    refused(&topic(3), trial.root(2, |_| {}, &["r1", "r2"]).payload());
    // What is in order goes in, and after a restart it still counts.
    let second = trial.root(2, |draft| draft.threshold = 3, &["r1", "r2", "r3"]);
    assert!(trial.retain(&topic(2), second.payload()));
    let unsigned = run(
        "mpypi",
        &[
            "publish",
            &trial.world.text("dev"),
            "--broker",
            &trial.server.url(),
            "--channel",
            "stable",
            "--keys",
            &trial.world.text("no-keys"),
        ],
    );
    assert_eq!(unsigned.code, Some(1));
    assert!(unsigned.stderr.contains("there is no key `dev-2026`"), "{}", unsigned.stderr);
    let Trial { world, server, .. } = trial;
    assert_eq!(server.stop("-TERM"), Some(0));
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "someone");
    assert_eq!(client.retained(&topic(2)).unwrap().payload, second.payload());
    assert!(
        !client.retain(
            "mpypi/channels/dev",
            br#"[{"type":"release","channel":"dev","sequence":9,"version":"1"}]"#
        )
    );
}

#[test]
fn the_publisher_refuses_to_publish_what_devices_would_refuse() {
    let trial = Trial::new();
    let fails = |settings: &str, text: &str, hint: &str| {
        trial.world.write("dev/channel.toml", settings);
        trial.world.write("dev/src/main.py", settings);
        let output = trial.publish().expect_code(1);
        assert!(output.stderr.contains(text) && output.stderr.contains(hint), "{}", output.stderr);
    };
    fails("", "has keys: devices believe only lists that `dev-2026` signed", "`key = \"dev-2026\"`");
    fails(
        "key = \"stable-2026\"",
        "may not sign for channel `dev`",
        "mpypi keys delegate dev --key stable-2026",
    );
    fails("key = \"nobody\"", "there is no key `nobody`", "mpypi keys new nobody");
    trial.world.write("passphrase", "wrong");
    fails("key = \"dev-2026\"", "the passphrase does not open it", "MPYPI_KEY_PASSPHRASE");
    trial.world.write("passphrase", PASSPHRASE);
    trial.publish().expect_code(0);
}

fn openssl(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut child = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "openssl {arguments:?}");
    output.stdout
}

/// A channel that gets its keys after some releases: the first list that is signed says what it replaced, and so vouches for them.
#[test]
fn what_was_published_before_a_channel_had_keys_is_vouched_for_by_the_first_list_that_is_signed() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let (folder, keys, url) = (world.text("dev"), world.text("keys"), server.url());
    let mpypi = |arguments: &[&str]| {
        let whole = [arguments, &["--keys", &keys]].concat();
        run_with("mpypi", &whole, &[("MPYPI_KEY_PASSPHRASE", PASSPHRASE)])
    };
    let publish = |text: &str| {
        world.write("dev/src/main.py", text);
        let _ = mpypi(&["publish", &folder, "--broker", &url]).expect_code(0);
    };
    publish("print(1)\n");
    publish("print(2)\n");
    for arguments in [
        &["keys", "new", "r1", "--ed25519"][..],
        &["keys", "new", "dev-2026", "--ed25519"],
        &["keys", "root", "new", "--key", "r1"],
        &["keys", "delegate", "dev", "--key", "dev-2026"],
        &["keys", "root", "sign"],
        &["keys", "root", "publish", "--broker", &url],
    ] {
        let _ = mpypi(arguments).expect_code(0);
    }
    world.write("dev/channel.toml", "key = \"dev-2026\"\n");
    publish("print(3)\n");
    publish("print(4)\n");
    for look in ["verify", "log"] {
        let _ = mpypi(&[look, "dev", "--broker", &url]).expect_code(0);
    }
    // What somebody else put there is vouched for by nobody.
    let forged = r#"[{"type":"release","channel":"dev","sequence":2,"version":"2"}]"#;
    let mut attacker = Client::connect(server.address, "attacker");
    assert!(attacker.retain("mpypi/channels/dev/history/2", forged.as_bytes()));
    for look in ["verify", "log"] {
        let found = mpypi(&[look, "dev", "--broker", &url]).expect_code(1);
        assert!(found.stdout.contains("unsigned: "), "{found:?}");
    }
}

/// The whole of it, as people do it: two holders of root keys on two machines, a key of ours that openssl reads, and one
/// that openssl holds.
#[test]
fn keys_are_made_delegated_rotated_revoked_and_exported() {
    let world = World::new();
    let server = Server::start(&world);
    let keys = |folder: &str, arguments: &[&str]| {
        let folder = world.text(folder);
        let whole = [&["keys", "--keys", &folder], arguments].concat();
        run_with("mpypi", &whole, &[("MPYPI_KEY_PASSPHRASE", PASSPHRASE)])
    };
    // Two machines: each has its root key, and knows the other's public half.
    for (folder, own, other) in [("alice", "r1", "r2"), ("bob", "r2", "r1")] {
        keys(folder, &["new", own, "--ed25519"]).expect_code(0);
        let public = world.path(&format!("{folder}/{own}.pub"));
        world.write(&format!("public/{own}.pub"), fs::read(public).unwrap());
        let _ = other;
    }
    keys("alice", &["new", "r2", "--public", &world.text("public/r2.pub")]).expect_code(0);
    keys("bob", &["new", "r1", "--public", &world.text("public/r1.pub")]).expect_code(0);
    // The channel's key is RSA, and is held by openssl: the command is all that we have of it.
    openssl(
        &["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072", "-out", &world.text("dev.key")],
        b"",
    );
    openssl(&["pkey", "-in", &world.text("dev.key"), "-pubout", "-out", &world.text("dev.pub")], b"");
    let command = format!("openssl dgst -sha256 -sign {} | openssl base64", world.text("dev.key"));
    let adopt = ["new", "dev-2026", "--public", &world.text("dev.pub"), "--sign-command", &command];
    keys("alice", &adopt).expect_code(0);

    keys("alice", &["root", "new", "--key", "r1", "--key", "r2", "--threshold", "2"]).expect_code(0);
    keys("alice", &["delegate", "dev", "--key", "dev-2026"]).expect_code(0);
    let one = keys("alice", &["root", "sign"]).expect_code(0);
    assert!(one.stdout.contains("needs 1 more of `r2`"), "{}", one.stdout);
    let early = keys("alice", &["root", "publish", "--broker", &server.url()]).expect_code(1);
    assert!(early.stderr.contains("lacks signatures"), "{}", early.stderr);
    let carry = |from: &str, to: &str, version: u32| {
        let file = format!("root/{version}.json");
        world.write(&format!("{to}/{file}"), fs::read(world.path(&format!("{from}/{file}"))).unwrap());
    };
    carry("alice", "bob", 1);
    let two = keys("bob", &["root", "sign"]).expect_code(0);
    assert!(two.stdout.contains("root 1 is complete"), "{}", two.stdout);
    carry("bob", "alice", 1);
    keys("alice", &["root", "publish", "--broker", &server.url()]).expect_code(0);
    let pinned = keys("alice", &["export"]).expect_code(0).stdout;
    world.write("root.json", &pinned);

    world.write("dev/src/main.py", "print(1)\n");
    world.write("dev/channel.toml", "key = \"dev-2026\"\n");
    let publish = || {
        let (folder, alice) = (world.text("dev"), world.text("alice"));
        let arguments = ["publish", &folder, "--broker", &server.url(), "--keys", &alice, "--json"];
        run_with("mpypi", &arguments, &[("MPYPI_KEY_PASSPHRASE", PASSPHRASE)])
    };
    publish().expect_code(0);
    let device = || {
        let (pin, root, url) = (world.text("root.json"), world.text("device"), server.url());
        let arguments = ["run", "--pin", &pin, "--root", &root, "--node", "n", "--broker", &url];
        run("mpypi-agent", &[&arguments[..], &["--once", "--confirm-after", "20ms"]].concat())
    };
    device().expect_code(0);

    // A year later: a key of ours in its place, which openssl can read, too.
    keys("alice", &["rotate", "dev-2026", "dev-2027"]).expect_code(0);
    let private = world.text("alice/dev-2027.pem");
    assert!(fs::read_to_string(&private).unwrap().starts_with("-----BEGIN ENCRYPTED PRIVATE KEY-----"));
    let pass = format!("pass:{PASSPHRASE}");
    let read = openssl(&["pkey", "-in", &private, "-passin", &pass, "-pubout"], b"");
    assert_eq!(read, fs::read(world.path("alice/dev-2027.pub")).unwrap());
    keys("alice", &["root", "sign"]).expect_code(0);
    carry("alice", "bob", 2);
    keys("bob", &["root", "sign"]).expect_code(0);
    carry("bob", "alice", 2);
    keys("alice", &["root", "publish", "--broker", &server.url()]).expect_code(0);
    world.write("dev/src/main.py", "print(2)\n");
    let old = publish().expect_code(1);
    assert!(old.stderr.contains("root 2 lets `dev-2027` do so"), "{}", old.stderr);
    world.write("dev/channel.toml", "key = \"dev-2027\"\n");
    publish().expect_code(0);
    device().expect_code(0);

    // Stolen: everything that it signed is old.
    keys("alice", &["revoke", "dev-2027"]).expect_code(0);
    keys("alice", &["delegate", "dev", "--key", "dev-2026"]).expect_code(0);
    keys("alice", &["root", "sign"]).expect_code(0);
    carry("alice", "bob", 3);
    keys("bob", &["root", "sign", "r2"]).expect_code(0);
    carry("bob", "alice", 3);
    keys("alice", &["root", "publish", "--broker", &server.url()]).expect_code(0);
    let listed = keys("alice", &["list", "--json"]).expect_code(0).json();
    assert_eq!(listed["root"]["version"], 3);
    assert_eq!(listed["root"]["delegations"][0]["epoch"], 1);
    let of =
        |key: &str| listed["keys"].as_array().unwrap().iter().find(|one| one["key"] == key).unwrap().clone();
    assert_eq!((&of("dev-2026")["private"], &of("dev-2026")["signs"][0]), (&"command".into(), &"dev".into()));
    assert_eq!(
        (&of("r2")["private"], &of("dev-2027")["signs"]),
        (&"elsewhere".into(), &Value::Array(vec![]))
    );
    world.write("dev/channel.toml", "key = \"dev-2026\"\n");
    publish().expect_code(0);
    device().expect_code(0);
    let plain = keys("alice", &["export", "--plain", "dev-2026"]).expect_code(0).json();
    assert_eq!(plain["dev-2026"].as_str().unwrap().len(), 768);
}

/// Ten thousand changes of one signed list. Each is written to a file, so that others can be asked about the very same.
#[test]
fn of_ten_thousand_mutations_of_a_signed_list_none_is_believed_that_says_something_else() {
    let world = World::new();
    let keys = Keys::new(world.path("keys"), Some(world.write("passphrase", PASSPHRASE)));
    keys.make(&id("dev-2026"), Algorithm::Rsa3072).unwrap();
    keys.make(&id("r1"), Algorithm::Ed25519).unwrap();
    let sign = |name: &str, alg, covered: &[u8]| {
        let pem = fs::read_to_string(keys.folder().join(format!("{name}.pem"))).unwrap();
        let secret = Secret::unlock(&pem, PASSPHRASE).unwrap();
        signature(&id(name), alg, &secret.sign(covered).unwrap())
    };
    let public = |name: &str| (id(name), keys.key(&id(name)).unwrap().public);
    // Small devices know RSA alone, and so a root key of theirs, too.
    let draft = Draft {
        version: 1,
        created: CREATED.parse().unwrap(),
        expires: FAR.parse().unwrap(),
        threshold: 1,
        root_keys: vec![id("dev-2026")],
        keys: BTreeMap::from([public("dev-2026")]),
        delegations: BTreeMap::from([(
            "dev".parse().unwrap(),
            Delegation { keys: vec![id("dev-2026")], epoch: 0, expires: FAR.parse().unwrap() },
        )]),
    };
    let root = draft.signed(&[sign("dev-2026", Algorithm::Rsa3072, &draft.covered().unwrap())]).unwrap();
    let trust = Trust::Root(Root::pin(root.clone()).unwrap().into());
    let list = |sequence: u64, extra: &str| {
        let covered = format!(
            r#"[{{"type":"release","channel":"dev","sequence":{sequence},"version":"1.{sequence}","created":"{CREATED}"}},{},{}{extra}"#,
            src("main.py", format!("print({sequence})").as_bytes()),
            src("lib/größe.py", b"x = 1"),
        );
        join(covered.as_bytes(), &[sign("dev-2026", Algorithm::Rsa3072, covered.as_bytes())])
    };
    let signed = [list(42, ""), list(43, r#",{"type":"note","text":"a \"quoted\" \\ \u00e9"}"#)];
    let meaning: Vec<_> = signed.iter().map(|list| UpdateList::parse(list).unwrap()).collect();
    for list in &signed {
        trust.verify(&channel(), list, None).unwrap();
    }
    let digits: Vec<String> = (0..=255).map(|byte| format!("{byte:02x}")).collect();
    let mut rng = fastrand::Rng::with_seed(6);
    let mut lines = vec![
        serde_json::json!({ "root": String::from_utf8(root.payload().to_vec()).unwrap(), "channel": "dev" })
            .to_string(),
    ];
    let mut believed = 0;
    for number in 0..10_000 {
        let (kind, mutated) = mutate(&mut rng, &signed);
        let verdict = trust.verify(&channel(), &mutated, None);
        if let Ok(verified) = &verdict {
            believed += 1;
            // What is believed is one of the two that were signed, entry for entry, but for how its signature is written.
            let said = |list: &UpdateList| {
                let entries = list.entries().iter().filter(|entry| entry.kind() != "signature");
                entries.cloned().collect::<Vec<_>>()
            };
            let is_same = meaning.iter().any(|list| said(list) == said(verified.list()));
            let text = String::from_utf8_lossy(&mutated);
            assert!(is_same, "mutation {number} ({kind}) is believed: {text}");
            let end = mutated.windows(20).rposition(|part| part == br#",{"type":"signature""#).unwrap();
            let is_covered = signed.iter().any(|list| list.starts_with(&mutated[..end]));
            assert!(is_covered, "mutation {number} ({kind}) was never signed: {text}");
        }
        let hex: String = mutated.iter().map(|byte| &*digits[usize::from(*byte)]).collect();
        lines.push(serde_json::json!({ "kind": kind, "hex": hex, "believed": verdict.is_ok() }).to_string());
    }
    // Some changes are none: a member more in the signature's entry, an escape there. Most are.
    assert!((1..2_000).contains(&believed), "{believed}");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(folder).unwrap();
    let part = folder.join(format!("mutations.{}", std::process::id()));
    fs::write(&part, lines.join("\n") + "\n").unwrap();
    let path = folder.join("mutations.jsonl");
    fs::rename(part, &path).unwrap();
    // MicroPython says the same of every one.
    let words = crate::device_trust::words(&world, &path);
    assert_eq!(words.len(), lines.len() - 1);
    for (word, line) in words.iter().zip(&lines[1..]) {
        let is_believed = line.contains("\"believed\":true");
        assert_eq!(word == "believed", is_believed, "MicroPython says {word}: {line}");
    }
}

/// One change, and what kind of change it is.
fn mutate(rng: &mut fastrand::Rng, signed: &[Vec<u8>; 2]) -> (&'static str, Vec<u8>) {
    let list = &signed[rng.usize(..2)];
    let other = &signed[rng.usize(..2)];
    let end = |list: &[u8]| list.windows(20).rposition(|part| part == br#",{"type":"signature""#).unwrap();
    let at = rng.usize(..list.len());
    // Half of them in the end, where the signature is.
    let late = if rng.bool() { rng.usize(end(list)..list.len()) } else { at };
    let mut bytes = list.clone();
    // The entries, each with what separates it from the one before.
    let text = String::from_utf8(list.clone()).unwrap();
    let mut starts: Vec<_> = text.match_indices("{\"type\":").map(|(at, _)| at).collect();
    starts.push(text.len());
    let entries: Vec<&str> =
        starts.windows(2).map(|pair| text[pair[0]..pair[1]].trim_end_matches([',', ']'])).collect();
    let joined = |entries: &[&str]| format!("[{}]", entries.join(",")).into_bytes();
    match rng.u8(..14) {
        0 | 1 => {
            bytes[late] ^= 1 << rng.u8(..8);
            ("bit flip", bytes)
        }
        2 => {
            bytes.truncate(late);
            ("truncation", bytes)
        }
        3 => {
            bytes.remove(late);
            ("a byte left out", bytes)
        }
        4 => {
            bytes.insert(late, *rng.choice(b" \t\n,]}{[\"\\0a" as &[u8]).unwrap());
            ("a byte put in", bytes)
        }
        5 => {
            let cut = rng.usize(..other.len());
            ("splice", [&list[..at], &other[cut..]].concat())
        }
        6 => ("the signature of another list", [&list[..end(list)], &other[end(other)..]].concat()),
        7 => {
            // A member once more, before or behind.
            let keys = ["type", "sequence", "channel", "path", "pkg_sha256", "size", "key", "alg", "sig"];
            let key = keys[rng.usize(..keys.len())];
            let values =
                ["\"release\"", "\"signature\"", "43", "\"dev\"", "\"boot.py\"", "\"\"", "null", "[]"];
            let member = format!("\"{key}\":{}", values[rng.usize(..values.len())]);
            let all = starts.len() - 1;
            let start = starts[if rng.bool() { all - 1 } else { rng.usize(..all) }];
            let mut text = text.clone();
            match rng.bool() {
                true => text.insert_str(start + 1, &(member + ",")),
                false => {
                    let close = start + text[start..].find('}').unwrap();
                    text.insert_str(close, &format!(",{member}"));
                }
            }
            ("a member said twice", text.into_bytes())
        }
        8 => {
            let mut entries = entries.clone();
            rng.shuffle(&mut entries);
            ("entries in another order", joined(&entries))
        }
        9 => {
            let mut entries = entries.clone();
            let twice = entries[rng.usize(..entries.len())];
            entries.insert(rng.usize(..=entries.len()), twice);
            ("an entry twice", joined(&entries))
        }
        10 => {
            let mut entries = entries.clone();
            entries.remove(rng.usize(..entries.len()));
            ("an entry left out", joined(&entries))
        }
        11 => {
            let second = String::from_utf8(other[end(other) + 1..other.len() - 1].to_vec()).unwrap();
            let mut entries = entries.clone();
            entries.push(&second);
            ("a second signature", joined(&entries))
        }
        12 => {
            // A letter of a text as an escape: the same to a reader of JSON, and other bytes.
            let letters: Vec<usize> =
                (0..bytes.len()).filter(|at| bytes[*at].is_ascii_alphanumeric()).collect();
            let late: Vec<usize> = letters.iter().copied().filter(|at| *at > end(list)).collect();
            let from = if rng.bool() { &late } else { &letters };
            let at = from[rng.usize(..from.len())];
            let escape = format!("\\u{:04x}", bytes[at]);
            bytes.splice(at..=at, escape.into_bytes());
            ("an escape", bytes)
        }
        _ => {
            // Something is said about the list that nobody knows, in the signature's entry.
            let close = bytes.len() - 2;
            let more =
                [",\"x\":1", ",\"x\":[{\"y\":null}]", ",\"sequence\":43", ",\"x\":\"}]\"", " ", "\n", "]"];
            bytes.splice(close..close, more[rng.usize(..more.len())].bytes());
            ("more in the signature's entry", bytes)
        }
    }
}
