//! Whether all brokers of several retain the same, and what to do while they do not.
//!
//! A cluster that acknowledged a message may have lost it all the same, on one node or on each; a node may go on serving
//! what it had before. So what was published is read back through every address, what is missing is published again, and only
//! when each has all of it is it done. No I/O here and no clock: [`settle`](mod@crate::settle) looks and does what
//! [`Agreement::next`] says.

use std::{collections::BTreeSet, time::Duration};

use jiff::Timestamp;
use serde::{Serialize, Serializer};

use crate::limits;

/// What was seen through one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum View {
    /// Nobody answers there, or not to the end.
    Unreachable {
        /// Why.
        reason: String,
        /// Whether it may answer later.
        passing: bool,
    },
    /// It was read through.
    Seen(Seen),
}

/// What a broker retains, of what it should.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// The numbers of the messages that it lacks, or has with other bytes.
    pub lacks: BTreeSet<usize>,
    /// The list it has in place of the one that was published.
    pub serves: Option<Served>,
    /// Whether that list is newer: somebody else published meanwhile.
    pub newer: bool,
}

/// A list that a broker serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Served {
    /// Its sequence; `None` of a list without one, or of none at all.
    pub sequence: Option<u64>,
    /// When it was made.
    #[serde(serialize_with = "as_text")]
    pub created: Option<Timestamp>,
}

fn as_text<S: Serializer>(time: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(|time| time.to_string()).serialize(serializer)
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Every broker has all of it.
    Agreed,
    /// Publish these messages again, through that address; then look again.
    Repair {
        /// The number of the address.
        through: usize,
        /// The numbers of the messages.
        messages: BTreeSet<usize>,
    },
    /// Look again after a pause.
    Wait(Duration),
    /// Somebody else has published: ours must not be put back over it.
    Raced,
    /// It does not come about.
    GiveUp,
}

/// How one broker stands in the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Standing {
    /// It has all of it.
    Agrees,
    /// It lacks messages although they were published again.
    Lacks {
        /// How many.
        messages: usize,
        /// The topic of one of them.
        example: String,
    },
    /// It goes on serving what it had before, whatever others take: no message reaches what it retains.
    Stale {
        /// How many messages it lacks.
        messages: usize,
        /// What it still serves.
        serves: Served,
    },
    /// It cannot be reached.
    Unreachable {
        /// Why.
        reason: String,
    },
}

/// Brokers on their way to agree. Made when something was published.
#[derive(Debug, Clone)]
pub struct Agreement {
    may_be_down: usize,
    until: Duration,
    repairs: u32,
    looks: u32,
}

impl Agreement {
    /// They are looked at until that time; so many of them may be unreachable.
    #[must_use]
    pub fn new(until: Duration, may_be_down: usize) -> Agreement {
        Agreement { may_be_down, until, repairs: 0, looks: 0 }
    }

    /// What to do, seeing this through the addresses.
    pub fn next(&mut self, now: Duration, views: &[View]) -> Next {
        self.looks += 1;
        let seen: Vec<(usize, &Seen)> = views
            .iter()
            .enumerate()
            .filter_map(|(number, view)| match view {
                View::Seen(seen) => Some((number, seen)),
                View::Unreachable { .. } => None,
            })
            .collect();
        if seen.iter().any(|(_, seen)| seen.newer) {
            return Next::Raced;
        }
        let down = views.len() - seen.len();
        let messages: BTreeSet<usize> = seen.iter().flat_map(|(_, seen)| &seen.lacks).copied().collect();
        if messages.is_empty() && down <= self.may_be_down && !seen.is_empty() {
            return Next::Agreed;
        }
        let hopeless = views.iter().filter(|view| matches!(view, View::Unreachable { passing: false, .. }));
        // One that lacks what was published again and again takes nothing any more.
        let is_frozen = !messages.is_empty() && self.repairs >= limits::AGREE_REPAIRS && self.looks % 2 == 1;
        let is_over = now >= self.until || self.looks >= limits::AGREE_LOOKS;
        if is_over || is_frozen || hopeless.count() > self.may_be_down {
            return Next::GiveUp;
        }
        // Once through an address that has it all, then through one that does not: either may be what gets it there. In
        // between, a cluster is given time: what it lacks may be on its way.
        if !messages.is_empty() && self.looks % 2 == 1 && self.repairs < limits::AGREE_REPAIRS {
            let (whole, lacking): (Vec<_>, Vec<_>) = seen.iter().partition(|(_, seen)| seen.lacks.is_empty());
            let (first, second) =
                if self.repairs.is_multiple_of(2) { (whole, lacking) } else { (lacking, whole) };
            let through = first.first().or(second.first());
            if let Some((through, _)) = through {
                self.repairs += 1;
                return Next::Repair { through: *through, messages };
            }
        }
        let pause = limits::AGREE_PAUSE.saturating_mul(1 << self.looks.min(8)).min(limits::AGREE_PAUSE_MOST);
        Next::Wait(pause)
    }

    /// How often something was published again.
    #[must_use]
    pub fn repairs(&self) -> u32 {
        self.repairs
    }
}

/// How a broker stands that was last seen so; `topics` are those of the messages.
#[must_use]
pub fn standing(view: &View, topics: &[&str]) -> Standing {
    match view {
        View::Unreachable { reason, .. } => Standing::Unreachable { reason: reason.clone() },
        View::Seen(Seen { lacks, serves, .. }) => match (lacks.first(), serves) {
            (None, _) => Standing::Agrees,
            (Some(_), Some(serves)) => Standing::Stale { messages: lacks.len(), serves: serves.clone() },
            (Some(first), None) => {
                let example = topics.get(*first).copied().unwrap_or_default().to_owned();
                Standing::Lacks { messages: lacks.len(), example }
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lacks(numbers: &[usize]) -> View {
        View::Seen(Seen { lacks: numbers.iter().copied().collect(), ..Seen::default() })
    }

    fn stale(sequence: u64) -> View {
        let serves = Served { sequence: Some(sequence), created: None };
        View::Seen(Seen { lacks: [0].into(), serves: Some(serves), newer: false })
    }

    fn down() -> View {
        View::Unreachable { reason: "Connection refused".into(), passing: true }
    }

    const WHOLE: &[usize] = &[];
    const UNTIL: Duration = Duration::from_secs(60);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_every_broker_has_is_agreed_at_once() {
        let mut all = Agreement::new(UNTIL, 0);
        assert_eq!(all.next(at(5), &[lacks(WHOLE), lacks(WHOLE), lacks(WHOLE)]), Next::Agreed);
    }

    #[test]
    fn what_one_lacks_is_published_again_first_through_another_then_through_itself() {
        let mut all = Agreement::new(UNTIL, 0);
        let views = [lacks(WHOLE), lacks(&[2, 7]), lacks(&[7])];
        let mut through = Vec::new();
        for second in 0..6 {
            if let Next::Repair { through: number, messages } = all.next(at(second), &views) {
                assert_eq!(messages, [2, 7].into());
                through.push(number);
            }
        }
        assert_eq!(through, [0, 1, 0]);
        assert_eq!(all.next(at(7), &[lacks(WHOLE), lacks(WHOLE), lacks(WHOLE)]), Next::Agreed);
    }

    #[test]
    fn what_all_lost_is_published_again_too() {
        let mut all = Agreement::new(UNTIL, 0);
        let next = all.next(at(0), &[lacks(&[3]), lacks(&[3])]);
        assert_eq!(next, Next::Repair { through: 0, messages: [3].into() });
    }

    #[test]
    fn a_broker_that_is_down_is_waited_for_and_no_reason_to_give_up_if_it_may_be() {
        let views = [lacks(WHOLE), down(), lacks(WHOLE)];
        let mut all = Agreement::new(UNTIL, 0);
        assert!(matches!(all.next(at(0), &views), Next::Wait(_)));
        assert_eq!(all.next(UNTIL, &views), Next::GiveUp);
        assert_eq!(Agreement::new(UNTIL, 1).next(at(0), &views), Next::Agreed);
        let nobody = [down(), down()];
        assert!(matches!(Agreement::new(UNTIL, 2).next(at(0), &nobody), Next::Wait(_)), "nobody is nothing");
    }

    #[test]
    fn a_broker_that_will_never_let_us_in_is_given_up_at_once() {
        let closed = View::Unreachable { reason: "not authorized".into(), passing: false };
        assert_eq!(Agreement::new(UNTIL, 0).next(at(0), &[lacks(WHOLE), closed]), Next::GiveUp);
    }

    #[test]
    fn a_survivor_that_lacks_something_is_never_agreed_with_whoever_may_be_down() {
        let mut all = Agreement::new(UNTIL, 3);
        let views = [lacks(WHOLE), down(), stale(41)];
        let mut looks = 0;
        while all.next(at(looks), &views) != Next::GiveUp {
            looks += 1;
            assert!(looks <= u64::from(limits::AGREE_LOOKS), "it ends");
        }
        assert_eq!(all.repairs(), limits::AGREE_REPAIRS);
        let serves = Served { sequence: Some(41), created: None };
        assert_eq!(standing(&views[2], &["a"]), Standing::Stale { messages: 1, serves });
    }

    #[test]
    fn a_newer_list_of_somebody_else_is_left() {
        let newer = View::Seen(Seen { lacks: [0].into(), serves: None, newer: true });
        assert_eq!(Agreement::new(UNTIL, 0).next(at(0), &[lacks(&[0]), newer]), Next::Raced);
    }
}
