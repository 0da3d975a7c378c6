"""Draw the dashboards from the data of Prometheus, for the docs: python -m lab.dashboards --help"""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import matplotlib as mpl
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure

from de3.deploy.grafana.panels import ALL_MODELS, DASHBOARDS, Dashboard, Panel, Query

COLUMNS, ROW_INCHES, WIDTH_INCHES = 24, 0.36, 15.0
POINTS = 200  # number of points of a series


class Series:
    """One series: name, labels, times and values."""

    def __init__(self, query: Query, row: dict[str, Any]) -> None:
        self.labels: dict[str, str] = row["metric"]
        named = re.sub(r"\{\{(\w+)\}\}", lambda m: self.labels.get(m[1], ""), query.legend)
        self.name = named or query.expr
        self.times = np.array([int(1000 * t) for t, _ in row["values"]], "datetime64[ms]")  # UTC
        self.values = np.array([float(v) for _, v in row["values"]])


class Source:
    """A Prometheus server, and the time range to query (Unix seconds)."""

    def __init__(self, url: str, start: float, end: float) -> None:
        self._url, self.start, self.end = url, start, end
        self._step = max(5, round((end - start) / POINTS))

    def _ask(self, path: str, expr: str, **parameters: float) -> list[dict[str, Any]]:
        # Substituted as in Grafana, whose shortest rate interval is four scrapes.
        for name, value in (
            ("$__rate_interval", f"{max(20, 2 * self._step)}s"),
            ("$__range", f"{round(self.end - self.start)}s"),
            ("$model", ALL_MODELS),
        ):
            expr = expr.replace(name, value)
        answer = httpx.get(f"{self._url}/api/v1/{path}", params={"query": expr, **parameters}, timeout=60)
        body = answer.json()
        if body["status"] != "success":
            raise ValueError(f"{expr}: {body['error']}")
        rows: list[dict[str, Any]] = body["data"]["result"]
        return rows

    def series(self, query: Query) -> list[Series]:
        """The series of a query over the time range."""
        rows = self._ask("query_range", query.expr, start=self.start, end=self.end, step=self._step)
        return [Series(query, row) for row in rows]

    def number(self, query: Query) -> float:
        """The result of an instant query at the end of the time range; nan if it is empty."""
        rows = self._ask("query", query.expr, time=self.end)
        return float(rows[0]["value"][1]) if rows else float("nan")


def _format(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.4g}%"
    if unit == "s":
        factor, name = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
        return f"{value * factor:.3g} {name}"
    number = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return number + ("/s" if unit in ("reqps", "ops") else unit.partition("suffix:")[2])


def _stat(axes: Axes, panel: Panel, source: Source) -> None:
    axes.axis("off")
    value = source.number(panel.queries[0])
    axes.text(0.5, 0.4, _format(value, panel.unit), ha="center", va="center", fontsize=22, color="#1a7f37")


def _heatmap(axes: Axes, panel: Panel, source: Source) -> None:
    rows = sorted(source.series(panel.queries[0]), key=lambda s: float(s.labels["le"]))
    bounds = [s.labels["le"] for s in rows]
    # Buckets are cumulative: the difference between neighbours is the count between their bounds.
    counts = np.diff(np.array([s.values for s in rows]), axis=0, prepend=0)
    last = max((i for i, c in enumerate(counts) if np.nanmax(c) > 0), default=len(counts) - 1) + 1
    mesh = axes.pcolormesh(rows[0].times, range(last), counts[:last], cmap="Blues", vmin=0, shading="nearest")
    axes.set_yticks(range(last), [f"{float(b):g}" for b in bounds[:last]])
    axes.figure.colorbar(mesh, ax=axes, format=lambda v, _: _format(v, panel.unit), pad=0.01)
    axes.set_ylabel("layer", fontsize=8)


def _lines(axes: Axes, panel: Panel, source: Source) -> None:
    matching = [s for query in panel.queries for s in source.series(query)]
    if not matching:
        axes.axis("off")
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color="#6e7781")
        return
    if panel.kind == "stack":
        times = max((s.times for s in matching), key=len)
        layers = {s.name: np.zeros(len(times)) for s in matching if np.nanmax(s.values) > 0}
        for s in matching:
            if s.name in layers:  # a series may start later than others
                layers[s.name][np.searchsorted(times, s.times)] = np.nan_to_num(s.values)
        if layers:
            axes.stackplot(times, list(layers.values()), labels=list(layers), alpha=0.7)
    else:
        for s in matching:
            axes.plot(s.times, s.values, label=s.name, linewidth=1.2)
    if panel.limit is not None:
        axes.axhline(panel.limit, color="#cf222e", linestyle="--", linewidth=1)
    axes.margins(x=0, y=0.1)
    axes.set_ylim(panel.least, panel.most)
    axes.yaxis.set_major_formatter(lambda v, _: _format(v, panel.unit) if v else "0")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)


def draw(board: Dashboard, source: Source) -> Figure:
    """A dashboard, with its panels laid out as in Grafana."""
    places, rows = list[tuple[int, int]](), list[tuple[int, str]]()
    x = y = row_height = 0
    for panel in board.panels:
        if x + panel.width > COLUMNS or panel.row is not None:
            x, y, row_height = 0, y + row_height, 0
        if panel.row is not None:
            rows.append((y, panel.row))
            y += 1
        places.append((x, y))
        x, row_height = x + panel.width, max(row_height, panel.height)
    height = y + row_height
    figure = Figure(figsize=(WIDTH_INCHES, height * ROW_INCHES + 0.4))
    for top, title in rows:
        figure.text(0.3 / COLUMNS, 1 - (top + 0.8) / height, title, fontsize=11, weight="bold")
    for panel, (left, top) in zip(board.panels, places, strict=True):
        flat = panel.kind == "stat"
        box = (
            (left + 1.1) / COLUMNS,
            1 - (top + panel.height - (0.3 if flat else 1.6)) / height,
            (panel.width - 1.6) / COLUMNS,
            (panel.height - (1.0 if flat else 2.6)) / height,
        )
        axes = figure.add_axes(box)
        axes.set_title(panel.title, fontsize=9, loc="center" if flat else "left")
        {"stat": _stat, "heatmap": _heatmap}.get(panel.kind, _lines)(axes, panel, source)
        if not flat:
            axes.tick_params(labelsize=7)
            axes.xaxis.set_major_formatter(
                ConciseDateFormatter(axes.xaxis.get_major_locator(), show_offset=False)
            )
    return figure


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
    prometheus: Annotated[str, typer.Option(help="Address of Prometheus.")] = "http://localhost:9090",
    start: Annotated[
        float | None, typer.Option(help="Unix time. [default: 30 minutes before the end]")
    ] = None,
    end: Annotated[float | None, typer.Option(help="Unix time. [default: now]")] = None,
) -> None:
    """Draw every dashboard from the data of Prometheus, as FOLDER/speed-up.png and so on."""
    mpl.use("agg")
    last = datetime.now(UTC).timestamp() if end is None else end
    source = Source(prometheus, last - 1800 if start is None else start, last)
    folder.mkdir(parents=True, exist_ok=True)
    for board in DASHBOARDS:
        path = folder / f"{board.uid.removeprefix('de3-')}.png"
        draw(board, source).savefig(path, dpi=70)
        print(path)


if __name__ == "__main__":
    typer.run(main)
