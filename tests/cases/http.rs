//! The HTTP gateway, from outside: connections, bounds, and who may what on every route.

use mpypi_tests::{
    Client, Server, World,
    http::{Answer, Web},
    run,
};

const HTTP: [&str; 2] = ["--http", "127.0.0.1:0"];

fn user(world: &World, name: &str, role: &str) -> String {
    let arguments = ["user", "add", name, "--role", role, "--token", "--data", &world.text("data")];
    run("mpypi-broker", &arguments).expect_code(0).stdout.trim().to_owned()
}

fn get(server: &Server, path: &str) -> Answer {
    Web::get(server.http.unwrap(), path, &[])
}

#[test]
fn a_connection_carries_many_requests_until_it_is_asked_to_end() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    let mut web = Web::open(server.http.unwrap());
    for _ in 0..3 {
        assert_eq!(web.ask("GET", "/healthz", &[], b"").code, 200);
        assert_eq!(web.ask("HEAD", "/healthz", &[], b"").code, 200);
        assert_eq!(web.ask("GET", "/nothing", &[], b"").code, 404);
        assert_eq!(web.ask("POST", "/healthz", &[], b"{}").code, 405);
    }
    // Several at once are answered in their order.
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    web.send((get("/healthz") + &get("/nothing") + &get("/metrics")).as_bytes());
    assert_eq!([(); 3].map(|()| web.answer("GET").unwrap().code), [200, 404, 200]);
    assert_eq!(web.ask("GET", "/healthz", &[("Connection", "close")], b"").code, 200);
    assert!(web.is_closed());
    // What an old client says closes too.
    let mut old = Web::open(server.http.unwrap());
    old.send(b"GET /healthz HTTP/1.0\r\n\r\n");
    assert_eq!(old.answer("GET").unwrap().code, 200);
    assert!(old.is_closed());
}

#[test]
fn who_dawdles_with_a_request_is_sent_away_and_others_are_served() {
    let world = World::new();
    world.write(
        "data/broker.toml",
        "[limits]\nhttp_head = \"300ms\"\nread_stall = \"300ms\"\nhttp_clients = 8\n",
    );
    let server = Server::start_with(&world, &HTTP);
    // Each takes a place; together they take all but one.
    let mut slow: Vec<_> = (0..7).map(|_| Web::open(server.http.unwrap())).collect();
    for web in &mut slow {
        web.send(b"GET /healthz HTTP/1.1\r\nHost: loc");
    }
    assert_eq!(get(&server, "/healthz").code, 200);
    for web in &mut slow {
        assert!(web.is_closed());
    }
    // Nor does a connection stay on which nothing more is asked.
    let mut idle = Web::open(server.http.unwrap());
    assert_eq!(idle.ask("GET", "/healthz", &[], b"").code, 200);
    assert!(idle.is_closed());
    assert_eq!(get(&server, "/healthz").code, 200);
}

#[test]
fn nonsense_is_refused_and_does_no_harm() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    let long = "x".repeat(100_000);
    for (request, code) in [
        ("nonsense\r\n\r\n".to_owned(), 400),
        (format!("GET /{long} HTTP/1.1\r\n\r\n"), 414),
        (format!("GET / HTTP/1.1\r\nX: {long}\r\n\r\n"), 431),
        ("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n".to_owned(), 400),
        ("GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(), 404),
        ("GET /%2e%2e/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(), 404),
    ] {
        let mut web = Web::open(server.http.unwrap());
        web.send(request.as_bytes());
        let answer = web.answer("GET");
        // The connection may also just end, as where something too long is still being sent.
        assert!(answer.as_ref().is_none_or(|answer| answer.code == code), "{code}: {answer:?}");
    }
    assert_eq!(get(&server, "/healthz").code, 200);
}

#[test]
fn without_users_no_page_of_another_site_may_ask() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    let ask = |host: &str, origin: &str| {
        let mut web = Web::open(server.http.unwrap());
        web.send(format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\n{origin}\r\n").as_bytes());
        web.answer("GET").unwrap().code
    };
    assert_eq!(ask("localhost:8080", ""), 200);
    assert_eq!(ask("127.0.0.1", "Origin: http://localhost:8080\r\n"), 200);
    assert_eq!(ask("localhost", "Origin: http://evil.example\r\n"), 403);
    assert_eq!(ask("evil.example:8080", ""), 403);
    drop(server);
    user(&world, "ci", "viewer");
    let server = Server::start_with(&world, &HTTP);
    let mut web = Web::open(server.http.unwrap());
    web.send(b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    assert_eq!(web.answer("GET").unwrap().code, 401, "it has to log in as all others");
}

#[test]
fn what_is_asked_is_counted_by_face_and_status() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    let mut client = Client::connect(server.address, "client");
    client.fence();
    let first = get(&server, "/healthz").body.len();
    assert_eq!(get(&server, "/nothing").code, 404);
    let text = get(&server, "/metrics").text().to_owned();
    let line = |line: &str| {
        text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' ')).map(str::to_owned)
    };
    let one = Some("1".to_owned());
    assert_eq!(line("mpypi_http_requests_total{face=\"broker\",code=\"200\"}"), one);
    assert_eq!(line("mpypi_http_requests_total{face=\"broker\",code=\"404\"}"), one);
    assert!(line("mpypi_http_connections").unwrap().parse::<u64>().unwrap() > 0);
    let sent: usize = line("mpypi_http_sent_bytes_total{face=\"broker\"}").unwrap().parse().unwrap();
    assert!(sent > first);
}
