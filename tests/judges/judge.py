#!/usr/bin/env python3
"""Outsiders judge our broker: suites and clients that others wrote, each against the real program.

Every case passes, or `verdicts.toml` says why it does not; it is an error as well if one passes that is said to
fail, or if one is missing. What the judges need is fetched into `target/judges` once, by hash.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import fnmatch
import hashlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HOME = ROOT / "target/judges"
VENV = HOME / "venv"
PYTHON = VENV / "bin/python"
MOSQUITTO = HOME / "mosquitto"

MOSQUITTO_SOURCE = "mosquitto_2.0.21.orig.tar.gz"
MOSQUITTO_SHA256 = "551daff96cd0675faf888f8881536177934424ecc45924fecf94cffe207f6e81"
MOSQUITTO_DEBIAN = "deb-src [trusted=yes] http://deb.debian.org/debian trixie main"

NOT_APPLICABLE = "mosquitto's configuration: "
# What `verdicts.toml` may say of a case; all others pass. The unsteady do either.
KINDS = ("failed", "not_applicable", "unsteady")
# Most cases wait for most of their time.
AT_ONCE = 20
# Seconds for one case.
PATIENCE = 90
# Another try for what depends on a loaded machine's timing: a failure that stays counts.
TRIES = 2


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    arguments.add_argument("--broker", type=pathlib.Path, default=target / "debug/mpypi-broker")
    arguments.add_argument("--only", default="*", metavar="PATTERN", help="cases `suite/name` to run, as a glob")
    arguments.add_argument("--list", action="store_true", help="print the verdict on every case")
    options = arguments.parse_args()
    if not options.broker.exists():
        give_up(f"`{options.broker}` is not there", "build it with `cargo build -p mpypi-broker`")
    os.environ["MPYPI_BROKER"] = str(options.broker.resolve())
    os.environ["MPYPI_JUDGES"] = str(HERE)
    os.environ["NODE_PATH"] = str(HOME / "node_modules")

    prepare()
    started = time.monotonic()
    found = {}
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        # The long ones first.
        jobs = [job for suite in (gmqtt, mosquitto, aiomqtt, clients, sequences) for job in suite()]
        jobs = [(name, run) for name, run in jobs if fnmatch.fnmatch(name.split("*")[0], prefix(options.only, name))]
        for future in [pool.submit(one, *job) for job in jobs]:
            found.update(future.result())
    found = {name: verdict for name, verdict in found.items() if fnmatch.fnmatchcase(name, options.only)}
    complaints = compare(found, options.only)
    report(found, options.list, time.monotonic() - started)
    for complaint in complaints:
        print(f"\nerror: {complaint}")
    sys.exit(1 if complaints else 0)


def prefix(only, name):
    """A suite that finds its cases by itself is named `suite/*`: it runs if any of them is wanted."""
    return only.split("/")[0] + "/" if name.endswith("*") else only


# Verdicts


SAID = tomllib.loads((HERE / "verdicts.toml").read_text())


def expectation(name):
    """What `verdicts.toml` says of a case, and where; a case that it does not name passes."""
    suite, case = name.split("/", 1)
    for kind in KINDS:
        for pattern in SAID.get(suite, {}).get(kind, {}):
            if case == pattern or fnmatch.fnmatchcase(case, pattern):
                return kind, pattern
    return "passed", None


def is_expected(name, verdict):
    kind, _ = expectation(name)
    # What is not applicable may find that out by itself, or not.
    right = {"unsteady": ("passed", "failed"), "not_applicable": ("failed", "not_applicable")}
    return verdict in right.get(kind, (kind,))


def compare(found, only):
    """What is not as `verdicts.toml` says."""
    complaints, used, passed = [], set(), {}
    for name, (verdict, text) in sorted(found.items()):
        suite = name.split("/", 1)[0]
        kind, pattern = expectation(name)
        used.add((suite, kind, pattern))
        if verdict == kind == "passed":
            passed[suite] = passed.get(suite, 0) + 1
        if not is_expected(name, verdict):
            complaints.append(f"{name}: {verdict}, expected {kind}\n{text.rstrip()}")
    if only == "*":
        for suite, said in SAID.items():
            for kind in KINDS:
                for pattern in said.get(kind, {}):
                    if (suite, kind, pattern) not in used:
                        complaints.append(f"{suite}: no case `{pattern}`, said to be {kind}")
            if passed.get(suite, 0) != said["passed"]:
                complaints.append(f"{suite}: {passed.get(suite, 0)} cases passed, expected {said['passed']}")
    return complaints


def report(found, every, seconds):
    suites = {}
    for name, (verdict, _) in sorted(found.items()):
        if every:
            print(f"{verdict:15} {name}")
        counts = suites.setdefault(name.split("/", 1)[0], {})
        kind = verdict if verdict == "passed" or expectation(name)[0] != "not_applicable" else "not_applicable"
        counts[kind] = counts.get(kind, 0) + 1
    print(f"\n{'judge':20} {'passed':>7} {'failed':>7} {'not applicable':>15}")
    for suite, counts in suites.items():
        row = [counts.get(kind, 0) for kind in ("passed", "failed", "not_applicable")]
        print(f"{suite:20} {row[0]:7} {row[1]:7} {row[2]:15}")
    print(f"in {seconds:.0f} s; why a case does not pass or apply is in tests/judges/verdicts.toml")


# Running


def one(name, run):
    """Runs a job; returns verdict and text by name."""
    for left in reversed(range(TRIES)):
        try:
            found = run()
        except subprocess.TimeoutExpired as error:
            found = {name: ("failed", f"no end after {PATIENCE} s\n{text_of(error.stdout)}")}
        if not left or all(is_expected(name, verdict) for name, (verdict, _) in found.items()):
            return found
    raise AssertionError


def text_of(output):
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def execute(command, cwd, **environment):
    """Runs a program to its end, which is also that of all it has started and of its scratch folder."""
    with tempfile.TemporaryDirectory(prefix="mpypi-judge-") as scratch:
        # Some cases start others by their first line.
        path = f"{VENV / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "TMPDIR": scratch, "PYTHONDONTWRITEBYTECODE": "1", **environment}
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=PATIENCE)
            return subprocess.CompletedProcess(command, process.returncode, output)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def verdict(name, done):
    text = text_of(done.stdout)
    kind = "failed" if done.returncode else "passed"
    # A case may run another, and see only that it ended.
    return {name: ("not_applicable" if NOT_APPLICABLE in text else kind, text)}


class Broker:
    """Our broker on a free port, its data in a scratch folder."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="mpypi-judge-")
        self.log = open(pathlib.Path(self.folder.name, "log"), "wb")
        self.process = subprocess.Popen(
            [os.environ["MPYPI_BROKER"], "serve", "--listen", "127.0.0.1:0", "--data", f"{self.folder.name}/data"],
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        line = self.process.stdout.readline().decode()
        self.port = line.strip().rpartition(":")[2]
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.log.close()
        self.folder.cleanup()


# The judges


def sequences():
    """mosquitto's packet sequences."""

    def run():
        with Broker() as broker:
            done = execute([PYTHON, HERE / "sequences.py", MOSQUITTO, broker.port], ROOT)
        found, text = {}, text_of(done.stdout)
        for part in text.split("\0"):
            name, _, complaint = part.strip("\n").partition("\n")
            if name:
                found[f"mosquitto-packets/{name}"] = ("failed" if complaint else "passed", complaint)
        assert done.returncode == 0, text
        return found

    yield "mosquitto-packets/*", run


def mosquitto():
    """mosquitto's broker tests: a program each. Some ask for several ports."""
    folder = MOSQUITTO / "broker"
    listed = re.findall(r"\((\d), '\./([^']*)'\)", (folder / "test.py").read_text())
    ports = {name: int(count) for count, name in listed}
    for path in sorted(folder.glob("[0-9]*.py")):
        if path.name.endswith("-helper.py"):
            continue  # part of another case

        def run(name=path.name):
            taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(ports.get(name, 1))]
            numbers = [one.getsockname()[1] for one in taken]
            for one in taken:
                one.close()
            return verdict(f"mosquitto/{name}", execute([PYTHON, name, *numbers], folder))

        yield f"mosquitto/{path.name}", run


def gmqtt():
    """gmqtt's tests of brokers, a port of Paho's interoperability tests."""
    folder = HOME / "gmqtt"
    for node in ast.parse((folder / "tests/test_mqtt5.py").read_text()).body:
        if isinstance(node, ast.AsyncFunctionDef) and node.name.startswith("test_"):

            def run(name=node.name):
                with Broker() as broker:
                    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_mqtt5.py::{name}"]
                    done = execute(command, folder, HOST="127.0.0.1", PORT=broker.port, USERNAME="", TOKEN="")
                    return verdict(f"gmqtt/{name}", done)

            yield f"gmqtt/{node.name}", run


def aiomqtt():
    """aiomqtt's tests, which go to a broker on the internet: here to ours."""

    def run():
        folder = HOME / "aiomqtt"
        command = [PYTHON, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider", "-p", "aiomqtt_here"]
        with Broker() as broker:
            command += ["-o", "addopts=", "--timeout=20", "tests/test_client.py"]
            done = execute(command, folder, PYTHONPATH=str(HERE), MPYPI_PORT=broker.port)
        text = text_of(done.stdout)
        found = {}
        for word, name in re.findall(r"^(PASSED|FAILED|ERROR) tests/test_client.py::(\S+)", text, re.M):
            found[f"aiomqtt/{name}"] = ("passed" if word == "PASSED" else "failed", text)
        assert found, text
        return found

    yield "aiomqtt/*", run


def clients():
    """Clients as their users write programs with them."""
    for script, command in (("clients.py", [PYTHON]), ("clients.mjs", ["node"])):
        listed = execute([*command, HERE / script, "--list"], HOME)
        if listed.returncode:
            give_up(f"`{script}` does not run", text_of(listed.stdout))
        for name in listed.stdout.decode().split():

            def run(script=script, command=command, name=name):
                with Broker() as broker:
                    return verdict(f"clients/{name}", execute([*command, HERE / script, name, broker.port], HOME))

            yield f"clients/{name}", run


# Getting everything here


def prepare():
    HOME.mkdir(parents=True, exist_ok=True)
    for tool, package in (("node", "nodejs"), ("npm", "npm")):
        if not shutil.which(tool):
            give_up(f"`{tool}` is not installed", f"`sudo apt-get install {package}`, or see https://nodejs.org")
    needs("mosquitto's clients", [ROOT / "tests/peers.sh"], fetch_peers)
    needs("the Python packages", [HERE / "requirements.txt"], make_venv)
    needs("the npm packages", [HERE / "package.json", HERE / "package-lock.json"], fetch_node)
    needs("the suites of gmqtt and aiomqtt", [HERE / "suites.txt"], fetch_suites)
    needs("mosquitto's broker tests", [HERE / "judge.py"], fetch_mosquitto)
    original = MOSQUITTO / "mosq_test_original.py"
    if not original.exists():
        (MOSQUITTO / "mosq_test.py").rename(original)
    shutil.copy(HERE / "mosquitto/mosq_test.py", MOSQUITTO / "mosq_test.py")


def needs(what, causes, make):
    """Makes what is not there, or was made from something else."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in causes)).hexdigest()
    stamp = HOME / f"{make.__name__}.stamp"
    if stamp.exists() and stamp.read_text() == digest:
        return
    print(f"fetching {what} into target/judges", flush=True)
    make()
    stamp.write_text(digest)


def fetch_peers():
    call(["bash", ROOT / "tests/peers.sh"], "see above")


def make_venv():
    shutil.rmtree(VENV, ignore_errors=True)
    hint = "on Debian and Ubuntu, `sudo apt-get install python3-venv`"
    call([sys.executable, "-m", "venv", VENV], hint)
    install = [PYTHON, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", HERE / "requirements.txt"]
    call(install, "pip needs PyPI once; see above")


def fetch_node():
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, HOME / name)
    call(["npm", "ci", "--no-audit", "--no-fund", "--silent", "--prefix", HOME], "npm needs its registry once; see above")


def fetch_suites():
    folder = HOME / "sdists"
    shutil.rmtree(folder, ignore_errors=True)
    command = [PYTHON, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--require-hashes"]
    call([*command, "--no-binary", ":all:", "-d", folder, "-r", HERE / "suites.txt"], "pip needs PyPI once; see above")
    for path in folder.glob("*.tar.gz"):
        unpack(path, HOME / path.name.split("-")[0])


def fetch_mosquitto():
    path = HOME / MOSQUITTO_SOURCE
    hint = f"put {MOSQUITTO_SOURCE} from Debian, or the same file from https://mosquitto.org, into {HOME}"
    if not path.exists():
        if not shutil.which("apt-get"):
            give_up("there is no apt-get to fetch mosquitto's sources with", hint)
        # With lists of its own it needs no root and changes nothing. What it fetches is known by its hash.
        apt = HOME / "apt"
        (apt / "lists/partial").mkdir(parents=True, exist_ok=True)
        (apt / "parts").mkdir(exist_ok=True)
        (apt / "sources.list").write_text(MOSQUITTO_DEBIAN + "\n")
        settings = {
            "Dir::State::Lists": apt / "lists",
            "Dir::Cache": apt,
            "Dir::Etc::sourcelist": apt / "sources.list",
            "Dir::Etc::sourceparts": apt / "parts",
            "APT::Sandbox::User": "",
            "Debug::NoLocking": "1",
        }
        own_apt = ["apt-get", "-qq"]
        for name, value in settings.items():
            own_apt += ["-o", f"{name}={value}"]
        call([*own_apt, "update"], hint)
        call([*own_apt, "source", "--only-source", "--download-only", "--tar-only", "mosquitto"], hint, cwd=HOME)
        shutil.rmtree(apt)
    if not path.exists():
        give_up("Debian has another version of mosquitto by now", hint)
    if hashlib.sha256(path.read_bytes()).hexdigest() != MOSQUITTO_SHA256:
        path.unlink()
        give_up(f"{MOSQUITTO_SOURCE} is not the file it should be", hint)
    whole = HOME / "mosquitto-source"
    unpack(path, whole)
    shutil.rmtree(MOSQUITTO, ignore_errors=True)
    (whole / "test").rename(MOSQUITTO)
    shutil.rmtree(whole)


def unpack(path, folder):
    """Unpacks what is in an archive's one folder into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=HOME) as scratch, tarfile.open(path) as archive:
        archive.extractall(scratch, filter="data")
        (inside,) = pathlib.Path(scratch).iterdir()
        inside.rename(folder)


def call(command, hint, cwd=None):
    done = subprocess.run([str(part) for part in command], cwd=cwd, check=False)
    if done.returncode:
        give_up(f"`{command[0]}` failed", hint)


def give_up(problem, hint):
    sys.exit(f"error: {problem}\nhint: {hint}")


if __name__ == "__main__":
    main()
