//! Readers of every speed at once: those that take all they are sent, those that take little, and those that
//! take nothing.

use std::{fs, net::SocketAddr, sync::Arc, time::Duration};

use mpypi_tests::{Client, Options, PATIENCE, Server, World};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::Barrier,
    task::JoinSet,
    time::{interval, timeout},
};

const FAST: usize = 600;
const SLOW: usize = 200;
const STUCK: usize = 200;
/// What each of them asks for, in bytes.
const PAYLOAD: usize = 1024 * 1024;
/// How long a reader may take nothing: a fifteenth of what it is outside of tests.
const STALL: Duration = Duration::from_secs(2);
/// What a slow reader takes in a second, in bytes: at the same scale 13 KB/s.
const SLOWLY: usize = 200_000;
/// How often it does.
const SIPS: usize = 20;
/// What a reader's socket holds, in bytes; the system doubles it.
const SOCKET: u32 = 32 * 1024;
/// What the broker may grow by, in KiB. All that they ask for together is a million.
const GROWTH: u64 = 48 * 1024;

async fn subscribed(to: SocketAddr, id: String) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(SOCKET).unwrap();
    let mut stream = socket.connect(to).await.unwrap();
    stream.write_all(&Client::connect_packet(&Options::id(&id))).await.unwrap();
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).await.unwrap();
    assert_eq!(connack[3], 0);
    stream
}

/// SUBSCRIBE to `large` at QoS 0.
const SUBSCRIBE: [u8; 12] = [0x82, 10, 0, 1, 0, 5, b'l', b'a', b'r', b'g', b'e', 0];

/// Reads all there is to come, at most `sip` bytes at each `pace`; how much that was.
async fn drink(stream: &mut TcpStream, sip: usize, pace: Option<Duration>) -> usize {
    let mut pace = pace.map(interval);
    let mut scratch = vec![0; sip];
    let mut taken = 0;
    while taken < PAYLOAD {
        if let Some(pace) = &mut pace {
            pace.tick().await;
        }
        match stream.read(&mut scratch).await {
            Ok(0) | Err(_) => break,
            Ok(count) => taken += count,
        }
    }
    taken
}

fn resident(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn stuck_readers_are_sent_away_slow_ones_stay_and_fast_ones_get_everything() {
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let world = World::new();
    let limits = format!("[limits]\nwrite_stall = {}\n", STALL.as_secs());
    world.write("broker.toml", limits);
    let server = Server::start_with(&world, &["--config", &world.text("broker.toml")]);
    let to = server.address;
    tokio::task::spawn_blocking(move || {
        assert!(Client::connect(to, "writer").retain("large", &[7; PAYLOAD]))
    })
    .await
    .unwrap();
    let before = resident(&server);

    let all = Arc::new(Barrier::new(FAST + SLOW + STUCK + 1));
    let (mut fast, mut slow, mut stuck) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
    for n in 0..FAST + SLOW + STUCK {
        let mut stream = subscribed(to, format!("reader-{n}")).await;
        let all = all.clone();
        let ask = async move {
            all.wait().await;
            stream.write_all(&SUBSCRIBE).await.unwrap();
            stream
        };
        if n < FAST {
            fast.spawn(async move { drink(&mut ask.await, 16 * 1024, None).await });
        } else if n < FAST + SLOW {
            let pace = Duration::from_secs(1) / SIPS as u32;
            slow.spawn(async move { drink(&mut ask.await, SLOWLY / SIPS, Some(pace)).await });
        } else {
            stuck.spawn(ask);
        }
    }
    all.wait().await;
    let fast = timeout(PATIENCE, fast.join_all()).await.expect("fast readers do not wait for others");
    assert!(fast.iter().all(|taken| *taken >= PAYLOAD), "a fast reader was sent away: {fast:?}");
    let grown = resident(&server).saturating_sub(before);
    let slow = timeout(PATIENCE, slow.join_all()).await.expect("slow readers get there");
    assert!(slow.iter().all(|taken| *taken >= PAYLOAD), "a slow reader was sent away: {slow:?}");
    // Long after the deadline: what was already on its way to the stuck ones comes, and then the end.
    for mut stream in stuck.join_all().await {
        let taken = timeout(PATIENCE, drink(&mut stream, 64 * 1024, None)).await.unwrap();
        assert!(taken < PAYLOAD, "a stuck reader was waited for");
    }
    println!("{grown} KiB for {} readers", FAST + SLOW + STUCK);
    assert!(grown < GROWTH, "{grown} KiB more");
    assert_eq!(server.stop("-TERM"), Some(0));
}
