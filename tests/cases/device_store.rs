//! The store of the MicroPython agent, on MicroPython's Unix port: in a folder, and on a littlefs in memory.

use std::{
    env, fs,
    io::{Cursor, Write},
    path::Path,
};

use mpypi_protocol::{
    Digest, FilePath, PackageId,
    wheel::{RecordLine, dist_info, write_record},
};
use mpypi_tests::{Output, World, micropython};
use serde_json::{Value, json};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

type Wheel<'a> = (&'a str, &'a str, Vec<(&'a str, &'a [u8])>);

/// Writes a release into the world, as the scripts below `tests/device` read it.
fn release(world: &World, sequence: u64, sources: &[(&str, &[u8])], wheels: &[Wheel<'_>]) {
    let folder = format!("releases/{sequence}");
    let mut entries = Vec::new();
    let mut files = serde_json::Map::new();
    let mut package = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        world.write(&format!("{folder}/packages/{digest}"), bytes);
        digest
    };
    for (name, version, members) in wheels {
        let (bytes, unpacked) = wheel(name, version, members);
        let digest = package(&bytes);
        let size = bytes.len();
        entries.push(json!({
            "type": "wheel", "name": name, "version": version, "pkg_sha256": digest, "size": size,
        }));
        files.extend(unpacked.into_iter().map(|(path, digest)| (path, json!(digest))));
    }
    for (path, bytes) in sources {
        let digest = package(bytes);
        entries.push(json!({"type": "src", "path": path, "pkg_sha256": digest, "size": bytes.len()}));
        files.insert((*path).to_owned(), json!(digest));
    }
    let list = Digest::of(Value::from(entries.clone()).to_string().as_bytes());
    let version = format!("{sequence}.0");
    let release =
        json!({"sequence": sequence, "version": version, "list": list, "entries": entries, "files": files});
    world.write(&format!("{folder}/release.json"), release.to_string());
}

/// A wheel, and the files it becomes on a device.
fn wheel(name: &str, version: &str, members: &[(&str, &[u8])]) -> (Vec<u8>, Vec<(String, Digest)>) {
    let info = dist_info(name, version);
    let metadata = format!("Name: {name}\nVersion: {version}\n");
    let mut all: Vec<(String, Vec<u8>)> =
        members.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
    all.push((format!("{info}/METADATA"), metadata.into_bytes()));
    let path = |path: &str| FilePath::new(path).unwrap();
    let mut lines: Vec<_> = all
        .iter()
        .map(|(name, bytes)| RecordLine {
            path: path(name),
            digest: Some(Digest::of(bytes)),
            size: Some(bytes.len() as u64),
        })
        .collect();
    let record = format!("{info}/RECORD");
    lines.push(RecordLine { path: path(&record), digest: None, size: None });
    all.push((record, write_record(&lines).into_bytes()));
    let members: Vec<_> = all.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    (zip(&members), all.iter().map(|(name, bytes)| (format!("lib/{name}"), Digest::of(bytes))).collect())
}

fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
        archive.start_file(*name, options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// Two releases. The second changes `boot.py`, a wheel and a user's file, removes `assets/`, adds `pages/`, has the
/// same bytes twice, and has a file that comes from two wheels.
fn two_releases(world: &World) {
    let long = [b'a'; 1500];
    let first = [
        ("boot.py", &b"print(1)"[..]),
        ("settings.json", b"{}"),
        ("assets/deep/a.txt", &long),
        ("none", b""),
    ];
    let old = ("blink", "1.0", vec![("blink/__init__.py", &b"x = 1"[..]), ("blink/old.py", b"o = 1")]);
    release(world, 1, &first, &[old]);
    let second = [
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
    release(world, 2, &second, &[new, other]);
}

/// Runs a script below `tests/device`.
fn script(arguments: &[&str], options: &[&str]) -> Output {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = tests.join("device").join(arguments[0]);
    let path = format!("{}:{}", tests.join("../device").display(), tests.join("device").display());
    let mut all: Vec<&str> = options.to_vec();
    all.push(script.to_str().unwrap());
    all.extend(&arguments[1..]);
    micropython(&all, &[("MICROPYPATH", &path)])
}

/// Every how manieth cut is tried: all in `make soak`.
fn every(usual: u32) -> String {
    match env::var_os("MPYPI_ALL_CUTS") {
        Some(_) => "1".to_owned(),
        None => usual.to_string(),
    }
}

/// How many cuts each scenario had.
fn cuts(output: &Output) -> Vec<u32> {
    output.stdout.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn a_power_cut_at_any_file_operation_leaves_a_device_the_old_or_the_new_release() {
    let world = World::new();
    two_releases(&world);
    fs::create_dir(world.path("scratch")).unwrap();
    let (releases, scratch) = (world.text("releases"), world.text("scratch"));
    let output = script(&["cuts.py", "posix", &releases, &scratch, &every(3)], &[]).expect_code(0);
    let cuts = cuts(&output);
    assert!(cuts.len() == 3 && cuts.iter().all(|cuts| *cuts > 30), "{cuts:?}");
}

#[test]
fn a_power_cut_at_any_operation_of_a_flash_chip_leaves_a_device_the_old_or_the_new_release() {
    let world = World::new();
    two_releases(&world);
    fs::create_dir(world.path("scratch")).unwrap();
    let (releases, scratch) = (world.text("releases"), world.text("scratch"));
    let output = script(&["cuts.py", "littlefs", &releases, &scratch, &every(7)], &[]).expect_code(0);
    let cuts = cuts(&output);
    assert!(cuts.len() == 3 && cuts.iter().all(|cuts| *cuts > 30), "{cuts:?}");
}
