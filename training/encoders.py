"""The weights of the supported encoder families under common names: the only code that knows the families.

Only export needs it: for training, every Hugging Face encoder returns its hidden states.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float32]

EXPORTABLE = ("bert", "roberta", "distilbert", "electra")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
TEACHERS = (*EXPORTABLE, "mpnet")  # with one exit, at the end


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
class Layer:
    """One post-norm transformer block; `qkv` is query, key and value concatenated, (hidden, 3·hidden)."""

    qkv: Linear
    attention_out: Linear
    attention_norm: Norm
    ffn_in: Linear
    ffn_out: Linear
    ffn_norm: Norm
    num_heads: int
    activation: str


@dataclass(frozen=True)
class Embeddings:
    """Tables of (rows, width); row 0 of `position` is the first token's. `projection` maps width to hidden."""

    word: Array
    position: Array
    token_type: Array | None
    norm: Norm
    projection: Linear | None


def max_tokens(config: Any) -> int:
    """The most tokens that an encoder takes, special tokens included."""
    return int(config.max_position_embeddings) - _first_position(config)


def _first_position(config: Any) -> int:
    """RoBERTa and MPNet number positions from the padding id + 1."""
    return int(config.pad_token_id) + 1 if config.model_type in ("roberta", "mpnet") else 0


def embeddings(encoder: Any, token_types: bool) -> Embeddings:
    """The embedding tables of an encoder; raises ValueError for a family that cannot be exported.

    token_types: whether the tokenizer returns token types. If it returns none, or the encoder has only one,
    the embedding of type 0 is added to `position`.
    """
    config = encoder.config
    _check(config)
    tables = encoder.embeddings
    position = _array(tables.position_embeddings.weight)[_first_position(config) :]
    types = getattr(tables, "token_type_embeddings", None)
    token_type = _array(types.weight) if types is not None else None
    if token_type is not None and (len(token_type) == 1 or not token_types):
        position, token_type = position + token_type[0], None
    projection = getattr(encoder, "embeddings_project", None)  # ELECTRA's small models
    return Embeddings(
        word=_array(tables.word_embeddings.weight),
        position=position,
        token_type=token_type,
        norm=_norm(tables.LayerNorm),
        projection=linear(projection) if projection is not None else None,
    )


def layers(encoder: Any) -> list[Layer]:
    """The blocks of an encoder in order; raises ValueError for a family that cannot be exported."""
    config = encoder.config
    _check(config)
    if config.model_type == "distilbert":
        return [
            Layer(
                qkv=_side_by_side(b.attention.q_lin, b.attention.k_lin, b.attention.v_lin),
                attention_out=linear(b.attention.out_lin),
                attention_norm=_norm(b.sa_layer_norm),
                ffn_in=linear(b.ffn.lin1),
                ffn_out=linear(b.ffn.lin2),
                ffn_norm=_norm(b.output_layer_norm),
                num_heads=config.n_heads,
                activation=config.activation,
            )
            for b in encoder.transformer.layer
        ]
    return [
        Layer(
            qkv=_side_by_side(b.attention.self.query, b.attention.self.key, b.attention.self.value),
            attention_out=linear(b.attention.output.dense),
            attention_norm=_norm(b.attention.output.LayerNorm),
            ffn_in=linear(b.intermediate.dense),
            ffn_out=linear(b.output.dense),
            ffn_norm=_norm(b.output.LayerNorm),
            num_heads=config.num_attention_heads,
            activation=config.hidden_act,
        )
        for b in encoder.encoder.layer
    ]


def check_trainable(config: Any, teacher_only: bool) -> None:
    """Raise ValueError for an encoder that cannot be exported, or be a teacher."""
    if not (teacher_only and config.model_type in TEACHERS):
        _check(config)


def _check(config: Any) -> None:
    if config.model_type not in EXPORTABLE:
        hint = "; with --exits last it can be a --teacher" if config.model_type in TEACHERS else ""
        raise ValueError(
            f"encoders of type {config.model_type!r} cannot be exported; supported: {', '.join(EXPORTABLE)}{hint}"
        )
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"only absolute position embeddings can be exported, not {config.position_embedding_type!r}"
        )
    activation = getattr(config, "hidden_act", getattr(config, "activation", None))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} cannot be exported; supported: {', '.join(ACTIVATIONS)}")
    if getattr(config, "is_decoder", False):
        raise ValueError("only encoders can be exported, not decoders (is_decoder is true)")


def _array(tensor: Any) -> Array:
    return np.asarray(tensor.detach().float().cpu().numpy())


def linear(module: nn.Linear) -> Linear:
    """The weights of a linear layer, with the weight transposed to (inputs, outputs)."""
    return Linear(np.ascontiguousarray(_array(module.weight).T), _array(module.bias))


def _side_by_side(*modules: nn.Linear) -> Linear:
    parts = [linear(m) for m in modules]
    return Linear(np.concatenate([p.weight for p in parts], axis=1), np.concatenate([p.bias for p in parts]))


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(_array(module.weight), _array(module.bias), float(module.eps))
