"""Model files that mean harm, forged here: refused by name before anything runs them, or run by ONNX Runtime
only."""

import hashlib
import json
import logging
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from de3.cli import app
from model_store import prove
from model_store.graph_check import GraphError, read_graph
from model_store.model import Model
from model_store.segments import full_depth, session_options
from model_store.store import Store, StoreError
from model_store.tokenizer import TextTokenizer
from model_store.tokenizer_check import TokenizerError, check_tokenizer
from server.logs import _OneLine
from server.service import Service
from server.settings import Settings
from tests.conftest import using
from tests.serving import serving, until

RUNTIMES = ("onnxruntime", "auto")


@pytest.fixture
def copies(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "store"))


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    data, path = (folder / name).read_bytes(), folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(manifest))


def forge(store: Path, model: str, layer: int, change: Callable[[Any], None]) -> str:
    """Change a segment's ModelProto; the file's name."""
    folder = store / model / "1"
    name = f"layer_{layer:02}.onnx" if layer else "embeddings.onnx"
    proto = onnx.load_model_from_string((folder / name).read_bytes())
    change(proto)
    (folder / name).write_bytes(proto.SerializeToString())
    rehash(folder, name)
    return name


def external(tensor: Any) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "etc/passwd"), ("offset", "0")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def branch(proto: Any, which: str = "else_branch") -> Any:
    (node,) = (n for n in proto.graph.node if n.op_type == "If")
    return next(a.g for a in node.attribute if a.name == which)


def node(proto: Any, op: str) -> Any:
    return next(n for n in proto.graph.node if n.op_type == op)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("model", ["tiny", "tiny-int8"])
@pytest.mark.parametrize("where", ["initializer", "constant"])
def test_no_tensor_is_read_from_another_file(
    copies: Path, model: str, runtime: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(proto: Any) -> None:
        if where == "initializer":
            external(proto.graph.initializer[0])
        else:
            external(branch(proto).node[0].attribute[0].t)

    name = forge(copies, model, 1, change)
    monkeypatch.chdir("/")
    with pytest.raises(StoreError, match=rf"{name}: the tensor .* is kept in another file"):
        Model(Store(copies).open(model), runtime)


def test_onnx_runtime_itself_reads_no_other_file(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the check to miss one: the session looks for it in a folder that does not exist."""
    proto = onnx.load_model_from_string((store / "tiny" / "1" / "layer_01.onnx").read_bytes())
    weight = proto.graph.initializer[0]
    (tmp_path / "weights").write_bytes(weight.raw_data)
    external(weight)
    weight.external_data[0].value = "weights"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=r"nonexistent|external|not exist|No such file"):
        ort.InferenceSession(proto.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])


def looping() -> Any:
    body = helper.make_graph(
        [helper.make_node("Identity", ["condition"], ["again"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, [])],
    )
    return helper.make_node("Loop", ["most", "yes"], [], body=body)


def huge() -> Any:
    return helper.make_node("ConstantOfShape", ["shape"], ["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.graph.node.append(looping()), "the operator 'Loop' is not one"),
        (lambda p: p.graph.node.append(huge()), "the operator 'ConstantOfShape' is not one"),
        (lambda p: branch(p).node.append(huge()), "the operator 'ConstantOfShape' is not one"),
        (lambda p: p.graph.node.extend([node(p, "Add")] * 70), "more than 64 operators"),
        (lambda p: branch(p).node.append(node(p, "If")), "branches inside of branches"),
        (lambda p: p.opset_import.add(domain="evil", version=1), "version 1 of the operators 'evil'"),
        (lambda p: p.functions.add(name="f", domain="x"), "functions or training steps"),
        (lambda p: p.graph.sparse_initializer.add(), "sparse weights"),
        (lambda p: setattr(node(p, "Add"), "domain", "evil"), r"the operator 'evil.Add' is not one"),
    ],
)
def test_a_graph_holds_only_what_a_segment_is_made_of(
    copies: Path, change: Callable[[Any], None], message: str
) -> None:
    name = forge(copies, "tiny", 1, change)
    started = perf_counter()
    with pytest.raises(StoreError, match=rf"{name}: .*{message}"):
        Model(Store(copies).open("tiny"))
    assert perf_counter() - started < 10


def test_what_is_no_graph_is_refused() -> None:
    for data in (b"\x00\xff\x07", b"\x0a" * 1000, random.Random(1).randbytes(1000)):
        with pytest.raises(GraphError):
            read_graph(data)


def test_a_manifest_is_read_within_limits(copies: Path) -> None:
    path = copies / "tiny" / "1" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["calibration"]["table"] = [{}] * 200_000
    path.write_text(json.dumps(manifest))
    started = perf_counter()
    with pytest.raises(StoreError, match="at most 5000"):
        Store(copies).open("tiny")
    manifest["calibration"]["table"] = [{}] * 5_000_000
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="at most 1048576 are expected"):
        Store(copies).open("tiny")
    assert perf_counter() - started < 20


@pytest.mark.parametrize(
    ("name", "size"), [("tokenizer.json", 2**32), ("prototypes.safetensors", 2**32), ("layer_01.onnx", 2**33)]
)
def test_a_sparse_file_is_not_read(copies: Path, name: str, size: int) -> None:
    folder = copies / "tiny" / "1"
    with (folder / name).open("wb") as file:
        file.truncate(size)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=rf"{name}: {size} bytes, at most"):
        Model(Store(copies).open("tiny"))


def replace(content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def template(count: int) -> dict:
    piece = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}}
    pair = [*([piece] * count), text, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [*([piece] * count), text],
        "pair": pair,
        "special_tokens": special,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(normalizer=replace("a" * 1000)), "at most 4 characters"),
        (
            lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [replace("aaaa")] * 10}),
            "at most 4 parts may put in text",
        ),
        (lambda t: t.update(normalizer={"type": "Precompiled", "x": 1}), "'Precompiled' is not one of"),
        (
            lambda t: t.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
            ),
            "must be a string",
        ),
        (lambda t: t["model"].update(max_input_chars_per_word=10**9), "may be at most 200"),
        (lambda t: t["model"].update(type="Evil"), "'Evil' is not one of"),
        (lambda t: t["model"].update(type="BPE", dropout=0.5), "dropout"),
        (lambda t: t.update(post_processor=template(600)), "more than 16 parts around a text"),
        (lambda t: t.update(added_tokens=[{"content": "x" * 1000}]), "1 to 200 characters"),
        (lambda t: t.update(added_tokens=[{}] * 10_001), "more than 10000"),
        (lambda t: t.update(model=None), "it has no model"),
    ],
)
def test_a_tokenizer_has_only_parts_that_are_known(copies: Path, change: Callable, message: str) -> None:
    folder = copies / "tiny" / "1"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rehash(folder, "tokenizer.json")
    with pytest.raises(StoreError, match=rf"tokenizer.json: .*{message}"):
        Model(Store(copies).open("tiny"))


def test_a_tokenizer_check_survives_any_json() -> None:
    for data in (b"[]", b"1", b"{}", b"\xff", b"[" * 100_000, b'{"model": {}, "normalizer": 3}'):
        with pytest.raises(TokenizerError):
            check_tokenizer(data)


def second_exit(proto: Any) -> None:
    """One more branch behind the first, as if the exit had no metric space."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node(proto, "If"))
    for i, name in enumerate(copy.output):
        copy.output[i] = "more_" + name
    proto.graph.node.append(copy)


@pytest.mark.parametrize("model", ["tiny", "tiny-int8"])
def test_exits_are_those_of_the_manifest(copies: Path, model: str) -> None:
    name = forge(copies, model, 1, second_exit)
    with pytest.raises(StoreError, match=rf"{name}: it has another exit than the manifest says"):
        Model(Store(copies).open(model))


def attribute(proto: Any, op: str, **values: Any) -> None:
    for name, value in values.items():
        for graph in (proto.graph, *([branch(proto, "then_branch")] if op == "Gemm" else [])):
            for n in graph.node:
                if n.op_type == op:
                    kept = [a for a in n.attribute if a.name != name]
                    del n.attribute[:]
                    n.attribute.extend([*kept, helper.make_attribute(name, value)])


def zero_point(proto: Any) -> None:
    product = node(proto, "DynamicQuantizeMatMul")
    size = next(w.dims[1] for w in proto.graph.initializer if w.name == product.input[1])
    proto.graph.initializer.append(numpy_helper.from_array(np.full(size, 3, np.int8), "zero"))
    product.input[3] = "zero"


def other_residual(proto: Any) -> None:
    adds = [n for n in proto.graph.node if n.op_type == "Add"]
    adds[1].input[1] = "hidden"  # instead of what the first norm gave


def other_activation(proto: Any) -> None:
    for n in proto.graph.node:
        if n.op_type in ("Gelu", "Relu"):
            n.op_type, n.domain = "FastGelu", "com.microsoft"


def infinite_weight(proto: Any) -> None:
    weight = next(w for w in proto.graph.initializer if w.data_type == TensorProto.FLOAT)
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] = np.inf
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


FOREIGN = [
    (lambda p: attribute(p, "QAttention", unidirectional=1), "QAttention .* has another unidirectional"),
    (lambda p: attribute(p, "LayerNormalization", axis=1), "LayerNormalization .* has another axis"),
    (lambda p: attribute(p, "Gemm", alpha=0.5), "Gemm .* has another alpha"),
    (zero_point, "DynamicQuantizeMatMul .* takes another value"),
    (other_residual, "Add .* takes another value"),
    (other_activation, "operator 7 is FastGelu"),
    (infinite_weight, "QAttention .* a weight that is not finite"),
]


@pytest.mark.parametrize(("change", "why"), FOREIGN)
def test_a_graph_that_computes_something_else_has_no_kernels(
    kernels: Any, copies: Path, change: Callable[[Any], None], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert Model(Store(copies).open("tiny-int8")).runtime == "native"
    forge(copies, "tiny-int8", 1, change)
    artifact = Store(copies).open("tiny-int8")
    with caplog.at_level(logging.INFO, "de3"):
        assert Model(artifact).runtime == "onnxruntime"
    assert f"layer 1: {why.split(' .* ', maxsplit=1)[0]}" in caplog.text
    with pytest.raises(StoreError, match=rf"layer 1: .*{why}"):
        Model(artifact, "native")


@pytest.mark.parametrize("seed", range(60))
def test_a_mutated_graph_is_refused_or_gives_what_onnx_runtime_gives(
    kernels: Any, copies: Path, seed: int
) -> None:
    rng = random.Random(seed)

    def mutate(proto: Any) -> None:
        graph = rng.choice([proto.graph, proto.graph, branch(proto, "then_branch"), branch(proto)])
        one, other = rng.choice(graph.node), rng.choice(graph.node)
        match rng.randrange(6):
            case 0:
                graph.node.remove(one)
            case 1:
                i, j = rng.randrange(len(one.input) or 1), rng.randrange(len(other.input) or 1)
                if one.input and other.input:
                    one.input[i], other.input[j] = other.input[j], one.input[i]
            case 2:
                one.op_type = other.op_type
            case 3:
                for a in one.attribute:
                    a.i, a.f = a.i + 1, -a.f
            case 4:
                weight = rng.choice(proto.graph.initializer)
                array = numpy_helper.to_array(weight)
                weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array[..., ::-1]), weight.name))
            case _:
                weight = rng.choice(proto.graph.initializer)
                weight.dims.append(1)

    forge(copies, "tiny-int8", rng.choice([1, 2]), mutate)
    try:
        model = Model(Store(copies).open("tiny-int8"))
    except StoreError:
        return
    if model.runtime == "native":
        reference = Model(Store(copies).open("tiny-int8"), "onnxruntime")
        for text in ("good", "the film is not bad , but long and dull " * 5):
            tokens = model.tokenize(text)
            sides = (full_depth(m.segments, tokens) for m in (model, reference))
            for a, b in zip(*sides, strict=True):
                if a.logits is not None:
                    assert np.abs(a.logits - b.logits).max() < 0.2
                if a.distances is not None:
                    assert np.abs(a.distances - b.distances).max() < 0.2


def test_the_kernels_give_no_distances_without_a_metric_space(kernels: Any, store: Path) -> None:
    model = Model(Store(store).open("tiny-int8"), "native")
    last: Any = model.segments[-1]
    hidden = np.zeros((1, 2, 64), np.float32)
    logits, distances = np.zeros(2, np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="no metric space"):
        kernels.run(last._model, last.layer, hidden, None, hidden.copy(), None, logits, distances)


def test_what_is_not_a_number_stays_none(kernels: Any, store: Path) -> None:
    model = Model(Store(store).open("tiny-int8"), "native")
    for name in kernels.implementations():
        with using(name):
            step = model.segments[1].run(np.full((1, 3, 64), np.nan, np.float32), True)
        assert step.logits is not None and step.distances is not None
        assert np.isnan(step.logits).all() and np.isnan(step.distances).all()


def test_weights_that_are_refused_leave_those_before(kernels: Any, store: Path) -> None:
    model = Model(Store(store).open("tiny-int8"), "native")
    layer: Any = model.segments[1]
    hidden = np.random.default_rng(1).normal(size=(1, 5, 64)).astype(np.float32)
    before = layer.run(hidden, True)
    with pytest.raises(ValueError, match="weight"):
        kernels.set_linear(layer._model, 1, 0, np.zeros(3, np.int8), *[np.zeros(1, np.float32)] * 2)
    after = layer.run(hidden, True)
    assert (before.hidden == after.hidden).all() and (before.logits == after.logits).all()


def test_a_text_without_tokens_is_an_error(store: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="has no tokens"):
        TextTokenizer(tokenizer, 16).start("\u2003", None, True).all()


def test_a_store_with_a_bad_model_serves_the_others(copies: Path) -> None:
    forge(copies, "tiny", 1, lambda p: p.graph.node.append(looping()))  # the first of them
    (copies / "worse" / "1").mkdir(parents=True)
    (copies / "worse" / "1" / "manifest.json").write_text("{}")
    with serving(copies) as server:
        assert server.classify(input="good").json()["model"] == "tiny-int8:1"
        assert server.classify(input="good", model="tiny").status_code == 404
    with pytest.raises(StoreError, match="schema version None"):
        Service(Settings(store=copies, models=["worse"]))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.abort()", "ends the process that loads it"),
        ("import os; os.kill(os.getpid(), 9)", "was killed, probably for lack of memory"),
        ("import time; time.sleep(60)", "takes more than 1 s"),
        ("from model_store.prove import child; bytearray(2**33)", "MemoryError"),
    ],
)
def test_what_ends_the_process_that_proves_a_model_ends_no_other(
    store: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    monkeypatch.setattr(prove, "TIMEOUT_S", 1.0 if "sleep" in code else 60.0)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31)); "
    monkeypatch.setattr(prove, "PROGRAM", limit + code)
    with pytest.raises(StoreError, match=says):
        prove.Prover().prove(Store(store).open("tiny"), "auto")


def test_a_graph_of_known_operators_cannot_take_all_memory(copies: Path) -> None:
    def outer_product(proto: Any) -> None:  # 160 kB of weights, 3.6 GB of their sum
        graph = proto.graph
        for name, shape in (("column", (1, 30_000, 1)), ("row", (1, 1, 30_000))):
            graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
        for n in graph.node:
            n.input[:] = ["shifted" if x == "hidden" else x for x in n.input]
        nodes = [
            helper.make_node("Add", ["column", "row"], ["large"]),
            helper.make_node("ReduceMean", ["large"], ["small"], axes=[1, 2], keepdims=1),
            helper.make_node("Add", ["hidden", "small"], ["shifted"]),
        ]
        for n in reversed(nodes):
            graph.node.insert(0, n)

    forge(copies, "tiny", 1, outer_product)
    with pytest.raises(StoreError, match=r"allocate|alloc|memory"):
        prove.Prover().prove(Store(copies).open("tiny"), "auto")


def test_proving_says_what_is_wrong_and_can_be_stopped(
    store: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prover = prove.Prover()
    prover.prove(Store(store).open("tiny"), "auto")
    name = forge(copies, "tiny", 1, lambda p: p.graph.node.append(huge()))
    with pytest.raises(StoreError, match=rf"^\S*{name}: the operator 'ConstantOfShape'"):
        prover.prove(Store(copies).open("tiny"), "auto")
    monkeypatch.setattr(prove, "PROGRAM", "import time; time.sleep(600)")
    failed: list[StoreError] = []

    def waiting() -> None:
        try:
            prover.prove(Store(store).open("tiny"), "auto")
        except StoreError as error:
            failed.append(error)

    thread = threading.Thread(target=waiting)
    thread.start()
    until(lambda: prover._running is not None, "the process")
    prover.stop()
    thread.join(20)
    assert failed and not thread.is_alive()
    with pytest.raises(StoreError, match="the server stops"):
        prover.prove(Store(store).open("tiny"), "auto")


def test_verify_finds_what_is_wrong_without_running_it(kernels: Any, copies: Path) -> None:
    forge(copies, "tiny", 1, lambda p: p.graph.node.append(looping()))
    forge(copies, "tiny-int8", 1, other_residual)
    result = CliRunner().invoke(app, ["models", "verify", "--store", str(copies)])
    assert result.exit_code == 1
    assert "tiny:1  NOT SOUND" in result.output and "'Loop' is not one" in result.output
    assert "tiny-int8:1  sound, without kernels: layer 1: Add" in result.output


def test_a_log_message_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("de3", logging.ERROR, "", 0, "a\n2026 INFO de3: forged\rx", None, None)
    assert _OneLine("%(message)s").format(record) == "a\\n2026 INFO de3: forged\\rx"
