"""DistilBERT: BERT's layout with other names, without token types."""

from typing import Any, ClassVar, Literal

from de3.model_store.families.bert import Bert
from de3.model_store.families.encoder import Config, StockHead, activation

EPSILON = 1e-12  # in transformers, whatever the configuration says


class DistilBert(Bert):
    """The DistilBERT family."""

    DEFAULTS: ClassVar = {
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "activation": "gelu",
    }
    PREFIX = "distilbert."
    HEAD = StockHead("pre_classifier", "relu", "classifier")
    RETURNS_TYPES = False
    HAS_TOKEN_TYPES = False
    LAYER = "transformer.layer.{}."
    NAMES: ClassVar = {
        "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention_out": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "ffn_in": "ffn.lin1",
        "ffn_out": "ffn.lin2",
        "ffn_norm": "output_layer_norm",
    }

    type: Literal["distilbert"]  # type: ignore[assignment]

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ValueError for an option that cannot be exported."""
        activation(config["activation"])

    @classmethod
    def fields(cls, config: Config, token_types: bool) -> dict[str, Any]:
        """Field values of this class, from a transformers config.json; see `Encoder.fields`."""
        named = {
            "hidden_size": config["dim"],
            "num_hidden_layers": config["n_layers"],
            "num_attention_heads": config["n_heads"],
            "intermediate_size": config["hidden_dim"],
            "hidden_act": config["activation"],
        }
        return super().fields(
            {**config, **named, "type_vocab_size": 0, "layer_norm_eps": EPSILON}, token_types
        )
