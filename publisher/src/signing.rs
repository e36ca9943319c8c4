//! Who signs a channel's lists, and what the roots that a broker retains say about it.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Digest, Entry, KeyId, Root, Trust, UpdateList,
    root::SignedRoot,
    signed::{self, Distrust},
};

use crate::keys::{Custody, KeyFile, Keys, KeysError};

/// Whether lists are signed.
#[derive(Debug, Clone)]
pub enum Signing {
    /// Where the channel has keys, with the key that is named, or that `channel.toml` names.
    With(Keys, Option<KeyId>),
    /// Never: for a broker that is thrown away.
    Never,
}

/// Who signs a channel's lists.
#[derive(Debug, Clone)]
pub struct Authority {
    /// Whose lists devices believe, as far as is known.
    pub trust: Trust,
    /// The epoch that they must be of.
    pub epoch: u64,
    /// The key to sign with.
    pub key: Option<KeyFile>,
}

/// Why a list is not signed.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// The channel has keys, and no key is named.
    #[error("channel `{channel}` has keys: devices believe only lists that {} signed", names(keys))]
    NeedsKey {
        /// The channel.
        channel: ChannelName,
        /// The keys.
        keys: Vec<String>,
    },
    /// The key may not sign.
    #[error("key `{key}` may not sign for channel `{channel}`: root {version} lets {} do so", names(keys))]
    NotDelegated {
        /// The key.
        key: KeyId,
        /// The channel.
        channel: ChannelName,
        /// The root's version.
        version: u64,
        /// Who may.
        keys: Vec<String>,
    },
    /// Another key of the same name.
    #[error("the key `{key}` of the folder is not the key `{key}` of root {version}")]
    OtherKey {
        /// The key.
        key: KeyId,
        /// The root's version.
        version: u64,
    },
    /// The root, or what it delegates, has expired.
    #[error("devices would refuse the list: {0}")]
    Expired(Distrust),
    /// The key cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
}

fn names(keys: &[String]) -> String {
    match keys {
        [] => "nobody".to_owned(),
        keys => keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(" or "),
    }
}

impl SigningError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            SigningError::NeedsKey { keys, .. } => match keys.first() {
                Some(key) => format!("name the key in channel.toml: `key = \"{key}\"`"),
                None => "let somebody sign: `mpypi keys delegate`".to_owned(),
            },
            SigningError::NotDelegated { key, channel, .. } => format!(
                "`mpypi keys delegate {channel} --key {key}`, then `mpypi keys root sign` and `mpypi keys root publish`"
            ),
            SigningError::OtherKey { .. } => "name the right folder with `--keys DIR`".to_owned(),
            SigningError::Expired(_) => {
                "make a new root: `mpypi keys delegate`, `mpypi keys root sign`, `mpypi keys root publish`"
                    .to_owned()
            }
            SigningError::Keys(error) => return error.hint(),
        })
    }
}

/// The newest root that follows, by those retained, from the newest of `chain`, or else from the first one retained.
#[must_use]
pub fn newest(chain: &[Root], retained: &BTreeMap<u64, Bytes>) -> Option<Root> {
    let read = |version: u64| retained.get(&version).and_then(|bytes| SignedRoot::parse(bytes).ok());
    let mut at = match chain.last() {
        Some(root) => root.clone(),
        None => Root::pin(read(1)?).ok()?,
    };
    loop {
        let number = at.version().saturating_add(1);
        match read(number).and_then(|root| at.next(number, root).ok()) {
            Some(next) => at = next,
            None => return Some(at),
        }
    }
}

impl Authority {
    /// Who signs for `channel`, which retains `present` on a broker that retains these `roots`.
    ///
    /// # Errors
    /// The channel has keys, and this is none of them.
    pub fn find(
        signing: &Signing,
        named: Option<&KeyId>,
        channel: &ChannelName,
        present: Option<&UpdateList>,
        roots: &BTreeMap<u64, Bytes>,
        now: Timestamp,
    ) -> Result<Authority, SigningError> {
        let Signing::With(keys, wanted) = signing else {
            return Ok(Authority { trust: Trust::Anyone, epoch: 0, key: None });
        };
        let wanted = wanted.as_ref().or(named);
        let root = newest(&keys.roots()?.0, roots);
        let delegation = root.as_ref().and_then(|root| Some((root, root.delegation(channel)?)));
        let Some((root, delegation)) = delegation else {
            return match (wanted, present.and_then(signer)) {
                // Of a channel that is signed, every list is: a device that knows the key refuses all others.
                (None, Some(key)) => {
                    Err(SigningError::NeedsKey { channel: channel.clone(), keys: vec![key.to_owned()] })
                }
                (None, None) => Ok(Authority { trust: Trust::Anyone, epoch: 0, key: None }),
                (Some(key), _) if root.is_some() => Err(SigningError::NotDelegated {
                    key: key.clone(),
                    channel: channel.clone(),
                    version: root.as_ref().map_or(0, Root::version),
                    keys: Vec::new(),
                }),
                (Some(key), _) => {
                    let key = keys.key(key)?;
                    let trust = Trust::Keys(BTreeMap::from([(key.id.clone(), key.public.clone())]).into());
                    Ok(Authority { trust, epoch: 0, key: Some(key) })
                }
            };
        };
        let allowed = || delegation.keys.iter().map(ToString::to_string).collect::<Vec<_>>();
        // Without a name, the key is whichever of those that may sign can do so here.
        let (key, version) = match wanted {
            Some(key) => (keys.key(key)?, root.version()),
            None => {
                return Err(SigningError::NeedsKey { channel: channel.clone(), keys: allowed() });
            }
        };
        if !delegation.keys.contains(&key.id) {
            let (channel, keys) = (channel.clone(), allowed());
            return Err(SigningError::NotDelegated { key: key.id, channel, version, keys });
        }
        if root.keys().get(&key.id) != Some(&key.public) {
            return Err(SigningError::OtherKey { key: key.id, version });
        }
        let trust = Trust::Root(root.clone().into());
        if let Err(error @ (Distrust::ExpiredRoot { .. } | Distrust::ExpiredDelegation { .. })) =
            trust.may_sign(channel, key.id.as_str(), Some(now))
        {
            return Err(SigningError::Expired(error));
        }
        Ok(Authority { trust, epoch: delegation.epoch, key: Some(key) })
    }

    /// The list, signed if somebody signs.
    ///
    /// # Errors
    /// The key cannot be used.
    pub async fn sign(&self, signing: &Signing, list: &Bytes) -> Result<Bytes, SigningError> {
        let (Some(key), Signing::With(keys, _)) = (&self.key, signing) else { return Ok(list.clone()) };
        let covered = list.strip_suffix(b"]").unwrap_or(list);
        let signature = keys.sign(key, covered).await?;
        Ok(signed::join(covered, &[signature]).into())
    }
}

/// A key of the folder that may sign for `channel` by `root`, and whose private half can be used here.
///
/// # Errors
/// The folder cannot be read.
pub fn usable(keys: &Keys, root: Option<&Root>, channel: &ChannelName) -> Result<Option<KeyId>, KeysError> {
    let Some(delegation) = root.and_then(|root| root.delegation(channel)) else { return Ok(None) };
    let all = keys.all()?;
    let good = |key: &&KeyFile| key.custody != Custody::Elsewhere && delegation.keys.contains(&key.id);
    Ok(all.iter().find(good).map(|key| key.id.clone()))
}

/// Who says to have signed a list.
#[must_use]
pub fn signer(list: &UpdateList) -> Option<&str> {
    list.entries().iter().find_map(|entry| match entry {
        Entry::Signature(signature) => Some(signature.key.as_str()),
        _ => None,
    })
}

/// What a list that replaces `payload` says of it.
#[must_use]
pub fn previous(payload: Option<&Bytes>) -> Option<Digest> {
    payload.map(|payload| Digest::of(payload))
}
