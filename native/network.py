"""The kernels' model, built from the weights of an artifact's segments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.native import NoKernelsError

Array = NDArray[Any]
NONE = np.zeros(0, np.float32)
LINEARS = ("qkv", "attention_out", "ffn_in", "ffn_out")  # of a layer, in the order of python.c
TABLES = ("word", "position", "token_type", "norm")
NORMS = ("attention_norm", "ffn_norm")
HEAD_ACTIVATIONS = ("tanh", "relu", "gelu")  # in the order of model.h


@dataclass(frozen=True)
class Memory:
    """Memory in which the processes of a server share a model's weights.

    Attributes:
        fd: as of os.memfd_create, with MFD_ALLOW_SEALING; empty, or filled and sealed by build() in another process.
        is_filled: it is filled.
    """

    fd: int
    is_filled: bool


@dataclass(frozen=True)
class Head:
    """A dense layer between pooling and the last exit's classifier. mean: as in Network, for this exit."""

    activation: str
    mean: bool


@dataclass(frozen=True)
class Network:
    """An encoder with exits.

    Attributes:
        activation: gelu, gelu_tanh or relu.
        mean: the exits' input is the mean of the tokens, otherwise the first token.
        epsilon: of every norm.
        head: None: the last exit is like the others.
        segments: weights by name (model_store/segment_graph.py), index = layer; 0 is the embeddings.
    """

    hidden_size: int
    num_heads: int
    inner: int
    activation: str
    mean: bool
    epsilon: float
    head: Head | None
    segments: Sequence[Mapping[str, Array]]


def build(network: Network, memory: Memory | None = None) -> Any:
    """Build the kernels' model of a network; raises NoKernelsError if they do not support it.

    memory: for the weights, which it then shares with other processes; raises OSError if they cannot be.
    """
    if find_spec("de3.native.kernels") is None:
        raise NoKernelsError("the int8 kernels were not built: de3 was installed without a C compiler")
    try:
        from de3.native import kernels
    except ImportError as error:
        raise NoKernelsError(f"the kernels cannot be loaded: {error}") from None
    if not kernels.supported():
        raise NoKernelsError(kernels.why_not())
    _check(network)
    tables, *layers = network.segments
    try:
        is_gelu, num_words = network.activation == "gelu", len(tables["word.scale"])
        sizes = (network.hidden_size, network.num_heads, network.inner, len(layers), num_words)
        shared = () if memory is None else (memory.fd, memory.is_filled)
        model = kernels.new(*sizes, is_gelu, network.mean, *shared)
        names = ("word.weight", "word.scale", "position.weight", "token_type.weight")
        kernels.set_embeddings(model, *(tables.get(name, NONE) for name in names))
        kernels.set_norm(model, 0, 0, *_norm(tables, "norm"), network.epsilon)
        for number, weights in enumerate(layers, 1):
            for which, name in enumerate(LINEARS):
                kernels.set_linear(model, number, which, *_linear(weights, name))
            for which, name in enumerate(NORMS):
                kernels.set_norm(model, number, which, *_norm(weights, name), network.epsilon)
            if "offsets" in weights:
                kernels.set_offsets(model, number, weights["offsets"])
        for number, weights in enumerate(network.segments):
            if "classifier.weight" in weights:
                classifier = np.ascontiguousarray(weights["classifier.weight"].T)
                space = _linear(weights, "space") if "space.weight" in weights else (NONE, NONE, NONE)
                kernels.set_exit(model, number, classifier, weights["classifier.bias"], *space)
        if (head := network.head) is not None:
            top = layers[-1]
            dense = np.ascontiguousarray(top["dense.weight"].T)
            activation = HEAD_ACTIVATIONS.index(head.activation)
            kernels.set_head(model, dense, top["dense.bias"], activation, head.mean)
    except ValueError as error:  # unsupported sizes
        raise NoKernelsError(str(error)) from None
    if memory is not None and not memory.is_filled:
        kernels.seal(model, memory.fd)
    return model


def _check(network: Network) -> None:
    """Raise NoKernelsError for parts that the kernels do not support."""
    tables, last = network.segments[0], network.segments[-1]
    if "projection.weight" in tables:
        raise NoKernelsError("its embeddings have a projection")
    if "position.weight" not in tables:
        raise NoKernelsError("its embeddings have no positions")
    if "norm.weight" in last:
        raise NoKernelsError("there is no kernel for a head with a norm")
    names = {name.partition(".")[0] for weights in network.segments for name in weights}
    if unknown := names - {*TABLES, *LINEARS, *NORMS, "offsets", "classifier", "space", "dense"}:
        raise NoKernelsError(f"there is no kernel for {min(unknown)}")
    if network.activation not in ("gelu", "relu"):
        raise NoKernelsError(f"there is no kernel for the activation {network.activation}")


def _linear(weights: Mapping[str, Array], name: str) -> tuple[Array, Array, Array]:
    return weights[f"{name}.weight"], weights[f"{name}.scale"], weights[f"{name}.bias"]


def _norm(weights: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]
