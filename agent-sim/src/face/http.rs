//! HTTP/1.1, one request to a connection, with whom it may be: who comes from another site, or by a name that is not this
//! machine's, is sent away, and so is who has no token where one is demanded.

use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr, TcpListener as Listener},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use mpypi_client::args::TrustArgs;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Sleep, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{appstore, desk::Bell, projectmm};
use crate::limits;

/// Connections at once; more wait to be accepted.
const CONNECTIONS: usize = 64;
/// For a request's head to arrive, and for the body of an order.
const HEAD: Duration = Duration::from_secs(10);
/// Largest head, in bytes.
const HEAD_SIZE: usize = 16 * 1024;
/// Who is refused while it still sends is listened to for so long, and for so many bytes, so that it hears why.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_SIZE: usize = 16 * 1024 * 1024;
/// After an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the faces are, and for whom.
#[derive(Debug, Clone, Default)]
pub struct HttpOptions {
    /// Where to listen.
    pub addresses: Vec<SocketAddr>,
    /// What everybody has to show, as `Authorization: Bearer …`.
    pub token: Option<String>,
    /// Whether other machines may do all of it without a token.
    pub unsafe_open: bool,
    /// Sites whose pages may speak to the device, as `https://hub.local`; `*` is any.
    pub origins: Vec<String>,
    /// Names of this machine, beside its own and its addresses.
    pub hosts: Vec<String>,
    /// The folder whose files may be installed.
    pub local_files: Option<PathBuf>,
    /// Whom to trust where firmware is fetched from.
    pub trust: TrustArgs,
}

/// The faces cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum FaceError {
    /// Everybody could replace what is on the device.
    #[error("whoever reaches {address} could replace what is on this device")]
    Open {
        /// Where it would listen.
        address: SocketAddr,
    },
    /// The address is taken, or not this machine's.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The folder of local files cannot be used.
    #[error("cannot use the folder `{}`", path.display())]
    LocalFiles {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl FaceError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            FaceError::Open { .. } => {
                Some("give a token with `--http-token`, listen on 127.0.0.1, or say `--unsafe-open`")
            }
            FaceError::Bind { .. } => {
                Some("use another port with `--http 127.0.0.1:PORT`; 0 is any that is free")
            }
            FaceError::LocalFiles { .. } => None,
        }
    }
}

/// The faces of a device, listening.
#[derive(Debug)]
pub struct Faces {
    listeners: Vec<Listener>,
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
}

/// What all requests share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) bell: Bell,
    pub(super) options: HttpOptions,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
    /// Places for WebSocket clients.
    pub(super) watchers: Arc<Semaphore>,
}

impl Faces {
    /// Listens; nothing is answered before [`serve`](Faces::serve).
    ///
    /// # Errors
    /// See [`FaceError`].
    pub fn bind(mut options: HttpOptions, bell: Bell) -> Result<Faces, FaceError> {
        let guarded = options.token.is_some() || options.unsafe_open;
        if let Some(address) =
            options.addresses.iter().find(|address| !address.ip().is_loopback() && !guarded)
        {
            return Err(FaceError::Open { address: *address });
        }
        if let Some(path) = &mut options.local_files {
            let whole = path.canonicalize();
            *path = whole.map_err(|source| FaceError::LocalFiles { path: path.clone(), source })?;
        }
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        for address in &options.addresses {
            let bind = || {
                let listener = Listener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok((listener.local_addr()?, listener))
            };
            let (bound, listener) = bind().map_err(|source| FaceError::Bind { address: *address, source })?;
            addresses.push(bound);
            listeners.push(listener);
        }
        let shared = Shared {
            bell,
            options,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            watchers: Arc::new(Semaphore::new(projectmm::WATCHERS)),
        };
        Ok(Faces { listeners, addresses, shared: Arc::new(shared) })
    }

    /// Where they listen.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Serves until `stop` is cancelled; returns when all connections are closed.
    ///
    /// # Errors
    /// A listener cannot be used.
    pub async fn serve(self, stop: CancellationToken) -> io::Result<()> {
        let Faces { listeners, shared, .. } = self;
        let router = Router::new()
            .merge(appstore::router())
            .merge(projectmm::router())
            .fallback(|| async { error(StatusCode::NOT_FOUND, "not found") })
            .method_not_allowed_fallback(|| async {
                error(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
            })
            .with_state(shared.clone())
            .layer(middleware::from_fn_with_state(shared.clone(), guard));
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        for listener in listeners {
            let listener = TcpListener::from_std(listener)?;
            shared.tasks.spawn(accept(listener, router.clone(), places.clone(), shared.clone()));
        }
        stop.cancelled().await;
        shared.stop.cancel();
        shared.tasks.close();
        shared.tasks.wait().await;
        Ok(())
    }
}

async fn accept(listener: TcpListener, router: Router, places: Arc<Semaphore>, shared: Arc<Shared>) {
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = shared.stop.cancelled() => return,
        };
        let Ok((socket, _)) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (router, stop) = (router.clone(), shared.stop.clone());
        shared.tasks.spawn(async move {
            tokio::select! {
                () = converse(socket, router) => {}
                () = stop.cancelled() => {}
            }
            drop(place);
        });
    }
}

/// One connection: its head is looked at first, as a length that is none is to be answered in words.
async fn converse(mut socket: TcpStream, router: Router) {
    let head = timeout(HEAD, read_head(&mut socket)).await;
    let Ok(Ok(head)) = head else { return };
    let mut stream = Early { head: head.clone(), socket, linger: None };
    if !has_good_length(&head) {
        let body = r#"{"error":"invalid content-length"}"#;
        let answer = format!(
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             access-control-allow-origin: *\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        // Who does not listen any more needs no answer.
        let _ = stream.write_all(answer.as_bytes()).await;
        let _ = stream.shutdown().await;
        return;
    }
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    let _ = connection.await;
}

/// Reads up to the end of the head, or as much as a head may have.
async fn read_head(socket: &mut TcpStream) -> io::Result<Bytes> {
    let mut head = BytesMut::new();
    let mut looked: usize = 0;
    while head.len() < HEAD_SIZE {
        if socket.read_buf(&mut head).await? == 0 {
            break;
        }
        let from = looked.saturating_sub(3);
        if head[from..].windows(4).any(|end| end == b"\r\n\r\n") {
            break;
        }
        looked = head.len();
    }
    Ok(head.freeze())
}

/// Whether every Content-Length is a number of bytes that a device can take. What else a head may be, hyper says.
fn has_good_length(head: &[u8]) -> bool {
    let end = head.windows(4).position(|end| end == b"\r\n\r\n").unwrap_or(head.len());
    let mut found = None;
    for line in head[..end].split(|byte| *byte == b'\n').skip(1) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        if line[..colon].eq_ignore_ascii_case(b"content-length") {
            let value = std::str::from_utf8(&line[colon + 1..]).unwrap_or_default().trim();
            let number =
                value.parse::<u64>().ok().filter(|_| value.bytes().all(|byte| byte.is_ascii_digit()));
            match number {
                Some(length) if length <= limits::CONTENT && found.is_none_or(|other| other == length) => {
                    found = Some(length);
                }
                _ => return false,
            }
        }
    }
    true
}

/// Lets those in who may speak to the device.
async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let mut response = match may(&shared.options, request.headers(), request.method()) {
        Ok(true) => StatusCode::NO_CONTENT.into_response(),
        Ok(false) => next.run(request).await,
        Err((code, problem)) => error(code, problem),
    };
    let is_upgrade = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    if !is_upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if response.status() == StatusCode::NO_CONTENT {
        let headers = response.headers_mut();
        let methods = HeaderValue::from_static("GET, POST, PUT, DELETE, OPTIONS");
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
        let allowed = HeaderValue::from_static("Content-Type, Authorization");
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    }
    if response.status() == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Whether it is only asked what may be asked, and that anybody may.
fn may(
    options: &HttpOptions,
    headers: &HeaderMap,
    method: &Method,
) -> Result<bool, (StatusCode, &'static str)> {
    if method == Method::OPTIONS {
        return Ok(true);
    }
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or("?"));
    let host = text(header::HOST);
    // A page of another site whose name was made to lead here says that name.
    if !host.is_none_or(|host| is_ours(host, options)) {
        return Err((StatusCode::FORBIDDEN, "host not allowed"));
    }
    let origin = text(header::ORIGIN);
    let allowed =
        |origin: &str| options.origins.iter().any(|other| other == "*" || other.eq_ignore_ascii_case(origin));
    let same = |origin: &str| {
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        authority.is_some() && authority == host
    };
    let stranger = match origin {
        Some(origin) => !allowed(origin) && !same(origin),
        // Images and forms say no origin, but a browser says that they come from elsewhere.
        None => headers
            .get("sec-fetch-site")
            .is_some_and(|site| !["same-origin", "none"].map(str::as_bytes).contains(&site.as_bytes())),
    };
    if stranger {
        return Err((StatusCode::FORBIDDEN, "origin not allowed"));
    }
    if let Some(token) = &options.token {
        let shown = text(header::AUTHORIZATION).and_then(|shown| shown.strip_prefix("Bearer "));
        if !shown.is_some_and(|shown| equal(shown.as_bytes(), token.as_bytes())) {
            return Err((StatusCode::UNAUTHORIZED, "token required"));
        }
    }
    Ok(false)
}

/// Whether a Host header names this machine: by an address, or by a name of its own.
fn is_ours(host: &str, options: &HttpOptions) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let machine = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let is = |other: &str| name.eq_ignore_ascii_case(other);
    name.parse::<IpAddr>().is_ok()
        || is("localhost")
        || is(&machine)
        || is(&format!("{machine}.local"))
        || options.hosts.iter().any(|other| is(other))
}

/// Compares without telling by its time how much is right.
fn equal(one: &[u8], other: &[u8]) -> bool {
    let [one, other] = [one, other].map(mpypi_protocol::Digest::of);
    one.as_bytes().iter().zip(other.as_bytes()).fold(0, |sum, (one, other)| sum | (one ^ other)) == 0
}

/// An answer that says what is wrong.
pub(super) fn error(code: StatusCode, problem: impl Into<String>) -> Response {
    (code, Json(serde_json::json!({ "error": problem.into() }))).into_response()
}

/// The device does not answer.
pub(super) fn off() -> Response {
    error(StatusCode::SERVICE_UNAVAILABLE, "the device is off")
}

/// The body of an order, of at most `most` bytes.
pub(super) async fn body(request: Request, most: usize) -> Result<Bytes, Response> {
    let mut stream = request.into_body().into_data_stream();
    let read = async {
        let mut bytes = BytesMut::new();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|_| error(StatusCode::BAD_REQUEST, "incomplete request body"))?;
            if bytes.len() + piece.len() > most {
                return Err(error(StatusCode::PAYLOAD_TOO_LARGE, "request body too large"));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    };
    match timeout(HEAD, read).await {
        Ok(read) => read,
        Err(_) => Err(error(StatusCode::BAD_REQUEST, "incomplete request body")),
    }
}

/// A connection whose first bytes were read already. When it is shut down it still listens for a while: an answer would
/// be lost if the other side's bytes met a closed socket.
struct Early {
    head: Bytes,
    socket: TcpStream,
    linger: Option<(Pin<Box<Sleep>>, usize)>,
}

impl AsyncRead for Early {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.head.is_empty() {
            return Pin::new(&mut self.socket).poll_read(context, buffer);
        }
        let length = self.head.len().min(buffer.remaining());
        buffer.put_slice(&self.head[..length]);
        self.head.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Early {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Early { socket, linger, .. } = &mut *self;
        let (until, read) = match linger {
            Some(linger) => linger,
            None => {
                std::task::ready!(Pin::new(&mut *socket).poll_shutdown(context))?;
                linger.insert((Box::pin(sleep(LINGER)), 0))
            }
        };
        let mut scratch = [0; 4096];
        loop {
            let mut buffer = ReadBuf::new(&mut scratch);
            if until.as_mut().poll(context).is_ready() || *read > LINGER_SIZE {
                return Poll::Ready(Ok(()));
            }
            match std::task::ready!(Pin::new(&mut *socket).poll_read(context, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => *read += buffer.filled().len(),
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> HttpOptions {
        HttpOptions {
            origins: vec!["https://hub.local".into()],
            hosts: vec!["robot.lan".into()],
            ..HttpOptions::default()
        }
    }

    fn asked(options: &HttpOptions, headers: &[(&'static str, &str)]) -> Result<bool, u16> {
        let headers = headers.iter().map(|(name, value)| {
            (header::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        });
        may(options, &headers.collect(), &Method::POST).map_err(|(code, _)| code.as_u16())
    }

    #[test]
    fn a_page_of_another_site_is_sent_away_and_so_is_a_name_that_only_leads_here() {
        for (headers, may) in [
            (&[("host", "127.0.0.1:8090")][..], true),
            (&[("host", "[::1]:80")], true),
            (&[("host", "localhost:8090"), ("origin", "http://localhost:8090")], true),
            (&[("host", "robot.lan"), ("origin", "https://hub.local")], true),
            (&[], true),
            (&[("host", "evil.example:8090")], false),
            (&[("host", "evil.example"), ("origin", "http://evil.example")], false),
            (&[("host", "127.0.0.1.evil.example")], false),
            (&[("host", "localhost:8090"), ("origin", "http://localhost:9000")], false),
            (&[("host", "localhost:8090"), ("origin", "null")], false),
            (&[("host", "localhost:8090"), ("origin", "https://hub.local.evil.example")], false),
            (&[("host", "localhost:8090"), ("sec-fetch-site", "cross-site")], false),
            (&[("host", "localhost:8090"), ("sec-fetch-site", "same-origin")], true),
        ] {
            assert_eq!(asked(&options(), headers).is_ok(), may, "{headers:?}");
        }
    }

    #[test]
    fn where_a_token_is_demanded_nothing_goes_without_it() {
        let options = HttpOptions { token: Some("secret".into()), ..options() };
        assert_eq!(asked(&options, &[]), Err(401));
        assert_eq!(asked(&options, &[("authorization", "Bearer secre")]), Err(401));
        assert_eq!(asked(&options, &[("authorization", "Basic secret")]), Err(401));
        assert_eq!(asked(&options, &[("authorization", "Bearer secret")]), Ok(false));
        assert_eq!(may(&options, &HeaderMap::new(), &Method::OPTIONS), Ok(true));
    }

    #[test]
    fn a_length_that_is_none_is_noticed() {
        let good = |lines: &str| has_good_length(format!("POST / HTTP/1.1\r\n{lines}\r\n").as_bytes());
        assert!(good("Host: x\r\n") && good("Content-Length: 8388608\r\n") && good("content-length:0\r\n"));
        for bad in ["-1", "+1", "", "x", "1 2", "0x10", "8388609", "99999999999999999999999", "1.0"] {
            assert!(!good(&format!("Content-Length: {bad}\r\n")), "{bad}");
        }
        assert!(!good("Content-Length: 1\r\nContent-Length: 2\r\n"));
    }

    #[test]
    fn elsewhere_than_on_this_machine_a_token_or_a_word_is_needed() {
        let (_, bell) = super::super::desk::Desk::new(Default::default());
        let addresses = vec!["0.0.0.0:0".parse().unwrap()];
        let open = HttpOptions { addresses, ..HttpOptions::default() };
        assert!(matches!(Faces::bind(open.clone(), bell.clone()), Err(FaceError::Open { .. })));
        assert!(Faces::bind(HttpOptions { token: Some("x".into()), ..open.clone() }, bell.clone()).is_ok());
        assert!(Faces::bind(HttpOptions { unsafe_open: true, ..open }, bell).is_ok());
    }
}
