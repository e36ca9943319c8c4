//! The App Store API of robots: packages, tasks that download, install and remove them, and the tasks' logs.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Query, Request, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    desk::Ask,
    http::{Shared, body, error, off},
    local,
};
use crate::{
    apps::{Answers, Kind, Order, Status, Task},
    limits,
};

pub(super) fn router() -> Router<Arc<Shared>> {
    Router::new()
        .route("/app_store/packages", get(packages))
        .route("/app_store/firmware/packages", get(firmware))
        .route("/app_store/services/refresh_store", post(refresh))
        .route("/app_store/firmware/refresh_store", post(refresh))
        .route("/app_store/services/download_packages", post(download))
        .route("/app_store/services/install_packages", post(install))
        .route("/app_store/services/uninstall_packages", post(uninstall))
        .route("/app_store/firmware/install_packages", post(install_firmware))
        .route("/app_store/services/install_local_file", post(install_local_file))
        .route("/app_store/jobs/{kind}/tasks", get(tasks))
        .route("/app_store/jobs/{kind}/tasks/{id}/log", get(log))
}

async fn packages(State(shared): State<Arc<Shared>>) -> Response {
    match shared.bell.ask(Ask::Packages).await {
        Ok(packages) => Json(packages).into_response(),
        Err(_) => off(),
    }
}

async fn firmware(State(shared): State<Arc<Shared>>) -> Response {
    match shared.bell.ask(Ask::Firmware).await {
        Ok(packages) => Json(packages).into_response(),
        Err(_) => off(),
    }
}

/// The index changes when the broker has answered.
async fn refresh(State(shared): State<Arc<Shared>>) -> Response {
    match shared.bell.ask(Ask::Refresh).await {
        Ok(()) => Json(json!({ "status": 200 })).into_response(),
        Err(_) => off(),
    }
}

async fn download(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    order(&shared, request, Order::Download, |reason| reason.into()).await
}

async fn install(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    order(&shared, request, Order::Install, in_error).await
}

async fn uninstall(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    order(&shared, request, Order::Uninstall, in_error).await
}

async fn install_firmware(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    order(&shared, request, Order::Firmware, in_error).await
}

fn in_error(reason: String) -> Value {
    json!({ "error": reason })
}

/// 201 with what is accepted, or, if nothing is, 400 with the reasons.
async fn order(
    shared: &Shared,
    request: Request,
    order: impl FnOnce(Vec<String>) -> Order,
    refusal: impl Fn(String) -> Value,
) -> Response {
    #[derive(Deserialize)]
    struct Body {
        packages: Vec<String>,
    }
    let bytes = match body(request, limits::ORDER).await {
        Ok(bytes) => bytes,
        Err(response) => return response,
    };
    let packages = match serde_json::from_slice(&bytes) {
        Ok(Body { packages }) if !packages.is_empty() => packages,
        _ => return error(StatusCode::BAD_REQUEST, "packages required, as {\"packages\":[\"name\"]}"),
    };
    let answers: Answers = match shared.bell.ask(|reply| Ask::Order(order(packages), reply)).await {
        Ok(answers) => answers,
        Err(_) => return off(),
    };
    let mut accepted = Map::new();
    let mut refused = Map::new();
    for (name, answer) in answers {
        match answer {
            Ok((task_id, version)) => {
                _ = accepted.insert(name, json!({ "task_id": task_id, "version": version }));
            }
            Err(reason) => _ = refused.insert(name, refusal(reason)),
        }
    }
    match accepted.is_empty() {
        true => (StatusCode::BAD_REQUEST, Json(refused)).into_response(),
        false => (StatusCode::CREATED, Json(accepted)).into_response(),
    }
}

async fn install_local_file(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    #[derive(Deserialize)]
    struct Body {
        filename: String,
    }
    let bytes = match body(request, limits::ORDER).await {
        Ok(bytes) => bytes,
        Err(response) => return response,
    };
    let Ok(Body { filename }) = serde_json::from_slice(&bytes) else {
        return error(StatusCode::BAD_REQUEST, "filename required");
    };
    let folder = shared.options.local_files.clone();
    let read = tokio::task::spawn_blocking(move || local::read(folder.as_deref(), &filename)).await;
    let wheel = match read {
        Ok(Ok(wheel)) => wheel,
        Ok(Err(refused)) => return error(StatusCode::BAD_REQUEST, refused.to_string()),
        Err(_) => return error(StatusCode::INTERNAL_SERVER_ERROR, "the file cannot be read"),
    };
    let local::Wheel { name, version, payload } = wheel;
    let answer = shared.bell.ask(|reply| Ask::Local { name: name.clone(), version, payload, reply }).await;
    match answer {
        Ok(Ok((_, version))) => Json(json!({ "module_name": name, "version": version })).into_response(),
        Ok(Err(reason)) => error(StatusCode::BAD_REQUEST, reason),
        Err(_) => off(),
    }
}

/// A task, as it is shown.
#[derive(Serialize)]
struct TaskView {
    id: u64,
    status: Status,
    module: String,
    version: String,
    create_time: String,
    start_time: Option<String>,
    end_time: Option<String>,
    url: String,
}

async fn tasks(State(shared): State<Arc<Shared>>, Path(kind): Path<String>, headers: HeaderMap) -> Response {
    let Some(kind) = kind_of(&kind) else { return error(StatusCode::NOT_FOUND, "not found") };
    let Ok(tasks) = shared.bell.ask(|reply| Ask::Tasks(kind, reply)).await else { return off() };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("127.0.0.1");
    let view = |task: Task| TaskView {
        id: task.id,
        status: task.status,
        url: format!("http://{host}/app_store/jobs/{}/tasks/{}/log", kind.word(), task.id),
        module: task.module,
        version: task.version,
        create_time: task.created,
        start_time: task.started,
        end_time: task.ended,
    };
    Json(tasks.into_iter().map(view).collect::<Vec<_>>()).into_response()
}

#[derive(Deserialize)]
struct Range {
    start: Option<usize>,
    end: Option<usize>,
}

async fn log(
    State(shared): State<Arc<Shared>>,
    Path((kind, id)): Path<(String, String)>,
    range: Result<Query<Range>, axum::extract::rejection::QueryRejection>,
) -> Response {
    let (Some(kind), Ok(id)) = (kind_of(&kind), id.parse()) else {
        return error(StatusCode::NOT_FOUND, "not found");
    };
    let Ok(Query(range)) = range else {
        return error(StatusCode::BAD_REQUEST, "start and end should be numbers of characters");
    };
    let (text, is_over) = match shared.bell.ask(|reply| Ask::Log(kind, id, reply)).await {
        Ok(Some(log)) => log,
        Ok(None) => return error(StatusCode::NOT_FOUND, "task not found"),
        Err(_) => return off(),
    };
    let (part, size, more) = cut(&text, &range);
    let headers = [
        ("content-type", "text/plain; charset=utf-8".to_owned()),
        ("x-text-size", size.to_string()),
        ("x-more-data", (more || !is_over).to_string()),
    ];
    (headers, part).into_response()
}

/// The characters of a range, how many there are in all, and whether some come after it.
fn cut(text: &str, range: &Range) -> (String, usize, bool) {
    let size = text.chars().count();
    let start = range.start.unwrap_or(0);
    let end = range.end.filter(|end| *end > start).unwrap_or(size).min(size);
    (text.chars().skip(start).take(end.saturating_sub(start)).collect(), size, end < size)
}

fn kind_of(word: &str) -> Option<Kind> {
    [Kind::Download, Kind::Install, Kind::Uninstall].into_iter().find(|kind| kind.word() == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_a_log_is_counted_in_characters() {
        let cut = |start, end| {
            let (part, size, more) = cut("aé日本\n", &Range { start, end });
            assert_eq!(size, 5);
            (part, more)
        };
        let is = |part: &str, more| (part.to_owned(), more);
        assert_eq!(cut(None, None), is("aé日本\n", false));
        assert_eq!(cut(Some(1), Some(3)), is("é日", true));
        assert_eq!(cut(None, Some(2)), is("aé", true));
        assert_eq!(cut(Some(3), None), is("本\n", false));
        assert_eq!(cut(Some(3), Some(3)), is("本\n", false), "an end that is none means all");
        assert_eq!(cut(Some(3), Some(1)), is("本\n", false));
        assert_eq!(cut(Some(5), None), is("", false));
        assert_eq!(cut(Some(99), Some(100)), is("", false));
        assert_eq!(cut(Some(0), Some(99)), is("aé日本\n", false));
        assert_eq!(cut(Some(0), Some(0)), is("aé日本\n", false));
    }
}
