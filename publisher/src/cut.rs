//! Packages as they are sent: whole, or, to a broker that takes no packets of that size, in chunks.
//!
//! A chunk's topic says which package it is of, not how that was cut. So a package that lies there in chunks is never cut
//! another way: devices that follow its list, or another channel's, would find pieces that do not fit.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use bytes::Bytes;
use mpypi_protocol::{
    Chunks, Digest, Entry, PackageId, UpdateList, chunk,
    limits::{CHUNK_MIN, CHUNKS},
    list::Piece,
};

use crate::{
    channel::{ChannelError, Package},
    limits,
    link::Link,
    publish::PublishError,
    report::size,
    retained,
};

/// A package cannot be cut so that a broker takes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CutError {
    /// There would be too many pieces.
    #[error("package `{package}` of {} does not fit into {} that the broker takes", size(*total), packets(*packet))]
    TooMany {
        /// The package.
        package: PackageId,
        /// Its size in bytes.
        total: u64,
        /// The broker's largest packet, in bytes.
        packet: usize,
    },
    /// It lies there in chunks that are larger than what may be sent.
    #[error(
        "package `{package}` lies there in chunks of {}, and no packet above {} is to be sent",
        size(*chunk), size(*packet as u64)
    )]
    Lies {
        /// The package.
        package: PackageId,
        /// Bytes of its chunks.
        chunk: u64,
        /// The largest packet, in bytes.
        packet: usize,
    },
}

fn packets(packet: usize) -> String {
    format!("{CHUNKS} packets of {}, the largest", size(packet as u64))
}

/// A package, or one of its chunks, as it is sent.
#[derive(Debug, Clone)]
pub struct Parcel<'a> {
    /// The package that it is, or is of.
    pub package: &'a Package,
    /// Where it is retained, and the digest of what is.
    pub piece: Piece,
    /// Its place in the package.
    at: Range<usize>,
}

/// The package that was read last: its chunks are sent one after the other.
#[derive(Debug, Default)]
pub struct Desk(Option<(Digest, Bytes)>);

impl Parcel<'_> {
    /// Its bytes.
    ///
    /// # Errors
    /// See [`Package::bytes`].
    pub fn bytes(&self, desk: &mut Desk) -> Result<Bytes, ChannelError> {
        let digest = *self.package.id.digest();
        let bytes = match desk.0.take().filter(|(there, _)| *there == digest) {
            Some((_, bytes)) => bytes,
            None => self.package.bytes()?,
        };
        let part = bytes.slice(self.at.clone());
        desk.0 = Some((digest, bytes));
        Ok(part)
    }

    /// How many these are.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.at.len() as u64
    }
}

/// What of `packages` is sent where their list has these `entries`, each once. An empty file is nothing to send.
#[must_use]
pub fn parcels<'a>(packages: &'a [Package], entries: &[Entry]) -> Vec<Parcel<'a>> {
    let mut seen = HashSet::new();
    let each = packages.iter().zip(entries).flat_map(|(package, entry)| {
        let step = entry.chunks().map_or(package.size, Chunks::size);
        entry.pieces().into_iter().enumerate().map(move |(number, piece)| {
            let start = number as u64 * step;
            let place = |at: u64| usize::try_from(at.min(package.size)).unwrap_or(usize::MAX);
            Parcel { package, piece, at: place(start)..place(start + step) }
        })
    });
    each.filter(|parcel| seen.insert(parcel.piece.topic.clone())).collect()
}

/// The entries of `packages`, in chunks where the broker takes no packet of their size, or the `present` list has them in
/// chunks. A package that lies there in chunks keeps them; `wish` says how large those of others are to be.
///
/// # Errors
/// There is no way to cut one, or it lies there in chunks that are too large by now; a package cannot be read, or the broker
/// not be asked.
pub async fn cut(
    link: &mut Link,
    packages: &[Package],
    present: Option<&UpdateList>,
    wish: Option<u64>,
) -> Result<Vec<Entry>, PublishError> {
    let named: HashMap<Digest, &Chunks> =
        present.into_iter().flat_map(UpdateList::cut).map(|(id, chunks)| (*id.digest(), chunks)).collect();
    let (packet, mut cut) = (link.packet(), HashMap::new());
    let lies = |package: &Package, chunk: u64, room: u64| match chunk <= room {
        true => Ok(()),
        false => Err(CutError::Lies { package: package.id.clone(), chunk, packet }),
    };
    let mut fresh = Vec::new();
    for package in packages {
        let digest = package.id.digest();
        if let Some(chunks) = named.get(digest) {
            let room = link.room(&chunk::topic(digest, u32::MAX));
            lies(package, chunks.size().min(chunks.total()), room)?;
            cut.insert(*digest, (*chunks).clone());
        } else if !link.takes(&package.id.topic(), package.size) {
            fresh.push(package);
        }
    }
    let first = |package: &Package| chunk::topic(package.id.digest(), 0);
    // Named by another channel, or by a list of the past.
    let lying = retained::some(link, &fresh.iter().map(|package| first(package)).collect::<Vec<_>>()).await?;
    for package in fresh {
        let (bytes, digest) = (package.bytes()?, package.id.digest());
        let room = link.room(&chunk::topic(digest, u32::MAX));
        let there = lying.get(&first(package)).filter(|there| bytes.starts_with(there));
        let there = there.map(|there| there.len() as u64).filter(|size| Chunks::cut(&bytes, *size).is_ok());
        if let Some(size) = there {
            lies(package, size, room)?;
        }
        let size = there.or_else(|| fitting(package.size, room, wish.unwrap_or(limits::CHUNK)));
        let chunks = size.and_then(|size| Chunks::cut(&bytes, size).ok());
        let chunks = chunks.ok_or_else(|| CutError::TooMany {
            package: package.id.clone(),
            total: package.size,
            packet,
        })?;
        cut.insert(*digest, chunks);
    }
    let entry = |package: &Package| {
        let mut entry = package.entry.clone();
        if let Some(chunks) = cut.get(package.id.digest()) {
            entry.set_chunks(Some(chunks.clone()));
        }
        entry
    };
    Ok(packages.iter().map(entry).collect())
}

/// The size of the chunks of a package that lies nowhere: as wished; a multiple of the smallest one, and smaller, where no
/// more than `room` is taken; larger where there would be too many.
fn fitting(total: u64, room: u64, wish: u64) -> Option<u64> {
    let most = room.min(mpypi_protocol::limits::PACKAGE) / CHUNK_MIN * CHUNK_MIN;
    let least = total.div_ceil(CHUNKS as u64).next_multiple_of(CHUNK_MIN);
    (least <= most).then(|| wish.clamp(least, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1024;

    #[test]
    fn chunks_are_as_large_as_wished_where_they_fit_and_are_not_too_many() {
        for (total, room, wish, size) in [
            (4096 * K, 900 * K, 64 * K, Some(64 * K)),
            (4096 * K, 100 * K, 64 * K, Some(64 * K)),
            (4096 * K, 50 * K + 7, 64 * K, Some(50 * K)),
            (4096 * K, 900 * K, K, Some(4 * K)),
            (4096 * K + 1, 900 * K, K, Some(5 * K)),
            (4096 * K, 4 * K, 64 * K, Some(4 * K)),
            (4096 * K + 1, 4 * K, 64 * K, None),
            (3 * K, 1023, K, None),
            (3 * K, 1024, 64 * K, Some(K)),
            (100 * K, u64::MAX, 65_000, Some(65_000)),
        ] {
            assert_eq!(fitting(total, room, wish), size, "{total} {room} {wish}");
        }
    }
}
