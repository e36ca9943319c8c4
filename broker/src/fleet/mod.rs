//! The fleet: what the broker knows of all nodes, channels and rollouts, in memory.
//!
//! | module | holds |
//! |---|---|
//! | [`view`] | all of it, as a state machine: news and time in, answers out |
//! | [`log`] | the last lines that nodes logged |
//! | [`limits`] | how much is remembered |
//!
//! Here is its driver: it reads the index once, then listens on the bus as any client does, and reads again what it
//! missed. Metrics and the [fleet API](crate::faces::api) look at the view, and nobody at the index for each request.

pub mod limits;
pub mod log;
pub mod view;

use std::{
    collections::HashSet,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use bytes::Bytes;
use mpypi_protocol::{
    ChannelName, Digest, Root, Topic, UpdateList,
    node::{Info, State},
    record::Record,
    root::SignedRoot,
    topic::{NodeSubject, RolloutSubject},
};
use tokio::{
    sync::watch,
    task::yield_now,
    time::{MissedTickBehavior, interval},
};

use self::view::{Channel, Heed, News, View};
use crate::{
    bus::{SharedSubscriptions, Tickets},
    clock,
    connection::Shared,
    index::{Index, IndexError},
    limits::Limits,
    listener::Listener,
    mailbox::{Mail, Mailbox},
    message::Message,
    packet::SubscriptionOptions,
};

/// What is retained of a fleet.
const RETAINED: [&str; 7] = [
    "mpypi/channels/+",
    "mpypi/channels/+/rollout",
    "mpypi/channels/+/rollout/lease",
    "mpypi/keys/root/+",
    "mpypi/nodes/+/info",
    "mpypi/nodes/+/online",
    "mpypi/nodes/+/state",
];
/// What is read of the index for that, in one go each.
const READ: [&str; 3] = ["mpypi/channels/#", "mpypi/keys/root/+", "mpypi/nodes/+/+"];
/// What nodes log: not retained, and may be missed.
const LINES: &str = "mpypi/nodes/+/log";

/// What the broker knows of its fleet.
#[derive(Debug)]
pub struct Fleet {
    /// Tells numbers of changes apart from those before the broker's last start.
    epoch: u32,
    /// Held to take in some news, or to look.
    view: RwLock<View>,
    /// Changes whenever there may be something new to see; `None` until the index was read.
    beat: watch::Sender<Option<u64>>,
    retained: Listener,
    lines: Listener,
}

impl Fleet {
    /// Starts to listen.
    #[must_use]
    pub fn new(subscriptions: &SharedSubscriptions, tickets: &Tickets, limits: &Limits) -> Fleet {
        let roomy =
            Limits { queue_messages: limits::QUEUE, queue_bytes: limits::QUEUE_BYTES, ..limits.clone() };
        let listen = |filters: &[&str], limits| {
            let (options, mailbox) = (SubscriptionOptions::LIVE, Arc::new(Mailbox::new(limits)));
            Listener::new(subscriptions, tickets, filters.iter().copied(), options, mailbox)
        };
        let (retained, lines) = (listen(&RETAINED, &roomy), listen(&[LINES], limits));
        let (beat, _) = watch::channel(None);
        Fleet { epoch: fastrand::u32(1..), view: RwLock::default(), beat, retained, lines }
    }

    /// Tells numbers of changes apart from those before the broker's last start.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Looks, when the index was read for the first time.
    pub async fn look(&self) -> RwLockReadGuard<'_, View> {
        let mut beat = self.beat.subscribe();
        // It cannot end: the sender is here.
        let _ = beat.wait_for(Option::is_some).await;
        self.glance()
    }

    /// Looks at what is known now.
    pub fn glance(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whenever there may be something new to see.
    #[must_use]
    pub fn beat(&self) -> watch::Receiver<Option<u64>> {
        self.beat.subscribe()
    }

    fn change(&self) -> RwLockWriteGuard<'_, View> {
        self.view.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        self.beat.send_modify(|beat| *beat = Some(beat.unwrap_or_default().wrapping_add(1)));
    }
}

/// Keeps the view up to date, until dropped.
pub async fn keep(shared: Arc<Shared>) {
    let fleet = &shared.fleet;
    read(&shared, 0).await;
    fleet.tell();
    let mut ticks = interval(limits::TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut count = 0u64;
    loop {
        tokio::select! {
            () = fleet.retained.mailbox().arrived() => hear(&shared).await,
            () = fleet.lines.mailbox().arrived() => hear_lines(fleet).await,
            _ = ticks.tick() => {
                let before = fleet.glance().number();
                fleet.change().tick(clock::now().unix_ms, count.is_multiple_of(limits::SAMPLE_TICKS));
                count += 1;
                if fleet.glance().number() != before {
                    fleet.tell();
                }
            }
        }
    }
}

/// Takes in what came on the bus.
async fn hear(shared: &Arc<Shared>) {
    let fleet = &shared.fleet;
    loop {
        let (mut news, mut missed) = (Vec::new(), None);
        while news.len() < limits::BATCH {
            match fleet.retained.mailbox().pop() {
                Some(Mail::Delivery(delivery)) => news.push(delivery.message),
                Some(Mail::Lagging(since)) => missed = Some(since),
                // What was cleared is not in the index: everything is read again.
                Some(Mail::Overflow) => {
                    fleet.retained.mailbox().open();
                    missed = Some(0);
                }
                Some(Mail::Queued) => {}
                None => break,
            }
            if missed.is_some() {
                break;
            }
        }
        if news.is_empty() && missed.is_none() {
            return;
        }
        let read_news: Vec<_> = news
            .iter()
            .filter_map(|message| Some((understand(&shared.index, message)?, message.version)))
            .collect();
        if !read_news.is_empty() {
            let now = clock::now().unix_ms;
            let mut view = fleet.change();
            for (news, version) in read_news {
                view.take(news, version, Heed::Live, now);
            }
        }
        if let Some(since) = missed {
            tracing::debug!(since, "reads the fleet again from the index");
            read(shared, since).await;
        }
        fleet.tell();
        yield_now().await;
    }
}

/// Takes in what nodes logged; more than fits is missed.
async fn hear_lines(fleet: &Fleet) {
    let mut taken = 0;
    while let Some(mail) = fleet.lines.mailbox().pop() {
        match mail {
            Mail::Delivery(delivery) => {
                if let (Ok(Topic::Node(node, NodeSubject::Log)), crate::message::Payload::Inline(text)) =
                    (Topic::parse(&delivery.message.topic), &delivery.message.payload)
                {
                    fleet.change().log.take(&node, text, clock::now().unix_ms);
                }
            }
            Mail::Overflow => fleet.lines.mailbox().open(),
            // Somebody has lines retained, which is not for us.
            Mail::Lagging(_) | Mail::Queued => {}
        }
        taken += 1;
        if taken % limits::BATCH == 0 {
            fleet.tell();
            yield_now().await;
        }
    }
    fleet.tell();
}

/// Reads from the index what changed after `since`; with 0, all, and forgets what is not there.
async fn read(shared: &Arc<Shared>, since: u64) {
    let worker = shared.clone();
    let work = tokio::task::spawn_blocking(move || read_now(&worker, since)).await;
    match work {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "cannot read what is known of the fleet"),
        Err(error) => tracing::error!(%error, "cannot read what is known of the fleet"),
    }
}

fn read_now(shared: &Shared, since: u64) -> Result<(), IndexError> {
    let now = clock::now().unix_ms;
    let mut there = HashSet::new();
    for filter in READ {
        shared.index.each(filter, since, now, limits::BATCH, |message| {
            if let Some(news) = understand(&shared.index, &message) {
                shared.fleet.change().take(news, message.version, Heed::Found, now);
                if since == 0 {
                    there.insert(message.topic);
                }
            }
            Ok::<_, IndexError>(())
        })?;
    }
    if since == 0 {
        shared.fleet.change().keep_only(|topic| there.contains(topic), now);
    }
    Ok(())
}

/// What a message says about the fleet.
fn understand(index: &Index, message: &Message) -> Option<News> {
    let topic = Topic::parse(&message.topic).ok()?;
    let is_ours = match &topic {
        Topic::Channel(_) | Topic::Root(_) => true,
        Topic::Rollout(_, subject) => *subject != RolloutSubject::Order,
        Topic::Node(_, subject) => {
            matches!(subject, NodeSubject::Info | NodeSubject::State | NodeSubject::Online)
        }
        _ => false,
    };
    if !is_ours {
        return None;
    }
    let payload = match index.payload(&message.payload) {
        Ok(payload) => payload,
        Err(error) => {
            // It was replaced meanwhile: what replaced it comes, too.
            tracing::debug!(topic = %message.topic, %error, "cannot read a message about the fleet");
            return None;
        }
    };
    Some(match topic {
        Topic::Node(id, NodeSubject::Info) => News::Info(id, Info::parse(&payload).ok().map(Box::new)),
        Topic::Node(id, NodeSubject::State) => News::State(id, State::parse(&payload).ok().map(Box::new)),
        Topic::Node(id, NodeSubject::Online) => {
            News::Online(id, (!payload.is_empty()).then_some(&*payload == b"1"))
        }
        Topic::Channel(name) => {
            let channel = UpdateList::parse(&payload).ok().map(|list| channel(index, &name, &payload, list));
            News::Channel(name, channel)
        }
        Topic::Root(_) => News::Root(Arc::new(Root::trusted(SignedRoot::parse(&payload).ok()?))),
        Topic::Rollout(name, RolloutSubject::Record) => {
            News::Record(name, Record::parse(&payload).ok().map(Box::new))
        }
        Topic::Rollout(name, RolloutSubject::Lease) => News::Lease(name, !payload.is_empty()),
        _ => return None,
    })
}

fn channel(index: &Index, name: &ChannelName, payload: &Bytes, list: UpdateList) -> Channel {
    let size = size(index, &list);
    Channel { name: name.clone(), digest: Digest::of(payload), list: Arc::new(list), size }
}

/// Bytes of all packages of a list: as the list says, or else as the index has them.
#[must_use]
pub fn size(index: &Index, list: &UpdateList) -> u64 {
    let now = clock::now().unix_ms;
    let stored = |topic: &str| index.get(topic, now).ok().flatten().map(|message| message.payload.len());
    list.packages().map(|(id, size)| size.or_else(|| stored(&id.topic())).unwrap_or_default()).sum()
}
