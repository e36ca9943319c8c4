//! ota-promoter's contract, row by row, and its clients on MicroPython.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
};

use mpypi_protocol::{Digest, UpdateList};
use mpypi_tests::{
    Client, Output, PATIENCE, Running, Server, World,
    http::{Answer, Web},
    micropython, run,
};
use serde_json::json;

/// A broker that shows channel `dev` to ota-promoter's devices.
struct Shown {
    server: Server,
    address: SocketAddr,
}

impl Shown {
    fn start(world: &World, more: &[&str]) -> Shown {
        let arguments = ["--http", "127.0.0.1:0", "--promoter-channel", "dev", "--promoter", "127.0.0.1:0"];
        let server = Server::start_with(world, &[&arguments, more].concat());
        let url = server.listening.last().unwrap().strip_prefix("http://").unwrap();
        Shown { address: url.parse().unwrap(), server }
    }

    fn get(&self, path: &str) -> Answer {
        Web::get(self.address, path, &[])
    }

    /// What is listed: checksum by path.
    fn listed(&self) -> BTreeMap<String, String> {
        let listing = self.get("/files").expect(200).json();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let files = listing["files"].as_array().unwrap().iter();
        files.map(|file| (text(&file["path"]), text(&file["checksum"]))).collect()
    }

    fn publish(&self, world: &World, folder: &str) {
        let (folder, url) = (world.text(folder), self.server.url());
        let _ = run("mpypi", &["publish", &folder, "--channel", "dev", "--broker", &url, "--force"])
            .expect_code(0);
    }
}

/// The checksums and versions of the original, as it was observed.
const VECTORS: [(&str, &str, &str); 6] = [
    ("content.txt", "content", "0dca091da529abc1c507269acd06e619ed395c88"),
    ("sub/content2.txt", "abc", "c910de198ccdf1b980884a2bc737b5ad8d061bbe"),
    ("main.py", "print(1)\n", "2f47a786543348e47f300fb64a2a213ecb483431"),
    ("empty.txt", "", "2f2c3aed7ef52985dbc835f7a091c91a69ad6ebb"),
    ("sub/x", "x", "b38c5201be2dce17d0a3137411c77514ff7579c1"),
    ("sub.py", "y", "dbd706e97b69386d56ef429d10a1b4cd46ef536d"),
];
const NOTHING: &str = "da39a3ee5e6b4b0d3255bfef95601890afd80709";

#[test]
fn checksums_versions_order_and_answers_are_those_of_the_original() {
    let world = World::new();
    let shown = Shown::start(&world, &[]);
    // OP-16: nothing is there.
    assert_eq!(shown.get("/files").text(), format!("{{\"files\":[],\"version\":\"{NOTHING}\"}}"));
    world.write("one/content.txt", "content");
    world.write("one/sub/content2.txt", "abc");
    shown.publish(&world, "one");
    // OP-2 and OP-3, to the letter.
    let version = "44452108317c0ea6cb3054a69351c32fc36a8663";
    let answer = shown.get("/files/version").expect(200);
    assert_eq!(answer.text(), format!("{{\"version\":\"{version}\"}}"));
    assert_eq!(answer.header("content-type"), Some("application/json;charset=utf-8"));
    let expected = format!(
        "{{\"files\":[{{\"path\":\"content.txt\",\"checksum\":\"{}\"}},{{\"path\":\"sub/content2.txt\",\
         \"checksum\":\"{}\"}}],\"version\":\"{version}\"}}",
        VECTORS[0].2, VECTORS[1].2
    );
    assert_eq!(shown.get("/files").text(), expected);

    for (path, content, _) in VECTORS {
        world.write(&format!("two/{path}"), content);
    }
    world.write("two/.env", "hidden");
    world.write("two/copy.txt", "content");
    world.write("two/logo.pbm", b"P4\x01\x02");
    std::os::unix::fs::symlink("main.py", world.path("two/link.py")).unwrap();
    shown.publish(&world, "two");
    let listed = shown.listed();
    for (path, content, sum) in VECTORS {
        assert_eq!(listed[path], sum, "{path}");
        // OP-4, OP-13 and the headers.
        for place in ["files", "file"] {
            let file = shown.get(&format!("/{place}/{sum}")).expect(200);
            assert_eq!(file.text(), content);
            assert_eq!(file.header("x-target-path"), Some(path));
            let name = path.rsplit('/').next().unwrap();
            assert_eq!(file.header("content-disposition"), Some(&*format!("attachment; filename={name}")));
            let kind = (!content.is_empty()).then_some("text/plain; charset=utf-8");
            assert_eq!(file.header("content-type"), kind, "{path}");
        }
    }
    // OP-10, OP-11 and OP-12.
    assert_ne!(listed["copy.txt"], listed["content.txt"]);
    assert!(listed.contains_key(".env") && !listed.contains_key("link.py"));
    let binary = shown.get(&format!("/files/{}", listed["logo.pbm"]));
    assert_eq!(binary.header("content-type"), Some("application/octet-stream"));
    // The walk goes level by level.
    let order = shown.get("/files").json();
    let order: Vec<_> =
        order["files"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    assert_eq!(
        order,
        [
            ".env",
            "content.txt",
            "copy.txt",
            "empty.txt",
            "logo.pbm",
            "main.py",
            "sub/content2.txt",
            "sub/x",
            "sub.py"
        ]
    );

    // OP-5, and paths that there are not.
    for sum in ["0".repeat(40), "x".into(), listed["main.py"].to_uppercase(), "..%2f..%2fetc%2fpasswd".into()]
    {
        let refused = shown.get(&format!("/files/{sum}")).expect(400);
        assert_eq!(refused.text(), "{\"Message\":\"file not found\"}", "{sum}");
        assert_eq!(refused.header("content-type"), Some("application/json;charset=utf-8"));
    }
    for path in
        ["/", "/files/", "/else", "/files/version/", "/files/a/b", "/file", "/metrics", "/../files/x/y"]
    {
        let refused = shown.get(path).expect(404);
        assert_eq!(refused.text(), "404 page not found", "{path}");
    }
    for (method, path) in
        [("POST", "/files"), ("OPTIONS", "/files/version"), ("DELETE", "/files/x"), ("PUT", "/file/x")]
    {
        assert_eq!(Web::open(shown.address).ask(method, path, &[], b"").code, 405, "{method} {path}");
    }
    // Welcome additions.
    let path = format!("/files/{}", listed["content.txt"]);
    let head = Web::open(shown.address).ask("HEAD", &path, &[], b"");
    assert_eq!((head.code, head.header("content-length")), (200, Some("7")));
    let part = Web::get(shown.address, &path, &[("Range", "bytes=3-")]).expect(206);
    assert_eq!((part.text(), part.header("content-range")), ("tent", Some("bytes 3-6/7")));
    let same = Web::get(shown.address, &path, &[("If-None-Match", head.header("etag").unwrap())]);
    assert_eq!(same.code, 304);
    // Every channel, on both listeners.
    for address in [shown.address, shown.server.http.unwrap()] {
        let files = |channel: &str| Web::get(address, &format!("/channels/{channel}/files"), &[]);
        assert_eq!(files("dev").expect(200).text(), shown.get("/files").text());
        assert_eq!(files("other").expect(200).json()["files"], json!([]));
        assert_eq!(files("no%20channel").code, 404);
    }
    assert_eq!(Web::get(shown.server.http.unwrap(), "/files", &[]).code, 404);
}

#[test]
fn what_earlier_lists_named_is_still_there_for_who_is_half_done() {
    let world = World::new();
    world.write("data/broker.toml", "[limits]\ngc_keep = 2\n");
    let shown = Shown::start(&world, &[]);
    let release = |n: u32| {
        world.write("dev/main.py", format!("print({n})\n"));
        shown.publish(&world, "dev");
        shown.listed()["main.py"].clone()
    };
    let sums: Vec<_> = (1..=3).map(release).collect();
    let get = |n: usize| shown.get(&format!("/files/{}", sums[n]));
    assert_eq!(get(2).expect(200).text(), "print(3)\n");
    assert_eq!(get(1).expect(200).text(), "print(2)\n");
    assert_eq!(get(0).code, 400, "of three lists, the last two count");
}

#[test]
fn a_listed_file_that_cannot_be_read_is_an_internal_error() {
    let world = World::new();
    let shown = Shown::start(&world, &[]);
    let large = "x".repeat(100_000);
    world.write("dev/large.txt", &large);
    world.write("dev/main.py", "print(1)\n");
    shown.publish(&world, "dev");
    fs::remove_file(world.path("data/blobs").join(Digest::of(large.as_bytes()).to_string())).unwrap();
    let refused = shown.get("/files").expect(500);
    assert_eq!(refused.text(), "{\"Message\":\"internal error\"}");
    assert_eq!(Web::get(shown.server.http.unwrap(), "/healthz", &[]).code, 200);
}

#[test]
fn with_users_a_device_without_a_login_reads_its_channel_only_where_that_was_asked_for() {
    let world = World::new();
    let add = ["user", "add", "ci", "--role", "publisher", "--token", "--data", &world.text("data")];
    let token = run("mpypi-broker", &add).expect_code(0).stdout.trim().to_owned();
    let login = format!("Bearer {token}");
    let shown = Shown::start(&world, &[]);
    for path in ["/files", "/files/version", "/files/x", "/channels/dev/files"] {
        assert_eq!(shown.get(path).code, 401, "{path}");
        assert_ne!(Web::get(shown.address, path, &[("Authorization", &login)]).code, 401, "{path}");
    }
    drop(shown);
    let shown = Shown::start(&world, &["--unsafe-promoter"]);
    assert_eq!(shown.get("/files").code, 200);
    assert_eq!(shown.get("/files/x").code, 400);
    assert_eq!(shown.get("/channels/dev/files").code, 200);
    assert_eq!(shown.get("/channels/other/files").code, 403);
    assert_eq!(Web::get(shown.address, "/files", &[("Authorization", "Bearer wrong")]).code, 401);
    assert_eq!(Web::get(shown.server.http.unwrap(), "/channels/dev/files", &[]).code, 401);
}

#[test]
fn watching_a_folder_is_the_whole_job_of_the_originals_server() {
    let world = World::new();
    let shown = Shown::start(&world, &[]);
    world.write("app/main.py", "print(1)\n");
    world.write("app/docs/a.md", "a");
    world.write("app/docs/deep/b.md", "b");
    let mut reader = Client::connect(shown.server.address, "reader");
    reader.subscribe("mpypi/channels/dev", 1);
    assert_eq!(reader.message().unwrap().payload, b"[]");
    let url = shown.server.url();
    let _watch = Running::start(
        "mpypi",
        &["watch", &world.text("app"), "--channel", "dev", "--broker", &url, "--force"],
    );
    // A slow machine may see a step in two releases.
    let mut until = |what: &dyn Fn(&BTreeMap<String, String>) -> bool| {
        loop {
            let list = UpdateList::parse(&reader.message().unwrap().payload).unwrap();
            assert!(list.release().is_some());
            let listed = shown.listed();
            if what(&listed) {
                return listed;
            }
        }
    };
    let first = until(&|listed| listed.len() == 3);
    world.write("app/main.py", "print(2)\n");
    let second = until(&|listed| listed["main.py"] != first["main.py"]);
    assert_eq!(first["docs/a.md"], second["docs/a.md"]);
    world.write("app/new/folder/x.py", "x = 1\n");
    until(&|listed| listed.contains_key("new/folder/x.py"));
    fs::rename(world.path("app/new"), world.path("app/renamed")).unwrap();
    until(&|listed| listed.contains_key("renamed/folder/x.py") && !listed.contains_key("new/folder/x.py"));
    fs::remove_dir_all(world.path("app/renamed")).unwrap();
    until(&|listed| listed.len() == 3);
    // OP-8 and OP-9: `docs` ignores no folder, `docs/.*` what is below it; a folder of the file's name is none.
    world.write("app/.promoterignore", "docs\n(\n.*/b\\.md\n");
    let ignoring = until(&|listed| !listed.contains_key("docs/deep/b.md"));
    assert!(ignoring.contains_key("docs/a.md") && ignoring.contains_key(".promoterignore"));
    world.write("app/.promoterignore", "docs/.*\n\\.promoterignore\n");
    assert_eq!(until(&|listed| listed.len() == 1).keys().collect::<Vec<_>>(), ["main.py"]);
    fs::remove_file(world.path("app/.promoterignore")).unwrap();
    until(&|listed| listed.len() == 3);
    fs::create_dir(world.path("app/.promoterignore")).unwrap();
    world.write("app/.promoterignore/y.py", "y = 1\n");
    until(&|listed| listed.len() == 4);
    // OP-15
    let _ =
        run("mpypi", &["watch", &world.text("nowhere"), "--channel", "dev", "--broker", &url]).expect_code(1);
    let _ = run("mpypi", &["watch"]).expect_code(2);
}

/// A device with one edition of the client.
struct Device<'w> {
    world: &'w World,
    edition: &'static str,
    base: &'static str,
}

impl Device<'_> {
    fn poll(&self, address: SocketAddr) -> Output {
        let root = self.world.text(self.edition);
        fs::create_dir_all(&root).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/promoter/client.py");
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        micropython(&[script, self.edition, &host, &port, self.base, &root], &[])
    }

    /// Whether it updated, and how many requests that took.
    fn update(&self, address: SocketAddr) -> (bool, usize) {
        let told = self.poll(address).expect_code(0).json();
        (told["updated"].as_bool().unwrap(), told["asked"].as_array().unwrap().len())
    }

    /// Its files, without what it keeps for itself.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = self.world.files(self.edition);
        files.retain(|path, _| !path.starts_with(".files") && !path.starts_with(".next"));
        files
    }
}

/// Passes connections on, and after so many of them each only up to its `most` first bytes.
fn short(target: SocketAddr, whole: usize, most: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for (count, client) in listener.incoming().enumerate() {
            let mut client = client.unwrap();
            let mut broker = TcpStream::connect(target).unwrap();
            let mut request = [0; 4096];
            let length = client.read(&mut request).unwrap();
            broker.write_all(&request[..length]).unwrap();
            broker.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut answer = Vec::new();
            broker.read_to_end(&mut answer).unwrap();
            let most = if count < whole { answer.len() } else { most.min(answer.len()) };
            client.write_all(&answer[..most]).ok();
            client.shutdown(Shutdown::Both).ok();
        }
    });
    address
}

#[test]
fn both_editions_of_its_client_install_idle_change_add_remove_and_survive_a_line_that_is_cut() {
    let world = World::new();
    let shown = Shown::start(&world, &[]);
    let devices = [("first", ""), ("second", "/channels/dev")].map(|(edition, base)| Device {
        world: &world,
        edition,
        base,
    });
    let folder = |files: &[(&str, &str)]| {
        fs::remove_dir_all(world.path("app")).ok();
        for (path, content) in files {
            world.write(&format!("app/{path}"), content);
        }
        shown.publish(&world, "app");
    };
    // What a device has, is what was published.
    let check = |device: &Device<'_>| assert_eq!(device.files(), world.files("app"), "{}", device.edition);
    folder(&[("main.py", "print(1)\n"), ("lib/a.py", "a = 1\n"), ("empty.py", ""), ("ü.txt", "grün\n")]);
    for device in &devices {
        assert_eq!(device.update(shown.address), (true, 6), "OP-21");
        check(device);
        assert_eq!(device.update(shown.address), (false, 1), "OP-20");
    }
    folder(&[
        ("main.py", "print(2)\n"),
        ("lib/a.py", "a = 1\n"),
        ("lib/b.py", "b = 2\n"),
        ("ü.txt", "grün\n"),
    ]);
    for device in &devices {
        // OP-25: the line is cut in the middle of the second file.
        let before = device.files();
        let cut = short(shown.address, 3, 300);
        let failed = device.poll(cut).expect_code(1);
        assert!(failed.stdout.contains("error"), "{}", failed.stdout);
        assert_eq!(device.files(), before);
        assert_eq!(device.update(shown.address), (true, 4), "OP-22: what changed and what is new");
        check(device);
    }
    folder(&[("main.py", "print(2)\n")]);
    for device in &devices {
        assert_eq!(device.update(shown.address), (true, 2), "OP-23: nothing is fetched to remove");
        check(device);
        assert_eq!(device.update(shown.address), (false, 1));
    }
    // OP-24
    let device = Device { world: &world, edition: "first", base: "/channels/no channel" };
    let failed = device.poll(shown.address).expect_code(1);
    assert!(failed.stdout.contains("40"), "{}", failed.stdout);
}

#[test]
fn what_its_devices_choke_on_is_said_before_it_is_published_and_done_all_the_same() {
    let world = World::new();
    let shown = Shown::start(&world, &[]);
    world.write("one/.promoterignore", ".*\\.md\n");
    world.write("one/web/css/a.css", "a {}\n");
    world.write("one/logo.bin", [0xff, 0xfe]);
    let (folder, url) = (world.text("one"), shown.server.url());
    let usual = ["publish", &folder, "--channel", "dev", "--broker", &url];
    let told = run("mpypi", &[&usual[..], &["--json"]].concat()).expect_code(0).json();
    let rules: Vec<_> =
        told["lint"].as_array().unwrap().iter().map(|finding| finding["rule"].as_str().unwrap()).collect();
    assert_eq!(rules, ["binary", "nested-folder"]);
    assert!(shown.listed().contains_key("logo.bin"));
    // What is there already is nothing new; a channel that is not for them is not looked at so.
    world.write("one/web/css/b.css", "b {}\n");
    let told = run("mpypi", &[&usual[..], &["--json"]].concat()).expect_code(0).json();
    assert_eq!(told["lint"].as_array().unwrap().len(), 1);
    std::fs::remove_file(world.path("one/.promoterignore")).unwrap();
    let told = run("mpypi", &[&usual[..], &["--json"]].concat()).expect_code(0).json();
    assert_eq!(told["lint"], json!([]));
}
