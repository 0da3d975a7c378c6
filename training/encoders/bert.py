"""BERT and encoders with its layout: RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA."""

from typing import Any

from de3.training.encoders.weights import (
    Embeddings,
    Family,
    Layer,
    StockHead,
    array,
    check_activation,
    linear,
    norm,
    side_by_side,
)


def check(config: Any) -> None:
    """Raise ValueError for an option that cannot be exported."""
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"only absolute position embeddings can be exported, not {config.position_embedding_type!r}"
        )
    check_activation(config.hidden_act)
    if getattr(config, "is_decoder", False):
        raise ValueError("only encoders can be exported, not decoders (is_decoder is true)")


def layers(encoder: Any) -> list[Layer]:
    """The blocks of an encoder in order."""
    config = encoder.config
    return [
        Layer(
            qkv=side_by_side(b.attention.self.query, b.attention.self.key, b.attention.self.value),
            attention_out=linear(b.attention.output.dense),
            attention_norm=norm(b.attention.output.LayerNorm),
            ffn_in=linear(b.intermediate.dense),
            ffn_out=linear(b.output.dense),
            ffn_norm=norm(b.output.LayerNorm),
            num_heads=config.num_attention_heads,
            activation=config.hidden_act,
        )
        for b in encoder.encoder.layer
    ]


def tables_from(encoder: Any, token_types: bool, first: int) -> Embeddings:
    """The embedding tables; first: the row of the first token's position."""
    tables = encoder.embeddings
    position = array(tables.position_embeddings.weight)[first:]
    types = getattr(tables, "token_type_embeddings", None)
    token_type = array(types.weight) if types is not None else None
    if token_type is not None and (len(token_type) == 1 or not token_types):
        position, token_type = position + token_type[0], None
    projection = getattr(encoder, "embeddings_project", None)  # ELECTRA's small models
    return Embeddings(
        word=array(tables.word_embeddings.weight),
        position=position,
        token_type=token_type,
        norm=norm(tables.LayerNorm),
        projection=linear(projection) if projection is not None else None,
    )


def first_after_padding(config: Any) -> int:
    """The first position: RoBERTa and encoders like it number positions from the padding id + 1."""
    return int(config.pad_token_id) + 1


def max_after_padding(config: Any) -> int:
    """Maximum number of tokens of an encoder that skips the first positions."""
    return int(config.max_position_embeddings) - first_after_padding(config)


BERT = Family(
    check=check,
    max_tokens=lambda config: int(config.max_position_embeddings),
    embeddings=lambda encoder, token_types: tables_from(encoder, token_types, 0),
    layers=layers,
    head=lambda _: StockHead("bert.pooler.dense", "tanh", "classifier"),
)
ELECTRA = Family(
    check=check,
    max_tokens=BERT.max_tokens,
    embeddings=BERT.embeddings,
    layers=layers,
    head=lambda _: StockHead("classifier.dense", "gelu", "classifier.out_proj"),
)
ROBERTA = Family(
    check=check,
    max_tokens=max_after_padding,
    embeddings=lambda encoder, types: tables_from(encoder, types, first_after_padding(encoder.config)),
    layers=layers,
    head=lambda _: StockHead("classifier.dense", "tanh", "classifier.out_proj"),
)
