//! A million hostile packets, while honest clients are served.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use bytes::BytesMut;
use mpypi_broker::{
    Limits,
    packet::{Framing, Version, decode, frame},
};
use mpypi_tests::{Client, Options, PATIENCE, Server, World, clock};

/// Packets that reach the broker's decoder, in all; `MPYPI_PACKETS` asks for another number.
const PACKETS: u64 = 1_000_000;
/// Connections that attack at once.
const ATTACKERS: usize = 3;
/// Packets on one connection, at most.
const BATCH: usize = 500;
/// Longest that an honest client waits for a round trip, on a machine as busy as this one.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// What the broker may hold in memory in the end, in KiB: the bus's log when it is full, and the database's cache. After
/// ten times as many packets it is no more.
const MEMORY: u64 = 128 * 1024;
/// Topics on which honest messages are retained.
const HONEST: u64 = 64;

/// The packets of one connection.
struct Batch<'r> {
    version: Version,
    random: &'r mut fastrand::Rng,
    bytes: Vec<u8>,
    packets: u64,
    pings: u64,
    last_id: u16,
}

impl Batch<'_> {
    fn new(version: Version, random: &mut fastrand::Rng) -> Batch<'_> {
        Batch { version, random, bytes: Vec::new(), packets: 0, pings: 0, last_id: 0 }
    }

    fn packet(&mut self, first: u8, body: &[u8]) {
        self.bytes.push(first);
        let mut length = body.len();
        loop {
            let more = if length > 0x7f { 0x80 } else { 0 };
            self.bytes.push((length & 0x7f) as u8 | more);
            length >>= 7;
            if length == 0 {
                break;
            }
        }
        self.bytes.extend(body);
        self.packets += 1;
    }

    fn connect(&mut self, id: &str) {
        let mut body = b"\0\x04MQTT".to_vec();
        body.extend(match self.version {
            Version::V3 => [4, 2, 0, 0].as_slice(),
            Version::V5 => &[5, 2, 0, 0, 0],
        });
        text(&mut body, id.as_bytes());
        self.packet(0x10, &body);
    }

    fn ping(&mut self) {
        self.packet(0xc0, &[]);
        self.pings += 1;
    }

    fn id(&mut self) -> u16 {
        self.last_id = self.last_id.checked_add(1).unwrap_or(1);
        self.last_id
    }

    /// Valid by the letter, and of a kind no honest client sends: the connection goes on after it.
    fn absurd(&mut self) {
        match self.random.u8(..100) {
            0..=29 => self.ping(),
            30..=49 => {
                let topic = self.topic();
                self.publish(0x30, &topic, None);
            }
            50..=64 => {
                let (topic, id) = (self.topic(), self.id());
                self.publish(0x32, &topic, Some(id));
                if self.random.bool() {
                    self.publish(0x3a, &topic, Some(id)); // again, as if there had been no answer
                }
            }
            65..=69 => {
                let (topic, id) = (self.topic(), self.id());
                self.publish(0x34, &topic, Some(id));
                self.publish(0x3c, &topic, Some(id));
                self.packet(0x62, &id.to_be_bytes());
                self.packet(0x62, &id.to_be_bytes());
            }
            70..=79 => {
                // Answers to what was never sent.
                let id = self.random.u16(1..);
                let first = if self.random.bool() { 0x40 } else { 0x62 };
                self.packet(first, &id.to_be_bytes());
            }
            80..=87 => self.filters(0x82, true),
            88..=94 => self.filters(0xa2, false),
            95 => {
                let topic = format!("flood/{}", self.random.u8(..16));
                let id = self.id();
                self.publish(0x33, topic.as_bytes(), Some(id));
            }
            // Refused, with a reason that only MQTT 5 has words for.
            _ if self.version == Version::V5 => {
                let topic = ["$SYS/x", "a/#", "mpypi/channels/dev", "mpypi/channels/no such", "+"];
                let topic = topic[self.random.usize(..topic.len())];
                let id = self.id();
                self.publish(0x33, topic.as_bytes(), Some(id));
            }
            _ => self.ping(),
        }
    }

    fn topic(&mut self) -> Vec<u8> {
        match self.random.u8(..8) {
            0 => "é/ß/🦀/\u{200f}x".into(),
            1 => b"/".repeat(self.random.usize(1..60)),
            2 => b"x".repeat(self.random.usize(1..1024)),
            3 => b"a/".repeat(60),
            4 => b" ".to_vec(),
            _ => format!("t/{}", self.random.u32(..)).into(),
        }
    }

    fn publish(&mut self, first: u8, topic: &[u8], id: Option<u16>) {
        let mut body = Vec::new();
        text(&mut body, topic);
        body.extend(id.iter().flat_map(|id| id.to_be_bytes()));
        if self.version == Version::V5 {
            let properties: &[u8] = match self.random.u8(..4) {
                0 => b"\x01\x01\x02\0\0\0\x01\x03\0\x01c\x08\0\x01r\x09\0\x01d\x26\0\0\0\0\x26\0\0\0\0",
                1 => b"\x02\0\0\0\0",
                _ => b"",
            };
            body.push(properties.len() as u8);
            body.extend(properties);
        }
        let most = if self.random.u8(..50) == 0 { 5000 } else { 20 };
        let size = self.random.usize(..most);
        body.resize(body.len() + size, b'x');
        self.packet(first, &body);
    }

    fn filters(&mut self, first: u8, options: bool) {
        const FILTERS: [&str; 8] =
            ["$share/g/a", "x/+/+/+/y", "+/é", "$SYS/#", "z/#", "/", "🦀/ /+", "+/+/+/+/+/+/+/+/+/+"];
        let id = self.id();
        let mut body = id.to_be_bytes().to_vec();
        if self.version == Version::V5 {
            body.push(0);
        }
        for _ in 0..self.random.usize(1..6) {
            text(&mut body, FILTERS[self.random.usize(..FILTERS.len())].as_bytes());
            if options {
                body.push(self.random.u8(..3));
            }
        }
        self.packet(first, &body);
    }

    /// Ends the connection: no broker may go on after it.
    fn fatal(&mut self) {
        let ends: [&[u8]; 16] = [
            &[0x82, 7, 0, 1, 0, 2, b'a', b'#', 0],
            &[0xa2, 4, 0, 1, 0, 0],
            &[0x00, 0],
            &[0x20, 2, 0, 0],
            &[0x90, 3, 0, 1, 0],
            &[0xd0, 0],
            &[0xf0, 0],
            &[0x36, 5, 0, 1, b'a', 0, 1],
            &[0x32, 5, 0, 1, b'a', 0, 0],
            &[0x80, 6, 0, 1, 0, 1, b'a', 0],
            &[0x30, 3, 0, 1, 0],
            &[0x30, 3, 0, 1, 0xff],
            &[0x32, 0xff, 0xff, 0xff, 0x7f],
            &[0x30, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[0x10, 0],
            &[0xe0, 0],
        ];
        self.bytes.extend(ends[self.random.usize(..ends.len())]);
        self.packets += 1;
    }

    /// Changes some bytes, and counts anew: only up to the first packet that is none.
    fn mutate(&mut self) {
        for _ in 0..self.random.usize(1..8) {
            let at = self.random.usize(..self.bytes.len());
            self.bytes[at] = self.random.u8(..);
        }
        let (limits, mut buffer) = (Limits::default(), BytesMut::from(&self.bytes[..]));
        self.packets = 0;
        while let Ok(Framing::Whole(frame)) = frame(&mut buffer, &limits) {
            self.packets += 1;
            if decode(frame, self.version, &limits).is_err() {
                return;
            }
        }
    }
}

fn text(body: &mut Vec<u8>, text: &[u8]) {
    body.extend((text.len() as u16).to_be_bytes());
    body.extend(text);
}

/// One connection, from its first byte to whichever end; returns how many packets the broker has read of it.
fn attack(to: SocketAddr, n: usize, random: &mut fastrand::Rng) -> u64 {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let version = if random.bool() { Version::V3 } else { Version::V5 };
    let kind = random.u8(..100);
    let mut batch = Batch::new(version, random);
    if kind < 5 {
        // A stranger, who says anything but CONNECT, or not all of it.
        batch.absurd();
        let cut = batch.random.usize(1..=batch.bytes.len());
        in_pieces(&mut stream, &batch.bytes[..cut], batch.random).ok();
        return end(stream, batch.random);
    }
    // Many share an id, and send each other away.
    let id = if kind < 10 { "shared".to_owned() } else { format!("attacker-{n}") };
    batch.connect(&id);
    let count = batch.random.usize(1..BATCH);
    (0..count).for_each(|_| batch.absurd());
    if kind < 25 {
        batch.mutate();
        in_pieces(&mut stream, &batch.bytes, batch.random).ok();
        let packets = batch.packets;
        end(stream, batch.random);
        return packets;
    }
    if kind < 30 {
        // A flood of which no answer is read; a reset in the middle of it.
        stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        batch.filters(0x82, true);
        let sent = in_pieces(&mut stream, &batch.bytes, batch.random);
        reset(&stream);
        return if sent.is_ok() { 1 } else { 0 };
    }
    batch.ping();
    if in_pieces(&mut stream, &batch.bytes, batch.random).is_err() {
        return 0;
    }
    // Every ping is answered, so everything before the last of them has been read.
    let answered = answers(&mut stream, batch.pings);
    assert!(
        answered || kind < 10,
        "a packet that is absurd but valid ended the connection: {:x?}",
        &batch.bytes
    );
    let packets = if answered { batch.packets } else { 0 };
    batch.bytes.clear();
    batch.fatal();
    in_pieces(&mut stream, &batch.bytes, batch.random).ok();
    packets + 1 + end(stream, batch.random)
}

/// Writes in fragments that no packet boundary knows of.
fn in_pieces(stream: &mut TcpStream, bytes: &[u8], random: &mut fastrand::Rng) -> std::io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let most = if random.u8(..4) == 0 { 8 } else { 8192 };
        let (piece, later) = rest.split_at(rest.len().min(random.usize(1..most)));
        stream.write_all(piece)?;
        rest = later;
    }
    Ok(())
}

/// Reads answers until so many pings are answered; false if the broker ends it before.
fn answers(stream: &mut TcpStream, mut pings: u64) -> bool {
    let mut scratch = vec![0; 64 * 1024];
    let mut rest = Vec::new();
    while pings > 0 {
        match stream.read(&mut scratch) {
            Ok(0) => return false,
            Ok(count) => rest.extend_from_slice(&scratch[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("no answer to a ping"),
            Err(_) => return false,
        }
        let mut at = 0;
        while let Some(length) = packet_length(&rest[at..]).filter(|length| at + length <= rest.len()) {
            pings = pings.saturating_sub(u64::from(rest[at] == 0xd0));
            at += length;
        }
        rest.drain(..at);
    }
    true
}

/// How many bytes the packet has that `bytes` begin with, if its header is whole.
fn packet_length(bytes: &[u8]) -> Option<usize> {
    let header = bytes.get(1..)?.iter().position(|byte| byte & 0x80 == 0)?;
    let digits = bytes[1..=header + 1].iter().enumerate();
    let body: usize = digits.map(|(place, byte)| usize::from(byte & 0x7f) << (7 * place)).sum();
    Some(header + 2 + body)
}

/// Leaves in one of the ways that clients leave. Half closed, it waits for the broker to close the other half.
fn end(mut stream: TcpStream, random: &mut fastrand::Rng) -> u64 {
    match random.u8(..4) {
        0 => reset(&stream),
        1 => {
            stream.shutdown(Shutdown::Write).ok();
            let mut rest = Vec::new();
            if let Err(error) = stream.read_to_end(&mut rest) {
                assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the broker does not close");
            }
        }
        _ => {}
    }
    0
}

fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok();
}

/// Publishes and receives until told to stop; the longest round trip, and what was acknowledged last.
fn honest(to: SocketAddr, stop: &AtomicBool) -> (Duration, u64, BTreeMap<String, Vec<u8>>) {
    let mut reader = Client::connect(to, "honest-reader");
    reader.subscribe("honest/+", 1);
    let mut writer = Client::connect(to, "honest-writer");
    let (mut longest, mut trips, mut kept) = (Duration::ZERO, 0, BTreeMap::new());
    while !stop.load(Ordering::SeqCst) {
        let (topic, payload) = (format!("honest/{}", trips % HONEST), trips.to_string().into_bytes());
        let started = clock();
        assert!(writer.retain(&topic, &payload), "an honest message was refused");
        let received = reader.message().expect("an honest subscriber stays");
        assert_eq!((&received.topic, &received.payload), (&topic, &payload));
        longest = longest.max(started.elapsed());
        kept.insert(topic, payload);
        trips += 1;
    }
    (longest, trips, kept)
}

fn resident(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn open_files(server: &Server) -> usize {
    fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count()
}

#[cfg(target_os = "linux")]
#[test]
fn a_million_hostile_packets_kill_nothing_leak_nothing_and_hold_up_nobody() {
    let seed = std::env::var("MPYPI_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    let packets = std::env::var("MPYPI_PACKETS").map_or(PACKETS, |packets| packets.parse().unwrap());
    println!("MPYPI_SEED={seed}");
    let world = World::new();
    let mut server = Server::start(&world);
    let address = server.address;
    let before = open_files(&server);
    let (sent, connections, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let started = clock();
    let (longest, trips, kept) = thread::scope(|scope| {
        let good = scope.spawn(|| honest(address, &stop));
        let attackers: Vec<_> = (0..ATTACKERS)
            .map(|n| {
                let (sent, connections) = (&sent, &connections);
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed.wrapping_add(n as u64));
                    while sent.load(Ordering::SeqCst) < packets {
                        let count = attack(address, n, &mut random);
                        connections.fetch_add(1, Ordering::SeqCst);
                        sent.fetch_add(count, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let outcomes: Vec<_> = attackers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        stop.store(true, Ordering::SeqCst);
        let good = good.join().unwrap();
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
        good
    });
    assert!(server.is_running());
    let mut last = Client::connect(address, "last");
    let ended = clock();
    // Each answer gives the broker time to let go of those who have left.
    while open_files(&server) > before + 1 {
        last.ping();
        assert!(ended.elapsed() < PATIENCE, "{} files are open, {before} were", open_files(&server));
    }
    let memory = resident(&server);
    println!(
        "{sent:?} packets on {connections:?} connections in {:?}; {trips} honest round trips, the longest {longest:?}; \
         {memory} KiB in the end",
        started.elapsed()
    );
    assert!(longest < LONGEST_WAIT, "an honest client waited for {longest:?}");
    assert!(memory < MEMORY, "the broker holds {memory} KiB");
    for (topic, payload) in &kept {
        assert_eq!(&last.retained(topic).expect("what was acknowledged is there").payload, payload);
    }
    let (_, code) = Client::try_connect(address, &Options::id("shared")).unwrap();
    assert_eq!(code, 0, "an id that was fought over is free again");
}
