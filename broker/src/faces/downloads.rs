//! Packages by their digest, firmware by its name.
//!
//! | path | answer |
//! |---|---|
//! | `/packages/<sha256>` | the package, for ever the same |
//! | `/packages/<sha256>/<file name>` | the same for a wheel, under its file's name; with `.metadata` behind it, its METADATA |
//! | `/firmware/<name>.bin`, also below `/channels/<channel>` | the newest image that channels name |
//!
//! A name may be followed by `-<target>` and `-<version>` or `-v<version>`, and preceded by `firmware-`.

use std::collections::HashMap;

use axum::{
    Router,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
    routing::get,
};
use bytes::Bytes;
use mpypi_protocol::{Digest, Entry, PackageId, list};

use super::{
    catalog::{Listed, Scope},
    version::compare,
};
use crate::{
    clock,
    gateway::{
        Caller, Gateway, Here, Problem, Routes,
        file::{Cache, File},
    },
    message::Payload,
};

/// The routes for packages.
pub fn packages() -> Routes {
    Router::new().route("/packages/{digest}", get(package)).route("/packages/{digest}/{file}", get(wheel))
}

/// The routes for firmware.
pub fn firmware() -> Routes {
    Router::new().route("/firmware/{file}", get(image))
}

async fn package(
    State(gateway): Here,
    caller: Caller,
    Path(digest): Path<String>,
    asked: HeaderMap,
) -> Result<Response, Problem> {
    let (digest, payload) = find(&gateway, &caller, &digest)?;
    file(payload, &digest, Cache::Immutable).answer(&gateway, &asked)
}

async fn wheel(
    State(gateway): Here,
    caller: Caller,
    Path((digest, name)): Path<(String, String)>,
    asked: HeaderMap,
) -> Result<Response, Problem> {
    let (digest, payload) = find(&gateway, &caller, &digest)?;
    let contents = gateway.catalog.wheel(&gateway.shared.index, &digest).await?;
    let contents = contents.ok_or_else(no_package)?;
    let file_name = contents.file_name();
    match name.strip_suffix(".metadata") {
        Some(wheel) if wheel == file_name => {
            let metadata = contents.metadata.clone();
            let name = Digest::of(&metadata);
            let kind = HeaderValue::from_static("text/plain; charset=utf-8");
            let file = file(Payload::Inline(metadata), &name, Cache::Immutable);
            file.header(header::CONTENT_TYPE, kind).answer(&gateway, &asked)
        }
        None if name == file_name => file(payload, &digest, Cache::Immutable).answer(&gateway, &asked),
        _ => Err(no_package()),
    }
}

fn file(payload: Payload, digest: &Digest, cache: Cache) -> File {
    File::new(payload, digest, cache)
        .header(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))
        // Nobody shall take for a page what somebody has published.
        .header(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"))
}

fn no_package() -> Problem {
    Problem::not_found("there is no such package")
}

/// A package that the caller may read.
fn find(gateway: &Gateway, caller: &Caller, digest: &str) -> Result<(Digest, Payload), Problem> {
    let digest: Digest = digest.parse().map_err(|_| no_package())?;
    let index = &gateway.shared.index;
    let now_ms = clock::now().unix_ms;
    if digest == Digest::EMPTY {
        return Ok((digest, Payload::Inline(Bytes::new())));
    }
    for id in [PackageId::Wheel(digest), PackageId::Firmware(digest)] {
        caller.reads(&id.topic())?;
        if let Some(message) = index.get(&id.topic(), now_ms)? {
            return Ok((digest, message.payload));
        }
    }
    for listed in gateway.catalog.lists(index, caller)? {
        for (id, _) in listed.list.packages() {
            if *id.digest() == digest
                && let Some(message) = index.get(&id.topic(), now_ms)?
            {
                return Ok((digest, message.payload));
            }
        }
    }
    Err(no_package())
}

async fn image(
    State(gateway): Here,
    scope: Scope,
    Path(parameters): Path<HashMap<String, String>>,
    asked: HeaderMap,
) -> Result<Response, Problem> {
    let name = parameters.get("file").map(String::as_str).unwrap_or_default();
    let image = choose(&scope, name)?;
    let message =
        gateway.shared.index.get(&PackageId::Firmware(image.digest).topic(), clock::now().unix_ms)?;
    let message = message.ok_or_else(|| Problem::not_found("the image is not in the index"))?;
    file(message.payload, &image.digest, Cache::Asking).answer(&gateway, &asked)
}

/// The newest image of this name.
fn choose<'s>(scope: &'s Scope, file: &str) -> Result<&'s list::Firmware, Problem> {
    let no_image = || Problem::not_found(format!("no channel here has firmware `{}`", file.escape_debug()));
    let name = file.strip_suffix(".bin").ok_or_else(no_image)?;
    let images = |listed: &'s std::sync::Arc<Listed>| {
        listed.list.entries().iter().filter_map(|entry| match entry {
            Entry::Firmware(image) => Some(image),
            _ => None,
        })
    };
    let mut found: Vec<_> =
        scope.lists.iter().flat_map(images).filter(|image| is_called(image, name)).collect();
    found.sort_by(|one, other| compare(&other.version, &one.version));
    let newest = found.first().ok_or_else(no_image)?;
    let same = found.iter().take_while(|image| compare(&image.version, &newest.version).is_eq());
    let targets: Vec<_> = same
        .filter(|image| image.digest != newest.digest)
        .map(|image| image.target.as_deref().unwrap_or("any"))
        .collect();
    match targets.is_empty() {
        true => Ok(newest),
        false => {
            Err(Problem::new(StatusCode::CONFLICT, format!("`{name}` is for several targets")).hint(format!(
                "add the target to the name: `{name}-{}.bin`, or one of {}",
                newest.target.as_deref().unwrap_or("any"),
                targets.join(", ")
            )))
        }
    }
}

fn is_called(image: &list::Firmware, name: &str) -> bool {
    let name =
        name.strip_prefix("firmware-").filter(|_| !image.name.starts_with("firmware-")).unwrap_or(name);
    let Some(rest) = name.strip_prefix(image.name.as_str()) else { return false };
    let rest = match image.target.as_deref().and_then(|target| rest.strip_prefix('-')?.strip_prefix(target)) {
        Some(rest) => rest,
        None => rest,
    };
    let version = rest.strip_prefix('-');
    rest.is_empty()
        || version.is_some_and(|text| text == image.version || text.strip_prefix('v') == Some(&image.version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_answers_to_its_name_with_or_without_target_and_version() {
        let image = list::Firmware {
            name: "esp32".into(),
            version: "1.25.0".into(),
            target: Some("esp32-eth".into()),
            digest: Digest::EMPTY,
            size: None,
            chunks: None,
            extra: Default::default(),
        };
        for name in [
            "esp32",
            "esp32-1.25.0",
            "esp32-v1.25.0",
            "esp32-esp32-eth",
            "firmware-esp32-v1.25.0",
            "esp32-esp32-eth-v1.25.0",
        ] {
            assert!(is_called(&image, name), "{name}");
        }
        for name in ["", "esp", "esp32s3", "esp32-1.24", "esp32-eth", "firmware-", "esp32-v"] {
            assert!(!is_called(&image, name), "{name}");
        }
    }
}
