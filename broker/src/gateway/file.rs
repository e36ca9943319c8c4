//! Files that go out: what a client has already is not sent again (RFC 9110, 13), ranges are (14), and bytes go from
//! the index to the socket in pieces.

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::{
    Gateway, Problem,
    range::{self, Asked},
};
use crate::{
    index::{
        Index,
        blobs::{Blob, CHUNK},
    },
    message::Payload,
};

/// How long an answer may be kept by others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// For ever: the path names the bytes.
    Immutable,
    /// As long as the broker, asked again, says that it is still the same.
    Asking,
}

/// A file to be sent.
#[derive(Debug)]
pub struct File {
    payload: Payload,
    /// A strong validator, quoted.
    etag: String,
    cache: Cache,
    headers: HeaderMap,
}

impl File {
    /// A file of these bytes; `name` stands for them and for no others.
    #[must_use]
    pub fn new(payload: Payload, name: impl std::fmt::Display, cache: Cache) -> File {
        File { payload, etag: format!("\"{name}\""), cache, headers: HeaderMap::new() }
    }

    /// The same with a header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> File {
        self.headers.insert(name, value);
        self
    }

    /// The answer with these bytes alone, for clients that do not ask for a range in HTTP's way.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn piece(self, gateway: &Gateway, bytes: Range<u64>) -> Result<Response, Problem> {
        send(gateway, self.payload, StatusCode::OK, self.headers, vec![Part::Range(bytes)])
    }

    /// The answer to a GET with these headers. To a HEAD it is the same, whose body is left out.
    ///
    /// # Errors
    /// The file cannot be read; or 412, 416.
    pub fn answer(self, gateway: &Gateway, asked: &HeaderMap) -> Result<Response, Problem> {
        let File { payload, etag, cache, headers: more } = self;
        let len = payload.len();
        let mut headers = HeaderMap::new();
        let etag_value = HeaderValue::from_str(&etag).map_err(|error| Problem::internal(&error))?;
        headers.insert(header::ETAG, etag_value);
        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        let is_private = gateway.shared.gate.is_guarded();
        headers.insert(header::CACHE_CONTROL, cache.control(is_private));
        // 13.2.2: `If-Match` first, then `If-None-Match`, then `Range` under `If-Range`.
        if asked.contains_key(header::IF_MATCH) && !names(asked, &header::IF_MATCH, &etag, Compare::Strongly)
        {
            return Err(Problem::new(StatusCode::PRECONDITION_FAILED, "the file is another one now"));
        }
        if is_known(asked, &etag) {
            return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
        }
        headers.extend(more);
        let is_same = asked.get(header::IF_RANGE).is_none_or(|value| value.as_bytes() == etag.as_bytes());
        let ranges = asked.get(header::RANGE).filter(|_| is_same).and_then(|value| value.to_str().ok());
        match ranges.map_or(Asked::All, |ranges| range::read(ranges, len)) {
            Asked::All => send(gateway, payload, StatusCode::OK, headers, vec![Part::Range(0..len)]),
            Asked::Nothing => {
                let has = HeaderValue::from_str(&format!("bytes */{len}"));
                let has = has.map_err(|error| Problem::internal(&error))?;
                Err(Problem::new(StatusCode::RANGE_NOT_SATISFIABLE, format!("the file has {len} bytes"))
                    .header(header::CONTENT_RANGE, has))
            }
            Asked::Parts(mut parts) if parts.len() == 1 => {
                let part = parts.remove(0);
                put(&mut headers, header::CONTENT_RANGE, &content_range(&part, len))?;
                send(gateway, payload, StatusCode::PARTIAL_CONTENT, headers, vec![Part::Range(part)])
            }
            Asked::Parts(parts) => {
                let boundary = format!("{:032x}", fastrand::u128(..));
                let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
                let kind = kind.map(|kind| format!("Content-Type: {kind}\r\n")).unwrap_or_default();
                let mut body = Vec::new();
                for part in parts {
                    let range = content_range(&part, len);
                    let head = format!("\r\n--{boundary}\r\n{kind}Content-Range: {range}\r\n\r\n");
                    body.extend([Part::Text(head.into()), Part::Range(part)]);
                }
                body.push(Part::Text(format!("\r\n--{boundary}--\r\n").into()));
                put(
                    &mut headers,
                    header::CONTENT_TYPE,
                    &format!("multipart/byteranges; boundary={boundary}"),
                )?;
                send(gateway, payload, StatusCode::PARTIAL_CONTENT, headers, body)
            }
        }
    }
}

impl Cache {
    fn control(self, is_private: bool) -> HeaderValue {
        HeaderValue::from_static(match (self, is_private) {
            (Cache::Immutable, false) => "public, max-age=31536000, immutable",
            (Cache::Immutable, true) => "private, max-age=31536000, immutable",
            (Cache::Asking, _) => "no-cache",
        })
    }
}

/// Whether a client has already what this entity tag stands for.
#[must_use]
pub fn is_known(asked: &HeaderMap, etag: &str) -> bool {
    names(asked, &header::IF_NONE_MATCH, etag, Compare::Weakly)
}

/// How two validators are compared (RFC 9110, 8.8.3.2).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compare {
    Strongly,
    Weakly,
}

/// Whether a header names this entity tag, or any.
fn names(headers: &HeaderMap, name: &HeaderName, etag: &str, compare: Compare) -> bool {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        value.split(',').map(str::trim).any(|tag| {
            let tag = if compare == Compare::Weakly { tag.strip_prefix("W/").unwrap_or(tag) } else { tag };
            tag == "*" || tag == etag
        })
    })
}

fn content_range(part: &Range<u64>, len: u64) -> String {
    format!("bytes {}-{}/{len}", part.start, part.end - 1)
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) -> Result<(), Problem> {
    headers.insert(name, HeaderValue::from_str(value).map_err(|error| Problem::internal(&error))?);
    Ok(())
}

fn send(
    gateway: &Gateway,
    payload: Payload,
    code: StatusCode,
    mut headers: HeaderMap,
    parts: Vec<Part>,
) -> Result<Response, Problem> {
    let source = Source::open(&gateway.shared.index, payload).map_err(|error| Problem::internal(&error))?;
    let left = parts.iter().map(Part::len).sum();
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(left));
    let pieces = Pieces { source, parts: parts.into(), left };
    Ok((code, headers, Body::new(pieces)).into_response())
}

/// Where bytes come from.
#[derive(Debug)]
pub enum Source {
    /// From memory.
    Memory(Bytes),
    /// From a file.
    Blob(Blob),
}

impl Source {
    /// Opens a payload.
    ///
    /// # Errors
    /// Its file is not there.
    pub fn open(index: &Index, payload: Payload) -> io::Result<Source> {
        Ok(match payload {
            Payload::Inline(bytes) => Source::Memory(bytes),
            // One piece, which is in memory where it was read lately: no file is opened for it then.
            Payload::Blob(digest, len) if len <= CHUNK => Source::Memory(index.chunk(&digest, len, 0)?),
            Payload::Blob(digest, len) => Source::Blob(index.open_blob(&digest, len)?),
        })
    }

    /// Some bytes at the start of `range`, which is not empty.
    ///
    /// # Errors
    /// There are none, or they cannot be read.
    pub fn piece(&self, range: &Range<u64>) -> io::Result<Bytes> {
        let length = range.end - range.start;
        let (mut bytes, at) = match self {
            Source::Memory(bytes) => (bytes.clone(), range.start),
            Source::Blob(blob) => (blob.piece(range.start)?, 0),
        };
        let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        let mut piece = bytes.split_off(at);
        piece.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        match piece.is_empty() {
            true => Err(io::ErrorKind::UnexpectedEof.into()),
            false => Ok(piece),
        }
    }
}

/// A part of a body.
enum Part {
    Text(Bytes),
    Range(Range<u64>),
}

impl Part {
    fn len(&self) -> u64 {
        match self {
            Part::Text(text) => text.len() as u64,
            Part::Range(range) => range.end - range.start,
        }
    }
}

/// A body that is read as it is sent: each piece when the one before it has gone.
struct Pieces {
    source: Source,
    parts: VecDeque<Part>,
    left: u64,
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = &mut *self;
        let piece = loop {
            match this.parts.pop_front() {
                None => return Poll::Ready(None),
                Some(Part::Text(text)) => break text,
                Some(Part::Range(range)) if range.is_empty() => {}
                Some(Part::Range(range)) => match this.source.piece(&range) {
                    Ok(piece) => {
                        this.parts.push_front(Part::Range(range.start + piece.len() as u64..range.end));
                        break piece;
                    }
                    Err(error) => {
                        tracing::error!(%error, "cannot read a file that is being sent");
                        return Poll::Ready(Some(Err(error)));
                    }
                },
            }
        };
        this.left -= piece.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
