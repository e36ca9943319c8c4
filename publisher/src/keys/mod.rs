//! The key folder: who can sign, and the chain of roots.
//!
//! | file | what |
//! |---|---|
//! | `<id>.pub` | the public key, in PEM |
//! | `<id>.pem` | the private key, encrypted; only where this key is used |
//! | `<id>.toml` | `sign-command = "…"`, for a key that something else holds: what to sign comes on its standard input, the signature, as it is or in base64, is expected on its standard output |
//! | `root/<n>.json` | root n; the last one may still lack signatures |

pub mod secret;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, IsTerminal, Write as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use mpypi_protocol::{
    KeyId, PublicKey, Root,
    key::Algorithm,
    list::Signature,
    root::{Draft, RootError, SignedRoot},
    signed,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

use self::secret::{Pair, Secret, SecretError};
use crate::limits;

/// Where a passphrase may be said in CI.
pub const PASSPHRASE: &str = "MPYPI_KEY_PASSPHRASE";

/// A key folder.
#[derive(Debug, Clone)]
pub struct Keys {
    folder: PathBuf,
    /// A file that holds the passphrase.
    passphrase: Option<PathBuf>,
    /// What was asked for once is not asked for again: a rollout signs for days. Held to look up or put in one.
    asked: Arc<Mutex<BTreeMap<KeyId, String>>>,
    /// What was unlocked stays so: it takes a tenth of a second, on purpose. Held likewise.
    unlocked: Arc<Mutex<BTreeMap<KeyId, Arc<Secret>>>>,
}

/// A key of the folder.
#[derive(Debug, Clone)]
pub struct KeyFile {
    /// Its name.
    pub id: KeyId,
    /// Its public half.
    pub public: PublicKey,
    /// Who has its private half.
    pub custody: Custody,
}

/// Who has the private half of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Custody {
    /// This folder, encrypted.
    File(PathBuf),
    /// A command.
    Command(String),
    /// Somebody else.
    Elsewhere,
}

/// Why a key or a root cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// A file cannot be read or written.
    #[error("cannot {doing} `{}`", path.display())]
    File {
        /// `read` or `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no such key.
    #[error("there is no key `{id}` in `{}`", folder.display())]
    NoKey {
        /// Its name.
        id: KeyId,
        /// The folder.
        folder: PathBuf,
    },
    /// There is one already.
    #[error("there is a key `{id}` already in `{}`", folder.display())]
    Exists {
        /// Its name.
        id: KeyId,
        /// The folder.
        folder: PathBuf,
    },
    /// A key's file is not in order.
    #[error("key file `{}`", path.display())]
    Secret {
        /// The file.
        path: PathBuf,
        /// Why.
        source: SecretError,
    },
    /// A `<id>.toml` is not in order.
    #[error("key file `{}`: {problem}", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// The private half of a key is not here.
    #[error("the private half of key `{0}` is not here")]
    NotHere(KeyId),
    /// Nobody can be asked for the passphrase.
    #[error("key `{0}` needs its passphrase, and there is no terminal to ask for it")]
    NoTerminal(KeyId),
    /// Two passphrases that should be one.
    #[error("the passphrases differ, or are empty")]
    Differ,
    /// A sign command failed.
    #[error("the sign command of key `{id}` {problem}")]
    Command {
        /// The key.
        id: KeyId,
        /// What happened.
        problem: String,
    },
    /// What was signed is not what the public key checks.
    #[error("what signed for key `{0}` has another private key than its public key")]
    WrongKey(KeyId),
    /// A root is not in order.
    #[error("root `{}`", path.display())]
    Root {
        /// The file.
        path: PathBuf,
        /// Why.
        source: RootError,
    },
    /// What is asked of a root makes no sense.
    #[error("{0}")]
    Office(String),
}

impl KeysError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            KeysError::NoKey { id, .. } => {
                format!("make it with `mpypi keys new {id}`, or name the folder with `--keys DIR`")
            }
            KeysError::Secret { source: SecretError::Bare, path } => format!(
                "encrypt it: `openssl pkcs8 -topk8 -scrypt -in {} -out FILE`",
                path.display()
            ),
            KeysError::Secret { source: SecretError::Kind, .. } => {
                "devices check RSA keys of exactly 3072 bits: `mpypi keys new` makes one".to_owned()
            }
            KeysError::NotHere(id) => format!(
                "sign where `{id}.pem` is, or give it a `{id}.toml` with `sign-command = \"…\"`"
            ),
            KeysError::NoTerminal(_) | KeysError::Secret { source: SecretError::Passphrase, .. } => {
                format!("say it in {PASSPHRASE}, or name a file that holds it with `--passphrase-file`")
            }
            KeysError::Command { .. } => {
                "it reads what to sign on standard input and writes the signature, as in `openssl dgst -sha256 -sign \
                 key.pem`"
                    .to_owned()
            }
            _ => return None,
        })
    }
}

impl Keys {
    /// The key folder; a passphrase is read from a file, if one is named.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>, passphrase: Option<PathBuf>) -> Keys {
        Keys { folder: folder.into(), passphrase, asked: Arc::default(), unlocked: Arc::default() }
    }

    /// Where it is.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn path(&self, id: &KeyId, end: &str) -> PathBuf {
        self.folder.join(format!("{id}.{end}"))
    }

    /// A key of the folder.
    ///
    /// # Errors
    /// See [`KeysError`].
    pub fn key(&self, id: &KeyId) -> Result<KeyFile, KeysError> {
        let path = self.path(id, "pub");
        let pem = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(KeysError::NoKey { id: id.clone(), folder: self.folder.clone() });
            }
            read => read.map_err(|source| KeysError::File { doing: "read", path: path.clone(), source })?,
        };
        let public = secret::public(&pem).map_err(|source| KeysError::Secret { path, source })?;
        let settings = self.path(id, "toml");
        let custody = match fs::read_to_string(&settings) {
            Ok(text) => Custody::Command(
                sign_command(&text).map_err(|problem| KeysError::Settings { path: settings, problem })?,
            ),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(KeysError::File { doing: "read", path: settings, source: error });
            }
            Err(_) if self.path(id, "pem").is_file() => Custody::File(self.path(id, "pem")),
            Err(_) => Custody::Elsewhere,
        };
        Ok(KeyFile { id: id.clone(), public, custody })
    }

    /// All keys of the folder, by name.
    ///
    /// # Errors
    /// See [`KeysError`].
    pub fn all(&self) -> Result<Vec<KeyFile>, KeysError> {
        let failed = |source| KeysError::File { doing: "read", path: self.folder.clone(), source };
        let mut ids = Vec::new();
        match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(files) => {
                for file in files {
                    let name = file.map_err(failed)?.file_name();
                    let id = name.to_str().and_then(|name| name.strip_suffix(".pub"));
                    ids.extend(id.and_then(|id| KeyId::new(id).ok()));
                }
            }
        }
        ids.sort();
        ids.iter().map(|id| self.key(id)).collect()
    }

    /// Makes a key.
    ///
    /// # Errors
    /// See [`KeysError`].
    pub fn make(&self, id: &KeyId, alg: Algorithm) -> Result<PublicKey, KeysError> {
        self.is_free(id)?;
        let passphrase = self.passphrase(id, Asked::Twice)?;
        let path = self.path(id, "pem");
        let made = secret::generate(alg, &passphrase);
        let Pair { private, public_pem, public } =
            made.map_err(|source| KeysError::Secret { path: path.clone(), source })?;
        // The public half last: with it, there is such a key.
        self.write(&path, private.as_bytes(), Reader::Owner)?;
        self.write(&self.path(id, "pub"), public_pem.as_bytes(), Reader::All)?;
        Ok(public)
    }

    /// Takes in the public half of a key that a command signs with, or that somebody else has.
    ///
    /// # Errors
    /// See [`KeysError`].
    pub fn adopt(&self, id: &KeyId, pem: &Path, command: Option<&str>) -> Result<PublicKey, KeysError> {
        self.is_free(id)?;
        let read = fs::read_to_string(pem);
        let text = read.map_err(|source| KeysError::File { doing: "read", path: pem.to_owned(), source })?;
        let public =
            secret::public(&text).map_err(|source| KeysError::Secret { path: pem.to_owned(), source })?;
        if let Some(command) = command {
            let text = format!("sign-command = {}\n", toml::Value::String(command.to_owned()));
            self.write(&self.path(id, "toml"), text.as_bytes(), Reader::All)?;
        }
        self.write(&self.path(id, "pub"), text.as_bytes(), Reader::All)?;
        Ok(public)
    }

    fn is_free(&self, id: &KeyId) -> Result<(), KeysError> {
        match ["pub", "pem", "toml"].iter().any(|end| self.path(id, end).exists()) {
            true => Err(KeysError::Exists { id: id.clone(), folder: self.folder.clone() }),
            false => Ok(()),
        }
    }

    fn write(&self, path: &Path, bytes: &[u8], reader: Reader) -> Result<(), KeysError> {
        write(path, bytes, reader).map_err(|source| KeysError::File {
            doing: "write",
            path: path.to_owned(),
            source,
        })
    }

    /// Signs with a key, and checks what came of it.
    ///
    /// # Errors
    /// See [`KeysError`].
    pub async fn sign(&self, key: &KeyFile, message: &[u8]) -> Result<Signature, KeysError> {
        let bytes = match &key.custody {
            Custody::Elsewhere => return Err(KeysError::NotHere(key.id.clone())),
            Custody::File(path) => {
                let signed = self.unlock(key, path)?.sign(message);
                signed.map_err(|source| KeysError::Secret { path: path.clone(), source })?
            }
            Custody::Command(command) => {
                let failed = |problem| KeysError::Command { id: key.id.clone(), problem };
                let said = timeout(limits::SIGN, run(command, message)).await;
                let said = said
                    .unwrap_or_else(|_| Err(format!("did not answer within {} s", limits::SIGN.as_secs())));
                from_command(said.map_err(failed)?, &key.public)
            }
        };
        let alg = key.public.algorithm().ok_or_else(|| KeysError::WrongKey(key.id.clone()))?;
        match key.public.verifies_bytes(message, &bytes) {
            true => Ok(signed::signature(&key.id, alg, &bytes)),
            false => Err(KeysError::WrongKey(key.id.clone())),
        }
    }

    fn unlock(&self, key: &KeyFile, path: &Path) -> Result<Arc<Secret>, KeysError> {
        let unlocked = || self.unlocked.lock().unwrap_or_else(PoisonError::into_inner);
        // Another key of this name may have come in the meantime.
        let known = unlocked().get(&key.id).filter(|secret| *secret.public() == key.public).cloned();
        if let Some(secret) = known {
            return Ok(secret);
        }
        let passphrase = self.passphrase(&key.id, Asked::Once)?;
        let failed = |source| KeysError::File { doing: "read", path: path.to_owned(), source };
        let pem = fs::read_to_string(path).map_err(failed)?;
        let secret = Secret::unlock(&pem, &passphrase);
        let secret = Arc::new(secret.map_err(|source| KeysError::Secret { path: path.to_owned(), source })?);
        unlocked().insert(key.id.clone(), secret.clone());
        Ok(secret)
    }

    fn passphrase(&self, id: &KeyId, asked: Asked) -> Result<String, KeysError> {
        if let Some(path) = &self.passphrase {
            let read = fs::read_to_string(path);
            let text =
                read.map_err(|source| KeysError::File { doing: "read", path: path.clone(), source })?;
            return Ok(text.lines().next().unwrap_or_default().to_owned());
        }
        if let Ok(passphrase) = std::env::var(PASSPHRASE) {
            return Ok(passphrase);
        }
        let mut known = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(passphrase) = known.get(id) {
            return Ok(passphrase.clone());
        }
        if !io::stdin().is_terminal() {
            return Err(KeysError::NoTerminal(id.clone()));
        }
        let ask =
            |text: String| rpassword::prompt_password(text).map_err(|_| KeysError::NoTerminal(id.clone()));
        let first = ask(format!("passphrase of key `{id}`: "))?;
        if asked == Asked::Twice && (first.is_empty() || ask("once more: ".to_owned())? != first) {
            return Err(KeysError::Differ);
        }
        known.insert(id.clone(), first.clone());
        Ok(first)
    }

    /// The file of root `version`.
    #[must_use]
    pub fn root_path(&self, version: u64) -> PathBuf {
        self.folder.join("root").join(format!("{version}.json"))
    }

    fn read_root(&self, version: u64) -> Result<Option<SignedRoot>, KeysError> {
        let path = self.root_path(version);
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(KeysError::File { doing: "read", path, source }),
            Ok(bytes) => {
                let root = SignedRoot::parse(&bytes).map_err(|source| KeysError::Root { path, source })?;
                Ok(Some(root))
            }
        }
    }

    /// The chain of roots, and the one after it that still lacks signatures, if there is one.
    ///
    /// # Errors
    /// See [`KeysError`].
    pub fn roots(&self) -> Result<(Vec<Root>, Option<SignedRoot>), KeysError> {
        let mut chain: Vec<Root> = Vec::new();
        loop {
            let version = chain.len() as u64 + 1;
            let Some(root) = self.read_root(version)? else { return Ok((chain, None)) };
            let whole = match chain.last() {
                None => Root::pin(root.clone()),
                Some(last) => last.next(version, root.clone()),
            };
            match whole {
                Ok(root) => chain.push(root),
                Err(RootError::Threshold { .. }) => return Ok((chain, Some(root))),
                Err(source) => return Err(KeysError::Root { path: self.root_path(version), source }),
            }
        }
    }

    /// Writes a root, with the signatures that it has.
    ///
    /// # Errors
    /// Of the file system.
    pub fn write_root(&self, root: &SignedRoot) -> Result<PathBuf, KeysError> {
        let path = self.root_path(root.draft().version);
        self.write(&path, root.payload(), Reader::All)?;
        Ok(path)
    }

    /// Changes what the next root will say; signatures that it had are gone.
    ///
    /// # Errors
    /// There is no root to begin with, or the change makes no root.
    pub fn edit(
        &self,
        now: jiff::Timestamp,
        change: impl FnOnce(&mut Draft) -> Result<(), KeysError>,
    ) -> Result<SignedRoot, KeysError> {
        let (chain, unfinished) = self.roots()?;
        let mut draft = match (unfinished, chain.last()) {
            (Some(root), _) => root.draft().clone(),
            (None, Some(last)) => Draft { version: last.version() + 1, ..last.draft().clone() },
            (None, None) => {
                return Err(KeysError::Office(format!(
                    "there is no root in `{}`: begin with `mpypi keys root new`",
                    self.folder.display()
                )));
            }
        };
        draft.created = now;
        change(&mut draft)?;
        // What nobody may sign with any more need not be known.
        let named: Vec<KeyId> =
            draft.delegations.values().flat_map(|delegation| delegation.keys.clone()).collect();
        draft.keys.retain(|id, _| named.contains(id) || draft.root_keys.contains(id));
        let version = draft.version;
        let root = draft.signed(&[]);
        let root = root.map_err(|source| KeysError::Root { path: self.root_path(version), source })?;
        self.write_root(&root)?;
        Ok(root)
    }
}

/// How often a passphrase is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Once,
    Twice,
}

/// Who may read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    Owner,
    All,
}

/// Written beside, then renamed: a key is whole or not there.
fn write(path: &Path, bytes: &[u8], reader: Reader) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = if reader == Reader::Owner { 0o600 } else { 0o644 };
        file.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
    }
    #[cfg(not(unix))]
    let _ = reader;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn sign_command(text: &str) -> Result<String, String> {
    let table: BTreeMap<String, toml::Value> =
        toml::from_str(text).map_err(|error| error.message().to_owned())?;
    if let Some(key) = table.keys().find(|key| *key != "sign-command") {
        return Err(format!("unknown key `{key}`: there is `sign-command`"));
    }
    match table.get("sign-command").and_then(toml::Value::as_str) {
        Some(command) if !command.trim().is_empty() => Ok(command.to_owned()),
        _ => Err("`sign-command` should be a command line".to_owned()),
    }
}

/// Gives `message` to a command; what it answers.
async fn run(command: &str, message: &[u8]) -> Result<Vec<u8>, String> {
    let shell = if cfg!(windows) { ("cmd", "/C") } else { ("sh", "-c") };
    let mut child = Command::new(shell.0)
        .args([shell.1, command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("does not start: {error}"))?;
    let (mut stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let give = async {
        if let Some(stdin) = &mut stdin {
            // One that does not read all of it says so by how it ends.
            let _ = stdin.write_all(message).await;
        }
        drop(stdin);
    };
    let mut answer = Vec::new();
    let take = async {
        match stdout {
            Some(stdout) => stdout.take(limits::SIGNATURE).read_to_end(&mut answer).await,
            None => Ok(0),
        }
    };
    let ((), taken) = tokio::join!(give, take);
    taken.map_err(|error| format!("cannot be read: {error}"))?;
    let status = child.wait().await.map_err(|error| format!("cannot be waited for: {error}"))?;
    match status.success() {
        true => Ok(answer),
        false => Err(format!("failed: {status}")),
    }
}

/// The signature that a command answered with: its bytes, or base64 of them.
fn from_command(said: Vec<u8>, public: &PublicKey) -> Vec<u8> {
    if public.algorithm().is_some_and(|alg| said.len() == alg.signature_size()) {
        return said;
    }
    let text: Vec<u8> = said.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    STANDARD.decode(text).unwrap_or(said)
}
