//! Carries out and takes back the operations of a committed journal.
//!
//! Both can be cut at any operation and started again: what was done is seen from where the files are. A
//! put is done when its staged file is gone; it may be done when that is there, and its target too. An old file is safe
//! when it stands in `old/`. The order of syncs keeps that true when names are lost: `old/` before the targets, the targets
//! before `staging/`, and when taking back, the targets before `old/`.

use std::{collections::BTreeSet, io};

use crate::{
    flash::{Flash, Kind, parent},
    journal::{Folder, OLD, Operation, Plan, STAGING, old, staged},
};

/// Does every operation that is not done.
///
/// # Errors
/// Of the flash, or a staged file is missing; what was done stays done.
pub(crate) fn redo(flash: &mut impl Flash, plan: &Plan) -> io::Result<()> {
    make_folders(flash, &plan.folders)?;
    let mut touched = BTreeSet::new();
    for (number, operation) in plan.operations.iter().enumerate() {
        let path = operation.path().as_str();
        let kept = old(number);
        let there = is_file(flash, path)?;
        match operation {
            Operation::Put { digest, copy, had, .. } => {
                let from = staged(digest, *copy);
                if is_file(flash, &from)? {
                    if *had && there && !is_file(flash, &kept)? {
                        flash.rename(path, &kept)?;
                    }
                    flash.rename(&from, path)?;
                } else if !there {
                    return Err(io::Error::new(io::ErrorKind::NotFound, format!("`{from}` is gone")));
                }
            }
            Operation::Remove { .. } if there && is_file(flash, &kept)? => flash.remove(path)?,
            Operation::Remove { .. } if there => flash.rename(path, &kept)?,
            Operation::Remove { .. } => {}
        }
        touched.insert(parent(path).to_owned());
    }
    flash.sync(OLD)?;
    sync_folders(flash, &touched)?;
    flash.sync(STAGING)
}

/// Takes back every operation that was done, and removes the folders made. The operations are of different
/// paths, so any order will do.
///
/// # Errors
/// Of the flash; what was taken back stays so.
pub(crate) fn undo(flash: &mut impl Flash, plan: &Plan) -> io::Result<()> {
    let mut touched = BTreeSet::new();
    for (number, operation) in plan.operations.iter().enumerate() {
        let path = operation.path();
        let kept = old(number);
        if is_file(flash, &kept)? {
            for folder in path.parents() {
                make_folder(flash, folder)?;
            }
            flash.rename(&kept, path.as_str())?;
        } else if matches!(operation, Operation::Put { had: false, .. }) && is_file(flash, path.as_str())? {
            // Also if the staged file is there: its old name may have come back when the power was cut, beside the new one.
            flash.remove(path.as_str())?;
        }
        touched.insert(parent(path.as_str()).to_owned());
    }
    sync_folders(flash, &touched)?;
    flash.sync(OLD)?;
    remove_folders(flash, plan.folders.iter())
}

/// Removes those of `folders` that are empty, innermost first.
///
/// # Errors
/// Of the flash. That a folder is not empty, or not there, is none.
pub(crate) fn remove_folders<'a>(
    flash: &mut impl Flash,
    folders: impl DoubleEndedIterator<Item = &'a Folder>,
) -> io::Result<()> {
    for folder in folders.rev().map(|folder| folder.0.as_str()) {
        if flash.kind(folder)? == Some(Kind::Folder) && flash.list(folder)?.is_empty() {
            flash.remove_folder(folder)?;
            flash.sync(parent(folder))?;
        }
    }
    Ok(())
}

/// Makes those of `folders` that are not there.
///
/// # Errors
/// Of the flash.
pub(crate) fn make_folders(flash: &mut impl Flash, folders: &BTreeSet<Folder>) -> io::Result<()> {
    for folder in folders.iter().map(|folder| folder.0.as_str()) {
        make_folder(flash, folder)?;
    }
    Ok(())
}

fn make_folder(flash: &mut impl Flash, folder: &str) -> io::Result<()> {
    if flash.kind(folder)?.is_none() {
        flash.make_folder(folder)?;
    }
    // Also if it was there: it may have been made before the power cut, and not synced.
    flash.sync(parent(folder))
}

fn sync_folders(flash: &mut impl Flash, folders: &BTreeSet<String>) -> io::Result<()> {
    for folder in folders {
        if flash.kind(folder)? == Some(Kind::Folder) {
            flash.sync(folder)?;
        }
    }
    Ok(())
}

/// Whether something that is no folder stands at `path`. A link counts: it is moved, never followed.
pub(crate) fn is_file(flash: &impl Flash, path: &str) -> io::Result<bool> {
    Ok(matches!(flash.kind(path)?, Some(Kind::File(_) | Kind::Other)))
}
