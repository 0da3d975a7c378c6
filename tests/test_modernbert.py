"""ModernBERT: parity at every length and with every option, refusals, and graphs that were tampered with."""

import json
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto
from transformers import AutoConfig

from de3.export.classifier import Stock
from de3.export.full_depth import dequantize, fuse, stitch
from de3.model_store.families import family
from de3.model_store.graph_check import read_model
from de3.model_store.segment_graph import read_segment
from de3.model_store.segments import session_options
from de3.training import pretrained
from tests.fixtures import exact_int8, save_encoder
from tests.stock import graphs_of, largest_difference

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 40, "rope_theta": 50.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 40, "rope_theta": 50.0}
LENGTHS = [1, 2, 5, 6, 7, *range(19, 28), 33, 64]  # local attention spans 5 tokens on each side
SMALL = {"layers": 5, "labels": 3}


def ropes(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


@pytest.mark.parametrize(
    "options",
    [
        {"classifier_pooling": "cls", "local_attention": 2},
        dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
        | {"activation": "gelu_pytorch_tanh", "classifier_activation": "tanh"},
        {"activation": "relu", "classifier_activation": "relu", "norm_eps": 1e-3}
        | {"layer_types": ["sliding_attention"] * 5},
        {"local_attention": 128, "global_rope_theta": 50.0, "local_rope_theta": 3.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "global_rope_theta": 50.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 99}},
        ropes(YARN | {"beta_fast": 5, "beta_slow": 0.5, "mscale": 1.5, "mscale_all_dim": 0.5}, YARN),
        ropes({"rope_type": "dynamic", "factor": 4.0}, YARN | {"attention_factor": 2.5, "rope_theta": 9.0}),
        ropes(LLAMA3, {"rope_type": "default"}),
        {"hidden_size": 36, "num_attention_heads": 6, "intermediate_size": 50}
        | {"layer_types": ["full_attention"] * 5},
        {"hidden_size": 30, "num_attention_heads": 1, "intermediate_size": 7},
        {"hidden_size": 8, "num_attention_heads": 4, "layers": 1},
    ],
    ids=str,
)
def test_full_depth_is_the_stock_model_with_every_option(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_encoder(tmp_path, "modernbert", **SMALL | options)
    architecture, graphs = graphs_of(folder, False)
    assert largest_difference(folder, stitch(graphs), LENGTHS) < 2e-5
    for layer, segment in enumerate(graphs[:-1]):
        read_segment(read_model(segment.SerializeToString()), architecture, layer)


@pytest.mark.slow
def test_texts_of_hundreds_of_tokens(tmp_path: Path) -> None:
    """Uses the local attention of real ModernBERT models: one block, several blocks, and an incomplete last block."""
    more = {"local_attention": 128, "max_position_embeddings": 8192}
    folder = save_encoder(tmp_path, "modernbert", **SMALL | more)
    graph = stitch(graphs_of(folder, False)[1])
    assert largest_difference(folder, graph, [65, 129, 255, 256, 257, 320, 321, 383, 700]) < 2e-5
    assert largest_difference(folder, graph, [8192]) < 1e-4


def test_no_weight_has_the_size_of_the_longest_text(tmp_path: Path) -> None:
    more = {"max_position_embeddings": 8192}
    _, graphs = graphs_of(save_encoder(tmp_path, "modernbert", **SMALL | more), True)
    assert max(d for g in graphs[1:] for w in g.graph.initializer for d in w.dims) <= 256


@exact_int8
def test_int8_as_one_graph(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, "modernbert", **SMALL)
    model = fuse(stitch(graphs_of(folder, True)[1]))
    words = next(n for n in model.graph.node if n.op_type == "Gather").input[0]
    assert next(w.data_type for w in model.graph.initializer if w.name == words) == TensorProto.INT8
    for graph in (model, dequantize(model)):
        assert largest_difference(folder, graph, LENGTHS) < 0.3


CONFIG: dict[str, Any] = AutoConfig.for_model("modernbert", hidden_size=64, num_attention_heads=4).to_dict()


def scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    return CONFIG["rope_parameters"] | {kind: {"rope_theta": 100.0, "rope_type": "default"} | parameters}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_activation": "silu"}, "activation 'silu' cannot be exported"),
        (
            {"rope_parameters": scaled("sliding_attention", rope_type="longrope")},
            "sliding.*'longrope' cannot",
        ),
        (
            {"rope_parameters": scaled("full_attention", type="yarn")},
            "type 'yarn' must be rope_type, 'default'",
        ),
        ({"rope_parameters": {**CONFIG["rope_parameters"], "factor": 2}}, "rope_parameters .* not 'factor'"),
        ({"rope_parameters": scaled("full_attention", partial_rotary_factor=0.5)}, "partial.* be 1, got 0.5"),
        *(
            ({"rope_parameters": scaled("full_attention", **{**known, **wrong})}, message)
            for known, wrong, message in (
                (YARN, {"factor": 0.5}, "full_attention: factor must be a number from 1 to .*, got 0.5"),
                (YARN, {"factor": None}, "factor must be a number .*, got None"),
                (YARN, {"attention_factor": True}, "attention_factor must be a number .*, got True"),
                (YARN, {"original_max_position_embeddings": float("nan")}, "original.* a number .*, got nan"),
                (YARN, {"truncate": False}, "truncate must be true, got False"),
                (YARN, {"beta_fast": 1, "beta_slow": 6.5}, "frequencies of rope_type 'yarn' must descend"),
                (LLAMA3, {"high_freq_factor": 1}, "high_freq_factor must be above low_freq_factor, 1, got 1"),
            )
        ),
        (
            {"rope_parameters": scaled("full_attention", rope_theta=0.5)},
            "rope_theta must be above 1, .* got 0.5",
        ),
        ({"rope_parameters": None}, "need transformers 5 or newer"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types 'chunked_attention' cannot"),
        ({"head_dim": 32}, "num_attention_heads 4, head_dim 32"),
        ({"num_attention_heads": 5}, "heads of the same, even size: not num_attention_heads 5"),
        ({"local_attention": 1}, "local_attention must be 2 or more, got 1"),
        ({"is_decoder": True}, "is_decoder is true"),
    ],
)
def test_an_option_that_cannot_be_exported_is_named(options: dict[str, Any], message: str) -> None:
    family(CONFIG)
    with pytest.raises(ValueError, match=message):
        family(CONFIG | options)


def test_a_head_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, "modernbert", labels=2, classifier_activation="silu")
    with pytest.raises(ValueError, match="classifier_activation 'silu' cannot be exported; supported: gelu"):
        Stock.open("name", folder)
    more = {"classifier_pooling": "max", "classifier_activation": "gelu"}
    config = json.loads((folder / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'classifier_pooling': .* got max"):
        pretrained.open_encoder(str(folder))


def test_layers_keep_no_memory_of_texts_of_thousands_of_tokens() -> None:
    assert session_options(512).enable_cpu_mem_arena and not session_options(8192).enable_cpu_mem_arena
