//! What a device asks, by MQTT or by HTTP. Parsed once, here.

use serde_json::{Map, Value};

/// Most bytes of a JSON payload that is read.
pub const JSON: usize = 64 * 1024;

/// What a device publishes on a topic of ThingsBoard's.
#[derive(Debug, Clone, PartialEq)]
pub enum Ask {
    /// It reads attributes; the answer bears this id.
    Attributes(u64, Keys),
    /// It says its own, client, attributes.
    Learn(Map<String, Value>),
    /// It says how it is.
    Telemetry(Report),
    /// It wants a piece of a package.
    Chunk(Chunk),
    /// It wants something done here: nothing is, and nobody minds.
    Other,
}

/// Which attributes are read: none said means all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keys {
    /// Of what the device says itself.
    pub client: Vec<String>,
    /// Of what it is told.
    pub shared: Vec<String>,
}

/// A piece of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Which package.
    pub kind: Kind,
    /// The device's name for this download.
    pub download: u64,
    /// Which piece, from 0.
    pub index: u64,
    /// Its size in bytes, if the device says it.
    pub size: Option<u64>,
}

/// What ThingsBoard calls packages of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `fw`
    Firmware,
    /// `sw`
    Software,
}

impl Kind {
    /// How its topics and attributes begin.
    #[must_use]
    pub fn prefix(self) -> &'static str {
        match self {
            Kind::Firmware => "fw",
            Kind::Software => "sw",
        }
    }
}

/// What a device says of its update; the rest of its telemetry means nothing here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// `current_fw_title`
    pub title: Option<String>,
    /// `current_fw_version`
    pub version: Option<String>,
    /// `fw_state`
    pub state: Option<String>,
    /// `fw_error`
    pub error: Option<String>,
}

/// What cannot be read, and why not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(String);

impl Ask {
    /// What a message on `topic` asks.
    ///
    /// # Errors
    /// The payload is not what belongs there.
    pub fn parse(topic: &str, payload: &[u8]) -> Result<Ask, Malformed> {
        if let Some(rest) = topic.strip_prefix("v1/devices/me/") {
            return match rest {
                "attributes" => Ok(Ask::Learn(attributes(payload)?)),
                "telemetry" => Ok(Ask::Telemetry(Report::parse(payload)?)),
                _ => match rest.strip_prefix("attributes/request/").and_then(number) {
                    Some(id) => Ok(Ask::Attributes(id, Keys::parse(payload)?)),
                    None => Ok(Ask::Other),
                },
            };
        }
        let chunk = [Kind::Firmware, Kind::Software].into_iter().find_map(|kind| {
            let rest = topic.strip_prefix("v2/")?.strip_prefix(kind.prefix())?.strip_prefix("/request/")?;
            let (download, index) = rest.split_once("/chunk/")?;
            Some((kind, number(download)?, number(index)?))
        });
        let Some((kind, download, index)) = chunk else { return Ok(Ask::Other) };
        let size = std::str::from_utf8(payload).ok().map(str::trim);
        let size = match size {
            Some("") => None,
            size => {
                let size = size.and_then(number);
                Some(size.ok_or_else(|| Malformed("a chunk's size is a number of bytes".to_owned()))?)
            }
        };
        Ok(Ask::Chunk(Chunk { kind, download, index, size: size.filter(|size| *size > 0) }))
    }
}

impl Keys {
    /// The keys in the payload of a request by MQTT: comma-separated, or nothing at all.
    fn parse(payload: &[u8]) -> Result<Keys, Malformed> {
        let object = match payload {
            [] => Map::new(),
            payload => object(payload)?,
        };
        let mut keys = Keys::default();
        for (name, into) in [("clientKeys", &mut keys.client), ("sharedKeys", &mut keys.shared)] {
            match object.get(name) {
                None | Some(Value::Null) => {}
                Some(Value::String(text)) => into.extend(names(text)),
                Some(_) => return Err(Malformed(format!("`{name}` is a text"))),
            }
        }
        Ok(keys)
    }

    /// Takes a parameter of a request by HTTP, which may come more than once.
    pub fn parameter(&mut self, name: &str, value: &str) {
        match name {
            "clientKeys" => self.client.extend(names(value)),
            "sharedKeys" => self.shared.extend(names(value)),
            _ => {}
        }
    }

    /// Those of the keys that exist, in their groups. A group with none is left out.
    #[must_use]
    pub fn select(&self, client: &Map<String, Value>, shared: &Map<String, Value>) -> Map<String, Value> {
        let all = self.client.is_empty() && self.shared.is_empty();
        let mut found = Map::new();
        for (group, wanted, values) in [("client", &self.client, client), ("shared", &self.shared, shared)] {
            let chosen: Map<String, Value> = match all {
                true => values.clone(),
                false => {
                    let one = |key: &String| Some((key.clone(), values.get(key)?.clone()));
                    wanted.iter().filter_map(one).collect()
                }
            };
            if !chosen.is_empty() {
                found.insert(group.to_owned(), Value::Object(chosen));
            }
        }
        found
    }
}

impl Report {
    /// What telemetry says: an object, one with `ts` and `values`, or an array of either; the last word counts.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(payload: &[u8]) -> Result<Report, Malformed> {
        let entries = match json(payload)? {
            Value::Array(entries) => entries,
            entry => vec![entry],
        };
        let mut report = Report::default();
        for entry in entries {
            let Value::Object(mut entry) = entry else {
                return Err(Malformed("telemetry is an object, or an array of objects".to_owned()));
            };
            let values = match entry.remove("values") {
                Some(Value::Object(values)) if entry.contains_key("ts") => values,
                Some(_) if entry.contains_key("ts") => {
                    return Err(Malformed("`values` is an object".to_owned()));
                }
                _ => entry,
            };
            for (key, into) in [
                ("current_fw_title", &mut report.title),
                ("current_fw_version", &mut report.version),
                ("fw_state", &mut report.state),
                ("fw_error", &mut report.error),
            ] {
                if let Some(Value::String(text)) = values.get(key) {
                    *into = Some(text.clone());
                }
            }
        }
        Ok(report)
    }
}

/// What a device says its own attributes are: a flat object. A null says nothing.
///
/// # Errors
/// It is no object.
pub fn attributes(payload: &[u8]) -> Result<Map<String, Value>, Malformed> {
    let mut attributes = object(payload)?;
    attributes.retain(|_, value| !value.is_null());
    Ok(attributes)
}

fn object(payload: &[u8]) -> Result<Map<String, Value>, Malformed> {
    match json(payload)? {
        Value::Object(object) => Ok(object),
        _ => Err(Malformed("the payload is no JSON object".to_owned())),
    }
}

fn json(payload: &[u8]) -> Result<Value, Malformed> {
    if payload.len() > JSON {
        return Err(Malformed(format!("a JSON payload of {} bytes is larger than {JSON}", payload.len())));
    }
    serde_json::from_slice(payload).map_err(|error| Malformed(format!("the payload is no JSON: {error}")))
}

fn names(text: &str) -> impl Iterator<Item = String> {
    text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned)
}

/// Decimal digits and nothing else: `+1` is no number of a request.
fn number(text: &str) -> Option<u64> {
    let is_plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(map) => map,
            other => panic!("{other}"),
        }
    }

    fn keys(client: &[&str], shared: &[&str]) -> Keys {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Keys { client: owned(client), shared: owned(shared) }
    }

    #[test]
    fn every_topic_of_a_device_is_understood_and_others_do_no_harm() {
        let ask = |topic: &str, payload: &str| Ask::parse(topic, payload.as_bytes());
        let attributes = |payload: &str| ask("v1/devices/me/attributes/request/7", payload);
        let both = r#"{"clientKeys":"a, b,,","sharedKeys":"c"}"#;
        assert_eq!(attributes(both), Ok(Ask::Attributes(7, keys(&["a", "b"], &["c"]))));
        assert_eq!(attributes(""), Ok(Ask::Attributes(7, Keys::default())));
        let learned = ask("v1/devices/me/attributes", r#"{"fw_version":"1.10","x":null}"#);
        assert_eq!(learned, Ok(Ask::Learn(map(json!({"fw_version": "1.10"})))));
        let chunk = |kind, size| Ok(Ask::Chunk(Chunk { kind, download: 3, index: 12, size }));
        assert_eq!(ask("v2/fw/request/3/chunk/12", "4096"), chunk(Kind::Firmware, Some(4096)));
        assert_eq!(ask("v2/sw/request/3/chunk/12", ""), chunk(Kind::Software, None));
        assert_eq!(ask("v2/fw/request/3/chunk/12", "0"), chunk(Kind::Firmware, None));
        for topic in [
            "v1/devices/me/rpc/request/1",
            "v1/devices/me/claim",
            "v1/devices/me/attributes/request/-1",
            "v1/gateway/telemetry",
            "v2/fw/request/1/chunk/x",
            "v2/fw/request/1/chunk/99999999999999999999999",
            "v2/fw/response/1/chunk/1",
            "/provision/request",
        ] {
            assert_eq!(ask(topic, "x"), Ok(Ask::Other), "{topic}");
        }
        for (topic, payload) in [
            ("v1/devices/me/attributes", "[1]"),
            ("v1/devices/me/attributes", "{"),
            ("v1/devices/me/attributes/request/1", r#"{"sharedKeys":["a"]}"#),
            ("v1/devices/me/telemetry", "1"),
            ("v1/devices/me/telemetry", r#"{"ts":1,"values":2}"#),
            ("v2/fw/request/1/chunk/1", "-1"),
            ("v2/fw/request/1/chunk/1", "many"),
        ] {
            assert!(ask(topic, payload).is_err(), "{topic} {payload}");
        }
        assert!(ask("v1/devices/me/telemetry", &format!("{{\"a\":\"{}\"}}", "x".repeat(JSON))).is_err());
    }

    #[test]
    fn telemetry_comes_in_every_shape_and_its_last_word_counts() {
        let state = |payload: Value| Report::parse(payload.to_string().as_bytes()).unwrap().state;
        let is = |text: &str| Some(text.to_owned());
        assert_eq!(state(json!({"fw_state": "DOWNLOADING"})), is("DOWNLOADING"));
        assert_eq!(state(json!({"ts": 1, "values": {"fw_state": "VERIFIED"}})), is("VERIFIED"));
        let several =
            json!([{"fw_state": "DOWNLOADING"}, {"ts": 1, "values": {"fw_state": "UPDATED"}}, {"t": 1}]);
        assert_eq!(state(several), is("UPDATED"));
        assert_eq!(state(json!({"values": 3, "fw_state": 5})), None);
        assert_eq!(Report::parse(b"{}"), Ok(Report::default()));
    }

    #[test]
    fn only_keys_that_exist_are_read_and_empty_groups_are_left_out() {
        let client = map(json!({"fw_title": "dev", "fw_version": "1.10"}));
        let shared = map(json!({"fw_title": "dev", "fw_size": 3}));
        let read = |keys: Keys| Value::Object(keys.select(&client, &shared));
        assert_eq!(read(keys(&["fw_version", "no"], &[])), json!({"client": {"fw_version": "1.10"}}));
        assert_eq!(read(keys(&["no"], &["fw_size"])), json!({"shared": {"fw_size": 3}}));
        assert_eq!(read(keys(&["no"], &["no"])), json!({}));
        assert_eq!(read(Keys::default()), json!({"client": client, "shared": shared}));
        let mut repeated = Keys::default();
        for (name, value) in [("sharedKeys", "a,"), ("sharedKeys", "fw_size"), ("client_keys", "x")] {
            repeated.parameter(name, value);
        }
        assert_eq!(repeated, keys(&[], &["a", "fw_size"]));
    }
}
