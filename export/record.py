"""Records the outputs of every exit of an artifact for labelled texts."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import cpu_count

import numpy as np

from de3.data.examples import Example, label_array
from de3.data.tables import pair_of
from de3.exits.kinds import Spans
from de3.exits.reading import SpansReading
from de3.exits.recorded import Recorded, RecordedSpans
from de3.exits.signals import FEATURES
from de3.model_store.model import Model
from de3.model_store.segments import Array, Step, Tokens
from de3.progress import track

THREADS = cpu_count()


def record(
    model: Model, examples: Sequence[Example], what: str = "samples", for_fit: bool = False
) -> Recorded:
    """Record the outputs of every exit for examples, in order; the labels of a token classifier are its own answers.

    Examples run to full depth, unbatched, in parallel on all cores. what: name of the examples in the progress display.
    for_fit: also record the states to which risk can be fitted; otherwise only those that the model's own risk weighs.
    """

    def full_depth(example: Example) -> tuple[int, list[Step]]:
        tokens = model.tokenize(*pair_of(example.text))
        return len(tokens), model.full_depth(tokens)

    exits = model.manifest.exit_layers
    if isinstance(model.manifest.kind, Spans):
        return recorded_spans(model, [model.tokenize(*pair_of(e.text)) for e in examples], what)
    logits = np.zeros((len(examples), len(exits), len(model.manifest.labels)), np.float32)
    distances = np.full_like(logits, np.nan)
    tokens = np.zeros(len(examples), np.int64)
    weighed = {row.layer for row in model.manifest.risk or [] if len(row.weights) > FEATURES}
    if for_fit and model.manifest.kind.sees_state:
        weighed = set(exits[:-1])
    states = {layer: np.zeros((len(examples), model.manifest.hidden_size), np.float32) for layer in weighed}
    with ThreadPoolExecutor(THREADS) as pool:
        results = track(pool.map(full_depth, examples), f"Running {what} through the segments", len(examples))
        for i, (length, steps) in enumerate(results):
            tokens[i] = length
            for j, layer in enumerate(exits):
                logits[i, j] = steps[layer].logits
                if steps[layer].distances is not None:
                    distances[i, j] = steps[layer].distances
                if layer in states:
                    states[layer][i] = model.pooling.pooled(steps[layer].hidden, model.manifest.pooling)
    labels = label_array([e.label for e in examples], len(model.manifest.labels))
    return Recorded(
        exits,
        logits,
        distances,
        labels,
        tokens,
        kind=model.manifest.kind,
        states=partial(_states_of, states, exits) if states else None,
    )


def _states_of(states: Mapping[int, Array], exits: Sequence[int], j: int) -> Array:
    """The states of exit j. A function of the module, so that samples can be sent to other processes."""
    return states[exits[j]]


def recorded_spans(
    model: Model, texts: Sequence[Tokens], what: str, exits: Sequence[tuple[Array, Array]] | None = None
) -> RecordedSpans:
    """Record the outputs of every exit of a token classifier, as `record` does.

    exits: classifiers that replace the model's own exits, one for each layer but the last: weights (K, hidden) and bias
    (K,).
    """
    kind, pooling = model.manifest.kind, model.pooling
    layers = model.manifest.exit_layers if exits is None else list(range(len(exits) + 1))
    assert isinstance(kind, Spans)

    def logits_of(step: Step, layer: int) -> Array:
        if exits is None or layer == len(exits):
            assert step.logits is not None
            return step.logits
        weight, bias = exits[layer]
        return np.asarray(pooling.normalized(step.hidden) @ weight.T + bias, np.float32)

    def readings(tokens: Tokens) -> list[SpansReading]:
        assert tokens.layout is not None
        steps = model.full_depth(tokens)
        return [kind.read(layer, logits_of(steps[layer], layer), tokens.layout) for layer in layers]

    with ThreadPoolExecutor(THREADS) as pool:
        results = track(pool.map(readings, texts), f"Running {what} through the segments", len(texts))
        return RecordedSpans.of(kind, layers, list(results), [len(one) for one in texts])
