//! The driver of the [relay](super::relay): a connection, the index, and what the site's nodes say.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use mpypi_protocol::topic::{EDGES, NODES};
use rumqttc::QoS;
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinSet, yield_now},
    time::sleep,
};

use super::{
    Edge, Part, Upload,
    fetch::{LOOP_AGAIN, said},
    line::{Hello, Incoming, Wire},
    relay::{Effect, Event, Kept, Library, Message, Relay},
};
use crate::{
    clock,
    connection::Shared,
    index::{Index, Step},
    limits::Limits,
    listener::Listener,
    mailbox::{Delivery, Mail, Mailbox},
    message::Refusal,
    packet::{Publish, Reason, SubscriptionOptions},
    pulse::MIRROR,
    submit::{By, retained, submit},
};

/// Messages of nodes that wait to be looked at; with more, the index is looked through.
const WAITING: usize = 16 * 1024;
/// Their bytes.
const WAITING_BYTES: usize = 16 * 1024 * 1024;
/// Messages looked at before others have their turn.
const TURN: usize = 256;
/// How often what was carried is noted.
const SAVE: Duration = Duration::from_secs(1);
/// Numbers of what a gateway's callers publish; the relay counts from 1.
const UPLOADS: u64 = 1 << 63;

/// Relays until the broker stops.
pub(super) async fn run(edge: &Arc<Edge>, shared: &Arc<Shared>, mut uploads: mpsc::Receiver<Upload>) {
    let listener = listen(shared);
    let mut carrier = Carrier::new(edge, shared);
    loop {
        tokio::select! {
            () = shared.shutdown.cancelled() => break,
            incoming = carrier.wire.next() => carrier.incoming(incoming).await,
            () = listener.mailbox().arrived() => carrier.hear(listener.mailbox()).await,
            Some(settled) = carrier.handing.join_next() => match settled {
                Ok((id, is_done)) => carrier.handle(Event::Settled { id, is_done }).await,
                Err(error) => tracing::error!(%error, "cannot hand on what came from upstream"),
            },
            Some(upload) = uploads.recv() => carrier.upload(upload),
            () = sleep(SAVE) => {}
        }
        edge.memory.carry(carrier.relay.carried());
        let standing = carrier.relay.standing();
        edge.view.note(|seen| seen.relay = standing);
        carrier.save();
    }
    carrier.wire.close().await;
    edge.memory.save();
}

struct Carrier<'e> {
    edge: &'e Arc<Edge>,
    shared: &'e Arc<Shared>,
    relay: Relay,
    wire: Wire,
    /// Messages on their way to nodes.
    handing: JoinSet<(u16, bool)>,
    /// What callers of a gateway published, by number.
    uploads: HashMap<u64, oneshot::Sender<()>>,
    next: u64,
    saved: clock::Now,
}

impl<'e> Carrier<'e> {
    fn new(edge: &'e Arc<Edge>, shared: &'e Arc<Shared>) -> Carrier<'e> {
        let config = &edge.config;
        // A gateway is nobody whom orders wait for.
        let hello = Hello { id: edge.name.to_string(), is_clean: config.part == Part::Gateway };
        Carrier {
            edge,
            shared,
            relay: Relay::new(edge.name.clone(), config.part, edge.memory.carried()),
            wire: Wire::new(config.endpoints.clone(), hello),
            handing: JoinSet::new(),
            uploads: HashMap::new(),
            next: UPLOADS,
            saved: clock::now(),
        }
    }

    async fn incoming(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::Connected { present } => {
                self.edge.view.note(|seen| {
                    (seen.is_relaying, seen.is_loop) = (true, false);
                    if seen.is_connected {
                        seen.problem = None;
                    }
                });
                self.handle(Event::Connected { present }).await;
            }
            Incoming::Lost { why, .. } => {
                tracing::debug!("the relay has no upstream: {why}");
                self.uploads.clear();
                self.edge.view.note(|seen| {
                    seen.is_relaying = false;
                    seen.problem = Some(why);
                });
                self.handle(Event::Lost).await;
            }
            Incoming::Message { topic, payload, retain, id } => {
                self.handle(Event::Down { topic, payload, retain, id }).await;
            }
            Incoming::Subscribed { refused, .. } => self.handle(Event::Subscribed(refused)).await,
            Incoming::Acknowledged(number) if number >= UPLOADS => {
                if let Some(reply) = self.uploads.remove(&number) {
                    reply.send(()).ok(); // who asked may have gone
                }
            }
            Incoming::Acknowledged(number) => self.handle(Event::Acknowledged(number)).await,
            Incoming::Nothing => {}
        }
    }

    /// Takes what the site's nodes, and edges below, have said.
    async fn hear(&mut self, mailbox: &Mailbox) {
        let mut heard = 0;
        while let Some(mail) = mailbox.pop() {
            match mail {
                Mail::Delivery(delivery) => self.local(&delivery).await,
                Mail::Lagging(_) => self.handle(Event::Behind).await,
                Mail::Overflow => {
                    mailbox.open();
                    self.handle(Event::Behind).await;
                }
                Mail::Queued => {}
            }
            heard += 1;
            if heard % TURN == 0 {
                yield_now().await;
            }
        }
    }

    async fn local(&mut self, delivery: &Delivery) {
        let message = &delivery.message;
        // What came from upstream does not go back.
        if message.origin == Some(MIRROR) {
            return;
        }
        match self.shared.index.payload(&message.payload) {
            Ok(payload) => {
                let version = message.retain.then_some(message.version);
                self.handle(Event::Local { topic: message.topic.to_string(), version, payload }).await;
            }
            // It was replaced in the meantime, by something that is heard of too.
            Err(error) => tracing::debug!(topic = &*message.topic, %error, "gone before it was read"),
        }
    }

    fn upload(&mut self, upload: Upload) {
        if !self.wire.is_open() {
            return; // who asks is told by the end of its channel
        }
        let Upload { topic, payload, retain, reply } = upload;
        self.next += 1;
        self.uploads.insert(self.next, reply);
        self.wire.publish(self.next, Message { topic, payload, retain });
    }

    async fn handle(&mut self, event: Event) {
        let shared = self.shared;
        let mut effects = self.relay.handle(event, &Shelf(&shared.index));
        while !effects.is_empty() {
            let mut more = Vec::new();
            for effect in effects {
                match effect {
                    Effect::Send(number, message) => self.wire.publish(number, message),
                    Effect::Subscribe(filters) => self.wire.subscribe(filters, QoS::AtLeastOnce),
                    Effect::Unsubscribe(filters) => {
                        filters.into_iter().for_each(|filter| self.wire.unsubscribe(filter));
                    }
                    Effect::Scan => more.extend(self.scan().await),
                    Effect::Hand { topic, payload, retain, id } => self.hand(topic, payload, retain, id),
                    Effect::Acknowledge(id) => self.wire.acknowledge(id),
                    Effect::Reconnect => {
                        self.wire.lost("the index did not take what came".to_owned());
                        self.edge.view.note(|seen| seen.is_relaying = false);
                        more.extend(self.relay.handle(Event::Lost, &Shelf(&shared.index)));
                    }
                    Effect::Loop(chain) => {
                        let chain: Vec<_> = chain.iter().map(ToString::to_string).collect();
                        tracing::error!(
                            chain = chain.join(" › "),
                            "this broker is its own upstream: it leaves the upstream alone; name another one"
                        );
                        self.wire.again("this broker is its own upstream".to_owned(), LOOP_AGAIN);
                        self.edge.looped.notify_one();
                        self.edge.view.note(|seen| (seen.is_relaying, seen.is_loop) = (false, true));
                        more.extend(self.relay.handle(Event::Lost, &Shelf(&shared.index)));
                    }
                    Effect::Tell(text) => tracing::warn!("{text}"),
                }
            }
            effects = more;
        }
    }

    /// Looks through what the index has of nodes.
    async fn scan(&mut self) -> Vec<Effect> {
        let index = &self.shared.index;
        let filter = format!("{NODES}#");
        let (mut after, mut effects, mut found) = (None::<String>, Vec::new(), 0);
        loop {
            match index.next(&filter, after.as_deref(), 0, clock::now().unix_ms) {
                Ok(Step::Found(message)) => {
                    let (topic, version) = (message.topic.to_string(), message.version);
                    after = Some(topic.clone());
                    effects.extend(self.relay.handle(Event::Found { topic, version }, &Shelf(index)));
                }
                Ok(Step::Later(topic)) => after = Some(topic),
                Ok(Step::End) => break,
                Err(error) => {
                    tracing::error!(%error, "cannot look what is here of nodes");
                    break;
                }
            }
            found += 1;
            if found % TURN == 0 {
                yield_now().await;
            }
        }
        let mut since = self.edge.memory.cleared();
        loop {
            let gone = index.gone(since, TURN).unwrap_or_else(|error| {
                tracing::error!(%error, "cannot look what was cleared of nodes");
                Vec::new()
            });
            let Some((last, _)) = gone.last() else { break };
            since = *last;
            for (version, topic) in gone {
                effects.extend(self.relay.handle(Event::Gone { topic, version }, &Shelf(index)));
            }
            yield_now().await;
        }
        effects.extend(self.relay.handle(Event::Scanned, &Shelf(index)));
        effects
    }

    fn hand(&mut self, topic: String, payload: Bytes, retain: bool, id: u16) {
        let shared = self.shared.clone();
        self.handing.spawn(async move {
            let publish = Publish { retain, ..retained(topic.clone(), payload) };
            match submit(&shared, publish, By::origin(MIRROR)).await {
                Ok(()) => (id, true),
                Err(Refusal { reason, text }) => {
                    tracing::warn!(topic, "what came from upstream was not handed on: {text}");
                    // What is refused for what it is would be refused again.
                    let is_passing = matches!(
                        reason,
                        Reason::QuotaExceeded | Reason::UnspecifiedError | Reason::ServerShuttingDown
                    );
                    (id, !is_passing)
                }
            }
        });
    }

    fn save(&mut self) {
        let now = clock::now();
        if now.instant.duration_since(self.saved.instant) >= SAVE {
            self.saved = now;
            self.edge.memory.save();
        }
    }
}

/// Hears of what is said about nodes and edges.
fn listen(shared: &Shared) -> Listener {
    let limits = Limits { queue_messages: WAITING, queue_bytes: WAITING_BYTES, ..(*shared.limits).clone() };
    let options = SubscriptionOptions { retain_as_published: true, ..SubscriptionOptions::LIVE };
    let filters = [format!("{NODES}+/+"), format!("{EDGES}+")];
    Listener::new(&shared.subscriptions, &shared.tickets, filters, options, Arc::new(Mailbox::new(&limits)))
}

/// The index, as the relay looks at it.
struct Shelf<'i>(&'i Index);

impl Library for Shelf<'_> {
    fn get(&self, topic: &str) -> Option<Kept> {
        let message = said(topic, self.0.get(topic, clock::now().unix_ms))?;
        let payload = said(topic, self.0.payload(&message.payload).map(Some))?;
        Some(Kept { payload, version: message.version })
    }
}
