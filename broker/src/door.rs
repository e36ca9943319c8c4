//! The door: what may become part of the index. Policy only; the index asks it, inside the transaction.

use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Digest, Entry, PackageId, Root, Topic, Trust, UpdateList, limits,
    list::Piece,
    package::LegacyId,
    root::{RootError, SignedRoot},
    topic,
};

use crate::{
    limits::Limits,
    message::{Refusal, chain},
    packet::{Publish, Reason},
};

/// A message that passed all checks that need no look at the index.
#[derive(Debug)]
pub struct Admitted {
    /// The message.
    pub publish: Publish,
    /// What its topic makes of it.
    pub kind: Kind,
    /// The digest of the payload, where it was needed.
    pub digest: Option<Digest>,
}

/// What an admitted message is.
#[derive(Debug)]
pub enum Kind {
    /// A channel's new list.
    List(ChannelName, Box<UpdateList>),
    /// A list that a channel had, or has.
    History(ChannelName, u64),
    /// A root of trust.
    Root(Box<SignedRoot>),
    /// A package whose bytes hash to its topic's digest.
    Package(PackageId),
    /// A request to forget a package.
    ForgetPackage(PackageId),
    /// A chunk of the package with this digest. Whether it has the right bytes is known by the list that names it.
    Chunk(Digest, u32),
    /// A request to forget a chunk.
    ForgetChunk(Digest, u32),
    /// Any other retained message; empty ones clear.
    Retained,
    /// A message for those who listen now.
    Live,
}

/// What a channel holds at present.
#[derive(Debug, Clone, Copy)]
pub struct Present<'a> {
    /// The epoch of its release.
    pub epoch: u64,
    /// The sequence of its release, if its list has one.
    pub sequence: Option<u64>,
    /// The digest of the list's payload.
    pub digest: &'a Digest,
}

/// Checks `publish` as far as that can be done without the index.
///
/// # Errors
/// Says what is wrong and which MQTT 5 reason fits.
pub fn admit(publish: Publish, limits: &Limits) -> Result<Admitted, Refusal> {
    let meaning =
        Topic::parse(&publish.topic).map_err(|e| Refusal::new(Reason::TopicNameInvalid, e.to_string()))?;
    if publish.topic.starts_with('$') {
        return Err(Refusal::new(Reason::TopicNameInvalid, "topics that start with `$` are the broker's"));
    }
    if let Some(response) = &publish.properties.response_topic
        && let Err(error) = topic::check_name(response)
    {
        // [MQTT-3.3.2-14]: no wildcards. The receiver will publish there.
        return Err(Refusal::new(Reason::TopicNameInvalid, format!("the response topic: {error}")));
    }
    let invalid = |text: String| Err(Refusal::new(Reason::PayloadFormatInvalid, text));
    let legacy = match &meaning {
        Topic::Legacy(LegacyId::Digest(digest)) => Some(*digest),
        _ => None,
    };
    let kind = match meaning {
        Topic::Channel(_) | Topic::History(..) | Topic::Root(_) | Topic::Package(_) | Topic::Chunk(..)
            if !publish.retain =>
        {
            return invalid(
                "lists, packages and roots are retained: publish with the retain flag".to_owned(),
            );
        }
        // A channel without its list would have its devices remove everything.
        Topic::Channel(_) if publish.properties.expiry.is_some() => {
            let text = "a list stays until it is replaced: publish it without a message expiry interval";
            return Err(Refusal::new(Reason::ImplementationSpecificError, text));
        }
        Topic::Channel(channel) if publish.payload.is_empty() => {
            return invalid(format!(
                "channel `{channel}` cannot be cleared, its devices would wait for ever: publish a list without packages"
            ));
        }
        Topic::Channel(channel) => match UpdateList::parse(&publish.payload) {
            // Retained, an order would be carried out at every start.
            Ok(list) if list.entries().iter().any(|entry| matches!(entry, Entry::Command(..))) => {
                return invalid("orders are for one node: publish them to its `cmd`".to_owned());
            }
            Ok(list) => match list.release() {
                Some(release) if release.channel != channel => {
                    return invalid(format!(
                        "the list says it is for channel `{}`, not `{channel}`",
                        release.channel
                    ));
                }
                _ => Kind::List(channel, Box::new(list)),
            },
            Err(error) => {
                return invalid(format!("not an update list: {}", short(&error)));
            }
        },
        // What was trusted can be replaced by what follows from it, and by nothing else.
        Topic::Root(version) if publish.payload.is_empty() || publish.properties.expiry.is_some() => {
            return invalid(format!(
                "root {version} stays: what replaces it is root {}",
                version.saturating_add(1)
            ));
        }
        Topic::Root(version) => match SignedRoot::parse(&publish.payload) {
            Ok(root) if root.draft().version == version => Kind::Root(Box::new(root)),
            Ok(root) => return invalid(format!("the root says it is root {}", root.draft().version)),
            Err(error) => return invalid(format!("bad-root: {}", short(&error))),
        },
        Topic::History(channel, sequence) if publish.payload.is_empty() => Kind::History(channel, sequence),
        Topic::History(channel, sequence) => match UpdateList::parse(&publish.payload) {
            Ok(list)
                if list
                    .release()
                    .is_some_and(|release| release.channel == channel && release.sequence == sequence) =>
            {
                Kind::History(channel, sequence)
            }
            Ok(_) => return invalid(format!("the list is not release {sequence} of channel `{channel}`")),
            Err(error) => return invalid(format!("not an update list: {}", short(&error))),
        },
        Topic::Package(id) if publish.payload.is_empty() => Kind::ForgetPackage(id),
        Topic::Package(id) => Kind::Package(id),
        Topic::Chunk(package, number) if publish.payload.is_empty() => Kind::ForgetChunk(package, number),
        Topic::Chunk(package, number) => Kind::Chunk(package, number),
        _ if publish.retain => Kind::Retained,
        _ => Kind::Live,
    };
    let size = publish.payload.len() as u64;
    let too_large = |text| Err(Refusal::new(Reason::PacketTooLarge, text));
    if (matches!(kind, Kind::Package(_) | Kind::Chunk(..)) || legacy.is_some()) && size > limits.package {
        return too_large(format!("a package of {size} bytes is larger than {}", limits.package));
    }
    if matches!(kind, Kind::Live) && size > limits.live_payload as u64 {
        return too_large(format!(
            "a payload of {size} bytes is larger than {}: only retained ones may be",
            limits.live_payload
        ));
    }
    let digest = match &kind {
        Kind::Live | Kind::ForgetPackage(_) | Kind::ForgetChunk(..) => None,
        _ => Some(Digest::of(&publish.payload)),
    };
    let named = match (&kind, &legacy) {
        (Kind::Package(id), _) => Some(id.digest()),
        (Kind::Retained, Some(digest)) if size > 0 => Some(digest),
        _ => None,
    };
    if let (Some(named), Some(found)) = (named, &digest)
        && named != found
    {
        return invalid(format!("the payload's digest is {found}, not what its topic says"));
    }
    Ok(Admitted { publish, kind, digest })
}

/// An error with its causes, as long as an answer may be.
fn short(error: &dyn std::error::Error) -> String {
    let mut text = chain(error);
    text.truncate(text.floor_char_boundary(limits::TOPIC));
    text
}

/// The root that is believed once `root` is retained, where `newest` was until now. The first one is believed because
/// whoever may write roots here put it there: devices believe what was given to them, not what a broker has.
///
/// # Errors
/// It does not follow.
pub fn may_follow(newest: Option<&Root>, root: &SignedRoot) -> Result<Root, Refusal> {
    let version = root.draft().version;
    let follows = match newest {
        Some(newest) => newest.next(version, root.clone()),
        None if version == 1 => Root::pin(root.clone()),
        None => Err(RootError::Version { expected: 1, found: version }),
    };
    follows
        .map_err(|error| Refusal::new(Reason::PayloadFormatInvalid, format!("bad-root: {}", short(&error))))
}

/// Whether the list `payload` of `channel` is signed by one whom `root` lets sign, where it lets somebody. `now` is in
/// milliseconds since 1970.
///
/// # Errors
/// Says why devices would not believe it.
pub fn may_be_believed(
    root: Option<&Root>,
    channel: &ChannelName,
    payload: &[u8],
    now: u64,
) -> Result<(), Refusal> {
    let Some(root) = root.filter(|root| root.delegation(channel).is_some()) else { return Ok(()) };
    let now = i64::try_from(now).ok().and_then(|now| Timestamp::from_millisecond(now).ok());
    let verdict = Trust::Root(root.clone().into()).verify(channel, payload, now);
    verdict.map(drop).map_err(|distrust| {
        let text = format!("channel `{channel}` has keys: {}", short(&distrust));
        Refusal::new(Reason::PayloadFormatInvalid, text)
    })
}

/// Whether hashing and parsing this message takes long enough to do it off the network threads.
#[must_use]
pub fn is_heavy(publish: &Publish) -> bool {
    /// Bytes that are hashed in well under a millisecond even without SHA instructions.
    const LIGHT: usize = 64 * 1024;
    publish.payload.len() > LIGHT
}

/// Whether `list` may take the place of what its channel has at `present`. `has` tells whether a package or chunk is
/// in the index, with the right bytes.
///
/// # Errors
/// Says which rule of the design's invariant 3 the list breaks.
pub fn may_replace(
    list: &UpdateList,
    digest: &Digest,
    present: Option<Present<'_>>,
    mut has: impl FnMut(&Piece) -> Result<bool, Refusal>,
) -> Result<(), Refusal> {
    if present.is_some_and(|present| present.digest == digest) {
        return Ok(()); // the same list again, as after a lost PUBACK
    }
    let invalid = |text: String| Err(Refusal::new(Reason::PayloadFormatInvalid, text));
    let epoch = list.release().map_or(0, |release| release.epoch);
    let before = present.map_or(0, |present| present.epoch);
    match (list.release().map(|release| release.sequence), present.and_then(|present| present.sequence)) {
        (Some(_), Some(_)) if epoch < before => {
            return invalid(format!("epoch {epoch} is before epoch {before}, which the channel has"));
        }
        // The root says which epoch it is: every number of it is newer.
        (Some(_), Some(_)) if epoch > before => {}
        (Some(new), Some(old)) if new <= old => {
            return invalid(format!("release {new} is not newer than release {old}, which the channel has"));
        }
        (None, Some(old)) => {
            return invalid(format!(
                "the channel has release {old}: a list without a `release` entry cannot be newer"
            ));
        }
        _ => {}
    }
    for entry in list.entries() {
        let pieces = entry.pieces();
        for (number, piece) in pieces.iter().enumerate() {
            if has(piece)? {
                continue;
            }
            let Some((id, size)) = entry.package() else { continue };
            let size = size.map(|size| format!(" of {size} bytes")).unwrap_or_default();
            let missing = match entry.chunks() {
                Some(_) => format!("chunk {number} of the {} of package `{id}`{size}", pieces.len()),
                None => format!("package `{id}`{size}"),
            };
            return invalid(format!("{missing} is not here: publish packages first, the list last"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use mpypi_protocol::{Chunks, chunk};

    use super::*;
    use crate::packet::{Properties, Qos};

    fn publish(topic: &str, payload: &[u8], retain: bool) -> Publish {
        Publish {
            topic: topic.to_owned(),
            payload: Bytes::copy_from_slice(payload),
            qos: Qos::AtLeastOnce,
            retain,
            packet_id: 1,
            duplicate: false,
            properties: Properties::default(),
        }
    }

    fn refused(topic: &str, payload: &[u8], retain: bool) -> Reason {
        admit(publish(topic, payload, retain), &Limits::default()).unwrap_err().reason
    }

    fn list(sequence: Option<u64>, packages: &str) -> UpdateList {
        let release = sequence
            .map(|n| format!(r#"{{"type":"release","channel":"dev","sequence":{n},"version":"{n}"}}"#))
            .into_iter();
        let all: Vec<_> = release.chain((!packages.is_empty()).then(|| packages.to_owned())).collect();
        UpdateList::parse(format!("[{}]", all.join(",")).as_bytes()).unwrap()
    }

    #[test]
    fn a_package_that_does_not_hash_to_its_topic_is_refused() {
        let topic = format!("mpypi/packages/wheel/{}", Digest::of(b"a"));
        assert_eq!(refused(&topic, b"b", true), Reason::PayloadFormatInvalid);
        assert!(admit(publish(&topic, b"a", true), &Limits::default()).is_ok());
    }

    #[test]
    fn what_a_device_would_choke_on_is_refused_at_a_channel() {
        for payload in [
            "",
            "{}",
            "null",
            "3",
            "[{}]",
            "[",
            "[{\"type\":\"src\",\"path\":\"a\"}]",
            "[{\"type\":\"restart\"}]",
        ] {
            assert_eq!(
                refused("mpypi/channels/dev", payload.as_bytes(), true),
                Reason::PayloadFormatInvalid,
                "{payload}"
            );
        }
        assert_eq!(refused("mpypi/channels/dev", b"[]", false), Reason::PayloadFormatInvalid);
        assert_eq!(refused("mpypi/channels/no such", b"[]", true), Reason::TopicNameInvalid);
        let other = list(Some(1), "").to_bytes();
        assert_eq!(refused("mpypi/channels/stable", &other, true), Reason::PayloadFormatInvalid);
    }

    #[test]
    fn a_sequence_never_repeats_or_goes_back() {
        let digest = Digest::of(b"old");
        let present = Some(Present { epoch: 0, sequence: Some(7), digest: &digest });
        let try_list = |list: &UpdateList| may_replace(list, &Digest::of(b"new"), present, |_| Ok(true));
        assert!(try_list(&list(Some(8), "")).is_ok());
        assert!(try_list(&list(Some(7), "")).is_err());
        assert!(try_list(&list(Some(6), "")).is_err());
        assert!(try_list(&list(None, "")).is_err());
        assert!(may_replace(&list(Some(7), ""), &digest, present, |_| Ok(true)).is_ok(), "sent again");
    }

    #[test]
    fn a_list_needs_its_packages_but_not_the_empty_one() {
        let names = |digest: Digest| {
            list(Some(1), &format!(r#"{{"type":"src","path":"main.py","pkg_sha256":"{digest}"}}"#))
        };
        let try_list = |list: &UpdateList| may_replace(list, &Digest::of(b"new"), None, |_| Ok(false));
        assert!(try_list(&names(Digest::of(b"x"))).is_err());
        assert!(try_list(&names(Digest::EMPTY)).is_ok());
    }

    #[test]
    fn a_list_needs_every_chunk_with_its_own_bytes_and_not_the_whole() {
        let package: Vec<u8> = (0..3000_u16).flat_map(u16::to_le_bytes).collect();
        let (digest, chunks) = (Digest::of(&package), Chunks::cut(&package, 2048).unwrap());
        let mut entry = list(
            None,
            &format!(r#"{{"type":"src","path":"a","pkg_sha256":"{digest}","size":{}}}"#, package.len()),
        )
        .entries()[0]
            .clone();
        entry.set_chunks(Some(chunks));
        let list = UpdateList::new(vec![entry]).unwrap();
        let mut asked = Vec::new();
        let mut try_with = |missing: u32| {
            asked.clear();
            may_replace(&list, &Digest::of(b"new"), None, |piece| {
                asked.push(piece.clone());
                Ok(piece.topic != chunk::topic(&digest, missing))
            })
            .map_err(|refusal| refusal.text)
        };
        assert!(try_with(3).is_ok());
        assert!(try_with(1).unwrap_err().starts_with("chunk 1 of the 3 of package `src/a/"));
        assert!(try_with(3).is_ok());
        assert!(
            asked.iter().zip(package.chunks(2048)).all(|(piece, bytes)| piece.digest == Digest::of(bytes))
        );
    }
}
