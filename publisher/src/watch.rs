//! Publishes a folder again whenever something in it changes.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::Arc,
};

use mpypi_protocol::PackageId;
use notify_debouncer_full::{
    DebounceEventResult, DebouncedEvent, Debouncer, RecommendedCache,
    file_id::{FileId, get_file_id},
    new_debouncer,
    notify::{self, EventKind, RecommendedWatcher, RecursiveMode},
};
use tokio::{sync::Notify, time::timeout};

use crate::{
    channel::{Cache, Channel},
    limits,
    publish::{Event, Observer, Options, Outcome, PublishError, backoff, load, publish_channel},
    report::chain,
    settings::Settings,
    walk::never,
};

/// Takes note of what watching comes to.
pub trait WatchObserver: Observer {
    /// A publish succeeded.
    fn published(&mut self, outcome: &Outcome);
    /// A publish failed; watching goes on.
    fn failed(&mut self, error: &PublishError);
}

/// The folder cannot be watched.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch folder `{folder}`")]
pub struct WatchError {
    /// The folder.
    pub folder: String,
    /// Why.
    pub source: notify::Error,
}

/// Publishes `folder` now and after every change, until it is dropped.
///
/// # Errors
/// The folder cannot be watched. All other errors go to `observer`, and watching goes on.
pub async fn watch(
    folder: &Path,
    options: &Options,
    observer: &mut impl WatchObserver,
) -> Result<Infallible, WatchError> {
    let mut eye = Eye::open(folder)?;
    let mut cache = Cache::default();
    let mut standing = None;
    let mut said = None;
    let mut losses = 0;
    loop {
        let (loaded, kept) = load(folder, options, cache, observer).await;
        cache = kept;
        let error = match loaded {
            Err(error) => PublishError::from(error),
            Ok(channel) if standing.as_ref() == Some(&identity(&channel)) => {
                eye.change().await;
                continue;
            }
            Ok(channel) => {
                channel.warnings.iter().for_each(|text| observer.event(Event::Warning(text)));
                channel.notes.iter().for_each(|text| observer.event(Event::Note(text)));
                match publish_channel(&channel, options, observer).await {
                    Ok(outcome) => {
                        observer.published(&outcome);
                        standing = Some(identity(&channel));
                        (losses, said) = (0, None);
                        eye.change().await;
                        continue;
                    }
                    Err(error) => error,
                }
            }
        };
        // What stands now is not known, or not what the folder holds.
        standing = None;
        // Said once, however often it is tried again.
        let text = chain(&error);
        if said.as_ref() != Some(&text) {
            observer.failed(&error);
            said = Some(text);
        }
        match error.is_passing() {
            true => {
                losses += 1;
                let _ = timeout(backoff(losses), eye.change()).await;
            }
            false => {
                losses = 0;
                eye.change().await;
            }
        }
    }
}

/// What a release is made of: as long as it is the same, the broker need not be asked.
fn identity(channel: &Channel) -> (Settings, Vec<PackageId>) {
    (channel.settings.clone(), channel.packages.iter().map(|package| package.id.clone()).collect())
}

/// Looks at one folder, even if it is removed and made again.
struct Eye {
    folder: PathBuf,
    debouncer: Debouncer<RecommendedWatcher, RecommendedCache>,
    changed: Arc<Notify>,
    /// Which folder is looked at: another one may take its path.
    seen: Option<FileId>,
}

impl Eye {
    fn open(folder: &Path) -> Result<Eye, WatchError> {
        let error = |source| WatchError { folder: folder.display().to_string(), source };
        let folder = folder.canonicalize().map_err(|source| error(notify::Error::io(source)))?;
        let changed = Arc::new(Notify::new());
        let (notify, root) = (Arc::clone(&changed), folder.clone());
        let react = move |result: DebounceEventResult| {
            // After an error events may be missing: better to look once too often.
            if result.map_or(true, |events| events.iter().any(|event| matters(event, &root))) {
                notify.notify_one();
            }
        };
        let mut debouncer = new_debouncer(limits::DEBOUNCE, None, react).map_err(error)?;
        debouncer.watch(&folder, RecursiveMode::Recursive).map_err(error)?;
        let seen = get_file_id(&folder).ok();
        Ok(Eye { folder, debouncer, changed, seen })
    }

    /// Returns when something changed since it last returned.
    async fn change(&mut self) {
        loop {
            // A folder that is made again has no way to say so: look for it now and then.
            let told = timeout(limits::LOOK, self.changed.notified()).await.is_ok();
            let there = get_file_id(&self.folder).ok();
            let moved = there != self.seen;
            if moved {
                // What was looked at is gone, so this may fail, and need not succeed.
                let _ = self.debouncer.unwatch(&self.folder);
                let watched = self.debouncer.watch(&self.folder, RecursiveMode::Recursive);
                self.seen = there.filter(|_| watched.is_ok());
            }
            if told || (moved && self.seen.is_some()) {
                return;
            }
        }
    }
}

/// Whether an event can change what is published. Reading does not, or our own reading would.
fn matters(event: &DebouncedEvent, root: &Path) -> bool {
    let reading = matches!(event.kind, EventKind::Access(_));
    let never = |path: &PathBuf| path.strip_prefix(root).is_ok_and(|below| below.iter().any(never));
    !reading && (event.need_rescan() || event.paths.is_empty() || !event.paths.iter().all(never))
}
