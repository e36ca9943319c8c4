//! projectMM's firmware update of a device, row by row, and everything that can go wrong with an upload.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use mpypi_protocol::{Digest, PackageId, rollout::RolloutId};
use mpypi_tests::{
    Authority, Client, PATIENCE, Running, Secure, Server, Validity, World,
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

/// What a line of 50 KB/s takes in a tenth of a second.
const PIECE: usize = 5000;

/// Sends `bytes` at 50 KB/s, as far as somebody takes them.
#[expect(clippy::disallowed_methods, reason = "a poor line is slow")]
fn drip(stream: &mut TcpStream, bytes: &[u8]) {
    for piece in bytes.chunks(PIECE) {
        thread::sleep(std::time::Duration::from_millis(100));
        if stream.write_all(piece).is_err() {
            return;
        }
    }
}

/// `MPYPI_UPLOAD` is another size of the image, in bytes: 4 MiB take 84 seconds.
#[test]
fn an_upload_over_a_poor_line_keeps_its_place_and_cut_anywhere_it_leaves_the_old_slot() {
    let size = std::env::var("MPYPI_UPLOAD").map_or(64 << 10, |size| size.parse().unwrap());
    let world = World::new();
    let (server, device) = device(&world, &[]);
    let mut rng = fastrand::Rng::with_seed(50);
    let image: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(size).collect();
    // The power fails at some byte of it.
    let cut = rng.usize(size / 4..size / 2);
    let mut stream = begin(&device, size, b"");
    drip(&mut stream, &image[..cut]);
    eventually("not all of it came", || (device.control("update_pct")["value"] == cut).then_some(()));
    device.kill();
    let device = start(&world, &server, &[]);
    assert_eq!(device.control("version")["value"], "3.0.0");
    assert!(device.firmware()["status"].is_null(), "nothing is under way");
    // Again, and others come meanwhile, as long as it takes.
    let mut stream = begin(&device, size, &image[..PIECE]);
    eventually("nothing came", || (device.control("update_pct")["value"] == PIECE).then_some(()));
    thread::scope(|scope| {
        let sender = scope.spawn(|| drip(&mut stream, &image[PIECE..]));
        while !sender.is_finished() {
            let second = device.post("/api/firmware/upload", &image[..100]);
            assert!(second.code == 409 || sender.is_finished(), "{second:?}");
        }
    });
    assert_eq!(answer(stream).json(), json!({"ok": true}));
    await_version(&device, &format!("0.0.0+{}", Digest::of(&image).short()));
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
    publish_image(server, 1, version, target, &image);
    image
}

fn publish_image(server: &Server, sequence: u64, version: &str, target: &str, image: &[u8]) {
    let digest = Digest::of(image);
    let mut publisher = Client::connect(server.address, "publisher");
    assert!(publisher.retain(&PackageId::Firmware(digest).topic(), image));
    let list = json!([
        {"type": "release", "channel": "dev", "sequence": sequence, "version": version},
        {"type": "firmware", "name": target, "version": version, "target": target,
         "pkg_sha256": digest.to_string(), "size": image.len()},
    ]);
    assert!(publisher.retain("mpypi/channels/dev", list.to_string().as_bytes()));
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

/// A device of another broker, which has nothing: as if it followed none.
struct Lamp {
    device: Device,
    _server: Server,
    _world: World,
}

impl Lamp {
    fn new(key: &str, more: &[&str]) -> Lamp {
        let world = World::new();
        let (server, device) = device(&world, &[&["--firmware-key", key], more].concat());
        Lamp { device, _server: server, _world: world }
    }

    /// What `mpypi push` is told of it.
    fn named(&self, name: &str) -> String {
        format!("{name}=http://{}", self.device.address)
    }

    fn version(&self) -> Value {
        self.device.control("version")["value"].clone()
    }
}

fn node_state(client: &mut Client, node: &str) -> Value {
    let state = client.retained(&format!("mpypi/nodes/{node}/state"));
    state.map_or(Value::Null, |state| serde_json::from_slice(&state.payload).unwrap())
}

#[test]
fn devices_that_know_no_lists_fetch_from_the_gateway_one_after_another_and_are_shown_as_nodes() {
    let world = World::new();
    let server = Server::start_with(&world, &["--http", "127.0.0.1:0"]);
    publish(&server, "3.0.1", "esp32");
    let gateway = format!("http://{}", server.http.unwrap());
    let (eth, other) = (Lamp::new("esp32-eth", &[]), Lamp::new("esp32s3", &[]));
    let push = |devices: &[&str]| {
        let usual = ["push", "dev", "--broker", &server.url(), "--gateway", &gateway, "--json"];
        run("mpypi", &[&usual[..], devices].concat())
    };
    let both = push(&["--device", &eth.named("lamp"), "--device", &other.named("sign")]).expect_code(3);
    let results: Vec<_> = both.json()["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["became"].clone(), row["result"].as_str().unwrap().to_owned()))
        .collect();
    let expected = [
        (json!("updated"), "updated from 3.0.0 to 3.0.1".to_owned()),
        (json!("no-image"), "the channel has no image for `esp32s3`".to_owned()),
    ];
    assert_eq!(results, expected);
    assert_eq!((eth.version(), other.version()), (json!("3.0.1"), json!("3.0.0")));
    let again = push(&["--device", &eth.named("lamp")]).expect_code(0);
    assert_eq!(again.json()["devices"][0]["result"], "up to date at 3.0.1");
    let gone = push(&["--device", "gone=http://127.0.0.1:1"]).expect_code(3);
    assert!(gone.stdout.contains("failed: "), "{}", gone.stdout);
    let mut client = Client::connect(server.address, "reader");
    let state = node_state(&mut client, "lamp");
    assert_eq!(
        (&state["phase"], &state["version"], &state["sequence"]),
        (&json!("idle"), &json!("3.0.1"), &json!(1))
    );
    assert_eq!(client.retained("mpypi/nodes/gone/online").unwrap().payload, b"0");
    let status = run("mpypi", &["status", "dev", "--broker", &server.url()]).expect_code(0).stdout;
    assert!(status.contains("lamp") && status.contains("sign"), "{status}");

    // An image that the device does not take: nobody else is begun with.
    let bad = b"\xE9\x02 is how an image for an ESP begins, and this is none".as_slice();
    publish_image(&server, 2, "3.0.2", "esp32", bad);
    let more = Lamp::new("esp32", &[]);
    let named = [eth.named("lamp"), more.named("more")];
    let devices = ["--device", &named[0], "--device", &named[1], "--max-failures", "0"];
    let stopped = push(&devices).expect_code(3).json();
    let became: Vec<_> = stopped["devices"].as_array().unwrap().iter().map(|row| &row["became"]).collect();
    assert_eq!(became, [&json!("failed"), &json!("left")], "{stopped}");
    assert_eq!((eth.version(), more.version()), (json!("3.0.1"), json!("3.0.0")));
    let state = node_state(&mut client, "lamp");
    assert_eq!((&state["phase"], &state["sequence"]), (&json!("failed"), &json!(2)));
    assert!(state["error"].as_str().unwrap().contains("ESP_ERR_OTA_VALIDATE_FAILED"), "{state}");
}

#[test]
fn a_rollout_holds_for_devices_that_know_no_lists_in_its_order_and_step_by_step() {
    let world = World::new();
    let server = Server::start_with(&world, &["--http", "127.0.0.1:0"]);
    let gateway = format!("http://{}", server.http.unwrap());
    let id = RolloutId::from_bits(7);
    let (mut half, other): (Vec<String>, Vec<String>) =
        (0..20).map(|n| format!("lamp-{n}")).partition(|name| id.position(name) < 1 << 31);
    half.truncate(2);
    half.sort_by_key(|name| id.position(name));
    let (first, second, third) = (&half[0], &half[1], &other[0]);
    let lamps = [(); 3].map(|()| Lamp::new("esp32", &[]));
    // The one that is last in the rollout is named first, and so on.
    let named = [lamps[2].named(third), lamps[1].named(second), lamps[0].named(first)];
    let file = world.write("lamps.txt", format!("# all of them\n{} room=hall\n", named.join("\n")));

    publish(&server, "3.0.1", "esp32");
    let mut client = Client::connect(server.address, "publisher");
    let list = client.retained("mpypi/channels/dev").unwrap().payload;
    let list: Vec<Value> = serde_json::from_slice(&list).unwrap();
    let mut step = |sequence: u64, percent: u32, only: &str| {
        let mut list = list.clone();
        list[0]["sequence"] = sequence.into();
        list[0]["rollout"] = json!({"id": id.to_string(), "percent": percent, "only": only});
        assert!(client.retain("mpypi/channels/dev", Value::Array(list).to_string().as_bytes()));
    };
    step(2, 50, "version < 3.0.1");
    let file = file.to_str().unwrap();
    let push = ["push", "dev", "--broker", &server.url(), "--gateway", &gateway, "--devices", file];
    let once = run("mpypi", &push).expect_code(0);
    let told: Vec<_> =
        once.stderr.lines().filter_map(|line| line.strip_suffix("  update to 3.0.1")).collect();
    assert_eq!(told, [first, second], "{}", once.stderr);
    let expected = format!(
        "{third}  held: it is not its turn\n{second}  updated from 3.0.0 to 3.0.1\n{first}  updated from 3.0.0 to 3.0.1\n"
    );
    assert_eq!(once.stdout, expected);
    let mut reader = Client::connect(server.address, "reader");
    let state = node_state(&mut reader, third);
    assert_eq!((&state["phase"], &state["held"]), (&json!("idle"), &json!(2)), "as an agent says it");
    assert_eq!(node_state(&mut reader, first)["sequence"], 2);

    // From now on somebody sees to it that the next steps are taken, too.
    let pusher = Running::start("mpypi", &[&push[..], &["--follow"]].concat());
    step(3, 100, "label.room = kitchen");
    eventually("the second step was never seen", || {
        (node_state(&mut reader, third)["held"] == 3).then_some(())
    });
    assert_eq!(lamps[2].version(), "3.0.0", "it is in no kitchen");
    step(4, 100, "version < 3.0.1");
    await_version(&lamps[2].device, "3.0.1");
    eventually("nobody said so", || (node_state(&mut reader, third)["sequence"] == 4).then_some(()));
    pusher.signal("-TERM");
    let said = pusher.wait().expect_code(0).stdout;
    assert!(said.contains(&format!("{third}  updated from 3.0.0 to 3.0.1\n")), "{said}");
}

#[test]
fn what_is_signed_by_nobody_who_may_is_pushed_to_nobody() {
    let world = World::new();
    let server = Server::start(&world);
    let keys = world.text("keys");
    let mpypi = |arguments: &[&str]| {
        let usual = [arguments, &["--keys", &keys]].concat();
        mpypi_tests::run_with("mpypi", &usual, &[("MPYPI_KEY_PASSPHRASE", "secret")])
    };
    for arguments in [
        &["keys", "new", "r1", "dev-2026"][..],
        &["keys", "root", "new", "--key", "r1", "--threshold", "1"],
        &["keys", "delegate", "dev", "--key", "dev-2026"],
        &["keys", "root", "sign"],
    ] {
        mpypi(arguments).expect_code(0);
    }
    publish(&server, "3.0.1", "esp32");
    let push =
        ["push", "dev", "--broker", &server.url(), "--gateway", "http://x", "--device", "lamp=http://x"];
    let refused = mpypi(&push).expect_code(1).stderr;
    assert!(refused.contains("is not believed") && refused.contains("hint: "), "{refused}");
}

#[test]
fn a_server_for_which_its_ca_vouches_is_believed_also_at_the_end_of_redirects() {
    let world = World::new();
    let ca = Authority::new(&world, "ca");
    ca.server(&world, "web", &["127.0.0.1"], Validity::Now);
    let (cert, key) = (world.text("web.pem"), world.text("web.key"));
    let tls = ["--http", "https://127.0.0.1:0", "--tls-cert", &cert, "--tls-key", &key];
    let server = Server::start_with(&world, &tls);
    let gateway = server.listening.iter().find(|url| url.starts_with("https://")).unwrap();
    let image = publish(&server, "3.0.1", "esp32");
    let lamp = Lamp::new("esp32", &["--ca", &ca.pem(&world)]);
    let target = format!("{gateway}/firmware/esp32.bin");
    let here = format!("HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n").into_bytes();
    let away = serve(move |_| vec![here.clone()]);
    // By a name that its certificate does not have.
    let other = target.replace("127.0.0.1", "localhost");
    assert_eq!(order(&lamp.device, &json!({ "url": other })).0, 202);
    lamp.device.await_status("error: ota begin ESP_ERR_HTTP_CONNECT");
    let sha256 = Digest::of(&image).to_string();
    let url = format!("http://{away}/firmware-esp32-v3.0.0.bin");
    assert_eq!(order(&lamp.device, &json!({"url": url, "sha256": sha256, "version": "3.0.0"})).0, 202);
    eventually("it was never confirmed", || {
        let module = lamp.device.firmware();
        (lamp.device.control("firmwarePartition")["value"] == image.len() && module["status"].is_null())
            .then_some(())
    });
    // And as `mpypi push` has it.
    let named = lamp.named("lamp");
    let push = ["push", "dev", "--broker", &server.url(), "--gateway", gateway, "--device", &named];
    eventually("it never ran", || {
        let pushed = run("mpypi", &push);
        // The slot that would be overwritten may have to start again, until the image is confirmed.
        (pushed.code == Some(0)).then_some(())
    });
    assert_eq!(lamp.version(), "3.0.1");
}
