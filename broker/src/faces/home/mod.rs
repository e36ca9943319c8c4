//! Home Assistant: every node is an update there, found by MQTT discovery.
//!
//! For each node that says what it is or where it stands, two retained messages say to Home Assistant's MQTT integration what it
//! has, what its channel has, and how far it is; a node that is forgotten is taken back there. Its button orders on the node's own
//! `cmd`, so it may do what whoever Home Assistant logs in as may do, and no more.
//!
//! `thing` holds the policy; here is its driver, which tells each node's news at most every `PACE`.

mod thing;

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
pub use thing::House;
use tokio::{task::spawn_blocking, time::sleep};

use crate::{
    clock,
    connection::Shared,
    index::IndexError,
    listener::Listener,
    mailbox::{Mail, Mailbox},
    message::Message,
    packet::SubscriptionOptions,
    sys,
};

/// Where Home Assistant looks for what there is, unless it was told otherwise.
pub const PREFIX: &str = "homeassistant";
/// The least time between two states of one node: Home Assistant writes down each.
const PACE: Duration = Duration::from_secs(1);
/// How long to wait after a failure of the index.
const PAUSE: Duration = Duration::from_secs(10);

/// What Home Assistant is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// Where it looks for what there is: [`PREFIX`].
    pub prefix: String,
    /// Where a browser finds this broker, for links, as `http://hub.local:8080`.
    pub url: Option<String>,
}

/// Tells Home Assistant of all nodes, until dropped; of none, if it is not to know of any.
pub async fn keep(shared: Arc<Shared>) {
    let Some(home) = shared.home.clone() else {
        // What an earlier start said there is not so any more.
        let reader = shared.clone();
        let work = move || {
            let mut house = House::new(PREFIX, None);
            read(&reader, &mut house, 0, 0..2).map(|()| house.news())
        };
        match spawn_blocking(work).await {
            Ok(Ok(news)) => tell(&shared, news).await,
            Ok(Err(error)) => tracing::error!(%error, "cannot take back what Home Assistant was told"),
            Err(_) => {}
        }
        return;
    };
    // What was said before is only read.
    let filters = House::new(&home.prefix, home.url.as_deref()).filters().into_iter().skip(2);
    let (options, mailbox) = (SubscriptionOptions::LIVE, Arc::new(Mailbox::new(&shared.limits)));
    let listener = Listener::new(&shared.subscriptions, &shared.tickets, filters, options, mailbox);
    loop {
        match follow(&shared, &home, listener.mailbox()).await {
            Ok(()) => sleep(PACE).await,
            Err(error) => {
                tracing::error!(%error, "cannot tell Home Assistant of the nodes");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Reads everything and goes on with what changes, until something was missed for good.
async fn follow(shared: &Arc<Shared>, home: &Home, mailbox: &Mailbox) -> Result<(), IndexError> {
    mailbox.open();
    let mut house = House::new(&home.prefix, home.url.as_deref());
    let mut changes = vec![Change::Since(0)];
    loop {
        let reader = shared.clone();
        let work = move || {
            let taken = changes.into_iter().try_for_each(|change| take(&reader, &mut house, change));
            taken.map(|()| (house.news(), house))
        };
        let news;
        (news, house) = match spawn_blocking(work).await {
            Ok(done) => done?,
            // The runtime stops, or the work panicked, which is in the log.
            Err(_) => return Ok(()),
        };
        tell(shared, news).await;
        sleep(PACE).await;
        if mailbox.is_empty() {
            mailbox.arrived().await;
        }
        changes = Vec::new();
        while let Some(mail) = mailbox.pop() {
            match mail {
                Mail::Delivery(delivery) => changes.push(Change::Message(delivery.message)),
                Mail::Lagging(version) => changes.push(Change::Since(version)),
                Mail::Queued => {}
                Mail::Overflow => return Ok(()),
            }
        }
    }
}

async fn tell(shared: &Shared, news: Vec<(String, Bytes)>) {
    for (topic, payload) in news {
        sys::retain(shared, &topic, payload).await;
    }
}

enum Change {
    Message(Arc<Message>),
    /// Everything in the index that is newer than this version.
    Since(u64),
}

fn take(shared: &Shared, house: &mut House, change: Change) -> Result<(), IndexError> {
    match change {
        // What is not retained says nothing of how things stand.
        Change::Message(message) if !message.retain => Ok(()),
        Change::Message(message) => {
            house.take(&message.topic, &shared.index.payload(&message.payload)?);
            Ok(())
        }
        Change::Since(0) => read(shared, house, 0, 0..6),
        // What was said since, was said here.
        Change::Since(version) => read(shared, house, version, 2..6),
    }
}

/// Reads what some of the filters match, and is newer than `version`.
fn read(shared: &Shared, house: &mut House, version: u64, filters: Range<usize>) -> Result<(), IndexError> {
    let now_ms = clock::now().unix_ms;
    for filter in &house.filters()[filters] {
        shared.index.each(filter, version, now_ms, 1, |message| {
            house.take(&message.topic, &shared.index.payload(&message.payload)?);
            Ok::<_, IndexError>(())
        })?;
    }
    Ok(())
}
