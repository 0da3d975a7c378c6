"""DeBERTa-v2 and v3: attention scores have relative terms, from one token's content and its distance to the other."""

from math import sqrt
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from de3.model_store.families.bert import Bert
from de3.model_store.families.encoder import Config, State, StockHead, Weights, activation, check_shape
from de3.model_store.graph import Array, Graph, GraphError
from de3.model_store.part import MAX_TOKENS, MAX_WIDTH

POSITION_TERMS = ("c2p", "p2c")
TABLE_NORMS = ("layer_norm", "none")
HEAD_ACTIVATIONS = ("tanh", "relu", "gelu")


class Deberta(Bert):
    """The family of DeBERTa-v2 and v3; checkpoints of both have the model type deberta-v2.

    Attributes:
        terms: terms added to the attention scores. c2p multiplies queries by a table of relative keys; p2c multiplies
            keys by a table of relative queries.
        rows: number of rows of these tables.
        distances: length in tokens of the longest text in which every distance has a row.
    """

    DEFAULTS: ClassVar = Bert.DEFAULTS | {
        "hidden_size": 1536,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "intermediate_size": 6144,
        "vocab_size": 128_100,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "pos_att_type": None,
        "pooler_hidden_act": "gelu",
    }
    PREFIX = "deberta."
    HAS_POSITIONS = False
    HAS_PROJECTION = True
    NORM_LAST = True
    TABLES: ClassVar = Bert.TABLES | {"projection": "embeddings.embed_proj"}
    NAMES: ClassVar = Bert.NAMES | {
        "qkv": tuple(f"attention.self.{name}_proj" for name in ("query", "key", "value"))
    }

    type: Literal["deberta-v2"]  # type: ignore[assignment]
    terms: list[Literal["c2p", "p2c"]] = Field(min_length=1, max_length=2)
    rows: int = Field(ge=2, le=MAX_WIDTH)
    distances: int = Field(ge=1, le=MAX_TOKENS)

    @model_validator(mode="after")
    def _has_each_term_once(self) -> Self:
        if self.terms != sorted(set(self.terms)):
            raise ValueError(f"terms must be c2p, p2c or both in this order, got {self.terms}")
        return self

    @classmethod
    def complete(cls, config: Config) -> Config:
        """A config.json, completed with defaults; pos_att_type becomes a list, or None if it is not set."""
        full = {**super().complete(config)}
        full.setdefault("pooler_hidden_size", full["hidden_size"])
        if isinstance(terms := full["pos_att_type"], str):
            full["pos_att_type"] = [term.strip() for term in terms.lower().split("|")]
        return full

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ValueError for an option that cannot be exported."""
        activation(config["hidden_act"])
        if not config.get("relative_attention"):
            raise ValueError("a deberta-v2 encoder without relative_attention cannot be exported")
        terms = config["pos_att_type"] or []
        if not terms or not set(terms) <= set(POSITION_TERMS):
            raise ValueError(f"pos_att_type must have c2p, p2c or both, and nothing else, got {terms}")
        if wrong := set(_table_norms(config)) - set(TABLE_NORMS):
            raise ValueError(
                f"norm_rel_ebd {min(wrong)!r} cannot be exported; supported: {', '.join(TABLE_NORMS)}"
            )
        if config.get("conv_kernel_size", 0) > 0:
            raise ValueError(
                f"a deberta-v2 encoder with a convolution (conv_kernel_size {config['conv_kernel_size']}) cannot be "
                "exported"
            )
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        if config.get("attention_head_size", hidden // heads) * heads != hidden:
            raise ValueError(
                f"attention_head_size must be hidden_size / num_attention_heads, {hidden}/{heads}"
            )
        buckets, farthest = config.get("position_buckets", -1), _farthest(config)
        if max(buckets, farthest) > MAX_WIDTH // 2:
            raise ValueError(f"position_buckets and max_relative_positions must be at most {MAX_WIDTH // 2}")
        # For other values, transformers would divide by a logarithm of 0 or less.
        if buckets > 0 and (buckets < 2 or farthest - 1 <= buckets // 2):
            raise ValueError(
                f"{buckets} position_buckets cannot be exported with {farthest} max_relative_positions: there must be "
                "2 or more, and the positions must reach beyond half of them"
            )
        if config["pooler_hidden_act"] not in HEAD_ACTIVATIONS:
            raise ValueError(
                f"pooler_hidden_act {config['pooler_hidden_act']!r} cannot be exported; supported: "
                f"{', '.join(HEAD_ACTIVATIONS)}"
            )
        if config["pooler_hidden_size"] != hidden:
            raise ValueError(
                f"pooler_hidden_size must be hidden_size, {hidden}, got {config['pooler_hidden_size']}"
            )

    @classmethod
    def fields(cls, config: Config, token_types: bool) -> dict[str, Any]:
        """Field values of this class, from a transformers config.json; see `Encoder.fields`."""
        fields = super().fields(config, token_types)
        if not config.get("position_biased_input", True):
            fields["positions"] = 0
        return fields | {
            "width": config.get("embedding_size", config["hidden_size"]),
            "terms": [term for term in POSITION_TERMS if term in config["pos_att_type"]],
            "rows": 2 * _span(config),
            "distances": cls.max_tokens(config),
        }

    @classmethod
    def head(cls, config: Config) -> StockHead:
        """The head of the stock classifier."""
        return StockHead("pooler.dense", config["pooler_hidden_act"], "classifier")

    @property
    def longest(self) -> int:
        """Maximum number of tokens of a text."""
        return min(self.positions or MAX_TOKENS, self.distances)

    @property
    def score_scale(self) -> float:
        """Factor of Q·Kᵀ in the attention scores; it is smaller with more terms."""
        return 1 / sqrt(self.hidden_size // self.num_heads * (1 + len(self.terms)))

    def layer_weights(self, config: Config, state: State, layer: int) -> Weights:
        """The weights of `block`: BERT's, and those of the relative terms.

        row_numbers (2·distances − 1,) are the tables' rows for the offsets (query position − key position) from
        1 − distances to distances − 1. key_table (heads, head size, rows) and query_table (heads, rows, head size) are
        scaled like the scores.
        """
        weights = super().layer_weights(config, state, layer)
        weights["row_numbers"] = _row_numbers(config, self.distances)
        table, prefix = _table(config, state), self.LAYER.format(layer - 1) + "attention.self."
        kind = "" if config.get("share_att_key") else "pos_"
        for term, name, axes in (("c2p", "key", (1, 2, 0)), ("p2c", "query", (1, 0, 2))):
            if term in self.terms:
                projection = f"{prefix}{kind}{name}_proj"
                projected = table @ state[f"{projection}.weight"].T
                if (bias := state.get(f"{projection}.bias")) is not None:
                    projected = projected + bias
                by_head = (projected * np.float32(self.score_scale)).reshape(self.rows, self.num_heads, -1)
                weights[f"{name}_table"] = np.ascontiguousarray(by_head.transpose(axes))
        return weights

    def attention(self, g: Graph, hidden: str) -> str:
        """Disentangled attention over hidden states (1, T, H): the scores include relative terms."""
        query, key, value = g.split(g.linear(hidden, "qkv", self.hidden_size, 3 * self.hidden_size), 3)
        added = self._scores(g, hidden, query, key)
        return g.ms(
            *("MultiHeadAttention", query, key, value, "", "", added),
            num_heads=self.num_heads,
            scale=self.score_scale,
        )

    def _scores(self, g: Graph, hidden: str, query: str, key: str) -> str:
        """The relative terms, which are added to the attention scores, (1, heads, T, T).

        A short text needs only the tables' middle rows, so only these are multiplied.
        """
        heads, size = self.num_heads, self.hidden_size // self.num_heads
        zero, one = g.constant(0), g.constant(1)
        axes = g.constant([0]), g.constant([1])
        rows = g.weight("row_numbers", 2 * self.distances - 1, dtype=np.int32)
        _check_row_numbers(g.weights["row_numbers"], self.rows)
        middle = g.constant([self.distances - 1])
        tokens = g.node("Shape", hidden, start=1, end=2)
        numbers = g.node("Range", zero, g.node("Squeeze", tokens, axes[0]), one)
        offsets = g.node("Sub", g.node("Unsqueeze", numbers, axes[1]), g.node("Unsqueeze", numbers, axes[0]))
        needed = g.node("Gather", rows, g.node("Add", offsets, middle))  # (T, T)
        farthest = g.node("Sub", tokens, axes[1])
        first = g.node("Gather", rows, g.node("Sub", middle, farthest))
        last = g.node("Gather", rows, g.node("Add", middle, farthest))
        end = g.node("Add", last, g.constant([1], np.int32))
        every_head = g.constant([1, heads, 1, 1])
        index = g.node("Expand", g.node("Sub", needed, first), every_head)
        by_head = g.constant([0, 0, heads, -1])
        added = []
        if "c2p" in self.terms:
            queries = g.node("Transpose", g.node("Reshape", query, by_head), perm=[0, 2, 1, 3])
            table = g.weight("key_table", heads, size, self.rows)
            table = g.node("Slice", table, first, end, g.constant([2], np.int32))
            added.append(g.node("GatherElements", g.node("MatMul", queries, table), index, axis=3))
        if "p2c" in self.terms:
            keys = g.node("Transpose", g.node("Reshape", key, by_head), perm=[0, 2, 3, 1])
            table = g.weight("query_table", heads, self.rows, size)
            table = g.node("Slice", table, first, end, g.constant([1], np.int32))
            added.append(g.node("GatherElements", g.node("MatMul", table, keys), index, axis=2))
        return added[0] if len(added) == 1 else g.node("Add", *added)


def _table_norms(config: Config) -> list[str]:
    return [name.strip() for name in config.get("norm_rel_ebd", "none").lower().split("|")]


def _farthest(config: Config) -> int:
    """The distance beyond which all distances are treated alike."""
    most = int(config.get("max_relative_positions", -1))
    return most if most > 0 else int(config["max_position_embeddings"])


def _span(config: Config) -> int:
    """Half the number of rows of the table of relative embeddings."""
    buckets = int(config.get("position_buckets", -1))
    return buckets if buckets > 0 else _farthest(config)


def _table(config: Config, state: State) -> NDArray[np.float32]:
    """The table of relative embeddings, (rows, hidden), normalized if the configuration says so."""
    table, size = state["encoder.rel_embeddings.weight"], config["hidden_size"]
    check_shape("encoder.rel_embeddings", table, 2 * _span(config), size)
    if "layer_norm" not in _table_norms(config):
        return table
    check_shape("encoder.LayerNorm", state["encoder.LayerNorm.weight"], size)
    centered = table - table.mean(1, keepdims=True)
    unit = centered / np.sqrt((centered**2).mean(1, keepdims=True) + np.float32(config["layer_norm_eps"]))
    return np.asarray(unit * state["encoder.LayerNorm.weight"] + state["encoder.LayerNorm.bias"])


def _row_numbers(config: Config, distances: int) -> NDArray[np.int32]:
    """The tables' rows for the offsets (query − key) from 1 − distances to distances − 1, as in transformers."""
    span, buckets = _span(config), config.get("position_buckets", -1)
    offsets = np.arange(1 - distances, distances)
    if buckets > 0:
        half, most = buckets // 2, _farthest(config)
        far = np.abs(offsets)
        ratio = np.maximum(far, half).astype(np.float32) / np.float32(half)
        steps = np.ceil(np.log(ratio) / np.log(np.float32((most - 1) / half)) * np.float32(half - 1))
        offsets = np.where(far <= half, offsets, np.sign(offsets) * (steps.astype(np.int64) + half))
    return np.clip(offsets + span, 0, 2 * span - 1).astype(np.int32)


def _check_row_numbers(numbers: Array, rows: int) -> None:
    """Raise GraphError unless these can be the numbers that `_row_numbers` computes for a model.

    They must be symmetric around the middle, differ for small offsets, and ascend with the offset. They are not
    recomputed, because logarithms depend on the processor.
    """
    longest, half = len(numbers) // 2, rows // 2
    low, high = numbers[:longest][::-1].astype(np.int64), numbers[longest + 1 :].astype(np.int64)
    near = min(half // 2, longest)
    sound = (
        rows == 2 * half
        and numbers.min() >= 0
        and numbers.max() < rows
        and numbers[longest] == half
        and (high == np.minimum(2 * half - low, 2 * half - 1)).all()
        and (high[:near] == half + 1 + np.arange(near)).all()
        and (np.diff(high) >= 0).all()
    )
    if not sound:
        raise GraphError("its bucket numbers do not match its distances")
