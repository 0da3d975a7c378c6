"""An artifact opened for running: its tokenizer and its segments."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from model_store.graph_check import GraphError, read_graph
from model_store.segments import (
    Array,
    NativeSegment,
    OnnxSegment,
    Segment,
    Step,
    Through,
    Tokens,
    full_depth,
    session_options,
)
from model_store.store import Artifact, StoreError
from model_store.tokenizer import TextTokenizer
from native import NoKernelsError

log = logging.getLogger("de3")
MAX_NATIVE_DIFFERENCE = 0.1  # of the spread of a layer's values over the texts of the proof
MIN_SPREAD = 0.2  # where a layer says much the same of all of them
PROOF = (
    ("a", None),
    ("It was not what we had hoped for , but 3 of the 12 rooms were fine .", None),
    ("the quick brown fox jumps over the lazy dog", "a second text, of another kind"),
    ("one two three four five six seven eight nine ten " * 6, None),
)


class Model:
    """A loaded artifact.

    Attributes:
        tokenizer: its tokenizer.
        segments: index = layer; 0 is the embeddings.
        runtime: what runs them: native or onnxruntime.
        through: runs several samples through all layers in one call; None unless native.
    """

    def __init__(self, artifact: Artifact, runtime: str = "auto") -> None:
        """Read, check and load every file; raises StoreError for the first that is not sound.

        runtime: onnxruntime, native, or auto: native where it can and gives what ONNX Runtime gives.
        """
        self.manifest = artifact.manifest
        self.full_name = artifact.full_name
        manifest = self.manifest
        self.tokenizer = TextTokenizer.of(artifact)
        prototypes = unit_prototypes(artifact)
        options = session_options()

        files = [artifact.read(file) for file in manifest.segment_files()]
        graphs = [check_segment(artifact, layer, data) for layer, data in enumerate(files)]

        def session(layer: int, file: str) -> Any:
            try:
                # From bytes: what runs is what was checked.
                return ort.InferenceSession(files[layer], options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises its own classes, without a common base
                raise StoreError(
                    f"{artifact.path / file}: not a model ONNX Runtime can run: {error}"
                ) from None

        self.runtime = "onnxruntime"
        self.through: Through | None = None
        self.segments: Sequence[Segment] = [
            OnnxSegment(
                layer, session(layer, file), manifest, prototypes.get(layer), str(artifact.path / file)
            )
            for layer, file in enumerate(manifest.segment_files())
        ]
        if runtime != "onnxruntime":
            try:
                self.segments, self.through = self._native(artifact, graphs, prototypes)
                self.runtime = "native"
            except NoKernelsError as error:
                log.info("%s: ONNX Runtime runs it: %s", self.full_name, error)
                if runtime == "native":
                    raise StoreError(f"{artifact.path}: has no kernels here: {error}") from None

    def _native(
        self, artifact: Artifact, graphs: Sequence[Any], prototypes: dict[int, Array]
    ) -> tuple[Sequence[Segment], Through]:
        """The segments as the kernels run them; NoKernelsError unless they give what ONNX Runtime gives."""
        manifest = self.manifest
        kernels, model = _kernels_of(artifact, graphs)
        native = [
            NativeSegment(layer, kernels, model, manifest, prototypes.get(layer))
            for layer in range(manifest.num_layers + 1)
        ]
        self._prove(artifact, native)
        return native, Through(kernels, model, manifest, prototypes)

    def _prove(self, artifact: Artifact, native: Sequence[Segment]) -> None:
        """Compare the kernels with ONNX Runtime on PROOF, the last of it as long as the model takes.

        Raises NoKernelsError if they differ by more than rounding can explain: both quantize activations, so
        that a rounding error can become a step of one in 255.
        """
        longest = " ".join(f"{text} {pair or ''}" for text, pair in PROOF) + " "
        texts = [*PROOF, (longest * (1 + self.manifest.max_tokens // 60), None)]
        pairs: dict[tuple[int, str], list[tuple[Array, Array]]] = {}
        for text, pair in texts:
            tokens = self.tokenize(text, pair)
            try:
                theirs = full_depth(self.segments, tokens)
            except Exception as error:  # onnxruntime raises its own classes, without a common base
                raise StoreError(f"{artifact.path}: loads, but does not run: {error}") from None
            try:
                ours = full_depth(native, tokens)
            except ValueError as error:
                raise NoKernelsError(str(error)) from None
            for layer, (a, b) in enumerate(zip(theirs, ours, strict=True)):
                for name in ("logits", "distances"):
                    x, y = getattr(a, name), getattr(b, name)
                    if (x is None) != (y is None):
                        raise NoKernelsError(
                            f"layer {layer}: the kernels give other values than ONNX Runtime"
                        )
                    if x is not None:
                        pairs.setdefault((layer, name), []).append((x, y))
        for (layer, name), values in pairs.items():
            theirs_, ours_ = (np.stack(side) for side in zip(*values, strict=True))
            spread = max(float(np.ptp(theirs_)), MIN_SPREAD)
            if not np.abs(theirs_ - ours_).max() <= MAX_NATIVE_DIFFERENCE * spread:
                raise NoKernelsError(f"layer {layer}: the kernels' {name} differ from ONNX Runtime's")

    def tokenize(self, text: str, text_pair: str | None = None, truncate: bool = True) -> Tokens:
        """Tokens of a text or pair, at most `max_tokens`, cut at the longer text's end.

        Raises ValueError if the text is longer and `truncate` is false.
        """
        return self.tokenizer.start(text, text_pair, truncate).all()

    def deepest_exit(self, max_layer: int | None) -> int:
        """The deepest exit that is not deeper than max_layer; None: the last layer."""
        if max_layer is None:
            return self.manifest.num_layers
        return max(m for m in self.manifest.exit_layers if m <= max_layer)

    def full_depth(self, tokens: Tokens) -> list[Step]:
        """Every layer's step for one sample, run without exiting; index = layer."""
        return full_depth(self.segments, tokens)


def check(artifact: Artifact) -> str:
    """Check what is in an artifact's files, without running any of it; raises StoreError.

    Why an int8 artifact has no kernels here, if it has none; else empty.
    """
    TextTokenizer.check(artifact)
    unit_prototypes(artifact)
    files = artifact.manifest.segment_files()
    graphs = [check_segment(artifact, layer, artifact.read(file)) for layer, file in enumerate(files)]
    if artifact.manifest.precision == "int8":
        try:
            _kernels_of(artifact, graphs)
        except NoKernelsError as error:
            return str(error)
    return ""


def _kernels_of(artifact: Artifact, graphs: Sequence[Any]) -> tuple[Any, Any]:
    """The kernels, and their model of an artifact; raises NoKernelsError."""
    try:
        from native import graph_reader, kernels
    except ImportError as error:  # not built, or onnx is not installed
        raise NoKernelsError(str(error)) from None
    manifest = artifact.manifest
    if manifest.precision != "int8":
        raise NoKernelsError("only int8 artifacts have kernels")
    shapes = graph_reader.Shapes(manifest.hidden_size, len(manifest.labels), manifest.metric_dim)
    exits, spaces = set(manifest.exit_layers), set(manifest.prototype_layers)
    return kernels, graph_reader.load(graphs, manifest.pooling == "mean", exits, spaces, shapes)


def check_segment(artifact: Artifact, layer: int, data: bytes) -> Any:
    """The GraphProto of a segment's file; raises StoreError for what a segment may not hold, or if it has
    another exit than the manifest says."""
    file = artifact.path / artifact.manifest.segment_files()[layer]
    try:
        graph = read_graph(data)
    except GraphError as error:
        raise StoreError(f"{file}: {error}") from None
    manifest = artifact.manifest
    # An exit is a branch that gives out logits and, with prototypes, distances.
    wanted = [1 + (layer in manifest.prototype_layers)] if layer in manifest.exit_layers else []
    if [len(node.output) for node in graph.node if node.op_type == "If"] != wanted:
        raise StoreError(f"{file}: it has another exit than the manifest says")
    return graph


def unit_prototypes(artifact: Artifact) -> dict[int, Array]:
    """Prototypes (K, metric_dim) by layer, each row scaled to length 1. Raises StoreError."""
    manifest = artifact.manifest
    file = artifact.path / "prototypes.safetensors"
    try:
        tensors = load_tensors(artifact.read("prototypes.safetensors"))
    except SafetensorError as error:
        raise StoreError(f"{file}: not a safetensors file: {error}") from None
    shape = (len(manifest.labels), manifest.metric_dim)
    found: dict[int, Array] = {}
    for layer in manifest.prototype_layers:
        rows = tensors.get(f"layer_{layer:02}")
        if rows is None:
            raise StoreError(f"{file}: has no tensor layer_{layer:02}")
        if rows.shape != shape or rows.dtype != np.float32 or not np.isfinite(rows).all():
            raise StoreError(f"{file}: layer_{layer:02} must be finite float32 of shape {shape}")
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if (lengths == 0).any():
            label = manifest.labels[int(np.argmin(lengths))]
            raise StoreError(f"{file}: layer_{layer:02} has no prototype for label {label!r}")
        found[layer] = np.ascontiguousarray(rows / lengths)
    return found
