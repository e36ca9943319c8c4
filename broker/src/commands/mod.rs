//! The commands that work on an index, whether a broker runs on it or not.

pub(crate) mod backup;
pub(crate) mod check;
pub(crate) mod gc;
pub(crate) mod progress;
pub(crate) mod restore;

pub(crate) use progress::hint;
