//! A flash in memory, which loses at a power cut what was not synced.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use super::{Flash, Kind, parent};

/// A file system in memory. It knows for every name and every byte whether it was synced.
#[derive(Debug, Clone)]
pub struct Memory {
    names: BTreeMap<String, Node>,
    /// What stood where names changed since their folder was last synced.
    unsynced: BTreeMap<String, Option<Node>>,
    /// By their numbers, which grow. Ten thousand flashes are small tables, not trees.
    files: Vec<(u64, Data)>,
    next: u64,
    capacity: u64,
    /// Whether its power may fail.
    loses: bool,
}

/// What a power cut takes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing: everything was written at once.
    Nothing,
    /// Names made, changed or removed since their folder was synced.
    Names,
    /// Bytes written since their file was synced.
    Bytes,
    /// Both.
    Everything,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Node {
    Folder,
    File(u64),
}

#[derive(Debug, Clone, Default)]
struct Data {
    bytes: Vec<u8>,
    synced: usize,
    /// What was synced and is cut off since: the end of it comes back with a power cut.
    cut: Option<Vec<u8>>,
}

impl Loss {
    /// Every kind of loss.
    pub const ALL: [Loss; 4] = [Loss::Nothing, Loss::Names, Loss::Bytes, Loss::Everything];
}

impl Memory {
    /// An empty file system for `capacity` bytes.
    #[must_use]
    pub fn new(capacity: u64) -> Memory {
        Memory {
            names: BTreeMap::new(),
            unsynced: BTreeMap::new(),
            files: Vec::new(),
            next: 0,
            capacity,
            loses: true,
        }
    }

    /// The same, whose power never fails: nothing is kept of what could come back.
    #[must_use]
    pub fn lasting(capacity: u64) -> Memory {
        Memory { loses: false, ..Memory::new(capacity) }
    }

    /// Changes for how many bytes there is room. What is there stays.
    pub fn resize(&mut self, capacity: u64) {
        self.capacity = capacity;
    }

    /// The power goes off and on again. One whose power never fails loses nothing.
    pub fn lose(&mut self, loss: Loss) {
        if matches!(loss, Loss::Names | Loss::Everything) {
            for (path, before) in std::mem::take(&mut self.unsynced) {
                match before {
                    Some(node) => self.names.insert(path, node),
                    None => self.names.remove(&path),
                };
            }
            // What stands in a folder that was itself lost is lost with it.
            let lost: Vec<_> =
                self.names.keys().filter(|path| !self.has_folder(parent(path))).cloned().collect();
            for path in lost {
                self.names.remove(&path);
            }
        }
        if self.loses && matches!(loss, Loss::Bytes | Loss::Everything) {
            for (_, data) in &mut self.files {
                data.bytes.truncate(data.synced);
                data.bytes.extend(data.cut.take().unwrap_or_default());
            }
        }
        for (_, data) in &mut self.files {
            (data.synced, data.cut) = (data.bytes.len(), None);
        }
        self.unsynced.clear();
        let named: BTreeSet<_> = self.names.values().copied().collect();
        self.files.retain(|(id, _)| named.contains(&Node::File(*id)));
    }

    /// All files, with their bytes.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.names.iter().filter_map(|(path, node)| match node {
            Node::File(id) => Some((path.as_str(), self.bytes(*id))),
            Node::Folder => None,
        })
    }

    /// All folders.
    pub fn folders(&self) -> impl Iterator<Item = &str> {
        self.names.iter().filter(|(_, node)| **node == Node::Folder).map(|(path, _)| path.as_str())
    }

    fn bytes(&self, id: u64) -> &[u8] {
        let at = self.files.binary_search_by_key(&id, |(id, _)| *id);
        at.map_or(&[], |at| &self.files[at].1.bytes)
    }

    fn data(&mut self, id: u64) -> io::Result<&mut Data> {
        let at = self.files.binary_search_by_key(&id, |(id, _)| *id);
        at.map(|at| &mut self.files[at].1).map_err(|_| io::ErrorKind::NotFound.into())
    }

    fn has_folder(&self, path: &str) -> bool {
        path.is_empty() || (self.names.get(path) == Some(&Node::Folder) && self.has_folder(parent(path)))
    }

    /// Whether there is such a folder, or would be after a power cut.
    fn may_return(&self, path: &str) -> bool {
        let was = self.unsynced.get(path).copied().flatten();
        path.is_empty()
            || ([self.names.get(path).copied(), was].contains(&Some(Node::Folder))
                && self.may_return(parent(path)))
    }

    fn file(&self, path: &str) -> io::Result<u64> {
        match self.names.get(path) {
            Some(Node::File(id)) => Ok(*id),
            Some(Node::Folder) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn need_folder(&self, path: &str) -> io::Result<()> {
        match self.has_folder(path) {
            true => Ok(()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Bytes of all files.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.files().map(|(_, bytes)| bytes.len() as u64).sum()
    }

    /// Puts something else where `path` is, or nothing.
    fn put(&mut self, path: &str, node: Option<Node>) {
        let before = match node {
            Some(node) => self.names.insert(path.to_owned(), node),
            None => self.names.remove(path),
        };
        // What stood there when it was synced is lost only with the next sync.
        if self.loses && !self.unsynced.contains_key(path) {
            self.unsynced.insert(path.to_owned(), before);
        }
        self.forget(before);
    }

    /// Forgets a file if it has no name left.
    fn forget(&mut self, node: Option<Node>) {
        if let Some(Node::File(id)) = node
            && !self
                .names
                .values()
                .chain(self.unsynced.values().flatten())
                .any(|node| *node == Node::File(id))
        {
            self.files.retain(|(found, _)| *found != id);
        }
    }
}

impl Flash for Memory {
    fn kind(&self, path: &str) -> io::Result<Option<Kind>> {
        if path.is_empty() {
            return Ok(Some(Kind::Folder));
        }
        Ok(self.names.get(path).map(|node| match node {
            Node::Folder => Kind::Folder,
            Node::File(id) => Kind::File(self.bytes(*id).len() as u64),
        }))
    }

    fn read(&self, path: &str, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.bytes(self.file(path)?);
        let rest = bytes.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        self.need_folder(path)?;
        let inside = self.names.keys().filter(|name| parent(name) == path);
        Ok(inside.map(|name| name.rsplit('/').next().unwrap_or(name).to_owned()).collect())
    }

    fn free(&self) -> io::Result<u64> {
        Ok(self.capacity.saturating_sub(self.used()))
    }

    fn create(&mut self, path: &str) -> io::Result<()> {
        self.need_folder(parent(path))?;
        if self.names.get(path) == Some(&Node::Folder) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        self.files.push((self.next, Data::default()));
        self.put(path, Some(Node::File(self.next)));
        self.next += 1;
        Ok(())
    }

    fn append(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let id = self.file(path)?;
        if self.free()? < bytes.len() as u64 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.data(id)?.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn truncate(&mut self, path: &str, length: u64) -> io::Result<()> {
        let (id, loses) = (self.file(path)?, self.loses);
        let data = self.data(id)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if loses && length < data.synced {
            let mut end = data.bytes[length..data.synced].to_vec();
            end.extend(data.cut.take().unwrap_or_default());
            data.cut = Some(end);
        }
        data.bytes.truncate(length);
        data.synced = data.synced.min(length);
        Ok(())
    }

    fn sync(&mut self, path: &str) -> io::Result<()> {
        if let Some(Node::File(id)) = self.names.get(path) {
            let data = self.data(*id)?;
            (data.synced, data.cut) = (data.bytes.len(), None);
            // Of ten thousand flashes none keeps room for more.
            data.bytes.shrink_to_fit();
            return Ok(());
        }
        self.files.shrink_to_fit();
        self.need_folder(path)?;
        let here = |name: &String| parent(name) == path;
        let before: Vec<_> = self.unsynced.extract_if(.., |name, _| here(name)).collect();
        // What stood in a folder that is gone for good cannot come back either.
        let gone = self.unsynced.keys().filter(|name| !self.may_return(parent(name))).cloned();
        let gone: Vec<_> = gone.collect();
        let gone: Vec<_> = gone.iter().filter_map(|name| self.unsynced.remove(name)).collect();
        for node in before.into_iter().map(|(_, node)| node).chain(gone) {
            self.forget(node);
        }
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let id = self.file(from)?;
        self.need_folder(parent(to))?;
        if self.names.get(to) == Some(&Node::Folder) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        // The new name first: a file without any is forgotten.
        self.put(to, Some(Node::File(id)));
        self.put(from, None);
        Ok(())
    }

    fn remove(&mut self, path: &str) -> io::Result<()> {
        self.file(path)?;
        self.put(path, None);
        Ok(())
    }

    fn make_folder(&mut self, path: &str) -> io::Result<()> {
        self.need_folder(parent(path))?;
        if self.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.put(path, Some(Node::Folder));
        Ok(())
    }

    fn remove_folder(&mut self, path: &str) -> io::Result<()> {
        if self.names.get(path) != Some(&Node::Folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if !self.list(path)?.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        self.put(path, None);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_states() -> Memory {
        let mut flash = Memory::new(1000);
        flash.create("a").unwrap();
        flash.append("a", b"old").unwrap();
        flash.sync("a").unwrap();
        flash.sync("").unwrap();
        flash.append("a", b"new").unwrap();
        flash.create("b").unwrap();
        flash
    }

    fn seen(flash: &Memory) -> Vec<(&str, &[u8])> {
        flash.files().collect()
    }

    #[test]
    fn a_power_cut_takes_what_was_not_synced() {
        let after = |loss| {
            let mut flash = two_states();
            flash.lose(loss);
            flash
        };
        assert_eq!(seen(&after(Loss::Nothing)), [("a", &b"oldnew"[..]), ("b", b"")]);
        assert_eq!(seen(&after(Loss::Names)), [("a", &b"oldnew"[..])]);
        assert_eq!(seen(&after(Loss::Bytes)), [("a", &b"old"[..]), ("b", b"")]);
        assert_eq!(seen(&after(Loss::Everything)), [("a", &b"old"[..])]);
    }

    #[test]
    fn what_is_cut_off_comes_back_with_a_power_cut_unless_that_is_synced() {
        let cut = |synced: bool, loss| {
            let mut flash = two_states();
            flash.truncate("a", 1).unwrap();
            flash.append("a", b"x").unwrap();
            if synced {
                flash.sync("a").unwrap();
            }
            flash.lose(loss);
            flash.files().find(|(path, _)| *path == "a").unwrap().1.to_vec()
        };
        assert_eq!(cut(false, Loss::Bytes), b"old");
        assert_eq!(cut(false, Loss::Nothing), b"ox");
        assert_eq!(cut(true, Loss::Bytes), b"ox");
    }

    #[test]
    fn what_is_removed_takes_room_until_that_is_synced_and_where_no_power_fails_none() {
        let after = |mut flash: Memory| {
            flash.create("a").unwrap();
            flash.append("a", b"bytes").unwrap();
            flash.sync("a").unwrap();
            flash.sync("").unwrap();
            flash.remove("a").unwrap();
            flash
        };
        let mut flash = after(Memory::new(1000));
        assert_eq!(flash.files.len(), 1);
        let mut lasting = after(Memory::lasting(1000));
        assert!(lasting.files.is_empty() && lasting.unsynced.is_empty());
        lasting.lose(Loss::Everything);
        assert!(seen(&lasting).is_empty());
        flash.sync("").unwrap();
        assert!(flash.files.is_empty() && flash.unsynced.is_empty());
    }

    #[test]
    fn what_a_folder_held_cannot_come_back_once_it_is_gone_for_good() {
        let mut flash = Memory::new(1000);
        flash.make_folder("d").unwrap();
        flash.create("d/a").unwrap();
        for folder in ["d", ""] {
            flash.sync(folder).unwrap();
        }
        flash.remove("d/a").unwrap();
        flash.remove_folder("d").unwrap();
        let mut cut = flash.clone();
        cut.lose(Loss::Everything);
        assert_eq!(seen(&cut), [("d/a", &b""[..])]);
        flash.sync("").unwrap();
        assert!(flash.files.is_empty() && flash.unsynced.is_empty());
        flash.lose(Loss::Everything);
        assert!(seen(&flash).is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut flash = Memory::new(5);
        flash.create("a").unwrap();
        flash.append("a", b"1234").unwrap();
        assert_eq!(flash.append("a", b"56").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(flash.free().unwrap(), 1);
    }
}
