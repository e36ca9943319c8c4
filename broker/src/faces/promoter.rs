//! ota-promoter: a channel's src files, each by the SHA-1 of its bytes and its path.
//!
//! | path, below the root of a listener of its own or `/channels/<channel>` | answer |
//! |---|---|
//! | `/files` | `{"files":[{"path","checksum"}],"version"}` |
//! | `/files/version` | `{"version"}` |
//! | `/files/<checksum>`, and `/file/<checksum>` | the file |
//!
//! Its clients send HTTP/1.0, cannot log in, and take what was listed a while ago: what the last
//! [`Limits::gc_keep`](crate::Limits) lists of the channel name is there, as long as it is in the index.

use std::{cmp::Ordering, collections::HashMap, fmt::Write, sync::Arc};

use axum::{
    Extension, Router,
    extract::{FromRequestParts, Path, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use mpypi_protocol::{ChannelName, Digest, Entry, FilePath, PackageId};
use sha1::{Digest as _, Sha1};

use super::catalog::{Listed, Memory, channel};
use crate::{
    clock,
    gateway::{
        Caller, Gateway, Here, Problem, Routes,
        file::{Cache, File, Source},
    },
    index::Index,
    message::Payload,
};

/// Bytes by which it is told what a file is.
const SNIFFED: usize = 512;

/// A checksum: the SHA-1 of a file's bytes, then its path.
pub type Sum = [u8; 20];

/// Channels as folders.
#[derive(Debug, Default)]
pub struct Folders {
    folders: Memory<ChannelName, Folder>,
    sums: Memory<(FilePath, Digest), Sum>,
}

/// A channel's list as a folder.
#[derive(Debug)]
struct Folder {
    /// The version of the list's record.
    version: u64,
    listing: Bytes,
    listing_version: Bytes,
    files: HashMap<Sum, (FilePath, Digest)>,
    /// What earlier lists named, too.
    earlier: Memory<(), HashMap<Sum, (FilePath, Digest)>>,
}

/// The channel that a listener shows at its root.
#[derive(Debug, Clone)]
pub struct Shown(pub ChannelName);

/// The routes.
pub fn routes() -> Routes {
    Router::new()
        .route("/files", get(listing))
        .route("/files/version", get(version))
        .route("/files/{sum}", get(file))
        .route("/file/{sum}", get(file))
}

/// What its server says of a path that it does not know.
pub async fn not_found() -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain")];
    (StatusCode::NOT_FOUND, kind, "404 page not found").into_response()
}

/// The channel that is asked for, which the caller may read.
struct Asked(ChannelName);

impl FromRequestParts<Arc<Gateway>> for Asked {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Asked, Problem> {
        let caller = Caller::from_request_parts(parts, gateway).await?;
        let shown = Option::<Extension<Shown>>::from_request_parts(parts, gateway).await;
        let shown = shown.ok().flatten().map(|Extension(Shown(channel))| channel);
        let named = channel(parts, gateway).await?;
        let channel = named.or(shown).ok_or_else(|| Problem::not_found("there is no channel here"))?;
        caller.reads(&channel.topic())?;
        Ok(Asked(channel))
    }
}

async fn listing(State(gateway): Here, Asked(channel): Asked) -> Result<Response, Refused> {
    let folder = folder(&gateway, &channel).await?;
    Ok(json(StatusCode::OK, folder.listing.clone()))
}

async fn version(State(gateway): Here, Asked(channel): Asked) -> Result<Response, Refused> {
    let folder = folder(&gateway, &channel).await?;
    Ok(json(StatusCode::OK, folder.listing_version.clone()))
}

async fn file(
    State(gateway): Here,
    Asked(channel): Asked,
    Path(parameters): Path<HashMap<String, String>>,
    asked: HeaderMap,
) -> Result<Response, Refused> {
    let sum = parameters.get("sum").and_then(|text| parse(text)).ok_or(Refused::NotFound)?;
    let folder = folder(&gateway, &channel).await?;
    let found = match folder.files.get(&sum) {
        Some(found) => Some(found.clone()),
        None => earlier(&gateway, &channel, &folder).await?.get(&sum).cloned(),
    };
    let (path, digest) = found.ok_or(Refused::NotFound)?;
    let index = &gateway.shared.index;
    let payload = payload(index, &path, &digest)?.ok_or_else(|| Refused::gone(&path))?;
    let name = path.as_str().rsplit('/').next().unwrap_or_default();
    let header =
        |text: &str| HeaderValue::from_bytes(text.as_bytes()).map_err(|error| Problem::internal(&error));
    let mut answer = File::new(payload.clone(), hex(&sum), Cache::Immutable)
        .header(header::CONTENT_DISPOSITION, header(&format!("attachment; filename={name}"))?)
        .header(HeaderName::from_static("x-target-path"), header(path.as_str())?);
    if !payload.is_empty() {
        let source = Source::open(index, payload).map_err(|error| Problem::internal(&error))?;
        let start = source.piece(&(0..SNIFFED as u64)).map_err(|error| Problem::internal(&error))?;
        answer = answer.header(header::CONTENT_TYPE, HeaderValue::from_static(kind(&start)));
    }
    Ok(answer.answer(&gateway, &asked)?)
}

/// The channel's list as a folder, made when it is first asked for.
async fn folder(gateway: &Arc<Gateway>, channel: &ChannelName) -> Result<Arc<Folder>, Problem> {
    let listed = gateway.catalog.list(&gateway.shared.index, channel)?;
    if let Some(folder) =
        gateway.folders.folders.get(channel).filter(|folder| folder.version == listed.version)
    {
        return Ok(folder);
    }
    let held = gateway.clone();
    let work = move || {
        let files = listed.list.entries().iter().filter_map(|entry| match entry {
            Entry::Src(src) => Some((src.path.clone(), src.digest)),
            _ => None,
        });
        Folder::new(&held, &listed, files.collect())
    };
    let folder = gateway.catalog.work(work).await??;
    Ok(gateway.folders.folders.put(channel.clone(), folder))
}

/// What earlier lists of the channel name.
async fn earlier(
    gateway: &Arc<Gateway>,
    channel: &ChannelName,
    folder: &Arc<Folder>,
) -> Result<Arc<HashMap<Sum, (FilePath, Digest)>>, Problem> {
    if let Some(earlier) = folder.earlier.get(&()) {
        return Ok(earlier);
    }
    let (held, channel) = (gateway.clone(), channel.clone());
    let work = move || -> Result<_, Problem> {
        let Gateway { shared, .. } = &*held;
        let mut sums = HashMap::new();
        for id in shared.index.named_lately(&channel, shared.limits.gc_keep)? {
            if let PackageId::Src(path, digest) = id
                // What has gone is not served; it is no failure.
                && let Ok(Some(sum)) = held.folders.sum(&shared.index, &path, &digest)
            {
                sums.insert(sum, (path, digest));
            }
        }
        Ok(sums)
    };
    Ok(folder.earlier.put((), gateway.catalog.work(work).await??))
}

impl Folder {
    fn new(
        gateway: &Gateway,
        listed: &Listed,
        mut files: Vec<(FilePath, Digest)>,
    ) -> Result<Folder, Problem> {
        files.sort_by(|(one, _), (other, _)| walk_order(one, other));
        let mut sums = Vec::with_capacity(files.len());
        for (path, digest) in files {
            let sum = gateway.folders.sum(&gateway.shared.index, &path, &digest)?;
            sums.push((sum.ok_or_else(|| gone(&path))?, path, digest));
        }
        let mut all = Sha1::new();
        sums.iter().for_each(|(sum, ..)| all.update(hex(sum)));
        let version = hex(&all.finalize());
        let list: Vec<_> = sums
            .iter()
            .map(|(sum, path, _)| serde_json::json!({ "path": path, "checksum": hex(sum) }))
            .collect();
        let listing = serde_json::json!({ "files": list, "version": version });
        Ok(Folder {
            version: listed.version,
            listing: listing.to_string().into(),
            listing_version: serde_json::json!({ "version": version }).to_string().into(),
            files: sums.into_iter().map(|(sum, path, digest)| (sum, (path, digest))).collect(),
            earlier: Memory::default(),
        })
    }
}

impl Folders {
    /// The checksum of a file, computed once; `None` if the file is not in the index.
    fn sum(&self, index: &Index, path: &FilePath, digest: &Digest) -> Result<Option<Sum>, Problem> {
        let key = (path.clone(), *digest);
        if let Some(sum) = self.sums.get(&key) {
            return Ok(Some(*sum));
        }
        let Some(payload) = payload(index, path, digest)? else { return Ok(None) };
        let len = payload.len();
        let read = || -> std::io::Result<Sum> {
            let source = Source::open(index, payload)?;
            let mut hash = Sha1::new();
            let mut at = 0;
            while at < len {
                let piece = source.piece(&(at..len))?;
                hash.update(&piece);
                at += piece.len() as u64;
            }
            hash.update(path.as_str());
            Ok(hash.finalize().into())
        };
        let sum = read().map_err(|error| Problem::internal(&error))?;
        Ok(Some(*self.sums.put(key, sum)))
    }
}

/// A file's bytes; those of an empty one are nowhere.
fn payload(index: &Index, path: &FilePath, digest: &Digest) -> Result<Option<Payload>, Problem> {
    if *digest == Digest::EMPTY {
        return Ok(Some(Payload::Inline(Bytes::new())));
    }
    let topic = PackageId::Src(path.clone(), *digest).topic();
    Ok(index.get(&topic, clock::now().unix_ms)?.map(|message| message.payload))
}

fn gone(path: &FilePath) -> Problem {
    tracing::error!(%path, "a listed file is not in the index");
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
}

/// The order in which folders are walked: by their names, one level after the other.
fn walk_order(one: &FilePath, other: &FilePath) -> Ordering {
    one.as_str().split('/').cmp(other.as_str().split('/'))
}

/// What Go's standard library takes for text, by the file's start.
fn kind(start: &[u8]) -> &'static str {
    let is_binary = |byte: &u8| matches!(byte, 0..=0x08 | 0x0b | 0x0e..=0x1a | 0x1c..=0x1f);
    match start.iter().any(is_binary) {
        true => "application/octet-stream",
        false => "text/plain; charset=utf-8",
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").ok();
        text
    })
}

/// Forty lowercase hexadecimal digits.
fn parse(text: &str) -> Option<Sum> {
    let is_digit = |digit: u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit);
    if text.len() != 40 || !text.bytes().all(is_digit) {
        return None;
    }
    let mut sum = [0; 20];
    for (at, byte) in sum.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(sum)
}

fn json(code: StatusCode, body: impl Into<Bytes>) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/json;charset=utf-8")];
    (code, kind, body.into()).into_response()
}

/// A refusal as its clients know it.
enum Refused {
    NotFound,
    Other(Problem),
}

impl Refused {
    fn gone(path: &FilePath) -> Refused {
        Refused::Other(gone(path))
    }
}

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Refused {
        Refused::Other(problem)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let message = |code, text: &str| json(code, serde_json::json!({ "Message": text }).to_string());
        match self {
            Refused::NotFound => message(StatusCode::BAD_REQUEST, "file not found"),
            Refused::Other(problem) if problem.code().is_server_error() => {
                message(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
            }
            Refused::Other(problem) => problem.into_response(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> FilePath {
        FilePath::new(text).unwrap()
    }

    #[test]
    fn folders_are_walked_level_by_level() {
        let mut paths = ["sub.py", "sub/x", "a-b", "a/z", "sub/a/b", "é", "Z"].map(path);
        paths.sort_by(walk_order);
        assert_eq!(
            paths,
            ["Z", "a", "a-b", "sub/a/b", "sub/x", "sub.py", "é"].map(|text| match text {
                "a" => path("a/z"),
                other => path(other),
            })
        );
    }

    #[test]
    fn a_checksum_is_forty_lowercase_digits() {
        let text = "0dca091da529abc1c507269acd06e619ed395c88";
        assert_eq!(hex(&parse(text).unwrap()), text);
        for wrong in ["", "0dca", &text.to_uppercase(), &format!("{text}0"), &text.replace('0', "g")] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn text_is_what_holds_no_control_characters_but_those_of_text() {
        for (start, expected) in [
            (&b"print(1)\n"[..], "text/plain; charset=utf-8"),
            (b"<html>", "text/plain; charset=utf-8"),
            (b"\x1b[0m\t\r\x0c\xff", "text/plain; charset=utf-8"),
            (b"a\0b", "application/octet-stream"),
            (b"M\x06\x1f", "application/octet-stream"),
        ] {
            assert_eq!(kind(start), expected, "{start:?}");
        }
    }
}
