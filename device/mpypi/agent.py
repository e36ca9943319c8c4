"""The agent: what a device does with the lists and packages of its channel.

The states, reports and decisions are those of agent-sim/src/update.rs:

    idle → downloading → verifying → installing → restarting → confirming → idle
                ↓ ↑            ↓                                    ↓
             (pause)         failed                            rolled_back

A connection is lost and made again without disturbing them. Lists are judged by `judge`, which is in memory only then.
"""

import gc
import random
import sys
import time

from . import limits
from .mqtt import PUBLISH, SUBACK, Line, Lost
from .refusal import Refused, missing_package, of_flash
from .store import Store

# The agent that runs, if one does: `mpypi.confirm` tells it.
running = None


def drop(*names):
    """Forgets modules of this package that are not needed for a while."""
    package = sys.modules["mpypi"]
    for name in names:
        if sys.modules.pop("mpypi." + name, None):
            try:
                delattr(package, name)
            except AttributeError:
                pass  # It was imported by what is in it alone.
    gc.collect()


def pause(tries, first, most):
    """How long to wait before the next of `tries`, in ms: doubled each time, shortened at random by up to a half."""
    wait = min(most, first << min(tries, 16))
    return wait - random.getrandbits(16) % (wait // 2 + 1)


class Job:
    """A release on its way to this device."""

    def __init__(self, summary, digest, seen):
        self.summary = summary
        self.digest = digest  # of its list
        self.seen = seen
        self.tries = 1
        self.again_at = None  # when to try again, if it is to wait
        self.needs = None  # bit n: the entry n of ours must be fetched
        self.cursor = None  # over those that were not asked for yet
        self.open = {}  # what was asked for, by topic
        self.stall_at = 0
        self.losses = 0  # connections lost since the last package came

    def stop(self):
        """Asks for nothing more, and lets go of the list."""
        self.open = {}
        if self.cursor:
            self.cursor.close()
            self.cursor = None


class Agent:
    """Keeps a device at the release that its channel has.

    `server`: `mqtt://[user[:password]@]host[:port]`, or `mqtts://`, which needs `ca`, the file of the CA that vouches for
    the broker; `cert` and `key` are files with a client's certificate. All of them in DER or PEM.
    `node`: the name of this device; by default made of the platform and the chip's unique id.
    `keys`: whose signatures are believed: a dict of moduli in hexadecimal by the key's name, or the name of a JSON file with
    one. With keys, nothing is installed that none of them signed.
    `root`: where the device's files are. `confirm_after`: how long in ms a new release runs until it is taken to work;
    `None`: the application calls `mpypi.confirm()`. `restart` is called instead of `machine.reset`. `log` gets lines for
    people. `nap`: what waits; by default `asyncio.sleep_ms`.
    """

    def __init__(
        self,
        server,
        channel,
        node=None,
        root="",
        keys=None,
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
        from . import dial, names

        self.server = dial.Server(server, user, password, ca, cert, key)
        self.channel, self.node = names.checked(channel, node)
        drop("dial", "names", "lists")
        self.root = root
        self.keys = keys
        self.confirm_after = confirm_after
        self.log = log
        self._restart = restart
        self.line = Line(nap or _asyncio_nap())
        self.store = Store(root)
        self.job = None
        self.confirming = False
        self.queued = None  # the digest of a list that waits until the new release is confirmed
        self._new = False  # a release was installed, and nobody told yet
        self.recheck = False  # the next list is compared with the device even if it is what is installed
        self.tried = None  # which list was tried how often
        self.phase = "idle"
        self.seen = None  # what the phase is about: sequence, version, list
        self.done = self.total = self.attempt = 0
        self.error = None
        self._asked = {}  # what the broker has not granted yet, by number
        self._lines = []  # for people
        self._published = None
        self._published_at = 0
        self._confirmed = False
        self._confirm_at = None
        self._restarting = False
        self._booted = False

    def topic(self, subject):
        return "mpypi/nodes/" + self.node + "/" + subject

    # What users call

    async def run(self):
        """Follows the channel for ever; returns only if `restart` does."""
        global running
        self._boot()
        running = self
        tries = 0
        try:
            while not self._restarting:
                since = time.ticks_ms()
                try:
                    await self._session(False)
                except Lost as lost:
                    if time.ticks_diff(time.ticks_ms(), since) > limits.RECONNECT_MOST:
                        tries = 0
                    self._lost(lost)
                    wait = pause(tries, limits.RECONNECT_FIRST, limits.RECONNECT_MOST)
                    tries += 1
                    since = time.ticks_ms()
                    while not self._restarting and time.ticks_diff(time.ticks_ms(), since) < wait:
                        await self.line.nap(min(wait, limits.LOOK))
                        self._look()
        finally:
            self._end()
        return self.phase

    async def check(self):
        """Looks at the channel once, updates, and returns the phase: `idle`, `failed`, `rolled_back`, or `confirming`
        where the application or some more time has to say that the release works. If files change, it does not return:
        the device restarts. Raises `mqtt.Lost` if there is no broker to ask.
        """
        global running
        self._boot()
        running = self
        try:
            await self._session(True)
            await self.line.leave(self.topic("online"))
        finally:
            self._end()
        return self.phase

    def confirm(self):
        """The application says that the new release works."""
        self._confirmed = True
        if running is not self:
            self._look()

    # Starts and connections

    def _boot(self):
        if self._booted:
            return
        kind, seen = self.store.boot()
        self._booted = True
        if kind == "restart":
            self._restarting = True
        elif kind == "confirming":
            self.show("confirming", seen)
            self.confirming = True
            if self.confirm_after is not None:
                self._confirm_at = time.ticks_add(time.ticks_ms(), self.confirm_after)
        elif seen and seen.get("refused", {}).get("rolled_back"):
            self.rest_on_refused(seen)
        else:
            self.rest()

    def _end(self):
        global running
        running = None
        self.line.close()

    def _lost(self, lost):
        self.tell(str(lost.args[0]) + ("" if len(lost.args) < 2 or not lost.args[1] else "; hint: " + lost.args[1]))
        self._lines.clear()
        if self.job and self.job.again_at is None:
            self.job.losses += 1
            if self.job.losses >= limits.ATTEMPTS:
                # The next connection brings the list, and with it another try.
                self.fail(Refused("connection", "lost %d times in a row while fetching" % self.job.losses))
                self.abandon()

    async def _session(self, once):
        """One connection, to its end; `once`: until there is nothing to do."""
        from . import dial

        try:
            await dial.dial(self.line, self.server, self.node, self.topic("online"))
        finally:
            del dial
            drop("dial")
        self._published = None
        self._asked = {}
        listed = False
        await self.introduce()
        await self._subscribe([self.topic("cmd"), "mpypi/channels/" + self.channel])
        if self.job and self.job.open:
            self._stall()
            await self._subscribe(list(self.job.open))
        await self._step()
        since = time.ticks_ms()
        while not self._restarting:
            kind = await self.line.next(self._wait())
            if kind == PUBLISH:
                listed = await self._message() or listed
            elif kind == SUBACK:
                await self._granted()
            await self._step()
            if once and (listed or self.confirming) and not self.job:
                return
            if once and not listed and time.ticks_diff(time.ticks_ms(), since) > limits.FETCH_STALL:
                raise self.line.lost("the channel `%s` has no list" % self.channel)

    def _wait(self):
        """How long nothing needs to be done, at most."""
        now = time.ticks_ms()
        wait = limits.LOOK
        for at in (
            self.job and (self.job.again_at or self.job.stall_at),
            self._confirm_at,
            self._published_at if self._published != self._state() else None,
        ):
            if at:
                wait = min(wait, max(0, time.ticks_diff(at, now)))
        return wait

    def tell(self, text):
        """Says something to people, here and there."""
        if self.log:
            self.log("mpypi: " + text)
        if len(self._lines) < 8:
            self._lines.append(text)

    async def introduce(self):
        """Publishes what this device is and has."""
        from . import info

        try:
            await self.line.publish(self.topic("online"), b"1")
            await self.line.publish(self.topic("info"), info.message(self))
        except OSError as error:
            self.tell(of_flash(error).text)
        finally:
            del info
            drop("info")

    async def _subscribe(self, topics):
        self._asked[await self.line.subscribe(topics)] = topics

    async def _granted(self):
        answer = self.line.answer
        topics = self._asked.pop(answer[0] << 8 | answer[1], ())
        for code, topic in zip(answer[2:], topics):
            if code > 2:
                refused = Refused("not-allowed", "the broker refused the subscription to `%s`" % topic)
                self.tell("error: " + refused.text)
                if self.job and topic in self.job.open:
                    self.give_up(refused)
                elif not self.job and not self.confirming:
                    self.fail(refused)

    # Reports

    def show(self, phase, seen):
        """The phase is about the list `seen` from now on."""
        if not seen or not self.seen or seen.get("list") != self.seen.get("list"):
            self.done = self.total = self.attempt = 0
        self.phase, self.seen, self.error = phase, seen, None

    def rest(self):
        """Nothing to do: what is installed is what should be."""
        self.seen = None
        self.show("idle", self.store.head)

    def rest_on_refused(self, seen):
        refused = seen["refused"]
        self.show("rolled_back" if refused.get("rolled_back") else "failed", seen)
        self.error = refused["error"]

    def fail(self, refused):
        self.phase, self.error = "failed", refused.text

    def _state(self):
        seen = self.seen or {}
        return (self.phase, seen.get("sequence"), seen.get("version"), self.error, self.attempt)

    async def report(self):
        """Reports a change at once, and mere progress at a bounded rate."""
        now = time.ticks_ms()
        state = self._state()
        if self._published and self._published[:-1] == state:
            if self._published[-1] == (self.done, self.total):
                return
            if time.ticks_diff(now, self._published_at) < limits.PROGRESS:
                return
        from json import dumps

        text = '{"phase":"%s"' % self.phase
        if state[1] is not None:
            text += ',"sequence":%d' % state[1]
        if state[2] is not None:
            text += ',"version":' + dumps(state[2])
        text += ',"done":%d,"total":%d' % (self.done, self.total)
        if self.error is not None:
            text += ',"error":' + dumps(self.error)
        await self.line.publish(self.topic("state"), (text + ',"attempt":%d}' % self.attempt).encode())
        self._published = state + ((self.done, self.total),)
        self._published_at = now

    # Messages

    async def _message(self):
        """Takes a message in; says whether it was the channel's list."""
        topic = self.line.topic
        if topic == "mpypi/channels/" + self.channel:
            await self._list(False)
            return True
        # A retained order would be carried out again after every reconnect.
        if topic == self.topic("cmd") and not self.line.retained:
            await self._list(True)
        elif self.job and topic in self.job.open and self.line.left:
            await self._package(topic)
        else:
            await self.line.skip()
        return False

    async def _list(self, is_cmd):
        from . import judge

        try:
            await judge.take(self, is_cmd)
        except (OSError, MemoryError, Refused) as error:
            refused = self._refusal(error)
            self.tell(refused.text)
            if not self.job and not self.confirming:
                self.fail(refused)
            await self.line.skip()
        finally:
            del judge
            drop("judge", "lists", "rsa", "tags")

    async def _package(self, topic):
        job, line = self.job, self.line
        entry = job.open[topic]
        before, total, known = self.done, self.total, entry.get("size") is not None
        incoming = None
        try:
            incoming = self.store.receive(entry)
            while True:
                piece = await line.piece()
                if not piece:
                    break
                incoming.write(piece)
                self.done += len(piece)
                if not known:
                    self.total += len(piece)
                await self.report()
            incoming.finish()
        except Lost:
            self.done, self.total = before, total
            incoming.abort()
            raise
        except (OSError, MemoryError, Refused) as error:
            if incoming and not isinstance(error, Refused):
                incoming.abort()
            incoming = None
            await line.skip()
            await self.line.unsubscribe(list(job.open))
            self.give_up(self._refusal(error))
            return
        incoming = None
        job.losses = 0
        del job.open[topic]
        self._stall()
        await line.unsubscribe([topic])

    def _refusal(self, error):
        if isinstance(error, Refused):
            return error
        gc.collect()
        if isinstance(error, MemoryError):
            return Refused("no-memory", "this device has too little memory for it")
        return of_flash(error)

    # The update

    def _stall(self):
        self.job.stall_at = time.ticks_add(time.ticks_ms(), limits.FETCH_STALL)

    def _look(self):
        """Does what the time or the application asks for, with or without a connection."""
        if self.confirming:
            at = self._confirm_at
            if self._confirmed or at is not None and time.ticks_diff(at, time.ticks_ms()) <= 0:
                self._keep()
        self._confirmed = False

    def _keep(self):
        self.confirming = False
        self._confirm_at = None
        try:
            self.store.confirm()
        except (OSError, MemoryError, Refused) as error:
            self.tell("cannot confirm: %s; restarting" % self._refusal(error).text)
            self._restarting = True
            return
        self._installed()

    def _installed(self):
        done = self.done, self.total, self.attempt
        self.rest()
        self.done, self.total, self.attempt = done
        self._new = True

    async def _step(self):
        """Goes on with whatever there is to do."""
        self._look()
        if self._new:
            self._new = False
            await self.introduce()
            if self.queued:
                # People see that the last one arrived before the next one starts.
                await self.report()
                digest, self.queued = self.queued, None
                from . import judge

                try:
                    judge.again(self, digest)
                except (OSError, MemoryError, Refused) as error:
                    self.tell(self._refusal(error).text)
                finally:
                    del judge
                    drop("judge", "lists", "rsa", "tags")
        job = self.job
        if job:
            now = time.ticks_ms()
            try:
                if job.again_at is not None and time.ticks_diff(job.again_at, now) <= 0:
                    job.again_at = None
                    job.tries += 1
                    self.survey()
                if self.job and job.again_at is None:
                    await self._fetch(job, now)
            except (OSError, MemoryError, Refused) as error:
                self.give_up(self._refusal(error))
        while self._lines:
            await self.line.publish(self.topic("log"), self._lines.pop(0).encode(), False, 0)
        if self._restarting:
            await self._leave()
        else:
            await self.report()

    def begin(self, summary, seen):
        """Starts on a release, whose list is at `list_path`."""
        self.job = Job(summary, seen["list"], seen)
        try:
            self.survey()
        except (OSError, MemoryError, Refused) as error:
            self.give_up(self._refusal(error))

    def entries(self):
        """The entries of the list under way that this device takes."""
        return self.job.summary.entries(self.store.list_path)

    def survey(self):
        """Works out what must be fetched for the job."""
        job = self.job
        tries = self.tried[1] + 1 if self.tried and self.tried[0] == job.digest else 1
        self.tried = (job.digest, tries)
        self.show("downloading", job.seen)
        self.attempt = tries
        self.total = self.done
        job.stop()
        job.needs, total = self.store.survey(self.entries)
        self.total += total
        job.cursor = self._needed(job)
        self._stall()

    def _needed(self, job):
        index = 0
        for entry in self.entries():
            if job.needs[index >> 3] & 1 << (index & 7):
                if entry["type"] == "wheel":
                    yield "mpypi/packages/wheel/" + entry["pkg_sha256"], entry
                else:
                    yield "mpypi/packages/src/%s/%s" % (entry["path"], entry["pkg_sha256"]), entry
            index += 1

    async def _fetch(self, job, now):
        """Asks for packages up to the window; installs when there are none left."""
        topics = []
        while job.cursor and len(job.open) < limits.WINDOW:
            found = next(job.cursor, None)
            if found:
                job.open[found[0]] = found[1]
                topics.append(found[0])
            else:
                job.cursor = None
        if topics:
            self._stall()
            await self._subscribe(topics)
        elif not job.open:
            await self._install(job)
        elif time.ticks_diff(job.stall_at, now) <= 0:
            await self.line.unsubscribe(list(job.open))
            self.give_up(missing_package(next(iter(job.open))))

    async def _install(self, job):
        self.phase = "verifying"
        await self.report()
        self.store.stage(job.seen, self.entries)
        self.phase = "installing"
        await self.report()
        try:
            done = self.store.commit()
        except (OSError, MemoryError, Refused) as error:
            refused = self._refusal(error)
            self.tell(refused.text + "; looking what became of it")
            if self.store.boot()[0] == "rest":
                raise refused
            done = "restart"
        self.abandon()
        if done == "restart":
            self.phase = "restarting"
            await self.report()
            self._restarting = True
        else:
            self._installed()

    def give_up(self, refused):
        """The release cannot be applied now: try again later, or not."""
        job = self.job
        job.stop()
        if refused.verdict == "retry" and job.tries < limits.ATTEMPTS:
            wait = pause(job.tries - 1, limits.RETRY_FIRST, limits.RETRY_MOST)
            self.show("downloading", job.seen)
            text = "%s; try %d of %d follows in %d ms"
            self.tell(text % (refused.text, job.tries + 1, limits.ATTEMPTS, wait))
            job.again_at = time.ticks_add(time.ticks_ms(), wait)
            return
        self.tell(refused.text)
        self.abandon()
        self.fail(refused)
        try:
            if refused.verdict == "reject":
                self.store.refuse(refused.text)
            elif refused.word == "no-space":
                # What was fetched would stay for the next try; here the application needs the room.
                self.store.discard()
        except (OSError, Refused) as error:
            self.tell(self._refusal(error).text)

    def abandon(self):
        """Another list, or none, replaces the one being fetched."""
        if self.job:
            self.job.stop()
            self.job = None

    def restart(self):
        """The device restarts at the next step."""
        self._restarting = True

    async def _leave(self):
        await self.report()
        await self.line.leave(self.topic("online"))
        if self._restart:
            self._restart()
        else:
            import machine

            getattr(machine, "reset", sys.exit)()


def _asyncio_nap():
    try:
        import asyncio
    except ImportError:
        import uasyncio as asyncio  # MicroPython 1.20
    return asyncio.sleep_ms
