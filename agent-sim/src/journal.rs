//! The records a device keeps, and how they are written so that a power cut cannot tear them.
//!
//! Those that are changed after a commit are small. Those that grow with a release are JSON Lines, which a device
//! of a few KiB reads and writes line by line: a header, then one object to a line, whose first key says what it
//! is about. Unknown keys are ignored.
//!
//! The format is shared with the MicroPython agent; the folder and its use are described in
//! [`store`](crate::store).

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    io,
};

use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Digest, FilePath, Root, limits as wire, list::Wheel, rollout::RolloutId, root::SignedRoot,
};
use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};

use crate::{
    accept::LOCAL,
    flash::{self, Flash},
    limits,
};

/// The folder in the device's root that belongs to the agent.
pub const FOLDER: &str = FilePath::RESERVED;

/// What is installed.
pub const INSTALLED: &str = ".mpypi/installed.jsonl";

/// The newest list that was accepted.
pub const SEEN: &str = ".mpypi/seen.json";

/// What is being changed; there is none at rest.
pub const JOURNAL: &str = ".mpypi/journal.json";

/// The operations of the journal.
pub const PLAN: &str = ".mpypi/plan.jsonl";

/// What [`INSTALLED`] will say when the journal is done.
pub const NEXT: &str = ".mpypi/next.jsonl";

/// The newest root that was verified, to the letter as it came.
pub const ROOT: &str = ".mpypi/root.json";

/// A list as it arrives, on a device that has no memory for it.
pub const LIST_PART: &str = ".mpypi/list.part";

/// Verified files that are not in their place yet, named by digest.
pub const STAGING: &str = ".mpypi/staging";

/// Files that the release in the journal replaced or removed, named by the number of their operation.
pub const OLD: &str = ".mpypi/old";

/// Room for the records to come, taken before the commit: a flash that is full by then cannot keep a release
/// from being confirmed or rolled back.
pub const RESERVE: &str = ".mpypi/reserve";

/// The MicroPython agent. It stays where a release does not bring it: without it no other release would come.
pub const AGENT: &str = "lib/mpypi/";

/// The version of the format, in every record.
pub const FORMAT: u32 = 1;

/// `installed.jsonl`: what this agent put on the device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Installed {
    /// The channel it came from.
    pub channel: Option<ChannelName>,
    /// The release's sequence; absent in lists without one.
    pub sequence: Option<u64>,
    /// The release's version.
    pub version: Option<String>,
    /// The digest of the update list's payload.
    pub list: Option<Digest>,
    /// The rollout that the list was a step of.
    pub rollout: Option<RolloutId>,
    /// Wheels by name.
    pub wheels: BTreeMap<String, InstalledWheel>,
    /// Every file that came from the channel.
    pub files: BTreeMap<FilePath, Digest>,
    /// Those that came as they are. A file may come so and from wheels as well.
    pub sources: BTreeSet<FilePath>,
    /// Every folder that was made for one of them.
    pub folders: BTreeSet<Folder>,
}

/// A wheel on the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledWheel {
    /// Its version.
    pub version: String,
    /// The digest of the wheel.
    pub digest: Digest,
    /// Its files.
    pub files: BTreeSet<FilePath>,
    /// Whether it came from a file of this machine: then it stays although no list names it.
    pub local: bool,
}

/// A folder. Folders are sorted as if a `/` ended their names: each right before what is in it, as the files are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Folder(pub FilePath);

/// A list that was accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The channel it was for. The sequences of another channel mean nothing to this one.
    pub channel: ChannelName,
    /// Its epoch; nothing of an earlier one is accepted any more.
    #[serde(default, skip_serializing_if = "is_first")]
    pub epoch: u64,
    /// Its sequence; nothing of its epoch below it is accepted any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// Its version, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// When it was made: it is at least so late.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "time")]
    pub created: Option<Timestamp>,
    /// The digest of its payload.
    pub list: Digest,
    /// The rollout it is a step of. All steps have the same packages: what was refused of one is refused of the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutId>,
    /// Why it was rejected or rolled back, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
}

/// Why a list is not tried again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The reason, as in a state message.
    pub error: String,
    /// Whether the release had been installed and was taken back.
    #[serde(default)]
    pub rolled_back: bool,
}

/// `journal.json`: where a release stands on its way from staging to its place, or back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// Where it stands.
    pub step: Step,
    /// How often the device has started in this step.
    pub boots: u32,
    /// Whether the release that it replaces is revoked: then nothing is taken back that is in place.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
    /// Why it is rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The list of the release.
    pub seen: Seen,
}

/// `plan.jsonl`: what the journal is about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Folders to be made, outermost first.
    pub folders: BTreeSet<Folder>,
    /// What to do, in this order. Each is of another path.
    pub operations: Vec<Operation>,
}

/// Where a journal stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Committed: the operations are to be done, and done again after a power cut.
    Install,
    /// All done; the new release has to prove itself. The old files are kept.
    Confirm,
    /// It did: what is left is to write `installed.json` and clean up.
    Finish,
    /// It did not: the operations are to be undone.
    Rollback,
}

/// One change of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Operation {
    /// Puts a staged file in its place.
    Put {
        /// Where it goes.
        #[serde(rename = "put")]
        path: FilePath,
        /// Its digest.
        digest: Digest,
        /// Which staged copy to take: 0 is `staging/<digest>`, others `staging/<digest>-<copy>`.
        copy: u32,
        /// Whether a file stands there, which is kept as `old/<number>`.
        had: bool,
    },
    /// Takes a file away, to `old/<number>`.
    Remove {
        /// Where it is.
        #[serde(rename = "remove")]
        path: FilePath,
    },
}

/// A record cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The flash failed.
    #[error("cannot read `{path}`")]
    Flash {
        /// Which record.
        path: &'static str,
        /// What happened.
        source: io::Error,
    },
    /// It is not what this agent writes. Records are never torn by a power cut: something else wrote it.
    #[error("`{path}` is damaged")]
    Damaged {
        /// Which record.
        path: &'static str,
        /// Where.
        source: serde_json::Error,
    },
    /// It ends in the middle of a line, or is not there beside a journal that needs it.
    #[error("`{path}` is damaged: it is not complete")]
    Incomplete {
        /// Which record.
        path: &'static str,
    },
    /// A later version of the agent wrote it.
    #[error("`{path}` has format {found}, this agent knows {FORMAT}")]
    Format {
        /// Which record.
        path: &'static str,
        /// Its format.
        found: u32,
    },
}

impl InstalledWheel {
    /// The entry that would bring it.
    #[must_use]
    pub fn entry(&self, name: &str) -> Wheel {
        let local = self.local.then(|| (LOCAL.to_owned(), true.into()));
        Wheel {
            name: name.to_owned(),
            version: self.version.clone(),
            digest: self.digest,
            size: None,
            chunks: None,
            tag: None,
            extra: local.into_iter().collect(),
        }
    }
}

impl PartialOrd for Folder {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Folder {
    fn cmp(&self, other: &Self) -> Ordering {
        let bytes = |folder: &Folder| folder.0.as_str().bytes().chain([b'/']).collect::<Vec<_>>();
        bytes(self).cmp(&bytes(other))
    }
}

impl Operation {
    /// The file it changes.
    #[must_use]
    pub fn path(&self) -> &FilePath {
        match self {
            Operation::Put { path, .. } | Operation::Remove { path } => path,
        }
    }
}

fn is_first(epoch: &u64) -> bool {
    *epoch == 0
}

/// Times in records are as in lists.
mod time {
    use jiff::Timestamp;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(time: &Option<Timestamp>, to: S) -> Result<S::Ok, S::Error> {
        time.map(|time| time.to_string()).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Timestamp>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse()).transpose().map_err(D::Error::custom)
    }
}

/// Where a staged file is.
#[must_use]
pub fn staged(digest: &Digest, copy: u32) -> String {
    match copy {
        0 => format!("{STAGING}/{digest}"),
        copy => format!("{STAGING}/{digest}-{copy}"),
    }
}

/// Where the file that operation `number` replaced or removed is kept.
#[must_use]
pub fn old(number: usize) -> String {
    format!("{OLD}/{number}")
}

/// Reads `installed.jsonl`, or `next.jsonl`.
///
/// # Errors
/// See [`RecordError`].
pub fn read_installed(flash: &impl Flash, path: &'static str) -> Result<Option<Installed>, RecordError> {
    let Some((head, lines)) = read::<InstalledHead, InstalledLine>(flash, path)? else { return Ok(None) };
    let InstalledHead { channel, sequence, version, list, rollout } = head;
    let mut installed = Installed { channel, sequence, version, list, rollout, ..Installed::default() };
    for line in lines {
        match line {
            InstalledLine::Wheel { wheel, version, digest, local } => {
                let files = BTreeSet::new();
                installed.wheels.insert(wheel, InstalledWheel { version, digest, files, local });
            }
            InstalledLine::File { file, digest, wheel } => {
                match wheel {
                    None => _ = installed.sources.insert(file.clone()),
                    Some(name) => {
                        let wheel =
                            installed.wheels.get_mut(&name).ok_or(RecordError::Incomplete { path })?;
                        wheel.files.insert(file.clone());
                    }
                }
                installed.files.insert(file, digest);
            }
            InstalledLine::Folder { folder } => _ = installed.folders.insert(folder),
        }
    }
    Ok(Some(installed))
}

/// Writes `installed.jsonl`, or `next.jsonl`, and syncs it.
///
/// # Errors
/// Of the file system.
pub fn write_installed(flash: &mut impl Flash, path: &str, installed: &Installed) -> io::Result<()> {
    let Installed { channel, sequence, version, list, rollout, wheels, files, sources, folders } =
        installed.clone();
    let mut lines: Vec<InstalledLine> = Vec::new();
    for (name, wheel) in &wheels {
        let (version, digest, local) = (wheel.version.clone(), wheel.digest, wheel.local);
        lines.push(InstalledLine::Wheel { wheel: name.clone(), version, digest, local });
    }
    for (file, digest) in files {
        if sources.contains(&file) {
            lines.push(InstalledLine::File { file: file.clone(), digest, wheel: None });
        }
        let from = wheels.iter().filter(|(_, wheel)| wheel.files.contains(&file));
        lines.extend(from.map(|(name, _)| InstalledLine::File {
            file: file.clone(),
            digest,
            wheel: Some(name.clone()),
        }));
    }
    lines.extend(folders.into_iter().map(|folder| InstalledLine::Folder { folder }));
    write_file(flash, path, &text(&InstalledHead { channel, sequence, version, list, rollout }, &lines)?)
}

/// Reads `seen.json`.
///
/// # Errors
/// See [`RecordError`].
pub fn read_seen(flash: &impl Flash) -> Result<Option<Seen>, RecordError> {
    Ok(read::<Seen, IgnoredAny>(flash, SEEN)?.map(|(seen, _)| seen))
}

/// Reads `journal.json`.
///
/// # Errors
/// See [`RecordError`].
pub fn read_journal(flash: &impl Flash) -> Result<Option<Journal>, RecordError> {
    Ok(read::<Journal, IgnoredAny>(flash, JOURNAL)?.map(|(journal, _)| journal))
}

/// Reads `plan.jsonl`.
///
/// # Errors
/// See [`RecordError`].
pub fn read_plan(flash: &impl Flash) -> Result<Plan, RecordError> {
    let read = read::<IgnoredAny, PlanLine>(flash, PLAN)?;
    let (_, lines) = read.ok_or(RecordError::Incomplete { path: PLAN })?;
    let mut plan = Plan::default();
    for line in lines {
        match line {
            PlanLine::Folder { folder } => _ = plan.folders.insert(folder),
            PlanLine::Operation(operation) => plan.operations.push(operation),
        }
    }
    Ok(plan)
}

/// Writes `plan.jsonl`, and syncs it.
///
/// # Errors
/// Of the file system.
pub fn write_plan(flash: &mut impl Flash, plan: &Plan) -> io::Result<()> {
    let folders = plan.folders.iter().cloned().map(|folder| PlanLine::Folder { folder });
    let lines: Vec<_> = folders.chain(plan.operations.iter().cloned().map(PlanLine::Operation)).collect();
    write_file(flash, PLAN, &text(&PlanHead {}, &lines)?)
}

/// Replaces `journal.json` or `seen.json`: written beside it, synced, renamed, its folder synced. On a full flash
/// [`RESERVE`] makes room for it.
///
/// # Errors
/// Of the file system; the old record is then still there.
pub fn replace(flash: &mut impl Flash, path: &str, record: &impl Serialize) -> io::Result<()> {
    let bytes = text(record, &[] as &[PlanLine])?;
    match write_beside(flash, path, &bytes) {
        Err(error) if is_full(&error) && flash.kind(RESERVE)?.is_some() => {
            flash.remove(RESERVE)?;
            write_beside(flash, path, &bytes)
        }
        written => written,
    }
}

/// Reads a small record, as of a face of the device.
///
/// # Errors
/// See [`RecordError`].
pub fn read_record<T: DeserializeOwned>(
    flash: &impl Flash,
    path: &'static str,
) -> Result<Option<T>, RecordError> {
    Ok(read::<T, IgnoredAny>(flash, path)?.map(|(record, _)| record))
}

/// Replaces a small record, as of a face of the device: written beside it, synced, renamed, its folder synced. The room
/// that [`reserve`] took is not for it.
///
/// # Errors
/// Of the file system; the old record is then still there.
pub fn write_record(flash: &mut impl Flash, path: &str, record: &impl Serialize) -> io::Result<()> {
    write_beside(flash, path, &text(record, &[] as &[PlanLine])?)
}

/// Reads the channel's list that is kept at `path`.
///
/// # Errors
/// Of the file system.
pub fn read_list(flash: &impl Flash, path: &str) -> io::Result<Option<Vec<u8>>> {
    match flash::read_all(flash, path, wire::LIST as u64) {
        // It is none of ours.
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Ok(None),
        read => read,
    }
}

/// Keeps a channel's list at `path`, instead of what is there.
///
/// # Errors
/// Of the file system; the old one is then still there.
pub fn write_list(flash: &mut impl Flash, path: &str, payload: &[u8]) -> io::Result<()> {
    write_beside(flash, path, payload)
}

/// Reads `root.json`. One that cannot be read is none: the walk begins again at the root that is pinned.
///
/// # Errors
/// Of the file system.
pub fn read_root(flash: &impl Flash) -> io::Result<Option<SignedRoot>> {
    match flash::read_all(flash, ROOT, wire::ROOT as u64) {
        Ok(bytes) => Ok(bytes.and_then(|bytes| SignedRoot::parse(&bytes).ok())),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces `root.json`, as [`replace`] does with records.
///
/// # Errors
/// Of the file system; the old one is then still there.
pub fn replace_root(flash: &mut impl Flash, root: &Root) -> io::Result<()> {
    write_beside(flash, ROOT, root.payload())
}

/// Takes the room for the records to come.
///
/// # Errors
/// Of the file system.
pub fn reserve(flash: &mut impl Flash) -> io::Result<()> {
    write_file(flash, RESERVE, &[b'-'; limits::RESERVE])
}

#[derive(Serialize, Deserialize)]
struct InstalledHead {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    channel: Option<ChannelName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sequence: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    list: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rollout: Option<RolloutId>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum InstalledLine {
    File {
        file: FilePath,
        digest: Digest,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wheel: Option<String>,
    },
    Wheel {
        wheel: String,
        version: String,
        digest: Digest,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        local: bool,
    },
    Folder {
        folder: Folder,
    },
}

#[derive(Serialize)]
struct PlanHead {}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PlanLine {
    Folder { folder: Folder },
    Operation(Operation),
}

/// The first line of every record: its format, and what else it says.
#[derive(Serialize, Deserialize)]
struct Head<T> {
    format: u32,
    #[serde(flatten)]
    rest: T,
}

#[derive(Deserialize)]
struct Format {
    format: u32,
}

fn text(head: &impl Serialize, lines: &[impl Serialize]) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(&Head { format: FORMAT, rest: head })?;
    bytes.push(b'\n');
    for line in lines {
        bytes.extend(serde_json::to_vec(line)?);
        bytes.push(b'\n');
    }
    Ok(bytes)
}

fn write_beside(flash: &mut impl Flash, path: &str, bytes: &[u8]) -> io::Result<()> {
    let beside = format!("{path}.new");
    if let Err(error) = write_file(flash, &beside, bytes) {
        let _ = flash.remove(&beside);
        return Err(error);
    }
    flash.rename(&beside, path)?;
    flash.sync(FOLDER)
}

fn write_file(flash: &mut impl Flash, path: &str, bytes: &[u8]) -> io::Result<()> {
    flash.create(path)?;
    for piece in bytes.chunks(limits::PIECE) {
        flash.append(path, piece)?;
    }
    flash.sync(path)
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn read<H: DeserializeOwned, L: DeserializeOwned>(
    flash: &impl Flash,
    path: &'static str,
) -> Result<Option<(H, Vec<L>)>, RecordError> {
    let bytes =
        flash::read_all(flash, path, limits::RECORD).map_err(|source| RecordError::Flash { path, source })?;
    let Some(bytes) = bytes else { return Ok(None) };
    let damaged = |source| RecordError::Damaged { path, source };
    let bytes = bytes.strip_suffix(b"\n").ok_or(RecordError::Incomplete { path })?;
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let head = lines.next().unwrap_or_default();
    let Format { format } = serde_json::from_slice(head).map_err(damaged)?;
    if format != FORMAT {
        return Err(RecordError::Format { path, found: format });
    }
    let head: Head<H> = serde_json::from_slice(head).map_err(damaged)?;
    let lines: Result<Vec<L>, _> = lines.map(serde_json::from_slice).collect();
    Ok(Some((head.rest, lines.map_err(damaged)?)))
}
