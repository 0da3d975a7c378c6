"""Forward passes of unpadded samples, with the exit rule between layers: in Python, or in the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.exits.reading import Reading
from de3.exits.rule import ExitReason, ExitRule
from de3.model_store.manifest import Manifest
from de3.model_store.segments import Array, Segment, Tokens


@dataclass(slots=True, eq=False)
class ForwardPass:
    """Forward pass of one sample, which can stop after any layer and continue later.

    Attributes:
        rule: the sample exits at the first layer where the signal's score is below the rule's τ.
        deepest: the last layer to run, one with an exit.
        ask_all: compute every exit up to `deepest`; if false and τ is 0, only the exit at `deepest` is computed.
        tau_factor: factor by which the rule's τ is multiplied once the sample is out of distribution.
        is_far: the sample was too far from every prototype at some exit, that is, out of distribution.
        states: output array for the mean over the tokens after each layer but the last, (num_layers, hidden); None if
            they are not needed.
        layer: the next layer to run.
        hidden: input of that layer, (1, tokens, hidden); None before layer 0, and once it is not needed.
        reason: why the sample exited; None before it exits.
        seconds: compute time so far.
        readings: scored readings of the computed exits, the last one at the exit; in the kernels, empty until it exits.
        logits, distances: in the kernels, (num_layers + 1, K), index = layer; zeros where no exit was computed.
    """

    tokens: Tokens
    rule: ExitRule
    deepest: int
    ask_all: bool = False
    tau_factor: float = 1.0
    is_far: bool = False
    states: Array | None = None
    layer: int = field(default=0, init=False)
    hidden: Array | None = field(default=None, init=False)
    reason: ExitReason | None = field(default=None, init=False)
    seconds: float = field(default=0.0, init=False)
    readings: list[Reading] = field(default_factory=list, init=False)
    logits: Array = field(init=False)
    distances: Array = field(init=False)

    def mark_ood(self) -> None:
        """Mark the sample as out of distribution, and multiply its τ by `tau_factor`."""
        self.is_far, self.rule = True, replace(self.rule, tau=self.rule.tau * self.tau_factor)

    def exit(self, reason: ExitReason) -> None:
        """End the pass, and release its hidden states."""
        self.reason, self.hidden = reason, None


@dataclass(frozen=True)
class Pooling:
    """Pools hidden states as the exits do, so that exits can be fitted to the results.

    Attributes:
        norm: scale and shift of the norm between hidden states and an exit, (hidden,) each; None without one.
        epsilon: added to the variance in that norm.
    """

    norm: tuple[Array, Array] | None
    epsilon: float

    def normalized(self, hidden: Array) -> Array:
        """The hidden states of a sample, (1, tokens, hidden), after the norm, if there is one: (tokens, hidden)."""
        rows: Array = hidden[0]
        if self.norm is None:
            return rows
        centred = rows - rows.mean(-1, keepdims=True)
        rows = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.epsilon)
        return np.asarray(rows * self.norm[0] + self.norm[1], np.float32)

    def mean(self, hidden: Array) -> Array:
        """Mean over the tokens of normalized hidden states: (hidden,)."""
        rows = self.normalized(hidden)
        mean: Array = np.add.reduce(rows, 0) / np.float32(len(rows))  # equals rows.mean(0), in half the time
        return mean


class LayerByLayer:
    """Runs samples one after the other, segment by segment, on any runtime; decides exits in Python."""

    def __init__(self, segments: Sequence[Segment], pooling: Pooling) -> None:
        self._segments, self._pooling = segments, pooling

    def __call__(
        self,
        passes: Sequence[ForwardPass],
        far: NDArray[np.float64] | None = None,
        layers: int | None = None,
        at_idle: bool = False,
    ) -> None:
        """Run passes that have the same next layer, until each has exited or `layers` layers have run.

        far: by layer, the distance to the nearest prototype above which a sample is out of distribution, (num_layers +
        1,); None for no limit. layers: None for all. at_idle: not used; see NativeForward.
        """
        for one in passes:
            started = perf_counter()
            end = len(self._segments) if layers is None else one.layer + layers
            while one.reason is None and one.layer < end:
                self._step(one, far)
            one.seconds += perf_counter() - started

    def _step(self, one: ForwardPass, far: NDArray[np.float64] | None) -> None:
        layer, rule = one.layer, one.rule
        segment = self._segments[layer]
        # At τ = 0 only the deepest exit is needed. A τ that `mark_ood` multiplied is 0 only if it was 0 before.
        asked = segment.is_exit and (rule.tau > 0 or one.ask_all or layer == one.deepest)
        step = segment.embed(one.tokens, asked) if one.hidden is None else segment.run(one.hidden, asked)
        one.hidden, one.layer = step.hidden, layer + 1
        if one.states is not None and layer < len(one.states):
            one.states[layer] = self._pooling.mean(step.hidden)
        if step.logits is None:
            return
        distances = None if step.distances is None else step.distances.tolist()
        one.readings.append(reading := rule.read(layer, step.logits.tolist(), distances))
        reading.score = rule.signal.score(one.readings)
        is_far = far is not None and reading.nearest is not None and reading.nearest > far[layer]
        if is_far and not one.is_far:
            one.mark_ood()
        if layer == len(self._segments) - 1:
            one.exit("last_layer")
        elif one.rule.exits(reading.score):
            one.exit("threshold")
        elif layer == one.deepest:
            one.exit("max_layer")


class NativeForward:
    """Runs samples through the kernels together: all layers and the exit rule in one call, without the GIL."""

    def __init__(self, kernels: Any, model: Any, manifest: Manifest, prototypes: dict[int, Array]) -> None:
        self._forward, self._model = kernels.forward, model
        self._prototypes = [prototypes.get(layer) for layer in range(manifest.num_layers + 1)]
        self._shape = (manifest.num_layers + 1, len(manifest.labels))
        self._hidden = manifest.hidden_size

    def __call__(
        self,
        passes: Sequence[ForwardPass],
        far: NDArray[np.float64] | None = None,
        layers: int | None = None,
        at_idle: bool = False,
    ) -> None:
        """Run 1 to 64 passes as LayerByLayer does.

        at_idle: run at the lowest priority, preempted by any other thread. Raises ValueError for an id outside the
        embedding tables, or if memory runs out.
        """
        first, deepest = passes[0].layer, self._shape[0] - 1
        last = deepest if layers is None else min(first + layers - 1, deepest)
        is_part = first > 0 or last < deepest
        texts = []
        for p in passes:
            if first == 0:
                p.logits, p.distances = np.zeros(self._shape, np.float32), np.zeros(self._shape, np.float32)
                if is_part:
                    p.hidden = np.empty((1, len(p.tokens), self._hidden), np.float32)
            signal, thresholds = p.rule.signal, p.rule.thresholds
            table = None if thresholds is None else thresholds.table
            rule = (p.rule.tau, signal.code, signal.lam or 0.0, signal.table, p.deepest, p.ask_all)
            arrays = (p.logits, p.distances, p.hidden, p.states)
            texts.append((p.tokens.ids, p.tokens.type_ids, *rule, p.tau_factor, table, *arrays))
        results = self._forward(self._model, texts, self._prototypes, far, first, last, at_idle)
        for p, (seconds, left) in zip(passes, results, strict=True):
            p.layer = last + 1
            p.seconds += seconds
            if left is not None:
                self._leave(p, *left)

    def _leave(
        self, p: ForwardPass, layer: int, is_below_tau: bool, is_far: bool, rows: list[tuple[Any, ...]]
    ) -> None:
        """Record the kernels' decision. rows: the readings, as `reading_list` in `native/python.c` returns them."""
        p.readings = [_reading(p, *row) for row in rows]
        if is_far:
            p.mark_ood()
        if layer == self._shape[0] - 1:
            p.exit("last_layer")
        else:
            p.exit("threshold" if is_below_tau else "max_layer")


def _reading(p: ForwardPass, layer: int, *values: Any) -> Reading:
    """The reading of an exit. values: label, margin, entropy, distance ratio, nearest distance, score and probs."""
    label, margin, entropy, ratio, nearest, score, probs = values
    logits, thresholds = p.logits[layer].tolist(), p.rule.thresholds
    reading = Reading(layer, logits, probs, label, margin, entropy, ratio, nearest, score)
    if len(logits) == 1:
        reading.value = logits[0]
    elif thresholds is not None:
        reading.labels = [k for k, limit in enumerate(thresholds.logits) if logits[k] > limit]
    elif nearest is not None:
        reading.distances = p.distances[layer].tolist()
    return reading
