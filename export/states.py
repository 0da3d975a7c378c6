"""The pooled hidden states of a stock classifier, to which its exits are fitted.

They are computed once, with the segments used in serving, and saved in chunks, so an interrupted run can resume.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from os import cpu_count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from de3.exits.rule import Thresholds
from de3.export.weights import save
from de3.model_store.families.encoder import Weights
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.tables import Text, pair_of
from de3.training.progress import console, track

CHUNK = 1024  # texts
POOLINGS = ("mean", "cls")
Array = NDArray[np.float32]


@dataclass(frozen=True)
class States:
    """Pooled states and logits of a classifier for n texts.

    Attributes:
        chunks: safetensors files with the tensors POOLING_LAYER, the pooled states of each layer but the last, (texts,
            hidden); logits, (texts, K); and rows, the indices of the texts.
        logits: logits at full depth, (n, K).
        thresholds, tolerance: as in exits.recorded.Recorded.
        rows: indices of the n texts among those in the chunks, (n,); None if they are all of them.
    """

    chunks: list[Path]
    logits: Array
    thresholds: NDArray[np.float64] | None
    tolerance: float | None
    rows: NDArray[np.int64] | None = None

    def part(self, rows: NDArray[np.int64]) -> "States":
        """The states of the texts at these rows."""
        return replace(self, logits=self.logits[rows], rows=rows if self.rows is None else self.rows[rows])

    def pooled(self, pooling: str, layer: int) -> Array:
        """The pooled states of a layer, (n, hidden)."""
        values = _gathered(self.chunks, f"{pooling}_{layer:02}")
        return values if self.rows is None else values[self.rows]

    @property
    def answers(self) -> NDArray[np.generic]:
        """Answers at full depth: classes or values, (n,), or the assigned labels, (n, K) bool."""
        if self.tolerance is not None:
            return self.logits[:, 0].astype(np.float64)
        return self.logits.argmax(-1) if self.thresholds is None else self.logits > self.thresholds

    @property
    def probabilities(self) -> Array:
        """Probabilities at full depth, (n, K)."""
        if self.thresholds is not None:
            return sigmoid(self.logits)
        odds = np.exp(self.logits - self.logits.max(-1, keepdims=True))
        return np.asarray(odds / odds.sum(-1, keepdims=True), np.float32)


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(−x)), in a form that never overflows."""
    return np.asarray(0.5 * (1 + np.tanh(logits / 2)), np.float32)


def states(
    model: Model,
    norm: Weights,
    texts: Sequence[Text],
    folder: Path,
    what: str,
    thresholds: Sequence[float] | None,
    tolerance: float | None,
    poolings: Sequence[str] = POOLINGS,
) -> States:
    """Run texts through a classifier without early exits, in parallel on all cores; returns pooled states and logits.

    norm: the norm between a layer's states and its exit, as `build.final_norm` gives it. what: name of the texts,
    for messages and file names. thresholds: label thresholds of a multi-label model, as probabilities. tolerance: of a
    regression model, see exits.recorded.Recorded. poolings: the poolings of the states to keep; if empty, only the
    logits are kept. Chunks in `folder` from an earlier run with the same model and texts are reused.
    """
    tokens = [model.tokenize(*pair_of(text)) for text in texts]
    files = {name: entry.sha256 for name, entry in model.manifest.files.items()}
    digest = hashlib.sha256(
        repr((model.full_runtime, sorted(files.items()), poolings, CHUNK, version("de3"))).encode()
    )
    for one in tokens:
        digest.update(one.ids.tobytes() + one.type_ids.tobytes())
    cache = folder / f"{what}-{digest.hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    chunks = {cache / f"{i:05}.safetensors": order[i : i + CHUNK] for i in range(0, len(order), CHUNK)}
    missing = [(file, rows) for file, rows in chunks.items() if not _is_whole(file)]
    if done := len(chunks) - len(missing):
        console.print(f"{what}: {done} of {len(chunks)} chunks are reused from an earlier run")
    for file, rows in track(missing, f"Running the model on {len(order)} {what} texts"):
        tensors = run(model, norm, [tokens[i] for i in rows], poolings)
        save({"rows": np.array(rows), **tensors}, new := file.with_suffix(".new"))
        new.replace(file)
    logits = _gathered(list(chunks), "logits")
    limits = None if thresholds is None else np.array(Thresholds.of(thresholds).logits)
    return States(list(chunks), logits, limits, tolerance)


def run(
    model: Model, norm: Weights, tokens: Sequence[Tokens], poolings: Sequence[str]
) -> dict[str, NDArray[np.generic]]:
    """Compute the tensors of a chunk, except rows: pooled states in float16, and logits."""
    layers = range(model.manifest.num_layers)
    pooled = {
        f"{pooling}_{layer:02}": np.zeros((len(tokens), model.manifest.hidden_size), np.float16)
        for pooling in poolings
        for layer in layers
    }
    logits = np.zeros((len(tokens), len(model.manifest.labels)), np.float32)
    epsilon = model.manifest.encoder.epsilon

    def one(i: int) -> None:
        step = model.segments[0].embed(tokens[i], False)
        for layer in layers:
            if poolings:
                seen = _normalized(step.hidden[0], norm, epsilon)
                for pooling in poolings:
                    pooled[f"{pooling}_{layer:02}"][i] = seen[0] if pooling == "cls" else seen.mean(0)
            step = model.segments[layer + 1].run(step.hidden, layer + 1 == len(layers))
        assert step.logits is not None  # the last layer has the classifier
        logits[i] = step.logits

    with ThreadPoolExecutor(cpu_count()) as pool:
        list(pool.map(one, range(len(tokens))))
    return {**pooled, "logits": logits}


def _normalized(hidden: Array, norm: Weights, epsilon: float) -> Array:
    """Hidden states (tokens, hidden) after the layer norm, if there is one."""
    if not norm:
        return hidden
    centred = hidden - hidden.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return np.asarray(centred / spread * norm["final_norm.weight"] + norm["final_norm.bias"], np.float32)


def _gathered(chunks: Sequence[Path], name: str) -> Array:
    """One tensor, joined from all chunks, in float32 and in the order of the texts."""
    parts = []
    for chunk in chunks:
        with safe_open(chunk, "numpy") as file:
            parts.append((file.get_tensor("rows"), file.get_tensor(name)))
    rows, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    result = np.empty(values.shape, np.float32)
    result[rows] = values
    return result


def _is_whole(file: Path) -> bool:
    """True if a chunk exists and is complete."""
    try:
        with safe_open(file, "numpy") as opened:
            return bool(opened.keys())
    except (OSError, SafetensorError):
        return False
