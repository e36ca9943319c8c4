//! A folder that lies in a git repository, at one commit: fetched without its history, and without git.
//!
//! | module | does |
//! |---|---|
//! | [`address`] | what people type → which repository, and whose |
//! | [`login`] | who we are there |
//! | [`wire`] | git's smart HTTP, over the client that everything here uses |
//! | [`cache`] | what is fetched stays: the next time, only what is new comes |
//! | [`tree`] | a commit → files in a folder |
//!
//! A repository of this machine is read where it is.

mod address;
mod cache;
mod login;
mod tree;
mod wire;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use gix::ObjectId;
use mpypi_client::{args::TrustArgs, http, trust::TrustError};
use tempfile::TempDir;
use tokio::sync::mpsc;

pub use self::address::{Address, AddressError};
use crate::{limits, report::count};

/// What is published of which repository.
#[derive(Debug, Clone)]
pub struct Source {
    /// Where the repository is.
    pub address: Address,
    /// A branch, a tag, a full name as `refs/pull/7/head`, or a commit's id; where `HEAD` is if `None`.
    pub reference: Option<String>,
    /// The channel's folder in it; all of it if `None`.
    pub folder: Option<PathBuf>,
    /// Whom to trust where the repository is reached over HTTPS.
    pub trust: TrustArgs,
}

/// A folder of a commit, for as long as this lives.
#[derive(Debug)]
pub struct Checkout {
    /// Where it is.
    pub folder: PathBuf,
    /// The commit, in hexadecimal.
    pub commit: String,
    /// What people should know: one sentence each.
    pub warnings: Vec<String>,
    _place: TempDir,
}

/// Why there is no checkout.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// Nothing there can be read as a repository.
    #[error("`{path}` is no git repository: {problem}", path = path.display())]
    NotARepository {
        /// Where.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
    /// Nobody of that name is there.
    #[error("repository {url} has no branch, tag or commit `{reference}`")]
    NoReference {
        /// The repository.
        url: String,
        /// What was asked for.
        reference: String,
        /// Names that look like it.
        near: Vec<String>,
    },
    /// It has no commit at all.
    #[error("repository {0} is empty")]
    Empty(String),
    /// What was asked for is something else.
    #[error("`{reference}` of repository {url} is no commit")]
    NoCommit {
        /// The repository.
        url: String,
        /// What was asked for.
        reference: String,
    },
    /// There is no such folder in that commit.
    #[error("commit {commit} has no folder `{folder}`", folder = folder.display())]
    NoFolder {
        /// The commit.
        commit: String,
        /// The folder.
        folder: PathBuf,
    },
    /// The server wants to know who we are.
    #[error("repository {url} is there for who logs in: {}", if *given { "these credentials are refused" } else { "no credentials were given" })]
    Login {
        /// The repository.
        url: String,
        /// Whether credentials were given.
        given: bool,
    },
    /// Passwords do not travel in clear.
    #[error("repository {0} wants credentials over plain http, where everybody can read them")]
    ClearText(String),
    /// The server says no.
    #[error("repository {url} cannot be fetched: the server answers {code}")]
    Answer {
        /// The repository.
        url: String,
        /// Its status.
        code: u16,
    },
    /// Something on the way there.
    #[error("repository {url} cannot be fetched: {problem}")]
    Fetch {
        /// The repository.
        url: String,
        /// What.
        problem: String,
    },
    /// More comes than is believed to be meant.
    #[error("repository {url} cannot be fetched: it sends more than {limit} MiB", limit = limits::GIT_DOWNLOAD >> 20)]
    TooLarge {
        /// The repository.
        url: String,
    },
    /// The folder is too large.
    #[error("the folder has more than {}", what)]
    TooMany {
        /// What there is too much of.
        what: String,
    },
    /// The objects of the commit cannot be read.
    #[error("commit {commit} cannot be read: {problem}")]
    Damaged {
        /// The commit.
        commit: String,
        /// Why.
        problem: String,
    },
    /// A name that no folder here can have.
    #[error("commit {commit} has a file named `{name}`, which is written nowhere")]
    Name {
        /// The commit.
        commit: String,
        /// The name, made readable.
        name: String,
    },
    /// Files whose content is elsewhere.
    #[error("{} not in git but in git LFS, `{}` among them", if paths.len() == 1 { "1 file is".to_owned() } else { format!("{} are", count(paths.len(), "file")) }, paths[0])]
    Lfs {
        /// Which. At least one.
        paths: Vec<String>,
    },
    /// A file about trust cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A file or folder of this machine.
    #[error("cannot write below `{}`", path.display())]
    Disk {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody stopped it.
    #[error("stopped")]
    Stopped,
}

impl GitError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            GitError::NotARepository { .. } => {
                "name the folder that holds `.git`, a bare repository, or a URL as https://host/team/code.git"
                    .to_owned()
            }
            GitError::NoReference { near, .. } if !near.is_empty() => format!("there is {}", near.join(", ")),
            GitError::NoReference { .. } => {
                "name a branch, a tag, or a commit by all 40 digits, with `--ref`".to_owned()
            }
            GitError::Empty(_) => "push a commit to it first".to_owned(),
            GitError::Login { .. } => LOGIN.to_owned(),
            GitError::ClearText(_) => "use its https:// address".to_owned(),
            GitError::Answer { code: 404, .. } => {
                format!(
                    "is the address right? Of private repositories servers say the same to strangers: {LOGIN}"
                )
            }
            GitError::Answer { code: 403, .. } => "may this user, or this token, read it?".to_owned(),
            GitError::TooLarge { .. } | GitError::TooMany { .. } => {
                "name the channel's folder in it: `mpypi publish --git URL FOLDER`".to_owned()
            }
            GitError::Lfs { .. } => {
                "publish a checkout that has them: `git lfs pull`, then `mpypi publish FOLDER`".to_owned()
            }
            GitError::Damaged { .. } => "remove the folder `git` of mpypi's cache, and run again".to_owned(),
            GitError::Trust(error) => return error.hint().map(str::to_owned),
            GitError::NoCommit { .. }
            | GitError::NoFolder { .. }
            | GitError::Answer { .. }
            | GitError::Fetch { .. }
            | GitError::Name { .. }
            | GitError::Disk { .. }
            | GitError::Stopped => return None,
        })
    }
}

const LOGIN: &str = "give MPYPI_GIT_TOKEN, or `https://user:token@host/…`, or have it in ~/.netrc or a credential helper of git";

/// Fetches what `source` says; `told` hears how many bytes have come.
///
/// # Errors
/// See [`GitError`].
pub async fn checkout(source: &Source, told: &mut (dyn FnMut(u64) + Send)) -> Result<Checkout, GitError> {
    let (say, mut heard) = mpsc::unbounded_channel();
    let stop = Arc::new(AtomicBool::new(false));
    let _stopper = Stopper(stop.clone());
    let source = source.clone();
    let work = tokio::task::spawn_blocking(move || {
        let meter = wire::Meter::new(say, stop);
        match (check_out(&source, Begin::Anywhere, &meter), &source.address) {
            // What was kept of it is damaged: there is more where it came from.
            (Err(GitError::Damaged { .. }), Address::Web(_)) => check_out(&source, Begin::Anew, &meter),
            (checkout, _) => checkout,
        }
    });
    // Ends when the work does.
    while let Some(bytes) = heard.recv().await {
        told(bytes);
    }
    match work.await {
        Ok(checkout) => checkout,
        Err(stopped) => std::panic::resume_unwind(stopped.into_panic()),
    }
}

/// Tells the thread that nobody waits for it any more.
struct Stopper(Arc<AtomicBool>);

impl Drop for Stopper {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What of a repository may be there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// What was fetched before is used.
    Anywhere,
    /// It is not.
    Anew,
}

fn check_out(source: &Source, begin: Begin, meter: &wire::Meter) -> Result<Checkout, GitError> {
    let url = source.address.to_string();
    let (repository, id, _lock) = match &source.address {
        Address::Here(path) => {
            let repository = open_here(path)?;
            let id = find(&repository, &url, source.reference.as_deref())?;
            (repository, id, None)
        }
        Address::Web(web) => {
            let agent = http::agent(&source.trust, limits::GIT_REDIRECTS)?;
            let fetched = cache::fetch(web, source.reference.as_deref(), begin, &agent, meter)?;
            (fetched.repository, fetched.commit, Some(fetched.lock))
        }
    };
    let reference = || source.reference.clone().unwrap_or_else(|| "HEAD".to_owned());
    let damaged = |error: gix::Error| GitError::Damaged { commit: id.to_string(), problem: chain(&error) };
    let mut object = repository.find_object(id).map_err(damaged)?;
    while object.kind == gix::objs::Kind::Tag {
        let target = object.try_into_tag().and_then(|tag| Ok(tag.target_id()?.detach()));
        object = target.and_then(|target| repository.find_object(target)).map_err(damaged)?;
    }
    let not_a_commit = |_| GitError::NoCommit { url: url.clone(), reference: reference() };
    let commit = object.try_into_commit().map_err(not_a_commit)?;
    let place = tempfile::Builder::new().prefix("mpypi-git-").tempdir();
    let place = place.map_err(|source| GitError::Disk { path: std::env::temp_dir(), source })?;
    // What a channel without a name is called, is its folder's name.
    let name = match source.folder.as_deref().and_then(Path::file_name) {
        Some(name) => name.to_owned(),
        None => source.address.name().into(),
    };
    let folder = place.path().join(name);
    let written = tree::write(&commit, source.folder.as_deref(), &folder, meter)?;
    Ok(Checkout { folder, commit: commit.id.to_string(), warnings: written, _place: place })
}

fn open_here(path: &Path) -> Result<gix::Repository, GitError> {
    // Neither the environment nor anybody's settings have a say.
    gix::open_opts(path, gix::open::Options::isolated())
        .map_err(|error| GitError::NotARepository { path: path.to_owned(), problem: chain(&error) })
}

/// What a name stands for in a repository that is here.
fn find(repository: &gix::Repository, url: &str, reference: Option<&str>) -> Result<ObjectId, GitError> {
    let missing = |near| GitError::NoReference {
        url: url.to_owned(),
        reference: reference.unwrap_or("HEAD").to_owned(),
        near,
    };
    let Some(name) = reference else {
        return repository.head_id().map(|id| id.detach()).map_err(|_| GitError::Empty(url.to_owned()));
    };
    if let Some(id) = commit_id(name) {
        return if repository.has_object(id) { Ok(id) } else { Err(missing(Vec::new())) };
    }
    let damaged = |error: gix::Error| GitError::Damaged { commit: name.to_owned(), problem: chain(&error) };
    // A name that can be none is the name of nothing.
    if let Ok(Some(mut found)) = repository.try_find_reference(name) {
        return Ok(found.peel_to_id().map_err(damaged)?.detach());
    }
    let mut names = Vec::new();
    let all = repository.references().map_err(damaged)?;
    for reference in all.all().map_err(damaged)?.flatten() {
        names.push(reference.name().as_bstr().to_string());
    }
    Err(missing(near(name, names.iter().map(String::as_str))))
}

/// The id of a commit, if the name is one.
fn commit_id(name: &str) -> Option<ObjectId> {
    (name.len() == 40).then(|| ObjectId::from_hex(name.as_bytes()).ok()).flatten()
}

/// Names of branches and tags that look like `name`, the nearest first; if none does, the first few.
fn near<'a>(name: &str, all: impl Iterator<Item = &'a str>) -> Vec<String> {
    let short =
        |full: &'a str| ["refs/heads/", "refs/tags/"].iter().find_map(|start| full.strip_prefix(start));
    let mut names: Vec<(usize, &str)> =
        all.filter_map(short).map(|other| (strsim::osa_distance(name, other), other)).collect();
    names.sort_unstable();
    names.dedup();
    let good = names.iter().take_while(|(distance, other)| *distance <= 1 + other.len() / 3).count();
    let some = if good > 0 { good } else { names.len() };
    names[..some.min(limits::GIT_NEAR)].iter().map(|(_, other)| format!("`{other}`")).collect()
}

/// An error of gix with what it comes from, in one line.
fn chain(error: &gix::Error) -> String {
    let mut parts: Vec<String> = error.iter_errors().map(|part| part.to_string()).collect();
    parts.dedup();
    parts.join(": ").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_look_alike_are_told_first_and_some_if_none_does() {
        let all = ["HEAD", "refs/heads/main", "refs/heads/next", "refs/tags/v1.0", "refs/pull/1/head"];
        assert_eq!(near("mian", all.into_iter()), ["`main`"]);
        assert_eq!(near("v1.1", all.into_iter()), ["`v1.0`"]);
        assert_eq!(near("something-else", all.into_iter()).len(), 3);
        assert!(near("main", ["HEAD"].into_iter()).is_empty());
    }

    #[test]
    fn a_commit_is_named_by_all_of_its_digits() {
        assert!(commit_id("4ace2cdc12157f328b86114047a447b87b97a12c").is_some());
        for other in ["4ace2cd", "main", "4ace2cdc12157f328b86114047a447b87b97a12x"] {
            assert_eq!(commit_id(other), None, "{other}");
        }
    }

    #[test]
    fn files_of_lfs_are_counted() {
        let lfs =
            |paths: &[&str]| GitError::Lfs { paths: paths.iter().map(|path| (*path).to_owned()).collect() };
        assert_eq!(lfs(&["a"]).to_string(), "1 file is not in git but in git LFS, `a` among them");
        assert_eq!(lfs(&["a", "b"]).to_string(), "2 files are not in git but in git LFS, `a` among them");
    }
}
