"""A server of several processes looks like one server to its clients."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from de3.model_store.store import Artifact, Store
from de3.runtime.processes import number_of_processes
from de3.server.processes.samples import MAXIMA, MINIMA, SUMS, Family, merged
from de3.server.processes.worker import part_of
from de3.server.settings import Settings
from tests.fixtures import make_rows
from tests.serving import CERTIFICATES, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
ADMIN, USER = "an-admin-key-of-some-length", "a-user-key-of-some-length"
OTHER, THIRD = "another-key-of-some-length", "a-third-key-of-some-length"
TEXTS = [text for text, _ in make_rows(600, 91)]

DE3 = "from de3.cli import main; main()"


class Running:
    """`de3 serve --processes 2` as a user runs it.

    folder: the working directory. code: Python code to run instead of `de3`, with the same arguments.
    """

    systemd: socket.socket

    def __init__(self, store: Path, *arguments: str, code: str = DE3, folder: Path | None = None) -> None:
        # The `de3` script, too, has no working directory on its path.
        program = [sys.executable, "-c", f"import sys; sys.path[0] = {str(Path.cwd())!r}; {code}"]
        command = [*program, "serve", "--store", str(store), "--processes", "2", *arguments]
        environment = {**os.environ, "DE3_PORT": "0", "DE3_ADMIN_KEYS": f"root {ADMIN}"}
        self.headers: dict[str, str] = {}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stderr=pipe, text=True, env=environment, cwd=folder)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def logged(self, pattern: str) -> list[str]:
        return [found for line in list(self.log) for found in re.findall(pattern, line)]

    def wait(self) -> "Running":
        until(lambda: self.logged("running on") or self.process.poll() is not None, "the port")
        (self.url,) = self.logged(r"running on (http://[0-9.:]+)")
        until(lambda: self.get("/ready").status_code == 200, "readiness")
        return self

    @property
    def pids(self) -> list[int]:
        """The pids of the server processes that are still running."""
        pids = [int(pid) for pid in self.logged(r"Started server process \[(\d+)\]")]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, verify=CERTIFICATES, timeout=30)

    def metric(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def change(self, what: str, **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {ADMIN}", "X-Request-ID": f"my-{what}"}
        return httpx.post(f"{self.url}/v1/models/tiny/{what}", json=body, headers=headers, timeout=60)

    @contextmanager
    def both(self) -> Iterator[list[httpx.Client]]:
        """An HTTP client for each process, connected to it; the connection stays open."""
        with ExitStack() as stack:
            clients: dict[str, httpx.Client] = {}

            def connect() -> bool:
                client = httpx.Client(base_url=self.url, headers=self.headers, timeout=60)
                clients[process_of(stack.enter_context(client).get("/v1/models"))] = client
                return len(clients) == 2

            until(connect, "a connection to each process")
            yield list(clients.values())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        until(lambda: not self.pids, "the processes to end")


def process_of(response: httpx.Response) -> str:
    """An identifier of the process that answered: the first half of each of its request ids."""
    return response.headers["x-request-id"][:16]


def classify(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/classify", json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


@contextmanager
def running(store: Path, folder: Path, code: str, key: str, *arguments: str) -> Iterator[Running]:
    server = Running(store, *arguments, code=code, folder=folder)
    server.headers = {"Authorization": f"Bearer {key}"}
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def versions(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tiny:1, tiny:2 and a damaged tiny:3, all in int8."""
    path = tmp_path_factory.mktemp("store")
    for version in (1, 2, 3):
        folder = path / "tiny" / str(version)
        shutil.copytree(store / "tiny-int8" / "1", folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"name": "tiny", "version": version}))
    segment = path / "tiny" / "3" / "layer_02.onnx"
    segment.write_bytes(segment.read_bytes()[:-1] + b"x")
    return path


# Each of these fails once; a process that hangs is replaced after 4 s.
BROKEN = """
from de3.cli import main
from de3.server.processes import group
from de3.server.processes.channel import Channel
from de3.server.processes.connections import Connections
from de3.server.processes.metrics import SharedMetrics
from tests.test_background import fails_once

for owner, name in ((SharedMetrics, "_read"), (Channel, "_receive"), (Connections, "_accept")):
    setattr(owner, name, fails_once(getattr(owner, name)))
group.LOOP_CHECKS = 4
main()
"""


@pytest.fixture(scope="module")
def server(versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text(f"someone {USER}\nother {OTHER}\nthird {THIRD}\n")
    options = f"--model tiny:1 --guarantee 0.2 --log-format text --api-keys-file {folder}/keys --drain-s 600"
    options += " --rate-limit 10000/day --slo-p99-ms 600000"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, pytest.MonkeyPatch.context() as patch:
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(60)
        patch.setenv("NOTIFY_SOCKET", f"{folder}/notify")
        (folder / "orjson.py").write_text("open('planted', 'w')")
        with running(versions, folder, BROKEN, USER, *options.split()) as one:
            (folder / "keys").unlink()  # a process that replaces another has the keys of the start
            one.systemd = systemd
            yield one
        assert not (folder / "planted").exists()  # no process imports from the working directory


def test_a_supervisor_goes_on_after_errors(server: Running) -> None:
    for task in ("reading_metrics", "process", "event_loop"):
        until(lambda task=task: server.metric("de3_background_errors_total", task=task) == 1, task)
        assert server.logged(f"{task.replace('_', ' ')} failed")
    assert server.metric("de3_replaced_processes_total") == 1
    assert server.get("/ready").status_code == 200
    until(lambda: server.logged(r"process \d is replaced, after"), "the replacement")


def test_the_processes_share_the_weights_and_count_together(server: Running) -> None:
    before = server.metric("de3_requests_total", status="200")
    with server.both() as clients:
        answers = [classify(client, input=TEXTS[:5], tau=0)["data"] for client in clients for _ in range(3)]
        assert all(answer == answers[0] for answer in answers)
    assert server.metric("de3_requests_total", status="200") == before + 6
    assert server.metric("de3_processes") == server.metric("de3_engine_threads") == 2
    # Gauges of the supervisor itself, and one whose name the text format changes.
    own = "de3_processes|de3_audit_(dis|missed|guarantee|tau|tenants)|de3_info$"
    families = text_string_to_metric_families(server.get("/metrics").text)
    gauges = {family.name for family in families if family.type in ("gauge", "info")}
    assert {name for name in gauges if not re.match(own, name)} <= SUMS | MAXIMA | MINIMA
    for pid in server.pids:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert [line.split()[1] for line in maps.splitlines() if "memfd:de3-weights" in line] == ["r--s"]


def test_a_change_is_seen_in_every_process_or_in_none(server: Running, versions: Path) -> None:
    with server.both() as clients:

        def served() -> list[list[str]]:
            models = [client.get("/v1/models").json()["data"] for client in clients]
            assert models[0] == models[1]
            return [[row["id"], row["role"]] for row in models[0]]

        refused = server.change("load", version=3)
        assert refused.status_code == 422 and "layer_02.onnx" in refused.json()["error"]["message"]
        assert served() == [["tiny:1", "current"]]
        line = 'admin root sends POST /v1/models/tiny/load {"version":.?3}, request id my-load'
        until(lambda: len(server.logged(line)) == 1, "the change in the log")
        assert server.change("load", version=2, role="canary", share=0.5).status_code == 200
        assert served() == [["tiny:1", "current"], ["tiny:2", "canary"]]
        assert server.change("load", version=2).json()["role"] == "current"
        assert served() == [["tiny:2", "current"]]
        assert [classify(client, input="good")["model"] for client in clients] == ["tiny:2"] * 2
        back = server.change("rollback").json()
        assert (back["next_start"], back["reason"]) == ("tiny:1", "command line")
        assert (versions / "tiny/pinned").read_text() == "1\n"
        assert served() == [["tiny:1", "current"]]
        assert server.change("load", version=2, role="loaded").status_code == 200
        assert server.change("unload", version=2).json()["unloaded"] == ["tiny:2"]
        assert served() == [["tiny:1", "current"]]
        assert server.change("unload").status_code == 409
        audited = re.findall(r'de3_audit_tau{model="(.*?)"', server.get("/metrics").text)
        assert audited == ["tiny:1"]


def test_a_guarantee_is_one(server: Running) -> None:
    assert server.change("audit/reset").status_code == 200
    with server.both() as clients:
        sent = 0

        def report() -> dict[str, Any]:
            """The report once it counts all texts, and is the same in both processes."""
            reports: list[dict[str, Any]] = []

            def is_complete() -> bool:
                reports[:] = [client.get("/v1/models/tiny/audit").json() for client in clients]
                return reports[0] == reports[1] and reports[0]["texts"] >= sent

            until(is_complete, "the audits")
            return reports[0]

        seeds = iter(range(500, 1000))
        while not sent or report()["tau"]["tau"] == 0:
            for client in clients:
                classify(client, input=[text for text, _ in make_rows(100, next(seeds))])
                sent += 100
        assert report()["texts"] == sent

        def taus() -> set[float]:
            """τ as each process applies it, as the supervisor reports it, and in the metrics of both."""
            choices = [classify(client, input="good", explain=True)["tau_choice"] for client in clients]
            metrics = [server.metric(name, model="tiny:1") for name in ("de3_audit_tau", "de3_tau")]
            return {*(choice["tau"] for choice in choices), *metrics, report()["tau"]["tau"]}

        until(lambda: len(taus()) == 1, "one τ")  # these texts are audited, too, and may change it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_ends_or_hangs_is_replaced_and_its_counts_remain(
    server: Running, number: signal.Signals
) -> None:
    assert server.change("load", version=2).status_code == 200
    with server.both() as clients:
        for client in clients:
            classify(client, input=TEXTS[:50])
    counted, pids = server.metric("de3_requests_total", status="200"), server.pids
    replaced = server.metric("de3_replaced_processes_total")
    os.kill(pids[0], number)
    # Requests could wait for the stopped process, so none is sent before it has ended.
    until(lambda: pids[0] not in server.pids, "the end of the process")

    def is_replaced() -> bool:
        """Meanwhile, the other process answers, or the new one once it has loaded the models."""
        nonlocal counted
        headers = {"Authorization": f"Bearer {THIRD}"}  # which has a rate limit of its own
        with httpx.Client(base_url=server.url, headers=headers, verify=CERTIFICATES) as client:
            classify(client, input="good")
        counted += 1
        assert server.get("/ready").status_code == 200
        return len(server.logged("is replaced, after")) > replaced

    until(is_replaced, "the replacement")
    assert server.metric("de3_requests_total", status="200") == counted
    assert server.metric("de3_replaced_processes_total") == replaced + 1
    assert number == signal.SIGKILL or server.logged("does not answer")
    with server.both() as clients:
        assert [classify(client, input="good")["model"] for client in clients] == ["tiny:2"] * 2
    assert server.change("rollback").status_code == 200


def test_a_rate_limit_is_one(server: Running) -> None:
    body = b"x" * (4096 * 250)  # costs 250 texts, although it is refused
    with server.both() as clients:
        for client in clients:
            client.headers["Authorization"] = f"Bearer {OTHER}"
        answers = [client.post("/classify", content=body) for _ in range(22) for client in clients]
    assert [answer.status_code for answer in answers] == [400] * 40 + [429] * 4


def test_no_request_is_lost_at_the_end(server: Running) -> None:
    """The last test of this server. Its processes end with it, as those of a killed server do: see Running.stop."""
    with server.both() as clients, ThreadPoolExecutor(2) as pool:
        assert server.systemd.recv(100) == b"READY=1"
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/ready").status_code == 503, "the drain")
        assert server.systemd.recv(100) == b"STOPPING=1"
        idle, *_ = clients  # it reuses its connection
        answer = idle.post("/classify", json={"input": "good"})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        body = {"input": ["good " * 60] * 256}
        answers = [pool.submit(client.post, "/classify", json=body) for client in clients]
        in_flight = partial(server.metric, "de3_in_flight_requests")
        until(lambda: in_flight() == 2 or all(a.done() for a in answers), "the requests")
        server.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert server.process.wait(60) == 0
        until(lambda: not server.pids, "the processes to end")


def test_a_process_has_its_part_of_the_limits(store: Path) -> None:
    settings = Settings(store=store, threads=3, max_queue=1000, max_connections=101, processes=2)
    part = part_of(settings, 2)
    assert (part.threads, part.max_queue, part.max_connections) == (2, 500, 51)
    part = part_of(settings, 100)  # at least enough for one request
    assert (part.max_queue, part.max_inflight_bytes) == (settings.max_texts, settings.max_body_bytes)


def large(artifact: Artifact) -> Artifact:
    """The artifact as if it had 12 layers of width 768, and no calibration."""
    sizes = {"hidden_size": 768, "inner": 3072, "num_layers": 12}
    changed = {"encoder": artifact.manifest.encoder.model_copy(update=sizes), "calibration": None}
    return replace(artifact, manifest=artifact.manifest.model_copy(update=changed))


NUMBER = "de3.runtime.processes."
READ_ONLY = {"tempfile.gettempdir": mock.Mock(side_effect=FileNotFoundError), "tempfile.tempdir": None}


@pytest.mark.parametrize(
    ("system", "expected", "says"),
    [
        ({}, 3, ""),
        ({NUMBER + "_memory": lambda: 2**29}, 2, ""),
        (READ_ONLY, 3, ""),  # shared memory is used instead
        (READ_ONLY | {NUMBER + "SHARED_MEMORY": "/nowhere"}, 1, "needs a folder"),
        ({"sys.platform": "darwin"}, 1, "needs Linux"),
        ({NUMBER + "find_spec": lambda _: None}, 1, ""),  # built without a C compiler
    ],
    ids=range(6),
)
def test_the_number_of_processes(
    store: Path, monkeypatch: pytest.MonkeyPatch, system: dict[str, Any], expected: int, says: str
) -> None:
    int8, fp32 = Store(store).open("tiny-int8"), Store(store).open("tiny")
    for name, value in ({NUMBER + "_memory": lambda: 2**40} | system).items():
        monkeypatch.setattr(name, value)

    def number(*artifacts: Artifact, **settings: Any) -> int:
        return number_of_processes(Settings(store=store, **settings), artifacts)

    assert number(int8, threads=3) == expected
    if says:
        with pytest.raises(ValueError, match=says):
            number(int8, processes=2)
    if not system:
        assert number(int8, threads=100) == 64  # however large the machine is
        assert number(int8, threads=3, processes=7) == 7
        assert number(fp32, threads=3) == number(int8, fp32, threads=3) == 1
        assert number(int8, threads=3, runtime="onnxruntime") == 1
        assert number(large(int8), threads=3) == 1 and number(int8, large(int8), threads=9) == 3


def test_metrics_are_merged_by_their_rules() -> None:
    kinds = [(SUMS, "gauge", 6.0), (MAXIMA, "gauge", 3.0), (MINIMA, "gauge", 1.0), ({"x"}, "counter", 6.0)]
    for names, kind, expected in kinds:
        parts = [
            [
                Family(name, "", kind, [(name, {"model": "a"}, n), (name, {"model": str(n)}, n)])
                for name in names
            ]
            for n in (2.0, 1.0, 3.0)
        ]
        for family in merged(parts):
            values = [value for _, labels, value in family.samples if labels == {"model": "a"}]
            assert values == [expected] and len(family.samples) == 4
    assert "de3_ready" in MAXIMA and "de3_queue_texts" in SUMS and "de3_load_level" in MAXIMA
