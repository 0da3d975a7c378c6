"""Time one encoder layer, or all of them, in ONNX Runtime and in the kernels, and compare with the processor's peak."""

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from de3.model_store.model import Model
from de3.model_store.segments import Layers
from de3.model_store.store import Artifact

LENGTHS = (8, 16, 25, 32, 64, 128, 256, 512)


def layers(
    artifact: Artifact,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = 7,
    instructions: str = "",
    layer: int | None = 1,
) -> dict[str, Any]:
    """Time a layer in both runtimes on one thread, by number of tokens: medians of alternating measurements, µs.

    Keys that end in `_of_peak` give the share of one core's peak rate of int8 multiply-adds with the kernels'
    instruction set. Attention's multiply-adds, in float32, count too, as if every token attended to all. ONNX Runtime
    uses the processor's best instruction set, whatever the kernels use.

    lengths: numbers of tokens, ascending; those above the model's maximum are left out. rounds: number of measurements
    of each runtime. instructions: instruction set that the kernels use from now on; empty: the best. layer: number of
    the layer; None: all layers in one measurement.
    Raises StoreError if the kernels cannot run the model, ValueError if this machine lacks the instruction set.
    """
    models = [Model(artifact, "onnxruntime"), Model(artifact, "native")]
    from de3.native import kernels  # importable, or the line above would have raised

    kernels.use(instructions)
    size = artifact.manifest.hidden_size
    numbers = range(1, artifact.manifest.num_layers + 1) if layer is None else [layer]
    weights = sum(weights_of(artifact.read(artifact.manifest.segment_files()[number])) for number in numbers)
    generator = np.random.default_rng(0)
    peak, rows = kernels.peak(), []
    for tokens in lengths:
        if tokens > artifact.manifest.max_tokens:
            break
        hidden = generator.standard_normal((1, tokens, size), np.float32)
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for model, seconds in zip(models, times, strict=True):
                seconds.append(_time(model.encoder.layers, numbers, hidden))
        onnxruntime_s, kernels_s = map(median, times)
        products = tokens * weights + 2 * tokens * tokens * size * len(numbers)
        rows.append(
            {"tokens": tokens, "onnxruntime_us": onnxruntime_s * 1e6, "kernels_us": kernels_s * 1e6}
            | {"onnxruntime_of_peak": products / onnxruntime_s / peak}
            | {"kernels_of_peak": products / kernels_s / peak}
        )
    return {"instructions": kernels.supported(), "peak_multiply_adds_per_s": peak, "layers": rows}


def weights_of(file: bytes) -> int:
    """Number of weights of a layer without its exit: the multiply-adds per token, without those within attention."""
    import onnx

    graph = onnx.load_model_from_string(file).graph
    used = {name for node in graph.node for name in node.input}
    return sum(int(np.prod(w.dims)) for w in graph.initializer if w.name in used and len(w.dims) == 2)


def _time(layers: Layers, numbers: Sequence[int], hidden: Any, seconds: float = 0.05) -> float:
    """Mean time to run layers one after the other, in seconds, over runs that last `seconds` in all."""

    def run() -> None:
        states = hidden
        for number in numbers:
            states = layers.run(number, states)

    run()
    start, calls = perf_counter(), 0
    while perf_counter() - start < seconds:
        run()
        calls += 1
    return (perf_counter() - start) / calls
