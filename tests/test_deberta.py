"""DeBERTa-v2 and v3: options, lengths and tokenizer, and forged graphs of disentangled attention."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoConfig, DebertaV2Tokenizer

from de3.export import exporter
from de3.export.build import build
from de3.export.exporter import ExportSettings
from de3.export.full_depth import export_full_depth, stitch
from de3.model_store.model import Model
from de3.model_store.segments import full_depth, session_options
from de3.model_store.store import Store, StoreError
from de3.training import encoders
from de3.training.stock import Stock, open_stock, with_exits
from tests.commands import de3, refusal
from tests.fixtures import BAD, FILLER, GOOD, OTHER, made_once, make_rows, save_encoder
from tests.test_export import untrained
from tests.test_hostile_models import attribute, forge

FAMILY = "deberta-v2"
LENGTHS = (
    1,
    2,
    3,
    4,
    5,
    8,
    9,
    12,
    13,
    23,
    24,
    25,
    40,
    63,
    64,
)  # up to 4 each bucket is one offset; from 24 all are the same


def stock_classifier(folder: Path, **options: Any) -> Stock:
    return open_stock(str(save_encoder(folder, FAMILY, labels=3, **options)))


def stitched(stock: Stock, int8: bool, token_types: bool = True) -> Any:
    """A stock classifier as one graph."""
    segments = build(with_exits(stock, "mean", "text"), int8, token_types)
    return stitch(list(segments.values()))


def difference(stock: Stock, graph: Any, lengths: tuple[int, ...]) -> float:
    """The largest difference from transformers' own logits; one random text of each length at a time."""
    session = ort.InferenceSession(graph.SerializeToString(), session_options())
    names = [x.name for x in session.get_inputs()]
    rng = np.random.default_rng(1)
    largest = 0.0
    for length in lengths:
        feed = {
            "input_ids": rng.integers(0, 40, (1, length)),
            "token_type_ids": np.sort(rng.integers(0, 2, (1, length))),
        }
        feed = {name: feed[name] for name in names}
        with torch.no_grad():
            theirs = stock.model(**{k: torch.tensor(v) for k, v in feed.items()}).logits
        largest = max(largest, float(np.abs(session.run(None, feed)[0] - theirs.numpy()).max()))
    return largest


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_att_key": False},
        {"pos_att_type": "c2p"},
        {"pos_att_type": ["p2c"]},
        {"pos_att_type": ["p2c"], "share_att_key": False},
        {"norm_rel_ebd": "none"},
        {"position_biased_input": True},
        {"position_biased_input": True, "type_vocab_size": 1},
        {"type_vocab_size": 0},
        {"type_vocab_size": 1},
        {"embedding_size": 64},
        {"position_buckets": -1},  # a row for each distance up to 24
        {"position_buckets": -1, "max_relative_positions": -1},  # up to 64
        {"position_buckets": 256, "max_relative_positions": 512},  # more than a text needs
        {"position_buckets": 20, "max_relative_positions": 16},
        {"position_buckets": 3, "max_relative_positions": 4},
        {"num_attention_heads": 1},
        {"hidden_size": 48, "num_attention_heads": 3, "pooler_hidden_act": "tanh", "hidden_act": "gelu_new"},
    ],
    ids=str,
)
def test_full_depth_is_transformers_own_model(tmp_path: Path, options: dict[str, Any]) -> None:
    stock = stock_classifier(tmp_path, **options)
    assert difference(stock, stitched(stock, int8=False), LENGTHS) < 1e-5
    assert difference(stock, stitched(stock, int8=True), LENGTHS) < 0.1


def test_the_sizes_of_a_real_model(tmp_path: Path) -> None:
    """512 tokens and 256 buckets, as v3 has them."""
    sizes = {"max_position_embeddings": 512, "max_relative_positions": -1, "position_buckets": 256}
    stock = stock_classifier(tmp_path, layers=2, type_vocab_size=0, share_att_key=True, **sizes)
    graph = stitched(stock, int8=False)
    assert difference(stock, graph, (1, 2, 127, 128, 129, 130, 255, 256, 257, 400, 511, 512)) < 1e-5


def test_token_types_that_a_tokenizer_does_not_return(tmp_path: Path) -> None:
    for biased in (False, True):
        stock = stock_classifier(tmp_path / str(biased), position_biased_input=biased)
        assert difference(stock, stitched(stock, int8=False, token_types=False), (1, 5, 64)) < 1e-5


def test_the_word_table_stays_int8(tmp_path: Path) -> None:
    stock = stock_classifier(tmp_path)
    embeddings = build(with_exits(stock, "mean", "text"), True, True)["embeddings.onnx"]
    rows = len(stock.tokenizer)
    tables = [w for w in embeddings.graph.initializer if w.dims[:1] == [rows]]
    assert {(w.data_type, *w.dims) for w in tables} == {
        (onnx.TensorProto.INT8, rows, 48),
        (onnx.TensorProto.FLOAT, rows, 1),
    }


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"relative_attention": False}, "without relative_attention"),
        ({"pos_att_type": []}, "pos_att_type must have c2p, p2c or both, and nothing else"),
        ({"pos_att_type": None}, "pos_att_type must have"),
        ({"pos_att_type": "c2p|p2p"}, r"nothing else, got \['c2p', 'p2p'\]"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd 'batch_norm' cannot be exported"),
        ({"conv_kernel_size": 3}, r"a convolution \(conv_kernel_size 3\)"),
        ({"attention_head_size": 8}, "attention_head_size must be hidden_size / num_attention_heads, 64/4"),
        ({"position_buckets": 1}, "1 position_buckets cannot be exported with 24"),
        ({"position_buckets": 46}, "46 position_buckets cannot be exported with 24"),
        ({"hidden_act": "silu"}, "activation 'silu' cannot be exported"),
        ({"pooler_hidden_act": "silu"}, "pooler_hidden_act 'silu' cannot be exported"),
        ({"pooler_hidden_size": 32}, "pooler_hidden_size must be hidden_size, 64"),
    ],
)
def test_options_that_are_refused_before_any_work(tmp_path: Path, options: dict, why: str) -> None:
    save_encoder(tmp_path, FAMILY, labels=3)
    config = json.loads((tmp_path / "config.json").read_text()) | options
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=why):
        encoders.family(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=why):
        open_stock(str(tmp_path))
    command = f"train {tmp_path / 'none.tsv'} --encoder {tmp_path} --out {tmp_path / 'out'}"
    (tmp_path / "none.tsv").write_text("text\tlabel\n" + "a\t0\nb\t1\n" * 50)
    assert why.partition(" ")[0] in refusal(command)


def pairs(path: Path) -> Path:
    """A file of pairs, labelled by whether both texts have the same label."""
    rows, others = make_rows(1200, 21), make_rows(1200, 22)
    lines = [f"{a}\t{b}\t{int(x == y)}\n" for (a, x), (b, y) in zip(rows, others, strict=True)]
    path.write_text("a\tb\tsame\n" + "".join(lines))
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("few_taus")
def test_exits_are_trained_from_labels_of_pairs(tmp_path: Path) -> None:
    encoder, file = save_encoder(tmp_path / "encoder", FAMILY), pairs(tmp_path / "pairs.tsv")
    de3(
        f"train {file} --text-column a --pair-column b --label-column same --encoder {encoder} --epochs 1 "
        f"--embedding-exit --out {tmp_path}/run"
    )
    for name, quantize in (("m", "none"), ("m8", "int8")):
        de3(
            f"export {tmp_path}/run --name {name} --store {tmp_path}/store --quantize {quantize} --max-int8-loss 10"
        )
        model = Model(Store(tmp_path / "store").open(name))
        assert model.runtime == "onnxruntime" and model.manifest.input == "pair"
        assert model.manifest.export["parity"]["longest"] > 24
        steps = model.full_depth(model.tokenize("a good film", "it was bad"))
        assert all(np.isfinite(step.hidden).all() for step in steps)
        limit = 1e-3 if quantize == "none" else 0.3
        assert max(model.manifest.export["parity"]["logits"]) < limit


def save_own_tokenizer(folder: Path) -> None:
    """A tokenizer of the family's own type."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    words = dict.fromkeys([*GOOD, *BAD, *FILLER, *OTHER])
    pieces = [*(f"▁{word}" for word in words), *"▁abcdefghijklmnopqrstuvwxyz.,"]
    vocabulary = [*((x, 0.0) for x in special), *((x, -1.0 - i) for i, x in enumerate(dict.fromkeys(pieces)))]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    DebertaV2Tokenizer(vocab=vocabulary, unk_id=3).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("few_taus")
def test_a_classifier_for_pairs_with_its_own_tokenizer_is_imported(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "stock", FAMILY, labels=3, vocab_size=100, type_vocab_size=0)
    save_own_tokenizer(folder)
    file = pairs(tmp_path / "pairs.tsv")
    de3(
        f"import {folder} --texts {file} --text-column a --pair-column b --name m --store {tmp_path}/store "
        f"--work {tmp_path}/work"
    )
    artifact, stock = Store(tmp_path / "store").open("m"), open_stock(str(folder))
    model = Model(artifact)
    assert (model.runtime, artifact.manifest.max_tokens) == ("onnxruntime", 64)
    text = "it  was\ta good film, \n\n and very  bright." + " not bad" * 300
    for first, second in (
        ("good", "bad"),
        (text, "the plot\n"),
        (text + " good", text),
        ("x  y", " " + text),
    ):
        theirs = stock.tokenizer(first, second, truncation=True, max_length=64, return_tensors="pt")
        tokens = model.tokenize(first, second)
        assert tokens.ids.tolist() == theirs["input_ids"].tolist()
        with torch.no_grad():
            expected = stock.model(**{k: v for k, v in theirs.items() if k != "token_type_ids"}).logits
        np.testing.assert_allclose(model.full_depth(tokens)[-1].logits, expected[0].numpy(), atol=0.1)


def test_it_has_no_kernels_and_says_so(kernels: Any, store_of_both: Path) -> None:
    model = Model(Store(store_of_both).open("plain-int8"))
    assert model.runtime == "onnxruntime"
    assert model.why_not_native == "there is no kernel for disentangled attention"
    with pytest.raises(StoreError, match="there is no kernel for disentangled attention"):
        Model(Store(store_of_both).open("plain-int8"), "native")


def test_full_depth_of_an_artifact_is_its_segments(store_of_both: Path, tmp_path: Path) -> None:
    for name in ("plain", "plain-int8"):
        artifact = Store(store_of_both).open(name)
        model = Model(artifact, "onnxruntime")
        export_full_depth(artifact.path, tmp_path / name, int8=name == "plain-int8")
        export_full_depth(artifact.path, tmp_path / f"{name}-fp32", int8=False)
        same, fp32 = (
            ort.InferenceSession((tmp_path / kind / "model.onnx").read_bytes(), session_options())
            for kind in (name, f"{name}-fp32")
        )
        for text in ("good", "a dull plot and a bad film", "good " * 80):
            tokens = model.tokenize(text)
            feed = {"input_ids": tokens.ids, "token_type_ids": tokens.type_ids}
            wanted = model.full_depth(tokens)[-1].logits
            np.testing.assert_allclose(
                same.run(None, feed)[0][0], wanted, atol=0.2 if name == "plain-int8" else 0
            )
            np.testing.assert_allclose(fp32.run(None, feed)[0][0], wanted, atol=0.1)


@pytest.fixture(scope="session")
def store_of_both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with plain:1 (fp32) and plain-int8:1, of random weights; keys-only and queries-only are fp32."""

    def make(folder: Path) -> None:
        for name, quantize, options in (
            ("plain", "none", {}),
            ("plain-int8", "int8", {}),
            ("keys-only", "none", {"pos_att_type": ["c2p"]}),
            ("queries-only", "none", {"pos_att_type": ["p2c"]}),
        ):
            encoder = save_encoder(folder / f"e-{name}", FAMILY, layers=2, **options)
            checkpoint = untrained(folder / f"c-{name}", encoder)
            settings = ExportSettings(name, quantize, max_int8_loss=1.0)
            exporter.export(checkpoint, Store(folder / "store"), settings)

    return made_once(tmp_path_factory, "deberta", make) / "store"


@pytest.fixture
def copies(store_of_both: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store_of_both, tmp_path / "store"))


def nodes(proto: Any, op: str) -> list[Any]:
    """The nodes of an operator, except for differences used in int8 quantization."""
    quantizes = {x for n in proto.graph.node if n.op_type in ("Mul", "Div") for x in n.input}
    return [n for n in proto.graph.node if n.op_type == op and not (op == "Sub" and n.output[0] in quantizes)]


def weight(proto: Any, op: str, which: int, at: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the weight that the `which`-th node of an operator takes as input `at`, only there."""
    node = nodes(proto, op)[which]
    old = next(w for w in proto.graph.initializer if w.name == node.input[at])
    array = np.array(numpy_helper.to_array(old))
    if sum(list(n.input).count(old.name) for n in proto.graph.node) > 1:
        node.input[at] = "changed"
        proto.graph.initializer.append(numpy_helper.from_array(change(array), "changed"))
    else:
        old.CopyFrom(numpy_helper.from_array(change(array), old.name))


def rows(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    """Change the row of each distance, wherever it is read."""

    def on(proto: Any) -> None:
        name = nodes(proto, "Gather")[0].input[0]
        old = next(w for w in proto.graph.initializer if w.name == name)
        old.CopyFrom(numpy_helper.from_array(change(np.array(numpy_helper.to_array(old))), name))

    return on


def at(index: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def other_input(op: str, which: int, position: int, value: str) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        nodes(proto, op)[which].input[position] = value

    return change


def swapped(op: str, which: int) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        inputs = nodes(proto, op)[which].input
        inputs[0], inputs[1] = inputs[1], inputs[0]

    return change


def without(op: str, which: int = 0) -> Callable[[Any], None]:
    return lambda proto: proto.graph.node.remove(nodes(proto, op)[which])


def one_more(array: np.ndarray) -> np.ndarray:
    return np.asarray(array + 1, array.dtype)


def other_encoder(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"encoder": name}))

    return change


BUCKETS, ROW, SHAPE = (
    "not number distances by buckets",
    "does not have a row for each distance",
    "of unexpected shape",
)
LAST = 2 * 63  # the index of the row for the farthest distance
FORGED: list[tuple[Callable[[Any], None], str]] = [
    (rows(at(LAST, 16)), BUCKETS),  # beyond the last row
    (rows(at(LAST, 2**31 - 1)), BUCKETS),
    (rows(at(0, -1)), BUCKETS),
    (rows(at(63, 9)), BUCKETS),  # a token's distance from itself
    (rows(at(64, 8)), BUCKETS),  # from its neighbour
    (rows(at(LAST, 9)), BUCKETS),  # back to a smaller one
    (rows(lambda x: x[::-1].copy()), BUCKETS),
    (rows(lambda x: x[2:-2].copy()), ROW),
    (rows(lambda x: x[:-2].copy()), ROW),
    (rows(lambda x: x.astype(np.int64)), "Gather .* a weight of unexpected type"),
    (lambda p: weight(p, "Gather", 1, 0, one_more), "Gather .* takes an unexpected value"),
    (lambda p: weight(p, "Gather", 2, 0, one_more), "Gather .* takes an unexpected value"),
    (lambda p: weight(p, "Squeeze", 0, 1, one_more), ROW),
    (lambda p: weight(p, "Range", 0, 0, one_more), ROW),
    (lambda p: weight(p, "Range", 0, 2, one_more), ROW),
    (lambda p: weight(p, "Unsqueeze", 0, 1, one_more), ROW),
    (lambda p: weight(p, "Unsqueeze", 1, 1, one_more), ROW),
    (lambda p: weight(p, "Sub", 1, 1, one_more), ROW),
    (lambda p: weight(p, "Sub", 2, 0, one_more), ROW),
    (lambda p: weight(p, "Expand", 0, 1, lambda x: x * 2), "unexpected number of heads"),
    (lambda p: weight(p, "Expand", 0, 1, at(2, 2**40)), "unexpected number of heads"),
    (lambda p: weight(p, "Expand", 0, 1, at(1, 2)), "not give each head a part"),
    (lambda p: weight(p, "Expand", 0, 1, lambda x: np.append(x, 1)), "Expand .* a weight of unexpected type"),
    (swapped("Sub", 0), "Sub .* takes an unexpected value"),
    (other_input("Sub", 3, 1, "hidden"), "Sub .* takes an unexpected value"),
    (other_input("Range", 0, 1, "hidden"), "Range .* takes an unexpected value"),
    (lambda p: attribute(p, "Shape", start=0), "Shape .* has an unexpected 'start'"),
    (lambda p: attribute(p, "Split", axis=1), "Split .* has an unexpected 'axis'"),
    (lambda p: attribute(p, "MultiHeadAttention", scale=1.0), "an unexpected 'scale'"),
    (lambda p: attribute(p, "MultiHeadAttention", num_heads=2), "an unexpected 'num_heads'"),
    (lambda p: attribute(p, "MultiHeadAttention", unidirectional=1), "an unexpected 'unidirectional'"),
    (swapped("MultiHeadAttention", 0), "takes an unexpected value"),
    (other_input("MultiHeadAttention", 0, 5, "hidden"), "takes an unexpected value"),
]
BOTH_TERMS: list[tuple[Callable[[Any], None], str]] = [
    (
        swapped("Add", -5),
        "Add .* takes an unexpected value",
    ),  # of the two terms, followed by four with biases or residuals
    (swapped("MatMul", 2), "MatMul .* takes an unexpected value"),
    (lambda p: weight(p, "Reshape", 0, 1, at(2, 2)), "not give each head a part"),
    (lambda p: weight(p, "Reshape", 1, 1, at(0, 1)), "not give each head a part"),
    (lambda p: weight(p, "Slice", 0, 3, one_more), "an axis other than its rows"),
    (lambda p: weight(p, "Slice", 1, 3, lambda x: x - 1), "an axis other than its rows"),
    (swapped("Slice", 0), "Slice .* takes a value where a weight should be"),
    (other_input("Slice", 0, 2, "hidden"), "Slice .* takes an unexpected value"),
    (lambda p: weight(p, "Slice", 0, 0, lambda x: x[:, :, :-1].copy()), SHAPE),
    (lambda p: weight(p, "Slice", 0, 0, lambda x: x[:, :8].copy()), SHAPE),
    (lambda p: weight(p, "Slice", 1, 0, lambda x: x[:, :-2].copy()), SHAPE),
    (
        lambda p: weight(p, "Slice", 1, 0, lambda x: x[:1].copy()),
        "Slice .* a weight of unexpected type or shape",
    ),
    (lambda p: weight(p, "Slice", 1, 0, lambda x: x * np.inf), "Slice .* a weight that is not finite"),
    (lambda p: attribute(p, "Transpose", perm=[0, 1, 2, 3]), "Transpose .* has an unexpected 'perm'"),
    (lambda p: attribute(p, "GatherElements", axis=1), "GatherElements .* has an unexpected 'axis'"),
    (other_input("GatherElements", 1, 1, "hidden"), "GatherElements .* takes an unexpected value"),
    (without("GatherElements"), "operator .* is Reshape, not GatherElements"),
    (other_input("Reshape", 0, 0, "hidden"), "no table for distances"),
]


@pytest.mark.parametrize("model", ["plain", "plain-int8"])
@pytest.mark.parametrize("case", range(len(FORGED)))
def test_a_forged_index_is_refused(copies: Path, model: str, case: int) -> None:
    change, why = FORGED[case]
    name = forge(copies, model, 1, change)
    for runtime in ("onnxruntime", "auto"):
        with pytest.raises(StoreError, match=rf"{name}: .*{why}"):
            Model(Store(copies).open(model), runtime)


@pytest.mark.parametrize("case", range(len(BOTH_TERMS)))
def test_forged_terms_are_refused(copies: Path, case: int) -> None:
    change, why = BOTH_TERMS[case]
    name = forge(copies, "plain", 1, change)
    with pytest.raises(StoreError, match=rf"{name}: .*{why}"):
        Model(Store(copies).open("plain"))


@pytest.mark.parametrize("model", ["keys-only", "queries-only"])
def test_one_term_is_not_taken_for_the_other(copies: Path, model: str) -> None:
    assert Model(Store(copies).open(model)).runtime == "onnxruntime"

    def other(proto: Any) -> None:
        split, reshape = nodes(proto, "Split")[0], nodes(proto, "Reshape")[0]
        reshape.input[0] = split.output[1 if reshape.input[0] == split.output[0] else 0]

    forge(copies, model, 1, other)
    with pytest.raises(StoreError, match=r"Transpose .* has an unexpected 'perm'"):
        Model(Store(copies).open(model))


def test_embeddings_are_those_of_the_encoder(copies: Path) -> None:
    with pytest.raises(StoreError, match=r"embeddings.onnx: operator .* is .*, not Shape"):
        other_encoder("bert")(copies / "plain" / "1")
        Model(Store(copies).open("plain"))
    forge(copies, "plain-int8", 0, lambda p: attribute(p, "LayerNormalization", axis=1))
    with pytest.raises(StoreError, match=r"LayerNormalization .* has an unexpected 'axis'"):
        Model(Store(copies).open("plain-int8"))


def test_a_bert_graph_is_no_deberta(store: Path, tmp_path: Path) -> None:
    for name in ("tiny", "tiny-int8"):
        copy = Path(shutil.copytree(store / name, tmp_path / "store" / name))
        other_encoder(FAMILY)(copy / "1")
        with pytest.raises(StoreError, match=r"(embeddings|layer_01).onnx: operator"):
            Model(Store(tmp_path / "store").open(name))


@pytest.mark.parametrize("seed", range(30))
def test_a_mutated_graph_is_refused_or_runs(copies: Path, seed: int) -> None:
    """Only the values of weights are free: any graph that loads runs, at every length."""
    rng = random.Random(seed)

    def mutate(proto: Any) -> None:
        plain = [n for n in proto.graph.node if n.op_type != "If"]
        one, other = rng.choice(plain), rng.choice(plain)
        match rng.randrange(5):
            case 0:
                proto.graph.node.remove(one)
            case 1:
                i, j = rng.randrange(len(one.input)), rng.randrange(len(other.input))
                one.input[i], other.input[j] = other.input[j], one.input[i]
            case 2:
                one.op_type, one.domain = other.op_type, other.domain
            case 3:
                for a in one.attribute:
                    a.i, a.f = a.i + 1, -a.f
            case _:
                tensor = rng.choice(proto.graph.initializer)
                array = np.ascontiguousarray(numpy_helper.to_array(tensor)[..., ::-1])
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    forge(copies, "plain", 1, mutate)
    try:
        model = Model(Store(copies).open("plain"))
    except StoreError:
        return
    for text in ("good", "the film is not bad , but long and dull " * 10):
        steps = full_depth(model.segments, model.tokenize(text))
        assert all(np.isfinite(step.hidden).all() for step in steps)


def test_every_table_matters(copies: Path) -> None:
    """Different table values change the model, so parity with transformers is not a coincidence."""
    before = Model(Store(copies).open("plain"))
    tokens = before.tokenize("a dull plot and a bad film")
    wanted = before.full_depth(tokens)[1].hidden
    for which in (0, 1):
        forge(copies, "plain", 1, lambda p, which=which: weight(p, "Slice", which, 0, lambda x: x * 0))
        changed = Model(Store(copies).open("plain")).full_depth(tokens)[1].hidden
        assert np.abs(changed - wanted).max() > 0.01
        wanted = changed
