//! Packages that are larger than what a broker takes, in pieces.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use mpypi_protocol::{ChannelName, Digest, Entry, UpdateList, list::Piece};
use mpypi_tests::{
    Client, Cluster, Kind, Output, Proxy, Running, Server, Verdict, World, bytes, clock, face, http::Web,
    kill_once_known, run,
};
use serde_json::Value;

/// The largest packet that a small broker takes, in bytes.
const PACKET: usize = 100_000;

/// Bytes of the image that is too large for it.
const IMAGE: usize = 300_000;

/// A broker that takes no packet of more than [`PACKET`] bytes, and says so.
fn small(kind: Kind, world: &World) -> Server {
    match kind {
        Kind::Mosquitto => {
            Server::mosquitto_with(world, &format!("persistence false\nmax_packet_size {PACKET}\n"))
        }
        Kind::Ours => {
            let limits = format!("[limits]\npacket = {PACKET}\npackage = {}\n", PACKET - 65_536);
            world.write("data/broker.toml", limits);
            Server::start(world)
        }
    }
}

/// A channel with an image that is too large, and a file that is not.
fn release(world: &World, seed: u64) -> Vec<u8> {
    let image = bytes(seed, IMAGE);
    world.write("dev/firmware/firmware-board-v1.0.bin", &image);
    world.write("dev/src/main.py", format!("RELEASE = {seed}\n"));
    image
}

fn mpypi(world: &World, arguments: &[&str], broker: &str) -> Output {
    let folder = world.text("dev");
    let arguments: Vec<&str> = arguments
        .iter()
        .map(|argument| if *argument == "dev/" { folder.as_str() } else { argument })
        .collect();
    run("mpypi", &[&arguments[..], &["--broker", broker]].concat())
}

fn publish(world: &World, more: &[&str], broker: &str) -> Value {
    mpypi(world, &[&["publish", "dev/", "--json"], more].concat(), broker).expect_code(0).json()
}

/// What was sent: packages and bytes.
fn sent(outcome: &Value) -> (u64, u64) {
    (outcome["packages"]["sent"].as_u64().unwrap(), outcome["bytes_sent"].as_u64().unwrap())
}

fn list(client: &mut Client, channel: &str) -> UpdateList {
    let topic = ChannelName::new(channel).unwrap().topic();
    UpdateList::parse(&client.retained(&topic).unwrap().payload).unwrap()
}

/// The chunks of the list's image.
fn chunks(list: &UpdateList) -> Vec<Piece> {
    let image = list.entries().iter().find(|entry| matches!(entry, Entry::Firmware(_))).unwrap();
    assert!(image.chunks().is_some(), "it is whole: {image:?}");
    image.pieces()
}

/// All of `pieces` as they are retained, joined.
fn joined(client: &mut Client, pieces: &[Piece]) -> Vec<u8> {
    pieces
        .iter()
        .flat_map(|piece| {
            let payload = client.retained(&piece.topic).unwrap().payload;
            assert_eq!((Digest::of(&payload), Some(payload.len() as u64)), (piece.digest, piece.size));
            payload
        })
        .collect()
}

#[test]
fn what_a_broker_takes_no_packet_of_goes_in_chunks_and_the_second_publish_sends_nothing() {
    for kind in [Kind::Mosquitto, Kind::Ours] {
        let world = World::new();
        let server = small(kind, &world);
        let image = release(&world, 1);
        let outcome = publish(&world, &[], &server.url());
        assert_eq!(sent(&outcome), (2, IMAGE as u64 + 12), "{kind:?}");
        let mut client = Client::connect(server.address, "checker");
        let pieces = chunks(&list(&mut client, "dev"));
        let largest = pieces.iter().filter_map(|piece| piece.size).max().unwrap();
        match kind {
            Kind::Mosquitto => assert_eq!(largest, 65_536),
            // What it takes of a package it says itself.
            Kind::Ours => assert_eq!(largest, 33 * 1024),
        }
        assert_eq!(joined(&mut client, &pieces), image);
        let whole = format!("mpypi/packages/firmware/{}", Digest::of(&image));
        let whole = client.retained(&whole).map(|message| message.payload);
        // Ours makes it whole, for those who ask for it whole.
        assert_eq!(whole, (kind == Kind::Ours).then_some(image), "{kind:?}");
        for more in [&[][..], &["--repair"], &["--chunk", "16K"]] {
            let again = publish(&world, more, &server.url());
            assert_eq!((&again["unchanged"], sent(&again)), (&true.into(), (0, 0)), "{kind:?} {more:?}");
        }
        // Of a release with the same image, that is not sent again.
        world.write("dev/src/main.py", "RELEASE = 1.1\n");
        assert_eq!(sent(&publish(&world, &[], &server.url())), (1, 14), "{kind:?}");
        assert_eq!(chunks(&list(&mut client, "dev")), pieces);
        mpypi(&world, &["verify", "dev"], &server.url()).expect_code(0);
    }
}

#[test]
fn a_lost_chunk_is_sent_again_alone_and_one_with_other_bytes_is_named_and_replaced() {
    let world = World::new();
    let server = small(Kind::Mosquitto, &world);
    let image = release(&world, 2);
    publish(&world, &["--chunk", "32K"], &server.url());
    let mut client = Client::connect(server.address, "checker");
    let pieces = chunks(&list(&mut client, "dev"));
    assert_eq!(pieces.len(), 10);
    for (number, payload) in [(3, &b""[..]), (9, b"something else")] {
        assert!(client.retain(&pieces[number].topic, payload));
        let report = mpypi(&world, &["verify", "dev"], &server.url()).expect_code(1);
        let named = format!("1 package missing, chunk {number} of the 10 of `firmware/");
        assert!(report.stdout.contains(&named), "{}", report.stdout);
        let outcome = publish(&world, &["--repair"], &server.url());
        assert_eq!(sent(&outcome), (1, pieces[number].size.unwrap()));
        assert_eq!(chunks(&list(&mut client, "dev")), pieces);
        assert_eq!(joined(&mut client, &pieces), image);
        mpypi(&world, &["verify", "dev"], &server.url()).expect_code(0);
    }
}

#[test]
fn our_broker_takes_no_list_without_its_chunks_and_no_other_bytes_for_one_that_is_named() {
    let world = World::new();
    let server = small(Kind::Ours, &world);
    release(&world, 3);
    publish(&world, &[], &server.url());
    let mut client = Client::connect(server.address, "thief");
    let pieces = chunks(&list(&mut client, "dev"));
    // By MQTT 3.1.1, a refusal ends the connection.
    assert!(!client.retain(&pieces[1].topic, b"something else"));
    let mut client = Client::connect(server.address, "thief");
    assert!(!client.retain(&pieces[1].topic, b""));
    let mut client = Client::connect(server.address, "checker");
    assert!(client.retained(&pieces[1].topic).is_some());
    let topic = mpypi_protocol::chunk::topic(&Digest::of(b"never sent"), 0);
    let text = format!(
        r#"[{{"type":"release","channel":"new","sequence":1,"version":"1"}},{{"type":"src","path":"a","pkg_sha256":"{}","size":2000,"chunks":{{"size":2048,"sha256":["{}"]}}}}]"#,
        Digest::of(b"never sent"),
        Digest::of(b"nor this"),
    );
    assert!(!client.retain("mpypi/channels/new", text.as_bytes()), "`{topic}` is not there");
}

#[test]
fn another_channel_with_the_same_image_keeps_it_in_the_chunks_that_are_there() {
    let world = World::new();
    let server = small(Kind::Mosquitto, &world);
    release(&world, 4);
    publish(&world, &["--chunk", "20K"], &server.url());
    let outcome = publish(&world, &["--channel", "other", "--chunk", "50K"], &server.url());
    assert_eq!(sent(&outcome), (0, 0));
    let mut client = Client::connect(server.address, "checker");
    let pieces = chunks(&list(&mut client, "other"));
    assert_eq!(pieces, chunks(&list(&mut client, "dev")));
    assert_eq!(pieces[0].size, Some(20 * 1024));
    // The very same bytes: nothing is cut anew.
    mpypi(&world, &["promote", "dev", "stable"], &server.url()).expect_code(0);
    assert_eq!(pieces, chunks(&list(&mut client, "stable")));
}

#[test]
fn a_list_that_is_larger_than_what_a_broker_takes_is_an_error_before_anything_is_sent() {
    let world = World::new();
    let server = Server::mosquitto_with(&world, "persistence false\nmax_packet_size 5000\n");
    for number in 0..50 {
        world.write(&format!("dev/src/file-{number}.py"), format!("FILE = {number}\n"));
    }
    for more in [&["--dry-run"][..], &[]] {
        let failed = mpypi(&world, &[&["publish", "dev/"], more].concat(), &server.url()).expect_code(1);
        assert!(failed.stderr.contains("the list of release 1 on channel `dev` has"), "{}", failed.stderr);
        assert!(failed.stderr.contains("hint: put files into a wheel"), "{}", failed.stderr);
    }
    let mut client = Client::connect(server.address, "checker");
    client.subscribe("mpypi/#", 0);
    client.fence();
    assert!(!client.waits());
    // Likewise what would be too many chunks.
    let world = World::new();
    let server = Server::mosquitto_with(&world, "persistence false\nmax_packet_size 2048\n");
    world.write("dev/src/large.bin", bytes(5, 2_000_000));
    let failed = mpypi(&world, &["publish", "dev/"], &server.url()).expect_code(1);
    let text = "of 1.9 MiB does not fit into 1024 packets of 2.0 KiB, the largest that the broker takes";
    assert!(failed.stderr.contains(text), "{}", failed.stderr);
}

#[test]
fn what_a_broker_takes_and_does_not_say_is_said_on_the_command_line_or_in_a_file() {
    let world = World::new();
    // Of payloads: nobody is told.
    let server = Server::mosquitto_with(&world, "persistence false\nmessage_size_limit 90000\n");
    let image = release(&world, 6);
    let failed = mpypi(&world, &["publish", "dev/"], &server.url()).expect_code(1);
    assert!(failed.stderr.contains("hint: say with `--max-packet SIZE`"), "{}", failed.stderr);
    let url = server.url();
    let config = world.write(
        "mpypi.toml",
        format!("[brokers]\nurls = [\"{url}\"]\nmax-packet = \"64K\"\nchunk = \"24K\"\n"),
    );
    let folder = world.text("dev");
    let arguments = ["publish", &folder, "--json", "--config", config.to_str().unwrap()];
    // The file was sent the first time.
    assert_eq!(sent(&run("mpypi", &arguments).expect_code(0).json()), (1, IMAGE as u64));
    let mut client = Client::connect(server.address, "checker");
    let pieces = chunks(&list(&mut client, "dev"));
    assert_eq!(pieces[0].size, Some(24 * 1024));
    assert_eq!(joined(&mut client, &pieces), image);
    let again = publish(&world, &["--max-packet", "64K"], &server.url());
    assert_eq!(sent(&again), (0, 0));
}

/// The arguments of an agent that applies one release and ends, with its files in the world's folder `node`.
fn once<'a>(folder: &'a str, broker: &'a str) -> Vec<&'a str> {
    vec!["run", "--node", "n", "--channel", "dev", "--root", folder, "--broker", broker, "--once"]
}

/// A channel with a file and a wheel that are too large.
fn files(world: &World, seed: u64) {
    world.write("dev/src/data/large.bin", bytes(seed, IMAGE));
    world.write("dev/src/main.py", "print(1)\n");
    world.write("dev/wheels/app/pyproject.toml", "[project]\nname = \"app\"\nversion = \"1\"\n");
    world.write("dev/wheels/app/app/noise.py", format!("NOISE = {:?}\n", bytes(seed + 1, 120_000)));
}

#[test]
fn a_device_installs_what_comes_in_chunks_and_then_fetches_nothing_more() {
    for kind in [Kind::Mosquitto, Kind::Ours] {
        let world = World::new();
        let server = small(kind, &world);
        files(&world, 8);
        publish(&world, &["--chunk", "16K"], &server.url());
        let mut client = Client::connect(server.address, "checker");
        let list = list(&mut client, "dev");
        let cut = list.entries().iter().filter(|entry| entry.chunks().is_some()).count();
        assert_eq!(cut, 2, "{kind:?}: {list:?}");
        let asked = Arc::new(AtomicUsize::new(0));
        let line = counted(&server, &asked);
        let (folder, url) = (world.text("node"), line.url());
        run("mpypi-agent", &once(&folder, &url)).expect_code(0);
        let node = world.files("node");
        assert_eq!(node["data/large.bin"], bytes(8, IMAGE), "{kind:?}");
        assert!(node.contains_key("lib/app/noise.py"), "{kind:?}");
        let chunks = list.pieces().filter(|piece| piece.topic.starts_with("mpypi/chunks/")).count();
        assert_eq!(asked.swap(0, Ordering::SeqCst), chunks, "{kind:?}");
        run("mpypi-agent", &once(&folder, &url)).expect_code(0);
        assert_eq!(asked.load(Ordering::SeqCst), 0, "{kind:?}");
    }
}

/// A line to a broker on which the chunks are counted that are asked for.
fn counted(server: &Server, asked: &Arc<AtomicUsize>) -> Proxy {
    let asked = asked.clone();
    Proxy::start(server.address, move |is_client, packet| {
        if is_client && packet[0] == 0x82 {
            let text = packet.windows(13).filter(|part| part == b"mpypi/chunks/").count();
            asked.fetch_add(text, Ordering::SeqCst);
        }
        Verdict::Pass
    })
}

#[test]
fn a_device_killed_in_the_middle_of_a_package_goes_on_with_the_chunks_that_are_missing() {
    for kind in [Kind::Mosquitto, Kind::Ours] {
        let world = World::new();
        let server = small(kind, &world);
        world.write("dev/src/data/large.bin", bytes(9, IMAGE));
        publish(&world, &["--chunk", "10K"], &server.url());
        let (folder, pid) = (world.text("node"), Arc::new(AtomicU32::new(0)));
        // When the twelfth chunk is asked for, it is killed: as many have come as had room in the window before it.
        let (victim, count) = (pid.clone(), AtomicUsize::new(0));
        let line = Proxy::start(server.address, move |is_client, packet| {
            let is_chunk =
                !is_client && packet[0] >> 4 == 3 && packet.windows(13).any(|part| part == b"mpypi/chunks/");
            if !is_chunk || count.fetch_add(1, Ordering::SeqCst) < 11 {
                return Verdict::Pass;
            }
            kill_once_known(&victim);
            Verdict::Cut
        });
        let agent = Running::start("mpypi-agent", &once(&folder, &line.url()));
        pid.store(agent.pid(), Ordering::SeqCst);
        assert_ne!(agent.wait().code, Some(0));
        let (asked, total) = (Arc::new(AtomicUsize::new(0)), IMAGE.div_ceil(10 * 1024));
        let line = counted(&server, &asked);
        run("mpypi-agent", &once(&folder, &line.url())).expect_code(0);
        assert_eq!(world.files("node")["data/large.bin"], bytes(9, IMAGE), "{kind:?}");
        let asked = asked.load(Ordering::SeqCst);
        // Those that were on their way into the store when it was killed may have to come again.
        assert!((total - 11..=total - 11 + 4).contains(&asked), "{kind:?}: {asked} of {total}");
    }
}

#[test]
fn a_device_names_the_chunk_that_has_other_bytes_and_installs_when_it_is_published_again() {
    let world = World::new();
    let server = small(Kind::Mosquitto, &world);
    world.write("dev/src/data/large.bin", bytes(10, IMAGE));
    publish(&world, &["--chunk", "32K"], &server.url());
    let mut client = Client::connect(server.address, "thief");
    let pieces: Vec<Piece> = list(&mut client, "dev").pieces().collect();
    assert!(client.retain(&pieces[5].topic, b"something else"));
    let (folder, url) = (world.text("node"), server.url());
    run("mpypi-agent", &once(&folder, &url)).expect_code(3);
    let state = client.retained("mpypi/nodes/n/state").unwrap().payload;
    let state = String::from_utf8(state).unwrap();
    assert!(state.contains("wrong-hash: chunk 5 of package `src/data/large.bin/"), "{state}");
    assert_eq!(world.files("node"), BTreeMap::new());
    publish(&world, &["--repair"], &url);
    let asked = Arc::new(AtomicUsize::new(0));
    let line = counted(&server, &asked);
    run("mpypi-agent", &once(&folder, &line.url())).expect_code(0);
    assert_eq!(world.files("node")["data/large.bin"], bytes(10, IMAGE));
    assert_eq!(asked.load(Ordering::SeqCst), pieces.len() - 5);
}

#[test]
fn nats_takes_no_more_than_it_is_set_to_and_devices_there_get_chunks() {
    let world = World::new();
    let cluster = Cluster::start_with(&world, 1, "max_payload: 128K\n");
    world.write("dev/src/data/large.bin", bytes(11, IMAGE));
    let (folder, url) = (world.text("node"), cluster.url(0));
    let outcome = publish(&world, &["--max-packet", "128K"], &url);
    assert_eq!(sent(&outcome), (1, IMAGE as u64));
    run("mpypi-agent", &once(&folder, &url)).expect_code(0);
    assert_eq!(world.files("node")["data/large.bin"], bytes(11, IMAGE));
}

#[test]
fn chunks_that_make_another_package_are_found_by_verify() {
    let world = World::new();
    let server = small(Kind::Mosquitto, &world);
    let mut client = Client::connect(server.address, "liar");
    let (package, digest) = (bytes(7, 3000), Digest::of(b"something else"));
    let parts: BTreeMap<u32, &[u8]> = (0..).zip(package.chunks(2048)).collect();
    for (number, part) in &parts {
        assert!(client.retain(&mpypi_protocol::chunk::topic(&digest, *number), part));
    }
    let digests: Vec<_> = parts.values().map(|part| format!("\"{}\"", Digest::of(part))).collect();
    let text = format!(
        r#"[{{"type":"release","channel":"dev","sequence":1,"version":"1"}},{{"type":"src","path":"a","pkg_sha256":"{digest}","size":3000,"chunks":{{"size":2048,"sha256":[{}]}}}}]"#,
        digests.join(",")
    );
    assert!(client.retain("mpypi/channels/dev", text.as_bytes()));
    let report = mpypi(&world, &["verify", "dev"], &server.url()).expect_code(1);
    assert!(report.stdout.contains("are another one together"), "{}", report.stdout);
}

#[test]
fn a_package_in_chunks_is_whole_at_an_edge_and_a_gateway_and_neither_fetches_a_chunk_twice() {
    let [hub_world, edge_world, gateway_world, world] =
        [World::new(), World::new(), World::new(), World::new()];
    let hub = small(Kind::Mosquitto, &hub_world);
    let image = release(&world, 1);
    publish(&world, &[], &hub.url());
    let brought = Arc::new(AtomicUsize::new(0));
    let count = brought.clone();
    let line = Proxy::start(hub.address, move |is_client, packet| {
        // A PUBLISH for the edge that is larger than any list here.
        if !is_client && packet[0] >> 4 == 3 && packet.len() > 30_000 {
            count.fetch_add(1, Ordering::SeqCst);
        }
        Verdict::Pass
    });
    let http = ["--http", "127.0.0.1:0"];
    let edge = Server::start_with(&edge_world, &[&["--upstream", &line.url()], &http[..]].concat());
    let gateway = Server::gateway(&gateway_world, &hub.url(), &[]);
    let path = format!("/packages/{}", Digest::of(&image));
    for server in [&edge, &gateway] {
        let get = |path: &str, asked: &[(&str, &str)]| Web::get(server.http.unwrap(), path, asked);
        face::eventually("the image is there by its name", || {
            (get("/firmware/firmware-board.bin", &[]).body == image).then_some(())
        });
        assert!(get(&path, &[]).body == image);
        let part = get(&path, &[("Range", "bytes=70000-140000")]);
        assert!(part.code == 206 && part.body == image[70_000..=140_000]);
    }
    // Devices below the edge get what the list says: chunks.
    let mut client = Client::connect(edge.address, "device");
    let pieces = chunks(&list(&mut client, "dev"));
    assert_eq!(joined(&mut client, &pieces), image);
    // What is in another release too costs the upstream nothing more.
    world.write("dev/src/main.py", "RELEASE = 2\n");
    publish(&world, &[], &hub.url());
    face::eventually("the second release is there", || {
        (list(&mut client, "dev").release().unwrap().sequence == 2).then_some(())
    });
    assert_eq!(brought.load(Ordering::SeqCst), pieces.len());
}

/// Seconds of processor time that a process has used.
fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    // In ticks of a hundredth of a second.
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

/// Publishes a firmware's worth of bytes in chunks of each size, and has devices fetch it one after another.
fn costs(name: &str, url: &str, pid: u32) {
    const DEVICES: u32 = 5;
    for (seed, size) in (100..).zip(["4K", "16K", "32K", "64K", "128K"]) {
        let world = World::new();
        world.write("dev/src/data/firmware.bin", bytes(seed, 4 << 20));
        let started = clock();
        publish(
            &world,
            &["--chunk", size, "--max-packet", "192K", "--channel", &format!("size-{size}")],
            url,
        );
        let (published, before, started) = (started.elapsed(), cpu(pid), clock());
        for device in 0..DEVICES {
            let folder = world.text(&format!("node-{device}"));
            let channel = format!("size-{size}");
            let arguments = ["run", "--node", "n", "--channel", &channel, "--root", &folder, "--broker", url];
            let more = ["--once", "--confirm-after", "1ms"];
            run("mpypi-agent", &[&arguments[..], &more].concat()).expect_code(0);
        }
        let fetched = started.elapsed() / DEVICES;
        println!(
            "| {name} | {size} | {:.2} | {:.2} | {:.0} |",
            published.as_secs_f64(),
            fetched.as_secs_f64(),
            (cpu(pid) - before) / f64::from(DEVICES) * 1000.0,
        );
    }
}

#[test]
#[ignore = "makes a table: `make engines`"]
fn the_same_firmware_in_chunks_of_each_size() {
    println!(
        "| engine | chunks of | publish (s) | a device (s) | its processor time (ms) |\n|---|---|---|---|---|"
    );
    let home = World::new();
    let ours = Server::start(&home);
    costs("ours", &ours.url(), ours.pid());
    let home = World::new();
    let mosquitto = Server::mosquitto(&home);
    costs("mosquitto", &mosquitto.url(), mosquitto.pid());
    let home = World::new();
    let nats = Cluster::start(&home, 1);
    costs("NATS, 1", &nats.url(0), nats.pid(0));
}

#[test]
fn nobody_cuts_anew_what_lies_there_in_chunks_that_another_channel_or_the_past_may_need() {
    for kind in [Kind::Mosquitto, Kind::Ours] {
        let (hub, world) = (World::new(), World::new());
        let server = match kind {
            Kind::Mosquitto => Server::mosquitto_with(&hub, "persistence false\n"),
            Kind::Ours => Server::start(&hub),
        };
        let image = release(&world, 1);
        publish(&world, &["--max-packet", "80K"], &server.url());
        let mut client = Client::connect(server.address, "checker");
        let (before, pieces) = (list(&mut client, "dev"), chunks(&list(&mut client, "dev")));
        for more in [&[][..], &["--channel", "stable"]] {
            let arguments = [&["publish", "dev/", "--max-packet", "40K"], more].concat();
            let refused = mpypi(&world, &arguments, &server.url()).expect_code(1);
            let why = "lies there in chunks of 64.0 KiB, and no packet above 40.0 KiB is to be sent";
            assert!(
                refused.stderr.contains(why) && refused.stderr.contains("raise `--max-packet`"),
                "{refused:?}"
            );
        }
        assert_eq!(list(&mut client, "dev"), before);
        assert_eq!(joined(&mut client, &pieces), image);
        mpypi(&world, &["verify", "dev"], &server.url()).expect_code(0);
        // Whoever says nothing of packets, or takes larger ones, changes nothing.
        let same = publish(&world, &[], &server.url());
        assert_eq!((&same["unchanged"], sent(&same)), (&true.into(), (0, 0)), "{kind:?}");
    }
}

#[test]
fn what_a_broker_made_whole_beyond_what_it_takes_is_in_its_backup_and_can_be_put_back() {
    let [hub, other, world] = [World::new(), World::new(), World::new()];
    let server = small(Kind::Ours, &hub);
    let image = release(&world, 1);
    publish(&world, &[], &server.url());
    let (data, backup) = (hub.text("data"), world.text("backup"));
    let _ = run("mpypi-broker", &["backup", &backup, "--data", &data]).expect_code(0);
    let server = small(Kind::Ours, &other);
    let _ = run("mpypi-broker", &["restore", &backup, "--data", &other.text("data")]).expect_code(0);
    let mut client = Client::connect(server.address, "checker");
    let whole = format!("mpypi/packages/firmware/{}", Digest::of(&image));
    assert_eq!(client.retained(&whole).unwrap().payload, image);
    mpypi(&world, &["verify", "dev"], &server.url()).expect_code(0);
}
