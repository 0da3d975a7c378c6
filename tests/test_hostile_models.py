"""Malicious model files, forged here: refused by name before anything runs them, or harmless."""

import asyncio
import hashlib
import json
import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnx.external_data_helper import set_external_data
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from de3.model_store.graph import GraphError
from de3.model_store.graph_check import MAX_FIELDS, read_model
from de3.model_store.model import Model
from de3.model_store.printable import printable
from de3.model_store.segments import session_options
from de3.model_store.store import Store, StoreError, read_manifest
from de3.model_store.tokenizer import TextTokenizer
from de3.model_store.tokenizer_check import MAX_VALUES, TokenizerError, check_tokenizer
from de3.runtime import prove
from de3.runtime.background import in_background
from de3.runtime.engine.timing import Timing
from de3.runtime.loading import load
from de3.server.logs import JsonFormatter, TextFormatter
from de3.server.service import Service
from de3.server.settings import Settings
from tests.commands import invoke
from tests.fixtures import save_encoder
from tests.serving import Server, serving, until

CALIBRATED = Path("models/sst2/1/manifest.json").read_text()
EVIL = "x\x1b[31m\x9b2K\n2026 INFO de3: forged\r\u2028\u202ey"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tiny:1 (fp32) and tiny-int8:1, whose exits are random."""
    from tests.stock import with_random_exits  # imports PyTorch

    folder = tmp_path_factory.mktemp("stores")
    stock = save_encoder(folder / "stock", labels=2, id2label={"0": "negative", "1": "positive"})
    for name, precision in (("tiny", "fp32"), ("tiny-int8", "int8")):
        artifact = with_random_exits(stock, Store(folder / "store"), name, precision)
        edit(artifact.path, lambda m: m.update(input=None))  # texts or pairs
    return folder / "store"


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


def node(proto: Any, op: str) -> Any:
    return next(n for n in proto.graph.node if n.op_type == op)


def test_a_session_reads_no_tensor_from_another_file(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the check of graphs, which refuses such tensors, missed one."""
    monkeypatch.chdir(store)
    proto = onnx.load("tiny/1/layer_01.onnx")
    Path("weights").write_bytes((tensor := proto.graph.initializer[0]).raw_data)
    set_external_data(tensor, "weights")
    tensor.ClearField("raw_data")
    with pytest.raises(Exception, match=r"nonexistent|external|not exist|No such file"):
        ort.InferenceSession(proto.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])


def test_a_manifest_is_read_within_limits(tmp_path: Path) -> None:
    manifest = json.loads(CALIBRATED)
    for rows, message in ((200_000, "at most 5000"), (1_000_000, "at most 2097152 are expected")):
        manifest["calibration"]["table"] = [{}] * rows
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StoreError, match=message):
            read_manifest(tmp_path)
    before = CALIBRATED[: CALIBRATED.index('"export"')]  # this part may have any values
    numbers = {m[1]: m.span(2) for m in re.finditer(r'"(\w+)": (\d+)(?=[,\n])', before)}
    del numbers["schema_version"]
    for name, (start, end) in numbers.items():
        (tmp_path / "manifest.json").write_text(CALIBRATED[:start] + "9" * 4300 + CALIBRATED[end:])
        with pytest.raises(StoreError, match=name) as caught:
            read_manifest(tmp_path)
        assert len(str(caught.value)) < 600
    assert len(numbers) > 10


def test_a_sparse_file_is_not_read(copies: Path) -> None:
    folder = copies / "tiny" / "1"
    for name, size, says in (
        ("exits.safetensors", 2**30 + 1, f"exits.safetensors: {2**30 + 1} bytes; at most"),
        ("prototypes.safetensors", 2**30, f"prototypes.safetensors: {2**30} bytes; at most"),
        ("tokenizer.json", 2**30, f"tokenizer.json: {2**30} bytes; at most"),
        ("layer_01.onnx", 2**33, "layer_01.onnx.bytes: Input should be less than"),
    ):
        with (folder / name).open("wb") as file:
            file.truncate(size)
        edit(folder, lambda m: m["files"].update({name: {"sha256": "0" * 64, "bytes": size}}))  # noqa: B023
        with pytest.raises(StoreError, match=says):
            Model(Store(copies).open("tiny"))


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    """Applies `change` to one tensor of a file."""
    return lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


def with_first(value: float) -> Callable[[Any], Any]:
    """Sets the first value of an array, which is the easiest to miss in a check of a part."""
    return lambda x: np.r_[np.float32(value), x.ravel()[1:]].reshape(x.shape)


def copied(name: str, to: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({to: tensors[name]})


CLASSIFIER, BIAS = "layer_00.classifier.weight", "layer_00.classifier.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer_02.classifier.bias"), "it has no tensor layer_02.classifier.bias"),
        (lambda t: t.pop("layer_01.space.scale"), "it has no tensor layer_01.space.scale"),
        (copied(BIAS, EVIL + "x" * 10_000), "it has an unexpected tensor 'x\\\\x1b"),
        # The last exit has no prototypes.
        (
            copied("layer_02.space.bias", "layer_03.space.bias"),
            "it has an unexpected tensor 'layer_03.space.bias'",
        ),
        (changed(BIAS, np.float64), rf"{BIAS} must be float32 of shape \[2\], got float64 of shape \[2\]"),
        (changed("layer_00.space.weight", np.float32), "layer_00.space.weight must be int8 of shape"),
        (changed(CLASSIFIER, np.transpose), rf"{CLASSIFIER} must be float32 .* \[64, 2\], got .* \[2, 64\]"),
        (changed("layer_00.space.bias", with_first(np.nan)), "layer_00.space.bias is not finite"),
        (changed(CLASSIFIER, with_first(np.inf)), f"{CLASSIFIER} is not finite"),
        (
            changed("layer_02.space.scale", lambda x: x * 0 + np.float32(3e38)),
            "space: its weights are too large",
        ),
    ],
)
def test_the_exits_have_the_weights_that_the_manifest_says(
    copies: Path, change: Callable[[Any], Any], message: str
) -> None:
    file = copies / "tiny-int8" / "1" / "exits.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    rehash(file.parent, file.name)
    with pytest.raises(StoreError, match=f"exits.safetensors: {message}"):
        Model(Store(copies).open("tiny-int8"), "onnxruntime")


def replace(content: str, pattern: str = "a") -> dict:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def regex(kind: str, pattern: Any, content: str = "a") -> dict:
    return {"type": kind, "pattern": {"Regex": pattern}, "content": content, "behavior": "Isolated"}


def sequence(*parts: dict, kind: str = "normalizers") -> dict:
    return {"type": "Sequence", kind: list(parts)}


def nested(depth: int) -> dict:
    return sequence(nested(depth - 1)) if depth else {"type": "Lowercase"}


def template(before: int, **special_token: Any) -> dict:
    """A post-processor with this many special tokens before a text or a pair."""
    start = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}] * before
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    special = {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"], **special_token}}
    both = {"single": [*start, first], "pair": [*start, first, second], "special_tokens": special}
    return {"type": "TemplateProcessing", **both}


def check(model: dict[str, Any] | None = None, **parts: Any) -> None:
    """Check a tokenizer with these parts, and these fields of its model."""
    check_tokenizer(json.dumps({"model": {"type": "WordPiece", **(model or {})}, **parts}).encode())


@pytest.mark.parametrize(
    ("most", "part"),
    [
        (4, lambda n: {"normalizer": replace("a" * n, "aa")}),
        (4, lambda n: {"normalizer": sequence(replace("a" * n, "aa"), replace("aa"))}),
        (2, lambda n: {"normalizer": sequence(regex("Replace", " {2,}", "aa"), replace("a" * n))}),
        # A replacement that shortens a text does not make up for later ones.
        (2, lambda n: {"normalizer": sequence(replace("a", "aa"), replace("aa"), replace("a" * n))}),
        (3, lambda n: {"normalizer": {"type": "Prepend", "prepend": "a" * n}}),
        (4, lambda n: {"normalizer": nested(n)}),
        (16, lambda n: {"normalizer": sequence(nested(1), *[nested(0)] * (n - 3))}),
        (14, lambda n: {"post_processor": template(n) | {"single": []}}),
        (16, lambda n: {"post_processor": template(1, ids=[1] * n)}),
        (10_000, lambda n: {"added_tokens": [{"content": "x"}] * n}),
        (200, lambda n: {"model": {"vocab": {"x" * n: 7}}}),
        (200, lambda n: {"model": {"max_input_chars_per_word": n}}),
        (401, lambda n: {"model": {"type": "BPE", "merges": ["x" * n]}}),
    ],
)
def test_parts_of_a_tokenizer_are_limited(most: int, part: Callable[[int], dict[str, Any]]) -> None:
    check(**part(most))
    with pytest.raises(TokenizerError):
        check(**part(most + 1))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"normalizer": regex("Replace", "(a+)+$")}, "pattern of Replace"),
        ({"normalizer": replace("a", "")}, "pattern of Replace"),
        ({"normalizer": replace("a") | {"pattern": {"String": "a", "Regex": "a+"}}}, "pattern of Replace"),
        ({"normalizer": {"type": []}}, "is not one of"),
        ({"pre_tokenizer": regex("Split", " {2,}")}, "pattern of Split"),
        ({"pre_tokenizer": sequence({"type": "Evil"}, kind="pretokenizers")}, "'Evil' is not one of"),
        ({"post_processor": template(1, ids=None)}, "special token"),
        ({"model": {"type": "Evil"}}, "'Evil' is not one of"),
        ({"model": {"type": "BPE", "dropout": 0.5}}, "dropout"),
        ({"model": {"max_input_chars_per_word": "9"}}, "max_input_chars_per_word"),
        ({"added_tokens": [{"content": ""}]}, "added_tokens"),
    ],
)
def test_a_tokenizer_has_only_known_parts(part: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        check(**part)
    check(pre_tokenizer={"type": "Split", "behavior": "Isolated", "pattern": {"String": "a"}})


PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
TRUNCATION = {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update(beyond=60), "the id 60"),
        (lambda t: t["added_tokens"][0].update(id=60, content="x"), "the id [0-9]+"),
        (lambda t: t["post_processor"]["special_tokens"]["[SEP]"].update(ids=[60]), "the id 60"),
        (lambda t: t["post_processor"]["pair"][3]["Sequence"].update(type_id=2), "the token type 2"),
        (lambda t: t.update(padding=PADDING), "must not pad or truncate"),
        (lambda t: t.update(truncation=TRUNCATION), "must not pad or truncate"),
    ],
)
def test_a_tokenizer_neither_pads_nor_has_an_id_beyond_the_tables(
    copies: Path, change: Callable, message: str
) -> None:
    folder = copies / "tiny" / "1"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rehash(folder, "tokenizer.json")
    with pytest.raises(StoreError, match=rf"tokenizer.json: .*{message}"):
        Model(Store(copies).open("tiny"))


def test_a_tokenizer_check_survives_any_json() -> None:
    twice = b'{"model": {"unk_token": "a", "unk_token": "b"}}'  # parsers differ in the value that they use
    for data in (b"[]", b"1", b"{}", b"\xff", b"[" * 100_000, twice):
        with pytest.raises(TokenizerError):
            check_tokenizer(data)
    with pytest.raises(TokenizerError, match=f"more than {MAX_VALUES} values"):  # before it is parsed
        check_tokenizer(b"," * (MAX_VALUES + 1))


def test_a_file_with_many_fields_is_refused_before_it_is_parsed() -> None:
    inner = b"\x0a\x00" * 12_000_000  # empty operators, which take a hundred bytes each in memory
    size = bytes([*(len(inner) >> shift & 127 | 128 for shift in (0, 7, 14)), len(inner) >> 21])
    with pytest.raises(GraphError, match="more than 10000 fields"):
        read_model(b"\x08\x08\x3a" + size + inner)
    model = onnx.ModelProto()
    model.graph.node.extend([onnx.NodeProto()] * (MAX_FIELDS - 1))
    assert read_model(model.SerializeToString()) == model
    model.opset_import.add()  # stored after the graph
    with pytest.raises(GraphError, match="more than 10000 fields"):
        read_model(model.SerializeToString())
    nested = b""
    for _ in range(3000):  # nested operators, each with a graph as its attribute
        nested = b"\x32" + onnx.AttributeProto(s=nested).SerializeToString()[1:]
    with pytest.raises(GraphError):
        read_model(nested)


def test_a_text_without_tokens_is_an_error(store: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="has no tokens"):
        TextTokenizer(tokenizer, 16).start("\u2003", None, True).all()


def test_a_store_with_a_bad_model_serves_the_others(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = helper.make_node("ConstantOfShape", ["shape"], ["x"])
    forge(copies, "tiny", 1, lambda p: p.graph.node.append(huge))  # the first model of the store
    (copies / "worse" / "1").mkdir(parents=True)
    (copies / "worse" / "1" / "manifest.json").write_text("{}")
    shutil.copytree(copies / "tiny-int8", copies / "odd")
    edit(copies / "odd" / "1", lambda m: m.update(name="odd"))

    def loading(artifact: Any, *_: Any) -> Any:
        if artifact.manifest.name == "odd":
            raise KeyError("forged")
        return load(artifact, Settings(store=copies))

    monkeypatch.setattr("de3.server.manager.load", loading)
    with serving(copies, default_model="tiny-int8") as server:
        assert server.classify(input="good").json()["model"] == "tiny-int8:1"
        for name in ("tiny", "odd", "worse"):
            assert server.classify(input="good", model=name).status_code == 404
    with pytest.raises(StoreError, match=r"layer_01.onnx: it has 13 operators, not 12"):
        prove.Prover().prove(Store(copies).open("tiny"), "auto")
    with pytest.raises(StoreError, match="schema version None"):
        Service(Settings(store=copies, models=["worse"]))


TIMING_ABORTS = "import os, de3.runtime.engine.timing as t; t._run = lambda *_: os.abort(); "


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.abort()", "crashes"),
        ("import os; os.kill(os.getpid(), 9)", "was killed"),
        ("import time; time.sleep(60)", "takes more than 0.1 s"),
        ("import sys; sys.stdin.read(); print('x' * 10**8)", "prints too much"),
        (f"print({EVIL!r} + 'x' * 1000); import sys; sys.exit(3)", r"^\\u2028\\u202eyxxx"),
        # The server's own measurements of a model are a part of the proof.
        (TIMING_ABORTS + prove.PROGRAM, "crashes"),
    ],
)
def test_an_error_that_ends_the_proving_process_ends_no_other(
    store: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    monkeypatch.setattr(prove, "TIMEOUT_S", 0.1 if "sleep" in code else 60.0)
    monkeypatch.setattr(prove, "PROGRAM", code)
    with pytest.raises(StoreError, match=says) as caught:
        prove.Prover().prove(Store(store).open("tiny"), "auto")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_a_valid_graph_cannot_take_all_memory(copies: Path) -> None:
    tokens = 32_768  # attention over so many tokens needs 16 GiB

    def more_positions(proto: Any) -> None:
        name = node(proto, "Slice").input[0]
        weight = next(w for w in proto.graph.initializer if w.name == name)
        weight.CopyFrom(numpy_helper.from_array(np.ones((tokens, 64), np.float32), name))

    forge(copies, "tiny", 0, more_positions)
    edit(copies / "tiny/1", lambda m: (m.update(max_tokens=tokens), m["encoder"].update(positions=tokens)))
    with pytest.raises(StoreError, match=r"allocate|alloc|memory"):
        prove.Prover().prove(Store(copies).open("tiny"), "auto")


def test_a_server_that_test_runs_a_model_can_be_stopped(
    copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copies / "tiny/1", lambda m: m.update(labels=["not", "run before"]))
    (pid := copies / "pid").touch()
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(prove, "PROGRAM", code)
    server = Server(Service(Settings(store=copies, port=0, models=["tiny"])))
    server.start()
    until(pid.read_text, "the process")
    server.stop()
    until(lambda: not Path(f"/proc/{pid.read_text()}").exists(), "its end")


def test_loading_can_be_stopped_and_takes_no_longer(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, prover = Store(store).open("tiny-int8"), prove.Prover()
    checks = list[None]()
    Timing(Model(artifact), lambda: checks.append(None))
    assert len(checks) > 3 * 5  # before each layer of each text, and before each timed text
    check = prover.limit(artifact)
    monkeypatch.setattr(prove, "TIMEOUT_S", 0.0)
    with pytest.raises(StoreError, match="takes more than 0 s"):
        load(artifact, Settings(store=store), prover.limit(artifact))
    prover.stop()
    with pytest.raises(StoreError, match="the server is stopping"):
        Model(artifact, check=check)


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


def test_verify_goes_on_after_any_error_and_prints_no_control_characters(kernels: Any, copies: Path) -> None:

    def other_activation(proto: Any) -> None:
        node(proto, "Gelu").op_type = "FastGelu"

    for layer in (1, 2, 3):
        forge(copies, "tiny-int8", layer, other_activation)
    edit(copies / "tiny-int8" / "1", lambda m: m["encoder"].update(activation="gelu_tanh"))
    edit(copies / "tiny" / "1", lambda m: m.update(labels=[EVIL, "[red]b"]))
    folder = Path(shutil.copytree(copies / "tiny" / "1", copies / "bad" / "1"))
    edit(folder, lambda m: m.update(name="bad"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rehash(folder, "tokenizer.json")
    worse = Path(shutil.copytree(folder, copies / "worse" / "1"))
    edit(worse, lambda m: m.update({"name": "worse", EVIL: 1}))
    commands = ("verify", "list", "show tiny")
    results = {command: invoke(f"models {command} --store {copies}") for command in commands}
    for result in results.values():
        assert all(line.isprintable() for line in result.output.split("\n")), result.output
    assert results["verify"].exit_code == 1
    lines = results["verify"].output.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["bad:1", "DAMAGED"],
        ["tiny:1", "valid"],
        ["tiny-int8:1", "valid, without kernels: there is no kernel for the activation gelu_tanh"],
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
    assert printable("grüße 中 \N{GRINNING FACE}") == "grüße 中 \N{GRINNING FACE}"
    (line,) = JsonFormatter("%(levelname)s %(message)s").format(record).splitlines()
    assert line.isprintable() and json.loads(line)["message"] == EVIL
    assert "forged" in json.loads(line)["exc_info"]
