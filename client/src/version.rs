//! MQTT 3.1.1 and MQTT 5 under one trait: rumqttc's packets, and a session of each as a state machine, which does no I/O.
//! That of MQTT 5 is rumqttc's; that of 3.1.1 is ours, since rumqttc's takes 12 KB for each connection, and a fleet has
//! thousands.

use std::collections::VecDeque;

use bytes::BytesMut;
use rumqttc::{Outgoing, PubAck, QoS, StateError, mqttbytes as bytes4, v5, v5::mqttbytes as bytes5};

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

    /// How many publishes the broker has not acknowledged yet.
    fn unacknowledged(&self) -> usize;

    /// What the client was not told yet.
    fn event(&mut self) -> Option<Self::Event>;

    /// Whether there is an [`event`](Version::event).
    fn has_event(&self) -> bool;

    /// Takes note of a sign of life: on a slow line, the answer to a ping is behind what else comes.
    fn heard(&mut self);

    /// The request for a sign of life.
    fn ping() -> Self::Request;
}

/// MQTT 3.1.1, of a client that keeps no session and neither publishes nor subscribes above QoS 1.
#[derive(Debug)]
pub struct V4 {
    in_flight: usize,
    packet: usize,
    /// The packet id that was given last.
    last_id: u16,
    /// The ids of publishes that the broker has not acknowledged.
    open: Vec<u16>,
    /// Whether it was asked for a sign of life and gave none.
    awaits_pong: bool,
    /// Whether messages at QoS 1 are acknowledged on request only.
    acknowledges_late: bool,
    events: VecDeque<rumqttc::Event>,
}

impl V4 {
    /// A new session: at most `in_flight` publishes without an acknowledgement, and no packets above `packet` bytes.
    #[must_use]
    pub fn new(in_flight: u16, packet: usize) -> V4 {
        V4 {
            in_flight: in_flight.into(),
            packet,
            last_id: 0,
            open: Vec::new(),
            awaits_pong: false,
            acknowledges_late: false,
            events: VecDeque::new(),
        }
    }

    /// The same, where messages that come at QoS 1 are acknowledged on request only: when they are kept.
    #[must_use]
    pub fn acknowledging_late(in_flight: u16, packet: usize) -> V4 {
        V4 { acknowledges_late: true, ..V4::new(in_flight, packet) }
    }

    /// MQTT 3.1.1, 2.3.1: not zero, and none that is in use. Subscriptions are answered long before theirs comes again.
    fn next_id(&mut self) -> u16 {
        loop {
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
            if !self.open.contains(&self.last_id) {
                return self.last_id;
            }
        }
    }

    fn tell(&mut self, sent: Outgoing) {
        self.events.push_back(rumqttc::Event::Outgoing(sent));
    }
}

impl Version for V4 {
    type Packet = rumqttc::Packet;
    type Request = rumqttc::Request;
    type Event = rumqttc::Event;
    type Error = StateError;

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
        use rumqttc::Packet;
        let answer = match &packet {
            Packet::Publish(publish) => match publish.qos {
                QoS::AtMostOnce => None,
                QoS::AtLeastOnce if self.acknowledges_late => None,
                QoS::AtLeastOnce => Some(PubAck::new(publish.pkid)),
                // 3.8.4: never above what was asked for.
                QoS::ExactlyOnce => return Err(StateError::WrongPacket),
            },
            Packet::PubAck(ack) => {
                let place = self.open.iter().position(|id| *id == ack.pkid);
                self.open.swap_remove(place.ok_or(StateError::Unsolicited(ack.pkid))?);
                None
            }
            Packet::PingResp => {
                self.awaits_pong = false;
                None
            }
            Packet::SubAck(_) | Packet::UnsubAck(_) => None,
            _ => return Err(StateError::WrongPacket),
        };
        self.events.push_back(rumqttc::Event::Incoming(packet));
        if let Some(ack) = &answer {
            self.tell(Outgoing::PubAck(ack.pkid));
        }
        Ok(answer.map(Packet::PubAck))
    }

    fn outgoing(&mut self, request: Self::Request) -> Result<Option<Self::Packet>, Self::Error> {
        use rumqttc::{Packet, Request};
        Ok(Some(match request {
            Request::Publish(mut publish) => {
                match publish.qos {
                    QoS::AtMostOnce => publish.pkid = 0,
                    QoS::AtLeastOnce => {
                        publish.pkid = self.next_id();
                        self.open.push(publish.pkid);
                    }
                    QoS::ExactlyOnce => return Err(StateError::InvalidState),
                }
                self.tell(Outgoing::Publish(publish.pkid));
                Packet::Publish(publish)
            }
            Request::Subscribe(mut subscribe) => {
                if subscribe.filters.is_empty() {
                    return Err(StateError::EmptySubscription);
                }
                subscribe.pkid = self.next_id();
                self.tell(Outgoing::Subscribe(subscribe.pkid));
                Packet::Subscribe(subscribe)
            }
            Request::Unsubscribe(mut unsubscribe) => {
                unsubscribe.pkid = self.next_id();
                self.tell(Outgoing::Unsubscribe(unsubscribe.pkid));
                Packet::Unsubscribe(unsubscribe)
            }
            Request::PubAck(ack) => {
                self.tell(Outgoing::PubAck(ack.pkid));
                Packet::PubAck(ack)
            }
            Request::PingReq(_) => {
                if std::mem::replace(&mut self.awaits_pong, true) {
                    return Err(StateError::AwaitPingResp);
                }
                self.tell(Outgoing::PingReq);
                Packet::PingReq
            }
            Request::Disconnect(_) => {
                self.tell(Outgoing::Disconnect);
                Packet::Disconnect
            }
            _ => return Err(StateError::InvalidState),
        }))
    }

    fn is_full(&self) -> bool {
        self.open.len() >= self.in_flight
    }

    fn unacknowledged(&self) -> usize {
        self.open.len()
    }

    fn event(&mut self) -> Option<Self::Event> {
        let event = self.events.pop_front();
        if event.is_none() {
            // Most connections are idle: nothing is held for them.
            self.events = VecDeque::new();
        }
        event
    }

    fn has_event(&self) -> bool {
        !self.events.is_empty()
    }

    fn heard(&mut self) {
        self.awaits_pong = false;
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
        V5::of_width(packet, u16::MAX)
    }

    /// The same in little memory, for a client that has a few requests under way at most.
    #[must_use]
    pub fn narrow(packet: u32) -> V5 {
        const FEW: u16 = 8;
        V5::of_width(packet, FEW)
    }

    fn of_width(packet: u32, in_flight: u16) -> V5 {
        V5 { state: v5::MqttState::new(in_flight, false), in_flight, incoming: packet, outgoing: None }
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
            self.in_flight = self.in_flight.min(properties.receive_max.unwrap_or(u16::MAX));
        }
        self.state.handle_incoming_packet(packet)
    }

    fn outgoing(&mut self, request: Self::Request) -> Result<Option<Self::Packet>, Self::Error> {
        self.state.handle_outgoing_packet(request)
    }

    fn is_full(&self) -> bool {
        self.state.inflight() >= self.in_flight || self.state.collision.is_some()
    }

    fn unacknowledged(&self) -> usize {
        self.state.inflight().into()
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

#[cfg(test)]
mod tests {
    use rumqttc::{Event, Packet, PingReq, PubAck, Publish, Request, Subscribe};

    use super::*;

    fn publish(session: &mut V4, qos: QoS) -> Result<u16, StateError> {
        match session.outgoing(Request::Publish(Publish::new("t", qos, "x")))? {
            Some(Packet::Publish(publish)) => Ok(publish.pkid),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_session_is_full_until_the_broker_acknowledges_and_gives_no_id_twice() {
        let mut session = V4::new(2, 1024);
        assert_eq!(publish(&mut session, QoS::AtMostOnce).unwrap(), 0);
        session.last_id = u16::MAX - 1;
        assert_eq!([0; 2].map(|_| publish(&mut session, QoS::AtLeastOnce).unwrap()), [u16::MAX, 1]);
        assert_eq!((session.is_full(), session.unacknowledged()), (true, 2));
        session.last_id = 0;
        let asked = session.outgoing(Request::Subscribe(Subscribe::new("t", QoS::AtLeastOnce))).unwrap();
        assert!(matches!(asked, Some(Packet::Subscribe(subscribe)) if subscribe.pkid == 2));
        assert!(session.incoming(Packet::PubAck(PubAck::new(1))).unwrap().is_none());
        assert_eq!((session.is_full(), session.unacknowledged()), (false, 1));
        let again = session.incoming(Packet::PubAck(PubAck::new(1)));
        assert!(matches!(again, Err(StateError::Unsolicited(1))), "{again:?}");
    }

    #[test]
    fn a_message_is_told_and_acknowledged_and_one_that_was_not_asked_for_ends_it() {
        let mut session = V4::new(8, 1024);
        let mut message = Publish::new("t", QoS::AtLeastOnce, "x");
        message.pkid = 7;
        let answer = session.incoming(Packet::Publish(message.clone())).unwrap();
        assert!(matches!(answer, Some(Packet::PubAck(ack)) if ack.pkid == 7));
        assert_eq!(session.event(), Some(Event::Incoming(Packet::Publish(message.clone()))));
        assert_eq!(session.event(), Some(Event::Outgoing(Outgoing::PubAck(7))));
        assert!(session.event().is_none());
        let mut late = V4::acknowledging_late(8, 1024);
        assert!(late.incoming(Packet::Publish(message.clone())).unwrap().is_none());
        let asked = late.outgoing(Request::PubAck(PubAck::new(7))).unwrap();
        assert!(matches!(asked, Some(Packet::PubAck(ack)) if ack.pkid == 7));
        message.qos = QoS::ExactlyOnce;
        assert!(session.incoming(Packet::Publish(message)).is_err());
        assert!(session.incoming(Packet::PingReq).is_err());
    }

    #[test]
    fn a_broker_that_owes_a_sign_of_life_is_given_up_when_it_is_asked_for_another() {
        let mut session = V4::new(8, 1024);
        let ask = |session: &mut V4| session.outgoing(Request::PingReq(PingReq));
        assert!(ask(&mut session).is_ok());
        assert!(session.incoming(Packet::PingResp).is_ok());
        assert!(ask(&mut session).is_ok());
        assert!(matches!(ask(&mut session), Err(StateError::AwaitPingResp)));
    }
}
