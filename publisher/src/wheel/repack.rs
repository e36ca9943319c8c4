//! Any wheel → wheel in our form: checked against its own RECORD first, then written anew.

use std::collections::BTreeMap;

use mpypi_protocol::{
    Digest, FilePath,
    wheel::{WheelTextError, parse_headers, parse_record},
};

use super::{Contents, Headers, Wheel, WheelError, archive, value};

/// A wheel as it was given, in our form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repacked {
    /// The wheel.
    pub wheel: Wheel,
    /// What was left out, for people: empty if only the order of the bytes changed, or nothing.
    pub left_out: Vec<String>,
}

/// Headers of METADATA that only a package index shows, or that speak of files by their old names.
const INDEX_ONLY: [&str; 4] = ["Description", "Description-Content-Type", "License-File", "Dynamic"];

/// Files of the dist-info folder that vouch for, or list, what is written anew.
const REWRITTEN: [&str; 5] = ["METADATA", "WHEEL", "RECORD", "RECORD.jws", "RECORD.p7s"];

/// Checks the wheel in `bytes` and writes it in our form. A wheel in our form stays as it is.
///
/// # Errors
/// See [`WheelError`].
pub fn repack(bytes: &[u8]) -> Result<Repacked, WheelError> {
    let (contents, left_out) = contents(bytes)?;
    Ok(Repacked { wheel: contents.write()?, left_out })
}

/// What is in a wheel, and what of it has no place in our form, for people.
///
/// # Errors
/// See [`WheelError`].
pub fn contents(bytes: &[u8]) -> Result<(Contents, Vec<String>), WheelError> {
    let mut files = archive::read(bytes)?;
    let folder = dist_info_folder(&files)?;
    check_record(&files, &folder)?;

    let mut left_out = Vec::new();
    let metadata = headers(&files, &folder, "METADATA")?;
    let kept = |(key, value): &(String, String)| !value.is_empty() && !INDEX_ONLY.contains(&key.as_str());
    let (metadata, dropped): (Headers, Headers) = metadata.into_iter().partition(kept);
    if !dropped.is_empty() || has_body(&files, &folder)? {
        left_out.push("the description".to_owned());
    }
    let wheel = wheel_headers(&headers(&files, &folder, "WHEEL")?)?;

    let mut more = BTreeMap::new();
    let mut installed = BTreeMap::new();
    for (path, content) in std::mem::take(&mut files) {
        if let Some(name) = path.as_str().strip_prefix(&format!("{folder}/")) {
            match name {
                _ if name.starts_with("RECORD.") => left_out.push(format!("`{name}`")),
                _ if REWRITTEN.contains(&name) => {}
                // A folder inside dist-info makes Mpy-BLOX fail at the next upgrade.
                _ => put(&mut more, name.replace('/', "_"), content)?,
            }
        } else {
            let place = installed_place(&path)?;
            put(&mut installed, place, content)?;
        }
    }
    Ok((Contents { files: installed, metadata, wheel, more }, left_out))
}

/// The one folder at the top whose name ends in `.dist-info`.
fn dist_info_folder(files: &BTreeMap<FilePath, Vec<u8>>) -> Result<String, WheelError> {
    let tops = files.keys().filter_map(|path| path.as_str().split_once('/')).map(|(top, _)| top);
    let mut found: Vec<String> = tops.filter(|top| top.ends_with(".dist-info")).map(str::to_owned).collect();
    found.dedup();
    match found.as_slice() {
        [folder] => Ok(folder.clone()),
        _ => Err(WheelError::DistInfo { found }),
    }
}

/// RECORD and the archive name the same files, with the same sizes and SHA-256.
fn check_record(files: &BTreeMap<FilePath, Vec<u8>>, folder: &str) -> Result<(), WheelError> {
    let text = text(files, folder, "RECORD")?;
    let lines =
        parse_record(text).map_err(|source: WheelTextError| WheelError::Text { file: "RECORD", source })?;
    let mut recorded = BTreeMap::new();
    for line in &lines {
        let content = files.get(&line.path).ok_or_else(|| WheelError::Record {
            path: line.path.clone(),
            one: "RECORD",
            other: "the archive",
        })?;
        let wrong =
            |expected: String, found: String| WheelError::Hash { path: line.path.clone(), expected, found };
        if let Some(size) = line.size.filter(|size| *size != content.len() as u64) {
            return Err(wrong(format!("{size} bytes"), format!("{} bytes", content.len())));
        }
        let found = Digest::of(content);
        if let Some(digest) = line.digest.filter(|digest| *digest != found) {
            return Err(wrong(digest.to_string(), found.to_string()));
        }
        recorded.insert(&line.path, line.digest);
    }
    for path in files.keys() {
        // Only RECORD and its signatures have no hash in it, and the signatures need not be in it.
        let name = path.as_str().strip_prefix(folder).unwrap_or_default();
        let exempt = name == "/RECORD" || name.starts_with("/RECORD.");
        if !exempt && recorded.get(path).copied().flatten().is_none() {
            return Err(WheelError::Record {
                path: path.clone(),
                one: "the archive",
                other: "RECORD with its hash",
            });
        }
    }
    Ok(())
}

fn wheel_headers(found: &Headers) -> Result<Headers, WheelError> {
    let all = |key: &'static str| found.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.clone());
    let last = |key: &'static str| all(key).next_back();
    // PEP 427: "Warn if minor version is greater, abort if major version is greater."
    let version = last("Wheel-Version").unwrap_or_default();
    if version.split('.').next() != Some("1") {
        return Err(value("WHEEL", "Wheel-Version", format!("should be 1.0, not `{version}`")));
    }
    let purelib = last("Root-Is-Purelib").filter(|text| text == "false").unwrap_or("true".to_owned());
    let mut headers: Headers =
        [("Wheel-Version", "1.0"), ("Generator", "mpypi"), ("Root-Is-Purelib", &purelib)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .to_vec();
    headers.extend(all("Tag").map(|tag| ("Tag".to_owned(), tag)));
    Ok(headers)
}

/// Where a file of the wheel is installed: `.data/purelib` and `.data/platlib` are the root itself.
fn installed_place(path: &FilePath) -> Result<FilePath, WheelError> {
    let Some((top, rest)) = path.as_str().split_once('/').filter(|(top, _)| top.ends_with(".data")) else {
        return Ok(path.clone());
    };
    let rest = rest.strip_prefix("purelib/").or_else(|| rest.strip_prefix("platlib/"));
    let rest = rest.filter(|_| !top.is_empty()).ok_or_else(|| WheelError::Data { path: path.clone() })?;
    Ok(FilePath::new(rest)?)
}

fn put<K: Ord + ToString>(
    files: &mut BTreeMap<K, Vec<u8>>,
    name: K,
    content: Vec<u8>,
) -> Result<(), WheelError> {
    match files.contains_key(&name) {
        true => Err(WheelError::Twice { path: name.to_string() }),
        false => {
            files.insert(name, content);
            Ok(())
        }
    }
}

fn headers(
    files: &BTreeMap<FilePath, Vec<u8>>,
    folder: &str,
    file: &'static str,
) -> Result<Headers, WheelError> {
    parse_headers(text(files, folder, file)?).map_err(|source| WheelError::Text { file, source })
}

fn has_body(files: &BTreeMap<FilePath, Vec<u8>>, folder: &str) -> Result<bool, WheelError> {
    let text = text(files, folder, "METADATA")?;
    Ok(text.lines().skip_while(|line| !line.is_empty()).any(|line| !line.is_empty()))
}

fn text<'a>(
    files: &'a BTreeMap<FilePath, Vec<u8>>,
    folder: &str,
    file: &'static str,
) -> Result<&'a str, WheelError> {
    let path = format!("{folder}/{file}");
    let content = FilePath::new(path.as_str()).ok().and_then(|path| files.get(&path));
    let content = content.ok_or(WheelError::Missing { path })?;
    std::str::from_utf8(content).map_err(|_| WheelError::NotUtf8 { file })
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use mpypi_protocol::wheel::{RecordLine, write_record};

    use super::*;
    use crate::wheel::pack::tests::{PROJECT, file, packed};

    const METADATA: &str = "Metadata-Version: 2.4\nName: Blink.Led\nVersion: 1.0\nLicense-File: LICENSE\n\
                            Description-Content-Type: text/markdown\n\n# Blink\n\nBlinks.\n";
    const WHEEL: &str = "Wheel-Version: 1.0\nGenerator: some-tool 3\nRoot-Is-Purelib: true\n\
                         Tag: py2-none-any\nTag: py3-none-any\n\n";

    /// A wheel as other tools write it: data descriptors or not, folders, RECORD made of what is there.
    fn foreign(files: &[(&str, &str)], record: Option<&str>) -> Vec<u8> {
        let lines = files.iter().map(|(name, content)| RecordLine {
            path: FilePath::new(*name).unwrap_or_else(|_| FilePath::new("bad").unwrap()),
            digest: Some(Digest::of(content.as_bytes())),
            size: None,
        });
        let record = record.map_or_else(
            || write_record(&lines.collect::<Vec<_>>()) + "Blink.Led-1.0.dist-info/RECORD,,\n\n",
            str::to_owned,
        );
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        zip.set_comment("made elsewhere").unwrap();
        let options = zip::write::SimpleFileOptions::default();
        zip.add_directory("blink_led/", options).unwrap();
        for (name, content) in files.iter().chain([&("Blink.Led-1.0.dist-info/RECORD", record.as_str())]) {
            zip.start_file(*name, options).unwrap();
            zip.write_all(content.as_bytes()).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn usual<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let usual = [
            ("Blink.Led-1.0.dist-info/METADATA", METADATA),
            ("Blink.Led-1.0.dist-info/WHEEL", WHEEL),
            ("Blink.Led-1.0.dist-info/licenses/LICENSE", "MIT"),
            ("blink_led/__init__.py", "x = 1\n"),
        ];
        [&usual, more].concat()
    }

    fn error(wheel: &[u8]) -> WheelError {
        repack(wheel).unwrap_err()
    }

    #[test]
    fn a_wheel_in_our_form_stays_as_it_is() {
        let wheel = packed(&[("pyproject.toml", PROJECT), ("blink_led/__init__.py", "x = 1\n")]).unwrap();
        let again = repack(&wheel.bytes).unwrap();
        assert_eq!(again, Repacked { wheel, left_out: vec![] });
    }

    #[test]
    fn another_tools_wheel_becomes_one_that_mpy_blox_installs() {
        let data = ("blink_led-1.0.data/purelib/blink_extra.py", "y = 2\n");
        let Repacked { wheel, left_out } = repack(&foreign(&usual(&[data]), None)).unwrap();
        assert_eq!((wheel.name.as_str(), wheel.version.as_str()), ("Blink.Led", "1.0"));
        assert_eq!(wheel.tag, "py3-none-any");
        assert_eq!(left_out, ["the description"]);
        let names: Vec<_> =
            archive::read(&wheel.bytes).unwrap().into_keys().map(|path| path.to_string()).collect();
        assert_eq!(
            names,
            [
                "blink_extra.py",
                "blink_led-1.0.dist-info/METADATA",
                "blink_led-1.0.dist-info/RECORD",
                "blink_led-1.0.dist-info/WHEEL",
                "blink_led-1.0.dist-info/licenses_LICENSE",
                "blink_led/__init__.py",
            ]
        );
        assert_eq!(
            file(&wheel, "blink_led-1.0.dist-info/METADATA"),
            "Metadata-Version: 2.4\nName: Blink.Led\nVersion: 1.0\n"
        );
        assert_eq!(
            file(&wheel, "blink_led-1.0.dist-info/WHEEL"),
            "Wheel-Version: 1.0\nGenerator: mpypi\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n"
        );
        assert_eq!(repack(&wheel.bytes).unwrap().wheel, wheel, "once is enough");
    }

    #[test]
    fn a_file_that_is_not_what_record_says_is_refused() {
        let good = foreign(&usual(&[]), None);
        let record = file(&repack(&good).unwrap().wheel, "blink_led-1.0.dist-info/RECORD");
        assert!(!record.is_empty());
        let record = usual(&[])
            .iter()
            .map(|(name, _)| RecordLine {
                path: FilePath::new(*name).unwrap(),
                digest: Some(Digest::of(b"other")),
                size: None,
            })
            .collect::<Vec<_>>();
        let wheel = foreign(&usual(&[]), Some(&write_record(&record)));
        assert!(matches!(error(&wheel), WheelError::Hash { .. }));
    }

    #[test]
    fn a_file_that_record_does_not_name_is_refused_and_so_is_the_reverse() {
        let wheel = foreign(&usual(&[]), Some("blink_led/__init__.py,,\n"));
        assert!(matches!(error(&wheel), WheelError::Record { other: "RECORD with its hash", .. }));
        let wheel = foreign(&usual(&[]), Some("blink_led/gone.py,,\n"));
        assert!(matches!(error(&wheel), WheelError::Record { other: "the archive", .. }));
    }

    #[test]
    fn a_record_that_leads_out_of_the_folder_is_refused() {
        let wheel = foreign(&usual(&[]), Some("../boot.py,,\n"));
        assert!(matches!(error(&wheel), WheelError::Text { file: "RECORD", .. }));
        let wheel = foreign(&usual(&[("../boot.py", "")]), None);
        assert!(matches!(error(&wheel), WheelError::Archive(archive::ArchiveError::Path(_))));
    }

    #[test]
    fn two_dist_info_folders_or_none_are_refused() {
        let wheel = foreign(&usual(&[("other-1.0.dist-info/METADATA", METADATA)]), None);
        assert!(matches!(error(&wheel), WheelError::DistInfo { found } if found.len() == 2));
        let wheel = archive::write(&[(FilePath::new("a.py").unwrap(), vec![])]).unwrap();
        assert!(matches!(error(&wheel), WheelError::DistInfo { found } if found.is_empty()));
    }

    #[test]
    fn what_belongs_outside_the_library_folder_is_refused() {
        let wheel = foreign(&usual(&[("blink_led-1.0.data/scripts/run", "")]), None);
        assert!(matches!(error(&wheel), WheelError::Data { .. }));
    }

    #[test]
    fn a_wheel_cut_anywhere_is_refused() {
        let wheel = foreign(&usual(&[]), None);
        for end in 0..wheel.len() - "made elsewhere".len() {
            assert!(repack(&wheel[..end]).is_err(), "cut at {end}");
        }
    }
}
