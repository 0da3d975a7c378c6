"""A soak test with mixed traffic: memory must stay flat, and a text must always get the same label."""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from de3.extras import install
from de3.loadtest.client import post
from de3.loadtest.metrics import Metrics
from de3.loadtest.texts import Sample
from lab import fuzz

CLIENTS = 4
PAUSE_S = 0.02  # mean pause of a client between requests
SAMPLE_S = 5.0  # between samples of the memory
IDLE_S = 2.0  # after which to reconnect: the server closes a connection that is idle for 5 s
TIMEOUT_S = 60.0


@dataclass
class Soak:
    """The result of a soak test.

    Attributes:
        counts: number of requests by kind and status.
        problems: wrong, missing or changed answers.
        memory: samples of the server's memory (RSS): seconds since the start, and MB.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    reloads: int = 0

    def problem(self, message: str) -> None:
        """Record a problem, unless 50 are recorded already."""
        if len(self.problems) < 50:
            self.problems.append(message)

    def growth_mb(self) -> float:
        """Growth of the median memory from the second quarter to the last, MB; 0 with fewer than 4 samples."""
        values = [mb for _, mb in self.memory]
        quarter = len(values) // 4
        if quarter == 0:
            return 0.0
        second, last = sorted(values[quarter : 2 * quarter]), sorted(values[-quarter:])
        return last[quarter // 2] - second[quarter // 2]


class _Client:
    """A client that sends random requests; all but malformed, abandoned and slowly read ones share a connection."""

    def __init__(self, url: str, samples: list[Sample], known: dict[str, str], soak: Soak, seed: int) -> None:
        self._address = urlsplit(url)
        self._samples, self._known, self._soak = samples, known, soak
        self._rng = random.Random(seed)
        self._connection = self._connect()
        self._used = time.monotonic()
        self._kinds: list[tuple[float, Callable[[], None]]] = [
            (0.72, self._single),
            (0.10, self._batch),
            (0.05, self._long),
            (0.04, self._with_budget),
            (0.05, self._malformed),
            (0.02, self._hang_up),
            (0.02, self._read_slowly),
        ]

    def run(self, stop: threading.Event) -> None:
        """Send requests until `stop` is set."""
        kinds = [kind for _, kind in self._kinds]
        weights = [weight for weight, _ in self._kinds]
        while not stop.is_set():
            kind = self._rng.choices(kinds, weights)[0]
            try:
                kind()
            except Exception as error:  # including an answer of the wrong shape: the client must continue
                self._soak.problem(f"{kind.__name__}: {error!r}")
                self._connection.close()
                self._connection = self._connect()
            stop.wait(self._rng.expovariate(1 / PAUSE_S))

    def _connect(self) -> HTTPConnection:
        return HTTPConnection(self._address.hostname or "", self._address.port, timeout=TIMEOUT_S)

    def _text(self) -> str:
        return self._rng.choice(self._samples).text

    def _ask(self, kind: str, body: dict[str, Any], allowed: tuple[int, ...] = (200,)) -> Any:
        if time.monotonic() - self._used > IDLE_S:
            self._connection.close()  # request() reopens it
        self._connection.request("POST", "/classify", json.dumps(body))
        answer = self._connection.getresponse()
        content = answer.read()
        self._used = time.monotonic()
        self._soak.counts[f"{kind} {answer.status}"] += 1
        if answer.status not in allowed:
            self._soak.problem(f"{kind}: {answer.status} {content[:200]!r}")
        return json.loads(content) if answer.status == 200 else None

    def _single(self) -> None:
        text = self._text()
        if answer := self._ask("one text", {"input": text}):
            self._compare([text], answer)

    def _batch(self) -> None:
        texts = [self._text() for _ in range(20)]
        if answer := self._ask("batch, explained", {"input": texts, "explain": True, "ood": True}):
            self._compare(texts, answer)

    def _compare(self, texts: list[str], answer: Any) -> None:
        """Report the texts whose label changed."""
        for text, result in zip(texts, answer["data"], strict=True):
            label = result["label"]
            if self._known.setdefault(text, label) != label:
                self._soak.problem(f"{text!r} was {self._known[text]}, now {label}")

    def _long(self) -> None:
        self._ask("long, full depth", {"input": " ".join(self._text() for _ in range(12)), "tau": 0})

    def _with_budget(self) -> None:
        self._ask("within 20 ms", {"input": self._text(), "latency_budget_ms": 20}, (200, 503))

    def _malformed(self) -> None:
        request = fuzz.make(self._rng, self._address.netloc)
        with socket.create_connection((self._address.hostname, self._address.port), TIMEOUT_S) as connection:
            result = fuzz.Result()
            fuzz.send(connection, request, result)
            for problem, _ in result.problems:
                self._soak.problem(f"malformed: {problem}")
            for status, count in result.statuses.items():
                self._soak.counts[f"malformed {status}"] += count

    def _send(self, body: dict[str, Any]) -> socket.socket:
        connection = socket.create_connection((self._address.hostname, self._address.port), TIMEOUT_S)
        connection.sendall(post(body))
        return connection

    def _hang_up(self) -> None:
        self._send({"input": [self._text() for _ in range(50)], "tau": 0}).close()
        self._soak.counts["hung up"] += 1

    def _read_slowly(self) -> None:
        with self._send({"input": [self._text() for _ in range(100)], "explain": True}) as connection:
            time.sleep(0.5)
            answer = HTTPResponse(connection)
            answer.begin()
            content = b""
            while part := answer.read(65536):
                content += part
                time.sleep(0.1)
        if answer.status != 200 or len(json.loads(content)["data"]) != 100:
            self._soak.problem(f"read slowly: {answer.status} {content[:200]!r}")
        self._soak.counts[f"read slowly {answer.status}"] += 1


def soak(
    url: str,
    samples: list[Sample],
    seconds: float,
    model: str | None = None,
    admin_key: str | None = None,
    reload_s: float = 60.0,
    on_progress: Callable[[float, Soak], None] = lambda *_: None,
) -> Soak:
    """Send mixed traffic to a server and, with an admin key, reload a model every `reload_s` seconds."""
    result, stop = Soak(), threading.Event()
    known: dict[str, str] = {}  # label of each text's first answer
    clients = [_Client(url, samples, known, result, seed) for seed in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, args=(stop,)) for client in clients]
    for thread in threads:
        thread.start()
    started = reloaded = time.monotonic()
    try:
        while (passed := time.monotonic() - started) < seconds:
            stop.wait(min(SAMPLE_S, reload_s, max(0.1, seconds - passed)))
            memory_mb = Metrics(url).total("process_resident_memory_bytes") / 1e6
            result.memory.append((time.monotonic() - started, memory_mb))
            if admin_key and time.monotonic() - reloaded > reload_s:
                reloaded = time.monotonic()
                try:
                    reload(url, model or "", admin_key)
                    result.reloads += 1
                except OSError as error:
                    result.problem(f"reload: {error!r}")
            on_progress(passed, result)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return result


def check_plots() -> None:
    """Raise ValueError if matplotlib is missing. Called before a test, which would otherwise fail at its end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"this command draws a plot ({error}): {install('train')}") from None


def report(result: Soak, out: Path) -> None:
    """Write soak.json and soak.png into out."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    numbers = {
        "requests": dict(result.counts),
        "problems": result.problems,
        "reloads": result.reloads,
        "growth_mb": result.growth_mb(),
        "memory_mb": result.memory,
    }
    (out / "soak.json").write_text(json.dumps(numbers, indent=1))
    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    axes.plot([s / 60 for s, _ in result.memory], [mb for _, mb in result.memory], linewidth=1)
    axes.set_ylim(0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("server memory, MB")
    figure.tight_layout()
    figure.savefig(out / "soak.png", dpi=80)


def reload(url: str, model: str, admin_key: str) -> None:
    """Reload a model of our running server; raises OSError if that fails."""
    headers = {"Authorization": f"Bearer {admin_key}", "Content-Type": "application/json"}
    with urlopen(Request(f"{url}/v1/models/{model}/load", b"{}", headers), timeout=60):
        pass
