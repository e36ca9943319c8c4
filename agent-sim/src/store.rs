//! What a device keeps, such that a power cut at any operation leaves the old or the new release.
//!
//! # The format, shared with the MicroPython agent
//! Everything is below `.mpypi/` in the device's root; records are JSON, of `"format": 1`.
//!
//! | path | what |
//! |---|---|
//! | `installed.json` | what came from the channel: see [`Installed`] |
//! | `journal.json` | the release being put in place, or back: see [`Journal`]; absent at rest |
//! | `*.json.new` | a record being written; meaningless |
//! | `reserve` | room for records to come, on a flash that is full by then; meaningless |
//! | `staging/<sha256>` | a verified package, or a verified member of a wheel |
//! | `staging/<sha256>-<n>` | its copy number n, where one release needs the same bytes n + 1 times |
//! | `staging/*.part` | bytes still arriving; meaningless after a restart |
//! | `old/<n>` | the file that operation n of the journal replaced or removed |
//!
//! A record is replaced by writing `<name>.new`, syncing it, renaming it, and syncing the folder.
//!
//! # How a release gets in place
//! 1. Packages go to `staging/*.part` while they are hashed, and get their digest as name when it is right.
//! 2. Wheels are unpacked to `staging/` in the same way. What the device has already is skipped.
//! 3. Everything in `staging/` is synced, `reserve` is written. **Writing `journal.json` with step `install` is the commit.**
//! 4. Each operation moves the old file to `old/<n>` and the staged file to its place. After a power cut
//!    they are done again, those that were done are seen from where the files are.
//! 5. Step `confirm`: the new release runs, `old/` is kept. Every start is counted in `boots`; beyond
//!    [`limits::UNCONFIRMED_BOOTS`] the step becomes `rollback`.
//! 6. Confirmed: step `finish`; folders left empty are removed, `installed.json` is replaced, the journal is
//!    removed, then `old/` and `staging/` are emptied.
//! 7. Step `rollback`: each operation is undone, last first; `installed.json` notes in `seen.refused` that this
//!    list is not to be tried again; the journal is removed, then `old/` and `staging/` are emptied.
//!
//! A release that changes no file is recorded in `installed.json` at once.
//!
//! What the user put on the device is never removed. A file of theirs in the way of one of the release goes to
//! `old/` as any other, and comes back if the release is rolled back.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use mpypi_protocol::{Digest, FilePath, PackageId, digest::Hasher, limits as wire, list::Wheel};

use crate::{
    accept::Accepted,
    flash::{self, Flash, Kind},
    install::{is_file, redo, remove_folders, undo},
    journal::{
        self, FOLDER, FORMAT, INSTALLED, Installed, InstalledWheel, JOURNAL, Journal, OLD, Operation,
        RESERVE, RecordError, Refused, STAGING, Seen, Step, staged,
    },
    limits,
    refusal::Refusal,
    wheel,
};

/// A device's flash and what is known of it.
#[derive(Debug)]
pub struct Store<F> {
    flash: F,
    installed: Installed,
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
}

/// A release whose every byte is verified and in place or in staging. Only [`Store::stage`] makes one, and
/// nothing else can be committed.
#[derive(Debug)]
pub struct Staged {
    journal: Box<Journal>,
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
        Store { flash, installed: Installed::default(), journal: None, verified: BTreeMap::new() }
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
        self.installed = journal::read_installed(&self.flash)?.unwrap_or_default();
        self.journal = journal::read_journal(&self.flash)?;
        self.make_folders()?;
        let Some(mut journal) = self.journal.take() else {
            self.remove_reserve()?;
            self.clear(OLD)?;
            match &self.installed.seen {
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
            if journal.boots >= limits::UNCONFIRMED_BOOTS {
                journal.step = Step::Rollback;
                journal.reason = Some(reason.text());
            } else {
                journal.boots += 1;
            }
            journal::write(&mut self.flash, JOURNAL, &journal)?;
        }
        match journal.step {
            Step::Install => {
                redo(&mut self.flash, &journal)?;
                journal.step = Step::Confirm;
                journal.boots = 1;
                journal::write(&mut self.flash, JOURNAL, &journal)?;
                self.confirming(journal)
            }
            Step::Confirm => self.confirming(journal),
            Step::Finish => {
                self.finish(journal)?;
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
        if self.installed.seen.as_ref() == Some(&seen) {
            return Ok(());
        }
        let mut installed = self.installed.clone();
        installed.seen = Some(seen);
        self.write_installed(installed)
    }

    /// Notes that the list last accepted is not to be tried again, and drops what was fetched for it.
    ///
    /// # Errors
    /// Of the flash.
    pub fn refuse(&mut self, error: String) -> Result<(), Refusal> {
        let mut installed = self.installed.clone();
        if let Some(seen) = &mut installed.seen {
            seen.refused = Some(Refused { error, rolled_back: false });
        }
        self.write_installed(installed)?;
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
        let mut installed = self.installed.clone();
        match &mut installed.seen {
            Some(seen) if seen.refused.is_some() => seen.refused = None,
            _ => return Ok(()),
        }
        self.write_installed(installed)
    }

    /// What must be fetched to have everything that `release` says. Drops what is staged for others.
    ///
    /// # Errors
    /// Of the flash, or the release does not fit.
    pub fn survey(&mut self, release: &Accepted) -> Result<Vec<Need>, Refusal> {
        let mut needs = BTreeMap::new();
        let mut wanted = BTreeSet::new();
        for wheel in release.wheels() {
            wanted.insert(wheel.digest);
            if !self.verified.contains_key(&wheel.digest) && self.intact(wheel)?.is_none() {
                needs.insert(wheel.digest, Need { id: PackageId::Wheel(wheel.digest), size: wheel.size });
            }
        }
        for src in release.sources() {
            wanted.insert(src.digest);
            if src.digest != Digest::EMPTY
                && !self.verified.contains_key(&src.digest)
                && !self.has(&src.path, &src.digest)?
            {
                let id = PackageId::Src(src.path.clone(), src.digest);
                needs.entry(src.digest).or_insert(Need { id, size: src.size });
            }
        }
        for name in self.flash.list(STAGING)? {
            if !name.parse().is_ok_and(|digest| wanted.contains(&digest)) {
                self.flash.remove(&format!("{STAGING}/{name}"))?;
            }
        }
        self.verified.retain(|digest, _| wanted.contains(digest));
        let needs: Vec<_> = needs.into_values().collect();
        let needed = needs.iter().filter_map(|need| need.size).fold(0, u64::saturating_add);
        let free = self.flash.free()?;
        if needed > free {
            return Err(Refusal::NoSpace { needed, free });
        }
        Ok(needs)
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
        for wheel in release.wheels() {
            let unpacked = match self.intact(wheel)? {
                Some(files) => files,
                None => self.unpack(wheel)?,
            };
            let paths = unpacked.keys().cloned().collect();
            for (path, digest) in unpacked {
                add_file(&mut files, path, digest)?;
            }
            let record =
                InstalledWheel { version: wheel.version.clone(), digest: wheel.digest, files: paths };
            wheels.insert(wheel.name.clone(), record);
        }
        for src in release.sources() {
            add_file(&mut files, src.path.clone(), src.digest)?;
        }
        check_paths(&files)?;
        let folders = self.missing_folders(files.keys())?;
        let operations = self.operations(&files)?;
        self.flash.sync(STAGING)?;

        let of_ours = |folder: &&FilePath| {
            files.keys().any(|path| path.parents().any(|parent| parent == folder.as_str()))
        };
        let installed = Installed {
            format: FORMAT,
            channel: Some(release.channel().clone()),
            sequence: release.sequence(),
            version: release.version(),
            list: Some(release.digest()),
            seen: Some(release.seen()),
            wheels,
            folders: self.installed.folders.iter().chain(&folders).filter(of_ours).cloned().collect(),
            files,
        };
        let journal = Journal {
            format: FORMAT,
            step: Step::Install,
            boots: 0,
            reason: None,
            seen: release.seen(),
            folders,
            operations,
            installed,
        };
        Ok(Staged { journal: Box::new(journal) })
    }

    /// Commits a staged release and puts its files in place.
    ///
    /// # Errors
    /// Of the flash. If it happened after the commit, a restart goes on from there.
    pub fn commit(&mut self, staged: Staged) -> Result<Committed, Refusal> {
        let mut journal = *staged.journal;
        if self.journal.is_some() {
            return Err(Refusal::Bug("a release is committed while another is being confirmed"));
        }
        if journal.operations.is_empty() {
            self.finish(journal)?;
            return Ok(Committed::Unchanged);
        }
        self.clear(OLD)?;
        journal::commit(&mut self.flash, &journal, &self.installed)?;
        redo(&mut self.flash, &journal)?;
        journal.step = Step::Confirm;
        journal::write(&mut self.flash, JOURNAL, &journal)?;
        self.journal = Some(journal);
        Ok(Committed::Restart)
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
        journal::write(&mut self.flash, JOURNAL, &journal)?;
        Ok(self.finish(journal)?)
    }

    /// The new release is to be taken back by the next start.
    ///
    /// # Errors
    /// Of the flash, or there is nothing to take back.
    pub fn give_up(&mut self, reason: &Refusal) -> Result<(), Refusal> {
        let Some(journal) = &mut self.journal else {
            return Err(Refusal::Bug("there is no release to take back"));
        };
        journal.step = Step::Rollback;
        journal.reason = Some(reason.text());
        Ok(journal::write(&mut self.flash, JOURNAL, journal)?)
    }

    fn confirming(&mut self, journal: Journal) -> Result<Boot, BootError> {
        let seen = journal.seen.clone();
        self.journal = Some(journal);
        Ok(Boot::Confirming { seen })
    }

    fn finish(&mut self, journal: Journal) -> io::Result<()> {
        let left: Vec<_> = self.installed.folders.difference(&journal.installed.folders).cloned().collect();
        remove_folders(&mut self.flash, left.iter())?;
        self.end(journal.installed)
    }

    fn take_back(&mut self, journal: Journal) -> io::Result<Seen> {
        undo(&mut self.flash, &journal)?;
        let mut seen = journal.seen.clone();
        let error = journal.reason.unwrap_or_else(|| Refusal::ToldTo.text());
        seen.refused = Some(Refused { error, rolled_back: true });
        let mut installed = self.installed.clone();
        installed.seen = Some(seen.clone());
        self.end(installed)?;
        Ok(seen)
    }

    /// The last steps of a journal, whichever way it went.
    fn end(&mut self, installed: Installed) -> io::Result<()> {
        journal::write(&mut self.flash, INSTALLED, &installed)?;
        self.installed = installed;
        if is_file(&self.flash, JOURNAL)? {
            self.flash.remove(JOURNAL)?;
            self.flash.sync(FOLDER)?;
        }
        self.verified.clear();
        self.remove_reserve()?;
        self.clear(OLD)?;
        self.clear(STAGING)
    }

    fn remove_reserve(&mut self) -> io::Result<()> {
        match self.flash.kind(RESERVE)? {
            Some(_) => self.flash.remove(RESERVE),
            None => Ok(()),
        }
    }

    fn write_installed(&mut self, installed: Installed) -> Result<(), Refusal> {
        journal::write(&mut self.flash, INSTALLED, &installed)?;
        self.installed = installed;
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
        for path in self.installed.files.keys() {
            if !files.contains_key(path) && is_file(&self.flash, path.as_str())? {
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
            let target = staged(digest, copy);
            self.flash.create(&target)?;
            let mut piece = [0; limits::PIECE];
            let mut offset = 0;
            loop {
                let length = self.flash.read(&first, offset, &mut piece)?;
                if length == 0 {
                    break;
                }
                self.flash.append(&target, &piece[..length])?;
                offset += length as u64;
            }
            self.flash.sync(&target)?;
        }
        Ok(())
    }

    /// The folders that `paths` need and that are not there, outermost first.
    fn missing_folders<'a>(
        &self,
        paths: impl Iterator<Item = &'a FilePath>,
    ) -> Result<Vec<FilePath>, Refusal> {
        let mut missing = BTreeSet::new();
        for path in paths {
            for folder in path.parents() {
                match self.flash.kind(folder)? {
                    Some(Kind::Folder) => {}
                    None => {
                        let folder = FilePath::new(folder)
                            .map_err(|_| Refusal::Bug("a folder of a path is no path"))?;
                        missing.insert(folder);
                    }
                    Some(_) => {
                        return Err(Refusal::Conflict(format!(
                            "`{folder}` is a file on this device, and `{path}` needs it as a folder"
                        )));
                    }
                }
            }
        }
        Ok(missing.into_iter().collect())
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
        self.journal.operations.len()
    }
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
