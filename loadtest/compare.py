"""Compares our server with its peers on one machine, in turn, with the same texts."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from rich.markup import escape

from de3.loadtest import report
from de3.loadtest.client import (
    Run,
    Target,
    accuracy,
    ask_alone,
    differing,
    quantile,
    send_traffic,
    wrong_labels,
)
from de3.loadtest.metrics import Metrics
from de3.loadtest.report import console, write_json
from de3.loadtest.servers import Running, Server, free_port, running
from de3.loadtest.texts import Sample, with_long
from de3.progress import track

CONNECTIONS = 16
LONG_SHARE = 0.05
TAUS = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4)
CURVE = (0.2, 0.4, 0.6, 0.8, 0.95)
START_S = 6.0  # typical time to start a server of a small model, and to warm it up


@dataclass
class Comparison:
    """Runs several servers in turn, each with the machine to itself.

    Attributes:
        servers: first ours, second ours at full depth (without exits, the first is at full depth); then other
            configurations of ours, and the peers.
        rounds: repetitions of the throughput and latency measurements, in which the servers take turns; with 1, only
            throughput is measured.
        full_depth: name of the server with whose labels all others are compared; empty: labels are not compared.
    """

    servers: list[Server]
    samples: list[Sample]
    out: Path
    seconds: float
    rounds: int
    port: int = field(default_factory=free_port)
    full_depth: str = ""
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)

    def expected_s(self) -> float:
        """Rough duration of the measurements of a small model, seconds, once the peers are prepared."""
        runs = len(self.servers) * self.rounds + (4 * self.rounds + 10 if self.rounds > 1 else 0)
        return runs * (START_S + self.seconds)

    def all(self, ours_at: Callable[[float], Server] | None) -> dict[str, Any]:
        """Run the measurements and write results.json and plots.

        ours_at: returns our server at a τ; None: the model has no exits.

        Raises ValueError if our server does not start, or if no peer does.
        """
        self.results["machine"] = {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        }
        self.results["notes"] = {s.name: s.note for s in self.servers if s.note}
        self._prepare()
        self._saturation()
        best = self._best_peer()
        self.results["fastest_peer"] = best.name
        if self.rounds > 1:
            self._latencies(best, ours_at)
        self.results["ratios"] = self._ratios(best)
        write_json(self.out / "results.json", self.results)
        return self.results

    def _latencies(self, best: Server, ours_at: Callable[[float], Server] | None) -> None:
        """Run the measurements of our server and the fastest peer that follow the throughput of all."""
        rate = self._throughput(best.name) / 3
        console.print(
            f"the fastest peer is {best.name}; measuring latency at a third of its throughput: {rate:.0f} requests/s"
        )
        pair = [self.servers[0], best]
        short = self._open_loop("latency", pair, self.samples, rate)
        self._open_loop("mixed", pair, with_long(self.samples, LONG_SHARE), rate)
        report.plot_cdf(
            self.out / "latency-cdf.png",
            {name: run.latencies_ms() for name, run in short.items()},
            f"Latency at {rate:.0f} requests/s",
        )
        self._stages()
        self._curve(pair)
        if ours_at is not None:
            self._saved()
            self._taus(ours_at)

    def _prepare(self) -> None:
        """Create environments and convert models; peers for which that fails are omitted."""
        for server in [s for s in self.servers if s.script]:
            console.print(f"preparing {server.name}: the first time, this can take minutes")
            try:
                server.prepare()
            except ValueError as error:
                self._leave_out(server, error)

    def _leave_out(self, server: Server, error: ValueError) -> None:
        console.print(f"[bold red]left out:[/] {escape(str(error))}")
        self.results["notes"][server.name] = f"left out: {str(error).splitlines()[-1]}"
        self.servers.remove(server)

    def _started(self, server: Server) -> Any:
        return running(server, self.port, self.out / "server.log")

    def _measure(self, server: Running, samples: list[Sample], seconds: float, rate: float | None) -> Run:
        """One run after a short warm-up."""
        send_traffic(server.target, samples[:200], 1.0, connections=CONNECTIONS)
        return send_traffic(server.target, samples, seconds, rate, CONNECTIONS)

    def _saturation(self) -> None:
        rows: dict[str, list[dict[str, Any]]] = {s.name: [] for s in self.servers}
        alone: dict[str, list[str | None]] = {}
        for number in range(self.rounds):
            for server in list(self.servers):
                console.print(f"saturation, round {number + 1} of {self.rounds}: {server.name}")
                try:
                    rows[server.name].append(self._saturated(server, alone))
                except ValueError as error:
                    if server in self.servers[:2]:
                        raise
                    self._leave_out(server, error)
                    del rows[server.name]
        self.results["saturation"] = rows
        full = alone.get(self.full_depth)
        self.results["differ"] = {
            name: None if full is None else differing(self.samples, alone[name], full) for name in rows
        }
        console.print(report.table({name: runs[0] for name, runs in rows.items()}))

    def _saturated(self, server: Server, alone: dict[str, list[str | None]]) -> dict[str, Any]:
        """Measure a server in one closed-loop run.

        alone: by server name, the labels of the texts when each is sent alone; the server's are added if missing.
        """
        with self._started(server) as started:
            if server.name not in alone:
                samples = track(self.samples, f"sending {len(self.samples)} texts one by one")
                alone[server.name] = ask_alone(started.target, samples)
            run = self._measure(started, self.samples, self.seconds, None)
            row = report.summary(run, wrong_labels(run, alone[server.name]))
            # In a closed loop, a faster server answers other texts, or the same ones more often.
            row["accuracy"] = accuracy(self.samples, alone[server.name])
            row["memory_mb"] = round(started.memory_mb(), 1)
        return row

    def _open_loop(
        self, name: str, servers: list[Server], samples: list[Sample], rate: float
    ) -> dict[str, Run]:
        """Measure latencies at a rate, the servers taking turns; returns the last run of each."""
        rows: dict[str, list[dict[str, Any]]] = {s.name: [] for s in servers}
        last = {}
        for number in range(self.rounds):
            for server in servers:
                console.print(f"{name}, round {number + 1} of {self.rounds}: {server.name}")
                with self._started(server) as started:
                    run = last[server.name] = self._measure(started, samples, self.seconds, rate)
                    rows[server.name].append(report.summary(run))
        self.results[name] = {"rate": rate, "servers": rows}
        console.print(report.table({server: runs[-1] for server, runs in rows.items()}))
        return last

    def _saved(self) -> None:
        """Measure the mean model time of a text, with early exit and at full depth, from the server's metrics."""
        costs = []
        for server in self.servers[:2]:
            console.print(f"model time: {server.name}")
            with self._started(server) as started:
                send_traffic(started.target, self.samples[:200], 1.0, connections=1)
                before = _model_time(started.target.url)
                send_traffic(started.target, self.samples, self.seconds, connections=1)
                after = _model_time(started.target.url)
                texts, seconds, layers = (b - a for a, b in zip(before, after, strict=True))
                costs.append({"model_ms": 1000 * seconds / texts, "layers": layers / texts})
        early, full = costs
        self.results["saved"] = {
            "early": early,
            "full_depth": full,
            "time_saved": 1 - early["model_ms"] / full["model_ms"],
            "layers_saved": 1 - early["layers"] / full["layers"],
        }

    def _stages(self) -> None:
        """Measure each stage's share of the latency of a single request."""
        console.print("latency of a single request by stage")
        with self._started(self.servers[0]) as started:
            send_traffic(started.target, self.samples[:200], 1.0, connections=1)
            stages = stage_times(started.target, self.samples)
        total = stages["latency"]
        self.results["stages"] = {
            "latency_ms": total,
            "share": {name: value / total for name, value in stages.items() if name != "latency"},
        }

    def _curve(self, servers: list[Server]) -> None:
        curves: dict[str, list[tuple[float, float]]] = {}
        for server in servers:
            throughput = self._throughput(server.name)
            console.print(f"latency against request rate: {server.name}")
            with self._started(server) as started:
                for share in CURVE:
                    rate = share * throughput
                    run = self._measure(started, self.samples, self.seconds / 2, rate)
                    p95 = quantile(run.latencies_ms(), 0.95)
                    curves.setdefault(server.name, []).append((round(rate, 1), round(p95, 3)))
        self.results["curve"] = curves
        title = "Latency against request rate"
        report.plot_curves(self.out / "latency-load.png", curves, (title, "requests/s", "p95 latency, ms"))

    def _taus(self, ours_at: Callable[[float], Server]) -> None:
        points: list[dict[str, Any]] = []
        with self._started(ours_at(0.0)) as started:
            for tau in TAUS:
                console.print(f"throughput against accuracy: τ = {tau:g}")
                server = Running(ours_at(tau).target(self.port), started.process)
                share = accuracy(self.samples, ask_alone(server.target, self.samples))
                run = self._measure(server, self.samples, self.seconds / 2, None)
                points.append({"tau": tau, "answers_per_s": round(run.rate(), 1), "accuracy": share})
        self.results["taus"] = points
        if any(point["accuracy"] is None for point in points):
            return
        curves = {"de3, by τ": [(p["answers_per_s"], 100 * p["accuracy"]) for p in points]}
        for name, rows in self.results["saturation"].items():
            if not name.startswith("de3") and rows[0]["accuracy"] is not None:
                throughput = self._throughput(name)
                curves[name] = [(throughput, 100 * rows[0]["accuracy"])]
        labels = ("Throughput against accuracy", "answers/s", "accuracy, %")
        report.plot_curves(self.out / "throughput-accuracy.png", curves, labels)

    def _peers(self) -> list[Server]:
        return [s for s in self.servers if not s.name.startswith("de3")]

    def _best_peer(self) -> Server:
        if not self._peers():
            raise ValueError("no peer could be started, so there is nothing to compare with")
        return max(self._peers(), key=lambda s: self._throughput(s.name))

    def _throughput(self, server: str) -> float:
        return float(median(row["answers_per_s"] for row in self.results["saturation"][server]))

    def _ratios(self, best: Server) -> dict[str, str]:
        """Ratios of our results to the peers', by name: median and range over the rounds, as text."""
        ours, ratios = self.servers[0].name, {}
        rows = self.results["saturation"]
        pairs = [(ours, peer.name) for peer in self._peers()]
        pairs += [(name, best.name) for name in rows if name.startswith("de3") and name != ours]
        for name, peer in pairs:
            both = zip(rows[name], rows[peer], strict=True)
            values = [a["answers_per_s"] / b["answers_per_s"] for a, b in both]
            ratios[f"throughput, {name} / {peer}"] = report.spread(values)
        for what, group in (("latency", "all"), ("mixed", "short"), ("mixed", "long")):
            if what not in self.results:
                continue
            servers, key = self.results[what]["servers"], f"latency_ms_{group}"
            for q in ("p50", "p99"):
                values = [
                    a[key][q] / b[key][q]
                    for a, b in zip(servers[ours], servers[best.name], strict=True)
                    if q in a.get(key, {}) and q in b.get(key, {})
                ]
                if values:  # with few texts, none may be long
                    ratios[f"{what} ({group}) {q}, {ours} / {best.name}"] = report.spread(values)
        return ratios


def stage_times(target: Target, samples: list[Sample]) -> dict[str, float]:
    """Mean milliseconds of a request by stage, from Server-Timing; requests are sent one at a time.

    `latency` is the total time that the client measures, `server` the server's time outside its stages, and `network`
    the client's time outside the server.
    """
    sums: dict[str, float] = {}
    parts = urlsplit(target.url)
    connection = HTTPConnection(parts.hostname or "", parts.port)
    for sample in track(samples, f"sending {len(samples)} texts one by one"):
        _, _, body = target.request(sample).partition(b"\r\n\r\n")
        start = perf_counter()
        connection.request("POST", target.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        times = {"latency": 1000 * (perf_counter() - start)}
        for stage in response.headers["server-timing"].split(", "):
            name, _, value = stage.partition(";dur=")
            times[name] = float(value)
        stages = sum(times[name] for name in ("read", "queue", "tokenize", "model"))
        times["server"] = times["total"] - stages
        times["network"] = times["latency"] - times.pop("total")
        for name, value in times.items():
            sums[name] = sums.get(name, 0.0) + value
    connection.close()
    return {name: value / len(samples) for name, value in sums.items()}


def _model_time(url: str) -> tuple[float, float, float]:
    """Totals so far: texts, their model time in seconds, and layers run."""
    metrics, stage = Metrics(url), "de3_stage_latency_seconds"
    return (
        metrics.total(f"{stage}_count", stage="model"),
        metrics.total(f"{stage}_sum", stage="model"),
        metrics.total("de3_layers_run_total"),
    )


def cpu_name() -> str:
    """The processor's name from /proc/cpuinfo, or Python's name for it if that file has none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
