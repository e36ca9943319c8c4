//! The writer on a real folder, with time as an argument.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, PoisonError, atomic::AtomicBool},
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::index::Step;

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
        let announce = Box::new(move |message: Arc<Message>, _| {
            if let Some(version) = message.record() {
                // Durable before anyone hears of it. A later one of the same commit may be there already.
                let kept = reader.get(&message.topic, now_ms).unwrap();
                assert!(kept.is_none_or(|kept| kept.version >= version));
            }
            announced.lock().unwrap().push(message);
        });
        self.writer = Some(Writer::new(index, Arc::default(), Arc::default(), announce).unwrap());
    }

    fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().unwrap()
    }

    /// Settles all in one commit; for each whether it was kept.
    fn settle(&mut self, all: &[Publish]) -> Vec<Result<(), Reason>> {
        let to = Arc::new(Mailbox::new(&Limits::default()));
        let ops = all.iter().enumerate().map(|(n, publish)| {
            Op::Publish(Box::new(Submission {
                admitted: admit(publish.clone(), &Limits::default()),
                topic: publish.topic.as_str().into(),
                origin: SessionId(1),
                reply: Some(Reply { to: to.clone(), packet_id: n as u16 }),
                place: None,
                expected: None,
            }))
        });
        let (ops, now) = (ops.collect(), self.now);
        self.writer().settle(ops, now).unwrap();
        let results = (0..all.len()).map(|n| {
            let Some(Settled::Published { packet_id, result }) = to.pop_settled() else { panic!() };
            assert_eq!(usize::from(packet_id), n, "in order");
            result.map_err(|refusal| refusal.reason)
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
        Some(self.writer().index.bytes(&body).unwrap())
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
    let transaction = shelf.writer().index.store.begin_read().unwrap();
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
    let transaction = shelf.writer().index.store.begin_write().unwrap();
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
    let transaction = shelf.writer().index.store.begin_write().unwrap();
    transaction.open_table(META).unwrap().insert(super::super::record::FORMAT, 99).unwrap();
    transaction.commit().unwrap();
    shelf.writer = None;
    let error = Index::open(shelf.folder.path()).unwrap_err();
    assert!(matches!(error, IndexError::Format { found: 99, .. }), "{error}");
}

#[test]
fn a_database_at_rest_opens_after_a_crash_without_being_read_through() {
    let mut shelf = Shelf::new();
    let is_repaired = |shelf: &Shelf| {
        // What is there when the process dies.
        let copy = shelf.folder.path().join("copy.redb");
        fs::copy(shelf.folder.path().join("index.redb"), &copy).unwrap();
        let repaired = Arc::new(AtomicBool::new(false));
        let note = repaired.clone();
        let mut builder = redb::Database::builder();
        builder.set_repair_callback(move |_| note.store(true, Ordering::Relaxed));
        drop(builder.open(&copy).unwrap());
        repaired.load(Ordering::Relaxed)
    };
    let look_after = |shelf: &mut Shelf| {
        let (mut swept, now) = (shelf.now.instant, shelf.now);
        shelf.writer().look_after(&mut swept, now).unwrap();
    };
    for n in [1, 2] {
        shelf.settle(&[publish("t", &[n], None)]);
        look_after(&mut shelf);
        assert!(is_repaired(&shelf));
        let now = shelf.now;
        assert_eq!(shelf.writer().patience(now), REST);
        shelf.now.instant += REST;
        look_after(&mut shelf);
        assert!(!is_repaired(&shelf));
        let now = shelf.now;
        assert_eq!(shelf.writer().patience(now), SWEEP, "nothing is written while nothing happens");
    }
}

#[test]
fn a_full_index_refuses_new_topics_and_takes_new_values() {
    let mut shelf = Shelf::new();
    shelf.writer().limits = Arc::new(Limits { retained: 1, ..Limits::default() });
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

/// Kept sessions, on the same shelf.
mod kept {
    use super::*;
    use crate::{
        index::sessions::{End, InFlight, Pending, QUEUE_IDS, Subscription},
        packet::{RetainHandling, SubscriptionOptions},
    };

    const FILTER: &str = "home/#";

    fn opening(client_id: &str) -> Opening {
        Opening {
            client_id: client_id.to_owned(),
            owner: None,
            by_right: false,
            clean_start: false,
            expiry: 100,
        }
    }

    fn live(payload: &[u8], qos: Qos) -> Publish {
        Publish { retain: false, qos, ..publish("home/light", payload, None) }
    }

    fn end() -> End {
        End { expiry: 100, sent: 0, will: None, in_flight: Vec::new(), pending: Vec::new() }
    }

    impl Shelf {
        fn open(&mut self, opening: Opening) -> Result<Option<Kept>, Reason> {
            let (reply, mut opened) = oneshot::channel();
            let now = self.now;
            self.writer().settle(vec![Op::Open(Box::new(opening), reply)], now).unwrap();
            opened.try_recv().unwrap().map_err(|refusal| refusal.reason)
        }

        fn kept(&mut self, client_id: &str) -> Kept {
            self.open(opening(client_id)).unwrap().unwrap()
        }

        fn change(&mut self, kept: &Kept, change: Change) {
            let is_answered = change.is_answered();
            let (op, now) = (Op::Change(kept.id, change, kept.mailbox.clone()), self.now);
            self.writer().settle(vec![op], now).unwrap();
            assert_eq!(kept.mailbox.pop_settled().is_some(), is_answered);
        }

        fn subscribe(&mut self, kept: &Kept, filter: &str) {
            let options = SubscriptionOptions {
                qos: Qos::ExactlyOnce,
                no_local: false,
                retain_as_published: true,
                retain_handling: RetainHandling::Send,
                identifier: None,
            };
            let pending = Some(Pending::All);
            let subscriptions = vec![(filter.to_owned(), Subscription { options, pending })];
            self.change(kept, Change::Subscribe { packet_id: 1, answer: Vec::new(), subscriptions });
        }

        /// A client that subscribed and went away.
        fn away(&mut self, client_id: &str) -> Kept {
            let kept = self.kept(client_id);
            self.subscribe(&kept, FILTER);
            self.change(&kept, Change::End(Box::new(end())));
            kept
        }

        fn queue(&mut self, kept: &Kept) -> Vec<(u64, u16, Option<Vec<u8>>)> {
            let index = &self.writer().index;
            let mut after = 0;
            let found = std::iter::from_fn(|| {
                let queued = index.queued(kept.id, after).unwrap()?;
                after = queued.order;
                let payload = queued.sent.message.map(|message| match message.payload {
                    Payload::Inline(bytes) => bytes.to_vec(),
                    Payload::Blob(digest, len) => index.chunk(&digest, len, 0).unwrap().to_vec(),
                });
                Some((queued.order, queued.sent.packet_id, payload))
            });
            found.collect()
        }

        fn payloads(&mut self, kept: &Kept) -> Vec<Vec<u8>> {
            self.queue(kept).into_iter().filter_map(|(.., payload)| payload).collect()
        }

        fn blobs(&self) -> usize {
            fs::read_dir(self.folder.path().join("blobs")).unwrap().count()
        }
    }

    #[test]
    fn what_was_acknowledged_while_a_client_was_away_waits_for_it_also_after_a_crash() {
        let mut shelf = Shelf::new();
        let kept = shelf.away("c");
        assert!(!kept.present);
        shelf.settle(&[
            live(b"1", Qos::AtLeastOnce),
            live(b"0", Qos::AtMostOnce),
            live(b"2", Qos::ExactlyOnce),
            publish("home/plan", &large(3), None),
            publish("elsewhere", b"4", None),
        ]);
        let expected = [b"1".to_vec(), b"2".to_vec(), large(3)];
        assert_eq!(shelf.payloads(&kept), expected);
        let ids: Vec<_> = shelf.queue(&kept).into_iter().map(|(_, id, _)| id).collect();
        shelf.reopen();
        let kept = shelf.kept("c");
        assert!(kept.present);
        assert_eq!(kept.subscriptions.len(), 1);
        assert!(matches!(kept.mailbox.pop(), Some(crate::mailbox::Mail::Queued)));
        let queue = shelf.queue(&kept);
        assert_eq!(queue.iter().map(|(_, id, _)| *id).collect::<Vec<_>>(), ids, "[MQTT-4.4.0-1]");
        for (order, ..) in queue {
            shelf.change(&kept, Change::Acknowledged(order));
        }
        shelf.reopen();
        let kept = shelf.kept("c");
        assert!(shelf.queue(&kept).is_empty());
        assert!(kept.mailbox.pop().is_none());
    }

    #[test]
    fn a_qos_2_message_of_either_side_is_known_until_it_is_complete() {
        let mut shelf = Shelf::new();
        let kept = shelf.away("c");
        let kept = shelf.open(opening("c")).unwrap().unwrap_or(kept);
        let op = Op::Publish(Box::new(Submission {
            admitted: admit(live(b"x", Qos::ExactlyOnce), &Limits::default()),
            topic: "home/light".into(),
            origin: kept.id,
            reply: Some(Reply { to: kept.mailbox.clone(), packet_id: 9 }),
            place: None,
            expected: None,
        }));
        let now = shelf.now;
        shelf.writer().settle(vec![op], now).unwrap();
        let [(order, id, Some(_))] = shelf.queue(&kept)[..] else { panic!() };
        shelf.change(&kept, Change::Received(order, id));
        shelf.reopen();
        let kept = shelf.kept("c");
        assert_eq!(kept.unreleased, [9], "it is not taken a second time");
        assert_eq!(shelf.queue(&kept), [(order, id, None)], "it is not sent a second time");
        assert!(kept.sent >= order, "if it were, it would say so");
        shelf.change(&kept, Change::Released(9));
        shelf.change(&kept, Change::Acknowledged(order));
        shelf.reopen();
        let kept = shelf.kept("c");
        assert!(kept.unreleased.is_empty() && shelf.queue(&kept).is_empty());
    }

    #[test]
    fn what_was_under_way_past_the_queue_is_put_at_its_front() {
        let mut shelf = Shelf::new();
        let kept = shelf.away("c");
        shelf.settle(&[publish("home/plan", &large(1), None), live(b"2", Qos::AtLeastOnce)]);
        let plan = shelf.writer().index.get("home/plan", 0).unwrap().unwrap();
        let sent = |packet_id, message| InFlight {
            packet_id,
            message,
            qos: Qos::ExactlyOnce,
            retain: true,
            identifiers: Vec::new(),
        };
        let in_flight = vec![sent(QUEUE_IDS + 5, None), sent(QUEUE_IDS + 6, Some(plan))];
        let pending = vec![(FILTER.to_owned(), Some(Pending::After("home/a".to_owned())))];
        shelf.change(&kept, Change::End(Box::new(End { in_flight, pending, ..end() })));
        shelf.settle(&[publish("home/plan", b"new", None)]);
        shelf.reopen();
        let kept = shelf.kept("c");
        let ids: Vec<_> = shelf.queue(&kept).into_iter().map(|(_, id, payload)| (id, payload)).collect();
        assert_eq!(
            ids,
            [
                (QUEUE_IDS + 5, None),
                (QUEUE_IDS + 6, Some(large(1))),
                (1, Some(large(1))),
                (2, Some(b"2".to_vec())),
                (3, Some(b"new".to_vec())),
            ]
        );
        assert_eq!(kept.taken_ids, [QUEUE_IDS + 5, QUEUE_IDS + 6]);
        assert_eq!(kept.subscriptions[0].1.pending, Some(Pending::After("home/a".to_owned())));
    }

    #[test]
    fn a_message_is_stored_once_for_all_who_wait_and_its_blob_goes_with_the_last() {
        let mut shelf = Shelf::new();
        let all: Vec<_> = (0..50).map(|n| shelf.away(&format!("c{n}"))).collect();
        shelf.settle(&[publish("home/plan", &large(1), None)]);
        shelf.settle(&[publish("home/plan", b"", None)]);
        for kept in &all {
            let (order, ..) = shelf.queue(kept)[0];
            assert_eq!(shelf.payloads(kept), [large(1), Vec::new()]);
            shelf.change(kept, Change::Acknowledged(order));
        }
        shelf.now.instant += BLOB_GRACE * 2;
        let now = shelf.now;
        shelf.writer().sweep(now).unwrap();
        assert_eq!(shelf.blobs(), 0);
    }

    #[test]
    fn a_live_message_is_the_disks_business_only_if_a_kept_session_wants_it() {
        let mut shelf = Shelf::new();
        shelf.away("c");
        let stores = |shelf: &mut Shelf, topic: &str, qos| {
            let publish = Publish { topic: topic.to_owned(), ..live(b"x", qos) };
            let op = Op::publish(publish, &Limits::default());
            shelf.writer().stores(&op)
        };
        assert!(stores(&mut shelf, "home/light", Qos::AtLeastOnce));
        assert!(!stores(&mut shelf, "home/light", Qos::AtMostOnce));
        assert!(!stores(&mut shelf, "elsewhere", Qos::ExactlyOnce));
        let kept = shelf.kept("c");
        shelf.subscribe(&kept, "$share/g/elsewhere");
        assert!(stores(&mut shelf, "elsewhere", Qos::ExactlyOnce));
    }

    #[test]
    fn a_session_ends_when_its_time_is_over_or_its_client_says_so_and_leaves_nothing() {
        let mut shelf = Shelf::new();
        let gone = |shelf: &mut Shelf, how: &str| {
            assert!(!shelf.kept("c").present, "{how}");
            let kept = shelf.kept("c");
            shelf.change(&kept, Change::End(Box::new(End { expiry: 0, ..end() })));
            assert!(!shelf.writer().index.has_session("c").unwrap());
            assert!(
                shelf.writer().subscriptions().queued("home/light", None, Qos::ExactlyOnce).is_empty(),
                "{how}"
            );
            assert!(shelf.queue(&kept).is_empty());
        };
        shelf.away("c");
        shelf.settle(&[live(b"1", Qos::AtLeastOnce)]);
        shelf.now.unix_ms += 100_000;
        let now = shelf.now;
        shelf.writer().expire_sessions(now).unwrap();
        gone(&mut shelf, "expired");
        shelf.away("c");
        shelf.now.unix_ms += 100_000;
        gone(&mut shelf, "expired, and not looked at yet");
        shelf.away("c");
        let clean = Opening { clean_start: true, expiry: 0, ..opening("c") };
        assert!(shelf.open(clean).unwrap().is_none());
        gone(&mut shelf, "a clean start");
        shelf.away("c");
        shelf.now.unix_ms += 99_999;
        assert!(shelf.kept("c").present);
    }

    #[test]
    fn a_session_with_too_much_waiting_is_given_up_and_its_client_told() {
        let mut shelf = Shelf::new();
        shelf.away("c");
        let online = shelf.away("d");
        let online = shelf.open(opening("d")).unwrap().unwrap_or(online);
        shelf.writer().limits = Arc::new(Limits { session_messages: 2, ..Limits::default() });
        shelf.writer().sessions.limits(Limits { session_messages: 2, ..Limits::default() });
        let three = [b"1", b"2", b"3"].map(|payload| live(payload, Qos::AtLeastOnce));
        assert_eq!(shelf.settle(&three), [Ok(()), Ok(()), Ok(())]);
        assert!(matches!(online.mailbox.pop(), Some(crate::mailbox::Mail::Overflow)));
        for client_id in ["c", "d"] {
            assert!(!shelf.kept(client_id).present, "CONNACK says that something is lost");
        }
    }

    #[test]
    fn nobody_takes_over_a_session_of_another_user_but_a_node_its_own_name() {
        let mut shelf = Shelf::new();
        let as_user = |owner: Option<&str>| Opening { owner: owner.map(str::to_owned), ..opening("c") };
        shelf.open(as_user(None)).unwrap();
        assert!(!shelf.open(as_user(Some("ada"))).unwrap().unwrap().present, "nobody's session is not ada's");
        assert_eq!(shelf.open(as_user(Some("eve"))).unwrap_err(), Reason::ClientIdentifierNotValid);
        assert!(shelf.open(as_user(Some("ada"))).unwrap().unwrap().present);
        let node = Opening { by_right: true, ..as_user(Some("c")) };
        assert!(!shelf.open(node).unwrap().unwrap().present);
        assert_eq!(shelf.open(as_user(Some("ada"))).unwrap_err(), Reason::ClientIdentifierNotValid);
    }

    #[test]
    fn a_will_waits_for_its_client_and_is_published_once_if_it_does_not_come() {
        let will = || Some((live(b"lost", Qos::AtLeastOnce), 30));
        let mut shelf = Shelf::new();
        let mut kept = shelf.kept("c");
        shelf.change(&kept, Change::End(Box::new(End { will: will(), ..end() })));
        shelf.reopen(); // it survives that
        shelf.now.unix_ms += 29_999;
        let now = shelf.now;
        shelf.writer().expire_sessions(now).unwrap();
        assert!(shelf.writer().sessions.take_wills().is_empty());
        assert_eq!(shelf.writer().patience(now), Duration::from_millis(1));
        kept = shelf.kept("c");
        shelf.change(&kept, Change::End(Box::new(End { will: will(), ..end() })));
        shelf.now.unix_ms += 30_000;
        let now = shelf.now;
        for expected in [1, 0] {
            shelf.writer().expire_sessions(now).unwrap();
            assert_eq!(shelf.writer().sessions.take_wills().len(), expected);
        }
        // The session ends before the delay does.
        kept = shelf.kept("c");
        shelf.change(&kept, Change::End(Box::new(End { will: will(), ..end() })));
        shelf.open(Opening { clean_start: true, ..opening("c") }).unwrap();
        assert_eq!(shelf.writer().sessions.take_wills().len(), 1);
    }
}

#[test]
fn a_list_waits_for_its_chunks_and_then_nobody_takes_or_changes_one() {
    let mut shelf = Shelf::new();
    let package = bytes(7, 5000);
    let (digest, chunks) = (Digest::of(&package), Chunks::cut(&package, 2048).unwrap());
    let pieces: Vec<_> = chunks.pieces(&digest).map(|piece| piece.topic).zip(package.chunks(2048)).collect();
    let list = |sequence: u32, chunks: Option<Chunks>| {
        let release = format!(r#"{{"type":"release","channel":"dev","sequence":{sequence},"version":"1"}}"#);
        let image = format!(
            r#"{{"type":"firmware","name":"a","version":"1","pkg_sha256":"{digest}","size":{}}}"#,
            package.len()
        );
        let both = format!("[{release},{image}]");
        let mut entries = UpdateList::parse(both.as_bytes()).unwrap().entries().to_vec();
        entries[1].set_chunks(chunks.clone());
        entries.truncate(if chunks.is_some() { 2 } else { 1 });
        publish("mpypi/channels/dev", &UpdateList::new(entries).unwrap().to_bytes(), None)
    };
    let refused = [Err(Reason::PayloadFormatInvalid)];
    for (topic, bytes) in &pieces[..2] {
        shelf.keep(topic, bytes);
    }
    assert_eq!(shelf.settle(&[list(1, Some(chunks.clone()))]), refused, "one is missing");
    shelf.keep(&pieces[2].0, b"something else");
    assert_eq!(shelf.settle(&[list(1, Some(chunks.clone()))]), refused, "one has other bytes");
    assert_eq!(shelf.settle(&[publish(&pieces[2].0, pieces[2].1, Some(60))]), [Ok(())]);
    assert_eq!(shelf.settle(&[list(1, Some(chunks.clone()))]), [Ok(())]);
    shelf.sweep_after(3600);
    shelf.reopen();
    for (topic, bytes) in &pieces {
        assert_eq!(shelf.settle(&[publish(topic, b"other", None)]), refused);
        assert_eq!(shelf.settle(&[publish(topic, b"", None)]), refused);
        assert_eq!(shelf.settle(&[publish(topic, bytes, Some(1))]), [Ok(())]);
    }
    shelf.sweep_after(3600);
    for (topic, bytes) in &pieces {
        assert_eq!(shelf.read(topic).as_deref(), Some(*bytes), "what a list names does not expire");
    }
    // As long as a list that is kept names the package, none of its chunks is garbage.
    let garbage = |shelf: &mut Shelf, lists| {
        let rules = crate::index::collect::Rules { lists, since_ms: u64::MAX };
        let garbage = shelf.writer().index.garbage(rules).unwrap();
        garbage.into_iter().map(|garbage| garbage.topic).collect::<Vec<_>>()
    };
    assert_eq!(garbage(&mut shelf, 1), [""; 0]);
    assert_eq!(shelf.settle(&[list(2, None)]), [Ok(())]);
    assert_eq!(garbage(&mut shelf, 2), [""; 0]);
    let mut topics: Vec<_> = pieces.iter().map(|(topic, _)| topic.clone()).collect();
    topics.push(PackageId::Firmware(digest).topic());
    assert_eq!(garbage(&mut shelf, 1), topics);
    let (now, collect) = (shelf.now, Collect { topics, since_ms: u64::MAX, reply: oneshot::channel().0 });
    shelf.writer().settle(vec![Op::Collect(collect)], now).unwrap();
    assert_eq!(shelf.read(&pieces[0].0), None);
}

#[test]
fn a_package_in_chunks_is_there_whole_too_before_the_list_that_names_it() {
    let mut shelf = Shelf::new();
    let package = bytes(3, 3 * INLINE);
    let chunks = Chunks::cut(&package, 2048).unwrap();
    let list = |whole: Digest, sequence: u32| {
        let text = format!(
            r#"[{{"type":"release","channel":"dev","sequence":{sequence},"version":"1"}},
                {{"type":"firmware","name":"a","version":"1","pkg_sha256":"{whole}","size":{}}}]"#,
            package.len()
        );
        let mut entries = UpdateList::parse(text.as_bytes()).unwrap().entries().to_vec();
        entries[1].set_chunks(Some(chunks.clone()));
        publish("mpypi/channels/dev", &UpdateList::new(entries).unwrap().to_bytes(), None)
    };
    let cut = |whole: &Digest| {
        let topics = chunks.pieces(whole).map(|piece| piece.topic);
        topics
            .zip(package.chunks(2048))
            .map(|(topic, bytes)| publish(&topic, bytes, None))
            .collect::<Vec<_>>()
    };
    let whole = Digest::of(&package);
    let topic = PackageId::Firmware(whole).topic();
    let mut batch = cut(&whole);
    batch.push(list(whole, 1));
    assert!(shelf.settle(&batch).iter().all(Result::is_ok));
    assert_eq!(shelf.read(&topic).as_deref(), Some(&*package));
    let announced: Vec<_> = shelf.announced.lock().unwrap().drain(..).collect();
    let last: Vec<_> = announced.iter().rev().take(2).map(|message| &*message.topic).collect();
    assert_eq!(last, ["mpypi/channels/dev", &topic]);
    assert!(announced.iter().map(|message| message.version).is_sorted());
    // Once is enough.
    assert_eq!(shelf.settle(&[list(whole, 2)]), [Ok(())]);
    assert_eq!(shelf.announced.lock().unwrap().len(), 1);
    // Whoever cut it lies about what it is.
    let other = Digest::of(b"other");
    let mut batch = cut(&other);
    batch.push(list(other, 3));
    assert_eq!(shelf.settle(&batch).last(), Some(&Err(Reason::PayloadFormatInvalid)));
    assert_eq!(shelf.read(&PackageId::Firmware(other).topic()), None);
}

#[test]
fn what_is_cleared_of_nodes_is_noted_with_the_clear_until_an_upstream_was_told() {
    let mut shelf = Shelf::new();
    let lamp = "mpypi/nodes/lamp/state";
    shelf.keep(lamp, b"{}");
    shelf.keep(lamp, b"");
    assert_eq!(shelf.writer().index.gone(0, 9).unwrap(), [], "there is no upstream");
    let told = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let seen = told.clone();
    let writer = shelf.writer.take().unwrap();
    shelf.writer = Some(writer.noting(Some(Box::new(move || seen.load(Ordering::SeqCst)))));
    for topic in [lamp, "mpypi/nodes/door/state", "home/light"] {
        shelf.keep(topic, b"{}");
        shelf.keep(topic, b"");
    }
    // Nothing was there.
    shelf.keep("mpypi/nodes/other/state", b"");
    let gone = |shelf: &mut Shelf, since, most| {
        let found = shelf.writer().index.gone(since, most).unwrap();
        found
            .into_iter()
            .map(|(version, topic)| (version, topic.replace("mpypi/nodes/", "")))
            .collect::<Vec<_>>()
    };
    let pair = |version: u64, topic: &str| (version, topic.to_owned());
    assert_eq!(gone(&mut shelf, 0, 9), [pair(4, "lamp/state"), pair(6, "door/state")]);
    assert_eq!(
        (gone(&mut shelf, 4, 9), gone(&mut shelf, 0, 1)),
        (vec![pair(6, "door/state")], vec![pair(4, "lamp/state")])
    );
    shelf.reopen();
    assert_eq!(gone(&mut shelf, 0, 9).len(), 2, "it is there after a restart");
    let seen = told.clone();
    let writer = shelf.writer.take().unwrap();
    shelf.writer = Some(writer.noting(Some(Box::new(move || seen.load(Ordering::SeqCst)))));
    told.store(4, Ordering::SeqCst);
    shelf.keep(lamp, b"{}");
    shelf.keep(lamp, b"");
    assert_eq!(gone(&mut shelf, 0, 9), [pair(6, "door/state"), pair(10, "lamp/state")]);
}

#[test]
fn what_a_list_cuts_beyond_what_one_commit_makes_whole_follows_with_the_sweeps() {
    let mut shelf = Shelf::new();
    let packages: Vec<_> = (1..=5).map(|seed| bytes(seed, JOIN_BYTES as usize / 2 + 1)).collect();
    let mut batch = Vec::new();
    let mut entries = Vec::new();
    for (number, package) in packages.iter().enumerate() {
        let (digest, chunks) = (Digest::of(package), Chunks::cut(package, 16 * 1024).unwrap());
        let topics = chunks.pieces(&digest).map(|piece| piece.topic);
        batch
            .extend(topics.zip(package.chunks(16 * 1024)).map(|(topic, bytes)| publish(&topic, bytes, None)));
        let text = format!(
            r#"[{{"type":"firmware","name":"a{number}","version":"1","pkg_sha256":"{digest}","size":{}}}]"#,
            package.len()
        );
        let mut entry = UpdateList::parse(text.as_bytes()).unwrap().entries()[0].clone();
        entry.set_chunks(Some(chunks));
        entries.push(entry);
    }
    batch.push(publish("mpypi/channels/dev", &UpdateList::new(entries).unwrap().to_bytes(), None));
    assert!(shelf.settle(&batch).iter().all(Result::is_ok));
    let whole = |shelf: &mut Shelf| {
        let there = |package: &Vec<u8>| {
            let found = shelf.read(&PackageId::Firmware(Digest::of(package)).topic());
            assert!(found.is_none() || found.as_ref() == Some(package));
            found.is_some()
        };
        packages.iter().map(there).filter(|is| *is).count()
    };
    assert_eq!(whole(&mut shelf), 2);
    shelf.reopen();
    for expected in [4, 5, 5] {
        let mut swept = shelf.now.instant;
        shelf.now.instant += 2 * SWEEP;
        let now = shelf.now;
        shelf.writer().look_after(&mut swept, now).unwrap();
        assert_eq!(whole(&mut shelf), expected);
    }
    let announced = shelf.announced.lock().unwrap();
    let of_packages = announced.iter().filter(|message| message.topic.starts_with("mpypi/packages/"));
    assert_eq!(of_packages.count(), 5);
}
