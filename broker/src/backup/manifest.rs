//! The list of messages, as it is written and read.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    path::Path,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use mpypi_protocol::{Digest, digest::Hasher};
use serde::{Deserialize, Serialize};

use super::{BackupError, FILES, Progress, at};
use crate::index::{check::hash, snapshot::Kept};

/// The list of messages, in a backup's folder.
pub const MESSAGES: &str = "messages.jsonl";
/// The folder of blobs, in a backup's folder.
pub(super) const BLOBS: &str = "blobs";
/// How the list is written. Changes with [`Line`].
const FORMAT: u64 = 1;
/// Longest line, in bytes: a payload of [`crate::index::INLINE`] bytes in base64, a topic and properties.
const LINE: u64 = 1024 * 1024;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Line {
    /// The first line.
    Backup { format: u64, created_ms: u64, broker: String },
    /// A file of the data folder.
    File { name: String, text: String },
    /// A message.
    Message(Kept),
    /// The last line: how many messages there are, and the digest of every byte before it.
    End { messages: u64, sha256: Digest },
}

/// Writes lines, and knows the digest of all.
pub(super) struct Lines<W> {
    to: W,
    hasher: Hasher,
    messages: u64,
}

impl<W: Write> Lines<W> {
    pub(super) fn begin(to: W, created_ms: u64) -> io::Result<Lines<W>> {
        let mut lines = Lines { to, hasher: Hasher::default(), messages: 0 };
        let broker = env!("CARGO_PKG_VERSION").to_owned();
        lines.write(&Line::Backup { format: FORMAT, created_ms, broker })?;
        Ok(lines)
    }

    pub(super) fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.hasher.update(&text);
        self.messages += u64::from(matches!(line, Line::Message(_)));
        self.to.write_all(&text)
    }

    pub(super) fn end(mut self) -> io::Result<W> {
        let sha256 = std::mem::take(&mut self.hasher).finish();
        self.write(&Line::End { messages: self.messages, sha256 })?;
        Ok(self.to)
    }
}

/// What a whole backup holds.
#[derive(Debug)]
pub struct Contents {
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Files of the data folder: name and text.
    pub files: Vec<(String, String)>,
    /// The messages, without their payloads.
    pub messages: Vec<Kept>,
}

/// Reads a backup and checks every byte of it.
///
/// # Errors
/// It is not there, or not whole.
pub fn read(folder: &Path, mut progress: impl FnMut(Progress)) -> Result<Contents, BackupError> {
    let mut contents = Contents { created_ms: 0, files: Vec::new(), messages: Vec::new() };
    let mut done = Progress::default();
    each(folder, |line| {
        match line {
            Line::Backup { created_ms, .. } => contents.created_ms = created_ms,
            Line::File { name, text } if FILES.contains(&&*name) => contents.files.push((name, text)),
            Line::File { name, .. } => return Err(format!("it holds a file `{}`", name.escape_debug())),
            Line::Message(mut kept) => {
                check(folder, &kept).map_err(|problem| format!("`{}`: {problem}", kept.topic))?;
                done.messages += 1;
                done.bytes += kept.size;
                progress(done);
                kept.payload = None;
                contents.messages.push(kept);
            }
            Line::End { .. } => {}
        }
        Ok(())
    })?;
    Ok(contents)
}

/// Hands each line to `take`, and checks what the first and the last one say.
pub(super) fn each(
    folder: &Path,
    mut take: impl FnMut(Line) -> Result<(), String>,
) -> Result<(), BackupError> {
    let path = folder.join(MESSAGES);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(BackupError::Nothing(folder.to_owned()));
        }
        file => file.map_err(at(&path))?,
    };
    let damaged = |problem: String| BackupError::Damaged { path: folder.to_owned(), problem };
    let mut file = BufReader::new(file);
    let mut hasher = Hasher::default();
    let (mut number, mut messages) = (0, 0);
    let mut text = Vec::new();
    loop {
        text.clear();
        let count = file.by_ref().take(LINE).read_until(b'\n', &mut text).map_err(at(&path))?;
        if count == 0 {
            return Err(damaged("its list of messages has no end".to_owned()));
        }
        if text.last() != Some(&b'\n') {
            return Err(damaged("its list of messages was cut off, or has a line too long".to_owned()));
        }
        number += 1;
        let line = serde_json::from_slice(&text)
            .map_err(|error| damaged(format!("line {number} of `{MESSAGES}`: {error}")))?;
        match &line {
            Line::Backup { format: FORMAT, .. } if number == 1 => {}
            Line::Backup { format, .. } if number == 1 => {
                return Err(damaged(format!("it has format {format}, this program reads {FORMAT}")));
            }
            _ if number == 1 => return Err(damaged("its list of messages has no beginning".to_owned())),
            Line::Backup { .. } => return Err(damaged("its list of messages begins twice".to_owned())),
            Line::Message(_) => messages += 1,
            Line::File { .. } => {}
            Line::End { messages: said, sha256 } => {
                if *said != messages || *sha256 != std::mem::take(&mut hasher).finish() {
                    return Err(damaged("its list of messages was changed".to_owned()));
                }
                return take(line).map_err(damaged);
            }
        }
        hasher.update(&text);
        take(line).map_err(damaged)?;
    }
}

/// Whether the payload of a message is there, byte for byte.
fn check(folder: &Path, kept: &Kept) -> Result<(), String> {
    let mut payload = open(folder, kept)?;
    let found = hash(&mut payload).map_err(|error| format!("its payload cannot be read: {error}"))?;
    match found == kept.sha256 {
        true => Ok(()),
        false => Err(format!("its payload has other bytes than {}", kept.sha256)),
    }
}

/// The payload of a message.
pub(super) fn open(folder: &Path, kept: &Kept) -> Result<Box<dyn Read>, String> {
    if kept.blob {
        let path = folder.join(BLOBS).join(kept.sha256.to_string());
        let file = File::open(&path).map_err(|error| format!("its blob `{}`: {error}", path.display()))?;
        let size = file.metadata().map_err(|error| error.to_string())?.len();
        return match size == kept.size {
            true => Ok(Box::new(file)),
            false => Err(format!("its blob `{}` has {size} bytes, not {}", path.display(), kept.size)),
        };
    }
    let payload = kept.payload.as_deref().ok_or("its payload is not there")?;
    let bytes = BASE64_STANDARD.decode(payload).map_err(|error| format!("its payload: {error}"))?;
    match bytes.len() as u64 == kept.size {
        true => Ok(Box::new(io::Cursor::new(bytes))),
        false => Err(format!("its payload has {} bytes, not {}", bytes.len(), kept.size)),
    }
}
