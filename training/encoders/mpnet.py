"""MPNet: like RoBERTa, with an attention bias by the distance between two tokens, the same in every layer."""

from typing import Any

import torch

from de3.training.encoders.bert import ROBERTA
from de3.training.encoders.weights import Family, Layer, array, linear, norm, side_by_side


def check(config: Any) -> None:
    """Raise ValueError for an option that cannot be exported."""
    ROBERTA.check(config)
    # transformers numbers the positions from 2 and computes 32 buckets, whatever the configuration says.
    if (config.pad_token_id, config.relative_attention_num_buckets) != (1, 32):
        raise ValueError("an mpnet encoder must have pad_token_id 1 and relative_attention_num_buckets 32")


def layers(encoder: Any) -> list[Layer]:
    """The blocks of an encoder in order."""
    config = encoder.config
    most = ROBERTA.max_tokens(config)
    buckets = encoder.encoder.relative_position_bucket(torch.arange(1 - most, most))
    relative = array(encoder.encoder.relative_attention_bias(buckets).T)
    return [
        Layer(
            qkv=side_by_side(b.attention.attn.q, b.attention.attn.k, b.attention.attn.v),
            attention_out=linear(b.attention.attn.o),
            attention_norm=norm(b.attention.LayerNorm),
            ffn_in=linear(b.intermediate.dense),
            ffn_out=linear(b.output.dense),
            ffn_norm=norm(b.output.LayerNorm),
            num_heads=config.num_attention_heads,
            activation=config.hidden_act,
            relative=relative,
        )
        for b in encoder.encoder.layer
    ]


MPNET = Family(
    check=check,
    max_tokens=ROBERTA.max_tokens,
    embeddings=ROBERTA.embeddings,
    layers=layers,
    head=ROBERTA.head,
)
