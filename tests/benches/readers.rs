//! What readers that take little or nothing cost those that take all they get: 600 fast readers alone, then beside
//! 200 that read 10 KB/s and 200 that read nothing; round after round, medians. `cargo bench --bench readers`.
//!
//! Then it waits until the broker has sent the stuck ones away, and sees that the slow ones are still there.

#![allow(clippy::unwrap_used, reason = "a benchmark that fails should fail where it stands")]
#![expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]

use std::{env, fs, net::SocketAddr, sync::Arc, time::Duration};

use mpypi_broker::Limits;
use mpypi_tests::{Client, Options, Server, World};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::Barrier,
    task::JoinSet,
    time::{Instant, interval, sleep},
};

const FAST: usize = 600;
const SLOW: usize = 200;
const STUCK: usize = 200;
/// What each of them asks for, in bytes.
const PAYLOAD: usize = 2 * 1024 * 1024;
/// What a slow reader takes in a second, in bytes.
const SLOWLY: usize = 10_000;
/// What the socket of a slow or stuck reader holds, in bytes.
const SOCKET: u32 = 32 * 1024;
/// SUBSCRIBE to `large` at QoS 0.
const SUBSCRIBE: [u8; 12] = [0x82, 10, 0, 1, 0, 5, b'l', b'a', b'r', b'g', b'e', 0];

fn main() {
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let rounds = if env::args().any(|argument| argument == "--quick") { 3 } else { 7 };
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(run(rounds));
}

async fn run(rounds: usize) {
    let world = World::new();
    let mut server = Server::start(&world);
    let to = server.address;
    let payload = vec![7; PAYLOAD];
    tokio::task::block_in_place(|| assert!(Client::connect(to, "writer").retain("large", &payload)));
    // Alone and beside the others by turns, so that whatever else the machine does hits both.
    let (mut alone, mut beside, mut last) = (Vec::new(), Vec::new(), Others::default());
    for round in 0..rounds {
        alone.push(fast(to).await);
        last = Others::start(to, round).await;
        beside.push(fast(to).await);
        if round + 1 < rounds {
            drop(std::mem::take(&mut last));
            // Until the broker has seen them go.
            while open_files(&server) > 100 {
                sleep(Duration::from_millis(10)).await;
            }
        }
    }
    alone.sort_by(f64::total_cmp);
    beside.sort_by(f64::total_cmp);
    let (alone, beside) = (alone[rounds / 2], beside[rounds / 2]);
    let megabytes = (FAST * PAYLOAD) as f64 / 1e6;
    println!("{FAST} readers of {PAYLOAD} bytes");
    println!("  alone                              {alone:.2} s, {:.0} MB/s", megabytes / alone);
    println!("  beside {SLOW} slow and {STUCK} stuck ones   {beside:.2} s, {:.0} MB/s", megabytes / beside);
    println!("  ratio                              {:.3}", beside / alone);
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    println!("  {peak}");
    // The write deadline, and half of it again for a slow machine.
    let patience = Limits::default().write_stall * 3 / 2;
    println!("{} s later:", patience.as_secs());
    sleep(patience).await;
    let slow = last.slow.iter().filter(|reader| !reader.is_finished()).count();
    let mut sent_away = 0;
    for stream in &mut last.stuck {
        sent_away += usize::from(drained(stream).await < PAYLOAD);
    }
    println!("  {slow} of {SLOW} slow readers are there, {sent_away} of {STUCK} stuck ones were sent away");
    assert!(server.is_running());
}

fn open_files(server: &Server) -> usize {
    fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count()
}

async fn connect(to: SocketAddr, id: String, socket: Option<u32>) -> TcpStream {
    let stream = TcpSocket::new_v4().unwrap();
    if let Some(size) = socket {
        stream.set_recv_buffer_size(size).unwrap();
    }
    let mut stream = stream.connect(to).await.unwrap();
    stream.write_all(&Client::connect_packet(&Options::id(&id))).await.unwrap();
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).await.unwrap();
    stream
}

/// Seconds until all fast readers have everything.
async fn fast(to: SocketAddr) -> f64 {
    let start = Arc::new(Barrier::new(FAST + 1));
    let mut readers = JoinSet::new();
    for n in 0..FAST {
        let mut stream = connect(to, format!("fast-{n}"), None).await;
        let start = start.clone();
        readers.spawn(async move {
            start.wait().await;
            stream.write_all(&SUBSCRIBE).await.unwrap();
            assert!(drained(&mut stream).await >= PAYLOAD, "a fast reader was sent away");
        });
    }
    start.wait().await;
    let started = Instant::now();
    readers.join_all().await;
    started.elapsed().as_secs_f64()
}

/// Reads until there is as much as was asked for, or no more.
async fn drained(stream: &mut TcpStream) -> usize {
    let mut scratch = vec![0; 64 * 1024];
    let mut taken = 0;
    while taken < PAYLOAD {
        match stream.read(&mut scratch).await {
            Ok(0) | Err(_) => break,
            Ok(count) => taken += count,
        }
    }
    taken
}

/// Readers that take little or nothing.
#[derive(Default)]
struct Others {
    slow: Vec<tokio::task::JoinHandle<()>>,
    stuck: Vec<TcpStream>,
}

impl Others {
    async fn start(to: SocketAddr, round: usize) -> Others {
        let mut others = Others::default();
        for n in 0..SLOW + STUCK {
            let mut stream = connect(to, format!("other-{round}-{n}"), Some(SOCKET)).await;
            stream.write_all(&SUBSCRIBE).await.unwrap();
            if n < STUCK {
                others.stuck.push(stream);
                continue;
            }
            others.slow.push(tokio::spawn(async move {
                /// Sips in a second.
                const SIPS: u32 = 10;
                let mut pace = interval(Duration::from_secs(1) / SIPS);
                let mut scratch = vec![0; SLOWLY / SIPS as usize];
                loop {
                    pace.tick().await;
                    if !matches!(stream.read(&mut scratch).await, Ok(1..)) {
                        return;
                    }
                }
            }));
        }
        others
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        self.slow.iter().for_each(tokio::task::JoinHandle::abort);
    }
}
