"""Weights of an encoder with exits, and the kernels' model built from them.

Linear weights are (inputs, outputs). In int8 they have a scale for each output: weight · scale ≈ float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.native import NoKernelsError

Array = NDArray[Any]
NONE = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Linear:
    """Linear layer, x·W + b; scale: None in float32."""

    weight: Array
    bias: Array
    scale: Array | None


@dataclass(frozen=True)
class Norm:
    """Layer norm."""

    scale: Array
    shift: Array
    epsilon: float


@dataclass(frozen=True)
class Embeddings:
    """Tables for words (V, E), positions (P, E) or None, and token types (T, E) or None; word_scale (V, 1) in int8."""

    word: Array
    word_scale: Array | None
    position: Array | None
    token_type: Array | None
    norm: Norm
    projection: Linear | None


@dataclass(frozen=True)
class Disentangled:
    """Disentangled attention: terms of the scores that depend on the distance and the content of two tokens.

    Attributes:
        rows: row of the tables for query − key = 1 − P … P − 1, (2P − 1,).
        key_table: multiplied with a query, (heads, head size, rows); None: no such term.
        query_table: multiplied with a key, (heads, rows, head size); None: no such term.
    """

    rows: Array
    key_table: Array | None
    query_table: Array | None


@dataclass(frozen=True)
class Layer:
    """A post-norm transformer block.

    Attributes:
        activation: Gelu, FastGelu or Relu, as ONNX Runtime calls them.
        relative: offsets of the attention scores by head and distance, (heads, 2P − 1), or disentangled attention;
            None: neither.
    """

    qkv: Linear
    attention_out: Linear
    attention_norm: Norm
    ffn_in: Linear
    ffn_out: Linear
    ffn_norm: Norm
    num_heads: int
    activation: str
    relative: Array | Disentangled | None = None


@dataclass(frozen=True)
class PreNormLayer:
    """A block of ModernBERT: pre-norm, rotary positions, a gated feed-forward network.

    Attributes:
        attention_norm: None: attention takes the hidden states as they are.
        ffn_in: the activated half and its gate, concatenated, (H, 2·inner).
        frequencies: of the rotary positions, (H / num_heads / 2,).
        window: largest distance between tokens that attend to each other; None: any.
    """

    attention_norm: Norm | None
    qkv: Linear
    attention_out: Linear
    ffn_norm: Norm
    ffn_in: Linear
    ffn_out: Linear
    num_heads: int
    activation: str
    frequencies: Array
    window: int | None


@dataclass(frozen=True)
class Exit:
    """An exit: its classifier (always float32), its metric space, if any, and a norm before pooling, if any."""

    classifier: Linear
    space: Linear | None
    norm: Norm | None = None


@dataclass(frozen=True)
class Head:
    """Dense layer between pooling and classifier of a stock classifier, float32.

    Attributes:
        activation: one of ACTIVATIONS.
        mean: its input is the mean of the tokens, otherwise the first token.
        norm: after the activation, if any.
    """

    dense: Linear
    activation: str
    mean: bool
    norm: Norm | None = None


ACTIVATIONS = ("tanh", "relu", "gelu")  # of a head, in the order of model.h


@dataclass(frozen=True)
class Network:
    """A whole model.

    Attributes:
        hidden_size: width of the hidden states.
        exits: by layer; 0 is the embeddings.
        mean: the exits' input is the mean of the tokens, otherwise the first token.
        head: layers before the last exit's classifier; None: the last exit is like the others.
    """

    hidden_size: int
    embeddings: Embeddings
    layers: Sequence[Layer | PreNormLayer]
    exits: dict[int, Exit]
    mean: bool
    head: Head | None = None


def build(network: Network) -> Any:
    """Build the kernels' model of a network; raises NoKernelsError if they do not support it."""
    if find_spec("de3.native.kernels") is None:
        raise NoKernelsError("the int8 kernels were not built: de3 was installed without a C compiler")
    try:
        from de3.native import kernels
    except ImportError as error:
        raise NoKernelsError(f"the kernels cannot be loaded: {error}") from None
    if not kernels.supported():
        raise NoKernelsError(kernels.why_not())
    layers = _post_norm(network.layers)
    _check(network, layers)
    tables, first = network.embeddings, layers[0]
    assert tables.position is not None
    try:
        is_gelu = first.activation == "Gelu"
        heads, inner = first.num_heads, first.ffn_in.weight.shape[1]
        model = kernels.new(network.hidden_size, heads, inner, len(layers), is_gelu, network.mean)
        kernels.set_embeddings(
            model,
            *(tables.word, _scale(tables.word_scale)),
            *(NONE if table is None else table for table in (tables.position, tables.token_type)),
        )
        _set_norm(model, 0, 0, tables.norm)
        for number, layer in enumerate(layers, 1):
            linears = (layer.qkv, layer.attention_out, layer.ffn_in, layer.ffn_out)
            for which, linear in enumerate(linears):
                kernels.set_linear(model, number, which, linear.weight, _scale(linear.scale), linear.bias)
            for which, norm in enumerate((layer.attention_norm, layer.ffn_norm)):
                _set_norm(model, number, which, norm)
            if layer.relative is not None:
                kernels.set_offsets(model, number, layer.relative)
        for number, head in network.exits.items():
            classifier, space = head.classifier, head.space
            in_space = (
                (NONE, NONE, NONE) if space is None else (space.weight, _scale(space.scale), space.bias)
            )
            kernels.set_exit(
                model, number, np.ascontiguousarray(classifier.weight.T), classifier.bias, *in_space
            )
        if (top := network.head) is not None:
            dense = np.ascontiguousarray(top.dense.weight.T)
            kernels.set_head(model, dense, top.dense.bias, ACTIVATIONS.index(top.activation), top.mean)
    except ValueError as error:  # unsupported sizes
        raise NoKernelsError(str(error)) from None
    return model


def _post_norm(layers: Sequence[Layer | PreNormLayer]) -> list[Layer]:
    """The layers; raises NoKernelsError if one is not a post-norm block."""
    post_norm = [layer for layer in layers if isinstance(layer, Layer)]
    if len(post_norm) != len(layers):
        raise NoKernelsError("there is no kernel for layers of ModernBERT (pre-norm, rotary positions)")
    return post_norm


def _check(network: Network, layers: list[Layer]) -> None:
    """Raise NoKernelsError for parts that the kernels do not support."""
    if any(isinstance(layer.relative, Disentangled) for layer in layers):
        raise NoKernelsError("there is no kernel for disentangled attention")
    if network.embeddings.projection is not None:
        raise NoKernelsError("its embeddings have a projection")
    if network.embeddings.position is None:
        raise NoKernelsError("its embeddings have no positions")
    if any(head.norm is not None for head in network.exits.values()):
        raise NoKernelsError("there is no kernel for exits with a norm")
    if network.head is not None and network.head.norm is not None:
        raise NoKernelsError("there is no kernel for a head with a norm")
    for number, layer in enumerate(layers, 1):
        if layer.activation not in ("Gelu", "Relu"):
            raise NoKernelsError(f"layer {number}: there is no kernel for {layer.activation}")
        if _sizes(layer) != _sizes(layers[0]):
            raise NoKernelsError(f"layer {number}: its sizes differ from the first layer's")


def _sizes(layer: Layer) -> tuple[int, int, str]:
    return layer.num_heads, layer.ffn_in.weight.shape[1], layer.activation


def _scale(scale: Array | None) -> Array:
    if scale is None:
        raise NoKernelsError("only int8 artifacts have kernels")
    return scale


def _set_norm(model: Any, layer: int, which: int, norm: Norm) -> None:
    from de3.native import kernels

    kernels.set_norm(model, layer, which, norm.scale, norm.shift, norm.epsilon)
