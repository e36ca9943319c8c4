//! Why a list or a release is not applied, and what follows from each reason.

use std::io;

use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Digest, PackageId, list::ListError, rollout::RolloutError, root::RootError, signed::Distrust,
};

use crate::{journal::RecordError, limits, wheel::WheelError};

/// Why a list or a release is not applied.
///
/// Its text starts with a stable word (see [`Refusal::word`]), `: `, then details for people. It is what a
/// node's state message says in `error`.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The payload is no update list.
    #[error("bad-list: {}", chain(.0))]
    BadList(#[source] ListError),
    /// The list was made for another channel.
    #[error("wrong-channel: this list is for channel `{found}`, this device follows `{expected}`")]
    WrongChannel {
        /// The channel the device follows.
        expected: ChannelName,
        /// The channel the list names.
        found: ChannelName,
    },
    /// The list is not of whom this device believes.
    #[error("{}", chain(.0))]
    Distrust(#[source] Distrust),
    /// A root does not follow from the one this device has.
    #[error("bad-root: {}", chain(.0))]
    BadRoot(#[source] RootError),
    /// The list is of an earlier epoch than one that was seen.
    #[error("rollback: epoch {found} is older than {seen}, which this device has seen")]
    OldEpoch {
        /// The highest epoch seen.
        seen: u64,
        /// The list's.
        found: u64,
    },
    /// The list is older than one that was seen.
    #[error("rollback: sequence {found} is older than {seen}, which this device has seen")]
    Older {
        /// The highest sequence seen.
        seen: u64,
        /// The list's.
        found: u64,
    },
    /// The list has a sequence that was seen with another content.
    #[error("rollback: sequence {sequence} was seen before with another content")]
    Reused {
        /// The sequence.
        sequence: u64,
    },
    /// The list has no sequence, and lists with one were seen.
    #[error("rollback: a list without a sequence follows sequence {seen}")]
    Unsequenced {
        /// The highest sequence seen.
        seen: u64,
    },
    /// The list says that it may no longer be believed.
    #[error("expired: sequence {sequence} expired at {expires}, it is {now}")]
    Expired {
        /// The list's sequence.
        sequence: u64,
        /// When it expired.
        expires: Timestamp,
        /// What the device's clock says.
        now: Timestamp,
    },
    /// The list says whose turn it is in a way that this agent cannot read: it holds.
    #[error("bad-rollout: {0}")]
    BadRollout(#[source] RolloutError),
    /// What should be the base of a rollout is another release.
    #[error("wrong-base: the release in the history as {wanted} is {found}")]
    WrongBase {
        /// The sequence that the rollout names.
        wanted: u64,
        /// What the list found there says.
        found: String,
    },
    /// No wheel of a package runs on this device.
    #[error("no-fit: wheel `{name}` is for `{}`; this device is `{device}`", tags.join("`, `"))]
    NoFit {
        /// The package's name.
        name: String,
        /// The tags there are.
        tags: Vec<String>,
        /// What would fit best, as a tag.
        device: String,
    },
    /// Two files of the release, or one and a folder on the device, want the same place.
    #[error("conflict: {0}")]
    Conflict(String),
    /// The broker did not send a package.
    #[error("missing-package: the broker has no `{topic}`")]
    MissingPackage {
        /// The package's topic.
        topic: String,
    },
    /// The connection broke again and again while packages were awaited.
    #[error("connection: lost {times} times in a row while fetching")]
    ConnectionLost {
        /// How often.
        times: u32,
    },
    /// The broker does not let the device subscribe.
    #[error("not-allowed: the broker refused the subscription to `{filter}`")]
    NotAllowed {
        /// The filter.
        filter: String,
    },
    /// A package does not have the announced size.
    #[error("wrong-size: package `{}` has {found} bytes, {announced} were announced", short(package))]
    WrongSize {
        /// The package.
        package: PackageId,
        /// The size the list says.
        announced: u64,
        /// Bytes received, up to the first that was too many.
        found: u64,
    },
    /// A package is larger than this device takes.
    #[error(
        "too-large: package `{}` is larger than {} bytes",
        short(package),
        mpypi_protocol::limits::PACKAGE
    )]
    TooLarge {
        /// The package.
        package: PackageId,
    },
    /// A package does not have the digest it is named by.
    #[error("wrong-hash: package `{}` has digest {}", short(package), found.short())]
    WrongHash {
        /// The package.
        package: PackageId,
        /// The digest of what was received.
        found: Digest,
    },
    /// A chunk of a package is not what the list says.
    #[error("wrong-hash: chunk {number} of package `{}` has digest {}", short(package), found.short())]
    WrongChunk {
        /// The package.
        package: PackageId,
        /// Which chunk.
        number: u32,
        /// The digest of what was received.
        found: Digest,
    },
    /// The chunks of a package are what the list says, and the package is not: the list contradicts itself.
    #[error("wrong-hash: the chunks of package `{}` make one with digest {}", short(package), found.short())]
    WrongWhole {
        /// The package.
        package: PackageId,
        /// The digest of what its chunks make.
        found: Digest,
    },
    /// A path in a wheel leads out of the device's root.
    #[error("escapes-root: wheel `{name}`: {problem}")]
    EscapesRoot {
        /// The wheel's name.
        name: String,
        /// The path and what is wrong with it.
        problem: String,
    },
    /// A wheel is damaged, or does not hold what it says.
    #[error("bad-wheel: wheel `{name}`: {}", chain(problem))]
    BadWheel {
        /// The wheel's name.
        name: String,
        /// What is wrong with it.
        #[source]
        problem: WheelError,
    },
    /// The release does not fit.
    #[error("no-space: {needed} bytes are needed, {free} are free")]
    NoSpace {
        /// What is needed, in bytes.
        needed: u64,
        /// What is free, in bytes.
        free: u64,
    },
    /// The flash became full while it was written to.
    #[error("no-space: the flash is full")]
    Full,
    /// The flash failed.
    #[error("storage: {0}")]
    Storage(#[source] io::Error),
    /// A record of the store cannot be read or written.
    #[error("storage: {}", chain(.0))]
    Record(#[source] RecordError),
    /// The release did not confirm that it works.
    #[error("not-confirmed: the release was started {boots} times and never confirmed")]
    NotConfirmed {
        /// How often it was started.
        boots: u32,
    },
    /// The committed release could not be put in place.
    #[error("not-installed: {boots} starts did not complete the installation")]
    NotInstalled {
        /// How often it was tried.
        boots: u32,
    },
    /// An operator sent `rollback`.
    #[error("told-to: an operator rolled this release back")]
    ToldTo,
    /// The release before is revoked.
    #[error("revoked: the release before this one is bad, and nothing is gone back to")]
    NoWayBack,
    /// The agent contradicts itself.
    #[error("bug: {0}")]
    Bug(&'static str),
}

/// What follows from a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It may work later: try again a few times, then at the next list or connection.
    Retry,
    /// It was damaged on its way: fetch it again, [`limits::FETCHES`] times in all, then at the next list or
    /// connection.
    Refetch,
    /// It will not change: remember, and do not try this list again until told to.
    Reject,
    /// The agent is wrong: stop, report, change nothing.
    Bug,
}

impl Refusal {
    /// What follows.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self {
            Refusal::MissingPackage { .. }
            | Refusal::ConnectionLost { .. }
            | Refusal::NotAllowed { .. }
            | Refusal::NoSpace { .. }
            | Refusal::Full
            | Refusal::Storage(_)
            | Refusal::Record(_) => Verdict::Retry,
            Refusal::WrongSize { .. } | Refusal::WrongHash { .. } | Refusal::WrongChunk { .. } => {
                Verdict::Refetch
            }
            Refusal::BadList(_)
            | Refusal::WrongChannel { .. }
            | Refusal::Distrust(_)
            | Refusal::BadRoot(_)
            | Refusal::OldEpoch { .. }
            | Refusal::Older { .. }
            | Refusal::Reused { .. }
            | Refusal::Unsequenced { .. }
            | Refusal::Expired { .. }
            | Refusal::BadRollout(_)
            | Refusal::WrongBase { .. }
            | Refusal::NoFit { .. }
            | Refusal::Conflict(_)
            | Refusal::TooLarge { .. }
            | Refusal::WrongWhole { .. }
            | Refusal::EscapesRoot { .. }
            | Refusal::BadWheel { .. }
            | Refusal::NotConfirmed { .. }
            | Refusal::NotInstalled { .. }
            | Refusal::ToldTo
            | Refusal::NoWayBack => Verdict::Reject,
            Refusal::Bug(_) => Verdict::Bug,
        }
    }

    /// The first word of the text, which programs may compare.
    #[must_use]
    pub fn word(&self) -> String {
        self.text().split(':').next().unwrap_or_default().to_owned()
    }

    /// The text, short enough for a state message.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = self.to_string();
        let end = (0..=limits::ERROR_TEXT.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
        text
    }

    /// The refusal that an error of the flash amounts to.
    pub(crate) fn from_flash(error: io::Error, needed: u64, free: u64) -> Refusal {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Refusal::NoSpace { needed, free },
            _ => Refusal::Storage(error),
        }
    }
}

impl From<Distrust> for Refusal {
    fn from(distrust: Distrust) -> Self {
        match distrust {
            Distrust::List(error) => Refusal::BadList(error),
            Distrust::WrongChannel { expected, found } => Refusal::WrongChannel { expected, found },
            other => Refusal::Distrust(other),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Refusal::Full,
            _ => Refusal::Storage(error),
        }
    }
}

impl From<RecordError> for Refusal {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Flash { source, .. } => source.into(),
            error => Refusal::Record(error),
        }
    }
}

/// A package for people: its digest is as long as a state message can spare.
fn short(package: &PackageId) -> String {
    let digest = package.digest();
    package.to_string().replace(&digest.to_string(), &digest.short())
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text += &format!(": {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_starts_with_its_word_and_is_bounded() {
        let long = Refusal::Conflict("é".repeat(1000));
        assert_eq!(long.word(), "conflict");
        assert!(long.text().len() <= limits::ERROR_TEXT);
        let list = Refusal::BadList(mpypi_protocol::UpdateList::parse(b"[").unwrap_err());
        assert!(list.text().starts_with("bad-list: not JSON: "), "{list}");
    }
}
