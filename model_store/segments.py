"""The layers of a loaded artifact, run on unpadded samples by ONNX Runtime or by the kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from de3.model_store.manifest import Manifest

Array = NDArray[np.float32]
NOWHERE = "/nonexistent/de3"
ARENA_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Tokens:
    """The encoder's input for one text: ids and type_ids are (1, tokens) int64; truncated: a part was cut off."""

    ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    truncated: bool

    def __len__(self) -> int:
        return int(self.ids.shape[1])


@dataclass(slots=True)
class Step:
    """Results of a segment.

    Attributes:
        hidden: (1, tokens, hidden).
        logits: (K,); None if the layer has no exit or the exit was not computed.
        distances: cosine distances to the prototypes, (K,); None without prototypes, or if the exit was not computed.
    """

    hidden: Array
    logits: Array | None = None
    distances: Array | None = None


class Segment(Protocol):
    """One layer and its exit, run one unpadded sample at a time; safe to share between threads."""

    layer: int
    is_exit: bool

    def embed(self, tokens: Tokens, with_exit: bool) -> Step:
        """Run the embeddings (layer 0) and, if `with_exit`, their exit."""

    def run(self, hidden: Array, with_exit: bool) -> Step:
        """Run an encoder layer on the previous layer's hidden states and, if `with_exit`, its exit."""


class OnnxSegment:
    """A segment that ONNX Runtime runs."""

    def __init__(self, layer: int, session: Any, manifest: Manifest, prototypes: Array | None) -> None:
        """session: runs a graph that `read_segment` has checked. prototypes: (K, D), unit rows, or None."""
        self.layer = layer
        self.is_exit = layer in manifest.exit_layers
        self._session = session
        self._inputs = ["hidden"] if layer else ["input_ids"]
        if layer == 0 and manifest.token_types:
            self._inputs.append("token_type_ids")
        self._outputs = ["next_hidden" if layer else "hidden", *(["logits"] if self.is_exit else [])]
        self._prototypes: dict[str, Any] = {}
        if prototypes is not None:
            self._outputs.append("distances")
            self._prototypes["prototypes"] = prototypes

    def embed(self, tokens: Tokens, with_exit: bool) -> Step:
        """Run the embeddings (layer 0) and, if `with_exit`, their exit."""
        feed = dict(zip(self._inputs, (tokens.ids, tokens.type_ids), strict=False))
        return self._run(feed, with_exit)

    def run(self, hidden: Array, with_exit: bool) -> Step:
        """Run an encoder layer on the previous layer's hidden states and, if `with_exit`, its exit."""
        return self._run({"hidden": hidden}, with_exit)

    def _run(self, feed: dict[str, Any], with_exit: bool) -> Step:
        if self.is_exit:
            feed |= {"with_exit": np.array(with_exit), **self._prototypes}
        values = self._session.run(self._outputs, feed)
        if not (with_exit and self.is_exit):
            return Step(values[0])
        return Step(values[0], values[1][0], values[2][0] if len(values) > 2 else None)


class NativeSegment:
    """A segment that the kernels run."""

    def __init__(
        self, layer: int, kernels: Any, model: Any, manifest: Manifest, prototypes: Array | None
    ) -> None:
        self.layer = layer
        self.is_exit = layer in manifest.exit_layers
        self._run, self._model = kernels.run, model
        self._prototypes = prototypes
        self._hidden, self._labels = manifest.hidden_size, len(manifest.labels)

    def embed(self, tokens: Tokens, with_exit: bool) -> Step:
        """Run the embeddings (layer 0) and, if `with_exit`, their exit."""
        hidden = np.empty((1, len(tokens), self._hidden), np.float32)
        return self._step(tokens.ids, tokens.type_ids, hidden, with_exit)

    def run(self, hidden: Array, with_exit: bool) -> Step:
        """Run an encoder layer on the previous layer's hidden states and, if `with_exit`, its exit."""
        return self._step(hidden, None, np.empty_like(hidden), with_exit)

    def _step(self, x: NDArray[Any], types: NDArray[np.int64] | None, hidden: Array, with_exit: bool) -> Step:
        if not (with_exit and self.is_exit):
            self._run(self._model, self.layer, x, types, hidden, None, None, None)
            return Step(hidden)
        logits = np.empty(self._labels, np.float32)
        distances = None if self._prototypes is None else np.empty(self._labels, np.float32)
        self._run(self._model, self.layer, x, types, hidden, self._prototypes, logits, distances)
        return Step(hidden, logits, distances)


def full_depth(
    segments: Sequence[Segment], tokens: Tokens, check: Callable[[], None] = lambda: None
) -> list[Step]:
    """Results of every segment for one sample, index = layer. check: called before each segment."""
    check()
    steps = [segments[0].embed(tokens, True)]
    for segment in segments[1:]:
        check()
        steps.append(segment.run(steps[-1].hidden, True))
    return steps


def session_options(max_tokens: int = ARENA_TOKENS) -> Any:
    """Options of ONNX Runtime, with one thread per call.

    Running several samples at once, each on one thread, was measured to be 2 to 3 times faster than thread pools.
    max_tokens: length of the longest text.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised; onnxruntime would also write them to standard error
    # No tensor is read from another file: the graphs are checked, and this folder does not exist.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", NOWHERE)
    # One arena for all sessions. An arena keeps the memory of its longest text: after texts of 512 tokens on two
    # threads, 12 layers of BERT's size kept 1.1 GB with an arena each, and keep 0.15 GB with a shared one. Models for
    # longer texts run without an arena, although this was 10 to 15% slower for texts of 400 to 1000 tokens.
    options.enable_cpu_mem_arena = max_tokens <= ARENA_TOKENS
    if options.enable_cpu_mem_arena:
        _make_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights are not allocated in the arena: it would keep their memory after the model is unloaded.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # The segments are built fused; a higher level would fuse Add and LayerNormalization into SkipLayerNormalization,
    # which was measured to be 5 times slower than the two operators (lab/docs/performance.md).
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


@cache
def _make_arena() -> None:
    """Make the arena that all sessions of this process share; only the first call has an effect."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)
