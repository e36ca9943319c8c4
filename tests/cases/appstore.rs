//! The App Store API of a device, row by row, and the scripts that robots' owners run against it.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use mpypi_protocol::{Digest, PackageId};
use mpypi_tests::{
    Client, Proxy, Running, Server, Verdict, World,
    face::{Device, asking, eventually},
    run,
};
use serde_json::{Value, json};

/// A channel with the wheels `blink` and `led` and no files.
fn channel(world: &World, version: &str) {
    for name in ["blink", "led"] {
        let project = format!("[project]\nname = \"{name}\"\nversion = \"{version}\"\n");
        world.write(&format!("dev/wheels/{name}/pyproject.toml"), project);
        world.write(&format!("dev/wheels/{name}/{name}/__init__.py"), format!("VERSION = '{version}'\n"));
    }
}

fn publish(world: &World, broker: &str, version: &str) {
    channel(world, version);
    let _ = run("mpypi", &["publish", &world.text("dev"), "--broker", broker]).expect_code(0);
}

/// A broker with a release, and a device that offers it.
fn store(world: &World) -> (Server, Device) {
    let server = Server::start(world);
    publish(world, &server.url(), "1.0.0");
    let device = asking(world, &server, &[]);
    device.await_package("blink", "not_installed");
    (server, device)
}

/// Every package is of a device that has none.
fn files(world: &World, name: &str) -> usize {
    world.files("node").keys().filter(|path| path.contains(name)).count()
}

#[test]
fn a_package_is_refreshed_downloaded_installed_upgraded_and_removed() {
    let world = World::new();
    let (server, device) = store(&world);
    let blink = device.package("blink").unwrap();
    assert_eq!(
        blink,
        json!({"name": "blink", "latest_version": "1.0.0", "current_version": "", "status": "not_installed"})
    );
    for path in ["services/refresh_store", "firmware/refresh_store"] {
        let refreshed = device.post(&format!("/app_store/{path}"), "");
        assert_eq!((refreshed.code, refreshed.json()), (200, json!({"status": 200})));
    }

    let downloaded = device.order("services/download_packages", &["blink"]);
    assert_eq!(downloaded.code, 201);
    assert_eq!(downloaded.json(), json!({"blink": {"task_id": 1, "version": "1.0.0"}}));
    let blink = device.await_package("blink", "downloaded");
    assert_eq!(blink["downloaded_versions"], json!(["1.0.0"]));
    assert_eq!(files(&world, "blink"), 0, "it is not installed yet");

    let installed = device.order("services/install_packages", &["blink"]);
    assert_eq!(installed.code, 201);
    assert_eq!(installed.json(), json!({"blink": {"task_id": 2, "version": "1.0.0"}}), "one counter for all");
    let blink = device.await_package("blink", "up_to_date");
    assert_eq!(blink["current_version"], "1.0.0");
    assert!(files(&world, "blink") >= 2);
    assert_eq!(files(&world, "led"), 0, "nobody chose it");

    publish(&world, &server.url(), "1.1.0");
    let _ = device.post("/app_store/services/refresh_store", "");
    let blink = device.await_package("blink", "upgradable");
    assert_eq!((&blink["latest_version"], &blink["current_version"]), (&json!("1.1.0"), &json!("1.0.0")));

    let removed = device.order("services/uninstall_packages", &["blink"]);
    assert_eq!(removed.code, 201);
    assert_eq!(removed.json(), json!({"blink": {"task_id": 3, "version": "1.0.0"}}));
    device.await_package("blink", "not_installed");
    assert_eq!(files(&world, "blink"), 0, "by its RECORD, to the last file");
    assert_eq!(device.get("/app_store/jobs/uninstall/tasks").json()[0]["status"], "succeeded");
}

#[test]
fn what_is_refused_says_why_in_the_words_that_scripts_match_on() {
    let world = World::new();
    let (server, device) = store(&world);
    let says = |service: &str, packages: &[&str]| {
        let refused = device.order(service, packages);
        (refused.code, refused.json())
    };
    assert_eq!(says("services/download_packages", &["x"]), (400, json!({"x": "invalid module x, skip..."})));
    assert_eq!(
        says("services/install_packages", &["x"]),
        (400, json!({"x": {"error": "invalid module x, skip..."}}))
    );
    assert_eq!(says("services/uninstall_packages", &["blink"]).0, 400);
    assert_eq!(says("firmware/install_packages", &["x"]).0, 400);
    let (code, mixed) = says("services/download_packages", &["x", "blink"]);
    assert_eq!(
        (code, mixed),
        (201, json!({"blink": {"task_id": 1, "version": "1.0.0"}})),
        "the accepted only"
    );
    assert_eq!(device.order("services/install_packages", &["blink", "x"]).code, 201);
    device.await_package("blink", "up_to_date");
    let reason = "installed version(1.0.0) is already up to date";
    assert_eq!(says("services/download_packages", &["blink"]), (400, json!({"blink": reason})));
    assert_eq!(says("services/install_packages", &["blink"]), (400, json!({"blink": {"error": reason}})));

    // The channel goes back, and what is downloaded of it is older than what is installed.
    assert_eq!(device.order("services/download_packages", &["led"]).code, 201);
    device.await_package("led", "downloaded");
    publish(&world, &server.url(), "0.9.0");
    eventually("the older release never came", || {
        (device.package("blink")?["latest_version"] == "0.9.0").then_some(())
    });
    assert_eq!(device.package("blink").unwrap()["status"], "up_to_date");
    assert_eq!(says("services/download_packages", &["blink"]), (400, json!({"blink": reason})));

    for body in ["", "{", "[]", r#"{"packages":"blink"}"#, r#"{"packages":[]}"#, r#"{"packages":[1]}"#] {
        assert_eq!(device.post("/app_store/services/download_packages", body).code, 400, "{body}");
    }
    let large = json!({"packages": ["x".repeat(70_000)]}).to_string();
    assert_eq!(device.post("/app_store/services/download_packages", large).code, 413);
    for path in ["/app_store", "/app_store/jobs/x/tasks", "/app_store/jobs/install/tasks/99/log"] {
        assert_eq!(device.get(path).code, 404, "{path}");
    }
    assert_eq!(device.get("/app_store/services/refresh_store").code, 405);
}

#[test]
fn tasks_are_listed_newest_first_and_their_logs_are_read_by_ranges_of_characters() {
    let world = World::new();
    let (_server, device) = store(&world);
    for service in ["services/download_packages", "services/install_packages"] {
        assert_eq!(device.order(service, &["blink", "led"]).code, 201);
    }
    device.await_package("blink", "up_to_date");
    device.await_package("led", "up_to_date");
    for (kind, ids) in [("download", [2, 1]), ("install", [4, 3])] {
        let tasks = device.get(&format!("/app_store/jobs/{kind}/tasks")).json();
        assert_eq!(tasks.as_array().unwrap().iter().map(|task| task["id"].clone()).collect::<Vec<_>>(), ids);
        let task = &tasks[1];
        assert_eq!((&task["status"], &task["module"]), (&json!("succeeded"), &json!("blink")));
        assert_eq!(task["version"], "1.0.0");
        for time in ["create_time", "start_time", "end_time"] {
            let time = task[time].as_str().unwrap();
            let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
            assert_eq!(shape, "9999-99-99 99:99:99");
        }
        let id = ids[1];
        let path = format!("/app_store/jobs/{kind}/tasks/{id}/log");
        assert_eq!(task["url"], format!("http://{}{path}", device.address));

        let whole = device.get(&path);
        assert_eq!(whole.header("content-type"), Some("text/plain; charset=utf-8"));
        let size = whole.body.chars().count();
        assert_eq!(whole.header("x-text-size"), Some(&*size.to_string()));
        assert_eq!(whole.header("x-more-data"), Some("false"));
        let created = task["create_time"].as_str().unwrap();
        let started = task["start_time"].as_str().unwrap();
        let start = format!(
            "id: {id}\ncreate time: {created}\n{kind} task blink(1.0.0) added\nstart time: {started}\n{kind} blink(1.0.0) begin\n==="
        );
        assert!(whole.body.starts_with(&start), "{}", whole.body);
        let range = |query: &str| {
            let part = device.get(&format!("{path}?{query}"));
            (part.code, part.body.clone(), part.header("x-more-data").unwrap() == "true")
        };
        let body = &whole.body;
        assert_eq!(range("start=4&end=7"), (200, body[4..7].to_owned(), true));
        assert_eq!(range("end=3"), (200, body[..3].to_owned(), true));
        assert_eq!(range("start=10"), (200, body[10..].to_owned(), false));
        assert_eq!(range("start=10&end=10"), (200, body[10..].to_owned(), false));
        assert_eq!(range("start=10&end=5"), (200, body[10..].to_owned(), false));
        assert_eq!(range(&format!("start={}", size + 5)), (200, String::new(), false));
        assert_eq!(device.get(&format!("{path}?start=x")).code, 400);
        // Piece by piece, it is the whole.
        let mut read = String::new();
        loop {
            let (_, part, more) = range(&format!("start={}&end={}", read.len(), read.len() + 7));
            read += &part;
            if !more {
                break;
            }
        }
        assert_eq!(read, *body);
    }
}

/// A broker behind a line that holds packages back while `held`.
fn held_line(server: &Server) -> (Proxy, Arc<AtomicBool>) {
    let held = Arc::new(AtomicBool::new(true));
    let on = held.clone();
    let line = Proxy::start(server.address, move |_, packet| {
        let is_package = packet[0] >> 4 == 3 && packet.windows(15).any(|part| part == b"mpypi/packages/");
        match is_package && on.load(Ordering::SeqCst) {
            true => Verdict::Replace(Vec::new()),
            false => Verdict::Pass,
        }
    });
    (line, held)
}

#[test]
fn an_agent_killed_in_any_state_of_a_task_comes_back_and_tells_the_truth() {
    let world = World::new();
    let server = Server::start(&world);
    publish(&world, &server.url(), "1.0.0");
    let (line, held) = held_line(&server);
    let ask = ["--updates", "ask"];
    let device = Device::start(&world, &line.url(), &ask);
    device.await_package("blink", "not_installed");
    // The first runs, the second waits for its turn, and their installation for both.
    assert_eq!(device.order("services/download_packages", &["blink", "led"]).code, 201);
    assert_eq!(device.order("services/install_packages", &["led"]).code, 201);
    let blink = device.await_package("blink", "downloading");
    assert_eq!((&blink["download_task_id"], &blink["downloading_version"]), (&json!(1), &json!("1.0.0")));
    assert_eq!(blink["downloading_progress"], 0.0);
    let led = device.await_package("led", "download_queueing");
    assert_eq!((&led["download_task_id"], &led["install_task_id"]), (&json!(2), &json!(3)));
    let log = device.get("/app_store/jobs/download/tasks/1/log");
    assert_eq!(log.header("x-more-data"), Some("true"), "it is not over");
    device.kill();

    held.store(false, Ordering::SeqCst);
    let device = Device::start(&world, &line.url(), &[&ask[..], &["--confirm-after", "1h"]].concat());
    device.await_package("blink", "downloaded");
    let led = device.await_package("led", "installing");
    assert_eq!((&led["install_task_id"], &led["installing_version"]), (&json!(3), &json!("1.0.0")));
    eventually("it never waited to be confirmed", || {
        let progress = device.package("led")?["installing_progress"].as_f64()?;
        (progress > 0.7).then_some(())
    });
    assert_eq!(device.order("services/install_packages", &["blink"]).code, 201);
    device.await_package("blink", "install_queueing");
    device.kill();

    let device = Device::start(&world, &line.url(), &ask);
    device.await_package("led", "up_to_date");
    device.await_package("blink", "up_to_date");
    let log = device.get("/app_store/jobs/download/tasks/1/log").body;
    assert!(log.contains("=== ") && log.contains("interrupted by a restart, queued again"), "{log}");
    for kind in ["download", "install"] {
        for task in device.get(&format!("/app_store/jobs/{kind}/tasks")).json().as_array().unwrap() {
            assert_eq!(task["status"], "succeeded", "{task}");
        }
    }
}

#[test]
fn a_package_that_comes_garbled_has_failed_with_a_reason_and_the_same_call_tries_again() {
    let world = World::new();
    let server = Server::start(&world);
    publish(&world, &server.url(), "1.0.0");
    let garbles = Arc::new(AtomicBool::new(true));
    let on = garbles.clone();
    let line = Proxy::start(server.address, move |is_client, packet| {
        let is_package = !is_client && packet.windows(15).any(|part| part == b"mpypi/packages/");
        let mut garbled = packet.to_vec();
        match (is_package && on.load(Ordering::SeqCst), garbled.last_mut()) {
            (true, Some(last)) if packet[0] >> 4 == 3 => {
                *last ^= 1;
                Verdict::Replace(garbled)
            }
            _ => Verdict::Pass,
        }
    });
    let device = Device::start(&world, &line.url(), &["--updates", "ask"]);
    device.await_package("blink", "not_installed");
    assert_eq!(device.order("services/download_packages", &["blink"]).code, 201);
    let failed = device.await_package("blink", "download_failed");
    assert!(failed["download_failed_reason"].as_str().unwrap().contains("hash"), "{failed}");
    let task = device.get("/app_store/jobs/download/tasks").json()[0].clone();
    assert_eq!((&task["id"], &task["status"]), (&json!(1), &json!("failed")));
    assert!(task["end_time"].is_string());
    let log = device.get("/app_store/jobs/download/tasks/1/log");
    assert_eq!(log.header("x-more-data"), Some("false"), "nothing more comes of it");
    let refused = device.order("services/install_packages", &["blink"]);
    assert_eq!(refused.json(), json!({"blink": {"error": "module blink is not downloaded, skip..."}}));

    garbles.store(false, Ordering::SeqCst);
    let again = device.order("services/download_packages", &["blink"]);
    assert_eq!((again.code, again.json()["blink"]["task_id"].clone()), (201, json!(2)));
    device.await_package("blink", "downloaded");
}

#[test]
fn what_there_is_to_choose_from_is_there_after_a_restart_without_a_broker() {
    let world = World::new();
    let (server, device) = store(&world);
    assert_eq!(device.order("services/download_packages", &["blink"]).code, 201);
    device.await_package("blink", "downloaded");
    device.kill();
    let url = server.url();
    server.kill();
    let device = Device::start(&world, &url, &["--updates", "ask"]);
    assert_eq!(device.package("led").unwrap()["latest_version"], "1.0.0");
    assert_eq!(device.order("services/install_packages", &["blink"]).code, 201);
    device.await_package("blink", "up_to_date");
    assert_eq!(device.order("services/download_packages", &["led"]).code, 201);
    device.await_package("led", "downloading");
}

#[test]
fn what_mqtt_brings_is_seen_over_http_and_stays() {
    let world = World::new();
    let server = Server::start(&world);
    publish(&world, &server.url(), "1.0.0");
    let device = Device::start(&world, &server.url(), &[]);
    device.await_package("blink", "up_to_date");
    device.await_package("led", "up_to_date");
    assert_eq!(device.get("/app_store/jobs/install/tasks").json(), json!([]), "nobody asked for it here");
    publish(&world, &server.url(), "1.1.0");
    eventually("the release never came", || {
        let led = device.package("led")?;
        (led["current_version"] == "1.1.0" && led["status"] == "up_to_date").then_some(())
    });
    let refused = device.order("services/uninstall_packages", &["led"]);
    assert_eq!(refused.json(), json!({"led": {"error": "module led is required by the channel, skip..."}}));
}

#[test]
fn a_package_from_a_file_is_installed_from_the_one_folder_only() {
    let world = World::new();
    let server = Server::start(&world);
    publish(&world, &server.url(), "1.0.0");
    let folder = world.path("files");
    fs::create_dir_all(&folder).unwrap();
    world.write("app/ax/__init__.py", "AX = 1\n");
    let packed = Command::new("tar")
        .args(["czf"])
        .arg(folder.join("ax.2.6.4.pi64.tar.gz"))
        .arg("-C")
        .arg(world.path("app"))
        .arg("ax")
        .status()
        .unwrap();
    assert!(packed.success());
    world.write("secret.1.0.tar.gz", "x");
    let device = asking(&world, &server, &["--local-files", &world.text("files")]);
    device.await_package("blink", "not_installed");
    let install = |path: &Path| {
        let body = json!({"filename": path}).to_string();
        device.post("/app_store/services/install_local_file", body)
    };
    let installed = install(&folder.join("ax.2.6.4.pi64.tar.gz"));
    assert_eq!((installed.code, installed.json()), (200, json!({"module_name": "ax", "version": "2.6.4"})));
    let ax = device.await_package("ax", "up_to_date");
    assert_eq!(ax["current_version"], "2.6.4");
    assert_eq!(fs::read(world.path("node/lib/ax/__init__.py")).unwrap(), b"AX = 1\n");
    for path in [world.path("secret.1.0.tar.gz"), folder.join("../secret.1.0.tar.gz"), "/etc/passwd".into()] {
        let refused = install(&path);
        assert_eq!(refused.code, 400);
        assert!(refused.body.contains("is not inside the folder"), "{}", refused.body);
    }
    assert_eq!(device.post("/app_store/services/install_local_file", "{}").code, 400);
}

/// Publishes a release with a firmware image for each of `targets`.
fn publish_firmware(server: &Server, sequence: u64, version: &str, targets: &[&str]) {
    let mut publisher = Client::connect(server.address, "publisher");
    let mut entries =
        vec![json!({"type": "release", "channel": "dev", "sequence": sequence, "version": version})];
    for target in targets {
        let image = format!("{target} {version}");
        let digest = Digest::of(image.as_bytes());
        assert!(publisher.retain(&PackageId::Firmware(digest).topic(), image.as_bytes()));
        entries.push(json!({"type": "firmware", "name": target, "version": version, "target": target,
            "pkg_sha256": digest.to_string(), "size": image.len()}));
    }
    assert!(publisher.retain("mpypi/channels/dev", Value::from(entries).to_string().as_bytes()));
}

#[test]
fn firmware_needs_no_download_and_only_what_fits_is_offered() {
    let world = World::new();
    let server = Server::start(&world);
    publish_firmware(&server, 1, "3.0.1", &["esp32-eth", "esp32s3"]);
    let device = asking(&world, &server, &["--firmware-key", "esp32", "--firmware-version", "3.0.0"]);
    let firmware = || device.get("/app_store/firmware/packages").json();
    eventually("no firmware was offered", || (firmware() != json!([])).then_some(()));
    assert_eq!(
        firmware(),
        json!([{"name": "esp32-eth", "latest_version": "3.0.1", "current_version": "3.0.0", "status": "upgradable"}])
    );
    let refused = device.order("firmware/install_packages", &["esp32s3"]);
    assert_eq!(
        (refused.code, refused.json()["esp32s3"]["error"].clone()),
        (400, json!("invalid module esp32s3, skip..."))
    );
    let installed = device.order("firmware/install_packages", &["esp32-eth"]);
    assert_eq!(
        (installed.code, installed.json()),
        (201, json!({"esp32-eth": {"task_id": 1, "version": "3.0.1"}}))
    );
    eventually("the new firmware never ran", || (firmware()[0]["status"] == "up_to_date").then_some(()));
    assert_eq!(device.control("version")["value"], "3.0.1");
    assert_eq!(device.get("/app_store/jobs/install/tasks").json()[0]["status"], "succeeded");
}

#[test]
fn a_script_of_bash_and_one_of_python_install_without_waiting_and_follow_the_log() {
    let world = World::new();
    let server = Server::start(&world);
    publish(&world, &server.url(), "1.0.0");
    let device = asking(&world, &server, &[]);
    device.await_package("led", "not_installed");
    let url = format!("http://{}", device.address);
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("appstore");
    for (program, script, package) in [("bash", "install.sh", "blink"), ("python3", "install.py", "led")] {
        let output = Command::new(program).arg(scripts.join(script)).args([&url, package]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        let task = said.lines().next().unwrap().strip_prefix("task ").unwrap().to_owned();
        let log = device.get(&format!("/app_store/jobs/install/tasks/{task}/log")).body;
        assert_eq!(said.split_once('\n').unwrap().1, log, "{script}");
        device.await_package(package, "up_to_date");
    }
}

#[test]
fn who_comes_from_another_site_or_without_the_token_is_sent_away() {
    let world = World::new();
    let (_server, device) = store(&world);
    let path = "/app_store/services/refresh_store";
    let code = |headers: &[(&str, &str)]| device.post_with(path, headers, "").code;
    assert_eq!(code(&[]), 200);
    assert_eq!(code(&[("Host", "evil.example:8090")]), 403, "a name that was made to lead here");
    assert_eq!(code(&[("Origin", "http://evil.example")]), 403);
    assert_eq!(code(&[("Sec-Fetch-Site", "cross-site")]), 403);
    assert_eq!(code(&[("Origin", &format!("http://{}", device.address))]), 200, "a page of its own");
    drop(device);
    let server = Server::start(&World::new());
    let token = ["--http-token", "secret", "--allow-origin", "https://hub.local"];
    let device = Device::start(&world, &server.url(), &token);
    let code = |headers: &[(&str, &str)]| device.post_with(path, headers, "").code;
    assert_eq!(code(&[]), 401);
    assert_eq!(code(&[("Authorization", "Bearer wrong")]), 401);
    assert_eq!(code(&[("Authorization", "Bearer secret"), ("Origin", "https://hub.local")]), 200);
    let open = ["run", "--root", &world.text("open"), "--http", "0.0.0.0:0"];
    let said = Running::start("mpypi-agent", &open).wait().expect_code(1).stderr;
    assert!(said.contains("could replace what is on this device") && said.contains("hint: "), "{said}");
}
