//! Nodes: who is where, and orders to them.

use std::{cmp::Ordering, collections::HashMap, sync::Arc};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use mpypi_protocol::{
    ChannelName, Entry, NodeId, Query, UpdateList, list, node::Phase, query::Facts, topic::NodeSubject,
};
use serde::{Deserialize, Deserializer, de::IntoDeserializer};
use utoipa::IntoParams;

use super::{
    Asked, AtNode, Reach, Tag, Told, cut, page,
    shape::{
        Action, Command, Commanded, Latest, LogLine, LogLines, NodeDetail, NodePage, NodeRow, PhaseWord,
    },
};
use crate::{
    clock,
    fleet::view::Node,
    gateway::{Caller, Gateway, Here, Problem},
};

/// Which nodes are wanted, and in which order.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct Wanted {
    /// A text in the node's name, machine, platform, firmware, version, agent, error or labels; case does not matter.
    q: Option<String>,
    /// A query, as of a rollout's `only`: `label.room = kitchen and version < 1.3`.
    query: Option<String>,
    /// Phases, joined by commas.
    #[param(value_type = Option<Vec<PhaseWord>>, style = Form, explode = false)]
    #[serde(deserialize_with = "words")]
    phase: Vec<PhaseWord>,
    /// The channel that they follow.
    channel: Option<String>,
    /// A sequence or a version: of the release that their phase is about.
    release: Option<String>,
    /// Labels, joined by commas: `room=kitchen`, or `room` whatever it says.
    label: Option<String>,
    /// Whether they are connected.
    online: Option<bool>,
    /// The stable word for why they failed.
    reason: Option<String>,
    /// Whether their channel has a newer release than theirs.
    behind: Option<bool>,
    /// What they are ordered by; `-` before it turns the order round.
    #[param(pattern = "^-?(node|channel|phase|release|online|changed|platform)$")]
    sort: Option<String>,
    /// How many to leave out.
    #[param(minimum = 0)]
    offset: Option<u64>,
    /// How many to answer at most; 100 if nothing is said.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
}

fn words<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PhaseWord>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let words = text.split(',').filter(|word| !word.is_empty());
    words.map(|word| PhaseWord::deserialize(word.into_deserializer())).collect()
}

/// Nodes, some at a time.
#[utoipa::path(get, path = "/api/nodes", operation_id = "nodes", params(Wanted), responses(
    (status = 200, description = "Those of the page", body = NodePage),
    (status = 304, description = "Nothing changed"),
    (status = 400, description = "A parameter makes no sense"),
))]
pub(super) async fn list(
    State(gateway): Here,
    caller: Caller,
    headers: HeaderMap,
    Asked(wanted): Asked<Wanted>,
) -> Result<Response, Problem> {
    let reach = Reach::of(&caller)?;
    let filter = Filter::new(&wanted)?;
    let order = wanted.sort.as_deref().map_or(Ok(Order::default()), Order::named)?;
    let (offset, limit) = page(wanted.offset, wanted.limit)?;
    let (tag, mut nodes, latest) = {
        let view = gateway.shared.fleet.look().await;
        let tag = Tag::of(&gateway, view.number(), &reach);
        if let Some(same) = tag.same(&headers) {
            return Ok(same);
        }
        let nodes: Vec<Arc<Node>> = match &reach {
            Reach::All => view.nodes().cloned().collect(),
            Reach::Own(own) => view.find(own).cloned().into_iter().collect(),
        };
        let latest = view
            .channels()
            .filter_map(|channel| Some((channel.name.clone(), channel.list.release()?.sequence)));
        (tag, nodes, latest.collect::<HashMap<_, _>>())
    };
    nodes.retain(|node| filter.holds(node, &latest));
    // They come by name, and a stable sort leaves equals so.
    nodes.sort_by(|one, other| order.compare(one, other));
    let total = nodes.len() as u64;
    let nodes = cut(nodes, offset, limit).map(|node| NodeRow::from(&*node)).collect();
    Ok(tag.answer(NodePage { total, offset, limit, nodes }))
}

/// Which nodes are wanted.
struct Filter<'w> {
    wanted: &'w Wanted,
    text: Option<String>,
    query: Option<Query>,
    labels: Vec<(&'w str, Option<&'w str>)>,
}

impl Filter<'_> {
    fn new(wanted: &Wanted) -> Result<Filter<'_>, Problem> {
        let query = wanted.query.as_deref().filter(|query| !query.trim().is_empty());
        let query = query.map(str::parse::<Query>).transpose().map_err(|error| {
            Problem::bad_request(format!("`query`: {error}"))
                .hint("it reads as `label.room = kitchen and not version < 1.3`")
        })?;
        let labels = wanted.label.as_deref().unwrap_or_default().split(',').filter(|label| !label.is_empty());
        let labels = labels.map(|label| match label.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (label, None),
        });
        let text = wanted.q.as_ref().map(|text| text.trim().to_lowercase()).filter(|text| !text.is_empty());
        Ok(Filter { wanted, text, query, labels: labels.collect() })
    }

    fn holds(&self, node: &Node, latest: &HashMap<ChannelName, u64>) -> bool {
        let Wanted { phase, channel, release, online, reason, behind, .. } = self.wanted;
        let state = node.state.as_ref();
        let sequence = state.and_then(|state| state.sequence);
        let version = state.and_then(|state| state.version.as_deref());
        let followed = node.heard().channel();
        (phase.is_empty() || phase.contains(&node.word().into()))
            && channel
                .as_deref()
                .is_none_or(|wanted| followed.as_ref().is_some_and(|followed| followed.as_str() == wanted))
            && release.as_deref().is_none_or(|wanted| {
                version == Some(wanted) || sequence.is_some_and(|sequence| sequence.to_string() == wanted)
            })
            && online.is_none_or(|wanted| wanted == (node.online == Some(true)))
            && reason.as_deref().is_none_or(|wanted| node.reason() == Some(wanted))
            && behind.is_none_or(|wanted| {
                let latest = followed.as_ref().and_then(|channel| latest.get(channel));
                wanted == latest.is_some_and(|latest| sequence.is_none_or(|sequence| sequence < *latest))
            })
            && self.labels.iter().all(|(name, value)| {
                let found = node.info.as_ref().and_then(|info| info.labels.get(*name));
                found.is_some_and(|found| value.is_none_or(|value| found == value))
            })
            && self.query.as_ref().is_none_or(|query| query.holds(&facts(node)))
            && self.text.as_deref().is_none_or(|text| says(node, text))
    }
}

/// What is known of a node, for queries.
fn facts(node: &Node) -> Facts<'_> {
    let running = node.state.as_ref().filter(|state| state.phase == Phase::Idle);
    let running = running.map_or((None, None), |state| (state.sequence, state.version.as_deref()));
    match &node.info {
        Some(info) => Facts {
            channel: node.heard().channel().map(|channel| channel.to_string().into()),
            ..Facts::of(node.id.as_str(), info, running)
        },
        None => Facts {
            node: node.id.as_str().into(),
            sequence: running.0,
            version: running.1.map(Into::into),
            ..Facts::default()
        },
    }
}

/// Whether a node says `text`, which is in lower case, somewhere.
fn says(node: &Node, text: &str) -> bool {
    let says = |said: &str| said.to_lowercase().contains(text);
    let (info, state) = (node.info.as_ref(), node.state.as_ref());
    says(node.id.as_str())
        || state
            .is_some_and(|state| [&state.version, &state.error].into_iter().flatten().any(|said| says(said)))
        || info.is_some_and(|info| {
            says(&info.uname.machine)
                || says(&info.uname.sysname)
                || says(&info.uname.version)
                || info.agent.as_deref().is_some_and(says)
                || info.labels.iter().any(|(name, value)| says(&format!("{name}={value}")))
        })
}

/// What nodes are ordered by.
#[derive(Debug, Clone, Copy, Default)]
struct Order {
    by: By,
    is_turned: bool,
}

#[derive(Debug, Clone, Copy, Default)]
enum By {
    #[default]
    Node,
    Channel,
    Phase,
    Release,
    Online,
    Changed,
    Platform,
}

impl Order {
    fn named(text: &str) -> Result<Order, Problem> {
        let name = text.strip_prefix('-').unwrap_or(text);
        let by = match name {
            "node" => By::Node,
            "channel" => By::Channel,
            "phase" => By::Phase,
            "release" => By::Release,
            "online" => By::Online,
            "changed" => By::Changed,
            "platform" => By::Platform,
            _ => {
                return Err(Problem::bad_request(format!(
                    "nodes are not sorted by `{}`",
                    name.escape_debug()
                ))
                .hint("use node, channel, phase, release, online, changed or platform"));
            }
        };
        Ok(Order { by, is_turned: name.len() < text.len() })
    }

    fn compare(self, one: &Node, other: &Node) -> Ordering {
        let sequence = |node: &Node| node.state.as_ref().and_then(|state| state.sequence);
        let platform = |node: &Node| node.info.as_ref().map(|info| info.uname.sysname.clone());
        let order = match self.by {
            By::Node => one.id.cmp(&other.id),
            By::Channel => one.heard().channel().cmp(&other.heard().channel()),
            By::Phase => one.word().cmp(&other.word()),
            By::Release => sequence(one).cmp(&sequence(other)),
            By::Online => one.online.cmp(&other.online),
            By::Changed => one.changed.cmp(&other.changed),
            By::Platform => platform(one).cmp(&platform(other)),
        };
        if self.is_turned { order.reverse() } else { order }
    }
}

/// One node, with all that is known of it.
#[utoipa::path(get, path = "/api/nodes/{node}", operation_id = "node",
    params(("node" = String, Path, description = "Its name")), responses(
    (status = 200, description = "All that is known of it", body = NodeDetail),
    (status = 304, description = "Nothing changed"),
    (status = 404, description = "There is no such node"),
))]
pub(super) async fn one(
    State(gateway): Here,
    caller: Caller,
    AtNode(id): AtNode,
) -> Result<Json<NodeDetail>, Problem> {
    caller.reads(&id.topic(NodeSubject::State))?;
    let (info, state) = (said(&gateway, &id, NodeSubject::Info)?, said(&gateway, &id, NodeSubject::State)?);
    let view = gateway.shared.fleet.look().await;
    let node = view.find(&id).ok_or_else(|| unknown(&id))?;
    let channel = node.heard().channel().filter(|channel| caller.reads(&channel.topic()).is_ok());
    let latest = channel.and_then(|channel| {
        let release = view.channel(&channel)?.list.release()?;
        Some(Latest { sequence: release.sequence, version: release.version.clone() })
    });
    Ok(Json(NodeDetail {
        row: NodeRow::from(&**node),
        info,
        state,
        latest,
        history: node.updates.iter().map(Into::into).collect(),
        log: view.log.since(&id, 0).map(Into::into).collect(),
    }))
}

fn unknown(id: &NodeId) -> Problem {
    Problem::not_found(format!("there is no node `{id}`"))
        .hint("a node is known when it has published its `info`, `state` or `online`")
}

/// What a node published of itself, whatever is in it.
fn said(gateway: &Gateway, id: &NodeId, subject: NodeSubject) -> Result<Option<serde_json::Value>, Problem> {
    let index = &gateway.shared.index;
    let Some(message) = index.get(&id.topic(subject), clock::now().unix_ms)? else { return Ok(None) };
    let said: Option<serde_json::Value> = serde_json::from_slice(&index.payload(&message.payload)?).ok();
    Ok(said.filter(serde_json::Value::is_object))
}

/// What a node logged last.
#[utoipa::path(get, path = "/api/nodes/{node}/log", operation_id = "node_log",
    params(("node" = String, Path, description = "Its name")), responses(
    (status = 200, description = "Its last lines", body = LogLines),
    (status = 404, description = "There is no such node"),
))]
pub(super) async fn log(
    State(gateway): Here,
    caller: Caller,
    AtNode(id): AtNode,
) -> Result<Json<LogLines>, Problem> {
    caller.reads(&id.topic(NodeSubject::Log))?;
    let view = gateway.shared.fleet.look().await;
    view.find(&id).ok_or_else(|| unknown(&id))?;
    let lines = view.log.since(&id, 0).map(LogLine::from).collect();
    Ok(Json(LogLines { node: id.to_string(), lines }))
}

/// Has a node do something.
#[utoipa::path(post, path = "/api/nodes/{node}/cmd", operation_id = "command_node",
    params(("node" = String, Path, description = "Its name")), request_body = Command, responses(
    (status = 202, description = "The order was sent; what comes of it shows in the node's state", body = Commanded),
    (status = 400, description = "The body makes no sense"),
    (status = 404, description = "There is no such node"),
    (status = 408, description = "The body came too slowly"),
    (status = 413, description = "The body is too large"),
    (status = 415, description = "The body is no JSON"),
))]
pub(super) async fn command(
    State(gateway): Here,
    caller: Caller,
    AtNode(id): AtNode,
    Allowed(()): Allowed,
    Told(Command { action }): Told<Command>,
) -> Result<Response, Problem> {
    let online = {
        let view = gateway.shared.fleet.look().await;
        view.find(&id).ok_or_else(|| unknown(&id))?.online
    };
    let order = match action {
        Action::Check => list::Command::Check,
        Action::Install => list::Command::Install,
        Action::Rollback => list::Command::Rollback,
        Action::Restart => list::Command::Restart,
    };
    let list = UpdateList::new(vec![Entry::Command(order, Default::default())])
        .map_err(|error| Problem::internal(&error))?;
    gateway.tell(id.topic(NodeSubject::Cmd), list.to_bytes().into()).await?;
    tracing::info!(node = %id, ?action, by = %caller.identity, "an order was sent over HTTP");
    let told = Commanded { node: id.to_string(), action, online };
    Ok((StatusCode::ACCEPTED, Json(told)).into_response())
}

/// The caller may send orders to the node in the path: asked before the body is looked at.
pub(super) struct Allowed(());

impl axum::extract::FromRequestParts<Arc<Gateway>> for Allowed {
    type Rejection = Problem;

    async fn from_request_parts(
        parts: &mut axum::http::request::Parts,
        gateway: &Arc<Gateway>,
    ) -> Result<Allowed, Problem> {
        let caller = Caller::from_request_parts(parts, gateway).await?;
        let AtNode(id) = AtNode::from_request_parts(parts, gateway).await?;
        caller.writes(&id.topic(NodeSubject::Cmd)).map(Allowed)
    }
}
