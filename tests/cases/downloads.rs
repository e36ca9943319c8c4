//! Packages and firmware over HTTP: ranges, validators, and many readers at once.

use std::{io::Read, net::SocketAddr};

use mpypi_protocol::Digest;
use mpypi_tests::{
    Client, Server, World, bytes,
    http::{Answer, Web},
};

const HTTP: [&str; 2] = ["--http", "127.0.0.1:0"];

fn retain(client: &mut Client, kind: &str, package: &[u8]) -> String {
    let digest = Digest::of(package).to_string();
    assert!(client.retain(&format!("mpypi/packages/{kind}/{digest}"), package));
    digest
}

fn ask(server: &Server, path: &str, headers: &[(&str, &str)]) -> Answer {
    Web::get(server.http.unwrap(), path, headers)
}

#[test]
fn any_bytes_of_a_package_can_be_asked_for_and_what_is_there_already_is_not_sent_again() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    let mut client = Client::connect(server.address, "publisher");
    // One within the database, one in a file, over several pieces.
    for size in [1000, 700_001] {
        let package = bytes(size as u64, size);
        let digest = retain(&mut client, "wheel", &package);
        let path = format!("/packages/{digest}");
        let whole = ask(&server, &path, &[]).expect(200);
        assert_eq!(whole.body, package);
        let etag = format!("\"{digest}\"");
        for (name, value) in [
            ("content-length", &*size.to_string()),
            ("etag", &etag),
            ("accept-ranges", "bytes"),
            ("cache-control", "public, max-age=31536000, immutable"),
            ("content-type", "application/octet-stream"),
            ("x-content-type-options", "nosniff"),
        ] {
            assert_eq!(whole.header(name), Some(value), "{name}");
        }
        let mut web = Web::open(server.http.unwrap());
        let head = web.ask("HEAD", &path, &[], b"").expect(200);
        assert_eq!(
            (head.header("content-length"), head.header("etag")),
            (Some(&*size.to_string()), Some(&*etag))
        );
        let part = |range: &str, from: usize, to: usize| {
            let part = ask(&server, &path, &[("Range", range)]).expect(206);
            assert_eq!(part.body, package[from..to], "{range}");
            assert_eq!(part.header("content-range"), Some(&*format!("bytes {from}-{}/{size}", to - 1)));
        };
        part("bytes=0-0", 0, 1);
        part("bytes=10-19", 10, 20);
        part("bytes=-7", size - 7, size);
        part("bytes=500-", 500, size);
        part(&format!("bytes=0-{size}"), 0, size);
        part("bytes=999-99999999999999999999", 999, size);
        if size > 600_000 {
            part("bytes=262143-262144", 262_143, 262_145);
            part("bytes=262144-600000", 262_144, 600_001);
        }
        for range in ["bytes=5-1", "bytes=x", "lines=0-1", "bytes=0-1,y", ""] {
            assert_eq!(ask(&server, &path, &[("Range", range)]).expect(200).body, package, "{range}");
        }
        let none = ask(&server, &path, &[("Range", &format!("bytes={size}-"))]).expect(416);
        assert_eq!(none.header("content-range"), Some(&*format!("bytes */{size}")));
        // Several at once.
        let parts = ask(&server, &path, &[("Range", "bytes=0-4,10-14, -3")]).expect(206);
        let boundary =
            parts.header("content-type").unwrap().strip_prefix("multipart/byteranges; boundary=").unwrap();
        let mut expected = Vec::new();
        for (from, to) in [(0, 5), (10, 15), (size - 3, size)] {
            expected.extend_from_slice(
                format!(
                    "\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes {from}-{}/{size}\r\n\r\n",
                    to - 1
                )
                .as_bytes(),
            );
            expected.extend_from_slice(&package[from..to]);
        }
        expected.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
        assert_eq!(parts.body, expected);
        // Conditions.
        let code = |headers: &[(&str, &str)]| ask(&server, &path, headers).code;
        for known in [&*etag, "*", &format!("W/{etag}"), &format!("\"x\", {etag}")] {
            assert_eq!(code(&[("If-None-Match", known)]), 304, "{known}");
        }
        assert_eq!(code(&[("If-None-Match", "\"x\"")]), 200);
        assert_eq!(code(&[("If-Match", "\"x\"")]), 412);
        assert_eq!(code(&[("If-Match", &etag)]), 200);
        assert_eq!(code(&[("Range", "bytes=0-1"), ("If-Range", &etag)]), 206);
        assert_eq!(code(&[("Range", "bytes=0-1"), ("If-Range", "\"x\"")]), 200);
        assert_eq!(code(&[("Range", "bytes=0-1"), ("If-Range", &format!("W/{etag}"))]), 200);
    }
    for path in [
        "/packages/x",
        "/packages/",
        &format!("/packages/{}", Digest::of(b"none")),
        "/packages/..%2f..%2fusers.toml",
    ] {
        assert_eq!(ask(&server, path, &[]).code, 404, "{path}");
    }
    assert_eq!(ask(&server, &format!("/packages/{}", Digest::EMPTY), &[]).expect(200).body, b"");
}

#[test]
fn firmware_is_found_by_its_name_the_newest_first() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    let mut client = Client::connect(server.address, "publisher");
    let mut publish = |channel: &str, images: &[(&str, &str, Option<&str>)]| {
        let mut entries =
            vec![format!(r#"{{"type":"release","channel":"{channel}","sequence":1,"version":"1"}}"#)];
        for (name, version, target) in images {
            let image = format!("{name} {version} {target:?}");
            let digest = retain(&mut client, "firmware", image.as_bytes());
            let target = target.map(|target| format!(r#","target":"{target}""#)).unwrap_or_default();
            entries.push(format!(
                r#"{{"type":"firmware","name":"{name}","version":"{version}"{target},"pkg_sha256":"{digest}"}}"#
            ));
        }
        assert!(
            client
                .retain(&format!("mpypi/channels/{channel}"), format!("[{}]", entries.join(",")).as_bytes())
        );
    };
    publish(
        "dev",
        &[("esp32", "1.10.0", None), ("rp2", "2.0", Some("pico")), ("rp2", "2.0", Some("pico-w"))],
    );
    publish("stable", &[("esp32", "1.9.0", None)]);
    let get = |path: &str| ask(&server, path, &[]);
    assert_eq!(get("/firmware/esp32.bin").expect(200).text(), "esp32 1.10.0 None");
    assert_eq!(get("/firmware/firmware-esp32-v1.9.0.bin").expect(200).text(), "esp32 1.9.0 None");
    assert_eq!(get("/channels/stable/firmware/esp32.bin").expect(200).text(), "esp32 1.9.0 None");
    assert_eq!(get("/firmware/rp2-pico-w.bin").expect(200).text(), "rp2 2.0 Some(\"pico-w\")");
    let two = get("/firmware/rp2.bin").expect(409);
    assert!(two.json()["hint"].as_str().unwrap().contains("pico"), "{}", two.text());
    let part = ask(&server, "/firmware/esp32.bin", &[("Range", "bytes=0-4")]).expect(206);
    assert_eq!((part.text(), part.header("cache-control")), ("esp32", Some("no-cache")));
    for path in
        ["/firmware/esp32", "/firmware/esp.bin", "/firmware/.bin", "/channels/stable/firmware/rp2.bin"]
    {
        assert_eq!(get(path).code, 404, "{path}");
    }
}

/// The most memory that a process has had, in KiB.
fn peak(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_thousand_downloads_of_a_mebibyte_at_once_take_no_mebibyte_each() {
    const READERS: usize = 1000;
    let files = rlimit::increase_nofile_limit(4096).unwrap();
    assert!(files >= 2048, "{files} open files are too few for this test");
    let world = World::new();
    // A slow machine needs its time for a gibibyte, and the last reader waits as long.
    world.write("data/broker.toml", "[limits]\nwrite_stall = \"10m\"\n");
    let server = Server::start_with(&world, &HTTP);
    let mut client = Client::connect(server.address, "publisher");
    let packages: Vec<_> = (0..4).map(|n| bytes(n, 1024 * 1024)).collect();
    let digests: Vec<_> = packages.iter().map(|package| retain(&mut client, "wheel", package)).collect();
    let before = peak(&server);
    // All ask before anybody reads.
    let mut readers: Vec<_> = (0..READERS).map(|_| Web::open(server.http.unwrap())).collect();
    for (n, reader) in readers.iter_mut().enumerate() {
        let request = format!("GET /packages/{} HTTP/1.1\r\nHost: localhost\r\n\r\n", digests[n % 4]);
        reader.send(request.as_bytes());
    }
    for (n, reader) in readers.iter_mut().enumerate() {
        let answer = reader.answer("GET").unwrap().expect(200);
        assert!(answer.body == packages[n % 4], "reader {n} got something else");
    }
    let grown = peak(&server) - before;
    assert!(grown < 128 * 1024, "{READERS} readers took {grown} KiB");
    eprintln!("{READERS} downloads of 1 MiB at once: {grown} KiB more memory at most");
}

/// A connection that takes little before its reader reads.
fn narrow(address: SocketAddr) -> Web {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    socket.connect(&address.into()).unwrap();
    Web::over(socket.into())
}

#[test]
fn who_takes_nothing_of_a_download_is_given_up_and_gives_its_place_back() {
    let world = World::new();
    world.write("data/broker.toml", "[limits]\nwrite_stall = \"300ms\"\nhttp_clients = 2\n");
    let server = Server::start_with(&world, &HTTP);
    let mut client = Client::connect(server.address, "publisher");
    let digest = retain(&mut client, "firmware", &bytes(1, 8 * 1024 * 1024));
    let mut stuck: Vec<_> = (0..2).map(|_| narrow(server.http.unwrap())).collect();
    for web in &mut stuck {
        web.send(format!("GET /packages/{digest} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
    }
    // Both places are taken, until the broker gives up.
    let mut others: Vec<_> = (0..2).map(|_| Web::open(server.http.unwrap())).collect();
    for other in &mut others {
        assert_eq!(other.ask("GET", "/healthz", &[], b"").code, 200);
    }
    for web in stuck {
        let mut come = Vec::new();
        let _ = web.stream().read_to_end(&mut come);
        assert!(come.len() < 8 * 1024 * 1024, "it was cut");
    }
}
