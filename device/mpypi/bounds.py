"""The limits of who may sign, and of whose turn it is: as in protocol/src/limits.rs. `limits` has the others."""

from micropython import const

# Largest root, in bytes.
ROOT = const(32768)
# Most keys, delegations and signatures of a root; most entries of any type.
KEYS = const(32)
DELEGATIONS = const(64)
SIGNATURES = const(16)
ENTRIES = const(256)
# Longest name of a key, in bytes.
KEY_NAME = const(64)
# Largest answer to the question for the time, in bytes.
TIME = const(4096)
# Most values of an array in an entry: of releases revoked, for one.
VALUES = const(64)
# Longest query of a rollout, in bytes; most parentheses and `not`s inside each other.
QUERY = const(512)
QUERY_DEPTH = const(8)
# Longest jitter of a rollout, in seconds.
JITTER = const(86400)
