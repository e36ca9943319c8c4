//! projectMM's firmware update: two ways to bring an image, one place to see how it goes, and a WebSocket that tells it.

use std::{error::Error, io, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Response as Plain, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use hyper_util::rt::TokioIo;
use mpypi_protocol::Digest;
use serde_json::{Map, Value, json};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role, protocol::WebSocketConfig},
};

use super::{
    desk::{Ask, FlashAsk},
    fetch,
    http::{Shared, body, error, off},
};
use crate::{
    device,
    firmware::{NotStarted, Origin},
    limits,
};

/// Most clients of the WebSocket at once.
pub(super) const WATCHERS: usize = 8;
/// How often they are told what changed.
const PATCH: Duration = Duration::from_secs(1);
/// Longest URL of an image, in characters.
const URL: usize = 511;
/// Largest body of a request that is no image, in bytes.
const BODY: usize = 2048;

pub(super) fn router() -> Router<Arc<Shared>> {
    Router::new()
        .route("/api/firmware/url", post(url))
        .route("/api/firmware/upload", post(upload))
        .route("/api/state", get(state))
        .route("/api/modules/Firmware", get(module))
        .route("/ws", get(watch))
}

async fn state(State(shared): State<Arc<Shared>>) -> Response {
    match shared.bell.ask(Ask::Status).await {
        Ok(status) => Json(whole(&status)).into_response(),
        Err(_) => off(),
    }
}

async fn module(State(shared): State<Arc<Shared>>) -> Response {
    match shared.bell.ask(Ask::Status).await {
        Ok(status) => Json(show(&status)).into_response(),
        Err(_) => off(),
    }
}

fn whole(status: &device::Status) -> Value {
    json!({ "modules": [show(status)] })
}

/// The module, as it is shown.
fn show(status: &device::Status) -> Value {
    let text = |name: &str, value: &str| json!({ "name": name, "type": "string", "value": value });
    let progress = |name: &str, (value, total): (u64, u64)| json!({ "name": name, "type": "progress", "value": value, "total": total });
    let mut module = json!({
        "name": "Firmware",
        "type": "FirmwareUpdateModule",
        "controls": [
            text("version", &status.version),
            text("build", &status.build),
            text("firmware", &status.key),
            progress("firmwarePartition", status.partition),
            progress("update_pct", status.progress),
        ],
    });
    if let Some(text) = &status.status {
        module["status"] = text.as_str().into();
        module["severity"] = severity(status).into();
    }
    module
}

fn severity(status: &device::Status) -> &'static str {
    match (&status.status, status.is_error) {
        (None, _) => "",
        (_, true) => "error",
        (_, false) => "status",
    }
}

/// What is told of a change: values by path.
fn values(status: &device::Status) -> Map<String, Value> {
    [
        ("Firmware/version", status.version.as_str().into()),
        ("Firmware/build", status.build.as_str().into()),
        ("Firmware/firmwarePartition", status.partition.0.into()),
        ("Firmware/update_pct", status.progress.0.into()),
        ("Firmware/update_pct/@total", status.progress.1.into()),
        ("Firmware/@status", status.status.clone().unwrap_or_default().into()),
        ("Firmware/@severity", severity(status).into()),
    ]
    .map(|(path, value)| (path.to_owned(), value))
    .into_iter()
    .collect()
}

/// What is not possible now, in this order.
async fn refused(shared: &Shared) -> Option<Response> {
    match shared.bell.ask(Ask::Status).await {
        Ok(status) if !status.is_supported => Some(not_started(NotStarted::Unsupported, String::new())),
        Ok(status) if status.is_busy => Some(not_started(NotStarted::Busy, String::new())),
        Ok(_) => None,
        Err(_) => Some(off()),
    }
}

fn not_started(why: NotStarted, status: String) -> Response {
    match why {
        NotStarted::Unsupported => error(StatusCode::NOT_IMPLEMENTED, "OTA not supported on this platform"),
        NotStarted::Busy => error(StatusCode::CONFLICT, "ota already in progress"),
        NotStarted::Failed => error(StatusCode::INTERNAL_SERVER_ERROR, status),
    }
}

async fn url(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let bytes = match body(request, BODY).await {
        Ok(bytes) => bytes,
        Err(response) => return response,
    };
    if let Some(response) = refused(&shared).await {
        return response;
    }
    let order: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let url = order["url"].as_str().unwrap_or_default();
    if url.is_empty() {
        return error(StatusCode::BAD_REQUEST, "url required");
    }
    if !["http://", "https://"].iter().any(|scheme| url.starts_with(scheme)) {
        return error(StatusCode::BAD_REQUEST, "url must start with http:// or https://");
    }
    let expected = match &order["sha256"] {
        Value::Null => None,
        Value::String(text) if text.is_empty() => None,
        text => match text.as_str().and_then(|text| text.to_ascii_lowercase().parse::<Digest>().ok()) {
            Some(digest) => Some(digest),
            None => return error(StatusCode::BAD_REQUEST, "sha256 must be 64 hexadecimal digits"),
        },
    };
    if url.chars().count() > URL {
        shared.bell.tell(Ask::Flash(FlashAsk::Fail("url too long".to_owned()))).await;
        return error(StatusCode::INTERNAL_SERVER_ERROR, "error: url too long");
    }
    let started = shared.bell.ask(|reply| Ask::Flash(FlashAsk::Start(Origin::Fetched, reply))).await;
    let session = match started {
        Ok(Ok(session)) => session,
        Ok(Err((why, status))) => return not_started(why, status),
        Err(_) => return off(),
    };
    let version = order["version"].as_str().filter(|version| !version.is_empty()).map(str::to_owned);
    let order = fetch::Order { session, url: url.to_owned(), expected, version };
    match fetch::start(order, shared.bell.clone(), &shared.options.trust, shared.stop.clone()) {
        Ok(()) => (StatusCode::ACCEPTED, Json(json!({ "ok": true }))).into_response(),
        Err(cause) => {
            let status = format!("error: {cause}");
            shared.bell.tell(Ask::Flash(FlashAsk::Abort(session, Some(cause)))).await;
            error(StatusCode::INTERNAL_SERVER_ERROR, status)
        }
    }
}

async fn upload(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    if let Some(response) = refused(&shared).await {
        return response;
    }
    let length =
        request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let Some(length) = length else { return error(StatusCode::BAD_REQUEST, "invalid content-length") };
    let expected =
        match request.headers().get("x-sha256").map(|text| text.to_str().unwrap_or_default().parse()) {
            None => None,
            Some(Ok(digest)) => Some(digest),
            Some(Err(_)) => return error(StatusCode::BAD_REQUEST, "x-sha256 must be 64 hexadecimal digits"),
        };
    let started = shared.bell.ask(|reply| Ask::Flash(FlashAsk::Start(Origin::Sent(length), reply))).await;
    let session = match started {
        Ok(Ok(session)) => session,
        Ok(Err((why, status))) => return not_started(why, status),
        Err(_) => return off(),
    };
    // Whatever ends this, the device is free for the next one.
    let mut guard = Abort { shared: shared.clone(), session: Some(session) };
    let received = receive(&shared, session, request, length).await;
    let (code, status) = match received {
        Ok(()) => {
            let finished = shared
                .bell
                .ask(|reply| Ask::Flash(FlashAsk::Finish { session, expected, version: None, reply }))
                .await;
            match finished {
                Ok(Ok(())) => {
                    guard.session = None;
                    return Json(json!({ "ok": true })).into_response();
                }
                Ok(Err(status)) => (StatusCode::INTERNAL_SERVER_ERROR, status),
                Err(_) => return off(),
            }
        }
        Err(Cut::Flash(status)) => (StatusCode::INTERNAL_SERVER_ERROR, status),
        Err(Cut::Off) => return off(),
        Err(Cut::Short(cause)) => {
            guard.session = None;
            shared.bell.tell(Ask::Flash(FlashAsk::Abort(session, cause))).await;
            let status = shared.bell.ask(Ask::Status).await.ok().and_then(|status| status.status);
            (StatusCode::BAD_REQUEST, status.unwrap_or_default())
        }
    };
    error(code, status)
}

/// Why an upload ends.
enum Cut {
    /// The device does not take it; this is shown.
    Flash(String),
    /// The bytes do not come; for this cause, or because they ended early.
    Short(Option<String>),
    Off,
}

async fn receive(shared: &Shared, session: u64, request: Request, length: u64) -> Result<(), Cut> {
    let mut stream = request.into_body().into_data_stream();
    let aborted = || Cut::Short(Some("upload aborted".to_owned()));
    let mut got = 0;
    while got < length {
        let piece: Bytes = match timeout(limits::UPLOAD_STALL, stream.next()).await {
            Ok(Some(Ok(piece))) => piece,
            Ok(None) => return Err(Cut::Short(None)),
            Ok(Some(Err(error))) => {
                let ended = causes(&error).any(|cause| {
                    let cause = cause.downcast_ref::<io::Error>();
                    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::UnexpectedEof)
                });
                return Err(if ended { Cut::Short(None) } else { aborted() });
            }
            Err(_) => return Err(aborted()),
        };
        got += piece.len() as u64;
        match shared.bell.ask(|reply| Ask::Flash(FlashAsk::Push(session, piece, reply))).await {
            Ok(Ok(())) => {}
            Ok(Err(status)) => return Err(Cut::Flash(status)),
            Err(_) => return Err(Cut::Off),
        }
    }
    Ok(())
}

/// An error, and what it comes from.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

/// Gives an upload up when its connection is gone.
struct Abort {
    shared: Arc<Shared>,
    session: Option<u64>,
}

impl Drop for Abort {
    fn drop(&mut self) {
        if let Some(session) = self.session {
            let bell = self.shared.bell.clone();
            self.shared.tasks.spawn(async move {
                bell.tell(Ask::Flash(FlashAsk::Abort(session, Some("upload aborted".to_owned())))).await;
            });
        }
    }
}

async fn watch(State(shared): State<Arc<Shared>>, mut request: Request) -> Response {
    let Some(key) = key(request.headers()) else {
        return error(StatusCode::UPGRADE_REQUIRED, "a WebSocket is expected");
    };
    let Ok(place) = shared.watchers.clone().try_acquire_owned() else {
        return error(StatusCode::SERVICE_UNAVAILABLE, "too many clients");
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let watched = shared.clone();
    shared.tasks.spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            let config = WebSocketConfig::default().max_message_size(Some(BODY)).max_frame_size(Some(BODY));
            let socket =
                WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
            tell(socket, &watched).await;
        }
        drop(place);
    });
    let answer = Plain::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_ACCEPT, derive_accept_key(key.as_bytes()));
    answer.body(axum::body::Body::empty()).unwrap_or_else(|_| off())
}

/// The key of a client that wants a WebSocket (RFC 6455, 4.2.1).
fn key(headers: &HeaderMap) -> Option<HeaderValue> {
    let has = |name, word: &str| {
        let value = headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or_default();
        value.split(',').any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    let good = has(header::UPGRADE, "websocket")
        && has(header::CONNECTION, "upgrade")
        && has(header::SEC_WEBSOCKET_VERSION, "13");
    headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| good).cloned()
}

/// Tells all of the state, then each second what changed.
async fn tell(socket: WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>, shared: &Shared) {
    let (mut sink, mut stream) = socket.split();
    let mut ticks = interval(PATCH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told: Option<Map<String, Value>> = None;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            message = stream.next() => match message {
                // Nothing that a client says changes anything; a ping is answered by the library.
                Some(Ok(message)) if !message.is_close() => continue,
                _ => return,
            },
            () = shared.stop.cancelled() => {
                // Who does not listen any more needs no goodbye.
                let _ = timeout(limits::GOODBYE, sink.close()).await;
                return;
            }
        }
        let Ok(status) = shared.bell.ask(Ask::Status).await else { return };
        let now = values(&status);
        let message = match &told {
            None => Some(whole(&status)),
            Some(before) => {
                let changed = now.iter().filter(|(path, value)| before.get(*path) != Some(value));
                let patch: Vec<_> =
                    changed.map(|(path, value)| json!({ "path": path, "value": value })).collect();
                (!patch.is_empty()).then(|| json!({ "patch": patch }))
            }
        };
        told = Some(now);
        let sent = match message {
            Some(message) => {
                timeout(limits::UPLOAD_STALL, sink.send(Message::text(message.to_string()))).await
            }
            None => timeout(limits::UPLOAD_STALL, sink.flush()).await,
        };
        if !matches!(sent, Ok(Ok(()))) {
            return;
        }
    }
}
