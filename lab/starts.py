"""Time from the command to the first answer, and peak memory until then, for servers of a stock classifier."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import Request, urlopen

from de3.loadtest.servers import START_S, Running, Server, peer

TEXT = "a film that is better than it has any right to be"
PAUSE_S = 0.02


@dataclass(frozen=True)
class Start:
    """One start of a server.

    Attributes:
        seconds: from the command to the first answer.
        peak_mb: peak memory of the server's processes until then, MB (PSS).
    """

    seconds: float
    peak_mb: float


def measure(folder: Path, port: int, rounds: int) -> dict[str, list[Start]]:
    """Start each server in turn, `rounds` times; returns the starts by server.

    The servers are ours with an empty cache, ours with a filled cache, and transformers with FastAPI. folder: a stock
    classifier. Raises ValueError if a server does not answer, or if the environment of transformers cannot be created.
    """
    other = peer("transformers, FastAPI", "transformers_app", str(folder))
    other.prepare()
    found: dict[str, list[Start]] = {}
    for _ in range(rounds):
        with TemporaryDirectory() as cache:
            for name in ("de3, cold", "de3, warm"):
                found.setdefault(name, []).append(_start(_ours(folder), port, cache))
        found.setdefault(other.name, []).append(_start(other, port))
    return found


def table(found: dict[str, list[Start]]) -> Iterator[str]:
    """Yield the medians as lines of a Markdown table."""
    yield "| | first answer, s | peak memory (PSS), MB |"
    yield "| --- | --- | --- |"
    for name, starts in found.items():
        times, peaks = ([getattr(s, key) for s in starts] for key in ("seconds", "peak_mb"))
        span = f"({min(times):.1f} … {max(times):.1f})" if len(times) > 1 else ""
        yield f"| {name} | {median(times):.1f} {span} | {median(peaks):.0f} |"


def _ours(folder: Path) -> Server:
    return Server("de3", [sys.executable, "-m", "de3.cli", "serve", str(folder), "--port", "{port}"])


def _start(server: Server, port: int, cache: str = "") -> Start:
    """Start a server, measure until it answers, and stop it; raises ValueError if it does not answer."""
    with _process(server, port, cache) as process:
        began, peak = time.monotonic(), 0.0
        running = Running(server.target(port), process)
        while time.monotonic() < began + START_S and process.poll() is None:
            peak = max(peak, running.memory_mb())
            if _answers(f"{running.target.url}{server.path}", server.body(TEXT)):
                return Start(time.monotonic() - began, peak)
            time.sleep(PAUSE_S)
        raise ValueError(f"{server.name} gave no answer: {' '.join(server.command)}")


@contextmanager
def _process(server: Server, port: int, cache: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [part.replace("{port}", str(port)) for part in server.command]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"DE3_CACHE": cache},
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str, body: dict[str, object]) -> bool:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=10) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False
