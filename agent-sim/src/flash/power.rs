//! A flash whose power goes off at a chosen operation.

use std::io;

use super::{Flash, Kind};

/// Counts every operation that changes something, and fails at the chosen one and at everything after it.
#[derive(Debug)]
pub struct PowerCut<F> {
    flash: F,
    done: u64,
    cut_at: u64,
    tear: Tear,
    tore: bool,
    off: bool,
    loses: bool,
}

/// What becomes of the bytes that are being written when the power goes off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tear {
    /// None of them arrives.
    Clean,
    /// Half of them arrive.
    Torn,
}

impl<F: Flash> PowerCut<F> {
    /// The power goes off at operation `cut_at`, counted from 1.
    pub fn new(flash: F, cut_at: u64, tear: Tear) -> PowerCut<F> {
        PowerCut { flash, done: 0, cut_at, tear, tore: false, off: false, loses: false }
    }

    /// The power stays on; operations are counted only.
    pub fn never(flash: F) -> PowerCut<F> {
        PowerCut::new(flash, u64::MAX, Tear::Clean)
    }

    /// The same, after which what was not synced is lost, if `loses`.
    #[must_use]
    pub fn losing(self, loses: bool) -> PowerCut<F> {
        PowerCut { loses, ..self }
    }

    /// Whether what was not synced is to be lost.
    #[must_use]
    pub fn loses(&self) -> bool {
        self.loses
    }

    /// The flash below.
    #[must_use]
    pub fn inner(&self) -> &F {
        &self.flash
    }

    /// How many operations were asked for.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.done
    }

    /// Whether the cut tore a write: half its bytes are there.
    #[must_use]
    pub fn tore(&self) -> bool {
        self.tore
    }

    /// What the device finds when the power is back.
    #[must_use]
    pub fn into_inner(self) -> F {
        self.flash
    }

    fn powered(&self) -> io::Result<&F> {
        match self.off {
            true => Err(off()),
            false => Ok(&self.flash),
        }
    }

    fn change(&mut self) -> io::Result<&mut F> {
        if self.off {
            return Err(off());
        }
        self.done += 1;
        if self.done == self.cut_at {
            self.off = true;
            return Err(off());
        }
        Ok(&mut self.flash)
    }
}

impl<F: Flash> Flash for PowerCut<F> {
    fn kind(&self, path: &str) -> io::Result<Option<Kind>> {
        self.powered()?.kind(path)
    }
    fn read(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.powered()?.read(path, offset, buffer)
    }
    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        self.powered()?.list(path)
    }
    fn free(&self) -> io::Result<u64> {
        self.powered()?.free()
    }
    fn create(&mut self, path: &str) -> io::Result<()> {
        self.change()?.create(path)
    }
    fn append(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let was_on = !self.off;
        match self.change() {
            Ok(flash) => flash.append(path, bytes),
            Err(error) => {
                if was_on && self.tear == Tear::Torn {
                    self.tore = true;
                    self.flash.append(path, &bytes[..bytes.len() / 2])?;
                }
                Err(error)
            }
        }
    }
    fn truncate(&mut self, path: &str, length: u64) -> io::Result<()> {
        self.change()?.truncate(path, length)
    }
    fn sync(&mut self, path: &str) -> io::Result<()> {
        self.change()?.sync(path)
    }
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.change()?.rename(from, to)
    }
    fn remove(&mut self, path: &str) -> io::Result<()> {
        self.change()?.remove(path)
    }
    fn make_folder(&mut self, path: &str) -> io::Result<()> {
        self.change()?.make_folder(path)
    }
    fn remove_folder(&mut self, path: &str) -> io::Result<()> {
        self.change()?.remove_folder(path)
    }
    fn is_off(&self) -> bool {
        self.off
    }
}

fn off() -> io::Error {
    io::Error::other("the power is off")
}
