//! The checksums that a device may be given of an image, as ThingsBoard writes them: lowercase hexadecimal; of the last
//! three, whose values are numbers, the least significant byte comes first.

use std::{fmt, io, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha384, Sha512};

/// How a checksum is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// MD5.
    Md5,
    /// SHA-256: what a package's name is anyway.
    #[default]
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// CRC-32 as in zip and Ethernet.
    Crc32,
    /// The 32 bits of MurmurHash3, seed 0.
    #[serde(rename = "murmur3_32")]
    Murmur3x32,
    /// The 128 bits of MurmurHash3 for 64-bit machines, seed 0.
    #[serde(rename = "murmur3_128")]
    Murmur3x128,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Algorithm; 7] = [
        Algorithm::Md5,
        Algorithm::Sha256,
        Algorithm::Sha384,
        Algorithm::Sha512,
        Algorithm::Crc32,
        Algorithm::Murmur3x32,
        Algorithm::Murmur3x128,
    ];

    /// What ThingsBoard calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Md5 => "MD5",
            Algorithm::Sha256 => "SHA256",
            Algorithm::Sha384 => "SHA384",
            Algorithm::Sha512 => "SHA512",
            Algorithm::Crc32 => "CRC32",
            Algorithm::Murmur3x32 => "MURMUR3_32",
            Algorithm::Murmur3x128 => "MURMUR3_128",
        }
    }

    /// The checksum of all that `content` gives.
    ///
    /// # Errors
    /// Of `content`.
    pub fn sum(self, content: &mut impl io::Read) -> io::Result<String> {
        Ok(match self {
            Algorithm::Md5 => hex(&hashed::<md5::Md5>(content)?),
            Algorithm::Sha256 => hex(&hashed::<Sha256>(content)?),
            Algorithm::Sha384 => hex(&hashed::<Sha384>(content)?),
            Algorithm::Sha512 => hex(&hashed::<Sha512>(content)?),
            Algorithm::Crc32 => {
                let mut hasher = crc32fast::Hasher::new();
                each_piece(content, |piece| hasher.update(piece))?;
                hex(&hasher.finalize().to_le_bytes())
            }
            Algorithm::Murmur3x32 => hex(&murmur3::murmur3_32(content, 0)?.to_le_bytes()),
            Algorithm::Murmur3x128 => hex(&murmur3::murmur3_x64_128(content, 0)?.to_le_bytes()),
        })
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = String;

    fn from_str(text: &str) -> Result<Algorithm, String> {
        let known = Algorithm::ALL.into_iter().find(|known| known.name().eq_ignore_ascii_case(text));
        known.ok_or_else(|| {
            let names = Algorithm::ALL.map(|known| known.name().to_lowercase());
            format!("`{text}` is none of {}", names.join(", "))
        })
    }
}

/// The name that git gives to a file's content: the SHA-1 of `blob `, its length in decimal, NUL, and the content.
///
/// # Errors
/// Of `content`.
pub fn git_blob(len: u64, content: &mut impl io::Read) -> io::Result<String> {
    let mut hasher = sha1::Sha1::new();
    hasher.update(format!("blob {len}\0"));
    each_piece(content, |piece| hasher.update(piece))?;
    Ok(hex(&hasher.finalize()))
}

fn hashed<H: sha2::Digest>(content: &mut impl io::Read) -> io::Result<Vec<u8>> {
    let mut hasher = H::new();
    each_piece(content, |piece| hasher.update(piece))?;
    Ok(hasher.finalize().to_vec())
}

fn each_piece(content: &mut impl io::Read, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut piece = vec![0; 64 * 1024];
    loop {
        match content.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => take(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn hex(bytes: &(impl AsRef<[u8]> + ?Sized)) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives its bytes a few at a time.
    struct Drips<'a>(&'a [u8]);

    impl io::Read for Drips<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.len().min(buffer.len()).min(5);
            let (piece, rest) = self.0.split_at(count);
            buffer[..count].copy_from_slice(piece);
            self.0 = rest;
            Ok(count)
        }
    }

    #[test]
    fn every_checksum_is_written_as_thingsboard_writes_it() {
        for (algorithm, expected) in [
            (Algorithm::Md5, "5eb63bbbe01eeed093cb22bb8f5acdc3"),
            (Algorithm::Sha256, "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9"),
            (
                Algorithm::Sha384,
                "fdbd8e75a67f29f701a4e040385e2e23986303ea10239211af907fcbb83578b3e417cb71ce646efd0819dd8c088de1bd",
            ),
            (
                Algorithm::Sha512,
                "309ecc489c12d6eb4cc40f50c902f2b4d0ed77ee511a7c7a9bcd3ca86d4cd86f989dd35bc5ff499670da34255b45b0cf\
                 d830e81f605dcf7dc5542e93ae9cd76f",
            ),
            (Algorithm::Crc32, "85114a0d"),
            (Algorithm::Murmur3x32, "0f8f925e"),
            (Algorithm::Murmur3x128, "0e617feb46603f53b163eb607d4697ab"),
        ] {
            assert_eq!(algorithm.sum(&mut &b"hello world"[..]).unwrap(), expected, "{algorithm}");
            assert_eq!(algorithm.sum(&mut Drips(b"hello world")).unwrap(), expected, "{algorithm} in pieces");
            assert_eq!(algorithm.name().to_lowercase().parse(), Ok(algorithm));
        }
    }

    #[test]
    fn a_file_has_the_name_that_git_gives_it() {
        let all: Vec<u8> = (0..=255).collect();
        for (content, expected) in [
            (&b""[..], "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
            (b"print(1)\n", "b917a726c93f902e43291d9009d6488385133b67"),
            (&all, "c86626638e0bc8cf47ca49bb1525b40e9737ee64"),
        ] {
            assert_eq!(git_blob(content.len() as u64, &mut &content[..]).unwrap(), expected);
        }
    }
}
