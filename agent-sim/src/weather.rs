//! What befalls a node: decided by a profile, a seed and the node's number, and by nothing else.
//!
//! Events and times in, what happens out; no clock, no socket. The same seed brings the same fate. On a real network
//! the moments at which it strikes differ from run to run; in the simulation of this crate's tests they do not.

mod intruder;

use std::{collections::BTreeMap, time::Duration};

use bytes::{Bytes, BytesMut};
use mpypi_protocol::Digest;

pub use intruder::{Attack, Cargo, Lists};

use self::intruder::Intruder;
use crate::{
    device::{Agent, Hardware},
    fleet::{
        history::History,
        profile::{Abi, Profile, Share},
    },
    limits,
};

/// How long an overtaken message is held back, at most.
const HELD_BACK: Duration = Duration::from_secs(2);

/// One node's share of a bad day.
#[derive(Debug, Clone)]
pub struct Weather {
    rng: fastrand::Rng,
    profile: Profile,
    /// When all faults end, if they do.
    calm_at: Option<Duration>,
    /// When the node is switched on.
    join: Duration,
    platform: Option<String>,
    abi: Option<Abi>,
    agent: Option<Agent>,
    history: History,
    bandwidth: Option<u64>,
    /// Whether it reads no faster than it takes in.
    slow: bool,
    sleeps: bool,
    cuts: u32,
    free: Option<u64>,
    /// Whether the node was started with little room.
    cramped: bool,
    clock: Clock,
    crashes: Crashes,
    /// When everything sent to the node before has arrived.
    busy_until: Duration,
    /// The release that crashed last.
    crashed: Option<Digest>,
    intruder: Option<Box<Intruder>>,
    /// When the node gives its connection up, on which a message does not end.
    stuck_until: Option<Duration>,
}

/// What a node's clock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clock {
    Right,
    Ahead(Duration),
    Behind(Duration),
    None,
}

/// What the application does after an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Crashes {
    Never,
    Once,
    Always,
}

/// What befell a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// Its power failed while it wrote.
    PowerCut,
    /// Its application crashed before it confirmed a release.
    Crash,
    /// It went to sleep.
    Sleep,
}

/// Why a connection ends that nobody ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It breaks.
    Break,
    /// The node goes to sleep for so long.
    Sleep(Duration),
}

/// A message on its way to the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Falling {
    /// When it arrives.
    pub at: Duration,
    /// What arrives.
    pub payload: Bytes,
}

/// What becomes of a message for a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fate {
    /// Where it arrives: never, once or twice.
    pub falling: Vec<Falling>,
    /// What an intruder did to it.
    pub attack: Option<Attack>,
}

/// When the power fails, in operations of the flash, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// At which operation that changes something, counted from now.
    pub at: u64,
    /// Whether half of what was being written arrives.
    pub torn: bool,
    /// Whether what was not synced is lost.
    pub loses: bool,
}

impl Weather {
    /// Nothing happens.
    #[must_use]
    pub fn calm() -> Weather {
        Weather::draw(&Profile::default(), 0, 0, None)
    }

    /// What befalls node `number` of a fleet with this seed, until `calm_at`.
    #[must_use]
    pub fn draw(profile: &Profile, seed: u64, number: u64, calm_at: Option<Duration>) -> Weather {
        // Neighbours' numbers must not have neighbours' fates.
        let own = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ number.rotate_left(32);
        let mut rng = fastrand::Rng::with_seed(own);
        let rng = &mut rng;
        let join = Duration::from_micros(rng.u64(0..=micros(profile.join.0)));
        let mut place = rng.f64();
        let platform = profile.platforms.iter().find(|(_, share)| {
            place -= share.0;
            place < 0.0
        });
        let bandwidth = profile.link.bandwidth.map(|span| span.draw(rng).max(1));
        let sleeps = profile.sleep.nodes.draw(rng);
        let cuts = if profile.power.nodes.draw(rng) { profile.power.cuts } else { 0 };
        let free = profile.flash.nodes.draw(rng).then(|| profile.flash.free.draw(rng));
        let by = profile.clock.by.draw(rng);
        let clock = match (profile.clock.none.draw(rng), profile.clock.nodes.draw(rng), rng.bool()) {
            (true, ..) => Clock::None,
            (_, true, true) => Clock::Ahead(by),
            (_, true, false) => Clock::Behind(by),
            _ => Clock::Right,
        };
        let crashes = match (profile.application.broken.draw(rng), profile.application.crashes.draw(rng)) {
            (true, _) => Crashes::Always,
            (_, true) => Crashes::Once,
            _ => Crashes::Never,
        };
        let mut place = rng.f64();
        let abi = profile.abi.iter().find(|(_, share)| {
            place -= share.0;
            place < 0.0
        });
        let (used, owned) = (profile.history.used.0, profile.history.owned.0);
        let history = match rng.f64() {
            place if place < used => History::Used,
            place if place < used + owned => History::Owned,
            _ => History::Blank,
        };
        let slow = profile.slow.nodes.draw(rng);
        let slowly = profile.slow.bandwidth.draw(rng).max(1);
        let agent = match rng.f64() {
            place if place < profile.agents.old.0 => Some(Agent::Old),
            place if place < profile.agents.old.0 + profile.agents.mpy_blox.0 => Some(Agent::MpyBlox),
            _ => None,
        };
        let weather = Weather {
            platform: platform.map(|(name, _)| name.clone()),
            abi: abi.map(|(abi, _)| *abi),
            agent,
            history,
            // Of ten thousand nodes, each has what it is to itself, and no copy of what all could be.
            profile: Profile { platforms: BTreeMap::new(), abi: BTreeMap::new(), ..profile.clone() },
            rng: rng.clone(),
            calm_at,
            join,
            bandwidth: if slow { Some(slowly) } else { bandwidth },
            slow,
            sleeps,
            cuts,
            free,
            cramped: false,
            clock,
            crashes,
            busy_until: Duration::ZERO,
            crashed: None,
            // Dice of his own: whether he is there changes nothing about what else befalls the node.
            intruder: Intruder::new(profile.intruder, fastrand::Rng::with_seed(!own)),
            stuck_until: None,
        };
        match agent {
            Some(Agent::MpyBlox) => weather.gentle(),
            _ => weather,
        }
    }

    /// The same without what a device that verifies nothing and writes in place does not outlive.
    fn gentle(mut self) -> Weather {
        (self.profile.link.lost, self.profile.link.corrupted) = (Share(0.0), Share(0.0));
        (self.cuts, self.free, self.crashes) = (0, None, Crashes::Never);
        (self.clock, self.history, self.intruder) = (Clock::Right, History::Blank, None);
        self
    }

    /// The same for a node that can tell who made a list, or cannot.
    #[must_use]
    pub fn with_lists(mut self, lists: Lists) -> Weather {
        if let Some(intruder) = &mut self.intruder {
            intruder.set_lists(lists);
        }
        self
    }

    /// When the node is switched on.
    #[must_use]
    pub fn join(&self) -> Duration {
        self.join
    }

    /// What the node is made of, where the profile says so.
    #[must_use]
    pub fn hardware(&self, otherwise: Hardware) -> Hardware {
        Hardware {
            sysname: self.platform.clone().unwrap_or(otherwise.sysname),
            mpy: self.abi.map_or(otherwise.mpy, |abi| abi.0),
            agent: self.agent.unwrap_or(otherwise.agent),
        }
    }

    /// What the node had before.
    #[must_use]
    pub fn history(&self) -> History {
        self.history
    }

    /// What befalls it, in words that others share: `power cuts`, `sleeps` and so on; `none`, if nothing of its own does.
    #[must_use]
    pub fn faults(&self) -> Vec<&'static str> {
        let faults = [
            (self.cuts > 0, "power cuts"),
            (self.sleeps, "sleeps"),
            (self.slow, "reads slowly"),
            (self.free.is_some(), "full flash"),
            (self.clock == Clock::None, "no clock"),
            (matches!(self.clock, Clock::Ahead(_) | Clock::Behind(_)), "wrong clock"),
            (self.crashes == Crashes::Once, "crashes once"),
            (self.crashes == Crashes::Always, "broken"),
        ];
        let mut words: Vec<_> = faults.into_iter().filter(|(has, _)| *has).map(|(_, word)| word).collect();
        if words.is_empty() {
            words.push("none");
        }
        words
    }

    /// Until when the node, which reads slowly, leaves at its socket what comes.
    #[must_use]
    pub fn deaf_until(&self, now: Duration) -> Option<Duration> {
        (self.slow && !self.is_calm(now) && self.busy_until > now).then_some(self.busy_until)
    }

    /// How much room there is on the flash of a node that starts, where that is little.
    pub fn room(&mut self, now: Duration) -> Option<u64> {
        let room = self.free.filter(|_| !self.is_calm(now));
        self.cramped = room.is_some();
        room
    }

    /// When the faults end, if they do.
    #[must_use]
    pub fn calm_at(&self) -> Option<Duration> {
        self.calm_at
    }

    /// What the node's clock says when it is `right`, in seconds since 1970.
    #[must_use]
    pub fn clock(&self, right: i64) -> Option<i64> {
        let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        match self.clock {
            Clock::Right => Some(right),
            Clock::Ahead(by) => Some(right.saturating_add(seconds(by))),
            Clock::Behind(by) => Some(right.saturating_sub(seconds(by))),
            Clock::None => None,
        }
    }

    /// How long the connection made at `now` lasts, and what ends it; `None`: as long as it likes.
    pub fn next_turn(&mut self, now: Duration) -> Option<(Duration, Turn)> {
        self.busy_until = now;
        self.stuck_until = None;
        // When somebody has made room, the node starts again.
        let relief =
            self.cramped.then_some(self.calm_at).flatten().map(|at| (at, Turn::Sleep(Duration::ZERO)));
        if self.is_calm(now) {
            return relief;
        }
        let rng = &mut self.rng;
        let breaks = self.profile.link.disconnects.map(|mean| {
            // Exponentially distributed: breaks come without memory.
            let time = mean.0.as_secs_f64() * -(1.0 - rng.f64()).ln();
            (now + Duration::from_secs_f64(time.min(1e9)), Turn::Break)
        });
        let sleeps = self.sleeps.then(|| {
            let awake = self.profile.sleep.awake.draw(rng);
            (now + awake, Turn::Sleep(self.profile.sleep.asleep.draw(rng)))
        });
        breaks.into_iter().chain(sleeps).chain(relief).min_by_key(|(at, _)| *at)
    }

    /// What becomes of a message for the node.
    pub fn fall(&mut self, now: Duration, payload: Bytes, cargo: Cargo) -> Fate {
        if self.stuck_until.is_some() {
            return Fate::default();
        }
        let calm = self.is_calm(now);
        let strike = self.intruder.as_mut().filter(|_| !calm).and_then(|him| him.strike(&payload, cargo));
        let (attack, payload) = match strike {
            Some((Attack::EndlessData, _)) => {
                // Who sits there goes when the faults end, and the connection through him with him.
                let patience = now + limits::ENDLESS;
                self.stuck_until = Some(self.calm_at.map_or(patience, |calm_at| calm_at.min(patience)));
                return Fate { falling: Vec::new(), attack: Some(Attack::EndlessData) };
            }
            Some((attack, payload)) => (Some(attack), payload),
            None => (None, payload),
        };
        let link = &self.profile.link;
        let transmission = match self.bandwidth {
            Some(bandwidth) => Duration::from_secs_f64(payload.len() as f64 / bandwidth as f64),
            None => Duration::ZERO,
        };
        self.busy_until = self.busy_until.max(now) + transmission;
        let mut at = self.busy_until + link.latency.draw(&mut self.rng);
        let rng = &mut self.rng;
        let mut strikes = |share: Share| share.draw(rng) && !calm;
        let (lost, twice) = (strikes(link.lost), strikes(link.duplicated));
        let (changed, overtaken) = (strikes(link.corrupted), strikes(link.reordered));
        if lost {
            return Fate { falling: Vec::new(), attack };
        }
        let payload = match changed && cargo == Cargo::Package && !payload.is_empty() {
            true => {
                let mut bytes = BytesMut::from(&payload[..]);
                let place = self.rng.usize(..bytes.len());
                bytes[place] ^= 1 << self.rng.u8(..8);
                bytes.freeze()
            }
            false => payload,
        };
        if overtaken {
            at += Duration::from_micros(self.rng.u64(..=micros(HELD_BACK)));
        }
        let mut falling = vec![Falling { at, payload }];
        if twice {
            let again = Falling { at: at + Duration::from_millis(self.rng.u64(..500)), ..falling[0].clone() };
            falling.push(again);
        }
        Fate { falling, attack }
    }

    /// When the node gives its connection up, on which a message does not end, if there is one.
    #[must_use]
    pub fn gives_up_at(&self) -> Option<Duration> {
        self.stuck_until
    }

    /// Whether the power may fail.
    #[must_use]
    pub fn cuts_power(&self) -> bool {
        self.cuts > 0
    }

    /// When the power fails next, if it does.
    pub fn next_cut(&mut self, now: Duration) -> Option<Cut> {
        if self.cuts == 0 || self.is_calm(now) {
            return None;
        }
        self.cuts -= 1;
        let at = self.rng.u64(1..=self.profile.power.within.max(1));
        Some(Cut { at, torn: self.rng.bool(), loses: self.rng.bool() })
    }

    /// Whether the application crashes, having run `release` of this version, which waits to be confirmed.
    pub fn crashes(&mut self, now: Duration, release: Digest, version: Option<&str>) -> bool {
        let broken = self.profile.application.broken_version.as_deref();
        match self.crashes {
            Crashes::Never => false,
            // No fault of the day: the release is at fault, and stays so.
            Crashes::Always => broken.is_none_or(|broken| version == Some(broken)),
            Crashes::Once => !self.is_calm(now) && self.crashed.replace(release) != Some(release),
        }
    }

    fn is_calm(&self, now: Duration) -> bool {
        self.calm_at.is_some_and(|calm_at| now >= calm_at)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn hostile(number: u64, calm_at: Option<Duration>) -> Weather {
        Weather::draw(&Profile::parse(Profile::ready("hostile").unwrap()).unwrap(), 7, number, calm_at)
    }

    /// Everything that can be asked of a node's weather, in an order.
    fn told(mut weather: Weather) -> String {
        let mut told = format!("{:?} {:?} {:?}", weather.join(), weather.room(SECOND), weather.clock(0));
        for n in 0..50 {
            let now = SECOND * n;
            let fall = weather.fall(now, Bytes::from(vec![7; 1000]), Cargo::Package);
            told += &format!("{:?} {fall:?} {:?}", weather.next_turn(now), weather.next_cut(now));
        }
        told
    }

    #[test]
    fn the_same_seed_and_number_bring_the_same_fate_and_others_another() {
        assert_eq!(told(hostile(3, None)), told(hostile(3, None)));
        assert_ne!(told(hostile(3, None)), told(hostile(4, None)));
    }

    #[test]
    fn nothing_strikes_once_it_is_calm() {
        for number in 0..200 {
            let mut weather = hostile(number, Some(SECOND));
            for n in 0..20 {
                let payload = Bytes::from(vec![n; 100]);
                let fate = weather.fall(SECOND, payload.clone(), Cargo::Package);
                let arrives: Vec<_> = fate.falling.iter().map(|falling| &falling.payload).collect();
                assert_eq!((arrives, fate.attack), (vec![&payload], None));
            }
            assert!(weather.next_turn(SECOND).is_none() && weather.next_cut(SECOND).is_none());
            assert!(!weather.crashes(SECOND, Digest::EMPTY, None) && weather.room(SECOND).is_none());
        }
    }

    #[test]
    fn each_fault_strikes_about_as_often_as_the_profile_says() {
        let mut all: Vec<_> = (0..1000).map(|number| hostile(number, None)).collect();
        let count = |all: &[Weather], is: &dyn Fn(&Weather) -> bool| all.iter().filter(|w| is(w)).count();
        assert!((130..270).contains(&count(&all, &|w| w.sleeps)));
        assert!((430..570).contains(&count(&all, &|w| w.cuts > 0)));
        assert!((20..90).contains(&count(&all, &|w| w.free.is_some())));
        assert!((330..470).contains(&count(&all, &|w| w.platform.as_deref() == Some("esp32"))));
        let payload = Bytes::from_static(b"package");
        let falling: Vec<_> =
            all.iter_mut().map(|w| w.fall(SECOND, payload.clone(), Cargo::Other).falling).collect();
        assert!((5..70).contains(&falling.iter().filter(|falling| falling.is_empty()).count()));
        assert!((20..90).contains(&falling.iter().filter(|falling| falling.len() == 2).count()));
        let fates = all.iter_mut().map(|w| w.fall(SECOND, payload.clone(), Cargo::Package));
        let fates: Vec<_> = fates.filter(|fate| fate.attack.is_none()).collect();
        let falling = fates.iter().flat_map(|fate| &fate.falling);
        assert!((5..70).contains(&falling.filter(|falling| falling.payload != payload).count()));
    }

    #[test]
    fn what_nodes_are_and_had_is_spread_as_the_profile_says() {
        let profile = "[abi]\n6 = \"50%\"\nnone = \"50%\"\n[history]\nused = \"30%\"\nowned = \"20%\"\n";
        let profile = Profile::parse(profile).unwrap();
        let all: Vec<_> = (0..1000).map(|number| Weather::draw(&profile, 1, number, None)).collect();
        let count = |is: &dyn Fn(&Weather) -> bool| all.iter().filter(|w| is(w)).count();
        assert!((430..570).contains(&count(&|w| w.hardware(Hardware::default()).mpy.is_none())));
        assert!((230..370).contains(&count(&|w| w.history() == History::Used)));
        assert!((140..260).contains(&count(&|w| w.history() == History::Owned)));
        assert!(all.iter().all(|weather| weather.faults() == ["none"]));
    }

    #[test]
    fn a_slow_node_reads_nothing_before_it_took_in_what_came_and_reads_well_once_it_is_calm() {
        let profile = Profile::parse("[slow]\nnodes = \"100%\"\nbandwidth = \"1KB\"").unwrap();
        let mut weather = Weather::draw(&profile, 1, 1, Some(SECOND * 9));
        assert_eq!((weather.deaf_until(SECOND), weather.faults()), (None, vec!["reads slowly"]));
        let _ = weather.fall(SECOND, Bytes::from(vec![0; 20_000]), Cargo::Package);
        assert_eq!(weather.deaf_until(SECOND), Some(SECOND * 21));
        assert_eq!(weather.deaf_until(SECOND * 9), None);
    }

    #[test]
    fn a_list_never_arrives_changed_unless_somebody_changes_it() {
        let payload = Bytes::from_static(b"[]");
        for number in 0..500 {
            let fate = hostile(number, None).fall(SECOND, payload.clone(), Cargo::List);
            assert!(fate.attack.is_some() || fate.falling.iter().all(|falling| falling.payload == payload));
        }
    }

    #[test]
    fn behind_a_message_that_does_not_end_nothing_comes_until_the_next_connection() {
        let profile = Profile::parse("[intruder]\nendless-data = \"100%\"").unwrap();
        let list = Bytes::from_static(b"[]");
        let mut weather = Weather::draw(&profile, 1, 1, Some(SECOND * 90));
        assert_eq!(weather.fall(SECOND, list.clone(), Cargo::Other).falling.len(), 1);
        let fate = weather.fall(SECOND, list.clone(), Cargo::List);
        assert_eq!((fate.falling.len(), fate.attack), (0, Some(Attack::EndlessData)));
        assert_eq!(weather.gives_up_at(), Some(SECOND + limits::ENDLESS));
        assert_eq!(weather.fall(SECOND * 2, list.clone(), Cargo::Other), Fate::default());
        assert!(weather.next_turn(SECOND * 61).is_none() && weather.gives_up_at().is_none());
        let _ = weather.fall(SECOND * 62, list.clone(), Cargo::List);
        assert_eq!(weather.gives_up_at(), Some(SECOND * 90), "whoever sits there goes with the other faults");
        let _ = weather.next_turn(SECOND * 90);
        assert_eq!(weather.fall(SECOND * 91, list, Cargo::List).falling.len(), 1);
    }

    #[test]
    fn a_crash_strikes_a_release_once_and_a_broken_one_always() {
        let crashing = Profile::parse("[application]\ncrashes = \"100%\"").unwrap();
        let mut weather = Weather::draw(&crashing, 1, 1, None);
        assert_eq!([0; 3].map(|_| weather.crashes(SECOND, Digest::EMPTY, None)), [true, false, false]);
        let broken = Profile::parse("[application]\nbroken = \"100%\"").unwrap();
        let mut weather = Weather::draw(&broken, 1, 1, Some(Duration::ZERO));
        assert_eq!([0; 3].map(|_| weather.crashes(SECOND, Digest::EMPTY, None)), [true; 3]);
    }
}
