//! What is chosen at the device: tasks and firmware beside the update, and answers to who asks. Files, but still no socket
//! and no clock.

use std::{collections::VecDeque, io, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::Digest;
use serde::Serialize;

use super::{Device, Mac, Output};
use crate::{
    accept::Accepted,
    apps::{self, Apps, Effect, LOGS, RECORD, SHELF, Sight, What},
    face::desk::{Ask, FlashAsk},
    firmware::{Firmware, FirmwareOptions, Origin, Stage, Ticked, cause},
    flash::{self, Flash, Kind as FileKind},
    journal, limits, parts,
    refusal::Refusal,
    slots::{SlotBoot, SlotError},
    store::{BootError, Need, Store},
    update::{Event, Source, Updater},
    window::Item,
};

/// The list that is offered, as the channel had it: what there is to choose from outlives a restart.
const OFFER: &str = ".mpypi/offer.json";

/// What is chosen at a device, and what its firmware is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FaceOptions {
    /// Whether the channel's list only says what there is, and somebody at the device chooses.
    pub asks: bool,
    /// Its firmware.
    pub firmware: FirmwareOptions,
    /// By which Home Assistant is to know it, if it is.
    pub mac: Option<Mac>,
}

/// The firmware, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The version that runs.
    pub version: String,
    /// What it was built from.
    pub build: String,
    /// The hardware it is for.
    pub key: String,
    /// Bytes of the image that runs, and of the slot it is in.
    pub partition: (u64, u64),
    /// Bytes of the new one that have come, and of how many.
    pub progress: (u64, u64),
    /// Where its update stands; `None` if nothing is under way.
    pub status: Option<String>,
    /// Whether that is an error.
    pub is_error: bool,
    /// Whether another update cannot start now.
    pub is_busy: bool,
    /// Whether it has slots at all.
    pub is_supported: bool,
    /// The newest image that the channel has for it.
    pub latest: Option<String>,
}

/// What is chosen at the device.
#[derive(Debug)]
pub(super) struct Local {
    apps: Apps,
    firmware: Firmware,
    /// When, and what the clock said then.
    clock: (Duration, Timestamp),
    mac: Option<Mac>,
    /// What Home Assistant was told last.
    told: Option<Vec<u8>>,
    /// The channel's list that came last.
    latest: Option<Bytes>,
    /// The list that is kept, or could not be.
    kept: Option<Digest>,
}

impl Local {
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.apps.deadline().into_iter().chain(self.firmware.deadline()).min()
    }

    /// What is added to what the device says of itself.
    fn info(&self) -> Vec<(String, serde_json::Value)> {
        let running = self.firmware.slots().running();
        let mut info = vec![("firmware".to_owned(), running.version.clone().into())];
        info.extend(self.firmware.options().key.clone().map(|key| ("firmware_key".to_owned(), key.into())));
        info
    }

    fn wall(&self, now: Duration) -> String {
        let (then, wall) = self.clock;
        let passed = jiff::SignedDuration::try_from(now.saturating_sub(then)).unwrap_or_default();
        wall.saturating_add(passed).unwrap_or(wall).strftime("%Y-%m-%d %H:%M:%S").to_string()
    }
}

/// What of `needs` is not on the shelf; what is, is taken from there.
pub(super) fn from_shelf<F: Flash>(store: &mut Store<F>, needs: Vec<Need>) -> Result<Vec<Need>, Refusal> {
    let mut left = Vec::new();
    for need in needs {
        if !store.adopt(&need, &on_shelf(need.id.digest()))? {
            left.push(need);
        }
    }
    Ok(left)
}

fn on_shelf(digest: &Digest) -> String {
    format!("{SHELF}/{digest}")
}

/// Where the chunks of a package are that have come.
fn in_chunks(digest: &Digest) -> String {
    format!("{}{}", on_shelf(digest), parts::END)
}

fn log_of(task: u64) -> String {
    format!("{LOGS}/{task}.log")
}

impl<F: Flash> Device<F> {
    /// The same device, at which packages can be chosen and firmware replaced. Its clock says `wall` at `now`.
    #[must_use]
    pub fn with_face(
        mut self,
        options: FaceOptions,
        confirm_after: Option<Duration>,
        wall: (Duration, Timestamp),
    ) -> Self {
        self.updater = self.updater.asking(options.asks);
        let firmware = Firmware::off(options.firmware, confirm_after);
        self.face = Some(Vec::new());
        self.local = Some(Box::new(Local {
            apps: Apps::new(options.asks),
            firmware,
            clock: wall,
            mac: options.mac,
            told: None,
            latest: None,
            kept: None,
        }));
        self
    }

    /// The device starts.
    pub(super) fn start_local(&mut self, now: Duration, outputs: &mut Vec<Output>) -> Result<(), BootError> {
        let Some(mut local) = self.local.take() else { return Ok(()) };
        if let Some(payload) = journal::read_list(self.store.flash(), OFFER)?
            && self.updater.recall(&payload, Some(local.clock.1))
        {
            local.kept = Some(Digest::of(&payload));
        }
        let started = self.boot_local(&mut local, now, true, outputs);
        self.local = Some(local);
        started?;
        self.go_on(now, outputs)
    }

    fn boot_local(
        &mut self,
        local: &mut Local,
        now: Duration,
        is_cold: bool,
        outputs: &mut Vec<Output>,
    ) -> Result<(), BootError> {
        let flash = self.store.flash_mut();
        for folder in [LOGS, SHELF] {
            if flash.kind(folder)?.is_none() {
                flash.make_folder(folder)?;
                flash.sync(journal::FOLDER)?;
            }
        }
        if let SlotBoot::RolledBack { reason } = local.firmware.boot(now, flash)? {
            outputs.push(Output::Log(format!("the new firmware was given up: {reason}")));
        }
        self.face = Some(local.info());
        let record = if is_cold { journal::read_record(self.store.flash(), RECORD)? } else { None };
        let effects = self.with_sight(local, now, |apps, sight| apps.booted(record, sight));
        self.perform(local, now, effects, outputs)
    }

    /// What came in, as far as it matters to tasks.
    pub(super) fn tell_local(
        &mut self,
        now: Duration,
        event: &Event,
        outputs: &mut Vec<Output>,
    ) -> Result<(), BootError> {
        let Some(mut local) = self.local.take() else { return Ok(()) };
        if let Event::List { source: Source::Channel, payload, .. } = event {
            local.latest = Some(payload.clone());
        }
        let effects = self.with_sight(&mut local, now, |apps, sight| match event {
            Event::Package { topic, payload } => apps.package(topic, payload, sight),
            Event::SubscriptionRefused { filter } => apps.refused(filter, sight),
            Event::Connected => apps.connected(sight),
            Event::Disconnected => apps.disconnected(),
            Event::WantsFirmware => apps.order_newest_firmware(sight),
            _ => Vec::new(),
        });
        if let (Event::Connected, Some(mac)) = (event, &local.mac) {
            let (topic, payload) = mac.discovery(&self.node);
            outputs.push(Output::Retain(topic, payload));
            outputs.push(Output::Subscribe(vec![mac.set()]));
            local.told = None;
        }
        let done = self.perform(&mut local, now, effects, outputs);
        self.local = Some(local);
        done
    }

    /// Goes on with tasks and firmware until there is nothing to do now.
    pub(super) fn go_on(&mut self, now: Duration, outputs: &mut Vec<Output>) -> Result<(), BootError> {
        let Some(mut local) = self.local.take() else { return Ok(()) };
        let done = self.go_on_with(&mut local, now, outputs);
        self.keep_offer(&mut local, outputs);
        if let Some(mac) = local.mac.clone().filter(|_| self.updater.is_connected()) {
            let (topic, payload) = mac.state(&self.status(&mut local, now));
            if local.told.as_ref() != Some(&payload) {
                local.told = Some(payload.clone());
                outputs.push(Output::Retain(topic, payload));
            }
        }
        self.local = Some(local);
        done
    }

    fn go_on_with(
        &mut self,
        local: &mut Local,
        now: Duration,
        outputs: &mut Vec<Output>,
    ) -> Result<(), BootError> {
        loop {
            let ticked = local.firmware.tick(now, self.store.flash_mut());
            match &ticked {
                Some(Ticked::Restart) => {
                    let boot = self.store.reboot()?;
                    self.update(now, self.booted(boot), outputs)?;
                    self.boot_local(local, now, false, outputs)?;
                    self.introduce(outputs);
                }
                Some(Ticked::Confirmed) => self.introduce(outputs),
                Some(Ticked::NotConfirmed(error)) => {
                    outputs.push(Output::Log(format!("cannot confirm the firmware: {error}")));
                }
                Some(Ticked::Flashed) | None => {}
            }
            let phases = std::mem::take(&mut self.phases);
            let effects = self.with_sight(local, now, |apps, sight| apps.step(&phases, sight));
            if effects.is_empty() && ticked.is_none() {
                return Ok(());
            }
            self.perform(local, now, effects, outputs)?;
        }
    }

    /// Keeps the list that is offered, once it is another one.
    fn keep_offer(&mut self, local: &mut Local, outputs: &mut Vec<Output>) {
        let offered = self.updater.offer().map(Accepted::digest);
        if offered.is_none() || offered == local.kept {
            return;
        }
        let Some(payload) = local.latest.take_if(|latest| Some(Digest::of(latest)) == offered) else {
            return;
        };
        if let Err(error) = journal::write_list(self.store.flash_mut(), OFFER, &payload) {
            outputs.push(Output::Log(format!("cannot keep the channel's list: {error}")));
        }
        local.kept = offered;
    }

    fn introduce(&self, outputs: &mut Vec<Output>) {
        if self.updater.is_connected() {
            outputs.push(Output::Introduce(self.info()));
        }
    }

    fn with_sight<T>(
        &self,
        local: &mut Local,
        now: Duration,
        what: impl FnOnce(&mut Apps, Sight<'_>) -> T,
    ) -> T {
        let wall = local.wall(now);
        let sight = sight(&self.updater, &self.store, &local.firmware, now, &wall);
        what(&mut local.apps, sight)
    }

    fn perform(
        &mut self,
        local: &mut Local,
        now: Duration,
        effects: Vec<Effect>,
        outputs: &mut Vec<Output>,
    ) -> Result<(), BootError> {
        let mut effects = VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Save => {
                    if let Err(error) =
                        journal::write_record(self.store.flash_mut(), RECORD, local.apps.record())
                    {
                        outputs.push(Output::Log(format!("cannot keep the record of tasks: {error}")));
                    }
                }
                Effect::Log(task, line) => self.log(task, &line),
                // A log that stays is overwritten or not looked at.
                Effect::Drop(task) => _ = self.store.flash_mut().remove(&log_of(task)),
                Effect::Subscribe(topics) => outputs.push(Output::Subscribe(topics)),
                Effect::Unsubscribe(topics) => outputs.push(Output::Unsubscribe(topics)),
                Effect::Look(task, what, need) => {
                    let needs = match (what, self.updater.offer().cloned()) {
                        (What::Release, Some(offer)) => self.store.missing(&offer),
                        _ => Ok(vec![need]),
                    };
                    let needs = needs.and_then(|needs| self.not_on_shelf(needs));
                    effects.extend(self.with_sight(local, now, |apps, sight| apps.fetch(task, needs, sight)));
                }
                Effect::Shelve(task, item, payload) => {
                    let shelved = self.shelve(&item, &payload);
                    let more =
                        self.with_sight(local, now, |apps, sight| apps.shelved(task, &item, shelved, sight));
                    effects.extend(more);
                }
                Effect::Clear(stays) => self.clear_shelf(&stays),
                Effect::Apply(release) => {
                    self.update(now, Event::Apply(release), outputs)?;
                }
                Effect::Flash { digest, version } => self.flash_from_shelf(local, digest, version),
            }
        }
        Ok(())
    }

    /// A log is for people: what does not fit, or cannot be written, is missing from it.
    fn log(&mut self, task: u64, line: &str) {
        let path = log_of(task);
        let flash = self.store.flash_mut();
        let size = match flash.kind(&path) {
            Ok(Some(FileKind::File(size))) => size,
            Ok(None) => match flash.create(&path) {
                Ok(()) => 0,
                Err(_) => return,
            },
            _ => return,
        };
        if size < limits::TASK_LOG {
            let left = (limits::TASK_LOG - size) as usize;
            let text = format!("{line}\n");
            let end = (0..=left.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
            let _ = flash.append(&path, &text.as_bytes()[..end]);
        }
    }

    fn not_on_shelf(&mut self, needs: Vec<Need>) -> Result<Vec<Need>, Refusal> {
        let mut left = Vec::new();
        for mut need in needs {
            let digest = *need.id.digest();
            let place = on_shelf(&digest);
            if flash::digest(self.store.flash(), &place)? == Some(digest) {
                continue;
            }
            if !parts::resume(self.store.flash_mut(), &in_chunks(&digest), &place, &mut need)? {
                left.push(need);
            }
        }
        Ok(left)
    }

    /// Verifies a package, or a chunk of one, and puts it on the shelf.
    fn shelve(&mut self, Item { need, chunk }: &Item, payload: &[u8]) -> Result<(), Refusal> {
        if let Some(number) = chunk {
            let (digest, flash) = (need.id.digest(), self.store.flash_mut());
            let done = parts::receive(flash, &in_chunks(digest), &on_shelf(digest), need, *number, payload)?;
            return if done { Ok(flash.sync(SHELF)?) } else { Ok(()) };
        }
        let found = payload.len() as u64;
        let package = || need.id.clone();
        match need.size {
            Some(announced) if announced != found => {
                return Err(Refusal::WrongSize { package: package(), announced, found });
            }
            _ if found > mpypi_protocol::limits::PACKAGE => {
                return Err(Refusal::TooLarge { package: package() });
            }
            _ => {}
        }
        let digest = Digest::of(payload);
        if digest != *need.id.digest() {
            return Err(Refusal::WrongHash { package: package(), found: digest });
        }
        self.write_shelf(&digest, payload).map_err(|error| {
            let free = self.store.flash().free().unwrap_or(0);
            Refusal::from_flash(error, found, free)
        })
    }

    fn write_shelf(&mut self, digest: &Digest, payload: &[u8]) -> io::Result<()> {
        let flash = self.store.flash_mut();
        let part = format!("{}.part", on_shelf(digest));
        flash.create(&part)?;
        for piece in payload.chunks(limits::PIECE) {
            if let Err(error) = flash.append(&part, piece) {
                let _ = flash.remove(&part);
                return Err(error);
            }
        }
        flash.sync(&part)?;
        flash.rename(&part, &on_shelf(digest))?;
        flash.sync(SHELF)
    }

    fn clear_shelf(&mut self, stays: &[Digest]) {
        let flash = self.store.flash_mut();
        for name in flash.list(SHELF).unwrap_or_default() {
            let digest = name.strip_suffix(parts::END).unwrap_or(&name);
            if !digest.parse().is_ok_and(|digest: Digest| stays.contains(&digest)) {
                // What cannot be removed now is removed the next time.
                let _ = flash.remove(&format!("{SHELF}/{name}"));
            }
        }
    }

    fn flash_from_shelf(&mut self, local: &mut Local, digest: Digest, version: String) {
        let Local { firmware, .. } = local;
        let path = on_shelf(&digest);
        let Ok(Some(FileKind::File(size))) = self.store.flash().kind(&path) else {
            return firmware.fail(self.store.flash_mut(), cause(&SlotError::Invalid));
        };
        let Ok(session) = firmware.start(self.store.flash_mut(), Origin::Fetched) else { return };
        let mut going = firmware.begin(session, self.store.flash_mut(), Some(size));
        let mut piece = [0; limits::PIECE];
        let mut offset = 0;
        while going.is_ok() && offset < size {
            match self.store.flash().read(&path, offset, &mut piece) {
                Ok(length) if length > 0 => {
                    offset += length as u64;
                    going = firmware.push(session, self.store.flash_mut(), &piece[..length]);
                }
                _ => {
                    return firmware.abort(session, self.store.flash_mut(), "incomplete download".to_owned());
                }
            }
        }
        if going.is_ok() {
            // If it is over, the stage says why.
            let _ = firmware.finish(session, self.store.flash_mut(), Some(digest), Some(version));
        }
        let _ = self.store.flash_mut().remove(&path);
    }

    /// Answers who asks.
    ///
    /// # Errors
    /// What was asked for led to a restart, and the device did not start.
    pub fn answer(&mut self, now: Duration, ask: Ask) -> Result<Vec<Output>, BootError> {
        let mut outputs = Vec::new();
        let Some(mut local) = self.local.take() else { return Ok(outputs) };
        let done = self.answer_with(&mut local, now, ask, &mut outputs);
        self.local = Some(local);
        done?;
        self.go_on(now, &mut outputs)?;
        Ok(outputs)
    }

    fn answer_with(
        &mut self,
        local: &mut Local,
        now: Duration,
        ask: Ask,
        outputs: &mut Vec<Output>,
    ) -> Result<(), BootError> {
        match ask {
            // Who does not wait for the answer any more does not get it.
            Ask::Packages(reply) => {
                let _ = reply.send(self.with_sight(local, now, |apps, sight| apps.packages(sight)));
            }
            Ask::Firmware(reply) => {
                let _ = reply.send(self.with_sight(local, now, |apps, sight| apps.firmware(sight)));
            }
            Ask::Tasks(kind, reply) => {
                let tasks = local.apps.tasks().iter().rev().filter(|task| task.kind == kind).cloned();
                let _ = reply.send(tasks.collect());
            }
            Ask::Log(kind, id, reply) => {
                let task = local.apps.tasks().iter().find(|task| task.kind == kind && task.id == id);
                let log = task.map(|task| {
                    let bytes = flash::read_all(self.store.flash(), &log_of(id), limits::TASK_LOG);
                    let bytes = bytes.ok().flatten().unwrap_or_default();
                    (String::from_utf8_lossy(&bytes).into_owned(), task.is_over())
                });
                let _ = reply.send(log);
            }
            Ask::Refresh(reply) => {
                outputs.push(Output::Subscribe(vec![self.channel.topic()]));
                let _ = reply.send(());
            }
            Ask::Order(order, reply) => {
                let (answers, effects) = self.with_sight(local, now, |apps, sight| apps.order(order, sight));
                self.perform(local, now, effects, outputs)?;
                let _ = reply.send(answers);
            }
            Ask::Local { name, version, payload, reply } => {
                let digest = Digest::of(&payload);
                let size = payload.len() as u64;
                let written = self.write_shelf(&digest, &payload);
                let answer = match written {
                    Ok(()) => {
                        let order = apps::Order::Local { name, version, digest, size };
                        let (mut answers, effects) =
                            self.with_sight(local, now, |apps, sight| apps.order(order, sight));
                        self.perform(local, now, effects, outputs)?;
                        answers.pop().map_or(Err("bug: no answer".to_owned()), |(_, answer)| answer)
                    }
                    Err(error) => Err(Refusal::from(error).text()),
                };
                let _ = reply.send(answer);
            }
            Ask::Status(reply) => {
                let _ = reply.send(self.status(local, now));
            }
            Ask::Flash(ask) => self.flash(local, now, ask),
        }
        Ok(())
    }

    fn flash(&mut self, local: &mut Local, now: Duration, ask: FlashAsk) {
        let flash = self.store.flash_mut();
        let firmware = &mut local.firmware;
        let status = |firmware: &Firmware| firmware.stage().to_string();
        match ask {
            FlashAsk::Start(origin, reply) => {
                let started = firmware.start(flash, origin);
                let _ = reply.send(started.map_err(|why| (why, status(firmware))));
            }
            FlashAsk::Begin(session, total, reply) => {
                let begun = firmware.begin(session, flash, total);
                let _ = reply.send(begun.map_err(|_| status(firmware)));
            }
            FlashAsk::Push(session, bytes, reply) => {
                let pushed = firmware.push(session, flash, &bytes);
                let _ = reply.send(pushed.map_err(|_| status(firmware)));
            }
            FlashAsk::Finish { session, expected, version, reply } => {
                let finished = firmware.finish(session, flash, expected, version);
                // Who sent it is told whether it is whole.
                let verified = finished.is_ok() && firmware.tick(now, flash) == Some(Ticked::Flashed);
                let _ = reply.send(if verified { Ok(()) } else { Err(status(firmware)) });
            }
            FlashAsk::Abort(session, cause) => match cause {
                Some(cause) => firmware.abort(session, flash, cause),
                None => {
                    let cause = firmware.incomplete();
                    firmware.abort(session, flash, cause);
                }
            },
            FlashAsk::Fail(cause) => firmware.fail(flash, cause),
        }
    }

    fn status(&self, local: &mut Local, now: Duration) -> Status {
        let latest = self.with_sight(local, now, |apps, sight| apps.firmware(sight));
        let firmware = &local.firmware;
        let running = firmware.slots().running();
        let latest = latest.into_iter().map(|image| image.latest_version);
        Status {
            version: running.version.clone(),
            build: running.build.clone(),
            key: firmware.options().key.clone().unwrap_or_default(),
            partition: (running.size, firmware.slots().capacity()),
            progress: firmware.progress(),
            status: (*firmware.stage() != Stage::Idle).then(|| firmware.stage().to_string()),
            is_error: matches!(firmware.stage(), Stage::Error(_)),
            is_busy: firmware.is_busy(),
            is_supported: firmware.slots().capacity() > 0,
            latest: latest.max_by(|one, other| crate::version::compare_firmware(one, other)),
        }
    }
}

fn sight<'a, F: Flash>(
    updater: &'a Updater,
    store: &'a Store<F>,
    firmware: &'a Firmware,
    now: Duration,
    wall: &'a str,
) -> Sight<'a> {
    Sight {
        now,
        wall,
        offer: updater.offer(),
        installed: store.installed(),
        report: updater.report(),
        under_way: updater.under_way(),
        resting: updater.is_resting(),
        firmware,
    }
}

#[cfg(test)]
mod tests;
