use mpypi_protocol::PackageId;

use super::*;
use crate::{
    apps::{Kind, Order, PackageView, Status as TaskStatus, Task},
    flash::{Loss, Memory, PowerCut, Tear},
    testing::{Bench, Release, files, list_of, release, wheel},
    update::Timing,
};

const ROOM: u64 = 1 << 20;

fn asking() -> FaceOptions {
    FaceOptions { asks: true, ..FaceOptions::default() }
}

fn start<F: Flash>(flash: F, options: FaceOptions) -> Result<Bench<F>, BootError> {
    Bench::start_with_face(flash, options, Timing::default())
}

fn packages<F: Flash>(bench: &mut Bench<F>) -> Vec<PackageView> {
    bench.ask(Ask::Packages).unwrap().unwrap()
}

fn status<F: Flash>(bench: &mut Bench<F>, name: &str) -> &'static str {
    packages(bench).iter().find(|view| view.name == name).map_or("absent", |view| view.status)
}

fn order<F: Flash>(bench: &mut Bench<F>, order: Order) -> Result<u64, String> {
    let answers = bench.ask(|reply| Ask::Order(order, reply)).unwrap().unwrap();
    answers.into_iter().next().unwrap().1.map(|(id, _)| id)
}

fn names(name: &str) -> Vec<String> {
    vec![name.to_owned()]
}

fn tasks<F: Flash>(bench: &mut Bench<F>, kind: Kind) -> Vec<Task> {
    bench.ask(|reply| Ask::Tasks(kind, reply)).unwrap().unwrap()
}

fn two(sequence: u64, version: &str) -> Release {
    release(
        sequence,
        &[("main.py", b"print(1)\n")],
        &[("blink", version, &[("blink.py", version.as_bytes())]), ("led", "1.0", &[("led.py", b"led")])],
    )
}

#[test]
fn nothing_is_installed_before_somebody_chooses_it_and_then_only_that() {
    let mut bench = start(Memory::new(ROOM), asking()).unwrap();
    bench.publish(&two(1, "1.0"));
    bench.run().unwrap();
    assert_eq!(files(bench.device.store().flash()).len(), 0);
    assert_eq!(status(&mut bench, "blink"), "not_installed");
    order(&mut bench, Order::Download(names("blink"))).unwrap();
    assert_eq!(status(&mut bench, "blink"), "downloading");
    order(&mut bench, Order::Install(names("blink"))).unwrap();
    bench.settle().unwrap();
    assert_eq!(status(&mut bench, "blink"), "up_to_date");
    assert_eq!(status(&mut bench, "led"), "not_installed");
    let installed = bench.device.store().installed();
    assert_eq!((installed.wheels.len(), installed.list, installed.sequence), (1, None, None));

    // The rest makes it the channel's release.
    for name in ["led", "dev"] {
        order(&mut bench, Order::Download(names(name))).unwrap();
        order(&mut bench, Order::Install(names(name))).unwrap();
        bench.settle().unwrap();
    }
    assert_eq!(bench.device.store().installed().sequence, Some(1));
    assert_eq!(files(bench.device.store().flash()), two(1, "1.0").files);

    bench.publish(&two(2, "1.1"));
    bench.settle().unwrap();
    assert_eq!(status(&mut bench, "blink"), "upgradable");
    assert_eq!(status(&mut bench, "led"), "up_to_date");
    order(&mut bench, Order::Uninstall(names("blink"))).unwrap();
    bench.settle().unwrap();
    assert_eq!(status(&mut bench, "blink"), "not_installed");
    assert!(files(bench.device.store().flash()).keys().all(|path| !path.contains("blink")));
}

#[test]
fn what_is_refused_is_refused_in_the_words_that_scripts_know() {
    let mut bench = start(Memory::new(ROOM), asking()).unwrap();
    bench.publish(&two(2, "1.1"));
    bench.run().unwrap();
    let says = |bench: &mut Bench<Memory>, what| order(bench, what).unwrap_err();
    assert_eq!(says(&mut bench, Order::Download(names("x"))), "invalid module x, skip...");
    assert_eq!(says(&mut bench, Order::Install(names("x"))), "invalid module x, skip...");
    assert_eq!(says(&mut bench, Order::Uninstall(names("blink"))), "invalid module blink, skip...");
    assert_eq!(says(&mut bench, Order::Install(names("blink"))), "module blink is not downloaded, skip...");
    order(&mut bench, Order::Download(names("blink"))).unwrap();
    order(&mut bench, Order::Install(names("blink"))).unwrap();
    bench.settle().unwrap();
    let up_to_date = "installed version(1.1) is already up to date";
    assert_eq!(says(&mut bench, Order::Download(names("blink"))), up_to_date);
    assert_eq!(says(&mut bench, Order::Install(names("blink"))), up_to_date);
    let (old, _) = wheel("blink", "1.0", &[("blink.py", b"1.0")]);
    let local =
        |reply| Ask::Local { name: "blink".into(), version: "1.0".into(), payload: old.into(), reply };
    let refused = bench.ask(local).unwrap().unwrap().unwrap_err();
    assert_eq!(refused, "installed version(1.1) is higher than downloaded version(1.0), skip...");
}

#[test]
fn an_optional_package_is_installed_when_chosen_and_follows_the_channel_from_then_on() {
    let optional = |sequence, version: &str| {
        let mut release = two(sequence, version);
        let text = String::from_utf8(release.list.to_vec()).unwrap();
        release.list = text.replace(r#""name":"blink","#, r#""name":"blink","optional":true,"#).into();
        release
    };
    let mut bench = start(Memory::new(ROOM), FaceOptions::default()).unwrap();
    bench.publish(&optional(1, "1.0"));
    bench.run().unwrap();
    assert_eq!(bench.device.store().installed().sequence, Some(1));
    assert_eq!((status(&mut bench, "blink"), status(&mut bench, "led")), ("not_installed", "up_to_date"));
    assert_eq!(
        order(&mut bench, Order::Uninstall(names("led"))).unwrap_err(),
        "module led is required by the channel, skip..."
    );
    order(&mut bench, Order::Download(names("blink"))).unwrap();
    order(&mut bench, Order::Install(names("blink"))).unwrap();
    bench.settle().unwrap();
    assert_eq!(bench.device.store().installed().sequence, Some(1), "it is the release, with a choice");
    bench.publish(&optional(2, "1.1"));
    bench.settle().unwrap();
    let installed = bench.device.store().installed();
    assert_eq!((installed.sequence, &*installed.wheels["blink"].version), (Some(2), "1.1"));
    order(&mut bench, Order::Uninstall(names("blink"))).unwrap();
    bench.settle().unwrap();
    bench.publish(&optional(3, "1.2"));
    bench.settle().unwrap();
    let installed = bench.device.store().installed();
    assert_eq!((installed.sequence, installed.wheels.len()), (Some(3), 1));
}

#[test]
fn a_wheel_from_a_file_stays_through_the_channels_releases() {
    let mut bench = start(Memory::new(ROOM), FaceOptions::default()).unwrap();
    bench.publish(&two(1, "1.0"));
    bench.run().unwrap();
    let (payload, unpacked) = wheel("own", "0.1", &[("own.py", b"own")]);
    let ask =
        |reply| Ask::Local { name: "own".into(), version: "0.1".into(), payload: payload.into(), reply };
    bench.ask(ask).unwrap().unwrap().unwrap();
    bench.settle().unwrap();
    bench.publish(&two(2, "1.1"));
    bench.settle().unwrap();
    assert_eq!(bench.device.store().installed().sequence, Some(2));
    let mut expected = two(2, "1.1").files;
    expected.extend(unpacked);
    assert_eq!(files(bench.device.store().flash()), expected);
    order(&mut bench, Order::Uninstall(names("own"))).unwrap();
    bench.settle().unwrap();
    assert_eq!(files(bench.device.store().flash()), two(2, "1.1").files);
}

#[test]
fn a_package_that_is_not_what_it_says_fails_with_a_reason_and_the_same_call_tries_again() {
    let mut bench = start(Memory::new(ROOM), asking()).unwrap();
    let sound = two(1, "1.0");
    let mut lying = sound.clone();
    for bytes in lying.packages.values_mut() {
        let mut other = bytes.to_vec();
        other[0] ^= 1;
        *bytes = other.into();
    }
    bench.publish(&lying);
    bench.run().unwrap();
    order(&mut bench, Order::Download(names("blink"))).unwrap();
    let install = order(&mut bench, Order::Install(names("blink"))).unwrap();
    bench.settle().unwrap();
    let view = packages(&mut bench).remove(0);
    assert_eq!(view.status, "install_failed", "what was chained failed with it");
    assert!(view.install_failed_reason.unwrap().starts_with("wrong-hash: "));
    assert_eq!(tasks(&mut bench, Kind::Install)[0].id, install);
    bench.publish(&sound);
    bench.settle().unwrap();
    order(&mut bench, Order::Download(names("blink"))).unwrap();
    order(&mut bench, Order::Install(names("blink"))).unwrap();
    bench.settle().unwrap();
    assert_eq!(status(&mut bench, "blink"), "up_to_date");
    assert_eq!(
        tasks(&mut bench, Kind::Install).iter().map(|task| task.status).collect::<Vec<_>>(),
        [TaskStatus::Succeeded, TaskStatus::Failed],
        "newest first"
    );
}

/// Downloads, installs and removes, as far as the power lasts.
fn choose<F: Flash>(bench: &mut Bench<F>) -> Result<(), BootError> {
    bench.run()?;
    for what in [Order::Download(names("blink")), Order::Install(names("blink"))] {
        bench.ask(|reply| Ask::Order(what, reply))?;
    }
    bench.settle()?;
    bench.ask(|reply| Ask::Order(Order::Uninstall(names("led")), reply))?;
    bench.settle()
}

#[test]
fn power_cut_at_any_write_of_a_task_leaves_it_to_be_told_truly_and_gone_on_with() {
    let both = two(1, "1.0");
    let upgrade = two(2, "1.1");
    let mut before = Memory::new(ROOM);
    let mut bench = start(&mut before, asking()).unwrap();
    bench.publish(&both);
    bench.run().unwrap();
    for name in ["dev", "blink", "led"] {
        order(&mut bench, Order::Download(names(name))).ok();
        order(&mut bench, Order::Install(names(name))).ok();
        bench.settle().unwrap();
    }
    drop(bench);
    for loss in [Loss::Nothing, Loss::Everything] {
        for cut in 1.. {
            let mut flash = before.clone();
            let mut powered = PowerCut::new(&mut flash, cut, Tear::Torn);
            let lasted = match start(&mut powered, asking()) {
                Ok(mut bench) => {
                    bench.publish(&upgrade);
                    // An error is the power's.
                    let _ = choose(&mut bench);
                    !bench.device.store().flash().is_off()
                }
                Err(_) => false,
            };
            flash.lose(loss);
            let mut bench = start(&mut flash, asking()).unwrap();
            bench.publish(&upgrade);
            bench.run().unwrap();
            let installed = bench.device.store().installed().wheels.clone();
            for task in
                [Kind::Download, Kind::Install, Kind::Uninstall].map(|kind| tasks(&mut bench, kind)).concat()
            {
                let context = format!("cut {cut}, {loss:?}: {task:?}");
                assert_eq!(task.status, TaskStatus::Succeeded, "{context}");
                match task.kind {
                    Kind::Uninstall => assert!(!installed.contains_key(&task.module), "{context}"),
                    Kind::Install if task.version == "1.1" => {
                        assert_eq!(installed["blink"].digest, task.digest, "{context}");
                    }
                    _ => {}
                }
            }
            if lasted {
                assert_eq!(status(&mut bench, "blink"), "up_to_date");
                assert_eq!(status(&mut bench, "led"), "not_installed");
                break;
            }
        }
    }
}

#[test]
fn logs_and_tasks_stay_within_their_bounds() {
    let mut bench = start(Memory::new(ROOM), asking()).unwrap();
    bench.publish(&two(1, "1.0"));
    bench.run().unwrap();
    for _ in 0..limits::TASKS {
        for what in
            [Order::Download(names("led")), Order::Install(names("led")), Order::Uninstall(names("led"))]
        {
            order(&mut bench, what).unwrap();
            bench.settle().unwrap();
        }
    }
    let count: usize = [Kind::Download, Kind::Install, Kind::Uninstall]
        .map(|kind| tasks(&mut bench, kind).len())
        .iter()
        .sum();
    assert_eq!(count, limits::TASKS);
    let flash = bench.device.store().flash();
    let logs: Vec<_> = flash.files().filter(|(path, _)| path.starts_with(LOGS)).collect();
    assert_eq!(logs.len(), limits::TASKS);
    assert!(logs.iter().all(|(_, log)| log.len() as u64 <= limits::TASK_LOG));
    for _ in 0..1000 {
        bench.device.log(99_999, &"é".repeat(100));
    }
    let log =
        crate::flash::read_all(bench.device.store().flash(), &log_of(99_999), limits::TASK_LOG).unwrap();
    assert!(String::from_utf8(log.unwrap()).is_ok(), "cut between characters");
}

/// A release with firmware for two boards.
fn with_firmware(sequence: u64, version: &str) -> Release {
    let mut release = list_of(
        Some(format!(r#"{{"type":"release","channel":"dev","sequence":{sequence},"version":"1"}}"#)),
        &[],
        &[],
    );
    let mut entries = String::new();
    for target in ["esp32-eth", "esp32s3"] {
        let image = format!("{target} {version}").into_bytes();
        let digest = Digest::of(&image);
        entries += &format!(
            r#",{{"type":"firmware","name":"{target}","version":"{version}","target":"{target}","pkg_sha256":"{digest}","size":{}}}"#,
            image.len()
        );
        release.packages.insert(PackageId::Firmware(digest).topic(), image.into());
    }
    let text = String::from_utf8(release.list.to_vec()).unwrap();
    release.list = format!("{}{entries}]", text.strip_suffix(']').unwrap()).into();
    release
}

fn board(asks: bool) -> FaceOptions {
    let firmware = FirmwareOptions { key: Some("esp32".into()), version: "1.0.0".into(), slot: 4096 };
    FaceOptions { asks, firmware, mac: None }
}

#[test]
fn firmware_that_fits_is_offered_and_what_does_not_is_not() {
    let mut bench = start(Memory::new(ROOM), board(true)).unwrap();
    bench.publish(&with_firmware(1, "1.0.1-dev.2"));
    bench.run().unwrap();
    let offered = bench.ask(Ask::Firmware).unwrap().unwrap();
    assert_eq!(
        offered.iter().map(|view| (&*view.name, view.status)).collect::<Vec<_>>(),
        [("esp32-eth", "upgradable")]
    );
    assert_eq!(
        order(&mut bench, Order::Firmware(names("esp32s3"))).unwrap_err(),
        "invalid module esp32s3, skip..."
    );
    order(&mut bench, Order::Firmware(names("esp32-eth"))).unwrap();
    bench.settle().unwrap();
    let status = bench.ask(Ask::Status).unwrap().unwrap();
    assert_eq!((&*status.version, status.is_busy), ("1.0.1-dev.2", false));
    assert_eq!(tasks(&mut bench, Kind::Install)[0].status, TaskStatus::Succeeded);
    assert_eq!(
        order(&mut bench, Order::Firmware(names("esp32-eth"))).unwrap_err(),
        "installed version(1.0.1-dev.2) is already up to date"
    );
}

#[test]
fn a_device_that_follows_its_channel_takes_newer_firmware_by_itself_and_no_older_one() {
    let mut bench = start(Memory::new(ROOM), board(false)).unwrap();
    let version = |bench: &mut Bench<Memory>| bench.ask(Ask::Status).unwrap().unwrap().version;
    bench.publish(&with_firmware(1, "1.1.0"));
    bench.run().unwrap();
    assert_eq!(version(&mut bench), "1.1.0");
    bench.publish(&with_firmware(2, "1.1.0-rc.1"));
    bench.settle().unwrap();
    assert_eq!(version(&mut bench), "1.1.0");
}

/// What is left of an empty board whose power goes off at its operation `cut` while this is published, and whether it never did.
fn cut_off(news: &Release, cut: u64) -> (Memory, bool) {
    let mut flash = Memory::new(ROOM);
    let mut powered = PowerCut::new(&mut flash, cut, Tear::Torn);
    let lasted = match start(&mut powered, board(false)) {
        Ok(mut bench) => {
            bench.publish(news);
            // An error is the power's.
            let _ = bench.run();
            !bench.device.store().flash().is_off()
        }
        Err(_) => false,
    };
    flash.lose(Loss::Everything);
    (flash, lasted)
}

#[test]
fn power_cut_at_any_write_of_firmware_from_the_channel_ends_with_the_new_one() {
    let news = with_firmware(1, "1.1.0");
    for cut in 1.. {
        let (mut flash, lasted) = cut_off(&news, cut);
        let mut bench = start(&mut flash, board(false)).unwrap();
        bench.publish(&news);
        bench.run().unwrap();
        assert_eq!(bench.ask(Ask::Status).unwrap().unwrap().version, "1.1.0", "cut {cut}");
        let tasks = tasks(&mut bench, Kind::Install);
        assert_eq!(tasks[0].status, TaskStatus::Succeeded, "cut {cut}");
        if lasted {
            break;
        }
    }
}

#[test]
fn power_cut_at_any_write_of_firmware_in_chunks_fetches_no_chunk_again_that_was_there() {
    let mut news = with_firmware(1, "1.1.0");
    // As large as several chunks.
    let image: Vec<u8> = (0..3500_u32).map(|n| (n * 7 + n / 251) as u8).collect();
    let list = String::from_utf8(news.list.to_vec()).unwrap();
    let old = news.packages.iter().find(|(_, bytes)| bytes.starts_with(b"esp32-eth")).unwrap();
    let (topic, length, digest) = (old.0.clone(), old.1.len(), Digest::of(old.1));
    news.packages.remove(&topic);
    let new = Digest::of(&image);
    news.list = list
        .replace(&format!("\"{digest}\",\"size\":{length}"), &format!("\"{new}\",\"size\":{}", image.len()))
        .into();
    news.packages.insert(PackageId::Firmware(new).topic(), image.into());
    let news = news.in_chunks(1024);
    let topics = news.chunks();
    assert_eq!(topics.len(), 4);
    let mut resumed = std::collections::BTreeSet::new();
    for cut in 1.. {
        let (mut flash, lasted) = cut_off(&news, cut);
        let there = flash.files().find(|(path, _)| path.ends_with(parts::END));
        let whole = |bytes: &[u8]| if bytes.len() == 3500 { 4 } else { bytes.len() / 1024 };
        let there = there.map(|(_, bytes)| whole(bytes));
        let mut bench = start(&mut flash, board(false)).unwrap();
        bench.publish(&news);
        bench.run().unwrap();
        assert_eq!(bench.ask(Ask::Status).unwrap().unwrap().version, "1.1.0", "cut {cut}");
        // Before there is a connection, and when there is one.
        let asked: std::collections::BTreeSet<_> =
            bench.asked.iter().filter(|asked| topics.contains(asked)).cloned().collect();
        if let Some(there) = there {
            assert_eq!(asked, topics[there..].iter().cloned().collect(), "cut {cut}");
            resumed.insert(there);
        }
        if lasted {
            break;
        }
    }
    assert_eq!(resumed, (0..=4).collect());
}

#[test]
fn what_there_is_to_choose_from_outlives_a_restart_without_a_broker() {
    let mut flash = Memory::new(ROOM);
    let mut bench = start(&mut flash, asking()).unwrap();
    bench.publish(&two(1, "1.0"));
    bench.run().unwrap();
    bench.publish(&two(2, "1.1"));
    bench.settle().unwrap();
    order(&mut bench, Order::Download(names("blink"))).unwrap();
    bench.settle().unwrap();
    let before = packages(&mut bench);
    assert_eq!(before.iter().map(|view| &*view.name).collect::<Vec<_>>(), ["blink", "dev", "led"]);
    drop(bench);
    let mut bench = start(&mut flash, asking()).unwrap();
    assert_eq!(packages(&mut bench), before);
    // What is on the shelf is installed by itself; what is not has to wait for a connection.
    order(&mut bench, Order::Install(names("blink"))).unwrap();
    order(&mut bench, Order::Download(names("led"))).unwrap();
    bench.settle().unwrap();
    assert_eq!(status(&mut bench, "blink"), "up_to_date");
    assert_eq!(status(&mut bench, "led"), "downloading");
    bench.publish(&two(2, "1.1"));
    bench.run().unwrap();
    assert_eq!(status(&mut bench, "led"), "downloaded");
}

#[test]
fn a_kept_list_is_judged_anew_and_one_that_is_damaged_or_expired_offers_nothing() {
    let mut flash = Memory::new(4 * ROOM);
    let mut bench = start(&mut flash, asking()).unwrap();
    bench.publish(&two(1, "1.0"));
    bench.run().unwrap();
    drop(bench);
    let expired = r#"[{"type":"release","channel":"dev","sequence":1,"version":"1","expires":"2026-11-28T08:59:59Z"},
        {"type":"wheel","name":"blink","version":"1","pkg_sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}]"#;
    let current = expired.replace("08:59:59", "09:00:01");
    let other = current.replace("\"dev\"", "\"stable\"");
    let large = [&b"["[..], &vec![b' '; mpypi_protocol::limits::LIST], b"]"].concat();
    for (kept, count) in [
        (current.as_bytes(), 1),
        (expired.as_bytes(), 0),
        (other.as_bytes(), 0),
        (&current.as_bytes()[..100], 0),
        (b"", 0),
        (&large, 0),
    ] {
        journal::write_list(&mut flash, OFFER, kept).unwrap();
        let mut bench = start(&mut flash, asking()).unwrap();
        assert_eq!(packages(&mut bench).len(), count, "{:?}", kept.get(..200));
    }
}
