//! Uploads as PyPI takes them: `twine upload --repository-url http://host:8080/upload/dev`, `uv publish`.
//!
//! The wheel becomes a package, and the channel's list is replaced by one with it: instead of the same project's
//! wheel of the same tag, if there is one. Both pass the door and the writer, as from any publisher.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{FromRequestParts, Request, State},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyDataStream;
use mpypi_protocol::{ChannelName, Digest, Entry, list, wheel::normalized_name};
use multer::{Constraints, Field, Multipart, SizeLimit};
use serde_json::json;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use super::{
    catalog::channel,
    release::{Added, add},
    wheel::Contents,
};
use crate::{
    connection::PLACE,
    gateway::{
        Caller, Gateway, Here, Problem, Routes,
        body::{BodyError, Bounded},
    },
    message::chain,
};

/// What a form may have beside the wheel, in bytes: METADATA once more, with its description.
const FORM: u64 = 1024 * 1024;
/// Fields of a form.
pub(super) const FIELDS: usize = 512;
/// Longest value of a field that is looked at, in bytes.
const VALUE: u64 = 1024;

/// The routes.
pub fn routes() -> Routes {
    Router::new().route("/upload/{channel}", post(upload)).route("/upload/{channel}/", post(upload))
}

/// The channel to upload to, which the caller may change.
struct Target(ChannelName);

impl FromRequestParts<Arc<Gateway>> for Target {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Target, Problem> {
        let caller = Caller::from_request_parts(parts, gateway).await?;
        let channel = channel(parts, gateway).await?;
        let channel = channel.ok_or_else(|| Problem::not_found("there is no channel here"))?;
        caller.writes(&channel.topic())?;
        Ok(Target(channel))
    }
}

/// What a form says.
#[derive(Debug, Default)]
struct Form {
    action: Option<String>,
    kind: Option<String>,
    name: Option<String>,
    version: Option<String>,
    digest: Option<String>,
    content: Option<Bytes>,
}

async fn upload(
    State(gateway): Here,
    Target(channel): Target,
    request: Request,
) -> Result<Response, Problem> {
    let place = place(&gateway).await?;
    let form = read(&gateway, request).await?;
    let wrong = |detail: String| Problem::new(StatusCode::BAD_REQUEST, detail);
    if form.action.as_deref().is_some_and(|action| action != "file_upload") {
        return Err(wrong("of PyPI's actions, only `file_upload` is known here".to_owned()));
    }
    let content = form.content.ok_or_else(|| wrong("the form has no file `content`".to_owned()))?;
    if form.kind.as_deref().is_some_and(|kind| kind != "bdist_wheel") {
        return Err(wrong("devices take wheels, and nothing else".to_owned())
            .hint("upload the wheel alone: `twine upload dist/*.whl`"));
    }
    let digest = Digest::of(&content);
    if form.digest.as_deref().is_some_and(|said| !said.is_empty() && said != digest.to_string()) {
        return Err(wrong(format!("the file's SHA-256 is {digest}, not what the form says")));
    }
    let bytes = content.clone();
    let contents = gateway.catalog.work(move || Contents::of(&bytes)).await?;
    let contents = contents.map_err(|problem| {
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, format!("this is no wheel for devices: {problem}"))
    })?;
    let said = |said: &Option<String>, found: &str| said.as_deref().is_none_or(|said| said == found);
    let is_same_name =
        form.name.as_deref().is_none_or(|name| normalized_name(name) == normalized_name(&contents.name));
    if !is_same_name || !said(&form.version, &contents.version) {
        return Err(wrong(format!(
            "the wheel is `{}` {}, not what the form says",
            contents.name, contents.version
        )));
    }
    let entry = list::Wheel {
        name: contents.name.clone(),
        version: contents.version.clone(),
        digest,
        size: Some(content.len() as u64),
        chunks: None,
        tag: contents.tags.last().cloned(),
        extra: Default::default(),
    };
    let wheel = (Entry::Wheel(entry), content);
    let Added { sequence, changed } =
        add(&gateway, &channel, std::slice::from_ref(&wheel), None, place).await?;
    if !changed {
        return Ok(Json(json!({ "channel": channel, "package": digest, "changed": false })).into_response());
    }
    tracing::info!(%channel, name = contents.name, version = contents.version, sequence, "a wheel was uploaded");
    let told = json!({ "channel": channel, "package": digest, "sequence": sequence, "changed": true });
    Ok(Json(told).into_response())
}

/// A place for what comes, so that many uploads at once do not take all memory.
pub(super) async fn place(gateway: &Gateway) -> Result<OwnedSemaphorePermit, Problem> {
    let limits = &gateway.shared.limits;
    let places =
        usize::try_from(limits.package + FORM).unwrap_or(usize::MAX).min(limits.inbound_bytes) / PLACE;
    let places = u32::try_from(places).unwrap_or(u32::MAX);
    let place = timeout(limits.read_stall, gateway.shared.places.clone().acquire_many_owned(places)).await;
    place
        .map_err(|_| {
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too many uploads are under way: try again later")
        })?
        .map_err(|error| Problem::internal(&error))
}

/// The parts of a form, of which those called `files` may be as large as a package. All of it together is not much larger.
pub(super) fn parts<'r>(
    gateway: &Gateway,
    request: Request,
    files: &[&str],
) -> Result<Multipart<'r>, Problem> {
    let limits = &gateway.shared.limits;
    let kind =
        request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let boundary = multer::parse_boundary(kind).map_err(|_| {
        Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "an upload is a form, `multipart/form-data`")
            .hint("`twine upload --repository-url`, `uv publish --publish-url` and `curl --form` send one")
    })?;
    let body = Bounded::new(request.into_body(), limits.package + FORM, limits);
    let sizes = SizeLimit::new().per_field(FORM);
    let sizes = files.iter().fold(sizes, |sizes, file| sizes.for_field(*file, limits.package));
    let constraints = Constraints::new().size_limit(sizes);
    Ok(Multipart::with_constraints(BodyDataStream::new(body), boundary, constraints))
}

/// Reads the form.
async fn read(gateway: &Gateway, request: Request) -> Result<Form, Problem> {
    let mut parts = parts(gateway, request, &["content"])?;
    let mut form = Form::default();
    for _ in 0..FIELDS {
        let Some(mut field) = parts.next_field().await.map_err(broken)? else { return Ok(form) };
        let slot = match field.name().unwrap_or_default() {
            ":action" => &mut form.action,
            "filetype" => &mut form.kind,
            "name" => &mut form.name,
            "version" => &mut form.version,
            "sha256_digest" => &mut form.digest,
            "content" => {
                form.content = Some(content(&mut field).await?);
                continue;
            }
            _ => {
                while field.chunk().await.map_err(broken)?.is_some() {}
                continue;
            }
        };
        *slot = Some(value(&mut field).await?);
    }
    Err(Problem::bad_request(format!("a form of more than {FIELDS} fields")))
}

/// A field's bytes.
pub(super) async fn content(field: &mut Field<'_>) -> Result<Bytes, Problem> {
    let mut content = BytesMut::new();
    while let Some(chunk) = field.chunk().await.map_err(broken)? {
        content.extend_from_slice(&chunk);
    }
    Ok(content.freeze())
}

/// A field's text.
pub(super) async fn value(field: &mut Field<'_>) -> Result<String, Problem> {
    let mut value = BytesMut::new();
    while let Some(chunk) = field.chunk().await.map_err(broken)? {
        value.extend_from_slice(&chunk);
        if value.len() as u64 > VALUE {
            return Err(Problem::bad_request(format!("a field has more than {VALUE} bytes")));
        }
    }
    let text = String::from_utf8(value.to_vec());
    text.map_err(|_| Problem::bad_request("a field is no UTF-8"))
}

/// Why a form cannot be read.
pub(super) fn broken(error: multer::Error) -> Problem {
    match error {
        multer::Error::FieldSizeExceeded { limit, .. } | multer::Error::StreamSizeExceeded { limit } => {
            BodyError::TooLarge(limit).into()
        }
        multer::Error::StreamReadFailed(source) => match source.downcast::<BodyError>() {
            Ok(error) => Problem::from(*error),
            Err(source) => Problem::bad_request(format!("the form does not come whole: {source}")),
        },
        error => Problem::bad_request(format!("the form cannot be read: {}", chain(&error))),
    }
}
