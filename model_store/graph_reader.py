"""Reader of a segment's graph; it refuses any graph that export/segment.py would not have built.

A list of allowed operators is not enough: they could be connected to a graph that takes any amount of time or memory,
or that has a backdoor triggered by one word. So the nodes, their order, attributes and connections, and the
types and shapes of the weights must be those of an export. Only the values of the weights are free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from de3.model_store import deberta_reader, modernbert_reader
from de3.model_store.graph_check import MICROSOFT, GraphError
from de3.model_store.manifest import Manifest
from de3.model_store.node_reader import ANY, Array, Reader, Weight, floats
from de3.native.network import (
    Disentangled,
    Embeddings,
    Exit,
    Head,
    Layer,
    Linear,
    Network,
    Norm,
    PreNormLayer,
)

PRE_NORM = ("modernbert",)  # encoders whose exits begin with a norm, and whose embeddings have no positions
HEAD_ACTIVATIONS = {"tanh": "Tanh", "relu": "Relu", "gelu": "Gelu"}


def network_of(segments: Sequence["Read"], manifest: Manifest) -> Network:
    """The network of these segments, index = layer."""
    embeddings, *layers = (segment.part for segment in segments)
    exits = {layer: segment.exit for layer, segment in enumerate(segments) if segment.exit is not None}
    head = segments[-1].head
    return Network(manifest.hidden_size, embeddings, layers, exits, manifest.pooling == "mean", head)


@dataclass(frozen=True)
class Read:
    """The weights of a segment: embeddings or layer, its exit, and the stock classifier's head before that."""

    part: Any
    exit: Exit | None
    head: Head | None


def read_segment(graph: Any, layer: int, manifest: Manifest) -> Read:
    """Read the weights of a segment; raises GraphError for a graph that export does not build."""
    try:
        has_exit, has_space = layer in manifest.exit_layers, layer in manifest.prototype_layers
        # An exit is a branch whose outputs are logits and, with prototypes, distances.
        expected = [1 + has_space] if has_exit else []
        if [len(node.output) for node in graph.node if node.op_type == "If"] != expected:
            raise GraphError("its exits do not match the manifest")
        _check_names(graph)
        r = _Reader(graph, {w.name: w for w in graph.initializer}, manifest.precision == "int8")
        part: Embeddings | Layer | PreNormLayer
        if layer == 0:
            part = r.embeddings(manifest)
        else:
            part = (
                modernbert_reader.layer(r, layer, manifest) if _is_pre_norm(manifest) else r.layer(manifest)
            )
        has_head = layer == manifest.num_layers and manifest.head is not None
        head, exit_ = None, None
        if has_exit:
            head, exit_ = r.exit("next_hidden" if layer else "hidden", has_space, has_head, manifest)
        r.end()
        if unused := r.weights.keys() - r.used:
            raise GraphError(f"nothing uses the weight {min(unused)!r}")
        return Read(part, exit_, head)
    except GraphError:
        raise
    except Exception as error:  # of protobuf or NumPy, for malformed values
        raise GraphError(f"{type(error).__name__}: {error}") from None


def _is_pre_norm(manifest: Manifest) -> bool:
    return manifest.encoder in PRE_NORM


def _check_names(graph: Any) -> None:
    """Raise GraphError unless all values have unique names, inside branches too."""
    nodes = list(graph.node)
    for node in graph.node:
        nodes += [inner for a in node.attribute if a.HasField("g") for inner in a.g.node]
    names = [x.name for x in (*graph.input, *graph.initializer)] + [x for n in nodes for x in n.output]
    if "" in names or len(set(names)) != len(names):
        raise GraphError("a value has no name, or a duplicate one")


class _Reader(Reader):
    """Reader of segments with post-norm layers, which most families have."""

    def embeddings(self, manifest: Manifest) -> Embeddings:
        """The embeddings; their output must be named hidden."""
        ids, scale = "input_ids", None
        if self.int8:
            (rows,), (word,) = self.node("Gather", Weight(np.int8, (ANY, ANY)), ids)
            (picked,), _ = self.node("Cast", rows, to=TensorProto.FLOAT)
            (scales,), (scale,) = self.node("Gather", floats(len(word), 1), ids)
            (x,), _ = self.node("Mul", picked, scales)
        else:
            (x,), (word,) = self.node("Gather", floats(ANY, ANY), ids)
        width = word.shape[1]
        is_deberta, position, token_type = manifest.encoder == deberta_reader.ENCODER, None, None
        if not _is_pre_norm(manifest) and (self.next_op() == "Shape" or not is_deberta):
            (tokens,), _ = self.node("Shape", ids, start=1, end=2)
            zero = Weight(np.int64, (1,))
            (rows,), (position, *zeros) = self.node("Slice", floats(ANY, width), zero, tokens, zero)
            if any(z[0] != 0 for z in zeros):
                raise GraphError("its positions do not begin with the first")
            if len(position) < manifest.max_tokens:
                raise GraphError(
                    f"it has {len(position)} positions, too few for {manifest.max_tokens} tokens"
                )
            (x,), _ = self.node("Add", x, rows)
        if manifest.token_types:
            (rows,), (token_type,) = self.node("Gather", floats(ANY, width), "token_type_ids")
            (x,), _ = self.node("Add", x, rows)
        if not is_deberta:
            x, norm = self.norm(x, width)
        projection = None
        if self.next_op() in ("MatMul", "ReduceMax"):
            x, projection = self.linear(x, width, manifest.hidden_size)
        elif width != manifest.hidden_size:
            raise GraphError(f"hidden has {width} dimensions, the manifest says {manifest.hidden_size}")
        if is_deberta:
            x, norm = self.norm(x, manifest.hidden_size)
        self.is_called(x, "hidden")
        return Embeddings(word, scale, position, token_type, norm, projection)

    def layer(self, manifest: Manifest) -> Layer:
        """A transformer block from hidden to next_hidden."""
        hidden = manifest.hidden_size
        relative: Array | Disentangled | None = None
        if manifest.encoder == deberta_reader.ENCODER:
            attended, qkv, relative = deberta_reader.attention(self, manifest)
        elif self.next_op() == "Shape":
            attended, qkv, relative = self._attention_with_offsets(manifest)
        elif self.int8:
            x, qkv = self.linear("hidden", hidden, 3 * hidden)
            parts, _ = self.node("Split", x, outputs=3, axis=-1)
            (attended,), _ = self.node("MultiHeadAttention", *parts, domain=MICROSOFT, num_heads=None)
        else:
            (attended,), (weight, bias) = self.node(
                *("Attention", "hidden", floats(hidden, 3 * hidden), floats(3 * hidden)),
                domain=MICROSOFT,
                num_heads=None,
            )
            qkv = Linear(weight, bias, None)
        heads = self.attributes["num_heads"]
        if not isinstance(heads, int) or not 1 <= heads <= hidden or hidden % heads:
            raise GraphError("its attention has an unexpected 'num_heads'")
        if isinstance(relative, np.ndarray) and len(relative) != heads:
            raise GraphError("its attention does not add one value for each head and distance")
        out, attention_out = self.linear(attended, hidden, hidden)
        (x,), _ = self.node("Add", out, "hidden")
        middle, attention_norm = self.norm(x, hidden)
        up, ffn_in = self.linear(middle, hidden, ANY)
        x, activation = self.activation(up)
        down, ffn_out = self.linear(x, len(ffn_in.bias), hidden)
        (x,), _ = self.node("Add", down, middle)
        x, ffn_norm = self.norm(x, hidden)
        self.is_called(x, "next_hidden")
        return Layer(
            qkv, attention_out, attention_norm, ffn_in, ffn_out, ffn_norm, heads, activation, relative
        )

    def _attention_with_offsets(self, manifest: Manifest) -> tuple[str, Linear, Array]:
        """Attention with an offset for each head and distance: its output's name, its weights and the offsets."""
        scalar, axis = Weight(np.int64, ()), Weight(np.int64, (1,))
        (shape,), _ = self.node("Shape", "hidden", start=1, end=2)
        (tokens,), first = self.node("Squeeze", shape, axis)
        (numbers,), (zero, one) = self.node("Range", scalar, tokens, scalar)
        (keys,), a = self.node("Unsqueeze", numbers, axis)
        (queries,), b = self.node("Unsqueeze", numbers, axis)
        (offsets,), _ = self.node("Sub", keys, queries)
        (rows,), (middle,) = self.node("Add", offsets, scalar)
        (picked,), (relative,) = self.node("Gather", floats(ANY, ANY), rows, axis=1)
        (added,), c = self.node("Unsqueeze", picked, axis)
        constants = [int(x.item()) for x in (*first, zero, one, *a, *b, *c)]
        width = relative.shape[1]
        if (
            constants != [0, 0, 1, 0, 1, 0]
            or width != 2 * int(middle) + 1
            or middle + 1 < manifest.max_tokens
        ):
            raise GraphError("its attention does not add one value for each head and distance")
        x, qkv = self.linear("hidden", manifest.hidden_size, 3 * manifest.hidden_size)
        parts, _ = self.node("Split", x, outputs=3, axis=-1)
        (attended,), _ = self.node(
            "MultiHeadAttention", *parts, "", "", added, domain=MICROSOFT, num_heads=None
        )
        return attended, qkv, relative

    def exit(
        self, hidden: str, has_space: bool, has_head: bool, manifest: Manifest
    ) -> tuple[Head | None, Exit]:
        """An exit: a branch that computes it, and a branch that returns zeros."""
        labels = len(manifest.labels)
        names = ["logits", "distances"][: 1 + has_space]
        given, _ = self.node("If", "with_exit", outputs=len(names), then_branch=None, else_branch=None)
        then_branch, else_branch = self.attributes["then_branch"], self.attributes["else_branch"]
        if given != names:
            raise GraphError("its exit has other outputs")
        yes = _Reader(then_branch, self.weights, self.int8)
        is_mean = (manifest.head.pooling if has_head and manifest.head else manifest.pooling) == "mean"
        pooled, norm = yes.pooled(hidden, is_mean, manifest)
        x, head = yes.head(pooled, is_mean, manifest) if has_head else (pooled, None)
        (logits,), (weight, bias) = yes.node("Gemm", x, floats(manifest.hidden_size, labels), floats(labels))
        outputs, space = [logits], None
        if has_space:
            x, space = yes.linear(pooled, manifest.hidden_size, manifest.metric_dim)
            (unit,), _ = yes.node("LpNormalization", x, axis=1, p=2)
            (distances,), (one,) = yes.node("Gemm", unit, "prototypes", floats(1), alpha=-1.0, transB=1)
            if one[0] != 1:
                raise GraphError("its distances are not 1 - cos")
            outputs.append(distances)
        yes.end()
        self.used |= yes.used
        no = _Reader(else_branch, self.weights, self.int8)
        zeros = []
        for _ in names:
            (value,), _ = no.node("Constant", value=None)
            array = numpy_helper.to_array(no.attributes["value"])
            if array.dtype != np.float32 or array.shape != (1, labels) or array.any():
                raise GraphError("its exit has outputs other than zeros when it is skipped")
            zeros.append(value)
        no.end()
        if [o.name for o in then_branch.output] != outputs or [o.name for o in else_branch.output] != zeros:
            raise GraphError("its exit has other outputs")
        return head, Exit(Linear(weight, bias, None), space, norm)

    def pooled(self, hidden: str, is_mean: bool, manifest: Manifest) -> tuple[str, Norm | None]:
        """Pooling: the name of the tokens' mean or of the first token, and the encoder's final norm, if any."""
        size, norm = manifest.hidden_size, None
        if is_mean:
            if _is_pre_norm(manifest):
                hidden, norm = self.norm(hidden, size)
            (pooled,), _ = self.node("ReduceMean", hidden, axes=[1], keepdims=0)
            return pooled, norm
        (pooled,), (first,) = self.node("Gather", hidden, Weight(np.int64, ()), axis=1)
        if first != 0:
            raise GraphError("its exit pools a token other than the first")
        return self.norm(pooled, size) if _is_pre_norm(manifest) else (pooled, None)

    def head(self, pooled: str, is_mean: bool, manifest: Manifest) -> tuple[str, Head]:
        """A stock classifier's dense layer and norm: the output's name, and the weights."""
        assert manifest.head is not None
        size, activation = manifest.hidden_size, manifest.head.activation
        (x,), (weight, bias) = self.node("Gemm", pooled, floats(size, size), floats(size))
        operator = HEAD_ACTIVATIONS[activation]
        (x,), _ = self.node(operator, x, domain=MICROSOFT if operator == "Gelu" else "")
        norm = None
        if manifest.head.norm:
            x, norm = self.norm(x, size)
        return x, Head(Linear(weight, bias, None), activation, is_mean, norm)
