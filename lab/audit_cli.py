"""python -m lab audit: a guarantee, and the cost of audits, on a real server."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from de3.loadtest import options
from de3.loadtest.report import write_json
from de3.loadtest.texts import read
from lab.options import AuditShare, Png, show

if TYPE_CHECKING:
    from lab.audit import Round, Window

app = typer.Typer(no_args_is_help=True, help="Audits of a real server over HTTP.")


@app.command()
def story(
    home: Annotated[Path, typer.Argument(help="Texts to begin with.")],
    away: Annotated[Path, typer.Argument(help="Texts to switch to.")],
    store: options.Store = Path("models"),
    model: options.ModelName = "sst2",
    text_column: options.TextColumn = "sentence",
    rate: Annotated[float, typer.Option(help="The guarantee.", min=0.0001, max=0.99)] = 0.02,
    share: AuditShare = 0.05,
    home_windows: Annotated[int, typer.Option(help="Windows of 2 s before the switch.", min=1)] = 30,
    away_windows: Annotated[int, typer.Option(help="Windows of 2 s after the switch.", min=1)] = 60,
    png: Png = None,
    port: options.Port = 8100,
    json_file: options.Json = None,
) -> None:
    """Serve with a guarantee, switch the traffic, and compare every answer with full depth's.

    Example: python -m lab audit story books.jsonl electronics.jsonl --png story.png
    """
    from lab import audit

    both = read(home, text_column), read(away, text_column)

    def on_window(w: "Window") -> None:
        measured = "–" if w.measured is None else f"{100 * w.measured:.2f}%"
        print(
            f"{w.phase}: {w.texts:6d} texts, {w.audits:5d} audits, τ = {w.tau:g} ({w.reason}), measured {measured} "
            f"({100 * w.lower:.2f} … {100 * w.upper:.2f}), true {100 * w.true:.2f}%, "
            f"clients saw {100 * w.seen:.2f}%, p99 {w.p99_ms:.1f} ms",
            flush=True,
        )

    told = audit.story(store, model, both, rate, share, (home_windows, away_windows), port, on_window)
    result = audit.summary(told, rate)
    restored = result["texts_to_restore"]
    print(
        f"guaranteed {100 * rate:g}%: clients saw {100 * result['seen_mean']:.2f}% in all; before the switch the true "
        f"rate was at most {100 * result['home_highest']:.2f}%, overall at most {100 * result['true_highest']:.2f}%; "
        + (f"permanently within it after {restored} texts" if restored else "never above the guarantee")
        + f"; {result['resets']} resets"
    )
    if png:
        audit.plot(png, told, rate)
    if json_file:
        write_json(json_file, {**result, "windows": [asdict(w) for w in told]})


@app.command()
def cost(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: options.ModelName = "sst2",
    text_column: options.TextColumn = "sentence",
    share: AuditShare = 0.05,
    load: Annotated[float, typer.Option(help="Rate, as a share of the capacity.", min=0.01, max=1)] = 0.8,
    slo_p99_ms: options.SloP99 = 20.0,
    rounds: options.Rounds = 5,
    seconds: options.Seconds = 10.0,
    port: options.Port = 8100,
    json_file: options.Json = None,
) -> None:
    """Measure latency under load with and without audits, in turn, and the share of audited texts.

    The capacity is the highest rate without audits whose p99 is within --slo-p99-ms, as in de3 loadtest capacity.

    Example: python -m lab audit cost --texts dev.tsv
    """
    from lab import audit

    def on_round(r: "Round") -> None:
        print(
            f"without: p50 {r.p50:.2f} ms, p99 {r.p99:.2f} ms; with: p50 {r.audited_p50:.2f} ms, "
            f"p99 {r.audited_p99:.2f} ms; {100 * r.share:.2f}% audited, {r.pending} pending",
            flush=True,
        )

    samples = read(texts, text_column)
    result = audit.cost(store, model, samples, share, load, slo_p99_ms, rounds, seconds, port, on_round)
    columns = ["requests/s", "p50, with / without", "p99, with / without", "audited"]
    row = [
        f"{result['rate']:.0f} of {result['capacity']:.0f}",
        f"{result['p50']:.3f}",
        f"{result['p99']:.3f}",
        f"{100 * result['share']:.2f}%",
    ]
    show(columns, [row], json_file, result)
