"""The architecture of a model: everything that determines its segments' graphs, except the weights."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from de3.exits.spans import MAX_TOKEN_LABELS
from de3.model_store.families import AnyEncoder
from de3.model_store.part import MAX_LABEL, MAX_LABELS, MAX_LAYERS, MAX_TOKENS, Layer, ManifestPart, Width

Label = Annotated[str, Field(max_length=MAX_LABEL)]
Precision = Literal["fp32", "int8"]
PoolingKind = Literal["mean", "cls", "none"]  # none: each token is classified


class Head(ManifestPart):
    """Last exit of an imported classifier: pooling, a dense layer, an activation, a norm, then the classifier.

    Attributes:
        norm: epsilon of the norm; None if there is no norm.
    """

    pooling: PoolingKind
    activation: Literal["tanh", "relu", "gelu"]
    norm: Annotated[float, Field(ge=0, le=1)] | None = None


class Architecture(ManifestPart):
    """The encoder and the exits of a model.

    Attributes:
        exit_layers: layers with an exit, ascending; 0 is the embedding output, the last is num_layers.
        prototype_layers: layers whose exits have prototypes.
        metric_dim: width of the prototype space.
        max_tokens: longest input, including special tokens.
        pooling: pooling of every exit, except a last exit with a head, which has its own.
        head: an imported classifier's head, as the last exit; None if the last exit is like the others.
        special_tokens: true if a special token in a text, such as "[SEP]", reaches the model as that token; if false,
            it does as characters.
    """

    encoder: AnyEncoder
    labels: list[Label] = Field(min_length=1, max_length=MAX_LABELS)
    exit_layers: list[Layer] = Field(min_length=1, max_length=MAX_LAYERS)
    prototype_layers: list[Layer] = Field(max_length=MAX_LAYERS)
    metric_dim: Width
    max_tokens: int = Field(ge=3, le=MAX_TOKENS)
    pooling: PoolingKind
    head: Head | None = None
    precision: Precision
    special_tokens: bool = False

    @property
    def num_layers(self) -> int:
        """Number of encoder layers."""
        return self.encoder.num_layers

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.encoder.hidden_size

    @property
    def is_spans(self) -> bool:
        """True for a token classifier, whose answers are spans."""
        return self.pooling == "none"

    @property
    def token_types(self) -> bool:
        """True if embeddings.onnx takes token_type_ids."""
        return self.encoder.token_types > 0

    @model_validator(mode="after")
    def _fits_encoder(self) -> Self:
        exits = self.exit_layers
        if exits != sorted(set(exits)) or exits[-1] != self.num_layers:
            raise ValueError(f"exit_layers must ascend from 0 or more to {self.num_layers}, got {exits}")
        if self.head is not None and self.prototype_layers == exits:
            raise ValueError("prototype_layers must not include the last layer, which has a head")
        if self.is_spans and (self.prototype_layers or not 2 <= len(self.labels) <= MAX_TOKEN_LABELS):
            raise ValueError(
                f"a token classifier must have 2 to {MAX_TOKEN_LABELS} labels, and no prototype_layers"
            )
        if self.head is not None and (self.head.pooling == "none") != self.is_spans:
            raise ValueError("head.pooling must be none if, and only if, pooling is none")
        if self.max_tokens > self.encoder.longest:
            raise ValueError(
                f"max_tokens must be at most {self.encoder.longest}, the encoder's positions, got {self.max_tokens}"
            )
        return self

    def segment_files(self) -> list[str]:
        """Files of the segments in execution order; index = layer."""
        return ["embeddings.onnx", *(f"layer_{m:02}.onnx" for m in range(1, self.num_layers + 1))]


def precision_of(quantize: str, option: str = "--quantize") -> Precision:
    """The precision that `quantize` names, int8 or none; for other values, raises ValueError, naming the option."""
    if quantize not in ("int8", "none"):
        raise ValueError(f"{option} must be int8 or none, got {quantize!r}")
    return "int8" if quantize == "int8" else "fp32"
