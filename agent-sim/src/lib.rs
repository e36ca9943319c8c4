//! A simulated device: everything a real one does, from an update list on a topic to files in their place.
//!
//! | module | holds |
//! |---|---|
//! | [`flash`] | the few file-system operations a device has; a disk, a memory, a power cut |
//! | [`journal`] | the records a device keeps |
//! | [`store`] | staged, journaled installs that survive a power cut at any operation |
//! | [`wheel`] | unpacking a wheel by its RECORD |
//! | [`accept`] | whether to believe an update list |
//! | [`refusal`] | why something is not applied, and what follows |
//! | [`backoff`] | how long to wait before trying again |
//! | [`choice`] | at which of several addresses a node is |
//! | [`parts`] | a package in chunks, as far as it has come |
//! | [`window`] | what is asked for of what is needed |
//! | [`update`] | the update as a state machine |
//! | [`device`] | the two together, without a connection |
//! | [`apps`] | packages as somebody at the device chooses them: tasks |
//! | [`firmware`], [`slots`] | a new firmware on its way; where it is, and which one starts |
//! | [`version`] | which of two versions is newer, where no sequence says it |
//! | [`face`] | the device's own interfaces over HTTP |
//! | [`node`] | a device on an MQTT connection |
//! | [`blox`] | a device with Mpy-BLOX instead |
//! | [`fleet`] | many nodes in one process, and what became of them |
//! | [`weather`] | what befalls a node of a fleet |
//! | [`limits`] | every limit, by name |
//!
//! Nothing but [`node`], [`fleet`] and [`face`] reads a clock or opens a socket.

pub mod accept;
pub mod apps;
pub mod backoff;
pub mod blox;
pub mod choice;
pub mod device;
pub mod face;
pub mod firmware;
pub mod flash;
pub mod fleet;
mod image;
mod install;
pub mod journal;
pub mod limits;
pub mod node;
pub mod parts;
pub mod refusal;
pub mod slots;
pub mod store;
pub mod update;
pub mod version;
pub mod weather;
pub mod wheel;
pub mod window;

#[cfg(test)]
mod sim;
#[cfg(test)]
mod testing;
