//! Devices that log in with an access token alone, as ThingsBoard's do: token → node → channel.
//!
//! `devices.toml` lies beside `users.toml`, is written by `mpypi-broker device …` and read again when it changes. It
//! holds the SHA-256 of each token, under which a device is found at once: a token is long and random, so its digest
//! gives nothing away and needs no slow hash. What is not long and random is refused when it is chosen.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

use mpypi_protocol::{ChannelName, Digest, NodeId, digest::Hasher};
use serde::{Deserialize, Serialize};

use super::{
    Channels, Identity,
    users::{UsersError, read, write},
};
use crate::faces::thingsboard::checksum::Algorithm;

/// The file of devices, in the data folder.
pub const DEVICES: &str = "devices.toml";

/// Shortest token, in bytes. ThingsBoard's own have 20.
pub const SHORTEST: usize = 16;
/// Longest token, in bytes.
pub const LONGEST: usize = 128;
/// Hexadecimal digits in the name of a repository's owner that nobody is to guess. GitHub's have at most 39 characters.
const OWNER: usize = 32;
/// Fewest different characters in a token: what repeats itself is no secret.
pub const FEWEST: usize = 8;

/// Every device that has a token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    /// What the names of repositories are made of.
    secret: Option<Digest>,
    devices: BTreeMap<NodeId, Device>,
    by_token: HashMap<Digest, NodeId>,
}

/// What is known of a device beforehand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// The channel that it gets its firmware or files from.
    pub channel: ChannelName,
    /// Another channel, for what ThingsBoard calls software.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub software: Option<ChannelName>,
    /// Its hardware: which of several images it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The checksum that it can check.
    #[serde(default)]
    pub checksum: Algorithm,
    /// The SHA-256 of its token.
    pub token: Digest,
}

/// A token that may be one: long, varied, and of characters that need no quoting in a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token(String);

/// Why a text is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Too short or too long.
    #[error("a token of {found} bytes should have {SHORTEST} to {LONGEST}")]
    Length {
        /// How many bytes it has.
        found: usize,
    },
    /// It could be guessed.
    #[error("a token should have at least {FEWEST} different characters")]
    Repeats,
    /// A character that belongs into no URL.
    #[error("a token has letters, digits, `-`, `.`, `_` and `~`, not {0:?}")]
    Character(char),
}

impl Token {
    /// Random bytes in a new token.
    const RANDOM: usize = 16;

    /// Checks a token that somebody chose.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn chosen(text: &str) -> Result<Token, TokenError> {
        if !(SHORTEST..=LONGEST).contains(&text.len()) {
            return Err(TokenError::Length { found: text.len() });
        }
        let is_plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~');
        if let Some(character) = text.chars().find(|c| !is_plain(c)) {
            return Err(TokenError::Character(character));
        }
        let different: BTreeSet<_> = text.bytes().collect();
        match different.len() < FEWEST {
            true => Err(TokenError::Repeats),
            false => Ok(Token(text.to_owned())),
        }
    }

    /// A new one.
    ///
    /// # Errors
    /// The system gives no random bytes.
    pub fn random() -> Result<Token, getrandom::Error> {
        let mut bytes = [0; Token::RANDOM];
        getrandom::fill(&mut bytes)?;
        Ok(Token(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The token itself. It is shown once.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// What is kept of it.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(self.0.as_bytes())
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DevicesFile {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<Digest>,
    #[serde(default)]
    devices: BTreeMap<NodeId, Device>,
}

impl Devices {
    /// Reads the file in `folder`; one that is not there says nothing.
    ///
    /// # Errors
    /// The file cannot be read, or is not in order.
    pub fn load(folder: &Path) -> Result<Devices, UsersError> {
        let path = folder.join(DEVICES);
        let DevicesFile { secret, devices } = read(&path)?;
        let mut all = Devices { secret, ..Devices::default() };
        for (node, device) in devices {
            all.put(node, device).map_err(|error| match error {
                UsersError::SharedToken { .. } => {
                    UsersError::Format { path: path.clone(), problem: error.to_string() }
                }
                other => other,
            })?;
        }
        Ok(all)
    }

    /// Writes the file, beside and renamed, for its owner alone.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), UsersError> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|error| UsersError::Hash(error.to_string()))?;
        let secret = Some(self.secret.unwrap_or(Digest::from(secret)));
        let text = toml::to_string(&DevicesFile { secret, devices: self.devices.clone() })
            .map_err(|error| UsersError::Format { path: folder.join(DEVICES), problem: error.to_string() })?;
        let comment = "# Written by `mpypi-broker device`. A running broker reads changes at once.\n\n";
        write(folder, DEVICES, &format!("{comment}{text}"))
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// All devices, by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&NodeId, &Device)> {
        self.devices.iter()
    }

    /// The device of this name.
    #[must_use]
    pub fn get(&self, node: &NodeId) -> Option<&Device> {
        self.devices.get(node)
    }

    /// Whose token this is.
    #[must_use]
    pub fn find(&self, token: &[u8]) -> Option<(&NodeId, &Device)> {
        let node = self.by_token.get(&Digest::of(token))?;
        self.devices.get_key_value(node)
    }

    /// Who owns the repository that `channel` is: a name that nobody guesses, and the same again after a restart.
    #[must_use]
    pub fn owner(&self, channel: &ChannelName) -> String {
        let mut hasher = Hasher::default();
        hasher.update(self.secret.as_ref().unwrap_or(&Digest::EMPTY).as_bytes());
        hasher.update(channel.as_str().as_bytes());
        format!("mpypi-{}", &hasher.finish().to_string()[..OWNER])
    }

    /// Adds a device, or changes one.
    ///
    /// # Errors
    /// Another device has this token.
    pub fn put(&mut self, node: NodeId, device: Device) -> Result<(), UsersError> {
        if let Some(other) = self.by_token.get(&device.token).filter(|other| **other != node) {
            return Err(UsersError::SharedToken { one: other.clone(), other: node });
        }
        if let Some(old) = self.devices.get(&node) {
            self.by_token.remove(&old.token);
        }
        self.by_token.insert(device.token, node.clone());
        self.devices.insert(node, device);
        Ok(())
    }

    /// Removes a device.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn remove(&mut self, node: &NodeId) -> Result<Device, UsersError> {
        let device = self.devices.remove(node).ok_or_else(|| UsersError::UnknownDevice(node.to_string()))?;
        self.by_token.remove(&device.token);
        Ok(device)
    }
}

impl Device {
    /// Who a device is that came in with its token: a node that reads its own channels.
    #[must_use]
    pub fn identity(&self, node: &NodeId) -> Identity {
        let channels = std::iter::once(&self.channel).chain(&self.software).cloned().collect();
        Identity::Node(node.clone(), Channels::Only(channels))
    }
}

/// Devices to provide for, one a line: `node,channel[,token[,target]]`. What is empty is left out; a line that starts
/// with `#`, and one with these words for a head, says nothing.
///
/// # Errors
/// Says which line is wrong, and how.
pub fn parse_list(text: &str) -> Result<Vec<Listed>, String> {
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') || (number == 0 && line.starts_with("node,")) {
            continue;
        }
        let wrong = |problem: String| format!("line {}: {problem}", number + 1);
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let ([node, channel] | [node, channel, _] | [node, channel, _, _]) = fields[..] else {
            return Err(wrong("a device is `node,channel[,token[,target]]`".to_owned()));
        };
        let field = |at: usize| fields.get(at).copied().filter(|field| !field.is_empty());
        let target = field(3).map(target).transpose().map_err(wrong)?;
        all.push(Listed {
            node: NodeId::new(node).map_err(|error| wrong(error.to_string()))?,
            channel: ChannelName::new(channel).map_err(|error| wrong(error.to_string()))?,
            token: field(2).map(Token::chosen).transpose().map_err(|error| wrong(error.to_string()))?,
            target,
        });
    }
    Ok(all)
}

/// One line of such a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The device's name.
    pub node: NodeId,
    /// Its channel.
    pub channel: ChannelName,
    /// A token that it has already.
    pub token: Option<Token>,
    /// Its hardware.
    pub target: Option<String>,
}

/// The hardware that a device is.
///
/// # Errors
/// Says what is wrong with the text.
pub fn target(text: &str) -> Result<String, String> {
    let most = mpypi_protocol::limits::TEXT;
    match text.is_empty() || text.len() > most || text.chars().any(char::is_control) {
        true => Err(format!("a target is 1 to {most} bytes without control characters")),
        false => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn device(channel: &str, token: &str) -> Device {
        Device {
            channel: ChannelName::new(channel).unwrap(),
            software: None,
            target: None,
            checksum: Algorithm::Sha256,
            token: Digest::of(token.as_bytes()),
        }
    }

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    #[test]
    fn a_device_is_found_by_its_token_which_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let mut devices = Devices::default();
        let token = Token::random().unwrap();
        devices.put(node("kitchen"), device("dev", token.text())).unwrap();
        devices.save(folder.path()).unwrap();
        let text = fs::read_to_string(folder.path().join(DEVICES)).unwrap();
        assert!(!text.contains(token.text()), "{text}");
        let read = Devices::load(folder.path()).unwrap();
        assert_eq!(read.devices, devices.devices);
        read.save(folder.path()).unwrap();
        let channel = ChannelName::new("dev").unwrap();
        assert_eq!(Devices::load(folder.path()).unwrap().owner(&channel), read.owner(&channel));
        let (name, found) = read.find(token.text().as_bytes()).unwrap();
        assert_eq!((name.as_str(), found.channel.as_str()), ("kitchen", "dev"));
        assert!(read.find(b"another token").is_none());
    }

    #[test]
    fn an_old_token_is_worth_nothing_and_no_two_devices_share_one() {
        let mut devices = Devices::default();
        devices.put(node("kitchen"), device("dev", "one")).unwrap();
        devices.put(node("kitchen"), device("dev", "two")).unwrap();
        assert!(devices.find(b"one").is_none() && devices.find(b"two").is_some());
        assert!(devices.put(node("cellar"), device("dev", "two")).is_err());
        devices.remove(&node("kitchen")).unwrap();
        assert!(devices.find(b"two").is_none() && devices.remove(&node("kitchen")).is_err());
    }

    #[test]
    fn what_could_be_guessed_is_no_token() {
        assert!(Token::chosen("aT3kJw0bq8Zr1MxCv5Ln").is_ok());
        assert_eq!(Token::chosen("A1_TEST_TOKEN"), Err(TokenError::Length { found: 13 }));
        assert_eq!(Token::chosen(&"ab".repeat(10)), Err(TokenError::Repeats));
        assert_eq!(Token::chosen("aT3kJw0bq8Zr1M/Cv5Ln"), Err(TokenError::Character('/')));
        assert_ne!(Token::random().unwrap(), Token::random().unwrap());
    }

    #[test]
    fn a_list_says_what_is_wrong_in_which_line() {
        let all = parse_list(
            "node,channel,token\nkitchen,dev\n\n# more\ncellar, stable ,aT3kJw0bq8Zr1MxCv5Ln,esp32\n",
        );
        let all = all.unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].node.as_str(), all[0].token.as_ref()), ("kitchen", None));
        assert_eq!((all[1].channel.as_str(), all[1].target.as_deref()), ("stable", Some("esp32")));
        for (text, word) in [
            ("kitchen\n", "line 1: a device is"),
            ("node,channel\na,dev\nb,no such\n", "line 3:"),
            ("a,dev,short\n", "line 1: a token of 5 bytes"),
        ] {
            let problem = parse_list(text).unwrap_err();
            assert!(problem.contains(word), "{problem}");
        }
    }

    #[test]
    fn a_file_with_one_token_twice_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let token = Digest::of(b"x");
        let one = |name: &str| format!("[devices.{name}]\nchannel = \"dev\"\ntoken = \"{token}\"\n");
        fs::write(folder.path().join(DEVICES), one("a") + &one("b")).unwrap();
        let problem = Devices::load(folder.path()).unwrap_err().to_string();
        assert!(problem.contains("`a` and `b`"), "{problem}");
    }
}
