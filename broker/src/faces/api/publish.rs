//! A form that becomes a release.
