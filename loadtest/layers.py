"""Time of one encoder layer, in process, by ONNX Runtime and by the kernels, against the processor's peak."""

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from model_store.model import Model
from model_store.segments import Segment
from model_store.store import Artifact

LENGTHS = (8, 16, 25, 32, 64, 128, 256, 512)


def layers(artifact: Artifact, lengths: Sequence[int] = LENGTHS, rounds: int = 7) -> dict[str, Any]:
    """Microseconds of layer 1 by number of tokens, on one thread; medians, the two taking turns.

    `_of_peak` is the share of the multiply-adds that one core could do; attention's, in float32, count too.

    Raises StoreError where the kernels cannot run the model.
    """
    models = [Model(artifact, "onnxruntime"), Model(artifact, "native")]
    from native import kernels  # there, or the line above would have failed

    size = artifact.manifest.hidden_size
    weights = _weights(artifact.read(artifact.manifest.segment_files()[1]))
    generator = np.random.default_rng(0)
    peak, rows = kernels.peak(), []
    for tokens in lengths:
        if tokens > artifact.manifest.max_tokens:
            break
        hidden = generator.standard_normal((1, tokens, size), np.float32)
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for model, found in zip(models, times, strict=True):
                found.append(_time(model.segments[1], hidden))
        theirs, ours = (median(found) for found in times)
        products = tokens * weights + 2 * tokens * tokens * size
        rows.append(
            {"tokens": tokens, "onnxruntime_us": theirs * 1e6, "kernels_us": ours * 1e6}
            | {"onnxruntime_of_peak": products / theirs / peak, "kernels_of_peak": products / ours / peak}
        )
    return {"instructions": kernels.supported(), "peak_multiply_adds_per_s": peak, "layers": rows}


def _weights(file: bytes) -> int:
    """Weights of a layer without its exit: the multiply-adds of a token, but for attention's scores."""
    import onnx

    graph = onnx.load_model_from_string(file).graph
    used = {name for node in graph.node for name in node.input}
    return sum(int(np.prod(w.dims)) for w in graph.initializer if w.name in used and len(w.dims) == 2)


def _time(segment: Segment, hidden: Any, seconds: float = 0.05) -> float:
    """Mean seconds of a call."""
    segment.run(hidden, False)
    start, calls = perf_counter(), 0
    while perf_counter() - start < seconds:
        segment.run(hidden, False)
        calls += 1
    return (perf_counter() - start) / calls
