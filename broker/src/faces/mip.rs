//! MicroPython's package installer: `mip.install("blink", index="http://host:8080/mip")`, `mpremote mip install`.
//!
//! | path, below `/mip` or `/channels/<channel>/mip` | answer |
//! |---|---|
//! | `/package/<mpy>/<name>/<version>.json` | which files, each by its SHA-256; `<mpy>` is a version of bytecode or `py` |
//! | `/<name>/package.json`, `/<name>/<version>/package.json` | the same of source, with URLs: for `mip.install("http://host:8080/mip/blink/")` |
//! | `/file/<first two digits>/<sha256>` | a file of a wheel, unpacked as it is sent |
//!
//! An installer says which bytecode it loads and nothing of its architecture: it gets bytecode or source, never
//! machine code.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::{Buf, Bytes};
use flate2::{Decompress, FlushDecompress};
use http_body::{Frame, SizeHint};
use mpypi_protocol::{Digest, PackageId, Runtime, list};
use serde_json::{Value, json};

use super::{
    catalog::{Scope, wheels_of},
    version::{Key, compare},
    wheel::{Contents, Member, project},
};
use crate::{
    clock,
    gateway::{
        Gateway, Here, Problem, Routes,
        file::{Source, is_known},
    },
};

/// Bytes unpacked at a time.
const UNPACKED: usize = 32 * 1024;
/// The version that stands for the newest.
const LATEST: &str = "latest";

/// The routes.
pub fn routes() -> Routes {
    Router::new()
        .route("/package/{mpy}/{name}/{version}", get(package))
        .route("/file/{start}/{digest}", get(file))
        .route("/{name}/package.json", get(package_json))
        .route("/{name}/file/{start}/{digest}", get(file))
        .route("/{name}/{version}/package.json", get(package_json))
        .route("/{name}/{version}/file/{start}/{digest}", get(file))
}

async fn package(
    State(gateway): Here,
    scope: Scope,
    Path(parameters): Path<HashMap<String, String>>,
) -> Result<Response, Problem> {
    let parameter = |name: &str| parameters.get(name).map(String::as_str).unwrap_or_default();
    let no_package = || Problem::not_found("there is no such package");
    let version = parameter("version").strip_suffix(".json").ok_or_else(no_package)?;
    let mpy = match parameter("mpy") {
        "py" => None,
        number => Some(number.parse().map_err(|_| no_package())?),
    };
    let (wheel, contents) = choose(&gateway, &scope, parameter("name"), version, mpy).await?;
    let hashes: Vec<_> = contents.files.iter().map(|member| (&member.path, member.digest)).collect();
    Ok(told(&wheel, "hashes", json!(hashes), &contents, &scope))
}

async fn package_json(
    State(gateway): Here,
    scope: Scope,
    Path(parameters): Path<HashMap<String, String>>,
) -> Result<Response, Problem> {
    let parameter = |name: &str| parameters.get(name).map(String::as_str);
    let (name, version) = (parameter("name").unwrap_or_default(), parameter("version").unwrap_or(LATEST));
    let (wheel, contents) = choose(&gateway, &scope, name, version, None).await?;
    // Relative to the folder of this `package.json`, and below it: nobody resolves `..`.
    let url = |digest: &Digest| format!("file/{}/{digest}", &digest.short()[..2]);
    let urls: Vec<_> = contents.files.iter().map(|member| (&member.path, url(&member.digest))).collect();
    Ok(told(&wheel, "urls", json!(urls), &contents, &scope))
}

fn told(wheel: &list::Wheel, key: &str, files: Value, contents: &Contents, scope: &Scope) -> Response {
    let deps: Vec<_> = contents.requires.iter().filter_map(|line| needed(line, scope)).collect();
    let package = json!({ "v": 1, "version": wheel.version, key: files, "deps": deps });
    ([(header::CACHE_CONTROL, "no-cache")], Json(package)).into_response()
}

/// The wheel of this name and version that fits a device best which loads this bytecode.
async fn choose(
    gateway: &Gateway,
    scope: &Scope,
    name: &str,
    version: &str,
    mpy: Option<u32>,
) -> Result<(list::Wheel, Arc<Contents>), Problem> {
    let wheels = wheels_of(&scope.lists, name);
    if wheels.is_empty() {
        return Err(Problem::not_found(format!("no channel here has a package `{}`", name.escape_debug())));
    }
    let runtime = Runtime { mpy, platform: String::new() };
    let fits = |wheel: &&list::Wheel| runtime.fit(wheel.tag.as_deref()).is_some();
    let fitting: Vec<_> = wheels.iter().copied().filter(fits).collect();
    let version = match version {
        LATEST => newest(&fitting).ok_or_else(|| nothing_fits(name, &wheels))?,
        version => version,
    };
    let is_wanted = |wheel: &&list::Wheel| compare(&wheel.version, version).is_eq();
    let of_version: Vec<_> = fitting.into_iter().filter(is_wanted).collect();
    let best = runtime.choose(of_version.iter().map(|wheel| wheel.tag.as_deref()));
    let wheel = best.map(|at| of_version[at]).ok_or_else(|| nothing_fits(name, &wheels))?;
    let contents = gateway.catalog.wheel(&gateway.shared.index, &wheel.digest).await?;
    let contents = contents.ok_or_else(|| Problem::not_found("the package cannot be unpacked here"))?;
    Ok((wheel.clone(), contents))
}

/// The newest version; a pre-release only where there is nothing else.
fn newest<'w>(wheels: &[&'w list::Wheel]) -> Option<&'w str> {
    let versions = wheels.iter().map(|wheel| wheel.version.as_str());
    versions.max_by_key(|version| {
        let key = Key::of(version);
        (!key.is_pre(), key)
    })
}

fn nothing_fits(name: &str, wheels: &[&list::Wheel]) -> Problem {
    let mut found: Vec<_> = wheels
        .iter()
        .map(|wheel| format!("{} ({})", wheel.version, wheel.tag.as_deref().unwrap_or("any")))
        .collect();
    found.sort();
    found.dedup();
    Problem::not_found(format!("no `{name}` of this version is source, or bytecode that this device loads"))
        .hint(format!("there is {}", found.join(", ")))
}

/// Another package of the index that a line `Requires-Dist` names, and its version.
fn needed(line: &str, scope: &Scope) -> Option<(String, String)> {
    // What is only needed under a condition is left to whoever knows the device.
    let (line, marker) = line.split_once(';').unwrap_or((line, ""));
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || "._-".contains(c))).unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    if !marker.trim().is_empty() || wheels_of(&scope.lists, name).is_empty() {
        return None;
    }
    let exact = rest.trim().trim_matches(['(', ')']).strip_prefix("==").map(str::trim);
    let exact = exact.filter(|version| !version.contains([',', '*']));
    Some((project(name), exact.unwrap_or(LATEST).to_owned()))
}

async fn file(
    State(gateway): Here,
    scope: Scope,
    Path(parameters): Path<HashMap<String, String>>,
    asked: HeaderMap,
) -> Result<Response, Problem> {
    let parameter = |name: &str| parameters.get(name).map(String::as_str).unwrap_or_default();
    let no_file = || Problem::not_found("no package here has such a file");
    let digest: Digest = parameter("digest").parse().map_err(|_| no_file())?;
    if !parameter("digest").starts_with(parameter("start")) || parameter("start").len() != 2 {
        return Err(no_file());
    }
    let index = &gateway.shared.index;
    let (wheel, contents, at) =
        gateway.catalog.file(index, &scope.lists, &digest).await?.ok_or_else(no_file)?;
    let member = contents.files.get(at).ok_or_else(no_file)?;
    let etag = format!("\"{digest}\"");
    let tag = HeaderValue::from_str(&etag).map_err(|error| Problem::internal(&error))?;
    let headers = [(header::ETAG, tag), (header::CACHE_CONTROL, HeaderValue::from_static("no-cache"))];
    if is_known(&asked, &etag) {
        return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
    }
    let message = index.get(&PackageId::Wheel(wheel).topic(), clock::now().unix_ms)?.ok_or_else(no_file)?;
    let source = Source::open(index, message.payload).map_err(|error| Problem::internal(&error))?;
    let kind = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (header::CONTENT_LENGTH, HeaderValue::from(member.size)),
    ];
    Ok((headers, kind, Body::new(Unpacking::new(source, member))).into_response())
}

/// A file of a wheel, unpacked while it is sent.
struct Unpacking {
    source: Source,
    at: u64,
    end: u64,
    left: u64,
    input: Bytes,
    inflate: Option<Decompress>,
}

impl Unpacking {
    fn new(source: Source, member: &Member) -> Unpacking {
        Unpacking {
            source,
            at: member.start,
            end: member.start + member.packed,
            left: member.size,
            input: Bytes::new(),
            inflate: member.is_deflated.then(|| Decompress::new(false)),
        }
    }

    /// Some bytes; there are bytes left.
    fn piece(&mut self) -> io::Result<Bytes> {
        loop {
            if self.input.is_empty() && self.at < self.end {
                self.input = self.source.piece(&(self.at..self.end))?;
                self.at += self.input.len() as u64;
            }
            let Some(inflate) = &mut self.inflate else {
                let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(self.input.len());
                return match most {
                    0 => Err(io::ErrorKind::UnexpectedEof.into()),
                    most => Ok(self.input.split_to(most)),
                };
            };
            let most = usize::try_from(self.left).unwrap_or(UNPACKED).min(UNPACKED);
            let mut output = vec![0; most];
            let before = (inflate.total_in(), inflate.total_out());
            inflate
                .decompress(&self.input, &mut output, FlushDecompress::None)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let taken = usize::try_from(inflate.total_in() - before.0).unwrap_or(usize::MAX);
            self.input.advance(taken.min(self.input.len()));
            output.truncate(usize::try_from(inflate.total_out() - before.1).unwrap_or(usize::MAX));
            match output.is_empty() {
                false => return Ok(output.into()),
                true if taken == 0 && (self.at >= self.end || !self.input.is_empty()) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                true => {}
            }
        }
    }
}

impl http_body::Body for Unpacking {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let piece = self.piece();
        if let Ok(piece) = &piece {
            self.left = self.left.saturating_sub(piece.len() as u64);
        }
        Poll::Ready(Some(piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
