//! The connection to an upstream: made again and again, one address after the other, and what is said on it.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mpypi_client::{Endpoint, Line, LineError, V4};
use mpypi_protocol::limits::PACKET;
use rumqttc::{
    Connect, ConnectReturnCode, Disconnect, Login, Outgoing, Packet, PubAck, Publish, QoS, Request,
    StateError, Subscribe, SubscribeFilter, SubscribeReasonCode, Unsubscribe,
};
use tokio::time::{sleep, timeout};

use super::relay::Message;
use crate::clock;

/// Publishes that were not acknowledged, with those of a gateway's callers.
const IN_FLIGHT: u16 = 256;
/// How often a sign of life is asked for.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// The pause before the second attempt to connect; each one up to twice as long as the one before.
const AGAIN: Duration = Duration::from_millis(500);
/// The longest pause.
const AGAIN_MOST: Duration = Duration::from_secs(30);
/// A connection that lasted so long was a good one.
const GOOD: Duration = Duration::from_secs(10);
/// For the last words to an upstream.
const GOODBYE: Duration = Duration::from_secs(2);

/// A connection, or the attempt to make one.
pub(super) struct Wire {
    endpoints: Vec<Endpoint>,
    /// Which of them.
    at: usize,
    hello: Hello,
    tries: u32,
    stage: Stage,
}

/// Who we are upstream.
#[derive(Debug, Clone)]
pub(super) struct Hello {
    pub(super) id: String,
    /// Whether an earlier session is forgotten, and this one when it ends.
    pub(super) is_clean: bool,
}

/// An attempt to connect; says whether an earlier session goes on.
type Attempt = dyn Future<Output = Result<(Open, bool), String>> + Send;

enum Stage {
    Opening(Pin<Box<Attempt>>),
    Open(Box<Open>, Instant),
}

/// A connection.
struct Open {
    line: Line<V4>,
    /// Filters of SUBSCRIBE packets that were queued, and then sent with an id.
    queued: VecDeque<Vec<String>>,
    asked: HashMap<u16, Vec<String>>,
    /// Numbers of publishes that were queued, and then sent with an id.
    submitted: VecDeque<u64>,
    unacknowledged: HashMap<u16, u64>,
}

/// What happens next.
#[derive(Debug)]
pub(super) enum Incoming {
    /// There is a connection; whether an earlier session goes on.
    Connected { present: bool },
    /// There is none any more, or still none.
    Lost { why: String, again_in: Duration },
    /// A message.
    Message { topic: String, payload: Bytes, retain: bool, id: u16 },
    /// A SUBSCRIBE was answered.
    Subscribed { filters: usize, refused: Vec<String> },
    /// A publish was acknowledged.
    Acknowledged(u64),
    /// Nothing that matters.
    Nothing,
}

impl Wire {
    pub(super) fn new(endpoints: Vec<Endpoint>, hello: Hello) -> Wire {
        let stage = Stage::Opening(Box::pin(open(endpoints.first().cloned(), hello.clone(), Duration::ZERO)));
        Wire { endpoints, at: 0, hello, tries: 0, stage }
    }

    /// Where it is, or is about to be.
    pub(super) fn url(&self) -> String {
        self.endpoints.get(self.at).map(|endpoint| endpoint.url().to_string()).unwrap_or_default()
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Open(..))
    }

    /// What happens next. May be dropped and called again: nothing is lost.
    pub(super) async fn next(&mut self) -> Incoming {
        match &mut self.stage {
            Stage::Opening(opening) => match opening.await {
                Ok((open, present)) => {
                    self.stage = Stage::Open(Box::new(open), clock::now().instant);
                    Incoming::Connected { present }
                }
                Err(why) => self.lost(why),
            },
            Stage::Open(open, _) => match open.line.next().await {
                Ok(event) => open.incoming(event),
                Err(error) => self.lost(error.to_string()),
            },
        }
    }

    /// Gives the connection up, and makes another one later.
    pub(super) fn lost(&mut self, why: String) -> Incoming {
        if let Stage::Open(_, since) = &self.stage
            && clock::now().instant.duration_since(*since) >= GOOD
        {
            self.tries = 0;
        } else {
            // Whoever answers is stayed with.
            self.at = (self.at + 1) % self.endpoints.len().max(1);
        }
        let most = AGAIN.saturating_mul(1 << self.tries.min(16)).min(AGAIN_MOST);
        self.tries = self.tries.saturating_add(1);
        self.again(why, most.mul_f64(0.2 + 0.8 * fastrand::f64()))
    }

    /// The same, after `pause`.
    pub(super) fn again(&mut self, why: String, again_in: Duration) -> Incoming {
        let endpoint = self.endpoints.get(self.at).cloned();
        self.stage = Stage::Opening(Box::pin(open(endpoint, self.hello.clone(), again_in)));
        Incoming::Lost { why, again_in }
    }

    pub(super) fn subscribe(&mut self, filters: Vec<String>, qos: QoS) {
        if let Stage::Open(open, _) = &mut self.stage {
            let wanted = filters.iter().map(|filter| SubscribeFilter::new(filter.clone(), qos));
            open.line.request(Request::Subscribe(Subscribe::new_many(wanted)));
            open.queued.push_back(filters);
        }
    }

    pub(super) fn unsubscribe(&mut self, filter: String) {
        self.request(Request::Unsubscribe(Unsubscribe::new(filter)));
    }

    /// Publishes at QoS 1; answered with the number.
    pub(super) fn publish(&mut self, number: u64, message: Message) {
        if let Stage::Open(open, _) = &mut self.stage {
            let mut publish = Publish::new(message.topic, QoS::AtLeastOnce, Vec::new());
            (publish.payload, publish.retain) = (message.payload, message.retain);
            open.line.request(Request::Publish(publish));
            open.submitted.push_back(number);
        }
    }

    pub(super) fn acknowledge(&mut self, id: u16) {
        self.request(Request::PubAck(PubAck::new(id)));
    }

    fn request(&mut self, request: Request) {
        if let Stage::Open(open, _) = &mut self.stage {
            open.line.request(request);
        }
    }

    /// Says goodbye.
    pub(super) async fn close(mut self) {
        self.request(Request::Disconnect(Disconnect));
        let Stage::Open(mut open, _) = self.stage else { return };
        let gone = async { while open.line.next().await.is_ok() {} };
        // An upstream that is too slow notices by itself.
        let _ = timeout(GOODBYE, gone).await;
    }
}

impl Open {
    fn incoming(&mut self, event: rumqttc::Event) -> Incoming {
        match event {
            rumqttc::Event::Incoming(Packet::Publish(publish)) => {
                let Publish { topic, payload, retain, pkid: id, .. } = publish;
                Incoming::Message { topic, payload, retain, id }
            }
            rumqttc::Event::Incoming(Packet::SubAck(ack)) => {
                let asked = self.asked.remove(&ack.pkid).unwrap_or_default();
                let filters = asked.len();
                let refused = asked
                    .into_iter()
                    .zip(ack.return_codes)
                    .filter(|(_, code)| *code == SubscribeReasonCode::Failure)
                    .map(|(filter, _)| filter);
                Incoming::Subscribed { filters, refused: refused.collect() }
            }
            rumqttc::Event::Outgoing(Outgoing::Subscribe(id)) => {
                if let Some(filters) = self.queued.pop_front() {
                    self.asked.insert(id, filters);
                }
                Incoming::Nothing
            }
            rumqttc::Event::Outgoing(Outgoing::Publish(id)) => {
                if let Some(number) = self.submitted.pop_front() {
                    self.unacknowledged.insert(id, number);
                }
                Incoming::Nothing
            }
            rumqttc::Event::Incoming(Packet::PubAck(ack)) => match self.unacknowledged.remove(&ack.pkid) {
                Some(number) => Incoming::Acknowledged(number),
                None => Incoming::Nothing,
            },
            _ => Incoming::Nothing,
        }
    }
}

/// Connects after a pause; says whether an earlier session goes on.
async fn open(endpoint: Option<Endpoint>, hello: Hello, pause: Duration) -> Result<(Open, bool), String> {
    sleep(pause).await;
    let endpoint = endpoint.ok_or("there is no address")?;
    let mut connect = Connect::new(hello.id);
    connect.keep_alive = u16::try_from(KEEP_ALIVE.as_secs()).unwrap_or(u16::MAX);
    connect.clean_session = hello.is_clean;
    connect.login = endpoint.url().credentials.as_ref().map(|(user, password)| Login::new(user, password));
    let version = V4::acknowledging_late(IN_FLIGHT, PACKET);
    let opened = Line::open(&endpoint, version, Packet::Connect(connect)).await;
    let (mut line, packet) = opened.map_err(|error| told(&error))?;
    match packet {
        Packet::ConnAck(greeting) if greeting.code == ConnectReturnCode::Success => {
            line.accept(None, KEEP_ALIVE);
            let open = Open {
                line,
                queued: VecDeque::new(),
                asked: HashMap::new(),
                submitted: VecDeque::new(),
                unacknowledged: HashMap::new(),
            };
            Ok((open, greeting.session_present))
        }
        Packet::ConnAck(refusal) => Err(match refusal.code {
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized => {
                "it wants another user name or password: `mqtts://USER:PASSWORD@HOST`, in the role `edge`"
                    .to_owned()
            }
            ConnectReturnCode::BadClientId => "it does not accept this edge's name".to_owned(),
            code => format!("it refused the connection: {code:?}"),
        }),
        _ => Err("it does not answer as a broker".to_owned()),
    }
}

/// What is wrong and what to do about it, in one line.
fn told(error: &LineError<StateError>) -> String {
    match error {
        LineError::Connect(problem) => match problem.hint() {
            Some(hint) => format!("{problem}; {hint}"),
            None => problem.to_string(),
        },
        error => error.to_string(),
    }
}
