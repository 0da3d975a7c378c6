"""ModernBERT: norms before attention and the gated feed-forward network, RoPE, and layers with local attention."""

from typing import Any

from de3.training.encoders.weights import (
    Embeddings,
    Family,
    PreNormLayer,
    StockHead,
    array,
    check_activation,
    linear,
    norm,
)

KINDS = ("full_attention", "sliding_attention")
HEAD_ACTIVATIONS = ("gelu", "relu", "tanh")
POOLINGS = ("cls", "mean")


def check(config: Any) -> None:
    """Raise ValueError for an option that cannot be exported."""
    check_activation(config.hidden_activation)
    rope = getattr(config, "rope_parameters", None)
    if rope is None or not getattr(config, "layer_types", None):
        raise ValueError("modernbert encoders need transformers 5 or newer")
    for kind in config.layer_types:
        if kind not in KINDS:
            raise ValueError(f"layer_types {kind!r} cannot be exported; supported: {', '.join(KINDS)}")
        if rope[kind].get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_type {rope[kind]['rope_type']!r} cannot be exported, only RoPE without scaling (default)"
            )
        if not rope[kind]["rope_theta"] > 1:
            raise ValueError(f"rope_theta must be above 1, got {rope[kind]['rope_theta']}")
    size, odd = divmod(config.hidden_size, config.num_attention_heads)
    if odd or size % 2 or getattr(config, "head_dim", None) not in (None, size):
        raise ValueError(
            f"an encoder of hidden_size {config.hidden_size} must have heads of the same, even size: not "
            f"num_attention_heads {config.num_attention_heads}, head_dim {getattr(config, 'head_dim', None)}"
        )
    if config.local_attention < 2:
        raise ValueError(f"local_attention must be 2 or more, got {config.local_attention}")
    if getattr(config, "is_decoder", False):
        raise ValueError("only encoders can be exported, not decoders (is_decoder is true)")


def embeddings(encoder: Any, _token_types: bool) -> Embeddings:
    """The word table; there are no positions and no token types."""
    tables = encoder.embeddings
    return Embeddings(array(tables.tok_embeddings.weight), None, None, norm(tables.norm), None)


def layers(encoder: Any) -> list[PreNormLayer]:
    """The blocks of an encoder in order."""
    config = encoder.config
    return [
        PreNormLayer(
            attention_norm=norm(b.attn_norm) if i else None,  # the embeddings end with a norm
            qkv=linear(b.attn.Wqkv),
            attention_out=linear(b.attn.Wo),
            ffn_norm=norm(b.mlp_norm),
            ffn_in=linear(b.mlp.Wi),
            ffn_out=linear(b.mlp.Wo),
            num_heads=config.num_attention_heads,
            activation=config.hidden_activation,
            frequencies=array(getattr(encoder.rotary_emb, f"{kind}_inv_freq")),
            window=config.local_attention // 2 if kind == "sliding_attention" else None,
        )
        for i, (b, kind) in enumerate(zip(encoder.layers, config.layer_types, strict=True))
    ]


def head(config: Any) -> StockHead:
    """The head of the stock classifier; raises ValueError for one that cannot be exported."""
    for name, known in (("classifier_activation", HEAD_ACTIVATIONS), ("classifier_pooling", POOLINGS)):
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name} {getattr(config, name)!r} cannot be exported; supported: {', '.join(known)}"
            )
    return StockHead(
        *("head.dense", config.classifier_activation, "classifier", config.classifier_pooling),
        norm="head.norm",
        epsilon=float(config.norm_eps),
    )


MODERNBERT = Family(
    check=check,
    max_tokens=lambda config: int(config.max_position_embeddings),
    embeddings=embeddings,
    layers=layers,
    head=head,
    final_norm=lambda encoder: norm(encoder.final_norm),
)
