//! Where HTTP comes in. A connection stays for further requests, and has so much time for each step: TLS, the head
//! of a request, and taking of an answer what waits for it.

use std::{
    convert::Infallible,
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::{Pin, pin},
    str::FromStr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body, extract::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::{Sleep, sleep, timeout},
};
use tokio_util::task::TaskTracker;
use tower_service::Service;

use super::{Gateway, Site, caller::Peer, count::count};
use crate::{
    connection::{FAREWELL_AT_STOP, Shared},
    listen::{ACCEPT_PAUSE, limit_unsent, tls::Tls},
};

/// Largest head of a request, and most bytes of an answer that wait for the socket beside those of the piece that
/// goes out, both in bytes.
const BUFFER: usize = 64 * 1024;

/// Where HTTP is listened for: `http://127.0.0.1:8080`, or `https://`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct HttpEndpoint {
    /// Whether over TLS.
    pub is_tls: bool,
    /// The address; port 0 picks a free one.
    pub address: SocketAddr,
}

/// A text is no [`HttpEndpoint`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is nowhere to listen for HTTP: use an address as `127.0.0.1:8080`, or `https://0.0.0.0:8443`")]
pub struct HttpEndpointError(String);

/// Where to listen, and what to show there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Where.
    pub endpoint: HttpEndpoint,
    /// What.
    pub site: Site,
}

/// A bound listener.
#[derive(Debug)]
pub struct HttpListener {
    listener: TcpListener,
    place: Place,
    tls: Option<Arc<Tls>>,
}

impl FromStr for HttpEndpoint {
    type Err = HttpEndpointError;

    fn from_str(text: &str) -> Result<HttpEndpoint, HttpEndpointError> {
        let wrong = || HttpEndpointError(text.to_owned());
        let (is_tls, rest) = match text.split_once("://") {
            None => (false, text),
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            Some(_) => return Err(wrong()),
        };
        let place = rest.strip_suffix('/').unwrap_or(rest);
        if let Ok(address) = place.parse() {
            return Ok(HttpEndpoint { is_tls, address });
        }
        let has_scheme = rest.len() != text.len();
        let (host, port) = match place.rsplit_once(':') {
            Some(("localhost", port)) => ("localhost", port.parse().map_err(|_| wrong())?),
            _ if has_scheme => (place, if is_tls { 443 } else { 80 }),
            _ => return Err(wrong()),
        };
        let ip = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host) {
            "localhost" => IpAddr::from(Ipv4Addr::LOCALHOST),
            host => host.parse().map_err(|_| wrong())?,
        };
        Ok(HttpEndpoint { is_tls, address: SocketAddr::new(ip, port) })
    }
}

impl TryFrom<String> for HttpEndpoint {
    type Error = HttpEndpointError;

    fn try_from(text: String) -> Result<HttpEndpoint, HttpEndpointError> {
        text.parse()
    }
}

impl fmt::Display for HttpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.is_tls { "https" } else { "http" }, self.address)
    }
}

impl HttpListener {
    /// Binds an address. `tls` must be there where the endpoint needs it.
    ///
    /// # Errors
    /// The address cannot be had.
    pub async fn bind(place: Place, tls: Option<Arc<Tls>>) -> io::Result<HttpListener> {
        let listener = TcpListener::bind(place.endpoint.address).await?;
        let endpoint = HttpEndpoint { address: listener.local_addr()?, ..place.endpoint };
        let tls = tls.filter(|_| endpoint.is_tls);
        Ok(HttpListener { listener, place: Place { endpoint, ..place }, tls })
    }

    /// Where it listens, with the port that was found, and what it shows.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Accepts connections until the broker stops, and serves each in a task of its own.
    pub(crate) async fn accept(self, gateway: Arc<Gateway>, tasks: TaskTracker) {
        let HttpListener { listener, place, tls } = self;
        let router = place.site.router(&gateway);
        let shared = &gateway.shared;
        loop {
            let accepted = async {
                let place = shared.http.clone().acquire_owned().await;
                (listener.accept().await, place)
            };
            let (accepted, place) = tokio::select! {
                accepted = accepted => accepted,
                () = shared.shutdown.cancelled() => return,
            };
            let (socket, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an HTTP connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if let Err(error) = socket.set_nodelay(true) {
                tracing::debug!(peer = %address, %error, "lost at once");
                continue;
            }
            limit_unsent(&socket);
            let (router, tls, shared) = (router.clone(), tls.clone(), shared.clone());
            tasks.spawn(async move {
                let peer = Peer { address, certificate: None };
                if let Err(error) = connection(socket, peer, tls, router, &shared).await {
                    tracing::debug!(peer = %address, error, "an HTTP connection failed");
                }
                drop(place);
            });
        }
    }
}

async fn connection(
    socket: TcpStream,
    mut peer: Peer,
    tls: Option<Arc<Tls>>,
    router: Router,
    shared: &Shared,
) -> Result<(), String> {
    let Some(tls) = tls else { return serve(socket, peer, router, shared).await };
    let shaken = tokio::select! {
        shaken = timeout(shared.limits.connect, tls.accept(socket)) => shaken,
        () = shared.shutdown.cancelled() => return Ok(()),
    };
    let (stream, certificate) = shaken
        .map_err(|_| "no TLS handshake in time")?
        .map_err(|error| format!("no TLS handshake: {error}"))?;
    peer.certificate = certificate;
    serve(stream, peer, router, shared).await
}

async fn serve<S>(stream: S, peer: Peer, router: Router, shared: &Shared) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let stream = Steady { stream, patience: shared.limits.write_stall, waiting: None };
    let counts = &shared.metrics.http;
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer.clone());
        let answer = router.clone().call(request);
        async move { Ok::<_, Infallible>(count(answer.await.unwrap_or_else(|never| match never {}), counts)) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(shared.limits.http_head)
            .max_buf_size(BUFFER)
            .serve_connection(TokioIo::new(stream), service)
    );
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = shared.shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            timeout(FAREWELL_AT_STOP, connection).await.unwrap_or(Ok(()))
        }
    };
    served.map_err(|error| error.to_string())
}

/// A stream that fails when its other end has taken nothing for too long of what waits for it.
struct Steady<S> {
    stream: S,
    patience: Duration,
    /// Runs while something waits.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<S> Steady<S> {
    /// What became of an attempt to send.
    fn sent<T>(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.waiting = None;
            return outcome;
        }
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(self.patience)));
        match waiting.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Steady<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Steady<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.sent(cx, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.sent(cx, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(cx);
        self.sent(cx, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.sent(cx, outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_http_is_listened_for_is_read_and_shown_as_a_url() {
        let shown = |text: &str| text.parse::<HttpEndpoint>().map(|endpoint| endpoint.to_string());
        for (text, expected) in [
            ("127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("http://[::1]:0/", "http://[::1]:0"),
            ("https://0.0.0.0", "https://0.0.0.0:443"),
            ("http://localhost", "http://127.0.0.1:80"),
            ("localhost:8080", "http://127.0.0.1:8080"),
        ] {
            assert_eq!(shown(text).as_deref(), Ok(expected), "{text}");
        }
        for text in ["", "8080", "ftp://127.0.0.1:1", "http://hub.local", "127.0.0.1", "http://127.0.0.1:1/x"]
        {
            assert_eq!(shown(text), Err(HttpEndpointError(text.to_owned())));
        }
    }

    #[tokio::test]
    async fn who_takes_nothing_of_what_waits_is_given_up() {
        use tokio::io::AsyncWriteExt;
        let (ours, _theirs) = tokio::io::duplex(16);
        let mut steady = Steady { stream: ours, patience: Duration::ZERO, waiting: None };
        steady.write_all(&[0; 16]).await.unwrap();
        let stuck = steady.write_all(&[0; 16]).await.unwrap_err();
        assert_eq!(stuck.kind(), io::ErrorKind::TimedOut);
    }
}
