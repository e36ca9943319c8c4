//! What the channels name and what wheels hold: each list and each wheel is read once, and remembered.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    extract::{FromRequestParts, RawPathParams},
    http::request::Parts,
};
use mpypi_protocol::{ChannelName, Digest, Entry, PackageId, UpdateList, list, topic::CHANNELS};
use tokio::{sync::Semaphore, task::spawn_blocking};

use super::wheel::{Contents, project};
use crate::{
    clock,
    gateway::{Caller, Gateway, Problem},
    index::Index,
    message::Message,
};

/// Packages read whole at once, each into memory.
const READING: usize = 2;
/// Lists, wheels or checksums remembered; with more, all are forgotten and read again.
pub const REMEMBERED: usize = 32 * 1024;

/// What was read so far.
#[derive(Debug)]
pub struct Catalog {
    lists: Memory<ChannelName, Listed>,
    /// None where the bytes are no wheel.
    wheels: Memory<Digest, Option<Arc<Contents>>>,
    /// Which wheel a file is in, and where among its files.
    files: Memory<Digest, (Digest, usize)>,
    reading: Semaphore,
}

/// A channel's list.
#[derive(Debug)]
pub struct Listed {
    /// The channel.
    pub channel: ChannelName,
    /// The version of its record in the index; 0 if nobody has published there.
    pub version: u64,
    /// The list.
    pub list: UpdateList,
    /// The digest of its payload, if somebody has published there.
    pub digest: Option<Digest>,
}

/// Values that are made once.
#[derive(Debug)]
pub struct Memory<K, V> {
    /// Held for a look-up or an insertion.
    values: Mutex<HashMap<K, Arc<V>>>,
}

impl<K, V> Default for Memory<K, V> {
    fn default() -> Self {
        Memory { values: Mutex::default() }
    }
}

impl<K: Eq + Hash, V> Memory<K, V> {
    /// What is remembered under `key`.
    pub fn get(&self, key: &K) -> Option<Arc<V>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// Remembers a value.
    pub fn put(&self, key: K, value: V) -> Arc<V> {
        let value = Arc::new(value);
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        if values.len() >= REMEMBERED {
            values.clear();
        }
        values.insert(key, value.clone());
        value
    }
}

impl Default for Catalog {
    fn default() -> Self {
        Catalog {
            lists: Memory::default(),
            wheels: Memory::default(),
            files: Memory::default(),
            reading: Semaphore::new(READING),
        }
    }
}

impl Catalog {
    /// The list of a channel; an empty one if nobody has published there.
    ///
    /// # Errors
    /// The index fails.
    pub fn list(&self, index: &Index, channel: &ChannelName) -> Result<Arc<Listed>, Problem> {
        match index.get(&channel.topic(), clock::now().unix_ms)? {
            Some(message) => self.read(index, channel, &message),
            None => {
                let (channel, list) = (channel.clone(), UpdateList::default());
                Ok(Arc::new(Listed { channel, version: 0, list, digest: None }))
            }
        }
    }

    /// The lists of all channels that the caller may read.
    ///
    /// # Errors
    /// The index fails.
    pub fn lists(&self, index: &Index, caller: &Caller) -> Result<Vec<Arc<Listed>>, Problem> {
        let filter = format!("{CHANNELS}+");
        let now_ms = clock::now().unix_ms;
        let mut lists = Vec::new();
        index.each(&filter, 0, now_ms, 1, |message| {
            let channel = message.topic.strip_prefix(CHANNELS).and_then(|name| ChannelName::new(name).ok());
            if let Some(channel) = channel.filter(|_| caller.reads(&message.topic).is_ok()) {
                lists.push(self.read(index, &channel, &message)?);
            }
            Ok::<_, Problem>(())
        })?;
        Ok(lists)
    }

    fn read(&self, index: &Index, channel: &ChannelName, message: &Message) -> Result<Arc<Listed>, Problem> {
        if let Some(listed) = self.lists.get(channel).filter(|listed| listed.version == message.version) {
            return Ok(listed);
        }
        let payload = index.payload(&message.payload)?;
        let list = UpdateList::parse(&payload).map_err(|error| Problem::internal(&error))?;
        let digest = Some(Digest::of(&payload));
        let listed = Listed { channel: channel.clone(), version: message.version, list, digest };
        Ok(self.lists.put(channel.clone(), listed))
    }

    /// What a wheel holds; `None` if it is not in the index, or is none.
    ///
    /// # Errors
    /// The index fails.
    pub async fn wheel(&self, index: &Index, digest: &Digest) -> Result<Option<Arc<Contents>>, Problem> {
        let read = match self.wheels.get(digest) {
            Some(read) => read,
            None => {
                let Some(message) = index.get(&PackageId::Wheel(*digest).topic(), clock::now().unix_ms)?
                else {
                    return Ok(None);
                };
                let index = index.clone();
                let work = move || index.payload(&message.payload).map(|bytes| Contents::of(&bytes));
                let read = match self.work(work).await?? {
                    Ok(contents) => Some(Arc::new(contents)),
                    Err(problem) => {
                        tracing::debug!(%digest, problem, "no wheel for HTTP");
                        None
                    }
                };
                for (at, member) in read.iter().flat_map(|contents| contents.files.iter().enumerate()) {
                    self.files.put(member.digest, (*digest, at));
                }
                self.wheels.put(*digest, read)
            }
        };
        Ok(Option::clone(&read))
    }

    /// The size of a wheel in bytes; 0 if it is not in the index.
    ///
    /// # Errors
    /// The index fails.
    pub fn size(&self, index: &Index, digest: &Digest) -> Result<u64, Problem> {
        let message = index.get(&PackageId::Wheel(*digest).topic(), clock::now().unix_ms)?;
        Ok(message.map_or(0, |message| message.payload.len()))
    }

    /// The wheel that has a file with this digest, and which of its files that is, among the wheels that `lists` name.
    ///
    /// # Errors
    /// The index fails.
    pub async fn file(
        &self,
        index: &Index,
        lists: &[Arc<Listed>],
        file: &Digest,
    ) -> Result<Option<(Digest, Arc<Contents>, usize)>, Problem> {
        if self.files.get(file).is_none() {
            for (wheel, _) in wheels(lists) {
                self.wheel(index, &wheel.digest).await?;
            }
        }
        let Some(found) = self.files.get(file) else { return Ok(None) };
        let (digest, at) = *found;
        let is_listed = wheels(lists).any(|(wheel, _)| wheel.digest == digest);
        let contents = if is_listed { self.wheel(index, &digest).await? } else { None };
        Ok(contents.map(|contents| (digest, contents, at)))
    }

    /// Does something that reads packages into memory, when it is its turn.
    ///
    /// # Errors
    /// It panicked.
    pub async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Problem> {
        let _place = self.reading.acquire().await.map_err(|error| Problem::internal(&error))?;
        spawn_blocking(work).await.map_err(|error| Problem::internal(&error))
    }
}

/// Every wheel that some lists name, and the channel that does.
pub fn wheels(lists: &[Arc<Listed>]) -> impl Iterator<Item = (&list::Wheel, &ChannelName)> {
    lists.iter().flat_map(|listed| {
        listed.list.entries().iter().filter_map(|entry| match entry {
            Entry::Wheel(wheel) => Some((wheel, &listed.channel)),
            _ => None,
        })
    })
}

/// The wheels of one project, each once.
pub fn wheels_of<'l>(lists: &'l [Arc<Listed>], name: &str) -> Vec<&'l list::Wheel> {
    let wanted = project(name);
    let mut found: Vec<&list::Wheel> = Vec::new();
    for (wheel, _) in wheels(lists) {
        if project(&wheel.name) == wanted && !found.iter().any(|other| other.digest == wheel.digest) {
            found.push(wheel);
        }
    }
    found
}

/// The lists that a request is about: that of the channel in its path, or else of all channels that its caller may
/// read.
#[derive(Debug)]
pub struct Scope {
    /// The lists.
    pub lists: Vec<Arc<Listed>>,
    /// From a path with so many folders below the scope, the way up to the gateway's root.
    up: &'static str,
}

impl Scope {
    /// A relative URL of `path`, which is one from the gateway's root, for a page so many folders deep in its face.
    #[must_use]
    pub fn url(&self, folders: usize, path: &str) -> String {
        format!("{}{}{path}", "../".repeat(folders), self.up)
    }
}

impl FromRequestParts<Arc<Gateway>> for Scope {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Scope, Problem> {
        let caller = Caller::from_request_parts(parts, gateway).await?;
        let index = &gateway.shared.index;
        match channel(parts, gateway).await? {
            Some(channel) => {
                caller.reads(&channel.topic())?;
                Ok(Scope { lists: vec![gateway.catalog.list(index, &channel)?], up: "../../" })
            }
            None => Ok(Scope { lists: gateway.catalog.lists(index, &caller)?, up: "" }),
        }
    }
}

/// The channel in a request's path, if there is one.
///
/// # Errors
/// 404 for what cannot be a channel.
pub async fn channel(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Option<ChannelName>, Problem> {
    let parameters = RawPathParams::from_request_parts(parts, gateway).await;
    let parameters = parameters.map_err(|error| Problem::bad_request(error.to_string()))?;
    let channel = parameters.iter().find(|(name, _)| *name == "channel");
    let channel = channel.map(|(_, name)| ChannelName::new(name)).transpose();
    channel.map_err(|error| Problem::not_found(error.to_string()))
}
