//! A channel's history: what every list said that it had, to the letter, chained by `previous`.

use std::collections::BTreeMap;

use bytes::Bytes;
use mpypi_protocol::{ChannelName, Topic, UpdateList};

use crate::{
    limits,
    link::{Link, LinkError, Refusal, Signal},
    retained::{self, AskError},
};

/// Puts the list that is about to be replaced into the history, and clears what is too old. `next` is the sequence of the
/// list that replaces it. What a broker does not want to keep is a warning, and no reason not to publish.
///
/// # Errors
/// The connection failed.
pub async fn keep(
    link: &mut Link,
    channel: &ChannelName,
    present: Option<&Bytes>,
    next: u64,
) -> Result<Option<String>, AskError> {
    let Some(payload) = present else { return Ok(None) };
    let list = UpdateList::parse(payload).ok();
    let Some(sequence) = list.as_ref().and_then(UpdateList::release).map(|release| release.sequence) else {
        return Ok(None);
    };
    let mut old: Vec<u64> = sequence.checked_sub(limits::HISTORY).into_iter().collect();
    // Numbers were left out: what is too old is found by looking.
    if next.checked_sub(sequence) != Some(1) {
        let kept = read(link, channel).await?;
        old = kept.into_keys().filter(|kept| *kept != sequence).collect();
        old.truncate((old.len() + 1).saturating_sub(limits::HISTORY as usize));
    }
    let topic = channel.history(sequence);
    if !link.takes(&topic, payload.len() as u64) {
        let most = link.packet();
        return Ok(Some(format!(
            "release {sequence} does not become part of the history: the broker takes no packet of more than {most} bytes"
        )));
    }
    if let Err(refusal) = put(link, topic, payload.clone()).await? {
        return Ok(Some(format!("release {sequence} does not become part of the history: {refusal}")));
    }
    for sequence in old {
        // One that was not there, or may not go, harms nobody.
        let _ = put(link, channel.history(sequence), Bytes::new()).await?;
    }
    Ok(None)
}

/// The lists of a channel's history, by sequence.
///
/// # Errors
/// See [`AskError`].
pub async fn read(link: &mut Link, channel: &ChannelName) -> Result<BTreeMap<u64, Bytes>, AskError> {
    let found = retained::all(link, &[format!("{}/history/+", channel.topic())]).await?;
    let list = |(topic, payload): (String, Bytes)| match Topic::parse(&topic) {
        Ok(Topic::History(_, sequence)) if !payload.is_empty() => Some((sequence, payload)),
        _ => None,
    };
    Ok(found.into_iter().filter_map(list).collect())
}

/// Publishes one message and waits for what the broker says of it.
pub(crate) async fn put(
    link: &mut Link,
    topic: String,
    payload: Bytes,
) -> Result<Result<(), Refusal>, LinkError> {
    let number = link.publish(&topic, payload)?;
    loop {
        if let Signal::Acknowledged(done, result) = link.next().await?
            && done == number
        {
            return Ok(result.map(drop));
        }
    }
}
