"""de3 loadtest: load tests of a deployment, and a comparison with other servers."""

import os
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from de3.exits.kinds import Classes
from de3.loadtest import options
from de3.loadtest.texts import read, with_long, with_taus

QUICK_TEXTS = 1000
app = typer.Typer(no_args_is_help=True, help="Load tests, and comparisons with other servers.")


@app.command()
def run(
    url: options.Url,
    texts: options.Texts,
    text_column: options.TextColumn = "text",
    label_column: options.LabelColumn = "label",
    label_names: options.LabelNames = "",
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second, with Poisson arrivals (open loop). Default: closed loop."),
    ] = None,
    connections: Annotated[int, typer.Option(help="Connections of a closed loop.", min=1, max=500)] = 16,
    seconds: options.Seconds = 10.0,
    tau: Annotated[
        list[float] | None,
        typer.Option(
            help="τ of the requests; repeat for a mix. Default: the server's default.", min=0, max=1
        ),
    ] = None,
    long_share: Annotated[float, typer.Option(help="Share of long texts.", min=0, max=1)] = 0.0,
    json_file: options.Json = None,
) -> None:
    """Load a running server and report latency, throughput, errors and accuracy.

    The environment variable DE3_API_KEY has the API key, if the server needs one.
    Every label is compared with the label that the same text gets when it is sent alone.

    Example: de3 loadtest run http://127.0.0.1:8000 --texts traffic.txt --rate 300
    """
    from rich.progress import Progress

    from de3.loadtest import report
    from de3.loadtest.client import Target, ask_alone, send_traffic, wrong_labels

    samples = with_long(read(texts, text_column, label_column, label_names), long_share)
    samples = with_taus(samples, tau or [])
    target = Target(url, key=os.environ.get("DE3_API_KEY", ""))
    try:
        alone = ask_alone(target, samples)
        with Progress(console=report.console, transient=True) as progress:
            task = progress.add_task("sending requests", total=seconds)

            def show(elapsed: float) -> None:
                progress.update(task, completed=elapsed)

            result = send_traffic(target, samples, seconds, rate, connections, progress=show)
    except OSError as error:
        raise ValueError(f"{url}: {error}; is the server running?") from None
    row = report.summary(result, wrong_labels(result, alone))
    report.show(report.table({url: row}))
    if json_file:
        report.write_json(json_file, row)
    if not result.ok():
        raise ValueError(f"{url}: no request was answered with status 200")


@app.command()
def ramp(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: options.Model = "sst2",
    text_column: options.TextColumn = "text",
    label_column: options.LabelColumn = "label",
    label_names: options.LabelNames = "",
    slo_p99_ms: options.SloP99 = 50.0,
    out: Annotated[Path, typer.Option(help="Folder for ramp.json and ramp.png.")] = Path("loadtest-results"),
) -> None:
    """Ramp the request rate up to twice the capacity and back down, with the server's load controller off and on.

    Example: de3 loadtest ramp --texts dev.tsv --text-column sentence --label-names negative,positive
    """
    from rich.table import Table

    from de3.loadtest.ramp import ramp as run_ramp
    from de3.loadtest.report import console, show

    samples = read(texts, text_column, label_column, label_names)
    results = run_ramp(store, model, samples, slo_p99_ms, out)
    keys = ("offered_per_s", "answered", "within_slo", "p50_ms", "p99_ms", "accuracy", "tau")
    table = Table("controller", "phase", *keys)
    for name, result in results["runs"].items():
        for phase, row in result["phases"].items():
            table.add_row(name, phase, *(str(row[key]) for key in keys))
    show(table, 140)
    for name, result in results["runs"].items():
        recovery_s = result["recovery_s"]
        console.print(f"controller {name}: p99 meets the objective {recovery_s:g} s after the overload")
    console.print(f"results and plot: {out}")


@app.command()
def capacity(
    texts: options.Texts,
    wanted: Annotated[float, typer.Option(help="Total requests per second that you need.", min=1)] = 1000.0,
    slo_p99_ms: options.SloP99 = 50.0,
    store: options.Store = Path("models"),
    model: options.Model = "sst2",
    text_column: options.TextColumn = "text",
    seconds: options.Seconds = 8.0,
) -> None:
    """Find the highest request rate within a latency objective on this machine; print settings for Kubernetes and Ray.

    The load generator shares the machine's cores, so the true capacity is somewhat higher.

    Example: de3 loadtest capacity --texts traffic.txt --slo-p99-ms 50 --wanted 1000
    """
    from de3.loadtest import capacity as search
    from de3.loadtest.report import console
    from de3.loadtest.servers import free_port, ours, running
    from de3.runtime.cores import available_cores

    samples = read(texts, text_column)

    def show(step: search.Step) -> None:
        verdict = "met" if step.keeps(slo_p99_ms) else "missed"
        console.print(
            f"{step.rate:.0f}/s: p99 {step.p99_ms:.1f} ms, {step.unanswered:.1%} unanswered: {verdict}"
        )

    with (
        TemporaryDirectory() as folder,
        running(ours(store, model), free_port(), Path(folder) / "log") as started,
    ):
        rate = search.capacity(started.target, samples, slo_p99_ms, seconds, show)
    if rate == 0:
        raise ValueError(
            f"no rate has a p99 within {slo_p99_ms:g} ms here: raise --slo-p99-ms or use a faster machine"
        )
    print("\n".join(search.advice(rate, slo_p99_ms, wanted, available_cores())))


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
    from de3.loadtest.servers import PEERS, peer_command

    names = sorted(p.stem for p in PEERS.glob("*_app.py"))
    if name not in names:
        raise ValueError(f"no peer {name!r}; available: {', '.join(names)}")
    command = [*peer_command(name), *(arguments or [])]
    os.execv(command[0], command)


@app.command()
def compare(
    texts: options.Texts,
    store: options.Store = Path("models"),
    model: Annotated[
        str, typer.Option(help="Model in the store, or the folder or hub id of a Hugging Face classifier.")
    ] = "sst2",
    stock: options.Stock = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="A peer, such as fused_app; repeat for more. Default: all.")
    ] = None,
    tau: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="A τ besides the default and 0; repeat for more.")
    ] = None,
    text_column: options.TextColumn = "text",
    label_column: options.LabelColumn = "label",
    label_names: options.LabelNames = "",
    seconds: options.Seconds = 6.0,
    rounds: options.Rounds = 3,
    out: Annotated[Path, typer.Option(help="Folder for results.json and plots.")] = Path("loadtest-results"),
) -> None:
    """Compare the speed of our server and its peers on this machine, in turn.

    Answers that differ from full depth are counted, and listed in results.json. With --rounds 1, only throughput is
    compared, with at most 1,000 texts, and not with ONNX Runtime in our server.

    Example: de3 loadtest compare --model my-org/my-classifier --texts traffic.txt --peer fused_app --rounds 1
    """
    from statistics import median

    from rich.table import Table

    from de3.library import artifact_of
    from de3.loadtest.compare import Comparison
    from de3.loadtest.report import console, show
    from de3.loadtest.servers import ours, peer_models, peers
    from de3.progress import duration

    samples = read(texts, text_column, label_column, label_names)
    if rounds == 1:
        samples = samples[:: -(-len(samples) // QUICK_TEXTS)]
    artifact = artifact_of(model, store)
    has_exits = len(artifact.manifest.exit_layers) > 1
    if tau and not has_exits:
        raise ValueError(f"--tau: {model} has no exits; all its answers come from full depth")
    console.print("exporting the full-depth graphs of the peers")
    models = peer_models(artifact, [s.text for s in samples], out)
    others = peers(*models, stock)
    if unknown := set(peer or []) - {server.script for server in others}:
        known = sorted({server.script for server in others})
        raise ValueError(f"--peer {min(unknown)}: available: {', '.join(known)}; some need --stock")
    variants: list[dict[str, Any]] = [{}, {"tau": 0.0}] if has_exits else [{"tau": 0.0}]
    servers = [ours(store, model, **fields) for fields in variants]
    full_depth = servers[-1].name if isinstance(artifact.manifest.kind, Classes) else ""
    servers += [ours(store, model, tau=value) for value in tau or ()]
    if rounds > 1:
        servers += [ours(store, model, "onnxruntime", **fields) for fields in variants]
    servers += [server for server in others if not peer or server.script in peer]
    comparison = Comparison(servers, samples, out, seconds, rounds, full_depth=full_depth)
    about = duration(comparison.expected_s())
    console.print(f"{len(servers)} servers in turn: about {about}, longer for a large model")
    results = comparison.all((lambda tau: ours(store, model, tau=tau)) if has_exits else None)
    ratios, best = results["ratios"], results["fastest_peer"]
    speeds = Table(
        "server", "requests/s", f"× {best}", f"answers that differ from {full_depth or 'full depth'}"
    )
    for name, rows in results["saturation"].items():
        rate = median(row["answers_per_s"] for row in rows)
        differ = results["differ"][name]
        share = f"{differ['share']:.1%} ({differ['count']} of {differ['of']})" if differ else "–"
        speeds.add_row(name, f"{rate:.0f}", ratios.pop(f"throughput, {name} / {best}", ""), share)
    show(speeds)
    rest = Table("ratio", "median (range)")
    for name, value in ratios.items():
        rest.add_row(name, value)
    show(rest)
    for name, note in results["notes"].items():
        print(f"{name}: {note}")
    if not has_exits:
        named = shlex.quote(model)
        print(
            f"{model} has no exits: it gains from the kernels only. To add exits, continue with\n"
            f"  de3 import {named} --texts FILE --name NAME       (500 or more texts, not those compared here)\n"
            f"  de3 serve {named} --learn --guarantee 0.02        (from live traffic)"
        )
    console.print(f"results and plots: {out}")
