"""The kernels, compared with ONNX Runtime, with each other and with the exit rule.

If this machine has no fast kernels, the tests use the reference.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto

from de3.exits.flags import Flag
from de3.exits.kinds import CLASSES, Classes, Kind, Labels, Value
from de3.exits.reading import ClassReading, Reading
from de3.exits.rule import ExitRule
from de3.exits.signals import UNUSED, Edr, Entropy, Risk, Signal
from de3.model_store.architecture import Architecture, Head
from de3.model_store.encoder import Encoders
from de3.model_store.families.deberta import Deberta
from de3.model_store.forward import Decision, ForwardPass, LayerByLayer, NativeForward
from de3.model_store.graph import Graph, Source, source_of
from de3.model_store.model import Model, exit_network_of, network_of
from de3.model_store.proof import MAX_STATES_DIFFERENCE
from de3.model_store.segment_graph import (
    build_exit,
    build_segment,
    exit_tensors,
    graph_name,
    read_exits,
    read_segment,
)
from de3.model_store.segments import NativeExits, NativeLayers, Pooling, Tokens, session_options
from de3.model_store.store import Store, StoreError
from de3.native import NoKernelsError
from de3.native.network import Memory, build, build_exits
from tests.fixtures import exact_int8, using

kernels = pytest.importorskip("de3.native.kernels", reason="the kernels were not built: no C compiler")
pytestmark = pytest.mark.usefixtures("kernels")
ALL = kernels.implementations()  # the reference is the last
# Instruction sets that differ only in the int8 product, and so give the same bits, except for products in bfloat16.
LONG = 128  # tokens from which on attention multiplies in bfloat16
SAME = [{"amx", "vnni"}, {"avxvnni", "avx2"}, {"i8mm", "dotprod"}]


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return Encoders()


@pytest.fixture(scope="module")
def native(kernels: Any, store: Path, encoders: Encoders) -> Model:
    return Model(Store(store).open("tiny-int8"), "native", encoders=encoders)


@dataclass(frozen=True)
class Built:
    """An encoder or exits with random weights, as the kernels take them, and as graphs in the layers' order."""

    network: Any
    graphs: list[ModelProto]


def random_source(rng: np.random.Generator, architecture: Architecture) -> Source:
    """A source of random weights."""
    encoder, max_tokens = architecture.encoder, architecture.max_tokens

    def take(tensor: str, name: str, dtype: type, shape: tuple[int, ...]) -> tuple[TensorProto, Any]:
        if name == "frequencies":
            weights[name] = (100.0 ** -(np.arange(shape[0]) / shape[0])).astype(np.float32)
        elif name == "row_numbers":
            assert isinstance(encoder, Deberta)
            half, distances = encoder.rows // 2, np.arange(1 - max_tokens, max_tokens)
            weights[name] = (np.clip(distances, -half, half - 1) + half).astype(np.int32)
        elif not name.endswith(".scale") and name not in weights:
            spread = 0.1 if len(shape) == 1 else 1.0 if name.split(".", maxsplit=1)[0] in TABLES else 0.08
            values = rng.normal(0, spread, shape) + ("norm.weight" in name)
            weights[name] = values.astype(np.float32)
        return stored(tensor, name, dtype, shape)

    weights: dict[str, Any] = {}
    stored = source_of(weights)
    return take


def random_encoder(rng: np.random.Generator, architecture: Architecture) -> Built:
    """An encoder whose weights are read from the segments that export builds."""
    layers = range(architecture.num_layers + 1)
    graphs = [build_segment(architecture, m, random_source(rng, architecture)) for m in layers]
    models = [g.model(graph_name(m)) for m, g in enumerate(graphs)]
    read_back = [read_segment(model, architecture, m) for m, model in enumerate(models)]
    return Built(network_of(architecture, read_back), models)


def random_exits(rng: np.random.Generator, architecture: Architecture) -> Built:
    """Exits whose weights are read from the tensors that export writes; final_norm is different at each exit."""
    layers = architecture.exit_layers
    graphs = {m: build_exit(architecture, m, random_source(rng, architecture)) for m in layers}
    weights = read_exits(exit_tensors({m: g.weights for m, g in graphs.items()}), architecture)
    shape = (len(architecture.labels), architecture.metric_dim)
    rows = {m: rng.normal(size=shape).astype(np.float32) for m in architecture.prototype_layers}
    prototypes = {m: x / np.linalg.norm(x, axis=1, keepdims=True) for m, x in rows.items()}
    models = [g.model(f"exit_{m}") for m, g in graphs.items()]
    return Built(exit_network_of(architecture, weights, prototypes), models)


TABLES = ("word", "position", "token_type", "offsets")


def random_architecture(
    hidden: int,
    heads: int,
    inner: int,
    labels: int,
    metric: int,
    gelu: bool,
    mean: bool,
    head: Head | None = None,
    family: dict[str, Any] | None = None,
    max_tokens: int = 96,
) -> Architecture:
    """Embeddings and one layer, each with an exit, or as many layers as the family's num_layers, the last with an exit.

    metric: width of the metric space; 0: no prototypes. gelu: GELU, else ReLU. mean: mean pooling, else cls. head:
    head of the last exit; None: a linear one. family: fields of an encoder that is not BERT.
    """
    bert = {"type": "bert", "positions": 96, "token_types": 2}
    encoder: dict[str, Any] = {"positions": 0, "token_types": 0, "num_layers": 1} | (family or bert)
    encoder |= {"hidden_size": hidden, "width": hidden, "num_heads": heads, "inner": inner}
    encoder |= {"vocabulary": 20, "activation": "gelu" if gelu else "relu", "epsilon": 1e-12}
    layers = [0, encoder["num_layers"]]
    exits = {"exit_layers": layers, "prototype_layers": layers[: 1 if head else 2] if metric else []}
    exits |= {"metric_dim": metric or 1, "pooling": "mean" if mean else "cls", "head": head}
    names = {"labels": ["label"] * labels, "max_tokens": max_tokens, "precision": "int8"}
    return Architecture.model_validate({"encoder": encoder, **exits, **names})


def floats(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def run_exit(name: str, exits: Any, layer: int, hidden: Any, labels: int, has_distances: bool) -> list[Any]:
    """The logits and, if `has_distances`, the distances of an exit."""
    values = [np.full(labels, np.nan, np.float32) for _ in range(1 + has_distances)]
    with using(name):
        kernels.run_exit(exits, layer, hidden, *values, *[None] * (not has_distances))
    return values


def logits_of(group: list[np.ndarray], model: Any, exits: Any, types: np.ndarray, labels: int) -> list[bytes]:
    """The logits of both exits for each text of a group that runs together."""
    found, texts = [floats(2, 2, labels) for _ in group], []
    for ids, values in zip(group, found, strict=True):
        decision = (
            exits,
            0.0,
            0,
            0.0,
            None,
            None,
            1,
            True,
            1.0,
            None,
            None,
            *values,
            None,
            None,
            None,
            -1,
            None,
            None,
            False,
        )
        texts.append((ids, types[:, : ids.size].copy(), None, [decision]))
    kernels.forward(model, texts, 0, 1)
    return [values[0].tobytes() for values in found]


def family(kind: str, **choices: list[Any]) -> Any:
    """Fields of an encoder, each with one of these values."""
    return st.fixed_dictionaries(
        {"type": st.just(kind)} | {k: st.sampled_from(v) for k, v in choices.items()}
    )


DEBERTA = {"terms": [["c2p"], ["p2c"], ["c2p", "p2c"]], "rows": [2, 6, 40, 128], "distances": [333]}
FAMILIES = st.one_of(
    family("bert", positions=[333], token_types=[0, 2]),
    family("mpnet", positions=[333], distances=[333]),
    family("modernbert", window=[1, 3, 16, 40, 200], local_layers=[[], [1]]),
    family("deberta-v2", positions=[0, 333], token_types=[0, 2], **DEBERTA),
)
HEADS = st.builds(
    Head,
    activation=st.sampled_from(["tanh", "relu", "gelu"]),
    pooling=st.sampled_from(["mean", "cls"]),
    norm=st.sampled_from([None, 1e-5]),
)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """With and without kernels."""
    hidden, heads = draw(
        st.sampled_from([(64, 1), (64, 4), (128, 2), (128, 8), (192, 4), (192, 12), (48, 1)])
    )
    inner, metric = draw(st.sampled_from([64, 320, 64, 320, 40])), draw(st.sampled_from([0, 32, 64, 96, 100]))
    labels, gelu, mean, head = draw(
        st.tuples(st.integers(2, 40), st.booleans(), st.booleans(), st.none() | HEADS)
    )
    return random_architecture(hidden, heads, inner, labels, metric, gelu, mean, head, draw(FAMILIES), 333)


@exact_int8
@settings(max_examples=80)
@given(
    architectures(),
    st.integers(1, 40) | st.sampled_from([96, 127, 128, 129, 260, 333]),
    st.integers(0, 2**32 - 1),
)
def test_any_encoder_matches_onnx_runtime_or_has_no_kernels(
    architecture: Architecture, tokens: int, seed: int
) -> None:
    rng, plan = np.random.default_rng(seed), architecture.encoder
    hidden, labels = plan.hidden_size, len(architecture.labels)
    encoder, exits = random_encoder(rng, architecture), random_exits(rng, architecture)
    exits_fit = not (hidden % 64 or (architecture.prototype_layers and architecture.metric_dim % 32))
    encoder_fits = not (hidden % 64 or plan.inner % 64 or hidden // plan.num_heads % 16)
    model, built = built_or_none(build, encoder.network), built_or_none(build_exits, exits.network)
    assert (model is not None, built is not None) == (encoder_fits, exits_fit)
    if model is None or built is None:
        return
    ids, types = rng.integers(0, 20, (1, tokens)), rng.integers(0, 2, (1, tokens))
    feed: dict[str, Any] = {"input_ids": ids, "token_type_ids": types}
    for layer in range(2):
        before = feed["hidden"] if layer else ids
        (feed["hidden"],) = onnx_outputs(encoder.graphs[layer], feed)
        feed["prototypes"] = exits.network.prototypes.get(layer)
        expected, bits = onnx_outputs(exits.graphs[layer], feed), dict[str, bytes]()
        for name in ALL:
            hidden_states = np.full_like(feed["hidden"], np.nan)
            with using(name):
                kernels.run(model, layer, before, types, hidden_states)
            # The limit is like the one for loading a model, because rounding errors may cross a quantization step.
            error = np.abs(hidden_states - feed["hidden"]).mean(-1).max()
            assert error <= (MAX_STATES_DIFFERENCE / 4 if layer else 1e-6) * feed["hidden"].std()
            found = run_exit(name, built, layer, feed["hidden"], labels, len(expected) > 1)
            for a, b in zip(expected, found, strict=True):
                assert np.abs(a[0] - b).max() < 0.1 * max(1.0, np.ptp(a))
            bits[name] = hidden_states.tobytes()
        if not layer or tokens < LONG:
            assert all(len({bits[name] for name in names & bits.keys()}) <= 1 for names in SAME)
    short = ids[:, : 1 + tokens // 2].copy()
    with using(rng.choice(ALL)):
        together = logits_of([ids, short], model, built, types, labels)
        assert together == [logits_of([x], model, built, types, labels)[0] for x in (ids, short)]
    if tokens < 333 or plan.type == "bert":
        return
    with pytest.raises(ValueError, match="an id outside the tables"):
        longer = np.zeros((1, 334, hidden), np.float32)
        kernels.run(model, 1, longer, None, longer)


def built_or_none(build: Callable[[Any], Any], network: Any) -> Any:
    """What `build` makes of an encoder or of exits; None if there are no kernels for them."""
    try:
        return build(network)
    except NoKernelsError:
        return None


def onnx_outputs(graph: ModelProto, feed: dict[str, Any]) -> list[Any]:
    """A graph's outputs in ONNX Runtime; feed: may have values that are not inputs of the graph."""
    session = ort.InferenceSession(graph.SerializeToString(), session_options())
    outputs: list[Any] = session.run(None, {x.name: feed[x.name] for x in session.get_inputs()})
    return outputs


@pytest.mark.parametrize(
    "family",
    [
        {"type": "mpnet", "positions": 1100, "distances": 1100},
        {"type": "modernbert", "window": 40, "local_layers": [1]},
        {"type": "deberta-v2", "positions": 1100, "token_types": 0, "terms": ["c2p", "p2c"], "rows": 40}
        | {"distances": 1100},
    ],
    ids=["mpnet", "local", "deberta"],
)
def test_a_text_of_several_tiles_runs_in_a_group_as_alone(family: dict[str, Any]) -> None:
    """Under AddressSanitizer, this also checks the memory of the longest texts and the largest group."""
    rng = np.random.default_rng(7)
    architecture = random_architecture(64, 1, 64, 2, 0, True, True, None, family, 1100)
    model = build(random_encoder(rng, architecture).network)
    exits = build_exits(random_exits(rng, architecture).network)
    lengths = [1100, 1, 513, 64, 63, *rng.integers(1, 40, 59).tolist()]
    types = rng.integers(0, 2, (1, 1100))
    texts = [rng.integers(0, 20, (1, length)) for length in rng.permutation(lengths)]
    for name in ALL:
        with using(name):
            together = logits_of(texts, model, exits, types, 2)
            assert together == [logits_of([x], model, exits, types, 2)[0] for x in texts]


@pytest.mark.parametrize("name", ALL)
def test_a_token_sees_all_tokens_of_its_window_and_no_others(name: str) -> None:
    """Also where the queries of a long text are split into parts."""
    rng, tokens, window = np.random.default_rng(9), 300, 3
    family = {"type": "modernbert", "window": window, "local_layers": [1]}
    architecture = random_architecture(64, 2, 64, 2, 0, True, True, None, family, tokens)
    model = build(random_encoder(rng, architecture).network)
    ids = rng.integers(0, 19, (1, tokens))

    def states(ids: Any) -> Any:
        embeddings, found = (np.empty((1, tokens, 64), np.float32) for _ in range(2))
        with using(name):
            kernels.run(model, 0, ids, None, embeddings)
            kernels.run(model, 1, embeddings, None, found)
        return found[0]

    before = states(ids)
    for changed in (0, 1, *range(tokens // 2 - 5, tokens // 2 + 5), tokens - 1):
        other = ids.copy()
        other[0, changed] = 19
        rows = np.flatnonzero((states(other) != before).any(1))
        seen = range(max(0, changed - window), min(tokens, changed + window + 1))
        assert rows.tolist() == [*seen], changed


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_processes_share_the_memory_of_the_weights() -> None:
    rng = np.random.default_rng(8)
    encoder = random_encoder(rng, random_architecture(128, 4, 64, 3, 32, True, True)).network
    fd = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
    try:
        with pytest.raises(MemoryError):  # the memory is still empty
            build(encoder, Memory(fd, True))
        models = [build(encoder), build(encoder, Memory(fd, False)), build(encoder, Memory(fd, True))]
        with pytest.raises(OSError, match="Operation not permitted"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(MemoryError):  # the memory is sealed
            build(encoder, Memory(fd, False))
    finally:
        os.close(fd)
    ids, types, results = rng.integers(0, 20, (1, 9)), rng.integers(0, 2, (1, 9)), set()
    for model in models:
        states = [np.empty((1, 9, 128), np.float32) for _ in range(2)]
        kernels.run(model, 0, ids, types, states[0])
        kernels.run(model, 1, states[0], None, states[1])
        results.add(states[1].tobytes())
    assert len(results) == 1
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:weights" in line]
    assert len(maps) == 2 and all(line.split()[1] == "r--s" for line in maps)


@pytest.mark.parametrize("activation", [None, "tanh", "relu", "gelu"])
def test_an_exit_without_finite_logits_has_no_distances_and_a_head_keeps_nan(activation: Any) -> None:
    """A text without a direction, on the other hand, is as far from every prototype."""
    rng, head = np.random.default_rng(5), activation and Head(activation=activation, pooling="mean")
    exits = random_exits(rng, random_architecture(64, 4, 64, 3, 32, True, True, head)).network
    name, hidden = "dense.bias" if head else "classifier.bias", rng.normal(size=(1, 5, 64))

    def values(kernel: str, **changed: Any) -> list[Any]:
        built = build_exits(replace(exits, weights={**exits.weights, 1: exits.weights[1] | changed}))
        return run_exit(kernel, built, 1, hidden.astype(np.float32), 3, not head)

    for kernel, value in product(ALL, (np.nan,) if head else (np.nan, np.inf)):
        odd = np.r_[np.float32(value), exits.weights[1][name][1:]]
        logits, *distances = values(kernel, **{name: odd})
        assert np.isfinite(logits).tolist() == [False, not head, not head] and np.isnan(distances).all()
        if not head:
            zeros = {"space.weight": np.zeros((64, 32), np.int8), "space.bias": floats(32)}
            assert values(kernel, **zeros)[1].tolist() == [1, 1, 1]


def test_the_best_implementation_is_in_use() -> None:
    with using(""):
        fast = ALL[0] if ALL[0] != "reference" else ""
        assert (kernels.supported(), bool(kernels.why_not()), ALL[-1]) == (fast, not fast, "reference")
    with pytest.raises(ValueError, match="cannot run quantum"):
        kernels.use("quantum")


# Heads on one encoder of four layers. K labels; `kind`: their answer, see ModelTraits.
HEADS_OF_ONE_ENCODER: list[dict[str, Any]] = [
    {"exit_layers": [0, 1, 2, 3, 4], "prototype_layers": [0, 1, 2, 3, 4], "K": 3},
    {"exit_layers": [0, 1, 2], "prototype_layers": [0, 1], "K": 2, "metric_dim": 64},
    {"exit_layers": [1, 3, 4], "K": 5, "head": Head(activation="gelu", pooling="cls", norm=1e-5)},
    {"exit_layers": [0, 2, 3], "K": 4, "kind": "labels", "pooling": "cls"},
    {"exit_layers": [0, 1], "K": 1, "kind": "value"},
    {
        **{"exit_layers": [1, 3], "prototype_layers": [1], "K": 3, "pooling": "cls"},
        "head": Head(activation="tanh", pooling="mean"),
    },
]


@cache
def encoder_with_heads(family: str) -> tuple[NativeLayers, list[NativeExits]]:
    """An encoder of four layers, in which each text gives other states, and HEADS_OF_ONE_ENCODER."""
    rng = np.random.default_rng(11)
    fields = {
        "bert": {"positions": 96, "token_types": 2},
        "modernbert": {"window": 3, "local_layers": [1, 3]},
    }
    encoder = {"type": family, "num_layers": 4, **fields[family]}
    whole = random_architecture(64, 4, 64, 2, 32, True, True, None, encoder)
    layers = NativeLayers(kernels, build(random_encoder(rng, whole).network), whole)  # type: ignore[arg-type]
    heads = []
    for head in HEADS_OF_ONE_ENCODER:
        fields_of_head = {name: value for name, value in head.items() if name not in ("K", "kind")}
        deepest = head["exit_layers"][-1]
        fields_of_head |= {"encoder": whole.encoder.up_to(deepest), "labels": ["label"] * head["K"]}
        base = whole.model_dump() | {"prototype_layers": []}
        architecture = Architecture.model_validate(base | fields_of_head)
        built = random_exits(rng, architecture).network
        last = built.weights[architecture.num_layers]
        norm = (last["final_norm.weight"], last["final_norm.bias"]) if "final_norm.weight" in last else None
        pooling = Pooling(norm, architecture.encoder.epsilon)
        heads.append(NativeExits(kernels, build_exits(built), architecture, pooling))  # type: ignore[arg-type]
    return layers, heads


@st.composite
def decisions_of_a_text(draw: st.DrawFn) -> list[tuple[int, dict[str, Any]]]:
    """1 to 4 heads, by number, each with the arguments of its Decision."""
    decisions = []
    for number in draw(st.lists(st.integers(0, len(HEADS_OF_ONE_ENCODER) - 1), min_size=1, max_size=4)):
        head = HEADS_OF_ONE_ENCODER[number]
        layers, kind, labels = head["exit_layers"], head.get("kind", "classes"), head["K"]
        weights = st.tuples(
            *[st.floats(-1, 1)] * 4, st.sampled_from([0.0, 0.5]) if kind == "classes" else st.just(0.0)
        )
        if kind == "classes":  # with and without weights of the state
            of_state = st.integers(0, 99).map(lambda n: np.random.default_rng(n).normal(0, 0.3, 64).tolist())
            weights |= st.builds(lambda few, more: (*few, *more), weights, of_state)
        risk = st.tuples(*[weights | st.just(UNUSED)] * layers[-1], st.none()).map(Risk)
        others = {"classes": [Entropy(), Edr(0.5), Edr(4.0)], "labels": [Entropy()], "value": []}[kind]
        limits = [draw(st.floats(0.1, 0.9)) for _ in range(labels)]
        of: Kind = {"labels": Labels.of(limits), "value": Value(0.5)}.get(kind, CLASSES)
        tau = draw(st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.97, 1.0]))
        signal = draw(risk | st.sampled_from(others) if others else risk)
        flagged = tuple(sorted(draw(st.sets(st.integers(0, labels - 1), max_size=3))))
        is_below = kind == "value" and draw(st.booleans())
        flag = Flag(flagged, tuple(limits[: len(flagged)]), is_below) if flagged else None
        fields: dict[str, Any] = {"rule": ExitRule(tau, signal, kind=of, flag=flag)}
        fields |= {"deepest": draw(st.sampled_from(layers[::-1])), "ask_all": draw(st.booleans())}
        if draw(st.booleans()):  # the distances are about 1
            far = [draw(st.just(0.0) | st.floats(0.7, 1.1)) for _ in range(layers[-1] + 1)]
            fields |= {"far": np.array(far), "tau_factor": draw(st.sampled_from([0.1, 0.7, 0.9]))}
        decisions.append((number, fields | {"states": draw(st.booleans())}))
    return decisions


def without(reading: Any, *names: str) -> Any:
    return replace(reading, **{name: [] for name in names if name in reading.__dataclass_fields__})


def readings_of(one: Decision) -> list[Reading]:
    """The readings as the kernels give them: only the last is whole, unless all exits were asked for."""
    *others, last = one.readings
    if not one.ask_all:
        others = [without(r, "logits", "probs", "labels") for r in others]
    return [*others, last]


def outcome(one: Decision) -> list[str]:
    """What a decision yields, except states and seconds; repr() is exact, and NaN equals itself."""
    return [repr((one.reason, one.is_far, one.rule)), *map(repr, readings_of(one))]


def states_of(one: Decision) -> Any:
    return np.zeros(0) if one.states is None else one.states


@settings(max_examples=100)
@given(
    st.sampled_from(ALL),
    st.sampled_from(["bert", "modernbert"]),
    st.lists(st.tuples(st.integers(1, 70), decisions_of_a_text()), min_size=1, max_size=5),
    st.lists(st.integers(1, 4), min_size=5, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_heads_that_share_a_pass_decide_as_alone(
    implementation: str,
    family: str,
    batch: list[tuple[int, list[tuple[int, dict[str, Any]]]]],
    steps: list[int],
    seed: int,
) -> None:
    """Bit for bit, in the kernels and layer by layer; the pass ends when the last head has decided."""
    (layers, heads), rng = encoder_with_heads(family), np.random.default_rng(seed)
    forward, layer_by_layer = NativeForward(kernels, layers, 64), LayerByLayer(layers)

    def decision(number: int, fields: dict[str, Any]) -> Decision:
        exits, keeps_states = heads[number], fields["states"]
        states = np.zeros((exits.num_layers, 64), np.float32) if keeps_states else None
        return Decision(exits, **fields | {"states": states})

    texts = [Tokens(*(rng.integers(0, n, (1, length)) for n in (20, 2)), False) for length, _ in batch]

    def passes() -> list[ForwardPass]:
        both = zip(texts, batch, strict=True)
        return [ForwardPass(text, [decision(*one) for one in heads]) for text, (_, heads) in both]

    runs: list[tuple[Any, list[ForwardPass]]] = [(forward, passes()), (layer_by_layer, passes())]
    with using(implementation):
        for run, passes in runs:
            started = perf_counter()
            for number in steps:
                if left := [one for one in passes if not one.is_done]:
                    run(left, layers=number, at_idle=seed % 2 == 0)
            assert sum(one.seconds for one in passes) <= perf_counter() - started  # each second counts once
        for run, passes in runs:
            for one, (_, heads_of_text) in zip(passes, batch, strict=True):
                for shared, head in zip(one.decisions, heads_of_text, strict=True):
                    run([ForwardPass(one.tokens, [alone := decision(*head)])])
                    assert outcome(shared) == outcome(alone)
                    assert states_of(shared).tobytes() == states_of(alone).tobytes()
                    if run is forward:
                        assert shared.logits.tobytes() == alone.logits.tobytes()
                        assert shared.distances.tobytes() == alone.distances.tobytes()
    for pair in zip(*(passes for _, passes in runs), strict=True):
        for native, python in zip(*(one.decisions for one in pair), strict=True):
            assert outcome(native) == outcome(python)
            np.testing.assert_allclose(states_of(native), states_of(python), atol=1e-5)  # the norm is rounded
    for _, passes in runs:
        for one in passes:
            # A pass's seconds would grow if a layer ran after the last decision.
            assert one.hidden is None and one.seconds == max(d.seconds for d in one.decisions)


@pytest.mark.parametrize("flagged", [0, 1])
def test_each_flagged_label_has_its_own_threshold(flagged: int) -> None:
    layers, heads = encoder_with_heads("bert")
    exits, of = heads[3], Labels.of([0.5] * 4)
    text = Tokens(*(np.random.default_rng(5).integers(0, n, (1, 9)) for n in (20, 2)), False)

    def run(tau: float, limits: list[float] | None = None) -> list[Decision]:
        flag = Flag((0, 1), tuple(limits)) if limits else None
        both = [Decision(exits, ExitRule(tau, Entropy(), kind=of, flag=flag), 3) for _ in range(2)]
        NativeForward(kernels, layers, 64)([ForwardPass(text, both[:1])])
        LayerByLayer(layers)([ForwardPass(text, both[1:])])
        assert outcome(both[0]) == outcome(both[1])
        return both

    probs = run(1.0)[0].readings[-1].probs  # type: ignore[union-attr]
    limits = [0.9999, 0.9999]
    assert max(probs) < 0.999 and run(1.0, limits)[0].reason == "threshold"
    limits[flagged] = probs[flagged]
    assert run(1.0, limits)[0].reason == "last_layer"


def test_tau_is_multiplied_only_once_for_a_text_that_is_far_at_every_exit() -> None:
    """The kernels' wrong answers would be rare: the score must be between the two products."""
    (layers, (exits, *_)), rng = encoder_with_heads("bert"), np.random.default_rng(3)
    texts = [Tokens(*(rng.integers(0, n, (1, 9)) for n in (20, 2)), False) for _ in range(30)]
    for tau, text in product(np.linspace(0.5, 1, 10).tolist(), texts):
        both = [
            Decision(exits, ExitRule(tau, Entropy()), 4, far=np.zeros(5), tau_factor=0.9) for _ in range(2)
        ]
        NativeForward(kernels, layers, 64)([ForwardPass(text, both[:1])])
        LayerByLayer(layers)([ForwardPass(text, both[1:])])
        assert both[0].is_far and outcome(both[0]) == outcome(both[1])


@given(st.data(), st.sampled_from(["classes", "labels"]), st.integers(2, 9), st.booleans())
def test_the_decision_is_that_of_the_exit_rule(
    data: st.DataObject, kind: str, classes: int, has_distances: bool
) -> None:
    """Bit for bit; without a score, in neither of them may a text exit early."""
    weight = st.floats(-1e6, 1e6) | st.floats(-5, 5)
    weights = st.tuples(*[weight] * 4, st.just(0.0) | weight)
    signals = st.tuples(weights, weights, st.none() | weights).map(Risk) | st.just(Entropy())
    of: Classes | Labels = CLASSES

    def values(low: float, high: float) -> list[float]:
        return data.draw(st.lists(st.floats(low, high, width=32), min_size=classes, max_size=classes))

    if kind == "labels":
        of, has_distances = Labels.of(np.clip(values(0, 1), 1e-3, 0.999).tolist()), False
    else:
        signals |= st.sampled_from([Edr(0.5), Edr(1.0), Edr(30.0)])
    signal: Signal = data.draw(signals, "signal")
    spread = data.draw(st.sampled_from([1.0, 30.0, 1000.0]))
    passed = [
        (values(-spread, spread), values(-(2**-20), 2) if has_distances else None)
        for _ in range(3 if isinstance(signal, Risk) else data.draw(st.integers(1, 3)))
    ]
    if data.draw(st.integers(0, 9)) == 0:
        passed[-1][0][data.draw(st.integers(0, classes - 1))] = math.nan
    rule = ExitRule(0.5, signal, kind=of)
    readings = [of.read(layer, *exit_) for layer, exit_ in enumerate(passed)]
    term = data.draw(st.just(0.0) | st.floats(-1e3, 1e3, width=32)) if kind == "classes" else 0.0
    if isinstance(last := readings[-1], ClassReading):
        last.state_term = term
    expected = signal.score(readings)
    buffers = [(np.float32(x), None if y is None else np.float32(y), term) for x, y in passed]
    table = of.table if isinstance(of, Labels) else None
    score = kernels.score(buffers, signal.code, signal.lam or 0.0, signal.table, table)
    taus = [0.0, 1.0, data.draw(st.floats(0, 1))]
    if expected is None or math.isnan(expected):
        assert math.isnan(score)
    else:
        assert score == expected
        taus += [expected, min(math.nextafter(expected, 2.0), 1.0)]
    for tau in taus:
        assert kernels.exits(score, tau) == replace(rule, tau=tau).exits(expected)


def test_without_kernels_onnx_runtime_runs_a_model_unless_the_kernels_are_asked_for(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert Model(Store(store).open("tiny")).runtime == "onnxruntime" and not caplog.records
    with pytest.raises(StoreError, match="the kernels cannot run it: only int8"):
        Model(Store(store).open("tiny"), "native")
    monkeypatch.setitem(sys.modules, "de3.native.kernels", None)
    assert Model(Store(store).open("tiny-int8")).runtime == "onnxruntime"
    (line,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "tiny-int8:1" in line and "were not built" in line and "four times as long" in line


def last_token_negated(hidden: Any) -> Any:
    """One token of a long text is enough, although the mean over the text hardly differs."""
    if hidden.shape[1] > 40:
        hidden[0, -1] *= -1
    return hidden


def at(layer: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Changes what the kernels return for this layer."""
    return lambda result, number, *_: change(result) if number == layer else result


def next_float(passes: Any) -> None:
    logits = passes[-1].decisions[0].logits
    logits[1, 1] = np.nextafter(logits[1, 1], np.float32(9))


def end_early(passes: Any) -> None:
    if passes[0].is_done:
        passes[0].decisions[0].reason = "max_layer"


def refuse(*_: Any) -> Any:
    raise ValueError("an id outside the tables")


NAN = np.float32("nan")
WRONG: list[tuple[Any, str, Callable[..., Any]]] = [
    (NativeLayers, "layer 2: the kernels' hidden states differ", at(2, last_token_negated)),
    (NativeLayers, "layer 3: the kernels' hidden states differ", at(3, lambda x: x * NAN)),
    (NativeExits, "layer 3: the kernels' logits differ", at(3, lambda x: (x[0] * NAN, None))),
    (NativeExits, "layer 2: the kernels' distances differ", at(2, lambda x: (x[0], x[1][::-1]))),
    (NativeExits, "layer 0: the kernels' set of outputs differs", at(0, lambda x: (x[0], None))),
    (NativeForward, "texts in a group", lambda _, passes: next_float(passes)),
    (NativeForward, "texts in a group", lambda _, passes: end_early(passes)),
    *((owner, "an id outside the tables", refuse) for owner in (NativeLayers, NativeExits, NativeForward)),
]


@pytest.mark.parametrize(("owner", "says", "alter"), WRONG)
def test_kernels_that_give_other_values_or_refuse_a_text_are_not_used(
    native: Model,
    encoders: Encoders,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    says: str,
    alter: Callable[..., Any],
) -> None:
    """A model that shares a proved encoder proves its exits, too."""
    assert native.encoder.forward is not None  # the encoders hold it for as long as it is used
    name = "__call__" if owner is NativeForward else "run"
    run = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *a, **options: alter(run(self, *a, **options), *a))
    for shared in [encoders] if owner is NativeExits else [Encoders()]:
        model = Model(Store(store).open("tiny-int8"), encoders=shared)
        assert says in model.why_not_native
        assert (model.full_runtime, model.encoder.forward) == ("onnxruntime", None)


def with_one_wrong(value: Any) -> Iterator[Any]:
    """The arguments of a call, nested in tuples and lists, each time with one that is wrong."""
    match value:
        case tuple() | list():
            for n, one in enumerate(value):
                yield from (
                    type(value)([*value[:n], other, *value[n + 1 :]]) for other in with_one_wrong(one)
                )
            if isinstance(value, tuple):
                yield value[:-1]
        case np.ndarray():
            yield value.ravel()[:-1].copy()
            yield np.append(value, value.ravel()[:1])
        case None | bool() | float():
            pass
        case int():
            yield from (-1, 1 << 20)
        case _:
            yield None  # instead of a model or of exits


def arrays_of(value: Any) -> Iterator[Any]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from arrays_of(one)


def test_a_wrong_argument_is_an_error_not_a_crash_and_leaves_nothing_in_use() -> None:
    model = kernels.new(64, 4, 64, 1, 8, True, True)
    exits, each, other = (kernels.new_exits(*sizes) for sizes in ((64, 1, 1), (64, 1, 2), (128, 1, 1)))
    ids, types, hidden, row = (
        np.zeros((1, 2), np.int64),
        np.zeros((1, 2), np.int64),
        floats(1, 2, 64),
        floats(64),
    )
    square, weights = np.zeros((64, 64), np.int8), np.zeros((2, 5))
    space = np.zeros((64, 32), np.int8), floats(32), floats(32), floats(3, 32)
    exit_, no_space = (floats(3, 64), np.arange(3, dtype=np.float32)), (b"",) * 4
    head = exits, floats(64, 64), row, 0, 1
    decision = (exits, 0.5, 2, 1.0, weights, floats(2, 64), 1, False, 1.0, None, np.ones(2), floats(2, 3))
    decision += floats(2, 3), floats(2), floats(2, 64), None, False, np.int32([0, 2]), np.zeros(2), False
    of_labels = *decision[:9], np.zeros(3), *decision[10:17], None, None, False
    of_tokens = each, *decision[1:5], None, *decision[6:10], None, floats(2, 2, 3), bytearray(), None
    of_tokens += None, bytes(2), *decision[16:]
    texts = [(ids, types, hidden, [decision] * 16), (ids, types, hidden, [of_labels, of_tokens])]
    forward = kernels.forward, model, texts, 0, 1
    with pytest.raises(ValueError, match="not complete"):
        kernels.run(model, 1, hidden, None, hidden)
    calls = [
        (kernels.set_embeddings, model, np.zeros((8, 64), np.int8), floats(8), floats(3, 64), floats(2, 64)),
        *((kernels.set_linear, model, 1, which, square, row, row) for which in (1, 2, 3, 4)),
        (kernels.set_linear, model, 1, 0, np.zeros((64, 192), np.int8), floats(192), floats(192)),
        *((kernels.set_norm, model, *norm, row, row, 1e-12) for norm in ((0, 3), (1, 1), (1, 3))),
        (kernels.set_offsets, model, 1, floats(4, 5)),
        (kernels.set_window, model, 1, 5),
        (kernels.set_rotation, model, [1], floats(3, 8), floats(3, 8)),
        (kernels.set_terms, model, 1, 1.0, np.int32([1, 1, 1, 0, 0]), floats(4, 2, 16), floats(4, 2, 16)),
        (kernels.set_exit, exits, 0, *exit_, *space),
        (kernels.set_exit, exits, 1, *exit_, *no_space),
        (kernels.set_exit, each, 1, *exit_, *no_space),
        (kernels.set_exit, other, 1, floats(3, 128), floats(3), *no_space),
        (kernels.set_exit_norm, exits, 1, row, row, 1e-5, False),
        (kernels.set_head, *head),
        (kernels.run, model, 0, ids, types, hidden),
        (kernels.run, model, 1, hidden, None, floats(1, 2, 64)),
        (kernels.run_exit, exits, 0, hidden, floats(3), floats(3)),
        (kernels.run_exit, exits, 1, hidden, floats(3), None),
        (kernels.run_exit, each, 1, hidden, floats(2, 3), None),
        (kernels.score, [(floats(3), floats(3))], 2, 0.0, np.zeros((1, 5)), None),
        (kernels.score, [(floats(3), None)], 0, 0.0, None, np.zeros(3)),
        (kernels.score_tokens, floats(2, 3), np.zeros(2, np.uint8), 3, False, np.zeros(5)),
        forward,
    ]
    arrays = list(arrays_of(calls))
    before = [sys.getrefcount(one) for one in arrays]
    errors = ValueError, TypeError, BufferError, SystemError
    for call, *arguments in calls:
        for wrong in with_one_wrong(tuple(arguments)):
            with pytest.raises(errors):
                call(*wrong)
        call(*arguments)
    bad, many, no_text = np.full((1, 2), 8), floats(1, 65_537, 64), ids[:, :0].copy()

    def text(**other: Any) -> tuple[Any, ...]:
        return tuple(
            ({"ids": ids, "types": types, "hidden": hidden, "decisions": [decision]} | other).values()
        )

    def without(number: int, other: Any) -> tuple[Any, ...]:
        return text(decisions=[(*decision[:number], other, *decision[number + 1 :])])

    for call, *arguments in (
        *((kernels.new, *sizes, True, False) for sizes in ((65, 1, 64, 1, 0), (64, 1, 64, 101, 0))),
        *((kernels.new_exits, *sizes, 1) for sizes in ((65, 3), (0, 3), (8256, 3), (64, 0), (64, 101))),
        # What is set already, and what does not fit to what is.
        *(one for one in calls if one[0] in (kernels.set_embeddings, kernels.set_offsets, kernels.set_terms)),
        *(one for one in calls if one[0] in (kernels.set_exit, kernels.set_head)),
        (kernels.set_exit, other, 0, floats(2, 128), floats(2), *no_space),
        (kernels.set_exit, each, 0, *exit_, *space),
        (
            kernels.set_exit,
            kernels.new_exits(64, 1, 1),
            1,
            floats(1, 64),
            floats(1),
            *space[:3],
            floats(1, 32),
        ),
        (kernels.set_head, kernels.new_exits(64, 1, 1), *head[1:3], 3, 1),  # no such activation
        *((kernels.run, model, 0, wrong, types, hidden) for wrong in (bad, ids - 1)),
        *((kernels.run, model, 0, ids, wrong, hidden) for wrong in (types + 2, types - 1, None)),
        (kernels.run, model, 0, *[np.zeros(4, np.int64)] * 2, floats(4, 64)),  # more than positions
        *((kernels.run, model, 1, one, None, one) for one in (floats(0), floats(4, 64), many)),
        (kernels.run, model, 1, hidden, None, bytes(hidden)),
        *((kernels.run_exit, exits, 0, one, floats(3), floats(3)) for one in (floats(0), many)),
        *((kernels.run_exit, exits, 0, hidden, floats(3), wrong) for wrong in (None, bytes(12))),
        (kernels.run_exit, exits, 0, hidden, bytes(12), floats(3)),
        (kernels.run_exit, exits, 1, hidden, floats(3), floats(3)),  # no metric space
        (kernels.run_exit, other, 0, floats(1, 128), floats(3), None),  # no exit
        (kernels.run_exit, exits, 0, hidden, floats(3), floats(3), floats(63)),
        (kernels.run_exit, each, 1, hidden, floats(2, 3), None, row),
        *((kernels.forward, model, wrong, 0, 1) for wrong in ([], texts * 33)),
        (kernels.forward, model, texts, 1, 0),
        (kernels.forward, model, [text(hidden=None)], 0, 0),
        *(
            (kernels.forward, model, [texts[0], wrong], 0, 1)
            for wrong in (
                *(text(decisions=wrong) for wrong in ([], [decision] * 17, (decision,), [None])),
                *(without(0, wrong) for wrong in (model, other)),
                *(without(4, wrong) for wrong in (None, b"")),
                *(without(n, bytes(decision[n])) for n in (11, 12, 13, 14)),
                without(13, None),
                text(
                    decisions=[(*of_tokens[:5], floats(2, 64), *of_tokens[6:13], floats(2), *of_tokens[14:])]
                ),
                text(decisions=[(*of_tokens[:15], None, *of_tokens[16:])]),
                *(without(17, np.int32(wrong)) for wrong in ([0, 3], [-1, 2], [0])),
                without(18, None),
                *(text(ids=wrong) for wrong in (bad, ids - 1)),
                *(text(types=wrong) for wrong in (types + 2, None)),
                *(text(hidden=bytes(hidden)), text(ids=no_text, types=no_text, hidden=None)),
            )
        ),
    ):
        with pytest.raises(errors):
            call(*arguments)
    del call, arguments, wrong
    assert [sys.getrefcount(one) for one in arrays] == before


@exact_int8
def test_an_int8_linear_layer_quantizes_each_token_by_itself() -> None:
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(64, 32)).astype(np.float32), rng.normal(size=32).astype(np.float32)
    g = Graph(True, source_of({"a.weight": weight, "a.bias": bias}))
    g.output(g.linear(g.input("x", [1, "T", 64]), "a", 64, 32), "y", [1, "T", 32])
    session = ort.InferenceSession(g.model("linear").SerializeToString(), session_options())
    x = rng.normal(size=(1, 5, 64)).astype(np.float32)
    x[0, 0] *= 1000  # an outlier
    (found,) = session.run(None, {"x": x})
    assert np.abs(found - (x @ weight + bias))[0, 1:].max() < 0.5
