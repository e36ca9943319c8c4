//! The driver of the [mirror](super::mirror): a connection, the index, and a clock.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use mpypi_protocol::{Digest, Topic, list::Piece};
use rumqttc::QoS;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::sleep,
};

use super::{
    Edge, Read,
    line::{Hello, Incoming, Wire},
    mirror::{Effect, Event, Library, Mirror, Moment, Options, Tell},
};
use crate::{
    access::Channels,
    clock::{self, Now},
    connection::Shared,
    index::{Index, IndexError},
    message::Payload,
    pulse::MIRROR,
    submit::{By, clear, retained, submit},
};

/// How often time is told while something is under way.
const TICK: Duration = Duration::from_millis(500);
/// How often it is told otherwise.
const REST: Duration = Duration::from_secs(5);
/// How long a broker that is its own upstream leaves it alone.
pub(super) const LOOP_AGAIN: Duration = Duration::from_secs(300);
/// Topics that somebody waits to be told of.
const READS: usize = 256;

/// Mirrors until the broker stops.
pub(super) async fn run(edge: &Arc<Edge>, shared: &Arc<Shared>, mut reads: mpsc::Receiver<Read>) {
    let mut fetcher = Fetcher::new(edge, shared);
    loop {
        let pause = if fetcher.mirror.is_busy() { TICK } else { REST };
        tokio::select! {
            () = shared.shutdown.cancelled() => break,
            () = edge.looped.notified() => {
                let lost = fetcher.wire.again("this broker is its own upstream".to_owned(), LOOP_AGAIN);
                fetcher.incoming(lost);
            }
            incoming = fetcher.wire.next() => fetcher.incoming(incoming),
            Some(settled) = fetcher.keeping.join_next() => match settled {
                Ok((topic, result)) => fetcher.settled(topic, result),
                Err(error) => tracing::error!(%error, "cannot keep what an upstream has"),
            },
            Some(read) = reads.recv() => fetcher.read(read),
            () = sleep(pause) => fetcher.handle(Event::Tick { heard: edge.received() }),
        }
    }
    fetcher.wire.close().await;
    edge.memory.save();
}

struct Fetcher<'e> {
    edge: &'e Arc<Edge>,
    shared: &'e Arc<Shared>,
    mirror: Mirror,
    wire: Wire,
    /// Messages on their way into the index.
    keeping: JoinSet<(String, Result<(), String>)>,
    /// Who asked what the upstream has on a topic.
    reads: HashMap<String, Vec<oneshot::Sender<Bytes>>>,
    start: Now,
}

impl<'e> Fetcher<'e> {
    fn new(edge: &'e Arc<Edge>, shared: &'e Arc<Shared>) -> Fetcher<'e> {
        let config = &edge.config;
        let options = Options {
            channels: config.channels.clone(),
            pin: config.pin.clone(),
            hours: config.window,
            part: config.part,
        };
        let endpoints = config.endpoints.iter().map(|endpoint| {
            let endpoint = endpoint.metered(edge.meter.clone());
            config.bandwidth.map_or(endpoint.clone(), |rate| endpoint.paced(rate))
        });
        let hello = Hello { id: format!("{}-mirror", edge.name), is_clean: true };
        Fetcher {
            edge,
            shared,
            mirror: Mirror::new(options, edge.memory.releases(), &Shelf(&shared.index)),
            wire: Wire::new(endpoints.collect(), hello),
            keeping: JoinSet::new(),
            reads: HashMap::new(),
            start: clock::now(),
        }
    }

    fn incoming(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::Connected { .. } => {
                tracing::info!(url = self.wire.url(), "connected to the upstream");
                self.edge.view.note(|seen| {
                    (seen.url, seen.is_connected, seen.problem) = (self.wire.url(), true, None);
                });
                self.handle(Event::Connected);
            }
            Incoming::Lost { why, again_in } => {
                let url = self.wire.url();
                tracing::warn!(
                    url,
                    again_in = format!("{:.1}s", again_in.as_secs_f64()),
                    "no upstream: {why}"
                );
                self.reads.clear();
                self.edge.view.note(|seen| {
                    (seen.url, seen.is_connected, seen.problem) = (url, false, Some(why));
                });
                self.handle(Event::Lost);
            }
            Incoming::Message { topic, payload, id, .. } => {
                if id > 0 {
                    self.wire.acknowledge(id);
                }
                if let Some(asked) = self.reads.remove(&topic) {
                    // Those that were chosen by name are listened to for good.
                    if self.edge.config.channels == Channels::All {
                        self.wire.unsubscribe(topic.clone());
                    }
                    for reply in asked {
                        reply.send(payload.clone()).ok(); // who asked may have gone
                    }
                }
                self.handle(Event::Message { topic, payload });
            }
            Incoming::Subscribed { filters, refused } => {
                self.handle(Event::Subscribed { filters, refused });
            }
            Incoming::Acknowledged(_) | Incoming::Nothing => {}
        }
    }

    fn settled(&mut self, topic: String, result: Result<(), String>) {
        if result.is_ok() && matches!(Topic::parse(&topic), Ok(Topic::Package(_))) {
            self.edge.view.note(|seen| seen.fetched += 1);
        }
        self.handle(Event::Settled { topic, result });
    }

    /// Asks for a channel's list as it is now, whatever was subscribed to before.
    fn read(&mut self, read: Read) {
        if !self.wire.is_open() || self.reads.len() >= READS {
            return; // who asks is told by the end of its channel
        }
        let Read { topic, reply } = read;
        self.wire.subscribe(vec![topic.clone()], QoS::AtMostOnce);
        self.reads.entry(topic).or_default().push(reply);
    }

    fn handle(&mut self, event: Event) {
        let now = clock::now();
        let moment = Moment { now: now.instant.duration_since(self.start.instant), unix_ms: now.unix_ms };
        for effect in self.mirror.handle(moment, event, &Shelf(&self.shared.index)) {
            match effect {
                Effect::Subscribe(filters) => self.wire.subscribe(filters, QoS::AtMostOnce),
                Effect::Unsubscribe(filter) => self.wire.unsubscribe(filter),
                Effect::Keep { topic, payload } => self.keep(topic, payload),
                Effect::Clear(topic) => {
                    let shared = self.shared.clone();
                    self.keeping.spawn(async move {
                        let publish = retained(topic.clone(), Bytes::new());
                        let done = clear(&shared, publish, By::origin(MIRROR)).await;
                        if let Err(refusal) = done {
                            tracing::warn!(topic, "not cleared: {refusal}");
                        }
                        (String::new(), Ok(()))
                    });
                }
                Effect::Took(channel, taken) => {
                    self.edge.memory.take(&channel, taken);
                    self.edge.memory.save();
                }
                Effect::Tell(Tell::News(text)) => tracing::info!("{text}"),
                Effect::Tell(Tell::Trouble(text)) => tracing::warn!("{text}"),
            }
        }
        let (channels, is_whole) = (self.mirror.standings(), self.mirror.is_whole());
        self.edge.view.note(|seen| (seen.channels, seen.is_whole) = (channels, is_whole));
    }

    fn keep(&mut self, topic: String, payload: Bytes) {
        let shared = self.shared.clone();
        self.keeping.spawn(async move {
            let kept = submit(&shared, retained(topic.clone(), payload), By::origin(MIRROR)).await;
            (topic, kept.map_err(|refusal| refusal.text))
        });
    }
}

/// The index, as the mirror looks at it.
pub(super) struct Shelf<'i>(pub(super) &'i Index);

impl Library for Shelf<'_> {
    fn has(&self, topic: &str) -> bool {
        said(topic, self.0.get(topic, clock::now().unix_ms)).is_some()
    }

    fn get(&self, topic: &str) -> Option<Bytes> {
        let message = said(topic, self.0.get(topic, clock::now().unix_ms))?;
        said(topic, self.0.payload(&message.payload).map(Some))
    }

    fn holds(&self, piece: &Piece) -> bool {
        let kept = said(&piece.topic, self.0.get(&piece.topic, clock::now().unix_ms));
        kept.is_some_and(|message| match &message.payload {
            Payload::Blob(digest, _) => *digest == piece.digest,
            Payload::Inline(bytes) => Digest::of(bytes) == piece.digest,
        })
    }
}

/// What the index says; nothing, with a word to people, if it fails.
pub(super) fn said<T>(topic: &str, asked: Result<Option<T>, IndexError>) -> Option<T> {
    asked.unwrap_or_else(|error| {
        tracing::error!(topic, %error, "cannot look what is here");
        None
    })
}
