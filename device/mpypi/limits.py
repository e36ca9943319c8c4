"""Every limit of the agent, by name. Times are in milliseconds, sizes in bytes, unless said otherwise."""

# The wire, as in protocol/src/limits.rs.
PACKET = 16 * 1024 * 1024  # largest MQTT packet
LIST = 1024 * 1024  # largest update list
LIST_ENTRIES = 16 * 1024  # most entries in one
TOPIC = 1024  # longest topic
CHANNEL_NAME = 64
NODE_NAME = 128
TEXT = 128  # longest name, version, tag or other short text

# This agent's own.
PIECE = 1024  # what is held of a message, file or package at a time
ENTRY_VALUE = 1024  # longest key or value of a list's entry that this agent reads
ENTRY_DEPTH = 64  # deepest nesting of what it skips
WINDOW = 4  # packages asked for at a time
ERROR_TEXT = 500  # longest `error` of a state message

# Waiting for the broker.
CONNECT = 10_000  # for TCP to connect
HANDSHAKE = 20_000  # for TLS, and the answer to CONNECT: a slow chip needs seconds
READ = 10_000  # for the rest of what has begun: a packet's header, or the next piece of its payload
WRITE = 10_000  # for a packet to be taken
KEEP_ALIVE = 60  # s; what the broker is told. A ping goes out after half of it
PONG = 10_000  # for the answer to a ping
GOODBYE = 2_000  # for the last words before a restart to arrive
NAP_MOST = 32  # between two looks at a connection that is silent

# The update, as in agent-sim/src/limits.rs.
FETCH_STALL = 10_000  # for any of the packages asked for
ATTEMPTS = 5  # tries in a row of one release
RETRY_FIRST = 500  # pause before a release is tried again
RETRY_MOST = 30_000
RECONNECT_FIRST = 200  # pause before the broker is tried again
RECONNECT_MOST = 15_000
CONFIRM_AFTER = 30_000  # how long a new release runs until it is confirmed, unless told otherwise
PROGRESS = 500  # between two reports of progress
LOOK = 1_000  # between two looks at what other code asked of the agent
