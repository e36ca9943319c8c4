//! What there is for devices that know no lists, and whose turn it is: what an agent decides for itself from the list is
//! decided here for each of them, by the same rules. No I/O, no clock.

use jiff::{SignedDuration, Timestamp};
use mpypi_protocol::{
    ChannelName, Entry, Rollout, UpdateList,
    list::Firmware,
    node::Info,
    query::Facts,
    rollout::{Consent, Moment},
};

use super::{Orders, PushError, Target};

/// What a channel has for devices.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) images: Vec<Firmware>,
    pub(super) sequence: Option<u64>,
    rollout: Option<Rollout>,
    /// When the list was made: for who has no memory, that is when it was seen.
    made: Timestamp,
}

/// When a device may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// At this time, which may be over.
    At(Timestamp),
    /// Not by this list, or only when somebody orders it.
    Never,
}

impl Offer {
    /// What `list` has, at this time.
    ///
    /// # Errors
    /// There is no firmware, the list has expired, or nobody can tell whose turn it is.
    pub(super) fn of(list: &UpdateList, channel: &ChannelName, now: Timestamp) -> Result<Offer, PushError> {
        let images: Vec<_> = list
            .entries()
            .iter()
            .filter_map(|entry| match entry {
                Entry::Firmware(image) if !image.is_optional() => Some(image.clone()),
                _ => None,
            })
            .collect();
        if images.is_empty() {
            return Err(PushError::NoFirmware(channel.clone()));
        }
        let release = list.release();
        if let Some(expires) = release.and_then(|release| release.expires).filter(|expires| *expires <= now) {
            return Err(PushError::Expired { channel: channel.clone(), expires });
        }
        Ok(Offer {
            images,
            sequence: release.map(|release| release.sequence),
            rollout: release.map_or(Ok(None), Rollout::of)?,
            made: release.and_then(|release| release.created).unwrap_or(now).min(now),
        })
    }

    /// When it is the turn of a device that says `info` of itself.
    pub(super) fn turn(&self, target: &Target, info: &Info, orders: Orders, now: Timestamp) -> Turn {
        let Some(rollout) = &self.rollout else { return Turn::At(now) };
        let node = target.node.as_str();
        let running = (None, Some(info.uname.version.as_str()));
        if !rollout.admits(&Facts::of(node, info, running)) {
            return Turn::Never;
        }
        // Who is ordered does not wait for its time of day, as an agent does not.
        let ordered = Rollout { window: None, jitter: 0, ..rollout.clone() };
        let rollout = match (orders, rollout.consent) {
            (Orders::Given, _) => &ordered,
            (Orders::None, Consent::Ordered) => return Turn::Never,
            (Orders::None, Consent::Implied) => rollout,
        };
        let moment = Moment {
            since: now.duration_since(self.made).as_secs().max(0).unsigned_abs(),
            wall: Some(now),
            utc_offset: target.utc_offset.unwrap_or_default(),
        };
        let wait = i64::try_from(rollout.wait(node, moment)).unwrap_or(i64::MAX);
        Turn::At(now.checked_add(SignedDuration::from_secs(wait)).unwrap_or(Timestamp::MAX))
    }

    /// Where a device stands among all: who is in first has the lowest. Without a rollout they stand as they were named.
    pub(super) fn position(&self, target: &Target) -> u32 {
        self.rollout.as_ref().map_or(0, |rollout| rollout.id.position(target.node.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::NodeId;
    use serde_json::{Value, json};

    use super::*;
    use crate::push::courier::Seen;

    const MADE: &str = "2026-12-01T12:00:00Z";

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn offer(rollout: Value) -> Result<Offer, PushError> {
        let mut release = json!({"type": "release", "channel": "dev", "sequence": 4, "version": "3.0.1",
            "created": MADE, "expires": "2027-01-01T00:00:00Z"});
        if !rollout.is_null() {
            release["rollout"] = rollout;
        }
        let list = json!([release, {"type": "firmware", "name": "x", "version": "3.0.1", "target": "esp32",
            "pkg_sha256": mpypi_protocol::Digest::EMPTY.to_string(), "size": 0}]);
        let list = UpdateList::parse(list.to_string().as_bytes()).unwrap();
        Offer::of(&list, &ChannelName::new("dev").unwrap(), time(MADE))
    }

    fn target(name: &str, labels: &[(&str, &str)], utc_offset: Option<i32>) -> Target {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Target { node: NodeId::new(name).unwrap(), url: "http://x".into(), labels, utc_offset }
    }

    /// The turn of a device that runs 3.0.0, at a time.
    fn turn(offer: &Offer, target: &Target, orders: Orders, now: &str) -> Turn {
        let controls = json!([{"name": "version", "value": "3.0.0"}, {"name": "firmware", "value": "esp32"}]);
        let seen = Seen::of(&json!({ "controls": controls }));
        let info = seen.info(target, &ChannelName::new("dev").unwrap()).unwrap();
        offer.turn(target, &info, orders, time(now))
    }

    #[test]
    fn without_a_rollout_everybody_starts_in_the_order_of_the_command_line() {
        let offer = offer(Value::Null).unwrap();
        let lamp = target("lamp", &[], None);
        assert_eq!(turn(&offer, &lamp, Orders::None, MADE), Turn::At(time(MADE)));
        assert_eq!(offer.position(&lamp), offer.position(&target("sign", &[], None)));
    }

    #[test]
    fn a_percentage_admits_the_very_devices_that_an_agent_of_their_name_would_find_itself_among() {
        let rollout = |percent: u32| offer(json!({"id": "0123456789abcdef", "percent": percent})).unwrap();
        let devices: Vec<_> = (0..200).map(|n| target(&format!("device-{n}"), &[], None)).collect();
        let admitted = |percent| {
            let offer = rollout(percent);
            let mut admitted: Vec<_> = devices
                .iter()
                .filter(|device| turn(&offer, device, Orders::Given, MADE) != Turn::Never)
                .collect();
            admitted.sort_by_key(|device| offer.position(device));
            admitted.into_iter().map(|device| device.node.clone()).collect::<Vec<_>>()
        };
        let (few, many, all) = (admitted(10), admitted(50), admitted(100));
        assert!((5..40).contains(&few.len()) && (70..130).contains(&many.len()) && all.len() == 200);
        assert_eq!(many[..few.len()], few, "who is in at 10% comes first at 50%, too");
        assert_eq!(all[..many.len()], many);
        assert!(admitted(0).is_empty());
    }

    #[test]
    fn queries_windows_jitter_and_not_before_hold_as_they_do_for_agents() {
        let id = "0123456789abcdef";
        let (kitchen, hall) = (target("a", &[("room", "kitchen")], None), target("b", &[], None));
        let only =
            offer(json!({"id": id, "percent": 100, "only": "label.room = kitchen and version < 3.0.1"}));
        let only = only.unwrap();
        assert_eq!(turn(&only, &kitchen, Orders::None, MADE), Turn::At(time(MADE)));
        assert_eq!(
            turn(&only, &hall, Orders::Given, MADE),
            Turn::Never,
            "an order is not for who is not meant"
        );

        let night = offer(json!({"id": id, "percent": 100, "window": "22:00-04:00"})).unwrap();
        assert_eq!(turn(&night, &hall, Orders::None, MADE), Turn::At(time("2026-12-01T22:00:00Z")));
        let ahead = target("b", &[], Some(120));
        assert_eq!(turn(&night, &ahead, Orders::None, MADE), Turn::At(time("2026-12-01T20:00:00Z")));
        assert_eq!(turn(&night, &hall, Orders::Given, MADE), Turn::At(time(MADE)));

        let jitter = offer(json!({"id": id, "percent": 100, "jitter": 3600})).unwrap();
        let Turn::At(due) = turn(&jitter, &hall, Orders::None, MADE) else { panic!("it is in") };
        assert!(due > time(MADE) && due <= time("2026-12-01T13:00:00Z"), "{due}");
        let later = time("2026-12-01T12:00:10Z");
        assert_eq!(
            turn(&jitter, &hall, Orders::None, "2026-12-01T12:00:10Z"),
            Turn::At(due.max(later)),
            "whoever asks, and however often, it is due at the same time"
        );
        let until = json!({"id": id, "percent": 100, "not-before": "2026-12-02T06:00:00Z"});
        let until = offer(until).unwrap();
        for orders in [Orders::None, Orders::Given] {
            assert_eq!(turn(&until, &hall, orders, MADE), Turn::At(time("2026-12-02T06:00:00Z")));
        }
        let optional = offer(json!({"id": id, "percent": 100, "optional": true})).unwrap();
        assert_eq!(turn(&optional, &hall, Orders::None, MADE), Turn::Never);
        assert_eq!(turn(&optional, &hall, Orders::Given, MADE), Turn::At(time(MADE)));
    }

    #[test]
    fn a_list_that_nobody_may_take_is_pushed_to_nobody() {
        assert!(matches!(offer(json!({"id": "x", "percent": 100})), Err(PushError::Rollout(_))));
        let expired = json!([{"type": "release", "channel": "dev", "sequence": 1, "version": "1", "expires": MADE},
            {"type": "firmware", "name": "x", "version": "1", "pkg_sha256": mpypi_protocol::Digest::EMPTY.to_string()}]);
        let expired = UpdateList::parse(expired.to_string().as_bytes()).unwrap();
        let channel = ChannelName::new("dev").unwrap();
        assert!(matches!(Offer::of(&expired, &channel, time(MADE)), Err(PushError::Expired { .. })));
        assert!(matches!(
            Offer::of(&UpdateList::default(), &channel, time(MADE)),
            Err(PushError::NoFirmware(_))
        ));
    }
}
