//! The part of GitHub's API that cOTA updates from: a channel of files is a repository, its newest list the branch
//! `main`.
//!
//! | request | answer |
//! |---|---|
//! | GET `https://api.github.com/repos/<owner>/<channel>/git/trees/main?recursive=1` | the files and their git names |
//! | GET `https://raw.githubusercontent.com/<owner>/<channel>/main/<path>` | a file |
//!
//! cOTA knows no other hosts, so a request is taken as meant for them by its `Host`, on every listener: the device's
//! network is to lead these two names here. A device whose addresses can be changed is given `/github/api/repos/…` and
//! `/github/raw/…` instead. The owner is in the address that the device was told with its token: where there are users,
//! it is a secret, and who knows it may read that channel.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use mpypi_protocol::{ChannelName, FilePath};
use serde_json::json;

use super::desk;
use crate::{
    gateway::{
        Gateway, Here, Problem, Routes,
        file::{Cache, File},
    },
    index::IndexError,
};

/// Who asks for trees.
const API: &str = "api.github.com";
/// Who asks for files.
const RAW: &str = "raw.githubusercontent.com";
/// The one branch.
const BRANCH: &str = "main";

/// The routes for devices that are given addresses of ours.
pub fn routes() -> Routes {
    Router::new()
        .route("/github/api/repos/{owner}/{channel}/git/trees/{branch}", get(tree))
        .route("/github/raw/{owner}/{channel}/{branch}/{*path}", get(raw))
}

/// What a request to one of GitHub's hosts is answered by.
#[derive(Debug, Clone)]
pub struct Hosts {
    api: Router,
    raw: Router,
}

impl Hosts {
    /// Both hosts, on top of `gateway`.
    #[must_use]
    pub fn new(gateway: &Arc<Gateway>) -> Hosts {
        let ready = |routes: Routes| routes.fallback(nowhere).with_state(gateway.clone());
        Hosts {
            api: ready(Router::new().route("/repos/{owner}/{channel}/git/trees/{branch}", get(tree))),
            raw: ready(Router::new().route("/{owner}/{channel}/{branch}/{*path}", get(raw))),
        }
    }

    /// Who answers a request with these headers, if it is for one of them. A port does not matter.
    #[must_use]
    pub fn find(&self, headers: &HeaderMap) -> Option<Router> {
        let host = headers.get(header::HOST)?.to_str().ok()?;
        match host.split_once(':').map_or(host, |(host, _)| host).to_ascii_lowercase().as_str() {
            API => Some(self.api.clone()),
            RAW => Some(self.raw.clone()),
            _ => None,
        }
    }
}

async fn tree(
    State(gateway): Here,
    Path((owner, channel, branch)): Path<(String, String, String)>,
) -> Result<Response, Unanswered> {
    let channel = repository(&gateway, &owner, &channel, &branch)?;
    let files = desk::git_files(&gateway.shared, &channel).await?.ok_or(Unanswered::NotFound)?;
    let entry = |file: &desk::GitFile| json!({"path": file.path, "mode": "100644", "type": "blob", "sha": file.sha, "size": file.size});
    let tree: Vec<_> = files.iter().map(entry).collect();
    Ok(Json(json!({"tree": tree, "truncated": false})).into_response())
}

async fn raw(
    State(gateway): Here,
    Path((owner, channel, branch, path)): Path<(String, String, String, String)>,
    headers: HeaderMap,
) -> Result<Response, Unanswered> {
    let channel = repository(&gateway, &owner, &channel, &branch)?;
    let shared = &gateway.shared;
    let offer = shared.things.offer(&shared.index, &channel)?;
    let found = FilePath::new(path).ok().zip(offer).and_then(|(path, offer)| {
        let digest = offer.files.iter().find(|(known, _)| *known == path)?.1;
        Some((path, digest))
    });
    let (path, digest) = found.ok_or(Unanswered::NotFound)?;
    let payload = desk::file(&shared.index, &path, &digest)?.ok_or(Unanswered::NotFound)?;
    let kind = HeaderValue::from_static("application/octet-stream");
    let file = File::new(payload, digest, Cache::Asking).header(header::CONTENT_TYPE, kind);
    Ok(file.answer(&gateway, &headers)?)
}

/// The channel that a repository is, if its owner and branch are right.
fn repository(
    gateway: &Gateway,
    owner: &str,
    channel: &str,
    branch: &str,
) -> Result<ChannelName, Unanswered> {
    let is_known = |channel: &ChannelName| branch == BRANCH && owner == gateway.shared.gate.owner(channel);
    ChannelName::new(channel).ok().filter(is_known).ok_or(Unanswered::NotFound)
}

/// What is not there, or cannot be read.
enum Unanswered {
    NotFound,
    Failed(Problem),
}

impl From<IndexError> for Unanswered {
    fn from(error: IndexError) -> Unanswered {
        Unanswered::Failed(error.into())
    }
}

impl From<Problem> for Unanswered {
    fn from(problem: Problem) -> Unanswered {
        Unanswered::Failed(problem)
    }
}

impl IntoResponse for Unanswered {
    fn into_response(self) -> Response {
        match self {
            Unanswered::NotFound => {
                (StatusCode::NOT_FOUND, Json(json!({"message": "Not Found"}))).into_response()
            }
            Unanswered::Failed(problem) => problem.into_response(),
        }
    }
}

async fn nowhere() -> Unanswered {
    Unanswered::NotFound
}
