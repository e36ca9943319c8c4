//! What a node had before the fleet started: nothing, a release of earlier days, files of its owner's.

use std::time::Duration;

use bytes::Bytes;
use mpypi_protocol::{ChannelName, Digest, FilePath, NodeId, PackageId, node::Phase};

use super::member::{Found, Storage};
use crate::{
    device::{Device, Hardware},
    flash,
    store::BootError,
    update::{Event, Source, Timing},
};

/// What a node had before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum History {
    /// Nothing: its flash is empty.
    Blank,
    /// Another release, from a list without a number, as Mpy-BLOX's own script publishes it.
    Used,
    /// Files of its owner's, one of them where a release likes to have its own.
    Owned,
}

/// What came with the release of earlier days.
const PAST: [(&str, &[u8]); 4] = [
    ("main.py", b"import legacy.app\n"),
    ("boot.py", b"# the boot of earlier days\n"),
    ("legacy/app.py", b"print('as it was')\n"),
    ("legacy/none.py", b""),
];

/// What the owner put there.
const OWN: [(&str, &[u8]); 3] =
    [("main.py", b"# my own\n"), ("notes/mine.txt", b"mine"), ("lib/mine.py", b"MINE = True\n")];

impl History {
    /// What reports call it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            History::Blank => "blank",
            History::Used => "used",
            History::Owned => "owner's files",
        }
    }

    /// The list of the release of earlier days.
    #[must_use]
    pub fn past() -> Bytes {
        let entries = PAST.map(|(path, bytes)| {
            let (digest, size) = (Digest::of(bytes), bytes.len());
            format!(r#"{{"type":"src","path":"{path}","pkg_sha256":"{digest}","size":{size}}}"#)
        });
        format!("[{}]", entries.join(",")).into()
    }

    /// Gives a node this past, unless it has one: by the agent's own ways, where the agent did it.
    pub(crate) fn write<F: Storage>(
        self,
        flash: &mut F,
        node: &NodeId,
        channel: &ChannelName,
        hardware: &Hardware,
    ) -> Result<(), BootError> {
        if !flash.list("")?.is_empty() {
            return Ok(());
        }
        match self {
            History::Blank => Ok(()),
            History::Used => install(flash, node, channel, hardware),
            History::Owned => {
                for (path, bytes) in OWN {
                    put(flash, path, bytes)?;
                }
                Ok(())
            }
        }
    }

    /// The files of the node's owner.
    #[cfg(test)]
    pub(crate) fn owned(self) -> crate::testing::Files {
        let own = OWN.map(|(path, bytes)| (path.to_owned(), bytes.to_vec()));
        own.into_iter().filter(|_| self == History::Owned).collect()
    }

    /// What the past left that should not be there, or took that should, on a node that has `found` now.
    pub(super) fn trouble<F: Storage>(self, flash: &F, found: &Found) -> Option<String> {
        let is_there = |path| matches!(flash.kind(path), Ok(Some(flash::Kind::File(_))));
        let is_of_release = |path: &str| found.files.keys().any(|file| file.as_str() == path);
        match self {
            History::Blank => None,
            History::Used if found.list == Some(Digest::of(&History::past())) => None,
            History::Used => {
                let left = PAST.into_iter().find(|(path, _)| !is_of_release(path) && is_there(path));
                left.map(|(path, _)| format!("`{path}` of an earlier release is still there"))
            }
            History::Owned => {
                let gone = OWN.into_iter().find(|(path, bytes)| {
                    !is_of_release(path)
                        && flash::digest(flash, path).ok().flatten() != Some(Digest::of(bytes))
                });
                gone.map(|(path, _)| format!("`{path}`, which is its owner's, is gone or changed"))
            }
        }
    }
}

/// Installs the release of earlier days, as the agent does: it is told of a list, and gets what it asks for.
fn install<F: Storage>(
    flash: &mut F,
    node: &NodeId,
    channel: &ChannelName,
    hardware: &Hardware,
) -> Result<(), BootError> {
    let timing = Timing { confirm_after: Some(Duration::ZERO), ..Timing::default() };
    let mut device = Device::off(flash, node, channel.clone(), hardware.clone(), timing, 0);
    let now = Duration::ZERO;
    device.start(now)?;
    device.handle(now, Event::Connected)?;
    device.handle(now, Event::List { source: Source::Channel, payload: History::past(), wall: None })?;
    for (path, bytes) in PAST.into_iter().filter(|(_, bytes)| !bytes.is_empty()) {
        let path = FilePath::new(path).expect("these are paths");
        let event = Event::Package {
            topic: PackageId::Src(path, Digest::of(bytes)).topic(),
            payload: Bytes::from_static(bytes),
        };
        device.handle(now, event)?;
    }
    device.handle(now, Event::Tick)?;
    debug_assert_eq!(device.report().state.phase, Phase::Idle, "{:?}", device.report());
    Ok(())
}

fn put(flash: &mut impl Storage, path: &str, bytes: &[u8]) -> Result<(), BootError> {
    let folder = flash::parent(path);
    if !folder.is_empty() && flash.kind(folder)?.is_none() {
        flash.make_folder(folder)?;
        flash.sync("")?;
    }
    flash.create(path)?;
    flash.append(path, bytes)?;
    flash.sync(path)?;
    flash.sync(folder)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flash::{Flash as _, Memory},
        store::Store,
        testing::{Bench, files, release},
    };

    fn node_with(history: History) -> Memory {
        let mut flash = Memory::new(1 << 20);
        let channel = crate::testing::channel();
        let node = crate::testing::node();
        history.write(&mut flash, &node, &channel, &Hardware::default()).unwrap();
        flash
    }

    fn upgraded(mut flash: Memory) -> (Memory, Found) {
        let mut bench = Bench::start(&mut flash).unwrap();
        bench.publish(&release(1, &[("main.py", b"new")], &[]));
        bench.run().unwrap();
        assert_eq!(bench.phase(), Phase::Idle);
        drop(bench);
        let (store, _) = Store::boot(flash.clone()).unwrap();
        let found = Found { list: store.installed().list, files: store.installed().files.clone() };
        (flash, found)
    }

    #[test]
    fn a_used_node_has_its_earlier_release_until_another_replaces_all_of_it() {
        let flash = node_with(History::Used);
        assert_eq!(files(&flash).len(), PAST.len());
        let (flash, found) = upgraded(flash);
        assert_eq!(files(&flash).keys().collect::<Vec<_>>(), ["main.py"]);
        assert_eq!(History::Used.trouble(&flash, &found), None);
        let mut left = flash.clone();
        put(&mut left, "legacy/app.py", b"").unwrap();
        assert!(History::Used.trouble(&left, &found).unwrap().contains("`legacy/app.py` of an earlier"));
    }

    #[test]
    fn what_is_its_owners_stays_but_where_the_release_has_its_own() {
        let (flash, found) = upgraded(node_with(History::Owned));
        assert_eq!(files(&flash)["main.py"], b"new");
        assert_eq!(History::Owned.trouble(&flash, &found), None);
        let mut gone = flash.clone();
        gone.remove("lib/mine.py").unwrap();
        assert!(History::Owned.trouble(&gone, &found).unwrap().contains("is gone or changed"));
    }
}
