//! What a Mpy-BLOX node is served of a list. Policy only: no index, no clock, no connection.

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::{
    Digest, Entry, FilePath, PackageId, Rollout, UpdateList,
    list::{Src, Wheel},
    node::{Info, Phase, State},
    query::Facts as Said,
    rollout::{Consent, Moment},
    wheel::ROOT,
};
use serde_json::{Map, Value};

use super::{history::History, survey::Survey, wheel::Facts};

/// How often one delivery to a node is tried.
pub const ATTEMPTS: u8 = 3;
/// How many reasons a node's state names.
const REASONS: usize = 5;
/// What frees a node.
const UNTIL: &str = "it keeps what it has until the next release, or a `check`";
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
    /// It keeps what it has, because it is not its turn in the release's rollout.
    Waiting,
}

/// The wheels in the index that the packages a node has, or had, may have come from, by the packages' names.
pub type Known = BTreeMap<String, Vec<Arc<Facts>>>;

/// Plans what `device` is served of a list. `known` has the wheels that the device's packages came from,
/// where they are in the index; `lost` those of [`Device::lost`].
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
    for facts in lost.values().flatten().filter(|facts| facts.may_wedge()) {
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
        let Entry::Src(src) = entry else { continue };
        let why = match &src.chunks {
            _ if src.digest == Digest::EMPTY => "is empty, and an empty file cannot be sent",
            Some(_) => "lies in chunks, which such a node does not know",
            None => continue,
        };
        left_out.push(format!("`{}` {why}", src.path));
        choice.skip.push(at);
    }
    let serve = match choice.skip.is_empty() {
        true => Serve::AsItIs,
        false => Serve::only(survey, |at, _| !choice.skip.contains(&at)),
    };
    let verdict = if left_out.is_empty() { Verdict::Served } else { Verdict::LeftOut(left_out) };
    Plan { serve, errand: None, verdict }
}

/// What `device` is served of a list when it is not its turn: nothing to do.
#[must_use]
pub fn wait(survey: &Survey, device: &Device) -> Plan {
    Plan { serve: Serve::present(survey, device), errand: None, verdict: Verdict::Waiting }
}

/// Whether it is a node's turn to take a list, which it cannot tell itself. Where the time of day is not right, it is
/// asked again when the list is served again.
#[must_use]
pub fn is_turn(list: &UpdateList, node: &str, info: &Info, wall: Option<Timestamp>, ordered: bool) -> bool {
    let Some(release) = list.release() else { return true };
    match Rollout::of(release) {
        Ok(None) => true,
        Ok(Some(rollout)) => {
            let moment = Moment { since: 0, wall, utc_offset: info.utc_offset.unwrap_or_default() };
            let at_once =
                Rollout { jitter: 0, window: rollout.window.filter(|_| !ordered), ..rollout.clone() };
            rollout.admits(&Said::of(node, info, (None, None)))
                && (rollout.consent == Consent::Implied || ordered)
                && at_once.wait(node, moment) == 0
        }
        Err(_) => false,
    }
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
        let before =
            candidates.iter().find_map(|(_, wheel)| known.get(&wheel.name)).map_or(&[][..], Vec::as_slice);
        let is_fit = |facts: &&Arc<Facts>| facts.fits(&device.sysname);
        let before: Vec<_> = match before.iter().any(|facts| is_fit(&facts)) {
            true => before.iter().filter(is_fit).collect(),
            false => before.iter().collect(),
        };
        let facts = |wheel: &Wheel| survey.wheel(&wheel.digest).and_then(|look| look.as_ref().ok());
        // Of several, one that is made like what it has, or for its platform.
        let suits = |wheel: &Wheel| match facts(wheel) {
            Some(facts) if before.is_empty() => facts.fits(&device.sysname),
            Some(facts) => before.iter().any(|before| before.tag == facts.tag),
            None => true,
        };
        let chosen = candidates
            .iter()
            .find(|(_, wheel)| installed == Some(&wheel.version) && (candidates.len() == 1 || suits(wheel)))
            .or_else(|| candidates.iter().find(|(_, wheel)| suits(wheel)));
        let chosen_at = chosen.map(|(at, _)| *at);
        self.skip.extend(candidates.iter().map(|(at, _)| *at).filter(|at| Some(*at) != chosen_at));
        let Some((_, wheel)) = chosen else {
            if let (Some(before), Some((_, wheel))) = (before.first(), candidates.first()) {
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
        match (installed, before.first(), device.versions.iter().next()) {
            // Where it is not known for certain that an upgrade goes well, a first install does.
            (Some(_), Some(first), _)
                if before.iter().any(|before| before.wedges(new) || before.tag != new.tag) =>
            {
                match before.iter().all(|before| before.folder == first.folder) {
                    true => drop(self.errand.get_or_insert_with(|| set_aside(first))),
                    false => hold(&"the folder of what is installed cannot be told"),
                }
            }
            (Some(_), ..) => {}
            (None, _, Some((name, version))) => {
                self.errand.get_or_insert_with(|| first_install(wheel, name, version));
            }
            (None, _, None) => hold(&"the node has no package at all under whose name it could be delivered"),
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

/// Has a wheel installed that the device does not have: as another version of a package that it has. The
/// device takes the package's name and version from the wheel itself.
fn first_install(wheel: &Wheel, carrier: &str, version: &str) -> Errand {
    let other = if version == "0" { "1" } else { "0" };
    let entry = Entry::Wheel(Wheel {
        name: carrier.to_owned(),
        version: other.to_owned(),
        digest: wheel.digest,
        size: wheel.size,
        chunks: None,
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
/// An upgrade ends with the removal of the old dist-info folder, which fails if there is a folder in it. What
/// is left then has no METADATA, and the device finds none of the packages behind it any more.
fn set_aside(old: &Facts) -> Errand {
    files(old, &[("METADATA", metadata(old))], format!("a new name for `{}` {}", old.name, old.version))
}

/// Makes a package of a dist-info folder that an upgrade could not remove, so that the device reads on behind
/// it.
fn repair(old: &Facts) -> Errand {
    let wheel = format!("Wheel-Version: 1.0\nTag: {}\n", old.tag);
    let record = ["METADATA", "WHEEL", "RECORD"].map(|name| format!("{}/{name},,\n", old.folder)).concat();
    let texts = [("METADATA", metadata(old)), ("WHEEL", wheel), ("RECORD", record)];
    files(old, &texts, format!("a repair of what is left of `{}` {}", old.name, old.version))
}

fn metadata(old: &Facts) -> String {
    format!("Metadata-Version: 2.1\nName: {}\nVersion: {}\n", aside(&old.name, &old.version), old.version)
}

/// What a package is called that stands in the way of its next version.
#[must_use]
pub fn aside(name: &str, version: &str) -> String {
    format!("{name}.replaced-{version}")
}

fn files(old: &Facts, texts: &[(&str, String)], text: String) -> Errand {
    let mut entries = Vec::new();
    let mut files = Vec::new();
    for (name, content) in texts {
        let Ok(path) = FilePath::new(format!("{ROOT}/{}/{name}", old.folder)).and_then(FilePath::for_topic)
        else {
            continue;
        };
        let digest = Digest::of(content.as_bytes());
        files.push((PackageId::Src(path.clone(), digest).topic(), Bytes::from(content.clone())));
        let size = Some(content.len() as u64);
        entries.push(Entry::Src(Src { path, digest, size, chunks: None, extra: Map::new() }));
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
            Verdict::Waiting => "waiting",
        }
    }

    /// What there is to say; nothing of a node that is served.
    #[must_use]
    pub fn text(&self) -> Option<String> {
        let word = self.word();
        Some(match self {
            Verdict::Served | Verdict::Waiting => return None,
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
                format!("{word}: installed {times} times within an hour; {UNTIL}")
            }
            Verdict::Stuck => {
                format!("{word}: it took packages and did not start again; {UNTIL}")
            }
        })
    }

    /// The node's state, as a node of ours would tell it.
    #[must_use]
    pub fn state(&self, list: &UpdateList, channel: &str) -> State {
        let (phase, error) = match self {
            // What it has of the files, nobody but the node knows.
            Verdict::Served | Verdict::Waiting => (Phase::Idle, None),
            Verdict::LeftOut(_) => (Phase::Idle, self.text()),
            Verdict::Delivering(_) => (Phase::Downloading, None),
            Verdict::HeldBack(_) | Verdict::Looping(_) | Verdict::Stuck => (Phase::Failed, self.text()),
        };
        let mut extra = Map::new();
        extra.insert(WRITER.to_owned(), Value::from(BROKER));
        extra.insert(CHANNEL.to_owned(), Value::from(channel));
        let release = list.release().filter(|_| !matches!(self, Verdict::Served | Verdict::Waiting));
        let held = list.release().filter(|_| *self == Verdict::Waiting);
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
            held: held.map(|release| release.sequence),
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::{super::wheel::tests::Make, *};

    const OLD: &str = "0000000000000000000000000000000000000000000000000000000000000000";

    /// A list of `entries` and wheels, each the entry's name and version and what the wheel really is.
    fn survey(wheels: &[(&str, &str, Make<'_>)], entries: &str) -> Survey {
        let mut texts = Vec::new();
        let mut looks = HashMap::new();
        for (name, version, make) in wheels {
            let bytes = make.bytes();
            let digest = Digest::of(&bytes);
            looks.insert(digest, Facts::of(&bytes).map(Arc::new).map_err(Arc::from));
            let named = format!(r#""name":"{name}","version":"{version}","tag":"{}""#, make.tag);
            texts.push(format!(r#"{{"type":"wheel",{named},"pkg_sha256":"{digest}"}}"#));
        }
        texts.extend((!entries.is_empty()).then(|| entries.to_owned()));
        let list = UpdateList::parse(format!("[{}]", texts.join(",")).as_bytes()).unwrap();
        Survey::new(Digest::of(&list.to_bytes()), Arc::new(list), looks)
    }

    fn device(versions: &[(&str, &str)]) -> Device {
        let versions = versions.iter().map(|(name, version)| (name.to_string(), version.to_string()));
        Device { sysname: "esp32".to_owned(), versions: versions.collect(), lost: BTreeMap::new() }
    }

    fn known(makes: &[Make<'_>]) -> Known {
        let facts = makes.iter().map(|make| Facts::of(&make.bytes()).unwrap());
        let mut known = Known::new();
        facts.for_each(|facts| known.entry(facts.name.clone()).or_default().push(Arc::new(facts)));
        known
    }

    fn planned(survey: &Survey, device: &Device, known: &Known) -> Plan {
        plan(survey, device, &History::default(), known, &Known::new())
    }

    fn entries(list: &Bytes) -> Vec<String> {
        let name = |entry: &Entry| match entry {
            Entry::Wheel(wheel) => format!("{} {}", wheel.name, wheel.version),
            Entry::Src(src) => src.path.to_string(),
            other => other.kind().to_owned(),
        };
        UpdateList::parse(list).unwrap().entries().iter().map(name).collect()
    }

    /// What an adapted list has.
    fn served(plan: &Plan) -> Vec<String> {
        match &plan.serve {
            Serve::Adapted(list) => entries(list),
            Serve::AsItIs => vec!["as it is".to_owned()],
        }
    }

    fn src(path: &str, digest: &str) -> String {
        format!(r#"{{"type":"src","path":"{path}","pkg_sha256":"{digest}"}}"#)
    }

    #[test]
    fn whose_turn_it_is_not_keeps_what_it_has_and_says_so() {
        let rollout = |rollout: &str| {
            let text = format!(
                r#"[{{"type":"release","channel":"dev","sequence":4,"version":"4","rollout":{rollout}}},{}]"#,
                src("main.py", OLD)
            );
            UpdateList::parse(text.as_bytes()).unwrap()
        };
        let info =
            br#"{"uname":{"sysname":"esp32","machine":"x","version":"v1.22.0"},"versions":{"core":"1"}}"#;
        let info = Info::parse(info).unwrap();
        let noon = "2026-11-28T12:00:00Z".parse().ok();
        let turn = |text: &str, ordered| is_turn(&rollout(text), "n", &info, noon, ordered);
        let with = |more: &str| format!(r#"{{"id":"0123456789abcdef","percent":"100"{more}}}"#);
        assert!(turn(&with(""), false));
        assert!(!turn(r#"{"id":"0123456789abcdef","percent":"0"}"#, true));
        assert!(!turn(r#"{"percent":"100"}"#, true), "what cannot be read is for nobody");
        assert!(turn(&with(r#","only":"firmware < 1.23""#), false));
        assert!(!turn(&with(r#","only":"firmware > 1.23""#), false));
        assert!(!turn(&with(r#","optional":true"#), false) && turn(&with(r#","optional":true"#), true));
        assert!(
            !turn(&with(r#","window":"22:00-04:00""#), false)
                && turn(&with(r#","window":"22:00-04:00""#), true)
        );
        assert!(turn(&with(r#","window":"11:00-13:00","jitter":600"#), false));
        assert!(is_turn(&UpdateList::parse(b"[]").unwrap(), "n", &info, noon, false));

        let list = rollout(&with(""));
        let survey = Survey::new(Digest::of(&list.to_bytes()), Arc::new(list), HashMap::new());
        let plan = wait(&survey, &device(&[("core", "1")]));
        assert_eq!((served(&plan), plan.errand), (vec!["release".to_owned()], None));
        let state = Verdict::Waiting.state(&survey.list, "dev");
        assert_eq!((state.phase, state.sequence, state.held), (Phase::Idle, None, Some(4)));
    }

    #[test]
    fn a_list_that_hurts_nobody_is_served_as_it_is() {
        let demo = Make { version: "2.0", ..Make::default() };
        let all = survey(&[("demo", "2.0", demo)], &src("main.py", OLD));
        for version in ["1.0", "2.0", "3.0"] {
            let plan =
                planned(&all, &device(&[("demo", version)]), &known(&[Make { version, ..Make::default() }]));
            assert_eq!(
                (plan.serve, plan.errand, plan.verdict),
                (Serve::AsItIs, None, Verdict::Served),
                "{version}"
            );
        }
        // Where the wheel it has came from, the index need not know.
        assert_eq!(planned(&all, &device(&[("demo", "1.0")]), &Known::new()).serve, Serve::AsItIs);
        assert_eq!(planned(&survey(&[], ""), &device(&[]), &Known::new()).serve, Serve::AsItIs);
    }

    #[test]
    fn a_wheel_that_is_not_there_is_delivered_under_a_name_that_is_before_anything_else_changes() {
        let wheels = [
            ("demo", "1.0", Make::default()),
            ("core", "0.6", Make { name: "core", version: "0.6", ..Make::default() }),
        ];
        let all = survey(&wheels, &src("main.py", OLD));
        let plan = planned(&all, &device(&[("core", "0.6")]), &Known::new());
        assert_eq!(served(&plan), ["core 0.6"]);
        let errand = plan.errand.unwrap();
        assert_eq!(entries(&errand.list), ["core 0"]);
        let list = UpdateList::parse(&errand.list).unwrap();
        assert_eq!(list.packages().next().unwrap().0, PackageId::Wheel(errand.key));
        assert_eq!(errand.key, Digest::of(&Make::default().bytes()));
        // Any version but the one that is there.
        let plan = planned(&all, &device(&[("core", "0")]), &Known::new());
        assert_eq!(entries(&plan.errand.unwrap().list), ["core 1"]);
        // With nothing there, there is no name for it.
        let plan = planned(&all, &device(&[]), &Known::new());
        assert!(matches!(&plan.verdict, Verdict::HeldBack(why) if why[0].contains("no package at all")));
        assert_eq!((served(&plan).len(), plan.errand), (0, None));
    }

    #[test]
    fn a_delivery_is_tried_three_times_and_then_the_node_keeps_what_it_has() {
        let all = survey(&[("demo", "1.0", Make::default())], &src("main.py", OLD));
        let node = device(&[("core", "0.6")]);
        let mut history = History::default();
        history.begin(all.digest);
        for _ in 0..ATTEMPTS {
            let plan = plan(&all, &node, &history, &Known::new(), &Known::new());
            history.deliver(plan.errand.unwrap().key);
        }
        let plan = plan(&all, &node, &history, &Known::new(), &Known::new());
        assert!(matches!(plan.verdict, Verdict::HeldBack(_)));
        assert_eq!((served(&plan).len(), plan.errand), (0, None));
    }

    #[test]
    fn what_cannot_be_installed_holds_the_release_back() {
        let table = [
            ("demo", "2.0", Make { version: "2.0", metadata: "\nText\n", ..Make::default() }, "METADATA"),
            ("demo", "2.0.0", Make { version: "2.0", ..Make::default() }, "install for ever"),
            ("demo", "2.0", Make { name: "Demo", version: "2.0", ..Make::default() }, "`Name: Demo`"),
            ("demo", "2.0", Make { version: "2.0", tag: "mpy6-bytecode-esp32", ..Make::default() }, "tag"),
        ];
        for (name, version, make, word) in table {
            let all = survey(&[(name, version, make)], &src("main.py", OLD));
            let plan = planned(&all, &device(&[("demo", "1.0")]), &known(&[Make::default()]));
            assert!(
                matches!(&plan.verdict, Verdict::HeldBack(why) if why[0].contains(word)),
                "{word}: {plan:?}"
            );
            assert_eq!((served(&plan).len(), plan.errand), (0, None), "{word}");
        }
        // Not in the index any more.
        let mut all = survey(&[("demo", "2.0", Make { version: "2.0", ..Make::default() })], "");
        all = Survey::new(all.digest, all.list.clone(), HashMap::new());
        assert!(matches!(
            planned(&all, &device(&[("demo", "1.0")]), &Known::new()).verdict,
            Verdict::HeldBack(_)
        ));
    }

    #[test]
    fn what_is_made_for_others_is_left_out() {
        let for_platform = |tag| Make { version: "2.0", tag, ..Make::default() };
        let both = [
            ("demo", "2.0", for_platform("mpy6-bytecode-rp2")),
            ("demo", "2.0", for_platform("mpy6-bytecode-esp32")),
        ];
        let all = survey(&both, &src("main.py", OLD));
        let had = known(&[Make { tag: "mpy6-bytecode-esp32", ..Make::default() }]);
        let plan = planned(&all, &device(&[("demo", "1.0")]), &had);
        assert_eq!(
            (served(&plan), plan.verdict.clone()),
            (vec!["demo 2.0".into(), "main.py".into()], Verdict::Served)
        );
        let Serve::Adapted(list) = &plan.serve else { panic!() };
        let esp32 = UpdateList::parse(list).unwrap().packages().next().unwrap().0;
        assert_eq!(*esp32.digest(), Digest::of(&both[1].2.bytes()));
        // Up to date, it still must not see the other one.
        assert_eq!(
            served(&planned(&all, &device(&[("demo", "2.0")]), &known(&[both[1].2.clone()]))).len(),
            2
        );
        // None of them for it.
        let all = survey(&both[..1], &src("main.py", OLD));
        let plan = planned(&all, &device(&[("core", "1")]), &Known::new());
        assert_eq!((served(&plan), plan.verdict), (vec!["main.py".to_owned()], Verdict::Served));
    }

    #[test]
    fn a_file_in_chunks_is_left_out_and_the_rest_is_served() {
        let chunked = format!(
            r#"{{"type":"src","path":"data.bin","pkg_sha256":"{OLD}","size":9,"chunks":{{"size":1024,"sha256":["{OLD}"]}}}}"#
        );
        let all = survey(&[], &format!("{chunked},{}", src("main.py", OLD)));
        let plan = planned(&all, &device(&[("core", "0.6")]), &Known::new());
        assert_eq!(served(&plan), ["main.py"]);
        assert!(matches!(&plan.verdict, Verdict::LeftOut(why) if why[0].contains("data.bin")));
    }

    #[test]
    fn an_empty_file_is_left_out_and_the_rest_is_served() {
        let empty = src("empty.py", &Digest::EMPTY.to_string());
        let all = survey(&[], &format!("{empty},{}", src("main.py", OLD)));
        let plan = planned(&all, &device(&[]), &Known::new());
        assert_eq!(served(&plan), ["main.py"]);
        assert!(matches!(&plan.verdict, Verdict::LeftOut(why) if why[0].contains("empty.py")));
    }

    #[test]
    fn a_signature_that_would_no_longer_be_true_is_left_out() {
        let empty = src("empty.py", &Digest::EMPTY.to_string());
        let signature = r#"{"type":"signature","key":"k","alg":"a","sig":"s"}"#;
        let text =
            format!(r#"{{"type":"release","channel":"dev","sequence":1,"version":"1"}},{empty},{signature}"#);
        assert_eq!(served(&planned(&survey(&[], &text), &device(&[]), &Known::new())), ["release"]);
    }

    #[test]
    fn what_an_upgrade_would_wedge_gets_another_name_first() {
        let all = survey(&[("demo", "2.0", Make { version: "2.0", ..Make::default() })], "");
        let had = known(&[Make { licenses: true, ..Make::default() }]);
        let plan = planned(&all, &device(&[("demo", "1.0"), ("core", "1")]), &had);
        assert_eq!(served(&plan).len(), 0);
        let errand = plan.errand.unwrap();
        assert_eq!(entries(&errand.list), ["lib/demo-1.0.dist-info/METADATA"]);
        let [(topic, content)] = &errand.files[..] else { panic!("{errand:?}") };
        let id = UpdateList::parse(&errand.list).unwrap().packages().next().unwrap().0;
        assert_eq!((topic, id.digest()), (&id.topic(), &Digest::of(content)));
        let text = str::from_utf8(content).unwrap();
        assert_eq!(text, "Metadata-Version: 2.1\nName: demo.replaced-1.0\nVersion: 1.0\n");
        // After that it is a first install.
        let plan = planned(&all, &device(&[("core", "1"), ("demo.replaced-1.0", "1.0")]), &had);
        assert_eq!(entries(&plan.errand.unwrap().list), ["core 0"]);
    }

    #[test]
    fn where_a_package_may_have_come_from_several_wheels_the_safe_way_is_taken() {
        let all = survey(&[("demo", "2.0", Make { version: "2.0", ..Make::default() })], "");
        let node = device(&[("demo", "1.0"), ("core", "1")]);
        let made = |tag, licenses| Make { tag, licenses, ..Make::default() };
        let (any, esp32, rp2) = ("py3-none-any", "mpy6-bytecode-esp32", "mpy6-bytecode-rp2");
        let goes = |makes: &[Make<'_>]| match planned(&all, &node, &known(makes)).verdict {
            Verdict::Served => "at once",
            Verdict::Delivering(_) => "another name first",
            _ => "not at all",
        };
        assert_eq!(
            goes(&[made(any, false), made(rp2, false)]),
            "at once",
            "it cannot have that of another platform"
        );
        assert_eq!(goes(&[made(any, false), made(any, true)]), "another name first");
        assert_eq!(goes(&[made(any, false), made(esp32, false)]), "another name first");
        assert_eq!(goes(&[made(esp32, false)]), "not at all");
        let elsewhere = Make { folder: Some("Demo-1.0.dist-info"), ..Make::default() };
        assert_eq!(goes(&[made(any, false), elsewhere]), "not at all");
    }

    #[test]
    fn a_wedged_node_is_repaired_once_whatever_the_list_says() {
        let all = survey(&[("demo", "2.0", Make { version: "2.0", ..Make::default() })], "");
        let lost = known(&[Make { licenses: true, ..Make::default() }]);
        let mut history = History::default();
        history.begin(all.digest);
        let first = plan(&all, &device(&[]), &history, &Known::new(), &lost);
        let errand = first.errand.unwrap();
        let folder = "lib/demo-1.0.dist-info";
        assert_eq!(
            entries(&errand.list),
            ["METADATA", "WHEEL", "RECORD"].map(|name| format!("{folder}/{name}"))
        );
        assert_eq!(errand.files.len(), 3);
        history.deliver(errand.key);
        let second = plan(&all, &device(&[("core", "1")]), &history, &Known::new(), &lost);
        assert_eq!(entries(&second.errand.unwrap().list), ["core 0"]);
        // What leaves no folder behind has wedged nobody.
        let sound = plan(&all, &device(&[]), &History::default(), &Known::new(), &known(&[Make::default()]));
        assert_eq!(sound.errand, None);
    }

    #[test]
    fn reasons_are_bounded() {
        let all = Verdict::HeldBack((0..1000).map(|n| format!("reason {n}")).collect()).text().unwrap();
        assert!(all.ends_with("reason 4; and 995 more"), "{all}");
    }
}
