//! How our programs reach a broker: an address, and whom to trust there, become one MQTT connection, plain or TLS.
//!
//! | module | does |
//! |---|---|
//! | [`args`] | what the command line says about a broker |
//! | [`brokers`] | one broker, or several that are to agree |
//! | [`trust`] | files of certificates and a key → whom to believe, and who we are |
//! | [`endpoint`] | a broker and how it is reached → a stream of bytes, or why there is none, and what to do about it |
//! | [`http`] | an HTTP client that trusts the same |
//! | [`meter`] | how many bytes that takes |
//! | [`version`] | MQTT 3.1.1 and MQTT 5: rumqttc's packets, and sessions as state machines |
//! | [`mod@line`] | the two together: one connection, packets in and out |
//! | [`limits`] | every limit, by name |
//!
//! rumqttc's own event loop is not used: its TLS brings a library with known holes, and it keeps to itself why a
//! connection failed.
//!
//! Absent on purpose: a way to trust anybody.

pub mod args;
pub mod brokers;
pub mod endpoint;
pub mod http;
pub mod limits;
pub mod line;
pub mod meter;
pub mod trust;
pub mod version;

pub use args::{BrokerArgs, BrokersError};
pub use brokers::Brokers;
pub use endpoint::{ConnectError, Endpoint};
pub use line::{Line, LineError};
pub use meter::{Meter, Traffic};
pub use version::{V4, V5};
