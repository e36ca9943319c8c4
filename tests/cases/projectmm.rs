//! projectMM's firmware update of a device, row by row, and everything that can go wrong with an upload.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use mpypi_protocol::{Digest, PackageId};
use mpypi_tests::{
    Authority, Client, PATIENCE, Secure, Server, Validity, World,
    face::{Answer, Device, answer, eventually, send},
    run,
};
use serde_json::{Value, json};

/// A device of a broker that has nothing, with firmware 3.0.0.
fn device(world: &World, more: &[&str]) -> (Server, Device) {
    let server = Server::start(world);
    let device = start(world, &server, more);
    (server, device)
}

fn start(world: &World, server: &Server, more: &[&str]) -> Device {
    let usual = ["--firmware-version", "3.0.0", "--firmware-slot", "4194304"];
    Device::start(world, &server.url(), &[&usual[..], more].concat())
}

/// What a server answers to each request in turn, the last again and again.
fn serve(answers: impl Fn(usize) -> Vec<Vec<u8>> + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            for piece in answers(number) {
                if stream.write_all(&piece).is_err() {
                    break;
                }
            }
        }
    });
    address
}

fn ok(image: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", image.len()).as_bytes(), image].concat()
}

fn order(device: &Device, body: &Value) -> (u16, Value) {
    let answer = device.post("/api/firmware/url", body.to_string());
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(answer.header("content-length"), Some(&*answer.body.len().to_string()));
    (answer.code, answer.json())
}

fn await_version(device: &Device, version: &str) {
    eventually(&format!("version {version} never ran"), || {
        (device.control("version")["value"] == version && device.firmware()["status"].is_null()).then_some(())
    });
}

#[test]
fn an_image_is_fetched_through_ten_redirects_and_runs_after_a_restart() {
    let world = World::new();
    let (_server, device) = device(&world, &["--firmware-key", "esp32-eth"]);
    let image = vec![7; 100_000];
    let served = image.clone();
    let address = serve(move |number| match number {
        0..10 => vec![
            b"HTTP/1.1 302 Found\r\nLocation: /more/firmware-esp32-v3.0.1.bin\r\nContent-Length: 0\r\n\r\n"
                .to_vec(),
        ],
        _ => vec![ok(&served)],
    });
    let module = device.firmware();
    assert_eq!((&module["name"], &module["type"]), (&json!("Firmware"), &json!("FirmwareUpdateModule")));
    assert!(module["status"].is_null() && module["severity"].is_null(), "idle says nothing");
    assert_eq!(device.get("/api/state").json(), json!({ "modules": [module] }));
    assert_eq!(
        device.control("firmware"),
        json!({"name": "firmware", "type": "string", "value": "esp32-eth"})
    );
    assert_eq!(
        device.control("update_pct"),
        json!({"name": "update_pct", "type": "progress", "value": 0, "total": 0})
    );
    let url = format!("http://{address}/firmware-esp32-v3.0.1.bin");
    let sha256 = Digest::of(&image).to_string();
    assert_eq!(order(&device, &json!({"url": url, "sha256": sha256})), (202, json!({"ok": true})));
    await_version(&device, "3.0.1");
    assert_eq!(device.control("firmwarePartition")["value"], 100_000);
    assert_eq!(std::fs::read(world.path("node/.mpypi/firmware/slot-1")).unwrap(), image);
}

#[test]
fn what_cannot_be_fetched_is_an_error_that_stays_until_the_next_one_and_the_old_image_runs_on() {
    let world = World::new();
    let (_server, device) = device(&world, &[]);
    let fails = |order_of: Value, status: &str| {
        assert_eq!(order(&device, &order_of).0, 202, "{status}");
        device.await_status(status);
        assert_eq!(device.firmware()["severity"], "error");
        assert_eq!(device.control("version")["value"], "3.0.0");
    };
    let at = |address: SocketAddr| json!({"url": format!("http://{address}/x.bin")});
    let loops = serve(|_| vec![b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n".to_vec()]);
    fails(at(loops), "error: ota begin ESP_ERR_HTTP_MAX_REDIRECT");
    let absent = serve(|_| vec![b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec()]);
    fails(at(absent), "error: ota begin ESP_FAIL");
    fails(json!({"url": "http://127.0.0.1:1/x.bin"}), "error: ota begin ESP_ERR_HTTP_CONNECT");
    let short = serve(|_| vec![b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n".to_vec(), vec![1; 2000]]);
    fails(at(short), "error: incomplete download");
    assert_eq!(
        (device.control("update_pct")["value"].clone(), device.control("update_pct")["total"].clone()),
        (json!(2000), json!(5000))
    );
    let large = serve(|_| vec![b"HTTP/1.1 200 OK\r\nContent-Length: 4194305\r\n\r\n".to_vec()]);
    fails(at(large), "error: ota begin ESP_ERR_INVALID_SIZE");
    let endless = serve(|_| {
        let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        let chunk = [b"10000\r\n".to_vec(), vec![0; 65536], b"\r\n".to_vec()].concat();
        [vec![head], vec![chunk; 80]].concat()
    });
    fails(at(endless), "error: ota perform ESP_ERR_INVALID_SIZE");
    let other = serve(|_| vec![ok(b"another image")]);
    let mut wrong = at(other);
    wrong["sha256"] = Digest::of(b"this image").to_string().into();
    fails(wrong, "error: ota finish ESP_ERR_OTA_VALIDATE_FAILED");
    let esp = serve(|_| vec![ok(&[&[0xE9, 2][..], &[0; 500]].concat())]);
    fails(at(esp), "error: ota finish ESP_ERR_OTA_VALIDATE_FAILED");
    // And then one that is sound.
    let sound = serve(|_| vec![ok(b"a sound image")]);
    let url = format!("http://{sound}/firmware-any-v3.1.0-dev.7.bin?token=x");
    assert_eq!(order(&device, &json!({"url": url})).0, 202);
    await_version(&device, "3.1.0-dev.7");
}

#[test]
fn what_is_wrong_with_an_order_is_said_in_this_order() {
    let world = World::new();
    let (server, device) = device(&world, &[]);
    for (body, problem) in [
        (json!({}), "url required"),
        (json!({"url": ""}), "url required"),
        (json!({"url": 1}), "url required"),
        (json!({"url": "ftp://x/y"}), "url must start with http:// or https://"),
        (json!({"url": "http://x", "sha256": "abc"}), "sha256 must be 64 hexadecimal digits"),
    ] {
        assert_eq!(order(&device, &body), (400, json!({ "error": problem })));
    }
    assert_eq!(device.post("/api/firmware/url", "").json(), json!({"error": "url required"}));
    let long = format!("http://x/{}", "y".repeat(511));
    assert_eq!(order(&device, &json!({ "url": long })), (500, json!({"error": "error: url too long"})));
    assert_eq!(device.firmware()["status"], "error: url too long");
    assert_eq!(order(&device, &json!({"url": "x".repeat(3000)})).0, 413);
    // While one is under way, any order is told so first.
    let stuck = serve(|_| {
        let mut pieces = vec![b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n".to_vec()];
        pieces.push(vec![0; 100]);
        thread::park_timeout(PATIENCE);
        pieces
    });
    assert_eq!(order(&device, &json!({"url": format!("http://{stuck}/x")})).0, 202);
    for body in [json!({}), json!({"url": "ftp://x"}), json!({"url": "http://x"})] {
        assert_eq!(order(&device, &body), (409, json!({"error": "ota already in progress"})));
    }
    assert_eq!(device.post("/api/firmware/upload", "image").code, 409);
    device.kill();
    let none = Device::start(&world, &server.url(), &["--firmware-slot", "0"]);
    for body in [json!({}), json!({"url": "http://x"})] {
        assert_eq!(order(&none, &body), (501, json!({"error": "OTA not supported on this platform"})));
    }
    assert_eq!(none.post("/api/firmware/upload", "image").code, 501);
}

#[test]
fn bodies_that_are_short_or_say_a_wrong_length_are_answered_in_words() {
    let world = World::new();
    let (_server, device) = device(&world, &[]);
    let error = |answer: Answer| (answer.code, answer.json()["error"].as_str().unwrap().to_owned());
    let is = |code, problem: &str| (code, problem.to_owned());
    let post = |length: &str| {
        let head =
            format!("POST /api/firmware/url HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
        send(device.address, head.as_bytes())
    };
    for length in ["x", "-1", "", "1e3", "8388609", "99999999999999999999999"] {
        assert_eq!(error(post(length)), is(400, "invalid content-length"), "{length}");
    }
    let mut stream = TcpStream::connect(device.address).unwrap();
    let head = "POST /api/firmware/url HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{\"url\":";
    stream.write_all(head.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(error(answer(stream)), is(400, "incomplete request body"));
    for path in ["/", "/api/firmware/url", "/nowhere"] {
        let request =
            format!("OPTIONS {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://any.example\r\n\r\n");
        let answer = send(device.address, request.as_bytes());
        assert_eq!((answer.code, answer.body.as_str()), (204, ""));
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
        assert!(answer.header("access-control-allow-methods").unwrap().contains("POST"));
        assert!(answer.header("access-control-allow-headers").unwrap().contains("Content-Type"));
    }
    assert_eq!(error(device.get("/nowhere")), is(404, "not found"));
}

/// Begins an upload that says it has `length` bytes, and sends `bytes`.
fn begin(device: &Device, length: usize, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(device.address).unwrap();
    let head =
        format!("POST /api/firmware/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(bytes).unwrap();
    stream
}

#[test]
fn four_mebibytes_are_flashed_while_they_arrive_and_whatever_happens_to_them_the_old_slot_starts() {
    let world = World::new();
    let (server, device) = device(&world, &[]);
    let mut rng = fastrand::Rng::with_seed(9);
    let image: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(4 << 20).collect();

    // Cut at random bytes, by an end of the stream.
    for _ in 0..4 {
        let cut = rng.usize(..image.len());
        let stream = begin(&device, image.len(), &image[..cut]);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let answer = answer(stream);
        let status = format!("error: incomplete upload ({cut}/{})", image.len());
        assert_eq!((answer.code, answer.json()), (400, json!({ "error": status })));
        assert_eq!(device.firmware()["status"], status);
    }
    // Larger than the slot.
    let stream = begin(&device, image.len() + 1, b"");
    assert_eq!(answer(stream).json(), json!({"error": "error: ota begin ESP_ERR_INVALID_SIZE"}));
    // Twice at once, and power off in the middle of the one that came first.
    let mut slow = begin(&device, image.len(), &image[..1 << 20]);
    eventually("nothing was flashed", || (device.control("update_pct")["value"] == 1 << 20).then_some(()));
    assert_eq!(device.firmware()["status"], "flashing");
    let second = device.post("/api/firmware/upload", &image[..1000]);
    assert_eq!((second.code, second.json()), (409, json!({"error": "ota already in progress"})));
    slow.write_all(&image[1 << 20..2 << 20]).unwrap();
    eventually("the first did not go on", || {
        (device.control("update_pct")["value"] == 2 << 20).then_some(())
    });
    device.kill();
    let device = start(&world, &server, &[]);
    assert_eq!(device.control("version")["value"], "3.0.0");
    // A length that lies: with fewer bytes than there are, the image is not what was meant.
    let lying = begin(&device, 1000, &[&[0xE9, 3][..], &image[..5000]].concat());
    assert_eq!(answer(lying).json(), json!({"error": "error: ota finish ESP_ERR_OTA_VALIDATE_FAILED"}));
    let expected = [("X-SHA256", &*Digest::of(&image).to_string())];
    let other = device.post_with("/api/firmware/upload", &expected, &image[..1000]);
    assert_eq!(other.json(), json!({"error": "error: ota finish ESP_ERR_OTA_VALIDATE_FAILED"}));
    let chunked = b"POST /api/firmware/upload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(send(device.address, chunked).json(), json!({"error": "invalid content-length"}));
    assert_eq!(device.control("version")["value"], "3.0.0");

    let whole = device.post_with("/api/firmware/upload", &expected, &image);
    assert_eq!((whole.code, whole.json()), (200, json!({"ok": true})));
    await_version(&device, &format!("0.0.0+{}", Digest::of(&image).short()));
    assert_eq!(std::fs::read(world.path("node/.mpypi/firmware/slot-1")).unwrap(), image);
}

#[test]
fn an_upload_that_drips_is_waited_for_and_one_whose_sender_goes_away_frees_the_device() {
    let world = World::new();
    let (_server, device) = device(&world, &[]);
    let image = vec![3; 40_000];
    let mut stream = begin(&device, image.len(), b"");
    for (number, piece) in image.chunks(4000).enumerate() {
        stream.write_all(piece).unwrap();
        let done = (number + 1) * 4000;
        eventually("a piece was not flashed", || {
            let value = device.control("update_pct")["value"].clone();
            (value == done || value == 0 && done == image.len()).then_some(())
        });
    }
    assert_eq!(answer(stream).json(), json!({"ok": true}));
    await_version(&device, &format!("0.0.0+{}", Digest::of(&image).short()));
    // Until it is confirmed, the other slot may have to start again.
    eventually("it was never confirmed", || {
        let record = std::fs::read_to_string(world.path("node/.mpypi/firmware.json")).ok()?;
        (!record.contains("\"trial\"")).then_some(())
    });
    let stream = begin(&device, 5000, &[0; 100]);
    eventually("nothing came", || (device.control("update_pct")["value"] == 100).then_some(()));
    drop(stream);
    eventually("it is not free", || {
        device.firmware()["status"].as_str()?.starts_with("error: ").then_some(())
    });
    assert_eq!(device.post("/api/firmware/upload", b"sound").json(), json!({"ok": true}));
}

#[test]
fn an_image_that_never_proves_itself_is_given_up_and_the_old_slot_starts() {
    let world = World::new();
    let (server, mut device) = device(&world, &["--confirm-after", "1h"]);
    let version = format!("0.0.0+{}", Digest::of(b"bad").short());
    assert_eq!(device.post("/api/firmware/upload", b"bad").code, 200);
    await_version(&device, &version);
    assert_eq!(
        order(&device, &json!({"url": "http://x"})).0,
        409,
        "what would be overwritten may have to start again"
    );
    for _ in 1..mpypi_agent_sim::limits::UNCONFIRMED_BOOTS {
        device.kill();
        device = start(&world, &server, &["--confirm-after", "1h"]);
        assert_eq!(device.control("version")["value"], version);
    }
    device.kill();
    let device = start(&world, &server, &[]);
    assert_eq!(device.control("version")["value"], "3.0.0");
}

#[test]
fn a_server_for_which_nobody_vouches_is_not_believed() {
    let world = World::new();
    let ca = Authority::new(&world, "ca");
    ca.server(&world, "broker", &["127.0.0.1"], Validity::Now);
    let secure = Secure::start(mpypi_tests::Kind::Ours, &world, None);
    let device = start(&world, &secure.server, &[]);
    let url = json!({"url": format!("https://{}/x.bin", secure.address)});
    assert_eq!(order(&device, &url).0, 202);
    device.await_status("error: ota begin ESP_ERR_HTTP_CONNECT");
}

#[test]
fn a_websocket_tells_all_and_then_what_changes_to_eight_clients() {
    let world = World::new();
    let (_server, device) = device(&world, &[]);
    let watch = || {
        let stream = TcpStream::connect(device.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let opened = tungstenite::client(format!("ws://{}/ws", device.address), stream);
        opened.map(|(client, _)| client).map_err(|error| error.to_string())
    };
    let mut clients: Vec<_> = (0..8).map(|_| watch().unwrap()).collect();
    let text = |client: &mut tungstenite::WebSocket<TcpStream>| -> Value {
        serde_json::from_str(client.read().unwrap().to_text().unwrap()).unwrap()
    };
    for client in &mut clients {
        assert_eq!(text(client)["modules"][0]["name"], "Firmware");
    }
    let ninth = watch().unwrap_err();
    assert!(ninth.contains("503"), "{ninth}");
    let stream = begin(&device, 5000, &[0; 1000]);
    let mut seen = serde_json::Map::new();
    while seen.get("Firmware/update_pct") != Some(&1000.into()) {
        for change in text(&mut clients[0])["patch"].as_array().unwrap() {
            seen.insert(change["path"].as_str().unwrap().to_owned(), change["value"].clone());
        }
    }
    assert_eq!(
        (&seen["Firmware/@status"], &seen["Firmware/@severity"]),
        (&json!("flashing"), &json!("status"))
    );
    drop(stream);
    clients[1].close(None).unwrap();
    while clients[1].read().is_ok() {}
    eventually("no place became free", || watch().ok().map(drop));
}

/// A channel with an image for `target`.
fn publish(server: &Server, version: &str, target: &str) -> Vec<u8> {
    let image = format!("{target} {version}").into_bytes();
    let digest = Digest::of(&image);
    let mut publisher = Client::connect(server.address, "publisher");
    assert!(publisher.retain(&PackageId::Firmware(digest).topic(), &image));
    let list = json!([
        {"type": "release", "channel": "dev", "sequence": 1, "version": version},
        {"type": "firmware", "name": target, "version": version, "target": target,
         "pkg_sha256": digest.to_string(), "size": image.len()},
    ]);
    assert!(publisher.retain("mpypi/channels/dev", list.to_string().as_bytes()));
    image
}

#[test]
fn home_assistant_finds_the_firmware_and_installs_what_there_is() {
    let world = World::new();
    let server = Server::start(&world);
    publish(&server, "3.0.1", "esp32");
    let more = ["--updates", "ask", "--firmware-key", "esp32", "--home-assistant", "30:ae:a4:07:0d:64"];
    let device = start(&world, &server, &more);
    let mut client = Client::connect(server.address, "home");
    let mut retained =
        |topic: &str| -> Option<Value> { serde_json::from_slice(&client.retained(topic)?.payload).ok() };
    let config =
        eventually("it never showed itself", || retained("homeassistant/update/projectMM_070D64/config"));
    assert_eq!(config["availability_topic"], "mpypi/nodes/kitchen/online");
    let state = config["state_topic"].as_str().unwrap().to_owned();
    assert_eq!(state, "projectMM/070D64/update/state");
    let mut says = |installed: &str, latest: &str| {
        eventually("it never said so", || {
            let state = retained(&state)?;
            (state["installed_version"] == installed && state["latest_version"] == latest).then_some(state)
        })
    };
    let state = says("3.0.0", "3.0.1");
    assert!(state.get("release_url").is_some() && state.get("title").is_some());
    let mut other = Client::connect(server.address, "button");
    other.post(config["command_topic"].as_str().unwrap(), b"install", 1, false);
    says("3.0.1", "3.0.1");
    assert_eq!(device.control("version")["value"], "3.0.1");
}

#[test]
fn devices_that_know_no_lists_are_updated_one_after_another_and_shown_as_nodes() {
    let world = World::new();
    let server = Server::start(&world);
    let image = publish(&server, "3.0.1", "esp32");
    let path = format!("GET /packages/{} ", Digest::of(&image));
    // The gateway, as devices see it.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let gateway = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let length = stream.read(&mut request).unwrap();
            let answer = match request[..length].starts_with(path.as_bytes()) {
                true => ok(&image),
                false => b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec(),
            };
            stream.write_all(&answer).ok();
        }
    });
    // These two follow a broker that has nothing, as if they followed none.
    let (one, two) = (World::new(), World::new());
    let (_first, eth) = device(&one, &["--firmware-key", "esp32-eth"]);
    let (_second, other) = device(&two, &["--firmware-key", "esp32s3"]);
    let at = |name: &str, device: &Device| format!("{name}=http://{}", device.address);
    let push = |devices: &[&str]| {
        let usual =
            ["push", "dev", "--broker", &server.url(), "--gateway", &gateway, "--timeout", "60s", "--json"];
        run("mpypi", &[&usual[..], devices].concat())
    };
    let both = push(&["--device", &at("lamp", &eth), "--device", &at("sign", &other)]).expect_code(3);
    let results: Vec<_> = both.json()["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["result"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(results, ["updated from 3.0.0 to 3.0.1", "the channel has no image for `esp32s3`"]);
    assert_eq!(eth.control("version")["value"], "3.0.1");
    assert_eq!(other.control("version")["value"], "3.0.0");
    let again = push(&["--device", &at("lamp", &eth)]).expect_code(0);
    assert_eq!(again.json()["devices"][0]["result"], "up to date at 3.0.1");
    let gone = push(&["--device", "gone=http://127.0.0.1:1"]).expect_code(3);
    assert!(gone.stdout.contains("failed: "), "{}", gone.stdout);
    let mut client = Client::connect(server.address, "reader");
    let state: Value =
        serde_json::from_slice(&client.retained("mpypi/nodes/lamp/state").unwrap().payload).unwrap();
    assert_eq!((&state["phase"], &state["version"]), (&json!("idle"), &json!("3.0.1")));
    let status = run("mpypi", &["status", "dev", "--broker", &server.url()]).expect_code(0).stdout;
    assert!(status.contains("lamp") && status.contains("sign"), "{status}");
}
