"""The results of load tests as tables, JSON and plots."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from de3.loadtest.client import Run, accuracy, quantile
from de3.progress import empty_table

# For progress; results go to stdout.
console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


def show(table: Table, width: int = 120) -> None:
    """Print a table on stdout, `width` columns wide unless stdout is a terminal."""
    Console(width=None if sys.stdout.isatty() else width).print(table)


def write_json(path: Path, numbers: Any) -> None:
    """Write results as JSON."""
    path.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")


def summary(run: Run, wrong: int | None = None) -> dict[str, Any]:
    """The numbers of a run, for JSON; wrong: number of wrong labels, None if they were not checked."""
    numbers: dict[str, Any] = {
        "offered_per_s": run.offered,
        "connections": None if run.offered else run.connections,
        "seconds": run.seconds,
        "answers_per_s": round(run.rate(), 1),
        "statuses": {str(k): v for k, v in sorted(run.statuses().items())},
        "wrong_labels": wrong,
        "accuracy": accuracy([run.samples[answer.sample] for answer in run.answers], run.labels),
        "generator": {
            "cpu_share": round(run.cpu_s / run.seconds, 3),
            "late_p99_ms": round(run.lateness_ms(0.99), 2) if run.offered else None,
        },
    }
    groups: dict[str, bool | None] = {"all": None}
    if any(s.long for s in run.samples):
        groups |= {"short": False, "long": True}
    for name, long in groups.items():
        latencies = run.latencies_ms(long)
        numbers[f"latency_ms_{name}"] = {
            "mean": round(sum(latencies) / len(latencies), 3) if latencies else None,
            **{
                f"p{100 * q:g}": round(quantile(latencies, q), 3) for q in (0.5, 0.9, 0.95, 0.99) if latencies
            },
        }
    return numbers


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """A table with a row for each summary; rows: results of `summary`, by name."""
    columns = ("", "answers/s", "p50 ms", "p95 ms", "p99 ms", "accuracy", "errors", "wrong", "own CPU")
    table = empty_table(columns, no_wrap=True)
    for name, row in rows.items():
        latency = row.get("latency_ms_all", {})
        errors = [
            f"{n} × {'no answer' if status == '0' else status}"
            for status, n in row["statuses"].items()
            if status != "200"
        ]
        table.add_row(
            name,
            f"{row['answers_per_s']:.0f}",
            *(f"{latency.get(q, float('nan')):.2f}" for q in ("p50", "p95", "p99")),
            "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}%",
            ", ".join(errors) or "0",
            "–" if row["wrong_labels"] is None else str(row["wrong_labels"]),
            f"{100 * row['generator']['cpu_share']:.0f}%",
        )
    return table


def spread(values: list[float]) -> str:
    """Median and range as text."""
    return f"{median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def plot_cdf(path: Path, latencies: dict[str, list[float]], title: str) -> None:
    """Plot the latency distributions of several runs; without matplotlib (the train extra), do nothing."""
    if find_spec("matplotlib") is None:
        return
    figure, axes = _figure(title, "latency, ms", "share of answers")
    for name, values in latencies.items():
        axes.plot(values, [(i + 1) / len(values) for i in range(len(values))], label=name)
    axes.set_xscale("log")
    _finish(figure, axes, path)


def plot_curves(
    path: Path, curves: dict[str, list[tuple[float, float]]], labels: tuple[str, str, str]
) -> None:
    """Plot curves of (x, y) points; without matplotlib, do nothing. labels: title, x, y."""
    if find_spec("matplotlib") is None:
        return
    figure, axes = _figure(*labels)
    for name, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    if "ms" in labels[2]:
        axes.set_yscale("log")
    _finish(figure, axes, path)


def panels(count: int, title: str, x: str) -> tuple[Any, Any]:
    """A figure of `count` stacked panels with a common x axis, and the axes of each panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.1 * count))
    axes = figure.subplots(count, 1, sharex=True)
    axes[0].set_title(title)
    axes[-1].set_xlabel(x)
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, axes


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
