//! The publisher: packs a folder into wheels and source files, and publishes it as a channel of update lists
//! through any MQTT broker.
//!
//! A publish goes down this street:
//!
//! | module | does |
//! |---|---|
//! | [`settings`] | `channel.toml` → settings |
//! | [`walk`], [`promoter`] | which files of a folder count |
//! | [`wheel`] | a project or a `.whl` → a wheel in the one form that every installer accepts |
//! | [`firmware`] | what an image is called, which version it is, and for which hardware |
//! | [`compile`] | the Python source of wheels → bytecode and machine code, by mpy-cross |
//! | [`channel`] | a folder → packages |
//! | [`places`] | which of their files want the same place on a device |
//! | [`lint`] | what a release would do to devices that run Mpy-BLOX. No I/O |
//! | [`plan`] | packages and the present list → the new list and what it needs. No I/O, no clock |
//! | [`retained`] | what a broker has |
//! | [`cut`](mod@cut) | packages whole or, where a broker takes no large packets, in chunks |
//! | [`git`] | a folder of a repository, at one commit |
//! | [`publish`](mod@publish) | packages, then the list, then read back |
//! | [`keys`], [`signing`] | who can sign, who may, and the chain of roots |
//! | [`history`], [`reissue`] | what a channel had, and how it has it again |
//! | [`agree`] | whether all nodes of a cluster have it, and what to do if not. No I/O, no clock |
//! | [`settle`](mod@settle) | looks at each of them, and does it |
//! | [`compare`](mod@compare) | what a channel looks like through each of them |
//! | [`doctor`](mod@doctor) | whether a broker is fit, found out by trying it |
//! | [`link`] | one MQTT connection |
//! | [`rollout`] | a release for few nodes first, then for more, as long as it goes well |
//!
//! [`watch`](mod@watch) does it at every change, [`rehearse`](mod@rehearse) does it to a fleet of its own, [`clock`] tells devices the time, [`install`](mod@install) puts a first wheel on a node that runs Mpy-BLOX, [`push`](mod@push) brings firmware to devices with projectMM, [`status`](mod@status) shows what came of it,
//! [`progress`] and [`report`] are what people and programs see, [`limits`] names every limit. [`cli`] is the
//! command line.
//!
//! Absent on purpose: no build tool but mpy-cross is run, no link is followed, nothing outside the folder has a say.

pub mod agree;
pub mod channel;
pub mod cli;
pub mod clock;
pub mod compare;
pub mod compile;
pub mod cut;
pub mod doctor;
pub mod firmware;
pub mod git;
pub mod history;
pub mod install;
pub mod keys;
pub mod limits;
pub mod link;
pub mod lint;
pub mod places;
pub mod plan;
pub mod progress;
pub mod promoter;
pub mod publish;
pub mod push;
pub mod rehearse;
pub mod reissue;
pub mod report;
pub mod retained;
pub mod rollout;
pub mod settings;
pub mod settle;
pub mod signing;
pub mod status;
pub mod verify;
pub mod walk;
pub mod watch;
pub mod wheel;

mod commands;
