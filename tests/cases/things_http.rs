//! The same devices over HTTP, asked with curl; and cOTA's, whose files come from what it takes for GitHub.

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
};

use mpypi_protocol::{Digest, node::Phase, node::State};
use mpypi_tests::{Authority, Client, PATIENCE, Server, Validity, World, run};
use serde_json::{Value, json};

use crate::things::{add_device, broker_with_device, image, parsed, publish};

/// What curl was answered.
#[derive(Debug)]
struct Answer {
    code: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

fn curl(server: &Server, path: &str, more: &[&str]) -> Answer {
    let url = format!("http://{}{path}", server.http.expect("it speaks HTTP"));
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--include", "--max-time", &PATIENCE.as_secs().to_string()])
        .args(more)
        .arg(url)
        .output()
        .expect("curl is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let end = output.stdout.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(output.stdout[..end].to_vec()).unwrap().to_ascii_lowercase();
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { code, head, body: output.stdout[end + 4..].to_vec() }
}

#[test]
fn every_call_is_answered_as_thingsboard_answers_it() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &["--software", "apps"]);
    let api = |path: &str, more: &[&str]| curl(&server, &format!("/api/v1/{token}{path}"), more);
    let code = |path: &str, more: &[&str]| api(path, more).code;
    let post = |path: &str, body: &str| {
        let answer = api(path, &["--header", "Content-Type: application/json", "--data", body]);
        (answer.code, answer.body.len())
    };

    // Nothing was published.
    let nothing = api("/attributes?clientKeys=a&sharedKeys=fw_title", &[]);
    assert_eq!((nothing.code, &nothing.body[..]), (200, &b"{}"[..]));
    assert_eq!(api("/attributes", &[]).json(), json!({}));
    assert_eq!(code("/firmware?title=dev&version=1.10", &[]), 404);

    let bytes = image(1, 100_000);
    publish(&world, &server, "1.10", &bytes);
    let shared = json!({
        "fw_title": "dev", "fw_version": "1.10", "fw_tag": "dev 1.10", "fw_size": 100_000,
        "fw_checksum_algorithm": "SHA256", "fw_checksum": Digest::of(&bytes).to_string(),
    });
    assert_eq!(api("/attributes", &[]).json(), json!({"shared": shared}));
    assert_eq!(post("/attributes", r#"{"fw_title":"dev","fw_version":"1.10","n":null}"#), (200, 0));
    let both = api("/attributes?clientKeys=fw_version,&sharedKeys=fw_size&sharedKeys=fw_title,x", &[]).json();
    let expected =
        json!({"client": {"fw_version": "1.10"}, "shared": {"fw_size": 100_000, "fw_title": "dev"}});
    assert_eq!(both, expected);
    assert_eq!(api("/attributes?clientKeys=&sharedKeys=", &[]).json()["client"]["fw_version"], "1.10");

    for body in ["{}", r#"{"a":1}"#, r#"{"ts":1,"values":{"a":1}}"#, r#"[{"a":1},{"ts":1,"values":{}}]"#] {
        assert_eq!(post("/telemetry", body), (200, 0), "{body}");
    }
    for (path, body) in [("/telemetry", "1"), ("/telemetry", "{"), ("/attributes", "[]"), ("/attributes", "")]
    {
        assert_eq!(post(path, body).0, 400, "{path} {body}");
    }
    let large = world.write("large", format!("{{\"x\":\"{}\"}}", "y".repeat(20_000)));
    assert_eq!(code("/attributes", &["--data", &format!("@{}", large.display())]), 413);

    let whole = api("/firmware?title=dev&version=1.10", &[]);
    assert!(whole.code == 200 && whole.body == bytes);
    assert!(whole.head.contains("content-disposition: attachment;filename=dev.bin"), "{}", whole.head);
    assert!(whole.head.contains("content-length: 100000"), "{}", whole.head);
    assert!(api("/firmware?title=dev&version=1.10&size=0&chunk=0", &[]).body == bytes);
    let mut pieces = Vec::new();
    for chunk in 0.. {
        let piece = api(&format!("/firmware?title=dev&version=1.10&size=30000&chunk={chunk}"), &[]);
        assert_eq!(piece.code, 200);
        if piece.body.is_empty() {
            assert!(piece.head.contains("content-length: 0"), "{}", piece.head);
            break;
        }
        pieces.extend(piece.body);
    }
    assert!(pieces == bytes);
    let far = "/firmware?title=dev&version=1.10&size=18446744073709551615&chunk=18446744073709551615";
    assert_eq!((code(far, &[]), api(far, &[]).body.len()), (200, 0));
    for (query, expected) in [
        ("title=dev&version=1.1", 400),
        ("title=other&version=1.10", 400),
        ("version=1.10", 400),
        ("title=dev&version=1.10&size=-1", 400),
        ("title=dev&version=1.10&size=99999999999999999999", 400),
    ] {
        assert_eq!(code(&format!("/firmware?{query}"), &[]), expected, "{query}");
    }
    assert_eq!(code("/software?title=apps&version=1", &[]), 404);
    assert_eq!(code("/rpc?timeout=1", &[]), 408);
    assert_eq!(post("/rpc", r#"{"method":"getTime","params":{}}"#).0, 200);

    // A channel of files alone is a package that is elsewhere.
    std::fs::remove_dir_all(world.path("dev/firmware")).unwrap();
    world.write("dev/src/main.py", "print(1)\n");
    run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
    assert_eq!(code("/firmware?title=dev&version=1.10", &[]), 404);
}

#[test]
fn a_token_of_nobody_gets_401_without_a_body_and_costs_others_nothing() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    for path in ["/attributes", "/firmware?title=a&version=1", "/attributes/updates?timeout=1"] {
        for token in ["no-token-of-anybody", "%ff%00", ""] {
            let answer = curl(&server, &format!("/api/v1/{token}{path}"), &[]);
            assert_eq!((answer.code, answer.body.len()), (401, 0), "{token}{path}");
        }
    }
    assert_eq!(curl(&server, &format!("/api/v1/{token}/attributes"), &[]).code, 200);
}

#[test]
fn who_waits_for_news_gets_them_and_misses_none() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    let wait =
        |timeout: u64| curl(&server, &format!("/api/v1/{token}/attributes/updates?timeout={timeout}"), &[]);
    assert_eq!(wait(1).code, 408);
    let url = format!("http://{}/api/v1/{token}/attributes/updates?timeout=60000", server.http.unwrap());
    let waiting = Command::new("curl").args(["--silent", &url]).stdout(Stdio::piped()).spawn().unwrap();
    publish(&world, &server, "1", &image(1, 1000));
    let told = waiting.wait_with_output().unwrap().stdout;
    let told: Value = serde_json::from_slice(&told).unwrap();
    assert_eq!((&told["fw_version"], &told["fw_title"]), (&json!("1"), &json!("dev")), "a flat object");
    publish(&world, &server, "2", &image(2, 1000));
    assert_eq!(wait(60_000).json()["fw_version"], "2", "what came between two requests");
    assert_eq!(wait(1).code, 408);
}

/// What cOTA was written to do: see the program.
fn cota(server: &Server, token: &str, more: &[&str]) -> Value {
    let program = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("things/cota.py");
    let output = Command::new("python3")
        .arg(program)
        .args([&server.http.unwrap().to_string(), token])
        .args(more)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn cota_updates_from_a_channel_of_files_and_then_leaves_it_alone() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    std::fs::create_dir_all(world.path("board")).unwrap();
    let nothing = cota(&server, &token, &["--root", &world.text("board")]);
    assert_eq!(nothing["states"], json!([]), "nothing is assigned");
    world.write("dev/channel.toml", "version = \"1.10\"\n");
    let files: [(&str, Vec<u8>); 5] = [
        ("main.py", b"print(1)\n".to_vec()),
        ("code/app one.py", b"x = 1\n".to_vec()),
        ("code/deep/er/big.bin", image(7, 70_000)),
        ("data/all.bin", (0..=255).collect()),
        ("empty.txt", Vec::new()),
    ];
    for (path, content) in &files {
        world.write(&format!("dev/src/{path}"), content);
    }
    run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
    for kept in ["main.py", "settings.toml", "lib/own.py", "old.py", "old/file.py"] {
        world.write(&format!("board/{kept}"), "before");
    }
    let board = world.text("board");
    let first = cota(&server, &token, &["--root", &board]);
    assert_eq!(first["states"], json!(["DOWNLOADING", "VERIFIED", "DOWNLOADED", "UPDATING", "UPDATED"]));
    let mut expected: Vec<(String, Vec<u8>)> =
        files.iter().map(|(path, content)| ((*path).to_owned(), content.clone())).collect();
    expected.extend(["settings.toml", "lib/own.py"].map(|kept| (kept.to_owned(), b"before".to_vec())));
    let (found, expected) = (world.files("board"), expected.into_iter().collect::<BTreeMap<_, _>>());
    assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
    for (path, content) in &expected {
        assert!(found[path] == *content, "{path}: {} and {} bytes", found[path].len(), content.len());
    }
    let mut client = Client::connect(server.address, "looks");
    let state = parsed(&mut client, "mpypi/nodes/kitchen/state", |bytes| State::parse(bytes).unwrap());
    assert_eq!((state.phase, state.sequence, state.version.as_deref()), (Phase::Idle, Some(1), Some("1.10")));
    assert_eq!(cota(&server, &token, &["--root", &board])["states"], json!([]), "`1.10` is not 1.1");

    // A file that is not what the tree says, on its way: nothing is applied.
    world.write("dev/src/main.py", "print(2)\n");
    world.write("dev/channel.toml", "version = \"1.11\"\n");
    run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
    let before = world.files("board");
    let failed = cota(&server, &token, &["--root", &board, "--corrupt", "main.py"]);
    assert_eq!(failed["states"], json!(["DOWNLOADING", "FAILED"]));
    let mut after = world.files("board");
    after.retain(|path, _| !path.starts_with("tmp/"));
    assert!(after == before, "nothing is applied");
    let state = parsed(&mut client, "mpypi/nodes/kitchen/state", |bytes| State::parse(bytes).unwrap());
    assert_eq!(state.phase, Phase::Failed);
    assert!(state.error.unwrap().starts_with("device: "));
    // A repository that is none, as a wrong address is.
    let failed = cota(&server, &token, &["--root", &board, "--repository", "nobody/none"]);
    assert_eq!(failed["states"], json!(["DOWNLOADING", "FAILED"]));
    assert_eq!(cota(&server, &token, &["--root", &board])["states"].as_array().unwrap().len(), 5);
    assert_eq!(world.files("board")["main.py"], b"print(2)\n");
}

#[test]
fn a_repository_is_there_for_who_was_told_its_address_and_for_nobody_else() {
    let world = World::new();
    let token = add_device(&world, "kitchen", &[]);
    let data = world.text("data");
    let add = ["user", "add", "ci", "--role", "publisher", "--token", "--data", &data];
    let publisher = run("mpypi-broker", &add).expect_code(0).stdout;
    let server = Server::start_with(&world, &["--http", "127.0.0.1:0"]);
    world.write("dev/src/main.py", "print(1)\n");
    let url = format!("mqtt://ci:{}@{}", publisher.trim(), server.address);
    run("mpypi", &["publish", &world.text("dev"), "--broker", &url]).expect_code(0);
    let read = curl(&server, &format!("/api/v1/{token}/attributes"), &[]).json();
    let url = read["shared"]["fw_url"].as_str().unwrap();
    let owner = url.strip_prefix("https://github.com/").unwrap().strip_suffix("/dev").unwrap();
    let tree = |owner: &str, host: &str| {
        let path = format!("/repos/{owner}/dev/git/trees/main?recursive=1");
        curl(&server, &path, &["--header", &format!("Host: {host}")])
    };
    let found = tree(owner, "api.github.com");
    assert_eq!(found.code, 200);
    assert!(found.head.starts_with("http/1.1 200 ok\r\n"), "a reason, for old clients: {}", found.head);
    let sha = "b917a726c93f902e43291d9009d6488385133b67";
    assert_eq!(found.json()["tree"][0]["sha"], sha);
    assert_eq!(tree(owner, "api.github.com:443").code, 200);
    assert_eq!(tree("mpypi", "api.github.com").code, 404);
    assert_eq!(tree(owner, "else.example").code, 404);
    let raw = |path: &str, more: &[&str]| curl(&server, path, more);
    let host = ["--header", "Host: raw.githubusercontent.com"];
    assert_eq!(raw(&format!("/{owner}/dev/main/main.py"), &host).body, b"print(1)\n");
    assert_eq!(raw(&format!("/{owner}/dev/main/other.py"), &host).code, 404);
    assert_eq!(raw(&format!("/{owner}/dev/main/../../x"), &host).code, 404);
    assert_eq!(raw(&format!("/{owner}/dev/other/main.py"), &host).code, 404);
    assert_eq!(raw(&format!("/github/raw/{owner}/dev/main/main.py"), &[]).body, b"print(1)\n");
    let own = raw(&format!("/github/api/repos/{owner}/dev/git/trees/main?recursive=1"), &[]);
    assert_eq!(own.json()["tree"][0]["sha"], sha);
}

#[test]
fn the_repository_is_there_over_tls_under_the_names_that_boards_know_and_under_no_others() {
    let world = World::new();
    let token = add_device(&world, "kitchen", &[]);
    let ca = Authority::new(&world, "ca");
    let names = ["api.github.com", "raw.githubusercontent.com", "hub.local"];
    ca.server(&world, "github", &names, Validity::Now);
    let (cert, key, ca) = (world.text("github.pem"), world.text("github.key"), ca.pem(&world));
    let tls =
        ["--http", "127.0.0.1:0", "--http", "https://127.0.0.1:0", "--tls-cert", &cert, "--tls-key", &key];
    let server = Server::start_with(&world, &tls);
    let secure = server.listening.iter().find_map(|url| url.strip_prefix("https://")).unwrap();
    world.write("dev/src/main.py", "print(1)\n");
    world.write("dev/src/code/app one.py", "x = 1\n");
    run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
    let read = curl(&server, &format!("/api/v1/{token}/attributes"), &[]).json();
    let url = read["shared"]["fw_url"].as_str().unwrap().to_owned();
    let repository = url.strip_prefix("https://github.com/").unwrap();
    // As the network leads the names here: by SNI and Host, at port 443.
    let ask = |host: &str, path: &str, more: &[&str]| {
        let output = Command::new("curl")
            .args(["--silent", "--cacert", &ca, "--connect-to", &format!("::{secure}")])
            .args(["--write-out", "\n%{http_code}", "--max-time", &PATIENCE.as_secs().to_string()])
            .args(more)
            .arg(format!("https://{host}/{path}"))
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, code) = text.rsplit_once('\n').unwrap();
        (code.parse::<u16>().unwrap(), body.to_owned())
    };
    let tree = format!("repos/{repository}/git/trees/main?recursive=1");
    let (code, found) = ask("api.github.com", &tree, &[]);
    let found: Value = serde_json::from_str(&found).unwrap();
    assert_eq!(code, 200);
    let paths: Vec<_> = found["tree"].as_array().unwrap().iter().map(|entry| &entry["path"]).collect();
    assert_eq!(paths, [&json!("code/app one.py"), &json!("main.py")]);
    let file = format!("{repository}/main/code/app%20one.py");
    assert_eq!(ask("raw.githubusercontent.com", &file, &[]), (200, "x = 1\n".to_owned()));
    // Each name has what it has at GitHub, and no other name has any of it.
    assert_eq!(ask("raw.githubusercontent.com", &tree, &[]).0, 404);
    assert_eq!(ask("api.github.com", &file, &[]).0, 404);
    assert_eq!(ask("hub.local", &file, &[]).0, 404);
    assert_eq!(
        ask("hub.local", &file, &["--header", "Host: raw.githubusercontent.com"]).0,
        200,
        "Host decides"
    );
    assert_eq!(ask("hub.local", &format!("github/raw/{file}"), &[]).0, 200);
    assert_eq!(ask("codeload.github.com", &file, &[]).0, 0, "nobody vouches for that name");
    assert_eq!(ask("raw.githubusercontent.com", &file, &["--tlsv1.3", "--http1.1"]).0, 200);
    // And a board that checks the certificate for each name.
    std::fs::create_dir_all(world.path("board")).unwrap();
    let done = cota(&server, &token, &["--root", &world.text("board"), "--github", secure, "--ca", &ca]);
    assert_eq!(done["states"].as_array().unwrap().last(), Some(&json!("UPDATED")), "{done}");
    assert_eq!(world.files("board")["code/app one.py"], b"x = 1\n");
}

#[test]
fn who_polls_without_a_pause_is_slowed_without_an_error() {
    let world = World::new();
    let (server, token) = broker_with_device(&world, &[]);
    let metric = |name: &str| {
        let (_, text) = server.get("/metrics");
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.rsplit(' ').next()).map_or(0, |value| value.parse::<u64>().unwrap())
    };
    // More than a device may have at once; curl asks for them one after the other, on one connection.
    let url = format!("http://{}/api/v1/{token}/attributes?n=[1-20]", server.http.unwrap());
    let output = Command::new("curl")
        .args(["--silent", "--write-out", "%{http_code}\n", "--output", "/dev/null", &url])
        .output()
        .unwrap();
    let codes = String::from_utf8(output.stdout).unwrap();
    assert_eq!(codes.lines().filter(|code| *code == "200").count(), 20, "{codes}");
    assert!(metric("mpypi_things_held") >= 3, "the last of them had to wait");
}
