//! NATS as an MQTT broker: one node, or a cluster of three that keeps every retained message on each of them.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use crate::{
    Client, PATIENCE, World,
    client::Options,
    programs::peer,
    server::{clock, free_address, pause},
};

/// How often a cluster is started anew: another process may take a port first, and votes may split for long.
const STARTS: u32 = 5;

/// How long a start may take before it is given up and tried anew.
const START: Duration = Duration::from_secs(30);

/// Nodes of NATS with JetStream on loopback; they end with this value.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    /// Who may retain messages below `mpypi/`, if not everybody.
    login: Option<(String, String)>,
}

/// One node.
#[derive(Debug)]
struct Node {
    name: String,
    store: PathBuf,
    settings: PathBuf,
    log: PathBuf,
    address: SocketAddr,
    child: Option<Child>,
}

/// Where a node is to be.
#[derive(Debug)]
pub struct Place<'p> {
    /// Its name, which it also finds in `NATS_NAME`.
    pub name: &'p str,
    /// The folder of what it keeps, which it also finds in `NATS_STORE`.
    pub store: &'p Path,
    /// Where clients of NATS itself come.
    pub clients: SocketAddr,
    /// Where clients of MQTT come.
    pub mqtt: SocketAddr,
    /// Where other nodes come.
    pub route: SocketAddr,
    /// The same of all nodes, as URLs.
    pub routes: &'p [String],
}

impl Cluster {
    /// So many nodes, one or three, all of which take clients and have agreed on who keeps what. What they keep lies in
    /// the world's folder.
    #[must_use]
    pub fn start(world: &World, nodes: usize) -> Cluster {
        Cluster::start_with(world, nodes, "")
    }

    /// The same, with more settings, for each node the same.
    #[must_use]
    pub fn start_with(world: &World, nodes: usize, more: &str) -> Cluster {
        Cluster::start_by(world, nodes, None, |place| {
            let Place { name, store, clients, mqtt, route, routes } = place;
            let cluster = match nodes {
                1 => String::new(),
                _ => format!(
                    "cluster {{ name: test, listen: \"{route}\", routes: [{}] }}\n",
                    routes.join(", ")
                ),
            };
            let settings = format!(
                "server_name: \"{name}\"\nlisten: \"{clients}\"\nmax_payload: 8MB\nwrite_deadline: \"2m\"\n\
                 jetstream {{ store_dir: \"{}\" }}\nmqtt {{ listen: \"{mqtt}\" }}\n{cluster}{more}\n",
                store.display()
            );
            world.write(&format!("{name}.conf"), settings)
        })
    }

    /// The same, with the file of settings that is written for each node. Users, if there are any, are among them: `login` is the
    /// name and the password of one who may retain messages below `mpypi/`.
    #[must_use]
    pub fn start_by(
        world: &World,
        nodes: usize,
        login: Option<(&str, &str)>,
        write: impl Fn(&Place<'_>) -> PathBuf,
    ) -> Cluster {
        for start in 0..STARTS {
            let mut cluster = Cluster::lay_out(world, start, nodes, &write);
            cluster.login = login.map(|(user, password)| (user.to_owned(), password.to_owned()));
            for node in &mut cluster.nodes {
                node.start();
            }
            if (0..nodes).all(|node| cluster.is_ready(node, START)) {
                return cluster;
            }
            for node in &cluster.nodes {
                eprintln!("--- {}\n{}", node.log.display(), node.log());
            }
        }
        panic!("nats-server does not start");
    }

    fn lay_out(world: &World, start: u32, nodes: usize, write: &dyn Fn(&Place<'_>) -> PathBuf) -> Cluster {
        let routes: Vec<SocketAddr> = (0..nodes).map(|_| free_address()).collect();
        let urls: Vec<String> = routes.iter().map(|route| format!("nats://{route}")).collect();
        let node = |(number, route): (usize, &SocketAddr)| {
            let name = format!("nats-{start}-{number}");
            let (clients, address, store) = (free_address(), free_address(), world.path(&name));
            let (log, route) = (world.path(&format!("{name}.log")), *route);
            let place = Place { name: &name, store: &store, clients, mqtt: address, route, routes: &urls };
            let settings = write(&place);
            Node { name, store, settings, log, address, child: None }
        };
        Cluster { nodes: routes.iter().enumerate().map(node).collect(), login: None }
    }

    /// How many nodes there are.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Where a node speaks MQTT.
    #[must_use]
    pub fn address(&self, node: usize) -> SocketAddr {
        self.nodes[node].address
    }

    /// The URL of a node.
    #[must_use]
    pub fn url(&self, node: usize) -> String {
        format!("mqtt://{}", self.nodes[node].address)
    }

    /// The URLs of all nodes, as `--broker` takes them.
    #[must_use]
    pub fn urls(&self) -> String {
        let urls: Vec<String> = (0..self.nodes()).map(|node| self.url(node)).collect();
        urls.join(",")
    }

    /// The id of a node's process.
    ///
    /// # Panics
    /// It does not run.
    #[must_use]
    pub fn pid(&self, node: usize) -> u32 {
        self.nodes[node].child.as_ref().expect("a node that runs").id()
    }

    /// Ends a node as a power cut would; nothing happens if it does not run.
    pub fn kill(&mut self, node: usize) {
        self.nodes[node].kill();
    }

    /// Starts a node that was killed, with what it kept, at the same addresses, and waits until it takes clients.
    pub fn restart(&mut self, node: usize) {
        self.nodes[node].start();
        assert!(self.is_ready(node, PATIENCE), "nats-server does not come back\n{}", self.nodes[node].log());
    }

    /// Whether a node takes clients and retains what they publish, within a time: what it keeps has a leader then.
    #[must_use]
    pub fn is_ready(&mut self, node: usize, within: Duration) -> bool {
        let started = clock();
        let Node { address, child, .. } = &mut self.nodes[node];
        while started.elapsed() < within {
            if child.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some()) {
                return false;
            }
            if TcpStream::connect(*address).is_ok() && retains(*address, self.login.as_ref()) {
                return true;
            }
            pause();
        }
        false
    }
}

/// Whether a broker lets a client in and keeps a message for it.
fn retains(address: SocketAddr, login: Option<&(String, String)>) -> bool {
    let topic = format!("mpypi/ready/{}", address.port());
    let options = Options { login: login.cloned(), ..Options::id(&format!("ready-{address}")) };
    let Some((mut client, 0)) = Client::try_connect(address, &options) else { return false };
    client.retain(&topic, b"1") && client.retain(&topic, b"")
}

impl Node {
    fn start(&mut self) {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let child = Command::new(peer("nats-server"))
            .arg("-c")
            .arg(&self.settings)
            .env("NATS_NAME", &self.name)
            .env("NATS_STORE", &self.store)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            node.kill();
        }
        if thread::panicking() {
            for node in &self.nodes {
                let log = node.log();
                let from = log.len().saturating_sub(4000);
                eprintln!("--- {}\n{}", node.log.display(), log.get(from..).unwrap_or(&log));
            }
        }
    }
}
