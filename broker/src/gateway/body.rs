//! Bodies that come in: so large at most, and no slower than so.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::Body,
    extract::{FromRequest, Request},
    http::StatusCode,
};
use bytes::{Bytes, BytesMut};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::time::{Instant, Sleep, sleep};

use super::{Gateway, Problem};
use crate::limits::Limits;

/// A small body, whole: at most [`Limits::http_body`].
#[derive(Debug)]
pub struct Small(pub Bytes);

/// A body that fails when it becomes too large, or comes too slowly.
///
/// It may take [`Limits::read_stall`], and beyond it as long as [`Limits::slowest_upload`] needs for what has come.
#[derive(Debug)]
pub struct Bounded {
    body: Body,
    most: u64,
    come: u64,
    since: Instant,
    stall: Duration,
    slowest: u64,
    overdue: Pin<Box<Sleep>>,
}

/// Why a body did not come whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// It is too large.
    #[error("a body of more than {0} bytes is too large here")]
    TooLarge(u64),
    /// It comes too slowly.
    #[error("the body comes too slowly")]
    TooSlow,
    /// The connection failed, or its framing is wrong.
    #[error("the body does not come whole: {0}")]
    Broken(String),
}

impl Bounded {
    /// Bounds `body` to `most` bytes.
    #[must_use]
    pub fn new(body: Body, most: u64, limits: &Limits) -> Bounded {
        let overdue = Box::pin(sleep(limits.read_stall));
        let since = overdue.deadline() - limits.read_stall;
        let (stall, slowest) = (limits.read_stall, limits.slowest_upload.max(1));
        Bounded { body, most, come: 0, since, stall, slowest, overdue }
    }

    /// All of it.
    ///
    /// # Errors
    /// It did not come whole.
    pub async fn whole(mut self) -> Result<Bytes, BodyError> {
        // Its length is believed only as far as the limit; memory is taken as bytes come.
        if self.body.size_hint().lower() > self.most {
            return Err(BodyError::TooLarge(self.most));
        }
        let mut whole = BytesMut::new();
        while let Some(frame) = self.frame().await {
            if let Ok(bytes) = frame?.into_data() {
                whole.extend_from_slice(&bytes);
            }
        }
        Ok(whole.freeze())
    }
}

impl http_body::Body for Bounded {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            return match self.overdue.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(Some(Err(BodyError::TooSlow))),
                Poll::Pending => Poll::Pending,
            };
        };
        let frame = match frame {
            None => return Poll::Ready(None),
            Some(Err(error)) => return Poll::Ready(Some(Err(BodyError::Broken(error.to_string())))),
            Some(Ok(frame)) => frame,
        };
        self.come += frame.data_ref().map_or(0, |bytes| bytes.len() as u64);
        if self.come > self.most {
            return Poll::Ready(Some(Err(BodyError::TooLarge(self.most))));
        }
        let until = self.since + self.stall + Duration::from_secs(self.come / self.slowest);
        self.overdue.as_mut().reset(until);
        Poll::Ready(Some(Ok(frame)))
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl From<BodyError> for Problem {
    fn from(error: BodyError) -> Problem {
        let code = match error {
            BodyError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            BodyError::TooSlow => StatusCode::REQUEST_TIMEOUT,
            BodyError::Broken(_) => StatusCode::BAD_REQUEST,
        };
        Problem::new(code, error.to_string())
    }
}

impl FromRequest<Arc<Gateway>> for Small {
    type Rejection = Problem;

    async fn from_request(request: Request, gateway: &Arc<Gateway>) -> Result<Small, Problem> {
        let limits = &gateway.shared.limits;
        let most = limits.http_body as u64;
        Ok(Small(Bounded::new(request.into_body(), most, limits).whole().await?))
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    /// A body that comes as it is sent.
    struct Dripping(mpsc::Receiver<&'static [u8]>);

    impl http_body::Body for Dripping {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            self.0.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(Bytes::from_static(bytes)))))
        }
    }

    #[tokio::test]
    async fn a_body_is_taken_up_to_its_limit() {
        let take = |most| Bounded::new(Body::from("12345"), most, &Limits::default()).whole();
        assert_eq!(take(5).await, Ok(Bytes::from("12345")));
        assert_eq!(take(4).await, Err(BodyError::TooLarge(4)));
        let (sender, come) = mpsc::channel(2);
        sender.send(&b"123"[..]).await.unwrap();
        sender.send(&b"45"[..]).await.unwrap();
        drop(sender);
        let unannounced = Bounded::new(Body::new(Dripping(come)), 4, &Limits::default());
        assert_eq!(unannounced.whole().await, Err(BodyError::TooLarge(4)));
    }

    #[tokio::test]
    async fn a_body_is_waited_for_as_long_as_the_slowest_upload_may_take() {
        let impatient = Limits { read_stall: Duration::ZERO, slowest_upload: 4, ..Limits::default() };
        let (sender, come) = mpsc::channel(1);
        let mut body = Bounded::new(Body::new(Dripping(come)), 1000, &impatient);
        let since = body.since;
        sender.send(&[0; 400][..]).await.unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 400);
        assert_eq!(body.overdue.deadline(), since + Duration::from_secs(100));
        let (_sender, come) = mpsc::channel(1);
        let nothing = Bounded::new(Body::new(Dripping(come)), 1000, &impatient);
        assert_eq!(nothing.whole().await, Err(BodyError::TooSlow));
    }
}
