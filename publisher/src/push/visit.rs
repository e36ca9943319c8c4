//! One device: asked how it stands, and told where its image is, over HTTP.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mpypi_protocol::{ChannelName, NodeId, list::Firmware, node::State, topic::NodeSubject};
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{
    Became, Target,
    courier::{Courier, Next, Seen, choose, state},
};
use crate::limits;

/// What is to be said of a device.
#[derive(Debug)]
pub(super) enum Word {
    /// To everybody: publish this, retained.
    Keep(NodeId, NodeSubject, Vec<u8>),
    /// To people.
    Told(NodeId, String),
}

/// One device while it is updated.
pub(super) struct Visit {
    pub(super) target: Target,
    pub(super) channel: ChannelName,
    pub(super) images: Arc<[Firmware]>,
    pub(super) sequence: Option<u64>,
    pub(super) gateway: String,
    pub(super) timeout: Duration,
    pub(super) agent: ureq::Agent,
    pub(super) say: mpsc::Sender<Word>,
    /// What was published last.
    pub(super) shown: Option<State>,
}

impl Visit {
    /// Tells the device where its image is, and watches it until it runs it.
    pub(super) async fn update(mut self) -> Became {
        let mut courier = Courier::default();
        let mut image: Option<Firmware> = None;
        let started = now();
        loop {
            let seen = look(&self.agent, &self.target.url).await;
            if image.is_none()
                && let Ok(seen) = &seen
            {
                let Some(found) = choose(&self.images, &seen.key) else {
                    return Became::NoImage { key: seen.key.clone() };
                };
                image = Some(found.clone());
            }
            let wanted = image.as_ref().map_or("", |image| &*image.version).to_owned();
            let is_late = now().duration_since(started) >= self.timeout;
            match courier.next(&wanted, seen.as_ref().map_err(String::as_str), is_late) {
                Next::End(became) => {
                    let seen = seen.ok();
                    if let (Became::Updated { .. }, Some(seen)) = (&became, &seen)
                        && let Ok(info) = seen.info(&self.target, &self.channel)
                    {
                        self.keep(NodeSubject::Info, info.to_bytes()).await;
                    }
                    self.show(state(seen.as_ref(), &wanted, self.sequence, Some(&became))).await;
                    return became;
                }
                Next::Order => {
                    let Some(image) = &image else { continue };
                    if let Err(reason) = self.order(image).await {
                        let became = Became::Failed { reason };
                        let state = state(seen.as_ref().ok(), &wanted, self.sequence, Some(&became));
                        self.show(state).await;
                        return became;
                    }
                }
                Next::Wait => {
                    if let Ok(seen) = &seen {
                        self.show(state(Some(seen), &wanted, self.sequence, None)).await;
                    }
                }
            }
            tokio::time::sleep(limits::DEVICE_POLL).await;
        }
    }

    /// Tells the device where the image is.
    async fn order(&self, image: &Firmware) -> Result<(), String> {
        self.tell(format!("update to {}", image.version)).await;
        let source = format!("{}/packages/{}", self.gateway, image.digest);
        let body = json!({ "url": source, "sha256": image.digest.to_string(), "version": image.version })
            .to_string();
        let (agent, url) = (self.agent.clone(), format!("{}/api/firmware/url", self.target.url));
        blocking(move || {
            let request = agent.post(&url).config().timeout_global(Some(limits::DEVICE)).build();
            let request = request.header("content-type", "application/json");
            let mut answer = request.send(&body).map_err(|error| error.to_string())?;
            let text = answer.body_mut().with_config().limit(limits::DEVICE_ANSWER).read_to_string();
            match answer.status().as_u16() {
                202 => Ok(()),
                code => Err(format!("it answers {code}: {}", text.unwrap_or_default())),
            }
        })
        .await
    }

    async fn show(&mut self, state: State) {
        if self.shown.as_ref() == Some(&state) {
            return;
        }
        if self.shown.as_ref().is_none_or(|shown| shown.phase != state.phase) {
            self.tell(state.phase.to_string()).await;
        }
        self.keep(NodeSubject::State, state.to_bytes()).await;
        self.shown = Some(state);
    }

    async fn keep(&self, subject: NodeSubject, payload: Vec<u8>) {
        self.word(Word::Keep(self.target.node.clone(), subject, payload)).await;
    }

    async fn tell(&self, text: String) {
        self.word(Word::Told(self.target.node.clone(), text)).await;
    }

    async fn word(&self, word: Word) {
        // Nobody listens any more if all of it is given up.
        let _ = self.say.send(word).await;
    }
}

/// Asks the device at `url` how it stands.
pub(super) async fn look(agent: &ureq::Agent, url: &str) -> Result<Seen, String> {
    let (agent, url) = (agent.clone(), format!("{url}/api/modules/Firmware"));
    blocking(move || {
        let request = agent.get(&url).config().timeout_global(Some(limits::DEVICE)).build();
        let mut answer = request.call().map_err(|error| error.to_string())?;
        let text = answer.body_mut().with_config().limit(limits::DEVICE_ANSWER).read_to_string();
        let text = text.map_err(|error| error.to_string())?;
        let module: Value =
            serde_json::from_str(&text).map_err(|_| "it does not speak projectMM".to_owned())?;
        Ok(Seen::of(&module))
    })
    .await
}

async fn blocking<T: Send + 'static>(
    ask: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    match spawn_blocking(ask).await {
        Ok(answer) => answer,
        Err(_) => Err("it was not asked".to_owned()),
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the driver's clock")]
fn now() -> Instant {
    Instant::now()
}
