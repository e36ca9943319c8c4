//! A real directory as a device's flash.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use super::{Flash, Kind};

/// A directory. Nothing outside it is ever read or written: names that lead out and links are refused.
#[derive(Debug)]
pub struct Disk {
    root: PathBuf,
}

impl Disk {
    /// Opens `root`, which is made if it does not exist.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(root: impl Into<PathBuf>) -> io::Result<Disk> {
        let root = root.into();
        fs::create_dir_all(&root)?;
        Ok(Disk { root })
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where `path` is, after checking that it is inside the root.
    fn place(&self, path: &str) -> io::Result<PathBuf> {
        let mut place = self.root.clone();
        if path.is_empty() {
            return Ok(place);
        }
        let mut names = path.split('/').peekable();
        while let Some(name) = names.next() {
            if matches!(name, "" | "." | "..") || name.contains(['\\', '\0']) {
                return Err(outside(path));
            }
            place.push(name);
            let is_parent = names.peek().is_some();
            if is_parent && fs::symlink_metadata(&place).is_ok_and(|found| found.is_symlink()) {
                return Err(outside(path));
            }
        }
        Ok(place)
    }
}

impl Flash for Disk {
    fn kind(&self, path: &str) -> io::Result<Option<Kind>> {
        match fs::symlink_metadata(self.place(path)?) {
            Ok(found) if found.is_file() => Ok(Some(Kind::File(found.len()))),
            Ok(found) if found.is_dir() => Ok(Some(Kind::Folder)),
            Ok(_) => Ok(Some(Kind::Other)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn read(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut file = File::open(self.place(path)?)?;
        file.seek(SeekFrom::Start(offset))?;
        file.read(buffer)
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.place(path)?)? {
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn free(&self) -> io::Result<u64> {
        let found = rustix::fs::statvfs(&self.root)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    fn create(&mut self, path: &str) -> io::Result<()> {
        let place = self.place(path)?;
        // A link in place of the file would be followed; take it away first.
        if fs::symlink_metadata(&place).is_ok_and(|found| found.is_symlink()) {
            fs::remove_file(&place)?;
        }
        File::create(place).map(drop)
    }

    fn append(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        OpenOptions::new().append(true).open(self.place(path)?)?.write_all(bytes)
    }

    fn truncate(&mut self, path: &str, length: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.place(path)?)?;
        if length < file.metadata()?.len() { file.set_len(length) } else { Ok(()) }
    }

    fn sync(&mut self, path: &str) -> io::Result<()> {
        File::open(self.place(path)?)?.sync_all()
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.place(from)?, self.place(to)?)
    }

    fn remove(&mut self, path: &str) -> io::Result<()> {
        fs::remove_file(self.place(path)?)
    }

    fn make_folder(&mut self, path: &str) -> io::Result<()> {
        fs::create_dir(self.place(path)?)
    }

    fn remove_folder(&mut self, path: &str) -> io::Result<()> {
        fs::remove_dir(self.place(path)?)
    }
}

fn outside(path: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, format!("`{path}` leads out of the device's root"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_or_a_link_that_leads_out_of_the_root_is_refused() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("away")).unwrap();
        fs::write(outside.path().join("secret"), "x").unwrap();
        let mut disk = Disk::open(root.path()).unwrap();
        for path in ["../x", "/etc/passwd", "a//b", "away/secret"] {
            assert_eq!(disk.create(path).unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{path}");
            assert!(disk.read(path, 0, &mut [0]).is_err(), "{path}");
        }
        assert_eq!(disk.kind("away").unwrap(), Some(Kind::Other));
        assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"x");
    }

    #[test]
    fn files_are_written_in_pieces_and_listed_sorted() {
        let root = tempfile::tempdir().unwrap();
        let mut disk = Disk::open(root.path()).unwrap();
        disk.make_folder("lib").unwrap();
        disk.create("lib/b.py").unwrap();
        disk.append("lib/b.py", b"one").unwrap();
        disk.append("lib/b.py", b"two").unwrap();
        disk.create("lib/a.py").unwrap();
        disk.sync("lib/b.py").unwrap();
        disk.sync("lib").unwrap();
        assert_eq!(disk.list("lib").unwrap(), ["a.py", "b.py"]);
        assert_eq!(super::super::read_all(&disk, "lib/b.py", 100).unwrap().unwrap(), b"onetwo");
        assert!(disk.free().unwrap() > 0);
    }
}
