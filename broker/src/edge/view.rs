//! How it goes with an upstream, for whoever looks.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use super::{mirror, relay};

/// What those who look see.
#[derive(Debug, Default)]
pub struct View {
    /// Held to read or replace a value.
    seen: Mutex<Seen>,
}

/// How it goes at a moment.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// The address that is connected to, or tried.
    pub url: String,
    /// Whether channels come.
    pub is_connected: bool,
    /// Whether orders come and states go.
    pub is_relaying: bool,
    /// Why not, or what went wrong last.
    pub problem: Option<String>,
    /// Whether all that was there when it began has come, or is held back.
    pub is_whole: bool,
    /// Each channel.
    pub channels: Vec<mirror::Standing>,
    /// Packages that came and were kept.
    pub fetched: u64,
    /// The nodes' side.
    pub relay: relay::Standing,
    /// Whether this broker is its own upstream.
    pub is_loop: bool,
}

impl View {
    /// How it goes now.
    #[must_use]
    pub fn look(&self) -> Seen {
        self.lock().clone()
    }

    /// Notes a change.
    pub fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    /// Packages that are on their way, and their bytes as far as lists tell.
    #[must_use]
    pub fn missing(&self) -> (u64, u64) {
        let sum = |(packages, bytes), standing: &mirror::Standing| {
            (packages + standing.missing as u64, bytes + standing.bytes)
        };
        self.channels.iter().fold((0, 0), sum)
    }

    /// Channels whose list is held back.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.channels.iter().filter(|standing| standing.held.is_some()).count() as u64
    }

    /// The same for `/healthz`.
    #[must_use]
    pub fn told(&self) -> Value {
        let channels = self.channels.iter().map(|standing| {
            let told = json!({
                "sequence": standing.sequence,
                "coming": standing.coming,
                "missing": standing.missing,
                "missing_bytes": standing.bytes,
                "held": standing.held,
            });
            (standing.channel.to_string(), told)
        });
        json!({
            "url": self.url,
            "connected": self.is_connected && self.is_relaying,
            "problem": self.problem,
            "whole": self.is_whole,
            "loop": self.is_loop,
            "channels": channels.collect::<serde_json::Map<_, _>>(),
            "nodes": self.relay.nodes,
            "waiting": self.relay.waiting,
            "dropped": self.relay.dropped,
        })
    }
}
