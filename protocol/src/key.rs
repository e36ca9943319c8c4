//! Public keys and the signatures they check.
//!
//! RSA for everybody, since it is what a device of a few KiB can check; Ed25519 for hosts.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::signature::{ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::limits;

/// The name of a key: letters, digits, `.`, `_` and `-`, first a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(String);

/// How a signature is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, 8.2), a modulus of exactly 3072 bits and the exponent 65537.
    Rsa3072,
    /// Ed25519 (RFC 8032).
    Ed25519,
}

/// A key that checks signatures.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicKey {
    alg: Alg,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Alg {
    Known(Algorithm),
    /// Of a later version: kept, and good for nothing.
    Unknown(String),
}

/// A text is no key, or no name of one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a [`KeyId`].
    #[error(
        "`{}` is no key's name: use 1 to {} letters, digits, `.`, `_` and `-`, a letter or digit first",
        .0.escape_debug(), limits::KEY_NAME
    )]
    Name(String),
    /// Not an [`Algorithm`].
    #[error("`{}` is no algorithm known here: there are `{}` and `{}`", .0.escape_debug(), Algorithm::Rsa3072, Algorithm::Ed25519)]
    Algorithm(String),
    /// Not base64, or not as it is written.
    #[error("a key is written in base64, with padding and without white space")]
    Base64,
    /// Of another size than its algorithm's keys.
    #[error("{0}")]
    Size(&'static str),
}

impl KeyId {
    /// Checks `name` and keeps it.
    ///
    /// # Errors
    /// [`KeyError::Name`]
    pub fn new(name: impl Into<String>) -> Result<KeyId, KeyError> {
        let name = name.into();
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if (1..=limits::KEY_NAME).contains(&name.len())
            && name.chars().all(good)
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        {
            Ok(KeyId(name))
        } else {
            Err(KeyError::Name(name.chars().take(80).collect()))
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Algorithm {
    /// How many bytes a public key has: an RSA modulus, most significant byte first, or an Ed25519 point.
    #[must_use]
    pub fn key_size(self) -> usize {
        match self {
            Algorithm::Rsa3072 => 384,
            Algorithm::Ed25519 => 32,
        }
    }

    /// How many bytes a signature has.
    #[must_use]
    pub fn signature_size(self) -> usize {
        match self {
            Algorithm::Rsa3072 => 384,
            Algorithm::Ed25519 => 64,
        }
    }
}

impl PublicKey {
    /// The key of these bytes: see [`Algorithm::key_size`].
    ///
    /// # Errors
    /// [`KeyError::Size`]
    pub fn new(alg: Algorithm, bytes: Vec<u8>) -> Result<PublicKey, KeyError> {
        let top_bit = || bytes.first().is_some_and(|byte| *byte >= 0x80);
        match alg {
            Algorithm::Rsa3072 if bytes.len() != alg.key_size() || !top_bit() => {
                Err(KeyError::Size("an RSA key is a modulus of exactly 3072 bits"))
            }
            Algorithm::Ed25519 if bytes.len() != alg.key_size() => {
                Err(KeyError::Size("an Ed25519 key has 32 bytes"))
            }
            _ => Ok(PublicKey { alg: Alg::Known(alg), bytes }),
        }
    }

    /// Reads a key as it is written in a root. One of an algorithm that is not known here is kept, and checks nothing.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn parse(alg: &str, base64: &str) -> Result<PublicKey, KeyError> {
        let bytes = STANDARD.decode(base64).map_err(|_| KeyError::Base64)?;
        match alg.parse() {
            Ok(alg) => PublicKey::new(alg, bytes),
            Err(_) => Ok(PublicKey { alg: Alg::Unknown(alg.to_owned()), bytes }),
        }
    }

    /// The name of its algorithm.
    #[must_use]
    pub fn alg(&self) -> &str {
        match &self.alg {
            Alg::Known(alg) => alg.name(),
            Alg::Unknown(alg) => alg,
        }
    }

    /// Its algorithm, if it is known here.
    #[must_use]
    pub fn algorithm(&self) -> Option<Algorithm> {
        match self.alg {
            Alg::Known(alg) => Some(alg),
            Alg::Unknown(_) => None,
        }
    }

    /// Its bytes: see [`Algorithm::key_size`].
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its bytes as a root has them.
    #[must_use]
    pub fn to_base64(&self) -> String {
        STANDARD.encode(&self.bytes)
    }

    /// Whether `signature`, in base64, is that of `message` by this key with the algorithm named `alg`.
    #[must_use]
    pub fn verifies(&self, message: &[u8], alg: &str, signature: &str) -> bool {
        // Only one text stands for a signature: the decoder takes no white space, no other padding, no stray bits.
        match STANDARD.decode(signature) {
            Ok(signature) if alg == self.alg() => self.verifies_bytes(message, &signature),
            _ => false,
        }
    }

    /// The same, with the bytes of a signature.
    #[must_use]
    pub fn verifies_bytes(&self, message: &[u8], signature: &[u8]) -> bool {
        match self.alg {
            Alg::Known(Algorithm::Rsa3072) => {
                let key = RsaPublicKeyComponents { n: self.bytes.as_slice(), e: [1, 0, 1].as_slice() };
                key.verify(&RSA_PKCS1_2048_8192_SHA256, message, signature).is_ok()
            }
            Alg::Known(Algorithm::Ed25519) => {
                UnparsedPublicKey::new(&ED25519, &self.bytes).verify(message, signature).is_ok()
            }
            Alg::Unknown(_) => false,
        }
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({} {})", self.alg(), crate::Digest::of(&self.bytes).short())
    }
}

impl Algorithm {
    fn name(self) -> &'static str {
        match self {
            Algorithm::Rsa3072 => "rsa3072-pkcs1v15-sha256",
            Algorithm::Ed25519 => "ed25519",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = KeyError;

    fn from_str(name: &str) -> Result<Self, KeyError> {
        [Algorithm::Rsa3072, Algorithm::Ed25519]
            .into_iter()
            .find(|alg| alg.name() == name)
            .ok_or_else(|| KeyError::Algorithm(name.chars().take(80).collect()))
    }
}

impl FromStr for KeyId {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        KeyId::new(text)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for KeyId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for KeyId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        KeyId::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
