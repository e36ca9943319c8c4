//! Fetches a firmware image from an HTTP server, on a thread of its own: redirects are followed, certificates verified.

use std::io::Read;

use bytes::Bytes;
use mpypi_client::{args::TrustArgs, http};
use mpypi_protocol::Digest;
use tokio_util::sync::CancellationToken;

use super::desk::{Ask, Bell, FlashAsk};
use crate::{firmware::version_in, limits};

/// What to fetch.
#[derive(Debug)]
pub(super) struct Order {
    /// The number of the update.
    pub(super) session: u64,
    /// Where from.
    pub(super) url: String,
    /// The digest it must have.
    pub(super) expected: Option<Digest>,
    /// What to call it, if it does not say so itself, and its URL neither.
    pub(super) version: Option<String>,
}

/// Starts; how it goes, the device says.
///
/// # Errors
/// The cause that is shown.
pub(super) fn start(
    order: Order,
    bell: Bell,
    trust: &TrustArgs,
    stop: CancellationToken,
) -> Result<(), String> {
    let trust = trust.clone();
    let run = move || {
        let session = order.session;
        if let Err(Failed(cause)) = fetch(&order, &bell, &trust, &stop) {
            bell.tell_and_block(Ask::Flash(FlashAsk::Abort(session, cause)));
        }
    };
    let thread = std::thread::Builder::new().name("fetch".to_owned()).spawn(run);
    thread.map(drop).map_err(|_| "task create failed".to_owned())
}

/// Why nothing more comes; `None`: it ended early.
struct Failed(Option<String>);

fn fetch(order: &Order, bell: &Bell, trust: &TrustArgs, stop: &CancellationToken) -> Result<(), Failed> {
    let failed = |name: &str| Failed(Some(format!("ota begin {name}")));
    let agent = http::agent(trust, limits::REDIRECTS).map_err(|_| failed("ESP_ERR_INVALID_STATE"))?;
    let response = agent.get(&order.url).call().map_err(|error| match error {
        ureq::Error::TooManyRedirects | ureq::Error::RedirectFailed => failed("ESP_ERR_HTTP_MAX_REDIRECT"),
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => failed("ESP_ERR_INVALID_ARG"),
        ureq::Error::Timeout(_) => failed("ESP_ERR_TIMEOUT"),
        _ => failed("ESP_ERR_HTTP_CONNECT"),
    })?;
    if response.status() != 200 {
        return Err(failed("ESP_FAIL"));
    }
    let total = response.body().content_length();
    // The device says itself what is wrong with what it is given.
    let told = |answer| match answer {
        Ok(Ok(())) => true,
        Ok(Err(_)) | Err(_) => false,
    };
    if !told(bell.ask_and_block(|reply| Ask::Flash(FlashAsk::Begin(order.session, total, reply)))) {
        return Ok(());
    }
    let mut reader = response.into_body().into_reader();
    let mut piece = vec![0; limits::FETCH_PIECE];
    loop {
        if stop.is_cancelled() {
            return Err(Failed(None));
        }
        let length = match reader.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => length,
            Err(_) => return Err(Failed(None)),
        };
        let bytes = Bytes::copy_from_slice(&piece[..length]);
        if !told(bell.ask_and_block(|reply| Ask::Flash(FlashAsk::Push(order.session, bytes, reply)))) {
            return Ok(());
        }
    }
    let finish = |reply| {
        Ask::Flash(FlashAsk::Finish {
            session: order.session,
            expected: order.expected,
            version: version_in(&order.url).or_else(|| order.version.clone()),
            reply,
        })
    };
    told(bell.ask_and_block(finish));
    Ok(())
}
