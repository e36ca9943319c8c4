use mpypi_protocol::node::Phase;

use super::*;
use crate::{
    flash::Memory,
    testing::{Bench, files, list_of, release, wheel, zip},
};

/// Publishes `archive` as the wheel `evil 1.0` over a device that has a release; says what it answers.
fn refused(archive: &[u8]) -> String {
    let mut flash = Memory::new(1 << 26);
    let good = release(1, &[("main.py", b"good")], &[("evil", "0.9", &[("evil.py", b"good")])]);
    let mut bench = Bench::start(&mut flash).unwrap();
    bench.publish(&good);
    bench.run().unwrap();
    assert_eq!(bench.phase(), Phase::Idle);

    let digest = Digest::of(archive);
    let head = r#"{"type":"release","channel":"dev","sequence":2,"version":"2"}"#;
    let entry = format!(
        r#"{{"type":"wheel","name":"evil","version":"1.0","pkg_sha256":"{digest}","size":{}}}"#,
        archive.len()
    );
    let mut bad = list_of(None, &[], &[]);
    bad.list = format!("[{head},{entry}]").into();
    bad.packages.insert(mpypi_protocol::PackageId::Wheel(digest).topic(), archive.to_vec().into());
    bench.publish(&bad);
    bench.settle().unwrap();
    assert_eq!(bench.phase(), Phase::Failed);
    let error = bench.error().unwrap().to_owned();
    drop(bench);
    assert_eq!(files(&flash), good.files, "the old release is intact");
    let left: Vec<_> = flash.files().map(|(path, _)| path).filter(|path| path.contains("staging")).collect();
    assert!(left.is_empty(), "{left:?}");
    error
}

const METADATA: (&str, &[u8]) = ("evil-1.0.dist-info/METADATA", b"Name: evil\nVersion: 1.0\n");

/// A wheel with this RECORD and these members.
fn archive(record: &str, members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut all = vec![METADATA, ("evil-1.0.dist-info/RECORD", record.as_bytes())];
    all.extend_from_slice(members);
    zip(&all)
}

fn line(path: &str, bytes: &[u8], size: usize) -> String {
    let path_line =
        RecordLine { path: FilePath::new("x").unwrap(), digest: Some(Digest::of(bytes)), size: None };
    let text = mpypi_protocol::wheel::write_record([&path_line]);
    text.replacen('x', path, 1).trim_end().to_owned() + &format!("{size}\n")
}

#[test]
fn a_path_that_leads_out_of_the_root_is_refused() {
    for path in ["../boot.py", "/etc/passwd", "a/../../b", "a//b"] {
        let error = refused(&archive(&line(path, b"x", 1), &[(path, b"x")]));
        assert!(error.starts_with("escapes-root: "), "{error}");
    }
}

#[test]
fn a_truncated_wheel_is_refused() {
    let (bytes, _) = wheel("evil", "1.0", &[("evil.py", &[7; 3000])]);
    for length in [1, 10, bytes.len() / 2, bytes.len() - 1] {
        let error = refused(&bytes[..length]);
        assert!(error.starts_with("bad-wheel: "), "{length}: {error}");
    }
}

#[test]
fn a_member_without_the_digest_or_size_of_record_is_refused() {
    let error = refused(&archive(&line("evil.py", b"x", 1), &[("evil.py", b"y")]));
    assert!(error.contains("`evil.py` does not have the digest"), "{error}");
    for size in [0, 2] {
        let error = refused(&archive(&line("evil.py", b"x", size), &[("evil.py", b"x")]));
        assert!(error.contains("bytes that RECORD says"), "{error}");
    }
}

#[test]
fn a_member_that_is_missing_or_has_no_digest_is_refused() {
    let error = refused(&archive(&line("evil.py", b"x", 1), &[]));
    assert!(error.contains("in RECORD and not in the archive"), "{error}");
    let error = refused(&archive("evil.py,,\n", &[("evil.py", b"x")]));
    assert!(error.contains("no digest for `evil.py`"), "{error}");
}

#[test]
fn a_member_that_record_does_not_name_is_not_installed() {
    let mut flash = Memory::new(1 << 20);
    let record = line("good.py", b"x", 1);
    let bytes = archive(&record, &[("good.py", b"x"), ("../../evil.py", b"evil"), ("extra.py", b"extra")]);
    let wheel = Wheel {
        name: "evil".into(),
        version: "1.0".into(),
        digest: Digest::of(&bytes),
        size: None,
        chunks: None,
        tag: None,
        extra: serde_json::Map::new(),
    };
    for folder in [crate::journal::FOLDER, crate::journal::STAGING] {
        flash.make_folder(folder).unwrap();
    }
    let path = staged(&wheel.digest, 0);
    flash.create(&path).unwrap();
    flash.append(&path, &bytes).unwrap();
    let files = unpack(&mut flash, &wheel, |_, _, _| Ok(false)).unwrap();
    assert_eq!(files.keys().map(FilePath::as_str).collect::<Vec<_>>(), ["lib/good.py"]);
}

#[test]
fn a_bomb_is_refused_before_it_fills_the_flash() {
    let zeros = vec![0; limits::WHEEL_UNPACKED as usize + 1];
    let record = line("zeros", &zeros, zeros.len());
    let bytes = archive(&record, &[("zeros", &zeros)]);
    assert!(bytes.len() < 200_000, "{}", bytes.len());
    let error = refused(&bytes);
    assert!(error.contains("unpacks to more than"), "{error}");
}

#[test]
fn another_name_or_version_than_the_lists_is_refused() {
    for (name, version) in [("other", "1.0"), ("evil", "1.0.0")] {
        let (bytes, _) = wheel(name, version, &[("evil.py", b"x")]);
        let error = refused(&bytes);
        assert!(error.contains("METADATA says"), "{error}");
    }
}

#[test]
fn anything_that_is_no_wheel_is_refused() {
    assert!(refused(b"PK\x05\x06 nonsense").starts_with("bad-wheel: "));
    assert!(refused(&zip(&[("a.py", b"x")])).starts_with("bad-wheel: "));
    assert!(refused(&archive("not a record\n", &[])).starts_with("bad-wheel: "));
}
