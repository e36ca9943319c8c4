//! What a broker of ours says about itself when it lets an MQTT 5 client in: user properties of CONNACK (section
//! 3.2.2.3.10). Whoever does not know them reads past them; no right is needed to hear them.

/// The user property that names a kind of device for which the broker makes lists fit, one for each kind.
pub const SERVES: &str = "mpypi-serves";

/// Devices that run Mpy-BLOX: each is served a list that it can take, whatever the channel holds.
pub const MPY_BLOX: &str = "mpy-blox";

/// The user property that says how large a package, or a chunk of one, may be, in bytes.
pub const PACKAGE: &str = "mpypi-package";
