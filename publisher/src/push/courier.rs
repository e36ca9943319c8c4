//! The update of one device: what it says of itself → what to do next. No I/O, no clock.

use std::cmp::Ordering;

use mpypi_protocol::{
    ChannelName,
    list::Firmware,
    node::{Info, NodeError, Phase, State},
};
use serde_json::{Map, Value, json};

use super::{Became, Target};

/// How a device says it stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) version: String,
    pub(super) key: String,
    status: String,
    is_error: bool,
    done: u64,
    total: u64,
}

/// What follows from how a device stands.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Tell it where the image is.
    Order,
    /// Look again.
    Wait,
    /// It is over.
    End(Became),
}

/// The update of one device: what it ran before, and whether it was told.
#[derive(Debug, Default)]
pub(super) struct Courier {
    before: Option<String>,
    ordered: bool,
}

impl Courier {
    /// What follows from how the device stands, or why it did not say, when it should run `wanted`.
    pub(super) fn next(&mut self, wanted: &str, seen: Result<&Seen, &str>, is_late: bool) -> Next {
        let end = |reason: String| Next::End(Became::Failed { reason });
        let seen = match seen {
            Ok(seen) => seen,
            // It restarts.
            Err(_) if self.ordered && !is_late => return Next::Wait,
            Err(problem) => return end(problem.to_owned()),
        };
        let before = self.before.get_or_insert_with(|| seen.version.clone());
        if self.ordered {
            return match seen.status.as_str() {
                _ if seen.is_error => end(seen.status.clone()),
                "" if seen.version == wanted => {
                    Next::End(Became::Updated { from: before.clone(), to: seen.version.clone() })
                }
                _ if is_late => end(format!("it still runs {} and says `{}`", seen.version, seen.status)),
                _ => Next::Wait,
            };
        }
        if !seen.status.is_empty() && !seen.is_error {
            // Somebody else told it something, or we did before we were stopped.
            return match is_late {
                true => end(format!("it is busy and says `{}`", seen.status)),
                false => Next::Wait,
            };
        }
        if seen.is_newest(wanted) {
            return Next::End(Became::UpToDate { version: seen.version.clone() });
        }
        self.ordered = true;
        Next::Order
    }
}

impl Seen {
    /// Reads what projectMM's module `Firmware` says.
    pub(super) fn of(module: &Value) -> Seen {
        let control = |name: &str| {
            let controls = module["controls"].as_array().into_iter().flatten();
            controls.into_iter().find(|control| control["name"] == name).cloned().unwrap_or_default()
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let progress = control("update_pct");
        Seen {
            version: text(&control("version")["value"]),
            key: text(&control("firmware")["value"]),
            status: text(&module["status"]),
            is_error: module["severity"] == "error",
            done: progress["value"].as_u64().unwrap_or_default(),
            total: progress["total"].as_u64().unwrap_or_default(),
        }
    }

    /// Whether it runs `wanted`, or something newer.
    pub(super) fn is_newest(&self, wanted: &str) -> bool {
        compare(&self.version, wanted) != Ordering::Less
    }

    /// Whether something is under way there.
    pub(super) fn is_busy(&self) -> bool {
        !self.status.is_empty() && !self.is_error
    }

    /// What a node would say of itself.
    ///
    /// # Errors
    /// The device says more than a node may.
    pub(super) fn info(&self, target: &Target, channel: &ChannelName) -> Result<Info, NodeError> {
        let mut info = json!({
            "uname": { "sysname": "projectMM", "machine": self.key, "version": self.version },
            "versions": {},
            "channel": channel,
            "agent": "projectMM",
            "labels": target.labels,
            "firmware": self.version,
            "firmware_key": self.key,
        });
        if let Some(offset) = target.utc_offset {
            info["utc_offset"] = offset.into();
        }
        Info::parse(info.to_string().as_bytes())
    }
}

/// The newest image for this hardware.
pub(super) fn choose<'a>(images: &'a [Firmware], key: &str) -> Option<&'a Firmware> {
    images
        .iter()
        .filter(|image| image.fits(Some(key)))
        .max_by(|one, other| compare(&one.version, &other.version))
}

/// By semver 2.0.0, §11; versions that are none are as good as each other, and worse than any.
fn compare(one: &str, other: &str) -> Ordering {
    let parsed = [one, other].map(|version| semver::Version::parse(version).ok());
    match parsed {
        [Some(one), Some(other)] => one.cmp_precedence(&other),
        _ if one == other => Ordering::Equal,
        // Whatever it runs, it is to run what the channel has.
        _ => Ordering::Less,
    }
}

/// What a node would say of its update to `wanted`, of the release of this sequence.
pub(super) fn state(
    seen: Option<&Seen>,
    wanted: &str,
    sequence: Option<u64>,
    became: Option<&Became>,
) -> State {
    let seen = seen.cloned().unwrap_or_default();
    let (phase, version, error) = match became {
        Some(Became::Failed { reason }) => (Phase::Failed, wanted, Some(format!("push: {reason}"))),
        Some(_) => (Phase::Idle, &*seen.version, None),
        None => match seen.status.as_str() {
            "flashing" => (Phase::Installing, wanted, None),
            "rebooting" => (Phase::Restarting, wanted, None),
            _ => (Phase::Downloading, wanted, None),
        },
    };
    // Who waits runs something else, nobody knows of which release.
    let (sequence, held) = match became {
        Some(Became::Held { .. } | Became::Left) => (None, sequence),
        Some(Became::NoImage { .. }) => (None, None),
        _ => (sequence, None),
    };
    State {
        phase,
        sequence,
        version: Some(version.to_owned()).filter(|version| !version.is_empty()),
        done: seen.done,
        total: seen.total,
        error,
        attempt: 0,
        held,
        extra: Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(target: Option<&str>, version: &str) -> Firmware {
        Firmware {
            name: "x".into(),
            version: version.into(),
            target: target.map(str::to_owned),
            digest: mpypi_protocol::Digest::EMPTY,
            size: None,
            chunks: None,
            extra: Map::new(),
        }
    }

    fn says(version: &str, status: &str) -> Seen {
        let is_error = status.starts_with("error");
        Seen { version: version.into(), status: status.into(), is_error, ..Seen::default() }
    }

    #[test]
    fn a_device_takes_the_newest_image_for_its_board() {
        let images = [
            image(Some("esp32"), "3.0.0"),
            image(Some("esp32-eth"), "3.0.1-dev.2"),
            image(Some("esp32s3"), "9.0.0"),
        ];
        assert_eq!(choose(&images, "esp32-eth").unwrap().version, "3.0.1-dev.2");
        assert_eq!(choose(&images, "").unwrap().version, "9.0.0", "who does not say takes any");
        assert!(choose(&images, "esp8266").is_none());
    }

    #[test]
    fn a_device_is_told_once_and_watched_until_it_runs_what_it_should() {
        let mut courier = Courier::default();
        assert_eq!(courier.next("3.0.1", Ok(&says("3.0.0", "")), false), Next::Order);
        for status in ["starting", "downloading", "flashing", "rebooting"] {
            assert_eq!(courier.next("3.0.1", Ok(&says("3.0.0", status)), false), Next::Wait);
        }
        assert_eq!(courier.next("3.0.1", Err("it restarts"), false), Next::Wait);
        let updated = Became::Updated { from: "3.0.0".into(), to: "3.0.1".into() };
        assert_eq!(courier.next("3.0.1", Ok(&says("3.0.1", "")), false), Next::End(updated));
    }

    #[test]
    fn what_keeps_a_device_from_it_is_told() {
        let failed = |reason: &str| Next::End(Became::Failed { reason: reason.into() });
        let error = says("3.0.0", "error: incomplete download");
        let mut courier = Courier { before: None, ordered: true };
        assert_eq!(courier.next("3.0.1", Ok(&error), false), failed("error: incomplete download"));
        assert_eq!(courier.next("3.0.1", Err("gone"), true), failed("gone"));
        let old = says("3.0.0", "");
        assert_eq!(courier.next("3.0.1", Ok(&old), true), failed("it still runs 3.0.0 and says ``"));
        assert_eq!(Courier::default().next("3.0.1", Err("gone"), false), failed("gone"));
        let newer = Became::UpToDate { version: "3.1.0".into() };
        assert_eq!(Courier::default().next("3.0.1", Ok(&says("3.1.0", "")), false), Next::End(newer));
    }

    #[test]
    fn a_device_that_was_told_before_is_waited_for_and_not_told_again() {
        let mut courier = Courier::default();
        let busy = says("3.0.0", "downloading");
        assert_eq!(courier.next("3.0.1", Ok(&busy), false), Next::Wait);
        let there = Became::UpToDate { version: "3.0.1".into() };
        assert_eq!(courier.next("3.0.1", Ok(&says("3.0.1", "")), false), Next::End(there));
        let late = Courier::default().next("3.0.1", Ok(&busy), true);
        assert_eq!(late, Next::End(Became::Failed { reason: "it is busy and says `downloading`".into() }));
        let failed = says("3.0.0", "error: ota begin ESP_FAIL");
        assert_eq!(Courier::default().next("3.0.1", Ok(&failed), false), Next::Order, "it is tried again");
    }

    #[test]
    fn versions_that_are_none_are_compared_as_texts_and_replaced() {
        assert!(says("build 7", "").is_newest("build 7"));
        assert!(!says("build 8", "").is_newest("build 7"));
        assert!(!says("", "").is_newest("3.0.1"));
        assert!(says("3.0.1", "").is_newest("3.0.1-dev.7"));
    }

    #[test]
    fn a_rollout_counts_a_device_as_it_counts_a_node() {
        let seen = says("3.0.0", "");
        let held = state(Some(&seen), "3.0.1", Some(4), Some(&Became::Held { until: None }));
        assert_eq!((held.phase, held.sequence, held.held), (Phase::Idle, None, Some(4)));
        let updated = Became::Updated { from: "3.0.0".into(), to: "3.0.1".into() };
        let done = state(Some(&says("3.0.1", "")), "3.0.1", Some(4), Some(&updated));
        assert_eq!((done.phase, done.sequence, done.held), (Phase::Idle, Some(4), None));
        let failed = Became::Failed { reason: "no".into() };
        let failed = state(Some(&seen), "3.0.1", Some(4), Some(&failed));
        assert_eq!((failed.phase, failed.sequence), (Phase::Failed, Some(4)));
    }
}
