"""BERT and encoders with its layout: RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA."""

from typing import Any, ClassVar, Literal

from de3.model_store.families.encoder import Config, Encoder, StockHead, activation


class Bert(Encoder):
    """The BERT family."""

    DEFAULTS: ClassVar = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    PREFIX = "bert."
    HEAD = StockHead("bert.pooler.dense", "tanh", "classifier")
    RETURNS_TYPES = True
    TABLES: ClassVar = {
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "token_type": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
        "projection": "embeddings_project",  # only in ELECTRA's small models
    }
    LAYER = "encoder.layer.{}."
    NAMES: ClassVar = {
        "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention_out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }

    type: Literal["bert"]

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ValueError for an option that cannot be exported."""
        position_type = config.get("position_embedding_type", "absolute")
        if position_type != "absolute":
            raise ValueError(f"only absolute position embeddings can be exported, not {position_type!r}")
        activation(config["hidden_act"])
        if config.get("is_decoder"):
            raise ValueError("only encoders can be exported, not decoders (is_decoder is true)")


class Electra(Bert):
    """The ELECTRA family, whose embeddings may differ in width from the hidden states."""

    DEFAULTS: ClassVar = Bert.DEFAULTS | {
        "embedding_size": 128,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }
    PREFIX = "electra."
    HEAD = StockHead("classifier.dense", "gelu", "classifier.out_proj")
    HAS_PROJECTION = True
    type: Literal["electra"]  # type: ignore[assignment]

    @classmethod
    def fields(cls, config: Config, token_types: bool) -> dict[str, Any]:
        """Field values of this class, from a transformers config.json; see `Encoder.fields`."""
        return super().fields(config, token_types) | {"width": config["embedding_size"]}


class Roberta(Bert):
    """RoBERTa and encoders like it, which number positions from the padding id + 1."""

    DEFAULTS: ClassVar = Bert.DEFAULTS | {"pad_token_id": 1}
    PREFIX = "roberta."
    HEAD = StockHead("classifier.dense", "tanh", "classifier.out_proj")
    RETURNS_TYPES = False
    type: Literal["roberta", "xlm-roberta", "camembert"]  # type: ignore[assignment]

    @classmethod
    def max_tokens(cls, config: Config) -> int:
        """Maximum number of tokens of a text: the positions up to the padding id are not used."""
        return int(config["max_position_embeddings"]) - int(config["pad_token_id"]) - 1
