//! How long to wait before trying again.

use std::time::Duration;

/// Pauses that double from a first to a longest one, each shortened at random by up to nine tenths, so that
/// many devices that failed together do not come back together.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    tries: u32,
}

impl Backoff {
    /// Pauses from `first` to `most`.
    #[must_use]
    pub fn new(first: Duration, most: Duration) -> Backoff {
        Backoff { first, most, tries: 0 }
    }

    /// The next pause.
    pub fn next(&mut self, rng: &mut fastrand::Rng) -> Duration {
        let doubled = self.first.saturating_mul(1 << self.tries.min(20)).min(self.most);
        self.tries = self.tries.saturating_add(1);
        doubled.mul_f64(0.1 + rng.f64() * 0.9)
    }

    /// It worked: the next pause is a first one.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_differ() {
        let (first, most) = (Duration::from_secs(1), Duration::from_secs(60));
        let mut rng = fastrand::Rng::with_seed(1);
        let mut backoff = Backoff::new(first, most);
        let pauses: Vec<_> = (0..10).map(|_| backoff.next(&mut rng)).collect();
        assert!(pauses[0] >= first / 10 && pauses[0] <= first);
        assert!(pauses[9] >= most / 10 && pauses[9] <= most);
        assert_ne!(pauses[8], pauses[9]);
        backoff.reset();
        assert!(backoff.next(&mut rng) <= first);
    }

    #[test]
    fn devices_that_lose_one_broker_come_back_spread_over_the_whole_first_pause() {
        let first = Duration::from_secs(1);
        let mut tenths = [0; 10];
        for seed in 0..10_000 {
            let pause = Backoff::new(first, first).next(&mut fastrand::Rng::with_seed(seed));
            tenths[(pause.as_millis() / 100).min(9) as usize] += 1;
        }
        assert!(tenths.iter().all(|count| *count < 2000), "{tenths:?}");
    }
}
