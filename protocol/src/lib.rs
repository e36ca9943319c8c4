//! What goes over the wire between a publisher, a broker and a device.
//!
//! Bytes and meaning only: this crate opens no socket and no file, reads no clock and draws no random
//! number. Every parser is total: any bytes give a value or an error that says where and what.
//!
//! | module | holds |
//! |---|---|
//! | [`chunk`] | packages in pieces, and their topics |
//! | [`digest`] | SHA-256 names of packages |
//! | [`path`] | file names that stay inside a device's root |
//! | [`package`] | package ids and their topics |
//! | [`topic`] | what an MQTT topic means to us, topic names and filters |
//! | [`list`] | update lists and their entries |
//! | [`key`] | public keys and what they signed |
//! | [`root`] | whose signatures count: the chain of roots |
//! | [`signed`] | what a signature covers, and which lists are believed |
//! | [`rollout`] | whose turn it is to take a release |
//! | [`query`] | which nodes a rollout is for |
//! | [`record`] | what is retained of a rollout, and how its nodes stand |
//! | [`node`] | what a device says about itself |
//! | [`wheel`] | the texts inside a wheel |
//! | [`tag`] | which devices a wheel is for |
//! | [`greeting`] | what a broker of ours says about itself |
//! | [`address`] | where a broker is |
//! | [`limits`] | every limit of the wire, by name |

pub mod address;
pub mod chunk;
pub mod digest;
pub mod greeting;
pub mod key;
pub mod limits;
pub mod list;
pub mod node;
pub mod package;
pub mod path;
pub mod query;
pub mod record;
pub mod rollout;
pub mod root;
pub mod signed;
pub mod tag;
pub mod topic;
pub mod wheel;

pub use address::BrokerUrl;
pub use chunk::Chunks;
pub use digest::Digest;
pub use key::{KeyId, PublicKey};
pub use list::{Entry, UpdateList};
pub use package::PackageId;
pub use path::FilePath;
pub use query::Query;
pub use rollout::Rollout;
pub use root::Root;
pub use signed::{Trust, Verified};
pub use tag::{Runtime, Tag};
pub use topic::{ChannelName, NodeId, Topic};
