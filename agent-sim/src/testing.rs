//! What the tests share: releases, wheels, and a broker that is a map.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{Cursor, Write},
    time::Duration,
};

use bytes::Bytes;
use mpypi_protocol::{
    ChannelName, Chunks, Digest, Entry, FilePath, NodeId, PackageId, Topic, UpdateList,
    chunk::CHUNKS,
    node::Phase,
    topic::NodeSubject,
    wheel::{RecordLine, dist_info, write_record},
};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use crate::{
    device::{Device, FaceOptions, Hardware, Output, Traits},
    face::desk::{Ask, Reply},
    flash::{Flash, Memory},
    limits,
    store::BootError,
    update::{Event, Report, Source, Timing},
};

pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// A release as it is published, and what a device has when it is applied.
#[derive(Debug, Clone)]
pub(crate) struct Release {
    pub(crate) list: Bytes,
    pub(crate) packages: BTreeMap<String, Bytes>,
    pub(crate) files: Files,
}

pub(crate) type FakeWheel<'a> = (&'a str, &'a str, &'a [(&'a str, &'a [u8])]);

pub(crate) fn channel() -> ChannelName {
    ChannelName::new("dev").unwrap()
}

pub(crate) fn node() -> NodeId {
    NodeId::new("n").unwrap()
}

pub(crate) fn release(sequence: u64, sources: &[(&str, &[u8])], wheels: &[FakeWheel<'_>]) -> Release {
    let head =
        format!(r#"{{"type":"release","channel":"dev","sequence":{sequence},"version":"{sequence}.0"}}"#);
    list_of(Some(head), sources, wheels)
}

pub(crate) fn list_of(head: Option<String>, sources: &[(&str, &[u8])], wheels: &[FakeWheel<'_>]) -> Release {
    let mut entries: Vec<String> = head.into_iter().collect();
    let mut packages = BTreeMap::new();
    let mut files = Files::new();
    for (name, version, members) in wheels {
        let (bytes, unpacked) = wheel(name, version, members);
        let digest = Digest::of(&bytes);
        entries.push(format!(
            r#"{{"type":"wheel","name":"{name}","version":"{version}","pkg_sha256":"{digest}","size":{}}}"#,
            bytes.len()
        ));
        packages.insert(PackageId::Wheel(digest).topic(), bytes.into());
        files.extend(unpacked);
    }
    for (path, bytes) in sources {
        let digest = Digest::of(bytes);
        entries.push(format!(
            r#"{{"type":"src","path":"{path}","pkg_sha256":"{digest}","size":{}}}"#,
            bytes.len()
        ));
        if !bytes.is_empty() {
            let id = PackageId::Src(FilePath::new(*path).unwrap(), digest);
            packages.insert(id.topic(), Bytes::copy_from_slice(bytes));
        }
        files.insert((*path).to_owned(), bytes.to_vec());
    }
    Release { list: format!("[{}]", entries.join(",")).into(), packages, files }
}

impl Release {
    /// The same, with each package of more than `size` bytes in chunks of so many.
    pub(crate) fn in_chunks(self, size: u64) -> Release {
        let list = UpdateList::parse(&self.list).unwrap();
        let mut packages = self.packages;
        let cut = |entry: &Entry| {
            let mut entry = entry.clone();
            let Some((id, _)) = entry.package() else { return entry };
            let Some(bytes) = packages.get(&id.topic()).filter(|bytes| bytes.len() as u64 > size).cloned()
            else {
                return entry;
            };
            packages.remove(&id.topic());
            let chunks = Chunks::cut(&bytes, size).unwrap();
            for (piece, chunk) in chunks.pieces(id.digest()).zip(chunks.iter()) {
                packages.insert(piece.topic, Bytes::copy_from_slice(chunk.of(&bytes).unwrap()));
            }
            entry.set_chunks(Some(chunks));
            entry
        };
        let entries = list.entries().iter().map(cut).collect();
        Release { list: UpdateList::new(entries).unwrap().to_bytes().into(), packages, files: self.files }
    }

    /// The topics of its chunks, in their order.
    pub(crate) fn chunks(&self) -> Vec<String> {
        let list = UpdateList::parse(&self.list).unwrap();
        list.pieces().map(|piece| piece.topic).filter(|topic| topic.starts_with(CHUNKS)).collect()
    }
}

/// A wheel, and what it becomes on a device.
pub(crate) fn wheel(name: &str, version: &str, members: &[(&str, &[u8])]) -> (Vec<u8>, Files) {
    let info = dist_info(name, version);
    let metadata = format!("Name: {name}\nVersion: {version}\n");
    let mut all: Vec<(String, Vec<u8>)> =
        members.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
    all.push((format!("{info}/METADATA"), metadata.into_bytes()));
    all.push((format!("{info}/WHEEL"), b"Wheel-Version: 1.0\nTag: py3-none-any\n".to_vec()));
    let path = |path: &str| FilePath::new(path).unwrap();
    let mut lines: Vec<_> = all
        .iter()
        .map(|(name, bytes)| RecordLine {
            path: path(name),
            digest: Some(Digest::of(bytes)),
            size: Some(bytes.len() as u64),
        })
        .collect();
    let record = format!("{info}/RECORD");
    lines.push(RecordLine { path: path(&record), digest: None, size: None });
    all.push((record, write_record(&lines).into_bytes()));
    let members: Vec<_> = all.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let archive = zip(&members);
    (archive, all.into_iter().map(|(name, bytes)| (format!("lib/{name}"), bytes)).collect())
}

pub(crate) fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
        archive.start_file(*name, options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// What is on the device beside the agent's own folder.
pub(crate) fn files(flash: &Memory) -> Files {
    let ours = |path: &str| path.starts_with(".mpypi/");
    flash
        .files()
        .filter(|(path, _)| !ours(path))
        .map(|(path, bytes)| (path.to_owned(), bytes.to_vec()))
        .collect()
}

/// A device beside a broker that is a map.
pub(crate) struct Bench<F> {
    pub(crate) device: Device<F>,
    pub(crate) now: Duration,
    pub(crate) retained: BTreeMap<String, Bytes>,
    pub(crate) reports: Vec<Report>,
    pub(crate) logs: Vec<String>,
    /// Filters subscribed to in one packet, and still subscribed to.
    pub(crate) open: Vec<String>,
    /// All that was ever subscribed to, in this order.
    pub(crate) asked: Vec<String>,
    coming: VecDeque<(String, Bytes)>,
}

impl<F: Flash> Bench<F> {
    pub(crate) fn start(flash: F) -> Result<Bench<F>, BootError> {
        Bench::start_with(flash, Timing::default())
    }

    pub(crate) fn start_on(flash: F, hardware: Hardware) -> Result<Bench<F>, BootError> {
        Bench::start_device(Device::off(flash, &node(), channel(), hardware, Timing::default(), 1))
    }

    pub(crate) fn start_with(flash: F, timing: Timing) -> Result<Bench<F>, BootError> {
        let device = Device::off(flash, &node(), channel(), Hardware::default(), timing, 1);
        Bench::start_device(device)
    }

    /// A device at which packages can be chosen.
    pub(crate) fn start_with_face(
        flash: F,
        options: FaceOptions,
        timing: Timing,
    ) -> Result<Bench<F>, BootError> {
        let after = timing.confirm_after;
        let device = Device::off(flash, &node(), channel(), Hardware::default(), timing, 1);
        let wall = "2026-11-28T09:00:00Z".parse().unwrap();
        Bench::start_device(device.with_face(options, after, (Duration::from_secs(1), wall)))
    }

    fn start_device(mut device: Device<F>) -> Result<Bench<F>, BootError> {
        let now = Duration::from_secs(1);
        let outputs = device.start(now)?;
        let mut bench = Bench {
            device,
            now,
            retained: BTreeMap::new(),
            reports: Vec::new(),
            logs: Vec::new(),
            open: Vec::new(),
            asked: Vec::new(),
            coming: VecDeque::new(),
        };
        bench.take(outputs);
        Ok(bench)
    }

    pub(crate) fn with_traits(self, traits: Traits) -> Bench<F> {
        Bench { device: self.device.with_traits(traits), ..self }
    }

    /// Retains a release's packages and list; who is subscribed gets the list.
    pub(crate) fn publish(&mut self, release: &Release) {
        self.retained.extend(release.packages.clone());
        self.publish_list(release.list.clone());
    }

    pub(crate) fn publish_list(&mut self, list: Bytes) {
        let topic = channel().topic();
        self.retained.insert(topic.clone(), list.clone());
        if self.open.contains(&topic) {
            self.coming.push_back((topic, list));
        }
    }

    pub(crate) fn command(&mut self, list: &str) {
        let payload = Bytes::copy_from_slice(list.as_bytes());
        self.coming.push_back((node().topic(NodeSubject::Cmd), payload));
    }

    pub(crate) fn give(&mut self, event: Event) -> Result<(), BootError> {
        let outputs = self.device.handle(self.now, event)?;
        self.take(outputs);
        Ok(())
    }

    /// Asks the device; `None` if it lost power over it.
    pub(crate) fn ask<T>(&mut self, question: impl FnOnce(Reply<T>) -> Ask) -> Result<Option<T>, BootError> {
        let (reply, mut answer) = tokio::sync::oneshot::channel();
        let outputs = self.device.answer(self.now, question(reply))?;
        self.take(outputs);
        Ok(answer.try_recv().ok())
    }

    /// Delivers the next message that is on its way, if any.
    pub(crate) fn deliver(&mut self) -> Result<bool, BootError> {
        let Some((topic, payload)) = self.coming.pop_front() else { return Ok(false) };
        let list = |source, payload| Event::List { source, payload, wall: None };
        match Topic::parse(&topic).unwrap() {
            Topic::Package(_) | Topic::Chunk(..) => self.give(Event::Package { topic, payload })?,
            Topic::Channel(_) => self.give(list(Source::Channel, payload))?,
            _ if channel().history_sequence(&topic).is_some() => {
                let sequence = channel().history_sequence(&topic).unwrap_or_default();
                self.give(list(Source::History(sequence), payload))?;
            }
            _ => self.give(list(Source::Cmd, payload))?,
        }
        Ok(true)
    }

    /// Lets the next deadline pass, if there is one.
    pub(crate) fn wait(&mut self) -> Result<bool, BootError> {
        // Asking for the list once an hour goes on for ever.
        let soon = |deadline: &Duration| *deadline < self.now + limits::CHECK / 2;
        let Some(deadline) = self.device.deadline().filter(soon) else { return Ok(false) };
        self.now = self.now.max(deadline);
        self.give(Event::Tick)?;
        Ok(true)
    }

    /// Goes on until nothing happens any more.
    pub(crate) fn settle(&mut self) -> Result<(), BootError> {
        for _ in 0..100_000 {
            if !self.deliver()? && !self.wait()? {
                return Ok(());
            }
        }
        panic!("it never settles: {:?}", self.device.report());
    }

    /// Connects, and goes on until nothing happens any more.
    pub(crate) fn run(&mut self) -> Result<(), BootError> {
        self.give(Event::Connected)?;
        self.settle()
    }

    pub(crate) fn phases(&self) -> Vec<Phase> {
        let mut phases: Vec<_> = self.reports.iter().map(|report| report.state.phase).collect();
        phases.dedup();
        phases
    }

    pub(crate) fn error(&self) -> Option<&str> {
        self.device.report().state.error.as_deref()
    }

    pub(crate) fn phase(&self) -> Phase {
        self.device.report().state.phase
    }

    fn take(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Subscribe(filters) => {
                    assert!(filters.len() <= mpypi_protocol::limits::SUBSCRIBE_FILTERS);
                    for filter in filters {
                        self.asked.push(filter.clone());
                        if let Some(payload) = self.retained.get(&filter) {
                            self.coming.push_back((filter.clone(), payload.clone()));
                        }
                        if !self.open.contains(&filter) {
                            self.open.push(filter);
                        }
                    }
                }
                Output::Unsubscribe(filters) => self.open.retain(|filter| !filters.contains(filter)),
                Output::Report(report) => self.reports.push(report),
                Output::Log(line) => self.logs.push(line),
                Output::Introduce(_) | Output::Retain(..) | Output::Refused(_) => {}
            }
        }
    }
}
