//! The APIs of others, served from the index. Those over HTTP are modules with `routes()`, mounted in
//! [`gateway::site`](crate::gateway::site).
//!
//! | module | whose clients |
//! |---|---|
//! | [`thingsboard`] | devices with ThingsBoard's API, by MQTT and HTTP; cOTA's, with GitHub's beside it |

pub mod thingsboard;
