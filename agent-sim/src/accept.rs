//! Whether to believe an update list.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Chunks, Digest, Entry, Rollout, Runtime, UpdateList, Verified,
    list::{Firmware, Release, Src, Wheel},
    rollout::RolloutError,
    wheel::normalized_name,
};

use crate::{journal::Seen, refusal::Refusal};

/// A list that this device may apply: of somebody it believes, for its channel, not expired, not older than what it has
/// seen, and with a wheel that runs here for every package. Only [`Accepted::judge`] makes one.
#[derive(Debug, Clone)]
pub struct Accepted {
    channel: ChannelName,
    list: Arc<UpdateList>,
    digest: Digest,
    /// When it was made, or a list before it of the same epoch, if that says later.
    created: Option<Timestamp>,
    wheels: Arc<[Wheel]>,
    sources: Arc<[Src]>,
    /// Whether it is the device's own choice, see [`Accepted::composed`].
    composed: Option<Composed>,
}

/// Whether what was chosen on the device is all that the list demands, and nothing else of the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Composed {
    /// It is.
    Whole,
    /// It is not: the device is then on no release.
    Partly,
}

impl Accepted {
    /// Judges a list. `runtime` is what the device runs; `seen` is the newest list accepted before; `now` the time, as far
    /// as the device knows it.
    ///
    /// # Errors
    /// Says why the list is refused.
    pub fn judge(
        verified: Verified,
        channel: &ChannelName,
        runtime: &Runtime,
        seen: Option<&Seen>,
        now: Option<Timestamp>,
    ) -> Result<Accepted, Refusal> {
        let (digest, list) = (verified.digest(), verified.into_list());
        if let Some(release) = list.release().filter(|release| release.channel != *channel) {
            let found = release.channel.clone();
            return Err(Refusal::WrongChannel { expected: channel.clone(), found });
        }
        let seen = seen.filter(|seen| seen.channel == *channel);
        // Of a later epoch, everything is newer; of an earlier one, nothing.
        let epochs = |release: &Release| release.epoch.cmp(&seen.map_or(0, |seen| seen.epoch));
        match list.release().map(epochs) {
            Some(Ordering::Greater) => return Accepted::current(list, digest, channel, runtime, None, now),
            Some(Ordering::Less) => {
                let (seen, found) =
                    (seen.map_or(0, |seen| seen.epoch), list.release().map_or(0, |r| r.epoch));
                return Err(Refusal::OldEpoch { seen, found });
            }
            _ => {}
        }
        // TUF 1.0, 5.5.5 and 5.6.4: a version that was seen never goes back.
        let highest = seen.and_then(|seen| seen.sequence);
        match (list.release(), highest) {
            (Some(release), Some(seen)) if release.sequence < seen => {
                return Err(Refusal::Older { seen, found: release.sequence });
            }
            (Some(release), Some(highest))
                if release.sequence == highest && seen.is_some_and(|seen| seen.list != digest) =>
            {
                return Err(Refusal::Reused { sequence: highest });
            }
            (None, Some(seen)) => return Err(Refusal::Unsequenced { seen }),
            _ => {}
        }
        Accepted::current(list, digest, channel, runtime, seen.and_then(|seen| seen.created), now)
    }

    /// A list that is new enough, if it has not expired and fits.
    fn current(
        list: UpdateList,
        digest: Digest,
        channel: &ChannelName,
        runtime: &Runtime,
        floor: Option<Timestamp>,
        now: Option<Timestamp>,
    ) -> Result<Accepted, Refusal> {
        // TUF 1.0, 5.4.4, 5.5.6 and 5.6.5: who withholds what is newer gets no further than the expiry.
        if let (Some(release), Some(now)) = (list.release(), now)
            && let Some(expires) = release.expires.filter(|expires| *expires <= now)
        {
            return Err(Refusal::Expired { sequence: release.sequence, expires, now });
        }
        let wheels = wheels_for(runtime, &list)?.into();
        let sources = list.entries().iter().filter_map(|entry| match entry {
            Entry::Src(src) => Some(src.clone()),
            _ => None,
        });
        let sources = sources.collect();
        let created = list.release().and_then(|release| release.created).max(floor);
        Ok(Accepted {
            channel: channel.clone(),
            list: Arc::new(list),
            digest,
            created,
            wheels,
            sources,
            composed: None,
        })
    }

    /// Other packages than the list demands, as somebody at the device chose them: `wheels` and `sources` are all it
    /// is to have.
    #[must_use]
    pub fn composed(&self, wheels: Vec<Wheel>, sources: Vec<Src>) -> Accepted {
        let key = |wheel: &Wheel| (normalized_name(&wheel.name), wheel.digest);
        let offered: BTreeSet<_> = self.wheels.iter().map(key).collect();
        let taken: BTreeSet<_> = wheels.iter().filter(|wheel| !is_local(wheel)).map(key).collect();
        let demanded = |wheel: &&Wheel| !wheel.is_optional();
        let file = |src: &Src| (src.path.clone(), src.digest);
        let whole = taken.is_subset(&offered)
            && self.wheels.iter().filter(demanded).all(|wheel| taken.contains(&key(wheel)))
            && self.sources.iter().map(file).collect::<BTreeSet<_>>() == sources.iter().map(file).collect();
        let composed = Some(if whole { Composed::Whole } else { Composed::Partly });
        Accepted { wheels: wheels.into(), sources: sources.into(), composed, ..self.clone() }
    }

    /// Whether, and how, it was composed on the device.
    #[must_use]
    pub fn composition(&self) -> Option<Composed> {
        self.composed
    }

    /// The channel it is for.
    #[must_use]
    pub fn channel(&self) -> &ChannelName {
        &self.channel
    }

    /// The list.
    #[must_use]
    pub fn list(&self) -> &UpdateList {
        &self.list
    }

    /// The digest of its payload.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Its sequence, if it has one.
    #[must_use]
    pub fn sequence(&self) -> Option<u64> {
        self.list.release().map(|release| release.sequence)
    }

    /// Its version, if it has one.
    #[must_use]
    pub fn version(&self) -> Option<String> {
        self.list.release().map(|release| release.version.clone())
    }

    /// What to remember of it.
    #[must_use]
    pub fn seen(&self) -> Seen {
        Seen {
            channel: self.channel.clone(),
            epoch: self.list.release().map_or(0, |release| release.epoch),
            sequence: self.sequence(),
            version: self.version(),
            created: self.created,
            list: self.digest,
            rollout: self.rollout().ok().flatten().map(|rollout| rollout.id),
            refused: None,
        }
    }

    /// Whose turn it is to take it; `None`: everybody's.
    ///
    /// # Errors
    /// It says so in a way that this agent cannot read.
    pub fn rollout(&self) -> Result<Option<Rollout>, RolloutError> {
        self.list.release().map_or(Ok(None), Rollout::of)
    }

    /// Whether it says that the release of this sequence is bad.
    #[must_use]
    pub fn revokes(&self, sequence: u64) -> bool {
        self.list.release().is_some_and(|release| release.revoked.contains(&sequence))
    }

    /// Bytes of all packages that it has for this device, as far as it says.
    #[must_use]
    pub fn size(&self) -> u64 {
        let sources = self.sources().filter_map(|src| src.size);
        let wheels = self.wheels.iter().filter(|wheel| !wheel.is_optional());
        wheels.filter_map(|wheel| wheel.size).chain(sources).fold(0, u64::saturating_add)
    }

    /// The wheels that run here, one for each name. Of those that are optional a device installs what was chosen.
    #[must_use]
    pub fn wheels(&self) -> &[Wheel] {
        &self.wheels
    }

    /// How the package with this digest is cut, where it lies in chunks.
    #[must_use]
    pub fn chunks(&self, package: &Digest) -> Option<&Chunks> {
        let is_it = |entry: &&Entry| entry.package().is_some_and(|(id, _)| id.digest() == package);
        self.list.entries().iter().find(is_it)?.chunks()
    }

    /// The files to install as they are.
    pub fn sources(&self) -> impl Iterator<Item = &Src> {
        self.sources.iter()
    }

    /// The firmware images of the list.
    pub fn firmware(&self) -> impl Iterator<Item = &Firmware> {
        self.list.entries().iter().filter_map(|entry| match entry {
            Entry::Firmware(image) => Some(image),
            _ => None,
        })
    }

    /// What the list holds that this agent skips, for people; firmware as well, unless somebody takes care of it.
    pub fn skipped(&self, takes_firmware: bool) -> impl Iterator<Item = String> {
        self.list.entries().iter().filter_map(move |entry| match entry {
            Entry::Firmware(_) if takes_firmware => None,
            Entry::Firmware(image) => Some(format!("firmware `{} {}`", image.name, image.version)),
            Entry::Unknown(_) => Some(format!("an entry of unknown type `{}`", entry.kind())),
            _ => None,
        })
    }
}

/// A list may have several wheels of one name, which differ in their tag: the device takes the one that fits it
/// best, and cannot do without any.
fn wheels_for(runtime: &Runtime, list: &UpdateList) -> Result<Vec<Wheel>, Refusal> {
    let mut packages: BTreeMap<String, Vec<&Wheel>> = BTreeMap::new();
    for entry in list.entries() {
        if let Entry::Wheel(wheel) = entry {
            packages.entry(normalized_name(&wheel.name)).or_default().push(wheel);
        }
    }
    let choice = |wheels: Vec<&Wheel>| match runtime.choose(wheels.iter().map(|wheel| wheel.tag.as_deref())) {
        Some(place) => Ok(Some(wheels[place].clone())),
        // What nobody has to have is not missed.
        None if wheels.iter().all(|wheel| wheel.is_optional()) => Ok(None),
        None => Err(Refusal::NoFit {
            name: wheels[0].name.clone(),
            tags: wheels.iter().filter_map(|wheel| wheel.tag.clone()).collect(),
            device: runtime.to_string(),
        }),
    };
    packages.into_values().filter_map(|wheels| choice(wheels).transpose()).collect()
}

/// The key of a wheel that came from a file of this machine.
pub(crate) const LOCAL: &str = "local";

/// Whether a wheel came from a file of this machine. The channel cannot say so: what it says is not looked at.
pub(crate) fn is_local(wheel: &Wheel) -> bool {
    wheel.extra.get(LOCAL) == Some(&true.into())
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::{Root, Trust, root::SignedRoot};
    use serde_json::Value;

    use super::*;

    fn judge(list: &str, seen: Option<(Option<u64>, &str)>, now: Option<&str>) -> Result<Accepted, String> {
        let channel = ChannelName::new("dev").unwrap();
        let seen = seen.map(|(sequence, list)| Seen {
            channel: channel.clone(),
            epoch: 0,
            sequence,
            version: None,
            created: None,
            list: Digest::of(list.as_bytes()),
            rollout: None,
            refused: None,
        });
        let now = now.map(|now| now.parse().unwrap());
        let list = Trust::Anyone.verify(&channel, list.as_bytes(), now).map_err(|error| error.to_string())?;
        Accepted::judge(list, &channel, &runtime(), seen.as_ref(), now).map_err(|error| error.word())
    }

    #[test]
    fn the_golden_lists_are_believed_or_refused_as_the_vectors_say() {
        let vectors: Value = serde_json::from_str(include_str!("../../protocol/vectors/roots.json")).unwrap();
        let cases = |key: &str| vectors[key].as_array().unwrap().clone();
        assert!(cases("lists").len() > 30);
        for case in cases("lists").into_iter().chain(cases("hosts")) {
            let text = |key: &str| case[key].as_str().unwrap();
            let root =
                SignedRoot::parse(vectors["roots"][text("root")].as_str().unwrap().as_bytes()).unwrap();
            let trust = Trust::Root(Root::pin(root).unwrap().into());
            let channel = ChannelName::new(text("channel")).unwrap();
            let seen = case["seen"].as_object().map(|seen| Seen {
                channel: channel.clone(),
                epoch: seen["epoch"].as_u64().unwrap(),
                sequence: seen["sequence"].as_u64(),
                version: None,
                created: None,
                list: Digest::EMPTY,
                rollout: None,
                refused: None,
            });
            let now = case["now"].as_str().map(|now| now.parse().unwrap());
            let found = trust
                .verify(&channel, text("text").as_bytes(), now)
                .map_err(Refusal::from)
                .and_then(|list| Accepted::judge(list, &channel, &runtime(), seen.as_ref(), now));
            let word = found.as_ref().err().map(Refusal::word);
            assert_eq!(word.as_deref(), case["refused"].as_str(), "{}: {found:?}", case["name"]);
        }
    }

    /// An ESP32 with MicroPython 1.23 or later.
    fn runtime() -> Runtime {
        Runtime { mpy: Some(11014), platform: "esp32".into() }
    }

    fn wheels(wheels: &[(&str, &str)]) -> String {
        let wheel = |(name, tag): &(&str, &str)| {
            let digest = Digest::of(format!("{name} {tag}").as_bytes());
            format!(
                r#"{{"type":"wheel","name":"{name}","version":"1","pkg_sha256":"{digest}","tag":"{tag}"}}"#
            )
        };
        format!("[{}]", wheels.iter().map(wheel).collect::<Vec<_>>().join(","))
    }

    fn release(sequence: u64) -> String {
        format!(
            r#"[{{"type":"release","channel":"dev","sequence":{sequence},"version":"1","expires":"2027-01-01T00:00:00Z"}}]"#
        )
    }

    #[test]
    fn a_newer_list_is_accepted_and_an_older_one_is_a_rollback() {
        assert!(judge(&release(5), Some((Some(4), "x")), None).is_ok());
        assert_eq!(judge(&release(5), Some((Some(6), "x")), None).unwrap_err(), "rollback");
    }

    #[test]
    fn a_sequence_is_accepted_again_only_with_the_same_content() {
        assert!(judge(&release(5), Some((Some(5), &release(5))), None).is_ok());
        assert_eq!(judge(&release(5), Some((Some(5), "x")), None).unwrap_err(), "rollback");
    }

    #[test]
    fn a_list_without_a_sequence_is_accepted_only_where_none_was_seen() {
        assert!(judge("[]", None, None).is_ok());
        assert!(judge("[]", Some((None, "x")), None).is_ok());
        assert_eq!(judge("[]", Some((Some(1), "x")), None).unwrap_err(), "rollback");
    }

    #[test]
    fn an_expired_list_is_refused_where_there_is_a_clock() {
        assert!(judge(&release(5), None, None).is_ok());
        assert!(judge(&release(5), None, Some("2026-12-31T23:59:59Z")).is_ok());
        assert_eq!(judge(&release(5), None, Some("2027-01-01T00:00:00Z")).unwrap_err(), "expired");
    }

    #[test]
    fn a_device_that_changes_its_channel_starts_over_with_its_sequences() {
        let other = ChannelName::new("stable").unwrap();
        let list = release(5).replace("dev", "stable");
        let seen = Seen {
            channel: ChannelName::new("dev").unwrap(),
            epoch: 1,
            sequence: Some(9),
            version: None,
            created: None,
            list: Digest::EMPTY,
            rollout: None,
            refused: None,
        };
        let list = Trust::Anyone.verify(&other, list.as_bytes(), None).unwrap();
        assert!(Accepted::judge(list, &other, &runtime(), Some(&seen), None).is_ok());
    }

    #[test]
    fn another_channels_list_is_refused() {
        let list = release(5).replace("dev", "stable");
        assert_eq!(judge(&list, None, None).unwrap_err(), "wrong-channel");
    }

    #[test]
    fn of_several_wheels_of_a_package_the_one_that_fits_best_is_taken() {
        let list = wheels(&[
            ("blink", "py3-none-any"),
            ("blink", "mpy6_3-armv6m-any"),
            ("Blink", "mpy6-bytecode-any"),
            ("led", "mpy6_3-xtensawin-any"),
            ("led", "mpy6-bytecode-esp32"),
            ("other", "py3-none-any"),
        ]);
        let accepted = judge(&list, None, None).unwrap();
        let taken: Vec<_> = accepted.wheels().iter().filter_map(|wheel| wheel.tag.as_deref()).collect();
        assert_eq!(taken, ["mpy6-bytecode-any", "mpy6_3-xtensawin-any", "py3-none-any"]);
    }

    #[test]
    fn a_list_with_a_package_that_does_not_run_here_is_refused() {
        let list =
            wheels(&[("other", "py3-none-any"), ("blink", "mpy5-bytecode-any"), ("blink", "mpy6_3-x64-any")]);
        assert_eq!(judge(&list, None, None).unwrap_err(), "no-fit");
        let list = UpdateList::parse(list.as_bytes()).unwrap();
        assert_eq!(
            wheels_for(&runtime(), &list).unwrap_err().to_string(),
            "no-fit: wheel `blink` is for `mpy5-bytecode-any`, `mpy6_3-x64-any`; this device is `mpy6_3-xtensawin-esp32`"
        );
    }
}
