"""python -m lab: what we run to prove claims about speed and safety."""

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from de3.loadtest import options
from de3.loadtest.cli import models_of_peers, read_samples
from lab.audit_cli import app as audit_app
from lab.studies.cli import app as studies_app

EXPERIMENTS = (
    "ablations",
    "cells",
    "dimension",
    "drift",
    "factorial",
    "joined",
    "prototypes",
    "recipes",
    "regression",
    "risk_features",
    "shift",
    "signals",
    "space",
    "stock",
    "sweep",
)
app = typer.Typer(no_args_is_help=True, help="Measurements, attacks and studies behind the documentation.")
app.add_typer(studies_app, name="study")
app.add_typer(audit_app, name="audit")
console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


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

    from lab import soak as soak_test

    soak_test.check_plots()
    from de3.loadtest.servers import ours, running

    key = secrets.token_hex(16)
    samples = read_samples(texts, text_column, "label", "")
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

    SIGTERM, SIGKILL, a full disk, clients that hang up or do not read, slow heads, overload, a jumping clock.
    """
    from dataclasses import asdict

    from lab import faults as injection

    out.mkdir(parents=True, exist_ok=True)
    testbed = injection.Testbed(store, model, read_samples(texts, text_column, "label", ""), port, out)

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
    from lab import resilience

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

    from de3.model_store.store import Store
    from lab.layers import layers as measure

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
    from de3.loadtest.servers import lean_peers
    from de3.model_store.store import Store
    from lab.engines import Engines, tables

    artifact = Store(store).open(model)
    plain = [s.text for s in read_samples(texts, text_column, "label", "")][:count]
    peers = lean_peers(*models_of_peers(artifact, plain, out), stock)

    def show(line: str) -> None:
        console.print(line, markup=False)

    results = Engines(artifact, peers, plain, out, seconds, rounds, core, show).run()
    for table in tables(results):
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    for name, note in results["notes"].items():
        console.print(f"{name}: {note}", markup=False)
    console.print(f"results: {out / 'results.json'}")


def _add_script(to: typer.Typer, name: str, module: str) -> None:
    """Add a command that runs a module of the laboratory, which parses its own arguments."""

    def script(context: typer.Context) -> None:
        sys.argv = [str(_source(module)), *context.args]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    # As imports would take seconds, the help comes from the text of the module.
    summary = (ast.get_docstring(ast.parse(_source(module).read_text())) or "").partition("\n")[0]
    to.command(name, help=summary, context_settings=settings)(script)


def _source(module: str) -> Path:
    return Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"


experiments = typer.Typer(no_args_is_help=True, help="The experiments of lab/docs/experiments.md.")
for each in EXPERIMENTS:
    _add_script(experiments, each, f"lab.experiments.{each}")
app.add_typer(experiments, name="experiment")
_add_script(app, "ray", "lab.ray")
_add_script(app, "untrained", "lab.studies.untrained")
