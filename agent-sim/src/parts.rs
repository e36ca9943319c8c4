//! A package in chunks on a flash: those that have come, one behind the other, in one file.
//!
//! After them there may be bytes of another one: nothing is believed for being there, but for having the digest that the
//! list says. So what a power cut leaves is of use as far as it is right, on this agent and on the MicroPython one.

use std::io;

use mpypi_protocol::{Chunks, Digest, chunk::Chunk, digest::Hasher, limits as wire};

use crate::{
    flash::{self, Flash, Kind, parent},
    limits,
    refusal::Refusal,
    store::Need,
};

/// What the name of the file ends in, behind the package's digest.
pub const END: &str = ".chunks";

/// How many of `chunks` are in the file at `path`, from the first one on. What follows them is cut off.
///
/// # Errors
/// Of the file system.
pub fn count(flash: &mut impl Flash, path: &str, chunks: &Chunks) -> io::Result<u32> {
    let Some(Kind::File(size)) = flash.kind(path)? else { return Ok(0) };
    let mut count = 0_u32;
    for chunk in chunks.iter().take_while(|chunk| chunk.bounds.end <= size) {
        if digest(flash, path, &chunk)? != chunk.digest {
            break;
        }
        count += 1;
    }
    let end = count.checked_sub(1).and_then(|last| chunks.chunk(last)).map_or(0, |last| last.bounds.end);
    if end == 0 {
        flash.remove(path)?;
    } else if end < size {
        flash.truncate(path, end)?;
    }
    Ok(count)
}

/// Writes the next chunk behind those that are there, for good. `bytes` are known to be right.
///
/// # Errors
/// Of the file system; `InvalidData` if it is not the next one.
pub fn append(flash: &mut impl Flash, path: &str, chunk: &Chunk, bytes: &[u8]) -> io::Result<()> {
    if chunk.number == 0 {
        flash.create(path)?;
        flash.sync(parent(path))?;
    }
    if flash.kind(path)? != Some(Kind::File(chunk.bounds.start)) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("`{path}` changed meanwhile")));
    }
    for piece in bytes.chunks(limits::PIECE) {
        flash.append(path, piece)?;
    }
    flash.sync(path)
}

/// Looks how many chunks of a package have come, at `path`; if all have, and are the package, that goes to `place`. Whether
/// it did.
///
/// # Errors
/// Of the file system.
pub fn resume(flash: &mut impl Flash, path: &str, place: &str, need: &mut Need) -> io::Result<bool> {
    let Some(chunks) = need.chunks.clone() else { return Ok(false) };
    need.have = count(flash, path, &chunks)?;
    if need.have < chunks.count() {
        return Ok(false);
    }
    if finish(flash, path, need.id.digest(), place)?.is_none() {
        return Ok(true);
    }
    // With the last one it is said what is wrong.
    flash.remove(path)?;
    need.have = 0;
    Ok(false)
}

/// Takes the next chunk of a package in, at `path`; with the last one, which makes the package, that goes to `place`. Whether
/// it did.
///
/// # Errors
/// A digest is wrong, the package larger than this device takes, or the flash fails. What came before stays, unless it is
/// the package's digest that is wrong.
pub fn receive(
    flash: &mut impl Flash,
    path: &str,
    place: &str,
    need: &Need,
    number: u32,
    bytes: &[u8],
) -> Result<bool, Refusal> {
    let package = || need.id.clone();
    let Some((chunks, chunk)) = need.chunks.as_ref().and_then(|cut| Some((cut, cut.chunk(number)?))) else {
        return Err(Refusal::Bug("a package has no such chunk"));
    };
    if chunks.total() > wire::PACKAGE {
        return Err(Refusal::TooLarge { package: package() });
    }
    if !chunk.is(bytes) {
        return Err(Refusal::WrongChunk { package: package(), number, found: Digest::of(bytes) });
    }
    append(flash, path, &chunk, bytes).map_err(|error| {
        let free = flash.free().unwrap_or(0);
        Refusal::from_flash(error, chunks.total() - chunk.bounds.start, free)
    })?;
    if number + 1 < chunks.count() {
        return Ok(false);
    }
    match finish(flash, path, need.id.digest(), place)? {
        None => Ok(true),
        // It was right when it came: not the list is bad, but the flash.
        Some(_) if count(flash, path, chunks)? < chunks.count() => {
            let text = format!("package `{}` changed in staging", need.id);
            Err(Refusal::Storage(io::Error::new(io::ErrorKind::InvalidData, text)))
        }
        Some(found) => {
            flash.remove(path)?;
            Err(Refusal::WrongWhole { package: package(), found })
        }
    }
}

/// All chunks have come: they go to `place` if they have the digest `expected` together. Otherwise that which they have.
///
/// # Errors
/// Of the file system.
pub fn finish(
    flash: &mut impl Flash,
    path: &str,
    expected: &Digest,
    place: &str,
) -> io::Result<Option<Digest>> {
    let found = flash::digest(flash, path)?.ok_or(io::ErrorKind::NotFound)?;
    if found != *expected {
        return Ok(Some(found));
    }
    flash.rename(path, place)?;
    Ok(None)
}

fn digest(flash: &impl Flash, path: &str, chunk: &Chunk) -> io::Result<Digest> {
    let mut hasher = Hasher::default();
    let mut piece = [0; limits::PIECE];
    let mut at = chunk.bounds.start;
    while at < chunk.bounds.end {
        let left = usize::try_from(chunk.bounds.end - at).unwrap_or(usize::MAX).min(piece.len());
        match flash.read(path, at, &mut piece[..left])? {
            0 => break,
            length => {
                hasher.update(&piece[..length]);
                at += length as u64;
            }
        }
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flash::Memory;

    #[test]
    fn what_is_there_counts_as_far_as_it_is_right() {
        let package: Vec<u8> = (0..5000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let chunks = Chunks::cut(&package, 2048).unwrap();
        // How many bytes of it are there, which of them is wrong, and how many chunks that makes.
        for (there, wrong, whole) in [
            (0, None, 0),
            (2047, None, 0),
            (2048, None, 1),
            (4999, None, 2),
            (5000, None, 3),
            (5000, Some(4999), 2),
            (5000, Some(2048), 1),
            (5000, Some(0), 0),
        ] {
            let mut flash = Memory::new(1 << 20);
            let mut bytes = package[..there].to_vec();
            if let Some(at) = wrong {
                bytes[at] ^= 1;
            }
            flash.create("a").unwrap();
            flash.append("a", &bytes).unwrap();
            assert_eq!(count(&mut flash, "a", &chunks).unwrap(), whole, "{there} {wrong:?}");
            assert_eq!(count(&mut flash, "a", &chunks).unwrap(), whole, "{there} {wrong:?}");
            for chunk in chunks.iter().skip(whole as usize) {
                append(&mut flash, "a", &chunk, chunk.of(&package).unwrap()).unwrap();
            }
            assert_eq!(finish(&mut flash, "a", &Digest::of(&package), "b").unwrap(), None);
            assert_eq!(flash.files().collect::<Vec<_>>(), [("b", package.as_slice())]);
        }
        let mut flash = Memory::new(1 << 20);
        let last = chunks.chunk(2).unwrap();
        let error = append(&mut flash, "a", &last, last.of(&package).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
