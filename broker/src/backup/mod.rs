//! A backup: a folder that holds every retained message, and who may log in.
//!
//! `messages.jsonl` has a line for each message, small payloads included, between a first line that says what
//! it is and a last one with its digest; `blobs/` has the large payloads, named by theirs. Blobs come first and
//! the list of messages last, written beside and renamed: a folder always holds one whole backup, the new or
//! the one before. Blobs that a backup before has are not copied again, but every one is read and checked.
//!
//! Sessions are left out: put back later, they would send their clients what those have long had.

mod manifest;
mod restore;
mod save;

use std::{io, path::PathBuf};

use serde::Serialize;

pub use self::{
    manifest::{Contents, MESSAGES, read},
    restore::{Planned, Restored, Verdict, plan, put_back},
    save::{Saved, save},
};
use crate::control::LinkError;

/// Files of the data folder that a backup holds too. Keys and certificates are not among them.
pub const FILES: [&str; 4] = ["users.toml", "rules.toml", "devices.toml", "broker.toml"];

/// A backup cannot be made, read or put back.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file cannot be read or written.
    #[error("cannot use `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The folder holds something else.
    #[error("`{}` is neither empty nor a backup", .0.display())]
    Foreign(PathBuf),
    /// Another backup into the same folder is under way.
    #[error("another backup into `{}` is under way", .0.display())]
    Busy(PathBuf),
    /// There is no backup.
    #[error("there is no backup in `{}`", .0.display())]
    Nothing(PathBuf),
    /// The backup is damaged.
    #[error("the backup in `{}` is damaged: {problem}", path.display())]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The index cannot be asked.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// How far it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Messages seen.
    pub messages: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

fn at(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.into();
    move |source| BackupError::File { path, source }
}
