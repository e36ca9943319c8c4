//! Packages in pieces, for brokers that take no large messages.
//!
//! Each chunk is a retained message of its own, and the signed list has the digests of all: a reader checks each as it
//! comes, and the whole at the end as ever. The broker that keeps them needs to know nothing of it.

use std::{ops::Range, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

use crate::{
    Digest, limits,
    list::{Fields, Piece, Problem, mismatch},
};

/// Where every chunk's topic starts.
pub const CHUNKS: &str = "mpypi/chunks/";
/// The key of an entry whose package lies in chunks.
pub const KEY: &str = "chunks";

/// How a package is cut: how large it and its chunks are, and what each of them is. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunks {
    total: u64,
    size: u64,
    digests: Arc<[Digest]>,
}

/// One chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Which one, from 0.
    pub number: u32,
    /// Its first byte's place in the package, and that of the byte after its last.
    pub bounds: Range<u64>,
    /// The digest of its bytes.
    pub digest: Digest,
}

/// Why a package cannot be cut so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunksError {
    /// Nothing cannot be retained, in pieces neither.
    #[error("a package of no bytes has no chunks")]
    Empty,
    /// Larger than [`limits::PACKAGE`], which pieces do not change.
    #[error("a package of {total} bytes is larger than {}", limits::PACKAGE)]
    TooLarge {
        /// Bytes of the package.
        total: u64,
    },
    /// Smaller than [`limits::CHUNK_MIN`], or larger than [`limits::PACKAGE`].
    #[error("chunks have {} to {} bytes, not {size}", limits::CHUNK_MIN, limits::PACKAGE)]
    Size {
        /// Bytes of each chunk.
        size: u64,
    },
    /// More than [`limits::CHUNKS`].
    #[error("{total} bytes in chunks of {size} are more than {} chunks", limits::CHUNKS)]
    TooMany {
        /// Bytes of the package.
        total: u64,
        /// Bytes of each chunk.
        size: u64,
    },
    /// As many digests as chunks, or somebody would wait for ever.
    #[error("{total} bytes in chunks of {size} are {expected} chunks, not {found}")]
    Count {
        /// Bytes of the package.
        total: u64,
        /// Bytes of each chunk.
        size: u64,
        /// How many chunks that makes.
        expected: u64,
        /// How many digests there are.
        found: usize,
    },
}

/// The topic that one chunk of a package is retained under.
#[must_use]
pub fn topic(package: &Digest, number: u32) -> String {
    format!("{CHUNKS}{package}/{number}")
}

impl Chunks {
    /// A package of `total` bytes in chunks of `size`, which have these digests.
    ///
    /// # Errors
    /// They do not go together, or beyond a limit.
    pub fn new(total: u64, size: u64, digests: impl Into<Arc<[Digest]>>) -> Result<Chunks, ChunksError> {
        let (expected, digests) = (count(total, size)?, digests.into());
        if digests.len() as u64 != expected {
            return Err(ChunksError::Count { total, size, expected, found: digests.len() });
        }
        Ok(Chunks { total, size, digests })
    }

    /// Cuts `package` into chunks of `size` bytes, and a last one that has the rest.
    ///
    /// # Errors
    /// There is nothing to cut, or it would be beyond a limit.
    pub fn cut(package: &[u8], size: u64) -> Result<Chunks, ChunksError> {
        let total = package.len() as u64;
        count(total, size)?;
        let step = usize::try_from(size).unwrap_or(usize::MAX);
        let digests: Vec<_> = package.chunks(step).map(Digest::of).collect();
        Chunks::new(total, size, digests)
    }

    /// Bytes of the package.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes of each chunk but the last, which has what is left.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many there are, at least one.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::try_from(self.digests.len()).expect("chunks are counted when they are read")
    }

    /// The chunk of this number, if there is one.
    #[must_use]
    pub fn chunk(&self, number: u32) -> Option<Chunk> {
        let digest = *self.digests.get(usize::try_from(number).ok()?)?;
        let start = u64::from(number) * self.size;
        Some(Chunk { number, bounds: start..self.total.min(start + self.size), digest })
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Chunk> {
        (0..self.count()).map(|number| self.chunk(number).expect("a number below the count has a chunk"))
    }

    /// The retained messages that hold them, of the package with this digest.
    pub fn pieces(&self, package: &Digest) -> impl ExactSizeIterator<Item = Piece> {
        let package = *package;
        self.iter().map(move |chunk| Piece {
            topic: topic(&package, chunk.number),
            digest: chunk.digest,
            size: Some(chunk.size()),
        })
    }

    pub(crate) fn read(value: Value, total: Option<u64>) -> Result<Chunks, Problem> {
        let value_error = |reason: String| Problem::Value { key: KEY, reason };
        let mut fields = match value {
            Value::Object(map) => Fields(map),
            other => return Err(mismatch(KEY, "an object", &other)),
        };
        let inside = |problem: Problem| value_error(problem.to_string());
        // As many digests as there may be, and no more, are looked at.
        let texts = fields.array("sha256", limits::CHUNKS).map_err(inside)?;
        let texts = texts.ok_or_else(|| inside(Problem::Missing("sha256")))?;
        let size = fields.number("size").map_err(inside)?.ok_or_else(|| inside(Problem::Missing("size")))?;
        let digest = |value: Value| match value {
            Value::String(text) => text.parse().map_err(|e: crate::digest::DigestError| e.to_string()),
            other => Err(format!("{other} is no digest")),
        };
        let digests: Result<Vec<_>, _> = texts.into_iter().map(digest).collect();
        let total = total.ok_or_else(|| value_error("only with the `size` of the whole".to_owned()))?;
        Chunks::new(total, size, digests.map_err(value_error)?)
            .map_err(|error| value_error(error.to_string()))
    }

    pub(crate) fn to_value(&self) -> Value {
        let digests: Vec<_> = self.digests.iter().map(Digest::to_string).collect();
        json!({ "size": self.size, "sha256": digests })
    }
}

/// How chunks are kept where the size of the whole does not stand beside them.
#[derive(Serialize, Deserialize)]
struct Kept {
    total: u64,
    size: u64,
    sha256: Vec<Digest>,
}

impl Serialize for Chunks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Kept { total: self.total, size: self.size, sha256: self.digests.to_vec() }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Chunks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Kept { total, size, sha256 } = Kept::deserialize(deserializer)?;
        Chunks::new(total, size, sha256).map_err(serde::de::Error::custom)
    }
}

impl Chunk {
    /// Bytes of it, at least one.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bounds.end - self.bounds.start
    }

    /// Its bytes, where the package is at hand.
    #[must_use]
    pub fn of<'a>(&self, package: &'a [u8]) -> Option<&'a [u8]> {
        let at = |place: u64| usize::try_from(place).ok();
        package.get(at(self.bounds.start)?..at(self.bounds.end)?)
    }

    /// Whether these are its bytes.
    #[must_use]
    pub fn is(&self, bytes: &[u8]) -> bool {
        bytes.len() as u64 == self.size() && Digest::of(bytes) == self.digest
    }
}

/// How many chunks of `size` make `total` bytes.
fn count(total: u64, size: u64) -> Result<u64, ChunksError> {
    if total == 0 {
        return Err(ChunksError::Empty);
    }
    if !(limits::CHUNK_MIN..=limits::PACKAGE).contains(&size) {
        return Err(ChunksError::Size { size });
    }
    if total > limits::PACKAGE {
        return Err(ChunksError::TooLarge { total });
    }
    let count = total.div_ceil(size);
    match usize::try_from(count) {
        Ok(number) if number <= limits::CHUNKS => Ok(count),
        _ => Err(ChunksError::TooMany { total, size }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_lie_side_by_side_and_make_the_package() {
        for (total, size, count) in [(1, 1024, 1), (1024, 1024, 1), (1025, 1024, 2), (5000, 2048, 3)] {
            let package: Vec<u8> = (0..total).map(|n: u32| n.to_le_bytes()[0]).collect();
            let chunks = Chunks::cut(&package, size).unwrap();
            assert_eq!((chunks.count(), chunks.total(), chunks.size()), (count, total.into(), size));
            let mut whole = Vec::new();
            for chunk in chunks.iter() {
                assert_eq!(chunk.bounds.start, whole.len() as u64);
                let bytes = chunk.of(&package).unwrap();
                assert!(chunk.is(bytes) && !chunk.is(&bytes[1..]) && !bytes.is_empty());
                whole.extend_from_slice(bytes);
            }
            assert_eq!(whole, package);
            assert_eq!(chunks.chunk(count), None);
            let kept = serde_json::to_string(&chunks).unwrap();
            assert_eq!(serde_json::from_str::<Chunks>(&kept).unwrap(), chunks);
        }
    }

    #[test]
    fn what_cannot_be_cut_is_not() {
        assert_eq!(Chunks::cut(b"", 1024), Err(ChunksError::Empty));
        let total = limits::PACKAGE + 1;
        assert_eq!(Chunks::new(total, 65_536, Vec::new()), Err(ChunksError::TooLarge { total }));
        assert_eq!(
            Chunks::cut(b"a", limits::CHUNK_MIN - 1),
            Err(ChunksError::Size { size: limits::CHUNK_MIN - 1 })
        );
        assert_eq!(
            Chunks::cut(b"a", limits::PACKAGE + 1),
            Err(ChunksError::Size { size: limits::PACKAGE + 1 })
        );
        let most = limits::CHUNKS as u64 * 1024;
        assert!(Chunks::new(most, 1024, vec![Digest::EMPTY; limits::CHUNKS]).is_ok());
        let more = Chunks::new(most + 1, 1024, vec![Digest::EMPTY; limits::CHUNKS + 1]);
        assert_eq!(more, Err(ChunksError::TooMany { total: most + 1, size: 1024 }));
        let fewer = Chunks::new(1025, 1024, [Digest::EMPTY]);
        assert_eq!(fewer, Err(ChunksError::Count { total: 1025, size: 1024, expected: 2, found: 1 }));
        assert!(Chunks::new(u64::MAX, limits::PACKAGE, [Digest::EMPTY]).is_err());
        assert!(serde_json::from_str::<Chunks>(r#"{"total":1,"size":1024,"sha256":[]}"#).is_err());
    }
}
