"""The cost of an exit relative to its encoder layer: of the classifier, and additionally of the prototypical network.

Layers 1 to M − 1 of a model run one after the other, alternately without and with their exits, and likewise in a copy
of the model without prototypical networks. Differences are taken within one copy, because the times of two copies of
the same weights can differ by more than the cost of an exit, merely because of their place in memory. Times are CPU
times of the thread, which on an idle core equal wall time.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.manifest import Manifest
from de3.model_store.model import Model, exit_graph, exit_network_of, exit_weights
from de3.model_store.segments import NativeExits, OnnxExits, Tokens, session_options
from de3.model_store.store import Artifact
from de3.native import network
from lab.layers import weights_of

LENGTHS = (8, 32, 128, 512)
PAIRS, MOST_PAIRS = 6, 6000
ALONE = 0.1  # time spent on measuring the embeddings, as a share of the time spent on the layers
PAPER = 1.2 / 1813.5  # MFLOPs of a prototypical network / MFLOPs of a layer of BERT-base
Floats = NDArray[np.float64]
Run = Callable[[bool], float]  # seconds, with exits or without


def without_prototypes(artifact: Artifact, runtime: str) -> Model:
    """A model whose exits give logits only, as export builds exits without prototypes."""
    model = Model(artifact, runtime)
    manifest = artifact.manifest.model_copy(update={"prototype_layers": []})
    weights = {
        layer: {name: array for name, array in read.items() if not name.startswith("space.")}
        for layer, read in exit_weights(artifact).items()
    }
    if model.runtime == "native":
        built = network.build_exits(exit_network_of(manifest, weights, {}))
        model.exits = NativeExits(network.kernels(), built, manifest, model.pooling)
    else:
        sessions = {
            layer: InferenceSession(exit_graph(manifest, layer, read), session_options(manifest.max_tokens))
            for layer, read in weights.items()
        }
        model.exits = OnnxExits(sessions, {}, manifest, model.pooling)
    return model


def embeddings(model: Model, tokens: Tokens) -> Run:
    """A function that times the embeddings, with or without their exit, as the engine runs them."""

    def run(with_exits: bool) -> float:
        one = _pass(model, tokens, with_exits)
        start = thread_time()
        (model.encoder.forward or model.encoder.layer_by_layer)([one], layers=1)
        return thread_time() - start

    return run


def layers(model: Model, tokens: Tokens) -> Run:
    """A function that times layers 1 to M − 1, with or without their exits, as the engine runs them."""
    count = model.manifest.num_layers - 1
    forward = model.encoder.forward or model.encoder.layer_by_layer

    def run(with_exits: bool) -> float:
        one = _pass(model, tokens, with_exits)
        forward([one], layers=1)
        start = thread_time()
        forward([one], layers=count)
        return thread_time() - start

    return run


def _pass(model: Model, tokens: Tokens, with_exits: bool) -> ForwardPass:
    """A pass at τ = 0: no early exit, and exits are computed only if `with_exits`."""
    last = model.manifest.num_layers
    return ForwardPass(tokens, [Decision(model.exits, ExitRule(0.0, Entropy()), last, with_exits)])


def pairs_of(runs: Sequence[Run], seconds: float) -> Floats:
    """Seconds without and with exits, (copies, pairs, 2), alternating between copies for about `seconds`."""
    pairs: list[list[list[float]]] = [[] for _ in runs]
    start = perf_counter()
    while len(pairs[0]) < PAIRS or (perf_counter() - start < seconds and len(pairs[0]) < MOST_PAIRS):
        for run, times in zip(runs, pairs, strict=True):
            run(True)  # load the copy's weights into the caches
            for number in range(PAIRS):
                order = (False, True) if number % 2 else (True, False)
                took = {asked: run(asked) for asked in order}
                times.append([took[False], took[True]])
    return np.array(pairs)


def median_of(values: Floats) -> tuple[float, float]:
    """The median and the half-width of its 95% interval, as if the values were independent and normal."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    # The standard error of a median is 1.2533 times that of a mean; quartiles are 1.349 standard deviations apart.
    return float(middle), 1.96 * 1.2533 * (high - low) / 1.349 / len(values) ** 0.5


def costs_of(runs: Sequence[Run], exits: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Seconds, with the half-width of their 95% interval, by name.

    `all` is a run without exits; `classifier` and `prototypical` are the two parts of one exit.

    runs: those of the model, and of its copy without prototypical networks. exits: number of exits in each run.
    """
    times = pairs_of(runs, seconds)
    whole, classifier = (median_of((copy[:, 1] - copy[:, 0]) / exits) for copy in times)
    prototypical = whole[0] - classifier[0], float(np.hypot(whole[1], classifier[1]))
    return {"all": median_of(times[0, :, 0]), "classifier": classifier, "prototypical": prototypical}


def flops(manifest: Manifest, weights: int, tokens: int) -> dict[str, float]:
    """MFLOPs of a layer, and of a prototypical network with its distances; a multiply-add counts twice.

    weights: number of the layer's weights.
    """
    hidden, metric, labels = manifest.hidden_size, manifest.metric_dim, len(manifest.labels)
    layer = tokens * weights + 2 * tokens * tokens * hidden
    return {
        "layer_mflops": 2e-6 * layer,
        "prototypical_mflops": 2e-6 * (hidden * metric + (labels + 1) * metric),
    }


def overhead(
    artifact: Artifact, lengths: Sequence[int] = LENGTHS, seconds: float = 3.0
) -> list[dict[str, Any]]:
    """Measure the cost of an exit; returns a row for each runtime of the model and each number of tokens.

    A row has the times of a layer, of its classifier (with pooling) and of its prototypical network (with distances).
    `alone_us` is the time of the prototypical network of the embeddings' exit, whose weights stay in the caches.
    Keys that end in `_interval` give the half-width of a 95% interval.

    seconds: duration of a row; the embeddings take a tenth more. Raises ValueError if the embeddings have no
    prototypes, or if none of layers 1 to M − 1 has.
    """
    manifest = artifact.manifest
    between = [layer for layer in manifest.prototype_layers if 0 < layer < manifest.num_layers]
    if not between or 0 not in manifest.prototype_layers:
        raise ValueError(
            f"{artifact.full_name}: has no prototypes on its embeddings or before its last layer"
        )
    weights = weights_of(artifact.read(manifest.segment_files()[1]))
    rows = []
    for runtime in ("native", "onnxruntime") if Model(artifact).runtime == "native" else ("onnxruntime",):
        copies = [Model(artifact, runtime), without_prototypes(artifact, runtime)]
        for length in (n for n in lengths if n <= manifest.max_tokens):
            tokens = copies[0].tokenize("a " * (length - 2))
            costs = costs_of([layers(copy, tokens) for copy in copies], len(between), seconds)
            alone = costs_of([embeddings(copy, tokens) for copy in copies], 1, ALONE * seconds)
            row: dict[str, Any] = {"model": artifact.full_name, "precision": manifest.precision}
            row |= {"layers": manifest.num_layers, "hidden": manifest.hidden_size, "runtime": runtime}
            row["tokens"] = len(tokens)
            row["layer_us"] = 1e6 * costs["all"][0] / (manifest.num_layers - 1)
            for name in ("classifier", "prototypical"):
                row[f"{name}_us"], row[f"{name}_interval"] = (1e6 * x for x in costs[name])
            row["alone_us"] = 1e6 * alone["prototypical"][0]
            rows.append(row | flops(manifest, weights, len(tokens)))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a table; shares are in percent of the layer's time."""
    columns = ["model", "runtime", "tokens", "layer, ms", "classifier, µs", "prototypical, µs", "alone, µs"]
    columns += ["classifier, %", "prototypical, %", "alone, %", "by FLOPs, %"]

    def cells(r: dict[str, Any]) -> list[Any]:
        parts = ("classifier", "prototypical")
        shares = [
            f"{100 * r[f'{part}_us'] / r['layer_us']:.2f} ± {100 * r[f'{part}_interval'] / r['layer_us']:.2f}"
            for part in parts
        ]
        return [
            *(f"{r['model']}, {r['layers']}×{r['hidden']}", f"{r['runtime']}, {r['precision']}", r["tokens"]),
            *(f"{r['layer_us'] / 1000:.3f}", *(f"{r[f'{part}_us']:.1f}" for part in (*parts, "alone"))),
            *(*shares, f"{100 * r['alone_us'] / r['layer_us']:.2f}"),
            f"{100 * r['prototypical_mflops'] / r['layer_mflops']:.3f}",
        ]

    return columns, [cells(r) for r in rows]


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plot a prototypical network's time, in % of its layer's, by number of tokens, for each model and runtime."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    lines: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        lines.setdefault(f"{r['layers']}×{r['hidden']} {r['precision']}, {r['runtime']}", []).append(r)
    for number, (name, line) in enumerate(lines.items()):
        x = [r["tokens"] * (1 + 0.03 * number) for r in line]  # keeps the intervals apart
        shares, halves = (
            [100 * r[f"prototypical_{key}"] / r["layer_us"] for r in line] for key in ("us", "interval")
        )
        axes.errorbar(x, shares, yerr=halves, marker="o", capsize=2, linewidth=1, label=name)
    by_flops = sorted({(r["tokens"], 100 * r["prototypical_mflops"] / r["layer_mflops"]) for r in rows})
    axes.plot(*zip(*by_flops, strict=True), "k--", label="by FLOPs")
    axes.plot([128], [100 * PAPER], "k*", markersize=10, label="the paper's")
    axes.set_xscale("log", base=2)
    axes.set(title="A prototypical network beside its layer", xlabel="tokens", ylabel="time, % of the layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
