//! Wheels (PEP 427) in the one form that every installer accepts, Mpy-BLOX's among them.
//!
//! | module | does |
//! |---|---|
//! | [`pack`] | a folder with a `pyproject.toml` → wheel |
//! | [`repack`] | any wheel → wheel in our form |
//! | [`archive`] | files ↔ zip bytes |
//! | [`version`] | what is a version (PEP 440) |
//!
//! Our form, so that the same files give the same digest on any machine and day: files sorted, the dist-info
//! folder last and flat, RECORD at its end; METADATA and WHEEL of `Key: value` lines only; times, permissions
//! and compression fixed; nothing optional in the archive.

pub mod archive;
pub mod pack;
pub mod repack;
pub mod version;

use std::collections::BTreeMap;

use bytes::Bytes;
use mpypi_protocol::{
    Digest, FilePath, Tag,
    limits::TEXT,
    path::PathError,
    wheel::{ROOT, RecordLine, WheelTextError, dist_info, write_record},
};

use crate::{compile::CompileError, limits};
use archive::ArchiveError;

/// A wheel in our form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wheel {
    /// `Name` in its METADATA.
    pub name: String,
    /// `Version` in its METADATA, to the letter.
    pub version: String,
    /// The last `Tag` in its WHEEL: the one Mpy-BLOX compares.
    pub tag: String,
    /// The archive.
    pub bytes: Bytes,
    /// What it puts on a device, and where.
    pub files: Vec<(FilePath, Digest)>,
}

/// Header lines of METADATA or WHEEL, in order.
pub type Headers = Vec<(String, String)>;

/// What goes into a wheel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// The installed files, relative to [`ROOT`].
    pub files: BTreeMap<FilePath, Vec<u8>>,
    /// METADATA: at least `Name` and `Version`.
    metadata: Headers,
    /// WHEEL: at least one `Tag`.
    wheel: Headers,
    /// Further files of the dist-info folder, by name.
    more: BTreeMap<String, Vec<u8>>,
}

impl Contents {
    /// Its tags.
    #[must_use]
    pub fn tags(&self) -> Vec<&str> {
        self.wheel.iter().filter(|(key, _)| key == "Tag").map(|(_, tag)| tag.as_str()).collect()
    }

    /// Whether it is for any interpreter: Python source, and nothing made of it.
    #[must_use]
    pub fn is_source(&self) -> bool {
        self.tags().iter().all(|tag| tag.starts_with("py") && tag.contains("-none-"))
    }

    /// The same package with other files, for other devices.
    #[must_use]
    pub fn with(&self, files: BTreeMap<FilePath, Vec<u8>>, tag: &str) -> Contents {
        let mut wheel: Headers = self.wheel.iter().filter(|(key, _)| key != "Tag").cloned().collect();
        wheel.push(("Tag".to_owned(), tag.to_owned()));
        Contents { files, wheel, ..self.clone() }
    }

    /// The wheel, in our form.
    ///
    /// # Errors
    /// A header that Mpy-BLOX would not read, or a file name that RECORD cannot carry.
    pub fn write(self) -> Result<Wheel, WheelError> {
        write(self.files, &self.metadata, &self.wheel, self.more)
    }
}

/// Why a folder or file cannot become a wheel.
#[derive(Debug, thiserror::Error)]
pub enum WheelError {
    /// A file cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// `pyproject.toml` is not TOML.
    #[error("pyproject.toml: {problem}")]
    Toml {
        /// What is wrong with it, and where.
        problem: String,
    },
    /// `pyproject.toml` has no `[project]` table.
    #[error("pyproject.toml has no `[project]` table")]
    NoProject,
    /// `name` or `version` is left to a build tool, which we do not run.
    #[error("`{key}` in pyproject.toml is dynamic: only a build tool can tell it")]
    Dynamic {
        /// The key.
        key: &'static str,
    },
    /// A key of `[project]`, METADATA or WHEEL is missing or has a value it cannot have.
    #[error("{file}: `{key}` {problem}")]
    Value {
        /// The file.
        file: &'static str,
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// None of the places where the code of a project may be exists.
    #[error("no code found: none of {} exists", list(places))]
    NoCode {
        /// The places.
        places: Vec<String>,
    },
    /// More than one of these places exists.
    #[error("which one is the code: {}?", list(places))]
    Ambiguous {
        /// The places.
        places: Vec<String>,
    },
    /// The archive is refused.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// There is not exactly one dist-info folder.
    #[error("a wheel has exactly one dist-info folder, not {}", found.len())]
    DistInfo {
        /// Those it has.
        found: Vec<String>,
    },
    /// A file that every wheel has is not there.
    #[error("`{path}` is missing")]
    Missing {
        /// The file.
        path: String,
    },
    /// METADATA, WHEEL or RECORD cannot be read.
    #[error("{file}")]
    Text {
        /// The file.
        file: &'static str,
        /// Where and why.
        source: WheelTextError,
    },
    /// METADATA, WHEEL or RECORD is not UTF-8.
    #[error("{file} is not UTF-8")]
    NotUtf8 {
        /// The file.
        file: &'static str,
    },
    /// The archive has a file that RECORD does not have, or the other way round.
    #[error("`{path}` is in {one} and not in {other}")]
    Record {
        /// The file.
        path: FilePath,
        /// Where it is.
        one: &'static str,
        /// Where it is not.
        other: &'static str,
    },
    /// A file does not have the size or SHA-256 that RECORD says.
    #[error("`{path}` is not what RECORD says: expected {expected}, found {found}")]
    Hash {
        /// The file.
        path: FilePath,
        /// What RECORD says.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// Something that belongs outside of a device's library folder.
    #[error("`{path}` cannot be installed on a device")]
    Data {
        /// The file.
        path: FilePath,
    },
    /// Two files would be one after the dist-info folder is made flat or `.data` is merged.
    #[error("two files would become `{path}`")]
    Twice {
        /// The file.
        path: String,
    },
    /// A name that no RECORD can carry without quotes, which Mpy-BLOX does not read.
    #[error("`{path}` has a `{character}` in its name, which Mpy-BLOX cannot install")]
    Name {
        /// The file.
        path: FilePath,
        /// `,` or `"`.
        character: char,
    },
    /// A name that would lead out of the device's library folder, or that it cannot store.
    #[error(transparent)]
    Path(#[from] PathError),
    /// More files than [`limits::WHEEL_FILES`].
    #[error("{count} files are more than {}", limits::WHEEL_FILES)]
    TooManyFiles {
        /// How many there are.
        count: usize,
    },
    /// Its source cannot be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

impl WheelError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            WheelError::NoProject => "write `[project]` with `name` and `version`, as PEP 621 says",
            WheelError::Dynamic { key } => {
                return Some(format!(
                    "write `{key} = …` in `[project]`, or build the wheel yourself and put the `.whl` here"
                ));
            }
            WheelError::Compile(error) => return error.hint(),
            WheelError::NoCode { .. } => "name the folder or module as the project, with `_` for `-` and `.`",
            WheelError::Ambiguous { .. } => "keep one of them, or ignore the others in `channel.toml`",
            WheelError::Archive(ArchiveError::TooLarge { .. }) | WheelError::TooManyFiles { .. } => {
                "leave out what a device does not need"
            }
            WheelError::Data { .. } => {
                "only modules and package data can be installed; send other files below `src/`"
            }
            WheelError::Record { .. } | WheelError::Hash { .. } | WheelError::Missing { .. } => {
                "build the wheel again: it was changed or cut after it was built"
            }
            WheelError::Value { key, problem, .. } if key == "version" && problem.contains('-') => {
                "write a post-release as `1.0.post1`, a pre-release as `1.0rc1`"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

fn list(places: &[String]) -> String {
    places.iter().map(|place| format!("`{place}`")).collect::<Vec<_>>().join(", ")
}

fn write(
    mut files: BTreeMap<FilePath, Vec<u8>>,
    metadata: &Headers,
    wheel: &Headers,
    more: BTreeMap<String, Vec<u8>>,
) -> Result<Wheel, WheelError> {
    let name = one(metadata, "METADATA", "Name")?;
    check_name(&name).map_err(|problem| value("METADATA", "Name", problem))?;
    let version = one(metadata, "METADATA", "Version")?;
    version::check(&version).map_err(|problem| value("METADATA", "Version", problem))?;
    let tags = || wheel.iter().filter(|(key, _)| key == "Tag").map(|(_, tag)| tag);
    let tag = tags().next_back().ok_or_else(|| value("WHEEL", "Tag", "is missing"))?.clone();
    if let Some(tag) = tags().find(|tag| Tag::new(tag.as_str()).is_err()) {
        return Err(value("WHEEL", "Tag", format!("`{tag}` is no tag such as `py3-none-any`")));
    }

    let folder = dist_info(&name, &version);
    let in_folder = |file: &str| FilePath::new(format!("{folder}/{file}"));
    let mut info = vec![
        (in_folder("METADATA")?, header_lines(metadata, "METADATA")?),
        (in_folder("WHEEL")?, header_lines(wheel, "WHEEL")?),
    ];
    for (file, content) in more {
        info.push((in_folder(&file)?, content));
    }
    let mut members: Vec<(FilePath, Vec<u8>)> = Vec::with_capacity(files.len() + info.len() + 1);
    members.extend(std::mem::take(&mut files));
    members.extend(info);
    if members.len() >= limits::WHEEL_FILES {
        return Err(WheelError::TooManyFiles { count: members.len() + 1 });
    }
    // RECORD lists every file, itself included (`,,`), and no name of it is quoted.
    let mut record = Vec::with_capacity(members.len() + 1);
    for (path, content) in &members {
        if let Some(character) = path.as_str().chars().find(|c| matches!(c, ',' | '"')) {
            return Err(WheelError::Name { path: path.clone(), character });
        }
        record.push(RecordLine {
            path: path.clone(),
            digest: Some(Digest::of(content)),
            size: Some(content.len() as u64),
        });
    }
    record.push(RecordLine { path: in_folder("RECORD")?, digest: None, size: None });
    members.push((in_folder("RECORD")?, write_record(&record).into_bytes()));
    let installed = |(path, content): &(FilePath, Vec<u8>)| Ok((path.below(ROOT)?, Digest::of(content)));
    let files = members.iter().map(installed).collect::<Result<_, PathError>>()?;
    Ok(Wheel { name, version, tag, bytes: archive::write(&members)?.into(), files })
}

/// Mpy-BLOX splits each line at its first `:`, so no line may be without one, and none is blank.
fn header_lines(headers: &Headers, file: &'static str) -> Result<Vec<u8>, WheelError> {
    let mut text = String::new();
    for (key, content) in headers {
        let bad = |text: &str| text.is_empty() || text.contains(char::is_control);
        if bad(key) || key.contains([':', ' ']) || bad(content) {
            return Err(value(file, key, "should be one line of text"));
        }
        text += &format!("{key}: {content}\n");
    }
    Ok(text.into_bytes())
}

fn one(headers: &Headers, file: &'static str, key: &str) -> Result<String, WheelError> {
    let mut values = headers.iter().filter(|(found, _)| found == key).map(|(_, value)| value);
    match (values.next(), values.next()) {
        (Some(value), None) => Ok(value.clone()),
        (None, _) => Err(value(file, key, "is missing")),
        (Some(_), Some(_)) => Err(value(file, key, "stands there twice")),
    }
}

/// The name rule of the core metadata specification (PEP 508).
fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let edge = |c: char| c.is_ascii_alphanumeric();
    match name.chars().all(good) && name.starts_with(edge) && name.ends_with(edge) && name.len() <= TEXT {
        true => Ok(()),
        false => Err(format!(
            "`{}` is no package name: use letters, digits, `.`, `_` and `-`",
            name.escape_debug()
        )),
    }
}

fn value(file: &'static str, key: &str, problem: impl Into<String>) -> WheelError {
    WheelError::Value { file, key: key.to_owned(), problem: problem.into() }
}
