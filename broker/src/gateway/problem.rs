//! How a refusal is told over HTTP: problem details (RFC 9457), with a hint. The client is told less than the log.

use std::error::Error;

use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

use crate::{
    index::IndexError,
    message::{Refusal, chain},
    packet::Reason,
};

/// Why a request is refused, or failed.
#[derive(Debug)]
pub struct Problem(Box<Told>);

#[derive(Debug)]
struct Told {
    code: StatusCode,
    detail: String,
    hint: Option<String>,
    headers: HeaderMap,
}

impl Problem {
    /// A refusal with `code`; `detail` is for people.
    #[must_use]
    pub fn new(code: StatusCode, detail: impl Into<String>) -> Problem {
        Problem(Box::new(Told { code, detail: detail.into(), hint: None, headers: HeaderMap::new() }))
    }

    /// There is nothing like that.
    #[must_use]
    pub fn not_found(detail: impl Into<String>) -> Problem {
        Problem::new(StatusCode::NOT_FOUND, detail)
    }

    /// The request makes no sense.
    #[must_use]
    pub fn bad_request(detail: impl Into<String>) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, detail)
    }

    /// Something failed that the client can do nothing about: the log has all of it.
    #[must_use]
    pub fn internal(error: &dyn Error) -> Problem {
        tracing::error!("a request failed: {}", chain(error));
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "the broker failed; its log says why")
    }

    /// The same with what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Problem {
        self.0.hint = Some(hint.into());
        self
    }

    /// The same with a header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Problem {
        self.0.headers.append(name, value);
        self
    }

    /// The status.
    #[must_use]
    pub fn code(&self) -> StatusCode {
        self.0.code
    }

    /// What is wrong, for clients whose contract has a text of its own form.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.0.detail
    }
}

impl From<IndexError> for Problem {
    fn from(error: IndexError) -> Problem {
        Problem::internal(&error)
    }
}

/// As MQTT's reasons are told in HTTP.
impl From<Refusal> for Problem {
    fn from(Refusal { reason, text }: Refusal) -> Problem {
        let code = match reason {
            Reason::BadUserNameOrPassword => StatusCode::UNAUTHORIZED,
            Reason::NotAuthorized => StatusCode::FORBIDDEN,
            Reason::PayloadFormatInvalid => StatusCode::UNPROCESSABLE_ENTITY,
            Reason::TopicNameInvalid => StatusCode::BAD_REQUEST,
            Reason::PacketTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Reason::QuotaExceeded => StatusCode::INSUFFICIENT_STORAGE,
            Reason::ImplementationSpecificError => StatusCode::CONFLICT,
            Reason::ServerBusy => StatusCode::TOO_MANY_REQUESTS,
            Reason::ServerShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Problem::new(code, text)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let Told { code, detail, hint, headers } = *self.0;
        let mut body = serde_json::json!({
            "title": code.canonical_reason().unwrap_or("Refused"),
            "status": code.as_u16(),
            "detail": detail,
        });
        if let Some(hint) = hint {
            body["hint"] = hint.into();
        }
        let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"))];
        let mut response = (code, kind, body.to_string()).into_response();
        response.headers_mut().extend(headers);
        response
    }
}
