//! Packages as somebody at the device chooses them, one by one: tasks that download, install and remove them, as a state
//! machine. What is installed is the store's to say, and what there is, the channel's list; here is only who asked for
//! what, and how far it is.
//!
//! A task survives a restart in its record, `.mpypi/apps.json`; what became of it, the store knows. Its log is beside it,
//! and so is what was downloaded, below `.mpypi/shelf/`, until it is installed.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use mpypi_protocol::{Chunks, Digest, PackageId, list::Wheel, node::Phase, wheel::normalized_name};
use serde::{Deserialize, Serialize};

use crate::{
    accept::{Accepted, LOCAL},
    firmware::{Firmware, Stage},
    journal::Installed,
    limits,
    refusal::{Refusal, Verdict},
    store::Need,
    update::Report,
    version::{compare, compare_firmware},
    window::{Item, Window},
};

/// The record of all tasks.
pub const RECORD: &str = ".mpypi/apps.json";
/// The folder of their logs.
pub const LOGS: &str = ".mpypi/tasks";
/// The folder of what was downloaded.
pub const SHELF: &str = ".mpypi/shelf";

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Fetches a package.
    Download,
    /// Puts it in place.
    Install,
    /// Removes it.
    Uninstall,
}

/// What a task is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// One wheel.
    Wheel,
    /// All of a release, its files with it.
    Release,
    /// A firmware image.
    Firmware,
}

/// How far a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It waits for its turn.
    Queueing,
    /// It is being done.
    Running,
    /// It is done.
    Succeeded,
    /// It could not be done.
    Failed,
}

/// A task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its number; tasks of all kinds are counted together.
    pub id: u64,
    /// What it does.
    pub kind: Kind,
    /// What it is about.
    pub what: What,
    /// How far it is.
    pub status: Status,
    /// The package's name.
    pub module: String,
    /// The package's version.
    pub version: String,
    /// The package's digest; a release's is its list's.
    pub digest: Digest,
    /// Its size in bytes, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// How it is cut, if it lies in chunks, as long as the task is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<Chunks>,
    /// Whether the package came from a file of this machine.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub local: bool,
    /// When it was made, started and ended, in UTC.
    pub created: String,
    /// See `created`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<String>,
    /// See `created`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// How often a restart interrupted it.
    #[serde(default)]
    pub interrupted: u32,
}

/// What was downloaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Shelved {
    what: What,
    module: String,
    version: String,
    digest: Digest,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    local: bool,
    /// The packages it consists of.
    packages: Vec<Digest>,
}

/// What failed last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Failure {
    kind: Kind,
    version: String,
    reason: String,
}

/// All that is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    last: u64,
    tasks: Vec<Task>,
    shelf: Vec<Shelved>,
    failures: BTreeMap<String, Failure>,
}

/// What the device looks like, beside its tasks.
#[derive(Debug, Clone, Copy)]
pub struct Sight<'a> {
    /// Time since any fixed start.
    pub now: Duration,
    /// The time of day, `YYYY-MM-DD HH:MM:SS` in UTC.
    pub wall: &'a str,
    /// The channel's newest list that was accepted.
    pub offer: Option<&'a Accepted>,
    /// What is installed.
    pub installed: &'a Installed,
    /// Where the update stands.
    pub report: &'a Report,
    /// What the update is about.
    pub under_way: Option<&'a Accepted>,
    /// Whether nothing is under way there.
    pub resting: bool,
    /// Its firmware.
    pub firmware: &'a Firmware,
}

/// Somebody wants something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Packages downloaded.
    Download(Vec<String>),
    /// Packages installed.
    Install(Vec<String>),
    /// Packages removed.
    Uninstall(Vec<String>),
    /// Firmware images installed.
    Firmware(Vec<String>),
    /// A wheel from a file of this machine installed; it is on the shelf.
    Local {
        /// Its name.
        name: String,
        /// Its version.
        version: String,
        /// Its digest.
        digest: Digest,
        /// Its size in bytes.
        size: u64,
    },
}

/// What becomes of an order: for each name the number of a task and the version it is about, or why not.
pub type Answers = Vec<(String, Result<(u64, String), String>)>;

/// What is to be done.
#[derive(Debug)]
pub enum Effect {
    /// Keep the record.
    Save,
    /// Add a line to a task's log.
    Log(u64, String),
    /// Remove a task's log.
    Drop(u64),
    /// Say what must be fetched for a task; the answer is [`Apps::fetch`].
    Look(u64, What, Need),
    /// Subscribe to these topics.
    Subscribe(Vec<String>),
    /// Unsubscribe.
    Unsubscribe(Vec<String>),
    /// Put a package, or a chunk of one, on the shelf; the answer is [`Apps::shelved`].
    Shelve(u64, Item, Bytes),
    /// Remove what the shelf has beside these.
    Clear(Vec<Digest>),
    /// Hand this to the update.
    Apply(Box<Accepted>),
    /// Write a firmware image; what becomes of it, the firmware says.
    Flash {
        /// The digest it must have.
        digest: Digest,
        /// Its version.
        version: String,
    },
}

/// The tasks of a device.
#[derive(Debug, Default)]
pub struct Apps {
    record: Record,
    asks: bool,
    /// Whether there is a connection: without one, what does not come is no fault of the package.
    connected: bool,
    fetch: Option<Fetch>,
    /// The task that the update works on, and the phase it was last seen in.
    placing: Option<(u64, Phase)>,
    /// The task whose image is written, and the stage it was last seen in.
    flashing: Option<(u64, Stage)>,
}

/// What is on its way.
#[derive(Debug)]
struct Fetch {
    task: u64,
    window: Window,
    done: u64,
    total: u64,
    stall_at: Duration,
    tries: u32,
    /// Whether what is needed is known.
    looked: bool,
}

/// A package as it is shown.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PackageView {
    /// Its name.
    pub name: String,
    /// The version that there is.
    pub latest_version: String,
    /// The version that is installed; empty if none is.
    pub current_version: String,
    /// How it stands.
    pub status: &'static str,
    /// Versions that are on the shelf.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub downloaded_versions: Vec<String>,
    /// The version on its way to the shelf.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downloading_version: Option<String>,
    /// How far it is, from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downloading_progress: Option<f64>,
    /// The task that downloads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub download_task_id: Option<u64>,
    /// Why it could not be downloaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub download_failed_reason: Option<String>,
    /// The version on its way into its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub installing_version: Option<String>,
    /// How far it is, from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub installing_progress: Option<f64>,
    /// The task that installs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub install_task_id: Option<u64>,
    /// Why it could not be installed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub install_failed_reason: Option<String>,
    /// The task that removes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uninstall_task_id: Option<u64>,
    /// Why it could not be removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uninstall_failed_reason: Option<String>,
    /// Whether the channel leaves it to this device to have it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
}

type Effects = Vec<Effect>;

impl Task {
    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.status, Status::Succeeded | Status::Failed)
    }

    fn is(&self, kind: Kind, what: What, module: &str) -> bool {
        self.kind == kind && self.what == what && same(&self.module, module)
    }
}

impl Apps {
    /// The tasks of a device on which `asks` says whether somebody chooses all of what is installed.
    #[must_use]
    pub fn new(asks: bool) -> Apps {
        Apps { asks, ..Apps::default() }
    }

    /// What is to be kept.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// All tasks, oldest first.
    #[must_use]
    pub fn tasks(&self) -> &[Task] {
        &self.record.tasks
    }

    /// The device started with this record: what was running is gone on with, if it did not arrive.
    pub fn booted(&mut self, record: Option<Record>, sight: Sight<'_>) -> Effects {
        if let Some(record) = record {
            self.record = record;
        }
        (self.fetch, self.placing, self.flashing) = (None, None, None);
        let mut out = Effects::new();
        let running: Vec<_> =
            self.record.tasks.iter().filter(|task| task.status == Status::Running).cloned().collect();
        for task in running {
            let goes_on = match (task.kind, task.what) {
                (Kind::Download, _) => false,
                (_, What::Firmware) => {
                    let slots = sight.firmware.slots();
                    slots.is_on_trial() && slots.running().digest == Some(task.digest)
                }
                // Its trial goes on.
                _ => !sight.resting,
            };
            match goes_on {
                true if task.what == What::Firmware => self.flashing = Some((task.id, Stage::Rebooting)),
                true => self.placing = Some((task.id, Phase::Idle)),
                false => self.interrupted(&task, sight, &mut out),
            }
        }
        out.push(Effect::Clear(self.shelved_packages(sight)));
        out.push(Effect::Save);
        out
    }

    fn interrupted(&mut self, task: &Task, sight: Sight<'_>, out: &mut Effects) {
        let arrived = match task.kind {
            Kind::Download => self.record.shelf.iter().any(|on| on.digest == task.digest),
            _ => is_done(task, sight),
        };
        if arrived {
            return self.end(task.id, Ok(()), sight, out);
        }
        if task.kind != Kind::Download
            && let Some(reason) = failure(task, sight)
        {
            return self.end(task.id, Err(reason), sight, out);
        }
        let task = self.record.tasks.iter_mut().find(|other| other.id == task.id);
        let Some(task) = task else { return };
        task.interrupted += 1;
        if task.interrupted > limits::TASK_RESUMES {
            let (id, times) = (task.id, task.interrupted);
            return self.end(id, Err(format!("interrupted: {times} restarts while it ran")), sight, out);
        }
        task.status = Status::Queueing;
        out.push(Effect::Log(task.id, format!("=== {}: interrupted by a restart, queued again", sight.wall)));
    }

    /// Takes an order in.
    pub fn order(&mut self, order: Order, sight: Sight<'_>) -> (Answers, Effects) {
        let mut out = Effects::new();
        let mut answers = Answers::new();
        let (names, kind) = match order {
            Order::Download(names) => (names, Kind::Download),
            Order::Install(names) => (names, Kind::Install),
            Order::Uninstall(names) => (names, Kind::Uninstall),
            Order::Firmware(names) => {
                for name in names {
                    let answer = self.order_firmware(&name, sight, &mut out);
                    answers.push((name, answer));
                }
                return (answers, out);
            }
            Order::Local { name, version, digest, size } => {
                let on = Shelved {
                    what: What::Wheel,
                    module: name.clone(),
                    version,
                    digest,
                    size: Some(size),
                    local: true,
                    packages: vec![digest],
                };
                let answer = self.order_local(on, sight, &mut out);
                return (vec![(name, answer)], out);
            }
        };
        for name in names {
            let answer = match kind {
                Kind::Download => self.order_download(&name, sight, &mut out),
                Kind::Install => self.order_install(&name, sight, &mut out),
                Kind::Uninstall => self.order_uninstall(&name, sight, &mut out),
            };
            answers.push((name, answer));
        }
        (answers, out)
    }

    fn order_download(
        &mut self,
        name: &str,
        sight: Sight<'_>,
        out: &mut Effects,
    ) -> Result<(u64, String), String> {
        let offered = self.offered(name, sight).ok_or_else(|| invalid(name))?;
        if let Some((version, digest)) = installed(&offered, sight)
            && (digest == Some(offered.digest) || compare(&version, &offered.version).is_gt())
        {
            return Err(up_to_date(&version));
        }
        self.add(Kind::Download, offered, sight, out)
    }

    fn order_install(
        &mut self,
        name: &str,
        sight: Sight<'_>,
        out: &mut Effects,
    ) -> Result<(u64, String), String> {
        let on_shelf = self.on_shelf(name).cloned();
        // The one on its way is newer than the one on the shelf.
        let coming = self.record.tasks.iter().rev();
        let coming = coming.filter(|task| task.kind == Kind::Download && task.what != What::Firmware);
        let coming = coming.filter(|task| !task.is_over()).find(|task| same(&task.module, name)).map(shelved);
        let offered = self.offered(name, sight);
        let Some(found) = coming.or(on_shelf) else {
            return Err(match offered {
                None => invalid(name),
                Some(offered) => match installed(&offered, sight) {
                    Some((version, digest)) if digest == Some(offered.digest) => up_to_date(&version),
                    _ => format!("module {name} is not downloaded, skip..."),
                },
            });
        };
        if let Some((version, digest)) = installed(&found, sight) {
            if digest == Some(found.digest) {
                return Err(up_to_date(&version));
            }
            if compare(&version, &found.version).is_gt() {
                return Err(format!(
                    "installed version({version}) is higher than downloaded version({}), skip...",
                    found.version
                ));
            }
        }
        self.add(Kind::Install, found, sight, out)
    }

    fn order_uninstall(
        &mut self,
        name: &str,
        sight: Sight<'_>,
        out: &mut Effects,
    ) -> Result<(u64, String), String> {
        let wheels = &sight.installed.wheels;
        let (name, wheel) =
            wheels.iter().find(|(wheel, _)| same(wheel, name)).ok_or_else(|| invalid(name))?;
        let demanded =
            sight.offer.and_then(|offer| offer.wheels().iter().find(|wheel| same(&wheel.name, name)));
        if !self.asks && demanded.is_some_and(|wheel| !wheel.is_optional()) {
            return Err(format!("module {name} is required by the channel, skip..."));
        }
        let found = Shelved {
            what: What::Wheel,
            module: name.clone(),
            version: wheel.version.clone(),
            digest: wheel.digest,
            size: None,
            local: wheel.local,
            packages: vec![],
        };
        self.add(Kind::Uninstall, found, sight, out)
    }

    fn order_firmware(
        &mut self,
        name: &str,
        sight: Sight<'_>,
        out: &mut Effects,
    ) -> Result<(u64, String), String> {
        let image =
            self.images(sight).find(|image| same(&image.module, name)).ok_or_else(|| invalid(name))?;
        let running = sight.firmware.slots().running();
        if running.digest == Some(image.digest) || compare_firmware(&running.version, &image.version).is_ge()
        {
            return Err(up_to_date(&running.version));
        }
        self.add(Kind::Install, image, sight, out)
    }

    fn order_local(
        &mut self,
        on: Shelved,
        sight: Sight<'_>,
        out: &mut Effects,
    ) -> Result<(u64, String), String> {
        if let Some((version, digest)) = installed(&on, sight) {
            if digest == Some(on.digest) {
                return Err(up_to_date(&version));
            }
            if compare(&version, &on.version).is_gt() {
                let found = &on.version;
                return Err(format!(
                    "installed version({version}) is higher than downloaded version({found}), skip..."
                ));
            }
        }
        let offer =
            sight.offer.and_then(|offer| offer.wheels().iter().find(|wheel| same(&wheel.name, &on.module)));
        if !self.asks && offer.is_some_and(|wheel| !wheel.is_optional()) {
            return Err(format!("module {} is required by the channel, skip...", on.module));
        }
        let added = self.add(Kind::Install, on.clone(), sight, out)?;
        self.put_on_shelf(on, sight, out);
        Ok(added)
    }

    /// Makes a task, unless there is one that does the same.
    fn add(
        &mut self,
        kind: Kind,
        what: Shelved,
        sight: Sight<'_>,
        out: &mut Effects,
    ) -> Result<(u64, String), String> {
        let same_task = |task: &&Task| task.kind == kind && task.digest == what.digest && !task.is_over();
        if let Some(task) = self.record.tasks.iter().find(same_task) {
            return Ok((task.id, task.version.clone()));
        }
        if self.record.tasks.iter().filter(|task| !task.is_over()).count() >= limits::TASKS_WAITING {
            return Err("too many tasks wait, skip...".to_owned());
        }
        self.record.last += 1;
        let task = Task {
            id: self.record.last,
            kind,
            what: what.what,
            status: Status::Queueing,
            module: what.module,
            version: what.version,
            digest: what.digest,
            size: what.size,
            chunks: sight.offer.and_then(|offer| offer.chunks(&what.digest).cloned()),
            local: what.local,
            created: sight.wall.to_owned(),
            started: None,
            ended: None,
            interrupted: 0,
        };
        self.record.failures.remove(&key(task.what, &task.module));
        let Task { id, module, version, created, .. } = &task;
        out.push(Effect::Log(*id, format!("id: {id}\ncreate time: {created}")));
        out.push(Effect::Log(*id, format!("{} task {module}({version}) added", kind.word())));
        let answer = (*id, version.clone());
        self.record.tasks.push(task);
        while self.record.tasks.len() > limits::TASKS
            && let Some(place) = self.record.tasks.iter().position(Task::is_over)
        {
            out.push(Effect::Drop(self.record.tasks.remove(place).id));
        }
        out.push(Effect::Save);
        Ok(answer)
    }

    /// Goes on with what can be gone on with. `phases` are those that the update went through since the last time.
    pub fn step(&mut self, phases: &[Phase], sight: Sight<'_>) -> Effects {
        let mut out = Effects::new();
        self.watch_placing(phases, sight, &mut out);
        self.watch_flashing(sight, &mut out);
        self.order_new_firmware(sight, &mut out);
        self.stall(sight, &mut out);
        if self.fetch.is_none()
            && let Some(task) = self.next(|task| {
                task.kind == Kind::Download || task.what == What::Firmware && !sight.firmware.is_busy()
            })
        {
            self.begin(&task, sight, &mut out);
            self.fetch = Some(Fetch {
                task: task.id,
                window: Window::default(),
                done: 0,
                total: 0,
                stall_at: sight.now + limits::FETCH_STALL,
                tries: 1,
                looked: false,
            });
            let id = match task.what {
                What::Firmware => PackageId::Firmware(task.digest),
                _ => PackageId::Wheel(task.digest),
            };
            let need = Need { id, size: task.size, chunks: task.chunks.clone(), have: 0 };
            out.push(Effect::Look(task.id, task.what, need));
        }
        if self.placing.is_none() && sight.resting {
            self.place(sight, &mut out);
        }
        out
    }

    /// The oldest task that waits and that `may` start.
    fn next(&self, may: impl Fn(&Task) -> bool) -> Option<Task> {
        self.record.tasks.iter().find(|task| task.status == Status::Queueing && may(task)).cloned()
    }

    fn begin(&mut self, task: &Task, sight: Sight<'_>, out: &mut Effects) {
        let Task { id, kind, module, version, .. } = task;
        if let Some(task) = self.task(*id) {
            task.status = Status::Running;
            task.started = Some(sight.wall.to_owned());
        }
        out.push(Effect::Log(*id, format!("start time: {}", sight.wall)));
        out.push(Effect::Log(*id, format!("{} {module}({version}) begin", kind.word())));
        out.push(Effect::Save);
    }

    fn end(&mut self, id: u64, ended: Result<(), String>, sight: Sight<'_>, out: &mut Effects) {
        let Some(task) = self.task(id) else { return };
        task.ended = Some(sight.wall.to_owned());
        task.status = if ended.is_ok() { Status::Succeeded } else { Status::Failed };
        task.chunks = None;
        let task = task.clone();
        let key = key(task.what, &task.module);
        match &ended {
            Ok(()) => {
                self.record.failures.remove(&key);
                if task.kind == Kind::Install && !task.local {
                    self.record.shelf.retain(|on| !(on.what == task.what && same(&on.module, &task.module)));
                }
                if task.kind == Kind::Uninstall {
                    self.record.shelf.retain(|on| !(on.local && same(&on.module, &task.module)));
                }
            }
            Err(reason) => {
                let failure =
                    Failure { kind: task.kind, version: task.version.clone(), reason: reason.clone() };
                self.record.failures.insert(key, failure);
                while self.record.failures.len() > limits::TASKS {
                    self.record.failures.pop_first();
                }
            }
        }
        let line = match &ended {
            Ok(()) => "=== succeeded".to_owned(),
            Err(reason) => format!("=== failed: {reason}"),
        };
        out.push(Effect::Log(id, format!("{line}\nend time: {}", sight.wall)));
        out.push(Effect::Clear(self.shelved_packages(sight)));
        out.push(Effect::Save);
    }

    /// The answer to [`Effect::Look`].
    pub fn fetch(&mut self, id: u64, needs: Result<Vec<Need>, Refusal>, sight: Sight<'_>) -> Effects {
        let mut out = Effects::new();
        let Some(fetch) = self.fetch.as_mut().filter(|fetch| fetch.task == id) else { return out };
        match needs {
            Ok(needs) => {
                fetch.looked = true;
                fetch.total = needs.iter().filter_map(Need::left).fold(0, u64::saturating_add);
                fetch.window = Window::new(needs);
                let count = fetch.window.waiting();
                out.push(Effect::Log(id, format!("=== fetch: {count} package(s) from the channel's broker")));
                self.fetch_on(sight, &mut out);
            }
            Err(refusal) => {
                self.fetch = None;
                self.end(id, Err(refusal.text()), sight, &mut out);
            }
        }
        out
    }

    /// Asks for packages up to the window; ends the task when there are none left.
    fn fetch_on(&mut self, sight: Sight<'_>, out: &mut Effects) {
        let Some(fetch) = &mut self.fetch else { return };
        let asked = fetch.window.ask();
        if !asked.is_empty() {
            fetch.stall_at = sight.now + limits::FETCH_STALL;
            out.push(Effect::Subscribe(asked));
        } else if fetch.window.is_done() && fetch.looked {
            let id = fetch.task;
            self.fetch = None;
            let Some(task) = self.task(id).cloned() else { return };
            match task.what {
                What::Firmware => {
                    self.flashing = Some((id, Stage::Idle));
                    out.push(Effect::Flash { digest: task.digest, version: task.version });
                }
                _ => {
                    let on = Shelved { packages: self.fetched(&task, sight), ..shelved(&task) };
                    self.put_on_shelf(on, sight, out);
                    self.end(id, Ok(()), sight, out);
                }
            }
        }
    }

    fn fetched(&self, task: &Task, sight: Sight<'_>) -> Vec<Digest> {
        match (task.what, sight.offer) {
            (What::Release, Some(offer)) => {
                let wheels = offer.wheels().iter().map(|wheel| wheel.digest);
                wheels.chain(offer.sources().map(|src| src.digest)).collect()
            }
            _ => vec![task.digest],
        }
    }

    fn put_on_shelf(&mut self, on: Shelved, sight: Sight<'_>, out: &mut Effects) {
        self.record.shelf.retain(|other| {
            other.digest != on.digest && !(other.what == on.what && same(&other.module, &on.module))
        });
        self.record.shelf.push(on);
        while self.record.shelf.len() > limits::SHELF {
            self.record.shelf.remove(0);
        }
        out.push(Effect::Clear(self.shelved_packages(sight)));
        out.push(Effect::Save);
    }

    /// A package arrived, or a chunk of one.
    pub fn package(&mut self, topic: &str, payload: &Bytes, sight: Sight<'_>) -> Effects {
        let mut out = Effects::new();
        let Some(fetch) = self.fetch.as_mut().filter(|_| !payload.is_empty()) else { return out };
        let Some(next) = fetch.window.take(topic, payload.clone()) else { return out };
        fetch.done += payload.len() as u64;
        fetch.stall_at = sight.now + limits::FETCH_STALL;
        let task = fetch.task;
        out.push(Effect::Unsubscribe(vec![topic.to_owned()]));
        out.extend(next.map(|(item, payload)| Effect::Shelve(task, item, payload)));
        self.fetch_on(sight, &mut out);
        out
    }

    /// The answer to [`Effect::Shelve`].
    pub fn shelved(
        &mut self,
        id: u64,
        item: &Item,
        shelved: Result<(), Refusal>,
        sight: Sight<'_>,
    ) -> Effects {
        let mut out = Effects::new();
        let Some(fetch) = self.fetch.as_mut().filter(|fetch| fetch.task == id) else { return out };
        match shelved {
            Ok(()) => {
                let next = fetch.window.stored(item);
                out.extend(next.map(|(item, payload)| Effect::Shelve(id, item, payload)));
                if item.completes() {
                    out.push(Effect::Log(id, format!("=== verified: {}", item.need.id)));
                }
                self.fetch_on(sight, &mut out);
            }
            Err(refusal) if fetch.tries < limits::FETCHES && refusal.verdict() != Verdict::Reject => {
                fetch.tries += 1;
                fetch.window.again(item);
                out.push(Effect::Log(id, format!("=== {}; once more", refusal.text())));
                self.fetch_on(sight, &mut out);
            }
            Err(refusal) => self.give_up_fetch(refusal.text(), sight, &mut out),
        }
        out
    }

    /// The broker refused a subscription.
    pub fn refused(&mut self, filter: &str, sight: Sight<'_>) -> Effects {
        let mut out = Effects::new();
        if self.fetch.as_ref().is_some_and(|fetch| fetch.window.topics().iter().any(|open| open == filter)) {
            let refusal = Refusal::NotAllowed { filter: filter.to_owned() };
            self.give_up_fetch(refusal.text(), sight, &mut out);
        }
        out
    }

    /// There is a connection: what is awaited is asked for again.
    pub fn connected(&mut self, sight: Sight<'_>) -> Effects {
        self.connected = true;
        match &mut self.fetch {
            Some(fetch) if !fetch.window.topics().is_empty() => {
                fetch.stall_at = sight.now + limits::FETCH_STALL;
                vec![Effect::Subscribe(fetch.window.topics())]
            }
            _ => Effects::new(),
        }
    }

    /// There is none any more.
    pub fn disconnected(&mut self) -> Effects {
        self.connected = false;
        Effects::new()
    }

    fn stall(&mut self, sight: Sight<'_>, out: &mut Effects) {
        let Some(fetch) = self.fetch.as_mut().filter(|fetch| self.connected && sight.now >= fetch.stall_at)
        else {
            return;
        };
        let open = fetch.window.topics();
        let Some(first) = open.first() else { return };
        if fetch.tries < limits::TASK_TRIES {
            fetch.tries += 1;
            fetch.stall_at = sight.now + limits::FETCH_STALL;
            out.push(Effect::Log(fetch.task, "=== nothing came; asking again".to_owned()));
            out.push(Effect::Unsubscribe(open.clone()));
            out.push(Effect::Subscribe(open));
        } else {
            let refusal = Refusal::MissingPackage { topic: first.clone() };
            self.give_up_fetch(refusal.text(), sight, out);
        }
    }

    fn give_up_fetch(&mut self, reason: String, sight: Sight<'_>, out: &mut Effects) {
        let Some(fetch) = self.fetch.take() else { return };
        let open = fetch.window.topics();
        if !open.is_empty() {
            out.push(Effect::Unsubscribe(open));
        }
        self.end(fetch.task, Err(reason), sight, out);
    }

    /// When to call [`step`](Apps::step), at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.fetch.as_ref().filter(|_| self.connected).map(|fetch| fetch.stall_at)
    }

    /// Hands the next task to the update, which rests.
    fn place(&mut self, sight: Sight<'_>, out: &mut Effects) {
        let Some(offer) = sight.offer else { return };
        let is_ready = |task: &Task| {
            let waits = |other: &Task| {
                other.kind == Kind::Download && other.digest == task.digest && !other.is_over()
            };
            task.what != What::Firmware
                && task.kind != Kind::Download
                && !(task.kind == Kind::Install && self.record.tasks.iter().any(waits))
        };
        let Some(task) = self.next(is_ready) else { return };
        self.begin(&task, sight, out);
        if is_done(&task, sight) {
            out.push(Effect::Log(task.id, "=== nothing to do: it is so already".to_owned()));
            return self.end(task.id, Ok(()), sight, out);
        }
        if task.kind == Kind::Install && !self.record.shelf.iter().any(|on| on.digest == task.digest) {
            let failed = self.record.failures.get(&key(task.what, &task.module));
            let reason =
                failed.map_or("not-downloaded: it is gone".to_owned(), |failure| failure.reason.clone());
            return self.end(task.id, Err(reason), sight, out);
        }
        let release = match (task.what, task.kind) {
            (What::Release, _) if offer.digest() != task.digest => {
                let reason = "outdated: the channel has a newer release".to_owned();
                return self.end(task.id, Err(reason), sight, out);
            }
            (What::Release, _) => offer.clone(),
            (_, Kind::Uninstall) => compose(offer, sight.installed, &task.module, None),
            _ => {
                let offered = offer.wheels().iter().find(|wheel| wheel.digest == task.digest);
                let mut wheel = offered.cloned().unwrap_or_else(|| Wheel {
                    name: task.module.clone(),
                    version: task.version.clone(),
                    digest: task.digest,
                    size: task.size,
                    chunks: None,
                    tag: None,
                    extra: serde_json::Map::new(),
                });
                // The channel has no say in what is local.
                wheel.extra.shift_remove(LOCAL);
                if task.local {
                    wheel.extra.insert(LOCAL.to_owned(), true.into());
                }
                compose(offer, sight.installed, &task.module, Some(wheel))
            }
        };
        self.placing = Some((task.id, Phase::Idle));
        out.push(Effect::Apply(Box::new(release)));
    }

    fn watch_placing(&mut self, phases: &[Phase], sight: Sight<'_>, out: &mut Effects) {
        let Some((id, seen)) = &mut self.placing else { return };
        let id = *id;
        for phase in phases.iter().copied().filter(|phase| share(*phase).is_some()) {
            if std::mem::replace(seen, phase) != phase {
                out.push(Effect::Log(id, format!("=== {phase}")));
            }
        }
        if sight.resting {
            self.placing = None;
            let Some(task) = self.task(id).cloned() else { return };
            let ended = match is_done(&task, sight) {
                true => Ok(()),
                false => {
                    Err(failure(&task, sight).unwrap_or_else(|| "not-installed: it was given up".to_owned()))
                }
            };
            self.end(id, ended, sight, out);
        }
    }

    fn watch_flashing(&mut self, sight: Sight<'_>, out: &mut Effects) {
        let Some((id, seen)) = &mut self.flashing else { return };
        let (id, before) = (*id, seen.clone());
        let stage = sight.firmware.stage().clone();
        if *seen != stage {
            *seen = stage.clone();
            if !matches!(stage, Stage::Idle) {
                out.push(Effect::Log(id, format!("=== {stage}")));
            }
        }
        let Some(task) = self.task(id).cloned() else { return };
        let slots = sight.firmware.slots();
        let ended = match stage {
            Stage::Error(cause) => Err(cause),
            Stage::Idle if slots.is_on_trial() => return,
            Stage::Idle if slots.running().digest == Some(task.digest) => Ok(()),
            // It was not begun yet.
            Stage::Idle if before == Stage::Idle => return,
            Stage::Idle => Err(failure(&task, sight).unwrap_or_else(|| "it does not run".to_owned())),
            _ => return,
        };
        self.flashing = None;
        self.end(id, ended, sight, out);
    }

    /// On a device that follows its channel by itself, a newer image that fits is installed like a release.
    fn order_new_firmware(&mut self, sight: Sight<'_>, out: &mut Effects) {
        let firmware = sight.firmware;
        if self.asks || firmware.options().key.is_none() || firmware.slots().capacity() == 0 || !sight.resting
        {
            return;
        }
        let given_up = firmware.slots().given_up().map(|given_up| given_up.digest);
        let image = self.images(sight).find(|image| {
            let failed = self.record.failures.get(&key(What::Firmware, &image.module));
            let was_tried = failed.is_some_and(|failure| failure.version == image.version);
            let optional = sight.offer.is_some_and(|offer| {
                offer.firmware().any(|other| other.digest == image.digest && other.is_optional())
            });
            let newer = compare_firmware(&image.version, &firmware.slots().running().version).is_gt();
            newer && !optional && !was_tried && given_up != Some(image.digest)
        });
        if let Some(image) = image
            && !self.record.tasks.iter().any(|task| task.digest == image.digest && !task.is_over())
        {
            // That too many wait passes.
            let _ = self.add(Kind::Install, image, sight, out);
        }
    }

    /// The images of the channel that run on this device.
    fn images<'a>(&self, sight: Sight<'a>) -> impl Iterator<Item = Shelved> + use<'a> {
        let key = sight.firmware.options().key.as_deref();
        let images = sight.offer.into_iter().flat_map(Accepted::firmware);
        images.filter(move |image| image.fits(key)).map(|image| Shelved {
            what: What::Firmware,
            module: image.name.clone(),
            version: image.version.clone(),
            digest: image.digest,
            size: image.size,
            local: false,
            packages: vec![image.digest],
        })
    }

    /// The newest image that fits is wanted, if it is newer than what runs.
    pub fn order_newest_firmware(&mut self, sight: Sight<'_>) -> Effects {
        let newest = self.images(sight).max_by(|one, other| compare_firmware(&one.version, &other.version));
        newest.map_or(Effects::new(), |image| self.order(Order::Firmware(vec![image.module]), sight).1)
    }

    /// What the channel has under `name`.
    fn offered(&self, name: &str, sight: Sight<'_>) -> Option<Shelved> {
        offers(sight).into_iter().find(|offered| same(&offered.module, name))
    }

    fn on_shelf(&self, name: &str) -> Option<&Shelved> {
        let on = self.record.shelf.iter().filter(|on| on.what != What::Firmware && same(&on.module, name));
        on.max_by(|one, other| compare(&one.version, &other.version))
    }

    /// What stays on the shelf: what is there, and what is on its way.
    fn shelved_packages(&self, sight: Sight<'_>) -> Vec<Digest> {
        let shelf = self.record.shelf.iter().flat_map(|on| on.packages.iter().copied());
        let fetches = |task: &&Task| task.kind != Kind::Uninstall && !task.is_over();
        let coming = self.record.tasks.iter().filter(fetches).flat_map(|task| self.fetched(task, sight));
        shelf.chain(coming).collect()
    }

    fn task(&mut self, id: u64) -> Option<&mut Task> {
        self.record.tasks.iter_mut().find(|task| task.id == id)
    }

    /// All packages, by name.
    #[must_use]
    pub fn packages(&self, sight: Sight<'_>) -> Vec<PackageView> {
        let mut views: BTreeMap<String, PackageView> = BTreeMap::new();
        let offers = offers(sight);
        for offered in &offers {
            let name = offered.module.clone();
            let view =
                PackageView { latest_version: offered.version.clone(), name, ..PackageView::default() };
            views.insert(normalized_name(&offered.module), view);
        }
        for (name, wheel) in &sight.installed.wheels {
            let view = views.entry(normalized_name(name)).or_default();
            (view.name, view.current_version) = (name.clone(), wheel.version.clone());
        }
        let others = self.record.shelf.iter().map(|on| (on.what, &on.module));
        let others = others.chain(
            self.record.tasks.iter().filter(|task| !task.is_over()).map(|task| (task.what, &task.module)),
        );
        for (_, name) in others.filter(|(what, _)| *what == What::Wheel) {
            views.entry(normalized_name(name)).or_default().name.clone_from(name);
        }
        for view in views.values_mut() {
            let offered = offers.iter().find(|offered| same(&offered.module, &view.name));
            self.fill(view, offered, sight);
        }
        views.into_values().collect()
    }

    fn fill(&self, view: &mut PackageView, offered: Option<&Shelved>, sight: Sight<'_>) {
        let what = offered.map_or(What::Wheel, |offered| offered.what);
        if what == What::Release {
            view.current_version = sight.installed.version.clone().unwrap_or_default();
        }
        let shelf: Vec<_> =
            self.record.shelf.iter().filter(|on| on.what == what && same(&on.module, &view.name)).collect();
        view.downloaded_versions = shelf.iter().map(|on| on.version.clone()).collect();
        let known = shelf.first().map(|on| on.version.clone());
        if view.latest_version.is_empty() {
            view.latest_version = known.unwrap_or_else(|| view.current_version.clone());
        }
        let wheel =
            sight.offer.and_then(|offer| offer.wheels().iter().find(|wheel| same(&wheel.name, &view.name)));
        view.optional = what == What::Wheel && wheel.is_some_and(Wheel::is_optional);
        let has = match what {
            What::Wheel => {
                sight.installed.wheels.iter().find(|(name, _)| same(name, &view.name)).map(|(_, w)| w.digest)
            }
            _ => sight.installed.list,
        };
        let installed = !view.current_version.is_empty();
        view.status = match (installed, offered) {
            (false, _) => "not_installed",
            (true, Some(offered)) if has != Some(offered.digest) => {
                match compare(&offered.version, &view.current_version) {
                    std::cmp::Ordering::Less => "up_to_date",
                    _ => "upgradable",
                }
            }
            (true, _) => "up_to_date",
        };
        let latest_is_here = |on: &&Shelved| {
            has != Some(on.digest) && offered.is_none_or(|offered| offered.digest == on.digest)
        };
        if shelf.iter().any(latest_is_here) {
            view.status = "downloaded";
        }
        if let Some(failure) = self.record.failures.get(&key(what, &view.name)) {
            let reason = Some(failure.reason.clone());
            match failure.kind {
                Kind::Download => (view.status, view.download_failed_reason) = ("download_failed", reason),
                Kind::Install => (view.status, view.install_failed_reason) = ("install_failed", reason),
                Kind::Uninstall => (view.status, view.uninstall_failed_reason) = ("uninstall_failed", reason),
            }
        }
        self.show_update(view, what, sight);
        self.show_tasks(view, what, sight);
    }

    /// What the channel brings by itself is shown as what was asked for.
    fn show_update(&self, view: &mut PackageView, what: What, sight: Sight<'_>) {
        let Some(release) = sight.under_way.filter(|release| release.composition().is_none()) else { return };
        let version = match what {
            What::Wheel => release
                .wheels()
                .iter()
                .find(|wheel| {
                    let here = sight.installed.wheels.get(&wheel.name);
                    same(&wheel.name, &view.name)
                        && here.is_none_or(|here| here.digest != wheel.digest)
                        && (here.is_some() || !wheel.is_optional())
                })
                .map(|wheel| wheel.version.clone()),
            _ => release.version(),
        };
        let Some(version) = version else { return };
        let state = &sight.report.state;
        let arrived = if state.total == 0 { 0.0 } else { state.done as f64 / state.total as f64 };
        match state.phase {
            Phase::Downloading => {
                view.status = "downloading";
                view.downloading_version = Some(version);
                view.downloading_progress = Some(arrived.clamp(0.0, 1.0));
            }
            phase => {
                view.status = "installing";
                view.installing_version = Some(version);
                view.installing_progress = Some(share(phase).unwrap_or(0.0));
            }
        }
    }

    fn show_tasks(&self, view: &mut PackageView, what: What, sight: Sight<'_>) {
        let active = |kind: Kind| {
            self.record.tasks.iter().find(|task| task.is(kind, what, &view.name) && !task.is_over())
        };
        let name = |queueing, running, task: &Task| match task.status {
            Status::Queueing => queueing,
            _ => running,
        };
        let [download, install, uninstall] =
            [Kind::Download, Kind::Install, Kind::Uninstall].map(|kind| active(kind).cloned());
        if let Some(task) = uninstall {
            view.status = name("uninstall_queueing", "uninstalling", &task);
            view.uninstall_task_id = Some(task.id);
        }
        if let Some(task) = install {
            view.status = name("install_queueing", "installing", &task);
            view.installing_progress = Some(match (&task.status, what) {
                (Status::Queueing, _) => 0.0,
                (_, What::Firmware) => self.flashed(sight),
                _ => share(sight.report.state.phase).unwrap_or(0.0),
            });
            view.installing_version = Some(task.version);
            view.install_task_id = Some(task.id);
        }
        if let Some(task) = download {
            view.status = name("download_queueing", "downloading", &task);
            let fetch = self.fetch.as_ref().filter(|fetch| fetch.task == task.id && fetch.total > 0);
            view.downloading_progress =
                Some(fetch.map_or(0.0, |fetch| (fetch.done as f64 / fetch.total as f64).clamp(0.0, 1.0)));
            view.downloading_version = Some(task.version);
            view.download_task_id = Some(task.id);
        }
    }

    fn flashed(&self, sight: Sight<'_>) -> f64 {
        match sight.firmware.progress() {
            (_, 0) => 0.0,
            (done, total) => (done as f64 / total as f64).clamp(0.0, 1.0),
        }
    }

    /// All firmware images of the channel that run on this device, by name.
    #[must_use]
    pub fn firmware(&self, sight: Sight<'_>) -> Vec<PackageView> {
        let running = sight.firmware.slots().running();
        let mut views: Vec<_> = self
            .images(sight)
            .map(|image| {
                let newer = compare_firmware(&image.version, &running.version).is_gt();
                let mut view = PackageView {
                    name: image.module.clone(),
                    latest_version: image.version.clone(),
                    current_version: running.version.clone(),
                    status: match newer && running.digest != Some(image.digest) {
                        true => "upgradable",
                        false => "up_to_date",
                    },
                    optional: sight.offer.is_some_and(|offer| {
                        offer.firmware().any(|other| other.digest == image.digest && other.is_optional())
                    }),
                    ..PackageView::default()
                };
                if let Some(failure) = self.record.failures.get(&key(What::Firmware, &view.name)) {
                    (view.status, view.install_failed_reason) =
                        ("install_failed", Some(failure.reason.clone()));
                }
                self.show_tasks(&mut view, What::Firmware, sight);
                view
            })
            .collect();
        views.sort_by(|one, other| one.name.cmp(&other.name));
        views
    }
}

impl Kind {
    /// As it is written in paths and logs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Kind::Download => "download",
            Kind::Install => "install",
            Kind::Uninstall => "uninstall",
        }
    }
}

/// What is installed, with one wheel more, another one, or one less.
fn compose(offer: &Accepted, installed: &Installed, name: &str, wheel: Option<Wheel>) -> Accepted {
    let others = installed.wheels.iter().filter(|(other, _)| !same(other, name));
    let wheels = others.map(|(name, wheel)| wheel.entry(name)).chain(wheel).collect();
    let sources = installed.sources.iter().filter_map(|path| {
        let digest = *installed.files.get(path)?;
        Some(mpypi_protocol::list::Src {
            path: path.clone(),
            digest,
            size: None,
            chunks: None,
            extra: serde_json::Map::new(),
        })
    });
    offer.composed(wheels, sources.collect())
}

/// What the channel has: its wheels, and, if there are files as well, all of the release under the channel's name.
fn offers(sight: Sight<'_>) -> Vec<Shelved> {
    let Some(offer) = sight.offer else { return Vec::new() };
    let mut offers: Vec<_> = offer
        .wheels()
        .iter()
        .map(|wheel| Shelved {
            what: What::Wheel,
            module: wheel.name.clone(),
            version: wheel.version.clone(),
            digest: wheel.digest,
            size: wheel.size,
            local: false,
            packages: vec![wheel.digest],
        })
        .collect();
    let channel = offer.channel().to_string();
    if offer.sources().next().is_some() && !offers.iter().any(|other| same(&other.module, &channel)) {
        offers.push(Shelved {
            what: What::Release,
            module: channel,
            version: offer.version().unwrap_or_else(|| offer.digest().short()),
            digest: offer.digest(),
            size: Some(offer.size()),
            local: false,
            packages: Vec::new(),
        });
    }
    offers
}

/// Which version of it is installed, and its digest.
fn installed(what: &Shelved, sight: Sight<'_>) -> Option<(String, Option<Digest>)> {
    match what.what {
        What::Wheel => {
            let mut wheels = sight.installed.wheels.iter();
            let (_, wheel) = wheels.find(|(name, _)| same(name, &what.module))?;
            Some((wheel.version.clone(), Some(wheel.digest)))
        }
        _ => Some((sight.installed.version.clone()?, sight.installed.list)),
    }
}

/// Whether the device is as the task wants it.
fn is_done(task: &Task, sight: Sight<'_>) -> bool {
    let here = installed(&shelved(task), sight);
    match (task.what, task.kind) {
        (What::Firmware, _) => {
            let slots = sight.firmware.slots();
            !slots.is_on_trial() && slots.running().digest == Some(task.digest)
        }
        (_, Kind::Uninstall) => here.is_none(),
        _ => here.is_some_and(|(_, digest)| digest == Some(task.digest)),
    }
}

/// Why the device gave up what the task is about.
fn failure(task: &Task, sight: Sight<'_>) -> Option<String> {
    match task.what {
        What::Firmware => {
            let given_up = sight.firmware.slots().given_up()?;
            (given_up.digest == task.digest).then(|| given_up.reason.clone())
        }
        _ => sight.report.state.error.clone(),
    }
}

fn shelved(task: &Task) -> Shelved {
    Shelved {
        what: task.what,
        module: task.module.clone(),
        version: task.version.clone(),
        digest: task.digest,
        size: task.size,
        local: task.local,
        packages: vec![task.digest],
    }
}

/// How much of an installation is done when this phase begins, if it is one of an installation.
fn share(phase: Phase) -> Option<f64> {
    Some(match phase {
        Phase::Downloading => 0.0,
        Phase::Verifying => 0.2,
        Phase::Installing => 0.4,
        Phase::Restarting => 0.6,
        Phase::Confirming => 0.8,
        _ => return None,
    })
}

fn same(one: &str, other: &str) -> bool {
    normalized_name(one) == normalized_name(other)
}

fn key(what: What, module: &str) -> String {
    match what {
        What::Firmware => format!("firmware/{module}"),
        _ => normalized_name(module),
    }
}

fn invalid(name: &str) -> String {
    format!("invalid module {name}, skip...")
}

fn up_to_date(version: &str) -> String {
    format!("installed version({version}) is already up to date")
}
