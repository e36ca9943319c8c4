//! What a Mpy-BLOX node is served of a list. Policy only: no index, no clock, no connection.

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;
use mpypi_protocol::{
    Digest, Entry, FilePath, PackageId, UpdateList,
    list::{Src, Wheel},
    node::{Phase, State},
    wheel::ROOT,
};
use serde_json::{Map, Value};

use super::{history::History, survey::Survey, wheel::Facts};

/// How often one delivery to a node is tried.
pub const ATTEMPTS: u8 = 3;
/// How many reasons a node's state names.
const REASONS: usize = 5;
/// Packages of a node, from its info, that are looked at.
pub const PACKAGES: usize = 256;

/// What a node says it is and has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// `os.uname().sysname`
    pub sysname: String,
    /// Its packages and their versions.
    pub versions: BTreeMap<String, String>,
    /// What it had before and no longer has in that version, if packages are gone that nothing uninstalls.
    pub lost: BTreeMap<String, String>,
}

/// What to do with a list.
#[derive(Debug, PartialEq)]
pub struct Plan {
    /// What the channel holds for the node.
    pub serve: Serve,
    /// What is sent once on the channel, after that.
    pub errand: Option<Errand>,
    /// How the node stands.
    pub verdict: Verdict,
}

/// What of a list is served.
#[derive(Debug, PartialEq)]
pub enum Serve {
    /// The list as it was published, byte for byte.
    AsItIs,
    /// This list, made from it.
    Adapted(Bytes),
}

/// A list that is sent once, never retained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errand {
    /// The list.
    pub list: Bytes,
    /// What it is about, to count attempts.
    pub key: Digest,
    /// Files in it that no topic has, by their topics.
    pub files: Vec<(String, Bytes)>,
    /// For people.
    pub text: String,
}

/// How a node stands with a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is served what was published, or all of it that is for it.
    Served,
    /// Something is delivered first.
    Delivering(String),
    /// Entries were left out that would do harm; the rest is served.
    LeftOut(Vec<String>),
    /// It keeps what it has, because of these entries.
    HeldBack(Vec<String>),
    /// It keeps what it has, because it installed the release again and again.
    Looping(usize),
    /// It keeps what it has, because it took packages and never came back.
    Stuck,
}

/// What the index knows of the packages a node has, or had: name to facts.
pub type Known = BTreeMap<String, Arc<Facts>>;

/// Plans what `device` is served of a list. `known` has the wheels that the device's packages came from, where they are
/// in the index; `lost` those of [`Device::lost`].
#[must_use]
pub fn plan(survey: &Survey, device: &Device, history: &History, known: &Known, lost: &Known) -> Plan {
    let stay = |verdict| Plan { serve: Serve::present(survey, device), errand: None, verdict };
    if history.looping == Some(survey.digest) {
        return stay(Verdict::Looping(history.installs.len()));
    }
    if history.stuck == Some(survey.digest) {
        return stay(Verdict::Stuck);
    }
    let deliver = |errand: Errand| {
        let verdict = Verdict::Delivering(errand.text.clone());
        Plan { serve: Serve::present(survey, device), errand: Some(errand), verdict }
    };
    // A device that no longer finds its packages is put right before anything else.
    for facts in lost.values().filter(|facts| facts.may_wedge()) {
        let errand = repair(facts);
        if history.attempts(&errand.key) < 1 {
            return deliver(errand);
        }
    }
    let mut choice = Choice::default();
    for candidates in survey.packages() {
        choice.package(survey, device, known, &candidates);
    }
    if !choice.held.is_empty() {
        return stay(Verdict::HeldBack(choice.held));
    }
    if let Some(errand) = choice.errand {
        return match history.attempts(&errand.key) {
            tried if tried < ATTEMPTS => deliver(errand),
            _ => {
                let why = match history.took {
                    true => "it took that, and nothing came of it",
                    false => "it never took that: it may be set not to update by itself",
                };
                stay(Verdict::HeldBack(vec![format!("{}: {why}", errand.text)]))
            }
        };
    }
    let mut left_out = Vec::new();
    for (at, entry) in survey.list.entries().iter().enumerate() {
        if let Entry::Src(src) = entry
            && src.digest == Digest::EMPTY
        {
            left_out.push(format!("`{}` is empty, and an empty file cannot be sent", src.path));
            choice.skip.push(at);
        }
    }
    let serve = match choice.skip.is_empty() {
        true => Serve::AsItIs,
        false => Serve::only(survey, |at, _| !choice.skip.contains(&at)),
    };
    let verdict = if left_out.is_empty() { Verdict::Served } else { Verdict::LeftOut(left_out) };
    Plan { serve, errand: None, verdict }
}

/// What becomes of the wheels of a list.
#[derive(Default)]
struct Choice {
    /// Entries that are not for this node.
    skip: Vec<usize>,
    /// Why the release cannot be applied.
    held: Vec<String>,
    /// What has to be delivered first.
    errand: Option<Errand>,
}

impl Choice {
    fn package(&mut self, survey: &Survey, device: &Device, known: &Known, candidates: &[(usize, &Wheel)]) {
        let installed = candidates.iter().find_map(|(_, wheel)| device.versions.get(&wheel.name));
        let before = candidates.iter().find_map(|(_, wheel)| known.get(&wheel.name));
        let facts = |wheel: &Wheel| survey.wheel(&wheel.digest).and_then(|look| look.as_ref().ok());
        // Of several, the one that is made like what it has, or for its platform.
        let suits = |wheel: &Wheel| match (facts(wheel), before) {
            (Some(facts), Some(before)) => facts.tag == before.tag,
            (Some(facts), None) => facts.fits(&device.sysname),
            (None, _) => true,
        };
        let chosen = candidates
            .iter()
            .find(|(_, wheel)| installed == Some(&wheel.version) && (candidates.len() == 1 || suits(wheel)))
            .or_else(|| candidates.iter().find(|(_, wheel)| suits(wheel)));
        let chosen_at = chosen.map(|(at, _)| *at);
        self.skip.extend(candidates.iter().map(|(at, _)| *at).filter(|at| Some(*at) != chosen_at));
        let Some((_, wheel)) = chosen else {
            if let (Some(before), Some((_, wheel))) = (before, candidates.first()) {
                let tag = facts(wheel).map_or("?", |facts| &facts.tag);
                self.held.push(format!(
                    "wheel `{}` {} has the tag `{tag}`, and the node has `{}` installed",
                    wheel.name, wheel.version, before.tag
                ));
            }
            return; // made for other devices
        };
        if installed == Some(&wheel.version) {
            return;
        }
        let mut hold = |why: &dyn fmt::Display| {
            self.held.push(format!("wheel `{}` {}: {why}", wheel.name, wheel.version));
        };
        let new = match survey.wheel(&wheel.digest) {
            Some(Ok(facts)) => facts,
            Some(Err(why)) => return hold(why),
            None => return hold(&"it was not looked at"),
        };
        if new.name != wheel.name {
            return hold(&format!("its METADATA says `Name: {}`", new.name));
        }
        if new.version != wheel.version {
            return hold(&format!("its METADATA says `Version: {}`: it would install for ever", new.version));
        }
        match (installed, before) {
            (Some(_), Some(before)) if before.wedges(new) => {
                self.errand.get_or_insert_with(|| set_aside(before));
            }
            (Some(_), _) => {}
            (None, _) => match device.versions.iter().next() {
                Some((name, version)) => {
                    self.errand.get_or_insert_with(|| first_install(wheel, name, version));
                }
                None => hold(&"the node has no package at all under whose name it could be delivered"),
            },
        }
    }
}

impl Serve {
    /// Only what the device has: it finds nothing to do.
    fn present(survey: &Survey, device: &Device) -> Serve {
        Serve::only(survey, |_, entry| match entry {
            Entry::Wheel(wheel) => device.versions.get(&wheel.name) == Some(&wheel.version),
            Entry::Src(_) => false,
            _ => true,
        })
    }

    /// The entries that `keep` wants. A signature would no longer be true.
    fn only(survey: &Survey, keep: impl Fn(usize, &Entry) -> bool) -> Serve {
        let entries = survey.list.entries().iter().enumerate();
        let entries = entries.filter(|(at, entry)| !matches!(entry, Entry::Signature(_)) && keep(*at, entry));
        Serve::Adapted(payload(entries.map(|(_, entry)| entry.clone()).collect()))
    }
}

fn payload(entries: Vec<Entry>) -> Bytes {
    // Part of a list is a list.
    UpdateList::new(entries).map_or_else(|_| Bytes::from_static(b"[]"), |list| list.to_bytes().into())
}

/// Has a wheel installed that the device does not have: as another version of a package that it has. The device takes
/// the package's name and version from the wheel itself.
fn first_install(wheel: &Wheel, carrier: &str, version: &str) -> Errand {
    let other = if version == "0" { "1" } else { "0" };
    let entry = Entry::Wheel(Wheel {
        name: carrier.to_owned(),
        version: other.to_owned(),
        digest: wheel.digest,
        size: wheel.size,
        tag: None,
        extra: Map::new(),
    });
    Errand {
        list: payload(vec![entry]),
        key: wheel.digest,
        files: Vec::new(),
        text: format!("wheel `{}` {}, which the node does not have", wheel.name, wheel.version),
    }
}

/// Gives a package that cannot be upgraded another name, so that the next version is a first install.
///
/// An upgrade ends with the removal of the old dist-info folder, which fails if there is a folder in it. What is left
/// then has no METADATA, and the device finds none of the packages behind it any more.
fn set_aside(old: &Facts) -> Errand {
    files(old, &[("METADATA", metadata(old))], format!("a new name for `{}` {}", old.name, old.version))
}

/// Makes a package of a dist-info folder that an upgrade could not remove, so that the device reads on behind it.
fn repair(old: &Facts) -> Errand {
    let wheel = format!("Wheel-Version: 1.0\nTag: {}\n", old.tag);
    let record = ["METADATA", "WHEEL", "RECORD"].map(|name| format!("{}/{name},,\n", old.folder)).concat();
    let texts = [("METADATA", metadata(old)), ("WHEEL", wheel), ("RECORD", record)];
    files(old, &texts, format!("a repair of what is left of `{}` {}", old.name, old.version))
}

fn metadata(old: &Facts) -> String {
    format!("Metadata-Version: 2.1\nName: {}.replaced-{}\nVersion: {}\n", old.name, old.version, old.version)
}

fn files(old: &Facts, texts: &[(&str, String)], text: String) -> Errand {
    let mut entries = Vec::new();
    let mut files = Vec::new();
    for (name, content) in texts {
        let Ok(path) = FilePath::new(format!("{ROOT}/{}/{name}", old.folder)).and_then(FilePath::for_topic) else {
            continue;
        };
        let digest = Digest::of(content.as_bytes());
        files.push((PackageId::Src(path.clone(), digest).topic(), Bytes::from(content.clone())));
        let size = Some(content.len() as u64);
        entries.push(Entry::Src(Src { path, digest, size, extra: Map::new() }));
    }
    let list = payload(entries);
    Errand { key: Digest::of(&list), list, files, text }
}

impl Verdict {
    /// One word, for counting.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Verdict::Served => "served",
            Verdict::Delivering(_) => "delivering",
            Verdict::LeftOut(_) => "left-out",
            Verdict::HeldBack(_) => "held-back",
            Verdict::Looping(_) => "looping",
            Verdict::Stuck => "stuck",
        }
    }

    /// What there is to say; nothing of a node that is served.
    #[must_use]
    pub fn text(&self) -> Option<String> {
        let word = self.word();
        Some(match self {
            Verdict::Served => return None,
            Verdict::Delivering(what) => format!("{word}: {what}"),
            Verdict::LeftOut(reasons) | Verdict::HeldBack(reasons) => {
                let more = reasons.len().saturating_sub(REASONS);
                let shown = reasons.iter().take(REASONS).cloned().collect::<Vec<_>>().join("; ");
                match more {
                    0 => format!("{word}: {shown}"),
                    _ => format!("{word}: {shown}; and {more} more"),
                }
            }
            Verdict::Looping(times) => {
                format!("{word}: installed {times} times within an hour; it keeps what it has until the next release, or a `check`")
            }
            Verdict::Stuck => {
                format!("{word}: it took packages and did not start again; it keeps what it has until the next release, or a `check`")
            }
        })
    }

    /// The node's state, as a node of ours would tell it.
    #[must_use]
    pub fn state(&self, list: &UpdateList, channel: &str) -> State {
        let (phase, error) = match self {
            // What it has of the files, nobody but the node knows.
            Verdict::Served => (Phase::Idle, None),
            Verdict::LeftOut(_) => (Phase::Idle, self.text()),
            Verdict::Delivering(_) => (Phase::Downloading, None),
            Verdict::HeldBack(_) | Verdict::Looping(_) | Verdict::Stuck => (Phase::Failed, self.text()),
        };
        let mut extra = Map::new();
        extra.insert(WRITER.to_owned(), Value::from(BROKER));
        extra.insert(CHANNEL.to_owned(), Value::from(channel));
        let release = list.release().filter(|_| *self != Verdict::Served);
        State {
            phase,
            sequence: release.map(|release| release.sequence),
            version: release.map(|release| release.version.clone()),
            done: 0,
            total: 0,
            error,
            attempt: match self {
                Verdict::Looping(times) => u32::try_from(*times).unwrap_or(u32::MAX),
                _ => 0,
            },
            extra,
        }
    }
}

/// A key in a state: who wrote it, if not the node.
pub const WRITER: &str = "by";
/// A key in a state that the broker writes: the channel that the node follows, which it does not say itself.
pub const CHANNEL: &str = "channel";
/// The broker, as a writer.
pub const BROKER: &str = "broker";
