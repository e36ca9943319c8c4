//! Who we are at a git server, asked for only when it wants to know: what the URL says, `MPYPI_GIT_TOKEN`, `~/.netrc`, and
//! git's credential helpers, in this order. Nothing of it is shown, logged or kept.

use std::{
    env, fs,
    io::Read,
    path::{Path, PathBuf},
};

use gix::{
    credentials::{
        helper::{Action, NextAction},
        protocol::{Context, Outcome},
    },
    sec::identity::Account,
};

use super::address::Web;
use crate::limits;

/// The environment variable of a token.
const TOKEN: &str = "MPYPI_GIT_TOKEN";
/// Servers that take tokens take any user beside them; this is what the large ones document.
const TOKEN_USER: &str = "oauth2";

/// Answers for one repository, as gix asks.
pub(super) struct Login {
    web: Web,
    repository: gix::Repository,
    /// What git's helpers were asked with, to be told whether it was right.
    helpers: Option<gix::credentials::helper::Cascade>,
}

impl Login {
    pub(super) fn new(web: &Web, repository: &gix::Repository) -> Login {
        Login { web: web.clone(), repository: repository.clone(), helpers: None }
    }

    /// What gix wants to know, or says.
    ///
    /// # Errors
    /// Of a helper.
    pub(super) fn answer(&mut self, action: Action) -> Result<Option<Outcome>, gix::Error> {
        let Action::Get(context) = action else {
            // Helpers like to know whether what they said was right.
            return match &mut self.helpers {
                Some(helpers) => helpers.invoke(action, quiet()),
                None => Ok(None),
            };
        };
        // After a redirect it is somebody else who asks.
        let asks = context.url.as_ref().and_then(|url| gix::url::parse(url).ok());
        let is_same = asks.as_ref().is_none_or(|url| url.host() == self.web.url.host());
        if is_same && let Some(account) = self.known() {
            return Ok(Some(outcome(account, context)));
        }
        let Some(url) = asks else { return Ok(None) };
        if let Some(account) =
            url.host().and_then(|host| netrc(&netrc_path()?, host, self.web.user.as_deref()))
        {
            return Ok(Some(outcome(account, context)));
        }
        let (mut helpers, _, _) = self.repository.config_snapshot().credential_helpers(url)?;
        if helpers.programs.is_empty() {
            return Ok(None);
        }
        helpers.stderr = false;
        let found = helpers.invoke(Action::Get(context), quiet());
        self.helpers = Some(helpers);
        found
    }

    /// What the URL and the environment say.
    fn known(&self) -> Option<Account> {
        let token = env::var(TOKEN).ok().filter(|token| !token.is_empty());
        let password = self.web.password.clone().or(token)?;
        let user = self.web.user.clone().unwrap_or_else(|| TOKEN_USER.to_owned());
        Some(account(user, password))
    }
}

/// Nobody is asked on a terminal: what runs in a pipeline would hang there.
fn quiet() -> gix::prompt::Options {
    gix::prompt::Options { askpass: None, mode: gix::prompt::Mode::Disable }
}

fn account(username: String, password: String) -> Account {
    Account { username, password, oauth_refresh_token: None }
}

fn outcome(identity: Account, context: Context) -> Outcome {
    Outcome { identity, next: NextAction::from(context) }
}

/// Where curl and git look, too.
fn netrc_path() -> Option<PathBuf> {
    let named = env::var_os("NETRC").map(PathBuf::from);
    named.or_else(|| Some(env::home_dir()?.join(".netrc")))
}

/// What a netrc file says of `host`; of this user, if one is named.
fn netrc(path: &Path, host: &str, user: Option<&str>) -> Option<Account> {
    let mut text = String::new();
    fs::File::open(path).ok()?.take(limits::NETRC).read_to_string(&mut text).ok()?;
    find_in_netrc(&text, host, user)
}

fn find_in_netrc(text: &str, host: &str, user: Option<&str>) -> Option<Account> {
    let mut words =
        text.lines().filter(|line| !line.trim_start().starts_with('#')).flat_map(str::split_whitespace);
    let (mut applies, mut login, mut password) = (false, None, None);
    let done = |applies: bool, login: &Option<String>, password: &Option<String>| {
        let login = login.clone().or_else(|| user.map(str::to_owned));
        match (applies, login, password) {
            (true, Some(login), Some(password)) if user.is_none_or(|user| user == login) => {
                Some(account(login, password.clone()))
            }
            _ => None,
        }
    };
    while let Some(word) = words.next() {
        match word {
            "machine" | "default" => {
                if let Some(found) = done(applies, &login, &password) {
                    return Some(found);
                }
                applies =
                    word == "default" || words.next().is_some_and(|name| name.eq_ignore_ascii_case(host));
                (login, password) = (None, None);
            }
            "login" => login = words.next().map(str::to_owned),
            "password" => password = words.next().map(str::to_owned),
            "account" => drop(words.next()),
            // What follows are commands for ftp.
            "macdef" => break,
            _ => {}
        }
    }
    done(applies, &login, &password)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, host: &str, user: Option<&str>) -> Option<(String, String)> {
        find_in_netrc(text, host, user).map(|account| (account.username, account.password))
    }

    #[test]
    fn a_netrc_file_is_read_as_others_read_it() {
        let text = "# ours\nmachine hub.local login ann password one\nmachine hub.local\n\tlogin bob\n\tpassword two\n\
            machine Other.example password three\ndefault login any password four\n";
        let pair = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(find(text, "hub.local", None), pair("ann", "one"));
        assert_eq!(find(text, "hub.local", Some("bob")), pair("bob", "two"));
        assert_eq!(find(text, "other.example", Some("me")), pair("me", "three"));
        assert_eq!(find(text, "else.example", None), pair("any", "four"));
        assert_eq!(find("machine hub.local login ann", "hub.local", None), None);
        assert_eq!(find("machine hub.local login ann password one", "else.example", None), None);
        assert_eq!(find("machine", "hub.local", None), None);
        assert_eq!(find("macdef x\nmachine hub.local login a password b", "hub.local", None), None);
    }
}
