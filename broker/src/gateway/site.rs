//! Which faces a listener shows, and who has to log in where.

use std::sync::Arc;

use axum::{
    Router,
    extract::Request,
    middleware::{self, Next},
    response::Response,
};
use mpypi_protocol::ChannelName;

use super::{Gateway, Here, Problem, Routes, caller, count::Face, health};

/// What a listener shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Site {
    /// All that is ours.
    Main,
    /// One channel, as ota-promoter's server shows a folder.
    Promoter {
        /// The channel.
        channel: ChannelName,
        /// Who may read it there.
        door: Door,
    },
}

/// Who comes in without a login where there are users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Door {
    /// Nobody.
    Login,
    /// Whoever there is, to read this channel and nothing else.
    Guests(ChannelName),
    /// Whoever there is: the face asks by itself, or tells no secrets.
    Open,
}

impl Site {
    /// Whether it was asked for that everybody may read there, whatever users there are.
    #[must_use]
    pub fn is_for_all(&self) -> bool {
        matches!(self, Site::Promoter { door: Door::Guests(_), .. })
    }

    /// All its routes.
    pub(super) fn router(&self, gateway: &Arc<Gateway>) -> Router {
        let mount = |face, door, routes| mount(gateway, face, door, routes);
        let routes = match self {
            Site::Main => Router::new()
                .merge(mount(Face::Broker, Door::Open, health::open_routes()))
                .merge(mount(Face::Broker, Door::Login, health::routes()))
                .fallback(nothing_here)
                .method_not_allowed_fallback(not_so),
            Site::Promoter { .. } => Router::new().fallback(nothing_here),
        };
        routes.with_state(gateway.clone())
    }
}

/// The routes of a face, which will be known by its name, behind its door.
fn mount(gateway: &Arc<Gateway>, face: Face, door: Door, routes: Routes) -> Routes {
    let named = move |mut response: Response| async move {
        response.extensions_mut().insert(face);
        response
    };
    let ask =
        move |gateway: Here, request: Request, next: Next| caller::ask(gateway, door.clone(), request, next);
    routes
        .route_layer(middleware::from_fn_with_state(gateway.clone(), ask))
        .layer(middleware::map_response(named))
}

async fn nothing_here() -> Problem {
    Problem::not_found("there is nothing at this path")
}

async fn not_so() -> Problem {
    Problem::new(axum::http::StatusCode::METHOD_NOT_ALLOWED, "this path does not know this method")
}
