//! Which files of a folder count: `.gitignore` files inside it, `ignore` of `channel.toml`, and what
//! nobody wants on a device. Nothing outside the folder has a say, so it is the same on every machine.

use std::{
    ffi::OsStr,
    fs::{self, FileType},
    io::{self, Read},
    path::{Path, PathBuf},
    time::SystemTime,
};

use ignore::{DirEntry, WalkBuilder, gitignore::Gitignore, gitignore::GitignoreBuilder};

use crate::limits;

/// A regular file that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its path relative to the folder, `/`-separated.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes when it was found.
    pub size: u64,
    /// When it was last changed, if the file system tells.
    pub changed: Option<SystemTime>,
}

/// All files that count, sorted by name, and what people should know about the others.
#[derive(Debug, Default)]
pub struct Walked {
    /// The files.
    pub files: Vec<Found>,
    /// One sentence each.
    pub warnings: Vec<String>,
}

/// Why a folder cannot be walked.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// A file or folder cannot be read, or an ignore file has a pattern that is none.
    #[error("cannot read folder `{}`", folder.display())]
    Walk {
        /// The folder.
        folder: PathBuf,
        /// Why, with the path.
        source: ignore::Error,
    },
    /// A pattern of `channel.toml` is none.
    #[error("`ignore` has `{pattern}`, which is no pattern")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// Why.
        source: ignore::Error,
    },
    /// A name that is not UTF-8, as MQTT topics must be.
    #[error("the name of `{}` is not UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
    },
    /// More than [`limits::FILES`].
    #[error("folder `{}` has more than {} files", folder.display(), limits::FILES)]
    TooMany {
        /// The folder.
        folder: PathBuf,
    },
}

/// Walks `folder`. `ignore` holds patterns as in a `.gitignore` of `folder`. Of what lies directly in
/// `folder`, only what `enter` accepts is looked at.
///
/// # Errors
/// See [`WalkError`].
pub fn walk(folder: &Path, ignore: &[String], enter: fn(&OsStr) -> bool) -> Result<Walked, WalkError> {
    let patterns = patterns(folder, ignore)?;
    let walker = WalkBuilder::new(folder)
        // No hidden-file rule, no `.ignore`, nothing of the user's or of parent folders …
        .standard_filters(false)
        // … but the `.gitignore` files inside, whether or not this is a git repository.
        .git_ignore(true)
        .require_git(false)
        .follow_links(false)
        .sort_by_file_name(OsStr::cmp)
        .filter_entry(move |entry| {
            let folder = entry.file_type().is_some_and(|kind| kind.is_dir());
            match entry.depth() {
                0 => return true,
                1 if !enter(entry.file_name()) => return false,
                _ => {}
            }
            !never(entry.file_name()) && !patterns.matched(entry.path(), folder).is_ignore()
        })
        .build();
    let mut walked = Walked::default();
    for entry in walker {
        let entry = entry.map_err(|source| WalkError::Walk { folder: folder.to_owned(), source })?;
        if let Some(error) = entry.error() {
            walked.warnings.push(format!("a rule was left out: {error}"));
        }
        if let Some(found) = look_at(folder, &entry, &mut walked.warnings)? {
            if walked.files.len() == limits::FILES {
                return Err(WalkError::TooMany { folder: folder.to_owned() });
            }
            walked.files.push(found);
        }
    }
    walked.files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(walked)
}

fn look_at(folder: &Path, entry: &DirEntry, warnings: &mut Vec<String>) -> Result<Option<Found>, WalkError> {
    let kind = entry.file_type();
    if entry.depth() == 0 || kind.is_some_and(|kind| kind.is_dir()) {
        return Ok(None);
    }
    let path = entry.path();
    let name = path.strip_prefix(folder).ok().and_then(Path::to_str);
    let name = name.ok_or_else(|| WalkError::NotUtf8 { path: path.to_owned() })?;
    let name = name.replace(std::path::MAIN_SEPARATOR, "/");
    if !kind.is_some_and(|kind| FileType::is_file(&kind)) {
        let what = match entry.path_is_symlink() {
            true => "a symbolic link",
            false => "no regular file",
        };
        warnings.push(format!("`{name}` is {what}: left out"));
        return Ok(None);
    }
    let metadata =
        entry.metadata().map_err(|source| WalkError::Walk { folder: folder.to_owned(), source })?;
    Ok(Some(Found { name, path: path.to_owned(), size: metadata.len(), changed: changed(&metadata) }))
}

/// When a file was last changed. Not what its modification time says, which `cp -p`, `tar` and `git` set to what
/// it was elsewhere: another file of the same size and time may have taken its place.
#[cfg(unix)]
fn changed(metadata: &fs::Metadata) -> Option<SystemTime> {
    use std::os::unix::fs::MetadataExt;
    let (seconds, nanoseconds) = (metadata.ctime().try_into().ok()?, metadata.ctime_nsec().try_into().ok()?);
    SystemTime::UNIX_EPOCH.checked_add(std::time::Duration::new(seconds, nanoseconds))
}

#[cfg(not(unix))]
fn changed(metadata: &fs::Metadata) -> Option<SystemTime> {
    metadata.modified().ok()
}

/// A whole file that is read into memory.
///
/// # Errors
/// Of the file system; `FileTooLarge` beyond [`limits::INPUT`].
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    fs::File::open(path)?.take(limits::INPUT + 1).read_to_end(&mut content)?;
    match content.len() as u64 > limits::INPUT {
        true => Err(io::ErrorKind::FileTooLarge.into()),
        false => Ok(content),
    }
}

fn patterns(folder: &Path, ignore: &[String]) -> Result<Gitignore, WalkError> {
    let mut builder = GitignoreBuilder::new(folder);
    for pattern in ignore {
        builder
            .add_line(None, pattern)
            .map_err(|source| WalkError::Pattern { pattern: pattern.clone(), source })?;
    }
    builder.build().map_err(|source| WalkError::Pattern { pattern: ignore.join(" "), source })
}

/// What belongs to git, to Python on a computer, to a desktop, or to an editor that has the file open.
pub(crate) fn never(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    // Vim: `.main.py.swp`, then `.swo`, `.swn`, …
    let swap = name.starts_with('.')
        && name.rsplit_once('.').is_some_and(|(_, end)| end.len() == 3 && end.starts_with("sw"));
    matches!(name, ".git" | "__pycache__" | ".pytest_cache" | ".mypy_cache" | ".ruff_cache" | "4913")
        || matches!(name, ".DS_Store" | "Thumbs.db" | "desktop.ini")
        || name.ends_with(".pyc")
        || name.ends_with('~')
        || name.starts_with(".#")
        || (name.len() > 1 && name.starts_with('#') && name.ends_with('#'))
        || name.starts_with(".goutputstream-")
        || name.ends_with(".kate-swp")
        || name.ends_with("___jb_tmp___")
        || name.ends_with("___jb_old___")
        || swap
}

impl WalkError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            WalkError::NotUtf8 { .. } => Some("rename it, or ignore it in `channel.toml`".to_owned()),
            WalkError::TooMany { .. } => Some(
                "is it the folder you meant? If so, leave files out with `ignore` in `channel.toml`"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A temporary folder with these files.
    pub(crate) fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        folder
    }

    fn names(folder: &Path, ignore: &[&str]) -> Vec<String> {
        let ignore: Vec<String> = ignore.iter().map(|&pattern| pattern.to_owned()).collect();
        walk(folder, &ignore, |_| true).unwrap().files.into_iter().map(|file| file.name).collect()
    }

    #[test]
    fn gitignore_files_inside_count_without_a_repository_and_parents_do_not() {
        let folder = folder(&[
            (".gitignore", "inner/*.txt\n"),
            ("inner/.gitignore", "*.log\n!keep.log\n"),
            ("inner/.ignore", "*.py\n"),
            ("inner/a.py", ""),
            ("inner/a.txt", ""),
            ("inner/a.log", ""),
            ("inner/keep.log", ""),
        ]);
        assert_eq!(
            names(folder.path(), &[]),
            [".gitignore", "inner/.gitignore", "inner/.ignore", "inner/a.py", "inner/keep.log"]
        );
        let inner = folder.path().join("inner");
        assert_eq!(names(&inner, &[]), [".gitignore", ".ignore", "a.py", "a.txt", "keep.log"]);
    }

    #[test]
    fn what_nobody_wants_on_a_device_is_left_out_and_dotfiles_are_not() {
        let folder = folder(&[
            (".env", ""),
            (".git/config", ""),
            ("__pycache__/a.cpython.pyc", ""),
            ("a.py", ""),
            ("a.pyc", ""),
            ("a.py~", ""),
            (".a.py.swp", ""),
            (".#a.py", ""),
            ("#a.py#", ""),
            (".swiftlint", ""),
        ]);
        assert_eq!(names(folder.path(), &[]), [".env", ".swiftlint", "a.py"]);
    }

    #[test]
    fn patterns_of_the_channel_file_are_relative_to_its_folder() {
        let folder = folder(&[("src/a.md", ""), ("src/b.md", ""), ("src/docs/c.py", ""), ("src/d.py", "")]);
        assert_eq!(names(folder.path(), &["*.md", "!b.md", "docs/"]), ["src/b.md", "src/d.py"]);
    }

    #[cfg(unix)]
    #[test]
    fn symbolic_links_are_left_out_with_a_warning() {
        let folder = folder(&[("a.py", "x")]);
        std::os::unix::fs::symlink("/etc", folder.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("a.py", folder.path().join("b.py")).unwrap();
        let walked = walk(folder.path(), &[], |_| true).unwrap();
        assert_eq!(walked.files.len(), 1);
        let warnings = ["`b.py` is a symbolic link: left out", "`etc` is a symbolic link: left out"];
        assert_eq!(walked.warnings, warnings);
    }
}
