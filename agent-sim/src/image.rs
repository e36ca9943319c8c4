//! What an image says of itself, if it is one of ESP-IDF's; any other bytes are an image, too.

use std::io;

use mpypi_protocol::digest::Hasher;

use crate::{flash::Flash, limits};

/// The first byte of an application image of ESP-IDF (`ESP_IMAGE_HEADER_MAGIC`).
const MAGIC: u8 = 0xE9;
/// What its application description starts with (`ESP_APP_DESC_MAGIC_WORD`).
const DESCRIPTION: u32 = 0xABCD_5432;
/// Length of its header, and of each segment's.
const HEADER: u64 = 24;
const SEGMENT: u64 = 8;
/// What its checksum starts from (`ESP_ROM_CHECKSUM_INITIAL`).
const CHECKSUM: u8 = 0xEF;

/// What an image says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Description {
    /// Its version.
    pub version: Option<String>,
    /// When it was built.
    pub build: Option<String>,
}

/// Looks at the image at `path`. `None`: it says that it is an image of ESP-IDF, and is not a whole one.
///
/// # Errors
/// Of the flash.
pub(crate) fn check(flash: &impl Flash, path: &str) -> io::Result<Option<Description>> {
    let mut reader = Reader { flash, path, offset: 0 };
    let mut header = [0; HEADER as usize];
    if !reader.exactly(&mut header)? || header[0] != MAGIC {
        return Ok(Some(Description::default()));
    }
    let mut hasher = Hasher::default();
    hasher.update(&header);
    let (segments, hash_appended) = (header[1], header[23] == 1);
    let mut checksum = CHECKSUM;
    let mut description = Description::default();
    for number in 0..segments {
        let mut head = [0; SEGMENT as usize];
        if !reader.exactly(&mut head)? {
            return Ok(None);
        }
        hasher.update(&head);
        let mut left = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
        let mut piece = [0; limits::PIECE];
        let mut is_first = number == 0;
        while left > 0 {
            let part = &mut piece[..left.min(limits::PIECE as u64) as usize];
            if !reader.exactly(part)? {
                return Ok(None);
            }
            if std::mem::take(&mut is_first) {
                description = describe(part);
            }
            hasher.update(part);
            checksum = part.iter().fold(checksum, |sum, byte| sum ^ byte);
            left -= part.len() as u64;
        }
    }
    // The checksum is the last byte of the sixteen that it fills up.
    let mut end = vec![0; (16 - reader.offset % 16) as usize];
    if !reader.exactly(&mut end)? || end.last() != Some(&checksum) {
        return Ok(None);
    }
    hasher.update(&end);
    let mut appended = [0; 32];
    if hash_appended && (!reader.exactly(&mut appended)? || *hasher.finish().as_bytes() != appended) {
        return Ok(None);
    }
    Ok(Some(description))
}

/// Reads `esp_app_desc_t`, with which the first segment starts.
fn describe(segment: &[u8]) -> Description {
    let word = |at: usize| segment.get(at..at + 4).map(|word| [word[0], word[1], word[2], word[3]]);
    if word(0).map(u32::from_le_bytes) != Some(DESCRIPTION) {
        return Description::default();
    }
    let text = |from: usize, length: usize| {
        let bytes = segment.get(from..from + length)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(length);
        let text = std::str::from_utf8(&bytes[..end]).ok()?.trim();
        (!text.is_empty() && !text.contains(char::is_control)).then(|| text.to_owned())
    };
    let build = [text(96, 16), text(80, 16)].into_iter().flatten().collect::<Vec<_>>().join(" ");
    Description { version: text(16, 32), build: Some(build).filter(|build| !build.is_empty()) }
}

struct Reader<'a, F> {
    flash: &'a F,
    path: &'a str,
    offset: u64,
}

impl<F: Flash> Reader<'_, F> {
    /// Fills `buffer`; whether there was so much.
    fn exactly(&mut self, mut buffer: &mut [u8]) -> io::Result<bool> {
        while !buffer.is_empty() {
            let length = self.flash.read(self.path, self.offset, buffer)?;
            if length == 0 {
                return Ok(false);
            }
            self.offset += length as u64;
            buffer = &mut buffer[length..];
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flash::Memory;

    /// An image as `esptool` makes it: one segment, a checksum, a hash.
    fn esp(version: &str) -> Vec<u8> {
        let mut segment = vec![0; 5000];
        segment[..4].copy_from_slice(&DESCRIPTION.to_le_bytes());
        segment[16..16 + version.len()].copy_from_slice(version.as_bytes());
        segment[80..88].copy_from_slice(b"12:34:56");
        segment[96..107].copy_from_slice(b"Nov 28 2026");
        let mut image = vec![0; HEADER as usize];
        (image[0], image[1], image[23]) = (MAGIC, 1, 1);
        image.extend([0, 0, 0x40, 0x3F]);
        image.extend((segment.len() as u32).to_le_bytes());
        image.extend(&segment);
        let checksum = segment.iter().fold(CHECKSUM, |sum, byte| sum ^ byte);
        image.resize(image.len() / 16 * 16 + 15, 0);
        image.push(checksum);
        let hash = mpypi_protocol::Digest::of(&image);
        image.extend(hash.as_bytes());
        image
    }

    fn look(bytes: &[u8]) -> Option<Description> {
        let mut flash = Memory::new(1 << 16);
        flash.create("x").unwrap();
        flash.append("x", bytes).unwrap();
        check(&flash, "x").unwrap()
    }

    #[test]
    fn an_image_of_esp_idf_says_its_version_and_is_checked_to_the_last_byte() {
        let image = esp("3.0.1-dev.4");
        let expected =
            Description { version: Some("3.0.1-dev.4".into()), build: Some("Nov 28 2026 12:34:56".into()) };
        assert_eq!(look(&image), Some(expected));
        for end in [24, 30, 4000, image.len() - 33, image.len() - 1] {
            assert_eq!(look(&image[..end]), None, "cut at {end}");
        }
        let mut damaged = image.clone();
        damaged[2000] ^= 1;
        assert_eq!(look(&damaged), None);
        damaged[2001] ^= 1;
        assert_eq!(look(&damaged), None, "the checksum is right, the hash is not");
    }

    #[test]
    fn other_bytes_are_an_image_that_says_nothing() {
        for bytes in [&b""[..], b"x", &[0; 5000]] {
            assert_eq!(look(bytes), Some(Description::default()));
        }
    }
}
