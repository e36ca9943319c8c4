//! A form that becomes a release.

use std::sync::Arc;

use axum::{
    Json,
    extract::{FromRequestParts, Request, State},
    http::{StatusCode, request::Parts},
};
use bytes::Bytes;
use mpypi_protocol::{ChannelName, Digest, Entry, FilePath, list};
use utoipa::ToSchema;

use super::{
    AtChannel,
    shape::{EntryRow, Published},
};
use crate::{
    faces::{
        release::{Added, add},
        upload::{FIELDS, broken, content, parts, place, value},
        wheel::Contents,
    },
    gateway::{Caller, Gateway, Here, Problem},
};

/// What is published.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "this describes the form, which is read part by part")]
pub(super) struct Form {
    /// Wheels.
    #[schema(value_type = Option<Vec<String>>, format = Binary)]
    wheel: Vec<Vec<u8>>,
    /// Files; the file name of each is its path on devices.
    #[schema(value_type = Option<Vec<String>>, format = Binary)]
    file: Vec<Vec<u8>>,
    /// What people call the release.
    version: Option<String>,
}

/// Adds wheels and files to a channel, in one release.
///
/// Each takes the place of the wheel of the same project and tag, or the file of the same path.
#[utoipa::path(post, path = "/api/channels/{channel}/publish", operation_id = "publish",
    params(("channel" = String, Path, description = "Its name")),
    request_body(content = Form, content_type = "multipart/form-data"), responses(
    (status = 200, description = "The channel has them", body = Published),
    (status = 400, description = "The form makes no sense"),
    (status = 404, description = "There cannot be such a channel"),
    (status = 408, description = "The form came too slowly"),
    (status = 409, description = "The channel's lists are signed, or it has other bytes of the same version"),
    (status = 413, description = "The form is too large"),
    (status = 415, description = "The body is no form"),
    (status = 422, description = "A wheel is none for devices, or the release would make no sense"),
    (status = 503, description = "Too many uploads are under way"),
    (status = 507, description = "The broker has no room for it"),
))]
pub(super) async fn publish(
    State(gateway): Here,
    caller: Caller,
    Allowed(channel): Allowed,
    request: Request,
) -> Result<Json<Published>, Problem> {
    let is_signed = {
        let view = gateway.shared.fleet.look().await;
        view.root().is_some_and(|root| root.delegation(&channel).is_some())
    };
    if is_signed {
        let detail = format!("the lists of `{channel}` are signed, and the broker has no key");
        return Err(Problem::new(StatusCode::CONFLICT, detail)
            .hint("put it into the channel's folder, and `mpypi publish` that where its key is"));
    }
    // A body that is no form is refused without a place.
    let mut form = parts(&gateway, request, &["wheel", "file"])?;
    let place = place(&gateway).await?;
    let (mut packages, mut version) = (Vec::new(), None);
    for at in 0.. {
        let Some(mut field) = form.next_field().await.map_err(broken)? else { break };
        if at == FIELDS {
            return Err(Problem::bad_request(format!("a form of more than {FIELDS} fields")));
        }
        match field.name().unwrap_or_default() {
            "wheel" => {
                let bytes = content(&mut field).await?;
                packages.push((wheel(&gateway, bytes.clone()).await?, bytes));
            }
            "file" => {
                let path = field.file_name().unwrap_or_default().to_owned();
                let path = FilePath::new(&path).map_err(|error| {
                    Problem::bad_request(format!("the name of a file: {error}"))
                        .hint("it is the path on devices, as `--form 'file=@x.py;filename=lib/x.py'` says it")
                })?;
                let bytes = content(&mut field).await?;
                let (digest, size) = (Digest::of(&bytes), Some(bytes.len() as u64));
                packages.push((
                    Entry::Src(list::Src { path, digest, size, chunks: None, extra: Default::default() }),
                    bytes,
                ));
            }
            "version" => version = Some(value(&mut field).await?),
            other => {
                return Err(Problem::bad_request(format!("a form has no field `{}`", other.escape_debug()))
                    .hint("its fields are `wheel`, `file` and `version`"));
            }
        }
    }
    if packages.is_empty() {
        return Err(Problem::bad_request("there is nothing to publish in the form")
            .hint("add `wheel` or `file`, each with a file"));
    }
    let Added { sequence, changed } = add(&gateway, &channel, &packages, version.as_deref(), place).await?;
    if changed {
        tracing::info!(%channel, sequence, packages = packages.len(), by = %caller.identity, "published over HTTP");
    }
    let packages = packages.iter().filter_map(|(entry, _)| EntryRow::of(entry)).collect();
    Ok(Json(Published { channel: channel.to_string(), sequence, changed, packages }))
}

/// The entry for a wheel.
async fn wheel(gateway: &Arc<Gateway>, bytes: Bytes) -> Result<Entry, Problem> {
    let work =
        move || Contents::of(&bytes).map(|contents| (contents, Digest::of(&bytes), bytes.len() as u64));
    let (contents, digest, size) = gateway.catalog.work(work).await?.map_err(|problem| {
        let detail = format!("a wheel is none for devices: {problem}");
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
    })?;
    Ok(Entry::Wheel(list::Wheel {
        name: contents.name,
        version: contents.version,
        digest,
        size: Some(size),
        chunks: None,
        tag: contents.tags.last().cloned(),
        extra: Default::default(),
    }))
}

/// The channel in the path, which the caller may publish to: asked before the body is looked at.
pub(super) struct Allowed(ChannelName);

impl FromRequestParts<Arc<Gateway>> for Allowed {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Allowed, Problem> {
        let caller = Caller::from_request_parts(parts, gateway).await?;
        let AtChannel(channel) = AtChannel::from_request_parts(parts, gateway).await?;
        caller.writes(&channel.topic())?;
        Ok(Allowed(channel))
    }
}
