//! A device among the things of Home Assistant, as projectMM shows itself there: what it runs and what there is, and an
//! order to install it.

use mpypi_protocol::{NodeId, topic::NodeSubject};
use serde_json::json;

use super::Status;

/// The last six hexadecimal digits of a MAC address, by which Home Assistant knows a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mac(String);

impl Mac {
    /// Reads a MAC address, as `30:ae:a4:07:0d:64`, or its last six digits.
    ///
    /// # Errors
    /// Says what one is.
    pub fn new(text: &str) -> Result<Mac, String> {
        let digits: String = text.chars().filter(|c| !matches!(c, ':' | '-')).collect();
        match matches!(digits.len(), 6 | 12) && digits.bytes().all(|c| c.is_ascii_hexdigit()) {
            true => Ok(Mac(digits[digits.len() - 6..].to_ascii_uppercase())),
            false => Err("use a MAC address, as 30:ae:a4:07:0d:64".to_owned()),
        }
    }

    /// Where an order to install comes.
    #[must_use]
    pub fn set(&self) -> String {
        format!("projectMM/{}/update/set", self.0)
    }

    /// Where it says what it runs, and what: retained.
    #[must_use]
    pub fn state(&self, status: &Status) -> (String, Vec<u8>) {
        let state = json!({
            "installed_version": status.version,
            "latest_version": status.latest.as_ref().unwrap_or(&status.version),
            "release_url": "",
            "title": "Firmware",
            "in_progress": status.status.is_some() && !status.is_error,
        });
        (format!("projectMM/{}/update/state", self.0), state.to_string().into_bytes())
    }

    /// How Home Assistant finds it: retained. Whether it is there, its node says.
    #[must_use]
    pub fn discovery(&self, node: &NodeId) -> (String, Vec<u8>) {
        let id = format!("projectMM_{}", self.0);
        let config = json!({
            "name": "Firmware",
            "unique_id": format!("{id}_update"),
            "device_class": "firmware",
            "state_topic": format!("projectMM/{}/update/state", self.0),
            "command_topic": self.set(),
            "payload_install": "install",
            "availability_topic": node.topic(NodeSubject::Online),
            "payload_available": "1",
            "payload_not_available": "0",
            "device": { "identifiers": [id], "name": node, "model": "projectMM" },
        });
        (format!("homeassistant/update/{id}/config"), config.to_string().into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_is_known_by_its_last_six_digits() {
        for text in ["30:ae:a4:07:0d:64", "30aea4070d64", "070d64", "30-AE-A4-07-0D-64"] {
            assert_eq!(Mac::new(text).unwrap().set(), "projectMM/070D64/update/set", "{text}");
        }
        for text in ["", "070d6g", "30aea4070d6400"] {
            assert!(Mac::new(text).is_err(), "{text}");
        }
    }
}
