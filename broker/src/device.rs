//! `mpypi-broker device`

use std::{
    fs,
    io::{self, Read, Write},
    path::Path,
};

use anyhow::{Context, anyhow, ensure};
use mpypi_broker::access::{
    devices::{Device, Devices, Listed, Token, parse_list, target},
    users::UsersError,
};
use mpypi_protocol::NodeId;

use crate::cli::{DeviceArgs, DeviceCommand};

/// Largest list of devices that is read, in bytes.
const LIST: u64 = 64 * 1024 * 1024;

pub(crate) fn run(args: DeviceArgs) -> anyhow::Result<()> {
    let mut devices = Devices::load(&args.at.data)?;
    match args.command {
        DeviceCommand::Add { node, channel, token, software, target: hardware, checksum } => {
            let node = NodeId::new(node)?;
            ensure!(
                devices.get(&node).is_none(),
                "there is a device `{node}` already: `rotate` or `move` it"
            );
            let (token, is_ours) = match token {
                Some(text) => (Token::chosen(&text)?, false),
                None => (new_token()?, true),
            };
            let target = hardware.as_deref().map(target).transpose().map_err(|problem| anyhow!(problem))?;
            let device = Device { channel, software, target, checksum, token: token.digest() };
            eprintln!("added device `{node}` on channel `{}`", device.channel);
            devices.put(node, device)?;
            devices.save(&args.at.data)?;
            if is_ours {
                show(&token)?;
            }
        }
        DeviceCommand::Move { node, channel } => {
            let node = NodeId::new(node)?;
            let device = known(&devices, &node)?;
            eprintln!("moved device `{node}` from channel `{}` to `{channel}`", device.channel);
            devices.put(node, Device { channel, ..device })?;
            devices.save(&args.at.data)?;
        }
        DeviceCommand::Rotate { node } => {
            let node = NodeId::new(node)?;
            let device = known(&devices, &node)?;
            let token = new_token()?;
            devices.put(node.clone(), Device { token: token.digest(), ..device })?;
            devices.save(&args.at.data)?;
            eprintln!("the old token of `{node}` is worth nothing any more");
            show(&token)?;
        }
        DeviceCommand::Remove { node } => {
            devices.remove(&NodeId::new(node)?)?;
            devices.save(&args.at.data)?;
            eprintln!("removed");
        }
        DeviceCommand::Import { file } => import(&mut devices, &args.at.data, &file)?,
        DeviceCommand::List { json } => list(&devices, json)?,
    }
    Ok(())
}

fn known(devices: &Devices, node: &NodeId) -> Result<Device, UsersError> {
    devices.get(node).cloned().ok_or_else(|| UsersError::UnknownDevice(node.to_string()))
}

fn new_token() -> anyhow::Result<Token> {
    Token::random().map_err(|error| anyhow!("no randomness to be had: {error}"))
}

fn show(token: &Token) -> anyhow::Result<()> {
    eprintln!(
        "the token below is shown only now; a device logs in with it as its user name, without a password"
    );
    Ok(writeln!(io::stdout(), "{}", token.text())?)
}

/// Adds all devices of a list, or none. Those without a token get one, and are written to standard output with it.
fn import(devices: &mut Devices, data: &Path, file: &Path) -> anyhow::Result<()> {
    let mut text = String::new();
    let read = match file.as_os_str() == "-" {
        true => io::stdin().lock().take(LIST).read_to_string(&mut text),
        false => fs::File::open(file).and_then(|list| list.take(LIST).read_to_string(&mut text)),
    };
    read.with_context(|| format!("cannot read `{}`", file.display()))?;
    let listed = parse_list(&text).map_err(|problem| anyhow!("`{}`, {problem}", file.display()))?;
    let count = listed.len();
    let mut made = Vec::new();
    for Listed { node, channel, token, target } in listed {
        let present = devices.get(&node).cloned();
        let token = match (token, &present) {
            (Some(token), _) => token.digest(),
            (None, Some(present)) => present.token,
            (None, None) => {
                let token = new_token()?;
                made.push((node.clone(), token.clone()));
                token.digest()
            }
        };
        let (software, checksum, old_target) = match present {
            Some(present) => (present.software, present.checksum, present.target),
            None => Default::default(),
        };
        let target = target.or(old_target);
        devices.put(node, Device { channel, software, target, checksum, token })?;
    }
    devices.save(data)?;
    let mut out = io::stdout().lock();
    for (node, token) in made {
        writeln!(out, "{node},{}", token.text())?;
    }
    eprintln!("{count} devices are provided for; tokens that were made are shown only now");
    Ok(())
}

fn list(devices: &Devices, json: bool) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let one = |(node, device): (&NodeId, &Device)| {
            serde_json::json!({
                "node": node, "channel": device.channel, "software": device.software,
                "target": device.target, "checksum": device.checksum,
            })
        };
        let all: Vec<_> = devices.iter().map(one).collect();
        writeln!(out, "{}", serde_json::json!({ "devices": all }))?;
        return Ok(());
    }
    if devices.is_empty() {
        writeln!(out, "no devices with tokens")?;
    }
    let width = devices.iter().map(|(node, _)| node.as_str().chars().count()).max().unwrap_or_default();
    for (node, device) in devices.iter() {
        let target = device.target.as_deref().map(|target| format!("  for {target}")).unwrap_or_default();
        let software = device.software.as_ref().map(|name| format!("  software {name}")).unwrap_or_default();
        writeln!(out, "{:width$}  {}{software}{target}", node.as_str(), device.channel)?;
    }
    Ok(())
}
