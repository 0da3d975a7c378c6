"""ModernBERT: pre-norm blocks with RoPE, gated feed-forward networks and, in some layers, local attention.

No weight depends on the maximum length: positions, angles and masks are computed for each text. In a long text,
local attention runs block by block, so its time and memory are linear in the number of tokens.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from onnx import TensorProto
from pydantic import Field, model_validator

from de3.model_store.families.encoder import Config, Encoder, State, StockHead, Weights, activation, named
from de3.model_store.families.rope import LONG_TYPES, rotation
from de3.model_store.graph import Array, Graph, GraphError
from de3.model_store.part import MAX_LAYERS, MAX_TOKENS, Layer

KINDS = ("full_attention", "sliding_attention")
HEAD_ACTIVATIONS = ("gelu", "relu", "tanh")
POOLINGS = ("cls", "mean")
THETAS = 160_000.0, 10_000.0  # bases of RoPE, by kind
LONGEST = 8192  # tokens; global attention takes minutes on a CPU for 32,768, as the longest variants allow
DENSE = 4  # texts of up to this many times the window, in tokens, are one block
MASKED = float(np.finfo(np.float32).min)  # added to the score of a masked token


class ModernBert(Encoder):
    """The ModernBERT family.

    Attributes:
        window: largest distance, in tokens, at which a token attends to another in local layers.
        local_layers: numbers of the layers with local attention; the first layer is number 1.
    """

    DEFAULTS: ClassVar = {
        "hidden_size": 768,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "intermediate_size": 1152,
        "vocab_size": 50_368,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "classifier_activation": "gelu",
        "classifier_pooling": "cls",
    }
    PREFIX = "model."
    HAS_POSITIONS = False
    HAS_BIASES = False
    HAS_TOKEN_TYPES = False
    FINAL_NORM = "final_norm"
    IS_GATED = True
    IS_PRE_NORM = True
    TABLES: ClassVar = {"word": "embeddings.tok_embeddings", "norm": "embeddings.norm"}
    LAYER = "layers.{}."
    NAMES: ClassVar = {
        "attention_norm": "attn_norm",
        "qkv": "attn.Wqkv",
        "attention_out": "attn.Wo",
        "ffn_norm": "mlp_norm",
        "ffn_in": "mlp.Wi",
        "ffn_out": "mlp.Wo",
    }

    type: Literal["modernbert"]
    window: int = Field(ge=1, le=MAX_TOKENS)
    local_layers: list[Layer] = Field(max_length=MAX_LAYERS)

    @model_validator(mode="after")
    def _has_even_heads(self) -> Self:
        if self.hidden_size // self.num_heads % 2:
            raise ValueError(f"num_heads must give heads of an even size, got {self.num_heads}")
        return self

    @model_validator(mode="after")
    def _has_its_own_layers(self) -> Self:
        layers, allowed = self.local_layers, range(1, self.num_layers + 1)
        if self.positions or layers != sorted(set(layers)) or not set(layers) <= set(allowed):
            raise ValueError(
                f"local_layers must ascend from 1 or more to {self.num_layers}, and positions must be 0"
            )
        return self

    def up_to(self, layer: int) -> Self:
        """The encoder without the layers above this one."""
        local = [m for m in self.local_layers if m <= layer]
        return super().up_to(layer).model_copy(update={"local_layers": local})

    @classmethod
    def complete(cls, config: Config) -> Config:
        """A config.json, completed with defaults; the fields of transformers 4 for layers and RoPE are converted."""
        full = {**super().complete(config)}
        every, count = full["global_attn_every_n_layers"], full["num_hidden_layers"]
        full.setdefault("layer_types", [KINDS[i % every > 0] for i in range(count)])
        scaling, ropes = full.get("rope_scaling") or {}, {**(full.get("rope_parameters") or {})}
        thetas = full.get("global_rope_theta", THETAS[0]), full.get("local_rope_theta", THETAS[1])
        for kind, theta in zip(KINDS, thetas, strict=True):
            own = ropes.get(kind) or {}
            rope = {"rope_type": own.get("type", "default"), "rope_theta": theta, **own, **scaling}
            if rope["rope_type"] in LONG_TYPES:
                rope.setdefault("original_max_position_embeddings", full["max_position_embeddings"])
            ropes[kind] = rope
        return full | {"rope_parameters": ropes}

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ValueError for an option that cannot be exported."""
        activation(config["hidden_activation"])
        rope = config.get("rope_parameters")
        if rope is None or not config.get("layer_types"):
            raise ValueError("modernbert encoders need transformers 5 or newer")
        if others := set(rope) - set(KINDS):
            raise ValueError(
                f"rope_parameters must have an entry for each of {', '.join(KINDS)}, not {min(others)!r:.50}"
            )
        for kind in config["layer_types"]:
            if kind not in KINDS:
                raise ValueError(f"layer_types {kind!r} cannot be exported; supported: {', '.join(KINDS)}")
        if len(config["layer_types"]) != config["num_hidden_layers"]:
            raise ValueError("layer_types must have an entry for each of num_hidden_layers")
        size, odd = divmod(config["hidden_size"], config["num_attention_heads"])
        if odd or size % 2 or config.get("head_dim") not in (None, size):
            raise ValueError(
                f"an encoder of hidden_size {config['hidden_size']} must have heads of the same, even size: not "
                f"num_attention_heads {config['num_attention_heads']}, head_dim {config.get('head_dim')}"
            )
        for kind in sorted(set(config["layer_types"])):
            try:
                rotation(rope[kind], size)
            except ValueError as error:
                raise ValueError(f"rope_parameters.{kind}: {error}") from None
        if config["local_attention"] < 2:
            raise ValueError(f"local_attention must be 2 or more, got {config['local_attention']}")
        if config.get("is_decoder"):
            raise ValueError("only encoders can be exported, not decoders (is_decoder is true)")

    @classmethod
    def max_tokens(cls, config: Config) -> int:
        """Maximum number of tokens of a text, including special tokens."""
        return min(super().max_tokens(config), LONGEST)

    @classmethod
    def fields(cls, config: Config, token_types: bool) -> dict[str, Any]:
        """Field values of this class, from a transformers config.json; see `Encoder.fields`."""
        named = {"hidden_act": config["hidden_activation"], "layer_norm_eps": config["norm_eps"]}
        return super().fields({**config, **named, "type_vocab_size": 0}, token_types) | {
            "positions": 0,
            "window": config["local_attention"] // 2,
            "local_layers": [m for m, kind in enumerate(config["layer_types"], 1) if kind == KINDS[1]],
        }

    @classmethod
    def head(cls, config: Config) -> StockHead:
        """The head of the stock classifier; raises ValueError if it cannot be exported."""
        for name, known in (("classifier_activation", HEAD_ACTIVATIONS), ("classifier_pooling", POOLINGS)):
            if config[name] not in known:
                raise ValueError(f"{name} {config[name]!r} cannot be exported; supported: {', '.join(known)}")
        return StockHead(
            *("head.dense", config["classifier_activation"], "classifier", config["classifier_pooling"]),
            norm="head.norm",
            epsilon=float(config["norm_eps"]),
        )

    @classmethod
    def token_head(cls, config: Config) -> StockHead:
        """The head of the stock token classifier, which has the layers of the other one, on each token."""
        return replace(cls.head({**config, "classifier_pooling": "cls"}), pooling="none")

    def window_of(self, layer: int) -> int:
        """The largest distance, in tokens, at which tokens attend to each other; 0: no limit. layer: from 1."""
        return self.window if layer in self.local_layers else 0

    def layer_weights(self, config: Config, state: State, layer: int) -> Weights:
        """The weights of `block`; the first layer is number 1."""
        names = {k: v for k, v in self.NAMES.items() if layer > 1 or k != "attention_norm"}
        weights = named(state, self.LAYER.format(layer - 1), names, True)
        rope = config["rope_parameters"][KINDS[layer in self.local_layers]]
        weights["frequencies"], scale = rotation(rope, self.hidden_size // self.num_heads)
        # A rotation is linear, so its factor can be one of the projections to queries and keys.
        for name in ("qkv.weight", "qkv.bias"):
            weights[name][..., : 2 * self.hidden_size] *= np.float32(scale)
        return weights

    def block(self, g: Graph, hidden: str, layer: int) -> str:
        """Hidden states (1, T, H) after a pre-norm block with rotary positions and a gated feed-forward network.

        Weights: attention_norm, except in the first layer, as the embeddings end with a norm; qkv, attention_out,
        ffn_norm, ffn_in (hidden, 2·inner), which has the activated part and then the gate, and ffn_out; frequencies
        (hidden / heads / 2,): position p rotates pair i by p · frequencies[i].
        """
        size, inner = self.hidden_size, self.inner
        normed = hidden if layer == 1 else g.norm(hidden, "attention_norm", size, self.epsilon)
        attended = self._attention(g, normed, layer in self.local_layers)
        hidden = g.node("Add", g.linear(attended, "attention_out", size, size), hidden)
        both = g.linear(g.norm(hidden, "ffn_norm", size, self.epsilon), "ffn_in", size, 2 * inner)
        activated, gate = g.split(both, 2)
        gated = g.node("Mul", g.activation(activated, self.activation), gate)
        return g.node("Add", g.linear(gated, "ffn_out", inner, size), hidden)

    def _attention(self, g: Graph, x: str, is_local: bool) -> str:
        """Attention over x (1, T, H), without the output projection; returns (1, T, H)."""
        size, heads = self.hidden_size, self.num_heads
        query, key, value = g.split(g.linear(x, "qkv", size, 3 * size), 3)
        zero, one = g.constant(0), g.constant(1)
        axes = g.constant([0]), g.constant([1])
        length = g.node("Shape", x, start=1, end=2)
        tokens = g.node("Squeeze", length, axes[0])
        numbers = g.node("Cast", g.node("Range", zero, tokens, one), to=TensorProto.FLOAT)
        numbers = g.node("Unsqueeze", numbers, axes[1])
        angles = g.node("Mul", numbers, g.weight("frequencies", size // heads // 2))
        _check_frequencies(g.weights["frequencies"])
        cos, sin = g.node("Cos", angles), g.node("Sin", angles)  # (T, size of a head / 2)
        query, key = (g.ms("RotaryEmbedding", part, axes[0], cos, sin) for part in (query, key))
        if not is_local:
            return g.ms("MultiHeadAttention", query, key, value, num_heads=heads)

        # A short text is one block; a long one is split into blocks of a window's size, each with a window on either
        # side.
        window = g.constant(self.window)
        is_long = g.node("Greater", tokens, g.constant(DENSE * self.window))
        block = g.node("Where", is_long, window, tokens)
        around = g.node("Where", is_long, window, zero)
        last = g.node("Sub", tokens, one)
        count = g.node("Add", g.node("Div", last, block), one)

        # Positions of queries (blocks, size) and keys (blocks, size + 2·around). Outside the text, its first or last
        # token stands in; such keys are masked, and the results of such queries are cut off.
        starts = g.node("Unsqueeze", g.node("Mul", g.node("Range", zero, count, one), block), axes[1])
        queries = g.node("Add", starts, g.node("Range", zero, block, one))
        before, after = g.node("Neg", around), g.node("Add", block, around)
        keys = g.node("Add", starts, g.node("Range", before, after, one))
        real_queries, real_keys = g.node("Min", queries, last), g.node("Clip", keys, zero, last)

        columns = g.node("Unsqueeze", queries, g.constant([2]))
        rows = g.node("Unsqueeze", keys, axes[1])
        near = g.node("LessOrEqual", g.node("Abs", g.node("Sub", columns, rows)), window)
        real = g.node("Unsqueeze", g.node("Equal", keys, real_keys), axes[1])
        seen = g.node("Unsqueeze", g.node("And", near, real), axes[1])
        unmasked, masked = g.constant(0, np.float32), g.constant(MASKED, np.float32)
        added = g.node("Where", seen, unmasked, masked)  # (blocks, 1, queries, keys)

        query, key, value = (
            g.node("Squeeze", g.node("Gather", part, picked, axis=1), axes[0])
            for part, picked in ((query, real_queries), (key, real_keys), (value, real_keys))
        )
        attended = g.ms("MultiHeadAttention", query, key, value, "", "", added, num_heads=heads)
        attended = g.node("Reshape", attended, g.constant([1, -1, 0]))
        return g.node("Slice", attended, axes[0], length, axes[1])


def _check_frequencies(frequencies: Array) -> None:
    """Raise GraphError unless the frequencies descend from 1 or less, to 0 or more.

    Their exact values are not checked, because they depend on the processor.
    """
    if not (frequencies[0] <= 1 and frequencies[-1] >= 0 and (np.diff(frequencies) <= 0).all()):
        raise GraphError("its positions have frequencies that do not descend from 1 to 0")
