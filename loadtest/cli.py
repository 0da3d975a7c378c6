"""de3 loadtest: send real texts, measure answers, compare with what people run today."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from loadtest.studies.cli import app as studies_app

if TYPE_CHECKING:
    from loadtest.texts import Sample

app = typer.Typer(no_args_is_help=True, help="Load tests, and comparisons with other servers.")
app.add_typer(studies_app, name="study")
console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)

Texts = Annotated[Path, typer.Option(help="Texts to send: tsv, csv or jsonl with named columns, or txt.")]
TextColumn = Annotated[str, typer.Option(help="Column of the texts.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the right labels, if there is one.")]
LabelNames = Annotated[str, typer.Option(help="Names of labels that are numbers, separated by commas.")]
Seconds = Annotated[float, typer.Option(help="Length of one measurement.", min=0.5)]


def _samples(texts: Path, text_column: str, label_column: str, label_names: str) -> "list[Sample]":
    from loadtest.texts import read

    return read(texts, text_column, label_column, [x for x in label_names.split(",") if x])


@app.command()
def run(
    url: Annotated[str, typer.Argument(help="The server, for example http://127.0.0.1:8000")],
    texts: Texts,
    text_column: TextColumn = "sentence",
    label_column: LabelColumn = "label",
    label_names: LabelNames = "",
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests per second, at random times (open loop). [default: as fast as it answers]",
            show_default=False,
        ),
    ] = None,
    connections: Annotated[int, typer.Option(help="Connections of a closed loop.", min=1, max=500)] = 16,
    seconds: Seconds = 10.0,
    tau: Annotated[
        list[float] | None,
        typer.Option(
            help="τ to ask for; repeat for a mix. [default: the server's]", min=0, max=1, show_default=False
        ),
    ] = None,
    long_share: Annotated[float, typer.Option(help="Share of texts made long.", min=0, max=1)] = 0.0,
    long_words: Annotated[int, typer.Option(help="Words of a long text.", min=1)] = 450,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here.", show_default=False)
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the latency distribution here.", show_default=False)
    ] = None,
) -> None:
    """Load one server and report latency, throughput, errors and accuracy.

    Every answer is compared with the answer to the same text asked alone.

    Example: de3 loadtest run http://127.0.0.1:8000 --texts dev.tsv --label-names negative,positive --rate 300
    """
    from rich.progress import Progress

    from loadtest import report
    from loadtest.client import Target, ask_alone, load, wrong_labels
    from loadtest.texts import with_long, with_taus

    samples = with_long(_samples(texts, text_column, label_column, label_names), long_share, long_words)
    samples = with_taus(samples, tau or [])
    target = Target(url)
    try:
        alone = ask_alone(target, samples)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("loading", total=seconds)

            def show(passed: float) -> None:
                progress.update(task, completed=passed)

            found = load(target, samples, seconds, rate, connections, progress=show)
    except OSError as error:
        raise ValueError(f"{url}: {error}; is the server running?") from None
    row = report.summary(found, wrong_labels(found, alone))
    Console(width=None if sys.stdout.isatty() else 120).print(report.table({url: row}))
    if json_file:
        json_file.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")
    if png:
        report.plot_cdf(png, {url: found.latencies_ms()}, f"{rate:g} requests/s" if rate else "closed loop")


@app.command()
def ramp(
    texts: Texts,
    store: Annotated[Path, typer.Option(help="Our model store.")] = Path("models"),
    model: Annotated[str, typer.Option(help="Our model, name or name:version.")] = "sst2",
    text_column: TextColumn = "sentence",
    label_column: LabelColumn = "label",
    label_names: LabelNames = "",
    slo_p99_ms: Annotated[float, typer.Option(help="The latency objective.", min=1)] = 50.0,
    min_accuracy: Annotated[
        float | None, typer.Option(help="The accuracy floor. [default: de3 serve's]", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="Port to start servers on.")] = 8100,
    out: Annotated[Path, typer.Option(help="Folder for ramp.json and ramp.png.")] = Path("loadtest-results"),
) -> None:
    """Raise the load to twice the capacity and lower it again, with the server's load controller off and on.

    Example: de3 loadtest ramp --texts dev.tsv --label-names negative,positive
    """
    from rich.table import Table

    from loadtest.ramp import ramp as run_ramp

    samples = _samples(texts, text_column, label_column, label_names)
    options = [] if min_accuracy is None else ["--min-accuracy", f"{min_accuracy:g}"]
    found = run_ramp(store, model, samples, slo_p99_ms, options, out, port)
    keys = ("offered_per_s", "answered", "within_slo", "p50_ms", "p99_ms", "accuracy", "tau")
    table = Table("controller", "phase", *keys)
    for name, one in found["runs"].items():
        for phase, row in one["phases"].items():
            table.add_row(name, phase, *(str(row[key]) for key in keys))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for name, one in found["runs"].items():
        console.print(
            f"controller {name}: p99 within the objective {one['recovery_s']:g} s after the overload"
        )
    console.print(f"results and plot: {out}")


@app.command()
def fuzz(
    url: Annotated[str, typer.Argument(help="The server, for example http://127.0.0.1:8000")],
    requests: Annotated[int, typer.Option(help="How many requests.", min=1)] = 10_000,
    seed: Annotated[int, typer.Option(help="Another seed, other requests.")] = 1,
) -> None:
    """Send requests that no client should send; fails if one brings anything but a clear answer.

    Every answer must be HTTP, below 500 or an honest 503, with errors of the documented shape; and the server
    must still answer as it did before. Send it to a server of your own only.
    """
    from rich.progress import Progress

    from loadtest import fuzz as fuzzing

    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=requests)
        found = fuzzing.fuzz(url, requests, seed, lambda done: progress.update(task, completed=done))
    print(", ".join(f"{status}: {count}" for status, count in sorted(found.statuses.items())))
    for what, request in found.problems:
        print(f"{what}\n    {request[:500]!r}")
    if found.problems:
        raise typer.Exit(1)


@app.command()
def soak(
    texts: Texts,
    store: Annotated[Path, typer.Option(help="Our model store.")] = Path("models"),
    model: Annotated[str, typer.Option(help="Our model, without a version.")] = "sst2",
    minutes: Annotated[float, typer.Option(help="How long.", min=0.1)] = 60.0,
    reload_s: Annotated[float, typer.Option(help="Seconds between two reloads.", min=1)] = 60.0,
    text_column: TextColumn = "sentence",
    port: Annotated[int, typer.Option(help="Port to start the server on.")] = 8100,
    out: Annotated[Path, typer.Option(help="Folder for soak.json and soak.png.")] = Path("loadtest-results"),
) -> None:
    """Start our server and ask it everything at once for an hour, reloading its model now and then.

    Single texts, lists, long ones, budgets, nonsense, clients that hang up or read slowly. Fails if an answer
    is wrong, missing or changes, or if the memory grows by more than 5% from the second quarter to the last.
    """
    import secrets

    from rich.progress import Progress

    from loadtest import soak as soaking

    soaking.check_plots()
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

        def show(passed: float, found: soaking.Soak) -> None:
            progress.update(task, completed=passed)

        found = soaking.soak(started.target.url, samples, 60 * minutes, model, key, reload_s, show)
    soaking.report(found, out)
    for name, count in sorted(found.counts.items()):
        print(f"{count:>9,}  {name}")
    memory = [mb for _, mb in found.memory]
    print(f"{found.reloads} reloads; memory {min(memory):.0f} to {max(memory):.0f} MB")
    print(f"from the second quarter to the last it grew by {found.growth_mb():+.1f} MB")
    for problem in found.problems:
        print(problem)
    if found.problems or found.growth_mb() > 0.05 * max(memory):
        raise typer.Exit(1)


@app.command()
def capacity(
    texts: Texts,
    wanted: Annotated[float, typer.Option(help="Requests per second that you need in all.", min=1)] = 1000.0,
    slo_p99_ms: Annotated[float, typer.Option(help="The latency objective.", min=1)] = 50.0,
    store: Annotated[Path, typer.Option(help="Our model store.")] = Path("models"),
    model: Annotated[str, typer.Option(help="Our model, name or name:version.")] = "sst2",
    text_column: TextColumn = "sentence",
    seconds: Seconds = 8.0,
    port: Annotated[int, typer.Option(help="Port to start the server on.")] = 8100,
    out: Annotated[Path, typer.Option(help="Folder for the server's log.")] = Path("loadtest-results"),
) -> None:
    """Find the highest rate within an objective on this machine, and what that means for Kubernetes and Ray.

    The load generator shares this machine's cores, so the true capacity is somewhat higher.
    """
    from loadtest import capacity as measure
    from loadtest.servers import ours, running
    from server.settings import available_cores

    out.mkdir(parents=True, exist_ok=True)
    samples = _samples(texts, text_column, "label", "")

    def show(step: measure.Step) -> None:
        kept = "kept" if step.keeps(slo_p99_ms) else "not kept"
        console.print(
            f"{step.rate:.0f}/s: p99 {step.p99_ms:.1f} ms, {step.unanswered:.1%} unanswered: {kept}"
        )

    with running(ours(store, model), port, out / "server.log") as started:
        rate = measure.capacity(started.target, samples, slo_p99_ms, seconds, show)
    if rate == 0:
        raise ValueError(f"no rate is within {slo_p99_ms:g} ms here; allow more, or take a faster machine")
    print("\n".join(measure.advice(rate, slo_p99_ms, wanted, available_cores())))


@app.command()
def faults(
    texts: Texts,
    store: Annotated[Path, typer.Option(help="Our model store.")] = Path("models"),
    model: Annotated[str, typer.Option(help="Our model, without a version.")] = "sst2",
    only: Annotated[list[str] | None, typer.Option(help="A fault's name; repeat for more.")] = None,
    text_column: TextColumn = "sentence",
    port: Annotated[int, typer.Option(help="Port to start servers on.")] = 8100,
    out: Annotated[Path, typer.Option(help="Folder for faults.json.")] = Path("loadtest-results"),
) -> None:
    """Make trouble for servers of our own, and count what was accepted and lost: nothing may be.

    SIGTERM, SIGKILL, a full disk, clients that hang up or do not read, slow heads, overload, a jumping clock.
    """
    from dataclasses import asdict

    from loadtest import faults as trouble

    out.mkdir(parents=True, exist_ok=True)
    ground = trouble.Ground(store, model, _samples(texts, text_column, "label", ""), port, out)

    def show(row: trouble.Row) -> None:
        lost = "not tried" if row.lost is None else f"lost {row.lost}"
        print(f"{row.fault}\n    {row.happened}\n    {lost}", flush=True)

    rows = trouble.faults(ground, only or [], show)
    (out / "faults.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if any(row.lost for row in rows):
        raise typer.Exit(1)


@app.command()
def attack(
    store: Annotated[Path, typer.Option(help="Our model store.")] = Path("models"),
    model: Annotated[str, typer.Option(help="Our model, name or name:version.")] = "sst2",
    only: Annotated[list[str] | None, typer.Option(help="An attack's name; repeat for more.")] = None,
    seconds: Annotated[float, typer.Option(help="Length of one attack.", min=0.5)] = 20.0,
    connections: Annotated[
        int | None,
        typer.Option(
            help="Connections of each attack. [default: the attack's, 4 to 1,200]", min=1, show_default=False
        ),
    ] = None,
    memory_wait_s: Annotated[
        float, typer.Option(help="Longest wait for the server's memory to be back.", min=0)
    ] = 60.0,
    port: Annotated[int, typer.Option(help="Port to start servers on.")] = 8100,
    out: Annotated[Path, typer.Option(help="Folder for attacks.json.")] = Path("loadtest-results"),
) -> None:
    """Attack servers of our own, and see that an innocent client is served meanwhile.

    Each attack is on a server that it starts itself, with 1 GiB of memory and 1,024 open files. It comes from
    127.0.0.2 to 127.0.0.9, from a process at nice 19; the innocent client, at 127.0.0.1, asks 20 times a
    second. A row fails if the server dies or keeps the memory, or if the innocent client is refused, gets no
    answer, or waits: p99 above 50 ms and above 5 times that before the attack.

    There is no URL to give: attack servers of your own only.

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
    store: Annotated[Path, typer.Option(help="Our model store.")] = Path("models"),
    model: Annotated[str, typer.Option(help="An int8 model, name or name:version.")] = "sst2",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here.", show_default=False)
    ] = None,
) -> None:
    """Time one encoder layer in this process: ONNX Runtime, our kernels, and the processor's peak.

    Example: de3 loadtest layers --model sst2
    """
    from rich.table import Table

    from loadtest.layers import layers as measure
    from model_store.store import Store

    with console.status("measuring"):
        found = measure(Store(store).open(model))
    table = Table(
        "tokens",
        "ONNX Runtime, µs",
        "kernels, µs",
        "ratio",
        "ONNX Runtime, % of peak",
        "kernels, % of peak",
        title=f"peak of a core ({found['instructions']}): "
        f"{found['peak_multiply_adds_per_s'] / 1e12:.2f}e12 int8 multiply-adds a second",
    )
    for row in found["layers"]:
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
        json_file.write_text(json.dumps(found, indent=1) + "\n")


@app.command()
def peer(
    name: Annotated[
        str,
        typer.Argument(
            help="fused_app, litserve_app, bentoml_app, mlserver_app, transformers_app or infinity_app"
        ),
    ],
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed on; see --help of the peer.")] = None,
) -> None:
    """Start one of the servers that ours is compared with; its environment is made on first use.

    Example: de3 loadtest peer fused_app -- full-depth-int8 --port 8100
    """
    from loadtest.servers import PEERS, peer_command

    known = sorted(p.stem for p in PEERS.glob("*_app.py"))
    if name not in known:
        raise ValueError(f"no peer {name!r}; there are {', '.join(known)}")
    command = [*peer_command(name), *(arguments or [])]
    os.execv(command[0], command)


@app.command()
def compare(
    texts: Texts,
    store: Annotated[Path, typer.Option(help="Our model store.")] = Path("models"),
    model: Annotated[str, typer.Option(help="Our model, name or name:version.")] = "sst2",
    stock: Annotated[
        Path | None,
        typer.Option(
            help="A stock sequence classification model of the same encoder, for peers that know no other "
            "(transformers, Infinity). [default: leave these out]",
            show_default=False,
        ),
    ] = None,
    text_column: TextColumn = "sentence",
    label_column: LabelColumn = "label",
    label_names: LabelNames = "",
    seconds: Seconds = 6.0,
    rounds: Annotated[int, typer.Option(help="Repetitions; the servers take turns.", min=1)] = 3,
    port: Annotated[int, typer.Option(help="Port to start servers on.")] = 8100,
    out: Annotated[Path, typer.Option(help="Folder for results.json and plots.")] = Path("loadtest-results"),
) -> None:
    """Run ours and its peers in turn on this machine, and print the ratios.

    Example: de3 loadtest compare --texts dev.tsv --label-names negative,positive
    """
    from rich.table import Table

    from export.full_depth import export_full_depth
    from loadtest.compare import Comparison
    from loadtest.servers import ours, peers
    from model_store.store import Store

    artifact = Store(store).open(model)
    graphs = {}
    for quantize in ("int8", "none"):
        graphs[quantize] = out / f"full-depth-{artifact.full_name.replace(':', '-')}-{quantize}"
        if not graphs[quantize].exists():
            export_full_depth(artifact.path, graphs[quantize], quantize == "int8")
    servers = [ours(store, model), ours(store, model, tau=0.0)]
    servers += [ours(store, model, "onnxruntime"), ours(store, model, "onnxruntime", tau=0.0)]
    servers += peers(graphs["int8"], graphs["none"], stock)
    comparison = Comparison(
        servers, _samples(texts, text_column, label_column, label_names), out, seconds, rounds, port
    )
    results = comparison.all(lambda tau: ours(store, model, tau=tau))
    ratios = Table("ratio", "median (range)")
    for name, value in results["ratios"].items():
        ratios.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 120).print(ratios)
    console.print(f"results and plots: {out}")
