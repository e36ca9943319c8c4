//! What devices with ThingsBoard's API cost: 500 that download 1 MiB at once in pieces of 16 KiB, beside as many that
//! fetch the same package as ours do; then 1,000 that poll over HTTP without a pause. `cargo bench --bench things`.

#![allow(clippy::unwrap_used, reason = "a benchmark that fails should fail where it stands")]
#![expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]

use std::{env, fs, net::SocketAddr, sync::Arc, time::Duration};

use mpypi_protocol::{Digest, PackageId};
use mpypi_tests::{Client, Options, Server, World, run};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Barrier,
    task::JoinSet,
    time::{Instant, timeout},
};

const DEVICES: usize = 500;
const IMAGE: usize = 1024 * 1024;
const PIECE: usize = 16 * 1024;
const POLLERS: usize = 1000;

fn main() {
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let quick = env::args().any(|argument| argument == "--quick");
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(measure(quick));
}

async fn measure(quick: bool) {
    let world = World::new();
    let image: Arc<Vec<u8>> = {
        let mut random = fastrand::Rng::with_seed(7);
        Arc::new((0..IMAGE).map(|_| random.u8(..)).collect())
    };
    let list: String = (0..POLLERS).map(|n| format!("thing-{n},dev\n")).collect();
    let list = world.write("list.csv", list);
    let data = world.text("data");
    let import = ["device", "import", list.to_str().unwrap(), "--data", &data];
    let made = run("mpypi-broker", &import).expect_code(0).stdout;
    let tokens: Vec<String> = made.lines().map(|line| line.split_once(',').unwrap().1.to_owned()).collect();
    let server = Server::start_with(&world, &["--http", "127.0.0.1:0"]);
    world.write("dev/channel.toml", "version = \"1.10\"\n");
    world.write("dev/firmware/thing.bin", image.as_slice());
    run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);

    let before = memory(&server, "VmRSS:");
    println!("{DEVICES} devices, {IMAGE} bytes each");
    for round in 0..if quick { 1 } else { 3 } {
        let pieces = pieces(server.address, &tokens[..DEVICES], &image).await;
        let whole = whole(server.address, round, &image).await;
        let rate = |seconds: f64| (DEVICES * IMAGE) as f64 / 1e6 / seconds;
        println!("  in pieces of {PIECE}   {pieces:.2} s, {:.0} MB/s", rate(pieces));
        println!("  as ours fetch it     {whole:.2} s, {:.0} MB/s", rate(whole));
    }
    println!("  memory: {before} kB before, {} kB at most", memory(&server, "VmHWM:"));

    let seconds = if quick { 10 } else { 30 };
    let (cores, answers) = poll(&server, &tokens, Duration::from_secs(seconds)).await;
    println!("{POLLERS} devices that poll without a pause, {seconds} s");
    println!("  {:.0} answers/s, {cores:.2} of a core", answers as f64 / seconds as f64);
}

/// A number of kB in the broker's status.
fn memory(server: &Server, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Seconds of processor time that the broker has used.
fn processor(server: &Server) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", server.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}

async fn connect(to: SocketAddr, options: &Options) -> TcpStream {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(&Client::connect_packet(options)).await.unwrap();
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).await.unwrap();
    assert_eq!(connack[3], 0);
    stream
}

/// A PUBLISH at QoS 0.
fn packet(topic: &str, payload: &[u8]) -> Vec<u8> {
    let length = 2 + topic.len() + payload.len();
    assert!(length < 128);
    let mut packet = vec![0x30, length as u8, 0, topic.len() as u8];
    packet.extend_from_slice(topic.as_bytes());
    packet.extend_from_slice(payload);
    packet
}

/// The payload of the next message.
async fn message(stream: &mut TcpStream) -> Vec<u8> {
    assert_eq!(stream.read_u8().await.unwrap() >> 4, 3);
    let (mut length, mut shift) = (0, 0);
    loop {
        let byte = stream.read_u8().await.unwrap();
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await.unwrap();
    let topic = usize::from(u16::from_be_bytes([rest[0], rest[1]]));
    rest.split_off(2 + topic)
}

/// Seconds until all devices have the image, piece by piece.
async fn pieces(to: SocketAddr, tokens: &[String], image: &Arc<Vec<u8>>) -> f64 {
    let start = Arc::new(Barrier::new(DEVICES + 1));
    let mut devices = JoinSet::new();
    for token in tokens {
        let options = Options { login: Some((token.clone(), String::new())), ..Options::id("") };
        let mut stream = connect(to, &options).await;
        let (start, image) = (start.clone(), image.clone());
        devices.spawn(async move {
            start.wait().await;
            let mut come = Vec::with_capacity(IMAGE);
            for index in 0.. {
                let topic = format!("v2/fw/request/1/chunk/{index}");
                stream.write_all(&packet(&topic, PIECE.to_string().as_bytes())).await.unwrap();
                let piece = message(&mut stream).await;
                if piece.is_empty() {
                    break;
                }
                come.extend(piece);
            }
            assert!(come == **image, "an image is not what it should be");
        });
    }
    start.wait().await;
    let started = Instant::now();
    devices.join_all().await;
    started.elapsed().as_secs_f64()
}

/// Seconds until as many clients have the package as our devices fetch it.
async fn whole(to: SocketAddr, round: usize, image: &Arc<Vec<u8>>) -> f64 {
    let start = Arc::new(Barrier::new(DEVICES + 1));
    let topic = PackageId::Firmware(Digest::of(image)).topic();
    let mut clients = JoinSet::new();
    for n in 0..DEVICES {
        let mut stream = connect(to, &Options::id(&format!("ours-{round}-{n}"))).await;
        let (start, image, topic) = (start.clone(), image.clone(), topic.clone());
        clients.spawn(async move {
            start.wait().await;
            let mut subscribe = vec![0x82, 5 + topic.len() as u8, 0, 1, 0, topic.len() as u8];
            subscribe.extend_from_slice(topic.as_bytes());
            subscribe.push(0);
            stream.write_all(&subscribe).await.unwrap();
            let mut suback = [0; 5];
            stream.read_exact(&mut suback).await.unwrap();
            assert!(message(&mut stream).await == **image);
        });
    }
    start.wait().await;
    let started = Instant::now();
    clients.join_all().await;
    started.elapsed().as_secs_f64()
}

/// Has all devices read their attributes again and again; cores that the broker used, and how many answers it gave.
async fn poll(server: &Server, tokens: &[String], time: Duration) -> (f64, u64) {
    let to = server.http.unwrap();
    let until = Instant::now() + time;
    let mut pollers = JoinSet::new();
    let used = processor(server);
    for token in tokens {
        let request = format!(
            "GET /api/v1/{token}/attributes?sharedKeys=fw_title,fw_version,fw_url HTTP/1.1\r\nHost: hub.local\r\n\r\n"
        );
        pollers.spawn(async move {
            let mut stream = TcpStream::connect(to).await.unwrap();
            let (mut answers, mut scratch) = (0, [0; 1024]);
            loop {
                stream.write_all(request.as_bytes()).await.unwrap();
                // An answer fits into one read.
                match timeout(until.saturating_duration_since(Instant::now()), stream.read(&mut scratch))
                    .await
                {
                    Err(_) => return answers,
                    Ok(read) => assert!(read.unwrap() > 0 && scratch.starts_with(b"HTTP/1.1 200 OK")),
                }
                answers += 1;
            }
        });
    }
    let answers: u64 = pollers.join_all().await.into_iter().sum();
    ((processor(server) - used) / time.as_secs_f64(), answers)
}
