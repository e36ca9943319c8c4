//! The MicroPython agent and packages that come in chunks, against real brokers: installed as others are, checked one by
//! one, and fetched once, whatever comes in between.

use std::{
    fs,
    sync::{Arc, Mutex},
};

use mpypi_protocol::{Digest, node::Phase};
use mpypi_tests::{Authority, Client, Kind, Proxy, Secure, Server, Verdict, World, run};
use serde_json::{Value, json};

use crate::device::{
    await_state, compiled, cutting_line, files, idle, release, result, retain, said, script, signed,
    signing_key, small, src, start, state, update, wheel,
};

/// Bytes that nothing makes smaller.
fn random(seed: u64, count: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| random.u8(..)).collect()
}

/// The entry, its package in chunks of `size` bytes.
fn cut(mut entry: Value, content: &[u8], size: usize) -> Value {
    let digests: Vec<_> = content.chunks(size).map(Digest::of).collect();
    entry["chunks"] = json!({"size": size, "sha256": digests});
    entry
}

/// Where a chunk of the entry's package is retained.
fn topic(entry: &Value, number: usize) -> String {
    format!("mpypi/chunks/{}/{number}", entry["pkg_sha256"].as_str().unwrap())
}

/// Retains the chunks of a package.
fn retain_chunks(client: &mut Client, entry: &Value, content: &[u8]) {
    let size = usize::try_from(entry["chunks"]["size"].as_u64().unwrap()).unwrap();
    for (number, chunk) in content.chunks(size).enumerate() {
        assert!(client.retain(&topic(entry, number), chunk));
    }
}

/// The topics of a PUBLISH, SUBSCRIBE or UNSUBSCRIBE; of a SUBSCRIBE with the QoS asked for.
fn topics(packet: &[u8]) -> Vec<(String, u8)> {
    let mut rest = &packet[1..];
    while rest[0] & 0x80 != 0 {
        rest = &rest[1..];
    }
    rest = &rest[1..];
    let kind = packet[0] >> 4;
    let mut found = Vec::new();
    if kind == 3 || kind == 8 || kind == 10 {
        if kind != 3 {
            rest = &rest[2..];
        }
        while rest.len() > 2 {
            let (topic, more) = rest[2..].split_at(usize::from(rest[0]) << 8 | usize::from(rest[1]));
            found.push((String::from_utf8(topic.to_vec()).unwrap(), if kind == 8 { more[0] } else { 0 }));
            if kind == 3 {
                break;
            }
            rest = &more[usize::from(kind == 8)..];
        }
    }
    found
}

/// What is said of chunks on a line: who said it, the kind of packet, topic and QoS.
type Said = Arc<Mutex<Vec<(u8, String, u8)>>>;

/// A line to a broker, and what is said of chunks on it.
fn watched(server: &Server) -> (Proxy, Said) {
    let said = Said::default();
    let noted = said.clone();
    let proxy = Proxy::start(server.address, move |_, packet| {
        note(&noted, packet);
        Verdict::Pass
    });
    (proxy, said)
}

fn note(said: &Said, packet: &[u8]) {
    let of_chunks = topics(packet).into_iter().filter(|(topic, _)| topic.starts_with("mpypi/chunks/"));
    said.lock().unwrap().extend(of_chunks.map(|(topic, qos)| (packet[0] >> 4, topic, qos)));
}

/// Which topics packets of this kind named, since the last time.
fn named(said: &Said, kind: u8) -> Vec<String> {
    let said = said.lock().unwrap();
    said.iter().filter(|(found, ..)| *found == kind).map(|(_, topic, _)| topic.clone()).collect()
}

const PUBLISH: u8 = 3;
const SUBSCRIBE: u8 = 8;
const UNSUBSCRIBE: u8 = 10;

#[test]
fn a_board_installs_what_comes_in_chunks_beside_what_comes_whole() {
    for mosquitto in [false, true] {
        let world = World::new();
        let server = if mosquitto { Server::mosquitto(&world) } else { Server::start(&world) };
        let mut client = Client::connect(server.address, "publisher");
        let (led, logo, image) = (random(1, 5000), random(2, 4096), random(3, 3000));
        let blink = wheel("blink", "1.0", &[("blink/__init__.py", b"x = 1\n"), ("blink/led.bin", &led)]);
        let entry = json!({
            "type": "wheel", "name": "blink", "version": "1.0", "pkg_sha256": Digest::of(&blink),
            "size": blink.len(),
        });
        let firmware = json!({
            "type": "firmware", "name": "esp32", "version": "1.0", "pkg_sha256": Digest::of(&image),
            "size": image.len(),
        });
        let [wheel, logo_entry, firmware] =
            [(entry, &blink), (src("assets/logo.bin", &logo), &logo), (firmware, &image)]
                .map(|(entry, content)| cut(entry, content, 2048));
        let main = src("main.py", b"import blink\n");
        for (entry, content) in [(&wheel, &blink), (&logo_entry, &logo), (&firmware, &image)] {
            retain_chunks(&mut client, entry, content);
        }
        let list = [release(1), wheel.clone(), main.clone(), logo_entry.clone(), firmware];
        retain(&mut client, &list, &[(&main, b"import blink\n")]);

        let (proxy, said) = watched(&server);
        assert_eq!(result(&update(&world, &proxy.url(), json!({}))), idle());
        let found = files(&world);
        assert_eq!(found["lib/blink/led.bin"], led);
        assert_eq!(found["assets/logo.bin"], logo);
        assert_eq!(found["main.py"], b"import blink\n");
        assert_eq!(found.len(), 4);

        // Each came once, in its order, at QoS 0, and none of what is not for this device; all are done with.
        let mut wanted: Vec<_> = (0..3).map(|number| topic(&wheel, number)).collect();
        wanted.extend((0..2).map(|number| topic(&logo_entry, number)));
        for kind in [PUBLISH, SUBSCRIBE, UNSUBSCRIBE] {
            assert_eq!(named(&said, kind), wanted, "{kind}");
        }
        assert!(said.lock().unwrap().iter().all(|(_, _, qos)| *qos == 0));
    }
}

#[test]
fn a_board_that_was_switched_off_goes_on_at_the_chunk_that_is_missing() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let mut client = Client::connect(server.address, "publisher");
    let content = random(4, 20_000);
    let entry = cut(src("data.bin", &content), &content, 2048);
    retain_chunks(&mut client, &entry, &content);
    retain(&mut client, &[release(1), entry.clone()], &[]);

    let seventh = topic(&entry, 6);
    let proxy = Proxy::start(server.address, move |client, packet| {
        if !client && topics(packet).iter().any(|(topic, _)| *topic == seventh) {
            return Verdict::Cut;
        }
        Verdict::Pass
    });
    assert_eq!(result(&update(&world, &proxy.url(), json!({"how": "check"}))).0, "lost");
    let staged = world.path(&format!("root/.mpypi/staging/{}.chunks", entry["pkg_sha256"].as_str().unwrap()));
    let there = usize::try_from(fs::metadata(&staged).unwrap().len()).unwrap() / 2048;
    // The seventh was asked for when the sixth began to come.
    assert!((5..7).contains(&there), "{there}");

    // Of what is there, one is not what it was: it comes again, with those behind it.
    let mut bytes = fs::read(&staged).unwrap();
    bytes[3 * 2048 + 77] ^= 1;
    let (proxy, said) = watched(&server);
    for (changed, first) in [(false, there), (true, 3)] {
        if changed {
            fs::remove_dir_all(world.path("root")).unwrap();
            fs::create_dir_all(staged.parent().unwrap()).unwrap();
            fs::write(&staged, &bytes).unwrap();
            let seen = json!({
                "format": 1, "channel": "dev", "sequence": 1, "version": "1", "list": "0".repeat(64),
            });
            fs::write(world.path("root/.mpypi/seen.json"), format!("{seen}\n")).unwrap();
            // It was another list then.
            retain(&mut client, &[release(2), entry.clone()], &[]);
        }
        said.lock().unwrap().clear();
        assert_eq!(result(&update(&world, &proxy.url(), json!({}))), idle());
        assert_eq!(files(&world)["data.bin"], content);
        let wanted: Vec<_> = (first..10).map(|number| topic(&entry, number)).collect();
        assert_eq!(named(&said, PUBLISH), wanted);
    }
}

#[test]
fn chunks_that_cannot_be_right_are_refused_with_the_reason_and_change_nothing() {
    let world = World::new();
    // A broker that checks nothing.
    let server = Server::mosquitto(&world);
    let mut client = Client::connect(server.address, "publisher");
    let content = random(5, 5000);
    let good = cut(src("data.bin", &content), &content, 2048);
    let mut sequence = 0;
    let mut refuse = |client: &mut Client, word: &str, detail: &str, entry: &Value| {
        sequence += 1;
        retain(client, &[release(sequence), entry.clone()], &[]);
        let limits = json!({"FETCH_STALL": 150, "ATTEMPTS": 2, "RETRY_FIRST": 10, "RETRY_MOST": 40});
        let lines = update(&world, &server.url(), json!({"limits": limits}));
        assert_eq!(result(&lines), ("failed".to_owned(), word.to_owned()), "{lines:?}");
        let told = state(client);
        assert_eq!(told.phase, Phase::Failed);
        let error = told.error.unwrap();
        assert!(error.contains(detail), "{error} does not say {detail}");
        assert!(files(&world).is_empty(), "{word}");
    };
    let missing = format!("the broker has no `{}`", topic(&good, 0));
    refuse(&mut client, "missing-package", &missing, &good);
    retain_chunks(&mut client, &good, &content);
    let mut wrong = |client: &mut Client, word: &str, detail: &str, chunk: &[u8]| {
        assert!(client.retain(&topic(&good, 1), chunk));
        refuse(client, word, detail, &good);
    };
    let mut other = content[2048..4096].to_vec();
    other[100] ^= 4;
    wrong(&mut client, "wrong-hash", "chunk 1 of package `src/data.bin/", &other);
    wrong(&mut client, "wrong-size", "has 2047 bytes, 2048 were announced", &other[1..]);
    other.push(0);
    wrong(&mut client, "wrong-size", "has 2049 bytes, 2048 were announced", &other);
    // Nothing at all clears it.
    let missing = format!("the broker has no `{}`", topic(&good, 1));
    wrong(&mut client, "missing-package", &missing, b"");

    // Each chunk is as the list says, and the package is another.
    let mut another = good.clone();
    another["pkg_sha256"] = json!(Digest::of(b"another"));
    retain_chunks(&mut client, &another, &content);
    refuse(&mut client, "wrong-hash", "package `src/data.bin/", &another);

    // What the list says does not go together.
    let mut bad = |change: fn(&mut Value), detail: &str| {
        let mut entry = good.clone();
        change(&mut entry);
        refuse(&mut client, "bad-list", detail, &entry);
    };
    bad(
        |entry| drop(entry["chunks"]["sha256"].as_array_mut().unwrap().pop()),
        "5000 bytes in chunks of 2048 are 3 chunks, not 2",
    );
    bad(
        |entry| entry["chunks"]["sha256"].as_array_mut().unwrap().push(json!(Digest::EMPTY)),
        "5000 bytes in chunks of 2048 are 3 chunks, not 4",
    );
    bad(|entry| drop(entry.as_object_mut().unwrap().remove("size")), "only with the `size` of the whole");
    bad(|entry| entry["chunks"]["size"] = json!(1023), "chunks have 1024 to 8388608 bytes, not 1023");
    bad(|entry| entry["chunks"]["sha256"][2] = json!("00"), "number 2 is no digest");
    bad(|entry| entry["chunks"] = json!([2048]), "`chunks` is not what it should be");
    let mut large = good.clone();
    large["size"] = json!(9_000_000);
    let digests = vec![Digest::EMPTY; 9_000_000_usize.div_ceil(1 << 20)];
    large["chunks"] = json!({"size": 1 << 20, "sha256": digests});
    refuse(&mut client, "too-large", "is larger than 8388608 bytes", &large);

    // After all that, what is right; written as nobody else would write it.
    retain_chunks(&mut client, &good, &content);
    let list = serde_json::to_vec_pretty(&json!([release(sequence + 1), good])).unwrap();
    assert!(client.retain("mpypi/channels/dev", &list));
    assert_eq!(result(&update(&world, &server.url(), json!({}))), idle());
    assert_eq!(files(&world)["data.bin"], content);
}

#[test]
fn a_chunk_that_is_missing_is_named_and_when_it_comes_it_is_all_that_is_fetched() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let mut client = Client::connect(server.address, "publisher");
    assert!(client.subscribe("mpypi/nodes/board/state", 1) <= 1);
    let content = random(6, 6000);
    let entry = cut(src("data.bin", &content), &content, 1024);
    retain_chunks(&mut client, &entry, &content);
    assert!(client.retain(&topic(&entry, 3), b""));
    retain(&mut client, &[release(1), entry.clone()], &[]);

    let (proxy, said) = watched(&server);
    let limits = json!({"FETCH_STALL": 150, "ATTEMPTS": 2, "RETRY_FIRST": 10, "RETRY_MOST": 40, "LOOK": 20});
    let node = start(&world, &proxy.url(), json!({"how": "run", "limits": limits}));
    let told = await_state(&mut client, |state| state.phase == Phase::Failed);
    let wanted = format!("missing-package: the broker has no `{}`", topic(&entry, 3));
    assert_eq!(told.error.unwrap(), wanted);
    assert!(client.retain(&topic(&entry, 3), &content[3072..4096]));
    client.post("mpypi/nodes/board/cmd", br#"[{"type":"check"}]"#, 0, false);
    await_state(&mut client, |state| state.phase == Phase::Restarting);
    let _ = node.wait().expect_code(0);
    assert_eq!(files(&world)["data.bin"], content);
    // It was asked for at both attempts; those before it once.
    let all: Vec<_> = (0..6).map(|number| topic(&entry, number)).collect();
    assert_eq!(named(&said, PUBLISH), all);
    let asked = named(&said, SUBSCRIBE);
    let times = |number: usize| asked.iter().filter(|found| **found == all[number]).count();
    assert_eq!([0, 1, 2, 3, 4, 5].map(times), [1, 1, 1, 3, 1, 1]);
}

#[test]
fn chunks_that_come_twice_or_out_of_order_end_in_the_right_file() {
    let world = World::new();
    let server = Server::mosquitto(&world);
    let mut client = Client::connect(server.address, "publisher");
    let content = random(7, 6000);
    let entry = cut(src("data.bin", &content), &content, 1024);
    retain_chunks(&mut client, &entry, &content);
    retain(&mut client, &[release(1), entry.clone()], &[]);

    let said = Said::default();
    let noted = said.clone();
    let [second, third] = [2, 3].map(|number| topic(&entry, number));
    let (mut is_half, mut is_cut, mut held) = (false, false, Vec::new());
    let proxy = Proxy::start(server.address, move |client, packet| {
        note(&noted, packet);
        let of = |wanted: &str| topics(packet).iter().any(|(topic, _)| topic == wanted);
        if is_half && !is_cut {
            // While one comes, the next is asked for; then the line breaks.
            is_cut = client && of(&third);
            return if is_cut { Verdict::Cut } else { Verdict::Pass };
        }
        match packet[0] >> 4 {
            PUBLISH if !client && of(&second) && !is_half => {
                is_half = true;
                Verdict::Replace(packet[..packet.len() / 2].to_vec())
            }
            // Asked for both, a broker answers the wrong way round.
            PUBLISH if !client && of(&second) && held.is_empty() => {
                held = packet.to_vec();
                Verdict::Replace(Vec::new())
            }
            PUBLISH if !client && of(&third) && !held.is_empty() => {
                let both = [packet, &std::mem::take(&mut held)].concat();
                // Whatever comes after these comes as it should, and twice.
                held.clear();
                Verdict::Replace(both)
            }
            PUBLISH if !client && topics(packet)[0].0.starts_with("mpypi/chunks/") => {
                Verdict::Replace([packet, packet].concat())
            }
            _ => Verdict::Pass,
        }
    });
    let node = start(&world, &proxy.url(), json!({"how": "run"}));
    assert_eq!(result(&said_by(node)).0, "restarting");
    assert_eq!(files(&world)["data.bin"], content);
    // Before the line broke, after it, and because it came too early.
    let third = topic(&entry, 3);
    assert_eq!(named(&said, SUBSCRIBE).iter().filter(|found| **found == third).count(), 3);
    assert_eq!(result(&update(&world, &server.url(), json!({}))), idle());
}

fn said_by(node: mpypi_tests::Running) -> Vec<Value> {
    said(&node.wait().expect_code(0))
}

#[test]
fn boards_on_lines_that_break_at_random_bytes_get_all_chunks() {
    let world = World::new();
    let server = Server::start(&world);
    let data = random(8, 30_000);
    world.write("dev/src/data.bin", &data);
    world.write("dev/src/main.py", "import data\n");
    in_chunks(&world, &server.url(), "2K");
    let mut random = fastrand::Rng::with_seed(5);
    let address = cutting_line(server.address, move || match random.u8(0..4) {
        0 => u64::MAX,
        _ => random.u64(0..12_000),
    });
    fs::create_dir(world.path("boards")).unwrap();
    let options = json!({
        "server": format!("mqtt://{address}"), "root": world.text("boards"), "first": 0, "last": 20,
        "limits": {"RETRY_FIRST": 1, "RETRY_MOST": 4, "NAP_MOST": 4, "LOOK": 20, "GOODBYE": 200},
    });
    let options = world.write("options.json", options.to_string());
    let output = crate::device::python(&[&script("drops.py"), options.to_str().unwrap()]).expect_code(0);
    let lines = said(&output);
    assert!(lines.iter().all(|line| line["phase"] == "idle"), "{lines:?}");
    assert!(lines.iter().any(|line| line["losses"].as_u64() > Some(0)), "{lines:?}");
    for seed in 0..20 {
        assert_eq!(world.files(&format!("boards/{seed}")), world.files("dev/src"), "seed {seed}");
    }
}

/// Publishes the channel to a broker that takes packets of little more than one chunk.
fn in_chunks(world: &World, broker: &str, size: &str) {
    let dev = world.text("dev");
    let arguments = ["publish", &dev, "--broker", broker, "--max-packet", "20K", "--chunk", size];
    let _ = run("mpypi", &arguments).expect_code(0);
}

/// A channel with one package of 256 KiB: a wheel of four files.
fn quarter_mebibyte(world: &World) {
    world.write("dev/wheels/big/pyproject.toml", "[project]\nname = \"big\"\nversion = \"1\"\n");
    for n in 0..4 {
        let part = [random(n, 64 << 10), b"and this is what deflate likes\n".repeat(200)].concat();
        world.write(&format!("dev/wheels/big/big/part{n}.bin"), part);
    }
}

#[test]
fn a_file_in_sixteen_chunks_fits_through_a_heap_of_68_kib() {
    let world = World::new();
    let server = Server::start(&world);
    world.write("dev/src/big.bin", random(9, 256 << 10));
    in_chunks(&world, &server.url(), "16K");
    fs::create_dir(world.path("root")).unwrap();
    let (proxy, noted) = watched(&server);
    let said = small(&compiled(&world), "68k", &[&proxy.url(), &world.text("root"), "-", "-"]);
    // Not at the second or third try.
    assert!(!said.contains("no-memory"), "{said}");
    assert_eq!(named(&noted, PUBLISH).len(), 16);
    assert_eq!(world.files("root"), world.files("dev/src"));
}

#[test]
fn a_wheel_in_signed_chunks_fits_by_tls_through_a_heap_of_96_kib_and_takes_16_kib_of_it() {
    let world = World::new();
    let ca = Authority::new(&world, "ca");
    ca.server(&world, "broker", &["localhost"], mpypi_tests::Validity::Now);
    let broker = Secure::start(Kind::Ours, &world, None);
    quarter_mebibyte(&world);
    in_chunks(&world, &broker.server.url(), "16K");
    let (name, modulus) = signing_key(&world, "dev-2026");
    world.write("keys.json", json!({&name: modulus}).to_string());
    let mut client = Client::connect(broker.server.address, "publisher");
    let list = client.retained("mpypi/channels/dev").unwrap().payload;
    let mut list: Vec<Value> = serde_json::from_slice(&list).unwrap();
    assert!(list[1]["chunks"]["sha256"].as_array().unwrap().len() >= 16);
    list[0]["sequence"] = json!(2);
    assert!(client.retain("mpypi/channels/dev", signed(&world, &list, &name, &name).as_bytes()));
    let path = compiled(&world);
    let (url, pem, keys) = (broker.url("localhost"), ca.pem(&world), world.text("keys.json"));
    for (root, heap, measure) in [("root", "96k", None), ("measured", "256k", Some("heap"))] {
        fs::create_dir(world.path(root)).unwrap();
        let root = world.text(root);
        let mut arguments = vec![url.as_str(), &root, &pem, &keys];
        arguments.extend(measure);
        let said = small(&path, heap, &arguments);
        assert!(!said.contains("no-memory"), "{said}");
        if let Some(line) = said.lines().find(|line| line.starts_with("heap ")) {
            let numbers: Vec<u64> = line.split(' ').filter_map(|part| part.parse().ok()).collect();
            let [start, peak] = numbers[..] else { panic!("{line}") };
            assert!(peak - start <= 16 << 10, "{line}: {} bytes", peak - start);
            println!("{line}: {} bytes", peak - start);
        }
    }
}
