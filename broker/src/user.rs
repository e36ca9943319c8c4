//! `mpypi-broker user`

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::{Context, ensure};
use mpypi_broker::access::{
    Role,
    users::{User, Users, hash},
};
use mpypi_protocol::Digest;

use crate::cli::{UserArgs, UserCommand, UserRole};

/// Random bytes in a token.
const TOKEN: usize = 32;
/// Shortest password, in bytes: shorter ones are guessed.
const SHORTEST: usize = 8;

pub(crate) fn run(args: UserArgs) -> anyhow::Result<()> {
    let mut users = Users::load(&args.at.data)?;
    match args.command {
        UserCommand::Add { name, role, token } => {
            let is_new = users.get(&name).is_none();
            let (user, token) = match token {
                true => with_token(role.into())?,
                false => (with_password(role.into())?, None),
            };
            users.put(&name, user)?;
            users.save(&args.at.data)?;
            eprintln!("{} `{name}` as {}", if is_new { "added" } else { "changed" }, word(role.into()));
            if let Some(token) = token {
                eprintln!("the token below is shown only now; use it as the password of `{name}`");
                println!("{token}");
            }
        }
        UserCommand::Remove { name } => {
            users.remove(&name)?;
            users.save(&args.at.data)?;
            eprintln!("removed `{name}`");
        }
        UserCommand::List { json } => list(&users, json)?,
    }
    Ok(())
}

fn list(users: &Users, json: bool) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let all: Vec<_> = users
            .iter()
            .map(|(name, user)| {
                serde_json::json!({
                    "name": name, "role": user.role, "password": user.password.is_some(),
                    "tokens": user.tokens.len(),
                })
            })
            .collect();
        writeln!(out, "{}", serde_json::json!({ "users": all }))?;
        return Ok(());
    }
    if users.is_empty() {
        writeln!(out, "no users: whoever can connect may do everything")?;
    }
    let width = users.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default();
    for (name, user) in users.iter() {
        let by = if user.password.is_some() { "password" } else { "token" };
        writeln!(out, "{name:width$}  {:9}  {by}", word(user.role))?;
    }
    Ok(())
}

fn with_token(role: Role) -> anyhow::Result<(User, Option<String>)> {
    let mut bytes = [0; TOKEN];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no randomness to be had: {error}"))?;
    let token = format!("mpypi_{}", Digest::from(bytes));
    let user = User { role, password: None, tokens: vec![Digest::of(token.as_bytes())] };
    Ok((user, Some(token)))
}

fn with_password(role: Role) -> anyhow::Result<User> {
    if io::stdin().is_terminal() {
        eprint!("password (shown while you type; or pipe it in): ");
        io::stderr().flush().ok();
    }
    let mut password = String::new();
    io::stdin().lock().read_line(&mut password).context("cannot read the password")?;
    let password = password.trim_end_matches(['\r', '\n']);
    ensure!(password.len() >= SHORTEST, "a password has at least {SHORTEST} bytes");
    Ok(User { role, password: Some(hash(password.as_bytes())?), tokens: Vec::new() })
}

fn word(role: Role) -> &'static str {
    match role {
        Role::Admin => "admin",
        Role::Publisher => "publisher",
        Role::Node => "node",
        Role::Viewer => "viewer",
        Role::Edge => "edge",
    }
}

impl From<UserRole> for Role {
    fn from(role: UserRole) -> Role {
        match role {
            UserRole::Admin => Role::Admin,
            UserRole::Publisher => Role::Publisher,
            UserRole::Node => Role::Node,
            UserRole::Viewer => Role::Viewer,
            UserRole::Edge => Role::Edge,
        }
    }
}
