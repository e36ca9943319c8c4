//! The device's own interfaces: what local screens, scripts and tools speak to, over HTTP.
//!
//! Each is a thin view of the one device: what MQTT does shows in HTTP, and the other way round.
//!
//! | module | speaks |
//! |---|---|
//! | [`desk`] | with the task that owns the device |
//! | [`http`] | HTTP/1.1, with whom it may |
//! | [`appstore`] | the App Store API of robots: packages, tasks and their logs |
//! | [`projectmm`] | projectMM's firmware update, with its WebSocket |
//! | `fetch` | with the server that a firmware is fetched from |
//! | `local` | about wheels in files of this machine |

pub mod appstore;
pub mod desk;
mod fetch;
pub mod http;
mod local;
pub mod projectmm;
