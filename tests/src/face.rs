//! A small HTTP client that does what it is told, also what no proper client does; and a device with its own interfaces.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::{Deadline, PATIENCE, Server, World, program};

/// An answer over HTTP.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub code: u16,
    /// Its headers, as they came.
    pub head: String,
    /// Its body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    #[track_caller]
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The value of a header, in any case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// Sends `request` as it stands, and reads the answer to its end.
#[must_use]
pub fn send(address: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).unwrap();
    // Who refuses a request need not read all of it.
    let _ = stream.write_all(request);
    answer(stream)
}

/// Reads an answer to its end.
#[must_use]
pub fn answer(mut stream: TcpStream) -> Answer {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: `{text}`"));
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { code, head: head.to_owned(), body: body.to_owned() }
}

/// Waits until `look` finds something.
#[track_caller]
pub fn eventually<T>(complaint: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Deadline::new();
    loop {
        if let Some(found) = look() {
            return found;
        }
        deadline.check(complaint);
        pause();
    }
}

/// Waits until something is so.
#[track_caller]
pub fn until(complaint: &str, mut is: impl FnMut() -> bool) {
    eventually(complaint, || is().then_some(()));
}

#[expect(clippy::disallowed_methods, reason = "who asks over HTTP is not told when to ask again")]
fn pause() {
    thread::sleep(Duration::from_millis(20));
}

/// A device that runs `mpypi-agent run` with its own interfaces, until it is dropped.
#[derive(Debug)]
pub struct Device {
    child: Child,
    /// Where it speaks HTTP.
    pub address: SocketAddr,
}

impl Device {
    /// Starts the device `kitchen`, whose files are in the world's folder `node`, on channel `dev`.
    #[must_use]
    pub fn start(world: &World, broker: &str, more: &[&str]) -> Device {
        let root = world.text("node");
        let mut child = Command::new(program("mpypi-agent"))
            .args(["run", "--broker", broker, "--node", "kitchen", "--root", &root])
            .args(["--http", "127.0.0.1:0"])
            .args(if more.contains(&"--confirm-after") { &[][..] } else { &["--confirm-after", "50ms"] })
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let address = lines.by_ref().find_map(|line| {
            let address = line.strip_prefix("listening on http://").map(|address| address.parse().unwrap());
            said.push(line);
            address
        });
        thread::spawn(move || lines.for_each(drop));
        let Some(address) = address else {
            child.kill().ok();
            panic!("the device did not start: {said:?}");
        };
        Device { child, address }
    }

    /// Ends it as a power cut would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// GET.
    #[must_use]
    pub fn get(&self, path: &str) -> Answer {
        send(self.address, format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.address).as_bytes())
    }

    /// POST of `body`.
    #[must_use]
    pub fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Answer {
        self.post_with(path, &[], body)
    }

    /// POST with more headers.
    #[must_use]
    pub fn post_with(&self, path: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Answer {
        let body = body.as_ref();
        let more: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let host = if headers.iter().any(|(name, _)| *name == "Host") {
            String::new()
        } else {
            format!("Host: {}\r\n", self.address)
        };
        let head = format!("POST {path} HTTP/1.1\r\n{host}{more}Content-Length: {}\r\n\r\n", body.len());
        send(self.address, &[head.as_bytes(), body].concat())
    }

    /// An order to the App Store about these packages.
    #[must_use]
    pub fn order(&self, service: &str, packages: &[&str]) -> Answer {
        let body = serde_json::json!({ "packages": packages }).to_string();
        self.post(&format!("/app_store/{service}"), body)
    }

    /// The package `name`, as the App Store shows it.
    #[must_use]
    pub fn package(&self, name: &str) -> Option<Value> {
        let packages = self.get("/app_store/packages").json();
        packages.as_array().unwrap().iter().find(|package| package["name"] == name).cloned()
    }

    /// Waits until the package `name` has this status.
    #[track_caller]
    pub fn await_package(&self, name: &str, status: &str) -> Value {
        let mut last = Value::Null;
        eventually(&format!("`{name}` never became `{status}`"), || {
            last = self.package(name)?;
            assert!(
                !last["status"].as_str().unwrap().ends_with("_failed") || status.ends_with("_failed"),
                "{last}"
            );
            (last["status"] == status).then(|| last.clone())
        })
    }

    /// The module `Firmware`.
    #[must_use]
    pub fn firmware(&self) -> Value {
        self.get("/api/modules/Firmware").json()
    }

    /// The value of one of its controls.
    #[must_use]
    pub fn control(&self, name: &str) -> Value {
        let module = self.firmware();
        let controls = module["controls"].as_array().unwrap();
        controls.iter().find(|control| control["name"] == name).unwrap().clone()
    }

    /// Waits until the firmware says this of its update; empty: nothing.
    #[track_caller]
    pub fn await_status(&self, status: &str) {
        let mut last = String::new();
        eventually(&format!("the firmware never said `{status}`"), || {
            last = self.firmware()["status"].as_str().unwrap_or_default().to_owned();
            (last == status).then_some(())
        });
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A broker, and a device of it that waits to be told what to install.
#[must_use]
pub fn asking(world: &World, server: &Server, more: &[&str]) -> Device {
    Device::start(world, &server.url(), &[&["--updates", "ask"], more].concat())
}
