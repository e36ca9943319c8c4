//! What is fetched stays: a bare repository for each URL, in the user's cache folder. It holds nothing that cannot be
//! fetched again; one that is damaged, or has grown too much, is begun anew.

use std::{
    env,
    fs::{self, File},
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use gix::{
    ObjectId, Repository,
    protocol::{fetch::refmap, handshake::Ref, transport::Protocol},
    remote::{Direction, fetch::Shallow, fetch::Tags, ref_map},
};
use gix_transport::client::{AuthenticationRequired, blocking_io::http::Transport};
use mpypi_protocol::Digest;
use ureq::Agent;

use super::{
    Begin, GitError,
    address::Web,
    chain, commit_id,
    login::Login,
    near,
    wire::{Meter, Trouble, Wire},
};
use crate::limits;

/// What was fetched.
pub(super) struct Fetched {
    pub(super) repository: Repository,
    /// What the reference stood for: a commit, or a tag of one.
    pub(super) commit: ObjectId,
    /// Nobody else writes there meanwhile.
    pub(super) lock: File,
}

/// Fetches what `reference` stands for, without its history.
pub(super) fn fetch(
    web: &Web,
    reference: Option<&str>,
    begin: Begin,
    agent: &Agent,
    meter: &Meter,
) -> Result<Fetched, GitError> {
    let folder = folder()?.join(Digest::of(web.to_string().as_bytes()).to_string());
    let disk = |path: &Path| {
        let path = path.to_owned();
        move |source| GitError::Disk { path, source }
    };
    fs::create_dir_all(&folder).map_err(disk(&folder))?;
    let lock = File::options().create(true).append(true).open(folder.join("lock")).map_err(disk(&folder))?;
    lock.lock().map_err(disk(&folder))?;
    let place = folder.join("repository");
    if place.exists() && (begin == Begin::Anew || is_grown(&place)) {
        fs::remove_dir_all(&place).or_else(|_| fs::remove_file(&place)).map_err(disk(&place))?;
    }
    let repository = match open(&place) {
        Ok(repository) => repository,
        Err(_) => {
            // It is not there yet, or somebody was killed while it was made.
            let _ = fs::remove_dir_all(&place).or_else(|_| fs::remove_file(&place));
            let made = gix::init_bare(&place).and_then(|_| open(&place));
            made.map_err(|error| GitError::Disk {
                path: place.clone(),
                source: std::io::Error::other(chain(&error)),
            })?
        }
    };
    let fetcher = Fetcher { web, repository: &repository, agent, meter };
    let (name, commit) = match reference.and_then(commit_id) {
        Some(id) => (id.to_string(), id),
        None => fetcher.resolve(reference)?,
    };
    let kept = format!("refs/mpypi/{}", Digest::of(name.as_bytes()));
    let is_kept = |kept: &str| {
        let found = repository.try_find_reference(kept).ok().flatten();
        found.is_some_and(|found| found.target().try_id() == Some(commit.as_ref()))
    };
    // What a reference of ours leads to has come, to the last object.
    if !is_kept(&kept) {
        fetcher.fetch(&name, &kept)?;
    }
    Ok(Fetched { repository, commit, lock })
}

/// Where everything is kept.
fn folder() -> Result<PathBuf, GitError> {
    let named = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = named.or_else(|| Some(env::home_dir()?.join(".cache")));
    // Who has no home keeps nothing for long.
    Ok(cache.unwrap_or_else(env::temp_dir).join("mpypi/git"))
}

/// Every fetch leaves a pack, and packs are never put together.
fn is_grown(place: &Path) -> bool {
    let packs = fs::read_dir(place.join("objects/pack")).into_iter().flatten().flatten();
    let sizes = packs.filter_map(|entry| Some(entry.metadata().ok()?.len()));
    let (count, bytes) = sizes.fold((0, 0), |(count, bytes), size| (count + 1, bytes + size));
    // A pack is two files.
    count > 2 * limits::GIT_PACKS || bytes > limits::GIT_CACHE
}

/// The user's settings say which credential helpers there are; nothing else of them matters here.
fn open(place: &Path) -> Result<Repository, gix::Error> {
    let options = gix::open::Options::default().open_path_as_is(true).config_overrides([
        "user.name=mpypi",
        "user.email=mpypi",
        "core.logAllRefUpdates=false",
    ]);
    gix::open_opts(place, options)
}

struct Fetcher<'a> {
    web: &'a Web,
    repository: &'a Repository,
    agent: &'a Agent,
    meter: &'a Meter,
}

impl Fetcher<'_> {
    fn remote(&self) -> Result<gix::Remote<'_>, GitError> {
        let remote = self.repository.remote_at_without_url_rewrite(self.web.url.clone());
        Ok(remote.map_err(|error| self.error(&error))?.with_fetch_tags(Tags::None))
    }

    fn transport(&self) -> Transport<Wire> {
        let wire = Wire::new(self.agent, self.meter);
        Transport::new_http(wire, self.web.url.clone(), Protocol::V2, false)
    }

    /// The full name of what `reference` names there, and what it leads to.
    fn resolve(&self, reference: Option<&str>) -> Result<(String, ObjectId), GitError> {
        // Nothing is written yet, wherever these lead to.
        let all = ["HEAD", "refs/heads/*:refs/heads/*", "refs/tags/*:refs/tags/*"];
        let mut specs: Vec<_> = all.map(str::to_owned).into();
        specs.extend(reference.filter(|name| name.starts_with("refs/")).map(str::to_owned));
        let extra_refspecs = specs
            .iter()
            .map(|spec| {
                let spec = gix::refspec::parse(spec.as_str().into(), gix::refspec::parse::Operation::Fetch);
                spec.map(|spec| spec.to_owned())
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| self.missing(reference.unwrap_or("HEAD"), Vec::new()))?;
        let remote = self.remote()?;
        let mut login = Login::new(self.web, self.repository);
        let connection = remote
            .to_connection_with_transport(self.transport())
            .with_transport_options(Box::new(()))
            .with_credentials(move |action| login.answer(action));
        let options = ref_map::Options { extra_refspecs, ..ref_map::Options::default() };
        let listed = connection.ref_map(gix::progress::Discard, options);
        let (map, _) = listed.map_err(|error| self.error(&error))?;
        if map.object_hash != self.repository.object_hash() {
            return Err(
                self.problem(format!("its objects are named by {}, which is not read", map.object_hash))
            );
        }
        let refs: Vec<(String, Option<ObjectId>)> = map.remote_refs.iter().map(read).collect();
        let find = |full: &str| {
            refs.iter().find(|(name, _)| name == full).and_then(|(name, id)| Some((name.clone(), (*id)?)))
        };
        let Some(reference) = reference else {
            return find("HEAD").ok_or_else(|| GitError::Empty(self.web.to_string()));
        };
        // As git reads a name: a tag comes before a branch.
        let found = ["", "refs/", "refs/tags/", "refs/heads/"];
        let found = found.iter().find_map(|start| find(&format!("{start}{reference}")));
        found.ok_or_else(|| self.missing(reference, near(reference, refs.iter().map(|(name, _)| &**name))))
    }

    /// Fetches what `name` leads to, and keeps it under the name `kept`.
    fn fetch(&self, name: &str, kept: &str) -> Result<(), GitError> {
        let spec = format!("+{name}:{kept}");
        let remote = self.remote()?.with_refspecs([spec.as_str()], Direction::Fetch);
        let remote = remote.map_err(|error| self.error(&error))?;
        let mut login = Login::new(self.web, self.repository);
        let connection = remote
            .to_connection_with_transport(self.transport())
            .with_transport_options(Box::new(()))
            .with_credentials(move |action| login.answer(action));
        let prepared = connection.prepare_fetch(gix::progress::Discard, ref_map::Options::default());
        let prepared = prepared.map_err(|error| self.error(&error))?;
        if let Some(refmap::Mapping { remote: refmap::Source::ObjectId(id), .. }) =
            prepared.ref_map().mappings.first()
            && self.repository.has_object(*id)
        {
            // Named by its id, it came before.
            return Ok(());
        }
        let depth = Shallow::DepthAtRemote(NonZeroU32::MIN);
        let received = prepared.with_shallow(depth).receive(gix::progress::Discard, self.meter.stop());
        match received {
            Ok(_) => Ok(()),
            // What a server says of an id that it does not have.
            Err(error) if commit_id(name).is_some() && chain(&error).contains("not our ref") => {
                Err(self.missing(name, Vec::new()))
            }
            Err(error) => Err(self.error(&error)),
        }
    }

    fn missing(&self, reference: &str, near: Vec<String>) -> GitError {
        GitError::NoReference { url: self.web.to_string(), reference: reference.to_owned(), near }
    }

    fn problem(&self, problem: String) -> GitError {
        GitError::Fetch { url: self.web.to_string(), problem }
    }

    /// What went wrong, in our words.
    fn error(&self, error: &gix::Error) -> GitError {
        let url = self.web.to_string();
        match error.downcast_any_ref::<Trouble>() {
            Some(Trouble::Answer(code)) => return GitError::Answer { url, code: *code },
            Some(Trouble::TooLarge) => return GitError::TooLarge { url },
            Some(Trouble::Stopped) => return GitError::Stopped,
            Some(Trouble::Unsafe(_)) | None => {}
        }
        let text = chain(error);
        if text.contains("clear text") {
            return GitError::ClearText(url);
        }
        if error.is_unauthenticated() || error.downcast_any_ref::<AuthenticationRequired>().is_some() {
            return GitError::Login { url, given: text.contains("not accepted") };
        }
        self.problem(text)
    }
}

fn read(found: &Ref) -> (String, Option<ObjectId>) {
    match found {
        Ref::Peeled { full_ref_name, tag, .. } => (full_ref_name.to_string(), Some(*tag)),
        Ref::Direct { full_ref_name, object } => (full_ref_name.to_string(), Some(*object)),
        Ref::Symbolic { full_ref_name, tag, object, .. } => {
            (full_ref_name.to_string(), Some(tag.unwrap_or(*object)))
        }
        Ref::Unborn { full_ref_name, .. } => (full_ref_name.to_string(), None),
    }
}
