//! Rollouts: how they stand, and orders to who steers them.

use std::sync::Arc;

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{HeaderMap, StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use mpypi_protocol::{
    ChannelName,
    record::{Order, Status},
    topic::RolloutSubject,
};

use super::{
    AtChannel, Reach, Tag, Told,
    shape::{OrderWord, Ordered, RolloutList, RolloutOrder, RolloutRow},
};
use crate::{
    fleet::view::View,
    gateway::{Caller, Gateway, Here, Problem},
};

/// All rollouts, by their channels.
#[utoipa::path(get, path = "/api/rollouts", operation_id = "rollouts", responses(
    (status = 200, description = "How they stand", body = RolloutList),
    (status = 304, description = "Nothing changed"),
))]
pub(super) async fn list(
    State(gateway): Here,
    caller: Caller,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    caller.reads("mpypi/channels/+/rollout")?;
    let view = gateway.shared.fleet.look().await;
    let tag = Tag::of(&gateway, view.number(), &Reach::All);
    if let Some(same) = tag.same(&headers) {
        return Ok(same);
    }
    let rollouts = view.rollouts().filter_map(|rollout| row(&view, &rollout.record.channel)).collect();
    Ok(tag.answer(RolloutList { rollouts }))
}

/// How the rollout of a channel stands now.
fn row(view: &View, channel: &ChannelName) -> Option<RolloutRow> {
    let rollout = view.rollout(channel)?;
    Some(RolloutRow::of(view, rollout, view.counts(channel).unwrap_or_default()))
}

fn none(channel: &ChannelName) -> Problem {
    Problem::not_found(format!("channel `{channel}` has no rollout"))
        .hint(format!("start one with `mpypi rollout {channel}`"))
}

/// The rollout of a channel.
#[utoipa::path(get, path = "/api/channels/{channel}/rollout", operation_id = "rollout",
    params(("channel" = String, Path, description = "Its name")), responses(
    (status = 200, description = "How it stands", body = RolloutRow),
    (status = 404, description = "There is none"),
))]
pub(super) async fn one(
    State(gateway): Here,
    caller: Caller,
    AtChannel(channel): AtChannel,
) -> Result<Json<RolloutRow>, Problem> {
    caller.reads(&channel.rollout(RolloutSubject::Record))?;
    let view = gateway.shared.fleet.look().await;
    row(&view, &channel).map(Json).ok_or_else(|| none(&channel))
}

/// Passes an order on to who steers a channel's rollout.
#[utoipa::path(post, path = "/api/channels/{channel}/rollout", operation_id = "order_rollout",
    params(("channel" = String, Path, description = "Its name")), request_body = RolloutOrder, responses(
    (status = 202, description = "The order was sent; what comes of it shows in the rollout", body = Ordered),
    (status = 400, description = "The body makes no sense"),
    (status = 404, description = "There is no rollout"),
    (status = 408, description = "The body came too slowly"),
    (status = 409, description = "There is nothing to do about it, or nobody who would do it"),
    (status = 413, description = "The body is too large"),
    (status = 415, description = "The body is no JSON"),
))]
pub(super) async fn order(
    State(gateway): Here,
    caller: Caller,
    Allowed(channel): Allowed,
    Told(RolloutOrder { order: word }): Told<RolloutOrder>,
) -> Result<Response, Problem> {
    let (status, is_steered) = {
        let view = gateway.shared.fleet.look().await;
        let rollout = view.rollout(&channel).ok_or_else(|| none(&channel))?;
        (rollout.record.status, view.is_steered(&channel))
    };
    let (order, verb) = match word {
        OrderWord::Pause => (Order::Pause, "pause"),
        OrderWord::Resume => (Order::Resume, "resume"),
        OrderWord::Abort => (Order::Abort, "abort"),
    };
    let makes_sense = matches!(
        (order, status),
        (Order::Pause, Status::Running)
            | (Order::Resume, Status::Paused)
            | (Order::Abort, Status::Running | Status::Paused)
    );
    let conflict = |detail| Problem::new(StatusCode::CONFLICT, detail);
    if !makes_sense {
        return Err(conflict(format!(
            "the rollout of channel `{channel}` is {status}: there is nothing to {verb}"
        ))
        .hint(format!("see `mpypi rollout status {channel}`")));
    }
    if !is_steered {
        // Whoever carries an order out publishes lists, and signs them where the channel has keys.
        return Err(conflict(format!("nobody steers the rollout of channel `{channel}` now"))
            .hint(format!("run `mpypi rollout {verb} {channel}` where its key is")));
    }
    let payload = serde_json::to_vec(&order).map_err(|error| Problem::internal(&error))?;
    gateway.tell(channel.rollout(RolloutSubject::Order), payload.into()).await?;
    tracing::info!(%channel, verb, by = %caller.identity, "an order to a rollout was sent over HTTP");
    Ok((StatusCode::ACCEPTED, Json(Ordered { channel: channel.to_string(), order: word })).into_response())
}

/// The channel in the path, whose rollout the caller may give orders to: asked before the body is looked at.
pub(super) struct Allowed(ChannelName);

impl FromRequestParts<Arc<Gateway>> for Allowed {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Allowed, Problem> {
        let caller = Caller::from_request_parts(parts, gateway).await?;
        let AtChannel(channel) = AtChannel::from_request_parts(parts, gateway).await?;
        caller.writes(&channel.rollout(RolloutSubject::Order))?;
        Ok(Allowed(channel))
    }
}
