"""python -m lab audit: a guarantee, and what audits cost, with a real server."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from de3.loadtest import options

if TYPE_CHECKING:
    from lab.audit import Round, Window

app = typer.Typer(no_args_is_help=True, help="Audits of a real server over HTTP.")
Share = Annotated[float, typer.Option(help="Share of the texts that are audited.", min=0.001, max=1)]


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def _write(json_file: Path | None, numbers: Any) -> None:
    if json_file:
        json_file.write_text(json.dumps(numbers, indent=1) + "\n")


@app.command()
def story(
    home: Annotated[Path, typer.Argument(help="Texts to begin with.")],
    away: Annotated[Path, typer.Argument(help="Texts to switch to.")],
    store: options.Store = Path("models"),
    model: options.ModelName = "sst2",
    text_column: options.TextColumn = "sentence",
    rate: Annotated[float, typer.Option(help="The guarantee.", min=0.0001, max=0.99)] = 0.02,
    share: Share = 0.05,
    home_windows: Annotated[int, typer.Option(help="Windows of 2 s before the switch.", min=1)] = 30,
    away_windows: Annotated[int, typer.Option(help="Windows of 2 s after it.", min=1)] = 60,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here.", show_default=False)] = None,
    port: options.Port = 8100,
    json_file: options.Json = None,
) -> None:
    """Serve with a guarantee, switch the traffic, and compare every answer with that of full depth.

    Example: python -m lab audit story books.jsonl electronics.jsonl --plot story.png
    """
    from de3.loadtest.texts import read
    from lab import audit

    both = read(home, text_column, "label", []), read(away, text_column, "label", [])
    console = _console()

    def show(w: "Window") -> None:
        measured = "–" if w.measured is None else f"{100 * w.measured:.2f}%"
        console.print(
            f"{w.phase}: {w.texts:6d} texts, {w.audits:5d} audits, τ = {w.tau:g} ({w.reason}), measured {measured} "
            f"({100 * w.lower:.2f} … {100 * w.upper:.2f}), true {100 * w.true:.2f}%, "
            f"clients saw {100 * w.seen:.2f}%, p99 {w.p99_ms:.1f} ms",
            soft_wrap=True,
        )

    told = audit.story(store, model, both, rate, share, (home_windows, away_windows), port, show)
    result = audit.summary(told, rate)
    restored = result["texts_to_restore"]
    console.print(
        f"promised {100 * rate:g}%: clients saw {100 * result['seen_mean']:.2f}% in all; before the switch the true "
        f"rate was at most {100 * result['home_highest']:.2f}%, after it at most {100 * result['true_highest']:.2f}%; "
        + (f"within the promise for good after {restored} texts" if restored else "never above the promise")
        + f"; {result['resets']} resets",
        soft_wrap=True,
    )
    if plot:
        audit.plot(plot, told, rate)
    _write(json_file, {**result, "windows": [asdict(w) for w in told]})


@app.command()
def cost(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: options.ModelName = "sst2",
    text_column: options.TextColumn = "sentence",
    share: Share = 0.05,
    load: Annotated[float, typer.Option(help="Share of the capacity.", min=0.01, max=1)] = 0.8,
    slo_p99_ms: options.SloP99 = 20.0,
    rounds: options.Rounds = 5,
    seconds: options.Seconds = 10.0,
    port: options.Port = 8100,
    json_file: options.Json = None,
) -> None:
    """The latency of requests under load with audits and without, in turn, and how many texts were audited.

    The capacity is the highest rate without audits whose p99 is within --slo-p99-ms, as of de3 loadtest capacity.

    Example: python -m lab audit cost --texts dev.tsv
    """
    from de3.loadtest.texts import read
    from lab import audit

    console = _console()

    def show(r: "Round") -> None:
        console.print(
            f"without: p50 {r.p50:.2f} ms, p99 {r.p99:.2f} ms; with: p50 {r.audited_p50:.2f} ms, "
            f"p99 {r.audited_p99:.2f} ms; {100 * r.share:.2f}% audited, {r.pending} pending",
            soft_wrap=True,
        )

    samples = read(texts, text_column, "label", [])
    result = audit.cost(store, model, samples, share, load, slo_p99_ms, rounds, seconds, port, show)
    table = Table("requests/s", "p50, with / without", "p99, with / without", "audited")
    table.add_row(
        f"{result['rate']:.0f} of {result['capacity']:.0f}",
        f"{result['p50']:.3f}",
        f"{result['p99']:.3f}",
        f"{100 * result['share']:.2f}%",
    )
    console.print(table)
    _write(json_file, result)
