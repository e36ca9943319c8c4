//! Users and rules, as they stand in files.
//!
//! `users.toml` is written by `mpypi-broker user …`: a role for each name, an argon2id hash of the password
//! (a PHC string), and the SHA-256 of each bearer token. `rules.toml` is written by people: which channels
//! which nodes may read. Both lie in the data folder and are read again when they change.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use mpypi_protocol::{ChannelName, Digest, NodeId};
use serde::{Deserialize, Serialize};

use super::{Channels, Identity, Role, devices::DEVICES};

/// The file of users, in the data folder.
pub const USERS: &str = "users.toml";
/// The file of rules, in the data folder.
pub const RULES: &str = "rules.toml";

/// Longest name of a user, in bytes.
pub const NAME: usize = mpypi_protocol::limits::NODE_NAME;

/// Everybody who may log in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Users {
    users: BTreeMap<String, User>,
    rules: Vec<Rule>,
    /// Nobody is let in, not everybody.
    closed: bool,
}

/// Someone who may log in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// What they may do.
    pub role: Role,
    /// An argon2id hash, as a PHC string.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// SHA-256 digests of bearer tokens, each good as a password.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<Digest>,
}

/// Which channels some nodes may read. The first rule that fits a node counts; without one it reads all.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// A node's name; a `*` at the end stands for any rest.
    nodes: String,
    channels: Vec<ChannelName>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UsersFile {
    #[serde(default)]
    users: BTreeMap<String, User>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RulesFile {
    #[serde(default)]
    rules: Vec<Rule>,
}

/// The files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// A file cannot be read or written.
    #[error("cannot use `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not what it should be; says where.
    #[error("`{}` is not in order: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and in which line.
        problem: String,
    },
    /// A name that nobody can have.
    #[error("`{}` is no user name: use 1 to {NAME} bytes without control characters", .0.escape_debug())]
    Name(String),
    /// A node's name is also its client id and part of its topics.
    #[error(transparent)]
    Node(#[from] mpypi_protocol::topic::NameError),
    /// There is no such user.
    #[error("there is no user `{0}`")]
    Unknown(String),
    /// There is no such device.
    #[error("there is no device `{0}`")]
    UnknownDevice(String),
    /// Two devices cannot have one token.
    #[error("devices `{one}` and `{other}` would have one token")]
    SharedToken {
        /// Who has it.
        one: NodeId,
        /// Who was to have it too.
        other: NodeId,
    },
    /// The password cannot be hashed.
    #[error("the password cannot be hashed: {0}")]
    Hash(String),
}

impl Users {
    /// Reads both files in `folder`; those that are not there say nothing.
    ///
    /// # Errors
    /// A file cannot be read, or is not in order.
    pub fn load(folder: &Path) -> Result<Users, UsersError> {
        let UsersFile { users } = read(&folder.join(USERS))?;
        let RulesFile { rules } = read(&folder.join(RULES))?;
        let path = folder.join(USERS);
        for (name, user) in &users {
            check_name(name, user.role)?;
            if let Some(Err(error)) = user.password.as_deref().map(PasswordHash::new) {
                let problem = format!("the password of `{}` is no PHC string: {error}", name.escape_debug());
                return Err(UsersError::Format { path, problem });
            }
        }
        Ok(Users { users, rules, closed: false })
    }

    /// Writes the file of users, beside and renamed, for its owner alone.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), UsersError> {
        let text = toml::to_string(&UsersFile { users: self.users.clone() })
            .map_err(|error| UsersError::Format { path: folder.join(USERS), problem: error.to_string() })?;
        let comment = "# Written by `mpypi-broker user`. A running broker reads changes at once.\n\n";
        write(folder, USERS, &format!("{comment}{text}"))
    }

    /// Lets nobody in.
    #[must_use]
    pub fn nobody() -> Users {
        Users { closed: true, ..Users::default() }
    }

    /// Whether there is nobody, so that nobody has to say who they are.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.users.is_empty() && !self.closed
    }

    /// All users, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &User)> {
        self.users.iter().map(|(name, user)| (name.as_str(), user))
    }

    /// The user of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&User> {
        self.users.get(name)
    }

    /// Whose the token with this digest is.
    #[must_use]
    pub fn owner(&self, token: &Digest) -> Option<&str> {
        self.users.iter().find(|(_, user)| user.tokens.contains(token)).map(|(name, _)| name.as_str())
    }

    /// Adds a user, or changes one.
    ///
    /// # Errors
    /// The name is none, or none that a node can have.
    pub fn put(&mut self, name: &str, user: User) -> Result<(), UsersError> {
        check_name(name, user.role)?;
        self.users.insert(name.to_owned(), user);
        Ok(())
    }

    /// Removes a user.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn remove(&mut self, name: &str) -> Result<(), UsersError> {
        self.users.remove(name).map(drop).ok_or_else(|| UsersError::Unknown(name.to_owned()))
    }

    /// Who the user of this name is.
    #[must_use]
    pub fn identity(&self, name: &str) -> Option<Identity> {
        Some(match self.users.get(name)?.role {
            Role::Admin => Identity::Admin,
            Role::Publisher => Identity::Publisher,
            Role::Viewer => Identity::Viewer,
            Role::Edge => Identity::Edge,
            Role::Node => self.node(NodeId::new(name).ok()?),
        })
    }

    /// Who the node of this name is, whether there is a user of its name or not.
    #[must_use]
    pub fn node(&self, name: NodeId) -> Identity {
        let channels = self.channels(name.as_str());
        Identity::Node(name, channels)
    }

    fn channels(&self, node: &str) -> Channels {
        let fits = |rule: &&Rule| match rule.nodes.strip_suffix('*') {
            Some(start) => node.starts_with(start),
            None => node == rule.nodes,
        };
        self.rules.iter().find(fits).map_or(Channels::All, |rule| Channels::Only(rule.channels.clone()))
    }
}

impl User {
    /// Whether `password` is this user's password or one of their tokens. Takes tens of milliseconds.
    #[must_use]
    pub fn accepts(&self, password: &[u8]) -> bool {
        // A token is long and random: its digest tells nothing, and comparing digests tells nothing either.
        if self.tokens.contains(&Digest::of(password)) {
            return true;
        }
        self.password.as_deref().is_some_and(|hash| verify(hash, password))
    }
}

/// The argon2id hash of `password`, with a random salt and the parameters that OWASP recommends.
///
/// # Errors
/// [`UsersError::Hash`]
pub fn hash(password: &[u8]) -> Result<String, UsersError> {
    let hash = Argon2::default().hash_password(password);
    Ok(hash.map_err(|error| UsersError::Hash(error.to_string()))?.to_string())
}

/// Does the work of checking a password for somebody who does not exist, so that the time tells nothing.
pub fn pretend(password: &[u8]) {
    /// A hash of nothing in particular, with the parameters of [`hash`].
    const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHRzb21lc2FsdA$\
                          AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    std::hint::black_box(verify(NOBODY, password));
}

fn verify(hash: &str, password: &[u8]) -> bool {
    PasswordHash::new(hash).is_ok_and(|hash| Argon2::default().verify_password(password, &hash).is_ok())
}

/// When the files changed last, and how large they are; something else if they changed again.
#[must_use]
pub fn stamp(folder: &Path) -> [Option<(SystemTime, u64)>; 3] {
    [USERS, RULES, DEVICES].map(|name| crate::listen::tls::stamp(&folder.join(name)))
}

fn check_name(name: &str, role: Role) -> Result<(), UsersError> {
    if name.is_empty() || name.len() > NAME || name.chars().any(char::is_control) {
        return Err(UsersError::Name(name.to_owned()));
    }
    if role == Role::Node {
        NodeId::new(name)?;
    }
    Ok(())
}

/// Writes a file in `folder`, beside and renamed, for its owner alone.
pub(super) fn write(folder: &Path, name: &str, text: &str) -> Result<(), UsersError> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = folder.join(name);
    let at = |source| UsersError::File { path: path.clone(), source };
    fs::create_dir_all(folder).map_err(at)?;
    let beside = folder.join(format!("{name}.new"));
    let write = || {
        let mut file =
            fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, &path)?;
        crate::index::blobs::sync_folder(folder)
    };
    write().map_err(at)
}

pub(super) fn read<T: Default + for<'de> Deserialize<'de>>(path: &Path) -> Result<T, UsersError> {
    match fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text).map_err(|error| UsersError::Format {
            path: path.to_owned(),
            problem: error.to_string().trim_end().to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        Err(source) => Err(UsersError::File { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(role: Role, password: &str) -> User {
        User { role, password: Some(hash(password.as_bytes()).unwrap()), tokens: Vec::new() }
    }

    #[test]
    fn users_are_kept_without_their_passwords_and_for_the_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mut users = Users::default();
        users.put("ci", user(Role::Publisher, "a long secret")).unwrap();
        users.save(folder.path()).unwrap();
        let text = fs::read_to_string(folder.path().join(USERS)).unwrap();
        assert!(text.contains("$argon2id$") && !text.contains("a long secret"), "{text}");
        let mode = fs::metadata(folder.path().join(USERS)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let read = Users::load(folder.path()).unwrap();
        assert_eq!(read, users);
        assert!(read.get("ci").unwrap().accepts(b"a long secret"));
        assert!(!read.get("ci").unwrap().accepts(b"a long secreT"));
    }

    #[test]
    fn a_token_is_as_good_as_a_password() {
        let user = User { role: Role::Node, password: None, tokens: vec![Digest::of(b"token")] };
        assert!(user.accepts(b"token"));
        assert!(!user.accepts(b""));
    }

    #[test]
    fn the_first_rule_that_fits_a_node_counts() {
        let folder = tempfile::tempdir().unwrap();
        let rules = "[[rules]]\nnodes = \"kitchen-*\"\nchannels = [\"stable\"]\n\
                     [[rules]]\nnodes = \"*\"\nchannels = [\"dev\", \"stable\"]\n";
        fs::write(folder.path().join(RULES), rules).unwrap();
        let mut users = Users::load(folder.path()).unwrap();
        for name in ["kitchen-1", "cellar"] {
            users.put(name, User { role: Role::Node, password: None, tokens: vec![] }).unwrap();
        }
        let reads = |name: &str, channel: &str| {
            users.identity(name).unwrap().may_subscribe(&format!("mpypi/channels/{channel}"))
        };
        assert!(reads("kitchen-1", "stable") && !reads("kitchen-1", "dev"));
        assert!(reads("cellar", "dev"));
    }

    #[test]
    fn a_file_that_is_not_in_order_is_refused_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        for text in [
            "[users.a]\nrole = \"king\"\n",
            "[users.a]\nrole = \"node\"\npassword = \"plain\"\n",
            "[users.\"a/b\"]\nrole = \"node\"\n",
            "x",
        ] {
            fs::write(folder.path().join(USERS), text).unwrap();
            assert!(Users::load(folder.path()).is_err(), "{text}");
        }
    }
}
