//! One MQTT connection: requests in, events out, bytes and a clock between.

use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf},
    time::{Instant, Sleep, sleep, timeout},
};

use crate::{
    endpoint::{ConnectError, Endpoint, Moment, Stream, tls_error},
    limits,
    version::Version,
};

/// A connection to a broker. Dropping it closes it without a word.
pub struct Line<V: Version> {
    version: V,
    reader: ReadHalf<Stream>,
    writer: WriteHalf<Stream>,
    input: BytesMut,
    /// How much the first packet of `input` lacks, at least.
    missing: usize,
    output: BytesMut,
    /// Whether something may not have reached the socket: bytes of `output`, or of what is below it.
    unsent: bool,
    requests: VecDeque<V::Request>,
    keep_alive: Option<(Duration, Pin<Box<Sleep>>)>,
    /// How it ended; told after the last event.
    end: Option<LineError<V::Error>>,
}

/// Why there is no connection, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum LineError<E> {
    /// There was none.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The broker closed it.
    #[error("the broker closed it")]
    Closed,
    /// It broke.
    #[error("{0}")]
    Io(io::Error),
    /// The broker takes nothing any more.
    #[error("it took nothing for {} s", limits::STALL.as_secs())]
    Stalled,
    /// The broker breaks the rules, or says why this is the end.
    #[error(transparent)]
    Mqtt(E),
}

impl<V: Version> Line<V> {
    /// Connects and says `hello`, a CONNECT packet; returns the connection and the broker's first packet, all of it
    /// within [`limits::CONNECT`]. Whether it is a welcome, and an [`accept`](Line::accept), is up to the caller.
    ///
    /// # Errors
    /// [`LineError::Connect`], or [`LineError::Mqtt`] if what the broker says is no packet.
    pub async fn open(
        endpoint: &Endpoint,
        version: V,
        hello: V::Packet,
    ) -> Result<(Line<V>, V::Packet), LineError<V::Error>> {
        match timeout(limits::CONNECT, Line::greet(endpoint, version, hello)).await {
            Ok(greeted) => greeted,
            Err(_) => Err(ConnectError::Silent.into()),
        }
    }

    async fn greet(
        endpoint: &Endpoint,
        version: V,
        hello: V::Packet,
    ) -> Result<(Line<V>, V::Packet), LineError<V::Error>> {
        let (reader, writer) = tokio::io::split(endpoint.stream().await?);
        let mut line = Line {
            version,
            reader,
            writer,
            input: BytesMut::new(),
            missing: 1,
            output: BytesMut::new(),
            unsent: true,
            requests: VecDeque::new(),
            keep_alive: None,
            end: None,
        };
        line.version.write(&hello, &mut line.output).map_err(LineError::Mqtt)?;
        // In TLS 1.3 a broker that does not want our certificate says so only now, and hangs up. If this fails,
        // reading tells why.
        let _ = flush::<V::Error>(&mut line.writer, &mut line.output).await;
        line.unsent = false;
        loop {
            let moment = match endpoint.is_plain() {
                true => Moment::Plain,
                false => Moment::Secured,
            };
            match read(&mut line.reader, &mut line.input, line.missing).await {
                Ok(0) => return Err(ConnectError::HungUp(moment).into()),
                Ok(_) => {}
                Err(error) => return Err(endpoint.failure(error, moment).into()),
            }
            // RFC 8446, 5.1: a record of type alert, which is no first packet of a broker's.
            if line.input.first() == Some(&TLS_ALERT) && endpoint.is_plain() {
                return Err(ConnectError::SpeaksTls.into());
            }
            match line.version.read(&mut line.input).map_err(LineError::Mqtt)? {
                Ok(packet) => return Ok((line, packet)),
                Err(missing) => line.missing = missing,
            }
        }
    }

    /// Takes the broker's welcome as the first event. From now on it is asked for a sign of life after
    /// `keep_alive` without one, if that is not zero.
    pub fn accept(&mut self, welcome: Option<V::Packet>, keep_alive: Duration) {
        if !keep_alive.is_zero() {
            self.keep_alive = Some((keep_alive, Box::pin(sleep(keep_alive))));
        }
        if let Some(packet) = welcome {
            self.take(packet);
        }
        self.decode();
    }

    /// Asks for something: it is sent, in turn, while [`next`](Line::next) is waited for.
    pub fn request(&mut self, request: V::Request) {
        self.requests.push_back(request);
    }

    /// How many requests were not sent yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.requests.len()
    }

    /// How many publishes were not acknowledged by the broker yet, or not even sent.
    #[must_use]
    pub fn unacknowledged(&self) -> usize {
        self.requests.len() + self.version.unacknowledged()
    }

    /// What happens next. An event about something that was sent comes when the socket has taken it. May be
    /// dropped and called again: nothing is lost.
    ///
    /// # Errors
    /// The connection ended. Everything that came before was told before.
    pub async fn next(&mut self) -> Result<V::Event, LineError<V::Error>> {
        loop {
            if !self.unsent || self.end.is_some() {
                if let Some(event) = self.version.event() {
                    return Ok(event);
                }
                if let Some(end) = self.end.take() {
                    // Should anybody ask again.
                    self.end = Some(LineError::Closed);
                    return Err(end);
                }
                self.send_requests();
                if self.unsent || self.end.is_some() || self.version.has_event() {
                    continue;
                }
            }
            let Line { reader, writer, input, missing, output, keep_alive, .. } = self;
            let alarm = async {
                match keep_alive {
                    Some((_, alarm)) => alarm.as_mut().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                sent = flush(writer, output), if self.unsent => match sent {
                    Ok(()) => {
                        self.unsent = false;
                        self.output = BytesMut::new();
                    }
                    Err(error) => self.last_words(error).await,
                },
                // Nobody reads on who is not listened to.
                read = read(reader, input, *missing), if !self.version.has_event() => match read {
                    Ok(0) => self.end = Some(LineError::Closed),
                    Ok(_) => {
                        self.version.heard();
                        self.decode();
                    }
                    Err(error) => self.end = Some(LineError::Io(error)),
                },
                () = alarm, if !self.unsent => self.ping(),
            }
        }
    }

    /// Ends the stream, as TLS wants it, and closes the connection.
    pub async fn close(mut self) {
        // If it does not get through, the broker notices by itself.
        let _ = timeout(limits::GOODBYE, self.writer.shutdown()).await;
    }

    /// Nothing can be sent any more. What the broker said before it closed the connection is better than how the
    /// socket puts it.
    async fn last_words(&mut self, error: LineError<V::Error>) {
        let listen = async {
            while self.end.is_none() {
                match read(&mut self.reader, &mut self.input, self.missing).await {
                    Ok(1..) => self.decode(),
                    Err(error) if tls_error(&error).is_some() => self.end = Some(LineError::Io(error)),
                    Ok(0) | Err(_) => return,
                }
            }
        };
        let _ = timeout(limits::LAST_WORDS, listen).await;
        self.end.get_or_insert(error);
    }

    /// Takes all whole packets out of what was read.
    fn decode(&mut self) {
        while self.end.is_none() {
            match self.version.read(&mut self.input) {
                Ok(Ok(packet)) => self.take(packet),
                Ok(Err(missing)) => {
                    self.missing = missing;
                    if self.input.is_empty() {
                        // Most connections are idle: nothing is held for them.
                        self.input = BytesMut::new();
                    }
                    return;
                }
                Err(error) => self.end = Some(LineError::Mqtt(error)),
            }
        }
    }

    fn take(&mut self, packet: V::Packet) {
        match self.version.incoming(packet) {
            Ok(answer) => self.write(answer),
            Err(error) => self.end = Some(LineError::Mqtt(error)),
        }
    }

    fn send_requests(&mut self) {
        while self.end.is_none() && self.output.len() < limits::WRITE && !self.version.is_full() {
            let Some(request) = self.requests.pop_front() else {
                self.requests = VecDeque::new();
                return;
            };
            self.send(request);
        }
    }

    fn send(&mut self, request: V::Request) {
        match self.version.outgoing(request) {
            Ok(packet) => self.write(packet),
            Err(error) => self.end = Some(LineError::Mqtt(error)),
        }
    }

    fn write(&mut self, packet: Option<V::Packet>) {
        let Some(packet) = packet else { return };
        match self.version.write(&packet, &mut self.output) {
            Ok(()) => self.unsent = true,
            Err(error) => self.end = Some(LineError::Mqtt(error)),
        }
    }

    fn ping(&mut self) {
        if let Some((pause, alarm)) = &mut self.keep_alive {
            #[expect(clippy::disallowed_methods, reason = "this is the driver's clock")]
            let now = Instant::now();
            alarm.as_mut().reset(now + *pause);
        }
        self.send(V::ping());
    }
}

impl<V: Version> fmt::Debug for Line<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("waiting", &self.requests.len()).field("unsent", &self.unsent).finish()
    }
}

/// The first byte of a TLS record that says what is wrong.
const TLS_ALERT: u8 = 0x15;

/// Reads what is there, with room for `missing` bytes at least. 0 is the end. May be dropped: nothing is lost.
async fn read(reader: &mut ReadHalf<Stream>, input: &mut BytesMut, missing: usize) -> io::Result<usize> {
    let read = if input.is_empty() && missing <= limits::READ {
        // Most connections are idle: there is no room for what they wait for until it is there.
        let read = poll_fn(|context| {
            let mut room = [const { MaybeUninit::uninit() }; limits::READ];
            let mut room = ReadBuf::uninit(&mut room);
            ready!(Pin::new(&mut *reader).poll_read(context, &mut room))?;
            input.extend_from_slice(room.filled());
            Poll::Ready(Ok(room.filled().len()))
        });
        read.await
    } else {
        if input.capacity() - input.len() < missing {
            input.reserve(missing.max(limits::READ));
        }
        reader.read_buf(input).await
    };
    match read {
        // A peer that hangs up without the word for it that TLS has; what it said is authentic all the same, and
        // MQTT packets know their length.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
        read => read,
    }
}

/// Writes all of `output`. May be dropped: what was not written is still in it.
async fn flush<E>(writer: &mut WriteHalf<Stream>, output: &mut BytesMut) -> Result<(), LineError<E>> {
    let write = async {
        while output.has_remaining() {
            match timeout(limits::STALL, writer.write_buf(output)).await {
                Ok(Ok(0)) => return Err(LineError::Io(io::ErrorKind::WriteZero.into())),
                Ok(written) => drop(written.map_err(LineError::Io)?),
                Err(_) => return Err(LineError::Stalled),
            }
        }
        match timeout(limits::STALL, writer.flush()).await {
            Ok(flushed) => flushed.map_err(LineError::Io),
            Err(_) => Err(LineError::Stalled),
        }
    };
    write.await
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use rumqttc::{
        Outgoing,
        v5::{
            Event, Request, StateError,
            mqttbytes::{
                QoS,
                v5::{Connect, ConnectReturnCode, DisconnectReasonCode, Packet, Publish},
            },
        },
    };
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::{args::TrustArgs, version::V5};

    /// CONNACK, success, no properties.
    const WELCOME: [u8; 5] = [0x20, 3, 0, 0, 0];
    /// DISCONNECT, packet too large.
    const TOO_LARGE: [u8; 4] = [0xe0, 2, 0x95, 0];
    /// PUBLISH of `x` on `t`, QoS 0, no properties.
    const MESSAGE: [u8; 7] = [0x30, 5, 0, 1, b't', 0, b'x'];

    async fn listen() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    async fn open(address: SocketAddr) -> Result<Line<V5>, LineError<StateError>> {
        let url = format!("mqtt://{address}").parse().unwrap();
        let endpoint = Endpoint::new(url, &TrustArgs::default()).unwrap();
        let hello = Connect { keep_alive: 60, client_id: "test".into(), clean_start: true, properties: None };
        let (mut line, welcome) =
            Line::open(&endpoint, V5::new(1024 * 1024), Packet::Connect(hello, None, None)).await?;
        line.accept(Some(welcome), Duration::ZERO);
        assert!(matches!(
            line.next().await?,
            Event::Incoming(Packet::ConnAck(welcome)) if welcome.code == ConnectReturnCode::Success
        ));
        Ok(line)
    }

    fn publish(bytes: usize) -> Request {
        Request::Publish(Publish::new("t", QoS::AtMostOnce, vec![0; bytes], None))
    }

    /// Accepts a client and reads its CONNECT.
    async fn accept(listener: &TcpListener) -> TcpStream {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut header = [0; 2];
        stream.read_exact(&mut header).await.unwrap();
        let mut rest = vec![0; header[1].into()];
        stream.read_exact(&mut rest).await.unwrap();
        stream
    }

    #[tokio::test]
    async fn what_a_broker_said_before_it_hung_up_on_a_large_packet_is_told() {
        let (listener, address) = listen().await;
        let broker = async {
            let mut stream = accept(&listener).await;
            stream.write_all(&WELCOME).await.unwrap();
            stream.read_exact(&mut [0; 100]).await.unwrap();
            stream.write_all(&TOO_LARGE).await.unwrap();
            // With the rest of the packet unread: the connection is reset.
        };
        let client = async {
            let mut line = open(address).await.unwrap();
            line.request(publish(64 * 1024 * 1024));
            loop {
                match line.next().await {
                    // It was sent before the other side looked at it.
                    Ok(_) => {}
                    Err(error) => return error,
                }
            }
        };
        let ((), error) = tokio::join!(broker, client);
        let LineError::Mqtt(StateError::ServerDisconnect { reason_code, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!(reason_code, DisconnectReasonCode::PacketTooLarge);
    }

    #[tokio::test]
    async fn messages_in_pieces_are_whole_however_often_the_wait_for_them_is_given_up() {
        let (listener, address) = listen().await;
        let broker = async {
            let mut stream = accept(&listener).await;
            stream.set_nodelay(true).unwrap();
            stream.write_all(&WELCOME).await.unwrap();
            for byte in MESSAGE.repeat(20) {
                stream.write_all(&[byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
            // The client's message comes through all the same.
            let mut found = Vec::new();
            stream.read_to_end(&mut found).await.unwrap();
            found
        };
        let client = async {
            let mut line = open(address).await.unwrap();
            line.request(publish(1000));
            let (mut messages, mut sent) = (0, 0);
            while messages < 20 || sent < 1 {
                // Gives up after each poll that is not ready.
                let event = tokio::select! {
                    biased;
                    event = line.next() => event.unwrap(),
                    () = tokio::task::yield_now() => continue,
                };
                match event {
                    Event::Incoming(Packet::Publish(message)) => {
                        assert_eq!((&*message.topic, &*message.payload), (&b"t"[..], &b"x"[..]));
                        messages += 1;
                    }
                    Event::Outgoing(Outgoing::Publish(_)) => sent += 1,
                    other => panic!("{other:?}"),
                }
            }
            line.close().await;
        };
        let (found, ()) = tokio::join!(broker, client);
        assert_eq!(found.len(), 1000 + 3 + 3 + 1, "header, topic, properties and payload");
    }

    #[tokio::test]
    async fn everything_that_came_before_the_end_is_told_before_it() {
        let (listener, address) = listen().await;
        let broker = async {
            let mut stream = accept(&listener).await;
            stream.write_all(&[&WELCOME[..], &MESSAGE, &MESSAGE].concat()).await.unwrap();
        };
        let client = async {
            let mut line = open(address).await.unwrap();
            for _ in 0..2 {
                assert!(matches!(line.next().await, Ok(Event::Incoming(Packet::Publish(_)))));
            }
            assert!(matches!(line.next().await, Err(LineError::Closed)));
            assert!(matches!(line.next().await, Err(LineError::Closed)));
        };
        tokio::join!(broker, client);
    }

    #[tokio::test]
    async fn a_broker_that_hangs_up_at_once_may_be_one_that_speaks_tls() {
        let (listener, address) = listen().await;
        let broker = async { drop(accept(&listener).await) };
        let ((), opened) = tokio::join!(broker, open(address));
        let Err(LineError::Connect(error)) = opened else { panic!("{opened:?}") };
        assert!(error.is_passing());
        assert!(error.hint().unwrap().contains("write `mqtts://`"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_broker_that_says_nothing_is_given_up() {
        let (listener, address) = listen().await;
        let silent = async {
            let stream = accept(&listener).await;
            std::future::pending::<()>().await;
            drop(stream);
        };
        tokio::select! {
            () = silent => {}
            opened = open(address) => {
                assert!(matches!(opened, Err(LineError::Connect(ConnectError::Silent))), "{opened:?}");
            }
        }
    }
}
