//! Package ids: what immutable bytes are called, and the topic they are retained under.

use std::fmt;

use crate::{Digest, FilePath};

/// Where every package topic starts.
pub const PACKAGES: &str = "mpypi/packages/";

/// The id of a package in the current layout. Its [`Display`](fmt::Display) is the part of the topic after
/// `mpypi/packages/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PackageId {
    /// `wheel/<sha256>`
    Wheel(Digest),
    /// `src/<path>/<sha256>`; the path holds no MQTT wildcard.
    Src(FilePath, Digest),
    /// `firmware/<sha256>`
    Firmware(Digest),
}

/// The ids of Mpy-BLOX's earlier generations. A broker of ours answers them from the index; nothing of ours
/// asks for them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LegacyId {
    /// `<sha256>`: a wheel.
    Digest(Digest),
    /// `src/<path>`: a src file.
    Src(FilePath),
    /// `<path>`: a src file. A file below a folder `wheel`, `src` or `firmware` has no such topic.
    Path(FilePath),
}

impl PackageId {
    /// The digest that the package's bytes must have.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        match self {
            PackageId::Wheel(digest) | PackageId::Src(_, digest) | PackageId::Firmware(digest) => digest,
        }
    }

    /// The topic the package is retained under.
    #[must_use]
    pub fn topic(&self) -> String {
        format!("{PACKAGES}{self}")
    }
}

impl fmt::Display for PackageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PackageId::Wheel(digest) => write!(f, "wheel/{digest}"),
            PackageId::Src(path, digest) => write!(f, "src/{path}/{digest}"),
            PackageId::Firmware(digest) => write!(f, "firmware/{digest}"),
        }
    }
}

impl LegacyId {
    /// The topic with this id.
    #[must_use]
    pub fn topic(&self) -> String {
        match self {
            LegacyId::Digest(digest) => format!("{PACKAGES}{digest}"),
            LegacyId::Src(path) => format!("{PACKAGES}src/{path}"),
            LegacyId::Path(path) => format!("{PACKAGES}{path}"),
        }
    }
}
