//! Packages in files of this machine: wheels as they are, and archives that become one.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Cursor, Read, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use flate2::read::GzDecoder;
use mpypi_protocol::{
    Digest, FilePath, limits as wire,
    wheel::{RecordLine, dist_info, parse_headers, write_record},
};
use zip::{CompressionMethod, ZipArchive, ZipWriter, result::ZipError, write::SimpleFileOptions};

use crate::limits;

/// A package to install.
#[derive(Debug)]
pub(super) struct Wheel {
    /// Its name.
    pub(super) name: String,
    /// Its version.
    pub(super) version: String,
    /// A wheel.
    pub(super) payload: Bytes,
}

/// Why a file is not installed.
#[derive(Debug, thiserror::Error)]
pub(super) enum LocalError {
    #[error("local files are not allowed here; run the agent with `--local-files DIR`")]
    NotAllowed,
    #[error("`{}` is not inside the folder of local files", .0.display())]
    Outside(PathBuf),
    #[error("`{}` cannot be read", .0.display())]
    Read(PathBuf),
    #[error("`{}` has more than {} bytes", .0.display(), wire::PACKAGE)]
    TooLarge(PathBuf),
    #[error("`{0}` is no package: its name should end in `.whl`, or be as `ax.2.6.4.pi64.tar.gz`")]
    NoPackage(String),
    #[error("`{file}` is no wheel: {problem}")]
    NoWheel { file: String, problem: String },
    #[error("`{file}` is no archive: {problem}")]
    NoArchive { file: String, problem: String },
}

/// Reads the package in `filename`, which must be inside `folder`.
pub(super) fn read(folder: Option<&Path>, filename: &str) -> Result<Wheel, LocalError> {
    let folder = folder.ok_or(LocalError::NotAllowed)?;
    let given = folder.join(filename);
    // Links and dots are followed first, so that none leads out.
    let path = given.canonicalize().map_err(|_| match given.starts_with(folder) {
        true => LocalError::Read(given.clone()),
        false => LocalError::Outside(given.clone()),
    })?;
    if !path.starts_with(folder) {
        return Err(LocalError::Outside(given));
    }
    if !path.is_file() {
        return Err(LocalError::Read(given));
    }
    let mut bytes = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(wire::PACKAGE + 1).read_to_end(&mut bytes));
    read.map_err(|_| LocalError::Read(given.clone()))?;
    if bytes.len() as u64 > wire::PACKAGE {
        return Err(LocalError::TooLarge(given));
    }
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let parts = file.strip_suffix(".tar.gz").or_else(|| file.strip_suffix(".tgz")).map(name_and_version);
    match parts {
        Some(Some((name, version))) => {
            let payload = archive(&name, &version, &bytes);
            let payload =
                payload.map_err(|problem| LocalError::NoArchive { file, problem: problem.to_string() })?;
            Ok(Wheel { name, version, payload })
        }
        None if file.ends_with(".whl") => {
            let described = describe(&bytes);
            let (name, version) = described.map_err(|problem| LocalError::NoWheel { file, problem })?;
            Ok(Wheel { name, version, payload: bytes.into() })
        }
        _ => Err(LocalError::NoPackage(file)),
    }
}

/// The name and the version in `ax.2.6.4.pi64`; what follows the version names a platform.
fn name_and_version(stem: &str) -> Option<(String, String)> {
    let digit = |part: &str| part.starts_with(|c: char| c.is_ascii_digit());
    let parts: Vec<_> = stem.split('.').collect();
    let first = parts.iter().position(|part| digit(part))?;
    let numbers = parts[first..].iter().take_while(|part| part.bytes().all(|c| c.is_ascii_digit())).count();
    let name = parts[..first].join(".");
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let named = !name.is_empty() && name.len() <= wire::TEXT && name.chars().all(good);
    (named && numbers > 0).then(|| (name, parts[first..first + numbers].join(".")))
}

/// What METADATA says.
fn describe(bytes: &[u8]) -> Result<(String, String), String> {
    let text = |error: ZipError| error.to_string();
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(text)?;
    let is_metadata = |name: &String| {
        name.strip_suffix("/METADATA")
            .is_some_and(|folder| folder.ends_with(".dist-info") && !folder.contains('/'))
    };
    let names: Vec<_> = archive
        .file_names()
        .filter_map(|name| name.ok().map(std::borrow::Cow::into_owned))
        .filter(is_metadata)
        .collect();
    let [metadata] = &names[..] else { return Err(format!("{} METADATA files instead of one", names.len())) };
    let mut metadata_text = String::new();
    let member = archive.by_name(metadata).map_err(text)?;
    let read = member.take(limits::WHEEL_TEXT).read_to_string(&mut metadata_text);
    read.map_err(|error| error.to_string())?;
    let headers = parse_headers(&metadata_text).map_err(|error| error.to_string())?;
    let value = |key: &str| {
        let found = headers.iter().find(|(other, _)| other.eq_ignore_ascii_case(key));
        found.map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
    };
    value("Name").zip(value("Version")).ok_or_else(|| "METADATA lacks a name or a version".to_owned())
}

/// A wheel with the files of an archive, the same for the same archive.
fn archive(name: &str, version: &str, bytes: &[u8]) -> io::Result<Bytes> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut files: BTreeMap<FilePath, Vec<u8>> = BTreeMap::new();
    let mut left = limits::WHEEL_UNPACKED;
    let mut archive = tar::Archive::new(GzDecoder::new(bytes));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if kind.is_dir() {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if !kind.is_file() {
            return Err(invalid(format!("`{path}` is no plain file")));
        }
        let path = FilePath::new(path.strip_prefix("./").unwrap_or(&path));
        let path = path.map_err(|problem| invalid(problem.to_string()))?;
        let mut content = Vec::new();
        left -= entry.by_ref().take(left + 1).read_to_end(&mut content)?.min(left as usize) as u64;
        if left == 0 || files.len() >= limits::WHEEL_MEMBERS {
            return Err(invalid("it unpacks to too much".to_owned()));
        }
        files.insert(path, content);
    }
    if files.is_empty() {
        return Err(invalid("it holds no file".to_owned()));
    }
    let info = dist_info(name, version);
    let path = |path: String| FilePath::new(path).map_err(|problem| invalid(problem.to_string()));
    files.insert(
        path(format!("{info}/METADATA"))?,
        format!("Name: {name}\nVersion: {version}\n").into_bytes(),
    );
    let mut record: Vec<_> = files
        .iter()
        .map(|(path, content)| RecordLine {
            path: path.clone(),
            digest: Some(Digest::of(content)),
            size: Some(content.len() as u64),
        })
        .collect();
    let record_path = path(format!("{info}/RECORD"))?;
    record.push(RecordLine { path: record_path.clone(), digest: None, size: None });
    files.insert(record_path, write_record(&record).into_bytes());
    let mut wheel = ZipWriter::new(Cursor::new(Vec::new()));
    for (path, content) in files {
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
        wheel.start_file(path.as_str(), options)?;
        wheel.write_all(&content)?;
    }
    Ok(wheel.finish()?.into_inner().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), Default::default()));
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            // Not by `set_path`, which refuses what is to be refused here.
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn an_archive_becomes_a_wheel_and_a_name_says_what_it_is() {
        for (stem, expected) in [
            ("ax.2.6.4.pi64", Some(("ax", "2.6.4"))),
            ("ax.2.6.4", Some(("ax", "2.6.4"))),
            ("my-app.tool.1.0.x86", Some(("my-app.tool", "1.0"))),
            ("ax", None),
            ("2.6.4", None),
        ] {
            let expected = expected.map(|(name, version)| (name.to_owned(), version.to_owned()));
            assert_eq!(name_and_version(stem), expected, "{stem}");
        }
        let wheel = archive("ax", "2.6.4", &tar(&[("./ax/main.py", b"x = 1\n")])).unwrap();
        assert_eq!(describe(&wheel), Ok(("ax".to_owned(), "2.6.4".to_owned())));
    }

    #[test]
    fn what_leads_out_of_the_folder_or_is_no_package_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let outside = tempfile::NamedTempFile::with_suffix(".whl").unwrap();
        std::os::unix::fs::symlink(outside.path(), root.join("away.whl")).unwrap();
        std::fs::write(root.join("note.txt"), "x").unwrap();
        std::fs::write(root.join("bad.whl"), "x").unwrap();
        std::fs::write(root.join("evil.1.0.tar.gz"), tar(&[("../../etc/passwd", b"x")])).unwrap();
        let says = |filename: &str| read(Some(&root), filename).unwrap_err().to_string();
        for filename in [outside.path().to_str().unwrap(), "away.whl", "../../../etc/passwd", "/etc/passwd"] {
            assert!(says(filename).contains("is not inside"), "{filename}: {}", says(filename));
        }
        assert!(says("note.txt").contains("is no package") && says("bad.whl").contains("is no wheel"));
        assert!(says("evil.1.0.tar.gz").contains("would leave the device's root"));
        assert!(says("absent.whl").contains("cannot be read") && says(".").contains("cannot be read"));
        assert!(read(None, "x").unwrap_err().to_string().contains("--local-files"));
    }
}
