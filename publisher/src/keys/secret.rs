//! Private keys: made, locked away, unlocked, and used.
//!
//! On disk they are what every tool reads: PKCS#8 in PEM, encrypted with AES-256 under a key that scrypt makes of a
//! passphrase (RFC 8018, RFC 7914), as `openssl pkcs8 -topk8 -scrypt` writes it.

use mpypi_protocol::{
    PublicKey,
    key::{Algorithm, KeyError},
};
use pkcs8::{
    Document, EncodePrivateKey, EncodePublicKey, EncryptedPrivateKeyInfoRef, LineEnding, PrivateKeyInfoRef,
    SecretDocument, SubjectPublicKeyInfoRef,
    der::{Decode, pem::encode_string},
};
use ring::{
    rand::SystemRandom,
    rsa::{KeyPair, PublicKeyComponents},
    signature::{Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256},
};
use rsa::{Generate, PrivateKey, traits::PublicKeyParts};

/// What an encrypted private key is labelled with.
const ENCRYPTED: &str = "ENCRYPTED PRIVATE KEY";
/// RFC 8410, 7: PKCS#8 around the 32 bytes of an Ed25519 seed.
const ED25519_PRIVATE: &[u8] = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
/// RFC 8410, 4: what comes before the 32 bytes of an Ed25519 public key.
const ED25519_PUBLIC: &[u8] = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";

/// A private key in memory.
#[derive(Debug)]
pub struct Secret {
    key: Key,
    public: PublicKey,
}

#[derive(Debug)]
enum Key {
    Rsa(Box<KeyPair>),
    Ed25519(Ed25519KeyPair),
}

/// What is written of a new key.
#[derive(Debug)]
pub struct Pair {
    /// The private key, encrypted, in PEM.
    pub private: String,
    /// The public key, in PEM.
    pub public_pem: String,
    /// The public key.
    pub public: PublicKey,
}

/// Why a key cannot be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// No PEM, or of something else.
    #[error("it is no key in PEM: {0}")]
    NotAKey(String),
    /// A private key that anybody who sees the file could use.
    #[error("the private key is not encrypted")]
    Bare,
    /// The passphrase does not open it.
    #[error("the passphrase does not open it")]
    Passphrase,
    /// A key of another kind or size than what devices check.
    #[error("it is neither an RSA key of 3072 bits with the exponent 65537 nor an Ed25519 key")]
    Kind,
    /// The bytes of a public key are none.
    #[error(transparent)]
    Public(#[from] KeyError),
    /// The system has no random numbers, or the key cannot sign.
    #[error("{0}")]
    Failed(&'static str),
}

impl From<pkcs8::Error> for SecretError {
    fn from(error: pkcs8::Error) -> Self {
        SecretError::NotAKey(error.to_string())
    }
}

impl From<pkcs8::der::Error> for SecretError {
    fn from(error: pkcs8::der::Error) -> Self {
        SecretError::NotAKey(error.to_string())
    }
}

/// Makes a key, and locks its private half with `passphrase`.
///
/// # Errors
/// The system has no random numbers.
pub fn generate(alg: Algorithm, passphrase: &str) -> Result<Pair, SecretError> {
    let lock = |der: &SecretDocument| -> Result<String, SecretError> {
        let locked = PrivateKeyInfoRef::try_from(der.as_bytes())?.encrypt(passphrase)?;
        Ok(locked.to_pem(ENCRYPTED, LineEnding::LF)?.to_string())
    };
    match alg {
        Algorithm::Rsa3072 => {
            let key =
                PrivateKey::try_generate().map_err(|_| SecretError::Failed("there is no randomness"))?;
            let public = key.to_public_key();
            let pem = public.to_public_key_pem(LineEnding::LF);
            Ok(Pair {
                private: lock(&key.to_pkcs8_der()?)?,
                public_pem: pem.map_err(|error| SecretError::NotAKey(error.to_string()))?,
                public: PublicKey::new(alg, public.n_bytes().into_vec())?,
            })
        }
        Algorithm::Ed25519 => {
            let seed: [u8; 32] = ring::rand::generate(&SystemRandom::new())
                .map_err(|_| SecretError::Failed("there is no randomness"))?
                .expose();
            let der = SecretDocument::try_from([ED25519_PRIVATE, &seed].concat())?;
            let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| SecretError::Kind)?;
            let public = PublicKey::new(alg, pair.public_key().as_ref().to_vec())?;
            let spki = [ED25519_PUBLIC, public.bytes()].concat();
            let public_pem = encode_string("PUBLIC KEY", LineEnding::LF, &spki);
            let public_pem = public_pem.map_err(|error| SecretError::NotAKey(error.to_string()))?;
            Ok(Pair { private: lock(&der)?, public_pem, public })
        }
    }
}

/// Reads a public key in PEM.
///
/// # Errors
/// See [`SecretError`].
pub fn public(pem: &str) -> Result<PublicKey, SecretError> {
    let (label, document) = Document::from_pem(pem)?;
    if label != "PUBLIC KEY" {
        return Err(SecretError::NotAKey(format!("it is labelled `{label}`")));
    }
    if let Some(bytes) = document.as_bytes().strip_prefix(ED25519_PUBLIC) {
        return Ok(PublicKey::new(Algorithm::Ed25519, bytes.to_vec())?);
    }
    let info = SubjectPublicKeyInfoRef::from_der(document.as_bytes())?;
    let key = rsa::PublicKey::try_from(info).map_err(|_| SecretError::Kind)?;
    if *key.e_bytes() != [1, 0, 1] {
        return Err(SecretError::Kind);
    }
    Ok(PublicKey::new(Algorithm::Rsa3072, key.n_bytes().into_vec())?)
}

impl Secret {
    /// Unlocks a private key.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn unlock(pem: &str, passphrase: &str) -> Result<Secret, SecretError> {
        let (label, document) = SecretDocument::from_pem(pem)?;
        match label {
            ENCRYPTED => {}
            "PRIVATE KEY" | "RSA PRIVATE KEY" => return Err(SecretError::Bare),
            other => return Err(SecretError::NotAKey(format!("it is labelled `{other}`"))),
        }
        let locked = EncryptedPrivateKeyInfoRef::try_from(document.as_bytes())?;
        let der = locked.decrypt(passphrase).map_err(|_| SecretError::Passphrase)?;
        if let Ok(pair) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.as_bytes()) {
            let public = PublicKey::new(Algorithm::Ed25519, pair.public_key().as_ref().to_vec())?;
            return Ok(Secret { key: Key::Ed25519(pair), public });
        }
        let pair = KeyPair::from_pkcs8(der.as_bytes()).map_err(|_| SecretError::Kind)?;
        let PublicKeyComponents { n, e } = PublicKeyComponents::<Vec<u8>>::from(pair.public());
        match PublicKey::new(Algorithm::Rsa3072, n) {
            Ok(public) if e == [1, 0, 1] => Ok(Secret { key: Key::Rsa(Box::new(pair)), public }),
            _ => Err(SecretError::Kind),
        }
    }

    /// Its public half.
    #[must_use]
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Signs.
    ///
    /// # Errors
    /// The key is damaged, or the system has no random numbers.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SecretError> {
        match &self.key {
            Key::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
            Key::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature)
                    .map_err(|_| SecretError::Failed("the key cannot sign"))?;
                Ok(signature)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_locked_away_and_signs_when_it_is_unlocked() {
        for alg in [Algorithm::Rsa3072, Algorithm::Ed25519] {
            let pair = generate(alg, "a passphrase").unwrap();
            assert_eq!(public(&pair.public_pem).unwrap(), pair.public);
            assert!(matches!(Secret::unlock(&pair.private, "another"), Err(SecretError::Passphrase)));
            let secret = Secret::unlock(&pair.private, "a passphrase").unwrap();
            assert_eq!(*secret.public(), pair.public);
            let signature = secret.sign(b"a list").unwrap();
            assert!(pair.public.verifies_bytes(b"a list", &signature));
            assert!(!pair.public.verifies_bytes(b"a lisT", &signature));
        }
    }

    #[test]
    fn a_private_key_that_is_not_encrypted_is_refused() {
        let bare = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n-----END PRIVATE KEY-----\n";
        assert!(matches!(Secret::unlock(bare, "x"), Err(SecretError::Bare)));
        assert!(matches!(Secret::unlock("hello", "x"), Err(SecretError::NotAKey(_))));
    }
}
