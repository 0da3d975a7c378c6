"""A long run of everything at once: is memory flat, is every request answered, do answers stay the same?"""

import json
import random
import re
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

from loadtest import fuzz
from loadtest.texts import Sample

CLIENTS = 4
PAUSE_S = 0.02  # of a client, between two requests, on average
LOOK_S = 5.0
IDLE_S = 2.0  # the server closes a connection that is idle for 5 s; a request sent into that would be lost
TIMEOUT_S = 60.0


@dataclass
class Soak:
    """What came of it.

    Attributes:
        counts: requests by kind and status.
        problems: what should not have happened.
        memory: (seconds, MB) of the server's process.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    reloads: int = 0

    def problem(self, what: str) -> None:
        """Note what should not have happened."""
        if len(self.problems) < 50:
            self.problems.append(what)

    def growth_mb(self) -> float:
        """How much the memory grew from the second quarter's median to the last's, MB."""
        values = [mb for _, mb in self.memory]
        quarter = len(values) // 4
        if quarter == 0:
            return 0.0
        second, last = sorted(values[quarter : 2 * quarter]), sorted(values[-quarter:])
        return last[quarter // 2] - second[quarter // 2]


class _Client:
    """One of those that ask; each has a connection that it keeps."""

    def __init__(self, url: str, samples: list[Sample], known: dict[str, str], soak: Soak, seed: int) -> None:
        self._address = urlsplit(url)
        self._samples, self._known, self._soak = samples, known, soak
        self._rng = random.Random(seed)
        self._connection = self._connect()
        self._used = time.monotonic()
        self._kinds: list[tuple[float, Callable[[], None]]] = [
            (0.72, self._one),
            (0.10, self._list),
            (0.05, self._long),
            (0.04, self._in_time),
            (0.05, self._nonsense),
            (0.02, self._hang_up),
            (0.02, self._read_slowly),
        ]

    def run(self, stop: threading.Event) -> None:
        """Ask until told to stop."""
        kinds = [kind for _, kind in self._kinds]
        weights = [weight for weight, _ in self._kinds]
        while not stop.is_set():
            kind = self._rng.choices(kinds, weights)[0]
            try:
                kind()
            except Exception as error:  # an answer of another shape, too: the client must go on
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
            self._connection.close()  # request() opens it again
        self._connection.request("POST", "/classify", json.dumps(body))
        answer = self._connection.getresponse()
        content = answer.read()
        self._used = time.monotonic()
        self._soak.counts[f"{kind} {answer.status}"] += 1
        if answer.status not in allowed:
            self._soak.problem(f"{kind}: {answer.status} {content[:200]!r}")
        return json.loads(content) if answer.status == 200 else None

    def _one(self) -> None:
        text = self._text()
        if answer := self._ask("one text", {"input": text}):
            label = answer["data"][0]["label"]
            if self._known.setdefault(text, label) != label:
                self._soak.problem(f"one text: {text!r} was {self._known[text]}, now {label}")

    def _list(self) -> None:
        texts = [self._text() for _ in range(20)]
        if answer := self._ask("list, explained", {"input": texts, "explain": True, "ood": True}):
            labels = [row["label"] for row in answer["data"]]
            for text, label in zip(texts, labels, strict=True):
                if self._known.setdefault(text, label) != label:
                    self._soak.problem(f"list: {text!r} was {self._known[text]}, now {label}")

    def _long(self) -> None:
        self._ask("long, full depth", {"input": " ".join(self._text() for _ in range(12)), "tau": 0})

    def _in_time(self) -> None:
        self._ask("within 20 ms", {"input": self._text(), "latency_budget_ms": 20}, (200, 503))

    def _nonsense(self) -> None:
        request = fuzz.make(self._rng, self._address.netloc)
        with socket.create_connection((self._address.hostname, self._address.port), TIMEOUT_S) as connection:
            found = fuzz.Found()
            fuzz.ask(connection, request, found)
            for what, _ in found.problems:
                self._soak.problem(f"nonsense: {what}")
            for status, count in found.statuses.items():
                self._soak.counts[f"nonsense {status}"] += count

    def _raw(self, body: dict[str, Any]) -> socket.socket:
        connection = socket.create_connection((self._address.hostname, self._address.port), TIMEOUT_S)
        content = json.dumps(body).encode()
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        return connection

    def _hang_up(self) -> None:
        self._raw({"input": [self._text() for _ in range(50)], "tau": 0}).close()
        self._soak.counts["hung up"] += 1

    def _read_slowly(self) -> None:
        with self._raw({"input": [self._text() for _ in range(100)], "explain": True}) as connection:
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
    """Ask a server everything at once, and reload a model now and then if there is an admin key."""
    found, stop = Soak(), threading.Event()
    known: dict[str, str] = {}  # labels by text, from its first answer
    clients = [_Client(url, samples, known, found, seed) for seed in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, args=(stop,)) for client in clients]
    for thread in threads:
        thread.start()
    started = reloaded = time.monotonic()
    try:
        while (passed := time.monotonic() - started) < seconds:
            stop.wait(min(LOOK_S, reload_s, max(0.1, seconds - passed)))
            found.memory.append((time.monotonic() - started, _memory_mb(url)))
            if admin_key and time.monotonic() - reloaded > reload_s:
                reloaded = time.monotonic()
                _reload(url, model or "", admin_key, found)
            on_progress(passed, found)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return found


def _memory_mb(url: str) -> float:
    with urlopen(url + "/metrics", timeout=TIMEOUT_S) as answer:
        found = re.search(r"^process_resident_memory_bytes (\S+)", answer.read().decode(), re.M)
    return float(found[1]) / 1e6 if found else 0.0


def _reload(url: str, model: str, key: str, found: Soak) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        with urlopen(Request(f"{url}/v1/models/{model}/load", b"{}", headers), timeout=TIMEOUT_S):
            found.reloads += 1
    except OSError as error:
        found.problem(f"reload: {error!r}")


def check_plots() -> None:
    """Raise ValueError where there is nothing to draw with: better before an hour than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"this command draws a plot ({error}): pip install '.[train]'") from None


def report(found: Soak, out: Path) -> None:
    """Write soak.json and soak.png into out."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    numbers = {
        "requests": dict(found.counts),
        "problems": found.problems,
        "reloads": found.reloads,
        "growth_mb": found.growth_mb(),
        "memory_mb": found.memory,
    }
    (out / "soak.json").write_text(json.dumps(numbers, indent=1))
    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    axes.plot([s / 60 for s, _ in found.memory], [mb for _, mb in found.memory], linewidth=1)
    axes.set_ylim(0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("memory of the server, MB")
    figure.tight_layout()
    figure.savefig(out / "soak.png", dpi=80)
