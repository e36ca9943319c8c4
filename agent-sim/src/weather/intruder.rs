//! Who sits between the broker and a node, and lies: with him in it, no network is worth less.
//!
//! As everything of the weather, what he does follows from a seed. What he may do is what must never do harm: where lists
//! are not signed, a node has no way to tell a forged one from a true one, and he only spoils them.

use bytes::{Bytes, BytesMut};
use mpypi_protocol::{Digest, signed};

use crate::{
    fleet::profile::{self, Share},
    limits,
};

/// What a message is, to an intruder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cargo {
    /// A package.
    Package,
    /// The channel's list.
    List,
    /// Something that he lets through.
    Other,
}

/// Whether nodes can tell who made a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lists {
    /// They believe only lists that somebody signed.
    Signed,
    /// They believe whoever can write to the broker.
    Unsigned,
}

/// What an intruder did to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attack {
    /// Other bytes came under a package's name, as many.
    SwappedPackage,
    /// A package went on beyond its end.
    LongerPackage,
    /// A message never ended, and nothing came behind it.
    EndlessData,
    /// A list came that a newer one had replaced.
    OldList,
    /// A list came changed, or in part.
    CorruptedList,
    /// A list of his own came.
    ForgedList,
}

impl Attack {
    /// What reports call it: the key of a profile that brings it, or its half.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Attack::SwappedPackage => "swapped-packages",
            Attack::LongerPackage => "longer-packages",
            Attack::EndlessData => "endless-data",
            Attack::OldList => "old-lists",
            Attack::CorruptedList => "corrupted-lists",
            Attack::ForgedList => "forged-lists",
        }
    }
}

/// He who sits on the way to one node.
#[derive(Debug, Clone)]
pub(super) struct Intruder {
    rng: fastrand::Rng,
    means: profile::Intruder,
    lists: Lists,
    /// The newest list that came through, and the one before it.
    newest: Option<Bytes>,
    old: Option<Bytes>,
}

impl Intruder {
    /// One with these means, if they are any.
    pub(super) fn new(means: profile::Intruder, rng: fastrand::Rng) -> Option<Box<Intruder>> {
        let none = means == profile::Intruder::default();
        let intruder = Intruder { rng, means, lists: Lists::Unsigned, newest: None, old: None };
        (!none).then(|| Box::new(intruder))
    }

    /// Tells him what nodes believe.
    pub(super) fn set_lists(&mut self, lists: Lists) {
        self.lists = lists;
    }

    /// What he does to a message, if he does something, and what arrives instead.
    pub(super) fn strike(&mut self, payload: &Bytes, cargo: Cargo) -> Option<(Attack, Bytes)> {
        let profile::Intruder { swapped_packages, endless_data, old_lists, corrupted_lists, forged_lists } =
            self.means;
        let mut strikes = |share: Share| share.draw(&mut self.rng);
        // Drawn always, so that what a message is changes nothing about the next one's fate.
        let [endless, swapped, old, corrupted, forged] =
            [endless_data, swapped_packages, old_lists, corrupted_lists, forged_lists].map(&mut strikes);
        match cargo {
            _ if payload.is_empty() => None,
            Cargo::Other => None,
            Cargo::Package if swapped => Some((Attack::SwappedPackage, self.other_bytes(payload.len()))),
            Cargo::Package if endless && self.rng.bool() => {
                let more = self.rng.usize(1..=limits::TOO_LONG);
                let more = self.other_bytes(more);
                Some((Attack::LongerPackage, [&payload[..], &more].concat().into()))
            }
            Cargo::Package | Cargo::List if endless => Some((Attack::EndlessData, Bytes::new())),
            Cargo::Package => None,
            Cargo::List => {
                let before = self.old_list(payload);
                match (before, self.lists) {
                    (Some(before), _) if old => Some((Attack::OldList, before)),
                    (_, lists) if corrupted => Some((Attack::CorruptedList, self.corrupted(payload, lists))),
                    (_, Lists::Signed) if forged => Some((Attack::ForgedList, self.forged(payload)?)),
                    _ => None,
                }
            }
        }
    }

    fn other_bytes(&mut self, count: usize) -> Bytes {
        let mut bytes = vec![0; count];
        self.rng.fill(&mut bytes);
        bytes.into()
    }

    /// The list before `newest`, which he keeps: only where he may send it again.
    fn old_list(&mut self, newest: &Bytes) -> Option<Bytes> {
        if self.means.old_lists > Share(0.0) && self.newest.as_ref() != Some(newest) {
            // A copy: what came is a part of all that was read with it.
            self.old = self.newest.replace(Bytes::copy_from_slice(newest));
        }
        self.old.clone()
    }

    /// Where it is signed, with any bit changed. Otherwise in part, which is no JSON: a changed one could be as good as
    /// the true one.
    fn corrupted(&mut self, list: &Bytes, lists: Lists) -> Bytes {
        match lists {
            Lists::Unsigned => list.slice(..self.rng.usize(..list.len())),
            Lists::Signed => {
                let mut bytes = BytesMut::from(&list[..]);
                let place = self.rng.usize(..bytes.len());
                bytes[place] ^= 1 << self.rng.u8(..8);
                bytes.freeze()
            }
        }
    }

    /// Newer than any other, with a file of his; not signed, or by himself, or with what signs `list`. None of a list
    /// that says no channel.
    fn forged(&mut self, list: &Bytes) -> Option<Bytes> {
        let known = mpypi_protocol::UpdateList::parse(list).ok()?;
        let channel = &known.release()?.channel;
        let digest = Digest::of(b"import os  # his\n");
        let body = format!(
            r#"[{{"type":"release","channel":"{channel}","sequence":{},"version":"forged"}},{{"type":"src","path":"main.py","pkg_sha256":"{digest}","size":17}}"#,
            u64::from(u32::MAX)
        );
        let at = list.windows(signed::MARK.len()).rposition(|window| window == signed::MARK);
        let tail = match (self.rng.u8(..3), at) {
            (0, Some(at)) => String::from_utf8_lossy(&list[at..]).into_owned(),
            (1, _) => {
                let sig = "A".repeat(512);
                format!(
                    r#",{{"type":"signature","key":"intruder","alg":"rsa3072-pkcs1v15-sha256","sig":"{sig}"}}]"#
                )
            }
            _ => "]".to_owned(),
        };
        Some((body + &tail).into())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mpypi_protocol::{ChannelName, Trust, UpdateList};

    use super::*;
    use crate::fleet::profile::Profile;

    const ALL: &str = "[intruder]\nswapped-packages = \"20%\"\nendless-data = \"20%\"\nold-lists = \"20%\"\n\
                       corrupted-lists = \"20%\"\nforged-lists = \"20%\"\n";

    fn intruder(seed: u64, lists: Lists) -> Box<Intruder> {
        let means = Profile::parse(ALL).unwrap().intruder;
        let mut intruder = Intruder::new(means, fastrand::Rng::with_seed(seed)).unwrap();
        intruder.set_lists(lists);
        intruder
    }

    fn list(sequence: u64) -> Bytes {
        let release =
            format!(r#"[{{"type":"release","channel":"dev","sequence":{sequence},"version":"1"}}]"#);
        release.into()
    }

    #[test]
    fn nobody_sits_where_a_profile_says_nothing_of_him() {
        assert!(Intruder::new(Profile::default().intruder, fastrand::Rng::with_seed(1)).is_none());
    }

    #[test]
    fn packages_are_swapped_for_as_many_bytes_go_on_for_too_long_or_never_end() {
        let mut intruder = intruder(1, Lists::Unsigned);
        let package = Bytes::from(vec![7; 1000]);
        let mut struck = BTreeMap::new();
        for _ in 0..500 {
            let Some((attack, came)) = intruder.strike(&package, Cargo::Package) else { continue };
            *struck.entry(attack).or_insert(0) += 1;
            let is_so = match attack {
                Attack::SwappedPackage => came.len() == package.len() && came != package,
                Attack::LongerPackage => {
                    came.starts_with(&package)
                        && (package.len() + 1..=package.len() + limits::TOO_LONG).contains(&came.len())
                }
                Attack::EndlessData => came.is_empty(),
                _ => false,
            };
            assert!(is_so, "{attack:?}");
        }
        assert_eq!(struck.len(), 3);
        assert!(struck.values().all(|count| *count > 20), "{struck:?}");
        assert!((0..500).all(|_| intruder.strike(&package, Cargo::Other).is_none()));
    }

    #[test]
    fn a_list_is_replayed_only_once_a_newer_one_replaced_it() {
        let mut intruder = intruder(2, Lists::Unsigned);
        let mut old = |list: &Bytes| {
            let strikes = (0..200).filter_map(|_| intruder.strike(list, Cargo::List));
            strikes.filter(|(attack, _)| *attack == Attack::OldList).map(|(_, came)| came).collect::<Vec<_>>()
        };
        assert!(old(&list(1)).is_empty());
        let replayed = old(&list(2));
        assert!(replayed.len() > 10 && replayed.iter().all(|came| *came == list(1)));
    }

    #[test]
    fn what_he_makes_of_unsigned_lists_is_none() {
        let mut intruder = intruder(3, Lists::Unsigned);
        let mut spoilt = 0;
        for _ in 0..2000 {
            match intruder.strike(&list(1), Cargo::List) {
                Some((Attack::CorruptedList, came)) => {
                    assert!(UpdateList::parse(&came).is_err());
                    spoilt += 1;
                }
                Some((Attack::EndlessData, _)) | None => {}
                Some((attack, _)) => panic!("{attack:?}"),
            }
        }
        assert!(spoilt > 100, "{spoilt}");
    }

    /// With the golden root and lists of the protocol, which somebody really signed.
    #[test]
    fn what_he_makes_of_signed_lists_nobody_believes() {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../../../protocol/vectors/roots.json")).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let good =
            vectors["lists"].as_array().unwrap().iter().find(|case| case["refused"].is_null()).unwrap();
        let root = text(&vectors["roots"][text(&good["root"])]);
        let root = mpypi_protocol::root::SignedRoot::parse(root.as_bytes()).unwrap();
        let trust = Trust::Root(mpypi_protocol::Root::pin(root).unwrap().into());
        let channel = ChannelName::new(text(&good["channel"])).unwrap();
        let list = Bytes::from(text(&good["text"]));
        let now = good["now"].as_str().map(|now| now.parse().unwrap());
        assert!(trust.verify(&channel, &list, now).is_ok());
        let mut intruder = intruder(4, Lists::Signed);
        let mut words = BTreeMap::new();
        for _ in 0..3000 {
            if let Some((Attack::CorruptedList | Attack::ForgedList, came)) =
                intruder.strike(&list, Cargo::List)
            {
                let word = trust.verify(&channel, &came, now).unwrap_err().word();
                *words.entry(word).or_insert(0) += 1;
            }
        }
        for word in ["unsigned", "unknown-key", "bad-signature"] {
            assert!(words.get(word).is_some_and(|count| *count > 20), "{word}: {words:?}");
        }
    }
}
