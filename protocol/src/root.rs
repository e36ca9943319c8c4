//! The root of trust: a chain of retained messages that say whose signatures count.
//!
//! Root `n` is retained at `mpypi/keys/root/<n>`, a JSON array:
//! ```json
//! [{"type":"root","version":2,"created":"…Z","expires":"…Z","threshold":2,"keys":["r1","r2","r3"]},
//!  {"type":"key","id":"r1","alg":"rsa3072-pkcs1v15-sha256","key":"<base64>"},
//!  {"type":"delegation","channel":"dev","keys":["dev-2026"],"epoch":0,"expires":"…Z"},
//!  {"type":"signature","key":"r1","alg":"…","sig":"<base64>"},
//!  {"type":"signature","key":"r2","alg":"…","sig":"<base64>"}]
//! ```
//! - `root` comes first, once. Keys and delegations follow in any order; entries of other types and unknown members are
//!   covered and skipped. `"channel":"*"` is for every channel without a delegation of its own.
//! - The signatures cover every byte before the first `,{"type":"signature"`; behind it come such objects and `]`, without
//!   white space between them. Those that are not good, or not of a root key, count for nothing.
//! - Ids are unique, and so are the bytes of keys: a threshold counts keys, not names.
//!
//! States are types: a [`Draft`] says something, a [`SignedRoot`] says who vouches for it, a [`Root`] is believed.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    ChannelName, Digest,
    key::{KeyId, PublicKey},
    limits,
    list::{Fields, Problem, Signature},
    signed::{TailError, join, split_many},
    topic::{NameError, ROOTS},
};

/// What a root says.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    /// Its version: 1, 2, 3, …
    pub version: u64,
    /// When it was made.
    pub created: Timestamp,
    /// When devices must stop believing that it is the newest.
    pub expires: Timestamp,
    /// How many root keys have to sign a root.
    pub threshold: usize,
    /// The root keys.
    pub root_keys: Vec<KeyId>,
    /// Every key, root keys and those of channels.
    pub keys: BTreeMap<KeyId, PublicKey>,
    /// Who may sign for which channel.
    pub delegations: BTreeMap<Scope, Delegation>,
}

/// What a delegation is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// One channel.
    Channel(ChannelName),
    /// Every channel without a delegation of its own, written `*`.
    Others,
}

/// Who may sign a channel's lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delegation {
    /// The keys, any one of which suffices. None: nobody.
    pub keys: Vec<KeyId>,
    /// The epoch that lists must be of. Raised, it makes every list of earlier epochs old, whatever its sequence.
    pub epoch: u64,
    /// Until when.
    pub expires: Timestamp,
}

/// A root as it came: well formed, and not believed yet.
#[derive(Debug, Clone, PartialEq)]
pub struct SignedRoot {
    draft: Draft,
    covered: Vec<u8>,
    signatures: Vec<Signature>,
    payload: Vec<u8>,
}

/// A root that is believed: pinned, or reached from one that was. Only [`Root::pin`], [`Root::next`] and
/// [`Root::trusted`] make one.
#[derive(Debug, Clone, PartialEq)]
pub struct Root(SignedRoot);

/// Why a root is refused.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// Larger than [`limits::ROOT`].
    #[error("a root of {size} bytes is larger than {}", limits::ROOT)]
    TooLarge {
        /// Its size in bytes.
        size: usize,
    },
    /// Not JSON; says where.
    #[error("a root that is not JSON")]
    Json(#[from] serde_json::Error),
    /// More of something than there may be.
    #[error("a root has at most {most} {what}")]
    TooMany {
        /// What.
        what: &'static str,
        /// How many there may be.
        most: usize,
    },
    /// One entry is wrong.
    #[error("entry {index} of a root: {problem}")]
    Entry {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        problem: Problem,
    },
    /// The entries contradict each other.
    #[error("a root that contradicts itself: {0}")]
    Contradiction(String),
    /// The signatures are not as they have to be.
    #[error("the end of a root: {0}")]
    Tail(#[from] TailError),
    /// Not the version that comes next.
    #[error("root {found} where root {expected} comes next")]
    Version {
        /// The one that comes next.
        expected: u64,
        /// The one that came, by what it says or by its topic.
        found: u64,
    },
    /// Too few signatures.
    #[error("{found} of the {needed} root keys that root {by} asks for signed root {version}")]
    Threshold {
        /// The root that asks.
        by: u64,
        /// The root that came.
        version: u64,
        /// How many it asks for.
        needed: usize,
        /// How many there are.
        found: usize,
    },
}

impl Draft {
    /// What is to be signed: the root without `]`.
    ///
    /// # Errors
    /// What [`SignedRoot::parse`] would say of it.
    pub fn covered(&self) -> Result<Vec<u8>, RootError> {
        let mut entries = vec![json!({
            "type": "root",
            "version": self.version,
            "created": self.created.to_string(),
            "expires": self.expires.to_string(),
            "threshold": self.threshold,
            "keys": self.root_keys,
        })];
        for (id, key) in &self.keys {
            entries.push(json!({ "type": "key", "id": id, "alg": key.alg(), "key": key.to_base64() }));
        }
        for (scope, delegation) in &self.delegations {
            let channel = match scope {
                Scope::Channel(channel) => channel.as_str(),
                Scope::Others => "*",
            };
            let Delegation { keys, epoch, expires } = delegation;
            entries.push(json!({
                "type": "delegation", "channel": channel, "keys": keys, "epoch": epoch, "expires": expires.to_string(),
            }));
        }
        let mut covered = serde_json::to_vec(&entries).expect("texts and numbers always make JSON");
        SignedRoot::parse(&covered)?;
        covered.pop();
        Ok(covered)
    }

    /// The root with the signatures of its [`covered`](Draft::covered) bytes.
    ///
    /// # Errors
    /// What [`SignedRoot::parse`] says of it.
    pub fn signed(&self, signatures: &[Signature]) -> Result<SignedRoot, RootError> {
        SignedRoot::parse(&join(&self.covered()?, signatures))
    }

    fn read(entries: Vec<Value>) -> Result<Draft, RootError> {
        let mut draft: Option<Draft> = None;
        for (index, value) in entries.into_iter().enumerate() {
            let read = read_entry(value, &mut draft);
            read.map_err(|problem| RootError::Entry { index, problem })?;
        }
        let draft = draft.ok_or_else(|| RootError::Contradiction("it has no entry".into()))?;
        draft.check()?;
        Ok(draft)
    }

    /// What entries are to each other.
    fn check(&self) -> Result<(), RootError> {
        let wrong = |text: String| Err(RootError::Contradiction(text));
        if self.keys.len() > limits::ROOT_KEYS {
            return Err(RootError::TooMany { what: "keys", most: limits::ROOT_KEYS });
        }
        if self.delegations.len() > limits::DELEGATIONS {
            return Err(RootError::TooMany { what: "delegations", most: limits::DELEGATIONS });
        }
        // TUF 1.0, 5.3.4: a threshold counts distinct keys, whatever they are called.
        let mut bytes = HashSet::new();
        if let Some((id, _)) = self.keys.iter().find(|(_, key)| !bytes.insert(key.bytes())) {
            return wrong(format!("the bytes of key `{id}` are those of another key"));
        }
        let named = self.delegations.values().map(|delegation| &delegation.keys);
        for keys in named.chain([&self.root_keys]) {
            let mut ids = BTreeSet::new();
            for id in keys {
                if !self.keys.contains_key(id) {
                    return wrong(format!("key `{id}` is named and not there"));
                }
                if !ids.insert(id) {
                    return wrong(format!("key `{id}` is named twice"));
                }
            }
        }
        match self.threshold {
            0 => wrong("a threshold of 0 would let anyone sign".into()),
            threshold if threshold > self.root_keys.len() => wrong(format!(
                "a threshold of {threshold} cannot be reached with {} root keys",
                self.root_keys.len()
            )),
            _ => Ok(()),
        }
    }
}

fn read_entry(value: Value, draft: &mut Option<Draft>) -> Result<(), Problem> {
    let Value::Object(map) = value else { return Err(Problem::NotAnObject("something else")) };
    let mut fields = Fields(map);
    let kind = fields.string("type")?.ok_or(Problem::Missing("type"))?;
    let Some(draft) = draft else {
        if kind != "root" {
            return Err(Problem::Value { key: "type", reason: "`root` comes first".into() });
        }
        *draft = Some(read_root(&mut fields)?);
        return Ok(());
    };
    match kind.as_str() {
        "root" => Err(Problem::Value { key: "type", reason: "`root` comes first, once".into() }),
        "key" => {
            let id = fields.parsed("id", |text| KeyId::new(text).map_err(|error| error.to_string()))?;
            let alg = fields.text("alg")?;
            let key = fields
                .parsed("key", |text| PublicKey::parse(&alg, &text).map_err(|error| error.to_string()))?;
            match draft.keys.insert(id.clone(), key) {
                None => Ok(()),
                Some(_) => Err(Problem::Twice(id.to_string())),
            }
        }
        "delegation" => {
            let scope = fields.parsed("channel", |text| match text.as_str() {
                "*" => Ok(Scope::Others),
                _ => {
                    let channel = ChannelName::new(text).map_err(|error: NameError| error.to_string())?;
                    Ok(Scope::Channel(channel))
                }
            })?;
            let delegation = Delegation {
                keys: key_ids(&mut fields)?,
                epoch: fields.number("epoch")?.unwrap_or(0),
                expires: fields.time("expires")?.ok_or(Problem::Missing("expires"))?,
            };
            match draft.delegations.insert(scope.clone(), delegation) {
                None => Ok(()),
                Some(_) => Err(Problem::Twice(scope.to_string())),
            }
        }
        _ => Ok(()),
    }
}

fn read_root(fields: &mut Fields) -> Result<Draft, Problem> {
    let version = fields.number("version")?.ok_or(Problem::Missing("version"))?;
    if version == 0 {
        return Err(Problem::Value { key: "version", reason: "the first version is 1".into() });
    }
    let threshold = fields.number("threshold")?.ok_or(Problem::Missing("threshold"))?;
    Ok(Draft {
        version,
        created: fields.time("created")?.ok_or(Problem::Missing("created"))?,
        expires: fields.time("expires")?.ok_or(Problem::Missing("expires"))?,
        threshold: usize::try_from(threshold).unwrap_or(usize::MAX),
        root_keys: key_ids(fields)?,
        keys: BTreeMap::new(),
        delegations: BTreeMap::new(),
    })
}

fn key_ids(fields: &mut Fields) -> Result<Vec<KeyId>, Problem> {
    let values = fields.array("keys", limits::ROOT_KEYS)?.ok_or(Problem::Missing("keys"))?;
    let id = |value: Value| match value {
        Value::String(text) => {
            KeyId::new(text).map_err(|error| Problem::Value { key: "keys", reason: error.to_string() })
        }
        other => Err(Problem::Value { key: "keys", reason: format!("`{other}` is no key's name") }),
    };
    values.into_iter().map(id).collect()
}

impl SignedRoot {
    /// Reads a root. Without signatures it is one that nobody vouches for.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(payload: &[u8]) -> Result<SignedRoot, RootError> {
        if payload.len() > limits::ROOT {
            return Err(RootError::TooLarge { size: payload.len() });
        }
        let (covered, signatures) = match split_many(payload, limits::ROOT_SIGNATURES)? {
            Some(split) => (split.covered, split.signatures),
            None => (payload.strip_suffix(b"]").unwrap_or(payload), Vec::new()),
        };
        let mut whole = covered.to_vec();
        whole.push(b']');
        let draft = Draft::read(serde_json::from_slice(&whole)?)?;
        Ok(SignedRoot { draft, covered: covered.to_vec(), signatures, payload: payload.to_vec() })
    }

    /// What it says.
    #[must_use]
    pub fn draft(&self) -> &Draft {
        &self.draft
    }

    /// What its signatures cover.
    #[must_use]
    pub fn covered(&self) -> &[u8] {
        &self.covered
    }

    /// Its signatures, good or not.
    #[must_use]
    pub fn signatures(&self) -> &[Signature] {
        &self.signatures
    }

    /// The bytes that it came in.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The root with one more signature.
    ///
    /// # Errors
    /// There would be too many.
    pub fn with(&self, signature: Signature) -> Result<SignedRoot, RootError> {
        let signatures: Vec<_> = self.signatures.iter().cloned().chain([signature]).collect();
        SignedRoot::parse(&join(&self.covered, &signatures))
    }

    /// Which of the root keys of `draft` signed this root. Each counts once (TUF 1.0, 5.3.4).
    #[must_use]
    pub fn signers<'d>(&self, draft: &'d Draft) -> BTreeSet<&'d KeyId> {
        let mut signers = BTreeSet::new();
        for Signature { key, alg, sig, .. } in &self.signatures {
            let id = draft.root_keys.iter().find(|id| id.as_str() == key);
            if let Some((id, public)) = id.and_then(|id| Some((id, draft.keys.get(id)?)))
                && !signers.contains(id)
                && public.verifies(&self.covered, alg, sig)
            {
                signers.insert(id);
            }
        }
        signers
    }

    /// Whether enough root keys of `draft` signed this root.
    fn is_signed_by(&self, draft: &Draft) -> Result<(), RootError> {
        let found = self.signers(draft).len();
        match found >= draft.threshold {
            true => Ok(()),
            false => Err(RootError::Threshold {
                by: draft.version,
                version: self.draft.version,
                needed: draft.threshold,
                found,
            }),
        }
    }
}

impl Root {
    /// Pins a root that was handed over by a way that is trusted: TUF 1.0, 5.2.
    ///
    /// # Errors
    /// Too few of its own keys signed it, so that it is no whole root.
    pub fn pin(root: SignedRoot) -> Result<Root, RootError> {
        root.is_signed_by(&root.draft)?;
        Ok(Root(root))
    }

    /// Takes a root up that was believed before and kept where nobody else writes.
    #[must_use]
    pub fn trusted(root: SignedRoot) -> Root {
        Root(root)
    }

    /// Goes on to the root retained as number `number`.
    ///
    /// # Errors
    /// It is not the next one, or too few signed it.
    pub fn next(&self, number: u64, root: SignedRoot) -> Result<Root, RootError> {
        let expected = self.version().saturating_add(1);
        // TUF 1.0, 5.3.5: exactly the next version. A root that was replaced never comes back.
        for found in [number, root.draft.version] {
            if found != expected || expected == self.version() {
                return Err(RootError::Version { expected, found });
            }
        }
        // TUF 1.0, 5.3.4: a threshold of the old root's keys, and a threshold of the new one's.
        root.is_signed_by(self.draft())?;
        root.is_signed_by(&root.draft)?;
        Ok(Root(root))
    }

    /// What it says.
    #[must_use]
    pub fn draft(&self) -> &Draft {
        &self.0.draft
    }

    /// The bytes that it came in.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.0.payload
    }

    /// The digest of these bytes.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(&self.0.payload)
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.0.draft.version
    }

    /// When devices must stop believing that it is the newest.
    #[must_use]
    pub fn expires(&self) -> Timestamp {
        self.0.draft.expires
    }

    /// Every key of it.
    #[must_use]
    pub fn keys(&self) -> &BTreeMap<KeyId, PublicKey> {
        &self.0.draft.keys
    }

    /// Who may sign for a channel, if anybody was named.
    #[must_use]
    pub fn delegation(&self, channel: &ChannelName) -> Option<&Delegation> {
        self.0.draft.delegation(channel)
    }
}

impl Draft {
    /// Who may sign for a channel, if anybody was named.
    #[must_use]
    pub fn delegation(&self, channel: &ChannelName) -> Option<&Delegation> {
        let own = self.delegations.get(&Scope::Channel(channel.clone()));
        own.or_else(|| self.delegations.get(&Scope::Others))
    }
}

/// The topic of root `version`.
#[must_use]
pub fn topic(version: u64) -> String {
    format!("{ROOTS}{version}")
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Scope::Channel(channel) => channel.fmt(f),
            Scope::Others => f.write_str("*"),
        }
    }
}

impl std::str::FromStr for Scope {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text {
            "*" => Ok(Scope::Others),
            _ => ChannelName::new(text).map(Scope::Channel),
        }
    }
}
