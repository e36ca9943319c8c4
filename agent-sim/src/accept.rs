//! Whether to believe an update list.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Digest, Entry, UpdateList,
    list::{Src, Wheel},
    wheel::normalized_name,
};

use crate::{journal::Seen, refusal::Refusal};

/// A list that this device may apply: for its channel, not expired, not older than what it has seen. Only
/// [`Accepted::judge`] makes one.
#[derive(Debug, Clone)]
pub struct Accepted {
    channel: ChannelName,
    list: Arc<UpdateList>,
    digest: Digest,
    wheels: Arc<[Wheel]>,
}

impl Accepted {
    /// Judges a list, the digest of whose payload is `digest`. `seen` is the newest list accepted before;
    /// `wall` what the device's clock says, if it has one that is set.
    ///
    /// # Errors
    /// Says why the list is refused.
    pub fn judge(
        list: UpdateList,
        digest: Digest,
        channel: &ChannelName,
        seen: Option<&Seen>,
        wall: Option<Timestamp>,
    ) -> Result<Accepted, Refusal> {
        let seen = seen.filter(|seen| seen.channel == *channel);
        let highest = seen.and_then(|seen| seen.sequence);
        match (list.release(), highest) {
            (Some(release), _) if release.channel != *channel => {
                return Err(Refusal::WrongChannel {
                    expected: channel.clone(),
                    found: release.channel.clone(),
                });
            }
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
        if let (Some(release), Some(now)) = (list.release(), wall)
            && let Some(expires) = release.expires.filter(|expires| *expires <= now)
        {
            return Err(Refusal::Expired { sequence: release.sequence, expires, now });
        }
        let wheels = wheels_for_us(&list).into();
        Ok(Accepted { channel: channel.clone(), list: Arc::new(list), digest, wheels })
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
            sequence: self.sequence(),
            version: self.version(),
            list: self.digest,
            refused: None,
        }
    }

    /// The wheels to install: one for each name.
    #[must_use]
    pub fn wheels(&self) -> &[Wheel] {
        &self.wheels
    }

    /// The files to install as they are.
    pub fn sources(&self) -> impl Iterator<Item = &Src> {
        self.list.entries().iter().filter_map(|entry| match entry {
            Entry::Src(src) => Some(src),
            _ => None,
        })
    }

    /// What the list holds that this agent skips, for people.
    pub fn skipped(&self) -> impl Iterator<Item = String> {
        self.list.entries().iter().filter_map(|entry| match entry {
            Entry::Firmware(image) => Some(format!("firmware `{} {}`", image.name, image.version)),
            Entry::Unknown(_) => Some(format!("an entry of unknown type `{}`", entry.kind())),
            _ => None,
        })
    }
}

/// A list may have several wheels of one name, for several platforms. This device takes one for any
/// platform if there is one, else the first.
fn wheels_for_us(list: &UpdateList) -> Vec<Wheel> {
    let for_any = |wheel: &Wheel| wheel.tag.as_deref().is_none_or(|tag| tag.ends_with("-none-any"));
    let mut chosen: BTreeMap<String, &Wheel> = BTreeMap::new();
    for entry in list.entries() {
        let Entry::Wheel(wheel) = entry else { continue };
        let place = chosen.entry(normalized_name(&wheel.name)).or_insert(wheel);
        if !for_any(place) && for_any(wheel) {
            *place = wheel;
        }
    }
    chosen.into_values().cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(list: &str, seen: Option<(Option<u64>, &str)>, now: Option<&str>) -> Result<Accepted, String> {
        let channel = ChannelName::new("dev").unwrap();
        let seen = seen.map(|(sequence, list)| Seen {
            channel: channel.clone(),
            sequence,
            version: None,
            list: Digest::of(list.as_bytes()),
            refused: None,
        });
        let now = now.map(|now| now.parse().unwrap());
        let digest = Digest::of(list.as_bytes());
        let list = UpdateList::parse(list.as_bytes()).map_err(|error| error.to_string())?;
        Accepted::judge(list, digest, &channel, seen.as_ref(), now).map_err(|error| error.word())
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
            sequence: Some(9),
            version: None,
            list: Digest::EMPTY,
            refused: None,
        };
        let list = UpdateList::parse(list.as_bytes()).unwrap();
        assert!(Accepted::judge(list, Digest::EMPTY, &other, Some(&seen), None).is_ok());
    }

    #[test]
    fn another_channels_list_is_refused() {
        let list = release(5).replace("dev", "stable");
        assert_eq!(judge(&list, None, None).unwrap_err(), "wrong-channel");
    }
}
