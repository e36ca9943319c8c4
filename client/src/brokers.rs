//! The brokers that are to agree: one, or the nodes of a cluster.

use std::time::Duration;

use crate::{endpoint::Endpoint, limits};

/// One broker, or several addresses at which the same messages are to be retained. Never empty.
#[derive(Debug, Clone)]
pub struct Brokers {
    endpoints: Vec<Endpoint>,
    may_be_down: usize,
    patience: Duration,
    chunk: Option<u64>,
}

impl Brokers {
    /// These; `None` if there are none.
    #[must_use]
    pub fn new(endpoints: Vec<Endpoint>) -> Option<Brokers> {
        (!endpoints.is_empty()).then_some(Brokers::of(endpoints))
    }

    fn of(endpoints: Vec<Endpoint>) -> Brokers {
        Brokers { endpoints, may_be_down: 0, patience: limits::AGREE, chunk: None }
    }

    /// The first of them.
    #[must_use]
    pub fn first(&self) -> &Endpoint {
        &self.endpoints[0]
    }

    /// All of them, in the order in which they were named.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Endpoint> {
        self.endpoints.iter()
    }

    /// How many there are: one at least.
    #[must_use]
    pub fn count(&self) -> usize {
        self.endpoints.len()
    }

    /// Whether there are several.
    #[must_use]
    pub fn are_several(&self) -> bool {
        self.endpoints.len() > 1
    }

    /// How many of them may be unreachable while the others agree.
    #[must_use]
    pub fn may_be_down(&self) -> usize {
        self.may_be_down
    }

    /// How long they may take until they agree.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Bytes of each chunk of what does not fit into a packet, if that was said.
    #[must_use]
    pub fn chunk(&self) -> Option<u64> {
        self.chunk
    }

    /// The same ones, for which what does not fit into a packet is cut into chunks of so many bytes.
    #[must_use]
    pub fn in_chunks_of(self, chunk: u64) -> Brokers {
        Brokers { chunk: Some(chunk), ..self }
    }

    /// The same ones, which take no larger packet than this, in bytes, whatever they say themselves.
    #[must_use]
    pub fn taking(self, packet: usize) -> Brokers {
        self.map(|endpoint| endpoint.taking(packet))
    }

    /// The same ones, which may take so long until they agree.
    #[must_use]
    pub fn within(self, patience: Duration) -> Brokers {
        Brokers { patience, ..self }
    }

    /// The same ones, of which so many may be unreachable.
    #[must_use]
    pub fn with_down(self, may_be_down: usize) -> Brokers {
        Brokers { may_be_down, ..self }
    }

    /// The same ones, with each changed by `change`.
    #[must_use]
    pub fn map(&self, change: impl FnMut(&Endpoint) -> Endpoint) -> Brokers {
        Brokers { endpoints: self.endpoints.iter().map(change).collect(), ..*self }
    }
}

impl From<Endpoint> for Brokers {
    fn from(endpoint: Endpoint) -> Brokers {
        Brokers::of(vec![endpoint])
    }
}
