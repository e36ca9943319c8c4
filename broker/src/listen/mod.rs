//! Where clients come in: TCP, TLS, and WebSocket over either.
//!
//! Every listener speaks MQTT 3.1.1 and 5. A handshake, whatever kinds it is made of, runs in the task of its own
//! connection and has until [`Arrival::deadline`], CONNECT included: nobody waits for another's.

pub mod tls;
pub mod websocket;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout_at},
};
use tokio_util::task::TaskTracker;

use crate::{
    clock,
    connection::{self, Shared},
    message::SessionId,
    server::Access,
};
use tls::{ClientCertificate, Tls};
use websocket::{Pages, UpgradeError, WebSocket};

/// After a failure to accept, as with too many open files.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a listener speaks below MQTT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// `mqtt://`
    Tcp,
    /// `mqtts://`
    Tls,
    /// `ws://`
    WebSocket,
    /// `wss://`
    WebSocketTls,
}

/// Where to listen, and for what: `mqtt://127.0.0.1:1883`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Endpoint {
    /// What is spoken there.
    pub transport: Transport,
    /// The address; port 0 picks a free one.
    pub address: SocketAddr,
}

/// A text is no [`Endpoint`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// A scheme that means nothing here.
    #[error("`{0}://` is nothing to listen for: use `mqtt://`, `mqtts://`, `ws://` or `wss://`")]
    Scheme(String),
    /// Something else than an address.
    #[error("`{0}` is no address to listen on: use one as `127.0.0.1:1883`, `0.0.0.0:1883` or `[::]:1883`")]
    Address(String),
    /// WebSocket elsewhere.
    #[error("WebSocket is at `{}`, not at `{found}`", websocket::PATH)]
    Path {
        /// What was found.
        found: String,
    },
}

/// A connection that was accepted.
#[derive(Debug)]
pub struct Arrival {
    /// Tells it from all others.
    pub id: SessionId,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// When it must have said CONNECT.
    pub deadline: Instant,
    /// The certificate that it showed.
    pub certificate: Option<Arc<ClientCertificate>>,
}

/// A bound listener.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    endpoint: Endpoint,
    tls: Option<Arc<Tls>>,
}

/// What only connections over TLS or WebSocket are seen as; plain ones pay nothing for it.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Transport {
    /// All of them.
    pub const ALL: [Transport; 4] =
        [Transport::Tcp, Transport::Tls, Transport::WebSocket, Transport::WebSocketTls];

    /// The scheme of its URLs.
    #[must_use]
    pub fn scheme(self) -> &'static str {
        match self {
            Transport::Tcp => "mqtt",
            Transport::Tls => "mqtts",
            Transport::WebSocket => "ws",
            Transport::WebSocketTls => "wss",
        }
    }

    /// The port that a URL need not name.
    #[must_use]
    pub fn port(self) -> u16 {
        match self {
            Transport::Tcp => 1883,
            Transport::Tls => 8883,
            Transport::WebSocket => 80,
            Transport::WebSocketTls => 443,
        }
    }

    /// Whether it needs a certificate.
    #[must_use]
    pub fn is_tls(self) -> bool {
        matches!(self, Transport::Tls | Transport::WebSocketTls)
    }

    fn is_websocket(self) -> bool {
        matches!(self, Transport::WebSocket | Transport::WebSocketTls)
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Endpoint, EndpointError> {
        let (transport, rest) = match text.split_once("://") {
            None => (Transport::Tcp, text),
            Some((scheme, rest)) => {
                let known = Transport::ALL.into_iter().find(|transport| transport.scheme() == scheme);
                (known.ok_or_else(|| EndpointError::Scheme(scheme.to_owned()))?, rest)
            }
        };
        let (place, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        match path {
            "" | "/" => {}
            websocket::PATH if transport.is_websocket() => {}
            _ if transport.is_websocket() => return Err(EndpointError::Path { found: path.to_owned() }),
            _ => return Err(EndpointError::Address(rest.to_owned())),
        }
        let has_scheme = rest.len() != text.len();
        let bad = || EndpointError::Address(place.to_owned());
        if let Ok(address) = place.parse() {
            return Ok(Endpoint { transport, address });
        }
        let (host, port) = match place.rsplit_once(':') {
            Some(("localhost", port)) => ("localhost", port.parse().map_err(|_| bad())?),
            _ if has_scheme => (place, transport.port()),
            _ => return Err(bad()),
        };
        let ip: IpAddr = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
        {
            "localhost" => Ipv4Addr::LOCALHOST.into(),
            host => host.parse().map_err(|_| bad())?,
        };
        Ok(Endpoint { transport, address: SocketAddr::new(ip, port) })
    }
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;

    fn try_from(text: String) -> Result<Endpoint, EndpointError> {
        text.parse()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.transport.is_websocket() { websocket::PATH } else { "" };
        write!(f, "{}://{}{path}", self.transport.scheme(), self.address)
    }
}

impl Listener {
    /// Binds an address. `tls` must be there where the transport needs it.
    ///
    /// # Errors
    /// The address cannot be had.
    pub async fn bind(endpoint: Endpoint, tls: Option<Arc<Tls>>) -> std::io::Result<Listener> {
        let listener = TcpListener::bind(endpoint.address).await?;
        let endpoint = Endpoint { address: listener.local_addr()?, ..endpoint };
        Ok(Listener { listener, endpoint, tls: tls.filter(|_| endpoint.transport.is_tls()) })
    }

    /// What is listened for, with the port that was found.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Accepts connections until the broker stops, and serves each in a task of its own.
    pub(crate) async fn accept(self, shared: Arc<Shared>, tasks: TaskTracker) {
        let Listener { listener, endpoint, tls } = self;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shared.shutdown.cancelled() => return,
            };
            let (socket, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            shared.metrics.connections.one();
            let Ok(place) = shared.sockets.clone().try_acquire_owned() else {
                shared.metrics.turned_away.one();
                tracing::warn!(%peer, "too many connections: closed at once");
                continue;
            };
            // Without it, eight small files take 400 ms.
            if let Err(error) = socket.set_nodelay(true) {
                tracing::debug!(%peer, %error, "lost at once");
                continue;
            }
            limit_unsent(&socket);
            let arrival = Arrival {
                id: shared.registry.next_id(),
                peer,
                deadline: clock::now().instant + shared.limits.connect,
                certificate: None,
            };
            let shared = shared.clone();
            // Two tasks of two sizes.
            if endpoint.transport == Transport::Tcp {
                tasks.spawn(async move {
                    connection::serve(socket, arrival, &shared).await;
                    drop(place);
                });
            } else {
                let tls = tls.clone();
                tasks.spawn(async move {
                    layered(socket, arrival, endpoint.transport, tls, &shared).await;
                    drop(place);
                });
            }
        }
    }
}

/// Has the system take bytes from us only as the client takes them from it, some at a time. Otherwise megabytes
/// wait in the socket of a client that reads little, and until a third of them has gone it looks like one that
/// reads nothing.
pub(crate) fn limit_unsent(socket: &TcpStream) {
    /// Bytes that wait in a socket. Half of them gone is progress: at 10 KB/s, every 7 s.
    #[cfg(target_os = "linux")]
    const UNSENT: u32 = 128 * 1024;
    #[cfg(target_os = "linux")]
    if let Err(error) = socket2::SockRef::from(socket).set_tcp_notsent_lowat(UNSENT) {
        tracing::debug!(%error, "cannot limit what waits in a socket");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = socket;
}

/// Serves a client whose bytes come wrapped.
async fn layered(
    socket: TcpStream,
    mut arrival: Arrival,
    transport: Transport,
    tls: Option<Arc<Tls>>,
    shared: &Shared,
) {
    let (peer, deadline) = (arrival.peer, arrival.deadline.into());
    // On the heap only while it lasts.
    let shake_hands = Box::pin(async {
        let mut stream: Box<dyn Stream> = match tls {
            Some(tls) => match tls.accept(socket).await {
                Ok((stream, certificate)) => {
                    arrival.certificate = certificate;
                    Box::new(stream)
                }
                Err(error) => {
                    tracing::info!(%peer, %error, "no TLS handshake");
                    return None;
                }
            },
            None => Box::new(socket),
        };
        if !transport.is_websocket() {
            return Some(stream);
        }
        let is_guarded = shared.gate.is_guarded() || arrival.certificate.is_some();
        let pages = match shared.access {
            Access::Loopback if !is_guarded => Pages::Local,
            Access::Loopback | Access::UnsafeOpen => Pages::All,
        };
        match websocket::upgrade(&mut stream, pages).await {
            Ok(early) => Some(Box::new(WebSocket::new(stream, early)) as Box<dyn Stream>),
            Err(error) => {
                tracing::info!(%peer, "no WebSocket: {error}");
                if matches!(error, UpgradeError::Rejected(_)) {
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    connection::farewell(&mut reader, &mut writer, connection::FAREWELL).await;
                }
                None
            }
        }
    });
    let stream = tokio::select! {
        shaken = timeout_at(deadline, shake_hands) => match shaken {
            Ok(Some(stream)) => stream,
            Ok(None) => return,
            Err(_) => return tracing::info!(%peer, "no handshake in time"),
        },
        () = shared.shutdown.cancelled() => return,
    };
    connection::serve(stream, arrival, shared).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_listened_for_is_read_and_shown_as_a_url() {
        let shown = |text: &str| text.parse::<Endpoint>().map(|endpoint| endpoint.to_string());
        for (text, expected) in [
            ("127.0.0.1:1883", "mqtt://127.0.0.1:1883"),
            ("[::1]:0", "mqtt://[::1]:0"),
            ("mqtt://0.0.0.0", "mqtt://0.0.0.0:1883"),
            ("mqtts://[::]", "mqtts://[::]:8883"),
            ("mqtts://::", "mqtts://[::]:8883"),
            ("ws://localhost:8080/", "ws://127.0.0.1:8080/mqtt"),
            ("wss://10.0.0.1/mqtt", "wss://10.0.0.1:443/mqtt"),
            ("localhost:1883", "mqtt://127.0.0.1:1883"),
        ] {
            assert_eq!(shown(text), Ok(expected.to_owned()), "{text}");
        }
        assert_eq!(shown("ftp://127.0.0.1"), Err(EndpointError::Scheme("ftp".into())));
        assert_eq!(shown("ws://127.0.0.1/chat"), Err(EndpointError::Path { found: "/chat".into() }));
        for text in ["127.0.0.1", "hub.local:1883", "mqtt://hub.local", "mqtt://127.0.0.1:x", "mqtt://", ""] {
            assert!(matches!(shown(text), Err(EndpointError::Address(_))), "{text}");
        }
    }
}
