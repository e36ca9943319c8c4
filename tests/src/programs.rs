//! Our programs, as their users run them.

use std::{
    collections::BTreeMap,
    env, fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread::{self, JoinHandle},
};

use tempfile::TempDir;

/// A scratch folder, gone with the test.
#[derive(Debug)]
pub struct World {
    folder: TempDir,
}

/// What a program that has ended left.
#[derive(Debug)]
pub struct Output {
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl World {
    /// An empty world.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "a test makes one on purpose")]
    pub fn new() -> World {
        World { folder: TempDir::with_prefix("mpypi-test-").unwrap() }
    }

    /// A path in this world.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file, and the folders above it.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// The same path as text, for a command line.
    #[must_use]
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Every file below `name`, as relative paths with their content, without the agent's own folder.
    #[must_use]
    pub fn files(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        files_below(&self.path(name))
    }
}

/// Every file below `root`, as relative paths with their content, without the agent's own folder.
#[must_use]
pub fn files_below(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(items) = fs::read_dir(&folder) else { continue };
        for item in items {
            let path = item.unwrap().path();
            let relative = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            match path.is_dir() {
                true if relative == ".mpypi" => {}
                true => folders.push(path),
                false => {
                    files.insert(relative, fs::read(&path).unwrap());
                }
            }
        }
    }
    files
}

impl Output {
    /// The output, if the program ended with `code`.
    #[track_caller]
    #[allow(clippy::must_use_candidate, clippy::return_self_not_must_use, reason = "it checks by itself")]
    pub fn expect_code(self, code: i32) -> Output {
        assert_eq!(self.code, Some(code), "\nstdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

/// Where the program `name` of this workspace is: beside the tests, where cargo put both.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let tests = env::current_exe().unwrap();
    let path = tests.ancestors().nth(2).unwrap().join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --workspace` first", path.display());
    path
}

/// Where a foreign program is: installed, or unpacked by `tests/peers.sh`.
#[must_use]
pub fn peer(name: &str) -> PathBuf {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers");
    let installed = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&installed)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into(), "/opt/homebrew/sbin".into(), unpacked])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("`{name}` is not installed: run `bash tests/peers.sh` first"))
}

/// Kills a program from beside the test that starts it, once that has said its process id here.
pub fn kill_once_known(pid: &AtomicU32) {
    let pid = loop {
        match pid.load(Ordering::SeqCst) {
            0 => thread::yield_now(),
            pid => break pid,
        }
    };
    Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
}

/// Runs one of our programs, or a foreign one as [`peer`] finds it, to its end.
pub fn run(name: &str, arguments: &[&str]) -> Output {
    Running::start(name, arguments).wait()
}

/// Runs one of our programs to its end, with more variables in its environment.
pub fn run_with(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    Running::start_with(name, arguments, variables).wait()
}

/// Runs MicroPython's Unix port to its end.
#[must_use]
pub fn micropython(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    run_with("micropython", arguments, variables)
}

/// A program that runs beside the test, and ends with it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    output: Option<[JoinHandle<Vec<u8>>; 2]>,
}

impl Running {
    /// Starts a program.
    #[must_use]
    pub fn start(name: &str, arguments: &[&str]) -> Running {
        Running::start_with(name, arguments, &[])
    }

    /// Starts a program with more variables in its environment.
    #[must_use]
    pub fn start_with(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Running {
        let path = if name.starts_with("mpypi") { program(name) } else { peer(name) };
        let mut child = Command::new(path)
            .args(arguments)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                from.read_to_end(&mut bytes).unwrap();
                bytes
            })
        }
        let output = [collect(child.stdout.take().unwrap()), collect(child.stderr.take().unwrap())];
        Running { child, output: Some(output) }
    }

    /// The id of its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal, as `-TERM`.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for its end.
    #[must_use]
    pub fn wait(mut self) -> Output {
        let code = self.child.wait().unwrap().code();
        let [stdout, stderr] = self
            .output
            .take()
            .unwrap()
            .map(|part| String::from_utf8_lossy(&part.join().unwrap()).into_owned());
        Output { code, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Bytes that are those of no other seed, and do not compress.
#[must_use]
pub fn bytes(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}
