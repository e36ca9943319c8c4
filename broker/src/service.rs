//! What a service manager such as systemd is told: that the broker serves, that it stops, and all the time
//! between that messages get through.

use sd_notify::NotifyState;

use crate::connection::Shared;

/// The broker serves from now on.
pub fn ready() {
    tell(NotifyState::Ready);
}

/// The broker stops from now on.
pub fn stopping() {
    tell(NotifyState::Stopping);
}

/// Feels the broker's pulse as often as the service manager wants to hear of it, until dropped. One that is
/// told nothing for too long starts the broker anew.
pub async fn watch(shared: &Shared) {
    let Some(period) = sd_notify::watchdog_enabled().filter(|period| !period.is_zero()) else { return };
    loop {
        match shared.pulse.feel(shared).await {
            Ok(_) => tell(NotifyState::Watchdog),
            Err(ill) => tracing::error!("{ill}"),
        }
        // Twice as often as it has to be.
        tokio::time::sleep(period / 2).await;
    }
}

fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot reach the service manager");
    }
}
