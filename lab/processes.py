"""Compare a server of several processes with one process of as many threads, and with another checkout."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from de3.loadtest.client import quantile, send_traffic
from de3.loadtest.servers import Running, Server, ours, process_tree, running
from de3.loadtest.texts import Sample

CONNECTIONS = (16, 64)
SHARES = (1 / 3, 2 / 3, 0.9)  # of saturation
MAX_TEXTS = 2000
MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}  # wrk's units of time
SCRIPT = """wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local bodies, i = {%s}, 0
request = function() i = i + 1; return wrk.format(nil, "/classify", nil, bodies[i %% #bodies + 1]) end
"""


@dataclass
class Side:
    """A measured server.

    Attributes:
        rates: requests/s of each round, by number of connections.
        cpu_us: CPU time per request in each round, at 16 connections.
        latencies: (p50, p99) in ms of each round, by share of saturation.
        memory_mb: memory (PSS) at the end.
    """

    name: str
    server: Server
    rates: dict[int, list[float]] = field(default_factory=dict)
    cpu_us: list[float] = field(default_factory=list)
    latencies: dict[float, list[tuple[float, float]]] = field(default_factory=dict)
    memory_mb: float = 0.0


def sides(store: Path, model: str, options: Sequence[str], before: Path | None) -> list[Side]:
    """The servers to compare, in this order: `before` if it is given, one process, and several processes.

    options: of de3 serve. before: folder of another checkout, built in place.
    """
    threads = ours(store, model, options=[*options, "--processes", "1"])
    found = [Side("one process", threads), Side("processes", ours(store, model, options=options))]
    if before is not None:
        # PYTHONPATH, because the processes are forked from a server that imports the modules itself.
        start = ["env", f"PYTHONPATH={before.absolute()}", sys.executable, "-P", "-m", "de3.cli"]
        command = [*start, *ours(store, model, options=options).command[4:]]
        found.insert(0, Side("before", replace(threads, command=command)))
    return found


def measure(found: list[Side], samples: list[Sample], rounds: int, seconds: float, port: int) -> None:
    """Measure all sides in turn, and store the results in them.

    Raises ValueError if wrk is missing or requests fail.
    """
    with TemporaryDirectory() as folder, ExitStack() as stack:
        script = Path(folder) / "post.lua"
        bodies = (f"[==[{json.dumps({'input': s.text})}]==]" for s in samples[:MAX_TEXTS])
        script.write_text(SCRIPT % ",\n".join(bodies))
        started = [
            stack.enter_context(running(side.server, port + i, Path(folder) / f"{i}.log"))
            for i, side in enumerate(found)
        ]
        for _ in range(rounds):
            for connections in CONNECTIONS:
                for side, server in zip(found, started, strict=True):
                    load = run_wrk(server, script, connections, seconds)
                    side.rates.setdefault(connections, []).append(load.rate)
                    if connections == CONNECTIONS[0]:
                        side.cpu_us.append(load.cpu_us)
        saturation = min(median(side.rates[CONNECTIONS[0]]) for side in found)
        for seed in range(rounds):
            for share in SHARES:
                for side, server in zip(found, started, strict=True):
                    run = send_traffic(server.target, samples, seconds, share * saturation, seed=seed)
                    times = run.latencies_ms()
                    both = quantile(times, 0.5), quantile(times, 0.99)
                    side.latencies.setdefault(share, []).append(both)
        for side, server in zip(found, started, strict=True):
            side.memory_mb = server.memory_mb()


class Load(NamedTuple):
    """Requests, requests/s, the server's CPU time per request in µs, and quantiles of the latency in ms."""

    requests: int
    rate: float
    cpu_us: float
    p50_ms: float
    p99_ms: float


def run_wrk(server: Running, script: Path, connections: int, seconds: float) -> Load:
    """Send the script's requests to a server; raises ValueError if wrk is missing or requests fail."""
    command = [
        "wrk",
        "-t1",
        "--latency",
        "--timeout=20s",
        f"-c{connections}",
        f"-d{seconds:g}s",
        "-s",
        str(script),
        server.target.url,
    ]
    before = cpu_us(server)
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise ValueError("wrk is not installed: apt-get install wrk") from None
    used = cpu_us(server) - before
    if "Non-2xx" in output or "Socket errors" in output:
        raise ValueError(f"requests failed:\n{output}")
    if " 0 requests in" in output:
        raise ValueError("the server answered no request")
    requests, rate = re.search(r"(\d+) requests in", output), re.search(r"Requests/sec:\s+(\S+)", output)
    quantiles = [re.search(rf"{part}%\s+([\d.]+)(us|ms|s)\b", output) for part in (50, 99)]
    assert requests and rate
    times = [float(one[1]) * MS[one[2]] for one in quantiles if one]
    return Load(int(requests[1]), float(rate[1]), used / int(requests[1]), *times)


def cpu_us(server: Running, loops_only: bool = False) -> float:
    """CPU time used so far by all threads of the server, or only by the main ones, which run the event loops, µs."""
    files = (
        file
        for pid in process_tree(server.process.pid)
        for file in Path(f"/proc/{pid}/task").glob(f"{pid if loops_only else '*'}/schedstat")
    )
    return sum(int(file.read_text().split()[0]) for file in files) / 1000


def table(found: list[Side]) -> Iterator[str]:
    """Yield the medians as lines of a Markdown table.

    A ratio is the last side's value / the first side's: the median over the rounds, with the range.
    """
    yield "| | " + " | ".join(side.name for side in found) + " | ratio |"
    yield "| --- |" + " --- |" * (len(found) + 1)
    for connections in CONNECTIONS:
        rates = [side.rates[connections] for side in found]
        cells = [f"{median(rate):,.0f}" for rate in rates]
        yield _row(f"requests/s, {connections} connections", cells, _ratio(rates))
    cpu = [side.cpu_us for side in found]
    yield _row("CPU time of a request, µs", [f"{median(values):.0f}" for values in cpu], _ratio(cpu))
    for share in SHARES:
        for i, name in enumerate(("p50", "p99")):
            values = [[both[i] for both in side.latencies[share]] for side in found]
            label = f"{name} at {share:.2f} of the smallest saturation, ms"
            yield _row(label, [f"{median(v):.2f}" for v in values], _ratio(values))
    yield _row("memory (PSS), MB", [f"{side.memory_mb:.0f}" for side in found], "")


def _row(label: str, cells: list[str], ratio: str) -> str:
    return f"| {label} | {' | '.join(cells)} | {ratio} |"


def _ratio(values: list[list[float]]) -> str:
    return ratio(values[-1], values[0])


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """The ratio within a round: its median, and in parentheses its range over the rounds."""
    paired = [a / b for a, b in zip(above, below, strict=True)]
    return f"{median(paired):.2f} ({min(paired):.2f} … {max(paired):.2f})"
