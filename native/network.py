"""The kernels' encoder and exits, built from the weights of an artifact."""

import fcntl
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.native import NoKernelsError

Array = NDArray[Any]
NONE = np.zeros(0, np.float32)
# Numbers in python.c. In the segments, the gate is part of ffn_in.
LINEARS = {"qkv": 0, "attention_out": 1, "ffn_in": 2, "gate": 3, "ffn_out": 4}
NORMS = {
    "attention_norm": 0,
    "ffn_norm": 2,
}  # norms before attention and the feed-forward network; + NORM_AFTER: after them
NORM_AFTER, NORM_OF_TABLES = 1, 3
HEAD_ACTIVATIONS = ("tanh", "relu", "gelu")  # in the same order as in model.h
POOLINGS = ("cls", "mean", "none")  # as well
KNOWN = {
    "word",
    "position",
    "token_type",
    "norm",
    "qkv",
    "attention_out",
    "ffn_in",
    "ffn_out",
    *NORMS,
    "offsets",
}
KNOWN |= {"frequencies", "row_numbers", "key_table", "query_table"}


def can_share_memory() -> bool:
    """True if the system has memory that processes can share and seal; some sandboxes have none."""
    try:
        fd = os.memfd_create("de3-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@dataclass(frozen=True)
class Memory:
    """Memory in which the processes of a server share a model's weights.

    Attributes:
        fd: file descriptor from os.memfd_create with MFD_ALLOW_SEALING. The memory is empty, or build() in another
            process has filled and sealed it.
        is_filled: True if it is filled and sealed.
    """

    fd: int
    is_filled: bool


@dataclass(frozen=True)
class Head:
    """A stock classifier's dense layer between pooling and the last exit's classifier.

    Attributes:
        activation: tanh, relu or gelu.
        pooling: like Exits.pooling, for this exit.
        norm: epsilon of the norm before the classifier; None: no norm.
    """

    activation: str
    pooling: str
    norm: float | None = None


@dataclass(frozen=True)
class Exits:
    """The exits of a model.

    Attributes:
        num_layers: layer of the last exit.
        pooling: the exits' input: the first token (cls), the mean of the tokens (mean), or each token (none).
        epsilon: epsilon of every norm except the head's.
        head: stock head of the last exit; None: the last exit is like the others.
        weights: weights of each exit by name (model_store/segment_graph.py), by layer.
        prototypes: unit rows (K, D), by layer.
    """

    hidden_size: int
    num_layers: int
    pooling: str
    epsilon: float
    head: Head | None
    weights: Mapping[int, Mapping[str, Array]]
    prototypes: Mapping[int, Array]


@dataclass(frozen=True)
class Network:
    """An encoder.

    Attributes:
        activation: gelu, gelu_tanh or relu.
        inner: width inside the feed-forward networks.
        epsilon: epsilon of every norm.
        is_gated: the feed-forward networks have gates: ffn_in has the activated part, then the gate.
        is_pre_norm: norms come before attention and the feed-forward network, otherwise after.
        score_scale: factor of Q·Kᵀ in attention scores with relative terms; None without such terms.
        windows: largest distance between a token and its keys, for each layer from 1 on; 0: any distance.
        max_tokens: number of tokens of the longest text.
        segments: weights by name (model_store/segment_graph.py), index = layer; 0 is the embeddings.
    """

    hidden_size: int
    num_heads: int
    inner: int
    activation: str
    epsilon: float
    is_gated: bool
    is_pre_norm: bool
    score_scale: float | None
    windows: Sequence[int]
    max_tokens: int
    segments: Sequence[Mapping[str, Array]]


def kernels() -> Any:
    """The extension module with the kernels; raises NoKernelsError if it cannot be used on this machine."""
    if find_spec("de3.native.kernels") is None:
        raise NoKernelsError("the int8 kernels were not built: de3 was installed without a C compiler")
    try:
        from de3.native import kernels as module
    except ImportError as error:
        raise NoKernelsError(f"the kernels cannot be loaded: {error}") from None
    if not module.supported():
        raise NoKernelsError(module.why_not())
    return module


def build(network: Network, memory: Memory | None = None) -> Any:
    """Build the kernels' model of an encoder; raises NoKernelsError if they do not support it.

    memory: memory for the weights, shared with other processes; None: this process has its own. Raises OSError if the
    memory cannot be sealed.
    """
    module = kernels()
    _check(network)
    tables, *layers = network.segments
    try:
        is_gelu, num_words = network.activation == "gelu", len(tables["word.scale"])
        sizes = (network.hidden_size, network.num_heads, network.inner, len(layers), num_words)
        shared = () if memory is None else (memory.fd, memory.is_filled)
        model = module.new(*sizes, is_gelu, network.is_gated, *shared)
        names = ("word.weight", "word.scale", "position.weight", "token_type.weight")
        module.set_embeddings(model, *(tables.get(name, NONE) for name in names))
        module.set_norm(model, 0, NORM_OF_TABLES, *_norm(tables, "norm"), network.epsilon)
        for number, weights in enumerate(layers, 1):
            _set_layer(module, model, network, number, weights)
        _set_rotations(module, model, network)
    except ValueError as error:  # unsupported sizes
        raise NoKernelsError(str(error)) from None
    if memory is not None and not memory.is_filled:
        module.seal(model, memory.fd)
    return model


def build_exits(exits: Exits) -> Any:
    """Build the kernels' exits of a model; raises NoKernelsError if the kernels do not support them."""
    module, head = kernels(), exits.head
    try:
        built = module.new_exits(exits.hidden_size, exits.num_layers, POOLINGS.index(exits.pooling))
        for layer, weights in exits.weights.items():
            classifier = np.ascontiguousarray(weights["classifier.weight"].T)
            space = [NONE] * 4
            if "space.weight" in weights:
                parts = (
                    np.ascontiguousarray(weights[f"space.{what}"]) for what in ("weight", "scale", "bias")
                )
                space = [*parts, exits.prototypes[layer]]
            module.set_exit(built, layer, classifier, weights["classifier.bias"], *space)
            if "final_norm.weight" in weights:
                module.set_exit_norm(built, layer, *_norm(weights, "final_norm"), exits.epsilon, False)
        if head is not None:
            top = exits.weights[exits.num_layers]
            dense = np.ascontiguousarray(top["dense.weight"].T)
            activation = HEAD_ACTIVATIONS.index(head.activation)
            module.set_head(built, dense, top["dense.bias"], activation, POOLINGS.index(head.pooling))
            if head.norm is not None:
                module.set_exit_norm(built, exits.num_layers, *_norm(top, "norm"), head.norm, True)
    except ValueError as error:  # unsupported sizes
        raise NoKernelsError(str(error)) from None
    return built


def _set_layer(kernels: Any, model: Any, network: Network, number: int, weights: Mapping[str, Array]) -> None:
    for name, which in LINEARS.items():
        if name != "gate" or network.is_gated:
            kernels.set_linear(model, number, which, *_linear(weights, name, network))
    for name, which in NORMS.items():
        if f"{name}.weight" in weights:
            after = 0 if network.is_pre_norm else NORM_AFTER
            kernels.set_norm(model, number, which + after, *_norm(weights, name), network.epsilon)
    if "offsets" in weights:
        kernels.set_offsets(model, number, weights["offsets"])
    if window := network.windows[number - 1]:
        kernels.set_window(model, number, window)
    if "row_numbers" in weights:
        buckets = np.ascontiguousarray(weights["row_numbers"][::-1], np.int32)  # by key − query
        keys = weights.get("key_table", NONE)
        if len(keys):
            keys = np.ascontiguousarray(keys.transpose(0, 2, 1), np.float32)
        queries = np.ascontiguousarray(weights.get("query_table", NONE), np.float32)
        kernels.set_terms(model, number, network.score_scale, buckets, keys, queries)


def _set_rotations(kernels: Any, model: Any, network: Network) -> None:
    """Set the tables of the rotary position embeddings; layers with the same frequencies share one."""
    layers: dict[bytes, list[int]] = {}
    for number, weights in enumerate(network.segments):
        if "frequencies" in weights:
            layers.setdefault(weights["frequencies"].tobytes(), []).append(number)
    for frequencies, numbers in layers.items():
        positions = np.arange(network.max_tokens, dtype=np.float32)[:, None]
        angles = positions * np.frombuffer(frequencies, np.float32)
        kernels.set_rotation(model, numbers, np.cos(angles), np.sin(angles))


def _check(network: Network) -> None:
    """Raise NoKernelsError for parts that the kernels do not support."""
    if "projection.weight" in network.segments[0]:
        raise NoKernelsError("its embeddings have a projection")
    names = {name.partition(".")[0] for weights in network.segments for name in weights}
    if unknown := names - KNOWN:
        raise NoKernelsError(f"there is no kernel for {min(unknown)}")
    if network.activation not in ("gelu", "relu"):
        raise NoKernelsError(f"there is no kernel for the activation {network.activation}")


def _linear(weights: Mapping[str, Array], name: str, network: Network) -> tuple[Array, Array, Array]:
    part = slice(None)
    if network.is_gated and name in ("ffn_in", "gate"):
        part = slice(None, network.inner) if name == "ffn_in" else slice(network.inner, None)
        name = "ffn_in"
    weight, scale, bias = (weights[f"{name}.{what}"][..., part] for what in ("weight", "scale", "bias"))
    return np.ascontiguousarray(weight), scale, bias


def _norm(weights: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]
