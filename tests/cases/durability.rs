//! What an acknowledgement is worth.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use mpypi_protocol::{Digest, PackageId, UpdateList};
use mpypi_tests::{Client, Server, World};

/// Publishers that work at once, each with a channel of its own.
const PUBLISHERS: usize = 3;
/// Packages in a release; all are sent before the first answer is read.
const PACKAGES: usize = 8;

/// What one publisher knows of its channel.
#[derive(Debug, Default)]
struct Known {
    /// Digest → size and seed of every package acknowledged.
    packages: BTreeMap<Digest, (usize, u64)>,
    /// The last list acknowledged.
    list: Option<Vec<u8>>,
    /// A list sent after it, of which nothing is known.
    sent: Option<Vec<u8>>,
    sequence: u64,
}

fn package(size: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..size).map(|_| random.u8(..)).collect()
}

/// Publishes releases until the broker is gone. Counts what was acknowledged in `acknowledged`.
fn publish(
    address: std::net::SocketAddr,
    n: usize,
    known: &Mutex<Known>,
    acknowledged: &AtomicUsize,
    seed: u64,
) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut client = Client::connect(address, &format!("publisher-{n}"));
    loop {
        let mut batch = Vec::new();
        for _ in 0..PACKAGES {
            // On both sides of where payloads leave the database for files.
            let (size, seed) = (random.usize(1..40_000), random.u64(..));
            let bytes = package(size, seed);
            let digest = Digest::of(&bytes);
            if client.post(&PackageId::Wheel(digest).topic(), &bytes, 1, true).is_none() {
                return;
            }
            batch.push((digest, size, seed));
        }
        for (digest, size, seed) in &batch {
            if client.acknowledged().is_none() {
                return;
            }
            known.lock().unwrap().packages.insert(*digest, (*size, *seed));
            acknowledged.fetch_add(1, Ordering::SeqCst);
        }
        let list = {
            let mut known = known.lock().unwrap();
            known.sequence += 1;
            let names = batch.iter().enumerate().map(|(i, (digest, ..))| {
                format!(r#",{{"type":"wheel","name":"p{i}","version":"1","pkg_sha256":"{digest}"}}"#)
            });
            let release = format!(
                r#"{{"type":"release","channel":"c{n}","sequence":{0},"version":"{0}"}}"#,
                known.sequence
            );
            let list = format!("[{release}{}]", names.collect::<String>()).into_bytes();
            known.sent = Some(list.clone());
            list
        };
        if !client.retain(&format!("mpypi/channels/c{n}"), &list) {
            return;
        }
        let mut known = known.lock().unwrap();
        known.list = Some(list);
        known.sent = None;
        acknowledged.fetch_add(1, Ordering::SeqCst);
    }
}

fn check(server: &Server, all: &[Arc<Mutex<Known>>], seed: u64) {
    let mut reader = Client::connect(server.address, "reader");
    for (n, known) in all.iter().enumerate() {
        let mut known = known.lock().unwrap();
        for (digest, (size, package_seed)) in &known.packages {
            let found = reader.retained(&PackageId::Wheel(*digest).topic());
            let found = found.unwrap_or_else(|| panic!("seed {seed}: an acknowledged package is lost"));
            assert!(found.payload == package(*size, *package_seed), "seed {seed}: package changed");
        }
        let list = reader.retained(&format!("mpypi/channels/c{n}")).unwrap().payload;
        let acknowledged = known.list.clone().unwrap_or_else(|| b"[]".to_vec());
        assert!(
            list == acknowledged || Some(&list) == known.sent.as_ref(),
            "seed {seed}: neither the acknowledged list nor the one sent after it"
        );
        for (id, _) in UpdateList::parse(&list).unwrap().packages() {
            let found = reader.retained(&id.topic()).expect("a list names a package that is not there");
            assert_eq!(Digest::of(&found.payload), *id.digest());
        }
        known.list = Some(list);
        known.sent = None;
    }
    // Nothing is there by halves, also not what was never acknowledged. Fewer messages wait in the socket
    // than a wildcard finds, so ask again after each answer.
    reader.subscribe("mpypi/packages/#", 0);
    reader.subscribe("mpypi/channels/never", 0);
    let known: usize = all.iter().map(|known| known.lock().unwrap().packages.len()).sum();
    for _ in 0..known {
        let found = reader.message().unwrap();
        if found.topic.starts_with("mpypi/packages/") {
            assert!(
                found.topic.ends_with(&Digest::of(&found.payload).to_string()),
                "seed {seed}: half a package"
            );
        }
    }
}

#[test]
fn what_was_acknowledged_is_there_after_kill_9_under_load_twenty_times() {
    let seed = std::env::var("MPYPI_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("MPYPI_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let world = World::new();
    let all: Vec<_> = (0..PUBLISHERS).map(|_| Arc::new(Mutex::new(Known::default()))).collect();
    for _ in 0..20 {
        let server = Server::start(&world);
        check(&server, &all, seed);
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let (done, ended) = mpsc::channel();
        for (n, known) in all.iter().cloned().enumerate() {
            let (acknowledged, address, seed) = (acknowledged.clone(), server.address, random.u64(..));
            let done = done.clone();
            thread::spawn(move || {
                publish(address, n, &known, &acknowledged, seed);
                done.send(()).unwrap();
            });
        }
        // Wherever the broker is after so many acknowledgements: mostly in the middle of a commit.
        let enough = random.usize(1..60);
        while acknowledged.load(Ordering::SeqCst) < enough {
            thread::yield_now();
        }
        server.kill();
        (0..PUBLISHERS).for_each(|_| ended.recv().unwrap());
    }
    let server = Server::start(&world);
    check(&server, &all, seed);
    assert!(all.iter().all(|known| known.lock().unwrap().sequence > 0));
}

#[test]
fn every_retained_message_is_served_again_after_a_stop() {
    let world = World::new();
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "writer");
    let bytes = package(50_000, 1);
    assert!(client.retain(&PackageId::Wheel(Digest::of(&bytes)).topic(), &bytes));
    assert!(client.retain("any/topic", b"small"));
    assert!(client.retain("cleared", b"x") && client.retain("cleared", b""));
    assert_eq!(server.stop("-TERM"), Some(0));
    let server = Server::start(&world);
    let mut client = Client::connect(server.address, "reader");
    assert_eq!(client.retained(&PackageId::Wheel(Digest::of(&bytes)).topic()).unwrap().payload, bytes);
    assert_eq!(client.retained("any/topic").unwrap().payload, b"small");
    assert_eq!(client.retained("cleared"), None);
}
