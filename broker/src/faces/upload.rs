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
use mpypi_protocol::{
    ChannelName, Digest, Entry, PackageId, UpdateList,
    list::{self, COMMIT, Release},
    wheel::normalized_name,
};
use multer::{Constraints, Multipart, SizeLimit};
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use super::{
    catalog::{Listed, channel},
    wheel::Contents,
};
use crate::{
    clock,
    connection::PLACE,
    gateway::{
        Caller, Gateway, Here, Problem, Routes,
        body::{BodyError, Bounded},
    },
    message::chain,
    packet::Reason,
};

/// What a form may have beside the wheel, in bytes: METADATA once more, with its description.
const FORM: u64 = 1024 * 1024;
/// Fields of a form.
const FIELDS: usize = 512;
/// Longest value of a field that is looked at, in bytes.
const VALUE: u64 = 1024;
/// How often a list is made again that somebody else replaced in the meantime.
const ATTEMPTS: usize = 5;

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
    let limits = &gateway.shared.limits;
    // A place for what comes, so that many uploads at once do not take all memory.
    let places =
        usize::try_from(limits.package + FORM).unwrap_or(usize::MAX).min(limits.inbound_bytes) / PLACE;
    let places = u32::try_from(places).unwrap_or(u32::MAX);
    let place = timeout(limits.read_stall, gateway.shared.places.clone().acquire_many_owned(places)).await;
    let place = place
        .map_err(|_| {
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too many uploads are under way: try again later")
        })?
        .map_err(|error| Problem::internal(&error))?;
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
        tag: contents.tags.last().cloned(),
        extra: Default::default(),
    };
    add(&gateway, &channel, entry, content, place).await
}

/// Reads the form.
async fn read(gateway: &Gateway, request: Request) -> Result<Form, Problem> {
    let limits = &gateway.shared.limits;
    let kind =
        request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let boundary = multer::parse_boundary(kind).map_err(|_| {
        Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "an upload is a form, `multipart/form-data`")
            .hint("`twine upload --repository-url` and `uv publish --publish-url` send one")
    })?;
    let body = Bounded::new(request.into_body(), limits.package + FORM, limits);
    let sizes = SizeLimit::new().per_field(FORM).for_field("content", limits.package);
    let constraints = Constraints::new().size_limit(sizes);
    let mut parts = Multipart::with_constraints(BodyDataStream::new(body), boundary, constraints);
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
                let mut content = BytesMut::new();
                while let Some(chunk) = field.chunk().await.map_err(broken)? {
                    content.extend_from_slice(&chunk);
                }
                form.content = Some(content.freeze());
                continue;
            }
            _ => {
                while field.chunk().await.map_err(broken)?.is_some() {}
                continue;
            }
        };
        let mut value = BytesMut::new();
        while let Some(chunk) = field.chunk().await.map_err(broken)? {
            value.extend_from_slice(&chunk);
            if value.len() as u64 > VALUE {
                return Err(Problem::bad_request(format!("a field has more than {VALUE} bytes")));
            }
        }
        let text = String::from_utf8(value.to_vec());
        *slot = Some(text.map_err(|_| Problem::bad_request("a field is no UTF-8"))?);
    }
    Err(Problem::bad_request(format!("a form of more than {FIELDS} fields")))
}

/// Why a form cannot be read.
fn broken(error: multer::Error) -> Problem {
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

/// Adds a wheel to a channel.
async fn add(
    gateway: &Arc<Gateway>,
    channel: &ChannelName,
    wheel: list::Wheel,
    content: Bytes,
    place: OwnedSemaphorePermit,
) -> Result<Response, Problem> {
    let index = &gateway.shared.index;
    let mut content = Some((content, place));
    for _ in 0..ATTEMPTS {
        let listed = gateway.catalog.list(index, channel)?;
        // Refused before anything is kept for it.
        let Some((list, sequence)) = with(&listed, &wheel)? else {
            let told = serde_json::json!({ "channel": channel, "package": wheel.digest, "changed": false });
            return Ok(Json(told).into_response());
        };
        if let Some((content, place)) = content.take() {
            gateway.publish(PackageId::Wheel(wheel.digest).topic(), content, None, Some(place)).await?;
        }
        keep(gateway, &listed).await?;
        let payload = Bytes::from(list.to_bytes());
        match gateway.publish(channel.topic(), payload, Some(listed.version), None).await {
            Ok(()) => {
                tracing::info!(%channel, name = wheel.name, version = wheel.version, sequence, "a wheel was uploaded");
                let told = serde_json::json!({
                    "channel": channel, "package": wheel.digest, "sequence": sequence, "changed": true,
                });
                return Ok(Json(told).into_response());
            }
            // Somebody else published in the meantime: once more, with what is there now.
            Err(refusal) if refusal.reason == Reason::ImplementationSpecificError => {}
            Err(refusal) => return Err(refusal.into()),
        }
    }
    Err(Problem::new(StatusCode::CONFLICT, format!("others publish to `{channel}` all the time"))
        .hint("try again later"))
}

/// Keeps the list that is about to be replaced in the channel's history, as publishers do.
async fn keep(gateway: &Arc<Gateway>, listed: &Listed) -> Result<(), Problem> {
    let Some(release) = listed.list.release() else { return Ok(()) };
    let index = &gateway.shared.index;
    let present = index.get(&listed.channel.topic(), clock::now().unix_ms)?;
    // Otherwise somebody else replaced it, and the next attempt reads what is there now.
    if let Some(message) = present.filter(|message| message.version == listed.version) {
        let payload = index.payload(&message.payload)?;
        gateway.publish(listed.channel.history(release.sequence), payload, None, None).await?;
    }
    Ok(())
}

/// The channel's list with a wheel, and its sequence; `None` if it has the wheel already.
fn with(listed: &Listed, wheel: &list::Wheel) -> Result<Option<(UpdateList, Option<u64>)>, Problem> {
    let Listed { channel, list, .. } = listed;
    let conflict = |detail: String| Problem::new(StatusCode::CONFLICT, detail);
    if list.entries().iter().any(|entry| matches!(entry, Entry::Signature(_))) {
        return Err(conflict(format!("the lists of `{channel}` are signed, and the broker has no key"))
            .hint("put the wheel below `wheels/` of the channel's folder, and `mpypi publish` it"));
    }
    let is_this = |other: &list::Wheel| {
        normalized_name(&other.name) == normalized_name(&wheel.name) && other.tag == wheel.tag
    };
    let wheels = list.entries().iter().filter_map(|entry| match entry {
        Entry::Wheel(other) if is_this(other) => Some(other),
        _ => None,
    });
    for other in wheels {
        if other.digest == wheel.digest {
            return Ok(None);
        }
        if other.version == wheel.version {
            return Err(conflict(format!(
                "`{channel}` has other bytes as `{}` {}",
                wheel.name, wheel.version
            ))
            .hint("devices compare versions: raise the wheel's"));
        }
    }
    let release = next(listed)?;
    let sequence = release.as_ref().map(|release| release.sequence);
    let mut entries: Vec<_> = release.map(Entry::Release).into_iter().collect();
    let mut is_new = true;
    for entry in list.entries() {
        match entry {
            Entry::Release(_) => {}
            Entry::Wheel(other) if is_this(other) => {
                is_new = false;
                entries.push(Entry::Wheel(wheel.clone()));
            }
            other => entries.push(other.clone()),
        }
    }
    if is_new {
        entries.push(Entry::Wheel(wheel.clone()));
    }
    let list = UpdateList::new(entries)
        .map_err(|error| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, chain(&error)))?;
    Ok(Some((list, sequence)))
}

/// The release after the present one. A list of Mpy-BLOX's own tools has none, and gets none.
fn next(listed: &Listed) -> Result<Option<Release>, Problem> {
    let now = clock::now().unix_ms;
    let now = jiff::Timestamp::from_millisecond(i64::try_from(now).unwrap_or(i64::MAX)).ok();
    let Some(old) = listed.list.release() else {
        let first = Release {
            channel: listed.channel.clone(),
            sequence: 1,
            version: "1".to_owned(),
            created: now,
            expires: None,
            epoch: 0,
            previous: listed.digest,
            revoked: Vec::new(),
            extra: Default::default(),
        };
        return Ok(listed.list.entries().is_empty().then_some(first));
    };
    let too_high = || Problem::new(StatusCode::CONFLICT, "there is no sequence after the present release's");
    let sequence = old.sequence.checked_add(1).ok_or_else(too_high)?;
    let is_counted = old.version == old.sequence.to_string();
    let mut release = Release {
        sequence,
        version: if is_counted { sequence.to_string() } else { old.version.clone() },
        created: now,
        // As long as the last one was good for.
        expires: match (old.created, old.expires, now) {
            (Some(created), Some(expires), Some(now)) => {
                now.checked_add(expires.duration_since(created)).ok()
            }
            _ => None,
        },
        previous: listed.digest,
        ..old.clone()
    };
    // A new release to all, not the next step of the last one's rollout.
    release.extra.shift_remove("rollout");
    // Nor what some commit had.
    release.extra.shift_remove(COMMIT);
    Ok(Some(release))
}
