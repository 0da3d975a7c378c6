"""Graphs built by export are accepted; any other connection, attribute or constant is refused."""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from de3.export.build import build
from de3.model_store.graph_check import GraphError
from de3.model_store.graph_reader import read_segment
from de3.model_store.manifest import Head, Manifest
from de3.training.encoders import FAMILIES
from de3.training.stock import open_stock, with_exits
from tests.fixtures import save_encoder

FREE = ("epsilon", "num_heads")  # free like weights: any value within limits


@cache
def built(family: str, int8: bool) -> tuple[list[Any], Manifest]:
    """The graphs of a small random classifier with exits, and its manifest."""
    opened = open_stock(str(save_encoder(Path(mkdtemp()), family, labels=3)))
    model = with_exits(opened, "mean", "text")
    config = model.config
    graphs = [
        m.graph for m in build(model, int8, "token_type_ids" in opened.tokenizer.model_input_names).values()
    ]
    assert config.head is not None
    manifest = Manifest.model_construct(
        **{
            name: getattr(config, name)
            for name in ("num_layers", "exit_layers", "prototype_layers", "hidden_size")
        },
        metric_dim=config.metric_dim,
        labels=config.label_names,
        max_tokens=config.max_tokens,
        token_types=any(x.name == "token_type_ids" for x in graphs[0].input),
        encoder=family,
        pooling="mean",
        precision="int8" if int8 else "fp32",
        head=Head.model_validate({**config.head, "norm": "norm" in config.head}),
    )
    return graphs, manifest


def parts(graph: Any) -> Iterator[Any]:
    """A graph and its branches."""
    yield graph
    for node in graph.node:
        yield from (a.g for a in node.attribute if a.HasField("g"))


def changes(graph: Any) -> Iterator[tuple[str, Any]]:
    """The graph with a single change, a different one each time, and the name of that change."""
    for p, part in enumerate(parts(graph)):
        values = [x.name for x in graph.input] + [x for n in part.node for x in n.output]
        for n, node in enumerate(part.node):
            for i, name in enumerate(node.input):
                other = next((v for v in values if v not in (name, *node.output)), None)
                if name and other is not None:
                    copy = deepcopy(graph)
                    list(parts(copy))[p].node[n].input[i] = other
                    yield f"{node.op_type} takes {other} as input {i}", copy
            for a, attribute in enumerate(node.attribute):
                if attribute.name in FREE or attribute.HasField("g") or attribute.HasField("t"):
                    continue
                copy = deepcopy(graph)
                changed = list(parts(copy))[p].node[n].attribute[a]
                if attribute.ints:
                    changed.ints[0] += 1
                elif attribute.HasField("f"):
                    changed.f += 0.5
                else:
                    changed.i += 1
                yield f"{node.op_type} has another {attribute.name}", copy
    for w, weight in enumerate(graph.initializer):
        array = numpy_helper.to_array(weight)
        if array.dtype == np.int64 or array.ndim == 0:
            copy = deepcopy(graph)
            other = np.asarray(array / 2 if array.dtype == np.float32 and array else array + 1, array.dtype)
            copy.initializer[w].CopyFrom(numpy_helper.from_array(other, weight.name))
            yield f"the constant {weight.name} is another", copy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("int8", [False, True])
def test_one_change_is_enough_to_be_refused(family: str, int8: bool) -> None:
    graphs, manifest = built(family, int8)
    for layer, graph in enumerate(graphs):
        read_segment(graph, layer, manifest)
        accepted = []
        for what, changed in changes(graph):
            try:
                read_segment(changed, layer, manifest)
            except GraphError:
                continue
            accepted.append(what)
        assert not accepted, f"{family}, layer {layer}"


@pytest.mark.parametrize(
    "change",
    [
        {"head": None},
        {"head": Head(pooling="cls", activation="relu")},
        {"head": Head(pooling="mean", activation="tanh")},
        {"pooling": "cls"},
        {"max_tokens": 65},
        {"hidden_size": 32},
        {"labels": ["a", "b"]},
        {"encoder": "roberta"},
    ],
)
def test_a_manifest_of_another_model_is_refused(change: dict[str, Any]) -> None:
    graphs, manifest = built("bert", False)
    other = manifest.model_copy(update=change)
    refused = []
    for layer, graph in enumerate(graphs):
        try:
            read_segment(graph, layer, other)
        except GraphError:
            refused.append(layer)
    # RoBERTa has BERT's layout, so its graphs stay valid.
    assert bool(refused) == ("encoder" not in change)


def test_the_distances_of_mpnet_reach_as_far_as_its_texts() -> None:
    graphs, manifest = built("mpnet", True)
    with pytest.raises(GraphError, match="does not add one value"):
        read_segment(graphs[1], 1, manifest.model_copy(update={"max_tokens": 65}))


@pytest.mark.parametrize("int8", [False, True])
def test_heads_that_do_not_divide_the_width_are_refused(int8: bool) -> None:
    graphs, manifest = built("bert", int8)
    layer = deepcopy(graphs[1])
    (heads,) = (a for node in layer.node for a in node.attribute if a.name == "num_heads")
    for count in (2, 64):
        heads.i = count
        assert read_segment(layer, 1, manifest).part.num_heads == count
    for count in (0, 3, 65, 128, -4):
        heads.i = count
        with pytest.raises(GraphError, match="an unexpected 'num_heads'"):
            read_segment(layer, 1, manifest)
