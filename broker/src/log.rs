//! The log, on standard error: filtered by `MPYPI_LOG`, and never faster than a limit, since strangers cause
//! most of its lines.

use std::{
    io::IsTerminal,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use mpypi_broker::clock;
use tracing::Level;
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, dynamic_filter_fn},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// Lines in each [`PERIOD`]; as many errors again.
const LINES: u64 = 500;
/// How often lines are allowed anew.
const PERIOD: Duration = Duration::from_secs(5);

/// Counts the log's lines.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Held to count one line.
    counted: Mutex<Counted>,
}

#[derive(Debug)]
struct Counted {
    since: Instant,
    lines: u64,
    errors: u64,
    left_out: u64,
}

impl Gate {
    fn new(now: Instant) -> Gate {
        Gate { counted: Mutex::new(Counted { since: now, lines: 0, errors: 0, left_out: 0 }) }
    }

    /// Whether a line may be written.
    fn lets_through(&self, level: Level, now: Instant) -> bool {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if now.duration_since(counted.since) >= PERIOD {
            *counted = Counted { since: now, lines: 0, errors: 0, left_out: counted.left_out };
        }
        let lines = if level == Level::ERROR { &mut counted.errors } else { &mut counted.lines };
        *lines += 1;
        let is_within = *lines <= LINES;
        counted.left_out += u64::from(!is_within);
        is_within
    }

    /// Reports what was left out, for ever.
    pub(crate) async fn report(&self) {
        loop {
            tokio::time::sleep(PERIOD).await;
            let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
            let left_out = std::mem::take(&mut counted.left_out);
            drop(counted);
            if left_out > 0 {
                tracing::error!(lines = left_out, "left out of this log, which got too many at once");
            }
        }
    }
}

/// Starts the log, from this level on unless `MPYPI_LOG` says otherwise.
pub(crate) fn to_stderr(json: bool, level: &str) -> anyhow::Result<Arc<Gate>> {
    let filter = EnvFilter::try_from_env("MPYPI_LOG")
        .or_else(|_| EnvFilter::try_new(format!("{level},rumqttd=error")))
        .context("MPYPI_LOG is no log filter")?;
    let gate = Arc::new(Gate::new(clock::now().instant));
    let counting = gate.clone();
    let limit = dynamic_filter_fn(move |metadata, _| {
        !metadata.is_event() || counting.lets_through(*metadata.level(), clock::now().instant)
    });
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let filter = filter.and(limit);
    match json {
        true => tracing_subscriber::registry().with(layer.json().with_filter(filter)).init(),
        false => tracing_subscriber::registry().with(layer.with_ansi(colour).with_filter(filter)).init(),
    }
    Ok(gate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_lines_is_cut_and_counted_and_hides_no_error() {
        let start = clock::now().instant;
        let gate = Gate::new(start);
        let written = (0..10_000).filter(|_| gate.lets_through(Level::INFO, start)).count();
        assert_eq!(written as u64, LINES);
        assert!(gate.lets_through(Level::ERROR, start));
        assert_eq!(gate.counted.lock().unwrap().left_out, 10_000 - LINES);
        assert!(gate.lets_through(Level::INFO, start + PERIOD));
    }
}
