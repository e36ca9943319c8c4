//! What a device says of its update, as the index tells it: the node's `info` and `state`, like every other node's.
//!
//! States may come in any order, and some never. What is installed is what the device says in its own attributes: the
//! last state of cOTA still names the old version.

use mpypi_protocol::node::{Info, Phase, State, Uname};
use serde_json::{Map, Value};

use super::{ask::Report, package::Package};
use crate::access::devices::Device;

/// Most bytes of a device's own attributes, as JSON.
pub const ATTRIBUTES: usize = 16 * 1024;
/// Most of them.
pub const ATTRIBUTES_COUNT: usize = 256;
/// Most bytes of a device's error that are kept.
pub const ERROR: usize = 1024;

/// Where a device's own attributes stand in its `info`.
const OWN: &str = "attributes";
/// What such a node's agent is called.
const AGENT: &str = "thingsboard";

/// The device's own attributes, as its `info` has them.
#[must_use]
pub fn attributes(info: Option<&Info>) -> Map<String, Value> {
    match info.and_then(|info| info.extra.get(OWN)) {
        Some(Value::Object(own)) => own.clone(),
        _ => Map::new(),
    }
}

/// The device's own attributes with those it says now.
///
/// # Errors
/// They would be too many; says so.
pub fn learn(mut own: Map<String, Value>, new: Map<String, Value>) -> Result<Map<String, Value>, String> {
    own.extend(new);
    if own.len() > ATTRIBUTES_COUNT {
        return Err(format!("a device has at most {ATTRIBUTES_COUNT} attributes of its own"));
    }
    let size = serde_json::to_string(&own).map_or(usize::MAX, |text| text.len());
    match size > ATTRIBUTES {
        true => Err(format!("a device's own attributes have at most {ATTRIBUTES} bytes")),
        false => Ok(own),
    }
}

/// The node's `info`, with these attributes of its own and what it `reported`.
#[must_use]
pub fn info(
    before: Option<Info>,
    device: &Device,
    own: Map<String, Value>,
    reported: Option<&Report>,
) -> Info {
    let mut info = before.unwrap_or_else(|| Info {
        uname: Uname::default(),
        versions: Default::default(),
        channel: None,
        agent: None,
        free: None,
        labels: Default::default(),
        utc_offset: None,
        extra: Map::new(),
    });
    info.uname = Uname { sysname: device.target.clone().unwrap_or_default(), ..Uname::default() };
    info.channel = Some(device.channel.clone());
    info.agent = Some(AGENT.to_owned());
    let reported = reported.and_then(|report| report.title.clone().zip(report.version.clone()));
    if let Some((title, version)) = installed(&own).or(reported) {
        info.versions = [(title, version)].into();
    }
    match own.is_empty() {
        true => info.extra.shift_remove(OWN),
        false => info.extra.insert(OWN.to_owned(), Value::Object(own)),
    };
    info
}

/// Title and version of what is installed, if the device's own attributes say it.
#[must_use]
pub fn installed(own: &Map<String, Value>) -> Option<(String, String)> {
    let text = |key| own.get(key).and_then(Value::as_str).map(str::to_owned);
    text("fw_title").zip(text("fw_version"))
}

/// The node's state after a report; none if the report says nothing of it. `assigned` is what the device is to have.
#[must_use]
pub fn state(
    before: Option<&State>,
    report: &Report,
    assigned: Option<&Package>,
    installed: Option<&(String, String)>,
) -> Option<State> {
    let word = report.state.as_deref()?;
    let phase = match word {
        "QUEUED" | "INITIATED" | "DOWNLOADING" => Phase::Downloading,
        "DOWNLOADED" | "VERIFIED" => Phase::Verifying,
        "UPDATING" => Phase::Installing,
        "UPDATED" | "IDLE" => Phase::Idle,
        "FAILED" => Phase::Failed,
        _ => return None,
    };
    let reported = report.title.clone().zip(report.version.clone());
    let has = installed.or(reported.as_ref());
    // An update that is over speaks of what is installed, any other of what it is to become.
    let is_over = phase == Phase::Idle;
    let package = assigned.filter(|package| {
        !is_over || has.is_some_and(|(title, version)| (title, version) == (&package.title, &package.version))
    });
    let version = match is_over {
        true => has.map(|(_, version)| version.clone()),
        false => package.map(|package| package.version.clone()),
    };
    let sequence = package.and_then(|package| package.sequence);
    let same = before.filter(|before| before.version == version && before.sequence == sequence);
    let starts = word == "DOWNLOADING" && before.is_none_or(|before| said(before) != Some(word));
    let attempt = same.map_or(0, |before| before.attempt) + u32::from(starts);
    let total = package.and_then(Package::size).unwrap_or_default();
    let has_all = !matches!(phase, Phase::Downloading | Phase::Failed);
    let error = report.error.as_deref().filter(|error| phase == Phase::Failed && !error.is_empty());
    let error = match (phase, error) {
        (Phase::Failed, Some(error)) => {
            Some(format!("device: {}", &error[..error.floor_char_boundary(ERROR)]))
        }
        (Phase::Failed, None) => Some("device: it gave no reason".to_owned()),
        _ => None,
    };
    let mut extra = Map::new();
    extra.insert(WORD.to_owned(), word.into());
    let done = if has_all { total } else { 0 };
    Some(State { phase, sequence, version, done, total, error, attempt, held: None, extra })
}

/// Where the device's own word for its state stands.
const WORD: &str = "fw_state";

fn said(state: &State) -> Option<&str> {
    state.extra.get(WORD).and_then(Value::as_str)
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::{ChannelName, Digest};
    use serde_json::json;

    use super::*;
    use crate::{
        faces::thingsboard::{checksum::Algorithm, package::Content},
        message::Payload,
    };

    fn package(version: &str) -> Package {
        let payload = Payload::Inline(bytes::Bytes::from_static(b"image"));
        let content = Content::Image { digest: Digest::of(b"image"), payload };
        Package { title: "dev".into(), version: version.into(), sequence: Some(7), content }
    }

    fn report(word: &str, version: &str) -> Report {
        let text = |text: &str| Some(text.to_owned());
        Report { title: text("dev"), version: text(version), state: text(word), error: text("") }
    }

    fn device() -> Device {
        Device {
            channel: ChannelName::new("dev").unwrap(),
            software: None,
            target: Some("esp32".into()),
            checksum: Algorithm::Sha256,
            token: Digest::EMPTY,
        }
    }

    #[test]
    fn an_update_is_told_like_any_other_in_whatever_order_it_goes() {
        let assigned = package("1.10");
        let mut before = None;
        let told = [
            ("IDLE", Phase::Idle, None, 0),
            ("DOWNLOADING", Phase::Downloading, Some(7), 1),
            ("VERIFIED", Phase::Verifying, Some(7), 1),
            ("DOWNLOADED", Phase::Verifying, Some(7), 1),
            ("DOWNLOADING", Phase::Downloading, Some(7), 2),
            ("UPDATING", Phase::Installing, Some(7), 2),
        ];
        for (word, phase, sequence, attempt) in told {
            let state = state(before.as_ref(), &report(word, "1.9"), Some(&assigned), None).unwrap();
            assert_eq!((state.phase, state.sequence, state.attempt), (phase, sequence, attempt), "{word}");
            before = Some(state);
        }
        assert_eq!(before.as_ref().unwrap().done, 5);
        let updated = |installed: Option<&(String, String)>, version| {
            let state =
                state(before.as_ref(), &report("UPDATED", version), Some(&assigned), installed).unwrap();
            (state.phase, state.version.unwrap(), state.sequence)
        };
        let new = (Phase::Idle, "1.10".to_owned(), Some(7));
        assert_eq!(updated(None, "1.10"), new);
        assert_eq!(updated(Some(&("dev".into(), "1.10".into())), "1.9"), new, "as cOTA says it");
        assert_eq!(updated(None, "1.1"), (Phase::Idle, "1.1".to_owned(), None), "another version");
        assert_eq!(state(None, &report("DANCING", "1"), Some(&assigned), None), None);
        assert_eq!(state(None, &Report::default(), Some(&assigned), None), None);
    }

    #[test]
    fn a_failure_has_its_reason() {
        let failed = |error: &str| {
            let report = Report { error: Some(error.to_owned()), ..report("FAILED", "1") };
            state(None, &report, Some(&package("2")), None).unwrap()
        };
        assert_eq!(failed("bad sha").error.as_deref(), Some("device: bad sha"));
        assert_eq!(failed("").error.as_deref(), Some("device: it gave no reason"));
        assert!(failed(&"é".repeat(ERROR)).error.unwrap().len() <= ERROR + "device: ".len());
        assert_eq!(failed("x").phase, Phase::Failed);
    }

    #[test]
    fn a_devices_own_attributes_are_kept_to_the_letter_and_bounded() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let own = learn(Map::new(), map(json!({"fw_title": "dev", "fw_version": "1.10"}))).unwrap();
        let first = info(None, &device(), own, Some(&report("UPDATED", "1.9")));
        let read = Info::parse(&first.to_bytes()).unwrap();
        assert_eq!(read.versions, [("dev".to_owned(), "1.10".to_owned())].into());
        assert!(!read.is_mpyblox());
        assert_eq!(attributes(Some(&read))["fw_version"], "1.10");
        assert!(learn(Map::new(), map(json!({"x": "y".repeat(ATTRIBUTES)}))).is_err());
        let many = (0..=ATTRIBUTES_COUNT).map(|n| (n.to_string(), Value::Null)).collect();
        assert!(learn(attributes(Some(&read)), many).is_err());
        let told = info(None, &device(), Map::new(), Some(&report("UPDATED", "1.9")));
        assert_eq!(told.versions, [("dev".to_owned(), "1.9".to_owned())].into());
    }
}
