//! Rollouts: whose turn it is to take a release. Each node decides for itself, from what is signed.
//!
//! `rollout` in a `release` entry holds:
//!
//! | key | value |
//! |---|---|
//! | `id` | 16 hexadecimal digits, lowercase: the same through all steps of one rollout |
//! | `percent` | how many of the nodes, from 0 to 100 with at most two decimals: a text or a number |
//! | `only` | a [query](crate::query) on what a node says of itself; all nodes if absent |
//! | `not-before` | a time in UTC; nobody starts earlier |
//! | `window` | `HH:MM-HH:MM`: the time of day to start in, by the node's clock in UTC, or with `utc_offset` in its info by that |
//! | `jitter` | each node waits for a time of its own from 0 to so many seconds |
//! | `optional` | `true`: each node waits for an order, `{"type":"install"}` on its `cmd` topic |
//! | `base` | the sequence of the release that a node with nothing installed takes while it is not its turn |
//!
//! The **position** of a node is the first 4 bytes, most significant first, of SHA-256(`id`, line feed, node name). It
//! is among the first `p` hundredths of a percent iff `position * 10000 < p << 32`; so who is in at some percentage is in at
//! every greater one. The next 4 bytes decide its jitter: the first would start those of an early step all at once.
//!
//! A node that runs a release of the same rollout is in, whatever the query says: what it asks for may have changed by
//! the update. An unreadable `rollout` holds every node. Without a clock `window` and `not-before` mean nothing.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::{
    Digest, limits,
    list::{Release, is_utc_time},
    query::{Facts, Query, QueryError},
};

/// The key of a release that holds the rollout.
pub const KEY: &str = "rollout";

/// What the release says about whose turn it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    /// Which rollout.
    pub id: RolloutId,
    /// How many of the nodes.
    pub percent: Percent,
    /// Which nodes.
    pub only: Option<Query>,
    /// When at the earliest.
    pub not_before: Option<Timestamp>,
    /// At which time of day.
    pub window: Option<Window>,
    /// Each node waits for a time of its own, up to so many seconds.
    pub jitter: u32,
    /// Whether each node waits for an order.
    pub consent: Consent,
    /// The sequence of the release for nodes with nothing installed.
    pub base: Option<u64>,
}

/// Whether a node installs a release by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    /// It does.
    Implied,
    /// It waits for an order.
    Ordered,
}

/// Names a rollout.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RolloutId(String);

/// A share of the nodes, in hundredths of a percent, at most 10000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Percent(u16);

/// A time of day, in minutes, from a start to an end that is not part of it. The end may be on the next day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    start: u16,
    end: u16,
}

/// When a node is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Seconds since the node saw the list.
    pub since: u64,
    /// What its clock says, if it is set.
    pub wall: Option<Timestamp>,
    /// How far its local time is ahead of UTC, in minutes.
    pub utc_offset: i32,
}

/// Why a text or value is no part of a rollout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RolloutError {
    /// Not a JSON object.
    #[error("`rollout` is no object")]
    NotAnObject,
    /// A key that must be there is not.
    #[error("`{0}` is missing in `rollout`")]
    Missing(&'static str),
    /// Not a [`RolloutId`].
    #[error("`id` of a rollout is 16 lowercase hexadecimal digits")]
    Id,
    /// Not a [`Percent`].
    #[error("a percentage is a number from 0 to 100 with at most two decimals, as `2.5`")]
    Percent,
    /// Not a [`Query`].
    #[error("`only`: {0}")]
    Query(#[from] QueryError),
    /// Not a [`Window`].
    #[error("a window is two times of day that differ, as `22:00-04:00`")]
    Window,
    /// A key with a value that it cannot have.
    #[error("`{key}` of a rollout should be {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// What its value should be.
        expected: &'static str,
    },
}

impl Rollout {
    /// Everybody at once, under this id.
    #[must_use]
    pub fn new(id: RolloutId) -> Rollout {
        Rollout {
            id,
            percent: Percent::ALL,
            only: None,
            not_before: None,
            window: None,
            jitter: 0,
            consent: Consent::Implied,
            base: None,
        }
    }

    /// The rollout that `release` says, if it says any.
    ///
    /// # Errors
    /// It says one that cannot be read: then no node may take the release.
    pub fn of(release: &Release) -> Result<Option<Rollout>, RolloutError> {
        release.extra.get(KEY).map(Rollout::read).transpose()
    }

    /// Reads the value of `rollout`. Keys nobody knows are ignored.
    ///
    /// # Errors
    /// See [`RolloutError`].
    pub fn read(value: &Value) -> Result<Rollout, RolloutError> {
        let map = value.as_object().ok_or(RolloutError::NotAnObject)?;
        let wrong = |key, expected| RolloutError::Value { key, expected };
        let text = |key, expected| match map.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or(wrong(key, expected)),
        };
        let number = |key, most: u64, expected| match map.get(key) {
            None => Ok(None),
            Some(value) => {
                value.as_u64().filter(|number| *number <= most).map(Some).ok_or(wrong(key, expected))
            }
        };
        let id = map.get("id").ok_or(RolloutError::Missing("id"))?;
        let time = "a time in UTC such as `2026-11-20T10:00:00Z`";
        Ok(Rollout {
            id: id.as_str().ok_or(RolloutError::Id)?.parse()?,
            percent: Percent::read(map.get("percent").ok_or(RolloutError::Missing("percent"))?)?,
            only: text("only", "a text")?.map(str::parse).transpose()?,
            not_before: match text("not-before", time)? {
                None => None,
                Some(text) => {
                    let found = is_utc_time(text).then(|| text.parse().ok()).flatten();
                    Some(found.ok_or(wrong("not-before", time))?)
                }
            },
            window: text("window", "a text such as `22:00-04:00`")?.map(str::parse).transpose()?,
            jitter: number("jitter", limits::JITTER.into(), "a whole number of seconds, at most a day")?
                .unwrap_or_default() as u32,
            consent: match map.get("optional").map(Value::as_bool) {
                None | Some(Some(false)) => Consent::Implied,
                Some(Some(true)) => Consent::Ordered,
                Some(None) => return Err(wrong("optional", "`true` or `false`")),
            },
            base: number("base", u64::MAX, "a sequence number")?,
        })
    }

    /// The rollout as the value of `rollout`.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut map = Map::new();
        map.insert("id".into(), self.id.to_string().into());
        map.insert("percent".into(), self.percent.to_string().into());
        let mut put = |key: &str, value: Option<Value>| {
            map.extend(value.map(|value| (key.to_owned(), value)));
        };
        put("only", self.only.as_ref().map(|only| only.as_str().into()));
        put("not-before", self.not_before.map(|time| time.to_string().into()));
        put("window", self.window.map(|window| window.to_string().into()));
        put("jitter", (self.jitter > 0).then(|| self.jitter.into()));
        put("optional", (self.consent == Consent::Ordered).then(|| true.into()));
        put("base", self.base.map(Value::from));
        Value::Object(map)
    }

    /// Whether it is the turn of a node of which `facts` are known.
    #[must_use]
    pub fn admits(&self, facts: &Facts<'_>) -> bool {
        self.percent.admits(self.id.position(&facts.node))
            && self.only.as_ref().is_none_or(|only| only.holds(facts))
    }

    /// How many seconds `node` has to wait at `moment` until it may start; 0: it may start now.
    ///
    /// It starts its own share of `jitter` after it saw the list, or after `not-before`, or after the window opened,
    /// whichever is latest; with a window the share is taken of what is left of it.
    #[must_use]
    pub fn wait(&self, node: &str, moment: Moment) -> u64 {
        let delay = self.id.share(node, self.jitter);
        let Some(now) = moment.wall.map(Timestamp::as_second) else {
            return delay.saturating_sub(moment.since);
        };
        let seen = now.saturating_sub_unsigned(moment.since);
        // A fraction of a second is not over yet.
        let not_before =
            self.not_before.map(|time| time.as_second() + i64::from(time.subsec_nanosecond() > 0));
        let earliest = not_before.unwrap_or(seen).max(seen);
        let Some(window) = self.window else {
            return earliest.saturating_add_unsigned(delay).saturating_sub(now).max(0).unsigned_abs();
        };
        let start = |from: i64| {
            let opens = from + i64::from(window.opens_in(from, moment.utc_offset));
            let left = window.closes_in(opens, moment.utc_offset);
            opens.saturating_add_unsigned(delay % u64::from(left.max(1)))
        };
        match start(earliest) {
            planned if planned > now => planned.abs_diff(now),
            _ if window.opens_in(now, moment.utc_offset) == 0 => 0,
            // It slept through the window.
            _ => start(now).abs_diff(now),
        }
    }
}

impl RolloutId {
    /// The id of so many bits.
    #[must_use]
    pub fn from_bits(bits: u64) -> RolloutId {
        RolloutId(format!("{bits:016x}"))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where `node` stands among all nodes, as a fraction of 2³².
    #[must_use]
    pub fn position(&self, node: &str) -> u32 {
        self.words(node)[0]
    }

    /// The share of `most` seconds that `node` waits: 0 to `most`.
    #[must_use]
    pub fn share(&self, node: &str, most: u32) -> u64 {
        (u64::from(self.words(node)[1]) * (u64::from(most) + 1)) >> 32
    }

    fn words(&self, node: &str) -> [u32; 2] {
        let digest = Digest::of(format!("{self}\n{node}").as_bytes());
        let bytes = digest.as_bytes();
        [0, 4].map(|at| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
    }
}

impl FromStr for RolloutId {
    type Err = RolloutError;

    fn from_str(text: &str) -> Result<RolloutId, RolloutError> {
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        match text.len() == 16 && text.bytes().all(digit) {
            true => Ok(RolloutId(text.to_owned())),
            false => Err(RolloutError::Id),
        }
    }
}

impl fmt::Display for RolloutId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Percent {
    /// Nobody.
    pub const NONE: Percent = Percent(0);
    /// Everybody.
    pub const ALL: Percent = Percent(10_000);

    /// So many hundredths of a percent; `None` if they are more than all.
    #[must_use]
    pub fn from_hundredths(hundredths: u16) -> Option<Percent> {
        (hundredths <= Self::ALL.0).then_some(Percent(hundredths))
    }

    /// In hundredths of a percent.
    #[must_use]
    pub fn hundredths(self) -> u16 {
        self.0
    }

    /// Whether a node at `position` is among the first so many.
    #[must_use]
    pub fn admits(self, position: u32) -> bool {
        u64::from(position) * u64::from(Self::ALL.0) < u64::from(self.0) << 32
    }

    /// A number is read as the nearest hundredth, and must be one but for the error of a device's small floats.
    fn read(value: &Value) -> Result<Percent, RolloutError> {
        match value {
            Value::String(text) => text.parse(),
            Value::Number(number) => {
                let hundredths = number.as_f64().ok_or(RolloutError::Percent)? * 100.0;
                let nearest = hundredths.round();
                match (hundredths - nearest).abs() <= 0.01 && (0.0..=10_000.0).contains(&nearest) {
                    true => Ok(Percent(nearest as u16)),
                    false => Err(RolloutError::Percent),
                }
            }
            _ => Err(RolloutError::Percent),
        }
    }
}

impl FromStr for Percent {
    type Err = RolloutError;

    /// Reads `2.5`: one to three digits, and perhaps a point and one or two more.
    fn from_str(text: &str) -> Result<Percent, RolloutError> {
        let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |text: &str, most| {
            (1..=most).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
        };
        if !digits(whole, 3) || !digits(decimals, 2) {
            return Err(RolloutError::Percent);
        }
        let hundredths = format!("{whole}{decimals:0<2}").parse().ok().and_then(Percent::from_hundredths);
        hundredths.ok_or(RolloutError::Percent)
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, decimals) = (self.0 / 100, self.0 % 100);
        match decimals {
            0 => write!(f, "{whole}"),
            _ if decimals.is_multiple_of(10) => write!(f, "{whole}.{}", decimals / 10),
            _ => write!(f, "{whole}.{decimals:02}"),
        }
    }
}

/// Seconds of a day.
const DAY: u32 = 24 * 60 * 60;

impl Window {
    /// In how many seconds the window opens, when UTC is `now`, in seconds since 1970, and local time `utc_offset`
    /// minutes ahead of it; 0 while it is open.
    #[must_use]
    pub fn opens_in(self, now: i64, utc_offset: i32) -> u32 {
        match self.closes_in(now, utc_offset) {
            0 => until(self.start, now, utc_offset),
            _ => 0,
        }
    }

    /// In how many seconds it closes; 0 while it is closed.
    #[must_use]
    pub fn closes_in(self, now: i64, utc_offset: i32) -> u32 {
        let (opens, closes) = (until(self.start, now, utc_offset), until(self.end, now, utc_offset));
        // Open: the end comes before the next start. At the start itself, the end follows.
        match closes != 0 && (opens == 0 || closes < opens) {
            true => closes,
            false => 0,
        }
    }
}

/// The seconds from `now` to the next `minute` of a day.
fn until(minute: u16, now: i64, utc_offset: i32) -> u32 {
    let local = now.saturating_add(i64::from(utc_offset) * 60).rem_euclid(DAY.into()) as u32;
    (u32::from(minute) * 60 + DAY - local) % DAY
}

impl FromStr for Window {
    type Err = RolloutError;

    fn from_str(text: &str) -> Result<Window, RolloutError> {
        let minute = |text: &str| {
            let (hours, minutes) = text.split_once(':')?;
            let number = |text: &str, below: u16| -> Option<u16> {
                let digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
                text.parse().ok().filter(|number| digits && *number < below)
            };
            Some(number(hours, 24)? * 60 + number(minutes, 60)?)
        };
        let (start, end) = text.split_once('-').ok_or(RolloutError::Window)?;
        match (minute(start), minute(end)) {
            (Some(start), Some(end)) if start != end => Ok(Window { start, end }),
            _ => Err(RolloutError::Window),
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Window { start, end } = self;
        write!(f, "{:02}:{:02}-{:02}:{:02}", start / 60, start % 60, end / 60, end % 60)
    }
}

macro_rules! as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

as_text!(RolloutId);
as_text!(Percent);
as_text!(Window);
as_text!(Query);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_in_stays_in_and_nobody_is_in_at_none() {
        let id = RolloutId::from_bits(7);
        for node in 0..1000 {
            let position = id.position(&format!("node-{node}"));
            let first = (0..=10_000).find(|p| Percent(*p).admits(position)).unwrap();
            assert!(first > 0 && (first..=10_000).all(|p| Percent(p).admits(position)));
        }
        assert!(Percent::ALL.admits(u32::MAX) && !Percent(9999).admits(u32::MAX) && !Percent::NONE.admits(0));
    }

    #[test]
    fn about_as_many_are_in_as_the_percentage_says() {
        let id = RolloutId::from_bits(42);
        let count = |p| (0..10_000).filter(|n| Percent(p).admits(id.position(&format!("n{n}")))).count();
        assert!((50..=150).contains(&count(100)) && (4800..=5200).contains(&count(5000)));
    }

    #[test]
    fn the_nodes_of_an_early_step_spread_over_all_of_the_jitter() {
        let id = RolloutId::from_bits(42);
        let early =
            (0..10_000).map(|n| format!("n{n}")).filter(|node| Percent(100).admits(id.position(node)));
        let late = early.filter(|node| id.share(node, 600) > 300).count();
        assert!((20..=80).contains(&late), "{late}");
    }

    #[test]
    fn a_rollout_survives_being_written_and_read() {
        let mut rollout = Rollout::new(RolloutId::from_bits(0xfeed));
        assert_eq!(Rollout::read(&rollout.to_value()), Ok(rollout.clone()));
        rollout.percent = Percent(250);
        rollout.only = Some("label.room = kitchen".parse().unwrap());
        rollout.not_before = Some("2026-12-01T00:00:00Z".parse().unwrap());
        rollout.window = Some("22:00-04:30".parse().unwrap());
        (rollout.jitter, rollout.consent, rollout.base) = (600, Consent::Ordered, Some(41));
        assert_eq!(Rollout::read(&rollout.to_value()), Ok(rollout));
    }

    #[test]
    fn a_start_is_always_inside_the_window() {
        let mut rollout = Rollout::new(RolloutId::from_bits(1));
        rollout.window = Some("22:00-22:10".parse().unwrap());
        rollout.jitter = 86_400;
        for node in 0..200 {
            let node = format!("n{node}");
            for minute in [0, 7 * 60, 22 * 60 + 3, 23 * 60] {
                let now = i64::from(minute) * 60;
                let at = |since, now| Moment { since, wall: Timestamp::from_second(now).ok(), utc_offset: 0 };
                let wait = rollout.wait(&node, at(0, now));
                let start = now + wait as i64;
                assert_eq!(rollout.window.unwrap().opens_in(start, 0), 0, "{node} starts at {start}");
                assert_eq!(rollout.wait(&node, at(wait, start)), 0);
            }
        }
    }
}
