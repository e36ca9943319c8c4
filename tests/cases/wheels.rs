//! Wheels over HTTP, with the real pip, uv, twine, mpremote and mip.

use std::{fs, io::Write, path::Path};

use mpypi_protocol::{
    Digest, Entry, UpdateList, list,
    wheel::{RecordLine, write_record},
};
use mpypi_tests::{
    Client, Options, Output, Server, World,
    http::{Answer, Web},
    micropython, peer, run, run_with,
};
use serde_json::json;

const HTTP: [&str; 2] = ["--http", "127.0.0.1:0"];

/// One of Python's tools, as `tests/clients.txt` pins it; an installed one may be any.
fn tool(name: &str, arguments: &[&str]) -> Output {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/clients/bin").join(name);
    assert!(path.exists(), "`{name}` is not there: run `bash tests/peers.sh` first");
    let quiet = [
        ("PIP_CONFIG_FILE", "/dev/null"),
        ("PIP_NO_CACHE_DIR", "1"),
        ("PIP_DISABLE_PIP_VERSION_CHECK", "1"),
        ("UV_NO_CONFIG", "1"),
        ("UV_NO_CACHE", "1"),
        ("UV_PYTHON_DOWNLOADS", "never"),
        ("NO_COLOR", "1"),
        ("no_proxy", "*"),
        ("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring"),
        ("HOME", "/nonexistent"),
    ];
    run_with(path.to_str().unwrap(), arguments, &quiet)
}

fn at(server: &Server, path: &str) -> String {
    format!("http://{}{path}", server.http.unwrap())
}

fn get(server: &Server, path: &str) -> Answer {
    Web::get(server.http.unwrap(), path, &[])
}

/// A channel's folder with one project, and more settings.
fn project(world: &World, folder: &str, version: &str, settings: &str) {
    world.write(&format!("{folder}/channel.toml"), format!("name = \"dev\"\n{settings}"));
    world.write(
        &format!("{folder}/wheels/blink/pyproject.toml"),
        format!("[project]\nname = \"Blink.Led\"\nversion = \"{version}\"\nrequires-python = \">=3.4\"\n"),
    );
    world
        .write(&format!("{folder}/wheels/blink/blink_led/__init__.py"), format!("VERSION = \"{version}\"\n"));
    world.write(&format!("{folder}/wheels/blink/blink_led/table.py"), "ROW = (1, 2, 3)\n".repeat(50));
}

fn publish(world: &World, server: &Server, folder: &str) {
    let compiler = peer("mpy-cross");
    let variables = [("MPY_CROSS", compiler.to_str().unwrap())];
    let arguments = ["publish", &world.text(folder), "--broker", &server.url()];
    let _ = run_with("mpypi", &arguments, &variables).expect_code(0);
}

/// A wheel as other tools make it, with a description and licences; in the world's folder `dist`.
fn foreign(world: &World, name: &str, version: &str, content: &str) -> String {
    let folder = format!("{name}-{version}.dist-info");
    let metadata = format!(
        "Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nRequires-Dist: blink-led==1.0\n\
         Description-Content-Type: text/markdown\n\n# A description\n"
    );
    let mut files = vec![
        (format!("{name}.py"), content.to_owned()),
        (format!("{folder}/METADATA"), metadata),
        (
            format!("{folder}/WHEEL"),
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n".to_owned(),
        ),
        (format!("{folder}/licenses/LICENSE"), "free\n".to_owned()),
    ];
    let line = |(name, content): &(String, String)| RecordLine {
        path: name.parse().unwrap(),
        digest: Some(Digest::of(content.as_bytes())),
        size: Some(content.len() as u64),
    };
    let lines: Vec<_> = files.iter().map(line).collect();
    files.push((format!("{folder}/RECORD"), write_record(&lines) + &format!("{folder}/RECORD,,\n")));
    let file = format!("dist/{name}-{version}-py3-none-any.whl");
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in &files {
        zip.start_file(name.as_str(), zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(content.as_bytes()).unwrap();
    }
    world.write(&file, zip.finish().unwrap().into_inner());
    world.text(&file)
}

fn user(world: &World, name: &str, role: &str) -> String {
    let arguments = ["user", "add", name, "--role", role, "--token", "--data", &world.text("data")];
    run("mpypi-broker", &arguments).expect_code(0).stdout.trim().to_owned()
}

/// The list of channel `dev`.
fn list(server: &Server, login: Option<(&str, &str)>) -> UpdateList {
    let login = login.map(|(user, password)| (user.to_owned(), password.to_owned()));
    let (mut client, code) =
        Client::try_connect(server.address, &Options { login, ..Options::id("reader") }).unwrap();
    assert_eq!(code, 0);
    UpdateList::parse(&client.retained("mpypi/channels/dev").unwrap().payload).unwrap()
}

fn wheels(list: &UpdateList) -> Vec<&list::Wheel> {
    let mut wheels = Vec::new();
    for entry in list.entries() {
        if let Entry::Wheel(wheel) = entry {
            wheels.push(wheel);
        }
    }
    wheels
}

#[test]
fn pip_and_uv_install_a_wheel_of_a_channel() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    project(&world, "dev", "1.0", "");
    publish(&world, &server, "dev");
    let list = list(&server, None);
    let digest = wheels(&list)[0].digest;
    let index = at(&server, "/simple/");
    let to = world.text("downloaded");
    let download = ["download", "--isolated", "--no-deps", "--index-url", &index, "-d", &to];
    let pip = tool("pip", &[&download[..], &["blink_led"]].concat()).expect_code(0);
    assert!(pip.stdout.contains(".metadata"), "METADATA alone comes first: {}", pip.stdout);
    let wheel = fs::read(world.path("downloaded/blink_led-1.0-py3-none-any.whl")).unwrap();
    assert_eq!(Digest::of(&wheel), digest);
    // What is not known to be the wheel that is meant, is not taken.
    let wrong = world.write("wrong.txt", format!("blink-led==1.0 --hash=sha256:{}\n", Digest::EMPTY));
    let wrong = ["--require-hashes", "-r", wrong.to_str().unwrap()];
    let _ = tool("pip", &[&download[..], &wrong].concat()).expect_code(1);

    let pinned = world.write("pinned.txt", format!("blink-led==1.0 --hash=sha256:{digest}\n"));
    for (folder, index) in [("one", "/channels/dev/simple/"), ("bare", "/simple")] {
        let (index, target) = (at(&server, index), world.text(folder));
        let install =
            ["pip", "install", "--index-url", &index, "--target", &target, "--require-hashes", "-r"];
        let _ = tool("uv", &[&install[..], &[pinned.to_str().unwrap()]].concat()).expect_code(0);
        assert_eq!(world.files(folder)["blink_led/__init__.py"], b"VERSION = \"1.0\"\n");
    }
    let unknown = ["pip", "install", "--index-url", &index, "--target", &world.text("x"), "nothing"];
    let _ = tool("uv", &unknown).expect_code(1);
}

#[test]
fn the_simple_index_says_what_the_standards_want_in_json_and_html() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    project(&world, "dev", "1.0", "compile = \"mpy\"\ntargets = [\"bytecode\", \"source\"]\n");
    publish(&world, &server, "dev");
    let ask = |path: &str, accept: &str| Web::get(server.http.unwrap(), path, &[("Accept", accept)]);
    let json_kind = "application/vnd.pypi.simple.v1+json";
    let projects = ask("/simple/", json_kind).expect(200);
    assert_eq!(projects.header("content-type"), Some(json_kind));
    assert_eq!(
        projects.json(),
        json!({ "meta": { "api-version": "1.1" }, "projects": [{ "name": "blink-led" }] })
    );
    let page = ask("/simple/blink-led/", json_kind).expect(200).json();
    assert_eq!((&page["name"], &page["versions"]), (&json!("blink-led"), &json!(["1.0"])));
    assert_eq!(page["files"].as_array().unwrap().len(), 2);
    for file in page["files"].as_array().unwrap() {
        let url = file["url"].as_str().unwrap().strip_prefix("../..").unwrap();
        let wheel = get(&server, url).expect(200);
        assert_eq!(file["hashes"]["sha256"], Digest::of(&wheel.body).to_string());
        assert_eq!(file["size"], wheel.body.len());
        assert_eq!(file["requires-python"], ">=3.4");
        let metadata = get(&server, &format!("{url}.metadata")).expect(200);
        assert_eq!(file["core-metadata"]["sha256"], Digest::of(&metadata.body).to_string());
        assert!(metadata.text().contains("Name: Blink.Led\n"));
        assert_eq!(get(&server, &format!("{url}x")).code, 404);
    }
    let names: Vec<_> =
        page["files"].as_array().unwrap().iter().map(|file| file["filename"].as_str().unwrap()).collect();
    assert!(names.contains(&"blink_led-1.0-py3-none-any.whl"), "{names:?}");
    let html = get(&server, "/simple/blink-led/").expect(200);
    assert_eq!(html.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(html.text().contains("data-requires-python=\"&gt;=3.4\""), "{}", html.text());
    for (path, place) in [("/simple", "simple/"), ("/simple/Blink_Led", "blink-led/")] {
        assert_eq!(get(&server, path).expect(308).header("location"), Some(place));
    }
    assert_eq!(get(&server, "/simple/BLINK..led/").code, 200);
    assert_eq!(get(&server, "/simple/nothing/").code, 404);
    assert_eq!(ask("/simple/", "image/png").code, 406);
}

#[test]
fn twine_and_uv_add_a_wheel_to_a_channel_as_a_new_release() {
    let world = World::new();
    let token = user(&world, "ci", "publisher");
    let login = Some(("ci", &*token));
    let viewer = user(&world, "look", "viewer");
    let server = Server::start_with(&world, &HTTP);
    let url = at(&server, "/upload/dev");
    let twine = |user: &str, password: &str, wheel: &str| {
        let arguments = ["upload", "--non-interactive", "--disable-progress-bar", "--repository-url", &url];
        tool("twine", &[&arguments[..], &["-u", user, "-p", password, wheel]].concat())
    };
    let first = foreign(&world, "hello", "1.0", "x = 1\n");
    // Who may not, does not.
    let uv =
        |token: &str, wheel: &str| tool("uv", &["publish", "--publish-url", &url, "--token", token, wheel]);
    let _ = uv("wrong", &first).expect_code(2);
    let _ = uv(&viewer, &first).expect_code(2);
    let _ = twine("look", &viewer, &first).expect_code(1);
    let _ = twine("__token__", &token, &first).expect_code(0);
    let one = list(&server, login);
    assert_eq!(one.release().unwrap().sequence, 1);
    assert_eq!(wheels(&one)[0].digest, Digest::of(&fs::read(&first).unwrap()));
    assert_eq!(wheels(&one)[0].tag.as_deref(), Some("py3-none-any"));
    // The same again changes nothing; other bytes of this version are refused.
    let _ = uv(&token, &first).expect_code(0);
    assert_eq!(list(&server, login), one);
    let other = foreign(&world, "hello", "1.0", "x = 'other'\n");
    let refused = twine("ci", &token, &other).expect_code(1);
    assert!(refused.stdout.contains("409") || refused.stderr.contains("409"), "{refused:?}");
    assert_eq!(list(&server, login), one);
    // A newer one takes its place; another project stands beside it.
    let second = foreign(&world, "hello", "1.1", "x = 2\n");
    let _ = uv(&token, &second).expect_code(0);
    let _ = uv(&token, &foreign(&world, "bye", "0.1", "y = 1\n")).expect_code(0);
    let three = list(&server, login);
    assert_eq!((three.release().unwrap().sequence, &*three.release().unwrap().version), (3, "3"));
    let found: Vec<_> = wheels(&three).iter().map(|wheel| (&*wheel.name, &*wheel.version)).collect();
    assert_eq!(found, [("hello", "1.1"), ("bye", "0.1")]);
    // What was uploaded is there for all others.
    let index = format!("http://__token__:{token}@{}/simple/", server.http.unwrap());
    let install =
        ["pip", "install", "--no-deps", "--index-url", &index, "--target", &world.text("got"), "hello"];
    let _ = tool("uv", &install).expect_code(0);
    assert_eq!(world.files("got")["hello.py"], b"x = 2\n");
}

/// A form's fields: name and content.
type Fields<'f> = &'f [(&'f str, &'f [u8])];

/// A form as an upload is one.
fn form(fields: Fields<'_>) -> Vec<u8> {
    let mut form = Vec::new();
    for (name, content) in fields {
        let file = if *name == "content" { "; filename=\"a.whl\"" } else { "" };
        form.extend_from_slice(
            format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n").as_bytes(),
        );
        form.extend_from_slice(content);
        form.extend_from_slice(b"\r\n");
    }
    form.extend_from_slice(b"--b--\r\n");
    form
}

#[test]
fn an_upload_that_is_not_in_order_is_refused_with_its_reason_and_changes_nothing() {
    let world = World::new();
    let server = Server::start_with(&world, &[&HTTP[..], &["--max-package", "100000"]].concat());
    let wheel = fs::read(foreign(&world, "hello", "1.0", "x = 1\n")).unwrap();
    let upload = |channel: &str, fields: Fields<'_>| {
        let kind = [("Content-Type", "multipart/form-data; boundary=b")];
        Web::open(server.http.unwrap()).ask("POST", &format!("/upload/{channel}"), &kind, &form(fields))
    };
    let large = vec![0; 100_001];
    let cases: [(Fields<'_>, u16, &str); 10] = [
        (&[], 400, "content"),
        (&[("content", b"no wheel")], 422, "zip"),
        (&[("content", &wheel[..wheel.len() / 2])], 422, "zip"),
        (&[("content", &large)], 413, "100000"),
        (&[(":action", b"doc_upload"), ("content", &wheel)], 400, "file_upload"),
        (&[("filetype", b"sdist"), ("content", &wheel)], 400, "wheels"),
        (&[("sha256_digest", b"00"), ("content", &wheel)], 400, "SHA-256"),
        (&[("name", b"other"), ("content", &wheel)], 400, "`hello`"),
        (&[("version", b"1.0.0"), ("content", &wheel)], 400, "1.0"),
        (&[("name", &large[..5000]), ("content", &wheel)], 400, "field"),
    ];
    for (fields, code, word) in cases {
        let refused = upload("dev", fields).expect(code);
        assert!(refused.json()["detail"].as_str().unwrap().contains(word), "{word}: {}", refused.text());
    }
    let plain = Web::open(server.http.unwrap()).ask("POST", "/upload/dev", &[], b"x").expect(415);
    assert!(plain.json()["hint"].as_str().unwrap().contains("twine"));
    assert_eq!(upload("no%20channel", &[("content", &wheel)]).code, 404);
    // A page of another site is none of ours.
    let foreign_page =
        [("Content-Type", "multipart/form-data; boundary=b"), ("Origin", "http://evil.example")];
    let form = form(&[("content", &wheel)]);
    assert_eq!(Web::open(server.http.unwrap()).ask("POST", "/upload/dev", &foreign_page, &form).code, 403);
    let mut client = Client::connect(server.address, "client");
    assert_eq!(client.retained("mpypi/channels/dev").unwrap().payload, b"[]");
    assert_eq!(client.retained(&format!("mpypi/packages/wheel/{}", Digest::of(&wheel))), None);
    // Where lists are signed, the broker cannot make one.
    let signed = r#"[{"type":"release","channel":"dev","sequence":7,"version":"7"},{"type":"signature","key":"k","alg":"a","sig":"AA=="}]"#;
    assert!(client.retain("mpypi/channels/dev", signed.as_bytes()));
    let refused = upload("dev", &[("content", &wheel)]).expect(409);
    assert!(refused.json()["detail"].as_str().unwrap().contains("signed"), "{}", refused.text());
    assert!(refused.json()["hint"].as_str().unwrap().contains("mpypi publish"));
    // Sent in pieces without a length, it is taken all the same.
    let mut web = Web::open(server.http.unwrap());
    web.send(b"POST /upload/other HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n");
    web.send(b"Content-Type: multipart/form-data; boundary=b\r\n\r\n");
    for piece in form.chunks(100) {
        web.send(&[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
    }
    web.send(b"0\r\n\r\n");
    assert_eq!(web.answer("POST").unwrap().expect(200).json()["sequence"], 1);
}

/// mpremote against MicroPython's Unix port, which stands in the world's folder `board`.
fn mpremote(world: &World, arguments: &[&str]) -> Output {
    fs::create_dir_all(world.path("board")).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/board/serial.py");
    let (device, tool) = (peer("micropython"), peer("mpremote"));
    let usual = [script, device.to_str().unwrap(), tool.to_str().unwrap(), &world.text("board")];
    run_with("python3", &[&usual[..], arguments].concat(), &[("no_proxy", "*")])
}

#[test]
fn mpremote_and_mip_install_what_the_device_can_load() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    project(&world, "dev", "1.0", "");
    publish(&world, &server, "dev");
    project(&world, "stable", "1.1", "compile = \"mpy\"\ntargets = [\"bytecode\", \"source\"]\n");
    world.write(
        "stable/channel.toml",
        "name = \"stable\"\ncompile = \"mpy\"\ntargets = [\"bytecode\", \"source\"]\n",
    );
    publish(&world, &server, "stable");
    let index = at(&server, "/mip");
    let install =
        |more: &[&str]| mpremote(&world, &[&["mip", "--target", "lib", "--index", &index], more].concat());
    // The newest, in bytecode; then a version, in source; then what is there already is not fetched.
    let _ = install(&["install", "blink-led"]).expect_code(0);
    assert!(world.path("board/lib/blink_led/__init__.mpy").exists());
    let _ = install(&["--no-mpy", "install", "blink_led@1.0"]).expect_code(0);
    assert_eq!(world.files("board")["lib/blink_led/__init__.py"], b"VERSION = \"1.0\"\n");
    let again = install(&["--no-mpy", "install", "blink_led@1.0"]).expect_code(0);
    assert_eq!(again.stdout.matches("Exists: ").count(), 2, "{}", again.stdout);
    let unknown = install(&["install", "nothing"]).expect_code(1);
    assert!(unknown.stderr.contains("not found") || unknown.stdout.contains("not found"), "{unknown:?}");
    let _ = install(&["install", "blink_led@7"]).expect_code(1);

    // mip on the device itself, also from one channel alone, and by the URL of a `package.json`.
    let mip = |folder: &str, what: &str, more: &str| {
        let target = world.text(folder);
        let code = format!("import mip; mip.install('{what}', target='{target}'{more})");
        let done = micropython(&["-c", &code], &[]).expect_code(0);
        assert!(done.stdout.contains("Done"), "{}", done.stdout);
        world.files(folder)
    };
    let files = mip("a", "blink_led", &format!(", index='{index}'"));
    assert!(files.keys().all(|path| path.ends_with(".mpy")) && files.len() == 2, "{:?}", files.keys());
    let dev = at(&server, "/channels/dev/mip");
    let files = mip("b", "Blink.Led", &format!(", index='{dev}', version='1.0'"));
    assert_eq!(files["blink_led/table.py"], "ROW = (1, 2, 3)\n".repeat(50).as_bytes());
    let files = mip("c", &at(&server, "/mip/blink-led/"), "");
    assert_eq!(files["blink_led/__init__.py"], b"VERSION = \"1.1\"\n");
    let files = mip("d", &at(&server, "/mip/blink-led/1.0/package.json"), "");
    assert_eq!(files["blink_led/__init__.py"], b"VERSION = \"1.0\"\n");
    // What it installs runs.
    let path = world.text("a");
    let ran = run_with(
        "micropython",
        &["-c", "import blink_led; print(blink_led.VERSION)"],
        &[("MICROPYPATH", &path)],
    );
    assert_eq!(ran.expect_code(0).stdout, "1.1\n");
}

#[test]
fn what_a_wheel_needs_comes_with_it_and_no_file_of_another_channel_is_told() {
    let world = World::new();
    let server = Server::start_with(&world, &HTTP);
    project(&world, "dev", "1.0", "");
    publish(&world, &server, "dev");
    // It is unpacked in many pieces.
    let content: String = (0..50_000).map(|n| format!("x = {n}\n")).collect();
    let wheel = fs::read(foreign(&world, "hello", "1.0", &content)).unwrap();
    let kind = [("Content-Type", "multipart/form-data; boundary=b")];
    let upload = form(&[("content", &wheel)]);
    let _ = Web::open(server.http.unwrap()).ask("POST", "/upload/dev", &kind, &upload).expect(200);
    let told = get(&server, "/mip/package/6/hello/latest.json").expect(200).json();
    assert_eq!(told["deps"], json!([["blink-led", "1.0"]]));
    let digest = Digest::of(content.as_bytes()).to_string();
    let file = |scope: &str| get(&server, &format!("{scope}/mip/file/{}/{digest}", &digest[..2]));
    assert!(file("").expect(200).text() == content);
    assert_eq!(file("/channels/dev").code, 200);
    assert_eq!(file("/channels/other").code, 404);
    assert_eq!(get(&server, &format!("/mip/file/zz/{digest}")).code, 404);
    assert_eq!(get(&server, "/mip/file/aa/../../../etc/passwd").code, 404);
}
