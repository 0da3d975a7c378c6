"""python -m lab study: studies of any model; lab/README.md names the pages with their results."""

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from de3.commands.options import add_parameters, fields_of
from de3.data.tables import Columns, read_rows
from de3.loadtest.options import (
    Json,
    LabelNames,
    Model,
    Port,
    Rounds,
    Seconds,
    Store,
    TextColumn,
    Texts,
)
from de3.loadtest.texts import read
from de3.runtime.flags import Wanted, flag_of
from lab.options import AuditShare, Core, Earlier, LabelColumn, Png, StartLayers, open_model, show

app = typer.Typer(
    no_args_is_help=True, help="Studies of any model: certificates, audits, OOD, deadlines, time."
)


@app.command()
def learn(
    stock: Annotated[Path, typer.Argument(help="Folder of a stock classifier of transformers.")],
    texts: Annotated[
        Path, typer.Option(help="Texts that the classifier was not trained on; at least 6,000.")
    ],
    rate: Annotated[float, typer.Option(help="The guaranteed rate of disagreement.")] = 0.02,
    fits: Annotated[int, typer.Option(help="Number of servers, each with its own fits.", min=1)] = 20,
    streams: Annotated[int, typer.Option(help="Number of simulated streams over all servers.", min=1)] = 1000,
    workers: Annotated[int, typer.Option(help="Number of processes.", min=1)] = 2,
) -> None:
    """Count the simulated streams in which a server that learns breaks its guarantee with any of its versions.

    Example: python -m lab study learn runs/stock/model --texts runs/stock/texts.jsonl
    """
    from lab.studies.learn import run

    rows = read_rows(texts, Columns(label=None))
    found = [text for text, _ in rows if isinstance(text, str)]
    broken, count, speedup = run(stock, found, rate, fits, streams, workers)
    print(f"{broken} of {count} streams were ever above {100 * rate:g}%; speed-up in layers {speedup:.2f}×")


@app.command()
def copies(
    stock: Annotated[Path, typer.Argument(help="Folder of a stock classifier of transformers.")],
    texts: Annotated[
        Path, typer.Option(help="Texts that the classifier was not trained on; at least 6,000.")
    ],
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help='As "copies edit order sender [decoys]"; repeat for more (lab/studies/copies.py). Default: all.'
        ),
    ] = None,
    rate: Annotated[float, typer.Option(help="The guaranteed rate of disagreement.")] = 0.02,
    fits: Annotated[int, typer.Option(help="Number of fits of each attack.", min=1)] = 12,
    upstream: Annotated[bool, typer.Option(help="Full depth is an upstream.")] = False,
    workers: Annotated[int, typer.Option(help="Number of processes.", min=1)] = 2,
) -> None:
    """Attack a tenant's evidence with copies of its texts, and count the fits that break its guarantee.

    Example: python -m lab study copies runs/clinc/model --texts runs/clinc/texts.jsonl
    """
    from lab.studies.copies import ATTACKS, run

    rows = read_rows(texts, Columns(label=None))
    found = list(dict.fromkeys(text for text, _ in rows if isinstance(text, str)))
    table = run(stock, found, attack or ATTACKS, rate, fits, upstream, workers)
    above = f"above {100 * rate:g}%"
    show(["attack", above, "true rate, mean (worst)", "speed-up", "evidence"], table)


@app.command()
def near(
    texts: Annotated[list[Path], typer.Argument(help="Files of texts.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "text",
) -> None:
    """Measure how many texts are near to one of those that exits were fitted to, so that they prove nothing.

    In brackets: if other clients have sent these. The first row is that of texts made from templates.

    Example: python -m lab study near runs/clinc/texts.jsonl
    """
    from lab.studies.copies import near_shares, templated

    counts, unseen = (300, 1500, 5000), 1000
    opened, rows = open_model(store, model), []
    sources = {"templates": templated(max(counts) + unseen)}
    for file in texts:
        found = list(dict.fromkeys(one.text for one in read(file, text_column)))
        sources[str(file)] = random.Random(0).sample(found, len(found))
    for name, each in sources.items():
        used = [count for count in counts if count + unseen <= len(each)]
        shares = near_shares(opened, each, used, unseen)
        rows.append([name, *(f"{own:.1%} ({others:.1%})" for own, others in shares)])
    show(["texts", *(f"{count} fitted" for count in counts)], rows)


@app.command()
def learn_sizes(
    stock: Annotated[Path, typer.Argument(help="Folder of a stock classifier of transformers.")],
    texts: Annotated[Path, typer.Option(help="Texts that the classifier was not trained on.")],
    size: Annotated[
        list[int] | None,
        typer.Option(help="Number of texts to fit to; repeat for more. Default: 1,000, 3,000 and 10,000."),
    ] = None,
    unseen: Annotated[int, typer.Option(help="Number of texts to measure on.", min=100)] = 1000,
) -> None:
    """Measure the speed-up, on unseen texts, of exits learned from each number of texts, at 1, 2 and 5% disagreement.

    Example: python -m lab study learn-sizes runs/stock/model --texts runs/stock/texts.jsonl --size 1000 --size 3000
    """
    from lab.studies.learn import RATES, sizes

    rows = read_rows(texts, Columns(label=None))
    found = [text for text, _ in rows if isinstance(text, str)]
    results = sizes(stock, found, size or [1000, 3000, 10_000], unseen)
    columns = ["texts", *(f"{100 * rate:g}%" for rate in RATES)]
    show(columns, [[f"{count}", *(f"{value:.2f}×" for value in values)] for count, values in results])


@app.command()
def guarantee(
    texts: Annotated[list[Path], typer.Argument(help="Labelled texts; together they are the population.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    label_names: LabelNames = "",
    wish: Annotated[
        list[float] | None,
        typer.Option(help="A max_disagreement; repeat for more. Default: 0.02, 0.05 and 0.1."),
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Column that names the group of related texts, such as group in a held-out part of de3 train.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Number of groups to certify on. Default: half of all.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Number of simulated calibrations.", min=1)] = 500,
    start_layers: StartLayers = 0.6,
    json_file: Json = None,
) -> None:
    """Measure violations of `max_disagreement`, and the speed-up relative to an oracle's, over many calibrations.

    Example: python -m lab study guarantee runs/sst2/tune.jsonl runs/sst2/certify.jsonl
    """
    from lab.studies.guarantee import guarantee as run
    from lab.studies.guarantee import table
    from lab.studies.samples import recorded

    loaded = open_model(store, model)
    columns = (text_column, label_column)
    population = recorded(loaded, texts, columns, label_names, group_column)
    rows = run(
        population,
        loaded.manifest.default_signal,
        size or population.num_groups // 2,
        wish or [0.02, 0.05, 0.1],
        trials,
        start_layers,
    )
    show(*table(rows), json_file, rows)


@app.command()
def audit(
    home: Annotated[Path, typer.Argument(help="Texts at the beginning of streams.")],
    away: Annotated[Path, typer.Argument(help="Texts that streams switch to.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="A guaranteed disagreement (--guarantee); repeat for more. Default: 0.02 and 0.05."
        ),
    ] = None,
    share: AuditShare = 0.05,
    streams: Annotated[int, typer.Option(help="Number of stationary streams.", min=1)] = 1000,
    other_streams: Annotated[int, typer.Option(help="Number of streams of each other kind.", min=1)] = 200,
    texts: Annotated[int, typer.Option(help="Number of texts in a stream.", min=1000)] = 100_000,
    change_at: Annotated[int, typer.Option(help="Number of texts before a switch or drift.", min=1)] = 50_000,
    start_layers: StartLayers = 0.6,
    png: Annotated[
        Path | None, typer.Option(help="Write a plot here, a file for each rate.", show_default=False)
    ] = None,
    json_file: Json = None,
) -> None:
    """Validity and speed of --guarantee, on simulated streams of recorded texts whose true rates are known.

    Streams are stationary, or have a sudden switch, a slow drift, or bursts of other texts.

    Example: python -m lab study audit sst2/dev.tsv electronics.jsonl --png audit.png
    """
    from lab.studies import audit as study
    from lab.studies.samples import recorded

    loaded = open_model(store, model)
    signal = loaded.manifest.default_signal
    both = [
        study.Population.of(recorded(loaded, [path], (text_column, "label")).recorded, signal)
        for path in (home, away)
    ]
    rows = []
    for guaranteed in rate or [0.02, 0.05]:
        setting = study.Setting(both[0], both[1], guaranteed, share, texts, change_at, start_layers)
        found, points = study.audit(setting, study.KINDS, streams, other_streams)
        rows += found
        if png:
            several = len(rate or [1, 2]) > 1
            study.plot(png.with_stem(f"{png.stem}-{100 * guaranteed:g}") if several else png, setting, points)
    show(*study.table(rows), json_file, rows)


@app.command()
def flagged(
    home: Annotated[Path, typer.Argument(help="Texts, with labels or without.")],
    label: Annotated[str, typer.Option(help="The label that is flagged.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    share: AuditShare = 0.05,
    texts: Annotated[int, typer.Option(help="Number of texts of a stream.", min=1000)] = 100_000,
    streams: Annotated[int, typer.Option(help="Number of streams of each row.", min=2)] = 200,
    json_file: Json = None,
) -> None:
    """Simulate a guard under --guarantee-missed, with 1, 2 and 10% flagged texts, at 2 and 5%.

    Example: python -m lab study flagged sst2/dev.tsv --label negative
    """
    from lab.studies import flagged as study
    from lab.studies.samples import recorded

    loaded = open_model(store, model)
    found, manifest = recorded(loaded, [home], (text_column, "label")).recorded, loaded.manifest
    flag = flag_of(Wanted([label]), manifest, manifest.kind)
    settings = (0.01, 0.02, 0.1), (0.02, 0.05), share, texts, streams
    rows = study.study(found, manifest.default_signal, flag, *settings)
    show(*study.table(rows), json_file, rows)


@app.command()
def certificates(
    stock: Annotated[Path, typer.Argument(help="Folder of a stock classifier of transformers.")],
    texts: Annotated[list[Path], typer.Option(help="Texts that the classifier was not trained on.")],
    size: Annotated[int, typer.Option(help="Number of texts of an import; the others are unseen.")] = 4000,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Shares of the texts that fit, tune and certify; repeat for more. Default: all."),
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Number of random splits.", min=1)] = 20,
    first: Annotated[int, typer.Option(help="Seed of the first split.")] = 0,
) -> None:
    """Measure the speed that certificates of imports cost, and how often their limits are exceeded, on random splits.

    Example: python -m lab study certificates runs/stock/model --texts runs/stock/texts.jsonl --scheme 100
    """
    from de3.export.classifier import Stock
    from lab.studies import certificates as study

    rows = [text for file in texts for text, _ in read_rows(file, Columns(label=None))]
    found = list(dict.fromkeys(text for text in rows if isinstance(text, str)))
    with TemporaryDirectory() as work:
        run_once = study.Texts.of(Stock.open("stock", stock), found, Path(work))
    outcomes = study.run(run_once, size, repetitions, scheme or list(study.SCHEMES), first)
    show(*study.table(outcomes, run_once.num_layers, run_once.cost), None, [])


@app.command()
def placement(
    texts: Annotated[Path, typer.Argument(help="Texts that the model was not fitted to.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    size: Annotated[int, typer.Option(help="Number of texts on which exits are chosen.", min=1)] = 1500,
    splits: Annotated[int, typer.Option(help="Number of random splits.", min=1)] = 12,
    text_column: TextColumn = "sentence",
) -> None:
    """Compare all exits with those that save more time than they take, on random splits of texts.

    The model must use all of its exits.

    Example: python -m lab study placement test.jsonl --model intents --text-column text
    """
    from lab.studies import placement as study
    from lab.studies.state import recorded

    loaded = open_model(store, model)
    cost = loaded.manifest.exit_cost
    found, chosen = study.study(
        recorded(loaded, [one.text for one in read(texts, text_column)], "texts"), cost, size, splits
    )
    rows = [[f"{one.cost:.3f}", *(f"{ratio:.3f}" for ratio in one.ratios.mean(0))] for one in found]
    show(["cost of an exit, layers", "1%", "2%", "5%"], rows, None, [])
    print(f"chosen at {cost:.3f}:", ", ".join(f"{layers} ({n})" for layers, n in chosen.most_common()))


@app.command()
def state(
    fitting: Annotated[Path, typer.Argument(help="Texts to fit risk to.")],
    unseen: Annotated[list[Path], typer.Argument(help="Texts that neither exits nor risk were fitted to.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    json_file: Json = None,
) -> None:
    """Compare risk with and without the exits' states, on texts with a negation and on others.

    Example: python -m lab study state tune.jsonl certify.jsonl --text-column text
    """
    from lab.studies import state as study

    loaded = open_model(store, model)
    fit, *others = ([sample.text for sample in read(file, text_column)] for file in (fitting, *unseen))
    texts = [text for one in others for text in one]
    parts = study.recorded(loaded, fit, "texts to fit to"), study.recorded(loaded, texts, "unseen texts")
    rows = study.study(*parts, texts)
    show(*study.table(rows), json_file, rows)


@app.command()
def tenants(
    home: Annotated[Path, typer.Argument(help="Texts of the tenants.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    rate: Annotated[float, typer.Option(help="The guaranteed disagreement (--guarantee).")] = 0.02,
    share: AuditShare = 0.05,
    count: Annotated[int, typer.Option(help="Number of tenants, the hostile one included.", min=2)] = 20,
    texts: Annotated[int, typer.Option(help="Number of texts of each tenant in a stream.", min=100)] = 10_000,
    streams: Annotated[int, typer.Option(help="Number of streams.", min=1)] = 1000,
    json_file: Json = None,
) -> None:
    """Simulate the tenants of one server, one of which tries to break --guarantee for the others.

    Example: python -m lab study tenants sst2/dev.tsv
    """
    from lab.studies import tenants as study
    from lab.studies.samples import recorded

    loaded = open_model(store, model)
    found = recorded(loaded, [home], (text_column, "label")).recorded
    rows = study.study(loaded.manifest, found, rate, share, count, texts, streams)
    show(*study.table(rows, rate), json_file, rows)


@app.command()
def far(
    like: Annotated[
        Path,
        typer.Argument(
            help="In-distribution samples to fit scores on, such as certify.jsonl; columns text and label."
        ),
    ],
    home: Annotated[Path, typer.Argument(help="Other in-distribution samples, such as a test set.")],
    away: Annotated[
        list[Path], typer.Argument(help="Out-of-distribution texts, with or without known labels.")
    ],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    label_column: LabelColumn = "label",
    label_names: LabelNames = "",
    switches: Annotated[
        int, typer.Option(help="Simulated switches to out-of-distribution texts.", min=1)
    ] = 20,
    json_file: Json = None,
) -> None:
    """OOD detection (AUROC), accuracy and speed-up by --ood-policy, and the delay of the drift alarm.

    Example: python -m lab study far runs/sst2/certify.jsonl dev.tsv books.tsv --label-names negative,positive
    """
    from lab.studies import far as study
    from lab.studies.samples import recorded

    loaded = open_model(store, model)
    manifest, columns = loaded.manifest, (text_column, label_column)
    fitted = recorded(loaded, [like], ("text", "label")).recorded
    files = {path.stem: recorded(loaded, [path], columns, label_names).recorded for path in [home, *away]}
    in_distribution, others = files[home.stem], {p.stem: files[p.stem] for p in away}
    numbers: dict[str, Any] = {"auroc": {}, "policy": {}, "drift": {}}
    for name, score in study.scores(manifest, fitted).items():
        scores = score(in_distribution)
        numbers["auroc"][name] = {key: study.auroc(scores, score(texts)) for key, texts in others.items()}
    show(
        ["score (AUROC)", *others],
        [[name, *(f"{x:.3f}" for x in row.values())] for name, row in numbers["auroc"].items()],
    )
    for key, texts in files.items():
        numbers["policy"][key] = {
            name: study.policy(manifest, texts, *arguments)
            for name, arguments in (
                ("flag", ("flag",)),
                ("deepen", ("deepen",)),
                ("far to full depth", ("flag", True)),
            )
        }
    show(
        ["policy", "texts", "accuracy", "speed-up", "far"],
        [
            [name, key, f"{100 * r['accuracy']:.2f}%", f"{r['speedup']:.2f}×", f"{100 * r['far']:.1f}%"]
            for key, rows in numbers["policy"].items()
            for name, r in rows.items()
        ],
    )
    for source, own in (("like", fitted), (home.stem, in_distribution)):
        for key, texts in others.items():
            numbers["drift"][f"{source} → {key}"] = study.drift(manifest, own, texts, switches)
    first = next(iter(numbers["drift"].values()))
    show(
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
    layer_us: Annotated[
        float, typer.Option(help="Time of one layer in µs (python -m lab layers).", min=1)
    ] = 117.0,
    start_layers: StartLayers = 0.6,
    json_file: Json = None,
) -> None:
    """Simulate requests with deadlines: the default τ against the most accurate τ predicted to meet them.

    Example: python -m lab study deadlines dev.tsv --label-names negative,positive
    """
    from lab.studies.deadlines import Costs
    from lab.studies.deadlines import deadlines as run
    from lab.studies.samples import recorded

    loaded = open_model(store, model)
    samples = recorded(loaded, [texts], (text_column, label_column), label_names).recorded
    defaults = loaded.manifest.defaults
    cases = [(0.2, 0.0), (0.4, 0.0), (0.8, 0.0)]
    cases += [(budget, utilization) for utilization in (0.5, 0.9, 1.2) for budget in (2.0, 8.0)]
    costs = Costs(start_layers * layer_us * 1e-6, layer_us * 1e-6)
    rows = run(samples, defaults.tau, loaded.manifest.default_signal, costs, cases)
    policies = ("default", "predicted")
    show(
        ["budget, ms", "load", *(f"{policy}: {key}" for policy in policies for key in rows[0][policy])],
        [
            [
                row["budget_ms"],
                row["load"] or "single text",
                *(f"{x:.4f}" for policy in policies for x in row[policy].values()),
            ]
            for row in rows
        ],
        json_file,
        rows,
    )


@app.command()
def speedup(
    texts: Texts,
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests per second; repeat for more. Default: 50 and 300.")
    ] = None,
    rounds: Rounds = 3,
    seconds: Seconds = 8.0,
    port: Port = 8100,
    json_file: Json = None,
) -> None:
    """Check the speed-up in model time that the server's metrics report, against the same texts at τ = 0.

    Example: python -m lab study speedup --texts dev.tsv --rate 50 --rate 300
    """
    from dataclasses import asdict

    from lab.studies.speedup import speedup as run

    samples = read(texts, text_column)
    rows = run(store, model, samples, rate or [50.0, 300.0], rounds, seconds, port)
    columns = ["requests/s", "reported", "measured", "error"]
    cells = [
        [r.rate, f"{r.reported:.2f}", f"{r.measured:.2f}", f"{100 * (r.reported / r.measured - 1):+.0f}%"]
        for r in rows
    ]
    show(columns, cells, json_file, [asdict(r) for r in rows])


@app.command("long")
def long_texts(
    texts: Annotated[list[Path], typer.Argument(help="Labelled texts, of one domain or several.")],
    store: Store = Path("models"),
    model: Model = "sst2",
    text_column: TextColumn = "sentence",
    label_column: LabelColumn = "label",
    label_names: LabelNames = "",
    max_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Length of a window in tokens; repeat for more. Default: the model's.", min=8),
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Share of a window's tokens that the next one repeats.", min=0, max=0.9)
    ] = 0.25,
    json_file: Json = None,
) -> None:
    """Long texts, truncated or in windows: accuracy and work by strategy.

    A strategy may be chosen by the column "chose", which is measured on every other text. The other columns are
    measured on the remaining texts.

    Example: python -m lab study long books.csv --label-names negative,positive --max-tokens 512 --max-tokens 64
    """
    from dataclasses import replace

    from de3.exits.rule import ExitRule
    from lab.studies import long as study

    loaded = open_model(store, model)
    manifest = loaded.manifest
    if manifest.thresholds is not None or manifest.tolerance is not None:
        raise ValueError(f"{model}: this study is of models whose classes are mutually exclusive")
    default = ExitRule(manifest.defaults.tau, manifest.default_signal)
    columns = (text_column, label_column)
    rows = []
    for size in max_tokens or [manifest.max_tokens]:
        if size > manifest.max_tokens:
            raise ValueError(f"--max-tokens {size}: at most {manifest.max_tokens} with {model}")
        sets = {
            path.stem: study.record(loaded, read(path, *columns, label_names), size, overlap)
            for path in texts
        }
        for tau in (0.0, default.tau):
            served = study.EXPECTED if tau else study.EXACTLY
            found = study.rows_of(sets, replace(default, tau=tau), served)
            rows += [{"max_tokens": size, "tau": tau, **row} for row in found]
    measured = ["chose", "accuracy", "− truncate", "windows", "work", "differs from all"]
    cells = [
        [
            *(row["max_tokens"], f"{row['tau']:g}", f"{row['set']}, {row['count']} {row['texts']}"),
            *(row["strategy"], f"{100 * row['chose']:+.2f}", f"{100 * row['accuracy']:.2f}"),
            f"{100 * row['difference']:+.2f} ± {100 * row['interval']:.2f}",
            *(f"{row['windows']:.2f}", f"{row['work']:.2f}×", f"{100 * row['unlike_all']:.2f}%"),
        ]
        for row in rows
    ]
    show(["window", "τ", "texts", "strategy", *measured], cells, json_file, rows)


@app.command()
def overhead(
    store: Store = Path("models"),
    model: Model = "sst2",
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Length of a text in tokens; repeat for more. Default: 8, 32, 128, 512.", min=3),
    ] = None,
    seconds: Seconds = 3.0,
    core: Core = 0,
    earlier: Earlier = None,
    png: Png = None,
    json_file: Json = None,
) -> None:
    """Time of an exit's classifier and prototypical network relative to a layer's, in our kernels and ONNX Runtime.

    Example: python -m lab study overhead --model sst2 --json overhead.json
    """
    from de3.model_store.store import Store
    from lab.engines import pinned
    from lab.studies import overhead as study

    rows = [row for file in earlier or [] for row in json.loads(file.read_text())]
    if not earlier:
        with pinned(core):
            rows = study.overhead(Store(store).open(model), tokens or study.LENGTHS, seconds)
    show(*study.table(rows), json_file, rows)
    if png:
        study.plot(png, rows)


@app.command()
@add_parameters(Columns)
def wall(
    texts: Annotated[
        Path | None, typer.Argument(help="Labelled texts, unless --show is given.", show_default=False)
    ] = None,
    store: Store = Path("models"),
    model: Model = "sst2",
    label_names: Annotated[
        str | None, typer.Option(help="New names of the labels in their sorted order.")
    ] = None,
    tau: Annotated[
        list[float] | None,
        typer.Option(help="A τ besides 0; repeat for more. Default: a grid, and the model's.", min=0, max=1),
    ] = None,
    rounds: Rounds = 3,
    core: Core = 0,
    earlier: Earlier = None,
    png: Png = None,
    json_file: Json = None,
    **reading: Any,
) -> None:
    """Accuracy against speed-up in layers and by the clock, for texts that run alone in the engine.

    Example: python -m lab study wall dev.tsv --text-column sentence --label-names negative,positive
    """
    from de3.data.examples import check_input, rename, to_examples
    from de3.loadtest import report
    from de3.model_store.store import Store
    from de3.runtime.loading import load
    from de3.server.settings import Settings
    from lab.engines import pinned
    from lab.studies import wall as study

    results = [result for file in earlier or [] for result in json.loads(file.read_text())]
    if not earlier:
        if texts is None:
            raise ValueError("wall: needs labelled texts, or results to --show")
        rows = rename(read_rows(texts, Columns(**fields_of(Columns, reading))), label_names)
        with pinned(core):
            settings: dict[str, Any] = {}  # the defaults
            served = load(Store(store).open(model), Settings(**settings))
            manifest = served.model.manifest
            if manifest.thresholds is not None or manifest.tolerance is not None:
                raise ValueError(f"{model}: this study is of models whose classes are mutually exclusive")
            examples = to_examples(rows, manifest.labels)
            check_input(examples, manifest.input, str(texts))
            taus = sorted({0.0, *(tau or (*study.TAUS, manifest.defaults.tau))})
            results = [study.wall(served, examples, taus, rounds)]
    show(*study.table(results), json_file, results)
    if png:
        labels = ("Accuracy against speed-up", "speed-up against τ = 0", "accuracy, %")
        report.plot_curves(png, study.curves(results), labels)


@app.command()
@add_parameters(Columns, without=["label"])
def repeated(
    texts: Annotated[Path, typer.Argument(help="Texts.")],
    label: Annotated[str, typer.Option(help="The label that is flagged.")],
    added: Annotated[list[str], typer.Option(help="What is added to the texts; repeat for more.")],
    times: Annotated[int, typer.Option(help="How often each is repeated in a text.", min=1)] = 100,
    store: Store = Path("models"),
    model: Model = "sst2",
    **reading: Any,
) -> None:
    """Count the flagged texts that are no longer flagged at full depth with something repeated around them.

    Example: python -m lab study repeated dev.tsv --text-column sentence --label negative --added '[CLS]' --added the
    """
    from de3.model_store.store import Store
    from lab.studies.repeated import lost

    rows = read_rows(texts, Columns(**fields_of(Columns, reading), label=None))
    alone = [text for text, _ in rows if isinstance(text, str)]
    flagged, found = lost(Store(store).open(model), alone, label, added, times)
    print(f"{flagged} of {len(alone)} texts are flagged at full depth")
    shown = [(one, "token" if is_token else "characters", *lost) for one, is_token, *lost in found]
    show((f"added {times} times", "read as", "no longer flagged: behind", "in front"), shown)
