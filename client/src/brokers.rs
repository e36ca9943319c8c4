//! The brokers that are to agree: one, or the nodes of a cluster.

use crate::endpoint::Endpoint;

/// One broker, or several addresses at which the same messages are to be retained. Never empty.
#[derive(Debug, Clone)]
pub struct Brokers {
    endpoints: Vec<Endpoint>,
}

impl Brokers {
    /// These; `None` if there are none.
    #[must_use]
    pub fn new(endpoints: Vec<Endpoint>) -> Option<Brokers> {
        (!endpoints.is_empty()).then_some(Brokers { endpoints })
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

    /// The same ones, with each changed by `change`.
    #[must_use]
    pub fn map(&self, change: impl FnMut(&Endpoint) -> Endpoint) -> Brokers {
        Brokers { endpoints: self.endpoints.iter().map(change).collect() }
    }
}

impl From<Endpoint> for Brokers {
    fn from(endpoint: Endpoint) -> Brokers {
        Brokers { endpoints: vec![endpoint] }
    }
}
