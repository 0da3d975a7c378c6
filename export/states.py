"""Runs texts through a classifier at full depth, for the pooled states and the answers to which exits are fitted.

The segments used in serving compute them once; they are saved in chunks, so an interrupted run can resume.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from os import cpu_count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from de3.data.tables import TextOrPair, pair_of
from de3.export.weights import save
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.progress import console, track

CHUNK = 1024  # texts
POOLINGS = ("mean", "cls")
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Computed:
    """States and logits of texts, in safetensors files.

    Attributes:
        chunks: files with the tensors POOLING_LAYER, the pooled states of each layer, (texts, hidden);
            logits, (texts, K); and rows, the indices of the texts.
    """

    chunks: list[Path]

    def states(self, pooling: str, layer: int) -> Array:
        """The pooled states of all texts after a layer, (n, hidden)."""
        return self._gathered(f"{pooling}_{layer:02}")

    @property
    def logits(self) -> Array:
        """The logits of all texts at full depth, (n, K)."""
        return self._gathered("logits")

    def _gathered(self, name: str) -> Array:
        """One tensor, joined from all chunks, in float32 and in the order of the texts."""
        parts = []
        for chunk in self.chunks:
            with safe_open(chunk, "numpy") as file:
                parts.append((file.get_tensor("rows"), file.get_tensor(name)))
        rows, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        result = np.empty(values.shape, np.float32)
        result[rows] = values
        return result


@dataclass(frozen=True)
class TokenStates:
    """States and answers of n tokens of a token classifier.

    Attributes:
        states: after each layer but the last, (num_layers, n, hidden) float16.
        logits: at full depth, (n, K).
        texts: index of each token's text, (n,).
    """

    states: NDArray[np.float16]
    logits: Array
    texts: NDArray[np.int64]


def compute(
    model: Model, texts: Sequence[TextOrPair], folder: Path, what: str, poolings: Sequence[str] = POOLINGS
) -> Computed:
    """Run texts through a classifier without early exits, in parallel on all cores.

    what: name of the texts, for messages and file names. poolings: the poolings of the states to keep; if empty, only
    the logits are kept. Chunks in `folder` from an earlier run with the same model and texts are reused.

    Raises ValueError for states that are too large for float16, or not numbers.
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
        tensors = _run(model, [tokens[i] for i in rows], poolings)
        save({"rows": np.array(rows), **tensors}, new := file.with_suffix(".new"))
        new.replace(file)
    return Computed(list(chunks))


def of_tokens(model: Model, texts: Sequence[Tokens], most: int, seed: int, what: str) -> TokenStates:
    """Run texts through a token classifier at full depth, for the states and the answers of some of their tokens.

    most: about as many tokens, drawn at random from all texts. Special tokens are left out. Raises ValueError as
    `compute` does.
    """
    rng, layers = np.random.default_rng(seed), model.manifest.num_layers
    lengths = [0 if one.layout is None else int((~one.layout.is_special).sum()) for one in texts]
    share = min(1.0, most / max(1, sum(lengths)))
    drawn = [np.flatnonzero(rng.random(length) < share) for length in lengths]
    ends = np.cumsum([len(rows) for rows in drawn])
    states = np.empty((layers, ends[-1], model.manifest.hidden_size), np.float16)
    logits = np.empty((ends[-1], len(model.manifest.labels)), np.float32)

    def one(i: int) -> None:
        layout, place = texts[i].layout, slice(ends[i] - len(drawn[i]), ends[i])
        if layout is None or not len(drawn[i]):
            return
        rows, steps = np.flatnonzero(~layout.is_special)[drawn[i]], model.full_depth(texts[i])
        logits[place] = steps[-1].logits[rows]  # type: ignore[index]  # the last layer has an exit
        for layer in range(layers):
            with np.errstate(over="ignore"):  # of float16; the result is infinite
                states[layer, place] = model.pooling.normalized(steps[layer].hidden)[rows]

    with ThreadPoolExecutor(cpu_count()) as pool:
        done = pool.map(one, range(len(texts)))
        deque(track(done, f"Running the model on {len(texts)} {what} texts", len(texts)), 0)
    if not (np.isfinite(states).all() and np.isfinite(logits).all()):
        raise ValueError("no exits can be fitted: a layer's output has values that float16 cannot hold")
    return TokenStates(states, logits, np.repeat(np.arange(len(texts)), [len(rows) for rows in drawn]))


def _run(model: Model, tokens: Sequence[Tokens], poolings: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """Compute the tensors of a chunk, except rows: pooled states in float16, and logits; raises as `compute` does."""
    layers = range(model.manifest.num_layers + 1)
    pooled = {
        f"{pooling}_{layer:02}": np.zeros((len(tokens), model.manifest.hidden_size), np.float16)
        for pooling in poolings
        for layer in layers
    }
    logits = np.zeros((len(tokens), len(model.manifest.labels)), np.float32)

    def one(i: int) -> None:
        steps = model.full_depth(tokens[i])
        logits[i] = steps[-1].logits
        for layer, step in enumerate(steps if poolings else ()):
            rows = model.pooling.normalized(step.hidden)
            for pooling in poolings:
                with np.errstate(over="ignore"):  # of float16; the result is infinite
                    pooled[f"{pooling}_{layer:02}"][i] = rows[0] if pooling == "cls" else rows.mean(0)

    with ThreadPoolExecutor(cpu_count()) as pool:
        list(pool.map(one, range(len(tokens))))
    if wrong := [name for name, rows in pooled.items() if not np.isfinite(rows).all()]:
        raise ValueError(
            f"no exits can be fitted to layer {int(wrong[0][-2:])}: its output has values above "
            f"{np.finfo(np.float16).max} or that are not numbers"
        )
    return {**pooled, "logits": logits}


def _is_whole(file: Path) -> bool:
    """True if a chunk exists and is complete."""
    try:
        with safe_open(file, "numpy") as opened:
            return bool(opened.keys())
    except (OSError, SafetensorError):
        return False
