//! An MQTT broker whose retained messages are a durable package index.
//!
//! ```text
//! server       starts and stops everything                      ── settings: its configuration file
//!  └ listen       accepts: TCP, TLS, WebSocket                  ── authority: certificates of our own
//!      └ connection   driver: bytes in, bytes out, deadlines    ── outbox: what waits to be sent
//!          └ session     state machine: packets and time in, effects out
//!              └ packet     bytes ↔ meaning, MQTT 3.1.1 and 5
//! registry     which connection has which client id: the newest, once the one before it has gone
//! door         policy: what may become part of the index
//! index        durable store of retained messages               ── writer: the one thread that changes it
//! bus          rumqttd's router between two links               ── mailbox: a session's bounded queue
//! subscriptions  who gets what
//! mpyblox      policy: what a node that runs Mpy-BLOX is served of a list
//! fleet        what is known of all nodes, in memory; told by the bus
//!
//! gateway      HTTP: listeners, who asks, bounds ── faces: the APIs of others, by HTTP and per session by MQTT
//! metrics      what is counted             ── sys: the same as messages
//! pulse        whether messages get through ── service: what the service manager is told of it
//! control      the same questions to the index, whether a broker runs on it or not
//!  └ backup       a folder that holds all of it
//! edge         a broker that takes its channels from another one, and what it carries there ── submit
//! ```
//!
//! A message's way: `connection` reads it, `session` takes it, `door` checks it, `index::writer` judges and
//! commits it, puts it on the `bus`, and acknowledges it; the dispatcher puts it into `mailbox`es, from
//! where connections fetch it. Retained messages are read from the index by each connection as its client
//! takes them.
//!
//! Invariants: an acknowledged message is durable; a refused one leaves no trace; nothing waits in a queue
//! without a limit from [`limits`]; nobody sees an older retained message after a newer one; `session`,
//! `door` and `packet` touch no socket, file or clock.

pub mod access;
pub mod authority;
pub mod backup;
pub mod bus;
pub mod clock;
pub mod connection;
pub mod control;
pub mod door;
pub mod edge;
pub mod faces;
pub mod fleet;
pub mod gateway;
pub mod index;
pub mod limits;
pub mod listen;
pub mod listener;
pub mod mailbox;
pub mod message;
pub mod metrics;
pub mod mpyblox;
pub mod outbox;
pub mod packet;
pub mod pulse;
pub mod registry;
pub mod server;
pub mod service;
pub mod session;
pub mod settings;
pub mod submit;
pub mod subscriptions;
pub mod sys;

pub use limits::Limits;
pub use server::{Access, Broker, Config, ServeError};
