"""An encoder's description: its sizes, its part of the graphs, and the names of its weights in a state dict.

The base class has the embeddings and the post-norm block that most families share; a family overrides what differs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto
from pydantic import Field, model_validator

from de3.model_store.graph import Array, Graph
from de3.model_store.part import MAX_INT, MAX_TOKENS, MAX_WIDTH, ManifestPart, Width

Config = Mapping[str, Any]  # a transformers config.json
State = Mapping[str, NDArray[np.float32]]  # weights in float32, by their names in transformers' model
Weights = dict[str, Array]
# Maps our name of a weight to the name of its module, or to the names of several modules to concatenate.
Names = Mapping[str, str | tuple[str, ...]]

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True)
class StockHead:
    """Layout of a stock classifier's head: pooling → dense → activation → norm → classifier.

    A token classifier has no pooling; unless it has a dense layer, its head is the classifier alone.

    Attributes:
        pooling: "cls" (the first token), "mean", or "none" (each token is classified).
        dense, classifier, norm: names of the modules in transformers' model; dense is empty, and norm None, if there is
            none.
        activation: tanh, relu or gelu.
        epsilon: epsilon of the norm.
    """

    dense: str
    activation: str
    classifier: str
    pooling: str = "cls"
    norm: str | None = None
    epsilon: float = 0.0


class Encoder(ManifestPart, ABC):
    """An encoder's description; each family is a subclass.

    Attributes:
        type: transformers' model_type.
        width: width of the embeddings; if it is not hidden_size, a projection follows them.
        vocabulary, positions, token_types: rows of the embedding tables; 0 if there is no such table.
        inner: width inside the feed-forward network.
        epsilon: epsilon of every norm.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}  # fields that a config.json may omit
    PREFIX: ClassVar[str] = ""  # prefix of the encoder's weights in …ForSequenceClassification
    RETURNS_TYPES: ClassVar[bool] = False  # its tokenizers return token types by default
    FINAL_NORM: ClassVar[str] = ""  # name of the norm between a layer's hidden states and its exit
    IS_GATED: ClassVar[bool] = False  # its feed-forward networks have gates
    IS_PRE_NORM: ClassVar[bool] = False  # its norms precede attention and the feed-forward network
    HAS_POSITIONS: ClassVar[bool] = True  # it must have a table of positions; if False, it may have one
    HAS_TOKEN_TYPES: ClassVar[bool] = True  # it may have a table of token types
    HAS_PROJECTION: ClassVar[bool] = False  # the width of its embeddings may differ from hidden_size
    HAS_BIASES: ClassVar[bool] = True  # its layers and norms have biases; if False, a missing bias is zero
    NORM_LAST: ClassVar[bool] = False  # the embeddings' norm follows the projection
    HEAD: ClassVar[StockHead]  # used by `head`, unless a family overrides it
    TABLES: ClassVar[Mapping[str, str]] = {}  # names of the embeddings' weights and norm
    LAYER: ClassVar[str] = ""  # prefix of the names in layer {}, numbered from 0
    NAMES: ClassVar[Names] = {}  # names of its linear layers and norms, after LAYER

    type: str
    num_layers: int = Field(ge=1, le=99)
    hidden_size: Width
    width: Width
    vocabulary: int = Field(ge=1, le=MAX_INT)
    positions: int = Field(ge=0, le=MAX_INT)
    token_types: int = Field(ge=0, le=MAX_WIDTH)
    num_heads: Width
    inner: Width
    activation: Literal["gelu", "gelu_tanh", "relu"]
    epsilon: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _has_equal_heads(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads must divide hidden_size, {self.hidden_size}, got {self.num_heads}")
        return self

    @model_validator(mode="after")
    def _has_its_tables(self) -> Self:
        if self.HAS_POSITIONS and not self.positions:
            raise ValueError(f"positions must be 1 or more in an encoder of type {self.type}")
        if self.token_types == 1 or (self.token_types and not self.HAS_TOKEN_TYPES):
            raise ValueError(f"token_types must not be {self.token_types} in an encoder of type {self.type}")
        if self.width != self.hidden_size and not self.HAS_PROJECTION:
            raise ValueError(f"width must be hidden_size, {self.hidden_size}, got {self.width}")
        return self

    # From a configuration and a state dict of transformers

    @classmethod
    def complete(cls, config: Config) -> Config:
        """A config.json, completed with defaults, in the form of transformers 5."""
        return {**cls.DEFAULTS, **{name: value for name, value in config.items() if value is not None}}

    @classmethod
    def of(cls, config: Config, token_types: bool) -> Self:
        """The encoder of a configuration that `check` accepts; token_types: true if its tokenizer returns them."""
        return cls.model_validate(cls.fields(config, token_types))

    @classmethod
    def fields(cls, config: Config, token_types: bool) -> dict[str, Any]:
        """Field values of this class, from a transformers config.json, completed by `complete`.

        token_types: true if the tokenizer returns token types.
        """
        types = int(config["type_vocab_size"])
        return {
            "type": config["model_type"],
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "width": config["hidden_size"],
            "vocabulary": config["vocab_size"],
            "positions": cls.max_tokens(config),
            "token_types": types if token_types and types > 1 else 0,
            "num_heads": config["num_attention_heads"],
            "inner": config["intermediate_size"],
            "activation": activation(config["hidden_act"]),
            "epsilon": config["layer_norm_eps"],
        }

    @classmethod
    @abstractmethod
    def check(cls, config: Config) -> None:
        """Raise ValueError for an option that cannot be exported."""

    @classmethod
    def max_tokens(cls, config: Config) -> int:
        """Maximum number of tokens of a text, including special tokens."""
        return int(config["max_position_embeddings"])

    @classmethod
    def head(cls, config: Config) -> StockHead:
        """The head of transformers' …ForSequenceClassification; raises ValueError if it cannot be exported."""
        return cls.HEAD

    @classmethod
    def token_head(cls, config: Config) -> StockHead:
        """The head of transformers' …ForTokenClassification; raises ValueError if it cannot be exported."""
        return StockHead("", "", "classifier", "none")

    def embedding_weights(self, config: Config, state: State) -> Weights:
        """The weights of `embed`; raises ValueError for tables whose sizes do not match the configuration.

        Without token types, the embedding of type 0 is added to every position or, without positions, to every word.
        """
        weights = named(state, "", {k: v for k, v in self.TABLES.items() if f"{v}.weight" in state}, True)
        position, types = weights.get("position.weight"), weights.get("token_type.weight")
        for table, array, rows in (
            ("word", weights.get("word.weight"), "vocab_size"),
            ("position", position, "max_position_embeddings"),
            ("token_type", types, "type_vocab_size"),
        ):
            if array is not None:
                check_shape(self.TABLES[table], array, int(config[rows]), self.width)
        if position is not None:  # RoBERTa and encoders like it skip the first rows
            weights["position.weight"] = position = position[len(position) - self.positions :]
        if types is not None and not self.token_types:
            table = "word.weight" if position is None else "position.weight"
            weights[table] = weights[table] + types[0]
        return weights

    def layer_weights(self, config: Config, state: State, layer: int) -> Weights:
        """The weights of `block`; the first layer is number 1."""
        return named(state, self.LAYER.format(layer - 1), self.NAMES, not self.HAS_BIASES)

    # The graph

    @property
    def longest(self) -> int:
        """Maximum number of tokens of a text."""
        return self.positions or MAX_TOKENS

    @property
    def score_scale(self) -> float | None:
        """Factor of Q·Kᵀ in attention scores with relative terms; None if the attention has no such terms."""
        return None

    def up_to(self, layer: int) -> Self:
        """The encoder without the layers above this one."""
        return self.model_copy(update={"num_layers": layer})

    def window_of(self, layer: int) -> int:
        """The largest distance, in tokens, at which tokens attend to each other in a layer (from 1); 0: no limit."""
        return 0

    def embed(self, g: Graph, ids: str, types: str) -> str:
        """Hidden states (1, T, H) of the embedding output; types: empty without token types.

        Weights: word (vocabulary, width), in int8 with word.scale (vocabulary, 1); position (positions, width) and
        token_type (token_types, width), if they have rows; norm; projection, if width is not hidden_size.
        """
        if g.int8:
            # One scale per row. The cast follows the Gather: ONNX Runtime would fold a DequantizeLinear of the table
            # into a float32 table when it loads the model.
            words = g.weight("word.weight", self.vocabulary, self.width, dtype=np.int8)
            picked = g.node("Cast", g.node("Gather", words, ids), to=TensorProto.FLOAT)
            x = g.node("Mul", picked, g.node("Gather", g.weight("word.scale", self.vocabulary, 1), ids))
        else:
            x = g.node("Gather", g.weight("word.weight", self.vocabulary, self.width), ids)
        if self.positions:
            tokens, zero = g.node("Shape", ids, start=1, end=2), g.constant([0])
            table = g.weight("position.weight", self.positions, self.width)
            x = g.node("Add", x, g.node("Slice", table, zero, tokens, zero))
        if self.token_types:
            table = g.weight("token_type.weight", self.token_types, self.width)
            x = g.node("Add", x, g.node("Gather", table, types))
        if not self.NORM_LAST:
            x = g.norm(x, "norm", self.width, self.epsilon)
        if self.width != self.hidden_size:
            x = g.linear(x, "projection", self.width, self.hidden_size)
        return g.norm(x, "norm", self.hidden_size, self.epsilon) if self.NORM_LAST else x

    def block(self, g: Graph, hidden: str, layer: int) -> str:
        """Hidden states (1, T, H) after a transformer block, here a post-norm one; the first layer is number 1.

        Weights: qkv (hidden, 3·hidden), query, key and value concatenated; attention_out, attention_norm, ffn_in,
        ffn_out, ffn_norm.
        """
        size = self.hidden_size
        out = g.linear(self.attention(g, hidden), "attention_out", size, size)
        # Not SkipLayerNormalization: it was measured to be 5 times slower than Add and LayerNormalization.
        hidden = g.norm(g.node("Add", out, hidden), "attention_norm", size, self.epsilon)
        inner = g.activation(g.linear(hidden, "ffn_in", size, self.inner), self.activation)
        out = g.linear(inner, "ffn_out", self.inner, size)
        return g.norm(g.node("Add", out, hidden), "ffn_norm", size, self.epsilon)

    def attention(self, g: Graph, hidden: str) -> str:
        """Attention over hidden states (1, T, H), without the output projection; returns (1, T, H)."""
        size = self.hidden_size
        if g.int8:
            parts = g.split(g.linear(hidden, "qkv", size, 3 * size), 3)
            return g.ms("MultiHeadAttention", *parts, num_heads=self.num_heads)
        weight, bias = g.weight("qkv.weight", size, 3 * size), g.weight("qkv.bias", 3 * size)
        return g.ms("Attention", hidden, weight, bias, num_heads=self.num_heads)


def check_shape(name: str, array: Array, *shape: int) -> None:
    """Raise ValueError unless the weight of a module in transformers' model has the shape that its config implies."""
    if array.shape != shape:
        raise ValueError(
            f"{name}.weight has the shape {array.shape}; according to its config.json, it must be {shape}"
        )


def named(state: State, prefix: str, names: Names, may_lack_biases: bool) -> Weights:
    """The weights of tables, norms and linear layers by our names, read from modules of transformers' model.

    The weights of linear layers are transposed to (inputs, outputs), and those of several modules are concatenated.
    word, position and token_type are tables, and are not transposed. prefix: start of the modules' names.
    may_lack_biases: a missing bias becomes zeros. Raises KeyError for any other missing tensor.
    """
    weights: Weights = {}
    for ours, theirs in names.items():
        modules = [prefix + name for name in ([theirs] if isinstance(theirs, str) else theirs)]
        arrays = [state[f"{name}.weight"] for name in modules]
        if ours in ("word", "position", "token_type"):
            weights[f"{ours}.weight"] = arrays[0]
            continue
        weights[f"{ours}.weight"] = np.concatenate([a.T for a in arrays], axis=-1)
        weights[f"{ours}.bias"] = np.concatenate(
            [
                np.zeros(len(array), np.float32)
                if may_lack_biases and f"{name}.bias" not in state
                else state[f"{name}.bias"]
                for name, array in zip(modules, arrays, strict=True)
            ]
        )
    return weights


def activation(name: str) -> Any:
    """Our name of a transformers activation; raises ValueError if the activation cannot be exported."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} cannot be exported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
