//! A channel's folder → what its devices should have.
//!
//! By convention, with nothing to configure: files below `src/` are sent as they are; each folder with a
//! `pyproject.toml` and each `.whl` below `wheels/` becomes a wheel; each `.bin` below `firmware/` is an image for
//! whole devices. A folder with none of these three is all `src`.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs,
    io::Read,
    path::{Path, PathBuf},
    time::SystemTime,
};

use bytes::Bytes;
use mpypi_protocol::{
    ChannelName, Digest, Entry, FilePath, PackageId,
    digest::Hasher,
    limits::PACKAGE,
    list::{Firmware, OPTIONAL, Src, Wheel as WheelEntry},
    path::PathError,
    topic::NameError,
    wheel::normalized_name,
};

use crate::{
    compile::{self, Compiled},
    firmware::{self, Title},
    limits,
    places::{PlaceError, Places},
    promoter::PromoterIgnore,
    settings::{Settings, SettingsError},
    walk::{Found, WalkError, Walked, read, walk},
    wheel::{
        Contents, Wheel, WheelError,
        archive::ArchiveError,
        pack::{self, ANY},
        repack,
    },
};

/// What a folder holds, ready to be compared with what a broker retains.
#[derive(Debug)]
pub struct Channel {
    /// The channel's name.
    pub name: ChannelName,
    /// What its `channel.toml` says.
    pub settings: Settings,
    /// Wheels by name, then files by path, then images by name.
    pub packages: Vec<Package>,
    /// Whether ota-promoter's devices follow it, as far as the folder tells.
    pub for_promoter: bool,
    /// What people should know: one sentence each.
    pub warnings: Vec<String>,
    /// What was done for people without being asked: one sentence each.
    pub notes: Vec<String>,
}

/// One package.
#[derive(Debug, Clone)]
pub struct Package {
    /// What the channel's list says about it.
    pub entry: Entry,
    /// Its id.
    pub id: PackageId,
    /// Its size in bytes.
    pub size: u64,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    Packed(Bytes),
    File(PathBuf),
}

/// What need not be worked out again: digests of files that did not change since they were last read, and what
/// was compiled.
#[derive(Debug, Default)]
pub struct Cache {
    digests: HashMap<PathBuf, (u64, SystemTime, Digest)>,
    compiled: Compiled,
}

/// Why a folder is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// There is no such folder.
    #[error("folder `{}` cannot be opened", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is no such project or wheel.
    #[error("`{}` cannot be opened", path.display())]
    Open {
        /// The folder or file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Neither a wheel nor a project.
    #[error("`{}` is neither a `.whl` nor a folder with a `pyproject.toml`", path.display())]
    NoWheel {
        /// What it is not.
        path: PathBuf,
    },
    /// It is something else.
    #[error("`{}` is not a folder", path.display())]
    NotAFolder {
        /// What it is not.
        path: PathBuf,
    },
    /// The folder's name is no channel name.
    #[error("folder `{}` cannot give the channel its name", folder.display())]
    Name {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: NameError,
    },
    /// `channel.toml` is wrong.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The folder cannot be walked.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// A file's path cannot be on a device or in a topic.
    #[error("`{file}` cannot be sent")]
    Path {
        /// The file.
        file: String,
        /// Why.
        source: PathError,
    },
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is too large to be a package.
    #[error("`{file}` has {size} bytes, more than the {PACKAGE} a package can have")]
    TooLarge {
        /// The file.
        file: String,
        /// Its size in bytes.
        size: u64,
    },
    /// A wheel cannot be made.
    #[error("wheel `{folder}`")]
    Wheel {
        /// The project folder or `.whl`.
        folder: String,
        /// Why.
        source: WheelError,
    },
    /// Two wheels are the same package for the same devices.
    #[error("`{one}` and `{other}` are both wheel `{name}` for `{tag}`")]
    Twice {
        /// One project folder or `.whl`.
        one: String,
        /// The other.
        other: String,
        /// The package's name, normalised.
        name: String,
        /// The tag.
        tag: String,
    },
    /// Two images are the same firmware for the same devices.
    #[error("`{one}` and `{other}` are both firmware `{name}`{}", for_target(target))]
    SameImage {
        /// One file.
        one: String,
        /// The other.
        other: String,
        /// The firmware's name.
        name: String,
        /// The hardware it is for, unless it is for all.
        target: Option<String>,
    },
    /// Nothing says which version an image is.
    #[error("nothing says which version `{file}` is")]
    NoVersion {
        /// The image.
        file: String,
    },
    /// An image without a byte.
    #[error("`{file}` is empty: there is no such firmware")]
    EmptyImage {
        /// The image.
        file: String,
    },
    /// `channel.toml` speaks of an image that is not there.
    #[error("channel file `{}` speaks of `firmware/{file}`, which is not there or left out", path.display())]
    NoImage {
        /// The channel file.
        path: PathBuf,
        /// The image, relative to `firmware/`.
        file: String,
    },
    /// Two files want one place on a device.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Nothing to send.
    #[error("folder `{}` holds nothing to publish{}", folder.display(), because(warnings))]
    Empty {
        /// The folder.
        folder: PathBuf,
        /// What was left out: one sentence each.
        warnings: Vec<String>,
    },
    /// A file is not any more what it was when the folder was read.
    #[error("`{}` changed while it was being published", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

impl Channel {
    /// Reads `folder`. `name` goes before what `channel.toml` and the folder are called; `now` decides which
    /// digests of `cache` can be trusted next time; `compiling` is told how many of how many files are compiled.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub fn load(
        folder: &Path,
        name: Option<&ChannelName>,
        cache: &mut Cache,
        now: SystemTime,
        compiling: &mut dyn FnMut(usize, usize),
    ) -> Result<Channel, ChannelError> {
        let open = |source| ChannelError::Folder { folder: folder.to_owned(), source };
        let root = folder.canonicalize().map_err(open)?;
        if !root.is_dir() {
            return Err(ChannelError::NotAFolder { path: folder.to_owned() });
        }
        let settings = Settings::load(folder)?;
        let name = match name.or(settings.name.as_ref()) {
            Some(name) => name.clone(),
            None => ChannelName::new(root.file_name().unwrap_or_default().to_string_lossy())
                .map_err(|source| ChannelError::Name { folder: folder.to_owned(), source })?,
        };
        let mut reader = Reader {
            folder,
            cache,
            now,
            compiling,
            settings: &settings,
            places: Places::default(),
            warnings: vec![],
            notes: vec![],
            for_promoter: settings.promoter,
        };
        let mut packages = reader.packages()?;
        let Reader { places, mut warnings, notes, for_promoter, .. } = reader;
        for name in &settings.optional {
            let named: Vec<_> = packages.iter_mut().filter(|package| package.is_called(name)).collect();
            if named.is_empty() {
                warnings.push(format!("`channel.toml` speaks of package `{name}`, and there is none"));
            }
            named.into_iter().for_each(Package::leave_to_device);
        }
        warnings.extend(places.check()?);
        if packages.is_empty() {
            return Err(ChannelError::Empty { folder: folder.to_owned(), warnings });
        }
        Ok(Channel { name, settings, packages, for_promoter, warnings, notes })
    }

    /// The error that a wheel of ours cannot be read.
    pub(crate) fn unreadable(&self, package: &Package, source: WheelError) -> ChannelError {
        ChannelError::Wheel { folder: package.id.to_string(), source }
    }
}

/// The wheels of one project, or one `.whl`.
#[derive(Debug)]
pub struct Project {
    /// One for each tag.
    pub packages: Vec<Package>,
    /// What people should know: one sentence each.
    pub warnings: Vec<String>,
    /// What was done for people without being asked: one sentence each.
    pub notes: Vec<String>,
}

impl Project {
    /// Reads a `.whl` or the folder of a project. Below the `wheels/` of a channel it becomes what that channel
    /// carries; elsewhere, `tag` is the tag that a project is packed with.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub fn load(
        path: &Path,
        tag: Option<&str>,
        cache: &mut Cache,
        compiling: &mut dyn FnMut(usize, usize),
    ) -> Result<Project, ChannelError> {
        let open = |source| ChannelError::Open { path: path.to_owned(), source };
        let root = path.canonicalize().map_err(open)?;
        let wheels = root.ancestors().skip(1).find(|folder| folder.file_name() == Some(OsStr::new("wheels")));
        let channel = wheels.and_then(Path::parent).filter(|folder| folder.join(Settings::FILE).is_file());
        let (settings, files) = match channel {
            Some(folder) => {
                let settings = Settings::load(folder)?;
                let mut files = walk(folder, &settings.ignore, |name| name == "wheels")?.files;
                files.retain(|file| file.path.starts_with(&root));
                (settings, files)
            }
            None => {
                let settings = Settings { tag: tag.map(str::to_owned), ..Settings::default() };
                let name = root.file_name().unwrap_or_default().to_string_lossy();
                let mut files = match root.is_dir() {
                    true => walk(&root, &[], |_| true)?.files,
                    false => {
                        let data = fs::metadata(&root).map_err(open)?;
                        let (size, changed) = (data.len(), data.modified().ok());
                        vec![Found { name: String::new(), path: root.clone(), size, changed }]
                    }
                };
                for file in &mut files {
                    file.name = format!("wheels/{name}/{}", file.name).trim_end_matches('/').to_owned();
                }
                (settings, files)
            }
        };
        let mut reader = Reader {
            folder: path,
            cache,
            // Nothing of it is remembered.
            now: SystemTime::UNIX_EPOCH,
            compiling,
            settings: &settings,
            places: Places::default(),
            warnings: vec![],
            notes: vec![],
            for_promoter: false,
        };
        let packages = reader.wheels(&files)?;
        let Reader { warnings, notes, .. } = reader;
        match packages.is_empty() {
            true => Err(ChannelError::NoWheel { path: path.to_owned() }),
            false => Ok(Project { packages, warnings, notes }),
        }
    }
}

struct Reader<'a> {
    folder: &'a Path,
    cache: &'a mut Cache,
    now: SystemTime,
    compiling: &'a mut dyn FnMut(usize, usize),
    settings: &'a Settings,
    places: Places,
    warnings: Vec<String>,
    notes: Vec<String>,
    for_promoter: bool,
}

impl Reader<'_> {
    fn packages(&mut self) -> Result<Vec<Package>, ChannelError> {
        const CONVENTION: [&str; 3] = ["src", "wheels", "firmware"];
        let conventional = CONVENTION.iter().any(|name| self.folder.join(name).is_dir());
        let enter: fn(&OsStr) -> bool = match conventional {
            true => |name| CONVENTION.iter().any(|known| name == *known),
            false => |name| name != Settings::FILE,
        };
        let Walked { files, warnings } = walk(self.folder, &self.settings.ignore, enter)?;
        self.warnings.extend(warnings);
        if conventional && self.folder.join("pyproject.toml").is_file() {
            self.warnings.push(
                "`pyproject.toml` is left out: to make a wheel of this project, put its folder below \
                 `wheels/` of a channel"
                    .to_owned(),
            );
        }
        let below = |folder| files.iter().filter(|file| is_below(&file.name, folder)).cloned().collect();
        let (src, wheels, images): (Vec<Found>, Vec<Found>, Vec<Found>) = match conventional {
            true => (below("src"), below("wheels"), below("firmware")),
            false => (files, Vec::new(), Vec::new()),
        };
        let mut packages = self.wheels(&wheels)?;
        packages.extend(self.src(&src, if conventional { "src/" } else { "" })?);
        packages.extend(self.firmware(&images)?);
        Ok(packages)
    }

    fn firmware(&mut self, files: &[Found]) -> Result<Vec<Package>, ChannelError> {
        let mut images: BTreeMap<(String, Option<String>), (&Found, Package)> = BTreeMap::new();
        let mut unmentioned = self.settings.firmware.clone();
        let mut stray = Vec::new();
        for file in files {
            let name = &file.name["firmware/".len()..];
            let given = unmentioned.remove(name);
            if given.is_none() && !firmware::is_image(name) {
                stray.push(file.name.as_str());
                continue;
            }
            let title = firmware::title(name, given.as_ref(), self.settings.version.as_deref());
            let Some(Title { name, version, target }) = title else {
                return Err(ChannelError::NoVersion { file: file.name.clone() });
            };
            let (digest, size) = self.digest(file)?;
            if size == 0 {
                return Err(ChannelError::EmptyImage { file: file.name.clone() });
            }
            let key = (name.clone(), target.clone());
            if let Some((one, _)) = images.get(&key) {
                let (one, other) = (one.name.clone(), file.name.clone());
                return Err(ChannelError::SameImage { one, other, name, target });
            }
            let extra = Default::default();
            let entry = Entry::Firmware(Firmware {
                name,
                version,
                target,
                digest,
                size: Some(size),
                chunks: None,
                extra,
            });
            let content = Content::File(file.path.clone());
            images.insert(key, (file, Package { id: PackageId::Firmware(digest), entry, size, content }));
        }
        if let Some((file, _)) = unmentioned.pop_first() {
            return Err(ChannelError::NoImage { path: self.folder.join(Settings::FILE), file });
        }
        self.leave_out(&stray, "neither a `.bin` nor spoken of in `channel.toml`");
        Ok(images.into_values().map(|(_, package)| package).collect())
    }

    /// Warns of files that mean nothing where they are.
    fn leave_out(&mut self, files: &[&str], reason: &str) {
        let Some(first) = files.first() else { return };
        let others = match files.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        self.warnings.push(format!("`{first}`{others} left out: {reason}"));
    }

    fn src(&mut self, files: &[Found], root: &str) -> Result<Vec<Package>, ChannelError> {
        let ignored = self.promoter_ignore(root)?;
        let mut packages = Vec::with_capacity(files.len());
        for file in files {
            let name = &file.name[root.len()..];
            if ignored.ignores(name) {
                continue;
            }
            let path = FilePath::new(name)
                .and_then(FilePath::for_topic)
                .map_err(|source| ChannelError::Path { file: file.name.clone(), source })?;
            let (digest, size) = self.digest(file)?;
            self.places.add(path.clone(), &file.name, None, digest);
            packages.push(Package {
                id: PackageId::Src(path.clone(), digest),
                entry: Entry::Src(Src {
                    path,
                    digest,
                    size: Some(size),
                    chunks: None,
                    extra: Default::default(),
                }),
                size,
                content: Content::File(file.path.clone()),
            });
        }
        packages.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(packages)
    }

    fn promoter_ignore(&mut self, root: &str) -> Result<PromoterIgnore, ChannelError> {
        let path = self.folder.join(root).join(PromoterIgnore::FILE);
        // A directory of that name counts as absent. What cannot be read is an error: it may keep secrets at home.
        self.for_promoter |= path.is_file();
        let text = match path.is_file().then(|| read(&path)).transpose() {
            Ok(text) => text.unwrap_or_default(),
            Err(source) => return Err(ChannelError::Read { path, source }),
        };
        let (patterns, invalid) = PromoterIgnore::parse(&String::from_utf8_lossy(&text));
        for line in invalid {
            self.warnings.push(format!(
                "`{}` has `{line}`, which is no regular expression: it ignores nothing",
                PromoterIgnore::FILE
            ));
        }
        Ok(patterns)
    }

    /// The digest and size of a file, from its bytes or from when they were last read.
    fn digest(&mut self, file: &Found) -> Result<(Digest, u64), ChannelError> {
        let too_large = |size| ChannelError::TooLarge { file: file.name.clone(), size };
        if file.size > PACKAGE {
            return Err(too_large(file.size));
        }
        if let Some((size, changed, digest)) = self.cache.digests.get(&file.path)
            && (*size, Some(*changed)) == (file.size, file.changed)
        {
            return Ok((*digest, *size));
        }
        let read = |source| ChannelError::Read { path: file.path.clone(), source };
        let mut content = fs::File::open(&file.path).map_err(read)?.take(PACKAGE + 1);
        let (mut hasher, mut size, mut piece) = (Hasher::default(), 0, [0; 16 * 1024]);
        loop {
            match content.read(&mut piece).map_err(read)? {
                0 => break,
                count => {
                    hasher.update(&piece[..count]);
                    size += count as u64;
                }
            }
        }
        if size > PACKAGE {
            return Err(too_large(size));
        }
        let digest = hasher.finish();
        let settled =
            |time: &SystemTime| self.now.duration_since(*time).is_ok_and(|since| since >= limits::SETTLED);
        match file.changed.filter(settled).filter(|_| size == file.size) {
            Some(changed) => self.cache.digests.insert(file.path.clone(), (size, changed, digest)),
            None => self.cache.digests.remove(&file.path),
        };
        Ok((digest, size))
    }

    fn wheels(&mut self, files: &[Found]) -> Result<Vec<Package>, ChannelError> {
        // The outermost folders with a `pyproject.toml`; what lies in them belongs to them.
        let mut projects: Vec<&str> = Vec::new();
        let mut folders: Vec<&str> =
            files.iter().filter_map(|file| file.name.strip_suffix("/pyproject.toml")).collect();
        folders.sort_unstable();
        for folder in folders {
            if folder != "wheels" && !projects.iter().any(|outer| is_below(folder, outer)) {
                projects.push(folder);
            }
        }
        let mut stray: Vec<&str> = Vec::new();
        let mut wheels: BTreeMap<(String, String), (String, Wheel)> = BTreeMap::new();
        let mut sources: Vec<compile::Source> = Vec::new();
        for project in &projects {
            let inside: Vec<Found> = files
                .iter()
                .filter(|file| is_below(&file.name, project))
                .map(|file| Found { name: file.name[project.len() + 1..].to_owned(), ..file.clone() })
                .collect();
            let tag = self.settings.tag.as_deref().unwrap_or(ANY);
            let contents = pack::contents(&inside, tag)
                .map_err(|source| ChannelError::Wheel { folder: (*project).to_owned(), source })?;
            sources.push(((*project).to_owned(), contents));
        }
        for file in files.iter().filter(|file| !projects.iter().any(|p| is_below(&file.name, p))) {
            match file.name.ends_with(".whl") {
                true => sources.push((file.name.clone(), self.given_wheel(file)?)),
                false => stray.push(&file.name),
            }
        }
        for (from, wheel) in self.build(sources)? {
            let key = (normalized_name(&wheel.name), wheel.tag.clone());
            if let Some((one, _)) = wheels.get(&key) {
                let (one, (name, tag)) = (one.clone(), key);
                return Err(ChannelError::Twice { one, other: from, name, tag });
            }
            for (path, digest) in &wheel.files {
                self.places.add(path.clone(), &from, Some((&key.0, &key.1)), *digest);
            }
            wheels.insert(key, (from, wheel));
        }
        self.leave_out(&stray, "neither a `.whl` nor in a folder with a `pyproject.toml`");
        Ok(wheels.into_values().map(|(_, wheel)| Package::from(wheel)).collect())
    }

    /// Compiles and writes wheels: one or more of each.
    fn build(&mut self, mut sources: Vec<compile::Source>) -> Result<Vec<(String, Wheel)>, ChannelError> {
        let error = |(folder, source)| ChannelError::Wheel { folder, source };
        if let Some(options) = &self.settings.compile {
            let Cache { compiled, .. } = &mut *self.cache;
            sources = compile::compile(sources, options, compiled, self.compiling).map_err(error)?;
        }
        let write = |(from, contents): compile::Source| match contents.write() {
            Ok(wheel) => Ok((from, wheel)),
            Err(source) => Err(error((from, source))),
        };
        sources.into_iter().map(write).collect()
    }

    fn given_wheel(&mut self, file: &Found) -> Result<Contents, ChannelError> {
        let error = |source| ChannelError::Wheel { folder: file.name.clone(), source };
        if file.size > limits::INPUT {
            let source = ArchiveError::TooLarge { what: "the wheel is", limit: limits::INPUT };
            return Err(error(source.into()));
        }
        let given =
            read(&file.path).map_err(|source| ChannelError::Read { path: file.path.clone(), source })?;
        let (contents, left_out) = repack::contents(&given).map_err(error)?;
        if contents.clone().write().map_err(error)?.bytes != given {
            let left_out = match left_out.as_slice() {
                [] => String::new(),
                parts => format!(", without {}", parts.join(" and ")),
            };
            self.notes.push(format!("`{}` was repacked into the form devices install{left_out}", file.name));
        }
        Ok(contents)
    }
}

fn because(warnings: &[String]) -> String {
    match warnings {
        [] => String::new(),
        warnings => format!(": {}", warnings.join("; ")),
    }
}

fn for_target(target: &Option<String>) -> String {
    target.as_ref().map(|target| format!(" for `{target}`")).unwrap_or_default()
}

fn is_below(name: &str, folder: &str) -> bool {
    name.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

impl From<Wheel> for Package {
    fn from(wheel: Wheel) -> Package {
        let (digest, size) = (Digest::of(&wheel.bytes), wheel.bytes.len() as u64);
        Package {
            id: PackageId::Wheel(digest),
            entry: Entry::Wheel(WheelEntry {
                name: wheel.name,
                version: wheel.version,
                digest,
                size: Some(size),
                tag: Some(wheel.tag),
                chunks: None,
                extra: Default::default(),
            }),
            size,
            content: Content::Packed(wheel.bytes),
        }
    }
}

impl Package {
    fn is_called(&self, name: &str) -> bool {
        match &self.entry {
            Entry::Wheel(wheel) => normalized_name(&wheel.name) == normalized_name(name),
            Entry::Firmware(image) => image.name == name,
            _ => false,
        }
    }

    /// A device takes it only if somebody there chose it.
    fn leave_to_device(&mut self) {
        if let Entry::Wheel(WheelEntry { extra, .. }) | Entry::Firmware(Firmware { extra, .. }) =
            &mut self.entry
        {
            extra.insert(OPTIONAL.to_owned(), true.into());
        }
    }

    /// The package's bytes, which are sure to have its digest.
    ///
    /// # Errors
    /// The file changed since the folder was read, or is gone.
    pub fn bytes(&self) -> Result<Bytes, ChannelError> {
        let path = match &self.content {
            Content::Packed(bytes) => return Ok(bytes.clone()),
            Content::File(path) => path,
        };
        let changed = || ChannelError::Changed { path: path.clone() };
        let read = |source| ChannelError::Read { path: path.clone(), source };
        let file = fs::File::open(path).map_err(read)?;
        let mut bytes = Vec::new();
        file.take(self.size + 1).read_to_end(&mut bytes).map_err(read)?;
        match Digest::of(&bytes) == *self.id.digest() {
            true => Ok(bytes.into()),
            false => Err(changed()),
        }
    }
}

impl ChannelError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            ChannelError::Name { .. } => "give one with `--channel NAME` or `name` in channel.toml",
            ChannelError::Settings(error) => return error.hint(),
            ChannelError::Walk(error) => return error.hint(),
            ChannelError::Path { .. } => "rename it, or leave it out with `ignore` in channel.toml",
            ChannelError::TooLarge { .. } => "split it, or leave it out with `ignore` in channel.toml",
            ChannelError::Wheel { source, .. } => return source.hint(),
            ChannelError::NoVersion { .. } => {
                "call it `firmware-<hardware>-v<version>.bin`, or give `version` in channel.toml, for the channel \
                 or below `[firmware.\"<file>\"]`"
            }
            ChannelError::EmptyImage { .. } => "remove it, or leave it out with `ignore` in channel.toml",
            ChannelError::NoImage { .. } => "the name is that of a file, relative to `firmware/`",
            ChannelError::SameImage { .. } => {
                "keep one of them, or give them different `name`s or `target`s in channel.toml"
            }
            ChannelError::Twice { .. } | ChannelError::Place(_) => {
                "keep one of them; a device would refuse the release"
            }
            ChannelError::Empty { .. } => {
                "put files below `src/`, projects below `wheels/` or images below `firmware/`; a list without \
                 packages would remove everything from the channel's devices"
            }
            ChannelError::Changed { .. } => "run again when nothing writes to the folder",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::{walk::tests::folder, wheel::pack::tests::PROJECT};

    pub(crate) fn load(files: &[(&str, &str)]) -> Result<Channel, ChannelError> {
        let folder = folder(files);
        let name = ChannelName::new("dev").unwrap();
        Channel::load(
            folder.path(),
            Some(&name),
            &mut Cache::default(),
            SystemTime::UNIX_EPOCH,
            &mut |_, _| (),
        )
    }

    fn ids(channel: &Channel) -> Vec<String> {
        let name = |package: &Package| match &package.entry {
            Entry::Wheel(wheel) => format!("wheel {} {}", wheel.name, wheel.version),
            Entry::Src(src) => format!("src {}", src.path),
            Entry::Firmware(image) => {
                let target = image.target.as_deref().unwrap_or("all");
                format!("firmware {} {} for {target}", image.name, image.version)
            }
            other => other.kind().to_owned(),
        };
        channel.packages.iter().map(name).collect()
    }

    #[test]
    fn a_folder_becomes_wheels_by_name_then_files_by_path() {
        let channel = load(&[
            ("README.md", "not for devices"),
            ("channel.toml", "name = \"other\"\ntag = \"mpy6-bytecode-esp32\"\n"),
            ("src/main.py", "import blink\n"),
            ("src/lib/a.py", "\n"),
            ("src/empty.txt", ""),
            ("wheels/blink/pyproject.toml", PROJECT),
            ("wheels/blink/blink_led.py", "x = 1\n"),
            ("wheels/blink/tests/pyproject.toml", "not a project of its own"),
            ("wheels/group/apple/pyproject.toml", "[project]\nname = \"apple\"\nversion = \"2\"\n"),
            ("wheels/group/apple/apple.py", ""),
        ])
        .unwrap();
        assert_eq!(channel.name.as_str(), "dev", "the command line goes first");
        assert_eq!(
            ids(&channel),
            ["wheel apple 2", "wheel Blink-Led 1.4.0", "src empty.txt", "src lib/a.py", "src main.py"]
        );
        assert_eq!(channel.warnings, Vec::<String>::new());
        let Entry::Wheel(wheel) = &channel.packages[1].entry else { panic!("a wheel comes second") };
        assert_eq!(wheel.tag.as_deref(), Some("mpy6-bytecode-esp32"));
        assert_eq!(channel.packages[2].id.digest(), &Digest::EMPTY);
    }

    #[test]
    fn a_folder_without_the_convention_is_all_src() {
        let channel = load(&[("main.py", "x"), ("channel.toml", ""), ("images/x.bin", "x")]).unwrap();
        assert_eq!(ids(&channel), ["src images/x.bin", "src main.py"]);
    }

    #[test]
    fn images_come_last_by_name_and_need_no_files_beside_them() {
        let channel = load(&[
            ("channel.toml", "version = \"1.10\"\n[firmware.\"b.img\"]\ntarget = \"esp32-eth\"\n"),
            ("firmware/firmware-esp32-v3.0.0.bin", "image"),
            ("firmware/b.img", "image"),
            ("firmware/old/a.bin", "older image"),
            ("firmware/.gitignore", "*.elf\n"),
            ("firmware/a.elf", "not for devices"),
        ])
        .unwrap();
        assert_eq!(
            ids(&channel),
            ["firmware a 1.10 for all", "firmware b 1.10 for esp32-eth", "firmware esp32 3.0.0 for esp32"]
        );
        let image = &channel.packages[2];
        assert_eq!(image.id, PackageId::Firmware(Digest::of(b"image")));
        assert_eq!(image.size, 5);
        assert_eq!(
            channel.warnings,
            ["`firmware/.gitignore` left out: neither a `.bin` nor spoken of in `channel.toml`"]
        );
    }

    #[test]
    fn an_image_that_is_not_one_is_refused_with_a_remedy() {
        let speaks = "version = \"1\"\n[firmware.\"b.bin\"]\nname = \"a\"\n";
        let refused: [(&[(&str, &str)], &str); 4] = [
            (&[("firmware/a.bin", "x")], "nothing says which version `firmware/a.bin` is"),
            (&[("firmware/firmware-a-v1.bin", "")], "`firmware/firmware-a-v1.bin` is empty"),
            (&[("firmware/a.bin", "x"), ("channel.toml", speaks)], "speaks of `firmware/b.bin`"),
            (
                &[("firmware/a.bin", "x"), ("firmware/b.bin", "y"), ("channel.toml", speaks)],
                "`firmware/a.bin` and `firmware/b.bin` are both firmware `a`",
            ),
        ];
        for (files, word) in refused {
            let error = load(files).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
            assert!(error.hint().is_some(), "{error}");
        }
    }

    #[test]
    fn what_is_left_out_is_said() {
        let channel = load(&[
            ("src/main.py", "x"),
            ("src/.promoterignore", "(\n.*\\.md\n"),
            ("src/a.md", ""),
            ("firmware/firmware-esp32-v1.bin", "x"),
            ("firmware/esp32.elf", "x"),
            ("wheels/notes.txt", ""),
        ])
        .unwrap();
        assert_eq!(ids(&channel), ["src .promoterignore", "src main.py", "firmware esp32 1 for esp32"]);
        assert_eq!(channel.warnings.len(), 3, "{:?}", channel.warnings);
        assert!(channel.warnings[0].contains("`wheels/notes.txt` left out"));
        assert!(channel.warnings[1].contains("`(`, which is no regular expression"));
        assert!(channel.warnings[2].contains("`firmware/esp32.elf` left out"));
    }

    #[test]
    fn paths_that_no_topic_can_carry_are_refused() {
        for name in ["src/a+b.py", "src/a#.py", "src/.mpypi/x", "src/a\\b.py"] {
            let error = load(&[(name, "x")]).unwrap_err();
            assert!(matches!(error, ChannelError::Path { .. }), "{name}: {error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn a_folder_with_nothing_in_it_is_refused() {
        assert!(matches!(load(&[("src/.git/x", "")]), Err(ChannelError::Empty { .. })));
        let why = load(&[("wheels/notes.txt", "")]).unwrap_err().to_string();
        assert!(why.contains("`wheels/notes.txt` left out"), "{why}");
    }

    #[test]
    fn two_wheels_of_one_package_are_refused() {
        let other = PROJECT.replace("Blink-Led", "blink.led");
        let error = load(&[
            ("wheels/a/pyproject.toml", PROJECT),
            ("wheels/a/blink_led.py", ""),
            ("wheels/b/pyproject.toml", &other),
            ("wheels/b/blink_led.py", ""),
        ])
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "`wheels/a` and `wheels/b` are both wheel `blink_led` for `py3-none-any`"
        );
    }

    #[test]
    fn a_file_and_a_wheel_that_want_one_place_are_refused() {
        let error = load(&[
            ("src/lib/blink_led.py", "mine"),
            ("wheels/blink/pyproject.toml", PROJECT),
            ("wheels/blink/blink_led.py", "theirs"),
        ])
        .unwrap_err();
        assert!(matches!(error, ChannelError::Place(PlaceError::Twice { .. })), "{error}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn a_file_that_changes_before_it_is_sent_is_noticed() {
        let folder = folder(&[("src/main.py", "one")]);
        let now = SystemTime::UNIX_EPOCH;
        let name = ChannelName::new("dev").unwrap();
        let channel =
            Channel::load(folder.path(), Some(&name), &mut Cache::default(), now, &mut |_, _| ()).unwrap();
        assert_eq!(channel.packages[0].bytes().unwrap(), "one");
        fs::write(folder.path().join("src/main.py"), "two").unwrap();
        assert!(matches!(channel.packages[0].bytes(), Err(ChannelError::Changed { .. })));
    }

    #[test]
    fn a_digest_is_remembered_only_for_a_file_that_was_left_alone() {
        let folder = folder(&[("src/main.py", "one")]);
        let name = ChannelName::new("dev").unwrap();
        let written = fs::metadata(folder.path().join("src/main.py")).unwrap().modified().unwrap();
        let mut cache = Cache::default();
        Channel::load(folder.path(), Some(&name), &mut cache, written, &mut |_, _| ()).unwrap();
        assert!(cache.digests.is_empty());
        Channel::load(folder.path(), Some(&name), &mut cache, written + limits::SETTLED, &mut |_, _| ())
            .unwrap();
        assert_eq!(cache.digests.len(), 1);
    }

    #[test]
    fn a_file_that_takes_anothers_place_is_noticed_though_size_and_time_are_the_same() {
        let folder = folder(&[("src/main.py", "one"), ("other.py", "two")]);
        let (main, other) = (folder.path().join("src/main.py"), folder.path().join("other.py"));
        let written = fs::metadata(&main).unwrap().modified().unwrap();
        fs::File::options().append(true).open(&other).unwrap().set_modified(written).unwrap();
        let later = written + 10 * limits::SETTLED;
        let name = ChannelName::new("dev").unwrap();
        let mut cache = Cache::default();
        let mut id = || {
            let channel =
                Channel::load(folder.path(), Some(&name), &mut cache, later, &mut |_, _| ()).unwrap();
            *channel.packages[0].id.digest()
        };
        assert_eq!(id(), Digest::of(b"one"));
        // The file system's clock ticks slowly: what happens within a tick is too new to be trusted anyway.
        let changed = |path: &Path| {
            let metadata = fs::metadata(path).unwrap();
            (metadata.ctime(), metadata.ctime_nsec())
        };
        while changed(&other) == changed(&main) {
            fs::set_permissions(&other, fs::metadata(&other).unwrap().permissions()).unwrap();
        }
        fs::rename(other, &main).unwrap();
        assert_eq!(id(), Digest::of(b"two"));
    }
}
