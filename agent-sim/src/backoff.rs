//! How long to wait before trying again.

use std::time::Duration;

/// Pauses that double from a first to a longest one, each shortened at random by up to a half, so that
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
        doubled.mul_f64(0.5 + rng.f64() / 2.0)
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
        assert!(pauses[0] >= first / 2 && pauses[0] <= first);
        assert!(pauses[9] >= most / 2 && pauses[9] <= most);
        assert_ne!(pauses[8], pauses[9]);
        backoff.reset();
        assert!(backoff.next(&mut rng) <= first);
    }
}
