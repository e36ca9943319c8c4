//! The golden vectors under `vectors/`, which bind every implementation of the wire format alike.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers, too")]

use std::{borrow::Cow, collections::BTreeMap};

use jiff::Timestamp;
use mpypi_protocol::{
    Digest, FilePath, PackageId, PublicKey, Query, Rollout, Root, Topic, Trust, UpdateList,
    key::Algorithm,
    list::ListError,
    node::{Info, NodeError, State},
    package::LegacyId,
    query::Facts,
    rollout::{Moment, Percent, RolloutId, Window},
    root::{RootError, SignedRoot},
    signed::{TimeAnswer, plain_keys},
    tag::{Code, Runtime, Tag, platform},
    topic::{NodeSubject, RolloutSubject, check_filter, check_name, matches},
    wheel::{RecordLine, dist_info, parse_headers, parse_record, write_record},
};
use serde_json::{Value, json};

/// The cases below `key` in a file of vectors; there must be some.
fn cases(file: &str, key: &str) -> Vec<Value> {
    let path = format!("{}/vectors/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let vectors: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}"));
    let cases = vectors[key].as_array().unwrap_or_else(|| panic!("{path} has no `{key}`"));
    assert!(!cases.is_empty(), "{path}: `{key}` is empty");
    cases.clone()
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or_else(|| panic!("no text `{key}` in {case}"))
}

fn bytes(case: &Value) -> Vec<u8> {
    let digits = text(case, "hex");
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

/// Every case of `file` below `key` is refused by `parse` with the words that it names.
fn refused<T, E: ToString>(file: &str, key: &str, input: &str, parse: impl Fn(&str) -> Result<T, E>) {
    for case in cases(file, key) {
        match parse(text(&case, input)) {
            Ok(_) => panic!("accepted: {case}"),
            Err(error) => assert_eq!(error.to_string(), text(&case, "error"), "{case}"),
        }
    }
}

#[test]
fn digests() {
    for case in cases("digests.json", "digests") {
        let digest = Digest::of(&bytes(&case));
        assert_eq!(digest.to_string(), text(&case, "sha256"));
        assert_eq!(text(&case, "sha256").parse(), Ok(digest));
    }
    refused("digests.json", "invalid", "text", |text| text.parse::<Digest>());
}

#[test]
fn paths() {
    for case in cases("paths.json", "valid") {
        let path = FilePath::new(text(&case, "path")).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(json!(path.parents().collect::<Vec<_>>()), case["parents"], "{case}");
        assert!(path.clone().for_topic().is_ok(), "{case}");
        assert!(check_name(&PackageId::Src(path, Digest::EMPTY).topic()).is_ok(), "{case}");
    }
    refused("paths.json", "invalid", "path", |path| FilePath::new(path));
    refused("paths.json", "invalid_in_topics", "path", |path| FilePath::new(path).unwrap().for_topic());
}

#[test]
fn topics() {
    for case in cases("topics.json", "valid") {
        let topic = Topic::parse(text(&case, "topic")).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(topic.to_string(), text(&case, "topic"));
        let found = match &topic {
            Topic::Channel(channel) => json!({ "kind": "channel", "channel": channel }),
            Topic::Rollout(channel, subject) => {
                let subject = match subject {
                    RolloutSubject::Record => "record",
                    RolloutSubject::Lease => "lease",
                    RolloutSubject::Order => "order",
                };
                json!({ "kind": "rollout", "channel": channel, "subject": subject })
            }
            Topic::Package(PackageId::Wheel(digest)) => json!({ "kind": "wheel", "digest": digest }),
            Topic::Package(PackageId::Firmware(digest)) => json!({ "kind": "firmware", "digest": digest }),
            Topic::Package(PackageId::Src(path, digest)) => {
                json!({ "kind": "src", "path": path, "digest": digest })
            }
            Topic::Chunk(package, number) => json!({ "kind": "chunk", "package": package, "number": number }),
            Topic::Legacy(LegacyId::Digest(digest)) => json!({ "kind": "legacy_digest", "digest": digest }),
            Topic::Legacy(LegacyId::Src(path)) => json!({ "kind": "legacy_src", "path": path }),
            Topic::Legacy(LegacyId::Path(path)) => json!({ "kind": "legacy_path", "path": path }),
            Topic::History(channel, sequence) => {
                json!({ "kind": "history", "channel": channel, "sequence": sequence })
            }
            Topic::Root(version) => json!({ "kind": "root", "version": version }),
            Topic::Node(node, subject) => {
                let subject = match subject {
                    NodeSubject::Info => "info",
                    NodeSubject::State => "state",
                    NodeSubject::Online => "online",
                    NodeSubject::Cmd => "cmd",
                    NodeSubject::Log => "log",
                    NodeSubject::Challenge => "challenge",
                    NodeSubject::Time => "time",
                };
                json!({ "kind": "node", "node": node, "subject": subject })
            }
            Topic::Edge(edge) => json!({ "kind": "edge", "edge": edge }),
            Topic::Other(_) => json!({ "kind": "other" }),
        };
        let mut expected = case.clone();
        expected.as_object_mut().unwrap().shift_remove("topic");
        assert_eq!(found, expected, "{topic}");
    }
    refused("topics.json", "invalid", "topic", Topic::parse);
}

#[test]
fn filters() {
    for case in cases("filters.json", "valid") {
        assert_eq!(check_filter(case.as_str().unwrap()), Ok(()), "{case}");
    }
    refused("filters.json", "invalid", "filter", check_filter);
    for case in cases("filters.json", "matches") {
        let (filter, topic) = (text(&case, "filter"), text(&case, "topic"));
        assert_eq!((check_filter(filter), check_name(topic)), (Ok(()), Ok(())), "{case}");
        assert_eq!(json!(matches(filter, topic)), case["matches"], "{case}");
    }
}

#[test]
fn lists() {
    for case in cases("lists.json", "valid") {
        let list = parse_list(text(&case, "text")).unwrap_or_else(|error| panic!("{case}: {error}"));
        let canonical = String::from_utf8(list.to_bytes()).unwrap();
        assert_eq!(canonical, text(&case, "canonical"), "{}", case["name"]);
        assert_eq!(parse_list(&canonical).unwrap(), list, "{}", case["name"]);
        let packages: Vec<Value> =
            list.packages().map(|(id, size)| json!({ "topic": id.topic(), "size": size })).collect();
        assert_eq!(json!(packages), case["packages"], "{}", case["name"]);
    }
    refused("lists.json", "invalid", "text", parse_list);
    refused("lists.json", "not_json", "text", parse_list);
    for case in cases("lists.json", "not_json_bytes") {
        let error = UpdateList::parse(&bytes(&case)).unwrap_err();
        assert_eq!(error.to_string(), text(&case, "error"), "{case}");
    }
}

#[test]
fn chunks_in_lists() {
    for case in cases("lists.json", "chunked") {
        let list = parse_list(text(&case, "text")).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(String::from_utf8(list.to_bytes()).unwrap(), text(&case, "text"), "{}", case["name"]);
        let pieces: Vec<Value> = list
            .pieces()
            .map(|piece| json!({ "topic": piece.topic, "sha256": piece.digest, "size": piece.size }))
            .collect();
        assert_eq!(json!(pieces), case["pieces"], "{}", case["name"]);
    }
    refused("lists.json", "invalid_chunks", "text", parse_list);
    refused("lists.json", "invalid_chunks_for_hosts", "text", parse_list);
}

fn parse_list(text: &str) -> Result<UpdateList, ListError> {
    UpdateList::parse(text.as_bytes())
}

#[test]
fn wheel_records() {
    for case in cases("wheel_record.json", "valid") {
        let lines = parse_record(text(&case, "text")).unwrap_or_else(|error| panic!("{case}: {error}"));
        let found: Vec<Value> = lines
            .iter()
            .map(|RecordLine { path, digest, size }| json!({ "path": path, "sha256": digest, "size": size }))
            .collect();
        assert_eq!(json!(found), case["lines"], "{case}");
        assert_eq!(write_record(&lines), text(&case, "written"), "{case}");
        assert_eq!(parse_record(text(&case, "written")), Ok(lines), "{case}");
    }
    refused("wheel_record.json", "invalid", "text", parse_record);
    for case in cases("wheel_record.json", "dist_info") {
        assert_eq!(dist_info(text(&case, "name"), text(&case, "version")), text(&case, "folder"));
    }
}

#[test]
fn wheel_headers() {
    for case in cases("wheel_record.json", "headers") {
        let headers = parse_headers(text(&case, "text")).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(json!(headers), case["headers"], "{case}");
    }
    refused("wheel_record.json", "invalid_headers", "text", parse_headers);
}

#[test]
fn node_messages() {
    let info = |text: &str| Info::parse(text.as_bytes()).map(|info| info.to_bytes());
    let state = |text: &str| State::parse(text.as_bytes()).map(|state| state.to_bytes());
    kept("info", info);
    kept("state", state);
    refused("node.json", "invalid_info", "text", info);
    refused("node.json", "invalid_state", "text", state);
}

/// Every message below `key` comes out as it says, and once more the same.
fn kept(key: &str, through: impl Fn(&str) -> Result<Vec<u8>, NodeError>) {
    for case in cases("node.json", key) {
        for input in ["text", "canonical"] {
            let found = through(text(&case, input)).unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_eq!(String::from_utf8(found).unwrap(), text(&case, "canonical"), "{case}");
        }
    }
}

#[test]
fn tags() {
    for case in cases("tags.json", "valid") {
        let tag = Tag::new(text(&case, "tag")).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(json!(tag.singles().collect::<Vec<_>>()), case["singles"], "{case}");
    }
    refused("tags.json", "invalid", "tag", |tag| Tag::new(tag));
    for case in cases("tags.json", "fits") {
        let fit = runtime(&case).fit(case["tag"].as_str()).map(|fit| match fit.code {
            Code::Source => "source",
            Code::Bytecode => "bytecode",
            Code::Native(_) => "native",
        });
        assert_eq!(json!(fit), case["fit"], "{case}");
    }
    for case in cases("tags.json", "choices") {
        let tags = case["tags"].as_array().unwrap().iter().map(Value::as_str);
        assert_eq!(json!(runtime(&case).choose(tags)), case["choice"], "{case}");
    }
    for case in cases("tags.json", "runtimes") {
        assert_eq!(runtime(&case).to_string(), text(&case, "tag"), "{case}");
    }
    for case in cases("tags.json", "platforms") {
        assert_eq!(platform(text(&case, "sysname")), text(&case, "platform"));
    }
}

fn runtime(case: &Value) -> Runtime {
    let mpy = case["mpy"].as_u64().map(|number| number.try_into().unwrap());
    Runtime { mpy, platform: text(case, "platform").to_owned() }
}

#[test]
fn signatures_of_lists() {
    let path = format!("{}/vectors/signatures.json", env!("CARGO_MANIFEST_DIR"));
    let vectors: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    // Devices are given keys by their modulus; one of 2048 bits is none, and so nobody has signed with it.
    let good = |(name, hex): (&String, &Value)| (name.clone(), hex.as_str().unwrap().to_owned());
    let keys = vectors["keys"].as_object().unwrap().iter().map(good);
    let keys = plain_keys(keys.filter(|(name, _)| name != "short")).unwrap();
    let trust = Trust::Keys(keys.into());
    let channel = "dev".parse().unwrap();
    for case in cases("signatures.json", "lists") {
        let found = trust.verify(&channel, text(&case, "text").as_bytes(), None).err();
        let mut expected = case["refused"].as_str();
        if text(&case, "name") == "a key of 2048 bits" {
            expected = Some("unknown-key");
        }
        assert_eq!(found.as_ref().map(|error| error.word()), expected, "{}: {found:?}", case["name"]);
    }
}

#[test]
fn keys_that_are_no_keys() {
    let modulus = |size| PublicKey::new(Algorithm::Rsa3072, vec![0xff; size]);
    assert!(modulus(384).is_ok() && modulus(383).is_err() && modulus(256).is_err() && modulus(512).is_err());
    assert!(PublicKey::new(Algorithm::Rsa3072, [vec![0x7f], vec![0xff; 383]].concat()).is_err());
    assert!(PublicKey::new(Algorithm::Ed25519, vec![1; 31]).is_err());
}

/// A root of the vectors by its name, as it came.
fn root(name: &Value) -> Result<SignedRoot, RootError> {
    let path = format!("{}/vectors/roots.json", env!("CARGO_MANIFEST_DIR"));
    let vectors: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    SignedRoot::parse(text(&vectors["roots"], name.as_str().unwrap()).as_bytes())
}

fn word<T>(result: &Result<T, RootError>) -> Value {
    json!(result.as_ref().err().map(|_| "bad-root"))
}

#[test]
fn roots() {
    for case in cases("roots.json", "pins") {
        let pinned = root(&case["root"]).and_then(Root::pin);
        assert_eq!(word(&pinned), case["refused"], "{case}: {pinned:?}");
    }
    for case in cases("roots.json", "steps") {
        let from = Root::trusted(root(&case["from"]).unwrap());
        let number = case["number"].as_u64().unwrap();
        let next = root(&case["to"]).and_then(|to| from.next(number, to));
        assert_eq!(word(&next), case["refused"], "{case}: {:?}", next.err());
    }
    for case in cases("roots.json", "walks") {
        let mut at = root(&case["pin"]).and_then(Root::pin).unwrap();
        let refused = loop {
            let number = at.version() + 1;
            match &case["retained"][number.to_string()] {
                Value::Null => break Value::Null,
                name => match root(name).and_then(|root| at.next(number, root)) {
                    Ok(next) => at = next,
                    error => break word(&error),
                },
            }
        };
        assert_eq!((json!(at.version()), &refused), (case["version"].clone(), &case["refused"]), "{case}");
    }
}

#[test]
fn a_root_is_written_as_it_is_read() {
    for name in ["1", "4", "channels", "ed25519"] {
        let root = root(&json!(name)).unwrap();
        let written = root.draft().signed(&[]).unwrap();
        assert_eq!(written.draft(), root.draft(), "{name}");
        let signed = root.draft().covered().unwrap();
        assert!(signed.starts_with(br#"[{"type":"root","version":"#), "{name}");
    }
}

#[test]
fn answers_to_challenges() {
    for case in cases("roots.json", "times") {
        let root = Root::trusted(root(&case["root"]).unwrap());
        let answer = TimeAnswer::verify(text(&case, "text").as_bytes(), &root, None);
        let asked = |answer: &TimeAnswer| {
            answer.node.as_str() == text(&case, "node") && answer.nonce == text(&case, "nonce")
        };
        let time = answer.as_ref().ok().filter(|answer| asked(answer)).map(|answer| answer.time.to_string());
        assert_eq!(json!(time), case["time"], "{}: {answer:?}", case["name"]);
    }
}

#[test]
fn rollout_positions() {
    for case in cases("rollouts.json", "positions") {
        assert_eq!(json!(id(&case).position(text(&case, "node"))), case["position"], "{case}");
    }
    for case in cases("rollouts.json", "shares") {
        let jitter = number(&case, "jitter").try_into().unwrap();
        assert_eq!(json!(id(&case).share(text(&case, "node"), jitter)), case["share"], "{case}");
    }
    for case in cases("rollouts.json", "admits") {
        let percent: Percent = text(&case, "percent").parse().unwrap();
        let position = id(&case).position(text(&case, "node"));
        assert_eq!(json!(percent.admits(position)), case["in"], "{case}");
    }
    for case in cases("rollouts.json", "percents") {
        let percent = percent(&case).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(json!(percent.hundredths()), case["hundredths"], "{case}");
        assert_eq!(percent.to_string(), text(&case, "written"), "{case}");
    }
    for case in cases("rollouts.json", "invalid_percents") {
        assert_eq!(percent(&case).unwrap_err(), text(&case, "error"), "{case}");
    }
}

fn percent(case: &Value) -> Result<Percent, String> {
    let rollout = Rollout::read(&json!({ "id": "0123456789abcdef", "percent": case["percent"] }));
    rollout.map(|rollout| rollout.percent).map_err(|error| error.to_string())
}

fn id(case: &Value) -> RolloutId {
    text(case, "id").parse().unwrap()
}

fn number(case: &Value, key: &str) -> u64 {
    case[key].as_u64().unwrap_or_else(|| panic!("no number `{key}` in {case}"))
}

#[test]
fn rollout_queries() {
    for case in cases("rollouts.json", "queries") {
        let query: Query = text(&case, "query").parse().unwrap_or_else(|error| panic!("{case}: {error}"));
        let facts = &case["facts"];
        let fact = |key: &str| facts[key].as_str().map(Cow::from);
        let labels: Option<BTreeMap<String, String>> =
            serde_json::from_value(facts["labels"].clone()).unwrap();
        let facts = Facts {
            node: text(facts, "node").into(),
            runtime: fact("runtime"),
            channel: fact("channel"),
            version: fact("version"),
            sequence: facts["sequence"].as_u64(),
            agent: fact("agent"),
            firmware: fact("firmware"),
            labels: Cow::Owned(labels.unwrap_or_default()),
        };
        assert_eq!(json!(query.holds(&facts)), case["holds"], "{case}");
    }
    refused("rollouts.json", "invalid_queries", "query", |query| query.parse::<Query>());
}

#[test]
fn rollout_windows() {
    for case in cases("rollouts.json", "windows") {
        let window: Window = text(&case, "window").parse().unwrap();
        assert_eq!(window.to_string(), text(&case, "window"));
        let (now, offset) = (time(&case, "time").unwrap().as_second(), utc_offset(&case));
        assert_eq!(json!(window.opens_in(now, offset)), case["opens_in"], "{case}");
        assert_eq!(json!(window.closes_in(now, offset)), case["closes_in"], "{case}");
    }
    refused("rollouts.json", "invalid_windows", "window", |window| window.parse::<Window>());
    for case in cases("rollouts.json", "waits") {
        let rollout = Rollout::read(&case["rollout"]).unwrap();
        let moment =
            Moment { since: number(&case, "since"), wall: time(&case, "now"), utc_offset: utc_offset(&case) };
        assert_eq!(json!(rollout.wait(text(&case, "node"), moment)), case["wait"], "{case}");
    }
}

fn time(case: &Value, key: &str) -> Option<Timestamp> {
    case[key].as_str().map(|text| text.parse().unwrap())
}

fn utc_offset(case: &Value) -> i32 {
    case["utc_offset"].as_i64().unwrap().try_into().unwrap()
}

#[test]
fn rollouts() {
    for case in cases("rollouts.json", "valid") {
        let rollout = Rollout::read(&case["rollout"]).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(rollout.to_value().to_string(), case["written"].to_string(), "{case}");
        assert_eq!(Rollout::read(&case["written"]), Ok(rollout), "{case}");
    }
    for case in cases("rollouts.json", "invalid") {
        let error = Rollout::read(&case["rollout"]).unwrap_err();
        assert_eq!(error.to_string(), text(&case, "error"), "{case}");
    }
}
