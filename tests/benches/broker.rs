//! Our broker beside mosquitto, one after the other in the same run, round after round; prints medians, of the
//! ratios too. `make bench`; `-- --quick` for a minute instead of ten, `-- fan-out` for the rows that say so.
//!
//! Ours syncs every acknowledged publish to disk; mosquitto keeps its messages in memory, but where a row says
//! otherwise. A raw sink, which writes the same bytes to the same sockets and does nothing else, shows what the
//! machine gives: its CPU, nearly all of it the kernel's, is what no broker on these sockets can do without.

#![allow(clippy::unwrap_used, reason = "a benchmark that fails should fail where it stands")]
#![expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]

use std::{
    env, fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    ops::Sub,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use mpypi_protocol::{Digest, PackageId};
use mpypi_tests::{Client, Options, Server, World};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Barrier,
    task::JoinSet,
};

/// What one server did in one round.
#[derive(Debug, Clone, Copy)]
struct Figure {
    value: f64,
    cpu: Cpu,
    /// Its peak memory in MiB.
    peak: f64,
}

/// CPU time of a process, in seconds.
#[derive(Debug, Clone, Copy, Default)]
struct Cpu {
    all: f64,
    /// Of the clock's ticks that hit it, how many found it in the kernel: a share, where there are enough.
    ticks: f64,
    kernel: f64,
}

impl Cpu {
    /// What a process has used so far.
    fn of(pid: u32) -> Cpu {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let (user, kernel): (f64, f64) = (fields[11].parse().unwrap(), fields[12].parse().unwrap());
        // To the nanosecond; a tick is 10 ms, as long as some rows take.
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let nanoseconds: f64 = tasks
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
            .map(|text| text.split_whitespace().next().unwrap().parse::<f64>().unwrap())
            .sum();
        Cpu { all: nanoseconds / 1e9, ticks: user + kernel, kernel }
    }

    /// How much of it the kernel took, in percent.
    fn in_kernel(self) -> String {
        /// With fewer ticks the share means nothing.
        const ENOUGH: f64 = 10.0;
        if self.ticks < ENOUGH { "-".into() } else { format!("{:.0} %", 100.0 * self.kernel / self.ticks) }
    }
}

impl Sub for Cpu {
    type Output = Cpu;

    fn sub(self, before: Cpu) -> Cpu {
        Cpu {
            all: self.all - before.all,
            ticks: self.ticks - before.ticks,
            kernel: self.kernel - before.kernel,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ours,
    Mosquitto,
}

/// Where mosquitto keeps what it acknowledges.
#[derive(Debug, Clone, Copy)]
enum Keeping {
    /// On disk, as it can: it writes all it has after each change.
    OnDisk,
    InMemory,
}

/// A row of the table.
struct Row {
    name: String,
    unit: &'static str,
    /// Whether more is better.
    more: bool,
    run: Box<dyn Fn(Kind) -> Figure>,
    /// The same without a broker, in the same unit.
    raw: Option<Box<dyn Fn() -> Figure>>,
    /// What the servers' CPU seconds are counted by, and what that gives.
    cpu_per: Option<(f64, &'static str)>,
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "sink") {
        return block_on(sink(arguments[1].parse().unwrap()));
    }
    if arguments.first().is_some_and(|first| first == "pusher") {
        return block_on(pusher(arguments[1].parse().unwrap()));
    }
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let wanted: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let rounds = if quick { 1 } else { 3 };
    println!(
        "{:<52} {:>9} {:>9} {:>7} {:>8} {:>7}  cpu, in the kernel, peak MiB: ours | mosquitto | raw",
        "", "ours", "mosquitto", "ratio", "raw", "of raw"
    );
    for row in rows(quick) {
        if !wanted.is_empty() && !wanted.iter().any(|word| row.name.contains(word.as_str())) {
            continue;
        }
        let (mut ours, mut theirs, mut raw) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.push((row.run)(Kind::Ours));
            theirs.push((row.run)(Kind::Mosquitto));
            raw.extend(row.raw.as_ref().map(|raw| raw()));
        }
        // How much better ours is, whichever way better lies; round by round, since the machine has its moods.
        let better = |others: &[Figure]| {
            let pairs = ours.iter().zip(others);
            let ratio = |(ours, others): (&Figure, &Figure)| match row.more {
                true => ours.value / others.value,
                false => others.value / ours.value,
            };
            middle(pairs.map(ratio).collect())
        };
        let of_raw = if raw.is_empty() { String::new() } else { format!("{:.2}", better(&raw)) };
        let ratio = better(&theirs);
        let cpu = |figure: Figure| {
            let (count, unit) = row.cpu_per.unwrap_or((1.0, "s"));
            format!("{:.2} {unit}, {}, {:.0}", figure.cpu.all / count, figure.cpu.in_kernel(), figure.peak)
        };
        let raw = (!raw.is_empty()).then(|| median(raw));
        let (ours, theirs) = (median(ours), median(theirs));
        println!(
            "{:<52} {:>9.2} {:>9.2} {ratio:>6.2}× {:>8} {of_raw:>7}  {} | {}{}",
            format!("{}, {}", row.name, row.unit),
            ours.value,
            theirs.value,
            raw.map(|raw| format!("{:.2}", raw.value)).unwrap_or_default(),
            cpu(ours),
            cpu(theirs),
            raw.map(|raw| format!(" | {}", cpu(raw))).unwrap_or_default(),
        );
    }
}

fn rows(quick: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for (connections, messages) in
        [(1, if quick { 500 } else { 2000 }), (16, if quick { 4000 } else { 16_000 })]
    {
        for (name, keeping) in [("kept on disk", Keeping::OnDisk), ("theirs in memory", Keeping::InMemory)] {
            rows.push(Row {
                name: format!("publish 1 KiB, {name}, {connections} at once"),
                unit: "1/s",
                more: true,
                run: Box::new(move |kind| publish(kind, keeping, connections, messages)),
                raw: None,
                cpu_per: Some((messages as f64 / 1e6, "µs each")),
            });
        }
    }
    let sizes: &[usize] = if quick { &[256] } else { &[64, 256, 1024] };
    for &clients in if quick { &[200][..] } else { &[100, 1000] } {
        for &kib in sizes {
            rows.push(Row {
                name: format!("retained fan-out {kib} KiB × {clients}"),
                unit: "MB/s",
                more: true,
                run: Box::new(move |kind| retained(kind, clients, kib * 1024)),
                raw: Some(Box::new(move || raw_sink(clients, kib * 1024))),
                cpu_per: Some(((clients * kib * 1024) as f64 / 1e9, "s/GB")),
            });
        }
    }
    for &clients in if quick { &[500][..] } else { &[1000, 5000, 10_000] } {
        rows.push(Row {
            name: format!("push of 2 KiB × {clients}"),
            unit: "ms to the last",
            more: false,
            run: Box::new(move |kind| push(kind, clients)),
            raw: Some(Box::new(move || raw_push(clients))),
            cpu_per: Some(((clients * PUSHES) as f64 / 1e6, "µs each")),
        });
    }
    let clients = if quick { 1000 } else { 10_000 };
    rows.push(Row {
        name: format!("idle connection, {clients}"),
        unit: "KiB each",
        more: false,
        run: Box::new(move |kind| idle(kind, clients)),
        raw: None,
        cpu_per: None,
    });
    rows.push(Row {
        name: format!("connects, {clients}"),
        unit: "1/s",
        more: true,
        run: Box::new(move |kind| connects(kind, clients)),
        raw: None,
        cpu_per: Some((clients as f64 / 1e6, "µs each")),
    });
    let messages = if quick { 1000 } else { 10_000 };
    for (name, end) in [
        ("stopped", End::Stopped),
        ("ours killed while it writes", End::Killed(Duration::ZERO)),
        ("ours killed at rest", End::Killed(REST)),
    ] {
        rows.push(Row {
            name: format!("restart with {messages} of 4 KiB, {name}"),
            unit: "ms to the first",
            more: false,
            run: Box::new(move |kind| restart(kind, messages, end)),
            raw: None,
            cpu_per: None,
        });
    }
    rows
}

/// A broker in a world of its own.
struct Bench {
    server: Server,
    _world: World,
}

impl Bench {
    fn start(kind: Kind) -> Bench {
        Bench::start_keeping(kind, Keeping::InMemory)
    }

    /// Ours keeps on disk whatever it acknowledges, always.
    fn start_keeping(kind: Kind, theirs: Keeping) -> Bench {
        let world = World::new();
        let server = match (kind, theirs) {
            (Kind::Ours, _) => Server::start(&world),
            (Kind::Mosquitto, Keeping::InMemory) => Server::mosquitto(&world),
            (Kind::Mosquitto, Keeping::OnDisk) => {
                let settings = "persistence true\nautosave_on_changes true\nautosave_interval 1\n";
                Server::mosquitto_with(&world, settings)
            }
        };
        Bench { server, _world: world }
    }

    /// What it did since it had used `before`.
    fn figure(&self, value: f64, before: Cpu) -> Figure {
        figure(self.server.pid(), value, before)
    }

    /// CPU time so far.
    fn cpu(&self) -> Cpu {
        Cpu::of(self.server.pid())
    }

    /// Resident memory in KiB.
    fn memory(&self) -> f64 {
        field(&fs::read_to_string(format!("/proc/{}/status", self.server.pid())).unwrap(), "VmRSS:")
    }
}

/// What a process did since it had used `before`.
fn figure(pid: u32, value: f64, before: Cpu) -> Figure {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    Figure { value, cpu: Cpu::of(pid) - before, peak: field(&status, "VmHWM:") / 1024.0 }
}

fn field(status: &str, name: &str) -> f64 {
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn median(mut all: Vec<Figure>) -> Figure {
    all.sort_by(|a, b| a.value.total_cmp(&b.value));
    all[all.len() / 2]
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(work)
}

/// Closed connections keep their ports for a minute: each thousand clients come from an address of their own.
async fn open(to: SocketAddr) -> TcpStream {
    static OPENED: AtomicUsize = AtomicUsize::new(0);
    let thousands = OPENED.fetch_add(1, Ordering::Relaxed) / 1000;
    let socket = TcpSocket::new_v4().unwrap();
    let from = format!("127.{}.{}.1:0", 1 + thousands / 250 % 250, thousands % 250);
    socket.bind(from.parse().unwrap()).unwrap();
    let stream = socket.connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

async fn connect(to: SocketAddr, n: usize) -> TcpStream {
    let mut stream = open(to).await;
    stream.write_all(&Client::connect_packet(&Options::id(&format!("bench-{n}")))).await.unwrap();
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).await.unwrap();
    assert_eq!(connack[3], 0);
    stream
}

/// SUBSCRIBE at QoS 1.
fn subscribe(topic: &str) -> Vec<u8> {
    let length = u8::try_from(topic.len()).unwrap();
    [&[0x82, length + 5, 0, 1, 0, length], topic.as_bytes(), &[1]].concat()
}

/// Reads and throws away so many bytes.
async fn swallow(stream: &mut TcpStream, mut bytes: usize) {
    let mut scratch = vec![0; bytes.min(64 * 1024)];
    while bytes > 0 {
        let count = stream.read(&mut scratch).await.unwrap();
        assert!(count > 0, "closed with {bytes} bytes to come");
        bytes = bytes.saturating_sub(count);
    }
}

fn publish(kind: Kind, keeping: Keeping, connections: usize, messages: usize) -> Figure {
    /// Messages under way on each connection.
    const WINDOW: usize = 20;
    let bench = Bench::start_keeping(kind, keeping);
    let address = bench.server.address;
    let (before, started) = (bench.cpu(), Instant::now());
    let threads: Vec<_> = (0..connections)
        .map(|n| {
            std::thread::spawn(move || {
                let mut client = Client::connect(address, &format!("publisher-{n}"));
                for message in 0..messages / connections {
                    client.post(&format!("bench/{n}/{message}"), &[b'x'; 1024], 1, true).unwrap();
                    if message >= WINDOW {
                        client.acknowledged().unwrap();
                    }
                }
                (0..WINDOW).for_each(|_| assert!(client.acknowledged().is_some()));
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    bench.figure(messages as f64 / started.elapsed().as_secs_f64(), before)
}

fn retained(kind: Kind, clients: usize, size: usize) -> Figure {
    let bench = Bench::start(kind);
    let payload = vec![7; size];
    let topic = PackageId::Wheel(Digest::of(&payload)).topic();
    assert!(Client::connect(bench.server.address, "publisher").retain(&topic, &payload));
    let ask = Arc::new(subscribe(&topic));
    block_on(all_read(bench.server.address, bench.server.pid(), clients, ask, size))
}

/// Connects all clients, then has all ask at once; MB/s until the last has `size` bytes, and what that took the
/// server.
async fn all_read(to: SocketAddr, pid: u32, clients: usize, ask: Arc<Vec<u8>>, size: usize) -> Figure {
    let barrier = Arc::new(Barrier::new(clients + 1));
    let mut tasks = JoinSet::new();
    for n in 0..clients {
        let (barrier, ask) = (barrier.clone(), ask.clone());
        let mut stream = if ask[0] == 0x82 { connect(to, n).await } else { open(to).await };
        tasks.spawn(async move {
            barrier.wait().await;
            stream.write_all(&ask).await.unwrap();
            swallow(&mut stream, size).await;
            stream
        });
    }
    let before = Cpu::of(pid);
    barrier.wait().await;
    let started = Instant::now();
    let streams = tasks.join_all().await;
    let seconds = started.elapsed().as_secs_f64();
    let figure = figure(pid, (clients * size) as f64 / 1e6 / seconds, before);
    drop(streams);
    figure
}

/// This program as a server that does one thing only; what `work` made of its address and process.
fn with_raw<T>(what: &str, size: usize, work: impl FnOnce(SocketAddr, u32) -> T) -> T {
    let mut child = Command::new(env::current_exe().unwrap())
        .args([what, &size.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let done = work(line.trim().parse().unwrap(), child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    done
}

fn raw_sink(clients: usize, size: usize) -> Figure {
    with_raw("sink", size, |to, pid| block_on(all_read(to, pid, clients, Arc::new(vec![0]), size)))
}

/// Milliseconds until the last of all clients has 2 KiB that somebody who does nothing else sends them.
fn raw_push(clients: usize) -> Figure {
    /// What a PUBLISH of the list takes.
    const SIZE: usize = 2060;
    with_raw("pusher", SIZE, |to, pid| {
        block_on(async {
            let barrier = Arc::new(Barrier::new(clients + 1));
            let mut tasks = JoinSet::new();
            for _ in 0..clients {
                let mut stream = open(to).await;
                stream.write_all(&[0]).await.unwrap();
                let barrier = barrier.clone();
                tasks.spawn(async move {
                    for _ in 0..=PUSHES {
                        swallow(&mut stream, SIZE).await;
                        barrier.wait().await;
                    }
                });
            }
            let push = async || {
                let mut trigger = open(to).await;
                let started = Instant::now();
                trigger.write_all(&[1]).await.unwrap();
                barrier.wait().await;
                started.elapsed().as_secs_f64() * 1000.0
            };
            // Once before it counts: then it has accepted everyone.
            push().await;
            let before = Cpu::of(pid);
            let mut figures = Vec::new();
            for _ in 0..PUSHES {
                figures.push(push().await);
            }
            tasks.join_all().await;
            figure(pid, middle(figures), before)
        })
    })
}

/// Writes `size` bytes to everyone who has sent a 0 when somebody sends a 1.
async fn pusher(size: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let payload = vec![7; size];
    let mut streams = Vec::new();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        if stream.read_u8().await.unwrap() == 0 {
            streams.push(stream);
            continue;
        }
        for stream in &mut streams {
            stream.write_all(&payload).await.unwrap();
        }
    }
}

/// Writes `size` bytes to everyone who sends one.
async fn sink(size: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let payload: &'static [u8] = vec![7; size].leak();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        tokio::spawn(async move {
            let mut ask = [0];
            if stream.read_exact(&mut ask).await.is_ok() {
                stream.write_all(payload).await.ok();
                stream.read_exact(&mut ask).await.ok(); // until it closes
            }
        });
    }
}

/// Lists pushed one after the other to the same clients.
const PUSHES: usize = 5;

fn push(kind: Kind, clients: usize) -> Figure {
    let bench = Bench::start(kind);
    let to = bench.server.address;
    let list = |n| format!(r#"[{{"type":"note","text":"{}{n}"}}]"#, "x".repeat(2000));
    let mut publisher = Client::connect(to, "publisher");
    let (figures, cpu) = block_on(async {
        // Something retained, so that both brokers answer the subscription.
        assert!(publisher.retain("mpypi/channels/bench", b"[]"));
        let ask = subscribe("mpypi/channels/bench");
        let barrier = Arc::new(Barrier::new(clients + 1));
        let mut tasks = JoinSet::new();
        for n in 0..clients {
            let mut stream = connect(to, n).await;
            stream.write_all(&ask).await.unwrap();
            // 3 bytes of header, 2 of length, 20 of topic, 2 of id.
            let (barrier, size) = (barrier.clone(), 27 + list(0).len());
            tasks.spawn(async move {
                // SUBACK, and the list that is there, whose header has a byte less.
                swallow(&mut stream, 5 + 28).await;
                barrier.wait().await;
                for _ in 0..PUSHES {
                    swallow(&mut stream, size).await;
                    barrier.wait().await;
                }
                stream
            });
        }
        barrier.wait().await;
        let cpu = bench.cpu();
        let mut figures = Vec::new();
        for n in 0..PUSHES {
            let started = Instant::now();
            let list = list(n);
            tokio::task::block_in_place(|| {
                assert!(publisher.retain("mpypi/channels/bench", list.as_bytes()))
            });
            barrier.wait().await;
            figures.push(started.elapsed().as_secs_f64() * 1000.0);
        }
        drop(tasks.join_all().await);
        (figures, cpu)
    });
    bench.figure(middle(figures), cpu)
}

fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// How a broker of ours ends. mosquitto always stops in peace, since it would have nothing left otherwise.
#[derive(Debug, Clone, Copy)]
enum End {
    Stopped,
    /// So long after it has written the last message.
    Killed(Duration),
}

/// After which our index is at rest, some to spare.
const REST: Duration = Duration::from_secs(4);

/// Milliseconds from the start of a broker that holds so many messages to one of them in a client's hands.
fn restart(kind: Kind, messages: usize, end: End) -> Figure {
    let world = World::new();
    let start = || match kind {
        Kind::Ours => Server::start(&world),
        Kind::Mosquitto => Server::mosquitto_with(&world, "persistence true\n"),
    };
    let server = start();
    let mut client = Client::connect(server.address, "publisher");
    for n in 0..messages {
        client.post(&format!("bench/{n}"), &[b'x'; 4096], 1, true).unwrap();
        if n >= 50 {
            client.acknowledged().unwrap();
        }
    }
    (0..messages.min(50)).for_each(|_| assert!(client.acknowledged().is_some()));
    drop(client);
    match (kind, end) {
        (Kind::Ours, End::Killed(after)) => {
            std::thread::sleep(after);
            server.kill();
        }
        _ => assert_eq!(server.stop("-TERM"), Some(0)),
    }
    let started = Instant::now();
    let server = start();
    let found = Client::connect(server.address, "reader").retained("bench/0");
    assert_eq!(found.unwrap().payload.len(), 4096);
    let elapsed = started.elapsed().as_secs_f64() * 1000.0;
    Bench { server, _world: World::new() }.figure(elapsed, Cpu::default())
}

fn idle(kind: Kind, clients: usize) -> Figure {
    let bench = Bench::start(kind);
    let (cpu, before) = (bench.cpu(), bench.memory());
    let each = block_on(async {
        let mut streams = Vec::with_capacity(clients);
        for n in 0..clients {
            streams.push(connect(bench.server.address, n).await);
        }
        (bench.memory() - before) / clients as f64
    });
    bench.figure(each, cpu)
}

fn connects(kind: Kind, clients: usize) -> Figure {
    /// Connects under way at once.
    const AT_ONCE: usize = 50;
    let bench = Bench::start(kind);
    let (cpu, to) = (bench.cpu(), bench.server.address);
    let seconds = block_on(async move {
        let started = Instant::now();
        let mut tasks = JoinSet::new();
        for worker in 0..AT_ONCE {
            tasks.spawn(async move {
                let mut streams = Vec::new();
                for n in (worker..clients).step_by(AT_ONCE) {
                    streams.push(connect(to, n).await);
                }
                streams
            });
        }
        let streams = tasks.join_all().await;
        let seconds = started.elapsed().as_secs_f64();
        drop(streams);
        // Let the server see them go before it is measured.
        tokio::time::sleep(Duration::from_millis(10)).await;
        seconds
    });
    bench.figure(clients as f64 / seconds, cpu)
}
