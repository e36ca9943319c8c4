//! Downloads from the broker beside Debian's nginx, with sendfile: the same file, N clients on connections that stay,
//! by turns; medians. `bash tests/nginx.sh; cargo bench --bench http`. `MPYPI_BROKER` names another broker program.
//!
//! Two numbers of each: bytes a second, and processor time of the server for each GiB, which says the same when
//! others use the machine too.

#![allow(clippy::unwrap_used, reason = "a benchmark that fails should fail where it stands")]
#![expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]

use std::{
    env, fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use mpypi_protocol::Digest;
use mpypi_tests::{Client, Server, World, peer, program};

/// Bytes of a file, and how many clients ask for it.
const CASES: [(usize, usize); 4] =
    [(64 * 1024, 16), (1024 * 1024, 1), (1024 * 1024, 64), (8 * 1000 * 1000, 16)];
/// Bytes that all clients of a round take together.
const ROUND: usize = 512 * 1024 * 1024;
/// What the socket is read into at a time.
const SCRATCH: usize = 256 * 1024;

fn main() {
    let rounds = if env::args().any(|argument| argument == "--quick") { 3 } else { 7 };
    let world = World::new();
    let broker = env::var_os("MPYPI_BROKER").map_or_else(|| program("mpypi-broker"), Into::into);
    let server = Server::start_as(&world, Command::new(broker), &["--http", "127.0.0.1:0"]);
    let mut client = Client::connect(server.address, "publisher");
    let nginx = Nginx::start(&world);
    println!("file, clients      broker          nginx           ratio    processor time per GiB");
    for (size, clients) in CASES {
        let mut random = fastrand::Rng::with_seed(size as u64);
        let file: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(size).collect();
        let digest = Digest::of(&file).to_string();
        assert!(client.retain(&format!("mpypi/packages/firmware/{digest}"), &file));
        world.write(&format!("www/packages/{digest}"), &file);
        let path = format!("/packages/{digest}");
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.push(round(server.http.unwrap(), &path, size, clients, || cpu(server.pid())));
            theirs.push(round(nginx.address, &path, size, clients, || nginx.cpu()));
        }
        let [(our_rate, our_cpu), (their_rate, their_cpu)] = [ours, theirs].map(median);
        println!(
            "{:>5} KiB, {clients:>3}     {our_rate:>7.0} MB/s   {their_rate:>7.0} MB/s   {:>8.2}   {our_cpu:.2} s, {their_cpu:.2} s",
            size / 1024,
            our_rate / their_rate,
        );
    }
}

/// The medians of bytes a second, in millions, and of processor seconds for each GiB.
fn median(mut rounds: Vec<(f64, f64)>) -> (f64, f64) {
    let middle = rounds.len() / 2;
    rounds.sort_by(|one, other| one.0.total_cmp(&other.0));
    let rate = rounds[middle].0;
    rounds.sort_by(|one, other| one.1.total_cmp(&other.1));
    (rate, rounds[middle].1)
}

fn round(to: SocketAddr, path: &str, size: usize, clients: usize, cpu: impl Fn() -> f64) -> (f64, f64) {
    let each = (ROUND / size / clients).max(1);
    let start = Arc::new(Barrier::new(clients + 1));
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let readers: Vec<_> = (0..clients)
        .map(|_| {
            let (start, request) = (start.clone(), request.clone());
            thread::spawn(move || {
                let mut stream = TcpStream::connect(to).unwrap();
                stream.set_nodelay(true).unwrap();
                let mut scratch = vec![0; SCRATCH];
                start.wait();
                for _ in 0..each {
                    stream.write_all(request.as_bytes()).unwrap();
                    download(&mut stream, &mut scratch, size);
                }
            })
        })
        .collect();
    start.wait();
    let (began, before) = (Instant::now(), cpu());
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    let (seconds, used) = (began.elapsed().as_secs_f64(), cpu() - before);
    let bytes = (each * clients * size) as f64;
    (bytes / 1e6 / seconds, used / (bytes / f64::from(1 << 30)))
}

/// Reads one answer.
fn download(stream: &mut TcpStream, scratch: &mut [u8], size: usize) {
    let mut come = 0;
    let head = loop {
        let count = stream.read(&mut scratch[come..]).unwrap();
        assert!(count > 0, "the connection ended");
        come += count;
        if let Some(at) = scratch[..come.min(1024)].windows(4).position(|four| four == b"\r\n\r\n") {
            assert!(scratch.starts_with(b"HTTP/1.1 200"));
            break at + 4;
        }
    };
    let mut left = size - (come - head);
    while left > 0 {
        let count = stream.read(scratch).unwrap();
        assert!(count > 0 && count <= left, "the connection ended");
        left -= count;
    }
}

/// Processor seconds that a process has used.
fn cpu(pid: u32) -> f64 {
    /// Ticks in a second, as Linux tells them to programs.
    const TICKS: f64 = 100.0;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / TICKS
}

/// nginx with two workers, which serves the world's folder `www`.
struct Nginx {
    child: Child,
    address: SocketAddr,
}

impl Nginx {
    fn start(world: &World) -> Nginx {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        fs::create_dir_all(world.path("www/packages")).unwrap();
        let folder = world.text("");
        let config = world.write(
            "nginx.conf",
            format!(
                "daemon off;\nworker_processes 2;\npid {folder}/nginx.pid;\nerror_log {folder}/nginx.log;\n\
                 events {{ worker_connections 1024; }}\nhttp {{\n  access_log off;\n  sendfile on;\n  tcp_nopush on;\n\
                 keepalive_requests 1000000;\n  open_file_cache max=100;\n  default_type application/octet-stream;\n\
                 client_body_temp_path {folder}/b;\n  proxy_temp_path {folder}/p;\n  fastcgi_temp_path {folder}/f;\n\
                 uwsgi_temp_path {folder}/u;\n  scgi_temp_path {folder}/s;\n\
                 server {{ listen {address}; root {folder}/www; }}\n}}\n"
            ),
        );
        let user = ["-g", "user root;"];
        let child = Command::new(peer("nginx"))
            .args(["-p", &folder, "-c", config.to_str().unwrap()])
            .args(if is_root() { &user[..] } else { &[] })
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(began.elapsed() < Duration::from_secs(10), "nginx does not start");
            thread::sleep(Duration::from_millis(10));
        }
        Nginx { child, address }
    }

    /// Of its workers: they are children of the process that was started.
    fn cpu(&self) -> f64 {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.split_whitespace().map(|child| cpu(child.parse().unwrap())).sum()
    }
}

fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    status.lines().any(|line| line.starts_with("Uid:\t0\t"))
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // The first process ends its workers when it is asked to.
        Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().ok();
        self.child.wait().ok();
    }
}
