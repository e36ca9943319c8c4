//! MQTT 3.1.1 and MQTT 5: rumqttc's packets and its state machines, which do no I/O, under one trait.

use std::collections::VecDeque;

use bytes::BytesMut;
use rumqttc::{mqttbytes as bytes4, v5, v5::mqttbytes as bytes5};

/// One version of MQTT, and what a connection that speaks it has to remember.
pub trait Version {
    /// What goes over the wire.
    type Packet;
    /// What a client wants.
    type Request;
    /// What a client is told.
    type Event;
    /// What a broker does wrong, or says before it ends the connection.
    type Error: std::error::Error;

    /// Takes the first packet out of `input`; `Err` with the bytes that are missing, at least, if it is not
    /// complete.
    ///
    /// # Errors
    /// It is no packet.
    fn read(&mut self, input: &mut BytesMut) -> Result<Result<Self::Packet, usize>, Self::Error>;

    /// Appends a packet to `output`.
    ///
    /// # Errors
    /// It is larger than what the broker takes.
    fn write(&mut self, packet: &Self::Packet, output: &mut BytesMut) -> Result<(), Self::Error>;

    /// Takes note of a packet of the broker's; returns the answer to it.
    ///
    /// # Errors
    /// The broker must not send it now, or says that this is the end.
    fn incoming(&mut self, packet: Self::Packet) -> Result<Option<Self::Packet>, Self::Error>;

    /// Takes note of a request; returns what to send.
    ///
    /// # Errors
    /// It is no valid request.
    fn outgoing(&mut self, request: Self::Request) -> Result<Option<Self::Packet>, Self::Error>;

    /// Whether the broker must acknowledge something before it gets another request.
    fn is_full(&self) -> bool;

    /// What the client was not told yet.
    fn event(&mut self) -> Option<Self::Event>;

    /// Whether there is an [`event`](Version::event).
    fn has_event(&self) -> bool;

    /// Takes note of a sign of life: on a slow line, the answer to a ping is behind what else comes.
    fn heard(&mut self);

    /// The request for a sign of life.
    fn ping() -> Self::Request;
}

/// MQTT 3.1.1.
#[derive(Debug)]
pub struct V4 {
    state: rumqttc::MqttState,
    in_flight: u16,
    packet: usize,
}

impl V4 {
    /// A new session: at most `in_flight` publishes without an acknowledgement, and no packets above `packet` bytes.
    #[must_use]
    pub fn new(in_flight: u16, packet: usize) -> V4 {
        let mut state = rumqttc::MqttState::new(in_flight, false);
        // It comes with room for a hundred, 14 KB: a fleet has thousands of connections with two at a time.
        state.events = VecDeque::new();
        V4 { state, in_flight, packet }
    }

    /// The same, where messages that come at QoS 1 are acknowledged on request only: when they are kept.
    #[must_use]
    pub fn acknowledging_late(in_flight: u16, packet: usize) -> V4 {
        let mut version = V4::new(in_flight, packet);
        version.state.manual_acks = true;
        version
    }
}

impl Version for V4 {
    type Packet = rumqttc::Packet;
    type Request = rumqttc::Request;
    type Event = rumqttc::Event;
    type Error = rumqttc::StateError;

    fn read(&mut self, input: &mut BytesMut) -> Result<Result<Self::Packet, usize>, Self::Error> {
        match rumqttc::Packet::read(input, self.packet) {
            Ok(packet) => Ok(Ok(packet)),
            Err(bytes4::Error::InsufficientBytes(missing)) => Ok(Err(missing)),
            Err(error) => Err(error.into()),
        }
    }

    fn write(&mut self, packet: &Self::Packet, output: &mut BytesMut) -> Result<(), Self::Error> {
        packet.write(output, self.packet)?;
        Ok(())
    }

    fn incoming(&mut self, packet: Self::Packet) -> Result<Option<Self::Packet>, Self::Error> {
        self.state.handle_incoming_packet(packet)
    }

    fn outgoing(&mut self, request: Self::Request) -> Result<Option<Self::Packet>, Self::Error> {
        self.state.handle_outgoing_packet(request)
    }

    fn is_full(&self) -> bool {
        self.state.inflight() >= self.in_flight || self.state.collision.is_some()
    }

    fn event(&mut self) -> Option<Self::Event> {
        self.state.events.pop_front()
    }

    fn has_event(&self) -> bool {
        !self.state.events.is_empty()
    }

    fn heard(&mut self) {
        self.state.await_pingresp = false;
    }

    fn ping() -> Self::Request {
        rumqttc::Request::PingReq(rumqttc::PingReq)
    }
}

/// MQTT 5.
#[derive(Debug)]
pub struct V5 {
    state: v5::MqttState,
    in_flight: u16,
    incoming: u32,
    outgoing: Option<u32>,
}

impl V5 {
    /// A new session that takes no packets above `packet` bytes; the broker's greeting says what it takes.
    #[must_use]
    pub fn new(packet: u32) -> V5 {
        // Packet ids of all requests are drawn from this range, so it must be wide.
        let state = v5::MqttState::new(u16::MAX, false);
        V5 { state, in_flight: u16::MAX, incoming: packet, outgoing: None }
    }
}

impl Version for V5 {
    type Packet = bytes5::v5::Packet;
    type Request = v5::Request;
    type Event = v5::Event;
    type Error = v5::StateError;

    fn read(&mut self, input: &mut BytesMut) -> Result<Result<Self::Packet, usize>, Self::Error> {
        match bytes5::v5::Packet::read(input, Some(self.incoming)) {
            Ok(packet) => Ok(Ok(packet)),
            Err(bytes5::Error::InsufficientBytes(missing)) => Ok(Err(missing)),
            Err(error) => Err(error.into()),
        }
    }

    fn write(&mut self, packet: &Self::Packet, output: &mut BytesMut) -> Result<(), Self::Error> {
        packet.write(output, self.outgoing)?;
        Ok(())
    }

    fn incoming(&mut self, packet: Self::Packet) -> Result<Option<Self::Packet>, Self::Error> {
        if let bytes5::v5::Packet::ConnAck(greeting) = &packet
            && let Some(properties) = &greeting.properties
        {
            self.outgoing = properties.max_packet_size;
            self.in_flight = properties.receive_max.unwrap_or(u16::MAX);
        }
        self.state.handle_incoming_packet(packet)
    }

    fn outgoing(&mut self, request: Self::Request) -> Result<Option<Self::Packet>, Self::Error> {
        self.state.handle_outgoing_packet(request)
    }

    fn is_full(&self) -> bool {
        self.state.inflight() >= self.in_flight || self.state.collision.is_some()
    }

    fn event(&mut self) -> Option<Self::Event> {
        self.state.events.pop_front()
    }

    fn has_event(&self) -> bool {
        !self.state.events.is_empty()
    }

    fn heard(&mut self) {
        self.state.await_pingresp = false;
    }

    fn ping() -> Self::Request {
        v5::Request::PingReq
    }
}
