//! The dashboard, in a real browser: what people see while things happen, what they can do, and what nobody can do to them.

use std::{
    io::Write as _,
    thread,
    time::{Duration, Instant},
};

use mpypi_protocol::{Digest, PackageId};
use mpypi_tests::{Client, PATIENCE, Running, Server, World, browser::Browser, clock, run};
use serde_json::{Value, json};

const PHONE: (u32, u32) = (390, 780);
const DESK: (u32, u32) = (1280, 860);

fn start(world: &World) -> Server {
    Server::start_with(world, &["--http", "127.0.0.1:0"])
}

/// A channel's folder with one file, whose text is `text`.
fn folder(world: &World, text: &str) -> String {
    world.write("dev/src/main.py", text);
    world.text("dev")
}

fn publish(world: &World, server: &Server, text: &str) {
    let folder = folder(world, text);
    let _ = run("mpypi", &["publish", &folder, "--broker", &server.url()]).expect_code(0);
}

fn agent(world: &World, server: &Server, node: &str) -> Running {
    let (url, root) = (server.url(), world.text(node));
    Running::start(
        "mpypi-agent",
        &["run", "--broker", &url, "--root", &root, "--node", node, "--channel", "dev"],
    )
}

/// Nothing went wrong in the page, nothing came from elsewhere, and nothing was run that a device said.
#[track_caller]
fn is_sound(browser: &mut Browser) {
    assert_eq!(browser.complaints(), Vec::<String>::new());
    assert_eq!(browser.run("return window.hacked ?? null"), Value::Null);
}

#[test]
fn a_release_shows_by_itself_nodes_come_to_it_and_a_failure_says_why() {
    let world = World::new();
    let server = start(&world);
    let mut browser = Browser::open(server.http.unwrap());
    browser.see("main", "An empty index, ready for its first release");
    browser.see("code", "mpypi publish channels/dev");
    browser.see("code", "make publish CHANNEL=dev");
    // From here on nobody loads the page again.
    browser.run("window.untouched = true");
    let _agents = ["device-1", "device-2"].map(|node| agent(&world, &server, node));
    browser.see(".tile", "2 online");
    publish(&world, &server, "print(1)\n");
    browser.see(".release-row", "1 (1)");
    browser.see(".tile:nth-child(2)", "100 %");
    browser.see(".passing li", "device-1");
    publish(&world, &server, "print(2)\n");
    browser.see(".release-row .release-count", "2");
    browser.see(".release-row", "2 (2)");
    browser.click("nav a", "Nodes");
    browser.see(".long-body .long-row", "device-2");
    browser.see(".tally", "2 nodes");
    browser.click(".long-body a", "device-2");
    browser.see("h1", "device-2");
    browser.see(".now", "2 (2)");
    browser.see(".updates > li", "1 (1)");
    browser.see(".facts", "mpypi-sim");
    // What a list says is not true: both refuse it, and say why wherever one looks.
    let digest = Digest::of(b"print(3)\n");
    let mut publisher = Client::connect(server.address, "publisher");
    assert!(publisher.retain(&PackageId::Src("main.py".parse().unwrap(), digest).topic(), b"print(3)\n"));
    let list = json!([
        {"type": "release", "channel": "dev", "sequence": 3, "version": "3"},
        {"type": "src", "path": "main.py", "pkg_sha256": digest.to_string(), "size": 4},
    ]);
    assert!(publisher.retain("mpypi/channels/dev", list.to_string().as_bytes()));
    browser.see(".now .badge", "failed");
    browser.see(".reason", "wrong-size");
    browser.see(".log", "wrong-size");
    browser.click("nav a", "Overview");
    browser.see(".card", "Why it failed");
    browser.see(".tile:nth-child(4)", "2");
    browser.click(".row-link", "wrong-size");
    browser.see(".chip", "reason wrong-size");
    browser.see(".tally", "2 nodes");
    browser.click("nav a", "Channels");
    browser.click(".channel", "dev");
    browser.see(".diff", "Since release");
    browser.see(".diff-list li", "main.py");
    browser.click("nav a", "Packages");
    browser.see("td", "main.py");
    assert_eq!(browser.run("return window.untouched"), true);
    is_sound(&mut browser);
}

#[test]
fn what_is_ordered_with_a_button_is_done() {
    let world = World::new();
    let server = start(&world);
    publish(&world, &server, "print(1)\n");
    let _agents: Vec<_> = (1..=3).map(|n| agent(&world, &server, &format!("device-{n}"))).collect();
    let mut browser = Browser::open(server.http.unwrap());
    browser.see(".release-row .release-count", "3");
    let (folder, url) = (folder(&world, "print(2)\n"), server.url());
    let steps = ["--steps", "1%,100%", "--wait", "1h", "--min-success", "0%"];
    let rollout = Running::start("mpypi", &[&["rollout", &folder, "--broker", &url], &steps[..]].concat());
    browser.see(".rollout .status", "running");
    browser.see(".steps [aria-current=step]", "1 %");
    browser.click("button", "Pause");
    browser.see(".rollout .status", "paused");
    let status = run("mpypi", &["rollout", "status", "dev", "--broker", &url, "--json"]).json();
    assert_eq!(status["status"], "paused", "{status}");
    // Who steered it has ended. It goes on where somebody has the channel's folder and keys.
    browser.see(".rollout", "mpypi rollout resume dev");
    assert_eq!(rollout.wait().code, Some(3));
    let rollout = Running::start("mpypi", &["rollout", "resume", "dev", "--broker", &url]);
    browser.see(".rollout .status", "running");
    // What cannot be taken back is asked about first.
    browser.click("nav a", "Rollouts");
    browser.click("button", "Abort");
    browser.see("dialog", "Abort the rollout on dev?");
    browser.press("Escape");
    browser.see(".rollout .status", "running");
    browser.go("#/nodes/device-1");
    let mut operator = Client::connect(server.address, "operator");
    operator.subscribe("mpypi/nodes/device-1/cmd", 0);
    browser.click("button", "Check now");
    assert_eq!(operator.message().unwrap().payload, br#"[{"type":"check"}]"#);
    browser.click("button", "Restart");
    browser.click("dialog button", "Restart");
    assert_eq!(operator.message().unwrap().payload, br#"[{"type":"restart"}]"#);
    is_sound(&mut browser);
    rollout.signal("-TERM");
    let _ = rollout.wait();
}

#[test]
fn whatever_a_node_or_a_release_says_of_itself_stays_text() {
    let world = World::new();
    let server = start(&world);
    let mut client = Client::connect(server.address, "attacker");
    let evil = "<img src=x onerror=window.hacked=1>";
    let script = "<script>window.hacked=1</script>\"'><svg onload=window.hacked=1>javascript:alert(1)";
    let list = json!([{"type": "release", "channel": "dev", "sequence": 1, "version": evil}]);
    assert!(client.retain("mpypi/channels/dev", list.to_string().as_bytes()));
    let info = json!({
        "uname": {"sysname": evil, "machine": script, "version": evil}, "versions": {}, "channel": "dev",
        "agent": evil, "labels": {"a": evil, "onclick": script},
    });
    // A node's name has no `/` and no `#`.
    let name = format!("{evil}\"'%2e%2e?");
    let at = |subject: &str| format!("mpypi/nodes/{name}/{subject}");
    assert!(client.retain(&at("info"), info.to_string().as_bytes()));
    let state =
        json!({"phase": "failed", "sequence": 1, "version": evil, "error": format!("{script}: {evil}")});
    assert!(client.retain(&at("state"), state.to_string().as_bytes()));
    let mut browser = Browser::open(server.http.unwrap());
    browser.see(".release-name", evil);
    browser.see(".row-link", "other");
    is_sound(&mut browser);
    browser.click("nav a", "Nodes");
    browser.see(".long-body a", &name);
    browser.fill("#search", "onerror");
    browser.click(".long-body a", &name);
    browser.see("h1", &name);
    browser.see(".reason", script);
    browser.see(".facts", script);
    client.post(&at("log"), format!("{script}\n{evil}").as_bytes(), 1, false);
    browser.see(".log", evil);
    is_sound(&mut browser);
    for (hash, selector) in [("#/channels", ".channel"), ("#/channels/dev", ".big"), ("#/packages", ".empty")]
    {
        browser.go(hash);
        browser.see(selector, "");
        is_sound(&mut browser);
    }
    browser.go(&format!("#/nodes/{}", evil.replace('<', "%3C")));
    browser.see(".trouble", "");
    browser.go("#/%3Cimg src=x onerror=window.hacked=1%3E/%zz");
    browser.see(".trouble", "");
    // Nothing of it became an element, in any view.
    assert_eq!(browser.count("main img, main script, main [onerror], main [onload], main [onclick]"), 0);
    is_sound(&mut browser);
}

/// A fleet that nobody runs: `count` nodes, of which some fail and some are busy.
fn people(client: &mut Client, count: usize) {
    let boards = ["ESP32 module with ESP32", "ESP32S3 module with ESP32S3", "Raspberry Pi Pico W", "RP2350"];
    let rooms = ["kitchen", "hall", "cellar", "garden"];
    for n in 1..=count {
        let node = format!("{}-{n}", ["lamp", "sensor", "valve", "thermostat"][n % 4]);
        let info = json!({
            "uname": {"sysname": "esp32", "machine": boards[n % 4], "version": "v1.25.0"}, "versions": {},
            "channel": "dev", "agent": "mpypi/0.1.0", "labels": {"room": rooms[n % 3]}, "free": 180_000 + n,
        });
        client.post(&format!("mpypi/nodes/{node}/info"), info.to_string().as_bytes(), 0, true);
        client.post(&format!("mpypi/nodes/{node}/state"), &state(n, 0), 0, true);
        client.post(&format!("mpypi/nodes/{node}/online"), if n % 20 == 7 { b"0" } else { b"1" }, 0, true);
    }
    client.fence();
}

/// What node `n` says of itself the `round`th time.
fn state(n: usize, round: usize) -> Vec<u8> {
    let done = 100 * (1 + n % 50) as u64;
    let state = match (n + 7 * round) % 29 {
        3 => {
            json!({"phase": "downloading", "sequence": 2, "version": "1.1.0", "done": done, "total": 5907, "attempt": 1})
        }
        5 => {
            json!({"phase": "installing", "sequence": 2, "version": "1.1.0", "done": 5907, "total": 5907, "attempt": 1})
        }
        8 => {
            json!({"phase": "failed", "sequence": 2, "version": "1.1.0", "error": "wrong-hash: `main.py` is another one", "attempt": 3})
        }
        13 => {
            json!({"phase": "rolled_back", "sequence": 2, "version": "1.1.0", "error": "crashed: it did not come back", "attempt": 1})
        }
        left => {
            let version = 1 + u64::from(left % 3 > 0);
            json!({"phase": "idle", "sequence": version, "version": format!("1.{}.0", version - 1), "done": round})
        }
    };
    state.to_string().into_bytes()
}

#[test]
fn everybody_can_use_it_in_light_and_dark_on_a_phone_and_by_keyboard() {
    let world = World::new();
    let server = start(&world);
    publish(&world, &server, "print(1)\n");
    world.write("dev/wheels/blink/pyproject.toml", "[project]\nname = \"blink\"\nversion = \"1.4.0\"\n");
    world.write("dev/wheels/blink/blink/__init__.py", "LED = 2\n");
    publish(&world, &server, "print(2)\n");
    let mut client = Client::connect(server.address, "people");
    people(&mut client, 60);
    client.post("mpypi/nodes/lamp-4/log", b"fetched main.py\nchecked it", 1, false);
    let (folder, url) = (folder(&world, "print(3)\n"), server.url());
    let more = ["--steps", "10%,50%,100%", "--wait", "1h", "--max-failures", "50%", "--min-success", "0%"];
    let rollout = Running::start("mpypi", &[&["rollout", &folder, "--broker", &url], &more[..]].concat());
    let mut browser = Browser::open(server.http.unwrap());
    let views = [
        ("overview", "#/", ".rollout", "running"),
        ("channels", "#/channels", ".channel", "dev"),
        ("channel", "#/channels/dev", ".diff", "Since release"),
        ("nodes", "#/nodes", ".long-body .long-row", "failed"),
        ("node", "#/nodes/lamp-4", ".now", "dev"),
        ("rollouts", "#/rollouts", ".rollout", "running"),
        ("packages", "#/packages", "td", "blink"),
        ("nothing", "#/nodes/nobody", ".trouble", "nobody"),
    ];
    let mut found = Vec::new();
    for (name, hash, selector, text) in views {
        browser.go(hash);
        browser.see(selector, text);
        for (scheme, size) in [("light", DESK), ("dark", DESK), ("light", PHONE), ("dark", PHONE)] {
            browser.scheme(scheme);
            browser.resize(size);
            browser.see(selector, text);
            let place = format!("{name}-{scheme}-{}", size.0);
            found.extend(browser.judge().into_iter().map(|problem| format!("{place}: {problem}")));
            browser.screenshot(&place);
        }
        browser.resize(DESK);
        browser.scheme("light");
    }
    assert_eq!(found, Vec::<String>::new());
    // By keyboard alone: to the search, down the list, and into a node.
    browser.go("#/nodes");
    browser.see(".tally", "60 nodes");
    browser.press("/");
    for key in ["s", "e", "n", "s", "o", "r"] {
        browser.press(key);
    }
    browser.see(".tally", "15 of 60 nodes");
    browser.run("document.querySelector('.long').focus()");
    for key in ["ArrowDown", "ArrowDown", "ArrowDown", "Enter"] {
        browser.press(key);
    }
    browser.see("h1", "sensor-9");
    // Which colours was chosen here stays so.
    browser.click("#theme", "");
    browser.click("#theme", "");
    assert_eq!(browser.run("location.reload(); return null"), Value::Null);
    browser.see("h1", "sensor-9");
    assert_eq!(browser.run("return getComputedStyle(document.documentElement).colorScheme"), "dark");
    is_sound(&mut browser);
    rollout.signal("-TERM");
    let _ = rollout.wait();
}

#[test]
fn where_there_are_users_it_asks_who_comes_and_shows_each_what_is_theirs_to_do() {
    let world = World::new();
    let data = world.text("data");
    let token = |name: &str, role: &str| {
        let usual = ["user", "add", name, "--role", role, "--token", "--data", &data];
        run("mpypi-broker", &usual).expect_code(0).stdout.trim().to_owned()
    };
    let (viewer, publisher) = (token("eve", "viewer"), token("paul", "publisher"));
    let server = start(&world);
    let (ours, (name, role)) = (["--broker", &server.url()], ("paul", &publisher));
    world.write("dev/src/main.py", "print(1)\n");
    let url = ours[1].replace("mqtt://", &format!("mqtt://{name}:{role}@"));
    let _ = run("mpypi", &["publish", &world.text("dev"), "--broker", &url]).expect_code(0);
    let node = token("kitchen", "node");
    let mut browser = Browser::open(server.http.unwrap());
    browser.see("form h1", "Log in");
    assert_eq!(browser.judge(), Vec::<String>::new());
    browser.screenshot("login");
    browser.fill("#login-secret", "wrong");
    browser.click("form button", "Log in");
    browser.see(".reason", "wrong");
    browser.fill("#login-secret", &viewer);
    browser.click("form button", "Log in");
    browser.see("h1", "Overview");
    let agent_url = format!("mqtt://kitchen:{node}@{}", server.address);
    let root = world.text("kitchen");
    let _agent = Running::start(
        "mpypi-agent",
        &["run", "--broker", &agent_url, "--root", &root, "--node", "kitchen", "--channel", "dev"],
    );
    browser.see(".release-row", "1 (1)");
    browser.go("#/nodes/kitchen");
    browser.see(".now", "1 (1)");
    assert_eq!(browser.count("main button"), 0, "a viewer orders nothing");
    // In this tab the login stays, and nowhere else.
    browser.run("location.reload()");
    browser.see("h1", "kitchen");
    assert_eq!(browser.run("return localStorage.length + document.cookie.length"), 0);
    browser.click("button", "Log out");
    browser.see("form h1", "Log in");
    browser.fill("#login-name", "paul");
    browser.fill("#login-secret", &publisher);
    browser.click("form button", "Log in");
    browser.see("button", "Check now");
    // Who is taken out of the users sees no more from then on.
    let _ = run("mpypi-broker", &["user", "remove", "paul", "--data", &data]).expect_code(0);
    browser.see("form h1", "Log in");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn after_a_break_it_goes_on_with_what_is_true_by_then() {
    let world = World::new();
    let server = start(&world);
    let (mqtt, http) = (server.address.to_string(), server.http.unwrap());
    let mut client = Client::connect(server.address, "people");
    people(&mut client, 20);
    let mut browser = Browser::open(http);
    browser.go("#/nodes");
    browser.see(".tally", "20 nodes");
    server.kill();
    browser.see("#live", "reconnecting");
    let data = world.text("data");
    let place = http.to_string();
    let server = Server::launch(&world, &["serve", "--listen", &mqtt, "--http", &place, "--data", &data], 2);
    let mut client = Client::connect(server.address, "people");
    people(&mut client, 25);
    browser.see("#live", "live");
    browser.see(".tally", "25 nodes");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

/// Nodes of a large fleet.
const MANY: usize = 10_000;
/// Changes of state a second, and for how long, in seconds.
const RATE: usize = 500;
const SECONDS: usize = 6;

#[test]
fn ten_thousand_nodes_are_there_at_once_and_of_five_hundred_changes_a_second_none_is_lost() {
    let world = World::new();
    let server = start(&world);
    publish(&world, &server, "print(1)\n");
    publish(&world, &server, "print(2)\n");
    let mut client = Client::connect(server.address, "people");
    people(&mut client, MANY);
    let mut browser = Browser::open(server.http.unwrap());
    browser.see(".tile", "10,000");
    // Anew, with everything there, as somebody who comes in the morning.
    browser.visit("light", DESK);
    browser.see(".tile", "10,000");
    let paint = browser.run("return performance.getEntriesByName('first-contentful-paint')[0].startTime");
    let tiles = browser.run("return performance.getEntriesByName('mpypi-overview')[0].startTime");
    browser.go("#/nodes");
    browser.see(".tally", "10,000 nodes");
    let all = browser.run("return performance.getEntriesByName('mpypi-nodes').at(-1).duration");
    // Only what is seen is on the page.
    assert!(browser.count(".long-body .long-row") < 100);
    let frames = browser.run(SCROLL);
    let (address, started) = (server.address, clock());
    let changes = thread::spawn(move || change(address, started));
    browser.choose("[aria-label=Phase]", "failed");
    changes.join().unwrap();
    let expected: Vec<(String, String, u64)> = (1..=MANY).map(last).collect();
    let failed = expected.iter().filter(|(_, phase, _)| phase == "failed").count();
    browser.see(".tally", &format!("{failed} of 10,000 nodes"));
    browser.choose("[aria-label=Phase]", "");
    browser.see(".tally", "10,000 nodes");
    // Every row, as it is shown when somebody scrolls to it, with a tall window.
    browser.resize((1280, 4200));
    let shown = browser.run(READ);
    let shown = shown.as_object().unwrap();
    let wrong: Vec<_> = expected
        .iter()
        .filter(|(node, phase, sequence)| {
            let row = shown.get(node).and_then(Value::as_str).unwrap_or_default();
            row != format!("{} {}", phase.replace('_', " "), sequence)
        })
        .take(5)
        .collect();
    assert!(wrong.is_empty(), "of {} rows, these are not as their nodes said last: {wrong:?}", shown.len());
    assert_eq!(shown.len(), MANY);
    is_sound(&mut browser);
    let told = format!(
        "{MANY} nodes: first paint after {:.0} ms, the overview after {:.0} ms, all nodes listed within {:.0} ms; scrolling, \
         the median frame took {:.1} ms and the worst {:.1} ms; {} changes at {RATE} a second, none lost",
        paint.as_f64().unwrap(),
        tiles.as_f64().unwrap(),
        all.as_f64().unwrap(),
        frames[0].as_f64().unwrap(),
        frames[1].as_f64().unwrap(),
        RATE * SECONDS,
    );
    println!("{told}");
    let mut file = std::fs::File::create(Browser::screenshots().join("measured.txt")).unwrap();
    writeln!(file, "{told}").unwrap();
}

/// Node `n` of [`people`], and what it says last: its phase and its release.
fn last(n: usize) -> (String, String, u64) {
    let node = format!("{}-{n}", ["lamp", "sensor", "valve", "thermostat"][n % 4]);
    let rounds = (RATE * SECONDS + MANY - n) / MANY;
    let state: Value = serde_json::from_slice(&state(n, rounds)).unwrap();
    (node, state["phase"].as_str().unwrap().to_owned(), state["sequence"].as_u64().unwrap())
}

/// Lets [`RATE`] nodes a second say something new, one after another.
#[expect(clippy::disallowed_methods, reason = "a load has a pace")]
fn change(address: std::net::SocketAddr, started: Instant) {
    let mut client = Client::connect(address, "changes");
    for at in 0..RATE * SECONDS {
        let (n, round) = (1 + at % MANY, 1 + at / MANY);
        let node = format!("{}-{n}", ["lamp", "sensor", "valve", "thermostat"][n % 4]);
        client.post(&format!("mpypi/nodes/{node}/state"), &state(n, round), 0, true);
        let due = started + Duration::from_secs_f64(at as f64 / RATE as f64);
        if let Some(early) = due.checked_duration_since(clock()) {
            thread::sleep(early);
        }
        assert!(started.elapsed() < PATIENCE);
    }
    client.fence();
}

/// Scrolls through the list for a hundred frames; says how long the median and the longest took, in milliseconds.
const SCROLL: &str = "
    const list = document.querySelector('.long');
    const times = [];
    let last = performance.now();
    for (let n = 0; n < 100; n += 1) {
      list.scrollTop += 397;
      const now = await new Promise(requestAnimationFrame);
      times.push(now - last);
      last = now;
    }
    list.scrollTop = 0;
    times.sort((one, other) => one - other);
    return [times[50], times[99]];";

/// Scrolls through the list, a window at a time, and reads each row as it is shown.
const READ: &str = "
    const list = document.querySelector('.long');
    const rows = {};
    const all = Number(document.querySelector('.long-table').getAttribute('aria-rowcount')) - 1;
    for (let top = 0; top < list.scrollHeight; top += list.clientHeight - 84) {
      list.scrollTop = top;
      const last = Math.min(all - 1, Math.floor((top + list.clientHeight) / 42) - 2) + 2;
      for (let n = 0; n < 600 && !list.querySelector(`.long-body [aria-rowindex='${last}']:not([hidden])`); n += 1) {
        await new Promise(requestAnimationFrame);
      }
      for (const row of list.querySelectorAll('.long-body .long-row:not([hidden])')) {
        const text = (name) => row.querySelector(name).textContent;
        rows[text('.c-node a')] = `${text('.badge')} ${/\\((\\d+)\\)/.exec(text('.c-release'))?.[1]}`;
      }
    }
    return rows;";
