//! All integration tests, in one binary.

#![allow(clippy::unwrap_used, reason = "in a test, a failed expectation is a failed test")]

mod access;
mod api;
mod appstore;
mod broker;
mod bytecode;
mod chunks;
mod cluster;
mod dashboard;
mod device;
mod device_chunks;
mod device_store;
mod device_trust;
mod downloads;
mod durability;
mod edge;
mod fleet;
mod flood;
mod gateway;
mod git;
mod home;
mod hostile;
mod http;
mod install;
mod judges;
mod lint;
mod listeners;
mod mpyblox;
mod operations;
mod pipeline;
mod powerloss;
mod projectmm;
mod promoter;
mod publish;
mod readers;
mod rehearsal;
mod rollout;
mod sessions;
mod things;
mod things_http;
mod things_sdk;
mod tls;
mod trust;
mod wheels;
