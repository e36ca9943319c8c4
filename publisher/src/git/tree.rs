//! A commit → files in a folder. What comes out of git is nobody's friend: names are looked at, sizes bounded, and nothing
//! is written that leads elsewhere.

use std::{
    fs, io,
    path::{Component, Path},
    sync::atomic::Ordering,
};

use gix::{Commit, ObjectId, Repository, objs::tree::EntryKind};

use super::{GitError, chain, wire::Meter};
use crate::limits;

/// How a file begins whose content is kept by git LFS.
const LFS: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Writes what `commit` has below `folder`, or all of it, to `place`, which is not there yet. What people should know, one
/// sentence each.
///
/// # Errors
/// See [`GitError`].
pub(super) fn write(
    commit: &Commit<'_>,
    folder: Option<&Path>,
    place: &Path,
    meter: &Meter,
) -> Result<Vec<String>, GitError> {
    let mut writer = Writer {
        repository: commit.repo,
        commit: commit.id.to_string(),
        meter,
        files: 0,
        bytes: 0,
        lfs: Vec::new(),
        warnings: Vec::new(),
    };
    let root = commit.tree().map_err(|error| writer.damaged(&error))?.id;
    let tree = match folder {
        None => root,
        Some(folder) => writer.find(root, folder)?,
    };
    writer.tree(tree, place, "", 0)?;
    match writer.lfs.is_empty() {
        true => Ok(writer.warnings),
        false => Err(GitError::Lfs { paths: writer.lfs }),
    }
}

struct Writer<'a> {
    repository: &'a Repository,
    commit: String,
    meter: &'a Meter,
    files: usize,
    bytes: u64,
    lfs: Vec<String>,
    warnings: Vec<String>,
}

impl Writer<'_> {
    fn damaged(&self, error: &gix::Error) -> GitError {
        GitError::Damaged { commit: self.commit.clone(), problem: chain(error) }
    }

    /// The tree at `folder` below the tree `root`.
    fn find(&self, root: ObjectId, folder: &Path) -> Result<ObjectId, GitError> {
        let missing = || GitError::NoFolder { commit: self.commit.clone(), folder: folder.to_owned() };
        let mut tree = root;
        for part in folder.components() {
            let name = match part {
                Component::CurDir => continue,
                Component::Normal(name) => name.to_str().ok_or_else(missing)?,
                _ => return Err(missing()),
            };
            let parent = self.repository.find_tree(tree).map_err(|error| self.damaged(&error))?;
            let found = parent.find_entry(name).filter(|entry| entry.mode().is_tree());
            tree = found.ok_or_else(missing)?.object_id();
        }
        Ok(tree)
    }

    fn tree(&mut self, id: ObjectId, place: &Path, below: &str, depth: usize) -> Result<(), GitError> {
        if self.meter.stop().load(Ordering::Relaxed) {
            return Err(GitError::Stopped);
        }
        if depth > limits::GIT_DEPTH {
            return Err(GitError::TooMany { what: format!("{} folders in each other", limits::GIT_DEPTH) });
        }
        fs::create_dir(place).map_err(|source| disk(place, source))?;
        let tree = self.repository.find_tree(id).map_err(|error| self.damaged(&error))?;
        for entry in tree.iter() {
            let entry = entry.map_err(|error| self.damaged(&error))?;
            let shown = entry.filename().to_string();
            let name = std::str::from_utf8(entry.filename()).ok().filter(|name| is_harmless(name));
            let name = name.ok_or_else(|| GitError::Name {
                commit: self.commit.clone(),
                name: shown.escape_debug().to_string(),
            })?;
            let path = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
            let place = place.join(name);
            match entry.mode().kind() {
                EntryKind::Tree => self.tree(entry.object_id(), &place, &path, depth + 1)?,
                EntryKind::Blob | EntryKind::BlobExecutable => self.file(entry.object_id(), &place, path)?,
                EntryKind::Link => self.warnings.push(format!("`{path}` is a symbolic link: left out")),
                EntryKind::Commit => self.warnings.push(format!(
                    "`{path}` is a submodule, whose files are in another repository: left out"
                )),
            }
        }
        Ok(())
    }

    fn file(&mut self, id: ObjectId, place: &Path, path: String) -> Result<(), GitError> {
        let size = self.repository.find_header(id).map_err(|error| self.damaged(&error))?.size();
        (self.files, self.bytes) = (self.files + 1, self.bytes.saturating_add(size));
        if self.files > limits::GIT_FILES {
            return Err(GitError::TooMany { what: format!("{} files", limits::GIT_FILES) });
        }
        if self.bytes > limits::GIT_TREE {
            return Err(GitError::TooMany { what: format!("{} MiB of files", limits::GIT_TREE >> 20) });
        }
        let blob = self.repository.find_blob(id).map_err(|error| self.damaged(&error))?;
        if size < 1024 && blob.data.starts_with(LFS) {
            self.lfs.push(path);
            return Ok(());
        }
        fs::write(place, &blob.data).map_err(|source| disk(place, source))
    }
}

/// Whether a name is of one file in a folder, on every system, and none of git's own.
fn is_harmless(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && !name.eq_ignore_ascii_case(".git")
        && !name.contains(['/', '\\', '\0'])
        && (cfg!(not(windows)) || !name.contains(':'))
}

fn disk(path: &Path, source: io::Error) -> GitError {
    GitError::Disk { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_out_of_the_folder_are_harmful() {
        for name in ["main.py", "a b", "..a", ".gitignore", "ä"] {
            assert!(is_harmless(name), "{name}");
        }
        for name in ["", ".", "..", "a/b", "a\\b", ".git", ".GIT", "a\0"] {
            assert!(!is_harmless(name), "{name}");
        }
    }
}
