//! How nodes that lost their connections came back: spread over time, or all at once.

use std::{collections::BTreeMap, time::Duration};

use crate::limits;

/// Counts how long nodes were without a connection that they did not end, and when connections were made.
#[derive(Debug, Clone, Default)]
pub struct Reconnects {
    /// How many nodes came back after so many times [`limits::RECONNECT_BIN`], rounded down.
    waits: BTreeMap<u64, usize>,
    /// Connections made again, by the time since the start, in [`limits::CROWD`].
    moments: BTreeMap<u64, usize>,
}

/// Nodes whose connection came back after a time in this range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bin {
    /// The least.
    pub from: Duration,
    /// What it is less than.
    pub to: Duration,
    /// How many.
    pub count: usize,
}

impl Reconnects {
    /// Notes that a node that lost its connection at `lost` has one again.
    pub fn note(&mut self, lost: Duration, now: Duration) {
        let places = |time: Duration, width: Duration| (time.as_micros() / width.as_micros()) as u64;
        *self.waits.entry(places(now.saturating_sub(lost), limits::RECONNECT_BIN)).or_default() += 1;
        *self.moments.entry(places(now, limits::CROWD)).or_default() += 1;
    }

    /// How many connections were made again.
    #[must_use]
    pub fn count(&self) -> usize {
        self.waits.values().sum()
    }

    /// Most connections that were made again within [`limits::CROWD`].
    #[must_use]
    pub fn crowd(&self) -> usize {
        self.moments.values().copied().max().unwrap_or_default()
    }

    /// The histogram of the times without a connection, from none on, without a gap.
    #[must_use]
    pub fn bins(&self) -> Vec<Bin> {
        let width = |place: u64| limits::RECONNECT_BIN * u32::try_from(place).unwrap_or(u32::MAX);
        let last = self.waits.last_key_value().map_or(0, |(place, _)| place + 1);
        // What took longer than any pause between two attempts stands together at the end.
        let most = last.min(limits::RECONNECT_BINS);
        let mut bins: Vec<_> = (0..most)
            .map(|place| Bin {
                from: width(place),
                to: width(place + 1),
                count: self.waits.get(&place).copied().unwrap_or_default(),
            })
            .collect();
        let rest: usize = self.waits.range(most..).map(|(_, count)| count).sum();
        if rest > 0 {
            bins.push(Bin { from: width(most), to: width(last), count: rest });
        }
        bins
    }

    /// The histogram as lines of text; nothing if no connection was made again.
    #[must_use]
    pub fn text(&self) -> String {
        let bins = self.bins();
        let most = bins.iter().map(|bin| bin.count).max().unwrap_or(1).max(1);
        let mut lines = String::new();
        if !bins.is_empty() {
            lines = format!(
                "reconnected: {} times, at most {} within {} ms; after\n",
                self.count(),
                self.crowd(),
                limits::CROWD.as_millis()
            );
        }
        for bin in bins {
            let bar = "#".repeat((bin.count * 40).div_ceil(most));
            let (from, to) = (bin.from.as_secs_f64(), bin.to.as_secs_f64());
            lines += &format!("  {from:5.1} to {to:5.1} s {:>7}  {bar}\n", bin.count);
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn nodes_that_come_back_are_counted_by_how_long_they_were_gone_and_how_many_came_at_once() {
        let mut reconnects = Reconnects::default();
        assert_eq!((reconnects.text(), reconnects.bins()), (String::new(), Vec::new()));
        reconnects.note(at(1000), at(1200));
        reconnects.note(at(1000), at(1210));
        reconnects.note(at(1000), at(2200));
        let counts: Vec<_> = reconnects.bins().iter().map(|bin| bin.count).collect();
        assert_eq!(counts, [2, 0, 1]);
        assert_eq!((reconnects.count(), reconnects.crowd()), (3, 2));
        assert!(reconnects.text().starts_with("reconnected: 3 times, at most 2 within 100 ms"));
    }

    #[test]
    fn what_took_very_long_stands_together_at_the_end() {
        let mut reconnects = Reconnects::default();
        reconnects.note(at(0), at(100));
        reconnects.note(at(0), Duration::from_secs(3600));
        let bins = reconnects.bins();
        assert_eq!(bins.len() as u64, limits::RECONNECT_BINS + 1);
        assert_eq!(bins.iter().map(|bin| bin.count).sum::<usize>(), 2);
    }
}
