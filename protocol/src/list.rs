//! Update lists: the retained JSON array that says what the devices of a channel should have.
//!
//! Open on the wire, closed in code: entries of unknown `type` and unknown keys of known entries survive a
//! round trip; everything known is checked once, here.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::{
    ChannelName, Chunks, Digest, FilePath, PackageId, chunk, limits, path::PathError, topic::NameError,
    wheel::normalized_name,
};

/// A checked update list: at most one release, first; at most one signature, last; no path and no package
/// twice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UpdateList {
    entries: Vec<Entry>,
}

/// One element of an update list.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Entry {
    /// `release`: what this list is called and where it stands in the channel's history.
    Release(Release),
    /// `wheel`: a Python package.
    Wheel(Wheel),
    /// `src`: a file as it is.
    Src(Src),
    /// `firmware`: an image for the whole device.
    Firmware(Firmware),
    /// `signature`: who vouches for everything before it.
    Signature(Signature),
    /// `check`, `install`, `rollback` or `restart`: an order, in lists sent to one node.
    Command(Command, Map<String, Value>),
    /// Any other `type`, kept as it came.
    Unknown(Map<String, Value>),
}

/// What a `release` entry says.
#[derive(Debug, Clone, PartialEq)]
pub struct Release {
    /// The channel this list was made for.
    pub channel: ChannelName,
    /// Decides what is newer: it grows with every list of the channel and never repeats.
    pub sequence: u64,
    /// For people.
    pub version: String,
    /// When the list was made.
    pub created: Option<Timestamp>,
    /// When devices must stop believing that this list is the newest.
    pub expires: Option<Timestamp>,
    /// Counts before `sequence` does: whoever raises it, in a new root, makes every sequence before old.
    pub epoch: u64,
    /// The digest of the list that this one replaced: the chain of the channel's history.
    pub previous: Option<Digest>,
    /// Sequences of releases that must not run any more.
    pub revoked: Vec<u64>,
    /// Other keys, `rollout` among them: see [`Rollout::of`](crate::rollout::Rollout::of).
    pub extra: Map<String, Value>,
}

/// What a `wheel` entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wheel {
    /// The package's name, equal to `Name` in its METADATA.
    pub name: String,
    /// The package's version, equal to `Version` in its METADATA, to the letter.
    pub version: String,
    /// The digest of the wheel.
    pub digest: Digest,
    /// The size of the wheel in bytes.
    pub size: Option<u64>,
    /// The compatibility tag of the wheel, as `py3-none-any` or `mpy6-bytecode-esp32`; see [`tag`](crate::tag).
    pub tag: Option<String>,
    /// How it is cut, where it lies in chunks instead of as a whole.
    pub chunks: Option<Chunks>,
    /// Other keys.
    pub extra: Map<String, Value>,
}

/// What a `src` entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Src {
    /// Where the file goes, relative to the device's root.
    pub path: FilePath,
    /// The digest of the file.
    pub digest: Digest,
    /// The size of the file in bytes.
    pub size: Option<u64>,
    /// How it is cut, where it lies in chunks instead of as a whole.
    pub chunks: Option<Chunks>,
    /// Other keys.
    pub extra: Map<String, Value>,
}

/// What a `firmware` entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firmware {
    /// The image's name.
    pub name: String,
    /// The image's version.
    pub version: String,
    /// The hardware it is for.
    pub target: Option<String>,
    /// The digest of the image.
    pub digest: Digest,
    /// The size of the image in bytes.
    pub size: Option<u64>,
    /// How it is cut, where it lies in chunks instead of as a whole.
    pub chunks: Option<Chunks>,
    /// Other keys.
    pub extra: Map<String, Value>,
}

/// What a `signature` entry says. It covers every byte of the payload before the `,` in front of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// The id of the key.
    pub key: String,
    /// The algorithm, as `rsa3072-pkcs1v15-sha256`.
    pub alg: String,
    /// The signature, in base64.
    pub sig: String,
    /// Other keys.
    pub extra: Map<String, Value>,
}

/// The key of an entry that a device takes only if somebody there chose it: `"optional": true`.
pub const OPTIONAL: &str = "optional";

/// The key of a release that holds the commit which its files were taken from, in hexadecimal. Nothing follows from it: it
/// tells people where to look.
pub const COMMIT: &str = "commit";

impl Release {
    /// The commit that it was made of, if it says one.
    #[must_use]
    pub fn commit(&self) -> Option<&str> {
        let hexadecimal = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        // SHA-1 or SHA-256.
        let commit = self.extra.get(COMMIT).and_then(Value::as_str)?;
        (matches!(commit.len(), 40 | 64) && commit.bytes().all(hexadecimal)).then_some(commit)
    }
}

/// An order to one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// Read the channel again now.
    Check,
    /// Install now what waits for an order, for its time of day or for its turn in the jitter.
    Install,
    /// Go back to the release before the present one.
    Rollback,
    /// Restart.
    Restart,
}

/// Why a payload is not an update list.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// Larger than [`limits::LIST`].
    #[error("a list of {size} bytes is larger than {}", limits::LIST)]
    TooLarge {
        /// Its size in bytes.
        size: usize,
    },
    /// Not JSON; says where.
    #[error("not JSON")]
    Json(#[from] serde_json::Error),
    /// JSON, but not an array. Mpy-BLOX would wait for ever.
    #[error("an update list is a JSON array, not {found}")]
    NotAnArray {
        /// What it is instead.
        found: &'static str,
    },
    /// More entries than [`limits::LIST_ENTRIES`].
    #[error("{count} entries are more than {}", limits::LIST_ENTRIES)]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// One entry is wrong.
    #[error("entry {index}{}: {problem}", kind.as_ref().map(|k| format!(" (`{k}`)")).unwrap_or_default())]
    Entry {
        /// Which one, from 0.
        index: usize,
        /// Its `type`, if it has one.
        kind: Option<String>,
        /// What is wrong with it.
        problem: Problem,
    },
}

/// What is wrong with an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Not a JSON object.
    #[error("an entry is a JSON object, not {0}")]
    NotAnObject(&'static str),
    /// A key that must be there is not.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A key's value has another type than it must have.
    #[error("`{key}` should be {expected}, not {found}")]
    Type {
        /// The key.
        key: &'static str,
        /// What its value should be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A key's value has the right type and a wrong content.
    #[error("`{key}`: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong with its value.
        reason: String,
    },
    /// `release` anywhere but first.
    #[error("a release comes first, once")]
    ReleaseNotFirst,
    /// `signature` anywhere but last.
    #[error("a signature comes last, once")]
    SignatureNotLast,
    /// Two entries for one file, or two for one package and tag: a device could satisfy only one.
    #[error("`{0}` is in the list twice")]
    Twice(String),
    /// Two entries with the same bytes, cut in two ways: only one of them can be retained.
    #[error("package {0} is in the list in other chunks, too")]
    OtherChunks(Digest),
    /// A file where another entry needs a folder.
    #[error("`{0}` is a file in this list, so nothing can be below it")]
    BelowFile(String),
}

impl Firmware {
    /// Whether the image runs on a device whose firmware key is `own`. Keys that differ in their `-eth…` alone are one
    /// hardware; a device that does not know its key takes any; so does an image that names none. projectMM's rule.
    #[must_use]
    pub fn fits(&self, own: Option<&str>) -> bool {
        let board = |key: &str| key.find("-eth").map_or(key, |end| &key[..end]).to_owned();
        match (own.filter(|own| !own.is_empty()), &self.target) {
            (Some(own), Some(target)) => board(own) == board(target),
            _ => true,
        }
    }
}

impl UpdateList {
    /// Reads the payload of a channel or `cmd` message.
    ///
    /// # Errors
    /// Says which entry and what is wrong with it.
    pub fn parse(payload: &[u8]) -> Result<UpdateList, ListError> {
        if payload.len() > limits::LIST {
            return Err(ListError::TooLarge { size: payload.len() });
        }
        let values = match serde_json::from_slice(payload)? {
            Value::Array(values) => values,
            other => return Err(ListError::NotAnArray { found: type_name(&other) }),
        };
        if values.len() > limits::LIST_ENTRIES {
            return Err(ListError::TooMany { count: values.len() });
        }
        let mut entries = Vec::with_capacity(values.len());
        for (index, value) in values.into_iter().enumerate() {
            let kind = value.get("type").and_then(Value::as_str).map(str::to_owned);
            entries.push(Entry::from_value(value).map_err(|problem| ListError::Entry {
                index,
                kind,
                problem,
            })?);
        }
        UpdateList::ordered(entries)
    }

    /// Makes the list that devices will read when `entries` are sent.
    ///
    /// # Errors
    /// What [`UpdateList::parse`] would say of the payload.
    pub fn new(entries: Vec<Entry>) -> Result<UpdateList, ListError> {
        UpdateList::parse(&UpdateList { entries }.to_bytes())
    }

    /// The list as a reader takes it who knows neither rollouts nor revoked releases, epochs, optional packages nor
    /// chunks: he passes over what says so.
    #[must_use]
    pub fn to_old_readers(mut self) -> UpdateList {
        for entry in &mut self.entries {
            entry.set_chunks(None);
            match entry {
                Entry::Release(release) => {
                    release.extra.shift_remove(crate::rollout::KEY);
                    (release.epoch, release.revoked) = (0, Vec::new());
                }
                Entry::Wheel(wheel) => drop(wheel.extra.shift_remove(OPTIONAL)),
                _ => {}
            }
        }
        self
    }

    fn ordered(entries: Vec<Entry>) -> Result<UpdateList, ListError> {
        let files: HashSet<&str> = entries
            .iter()
            .filter_map(|entry| match entry {
                Entry::Src(src) => Some(src.path.as_str()),
                _ => None,
            })
            .collect();
        let (mut seen, mut cut) = (HashSet::new(), HashMap::new());
        for (index, entry) in entries.iter().enumerate() {
            let name = match entry {
                Entry::Src(src) => Some(src.path.to_string()),
                Entry::Wheel(wheel) => {
                    Some(name_and_tag(&normalized_name(&wheel.name), wheel.tag.as_deref()))
                }
                Entry::Firmware(image) => Some(name_and_tag(&image.name, image.target.as_deref())),
                _ => None,
            };
            let problem = match entry {
                Entry::Release(_) if index != 0 => Some(Problem::ReleaseNotFirst),
                Entry::Signature(_) if index + 1 != entries.len() => Some(Problem::SignatureNotLast),
                Entry::Src(src) if src.path.parents().any(|folder| files.contains(folder)) => {
                    let file = src.path.parents().find(|folder| files.contains(folder)).unwrap_or_default();
                    Some(Problem::BelowFile(file.to_owned()))
                }
                _ => name
                    .filter(|name| !seen.insert((entry.kind().to_owned(), name.clone())))
                    .map(Problem::Twice)
                    .or_else(|| {
                        let (id, chunks) = entry.cut()?;
                        let is_other = *cut.entry(*id.digest()).or_insert(chunks) != chunks;
                        is_other.then(|| Problem::OtherChunks(*id.digest()))
                    }),
            };
            if let Some(problem) = problem {
                return Err(ListError::Entry { index, kind: Some(entry.kind().to_owned()), problem });
            }
        }
        Ok(UpdateList { entries })
    }

    /// The list as a payload: compact JSON, known keys first. What was parsed may have looked otherwise, so a
    /// signed list is passed on as the bytes it came in, never as these.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let values = self.entries.iter().map(Entry::to_value).collect();
        serde_json::to_vec(&Value::Array(values)).expect("a value always makes JSON")
    }

    /// All entries, in order.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The release, if the list has one. Lists from Mpy-BLOX's own tools have none.
    #[must_use]
    pub fn release(&self) -> Option<&Release> {
        match self.entries.first() {
            Some(Entry::Release(release)) => Some(release),
            _ => None,
        }
    }

    /// Every package the list names, with its size where the list says it.
    pub fn packages(&self) -> impl Iterator<Item = (PackageId, Option<u64>)> {
        self.entries.iter().filter_map(Entry::package)
    }

    /// Every package that lies in chunks, and how it is cut.
    pub fn cut(&self) -> impl Iterator<Item = (PackageId, &Chunks)> {
        self.entries.iter().filter_map(Entry::cut)
    }

    /// Every retained message that its readers need beside it.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.entries.iter().flat_map(Entry::pieces)
    }
}

/// A retained message that holds a package, or a chunk of one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Where it is retained.
    pub topic: String,
    /// The digest of its payload.
    pub digest: Digest,
    /// Bytes of its payload, where the list says it.
    pub size: Option<u64>,
}

impl Wheel {
    /// Whether a device takes it only if somebody there chose it. Who does not know the key takes it.
    #[must_use]
    pub fn is_optional(&self) -> bool {
        self.extra.get(OPTIONAL) == Some(&Value::Bool(true))
    }
}

impl Firmware {
    /// Whether a device takes it only if somebody there chose it. Who does not know the key takes it.
    #[must_use]
    pub fn is_optional(&self) -> bool {
        self.extra.get(OPTIONAL) == Some(&Value::Bool(true))
    }
}

impl Entry {
    /// The `type` of the entry.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Entry::Release(_) => "release",
            Entry::Wheel(_) => "wheel",
            Entry::Src(_) => "src",
            Entry::Firmware(_) => "firmware",
            Entry::Signature(_) => "signature",
            Entry::Command(Command::Check, _) => "check",
            Entry::Command(Command::Install, _) => "install",
            Entry::Command(Command::Rollback, _) => "rollback",
            Entry::Command(Command::Restart, _) => "restart",
            Entry::Unknown(map) => map.get("type").and_then(Value::as_str).unwrap_or_default(),
        }
    }

    /// The package the entry names, with its size where the entry says it.
    #[must_use]
    pub fn package(&self) -> Option<(PackageId, Option<u64>)> {
        match self {
            Entry::Wheel(wheel) => Some((PackageId::Wheel(wheel.digest), wheel.size)),
            Entry::Src(src) => Some((PackageId::Src(src.path.clone(), src.digest), src.size)),
            Entry::Firmware(image) => Some((PackageId::Firmware(image.digest), image.size)),
            _ => None,
        }
    }

    /// How the package is cut that the entry names, where it lies in chunks.
    #[must_use]
    pub fn chunks(&self) -> Option<&Chunks> {
        match self {
            Entry::Wheel(wheel) => wheel.chunks.as_ref(),
            Entry::Src(src) => src.chunks.as_ref(),
            Entry::Firmware(image) => image.chunks.as_ref(),
            _ => None,
        }
    }

    /// Says that its package lies in these chunks, or in none. An entry that names no package stays as it is.
    pub fn set_chunks(&mut self, chunks: Option<Chunks>) {
        match self {
            Entry::Wheel(wheel) => wheel.chunks = chunks,
            Entry::Src(src) => src.chunks = chunks,
            Entry::Firmware(image) => image.chunks = chunks,
            _ => {}
        }
    }

    /// Its package and how that is cut, where it lies in chunks.
    #[must_use]
    pub fn cut(&self) -> Option<(PackageId, &Chunks)> {
        Some((self.package()?.0, self.chunks()?))
    }

    /// The retained messages that hold its package: one, or its chunks in order. The empty file has none, agents make
    /// it from the digest of nothing.
    #[must_use]
    pub fn pieces(&self) -> Vec<Piece> {
        let Some((id, size)) = self.package().filter(|(id, _)| *id.digest() != Digest::EMPTY) else {
            return Vec::new();
        };
        match self.chunks() {
            None => vec![Piece { topic: id.topic(), digest: *id.digest(), size }],
            Some(chunks) => chunks.pieces(id.digest()).collect(),
        }
    }

    pub(crate) fn from_value(value: Value) -> Result<Entry, Problem> {
        let mut fields = match value {
            Value::Object(map) => Fields(map),
            other => return Err(Problem::NotAnObject(type_name(&other))),
        };
        let kind = match fields.0.get("type") {
            Some(Value::String(kind)) => kind.clone(),
            Some(other) => return Err(mismatch("type", "a string", other)),
            None => return Err(Problem::Missing("type")),
        };
        let known =
            ["release", "wheel", "src", "firmware", "signature", "check", "install", "rollback", "restart"];
        if !known.contains(&kind.as_str()) {
            return Ok(Entry::Unknown(fields.0));
        }
        fields.0.shift_remove("type");
        Ok(match kind.as_str() {
            "release" => Entry::Release(Release {
                channel: fields.parsed("channel", |text| {
                    ChannelName::new(text).map_err(|error: NameError| error.to_string())
                })?,
                sequence: fields.number("sequence")?.ok_or(Problem::Missing("sequence"))?,
                version: fields.text("version")?,
                created: fields.time("created")?,
                expires: fields.time("expires")?,
                epoch: fields.number("epoch")?.unwrap_or(0),
                previous: fields.optional_digest("previous")?,
                revoked: fields.numbers("revoked", limits::REVOKED)?,
                extra: fields.rest(),
            }),
            "wheel" => Entry::Wheel(Wheel {
                name: fields.parsed("name", |text| package_name(&text))?,
                version: fields.parsed("version", |text| package_version(&text))?,
                digest: fields.digest()?,
                chunks: fields.chunks()?,
                size: fields.number("size")?,
                tag: fields.optional_text("tag")?,
                extra: fields.rest(),
            }),
            "src" => Entry::Src(Src {
                path: fields.parsed("path", |text| {
                    FilePath::new(text)
                        .and_then(FilePath::for_topic)
                        .map_err(|error: PathError| error.to_string())
                })?,
                digest: fields.digest()?,
                chunks: fields.chunks()?,
                size: fields.number("size")?,
                extra: fields.rest(),
            }),
            "firmware" => Entry::Firmware(Firmware {
                name: fields.text("name")?,
                version: fields.text("version")?,
                target: fields.optional_text("target")?,
                digest: fields.digest()?,
                chunks: fields.chunks()?,
                size: fields.number("size")?,
                extra: fields.rest(),
            }),
            "signature" => Entry::Signature(Signature {
                key: fields.text("key")?,
                alg: fields.text("alg")?,
                sig: fields.string("sig")?.ok_or(Problem::Missing("sig"))?,
                extra: fields.rest(),
            }),
            "check" => Entry::Command(Command::Check, fields.rest()),
            "install" => Entry::Command(Command::Install, fields.rest()),
            "rollback" => Entry::Command(Command::Rollback, fields.rest()),
            _ => Entry::Command(Command::Restart, fields.rest()),
        })
    }

    pub(crate) fn to_value(&self) -> Value {
        let mut map = Map::new();
        let mut put = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                map.insert(key.to_owned(), value);
            }
        };
        let text = |text: &dyn ToString| Some(Value::String(text.to_string()));
        let optional = |text: &Option<String>| text.clone().map(Value::String);
        if !matches!(self, Entry::Unknown(_)) {
            put("type", text(&self.kind()));
        }
        let extra = match self {
            Entry::Release(release) => {
                put("channel", text(&release.channel));
                put("sequence", Some(release.sequence.into()));
                put("version", text(&release.version));
                put("created", release.created.map(|time| time.to_string().into()));
                put("expires", release.expires.map(|time| time.to_string().into()));
                put("epoch", Some(release.epoch).filter(|epoch| *epoch > 0).map(Value::from));
                put("previous", release.previous.map(|digest| digest.to_string().into()));
                put(
                    "revoked",
                    Some(&release.revoked).filter(|all| !all.is_empty()).map(|all| all.clone().into()),
                );
                &release.extra
            }
            Entry::Wheel(wheel) => {
                put("name", text(&wheel.name));
                put("version", text(&wheel.version));
                put("pkg_sha256", text(&wheel.digest));
                put("size", wheel.size.map(Value::from));
                put("tag", optional(&wheel.tag));
                put(chunk::KEY, wheel.chunks.as_ref().map(Chunks::to_value));
                &wheel.extra
            }
            Entry::Src(src) => {
                put("path", text(&src.path));
                put("pkg_sha256", text(&src.digest));
                put("size", src.size.map(Value::from));
                put(chunk::KEY, src.chunks.as_ref().map(Chunks::to_value));
                &src.extra
            }
            Entry::Firmware(image) => {
                put("name", text(&image.name));
                put("version", text(&image.version));
                put("target", optional(&image.target));
                put("pkg_sha256", text(&image.digest));
                put("size", image.size.map(Value::from));
                put(chunk::KEY, image.chunks.as_ref().map(Chunks::to_value));
                &image.extra
            }
            Entry::Signature(signature) => {
                put("key", text(&signature.key));
                put("alg", text(&signature.alg));
                put("sig", text(&signature.sig));
                &signature.extra
            }
            Entry::Command(_, extra) | Entry::Unknown(extra) => extra,
        };
        for (key, value) in extra {
            map.entry(key.clone()).or_insert_with(|| value.clone());
        }
        Value::Object(map)
    }
}

/// The keys of an entry that nobody has taken yet; what remains at the end is kept as `extra`.
pub(crate) struct Fields(pub(crate) Map<String, Value>);

impl Fields {
    /// What remains, in no more room than it needs: lists are kept by many devices of one process.
    fn rest(self) -> Map<String, Value> {
        self.0.into_iter().collect()
    }

    pub(crate) fn string(&mut self, key: &'static str) -> Result<Option<String>, Problem> {
        match self.0.shift_remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(mismatch(key, "a string", &other)),
        }
    }

    fn optional_text(&mut self, key: &'static str) -> Result<Option<String>, Problem> {
        let text = self.string(key)?;
        if let Some(text) = &text {
            short_text(text).map_err(|reason| Problem::Value { key, reason })?;
        }
        Ok(text)
    }

    pub(crate) fn text(&mut self, key: &'static str) -> Result<String, Problem> {
        self.optional_text(key)?.ok_or(Problem::Missing(key))
    }

    pub(crate) fn parsed<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(String) -> Result<T, String>,
    ) -> Result<T, Problem> {
        let text = self.string(key)?.ok_or(Problem::Missing(key))?;
        parse(text).map_err(|reason| Problem::Value { key, reason })
    }

    fn digest(&mut self) -> Result<Digest, Problem> {
        self.parsed("pkg_sha256", |text| text.parse().map_err(|e: crate::digest::DigestError| e.to_string()))
    }

    pub(crate) fn number(&mut self, key: &'static str) -> Result<Option<u64>, Problem> {
        match self.0.shift_remove(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(number) => Ok(Some(number)),
                None if value.is_number() => {
                    Err(Problem::Value { key, reason: format!("{value} is no whole number from 0") })
                }
                None => Err(mismatch(key, "a whole number from 0", &value)),
            },
        }
    }

    fn optional_digest(&mut self, key: &'static str) -> Result<Option<Digest>, Problem> {
        let parse =
            |text: String| text.parse().map_err(|error: crate::digest::DigestError| error.to_string());
        let digest = self.string(key)?.map(parse).transpose();
        digest.map_err(|reason| Problem::Value { key, reason })
    }

    /// Has to be asked for before `size` is, which it needs.
    fn chunks(&mut self) -> Result<Option<Chunks>, Problem> {
        let total = self.0.get("size").and_then(Value::as_u64);
        let value = self.0.shift_remove(chunk::KEY);
        value.map(|value| Chunks::read(value, total)).transpose()
    }

    pub(crate) fn array(&mut self, key: &'static str, most: usize) -> Result<Option<Vec<Value>>, Problem> {
        match self.0.shift_remove(key) {
            None => Ok(None),
            Some(Value::Array(values)) if values.len() > most => {
                Err(Problem::Value { key, reason: format!("{} are more than {most}", values.len()) })
            }
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(mismatch(key, "an array", &other)),
        }
    }

    fn numbers(&mut self, key: &'static str, most: usize) -> Result<Vec<u64>, Problem> {
        let number = |value: Value| {
            let reason = format!("{value} is no whole number from 0");
            value.as_u64().ok_or(Problem::Value { key, reason })
        };
        self.array(key, most)?.unwrap_or_default().into_iter().map(number).collect()
    }

    pub(crate) fn time(&mut self, key: &'static str) -> Result<Option<Timestamp>, Problem> {
        let Some(text) = self.string(key)? else { return Ok(None) };
        let time = if is_utc_time(&text) { text.parse().ok() } else { None };
        time.map(Some).ok_or_else(|| {
            let found: String = text.chars().take(40).collect();
            let reason =
                format!("`{}` is no time in UTC such as `2026-11-20T10:00:00Z`", found.escape_debug());
            Problem::Value { key, reason }
        })
    }
}

/// The shape of RFC 3339 that every device can read: UTC, `T` and `Z`, a fraction if need be.
pub(crate) fn is_utc_time(text: &str) -> bool {
    let Some((time, zone)) = text.strip_suffix('Z').and_then(|time| time.split_at_checked(19)) else {
        return false;
    };
    let digit = |c: u8| c.is_ascii_digit();
    let time =
        time.bytes().zip(b"0000-00-00T00:00:00").all(|(c, p)| if *p == b'0' { digit(c) } else { c == *p });
    let fraction = zone
        .strip_prefix('.')
        .map(|fraction| (1..=9).contains(&fraction.len()) && fraction.bytes().all(digit));
    time && fraction.unwrap_or(zone.is_empty())
}

fn short_text(text: &str) -> Result<(), String> {
    if text.is_empty() || text.len() > limits::TEXT {
        return Err(format!("a text of {} bytes should have 1 to {}", text.len(), limits::TEXT));
    }
    match text.chars().find(|c| c.is_control()) {
        Some(character) => Err(format!("the control character {character:?} does not belong here")),
        None => Ok(()),
    }
}

/// The name rule of the core metadata specification (PEP 508).
fn package_name(name: &str) -> Result<String, String> {
    short_text(name)?;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    if name.chars().all(good) && edge(name.chars().next()) && edge(name.chars().next_back()) {
        Ok(name.to_owned())
    } else {
        Err(format!("`{name}` is no package name: use letters, digits, `.`, `_` and `-`"))
    }
}

/// The characters of a version (PEP 440). It becomes part of a folder's name, so `/` must not be among them.
fn package_version(version: &str) -> Result<String, String> {
    short_text(version)?;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+' | '!');
    if version.chars().all(good) {
        Ok(version.to_owned())
    } else {
        Err(format!("`{version}` is no version: use letters, digits, `.`, `_`, `-`, `+` and `!`"))
    }
}

fn name_and_tag(name: &str, tag: Option<&str>) -> String {
    match tag {
        Some(tag) => format!("{name} ({tag})"),
        None => name.to_owned(),
    }
}

pub(crate) fn mismatch(key: &'static str, expected: &'static str, found: &Value) -> Problem {
    Problem::Type { key, expected, found: type_name(found) }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ethernet_board_is_the_same_board_and_an_unknown_one_takes_all() {
        for (own, target, fit) in [
            (Some("esp32"), Some("esp32"), true),
            (Some("esp32-eth"), Some("esp32"), true),
            (Some("esp32"), Some("esp32-eth-olimex"), true),
            (Some("esp32-eth"), Some("esp32s3-eth"), false),
            (Some("esp32"), Some("esp32s3"), false),
            (Some(""), Some("esp32s3"), true),
            (None, Some("esp32s3"), true),
            (Some("esp32"), None, true),
        ] {
            let image = Firmware {
                name: "esp32".into(),
                version: "1".into(),
                target: target.map(str::to_owned),
                digest: Digest::EMPTY,
                size: None,
                chunks: None,
                extra: Map::new(),
            };
            assert_eq!(image.fits(own), fit, "{own:?} {target:?}");
        }
    }
}
