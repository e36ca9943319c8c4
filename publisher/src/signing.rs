//! Who signs a channel's lists, and what the roots that a broker retains say about it.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Digest, Entry, KeyId, Root, Trust, UpdateList, Verified,
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
    /// The chain of roots.
    pub chain: Arc<[Root]>,
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

/// The chain of roots: `chain`, and what follows from its end, or else from the first root retained, by those retained.
#[must_use]
pub fn walk(mut chain: Vec<Root>, retained: &BTreeMap<u64, Bytes>) -> Vec<Root> {
    loop {
        let number = chain.last().map_or(1, |root| root.version().saturating_add(1));
        let root = retained.get(&number).and_then(|bytes| SignedRoot::parse(bytes).ok());
        let next = root.and_then(|root| match chain.last() {
            None => Root::pin(root).ok(),
            Some(last) => last.next(number, root).ok(),
        });
        match next {
            Some(root) => chain.push(root),
            None => return chain,
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
            return Ok(Authority { trust: Trust::Anyone, epoch: 0, key: None, chain: Arc::new([]) });
        };
        let wanted = wanted.as_ref().or(named);
        let chain: Arc<[Root]> = walk(keys.roots()?.0, roots).into();
        let root = chain.last();
        let delegation = root.and_then(|root| Some((root, root.delegation(channel)?)));
        let Some((root, delegation)) = delegation else {
            return match (wanted, present.and_then(signer)) {
                // Of a channel that is signed, every list is: a device that knows the key refuses all others.
                (None, Some(key)) => {
                    Err(SigningError::NeedsKey { channel: channel.clone(), keys: vec![key.to_owned()] })
                }
                (None, None) => {
                    Ok(Authority { trust: Trust::Anyone, epoch: 0, key: None, chain: chain.clone() })
                }
                (Some(key), _) if root.is_some() => Err(SigningError::NotDelegated {
                    key: key.clone(),
                    channel: channel.clone(),
                    version: root.map_or(0, Root::version),
                    keys: Vec::new(),
                }),
                (Some(key), _) => {
                    let key = keys.key(key)?;
                    let trust = Trust::Keys(BTreeMap::from([(key.id.clone(), key.public.clone())]).into());
                    Ok(Authority { trust, epoch: 0, key: Some(key), chain: chain.clone() })
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
        let trust = Trust::Root(Arc::new(root.clone()));
        if let Err(error @ (Distrust::ExpiredRoot { .. } | Distrust::ExpiredDelegation { .. })) =
            trust.may_sign(channel, key.id.as_str(), Some(now))
        {
            return Err(SigningError::Expired(error));
        }
        let epoch = delegation.epoch;
        Ok(Authority { trust, epoch, key: Some(key), chain: chain.clone() })
    }

    /// The same where there is no `channel.toml`: unless a key is named, one of the folder that may sign and can do so here.
    /// The second value is what to [`sign`](Authority::sign) with.
    ///
    /// # Errors
    /// See [`Authority::find`].
    pub fn any(
        signing: &Signing,
        channel: &ChannelName,
        present: Option<&UpdateList>,
        roots: &BTreeMap<u64, Bytes>,
        now: Timestamp,
    ) -> Result<(Authority, Signing), SigningError> {
        let signing = match signing {
            Signing::With(keys, None) => {
                let chain = walk(keys.roots()?.0, roots);
                let delegation = chain.last().and_then(|root| root.delegation(channel));
                let files = keys.all()?;
                let may = |key: &&KeyFile| match delegation {
                    Some(delegation) => delegation.keys.contains(&key.id),
                    None => present.and_then(signer) == Some(key.id.as_str()),
                };
                let key = files.iter().filter(|key| key.custody != Custody::Elsewhere).find(may);
                Signing::With(keys.clone(), key.map(|key| key.id.clone()))
            }
            signing => signing.clone(),
        };
        Ok((Authority::find(&signing, None, channel, present, roots, now)?, signing))
    }

    /// Reads a list that is to be signed again: somebody has signed it who may, or might before a key was rotated. What was
    /// signed before the epoch was raised may be a thief's.
    ///
    /// # Errors
    /// Says why it is not believed.
    pub fn believed(&self, payload: &[u8], channel: &ChannelName) -> Result<UpdateList, Distrust> {
        let newest = self.chain.last().and_then(|root| root.delegation(channel));
        let Some(epoch) = newest.map(|delegation| delegation.epoch) else {
            return self.trust.verify(channel, payload, None).map(Verified::into_list);
        };
        let mut keys = BTreeMap::new();
        for root in self.chain.iter() {
            let delegation = root.delegation(channel).filter(|delegation| delegation.epoch == epoch);
            for id in delegation.into_iter().flat_map(|delegation| &delegation.keys) {
                keys.extend(root.keys().get(id).map(|key| (id.clone(), key.clone())));
            }
        }
        let list = Trust::Keys(keys.into()).verify(channel, payload, None)?.into_list();
        match list.release() {
            None => Err(Distrust::NoRelease),
            Some(release) if release.epoch != epoch => {
                Err(Distrust::WrongEpoch { expected: epoch, found: release.epoch })
            }
            Some(_) => Ok(list),
        }
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
