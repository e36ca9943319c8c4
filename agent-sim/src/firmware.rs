//! A new firmware on its way into the slot that does not run, as a state machine: who may write, what is shown of it, and
//! when the device restarts.
//!
//! ```text
//! idle → starting → downloading → flashing → rebooting → (restart) → idle
//!                 ↘ error: <cause>, until the next one starts
//! ```

use std::{fmt, time::Duration};

use mpypi_protocol::Digest;

use crate::{
    flash::Flash,
    limits,
    slots::{Image, SlotBoot, SlotError, Slots},
    store::BootError,
};

/// What a device's firmware is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareOptions {
    /// The hardware it is for, as `esp32-eth`, if the device knows it.
    pub key: Option<String>,
    /// What is on the device from the start.
    pub version: String,
    /// Bytes that fit into each of its two slots; 0: it cannot be updated.
    pub slot: u64,
}

impl Default for FirmwareOptions {
    fn default() -> Self {
        FirmwareOptions { key: None, version: env!("CARGO_PKG_VERSION").into(), slot: limits::SLOT }
    }
}

/// Where an update of the firmware stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Nothing is under way.
    Idle,
    /// It was accepted.
    Starting,
    /// It arrives, and is written.
    Downloading,
    /// It is written, or verified.
    Flashing,
    /// It is verified; the device restarts.
    Rebooting,
    /// It failed.
    Error(String),
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stage::Idle => f.write_str("idle"),
            Stage::Starting => f.write_str("starting"),
            Stage::Downloading => f.write_str("downloading"),
            Stage::Flashing => f.write_str("flashing"),
            Stage::Rebooting => f.write_str("rebooting"),
            Stage::Error(cause) => write!(f, "error: {cause}"),
        }
    }
}

/// An update takes no more bytes: it failed, or another one followed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this update is over")]
pub struct Over;

/// Why none is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotStarted {
    /// The device has no slots.
    Unsupported,
    /// Another one is under way, or not confirmed yet.
    Busy,
    /// It failed at once; the stage says how.
    Failed,
}

/// Where the bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The device fetches them.
    Fetched,
    /// They are sent with the request, so many.
    Sent(u64),
}

/// The firmware of a device.
#[derive(Debug)]
pub struct Firmware {
    options: FirmwareOptions,
    slots: Slots,
    stage: Stage,
    done: u64,
    total: u64,
    /// Counts updates: what belongs to an earlier one changes nothing.
    session: u64,
    origin: Origin,
    closing: Option<Closing>,
    reboot_at: Option<Duration>,
    confirm_after: Option<Duration>,
    confirm_at: Option<Duration>,
}

/// All bytes have come.
#[derive(Debug)]
struct Closing {
    expected: Option<Digest>,
    version: Option<String>,
}

impl Firmware {
    /// The firmware of a device that is off. A new one must run for `confirm_after` to be confirmed; without that, it is
    /// confirmed at once.
    #[must_use]
    pub fn off(options: FirmwareOptions, confirm_after: Option<Duration>) -> Firmware {
        let factory = Image {
            version: options.version.clone(),
            build: crate::device::AGENT.to_owned(),
            digest: None,
            size: 0,
        };
        Firmware {
            slots: Slots::off(options.slot, factory),
            options,
            stage: Stage::Idle,
            done: 0,
            total: 0,
            session: 0,
            origin: Origin::Fetched,
            closing: None,
            reboot_at: None,
            confirm_after,
            confirm_at: None,
        }
    }

    /// The device starts.
    ///
    /// # Errors
    /// See [`BootError`].
    pub fn boot(&mut self, now: Duration, flash: &mut impl Flash) -> Result<SlotBoot, BootError> {
        let boot = self.slots.boot(flash)?;
        self.session += 1;
        (self.stage, self.done, self.total) = (Stage::Idle, 0, 0);
        (self.closing, self.reboot_at) = (None, None);
        self.confirm_at = (boot == SlotBoot::Trial).then(|| now + self.confirm_after.unwrap_or_default());
        Ok(boot)
    }

    /// What the device is.
    #[must_use]
    pub fn options(&self) -> &FirmwareOptions {
        &self.options
    }

    /// Its slots.
    #[must_use]
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Where the update stands.
    #[must_use]
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Bytes that have come, and of how many; 0 while that is not known.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.done, self.total)
    }

    /// Whether another one cannot start now.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !matches!(self.stage, Stage::Idle | Stage::Error(_)) || self.slots.is_on_trial()
    }

    /// Starts an update; its number goes with all that follows.
    ///
    /// # Errors
    /// See [`NotStarted`].
    pub fn start(&mut self, flash: &mut impl Flash, origin: Origin) -> Result<u64, NotStarted> {
        if self.slots.capacity() == 0 {
            return Err(NotStarted::Unsupported);
        }
        if self.is_busy() {
            return Err(NotStarted::Busy);
        }
        self.session += 1;
        self.origin = origin;
        (self.stage, self.done, self.total, self.closing) = (Stage::Starting, 0, 0, None);
        if let Origin::Sent(total) = origin {
            self.begin(self.session, flash, Some(total)).map_err(|Over| NotStarted::Failed)?;
        }
        Ok(self.session)
    }

    /// The bytes begin to come, `total` of them if that is known.
    ///
    /// # Errors
    /// The update is over; the stage says why.
    pub fn begin(&mut self, session: u64, flash: &mut impl Flash, total: Option<u64>) -> Result<(), Over> {
        self.check(session)?;
        self.total = total.unwrap_or(0);
        if let Err(error) = self.slots.begin(flash, total) {
            return Err(self.end(flash, format!("ota begin {error}")));
        }
        self.stage = match self.origin {
            Origin::Fetched => Stage::Downloading,
            Origin::Sent(_) => Stage::Flashing,
        };
        Ok(())
    }

    /// The next bytes.
    ///
    /// # Errors
    /// The update is over; the stage says why.
    pub fn push(&mut self, session: u64, flash: &mut impl Flash, bytes: &[u8]) -> Result<(), Over> {
        self.check(session)?;
        for piece in bytes.chunks(limits::PIECE) {
            if let Err(error) = self.slots.push(flash, piece) {
                return Err(self.end(flash, format!("ota perform {error}")));
            }
            self.done += piece.len() as u64;
        }
        Ok(())
    }

    /// All bytes have come. They are verified at the next tick, and must have the digest `expected`; `version` is what to
    /// call the image if it does not say so itself.
    ///
    /// # Errors
    /// The update is over; the stage says why.
    pub fn finish(
        &mut self,
        session: u64,
        flash: &mut impl Flash,
        expected: Option<Digest>,
        version: Option<String>,
    ) -> Result<(), Over> {
        self.check(session)?;
        if self.total != 0 && self.done != self.total {
            return Err(self.end(flash, self.incomplete()));
        }
        self.stage = Stage::Flashing;
        self.closing = Some(Closing { expected, version });
        Ok(())
    }

    /// What is shown when the bytes end early.
    #[must_use]
    pub fn incomplete(&self) -> String {
        match self.origin {
            Origin::Fetched => "incomplete download".to_owned(),
            Origin::Sent(total) => format!("incomplete upload ({}/{total})", self.done),
        }
    }

    /// The bytes do not come any more. Does nothing to a later update.
    pub fn abort(&mut self, session: u64, flash: &mut impl Flash, cause: String) {
        if self.check(session).is_ok() {
            self.fail(flash, cause);
        }
    }

    /// When to call [`tick`](Firmware::tick), at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let closing = self.closing.as_ref().map(|_| Duration::ZERO);
        [closing, self.reboot_at, self.confirm_at].into_iter().flatten().min()
    }

    /// Time has passed; whether the device restarts now.
    pub fn tick(&mut self, now: Duration, flash: &mut impl Flash) -> Option<Ticked> {
        if self.confirm_at.is_some_and(|at| now >= at) {
            self.confirm_at = None;
            return Some(match self.slots.confirm(flash) {
                Ok(()) => Ticked::Confirmed,
                Err(error) => Ticked::NotConfirmed(error.to_string()),
            });
        }
        if self.reboot_at.is_some_and(|at| now >= at) {
            self.reboot_at = None;
            return Some(Ticked::Restart);
        }
        let Closing { expected, version } = self.closing.take()?;
        match self.slots.finish(flash, expected, version.as_deref()) {
            Ok(()) => {
                self.stage = Stage::Rebooting;
                self.reboot_at = Some(now + limits::REBOOT);
                Some(Ticked::Flashed)
            }
            Err(error) => {
                self.fail(flash, format!("ota finish {error}"));
                None
            }
        }
    }

    /// What is under way is `session`, and still wants bytes.
    fn check(&self, session: u64) -> Result<(), Over> {
        let wants = matches!(self.stage, Stage::Starting | Stage::Downloading | Stage::Flashing);
        (session == self.session && wants && self.closing.is_none()).then_some(()).ok_or(Over)
    }

    fn end(&mut self, flash: &mut impl Flash, cause: String) -> Over {
        self.fail(flash, cause);
        Over
    }

    /// It failed for `cause`, which stays until the next one starts.
    pub fn fail(&mut self, flash: &mut impl Flash, cause: String) {
        self.stage = Stage::Error(cause);
        self.closing = None;
        self.slots.abort(flash);
    }
}

/// What a tick led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ticked {
    /// The new image is verified, and starts soon.
    Flashed,
    /// The device restarts now.
    Restart,
    /// The image that runs is confirmed.
    Confirmed,
    /// The flash failed; the next start is one of its last.
    NotConfirmed(String),
}

/// The version in the name of an image, as `firmware-esp32-v3.0.1.bin`, or of a URL that ends in it.
#[must_use]
pub fn version_in(name: &str) -> Option<String> {
    let name = name.split(['?', '#']).next()?.rsplit('/').next()?;
    let name = name.strip_suffix(".bin")?;
    let (_, version) = name.rsplit_once("-v")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+' | '_');
    let good = version.starts_with(|c: char| c.is_ascii_digit()) && version.chars().all(plain);
    (good && version.len() <= mpypi_protocol::limits::TEXT).then(|| version.to_owned())
}

/// What an error of a slot is called where nothing was begun.
#[must_use]
pub fn cause(error: &SlotError) -> String {
    format!("ota begin {error}")
}
