//! A device that runs the stand-in for Mpy-BLOX, `tests/mpyblox/node.py`, on MicroPython.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
};

use mpypi_protocol::{
    Digest,
    wheel::{RecordLine, write_record},
};
use serde_json::Value;

use crate::{PATIENCE, Server, World, programs::peer};

/// A wheel, stored and not compressed, with these files and with these below its dist-info folder. `metadata`
/// follows name and version.
#[must_use]
pub fn wheel(
    name: &str,
    version: &str,
    tag: &str,
    files: &[(&str, &str)],
    info: &[(&str, &str)],
    metadata: &str,
) -> Vec<u8> {
    let folder = mpypi_protocol::wheel::dist_info(name, version);
    let mut members: Vec<(String, String)> = Vec::new();
    members.extend(files.iter().map(|(name, content)| (name.to_string(), content.to_string())));
    let headers = format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}");
    members.push((format!("{folder}/METADATA"), headers));
    members.push((format!("{folder}/WHEEL"), format!("Wheel-Version: 1.0\nTag: {tag}\n")));
    members.extend(info.iter().map(|(name, content)| (format!("{folder}/{name}"), content.to_string())));
    let mut lines: Vec<_> = members
        .iter()
        .map(|(name, content)| RecordLine {
            path: name.parse().unwrap(),
            digest: Some(Digest::of(content.as_bytes())),
            size: Some(content.len() as u64),
        })
        .collect();
    let path = format!("{folder}/RECORD").parse().unwrap();
    lines.push(RecordLine { path, digest: None, size: None });
    members.push((format!("{folder}/RECORD"), write_record(&lines)));
    stored(&members)
}

fn stored(members: &[(String, String)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in members {
        let size = u32::try_from(content.len()).unwrap().to_le_bytes();
        let crc = crc32(content.as_bytes()).to_le_bytes();
        let name_size = u16::try_from(name.len()).unwrap().to_le_bytes();
        let fields = [&[20, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &crc, &size, &size, &name_size, &[0, 0]].concat();
        let at = u32::try_from(out.len()).unwrap().to_le_bytes();
        out.extend([b"PK\x03\x04", &fields[..], name.as_bytes(), content.as_bytes()].concat());
        directory.extend([b"PK\x01\x02\x14\0", &fields[..], &[0; 10], &at, name.as_bytes()].concat());
    }
    let count = u16::try_from(members.len()).unwrap().to_le_bytes();
    let [size, at] = [directory.len(), out.len()].map(|n| u32::try_from(n).unwrap().to_le_bytes());
    out.extend(directory);
    out.extend([b"PK\x05\x06\0\0\0\0", &count[..], &count, &size, &at, &[0, 0]].concat());
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
    })
}

/// A powered device; loses its power with its value.
#[derive(Debug)]
pub struct Blox {
    child: Child,
    events: Receiver<Value>,
    /// What it said so far, for failures.
    said: Vec<Value>,
}

/// Where a device is when nothing is on its way any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rest {
    /// The user's program runs.
    Running,
    /// It boots, and waits for this, for ever.
    Hangs(String),
    /// It no longer hears the broker.
    Deaf,
    /// It has started again as often as it may.
    Spent,
}

impl Blox {
    /// Powers a device up that has its files in the world's folder `id`, which is its client id too.
    #[must_use]
    pub fn start(world: &World, server: &Server, id: &str, channel: &str, options: &[&str]) -> Blox {
        let root = world.path(id);
        if !root.exists() {
            Blox::provision(world, id);
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("mpyblox/node.py");
        let mut child = Command::new(peer("micropython"))
            .args(["-X", "heapsize=64M"])
            .arg(script)
            .args([&server.address.ip().to_string(), &server.port()])
            .arg(root)
            .args([id, channel])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, events) = mpsc::channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Blox { child, events, said: Vec::new() }
    }

    /// Gives a new device its first package, as who flashes it does.
    fn provision(world: &World, id: &str) {
        let folder = format!("{id}/lib/mpy_blox-0.6.0.dist-info");
        world.write(&format!("{folder}/METADATA"), "Metadata-Version: 2.1\nName: mpy-blox\nVersion: 0.6.0\n");
        world.write(&format!("{folder}/WHEEL"), "Wheel-Version: 1.0\nTag: py3-none-any\n");
        world.write(&format!("{folder}/RECORD"), "mpy_blox-0.6.0.dist-info/RECORD,,\n");
    }

    /// What happens next. `None` if the device has ended.
    pub fn event(&mut self) -> Option<Value> {
        match self.events.recv_timeout(PATIENCE) {
            Ok(event) => {
                self.said.push(event.clone());
                Some(event)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the device says nothing any more: {:#?}", self.said),
        }
    }

    /// Waits for an event of this kind.
    #[track_caller]
    pub fn until(&mut self, kind: &str) -> Value {
        loop {
            match self.event() {
                Some(event) if event["event"] == kind => return event,
                Some(_) => {}
                None => panic!("the device has ended without `{kind}`: {:#?}", self.said),
            }
        }
    }

    /// Waits until nothing is on its way any more, through however many starts.
    pub fn rest(&mut self) -> Rest {
        while let Some(event) = self.event() {
            match event["event"].as_str() {
                Some("rests") if event["state"] == "running" => return Rest::Running,
                Some("rests") => return Rest::Hangs(event["for"].as_str().unwrap_or_default().to_owned()),
                Some("deaf") => return Rest::Deaf,
                Some("spent") => return Rest::Spent,
                _ => {}
            }
        }
        panic!("the device has ended: {:#?}", self.said);
    }

    /// How often it has started again so far.
    #[must_use]
    pub fn resets(&self) -> usize {
        self.said.iter().filter(|event| event["event"] == "reset").count()
    }

    /// The packages that it said it has, the last time.
    #[must_use]
    pub fn versions(&self) -> Value {
        let info = self.said.iter().rev().find(|event| event["event"] == "info");
        info.map(|info| info["versions"].clone()).unwrap_or_default()
    }

    /// The lists that it got, each with its topic.
    #[must_use]
    pub fn lists(&self) -> Vec<(String, String)> {
        let lists = self.said.iter().filter(|event| event["event"] == "list");
        let text = |event: &Value, key: &str| event[key].as_str().unwrap_or_default().to_owned();
        lists.map(|event| (text(event, "topic"), text(event, "list"))).collect()
    }

    /// Everything that it said so far.
    #[must_use]
    pub fn said(&self) -> &[Value] {
        &self.said
    }
}

impl Drop for Blox {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if thread::panicking() {
            eprintln!("--- the device said");
            self.said.iter().for_each(|event| eprintln!("{event}"));
        }
    }
}
