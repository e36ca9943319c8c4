//! Tells devices without a clock what time it is.
//!
//! Such a device publishes a nonce that it just made up; the answer names it and the device, and is signed by a key that
//! the root delegates to the channel `time`. An answer kept back, or made for another device, is of no use to anybody.

use std::convert::Infallible;

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_client::Brokers;
use mpypi_protocol::{
    ChannelName, KeyId, NodeId, Topic, limits as wire,
    signed::{Distrust, TIME_CHANNEL, TimeAnswer},
    topic::NodeSubject,
};

use crate::{
    limits,
    link::{Link, LinkError, Refusal, Signal},
    publish::backoff,
    retained::{self, AskError},
    signing::{Authority, Signing, SigningError},
};

/// What devices ask on.
const CHALLENGES: &str = "mpypi/nodes/+/challenge";

/// What happens meanwhile, for people.
#[derive(Debug)]
pub enum Event<'a> {
    /// Devices are answered from now on.
    Listening {
        /// The key that signs.
        key: &'a KeyId,
    },
    /// A device was told.
    Told(&'a TimeAnswer),
    /// What came is no challenge.
    Ignored {
        /// Where.
        topic: &'a str,
        /// Why not.
        why: &'static str,
    },
    /// The broker does not carry an answer.
    Refused(&'a Refusal),
    /// The connection was lost; it is tried again after a pause.
    Lost {
        /// Why.
        error: &'a LinkError,
        /// The pause.
        pause: std::time::Duration,
    },
}

/// Why nobody is told any more.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// The broker cannot be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// Nobody here may sign.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// The root names nobody, or nobody who is here.
    #[error("no key here may say what time it is")]
    Nobody,
    /// The root, or what it delegates, has expired.
    #[error("devices would not believe it: {0}")]
    Expired(Distrust),
}

impl From<LinkError> for ClockError {
    fn from(error: LinkError) -> Self {
        ClockError::Ask(error.into())
    }
}

impl ClockError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            ClockError::Ask(error) => error.hint(),
            ClockError::Signing(error) => error.hint(),
            ClockError::Nobody | ClockError::Expired(_) => Some(
                "`mpypi keys delegate time --key clock`, then `mpypi keys root sign` and `mpypi keys root publish`"
                    .to_owned(),
            ),
        }
    }
}

/// What to answer to a message on `topic`, at time `now`.
///
/// # Errors
/// Says why it is no challenge.
pub fn answer(topic: &str, payload: &[u8], now: Timestamp) -> Result<TimeAnswer, &'static str> {
    let Ok(Topic::Node(node, NodeSubject::Challenge)) = Topic::parse(topic) else {
        return Err("no node can be told there");
    };
    let is_nonce =
        (1..=wire::NONCE).contains(&payload.len()) && payload.iter().all(|digit| digit.is_ascii_hexdigit());
    match std::str::from_utf8(payload) {
        Ok(nonce) if is_nonce => Ok(TimeAnswer { node, nonce: nonce.to_owned(), time: now }),
        _ => Err("a challenge is a nonce in hexadecimal"),
    }
}

/// Answers devices until it is dropped, over as many connections as it takes.
///
/// # Errors
/// Nobody here may sign, or the broker was never reached.
pub async fn serve(
    brokers: &Brokers,
    signing: &Signing,
    observe: &mut impl FnMut(Event<'_>),
) -> Result<Infallible, ClockError> {
    let mut losses = 0;
    let mut was_connected = false;
    loop {
        let error = match Link::connect_any(brokers).await {
            Ok(link) => {
                (was_connected, losses) = (true, 0);
                match on(link, signing, observe).await {
                    Err(ClockError::Ask(AskError::Link(error))) if error.is_passing() => error,
                    ended => return ended,
                }
            }
            // Never reached: the user is there and can do something about it now.
            Err(error) if was_connected && error.is_passing() => error,
            Err(error) => return Err(error.into()),
        };
        losses += 1;
        let pause = backoff(losses);
        observe(Event::Lost { error: &error, pause });
        tokio::time::sleep(pause).await;
    }
}

/// Answers those who ask on one connection.
async fn on(
    mut link: Link,
    signing: &Signing,
    observe: &mut impl FnMut(Event<'_>),
) -> Result<Infallible, ClockError> {
    let channel = ChannelName::new(TIME_CHANNEL).map_err(|_| ClockError::Nobody)?;
    let (_, roots) = retained::channel(&mut link, &channel).await?;
    let (authority, signing) = Authority::any(signing, &channel, None, &roots, now())?;
    let key = authority.key.as_ref().ok_or(ClockError::Nobody)?;
    let may_sign = |time| authority.trust.may_sign(&channel, key.id.as_str(), Some(time));
    link.subscribe(&[CHALLENGES.to_owned()]);
    loop {
        match link.next_within(limits::SILENCE).await? {
            Some(Signal::Subscribed(accepted)) if !accepted.contains(&true) => {
                return Err(AskError::Refused { topic: CHALLENGES.to_owned() }.into());
            }
            Some(Signal::Subscribed(_)) => observe(Event::Listening { key: &key.id }),
            Some(Signal::Message { topic, payload }) => {
                let time = now();
                may_sign(time).map_err(ClockError::Expired)?;
                match answer(&topic, &payload, time) {
                    Ok(answer) => {
                        tell(&mut link, &authority, &signing, &answer).await?;
                        observe(Event::Told(&answer));
                    }
                    // A topic is cleared with an empty message: nobody asks.
                    Err(why) if !payload.is_empty() => observe(Event::Ignored { topic: &topic, why }),
                    Err(_) => {}
                }
            }
            Some(Signal::Acknowledged(_, Err(refusal))) => observe(Event::Refused(&refusal)),
            Some(Signal::Acknowledged(_, Ok(_)) | Signal::Unsubscribed) | None => {}
        }
    }
}

async fn tell(
    link: &mut Link,
    authority: &Authority,
    signing: &Signing,
    answer: &TimeAnswer,
) -> Result<(), ClockError> {
    let mut unsigned = answer.covered();
    unsigned.push(b']');
    let signed = authority.sign(signing, &Bytes::from(unsigned)).await?;
    link.tell(&answer.node.topic(NodeSubject::Time), signed)?;
    Ok(())
}

/// In whole seconds: devices count no smaller ones.
fn now() -> Timestamp {
    #[expect(clippy::disallowed_methods, reason = "this is the clock that others go by")]
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// Whom an answer is for, for people.
#[must_use]
pub fn sentence(node: &NodeId, time: Timestamp) -> String {
    format!("{node} was told that it is {time}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_on_a_nodes_topic_is_answered_and_nothing_else() {
        let now: Timestamp = "2026-11-28T12:00:00Z".parse().unwrap();
        let told = answer("mpypi/nodes/board/challenge", b"00ff", now).unwrap();
        assert_eq!((told.node.as_str(), told.nonce.as_str(), told.time), ("board", "00ff", now));
        let long = "0".repeat(wire::NONCE + 1);
        for (topic, payload) in [
            ("mpypi/nodes/board/challenge", &b""[..]),
            ("mpypi/nodes/board/challenge", b"no hex"),
            ("mpypi/nodes/board/challenge", long.as_bytes()),
            ("mpypi/nodes/board/challenge", b"\xff\xfe"),
            ("mpypi/nodes/board/time", b"00ff"),
            ("mpypi/channels/dev", b"00ff"),
        ] {
            assert!(answer(topic, payload, now).is_err(), "{topic} {payload:?}");
        }
    }
}
