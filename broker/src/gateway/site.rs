//! Which faces a listener shows, and who has to log in where.

use std::sync::Arc;

use axum::{
    Extension, Router,
    extract::Request,
    middleware::{self, Next},
    response::Response,
};
use mpypi_protocol::ChannelName;
use tower_service::Service as _;

use super::{Gateway, Here, Problem, Routes, caller, count::Face, health};
use crate::faces::{
    api, downloads, mip, promoter, simple,
    thingsboard::{self, github::Hosts},
    upload,
};

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
        let is_main = *self == Site::Main;
        let mount = |face, door, routes| mount(gateway, face, door, routes);
        let routes = match self {
            Site::Main => {
                let login = |face, routes| mount(face, Door::Login, routes);
                Router::new()
                    .merge(mount(Face::Broker, Door::Open, health::open_routes()))
                    .merge(login(Face::Broker, health::routes()))
                    .merge(mount(Face::ThingsBoard, Door::Open, thingsboard::http::routes()))
                    .merge(mount(Face::ThingsBoard, Door::Open, thingsboard::github::routes()))
                    .merge(login(Face::Downloads, downloads::packages()))
                    .merge(login(Face::Downloads, here_and_by_channel(downloads::firmware())))
                    .merge(login(Face::Mip, here_and_by_channel(Router::new().nest("/mip", mip::routes()))))
                    .merge(login(Face::Simple, here_and_by_channel(simple::routes())))
                    .merge(login(Face::Simple, upload::routes()))
                    .merge(mount(Face::Api, Door::Open, api::open_routes()))
                    .merge(login(Face::Api, api::routes()))
                    .merge(login(Face::Promoter, by_channel(promoter::routes())))
                    .fallback(nothing_here)
                    .method_not_allowed_fallback(not_so)
            }
            Site::Promoter { channel, door } => {
                let routes = promoter::routes().merge(by_channel(promoter::routes()));
                mount(Face::Promoter, door.clone(), routes)
                    .layer(Extension(promoter::Shown(channel.clone())))
                    .fallback(promoter::not_found)
            }
        };
        let hosts = Hosts::new(gateway);
        let by_host = move |request: Request, next: Next| {
            let other = hosts.find(request.headers()).filter(|_| is_main);
            async move {
                match other {
                    Some(mut host) => host.call(request).await.unwrap_or_else(|never| match never {}),
                    None => next.run(request).await,
                }
            }
        };
        routes.with_state(gateway.clone()).layer(middleware::from_fn(by_host))
    }
}

/// Routes below `/channels/<channel>`.
fn by_channel(routes: Routes) -> Routes {
    Router::new().nest("/channels/{channel}", routes)
}

/// The same routes for all channels together, and for each.
fn here_and_by_channel(routes: Routes) -> Routes {
    routes.clone().merge(by_channel(routes))
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
