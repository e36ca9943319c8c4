//! The APIs of others, served from the index over HTTP. Each is a module with its `routes()`, mounted in
//! [`gateway::site`](crate::gateway::site).
