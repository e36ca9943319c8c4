//! How the broker is.
//!
//! | path | answer |
//! |---|---|
//! | `/healthz` | 200 if messages get through within a bound, 503 if not, or if this is a gateway that has not seen yet what its cluster has; JSON says what, and how it goes with an upstream. Nobody need log in |
//! | `/metrics` | counters and gauges for Prometheus, to whoever may read `$SYS` |

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};

use super::{Caller, Here, Problem, Routes};
use crate::edge::Part;
use crate::metrics::{Gauges, Upstream, prometheus};

/// What anybody may ask.
pub(super) fn open_routes() -> Routes {
    Router::new().route("/healthz", get(healthz))
}

/// What those may ask who may read `$SYS`.
pub(super) fn routes() -> Routes {
    Router::new().route("/metrics", get(metrics))
}

async fn healthz(State(gateway): Here) -> Response {
    let shared = &gateway.shared;
    let felt = shared.pulse.feel(shared).await;
    let is_full = Gauges::look(shared).is_ok_and(|gauges| gauges.is_full);
    let upstream = shared.edge.as_ref().map(|edge| (edge.part(), edge.view().look()));
    // An edge serves what it has. A gateway that has not seen what the cluster has would show too little.
    let is_empty = upstream.as_ref().is_some_and(|(part, seen)| *part == Part::Gateway && !seen.is_whole);
    let (code, problem) = match &felt {
        Ok(_) if is_empty => {
            let problem = "what the upstream has was not read through yet".to_owned();
            (StatusCode::SERVICE_UNAVAILABLE, Some(problem))
        }
        Ok(_) => (StatusCode::OK, None),
        Err(ill) => (StatusCode::SERVICE_UNAVAILABLE, Some(ill.to_string())),
    };
    let mut detail = serde_json::json!({
        "healthy": problem.is_none(),
        "problem": problem,
        "latency_ms": felt.ok().map(|latency| latency.as_secs_f64() * 1e3),
        "stores": !is_full,
        "version": env!("CARGO_PKG_VERSION"),
    });
    if let Some((_, seen)) = upstream {
        detail["upstream"] = seen.told();
    }
    (code, Json(detail)).into_response()
}

async fn metrics(State(gateway): Here, caller: Caller) -> Result<Response, Problem> {
    caller.reads("$SYS/#")?;
    let gauges = Gauges::look(&gateway.shared)?;
    let view = gateway.shared.fleet.look().await;
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    let upstream = gateway.shared.edge.as_deref().map(Upstream::look);
    let text = prometheus(&gateway.shared.metrics, &gauges, &view, upstream.as_ref());
    Ok((kind, text).into_response())
}
