"""de3 loadtest: load tests, comparisons with other servers, fault injection and attacks."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from loadtest import options
from loadtest.audit_cli import app as audit_app
from loadtest.studies.cli import app as studies_app

if TYPE_CHECKING:
    from loadtest.texts import Sample
    from model_store.store import Artifact

CALIBRATION_TEXTS = 300
app = typer.Typer(no_args_is_help=True, help="Load tests, and comparisons with other servers.")
app.add_typer(studies_app, name="study")
app.add_typer(audit_app, name="audit")
console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


def _samples(texts: Path, text_column: str, label_column: str, label_names: str) -> "list[Sample]":
    from loadtest.texts import read

    return read(texts, text_column, label_column, [name for name in label_names.split(",") if name])


@app.command()
def run(
    url: options.Url,
    texts: options.Texts,
    text_column: options.TextColumn = "sentence",
    label_column: options.LabelColumn = "label",
    label_names: options.LabelNames = "",
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests per second, with Poisson arrivals (open loop). Default: closed loop.",
            show_default=False,
        ),
    ] = None,
    connections: Annotated[int, typer.Option(help="Connections of a closed loop.", min=1, max=500)] = 16,
    seconds: options.Seconds = 10.0,
    tau: Annotated[
        list[float] | None,
        typer.Option(
            help="τ of the requests; repeat for a mix. Default: the server's.",
            min=0,
            max=1,
            show_default=False,
        ),
    ] = None,
    long_share: Annotated[float, typer.Option(help="Share of long texts.", min=0, max=1)] = 0.0,
    long_words: Annotated[int, typer.Option(help="Number of words of a long text.", min=1)] = 450,
    json_file: options.Json = None,
    png: Annotated[
        Path | None, typer.Option(help="Plot the latency distribution into this file.", show_default=False)
    ] = None,
) -> None:
    """Load a running server and report latency, throughput, errors and accuracy.

    Every label is compared with that of the same text sent alone.

    Example: de3 loadtest run http://127.0.0.1:8000 --texts dev.tsv --label-names negative,positive --rate 300
    """
    from rich.progress import Progress

    from loadtest import report
    from loadtest.client import Target, ask_alone, send_traffic, wrong_labels
    from loadtest.texts import with_long, with_taus

    samples = with_long(_samples(texts, text_column, label_column, label_names), long_share, long_words)
    samples = with_taus(samples, tau or [])
    target = Target(url)
    try:
        alone = ask_alone(target, samples)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("sending requests", total=seconds)

            def show(elapsed: float) -> None:
                progress.update(task, completed=elapsed)

            result = send_traffic(target, samples, seconds, rate, connections, progress=show)
    except OSError as error:
        raise ValueError(f"{url}: {error}; is the server running?") from None
    row = report.summary(result, wrong_labels(result, alone))
    Console(width=None if sys.stdout.isatty() else 120).print(report.table({url: row}))
    if json_file:
        json_file.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")
    if png:
        report.plot_cdf(png, {url: result.latencies_ms()}, f"{rate:g} requests/s" if rate else "closed loop")


@app.command()
def ramp(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: options.Model = "sst2",
    text_column: options.TextColumn = "sentence",
    label_column: options.LabelColumn = "label",
    label_names: options.LabelNames = "",
    slo_p99_ms: options.SloP99 = 50.0,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Accuracy floor. Default: that of de3 serve.", show_default=False)
    ] = None,
    port: options.Port = 8100,
    out: Annotated[Path, typer.Option(help="Folder for ramp.json and ramp.png.")] = Path("loadtest-results"),
) -> None:
    """Ramp the request rate up to twice the capacity and down, with the server's load controller off and on.

    Example: de3 loadtest ramp --texts dev.tsv --label-names negative,positive
    """
    from rich.table import Table

    from loadtest.ramp import ramp as run_ramp

    samples = _samples(texts, text_column, label_column, label_names)
    floor = [] if min_accuracy is None else ["--min-accuracy", f"{min_accuracy:g}"]
    results = run_ramp(store, model, samples, slo_p99_ms, floor, out, port)
    keys = ("offered_per_s", "answered", "within_slo", "p50_ms", "p99_ms", "accuracy", "tau")
    table = Table("controller", "phase", *keys)
    for name, result in results["runs"].items():
        for phase, row in result["phases"].items():
            table.add_row(name, phase, *(str(row[key]) for key in keys))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for name, result in results["runs"].items():
        recovery_s = result["recovery_s"]
        console.print(f"controller {name}: p99 meets the objective {recovery_s:g} s after the overload")
    console.print(f"results and plot: {out}")


@app.command()
def fuzz(
    url: options.Url,
    requests: Annotated[int, typer.Option(help="Number of requests.", min=1)] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the random requests.")] = 1,
) -> None:
    """Send malformed requests to a server; fails if one of them gets a wrong answer.

    Every answer must be HTTP with a status below 500 (or 503 or 504), and errors must have the documented
    shape. At the end the server must answer a valid request as before. Only test your own servers.
    """
    from rich.progress import Progress

    from loadtest import fuzz as fuzzer

    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=requests)
        result = fuzzer.fuzz(url, requests, seed, lambda done: progress.update(task, completed=done))
    print(", ".join(f"{status}: {count}" for status, count in sorted(result.statuses.items())))
    for problem, request in result.problems:
        print(f"{problem}\n    {request[:500]!r}")
    if result.problems:
        raise typer.Exit(1)


@app.command()
def soak(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: options.ModelName = "sst2",
    minutes: Annotated[float, typer.Option(help="Duration.", min=0.1)] = 60.0,
    reload_s: Annotated[float, typer.Option(help="Seconds between two reloads of the model.", min=1)] = 60.0,
    text_column: options.TextColumn = "sentence",
    port: options.Port = 8100,
    out: Annotated[Path, typer.Option(help="Folder for soak.json and soak.png.")] = Path("loadtest-results"),
) -> None:
    """Start a server and send it mixed traffic for an hour, while its model is reloaded regularly.

    The traffic: single texts, batches, long texts, latency budgets, malformed requests, clients that hang up
    or read slowly. Fails if an answer is wrong, missing or changes, or if the memory grows by more than 5%
    from the second quarter to the last.
    """
    import secrets

    from rich.progress import Progress

    from loadtest import soak as soak_test

    soak_test.check_plots()
    from loadtest.servers import ours, running

    key = secrets.token_hex(16)
    samples = _samples(texts, text_column, "label", "")
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
def capacity(
    texts: options.Texts,
    wanted: Annotated[float, typer.Option(help="Total requests per second that you need.", min=1)] = 1000.0,
    slo_p99_ms: options.SloP99 = 50.0,
    store: options.Store = Path("models"),
    model: options.Model = "sst2",
    text_column: options.TextColumn = "sentence",
    seconds: options.Seconds = 8.0,
    port: options.Port = 8100,
    out: Annotated[Path, typer.Option(help="Folder for the server's log.")] = Path("loadtest-results"),
) -> None:
    """Find the highest request rate within a latency objective on this machine; advise on Kubernetes and Ray.

    The load generator shares the machine's cores, so the true capacity is somewhat higher.
    """
    from loadtest import capacity as search
    from loadtest.servers import ours, running
    from server.settings import available_cores

    out.mkdir(parents=True, exist_ok=True)
    samples = _samples(texts, text_column, "label", "")

    def show(step: search.Step) -> None:
        verdict = "met" if step.keeps(slo_p99_ms) else "missed"
        console.print(
            f"{step.rate:.0f}/s: p99 {step.p99_ms:.1f} ms, {step.unanswered:.1%} unanswered: {verdict}"
        )

    with running(ours(store, model), port, out / "server.log") as started:
        rate = search.capacity(started.target, samples, slo_p99_ms, seconds, show)
    if rate == 0:
        raise ValueError(
            f"no rate has a p99 within {slo_p99_ms:g} ms here: raise --slo-p99-ms or use a faster machine"
        )
    print("\n".join(search.advice(rate, slo_p99_ms, wanted, available_cores())))


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

    SIGTERM, SIGKILL, a full disk, clients that hang up or do not read, slow heads, overload, a jumping clock.
    """
    from dataclasses import asdict

    from loadtest import faults as injection

    out.mkdir(parents=True, exist_ok=True)
    testbed = injection.Testbed(store, model, _samples(texts, text_column, "label", ""), port, out)

    def show(row: injection.Row) -> None:
        lost = "not tested" if row.lost is None else f"lost {row.lost}"
        print(f"{row.fault}\n    {row.happened}\n    {lost}", flush=True)

    rows = injection.faults(testbed, only or [], show)
    (out / "faults.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if any(row.lost for row in rows):
        raise typer.Exit(1)


@app.command()
def attack(
    store: options.Store = Path("models"),
    model: options.Model = "sst2",
    only: Annotated[list[str] | None, typer.Option(help="Name of an attack; repeat for more.")] = None,
    seconds: Annotated[float, typer.Option(help="Duration of one attack.", min=0.5)] = 20.0,
    connections: Annotated[
        int | None,
        typer.Option(
            help="Connections of each attack. Default: the attack's, 4 to 1,200.", min=1, show_default=False
        ),
    ] = None,
    memory_wait_s: Annotated[
        float, typer.Option(help="Longest time for the server's memory to recover.", min=0)
    ] = 60.0,
    port: options.Port = 8100,
    out: Annotated[Path, typer.Option(help="Folder for attacks.json.")] = Path("loadtest-results"),
) -> None:
    """Attack our own server and check that an innocent client is still served.

    Each attack starts its own server with limits of 1 GiB of memory and 1,024 open files. The attacker, a
    process at nice 19, uses the addresses 127.0.0.2 to 127.0.0.9. The innocent client, at 127.0.0.1, sends 20
    requests per second. An attack fails if the server dies or keeps the memory, or if the innocent client is
    refused, gets no answer or gets it late: p99 above 50 ms and above 5 times the p99 before the attack.

    There is no URL to give, so that only your own servers can be attacked.

    Example: de3 loadtest attack --only endless_header --seconds 10
    """
    from loadtest import resilience

    out.mkdir(parents=True, exist_ok=True)
    arena = resilience.Arena(store, model, port, out, seconds, connections, memory_wait_s)

    def show(row: resilience.Row) -> None:
        print(f"{row.attack}: {'; '.join(row.problems) or 'passed'}", flush=True)

    rows = resilience.attack_all(arena, only or [], show)
    (out / "attacks.json").write_text(resilience.as_json(rows))
    Console(width=None if sys.stdout.isatty() else 175).print(resilience.table(rows))
    if any(row.problems for row in rows):
        raise typer.Exit(1)


@app.command()
def layers(
    store: options.Store = Path("models"),
    model: Annotated[str, typer.Option(help="An int8 model, as name or name:version.")] = "sst2",
    instructions: Annotated[
        str, typer.Option(help="Instruction set of the kernels, as vnni, avx2 or dotprod; empty: the best.")
    ] = "",
    json_file: options.Json = None,
) -> None:
    """Time one encoder layer in ONNX Runtime and in our kernels, and compare with the processor's peak.

    Example: de3 loadtest layers --model sst2
    """
    from rich.table import Table

    from loadtest.layers import layers as measure
    from model_store.store import Store

    with console.status("measuring"):
        results = measure(Store(store).open(model), instructions=instructions)
    table = Table(
        "tokens",
        "ONNX Runtime, µs",
        "kernels, µs",
        "ratio",
        "ONNX Runtime, % of peak",
        "kernels, % of peak",
        title=f"peak of one core ({results['instructions']}): "
        f"{results['peak_multiply_adds_per_s'] / 1e12:.2f}e12 int8 multiply-adds per second",
    )
    for row in results["layers"]:
        table.add_row(
            str(row["tokens"]),
            f"{row['onnxruntime_us']:.0f}",
            f"{row['kernels_us']:.0f}",
            f"{row['onnxruntime_us'] / row['kernels_us']:.2f}",
            f"{100 * row['onnxruntime_of_peak']:.0f}",
            f"{100 * row['kernels_of_peak']:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if json_file:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


@app.command()
def peer(
    name: Annotated[
        str,
        typer.Argument(
            help="fused_app, openvino_app, ctranslate2_app, litserve_app, bentoml_app, mlserver_app, transformers_app "
            "or infinity_app"
        ),
    ],
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed to the peer; see its --help.")] = None,
) -> None:
    """Start one of the peer servers; its environment is created on first use.

    Example: de3 loadtest peer fused_app -- full-depth-int8 --port 8100
    """
    from loadtest.servers import PEERS, peer_command

    names = sorted(p.stem for p in PEERS.glob("*_app.py"))
    if name not in names:
        raise ValueError(f"no peer {name!r}; there are {', '.join(names)}")
    command = [*peer_command(name), *(arguments or [])]
    os.execv(command[0], command)


def _models_of_peers(artifact: "Artifact", texts: list[str], out: Path) -> tuple[Path, Path, Path]:
    """Write what peers are made of into `out`: the full-depth graph in int8 and fp32, and texts to quantize with."""
    from export.full_depth import export_full_depth
    from loadtest.servers import fingerprint

    out.mkdir(parents=True, exist_ok=True)
    graphs = []
    for quantize in ("int8", "none"):
        # Another model of the same name and version has another manifest, with the hashes of its files.
        name = f"{artifact.full_name.replace(':', '-')}-{fingerprint(artifact.path / 'manifest.json')}"
        graphs.append(out / f"full-depth-{name}-{quantize}")
        if not graphs[-1].exists():
            export_full_depth(artifact.path, graphs[-1], quantize == "int8")
    calibration = out / "calibration.json"
    calibration.write_text(json.dumps(texts[:: max(1, len(texts) // CALIBRATION_TEXTS)][:CALIBRATION_TEXTS]))
    return graphs[0], graphs[1], calibration


@app.command()
def engines(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: Annotated[str, typer.Option(help="An int8 model, as name or name:version.")] = "sst2",
    stock: options.Stock = None,
    text_column: options.TextColumn = "sentence",
    count: Annotated[
        int | None, typer.Option(help="Number of texts. Default: all.", min=1, show_default=False)
    ] = None,
    core: Annotated[int, typer.Option(help="The core that everything runs on.", min=0)] = 0,
    seconds: options.Seconds = 3.0,
    rounds: Annotated[int, typer.Option(help="Number of repetitions; the engines take turns.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Folder for results.json and converted models.")] = Path(
        "loadtest-results"
    ),
) -> None:
    """Compare our kernels with other engines at full depth on one core, in process, without HTTP.

    Texts are tokenized beforehand. Ours run one text a call, and in groups of 4 and 16; the others run one.

    Example: de3 loadtest engines --texts dev.tsv
    """
    from loadtest.engines import Engines, tables
    from loadtest.servers import lean_peers
    from model_store.store import Store

    artifact = Store(store).open(model)
    plain = [s.text for s in _samples(texts, text_column, "label", "")][:count]
    peers = lean_peers(*_models_of_peers(artifact, plain, out), stock)

    def show(line: str) -> None:
        console.print(line, markup=False)

    results = Engines(artifact, peers, plain, out, seconds, rounds, core, show).run()
    for table in tables(results):
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    for name, note in results["notes"].items():
        console.print(f"{name}: {note}", markup=False)
    console.print(f"results: {out / 'results.json'}")


@app.command()
def compare(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: options.Model = "sst2",
    stock: options.Stock = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="A peer, such as fused_app; repeat for more. Default: all.", show_default=False),
    ] = None,
    tau: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=1, help="A τ of ours, besides the default and 0; repeat for more.", show_default=False
        ),
    ] = None,
    text_column: options.TextColumn = "sentence",
    label_column: options.LabelColumn = "label",
    label_names: options.LabelNames = "",
    seconds: options.Seconds = 6.0,
    rounds: options.Rounds = 3,
    port: options.Port = 8100,
    out: Annotated[Path, typer.Option(help="Folder for results.json and plots.")] = Path("loadtest-results"),
) -> None:
    """Compare our server with its peers on this machine, in turn, and print the ratios.

    Example: de3 loadtest compare --texts dev.tsv --label-names negative,positive
    """
    from rich.table import Table

    from loadtest.compare import Comparison
    from loadtest.servers import ours, peers
    from model_store.store import Store

    samples = _samples(texts, text_column, label_column, label_names)
    models = _models_of_peers(Store(store).open(model), [s.text for s in samples], out)
    others = peers(*models, stock)
    if unknown := set(peer or []) - {server.script for server in others}:
        known = sorted({server.script for server in others})
        raise ValueError(f"--peer {min(unknown)}: there are {', '.join(known)}; some need --stock")
    servers = [ours(store, model), ours(store, model, tau=0.0)]
    servers += [ours(store, model, tau=value) for value in tau or ()]
    servers += [ours(store, model, "onnxruntime"), ours(store, model, "onnxruntime", tau=0.0)]
    servers += [server for server in others if not peer or server.script in peer]
    comparison = Comparison(servers, samples, out, seconds, rounds, port)
    results = comparison.all(lambda tau: ours(store, model, tau=tau))
    ratios = Table("ratio", "median (range)")
    for name, value in results["ratios"].items():
        ratios.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 120).print(ratios)
    console.print(f"results and plots: {out}")
