"""de3 loadtest study: the measurements behind docs/budgets.md."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="What docs/budgets.md claims, measured again on any model.")

Store = Annotated[Path, typer.Option(envvar="DE3_STORE", help="Our model store.")]
Model = Annotated[str, typer.Option(help="Our model, name or name:version.")]
TextColumn = Annotated[str, typer.Option(help="Column of the texts.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the right labels, if there is one.")]
LabelNames = Annotated[str, typer.Option(help="Names of labels that are numbers, separated by commas.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the numbers here.", show_default=False)]
StartLayers = Annotated[
    float, typer.Option(help="Cost of tokens, embeddings and their exit, in layers.", min=0)
]


def _model(store: Path, model: str) -> Any:
    from model_store.model import Model
    from model_store.store import Store

    try:
        import torch  # noqa: F401  # data is read by `training`
    except ImportError:
        raise ValueError("this command needs the train extra: pip install '.[train]' in a checkout") from None
    return Model(Store(store).open(model), "onnxruntime")


def _names(label_names: str) -> list[str]:
    return [x.strip() for x in label_names.split(",") if x.strip()]


def _print(columns: list[str], rows: list[list[Any]], json_file: Path | None, numbers: Any) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if json_file:
        json_file.write_text(json.dumps(numbers, indent=1) + "\n")


@app.command()
def promise(
    texts: Annotated[list[Path], typer.Argument(help="Labelled texts, all taken together as the world.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    label_names: LabelNames = "",
    wish: Annotated[list[float] | None, typer.Option(help="A largest disagreement; repeat for more.")] = None,
    size: Annotated[int | None, typer.Option(help="Certifying samples. [default: half of all]")] = None,
    trials: Annotated[int, typer.Option(help="Calibrations drawn.", min=1)] = 500,
    start_layers: StartLayers = 0.6,
    json_file: Json = None,
) -> None:
    """How often `max_disagreement` is broken, and its speed against an oracle's, over many calibrations.

    Example: de3 loadtest study promise runs/sst2/tune.jsonl runs/sst2/certify.jsonl
    """
    from loadtest.studies.promise import promise as run
    from loadtest.studies.promise import table
    from loadtest.studies.samples import joined, recorded

    loaded = _model(store, model)
    world = joined([recorded(loaded, p, (text_column, label_column), _names(label_names)) for p in texts])
    rows = run(
        world,
        loaded.manifest.defaults.lam,
        size or len(world.labels) // 2,
        wish or [0.02, 0.05, 0.1],
        trials,
        start_layers,
    )
    _print(*table(rows), json_file, rows)


@app.command()
def far(
    like: Annotated[Path, typer.Argument(help="Samples from home to fit scores on, such as certify.jsonl.")],
    home: Annotated[Path, typer.Argument(help="Other samples from home, such as a test set.")],
    away: Annotated[list[Path], typer.Argument(help="Texts from elsewhere, with or without known labels.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    label_column: LabelColumn = "label",
    label_names: LabelNames = "",
    switches: Annotated[int, typer.Option(help="Switches to texts from elsewhere.", min=1)] = 20,
    json_file: Json = None,
) -> None:
    """Scores of texts from elsewhere (AUROC), accuracy and speed-up by --ood-policy, and when drift alarms.

    Example: de3 loadtest study far runs/sst2/certify.jsonl dev.tsv books.tsv --label-names negative,positive
    """
    from loadtest.studies import far as study
    from loadtest.studies.samples import recorded

    loaded = _model(store, model)
    manifest, columns = loaded.manifest, (text_column, label_column)
    fitted = recorded(loaded, like, ("text", "label"), [])
    files = {path.stem: recorded(loaded, path, columns, _names(label_names)) for path in [home, *away]}
    at_home, elsewhere = files[home.stem], {p.stem: files[p.stem] for p in away}
    numbers: dict[str, Any] = {"auroc": {}, "policy": {}, "drift": {}}
    for name, score in study.scores(manifest, fitted).items():
        base = score(at_home)
        numbers["auroc"][name] = {key: study.auroc(base, score(f)) for key, f in elsewhere.items()}
    _print(
        ["score (AUROC)", *elsewhere],
        [[name, *(f"{x:.3f}" for x in row.values())] for name, row in numbers["auroc"].items()],
        None,
        None,
    )
    for key, found in files.items():
        numbers["policy"][key] = {
            name: study.policy(manifest, found, *arguments)
            for name, arguments in (
                ("flag", ("flag",)),
                ("deepen", ("deepen",)),
                ("far to full depth", ("flag", True)),
            )
        }
    _print(
        ["policy", "texts", "accuracy", "speed-up", "far"],
        [
            [name, key, f"{100 * r['accuracy']:.2f}%", f"{r['speedup']:.2f}×", f"{100 * r['far']:.1f}%"]
            for key, rows in numbers["policy"].items()
            for name, r in rows.items()
        ],
        None,
        None,
    )
    for source, own in (("like", fitted), (home.stem, at_home)):
        for key, found in elsewhere.items():
            numbers["drift"][f"{source} → {key}"] = study.drift(manifest, own, found, switches)
    first = next(iter(numbers["drift"].values()))
    _print(
        ["drift", *first],
        [[key, *(f"{x:.3f}" for x in row.values())] for key, row in numbers["drift"].items()],
        json_file,
        numbers,
    )


@app.command()
def deadlines(
    texts: Annotated[Path, typer.Argument(help="Labelled texts.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    label_column: LabelColumn = "label",
    label_names: LabelNames = "",
    layer_us: Annotated[float, typer.Option(help="µs of one layer (de3 loadtest layers).", min=1)] = 117.0,
    start_layers: StartLayers = 0.6,
    json_file: Json = None,
) -> None:
    """Before a deadline, the default τ against the most accurate τ predicted to fit; a simulated server.

    Example: de3 loadtest study deadlines dev.tsv --label-names negative,positive
    """
    from loadtest.studies.deadlines import Costs
    from loadtest.studies.deadlines import deadlines as run
    from loadtest.studies.samples import recorded

    loaded = _model(store, model)
    found = recorded(loaded, texts, (text_column, label_column), _names(label_names))
    defaults = loaded.manifest.defaults
    cases = [(0.2, 0.0), (0.4, 0.0), (0.8, 0.0)]
    cases += [(budget, load) for load in (0.5, 0.9, 1.2) for budget in (2.0, 8.0)]
    costs = Costs(start_layers * layer_us * 1e-6, layer_us * 1e-6)
    rows = run(found, defaults.tau, defaults.lam, costs, cases)
    policies = ("default", "predicted")
    _print(
        ["budget, ms", "load", *(f"{policy}: {key}" for policy in policies for key in rows[0][policy])],
        [
            [
                row["budget_ms"],
                row["load"] or "one text",
                *(f"{x:.4f}" for policy in policies for x in row[policy].values()),
            ]
            for row in rows
        ],
        json_file,
        rows,
    )


@app.command()
def speedup(
    texts: Annotated[Path, typer.Option(help="Texts to send: tsv, csv or jsonl with named columns, or txt.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    rate: Annotated[list[float] | None, typer.Option(help="Requests per second; repeat for more.")] = None,
    rounds: Annotated[int, typer.Option(help="Repetitions.", min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="Length of one measurement.", min=0.5)] = 8.0,
    port: Annotated[int, typer.Option(help="Port to start the servers on.")] = 8100,
    json_file: Json = None,
) -> None:
    """How right the speed-up in model time is that a server shows: against the same texts at τ = 0.

    Example: de3 loadtest study speedup --texts dev.tsv --rate 50 --rate 300
    """
    from dataclasses import asdict

    from loadtest.studies.speedup import speedup as run
    from loadtest.texts import read

    samples = read(texts, text_column, "label", [])
    rows = run(store, model, samples, rate or [50.0, 300.0], rounds, seconds, port)
    columns = ["requests/s", "the server says", "it was", "off by"]
    cells = [[r.rate, f"{r.said:.2f}", f"{r.was:.2f}", f"{100 * (r.said / r.was - 1):+.0f}%"] for r in rows]
    _print(columns, cells, json_file, [asdict(r) for r in rows])
