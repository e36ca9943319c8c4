"""Takes update lists in and judges them: the rules of agent-sim/src/accept.rs, and `judge` of its update.rs."""

import binascii
import hashlib
import os
import time

from . import limits, lists, tags
from .refusal import Refused

# A clock that says less was never set.
_YEAR = 2024


class _Arrival:
    """A list that arrives. It is written only where it differs from the one that is there, to spare the flash."""

    def __init__(self, store):
        self.store = store
        self.size = 0
        self.digest = hashlib.sha256()
        self.part = self.same = None
        try:
            self.same = open(store.list_path, "rb")
        except OSError:
            self._differ()

    def write(self, piece):
        self.digest.update(piece)
        if not self.part and self.same.read(len(piece)) != piece:
            self._differ()
        if self.part:
            self.part.write(piece)
        self.size += len(piece)

    def _differ(self):
        self.part = open(self.store.list_part, "wb")
        if self.same:
            self.same.seek(0)
            for at in range(0, self.size, limits.PIECE):
                self.part.write(self.same.read(min(limits.PIECE, self.size - at)))

    def finish(self):
        """All of it has come: where it is."""
        if not self.part and self.same.read(1):
            self._differ()
        self.close()
        return self.store.list_part if self.part else self.store.list_path

    def close(self):
        for file in (self.part, self.same):
            if file:
                file.close()


async def take(agent, is_cmd):
    """Takes the list in that is arriving, and does what it says."""
    line = agent.line
    if not line.left:
        if not is_cmd:
            agent.tell("the channel has no list any more; nothing changes")
        return
    if line.left > limits.LIST:
        raise lists.bad("a list of %d bytes is larger than %d" % (line.left, limits.LIST))
    arrival = _Arrival(agent.store)
    try:
        while True:
            piece = await line.piece()
            if not piece:
                break
            arrival.write(piece)
        path = arrival.finish()
    finally:
        arrival.close()
    digest = binascii.hexlify(arrival.digest.digest()).decode()
    try:
        summary = lists.check(path, tags.rank)
    except Refused as refused:
        _refuse(agent, refused, None, digest)
        return
    if is_cmd:
        for order in summary.orders:
            await _order(agent, order)
        # Orders alone are no list: nothing is to be removed because of them.
        if not summary.release and not summary.packages:
            return
    if agent.confirming:
        # To be judged when that is over.
        _accept(agent, path)
        agent.queued = digest
    else:
        judge(agent, summary, path, digest)


def again(agent, digest):
    """Judges the list that came while a release was being confirmed."""
    if agent.store.head.get("list") != digest:
        path = agent.store.list_path
        judge(agent, lists.check(path, tags.rank), path, digest)


async def _order(agent, order):
    if order == "check":
        agent.recheck = True
        agent.tried = None
        agent.store.forgive()
        await agent.line.subscribe(["mpypi/channels/" + agent.channel])
    elif order == "rollback":
        if agent.confirming:
            agent.store.give_up("told-to: an operator rolled this release back")
            agent.restart()
        else:
            agent.tell("nothing to roll back: no release waits for confirmation")
    elif agent.job:
        agent.tell("not restarting: an update is under way and will")
    else:
        agent.restart()


def judge(agent, summary, path, digest):
    """Decides about a list, and starts on it if it is to be installed."""
    store = agent.store
    seen = {"channel": agent.channel, "list": digest}
    for key in ("sequence", "version"):
        if summary.release:
            seen[key] = summary.release[key]
    try:
        if agent.keys:
            _check_signature(agent, path)
        _check(agent, summary, seen)
    except Refused as refused:
        _refuse(agent, refused, seen, digest)
        return
    if agent.job and agent.job.digest == digest:
        return
    before = store.seen or {}
    agent.abandon()
    if not summary.release and not summary.packages and "list" not in store.head:
        # What a channel that nobody published to answers.
        agent.rest()
        return
    if before.get("list") == digest and "refused" in before:
        seen["refused"] = before["refused"]
    if store.head.get("list") == digest and not agent.recheck:
        store.remember(seen)
        # The same list once more, as after the restart, leaves what is told about its download.
        if agent.phase != "idle" or agent.seen.get("list") != digest:
            agent.rest()
        return
    if "refused" in seen:
        agent.rest_on_refused(seen)
        return
    agent.recheck = False
    for text in summary.skipped:
        agent.tell("skipping " + text)
    _accept(agent, path)
    store.remember(seen)
    agent.done = 0
    agent.begin(summary, seen)


def _accept(agent, path):
    if path != agent.store.list_path:
        agent.abandon()
        os.rename(path, agent.store.list_path)


def _check_signature(agent, path):
    from . import rsa

    keys = agent.keys
    if isinstance(keys, str):
        import json

        with open(keys) as file:
            keys = json.load(file)
    rsa.check(path, keys)


def _check(agent, summary, found):
    """Whether to believe a list."""
    seen = agent.store.seen
    highest = seen.get("sequence") if seen and seen.get("channel") == agent.channel else None
    release = summary.release
    sequence = found.get("sequence")
    if release and release["channel"] != agent.channel:
        text = "this list is for channel `%s`, this device follows `%s`"
        raise Refused("wrong-channel", text % (release["channel"], agent.channel))
    if highest is not None:
        if sequence is None:
            raise Refused("rollback", "a list without a sequence follows sequence %d" % highest)
        if sequence < highest:
            text = "sequence %d is older than %d, which this device has seen"
            raise Refused("rollback", text % (sequence, highest))
        if sequence == highest and seen["list"] != found["list"]:
            raise Refused("rollback", "sequence %d was seen before with another content" % sequence)
    now = time.gmtime()
    if release and "expires" in release and now[0] >= _YEAR:
        now = "%04d-%02d-%02dT%02d:%02d:%02d" % tuple(now[:6])
        if release["expires"][:19] <= now:
            text = "sequence %d expired at %s, it is %sZ"
            raise Refused("expired", text % (sequence, release["expires"], now))
    if summary.unfit:
        text = "wheel `%s` is for `%s`; this device is `%s`"
        raise Refused("no-fit", text % (summary.unfit["name"], summary.unfit.get("tag"), tags.best()))


def _refuse(agent, refused, seen, digest):
    agent.tell("a list is refused: " + refused.text)
    # It changes nothing: what is under way goes on, and is what the state is about.
    if not agent.job and not agent.confirming:
        agent.show("failed", seen or {"list": digest})
        agent.fail(refused)
