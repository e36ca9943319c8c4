//! A device without a connection: the update and its store, together. Still no socket and no clock.

mod home;
mod local;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use mpypi_protocol::{
    ChannelName, NodeId, Runtime, Trust,
    key::Algorithm,
    node::{Info, Phase, Uname},
    tag,
};

pub use home::Mac;
pub use local::{FaceOptions, Status};

use self::local::Local;
use crate::{
    flash::Flash,
    limits,
    refusal::Refusal,
    store::{Boot, BootError, Committed, Store},
    update::{Action, Answer, Effect, Event, Report, Running, Start, Timing, Updater},
};

/// What this agent calls itself in `info`.
pub const AGENT: &str = concat!("mpypi-agent/", env!("CARGO_PKG_VERSION"));

/// The version of the system that it stands for.
pub(crate) const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// The agent on a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Agent {
    /// This one.
    #[default]
    Current,
    /// One from before rollouts, optional packages, revoked releases, epochs and roots. It passes over what it does not
    /// know: takes a release at once and with all its packages, and believes for ever the keys it was given.
    Old,
    /// Mpy-BLOX: see [`blox`](crate::blox).
    MpyBlox,
}

impl Agent {
    /// What reports call it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Agent::Current => "current",
            Agent::Old => "old",
            Agent::MpyBlox => "mpy-blox",
        }
    }

    /// What it calls itself in `info`, if it says so.
    #[must_use]
    pub fn said(self) -> Option<&'static str> {
        match self {
            Agent::Current => Some(AGENT),
            Agent::Old => Some("mpypi-agent/0.0"),
            Agent::MpyBlox => None,
        }
    }

    /// Whom it believes of those that it should. An old one knows no root: it was given the keys that a root names for
    /// its channel, as far as devices can verify with them.
    #[must_use]
    pub fn trust(self, trust: Trust, channel: &ChannelName) -> Trust {
        let (Agent::Old, Trust::Root(root)) = (self, &trust) else { return trust };
        let delegated = root.delegation(channel).map(|delegation| &delegation.keys);
        let keys = root.keys().iter().filter(|(id, key)| {
            key.algorithm() == Some(Algorithm::Rsa3072)
                && delegated.is_some_and(|keys| keys.iter().any(|other| other == *id))
        });
        Trust::Keys(Arc::new(keys.map(|(id, key)| (id.clone(), key.clone())).collect()))
    }
}

/// What a device is, as far as it matters to what it installs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hardware {
    /// `sysname` in its info: the platform that tags name.
    pub sysname: String,
    /// `sys.implementation._mpy` of its MicroPython; `None` where no `.mpy` file is loaded.
    pub mpy: Option<u32>,
    /// The agent on it.
    pub agent: Agent,
}

impl Default for Hardware {
    /// The platform `mpypi-sim`, which loads bytecode of MicroPython 1.19 and later, and no machine code.
    fn default() -> Self {
        Hardware { sysname: "mpypi-sim".into(), mpy: Some(6), agent: Agent::Current }
    }
}

impl Hardware {
    /// What wheels must fit.
    #[must_use]
    pub fn runtime(&self) -> Runtime {
        Runtime { mpy: self.mpy, platform: tag::platform(&self.sysname) }
    }
}

/// What a device was told about itself when it was set up, for rollouts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traits {
    /// Its labels, by name.
    pub labels: BTreeMap<String, String>,
    /// How far its local time is ahead of UTC, in minutes.
    pub utc_offset: Option<i32>,
}

/// A device.
#[derive(Debug)]
pub struct Device<F> {
    node: NodeId,
    channel: ChannelName,
    hardware: Hardware,
    traits: Traits,
    updater: Updater,
    store: Store<F>,
    /// What is chosen at the device, if anything can be.
    local: Option<Box<Local>>,
    /// If so, what that adds to what the device says of itself.
    face: Option<Vec<(String, serde_json::Value)>>,
    /// Phases of the update that tasks were not told about yet.
    phases: Vec<Phase>,
}

/// What a device wants from its connection.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Subscribe.
    Subscribe(Vec<String>),
    /// Unsubscribe.
    Unsubscribe(Vec<String>),
    /// Publish `info`.
    Introduce(Info),
    /// Publish `state`.
    Report(Report),
    /// Publish this, retained.
    Retain(String, Vec<u8>),
    /// Say something to people.
    Log(String),
    /// Nothing: a list, a root or a release was refused, for the reason of this word.
    Refused(String),
}

impl<F: Flash> Device<F> {
    /// The device `node`, which is to follow `channel`. It is off: [`start`](Device::start) comes before anything else.
    #[must_use]
    pub fn off(
        flash: F,
        node: &NodeId,
        channel: ChannelName,
        hardware: Hardware,
        timing: Timing,
        seed: u64,
    ) -> Device<F> {
        let updater = Updater::new(node, channel.clone(), hardware.runtime(), timing, seed);
        let updater = updater.of_agent(hardware.agent);
        Device {
            node: node.clone(),
            channel,
            hardware,
            traits: Traits::default(),
            updater,
            store: Store::off(flash),
            local: None,
            face: None,
            phases: Vec::new(),
        }
    }

    /// The same device, told about itself.
    #[must_use]
    pub fn with_traits(mut self, traits: Traits) -> Device<F> {
        self.updater.set_traits(traits.clone());
        self.traits = traits;
        self
    }

    /// The same device, which believes lists of nobody else.
    #[must_use]
    pub fn believing(self, trust: Trust) -> Device<F> {
        let trust = self.hardware.agent.trust(trust, &self.channel);
        Device { updater: self.updater.believing(trust), ..self }
    }

    /// The same device, with several addresses of its broker: see [`Updater::with_several`].
    #[must_use]
    pub fn with_several(self, several: bool) -> Device<F> {
        Device { updater: self.updater.with_several(several), ..self }
    }

    /// Whether the broker at which it is, one of several, is behind others.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.updater.is_behind()
    }

    /// Switches it on.
    ///
    /// # Errors
    /// See [`BootError`].
    pub fn start(&mut self, now: Duration) -> Result<Vec<Output>, BootError> {
        let boot = self.store.reboot()?;
        let mut outputs = Vec::new();
        self.update(now, self.booted(boot), &mut outputs)?;
        self.start_local(now, &mut outputs)?;
        Ok(outputs)
    }

    /// Takes an event in, does what it asks of the store, and says what it asks of the connection.
    ///
    /// # Errors
    /// The event led to a restart, and the device did not start.
    pub fn handle(&mut self, now: Duration, event: Event) -> Result<Vec<Output>, BootError> {
        let mut outputs = Vec::new();
        self.tell_local(now, &event, &mut outputs)?;
        self.update(now, event, &mut outputs)?;
        self.go_on(now, &mut outputs)?;
        Ok(outputs)
    }

    /// What an event does to the update and its store.
    fn update(&mut self, now: Duration, event: Event, outputs: &mut Vec<Output>) -> Result<(), BootError> {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for effect in self.updater.handle(now, event) {
                match effect {
                    Effect::Subscribe(filters) => outputs.push(Output::Subscribe(filters)),
                    Effect::Unsubscribe(filters) => outputs.push(Output::Unsubscribe(filters)),
                    Effect::Introduce => outputs.push(Output::Introduce(self.info())),
                    Effect::Report(report) => {
                        if self.face.is_some() {
                            self.phases.push(report.state.phase);
                        }
                        outputs.push(Output::Report(report));
                    }
                    Effect::Log(line) => outputs.push(Output::Log(line)),
                    Effect::Count(word) => outputs.push(Output::Refused(word)),
                    Effect::Restart => {
                        let boot = self.store.reboot()?;
                        events.push_back(self.booted(boot));
                    }
                    Effect::Store(action) => events.push_back(match self.act(action) {
                        Ok(answer) => Event::Done(answer),
                        Err(refusal) => Event::Failed(refusal),
                    }),
                }
            }
        }
        Ok(())
    }

    /// When to send [`Event::Tick`], at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let local = self.local.as_ref().and_then(|local| local.deadline());
        self.updater.deadline().into_iter().chain(local).min()
    }

    /// Where its update stands.
    #[must_use]
    pub fn report(&self) -> &Report {
        self.updater.report()
    }

    /// Its store.
    #[must_use]
    pub fn store(&self) -> &Store<F> {
        &self.store
    }

    /// Its flash, when it is taken apart.
    #[must_use]
    pub fn into_flash(self) -> F {
        self.store.into_flash()
    }

    fn booted(&self, boot: Boot) -> Event {
        let (seen, root) = (self.store.seen().cloned(), self.store.root().cloned());
        Event::Booted(Box::new(Start { boot, running: self.running(), seen, root }))
    }

    fn running(&self) -> Running {
        let installed = self.store.installed();
        Running {
            sequence: installed.sequence,
            version: installed.version.clone(),
            list: installed.list,
            rollout: installed.rollout.clone(),
            files: installed.files.len(),
        }
    }

    fn act(&mut self, action: Action) -> Result<Answer, Refusal> {
        Ok(match action {
            Action::Remember(seen) => {
                self.store.remember(seen)?;
                Answer::Noted
            }
            Action::KeepRoot(root) => Answer::RootKept(self.store.keep_root(&root).map(|()| root)),
            Action::Refuse(error) => {
                self.store.refuse(error)?;
                Answer::Noted
            }
            Action::Forgive => {
                self.store.forgive()?;
                Answer::Noted
            }
            Action::Discard => {
                self.store.discard()?;
                Answer::Noted
            }
            Action::Survey(release) => {
                let mut needs = self.store.survey(&release)?;
                if self.face.is_some() {
                    needs = local::from_shelf(&mut self.store, needs)?;
                }
                Answer::Surveyed(needs)
            }
            Action::Receive(item, payload) => {
                match item.chunk {
                    Some(number) => self.store.receive_chunk(&item.need, number, &payload)?,
                    None => {
                        let mut incoming = self.store.receive(item.need.clone())?;
                        for piece in payload.chunks(limits::PIECE) {
                            incoming.push(piece)?;
                        }
                        incoming.finish()?;
                    }
                }
                Answer::Received(item)
            }
            Action::Stage(release) => Answer::Staged(self.store.stage(&release)?),
            Action::Commit(staged) => match self.store.commit(staged)? {
                Committed::Unchanged => Answer::Kept(self.running()),
                Committed::Restart => Answer::Committed,
            },
            Action::Confirm => {
                self.store.confirm()?;
                Answer::Kept(self.running())
            }
            Action::GiveUp(reason) => {
                self.store.give_up(&reason)?;
                Answer::Noted
            }
        })
    }

    fn info(&self) -> Info {
        let wheels = &self.store.installed().wheels;
        Info {
            uname: Uname {
                sysname: self.hardware.sysname.clone(),
                machine: std::env::consts::ARCH.into(),
                version: FIRMWARE.into(),
            },
            versions: wheels.iter().map(|(name, wheel)| (name.clone(), wheel.version.clone())).collect(),
            channel: Some(self.channel.clone()),
            agent: self.hardware.agent.said().map(Into::into),
            free: self.store.flash().free().ok(),
            labels: self.traits.labels.clone(),
            utc_offset: self.traits.utc_offset,
            extra: {
                let mpy = self.hardware.mpy.map(|mpy| ("mpy".to_owned(), mpy.into()));
                mpy.into_iter().chain(self.face.iter().flatten().cloned()).collect()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::{Root, root::SignedRoot};

    use super::*;

    #[test]
    fn an_old_agent_believes_the_keys_that_a_root_names_for_its_channel_and_no_root() {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../../protocol/vectors/roots.json")).unwrap();
        let case =
            vectors["lists"].as_array().unwrap().iter().find(|case| case["refused"].is_null()).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let root = SignedRoot::parse(text(&vectors["roots"][text(&case["root"])]).as_bytes()).unwrap();
        let channel = ChannelName::new(text(&case["channel"])).unwrap();
        let pinned = Trust::Root(Root::pin(root).unwrap().into());
        assert!(matches!(Agent::Current.trust(pinned.clone(), &channel), Trust::Root(_)));
        let old = Agent::Old.trust(pinned, &channel);
        assert!(matches!(old, Trust::Keys(_)));
        let list = text(&case["text"]);
        assert!(old.verify(&channel, list.as_bytes(), None).is_ok());
    }
}
