//! A device with Mpy-BLOX, for fleets that have some: written from what is documented of Mpy-BLOX 0.6.0, none of it its code.
//!
//! It looks at versions where another agent looks at bytes, trusts whoever sends, writes in place, and starts again when it
//! has installed something; much that a list may hold makes it wait for ever. Topics and payloads in, wishes out: no socket
//! here. `tests/mpyblox/node.py`, on MicroPython, does the same to the last packet, and is what our broker is tested with;
//! `tests/cases/mpyblox.rs` holds what both come to side by side.

use std::io;

use mpypi_protocol::{
    ChannelName, Digest, Entry, FilePath, NodeId, PackageId, Runtime, UpdateList,
    node::{Info, Uname},
    topic::NodeSubject,
    wheel::{ROOT, RecordLine, parse_headers, parse_record},
};
use zip::ZipArchive;

use crate::{
    device::Hardware,
    flash::{self, Flash, Kind},
    limits,
};

/// The package that every such device has from who set it up.
const FIRST: [(&str, &str); 3] = [
    ("METADATA", "Metadata-Version: 2.1\nName: mpy-blox\nVersion: 0.6.0\n"),
    ("WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"),
    ("RECORD", "mpy_blox-0.6.0.dist-info/RECORD,,\n"),
];
const FIRST_FOLDER: &str = "lib/mpy_blox-0.6.0.dist-info";

/// A device.
#[derive(Debug)]
pub struct Blox<F> {
    flash: F,
    node: NodeId,
    channel: ChannelName,
    runtime: Runtime,
    sysname: String,
    /// Packages asked for, in order.
    waiting: Vec<PackageId>,
    /// Whether it has installed something since its start.
    installed: bool,
    /// Whether it has been through a list since its start.
    runs: bool,
}

/// What a device wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// Publish this on its `info`, not retained.
    Introduce(Vec<u8>),
    /// Subscribe to this, alone.
    Subscribe(String),
    /// Start again: at once while it boots, after a while when the user's program runs.
    Reset {
        /// Whether that runs.
        runs: bool,
    },
    /// It went wrong: what comes of it is for whoever listens at its serial port.
    Wrong(String),
}

/// What a dist-info folder says.
struct Package {
    name: String,
    version: String,
    tag: String,
    record: Vec<RecordLine>,
    folder: String,
}

impl<F: Flash> Blox<F> {
    /// A device that is off. One whose flash is empty gets what every such device has.
    ///
    /// # Errors
    /// The flash fails.
    pub fn off(
        mut flash: F,
        node: &NodeId,
        channel: ChannelName,
        hardware: &Hardware,
    ) -> io::Result<Blox<F>> {
        if flash.list("")?.is_empty() {
            make_folders(&mut flash, FIRST_FOLDER)?;
            for (name, text) in FIRST {
                write(&mut flash, &format!("{FIRST_FOLDER}/{name}"), text.as_bytes())?;
            }
        }
        Ok(Blox {
            flash,
            node: node.clone(),
            channel,
            runtime: hardware.runtime(),
            sysname: hardware.sysname.clone(),
            waiting: Vec::new(),
            installed: false,
            runs: false,
        })
    }

    /// Starts it; says what it wants from a broker that has accepted it, one after the other.
    pub fn start(&mut self) -> Vec<Wish> {
        (self.waiting, self.installed, self.runs) = (Vec::new(), false, false);
        let info = Info {
            uname: Uname { sysname: self.sysname.clone(), machine: "ESP32".into(), version: "1.22.0".into() },
            versions: self.packages().into_iter().map(|package| (package.name, package.version)).collect(),
            channel: None,
            agent: None,
            free: None,
            labels: Default::default(),
            utc_offset: None,
            extra: Default::default(),
        };
        vec![
            Wish::Introduce(info.to_bytes()),
            Wish::Subscribe(self.node.topic(NodeSubject::Cmd)),
            Wish::Subscribe(self.channel.topic()),
        ]
    }

    /// Takes a message in.
    pub fn message(&mut self, topic: &str, payload: &[u8]) -> Vec<Wish> {
        let is_list = topic == self.channel.topic() || topic == self.node.topic(NodeSubject::Cmd);
        let done = match self.waiting.iter().position(|package| package.topic() == topic) {
            Some(place) => {
                let package = self.waiting.remove(place);
                self.take(&package, payload).map(|()| Vec::new())
            }
            None if is_list => self.read(payload),
            None => return Vec::new(),
        };
        match done {
            // What is still awaited goes on.
            Err(error) => vec![Wish::Wrong(format!("{topic}: {error}"))],
            Ok(_) if self.waiting.is_empty() => {
                let runs = std::mem::replace(&mut self.runs, true);
                if self.installed { vec![Wish::Reset { runs }] } else { Vec::new() }
            }
            Ok(wishes) => wishes,
        }
    }

    /// Whether it awaits packages.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether it has everything that `list` has for it: of each package the version, of each file the bytes. Empty files
    /// cannot be sent to it.
    #[must_use]
    pub fn has(&self, list: &UpdateList) -> bool {
        let packages = self.packages();
        list.entries().iter().all(|entry| match entry {
            Entry::Src(src) => src.digest == Digest::EMPTY || self.digest(&src.path) == Some(src.digest),
            Entry::Wheel(wheel) => {
                let alike = list.entries().iter().filter_map(|entry| match entry {
                    Entry::Wheel(other) if other.name == wheel.name => Some(other),
                    _ => None,
                });
                let is_there = |package: &Package| {
                    package.name == wheel.name && alike.clone().any(|other| other.version == package.version)
                };
                packages.iter().any(is_there)
                    || self.runtime.choose(alike.clone().map(|wheel| wheel.tag.as_deref())).is_none()
            }
            _ => true,
        })
    }

    /// A file that its package's RECORD says is another.
    #[must_use]
    pub fn wrong(&self) -> Option<String> {
        let packages = self.packages();
        let mut lines = packages.iter().flat_map(|package| &package.record);
        let wrong = lines.find(|line| {
            let path = FilePath::new(format!("{ROOT}/{}", line.path)).ok();
            line.digest.is_some() && path.and_then(|path| self.digest(&path)) != line.digest
        });
        wrong.map(|line| format!("`{ROOT}/{}` is not what its package's RECORD says", line.path))
    }

    fn digest(&self, path: &FilePath) -> Option<Digest> {
        flash::digest(&self.flash, path.as_str()).ok().flatten()
    }

    /// A list: what is to be fetched.
    fn read(&mut self, payload: &[u8]) -> io::Result<Vec<Wish>> {
        let list = UpdateList::parse(payload).map_err(other)?;
        self.waiting.clear();
        let mut waiting = Vec::new();
        for entry in list.entries() {
            match entry {
                Entry::Wheel(wheel) => {
                    let package = self.package(&wheel.name);
                    // Of nothing there is no version: the whole list is given up.
                    let package = package.ok_or_else(|| other(format!("`{}` is not there", wheel.name)))?;
                    if package.version != wheel.version {
                        waiting.push(PackageId::Wheel(wheel.digest));
                    }
                }
                Entry::Src(src) if self.digest(&src.path) != Some(src.digest) => {
                    waiting.push(PackageId::Src(src.path.clone(), src.digest));
                }
                _ => {}
            }
        }
        self.waiting = waiting;
        Ok(self.waiting.iter().map(|package| Wish::Subscribe(package.topic())).collect())
    }

    fn take(&mut self, package: &PackageId, payload: &[u8]) -> io::Result<()> {
        match package {
            PackageId::Src(path, _) => write(&mut self.flash, path.as_str(), payload)?,
            _ => self.install(payload)?,
        }
        self.installed = true;
        Ok(())
    }

    /// By RECORD, file by file, over what is there.
    fn install(&mut self, wheel: &[u8]) -> io::Result<()> {
        let mut archive = ZipArchive::new(io::Cursor::new(wheel)).map_err(other)?;
        let end = ".dist-info/RECORD";
        let mut names = archive.file_names().filter_map(Result::ok);
        let record = names.find(|name| name.ends_with(end)).map(|name| name.into_owned());
        drop(names);
        let record = record.ok_or_else(|| other("it has no dist-info"))?;
        let folder = record.trim_end_matches("/RECORD").to_owned();
        let texts =
            ["METADATA", "WHEEL", "RECORD"].map(|name| member(&mut archive, &format!("{folder}/{name}")));
        let [metadata, headers, record] = texts;
        let new = Package::read(&folder, [&text(metadata?)?, &text(headers?)?, &text(record?)?])?;
        let old = self.package(&new.name);
        if old.as_ref().is_some_and(|old| old.tag != new.tag) {
            return Err(other("it has another tag than what is there"));
        }
        for line in &new.record {
            let before = old.iter().flat_map(|old| &old.record).find(|before| before.path == line.path);
            if before.is_some_and(|before| before.digest.is_some() && before.digest == line.digest) {
                continue;
            }
            let bytes = member(&mut archive, line.path.as_str())?;
            if line.digest.is_some_and(|digest| digest != Digest::of(&bytes)) {
                return Err(other(format!("`{}` is not what RECORD says", line.path)));
            }
            let path = format!("{ROOT}/{}", line.path);
            make_folders(&mut self.flash, flash::parent(&path))?;
            write(&mut self.flash, &path, &bytes)?;
        }
        let Some(old) = old else { return Ok(()) };
        for line in old.record.iter().filter(|line| new.record.iter().all(|new| new.path != line.path)) {
            let path = format!("{ROOT}/{}", line.path);
            self.flash.remove(&path)?;
            self.flash.sync(flash::parent(&path))?;
        }
        if old.version != new.version {
            self.flash.remove_folder(&format!("{ROOT}/{}", old.folder))?;
            self.flash.sync(ROOT)?;
        }
        Ok(())
    }

    /// All packages, up to the first dist-info folder that cannot be read.
    fn packages(&self) -> Vec<Package> {
        let folders = self.flash.list(ROOT).unwrap_or_default();
        let folders = folders.into_iter().filter(|name| name.ends_with(".dist-info"));
        folders.map_while(|folder| self.dist_info(&folder).ok()).collect()
    }

    fn package(&self, name: &str) -> Option<Package> {
        self.packages().into_iter().find(|package| package.name == name)
    }

    fn dist_info(&self, folder: &str) -> io::Result<Package> {
        let read = |name: &str| text(read(&self.flash, &format!("{ROOT}/{folder}/{name}"))?);
        Package::read(folder, [&read("METADATA")?, &read("WHEEL")?, &read("RECORD")?])
    }
}

impl Package {
    fn read(folder: &str, [metadata, wheel, record]: [&str; 3]) -> io::Result<Package> {
        let value = |text: &str, key: &str| {
            let headers = parse_headers(text).map_err(other)?;
            let found = headers.into_iter().rev().find(|(found, _)| found == key);
            found.map(|(_, value)| value).ok_or_else(|| other(format!("it has no `{key}`")))
        };
        Ok(Package {
            name: value(metadata, "Name")?,
            version: value(metadata, "Version")?,
            tag: value(wheel, "Tag")?,
            record: parse_record(record).map_err(other)?,
            folder: folder.to_owned(),
        })
    }
}

fn member(archive: &mut ZipArchive<io::Cursor<&[u8]>>, name: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let member = archive.by_name(name).map_err(other)?;
    io::copy(&mut io::Read::take(member, limits::WHEEL_UNPACKED), &mut bytes)?;
    Ok(bytes)
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(other)
}

fn read(flash: &impl Flash, path: &str) -> io::Result<Vec<u8>> {
    let Some(Kind::File(size)) = flash.kind(path)? else { return Err(io::ErrorKind::NotFound.into()) };
    let mut bytes = vec![0; usize::try_from(size.min(limits::WHEEL_TEXT)).unwrap_or_default()];
    let mut at = 0;
    while at < bytes.len() {
        match flash.read(path, at as u64, &mut bytes[at..])? {
            0 => break,
            count => at += count,
        }
    }
    bytes.truncate(at);
    Ok(bytes)
}

/// In place: folders are not made, and a power cut would leave half of it.
fn write(flash: &mut impl Flash, path: &str, bytes: &[u8]) -> io::Result<()> {
    flash.create(path)?;
    flash.append(path, bytes)?;
    flash.sync(path)?;
    flash.sync(flash::parent(path))
}

fn make_folders(flash: &mut impl Flash, path: &str) -> io::Result<()> {
    if path.is_empty() || flash.kind(path)? == Some(Kind::Folder) {
        return Ok(());
    }
    make_folders(flash, flash::parent(path))?;
    flash.make_folder(path)?;
    flash.sync(flash::parent(path))
}

fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::other(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flash::Memory,
        testing::{channel, files, node, release},
    };

    fn device() -> Blox<Memory> {
        let hardware = Hardware { sysname: "esp32".into(), ..Hardware::default() };
        Blox::off(Memory::new(1 << 20), &node(), channel(), &hardware).unwrap()
    }

    /// Gives it a list and what it asks for; whether it starts again.
    fn give(device: &mut Blox<Memory>, release: &crate::testing::Release) -> bool {
        let mut wishes = device.message(&channel().topic(), &release.list);
        while let Some(wish) = wishes.pop() {
            match wish {
                Wish::Subscribe(topic) => {
                    if let Some(package) = release.packages.get(&topic) {
                        wishes.extend(device.message(&topic, package));
                    }
                }
                Wish::Reset { .. } => return true,
                Wish::Introduce(_) | Wish::Wrong(_) => {}
            }
        }
        false
    }

    #[test]
    fn it_introduces_itself_as_what_it_is_and_follows_its_channel() {
        let mut device = device();
        let wishes = device.start();
        let Wish::Introduce(info) = &wishes[0] else { panic!("{wishes:?}") };
        let info = Info::parse(info).unwrap();
        assert!(info.is_mpyblox() && info.versions["mpy-blox"] == "0.6.0", "{info:?}");
        assert_eq!(wishes[1..], [node().topic(NodeSubject::Cmd), channel().topic()].map(Wish::Subscribe));
    }

    #[test]
    fn files_are_written_in_place_and_it_starts_again_until_there_is_nothing_to_do() {
        let mut device = device();
        device.start();
        let release = release(1, &[("main.py", b"one")], &[]);
        assert!(!device.has(&UpdateList::parse(&release.list).unwrap()));
        assert!(give(&mut device, &release));
        device.start();
        assert!(!give(&mut device, &release), "it starts again for ever");
        assert!(device.has(&UpdateList::parse(&release.list).unwrap()) && device.wrong().is_none());
        assert_eq!(files(&device.flash)["main.py"], b"one");
    }

    #[test]
    fn a_wheel_that_it_does_not_have_has_it_give_up_the_whole_list() {
        let mut device = device();
        device.start();
        let release = release(1, &[("main.py", b"one")], &[("blink", "1.0", &[("blink.py", b"1")])]);
        let wishes = device.message(&channel().topic(), &release.list);
        assert!(
            matches!(&wishes[..], [Wish::Wrong(text)] if text.contains("`blink` is not there")),
            "{wishes:?}"
        );
        assert!(!device.is_busy());
    }

    #[test]
    fn a_wheel_comes_under_anothers_name_and_is_upgraded_by_its_version() {
        let mut device = device();
        device.start();
        let members: [(&str, &[u8]); 3] = [("blink/a.py", b"a"), ("blink/b.py", b"b"), ("gone.py", b"")];
        let first = release(1, &[], &[("blink", "1.0", &members)]);
        let list = String::from_utf8(first.list.to_vec()).unwrap();
        // As our broker delivers it.
        let errand = list.replace(r#""name":"blink","version":"1.0""#, r#""name":"mpy-blox","version":"0""#);
        let errand = crate::testing::Release { list: errand.into(), ..first.clone() };
        assert!(give(&mut device, &errand));
        device.start();
        assert!(!give(&mut device, &first) && device.has(&UpdateList::parse(&first.list).unwrap()));
        let members: [(&str, &[u8]); 2] = [("blink/a.py", b"a"), ("blink/b.py", b"other")];
        let second = release(2, &[], &[("blink", "2.0", &members)]);
        assert!(!device.has(&UpdateList::parse(&second.list).unwrap()));
        assert!(give(&mut device, &second));
        assert!(device.has(&UpdateList::parse(&second.list).unwrap()) && device.wrong().is_none());
        let mut found = files(&device.flash);
        found.retain(|path, _| !path.contains("mpy_blox"));
        assert_eq!(found, second.files);
        device.flash.create("lib/blink/b.py").unwrap();
        assert!(device.wrong().unwrap().contains("`lib/blink/b.py` is not what"));
    }

    #[test]
    fn what_it_cannot_write_it_waits_for_until_it_starts_again() {
        let mut device = device();
        device.start();
        let release = release(1, &[("no/such/folder.py", b"x")], &[]);
        assert!(!give(&mut device, &release));
        assert!(!device.has(&UpdateList::parse(&release.list).unwrap()));
    }
}
