//! The bus: carries every message that was let in to everyone who subscribed, in one order.
//!
//! rumqttd's router is the bus, behind two links: the index's writer sends into one, the dispatcher receives
//! from the other. What travels is a ticket of eight bytes; the message it stands for waits in a bounded
//! table. The router sees one internal topic, QoS 0, nothing retained and no properties, so that nothing a
//! client sends can reach the paths on which it fails. Tickets are consecutive: a gap is noticed at once, and
//! everyone then reads again from the index.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, mpsc},
    time::Duration,
};

use rumqttd::{Notification, Router, RouterConfig, local::LinkBuilder, local::LinkRx, local::LinkTx};
use tokio::{runtime::Handle, task::yield_now};

use crate::{
    clock,
    mailbox::Delivery,
    message::Message,
    subscriptions::{Found, Receiver, Subscriptions},
};

/// Messages on the bus at once; the writer waits beyond that.
const IN_FLIGHT: usize = 4096;
/// How long the router may hold a ticket before it is taken for dead.
const STALL: Duration = Duration::from_secs(10);
/// How often the dispatcher looks whether the router is stuck or everybody has gone.
const WATCH: Duration = Duration::from_millis(500);
/// Receivers of one message that are served before those among them who are connected have their turn to send.
const STEP: usize = 64;
/// The one topic the router sees.
const TOPIC: &str = "mpypi-bus";

/// The router failed. Messages can no longer reach anyone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the bus failed: {0}")]
pub struct BusError(String);

/// Everyone's subscriptions, changed by connections and read by the dispatcher.
pub type SharedSubscriptions = Arc<RwLock<Subscriptions>>;

/// The writer's end.
pub struct Sender {
    link: LinkTx,
    table: Arc<Table>,
}

/// Says how far the bus is.
#[derive(Debug, Clone)]
pub struct Tickets {
    table: Arc<Table>,
}

/// The dispatcher's end.
pub struct Dispatcher {
    link: LinkRx,
    /// Keeps the receiving link's connection open.
    _link: LinkTx,
    table: Arc<Table>,
    subscriptions: SharedSubscriptions,
    /// Where the connections run.
    runtime: Handle,
}

/// Messages whose tickets are on the bus.
#[derive(Debug, Default)]
struct Table {
    /// Held to put in or take out one message.
    waiting: Mutex<Waiting>,
    room: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Each with those chosen to get it among the ones who share a subscription.
    messages: VecDeque<(Arc<Message>, Vec<Found>)>,
    /// The ticket of the first of `messages`.
    first: u64,
    closed: bool,
}

/// Starts the router and connects both ends. Messages for many are carried out on `runtime`, where they wait.
///
/// # Errors
/// The router does not accept its links.
pub fn start(
    subscriptions: SharedSubscriptions,
    runtime: Handle,
) -> Result<(Sender, Dispatcher, Tickets), BusError> {
    let config = RouterConfig {
        max_connections: 4,
        max_outgoing_packet_count: 256,
        // Far more than IN_FLIGHT tickets need, so that none is overwritten unread.
        max_segment_size: 1024 * 1024,
        max_segment_count: 4,
        ..RouterConfig::default()
    };
    let router = Router::new(0, config).spawn();
    let failed = |error: rumqttd::local::LinkError| BusError(error.to_string());
    let (link, _, _) = LinkBuilder::new("mpypi-bus-in", router.clone()).build().map_err(failed)?;
    let (mut receiver, incoming, _) = LinkBuilder::new("mpypi-bus-out", router).build().map_err(failed)?;
    receiver.subscribe(TOPIC).map_err(failed)?;
    let table = Arc::new(Table::default());
    Ok((
        Sender { link, table: table.clone() },
        Dispatcher { link: incoming, _link: receiver, table: table.clone(), subscriptions, runtime },
        Tickets { table },
    ))
}

impl Tickets {
    /// The ticket of the next message. All that were acknowledged before have an earlier one.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.table.lock().next()
    }
}

impl Tickets {
    /// Messages on the bus now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.table.lock().messages.len()
    }
}

impl Sender {
    /// Puts a message on the bus, also for those `chosen` among the ones who share a subscription; waits while
    /// it is full.
    ///
    /// # Errors
    /// The router or the dispatcher is gone.
    pub fn send(&mut self, message: Arc<Message>, chosen: Vec<Found>) -> Result<(), BusError> {
        let mut waiting = self.table.lock();
        while waiting.messages.len() >= IN_FLIGHT && !waiting.closed {
            waiting = self.table.room.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        if waiting.closed {
            return Err(BusError("the dispatcher is gone".to_owned()));
        }
        let ticket = waiting.next();
        waiting.messages.push_back((message, chosen));
        drop(waiting);
        let payload = ticket.to_be_bytes().to_vec();
        self.link.publish(TOPIC, payload).map_err(|error| BusError(error.to_string()))?;
        Ok(())
    }
}

impl Waiting {
    fn next(&self) -> u64 {
        self.first + self.messages.len() as u64
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.table.lock().closed = true;
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        self.table.lock().closed = true;
        self.table.room.notify_all();
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dispatcher {
    /// Hands messages to mailboxes until the sender is gone and all it sent is delivered. Call it on a thread
    /// of its own.
    ///
    /// # Errors
    /// The router fails or holds a ticket too long.
    pub fn run(mut self) -> Result<(), BusError> {
        let mut heard = clock::now().instant;
        loop {
            let now = clock::now().instant;
            match self.link.recv_deadline(now + WATCH) {
                Ok(Some(Notification::Forward(forward))) => {
                    heard = now;
                    let ticket = forward.publish.payload.as_ref().try_into().map(u64::from_be_bytes);
                    let Ok(ticket) = ticket else { return Err(BusError("a foreign message".to_owned())) };
                    self.take(ticket);
                }
                Ok(Some(Notification::Unschedule)) => {
                    self.link.ready().map_err(|error| BusError(error.to_string()))?;
                }
                Ok(_) => {}
                Err(rumqttd::local::LinkError::RecvTimeout(_)) => {}
                Err(error) => return Err(BusError(error.to_string())),
            }
            let waiting = self.table.lock();
            match (waiting.messages.is_empty(), waiting.closed) {
                (true, true) => return Ok(()),
                (true, false) => heard = now,
                (false, _) if now.duration_since(heard) > STALL => {
                    return Err(BusError(format!("no answer for {} s", STALL.as_secs())));
                }
                (false, _) => {}
            }
        }
    }

    /// Delivers the message of `ticket`. Tickets before it were lost on the way: everyone catches up.
    fn take(&self, ticket: u64) {
        loop {
            let ((message, chosen), missed) = {
                let mut waiting = self.table.lock();
                if ticket < waiting.first {
                    return; // its message was given up for lost already
                }
                let Some(message) = waiting.messages.pop_front() else { return };
                waiting.first += 1;
                (message, waiting.first - 1 < ticket)
            };
            self.table.room.notify_one();
            let subscriptions = self.subscriptions.read().unwrap_or_else(PoisonError::into_inner);
            if !missed {
                let found = subscriptions.receivers(&message.topic, message.origin, ticket);
                drop(subscriptions);
                self.deliver_all(found, &message);
                chosen.into_iter().for_each(|found| deliver(found, &message));
                return;
            }
            tracing::error!(topic = %message.topic, "a message was lost on the bus: everyone reads again");
            for receiver in subscriptions.all() {
                match message.record() {
                    None => receiver.mailbox.overflow(),
                    Some(version) => receiver.mailbox.lag(version - 1),
                }
            }
        }
    }
}

impl Dispatcher {
    /// Delivers a message to each, and returns when all have it.
    ///
    /// Many are served by the threads on which their connections run, some at a time: whoever is told of a message
    /// by its own thread sends it next. Told from here, ten thousand would have to be woken across threads, each
    /// for a lock and many for a system call.
    fn deliver_all(&self, mut all: Vec<Found>, message: &Arc<Message>) {
        if all.len() <= STEP {
            return all.into_iter().for_each(|found| deliver(found, message));
        }
        let share = all.len().div_ceil(self.runtime.metrics().num_workers());
        let (working, done) = mpsc::channel::<()>();
        while !all.is_empty() {
            let mut share = all.split_off(all.len().saturating_sub(share)).into_iter();
            let (message, working) = (message.clone(), working.clone());
            self.runtime.spawn(async move {
                while share.len() > 0 {
                    share.by_ref().take(STEP).for_each(|found| deliver(found, &message));
                    yield_now().await;
                }
                drop(working);
            });
        }
        drop(working);
        // Nothing is ever sent: this ends when no one works any more, as when the runtime has gone.
        let _ = done.recv();
    }
}

fn deliver(found: Found, message: &Arc<Message>) {
    let Receiver { mailbox, options, .. } = &found.receiver;
    if found.is_queued(message.qos) {
        return mailbox.queued();
    }
    mailbox.push(Delivery {
        message: message.clone(),
        qos: found.qos(message.qos),
        // MQTT 5, 3.3.1.3; in 3.1.1 a live message never has the flag.
        retain: message.retain && options.retain_as_published,
        identifiers: found.identifiers,
    });
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tokio::runtime::Runtime;

    use super::*;
    use crate::{
        limits::Limits,
        mailbox::{Mail, Mailbox},
        message::{Payload, SessionId},
        packet::{Qos, RetainHandling, SubscriptionOptions},
        subscriptions::Receiver,
    };

    fn message(n: u64) -> Arc<Message> {
        Arc::new(Message {
            topic: "t".into(),
            payload: Payload::Inline(n.to_be_bytes().to_vec().into()),
            qos: Qos::AtMostOnce,
            retain: false,
            properties: Default::default(),
            expires_ms: None,
            origin: None,
            version: n,
        })
    }

    fn subscribe(subscriptions: &SharedSubscriptions, limits: &Limits) -> Arc<Mailbox> {
        subscribe_as(SessionId(1), subscriptions, limits)
    }

    fn subscribe_as(id: SessionId, subscriptions: &SharedSubscriptions, limits: &Limits) -> Arc<Mailbox> {
        let mailbox = Arc::new(Mailbox::new(limits));
        let options = SubscriptionOptions {
            qos: Qos::AtMostOnce,
            no_local: false,
            retain_as_published: false,
            retain_handling: RetainHandling::Send,
            identifier: None,
        };
        let receiver = Receiver { mailbox: mailbox.clone(), options, since: 0 };
        subscriptions.write().unwrap().insert("t", id, receiver);
        mailbox
    }

    #[test]
    fn everything_sent_arrives_in_order_before_the_dispatcher_ends() {
        let count = 4 * IN_FLIGHT as u64;
        let subscriptions = SharedSubscriptions::default();
        let limits = Limits { queue_messages: usize::MAX, queue_bytes: usize::MAX, ..Limits::default() };
        let mailbox = subscribe(&subscriptions, &limits);
        let runtime = Runtime::new().unwrap();
        let (mut sender, dispatcher, _) = start(subscriptions, runtime.handle().clone()).unwrap();
        let dispatcher = thread::spawn(|| dispatcher.run());
        for n in 1..=count {
            sender.send(message(n), Vec::new()).unwrap();
        }
        drop(sender);
        assert_eq!(dispatcher.join().unwrap(), Ok(()));
        assert!(versions(&mailbox).eq(1..=count));
    }

    fn versions(mailbox: &Mailbox) -> impl Iterator<Item = u64> {
        std::iter::from_fn(|| match mailbox.pop()? {
            Mail::Delivery(delivery) => Some(delivery.message.version),
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn many_who_are_served_side_by_side_each_get_every_message_once_in_order() {
        let runtime = Runtime::new().unwrap();
        let subscriptions = SharedSubscriptions::default();
        let limits = Limits::default();
        let mailboxes: Vec<_> =
            (1..=10 * STEP as u64 + 1).map(|n| subscribe_as(SessionId(n), &subscriptions, &limits)).collect();
        let (mut sender, dispatcher, _) = start(subscriptions, runtime.handle().clone()).unwrap();
        let dispatcher = thread::spawn(|| dispatcher.run());
        for n in 1..=50 {
            sender.send(message(n), Vec::new()).unwrap();
        }
        drop(sender);
        assert_eq!(dispatcher.join().unwrap(), Ok(()));
        assert!(mailboxes.iter().all(|mailbox| versions(mailbox).eq(1..=50)));
    }

    #[test]
    fn a_dispatcher_whose_connections_are_gone_still_ends() {
        let runtime = Runtime::new().unwrap();
        let subscriptions = SharedSubscriptions::default();
        for n in 0..=STEP as u64 {
            subscribe_as(SessionId(n), &subscriptions, &Limits::default());
        }
        let (mut sender, dispatcher, _) = start(subscriptions, runtime.handle().clone()).unwrap();
        runtime.shutdown_background();
        sender.send(message(1), Vec::new()).unwrap();
        drop(sender);
        assert_eq!(dispatcher.run(), Ok(()));
    }

    #[test]
    fn a_sender_that_waits_for_room_is_freed_when_the_dispatcher_dies() {
        let runtime = Runtime::new().unwrap();
        let (mut sender, dispatcher, _) =
            start(SharedSubscriptions::default(), runtime.handle().clone()).unwrap();
        let table = sender.table.clone();
        let sender = thread::spawn(move || (1..).find_map(|n| sender.send(message(n), Vec::new()).err()));
        while table.lock().messages.len() < IN_FLIGHT {
            thread::yield_now();
        }
        drop(dispatcher);
        assert!(sender.join().unwrap().is_some());
    }

    #[test]
    fn a_ticket_that_was_lost_makes_everyone_read_again_or_start_anew() {
        let subscriptions = SharedSubscriptions::default();
        let mailbox = subscribe(&subscriptions, &Limits::default());
        let runtime = Runtime::new().unwrap();
        let (mut sender, dispatcher, _) = start(subscriptions, runtime.handle().clone()).unwrap();
        for n in [5, 6, 7] {
            sender.send(message(n), Vec::new()).unwrap();
        }
        dispatcher.take(1); // 0 is lost
        assert!(matches!(mailbox.pop(), Some(Mail::Lagging(4))), "6 is read together with 5");
        dispatcher.take(0); // it comes after all
        assert!(mailbox.pop().is_none());
        sender.send(message(0), Vec::new()).unwrap();
        sender.send(message(8), Vec::new()).unwrap();
        dispatcher.take(4);
        assert!(matches!(mailbox.pop(), Some(Mail::Overflow)));
    }
}
