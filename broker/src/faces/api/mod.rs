//! The fleet API: what dashboards and scripts ask about channels, nodes and rollouts, and have done to them.
//!
//! | module | answers |
//! |---|---|
//! | [`nodes`] | who is where, one node with all that is known of it, orders to it |
//! | [`channels`] | what is in them, what was, what differs, and what all of them have |
//! | [`rollouts`] | how they stand, orders to who steers them |
//! | [`events`] | what changes, as it does |
//! | [`publish`] | a form that becomes a release |
//! | [`shape`] | all of it as JSON |
//!
//! Everything is read from the broker's [view of the fleet](crate::fleet), and each caller sees what MQTT would show them.
//! The document at `/api/openapi.json` is made from the same handlers that answer.

pub mod channels;
pub mod events;
pub mod nodes;
pub mod publish;
pub mod rollouts;
pub mod shape;

use std::sync::{Arc, LazyLock};

use axum::{
    Json,
    extract::{FromRequestParts, Query, RawPathParams, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use mpypi_protocol::{ChannelName, NodeId, topic::NodeSubject};
use serde::{Serialize, de::DeserializeOwned};
use utoipa::{
    OpenApi,
    openapi::{
        ContentBuilder, Ref, RefOr, ResponseBuilder,
        security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};

use self::shape::{May, Me, Overview, ProblemDetails, Samples};
use crate::{
    access::Identity,
    clock,
    fleet::limits,
    gateway::{Caller, Gateway, Here, Problem, Routes, body::Small, file::is_known},
};

/// What is said about the API as a whole.
#[derive(OpenApi)]
#[openapi(
    info(title = "mpypi fleet API", description = "Channels, nodes and rollouts of an mpypi broker."),
    components(schemas(ProblemDetails))
)]
struct Document;

/// The document, made once.
static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let mut document = routed().into_openapi();
    for (path, item) in &mut document.paths.paths {
        let operations = [&mut item.get, &mut item.post].into_iter().flatten();
        for operation in operations {
            let is_open = path.ends_with("/openapi.json");
            let login: &[(&str, &str)] = match is_open {
                true => &[],
                false => &[
                    ("401", "Nobody, or nobody known, is logged in"),
                    ("403", "The caller may not do this"),
                    ("429", "Too many wrong logins came from there"),
                ],
            };
            for (code, text) in login {
                let response = ResponseBuilder::new().description(*text).build();
                let all = &mut operation.responses.responses;
                all.entry((*code).to_owned()).or_insert(RefOr::T(response));
            }
            for (code, response) in &mut operation.responses.responses {
                if let RefOr::T(response) = response
                    && code.as_str() >= "400"
                {
                    let problem =
                        ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
                    response.content.insert("application/problem+json".to_owned(), RefOr::T(problem));
                }
            }
        }
    }
    let components = document.components.get_or_insert_default();
    for (name, scheme) in [("basic", HttpAuthScheme::Basic), ("bearer", HttpAuthScheme::Bearer)] {
        let scheme = SecurityScheme::Http(HttpBuilder::new().scheme(scheme).build());
        components.security_schemes.insert(name.to_owned(), RefOr::T(scheme));
    }
    let one_of = ["basic", "bearer"].map(|name| SecurityRequirement::new::<_, [&str; 0], &str>(name, []));
    // Where there are no users, nobody need log in.
    document.security = Some(one_of.into_iter().chain([SecurityRequirement::default()]).collect());
    document.to_json().unwrap_or_else(|error| {
        tracing::error!(%error, "the API cannot be described");
        "{}".to_owned()
    })
});

/// What anybody may ask.
pub fn open_routes() -> Routes {
    OpenApiRouter::new().routes(routes!(document)).into()
}

/// What the API answers to those who are known.
pub fn routes() -> Routes {
    all().into()
}

fn all() -> OpenApiRouter<Arc<Gateway>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(me))
        .routes(routes!(overview))
        .routes(routes!(overview_history))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::one))
        .routes(routes!(nodes::log))
        .routes(routes!(nodes::command))
        .routes(routes!(channels::list))
        .routes(routes!(channels::one))
        .routes(routes!(channels::releases))
        .routes(routes!(channels::release))
        .routes(routes!(channels::diff))
        .routes(routes!(channels::packages))
        .routes(routes!(rollouts::list))
        .routes(routes!(rollouts::one, rollouts::order))
        .routes(routes!(events::events))
}

fn routed() -> OpenApiRouter<Arc<Gateway>> {
    all().routes(routes!(document))
}

/// This document.
#[utoipa::path(get, path = "/api/openapi.json", responses((status = 200, description = "OpenAPI 3.1", body = Object)))]
async fn document() -> Response {
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    (kind, DOCUMENT.as_str()).into_response()
}

/// Who asks, and what they may do.
#[utoipa::path(get, path = "/api/me", responses((status = 200, description = "Who asks", body = Me)))]
async fn me(caller: Caller) -> Json<Me> {
    let (role, node) = match &caller.identity {
        Identity::Anyone => ("anyone", None),
        Identity::Admin => ("admin", None),
        Identity::Publisher => ("publisher", None),
        Identity::Viewer => ("viewer", None),
        Identity::Node(node, _) => ("node", Some(node.to_string())),
        Identity::Guest(_) => ("guest", None),
        Identity::Edge => ("edge", None),
    };
    // What a role lets do to one of them it lets do to all.
    let may = |topic: &str| caller.identity.may_publish(topic);
    let may = May { order: may("mpypi/nodes/any/cmd"), publish: may("mpypi/channels/any") };
    Json(Me { name: caller.login.map(|login| login.name), role, node, may })
}

/// How many nodes stand where.
#[utoipa::path(get, path = "/api/overview", responses(
    (status = 200, description = "How many nodes stand where", body = Overview),
    (status = 304, description = "Nothing changed"),
))]
async fn overview(State(gateway): Here, caller: Caller, headers: HeaderMap) -> Result<Response, Problem> {
    caller.reads("mpypi/nodes/#")?;
    let view = gateway.shared.fleet.look().await;
    let tag = Tag::of(&gateway, view.number(), &Reach::All);
    if let Some(same) = tag.same(&headers) {
        return Ok(same);
    }
    Ok(tag.answer(Overview::of(&view, clock::now().unix_ms)))
}

/// How many nodes stood where since the broker started.
#[utoipa::path(get, path = "/api/overview/history", responses(
    (status = 200, description = "What there was to see, whenever it changed", body = Samples),
))]
async fn overview_history(State(gateway): Here, caller: Caller) -> Result<Json<Samples>, Problem> {
    caller.reads("mpypi/nodes/#")?;
    let view = gateway.shared.fleet.look().await;
    let every = limits::TICK.as_secs() * limits::SAMPLE_TICKS;
    Ok(Json(Samples { every, samples: view.samples().map(Into::into).collect() }))
}

/// Which nodes a caller sees.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reach {
    /// All of them.
    All,
    /// Itself.
    Own(NodeId),
}

impl Reach {
    fn of(caller: &Caller) -> Result<Reach, Problem> {
        match (&caller.identity, caller.reads("mpypi/nodes/#")) {
            (_, Ok(())) => Ok(Reach::All),
            (Identity::Node(own, _), Err(_)) => Ok(Reach::Own(own.clone())),
            (_, Err(problem)) => Err(problem),
        }
    }
}

/// What stands for a state of all that is known, for callers who see all of it.
struct Tag(Option<String>);

impl Tag {
    fn of(gateway: &Gateway, number: u64, reach: &Reach) -> Tag {
        let epoch = gateway.shared.fleet.epoch();
        Tag((*reach == Reach::All).then(|| format!("\"{epoch:08x}-{number}\"")))
    }

    /// The answer to a caller who has it already.
    fn same(&self, headers: &HeaderMap) -> Option<Response> {
        let tag = self.0.as_ref().filter(|tag| is_known(headers, tag))?;
        Some((StatusCode::NOT_MODIFIED, Tag(Some(tag.clone())).headers()).into_response())
    }

    fn answer(&self, body: impl Serialize) -> Response {
        (self.headers(), Json(body)).into_response()
    }

    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
        headers.insert(header::VARY, HeaderValue::from_static("Authorization"));
        let tag = self.0.as_ref().and_then(|tag| HeaderValue::from_str(&format!("W/{tag}")).ok());
        headers.extend(tag.map(|tag| (header::ETAG, tag)));
        headers
    }
}

/// The parameters of a request; each is known, and said once.
#[derive(Debug)]
struct Asked<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Asked<T>, Problem> {
        let found = Query::<T>::try_from_uri(&parts.uri);
        let Query(found) = found.map_err(|error| {
            Problem::bad_request(format!("the query of the URL: {}", innermost(&error)))
                .hint("/api/openapi.json says which parameters there are")
        })?;
        Ok(Asked(found))
    }
}

/// What an error comes from in the end: each of these repeats it.
fn innermost(mut error: &dyn std::error::Error) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// A body of JSON.
#[derive(Debug)]
struct Told<T>(T);

impl<T: DeserializeOwned> axum::extract::FromRequest<Arc<Gateway>> for Told<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, gateway: &Arc<Gateway>) -> Result<Told<T>, Problem> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/json") {
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "the body is to be JSON")
                .hint("send it with `Content-Type: application/json`"));
        }
        let Small(body) = Small::from_request(request, gateway).await?;
        let told = serde_json::from_slice(&body).map_err(|error| {
            Problem::bad_request(format!("the body: {error}"))
                .hint("/api/openapi.json says what it should be")
        })?;
        Ok(Told(told))
    }
}

/// The node in a request's path.
#[derive(Debug)]
struct AtNode(NodeId);

/// The channel in a request's path.
#[derive(Debug)]
struct AtChannel(ChannelName);

/// The sequence in a request's path.
#[derive(Debug)]
struct AtSequence(u64);

impl FromRequestParts<Arc<Gateway>> for AtNode {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<AtNode, Problem> {
        let name = parameter(parts, gateway, "node").await?;
        NodeId::new(name).map(AtNode).map_err(|error| Problem::not_found(error.to_string()))
    }
}

impl FromRequestParts<Arc<Gateway>> for AtChannel {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<AtChannel, Problem> {
        let name = parameter(parts, gateway, "channel").await?;
        ChannelName::new(name).map(AtChannel).map_err(|error| Problem::not_found(error.to_string()))
    }
}

impl FromRequestParts<Arc<Gateway>> for AtSequence {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<AtSequence, Problem> {
        let text = parameter(parts, gateway, "sequence").await?;
        let wrong = |_| Problem::bad_request("the sequence of a release is a whole number");
        text.parse().map(AtSequence).map_err(wrong)
    }
}

async fn parameter(parts: &mut Parts, gateway: &Arc<Gateway>, wanted: &str) -> Result<String, Problem> {
    let all = RawPathParams::from_request_parts(parts, gateway).await;
    let all = all.map_err(|error| Problem::not_found(error.to_string()))?;
    let found = all.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.to_owned());
    found.ok_or_else(|| Problem::not_found("there is nothing at this path"))
}

/// Some of many: how many to leave out, and how many to take at most.
fn page(offset: Option<u64>, limit: Option<u64>) -> Result<(u64, u64), Problem> {
    let limit = limit.unwrap_or(PAGE);
    match (1..=LARGEST_PAGE).contains(&limit) {
        true => Ok((offset.unwrap_or_default(), limit)),
        false => Err(Problem::bad_request(format!("`limit` is from 1 to {LARGEST_PAGE}, not {limit}"))
            .hint("take what comes after it with `offset`")),
    }
}

/// How many are on a page if nobody says otherwise.
const PAGE: u64 = 100;
/// The most on a page.
const LARGEST_PAGE: u64 = 1000;

/// Those of a page.
fn cut<T>(all: Vec<T>, offset: u64, limit: u64) -> impl Iterator<Item = T> {
    let at = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    all.into_iter().skip(at(offset)).take(at(limit))
}

/// What a node's state and the like are published under, for those who may read them.
fn may_see(caller: &Caller, node: &NodeId) -> bool {
    caller.identity.may_subscribe(&node.topic(NodeSubject::State))
}
