//! Requests and bytes, by face.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use axum::{Error, body::Body, response::Response};
use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::metrics::Counter;

/// Whose requests are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Face {
    /// The broker itself: `/healthz`, `/metrics`, and paths that nobody has.
    Broker,
    /// ota-promoter.
    Promoter,
    /// MicroPython's `mip`.
    Mip,
    /// PyPI's simple index, and uploads to it.
    Simple,
    /// Packages and firmware.
    Downloads,
    /// ThingsBoard's device API, and GitHub's beside it.
    ThingsBoard,
    /// The fleet API.
    Api,
}

impl Face {
    /// All of them.
    pub const ALL: [Face; 7] = [
        Face::Broker,
        Face::Promoter,
        Face::Mip,
        Face::Simple,
        Face::Downloads,
        Face::ThingsBoard,
        Face::Api,
    ];

    /// What it is called in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Face::Broker => "broker",
            Face::Promoter => "promoter",
            Face::Mip => "mip",
            Face::Simple => "simple",
            Face::Downloads => "downloads",
            Face::ThingsBoard => "thingsboard",
            Face::Api => "api",
        }
    }
}

/// Counts for all faces.
#[derive(Debug, Default)]
pub struct Counts([Count; Face::ALL.len()]);

/// Counts for one face.
#[derive(Debug)]
pub struct Count {
    /// Bytes of bodies sent.
    pub bytes: Counter,
    /// Answers, by status from [`FIRST`] on.
    codes: Vec<AtomicU64>,
}

/// The lowest status.
const FIRST: u16 = 100;
/// The highest status that is ours to give.
const LAST: u16 = 599;

impl Counts {
    /// The counts of a face.
    #[must_use]
    pub fn of(&self, face: Face) -> &Count {
        &self.0[face as usize]
    }
}

impl Default for Count {
    fn default() -> Self {
        let codes = (FIRST..=LAST).map(|_| AtomicU64::new(0)).collect();
        Count { bytes: Counter::default(), codes }
    }
}

impl Count {
    fn one(&self, code: u16) {
        if let Some(count) = code.checked_sub(FIRST).and_then(|at| self.codes.get(usize::from(at))) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Statuses that were given, and how often.
    pub fn codes(&self) -> impl Iterator<Item = (u16, u64)> {
        let all = (FIRST..).zip(&self.codes).map(|(code, count)| (code, count.load(Ordering::Relaxed)));
        all.filter(|(_, count)| *count > 0)
    }
}

/// Counts an answer, and the bytes of its body as they leave.
pub(super) fn count(response: Response, counts: &Arc<Counts>) -> Response {
    let face = response.extensions().get().copied().unwrap_or(Face::Broker);
    counts.of(face).one(response.status().as_u16());
    let counts = counts.clone();
    response.map(|inner| Body::new(Counted { inner, counts, face }))
}

/// A body whose bytes are counted.
struct Counted {
    inner: Body,
    counts: Arc<Counts>,
    face: Face,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(bytes) = frame.data_ref()
        {
            self.counts.of(self.face).bytes.add(bytes.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
