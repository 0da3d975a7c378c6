"""The commands of `python -m lab spans`."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from de3.loadtest import options
from de3.loadtest.report import console
from lab import personal
from lab.options import show

app = typer.Typer(no_args_is_help=True, help="Token classifiers: parity, speed, and exits on streams.")
LIMITS = (0.01, 0.02, 0.05)

Folder = Annotated[Path, typer.Argument(help="Folder of a token classifier of transformers.")]
Share = Annotated[float, typer.Option(help="Share of the texts into which details are put.", min=0, max=1)]
Seed = Annotated[
    int,
    typer.Option(help="Seed of the texts: lab/personal.py. The texts of another seed are not all different."),
]
Skip = Annotated[
    int, typer.Option(help="Number of texts to skip, such as those that the model was fitted on.", min=0)
]


def _say(line: str) -> None:
    console.print(line, markup=False)


def _texts(count: int, share: float, seed: int, skip: int = 0) -> list[str]:
    return personal.texts(skip + count, share, seed)[skip:]


@app.command()
def parity(
    folder: Folder,
    texts: Annotated[int, typer.Option(help="Number of texts.", min=20)] = 2000,
    seed: Seed = 2,
    others: Annotated[
        bool,
        typer.Option(help="Also compare models with random weights, whose tokenizers are of other kinds."),
    ] = True,
    json_file: options.Json = None,
) -> None:
    """Compare spans at full depth with those of transformers' pipeline, for each aggregation.

    Odd characters are put into a tenth of the texts.

    Example: python -m lab spans parity runs/personal
    """
    from lab.spans import parity as study

    found = study.with_odd(_texts(texts, 0.45, seed))
    results = []
    with TemporaryDirectory() as place:
        models = {folder.name: folder}
        for family in ("roberta", "xlm-roberta") if others else ():
            models[f"random {family}"] = study.random_model(Path(place) / family, family, found)
        for name, each in models.items():
            for one in study.compare(name, each, found):
                _say(str(one))
                results.append(one)
    columns, rows = study.table(results)
    show(columns, rows, json_file, [asdict(one) for one in results])
    if any(one.unlike for one in results):
        raise typer.Exit(1)


@app.command()
def speed(
    store: options.Store = Path("models"),
    model: options.ModelName = "personal",
    stock: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint that the model was imported from, for Presidio. Default: without it."
        ),
    ] = None,
    texts: Annotated[int, typer.Option(help="Number of texts.", min=20)] = 2000,
    share: Share = 0.45,
    seed: Seed = 1,
    skip: Skip = 0,
    rounds: options.Rounds = 5,
    seconds: Annotated[int, typer.Option(help="Duration of one measurement.", min=1)] = 5,
    port: options.Port = 8100,
    out: Annotated[Path, typer.Option(help="Folder for the peer's graph, which is kept.")] = Path(
        "loadtest-results"
    ),
    json_file: options.Json = None,
) -> None:
    """Compare throughput and latency with 16 connections: full depth, exits at 1, 2 and 5%, and peers.

    The peers have the same weights: int8 ONNX Runtime behind FastAPI, and Presidio. Needs wrk.

    Example: python -m lab spans speed --model personal --stock runs/personal
    """
    from lab.spans import speed as study

    out.mkdir(parents=True, exist_ok=True)
    sides = study.sides(store, model, stock, LIMITS, out)
    study.measure(sides, _texts(texts, share, seed, skip), rounds, seconds, port, _say)
    show(*study.table(sides), json_file, study.numbers(sides))


@app.command()
def streams(
    store: options.Store = Path("models"),
    model: options.ModelName = "personal",
    texts: Annotated[int, typer.Option(help="Number of texts.", min=20)] = 6800,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Share of the texts with details; repeat for more. Default: 0.05, 0.45."),
    ] = None,
    seed: Seed = 1,
    skip: Skip = 0,
    json_file: options.Json = None,
) -> None:
    """Measure the speed-up of exits, both rates and the recall of characters, on texts that nothing was fitted on.

    Example: python -m lab spans streams --model personal --skip 9000
    """
    from de3.model_store.model import Model
    from de3.model_store.store import Store
    from lab.spans import streams as study

    opened = Model(Store(store).open(model))
    found = [
        one
        for each in share or (0.05, 0.45)
        for one in study.outcomes(opened, _texts(texts, each, seed, skip), each, LIMITS)
    ]
    show(*study.table(found), json_file, [asdict(one) for one in found])


@app.command()
def learn(
    folder: Folder,
    texts: Annotated[int, typer.Option(help="Number of texts.", min=20)] = 12_000,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Share of the texts with details; repeat for more. Default: 0.05, 0.45."),
    ] = None,
    guarantee: Annotated[float, typer.Option(help="Guaranteed bound of both rates.")] = 0.02,
    seed: Seed = 2,
    per_second: Annotated[float, typer.Option(help="Texts per second.", min=1)] = 60.0,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Option of de3 serve, such as --audit-share=0.1; repeat for more."),
    ] = None,
    port: options.Port = 8100,
    json_file: options.Json = None,
) -> None:
    """Serve a checkpoint with --learn and a guarantee, and send it a stream of texts.

    Example: python -m lab spans learn runs/personal
    """
    from lab.spans import streams as study

    found = []
    for each in share or (0.05, 0.45):
        stream = _texts(texts, each, seed)
        found.append(study.learn(folder, stream, each, guarantee, per_second, port, option or []))
        show(*study.learn_table(found), json_file, [asdict(one) for one in found])
