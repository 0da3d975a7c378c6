"""The weights of encoders under common names, as export reads them, and the interface of a family of encoders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float32]
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class Linear:
    """y = x·weight + bias; weight is (inputs, outputs), bias (outputs,)."""

    weight: Array
    bias: Array


@dataclass(frozen=True)
class Norm:
    """Layer normalization with scale and shift (width,)."""

    scale: Array
    shift: Array
    epsilon: float


@dataclass(frozen=True)
class Head:
    """Layers of a stock classifier between pooling and its last linear layer; activation: tanh, relu or gelu.

    Attributes:
        norm: after the activation; None: none.
    """

    dense: Linear
    activation: str
    norm: Norm | None = None


@dataclass(frozen=True)
class Disentangled:
    """Attention's terms for the distance between two tokens, by their content: q·key_table[row] + k·query_table[row].

    Attributes:
        rows: the row for query − key = 1 − P … P − 1, (2P − 1,) int32, with P the maximum number of tokens.
        key_table, query_table: factors of a query and of a key, (rows, hidden), scaled as the scores are; None: no such
            term.
        scale: factor of q·k.
    """

    rows: NDArray[np.int32]
    key_table: Array | None
    query_table: Array | None
    scale: float


@dataclass(frozen=True)
class Layer:
    """One post-norm transformer block; `qkv` is query, key and value concatenated, (hidden, 3·hidden).

    Attributes:
        relative: bias of a head's attention scores for key − query = 1 − P … P − 1, (heads, 2P − 1), with P the
            maximum number of tokens, or terms for distance and content; None: none.
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
    """One pre-norm transformer block with rotary positions and a gated feed-forward network.

    Attributes:
        attention_norm: None: attention takes the hidden states without a norm.
        qkv: query, key and value concatenated, (hidden, 3·hidden).
        ffn_in: the activated part and its gate concatenated, (hidden, 2·inner).
        frequencies: of RoPE, (hidden / heads / 2,): position p turns pair i by p · frequencies[i].
        window: largest distance to which a token attends; None: any.
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
class Embeddings:
    """Tables of (rows, width); row 0 of `position` is the first token's. `projection` maps width to hidden.

    Attributes:
        position: None: no position embeddings.
        norm_last: the norm follows the projection; else it precedes it.
    """

    word: Array
    position: Array | None
    token_type: Array | None
    norm: Norm
    projection: Linear | None
    norm_last: bool = False


@dataclass(frozen=True)
class StockHead:
    """Layout of a stock classifier's head: pooling → dense → activation → norm → classifier.

    Attributes:
        pooling: "cls", the first token, or "mean".
        dense, classifier, norm: names of the modules in transformers' model; norm None: there is none.
        activation: tanh, relu or gelu.
        epsilon: of the norm.
    """

    dense: str
    activation: str
    classifier: str
    pooling: str = "cls"
    norm: str | None = None
    epsilon: float = 0.0


@dataclass(frozen=True)
class Family:
    """A family of encoders, as functions of a configuration or of an encoder of transformers.

    Attributes:
        check: raises ValueError for a configuration with an option that cannot be exported.
        max_tokens: configuration → maximum number of tokens of a text, special tokens included.
        embeddings: encoder, and True if its tokenizer returns token types → its tables. If the tokenizer returns none,
            or the encoder has only one, the embedding of type 0 is added to `position` or `word`.
        layers: encoder → its blocks in order.
        head: configuration → the head of transformers' …ForSequenceClassification; raises ValueError for one that
            cannot be exported.
        final_norm: encoder → the norm between a layer's hidden states and its exit; None: there is none.
    """

    check: Callable[[Any], None]
    max_tokens: Callable[[Any], int]
    embeddings: Callable[[Any, bool], Embeddings]
    layers: Callable[[Any], Sequence[Layer | PreNormLayer]]
    head: Callable[[Any], StockHead]
    final_norm: Callable[[Any], Norm | None] = lambda _: None


def array(tensor: Any) -> Array:
    """A tensor in float32."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def linear(module: nn.Linear) -> Linear:
    """The weights of a linear layer, transposed to (inputs, outputs); a missing bias becomes zeros."""
    return Linear(np.ascontiguousarray(array(module.weight).T), _bias(module, module.out_features))


def side_by_side(*modules: nn.Linear) -> Linear:
    """Several linear layers with the same input, concatenated into one."""
    parts = [linear(m) for m in modules]
    return Linear(np.concatenate([p.weight for p in parts], axis=1), np.concatenate([p.bias for p in parts]))


def norm(module: nn.LayerNorm) -> Norm:
    """The weights of a layer norm; a missing bias becomes zeros."""
    return Norm(array(module.weight), _bias(module, len(module.weight)), float(module.eps))


def _bias(module: nn.Module, size: int) -> Array:
    return np.zeros(size, np.float32) if module.bias is None else array(module.bias)


def check_activation(name: str) -> None:
    """Raise ValueError for an activation that cannot be exported."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} cannot be exported; supported: {', '.join(ACTIVATIONS)}")
