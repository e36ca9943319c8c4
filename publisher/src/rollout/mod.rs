//! Rollouts: a release goes to few nodes first, then to more, and stops by itself when it goes wrong.
//!
//! Nodes decide for themselves whose turn it is, from the signed list. What is left to do is to publish the list of
//! the next step when the present one went well, and another when it did not. Everything that is known about it is
//! retained: the list says which step it is, the nodes' states say how it goes, and [`Record`] says what was wanted and
//! what was decided. So a rollout goes on from there whoever steers it, on whichever machine.
//!
//! | module | does |
//! |---|---|
//! | [`control`] | record, list, nodes and time → what to do next. No I/O, no clock |
//! | [`lease`] | who steers, if several want to. No I/O, no clock |
//! | [`start`] | puts a release in place, for nobody at first |
//! | [`steer`](mod@steer) | asks the first two again and again, and does what they say |

pub mod control;
pub mod lease;
pub mod start;
pub mod steer;

pub use mpypi_protocol::record::{OnFailure, Order, Policy, Record, Status};
