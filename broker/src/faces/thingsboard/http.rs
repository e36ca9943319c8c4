//! The same API over HTTP, below `/api/v1/<token>`.
//!
//! | call | answer |
//! |---|---|
//! | GET `/attributes?clientKeys=a,b&sharedKeys=c` | 200, those that exist |
//! | POST `/attributes`, POST `/telemetry` | 200, kept; 400 if it is no JSON of that kind |
//! | GET `/attributes/updates?timeout=ms` | 200 when they change, 408 if they do not |
//! | GET `/firmware?title&version[&size&chunk]`, `/software` | 200, a piece or all of it; 400 for another package, 404 for none |
//! | GET `/rpc?timeout=ms`, POST `/rpc` | 408, 200: nothing is asked of devices here |
//!
//! A token of nobody gets 401 without a body. Who reads attributes without a pause, as cOTA does, is answered a little
//! later each time, and never with an error.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{FromRequestParts, Path, RawQuery, State},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use mpypi_protocol::NodeId;
use serde_json::{Map, Value};
use tokio::time::{sleep, timeout};

use super::{
    ask::{Keys, Kind, Malformed, Report, attributes},
    desk, link,
    package::{Content, changes},
    session::part,
};
use crate::{
    access::devices::Device,
    clock,
    gateway::{
        Gateway, Here, Problem, Routes,
        body::Small,
        caller::Peer,
        file::{Cache, File},
        query::parameters,
    },
    index::IndexError,
    mailbox::Mailbox,
    message::Refusal,
    packet::Reason,
};

/// The longest that a device may wait for news.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
/// How long it waits if it does not say.
const USUAL_WAIT: Duration = Duration::from_secs(20);
/// Reads of attributes that a device may have at once before it is slowed.
const BURST: u32 = 16;
/// The pause between further ones.
const PAUSE: Duration = Duration::from_millis(500);
/// The longest that an answer is held back.
const HELD: Duration = Duration::from_secs(10);

/// All routes.
pub fn routes() -> Routes {
    let device = Router::new()
        .route("/attributes", get(read).post(learn))
        .route("/attributes/updates", get(updates))
        .route("/telemetry", post(report))
        .route("/firmware", get(firmware))
        .route("/software", get(software))
        .route("/rpc", get(no_order).post(no_answer))
        .route("/rpc/{id}", post(no_answer));
    Router::new().nest("/api/v1/{token}", device)
}

/// The device that a request is from, by the token in its path.
struct Caller {
    node: NodeId,
    device: Device,
}

/// What a device's request that cannot be answered as it should gets.
enum Turned {
    /// A status alone.
    Code(StatusCode),
    /// The broker failed.
    Failed(Problem),
}

impl IntoResponse for Turned {
    fn into_response(self) -> Response {
        match self {
            Turned::Code(code) => code.into_response(),
            Turned::Failed(problem) => problem.into_response(),
        }
    }
}

impl From<Refusal> for Turned {
    fn from(refusal: Refusal) -> Turned {
        Turned::Code(match refusal.reason {
            Reason::BadUserNameOrPassword | Reason::NotAuthorized => StatusCode::UNAUTHORIZED,
            Reason::QuotaExceeded => StatusCode::PAYLOAD_TOO_LARGE,
            _ => return Turned::Failed(refusal.into()),
        })
    }
}

impl From<IndexError> for Turned {
    fn from(error: IndexError) -> Turned {
        Turned::Failed(error.into())
    }
}

impl From<Problem> for Turned {
    fn from(problem: Problem) -> Turned {
        Turned::Failed(problem)
    }
}

impl From<Malformed> for Turned {
    fn from(error: Malformed) -> Turned {
        tracing::debug!(%error, "a device sends what cannot be read");
        Turned::Code(StatusCode::BAD_REQUEST)
    }
}

impl FromRequestParts<Arc<Gateway>> for Caller {
    type Rejection = Turned;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Caller, Turned> {
        let path = Path::<HashMap<String, String>>::from_request_parts(parts, gateway).await.ok();
        let token = path.and_then(|Path(mut path)| path.remove("token"));
        let address = parts.extensions.get::<Peer>().map(|peer| peer.address.ip());
        let Some((token, address)) = token.zip(address) else {
            return Err(Turned::Code(StatusCode::UNAUTHORIZED));
        };
        let (node, device) = gateway.shared.gate.device(address, &token).await?;
        Ok(Caller { node, device })
    }
}

async fn read(
    State(gateway): Here,
    Caller { node, device }: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, Turned> {
    let shared = &gateway.shared;
    let wait = shared.things.pace.turn(&node, clock::now().instant);
    if !wait.is_zero() {
        shared.metrics.things_held.one();
        sleep(wait).await;
    }
    let mut keys = Keys::default();
    for (name, value) in parameters(query.as_deref().unwrap_or_default()) {
        keys.parameter(&name, &value);
    }
    let own = desk::own(&shared.index, &node)?;
    let assigned = desk::assigned(shared, &node, &device).await?;
    Ok(Json(keys.select(&own, &assigned.shared)).into_response())
}

async fn learn(
    State(gateway): Here,
    Caller { node, device }: Caller,
    Small(body): Small,
) -> Result<StatusCode, Turned> {
    desk::learn(&gateway.shared, &node, &device, &attributes(&body)?).await?;
    Ok(StatusCode::OK)
}

async fn report(
    State(gateway): Here,
    Caller { node, device }: Caller,
    Small(body): Small,
) -> Result<StatusCode, Turned> {
    let report = Report::parse(&body)?;
    let assigned = desk::assigned(&gateway.shared, &node, &device).await?;
    desk::report(&gateway.shared, &node, &device, &report, &assigned).await?;
    Ok(StatusCode::OK)
}

async fn updates(
    State(gateway): Here,
    Caller { node, device }: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, Turned> {
    let shared = &gateway.shared;
    let news = Arc::new(Mailbox::new(&shared.limits));
    let _listening = link::listen(shared, &device, &news);
    let now = desk::assigned(shared, &node, &device).await?.shared.clone();
    // What changed between two requests is not missed.
    let told = shared.things.told.last(&node).unwrap_or_else(|| now.clone());
    let changed = async {
        let mut now = now;
        while now == told {
            news.arrived().await;
            while news.pop().is_some() {}
            now = desk::assigned(shared, &node, &device).await?.shared.clone();
        }
        Ok::<_, IndexError>(now)
    };
    let changed = tokio::select! {
        changed = timeout(wait(query.as_deref()), changed) => changed,
        () = shared.shutdown.cancelled() => return Ok(StatusCode::REQUEST_TIMEOUT.into_response()),
    };
    let Ok(now) = changed else {
        shared.things.told.tell(node, told);
        return Ok(StatusCode::REQUEST_TIMEOUT.into_response());
    };
    let now = now?;
    let (mut update, gone) = changes(&told, &now);
    if !gone.is_empty() {
        update.insert("deleted".to_owned(), gone.into());
    }
    shared.things.told.tell(node, now);
    Ok(Json(update).into_response())
}

/// How long a device waits for news.
fn wait(query: Option<&str>) -> Duration {
    let said = parameters(query.unwrap_or_default()).find(|(name, _)| name == "timeout");
    let said = said.and_then(|(_, value)| value.parse().ok()).map(Duration::from_millis);
    said.unwrap_or(USUAL_WAIT).min(LONGEST_WAIT)
}

async fn firmware(
    here: Here,
    caller: Caller,
    query: RawQuery,
    headers: HeaderMap,
) -> Result<Response, Turned> {
    download(here, caller, Kind::Firmware, query, headers).await
}

async fn software(
    here: Here,
    caller: Caller,
    query: RawQuery,
    headers: HeaderMap,
) -> Result<Response, Turned> {
    download(here, caller, Kind::Software, query, headers).await
}

async fn download(
    State(gateway): Here,
    Caller { node, device }: Caller,
    kind: Kind,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Turned> {
    let bad = || Turned::Code(StatusCode::BAD_REQUEST);
    let asked: HashMap<String, String> = parameters(query.as_deref().unwrap_or_default()).collect();
    let number = |name: &str| match asked.get(name).map(String::as_str) {
        None | Some("") => Ok(0),
        Some(text) => text.parse::<u64>().map_err(|_| bad()),
    };
    let (size, chunk) = (number("size")?, number("chunk")?);
    let (Some(title), Some(version)) = (asked.get("title"), asked.get("version")) else { return Err(bad()) };
    let assigned = desk::assigned(&gateway.shared, &node, &device).await?;
    let package = match kind {
        Kind::Firmware => &assigned.firmware,
        Kind::Software => &assigned.software,
    };
    let Some(package) = package else { return Err(Turned::Code(StatusCode::NOT_FOUND)) };
    let Content::Image { digest, payload } = &package.content else {
        return Err(Turned::Code(StatusCode::NOT_FOUND));
    };
    if (title, version) != (&package.title, &package.version) {
        return Err(bad());
    }
    let attachment = HeaderValue::from_str(&format!("attachment;filename={title}.bin"));
    let file = File::new(payload.clone(), digest, Cache::Asking)
        .header(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))
        .header(header::CONTENT_DISPOSITION, attachment.map_err(|error| Problem::internal(&error))?);
    Ok(match size {
        0 if chunk == 0 => file.answer(&gateway, &headers)?,
        0 => file.piece(&gateway, 0..0)?,
        size => {
            let piece = part(payload, chunk, Some(size));
            file.piece(&gateway, piece.from..piece.to)?
        }
    })
}

/// There is never an order for a device.
async fn no_order(
    State(gateway): Here,
    Caller { .. }: Caller,
    RawQuery(query): RawQuery,
) -> Result<StatusCode, Turned> {
    tokio::select! {
        () = sleep(wait(query.as_deref())) => {}
        () = gateway.shared.shutdown.cancelled() => {}
    }
    Ok(StatusCode::REQUEST_TIMEOUT)
}

async fn no_answer(Caller { .. }: Caller, _: Small) -> StatusCode {
    StatusCode::OK
}

/// Slows those who ask without a pause: each may have a burst, then one answer each `PAUSE`.
#[derive(Debug, Default)]
pub struct Pace {
    /// By node, when it has had all that it asked for at its pace. Held to look up and change one.
    due: Mutex<HashMap<NodeId, Instant>>,
}

impl Pace {
    /// Takes note of a request, and says how long its answer is to wait.
    pub fn turn(&self, node: &NodeId, now: Instant) -> Duration {
        /// Nodes above which those that asked for nothing lately are forgotten.
        const MANY: usize = 4096;
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        if due.len() >= MANY && !due.contains_key(node) {
            due.retain(|_, due| *due > now);
        }
        let before = due.get(node).copied().unwrap_or(now).max(now);
        let wait = (before - now).saturating_sub(PAUSE * BURST).min(HELD);
        due.insert(node.clone(), (before + PAUSE).min(now + HELD + PAUSE * BURST));
        wait
    }
}

/// What each node was told last of its shared attributes, of those that wait for news by HTTP.
#[derive(Debug, Default)]
pub struct Told(Mutex<HashMap<NodeId, Map<String, Value>>>);

impl Told {
    fn last(&self, node: &NodeId) -> Option<Map<String, Value>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }

    fn tell(&self, node: NodeId, attributes: Map<String, Value>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(node, attributes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_without_a_pause_is_slowed_and_others_are_not() {
        let pace = Pace::default();
        let (one, other) = (NodeId::new("one").unwrap(), NodeId::new("other").unwrap());
        let mut now = clock::now().instant;
        for _ in 0..=BURST {
            assert_eq!(pace.turn(&one, now), Duration::ZERO);
        }
        // From here on each is answered a pause after the one before.
        for _ in 0..5 {
            let wait = pace.turn(&one, now);
            assert_eq!(wait, PAUSE);
            now += wait;
        }
        assert_eq!(pace.turn(&other, now), Duration::ZERO);
        for _ in 0..1000 {
            assert!(pace.turn(&one, now) <= HELD);
        }
        assert_eq!(pace.turn(&one, now + HELD + PAUSE * BURST), Duration::ZERO, "all is forgiven");
    }
}
