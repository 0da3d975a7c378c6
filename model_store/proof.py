"""Proof that the kernels agree with ONNX Runtime: both run a few texts before a model is served."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from de3.exits.kinds import Kind
from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy
from de3.model_store.architecture import Architecture
from de3.model_store.encoder import Encoder
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.graph import Graph, source_of
from de3.model_store.segments import (
    Array,
    Exits,
    Layers,
    OnnxLayers,
    Tokens,
    hidden_states,
    session_options,
)
from de3.model_store.store import StoreError
from de3.model_store.tokenizer import TextTokenizer
from de3.native import NoKernelsError

MAX_NATIVE_DIFFERENCE = 0.1  # relative to the range of a layer's logits or distances
MAX_STATES_DIFFERENCE = 0.2  # mean over a token's values, relative to the layer's standard deviation
# Factor of both limits where ONNX Runtime's int8 products saturate; the kernels' are exact.
SATURATED = 2.0
MIN_SPREAD = 0.2  # lower limit of the range of logits or distances, as they may be nearly equal for all texts
# ONNX Runtime's memory grows with the square of a text's length: 3 GB for 8,192 tokens.
MAX_PROOF_TOKENS = 1024
PROOF = (
    ("a", None),
    ("It was not what we had hoped for , but 3 of the 12 rooms were fine .", None),
    ("the quick brown fox jumps over the lazy dog", "a second text, of another kind"),
    ("one two three four five six seven eight nine ten " * 6, None),
)


def texts_of(tokenizer: TextTokenizer, max_tokens: int, layouts: bool) -> list[Tokens]:
    """The texts that are run: PROOF, and a long text. layouts: they need layouts, so none is a pair."""
    longest = " ".join(f"{text} {pair or ''}" for text, pair in PROOF) + " "
    most = min(max_tokens, MAX_PROOF_TOKENS)
    texts = []
    for text, pair in (*PROOF, (longest * (1 + most // 60), None)):
        tokens = tokenizer.start(text, None if layouts else pair, True, 1, layouts).all()
        assert isinstance(tokens, Tokens)
        texts.append(tokens)
    layout = texts[-1].layout
    kept = None if layout is None else layout.part(np.arange(min(most, len(texts[-1]))))
    texts[-1] = Tokens(texts[-1].ids[:, :most], texts[-1].type_ids[:, :most], True, kept)
    return texts


@cache
def int8_saturates() -> bool:
    """True if ONNX Runtime's int8 products saturate on this processor, as on x86-64 without VNNI (docs/design.md)."""
    g = Graph(
        True, source_of({"a.weight": np.ones((64, 32), np.float32), "a.bias": np.zeros(32, np.float32)})
    )
    g.output(g.linear(g.input("x", [1, "T", 64]), "a", 64, 32), "y", [1, "T", 32])
    session = ort.InferenceSession(g.model("linear").SerializeToString(), session_options())
    x = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 1, 64)
    (found,) = session.run(None, {"x": x})
    return bool(np.abs(found - x.sum()).max() > 0.05 * x.sum())


def prove_layers(
    path: Path,
    sessions: Iterable[Any],
    native: Layers,
    texts: Sequence[Tokens],
    architecture: Architecture,
    check: Callable[[], None],
) -> list[list[Array]]:
    """Compare the kernels' layers with ONNX Runtime's; returns ONNX Runtime's hidden states by text and layer.

    sessions: ONNX Runtime's, one for each layer, created one at a time to save memory. Each layer's input is ONNX
    Runtime's output of the layer before, as rounding errors add up over the layers. check: called before each layer.

    Raises NoKernelsError if results differ by more than rounding can explain: both runtimes quantize activations, so a
    rounding error can become a step of 1/255 of the range. Raises StoreError if ONNX Runtime cannot run the model.
    """
    states: list[list[Array]] = [[] for _ in texts]
    slack = SATURATED if int8_saturates() else 1.0
    for layer, session in enumerate(sessions):
        plain = OnnxLayers([session, session], architecture.token_types)  # as the embeddings, and as a layer
        for tokens, before in zip(texts, states, strict=True):
            check()
            try:
                theirs = plain.run(1, before[-1]) if layer else plain.embed(tokens)
            except Exception as error:  # onnxruntime's exceptions have no common base class
                raise StoreError(f"{path}: loads, but does not run: {error}") from None
            try:
                ours = native.run(layer, before[-1]) if layer else native.embed(tokens)
            except ValueError as error:
                raise NoKernelsError(str(error)) from None
            if not np.abs(theirs - ours).mean(-1).max() <= MAX_STATES_DIFFERENCE * slack * theirs.std():
                raise NoKernelsError(f"layer {layer}: the kernels' hidden states differ from ONNX Runtime's")
            before.append(theirs)
    return states


def prove_exits(
    path: Path, plain: Exits, native: Exits, states: Sequence[Sequence[Array]], check: Callable[[], None]
) -> None:
    """Compare the kernels' exits with ONNX Runtime's on hidden states, by text and layer; raises as prove_layers."""
    for layer in native.layers:
        pairs: dict[str, list[tuple[Array, Array]]] = {"logits": [], "distances": []}
        for hidden in states:
            check()
            try:
                theirs = plain.run(layer, hidden[layer])
            except Exception as error:  # onnxruntime's exceptions have no common base class
                raise StoreError(f"{path}: loads, but does not run: {error}") from None
            try:
                ours = native.run(layer, hidden[layer])
            except ValueError as error:
                raise NoKernelsError(str(error)) from None
            for name, a, b in zip(pairs, theirs, ours, strict=True):
                if (a is None) != (b is None):
                    raise NoKernelsError(
                        f"layer {layer}: the kernels' set of outputs differs from ONNX Runtime's"
                    )
                if a is not None and b is not None:
                    pairs[name].append((a, b))
        for name, values in pairs.items():
            if not values:
                continue
            a, b = (np.concatenate([x.ravel() for x in side]) for side in zip(*values, strict=True))
            spread = max(float(np.ptp(a)), MIN_SPREAD)
            slack = SATURATED if int8_saturates() else 1.0
            if not np.abs(a - b).max() <= MAX_NATIVE_DIFFERENCE * slack * spread:
                raise NoKernelsError(f"layer {layer}: the kernels' {name} differ from ONNX Runtime's")


def prove_group(
    encoder: Encoder,
    exits: Exits,
    texts: Sequence[Tokens],
    kind: Kind,
    check: Callable[[], None],
) -> None:
    """Raise NoKernelsError unless texts give the same bits in a group, run in two calls, as alone."""
    forward, last = encoder.forward, exits.num_layers
    assert forward is not None
    rule = ExitRule(0.0, Entropy(), kind=kind)
    passes = [ForwardPass(t, [Decision(exits, rule, last, ask_all=True, layout=t.layout)]) for t in texts]
    try:
        for _ in range(2):
            check()
            forward(passes, layers=last // 2 + 1)
        alone = [hidden_states(encoder.layers, t, last, check) for t in texts]
        same = all(
            one.logits[layer].tobytes() == exits.run(layer, states[layer])[0].tobytes()
            for [one], states in zip((p.decisions for p in passes), alone, strict=True)
            for layer in exits.layers
        )
    except ValueError as error:
        raise NoKernelsError(str(error)) from None
    if not same or any(p.decisions[0].reason != "last_layer" for p in passes):
        raise NoKernelsError("the kernels give different values for texts in a group")
