"""Trouble on purpose, against a real server process: what happens, and is any accepted thing lost?"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

from loadtest.servers import ours, running
from loadtest.texts import Sample
from model_store.store import Store, StoreError

KEY = "an-admin-key-for-faults"
TIMEOUT_S = 60.0
KILLS = 20
WAVES = 10  # of an overload, until one is refused
CLIENT_GONE = 499  # status in the log
CLOCK_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
)


@dataclass(frozen=True)
class Row:
    """A fault: what happened, and how much that was accepted was lost; None: it could not be tried here."""

    fault: str
    happened: str
    lost: int | None


class Ground:
    """Where faults happen: a store and texts to send, and servers on a port."""

    def __init__(self, store: Path, model: str, samples: Sequence[Sample], port: int, folder: Path) -> None:
        self.store, self.model, self.port, self.folder = store, model, port, folder
        self.texts = [sample.text for sample in samples]

    @contextmanager
    def server(self, *options: str, store: Path | None = None) -> Iterator["subprocess.Popen[bytes]"]:
        """A server that logs its requests as JSON; its process."""
        keys = self.folder / "admin-keys"
        keys.write_text(f"faults {KEY}\n")
        logging = ["--log-requests", "--log-format", "json", "--admin-keys-file", str(keys)]
        server = ours(store or self.store, self.model, options=[*logging, *options])
        with running(server, self.port, self.log) as started:
            yield started.process

    @property
    def log(self) -> Path:
        """The log of the last server."""
        return self.folder / "server.log"

    def logged(self) -> dict[str, int]:
        """Status by request id, as the server logged them."""
        found = {}
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("{") and '"de3.requests"' in line:
                row = json.loads(line)
                found[row["request_id"]] = row["status"]
        return found

    def ask(self, texts: Sequence[str], name: str = "", **fields: object) -> int:
        """Ask once, on a connection of its own; the status. Raises OSError or HTTPException."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            headers = {"X-Request-ID": name} if name else {}
            body = json.dumps({"input": list(texts), **fields})
            connection.request("POST", "/classify", body, headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status == 503 and not answer.headers["Retry-After"]:
                raise ValueError("a 503 without Retry-After")
            return answer.status
        finally:
            connection.close()

    def send(self, texts: Sequence[str], name: str = "x", **fields: object) -> socket.socket:
        """Send a request with this id and do not wait."""
        body = json.dumps({"input": list(texts), **fields}).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S)
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nX-Request-ID: {name}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def at_once(self, batches: Sequence[Sequence[str]], tau: float) -> list[int]:
        """The statuses of requests that are sent together."""
        barrier, statuses = threading.Barrier(len(batches)), list[int]()

        def client(texts: Sequence[str]) -> None:
            barrier.wait()
            statuses.append(self.ask(texts, tau=tau))

        threads = [threading.Thread(target=client, args=(texts,)) for texts in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statuses

    def metric(self, name: str, label: str = "") -> float:
        """A metric's sum over its labels, or over the series with one label."""
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=TIMEOUT_S) as answer:
            lines = answer.read().decode().splitlines()
        lines = [line for line in lines if line.startswith((name + " ", name + "{")) and label in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def wait(self, condition: Callable[[], bool], seconds: float = 60.0) -> float:
        """Wait for a condition; seconds that it took. Raises ValueError when it does not come."""
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > seconds:
                raise ValueError(f"waited {seconds:g} s in vain")
            time.sleep(0.02)
        return time.monotonic() - started

    def answered_during(self, what: Callable[[], None], clients: int = 4) -> tuple[set[str], int]:
        """Ids of requests that were answered 200 while something happens, and how many were not answered."""
        stop, answered, without, wrong = threading.Event(), set(), [0], list[ValueError]()

        def client(number: int) -> None:
            rng = random.Random(number)
            for i in range(10**6):
                if stop.is_set():
                    return
                name = f"fault-{number}-{i}"
                try:
                    if self.ask([rng.choice(self.texts)], name) == 200:
                        answered.add(name)
                except (OSError, HTTPException):
                    without[0] += 1
                    time.sleep(0.02)
                except ValueError as error:
                    wrong.append(error)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        try:
            time.sleep(1)
            what()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        if wrong:
            raise wrong[0]
        return answered, without[0]

    def lost(self, answered: set[str]) -> int:
        """Requests that the server says it answered, and whose client has no answer."""
        said = {name for name, status in self.logged().items() if status == 200 and name.startswith("fault-")}
        return len(said - answered)


def sigterm(ground: Ground) -> Row:
    """SIGTERM with long lists under way and short requests coming.

    A request that uvicorn gave up is in its log; one that was refused or cut off unread was not accepted.
    """
    with ground.server() as process:
        statuses: list[int] = []
        batches: list[threading.Thread] = []
        took = [0.0]

        def batch() -> None:
            statuses.append(ground.ask(ground.texts[:256], tau=0))

        def under_way() -> bool:
            if not batches or not batches[-1].is_alive():  # the last one was done before it was seen
                batches.append(threading.Thread(target=batch))
                batches[-1].start()
            return ground.metric("de3_queue_texts") > 100

        def stop() -> None:
            ground.wait(under_way)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT_S)
            took[0] = time.monotonic() - started
            batches[-1].join()

        answered, without = ground.answered_during(stop)
    given_up = re.findall(r"Cancel (\d+) running task", ground.log.read_text(errors="replace"))
    lost = ground.lost(answered) + sum(map(int, given_up)) + (process.returncode != 0)
    lost += len(batches) - statuses.count(200)
    return Row(
        "SIGTERM under load, a list of 256 under way",
        "refuses new connections, answers what it accepted, "
        f"exits with {process.returncode} after {took[0]:.1f} s ({len(answered)} answered, then {without} "
        "refused)",
        lost,
    )


def killed(ground: Ground) -> Row:
    """SIGKILL while a model is loaded; then a new start."""
    with TemporaryDirectory() as folder:
        store = Path(shutil.copytree(ground.store, Path(folder) / "store"))
        for _ in range(3):
            with ground.server(store=store) as process:
                reload = threading.Thread(target=_reload, args=(ground,), daemon=True)
                reload.start()
                time.sleep(random.uniform(0.1, 0.8))
                process.kill()
                process.wait()
            _verify(store)
        with ground.server(store=store):
            status = ground.ask(ground.texts[:1])
    return Row(
        "SIGKILL while a model is reloaded, three times",
        f"the store is whole, the next start serves ({status}); what was in flight has no answer",
        0 if status == 200 else 1,
    )


def _reload(ground: Ground) -> int:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    url = f"http://127.0.0.1:{ground.port}/v1/models/{ground.model}/load"
    try:
        with urlopen(Request(url, b"{}", headers), timeout=TIMEOUT_S) as answer:
            return int(answer.status)
    except OSError:
        return 0


_WRITER = """
import json, sys
from pathlib import Path
from model_store.manifest import Manifest
from model_store.store import Store
store, name = Store(Path(sys.argv[1])), sys.argv[2]
artifact = store.open(name)
while True:
    with store.new_version(name) as draft:
        draft.write({file: artifact.read(file) for file in artifact.manifest.files})
        fields = json.loads(artifact.manifest.model_dump_json(by_alias=True))
        draft.publish(Manifest.model_validate(fields | {"version": draft.next_version()}))
    print("written", flush=True)
"""


def _writer(store: Path, model: str) -> "subprocess.Popen[str]":
    """A process that writes versions of a model, one after the other, as an export writes them."""
    command = [sys.executable, "-c", _WRITER, str(store), model]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _verify(store: Path) -> int:
    """Check every file of every version; how many versions. Raises StoreError."""
    found = Store(store)
    names = [f"{name}:{v}" for name, versions in found.versions().items() for v in versions]
    for name in names:
        found.open(name).verify()
    return len(names)


def killed_while_writing(ground: Ground) -> Row:
    """SIGKILL in the middle of writing a version, at many moments."""
    with TemporaryDirectory() as folder:
        store = Path(shutil.copytree(ground.store, Path(folder) / "store"))
        rng, versions = random.Random(4), 0
        for _ in range(KILLS):
            writer = _writer(store, ground.model)
            assert writer.stdout is not None
            writer.stdout.readline()  # one is written: it is at the next
            time.sleep(rng.uniform(0.0, 0.3))
            writer.kill()
            writer.communicate()
            versions = _verify(store)
            kept = sorted(Store(store).versions()[ground.model])[1:-1]
            for version in kept:  # room for the next
                shutil.rmtree(store / ground.model / str(version))
        drafts = len(list((store / ground.model).glob(".draft-*")))
    return Row(
        f"SIGKILL while a version is written, {KILLS} times",
        f"every version that can be seen is whole (the last look: {versions}); {drafts} hidden drafts are "
        "left, which the first export a day later removes",
        0,
    )


def full_disk(ground: Ground) -> Row:
    """No space left while a version is written."""
    size = sum(p.stat().st_size for p in (ground.store / ground.model).rglob("*") if p.is_file())
    with TemporaryDirectory() as folder, ExitStack() as stack:
        options = f"size={int(1.5 * size)}"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True
        )
        if mounted.returncode != 0:
            return Row(
                "the disk is full while a version is written", "not tried: may not mount a small disk", None
            )
        stack.callback(subprocess.run, ["umount", folder], check=False)
        store = Path(folder) / "store"
        shutil.copytree(ground.store / ground.model, store / ground.model)
        writer = _writer(store, ground.model)
        _, said = writer.communicate(timeout=TIMEOUT_S)
        versions = _verify(store)
        left = [p.name for p in (store / ground.model).iterdir() if p.name.startswith(".")]
    return Row(
        "the disk is full while a version is written",
        f"the export fails ({said.strip().splitlines()[-1]}); {versions} version is there, whole; "
        f"{len(left)} drafts are left",
        0 if versions >= 1 and not left else 1,
    )


def hang_up(ground: Ground) -> Row:
    """Clients that close as soon as they have asked."""
    with ground.server("--max-queue", "6000"):  # room for all of them

        def many() -> None:
            for number in range(100):
                ground.send(ground.texts[:50], f"hang-up-{number}", tau=0).close()

        answered, without = ground.answered_during(many)
        # A request is in its connection's buffer before the server knows of it.
        took = ground.wait(lambda: len(_hang_ups(ground)) == 100)
        took += ground.wait(lambda: ground.metric("de3_in_flight_requests") == 0)
        gone = ground.metric("de3_rejected_total", 'cause="client_gone"')
        lost = ground.lost(answered) + without
    statuses = _hang_ups(ground)
    dropped, done = statuses.count(CLIENT_GONE), statuses.count(200)  # done before they hung up
    if not dropped or dropped + done != 100 or gone != dropped:
        raise ValueError(f"{dropped} of 100 requests were dropped (metric: {gone:.0f}), {done} answered")
    return Row(
        "100 clients hang up, with 50 texts each at full depth",
        f"the texts of {dropped} are dropped at the next layer, nothing is in flight {took:.1f} s "
        f"later, {len(answered)} others were answered meanwhile",
        lost,
    )


def _hang_ups(ground: Ground) -> list[int]:
    """The statuses that the server logged for clients that hung up."""
    return [status for name, status in ground.logged().items() if name.startswith("hang-up-")]


def slow_readers(ground: Ground) -> Row:
    """Clients that never read what they asked for."""
    with ground.server():
        before = ground.metric("process_resident_memory_bytes")
        with ExitStack() as stack:

            def many() -> None:
                for _ in range(50):
                    client = stack.enter_context(ground.send(ground.texts[:200], explain=True))
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                time.sleep(3)

            answered, without = ground.answered_during(many)
            grown = (ground.metric("process_resident_memory_bytes") - before) / 1e6
            took = ground.wait(lambda: _connections(ground.port) <= 2, 90)
        lost = ground.lost(answered) + without
    return Row(
        "50 clients do not read their answers",
        f"their answers wait in the system's buffers (the server grew by {grown:.0f} MB), the connections "
        f"are closed (all were {took:.0f} s later); {len(answered)} others were answered meanwhile",
        lost,
    )


def _connections(port: int) -> int:
    """Connections that the server's side has, from the kernel's table."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "01" for row in rows)


def slow_heads(ground: Ground) -> Row:
    """Clients that begin a request and go on for ever."""
    with ground.server():
        clients = [socket.create_connection(("127.0.0.1", ground.port)) for _ in range(200)]

        def drip() -> None:
            for client in clients:
                client.sendall(b"POST /classify HTTP/1.1\r\n")
            time.sleep(2)

        answered, without = ground.answered_during(drip)
        took = ground.wait(lambda: _connections(ground.port) <= 2, 60)
        for client in clients:
            client.close()
        lost = ground.lost(answered) + without
    return Row(
        "200 clients begin a request and never end it",
        f"they are closed after 10 s (all were {took:.0f} s later); {len(answered)} others were answered",
        lost,
    )


def overload(ground: Ground) -> Row:
    """Far more at once than the queue holds."""
    with ground.server("--max-queue", "300"):
        waves = 0
        statuses: list[int] = []
        while not statuses.count(503) and waves < WAVES:  # a wave may trickle in on a busy machine
            waves += 1
            statuses = ground.at_once([ground.texts[:100]] * 40, tau=0)
        after = ground.ask(ground.texts[:1])
    refused = statuses.count(503)
    if not refused or after != 200:
        raise ValueError(f"{refused} were refused, and the next request was answered {after}")
    return Row(
        "40 lists of 100 at once, a queue of 300",
        f"{statuses.count(200)} are answered, {refused} refused with 503 and Retry-After; it serves on",
        40 - refused - statuses.count(200),
    )


def clock(ground: Ground) -> Row:
    """The system's clock jumps a day forth and back."""
    fault = "the clock jumps a day forward, two back, and home"
    library = next((path for path in CLOCK_LIBRARIES if Path(path).exists()), None)
    if library is None:
        return Row(fault, "not tried: libfaketime is not installed (Debian: libfaketime)", None)
    jump = ground.folder / "clock"

    def to(when: str) -> None:  # in one step: the library ends the process over half a line
        (ground.folder / "clock.new").write_text(when)
        (ground.folder / "clock.new").replace(jump)

    to("+0")
    faked = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(jump),
        "FAKETIME_NO_CACHE": "1",
        # The clock that timers use does not jump when somebody sets the time. Named so by version.
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    before = {name: os.environ.get(name) for name in faked}
    os.environ.update(faked)
    try:
        with ground.server() as process:
            for name in faked:
                os.environ.pop(name)

            def jumps() -> None:
                for when in ("+1d", "-1d", "+0"):
                    to(when)
                    time.sleep(1.5)

            answered, without = ground.answered_during(jumps)
            alive = process.poll() is None
            lost = ground.lost(answered) + without
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return Row(
        fault, f"nothing: {len(answered)} requests were answered; only time stamps jump", lost + (not alive)
    )


FAULTS = (
    *(sigterm, killed, killed_while_writing, full_disk, hang_up, slow_readers, slow_heads, overload, clock),
)


def faults(
    ground: Ground, only: Sequence[str] = (), on_row: Callable[[Row], None] = lambda _: None
) -> list[Row]:
    """Try every fault, or those named; each with a server of its own. Raises ValueError for another name."""
    known = [fault.__name__ for fault in FAULTS]
    if wrong := [name for name in only if name not in known]:
        raise ValueError(f"no fault {wrong[0]!r}; there are: {', '.join(known)}")
    rows = []
    for fault in FAULTS:
        if only and fault.__name__ not in only:
            continue
        try:
            row = fault(ground)
        except (StoreError, ValueError, OSError, HTTPException, subprocess.SubprocessError) as error:
            row = Row((fault.__doc__ or fault.__name__).rstrip("."), f"FAILED: {error}", 1)
        rows.append(row)
        on_row(row)
    return rows
