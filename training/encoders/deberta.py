"""DeBERTa-v2 and v3: attention adds terms for the distance between two tokens and the content of each."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from de3.training.encoders.bert import BERT
from de3.training.encoders.weights import (
    Array,
    Disentangled,
    Embeddings,
    Family,
    Layer,
    Linear,
    StockHead,
    array,
    check_activation,
    linear,
    norm,
    side_by_side,
)

POSITION_TERMS = ("c2p", "p2c")
TABLE_NORMS = ("layer_norm", "none")
HEAD_ACTIVATIONS = ("tanh", "relu", "gelu")


def check(config: Any) -> None:
    """Raise ValueError for an option that cannot be exported."""
    check_activation(config.hidden_act)
    if not getattr(config, "relative_attention", False):
        raise ValueError("a deberta-v2 encoder without relative_attention cannot be exported")
    terms = config.pos_att_type or []
    if not terms or not set(terms) <= set(POSITION_TERMS):
        raise ValueError(f"pos_att_type must have c2p, p2c or both, and nothing else, got {terms}")
    if wrong := set(_table_norms(config)) - set(TABLE_NORMS):
        raise ValueError(
            f"norm_rel_ebd {min(wrong)!r} cannot be exported; supported: {', '.join(TABLE_NORMS)}"
        )
    if getattr(config, "conv_kernel_size", 0) > 0:
        raise ValueError(
            f"a deberta-v2 encoder with a convolution (conv_kernel_size {config.conv_kernel_size}) cannot be exported"
        )
    heads, hidden = config.num_attention_heads, config.hidden_size
    if getattr(config, "attention_head_size", hidden // heads) * heads != hidden:
        raise ValueError(f"attention_head_size must be hidden_size / num_attention_heads, {hidden}/{heads}")
    buckets, farthest = getattr(config, "position_buckets", -1), _farthest(config)
    # Otherwise transformers would divide by a logarithm that is not above 0.
    if buckets > 0 and (buckets < 2 or farthest - 1 <= buckets // 2):
        raise ValueError(
            f"{buckets} position_buckets cannot be exported with {farthest} max_relative_positions: there must be 2 or "
            "more, and the positions must reach beyond half of them"
        )
    if config.pooler_hidden_act not in HEAD_ACTIVATIONS:
        raise ValueError(
            f"pooler_hidden_act {config.pooler_hidden_act!r} cannot be exported; supported: "
            f"{', '.join(HEAD_ACTIVATIONS)}"
        )
    if config.pooler_hidden_size != hidden:
        raise ValueError(f"pooler_hidden_size must be hidden_size, {hidden}, got {config.pooler_hidden_size}")


def _table_norms(config: Any) -> list[str]:
    return [name.strip() for name in getattr(config, "norm_rel_ebd", "none").lower().split("|")]


def _farthest(config: Any) -> int:
    """The distance from which all distances are treated alike."""
    most = int(getattr(config, "max_relative_positions", -1))
    return most if most > 0 else int(config.max_position_embeddings)


def embeddings(encoder: Any, token_types: bool) -> Embeddings:
    """The embedding tables."""
    tables, projection = encoder.embeddings, encoder.embeddings.embed_proj
    word = array(tables.word_embeddings.weight)
    position = None if tables.position_embeddings is None else array(tables.position_embeddings.weight)
    types = tables.token_type_embeddings
    token_type = None if types is None else array(types.weight)
    if token_type is not None and (len(token_type) == 1 or not token_types):
        if position is None:
            word = word + token_type[0]
        else:
            position = position + token_type[0]
        token_type = None
    return Embeddings(
        word=word,
        position=position,
        token_type=token_type,
        norm=norm(tables.LayerNorm),
        projection=None if projection is None else _without_bias(projection),
        norm_last=True,
    )


def _without_bias(module: nn.Linear) -> Linear:
    weight = array(module.weight)
    return Linear(np.ascontiguousarray(weight.T), np.zeros(len(weight), np.float32))


@torch.no_grad()
def layers(encoder: Any) -> list[Layer]:
    """The blocks of an encoder in order."""
    config = encoder.config
    rows, table = _rows(encoder), encoder.encoder.get_rel_embedding()
    return [
        Layer(
            qkv=side_by_side(
                *(getattr(b.attention.self, f"{name}_proj") for name in ("query", "key", "value"))
            ),
            attention_out=linear(b.attention.output.dense),
            attention_norm=norm(b.attention.output.LayerNorm),
            ffn_in=linear(b.intermediate.dense),
            ffn_out=linear(b.output.dense),
            ffn_norm=norm(b.output.LayerNorm),
            num_heads=config.num_attention_heads,
            activation=config.hidden_act,
            relative=_disentangled(b.attention.self, rows, table),
        )
        for b in encoder.encoder.layer
    ]


def _rows(encoder: Any) -> NDArray[np.int32]:
    """The row of the table of relative embeddings for query − key = 1 − P … P − 1, (2P − 1,)."""
    most, stack = BERT.max_tokens(encoder.config), encoder.encoder
    one, all_ = torch.empty(1, 1, 1), torch.empty(1, most, 1)
    before, after = stack.get_rel_pos(all_, one)[0, 0], stack.get_rel_pos(one, all_)[0, :, 0]
    buckets = torch.cat([before.flip(0), after[1:]])
    span = stack.rel_embeddings.num_embeddings // 2
    rows: NDArray[np.int32] = (buckets + span).clamp(0, 2 * span - 1).int().numpy()
    return rows


def _disentangled(attention: Any, rows: NDArray[np.int32], table: Tensor) -> Disentangled:
    """The table of relative embeddings (rows, hidden), projected by a layer's keys and queries."""
    terms, shared = attention.pos_att_type, attention.share_att_key
    scale = float((attention.attention_head_size * (1 + len(set(terms)))) ** -0.5)

    def scaled(projection: nn.Linear) -> Array:
        return array(projection(table.float()) * scale)

    return Disentangled(
        rows=rows,
        key_table=scaled(attention.key_proj if shared else attention.pos_key_proj)
        if "c2p" in terms
        else None,
        query_table=scaled(attention.query_proj if shared else attention.pos_query_proj)
        if "p2c" in terms
        else None,
        scale=scale,
    )


DEBERTA = Family(
    check=check,
    max_tokens=BERT.max_tokens,
    embeddings=embeddings,
    layers=layers,
    head=lambda config: StockHead("pooler.dense", config.pooler_hidden_act, "classifier"),
)
