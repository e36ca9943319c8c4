//! The HTTP gateway, from outside: connections, bounds, and who may what on every route.

use std::{io::Write, path::Path};

use mpypi_protocol::Digest;
use mpypi_tests::{
    Client, Options, Server, World,
    face::eventually,
    files_below,
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
    // Nor does one that does not go on with a body, whatever it promised.
    let mut upload = Web::open(server.http.unwrap());
    upload.send(b"POST /upload/dev HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n");
    upload.send(b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n");
    assert_eq!(upload.answer("POST").unwrap().code, 408);
    assert!(upload.is_closed());
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
    let long = "x".repeat(1_000_000);
    for (request, code) in [
        ("nonsense\r\n\r\n".to_owned(), 400),
        (format!("GET /{long} HTTP/1.1\r\n\r\n"), 431),
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
        let code_of = |answer: &Answer| if answer.code == 414 { 431 } else { answer.code };
        assert!(answer.as_ref().is_none_or(|answer| code_of(answer) == code), "{code}: {answer:?}");
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

/// What each route answers to whom: to nobody, to nonsense for a login, and to each role. `narrow` is a node that may read
/// channel `stable` alone; the packages, and all that is asked for here, are in channel `dev`.
///
/// Whoever adds a route adds it here: a test below looks for routes that are not.
#[rustfmt::skip]
const ROUTES: &[(&str, &str, &str, [u16; 7])] = &[
    // Method, path, route                                             nobody nonsense admin publisher viewer node narrow
    ("GET", "/healthz", "/healthz",                                       [200, 200, 200, 200, 200, 200, 200]),
    ("GET", "/metrics", "/metrics",                                       [401, 401, 200, 403, 200, 403, 403]),
    // Who knows a digest may have the bytes, as over MQTT.
    ("GET", "/packages/WHEEL", "/packages/{digest}",                      [401, 401, 200, 200, 200, 200, 200]),
    ("HEAD", "/packages/WHEEL", "/packages/{digest}",                     [401, 401, 200, 200, 200, 200, 200]),
    ("GET", "/packages/WHEEL/hello-1.0-py3-none-any.whl", "/packages/{digest}/{file}", [401, 401, 200, 200, 200, 200, 200]),
    // A src file's place has to be known from a list.
    ("GET", "/packages/SRC", "/packages/{digest}",                        [401, 401, 200, 200, 200, 200, 404]),
    ("GET", "/firmware/esp32.bin", "/firmware/{file}",                    [401, 401, 200, 200, 200, 200, 404]),
    ("GET", "/channels/dev/firmware/esp32.bin", "/firmware/{file}",       [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/channels/dev/files", "/files",                              [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/channels/dev/files/version", "/files/version",              [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/channels/dev/files/SUM", "/files/{sum}",                    [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/channels/dev/file/SUM", "/file/{sum}",                      [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/channels/stable/files", "/files",                           [401, 401, 200, 200, 200, 200, 200]),
    ("GET", "/simple", "/simple",                                         [401, 401, 308, 308, 308, 308, 308]),
    ("GET", "/simple/", "/simple/",                                       [401, 401, 200, 200, 200, 200, 200]),
    ("GET", "/simple/hello", "/simple/{project}",                         [401, 401, 308, 308, 308, 308, 308]),
    ("GET", "/simple/hello/", "/simple/{project}/",                       [401, 401, 200, 200, 200, 200, 404]),
    ("GET", "/channels/dev/simple/", "/simple/",                          [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/channels/dev/simple/hello/", "/simple/{project}/",          [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/mip/package/6/hello/latest.json", "/package/{mpy}/{name}/{version}", [401, 401, 200, 200, 200, 200, 404]),
    ("GET", "/channels/dev/mip/package/py/hello/1.0.json", "/package/{mpy}/{name}/{version}", [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/mip/file/FI/FILE", "/file/{start}/{digest}",                [401, 401, 200, 200, 200, 200, 404]),
    ("GET", "/mip/hello/package.json", "/{name}/package.json",            [401, 401, 200, 200, 200, 200, 404]),
    ("GET", "/mip/hello/file/FI/FILE", "/{name}/file/{start}/{digest}",   [401, 401, 200, 200, 200, 200, 404]),
    ("GET", "/mip/hello/1.0/package.json", "/{name}/{version}/package.json", [401, 401, 200, 200, 200, 200, 404]),
    ("GET", "/mip/hello/1.0/file/FI/FILE", "/{name}/{version}/file/{start}/{digest}", [401, 401, 200, 200, 200, 200, 404]),
    // Who may upload is told that this is no form; who may not, before a byte of it is looked at.
    ("POST", "/upload/dev", "/upload/{channel}",                          [401, 401, 415, 415, 403, 403, 403]),
    ("POST", "/upload/dev/", "/upload/{channel}/",                        [401, 401, 415, 415, 403, 403, 403]),
    ("POST", "/channels/dev/files", "/files",                             [405, 405, 405, 405, 405, 405, 405]),
    ("DELETE", "/packages/WHEEL", "/packages/{digest}",                   [405, 405, 405, 405, 405, 405, 405]),
    ("PUT", "/upload/dev", "/upload/{channel}",                           [405, 405, 405, 405, 405, 405, 405]),
    // Devices of ThingsBoard's are known by a token in the path, whoever else asks; cOTA's by an owner that they alone are told.
    ("GET", "/api/v1/TOKEN/attributes", "/attributes",                   [200, 200, 200, 200, 200, 200, 200]),
    ("POST", "/api/v1/TOKEN/attributes", "/attributes",                  [400, 400, 400, 400, 400, 400, 400]),
    ("GET", "/api/v1/TOKEN/attributes/updates?timeout=1", "/attributes/updates",   [408, 408, 408, 408, 408, 408, 408]),
    ("POST", "/api/v1/TOKEN/telemetry", "/telemetry",                    [400, 400, 400, 400, 400, 400, 400]),
    ("GET", "/api/v1/TOKEN/firmware?title=dev&version=1", "/firmware",   [200, 200, 200, 200, 200, 200, 200]),
    ("GET", "/api/v1/TOKEN/software?title=dev&version=1", "/software",   [404, 404, 404, 404, 404, 404, 404]),
    ("GET", "/api/v1/TOKEN/rpc?timeout=1", "/rpc",                                 [408, 408, 408, 408, 408, 408, 408]),
    ("POST", "/api/v1/TOKEN/rpc/1", "/rpc/{id}",                         [200, 200, 200, 200, 200, 200, 200]),
    ("GET", "/github/api/repos/mpypi/dev/git/trees/main", "/github/api/repos/{owner}/{channel}/git/trees/{branch}", [404, 404, 404, 404, 404, 404, 404]),
    ("GET", "/github/raw/mpypi/dev/main/main.py", "/github/raw/{owner}/{channel}/{branch}/{*path}", [404, 404, 404, 404, 404, 404, 404]),
    ("GET", "api.github.com/repos/mpypi/dev/git/trees/main", "/repos/{owner}/{channel}/git/trees/{branch}", [404, 404, 404, 404, 404, 404, 404]),
    ("GET", "raw.githubusercontent.com/mpypi/dev/main/main.py", "/{owner}/{channel}/{branch}/{*path}", [404, 404, 404, 404, 404, 404, 404]),
    // The fleet API shows what MQTT would: a node sees itself and its channels.
    ("GET", "/api/openapi.json", "/api/openapi.json",                     [200, 200, 200, 200, 200, 200, 200]),
    ("GET", "/api/me", "/api/me",                                         [401, 401, 200, 200, 200, 200, 200]),
    ("GET", "/api/overview", "/api/overview",                             [401, 401, 200, 200, 200, 403, 403]),
    ("GET", "/api/overview/history", "/api/overview/history",             [401, 401, 200, 200, 200, 403, 403]),
    ("GET", "/api/nodes", "/api/nodes",                                   [401, 401, 200, 200, 200, 200, 200]),
    ("GET", "/api/nodes/node", "/api/nodes/{node}",                       [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/api/nodes/node/log", "/api/nodes/{node}/log",               [401, 401, 200, 200, 200, 200, 403]),
    ("POST", "/api/nodes/node/cmd", "/api/nodes/{node}/cmd",              [401, 401, 415, 415, 403, 403, 403]),
    ("GET", "/api/channels", "/api/channels",                             [401, 401, 200, 200, 200, 200, 200]),
    ("GET", "/api/channels/dev", "/api/channels/{channel}",               [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/api/channels/dev/releases", "/api/channels/{channel}/releases", [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/api/channels/dev/releases/1", "/api/channels/{channel}/releases/{sequence}", [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/api/channels/dev/diff", "/api/channels/{channel}/diff",     [401, 401, 200, 200, 200, 200, 403]),
    ("GET", "/api/channels/dev/rollout", "/api/channels/{channel}/rollout", [401, 401, 200, 200, 200, 403, 403]),
    ("POST", "/api/channels/dev/rollout", "/api/channels/{channel}/rollout", [401, 401, 415, 415, 403, 403, 403]),
    ("GET", "/api/rollouts", "/api/rollouts",                             [401, 401, 200, 200, 200, 403, 403]),
    ("GET", "/api/packages", "/api/packages",                             [401, 401, 200, 200, 200, 200, 200]),
    // Who is let in hears no end of it, so what is asked for here is nonsense; who hears what is tested with the API.
    ("GET", "/api/events?node=%2B", "/api/events",                        [401, 401, 400, 400, 400, 400, 400]),
    ("DELETE", "/api/nodes/node", "/api/nodes/{node}",                    [405, 405, 405, 405, 405, 405, 405]),
    ("GET", "/nothing", "",                                               [404, 404, 404, 404, 404, 404, 404]),
];

#[test]
fn no_role_reads_or_changes_over_http_what_it_may_not_on_any_route() {
    let world = World::new();
    let roles = ["admin", "publisher", "viewer", "node", "narrow"];
    let tokens = roles.map(|name| user(&world, name, if name == "narrow" { "node" } else { name }));
    world.write("data/rules.toml", "[[rules]]\nnodes = \"narrow\"\nchannels = [\"stable\"]\n");
    let device = crate::things::add_device(&world, "kitchen", &[]);
    let server = Server::start_with(&world, &HTTP);
    let login = Some(("admin".to_owned(), tokens[0].clone()));
    let (mut admin, _) =
        Client::try_connect(server.address, &Options { login, ..Options::id("admin") }).unwrap();
    let wheel = wheel("hello", "1.0", "x = 1\n");
    let (wheel_digest, image, src) = (Digest::of(&wheel), Digest::of(b"image"), Digest::of(b"print(1)\n"));
    assert!(admin.retain(&format!("mpypi/packages/wheel/{wheel_digest}"), &wheel));
    assert!(admin.retain(&format!("mpypi/packages/firmware/{image}"), b"image"));
    assert!(admin.retain(&format!("mpypi/packages/src/main.py/{src}"), b"print(1)\n"));
    let list = format!(
        r#"[{{"type":"release","channel":"dev","sequence":1,"version":"1"}},
        {{"type":"wheel","name":"hello","version":"1.0","pkg_sha256":"{wheel_digest}","tag":"py3-none-any"}},
        {{"type":"firmware","name":"esp32","version":"1","pkg_sha256":"{image}"}},
        {{"type":"src","path":"main.py","pkg_sha256":"{src}"}}]"#
    );
    assert!(admin.retain("mpypi/channels/dev", list.as_bytes()));
    assert!(admin.retain("mpypi/nodes/node/online", b"1"));
    let record = r#"{"id":"0123456789abcdef","channel":"dev","version":"1","status":"running","step":0,"first":1,
        "policy":{"steps":["100"],"wait":1,"patience":1,"max-failures":"2","min-success":"95","on-failure":"pause"}}"#;
    assert!(admin.retain("mpypi/channels/dev/rollout", record.as_bytes()));
    // What was acknowledged is in the index, and about to be where the API looks.
    let bearer = format!("Bearer {}", tokens[0]);
    for path in ["/api/nodes/node", "/api/channels/dev/rollout"] {
        eventually("the API does not know it", || {
            let answer = Web::get(server.http.unwrap(), path, &[("Authorization", &bearer)]);
            (answer.code == 200).then_some(())
        });
    }
    let file = Digest::of(b"x = 1\n").to_string();
    // Of wrong passwords there is a test elsewhere: each of them has to wait longer.
    let nonsense = "Digest username=\"admin\"".to_owned();
    let bearer = |token: String| Some(format!("Bearer {token}"));
    let callers: Vec<_> = [None, Some(nonsense)].into_iter().chain(tokens.map(bearer)).collect();
    let mut wrong = Vec::new();
    for (method, path, _, expected) in ROUTES {
        let path = path
            .replace("WHEEL", &wheel_digest.to_string())
            .replace("SRC", &src.to_string())
            .replace("TOKEN", &device)
            .replace("SUM", "2f47a786543348e47f300fb64a2a213ecb483431")
            .replace("FILE", &file)
            .replace("FI/", &format!("{}/", &file[..2]));
        for (caller, code) in callers.iter().zip(expected) {
            let mut headers: Vec<_> = caller.iter().map(|login| ("Authorization", login.as_str())).collect();
            // What comes before the path is another host that answers there.
            let (host, at) = path.split_at(path.find('/').unwrap());
            if !host.is_empty() {
                headers.push(("Host", host));
            }
            let answer = Web::open(server.http.unwrap()).ask(method, at, &headers, b"");
            if answer.code != *code {
                wrong.push(format!("{method} {path}: {} and not {code} to {caller:?}", answer.code));
            }
            let is_narrow = callers.last() == Some(caller)
                && answer.code == 200
                && !path.starts_with("/packages/")
                && path != "/api/openapi.json";
            if is_narrow && String::from_utf8_lossy(&answer.body).contains("hello") {
                wrong.push(format!("{path} tells a node of a channel that is not for it"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(admin.retained("mpypi/channels/dev").unwrap().payload, list.as_bytes());
}

/// A wheel with one module.
fn wheel(name: &str, version: &str, content: &str) -> Vec<u8> {
    let folder = format!("{name}-{version}.dist-info");
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (path, content) in [
        (format!("{name}.py"), content.to_owned()),
        (format!("{folder}/METADATA"), format!("Name: {name}\nVersion: {version}\n")),
        (format!("{folder}/WHEEL"), "Wheel-Version: 1.0\nTag: py3-none-any\n".to_owned()),
        (
            format!("{folder}/RECORD"),
            format!("{name}.py,,\n{folder}/METADATA,,\n{folder}/WHEEL,,\n{folder}/RECORD,,\n"),
        ),
    ] {
        zip.start_file(path, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(content.as_bytes()).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

#[test]
fn every_route_is_in_the_table_of_who_may_what() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../broker/src");
    let mut routes = Vec::new();
    for folder in ["gateway", "faces"] {
        for (name, content) in files_below(&source.join(folder)) {
            let text = String::from_utf8(content).unwrap();
            // What comes behind a door of its own is in a table of its own.
            for start in [".route(\"", "utoipa::path(get, path = \"", "utoipa::path(post, path = \""] {
                for (at, _) in text.match_indices(start) {
                    let route = text[at + start.len()..].split('"').next().unwrap().to_owned();
                    routes.push((format!("{folder}/{name}"), route));
                }
            }
            // None is written in another way.
            let known = ["utoipa::path(get, path = ", "utoipa::path(post, path = "];
            let known: usize = known.iter().map(|start| text.matches(start).count()).sum();
            assert_eq!(text.matches("utoipa::path(").count(), known, "{name}");
        }
    }
    assert!(routes.len() >= 20, "{routes:?}");
    for (file, route) in routes {
        assert!(
            ROUTES.iter().any(|(_, _, known, _)| *known == route),
            "`{route}` of {file} is not in the table"
        );
    }
}
