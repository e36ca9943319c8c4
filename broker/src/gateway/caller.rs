//! Who asks over HTTP, by the broker's users, and what they may.
//!
//! | shown | who that is |
//! |---|---|
//! | a client certificate | the node it is made out to |
//! | `Authorization: Basic`, name and password or token | that user |
//! | `Authorization: Basic`, name `__token__` and a token | the token's user, as PyPI's tools have it |
//! | `Authorization: Bearer` and a token | the token's user |

use std::{net::SocketAddr, sync::Arc};

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;

use super::{Gateway, Here, Problem, site::Door};
use crate::{
    access::{
        Identity,
        gate::{Login, Shown},
    },
    listen::{tls::ClientCertificate, websocket::comes_from_here},
    packet::Reason,
    server::Access,
};

/// The name that stands for none, before a token.
const TOKEN: &str = "__token__";

/// Who a request comes from. A route behind [`Door::Open`] has none.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Who that is.
    pub identity: Identity,
    /// With what they came in; `None` if nobody needs a login, or for a guest.
    pub login: Option<Login>,
}

/// Where a request comes from.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// The certificate that the connection showed.
    pub certificate: Option<Arc<ClientCertificate>>,
}

impl Caller {
    /// Fails unless everything that `filter` matches may be read.
    ///
    /// # Errors
    /// 403.
    pub fn reads(&self, filter: &str) -> Result<(), Problem> {
        match self.identity.may_subscribe(filter) {
            true => Ok(()),
            false => Err(self.forbidden("read")),
        }
    }

    /// Fails unless `topic` may be published to.
    ///
    /// # Errors
    /// 403.
    pub fn writes(&self, topic: &str) -> Result<(), Problem> {
        match self.identity.may_publish(topic) {
            true => Ok(()),
            false => Err(self.forbidden("change")),
        }
    }

    fn forbidden(&self, what: &str) -> Problem {
        Problem::new(StatusCode::FORBIDDEN, format!("{} may not {what} this", self.identity))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Caller, Problem> {
        parts.extensions.get().cloned().ok_or_else(|| {
            tracing::error!(
                path = parts.uri.path(),
                "a handler wants to know who calls behind a door that does not ask"
            );
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "the broker failed; its log says why")
        })
    }
}

/// Lets a request through its door, with its [`Caller`] if the door asks for it.
pub(super) async fn ask(State(gateway): Here, door: Door, mut request: Request, next: Next) -> Response {
    if door != Door::Open {
        let peer = request.extensions().get().cloned();
        let is_reading = request.method().is_safe();
        match recognise(&gateway, door, peer, is_reading, request.headers()).await {
            Ok(caller) => request.extensions_mut().insert(caller),
            Err(problem) => return problem.into_response(),
        };
    }
    next.run(request).await
}

async fn recognise(
    gateway: &Gateway,
    door: Door,
    peer: Option<Peer>,
    is_reading: bool,
    headers: &HeaderMap,
) -> Result<Caller, Problem> {
    let shared = &gateway.shared;
    // A browser that was logged in here once logs in again by itself, whatever page has it ask.
    if !is_reading && !comes_from_us(headers) {
        return Err(Problem::new(StatusCode::FORBIDDEN, "no page of another site may change anything"));
    }
    let unknown = || Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "nobody knows where this comes from");
    let Peer { address, certificate } = peer.ok_or_else(unknown)?;
    let mut shown = shown(headers)?;
    if let Door::Guests(channel) = door
        && shown.name.is_none()
        && shown.token.is_none()
    {
        return Ok(Caller { identity: Identity::Guest(channel), login: None });
    }
    let is_guarded = shared.gate.is_guarded() || certificate.is_some();
    if !is_guarded && shared.access == Access::Loopback && !is_local(headers) {
        let text = "without users, only web pages of this machine may ask";
        return Err(Problem::new(StatusCode::FORBIDDEN, text)
            .hint("use `localhost` or an address in the URL, or add a user with `mpypi-broker user add`"));
    }
    shown.certificate = certificate;
    match shared.gate.identify(address.ip(), shown).await {
        Ok((identity, login)) => Ok(Caller { identity, login }),
        Err(refusal) if matches!(refusal.reason, Reason::NotAuthorized | Reason::BadUserNameOrPassword) => {
            Err(unauthorized(refusal.text))
        }
        Err(refusal) => Err(refusal.into()),
    }
}

fn unauthorized(detail: impl Into<String>) -> Problem {
    let scheme = HeaderValue::from_static("Basic realm=\"mpypi\", charset=\"UTF-8\"");
    Problem::new(StatusCode::UNAUTHORIZED, detail)
        .hint("log in with a name and password, or a token of `mpypi-broker user add --token` as `Bearer`")
        .header(header::WWW_AUTHENTICATE, scheme)
}

/// What a request shows of its caller.
///
/// # Errors
/// 401 for an `Authorization` that is none of those known.
pub fn shown(headers: &HeaderMap) -> Result<Shown, Problem> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(Shown::default()) };
    let wrong = || unauthorized("`Authorization` is neither `Basic` nor `Bearer` with what belongs to it");
    let (scheme, rest) = value.to_str().ok().and_then(|value| value.split_once(' ')).ok_or_else(wrong)?;
    let token =
        |token: &str| Shown { token: Some(Bytes::copy_from_slice(token.as_bytes())), ..Shown::default() };
    match scheme.to_ascii_lowercase().as_str() {
        "bearer" => Ok(token(rest.trim())),
        "basic" => {
            let decoded = STANDARD.decode(rest.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            match decoded.as_deref().and_then(|decoded| decoded.split_once(':')).ok_or_else(wrong)? {
                (TOKEN, password) => Ok(token(password)),
                (name, password) => Ok(Shown {
                    name: Some(name.to_owned()),
                    password: Some(Bytes::copy_from_slice(password.as_bytes())),
                    ..Shown::default()
                }),
            }
        }
        _ => Err(wrong()),
    }
}

/// Whether no web page asks, or one that came from where it asks.
fn comes_from_us(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, place)| place);
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    origin.is_some_and(|origin| host.is_some_and(|host| origin.eq_ignore_ascii_case(host)))
}

/// Whether no web page asks, or one of this machine. Another site's page names itself as `Origin`; one that has had
/// its own name lead here names it as `Host`.
fn is_local(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return comes_from_here(headers) };
    let authority = host.to_str().ok().and_then(|host| host.parse::<axum::http::uri::Authority>().ok());
    let host = authority.as_ref().map_or("", |authority| authority.host());
    let is_address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>().is_ok();
    (is_address || host == "localhost") && comes_from_here(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn name_and_password_or_a_token_are_understood_and_nothing_else() {
        let shown = |value: &str| {
            let shown = shown(&headers(&[(header::AUTHORIZATION, value)]));
            shown.map(|shown| (shown.name, shown.password, shown.token)).map_err(|problem| problem.code())
        };
        let text = |text: &'static str| Some(Bytes::from_static(text.as_bytes()));
        assert_eq!(shown("Basic Y2k6czplY3JldA=="), Ok((Some("ci".into()), text("s:ecret"), None)));
        assert_eq!(shown("basic X190b2tlbl9fOnRvaw=="), Ok((None, None, text("tok"))));
        assert_eq!(shown("Bearer tok"), Ok((None, None, text("tok"))));
        for wrong in ["", "Basic", "Basic !", "Basic Y2k=", "Digest x", "Bearer"] {
            assert_eq!(shown(wrong), Err(StatusCode::UNAUTHORIZED), "{wrong}");
        }
    }

    #[test]
    fn a_page_changes_only_what_it_came_from() {
        let ours = |host: &str, origin: &str| {
            comes_from_us(&headers(&[(header::HOST, host), (header::ORIGIN, origin)]))
        };
        assert!(comes_from_us(&headers(&[(header::HOST, "hub")])));
        assert!(ours("hub:8080", "http://hub:8080") && ours("Hub", "https://hub"));
        assert!(
            !ours("hub", "http://evil.example") && !ours("hub", "null") && !ours("hub:8080", "http://hub")
        );
    }

    #[test]
    fn another_sites_page_is_none_of_this_machine() {
        let local = |pairs: &[(header::HeaderName, &str)]| is_local(&headers(pairs));
        assert!(local(&[]));
        for host in ["localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080", "192.168.1.2"] {
            assert!(local(&[(header::HOST, host)]), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:8080", "", "127.0.0.1.evil.example"] {
            assert!(!local(&[(header::HOST, host)]), "{host}");
        }
        assert!(local(&[(header::HOST, "localhost"), (header::ORIGIN, "http://localhost:8080")]));
        assert!(!local(&[(header::HOST, "localhost"), (header::ORIGIN, "http://evil.example")]));
        assert!(!local(&[(header::HOST, "localhost"), (header::ORIGIN, "null")]));
    }
}
