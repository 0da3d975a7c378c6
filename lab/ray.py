"""Measure the overhead and the scaling of Ray on this machine."""

import json
import os
import signal
import socket
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

from de3.deploy.ray.app import build
from de3.loadtest.client import Target, quantile, send_traffic
from de3.loadtest.servers import ours, running
from de3.loadtest.texts import Sample, read

TIMEOUT_S = 60.0
SCALE_TIMEOUT_S = 300.0


@contextmanager
def cluster(nodes: int, cores: int, port: int) -> Iterator[Cluster]:
    """A Ray cluster on this machine, with Ray Serve's proxy on `port`; each node is a raylet with `cores` cores."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics
    # Retry the requests of a replica that died, in Ray's own proxy and in HAProxy, if Ray uses it.
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "de3.deploy.ray.retry:middlewares"
    os.environ["RAY_SERVE_HAPROXY_RETRY_ON"] = "conn-failure empty-response junk-response"
    # On a busy machine a proxy may need more than the 5 s after which Ray kills it and starts another.
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "300"
    os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"] = "60"
    ray_cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": cores, "include_dashboard": False}
    )
    try:
        for _ in range(nodes - 1):
            ray_cluster.add_node(num_cpus=cores)
        ray.init(address=ray_cluster.address, logging_level="ERROR", log_to_driver=False)
        # One proxy: two nodes would share the port, and a request could reach a proxy that is still starting. Ray waits
        # a minute for it; on a busy machine, it starts later.
        with suppress(TimeoutError):
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        started = time.monotonic()
        while not _listens(port):
            if time.monotonic() - started > SCALE_TIMEOUT_S:
                raise SystemExit(f"Ray's proxy did not start within {SCALE_TIMEOUT_S:g} s")
            time.sleep(0.1)
        yield ray_cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        ray_cluster.shutdown()


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def deploy(**arguments: Any) -> None:
    """Deploy or redeploy the application, with these arguments of `build`, and wait until it is ready."""
    serve.run(build({k: str(v) for k, v in arguments.items()}), name="de3", route_prefix="/")


def replicas() -> dict[int, str]:
    """The node of every replica (the process id of its raylet), by the replica's process id."""

    @ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
    def replica_pids() -> list[int]:
        pids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # the process has ended
                if path.read_bytes().startswith(b"ray::ServeReplica:de3"):
                    pids.append(int(path.parent.name))
        return pids

    nodes = {}
    for pid in ray.get(replica_pids.remote()):
        with suppress(OSError):  # the process has ended
            nodes[pid] = _node_of(pid)
    return nodes


def _node_of(pid: int) -> str:
    """The process id of the raylet that started a worker: its parent. Raises OSError if the worker has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


class Clients:
    """Clients that send requests in a loop on kept-alive connections, and count the answers.

    Attributes:
        counts: number of answers by status and model, or by status and start of the body if the status is not 200;
            also the number of failures of the connection, by error.
    """

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
    """SIGKILL one replica; returns its process id."""
    pid = next(iter(replicas()))
    os.kill(pid, signal.SIGKILL)
    return pid


def _rate(port: int, samples: list[Sample], seconds: float, connections: int) -> tuple[float, float]:
    """Throughput in answers/s, and median latency in ms."""
    run = send_traffic(Target(f"http://127.0.0.1:{port}"), samples, seconds, connections=connections)
    return run.rate(), quantile(run.latencies_ms(), 0.5)


def _scaled_to(count: int, started: float) -> float:
    """Wait for this number of replicas; returns the seconds since `started`, a time of `time.monotonic`.

    Raises SystemExit after SCALE_TIMEOUT_S.
    """
    while len(replicas()) != count:
        if time.monotonic() - started > SCALE_TIMEOUT_S:
            raise SystemExit(f"{len(replicas())} replicas after {SCALE_TIMEOUT_S:g} s, not {count}")
        time.sleep(0.5)
    return time.monotonic() - started


def main(
    texts: Annotated[Path, typer.Argument(help="Texts to send, as for de3 loadtest run.")],
    store: Annotated[Path, typer.Option(help="The model store.")] = Path("models"),
    model: Annotated[str, typer.Option(help="Name of the model.")] = "sst2",
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "sentence",
    seconds: Annotated[float, typer.Option(help="Duration of one measurement.")] = 6.0,
    rounds: Annotated[int, typer.Option(help="Number of repetitions; the servers take turns.")] = 3,
    port: Annotated[int, typer.Option(help="Port of Ray's proxy; de3 serve uses the next one.")] = 8800,
) -> None:
    """Measure the proxy's overhead, scaling to two replicas and nodes, a killed replica, and a rolling update."""
    samples = read(texts, text_column)
    results: dict[str, list[tuple[float, float]]] = {}

    def measure(name: str, port: int) -> None:
        for connections in (1, 16):
            result = _rate(port, samples, seconds, connections)
            results.setdefault(f"{name}, {connections} connections", []).append(result)

    with TemporaryDirectory() as folder, cluster(1, 4, port):
        for _ in range(rounds):
            server = ours(store, model, options=["--threads", "1"])
            with running(server, port + 1, Path(folder) / "log"):
                measure("de3 serve, one engine thread", port + 1)
            for count in (1, 2):
                deploy(store=store, models=model, min_replicas=count, max_replicas=count)
                measure(f"Ray, {count} replicas with one thread", port)
    for name, rates in results.items():
        rate, p50 = (median(values) for values in zip(*rates, strict=True))
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
        started = time.monotonic()
        with Clients(port, [s.text for s in samples], count=16) as clients:
            scale_up_s = _scaled_to(2, started)
            time.sleep(2)
        started = time.monotonic()
        print(f"autoscaling: 2 replicas {scale_up_s:.0f} s after 16 clients started: {dict(clients.counts)}")
        print(f"autoscaling: 1 replica {_scaled_to(1, started):.0f} s after they stopped")
