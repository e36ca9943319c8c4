//! What strangers write and devices read: lists, topics, filters, paths, the texts inside a wheel, and what
//! nodes say. Each input goes to every parser.

#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use mpypi_protocol::{
    BrokerUrl, ChannelName, Digest, FilePath, NodeId, Topic, UpdateList, limits,
    node::{Info, State},
    topic::{check_filter, check_name, matches},
    wheel::{dist_info, normalized_name, parse_headers, parse_record, write_record},
};

/// A list is the same again after a round trip, and its packages have topics of their own.
fn list(bytes: &[u8]) {
    let Ok(list) = UpdateList::parse(bytes) else { return };
    assert!(bytes.len() <= limits::LIST && list.entries().len() <= limits::LIST_ENTRIES);
    let written = list.to_bytes();
    // Compact JSON is seldom longer than what it was read from, but escapes and numbers may be.
    if written.len() <= limits::LIST {
        let again = UpdateList::parse(&written).expect("what was read can be read again");
        assert_eq!(again, list);
        assert_eq!(again.to_bytes(), written, "bytes change with each round");
    }
    for (id, _) in list.packages() {
        assert_eq!(Topic::parse(&id.topic()).as_ref(), Ok(&Topic::Package(id)));
    }
}

/// A path stays below any root, on any device.
fn path(text: &str) {
    let Ok(path) = FilePath::new(text) else { return };
    assert_eq!(path.as_str(), text);
    assert!(text.len() <= limits::PATH && path.parents().count() < limits::PATH_COMPONENTS);
    let root = Path::new("/root");
    let joined = root.join(text);
    let mut below = joined.strip_prefix(root).expect("it stays below its root").components();
    assert!(below.all(|part| matches!(part, Component::Normal(_))), "{text}");
    if let Ok(path) = path.for_topic() {
        assert!(check_name(path.as_str()).is_ok(), "{text}");
    }
}

fn topic(text: &str) {
    if let Ok(topic) = Topic::parse(text) {
        assert_eq!(topic.to_string(), text);
        assert!(check_name(text).is_ok());
    }
    // A subscription to `$share/…` is to what follows the name of those who share it.
    if check_name(text).is_ok() && !text.starts_with("$share/") {
        assert!(check_filter(text).is_ok() && matches(text, text), "a name is its own filter");
        assert_eq!(matches("#", text), !text.starts_with('$'));
    }
    if let Some((filter, name)) = text.split_once('\n')
        && check_filter(filter).is_ok()
        && check_name(name).is_ok()
        && matches(filter, name)
    {
        assert!(!name.starts_with('$') || filter.starts_with('$'));
        // `#` below the filter's parent takes whatever the filter took.
        if let Some((parent, last)) = filter.rsplit_once('/')
            && last != "#"
        {
            assert!(matches(&format!("{parent}/#"), name), "{filter} {name}");
        }
    }
}

fn wheel(text: &str) {
    if let Ok(lines) = parse_record(text) {
        assert_eq!(parse_record(&write_record(&lines)), Ok(lines));
    }
    if let Ok(headers) = parse_headers(text) {
        assert!(headers.iter().all(|(key, _)| !key.is_empty() && !key.contains(['\n', ':'])));
    }
    let normal = normalized_name(text);
    assert_eq!(normalized_name(&normal), normal);
    assert!(dist_info(text, text).ends_with(".dist-info"));
}

fn node(bytes: &[u8]) {
    if let Ok(state) = State::parse(bytes) {
        assert_eq!(State::parse(&state.to_bytes()).expect("read again"), state);
    }
    if let Ok(info) = Info::parse(bytes) {
        assert_eq!(Info::parse(&info.to_bytes()).expect("read again"), info);
    }
}

fn names(text: &str) {
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Ok(channel) = text.parse::<ChannelName>() {
        assert_eq!(Topic::parse(&channel.topic()), Ok(Topic::Channel(channel)));
    }
    if let Ok(node) = text.parse::<NodeId>() {
        assert_eq!(node.as_str(), text);
    }
    if let Ok(url) = text.parse::<BrokerUrl>() {
        let shown = url.to_string();
        let again: BrokerUrl = shown.parse().expect("an address is read as it is shown");
        assert_eq!((again.host, again.port), (url.host, url.port), "{shown}");
    }
}

fuzz_target!(|data: &[u8]| {
    list(data);
    node(data);
    let Ok(text) = std::str::from_utf8(data) else { return };
    path(text);
    topic(text);
    wheel(text);
    names(text);
});
