//! The nodes as Home Assistant knows updates. Policy only: retained messages in, retained messages out.

use std::{collections::BTreeMap, fmt::Write};

use bytes::Bytes;
use mpypi_protocol::{
    ChannelName, Digest, Entry, NodeId, Topic, UpdateList,
    node::{Info, Phase, State},
    topic::NodeSubject,
};
use serde_json::{Value, json};

/// What all our objects are called at the start.
const OURS: &str = "mpypi_";
/// Who says in a configuration that it is made here.
const ORIGIN: &str = "mpypi-broker";
/// Longest summary that Home Assistant shows, in characters.
const SUMMARY: usize = 255;
/// What a node has that has installed nothing.
const NOTHING: &str = "nothing";
/// Home Assistant's order: whatever was given up is tried again, and whatever waits for an order is installed.
const INSTALL: &str = r#"[{"type":"check"},{"type":"install"}]"#;

/// What Home Assistant is told, and from what.
#[derive(Debug)]
pub struct House {
    /// Where Home Assistant looks for what there is.
    prefix: String,
    /// Where a browser finds the dashboard, if anywhere.
    url: Option<String>,
    channels: BTreeMap<ChannelName, Offer>,
    /// By their object's id.
    things: BTreeMap<String, Thing>,
}

/// What a channel has.
#[derive(Debug)]
struct Offer {
    release: Option<String>,
    summary: String,
}

/// A node, or what is left of one.
#[derive(Debug, Default)]
struct Thing {
    node: Option<NodeId>,
    channel: Option<ChannelName>,
    machine: Option<String>,
    has_info: bool,
    tells_whether_online: bool,
    state: Option<State>,
    /// The release that was installed last, as far as is known.
    installed: Option<String>,
    /// What is retained of it: its configuration, its state.
    said: [Option<Digest>; 2],
    is_changed: bool,
}

impl House {
    /// An empty house.
    #[must_use]
    pub fn new(prefix: &str, url: Option<&str>) -> House {
        House {
            prefix: prefix.to_owned(),
            url: url.map(|url| url.trim_end_matches('/').to_owned()),
            channels: BTreeMap::new(),
            things: BTreeMap::new(),
        }
    }

    /// What has to be read, in this order, and listened to from the second on.
    #[must_use]
    pub fn filters(&self) -> [String; 6] {
        let own = |end: &str| format!("{}/update/+/{end}", self.prefix);
        let nodes = |subject: &str| format!("mpypi/nodes/+/{subject}");
        [
            own("config"),
            own("state"),
            "mpypi/channels/+".to_owned(),
            nodes("info"),
            nodes("state"),
            nodes("online"),
        ]
    }

    /// Takes a retained message; an empty one was cleared.
    pub fn take(&mut self, topic: &str, payload: &[u8]) {
        match Topic::parse(topic) {
            Ok(Topic::Channel(channel)) => self.publish(channel, payload),
            Ok(Topic::Node(node, subject)) => self.hear(node, subject, payload),
            Ok(Topic::Other(topic)) => self.recall(&topic, payload),
            _ => {}
        }
    }

    fn publish(&mut self, channel: ChannelName, payload: &[u8]) {
        for thing in self.things.values_mut() {
            thing.is_changed |= thing.channel.as_ref() == Some(&channel);
        }
        match UpdateList::parse(payload) {
            Ok(list) => self.channels.insert(channel, Offer::of(&list)),
            Err(_) => self.channels.remove(&channel),
        };
    }

    fn hear(&mut self, node: NodeId, subject: NodeSubject, payload: &[u8]) {
        let thing = self.things.entry(object(&node)).or_default();
        thing.node = Some(node);
        thing.is_changed = true;
        match subject {
            NodeSubject::Info => {
                let info = Info::parse(payload).ok();
                thing.has_info = info.is_some();
                thing.machine = info.as_ref().map(|info| plain(&info.uname.machine));
                thing.channel = info.and_then(|info| info.channel).or_else(|| thing.told_channel());
            }
            NodeSubject::State => {
                thing.state = State::parse(payload).ok();
                if !thing.has_info || thing.channel.is_none() {
                    thing.channel = thing.told_channel();
                }
                match &thing.state {
                    Some(State { phase: Phase::Idle, sequence, version: Some(version), .. }) => {
                        thing.installed = Some(release(version, *sequence));
                    }
                    Some(State { phase: Phase::Idle, version: None, .. }) => thing.installed = None,
                    _ => {}
                }
            }
            NodeSubject::Online => thing.tells_whether_online = !payload.is_empty(),
            NodeSubject::Cmd | NodeSubject::Log | NodeSubject::Challenge | NodeSubject::Time => {}
        }
    }

    /// Takes what was said before, perhaps by an earlier broker.
    fn recall(&mut self, topic: &str, payload: &[u8]) {
        let rest = topic.strip_prefix(&*self.prefix).and_then(|rest| rest.strip_prefix("/update/"));
        let Some((id, end)) = rest.and_then(|rest| rest.split_once('/')) else { return };
        if !id.starts_with(OURS) {
            return;
        }
        let value: Value = serde_json::from_slice(payload).unwrap_or_default();
        let digest = Some(Digest::of(payload));
        match end {
            "config" if value["origin"]["name"] == ORIGIN => {
                let thing = self.things.entry(id.to_owned()).or_default();
                (thing.said[0], thing.is_changed) = (digest, true);
            }
            // A configuration comes first, by which it is known as ours.
            "state" => {
                if let Some(thing) = self.things.get_mut(id) {
                    thing.said[1] = digest;
                    let installed = value["installed_version"].as_str().filter(|name| *name != NOTHING);
                    thing.installed = installed.map(str::to_owned);
                }
            }
            _ => {}
        }
    }

    /// What has to be retained since the last call, as topics and payloads; an empty one clears.
    pub fn news(&mut self) -> Vec<(String, Bytes)> {
        let House { prefix, url, channels, things } = self;
        let mut news = Vec::new();
        things.retain(|id, thing| {
            if !std::mem::take(&mut thing.is_changed) {
                return true;
            }
            let messages =
                thing.node.as_ref().filter(|_| thing.has_info || thing.state.is_some()).map(|node| {
                    let page = url.as_ref().map(|url| page(url, node));
                    let offer = thing.channel.as_ref().and_then(|channel| channels.get(channel));
                    [thing.config(prefix, id, node, page.as_deref()), thing.state(offer, page.as_deref())]
                });
            let is_gone = messages.is_none();
            // Of a state without a configuration, nobody would know.
            for (at, end) in ["config", "state"].into_iter().enumerate() {
                let payload = messages.as_ref().map(|messages| Bytes::from(messages[at].to_string()));
                let digest = payload.as_deref().map(Digest::of);
                if thing.said[at] != digest {
                    thing.said[at] = digest;
                    news.push((format!("{prefix}/update/{id}/{end}"), payload.unwrap_or_default()));
                }
            }
            !is_gone
        });
        news
    }
}

impl Offer {
    fn of(list: &UpdateList) -> Offer {
        let named = list.entries().iter().filter_map(|entry| match entry {
            Entry::Wheel(wheel) => Some(format!("{} {}", wheel.name, wheel.version)),
            Entry::Firmware(image) => Some(format!("firmware {} {}", image.name, image.version)),
            _ => None,
        });
        let mut parts: Vec<_> = named.collect();
        parts.dedup();
        match list.entries().iter().filter(|entry| matches!(entry, Entry::Src(_))).count() {
            0 => {}
            1 => parts.push("1 file".to_owned()),
            files => parts.push(format!("{files} files")),
        }
        let mut summary = parts.join(", ");
        if let Some(created) = list.release().and_then(|release| release.created) {
            let _ = write!(summary, " ({})", created.strftime("%Y-%m-%d"));
        }
        let name = |named: &mpypi_protocol::list::Release| release(&named.version, Some(named.sequence));
        Offer { release: list.release().map(name), summary }
    }
}

impl Thing {
    /// The channel that its state names: a node of Mpy-BLOX has it from the broker.
    fn told_channel(&self) -> Option<ChannelName> {
        self.state.as_ref()?.extra.get("channel")?.as_str()?.parse().ok()
    }

    /// How Home Assistant finds it, and what it sends to have it updated.
    fn config(&self, prefix: &str, id: &str, node: &NodeId, page: Option<&str>) -> Value {
        let mut device = json!({ "identifiers": [id], "name": plain(node.as_str()) });
        if let Some(machine) = self.machine.as_deref().filter(|machine| !machine.is_empty()) {
            device["model"] = machine.into();
        }
        if let Some(page) = page {
            device["configuration_url"] = page.into();
        }
        let mut config = json!({
            "name": "Release",
            "unique_id": format!("{id}_update"),
            "object_id": id,
            "state_topic": format!("{prefix}/update/{id}/state"),
            "command_topic": node.topic(NodeSubject::Cmd),
            "payload_install": INSTALL,
            "qos": 1,
            "device": device,
            "origin": { "name": ORIGIN, "sw_version": env!("CARGO_PKG_VERSION") },
        });
        // Who never says so would never be available.
        if self.tells_whether_online {
            config["availability_topic"] = node.topic(NodeSubject::Online).into();
            config["payload_available"] = "1".into();
            config["payload_not_available"] = "0".into();
        }
        config
    }

    /// What it has, and what there is. Each key is always there: Home Assistant keeps what it was told of one that is not.
    fn state(&self, offer: Option<&Offer>, page: Option<&str>) -> Value {
        let installed = self.installed.as_deref().unwrap_or(NOTHING);
        let latest = offer.and_then(|offer| offer.release.as_deref()).unwrap_or(installed);
        let phase = self.state.as_ref().map_or(Phase::Idle, |state| state.phase);
        let error = self.state.as_ref().and_then(|state| state.error.as_deref());
        let mut summary = match (phase, error) {
            (Phase::Failed | Phase::RolledBack, Some(error)) => format!("{phase}: {}. ", plain(error)),
            _ => String::new(),
        };
        summary += offer.map_or("", |offer| &offer.summary);
        let is_busy = !matches!(phase, Phase::Idle | Phase::Failed | Phase::RolledBack);
        let percentage = self.state.as_ref().filter(|_| phase == Phase::Downloading).map(|state| {
            let (done, total) = (u128::from(state.done), u128::from(state.total.max(1)));
            u64::try_from(done * 100 / total).unwrap_or(100).min(100)
        });
        let mut said = json!({
            "installed_version": installed,
            "latest_version": latest,
            "title": self.channel.as_ref().map_or("", ChannelName::as_str),
            "release_summary": markdown(&summary),
            "update_percentage": percentage,
            "in_progress": is_busy,
        });
        if let Some(page) = page {
            said["release_url"] = page.into();
        }
        said
    }
}

/// A release as people know it. Its number is part of it: two releases may have one version, and Home Assistant compares what it
/// does not take for a version as it stands.
fn release(version: &str, sequence: Option<u64>) -> String {
    match sequence {
        Some(sequence) => format!("{} ({sequence})", plain(version)),
        None => plain(version),
    }
}

/// The id of a node's object: letters, digits, `_` and `-`, and no two nodes' the same.
fn object(node: &NodeId) -> String {
    let mut id = OURS.to_owned();
    for byte in node.as_str().bytes() {
        match byte {
            b'_' => id.push_str("__"),
            _ if byte.is_ascii_alphanumeric() || byte == b'-' => id.push(char::from(byte)),
            _ => {
                let _ = write!(id, "_{byte:02x}");
            }
        }
    }
    id
}

/// Where the dashboard shows a node.
fn page(url: &str, node: &NodeId) -> String {
    let name = percent_encoding::utf8_percent_encode(node.as_str(), percent_encoding::NON_ALPHANUMERIC);
    format!("{url}/#/nodes/{name}")
}

/// What a node says of itself, without what would move the cursor.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SUMMARY).collect()
}

/// A text as Markdown that says just this, for a summary, which Home Assistant shows as Markdown.
fn markdown(text: &str) -> String {
    let mut said = String::new();
    let mut room = SUMMARY;
    for c in text.chars() {
        let is_special = matches!(
            c,
            '\\' | '`' | '*' | '_' | '{' | '}' | '[' | ']' | '<' | '>' | '#' | '!' | '|' | '~' | '&' | ':'
        );
        match room.checked_sub(1 + usize::from(is_special)) {
            Some(left) => room = left,
            None => break,
        }
        if is_special {
            said.push('\\');
        }
        said.push(c);
    }
    said
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const LIST: &str = r#"[{"type":"release","channel":"dev","sequence":42,"version":"1.4.0"},
        {"type":"wheel","name":"blink","version":"1.4.0","pkg_sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"type":"src","path":"main.py","pkg_sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}]"#;
    const INFO: &str = r#"{"uname":{"sysname":"esp32","machine":"ESP32 module","version":"v1"},"versions":{},"channel":"dev","agent":"a/1"}"#;

    fn house() -> House {
        House::new("homeassistant", Some("http://hub.local:8080/"))
    }

    fn said(news: &[(String, Bytes)], topic: &str) -> Value {
        let found = news.iter().find(|(name, _)| name == topic);
        let (_, payload) = found.unwrap_or_else(|| panic!("nothing at {topic}: {news:?}"));
        serde_json::from_slice(payload).unwrap()
    }

    fn tell(house: &mut House, node: &str, state: &str) -> Value {
        house.take(&format!("mpypi/nodes/{node}/state"), state.as_bytes());
        said(&house.news(), &format!("homeassistant/update/mpypi_{node}/state"))
    }

    #[test]
    fn a_node_has_what_it_installed_last_and_is_offered_what_its_channel_has() {
        let mut house = house();
        house.take("mpypi/channels/dev", LIST.as_bytes());
        house.take("mpypi/nodes/kitchen/info", INFO.as_bytes());
        house.take("mpypi/nodes/kitchen/online", b"1");
        let news = house.news();
        let config = said(&news, "homeassistant/update/mpypi_kitchen/config");
        assert_eq!(config["command_topic"], "mpypi/nodes/kitchen/cmd");
        assert_eq!(config["availability_topic"], "mpypi/nodes/kitchen/online");
        assert_eq!(config["device"]["configuration_url"], "http://hub.local:8080/#/nodes/kitchen");
        assert!(UpdateList::parse(config["payload_install"].as_str().unwrap().as_bytes()).is_ok());
        let state = said(&news, "homeassistant/update/mpypi_kitchen/state");
        assert_eq!(state["installed_version"], NOTHING);
        assert_eq!(state["latest_version"], "1.4.0 (42)");
        assert_eq!(state["release_summary"], "blink 1.4.0, 1 file");
        let idle = r#"{"phase":"idle","sequence":41,"version":"1.3.0"}"#;
        assert_eq!(tell(&mut house, "kitchen", idle)["installed_version"], "1.3.0 (41)");
        let busy = r#"{"phase":"downloading","sequence":42,"version":"1.4.0","done":1,"total":3}"#;
        let state = tell(&mut house, "kitchen", busy);
        assert_eq!(state["installed_version"], "1.3.0 (41)", "the old one runs");
        assert_eq!((&state["in_progress"], &state["update_percentage"]), (&json!(true), &json!(33)));
        let state = tell(&mut house, "kitchen", r#"{"phase":"installing","sequence":42,"version":"1.4.0"}"#);
        assert_eq!((&state["in_progress"], &state["update_percentage"]), (&json!(true), &Value::Null));
        let failed =
            r#"{"phase":"failed","sequence":42,"version":"1.4.0","error":"bad-hash: <b>[x](http://y)"}"#;
        let state = tell(&mut house, "kitchen", failed);
        assert_eq!(
            state["release_summary"],
            r"failed\: bad-hash\: \<b\>\[x\](http\://y). blink 1.4.0, 1 file"
        );
        assert_eq!(
            (&state["in_progress"], &state["installed_version"]),
            (&json!(false), &json!("1.3.0 (41)"))
        );
        let state = tell(&mut house, "kitchen", r#"{"phase":"idle","sequence":42,"version":"1.4.0"}"#);
        assert_eq!(state["installed_version"], state["latest_version"]);
        house.take(
            "mpypi/nodes/kitchen/state",
            br#"{"phase":"idle","sequence":42,"version":"1.4.0","done":9}"#,
        );
        assert_eq!(house.news(), [], "nothing that shows has changed");
    }

    #[test]
    fn what_another_broker_said_is_gone_on_with_and_what_is_gone_is_taken_back() {
        let mut house = house();
        house.take("mpypi/nodes/kitchen/info", INFO.as_bytes());
        house.take("mpypi/nodes/kitchen/state", br#"{"phase":"idle","sequence":41,"version":"1.3.0"}"#);
        house.take("mpypi/nodes/old/info", INFO.as_bytes());
        let before = house.news();
        let mut house = self::house();
        for (topic, payload) in before {
            house.take(&topic, &payload);
        }
        let foreign = br#"{"origin":{"name":"else"}}"#;
        house.take("homeassistant/update/mpypi_foreign/config", foreign);
        house.take("mpypi/nodes/kitchen/info", INFO.as_bytes());
        house.take(
            "mpypi/nodes/kitchen/state",
            br#"{"phase":"downloading","sequence":42,"version":"1.4.0","total":10}"#,
        );
        let news = house.news();
        let topics: BTreeMap<_, _> = news.iter().map(|(topic, payload)| (&**topic, payload.len())).collect();
        assert_eq!(topics.len(), 3, "{topics:?}");
        assert_eq!(topics["homeassistant/update/mpypi_old/config"], 0);
        assert_eq!(topics["homeassistant/update/mpypi_old/state"], 0);
        let state = said(&news, "homeassistant/update/mpypi_kitchen/state");
        assert_eq!(state["installed_version"], "1.3.0 (41)", "as it was before the download");
        for subject in ["info", "state"] {
            house.take(&format!("mpypi/nodes/kitchen/{subject}"), b"");
        }
        let news = house.news();
        assert!(news.len() == 2 && news.iter().all(|(_, payload)| payload.is_empty()), "{news:?}");
    }

    #[test]
    fn no_two_nodes_are_one_object_and_every_id_is_one_that_home_assistant_takes() {
        let names = ["a_b", "a b", "a__b", "a.b", "a-b", "ä", "a_20b", "a:b", ".."];
        let ids: BTreeSet<_> = names.iter().map(|name| object(&NodeId::new(*name).unwrap())).collect();
        assert_eq!(ids.len(), names.len());
        assert!(ids.iter().all(|id| id.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_' || c == b'-')));
    }

    #[test]
    fn a_long_or_odd_text_stays_a_short_plain_one() {
        assert_eq!(markdown(&"_".repeat(500)).len(), 254);
        assert_eq!(plain("a\u{1b}[2Jb\n"), "a [2Jb ");
    }
}
