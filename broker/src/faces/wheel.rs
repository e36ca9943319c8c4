//! What a wheel holds, read once: its name, METADATA, and where in the archive its files are.

use std::io::{Cursor, Read};

use bytes::Bytes;
use mpypi_protocol::{
    Digest, FilePath,
    wheel::{normalized_name, parse_headers},
};
use zip::{CompressionMethod, ZipArchive};

/// Bytes that all members of a wheel may have together, unpacked.
const UNPACKED: u64 = 64 * 1024 * 1024;
/// Members of a wheel.
const MEMBERS: usize = 4096;
/// Largest METADATA or WHEEL, in bytes.
const TEXT: u64 = 256 * 1024;

/// What matters of a wheel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// `Name` in METADATA.
    pub name: String,
    /// `Version` in METADATA.
    pub version: String,
    /// Its compatibility tags, of which there is at least one.
    pub tags: Vec<String>,
    /// `Requires-Python` in METADATA.
    pub requires_python: Option<String>,
    /// What it needs, as METADATA says it.
    pub requires: Vec<String>,
    /// METADATA as it is.
    pub metadata: Bytes,
    /// All files but those of the dist-info folder.
    pub files: Vec<Member>,
}

/// A file in a wheel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Where it goes, relative to the folder of libraries.
    pub path: FilePath,
    /// Its SHA-256.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Where its bytes are in the wheel.
    pub start: u64,
    /// How many they are there.
    pub packed: u64,
    /// Whether they are deflated.
    pub is_deflated: bool,
}

impl Contents {
    /// Reads a wheel, all of it: what does not unpack is refused here.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn of(wheel: &Bytes) -> Result<Contents, String> {
        let mut archive =
            ZipArchive::new(Cursor::new(wheel)).map_err(|error| format!("it is no zip archive: {error}"))?;
        if archive.len() > MEMBERS {
            return Err(format!("it has more than {MEMBERS} members"));
        }
        let names: Vec<_> =
            archive.file_names().filter_map(|name| name.ok().map(|name| name.into_owned())).collect();
        let mut folders = names.iter().filter_map(|name| name.strip_suffix(".dist-info/METADATA"));
        let folder = match (folders.next(), folders.next()) {
            (Some(folder), None) if !folder.contains('/') => format!("{folder}.dist-info"),
            _ => return Err("it has not exactly one dist-info folder with METADATA".to_owned()),
        };
        let metadata = text(&mut archive, &format!("{folder}/METADATA"))?;
        let wheel = text(&mut archive, &format!("{folder}/WHEEL"))?;
        let headers =
            |file: &str, text: &str| parse_headers(text).map_err(|error| format!("its {file}: {error}"));
        let (about, how) = (headers("METADATA", &metadata)?, headers("WHEEL", &wheel)?);
        let all = |headers: &[(String, String)], wanted: &str| -> Vec<String> {
            let found = headers.iter().filter(|(key, _)| key.eq_ignore_ascii_case(wanted));
            found.map(|(_, value)| value.clone()).collect()
        };
        let one = |wanted: &str| {
            all(&about, wanted)
                .into_iter()
                .next_back()
                .ok_or_else(|| format!("its METADATA has no `{wanted}`"))
        };
        let tags = all(&how, "Tag");
        if tags.is_empty() {
            return Err("its WHEEL has no `Tag`".to_owned());
        }
        let below = format!("{folder}/");
        let mut files = Vec::new();
        let mut unpacked = 0;
        for at in 0..archive.len() {
            let mut member = archive.by_index(at).map_err(|error| format!("member {at}: {error}"))?;
            if member.is_dir() {
                continue;
            }
            let name = member.name().map_err(|error| error.to_string())?.into_owned();
            let path = FilePath::new(name).map_err(|error| error.to_string())?;
            let is_deflated = match member.compression() {
                CompressionMethod::Stored => false,
                CompressionMethod::Deflated => true,
                other => return Err(format!("`{path}` is compressed by {other}")),
            };
            let mut content = Vec::new();
            (&mut member)
                .take(UNPACKED - unpacked + 1)
                .read_to_end(&mut content)
                .map_err(|error| format!("`{path}`: {error}"))?;
            unpacked += content.len() as u64;
            if unpacked > UNPACKED {
                return Err(format!("it unpacks to more than {UNPACKED} bytes"));
            }
            let start = member.data_start().ok_or_else(|| format!("nobody knows where `{path}` starts"))?;
            if path.as_str().starts_with(&below) {
                continue;
            }
            let (size, packed) = (content.len() as u64, member.compressed_size());
            files.push(Member { digest: Digest::of(&content), path, size, start, packed, is_deflated });
        }
        Ok(Contents {
            name: one("Name")?,
            version: one("Version")?,
            tags,
            requires_python: one("Requires-Python").ok(),
            requires: all(&about, "Requires-Dist"),
            metadata: Bytes::from(metadata),
            files,
        })
    }

    /// The tag that stands for all of them, as `py2.py3-none-any`.
    #[must_use]
    pub fn tag(&self) -> String {
        let mut parts: [Vec<&str>; 3] = Default::default();
        for tag in &self.tags {
            for (part, found) in parts.iter_mut().zip(tag.split('-')) {
                found
                    .split('.')
                    .filter(|found| !part.contains(found))
                    .collect::<Vec<_>>()
                    .into_iter()
                    .for_each(|found| part.push(found));
            }
        }
        parts.map(|part| part.join(".")).join("-")
    }

    /// What the wheel's file is called (PEP 427).
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("{}-{}-{}.whl", normalized_name(&self.name), self.version.replace('-', "_"), self.tag())
    }

    /// Its name as the simple index has it (PEP 503).
    #[must_use]
    pub fn project(&self) -> String {
        project(&self.name)
    }
}

/// A package's name as PEP 503 normalises it.
#[must_use]
pub fn project(name: &str) -> String {
    normalized_name(name).replace('_', "-")
}

fn text(archive: &mut ZipArchive<Cursor<&Bytes>>, name: &str) -> Result<String, String> {
    let member = archive.by_name(name).map_err(|error| format!("`{name}`: {error}"))?;
    let mut text = String::new();
    member.take(TEXT + 1).read_to_string(&mut text).map_err(|error| format!("`{name}`: {error}"))?;
    match text.len() as u64 > TEXT {
        true => Err(format!("`{name}` has more than {TEXT} bytes")),
        false => Ok(text),
    }
}
