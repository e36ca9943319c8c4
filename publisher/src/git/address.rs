//! Where a repository is.

use std::{fmt, path::PathBuf, str::FromStr};

use gix::url::Scheme;

/// Where a repository is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// On this machine.
    Here(PathBuf),
    /// Elsewhere.
    Web(Web),
}

/// A repository that is reached over HTTP.
#[derive(Clone, PartialEq, Eq)]
pub struct Web {
    /// Its URL, without user and password.
    pub(super) url: gix::Url,
    /// The user of the URL as it was given.
    pub(super) user: Option<String>,
    /// The password.
    pub(super) password: Option<String>,
}

/// What is no address of a repository.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// It is no URL.
    #[error("`{0}` is no URL of a git repository")]
    NotAUrl(String),
    /// Another way to get there.
    #[error("a repository at `{0}://…` is not fetched: use its https:// address, or a path")]
    Scheme(String),
}

impl FromStr for Address {
    type Err = AddressError;

    /// A URL by `https://` or `http://`, a URL by `file://`, or a path.
    fn from_str(text: &str) -> Result<Address, AddressError> {
        let Some((scheme, _)) = text.split_once("://") else {
            return match is_scp(text) {
                true => Err(AddressError::Scheme("ssh".to_owned())),
                false => Ok(Address::Here(PathBuf::from(text))),
            };
        };
        // The text may hold a password: errors name the scheme alone.
        let mut url = gix::url::parse(text).map_err(|_| AddressError::NotAUrl(format!("{scheme}://…")))?;
        match url.scheme {
            Scheme::File => Ok(Address::Here(PathBuf::from(url.path.to_string()))),
            Scheme::Http | Scheme::Https if url.host().is_some() => {
                let user = url.user().filter(|user| !user.is_empty()).map(str::to_owned);
                let password = url.password().map(str::to_owned);
                url.set_user(None);
                url.set_password(None);
                Ok(Address::Web(Web { url, user, password }))
            }
            Scheme::Http | Scheme::Https => Err(AddressError::NotAUrl(format!("{scheme}://…"))),
            _ => Err(AddressError::Scheme(scheme.to_owned())),
        }
    }
}

/// Whether it is `user@host:path`, as git takes it for SSH.
fn is_scp(text: &str) -> bool {
    let Some((host, path)) = text.split_once(':') else { return false };
    // A drive of Windows has one letter.
    host.len() > 1 && !host.contains(['/', '\\']) && !path.is_empty()
}

impl Address {
    /// What a folder of it is called that nobody named: the last part of its path, without `.git`.
    pub(super) fn name(&self) -> String {
        let path = match self {
            Address::Here(path) => {
                // A path may be `.`, and all the same have a name.
                std::fs::canonicalize(path).unwrap_or_else(|_| path.clone()).to_string_lossy().into_owned()
            }
            Address::Web(web) => web.url.path.to_string(),
        };
        let path = path.trim_end_matches('/');
        let path = path.strip_suffix("/.git").unwrap_or(path);
        let name = path.rsplit('/').next().unwrap_or_default();
        let name = name.strip_suffix(".git").filter(|name| !name.is_empty()).unwrap_or(name);
        if name.is_empty() { "repository".to_owned() } else { name.to_owned() }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Here(path) => write!(f, "{}", path.display()),
            Address::Web(web) => write!(f, "{web}"),
        }
    }
}

impl fmt::Display for Web {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.url.to_bstring())
    }
}

impl fmt::Debug for Web {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whatever prints it, the password stays here.
        f.debug_struct("Web")
            .field("url", &self.to_string())
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn a_url_is_kept_without_the_password_that_it_is_given_with() {
        let Address::Web(web) = read("https://ann:to%40ken@hub.local:8443/team/code.git") else { panic!() };
        assert_eq!(web.to_string(), "https://hub.local:8443/team/code.git");
        assert_eq!((web.user.as_deref(), web.password.as_deref()), (Some("ann"), Some("to@ken")));
        assert!(!format!("{web:?}").contains("ken"), "{web:?}");
        let Address::Web(plain) = read("http://hub.local/code") else { panic!() };
        assert_eq!((plain.user, plain.password), (None, None));
    }

    #[test]
    fn paths_and_file_urls_are_of_this_machine() {
        assert_eq!(read("../code"), Address::Here("../code".into()));
        assert_eq!(read("file:///srv/git/code.git"), Address::Here("/srv/git/code.git".into()));
        assert_eq!(read("C:/code"), Address::Here("C:/code".into()));
    }

    #[test]
    fn what_is_not_fetched_is_refused_without_showing_what_it_holds() {
        for (text, scheme) in [
            ("git@hub.local:team/code.git", "ssh"),
            ("ssh://git:secret@hub.local/code", "ssh"),
            ("git://hub.local/code", "git"),
            ("ftp://ann:secret@hub.local/code", "ftp"),
        ] {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Scheme(scheme.to_owned())), "{text}");
        }
        let error = "https://ann:secret@".parse::<Address>().unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn a_folder_that_nobody_named_is_called_as_its_repository() {
        for (text, name) in [
            ("https://hub.local/team/blink.git", "blink"),
            ("https://hub.local/team/blink/", "blink"),
            ("/srv/git/blink.git", "blink"),
            ("/home/ann/blink/.git", "blink"),
            ("https://hub.local/", "repository"),
        ] {
            assert_eq!(read(text).name(), name, "{text}");
        }
    }
}
