use mpypi_protocol::node::Phase;
use proptest::prelude::*;

use super::*;
use crate::{
    device::{Hardware, Traits},
    flash::{Flash, Loss, Memory},
    testing::{Bench, Files, Release, channel, files, list_of, release},
};

fn memory() -> Memory {
    Memory::new(1 << 20)
}

fn many_files(sequence: u64, count: usize) -> Release {
    let names: Vec<_> =
        (0..count).map(|number| (format!("f{number}.py"), format!("{sequence} {number}"))).collect();
    let sources: Vec<_> = names.iter().map(|(name, text)| (name.as_str(), text.as_bytes())).collect();
    release(sequence, &sources, &[])
}

fn installed(flash: &mut Memory, release: &Release) {
    let mut bench = Bench::start(flash).unwrap();
    bench.publish(release);
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
}

#[test]
fn a_release_goes_through_all_phases() {
    let mut flash = memory();
    let release = many_files(7, 20);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    bench.run().unwrap();
    let expected = [
        Phase::Idle,
        Phase::Downloading,
        Phase::Verifying,
        Phase::Installing,
        Phase::Restarting,
        Phase::Confirming,
        Phase::Idle,
    ];
    assert_eq!(bench.phases(), expected);
    let state = bench.device.report().state.clone();
    let size: u64 = release.packages.values().map(|bytes| bytes.len() as u64).sum();
    assert_eq!((state.sequence, state.done, state.total, state.attempt), (Some(7), size, size, 1));
    assert_eq!(state.error, None);
    assert_eq!(bench.open.len(), 2, "only `cmd` and the channel stay subscribed: {:?}", bench.open);
    assert_eq!(files(&flash), release.files);
}

#[test]
fn the_same_list_again_changes_nothing_and_fetches_nothing() {
    let mut flash = memory();
    let release = many_files(1, 3);
    installed(&mut flash, &release);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    bench.run().unwrap();
    bench.give(Event::Disconnected).unwrap();
    bench.run().unwrap();
    assert_eq!(bench.phases(), [Phase::Idle]);
}

#[test]
fn only_what_changed_travels() {
    let mut flash = memory();
    installed(&mut flash, &release(1, &[("a.py", b"1"), ("b.py", b"22")], &[("w", "1", &[("w.py", b"3")])]));
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release(2, &[("a.py", b"1"), ("b.py", b"333")], &[("w", "1", &[("w.py", b"3")])]));
    bench.run().unwrap();
    assert_eq!((bench.phase(), bench.device.report().state.done), (Phase::Idle, 3));
}

#[test]
fn duplicate_late_and_unasked_packages_are_ignored() {
    let mut flash = memory();
    let release = many_files(1, 3);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    let packages: Vec<_> = release.packages.clone().into_iter().collect();
    let send_all = |bench: &mut Bench<&mut Memory>| {
        for (topic, payload) in &packages {
            bench.give(Event::Package { topic: topic.clone(), payload: payload.clone() }).unwrap();
        }
    };
    send_all(&mut bench);
    bench.give(Event::Connected).unwrap();
    bench.deliver().unwrap();
    send_all(&mut bench);
    send_all(&mut bench);
    bench.settle().unwrap();
    send_all(&mut bench);
    assert_eq!(bench.phase(), Phase::Idle);
    assert_eq!(bench.device.report().state.done, bench.device.report().state.total);
    assert_eq!(files(&flash), release.files);
}

#[test]
fn a_newer_list_replaces_the_one_being_fetched() {
    let mut flash = memory();
    let (old, new) = (many_files(1, 20), many_files(2, 3));
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&old);
    bench.give(Event::Connected).unwrap();
    for _ in 0..5 {
        bench.deliver().unwrap();
    }
    assert_eq!(bench.phase(), Phase::Downloading);
    bench.publish(&new);
    bench.settle().unwrap();
    assert_eq!((bench.phase(), bench.device.report().state.sequence), (Phase::Idle, Some(2)));
    assert_eq!(bench.open.len(), 2, "{:?}", bench.open);
    assert_eq!(files(&flash), new.files);
}

#[test]
fn a_list_that_comes_while_another_is_confirmed_is_applied_afterwards() {
    let mut flash = memory();
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&many_files(1, 1));
    bench.give(Event::Connected).unwrap();
    while bench.phase() != Phase::Confirming {
        assert!(bench.deliver().unwrap());
    }
    bench.publish(&many_files(2, 1));
    bench.settle().unwrap();
    assert_eq!((bench.phase(), bench.device.report().state.sequence), (Phase::Idle, Some(2)));
    let applied = |sequence| {
        let idle = |report: &&Report| report.state.phase == Phase::Idle;
        bench.reports.iter().filter(idle).any(|report| report.state.sequence == Some(sequence))
    };
    assert!(applied(1) && applied(2));
}

#[test]
fn an_older_list_is_refused_and_the_device_stays_as_it_is() {
    let mut flash = memory();
    let (first, second) = (many_files(1, 2), many_files(2, 2));
    installed(&mut flash, &first);
    installed(&mut flash, &second);
    for bad in [first.list.clone(), Bytes::from_static(b"[]"), many_files(2, 1).list] {
        let mut bench = Bench::start(&mut flash).unwrap();
        bench.publish_list(bad);
        bench.run().unwrap();
        assert_eq!(bench.phase(), Phase::Failed);
        assert!(bench.error().unwrap().starts_with("rollback: "), "{:?}", bench.error());
        assert_eq!(files(&flash), second.files);
    }
}

#[test]
fn what_is_no_list_is_refused_and_the_next_good_one_is_applied() {
    let mut flash = memory();
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish_list(Bytes::from_static(b"{}"));
    bench.run().unwrap();
    assert!(bench.error().unwrap().starts_with("bad-list: "));
    bench.publish(&many_files(1, 1));
    bench.settle().unwrap();
    assert_eq!((bench.phase(), bench.error()), (Phase::Idle, None));
}

#[test]
fn a_list_of_mpy_bloxs_own_tools_is_applied_and_so_is_its_end() {
    let mut flash = memory();
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish_list(Bytes::from_static(b"[]"));
    bench.run().unwrap();
    assert_eq!(bench.phases(), [Phase::Idle], "an empty channel is nothing to do");
    let list = list_of(None, &[("main.py", b"1")], &[("w", "1", &[("w.py", b"2")])]);
    bench.publish(&list);
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    bench.publish_list(Bytes::from_static(b"[]"));
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    drop(bench);
    assert_eq!(files(&flash), Files::new());
}

#[test]
fn a_package_that_arrives_damaged_is_fetched_again_at_once_and_at_the_next_connection() {
    let mut flash = memory();
    let (old, new) = (many_files(1, 2), many_files(2, 2));
    installed(&mut flash, &old);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&new);
    let topic = new.packages.keys().next().unwrap();
    let right = bench.retained.insert(topic.clone(), Bytes::from_static(b"x 0")).unwrap();
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Failed);
    assert!(bench.error().unwrap().starts_with("wrong-hash: "), "{:?}", bench.error());
    assert_eq!(bench.device.report().state.attempt, limits::FETCHES);
    assert_eq!(files(bench.device.store().flash()), old.files);

    bench.retained.insert(topic.clone(), right);
    bench.give(Event::Disconnected).unwrap();
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    assert_eq!(files(&flash), new.files);
}

/// A release with a file in ten chunks, and one that is whole.
fn in_chunks(sequence: u64) -> Release {
    let large: Vec<u8> = (0..10_000_u32).map(|n| (n * 7 + n / 251) as u8 ^ sequence as u8).collect();
    release(sequence, &[("large.bin", &large), ("main.py", b"1")], &[]).in_chunks(1024)
}

fn asked_for(bench: &Bench<&mut Memory>, topics: &[String]) -> Vec<usize> {
    let place = |asked: &String| topics.iter().position(|topic| topic == asked);
    bench.asked.iter().filter_map(place).collect()
}

#[test]
fn a_package_in_chunks_is_fetched_in_a_window_and_each_of_them_once() {
    let mut flash = memory();
    let release = in_chunks(1);
    let topics = release.chunks();
    assert_eq!(topics.len(), 10);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    bench.give(Event::Connected).unwrap();
    while bench.phase() != Phase::Confirming {
        let open = bench.open.iter().filter(|open| topics.contains(open)).count();
        assert!(open <= limits::CHUNK_WINDOW as usize);
        assert!(bench.deliver().unwrap());
    }
    bench.settle().unwrap();
    assert_eq!(asked_for(&bench, &topics), (0..10).collect::<Vec<_>>());
    let state = bench.device.report().state.clone();
    assert_eq!((state.phase, state.done, state.total, state.attempt), (Phase::Idle, 10_001, 10_001, 1));
    assert_eq!(bench.open.len(), 2, "only `cmd` and the channel stay subscribed: {:?}", bench.open);
    assert_eq!(files(&flash), release.files);
}

#[test]
fn chunks_that_come_twice_late_or_in_another_order_make_the_same_package() {
    for seed in 0..50 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut flash = memory();
        let release = in_chunks(1);
        let topics = release.chunks();
        let mut bench = Bench::start(&mut flash).unwrap();
        bench.publish(&release);
        bench.give(Event::Connected).unwrap();
        bench.deliver().unwrap();
        for _ in 0..200 {
            let topic = topics[rng.usize(..topics.len())].clone();
            let payload = release.packages[&topic].clone();
            bench.give(Event::Package { topic, payload }).unwrap();
        }
        bench.settle().unwrap();
        assert_eq!((bench.phase(), files(&flash)), (Phase::Idle, release.files), "seed {seed}");
    }
}

#[test]
fn a_chunk_with_other_bytes_is_refused_by_its_number_and_those_before_it_are_not_fetched_again() {
    let mut flash = memory();
    let release = in_chunks(1);
    let topics = release.chunks();
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    let right = bench.retained.insert(topics[6].clone(), Bytes::from_static(b"evil")).unwrap();
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Failed);
    let error = bench.error().unwrap();
    assert!(error.starts_with("wrong-hash: chunk 6 of package `src/large.bin/"), "{error}");
    assert_eq!(files(bench.device.store().flash()), Files::new());
    bench.asked.clear();
    bench.retained.insert(topics[6].clone(), right);
    bench.give(Event::Disconnected).unwrap();
    bench.run().unwrap();
    assert_eq!(asked_for(&bench, &topics), [6, 7, 8, 9]);
    assert_eq!((bench.phase(), files(&flash)), (Phase::Idle, release.files));
}

#[test]
fn a_missing_chunk_is_reported_as_a_missing_package_and_fetched_when_it_is_there() {
    let mut flash = memory();
    let release = in_chunks(1);
    let topics = release.chunks();
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    let right = bench.retained.remove(&topics[9]).unwrap();
    bench.run().unwrap();
    let expected = format!("missing-package: the broker has no `{}`", topics[9]);
    assert_eq!((bench.phase(), bench.error()), (Phase::Failed, Some(&*expected)));
    bench.retained.insert(topics[9].clone(), right);
    bench.asked.clear();
    bench.give(Event::Disconnected).unwrap();
    bench.run().unwrap();
    assert_eq!(asked_for(&bench, &topics), [9]);
    assert_eq!((bench.phase(), files(&flash)), (Phase::Idle, release.files));
}

#[test]
fn chunks_that_make_another_package_are_refused_and_nothing_of_them_stays() {
    let mut flash = memory();
    let release = in_chunks(1);
    // The list says of the whole what is not so.
    let digest = Digest::of(&release.files["large.bin"]).to_string();
    let lie = Digest::of(b"something else").to_string();
    let list = String::from_utf8(release.list.to_vec()).unwrap().replace(&digest, &lie);
    let rename = |(topic, bytes): (String, Bytes)| (topic.replace(&digest, &lie), bytes);
    let packages = release.packages.into_iter().map(rename).collect();
    let release = Release { list: list.into(), packages, files: release.files };
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    bench.run().unwrap();
    let error = bench.error().unwrap();
    assert!(error.starts_with("wrong-hash: the chunks of package `src/large.bin/"), "{error}");
    assert_eq!(bench.device.report().state.attempt, 1, "it stays so");
    let there = bench.device.store().flash().list(".mpypi/staging").unwrap();
    assert!(there.iter().all(|name| !name.ends_with(".chunks")), "{there:?}");
    assert_eq!(files(&flash), Files::new());
}

#[test]
fn an_old_agent_looks_for_the_whole_package_and_says_that_it_is_missing() {
    let mut flash = memory();
    let release = in_chunks(1);
    let hardware = Hardware { agent: Agent::Old, ..Hardware::default() };
    let mut bench = Bench::start_on(&mut flash, hardware).unwrap();
    bench.publish(&release);
    bench.run().unwrap();
    assert!(
        bench
            .error()
            .unwrap()
            .starts_with("missing-package: the broker has no `mpypi/packages/src/large.bin/")
    );
}

#[test]
fn a_list_that_did_not_arrive_is_asked_for_within_the_hour() {
    let mut flash = memory();
    let release = many_files(1, 2);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.run().unwrap();
    bench.retained.extend(release.packages.clone());
    bench.retained.insert(channel().topic(), release.list.clone());
    assert!(!bench.deliver().unwrap(), "nobody told the device");
    bench.now += limits::CHECK + limits::CHECK / 4;
    bench.give(Event::Tick).unwrap();
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    assert_eq!(files(&flash), release.files);
}

#[test]
fn a_size_that_lies_is_refused_either_way() {
    for lie in ["1", "9"] {
        let mut flash = memory();
        let mut bad = release(1, &[("a.py", b"12345")], &[]);
        let list = String::from_utf8(bad.list.to_vec()).unwrap();
        bad.list = list.replace(r#""size":5"#, &format!(r#""size":{lie}"#)).into();
        let mut bench = Bench::start(&mut flash).unwrap();
        bench.publish(&bad);
        bench.run().unwrap();
        assert!(bench.error().unwrap().starts_with("wrong-size: "), "{:?}", bench.error());
        assert_eq!(files(&flash), Files::new());
    }
}

#[test]
fn a_missing_package_is_asked_for_again_and_applied_when_it_is_there() {
    let mut flash = memory();
    let release = many_files(1, 10);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    let (topic, payload) = release.packages.iter().next_back().unwrap();
    bench.retained.remove(topic);
    bench.give(Event::Connected).unwrap();
    while bench.device.report().state.attempt < 2 {
        assert!(bench.deliver().unwrap() || bench.wait().unwrap());
    }
    bench.retained.insert(topic.clone(), payload.clone());
    bench.settle().unwrap();
    assert_eq!((bench.phase(), bench.device.report().state.attempt), (Phase::Idle, 3));
    let size: u64 = release.packages.values().map(|bytes| bytes.len() as u64).sum();
    assert_eq!(bench.device.report().state.done, size, "nothing travelled twice");
    assert_eq!(files(&flash), release.files);
}

#[test]
fn a_package_that_stays_missing_fails_after_a_few_tries_until_the_next_connection() {
    let mut flash = memory();
    let release = many_files(1, 2);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish_list(release.list.clone());
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Failed);
    assert!(bench.error().unwrap().starts_with("missing-package: "), "{:?}", bench.error());
    assert_eq!(bench.device.report().state.attempt, limits::ATTEMPTS);
    assert!(bench.now < Duration::from_secs(600), "{:?}", bench.now);

    bench.retained.extend(release.packages.clone());
    bench.give(Event::Disconnected).unwrap();
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    assert_eq!(files(&flash), release.files);
}

#[test]
fn a_lost_connection_is_no_failure() {
    let mut flash = memory();
    let release = many_files(1, 20);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    for _ in 0..7 {
        bench.give(Event::Connected).unwrap();
        for _ in 0..3 {
            bench.deliver().unwrap();
        }
        bench.give(Event::Disconnected).unwrap();
        bench.now += Duration::from_secs(1000);
    }
    bench.run().unwrap();
    assert_eq!((bench.phase(), bench.device.report().state.attempt), (Phase::Idle, 1));
    assert_eq!(files(&flash), release.files);
}

#[test]
fn a_connection_that_breaks_whenever_a_package_comes_is_reported_and_tried_again() {
    let mut flash = memory();
    let release = many_files(1, 2);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    bench.give(Event::Connected).unwrap();
    assert!(bench.deliver().unwrap());
    for _ in 0..limits::ATTEMPTS {
        assert_eq!(bench.phase(), Phase::Downloading);
        bench.give(Event::Connected).unwrap();
        bench.give(Event::Disconnected).unwrap();
    }
    assert_eq!(bench.phase(), Phase::Failed);
    assert!(bench.error().unwrap().starts_with("connection: "), "{:?}", bench.error());
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    assert_eq!(files(&flash), release.files);
}

#[test]
fn a_refused_subscription_is_reported() {
    let mut flash = memory();
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.give(Event::Connected).unwrap();
    bench.give(Event::SubscriptionRefused { filter: "mpypi/channels/dev".into() }).unwrap();
    assert_eq!(bench.phase(), Phase::Failed);
    assert!(bench.error().unwrap().starts_with("not-allowed: "));
}

#[test]
fn an_operator_takes_back_a_release_that_is_not_confirmed() {
    let mut flash = memory();
    let (old, new) = (many_files(1, 2), many_files(2, 2));
    installed(&mut flash, &old);
    let timing = Timing { confirm_after: None, ..Timing::default() };
    let mut bench = Bench::start_with(&mut flash, timing).unwrap();
    bench.publish(&new);
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Confirming);
    bench.command(r#"[{"type":"rollback"}]"#);
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::RolledBack);
    assert!(bench.error().unwrap().starts_with("told-to: "));
    assert_eq!(files(bench.device.store().flash()), old.files);
    bench.command(r#"[{"type":"check"}]"#);
    bench.settle().unwrap();
    bench.give(Event::Confirmed).unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    assert_eq!(files(&flash), new.files);
}

#[test]
fn orders_alone_remove_nothing() {
    let mut flash = memory();
    let list = list_of(None, &[("main.py", b"1")], &[]);
    installed(&mut flash, &list);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.give(Event::Connected).unwrap();
    bench.command(r#"[{"type":"check"},{"type":"restart"},{"type":"rollback"}]"#);
    bench.settle().unwrap();
    assert_eq!(files(&flash), list.files);
}

#[derive(Debug, Clone)]
enum Step {
    Publish(usize),
    Garbage,
    OtherChannel,
    Deliver(u8),
    Wait,
    Connect,
    Disconnect,
    Corrupt(usize),
    Repair,
    Lose(Loss),
    Command(&'static str),
    Confirmed,
    RefuseSubscription,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..5usize).prop_map(Step::Publish),
        1 => Just(Step::Garbage),
        1 => Just(Step::OtherChannel),
        8 => (1..12u8).prop_map(Step::Deliver),
        6 => Just(Step::Wait),
        3 => Just(Step::Connect),
        1 => Just(Step::Disconnect),
        2 => (0..50usize).prop_map(Step::Corrupt),
        1 => Just(Step::Repair),
        1 => prop::sample::select(&Loss::ALL[..]).prop_map(Step::Lose),
        2 => prop::sample::select(&["check", "rollback", "restart", "what"][..]).prop_map(Step::Command),
        1 => Just(Step::Confirmed),
        1 => Just(Step::RefuseSubscription),
    ];
    prop::collection::vec(step, 1..80)
}

fn releases() -> [Release; 5] {
    let wheel = |version, text: &'static [u8]| ("w", version, text);
    let with = |sequence, sources: &[(&str, &[u8])], (name, version, text): (&str, &str, &[u8])| {
        release(sequence, sources, &[(name, version, &[("w/__init__.py", text), ("w/b.py", b"b")])])
    };
    [
        with(1, &[("main.py", b"1"), ("a/b.txt", b"same"), ("none", b"")], wheel("1", b"one")),
        with(2, &[("main.py", b"2"), ("a/c.txt", b"same"), ("a/d.txt", b"same")], wheel("1", b"one")),
        many_files(3, 12),
        with(4, &[("main.py", b"1"), ("a/b.txt", b"")], wheel("2", b"two")),
        in_chunks(5),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_device_has_one_release_complete(steps in steps()) {
        let releases = releases();
        let mut allowed: Vec<Files> = releases.iter().map(|release| release.files.clone()).collect();
        allowed.push(Files::new());
        let timing = Timing { confirm_after: Some(Duration::from_secs(3)), ..Timing::default() };
        let mut bench = Bench::start_with(memory(), timing.clone()).unwrap();
        let mut right = std::collections::BTreeMap::new();
        for step in steps {
            match step {
                Step::Publish(index) => {
                    right.extend(releases[index].packages.clone());
                    bench.publish(&releases[index]);
                }
                Step::Garbage => bench.publish_list(Bytes::from_static(b"[{\"type\":\"src\"}]")),
                Step::OtherChannel => {
                    let text = String::from_utf8(releases[3].list.to_vec()).unwrap();
                    bench.publish_list(text.replace("\"dev\"", "\"other\"").into());
                }
                Step::Deliver(count) => {
                    for _ in 0..count {
                        bench.deliver().unwrap();
                    }
                }
                Step::Wait => {
                    bench.wait().unwrap();
                }
                Step::Connect => bench.give(Event::Connected).unwrap(),
                Step::Disconnect => bench.give(Event::Disconnected).unwrap(),
                Step::Corrupt(index) => {
                    let channel = crate::testing::channel().topic();
                    let packages: Vec<_> = bench.retained.keys().filter(|topic| **topic != channel).cloned().collect();
                    if let Some(topic) = packages.get(index % packages.len().max(1)) {
                        bench.retained.insert(topic.clone(), Bytes::from_static(b"evil"));
                    }
                }
                Step::Repair => bench.retained.extend(right.clone()),
                Step::Lose(loss) => {
                    let retained = std::mem::take(&mut bench.retained);
                    let mut flash = bench.device.into_flash();
                    flash.lose(loss);
                    bench = Bench::start_with(flash, timing.clone()).unwrap();
                    bench.retained = retained;
                }
                Step::Command(order) => bench.command(&format!(r#"[{{"type":"{order}"}}]"#)),
                Step::Confirmed => bench.give(Event::Confirmed).unwrap(),
                Step::RefuseSubscription => {
                    bench.give(Event::SubscriptionRefused { filter: "mpypi/channels/dev".into() }).unwrap();
                }
            }
            let found = files(bench.device.store().flash());
            prop_assert!(allowed.contains(&found), "{found:?}");
        }
        // When the trouble is over, it converges.
        bench.give(Event::Disconnected).unwrap();
        bench.retained.extend(right);
        let last = many_files(9, 3);
        bench.publish(&last);
        bench.run().unwrap();
        prop_assert_eq!(bench.phase(), Phase::Idle);
        prop_assert_eq!(files(bench.device.store().flash()), last.files);
    }
}

#[test]
fn a_wheel_that_does_not_run_here_is_refused_before_anything_is_fetched() {
    let mut flash = memory();
    let wheel = ("w", "1", &[("w.py", b"3".as_slice())] as &[_]);
    let old = release(1, &[("a.py", b"1")], &[wheel]);
    installed(&mut flash, &old);
    let mut new = release(2, &[("a.py", b"2")], &[wheel]);
    let list = String::from_utf8(new.list.to_vec()).unwrap();
    let tagged = |tag: &str| list.replacen("\"name\":\"w\"", &format!("\"name\":\"w\",\"tag\":\"{tag}\""), 1);
    new.list = tagged("mpy5-bytecode-any").into();
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&new);
    bench.run().unwrap();
    assert_eq!(bench.phases(), [Phase::Idle, Phase::Failed], "it never downloads");
    assert_eq!(
        bench.error(),
        Some("no-fit: wheel `w` is for `mpy5-bytecode-any`; this device is `mpy6-bytecode-mpypi_sim`")
    );
    // The same release for this device is another list, and is taken.
    bench.publish_list(tagged("mpy6-bytecode-any").into());
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    drop(bench);
    assert_eq!(files(&flash), new.files);
}

const ID: &str = "0123456789abcdef";

/// A release that is a step of a rollout.
fn step(sequence: u64, text: &str, rollout: &str) -> Release {
    let head = format!(
        r#"{{"type":"release","channel":"dev","sequence":{sequence},"version":"{sequence}.0","rollout":{{"id":"{ID}",{rollout}}}}}"#
    );
    list_of(Some(head), &[("main.py", text.as_bytes())], &[])
}

fn plain(sequence: u64, text: &str) -> Release {
    release(sequence, &[("main.py", text.as_bytes())], &[])
}

/// A device that runs release 1 is given `release`; how it stands then.
fn given(release: &Release) -> (Phase, Option<u64>, Option<u64>) {
    let mut flash = memory();
    installed(&mut flash, &plain(1, "one"));
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(release);
    bench.run().unwrap();
    standing(&bench)
}

fn standing(bench: &Bench<&mut Memory>) -> (Phase, Option<u64>, Option<u64>) {
    let state = &bench.device.report().state;
    (state.phase, state.sequence, state.held)
}

#[test]
fn a_list_that_is_not_for_a_node_is_seen_and_not_applied() {
    assert_eq!(given(&step(2, "two", r#""percent":"0""#)), (Phase::Idle, Some(1), Some(2)));
    assert_eq!(given(&step(2, "two", r#""percent":"100""#)), (Phase::Idle, Some(2), None));
    let only = |query: &str| given(&step(2, "two", &format!(r#""percent":100,"only":"{query}""#)));
    assert_eq!(only("version < 2 and node = n"), (Phase::Idle, Some(2), None));
    assert_eq!(only("label.room = kitchen"), (Phase::Idle, Some(1), Some(2)));
}

#[test]
fn what_is_held_is_seen_so_that_nothing_older_is_believed() {
    let mut flash = memory();
    installed(&mut flash, &plain(1, "one"));
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&step(3, "three", r#""percent":"0""#));
    bench.run().unwrap();
    bench.publish(&plain(2, "two"));
    bench.settle().unwrap();
    assert!(bench.error().is_some_and(|error| error.starts_with("rollback:")), "{:?}", bench.error());
    assert_eq!(files(&flash), plain(1, "one").files);
}

#[test]
fn a_node_is_in_at_its_step_and_takes_later_steps_without_a_restart() {
    let mut flash = memory();
    installed(&mut flash, &plain(1, "one"));
    let mut bench = Bench::start(&mut flash).unwrap();
    let position = ID.parse::<RolloutId>().unwrap().position("n");
    let first = (0..=10_000)
        .find(|p| mpypi_protocol::rollout::Percent::from_hundredths(*p).unwrap().admits(position));
    let percent = |hundredths: u16| format!(r#""percent":"{}.{:02}""#, hundredths / 100, hundredths % 100);
    let first = first.unwrap();
    bench.publish(&step(2, "two", &percent(first - 1)));
    bench.run().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(1), Some(2)));
    bench.publish(&step(3, "two", &percent(first)));
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(3), None));
    let before = bench.reports.len();
    bench.publish(&step(4, "two", r#""percent":"100","only":"version = 1.0""#));
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(4), None), "who is in stays in, whatever the query says");
    assert!(bench.reports[before..].iter().all(|report| report.state.phase != Phase::Restarting));
    bench.publish(&step(5, "two", r#""percent":"0""#));
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(5), None));
}

#[test]
fn an_unreadable_rollout_holds_and_says_so() {
    let mut flash = memory();
    installed(&mut flash, &plain(1, "one"));
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&step(2, "two", r#""percent":"100","only":"size > 3""#));
    bench.run().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(1), Some(2)));
    assert!(bench.error().is_some_and(|error| error.starts_with("bad-rollout: ")), "{:?}", bench.error());
    bench.command(r#"[{"type":"install"}]"#);
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(1), Some(2)), "no order makes it readable");
    bench.publish(&plain(3, "three"));
    bench.settle().unwrap();
    assert_eq!((standing(&bench), bench.error()), ((Phase::Idle, Some(3), None), None));
}

#[test]
fn an_optional_release_waits_for_an_order() {
    let mut flash = memory();
    installed(&mut flash, &plain(1, "one"));
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&step(2, "two", r#""percent":"100","optional":true"#));
    bench.run().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(1), Some(2)));
    bench.command(r#"[{"type":"install"}]"#);
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(2), None));
}

#[test]
fn an_old_agent_passes_over_what_holds_others_back() {
    let mut flash = memory();
    let old = Hardware { agent: Agent::Old, ..Hardware::default() };
    let mut bench = Bench::start_on(&mut flash, old).unwrap();
    bench.publish(&step(2, "two", r#""percent":"0","optional":true"#));
    bench.run().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(2), None));
    bench.command(r#"[{"type":"install"}]"#);
    bench.settle().unwrap();
    assert!(!bench.logs.iter().any(|line| line.contains("install")), "{:?}", bench.logs);
    let mut release = release(3, &[], &[("blink", "1.0", &[("blink.py", b"x")])]);
    let text = String::from_utf8(release.list.to_vec()).unwrap();
    release.list = text.replace(r#""name":"blink","#, r#""name":"blink","optional":true,"#).into();
    bench.publish(&release);
    bench.settle().unwrap();
    drop(bench);
    assert_eq!(files(&flash), release.files);
}

#[test]
fn an_order_brings_nobody_in_who_is_not_in() {
    let mut flash = memory();
    installed(&mut flash, &plain(1, "one"));
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&step(2, "two", r#""percent":"0","optional":true"#));
    bench.run().unwrap();
    bench.command(r#"[{"type":"install"}]"#);
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(1), Some(2)));
    assert!(bench.logs.iter().any(|line| line.contains("not for this node")), "{:?}", bench.logs);
}

#[test]
fn jitter_delays_a_start_by_a_time_of_the_nodes_own_and_an_order_ends_it() {
    let share = ID.parse::<RolloutId>().unwrap().share("n", 600);
    assert!(share > 1);
    let mut flash = memory();
    installed(&mut flash, &plain(1, "one"));
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&step(2, "two", r#""percent":"100","jitter":600"#));
    bench.give(Event::Connected).unwrap();
    while bench.deliver().unwrap() {}
    assert_eq!(standing(&bench), (Phase::Idle, Some(1), Some(2)));
    let started = bench.now;
    bench.now += Duration::from_secs(share - 1);
    bench.give(Event::Tick).unwrap();
    while bench.deliver().unwrap() {}
    assert_eq!(standing(&bench), (Phase::Idle, Some(1), Some(2)));
    assert_eq!(bench.device.deadline(), Some(started + Duration::from_secs(share)));
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(2), None));

    bench.publish(&plain(3, "three"));
    bench.settle().unwrap();
    let other = step(4, "four", r#""percent":"100","jitter":600"#);
    bench.publish(&other);
    while bench.deliver().unwrap() {}
    assert_eq!(standing(&bench), (Phase::Idle, Some(3), Some(4)));
    let now = bench.now;
    bench.command(r#"[{"type":"install"}]"#);
    while bench.deliver().unwrap() {}
    assert_ne!(standing(&bench).0, Phase::Idle, "it starts at once");
    assert_eq!(bench.now, now);
}

#[test]
fn a_window_is_waited_for_by_the_clock_the_list_came_with() {
    let release = step(2, "two", r#""percent":"100","window":"22:00-04:00""#);
    let wait = |wall: Option<&str>, utc_offset| {
        let mut flash = memory();
        installed(&mut flash, &plain(1, "one"));
        let mut bench =
            Bench::start(&mut flash).unwrap().with_traits(Traits { utc_offset, ..Traits::default() });
        bench.retained.extend(release.packages.clone());
        bench.give(Event::Connected).unwrap();
        let before = bench.now;
        let wall = wall.map(|wall| wall.parse().unwrap());
        bench.give(Event::List { source: Source::Channel, payload: release.list.clone(), wall }).unwrap();
        if bench.phase() != Phase::Idle {
            return 0;
        }
        // Longer than an hour: the list is asked for now and then, and comes as it was.
        while bench.phase() == Phase::Idle {
            bench.now = bench.device.deadline().unwrap();
            bench.give(Event::Tick).unwrap();
        }
        (bench.now - before).as_secs()
    };
    assert_eq!(wait(Some("2026-11-28T23:00:00Z"), None), 0);
    assert_eq!(wait(Some("2026-11-28T20:00:00Z"), None), 2 * 3600);
    assert_eq!(wait(Some("2026-11-28T20:00:00Z"), Some(60)), 3600);
    assert_eq!(wait(None, None), 0, "without a clock a window means nothing");
}

#[test]
fn a_release_that_is_revoked_is_left_whatever_the_rollout_says() {
    let head = format!(
        r#"{{"type":"release","channel":"dev","sequence":3,"version":"3.0","revoked":[2],"rollout":{{"id":"{ID}","percent":"0"}}}}"#
    );
    let release = list_of(Some(head), &[("main.py", b"three")], &[]);
    for (runs, expected) in [(2, (Phase::Idle, Some(3), None)), (1, (Phase::Idle, Some(1), Some(3)))] {
        let mut flash = memory();
        installed(&mut flash, &plain(runs, "old"));
        let mut bench = Bench::start(&mut flash).unwrap();
        bench.publish(&release);
        bench.run().unwrap();
        assert_eq!(standing(&bench), expected, "it runs {runs}");
    }
}

#[test]
fn a_revoked_release_is_never_gone_back_to() {
    let head = r#"{"type":"release","channel":"dev","sequence":3,"version":"3.0","revoked":[2]}"#;
    let release = list_of(Some(head.to_owned()), &[("main.py", b"three")], &[]);
    let mut flash = memory();
    installed(&mut flash, &plain(2, "bad"));
    let timing = Timing { confirm_after: None, ..Timing::default() };
    let mut bench = Bench::start_with(&mut flash, timing).unwrap();
    bench.publish(&release);
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Confirming);
    bench.command(r#"[{"type":"rollback"}]"#);
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::Confirming, "{:?}", bench.logs);
    assert!(bench.logs.iter().any(|line| line.starts_with("revoked:")), "{:?}", bench.logs);
    for _ in 0..limits::UNCONFIRMED_BOOTS {
        bench.command(r#"[{"type":"restart"}]"#);
        bench.settle().unwrap();
    }
    assert_eq!(standing(&bench), (Phase::Idle, Some(3), None), "it is kept, though it never confirmed");
    drop(bench);
    assert_eq!(files(&flash), release.files);
}

#[test]
fn what_was_rolled_back_at_one_step_is_not_tried_again_at_the_next() {
    let mut flash = memory();
    installed(&mut flash, &plain(1, "one"));
    let timing = Timing { confirm_after: None, ..Timing::default() };
    let mut bench = Bench::start_with(&mut flash, timing).unwrap();
    bench.publish(&step(2, "bad", r#""percent":"100""#));
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Confirming);
    bench.command(r#"[{"type":"rollback"}]"#);
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::RolledBack, Some(2), None));
    let before = bench.reports.len();
    bench.publish(&step(3, "bad", r#""percent":"100""#));
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::RolledBack, Some(3), None));
    assert!(bench.reports[before..].iter().all(|report| report.state.phase == Phase::RolledBack));
    bench.publish(&plain(4, "good"));
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::Confirming, "another release is tried");
    bench.give(Event::Confirmed).unwrap();
    bench.settle().unwrap();
    assert_eq!(files(&flash), plain(4, "good").files);
}

#[test]
fn a_node_without_anything_takes_the_base_until_it_is_its_turn() {
    let mut flash = memory();
    let mut bench = Bench::start(&mut flash).unwrap();
    let base = plain(1, "one");
    bench.retained.extend(base.packages.clone());
    bench.retained.insert(channel().history(1), base.list.clone());
    bench.publish(&step(2, "two", r#""percent":"0","base":1"#));
    bench.run().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(1), Some(2)));
    assert_eq!(bench.open.len(), 2, "{:?}", bench.open);
    bench.publish(&plain(1, "old"));
    bench.settle().unwrap();
    assert!(
        bench.error().is_some_and(|error| error.starts_with("rollback:")),
        "2 was seen: {:?}",
        bench.error()
    );
    bench.publish(&step(3, "two", r#""percent":"100","base":1"#));
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, Some(3), None));
    drop(bench);
    assert_eq!(files(&flash), plain(3, "two").files);
}

#[test]
fn a_base_that_is_another_release_is_not_taken() {
    let mut flash = memory();
    let mut bench = Bench::start(&mut flash).unwrap();
    let other = plain(7, "seven");
    bench.retained.extend(other.packages.clone());
    bench.retained.insert(channel().history(1), other.list.clone());
    bench.publish(&step(2, "two", r#""percent":"0","base":1"#));
    bench.run().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, None, Some(2)));
    assert!(bench.logs.iter().any(|line| line.contains("wrong-base")), "{:?}", bench.logs);
    // Nor is one that nobody asked for.
    let source = Source::History(7);
    bench.give(Event::List { source, payload: other.list.clone(), wall: None }).unwrap();
    bench.settle().unwrap();
    assert_eq!(standing(&bench), (Phase::Idle, None, Some(2)));
}

#[test]
fn a_base_that_does_not_work_is_taken_back_and_not_tried_again() {
    let mut flash = memory();
    let timing = Timing { confirm_after: None, ..Timing::default() };
    let mut bench = Bench::start_with(&mut flash, timing).unwrap();
    let base = plain(1, "one");
    bench.retained.extend(base.packages.clone());
    bench.retained.insert(channel().history(1), base.list.clone());
    bench.publish(&step(2, "two", r#""percent":"0","base":1"#));
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Confirming);
    bench.command(r#"[{"type":"rollback"}]"#);
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::RolledBack);
    bench.give(Event::Disconnected).unwrap();
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::RolledBack);
    assert!(files(&flash).is_empty());
}
