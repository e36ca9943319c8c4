//! The two records a device keeps, and how they are written so that a power cut cannot tear them.
//!
//! The format is shared with the MicroPython agent; the folder and its use are described in
//! [`store`](crate::store).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use mpypi_protocol::{ChannelName, Digest, FilePath};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    flash::{self, Flash},
    limits,
};

/// The folder in the device's root that belongs to the agent.
pub const FOLDER: &str = FilePath::RESERVED;

/// What is installed.
pub const INSTALLED: &str = ".mpypi/installed.json";

/// What is being changed; there is none at rest.
pub const JOURNAL: &str = ".mpypi/journal.json";

/// Verified files that are not in their place yet, named by digest.
pub const STAGING: &str = ".mpypi/staging";

/// Files that the release in the journal replaced or removed, named by the number of their operation.
pub const OLD: &str = ".mpypi/old";

/// Room for the records to come, taken before the commit: a flash that is full by then cannot keep a release
/// from being confirmed or rolled back.
pub const RESERVE: &str = ".mpypi/reserve";

/// The version of the format, in both records.
pub const FORMAT: u32 = 1;

/// `installed.json`: what this agent put on the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    /// [`FORMAT`]
    pub format: u32,
    /// The channel it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<ChannelName>,
    /// The release's sequence; absent in lists without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// The release's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The digest of the update list's payload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list: Option<Digest>,
    /// The newest list that was accepted, installed or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<Seen>,
    /// Wheels by name.
    #[serde(default)]
    pub wheels: BTreeMap<String, InstalledWheel>,
    /// Every file that came from the channel.
    #[serde(default)]
    pub files: BTreeMap<FilePath, Digest>,
    /// Every folder that was made for one of them.
    #[serde(default)]
    pub folders: BTreeSet<FilePath>,
}

/// A wheel on the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstalledWheel {
    /// Its version.
    pub version: String,
    /// The digest of the wheel.
    pub digest: Digest,
    /// Its files.
    pub files: Vec<FilePath>,
}

/// A list that was accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The channel it was for. The sequences of another channel mean nothing to this one.
    pub channel: ChannelName,
    /// Its sequence; nothing below it is accepted any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// Its version, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The digest of its payload.
    pub list: Digest,
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

/// `journal.json`: a release on its way from staging to its place, or back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// [`FORMAT`]
    pub format: u32,
    /// Where it stands.
    pub step: Step,
    /// How often the device has started in this step.
    pub boots: u32,
    /// Why it is rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The list of the release, as in `installed`.
    pub seen: Seen,
    /// Folders to be made, outermost first.
    pub folders: Vec<FilePath>,
    /// What to do, in this order.
    pub operations: Vec<Operation>,
    /// What `installed.json` will say.
    pub installed: Installed,
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
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Operation {
    /// Puts a staged file in its place.
    Put {
        /// Where it goes.
        path: FilePath,
        /// Its digest.
        digest: Digest,
        /// Which staged copy to take: 0 is `staging/<digest>`, others `staging/<digest>-<copy>`.
        copy: u32,
        /// Whether a file stands there, which goes to `old/<number>` first.
        had: bool,
    },
    /// Takes a file away, to `old/<number>`.
    Remove {
        /// Where it is.
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
    /// A later version of the agent wrote it.
    #[error("`{path}` has format {found}, this agent knows {FORMAT}")]
    Format {
        /// Which record.
        path: &'static str,
        /// Its format.
        found: u32,
    },
}

impl Default for Installed {
    fn default() -> Self {
        Installed {
            format: FORMAT,
            channel: None,
            sequence: None,
            version: None,
            list: None,
            seen: None,
            wheels: BTreeMap::new(),
            files: BTreeMap::new(),
            folders: BTreeSet::new(),
        }
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

/// Reads `installed.json`.
///
/// # Errors
/// See [`RecordError`].
pub fn read_installed(flash: &impl Flash) -> Result<Option<Installed>, RecordError> {
    read(flash, INSTALLED)
}

/// Reads `journal.json`.
///
/// # Errors
/// See [`RecordError`].
pub fn read_journal(flash: &impl Flash) -> Result<Option<Journal>, RecordError> {
    read(flash, JOURNAL)
}

/// Replaces the record at `path`: written beside it, synced, renamed, its folder synced. On a full flash
/// [`RESERVE`] makes room for it.
///
/// # Errors
/// Of the file system; the old record is then still there.
pub fn write(flash: &mut impl Flash, path: &str, record: &impl Serialize) -> io::Result<()> {
    match replace(flash, path, record) {
        Err(error) if is_full(&error) && flash.kind(RESERVE)?.is_some() => {
            flash.remove(RESERVE)?;
            replace(flash, path, record)
        }
        written => written,
    }
}

/// Writes `journal` for the first time, which is the commit. `installed` is what a rollback goes back to. There
/// is room for what either way still has to write, or nothing is committed.
///
/// # Errors
/// Of the file system.
pub fn commit(flash: &mut impl Flash, journal: &Journal, installed: &Installed) -> io::Result<()> {
    let largest = serde_json::to_vec(journal)?.len().max(serde_json::to_vec(installed)?.len());
    let filling = vec![b'-'; largest + limits::RECORD_GROWTH];
    let committed = write_file(flash, RESERVE, &filling).and_then(|()| replace(flash, JOURNAL, journal));
    if committed.is_err() {
        // It takes up room that may be what is missing.
        let _ = flash.remove(RESERVE);
    }
    committed
}

fn replace(flash: &mut impl Flash, path: &str, record: &impl Serialize) -> io::Result<()> {
    let bytes = serde_json::to_vec(record)?;
    let beside = format!("{path}.new");
    if let Err(error) = write_file(flash, &beside, &bytes) {
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

#[derive(Deserialize)]
struct Format {
    format: u32,
}

fn read<T: DeserializeOwned>(flash: &impl Flash, path: &'static str) -> Result<Option<T>, RecordError> {
    let bytes =
        flash::read_all(flash, path, limits::RECORD).map_err(|source| RecordError::Flash { path, source })?;
    let Some(bytes) = bytes else { return Ok(None) };
    let damaged = |source| RecordError::Damaged { path, source };
    let Format { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
    if format != FORMAT {
        return Err(RecordError::Format { path, found: format });
    }
    serde_json::from_slice(&bytes).map(Some).map_err(damaged)
}
