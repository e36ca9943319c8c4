//! Firmware for devices that know no lists: projectMM's are told over HTTP where their image is, one after another, and are
//! watched until they run it. What they say of themselves is published as any node says it.

use std::{
    cmp::Ordering,
    fmt,
    time::{Duration, Instant},
};

use mpypi_client::{Brokers, args::TrustArgs, http, trust::TrustError};
use mpypi_protocol::{
    ChannelName, Entry, NodeId, UpdateList,
    list::Firmware,
    node::{Info, Phase, State, Uname},
    topic::NodeSubject,
};
use serde_json::{Map, Value, json};

use crate::{
    limits,
    link::{Link, LinkError, Signal},
    retained::{self, AskError},
};

/// What is pushed, and to whom.
#[derive(Debug, Clone)]
pub struct Options {
    /// The broker that has the channel, and is told of the devices.
    pub brokers: Brokers,
    /// The channel.
    pub channel: ChannelName,
    /// Where devices fetch packages from: below it is `/packages/<sha256>`.
    pub gateway: String,
    /// The devices, in the order in which they are updated.
    pub devices: Vec<Target>,
    /// Whom to trust where a device speaks HTTPS.
    pub trust: TrustArgs,
    /// How long a device may take.
    pub timeout: Duration,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// What it is called among the nodes.
    pub node: NodeId,
    /// Where it speaks HTTP, as `http://10.0.0.7`.
    pub url: String,
}

/// What became of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Became {
    /// It runs the new image.
    Updated {
        /// What it ran before.
        from: String,
        /// What it runs now.
        to: String,
    },
    /// It runs what the channel has, or something newer.
    UpToDate {
        /// Which.
        version: String,
    },
    /// The channel has nothing for its hardware.
    NoImage {
        /// Its hardware.
        key: String,
    },
    /// It does not run the new image.
    Failed {
        /// Why.
        reason: String,
    },
}

/// Nothing can be pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The broker cannot be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The connection to it ended.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The channel has no list that can be read, or no firmware in it.
    #[error("channel `{0}` has no firmware")]
    NoFirmware(ChannelName),
    /// A file about trust cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The broker does not let this user say how devices stand.
    #[error("the broker does not let this user write `{topic}`: {reason}")]
    NotAllowed {
        /// The topic.
        topic: String,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for Became {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Became::Updated { from, to } => write!(f, "updated from {from} to {to}"),
            Became::UpToDate { version } => write!(f, "up to date at {version}"),
            Became::NoImage { key } => write!(f, "the channel has no image for `{key}`"),
            Became::Failed { reason } => write!(f, "failed: {reason}"),
        }
    }
}

impl Became {
    /// Whether all is as it should be.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self, Became::Updated { .. } | Became::UpToDate { .. })
    }
}

/// How a device says it stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Seen {
    version: String,
    key: String,
    status: String,
    is_error: bool,
    done: u64,
    total: u64,
}

/// What follows from how a device stands.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Tell it where the image is.
    Order,
    /// Look again.
    Wait,
    /// It is over.
    End(Became),
}

/// The update of one device: what it ran before, and whether it was told.
#[derive(Debug, Default)]
struct Courier {
    before: Option<String>,
    ordered: bool,
}

impl Courier {
    /// What follows from how the device stands, or why it did not say, when it should run `wanted`.
    fn next(&mut self, wanted: &str, seen: Result<&Seen, &str>, is_late: bool) -> Next {
        let end = |reason: String| Next::End(Became::Failed { reason });
        let seen = match seen {
            Ok(seen) => seen,
            // It restarts.
            Err(_) if self.ordered && !is_late => return Next::Wait,
            Err(problem) => return end(problem.to_owned()),
        };
        let before = self.before.get_or_insert_with(|| seen.version.clone());
        if self.ordered {
            return match seen.status.as_str() {
                _ if seen.is_error => end(seen.status.clone()),
                "" if seen.version == wanted => {
                    Next::End(Became::Updated { from: before.clone(), to: seen.version.clone() })
                }
                _ if is_late => end(format!("it still runs {} and says `{}`", seen.version, seen.status)),
                _ => Next::Wait,
            };
        }
        if compare(&seen.version, wanted) != Ordering::Less {
            return Next::End(Became::UpToDate { version: seen.version.clone() });
        }
        self.ordered = true;
        Next::Order
    }
}

/// Pushes the channel's firmware to each device in turn; `told` hears how it goes.
///
/// # Errors
/// See [`PushError`]. That a device fails is none.
pub async fn push(
    options: &Options,
    told: &mut (dyn FnMut(&NodeId, &str) + Send),
) -> Result<Vec<(NodeId, Became)>, PushError> {
    let mut link = Link::connect_any(&options.brokers).await?;
    let list = retained::list(&mut link, &options.channel).await?;
    let list = list.and_then(|payload| UpdateList::parse(&payload).ok()).unwrap_or_default();
    let images: Vec<_> = list
        .entries()
        .iter()
        .filter_map(|entry| match entry {
            Entry::Firmware(image) if !image.is_optional() => Some(image.clone()),
            _ => None,
        })
        .collect();
    if images.is_empty() {
        return Err(PushError::NoFirmware(options.channel.clone()));
    }
    let agent = http::agent(&options.trust, 0)?;
    let mut results = Vec::new();
    for target in &options.devices {
        let mut visit = Visit { options, target, agent: &agent, link: &mut link, shown: None, told };
        let became = visit.update(&images).await?;
        results.push((target.node.clone(), became));
    }
    link.close().await;
    Ok(results)
}

/// One device while it is updated.
struct Visit<'a> {
    options: &'a Options,
    target: &'a Target,
    agent: &'a ureq::Agent,
    link: &'a mut Link,
    /// What was published last.
    shown: Option<State>,
    told: &'a mut (dyn FnMut(&NodeId, &str) + Send),
}

impl Visit<'_> {
    async fn update(&mut self, images: &[Firmware]) -> Result<Became, PushError> {
        let mut courier = Courier::default();
        let mut image = None;
        let started = now();
        loop {
            let seen = self.look().await;
            if image.is_none()
                && let Ok(seen) = &seen
            {
                self.introduce(seen).await?;
                let Some(found) = choose(images, &seen.key) else {
                    return Ok(Became::NoImage { key: seen.key.clone() });
                };
                image = Some(found);
            }
            let wanted = image.map_or("", |image| &*image.version);
            let is_late = now().duration_since(started) >= self.options.timeout;
            match courier.next(wanted, seen.as_ref().map_err(|problem| problem.as_str()), is_late) {
                Next::End(became) => {
                    if let (Became::Updated { .. }, Ok(seen)) = (&became, &seen) {
                        self.introduce(seen).await?;
                    }
                    self.show(state(seen.as_ref().ok(), wanted, Some(&became))).await?;
                    return Ok(became);
                }
                Next::Order => {
                    let Some(image) = image else { continue };
                    if let Err(reason) = self.order(image).await {
                        let became = Became::Failed { reason };
                        self.show(state(seen.as_ref().ok(), wanted, Some(&became))).await?;
                        return Ok(became);
                    }
                }
                Next::Wait => {
                    if seen.is_ok() {
                        self.show(state(seen.as_ref().ok(), wanted, None)).await?;
                    }
                }
            }
            // What the broker says meanwhile is nothing that was asked.
            self.link.next_within(limits::DEVICE_POLL).await?;
        }
    }

    /// Asks the device how it stands.
    async fn look(&self) -> Result<Seen, String> {
        let (agent, url) = (self.agent.clone(), format!("{}/api/modules/Firmware", self.target.url));
        let ask = move || {
            let request = agent.get(&url).config().timeout_global(Some(limits::DEVICE)).build();
            let mut answer = request.call().map_err(|error| error.to_string())?;
            let text = answer.body_mut().with_config().limit(limits::DEVICE_ANSWER).read_to_string();
            let text = text.map_err(|error| error.to_string())?;
            let module: Value =
                serde_json::from_str(&text).map_err(|_| "it does not speak projectMM".to_owned())?;
            Ok(seen(&module))
        };
        blocking(ask).await
    }

    /// Tells the device where the image is.
    async fn order(&mut self, image: &Firmware) -> Result<(), String> {
        (self.told)(&self.target.node, &format!("update to {}", image.version));
        let source = format!("{}/packages/{}", self.options.gateway.trim_end_matches('/'), image.digest);
        let body = json!({ "url": source, "sha256": image.digest.to_string(), "version": image.version })
            .to_string();
        let (agent, url) = (self.agent.clone(), format!("{}/api/firmware/url", self.target.url));
        let ask = move || {
            let request = agent.post(&url).config().timeout_global(Some(limits::DEVICE)).build();
            let request = request.header("content-type", "application/json");
            let mut answer = request.send(&body).map_err(|error| error.to_string())?;
            let text = answer.body_mut().with_config().limit(limits::DEVICE_ANSWER).read_to_string();
            match answer.status().as_u16() {
                202 => Ok(()),
                code => Err(format!("it answers {code}: {}", text.unwrap_or_default())),
            }
        };
        blocking(ask).await
    }

    async fn introduce(&mut self, seen: &Seen) -> Result<(), PushError> {
        let mut extra = Map::new();
        extra.insert("firmware".to_owned(), seen.version.clone().into());
        extra.insert("firmware_key".to_owned(), seen.key.clone().into());
        let mut info = json!({
            "uname": Uname { sysname: "projectMM".into(), machine: seen.key.clone(), version: seen.version.clone() },
            "versions": {},
            "channel": self.options.channel,
            "agent": "projectMM",
        });
        if let Some(info) = info.as_object_mut() {
            info.extend(extra);
        }
        let info = Info::parse(info.to_string().as_bytes())
            .map_err(|_| PushError::NoFirmware(self.options.channel.clone()))?;
        self.keep(NodeSubject::Info, info.to_bytes()).await?;
        self.keep(NodeSubject::Online, b"1".to_vec()).await
    }

    async fn show(&mut self, state: State) -> Result<(), PushError> {
        if self.shown.as_ref() == Some(&state) {
            return Ok(());
        }
        (self.told)(&self.target.node, &state.phase.to_string());
        self.keep(NodeSubject::State, state.to_bytes()).await?;
        self.shown = Some(state);
        Ok(())
    }

    async fn keep(&mut self, subject: NodeSubject, payload: Vec<u8>) -> Result<(), PushError> {
        let topic = self.target.node.topic(subject);
        let number = self.link.publish(&topic, payload.into())?;
        loop {
            match self.link.next().await? {
                Signal::Acknowledged(done, Ok(_)) if done == number => return Ok(()),
                Signal::Acknowledged(done, Err(refusal)) if done == number => {
                    return Err(PushError::NotAllowed { topic, reason: refusal.to_string() });
                }
                _ => {}
            }
        }
    }
}

/// The newest image for this hardware.
fn choose<'a>(images: &'a [Firmware], key: &str) -> Option<&'a Firmware> {
    images
        .iter()
        .filter(|image| image.fits(Some(key)))
        .max_by(|one, other| compare(&one.version, &other.version))
}

/// By semver 2.0.0, §11; versions that are none are as good as each other, and worse than any.
fn compare(one: &str, other: &str) -> Ordering {
    let [one, other] = [one, other].map(|version| semver::Version::parse(version).ok());
    match (one, other) {
        (Some(one), Some(other)) => one.cmp_precedence(&other),
        // Whatever it runs, it is to run what the channel has.
        (None, _) => Ordering::Less,
        (Some(_), None) => Ordering::Less,
    }
}

fn seen(module: &Value) -> Seen {
    let control = |name: &str| {
        let controls = module["controls"].as_array().into_iter().flatten();
        controls.into_iter().find(|control| control["name"] == name).cloned().unwrap_or_default()
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let progress = control("update_pct");
    Seen {
        version: text(&control("version")["value"]),
        key: text(&control("firmware")["value"]),
        status: text(&module["status"]),
        is_error: module["severity"] == "error",
        done: progress["value"].as_u64().unwrap_or_default(),
        total: progress["total"].as_u64().unwrap_or_default(),
    }
}

/// What a node would say.
fn state(seen: Option<&Seen>, wanted: &str, became: Option<&Became>) -> State {
    let seen = seen.cloned().unwrap_or_default();
    let (phase, version, error) = match became {
        Some(Became::Failed { reason }) => (Phase::Failed, wanted, Some(format!("push: {reason}"))),
        Some(_) => (Phase::Idle, &*seen.version, None),
        None => match seen.status.as_str() {
            "flashing" => (Phase::Installing, wanted, None),
            "rebooting" => (Phase::Restarting, wanted, None),
            _ => (Phase::Downloading, wanted, None),
        },
    };
    State {
        phase,
        sequence: None,
        version: Some(version.to_owned()).filter(|version| !version.is_empty()),
        done: seen.done,
        total: seen.total,
        error,
        attempt: 0,
        held: None,
        extra: Map::new(),
    }
}

async fn blocking<T: Send + 'static>(
    ask: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(ask).await {
        Ok(answer) => answer,
        Err(_) => Err("it was not asked".to_owned()),
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the driver's clock")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(target: Option<&str>, version: &str) -> Firmware {
        Firmware {
            name: "x".into(),
            version: version.into(),
            target: target.map(str::to_owned),
            digest: mpypi_protocol::Digest::EMPTY,
            size: None,
            extra: Map::new(),
        }
    }

    fn says(version: &str, status: &str) -> Seen {
        let is_error = status.starts_with("error");
        Seen { version: version.into(), status: status.into(), is_error, ..Seen::default() }
    }

    #[test]
    fn a_device_takes_the_newest_image_for_its_board() {
        let images = [
            image(Some("esp32"), "3.0.0"),
            image(Some("esp32-eth"), "3.0.1-dev.2"),
            image(Some("esp32s3"), "9.0.0"),
        ];
        assert_eq!(choose(&images, "esp32-eth").unwrap().version, "3.0.1-dev.2");
        assert_eq!(choose(&images, "").unwrap().version, "9.0.0", "who does not say takes any");
        assert!(choose(&images, "esp8266").is_none());
    }

    #[test]
    fn a_device_is_told_once_and_watched_until_it_runs_what_it_should() {
        let mut courier = Courier::default();
        assert_eq!(courier.next("3.0.1", Ok(&says("3.0.0", "")), false), Next::Order);
        for status in ["starting", "downloading", "flashing", "rebooting"] {
            assert_eq!(courier.next("3.0.1", Ok(&says("3.0.0", status)), false), Next::Wait);
        }
        assert_eq!(courier.next("3.0.1", Err("it restarts"), false), Next::Wait);
        let updated = Became::Updated { from: "3.0.0".into(), to: "3.0.1".into() };
        assert_eq!(courier.next("3.0.1", Ok(&says("3.0.1", "")), false), Next::End(updated));
    }

    #[test]
    fn what_keeps_a_device_from_it_is_told() {
        let failed = |reason: &str| Next::End(Became::Failed { reason: reason.into() });
        let error = says("3.0.0", "error: incomplete download");
        let mut courier = Courier { before: None, ordered: true };
        assert_eq!(courier.next("3.0.1", Ok(&error), false), failed("error: incomplete download"));
        assert_eq!(courier.next("3.0.1", Err("gone"), true), failed("gone"));
        let old = says("3.0.0", "");
        assert_eq!(courier.next("3.0.1", Ok(&old), true), failed("it still runs 3.0.0 and says ``"));
        assert_eq!(Courier::default().next("3.0.1", Err("gone"), false), failed("gone"));
        let newer = Became::UpToDate { version: "3.1.0".into() };
        assert_eq!(Courier::default().next("3.0.1", Ok(&says("3.1.0", "")), false), Next::End(newer));
    }
}
