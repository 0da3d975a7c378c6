"""DistilBERT."""

from typing import Any

from de3.training.encoders.bert import BERT
from de3.training.encoders.weights import (
    Family,
    Layer,
    StockHead,
    check_activation,
    linear,
    norm,
    side_by_side,
)


def layers(encoder: Any) -> list[Layer]:
    """The blocks of an encoder in order."""
    config = encoder.config
    return [
        Layer(
            qkv=side_by_side(b.attention.q_lin, b.attention.k_lin, b.attention.v_lin),
            attention_out=linear(b.attention.out_lin),
            attention_norm=norm(b.sa_layer_norm),
            ffn_in=linear(b.ffn.lin1),
            ffn_out=linear(b.ffn.lin2),
            ffn_norm=norm(b.output_layer_norm),
            num_heads=config.n_heads,
            activation=config.activation,
        )
        for b in encoder.transformer.layer
    ]


DISTILBERT = Family(
    check=lambda config: check_activation(config.activation),
    max_tokens=BERT.max_tokens,
    embeddings=BERT.embeddings,
    layers=layers,
    head=lambda _: StockHead("pre_classifier", "relu", "classifier"),
)
