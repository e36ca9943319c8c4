//! The APIs of others, served from the index. Those over HTTP are modules with `routes()`, mounted in
//! [`gateway::site`](crate::gateway::site).
//!
//! | module | whose clients |
//! |---|---|
//! | [`promoter`] | ota-promoter's: files by checksum |
//! | [`mip`] | MicroPython's `mip` and `mpremote mip` |
//! | [`simple`] | pip, uv and whatever reads PyPI's simple index |
//! | [`upload`] | twine and uv publish |
//! | [`downloads`] | whoever takes a package by its digest, or firmware by its name |
//! | [`api`] | dashboards and scripts: channels, nodes, rollouts, and what is done to them |
//! | [`home`] | Home Assistant's, by MQTT: every node an update |
//! | [`thingsboard`] | devices with ThingsBoard's API, by MQTT and HTTP; cOTA's, with GitHub's beside it |
//!
//! All but the last two ask the [`catalog`] what channels name and what wheels hold, which reads each list and wheel once.

pub mod api;
pub mod catalog;
pub mod downloads;
pub mod home;
pub mod mip;
pub mod promoter;
pub mod simple;
pub mod thingsboard;
pub mod upload;
pub mod version;
pub mod wheel;
