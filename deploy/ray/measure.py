"""What Ray costs and gives on this machine: python -m deploy.ray.measure --help"""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import ray
import typer
from ray import serve
from ray.cluster_utils import Cluster

from deploy.ray.app import build
from loadtest.client import Target, load, quantile
from loadtest.servers import ours, running
from loadtest.texts import Sample, read

TIMEOUT_S = 60.0
SCALE_TIMEOUT_S = 240.0


@contextmanager
def cluster(nodes: int, cores: int, port: int) -> Iterator[Cluster]:
    """A Ray cluster on this machine: so many nodes, each a raylet of its own with so many cores."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send statistics
    # Requests of a replica that died are asked again: in Ray's own proxy, and where HAProxy stands before it.
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "deploy.ray.repeat:middlewares"
    os.environ["RAY_SERVE_HAPROXY_RETRY_ON"] = "conn-failure empty-response junk-response"
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": cores, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            found.add_node(num_cpus=cores)
        ray.init(address=found.address, logging_level="ERROR", log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield found
    finally:
        serve.shutdown()
        ray.shutdown()
        found.shutdown()


def deploy(**arguments: Any) -> None:
    """Deploy, or deploy anew, and wait until it serves."""
    serve.run(build({k: str(v) for k, v in arguments.items()}), name="de3", route_prefix="/")


def replicas() -> dict[int, str]:
    """Process and node of every replica."""

    @ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
    def pids() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if path.read_bytes().startswith(b"ray::ServeReplica:de3"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    found = {}
    for pid in ray.get(pids.remote()):
        with suppress(OSError):  # it ended meanwhile
            found[pid] = _node_of(pid)
    return found


def _node_of(pid: int) -> str:
    """The raylet that started a worker: its parent process. Raises OSError for one that ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


class Clients:
    """Asks in a loop, each client on connections that it keeps, and counts what comes."""

    def __init__(self, port: int, texts: list[str], count: int = 4) -> None:
        self._port, self._texts = port, texts
        self._stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        i = number
        while not self._stop.is_set():
            i += 1
            try:
                connection.request(
                    "POST", "/classify", json.dumps({"input": self._texts[i % len(self._texts)]})
                )
                answer = connection.getresponse()
                content = answer.read()
                model = json.loads(content)["model"] if answer.status == 200 else content[:80].decode()
                self.counts[f"{answer.status} {model}"] += 1
            except (OSError, HTTPException) as error:
                self.counts[repr(error)[:80]] += 1
                connection.close()


def kill_one() -> int:
    """SIGKILL for one replica; its process."""
    pid = next(iter(replicas()))
    os.kill(pid, signal.SIGKILL)
    return pid


def _rate(port: int, samples: list[Sample], seconds: float, connections: int) -> tuple[float, float]:
    """Answers a second, and p50 in ms."""
    run = load(Target(f"http://127.0.0.1:{port}"), samples, seconds, connections=connections)
    return run.rate(), quantile(run.latencies_ms(), 0.5)


def _until(count: int, began: float) -> float:
    """Waits for so many replicas; seconds since then."""
    while len(replicas()) != count:
        if time.monotonic() - began > SCALE_TIMEOUT_S:
            raise SystemExit(f"{len(replicas())} replicas after {SCALE_TIMEOUT_S:g} s, not {count}")
        time.sleep(0.5)
    return time.monotonic() - began


def main(
    texts: Annotated[Path, typer.Argument(help="Texts to send, as for de3 loadtest run.")],
    store: Annotated[Path, typer.Option(help="A model store.")] = Path("models"),
    model: Annotated[str, typer.Option(help="A model's name.")] = "sst2",
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "sentence",
    seconds: Annotated[float, typer.Option(help="Length of one measurement.")] = 6.0,
    rounds: Annotated[int, typer.Option(help="Repetitions; the servers take turns.")] = 3,
    port: Annotated[int, typer.Option(help="Port to use.")] = 8800,
) -> None:
    """Measure the proxy's cost and a second replica's gain; kill a replica; change models; use two nodes."""
    samples = read(texts, text_column, "label", [])
    rows: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, at: int) -> None:
        for connections in (1, 16):
            rows.setdefault(f"{name}, {connections} connections", []).append(
                _rate(at, samples, seconds, connections)
            )

    with TemporaryDirectory() as folder, cluster(1, 4, port):
        for _ in range(rounds):
            server = ours(store, model, options=["--threads", "1"])
            with running(server, port + 1, Path(folder) / "log"):
                note("de3 serve, one engine thread", port + 1)
            for count in (1, 2):
                deploy(store=store, models=model, min_replicas=count, max_replicas=count)
                note(f"Ray, {count} replicas with one thread", port)
    for name, found in rows.items():
        rate, p50 = (median(values) for values in zip(*found, strict=True))
        print(f"{name}: {rate:.0f} answers/s, p50 {p50:.2f} ms")
    with cluster(2, 1, port):
        deploy(store=store, models=model, min_replicas=2, max_replicas=2)
        print(f"two nodes: replicas (process: node) {replicas()}")
        with Clients(port, [s.text for s in samples]) as clients:
            time.sleep(2)
            kill_one()
            time.sleep(10)
        print(f"a replica killed under load: {dict(clients.counts)}; replicas now {replicas()}")
        with Clients(port, [s.text for s in samples]) as clients:
            time.sleep(1)
            deploy(store=store, models=model, min_replicas=2, max_replicas=2, tau=0.05)
            time.sleep(1)
        print(f"a rolling change of settings: {dict(clients.counts)}")
    with cluster(1, 2, port):
        deploy(store=store, models=model, min_replicas=1, max_replicas=2)
        began = time.monotonic()
        with Clients(port, [s.text for s in samples], count=16) as clients:
            grown = _until(2, began)
            time.sleep(2)
        began = time.monotonic()
        print(f"autoscaling: 2 replicas {grown:.0f} s after 16 clients came: {dict(clients.counts)}")
        print(f"autoscaling: 1 replica {_until(1, began):.0f} s after they went")


if __name__ == "__main__":
    typer.run(main)
