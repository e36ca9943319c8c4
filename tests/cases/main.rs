//! All integration tests, in one binary.

#![allow(clippy::unwrap_used, reason = "in a test, a failed expectation is a failed test")]

mod access;
mod broker;
mod bytecode;
mod durability;
mod fleet;
mod flood;
mod hostile;
mod judges;
mod listeners;
mod operations;
mod powerloss;
mod publish;
mod readers;
mod sessions;
mod tls;
