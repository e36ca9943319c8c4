//! The store of the MicroPython agent, on MicroPython's Unix port: in a folder, and on a littlefs in memory. Its scripts
//! are below `tests/device`.

use std::{
    env, fs,
    io::{Cursor, Write},
    path::{Path, PathBuf},
};

use mpypi_agent_sim::{
    accept::Accepted,
    device::Hardware,
    flash::{Disk, Flash, PowerCut, Tear},
    store::{Boot, Committed, Store},
};
use mpypi_protocol::{
    ChannelName, Digest, FilePath, Trust,
    wheel::{RecordLine, dist_info, write_record},
};
use mpypi_tests::{Output, World, files_below, micropython, run};
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// Name, version and members.
type Wheel<'a> = (&'a str, &'a str, Vec<(&'a str, &'a [u8])>);

/// A release as the scripts read it: `release.json`, `list.json` and `packages/`.
#[derive(Default)]
struct Release {
    entries: Vec<Value>,
    files: Map<String, Value>,
    packages: Vec<Vec<u8>>,
}

impl Release {
    fn new(sources: &[(&str, &[u8])], wheels: &[Wheel<'_>]) -> Release {
        let mut release = Release::default();
        for (name, version, members) in wheels {
            let (bytes, unpacked) = wheel(name, version, members);
            release.add_wheel(name, version, bytes);
            release.files.extend(unpacked.into_iter().map(|(path, digest)| (path, json!(digest))));
        }
        for (path, bytes) in sources {
            let digest = Digest::of(bytes);
            let entry = json!({"type": "src", "path": path, "pkg_sha256": digest, "size": bytes.len()});
            release.entries.push(entry);
            release.files.insert((*path).to_owned(), json!(digest));
            release.packages.push(bytes.to_vec());
        }
        release
    }

    fn add_wheel(&mut self, name: &str, version: &str, bytes: Vec<u8>) {
        let (digest, size) = (Digest::of(&bytes), bytes.len());
        self.entries.push(json!({
            "type": "wheel", "name": name, "version": version, "pkg_sha256": digest, "size": size,
        }));
        self.packages.push(bytes);
    }

    /// Its packages of more than `size` bytes come in chunks of so many.
    fn in_chunks(mut self, size: usize) -> Release {
        for (entry, bytes) in self.entries.iter_mut().zip(&self.packages) {
            if bytes.len() > size {
                let digests: Vec<_> = bytes.chunks(size).map(Digest::of).collect();
                entry["chunks"] = json!({"size": size, "sha256": digests});
            }
        }
        self
    }

    fn list(&self, sequence: u64) -> Vec<u8> {
        let version = format!("{sequence}.0");
        let head = json!({"type": "release", "channel": "dev", "sequence": sequence, "version": version});
        let entries: Vec<_> = [head].iter().chain(&self.entries).cloned().collect();
        Value::from(entries).to_string().into_bytes()
    }

    /// Writes it into `folder` of the world. `refused`: with which words a device must refuse it.
    fn write(&self, world: &World, folder: &str, sequence: u64, refused: Option<&[&str]>) {
        for bytes in &self.packages {
            world.write(&format!("{folder}/packages/{}", Digest::of(bytes)), bytes);
        }
        let list = self.list(sequence);
        let release = json!({
            "sequence": sequence, "version": format!("{sequence}.0"), "list": Digest::of(&list),
            "entries": self.entries, "files": self.files, "refused": refused,
        });
        world.write(&format!("{folder}/list.json"), list);
        world.write(&format!("{folder}/release.json"), release.to_string());
    }
}

/// A wheel, and the files it becomes on a device.
fn wheel(name: &str, version: &str, members: &[(&str, &[u8])]) -> (Vec<u8>, Vec<(String, Digest)>) {
    let info = dist_info(name, version);
    let metadata = format!("Name: {name}\nVersion: {version}\n").into_bytes();
    let mut all: Vec<(String, Vec<u8>)> =
        members.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
    all.push((format!("{info}/METADATA"), metadata));
    let mut record: String = all.iter().map(|(name, bytes)| line(name, bytes, bytes.len())).collect();
    record += &format!("{info}/RECORD,,\n");
    all.push((format!("{info}/RECORD"), record.into_bytes()));
    let members: Vec<_> = all.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let files = all.iter().map(|(name, bytes)| (format!("lib/{name}"), Digest::of(bytes))).collect();
    (zip(CompressionMethod::Deflated, &members), files)
}

/// A line of RECORD, whatever the path.
fn line(path: &str, bytes: &[u8], size: usize) -> String {
    let plain = RecordLine { path: FilePath::new("x").unwrap(), digest: Some(Digest::of(bytes)), size: None };
    write_record([&plain]).replacen('x', path, 1).trim_end().to_owned() + &format!("{size}\n")
}

fn zip(method: CompressionMethod, members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        archive.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn first() -> Release {
    let long = [b'a'; 1500];
    let sources = [
        ("boot.py", &b"print(1)"[..]),
        ("settings.json", b"{}"),
        ("assets/deep/a.txt", &long),
        ("none", b""),
    ];
    let wheel = ("blink", "1.0", vec![("blink/__init__.py", &b"x = 1"[..]), ("blink/old.py", b"o = 1")]);
    Release::new(&sources, &[wheel])
}

/// Changes `boot.py`, a wheel and a user's file, removes `assets/`, adds `pages/`, has the same bytes twice, and a file
/// that comes from two wheels.
fn second() -> Release {
    let sources = [
        ("boot.py", &b"print(2)"[..]),
        ("settings.json", b"{}"),
        ("none", b""),
        ("also_none", b""),
        ("pages/index.html", b"hello"),
        ("pages/copy.html", b"hello"),
        ("notes.txt", b"ours"),
    ];
    let new = ("blink", "2.0", vec![("blink/__init__.py", &b"x = 2"[..]), ("blink/new.py", b"n = 2")]);
    let other = ("other", "1.0", vec![("blink/new.py", &b"n = 2"[..])]);
    Release::new(&sources, &[new, other])
}

/// A world with the two releases, as `releases/1` and `releases/2`.
fn two_releases() -> World {
    let world = World::new();
    first().write(&world, "releases/1", 1, None);
    second().write(&world, "releases/2", 2, None);
    world
}

/// A folder for thousands of small files, in memory where the system has such a place.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { env::temp_dir() };
    TempDir::with_prefix_in("mpypi-test-", place).unwrap()
}

/// Runs a script below `tests/device`.
fn script(name: &str, arguments: &[&str]) -> Output {
    script_with(&["-X", "heapsize=6M"], name, arguments)
}

fn script_with(options: &[&str], name: &str, arguments: &[&str]) -> Output {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = format!("{}:{}", tests.join("../device").display(), tests.join("device").display());
    let script = tests.join("device").join(name);
    let mut all = options.to_vec();
    all.push(script.to_str().unwrap());
    all.extend(arguments);
    micropython(&all, &[("MICROPYPATH", &path)]).expect_code(0)
}

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/vectors")
}

/// Every how manieth case is tried: `make soak` tries all.
fn every(usual: u32) -> String {
    match env::var_os("MPYPI_ALL_CUTS") {
        Some(_) => "1".to_owned(),
        None => usual.to_string(),
    }
}

/// The number at the end of each line.
fn counts(output: &Output) -> Vec<u32> {
    output.stdout.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn a_power_cut_at_any_file_operation_leaves_a_device_the_old_or_the_new_release() {
    let (world, scratch) = (two_releases(), scratch());
    let arguments = ["posix", &world.text("releases"), scratch.path().to_str().unwrap(), &every(6)];
    let cuts = counts(&script("cuts.py", &arguments));
    assert!(cuts.len() == 3 && cuts.iter().sum::<u32>() > 150, "{cuts:?}");
}

#[test]
fn a_power_cut_at_any_operation_of_a_flash_chip_leaves_a_device_the_old_or_the_new_release() {
    let world = two_releases();
    let cuts = counts(&script("cuts.py", &["littlefs", &world.text("releases"), "", &every(7)]));
    assert!(cuts.len() == 3 && cuts.iter().sum::<u32>() > 200, "{cuts:?}");
}

/// The first release, and one in chunks: a wheel and two files, one of them of whole chunks only; and what is small.
fn two_releases_the_second_in_chunks() -> World {
    let world = World::new();
    first().write(&world, "releases/1", 1, None);
    let mut random = fastrand::Rng::with_seed(3);
    let mut bytes = |count: usize| -> Vec<u8> { (0..count).map(|_| random.u8(..)).collect() };
    let (led, even, odd) = (bytes(1500), bytes(3072), bytes(3073));
    let sources = [
        ("boot.py", &b"print(2)"[..]),
        ("assets/even.bin", &even),
        ("odd.bin", &odd),
        ("notes.txt", b"ours"),
    ];
    let wheel = ("blink", "2.0", vec![("blink/__init__.py", &b"x = 2"[..]), ("blink/led.bin", &led)]);
    let second = Release::new(&sources, &[wheel]).in_chunks(1024);
    assert_eq!(second.entries.iter().filter(|entry| entry["chunks"].is_object()).count(), 3);
    second.write(&world, "releases/2", 2, None);
    world
}

#[test]
fn a_download_in_chunks_goes_on_where_a_power_cut_at_any_file_operation_left_it() {
    let (world, scratch) = (two_releases_the_second_in_chunks(), scratch());
    let arguments = ["posix", &world.text("releases"), scratch.path().to_str().unwrap(), &every(2)];
    let cuts = counts(&script("chunks.py", &arguments));
    assert!(cuts[0] > 50, "{cuts:?}");
}

#[test]
fn a_download_in_chunks_goes_on_where_a_power_cut_at_any_operation_of_a_flash_chip_left_it() {
    let world = two_releases_the_second_in_chunks();
    let cuts = counts(&script("chunks.py", &["littlefs", &world.text("releases"), "", &every(14)]));
    assert!(cuts[0] > 15, "{cuts:?}");
}

#[test]
fn a_byte_that_changes_in_what_came_in_chunks_is_found_and_only_what_follows_is_fetched_again() {
    let world = two_releases_the_second_in_chunks();
    let changed = counts(&script("chunks.py", &["changes", &world.text("releases"), ""]));
    assert!(changed[0] > 3, "{changed:?}");
}

#[test]
fn an_agent_that_updates_itself_survives_a_power_cut_with_its_modules_mixed() {
    let world = World::new();
    let device = Path::new(env!("CARGO_MANIFEST_DIR")).join("../device/mpypi");
    for number in 1..=2 {
        let mut modules = vec![("mpypi/release.py".to_owned(), format!("NUMBER = {number}\n"))];
        for item in fs::read_dir(&device).unwrap() {
            let path = item.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let Ok(text) = fs::read_to_string(&path) else { continue };
            // The store's are enough, and what Python needs to find them.
            let text = match name.as_str() {
                "boot.py" | "__init__.py" => format!("{text}# {number}\n"),
                "store.py" | "files.py" | "limits.py" | "refusal.py" | "commit.py" => {
                    format!("from mpypi.release import NUMBER\nassert NUMBER == {number}\n{text}")
                }
                _ => continue,
            };
            modules.push((format!("mpypi/{name}"), text));
        }
        modules.sort();
        let members: Vec<_> = modules.iter().map(|(name, text)| (name.as_str(), text.as_bytes())).collect();
        let boot = format!(
            "from mpypi import boot\nanswer = boot.run()\nimport mpypi.store\n\
             from mpypi.release import NUMBER as release\n# {number}\n"
        );
        let version = format!("{number}.0");
        let release = Release::new(&[("boot.py", boot.as_bytes())], &[("mpypi", &version, members)]);
        release.write(&world, &format!("releases/{number}"), number, None);
    }
    let cuts = counts(&script("itself.py", &[&world.text("releases"), &every(16)]));
    assert!(cuts[0] > 500, "{cuts:?}");
}

#[test]
fn a_flash_that_fills_up_at_any_operation_keeps_a_device_starting_with_one_release() {
    let (world, scratch) = (two_releases(), scratch());
    script("space.py", &["posix", &world.text("releases"), scratch.path().to_str().unwrap(), &every(12)]);
    script("space.py", &["littlefs", &world.text("releases"), "", &every(4)]);
}

#[test]
fn a_byte_that_changes_in_staging_is_found_and_fetched_again() {
    let world = two_releases();
    let changed = counts(&script("staging.py", &[&world.text("releases"), &every(40)]));
    assert!(changed[0] > 10, "{changed:?}");
}

#[test]
fn a_device_refuses_the_wheels_that_agent_sim_refuses_and_takes_all_others() {
    const NAME: &str = "evil-1.0.dist-info";
    let world = World::new();
    Release::new(&[("main.py", b"good")], &[("evil", "0.9", vec![("evil.py", b"good")])]).write(
        &world,
        "cases/good",
        1,
        None,
    );
    let metadata = (format!("{NAME}/METADATA"), b"Name: evil\nVersion: 1.0\n".to_vec());
    let archive = |record: &str, members: &[(&str, &[u8])], method| {
        let record = (format!("{NAME}/RECORD"), record.as_bytes());
        let mut all = vec![(metadata.0.as_str(), metadata.1.as_slice()), (record.0.as_str(), record.1)];
        all.extend_from_slice(members);
        zip(method, &all)
    };
    let deflated =
        |record: &str, members: &[(&str, &[u8])]| archive(record, members, CompressionMethod::Deflated);
    let refuse = |case: &str, bytes: Vec<u8>, words: &[&str]| {
        let mut release = Release::default();
        release.add_wheel("evil", "1.0", bytes);
        release.write(&world, &format!("cases/{case}"), 2, Some(words));
    };
    let take = |case: &str, bytes: Vec<u8>, files: &[(&str, &[u8])]| {
        let mut release = Release::default();
        release.add_wheel("evil", "1.0", bytes);
        release
            .files
            .extend(files.iter().map(|(path, bytes)| ((*path).to_owned(), json!(Digest::of(bytes)))));
        release.write(&world, &format!("cases/{case}"), 2, None);
    };

    for (number, path) in ["../boot.py", "/etc/passwd", "a/../../b", "a//b"].iter().enumerate() {
        let bytes = deflated(&line(path, b"x", 1), &[(path, b"x")]);
        refuse(&format!("escapes-{number}"), bytes, &["escapes-root: wheel `evil`: RECORD line 1: path `"]);
    }
    let (whole, _) = wheel("evil", "1.0", &[("evil.py", &[7; 3000])]);
    for length in [1, 10, whole.len() / 2, whole.len() - 1] {
        refuse(&format!("cut-{length}"), whole[..length].to_vec(), &["bad-wheel: wheel `evil`: not a whole"]);
    }
    let good = line("evil.py", b"x", 1);
    refuse("digest", deflated(&good, &[("evil.py", b"y")]), &["`evil.py` does not have the digest"]);
    for size in [0, 2] {
        let bytes = deflated(&line("evil.py", b"x", size), &[("evil.py", b"x")]);
        refuse(&format!("size-{size}"), bytes, &["bytes that RECORD says"]);
    }
    refuse("absent", deflated(&good, &[]), &["in RECORD and not in the archive"]);
    refuse("unhashed", deflated("evil.py,,\n", &[("evil.py", b"x")]), &["no digest for `evil.py`"]);
    refuse("twice", deflated(&good.repeat(2), &[("evil.py", b"x")]), &["`evil.py` is in an earlier line"]);
    refuse("nonsense", b"PK\x05\x06 nonsense".to_vec(), &["bad-wheel: "]);
    refuse("no-record", zip(CompressionMethod::Deflated, &[("a.py", b"x")]), &["0 RECORD files"]);
    refuse("two-records", deflated(&good, &[("b.dist-info/RECORD", b"")]), &["2 RECORD files"]);
    refuse("record", deflated("not a record\n", &[]), &["bad text: RECORD line 1: `not a record` is not"]);
    refuse("other-name", wheel("other", "1.0", &[]).0, &["METADATA says Name `other`, the list says `evil`"]);
    refuse("other-version", wheel("evil", "1.0.0", &[]).0, &["METADATA says Version `1.0.0`"]);
    // Two members of one name, which no writer writes by itself.
    let mut twice = deflated(&good, &[("evil.py", b"x"), ("evil.pz", b"x")]);
    while let Some(at) = twice.windows(7).position(|bytes| bytes == b"evil.pz") {
        twice[at..at + 7].copy_from_slice(b"evil.py");
    }
    refuse("same-names", twice, &["two members have the same name"]);
    let zeros = [0; 100_001];
    refuse("bomb", deflated(&line("z", &zeros, zeros.len()), &[("z", &zeros)]), &["it unpacks to more than"]);
    // It says that it is small, and is not.
    refuse("lies", deflated(&line("z", b"", 100), &[("z", &zeros)]), &["does not have the 100 bytes"]);

    let record = good.clone() + &format!("{NAME}/RECORD,,\n");
    let record_path = format!("lib/{NAME}/RECORD");
    let files: &[(&str, &[u8])] = &[("lib/evil.py", b"x"), (&record_path, record.as_bytes())];
    let extra: &[(&str, &[u8])] = &[("evil.py", b"x"), ("../../evil.py", b"evil"), ("extra.py", b"extra")];
    take("extra", deflated(&record, extra), files);
    take("stored", archive(&record, &[("evil.py", b"x")], CompressionMethod::Stored), files);
    let mut comment = deflated(&record, &[("evil.py", b"x")]);
    let end = comment.len() - 2;
    comment[end..].copy_from_slice(&3000u16.to_le_bytes());
    comment.extend([b'-'; 3000]);
    take("comment", comment, files);
    // Matches as far back as deflate allows: the whole window is needed.
    let digest = |n: u32| *Digest::of(&n.to_le_bytes()).as_bytes();
    let far: Vec<u8> = (0..1000).flat_map(digest).collect::<Vec<u8>>().repeat(2);
    take("far", deflated(&line("far", &far, far.len()), &[("far", &far)]), &[("lib/far", &far)]);

    let output = script("hostile.py", &[&world.text("cases")]);
    assert!(output.stdout.lines().count() > 25, "{}", output.stdout);
}

#[test]
fn a_boot_py_can_rely_on_the_hook() {
    let world = two_releases();
    let output = script("starts.py", &[&world.text("releases")]);
    assert_eq!(output.stdout.lines().count(), 7, "{}", output.stdout);
}

/// What unpacking may take beside the agent's modules, in bytes.
const UNPACKING: usize = 16 * 1024;

#[test]
fn a_megabyte_that_our_publisher_packed_is_unpacked_in_16_kib() {
    let world = World::new();
    let mut random = fastrand::Rng::with_seed(1);
    let words: Vec<String> =
        (0..3000).map(|_| (0..random.usize(3..9)).map(|_| random.lowercase()).collect()).collect();
    let mut text = String::new();
    while text.len() < 1 << 20 {
        text += random.choice(&words).unwrap();
        text.push(' ');
    }
    let metadata = b"Name: big\nVersion: 1.0\n".to_vec();
    let record = line("big.txt", text.as_bytes(), text.len())
        + &line("big-1.0.dist-info/METADATA", &metadata, metadata.len())
        + "big-1.0.dist-info/RECORD,,\n";
    let members = [
        ("big.txt", text.into_bytes()),
        ("big-1.0.dist-info/METADATA", metadata),
        ("big-1.0.dist-info/RECORD", record.into_bytes()),
    ];
    let members = members.map(|(path, bytes)| (FilePath::new(path).unwrap(), bytes));
    let wheel = mpypi_publisher::wheel::archive::write(&members).unwrap();
    assert!(wheel.len() < 700_000, "{}", wheel.len());
    let digest = Digest::of(&wheel);
    world.write(&format!("packages/{digest}"), &wheel);
    let entry = json!({"type": "wheel", "name": "big", "version": "1.0", "pkg_sha256": digest});
    world.write("entry.json", entry.to_string());

    // Compiled beforehand, as on a board that is short of memory.
    let compile = |from: &Path, to: &str| {
        fs::create_dir_all(world.path(to).parent().unwrap()).unwrap();
        run("mpy-cross", &["-o", &world.text(to), from.to_str().unwrap()]).expect_code(0);
    };
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    for item in fs::read_dir(tests.join("../device/mpypi")).unwrap() {
        let path = item.unwrap().path();
        if path.extension().is_some_and(|end| end == "py") {
            compile(&path, &format!("modules/mpypi/{}.mpy", path.file_stem().unwrap().to_str().unwrap()));
        }
    }
    compile(&tests.join("device/unpack.py"), "modules/unpack.mpy");

    let unpack = |heap: usize, only: &[&str]| {
        let root = scratch();
        let heap = format!("heapsize={heap}");
        let (folder, root) = (world.path("").display().to_string(), root.path().display().to_string());
        let mut arguments = vec!["-X", &heap, "-m", "unpack", &folder, &root];
        arguments.extend(only);
        let modules = world.text("modules");
        micropython(&arguments, &[("MICROPYPATH", &modules)])
    };
    let (mut too_little, mut enough) = (8 * 1024, 256 * 1024);
    while enough - too_little > 256 {
        let heap = usize::midpoint(too_little, enough);
        match unpack(heap, &["only"]).code {
            Some(0) => enough = heap,
            _ => too_little = heap,
        }
    }
    unpack(enough + UNPACKING, &[]).expect_code(0);
}

#[test]
fn the_devices_store_agrees_with_the_golden_vectors() {
    let scratch = scratch();
    let output = script("store_vectors.py", &[vectors().to_str().unwrap(), scratch.path().to_str().unwrap()]);
    assert!(counts(&output).iter().all(|count| *count > 5), "{}", output.stdout);
}

// What one of the two agents left in the middle, the other finishes.

fn put_users_files(root: &Path) {
    fs::create_dir_all(root).unwrap();
    fs::write(root.join("notes.txt"), "mine").unwrap();
    fs::write(root.join("log.txt"), "boot").unwrap();
}

/// Starts agent-sim's store until it stays on, and confirms.
fn wake<F: Flash>(flash: F) -> Store<F> {
    let (mut store, boot) = Store::boot(flash).unwrap();
    if matches!(boot, Boot::Confirming { .. }) {
        store.confirm().unwrap();
    }
    store
}

/// Installs a release with agent-sim's store.
fn install<F: Flash>(store: &mut Store<F>, release: &Release, sequence: u64) -> Result<Committed, String> {
    let payload = release.list(sequence);
    let channel = ChannelName::new("dev").unwrap();
    let accepted = Accepted::judge(
        Trust::Anyone.verify(&channel, &payload, None).unwrap(),
        &channel,
        &Hardware::default().runtime(),
        store.seen(),
        None,
    )
    .map_err(|e| e.text())?;
    let text = |refusal: mpypi_agent_sim::refusal::Refusal| refusal.text();
    store.remember(accepted.seen()).map_err(text)?;
    for need in store.survey(&accepted).map_err(text)? {
        let digest = *need.id.digest();
        let bytes = release.packages.iter().find(|bytes| Digest::of(bytes) == digest).unwrap();
        let mut incoming = store.receive(need).map_err(text)?;
        incoming.push(bytes).map_err(text)?;
        incoming.finish().map_err(text)?;
    }
    let staged = store.stage(&accepted).map_err(text)?;
    store.commit(staged).map_err(text)
}

fn files_of(release: &Release) -> Map<String, Value> {
    let mut files = release.files.clone();
    for (path, bytes) in [("notes.txt", "mine"), ("log.txt", "boot")] {
        files.entry(path).or_insert_with(|| json!(Digest::of(bytes.as_bytes())));
    }
    files
}

fn found(root: &Path) -> Map<String, Value> {
    files_below(root).into_iter().map(|(path, bytes)| (path, json!(Digest::of(&bytes)))).collect()
}

#[test]
fn what_agent_sim_leaves_in_the_middle_is_finished_by_micropython() {
    let (world, devices) = (two_releases(), scratch());
    let (one, two) = (first(), second());
    let mut left = 0;
    for cut_at in 1.. {
        let root = devices.path().join(cut_at.to_string());
        put_users_files(&root);
        let mut store = wake(Disk::open(&root).unwrap());
        install(&mut store, &one, 1).unwrap();
        let disk = wake(store.into_flash()).into_flash();
        let mut flash = PowerCut::new(disk, cut_at, Tear::Torn);
        if let Ok((mut store, _)) = Store::boot(&mut flash) {
            let _ = install(&mut store, &two, 2);
        }
        if !flash.is_off() {
            fs::remove_dir_all(&root).unwrap();
            break;
        }
        left += 1;
    }
    assert!(left > 50, "{left}");
    let output = script("finish.py", &[&world.text("releases"), devices.path().to_str().unwrap()]);
    assert_eq!(counts(&output), [left]);
}

#[test]
fn what_micropython_leaves_in_the_middle_is_finished_by_agent_sim() {
    let (world, devices) = (two_releases(), scratch());
    let arguments = [&world.text("releases"), devices.path().to_str().unwrap(), &every(3)];
    let output = script("leave.py", &arguments);
    let (old, new) = (files_of(&first()), files_of(&second()));
    let mut left = 0;
    for item in fs::read_dir(devices.path()).unwrap() {
        let root = item.unwrap().path();
        let name = root.display();
        let mut store = wake(Disk::open(&root).unwrap());
        let files = found(&root);
        assert!(files == old || files == new, "{name}: {files:?}");
        if store.installed().sequence != Some(2) {
            assert!(files == old, "{name}");
            install(&mut store, &second(), 2).unwrap();
            store = wake(store.into_flash());
        }
        assert_eq!(store.installed().sequence, Some(2), "{name}");
        assert!(found(&root) == new, "{name}");
        left += 1;
    }
    assert!(left > 50, "{left}");
    assert_eq!(counts(&output), [left]);
}
