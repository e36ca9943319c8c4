//! `mpypi keys`

use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};
use mpypi_protocol::{
    KeyId, Root,
    key::Algorithm,
    root::{self, Delegation, Draft, Scope, SignedRoot},
};
use serde_json::{Map, Value, json};

use super::{places, print};
use crate::{
    cli::{KeyArgs, PlaceArgs},
    history,
    keys::{Custody, KeyFile, Keys, KeysError},
    limits,
    link::Link,
    retained,
    settle::{Disagreement, End, Message, Stands, settle},
};

const EXAMPLES: &str = "\
Root keys say who may sign; channel keys sign. Root keys are kept apart, best on different machines, and are needed \
only when a channel key comes or goes. Devices are given root 1 once and follow the chain from there on.

A first root, of which two of three keys suffice, and a channel that one key signs:
  mpypi keys new r1 r2 r3 dev-2026
  mpypi keys root new --key r1 --key r2 --key r3 --threshold 2
  mpypi keys delegate dev --key dev-2026
  mpypi keys root sign                    signs with every root key that is here; each holder does so in turn
  mpypi keys root publish
  mpypi keys export > root.json           what devices pin

A year later, and after a theft:
  mpypi keys rotate dev-2026 dev-2027     then sign and publish the root
  mpypi keys revoke dev-2027              and everything it may have signed is old: the channel's epoch is raised

A key held elsewhere:
  mpypi keys new dev-2026 --public dev.pem --sign-command 'openssl dgst -sha256 -sign /secret/dev.key'";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(flatten)]
    keys: KeyArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make keys, or take in the public half of one that is held elsewhere
    New {
        /// Their names
        #[arg(required = true, value_name = "KEY")]
        ids: Vec<KeyId>,
        /// Make Ed25519 keys, which small devices do not know
        #[arg(long, conflicts_with = "public")]
        ed25519: bool,
        /// The public half, in PEM
        #[arg(long, value_name = "FILE")]
        public: Option<PathBuf>,
        /// What signs: a command that reads what to sign and writes the signature, as it is or in base64
        #[arg(long, value_name = "COMMAND", requires = "public")]
        sign_command: Option<String>,
    },
    /// Show keys, who has them, and what the newest root lets them do
    List {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Let keys sign for a channel, by the next root
    Delegate {
        /// The channel, or `*` for every channel without a delegation of its own; `time` for who may tell devices the time
        channel: Scope,
        /// A key; all that are named, and no others, may sign
        #[arg(long = "key", value_name = "KEY", required = true)]
        ids: Vec<KeyId>,
        /// For how many days
        #[arg(long, value_name = "DAYS", default_value_t = limits::ROOT_DAYS)]
        expires: u32,
        /// Make every list of before old, whatever its number
        #[arg(long)]
        raise_epoch: bool,
    },
    /// Put a key in the place of another, by the next root
    Rotate {
        /// The key that goes
        old: KeyId,
        /// The key that comes; it is made if it is not there
        new: KeyId,
    },
    /// Take a key away that may be in wrong hands, by the next root; the epoch of its channels is raised
    Revoke {
        /// The key
        id: KeyId,
    },
    /// Print what a device pins: root 1, or the newest
    Export {
        /// The newest root instead of the first
        #[arg(long, conflicts_with = "plain")]
        newest: bool,
        /// The moduli of these keys, for devices that know no roots
        #[arg(long, value_name = "KEY", num_args = 1..)]
        plain: Option<Vec<KeyId>>,
    },
    /// Make, sign and publish roots
    #[command(subcommand)]
    Root(RootCommand),
}

#[derive(Debug, clap::Subcommand)]
enum RootCommand {
    /// Begin: what root 1 says
    New {
        /// A root key
        #[arg(long = "key", value_name = "KEY", required = true)]
        ids: Vec<KeyId>,
        /// How many of them have to sign a root
        #[arg(long, value_name = "NUMBER", default_value_t = 1)]
        threshold: usize,
        /// For how many days it is believed to be the newest
        #[arg(long, value_name = "DAYS", default_value_t = limits::ROOT_DAYS)]
        expires: u32,
    },
    /// Begin the next root, which says the same for longer
    Renew {
        /// For how many days
        #[arg(long, value_name = "DAYS", default_value_t = limits::ROOT_DAYS)]
        expires: u32,
        /// How many root keys have to sign from then on [default: as before]
        #[arg(long, value_name = "NUMBER")]
        threshold: Option<usize>,
    },
    /// Sign the unfinished root
    Sign {
        /// With these keys [default: every one that is asked for and here]
        #[arg(value_name = "KEY")]
        ids: Vec<KeyId>,
    },
    /// Publish the roots that the broker lacks
    Publish {
        #[command(flatten)]
        place: Box<PlaceArgs>,
    },
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    #[expect(clippy::disallowed_methods, reason = "this is the driver that gives roots their time")]
    let now = Timestamp::from_second(Timestamp::now().as_second())?;
    let keys = args.keys.folder();
    match args.command {
        Command::New { ids, ed25519, public, sign_command } => {
            let alg = if ed25519 { Algorithm::Ed25519 } else { Algorithm::Rsa3072 };
            for id in ids {
                match &public {
                    Some(pem) => drop(keys.adopt(&id, pem, sign_command.as_deref())?),
                    None => drop(keys.make(&id, alg)?),
                }
                print(&format!("key {id} is in {}\n", keys.folder().display()))?;
            }
            Ok(())
        }
        Command::List { json } => list(&keys, json, now),
        Command::Delegate { channel, ids, expires, raise_epoch } => {
            let files = ids.iter().map(|id| keys.key(id)).collect::<Result<Vec<_>, _>>()?;
            let root = keys.edit(now, |draft| {
                let before = draft.delegations.get(&channel).map_or(0, |delegation| delegation.epoch);
                let epoch = before.saturating_add(raise_epoch.into());
                take_in(draft, &files);
                let delegation = Delegation { keys: ids.clone(), epoch, expires: after(now, expires)? };
                draft.delegations.insert(channel.clone(), delegation);
                Ok(())
            })?;
            drafted(&keys, &root)
        }
        Command::Rotate { old, new } => {
            if matches!(keys.key(&new), Err(KeysError::NoKey { .. })) {
                keys.make(&new, Algorithm::Rsa3072)?;
                print(&format!("key {new} is in {}\n", keys.folder().display()))?;
            }
            let file = keys.key(&new)?;
            let root = keys.edit(now, |draft| {
                is_there(draft, &old)?;
                take_in(draft, std::slice::from_ref(&file));
                for keys in lists(draft) {
                    if keys.contains(&new) {
                        keys.retain(|id| *id != old);
                    }
                    keys.iter_mut().filter(|id| **id == old).for_each(|id| *id = new.clone());
                }
                Ok(())
            })?;
            drafted(&keys, &root)
        }
        Command::Revoke { id } => {
            let root = keys.edit(now, |draft| {
                is_there(draft, &id)?;
                for delegation in draft.delegations.values_mut().filter(|one| one.keys.contains(&id)) {
                    // TUF 1.0, 5.3.11: whatever the thief has signed, with however high a number, is old.
                    delegation.epoch = delegation.epoch.saturating_add(1);
                }
                for keys in lists(draft) {
                    keys.retain(|other| *other != id);
                }
                Ok(())
            })?;
            drafted(&keys, &root)
        }
        Command::Export { newest, plain: None } => {
            let (chain, _) = keys.roots()?;
            let root = if newest { chain.last() } else { chain.first() };
            let none = || KeysError::Office("there is no root that enough have signed".into());
            print(&String::from_utf8_lossy(root.ok_or_else(none)?.payload()))
        }
        Command::Export { plain: Some(ids), .. } => {
            let mut moduli = Map::new();
            for id in ids {
                let hex: String =
                    keys.key(&id)?.public.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
                moduli.insert(id.to_string(), hex.into());
            }
            print(&format!("{}\n", Value::Object(moduli)))
        }
        Command::Root(RootCommand::New { ids, threshold, expires }) => {
            if let (Some(_), _) | (_, Some(_)) =
                keys.roots().map(|(chain, next)| (chain.last().cloned(), next))?
            {
                let text = format!("there is a root in `{}` already", keys.folder().display());
                return Err(KeysError::Office(text).into());
            }
            let files = ids.iter().map(|id| keys.key(id)).collect::<Result<Vec<_>, _>>()?;
            let mut draft = Draft {
                version: 1,
                created: now,
                expires: after(now, expires)?,
                threshold,
                root_keys: ids,
                keys: Default::default(),
                delegations: Default::default(),
            };
            take_in(&mut draft, &files);
            let root =
                draft.signed(&[]).map_err(|source| KeysError::Root { path: keys.root_path(1), source })?;
            keys.write_root(&root)?;
            drafted(&keys, &root)
        }
        Command::Root(RootCommand::Renew { expires, threshold }) => {
            let root = keys.edit(now, |draft| {
                draft.expires = after(now, expires)?;
                draft.threshold = threshold.unwrap_or(draft.threshold);
                for delegation in draft.delegations.values_mut() {
                    delegation.expires = delegation.expires.max(draft.expires);
                }
                Ok(())
            })?;
            drafted(&keys, &root)
        }
        Command::Root(RootCommand::Sign { ids }) => sign(&keys, &ids).await,
        Command::Root(RootCommand::Publish { place }) => publish(&keys, *place).await,
    }
}

/// Every list of keys in a root.
fn lists(draft: &mut Draft) -> impl Iterator<Item = &mut Vec<KeyId>> {
    let Draft { root_keys, delegations, .. } = draft;
    delegations.values_mut().map(|delegation| &mut delegation.keys).chain([root_keys])
}

fn is_there(draft: &mut Draft, id: &KeyId) -> Result<(), KeysError> {
    let is_there = lists(draft).any(|keys| keys.contains(id));
    match is_there {
        true => Ok(()),
        false => Err(KeysError::Office(format!("root {} does not know key `{id}`", draft.version))),
    }
}

fn take_in(draft: &mut Draft, files: &[KeyFile]) {
    for file in files {
        draft.keys.insert(file.id.clone(), file.public.clone());
    }
}

fn after(now: Timestamp, days: u32) -> Result<Timestamp, KeysError> {
    now.checked_add(SignedDuration::from_hours(24 * i64::from(days)))
        .map_err(|_| KeysError::Office(format!("{days} days from now is a time that cannot be written")))
}

/// What an unfinished root still needs.
fn missing(chain: &[Root], root: &SignedRoot) -> Vec<(u64, usize, Vec<KeyId>)> {
    chain
        .last()
        .map(Root::draft)
        .into_iter()
        .chain([root.draft()])
        .filter_map(|by| {
            let signers = root.signers(by);
            let lacking = by.threshold.saturating_sub(signers.len());
            let others = by.root_keys.iter().filter(|id| !signers.contains(id)).cloned().collect();
            (lacking > 0).then_some((by.version, lacking, others))
        })
        .collect()
}

fn drafted(keys: &Keys, root: &SignedRoot) -> anyhow::Result<()> {
    let version = root.draft().version;
    let path = keys.root_path(version);
    print(&format!(
        "root {version} is drafted in {}: sign it with `mpypi keys root sign`, then `mpypi keys root publish`\n",
        path.display()
    ))
}

async fn sign(keys: &Keys, ids: &[KeyId]) -> anyhow::Result<()> {
    let (chain, unfinished) = keys.roots()?;
    let mut root =
        unfinished.ok_or_else(|| KeysError::Office("there is no root to sign: all are complete".into()))?;
    for (_, _, wanted) in missing(&chain, &root) {
        for id in wanted {
            let is_meant = ids.is_empty() || ids.contains(&id);
            let signed = root.signatures().iter().any(|signature| signature.key == id.as_str());
            if !is_meant || signed {
                continue;
            }
            let file = match keys.key(&id) {
                Ok(file) if file.custody != Custody::Elsewhere => file,
                // Somebody else's: it signs elsewhere.
                Ok(_) | Err(KeysError::NoKey { .. }) if ids.is_empty() => continue,
                Ok(_) => return Err(KeysError::NotHere(id).into()),
                Err(error) => return Err(error.into()),
            };
            let signature = keys.sign(&file, root.covered()).await?;
            let with = root.with(signature);
            root = with.map_err(|source| {
                let path = keys.root_path(root.draft().version);
                KeysError::Root { path, source }
            })?;
            // Each is kept at once: who stops at the next passphrase loses none.
            keys.write_root(&root)?;
            print(&format!("root {} is signed by {id}\n", root.draft().version))?;
        }
    }
    let version = root.draft().version;
    let missing = missing(&chain, &root);
    for (by, lacking, others) in &missing {
        let others: Vec<_> = others.iter().map(|id| format!("`{id}`")).collect();
        print(&format!(
            "root {version} needs {lacking} more of {}, by root {by}: hand {} on\n",
            others.join(", "),
            keys.root_path(version).display()
        ))?;
    }
    match missing.is_empty() {
        true => print(&format!("root {version} is complete: `mpypi keys root publish`\n")),
        false => Ok(()),
    }
}

async fn publish(keys: &Keys, place: PlaceArgs) -> anyhow::Result<()> {
    let (chain, unfinished) = keys.roots()?;
    if chain.is_empty() {
        let text = match unfinished {
            Some(_) => "root 1 lacks signatures: `mpypi keys root sign`",
            None => "there is no root: begin with `mpypi keys root new`",
        };
        return Err(KeysError::Office(text.into()).into());
    }
    let brokers = places(place)?;
    let mut link = Link::connect_any(&brokers).await?;
    let retained = retained::all(&mut link, &[format!("{}+", mpypi_protocol::topic::ROOTS)]).await?;
    let mut sent = 0;
    for root in &chain {
        let topic = root::topic(root.version());
        let there = retained.iter().find(|(found, _)| *found == topic).map(|(_, payload)| payload);
        match there {
            Some(payload) if **payload == *root.payload() => continue,
            Some(_) => {
                let text = format!("the broker retains another root {} than the one here", root.version());
                return Err(KeysError::Office(text).into());
            }
            None => {}
        }
        let payload = root.payload().to_vec().into();
        if let Err(refusal) = history::put(&mut link, topic, payload).await? {
            let text = format!("the broker refused root {}: {refusal}", root.version());
            return Err(KeysError::Office(text).into());
        }
        print(&format!("published root {}\n", root.version()))?;
        sent += 1;
    }
    link.close().await;
    if brokers.are_several() {
        let message = |root: &Root| Message::of(root::topic(root.version()), root.payload().to_vec().into());
        let messages: Vec<Message> = chain.iter().map(message).collect();
        let verdict = settle(&brokers, None, &messages, |_| None, |_| {}).await;
        if verdict.end != End::Agreed {
            let done = "the roots are published".to_owned();
            return Err(Disagreement { done, stands: Stands::Published, verdict }.into());
        }
    }
    match (sent, unfinished) {
        (0, Some(root)) => {
            let text = format!("root {} lacks signatures: `mpypi keys root sign`", root.draft().version);
            Err(KeysError::Office(text).into())
        }
        (0, None) => print("the broker has every root\n"),
        _ => Ok(()),
    }
}

fn list(keys: &Keys, as_json: bool, now: Timestamp) -> anyhow::Result<()> {
    let (chain, unfinished) = keys.roots()?;
    let newest = chain.last().map(Root::draft);
    let roles = |id: &KeyId| -> Vec<String> {
        let Some(draft) = newest else { return Vec::new() };
        let root = draft.root_keys.contains(id).then(|| "root".to_owned());
        let channels = draft.delegations.iter().filter(|(_, delegation)| delegation.keys.contains(id));
        root.into_iter().chain(channels.map(|(scope, _)| scope.to_string())).collect()
    };
    let custody = |file: &KeyFile| match &file.custody {
        Custody::File(_) => "here",
        Custody::Command(_) => "command",
        Custody::Elsewhere => "elsewhere",
    };
    let files = keys.all()?;
    let root = newest.map(|draft| {
        let delegations: Vec<_> = draft
            .delegations
            .iter()
            .map(|(scope, Delegation { keys, epoch, expires })| {
                json!({ "channel": scope.to_string(), "keys": keys, "epoch": epoch, "expires": expires.to_string() })
            })
            .collect();
        json!({
            "version": draft.version, "threshold": draft.threshold, "keys": draft.root_keys,
            "expires": draft.expires.to_string(), "expired": draft.expires <= now, "delegations": delegations,
        })
    });
    if as_json {
        let all: Vec<_> = files
            .iter()
            .map(|file| {
                json!({ "key": file.id, "alg": file.public.alg(), "private": custody(file), "signs": roles(&file.id) })
            })
            .collect();
        let unfinished = unfinished.map(|root| root.draft().version);
        return print(&format!("{}\n", json!({ "keys": all, "root": root, "unfinished": unfinished })));
    }
    let mut text = String::new();
    for file in &files {
        let signs = match roles(&file.id).join(", ") {
            none if none.is_empty() => "nothing".to_owned(),
            all => all,
        };
        text +=
            &format!("{} ({}, private half {}): signs {signs}\n", file.id, file.public.alg(), custody(file));
    }
    if let Some(draft) = newest {
        let over = if draft.expires <= now { ", which is over" } else { "" };
        text += &format!(
            "root {}: {} of {} keys sign it, believed until {}{over}\n",
            draft.version,
            draft.threshold,
            draft.root_keys.len(),
            draft.expires
        );
        for (scope, Delegation { keys, epoch, expires }) in &draft.delegations {
            let keys: Vec<_> = keys.iter().map(ToString::to_string).collect();
            let over = if *expires <= now { ", which is over" } else { "" };
            text += &format!("  {scope}: {}, epoch {epoch}, until {expires}{over}\n", keys.join(" or "));
        }
    }
    if let Some(root) = unfinished {
        text += &format!("root {} is not finished: `mpypi keys root sign`\n", root.draft().version);
    }
    print(&text)
}
