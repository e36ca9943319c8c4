//! How the broker is.
//!
//! | path | answer |
//! |---|---|
//! | `/healthz` | 200 if messages get through within a bound, 503 if not; JSON says what. Nobody need log in |
//! | `/metrics` | counters and gauges for Prometheus, to whoever may read `$SYS` |

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};

use super::{Caller, Here, Problem, Routes};
use crate::metrics::{Gauges, prometheus};

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
    let (code, problem) = match &felt {
        Ok(_) => (StatusCode::OK, None),
        Err(ill) => (StatusCode::SERVICE_UNAVAILABLE, Some(ill.to_string())),
    };
    let detail = serde_json::json!({
        "healthy": felt.is_ok(),
        "problem": problem,
        "latency_ms": felt.ok().map(|latency| latency.as_secs_f64() * 1e3),
        "stores": !is_full,
        "version": env!("CARGO_PKG_VERSION"),
    });
    (code, Json(detail)).into_response()
}

async fn metrics(State(gateway): Here, caller: Caller) -> Result<Response, Problem> {
    caller.reads("$SYS/#")?;
    let gauges = Gauges::look(&gateway.shared)?;
    let view = gateway.shared.fleet.look().await;
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((kind, prometheus(&gateway.shared.metrics, &gauges, &view)).into_response())
}
