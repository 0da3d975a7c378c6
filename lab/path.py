"""What a request costs around tokenizer and layers: CPU time beside a bare application and an echo; Python calls."""

import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from de3.loadtest.servers import Running, Server, ours, running
from lab import bare
from lab.processes import MAX_TEXTS, SCRIPT, ratio, run_wrk
from lab.spans.parity import ask

CONNECTIONS = 16
WARM, COUNTED = 300, 500  # requests whose calls are not counted, and those whose are
COUNTS = "DE3_CALLS"  # environment variable: the file to which `profiled` writes


@dataclass
class Side:
    """A server, with its requests/s and CPU time per request, µs, by τ and round."""

    name: str
    server: Running
    rates: dict[float, list[float]] = field(default_factory=dict)
    cpu_us: dict[float, list[float]] = field(default_factory=dict)


def bare_server(processes: int) -> Server:
    """`lab.bare` in several processes; its model is in the environment."""
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "lab.bare:app",
        "--workers",
        str(processes),
        "--port",
        "{port}",
    ]
    return Server("bare", [*command, "--no-access-log", "--log-level", "warning"], ready="/")


def measure(
    store: Path,
    model: str,
    texts: Sequence[str],
    taus: Sequence[float],
    rounds: int,
    seconds: float,
    port: int,
) -> list[Side]:
    """Our server, the bare application and the echo, in turn at each τ; the echo is asked once in each round."""
    chosen = random.Random(0).sample(texts, min(len(texts), MAX_TEXTS))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        kinds: tuple[tuple[str, Server, dict[str, str]], ...] = (
            ("this server", ours(store, model), {}),
            ("bare application", bare_server(2), {bare.STORE: str(store), bare.MODEL: model}),
            ("echo", bare_server(2), {}),
        )
        sides = []
        for number, (name, server, variables) in enumerate(kinds):
            os.environ.update(variables)
            started = stack.enter_context(running(server, port + number, folder / f"{number}.log"))
            for variable in variables:
                del os.environ[variable]
            sides.append(Side(name, started))
        scripts = {tau: folder / f"{tau}.lua" for tau in taus}
        for tau, script in scripts.items():
            bodies = [json.dumps({"input": text, "tau": tau}) for text in chosen]
            script.write_text(SCRIPT % ",\n".join(f"[==[{body}]==]" for body in bodies))
        _check(sides, chosen[:50], taus)
        for number in range(-1, rounds):  # round −1 warms up
            for tau, script in scripts.items():
                for side in sides if tau == taus[0] else sides[:2]:
                    load = run_wrk(side.server, script, CONNECTIONS, seconds)
                    if number >= 0:
                        side.rates.setdefault(tau, []).append(load.rate)
                        side.cpu_us.setdefault(tau, []).append(load.cpu_us)
    return sides


def _check(sides: Sequence[Side], texts: Sequence[str], taus: Sequence[float]) -> None:
    """Raise ValueError if the bare application answers otherwise than our server."""
    bodies = [{"input": text, "tau": tau} for tau in taus for text in texts]
    answers = []
    for side in sides[:2]:
        rows = [one["data"][0] for one in ask(side.server.target.url, bodies)]
        answers.append([(row["label"], row["probs"], row["exit"]["layer"]) for row in rows])
    if answers[0] != answers[1]:
        raise ValueError("the bare application answers otherwise than the server")


def table(sides: Sequence[Side]) -> Iterator[str]:
    """Yield lines of a Markdown table: medians, and the bare application's CPU time as a share of the server's."""
    server, other, echo = sides
    yield "| τ | this server: CPU µs, requests/s | bare application | bare / this server | echo |"
    yield "| --- | --- | --- | --- | --- |"
    for tau in server.cpu_us:
        cells = [
            f"{median(one.cpu_us[tau]):.0f}, {median(one.rates[tau]):,.0f}" if tau in one.cpu_us else ""
            for one in (server, other, echo)
        ]
        cells.insert(2, ratio(other.cpu_us[tau], server.cpu_us[tau]))
        yield f"| {tau:g} | {' | '.join(cells)} |"


def calls(store: Path, model: str, texts: Sequence[str], tau: float, port: int) -> dict[str, Counter[str]]:
    """Python calls per request of one text at a time, by thread and function; of a server with one process."""
    with TemporaryDirectory() as name:
        file = Path(name) / "calls.json"
        server = ours(store, model, options=["--processes", "1", "--threads", "1"])
        server.command[1:4] = ["-m", "lab.path"]  # instead of -P -m de3.cli
        bodies = [{"input": texts[i % len(texts)], "tau": tau} for i in range(WARM + COUNTED)]
        os.environ[COUNTS] = str(file)
        try:
            with running(server, port, Path(name) / "log") as started:
                found = []
                for part in (bodies[:WARM], bodies[WARM:]):
                    list(ask(started.target.url, part))
                    file.unlink(missing_ok=True)
                    started.process.send_signal(signal.SIGUSR1)
                    while not file.exists():
                        threading.Event().wait(0.05)
                    found.append(json.loads(file.read_text()))
        finally:
            del os.environ[COUNTS]
    before, after = found
    return {
        thread: Counter(
            {what: (n - before.get(thread, {}).get(what, 0)) / COUNTED for what, n in counts.items()}
        )
        for thread, counts in after.items()
    }


def profiled() -> None:
    """Run `de3` with the arguments of this command, and count Python calls; SIGUSR1 writes the counts to a file."""
    counts: dict[str, Counter[tuple[str, str]]] = {}

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            of = counts.setdefault(threading.current_thread().name.split("-")[0], Counter())
            of[code.co_filename, code.co_qualname] += 1

    def write(*_: Any) -> None:
        sys.setprofile(None)
        file = Path(os.environ[COUNTS])
        shown = {
            thread: {f"{Path(path).stem}: {name}": n for (path, name), n in list(of.items())}
            for thread, of in list(counts.items())
        }
        file.with_suffix(".new").write_text(json.dumps(shown))
        file.with_suffix(".new").rename(file)
        sys.setprofile(count)

    signal.signal(signal.SIGUSR1, write)
    threading.setprofile(count)
    sys.setprofile(count)
    from de3.cli import main

    main()


if __name__ == "__main__":
    profiled()
