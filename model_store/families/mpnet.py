"""MPNet: RoBERTa with an attention bias that depends on the distance between tokens and is the same in every layer."""

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from de3.model_store.families.bert import Roberta
from de3.model_store.families.encoder import Config, State, Weights, check_shape
from de3.model_store.graph import Graph
from de3.model_store.part import MAX_TOKENS

BUCKETS = 32


class MPNet(Roberta):
    """The MPNet family.

    Attributes:
        distances: length in tokens of the longest text in which every distance has a bias.
    """

    DEFAULTS: ClassVar = Roberta.DEFAULTS | {"vocab_size": 30527, "relative_attention_num_buckets": BUCKETS}
    PREFIX = "mpnet."
    HAS_TOKEN_TYPES = False
    NAMES: ClassVar = {
        "qkv": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "attention_out": "attention.attn.o",
        "attention_norm": "attention.LayerNorm",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }

    type: Literal["mpnet"]  # type: ignore[assignment]
    distances: int = Field(ge=1, le=MAX_TOKENS)

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ValueError for an option that cannot be exported."""
        super().check(config)
        # transformers numbers the positions from 2 and computes 32 buckets, whatever the configuration says.
        if (config["pad_token_id"], config["relative_attention_num_buckets"]) != (1, BUCKETS):
            raise ValueError(
                "an mpnet encoder must have pad_token_id 1 and relative_attention_num_buckets 32"
            )

    @classmethod
    def fields(cls, config: Config, token_types: bool) -> dict[str, Any]:
        """Field values of this class, from a transformers config.json; see `Encoder.fields`."""
        fields = super().fields({**config, "type_vocab_size": 0}, token_types)
        return {**fields, "distances": fields["positions"]}

    @property
    def longest(self) -> int:
        """Maximum number of tokens of a text."""
        return min(self.positions, self.distances)

    def layer_weights(self, config: Config, state: State, layer: int) -> Weights:
        """The weights of `block`: BERT's, and the attention biases, named `offsets` (heads, 2·distances − 1).

        The columns of `offsets` are for key position − query position from 1 − distances to distances − 1.
        """
        table = state["encoder.relative_attention_bias.weight"]
        check_shape("encoder.relative_attention_bias", table, BUCKETS, self.num_heads)
        offsets = table[_buckets(self.distances)].T
        return super().layer_weights(config, state, layer) | {"offsets": np.ascontiguousarray(offsets)}

    def attention(self, g: Graph, hidden: str) -> str:
        """Attention over hidden states (1, T, H) with a relative position bias for each head."""
        size, middle = self.hidden_size, g.constant(self.distances - 1)
        zero, one = g.constant(0), g.constant(1)
        axes = g.constant([0]), g.constant([1])
        tokens = g.node("Squeeze", g.node("Shape", hidden, start=1, end=2), axes[0])
        numbers = g.node("Range", zero, tokens, one)
        offsets = g.node("Sub", g.node("Unsqueeze", numbers, axes[0]), g.node("Unsqueeze", numbers, axes[1]))
        table = g.weight("offsets", self.num_heads, 2 * self.distances - 1)
        picked = g.node("Gather", table, g.node("Add", offsets, middle), axis=1)
        added = g.node("Unsqueeze", picked, axes[0])  # (1, heads, T, T)
        parts = g.split(g.linear(hidden, "qkv", size, 3 * size), 3)
        return g.ms("MultiHeadAttention", *parts, "", "", added, num_heads=self.num_heads)


def _buckets(distances: int) -> NDArray[np.int64]:
    """The bias table's rows for the offsets (key − query) from 1 − distances to distances − 1, as in transformers."""
    offset = -np.arange(1 - distances, distances)
    half, exact, farthest = BUCKETS // 2, BUCKETS // 4, 128
    far = np.abs(offset)
    near = np.maximum(far, 1).astype(np.float32)
    steps = np.log(near / np.float32(exact)) / np.float32(np.log(farthest / exact)) * np.float32(half - exact)
    far = np.where(far < exact, far, np.minimum(exact + steps.astype(np.int64), half - 1))
    return (offset < 0) * half + far
