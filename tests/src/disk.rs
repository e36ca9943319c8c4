//! What a disk holds after a power cut, worked out from a journal of everything a program did to its files.
//!
//! The program runs with `shim/journal.c` preloaded. A [`Disk`] knows what was there before; it takes the
//! journal up to the moment of the cut, and tells what is left then: a file's content as of its last sync,
//! names as of the last sync of their folder, and of what came later any part, in any order.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

/// Bytes that a disk writes whole or not at all.
const SECTOR: usize = 512;

/// Where a program's changes are written down.
#[derive(Debug)]
pub struct Journal {
    shim: PathBuf,
    path: PathBuf,
    root: PathBuf,
}

/// A folder and everything below it, as a disk sees it.
#[derive(Debug)]
pub struct Disk {
    root: PathBuf,
    files: Vec<File>,
    /// The first is the root.
    folders: Vec<Folder>,
    /// Which file or folder has an inode number now; numbers come again.
    numbers: HashMap<u64, Entry>,
}

#[derive(Debug, Default)]
struct File {
    synced: Vec<u8>,
    later: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    Write { at: usize, data: Vec<u8> },
    Length(usize),
}

#[derive(Debug, Default)]
struct Folder {
    synced: BTreeMap<String, Entry>,
    later: Vec<(String, Option<Entry>)>,
    now: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    File(usize),
    Folder(usize),
}

/// What a cut does with changes that were not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// They are all lost.
    LosesAll,
    /// Each is lost or not, whatever came before or after it; a write may be torn between sectors.
    LosesSome,
    /// None is lost: what `kill -9` does.
    LosesNothing,
}

impl Journal {
    /// A journal at `path` of what happens below `root`, which exists. `shim` is where the shim was built.
    #[must_use]
    pub fn new(shim: &Path, path: PathBuf, root: &Path) -> Journal {
        Journal { shim: shim.to_owned(), path, root: root.canonicalize().unwrap() }
    }

    /// Builds the shim as the file `to`.
    pub fn build_shim(to: &Path) {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("shim/journal.c");
        let built = Command::new("cc")
            .args(["-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared", "-o"])
            .args([to, &source])
            .args(["-ldl", "-pthread"])
            .status();
        assert!(built.expect("a C compiler, `cc`").success(), "the shim does not build");
    }

    /// The environment of a program that keeps this journal.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, OsString); 3] {
        [
            ("LD_PRELOAD", self.shim.clone().into()),
            ("MPYPI_JOURNAL_ROOT", self.root.clone().into()),
            ("MPYPI_JOURNAL", self.path.clone().into()),
        ]
    }

    /// How long the journal is now: a cut from here on comes after everything that has been answered.
    #[must_use]
    pub fn position(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |found| found.len())
    }

    /// The records so far. What a killed program had half written does not count.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        let bytes = fs::read(&self.path).unwrap();
        let mut records = Vec::new();
        let mut at = 0;
        while let Some(record) = Record::read(&bytes[at..]) {
            at += Record::HEAD + record.one.len() + record.two.len();
            records.push(Record { end: at as u64, ..record });
        }
        records
    }
}

/// One change.
#[derive(Debug)]
pub struct Record {
    /// Where the journal is once it has been made.
    pub end: u64,
    what: u8,
    first: u64,
    second: u64,
    one: Vec<u8>,
    two: Vec<u8>,
}

impl Record {
    const HEAD: usize = 25;

    /// Whether a file or folder is told to keep what was done to it, so that less is lost from here on.
    #[must_use]
    pub fn is_sync(&self) -> bool {
        self.what == 5
    }

    fn read(bytes: &[u8]) -> Option<Record> {
        let long = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let short = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize);
        let middle = Self::HEAD + short(17)?;
        Some(Record {
            end: 0,
            what: *bytes.first()?,
            first: long(1)?,
            second: long(9)?,
            one: bytes.get(Self::HEAD..middle)?.to_vec(),
            two: bytes.get(middle..middle + short(21)?)?.to_vec(),
        })
    }
}

impl Disk {
    /// What is below `root` now, all of it synced.
    #[must_use]
    pub fn of(root: &Path) -> Disk {
        let root = root.canonicalize().unwrap();
        let folders = vec![Folder::default()];
        let mut disk = Disk { files: Vec::new(), folders, numbers: HashMap::new(), root: root.clone() };
        disk.numbers.insert(fs::metadata(&root).unwrap().ino(), Entry::Folder(0));
        disk.load(&root, 0);
        disk
    }

    fn load(&mut self, path: &Path, folder: usize) {
        for item in fs::read_dir(path).unwrap() {
            let item = item.unwrap();
            let number = item.metadata().unwrap().ino();
            let entry = match item.path().is_dir() {
                true => {
                    self.folders.push(Folder::default());
                    let id = self.folders.len() - 1;
                    self.load(&item.path(), id);
                    Entry::Folder(id)
                }
                false => {
                    // A socket has no content.
                    let is_file = item.file_type().unwrap().is_file();
                    let synced = if is_file { fs::read(item.path()).unwrap() } else { Vec::new() };
                    self.files.push(File { synced, later: Vec::new() });
                    Entry::File(self.files.len() - 1)
                }
            };
            self.numbers.insert(number, entry);
            let name = item.file_name().into_string().unwrap();
            self.folders[folder].synced.insert(name.clone(), entry);
            self.folders[folder].now.insert(name, entry);
        }
    }

    /// Takes a change.
    pub fn apply(&mut self, record: &Record) {
        let path = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        match record.what {
            1 => {
                self.files.push(File::default());
                let entry = Entry::File(self.files.len() - 1);
                self.numbers.insert(record.first, entry);
                self.name(&path(&record.one), Some(entry));
            }
            2 => {
                self.folders.push(Folder::default());
                let entry = Entry::Folder(self.folders.len() - 1);
                self.numbers.insert(record.first, entry);
                self.name(&path(&record.one), Some(entry));
            }
            3 => self
                .change(record.first, Change::Write { at: record.second as usize, data: record.one.clone() }),
            4 => self.change(record.first, Change::Length(record.second as usize)),
            5 => match self.numbers[&record.first] {
                Entry::File(id) => {
                    let file = &mut self.files[id];
                    for change in file.later.drain(..) {
                        change.make(&mut file.synced);
                    }
                }
                Entry::Folder(id) => {
                    let folder = &mut self.folders[id];
                    for (name, entry) in folder.later.drain(..) {
                        set(&mut folder.synced, name, entry);
                    }
                }
            },
            6 => {
                let entry = self.find(&path(&record.one));
                self.name(&path(&record.one), None);
                self.name(&path(&record.two), Some(entry));
            }
            7 | 8 => self.name(&path(&record.one), None),
            9 => {
                let entry = self.find(&path(&record.one));
                self.name(&path(&record.two), Some(entry));
            }
            _ => panic!("the broker does to its files what this cannot follow: {}", path(&record.one)),
        }
    }

    /// Writes what is left after a cut below `to`, an empty folder.
    pub fn write_after(&self, cut: Cut, random: &mut fastrand::Rng, to: &Path) {
        // Of some cuts nearly everything is left, of others nearly nothing.
        let kept = match cut {
            Cut::LosesAll => 0.0,
            Cut::LosesSome => [0.1, 0.5, 0.9][random.usize(..3)],
            Cut::LosesNothing => 1.0,
        };
        self.write_folder(0, kept, random, to);
    }

    fn write_folder(&self, id: usize, kept: f64, random: &mut fastrand::Rng, to: &Path) {
        let folder = &self.folders[id];
        let mut names = folder.synced.clone();
        for (name, entry) in &folder.later {
            if random.f64() < kept {
                set(&mut names, name.clone(), *entry);
            }
        }
        for (name, entry) in names {
            let path = to.join(name);
            match entry {
                Entry::Folder(id) => {
                    fs::create_dir(&path).unwrap();
                    self.write_folder(id, kept, random, &path);
                }
                Entry::File(id) => fs::write(&path, self.files[id].after(kept, random)).unwrap(),
            }
        }
    }

    fn change(&mut self, number: u64, change: Change) {
        let Entry::File(id) = self.numbers[&number] else { panic!("a write to a folder") };
        self.files[id].later.push(change);
    }

    fn parent<'p>(&self, path: &'p str) -> (usize, &'p str) {
        let below = Path::new(path).strip_prefix(&self.root).unwrap();
        let mut id = 0;
        for part in below.parent().unwrap() {
            id = match self.folders[id].now[part.to_str().unwrap()] {
                Entry::Folder(id) => id,
                Entry::File(_) => panic!("a file is used as a folder: {path}"),
            };
        }
        (id, below.file_name().unwrap().to_str().unwrap())
    }

    fn find(&self, path: &str) -> Entry {
        let (folder, name) = self.parent(path);
        self.folders[folder].now[name]
    }

    fn name(&mut self, path: &str, entry: Option<Entry>) {
        let (id, name) = self.parent(path);
        let folder = &mut self.folders[id];
        folder.later.push((name.to_owned(), entry));
        set(&mut folder.now, name.to_owned(), entry);
    }
}

fn set(names: &mut BTreeMap<String, Entry>, name: String, entry: Option<Entry>) {
    match entry {
        Some(entry) => names.insert(name, entry),
        None => names.remove(&name),
    };
}

impl File {
    fn after(&self, kept: f64, random: &mut fastrand::Rng) -> Vec<u8> {
        let mut content = self.synced.clone();
        for change in &self.later {
            match change {
                Change::Write { at, data } if kept < 1.0 && random.u8(..4) == 0 => {
                    tear(*at, data, kept, random, &mut content);
                }
                change if random.f64() < kept => change.make(&mut content),
                _ => {}
            }
        }
        content
    }
}

/// Makes a write in part: each sector of it is there or not.
fn tear(at: usize, data: &[u8], kept: f64, random: &mut fastrand::Rng, content: &mut Vec<u8>) {
    let mut start = 0;
    while start < data.len() {
        let end = data.len().min(start + SECTOR - (at + start) % SECTOR);
        if random.f64() < kept {
            Change::Write { at: at + start, data: data[start..end].to_vec() }.make(content);
        }
        start = end;
    }
}

impl Change {
    fn make(&self, content: &mut Vec<u8>) {
        match self {
            Change::Length(length) => content.resize(*length, 0),
            Change::Write { at, data } => {
                let end = at + data.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*at..end].copy_from_slice(data);
            }
        }
    }
}
