"""Takes update lists in and judges them: the rules of agent-sim/src/accept.rs, and `judge` of its update.rs."""

import binascii
import hashlib
import json
import os
import time

from . import limits
from .agent import Job, tidy
from .refusal import Refused

# A clock that says less was never set.
_YEAR = 2024


async def run(agent):
    line = agent.line
    list_path = agent.folder + "list.json"
    if agent.queued and not agent.confirming and agent.arrived is None:
        digest, agent.queued = agent.queued, None
        if agent.head.get("list") == digest:
            return "greet"
        path, is_cmd = list_path, False
    else:
        is_cmd, agent.arrived = agent.arrived, None
        if line.left > limits.LIST:
            text = "a list of %d bytes is larger than %d" % (line.left, limits.LIST)
            _refuse(agent, Refused("bad-list", text), None, None)
            return "listen"
        arrival = _Arrival(agent.folder)
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
        arrival = None
    seen = None
    try:
        summary = _read(path)
        if is_cmd:
            for order in summary.orders:
                if await _order(agent, order):
                    return "leave"
            # Orders alone are no list: nothing is to be removed because of them.
            if not summary.release and not summary.packages:
                return "listen"
        if agent.confirming:
            # To be judged when that is over.
            if path != list_path:
                os.rename(path, list_path)
            agent.queued = digest
            return "listen"
        seen = {"channel": agent.channel, "list": digest}
        if summary.release:
            for key in ("sequence", "version"):
                seen[key] = summary.release[key]
        if agent.keys:
            _check_signature(agent, path)
        return _judge(agent, summary, seen, path)
    except Refused as refused:
        if refused.verdict != "reject":
            raise
        _refuse(agent, refused, seen, digest)
        return "listen"


def _read(path):
    from . import lists, tags

    try:
        summary = lists.check(path, tags.rank)
        if summary.unfit:
            summary.unfit["best"] = tags.best()
        return summary
    finally:
        del lists, tags
        tidy()


def _check_signature(agent, path):
    from . import rsa

    try:
        keys = agent.keys
        if isinstance(keys, str):
            with open(keys) as file:
                keys = json.load(file)
        rsa.check(path, keys)
    finally:
        del rsa
        tidy()


async def _order(agent, order):
    """Carries an order out; says whether the device restarts for it."""
    if order == "check":
        store = _store(agent)
        agent.recheck = True
        agent.tried = (None, 0)
        store.forgive()
        await agent.line.subscribe(agent.topics[:1])
    elif order == "rollback":
        if agent.confirming:
            _store(agent).give_up("told-to: an operator rolled this release back")
            agent.restarting = True
        else:
            agent.tell("nothing to roll back: no release waits for confirmation")
    elif agent.job:
        agent.tell("not restarting: an update is under way and will")
    else:
        agent.restarting = True
    return agent.restarting


def _store(agent):
    from .store import Store

    store = Store(agent.root)
    store.load()
    return store


def _judge(agent, summary, seen, path):
    """Decides about a list: what is to be done next."""
    store = _store(agent)
    before = store.seen or {}
    _check(agent, summary, seen, before)
    digest = seen["list"]
    if agent.job and agent.job.seen["list"] == digest:
        return "listen"
    agent.abandon()
    if not summary.release and not summary.packages and "list" not in store.head:
        # What a channel that nobody published to answers.
        agent.rest()
        return "listen"
    if before.get("list") == digest and "refused" in before:
        seen["refused"] = before["refused"]
    if store.head.get("list") == digest and not agent.recheck:
        store.remember(seen)
        # The same list once more, as after the restart, leaves what is told about its download.
        if agent.phase != "idle" or agent.seen.get("list") != digest:
            agent.rest()
        return "listen"
    if "refused" in seen:
        agent.rest_on_refused(seen)
        return "listen"
    agent.recheck = False
    for text in summary.skipped:
        agent.tell("skipping " + text)
    list_path = agent.folder + "list.json"
    if path != list_path:
        os.rename(path, list_path)
    del store
    _note(agent, summary, list_path)
    _store(agent).remember(seen)
    agent.done = 0
    agent.job = Job(seen)
    return "survey"


def _note(agent, summary, path):
    """Writes down what this device takes of the list, so that reading it takes no judge."""
    from . import lists

    try:
        with open(agent.folder + "list.jsonl", "wb") as file:
            number = 0
            for entry in lists.read(path):
                if number >> 3 < len(summary.ours) and summary.ours[number >> 3] & 1 << (number & 7):
                    file.write((json.dumps(entry) + "\n").encode())
                number += 1
            file.flush()
    finally:
        del lists
        tidy()


def _check(agent, summary, found, seen):
    """Whether to believe a list."""
    highest = seen.get("sequence") if seen.get("channel") == agent.channel else None
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
        wheel = summary.unfit
        text = "wheel `%s` is for `%s`; this device is `%s`"
        raise Refused("no-fit", text % (wheel["name"], wheel.get("tag"), wheel["best"]))


def _refuse(agent, refused, seen, digest):
    agent.tell("a list is refused: " + refused.text)
    # It changes nothing: what is under way goes on, and is what the state is about.
    if not agent.job and not agent.confirming:
        agent.show("failed", seen or {"list": digest})
        agent.fail(refused)


class _Arrival:
    """A list that arrives. It is written only where it differs from the one that is there, to spare the flash."""

    def __init__(self, folder):
        self.folder = folder
        self.size = 0
        self.digest = hashlib.sha256()
        self.part = self.same = None
        try:
            self.same = open(folder + "list.json", "rb")
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
        self.part = open(self.folder + "list.part", "wb")
        if self.same:
            self.same.seek(0)
            for at in range(0, self.size, limits.PIECE):
                self.part.write(self.same.read(min(limits.PIECE, self.size - at)))

    def finish(self):
        """All of it has come: where it is."""
        if not self.part and self.same.read(1):
            self._differ()
        self.close()
        return self.folder + ("list.part" if self.part else "list.json")

    def close(self):
        for file in (self.part, self.same):
            if file:
                file.close()
