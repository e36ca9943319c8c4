//! A broker in a process of its own.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
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
    /// Where it listens for MQTT over TCP; of a gateway, where it speaks HTTP.
    pub address: SocketAddr,
    /// All URLs it listens for.
    pub listening: Vec<String>,
    /// Where it speaks HTTP, if it was told to.
    pub http: Option<SocketAddr>,
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
        Server::start_as(world, Command::new(program("mpypi-broker")), arguments)
    }

    /// Our broker by a command of its own: `mpypi-broker`, or what leads to it.
    #[must_use]
    pub fn start_as(world: &World, mut command: Command, arguments: &[&str]) -> Server {
        let more = arguments
            .iter()
            .filter(|argument| ["--listen", "--http", "--promoter-channel"].contains(argument))
            .count();
        let data = world.text("data");
        command.args(["serve", "--listen", "127.0.0.1:0", "--data", &data]).args(arguments);
        Server::spawn(world.path("broker.log"), command, 1 + more)
    }

    /// Our broker with exactly these arguments, with which it has so many listeners, the first over TCP.
    #[must_use]
    pub fn launch(world: &World, arguments: &[&str], listeners: usize) -> Server {
        let mut command = Command::new(program("mpypi-broker"));
        command.args(arguments);
        Server::spawn(world.path("broker.log"), command, listeners)
    }

    /// Our broker at this address and no other, with more arguments.
    #[must_use]
    pub fn start_at(world: &World, address: SocketAddr, arguments: &[&str]) -> Server {
        let (listen, data) = (address.to_string(), world.text("data"));
        let more = arguments.iter().filter(|argument| **argument == "--http").count();
        let usual = ["serve", "--listen", &listen, "--data", &data];
        Server::launch(world, &[&usual, arguments].concat(), 1 + more)
    }

    /// A gateway to the broker at `upstream`, with more arguments.
    #[must_use]
    pub fn gateway(world: &World, upstream: &str, arguments: &[&str]) -> Server {
        let usual = ["gateway", "--upstream", upstream, "--http", "127.0.0.1:0"];
        Server::launch(world, &[&usual, arguments].concat(), 1)
    }

    /// Our broker with its index in the folder `data`, its log, and more environment.
    #[must_use]
    pub fn start_on(data: &Path, log: PathBuf, environment: &[(&str, OsString)]) -> Server {
        let mut command = Command::new(program("mpypi-broker"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--data"]).arg(data);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        Server::spawn(log, command, 1)
    }

    fn spawn(log: PathBuf, mut command: Command, listeners: usize) -> Server {
        let log_file = File::options().create(true).append(true).open(&log).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log_file);
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let listening: Vec<_> = lines
            .take(listeners)
            .map_while(|line| line.unwrap().strip_prefix("listening on ").map(str::to_owned))
            .collect();
        let socket =
            |url: &String| url.strip_prefix("mqtt://").or_else(|| url.strip_prefix("http://"))?.parse().ok();
        let address = listening.first().and_then(socket);
        let Some(address) = address.filter(|_| listening.len() == listeners) else {
            child.kill().ok();
            panic!("the broker did not start: {}", fs::read_to_string(&log).unwrap_or_default());
        };
        let http = listening.iter().find_map(|url| url.strip_prefix("http://")?.parse().ok());
        Server { address, listening, http, child, log }
    }

    /// mosquitto on a free port, with nothing on disk.
    #[must_use]
    pub fn mosquitto(world: &World) -> Server {
        Server::mosquitto_with(world, "persistence false\n")
    }

    /// mosquitto on a free port, with more settings; what it keeps lies in the world's folder.
    #[must_use]
    pub fn mosquitto_with(world: &World, more: &str) -> Server {
        Server::mosquitto_on(world, free_address(), more)
    }

    /// mosquitto at `address`, with more settings.
    fn mosquitto_on(world: &World, address: SocketAddr, more: &str) -> Server {
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
        Server { child, log, address, listening: Vec::new(), http: None }
    }

    /// The broker's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("mqtt://{}", self.address)
    }

    /// What it answers to an HTTP GET: status and body.
    #[must_use]
    pub fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.http.expect("the broker was started with --http")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
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

/// Whose broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// This one.
    Ours,
    /// mosquitto.
    Mosquitto,
}

/// A broker that also speaks TLS, with the certificate `broker.pem` and the key `broker.key` of its world.
#[derive(Debug)]
pub struct Secure {
    /// The broker; its own address is plain.
    pub server: Server,
    /// Where it speaks TLS.
    pub address: SocketAddr,
    kind: Kind,
    clients: Option<String>,
}

impl Secure {
    /// Every broker that these tests are about.
    pub const KINDS: [Kind; 2] = [Kind::Ours, Kind::Mosquitto];

    /// Starts a broker; given `clients`, the file of a CA, it lets only clients in for whom that CA vouches.
    #[must_use]
    pub fn start(kind: Kind, world: &World, clients: Option<&str>) -> Secure {
        Secure::start_on(kind, world, clients.map(str::to_owned), [free_address(), free_address()])
    }

    fn start_on(
        kind: Kind,
        world: &World,
        clients: Option<String>,
        [plain, address]: [SocketAddr; 2],
    ) -> Secure {
        let (cert, key) = (world.text("broker.pem"), world.text("broker.key"));
        let server = match kind {
            Kind::Ours => {
                let listen = [plain.to_string(), format!("mqtts://{address}")];
                let data = world.text("data");
                let usual = ["serve", "--data", &data, "--tls-cert", &cert, "--tls-key", &key];
                let mut arguments = [&usual[..], &["--listen", &listen[0], "--listen", &listen[1]]].concat();
                if let Some(ca) = &clients {
                    arguments.extend(["--tls-client-ca", ca, "--tls-client-auth", "required"]);
                }
                Server::launch(world, &arguments, 2)
            }
            Kind::Mosquitto => {
                let mut more = format!(
                    "persistence false\nlistener {} 127.0.0.1\ncertfile {cert}\nkeyfile {key}\n",
                    address.port()
                );
                if let Some(ca) = &clients {
                    more += &format!("cafile {ca}\nrequire_certificate true\n");
                }
                Server::mosquitto_on(world, plain, &more)
            }
        };
        Secure { server, address, kind, clients }
    }

    /// Ends it as a power cut would, and starts it again at the same addresses, with what its world has now.
    #[must_use]
    pub fn restart(self, world: &World) -> Secure {
        let Secure { server, address, kind, clients } = self;
        let plain = server.address;
        server.kill();
        Secure::start_on(kind, world, clients, [plain, address])
    }

    /// Its URL for TLS, by the name or address `host`.
    #[must_use]
    pub fn url(&self, host: &str) -> String {
        format!("mqtts://{host}:{}", self.address.port())
    }
}

/// A loopback address that nobody uses now, and hardly anybody will in the next moment.
#[must_use]
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The time, where a test measures or loses its patience.
#[expect(clippy::disallowed_methods, reason = "a test's patience is real time")]
#[must_use]
pub fn clock() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "a foreign program tells nobody that it is ready")]
pub(crate) fn pause() {
    thread::sleep(Duration::from_millis(10));
}
