"""DeBERTa-v2 and v3: options, lengths and tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DebertaV2Tokenizer

from de3.export.cache import artifact_of
from de3.export.classifier import Stock
from de3.export.full_depth import stitch
from de3.model_store.model import Model
from tests.fixtures import BAD, FILLER, GOOD, OTHER, save_encoder
from tests.stock import graphs_of, largest_difference, transformers_model

FAMILY = "deberta-v2"
# Each distance up to 4 has its own bucket; all from 24 on share one.
LENGTHS = (1, 4, 5, 9, 13, 23, 24, 25, 64)
OPTIONS: list[dict[str, Any]] = [
    {"share_att_key": False, "type_vocab_size": 1},
    {"pos_att_type": "c2p", "embedding_size": 64},
    {"pos_att_type": ["p2c"]},
    {"pos_att_type": ["p2c"], "share_att_key": False, "norm_rel_ebd": "none"},
    {"position_biased_input": True, "type_vocab_size": 1},
    {"position_buckets": -1},  # a table row for each distance up to 24
    {"position_buckets": -1, "max_relative_positions": -1},  # a table row for each distance up to 64
    {"position_buckets": 256, "max_relative_positions": 512},  # more buckets than a text needs
    {"position_buckets": 3, "max_relative_positions": 4},
    {"hidden_size": 48, "num_attention_heads": 3, "pooler_hidden_act": "tanh", "hidden_act": "gelu_new"},
]
# Up to 512 tokens and 256 buckets, as in v3.
V3 = {"max_position_embeddings": 512, "max_relative_positions": -1, "position_buckets": 256}
V3 |= {"type_vocab_size": 0, "share_att_key": True}


@pytest.mark.parametrize(
    ("options", "token_types", "lengths"),
    [
        *((options, True, LENGTHS) for options in OPTIONS),
        (V3, True, (1, 127, 128, 129, 130, 255, 256, 257, 511, 512)),
        # Token types that the tokenizer does not return.
        *(({"position_biased_input": biased}, False, (1, 5, 64)) for biased in (False, True)),
    ],
    ids=str,
)
def test_full_depth_is_transformers_own_model(
    tmp_path: Path, options: dict[str, Any], token_types: bool, lengths: tuple[int, ...]
) -> None:
    stock = save_encoder(tmp_path, FAMILY, **{"labels": 3, "layers": 2} | options)
    graph = stitch(graphs_of(stock, False, token_types)[1])
    assert largest_difference(stock, graph, lengths) < 1e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = save_encoder(tmp_path_factory.mktemp("stock"), FAMILY, labels=3)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"relative_attention": False}, "without relative_attention"),
        ({"pos_att_type": []}, "pos_att_type must have c2p, p2c or both, and nothing else"),
        ({"pos_att_type": "c2p|p2p"}, r"nothing else, got \['c2p', 'p2p'\]"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd 'batch_norm' cannot be exported"),
        ({"conv_kernel_size": 3}, r"a convolution \(conv_kernel_size 3\)"),
        ({"attention_head_size": 8}, "attention_head_size must be hidden_size / num_attention_heads, 64/4"),
        ({"position_buckets": 1}, "1 position_buckets cannot be exported with 24"),
        ({"position_buckets": 46}, "46 position_buckets cannot be exported with 24"),
        ({"pooler_hidden_act": "silu"}, "pooler_hidden_act 'silu' cannot be exported"),
        ({"pooler_hidden_size": 32}, "pooler_hidden_size must be hidden_size, 64"),
    ],
)
def test_options_that_are_refused_before_any_work(
    config: dict, tmp_path: Path, options: dict, why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config | options))
    with pytest.raises(ValueError, match=why):
        Stock.open("name", tmp_path)


def save_own_tokenizer(folder: Path) -> None:
    """Replace the tokenizer in a folder with one of the family's own type."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    words = dict.fromkeys([*GOOD, *BAD, *FILLER, *OTHER])
    pieces = [*(f"▁{word}" for word in words), *"▁abcdefghijklmnopqrstuvwxyz.,"]
    vocabulary = [*((x, 0.0) for x in special), *((x, -1.0 - i) for i, x in enumerate(dict.fromkeys(pieces)))]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    DebertaV2Tokenizer(vocab=vocabulary, unk_id=3).save_pretrained(folder)


def test_pairs_with_its_own_tokenizer(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "stock", FAMILY, labels=3, vocab_size=100, type_vocab_size=0)
    save_own_tokenizer(folder)
    model = Model(artifact_of(str(folder), "fp32", tmp_path / "cache"))
    stock, tokenizer = transformers_model(folder)
    assert (model.runtime, model.manifest.max_tokens) == ("onnxruntime", 64)
    text = "it  was\ta good film, \n\n and very  bright." + " not bad" * 300
    for first, second in (
        ("good", "bad"),
        (text, "the plot\n"),
        (f"{text} good", text),
        ("x  y", f" {text}"),
    ):
        theirs = tokenizer(first, second, truncation=True, max_length=64, return_tensors="pt")
        tokens = model.tokenize(first, second)
        assert tokens.ids.tolist() == theirs["input_ids"].tolist()
        with torch.no_grad():
            expected = stock(**{k: v for k, v in theirs.items() if k != "token_type_ids"}).logits
        np.testing.assert_allclose(model.full_depth(tokens)[-1].logits, expected[0].numpy(), atol=1e-5)
