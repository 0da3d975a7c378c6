"""How right is the speed-up in model time that the server shows? Against the same texts at full depth."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from loadtest.client import Target, load
from loadtest.servers import ours, running
from loadtest.texts import Sample


@dataclass(frozen=True)
class Row:
    """One rate in one round: what the server says, and what it was; both full depth / default τ."""

    rate: float
    said: float
    was: float


def speedup(
    store: Path,
    model: str,
    samples: list[Sample],
    rates: list[float],
    rounds: int,
    seconds: float,
    port: int,
    on_row: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """Run the default τ and τ = 0 in turn, each in a server of its own, at every rate (requests a second)."""
    rows = []
    for _ in range(rounds):
        early, full = (_run(store, model, o, samples, rates, seconds, port) for o in ([], ["--tau", "0"]))
        for rate, (mean, said), (mean_full, _) in zip(rates, early, full, strict=True):
            rows.append(Row(rate, said / mean, mean_full / mean))
            on_row(rows[-1])
    return rows


def _run(
    store: Path,
    model: str,
    options: list[str],
    samples: list[Sample],
    rates: list[float],
    seconds: float,
    port: int,
) -> list[tuple[float, float]]:
    """For each rate: mean model time of a text, and what the server says of full depth, s."""
    found = []
    with (
        TemporaryDirectory() as folder,
        running(ours(store, model, options=options), port, Path(folder) / "log") as server,
    ):
        for rate in rates:
            before = _totals(server.target)
            load(server.target, samples, seconds, rate=rate)
            texts, spent, full = (b - a for a, b in zip(before, _totals(server.target), strict=True))
            found.append((spent / texts, full / texts))
    return found


def _totals(target: Target) -> tuple[float, float, float]:
    """Texts so far, their model time, and what that would have been at full depth, s."""
    with urlopen(target.url + "/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = [sample for family in families for sample in family.samples]

    def total(name: str) -> float:
        return sum(s.value for s in found if s.name == name and s.labels.get("stage", "model") == "model")

    stage = "de3_stage_latency_seconds"
    return total(f"{stage}_count"), total(f"{stage}_sum"), total("de3_full_depth_seconds_total")
