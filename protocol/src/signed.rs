//! Signed payloads: what a signature covers, and which lists are to be believed.
//!
//! A signature stands at the end of what it signs and covers every byte before it, as they came: there is no canonical
//! form, and so nothing that two readers could see differently.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde_json::{Deserializer, Value};

use crate::{
    ChannelName, Digest, Entry, UpdateList,
    key::{Algorithm, KeyError, KeyId, PublicKey},
    list::{Fields, ListError, Problem, Signature},
    root::{Delegation, Root},
    topic::NodeId,
};

/// Where a signature begins. What it covers ends right before.
pub const MARK: &[u8] = br#",{"type":"signature""#;

/// Whom a reader of lists believes.
#[derive(Debug, Clone, Default)]
pub enum Trust {
    /// Anyone who can write to the broker.
    #[default]
    Anyone,
    /// Who has one of these keys, for every channel.
    Keys(Arc<BTreeMap<KeyId, PublicKey>>),
    /// Whom the root lets sign.
    Root(Arc<Root>),
}

/// A list that somebody believed in signed, or, where anyone is believed, any list. Only [`Trust::verify`] makes one.
#[derive(Debug, Clone)]
pub struct Verified {
    list: UpdateList,
    digest: Digest,
    signer: Option<KeyId>,
}

/// Why a list is not believed. Each text begins with a word that programs may compare.
#[derive(Debug, thiserror::Error)]
pub enum Distrust {
    /// It is no update list.
    #[error("bad-list: {0}")]
    List(#[from] ListError),
    /// What ends it is not as the end of a signed payload is.
    #[error("bad-list: {0}")]
    Tail(#[from] TailError),
    /// It could be for any channel.
    #[error("bad-list: a signed list says in its `release` which channel it is for")]
    NoRelease,
    /// It has no signature.
    #[error("unsigned: the list has no signature, and none is believed without")]
    Unsigned,
    /// What ends it claims to be a signature and is none.
    #[error("bad-signature: {0}")]
    NoSignature(String),
    /// Its signature does not fit it.
    #[error("bad-signature: the list is not what `{key}` signed")]
    BadSignature {
        /// The key's name.
        key: String,
    },
    /// Nobody knows its key.
    #[error("unknown-key: the list is signed by `{key}`, who is not believed")]
    UnknownKey {
        /// The key's name.
        key: String,
    },
    /// Its key may not sign for this channel.
    #[error("unknown-key: the list is signed by `{key}`, who may not sign for channel `{channel}`")]
    NotDelegated {
        /// The key's name.
        key: String,
        /// The channel.
        channel: ChannelName,
    },
    /// The root has expired.
    #[error("expired-root: root {version} expired at {expires}, it is {now}")]
    ExpiredRoot {
        /// The root's version.
        version: u64,
        /// When.
        expires: Timestamp,
        /// What time it is.
        now: Timestamp,
    },
    /// The delegation has expired.
    #[error(
        "expired-root: what root {version} delegates for channel `{channel}` expired at {expires}, it is {now}"
    )]
    ExpiredDelegation {
        /// The root's version.
        version: u64,
        /// The channel.
        channel: ChannelName,
        /// When.
        expires: Timestamp,
        /// What time it is.
        now: Timestamp,
    },
    /// The list is for another channel.
    #[error("wrong-channel: the list is for channel `{found}`, not `{expected}`")]
    WrongChannel {
        /// The channel asked for.
        expected: ChannelName,
        /// The list's.
        found: ChannelName,
    },
    /// The list is of another epoch than the root's delegation.
    #[error("wrong-epoch: the list is of epoch {found}, the root says {expected}")]
    WrongEpoch {
        /// The delegation's.
        expected: u64,
        /// The list's.
        found: u64,
    },
}

/// What follows the first byte of the last signature is not as it has to be.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    /// Not JSON; says where, counted from the signature.
    #[error("not JSON behind `,` of the signature")]
    Json(#[from] serde_json::Error),
    /// The entry is wrong.
    #[error("the signature: {0}")]
    Entry(Problem),
    /// Something else than a signature, or white space.
    #[error("something else than signatures and `]` follows what they cover")]
    Follows,
}

/// A payload in two: what is signed, and by whom.
#[derive(Debug, Clone)]
pub struct Split<'a> {
    /// Every byte that the signatures cover.
    pub covered: &'a [u8],
    /// The signatures.
    pub signatures: Vec<Signature>,
}

/// Splits a list at its last signature; `None` if it has none.
///
/// # Errors
/// What follows is not exactly one entry and `]`.
pub fn split_list(payload: &[u8]) -> Result<Option<(&[u8], Entry)>, TailError> {
    let Some(at) = payload.windows(MARK.len()).rposition(|window| window == MARK) else { return Ok(None) };
    let (covered, tail) = payload.split_at(at);
    let (entry, rest) = entry(tail)?;
    if rest != b"]" {
        return Err(TailError::Follows);
    }
    Ok(Some((covered, entry)))
}

/// Splits a payload that may have several signatures at the first one.
///
/// # Errors
/// What follows is not signatures and `]` alone.
pub fn split_many(payload: &[u8], most: usize) -> Result<Option<Split<'_>>, TailError> {
    let Some(at) = payload.windows(MARK.len()).position(|window| window == MARK) else { return Ok(None) };
    let (covered, mut tail) = payload.split_at(at);
    let mut signatures = Vec::new();
    while tail.starts_with(MARK) && signatures.len() < most {
        let (next, rest) = entry(tail)?;
        let Entry::Signature(signature) = next else { return Err(TailError::Follows) };
        signatures.push(signature);
        tail = rest;
    }
    match tail {
        b"]" => Ok(Some(Split { covered, signatures })),
        _ => Err(TailError::Follows),
    }
}

/// The entry behind the `,` that `tail` begins with, and what follows it.
fn entry(tail: &[u8]) -> Result<(Entry, &[u8]), TailError> {
    let mut values = Deserializer::from_slice(&tail[1..]).into_iter::<Value>();
    let value = values.next().ok_or(TailError::Follows)??;
    let rest = &tail[1 + values.byte_offset()..];
    Ok((Entry::from_value(value).map_err(TailError::Entry)?, rest))
}

impl Trust {
    /// Whether a list on `channel` is to be believed. `now` is the time, as far as it is known.
    ///
    /// # Errors
    /// Says why not.
    pub fn verify(
        &self,
        channel: &ChannelName,
        payload: &[u8],
        now: Option<Timestamp>,
    ) -> Result<Verified, Distrust> {
        if let Trust::Anyone = self {
            let (list, digest) = (UpdateList::parse(payload)?, Digest::of(payload));
            return Ok(Verified { list, digest, signer: None });
        }
        if payload.len() > crate::limits::LIST {
            return Err(ListError::TooLarge { size: payload.len() }.into());
        }
        // TUF 1.0, 5.3: signatures are checked before anything of what they cover is interpreted.
        let (covered, signature) = match split_list(payload)? {
            None => return Err(Distrust::Unsigned),
            Some((covered, Entry::Signature(signature))) => (covered, signature),
            Some(_) => return Err(Distrust::NoSignature("what ends the list is no signature".into())),
        };
        if let Err(error) = signature.alg.parse::<Algorithm>() {
            return Err(Distrust::NoSignature(error.to_string()));
        }
        let delegation = match self {
            Trust::Root(root) => Some(delegation(root, channel, &signature.key, now)?),
            _ => None,
        };
        let unknown = || Distrust::UnknownKey { key: signature.key.clone() };
        let (id, key) = match self {
            Trust::Anyone => return Err(unknown()),
            Trust::Keys(keys) => {
                keys.iter().find(|(id, _)| id.as_str() == signature.key).ok_or_else(unknown)?
            }
            Trust::Root(root) => {
                root.keys().iter().find(|(id, _)| id.as_str() == signature.key).ok_or_else(unknown)?
            }
        };
        if !key.verifies(covered, &signature.alg, &signature.sig) {
            return Err(Distrust::BadSignature { key: signature.key });
        }
        let list = UpdateList::parse(payload)?;
        let verified = Verified { digest: Digest::of(payload), signer: Some(id.clone()), list };
        let release = match (verified.list.release(), delegation) {
            (Some(release), _) => release,
            // The small way without roots has one channel.
            (None, None) => return Ok(verified),
            (None, Some(_)) => return Err(Distrust::NoRelease),
        };
        // Uptane 2.1.0, 5.4.4.2: what is signed for one is not for another.
        if release.channel != *channel {
            let found = release.channel.clone();
            return Err(Distrust::WrongChannel { expected: channel.clone(), found });
        }
        match delegation {
            // TUF 1.0, 5.3.11: a fast-forward by a stolen key ends with the root that takes it away.
            Some(Delegation { epoch, .. }) if release.epoch != *epoch => {
                Err(Distrust::WrongEpoch { expected: *epoch, found: release.epoch })
            }
            _ => Ok(verified),
        }
    }
}

impl Trust {
    /// Whether the key of this name may sign for a channel now.
    ///
    /// # Errors
    /// Says why not.
    pub fn may_sign(&self, channel: &ChannelName, key: &str, now: Option<Timestamp>) -> Result<(), Distrust> {
        match self {
            Trust::Anyone => Ok(()),
            Trust::Keys(keys) if keys.keys().any(|id| id.as_str() == key) => Ok(()),
            Trust::Keys(_) => Err(Distrust::UnknownKey { key: key.to_owned() }),
            Trust::Root(root) => delegation(root, channel, key, now).map(drop),
        }
    }
}

/// What `root` delegates for `channel`, if `key` may sign for it now.
fn delegation<'r>(
    root: &'r Root,
    channel: &ChannelName,
    key: &str,
    now: Option<Timestamp>,
) -> Result<&'r Delegation, Distrust> {
    // TUF 1.0, 5.3.10: only the newest root's expiry counts; this is the newest.
    if let Some(now) = now.filter(|now| root.expires() <= *now) {
        return Err(Distrust::ExpiredRoot { version: root.version(), expires: root.expires(), now });
    }
    let not_delegated = || Distrust::NotDelegated { key: key.to_owned(), channel: channel.clone() };
    let delegation = root.delegation(channel).ok_or_else(not_delegated)?;
    if let Some(now) = now.filter(|now| delegation.expires <= *now) {
        let (version, channel, expires) = (root.version(), channel.clone(), delegation.expires);
        return Err(Distrust::ExpiredDelegation { version, channel, expires, now });
    }
    match delegation.keys.iter().any(|id| id.as_str() == key) {
        true => Ok(delegation),
        false => Err(not_delegated()),
    }
}

impl Verified {
    /// The list.
    #[must_use]
    pub fn list(&self) -> &UpdateList {
        &self.list
    }

    /// The same, as a reader takes it who knows less: see [`UpdateList::to_old_readers`].
    #[must_use]
    pub fn to_old_readers(self) -> Verified {
        Verified { list: self.list.to_old_readers(), ..self }
    }

    /// The list alone.
    #[must_use]
    pub fn into_list(self) -> UpdateList {
        self.list
    }

    /// The digest of its payload.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Who signed it, if that was asked for.
    #[must_use]
    pub fn signer(&self) -> Option<&KeyId> {
        self.signer.as_ref()
    }
}

impl Distrust {
    /// The first word of the text, which programs may compare.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Distrust::List(_) | Distrust::Tail(_) | Distrust::NoRelease => "bad-list",
            Distrust::Unsigned => "unsigned",
            Distrust::NoSignature(_) | Distrust::BadSignature { .. } => "bad-signature",
            Distrust::UnknownKey { .. } | Distrust::NotDelegated { .. } => "unknown-key",
            Distrust::ExpiredRoot { .. } | Distrust::ExpiredDelegation { .. } => "expired-root",
            Distrust::WrongChannel { .. } => "wrong-channel",
            Distrust::WrongEpoch { .. } => "wrong-epoch",
        }
    }

    /// Whether a newer root may make the list believable.
    #[must_use]
    pub fn may_change_with_root(&self) -> bool {
        matches!(self.word(), "unknown-key" | "expired-root" | "wrong-epoch")
    }
}

/// The answer of an online signer to a node's challenge: what time it is.
///
/// Such a node has no clock of its own: the nonce, which it made up a moment ago, tells it that the answer is new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeAnswer {
    /// Who asked.
    pub node: NodeId,
    /// What it asked with: hexadecimal digits of its choice.
    pub nonce: String,
    /// What time it is.
    pub time: Timestamp,
}

/// The channel to which the keys are delegated that may say what time it is.
pub const TIME_CHANNEL: &str = "time";

impl TimeAnswer {
    /// What is to be signed: the answer without `]`.
    #[must_use]
    pub fn covered(&self) -> Vec<u8> {
        let TimeAnswer { node, nonce, time } = self;
        let entry =
            serde_json::json!([{ "type": "time", "node": node, "nonce": nonce, "time": time.to_string() }]);
        let mut bytes = serde_json::to_vec(&entry).expect("texts always make JSON");
        bytes.pop();
        bytes
    }

    /// Reads an answer, signed by a key that `root` delegates to the channel [`TIME_CHANNEL`]. `floor` is the earliest time
    /// that it may be, against which the root's expiry is held.
    ///
    /// # Errors
    /// Says why it is not believed.
    pub fn verify(payload: &[u8], root: &Root, floor: Option<Timestamp>) -> Result<TimeAnswer, Distrust> {
        let (covered, signature) = match split_list(payload)? {
            Some((covered, Entry::Signature(signature))) => (covered, signature),
            _ => return Err(Distrust::Unsigned),
        };
        let channel = ChannelName::new(TIME_CHANNEL).expect("a good name");
        delegation(root, &channel, &signature.key, floor)?;
        let unknown = || Distrust::UnknownKey { key: signature.key.clone() };
        let id = KeyId::new(&*signature.key).map_err(|_| unknown())?;
        let key = root.keys().get(&id).ok_or_else(unknown)?;
        if !key.verifies(covered, &signature.alg, &signature.sig) {
            return Err(Distrust::BadSignature { key: signature.key });
        }
        let answer = |payload| -> Result<TimeAnswer, Problem> {
            let values: Vec<Value> =
                serde_json::from_slice(payload).map_err(|_| Problem::NotAnObject("something else"))?;
            let Some(Value::Object(map)) = values.into_iter().next() else {
                return Err(Problem::NotAnObject("something else"));
            };
            let mut fields = Fields(map);
            if fields.text("type")? != "time" {
                return Err(Problem::Missing("time"));
            }
            Ok(TimeAnswer {
                node: fields.parsed("node", |text| NodeId::new(text).map_err(|error| error.to_string()))?,
                nonce: fields.text("nonce")?,
                time: fields.time("time")?.ok_or(Problem::Missing("time"))?,
            })
        };
        answer(payload).map_err(|problem| TailError::Entry(problem).into())
    }
}

/// Puts signatures behind what they cover.
#[must_use]
pub fn join(covered: &[u8], signatures: &[Signature]) -> Vec<u8> {
    let mut payload = covered.to_vec();
    for signature in signatures {
        payload.push(b',');
        let value = Entry::Signature(signature.clone()).to_value();
        payload.extend(serde_json::to_vec(&value).expect("a value always makes JSON"));
    }
    payload.push(b']');
    payload
}

/// The signature entry for the bytes of a signature.
#[must_use]
pub fn signature(key: &KeyId, alg: Algorithm, bytes: &[u8]) -> Signature {
    use base64::{Engine, engine::general_purpose::STANDARD};
    Signature {
        key: key.to_string(),
        alg: alg.to_string(),
        sig: STANDARD.encode(bytes),
        extra: serde_json::Map::new(),
    }
}

/// Reads plain keys, as a device that knows no roots pins them: moduli in hexadecimal, by name.
///
/// # Errors
/// Says which is none.
pub fn plain_keys(
    pairs: impl IntoIterator<Item = (String, String)>,
) -> Result<BTreeMap<KeyId, PublicKey>, KeyError> {
    let key = |(name, hex): (String, String)| {
        let bytes: Option<Vec<u8>> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok()).collect();
        let bytes = bytes.ok_or(KeyError::Size("a plain key is a modulus in hexadecimal"))?;
        Ok((KeyId::new(name)?, PublicKey::new(Algorithm::Rsa3072, bytes)?))
    };
    pairs.into_iter().map(key).collect()
}
