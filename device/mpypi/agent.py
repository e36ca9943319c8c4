"""The agent: what a device does with the lists and packages of its channel.

The states, reports and decisions are those of agent-sim/src/update.rs:

    idle → downloading → verifying → installing → restarting → confirming → idle
                ↓ ↑            ↓                                    ↓
             (pause)         failed                            rolled_back

What is done is cut into phases, each a module with `async def run(agent)`, which returns the name of the next
one:

    start → dial → greet → listen → arrive → judge → survey → listen → gather → unpack → plan → commit
                     ↑      ↑ ↓                ↓                 ↓
                  confirm ← ┴─┴→ roots, told  turn              fail

`pin` and `roots` see to it who may sign, `told` what time it is, `turn` whose turn it is; `leave` comes where a
device restarts, or has looked once. Where memory is short, a phase and what it needs are in memory only while it
runs; this module, `blocking`, `limits` and `refusal` stay, with a connection `mqtt` and `report`. A connection is lost and made again in any phase, without disturbing what is under way.
"""

import gc
import json
import random
import sys
import time

from . import limits
from .refusal import Lost, Refused, of_flash

# The agent that runs, if one does: `mpypi.confirm` tells it.
running = None

# For whatever comes from the line or from a file, a piece at a time. Made once, so that a heap in pieces
# cannot stop an update; `files` uses it, too.
buffer = bytearray(limits.PIECE)

_RESIDENT = ("mpypi.agent", "mpypi.blocking", "mpypi.limits", "mpypi.refusal")


def tidy():
    """Where memory is short, forgets the modules of this package that are not needed all the time."""
    gc.collect()
    if gc.mem_free() > limits.PLENTY:
        return
    package = sys.modules["mpypi"]
    for name in list(sys.modules):
        if name in ("mpypi.mqtt", "mpypi.report") and running and running.line:
            continue
        if name.startswith("mpypi.") and name not in _RESIDENT:
            del sys.modules[name]
            if hasattr(package, name[6:]):
                delattr(package, name[6:])
    gc.collect()
    if running:
        # What was made while memory was full lies where it cuts what is free now to pieces.
        for name in "head seen tried published error asked packed queued root folder turn".split(" "):
            setattr(running, name, _moved(getattr(running, name)))
        job = running.job
        if job:
            running.job = moved = Job(_moved(job.seen))
            for name in ("tries", "again_at", "needs", "cursor", "open", "stall_at", "losses", "keep"):
                setattr(moved, name, getattr(job, name))
            if not job.open:
                moved.open = {}
            moved.chunks = _moved(job.chunks)
            del job, moved
        gc.collect()


def _moved(value):
    if isinstance(value, str):
        return value.encode().decode()
    if isinstance(value, tuple):
        return tuple([_moved(part) for part in value])
    if isinstance(value, dict):
        return {_moved(key): _moved(value[key]) for key in value}
    if isinstance(value, bytearray):
        return bytearray(value)
    return value


def pause(tries, first, most):
    """How long to wait before the next of `tries`, in ms: doubled each time, shortened at random by up to a
    half."""
    wait = min(most, first << min(tries, 16))
    return wait - random.getrandbits(16) % (wait // 2 + 1)


class Job:
    """A release on its way to this device."""

    def __init__(self, seen):
        self.seen = seen
        self.tries = 1
        self.again_at = None  # when to try again, if it waits for that
        self.needs = None  # bit n: the entry n is to be fetched
        self.cursor = None  # over those that were not asked for yet
        self.open = {}  # what was asked for, by topic
        self.chunks = None  # what comes in chunks: see there
        self.stall_at = 0
        self.losses = 0  # connections lost since the last package came
        self.keep = False  # whether what it replaces is revoked: it is never taken back

    def stop(self):
        """Asks for nothing more."""
        self.open = {}
        self.chunks = None
        if self.cursor:
            self.cursor.close()
            self.cursor = None


class Agent:
    """Keeps a device at the release that its channel has.

    `server`: `mqtt://[user[:password]@]host[:port]`, or `mqtts://`, which needs `ca`, the file of the CA that
    vouches for the broker; several, with commas, where they are nodes of one cluster; `cert` and `key` are files with a client's certificate. All of them in DER or PEM.
    `node`: the name of this device; by default made of the platform and the chip's unique id.
    `keys`: whose signatures are believed. With keys, nothing is installed that none of them signed. The name of a
    file with a root: those whom that root, or a later one that follows from it, lets sign for the channel. The
    small way: a dict of moduli in hexadecimal by the key's name, or the name of a JSON file with one.
    `labels`: a dict of texts that rollouts may ask for. `utc_offset`: how many minutes local time is ahead of UTC;
    windows of rollouts are local then.
    `root`: where the device's files are.
    `confirm_after`: how long in ms a new release runs until it is taken to work; `None`: the application calls
    `mpypi.confirm()`.
    `restart` is called instead of `machine.reset`. `log` gets lines for people. `nap(ms)`: what waits;
    `asyncio.sleep_ms` by default.
    """

    def __init__(
        self,
        server,
        channel,
        node=None,
        root="",
        keys=None,
        labels=None,
        utc_offset=None,
        user=None,
        password=None,
        ca=None,
        cert=None,
        key=None,
        confirm_after=limits.CONFIRM_AFTER,
        restart=None,
        log=print,
        nap=None,
    ):
        # What stays comes first: see `warm`.
        self.server = self.servers = self.channel = self.node = self.topics = None
        self.trust = (ca, cert, key)
        self.root = root
        self.keys = keys
        self.labels = labels
        self.utc_offset = utc_offset
        # Where keys are roots: see `pin`.
        self.roots = None
        self.confirm_after = confirm_after
        self.log = log
        self.restart = restart
        self.nap = nap or _asyncio_nap()
        self.line = None
        self.folder = None  # ours on the flash; None before the start
        self.head = {}  # what is installed: channel, sequence, version, list
        self.job = None
        self.once = self.listed = False  # whether to end when at rest; whether the channel's list came
        self.since = 0  # when the broker was last asked for something; 0: it never was
        self.check_at = None  # when to ask for the list again
        self.confirming = False
        self.confirm_at = None
        self.confirmed = False  # by the application
        self.arrived = None  # a list to be judged: what it says, where it is, its digest, where it came from
        self.queued = None  # the digest of one that waits until the new release is confirmed
        self.order = None  # `check`: the next list is compared with the device even if it is what is installed;
        # `install`: it need not wait for its turn
        # What of a list that waits for its turn is to be known: see `turn`.
        self.turn = None
        self.tried = (None, 0)  # which list was tried how often
        self.restarting = False
        self.packed = self.changes = None  # between the phases that install
        self.refused = None  # what came in the way of the job
        self.phase = "idle"
        self.seen = {}  # the list that the phase is about
        self.done = self.total = self.attempt = 0
        self.error = None
        self.asked = {}  # subscriptions that the broker has not granted yet, by number
        self.lines = []  # for people
        self.published = None
        self.published_at = 0
        tidy()
        from . import warm

        warm.up()
        from . import names

        if "," in server:
            from . import places

            places.init(self, server, user, password, ca)
            del places
        else:
            self.server = names.server(server, user, password, ca)
        self.channel = names.channel(channel)
        self.node = names.node(node)
        self.topics = ("mpypi/channels/" + self.channel, "mpypi/nodes/" + self.node + "/")
        tidy()

    # What users call

    async def run(self):
        """Follows the channel for ever; returns only if `restart` does."""
        global running
        running = self
        tries = 0
        phase = "dial" if self.folder else "start"
        try:
            while phase:
                since = time.ticks_ms()
                try:
                    phase = await self._follow(phase)
                except Lost as lost:
                    if time.ticks_diff(time.ticks_ms(), since) > limits.RECONNECT_MOST:
                        tries = 0
                    phase = self._lost(lost)
                    await self._wait(pause(tries, limits.RECONNECT_FIRST, limits.RECONNECT_MOST))
                    tries += 1
        finally:
            running = None
            self.hang_up()
        return self.phase

    async def check(self):
        """Looks at the channel once, updates, and returns the phase: `idle`, `failed`, `rolled_back`, or
        `confirming` where the application or some more time has to say that the release works. If files
        change, it does not return: the device restarts. Raises `Lost` if there is no broker to ask.
        """
        global running
        running = self
        self.once = True
        self.listed = False
        try:
            await self._follow("dial" if self.folder else "start")
        except Lost as lost:
            self._lost(lost)
            raise
        finally:
            self.once = False
            running = None
            self.hang_up()
        return self.phase

    def confirm(self):
        """The application says that the new release works. The agent notes it within a second; one that does
        not run, at once.
        """
        self.confirmed = True
        if running is not self:
            from . import boot

            boot.confirm(self.root)

    async def _follow(self, phase):
        """Goes from phase to phase until there is none."""
        while phase:
            module = None
            try:
                module = __import__("mpypi." + phase, None, None, ("run",))
                phase = await module.run(self)
            except (OSError, MemoryError, ValueError, Refused) as error:
                if not self.folder:
                    # The device does not even start.
                    raise
                if phase == "fail":
                    raise Lost(self.refusal(error).text)
                self.refused = self.refusal(error)
                phase = "fail"
            finally:
                del module
                tidy()

    def hang_up(self):
        """Ends the connection, without a word."""
        if self.line:
            self.line.close()
            self.line = None

    def _lost(self, lost):
        """There is no connection; says what to do when the pause is over."""
        self.hang_up()
        if self.servers:
            from . import places

            places.lost(self)
        self.tell("; hint: ".join([str(part) for part in lost.args if part]))
        self.lines.clear()
        job = self.job
        if job and job.again_at is None:
            job.losses += 1
            if job.losses >= limits.ATTEMPTS:
                # The next connection brings the list, and with it another try.
                self.abandon()
                self.fail(Refused("connection", "lost %d times in a row while fetching" % job.losses))
        return "dial"

    async def _wait(self, wait):
        since = time.ticks_ms()
        while time.ticks_diff(time.ticks_ms(), since) < wait:
            if self.is_due():
                await self._follow_offline("confirm")
            await self.nap(min(wait, limits.LOOK))

    async def _follow_offline(self, phase):
        try:
            await self._follow(phase)
        except Lost:
            pass  # There is no connection: that is known.

    # What phases use

    async def ask(self, topics):
        """Subscribes, and notes that an answer is to come."""
        self.since = time.ticks_ms() or 1
        # Packages that do not come are asked for again; on a cluster, lists are, too: it keeps account of what is to be
        # acknowledged at many times the cost.
        cheap = self.servers or self.job and topics[0] in self.job.open
        self.asked[await self.line.subscribe(topics, b"\x00" if cheap else b"\x01")] = topics

    async def ask_for_list(self):
        """Asks for what the channel retains; before, for the root that may be needed to believe it."""
        roots = self.roots
        if roots:
            await self.ask([roots[1]])
            roots[2] += 1
        await self.ask(self.topics[:1])

    def check_later(self):
        """The list is what the broker retains; whether its last change arrived, only asking tells."""
        wait = limits.CHECK // 4 * 3 + random.getrandbits(16) * (limits.CHECK // 2) // 65535
        # A cluster that loses a node loses messages on their way more often.
        self.check_at = time.ticks_add(time.ticks_ms(), wait // 12 if self.servers else wait)

    def is_due(self):
        """Whether a new release is to be kept now."""
        if not self.confirming:
            self.confirmed = False
            return False
        at = self.confirm_at
        return self.confirmed or at is not None and time.ticks_diff(at, time.ticks_ms()) <= 0

    def tell(self, text):
        """Says something to people, here and there."""
        if self.log:
            self.log("mpypi: " + text)
        if len(self.lines) < 8:
            self.lines.append(text)

    def refusal(self, error):
        """The refusal that an error amounts to."""
        if isinstance(error, Refused):
            return error
        gc.collect()
        if isinstance(error, MemoryError):
            return Refused("no-memory", "this device has too little memory for it")
        if isinstance(error, ValueError):
            # A record is damaged.
            return Refused("storage", str(error))
        return of_flash(error)

    def abandon(self):
        """Another list, or none, replaces the one being fetched."""
        if self.job:
            self.job.stop()
            self.job = None

    def entries(self):
        """The wheels and files of the release under way that this device takes, as `judge` wrote them
        down."""
        with open(self.folder + "list.jsonl", "rb") as file:
            while True:
                line = file.readline()
                if not line:
                    return
                yield json.loads(line)

    # Reports

    def show(self, phase, seen):
        """The phase is about the list `seen` from now on."""
        if seen.get("list") != self.seen.get("list"):
            self.done = self.total = self.attempt = 0
        self.phase, self.seen, self.error = phase, seen, None

    def rest(self, keep=False):
        """Nothing to do: what is installed is what should be."""
        if not keep:
            self.seen = {}
        self.show("idle", self.head)

    def rest_on_refused(self, seen):
        """Nothing to do: the newest list is not to be tried again."""
        refused = seen["refused"]
        self.show("rolled_back" if refused.get("rolled_back") else "failed", seen)
        self.error = refused["error"]

    def fail(self, refused):
        self.phase, self.error = "failed", refused.text

    async def try_report(self):
        """Reports, if there is a connection."""
        if self.line:
            try:
                await self.report()
            except Lost:
                self.hang_up()

    async def report(self):
        """Reports a change at once, and mere progress at a bounded rate."""
        from .report import report

        await report(self)


def _asyncio_nap():
    try:
        import asyncio
    except ImportError:
        import uasyncio as asyncio  # MicroPython 1.20
    return asyncio.sleep_ms
