//! One node of a fleet: from its first start, through all that befalls it, to a look at what it has in the end.

use std::{collections::BTreeMap, path::PathBuf};

use mpypi_protocol::{Digest, FilePath, NodeId};
use tokio_util::sync::CancellationToken;

use super::history::History;
use crate::{
    device::{Hardware, Traits},
    face::desk::Desk,
    flash::{self, Disk, Flash, Loss, Memory, PowerCut, Tear},
    journal::{self, NEXT},
    limits,
    node::{self, Clock, Ended, Happening, NodeOptions},
    store::{Boot, BootError, Store},
    weather::{Blow, Weather},
};

/// One node of a fleet.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its name.
    pub node: NodeId,
    /// Where its files are.
    pub home: Home,
    /// What it is, if its profile does not say.
    pub hardware: Hardware,
    /// What it was told about itself.
    pub traits: Traits,
    /// Its number in its fleet, which decides its fate.
    pub number: u64,
    /// Where those ask who stand before it, if anybody does.
    pub desk: Option<Desk>,
}

/// Where a node's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Home {
    /// In memory, gone with the fleet.
    Memory,
    /// In this directory.
    Disk(PathBuf),
}

/// What a node has in the end, as its next start finds it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The digest of the list it is on.
    pub list: Option<Digest>,
    /// The files that came with it.
    pub files: BTreeMap<FilePath, Digest>,
}

/// What a flash does beside what all do.
pub trait Storage: Flash + Send {
    /// The power goes off and on again.
    fn lose(&mut self, loss: Loss);

    /// Leaves `room` bytes, or as many as there are.
    fn limit(&mut self, room: Option<u64>);
}

impl Storage for Memory {
    fn lose(&mut self, loss: Loss) {
        Memory::lose(self, loss);
    }

    fn limit(&mut self, room: Option<u64>) {
        self.resize(room.map_or(limits::MEMORY_FLASH, |room| self.used() + room));
    }
}

/// What was written is there, and there is room: the machine below has power and space of its own.
impl Storage for Disk {
    fn lose(&mut self, _: Loss) {}

    fn limit(&mut self, _: Option<u64>) {}
}

/// Runs a node until `stop`; then says what it has. An error is a node that does not start: it is bricked.
pub(super) async fn live<F: Storage>(
    mut options: Box<NodeOptions>,
    mut flash: F,
    mut weather: Box<Weather>,
    clock: Clock,
    mut observe: impl FnMut(Happening),
    stop: CancellationToken,
) -> Result<Found, String> {
    options.hardware = weather.hardware(options.hardware.clone());
    let history = weather.history();
    history
        .write(&mut flash, &options.node, &options.channel, &options.hardware)
        .map_err(|error| text(&error))?;
    let mut pause = weather.join();
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => break,
        }
        flash.limit(weather.room(clock.now()));
        let mut loss = Loss::Nothing;
        let mut powered = match weather.next_cut(clock.now()) {
            Some(cut) => {
                if options.trace {
                    let torn = if cut.torn { ", half of it written" } else { "" };
                    let loses = if cut.loses { ", and loses what was not synced" } else { "" };
                    let text = format!("its power fails at operation {} of its flash{torn}{loses}", cut.at);
                    observe(Happening::Trace(text));
                }
                loss = if cut.loses { Loss::Everything } else { Loss::Nothing };
                PowerCut::new(&mut flash, cut.at, if cut.torn { Tear::Torn } else { Tear::Clean })
            }
            None => PowerCut::never(&mut flash),
        };
        let ended = node::run(&options, &mut powered, clock, &mut weather, &mut observe, &stop).await;
        let blow;
        (blow, pause) = match ended.map_err(|error| text(&error))? {
            Ended::Stopped => break,
            Ended::PowerLost => {
                flash.lose(loss);
                (Blow::PowerCut, limits::START)
            }
            Ended::Crashed => (Blow::Crash, limits::START),
            Ended::Asleep(time) => (Blow::Sleep, time),
        };
        observe(Happening::Blow(blow));
    }
    flash.limit(None);
    inspect(flash, history)
}

/// Starts a node once more, and compares every file of its release with what it should be; looks whether what it had
/// before is where it should be.
fn inspect(flash: impl Storage, history: History) -> Result<Found, String> {
    let (store, boot) = Store::boot(flash).map_err(|error| text(&error))?;
    // Stopped on trial, a node runs what it has not confirmed.
    let next = match boot {
        Boot::Confirming { .. } => journal::read_installed(store.flash(), NEXT),
        Boot::Rest | Boot::RolledBack { .. } => Ok(None),
    };
    let next = next.map_err(|error| error.to_string())?;
    let running = next.as_ref().unwrap_or(store.installed());
    for (path, digest) in &running.files {
        let found = flash::digest(store.flash(), path.as_str()).map_err(|error| error.to_string())?;
        if found != Some(*digest) {
            let found =
                found.map_or_else(|| "missing".to_owned(), |found| format!("{} instead", found.short()));
            return Err(format!("`{path}` should be {}: it is {found}", digest.short()));
        }
    }
    // It has a release once that is confirmed.
    let found = Found { list: store.installed().list, files: running.files.clone() };
    history.trouble(store.flash(), &found).map_or(Ok(found), Err)
}

/// An error with its cause.
fn text(error: &BootError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// A node whose weather is fair, beside which all like it are held.
#[must_use]
pub(super) fn reference(hardware: Hardware, number: usize) -> Member {
    let node = NodeId::new(format!("mpypi-reference-{number}")).expect("a plain word is a name");
    let number = u64::MAX - number as u64;
    Member { node, home: Home::Memory, hardware, traits: Traits::default(), number, desk: None }
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::node::Phase;

    use super::*;
    use crate::{
        testing::{Bench, release},
        update::Event,
    };

    fn installed() -> Memory {
        let mut flash = Memory::new(1 << 20);
        let mut bench = Bench::start(&mut flash).unwrap();
        bench.publish(&release(1, &[("main.py", b"one"), ("a/b.txt", b"two")], &[]));
        bench.run().unwrap();
        drop(bench);
        flash
    }

    #[test]
    fn what_a_node_has_is_compared_to_the_last_byte() {
        assert_eq!(inspect(installed(), History::Blank).unwrap().files.len(), 2);
        let mut flash = installed();
        flash.create("main.py").unwrap();
        flash.append("main.py", b"0ne").unwrap();
        assert!(inspect(flash, History::Blank).unwrap_err().starts_with("`main.py` should be "));
        let mut flash = installed();
        flash.remove("a/b.txt").unwrap();
        assert!(inspect(flash, History::Blank).unwrap_err().ends_with("it is missing"));
    }

    #[test]
    fn a_node_that_is_on_trial_in_the_end_is_whole_and_on_the_release_before() {
        let mut flash = installed();
        let mut bench = Bench::start(&mut flash).unwrap();
        bench.publish(&release(2, &[("main.py", b"two"), ("a/b.txt", b"two")], &[]));
        bench.give(Event::Connected).unwrap();
        while bench.phase() != Phase::Confirming {
            assert!(bench.deliver().unwrap() || bench.wait().unwrap());
        }
        drop(bench);
        let before = inspect(installed(), History::Blank).unwrap();
        let found = inspect(flash.clone(), History::Blank).unwrap();
        assert_eq!(found.list, before.list);
        assert_eq!(found.files[&FilePath::new("main.py").unwrap()], Digest::of(b"two"));
        flash.remove("main.py").unwrap();
        assert!(inspect(flash, History::Blank).unwrap_err().ends_with("it is missing"));
    }

    #[test]
    fn a_node_that_does_not_start_is_bricked() {
        let mut flash = installed();
        flash.create(crate::journal::JOURNAL).unwrap();
        flash.append(crate::journal::JOURNAL, b"{").unwrap();
        assert!(inspect(flash, History::Blank).unwrap_err().contains("is damaged"));
    }
}
