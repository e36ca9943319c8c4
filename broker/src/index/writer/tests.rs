//! The writer on a real folder, with time as an argument.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, PoisonError},
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{
    door::admit,
    index::Step,
    packet::{Publish, Qos},
};

struct Shelf {
    folder: TempDir,
    writer: Option<Writer>,
    announced: Arc<Mutex<Vec<Arc<Message>>>>,
    now: Now,
}

fn bytes(seed: u8, size: usize) -> Vec<u8> {
    (0..size).map(|n| seed ^ (n as u8)).collect()
}

/// Larger than what stays inside a record.
fn large(seed: u8) -> Vec<u8> {
    bytes(seed, INLINE + 1)
}

fn publish(topic: &str, payload: &[u8], expiry: Option<u32>) -> Publish {
    let properties = crate::packet::Properties { expiry, ..Default::default() };
    Publish {
        topic: topic.to_owned(),
        payload: Bytes::copy_from_slice(payload),
        qos: Qos::AtLeastOnce,
        retain: true,
        packet_id: 1,
        duplicate: false,
        properties,
    }
}

fn wheel(payload: &[u8]) -> String {
    PackageId::Wheel(Digest::of(payload)).topic()
}

fn list(sequence: u32, payload: &[u8]) -> Vec<u8> {
    format!(
        r#"[{{"type":"release","channel":"dev","sequence":{sequence},"version":"1"}},
            {{"type":"wheel","name":"p","version":"1","pkg_sha256":"{}"}}]"#,
        Digest::of(payload)
    )
    .into_bytes()
}

impl Shelf {
    fn new() -> Shelf {
        let mut shelf = Shelf {
            folder: tempfile::tempdir().unwrap(),
            writer: None,
            announced: Arc::default(),
            now: clock::now(),
        };
        shelf.reopen();
        shelf
    }

    fn reopen(&mut self) {
        self.writer = None;
        let index = Index::open(self.folder.path()).unwrap();
        let (announced, reader) = (self.announced.clone(), index.clone());
        let now_ms = self.now.unix_ms;
        let announce = Box::new(move |message: Arc<Message>| {
            if let Some(version) = message.record() {
                // Durable before anyone hears of it. A later one of the same commit may be there already.
                let kept = reader.get(&message.topic, now_ms).unwrap();
                assert!(kept.is_none_or(|kept| kept.version >= version));
            }
            announced.lock().unwrap().push(message);
        });
        self.writer = Some(Writer::new(index, Limits::default(), announce).unwrap());
    }

    fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().unwrap()
    }

    /// Settles all in one commit; for each whether it was kept.
    fn settle(&mut self, all: &[Publish]) -> Vec<Result<(), Reason>> {
        let (to, mut settled) = mpsc::unbounded_channel();
        let ops = all.iter().enumerate().map(|(n, publish)| Op {
            admitted: admit(publish.clone(), &Limits::default()),
            topic: publish.topic.as_str().into(),
            origin: SessionId(1),
            reply: Some(Reply { to: to.clone(), packet_id: n as u16 }),
            place: None,
        });
        let (ops, now) = (ops.collect(), self.now);
        self.writer().settle(ops, now).unwrap();
        let results = (0..all.len()).map(|n| {
            let settled = settled.try_recv().unwrap();
            assert_eq!(usize::from(settled.packet_id), n, "in order");
            settled.result.map_err(|refusal| refusal.reason)
        });
        results.collect()
    }

    #[track_caller]
    fn keep(&mut self, topic: &str, payload: &[u8]) {
        assert_eq!(self.settle(&[publish(topic, payload, None)]), [Ok(())]);
    }

    fn sweep_after(&mut self, seconds: u64) {
        self.now.instant += Duration::from_secs(seconds);
        self.now.unix_ms += seconds * 1000;
        let now = self.now;
        self.writer().sweep(now).unwrap();
    }

    fn read(&mut self, topic: &str) -> Option<Vec<u8>> {
        let now_ms = self.now.unix_ms;
        let writer = self.writer();
        let message = writer.index.get(topic, now_ms).unwrap()?;
        let body = match message.payload {
            Payload::Inline(bytes) => Body::Inline(bytes.to_vec()),
            Payload::Blob(digest, len) => Body::Blob { digest: *digest.as_bytes(), len },
        };
        // Past the cache: what counts is the file.
        if let Body::Blob { digest, len } = &body {
            let path = self.folder.path().join("blobs").join(Digest::from(*digest).to_string());
            assert_eq!(fs::metadata(path).unwrap().len(), *len);
        }
        Some(self.writer().bytes(body).unwrap())
    }

    fn files(&self) -> usize {
        fs::read_dir(self.folder.path().join("blobs")).unwrap().count()
    }
}

#[test]
fn a_blob_of_two_topics_stays_until_the_second_lets_go() {
    let mut shelf = Shelf::new();
    for topic in ["a", "b"] {
        shelf.keep(topic, &large(1));
    }
    shelf.keep("a", b"");
    shelf.sweep_after(1000);
    assert_eq!(shelf.read("b"), Some(large(1)));
    shelf.keep("b", b"small");
    assert_eq!(shelf.files(), 1, "somebody may be reading it");
    shelf.sweep_after(1000);
    assert_eq!((shelf.files(), shelf.read("b")), (0, Some(b"small".to_vec())));
}

#[test]
fn replaced_again_and_again_within_one_commit_only_the_last_remains() {
    let mut shelf = Shelf::new();
    let all = [large(1), large(2), large(1), Vec::new(), large(1), large(3), large(1)]
        .map(|payload| publish("a", &payload, None));
    assert!(shelf.settle(&all).iter().all(Result::is_ok));
    shelf.sweep_after(1000);
    assert_eq!((shelf.files(), shelf.read("a")), (1, Some(large(1))));
    shelf.reopen();
    assert_eq!((shelf.files(), shelf.read("a")), (1, Some(large(1))));
}

#[test]
fn a_blob_that_comes_back_within_its_grace_stays_and_gets_a_new_grace() {
    let mut shelf = Shelf::new();
    shelf.keep("a", &large(1));
    shelf.keep("a", b"");
    shelf.sweep_after(50);
    shelf.keep("a", &large(1));
    shelf.keep("a", b"");
    shelf.sweep_after(50);
    assert_eq!(shelf.files(), 1, "cleared 50 s ago");
    shelf.keep("a", &large(1));
    shelf.sweep_after(1000);
    assert_eq!(shelf.read("a"), Some(large(1)));
}

#[test]
fn the_same_again_changes_nothing_but_replaces_a_file_that_was_lost() {
    let mut shelf = Shelf::new();
    shelf.keep("a", &large(1));
    let version = shelf.writer().version;
    fs::remove_dir_all(shelf.folder.path().join("blobs")).unwrap();
    fs::create_dir(shelf.folder.path().join("blobs")).unwrap();
    shelf.keep("a", &large(1));
    assert_eq!((shelf.writer().version, shelf.read("a")), (version, Some(large(1))));
    shelf.keep("a", b"");
    shelf.sweep_after(1000);
    assert_eq!(shelf.files(), 0, "it was counted once");
}

#[test]
fn expiry_takes_a_record_and_leaves_a_blob_that_another_topic_names() {
    let mut shelf = Shelf::new();
    shelf.settle(&[publish("a", &large(1), Some(10)), publish("b", &large(1), None)]);
    shelf.settle(&[publish("c", b"x", Some(10)), publish("c", b"x", None)]);
    shelf.sweep_after(11);
    shelf.sweep_after(1000);
    assert_eq!(shelf.read("a"), None);
    assert_eq!(shelf.read("b"), Some(large(1)));
    assert_eq!(shelf.read("c"), Some(b"x".to_vec()), "the later one does not expire");
    let transaction = shelf.writer().index.database.begin_read().unwrap();
    assert_eq!(transaction.open_table(EXPIRIES).unwrap().len().unwrap(), 0);
}

#[test]
fn what_the_disk_does_not_take_is_refused_and_the_rest_of_the_commit_is_kept() {
    let mut shelf = Shelf::new();
    shelf.keep("b", &large(1));
    fs::remove_dir_all(shelf.folder.path().join("tmp")).unwrap();
    let all = ["a", "b", "c"].map(|topic| publish(topic, &large(2), None));
    let small = publish("d", b"small", None);
    assert_eq!(
        shelf.settle(&[&all[..], &[small]].concat()),
        [Err(Reason::QuotaExceeded), Err(Reason::QuotaExceeded), Err(Reason::QuotaExceeded), Ok(())]
    );
    shelf.reopen();
    assert_eq!((shelf.read("a"), shelf.read("b")), (None, Some(large(1))));
    assert_eq!((shelf.read("d"), shelf.files()), (Some(b"small".to_vec()), 1));
    assert!(shelf.announced.lock().unwrap().iter().all(|message| !["a", "c"].contains(&&*message.topic)));
}

#[test]
fn packages_and_the_list_that_names_them_may_share_a_commit_but_only_in_that_order() {
    let mut shelf = Shelf::new();
    let payload = large(1);
    let (package, topic) = (publish(&wheel(&payload), &payload, None), "mpypi/channels/dev");
    let forget = publish(&wheel(&payload), b"", None);
    let release = |n| publish(topic, &list(n, &payload), None);
    let refused = Err(Reason::PayloadFormatInvalid);
    assert_eq!(shelf.settle(&[release(1), package.clone(), release(1)]), [refused, Ok(()), Ok(())]);
    assert_eq!(
        shelf.settle(&[forget.clone(), release(1), release(3), release(2)]),
        [
            refused,
            Ok(()), // the same again
            Ok(()),
            refused
        ]
    );
    shelf.reopen();
    assert_eq!(shelf.settle(&[release(2), forget.clone()]), [refused, refused], "known after a restart");
    let empty = publish(topic, br#"[{"type":"release","channel":"dev","sequence":4,"version":"1"}]"#, None);
    assert_eq!(shelf.settle(&[empty, forget, release(5)]), [Ok(()), Ok(()), refused]);
}

#[test]
fn a_list_that_would_expire_is_refused_and_a_package_expires_only_while_no_list_names_it() {
    let mut shelf = Shelf::new();
    let refused = [Err(Reason::ImplementationSpecificError)];
    assert_eq!(shelf.settle(&[publish("mpypi/channels/dev", b"[]", Some(10))]), refused);

    let (named, other) = (large(1), large(2));
    let packages = [&named, &other].map(|payload| publish(&wheel(payload), payload, Some(10)));
    let release = |n, payload: &[u8]| publish("mpypi/channels/dev", &list(n, payload), None);
    let all = [&packages[..], &[release(1, &named)]].concat();
    assert_eq!(shelf.settle(&all), [Ok(()), Ok(()), Ok(())]);
    assert_eq!(shelf.settle(&packages[..1]), [Ok(())], "again, now that it is named");
    shelf.sweep_after(11);
    assert_eq!((shelf.read(&wheel(&named)), shelf.read(&wheel(&other))), (Some(named), None));
    let missing = [Err(Reason::PayloadFormatInvalid)];
    assert_eq!(shelf.settle(&[release(2, &other)]), missing, "what has expired is not there");
}

#[test]
fn a_message_that_was_replaced_is_not_current_and_neither_is_a_clear_that_was_refilled() {
    let mut shelf = Shelf::new();
    for payload in [&b"1"[..], b"2", b"", b"3"] {
        shelf.keep("a", payload);
    }
    let announced = shelf.announced.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let index = &shelf.writer().index;
    let current: Vec<_> = announced.iter().map(|message| index.is_current(message).unwrap()).collect();
    assert_eq!(current, [false, false, false, true]);
}

#[test]
fn a_damaged_record_hides_no_other_and_can_be_replaced() {
    let mut shelf = Shelf::new();
    for topic in ["a", "b", "c"] {
        shelf.keep(topic, b"x");
    }
    let transaction = shelf.writer().index.database.begin_write().unwrap();
    transaction.open_table(RECORDS).unwrap().insert("b", &[0xff_u8; 3][..]).unwrap();
    transaction.commit().unwrap();
    let (index, mut after, mut found) = (shelf.writer().index.clone(), None, Vec::new());
    while let Step::Found(message) = index.next("#", after.as_deref(), 0, 0).unwrap() {
        after = Some(message.topic.to_string());
        found.push(message.topic);
    }
    assert_eq!(found, ["a".into(), "c".into()]);
    shelf.keep("b", b"new");
    assert_eq!(shelf.read("b"), Some(b"new".to_vec()));
}

#[test]
fn an_index_of_another_format_is_left_alone() {
    let mut shelf = Shelf::new();
    let transaction = shelf.writer().index.database.begin_write().unwrap();
    transaction.open_table(META).unwrap().insert(super::super::record::FORMAT, 99).unwrap();
    transaction.commit().unwrap();
    shelf.writer = None;
    let error = Index::open(shelf.folder.path()).unwrap_err();
    assert!(matches!(error, IndexError::Format { found: 99, .. }), "{error}");
}

#[test]
fn a_full_index_refuses_new_topics_and_takes_new_values() {
    let mut shelf = Shelf::new();
    shelf.writer().limits.retained = 1;
    shelf.keep("a", b"1");
    assert_eq!(shelf.settle(&[publish("b", b"1", None)]), [Err(Reason::QuotaExceeded)]);
    shelf.keep("a", &large(2));
    shelf.keep("a", b"");
    shelf.keep("b", b"1");
}

/// What may happen to a shelf.
#[derive(Debug, Clone)]
enum Event {
    Commit(Vec<(u8, u8, bool, Option<u32>)>),
    Sweep(u64),
    Reopen,
}

fn event() -> impl Strategy<Value = Event> {
    let message = (0..4_u8, 0..4_u8, any::<bool>(), prop::option::weighted(0.3, 1..100_u32));
    prop_oneof![
        4 => prop::collection::vec(message, 1..6).prop_map(Event::Commit),
        2 => (0..100_u64).prop_map(Event::Sweep),
        1 => Just(Event::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_every_topic_reads_what_was_acknowledged_last(
        events in prop::collection::vec(event(), 1..15)
    ) {
        let mut shelf = Shelf::new();
        let mut model: BTreeMap<String, (Vec<u8>, Option<u64>)> = BTreeMap::new();
        for event in events {
            match event {
                Event::Commit(messages) => {
                    let all: Vec<_> = messages
                        .iter()
                        .map(|(topic, seed, is_large, expiry)| {
                            let payload = match (seed, is_large) {
                                (0, _) => Vec::new(),
                                (seed, true) => large(*seed),
                                (seed, false) => bytes(*seed, 10),
                            };
                            publish(&format!("t{topic}"), &payload, *expiry)
                        })
                        .collect();
                    prop_assert!(shelf.settle(&all).iter().all(Result::is_ok));
                    for publish in all {
                        let expires = expiry(publish.properties.expiry, shelf.now);
                        model.insert(publish.topic, (publish.payload.to_vec(), expires));
                    }
                }
                Event::Sweep(seconds) => shelf.sweep_after(seconds),
                Event::Reopen => shelf.reopen(),
            }
            for (topic, (payload, expires)) in &model {
                let gone = payload.is_empty() || expires.is_some_and(|at| at <= shelf.now.unix_ms);
                prop_assert_eq!(shelf.read(topic), (!gone).then(|| payload.clone()), "{}", topic);
            }
        }
        // In the end nothing is held for nobody.
        shelf.sweep_after(1000);
        shelf.sweep_after(1000);
        let named: HashSet<_> = model
            .values()
            .filter(|(payload, expires)| payload.len() > INLINE && expires.is_none())
            .map(|(payload, _)| payload)
            .collect();
        prop_assert_eq!(shelf.files(), named.len());
    }
}
