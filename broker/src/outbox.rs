//! What waits to be sent to one client: bytes, and blobs that are read as they go.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    task::Poll,
};

use bytes::{Buf, Bytes};
use mpypi_protocol::Digest;
use tokio::io::AsyncWrite;

use crate::{
    index::{Index, blobs::CHUNK},
    message::{Part, Payload},
};

/// Slices handed to the socket in one call.
const SLICES: usize = 32;
/// Bytes ready to be sent for which no more are read from a blob.
const ENOUGH: usize = 16 * 1024;
/// Bytes sent before others have their turn.
const TURN: usize = 1024 * 1024;
/// Bytes of memory that a piece takes beside its content: many small answers must not look like nothing.
const PIECE: u64 = 64;

/// Pieces in the order they are sent.
#[derive(Debug, Default)]
pub struct Outbox {
    pieces: VecDeque<Piece>,
    bytes: u64,
    /// The socket holds bytes back, as one that encrypts does.
    unflushed: bool,
}

#[derive(Debug)]
enum Piece {
    Bytes(Bytes),
    /// What of a blob is still to be sent.
    Blob {
        digest: Digest,
        len: u64,
        offset: u64,
        end: u64,
    },
}

impl Outbox {
    /// Whether everything is sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty() && !self.unflushed
    }

    /// How many bytes wait, what it takes to keep them included.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.bytes + self.pieces.len() as u64 * PIECE
    }

    /// Adds bytes.
    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.bytes += bytes.len() as u64;
            self.pieces.push_back(Piece::Bytes(bytes));
        }
    }

    /// Adds a payload.
    pub fn push_payload(&mut self, payload: Payload) {
        let to = payload.len();
        self.push_part(Part { payload, from: 0, to });
    }

    /// Adds some of a payload.
    pub fn push_part(&mut self, part: Part) {
        if part.is_empty() {
            return;
        }
        let Part { payload, from: offset, to: end } = part;
        match payload {
            Payload::Inline(bytes) => {
                let at = |place: u64| usize::try_from(place).unwrap_or(usize::MAX).min(bytes.len());
                self.push(bytes.slice(at(offset)..at(end)));
            }
            Payload::Blob(digest, len) => {
                self.bytes += end - offset;
                self.pieces.push_back(Piece::Blob { digest, len, offset, end });
            }
        }
    }

    /// Sends some of what waits, and says how much was taken. May be dropped at any time without loss.
    ///
    /// # Errors
    /// The socket fails, or a blob cannot be read.
    pub async fn write(
        &mut self,
        socket: &mut (impl AsyncWrite + Unpin),
        index: &Index,
    ) -> io::Result<usize> {
        let mut total = 0;
        poll_fn(|context| {
            // As long as the socket takes it: waking up for each chunk costs more than the chunk.
            while total < TURN && !self.pieces.is_empty() {
                self.load(index)?;
                let mut slices = [IoSlice::new(&[]); SLICES];
                let ready = self.pieces.iter().map_while(|piece| match piece {
                    Piece::Bytes(bytes) => Some(IoSlice::new(bytes)),
                    Piece::Blob { .. } => None,
                });
                let count = slices.iter_mut().zip(ready).map(|(slice, bytes)| *slice = bytes).count();
                match Pin::new(&mut *socket).poll_write_vectored(context, &slices[..count])? {
                    Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(written) => {
                        self.advance(written);
                        total += written;
                    }
                    Poll::Pending if total == 0 => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            if self.pieces.is_empty() {
                let flushed = Pin::new(&mut *socket).poll_flush(context)?;
                self.unflushed = flushed.is_pending();
                if self.unflushed && total == 0 {
                    return Poll::Pending;
                }
            }
            Poll::Ready(Ok(total))
        })
        .await
    }

    /// Puts the next chunk of the first blob in front of it, unless bytes enough wait before it.
    fn load(&mut self, index: &Index) -> io::Result<()> {
        let mut before = 0;
        // A SUBACK, a PUBLISH's head and the first of its payload leave together.
        let first = self.pieces.iter_mut().take(SLICES).enumerate().find_map(|(at, piece)| match piece {
            Piece::Bytes(bytes) => {
                before += bytes.len();
                None
            }
            Piece::Blob { digest, len, offset, end } => Some((at, digest, *len, offset, *end)),
        });
        let Some((at, digest, len, offset, end)) = first.filter(|_| before < ENOUGH) else { return Ok(()) };
        // Always the same chunks of a blob, wherever who reads them begins: they are shared.
        let start = *offset / CHUNK * CHUNK;
        let chunk = index.chunk(digest, len, start).inspect_err(|error| {
            tracing::error!(%digest, %error, "cannot read a payload: is its file gone?");
        })?;
        let within = |place: u64| usize::try_from(place - start).unwrap_or(usize::MAX).min(chunk.len());
        let chunk = chunk.slice(within(*offset)..within(end));
        *offset += chunk.len() as u64;
        if chunk.is_empty() || *offset == end {
            self.pieces.remove(at);
        }
        self.pieces.insert(at, Piece::Bytes(chunk));
        Ok(())
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes = self.bytes.saturating_sub(written as u64);
        while written > 0 {
            let Some(Piece::Bytes(bytes)) = self.pieces.front_mut() else { return };
            let taken = written.min(bytes.len());
            bytes.advance(taken);
            written -= taken;
            if bytes.is_empty() {
                self.pieces.pop_front();
            }
        }
        if self.pieces.is_empty() {
            // Most clients are idle: nothing is held for them.
            self.pieces = VecDeque::new();
        }
    }
}
