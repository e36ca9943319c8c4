//! The builder that all integration tests share: real programs in a world of their own.
//!
//! [`World`] is a scratch folder; a [`Server`] is a broker of ours or mosquitto on a free loopback port, and
//! dies with the test, and a [`Cluster`] is several of NATS; a [`browser::Browser`] looks at what it shows over HTTP; a [`Client`] is a
//! small MQTT 3.1.1 client on an outsider's codec that does what it is
//! told, also what no proper client does; a [`mpyblox::Blox`] is a device that runs what others wrote; an
//! [`face::Device`] is an agent with its own interfaces over HTTP; an
//! [`Authority`] makes certificates, and a [`Secure`] broker shows one; a [`Proxy`] sits on the line and counts,
//! cuts or corrupts; a [`disk::Disk`] tells what a power cut leaves.

// Here a failed expectation is a failed test.
#![allow(clippy::unwrap_used, reason = "a helper that fails should fail the test, where it stands")]

mod authority;
pub mod browser;
mod client;
pub mod disk;
pub mod face;
pub mod http;
pub mod mpyblox;
mod nats;
mod programs;
mod proxy;
mod server;

pub use authority::{Authority, Validity};
pub use client::{Client, Options, Received, fill};
pub use nats::{Cluster, Place};
pub use programs::{
    Output, Running, World, bytes, files_below, kill_once_known, micropython, peer, program, run, run_with,
};
pub use proxy::{Proxy, Verdict};
pub use server::{Deadline, Kind, Secure, Server, clock, free_address};

use std::time::Duration;

/// How long anything may take before a test calls it a hang. Generous: only failures wait for it.
pub const PATIENCE: Duration = Duration::from_secs(60);
