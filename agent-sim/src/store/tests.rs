use std::collections::BTreeSet;

use mpypi_protocol::node::Phase;

use super::*;
use crate::{
    flash::{Disk, Loss, Memory, PowerCut, Tear},
    testing::{Bench, Files, Release, files, release},
    update::Timing,
};

const CAPACITY: u64 = 1 << 20;

fn first() -> Release {
    release(
        1,
        &[
            ("main.py", b"print(1)"),
            ("settings.json", b"{}"),
            ("assets/deep/a.txt", &[b'a'; 5000]),
            ("none", b""),
        ],
        &[("blink", "1.0", &[("blink/__init__.py", b"x = 1"), ("blink/old.py", b"o = 1")])],
    )
}

/// Changes `main.py`, a wheel and a user's file; removes `assets/`; adds `pages/`; has the same bytes twice.
fn second() -> Release {
    release(
        2,
        &[
            ("main.py", b"print(2)"),
            ("settings.json", b"{}"),
            ("none", b""),
            ("also_none", b""),
            ("pages/index.html", b"hello"),
            ("pages/copy.html", b"hello"),
            ("notes.txt", b"ours"),
        ],
        &[("blink", "2.0", &[("blink/__init__.py", b"x = 2"), ("blink/new.py", b"n = 2")])],
    )
}

fn put(flash: &mut Memory, path: &str, bytes: &[u8]) {
    flash.create(path).unwrap();
    flash.append(path, bytes).unwrap();
    flash.sync(path).unwrap();
    flash.sync(flash::parent(path)).unwrap();
}

/// What the user put there.
fn users() -> Files {
    let file = |path: &str, bytes: &[u8]| (path.to_owned(), bytes.to_vec());
    [file("notes.txt", b"mine"), file("log.txt", b"boot")].into()
}

fn empty_device() -> Memory {
    let mut flash = Memory::new(CAPACITY);
    for (path, bytes) in users() {
        put(&mut flash, &path, &bytes);
    }
    flash
}

fn with_users(release: &Release) -> Files {
    let mut all = users();
    all.extend(release.files.clone());
    all
}

fn apply(flash: impl Flash, release: &Release) -> Phase {
    let Ok(mut bench) = Bench::start(flash) else { return Phase::Failed };
    bench.publish(release);
    match bench.run() {
        Ok(()) => bench.phase(),
        Err(_) => Phase::Failed,
    }
}

/// The device comes to have the release. Where power failed too often before it was confirmed, it was taken back:
/// then somebody has to tell the device to look again.
fn arrive(flash: &mut Memory, release: &Release) {
    let mut bench = Bench::start(flash).unwrap();
    bench.publish(release);
    bench.run().unwrap();
    if bench.phase() == Phase::RolledBack {
        bench.command(r#"[{"type":"check"}]"#);
        bench.settle().unwrap();
    }
    assert_eq!(bench.phase(), Phase::Idle, "{:?}", bench.error());
}

fn device_with(release: &Release) -> Memory {
    let mut flash = empty_device();
    assert_eq!(apply(&mut flash, release), Phase::Idle);
    assert_eq!(files(&flash), with_users(release));
    flash
}

/// Nothing of the agent's is left but what it knows.
fn assert_clean(flash: &Memory) {
    let left: Vec<_> = flash.files().map(|(path, _)| path).filter(|path| path.starts_with(FOLDER)).collect();
    assert_eq!(left, [INSTALLED, SEEN]);
    let folders: BTreeSet<_> = flash.folders().collect();
    let used: BTreeSet<_> = flash.files().flat_map(|(path, _)| parents(path)).collect();
    let extra: Vec<_> = folders.difference(&used).filter(|folder| !folder.starts_with(FOLDER)).collect();
    assert!(extra.is_empty(), "empty folders are left: {extra:?}");
}

fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(end, _)| &path[..end])
}

/// A file system, short enough to read.
fn names(flash: &Memory) -> Vec<(String, String)> {
    let short = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(20)]).into_owned();
    flash.files().map(|(path, bytes)| (path.to_owned(), short(bytes))).collect()
}

/// Cuts the power at every operation of `run`, in every way; boots, cutting the power at every operation of
/// the recovery as well; then the device has one of `allowed`, complete, and `converge` leads to `goal`. Says how many
/// operations `run` has, and how many cuts that made.
fn cut_everywhere(
    start: &Memory,
    run: impl Fn(&mut PowerCut<Memory>),
    allowed: &[Files],
    converge: impl Fn(&mut Memory),
    goal: &Files,
) -> (u64, u64) {
    let mut cuts = 0;
    // What follows from a flash follows from all that is on it, and all that is left is synced: the same flash again
    // leads to nothing new.
    let mut known = BTreeSet::new();
    for cut_at in 1.. {
        for (tear, loss) in [Tear::Clean, Tear::Torn].into_iter().flat_map(|t| Loss::ALL.map(|l| (t, l))) {
            let place = format!("cut at {cut_at}, {tear:?}, {loss:?}");
            let mut flash = PowerCut::new(start.clone(), cut_at, tear);
            run(&mut flash);
            if !flash.is_off() {
                return (cut_at - 1, cuts);
            }
            if tear == Tear::Torn && !flash.tore() {
                break;
            }
            let mut flash = flash.into_inner();
            flash.lose(loss);
            cuts += 1;
            if !known.insert(fingerprint(&flash)) {
                continue;
            }
            cuts += cut_recovery_everywhere(&flash, |mut flash, then| {
                if known.insert(fingerprint(&flash)) {
                    check(&mut flash, allowed, &converge, goal, &format!("{place}, then {then}"));
                }
            });
            check(&mut flash, allowed, &converge, goal, &place);
        }
    }
    unreachable!()
}

/// The same while `start`, a device with `before`, comes to have a release.
fn cut_the_way_to(release: &Release, start: &Memory, before: Files) {
    let goal = with_users(release);
    let run = |flash: &mut PowerCut<Memory>| {
        apply(flash, release);
    };
    let converge = |flash: &mut Memory| arrive(flash, release);
    let cuts = cut_everywhere(start, run, &[before, goal.clone()], converge, &goal);
    assert!(cuts.0 > 50 && cuts.1 > 1000, "{cuts:?}");
}

/// Cuts the power at every operation of the start that follows a cut, torn or not, with all lost that was not synced
/// or nothing. Says how many cuts that made.
fn cut_recovery_everywhere(start: &Memory, mut then: impl FnMut(Memory, &str)) -> u64 {
    let mut cuts = 0;
    for cut_at in 1.. {
        for (tear, loss) in [Tear::Clean, Tear::Torn]
            .into_iter()
            .flat_map(|tear| [Loss::Nothing, Loss::Everything].map(|loss| (tear, loss)))
        {
            let mut recovery = PowerCut::new(start.clone(), cut_at, tear);
            let _ = Store::boot(&mut recovery);
            if !recovery.is_off() {
                return cuts;
            }
            if tear == Tear::Torn && !recovery.tore() {
                break;
            }
            let mut flash = recovery.into_inner();
            flash.lose(loss);
            cuts += 1;
            then(flash, &format!("at {cut_at}, {tear:?}, {loss:?}"));
        }
    }
    unreachable!()
}

/// The next start finds one of `allowed`, complete, and `converge` leads to `goal`. Where no start gets anywhere before
/// the release is given up, the first of `allowed` is back.
fn check(flash: &mut Memory, allowed: &[Files], converge: &impl Fn(&mut Memory), goal: &Files, place: &str) {
    if let Some(given_up) = start_in_vain(flash.clone()) {
        assert!(files(&given_up) == allowed[0], "{place}, given up: {:?}", names(&given_up));
    }
    check_boot(flash, allowed, place);
    converge(flash);
    assert!(&files(flash) == goal, "{place}: {:?}", names(flash));
    assert_clean(flash);
}

/// What a device gives up that was installing, as if its power had gone off whenever it had counted a start; `None` if it was
/// not installing.
fn start_in_vain(mut flash: Memory) -> Option<Memory> {
    let mut journal = journal::read_journal(&flash).ok()??;
    if journal.step != Step::Install {
        return None;
    }
    journal.boots = limits::UNCONFIRMED_BOOTS;
    journal::replace(&mut flash, JOURNAL, &journal).unwrap();
    let (_, boot) = Store::boot(&mut flash).unwrap();
    assert!(matches!(boot, Boot::RolledBack { .. }), "{boot:?}");
    Some(flash)
}

/// All that is on a flash.
fn fingerprint(flash: &Memory) -> Digest {
    let mut hasher = Hasher::default();
    for (path, bytes) in flash.files() {
        hasher.update(format!("{path}\0{}\0", bytes.len()).as_bytes());
        hasher.update(bytes);
    }
    for folder in flash.folders() {
        hasher.update(format!("{folder}/").as_bytes());
    }
    hasher.finish()
}

/// A device starts with one of `allowed`, complete, and if it can still go back, the first of them comes
/// back, complete.
fn check_boot(flash: &mut Memory, allowed: &[Files], place: &str) {
    let (_, boot) = Store::boot(&mut *flash).unwrap();
    assert!(allowed.contains(&files(flash)), "{place}: {:?}", names(flash));
    if matches!(boot, Boot::Confirming { .. }) {
        let mut taken_back = flash.clone();
        roll_back(&mut taken_back).unwrap();
        assert!(files(&taken_back) == allowed[0], "{place}, taken back: {:?}", names(&taken_back));
    }
}

#[test]
fn a_power_cut_during_a_first_install_leaves_nothing_or_the_release() {
    let release = first();
    cut_the_way_to(&release, &empty_device(), users());
}

#[test]
fn a_power_cut_during_an_upgrade_leaves_the_old_or_the_new_release() {
    let (old, new) = (first(), second());
    cut_the_way_to(&new, &device_with(&old), with_users(&old));
}

#[test]
fn a_power_cut_while_files_are_only_removed_leaves_all_of_them_or_none() {
    let old = first();
    let new = release(2, &[("main.py", b"print(1)")], &[]);
    cut_the_way_to(&new, &device_with(&old), with_users(&old));
}

/// A release with a file and a wheel in chunks, and a file that is whole.
fn in_chunks() -> Release {
    let large: Vec<u8> = (0..5000_u32).map(|n| (n * 7 + n / 251) as u8).collect();
    let mut rng = fastrand::Rng::with_seed(1);
    let noise: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(1500).collect();
    let wheel = ("blink", "1.0", &[("blink/noise.bin", noise.as_slice())][..]);
    release(1, &[("data/large.bin", &large), ("main.py", b"print(1)")], &[wheel]).in_chunks(2048)
}

#[test]
fn a_power_cut_while_packages_come_in_chunks_leaves_nothing_or_the_release() {
    let release = in_chunks();
    assert_eq!(release.chunks().len(), 3 + 2);
    cut_the_way_to(&release, &empty_device(), users());
}

#[test]
fn after_a_power_cut_chunks_that_are_on_the_flash_are_not_fetched_again() {
    let release = in_chunks();
    let large = &release.files["data/large.bin"];
    let digest = Digest::of(large);
    let topics: Vec<_> =
        release.chunks().into_iter().filter(|topic| topic.contains(&digest.to_string())).collect();
    let (mut resumed, mut cut_off) = (BTreeSet::new(), 0);
    for cut_at in 1.. {
        let mut was_off = false;
        for (tear, loss) in [Tear::Clean, Tear::Torn].into_iter().flat_map(|t| Loss::ALL.map(|l| (t, l))) {
            let mut flash = PowerCut::new(empty_device(), cut_at, tear);
            apply(&mut flash, &release);
            was_off |= flash.is_off();
            let mut flash = flash.into_inner();
            flash.lose(loss);
            let there =
                |name: &str| flash.files().find(|(path, _)| *path == name).map(|(_, bytes)| bytes.to_vec());
            let part = there(&super::in_chunks(&digest));
            let whole = there(&staged(&digest, 0)).is_some() || there("data/large.bin").is_some();
            let right = part.as_ref().map_or(0, |part| {
                large
                    .chunks(2048)
                    .scan(0, |end, chunk| {
                        *end += chunk.len();
                        Some((*end, chunk))
                    })
                    .take_while(|(end, chunk)| part.get(end - chunk.len()..*end) == Some(chunk))
                    .count()
            });
            cut_off +=
                usize::from(part.is_some_and(|part| part.len() % 2048 != 0 && part.len() < large.len()));
            let mut bench = Bench::start(&mut flash).unwrap();
            bench.publish(&release);
            bench.run().unwrap();
            let asked: Vec<_> = bench.asked.iter().filter(|asked| topics.contains(asked)).cloned().collect();
            let first = if whole { topics.len() } else { right };
            assert_eq!(asked, topics[first..], "cut at {cut_at}, {tear:?}, {loss:?}");
            resumed.insert(first);
        }
        if !was_off {
            break;
        }
    }
    assert_eq!(resumed, (0..=3).collect(), "every number of chunks was there once");
    assert!(cut_off > 0, "and some were there in part");
}

/// The agent for MicroPython as a release brings it, with its `boot.py`; what a start needs of it, and a little more.
fn agent(sequence: u64, version: &str) -> Release {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../device/mpypi");
    let members = ["__init__", "agent", "boot", "plan", "store"].map(|name| {
        let mut text = std::fs::read(folder.join(format!("{name}.py"))).unwrap();
        // The beginning of each is enough: what counts is that it changes, and where it is.
        text.truncate(200);
        text.extend_from_slice(format!("# {version}\n").as_bytes());
        (format!("mpypi/{name}.py"), text)
    });
    let members: Vec<_> = members.iter().map(|(name, text)| (name.as_str(), text.as_slice())).collect();
    let boot = format!("from mpypi import boot\nboot.run()\n# {version}\n");
    release(sequence, &[("boot.py", boot.as_bytes())], &[("mpypi", version, &members)])
}

#[test]
fn a_power_cut_while_the_agent_replaces_itself_leaves_the_old_or_the_new_one() {
    let (old, new) = (agent(1, "1.0"), agent(2, "2.0"));
    cut_the_way_to(&new, &device_with(&old), with_users(&old));
}

/// A device with the second release on it, not confirmed.
fn confirming() -> Memory {
    let mut flash = device_with(&first());
    let timing = Timing { confirm_after: None, ..Timing::default() };
    let mut bench = Bench::start_with(&mut flash, timing).unwrap();
    bench.publish(&second());
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Confirming);
    assert_eq!(files(&flash), with_users(&second()));
    flash
}

fn roll_back(flash: impl Flash) -> Result<(), Refusal> {
    let Ok((mut store, boot)) = Store::boot(flash) else { return Ok(()) };
    if matches!(boot, Boot::Confirming { .. }) {
        store.give_up(&Refusal::ToldTo)?;
        let _ = store.reboot();
    }
    Ok(())
}

#[test]
fn a_power_cut_during_a_rollback_leaves_the_old_or_the_new_release() {
    let (old, new) = (with_users(&first()), with_users(&second()));
    let converge = |flash: &mut Memory| roll_back(flash).unwrap();
    let run = |flash: &mut PowerCut<Memory>| drop(roll_back(flash));
    let allowed = [old.clone(), new];
    let cuts = cut_everywhere(&confirming(), run, &allowed, converge, &old);
    assert!(cuts.0 > 20 && cuts.1 > 300, "{cuts:?}");
}

#[test]
fn a_power_cut_while_confirming_keeps_the_new_release_or_rolls_back() {
    let confirm = |flash: &mut PowerCut<Memory>| {
        if let Ok((mut store, _)) = Store::boot(flash) {
            let _ = store.confirm();
        }
    };
    // Cut often enough, the new release has started too often without being confirmed.
    let (old, new) = (with_users(&first()), with_users(&second()));
    let converge = |flash: &mut Memory| {
        let (mut store, boot) = Store::boot(&mut *flash).unwrap();
        if matches!(boot, Boot::Confirming { .. }) {
            store.confirm().unwrap();
        }
        let sequence = store.installed().sequence;
        drop(store);
        if sequence != Some(2) {
            arrive(flash, &second());
        }
    };
    let mut start = confirming();
    let mut journal = journal::read_journal(&start).unwrap().unwrap();
    journal.boots = 0;
    journal::replace(&mut start, JOURNAL, &journal).unwrap();
    let cuts = cut_everywhere(&start, confirm, &[old, new.clone()], converge, &new);
    assert!(cuts.0 > 5 && cuts.1 > 200, "{cuts:?}");
}

#[test]
fn a_real_directory_is_installed_upgraded_and_left_alone_elsewhere() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("notes.txt"), "mine").unwrap();
    // A link in the way of a file is replaced, not followed.
    let outside = tempfile::NamedTempFile::new().unwrap();
    std::os::unix::fs::symlink(outside.path(), root.path().join("main.py")).unwrap();
    for release in [first(), second()] {
        assert_eq!(apply(Disk::open(root.path()).unwrap(), &release), Phase::Idle);
        for (path, bytes) in &release.files {
            assert_eq!(&std::fs::read(root.path().join(path)).unwrap(), bytes, "{path}");
        }
    }
    assert!(!root.path().join("assets").exists());
    assert_eq!(std::fs::read(outside.path()).unwrap(), b"");
    assert!(!root.path().join("main.py").is_symlink());
}

#[test]
fn a_release_that_never_confirms_is_rolled_back_and_not_tried_again() {
    let mut flash = confirming();
    // `confirming` restarted once after the install.
    for _ in 1..limits::UNCONFIRMED_BOOTS {
        let (_, boot) = Store::boot(&mut flash).unwrap();
        assert!(matches!(boot, Boot::Confirming { .. }));
    }
    let (_, boot) = Store::boot(&mut flash).unwrap();
    let Boot::RolledBack { seen } = boot else { panic!("{boot:?}") };
    assert_eq!(seen.sequence, Some(2));
    assert_eq!(files(&flash), with_users(&first()));

    assert_eq!(apply(&mut flash, &second()), Phase::RolledBack);
    assert_eq!(files(&flash), with_users(&first()));
    let third = release(3, &[("main.py", b"print(3)")], &[]);
    assert_eq!(apply(&mut flash, &third), Phase::Idle);
    assert_eq!(files(&flash), with_users(&third));
    assert_clean(&flash);
}

#[test]
fn what_leaves_the_list_is_removed_and_what_the_user_put_there_stays() {
    let mut flash = device_with(&first());
    put(&mut flash, "assets/deep/mine.txt", b"mine");
    assert_eq!(apply(&mut flash, &second()), Phase::Idle);
    let mut expected = with_users(&second());
    expected.insert("assets/deep/mine.txt".into(), b"mine".to_vec());
    assert_eq!(files(&flash), expected);
}

#[test]
fn a_file_the_user_deleted_or_changed_comes_back_when_told_to_check() {
    let mut flash = device_with(&first());
    flash.remove("main.py").unwrap();
    flash.append("lib/blink/__init__.py", b"# mine").unwrap();
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&first());
    bench.run().unwrap();
    bench.command(r#"[{"type":"check"}]"#);
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    assert_eq!(files(&flash), with_users(&first()));
}

#[test]
fn a_file_in_the_way_of_a_folder_is_a_conflict_and_nothing_changes() {
    let mut flash = device_with(&first());
    for sources in [&[("log.txt/x", &b"1"[..])], &[("assets", &b"1"[..])]] {
        let mut bench = Bench::start(&mut flash).unwrap();
        bench.publish(&release(9, sources, &[]));
        bench.run().unwrap();
        assert_eq!(bench.phase(), Phase::Failed);
        let error = bench.error().unwrap_or_default();
        assert!(error.starts_with("conflict: ") || error.starts_with("rollback: "), "{error}");
        assert_eq!(files(&flash), with_users(&first()));
    }
}

#[test]
fn verified_packages_are_kept_over_a_restart() {
    let mut flash = empty_device();
    let release = first();
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    // All but one are on the broker.
    let missing = release.packages.keys().find(|topic| topic.contains("main.py")).unwrap().clone();
    let missing_bytes = bench.retained.remove(&missing).unwrap();
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Failed);
    flash.lose(Loss::Nothing);

    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&release);
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    assert_eq!(bench.device.report().state.done, missing_bytes.len() as u64);
    assert_eq!(files(&flash), with_users(&release));
}

#[test]
fn a_flash_that_is_too_small_is_reported_and_the_old_release_stays() {
    let mut flash = Memory::new(20_000);
    assert_eq!(apply(&mut flash, &first()), Phase::Idle);
    for size in [15_000, 60_000] {
        let mut bench = Bench::start(&mut flash).unwrap();
        bench.publish(&release(size, &[("big", &vec![1; size as usize])], &[]));
        bench.run().unwrap();
        assert!(bench.error().is_some_and(|error| error.starts_with("no-space: ")), "{:?}", bench.error());
        assert_eq!(files(&flash), first().files);
        assert!(flash.list(STAGING).unwrap().is_empty(), "the room belongs to the application");
    }
}

#[test]
fn whatever_is_free_a_device_has_one_release_and_starts() {
    let old = device_with(&first());
    let used: u64 = old.files().map(|(_, bytes)| bytes.len() as u64).sum();
    let mut ends = BTreeSet::new();
    for free in (0..16_000).step_by(50) {
        let mut flash = old.clone();
        flash.resize(used + free);
        // Two starts with all that follows: the second one is the user's who turned it off and on again.
        for start in 1..=2 {
            let mut bench = Bench::start(&mut flash)
                .unwrap_or_else(|error| panic!("{free} free, start {start}: {error:?}"));
            bench.publish(&second());
            bench.run().unwrap_or_else(|error| panic!("{free} free, start {start}: {error:?}"));
        }
        let found = files(&flash);
        let end = [with_users(&first()), with_users(&second())].iter().position(|files| *files == found);
        assert!(end.is_some(), "{free} free: {:?}", names(&flash));
        ends.insert(end);
        flash.resize(CAPACITY);
        assert_eq!(apply(&mut flash, &second()), Phase::Idle, "{free} free, then enough");
        assert_eq!(files(&flash), with_users(&second()));
        assert_clean(&flash);
    }
    assert_eq!(ends.len(), 2, "too little and enough were both tried");
}

#[test]
fn a_flash_filled_up_while_a_release_waits_for_confirmation_keeps_the_device_starting() {
    let confirming = confirming();
    let used: u64 = confirming.files().map(|(_, bytes)| bytes.len() as u64).sum();
    let mut flash = confirming;
    // The application logs until nothing is left.
    flash.resize(used);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);
    assert_eq!(files(&flash), with_users(&second()));
    assert_clean(&flash);
}

#[test]
fn a_damaged_record_is_an_error_and_not_a_guess() {
    let mut flash = device_with(&first());
    put(&mut flash, JOURNAL, b"{\"format\":1}\n");
    assert!(matches!(Store::boot(&mut flash), Err(BootError::Record(RecordError::Damaged { .. }))));
    put(&mut flash, JOURNAL, b"{\"format\":1");
    assert!(matches!(Store::boot(&mut flash), Err(BootError::Record(RecordError::Incomplete { .. }))));
    put(&mut flash, JOURNAL, b"{\"format\":2}\n");
    assert!(matches!(Store::boot(&mut flash), Err(BootError::Record(RecordError::Format { .. }))));
}
#[test]
fn the_agent_stays_on_a_device_whose_release_does_not_bring_it() {
    let members: &[(&str, &[u8])] = &[("mpypi/__init__.py", b""), ("mpypi/old.py", b"")];
    let with_agent = release(1, &[("main.py", b"1")], &[("mpypi", "1.0", members)]);
    let mut flash = device_with(&with_agent);
    let newer: &[(&str, &[u8])] = &[("mpypi/__init__.py", b"")];
    assert_eq!(apply(&mut flash, &release(2, &[], &[("mpypi", "2.0", newer)])), Phase::Idle);
    assert!(!files(&flash).contains_key("lib/mpypi/old.py"));
    assert_eq!(apply(&mut flash, &release(3, &[("other.py", b"3")], &[])), Phase::Idle);
    let left: Vec<_> = files(&flash).into_keys().collect();
    assert_eq!(left, ["lib/mpypi/__init__.py", "log.txt", "notes.txt", "other.py"]);
}

/// What this agent and the MicroPython one must read, write and do alike.
#[derive(serde::Deserialize)]
struct Vectors {
    records: Vec<GoldenRecord>,
    invalid: Vec<GoldenRecord>,
    starts: Vec<GoldenStart>,
}

#[derive(serde::Deserialize)]
struct GoldenRecord {
    record: String,
    text: String,
    #[serde(default)]
    error: String,
}

#[derive(serde::Deserialize)]
struct GoldenStart {
    name: String,
    files: std::collections::BTreeMap<String, String>,
    found: String,
    after: std::collections::BTreeMap<String, String>,
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../../../protocol/vectors/flash.json")).unwrap()
}

/// A flash with these files; `name/` is an empty folder.
fn flash_with<'a>(files: impl IntoIterator<Item = (&'a String, &'a String)>) -> Memory {
    let mut flash = Memory::new(CAPACITY);
    for (path, text) in files {
        for folder in parents(path) {
            if flash.kind(folder).unwrap().is_none() {
                flash.make_folder(folder).unwrap();
            }
        }
        if !path.ends_with('/') {
            put(&mut flash, path, text.as_bytes());
        }
    }
    flash
}

/// Reads a record, and writes it again where it was.
fn rewrite(flash: &mut Memory, record: &str) -> Result<(), RecordError> {
    match record {
        "installed.jsonl" => {
            let installed = journal::read_installed(flash, INSTALLED)?.unwrap();
            journal::write_installed(flash, INSTALLED, &installed).unwrap();
        }
        "plan.jsonl" => {
            let plan = journal::read_plan(flash)?;
            journal::write_plan(flash, &plan).unwrap();
        }
        "journal.json" => {
            let journal = journal::read_journal(flash)?.unwrap();
            journal::replace(flash, JOURNAL, &journal).unwrap();
        }
        "seen.json" => {
            let seen = journal::read_seen(flash)?.unwrap();
            journal::replace(flash, SEEN, &seen).unwrap();
        }
        other => panic!("{other}"),
    }
    Ok(())
}

#[test]
fn the_golden_records_are_read_and_written_again_to_the_letter() {
    let vectors = vectors();
    let flash = |case: &GoldenRecord| flash_with([(&format!("{FOLDER}/{}", case.record), &case.text)]);
    for case in &vectors.records {
        let mut flash = flash(case);
        rewrite(&mut flash, &case.record).unwrap_or_else(|error| panic!("{}: {error:?}", case.text));
        let texts: Vec<_> = flash.files().map(|(_, bytes)| String::from_utf8_lossy(bytes)).collect();
        assert_eq!(texts, [case.text.as_str()]);
    }
    for case in &vectors.invalid {
        let error = rewrite(&mut flash(case), &case.record).expect_err(&case.text).to_string();
        assert!(error.contains(&case.error), "{}: {error}", case.text);
    }
}

#[test]
fn the_golden_starts_end_as_they_must() {
    for case in vectors().starts {
        let mut flash = flash_with(&case.files);
        let (_, boot) = Store::boot(&mut flash).unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        let found = if matches!(boot, Boot::Confirming { .. }) { "confirming" } else { "rest" };
        assert_eq!(found, case.found, "{}", case.name);
        let mut after: std::collections::BTreeMap<_, _> = flash
            .files()
            .map(|(path, bytes)| (path.to_owned(), String::from_utf8_lossy(bytes).into_owned()))
            .collect();
        let is_empty = |folder: &&str| flash.list(folder).unwrap().is_empty() && !folder.starts_with(FOLDER);
        after.extend(flash.folders().filter(is_empty).map(|folder| (format!("{folder}/"), String::new())));
        assert_eq!(after, case.after, "{}", case.name);
    }
}
