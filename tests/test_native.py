"""The kernels, compared with ONNX Runtime, with each other and with the exit rule.

If this machine has no fast kernels, the tests use the reference.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from de3.exits.reading import read
from de3.exits.rule import ExitRule, Thresholds
from de3.exits.signals import Edr, Entropy, Risk, Signal
from de3.model_store.architecture import Architecture, Head
from de3.model_store.families.deberta import Deberta
from de3.model_store.forward import ForwardPass
from de3.model_store.graph import Graph, source_of
from de3.model_store.model import MAX_STATES_DIFFERENCE, Model, network_of
from de3.model_store.segment_graph import build_segment, graph_name, read_segment
from de3.model_store.segments import NativeSegment, session_options
from de3.model_store.store import Store, StoreError
from de3.native import NoKernelsError
from de3.native.network import Memory, Network, build
from de3.server.engine.group import run_group
from de3.server.engine.queue import WorkQueue
from tests import jobs
from tests.fixtures import make_rows, using

kernels = pytest.importorskip("de3.native.kernels", reason="the kernels were not built: no C compiler")
pytestmark = pytest.mark.usefixtures("kernels")
ALL = kernels.implementations()  # the reference is the last
each = pytest.mark.parametrize("implementation", ALL)

RISK = Risk(((-1.0, -0.3, 0.5, 0.2, 0.1), (-2.0, -0.2, 0.0, 0.3, 0.4), (-3.0, 0.0, 1.0, 0.4, 0.2), None))
TEXTS = ["good", *(text for text, _ in make_rows(60, 9)), "a dull plot and a good film " * 12]


@pytest.fixture(scope="module")
def native(kernels: Any, store: Path) -> Model:
    return Model(Store(store).open("tiny-int8"), "native")


def random_network(rng: np.random.Generator, architecture: Architecture) -> tuple[Network, list[Any]]:
    """An encoder of one layer with random weights: the kernels' network, and the segments as export builds them."""
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
    graphs = [build_segment(architecture, layer, take) for layer in range(2)]
    segments = [g.model(graph_name(layer)) for layer, g in enumerate(graphs)]
    read_back = [read_segment(s, architecture, m) for m, s in enumerate(segments)]
    return network_of(architecture, read_back), segments


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
    """Embeddings and one layer, each with an exit.

    metric: width of the metric space; 0: no prototypes. gelu: GELU, else ReLU. mean: mean pooling, else cls. head:
    head of the last exit; None: a linear one. family: fields of an encoder that is not BERT.
    """
    bert = {"type": "bert", "positions": 96, "token_types": 2}
    encoder: dict[str, Any] = {"positions": 0, "token_types": 0} | (family or bert)
    encoder |= {"num_layers": 1, "hidden_size": hidden, "width": hidden, "num_heads": heads, "inner": inner}
    encoder |= {"vocabulary": 20, "activation": "gelu" if gelu else "relu", "epsilon": 1e-12}
    exits = {"exit_layers": [0, 1], "prototype_layers": [0, 1][: 1 if head else 2] if metric else []}
    exits |= {"metric_dim": metric or 1, "pooling": "mean" if mean else "cls", "head": head}
    names = {"labels": ["label"] * labels, "max_tokens": max_tokens, "precision": "int8"}
    return Architecture.model_validate({"encoder": encoder, **exits, **names})


def run(
    name: str, model: Any, layer: int, before: Any, types: Any, prototypes: Any, like: list[Any]
) -> list[Any]:
    """A layer's hidden states, logits and, with prototypes, distances, with the shapes of `like`."""
    values = [np.full(x.shape, np.nan, np.float32) for x in like]
    distances = values[2] if len(values) > 2 else None
    with using(name):
        kernels.run(model, layer, before, types, values[0], prototypes, values[1], distances)
    return values


def logits_of(
    group: list[np.ndarray], model: Any, types: np.ndarray, prototypes: list[Any], labels: int
) -> list[bytes]:
    """The logits of both exits for each text of a group that runs together."""
    found = [np.zeros((2, 2, labels), np.float32) for _ in group]
    texts = [
        (ids, types[:, : ids.size].copy(), 0.0, 0, 0.0, None, 1, True, 1.0, None, *values, None, None)
        for ids, values in zip(group, found, strict=True)
    ]
    kernels.forward(model, texts, prototypes, None, 0, 1)
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


@settings(max_examples=80)
@given(
    *(FAMILIES, st.sampled_from([(64, 1), (64, 4), (128, 2), (128, 8), (192, 4), (192, 12), (48, 1)])),
    *(st.sampled_from([64, 320, 64, 320, 40]), st.integers(2, 40), st.sampled_from([0, 32, 64, 96, 100])),
    *(st.booleans(), st.booleans(), st.none() | HEADS),
    *(st.integers(1, 40) | st.sampled_from([96, 127, 128, 129, 260, 333]), st.integers(0, 2**32 - 1)),
)
def test_any_encoder_matches_onnx_runtime_or_has_no_kernels(
    family: dict[str, Any],
    width: tuple[int, int],
    inner: int,
    labels: int,
    metric: int,
    gelu: bool,
    mean: bool,
    head: Head | None,
    tokens: int,
    seed: int,
) -> None:
    rng, (hidden, heads) = np.random.default_rng(seed), width
    architecture = random_architecture(*width, inner, labels, metric, gelu, mean, head, family, 333)
    network, built = random_network(rng, architecture)
    has_kernels = not (hidden % 64 or inner % 64 or hidden // heads % 16 or metric % 32)
    try:
        model = build(network)
    except NoKernelsError:
        assert not has_kernels
        return
    assert has_kernels
    ids, types = rng.integers(0, 20, (1, tokens)), rng.integers(0, 2, (1, tokens))
    prototypes = rng.normal(size=(labels, max(metric, 1))).astype(np.float32)
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    feed: dict[str, Any] = {"input_ids": ids, "with_exit": np.array(True), "token_type_ids": types}
    for layer, proto in enumerate(built):
        session = ort.InferenceSession(proto.SerializeToString(), session_options())
        given = {x.name for x in session.get_inputs()}
        feed["prototypes"] = prototypes
        expected = session.run(None, {name: value for name, value in feed.items() if name in given})
        before = feed["hidden"] if layer else ids
        for name in ALL:
            ours = run(name, model, layer, before, types, prototypes if len(expected) > 2 else None, expected)
            # The limit is like the one for loading a model, because rounding errors may cross a quantization step.
            error = np.abs(ours[0] - expected[0]).mean(-1).max()
            assert error <= (MAX_STATES_DIFFERENCE / 4 if layer else 1e-6) * expected[0].std()
            for a, b in zip(expected[1:], ours[1:], strict=True):
                assert np.abs(a - b).max() < 0.1 * max(1.0, np.ptp(a))
        feed["hidden"] = expected[0]
    short = ids[:, : 1 + tokens // 2].copy()
    tables = [prototypes if layer in architecture.prototype_layers else None for layer in range(2)]
    for name in ALL:
        with using(name):
            together = logits_of([ids, short], model, types, tables, labels)
            assert together == [logits_of([x], model, types, tables, labels)[0] for x in (ids, short)]
    if tokens < 333 or family["type"] == "bert":
        return
    with pytest.raises(ValueError, match="an id outside the tables"):
        longer = np.zeros((1, 334, hidden), np.float32)
        kernels.run(model, 1, longer, None, longer, None, None, None)


@pytest.mark.parametrize(
    "family",
    [
        {"type": "bert", "positions": 1100, "token_types": 2},
        {"type": "mpnet", "positions": 1100, "distances": 1100},
        {"type": "modernbert", "window": 40, "local_layers": [1]},
        {"type": "modernbert", "window": 40, "local_layers": []},
        {"type": "deberta-v2", "positions": 1100, "token_types": 0, "terms": ["c2p", "p2c"], "rows": 40}
        | {"distances": 1100},
    ],
    ids=["bert", "mpnet", "local", "global", "deberta"],
)
def test_a_text_of_several_tiles_runs_in_a_group_as_alone(family: dict[str, Any]) -> None:
    """Under AddressSanitizer, this also checks the memory of the longest texts and the largest group."""
    rng = np.random.default_rng(7)
    architecture = random_architecture(64, 1, 64, 2, 0, True, True, None, family, 1100)
    model = build(random_network(rng, architecture)[0])
    lengths = [1100, 1, 513, 64, 63, *rng.integers(1, 40, 59).tolist()]
    types = rng.integers(0, 2, (1, 1100))
    texts = [rng.integers(0, 20, (1, length)) for length in rng.permutation(lengths)]
    for name in ALL:
        with using(name):
            together = logits_of(texts, model, types, [None, None], 2)
            assert together == [logits_of([x], model, types, [None, None], 2)[0] for x in texts]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_processes_share_the_memory_of_the_weights() -> None:
    rng = np.random.default_rng(8)
    network, _ = random_network(rng, random_architecture(128, 4, 64, 3, 32, True, True))
    fd = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
    try:
        with pytest.raises(MemoryError):  # the memory is still empty
            build(network, Memory(fd, True))
        models = [build(network), build(network, Memory(fd, False)), build(network, Memory(fd, True))]
        with pytest.raises(OSError, match="Operation not permitted"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(MemoryError):  # the memory is sealed
            build(network, Memory(fd, False))
    finally:
        os.close(fd)
    ids, types, results = rng.integers(0, 20, (1, 9)), rng.integers(0, 2, (1, 9)), set()
    for model in models:
        states = [np.empty((1, 9, 128), np.float32) for _ in range(2)]
        kernels.run(model, 0, ids, types, states[0], None, None, None)
        kernels.run(model, 1, states[0], None, states[1], None, None, None)
        results.add(states[1].tobytes())
    assert len(results) == 1
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:weights" in line]
    assert len(maps) == 2 and all(line.split()[1] == "r--s" for line in maps)


@pytest.mark.parametrize("activation", [None, "tanh", "relu", "gelu"])
def test_one_value_that_is_not_finite_is_enough_for_an_exit_without_an_answer(activation: Any) -> None:
    """A logit that is not finite leaves no distances, whichever label has it, and a head keeps NaN."""
    rng, head = np.random.default_rng(5), activation and Head(activation=activation, pooling="mean")
    network, _ = random_network(rng, random_architecture(64, 4, 64, 3, 32, True, True, head))
    name = "dense.bias" if head else "classifier.bias"
    prototypes = None if head else rng.normal(size=(3, 32)).astype(np.float32)
    shapes = [np.empty(shape) for shape in ((1, 5, 64), 3, 3)][: 2 if head else 3]
    hidden = rng.normal(size=(1, 5, 64)).astype(np.float32)
    for place in range(3):
        for value in (np.nan,) if head else (np.nan, np.inf):
            changed = dict(network.segments[1])
            changed[name] = changed[name].copy()
            changed[name][place] = value
            model = build(replace(network, segments=[network.segments[0], changed]))
            for kernel in ALL:
                _, logits, *distances = run(kernel, model, 1, hidden, None, prototypes, shapes)
                if head:
                    assert not np.isfinite(logits).any()
                else:
                    assert np.flatnonzero(~np.isfinite(logits)).tolist() == [place]
                    assert np.isnan(distances).all()


def test_a_text_without_a_direction_is_as_far_from_every_prototype() -> None:
    rng = np.random.default_rng(5)
    network, _ = random_network(rng, random_architecture(64, 4, 64, 3, 32, True, True))
    zeros = {"space.weight": np.zeros((64, 32), np.int8), "space.bias": np.zeros(32, np.float32)}
    last = network.segments[1] | zeros
    model = build(replace(network, segments=[network.segments[0], last]))
    prototypes, hidden = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 32), (1, 5, 64)))
    for kernel in ALL:
        *_, distances = run(kernel, model, 1, hidden, None, prototypes, [hidden, np.empty(3), np.empty(3)])
        assert distances.tolist() == [1, 1, 1]


@pytest.mark.parametrize("names", [("amx", "vnni"), ("avxvnni", "avx2"), ("i8mm", "dotprod")], ids="-".join)
def test_instruction_sets_that_differ_only_in_the_int8_product_give_the_same_bits(
    native: Model, names: tuple[str, str]
) -> None:
    if missing := set(names) - set(ALL):
        pytest.skip(f"this processor has no {', '.join(sorted(missing))} to compare with")
    for text in (*TEXTS[:20], TEXTS[-1]):
        tokens, found = native.tokenize(text), []
        for name in names:
            with using(name):
                found.append(native.full_depth(tokens))
        for a, b in zip(*found, strict=True):
            assert a.hidden.tobytes() == b.hidden.tobytes()


def test_the_best_implementation_is_in_use() -> None:
    with using(""):
        fast = ALL[0] if ALL[0] != "reference" else ""
        assert ALL[-1] == "reference" and kernels.supported() == fast
        assert bool(kernels.why_not()) == (not fast)
    with using("reference"):
        assert kernels.supported() == "reference" and not kernels.why_not()
    with pytest.raises(ValueError, match="cannot run quantum"):
        kernels.use("quantum")


TAUS = st.sampled_from([0.0, 0.03, 0.2, 0.6, 1.0])


@each
@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(TEXTS), TAUS), min_size=1, max_size=9),
    st.sampled_from([Entropy(), Edr(0.5), Edr(4.0), RISK]),
    st.integers(0, 3),
    st.integers(1, 4),
    st.booleans(),
)
def test_in_a_group_each_text_exits_as_alone_and_as_the_rule_says(
    native: Model,
    implementation: str,
    batch: list[tuple[str, float]],
    signal: Signal,
    deepest: int,
    layers: int,
    at_idle: bool,
) -> None:
    passes = [ForwardPass(native.tokenize(text), ExitRule(tau, signal), deepest) for text, tau in batch]
    alone = [ForwardPass(p.tokens, p.rule, deepest) for p in passes]
    assert native.forward is not None
    with using(implementation):
        while left := [p for p in passes if p.reason is None]:
            native.forward(left, layers=layers, at_idle=at_idle)
        native.layer_by_layer(alone)
        steps_of = [native.full_depth(p.tokens) for p in passes]
    for p, one, steps in zip(passes, alone, steps_of, strict=True):
        assert (p.reason, p.readings) == (one.reason, one.readings)
        rule = p.rule
        for layer, step in enumerate(steps):
            assert step.logits is not None
            if rule.tau > 0 or layer == deepest:
                assert p.logits[layer].tolist() == step.logits.tolist()  # bit for bit
            distances = None if step.distances is None else step.distances.tolist()
            if layer == deepest or rule.exits(signal.score([read(layer, step.logits.tolist(), distances)])):
                break
        assert p.readings[-1].layer == layer
        assert not p.logits[layer + 1 :].any()


def in_c(signal: Signal, passed: list[tuple[list[float], list[float] | None]]) -> float:
    """The kernels' score at the last of these exits; NaN if it has none.

    passed: logits and distances of the exits on layers 0, 1, …
    """
    buffers = [(np.float32(x), None if y is None else np.float32(y)) for x, y in passed]
    return kernels.score(buffers, signal.code, signal.lam or 0.0, signal.table, None)


@given(st.data(), st.integers(2, 9))
def test_the_decision_on_labels_is_that_of_the_exit_rule(data: st.DataObject, classes: int) -> None:
    signal = data.draw(st.just(Entropy()) | risks(False), "signal")
    limits = st.lists(st.floats(1e-3, 0.999), min_size=classes, max_size=classes)
    thresholds = Thresholds.of(data.draw(limits))
    logits = st.lists(st.floats(-1000, 1000, width=32), min_size=classes, max_size=classes)
    passed = [data.draw(logits) for _ in range(3)]
    rule = ExitRule(0.5, signal, thresholds=thresholds)
    readings = [rule.read(layer, x, None) for layer, x in enumerate(passed)]
    buffers = [(np.float32(x), None) for x in passed]
    found = kernels.score(buffers, signal.code, 0.0, signal.table, thresholds.table)
    assert found == signal.score(readings)
    last = readings[-1]
    assert last.labels == [k for k, x in enumerate(passed[-1]) if x > thresholds.logits[k]]
    assert all(0 <= p <= 1 for p in last.probs) and 0 <= last.entropy <= 1
    with pytest.raises(ValueError, match="thresholds: has"):
        kernels.score(buffers, 0, 0.0, None, thresholds.table[:-8])


def risks(has_distances: bool) -> st.SearchStrategy[Signal]:
    """Risks of three exits; without distances, their last weight is 0."""
    weight = st.floats(-1e6, 1e6) | st.floats(-5, 5)
    last = weight if has_distances else st.just(0.0)
    return st.tuples(*[st.tuples(*[weight] * 4, last)] * 3).map(Risk)


@given(st.data(), st.integers(2, 6), st.booleans())
def test_the_decision_is_the_exit_rules(data: st.DataObject, classes: int, has_distances: bool) -> None:
    others = st.sampled_from([Entropy(), Edr(0.5), Edr(1.0), Edr(30.0)])
    signal = data.draw(others | risks(has_distances), "signal")

    def floats(low: float, high: float) -> list[float]:
        return data.draw(st.lists(st.floats(low, high, width=32), min_size=classes, max_size=classes))

    passed: list[tuple[list[float], list[float] | None]] = [
        (floats(-30, 30), floats(-(2**-20), 2) if has_distances else None)
        for _ in range(3 if isinstance(signal, Risk) else data.draw(st.integers(1, 3)))
    ]
    expected = signal.score([read(layer, *values) for layer, values in enumerate(passed)])
    score = in_c(signal, passed)
    assert math.isnan(score) if expected is None else score == expected  # bit for bit
    taus = [0.0, 1.0, data.draw(st.floats(0, 1))]
    if expected is not None:  # also exactly at the score, and just above it
        taus += [expected, min(math.nextafter(expected, 2.0), 1.0)]
    for tau in taus:
        assert kernels.exits(score, tau) == ExitRule(tau, signal).exits(expected)


def test_exits_without_a_score_never_exit_early() -> None:
    for logits in ([math.nan, 0.0], [0.0, math.nan], [math.nan, math.nan]):
        for signal in (Entropy(), Edr(1.0), Risk(((-9.0, 0.0, 0.0, 0.0, 0.0),)), Risk(((-9.0,) * 5,))):
            assert not kernels.exits(in_c(signal, [(logits, [0.1, 0.2])]), 1.0)
            assert not ExitRule(1, signal).exits(signal.score([read(0, logits, [0.1, 0.2])]))
    needs_distances, ends = Risk(((-9.0, 0.0, 0.0, 0.0, 1.0),)), Risk(((0.0,) * 5, None))
    for signal, exits in ((needs_distances, 1), (ends, 2)):  # the last exit has no risk
        assert signal.score([read(layer, [5.0, 0.0], None) for layer in range(exits)]) is None
        assert math.isnan(in_c(signal, [([5.0, 0.0], None)] * exits))


def test_without_kernels_one_warning_says_why_and_what_it_costs(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "de3.native.kernels", None)
    assert Model(Store(store).open("tiny-int8")).runtime == "onnxruntime"
    (line,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "tiny-int8:1" in line and "were not built" in line and "four times as long" in line


def test_only_int8_has_kernels(store: Path) -> None:
    assert Model(Store(store).open("tiny")).runtime == "onnxruntime"
    with pytest.raises(StoreError, match="the kernels cannot run it: only int8"):
        Model(Store(store).open("tiny"), "native")


def test_kernels_whose_states_differ_are_not_used(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = NativeSegment.run

    def wrong(segment: NativeSegment, hidden: Any, with_exit: bool) -> Any:
        step = run(segment, hidden, with_exit)
        if segment.layer == 2:
            step.hidden[0, -1] *= -1  # only those of the last token
        return step

    artifact = Store(store).open("tiny-int8")
    monkeypatch.setattr(NativeSegment, "run", wrong)
    with pytest.raises(StoreError, match="layer 2: the kernels' hidden states differ from ONNX Runtime"):
        Model(artifact, "native")
    model = Model(artifact)
    assert (model.full_runtime, model.forward) == ("onnxruntime", None)


def test_wrong_arguments_are_errors_not_crashes(native: Model) -> None:
    model = native.segments[0]._model  # type: ignore[attr-defined]
    hidden = np.zeros((1, 2, 64), np.float32)
    encoder: Any = native.manifest.encoder
    ids, longer = np.zeros((1, 2), np.int64), np.zeros((1, encoder.positions + 1), np.int64)
    big, other = (np.full((1, 2), n, np.int64) for n in (encoder.vocabulary, encoder.token_types))
    for arguments in (
        (9, hidden, None, hidden.copy(), None, None, None),  # no such layer
        (1, hidden[:, :1].copy(), None, hidden.copy(), None, None, None),  # wrong shapes
        (1, hidden, None, np.zeros((1, 2, 63), np.float32), None, None, None),
        (0, big, ids, hidden.copy(), None, None, None),  # ids outside the table
        (0, ids - 1, ids, hidden.copy(), None, None, None),
        (0, ids, other, hidden.copy(), None, None, None),
        (0, ids, ids - 1, hidden.copy(), None, None, None),
        (0, longer, longer, np.zeros((1, longer.size, 64), np.float32), None, None, None),
        (0, ids, None, hidden.copy(), None, None, None),
        (1, hidden, None, hidden.copy(), None, np.zeros(2, np.float32), None),  # no prototypes
        (1, hidden, None, hidden.copy(), None, np.zeros(1, np.float32), None),
    ):
        with pytest.raises((ValueError, TypeError, BufferError)):
            kernels.run(model, *arguments)
    with pytest.raises(ValueError, match="no metric space"):  # the last exit has none
        kernels.run(model, 3, hidden, None, hidden.copy(), None, *[np.zeros(2, np.float32)] * 2)
    before = native.segments[1].run(hidden, True)
    with pytest.raises(ValueError, match="weight"):
        kernels.set_linear(model, 1, 0, np.zeros(3, np.int8), *[np.zeros(1, np.float32)] * 2)
    assert (native.segments[1].run(hidden, True).hidden == before.hidden).all()  # has its earlier weights
    with pytest.raises(ValueError, match="no kernels for these sizes"):
        kernels.new(65, 1, 64, 1, 0, True, False, True)
    dense, bias = np.zeros((64, 64), np.float32), np.zeros(64, np.float32)
    for head in ((dense[:-1], bias, 0), (dense, bias[:-1], 0), (dense, bias, 3), (dense, bias, -1)):
        with pytest.raises(ValueError, match=r"has \d+ bytes|no such activation"):
            kernels.set_head(model, *head, True)
    prototypes = [segment._prototypes for segment in native.segments]  # type: ignore[attr-defined]
    logits, distances = np.zeros((4, 2), np.float32), np.zeros((4, 2), np.float32)

    def text(**wrong: Any) -> tuple[Any, ...]:
        fields = {"ids": ids, "types": ids, "tau": 0.0, "signal": 1, "lam": 1.0, "weights": None}
        fields |= {"deepest": 3, "ask_all": False, "tau_factor": 1.0, "thresholds": None}
        fields |= {"logits": logits, "distances": distances, "hidden": None, "states": None}
        return tuple((fields | wrong).values())

    assert kernels.forward(model, [text()], prototypes, None, 0, 3)[0][1][0] == 3
    for texts in (
        [],
        [text()] * 65,
        [(ids,)],
        [text(), text(deepest=9)],
        [text(signal=3)],
        [text(signal=2)],  # risk without weights
        [text(signal=2, weights=bytes(8 * 5 * 4 - 8))],
        [text(signal=2, weights=bytes(8 * 5 * 4 + 8))],
        [text(signal=-1)],
        [text(thresholds=bytes(8))],
        [text(ids=big)],
        [text(types=other)],
        [text(types=None)],
        [text(ids=ids[:, :0].copy(), types=ids[:, :0].copy())],
        [text(logits=logits[:2].copy())],
        [text(distances=bytes(32))],
    ):
        with pytest.raises((ValueError, TypeError, BufferError)):
            kernels.forward(model, texts, prototypes, None, 0, 3)
    with pytest.raises(ValueError, match="prototypes"):
        kernels.forward(model, [text()], prototypes[:3], None, 0, 3)
    with pytest.raises(ValueError, match="far"):
        kernels.forward(model, [text()], prototypes, np.zeros(3), 0, 3)
    for first, last in ((-1, 3), (0, 4), (2, 1), (0, 2), (1, 3)):  # the last two lack hidden states
        with pytest.raises(ValueError):
            kernels.forward(model, [text()], prototypes, None, first, last)
    for part in (np.zeros((1, 2, 63), np.float32), np.zeros((1, 3, 64), np.float32), bytes(2 * 64 * 4)):
        with pytest.raises(ValueError, match="hidden"):
            kernels.forward(model, [text(hidden=part)], prototypes, None, 0, 2)
    for states in (np.zeros((2, 64), np.float32), np.zeros((3, 63), np.float32), bytes(3 * 64 * 4)):
        with pytest.raises(ValueError, match="states"):
            kernels.forward(model, [text(states=states)], prototypes, None, 0, 3)
    for passed in ([], [(logits[0], logits)], [(logits[0, :0].copy(), None)], [(logits[0],)]):
        with pytest.raises((ValueError, TypeError)):
            kernels.score(passed, 0, 0.0, None, None)
    for wrong in (None, b"", bytes(8 * 5 - 1), bytes(8 * 5 * 2)):
        with pytest.raises(ValueError, match="weights: has"):
            kernels.score([(logits[0], None)], 2, 0.0, wrong, None)


def test_texts_that_turn_out_long_leave_their_group(native: Model) -> None:
    texts, results = ["good", "bad", "dull"], []
    # Once the texts are tokenized, a layer of each turns out to take far longer than predicted.
    job = jobs.job(texts, [0.001] * 3, model=native, group_s=0.001, layer_s=1.0)
    queue = WorkQueue(10)
    queue.put(job)
    items = queue.next()
    assert items == job.items
    assert run_group(items, queue, 1, lambda _: None, results.extend) == []
    assert [item for item, _ in results] == items[:1]
    assert [len(queue.next()) for _ in range(2)] == [1, 1]  # each alone, so it can be preempted


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
