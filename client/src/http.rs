//! An HTTP client that trusts whom the rest of the program trusts. It blocks: it belongs on a thread of its own.

use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use ureq::{
    Agent,
    tls::{Certificate, RootCerts, TlsConfig},
};

use crate::{
    args::TrustArgs,
    limits,
    trust::{self, TrustError},
};

/// A client that follows so many redirects, and no proxy. An answer that is no success is an answer, not an error.
///
/// # Errors
/// Says which file is wrong.
pub fn agent(trust: &TrustArgs, redirects: u32) -> Result<Agent, TrustError> {
    let roots: Vec<_> =
        trust::roots(trust)?.iter().map(|root| Certificate::from_der(root).to_owned()).collect();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
        .build();
    let config = Agent::config_builder()
        .tls_config(tls)
        .max_redirects(redirects)
        .http_status_as_error(false)
        .proxy(None)
        // A server may close what it did not say it would.
        .max_idle_connections(0)
        .timeout_connect(Some(limits::CONNECT))
        .timeout_recv_response(Some(limits::STALL))
        .timeout_recv_body(Some(limits::BODY))
        .build();
    Ok(Agent::new_with_config(config))
}
