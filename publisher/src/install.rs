//! The first install of a wheel on a device that runs Mpy-BLOX, which no list can bring about: such a device drops a
//! list with a wheel that it does not have.
//!
//! It takes an order that names a package that it has, in another version, with the digest of the new wheel: what it
//! installs, and under which name, it reads from the wheel itself. The order is sent to this node alone, once, and not
//! retained: on a retained list it would be carried out at every start.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use mpypi_client::Brokers;
use mpypi_protocol::{
    ChannelName, Entry, NodeId, Tag, UpdateList,
    list::Wheel,
    node::{Info, NodeError},
    tag,
    topic::NodeSubject,
};
use tokio::time::{Instant, timeout_at};

use crate::{
    channel::{Cache, ChannelError, Package, Project},
    link::{Heard, Link, LinkError, Refusal, Signal},
    lint::WHEEL,
    publish::{Event, Observer},
    report::size,
    retained::{self, AskError},
};

/// What to install, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// The broker, or several that are to agree.
    pub brokers: Brokers,
    /// The node.
    pub node: NodeId,
    /// A `.whl`, or the folder of a project.
    pub wheel: PathBuf,
    /// The wheel's tag, if there are several to choose from, or to pack the project with.
    pub tag: Option<String>,
    /// The installed package under whose name the wheel is ordered; one that the node names if `None`.
    pub carrier: Option<String>,
    /// How long to wait until the node says that it has the wheel.
    pub timeout: Duration,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The node.
    pub node: NodeId,
    /// The package's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// How it got there.
    pub way: Way,
    /// Bytes sent to the broker; 0 if it had the wheel.
    pub bytes_sent: u64,
}

/// How a node got a wheel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// It had it.
    Already,
    /// As another version of a package that it has.
    Upgrade,
    /// Under the name of this package.
    Carried(String),
}

/// Why a wheel is not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// There is no wheel to install.
    #[error(transparent)]
    Wheel(#[from] ChannelError),
    /// The broker cannot be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// There is more than one wheel to choose from.
    #[error("`{}` makes {} wheels: {}", path.display(), tags.len(), tags.join(", "))]
    Several {
        /// What makes them.
        path: PathBuf,
        /// Their tags.
        tags: Vec<String>,
    },
    /// None of them has the tag that is asked for.
    #[error("`{}` makes no wheel for `{wanted}`, but for {}", path.display(), tags.join(", "))]
    NoTag {
        /// What makes them.
        path: PathBuf,
        /// The tag.
        wanted: String,
        /// Their tags.
        tags: Vec<String>,
    },
    /// Nobody knows the node.
    #[error("node `{node}` is not known here: it said nothing about itself that the broker kept")]
    Unknown {
        /// The node.
        node: NodeId,
    },
    /// What the node says about itself cannot be read.
    #[error("what node `{node}` says about itself cannot be read")]
    Info {
        /// The node.
        node: NodeId,
        /// Why.
        source: NodeError,
    },
    /// The node runs an agent that needs no such thing.
    #[error("node `{node}` runs `{}`, not Mpy-BLOX: an order with one wheel would remove all else", agent.escape_debug())]
    OtherAgent {
        /// The node.
        node: NodeId,
        /// Its agent.
        agent: String,
    },
    /// The wheel is made for others.
    #[error("the wheel is for `{tag}`, and node `{node}` is a `{}`", sysname.escape_debug())]
    NoFit {
        /// The node.
        node: NodeId,
        /// The wheel's tag.
        tag: String,
        /// The node's platform.
        sysname: String,
    },
    /// The node has nothing under whose name the wheel could be ordered.
    #[error("node `{node}` says that it has no package at all, so it takes no order for a new one")]
    NoCarrier {
        /// The node.
        node: NodeId,
    },
    /// The package named as carrier is not there.
    #[error("node `{node}` has no package `{carrier}`")]
    NotInstalled {
        /// The node.
        node: NodeId,
        /// The package.
        carrier: String,
        /// What it has.
        installed: Vec<String>,
    },
    /// The broker does not take the wheel or the order.
    #[error("the broker refused {what}: {refusal}")]
    Refused {
        /// What.
        what: &'static str,
        /// Why.
        refusal: Refusal,
    },
    /// Nobody listens.
    #[error("node `{node}` is not connected: nobody received the order")]
    Offline {
        /// The node.
        node: NodeId,
    },
    /// The node got the order, as far as anybody knows, and does not say that it has the wheel.
    #[error(
        "node `{node}` did not say within {after:?} that it has {name} {version}{}",
        if *restarted { ", but started again without it" } else { "" }
    )]
    NotConfirmed {
        /// The node.
        node: NodeId,
        /// The package.
        name: String,
        /// Its version.
        version: String,
        /// How long it was waited for.
        after: Duration,
        /// Whether it said since then what it has.
        restarted: bool,
    },
}

impl From<LinkError> for InstallError {
    fn from(error: LinkError) -> Self {
        InstallError::Ask(error.into())
    }
}

impl InstallError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            InstallError::Wheel(error) => return error.hint(),
            InstallError::Ask(error) => return error.hint(),
            InstallError::Refused { refusal, .. } => return refusal.hint(),
            InstallError::Several { .. } | InstallError::NoTag { .. } => {
                "choose with `--tag` the one that the node's channel carries: it takes no upgrade with another tag"
            }
            InstallError::Unknown { .. } => {
                "`mpypi status` shows the nodes; where the broker keeps nothing of Mpy-BLOX nodes, name a package \
                 that it has: `--carrier NAME`"
            }
            InstallError::OtherAgent { .. } => {
                "put the wheel into the folder of its channel, and `mpypi publish` that: it installs what it lacks"
            }
            InstallError::NoFit { .. } => "use a wheel for its platform, or one for `any`",
            InstallError::NoCarrier { .. } => {
                "install a first package on it by hand, as with `mpremote mip install`"
            }
            InstallError::NotInstalled { installed, .. } => {
                let names: Vec<_> =
                    installed.iter().map(|name| format!("`{}`", name.escape_debug())).collect();
                return Some(format!("it has {}", names.join(", ")));
            }
            InstallError::Offline { .. } => "switch it on, and run again: the order waits for nobody",
            InstallError::NotConfirmed { .. } => {
                "it may be off, or out of memory, or the order never reached it; run again when it is connected: \
                 the broker has the wheel now"
            }
            InstallError::Info { .. } => return None,
        };
        Some(hint.to_owned())
    }
}

/// Installs a wheel on a node.
///
/// # Errors
/// See [`InstallError`]. The order is the last that is sent.
pub async fn install(options: &Options, observer: &mut impl Observer) -> Result<Installed, InstallError> {
    let package = wheel(options, observer).await?;
    let Entry::Wheel(wheel) = &package.entry else { unreachable!("a project makes wheels only") };
    let mut link = Link::connect_any(&options.brokers).await?;
    let Order { entry, way } = match info(&mut link, &options.node).await? {
        Some(info) => Order::of(options, &info, wheel)?,
        None => Order::blind(options, wheel)?,
    };
    let mut done = Installed {
        node: options.node.clone(),
        name: wheel.name.clone(),
        version: wheel.version.clone(),
        way,
        bytes_sent: 0,
    };
    if done.way == Way::Already {
        link.close().await;
        return Ok(done);
    }
    if package.size > WHEEL {
        let warning = format!(
            "the wheel has {}: with a heap of 512 kB a device takes {} kB; what is too large makes it deaf",
            size(package.size),
            WHEEL / 1000
        );
        observer.event(Event::Warning(&warning));
    }
    done.bytes_sent = send(&mut link, &package, observer).await?;
    order(&mut link, options, entry, wheel).await?;
    link.close().await;
    Ok(done)
}

/// The wheel that is asked for.
async fn wheel(options: &Options, observer: &mut impl Observer) -> Result<Package, InstallError> {
    let (path, tag) = (options.wheel.clone(), options.tag.clone());
    let load = move || Project::load(&path, tag.as_deref(), &mut Cache::default(), &mut |_, _| ());
    let Project { mut packages, warnings, notes } = match tokio::task::spawn_blocking(load).await {
        Ok(project) => project?,
        Err(stopped) => std::panic::resume_unwind(stopped.into_panic()),
    };
    warnings.iter().for_each(|text| observer.event(Event::Warning(text)));
    notes.iter().for_each(|text| observer.event(Event::Note(text)));
    let tag = |package: &Package| match &package.entry {
        Entry::Wheel(wheel) => wheel.tag.clone().unwrap_or_default(),
        _ => String::new(),
    };
    let tags: Vec<String> = packages.iter().map(tag).collect();
    if let Some(wanted) = &options.tag {
        packages.retain(|package| tag(package) == *wanted);
    }
    let path = options.wheel.clone();
    match (packages.pop(), packages.is_empty(), &options.tag) {
        (Some(package), true, _) => Ok(package),
        (None, _, Some(wanted)) => Err(InstallError::NoTag { path, wanted: wanted.clone(), tags }),
        _ => Err(InstallError::Several { path, tags }),
    }
}

/// What the node says about itself, if the broker kept it.
async fn info(link: &mut Link, node: &NodeId) -> Result<Option<Info>, InstallError> {
    let topic = node.topic(NodeSubject::Info);
    let found = retained::all(link, std::slice::from_ref(&topic)).await?;
    let Some((_, payload)) = found.into_iter().find(|(found, _)| *found == topic) else { return Ok(None) };
    let info = Info::parse(&payload);
    info.map(Some).map_err(|source| InstallError::Info { node: node.clone(), source })
}

/// What a node is told, and what that means.
#[derive(Debug, PartialEq)]
struct Order {
    entry: Entry,
    way: Way,
}

impl Order {
    /// The order for a node that is known.
    fn of(options: &Options, info: &Info, wheel: &Wheel) -> Result<Order, InstallError> {
        let node = || options.node.clone();
        // Ours, and whoever names itself, take an order as the whole of what they should have (design, section 3).
        if let Some(agent) = info.agent.clone().filter(|_| !info.is_mpyblox()) {
            return Err(InstallError::OtherAgent { node: node(), agent });
        }
        let platform = tag::platform(&info.uname.sysname);
        let fits = |tag: &String| Tag::new(tag.as_str()).is_ok_and(|tag| tag.is_for(&platform));
        if let Some(tag) = wheel.tag.clone().filter(|tag| !fits(tag)) {
            return Err(InstallError::NoFit { node: node(), tag, sysname: info.uname.sysname.clone() });
        }
        match info.versions.get(&wheel.name) {
            Some(version) if *version == wheel.version => {
                return Ok(Order { entry: Entry::Wheel(wheel.clone()), way: Way::Already });
            }
            Some(_) => return Ok(Order { entry: Entry::Wheel(wheel.clone()), way: Way::Upgrade }),
            None => {}
        }
        let carrier = match &options.carrier {
            Some(name) => info.versions.get_key_value(name).ok_or_else(|| InstallError::NotInstalled {
                node: node(),
                carrier: name.clone(),
                installed: info.versions.keys().cloned().collect(),
            })?,
            None => {
                info.versions.first_key_value().ok_or_else(|| InstallError::NoCarrier { node: node() })?
            }
        };
        Ok(Order::carried(wheel, carrier.0, Some(carrier.1)))
    }

    /// The order for a node of which nothing is known but a package that it has.
    fn blind(options: &Options, wheel: &Wheel) -> Result<Order, InstallError> {
        match &options.carrier {
            Some(name) => Ok(Order::carried(wheel, name, None)),
            None => Err(InstallError::Unknown { node: options.node.clone() }),
        }
    }

    fn carried(wheel: &Wheel, name: &str, version: Option<&String>) -> Order {
        // Any version but the installed one.
        let other = if version.is_some_and(|version| version == "0") { "1" } else { "0" };
        let entry = Wheel { name: name.to_owned(), version: other.to_owned(), tag: None, ..wheel.clone() };
        Order { entry: Entry::Wheel(entry), way: Way::Carried(name.to_owned()) }
    }
}

/// Sends the wheel, if the broker does not have it; how many bytes that are.
async fn send(link: &mut Link, package: &Package, observer: &mut impl Observer) -> Result<u64, InstallError> {
    // A channel that nobody uses: our brokers answer it after everything asked before.
    let fence = ChannelName::new(format!("fence-{:08x}", fastrand::u32(..))).expect("letters and digits");
    let answers = link.adapts_for_mpyblox();
    let pieces = package.entry.pieces();
    if !retained::pieces(link, &fence, answers, &pieces).await?.is_empty() {
        return Ok(0);
    }
    observer.event(Event::Sending { packages: 1, bytes: package.size });
    let number = link.publish(&package.id.topic(), package.bytes()?)?;
    acknowledged(link, number, "the wheel").await?;
    observer.event(Event::Taken(package.size));
    observer.event(Event::Sent { package, bytes: package.size });
    Ok(package.size)
}

/// Sends the order, and waits until the node says that it has the wheel.
async fn order(link: &mut Link, options: &Options, entry: Entry, wheel: &Wheel) -> Result<(), InstallError> {
    let info = options.node.topic(NodeSubject::Info);
    link.subscribe(std::slice::from_ref(&info));
    loop {
        match link.next().await? {
            Signal::Subscribed(accepted) if !accepted.contains(&true) => {
                return Err(AskError::Refused { topic: info }.into());
            }
            Signal::Subscribed(_) => break,
            _ => {}
        }
    }
    let list = UpdateList::new(vec![entry]).expect("one wheel of a list is a list").to_bytes();
    let number = link.tell(&options.node.topic(NodeSubject::Cmd), Bytes::from(list))?;
    #[expect(clippy::disallowed_methods, reason = "this is the driver that waits for the node")]
    let deadline = Instant::now() + options.timeout;
    let (mut ordered, mut restarted) = (false, false);
    loop {
        let Ok(signal) = timeout_at(deadline, link.next_within(options.timeout)).await else { break };
        match signal? {
            None => break,
            Some(Signal::Acknowledged(done, Ok(Heard::Nobody))) if done == number => {
                return Err(InstallError::Offline { node: options.node.clone() });
            }
            Some(Signal::Acknowledged(done, Err(refusal))) if done == number => {
                return Err(InstallError::Refused { what: "the order", refusal });
            }
            Some(Signal::Acknowledged(done, Ok(Heard::Unknown))) if done == number => ordered = true,
            Some(Signal::Message { topic, payload }) if topic == info => {
                restarted |= ordered;
                let info = Info::parse(&payload).ok();
                if info.is_some_and(|info| info.versions.get(&wheel.name) == Some(&wheel.version)) {
                    return Ok(());
                }
            }
            Some(_) => {}
        }
    }
    Err(InstallError::NotConfirmed {
        node: options.node.clone(),
        name: wheel.name.clone(),
        version: wheel.version.clone(),
        after: options.timeout,
        restarted,
    })
}

async fn acknowledged(link: &mut Link, number: u64, what: &'static str) -> Result<(), InstallError> {
    loop {
        match link.next().await? {
            Signal::Acknowledged(done, Ok(_)) if done == number => return Ok(()),
            Signal::Acknowledged(done, Err(refusal)) if done == number => {
                return Err(InstallError::Refused { what, refusal });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use mpypi_client::BrokerArgs;
    use mpypi_protocol::{BrokerUrl, Digest};

    use super::*;

    fn options(carrier: Option<&str>) -> Options {
        let broker: BrokerUrl = "mqtt://127.0.0.1".parse().unwrap();
        Options {
            brokers: BrokerArgs::one(broker, Default::default()).brokers().unwrap(),
            node: NodeId::new("n").unwrap(),
            wheel: PathBuf::new(),
            tag: None,
            carrier: carrier.map(str::to_owned),
            timeout: Duration::ZERO,
        }
    }

    fn order(carrier: Option<&str>, tag: &str, info: &str) -> Result<(String, String, Way), String> {
        let wheel = Wheel {
            name: "blink".into(),
            version: "1.1".into(),
            digest: Digest::EMPTY,
            size: Some(1),
            chunks: None,
            tag: Some(tag.into()),
            extra: Default::default(),
        };
        let uname = r#""uname":{"sysname":"esp32","machine":"ESP32","version":"v1.25"}"#;
        let info = Info::parse(format!("{{{uname},{info}}}").as_bytes()).unwrap();
        match Order::of(&options(carrier), &info, &wheel).map_err(|error| error.to_string())? {
            Order { entry: Entry::Wheel(wheel), way } => Ok((wheel.name, wheel.version, way)),
            other => panic!("{other:?}"),
        }
    }

    const ANY: &str = "py3-none-any";

    #[test]
    fn a_wheel_that_a_node_lacks_is_ordered_under_the_name_of_one_that_it_has_in_another_version() {
        let versions = r#""versions":{"mpy-blox":"0.6.0","umqtt":"0"}"#;
        let carried =
            |name: &str, version: &str| Ok((name.into(), version.into(), Way::Carried(name.into())));
        assert_eq!(order(None, ANY, versions), carried("mpy-blox", "0"));
        assert_eq!(order(Some("umqtt"), ANY, versions), carried("umqtt", "1"));
        assert_eq!(order(Some("other"), ANY, versions).unwrap_err(), "node `n` has no package `other`");
        let none = order(None, ANY, r#""versions":{}"#).unwrap_err();
        assert!(none.contains("no package at all"), "{none}");
    }

    #[test]
    fn a_wheel_that_a_node_has_is_upgraded_or_left() {
        let of = |version: &str| order(None, ANY, &format!(r#""versions":{{"a":"1","blink":"{version}"}}"#));
        assert_eq!(of("1.0"), Ok(("blink".into(), "1.1".into(), Way::Upgrade)));
        assert_eq!(of("1.1").unwrap().2, Way::Already);
    }

    #[test]
    fn nodes_that_take_an_order_for_all_they_should_have_are_refused_and_so_are_other_platforms() {
        let ours = order(None, ANY, r#""versions":{"a":"1"},"agent":"mpypi-agent/0.1.0""#).unwrap_err();
        assert!(ours.contains("runs `mpypi-agent/0.1.0`, not Mpy-BLOX"), "{ours}");
        let other = order(None, "mpy6-bytecode-rp2", r#""versions":{"a":"1"}"#).unwrap_err();
        assert_eq!(other, "the wheel is for `mpy6-bytecode-rp2`, and node `n` is a `esp32`");
        assert!(order(None, "mpy6-bytecode-esp32", r#""versions":{"a":"1"}"#).is_ok());
    }
}
