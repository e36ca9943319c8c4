//! Two places for firmware images, and which of them starts: what a boot loader and its partition table are to a chip.
//!
//! | path | what |
//! |---|---|
//! | `.mpypi/firmware.json` | the boot pointer, what each slot holds, and a trial that is not confirmed yet |
//! | `.mpypi/firmware/slot-0`, `slot-1` | the images |
//!
//! An image is written to the slot that does not run, after the record forgot what was there. **The record that names it
//! for a trial is the commit.** A start counts the trial and runs it; [`Slots::confirm`] moves the boot pointer. After
//! [`limits::UNCONFIRMED_BOOTS`] starts without that, or if the image is not whole, the old slot starts again. The slot
//! that the boot pointer names is never written to.

use std::io;

use mpypi_protocol::{Digest, digest::Hasher};
use serde::{Deserialize, Serialize};

use crate::{
    flash::{self, Flash, Kind},
    image, journal, limits,
    store::BootError,
};

/// The record.
pub const RECORD: &str = ".mpypi/firmware.json";

/// The folder of the images.
pub const FOLDER: &str = ".mpypi/firmware";

/// An image in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its version.
    pub version: String,
    /// When and from what it was built, as far as it says.
    pub build: String,
    /// Its digest; absent for what was on the device from the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Its size in bytes.
    pub size: u64,
}

/// What a start found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotBoot {
    /// The confirmed image runs.
    Rest,
    /// A new image runs and is not confirmed yet.
    Trial,
    /// A new image was given up in this start.
    RolledBack {
        /// Why.
        reason: String,
    },
}

/// An image that was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    /// Its digest.
    pub digest: Digest,
    /// Why.
    pub reason: String,
}

/// Why an image is not taken. Its name is what ESP-IDF calls it.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// The device has no slots.
    #[error("ESP_ERR_NOT_SUPPORTED")]
    NoSlots,
    /// It is larger than a slot.
    #[error("ESP_ERR_INVALID_SIZE")]
    TooLarge,
    /// It has no bytes, or not those that were announced.
    #[error("ESP_ERR_OTA_VALIDATE_FAILED")]
    Invalid,
    /// The image that runs is not confirmed: what would be overwritten may have to start again.
    #[error("ESP_ERR_OTA_ROLLBACK_INVALID_STATE")]
    OnTrial,
    /// There is no room.
    #[error("ESP_ERR_NO_MEM")]
    Full,
    /// The flash failed.
    #[error("ESP_ERR_FLASH_OP_FAIL")]
    Flash(#[source] io::Error),
}

impl From<io::Error> for SlotError {
    fn from(error: io::Error) -> SlotError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SlotError::Full,
            _ => SlotError::Flash(error),
        }
    }
}

/// The slots of a device.
#[derive(Debug)]
pub struct Slots {
    /// Bytes that fit into each; 0: there are none.
    capacity: u64,
    record: Record,
    running: usize,
    writing: Option<Writing>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    /// The boot pointer.
    active: usize,
    images: [Option<Image>; 2],
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trial: Option<Trial>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    given_up: Option<GivenUp>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Trial {
    slot: usize,
    /// How often it was started.
    boots: u32,
}

#[derive(Debug)]
struct Writing {
    hasher: Hasher,
    size: u64,
}

impl Slots {
    /// The slots of a device that is off, of `capacity` bytes each. The first holds `factory` until something else is
    /// written to it.
    #[must_use]
    pub fn off(capacity: u64, factory: Image) -> Slots {
        let record = Record { active: 0, images: [Some(factory), None], trial: None, given_up: None };
        Slots { capacity, record, running: 0, writing: None }
    }

    /// Starts the device: what the boot loader does.
    ///
    /// # Errors
    /// See [`BootError`].
    pub fn boot(&mut self, flash: &mut impl Flash) -> Result<SlotBoot, BootError> {
        self.writing = None;
        if let Some(mut record) = journal::read_record::<Record>(flash, RECORD)? {
            // Whoever edits it must not make us look beyond the two.
            record.active &= 1;
            record.trial = record.trial.filter(|trial| trial.slot == 1 - record.active);
            // What came with the device is what its command line says.
            let factory = self.record.images[0].take();
            for image in &mut record.images {
                if image.as_ref().is_some_and(|image| image.digest.is_none()) {
                    image.clone_from(&factory);
                }
            }
            if record.images.iter().all(Option::is_none) {
                record.images[record.active] = factory;
            }
            self.record = record;
        }
        self.running = self.record.active;
        let Some(trial) = self.record.trial.clone() else { return Ok(SlotBoot::Rest) };
        let image = self.record.images[trial.slot].clone();
        let whole = match &image {
            Some(image) => flash::digest(flash, &place(trial.slot))? == image.digest,
            None => false,
        };
        if whole && trial.boots < limits::UNCONFIRMED_BOOTS {
            self.record.trial = Some(Trial { boots: trial.boots + 1, ..trial });
            self.save(flash)?;
            self.running = trial.slot;
            return Ok(SlotBoot::Trial);
        }
        let reason = match whole {
            true => format!("not-confirmed: the image was started {} times and never confirmed", trial.boots),
            false => "wrong-hash: the image is not whole".to_owned(),
        };
        self.record.trial = None;
        let digest = image.and_then(|image| image.digest);
        self.record.given_up = digest.map(|digest| GivenUp { digest, reason: reason.clone() });
        self.save(flash)?;
        Ok(SlotBoot::RolledBack { reason })
    }

    /// The image that runs.
    #[must_use]
    pub fn running(&self) -> &Image {
        let image = self.record.images[self.running].as_ref();
        image.or_else(|| self.record.images.iter().flatten().next()).expect("a device runs something")
    }

    /// Bytes that fit into a slot; 0 if there are none.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Whether the image that runs is not confirmed yet.
    #[must_use]
    pub fn is_on_trial(&self) -> bool {
        self.running != self.record.active
    }

    /// The image that was given up last.
    #[must_use]
    pub fn given_up(&self) -> Option<&GivenUp> {
        self.record.given_up.as_ref()
    }

    /// Makes room in the slot that does not run, for `size` bytes if they are known.
    ///
    /// # Errors
    /// It does not fit, it is not the time, or the flash failed.
    pub fn begin(&mut self, flash: &mut impl Flash, size: Option<u64>) -> Result<(), SlotError> {
        if self.capacity == 0 {
            return Err(SlotError::NoSlots);
        }
        if size.is_some_and(|size| size > self.capacity) {
            return Err(SlotError::TooLarge);
        }
        if self.is_on_trial() {
            return Err(SlotError::OnTrial);
        }
        let spare = 1 - self.record.active;
        self.record.trial = None;
        self.record.images[spare] = None;
        self.save(flash)?;
        if flash.kind(FOLDER)?.is_none() {
            flash.make_folder(FOLDER)?;
            flash.sync(journal::FOLDER)?;
        }
        flash.create(&place(spare))?;
        self.writing = Some(Writing { hasher: Hasher::default(), size: 0 });
        Ok(())
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// There are too many, or the flash failed.
    pub fn push(&mut self, flash: &mut impl Flash, bytes: &[u8]) -> Result<(), SlotError> {
        let Some(writing) = &mut self.writing else { return Err(SlotError::Invalid) };
        if writing.size + bytes.len() as u64 > self.capacity {
            return Err(SlotError::TooLarge);
        }
        flash.append(&place(1 - self.record.active), bytes)?;
        writing.hasher.update(bytes);
        writing.size += bytes.len() as u64;
        Ok(())
    }

    /// Verifies what was written, and names it for a trial at the next start. `version` is what to call it if it does
    /// not say so itself.
    ///
    /// # Errors
    /// It is not what was expected, or the flash failed; the slot that runs stays.
    pub fn finish(
        &mut self,
        flash: &mut impl Flash,
        expected: Option<Digest>,
        version: Option<&str>,
    ) -> Result<(), SlotError> {
        let Some(Writing { hasher, size }) = self.writing.take() else { return Err(SlotError::Invalid) };
        let digest = hasher.finish();
        let spare = 1 - self.record.active;
        let path = place(spare);
        if size == 0 || expected.is_some_and(|expected| expected != digest) {
            return Err(SlotError::Invalid);
        }
        flash.sync(&path)?;
        flash.sync(FOLDER)?;
        let described = image::check(flash, &path)?.ok_or(SlotError::Invalid)?;
        let unknown = || format!("0.0.0+{}", digest.short());
        self.record.images[spare] = Some(Image {
            version: described.version.or_else(|| version.map(str::to_owned)).unwrap_or_else(unknown),
            build: described.build.unwrap_or_else(|| digest.short()),
            digest: Some(digest),
            size,
        });
        self.record.trial = Some(Trial { slot: spare, boots: 0 });
        self.record.given_up = None;
        let saved = self.save(flash);
        if saved.is_err() {
            self.record.trial = None;
            self.record.images[spare] = None;
        }
        Ok(saved?)
    }

    /// Gives up what is being written, and frees its room.
    pub fn abort(&mut self, flash: &mut impl Flash) {
        self.writing = None;
        let path = place(1 - self.record.active);
        if self.record.trial.is_none() && matches!(flash.kind(&path), Ok(Some(Kind::File(_)))) {
            // If it stays, the next image takes its place.
            let _ = flash.remove(&path);
        }
    }

    /// The image that runs proved itself: it is what starts from now on.
    ///
    /// # Errors
    /// Of the flash; the trial goes on.
    pub fn confirm(&mut self, flash: &mut impl Flash) -> io::Result<()> {
        let before = self.record.clone();
        self.record.active = self.running;
        self.record.trial = None;
        let saved = self.save(flash);
        if saved.is_err() {
            self.record = before;
        }
        saved
    }

    fn save(&self, flash: &mut impl Flash) -> io::Result<()> {
        journal::write_record(flash, RECORD, &self.record)
    }
}

fn place(slot: usize) -> String {
    format!("{FOLDER}/slot-{slot}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flash::{Loss, Memory, PowerCut, Tear};

    fn factory() -> Image {
        Image { version: "1.0.0".into(), build: "factory".into(), digest: None, size: 0 }
    }

    fn on(flash: &mut impl Flash) -> (Slots, SlotBoot) {
        if flash.kind(journal::FOLDER).unwrap().is_none() {
            flash.make_folder(journal::FOLDER).unwrap();
            flash.sync("").unwrap();
        }
        let mut slots = Slots::off(1000, factory());
        let boot = slots.boot(flash).unwrap();
        (slots, boot)
    }

    fn write(
        slots: &mut Slots,
        flash: &mut impl Flash,
        image: &[u8],
        version: &str,
    ) -> Result<(), SlotError> {
        slots.begin(flash, Some(image.len() as u64))?;
        for piece in image.chunks(7) {
            slots.push(flash, piece)?;
        }
        slots.finish(flash, Some(Digest::of(image)), Some(version))
    }

    #[test]
    fn a_new_image_is_tried_and_becomes_the_one_that_starts_when_it_is_confirmed() {
        let mut flash = Memory::new(1 << 16);
        let (mut slots, _) = on(&mut flash);
        write(&mut slots, &mut flash, b"two", "2.0.0").unwrap();
        assert_eq!(slots.running().version, "1.0.0", "nothing changes before a start");
        let (mut slots, boot) = on(&mut flash);
        assert_eq!((boot, &*slots.running().version), (SlotBoot::Trial, "2.0.0"));
        assert!(matches!(slots.begin(&mut flash, None), Err(SlotError::OnTrial)));
        slots.confirm(&mut flash).unwrap();
        write(&mut slots, &mut flash, b"three", "3.0.0").unwrap();
        let (slots, _) = on(&mut flash);
        assert_eq!(slots.running().version, "3.0.0");
    }

    #[test]
    fn an_image_that_is_never_confirmed_is_given_up_and_the_old_one_starts() {
        let mut flash = Memory::new(1 << 16);
        write(&mut on(&mut flash).0, &mut flash, b"two", "2.0.0").unwrap();
        for _ in 0..limits::UNCONFIRMED_BOOTS {
            assert_eq!(on(&mut flash).0.running().version, "2.0.0");
        }
        let (slots, boot) = on(&mut flash);
        assert!(matches!(&boot, SlotBoot::RolledBack { reason } if reason.starts_with("not-confirmed: ")));
        assert_eq!(slots.running().version, "1.0.0");
        assert_eq!(slots.given_up().unwrap().digest, Digest::of(b"two"));
        assert_eq!(on(&mut flash).1, SlotBoot::Rest);
    }

    #[test]
    fn an_image_that_changed_in_its_slot_never_starts() {
        let mut flash = Memory::new(1 << 16);
        write(&mut on(&mut flash).0, &mut flash, b"two", "2.0.0").unwrap();
        flash.append(&place(1), b"x").unwrap();
        let (slots, boot) = on(&mut flash);
        assert!(matches!(boot, SlotBoot::RolledBack { .. }));
        assert_eq!(slots.running().version, "1.0.0");
    }

    #[test]
    fn what_is_too_large_empty_or_not_what_was_announced_is_refused() {
        let mut flash = Memory::new(1 << 16);
        let (mut slots, _) = on(&mut flash);
        assert!(matches!(slots.begin(&mut flash, Some(1001)), Err(SlotError::TooLarge)));
        slots.begin(&mut flash, None).unwrap();
        slots.push(&mut flash, &[0; 1000]).unwrap();
        assert!(matches!(slots.push(&mut flash, &[0]), Err(SlotError::TooLarge)));
        assert!(matches!(write(&mut slots, &mut flash, b"", "2"), Err(SlotError::Invalid)));
        slots.begin(&mut flash, None).unwrap();
        slots.push(&mut flash, b"x").unwrap();
        assert!(matches!(slots.finish(&mut flash, Some(Digest::EMPTY), None), Err(SlotError::Invalid)));
        assert!(matches!(Slots::off(0, factory()).begin(&mut flash, None), Err(SlotError::NoSlots)));
    }

    #[test]
    fn power_cut_at_any_write_leaves_the_old_or_the_new_image() {
        for loss in Loss::ALL {
            for cut in 0.. {
                let mut flash = Memory::new(1 << 16);
                let (mut slots, _) = on(&mut flash);
                write(&mut slots, &mut flash, b"the second image", "2.0.0").unwrap();
                let (mut slots, _) = on(&mut flash);
                slots.confirm(&mut flash).unwrap();
                let mut powered = PowerCut::new(&mut flash, cut, Tear::Torn);
                let third = write(&mut slots, &mut powered, b"the third image, a longer one", "3.0.0");
                let survived = !powered.is_off();
                flash.lose(loss);
                let version = on(&mut flash).0.running().version.clone();
                let possible = if third.is_ok() { &["3.0.0"][..] } else { &["2.0.0", "3.0.0"] };
                assert!(possible.contains(&&*version), "cut {cut}, {loss:?}: {version}");
                if survived {
                    break;
                }
            }
        }
    }
}
