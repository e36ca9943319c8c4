//! What an edge remembers beside its index: its name, how far the upstream has been told of the site's nodes, and the
//! highest release of each channel. Lost, it costs some messages that the upstream has already.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use mpypi_protocol::{ChannelName, Digest, NodeId};
use serde::{Deserialize, Serialize};

use crate::authority::{Readers, write};

/// The file, in the folder of the index.
pub const FILE: &str = "edge.json";

/// What orders the releases of a channel: epoch, then sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Number {
    /// The epoch.
    pub epoch: u64,
    /// The sequence.
    pub sequence: u64,
}

/// A release that was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Its number.
    #[serde(flatten)]
    pub number: Number,
    /// The digest of its list, unless an earlier version of this program took it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list: Option<Digest>,
}

/// What is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    name: NodeId,
    /// The index's version up to which the upstream has all of the site's nodes.
    #[serde(default)]
    carried: u64,
    /// The version up to which it has been told of all clears, also if it has forgotten since what else it was told.
    #[serde(default)]
    cleared: u64,
    /// The highest release of each channel.
    #[serde(default)]
    releases: BTreeMap<ChannelName, Taken>,
}

/// The file and what is in it.
#[derive(Debug)]
pub struct Memory {
    path: PathBuf,
    /// Held to read or change a value; the first is what the file has.
    values: Mutex<(Remembered, Remembered)>,
}

impl Memory {
    /// What the file in `folder` has; a new name if there is none, or none that can be read.
    ///
    /// # Errors
    /// It can be neither read nor written.
    pub fn open(folder: &Path) -> io::Result<Memory> {
        let path = folder.join(FILE);
        let found = match fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice::<Remembered>(&bytes) {
                Ok(found) => Some(found),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "damaged: this edge begins anew");
                    None
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let (values, is_new) = match found {
            Some(found) => (found, false),
            None => {
                let name =
                    NodeId::new(format!("edge-{:08x}", fastrand::u32(..))).map_err(io::Error::other)?;
                (Remembered { name, carried: 0, cleared: 0, releases: BTreeMap::new() }, true)
            }
        };
        let memory = Memory { path, values: Mutex::new((values.clone(), values)) };
        if is_new {
            let (_, values) = &*memory.lock();
            memory.write(values)?;
        }
        Ok(memory)
    }

    /// The edge's own name.
    #[must_use]
    pub fn name(&self) -> NodeId {
        self.lock().1.name.clone()
    }

    /// The version of the index up to which the upstream has everything.
    #[must_use]
    pub fn carried(&self) -> u64 {
        self.lock().1.carried
    }

    /// The version of the index up to which the upstream has been told of all clears. It is told once: what it has forgotten
    /// since may be another site's by now.
    #[must_use]
    pub fn cleared(&self) -> u64 {
        self.lock().1.cleared
    }

    /// The same, as it would be known after a power cut.
    #[must_use]
    pub fn saved(&self) -> u64 {
        self.lock().0.cleared
    }

    /// The highest release of each channel.
    #[must_use]
    pub fn releases(&self) -> BTreeMap<ChannelName, Taken> {
        self.lock().1.releases.clone()
    }

    /// Notes up to which version the upstream has everything.
    pub fn carry(&self, version: u64) {
        let values = &mut self.lock().1;
        (values.carried, values.cleared) = (version, version.max(values.cleared));
    }

    /// Notes a channel's release, unless a higher one is noted.
    pub fn take(&self, channel: &ChannelName, taken: Taken) {
        let mut values = self.lock();
        let noted = values.1.releases.entry(channel.clone()).or_default();
        if taken.number >= noted.number {
            *noted = taken;
        }
    }

    /// Writes what has changed since the last time.
    pub fn save(&self) {
        let values = {
            let values = self.lock();
            if values.0 == values.1 {
                return;
            }
            values.1.clone()
        };
        match self.write(&values) {
            Ok(()) => self.lock().0 = values,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "cannot remember how far this edge is")
            }
        }
    }

    fn write(&self, values: &Remembered) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(values)?;
        write(&self.path, &text, Readers::Owner).map_err(io::Error::other)
    }

    fn lock(&self) -> MutexGuard<'_, (Remembered, Remembered)> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_there_the_next_time_and_a_damaged_file_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let memory = Memory::open(folder.path()).unwrap();
        let (name, dev) = (memory.name(), ChannelName::new("dev").unwrap());
        memory.carry(9);
        memory.carry(7);
        assert_eq!((memory.cleared(), memory.saved()), (9, 0));
        let taken = |epoch, sequence, list| Taken { number: Number { epoch, sequence }, list };
        let second = taken(1, 2, Some(Digest::of(b"[]")));
        memory.take(&dev, second);
        memory.take(&dev, taken(0, 9, None));
        memory.save();
        let again = Memory::open(folder.path()).unwrap();
        assert_eq!((again.name(), again.carried(), again.saved()), (name, 7, 9));
        assert_eq!(again.releases()[&dev], second);
        // As an earlier version wrote it.
        let old = r#"{"name":"edge-1","carried":3,"releases":{"dev":{"epoch":0,"sequence":9}}}"#;
        fs::write(folder.path().join(FILE), old).unwrap();
        assert_eq!(Memory::open(folder.path()).unwrap().releases()[&dev], taken(0, 9, None));
        fs::write(folder.path().join(FILE), "{").unwrap();
        let anew = Memory::open(folder.path()).unwrap();
        assert_eq!(anew.carried(), 0);
        assert_eq!(Memory::open(folder.path()).unwrap().name(), anew.name());
    }
}
