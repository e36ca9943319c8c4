//! The HTTP gateway: one house with several doors, in which each face has its rooms.
//!
//! | module | does |
//! |---|---|
//! | [`listen`] | accepts: HTTP and HTTPS, keep-alive, what a connection may take of time and room |
//! | [`site`] | which faces a listener shows |
//! | [`caller`] | who asks, by the broker's users, and what they may |
//! | [`problem`] | how a refusal is told: `application/problem+json`, with a hint |
//! | [`body`] | bodies that come in, within bounds of size and time |
//! | [`file`](mod@file) | files that go out: validators, [ranges](range), pieces from disk to socket |
//! | [`publish`] | what comes in over HTTP goes to the index's writer, as from any client |
//! | [`query`] | parameters |
//! | [`count`] | requests and bytes by face |
//! | [`health`] | `/healthz` and `/metrics` |
//!
//! A face is a module in [`faces`](crate::faces) with its `routes()`, mounted in [`site`], where its callers are
//! asked who they are; its handlers then ask their [`Caller`] what it may.

pub mod body;
pub mod caller;
pub mod count;
pub mod file;
pub mod health;
pub mod listen;
pub mod problem;
pub mod publish;
pub mod query;
pub mod range;
pub mod site;

use std::sync::Arc;

use axum::{Router, extract::State};
use tokio::sync::Semaphore;

pub use caller::Caller;
pub use listen::{HttpEndpoint, HttpListener, Place};
pub use problem::Problem;
pub use site::Site;

use crate::{
    connection::Shared,
    faces::{catalog::Catalog, promoter::Folders},
};

/// What all handlers share.
#[derive(Debug)]
pub struct Gateway {
    /// What the gateway shares with all connections.
    pub shared: Arc<Shared>,
    /// What channels name and wheels hold.
    pub catalog: Catalog,
    /// Channels as ota-promoter's folders.
    pub folders: Folders,
    /// Places for those who listen for events.
    pub events: Arc<Semaphore>,
}

/// How a handler gets at the [`Gateway`].
pub type Here = State<Arc<Gateway>>;

/// The routes of a face, before they are mounted.
pub type Routes = Router<Arc<Gateway>>;

impl Gateway {
    /// A gateway to what `shared` holds.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Gateway {
        let events = Arc::new(Semaphore::new(shared.limits.http_events));
        Gateway { shared, catalog: Catalog::default(), folders: Folders::default(), events }
    }
}
