//! What a device keeps, such that a power cut at any operation leaves the old or the new release.
//!
//! # The format, shared with the MicroPython agent
//! Everything is below `.mpypi/` in the device's root. Records are JSON, or JSON Lines: a header, then one object to a
//! line. Each record's first line is an object with `"format":1`, every line ends with a line feed. See
//! [`journal`] for what they say; golden ones are in `protocol/vectors/flash.json`.
//!
//! | path | what |
//! |---|---|
//! | `installed.jsonl` | what came from the channel: `channel`, `sequence`, `version`, `list`, `rollout`; then `{"wheel":name,"version":…,"digest":…}`, with `"local":true` if no list brought it; then `{"file":path,"digest":…,"wheel":name}`, sorted by path and wheel, once for each wheel that brings the file, and without `wheel` for a src file; then `{"folder":path}` for each folder made, sorted as if a `/` ended the path |
//! | `seen.json` | the newest list accepted: see [`Seen`] |
//! | `root.json` | the newest root that was verified, to the letter as it came; replaced as `seen.json` is |
//! | `journal.json` | the release being put in place, or back: `step`, `boots`, `keep`, `reason`, `seen`; absent at rest |
//! | `plan.jsonl` | its operations: `{"folder":path}` to be made, sorted likewise; then, numbered from 0, `{"put":path,"digest":…,"copy":n,"had":bool}` and `{"remove":path}`, each of another path; meaningless without a journal |
//! | `next.jsonl` | what `installed.jsonl` will be; meaningless without a journal |
//! | `*.new` | a record being written; meaningless |
//! | `list.*` | the newest list, where a device has no memory for it; a device may be without |
//! | `list.part` | a list still arriving; meaningless after a restart |
//! | `reserve` | room for records to come, on a flash that is full by then; meaningless |
//! | `staging/<sha256>` | a verified package, or a verified member of a wheel |
//! | `staging/<sha256>-<n>` | another copy of it, where one release needs the same bytes more than once |
//! | `staging/<sha256>.chunks` | the first chunks of a package, one behind the other, and perhaps bytes of another; each is believed as far as it has the digest that the list says |
//! | `staging/*.part` | bytes still arriving; meaningless after a restart |
//! | `old/<n>` | the file that operation n of the plan replaced or removed |
//! | `old/*.part` | bytes still being copied; meaningless |
//!
//! `journal.json` and `seen.json` are replaced by writing `<name>.new`, syncing it, renaming it, and syncing the folder.
//!
//! # How a release gets in place
//! 1. Packages go to `staging/*.part` while they are hashed, and get their digest as name when it is right. Chunks go to
//!    `staging/<sha256>.chunks` once they are, in their order, each for good; with the last one, and the digest of the
//!    whole, that file becomes the package.
//! 2. Wheels are unpacked to `staging/` in the same way. What the device has already is skipped.
//! 3. Of old files that are code (`*.py`, `*.mpy`), or that lie in the root, in `lib/` or in `lib/mpypi/`, a copy is
//!    written to `old/<n>`. `next.jsonl`, `plan.jsonl` and `reserve` are written, everything is synced; then
//!    the folders of the plan are made. (Where there is a plan and no journal, a start removes those that are empty.)
//!    **Writing `journal.json` with step `install` is the commit.**
//! 4. Each operation moves the old file to `old/<n>`, unless a copy is kept there, and the staged file to its place.
//!    What a start needs is so replaced by one rename, and a power cut leaves no device without its `boot.py`; nor
//!    is anything moved out of the folders that a start needs: littlefs, when a power cut has interrupted that,
//!    hides the moved file's neighbour until something is written. After a power cut the operations are done
//!    again, those that were done are seen from where the files are.
//! 5. Step `confirm`: the new release runs, `old/` is kept. Every start is counted in `boots`; beyond
//!    [`limits::UNCONFIRMED_BOOTS`] the step becomes `rollback`.
//!    Where the release before is revoked (`keep`), the step becomes `finish` instead: there is nothing to go back to.
//! 6. Confirmed: step `finish`; folders left empty are removed, `next.jsonl` becomes `installed.jsonl`, the journal is
//!    removed, then everything meaningless, `old/` and `staging/`.
//! 7. Step `rollback`: each operation is undone; `seen.json` notes in `refused` that this list is not to be tried
//!    again; the journal is removed, then everything meaningless, `old/` and `staging/`.
//!
//! A release that changes no file is recorded in `installed.jsonl` at once.
//!
//! What the user put on the device is never removed. A file of theirs in the way of one of the release goes to
//! `old/` as any other, and comes back if the release is rolled back. The agent itself, [`AGENT`], stays where a release
//! does not bring it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use mpypi_protocol::{
    Chunks, Digest, FilePath, PackageId, Root, digest::Hasher, limits as wire, list::Wheel, root::SignedRoot,
    wheel::normalized_name,
};

use crate::{
    accept::{Accepted, Composed, is_local},
    flash::{self, Flash, Kind},
    install::{is_file, make_folders, redo, remove_folders, undo},
    journal::{
        self, AGENT, FOLDER, Folder, INSTALLED, Installed, InstalledWheel, JOURNAL, Journal, LIST_PART, NEXT,
        OLD, Operation, PLAN, Plan, RESERVE, ROOT, RecordError, Refused, SEEN, STAGING, Seen, Step, old,
        staged,
    },
    limits, parts,
    refusal::Refusal,
    wheel,
};

/// A device's flash and what is known of it.
#[derive(Debug)]
pub struct Store<F> {
    flash: F,
    installed: Installed,
    seen: Option<Seen>,
    root: Option<SignedRoot>,
    journal: Option<Journal>,
    /// What `staging/` holds under its own digest, with its size.
    verified: BTreeMap<Digest, u64>,
}

/// What a start found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// The installed release runs.
    Rest,
    /// A new release runs and is not confirmed yet.
    Confirming {
        /// Which.
        seen: Seen,
    },
    /// A release was taken back in this start.
    RolledBack {
        /// Which; `refused` says why.
        seen: Seen,
    },
}

/// A start failed.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A record cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The flash failed. Another start may succeed.
    #[error("the device's flash failed")]
    Flash(#[from] io::Error),
}

/// A package that is to be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Which.
    pub id: PackageId,
    /// Its size in bytes, if the list says it.
    pub size: Option<u64>,
    /// How it is cut, if it lies in chunks.
    pub chunks: Option<Chunks>,
    /// How many of them the device has.
    pub have: u32,
}

impl Need {
    /// Bytes that are still to come, as far as the list says it.
    #[must_use]
    pub fn left(&self) -> Option<u64> {
        let there = self.chunks.as_ref().map_or(0, |chunks| u64::from(self.have) * chunks.size());
        Some(self.size?.saturating_sub(there))
    }
}

/// A release whose every byte is verified and in place or in staging. Only [`Store::stage`] makes one, and
/// nothing else can be committed.
#[derive(Debug)]
pub struct Staged {
    seen: Seen,
    /// Whether what it replaces is revoked.
    keep: bool,
    plan: Plan,
    next: Box<Installed>,
}

/// What a commit led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Committed {
    /// Nothing had to change; the release is installed.
    Unchanged,
    /// The files are in place; the device restarts and confirms.
    Restart,
}

/// A package on its way to staging.
#[derive(Debug)]
pub struct Incoming<'a, F> {
    store: &'a mut Store<F>,
    need: Need,
    part: String,
    hasher: Hasher,
    size: u64,
}

impl<F: Flash> Store<F> {
    /// A device that is switched off: [`reboot`](Store::reboot) comes before anything else.
    pub fn off(flash: F) -> Store<F> {
        let installed = Installed::default();
        Store { flash, installed, seen: None, root: None, journal: None, verified: BTreeMap::new() }
    }

    /// Starts a device: finishes or takes back what a journal says, and clears what no journal names.
    ///
    /// # Errors
    /// See [`BootError`].
    pub fn boot(flash: F) -> Result<(Store<F>, Boot), BootError> {
        let mut store = Store::off(flash);
        let boot = store.reboot()?;
        Ok((store, boot))
    }

    /// The device restarts: everything in memory is forgotten.
    ///
    /// # Errors
    /// See [`BootError`].
    pub fn reboot(&mut self) -> Result<Boot, BootError> {
        self.verified.clear();
        self.installed = journal::read_installed(&self.flash, INSTALLED)?.unwrap_or_default();
        self.seen = journal::read_seen(&self.flash)?;
        self.root = journal::read_root(&self.flash)?;
        self.journal = journal::read_journal(&self.flash)?;
        self.make_folders()?;
        let Some(mut journal) = self.journal.take() else {
            self.tidy()?;
            if is_file(&self.flash, LIST_PART)? {
                self.flash.remove(LIST_PART)?;
            }
            match &self.seen {
                Some(seen) if Some(seen.list) != self.installed.list && seen.refused.is_none() => {
                    self.check_staging()?;
                }
                // Nothing is under way that could use it.
                _ => self.clear(STAGING)?,
            }
            return Ok(Boot::Rest);
        };
        if matches!(journal.step, Step::Install | Step::Confirm) {
            let reason = match journal.step {
                Step::Install => Refusal::NotInstalled { boots: journal.boots },
                _ => Refusal::NotConfirmed { boots: journal.boots },
            };
            if journal.boots >= limits::UNCONFIRMED_BOOTS && journal.keep && journal.step == Step::Confirm {
                // Bad as this one may be: what was before is revoked, and there is nothing to go back to.
                journal.step = Step::Finish;
            } else if journal.boots >= limits::UNCONFIRMED_BOOTS {
                journal.step = Step::Rollback;
                journal.reason = Some(reason.text());
            } else {
                journal.boots += 1;
            }
            journal::replace(&mut self.flash, JOURNAL, &journal)?;
        }
        match journal.step {
            Step::Install => {
                let plan = journal::read_plan(&self.flash)?;
                redo(&mut self.flash, &plan)?;
                journal.step = Step::Confirm;
                journal.boots = 1;
                journal::replace(&mut self.flash, JOURNAL, &journal)?;
                self.confirming(journal)
            }
            Step::Confirm => self.confirming(journal),
            Step::Finish => {
                self.finish(journal.seen)?;
                Ok(Boot::Rest)
            }
            Step::Rollback => Ok(Boot::RolledBack { seen: self.take_back(journal)? }),
        }
    }

    /// What is installed.
    #[must_use]
    pub fn installed(&self) -> &Installed {
        &self.installed
    }

    /// The newest list that was accepted, installed or not.
    #[must_use]
    pub fn seen(&self) -> Option<&Seen> {
        self.seen.as_ref()
    }

    /// The newest root that was verified on this device, if it ever was given one.
    #[must_use]
    pub fn root(&self) -> Option<&SignedRoot> {
        self.root.as_ref()
    }

    /// The flash.
    #[must_use]
    pub fn flash(&self) -> &F {
        &self.flash
    }

    /// The flash, for a device that is taken apart.
    #[must_use]
    pub fn into_flash(self) -> F {
        self.flash
    }

    /// Notes that a list was accepted: nothing older is believed from now on, also after a restart.
    ///
    /// # Errors
    /// Of the flash.
    pub fn remember(&mut self, seen: Seen) -> Result<(), Refusal> {
        Ok(self.write_seen(seen)?)
    }

    /// Keeps a root that was verified: none before it is believed from now on, also after a restart.
    ///
    /// # Errors
    /// Of the flash.
    pub fn keep_root(&mut self, root: &Root) -> Result<(), Refusal> {
        Ok(journal::replace_root(&mut self.flash, root)?)
    }

    /// Notes that the list last accepted is not to be tried again, and drops what was fetched for it.
    ///
    /// # Errors
    /// Of the flash.
    pub fn refuse(&mut self, error: String) -> Result<(), Refusal> {
        if let Some(seen) = self.seen.clone() {
            let refused = Some(Refused { error, rolled_back: false });
            self.write_seen(Seen { refused, ..seen })?;
        }
        self.discard()
    }

    /// Drops what was fetched.
    ///
    /// # Errors
    /// Of the flash.
    pub fn discard(&mut self) -> Result<(), Refusal> {
        self.verified.clear();
        Ok(self.clear(STAGING)?)
    }

    /// Forgets that the list last accepted was refused.
    ///
    /// # Errors
    /// Of the flash.
    pub fn forgive(&mut self) -> Result<(), Refusal> {
        if let Some(seen) = self.seen.clone() {
            self.write_seen(Seen { refused: None, ..seen })?;
        }
        Ok(())
    }

    /// What must be fetched to have everything that `release` says. Drops what is staged for others.
    ///
    /// # Errors
    /// Of the flash, or the release does not fit.
    pub fn survey(&mut self, release: &Accepted) -> Result<Vec<Need>, Refusal> {
        let (compared, wanted) = self.compare(release)?;
        for name in self.flash.list(STAGING)? {
            let digest = name.strip_suffix(parts::END).unwrap_or(&name);
            if !digest.parse().is_ok_and(|digest| wanted.contains(&digest)) {
                self.flash.remove(&format!("{STAGING}/{name}"))?;
            }
        }
        self.verified.retain(|digest, _| wanted.contains(digest));
        let mut needs = Vec::new();
        for mut need in compared {
            let digest = *need.id.digest();
            let place = staged(&digest, 0);
            if parts::resume(&mut self.flash, &in_chunks(&digest), &place, &mut need)? {
                self.verified.insert(digest, need.size.unwrap_or_default());
            } else {
                needs.push(need);
            }
        }
        let needed = needs.iter().filter_map(Need::left).fold(0, u64::saturating_add);
        let free = self.flash.free()?;
        if needed > free {
            return Err(Refusal::NoSpace { needed, free });
        }
        Ok(needs)
    }

    /// What the device lacks of everything that `release` says.
    ///
    /// # Errors
    /// Of the flash.
    pub fn missing(&self, release: &Accepted) -> Result<Vec<Need>, Refusal> {
        Ok(self.compare(release)?.0)
    }

    /// What is missing, and all that is wanted.
    fn compare(&self, release: &Accepted) -> io::Result<(Vec<Need>, BTreeSet<Digest>)> {
        let mut needs = BTreeMap::new();
        let mut wanted = BTreeSet::new();
        for wheel in &self.chosen(release) {
            wanted.insert(wheel.digest);
            if !self.verified.contains_key(&wheel.digest) && self.intact(wheel)?.is_none() {
                let (id, chunks) = (PackageId::Wheel(wheel.digest), wheel.chunks.clone());
                needs.insert(wheel.digest, Need { id, size: wheel.size, chunks, have: 0 });
            }
        }
        for src in release.sources() {
            wanted.insert(src.digest);
            if src.digest != Digest::EMPTY
                && !self.verified.contains_key(&src.digest)
                && !self.has(&src.path, &src.digest)?
            {
                let id = PackageId::Src(src.path.clone(), src.digest);
                let chunks = src.chunks.clone();
                needs.entry(src.digest).or_insert(Need { id, size: src.size, chunks, have: 0 });
            }
        }
        Ok((needs.into_values().collect(), wanted))
    }

    /// Verifies the next chunk of a package and keeps it for good; with the last one, verifies the package.
    ///
    /// # Errors
    /// A digest is wrong, the package larger than this device takes, or the flash fails. What came before stays, unless it is
    /// the package's digest that is wrong.
    pub fn receive_chunk(&mut self, need: &Need, number: u32, bytes: &[u8]) -> Result<(), Refusal> {
        let digest = *need.id.digest();
        let path = in_chunks(&digest);
        if parts::receive(&mut self.flash, &path, &staged(&digest, 0), need, number, bytes)? {
            self.verified.insert(digest, need.size.unwrap_or_default());
        }
        Ok(())
    }

    /// Takes a package that is on the device already, at `path`, if it is whole; whether it was.
    ///
    /// # Errors
    /// Of the flash.
    pub fn adopt(&mut self, need: &Need, path: &str) -> Result<bool, Refusal> {
        let digest = *need.id.digest();
        let Some(Kind::File(size)) = self.flash.kind(path)? else { return Ok(false) };
        if flash::digest(&self.flash, path)? != Some(digest) {
            return Ok(false);
        }
        let part = format!("{}.part", staged(&digest, 0));
        flash::copy(&mut self.flash, path, &part)?;
        self.flash.rename(&part, &staged(&digest, 0))?;
        self.verified.insert(digest, size);
        Ok(true)
    }

    /// The flash, for what else is kept below the agent's folder.
    pub(crate) fn flash_mut(&mut self) -> &mut F {
        &mut self.flash
    }

    /// The wheels of `release` that this device is to have: all but those optional ones that nobody chose; and those
    /// that came from files of this machine, which no list names.
    fn chosen(&self, release: &Accepted) -> Vec<Wheel> {
        if release.composition().is_some() {
            return release.wheels().to_vec();
        }
        let same = |one: &str, other: &str| normalized_name(one) == normalized_name(other);
        let has = |name: &str| self.installed.wheels.keys().any(|installed| same(installed, name));
        let mut wheels: Vec<_> = release
            .wheels()
            .iter()
            .filter(|wheel| !wheel.is_optional() || has(&wheel.name))
            .cloned()
            .collect();
        for (name, wheel) in self.installed.wheels.iter().filter(|(_, wheel)| wheel.local) {
            if !wheels.iter().any(|wheel| same(&wheel.name, name)) {
                wheels.push(wheel.entry(name));
            }
        }
        wheels
    }

    fn is_local_here(&self, wheel: &Wheel) -> bool {
        let here = self.installed.wheels.get(&wheel.name);
        here.is_some_and(|here| here.local && here.digest == wheel.digest)
    }

    /// Takes a package in, piece by piece.
    ///
    /// # Errors
    /// Of the flash.
    pub fn receive(&mut self, need: Need) -> Result<Incoming<'_, F>, Refusal> {
        let part = format!("{}.part", staged(need.id.digest(), 0));
        self.flash.create(&part)?;
        Ok(Incoming { store: self, need, part, hasher: Hasher::default(), size: 0 })
    }

    /// Unpacks what was fetched, and works out what has to change.
    ///
    /// # Errors
    /// A wheel is refused, two files want one place, a package is missing, or the flash fails.
    pub fn stage(&mut self, release: &Accepted) -> Result<Staged, Refusal> {
        let mut files: BTreeMap<FilePath, Digest> = BTreeMap::new();
        let mut wheels = BTreeMap::new();
        for wheel in &self.chosen(release) {
            let unpacked = match self.intact(wheel)? {
                Some(files) => files,
                None => self.unpack(wheel)?,
            };
            let paths = unpacked.keys().cloned().collect();
            for (path, digest) in unpacked {
                add_file(&mut files, path, digest)?;
            }
            let local = release.composition().is_some() && is_local(wheel) || self.is_local_here(wheel);
            let record =
                InstalledWheel { version: wheel.version.clone(), digest: wheel.digest, files: paths, local };
            wheels.insert(wheel.name.clone(), record);
        }
        for src in release.sources() {
            add_file(&mut files, src.path.clone(), src.digest)?;
        }
        check_paths(&files)?;
        let folders = self.missing_folders(files.keys())?;
        let operations = self.operations(&files)?;
        self.flash.sync(STAGING)?;

        let of_ours = |folder: &&Folder| {
            files.keys().any(|path| path.parents().any(|parent| parent == folder.0.as_str()))
        };
        let is_release = release.composition() != Some(Composed::Partly);
        let next = Installed {
            channel: Some(release.channel().clone()),
            sequence: if is_release { release.sequence() } else { self.installed.sequence },
            version: if is_release { release.version() } else { self.installed.version.clone() },
            list: is_release.then(|| release.digest()),
            rollout: if is_release { release.seen().rollout } else { None },
            wheels,
            folders: self.installed.folders.iter().chain(&folders).filter(of_ours).cloned().collect(),
            files,
            sources: release.sources().map(|src| src.path.clone()).collect(),
        };
        let keep = self.installed.channel.as_ref() == Some(release.channel())
            && self.installed.sequence.is_some_and(|sequence| release.revokes(sequence));
        let plan = Plan { folders, operations };
        Ok(Staged { seen: release.seen(), keep, plan, next: Box::new(next) })
    }

    /// Commits a staged release and puts its files in place.
    ///
    /// # Errors
    /// Of the flash. If it happened after the commit, a restart goes on from there.
    pub fn commit(&mut self, staged: Staged) -> Result<Committed, Refusal> {
        let Staged { seen, keep, plan, next } = staged;
        if self.journal.is_some() {
            return Err(Refusal::Bug("a release is committed while another is being confirmed"));
        }
        if plan.operations.is_empty() {
            journal::write_installed(&mut self.flash, NEXT, &next)?;
            self.finish(seen)?;
            return Ok(Committed::Unchanged);
        }
        let mut journal = Journal { step: Step::Install, boots: 0, keep, reason: None, seen };
        let committed = self
            .prepare_commit(&plan, &next)
            .and_then(|()| journal::replace(&mut self.flash, JOURNAL, &journal));
        if let Err(error) = committed {
            if self.flash.kind(JOURNAL)?.is_none() {
                // It takes up room that may be what is missing.
                let _ = self.tidy();
            }
            return Err(error.into());
        }
        redo(&mut self.flash, &plan)?;
        journal.step = Step::Confirm;
        journal::replace(&mut self.flash, JOURNAL, &journal)?;
        self.journal = Some(journal);
        Ok(Committed::Restart)
    }

    /// Writes what a commit needs. There is room for what either way still has to write, or nothing is
    /// committed.
    fn prepare_commit(&mut self, plan: &Plan, next: &Installed) -> io::Result<()> {
        self.clear(OLD)?;
        for (number, operation) in plan.operations.iter().enumerate() {
            let path = operation.path().as_str();
            if needed_to_start(path) && matches!(self.flash.kind(path)?, Some(Kind::File(_))) {
                let (kept, part) = (old(number), format!("{}.part", old(number)));
                flash::copy(&mut self.flash, path, &part)?;
                self.flash.rename(&part, &kept)?;
            }
        }
        self.flash.sync(OLD)?;
        journal::write_installed(&mut self.flash, NEXT, next)?;
        journal::write_plan(&mut self.flash, plan)?;
        journal::reserve(&mut self.flash)?;
        self.flash.sync(FOLDER)?;
        make_folders(&mut self.flash, &plan.folders)
    }

    /// The new release proved itself: it is what is installed from now on.
    ///
    /// # Errors
    /// Of the flash; a restart goes on from there.
    pub fn confirm(&mut self) -> Result<(), Refusal> {
        let Some(mut journal) = self.journal.take() else {
            return Err(Refusal::Bug("there is no release to confirm"));
        };
        journal.step = Step::Finish;
        journal::replace(&mut self.flash, JOURNAL, &journal)?;
        Ok(self.finish(journal.seen)?)
    }

    /// The new release is to be taken back by the next start.
    ///
    /// # Errors
    /// Of the flash, or there is nothing to take back, or nothing to go back to.
    pub fn give_up(&mut self, reason: &Refusal) -> Result<(), Refusal> {
        let Some(journal) = &mut self.journal else {
            return Err(Refusal::Bug("there is no release to take back"));
        };
        if journal.keep {
            return Err(Refusal::NoWayBack);
        }
        journal.step = Step::Rollback;
        journal.reason = Some(reason.text());
        Ok(journal::replace(&mut self.flash, JOURNAL, journal)?)
    }

    fn confirming(&mut self, journal: Journal) -> Result<Boot, BootError> {
        let seen = journal.seen.clone();
        self.journal = Some(journal);
        Ok(Boot::Confirming { seen })
    }

    /// `next.jsonl` becomes what is installed, and `seen` the newest list accepted, unless a newer one was.
    fn finish(&mut self, seen: Seen) -> Result<(), RecordError> {
        if let Some(next) = journal::read_installed(&self.flash, NEXT)? {
            let left: Vec<_> = self.installed.folders.difference(&next.folders).collect();
            let mut rename = || {
                remove_folders(&mut self.flash, left.iter().copied())?;
                self.flash.rename(NEXT, INSTALLED)?;
                self.flash.sync(FOLDER)
            };
            rename().map_err(|source| RecordError::Flash { path: NEXT, source })?;
            self.installed = next;
        }
        let written = if self.has_seen_newer(&seen) { Ok(()) } else { self.write_seen(seen) };
        let end = written.and_then(|()| self.end());
        end.map_err(|source| RecordError::Flash { path: JOURNAL, source })
    }

    fn take_back(&mut self, journal: Journal) -> Result<Seen, BootError> {
        let plan = journal::read_plan(&self.flash)?;
        undo(&mut self.flash, &plan)?;
        let error = journal.reason.unwrap_or_else(|| Refusal::ToldTo.text());
        let refused = Some(Refused { error, rolled_back: true });
        let seen = Seen { refused: refused.clone(), ..journal.seen };
        match self.seen.clone().filter(|_| self.has_seen_newer(&seen)) {
            // The list that named it as a base: with that it is not to be tried again.
            Some(newer) => self.write_seen(Seen { refused, ..newer })?,
            None => self.write_seen(seen.clone())?,
        }
        self.end()?;
        Ok(seen)
    }

    /// Whether the release that `seen` is about is the base of a newer list: nothing older than that may be believed.
    fn has_seen_newer(&self, seen: &Seen) -> bool {
        let newest = self.seen.as_ref().filter(|newest| newest.channel == seen.channel);
        newest.is_some_and(|newest| newest.sequence > seen.sequence)
    }

    /// The last steps of a journal, whichever way it went.
    fn end(&mut self) -> io::Result<()> {
        if is_file(&self.flash, JOURNAL)? {
            self.flash.remove(JOURNAL)?;
            self.flash.sync(FOLDER)?;
        }
        self.verified.clear();
        self.tidy()?;
        self.clear(STAGING)
    }

    /// Removes what means nothing without a journal, and the folders that were made for a release and not used.
    fn tidy(&mut self) -> io::Result<()> {
        // A plan that was being written when the power went off cannot be read; no folder was made for it yet.
        if let Ok(plan) = journal::read_plan(&self.flash) {
            remove_folders(&mut self.flash, plan.folders.iter())?;
        }
        let new = [SEEN, JOURNAL, ROOT].map(|record| format!("{record}.new"));
        for path in [RESERVE, PLAN, NEXT].into_iter().chain(new.iter().map(String::as_str)) {
            if is_file(&self.flash, path)? {
                self.flash.remove(path)?;
            }
        }
        self.clear(OLD)
    }

    fn write_seen(&mut self, seen: Seen) -> io::Result<()> {
        if self.seen.as_ref() != Some(&seen) {
            journal::replace(&mut self.flash, SEEN, &seen)?;
            self.seen = Some(seen);
        }
        Ok(())
    }

    fn make_folders(&mut self) -> io::Result<()> {
        for folder in [FOLDER, STAGING, OLD] {
            if self.flash.kind(folder)?.is_none() {
                self.flash.make_folder(folder)?;
            }
            self.flash.sync(flash::parent(folder))?;
        }
        Ok(())
    }

    /// Empties a folder of ours, for good: a stale `old/3` would be taken for operation 3 of the next journal.
    fn clear(&mut self, folder: &str) -> io::Result<()> {
        for name in self.flash.list(folder)? {
            self.flash.remove(&format!("{folder}/{name}"))?;
        }
        self.flash.sync(folder)
    }

    /// Keeps what is complete and right, so that downloads go on after a restart.
    fn check_staging(&mut self) -> io::Result<()> {
        for name in self.flash.list(STAGING)? {
            let path = format!("{STAGING}/{name}");
            if name.strip_suffix(parts::END).is_some_and(|digest| digest.parse::<Digest>().is_ok()) {
                // The list says what of it is right, when it comes.
                continue;
            }
            let found = flash::digest(&self.flash, &path)?;
            match (name.parse::<Digest>(), found, self.flash.kind(&path)?) {
                (Ok(digest), Some(found), Some(Kind::File(size))) if digest == found => {
                    self.verified.insert(digest, size);
                }
                _ => self.flash.remove(&path)?,
            }
        }
        Ok(())
    }

    fn has(&self, path: &FilePath, digest: &Digest) -> io::Result<bool> {
        Ok(flash::digest(&self.flash, path.as_str())? == Some(*digest))
    }

    /// The files of `wheel`, if the device has them all, unchanged.
    fn intact(&self, wheel: &Wheel) -> io::Result<Option<BTreeMap<FilePath, Digest>>> {
        let found = self.installed.wheels.get(&wheel.name).filter(|found| found.digest == wheel.digest);
        let Some(found) = found else { return Ok(None) };
        let mut files = BTreeMap::new();
        for path in &found.files {
            match self.installed.files.get(path) {
                Some(digest) if self.has(path, digest)? => files.insert(path.clone(), *digest),
                _ => return Ok(None),
            };
        }
        Ok(Some(files))
    }

    fn unpack(&mut self, wheel: &Wheel) -> Result<BTreeMap<FilePath, Digest>, Refusal> {
        let verified = &self.verified;
        let unpacked = wheel::unpack(&mut self.flash, wheel, |flash, path, digest| {
            Ok(verified.contains_key(digest) || flash::digest(flash, path.as_str())? == Some(*digest))
        });
        if unpacked.is_err() && flash::digest(&self.flash, &staged(&wheel.digest, 0))? != Some(wheel.digest) {
            // It was right when it was received: not the wheel is bad, but the flash.
            self.verified.remove(&wheel.digest);
            return Err(Refusal::Storage(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("wheel `{}` changed in staging", wheel.name),
            )));
        }
        unpacked
    }

    /// What has to change for the device to have `files` and nothing else from the channel.
    fn operations(&mut self, files: &BTreeMap<FilePath, Digest>) -> Result<Vec<Operation>, Refusal> {
        let mut operations = Vec::new();
        let mut copies: BTreeMap<Digest, u32> = BTreeMap::new();
        for (path, digest) in files {
            let found = self.flash.kind(path.as_str())?;
            if found == Some(Kind::Folder) {
                return Err(Refusal::Conflict(format!("`{path}` is a folder on this device")));
            }
            if self.has(path, digest)? {
                continue;
            }
            let next = copies.entry(*digest).or_default();
            let copy = *next;
            *next += 1;
            self.prepare(path, digest, copy)?;
            operations.push(Operation::Put {
                path: path.clone(),
                digest: *digest,
                copy,
                had: found.is_some(),
            });
        }
        let is_agents = |path: &FilePath| path.as_str().starts_with(AGENT);
        let brings_agent = files.keys().any(is_agents);
        for path in self.installed.files.keys() {
            let stays = files.contains_key(path) || is_agents(path) && !brings_agent;
            if !stays && is_file(&self.flash, path.as_str())? {
                operations.push(Operation::Remove { path: path.clone() });
            }
        }
        Ok(operations)
    }

    /// Makes sure that copy number `copy` of a file is in staging, complete and synced.
    fn prepare(&mut self, path: &FilePath, digest: &Digest, copy: u32) -> Result<(), Refusal> {
        let first = staged(digest, 0);
        if *digest == Digest::EMPTY && !is_file(&self.flash, &first)? {
            self.flash.create(&first)?;
            self.flash.sync(&first)?;
        }
        if !is_file(&self.flash, &first)? {
            return Err(Refusal::MissingPackage { topic: PackageId::Src(path.clone(), *digest).topic() });
        }
        if copy > 0 {
            flash::copy(&mut self.flash, &first, &staged(digest, copy))?;
        }
        Ok(())
    }

    /// The folders that `paths` need and that are not there, outermost first.
    fn missing_folders<'a>(
        &self,
        paths: impl Iterator<Item = &'a FilePath>,
    ) -> Result<BTreeSet<Folder>, Refusal> {
        let mut missing = BTreeSet::new();
        for path in paths {
            for folder in path.parents() {
                match self.flash.kind(folder)? {
                    Some(Kind::Folder) => {}
                    None => {
                        let folder = FilePath::new(folder)
                            .map_err(|_| Refusal::Bug("a folder of a path is no path"))?;
                        missing.insert(Folder(folder));
                    }
                    Some(_) => {
                        return Err(Refusal::Conflict(format!(
                            "`{folder}` is a file on this device, and `{path}` needs it as a folder"
                        )));
                    }
                }
            }
        }
        Ok(missing)
    }
}

impl<F: Flash> Incoming<'_, F> {
    /// Takes the next piece.
    ///
    /// # Errors
    /// There are more bytes than announced, or more than this device takes, or the flash fails. What came
    /// is thrown away.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), Refusal> {
        self.size += piece.len() as u64;
        let package = || self.need.id.clone();
        let refusal = match self.need.size {
            Some(announced) if self.size > announced => {
                Some(Refusal::WrongSize { package: package(), announced, found: self.size })
            }
            _ if self.size > wire::PACKAGE => Some(Refusal::TooLarge { package: package() }),
            _ => None,
        };
        if let Some(refusal) = refusal {
            self.store.flash.remove(&self.part)?;
            return Err(refusal);
        }
        self.hasher.update(piece);
        let appended = self.store.flash.append(&self.part, piece);
        appended.map_err(|error| {
            let free = self.store.flash.free().unwrap_or(0);
            Refusal::from_flash(error, self.need.size.unwrap_or(self.size), free)
        })
    }

    /// All pieces have come: verifies them.
    ///
    /// # Errors
    /// The size or digest is wrong, or the flash fails. What came is thrown away.
    pub fn finish(self) -> Result<(), Refusal> {
        let Incoming { store, need, part, hasher, size } = self;
        let package = need.id.clone();
        let digest = *need.id.digest();
        let found = hasher.finish();
        let refusal = match need.size {
            Some(announced) if announced != size => {
                Some(Refusal::WrongSize { package, announced, found: size })
            }
            _ if found != digest => Some(Refusal::WrongHash { package, found }),
            _ => None,
        };
        if let Some(refusal) = refusal {
            store.flash.remove(&part)?;
            return Err(refusal);
        }
        store.flash.sync(&part)?;
        store.flash.rename(&part, &staged(&digest, 0))?;
        store.verified.insert(digest, size);
        Ok(())
    }
}

impl Staged {
    /// How many files change.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.plan.operations.len()
    }
}

/// Where the chunks of a package are that have come.
fn in_chunks(digest: &Digest) -> String {
    format!("{}{}", staged(digest, 0), parts::END)
}

/// Whether a file is code, or lies beside what a start needs: `boot.py`, `lib/`, `lib/mpypi/`.
fn needed_to_start(path: &str) -> bool {
    [".py", ".mpy"].iter().any(|end| path.ends_with(end))
        || ["", "lib", "lib/mpypi"].contains(&flash::parent(path))
}

fn add_file(files: &mut BTreeMap<FilePath, Digest>, path: FilePath, digest: Digest) -> Result<(), Refusal> {
    match files.insert(path.clone(), digest) {
        Some(other) if other != digest => Err(Refusal::Conflict(format!(
            "two packages of this release bring `{path}`, with different content"
        ))),
        _ => Ok(()),
    }
}

/// Refuses a file that another file needs as a folder.
fn check_paths(files: &BTreeMap<FilePath, Digest>) -> Result<(), Refusal> {
    for path in files.keys() {
        let is_file = |folder: &&str| FilePath::new(*folder).is_ok_and(|folder| files.contains_key(&folder));
        if let Some(folder) = path.parents().find(is_file) {
            return Err(Refusal::Conflict(format!(
                "`{folder}` is a file, and `{path}` needs it as a folder"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
