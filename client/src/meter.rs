//! What connections carry, counted and held up at their sockets: with TLS, what is encrypted.

use std::{
    io::{self, IoSlice},
    num::NonZeroU64,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};

use crate::limits;

/// Counts what all connections of an endpoint carry.
#[derive(Debug, Default)]
pub struct Meter {
    received: AtomicU64,
    sent: AtomicU64,
}

/// What connections carried, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From the broker.
    pub received: u64,
    /// To it.
    pub sent: u64,
}

impl Meter {
    /// How much it was until now.
    #[must_use]
    pub fn read(&self) -> Traffic {
        Traffic { received: self.received.load(Ordering::Relaxed), sent: self.sent.load(Ordering::Relaxed) }
    }
}

/// A pace in bytes per second: what was not taken is saved up for [`limits::BURST`], and no longer.
#[derive(Debug, Clone, Copy)]
struct Pace {
    rate: NonZeroU64,
    /// When all that was taken is paid for.
    paid: Option<Instant>,
}

impl Pace {
    fn new(rate: NonZeroU64) -> Pace {
        Pace { rate, paid: None }
    }

    /// How many bytes may be taken, one at least; or how long to wait for them.
    fn room(&self, now: Instant) -> Result<usize, Duration> {
        let ahead = self.paid.map_or(Duration::ZERO, |paid| paid.saturating_duration_since(now));
        match ahead < limits::BURST {
            true => {
                let bytes = (limits::BURST - ahead).as_secs_f64() * self.rate.get() as f64;
                Ok((bytes as usize).max(1))
            }
            false => Err(ahead - limits::BURST / 2),
        }
    }

    /// Takes note that bytes were taken.
    fn took(&mut self, now: Instant, bytes: usize) {
        let costs = Duration::from_secs_f64(bytes as f64 / self.rate.get() as f64);
        self.paid = Some(self.paid.map_or(now, |paid| paid.max(now)) + costs);
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the driver's clock")]
fn now() -> Instant {
    Instant::now()
}

fn count(meter: Option<&Meter>, bytes: usize) {
    if let Some(meter) = meter {
        meter.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// A socket, what counts its bytes, and what holds them up.
pub(crate) struct Metered {
    socket: TcpStream,
    meter: Option<Arc<Meter>>,
    pace: Option<Paced>,
}

/// A pace, and the wait until it lets more through.
struct Paced {
    pace: Pace,
    wait: Option<Pin<Box<Sleep>>>,
}

impl Metered {
    pub(crate) fn new(socket: TcpStream, meter: Option<Arc<Meter>>, rate: Option<NonZeroU64>) -> Metered {
        let pace = rate.map(|rate| Paced { pace: Pace::new(rate), wait: None });
        Metered { socket, meter, pace }
    }

    fn sent(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let (Some(meter), Poll::Ready(Ok(count))) = (&self.meter, &written) {
            meter.sent.fetch_add(*count as u64, Ordering::Relaxed);
        }
        written
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Metered { socket, meter, pace } = &mut *self;
        let Some(Paced { pace, wait }) = pace else {
            let before = buffer.filled().len();
            let read = Pin::new(socket).poll_read(context, buffer);
            count(meter.as_deref(), buffer.filled().len() - before);
            return read;
        };
        loop {
            if let Some(waiting) = wait {
                ready!(waiting.as_mut().poll(context));
                *wait = None;
            }
            let now = now();
            match pace.room(now) {
                Ok(room) => {
                    // What is left in the socket holds the broker up: that is the point.
                    let room = room.min(buffer.remaining());
                    let mut part = ReadBuf::new(buffer.initialize_unfilled_to(room));
                    let read = Pin::new(socket).poll_read(context, &mut part);
                    let bytes = part.filled().len();
                    buffer.advance(bytes);
                    pace.took(now, bytes);
                    count(meter.as_deref(), bytes);
                    return read;
                }
                Err(pause) => *wait = Some(Box::pin(sleep(pause))),
            }
        }
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(context, bytes);
        self.sent(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(context, slices);
        self.sent(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_lets_through_what_it_says_over_time_and_no_more_than_a_burst_at_once() {
        let start = now();
        let mut pace = Pace::new(NonZeroU64::new(10_000).unwrap());
        let (mut at, mut taken) = (start, 0);
        while at < start + Duration::from_secs(60) {
            match pace.room(at) {
                Ok(room) => {
                    assert!((1..=10_000).contains(&room), "{room}");
                    pace.took(at, room);
                    taken += room;
                }
                Err(pause) => at += pause.max(Duration::from_millis(1)),
            }
        }
        let burst = (limits::BURST.as_secs_f64() * 10_000.0) as usize;
        assert!((590_000..=600_000 + 2 * burst).contains(&taken), "{taken}");
    }
}
