//! What all devices share: what their channels offer, checksums that were worked out, and the way to the index.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, Digest, FilePath, NodeId, PackageId, UpdateList,
    list::Firmware,
    node::{Info, State},
    rollout,
    topic::NodeSubject,
};
use serde_json::{Map, Value};

use super::{
    ask::{Kind, Report},
    checksum::{Algorithm, git_blob},
    http::{Pace, Told},
    package::{Content, Offer, Package, Wanted},
    report,
    session::Assigned,
};
use crate::{
    access::devices::Device,
    clock,
    connection::Shared,
    index::{Index, IndexError, blobs::CHUNK},
    message::{Message, Payload, Refusal},
    mpyblox::plan,
    packet::Reason,
    sys,
};

/// Checksums that are remembered; when there are more, all are worked out anew.
const SUMS: usize = 4096;
/// Git names of files that are remembered; when there are more, all are worked out anew.
const BLOBS: usize = 64 * 1024;
/// How often a node's message is tried again that somebody else changed at the same time.
const TRIES: usize = 8;

/// What all devices share.
#[derive(Debug, Default)]
pub struct Desk {
    /// By channel, with the version of its list in the index. Held to look up or put in one.
    offers: Mutex<HashMap<ChannelName, (u64, Arc<Offer>)>>,
    /// Held to look up or put in one.
    sums: Mutex<HashMap<(Digest, Algorithm), String>>,
    /// By content. Held to look up or put in one.
    blobs: Mutex<HashMap<Digest, String>>,
    /// Slows those who ask without a pause.
    pub pace: Pace,
    /// What was told to those who wait for news by HTTP.
    pub told: Told,
    /// Held while a checksum is worked out, so that a fleet that asks for it has it worked out once.
    working: tokio::sync::Mutex<()>,
}

impl Desk {
    /// What a channel offers now; none if nothing was published.
    ///
    /// # Errors
    /// The index fails.
    pub fn offer(&self, index: &Index, channel: &ChannelName) -> Result<Option<Arc<Offer>>, IndexError> {
        let Some(message) = index.get(&channel.topic(), clock::now().unix_ms)? else { return Ok(None) };
        if let Some((version, offer)) = self.offers().get(channel)
            && *version == message.version
        {
            return Ok(Some(offer.clone()));
        }
        let Ok(list) = UpdateList::parse(&index.payload(&message.payload)?) else { return Ok(None) };
        let offer = Arc::new(Offer::of(channel.clone(), &list));
        self.offers().insert(channel.clone(), (message.version, offer.clone()));
        Ok(Some(offer))
    }

    fn offers(&self) -> MutexGuard<'_, HashMap<ChannelName, (u64, Arc<Offer>)>> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, String>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sums(&self) -> MutexGuard<'_, HashMap<(Digest, Algorithm), String>> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a device is to have, and what it is told of it.
///
/// # Errors
/// The index fails.
pub async fn assigned(shared: &Shared, node: &NodeId, device: &Device) -> Result<Arc<Assigned>, IndexError> {
    let mut assigned = Assigned::default();
    for (kind, channel) in
        [(Kind::Firmware, Some(&device.channel)), (Kind::Software, device.software.as_ref())]
    {
        let Some(channel) = channel else { continue };
        let Some(package) = package(shared, node, device, channel)? else { continue };
        let checksum = match &package.content {
            Content::Image { digest, payload } => sum(shared, device.checksum, digest, payload).await?,
            Content::Url(_) => String::new(),
        };
        assigned.shared.extend(package.attributes(kind, device.checksum, &checksum));
        let place = match kind {
            Kind::Firmware => &mut assigned.firmware,
            Kind::Software => &mut assigned.software,
        };
        *place = Some(Arc::new(package));
    }
    Ok(Arc::new(assigned))
}

fn package(
    shared: &Shared,
    node: &NodeId,
    device: &Device,
    channel: &ChannelName,
) -> Result<Option<Package>, IndexError> {
    let Some(offer) = shared.things.offer(&shared.index, channel)? else { return Ok(None) };
    if !is_turn(shared, &offer, node, device)? {
        return Ok(None);
    }
    let (content, image) = match offer.wanted(device.target.as_deref()) {
        Wanted::Image(image) => match stored(&shared.index, image)? {
            Some(payload) => (Content::Image { digest: image.digest, payload }, Some(image)),
            None => return Ok(None),
        },
        Wanted::Files => (Content::Url(shared.gate.repository(channel)), None),
        Wanted::Nothing => return Ok(None),
    };
    Ok(Some(offer.package(content, image)))
}

/// Whether it is the device's turn to take a release that goes to some first: it cannot tell itself.
fn is_turn(shared: &Shared, offer: &Offer, node: &NodeId, device: &Device) -> Result<bool, IndexError> {
    if !offer.release.release().is_some_and(|release| release.extra.contains_key(rollout::KEY)) {
        return Ok(true);
    }
    let now_ms = clock::now().unix_ms;
    let message = shared.index.get(&node.topic(NodeSubject::Info), now_ms)?;
    let bytes = message.map(|message| shared.index.payload(&message.payload)).transpose()?;
    let before = bytes.and_then(|bytes| Info::parse(&bytes).ok());
    let own = report::attributes(before.as_ref());
    let info = report::info(before, device, own, None);
    let wall = i64::try_from(now_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    Ok(plan::is_turn(&offer.release, node.as_str(), &info, wall, false))
}

fn stored(index: &Index, image: &Firmware) -> Result<Option<Payload>, IndexError> {
    let found = index.get(&PackageId::Firmware(image.digest).topic(), clock::now().unix_ms)?;
    Ok(found.map(|message| message.payload))
}

/// The checksum of an image, worked out once.
async fn sum(
    shared: &Shared,
    algorithm: Algorithm,
    digest: &Digest,
    payload: &Payload,
) -> Result<String, IndexError> {
    if algorithm == Algorithm::Sha256 {
        return Ok(digest.to_string());
    }
    let key = (*digest, algorithm);
    let known = || shared.things.sums().get(&key).cloned();
    if let Some(known) = known() {
        return Ok(known);
    }
    let _alone = shared.things.working.lock().await;
    if let Some(known) = known() {
        return Ok(known);
    }
    let mut content = Reading::new(shared.index.clone(), payload.clone());
    let work = tokio::task::spawn_blocking(move || algorithm.sum(&mut content));
    let failed = |source| IndexError::Folder { path: format!("blobs/{digest}"), source };
    let sum = work.await.map_err(|error| failed(io::Error::other(error)))?.map_err(failed)?;
    let mut sums = shared.things.sums();
    if sums.len() >= SUMS {
        sums.clear();
    }
    sums.insert(key, sum.clone());
    Ok(sum)
}

/// A file of a channel, as git knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GitFile {
    /// Its path.
    pub path: FilePath,
    /// Its git name.
    pub sha: String,
    /// Its size in bytes.
    pub size: u64,
}

/// The files of a channel, as git knows them; none if nothing was published. Those that are new are read once.
///
/// # Errors
/// The index fails.
pub async fn git_files(
    shared: &Arc<Shared>,
    channel: &ChannelName,
) -> Result<Option<Vec<GitFile>>, IndexError> {
    let Some(offer) = shared.things.offer(&shared.index, channel)? else { return Ok(None) };
    let _alone = shared.things.working.lock().await;
    let worker = shared.clone();
    let work = tokio::task::spawn_blocking(move || {
        offer.files.iter().map(|(path, digest)| git_file(&worker, path, digest)).collect()
    });
    let failed = |error| IndexError::Folder { path: "blobs".to_owned(), source: io::Error::other(error) };
    let files: Result<_, IndexError> = work.await.map_err(failed)?;
    files.map(Some)
}

fn git_file(shared: &Shared, path: &FilePath, digest: &Digest) -> Result<GitFile, IndexError> {
    let Some(payload) = file(&shared.index, path, digest)? else {
        return Err(IndexError::Folder { path: path.to_string(), source: io::ErrorKind::NotFound.into() });
    };
    let size = payload.len();
    let known = shared.things.blobs().get(digest).cloned();
    let sha = match known {
        Some(known) => known,
        None => {
            let mut content = Reading::new(shared.index.clone(), payload);
            let sha = git_blob(size, &mut content)
                .map_err(|source| IndexError::Folder { path: format!("blobs/{digest}"), source })?;
            let mut blobs = shared.things.blobs();
            if blobs.len() >= BLOBS {
                blobs.clear();
            }
            blobs.insert(*digest, sha.clone());
            sha
        }
    };
    Ok(GitFile { path: path.clone(), sha, size })
}

/// The bytes of a channel's file.
///
/// # Errors
/// The index fails.
pub fn file(index: &Index, path: &FilePath, digest: &Digest) -> Result<Option<Payload>, IndexError> {
    if *digest == Digest::EMPTY {
        // What is empty cannot be retained.
        return Ok(Some(Payload::Inline(Bytes::new())));
    }
    let topic = PackageId::Src(path.clone(), *digest).topic();
    Ok(index.get(&topic, clock::now().unix_ms)?.map(|message| message.payload))
}

/// Reads a payload, in pieces.
pub struct Reading {
    index: Index,
    payload: Payload,
    offset: u64,
}

impl Reading {
    /// Reads `payload` from its start.
    #[must_use]
    pub fn new(index: Index, payload: Payload) -> Reading {
        Reading { index, payload, offset: 0 }
    }
}

impl io::Read for Reading {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.offset >= self.payload.len() {
            return Ok(0);
        }
        let (piece, start) = match &self.payload {
            Payload::Inline(bytes) => (bytes.clone(), 0),
            Payload::Blob(digest, len) => {
                let start = self.offset / CHUNK * CHUNK;
                (self.index.chunk(digest, *len, start)?, start)
            }
        };
        let from = usize::try_from(self.offset - start).unwrap_or(usize::MAX).min(piece.len());
        let count = buffer.len().min(piece.len() - from);
        buffer[..count].copy_from_slice(&piece[from..from + count]);
        self.offset += count as u64;
        Ok(count)
    }
}

/// The device's own attributes.
///
/// # Errors
/// The index fails.
pub fn own(index: &Index, node: &NodeId) -> Result<Map<String, Value>, IndexError> {
    let message = index.get(&node.topic(NodeSubject::Info), clock::now().unix_ms)?;
    let bytes = message.map(|message| index.payload(&message.payload)).transpose()?;
    Ok(report::attributes(bytes.and_then(|bytes| Info::parse(&bytes).ok()).as_ref()))
}

/// Keeps what a device says are its own attributes, and returns when they are durable.
///
/// # Errors
/// They are too many, or the index does not take them.
pub async fn learn(
    shared: &Shared,
    node: &NodeId,
    device: &Device,
    new: &Map<String, Value>,
) -> Result<(), Refusal> {
    change(shared, node, NodeSubject::Info, |before| {
        let before = before.and_then(|bytes| Info::parse(bytes).ok());
        let own = report::learn(report::attributes(before.as_ref()), new.clone())
            .map_err(|text| Refusal::new(Reason::QuotaExceeded, text))?;
        Ok(report::info(before, device, own, None).to_bytes())
    })
    .await
}

/// Keeps what a device says of its update, and returns when it is durable. `assigned` is what it is to have.
///
/// # Errors
/// The index does not take it.
pub async fn report(
    shared: &Shared,
    node: &NodeId,
    device: &Device,
    report: &Report,
    assigned: &Assigned,
) -> Result<(), Refusal> {
    let mut installed = None;
    change(shared, node, NodeSubject::Info, |before| {
        let before = before.and_then(|bytes| Info::parse(bytes).ok());
        let own = report::attributes(before.as_ref());
        installed = report::installed(&own);
        Ok(report::info(before, device, own, Some(report)).to_bytes())
    })
    .await?;
    change(shared, node, NodeSubject::State, |before| {
        let state = before.and_then(|bytes| State::parse(bytes).ok());
        let state = report::state(state.as_ref(), report, assigned.firmware.as_deref(), installed.as_ref());
        Ok(match (state, before) {
            (Some(state), _) => state.to_bytes(),
            (None, before) => before.map(<[u8]>::to_vec).unwrap_or_default(),
        })
    })
    .await
}

/// Has a node's message become what `new` makes of it, though others may change it at the same time.
async fn change(
    shared: &Shared,
    node: &NodeId,
    subject: NodeSubject,
    mut new: impl FnMut(Option<&[u8]>) -> Result<Vec<u8>, Refusal>,
) -> Result<(), Refusal> {
    let failed = |error: IndexError| {
        tracing::error!(%error, "cannot read what a device said before");
        Refusal::new(Reason::UnspecifiedError, "the index failed")
    };
    let topic = node.topic(subject);
    let mut tries = 0;
    loop {
        let present = shared.index.get(&topic, clock::now().unix_ms).map_err(failed)?;
        let before = present.as_ref().map(|message| shared.index.payload(&message.payload));
        let before = before.transpose().map_err(failed)?;
        let bytes = new(before.as_deref())?;
        if bytes == before.as_deref().unwrap_or_default() {
            return Ok(());
        }
        let version = |message: &Option<Message>| message.as_ref().map_or(0, |message| message.version);
        let expected = version(&present);
        let Err(refusal) = sys::settle(shared, &topic, bytes.into(), expected).await else { return Ok(()) };
        tries += 1;
        let now = shared.index.get(&topic, clock::now().unix_ms).map_err(failed)?;
        if tries == TRIES || version(&now) == expected {
            return Err(refusal);
        }
    }
}
