//! What changes, as server-sent events.
//!
//! A stream is a place in the order of all changes, and nothing else: what it has yet to send is read from the view when its
//! client takes it, each node once and in its last state. So nothing is lost to who is slow, and nothing waits for them.

use std::{fmt::Write, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::stream::unfold;
use mpypi_protocol::{
    NodeId,
    topic::{NodeSubject, RolloutSubject},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{sleep, timeout},
};
use utoipa::IntoParams;

use super::{
    Asked, may_see,
    shape::{ChannelRow, LogLine, NodeRow, Overview, RolloutRow},
};
use crate::{
    clock,
    fleet::view::{Change, View},
    gateway::{Caller, Gateway, Here, Problem},
};

/// The shortest time from one batch of events to the next, unless more wait than fit into one.
const PAUSE: Duration = Duration::from_millis(100);
/// Events of a batch.
const BATCH: usize = 256;
/// When nothing was sent for so long, an empty line is, and the caller's login is looked at again.
const QUIET: Duration = Duration::from_secs(15);
/// What names the last event that a client got.
const LAST: &str = "last-event-id";

/// What is wanted beside changes.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct Wanted {
    /// A node whose log lines are wanted, too.
    node: Option<String>,
}

/// What changes, as it does: events `hello`, `resync`, `node`, `node-gone`, `channel`, `rollout`, `rollout-gone`, `overview` and `log`.
///
/// `hello` comes first; from then on every change is sent, of each node, channel and rollout at least the last one. A client that
/// comes back with `Last-Event-ID` gets what changed meanwhile, or `resync` where that is no longer known.
#[utoipa::path(get, path = "/api/events", operation_id = "events", params(Wanted,
    ("Last-Event-ID" = Option<String>, Header, description = "The `id` of the last event that the client got")), responses(
    (status = 200, description = "Events without end", body = String, content_type = "text/event-stream"),
    (status = 400, description = "A parameter makes no sense"),
    (status = 503, description = "Too many clients listen already"),
))]
pub(super) async fn events(
    State(gateway): Here,
    caller: Caller,
    headers: HeaderMap,
    Asked(wanted): Asked<Wanted>,
) -> Result<Response, Problem> {
    let place = gateway.events.clone().try_acquire_owned().map_err(|_| {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too many clients listen for events already")
            .hint("close other pages, or raise `http_events` among the broker's limits")
            .header(header::RETRY_AFTER, HeaderValue::from_static("10"))
    })?;
    let node = wanted.node.map(NodeId::new).transpose();
    let node = node.map_err(|error| Problem::bad_request(error.to_string()))?;
    if let Some(node) = &node {
        caller.reads(&node.topic(NodeSubject::Log))?;
    }
    let fleet = &gateway.shared.fleet;
    let epoch = fleet.epoch();
    let last = headers.get(LAST).and_then(|id| id.to_str().ok()).filter(|id| !id.is_empty());
    let last = last.map(|id| {
        let (before, number) = id.split_once('-')?;
        let is_ours = u32::from_str_radix(before, 16).ok() == Some(epoch);
        number.parse().ok().filter(|_| is_ours)
    });
    let (number, line) = {
        let view = fleet.look().await;
        (view.number(), view.log.number())
    };
    let mut first = String::new();
    let cursor = match last {
        // It goes on from there; whether all since is known shows with the first look.
        Some(Some(last)) => last,
        Some(None) | None => number,
    };
    event(&mut first, "hello", Some((epoch, cursor)), &json!({ "epoch": format!("{epoch:08x}") }));
    if last == Some(None) {
        event(&mut first, "resync", Some((epoch, cursor)), &json!({}));
    }
    let beat = fleet.beat();
    let listener = Listener {
        gateway: gateway.clone(),
        caller,
        epoch,
        cursor,
        node,
        line,
        beat,
        first,
        more: true,
        _place: place,
    };
    let stream = unfold(listener, |mut listener| async {
        let batch = listener.next().await?;
        Some((Ok::<_, std::convert::Infallible>(batch), listener))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        // nginx would wait until a buffer is full.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(stream)).into_response())
}

/// A client that listens.
struct Listener {
    gateway: Arc<Gateway>,
    caller: Caller,
    epoch: u32,
    /// The number of the last change that was sent.
    cursor: u64,
    /// Whose log is wanted.
    node: Option<NodeId>,
    /// The number of the last line that was sent.
    line: u64,
    beat: watch::Receiver<Option<u64>>,
    /// What is sent before all else.
    first: String,
    /// Whether more waits than fitted into the last batch.
    more: bool,
    _place: OwnedSemaphorePermit,
}

impl Listener {
    /// The next bytes to send; `None` when the stream ends.
    async fn next(&mut self) -> Option<Bytes> {
        let shared = self.gateway.shared.clone();
        if !self.first.is_empty() {
            return Some(std::mem::take(&mut self.first).into());
        }
        loop {
            let mut is_quiet = false;
            if !self.more {
                tokio::select! {
                    () = shared.shutdown.cancelled() => return None,
                    () = sleep(PAUSE) => {}
                }
                tokio::select! {
                    () = shared.shutdown.cancelled() => return None,
                    changed = timeout(QUIET, self.beat.changed()) => is_quiet = changed.is_err(),
                }
            }
            // Whoever may no longer come in hears nothing more, either.
            if shared.shutdown.is_cancelled() || !shared.gate.still_knows(self.caller.login.as_ref()) {
                return None;
            }
            let text = self.look();
            match text.is_empty() {
                false => return Some(text.into()),
                true if is_quiet => return Some(Bytes::from_static(b":\n\n")),
                true => {}
            }
        }
    }

    /// What changed since the last look, as far as it fits into a batch.
    fn look(&mut self) -> String {
        let gateway = self.gateway.clone();
        self.beat.mark_unchanged();
        let view = gateway.shared.fleet.glance();
        let mut text = String::new();
        match view.since(self.cursor, BATCH) {
            Some(changes) => {
                self.more = changes.len() == BATCH;
                for (number, change) in changes {
                    self.cursor = number;
                    self.tell(&mut text, &view, number, &change);
                }
            }
            None => {
                self.more = false;
                self.cursor = view.number();
                event(&mut text, "resync", Some((self.epoch, self.cursor)), &json!({}));
            }
        }
        if let Some(node) = &self.node {
            for line in view.log.since(node, self.line) {
                let LogLine { at, text: said } = LogLine::from(line);
                event(&mut text, "log", None, &json!({ "node": node, "at": at, "text": said }));
            }
            self.line = view.log.number();
        }
        text
    }

    /// Writes down a change, if the caller may see it.
    fn tell(&self, text: &mut String, view: &View, number: u64, change: &Change) {
        let id = Some((self.epoch, number));
        let reads = |topic: &str| self.caller.identity.may_subscribe(topic);
        match change {
            Change::Node(node) if may_see(&self.caller, &node.id) => {
                event(text, "node", id, &NodeRow::from(&**node));
            }
            Change::NodeGone(node) if may_see(&self.caller, node) => {
                event(text, "node-gone", id, &json!({ "node": node }));
            }
            Change::Channel(name) if reads(&name.topic()) => {
                if let Some(channel) = view.channel(name) {
                    let mut row = ChannelRow::of(view, channel);
                    if !reads("mpypi/nodes/#") {
                        row.nodes = 0;
                    }
                    event(text, "channel", id, &row);
                }
            }
            Change::Rollout(name) if reads(&name.rollout(RolloutSubject::Record)) => {
                if let Some(rollout) = view.rollout(name) {
                    event(text, "rollout", id, &RolloutRow::of(view, rollout, rollout.counts));
                }
            }
            Change::RolloutGone(name) if reads(&name.rollout(RolloutSubject::Record)) => {
                event(text, "rollout-gone", id, &json!({ "channel": name }));
            }
            Change::Overview if reads("mpypi/nodes/#") => {
                event(text, "overview", id, &Overview::of(view, clock::now().unix_ms));
            }
            _ => {}
        }
    }
}

/// Writes down an event: JSON has no line ends of its own.
fn event(text: &mut String, name: &str, id: Option<(u32, u64)>, data: &impl Serialize) {
    if let Some((epoch, number)) = id {
        writeln!(text, "id: {epoch:08x}-{number}").ok();
    }
    match serde_json::to_string(data) {
        Ok(data) => drop(write!(text, "event: {name}\ndata: {data}\n\n")),
        Err(error) => tracing::error!(%error, name, "an event cannot be told"),
    }
}
