//! MQTT over WebSocket (RFC 6455; MQTT 5, section 6): the upgrade of an HTTP request, and the byte stream that the
//! binary messages after it are.
//!
//! Frames pass through as they come, in pieces of whatever size the reader takes: nothing is gathered, so a frame
//! of any length costs no memory. How requests and frame headers are written is tungstenite's knowledge.

use std::{
    io::{self, Cursor, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tungstenite::{
    error::{Error, ProtocolError},
    handshake::{
        machine::TryParse,
        server::{Request, create_response, write_response},
    },
    http::{HeaderMap, Uri},
    protocol::frame::{
        FrameHeader,
        coding::{CloseCode, Control, Data, OpCode},
    },
};

/// Where MQTT is, as MQTT 5 recommends.
pub const PATH: &str = "/mqtt";

/// Largest head of an HTTP request, in bytes.
const HEAD: usize = 8 * 1024;
/// Room made for a request's head at a time, in bytes.
const HEAD_STEP: usize = 1024;
/// The only subprotocol, of MQTT 3.1.1 and 5 alike ([MQTT-6.0.0-3]).
const SUBPROTOCOL: &str = "mqtt";
/// Largest frame sent, in bytes of payload.
const FRAME: usize = 256 * 1024;
/// Slices of payload handed to the socket in one call.
const SLICES: usize = 32;
/// Longest payload of a control frame, in bytes (RFC 6455, 5.5).
const CONTROL: usize = 125;
/// Longest header of a client's frame, in bytes.
const HEADER: usize = 14;

/// Which web pages may connect. Browsers say what page it is that connects; other clients do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// All: each must log in, or everybody may do everything anyway.
    All,
    /// Those of this machine. Without users, every page a browser on it shows would otherwise be let in.
    Local,
}

/// A request that does not become a WebSocket, and its answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The HTTP status with its phrase.
    status: &'static str,
    /// A header that the status demands, with its line end.
    header: &'static str,
    /// What is wrong, for people.
    pub text: String,
}

/// A connection that did not become a WebSocket.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// It failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It was answered with an error.
    #[error("{}: {}", .0.status, .0.text)]
    Rejected(Rejected),
}

/// Takes an HTTP request and answers it; with success, the connection is a WebSocket. After a rejection the answer
/// is written, and the socket is still open.
///
/// # Errors
/// See [`UpgradeError`].
pub async fn upgrade<S>(socket: &mut S, pages: Pages) -> Result<BytesMut, UpgradeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut buffer = BytesMut::new();
    let answer = loop {
        buffer.reserve(HEAD_STEP);
        let before = buffer.len().saturating_sub(3);
        if socket.read_buf(&mut buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let has_end = buffer[before..].windows(4).any(|bytes| bytes == b"\r\n\r\n");
        // What starts like no request need not be waited for.
        if has_end || !is_like_a_request(&buffer) {
            break answer(&mut buffer, pages);
        }
        if buffer.len() > HEAD {
            let text = format!("a request's head is at most {HEAD} bytes");
            break Err(Rejected { status: "431 Request Header Fields Too Large", header: "", text });
        }
    };
    match answer {
        Ok(bytes) => {
            socket.write_all(&bytes).await?;
            socket.flush().await?;
            Ok(buffer)
        }
        Err(rejected) => {
            socket.write_all(&rejected.to_bytes()).await?;
            socket.flush().await?;
            Err(UpgradeError::Rejected(rejected))
        }
    }
}

/// Whether the bytes may still become a request: a method in capital letters, then a space.
fn is_like_a_request(bytes: &[u8]) -> bool {
    let method = bytes.iter().take_while(|byte| byte.is_ascii_uppercase()).count();
    bytes.get(method).is_none_or(|byte| *byte == b' ' && method > 0)
}

/// The answer to the request at the start of `buffer`, which is taken out.
fn answer(buffer: &mut BytesMut, pages: Pages) -> Result<Vec<u8>, Rejected> {
    let bad = |text: &str| Rejected::new("400 Bad Request", text);
    let (size, request) = match Request::try_parse(buffer) {
        Ok(Some(parsed)) => parsed,
        Ok(None) => return Err(bad("this is no HTTP request")),
        Err(Error::Protocol(ProtocolError::WrongHttpMethod)) => {
            return Err(bad("only GET means something here"));
        }
        Err(_) => return Err(bad("this is no HTTP/1.1 request")),
    };
    buffer.advance(size);
    if request.uri().path() != PATH {
        return Err(Rejected::new("404 Not Found", &format!("MQTT over WebSocket is at {PATH}")));
    }
    let mut response = create_response(&request).map_err(|error| match error {
        Error::Protocol(ProtocolError::MissingSecWebSocketVersionHeader) => Rejected {
            header: "Sec-WebSocket-Version: 13\r\n",
            ..Rejected::new("426 Upgrade Required", "only version 13 of WebSocket is spoken here")
        },
        Error::Protocol(
            ProtocolError::MissingConnectionUpgradeHeader | ProtocolError::MissingUpgradeWebSocketHeader,
        ) => Rejected {
            header: "Upgrade: websocket\r\n",
            ..Rejected::new(
                "426 Upgrade Required",
                "this is MQTT over WebSocket: connect with an MQTT client",
            )
        },
        error => bad(&error.to_string()),
    })?;
    if pages == Pages::Local && !comes_from_here(request.headers()) {
        let text = "without users, only web pages of this machine may connect: add a user";
        return Err(Rejected::new("403 Forbidden", text));
    }
    let offered = request.headers().get_all("Sec-WebSocket-Protocol");
    let mut offered =
        offered.iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b',')).peekable();
    if offered.peek().is_some() {
        if !offered.any(|name| name.trim_ascii() == SUBPROTOCOL.as_bytes()) {
            return Err(bad("of all subprotocols, only `mqtt` is spoken here"));
        }
        let chosen = tungstenite::http::HeaderValue::from_static(SUBPROTOCOL);
        response.headers_mut().insert("Sec-WebSocket-Protocol", chosen);
    }
    let mut bytes = Vec::new();
    write_response(&mut bytes, &response).map_err(|error| bad(&error.to_string()))?;
    Ok(bytes)
}

/// Whether no web page asks, or one of this machine.
pub(crate) fn comes_from_here(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get("Origin") else { return true };
    let uri: Option<Uri> = origin.to_str().ok().and_then(|origin| origin.parse().ok());
    let host = uri.as_ref().and_then(Uri::host).unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

impl Rejected {
    fn new(status: &'static str, text: &str) -> Rejected {
        Rejected { status, header: "", text: text.to_owned() }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let Rejected { status, header, text } = self;
        let length = text.len() + 1;
        format!(
            "HTTP/1.1 {status}\r\n{header}Connection: close\r\nContent-Type: text/plain; charset=utf-8\r\n\
             Content-Length: {length}\r\n\r\n{text}\n"
        )
        .into_bytes()
    }
}

/// The byte stream that a WebSocket's binary messages are.
#[derive(Debug)]
pub struct WebSocket<S> {
    socket: S,
    /// What came together with the request.
    early: BytesMut,
    incoming: Incoming,
    outgoing: Outgoing,
}

/// What the client sends, taken apart.
#[derive(Debug, Default)]
struct Incoming {
    /// The bytes of a header that is not whole.
    header: [u8; HEADER],
    header_len: usize,
    frame: Option<Frame>,
    /// A message whose last frame has not come.
    is_in_message: bool,
    /// The payload of a control frame that is not whole.
    control: Vec<u8>,
    /// The payload of a ping that is not answered; RFC 6455, 5.5.3: only the latest need be.
    ping: Option<Vec<u8>>,
    /// The client has closed.
    ended: bool,
}

#[derive(Debug)]
struct Frame {
    opcode: OpCode,
    /// The mask, turned so that it starts with the next byte.
    mask: [u8; 4],
    left: u64,
}

#[derive(Debug, Default)]
struct Outgoing {
    /// Control frames and the header of a frame, to be sent before anything else.
    staged: BytesMut,
    /// Payload that the header promised and that has not been sent.
    promised: u64,
    /// A frame that says goodbye, once no promise is open.
    close: Option<CloseCode>,
    closed: bool,
}

/// A client does not keep to the protocol; and how it is told.
#[derive(Debug, PartialEq, Eq)]
struct Violation(CloseCode, &'static str);

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocket<S> {
    /// A socket on which the request was answered. `early` is what came behind it.
    pub fn new(socket: S, early: BytesMut) -> WebSocket<S> {
        WebSocket { socket, early, incoming: Incoming::default(), outgoing: Outgoing::default() }
    }

    /// Sends what is owed beside payload, as far as the socket takes it.
    fn poll_staged(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            self.stage_control();
            let staged = &mut self.outgoing.staged;
            if staged.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let written = ready!(Pin::new(&mut self.socket).poll_write(cx, staged))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            staged.advance(written);
        }
    }

    /// Between two frames there is room for control frames.
    fn stage_control(&mut self) {
        let Outgoing { staged, promised, close, closed } = &mut self.outgoing;
        if *promised > 0 || *closed {
            return;
        }
        // A pong that was not taken must not be followed by more and more of them.
        if staged.is_empty()
            && let Some(payload) = self.incoming.ping.take()
        {
            stage(staged, OpCode::Control(Control::Pong), payload.len());
            staged.extend_from_slice(&payload);
        }
        if let Some(code) = close.take() {
            stage(staged, OpCode::Control(Control::Close), 2);
            staged.extend_from_slice(&u16::from(code).to_be_bytes());
            *closed = true;
        }
    }

    fn owes(&self) -> bool {
        !self.outgoing.staged.is_empty() || self.incoming.ping.is_some() || self.outgoing.close.is_some()
    }
}

/// Adds a frame's header.
fn stage(staged: &mut BytesMut, opcode: OpCode, length: usize) {
    let header = FrameHeader { opcode, ..FrameHeader::default() };
    let mut bytes = [0; HEADER];
    let mut rest = &mut bytes[..];
    header.format(length as u64, &mut rest).expect("a header fits into what the longest takes");
    let size = HEADER - rest.len();
    staged.extend_from_slice(&bytes[..size]);
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.incoming.ended || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            // What keeps this from being sent shows when something else is.
            if this.owes() {
                let _ =
                    this.poll_staged(cx)?.is_ready() && Pin::new(&mut this.socket).poll_flush(cx)?.is_ready();
            }
            let start = buf.filled().len();
            if this.early.is_empty() {
                ready!(Pin::new(&mut this.socket).poll_read(cx, buf))?;
            } else {
                let count = this.early.len().min(buf.remaining());
                buf.put_slice(&this.early.split_to(count));
                if this.early.is_empty() {
                    this.early = BytesMut::new();
                }
            }
            let raw = &mut buf.filled_mut()[start..];
            if raw.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let taken = this.incoming.take(raw);
            buf.set_filled(start + *taken.as_ref().unwrap_or(&0));
            if this.incoming.ended {
                this.outgoing.close.get_or_insert(CloseCode::Normal);
            }
            if let Err(Violation(code, _)) = taken {
                this.outgoing.close = Some(code);
            }
            if this.owes() {
                let _ =
                    this.poll_staged(cx)?.is_ready() && Pin::new(&mut this.socket).poll_flush(cx)?.is_ready();
            }
            match taken {
                Ok(0) => {}
                Ok(_) => return Poll::Ready(Ok(())),
                Err(Violation(_, text)) => {
                    this.incoming.ended = true;
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
                }
            }
        }
    }
}

impl Incoming {
    /// Takes bytes as they came, and leaves the payload of messages at their start; says how much it is.
    fn take(&mut self, raw: &mut [u8]) -> Result<usize, Violation> {
        let (mut from, mut to) = (0, 0);
        while from < raw.len() && !self.ended {
            let Some(frame) = &mut self.frame else {
                self.header[self.header_len] = raw[from];
                self.header_len += 1;
                from += 1;
                self.start()?;
                continue;
            };
            let rest = raw.len() - from;
            let count = usize::try_from(frame.left).unwrap_or(rest).min(rest);
            let bytes = &mut raw[from..from + count];
            for chunk in bytes.chunks_mut(4) {
                chunk.iter_mut().zip(frame.mask).for_each(|(byte, mask)| *byte ^= mask);
            }
            frame.mask.rotate_left(count % 4);
            frame.left -= count as u64;
            match frame.opcode {
                OpCode::Data(_) => {
                    raw.copy_within(from..from + count, to);
                    to += count;
                }
                OpCode::Control(_) => self.control.extend_from_slice(bytes),
            }
            from += count;
            self.finish();
        }
        Ok(to)
    }

    /// Starts a frame if its header is whole.
    fn start(&mut self) -> Result<(), Violation> {
        let violates = |text| Err(Violation(CloseCode::Protocol, text));
        let mut cursor = Cursor::new(&self.header[..self.header_len]);
        let Ok(parsed) = FrameHeader::parse(&mut cursor) else { return violates("a frame of no known kind") };
        let Some((header, left)) = parsed else { return Ok(()) };
        self.header_len = 0;
        if header.rsv1 || header.rsv2 || header.rsv3 {
            return violates("an extension was used that was not agreed on");
        }
        // RFC 6455, 5.1
        let Some(mask) = header.mask else { return violates("a client's frame must be masked") };
        match header.opcode {
            OpCode::Data(Data::Text) => {
                return Err(Violation(CloseCode::Unsupported, "MQTT is not text")); // [MQTT-6.0.0-1]
            }
            OpCode::Data(Data::Continue) if !self.is_in_message => {
                return violates("a message goes on that did not start");
            }
            OpCode::Data(Data::Continue) => self.is_in_message = !header.is_final,
            OpCode::Data(_) if self.is_in_message => return violates("a message starts within another"),
            OpCode::Data(_) => self.is_in_message = !header.is_final,
            OpCode::Control(_) if !header.is_final || left > CONTROL as u64 => {
                return violates("a control frame is short and whole");
            }
            OpCode::Control(_) => {}
        }
        // RFC 6455, 5.2: the highest bit is not used.
        if left > i64::MAX as u64 {
            return violates("a frame longer than there are");
        }
        self.frame = Some(Frame { opcode: header.opcode, mask, left });
        self.finish();
        Ok(())
    }

    /// Ends the frame if all of it has come.
    fn finish(&mut self) {
        let Some(Frame { opcode, left: 0, .. }) = self.frame else { return };
        self.frame = None;
        let payload = std::mem::take(&mut self.control);
        match opcode {
            OpCode::Control(Control::Ping) => self.ping = Some(payload),
            OpCode::Control(Control::Close) => self.ended = true,
            _ => {}
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let offered: usize = bufs.iter().take(SLICES).map(|buf| buf.len()).sum();
        if offered == 0 {
            return Poll::Ready(Ok(0));
        }
        loop {
            this.stage_control();
            let out = &mut this.outgoing;
            if out.closed {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if out.promised == 0 {
                let length = offered.min(FRAME);
                stage(&mut out.staged, OpCode::Data(Data::Binary), length);
                out.promised = length as u64;
            }
            let mut slices = [IoSlice::new(&[]); SLICES + 1];
            slices[0] = IoSlice::new(&out.staged);
            let mut room = usize::try_from(out.promised).unwrap_or(usize::MAX);
            for (slice, buf) in slices[1..].iter_mut().zip(bufs) {
                let count = room.min(buf.len());
                *slice = IoSlice::new(&buf[..count]);
                room -= count;
            }
            let used = 1 + bufs.len().min(SLICES);
            let written = ready!(Pin::new(&mut this.socket).poll_write_vectored(cx, &slices[..used]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let before = written.min(out.staged.len());
            out.staged.advance(before);
            if out.staged.is_empty() {
                out.staged = BytesMut::new(); // most connections are idle
            }
            let payload = written - before;
            out.promised -= payload as u64;
            if payload > 0 {
                return Poll::Ready(Ok(payload));
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_staged(cx))?;
        Pin::new(&mut this.socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.outgoing.closed {
            this.outgoing.close.get_or_insert(CloseCode::Normal);
        }
        ready!(this.poll_staged(cx))?;
        Pin::new(&mut this.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
