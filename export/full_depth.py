"""The whole model as one plain ONNX graph without exits, for comparison with other servers.

It has the nodes and weights of all segments in order, and the last layer's classifier.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load as load_tensors

from de3.export.trained import Trained
from de3.model_store.architecture import Architecture
from de3.model_store.manifest import EXITS
from de3.model_store.model import Weights, exit_graph, exit_weights, read_segments
from de3.model_store.segment_graph import read_exits
from de3.model_store.store import Artifact, read_manifest
from de3.training.checkpoint import Checkpoint


def stitch(graphs: list[onnx.ModelProto]) -> onnx.ModelProto:
    """Join graphs into one model, from input_ids and, if used, token_type_ids (1, T) to the last exit's logits.

    graphs: those of the segments in order, then that of the last exit.
    """
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    hidden = ""
    for layer, part in enumerate(graphs):
        graph, prefix = part.graph, f"l{layer}_"
        inputs = {"hidden": hidden} if layer else {x.name: x.name for x in graph.input}

        def name(value: str, inputs: dict[str, str] = inputs, prefix: str = prefix) -> str:
            return inputs.get(value, prefix + value if value else "")

        for node in graph.node:
            copy = deepcopy(node)
            copy.name = ""
            copy.input[:] = [name(x) for x in node.input]
            copy.output[:] = [name(x) for x in node.output]
            nodes.append(copy)
        for weight in graph.initializer:
            tensor = deepcopy(weight)
            tensor.name = prefix + weight.name
            weights.append(tensor)
        hidden = name("next_hidden" if layer else "hidden")

    logits = prefix + "logits"
    shape = graphs[-1].graph.output[0].type.tensor_type.shape.dim
    result = helper.make_graph(
        [],
        "full_depth",
        [x for x in graphs[0].graph.input if x.name.endswith("_ids")],
        [
            helper.make_tensor_value_info(
                logits, TensorProto.FLOAT, [x.dim_param or x.dim_value for x in shape]
            )
        ],
        weights,
    )
    _prune(result, nodes)  # drops nodes that only the distances need
    for node in result.node:
        node.output[:] = ["logits" if x == logits else x for x in node.output]
    result.output[0].name = "logits"
    model = helper.make_model(
        result,
        opset_imports=list(graphs[0].opset_import),
        producer_name="de3",
        ir_version=graphs[0].ir_version,
    )
    onnx.checker.check_model(model)
    return model


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert an int8 model to one activation scale per text, as ONNX Runtime's fused operators need.

    Returns a new model; an fp32 model is copied unchanged.
    """
    result = deepcopy(model)
    nodes = result.graph.node
    made_by = {name: node for node in nodes for name in node.output}
    taken_by: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            taken_by.setdefault(name, []).append(node)

    def unscaled(name: str) -> str:
        """Name of the value `name` before it was shifted and scaled per token."""
        return str(made_by[made_by[name].input[0]].input[0])

    fused, replaced = {}, {}
    for node in nodes:
        if node.op_type == "DynamicQuantizeMatMul":
            x, weight, scale, _ = node.input
            (scaled,) = taken_by[node.output[0]]
            (last,) = taken_by[scaled.output[0]]
            bias = made_by[last.input[1]].input[1]
            fused[last.output[0]] = x, weight, scale, bias
            made = helper.make_node(
                node.op_type, [unscaled(x), weight, scale, "", bias], last.output, domain=node.domain
            )
            replaced[last.output[0]] = [made]
        elif node.op_type == "MultiHeadAttention" and (qkv := _qkv(node, made_by)) in fused:
            x, weight, scale, bias = fused[qkv]
            parts = [f"{qkv}_{part}" for part in ("uint8", "scale", "zero")]
            inputs = [parts[0], weight, bias, parts[1], scale, "", parts[2]]
            heads = next(a.i for a in node.attribute if a.name == "num_heads")
            replaced[node.output[0]] = [
                helper.make_node("DynamicQuantizeLinear", [unscaled(x)], parts),
                helper.make_node("QAttention", inputs, node.output, domain=node.domain, num_heads=heads),
            ]
    whole = [made for node in nodes for made in replaced.get(node.output[0], [node])]
    _prune(result.graph, whole)
    onnx.checker.check_model(result)
    return result


def _qkv(attention: onnx.NodeProto, made_by: dict[str, onnx.NodeProto]) -> str:
    """Name of the value that is split into queries, keys and values; empty if there is no such split."""
    makers = [made_by.get(name) for name in attention.input]
    first = makers[0]
    if first is None or first.op_type != "Split" or makers != [first] * 3:
        return ""
    return str(first.input[0])


def _prune(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Set a graph's nodes, without those nodes and weights that its outputs do not depend on."""
    needed, kept = {x.name for x in graph.output}, []
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    weights = [w for w in graph.initializer if w.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept[::-1])
    graph.initializer.extend(weights)


def dequantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a fused int8 model to float32: dequantized weights and float32 operators."""
    arrays = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        out = node.output[0]
        if node.op_type == "DynamicQuantizeLinear":
            hidden = node.input[0]
        elif node.op_type == "DynamicQuantizeMatMul":
            activations, weight, scale, _, bias = node.input
            weights[weight] = arrays[weight] * arrays[scale]
            nodes.append(helper.make_node("MatMul", [activations, weight], [out + "_product"]))
            nodes.append(helper.make_node("Add", [out + "_product", bias], [out]))
        elif node.op_type == "QAttention":
            _, weight, bias, _, scale = node.input[:5]
            weights[weight] = arrays[weight] * arrays[scale]
            heads = next(a.i for a in node.attribute if a.name == "num_heads")
            inputs = [hidden, weight, bias]
            nodes.append(helper.make_node("Attention", inputs, [out], domain=node.domain, num_heads=heads))
        else:
            nodes.append(node)
    result = deepcopy(model)
    del result.graph.initializer[:]
    result.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(weights.get(name, array), order="C"), name)
        for name, array in arrays.items()
    )
    _prune(result.graph, nodes)
    onnx.checker.check_model(result)
    return result


def write(folder: Path, model: onnx.ModelProto, tokenizer: bytes, labels: list[str], max_tokens: int) -> None:
    """Write model.onnx, tokenizer.json and config.json (labels, max_tokens) into a new folder."""
    folder.mkdir(parents=True, exist_ok=False)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "tokenizer.json").write_bytes(tokenizer)
    config = {"labels": labels, "max_tokens": max_tokens}
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def _whole(
    segments: list[bytes], architecture: Architecture, exits: Mapping[int, Weights]
) -> onnx.ModelProto:
    """The whole model, from its segments' graphs and its exits' weights by layer."""
    last = architecture.num_layers
    graphs = [*segments, exit_graph(architecture, last, exits[last])]
    return stitch([onnx.load_model_from_string(data) for data in graphs])


def export_full_depth(source: Path, folder: Path, int8: bool) -> None:
    """Write the full-depth model of a checkpoint or an artifact into a new folder.

    source: the checkpoint's or artifact's folder. int8: if false, an int8 artifact is written as float32, with
    dequantized weights.

    Raises ValueError if the new folder exists, for an unusable checkpoint, or for int8 from an fp32 artifact, and
    StoreError for a damaged artifact.
    """
    if folder.exists():
        raise ValueError(f"{folder} already exists; choose a new folder")
    if (source / "manifest.json").exists():
        manifest = read_manifest(source)
        artifact = Artifact(source, manifest)
        model = fuse(_whole([data for data, _ in read_segments(artifact)], manifest, exit_weights(artifact)))
        if manifest.precision == "int8" and not int8:
            model = dequantize(model)
        elif manifest.precision == "fp32" and int8:
            raise ValueError(f"{source} is an fp32 artifact; --quantize int8 needs the checkpoint")
        write(folder, model, artifact.read("tokenizer.json"), manifest.labels, manifest.max_tokens)
        return
    opened = Checkpoint(source)
    trained = Trained(opened)
    architecture = trained.architecture("int8" if int8 else "fp32")
    files = dict(trained.files(architecture))
    model = fuse(
        _whole(
            [files[name] for name in architecture.segment_files()],
            architecture,
            read_exits(load_tensors(files[EXITS]), architecture),
        )
    )
    write(folder, model, trained.tokenizer, opened.names, opened.config.max_tokens)
