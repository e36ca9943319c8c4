//! PyPI's simple index (PEP 503, 691, 700, 714), of the wheels that channels name.
//!
//! | path, below `/simple` or `/channels/<channel>/simple` | answer |
//! |---|---|
//! | `/` | all projects |
//! | `/<project>/` | the wheels of one, with digests and the digest of METADATA |

use std::{collections::BTreeSet, fmt::Write, sync::Arc};

use axum::{
    Router,
    extract::{Path, RawPathParams, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use mpypi_protocol::Digest;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde_json::{Value, json};

use super::{
    catalog::{Scope, wheels, wheels_of},
    version::compare,
    wheel::{Contents, project},
};
use crate::gateway::{Gateway, Here, Problem, Routes};

const JSON: &str = "application/vnd.pypi.simple.v1+json";
const HTML: &str = "application/vnd.pypi.simple.v1+html";

/// What a path segment cannot hold as it is.
const SEGMENT: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'/')
    .add(b'`')
    .add(b'+');

/// The routes.
pub fn routes() -> Routes {
    Router::new()
        .route("/simple", get(to_root))
        .route("/simple/", get(projects))
        .route("/simple/{project}", get(to_folder))
        .route("/simple/{project}/", get(files))
}

/// A form that a page can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Json,
    Html(&'static str),
}

impl Form {
    /// The form that a client likes best (RFC 9110, 12.5.1). Who says nothing gets HTML, as ever.
    fn of(headers: &HeaderMap) -> Result<Form, Problem> {
        let accepted: Vec<_> = headers
            .get_all(header::ACCEPT)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .collect();
        if accepted.is_empty() {
            return Ok(Form::Html("text/html"));
        }
        let mut best: Option<(f32, Form)> = None;
        for range in accepted {
            let mut parts = range.split(';').map(str::trim);
            let form = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
                JSON | "application/vnd.pypi.simple.latest+json" => Form::Json,
                HTML | "application/vnd.pypi.simple.latest+html" => Form::Html(HTML),
                "text/html" | "text/*" | "*/*" => Form::Html("text/html"),
                "application/*" => Form::Json,
                _ => continue,
            };
            let quality = parts.find_map(|part| part.strip_prefix("q="));
            let quality = quality.map_or(1.0, |quality| quality.parse().unwrap_or(0.0));
            if quality > 0.0 && best.is_none_or(|(better, _)| quality > better) {
                best = Some((quality, form));
            }
        }
        best.map(|(_, form)| form).ok_or_else(|| {
            Problem::new(StatusCode::NOT_ACCEPTABLE, format!("this is `{JSON}`, `{HTML}` or `text/html`"))
        })
    }

    fn answer(self, json: Value, html: String) -> Response {
        let (kind, body) = match self {
            Form::Json => (JSON, json.to_string()),
            Form::Html(kind) => (kind, html),
        };
        let kind = match kind {
            "text/html" => "text/html; charset=utf-8",
            kind => kind,
        };
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
            (header::VARY, HeaderValue::from_static("Accept")),
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        ];
        (headers, body).into_response()
    }
}

async fn projects(scope: Scope, headers: HeaderMap) -> Result<Response, Problem> {
    let form = Form::of(&headers)?;
    let projects: BTreeSet<_> = wheels(&scope.lists).map(|(wheel, _)| project(&wheel.name)).collect();
    let mut html = page("Simple index");
    for name in &projects {
        writeln!(html, "<a href=\"{name}/\">{name}</a><br>").ok();
    }
    let list: Vec<_> = projects.iter().map(|name| json!({ "name": name })).collect();
    Ok(form.answer(json!({ "meta": { "api-version": "1.1" }, "projects": list }), html + "</body></html>\n"))
}

async fn to_root() -> Redirect {
    Redirect::permanent("simple/")
}

async fn to_folder(parameters: RawPathParams) -> Result<Redirect, Problem> {
    let name = parameters.iter().find(|(name, _)| *name == "project").map(|(_, value)| project(value));
    let name = name.ok_or_else(|| Problem::not_found("there is no such project"))?;
    // Relative to the page: the last part of its path again, as a folder.
    Ok(Redirect::permanent(&format!("{}/", utf8_percent_encode(&name, SEGMENT))))
}

/// A wheel as the index tells it.
struct Told {
    digest: Digest,
    size: u64,
    contents: Arc<Contents>,
}

async fn files(
    State(gateway): Here,
    scope: Scope,
    Path(parameters): Path<std::collections::HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let form = Form::of(&headers)?;
    let name = project(parameters.get("project").map(String::as_str).unwrap_or_default());
    let told = told(&gateway, &scope, &name).await?;
    if told.is_empty() {
        return Err(Problem::not_found(format!("no channel here has wheels of `{}`", name.escape_debug())));
    }
    let mut versions: Vec<&str> = told.iter().map(|told| told.contents.version.as_str()).collect();
    versions.sort_by(|one, other| compare(one, other));
    versions.dedup();
    let mut html = page(&format!("Links for {name}"));
    let mut list = Vec::new();
    for Told { digest, size, contents } in &told {
        let file = contents.file_name();
        let url = scope.url(2, &format!("packages/{digest}/{}", utf8_percent_encode(&file, SEGMENT)));
        let metadata = Digest::of(&contents.metadata);
        let requires = contents.requires_python.as_deref();
        let attribute = requires.map(|text| format!(" data-requires-python=\"{}\"", escaped(text)));
        writeln!(
            html,
            "<a href=\"{url}#sha256={digest}\"{} data-core-metadata=\"sha256={metadata}\" \
             data-dist-info-metadata=\"sha256={metadata}\">{file}</a><br>",
            attribute.unwrap_or_default(),
            file = escaped(&file),
        )
        .ok();
        let mut told = json!({
            "filename": file, "url": url, "hashes": { "sha256": digest }, "size": size, "yanked": false,
            "core-metadata": { "sha256": metadata }, "dist-info-metadata": { "sha256": metadata },
        });
        if let Some(requires) = requires {
            told["requires-python"] = requires.into();
        }
        list.push(told);
    }
    let json = json!({ "meta": { "api-version": "1.1" }, "name": name, "versions": versions, "files": list });
    Ok(form.answer(json, html + "</body></html>\n"))
}

async fn told(gateway: &Gateway, scope: &Scope, name: &str) -> Result<Vec<Told>, Problem> {
    let mut all = Vec::new();
    for wheel in wheels_of(&scope.lists, name) {
        if let Some(contents) = gateway.catalog.wheel(&gateway.shared.index, &wheel.digest).await? {
            let size = gateway.catalog.size(&gateway.shared.index, &wheel.digest)?;
            all.push(Told { digest: wheel.digest, size, contents });
        }
    }
    Ok(all)
}

fn page(title: &str) -> String {
    let title = escaped(title);
    format!(
        "<!DOCTYPE html>\n<html><head><meta name=\"pypi:repository-version\" content=\"1.1\"><title>{title}</title>\
         </head><body>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_that_a_client_likes_best_is_taken() {
        let form = |accept: &str| {
            let headers = [(header::ACCEPT, accept.parse().unwrap())].into_iter().collect();
            Form::of(&headers).map_err(|problem| problem.code().as_u16())
        };
        let pip = format!("{JSON}, {HTML}; q=0.1, text/html; q=0.01");
        assert_eq!(form(&pip), Ok(Form::Json));
        assert_eq!(form("text/html"), Ok(Form::Html("text/html")));
        assert_eq!(form("*/*"), Ok(Form::Html("text/html")));
        assert_eq!(form(&format!("{JSON};q=0.2, {HTML};q=0.3")), Ok(Form::Html(HTML)));
        assert_eq!(form("image/png"), Err(406));
        assert_eq!(form(&format!("{JSON};q=0")), Err(406));
        assert_eq!(Form::of(&HeaderMap::new()).ok(), Some(Form::Html("text/html")));
    }
}
