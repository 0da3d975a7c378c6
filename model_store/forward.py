"""Forward passes of unpadded samples, with the exit rule between layers: in Python, or in the kernels.

One pass can serve several models that have the same encoder: each decides for itself where the sample exits, and the
pass ends when all have decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from de3.exits.kinds import Classes, Labels, Spans, Value
from de3.exits.reading import ClassReading, LabelsReading, Reading, SpansReading, ValueReading
from de3.exits.rule import ExitReason, ExitRule
from de3.exits.spans import Layout, TokenReading, Unsure
from de3.model_store.segments import Array, Exits, Layers, NativeExits, NativeLayers, Tokens

NO_DISTANCES = np.zeros(0, np.float32)
NO_FLAG = None, None, False


@dataclass(slots=True, eq=False)
class Decision:
    """Where a sample exits, as one model decides, and what the model reads there.

    Attributes:
        exits: the model's exits.
        rule: the sample exits at the first layer where the signal's score is below the rule's τ.
        deepest: the last layer at which it may exit, one with an exit.
        ask_all: compute every exit up to `deepest`; if false, only the exit at `deepest` and, above τ = 0, those that
            the signal uses are computed.
        far: by layer, the distance to the nearest prototype above which a sample is out of distribution, (num_layers +
            1,); None for no limit.
        tau_factor: factor by which the rule's τ is multiplied once the sample is out of distribution.
        is_far: the sample was too far from every prototype at some exit, that is, out of distribution.
        states: output array for the mean over the tokens after each layer, (layers, hidden), where layers is num_layers
            + 1 or, without the last layer, num_layers; None if they are not needed.
        reason: why the sample exited; None before it exits.
        seconds: compute time of the sample until its exit.
        is_blocked: it would have exited with a reading that the rule's flag blocks, so it runs to `deepest`; not set by
            the kernels.
        readings: scored readings of the computed exits, the last one at the exit. In the kernels, empty until it exits,
            and without `ask_all` only the last has logits, probs, labels and a value.
        layout: of the tokens, for a token classifier; None for other models.
        logits, distances: in the kernels, (num_layers + 1, K), index = layer; zeros where no exit was computed. In a
            token classifier, logits are (num_layers + 1, T, K), undefined where no exit was computed.
        state_terms: in the kernels, ClassReading.state_term, (num_layers + 1,); None if the signal weighs no states.
        counted: in the kernels, 1 for the tokens that can change a span, (T,); None for other models.
    """

    exits: Exits
    rule: ExitRule
    deepest: int
    ask_all: bool = False
    far: NDArray[np.float64] | None = None
    tau_factor: float = 1.0
    is_far: bool = False
    states: Array | None = None
    layout: Layout | None = None
    reason: ExitReason | None = field(default=None, init=False)
    seconds: float = field(default=0.0, init=False)
    is_blocked: bool = field(default=False, init=False)
    readings: list[Reading] = field(default_factory=list, init=False)
    logits: Array = field(init=False)
    distances: Array = field(init=False)
    state_terms: Array | None = field(default=None, init=False)
    counted: NDArray[np.uint8] | None = field(default=None, init=False)

    def mark_ood(self) -> None:
        """Mark the sample as out of distribution, and multiply its τ by `tau_factor`."""
        self.is_far, self.rule = True, replace(self.rule, tau=self.rule.tau * self.tau_factor)


@dataclass(slots=True, eq=False)
class ForwardPass:
    """Forward pass of one sample, which can stop after any layer and continue later.

    Attributes:
        decisions: one for each model that the pass serves.
        layer: the next layer to run.
        hidden: input of that layer, (1, tokens, hidden); None before layer 0, and once it is not needed.
        seconds: compute time so far.
        is_done: all decisions have been made.
    """

    tokens: Tokens
    decisions: Sequence[Decision]
    layer: int = field(default=0, init=False)
    hidden: Array | None = field(default=None, init=False)
    seconds: float = field(default=0.0, init=False)
    is_done: bool = field(default=False, init=False)

    @property
    def undecided(self) -> Sequence[Decision]:
        """The decisions that have not been made; the pass must not be done."""
        several = len(self.decisions) > 1
        return [one for one in self.decisions if one.reason is None] if several else self.decisions

    def finish(self) -> None:
        """Note that all decisions have been made, and release the hidden states."""
        self.is_done, self.hidden = True, None

    def end(self, reason: ExitReason) -> None:
        """End the pass: all decisions that have not been made have this reason."""
        for one in self.undecided:
            one.reason, one.seconds = reason, self.seconds
        self.finish()


class LayerByLayer:
    """Runs samples one after the other, layer by layer, on any runtime; decides exits in Python."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers

    def __call__(
        self, passes: Sequence[ForwardPass], layers: int | None = None, at_idle: bool = False
    ) -> None:
        """Run passes that have the same next layer, until all decisions are made or `layers` layers have run.

        layers: None for all. at_idle: not used; see NativeForward.
        """
        for one in passes:
            end = 1 + self._layers.num_layers if layers is None else one.layer + layers
            while one.layer < end and not one.is_done:
                self._step(one)

    def _step(self, one: ForwardPass) -> None:
        started, layer, before = perf_counter(), one.layer, one.seconds
        run = self._layers
        hidden = run.embed(one.tokens) if one.hidden is None else run.run(layer, one.hidden)
        one.layer, one.hidden, is_done = layer + 1, hidden, True
        for decision in one.undecided:
            _decide(decision, layer, hidden)
            one.seconds = before + perf_counter() - started
            if decision.reason is not None:
                decision.seconds = one.seconds
            is_done &= decision.reason is not None
        if is_done:
            one.finish()


def _decide(decision: Decision, layer: int, hidden: Array) -> None:
    """Read a model's exit at a layer, if it has one and needs it, and decide whether the sample exits there."""
    rule, exits = decision.rule, decision.exits
    if decision.states is not None and layer < len(decision.states):
        decision.states[layer] = exits.pooling.mean(hidden)
    # At τ = 0 only the deepest exit is needed. A τ that `mark_ood` multiplied is 0 only if it was 0 before.
    may_exit = rule.tau > 0 and not decision.is_blocked
    is_asked = may_exit and rule.signal.may_exit(layer)
    if layer not in exits.layers or not (is_asked or decision.ask_all or layer == decision.deepest):
        return
    logits, found = exits.run(layer, hidden)
    reading: Reading
    if isinstance(rule.kind, Spans):
        assert decision.layout is not None
        reading = rule.kind.read(layer, logits, decision.layout)
    else:
        reading = rule.kind.read(layer, logits.tolist(), None if found is None else found.tolist())
    if isinstance(reading, ClassReading) and (weights := rule.signal.state_weights) is not None:
        reading.state_term = exits.state_term(layer, hidden, weights[layer])
    decision.readings.append(reading)
    reading.score = rule.signal.score(decision.readings)
    nearest, far = reading.nearest, decision.far
    is_far = far is not None and nearest is not None and nearest > far[layer]
    if is_far and not decision.is_far:
        decision.mark_ood()
    is_below = may_exit and decision.rule.exits(reading.score)
    decision.is_blocked |= is_below and rule.blocks(reading)
    if layer == exits.num_layers:
        decision.reason = "last_layer"
    elif is_below and not decision.is_blocked:
        decision.reason = "threshold"
    elif layer == decision.deepest:
        decision.reason = "max_layer"


class NativeForward:
    """Runs samples through the kernels together: all layers and the exit rule in one call, without the GIL."""

    def __init__(self, kernels: Any, layers: NativeLayers, hidden_size: int) -> None:
        self._forward, self._layers, self._hidden = kernels.forward, layers, hidden_size

    def __call__(
        self, passes: Sequence[ForwardPass], layers: int | None = None, at_idle: bool = False
    ) -> None:
        """Run 1 to 64 passes as LayerByLayer does.

        at_idle: run at the lowest priority, preempted by any other thread. Raises ValueError for an id outside the
        embedding tables, or if memory runs out.
        """
        first, deepest = passes[0].layer, self._layers.num_layers
        last = deepest if layers is None else min(first + layers - 1, deepest)
        is_part = first > 0 or last < deepest
        texts, waiting = [], [one.undecided for one in passes]
        for one, undecided in zip(passes, waiting, strict=True):
            if first == 0 and is_part:
                one.hidden = np.empty((1, len(one.tokens), self._hidden), np.float32)
            rows = [_arguments(decision, len(one.tokens), first == 0) for decision in undecided]
            texts.append((one.tokens.ids, one.tokens.type_ids, one.hidden, rows))
        results = self._forward(self._layers.model, texts, first, last, at_idle)
        for one, undecided, (seconds, left) in zip(passes, waiting, results, strict=True):
            one.layer = last + 1
            for decision, found in zip(undecided, left, strict=True):
                if found is not None:
                    _leave(decision, one.seconds, *found)
            one.seconds += seconds
            if None not in left:
                one.finish()


def _arguments(one: Decision, tokens: int, is_new: bool) -> tuple[Any, ...]:
    """A decision as `native/python.c` takes it."""
    exits, signal, kind = one.exits, one.rule.signal, one.rule.kind
    assert isinstance(exits, NativeExits)
    if is_new and isinstance(kind, Spans):
        assert one.layout is not None
        one.logits = np.empty((exits.num_layers + 1, tokens, exits.num_labels), np.float32)
        one.distances, one.counted = NO_DISTANCES, kind.rule.counted(one.layout).view(np.uint8)
    elif is_new:
        shape = (exits.num_layers + 1, exits.num_labels)
        one.logits, one.distances = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        if signal.state_weights is not None:
            one.state_terms = np.zeros(exits.num_layers + 1, np.float32)
    return (
        exits.exits,
        one.rule.tau,
        signal.code,
        signal.lam or 0.0,
        signal.table,
        signal.state_weights,
        one.deepest,
        one.ask_all,
        one.tau_factor,
        kind.table if isinstance(kind, Labels) else None,
        one.far,
        one.logits,
        one.distances,
        one.state_terms,
        one.states,
        one.counted,
        kind.rule.outside if isinstance(kind, Spans) else -1,
        *(NO_FLAG if (flag := one.rule.flag) is None else (flag.indices, flag.least, flag.is_below)),
    )


def _leave(
    one: Decision,
    before: float,
    layer: int,
    seconds: float,
    is_below_tau: bool,
    is_far: bool,
    rows: list[tuple[Any, ...]],
) -> None:
    """Record the kernels' decision. before: seconds of earlier calls. rows: as `native/python.c` returns them."""
    last = len(rows) - 1
    one.readings = [_reading(one, one.ask_all or i == last, *row) for i, row in enumerate(rows)]
    one.seconds = before + seconds
    if is_far:
        one.mark_ood()
    if layer == one.exits.num_layers:
        one.reason = "last_layer"
    else:
        one.reason = "threshold" if is_below_tau else "max_layer"


def _reading(one: Decision, is_whole: bool, layer: int, *values: Any) -> Reading:
    """The reading of an exit.

    values: label, margin, entropy, distance ratio, nearest distance, score, probs and unsure.
    """
    label, margin, entropy, ratio, nearest, score, probs, unsure = values
    match kind := one.rule.kind:
        case Classes():
            logits = one.logits[layer].tolist() if is_whole else []
            term = 0.0 if one.state_terms is None else float(one.state_terms[layer])
            return ClassReading(
                layer, logits, probs if is_whole else [], label, margin, entropy, ratio, nearest, score, term
            )
        case Labels():
            logits = one.logits[layer].tolist() if is_whole else []
            assigned = kind.assigned(logits) if is_whole else []
            return LabelsReading(
                layer, logits, probs if is_whole else [], label, margin, entropy, assigned, score
            )
        case Value():
            return ValueReading(layer, float(one.logits[layer][0]), score)
        case Spans():
            assert one.layout is not None
            tokens = TokenReading(one.logits[layer], one.layout, kind.rule) if is_whole else None
            return SpansReading(layer, Unsure(*unsure), tokens, score)
        case _:
            assert_never(kind)
