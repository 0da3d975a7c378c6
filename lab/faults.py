"""Fault injection into a real server process: the effect of each fault, and the accepted requests that it loses."""

import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

from de3.loadtest.client import post
from de3.loadtest.metrics import Metrics
from de3.loadtest.servers import ours, running
from de3.loadtest.texts import Sample
from de3.model_store.store import Store, StoreError
from de3.server.processes.supervisor import ENDS_S, MAX_ENDS
from lab.soak import reload

KEY = "an-admin-key-for-faults"
TIMEOUT_S = 60.0
KILLS, PROCESS_KILLS = 20, 10
CLIENTS = 4
WAVES = 10  # attempts to overload the server
CLIENT_GONE = 499  # logged status of a request whose client hung up
CLOCK_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
)


@dataclass(frozen=True)
class Row:
    """The result of a fault.

    Attributes:
        happened: description of the effects.
        lost: number of accepted requests without an answer, plus 1 for each other failed check; None if the fault was
            not tested.
    """

    fault: str
    happened: str
    lost: int | None


class Testbed:
    """Starts servers of a store on a port and sends them texts."""

    def __init__(self, store: Path, model: str, samples: Sequence[Sample], port: int, folder: Path) -> None:
        self.store, self.model, self.port, self.folder = store, model, port, folder
        self.texts = [sample.text for sample in samples]

    @contextmanager
    def server(self, *options: str, store: Path | None = None) -> Iterator["subprocess.Popen[bytes]"]:
        """A server that logs its requests as JSON; yields its process."""
        keys = self.folder / "admin-keys"
        keys.write_text(f"faults {KEY}\n")
        logging = ["--log-requests", "--log-format", "json", "--admin-keys-file", str(keys)]
        server = ours(store or self.store, self.model, options=[*logging, *options])
        with running(server, self.port, self.log) as started:
            yield started.process

    @property
    def url(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """The log of the last server."""
        return self.folder / "server.log"

    def logged(self) -> dict[str, int]:
        """Status by request id, from the server's log."""
        statuses = {}
        complete, _, _ = self.log.read_text(errors="replace").rpartition(
            "\n"
        )  # the last line may be half written
        for line in complete.splitlines():
            if line.startswith("{") and '"de3.requests"' in line:
                record = json.loads(line)
                statuses[record["request_id"]] = record["status"]
        return statuses

    def ask(self, texts: Sequence[str], name: str = "", **fields: object) -> int:
        """Send a request on a new connection; returns the status.

        name: the request's id; "": none is sent. fields: further fields of the body. Raises OSError or HTTPException if
        there is no valid response, and ValueError for a 503 without Retry-After.
        """
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            headers = {"X-Request-ID": name} if name else {}
            body = json.dumps({"input": list(texts), **fields})
            connection.request("POST", "/classify", body, headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status == 503 and not answer.headers["Retry-After"]:
                raise ValueError("503 without Retry-After")
            return answer.status
        finally:
            connection.close()

    def send(self, texts: Sequence[str], name: str = "x", **fields: object) -> socket.socket:
        """Send a request with `name` as its id; returns the open connection without waiting for the answer."""
        connection = socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S)
        connection.sendall(post({"input": list(texts), **fields}, request_id=name))
        return connection

    def at_once(self, batches: Sequence[Sequence[str]], tau: float) -> list[int]:
        """Send requests at the same time; returns the statuses of the valid answers, in the order of their arrival."""
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

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        return Metrics(self.url).total(name, **labels)

    def wait(self, condition: Callable[[], bool], seconds: float = 60.0) -> float:
        """Wait for a condition and return the seconds until then. Raises ValueError after `seconds`."""
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > seconds:
                raise ValueError(f"timed out after {seconds:g} s")
            time.sleep(0.02)
        return time.monotonic() - started

    def answered_during(self, fault: Callable[[], None], clients: int = CLIENTS) -> tuple[set[str], int]:
        """Send requests during a fault; returns the ids answered with 200, and the number without an answer.

        The fault begins after the first 20 answers. Raises ValueError for a 503 without Retry-After.
        """
        stop, answered, unanswered, errors = threading.Event(), set(), [0], list[ValueError]()

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
                    unanswered[0] += 1
                    time.sleep(0.02)
                except ValueError as error:
                    errors.append(error)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        try:
            self.wait(lambda: len(answered) > 20)
            fault()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return answered, unanswered[0]

    def lost(self, answered: set[str]) -> int:
        """Number of requests that the server logged with status 200, but whose client did not get that answer."""
        logged = {
            name for name, status in self.logged().items() if status == 200 and name.startswith("fault-")
        }
        return len(logged - answered)


def sigterm(testbed: Testbed) -> Row:
    """SIGTERM with large batches in flight and short requests arriving.

    uvicorn logs the number of requests that it cancels; they count as lost. A request that was refused, or dropped
    unread, was not accepted.
    """
    with testbed.server() as process:
        statuses: list[int] = []
        batches: list[threading.Thread] = []
        took = [0.0]

        def batch() -> None:
            statuses.append(testbed.ask(testbed.texts[:256], tau=0))

        def in_flight() -> bool:
            if not batches or not batches[-1].is_alive():  # the last one finished too early
                batches.append(threading.Thread(target=batch))
                batches[-1].start()
            return testbed.metric("de3_queue_texts") > 100

        def stop() -> None:
            testbed.wait(in_flight)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT_S)
            took[0] = time.monotonic() - started
            batches[-1].join()

        answered, unanswered = testbed.answered_during(stop)
    cancelled = re.findall(r"Cancel (\d+) running task", testbed.log.read_text(errors="replace"))
    lost = testbed.lost(answered) + sum(map(int, cancelled)) + (process.returncode != 0)
    lost += len(batches) - statuses.count(200)
    return Row(
        "SIGTERM under load, a batch of 256 texts in flight",
        "refuses new connections, answers accepted requests, "
        f"exits with {process.returncode} after {took[0]:.1f} s ({len(answered)} answered, then {unanswered} "
        "refused)",
        lost,
    )


def killed(testbed: Testbed) -> Row:
    """SIGKILL while a model is being reloaded, then a restart."""
    with TemporaryDirectory() as folder:
        store = Path(shutil.copytree(testbed.store, Path(folder) / "store"))
        for _ in range(3):
            with testbed.server(store=store) as process:
                threading.Thread(target=_try_reload, args=(testbed,), daemon=True).start()
                time.sleep(random.uniform(0.1, 0.8))
                process.kill()
                process.wait()
            _verify(store)
        with testbed.server(store=store):
            status = testbed.ask(testbed.texts[:1])
    return Row(
        "SIGKILL while a model is reloaded, three times",
        f"the store is intact, and the server restarts ({status}); in-flight requests get no answer",
        0 if status == 200 else 1,
    )


def process_killed(testbed: Testbed) -> Row:
    """SIGKILL of one of two processes, ten times, under load."""
    seconds: list[float] = []
    with testbed.server("--processes", "2") as server:

        def alive() -> list[int]:
            started = re.findall(r"Started server process \[(\d+)\]", testbed.log.read_text(errors="replace"))
            return [pid for pid in map(int, started) if Path(f"/proc/{pid}/task").exists()]

        def is_complete(times: int) -> bool:
            """True once all processes have become ready this many times."""
            log = testbed.log.read_text(errors="replace")
            return log.count(": 2 processes, ") + log.count("is replaced, after") == times

        def kill() -> None:
            testbed.wait(partial(is_complete, 1))
            for number in range(PROCESS_KILLS):
                os.kill(random.choice(alive()), signal.SIGKILL)
                seconds.append(testbed.wait(partial(is_complete, number + 2)))
                replaced = testbed.metric("de3_replaced_processes_total")
                if replaced != number + 1:
                    raise ValueError(f"{number + 1} processes were killed, and {replaced:g} were replaced")
                time.sleep(ENDS_S / MAX_ENDS)  # if they end more often, the server stops

        answered, unanswered = testbed.answered_during(kill)
        counted = testbed.metric("de3_requests_total", status="200")
        ended = server.poll() is not None
    return Row(
        f"SIGKILL of one of two processes, {PROCESS_KILLS} times",
        f"replaced after {statistics.median(seconds):.1f} s (median; at most {max(seconds):.1f} s); {len(answered)} "
        f"requests answered meanwhile, {counted:.0f} of them in the metrics; {unanswered} in flight in a killed "
        "process got no answer",
        testbed.lost(answered) + ended + (unanswered > PROCESS_KILLS * CLIENTS),
    )


def _try_reload(testbed: Testbed) -> None:
    with suppress(OSError):  # the server is killed meanwhile
        reload(testbed.url, testbed.model, KEY)


_WRITER = """
import json, sys
from pathlib import Path
from de3.model_store.manifest import Manifest
from de3.model_store.store import Store
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
    """A process that keeps writing new versions of a model, as an export does."""
    command = [sys.executable, "-c", _WRITER, str(store), model]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _verify(store: Path) -> int:
    """Check every file of every version; returns the number of versions. Raises StoreError if one is damaged."""
    models = Store(store)
    names = models.names()
    for name in names:
        models.open(name).verify()
    return len(names)


def killed_while_writing(testbed: Testbed) -> Row:
    """SIGKILL at random times while a version is being written."""
    with TemporaryDirectory() as folder:
        store = Path(shutil.copytree(testbed.store, Path(folder) / "store"))
        rng, versions = random.Random(4), 0
        for _ in range(KILLS):
            writer = _writer(store, testbed.model)
            assert writer.stdout is not None
            writer.stdout.readline()  # one version is complete, and the next is being written
            time.sleep(rng.uniform(0.0, 0.3))
            writer.kill()
            writer.communicate()
            versions = _verify(store)
            surplus = sorted(Store(store).versions()[testbed.model])[1:-1]
            for version in surplus:  # free disk space
                shutil.rmtree(store / testbed.model / str(version))
        drafts = len(list((store / testbed.model).glob(".draft-*")))
    return Row(
        f"SIGKILL while a version is written, {KILLS} times",
        f"every visible version is intact (at the end: {versions}); {drafts} hidden drafts are left, which the "
        "first export after a day removes",
        0,
    )


def full_disk(testbed: Testbed) -> Row:
    """No space left on the disk while a version is written."""
    fault = "the disk is full while a version is written"
    size = sum(p.stat().st_size for p in (testbed.store / testbed.model).rglob("*") if p.is_file())
    with TemporaryDirectory() as folder, ExitStack() as stack:
        options = f"size={int(1.5 * size)}"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True
        )
        if mounted.returncode != 0:
            return Row(fault, "not tested: no permission to mount a small disk", None)
        stack.callback(subprocess.run, ["umount", folder], check=False)
        store = Path(folder) / "store"
        shutil.copytree(testbed.store / testbed.model, store / testbed.model)
        writer = _writer(store, testbed.model)
        _, errors = writer.communicate(timeout=TIMEOUT_S)
        versions = _verify(store)
        drafts = [p.name for p in (store / testbed.model).iterdir() if p.name.startswith(".")]
    return Row(
        fault,
        f"the export fails ({errors.strip().splitlines()[-1]}); the existing version is intact; "
        f"{len(drafts)} drafts are left",
        0 if versions >= 1 and not drafts else 1,
    )


def hang_up(testbed: Testbed) -> Row:
    """Clients that hang up as soon as they have sent their request."""
    with testbed.server("--max-queue", "6000"):  # room for all texts

        def many() -> None:
            for number in range(100):
                testbed.send(testbed.texts[:50], f"hang-up-{number}", tau=0).close()

        answered, unanswered = testbed.answered_during(many)
        # A request may still be in its connection's buffer, where the server does not see it.
        took = testbed.wait(lambda: len(_hang_ups(testbed)) == 100)
        took += testbed.wait(lambda: testbed.metric("de3_in_flight_requests") == 0)
        gone = testbed.metric("de3_rejected_total", cause="client_gone")
        lost = testbed.lost(answered) + unanswered
    statuses = _hang_ups(testbed)
    dropped, done = statuses.count(CLIENT_GONE), statuses.count(200)  # finished before the client hung up
    if not dropped or dropped + done != 100 or gone != dropped:
        raise ValueError(f"{dropped} of 100 requests were dropped (metric: {gone:.0f}), {done} were answered")
    return Row(
        "100 clients hang up, with 50 texts each at full depth",
        f"the texts of {dropped} are dropped at the next layer, nothing is in flight {took:.1f} s "
        f"later, {len(answered)} other requests were answered meanwhile",
        lost,
    )


def _hang_ups(testbed: Testbed) -> list[int]:
    """The statuses that the server logged for clients that hung up."""
    return [status for name, status in testbed.logged().items() if name.startswith("hang-up-")]


def slow_readers(testbed: Testbed) -> Row:
    """Clients that never read their answers."""
    with testbed.server():
        before = testbed.metric("process_resident_memory_bytes")
        with ExitStack() as stack:

            def many() -> None:
                for _ in range(50):
                    client = stack.enter_context(testbed.send(testbed.texts[:200], explain=True))
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                time.sleep(3)

            answered, unanswered = testbed.answered_during(many)
            grown = (testbed.metric("process_resident_memory_bytes") - before) / 1e6
            took = testbed.wait(lambda: _connections(testbed.port) <= 2, 90)
        lost = testbed.lost(answered) + unanswered
    return Row(
        "50 clients do not read their answers",
        f"their answers stay in the socket buffers (the server grew by {grown:.0f} MB), and all connections "
        f"were closed after {took:.0f} s; {len(answered)} other requests were answered meanwhile",
        lost,
    )


def _connections(port: int) -> int:
    """Number of the server's established connections, from the kernel's table."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "01" for row in rows)


def slow_heads(testbed: Testbed) -> Row:
    """Clients that start a request and never finish it."""
    with testbed.server():
        clients = [socket.create_connection(("127.0.0.1", testbed.port)) for _ in range(200)]

        def drip() -> None:
            for client in clients:
                client.sendall(b"POST /classify HTTP/1.1\r\n")
            time.sleep(2)

        answered, unanswered = testbed.answered_during(drip)
        took = testbed.wait(lambda: _connections(testbed.port) <= 2, 60)
        for client in clients:
            client.close()
        lost = testbed.lost(answered) + unanswered
    return Row(
        "200 clients start a request and never finish it",
        f"their connections time out after 10 s (all were closed {took:.0f} s later); {len(answered)} other "
        "requests were answered",
        lost,
    )


def overload(testbed: Testbed) -> Row:
    """More texts at once than the queue holds."""
    with testbed.server("--max-queue", "300"):
        waves = 0
        statuses: list[int] = []
        # On a busy machine the requests of a wave may arrive too slowly to overload the server.
        while not statuses.count(503) and waves < WAVES:
            waves += 1
            statuses = testbed.at_once([testbed.texts[:100]] * 40, tau=0)
        after = testbed.ask(testbed.texts[:1])
    refused = statuses.count(503)
    if not refused or after != 200:
        raise ValueError(f"{refused} requests were refused, and the next one got {after}")
    return Row(
        "40 batches of 100 texts at once, a queue of 300",
        f"{statuses.count(200)} are answered, {refused} refused with 503 and Retry-After; it keeps serving",
        40 - refused - statuses.count(200),
    )


def clock(testbed: Testbed) -> Row:
    """The wall clock, as the server sees it, jumps a day ahead, a day behind, and back."""
    fault = "the clock jumps a day forward, two days back, and back to the right time"
    library = next((path for path in CLOCK_LIBRARIES if Path(path).exists()), None)
    if library is None:
        return Row(fault, "not tested: libfaketime is not installed (Debian: libfaketime)", None)
    jump = testbed.folder / "clock"

    def set_clock(offset: str) -> None:  # atomically: the library aborts the process on a partial line
        (testbed.folder / "clock.new").write_text(offset)
        (testbed.folder / "clock.new").replace(jump)

    set_clock("+0")
    faked = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(jump),
        "FAKETIME_NO_CACHE": "1",
        # The monotonic clock, which timers use, does not jump. The variable's name depends on libfaketime's version.
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    before = {name: os.environ.get(name) for name in faked}
    os.environ.update(faked)
    try:
        with testbed.server() as process:
            for name in faked:
                os.environ.pop(name)

            def jumps() -> None:
                for offset in ("+1d", "-1d", "+0"):
                    set_clock(offset)
                    time.sleep(1.5)

            answered, unanswered = testbed.answered_during(jumps)
            alive = process.poll() is None
            lost = testbed.lost(answered) + unanswered
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return Row(
        fault,
        f"nothing but the timestamps changes; {len(answered)} requests were answered",
        lost + (not alive),
    )


FAULTS = (
    *(sigterm, killed, process_killed, killed_while_writing, full_disk),
    *(hang_up, slow_readers, slow_heads, overload, clock),
)


def faults(
    testbed: Testbed, only: Sequence[str] = (), on_row: Callable[[Row], None] = lambda _: None
) -> list[Row]:
    """Test every fault, or those named, each with servers of its own. Raises ValueError for an unknown name.

    A fault whose test raises an error counts as one lost request.
    """
    known = [fault.__name__ for fault in FAULTS]
    if wrong := [name for name in only if name not in known]:
        raise ValueError(f"no fault {wrong[0]!r}; there are: {', '.join(known)}")
    rows = []
    for fault in FAULTS:
        if only and fault.__name__ not in only:
            continue
        try:
            row = fault(testbed)
        except (StoreError, ValueError, OSError, HTTPException, subprocess.SubprocessError) as error:
            row = Row((fault.__doc__ or fault.__name__).rstrip("."), f"FAILED: {error}", 1)
        rows.append(row)
        on_row(row)
    return rows
