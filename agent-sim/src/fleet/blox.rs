//! A node of a fleet with Mpy-BLOX, on an MQTT 5 connection of its own. It has a watchdog: without one, such a device stays
//! deaf when its connection breaks.
//!
//! It tells nobody where it stands, and the list that it gets is not the one that was published: what it has is held beside
//! the channel's list as other nodes of the fleet verified it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use mpypi_client::{Line, LineError, V5};
use mpypi_protocol::{
    Digest, UpdateList, limits as wire,
    node::{Phase, State},
    topic::NodeSubject,
};
use rumqttc::v5::{
    Event, Request, StateError,
    mqttbytes::{
        QoS,
        v5::{Connect, ConnectReturnCode, Filter, Login, Packet, Publish, Subscribe, SubscribeReasonCode},
    },
};
use tokio_util::sync::CancellationToken;

use super::member::{Found, Storage};
use crate::{
    backoff::Backoff,
    blox::{Blox, Wish},
    limits,
    node::{Clock, Falls, Happening, NodeOptions, Trouble},
    update::Report,
    weather::{Blow, Cargo, Turn, Weather},
};

/// The newest list of a fleet's channel that a node verified.
#[derive(Debug, Default)]
pub struct Herald(Mutex<Option<(Digest, Arc<UpdateList>)>>);

impl Herald {
    /// Tells everybody of a list.
    pub fn tell(&self, payload: &Bytes) {
        let Ok(list) = UpdateList::parse(payload) else { return };
        let sequence = |list: &UpdateList| list.release().map(|release| release.sequence);
        let mut newest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.as_ref().is_none_or(|(_, before)| sequence(before) <= sequence(&list)) {
            *newest = Some((Digest::of(payload), list.into()));
        }
    }

    fn newest(&self) -> Option<(Digest, Arc<UpdateList>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Runs a node until `stop`; then says what it has. An error is one with a wrong byte.
pub(super) async fn live<F: Storage>(
    options: Box<NodeOptions>,
    flash: F,
    weather: Box<Weather>,
    clock: Clock,
    observe: impl FnMut(Happening),
    stop: CancellationToken,
    herald: Arc<Herald>,
) -> Result<Found, String> {
    let hardware = weather.hardware(options.hardware.clone());
    let blox = Blox::off(flash, &options.node, options.channel.clone(), &hardware);
    let mut life = Life {
        rng: fastrand::Rng::with_seed(options.seed),
        options,
        blox: blox.map_err(|error| error.to_string())?,
        weather,
        clock,
        observe,
        herald,
        told: None,
        bytes: 0,
    };
    let mut pause = life.weather.join();
    let mut backoff = Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_MOST);
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => break,
        }
        let ended = tokio::select! {
            ended = life.boot() => ended,
            () = stop.cancelled() => break,
        };
        pause = match ended {
            Ended::Reset { runs: true } => limits::LATER,
            Ended::Reset { runs: false } => limits::START,
            Ended::Asleep(time) => time,
            Ended::Unreachable(trouble) => {
                let again_in = backoff.next(&mut life.rng);
                (life.observe)(Happening::Lost { trouble, again_in });
                again_in
            }
            Ended::Deaf(trouble) => {
                backoff.reset();
                (life.observe)(Happening::Lost { trouble, again_in: limits::WATCHDOG });
                limits::WATCHDOG
            }
        };
    }
    let newest = life.herald.newest().filter(|(_, list)| life.blox.has(list));
    match life.blox.wrong() {
        Some(wrong) => Err(wrong),
        None => Ok(Found { list: newest.map(|(digest, _)| digest), ..Found::default() }),
    }
}

/// Why a node starts again.
enum Ended {
    /// It wants to.
    Reset { runs: bool },
    /// It slept for so long.
    Asleep(Duration),
    /// There is no broker, or none that takes it.
    Unreachable(Trouble),
    /// There was one, until the watchdog saw that there is none any more.
    Deaf(Trouble),
}

struct Life<F, O> {
    options: Box<NodeOptions>,
    blox: Blox<F>,
    weather: Box<Weather>,
    clock: Clock,
    observe: O,
    herald: Arc<Herald>,
    rng: fastrand::Rng,
    /// The list that it was last seen to have everything of, or under way to.
    told: Option<(Digest, Phase)>,
    /// Bytes of packages that came since.
    bytes: u64,
}

impl<F: Storage, O: FnMut(Happening)> Life<F, O> {
    /// From a start to the next.
    async fn boot(&mut self) -> Ended {
        let mut line = match self.connect().await {
            Ok(line) => line,
            Err(trouble) => return Ended::Unreachable(trouble),
        };
        (self.observe)(Happening::Connected);
        let turn = self.weather.next_turn(self.clock.now());
        let mut wishes = VecDeque::from(self.blox.start());
        // One subscription at a time, each answered before the next.
        let mut subscribing = false;
        let mut falls = Falls::default();
        let mut look_at = Duration::ZERO;
        loop {
            while let Some(wish) =
                wishes.pop_front_if(|wish| !subscribing || !matches!(wish, Wish::Subscribe(_)))
            {
                match wish {
                    Wish::Introduce(info) => {
                        let topic = self.options.node.topic(NodeSubject::Info);
                        let info = Publish::new(topic, QoS::AtMostOnce, info, None);
                        line.request(Request::Publish(info));
                    }
                    Wish::Subscribe(topic) => {
                        let filter = Filter::new(topic, QoS::AtMostOnce);
                        line.request(Request::Subscribe(Subscribe::new(filter, None)));
                        subscribing = true;
                    }
                    Wish::Reset { runs } => {
                        (self.observe)(Happening::Log("starts again".to_owned()));
                        return Ended::Reset { runs };
                    }
                    Wish::Wrong(text) => (self.observe)(Happening::Log(text)),
                }
            }
            let now = self.clock.now();
            if now >= look_at {
                self.look();
                look_at = now + limits::SAMPLE;
            }
            let due = [Some(look_at), falls.next(), turn.map(|(at, _)| at)];
            let wait = due.into_iter().flatten().min().unwrap_or_default().saturating_sub(now);
            let event = tokio::select! {
                event = line.next() => Some(event),
                () = tokio::time::sleep(wait) => None,
            };
            let now = self.clock.now();
            match turn {
                Some((at, Turn::Sleep(time))) if at <= now => {
                    say_goodbye(line).await;
                    (self.observe)(Happening::Blow(Blow::Sleep));
                    return Ended::Asleep(time);
                }
                Some((at, Turn::Break)) if at <= now => {
                    return Ended::Deaf(self.trouble("a simulated fault"));
                }
                _ => {}
            }
            match event {
                Some(Ok(Event::Incoming(Packet::Publish(publish)))) => {
                    let topic = String::from_utf8_lossy(&publish.topic).into_owned();
                    let fate = self.weather.fall(now, publish.payload, Cargo::Other);
                    for falling in fate.falling {
                        falls.add(falling.at, (topic.clone(), falling.payload));
                    }
                }
                Some(Ok(Event::Incoming(Packet::SubAck(ack)))) => {
                    subscribing = false;
                    if !matches!(ack.return_codes[..], [SubscribeReasonCode::Success(_)]) {
                        return Ended::Unreachable(self.trouble("it refused a subscription"));
                    }
                }
                Some(Ok(_)) | None => {}
                Some(Err(error)) => return Ended::Deaf(self.trouble(&error.to_string())),
            }
            for (topic, payload) in falls.take(now) {
                wishes.extend(self.message(&topic, &payload));
                look_at = Duration::ZERO;
            }
        }
    }

    fn message(&mut self, topic: &str, payload: &Bytes) -> Vec<Wish> {
        if topic.starts_with(mpypi_protocol::package::PACKAGES) {
            self.bytes += payload.len() as u64;
        }
        if self.options.trace {
            (self.observe)(Happening::Trace(format!("{topic}, {} B", payload.len())));
        }
        self.blox.message(topic, payload)
    }

    /// Tells where it stands with the channel's newest list, if that is news.
    fn look(&mut self) {
        let Some((digest, list)) = self.herald.newest() else { return };
        if self.told.is_none_or(|(told, _)| told != digest) {
            self.bytes = 0;
        }
        let phase = match (self.told, self.blox.is_busy()) {
            (Some((told, Phase::Idle)), _) if told == digest => return,
            (_, false) if self.blox.has(&list) => Phase::Idle,
            (_, true) => Phase::Downloading,
            _ => return,
        };
        if self.told.replace((digest, phase)) == Some((digest, phase)) && phase != Phase::Downloading {
            return;
        }
        let release = list.release();
        let state = State {
            phase,
            sequence: release.map(|release| release.sequence),
            version: release.map(|release| release.version.clone()),
            done: self.bytes,
            total: self.bytes,
            error: None,
            attempt: 1,
            held: None,
            extra: serde_json::Map::new(),
        };
        (self.observe)(Happening::Report(Report { state, list: Some(digest), size: None }));
    }

    async fn connect(&self) -> Result<Line<V5>, Trouble> {
        let NodeOptions { brokers, node, .. } = &*self.options;
        // Such a client knows one address.
        let broker = brokers.first();
        let hello = Connect {
            keep_alive: limits::KEEP_ALIVE.as_secs() as u16,
            client_id: node.as_str().to_owned(),
            clean_start: true,
            properties: None,
        };
        let credentials = broker.url().credentials.as_ref();
        let login = credentials.map(|(user, password)| Login::new(user, password));
        let version = V5::narrow(wire::PACKET as u32);
        let opened = Line::open(broker, version, Packet::Connect(hello, None, login)).await;
        match opened.map_err(|error: LineError<StateError>| self.trouble(&error.to_string()))? {
            (mut line, Packet::ConnAck(greeting)) if greeting.code == ConnectReturnCode::Success => {
                // The watchdog asks three times as often as it has to.
                line.accept(Some(Packet::ConnAck(greeting)), limits::KEEP_ALIVE / 3);
                Ok(line)
            }
            (_, Packet::ConnAck(refusal)) => {
                Err(self.trouble(&format!("it refused the connection: {:?}", refusal.code)))
            }
            _ => Err(self.trouble("it does not answer as a broker")),
        }
    }

    fn trouble(&self, error: &str) -> Trouble {
        let url = self.options.brokers.first().url();
        Trouble {
            error: format!("no connection to {url}: {error}"),
            hint: format!("is there a broker at {url}? start one with `mpypi-broker serve`"),
        }
    }
}

async fn say_goodbye(mut line: Line<V5>) {
    line.request(Request::Disconnect);
    let gone = async { while line.next().await.is_ok() {} };
    let _ = tokio::time::timeout(limits::GOODBYE, gone).await;
}
