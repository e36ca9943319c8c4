//! What holds for any input: parsers never panic, what was written is read again, paths stay inside.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers, too")]

use std::path::{Component, Path};

use mpypi_protocol::{
    BrokerUrl, ChannelName, Chunks, Digest, Entry, FilePath, NodeId, PackageId, Query, Runtime, Tag, Topic,
    UpdateList, limits,
    list::{Command, Firmware, Release, Signature, Src, Wheel},
    node::{Info, Phase, State, Uname},
    package::LegacyId,
    query::Facts,
    topic::{NodeSubject, check_filter, check_name, matches},
    wheel::{RecordLine, parse_headers, parse_record, write_record},
};
use proptest::{collection::vec, option, prelude::*};
use serde_json::{Map, Number, Value};

/// Texts that come close to what the parsers look for, so that the cases get past their first line.
fn near_misses() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        prop::sample::select(vec![
            "mpypi",
            "channels",
            "packages",
            "nodes",
            "wheel",
            "src",
            "firmware",
            "info",
            "/",
            "//",
            "+",
            "#",
            "$",
            "..",
            ".",
            "\\",
            ":",
            "@",
            "[",
            "]",
            "mqtt://",
            "%40",
            "%",
            "\"",
            "\"\"",
            ",",
            "sha256=",
            "mpy6_3",
            "py3",
            "-bytecode-",
            "-none-",
            "any",
            "=",
            "\n",
            "\r",
            " ",
            "\t",
            "{",
            "}",
            "{\"type\":",
            "\"src\"",
            "\"wheel\"",
            "\"release\"",
            "\"pkg_sha256\":",
            "\"path\":",
            "\"phase\":\"idle\"",
            "\"uname\":",
            "null",
            "1",
            "-1",
            "1e999",
            "é",
            "\u{0}",
            "\u{feff}",
            "::1",
            "1883",
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU",
        ])
        .prop_map(str::to_owned),
        any::<String>(),
    ];
    vec(pieces, 0..24).prop_map(|pieces| pieces.concat())
}

fn name() -> impl Strategy<Value = String> {
    "[a-z0-9]|[A-Za-z0-9][A-Za-z0-9._-]{0,10}[A-Za-z0-9]"
}

fn short_text() -> impl Strategy<Value = String> {
    "\\PC{1,20}".prop_filter("short", |text| text.len() <= 128)
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest::from)
}

/// Any path that the type accepts, wildcards included.
fn file_path() -> impl Strategy<Value = FilePath> {
    vec("[ -~éß日]{1,8}", 1..6).prop_filter_map("a good path", |parts| FilePath::new(parts.join("/")).ok())
}

fn topic_path() -> impl Strategy<Value = FilePath> {
    file_path().prop_filter_map("a path without wildcards", |path| path.for_topic().ok())
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_filter_map("finite", |x| Number::from_f64(x).map(Value::Number)),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((any::<String>(), inner), 0..4).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// Keys that no version of ours knows, in any order.
fn extra() -> impl Strategy<Value = Map<String, Value>> {
    vec(("x_[a-z]{1,6}", json()), 0..4).prop_map(|pairs| pairs.into_iter().collect())
}

/// The size of a package, and how it is cut.
fn size() -> impl Strategy<Value = (Option<u64>, Option<Chunks>)> {
    let cut = (limits::CHUNK_MIN..=limits::PACKAGE / 5, vec(digest(), 1..6), any::<u64>());
    let cut = cut.prop_map(|(size, digests, last)| {
        let total = (digests.len() as u64 - 1) * size + last % size + 1;
        (Some(total), Some(Chunks::new(total, size, digests).unwrap()))
    });
    prop_oneof![option::of(any::<u64>()).prop_map(|size| (size, None)), cut]
}

fn entry() -> impl Strategy<Value = Entry> {
    let unknown = ("later_[a-z]{0,5}", extra(), extra()).prop_map(|(kind, before, after)| {
        let mut map = before;
        map.insert("type".into(), kind.into());
        map.extend(after);
        Entry::Unknown(map)
    });
    let command =
        prop::sample::select(vec![Command::Check, Command::Install, Command::Rollback, Command::Restart]);
    let version = || "[A-Za-z0-9.!+_-]{1,12}";
    prop_oneof![
        (name(), version(), digest(), size(), option::of(short_text()), extra()).prop_map(
            |(name, version, digest, (size, chunks), tag, extra)| {
                Entry::Wheel(Wheel { name, version, digest, size, tag, chunks, extra })
            }
        ),
        (topic_path(), digest(), size(), extra()).prop_map(|(path, digest, (size, chunks), extra)| {
            Entry::Src(Src { path, digest, size, chunks, extra })
        }),
        (short_text(), short_text(), option::of(short_text()), digest(), size(), extra()).prop_map(
            |(name, version, target, digest, (size, chunks), extra)| {
                Entry::Firmware(Firmware { name, version, target, digest, size, chunks, extra })
            }
        ),
        (command, extra()).prop_map(|(command, extra)| Entry::Command(command, extra)),
        unknown,
    ]
}

fn release() -> impl Strategy<Value = Release> {
    let time = || {
        option::of(
            (0i64..250_000_000_000, 0i32..1_000_000_000)
                .prop_map(|(seconds, nanoseconds)| jiff::Timestamp::new(seconds, nanoseconds).unwrap()),
        )
    };
    let trust = (any::<u64>(), option::of(digest()), proptest::collection::vec(any::<u64>(), 0..4));
    (name(), any::<u64>(), short_text(), time(), time(), trust, extra()).prop_map(
        |(channel, sequence, version, created, expires, (epoch, previous, revoked), extra)| {
            let channel = ChannelName::new(channel).unwrap();
            Release { channel, sequence, version, created, expires, epoch, previous, revoked, extra }
        },
    )
}

fn signature() -> impl Strategy<Value = Signature> {
    (short_text(), short_text(), "[A-Za-z0-9+/=]{0,40}", extra())
        .prop_map(|(key, alg, sig, extra)| Signature { key, alg, sig, extra })
}

/// The parts of a list, in their order.
fn entries() -> impl Strategy<Value = Vec<Entry>> {
    (option::of(release()), vec(entry(), 0..12), option::of(signature())).prop_map(|(first, middle, last)| {
        let first = first.map(Entry::Release).into_iter();
        first.chain(middle).chain(last.map(Entry::Signature)).collect()
    })
}

fn topic() -> impl Strategy<Value = Topic> {
    let subject = prop::sample::select(vec![
        NodeSubject::Info,
        NodeSubject::State,
        NodeSubject::Online,
        NodeSubject::Cmd,
        NodeSubject::Log,
    ]);
    let node = "[^/+#\\pC]{1,30}".prop_filter_map("a good node name", |node| NodeId::new(node).ok());
    prop_oneof![
        name().prop_map(|name| Topic::Channel(ChannelName::new(name).unwrap())),
        digest().prop_map(|digest| Topic::Package(PackageId::Wheel(digest))),
        digest().prop_map(|digest| Topic::Package(PackageId::Firmware(digest))),
        (topic_path(), digest()).prop_map(|(path, digest)| Topic::Package(PackageId::Src(path, digest))),
        digest().prop_map(|digest| Topic::Legacy(LegacyId::Digest(digest))),
        (digest(), 0..1024u32).prop_map(|(package, number)| Topic::Chunk(package, number)),
        topic_path().prop_map(|path| Topic::Legacy(LegacyId::Src(path))),
        topic_path().prop_map(|path| Topic::Legacy(LegacyId::Path(path))),
        node.clone().prop_map(Topic::Edge),
        (node, subject).prop_map(|(node, subject)| Topic::Node(node, subject)),
        "[a-z$ ]{1,5}(/[a-z$ ]{0,5}){0,5}".prop_map(Topic::Other),
    ]
}

/// MQTT 4.7, said another way than the crate says it: by cutting one level off both ends at a time.
fn matches_reference(filter: &str, name: &str) -> bool {
    fn levels(filter: Option<&str>, name: Option<&str>) -> bool {
        fn cut(text: &str) -> (&str, Option<&str>) {
            match text.find('/') {
                Some(at) => (&text[..at], Some(&text[at + 1..])),
                None => (text, None),
            }
        }
        match (filter, name) {
            (None, None) | (Some("#"), _) => true,
            (None, Some(_)) | (Some(_), None) => false,
            (Some(filter), Some(name)) => {
                let ((want, filter), (have, name)) = (cut(filter), cut(name));
                (want == have || want == "+") && levels(filter, name)
            }
        }
    }
    let hidden = name.starts_with('$') && !filter.starts_with('$');
    !hidden && levels(Some(filter), Some(name))
}

/// Every parser of bytes and of text sees `bytes`.
fn parse_everything(bytes: &[u8]) {
    let _ = UpdateList::parse(bytes);
    let _ = State::parse(bytes);
    let _ = Info::parse(bytes);
    let text = String::from_utf8_lossy(bytes);
    if let Ok(topic) = Topic::parse(&text) {
        assert_eq!(topic.to_string(), text);
    }
    if let Ok(lines) = parse_record(&text) {
        assert_eq!(parse_record(&write_record(&lines)), Ok(lines));
    }
    if let Ok(tag) = Tag::new(text.as_ref()) {
        assert!(tag.singles().count() >= 1);
        assert_eq!(tag.to_string(), text);
    }
    let _ = Runtime { mpy: Some(2822), platform: "linux".into() }.fit(Some(&text));
    let _ = check_filter(&text);
    let _ = check_name(&text);
    let _ = matches(&text, &text);
    let _ = parse_headers(&text);
    let _ = text.parse::<BrokerUrl>();
    let _ = FilePath::new(&*text).and_then(FilePath::for_topic);
    let _ = text.parse::<Digest>();
    let _ = text.parse::<ChannelName>();
    let _ = text.parse::<NodeId>();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn no_bytes_make_a_parser_panic(bytes in vec(any::<u8>(), 0..600)) {
        parse_everything(&bytes);
    }

    #[test]
    fn no_near_miss_makes_a_parser_panic(text in near_misses()) {
        parse_everything(text.as_bytes());
    }

    #[test]
    fn a_list_with_one_byte_changed_makes_no_parser_panic(entries in entries(), at in any::<prop::sample::Index>(), byte: u8) {
        if let Ok(list) = UpdateList::new(entries) {
            let mut bytes = list.to_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(list) = UpdateList::parse(&bytes) {
                prop_assert_eq!(UpdateList::parse(&list.to_bytes()).unwrap(), list);
            }
        }
    }

    #[test]
    fn what_is_made_of_entries_is_those_entries_and_is_read_again(entries in entries()) {
        // Only a package, file or folder that stands twice is refused.
        match UpdateList::new(entries.clone()) {
            Ok(list) => {
                let bytes = list.to_bytes();
                let again = UpdateList::parse(&bytes).unwrap();
                prop_assert_eq!(again.entries(), &entries[..]);
                prop_assert_eq!(again.to_bytes(), bytes);
                for (had, has) in entries.iter().zip(again.entries()) {
                    prop_assert_eq!(keys(had), keys(has));
                }
                for piece in again.pieces() {
                    prop_assert!(matches!(Topic::parse(&piece.topic), Ok(Topic::Package(_) | Topic::Chunk(..))));
                }
                for (id, _) in again.packages() {
                    prop_assert_eq!(Topic::parse(&id.topic()), Ok(Topic::Package(id)));
                }
            }
            Err(error) => {
                let text = error.to_string();
                prop_assert!(text.contains("twice") || text.contains("below it"), "{}", text);
            }
        }
    }

    #[test]
    fn a_list_made_of_anything_can_be_read(map in extra(), known in extra(), kind in "release|wheel|src|check|[a-z]{0,3}", text in any::<String>()) {
        let mut wheel = Wheel {
            name: text.clone(), version: text, digest: Digest::EMPTY, size: None, tag: None, chunks: None, extra: known,
        };
        wheel.extra.insert("size".into(), kind.clone().into());
        let mut unknown = map;
        unknown.insert("type".into(), kind.into());
        for entries in [vec![Entry::Wheel(wheel)], vec![Entry::Unknown(unknown)]] {
            if let Ok(list) = UpdateList::new(entries) {
                prop_assert_eq!(UpdateList::parse(&list.to_bytes()).unwrap(), list);
            }
        }
    }

    #[test]
    fn a_topic_is_read_as_it_is_written(topic in topic()) {
        let name = topic.to_string();
        match Topic::parse(&name) {
            Ok(found) => prop_assert_eq!(&found.to_string(), &name),
            Err(error) => prop_assert!(matches!(topic, Topic::Legacy(_)), "{}: {}", name, error),
        }
        // A file of an earlier layout may be called like a folder of the present one.
        if !matches!(topic, Topic::Legacy(_)) {
            prop_assert_eq!(Topic::parse(&name), Ok(topic));
        }
    }

    #[test]
    fn a_path_never_leaves_its_root(text in near_misses(), good in file_path()) {
        let root = Path::new("/root/of/device");
        for path in FilePath::new(text).into_iter().chain([good]) {
            let joined = root.join(path.as_str());
            prop_assert!(joined.starts_with(root) && joined != root, "{}", joined.display());
            let mut below = joined.strip_prefix(root).unwrap().components();
            prop_assert!(below.all(|part| matches!(part, Component::Normal(_))), "{}", joined.display());
            prop_assert_eq!(joined.to_str().unwrap().len(), root.to_str().unwrap().len() + 1 + path.as_str().len());
            prop_assert_eq!(path.parents().count() + 1, Path::new(path.as_str()).components().count());
        }
    }

    #[test]
    fn matches_agrees_with_the_reference(
        filter in "(\\$|a|b|\\+|#|é|)(/(a|b|\\+|#|\\$|)){0,4}",
        name in "(\\$|a|b|é|)(/(a|b|\\$|)){0,4}",
    ) {
        prop_assume!(check_filter(&filter).is_ok() && check_name(&name).is_ok());
        prop_assert_eq!(matches(&filter, &name), matches_reference(&filter, &name), "{} {}", filter, name);
        prop_assert!(matches(&name, &name));
    }

    #[test]
    fn a_record_is_read_as_it_is_written(
        lines in vec((file_path(), option::of(digest()), option::of(any::<u64>())), 0..8),
    ) {
        let mut lines: Vec<_> =
            lines.into_iter().map(|(path, digest, size)| RecordLine { path, digest, size }).collect();
        lines.sort_by(|a, b| a.path.cmp(&b.path));
        lines.dedup_by(|a, b| a.path == b.path);
        prop_assert_eq!(parse_record(&write_record(&lines)), Ok(lines));
    }

    #[test]
    fn no_text_makes_a_query_panic_and_what_can_be_read_is_shown_as_it_was(
        text in "([a-z=~<>!'\"() ]|node|label\\.x| and | or | not ){0,12}", node: String,
    ) {
        if let Ok(query) = text.parse::<Query>() {
            let facts = Facts { node: node.into(), ..Facts::default() };
            prop_assert_eq!(query.as_str(), &text);
            // One level more may be too deep.
            if let Ok(not) = format!("not ({query})").parse::<Query>() {
                prop_assert_ne!(query.holds(&facts), not.holds(&facts));
            }
        }
    }

    #[test]
    fn a_node_message_is_read_as_it_is_written(
        version in option::of(any::<String>()), error in option::of(any::<String>()), sequence in option::of(any::<u64>()),
        done: u64, total: u64, attempt: u32, extra in extra(), sysname: String, free in option::of(any::<u64>()),
        versions in prop::collection::btree_map(any::<String>(), any::<String>(), 0..4),
    ) {
        let state = State { phase: Phase::Failed, sequence, version, done, total, error, attempt, held: sequence, extra: extra.clone() };
        prop_assert_eq!(State::parse(&state.to_bytes()).unwrap(), state);
        let uname = Uname { sysname: sysname.clone(), machine: sysname.clone(), version: sysname };
        let labels = versions.clone();
        let info = Info { uname, versions, channel: None, agent: None, free, labels, utc_offset: Some(-60), extra };
        prop_assert_eq!(Info::parse(&info.to_bytes()).unwrap(), info);
    }

    #[test]
    fn an_address_is_shown_without_its_password(user in "[a-z]{1,8}", password in "[A-Z]{4,9}", host in "[a-z0-9.-]{1,12}", port in 1u16..) {
        let url: BrokerUrl = format!("mqtt://{user}:{password}@{host}:{port}").parse().unwrap();
        prop_assert_eq!((url.host.as_str(), url.port), (host.as_str(), port));
        prop_assert_eq!(&url.credentials, &Some((user, password.clone())));
        let shown = format!("{url} {url:?}");
        prop_assert!(!shown.contains(&password), "{}", shown);
        let again: BrokerUrl = url.to_string().parse().unwrap();
        prop_assert_eq!((again.host, again.port, again.credentials), (host, port, None));
    }
}

/// The keys that an entry keeps without knowing them, in their order.
fn keys(entry: &Entry) -> Vec<&String> {
    match entry {
        Entry::Release(release) => release.extra.keys(),
        Entry::Wheel(wheel) => wheel.extra.keys(),
        Entry::Src(src) => src.extra.keys(),
        Entry::Firmware(image) => image.extra.keys(),
        Entry::Signature(signature) => signature.extra.keys(),
        Entry::Command(_, extra) | Entry::Unknown(extra) => extra.keys(),
        _ => return Vec::new(),
    }
    .collect()
}

#[test]
fn deep_nesting_is_refused_and_overflows_no_stack() {
    for text in [
        "[".repeat(500_000),
        "{\"a\":".repeat(100_000),
        format!("[{{\"type\":\"x\",\"y\":{}", "[".repeat(400_000)),
    ] {
        assert!(UpdateList::parse(text.as_bytes()).is_err());
        assert!(State::parse(&text.as_bytes()[..60_000]).is_err());
        assert!(Info::parse(&text.as_bytes()[..60_000]).is_err());
    }
}

#[test]
fn what_is_too_large_is_refused_unread() {
    let blank = vec![b' '; 1024 * 1024 + 1];
    assert_eq!(
        UpdateList::parse(&blank).unwrap_err().to_string(),
        "a list of 1048577 bytes is larger than 1048576"
    );
    let error = State::parse(&blank[..65537]).unwrap_err();
    assert_eq!(error.to_string(), "a message of 65537 bytes is larger than 65536");
    let entries = vec!["{\"type\":\"x\"}"; 16 * 1024 + 1].join(",");
    let error = UpdateList::parse(format!("[{entries}]").as_bytes()).unwrap_err();
    assert_eq!(error.to_string(), "16385 entries are more than 16384");
    let unknown = Map::from_iter([("type".to_owned(), Value::from("x"))]);
    let error = UpdateList::new(vec![Entry::Unknown(unknown); 16 * 1024 + 1]).unwrap_err();
    assert_eq!(error.to_string(), "16385 entries are more than 16384");
}
