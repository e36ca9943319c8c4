//! The HTTP gateway: what others read about the broker.
//!
//! | path | answer |
//! |---|---|
//! | `/healthz` | 200 if messages get through within a bound, 503 if not; JSON says what |
//! | `/metrics` | counters and gauges for Prometheus |

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::task::TaskTracker;

use crate::{
    connection::Shared,
    listen::ACCEPT_PAUSE,
    metrics::{Gauges, prometheus},
};

/// HTTP connections at once; more wait to be accepted.
const CONNECTIONS: usize = 64;
/// For a request's head to arrive.
const HEAD: Duration = Duration::from_secs(10);
/// For a request and its answer. A connection carries one.
const REQUEST: Duration = Duration::from_secs(30);

/// Serves HTTP until the broker stops.
pub async fn serve(listener: TcpListener, shared: Arc<Shared>, tasks: TaskTracker) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .with_state(shared.clone());
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = shared.shutdown.cancelled() => return,
        };
        let socket = match accepted {
            Ok((socket, _)) => TokioIo::new(socket),
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        let shutdown = shared.shutdown.clone();
        tasks.spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .keep_alive(false)
                .serve_connection(socket, service);
            tokio::select! {
                served = timeout(REQUEST, connection) => {
                    if let Ok(Err(error)) = served {
                        tracing::debug!(%error, "an HTTP connection failed");
                    }
                }
                () = shutdown.cancelled() => {}
            }
            drop(place);
        });
    }
}

async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    let felt = shared.pulse.feel(&shared).await;
    let is_full = Gauges::look(&shared).is_ok_and(|gauges| gauges.is_full);
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

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    match Gauges::look(&shared) {
        Ok(gauges) => {
            let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
            (kind, prometheus(&shared.metrics, &gauges)).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "cannot tell the metrics");
            (StatusCode::INTERNAL_SERVER_ERROR, "the index cannot be read\n").into_response()
        }
    }
}
