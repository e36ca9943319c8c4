//! TLS, WebSocket, certificates and the configuration file, from outside.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::Arc,
};

use mpypi_tests::{Client, Deadline, Options, Output, PATIENCE, Server, World, http::Web, run};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tungstenite::{
    ClientRequestBuilder, Message, WebSocket,
    http::{StatusCode, Uri},
};

const V3: u8 = 4;
const V5: u8 = 5;
/// The URLs that every test here listens for, beside plain TCP.
const LISTEN: [&str; 6] =
    ["--listen", "mqtts://127.0.0.1:0", "--listen", "ws://127.0.0.1:0", "--listen", "wss://127.0.0.1:0"];

/// A world with certificates, as `init --tls` makes them.
fn with_certificates() -> World {
    let world = World::new();
    let _ = run("mpypi-broker", &["init", &world.text("data"), "--tls"]).expect_code(0);
    world
}

fn start(world: &World) -> Server {
    Server::start_with(world, &LISTEN)
}

/// Makes a node's certificate; returns the paths of certificate and key.
fn node(world: &World, name: &str) -> [String; 2] {
    let _ = run("mpypi-broker", &["cert", "node", name, "--data", &world.text("data")]).expect_code(0);
    ["pem", "key"].map(|ending| world.text(&format!("data/tls/nodes/{name}.{ending}")))
}

/// Adds a user; returns the token.
fn user(world: &World, name: &str, role: &str) -> String {
    let arguments = ["user", "add", name, "--role", role, "--token", "--data", &world.text("data")];
    run("mpypi-broker", &arguments).expect_code(0).stdout.trim().to_owned()
}

fn address(server: &Server, scheme: &str) -> SocketAddr {
    let mut found = server.listening.iter().filter_map(|url| url.strip_prefix(scheme)?.strip_prefix("://"));
    found.next().unwrap().trim_end_matches("/mqtt").parse().unwrap()
}

/// mosquitto_pub or mosquitto_sub over TLS.
fn mosquitto(program: &str, world: &World, server: &Server, arguments: &[&str]) -> Output {
    let (port, ca) = (address(server, "mqtts").port().to_string(), world.text("data/tls/ca.pem"));
    run(program, &[&["-h", "localhost", "-p", &port, "--cafile", &ca], arguments].concat())
}

trait Wire: Read + Write {}
impl<T: Read + Write> Wire for T {}

/// An MQTT client of whole packets, as bytes, over whatever carries them.
struct Line {
    wire: Box<dyn Wire>,
    version: u8,
}

fn tcp(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

fn pem(path: &Path) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_file_iter(path).unwrap().map(Result::unwrap).collect()
}

fn tls(
    world: &World,
    address: SocketAddr,
    shown: Option<&[String; 2]>,
) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(pem(&world.path("data/tls/ca.pem")).remove(0)).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    let config = match shown {
        Some([cert, key]) => {
            let key = PrivateKeyDer::from_pem_file(key).unwrap();
            builder.with_client_auth_cert(pem(Path::new(cert)), key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    let name = ServerName::from(address.ip());
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), tcp(address))
}

/// Messages of a WebSocket as a stream; each write is a message.
struct Socket<S>(WebSocket<S>, Vec<u8>);

impl<S: Read + Write> Read for Socket<S> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        while self.1.is_empty() {
            match self.0.read() {
                Ok(Message::Binary(bytes)) => self.1 = bytes.to_vec(),
                Ok(Message::Text(text)) => panic!("text: {text}"),
                Ok(_) => {}
                Err(tungstenite::Error::Io(error)) => return Err(error),
                Err(_) => return Ok(0),
            }
        }
        let count = buf.len().min(self.1.len());
        buf[..count].copy_from_slice(&self.1[..count]);
        self.1.drain(..count);
        Ok(count)
    }
}

impl<S: Read + Write> Write for Socket<S> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.send(Message::binary(buf.to_vec())).map_err(std::io::Error::other)?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn websocket<S: Read + Write>(stream: S, path: &str) -> Result<WebSocket<S>, StatusCode> {
    let uri: Uri = format!("ws://localhost{path}").parse().unwrap();
    let request = ClientRequestBuilder::new(uri).with_sub_protocol("mqtt");
    match tungstenite::client(request, stream) {
        Ok((socket, response)) => {
            assert_eq!(response.headers()["sec-websocket-protocol"], "mqtt");
            Ok(socket)
        }
        Err(tungstenite::HandshakeError::Failure(tungstenite::Error::Http(response))) => {
            Err(response.status())
        }
        Err(error) => panic!("{error}"),
    }
}

impl Line {
    /// A connection over what `scheme` says.
    fn open(world: &World, server: &Server, scheme: &str, version: u8) -> Line {
        let address = address(server, scheme);
        let wire: Box<dyn Wire> = match scheme {
            "mqtt" => Box::new(tcp(address)),
            "mqtts" => Box::new(tls(world, address, None)),
            "ws" => Box::new(Socket(websocket(tcp(address), "/mqtt").unwrap(), Vec::new())),
            "wss" => Box::new(Socket(websocket(tls(world, address, None), "/mqtt").unwrap(), Vec::new())),
            other => panic!("{other}"),
        };
        Line { wire, version }
    }

    /// Connects without credentials; returns what CONNACK said, or nothing if there was none.
    fn connect(&mut self, id: &str) -> Option<u8> {
        let mut body = [&b"\x00\x04MQTT"[..], &[self.version, 2, 0, 0]].concat();
        self.no_properties(&mut body);
        text(&mut body, id);
        self.send(0x10, &body)?;
        self.receive().map(|(first, body)| {
            assert_eq!(first, 0x20);
            body[1]
        })
    }

    /// Publishes a retained message at QoS 1; says whether it was taken.
    fn retain(&mut self, topic: &str, payload: &[u8]) -> bool {
        let mut body = Vec::new();
        text(&mut body, topic);
        body.extend_from_slice(&[0, 7]);
        self.no_properties(&mut body);
        body.extend_from_slice(payload);
        let answer = self.send(0x33, &body).and_then(|()| self.receive());
        answer.is_some_and(|(first, body)| first == 0x40 && body.get(2).is_none_or(|code| *code < 0x80))
    }

    /// Subscribes, and returns the retained message of the topic.
    fn retained(&mut self, topic: &str) -> Vec<u8> {
        let mut body = vec![0, 9];
        self.no_properties(&mut body);
        text(&mut body, topic);
        body.push(0);
        self.send(0x82, &body).unwrap();
        assert_eq!(self.receive().unwrap().0, 0x90);
        let (first, body) = self.receive().unwrap();
        assert_eq!(first, 0x31);
        let properties = if self.version == V5 { 1 + usize::from(body[2 + topic.len()]) } else { 0 };
        body[2 + topic.len() + properties..].to_vec()
    }

    fn ping(&mut self) {
        self.send(0xc0, &[]).unwrap();
        assert_eq!(self.receive().unwrap().0, 0xd0);
    }

    /// Whether the broker has closed, after whatever it still said.
    fn is_closed(&mut self) -> bool {
        while let Some((first, _)) = self.receive() {
            assert_eq!(first, 0xe0, "DISCONNECT");
        }
        true
    }

    fn no_properties(&self, body: &mut Vec<u8>) {
        if self.version == V5 {
            body.push(0);
        }
    }

    fn send(&mut self, first: u8, body: &[u8]) -> Option<()> {
        let mut packet = vec![first];
        let mut left = body.len();
        loop {
            packet.push((left % 128) as u8 | if left > 127 { 0x80 } else { 0 });
            left /= 128;
            if left == 0 {
                break;
            }
        }
        packet.extend_from_slice(body);
        self.wire.write_all(&packet).ok()?;
        self.wire.flush().ok()
    }

    /// The next packet; nothing if the broker has closed.
    fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut byte = [0];
        let mut next = |wire: &mut Box<dyn Wire>| match wire.read_exact(&mut byte) {
            Ok(()) => Some(byte[0]),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => panic!("nothing came"),
            Err(_) => None,
        };
        let first = next(&mut self.wire)?;
        let mut length = 0;
        for shift in [0, 7, 14, 21] {
            let byte = next(&mut self.wire)?;
            length |= usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        let mut body = vec![0; length];
        self.wire.read_exact(&mut body).ok()?;
        Some((first, body))
    }
}

fn text(body: &mut Vec<u8>, text: &str) {
    body.extend_from_slice(&(text.len() as u16).to_be_bytes());
    body.extend_from_slice(text.as_bytes());
}

/// Bytes that nothing packs.
fn noise(size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    (0..size).map(|_| random.u8(..)).collect()
}

#[test]
fn both_versions_publish_and_read_megabytes_over_every_kind_of_listener() {
    let world = with_certificates();
    let server = start(&world);
    for scheme in ["mqtt", "mqtts", "ws", "wss"] {
        for version in [V3, V5] {
            let mut line = Line::open(&world, &server, scheme, version);
            assert_eq!(line.connect("line"), Some(0), "{scheme} {version}");
            let payload = noise(3 * 1024 * 1024 + usize::from(version));
            let topic = format!("test/{scheme}/{version}");
            assert!(line.retain(&topic, &payload), "{scheme} {version}");
            assert!(line.retained(&topic) == payload, "{scheme} {version}");
            line.ping();
        }
    }
}

#[test]
fn mosquittos_clients_come_in_over_tls_and_only_believe_the_right_authority() {
    let world = with_certificates();
    let server = start(&world);
    let file = world.write("payload", noise(300_000));
    for version in ["mqttv311", "mqttv5"] {
        let arguments = ["-V", version, "-q", "1", "-r", "-t", version, "-f", file.to_str().unwrap()];
        let _ = mosquitto("mosquitto_pub", &world, &server, &arguments).expect_code(0);
        let arguments = ["-V", version, "-q", "1", "-C", "1", "-W", "30", "-F", "%l", "-t", version];
        let read = mosquitto("mosquitto_sub", &world, &server, &arguments).expect_code(0);
        assert_eq!(read.stdout.trim(), "300000");
    }
    let stranger = with_certificates();
    let wrong = mosquitto("mosquitto_pub", &stranger, &server, &["-t", "t", "-m", "x"]);
    assert_ne!(wrong.code, Some(0), "{}", wrong.stderr);
    // The client is gone before the broker has said so.
    let deadline = Deadline::new();
    while !server.log().contains("no TLS handshake") {
        deadline.check("the broker says nothing of it");
        std::thread::yield_now();
    }
}

#[test]
fn a_node_with_a_certificate_is_itself_without_a_password_and_nobody_else() {
    let world = with_certificates();
    let [cert, key] = node(&world, "kitchen");
    let token = user(&world, "ci", "publisher");
    let server = start(&world);
    let publish = |more: &[&str]| {
        let usual = ["-V", "mqttv5", "-q", "1", "-m", "[]"];
        mosquitto("mosquitto_pub", &world, &server, &[&usual[..], more].concat())
    };
    let shown = ["--cert", &cert, "--key", &key];
    let own = ["-i", "kitchen", "-t", "mpypi/nodes/kitchen/state"];
    for version in ["mqttv5", "mqttv311"] {
        let _ = publish(&[&shown[..], &own, &["-V", version]].concat()).expect_code(0);
    }
    let refused = |more: &[&str], reason: &str| {
        let output = publish(more);
        assert!(output.stderr.contains(reason), "{more:?}: {}", output.stderr);
    };
    let other = ["-i", "kitchen", "-t", "mpypi/nodes/cellar/state"];
    refused(&[&shown[..], &other].concat(), "Not authorized");
    refused(&[&shown[..], &["-i", "kitchen", "-t", "mpypi/channels/dev"]].concat(), "Not authorized");
    refused(&[&shown[..], &["-i", "cellar", "-t", "mpypi/nodes/cellar/state"]].concat(), "Client Identifier");
    refused(&own, "Not authorized");
    // With a password too, it is who the password says.
    let publisher = ["-i", "ci", "-u", "ci", "-t", "mpypi/channels/dev"];
    let _ = publish(&[&shown[..], &publisher, &["-P", &token]].concat()).expect_code(0);
    refused(&[&shown[..], &publisher, &["-P", "wrong"]].concat(), "ser");
    let _ = publish(&[&publisher[..], &["-P", &token]].concat()).expect_code(0);
    // A node is not the user of its name.
    let [cert, key] = node(&world, "ci");
    refused(&["--cert", &cert, "--key", &key, "-i", "ci", "-t", "mpypi/nodes/ci/state"], "Not authorized");
    assert!(server.log().contains("`ci` is a user who is no node"), "{}", server.log());
    // A certificate of an authority that nobody named.
    let stranger = with_certificates();
    let [cert, key] = node(&stranger, "kitchen");
    let output = publish(&[&["--cert", &cert, "--key", &key][..], &own].concat());
    assert_ne!(output.code, Some(0), "{}", output.stderr);
}

#[test]
fn a_certificate_whose_name_no_node_can_have_is_refused_with_the_reason() {
    let world = with_certificates();
    let read = |name: &str| fs::read_to_string(world.path("data/tls").join(name)).unwrap();
    let authority = rcgen::KeyPair::from_pem(&read("ca.key")).unwrap();
    let authority = rcgen::Issuer::from_ca_cert_pem(&read("ca.pem"), authority).unwrap();
    let made = |common: Option<&str>, names: &[&str]| {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(name) = common {
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
        }
        let cert = params.signed_by(&key, &authority).unwrap();
        [("pem", cert.pem()), ("key", key.serialize_pem())]
            .map(|(ending, pem)| world.write(&format!("made.{ending}"), pem).to_str().unwrap().to_owned())
    };
    let server = start(&world);
    let connect = |shown: [String; 2], id: &str| {
        let wire = Box::new(tls(&world, address(&server, "mqtts"), Some(&shown)));
        Line { wire, version: V5 }.connect(id)
    };
    assert_eq!(connect(made(Some("a/b"), &[]), "a"), Some(0x87));
    assert!(server.log().contains("the client's certificate: `a/b` is no node name"), "{}", server.log());
    assert_eq!(connect(made(None, &[]), "a"), Some(0x87));
    // Without a common name, the first DNS name counts.
    assert_eq!(connect(made(None, &["kitchen", "cellar"]), "kitchen"), Some(0));
    assert_eq!(connect(made(None, &["kitchen", "cellar"]), "cellar"), Some(0x85));
}

#[test]
fn where_certificates_are_required_strangers_may_reach_the_listener_but_not_the_broker() {
    let world = with_certificates();
    let shown = node(&world, "kitchen");
    let required = ["--tls-client-auth", "required"];
    let server = Server::start_with(&world, &[&required[..], &["--listen", "mqtts://0.0.0.0:0"]].concat());
    let port = address(&server, "mqtts").port();
    let here = SocketAddr::from(([127, 0, 0, 1], port));
    let connect = |shown: Option<&[String; 2]>| {
        Line { wire: Box::new(tls(&world, here, shown)), version: V5 }.connect("kitchen")
    };
    assert_eq!(connect(Some(&shown)), Some(0));
    assert_eq!(connect(None), None);
    drop(server);
    // Not so over TCP, and not where certificates are optional.
    for arguments in
        [&["--listen", "mqtts://0.0.0.0:0"][..], &["--listen", "0.0.0.0:0", required[0], required[1]]]
    {
        let data = world.text("data");
        let refused = run("mpypi-broker", &[&["serve", "--data", &data], arguments].concat()).expect_code(1);
        assert!(refused.stderr.contains("would let everyone in"), "{}", refused.stderr);
    }
}

#[test]
fn a_renewed_certificate_is_shown_to_new_connections_and_the_old_ones_go_on() {
    let world = with_certificates();
    let server = start(&world);
    let place = address(&server, "mqtts");
    let shown = || {
        let mut stream = tls(&world, place, None);
        stream.conn.complete_io(&mut stream.sock).unwrap();
        stream.conn.peer_certificates().unwrap()[0].to_vec()
    };
    let mut earlier = Line::open(&world, &server, "mqtts", V3);
    assert_eq!(earlier.connect("earlier"), Some(0));
    let before = shown();
    let renew = ["cert", "renew", "--data", &world.text("data")];
    let renewed = run("mpypi-broker", &renew).expect_code(0);
    assert!(renewed.stderr.contains("localhost, 127.0.0.1, ::1"), "{}", renewed.stderr);
    let mut after = before.clone();
    while after == before {
        after = shown();
    }
    earlier.ping();
    // Half a pair changes nothing, and is said.
    world.write("data/tls/server.key", "no key");
    while !server.log().contains("certificates stay as they were") {
        assert_eq!(shown(), after);
    }
    earlier.ping();
}

#[test]
fn when_authorities_change_nodes_of_those_that_left_are_sent_away_and_others_go_on() {
    let (world, other) = (with_certificates(), with_certificates());
    let authorities = |of: &[&World]| -> String {
        of.iter().map(|world| fs::read_to_string(world.path("data/tls/ca.pem")).unwrap()).collect()
    };
    let shown = [node(&world, "kitchen"), node(&other, "cellar")];
    let clients = world.write("clients.pem", authorities(&[&world, &other]));
    let arguments = ["--tls-client-ca", clients.to_str().unwrap()];
    let server = Server::start_with(&world, &[&LISTEN[..], &arguments].concat());
    let connect = |shown: &[String; 2], id: &str| {
        let wire = Box::new(tls(&world, address(&server, "mqtts"), Some(shown)));
        let mut line = Line { wire, version: V5 };
        let answer = line.connect(id);
        (line, answer)
    };
    let (mut kitchen, kitchen_in) = connect(&shown[0], "kitchen");
    let (mut cellar, cellar_in) = connect(&shown[1], "cellar");
    assert_eq!((kitchen_in, cellar_in), (Some(0), Some(0)));
    let mut nobody = Line::open(&world, &server, "mqtts", V5);
    assert_eq!(nobody.connect("nobody"), Some(0));
    world.write("clients.pem", authorities(&[&world]));
    assert!(cellar.is_closed());
    kitchen.ping();
    nobody.ping();
    assert_eq!(connect(&shown[1], "cellar").1, None);
    assert_eq!(connect(&shown[0], "kitchen").1, Some(0));
}

#[test]
fn a_websocket_elsewhere_in_text_or_of_a_foreign_page_is_refused() {
    let world = with_certificates();
    let server = start(&world);
    let place = address(&server, "ws");
    assert_eq!(websocket(tcp(place), "/other").unwrap_err(), StatusCode::NOT_FOUND);
    assert!(websocket(tcp(place), "/mqtt?user=1").is_ok());
    let ask = |request: &str| {
        let mut stream = tcp(place);
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.lines().next().unwrap_or_default().to_owned()
    };
    assert_eq!(ask("GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 426 Upgrade Required");
    assert_eq!(ask("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 404 Not Found");
    assert_eq!(ask("NONSENSE\r\n\r\n"), "HTTP/1.1 400 Bad Request");
    let page = "GET /mqtt HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://evil.example\r\n\r\n";
    assert_eq!(ask(page), "HTTP/1.1 403 Forbidden");
    let mut socket = websocket(tcp(place), "/mqtt").unwrap();
    socket.send(Message::text("hello")).unwrap();
    let closed = loop {
        match socket.read() {
            Ok(Message::Close(frame)) => break frame,
            Ok(_) => {}
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(u16::from(closed.unwrap().code), 1003);
}

#[test]
fn a_websockets_pings_are_answered_while_messages_flow_and_its_close_is_returned() {
    let world = with_certificates();
    let server = start(&world);
    let mut publisher = Client::connect(server.address, "publisher");
    assert!(publisher.retain("big", &noise(2 * 1024 * 1024)));
    let mut line = Socket(websocket(tcp(address(&server, "ws")), "/mqtt").unwrap(), Vec::new());
    line.write_all(&Client::connect_packet(&Options::id("line"))).unwrap();
    line.write_all(b"\x82\x08\x00\x01\x00\x03big\x00").unwrap();
    line.0.send(Message::Ping(vec![1, 2, 3].into())).unwrap();
    let (mut bytes, mut pongs) = (0, 0);
    while bytes < 2 * 1024 * 1024 || pongs == 0 {
        match line.0.read().unwrap() {
            Message::Binary(piece) => bytes += piece.len(),
            Message::Pong(payload) => {
                assert_eq!(&payload[..], [1, 2, 3]);
                pongs += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    line.0.close(None).unwrap();
    let end = loop {
        match line.0.read() {
            // The last of the message may have been under way, in a piece of its own.
            Ok(Message::Close(_) | Message::Binary(_)) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert!(matches!(end, tungstenite::Error::ConnectionClosed), "{end}");
}

/// The regression test of a row in the table of what other brokers do not survive: one idle TCP connection on a TLS or
/// WebSocket port, and nobody else can connect there.
#[test]
fn idle_connections_on_a_tls_or_websocket_port_keep_nobody_out_and_are_closed_in_time() {
    let world = with_certificates();
    let config = world.path("data/broker.toml");
    let mut settings = fs::read_to_string(&config).unwrap();
    settings = settings.replace("#connect = 10", "connect = 2");
    fs::write(&config, settings).unwrap();
    let server = start(&world);
    let (mut idle, mut lines) = (Vec::new(), Vec::new());
    for scheme in ["mqtts", "ws", "wss"] {
        for n in 0..40 {
            let mut stream = tcp(address(&server, scheme));
            // Some say nothing, some begin.
            match (scheme, n % 2) {
                (_, 0) => {}
                ("ws", _) => stream.write_all(b"GET /mqtt HTTP/1.1\r\n").unwrap(),
                _ => stream.write_all(&[0x16, 3, 1, 0, 200, 1]).unwrap(),
            }
            idle.push(stream);
        }
        // A WebSocket and a TLS connection without a CONNECT are idle too.
        let mut line = Line::open(&world, &server, scheme, V3);
        line.wire.flush().unwrap();
        let mut honest = Line::open(&world, &server, scheme, V5);
        assert_eq!(honest.connect("honest"), Some(0), "{scheme}");
        honest.ping();
        lines.push(line);
    }
    assert!(lines.iter_mut().all(Line::is_closed));
    for mut stream in idle {
        let mut rest = Vec::new();
        let end = stream.read_to_end(&mut rest);
        assert!(!matches!(end, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock));
    }
}

#[test]
fn garbage_on_any_port_hurts_nobody() {
    let world = with_certificates();
    let mut server = start(&world);
    let schemes = ["mqtt", "mqtts", "ws", "wss"];
    let mut honest: Vec<_> = schemes.map(|scheme| Line::open(&world, &server, scheme, V3)).into();
    for (n, line) in honest.iter_mut().enumerate() {
        assert_eq!(line.connect(&format!("honest-{n}")), Some(0));
    }
    let mut random = fastrand::Rng::with_seed(11);
    let starts: [&[u8]; 5] =
        [b"", b"GET /mqtt HTTP/1.1\r\n", &[0x16, 3, 1, 2, 0], b"\x10\x0c\x00\x04MQTT", &[0x82, 0xff]];
    for n in 0..400 {
        let mut stream = tcp(address(&server, schemes[n % 4]));
        let rest: Vec<u8> = (0..random.usize(0..2000)).map(|_| random.u8(..)).collect();
        let _ = stream.write_all(starts[random.usize(..starts.len())]).and_then(|()| stream.write_all(&rest));
    }
    // Inside a WebSocket, frames of any kind.
    for _ in 0..100 {
        let mut stream = websocket(tcp(address(&server, "ws")), "/mqtt").unwrap();
        let rest: Vec<u8> = (0..random.usize(1..500)).map(|_| random.u8(..)).collect();
        let _ = stream.get_mut().write_all(&rest);
    }
    for line in &mut honest {
        line.ping();
    }
    assert!(server.is_running());
    for scheme in schemes {
        assert_eq!(Line::open(&world, &server, scheme, V5).connect("another"), Some(0), "{scheme}");
    }
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

#[test]
fn a_device_reads_its_channel_over_tls_while_readers_that_take_nothing_are_closed() {
    let world = with_certificates();
    let config = world.path("data/broker.toml");
    let settings = fs::read_to_string(&config).unwrap();
    fs::write(&config, settings.replace("#write_stall = 30", "write_stall = \"1s\"")).unwrap();
    let server = start(&world);
    let mut publisher = Client::connect(server.address, "publisher");
    let payload = noise(8 * 1024 * 1024);
    assert!(publisher.retain("big", &payload));
    let mut stuck: Vec<_> =
        ["mqtts", "ws", "wss"].map(|scheme| Line::open(&world, &server, scheme, V3)).into();
    for (n, line) in stuck.iter_mut().enumerate() {
        assert_eq!(line.connect(&format!("stuck-{n}")), Some(0));
        line.send(0x82, b"\x00\x01\x00\x03big\x00").unwrap();
    }
    let mut reader = Line::open(&world, &server, "mqtts", V5);
    assert_eq!(reader.connect("reader"), Some(0));
    assert!(reader.retained("big") == payload);
    while server.log().matches("it takes no bytes").count() < 3 {
        reader.ping();
    }
}

#[test]
fn init_writes_what_serve_finds_and_never_writes_over_anything_unasked() {
    let world = World::new();
    let data = world.text("data");
    let made = run("mpypi-broker", &["init", &data, "--tls", "--name", "hub.local"]).expect_code(0);
    assert!(made.stdout.contains("mpypi-broker serve --data"), "{}", made.stdout);
    let before = world.files("data");
    let again = run("mpypi-broker", &["init", &data]).expect_code(1);
    assert!(
        again.stderr.contains("is there already") && again.stderr.contains("--force"),
        "{}",
        again.stderr
    );
    assert!(world.files("data") == before);
    let _ = run("mpypi-broker", &["init", &data, "--tls", "--force"]).expect_code(0);
    let after = world.files("data");
    assert!(
        after["tls/ca.key"] == before["tls/ca.key"] && after["tls/server.pem"] != before["tls/server.pem"]
    );
    // Without certificates of its own, a node's are made nowhere.
    let lost =
        run("mpypi-broker", &["cert", "node", "kitchen", "--data", &world.text("other")]).expect_code(1);
    assert!(lost.stderr.contains("init --tls"), "{}", lost.stderr);
    let _ = node(&world, "kitchen");
    let twice = run("mpypi-broker", &["cert", "node", "kitchen", "--data", &data]).expect_code(1);
    assert!(twice.stderr.contains("is there already"), "{}", twice.stderr);
}

#[test]
fn a_configuration_file_is_found_or_named_and_the_command_line_counts_before_it() {
    let world = with_certificates();
    let file = "data = \"index\"\nlisteners = [{ url = \"mqtt://127.0.0.1:0\" }, { url = \"wss://127.0.0.1:0\" }]\n\
                [tls]\ncert = \"data/tls/server.pem\"\nkey = \"data/tls/server.key\"\n[limits]\nsubscriptions = 1\n";
    let config = world.write("broker.toml", file);
    let config = config.to_str().unwrap();
    let server = Server::launch(&world, &["serve", "--config", config], 2);
    assert!(server.listening[1].starts_with("wss://127.0.0.1:"), "{:?}", server.listening);
    let mut client = Client::connect(server.address, "client");
    assert_eq!(client.subscribe("a", 0), 0);
    assert_eq!(client.subscribe("b", 0), 0x80, "more than one subscription");
    assert_eq!(server.stop("-TERM"), Some(0));
    assert!(world.path("index").is_dir());
    let other = world.text("elsewhere");
    let arguments = ["serve", "--config", config, "--data", &other, "--listen", "127.0.0.1:0"];
    let server = Server::launch(&world, &arguments, 1);
    assert!(world.path("elsewhere").is_dir());
    drop(server);
    for (content, complaint, hint) in [
        ("[limits]\nclient = 1\n", "line 2", "did you mean `clients`?"),
        ("[limits]\npackage = 99999999999\n", "fits into a packet", ""),
        ("listeners = [{ url = \"mqtts://127.0.0.1:0\" }]\n", "needs a certificate", "init --tls"),
        ("[tls]\ncert = \"x\"\n", "certificate without a key", "--tls-key"),
        ("[tls]\ncert = \"x\"\nkey = \"y\"\n", "cannot read", ""),
    ] {
        world.write("bad.toml", content);
        let bad = world.text("bad.toml");
        let arguments = ["serve", "--config", &bad, "--data", &other];
        let refused = run("mpypi-broker", &arguments).expect_code(1);
        assert!(refused.stderr.contains(complaint), "{content}: {}", refused.stderr);
        assert!(refused.stderr.contains(hint), "{content}: {}", refused.stderr);
    }
}

#[test]
fn a_listener_with_tls_stops_as_gracefully_as_any() {
    let world = with_certificates();
    let server = start(&world);
    let mut lines: Vec<_> =
        ["mqtts", "ws", "wss"].map(|scheme| Line::open(&world, &server, scheme, V5)).into();
    for (n, line) in lines.iter_mut().enumerate() {
        assert_eq!(line.connect(&format!("line-{n}")), Some(0));
    }
    let silent = tcp(address(&server, "mqtts"));
    assert_eq!(server.stop("-TERM"), Some(0));
    for line in &mut lines {
        assert!(line.is_closed());
    }
    drop(silent);
}

#[test]
fn https_is_http_with_the_brokers_certificate_and_knows_a_node_by_its_own() {
    let world = with_certificates();
    let kitchen = node(&world, "kitchen");
    let (publisher, viewer) = (user(&world, "ci", "publisher"), user(&world, "look", "viewer"));
    let server = Server::start_with(
        &world,
        &[
            &["--http", "https://127.0.0.1:0", "--http", "127.0.0.1:0", "--tls-cert"][..],
            &[&world.text("data/tls/server.pem"), "--tls-key", &world.text("data/tls/server.key")],
            &["--tls-client-ca", &world.text("data/tls/ca.pem")],
        ]
        .concat(),
    );
    let secure = |shown: Option<&[String; 2]>| Web::over(tls(&world, address(&server, "https"), shown));
    let mut stranger = secure(None);
    assert_eq!(stranger.ask("GET", "/healthz", &[], b"").code, 200);
    let refused = stranger.ask("GET", "/metrics", &[], b"").expect(401);
    assert!(refused.header("www-authenticate").unwrap().starts_with("Basic "));
    assert_eq!(refused.json()["status"], 401);
    assert!(refused.json()["hint"].as_str().unwrap().contains("Bearer"));
    let bearer = |token: &str| format!("Bearer {token}");
    assert_eq!(stranger.ask("GET", "/metrics", &[("Authorization", &bearer(&viewer))], b"").code, 200);
    assert_eq!(stranger.ask("GET", "/metrics", &[("Authorization", &bearer(&publisher))], b"").code, 403);
    let refused = secure(Some(&kitchen)).ask("GET", "/metrics", &[], b"").expect(403);
    assert!(refused.json()["detail"].as_str().unwrap().contains("node `kitchen`"));
    assert_eq!(Web::get(address(&server, "http"), "/healthz", &[]).code, 200);
}
