//! A broker in a process of its own.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{PATIENCE, World, program, programs::peer};

/// A running broker; ends with its value.
#[derive(Debug)]
pub struct Server {
    child: Child,
    log: PathBuf,
    /// Where it listens for MQTT over TCP.
    pub address: SocketAddr,
    /// All URLs it listens for.
    pub listening: Vec<String>,
}

impl Server {
    /// Our broker on a free port, its index in the world's folder `data`.
    #[must_use]
    pub fn start(world: &World) -> Server {
        Server::start_with(world, &[])
    }

    /// Our broker with more arguments.
    #[must_use]
    pub fn start_with(world: &World, arguments: &[&str]) -> Server {
        let more = arguments.iter().filter(|argument| **argument == "--listen").count();
        let data = world.text("data");
        let usual = ["serve", "--listen", "127.0.0.1:0", "--data", &data];
        Server::launch(world, &[&usual[..], arguments].concat(), 1 + more)
    }

    /// Our broker with exactly these arguments, with which it has so many listeners, the first over TCP.
    #[must_use]
    pub fn launch(world: &World, arguments: &[&str], listeners: usize) -> Server {
        Server::spawn(world.path("broker.log"), arguments, listeners, &[])
    }

    /// Our broker with its index in the folder `data`, its log, and more environment.
    #[must_use]
    pub fn start_on(data: &Path, log: PathBuf, environment: &[(&str, OsString)]) -> Server {
        let data = data.to_str().unwrap();
        Server::spawn(log, &["serve", "--listen", "127.0.0.1:0", "--data", data], 1, environment)
    }

    fn spawn(log: PathBuf, arguments: &[&str], listeners: usize, environment: &[(&str, OsString)]) -> Server {
        let mut command = Command::new(program("mpypi-broker"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let log_file = File::options().create(true).append(true).open(&log).unwrap();
        let mut child = command.stderr(log_file).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let listening: Vec<_> = lines
            .take(listeners)
            .map_while(|line| line.unwrap().strip_prefix("listening on ").map(str::to_owned))
            .collect();
        let address = listening.first().and_then(|url| url.strip_prefix("mqtt://")?.parse().ok());
        let Some(address) = address.filter(|_| listening.len() == listeners) else {
            child.kill().ok();
            panic!("the broker did not start: {}", fs::read_to_string(&log).unwrap_or_default());
        };
        Server { address, listening, child, log }
    }

    /// mosquitto on a free port, with nothing on disk.
    #[must_use]
    pub fn mosquitto(world: &World) -> Server {
        Server::mosquitto_with(world, "persistence false\n")
    }

    /// mosquitto on a free port, with more settings; what it keeps lies in the world's folder.
    #[must_use]
    pub fn mosquitto_with(world: &World, more: &str) -> Server {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let settings = format!(
            "listener {} 127.0.0.1\nallow_anonymous true\nuser root\nset_tcp_nodelay true\npersistence_location {}/\n{more}",
            address.port(),
            world.path("").display(),
        );
        let settings = world.write("mosquitto.conf", settings);
        let log = world.path("mosquitto.log");
        let mut child = Command::new(peer("mosquitto"))
            .arg("-c")
            .arg(settings)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let started = clock();
        while TcpStream::connect(address).is_err() {
            assert_eq!(child.try_wait().unwrap(), None, "mosquitto did not start");
            assert!(started.elapsed() < PATIENCE, "mosquitto does not listen");
            pause();
        }
        Server { child, log, address, listening: Vec::new() }
    }

    /// The broker's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("mqtt://{}", self.address)
    }

    /// The port as text, for foreign programs.
    #[must_use]
    pub fn port(&self) -> String {
        self.address.port().to_string()
    }

    /// The id of the broker's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends the broker as a power cut would: at once, in the middle of anything.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks the broker to stop, by signal, and returns its exit code.
    #[must_use]
    pub fn stop(mut self, signal: &str) -> Option<i32> {
        let status = Command::new("kill").args([signal, &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
        self.child.wait().unwrap().code()
    }

    /// What the broker logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether the process runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if thread::panicking() {
            eprintln!("--- the broker's log\n{}", self.log());
        }
    }
}

/// A time within which something must come about that cannot be waited for.
#[derive(Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// [`PATIENCE`] from now.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "the time of its making matters")]
    pub fn new() -> Deadline {
        Deadline(clock() + PATIENCE)
    }

    /// Fails if the time is over.
    #[track_caller]
    pub fn check(&self, complaint: &str) {
        assert!(clock() < self.0, "{complaint}");
    }
}

/// The time, where a test measures or loses its patience.
#[expect(clippy::disallowed_methods, reason = "a test's patience is real time")]
#[must_use]
pub fn clock() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "a foreign program tells nobody that it is ready")]
fn pause() {
    thread::sleep(Duration::from_millis(10));
}
