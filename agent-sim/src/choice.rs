//! At which of several addresses of one index a node is.
//!
//! A node stays where it is answered: whoever moved without need would fetch again what it was in the middle of, and a
//! crowd that moves together tips over the next. What it finds elsewhere may be older; the update refuses what is older than
//! what it has seen, so a node that moves never goes back. From an address that stays behind it moves on.

use std::time::Duration;

use crate::limits;

/// Which address, of one or more.
#[derive(Debug, Clone)]
pub struct Choice {
    count: usize,
    at: usize,
    /// Whether the connection that was lost there last was a good one.
    was_answered: bool,
}

impl Choice {
    /// One of `count` addresses, by chance: nodes spread over them.
    #[must_use]
    pub fn new(count: usize, rng: &mut fastrand::Rng) -> Choice {
        let count = count.max(1);
        Choice { count, at: rng.usize(..count), was_answered: false }
    }

    /// The number of the address to connect to.
    #[must_use]
    pub fn at(&self) -> usize {
        self.at
    }

    /// There is a connection.
    pub fn answered(&mut self) {
        self.was_answered = true;
    }

    /// How long it stays where it was told something older than it knew.
    pub fn stay(&self, rng: &mut fastrand::Rng) -> Duration {
        let (least, most) = (limits::BEHIND_LEAST, limits::BEHIND_MOST);
        least + (most - least).mul_f64(rng.f64())
    }

    /// What it found there is older than what it knew: it leaves for any of the others.
    pub fn left(&mut self, rng: &mut fastrand::Rng) {
        self.was_answered = false;
        self.lost(rng);
    }

    /// There is none any more, or still none. Where it was answered before, a node tries once more: connections break
    /// more often than brokers. Then it goes to any of the others.
    pub fn lost(&mut self, rng: &mut fastrand::Rng) {
        if !std::mem::take(&mut self.was_answered) && self.count > 1 {
            self.at = (self.at + rng.usize(1..self.count)) % self.count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_stays_where_it_is_answered_and_moves_when_it_is_not() {
        for seed in 0..100 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut choice = Choice::new(3, &mut rng);
            let first = choice.at();
            for _ in 0..10 {
                choice.answered();
                choice.lost(&mut rng);
                assert_eq!(choice.at(), first, "a connection that broke");
            }
            choice.lost(&mut rng);
            assert_ne!(choice.at(), first, "a broker that is gone");
        }
    }

    #[test]
    fn nodes_spread_and_those_of_a_broker_that_is_gone_spread_over_the_others() {
        let (mut first, mut then) = ([0_u32; 3], [0_u32; 3]);
        for seed in 0..3000 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut choice = Choice::new(3, &mut rng);
            first[choice.at()] += 1;
            if choice.at() == 0 {
                choice.lost(&mut rng);
                then[choice.at()] += 1;
            }
        }
        assert!(first.iter().all(|nodes| (800..1200).contains(nodes)), "{first:?}");
        assert!(then[0] == 0 && then[1].abs_diff(then[2]) < 200, "{then:?}");
    }

    #[test]
    fn a_node_leaves_an_address_that_is_behind_and_not_all_at_once() {
        let mut stays = Vec::new();
        for seed in 0..100 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut choice = Choice::new(3, &mut rng);
            let first = choice.at();
            choice.answered();
            stays.push(choice.stay(&mut rng).as_secs());
            choice.left(&mut rng);
            assert_ne!(choice.at(), first);
        }
        assert!(stays.iter().all(|stay| (5..=30).contains(stay)), "{stays:?}");
        stays.sort_unstable();
        stays.dedup();
        assert!(stays.len() > 15, "{stays:?}");
    }

    #[test]
    fn every_address_is_tried_in_the_end_and_one_alone_is_tried_for_ever() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut choice = Choice::new(5, &mut rng);
        let mut seen = [false; 5];
        for _ in 0..100 {
            seen[choice.at()] = true;
            choice.lost(&mut rng);
        }
        assert_eq!(seen, [true; 5]);
        let mut alone = Choice::new(1, &mut rng);
        alone.lost(&mut rng);
        assert_eq!(alone.at(), 0);
    }
}
