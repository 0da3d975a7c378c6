"""Malicious model files, forged here: refused by name before anything runs them, or harmless."""

import asyncio
import hashlib
import json
import logging
import random
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import thread_time  # CPU time of this thread, so that a busy machine does not matter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from de3.model_store.graph import GraphError
from de3.model_store.graph_check import read_model
from de3.model_store.model import Model
from de3.model_store.printable import printable
from de3.model_store.segments import full_depth, session_options
from de3.model_store.store import Store, StoreError
from de3.model_store.tokenizer import TextTokenizer
from de3.model_store.tokenizer_check import TokenizerError, check_tokenizer
from de3.server import prove
from de3.server.background import in_background
from de3.server.engine.timing import Timing
from de3.server.errors import RequestError
from de3.server.logs import JsonFormatter, TextFormatter
from de3.server.models import find, load, newest
from de3.server.rules import Rules
from de3.server.service import Service
from de3.server.settings import ExitOptions, Settings
from tests.commands import invoke
from tests.fixtures import using
from tests.serving import serving, until

RUNTIMES = ("onnxruntime", "auto")


@pytest.fixture
def copies(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "store"))


def edit(folder: Path, change: Callable[[dict], Any]) -> None:
    """Apply `change` to the manifest of an artifact, as JSON."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rehash(folder: Path, name: str) -> None:
    """Set the hash and the size of a changed file in the manifest."""
    data = (folder / name).read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit(folder, lambda m: m["files"].update({name: entry}))


def forge(store: Path, model: str, layer: int, change: Callable[[Any], None]) -> str:
    """Apply `change` to a segment's ModelProto, and update the manifest; returns the name of the file.

    layer: 0 stands for the embeddings.
    """
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
    graph = getattr(proto, "graph", proto)  # a branch is a graph itself
    return next(n for n in graph.node if n.op_type == op)


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
    with pytest.raises(StoreError, match=rf"{name}: TensorProto has the field (data_location|external_data)"):
        Model(Store(copies).open(model), runtime)


def test_onnx_runtime_itself_reads_no_other_file(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the check missed an external tensor, the session would look for the file in a folder that does not exist."""
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
        (lambda p: p.graph.node.append(looping()), "branch has the field input"),
        (lambda p: p.graph.node.append(huge()), "it has 14 operators, not 13"),
        (lambda p: branch(p).node.append(huge()), "If, has unexpected 'else_branch'"),
        (lambda p: p.graph.node.insert(3, huge()), "operator 4 is ConstantOfShape, not"),
        (lambda p: p.graph.node.extend([node(p, "Add")] * 70), "it has 83 operators, not 13"),
        (lambda p: branch(p).node.append(node(p, "If")), "If, has unexpected 'else_branch'"),
        (lambda p: p.graph.node.extend([onnx.NodeProto()] * 20_000), "more than 10000 fields"),
        (lambda p: p.opset_import.add(domain="evil", version=1), "version 1 of the operators 'evil'"),
        (lambda p: p.functions.add(name="f", domain="x"), "ModelProto has the field functions"),
        (lambda p: p.metadata_props.add(key="x", value="y"), "ModelProto has the field metadata_props"),
        (lambda p: p.graph.sparse_initializer.add(), "GraphProto has the field sparse_initializer"),
        (
            lambda p: setattr(node(p, "LayerNormalization"), "domain", "evil"),
            "LayerNormalization, has unexpected 'domain'",
        ),
        (lambda p: setattr(node(p, "Add"), "name", "x"), "NodeProto has the field name"),
        (lambda p: node(p, "Add").output.append("\x1b[31mx\n"), r"'\\x1b\[31mx\\n' is not a name"),
        (lambda p: node(p, "Add").output.append("x" * 201), "is not a name of at most 200 printable"),
        (lambda p: node(p, "Add").output.append("x" * 2**20), "a name or list of 1048576 bytes"),
    ],
)
def test_a_graph_holds_only_the_operators_of_a_segment(
    copies: Path, change: Callable[[Any], None], message: str
) -> None:
    name = forge(copies, "tiny", 1, change)
    started = thread_time()
    with pytest.raises(StoreError, match=rf"{name}: .*{message}"):
        Model(Store(copies).open("tiny"))
    assert thread_time() - started < 10


def test_bytes_that_are_not_a_graph_are_refused() -> None:
    for data in (b"\x00\xff\x07", b"\x0a" * 1000, random.Random(1).randbytes(1000)):
        with pytest.raises(GraphError):
            read_model(data)


def test_a_manifest_is_read_within_limits(copies: Path) -> None:
    path = copies / "tiny" / "1" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["calibration"]["table"] = [{}] * 200_000
    path.write_text(json.dumps(manifest))
    started = thread_time()
    with pytest.raises(StoreError, match="at most 5000"):
        Store(copies).open("tiny")
    manifest["calibration"]["table"] = [{}] * 5_000_000
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="at most 1048576 are expected"):
        Store(copies).open("tiny")
    assert thread_time() - started < 20


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("tokenizer.json", 2**30, f"tokenizer.json: {2**30} bytes, at most"),
        ("prototypes.safetensors", 2**30, f"prototypes.safetensors: {2**30} bytes, at most"),
        ("layer_01.onnx", 2**33, "layer_01.onnx.bytes: Input should be less than"),
    ],
)
def test_a_sparse_file_is_not_read(copies: Path, name: str, size: int, says: str) -> None:
    folder = copies / "tiny" / "1"
    with (folder / name).open("wb") as file:
        file.truncate(size)
    edit(folder, lambda m: m["files"].update({name: {"sha256": "0" * 64, "bytes": size}}))
    with pytest.raises(StoreError, match=says):
        Model(Store(copies).open("tiny"))


def replace(content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def replaces(*contents: str) -> dict:
    return {"type": "Sequence", "normalizers": [replace(content) for content in contents]}


LONG = "x" * 201


def template(count: int, **special_token: Any) -> dict:
    piece = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"], **special_token}}
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
        (lambda t: t.update(normalizer=replace("a" * 5)), "at most 4 characters"),
        (lambda t: t.update(normalizer=replaces("aaaa", "aa")), "at most 4 times as long"),
        (lambda t: t.update(normalizer=replaces("aaaa", "aaaa", "aaaa", "aaaa")), "at most 4 times as long"),
        (
            lambda t: t.update(
                normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "a"}
            ),
            "must be a non-empty string, or a known regular expression",
        ),
        (
            lambda t: t.update(normalizer={"type": "Replace", "pattern": {"Regex": ["a"]}, "content": "a"}),
            "must be a non-empty string",
        ),
        (
            lambda t: t.update(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Replace", "pattern": {"Regex": r"\s{2,}|[\n\r\t]"}, "content": "aaaa"},
                        replace("aa"),
                    ],
                }
            ),
            "at most 4 times as long",
        ),
        (lambda t: t.update(normalizer={"type": "Prepend", "prepend": "abcd"}), "at most 4 times as long"),
        (lambda t: t.update(normalizer={"type": []}), r"'\[\]' is not one of"),
        (
            lambda t: t.update(normalizer={"type": "Precompiled", "x": 1}),
            "Precompiled has no precompiled_charsmap",
        ),
        (
            lambda t: t.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
            ),
            "must be a non-empty string",
        ),
        (lambda t: t["model"].update(max_input_chars_per_word=10**9), "may be at most 200"),
        (lambda t: t["model"].update(type="Evil"), "'Evil' is not one of"),
        (lambda t: t["model"].update(type="BPE", dropout=0.5), "dropout"),
        (lambda t: t.update(post_processor=template(600)), "more than 16 parts around a text"),
        (lambda t: t.update(added_tokens=[{"content": ""}]), "1 to 200 characters"),
        (lambda t: t.update(added_tokens=[{"content": LONG}]), "no string may have more than 200"),
        (lambda t: t["model"]["vocab"].update({LONG: 7}), "no string may have more than 200"),
        (lambda t: t["model"].update(type="Unigram", vocab=[[LONG, -1.0]]), "no string may have more"),
        (lambda t: t["model"].update(merges=[LONG * 2 + "  "]), "no string may have more than 401"),
        (lambda t: t["model"].update(unk_token=LONG), "no string may have more than 200"),
        (lambda t: t["model"].update(continuing_subword_prefix=LONG), "no string may have more than 200"),
        (lambda t: t["model"].update(end_of_word_suffix=LONG), "no string may have more than 200"),
        (lambda t: t.update(post_processor=template(1, tokens=[LONG])), "no string may have more than 200"),
        (lambda t: t.update(post_processor=template(1, tokens=["x"] * 17)), "more than 16 tokens"),
        (lambda t: t.update(post_processor=template(1, ids=[1] * 17)), "more than 16 ids"),
        (
            lambda t: t.update(post_processor={"type": "BertProcessing", "sep": [LONG, 3], "cls": ["x", 2]}),
            "no string may have more than 200",
        ),
        (lambda t: t.update(added_tokens=[{}] * 10_001), "more than 10000"),
        (lambda t: t.update(model=None), "it has no model"),
    ],
)
def test_a_tokenizer_has_only_known_parts(copies: Path, change: Callable, message: str) -> None:
    folder = copies / "tiny" / "1"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rehash(folder, "tokenizer.json")
    with pytest.raises(StoreError, match=rf"tokenizer.json: .*{message}"):
        Model(Store(copies).open("tiny"))


def special(t: dict[str, Any], **fields: Any) -> None:
    """Set fields of the [SEP] entry in a tokenizer's post-processor."""
    t["post_processor"]["special_tokens"]["[SEP]"].update(fields)


@pytest.mark.parametrize("model", ["tiny", "tiny-int8"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update(beyond=60), "has the id 60, but the model's word table only"),
        (
            lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 60, "content": "beyond"}),
            "has the id [0-9]+, but the model's word table only",
        ),
        (lambda t: special(t, ids=[60]), "has the id 60, but the model's word table only"),
        (
            lambda t: t["post_processor"]["pair"][3]["Sequence"].update(type_id=2),
            "has the token type 2, but the model's table only 2 rows",
        ),
    ],
)
def test_a_tokenizer_has_no_ids_beyond_the_models_tables(
    copies: Path, model: str, change: Callable, message: str
) -> None:
    folder = copies / model / "1"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rehash(folder, "tokenizer.json")
    with pytest.raises(StoreError, match=rf"tokenizer.json: {message}"):
        Model(Store(copies).open(model))


TWICE = b'{"model": {"unk_token": "a", "unk_token": "b"}}'  # parsers differ in the value that they use


def test_a_tokenizer_check_survives_any_json() -> None:
    for data in (b"[]", b"1", b"{}", b"\xff", b"[" * 100_000, b'{"model": {}, "normalizer": 3}', TWICE):
        with pytest.raises(TokenizerError):
            check_tokenizer(data)


def second_exit(proto: Any) -> None:
    """Append a copy of the If node that computes the exit."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node(proto, "If"))
    for i, name in enumerate(copy.output):
        copy.output[i] = "more_" + name
    proto.graph.node.append(copy)


@pytest.mark.parametrize("model", ["tiny", "tiny-int8"])
def test_exits_are_those_of_the_manifest(copies: Path, model: str) -> None:
    name = forge(copies, model, 1, second_exit)
    with pytest.raises(StoreError, match=rf"{name}: it has .* operators, not"):
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
    adds[-1].input[1] = "hidden"  # instead of the output of the first norm


def other_activation(store: Path) -> None:
    """Change the activation of tiny-int8 from gelu to gelu_tanh."""

    def change(proto: Any) -> None:
        for n in proto.graph.node:
            if n.op_type == "Gelu":
                n.op_type = "FastGelu"

    for layer in (1, 2, 3):
        forge(store, "tiny-int8", layer, change)
    edit(store / "tiny-int8" / "1", lambda m: m["encoder"].update(activation="gelu_tanh"))


def infinite_weight(proto: Any) -> None:
    weight = next(w for w in proto.graph.initializer if w.data_type == TensorProto.FLOAT and w.dims)
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] = np.inf
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def shadowed_weight(name: str) -> Callable[[Any], None]:
    """A change that gives the exit's branch a weight of its own, with the name of a value outside the branch."""

    def change(proto: Any) -> None:
        inner = branch(proto, "then_branch")
        own = node(inner, "Gemm").input[1] if name == "weight" else name
        inner.initializer.append(numpy_helper.from_array(np.ones((64, 2), np.float32), own))

    return change


def wide_logits(proto: Any) -> None:
    """Make the exit return logits of shape (1, 5), although they are declared as (1, 2)."""
    gemm = node(branch(proto, "then_branch"), "Gemm")
    for i, array in ((1, np.zeros((64, 5), np.float32)), (2, np.zeros(5, np.float32))):
        name = gemm.input[i]
        weight = next(w for w in proto.graph.initializer if w.name == name)
        weight.CopyFrom(numpy_helper.from_array(array, name))


def other_zeros(proto: Any) -> None:
    inner = branch(proto)
    inner.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(np.zeros((1, 5), np.float32)))


def prepend(proto: Any, *nodes: Any, **weights: np.ndarray) -> None:
    """Insert nodes that compute `shifted` from `hidden` at the start of a layer."""
    for n in proto.graph.node:
        n.input[:] = ["shifted" if x == "hidden" else x for x in n.input]
    for n in reversed(nodes):
        proto.graph.node.insert(0, n)
    proto.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())


def slow(proto: Any) -> None:
    """Add twelve products of 3500 × 3500 matrices, computed from 28 kB of weights."""
    prepend(
        proto,
        helper.make_node("Mul", ["column", "row"], ["x0"]),
        *(helper.make_node("MatMul", ["x0", f"x{i}"], [f"x{i + 1}"]) for i in range(12)),
        helper.make_node("ReduceMean", ["x12"], ["small"], axes=[0, 1], keepdims=0),
        helper.make_node("Add", ["hidden", "small"], ["shifted"]),
        column=np.ones((3500, 1), np.float32),
        row=np.ones((1, 3500), np.float32),
    )


def outer_product(proto: Any) -> None:
    """Insert a 3.6 GB intermediate tensor, the outer sum of 240 kB of weights."""
    prepend(
        proto,
        helper.make_node("Add", ["column", "row"], ["large"]),
        helper.make_node("ReduceMean", ["large"], ["small"], axes=[1, 2], keepdims=1),
        helper.make_node("Add", ["hidden", "small"], ["shifted"]),
        column=np.ones((1, 30_000, 1), np.float32),
        row=np.ones((1, 1, 30_000), np.float32),
    )


def more_for_one_word(proto: Any) -> None:
    """Make the memory that a text takes depend on its words, so that a trial run need not reveal it."""
    graph = proto.graph
    for name, array in (
        ("sizes", np.ones(64, np.float32)),
        ("column", np.ones((1, 30_000, 1), np.float32)),
        ("zero", np.zeros(1, np.int64)),
        ("one", np.ones(1, np.int64)),
    ):
        graph.initializer.append(numpy_helper.from_array(array, name))
    at = next(i for i, n in enumerate(graph.node) if n.op_type == "If")
    for n in graph.node[at - 1 : at]:
        n.output[:] = ["before"]
    nodes = [
        helper.make_node("Gather", ["sizes", "input_ids"], ["wanted"]),
        helper.make_node("ReduceMean", ["wanted"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Cast", ["mean"], ["end"], to=TensorProto.INT64),
        helper.make_node("Slice", ["column", "zero", "end", "one"], ["some"]),
        helper.make_node("ReduceMean", ["some"], ["small"], axes=[1, 2], keepdims=1),
        helper.make_node("Add", ["before", "small"], ["hidden"]),
    ]
    for n in reversed(nodes):
        graph.node.insert(at, n)


def unused_weight(proto: Any) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "more"))


def weight_twice(proto: Any) -> None:
    weight = proto.graph.initializer[0]
    proto.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, weight.name))


def few_positions(proto: Any) -> None:
    name = node(proto, "Slice").input[0]
    weight = next(w for w in proto.graph.initializer if w.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:1].copy(), name))


BOTH, INT8 = ("tiny", "tiny-int8"), ("tiny-int8",)
FOREIGN = [
    (
        INT8,
        1,
        lambda p: attribute(p, "MultiHeadAttention", unidirectional=1),
        "MultiHeadAttention, has unexpected 'unidirectional'",
    ),
    (INT8, 1, lambda p: attribute(p, "MultiHeadAttention", num_heads=2**40), "has unexpected 'num_heads'"),
    (INT8, 1, zero_point, "DynamicQuantizeMatMul, has unexpected 'input'"),
    (
        BOTH,
        1,
        lambda p: attribute(p, "LayerNormalization", axis=1),
        "LayerNormalization, has unexpected 'axis'",
    ),
    (BOTH, 1, lambda p: attribute(p, "LayerNormalization", epsilon=float("nan")), "has unexpected 'epsilon'"),
    (BOTH, 1, lambda p: attribute(p, "Gemm", alpha=0.5), "If, has unexpected 'then_branch'"),
    (BOTH, 1, other_residual, "Add, has unexpected 'input'"),
    (BOTH, 1, infinite_weight, "is not finite"),
    (BOTH, 1, shadowed_weight("weight"), "branch has the field initializer"),
    (BOTH, 1, shadowed_weight("next_hidden"), "branch has the field initializer"),
    (BOTH, 1, wide_logits, r"classifier.weight\) must be float32 of shape \[64, 2\], got \[64, 5\]"),
    (BOTH, 1, other_zeros, "If, has unexpected 'else_branch'"),
    (BOTH, 1, slow, "operator 1 is Mul, not"),
    (BOTH, 1, outer_product, "operator 1 is Add, not"),
    (BOTH, 0, more_for_one_word, "LayerNormalization, has unexpected 'output'"),
    (BOTH, 0, few_positions, r"position.weight\) must be float32 of shape \[64, 64\], got \[1, 64\]"),
    (BOTH, 1, unused_weight, "weights and constants, not"),
    (BOTH, 1, weight_twice, "weights and constants, not"),
]


@pytest.mark.parametrize(
    ("model", "layer", "change", "why"),
    [(model, *rest) for models_, *rest in FOREIGN for model in models_],
)
def test_a_graph_that_export_does_not_build_is_refused(
    copies: Path, model: str, layer: int, change: Callable[[Any], None], why: str
) -> None:
    name = forge(copies, model, layer, change)
    for runtime in RUNTIMES:
        with pytest.raises(StoreError, match=rf"{name}: .*{why}"):
            Model(Store(copies).open(model), runtime)


def test_a_model_without_kernels_runs_on_onnx_runtime(
    kernels: Any, copies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Model(Store(copies).open("tiny-int8")).runtime == "native"
    other_activation(copies)
    artifact = Store(copies).open("tiny-int8")
    with caplog.at_level(logging.INFO, "de3"):
        model = Model(artifact)
    assert model.runtime == "onnxruntime" and model.full_depth(model.tokenize("good"))
    assert model.why_not_native == "there is no kernel for the activation gelu_tanh"
    assert "runs on ONNX Runtime: there is no kernel for the activation gelu_tanh" in caplog.text
    with pytest.raises(StoreError, match="there is no kernel for the activation gelu_tanh"):
        Model(artifact, "native")


def test_a_file_with_many_fields_is_refused_before_it_is_parsed() -> None:
    inner = b"\x0a\x00" * 12_000_000  # empty operators, which take a hundred bytes each in memory
    size = b"".join(bytes([len(inner) >> shift & 127 | 128]) for shift in (0, 7, 14)) + bytes(
        [len(inner) >> 21]
    )
    started = thread_time()
    with pytest.raises(GraphError, match="more than 10000 fields"):
        read_model(b"\x08\x08\x3a" + size + inner)
    assert thread_time() - started < 1
    nested = b""
    for _ in range(3000):  # nested operators, each with a graph as its attribute
        nested = b"\x32" + onnx.AttributeProto(s=nested).SerializeToString()[1:]
    with pytest.raises(GraphError):
        read_model(nested)


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
                weight.CopyFrom(numpy_helper.from_array(np.flip(array).copy(), weight.name))
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


def test_nan_stays_nan(kernels: Any, store: Path) -> None:
    model = Model(Store(store).open("tiny-int8"), "native")
    for name in kernels.implementations():
        with using(name):
            step = model.segments[1].run(np.full((1, 3, 64), np.nan, np.float32), True)
        assert step.logits is not None and step.distances is not None
        assert np.isnan(step.logits).all() and np.isnan(step.distances).all()


def test_refused_weights_leave_the_earlier_ones_in_place(kernels: Any, store: Path) -> None:
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
    forge(copies, "tiny", 1, lambda p: p.graph.node.append(looping()))  # the first model of the store
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
        ("import os; os.abort()", "crashes the process that loads it"),
        ("import os; os.kill(os.getpid(), 9)", "was killed, probably for lack of memory"),
        ("import time; time.sleep(60)", "takes more than 1 s"),
        ("from de3.server.prove import child; bytearray(2**33)", "MemoryError"),
    ],
)
def test_an_error_that_ends_the_proving_process_ends_no_other(
    store: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    monkeypatch.setattr(prove, "TIMEOUT_S", 1.0 if "sleep" in code else 60.0)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31)); "
    monkeypatch.setattr(prove, "PROGRAM", limit + code)
    with pytest.raises(StoreError, match=says):
        prove.Prover().prove(Store(store).open("tiny"), "auto")


def test_a_valid_graph_cannot_take_all_memory(copies: Path) -> None:
    tokens = 32_768  # attention over so many tokens needs 16 GiB

    def more_positions(proto: Any) -> None:
        name = node(proto, "Slice").input[0]
        weight = next(w for w in proto.graph.initializer if w.name == name)
        weight.CopyFrom(numpy_helper.from_array(np.ones((tokens, 64), np.float32), name))

    forge(copies, "tiny", 0, more_positions)
    edit(
        copies / "tiny" / "1", lambda m: (m.update(max_tokens=tokens), m["encoder"].update(positions=tokens))
    )
    with pytest.raises(StoreError, match=r"allocate|alloc|memory"):
        prove.Prover().prove(Store(copies).open("tiny"), "auto")


def test_proving_says_what_is_wrong_and_can_be_stopped(
    store: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prover = prove.Prover()
    prover.prove(Store(store).open("tiny"), "auto")
    name = forge(copies, "tiny", 1, lambda p: p.graph.node.append(huge()))
    with pytest.raises(StoreError, match=rf"^\S*{name}: it has 14 operators"):
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
    with pytest.raises(StoreError, match="the server is stopping"):
        prover.prove(Store(store).open("tiny"), "auto")


def test_verify_finds_what_is_wrong_without_running_it(kernels: Any, copies: Path) -> None:
    forge(copies, "tiny", 1, lambda p: p.graph.node.append(looping()))
    other_activation(copies)
    result = invoke(f"models verify --store {copies}")
    assert result.exit_code == 1
    assert "tiny:1  DAMAGED" in result.output and "branch has the field input" in result.output
    assert "tiny-int8:1  valid, without kernels: " in result.output


def test_the_proof_includes_the_measurements_of_loading(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on which the server's own measurements fail is refused before the server makes them."""
    code = "import os, de3.server.engine.timing as t; t._run = lambda *a: os.abort(); "
    monkeypatch.setattr(prove, "PROGRAM", code + prove.PROGRAM)
    with pytest.raises(StoreError, match="crashes the process that loads it"):
        prove.Prover().prove(Store(store).open("tiny"), "auto")


def test_loading_in_the_server_can_be_stopped_and_takes_no_longer(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, prover = Store(store).open("tiny-int8"), prove.Prover()
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    model = Model(artifact, check=count)
    loaded = calls
    Timing(model, count)
    assert loaded > 4 and calls > loaded + 3 * 5  # before each layer of each text, and before each timed text
    monkeypatch.setattr(prove, "TIMEOUT_S", 0.0)
    late = prover.limit(artifact)
    with pytest.raises(StoreError, match="takes more than 0 s"):
        load(artifact, Settings(store=store), late)
    monkeypatch.setattr(prove, "TIMEOUT_S", 60.0)
    check = prover.limit(artifact)
    prover.stop()
    for step in (lambda: Model(artifact, check=check), lambda: Timing(model, check)):
        with pytest.raises(StoreError, match="the server is stopping"):
            step()


def test_stopping_the_server_does_not_wait_for_a_loading_model() -> None:
    async def main() -> None:
        assert await in_background(lambda: 3) == 3
        with pytest.raises(StoreError, match="bad"):
            await in_background(lambda: raise_(StoreError("bad")))
        asyncio.get_running_loop().create_task(in_background(done.wait))
        await asyncio.sleep(0.01)

    done = threading.Event()
    asyncio.run(main())  # ends although the event is never set
    assert all(t.daemon for t in threading.enumerate() if t.name == "de3-load")
    done.set()


def raise_(error: Exception) -> Any:
    raise error


DIGITS = 10**4299


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"]["layer_01.onnx"].update(bytes=2**31), "bytes: Input should be less than"),
        (lambda m: m["files"]["layer_01.onnx"].update(bytes=DIGITS), "bytes: Input should be less than"),
        (lambda m: m.update(created=DIGITS), "created: Input should be less than"),
        (lambda m: m.update(version=DIGITS), "version: Input should be less than"),
        (lambda m: m["encoder"].update(hidden_size=2**40), "hidden_size: Input should be less than"),
        (lambda m: m.update(metric_dim=2**40), "metric_dim: Input should be less than"),
        (lambda m: m.update(exit_layers=[DIGITS]), "exit_layers.0: Input should be less than"),
        (lambda m: m["calibration"].update(tune_size=DIGITS), "tune_size: Input should be less than"),
        (
            lambda m: m["files"].update({"layer_99.onnx": m["files"]["layer_01.onnx"]}),
            "may not contain 'layer_99",
        ),
        (lambda m: m["files"].update({"x" * 10**5: m["files"]["layer_01.onnx"]}), "may not contain 'xxx"),
        (lambda m: m.update({"y" * 10**5: 1}), "yyy: Extra inputs"),
        (lambda m: m.update(schema_version="z" * 10**5), "schema version 'zzz"),
    ],
)
def test_a_manifest_has_no_oversized_number_and_no_unknown_file(
    copies: Path, change: Callable, message: str
) -> None:
    edit(copies / "tiny" / "1", change)
    with pytest.raises(StoreError, match=message) as caught:
        Store(copies).open("tiny")
    assert len(str(caught.value)) < 600


def test_memory_limits_follow_the_actual_files(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copies / "tiny" / "1"
    artifact = Store(copies).open("tiny")
    files = [folder / name for name in artifact.manifest.required_files()]
    assert artifact.size() == sum(file.stat().st_size for file in files)
    edit(folder, lambda m: m["files"]["layer_01.onnx"].update(bytes=2**31 - 1))
    assert Store(copies).open("tiny").size() == artifact.size()
    monkeypatch.setattr("de3.model_store.store.MAX_ARTIFACT_BYTES", 1000)
    with pytest.raises(StoreError, match="bytes, at most 1000 are allowed"):
        prove.Prover().prove(artifact, "auto")


def test_any_error_in_one_model_leaves_the_others(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = copies / "loop" / "1"
    loop.mkdir(parents=True)
    (loop / "manifest.json").symlink_to("manifest.json")
    with pytest.raises(StoreError, match="cannot be read"):
        Store(copies).open("loop")
    opened, served = Store.open, []

    def broken(store: Store, model: str) -> Any:
        return opened(store, model) if model != "tiny" else raise_(RecursionError("forged"))

    monkeypatch.setattr(Store, "open", broken)
    artifacts = find(Store(copies), [])
    assert [a.full_name for a in artifacts] == [a.full_name for a in newest(Store(copies))] == ["tiny-int8:1"]
    with pytest.raises(RecursionError):
        find(Store(copies), ["tiny"])
    monkeypatch.undo()

    def loading(artifact: Any, *_: Any) -> Any:
        served.append(artifact.manifest.name)
        return load(artifact, Settings(store=copies)) if len(served) > 1 else raise_(KeyError("forged"))

    monkeypatch.setattr("de3.server.manager.load", loading)
    with serving(copies) as server:
        assert server.classify(input="good").json()["model"] == "tiny-int8:1"


@pytest.mark.parametrize("kind", ["F8_E4M3", "BF16", "X"])
def test_prototypes_of_a_type_that_numpy_lacks_are_refused(copies: Path, kind: str) -> None:
    head = json.dumps({"x": {"dtype": kind, "shape": [2], "data_offsets": [0, 2]}}).encode()
    folder = copies / "tiny" / "1"
    (folder / "prototypes.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"\0\0")
    rehash(folder, "prototypes.safetensors")
    with pytest.raises(StoreError, match=r"prototypes.safetensors: (not a safetensors file|has no tensor)"):
        Model(Store(copies).open("tiny"))


EVIL = "x\x1b[31m\x9b2K\n2026 INFO de3: forged\r\u2028\u202ey"


def test_errors_are_short_and_have_no_control_characters() -> None:
    assert str(StoreError(EVIL)) == r"x\u001b[31m\u009b2K\n2026 INFO de3: forged\r\u2028\u202ey"
    assert len(str(StoreError("a" * 10**6))) == 501
    assert printable("grüße 中 \N{GRINNING FACE}") == "grüße 中 \N{GRINNING FACE}"


def test_the_output_of_the_proving_process_is_limited(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Store(store).open("tiny")
    for code, says in (
        ("import sys; sys.stdin.read(); print('x' * 10**8)", "prints too much"),
        (f"print({EVIL!r} + 'x' * 1000); import sys; sys.exit(3)", r"^\\u2028\\u202eyxxx"),
        (f"raise RuntimeError({EVIL!r})", r"\(1\): \S*y"),
    ):
        monkeypatch.setattr(prove, "PROGRAM", code)
        with pytest.raises(StoreError, match=says) as caught:
            prove.Prover().prove(artifact, "auto")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_verify_goes_on_after_any_error_and_prints_no_control_characters(copies: Path) -> None:
    def labels(folder: Path) -> None:
        edit(folder, lambda m: m.update(labels=[EVIL, "[red]b"]))

    labels(copies / "tiny" / "1")
    folder = Path(shutil.copytree(copies / "tiny" / "1", copies / "bad" / "1"))
    edit(folder, lambda m: m.update(name="bad"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rehash(folder, "tokenizer.json")
    worse = Path(shutil.copytree(folder, copies / "worse" / "1"))
    edit(worse, lambda m: m.update({"name": "worse", EVIL: 1}))
    results = {
        command: invoke(f"models {command} --store {copies}") for command in ("verify", "list", "show tiny")
    }
    for result in results.values():
        assert all(line.isprintable() for line in result.output.split("\n")), result.output
    lines = results["verify"].output.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["bad:1", "DAMAGED"],
        ["tiny:1", "valid"],
        ["tiny-int8:1", "valid"],
        ["worse:1", "DAMAGED"],
    ]
    assert json.loads(results["show tiny"].output)["labels"] == [EVIL, "[red]b"]


def test_a_log_record_cannot_be_forged() -> None:
    try:
        raise ValueError(EVIL + "\n2026 INFO de3: forged")
    except ValueError:
        error = sys.exc_info()
    record = logging.LogRecord("de3", logging.ERROR, "", 0, "%s", (EVIL,), error)
    first, *rest = TextFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert first == r"ERROR x\u001b[31m\u009b2K\n2026 INFO de3: forged\r\u2028\u202ey"
    assert len(rest) > 3 and all(line.startswith("    ") and line.isprintable() for line in rest)
    (line,) = JsonFormatter("%(levelname)s %(message)s").format(record).splitlines()
    assert line.isprintable() and json.loads(line)["message"] == EVIL
    assert "forged" in json.loads(line)["exc_info"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["risk"][0].update(weights=[float("nan")] * 5), "risk.0.weights"),
        (lambda m: m["risk"][0]["weights"].__setitem__(1, float("inf")), "risk.0.weights.1"),
        (lambda m: m["risk"][0]["weights"].__setitem__(1, -1e300), "risk.0.weights.1"),
        (lambda m: m["risk"][0]["weights"].append(0.0), "risk.0.weights: List should have at most 5"),
        (lambda m: m["risk"][0]["weights"].pop(), "risk.0.weights: List should have at least 5"),
        (lambda m: m["risk"][0].update(weights=[0.0] * 10**5), "risk.0.weights: List should have at most 5"),
        (lambda m: m["risk"][0].update(weights=["0"] * 5 + [{}]), "risk.0.weights"),
        (lambda m: m["risk"][0].update(layer=3), "risk must have one entry for each exit layer but the last"),
        (lambda m: m["risk"][0].update(layer=-1), "risk.0.layer"),
        (lambda m: m["risk"][0].update(layer=10**9), "risk.0.layer"),
        (lambda m: m["risk"].reverse(), "risk must have one entry for each exit layer but the last"),
        (lambda m: m["risk"].pop(), "risk must have one entry for each exit layer but the last"),
        (lambda m: m["risk"].append({"layer": 3, "weights": [0.0] * 5}), "risk must have one entry"),
        (lambda m: m.update(risk=[m["risk"][0]] * 5000), "risk: List should have at most 100 items"),
        (lambda m: m.update(risk=[]), "risk must have one entry"),
        (lambda m: m.update(risk=None), "tiny:1 has no risk"),
        (lambda m: m["defaults"].update(signal="margin"), "defaults.signal"),
        (lambda m: m["defaults"].update({"signal": "edr", "lambda": None}), "lambda must be above 0"),
        (lambda m: m["defaults"].update({"signal": "risk", "lambda": 2}), "and null for another"),
        (lambda m: m["defaults"].update({"signal": "edr", "lambda": 3.5}), "rows of the default signal"),
    ],
)
def test_an_unsound_risk_is_refused_with_the_reason(
    copies: Path, change: Callable[[dict], Any], message: str
) -> None:
    edit(copies / "tiny" / "1", change)
    started = thread_time()
    with pytest.raises(StoreError, match=message) as refused:
        Store(copies).open("tiny")
    assert thread_time() - started < 2 and len(str(refused.value)) < 10_000


def test_a_risk_with_a_weight_for_missing_distances_is_refused(copies: Path) -> None:
    def without_prototypes(m: dict[str, Any]) -> None:
        m["risk"] = [{"layer": layer, "weights": [0.0, 0.0, 0.0, 0.0, 1.0]} for layer in (0, 1, 2)]
        m["prototype_layers"] = []
        for reference in m["calibration"]["references"]:
            reference.update(nearest=None, distance_ratio=None)

    edit(copies / "tiny" / "1", without_prototypes)
    with pytest.raises(StoreError, match=r"prototype_layers must be|the last weight must be 0"):
        Store(copies).open("tiny")


def test_a_table_of_thousands_of_signals_is_read_and_served_quickly(copies: Path) -> None:
    def many(m: dict[str, Any]) -> None:
        short = dict.fromkeys(("loss", "tau", "disagreement", "disagreement_bound", "mean_exit_layer"), 0)
        short |= dict.fromkeys(("accuracy", "speedup"), 1)
        full = {**short, "accuracy_interval": [0, 1], "loss_interval": [0, 1], "histogram": []}
        lams = [round(0.01 * (i + 1), 2) for i in range(5000)]
        rows = [{**full, "signal": "edr", "lambda": lam} for lam in lams]
        m["calibration"]["table"] = rows
        m["defaults"] = {"tau": 0, "signal": "edr", "lambda": 1.0}

    edit(copies / "tiny" / "1", many)
    file = copies / "tiny/1/manifest.json"  # with indentation, it would be too large
    file.write_text(json.dumps(json.loads(file.read_text()), separators=(",", ":")))
    started = thread_time()
    manifest = Store(copies).open("tiny").manifest
    rules = Rules(manifest, Settings(store=copies))
    assert thread_time() - started < 2
    started = thread_time()
    for _ in range(20):
        assert rules.of(ExitOptions(target_speedup=1.0, lam=50.0)).rule.signal.lam == 50
        with pytest.raises(RequestError) as refused:
            rules.of(ExitOptions(lam=77.0))
        assert len(str(refused.value)) < 1000
    assert thread_time() - started < 0.5


def sequence(kind: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(depth):
        part = sequence("normalizers", part)
    return part


SPACES = {"pattern": {"Regex": " {2,}"}}
ONE = {"String": "a"}


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"normalizer": nested(4)}, None),
        ({"normalizer": nested(5)}, "nested too deeply"),
        ({"normalizer": sequence("normalizers", *[nested(1)] * 7)}, None),
        ({"normalizer": sequence("normalizers", *[nested(1)] * 8)}, "more than 16 parts"),
        ({"normalizer": sequence("normalizers", *[nested(0)] * 17)}, "more than 16 parts"),
        (
            {"normalizer": sequence("normalizers", *[replace("aaaa") | {"pattern": {"String": "aa"}}] * 2)},
            None,
        ),
        ({"normalizer": sequence("normalizers", *[replace("aaa")] * 2)}, "at most 4 times as long"),
        ({"normalizer": {"type": "Replace", "content": "a", **SPACES}}, None),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated", "pattern": ONE}}, None),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated", **SPACES}}, "pattern of Split"),
        ({"pre_tokenizer": sequence("pretokenizers", {"type": "Evil"})}, "'Evil' is not one of"),
        ({"post_processor": sequence("processors", {"type": "Evil"})}, "'Evil' is not one of"),
        ({"post_processor": template(1)}, None),
        ({"post_processor": template(1) | {"pair": [{}] * 17}}, "more than 16 parts around a text"),
    ],
)
def test_parts_of_a_tokenizer_at_their_limits(part: dict[str, Any], why: str | None) -> None:
    data = json.dumps({"model": {"type": "WordPiece"}, **part}).encode()
    if why is None:
        check_tokenizer(data)
    else:
        with pytest.raises(TokenizerError, match=why):
            check_tokenizer(data)
