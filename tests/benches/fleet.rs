//! Ten thousand devices in one process beside the broker: all install a release of 64 KiB, then an upgrade of one file;
//! without TLS and with it. Prints time, bytes, memory for each device beyond its files, and whose the CPU time was.
//! `cargo bench --bench fleet`; `-- --quick` for a thousand.

#![allow(clippy::unwrap_used, reason = "a benchmark that fails should fail where it stands")]

use std::{
    env, fs,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    time::Instant,
};

use mpypi_tests::{Authority, Kind, Secure, Server, Validity, World, clock, program, run};
use serde_json::Value;

/// Files of the release, and bytes of each.
const FILES: usize = 16;
const FILE: usize = 4096;
/// Ticks in which the kernel counts CPU time, in a second.
const TICKS: f64 = 100.0;

fn main() {
    let quick = env::args().any(|argument| argument == "--quick");
    let nodes = if quick { 1000 } else { 10_000 };
    println!("{nodes} devices, {FILES} files of {FILE} bytes, then one of them anew");
    for tls in [false, true] {
        println!("{}", if tls { "with TLS" } else { "without TLS" });
        rollout(nodes, tls);
    }
}

fn rollout(nodes: usize, tls: bool) {
    let world = World::new();
    for n in 0..FILES {
        world.write(&format!("dev/src/file_{n}.py"), page(n, "first"));
    }
    let (server, broker, trust) = broker(&world, tls);
    let publish = || {
        let publish = ["publish", &world.text("dev"), "--broker", &server.url()];
        let _ = run("mpypi", &publish).expect_code(0);
    };
    publish();
    let (nodes_text, mut arguments) = (nodes.to_string(), vec!["fleet", "--broker", &broker, "--json"]);
    arguments.extend(["--nodes", &nodes_text, "--releases", "2", "--for", "30m", "--confirm-after", "50ms"]);
    arguments.extend(["--expect", "applied=100%", "--expect", "bricked=0"]);
    arguments.extend(trust.iter().map(String::as_str));
    let started = clock();
    let fleet = Fleet::start(&arguments);
    let before = fleet.usage(&server);
    let all = format!("applied {nodes}");
    fleet.wait_for_line(&all);
    let installed = fleet.usage(&server);
    show("first install of all", started, &before, &installed);
    let each = installed.memory[0] as f64 / nodes as f64 - (FILES * FILE) as f64 / 1024.0;
    println!(
        "    agent {:.0} MiB, {each:.1} KiB for each device beyond its files; broker {:.0} MiB",
        installed.memory[0] as f64 / 1024.0,
        installed.memory[1] as f64 / 1024.0
    );
    world.write("dev/src/file_3.py", page(3, "second"));
    let started = clock();
    publish();
    fleet.wait_for_line(&all);
    let upgraded = fleet.usage(&server);
    show("upgrade of one file", started, &installed, &upgraded);
    let report = fleet.end();
    for release in report["releases"].as_array().unwrap() {
        let number = |name: &str| release[name].as_f64().unwrap_or_default();
        println!(
            "    release {}: {:.0} of {nodes} applied it; {:.0} bytes each at the socket, {:.1} % of a full download",
            release["sequence"],
            number("applied"),
            number("wire_bytes") / number("applied").max(1.0),
            number("wire_bytes") / number("full_bytes").max(1.0) * 100.0
        );
    }
    println!("    bricked {}, peak of both {:.2} GiB", report["metrics"]["bricked"], upgraded.peak());
}

/// Bytes that differ from file to file and do not compress.
fn page(number: usize, text: &str) -> Vec<u8> {
    let mut bytes = format!("# {text}\n").into_bytes();
    let mut rng = fastrand::Rng::with_seed(number as u64);
    bytes.resize_with(FILE, || rng.alphanumeric() as u8);
    bytes
}

/// A broker, the URL for devices, and how they come to trust it.
fn broker(world: &World, tls: bool) -> (Server, String, Vec<String>) {
    if !tls {
        let server = Server::start(world);
        let url = server.url();
        return (server, url, Vec::new());
    }
    let authority = Authority::new(world, "ca");
    authority.server(world, "broker", &["localhost", "127.0.0.1"], Validity::Now);
    let secure = Secure::start(Kind::Ours, world, None);
    let url = secure.url("127.0.0.1");
    (secure.server, url, vec!["--ca".to_owned(), authority.pem(world)])
}

struct Fleet {
    child: Child,
    lines: std::cell::RefCell<std::io::Lines<BufReader<std::process::ChildStderr>>>,
}

/// What both processes took until now: first the agent, then the broker.
struct Usage {
    at: Instant,
    user: [f64; 2],
    kernel: [f64; 2],
    /// KiB, now and at most.
    memory: [u64; 2],
    most: [u64; 2],
}

impl Usage {
    fn peak(&self) -> f64 {
        self.most.iter().sum::<u64>() as f64 / 1024.0 / 1024.0
    }
}

impl Fleet {
    fn start(arguments: &[&str]) -> Fleet {
        let mut command = Command::new(program("mpypi-agent"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        Fleet { child, lines: lines.into() }
    }

    /// Waits until it says how the fleet stands in a line with this, having said something else before.
    fn wait_for_line(&self, text: &str) {
        let mut other = false;
        for line in &mut *self.lines.borrow_mut() {
            let line = line.unwrap();
            // `applied 100` is no `applied 1000`.
            let found = line.split([' ', ',']).collect::<Vec<_>>().join(" ").contains(&format!("{text} "));
            if found && other {
                return;
            }
            other |= !found;
        }
        panic!("the fleet ended before `{text}`");
    }

    fn usage(&self, broker: &Server) -> Usage {
        let pids = [self.child.id(), broker.pid()];
        let times = pids.map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            // After the name, which may hold anything: fields 14 and 15 of proc(5).
            let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            [11, 12].map(|place: usize| fields[place].parse::<f64>().unwrap() / TICKS)
        });
        let status = |field: &str| {
            pids.map(|pid| {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
                let line = status.lines().find(|line| line.starts_with(field)).unwrap();
                line.split_whitespace().nth(1).unwrap().parse().unwrap()
            })
        };
        Usage {
            at: clock(),
            user: times.map(|[user, _]| user),
            kernel: times.map(|[_, kernel]| kernel),
            memory: status("VmRSS:"),
            most: status("VmHWM:"),
        }
    }

    /// Its report, when it has ended, and done what was expected.
    fn end(self) -> Value {
        let Fleet { mut child, lines } = self;
        // What else it says must not fill its pipe.
        let rest = std::thread::spawn(move || lines.into_inner().map_while(Result::ok).collect::<Vec<_>>());
        let mut report = String::new();
        child.stdout.take().unwrap().read_to_string(&mut report).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}: {:?}", rest.join().unwrap());
        serde_json::from_str(&report).unwrap()
    }
}

fn show(what: &str, started: Instant, before: &Usage, after: &Usage) {
    let wall = after.at.duration_since(started).as_secs_f64();
    print!("  {what:<22} {wall:6.1} s;");
    let mut all = 0.0;
    for (place, name) in ["agent", "broker"].into_iter().enumerate() {
        let user = after.user[place] - before.user[place];
        let kernel = after.kernel[place] - before.kernel[place];
        all += user + kernel;
        let share = kernel / (user + kernel).max(0.01) * 100.0;
        print!(" {name} {:.1} s of CPU, {share:.0} % of it the kernel's;", user + kernel);
    }
    println!(" {:.1} CPUs busy", all / wall);
}
