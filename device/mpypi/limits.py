"""Every limit of the agent, by name. Those of the wire are as in protocol/src/limits.rs, those of the store
as in agent-sim/src/limits.rs. Those of what is not always in memory are in `bounds`."""

from micropython import const

# How much of a file is held in memory while it is written, read or hashed, in bytes.
PIECE = const(1024)

# The wire.

# Largest update list, in bytes.
LIST = const(1048576)
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
LINE = const(1024)
# Most bytes a wheel may unpack to: a bomb is refused here, whatever its headers say.
WHEEL_UNPACKED = const(33554432)
# Longest `error` of a state message, in bytes.
ERROR_TEXT = const(500)
# Room for the records to come, taken before the commit, in bytes: a flash that is full by then cannot keep a
# release from being confirmed or rolled back.
RESERVE = const(8192)

# The line. Times are in milliseconds, but for KEEP_ALIVE.

# Largest MQTT packet, in bytes.
PACKET = const(16777216)
# Longest topic, in bytes of UTF-8.
TOPIC = const(1024)
# Longest channel name and node name, in bytes of UTF-8.
CHANNEL_NAME = const(64)
NODE_NAME = const(128)
# Longest package name, version, tag or other short text of an entry, in bytes of UTF-8.
TEXT = const(128)
# Longest key or value of an entry that this agent reads, in bytes: what is longer is skipped, or refused.
VALUE = const(1024)
# Deepest nesting of a list.
DEPTH = const(127)
# Most entries of a list that this agent takes.
ENTRIES = const(4096)
# For TCP to connect.
CONNECT = const(10000)
# For TLS, and the answer to CONNECT: a slow chip needs seconds.
HANDSHAKE = const(20000)
# For the rest of what has begun: a packet's header, or the next piece of its payload.
READ = const(10000)
# For a packet to be taken.
WRITE = const(10000)
# What the broker is told, in seconds. A ping goes out after half of it.
KEEP_ALIVE = const(60)
# For the answer to a ping.
PONG = const(10000)
# For the last words before a restart to arrive.
GOODBYE = const(2000)
# Between two looks at a connection that is silent.
NAP_MOST = const(32)

# The update, as in agent-sim/src/limits.rs, with times in milliseconds.

# Packages asked for at a time.
WINDOW = const(4)
# For any of the packages asked for.
FETCH_STALL = const(10000)
# How often a release is tried before the agent gives up until the next list or connection.
ATTEMPTS = const(5)
# How often a package that arrived damaged is fetched, before the agent gives up until the next list or connection.
FETCHES = const(2)
# How often the channel's list is asked for although none came: a message may have been lost on the way. A quarter more
# or less, so that a fleet does not ask at once.
CHECK = const(3600000)
# The first and the longest pause before a release is tried again.
RETRY_FIRST = const(500)
RETRY_MOST = const(30000)
# The first and the longest pause before the broker is tried again.
RECONNECT_FIRST = const(200)
RECONNECT_MOST = const(15000)
# How long a new release runs until it is confirmed, unless told otherwise.
CONFIRM_AFTER = const(30000)
# The shortest time between two reports of progress within one phase.
PROGRESS = const(500)
# Between two looks at what other code asked of the agent.
LOOK = const(1000)
# With more free memory than this, in bytes, modules that are not needed for a while are kept nevertheless.
PLENTY = const(98304)
# With less free memory than this, in bytes, the connection is ended before a release is unpacked.
ROOM = const(32768)
# What unpacking needs in one piece, in bytes: a window of 4 KiB and 1.4 KiB of tables.
INFLATE = const(5760)
