"""Every limit of the agent, by name. Those of the wire are as in protocol/src/limits.rs, those of the store as in
agent-sim/src/limits.rs."""

from micropython import const

# How much of a file is held in memory while it is written, read or hashed, in bytes.
PIECE = const(1024)

# The wire.

# Largest update list, in bytes.
LIST = const(1048576)
# Most entries in one update list.
LIST_ENTRIES = const(16384)
# Largest package, in bytes.
PACKAGE = const(8388608)
# Longest path of a file on a device, in bytes of UTF-8.
PATH = const(512)
# Most components in a path.
PATH_COMPONENTS = const(60)

# The store.

# Most members of a wheel.
WHEEL_MEMBERS = const(4096)
# Largest RECORD or METADATA of a wheel, in bytes.
WHEEL_TEXT = const(1048576)
# Longest line of a RECORD, METADATA or record of ours, in bytes.
LINE = const(2048)
# Most bytes a wheel may unpack to: a bomb is refused here, whatever its headers say.
WHEEL_UNPACKED = const(33554432)
# How often a release may boot without being confirmed, and a committed install may fail to complete, before it is
# rolled back.
UNCONFIRMED_BOOTS = const(3)
# Longest `error` of a state message, in bytes.
ERROR_TEXT = const(500)
# Room for the records to come, taken before the commit, in bytes: a flash that is full by then cannot keep a
# release from being confirmed or rolled back.
RESERVE = const(8192)
