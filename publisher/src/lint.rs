//! What a release would do to devices that run Mpy-BLOX: decided from what they said about themselves, without asking
//! anybody. And to those of ota-promoter, who say nothing.
//!
//! Such a device takes a list at its word. What it cannot do with it makes it wait in its boot for ever, or start again
//! for ever, and nobody reaches it any more. Each [`Rule`] is one way to get there.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

use mpypi_protocol::{
    Digest, Entry, FilePath, NodeId, PackageId, UpdateList,
    list::{Src, Wheel},
    node::Info,
    wheel::{ROOT, normalized_name},
};
use serde::Serialize;

use crate::{
    report::size,
    wheel::{WheelError, repack},
};

/// The largest file that a device with a heap of 512 kB was seen to take, in bytes. How large its heap is, it does not
/// say.
pub const SRC: u64 = 104_000;

/// The largest wheel that it was seen to take, of members of 4 kB, in bytes.
pub const WHEEL: u64 = 96_000;

/// What is known before a release is published.
#[derive(Debug, Clone, Copy)]
pub struct Ground<'a> {
    /// The entries of the release.
    pub entries: &'a [Entry],
    /// What its wheels say inside, as far as anybody looked.
    pub inside: &'a HashMap<Digest, Inside>,
    /// The list that the channel has now.
    pub before: Option<&'a UpdateList>,
    /// The Mpy-BLOX nodes that follow the channel, or may.
    pub nodes: &'a BTreeMap<NodeId, Info>,
    /// Who serves them.
    pub broker: Broker,
    /// Packages that the present list names and the broker does not have.
    pub lost: &'a [PackageId],
}

/// Who serves the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broker {
    /// One that serves them what is published.
    Plain,
    /// One of ours, that serves each a list that it can take.
    Adapting,
}

/// What a wheel says inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    /// `Name` in METADATA.
    pub name: String,
    /// `Version` in METADATA.
    pub version: String,
    /// The folders that it makes, from the device's root.
    pub folders: BTreeSet<String>,
}

impl Inside {
    /// Looks into a wheel.
    ///
    /// # Errors
    /// It is none that a device could install.
    pub fn of(bytes: &[u8]) -> Result<Inside, WheelError> {
        let (contents, _) = repack::contents(bytes)?;
        let folders = contents.files.keys().flat_map(FilePath::parents);
        let folders = folders.map(|folder| format!("{ROOT}/{folder}")).collect();
        let of = |key| contents.metadata(key).unwrap_or_default().to_owned();
        Ok(Inside { name: of("Name"), version: of("Version"), folders })
    }
}

/// One thing that would go wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which rule.
    pub rule: Rule,
    /// How bad it is.
    pub severity: Severity,
    /// The entry, as `wheel blink 1.4.0` or `src main.py`.
    pub entry: String,
    /// The Mpy-BLOX nodes; none where it is about ota-promoter's devices, who tell nobody who they are.
    pub nodes: Vec<NodeId>,
    /// What would happen there, and why.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The nodes would wait or start again for ever, or not get it: nothing is published, unless by force.
    Refusal,
    /// It may go wrong.
    Warning,
    /// It goes well, in another way than elsewhere.
    Note,
}

/// A way to harm a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// A wheel that the node does not have: it drops the whole list.
    NotInstalled,
    /// The same version with other content: the node takes no notice.
    SameVersion,
    /// The list's version is not METADATA's: the node installs it at every start.
    VersionMismatch,
    /// The two are one version, but not one text; the same comes of it.
    VersionSpelling,
    /// The list's name is not METADATA's: the node never finds it installed.
    NameMismatch,
    /// Several wheels of one package: the node takes them all, one over the other.
    SeveralWheels,
    /// Several contents for one path: likewise.
    SeveralContents,
    /// Another tag than what is installed: the node does not install it, and waits.
    TagChanged,
    /// An empty file cannot be retained: the node waits for it.
    EmptyFile,
    /// A file in a folder that the node may not have: it does not make one.
    MissingFolder,
    /// A file where the node has a folder.
    IsFolder,
    /// A `+` or `#` in a path: the broker closes the node's connection, and it makes no new one.
    Wildcard,
    /// A package larger than the node's memory may take.
    Oversize,
    /// A package that lies in chunks, which the node does not know: it waits for the whole.
    InChunks,
    /// A package that the broker lost: the node waits for it.
    MissingPackage,
    /// A file in a new folder in a new folder: ota-promoter's client makes one at a time.
    NestedFolder,
    /// A file that is no text: ota-promoter's client takes every file for text.
    Binary,
}

/// Checks a release against every node. Findings about the same thing are one, in the order of the entries.
#[must_use]
pub fn lint(ground: &Ground<'_>) -> Vec<Finding> {
    let mut findings = Findings::default();
    let before = Before::of(ground.before);
    let mut packages: BTreeMap<String, Vec<&Wheel>> = BTreeMap::new();
    for entry in ground.entries {
        if let Entry::Wheel(wheel) = entry {
            packages.entry(normalized_name(&wheel.name)).or_default().push(wheel);
        }
    }
    for (node, info) in ground.nodes {
        let subject = Subject { ground, before: &before, node, info };
        let folders = subject.folders();
        for (name, wheels) in &packages {
            subject.package(name, wheels, &mut findings);
        }
        let mut contents: HashMap<&str, Digest> = HashMap::new();
        for entry in ground.entries {
            let Entry::Src(src) = entry else { continue };
            subject.src(src, &folders, &mut findings);
            match contents.insert(src.path.as_str(), src.digest) {
                Some(other) if other != src.digest => findings.add(
                    node,
                    Rule::SeveralContents,
                    Severity::Refusal,
                    format!("src {}", src.path),
                    "is in the list twice, with different content: each takes the other's place, at every start",
                    "keep one of them",
                ),
                _ => {}
            }
        }
        for entry in ground.entries.iter().filter(|entry| entry.chunks().is_some()) {
            subject.in_chunks(entry, &mut findings);
        }
        for package in ground.lost {
            findings.add(
                node,
                Rule::MissingPackage,
                Severity::Warning,
                named(ground.entries, package),
                "is not on the broker any more, and the node's boot waits until it is",
                "nothing: it is sent again now",
            );
        }
    }
    findings.finish()
}

/// Warns of what ota-promoter's devices choke on, whose client gives up in the middle of an update and tries again for ever.
/// `binary` are the files that are no UTF-8.
#[must_use]
pub fn for_promoter(
    entries: &[Entry],
    before: Option<&UpdateList>,
    binary: &BTreeSet<Digest>,
) -> Vec<Finding> {
    let before = Before::of(before);
    let finding = |rule, src: &Src, problem: &str, remedy: &str| Finding {
        rule,
        severity: Severity::Warning,
        entry: format!("src {}", src.path),
        nodes: Vec::new(),
        problem: problem.to_owned(),
        remedy: remedy.to_owned(),
    };
    let mut new: BTreeSet<&str> = BTreeSet::new();
    let mut findings = Vec::new();
    for entry in entries {
        let Entry::Src(src) = entry else { continue };
        let folders: Vec<&str> =
            src.path.parents().filter(|folder| !before.folders.contains(folder)).collect();
        // Once for each folder; two that are new are one in the other.
        if folders.len() > 1 && folders.iter().filter(|folder| new.insert(folder)).count() > 0 {
            findings.push(finding(
                Rule::NestedFolder,
                src,
                "is in a new folder inside a new folder, and the client makes one folder at a time",
                "publish a file in the outer folder first",
            ));
        }
        if binary.contains(&src.digest) {
            findings.push(finding(
                Rule::Binary,
                src,
                "is no UTF-8, and the client takes every file for text",
                "encode it, as in Base64, or name it in `.promoterignore`",
            ));
        }
    }
    findings
}

/// One node.
#[derive(Clone, Copy)]
struct Subject<'a> {
    ground: &'a Ground<'a>,
    before: &'a Before<'a>,
    node: &'a NodeId,
    info: &'a Info,
}

impl Subject<'_> {
    /// All wheels of one package; `name` is normalised.
    fn package(&self, name: &str, wheels: &[&Wheel], findings: &mut Findings) {
        let first = wheels[0];
        let installed = self.info.versions.get(&first.name);
        if installed.is_none() {
            self.not_installed(name, first, findings);
        }
        if wheels.len() > 1 && self.ground.broker == Broker::Plain {
            let versions: BTreeSet<&str> = wheels.iter().map(|wheel| wheel.version.as_str()).collect();
            let problem = match versions.len() {
                1 => {
                    "is there for several tags, of which the node takes all: the second has another tag than what \
                      it then has installed, and its boot waits for ever"
                }
                _ => {
                    "is there in several versions, of which the node takes all: each takes the other's place, at \
                      every start"
                }
            };
            let remedy = "give such nodes a channel with one wheel of each package, or a broker of ours, which \
                          picks one";
            findings.add(
                self.node,
                Rule::SeveralWheels,
                Severity::Refusal,
                wheel_name(first, None),
                problem,
                remedy,
            );
        }
        let kept_tag = self.tag_changed(name, wheels, findings);
        for wheel in wheels {
            self.inside(wheel, findings);
            self.same_version(name, wheel, findings);
            if wheel.size.is_some_and(|size| size > WHEEL)
                && kept_tag.is_none_or(|tag| wheel.tag.as_deref() == tag)
            {
                self.oversize(wheel_name(wheel, Some(wheels)), wheel.size, WHEEL, findings);
            }
        }
    }

    fn not_installed(&self, name: &str, wheel: &Wheel, findings: &mut Findings) {
        let entry = wheel_name(wheel, None);
        let mut find = |severity, problem: &str, remedy: &str| {
            findings.add(self.node, Rule::NotInstalled, severity, entry.clone(), problem, remedy);
        };
        let alike = self.info.versions.keys().find(|installed| normalized_name(installed) == name);
        if let Some(alike) = alike {
            let problem = format!(
                "is installed as `{alike}`; the node compares names to the letter, does not find it and drops \
                 the whole list"
            );
            let remedy = format!("name it `{alike}` in its pyproject.toml");
            return find(Severity::Refusal, &problem, &remedy);
        }
        match (self.ground.broker, self.info.versions.is_empty()) {
            (Broker::Plain, _) => find(
                Severity::Refusal,
                "is not installed: the node drops the whole list, and its boot waits for ever",
                "install it first: `mpypi install --node {node} <its project or .whl>`",
            ),
            (Broker::Adapting, true) => find(
                Severity::Warning,
                "is not installed, and the node has no package under whose name the broker could deliver it: it \
                 keeps what it has",
                "install a first package on it by hand, as with `mpremote mip install`",
            ),
            (Broker::Adapting, false) => find(
                Severity::Note,
                "is not installed: the broker delivers it first, then the list",
                "nothing",
            ),
        }
    }

    /// The tag that the node has the package in, if that is known.
    fn tag_changed(&self, name: &str, wheels: &[&Wheel], findings: &mut Findings) -> Option<Option<&str>> {
        let installed = self.info.versions.get(&wheels[0].name)?;
        let mut before = self.before.wheels.get(name)?.iter().filter(|wheel| wheel.version == *installed);
        let (Some(had), None) = (before.next(), before.next()) else { return None };
        let tag = had.tag.as_deref();
        let upgrade = wheels.iter().any(|wheel| wheel.version != *installed);
        if upgrade && tag.is_some() && wheels.iter().all(|wheel| wheel.tag.as_deref() != tag) {
            let problem = match self.ground.broker {
                Broker::Plain => {
                    "has another tag than what is installed: the node does not install it, and its boot waits for ever"
                }
                Broker::Adapting => {
                    "has another tag than what is installed: the broker keeps the node at what it has"
                }
            };
            let remedy = format!(
                "keep the tag `{}`: see `tag` and `targets` in channel.toml",
                tag.unwrap_or_default()
            );
            let entry = wheel_name(wheels[0], Some(wheels));
            findings.add(self.node, Rule::TagChanged, Severity::Refusal, entry, problem, &remedy);
        }
        Some(tag)
    }

    fn same_version(&self, name: &str, wheel: &Wheel, findings: &mut Findings) {
        let same = |had: &&&Wheel| (&had.version, &had.tag) == (&wheel.version, &wheel.tag);
        let had = self.before.wheels.get(name).and_then(|wheels| wheels.iter().find(same));
        let Some(had) = had.filter(|had| had.digest != wheel.digest) else { return };
        if self.info.versions.get(&wheel.name) == Some(&had.version) {
            findings.add(
                self.node,
                Rule::SameVersion,
                Severity::Refusal,
                wheel_name(wheel, None),
                "has changed and kept its version: the node takes no notice, and keeps what it has",
                "raise its version",
            );
        }
    }

    fn inside(&self, wheel: &Wheel, findings: &mut Findings) {
        let Some(inside) = self.ground.inside.get(&wheel.digest) else { return };
        let mut find = |rule, problem: String| {
            let (entry, remedy) = (wheel_name(wheel, None), "pack it again: list and METADATA must agree");
            findings.add(self.node, rule, Severity::Refusal, entry, &problem, remedy);
        };
        let (listed, found) = (&wheel.version, &inside.version);
        if listed != found && normal_version(listed) == normal_version(found) {
            find(
                Rule::VersionSpelling,
                format!(
                    "is `{found}` in METADATA: the same version, but not the same text, so the node installs it at \
                     every start"
                ),
            );
        } else if listed != found {
            find(
                Rule::VersionMismatch,
                format!("is `{found}` in METADATA: the node installs it at every start, for ever"),
            );
        }
        if wheel.name != inside.name {
            find(
                Rule::NameMismatch,
                format!(
                    "is `{}` in METADATA: the node does not find it installed under the list's name",
                    inside.name
                ),
            );
        }
    }

    fn src(&self, src: &Src, folders: &BTreeSet<&str>, findings: &mut Findings) {
        let entry = format!("src {}", src.path);
        let mut find = |rule, severity, problem: &str, remedy: &str| {
            findings.add(self.node, rule, severity, entry.clone(), problem, remedy);
        };
        if src.digest == Digest::EMPTY {
            match self.ground.broker {
                Broker::Plain => find(
                    Rule::EmptyFile,
                    Severity::Refusal,
                    "is empty, and a broker cannot retain that: the node's boot waits for it for ever",
                    "put a line feed into it, or leave it out",
                ),
                Broker::Adapting => find(
                    Rule::EmptyFile,
                    Severity::Warning,
                    "is empty, and a broker cannot retain that: the broker leaves it out for the node",
                    "put a line feed into it",
                ),
            }
        }
        if src.path.as_str().contains(['+', '#']) {
            find(
                Rule::Wildcard,
                Severity::Refusal,
                "has `+` or `#` in its path: no client may subscribe to that, so the node is disconnected, and deaf \
                 from then on",
                "rename it",
            );
        }
        if folders.contains(src.path.as_str()) {
            find(
                Rule::IsFolder,
                Severity::Refusal,
                "is a folder on the node, which cannot put a file in its place, and waits for ever",
                "rename it",
            );
        }
        let folder = src.path.parents().last().map(str::to_owned);
        if let Some(folder) = folder.filter(|folder| !folders.contains(folder.as_str())) {
            let problem = format!(
                "lies in `{folder}/`, which the node may not have: it makes no folders, and its boot waits for ever"
            );
            let remedy = format!(
                "make `/{folder}` on the node, as with `mpremote mkdir`, then publish with `--force`; or ship the \
                 file in a wheel"
            );
            find(Rule::MissingFolder, Severity::Refusal, &problem, &remedy);
        }
        if src.size.is_some_and(|size| size > SRC) {
            self.oversize(entry.clone(), src.size, SRC, findings);
        }
    }

    /// A package that is larger than what the broker takes. Of images, the node takes no notice.
    fn in_chunks(&self, entry: &Entry, findings: &mut Findings) {
        let name = match entry {
            Entry::Wheel(wheel) if self.info.versions.get(&wheel.name) != Some(&wheel.version) => {
                wheel_name(wheel, None)
            }
            Entry::Src(src) => format!("src {}", src.path),
            _ => return,
        };
        let (severity, problem) = match self.ground.broker {
            Broker::Plain => (
                Severity::Refusal,
                "is more than the broker takes at once and goes in chunks, which the node does not know: its boot waits \
                 for ever",
            ),
            Broker::Adapting => (
                Severity::Warning,
                "is more than the broker takes at once and goes in chunks, which the node does not know: it does not get it",
            ),
        };
        let remedy = "raise the broker's packet limit, or split the package";
        findings.add(self.node, Rule::InChunks, severity, name, problem, remedy);
    }

    /// The folders that the node has as far as anybody can know: of what the present list put there, and of
    /// packages that it has.
    fn folders(&self) -> BTreeSet<&str> {
        let mut folders: BTreeSet<&str> = self.before.folders.clone();
        folders.insert(ROOT);
        for entry in self.ground.entries {
            if let Entry::Wheel(wheel) = entry
                && self.info.versions.contains_key(&wheel.name)
                && let Some(inside) = self.ground.inside.get(&wheel.digest)
            {
                folders.extend(inside.folders.iter().map(String::as_str));
            }
        }
        folders
    }

    fn oversize(&self, entry: String, bytes: Option<u64>, limit: u64, findings: &mut Findings) {
        let bytes = size(bytes.unwrap_or_default());
        let problem = format!(
            "has {bytes}: with a heap of 512 kB such a node takes {} kB; what is too large makes it deaf",
            limit / 1000
        );
        let remedy = "split it, or make sure that the node has memory enough";
        findings.add(self.node, Rule::Oversize, Severity::Warning, entry, &problem, remedy);
    }
}

/// What the present list says.
#[derive(Default)]
struct Before<'a> {
    /// Wheels, by normalised name.
    wheels: HashMap<String, Vec<&'a Wheel>>,
    /// Folders of its files.
    folders: BTreeSet<&'a str>,
}

impl<'a> Before<'a> {
    fn of(list: Option<&'a UpdateList>) -> Before<'a> {
        let mut before = Before::default();
        for entry in list.map(UpdateList::entries).unwrap_or_default() {
            match entry {
                Entry::Wheel(wheel) => {
                    before.wheels.entry(normalized_name(&wheel.name)).or_default().push(wheel);
                }
                Entry::Src(src) => before.folders.extend(src.path.parents()),
                _ => {}
            }
        }
        before
    }
}

#[derive(Default)]
struct Findings {
    all: Vec<Finding>,
    /// Where the finding with this rule, entry and problem is.
    places: HashMap<(Rule, String, String), usize>,
}

impl Findings {
    fn add(
        &mut self,
        node: &NodeId,
        rule: Rule,
        severity: Severity,
        entry: String,
        problem: &str,
        remedy: &str,
    ) {
        let place = *self.places.entry((rule, entry.clone(), problem.to_owned())).or_insert(self.all.len());
        match self.all.get_mut(place) {
            Some(finding) if finding.nodes.last() == Some(node) => {}
            Some(finding) => finding.nodes.push(node.clone()),
            None => self.all.push(Finding {
                rule,
                severity,
                entry,
                nodes: vec![node.clone()],
                problem: problem.to_owned(),
                remedy: remedy.to_owned(),
            }),
        }
    }

    fn finish(mut self) -> Vec<Finding> {
        for finding in &mut self.all {
            let node = match finding.nodes.as_slice() {
                [one] => one.to_string(),
                _ => "NODE".to_owned(),
            };
            finding.remedy = finding.remedy.replace("{node}", &node);
        }
        self.all.sort_by_key(|finding| finding.severity);
        self.all
    }
}

/// The most nodes that a finding names.
const NODES_NAMED: usize = 3;

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self
            .nodes
            .iter()
            .take(NODES_NAMED)
            .map(|node| format!("`{}`", node.as_str().escape_debug()))
            .collect();
        let more = match self.nodes.len().saturating_sub(NODES_NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        match names.as_slice() {
            [] => f.write_str("ota-promoter's devices")?,
            names => write!(f, "Mpy-BLOX node {}{more}", names.join(", "))?,
        }
        write!(f, ": `{}` {}", self.entry, self.problem)?;
        match self.remedy.as_str() {
            "nothing" => Ok(()),
            remedy => write!(f, "; remedy: {remedy}"),
        }
    }
}

fn wheel_name(wheel: &Wheel, among: Option<&[&Wheel]>) -> String {
    let tag = wheel.tag.as_deref().filter(|_| among.is_some_and(|wheels| wheels.len() > 1));
    let tag = tag.map(|tag| format!(" for {tag}")).unwrap_or_default();
    format!("wheel {} {}{tag}", wheel.name, wheel.version)
}

fn named(entries: &[Entry], package: &PackageId) -> String {
    let found = entries.iter().find(|entry| entry.package().is_some_and(|(id, _)| id == *package));
    match found {
        Some(Entry::Wheel(wheel)) => wheel_name(wheel, None),
        Some(Entry::Src(src)) => format!("src {}", src.path),
        _ => package.to_string(),
    }
}

/// A version without what makes no difference to PEP 440: case, a leading `v`, trailing zeros of a plain release.
fn normal_version(version: &str) -> String {
    let version = version.to_ascii_lowercase();
    let mut version = version.strip_prefix('v').unwrap_or(&version);
    if version.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        while let Some(shorter) = version.strip_suffix(".0") {
            version = shorter;
        }
    }
    version.to_owned()
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::Chunks;

    use super::*;

    const OURS: Broker = Broker::Adapting;
    const PLAIN: Broker = Broker::Plain;

    fn wheel(name: &str, version: &str, tag: &str, content: &str) -> Entry {
        Entry::Wheel(Wheel {
            name: name.into(),
            version: version.into(),
            digest: Digest::of(content.as_bytes()),
            size: Some(content.len() as u64),
            chunks: None,
            tag: Some(tag.into()),
            extra: Default::default(),
        })
    }

    fn demo(version: &str, content: &str) -> Entry {
        wheel("demo", version, "py3-none-any", content)
    }

    fn src(path: &str, content: &[u8]) -> Entry {
        Entry::Src(Src {
            path: FilePath::new(path).unwrap(),
            digest: Digest::of(content),
            size: Some(content.len() as u64),
            chunks: None,
            extra: Default::default(),
        })
    }

    /// What is found on nodes with these packages, as `rule severity: entry`.
    struct Case<'a> {
        before: Vec<Entry>,
        release: Vec<Entry>,
        nodes: Vec<&'a [(&'a str, &'a str)]>,
        inside: Vec<(&'a str, &'a str, &'a str, &'a [&'a str])>,
        lost: bool,
    }

    impl Default for Case<'_> {
        fn default() -> Self {
            let node: &[_] = &[("demo", "1.0"), ("mpy-blox", "0.6.0")];
            Case { before: vec![], release: vec![], nodes: vec![node], inside: vec![], lost: false }
        }
    }

    impl Case<'_> {
        fn findings(&self, broker: Broker) -> Vec<Finding> {
            let before = UpdateList::new(self.before.clone()).unwrap();
            let info = |versions: &&[(&str, &str)]| {
                let uname = r#"{"sysname":"esp32","machine":"ESP32","version":"v1.25"}"#;
                let mut info = Info::parse(format!(r#"{{"uname":{uname}}}"#).as_bytes()).unwrap();
                info.versions = versions.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
                info
            };
            let nodes = self.nodes.iter().enumerate();
            let nodes = nodes.map(|(n, node)| (NodeId::new(format!("n{n}")).unwrap(), info(node))).collect();
            let inside = |(content, name, version, folders): &(&str, &str, &str, &[&str])| {
                let folders = folders.iter().map(|folder| (*folder).to_owned()).collect();
                let inside = Inside { name: (*name).into(), version: (*version).into(), folders };
                (Digest::of(content.as_bytes()), inside)
            };
            let lost: Vec<PackageId> = match self.lost {
                true => before.packages().map(|(id, _)| id).collect(),
                false => vec![],
            };
            lint(&Ground {
                entries: &self.release,
                inside: &self.inside.iter().map(inside).collect(),
                before: Some(&before),
                nodes: &nodes,
                broker,
                lost: &lost,
            })
        }

        fn found(&self, broker: Broker) -> Vec<(Rule, Severity, String)> {
            let short = |finding: Finding| (finding.rule, finding.severity, finding.entry);
            self.findings(broker).into_iter().map(short).collect()
        }
    }

    fn one(rule: Rule, severity: Severity, entry: &str) -> Vec<(Rule, Severity, String)> {
        vec![(rule, severity, entry.to_owned())]
    }

    use Severity::{Note, Refusal, Warning};

    #[test]
    fn a_release_that_such_a_node_can_take_finds_nothing() {
        let case = Case {
            before: vec![demo("1.0", "a"), src("data/a.json", b"1")],
            release: vec![
                demo("1.1", "b"),
                src("main.py", b"x"),
                src("lib/y.py", b"y"),
                src("data/b.json", b"2"),
            ],
            inside: vec![("b", "demo", "1.1", &["lib/demo"])],
            ..Case::default()
        };
        assert_eq!((case.findings(PLAIN), case.findings(OURS)), (vec![], vec![]));
        let nobody =
            Case { nodes: vec![], release: vec![src("empty", b""), demo("9", "x")], ..Case::default() };
        assert_eq!(nobody.findings(PLAIN), vec![]);
    }

    #[test]
    fn what_goes_in_chunks_leaves_the_node_waiting() {
        let cut = |mut entry: Entry| {
            entry.set_chunks(Some(Chunks::cut(&[1; 3000], 1024).unwrap()));
            entry
        };
        let case = Case {
            release: vec![cut(demo("1.1", "b")), cut(src("data.bin", b"x"))],
            inside: vec![("b", "demo", "1.1", &[])],
            ..Case::default()
        };
        for (broker, severity) in [(PLAIN, Refusal), (OURS, Warning)] {
            let expected =
                ["wheel demo 1.1", "src data.bin"].map(|entry| (Rule::InChunks, severity, entry.to_owned()));
            assert_eq!(case.found(broker), expected);
        }
        let same = Case { release: vec![cut(demo("1.0", "a"))], ..Case::default() };
        assert_eq!(same.found(PLAIN), vec![], "it has it already");
    }

    #[test]
    fn a_wheel_that_is_not_installed_hangs_the_node_unless_the_broker_adapts() {
        let case = Case { release: vec![wheel("new", "1.0", "py3-none-any", "x")], ..Case::default() };
        assert_eq!(case.found(PLAIN), one(Rule::NotInstalled, Refusal, "wheel new 1.0"));
        assert_eq!(case.found(OURS), one(Rule::NotInstalled, Note, "wheel new 1.0"));
        let text = case.findings(PLAIN)[0].to_string();
        assert!(text.starts_with("Mpy-BLOX node `n0`: `wheel new 1.0` is not installed: "), "{text}");
        assert!(text.contains("remedy: install it first: `mpypi install --node n0 "), "{text}");
        let bare = Case { nodes: vec![&[]], ..case };
        assert_eq!(bare.found(OURS), one(Rule::NotInstalled, Warning, "wheel new 1.0"));
    }

    #[test]
    fn a_name_that_is_spelled_otherwise_than_installed_is_not_found() {
        let case = Case { release: vec![wheel("Demo", "1.0", "py3-none-any", "x")], ..Case::default() };
        for broker in [PLAIN, OURS] {
            assert_eq!(case.found(broker), one(Rule::NotInstalled, Refusal, "wheel Demo 1.0"));
        }
    }

    #[test]
    fn the_same_version_with_a_new_digest_is_ignored() {
        let case =
            Case { before: vec![demo("1.0", "a")], release: vec![demo("1.0", "b")], ..Case::default() };
        for broker in [PLAIN, OURS] {
            assert_eq!(case.found(broker), one(Rule::SameVersion, Refusal, "wheel demo 1.0"));
        }
        let older: &[_] = &[("demo", "0.9")];
        assert_eq!(Case { nodes: vec![older], ..case }.found(PLAIN), vec![], "that node takes it");
    }

    #[test]
    fn a_version_that_is_not_that_of_metadata_installs_for_ever() {
        let case = |version: &str| Case {
            release: vec![demo(version, "b")],
            inside: vec![("b", "demo", "1.1", &[])],
            ..Case::default()
        };
        for broker in [PLAIN, OURS] {
            assert_eq!(case("2.0").found(broker), one(Rule::VersionMismatch, Refusal, "wheel demo 2.0"));
        }
        assert_eq!(case("1.1").found(PLAIN), vec![]);
    }

    #[test]
    fn a_version_that_is_spelled_otherwise_than_in_metadata_installs_for_ever() {
        let case = |version: &str| Case {
            release: vec![demo(version, "b")],
            inside: vec![("b", "demo", "1.1", &[])],
            ..Case::default()
        };
        for version in ["1.1.0", "1.1.0.0", "v1.1"] {
            let entry = format!("wheel demo {version}");
            assert_eq!(case(version).found(PLAIN), one(Rule::VersionSpelling, Refusal, &entry));
        }
    }

    #[test]
    fn a_name_that_is_not_that_of_metadata_is_never_found_installed() {
        let inside = vec![("b", "Demo", "1.1", &[] as &[_])];
        let case = Case { release: vec![demo("1.1", "b")], inside, ..Case::default() };
        assert_eq!(case.found(PLAIN), one(Rule::NameMismatch, Refusal, "wheel demo 1.1"));
    }

    #[test]
    fn several_wheels_of_one_package_take_each_others_place_unless_the_broker_picks() {
        let tags = |one: &str, other: &str| Case {
            release: vec![
                wheel("demo", one, "py3-none-any", "a"),
                wheel("demo", other, "mpy6-bytecode-any", "b"),
            ],
            ..Case::default()
        };
        for (case, word) in [(tags("1.1", "1.1"), "several tags"), (tags("1.1", "1.2"), "several versions")] {
            assert_eq!(case.found(PLAIN), one(Rule::SeveralWheels, Refusal, "wheel demo 1.1"));
            assert!(case.findings(PLAIN)[0].problem.contains(word));
            assert_eq!(case.found(OURS), vec![]);
        }
    }

    #[test]
    fn two_contents_for_one_path_take_each_others_place() {
        let case = Case { release: vec![src("main.py", b"a"), src("main.py", b"b")], ..Case::default() };
        for broker in [PLAIN, OURS] {
            assert_eq!(case.found(broker), one(Rule::SeveralContents, Refusal, "src main.py"));
        }
    }

    #[test]
    fn a_tag_that_is_not_the_installed_one_hangs_the_node() {
        let case = Case {
            before: vec![demo("1.0", "a")],
            release: vec![wheel("demo", "1.1", "mpy6-bytecode-any", "b")],
            ..Case::default()
        };
        for broker in [PLAIN, OURS] {
            assert_eq!(case.found(broker), one(Rule::TagChanged, Refusal, "wheel demo 1.1"));
        }
        assert!(case.findings(PLAIN)[0].remedy.contains("`py3-none-any`"));
        // The broker takes the one with the tag that is installed.
        let both = [wheel("demo", "1.1", "mpy6-bytecode-any", "b"), demo("1.1", "c")];
        assert_eq!(Case { release: both.to_vec(), ..case }.found(OURS), vec![]);
        // Nobody knows how a node got a version that the list does not have.
        let other =
            Case { before: vec![demo("0.9", "a")], release: vec![both[0].clone()], ..Case::default() };
        assert_eq!(other.found(PLAIN), vec![]);
    }

    #[test]
    fn an_empty_file_hangs_the_node_unless_the_broker_leaves_it_out() {
        let case = Case { release: vec![src("empty.py", b"")], ..Case::default() };
        assert_eq!(case.found(PLAIN), one(Rule::EmptyFile, Refusal, "src empty.py"));
        assert_eq!(case.found(OURS), one(Rule::EmptyFile, Warning, "src empty.py"));
    }

    #[test]
    fn a_file_in_a_folder_that_nobody_knows_of_hangs_the_node() {
        let case = Case { release: vec![src("data/deep/x.json", b"1")], ..Case::default() };
        for broker in [PLAIN, OURS] {
            assert_eq!(case.found(broker), one(Rule::MissingFolder, Refusal, "src data/deep/x.json"));
        }
        let known = Case { before: vec![src("data/deep/y.json", b"1")], ..case };
        assert_eq!(known.found(PLAIN), vec![], "the present list has it");
        let in_wheel = Case {
            release: vec![demo("1.1", "b"), src("lib/demo/x.json", b"1")],
            inside: vec![("b", "demo", "1.1", &["lib/demo"])],
            ..Case::default()
        };
        assert_eq!(in_wheel.found(PLAIN), vec![], "a package that it has brings it");
    }

    #[test]
    fn a_file_where_the_node_has_a_folder_hangs_it() {
        let before = vec![src("data/y.json", b"1")];
        let case = Case { before, release: vec![src("data", b"1"), src("lib", b"1")], ..Case::default() };
        let both = |rule| [one(rule, Refusal, "src data"), one(rule, Refusal, "src lib")].concat();
        assert_eq!(case.found(PLAIN), both(Rule::IsFolder));
    }

    #[test]
    fn a_path_with_a_wildcard_makes_the_node_deaf() {
        let case = Case { release: vec![src("a+b.py", b"1"), src("c#.py", b"1")], ..Case::default() };
        let both =
            [one(Rule::Wildcard, Refusal, "src a+b.py"), one(Rule::Wildcard, Refusal, "src c#.py")].concat();
        assert_eq!(case.found(PLAIN), both);
    }

    #[test]
    fn a_package_larger_than_such_nodes_were_seen_to_take_is_worth_a_warning() {
        let large = "x".repeat(WHEEL as usize + 1);
        let case = Case {
            release: vec![demo("1.1", &large), src("large.bin", &vec![1; SRC as usize + 1])],
            ..Case::default()
        };
        let both =
            [one(Rule::Oversize, Warning, "wheel demo 1.1"), one(Rule::Oversize, Warning, "src large.bin")];
        assert_eq!(case.found(PLAIN), both.concat());
        let most = Case {
            release: vec![demo("1.1", &large[1..]), src("large.bin", &vec![1; SRC as usize])],
            ..Case::default()
        };
        assert_eq!(most.found(PLAIN), vec![]);
    }

    #[test]
    fn a_package_that_the_broker_lost_is_told() {
        let list = vec![demo("1.0", "a")];
        let case = Case { before: list.clone(), release: list, lost: true, ..Case::default() };
        assert_eq!(case.found(PLAIN), one(Rule::MissingPackage, Warning, "wheel demo 1.0"));
    }

    #[test]
    fn what_promoters_devices_choke_on_is_worth_a_warning() {
        let before = UpdateList::new(vec![src("old/a.py", b"a")]).unwrap();
        let release = [
            src("flat.py", b"b"),
            src("lib/one.py", b"c"),
            src("old/new/a.py", b"d"),
            src("web/css/a.css", b"e"),
            src("web/css/logo.bin", b"\xff"),
        ];
        let binary = BTreeSet::from([Digest::of(b"\xff")]);
        let found = for_promoter(&release, Some(&before), &binary);
        let short: Vec<_> = found.iter().map(|finding| (finding.rule, &*finding.entry)).collect();
        assert_eq!(
            short,
            [(Rule::NestedFolder, "src web/css/a.css"), (Rule::Binary, "src web/css/logo.bin")]
        );
        assert!(found.iter().all(|finding| finding.severity == Severity::Warning));
        assert!(
            found[1].to_string().starts_with("ota-promoter's devices: `src web/css/logo.bin` is no UTF-8")
        );
        let list = UpdateList::new(release.to_vec()).unwrap();
        assert_eq!(for_promoter(&release, Some(&list), &BTreeSet::new()), []);
    }

    #[test]
    fn nodes_with_the_same_problem_share_a_finding() {
        let node: &[_] = &[("demo", "1.0")];
        let nodes = vec![node; 5];
        let case = Case { nodes, release: vec![wheel("new", "1.0", "py3-none-any", "x")], ..Case::default() };
        let findings = case.findings(PLAIN);
        assert_eq!((findings.len(), findings[0].nodes.len()), (1, 5));
        let text = findings[0].to_string();
        assert!(
            text.starts_with("Mpy-BLOX node `n0`, `n1`, `n2` and 2 more: `wheel new 1.0` is not "),
            "{text}"
        );
        assert!(text.contains("--node NODE "), "{text}");
    }
}
