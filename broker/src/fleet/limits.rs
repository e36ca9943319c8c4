//! The limits of what is remembered of a fleet, by name.

use std::time::Duration;

/// Updates remembered of each node.
pub const UPDATES: usize = 16;
/// Phases remembered of each update.
pub const STEPS: usize = 16;
/// Lines remembered of what a node logged.
pub const LINES: usize = 100;
/// Longest line remembered, in bytes; what is longer is cut.
pub const LINE: usize = 512;
/// Bytes of all lines remembered; with more, the oldest are forgotten.
pub const LOG: usize = 16 * 1024 * 1024;
/// Nodes and rollouts that are gone and remembered so.
pub const GONE: usize = 4096;
/// Longest word for why an update failed, in bytes.
pub const REASON: usize = 32;
/// Words for that which are told apart; those beyond are [`OTHER`].
pub const REASONS: usize = 64;
/// Releases that metrics and the overview tell apart; those beyond, with fewer nodes, are [`OTHER`].
pub const RELEASES: usize = 32;
/// What is not told apart.
pub const OTHER: &str = "other";
/// How often it is looked at what many small changes come to.
pub const TICK: Duration = Duration::from_secs(1);
/// A sample of how many nodes stand where is taken once in so many ticks.
pub const SAMPLE_TICKS: u64 = 10;
/// Samples remembered; one that is like the one before is none.
pub const SAMPLES: usize = 2048;
/// Releases told apart in a sample.
pub const SAMPLE_RELEASES: usize = 8;
/// Messages that wait to be looked at; with more, the index is read again.
pub const QUEUE: usize = 16 * 1024;
/// Bytes of the same.
pub const QUEUE_BYTES: usize = 16 * 1024 * 1024;
/// Messages looked at before others get to see what they changed.
pub const BATCH: usize = 256;
