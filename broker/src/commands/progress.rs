//! What the commands that work on the index share.

use std::{io, time::Duration};

use indicatif::{BinaryBytes, ProgressBar};
use mpypi_broker::{
    backup::{BackupError, Progress},
    control::LinkError,
    index::IndexError,
};

/// How far a command is, on a terminal; nothing elsewhere.
pub(crate) struct Shown {
    bar: ProgressBar,
    what: &'static str,
}

impl Shown {
    pub(crate) fn new(what: &'static str) -> Shown {
        let bar = ProgressBar::new_spinner().with_message(what);
        bar.enable_steady_tick(Duration::from_millis(200));
        Shown { bar, what }
    }

    pub(crate) fn at(&self, progress: Progress) {
        let Progress { messages, bytes } = progress;
        self.bar.set_message(format!("{}: {messages} messages, {}", self.what, BinaryBytes(bytes)));
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Bytes, for people.
pub(crate) fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// `1 message`, `2 messages`.
pub(crate) fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// What to do about an error, if we know.
pub(crate) fn hint(error: &anyhow::Error) -> Option<String> {
    let link = match error.downcast_ref::<BackupError>() {
        Some(BackupError::Link(link)) => Some(link),
        Some(BackupError::Foreign(_)) => return Some("name an empty or a new folder".to_owned()),
        Some(BackupError::Busy(_)) => return Some("wait for it, or use another folder".to_owned()),
        Some(_) => return None,
        None => error.downcast_ref::<LinkError>(),
    };
    let hint = match link? {
        LinkError::Nothing(_) => "say where it is with `--data`",
        LinkError::Socket { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            "run this as the broker's user, or as root"
        }
        LinkError::Owner { user, .. } => {
            return Some(format!("run this as that user: `sudo -u '#{user}' …`"));
        }
        LinkError::Index(IndexError::InUse { .. }) => {
            "a broker that just starts or stops cannot be asked: try again, or see its log"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}
