//! Faces: foreign systems' APIs on top of the index. Their devices update from a channel, unmodified.
//!
//! | module | whose devices |
//! |---|---|
//! | [`thingsboard`] | ThingsBoard's, by MQTT and HTTP; cOTA's, with GitHub's API beside it |

pub mod thingsboard;
