//! ThingsBoard's device API: devices that speak it update from a channel, unmodified.
//!
//! An access token makes a client a device (`mpypi-broker device`): token → node → channel. The channel's list is what
//! ThingsBoard calls an assigned package:
//!
//! | the list has | the device is told |
//! |---|---|
//! | an image for its hardware, or for all | `fw_title`: the channel, `fw_version`: the release's version, size and checksum; pieces of it come from us |
//! | files alone | the same title and version, and `fw_url`: the address of a git repository, which [`github`] is |
//! | nothing for it, or it is not its turn in a rollout | none of these |
//!
//! What the device says of itself becomes the node's `info` and `state` in the index, so it appears like every other
//! node; its own attributes are part of `info`, to the letter: `1.10` is no number.
//!
//! | module | holds |
//! |---|---|
//! | [`ask`] | what devices ask, parsed |
//! | [`package`] | a channel's list → a package and its attributes |
//! | [`session`] | a session by MQTT, as a state machine |
//! | [`report`] | what a device says of its update → the node's `info` and `state` |
//! | [`checksum`] | seven checksums |
//! | [`desk`] | driver: what all devices share, and the way to the index |
//! | [`link`] | driver: a session's way to both |
//! | [`http`] | the same API over HTTP |
//! | [`github`] | the part of GitHub's API that cOTA updates from |
//!
//! By MQTT, everything a device sends on a topic that is not ours ends here: it is answered, or acknowledged and
//! ignored, and never routed.

pub mod ask;
pub mod checksum;
pub mod desk;
pub mod github;
pub mod http;
pub mod link;
pub mod package;
pub mod report;
pub mod session;
