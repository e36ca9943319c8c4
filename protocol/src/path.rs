//! File names that stay inside a device's root.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::limits;

/// A relative, `/`-separated file path with nothing in it that could lead out of the root it is joined to.
///
/// No leading or trailing `/`, no empty, `.` or `..` component, no component that ends in a dot or space, no
/// backslash, colon or control character, and never below [`FilePath::RESERVED`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FilePath(String);

/// Why a text is not a [`FilePath`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// No text at all.
    #[error("a path must not be empty")]
    Empty,
    /// Longer than [`limits::PATH`].
    #[error("a path of {length} bytes is longer than {}", limits::PATH)]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// More components than [`limits::PATH_COMPONENTS`].
    #[error("a path of {components} components has more than {}", limits::PATH_COMPONENTS)]
    TooDeep {
        /// How many it has.
        components: usize,
    },
    /// Starts or ends with `/`, or has an empty, `.` or `..` component.
    #[error("path `{path}` would leave the device's root: component `{component}` is not a name")]
    Escapes {
        /// The path as given.
        path: String,
        /// The component that is refused.
        component: String,
    },
    /// A component that another name could stand for: FAT drops dots and spaces at the end of a name.
    #[error("path `{path}`: component `{component}` ends in a dot or space, which not every device keeps")]
    Trailing {
        /// The path as given.
        path: String,
        /// The component that is refused.
        component: String,
    },
    /// A character that some file system cannot carry, or takes for the end of a drive's name.
    #[error("path `{}` has the character {character:?}, which not every device can store", path.escape_debug())]
    Character {
        /// The path as given.
        path: String,
        /// The character that is refused.
        character: char,
    },
    /// Below the agent's own folder.
    #[error("path `{path}` is inside `{}`, which belongs to the agent", FilePath::RESERVED)]
    Reserved {
        /// The path as given.
        path: String,
    },
    /// `+` and `#` are wildcards in MQTT; a topic with one drops the client that uses it.
    #[error("path `{path}` has the character {character:?}, which no MQTT topic can carry")]
    Wildcard {
        /// The path as given.
        path: String,
        /// `+` or `#`.
        character: char,
    },
}

impl FilePath {
    /// The folder in a device's root that holds the agent's journal and staged files.
    pub const RESERVED: &'static str = ".mpypi";

    /// Checks `path` and keeps it.
    ///
    /// # Errors
    /// Says which rule `path` breaks.
    pub fn new(path: impl Into<String>) -> Result<FilePath, PathError> {
        let path = path.into();
        if path.is_empty() {
            return Err(PathError::Empty);
        }
        if path.len() > limits::PATH {
            return Err(PathError::TooLong { length: path.len() });
        }
        let components = path.split('/').count();
        if components > limits::PATH_COMPONENTS {
            return Err(PathError::TooDeep { components });
        }
        if let Some(character) = path.chars().find(|c| c.is_control() || matches!(c, '\\' | ':')) {
            return Err(PathError::Character { path, character });
        }
        if let Some(component) = path.split('/').find(|c| matches!(*c, "" | "." | "..")) {
            return Err(PathError::Escapes { component: component.to_owned(), path });
        }
        if let Some(component) = path.split('/').find(|c| c.ends_with(['.', ' '])) {
            return Err(PathError::Trailing { component: component.to_owned(), path });
        }
        // FAT, which many boards use, ignores case.
        if path.split('/').next().is_some_and(|first| first.eq_ignore_ascii_case(Self::RESERVED)) {
            return Err(PathError::Reserved { path });
        }
        Ok(FilePath(path))
    }

    /// Checks that the path can be part of a topic, as the path of a `src` entry must be.
    ///
    /// # Errors
    /// Names the wildcard character found.
    pub fn for_topic(self) -> Result<FilePath, PathError> {
        match self.0.chars().find(|c| matches!(c, '+' | '#')) {
            Some(character) => Err(PathError::Wildcard { path: self.0, character }),
            None => Ok(self),
        }
    }

    /// The path below `folder`.
    ///
    /// # Errors
    /// The joined path may be too long or too deep, and `folder` may be none that a path can name.
    pub fn below(&self, folder: &str) -> Result<FilePath, PathError> {
        FilePath::new(format!("{folder}/{self}"))
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The folders the file lies in, outermost first: `a`, `a/b` for `a/b/c.py`.
    pub fn parents(&self) -> impl Iterator<Item = &str> {
        self.0.match_indices('/').map(|(end, _)| &self.0[..end])
    }
}

impl FromStr for FilePath {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        FilePath::new(text)
    }
}

impl fmt::Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for FilePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for FilePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        FilePath::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_listed_from_the_outside_in() {
        let path = FilePath::new("a/b/c.py").unwrap();
        assert_eq!(path.parents().collect::<Vec<_>>(), ["a", "a/b"]);
    }

    #[test]
    fn the_agents_own_folder_is_refused_in_any_case() {
        assert!(matches!(FilePath::new(".MPYPI/journal"), Err(PathError::Reserved { .. })));
        assert!(FilePath::new("lib/.mpypi").is_ok());
    }
}
