"""An artifact opened for running: its tokenizer and its segments."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

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
# Both quantize activations on the way: a rounding error can become a difference of one step.
MAX_NATIVE_DIFFERENCE = 0.2
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
        through: takes several samples through all layers at once; None unless native.
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

        def session(file: str) -> Any:
            try:
                # From bytes: what runs is what was checked, and a model cannot refer to files beside it.
                return ort.InferenceSession(artifact.read(file), options, providers=["CPUExecutionProvider"])
            except StoreError:
                raise
            except Exception as error:  # onnxruntime raises its own classes, without a common base
                raise StoreError(
                    f"{artifact.path / file}: not a model ONNX Runtime can run: {error}"
                ) from None

        self.runtime = "onnxruntime"
        self.through: Through | None = None
        self.segments: Sequence[Segment] = [
            OnnxSegment(layer, session(file), manifest, prototypes.get(layer), str(artifact.path / file))
            for layer, file in enumerate(manifest.segment_files())
        ]
        if runtime != "onnxruntime":
            try:
                self.segments, self.through = self._native(artifact, prototypes)
                self.runtime = "native"
            except NoKernelsError as error:
                log.info("%s: ONNX Runtime runs it: %s", self.full_name, error)
                if runtime == "native":
                    raise StoreError(f"{artifact.path}: has no kernels here: {error}") from None

    def _native(self, artifact: Artifact, prototypes: dict[int, Array]) -> tuple[Sequence[Segment], Through]:
        """The segments as the kernels run them; NoKernelsError unless they give what ONNX Runtime gives."""
        try:
            from native import kernels, segments
        except ImportError as error:  # not built, or onnx is not installed
            raise NoKernelsError(str(error)) from None
        manifest = self.manifest
        if manifest.precision != "int8":
            raise NoKernelsError("only int8 artifacts have kernels")
        files = [artifact.read(file) for file in manifest.segment_files()]
        model = segments.load(files, manifest.pooling == "mean", set(manifest.exit_layers))
        native = [
            NativeSegment(layer, kernels, model, manifest, prototypes.get(layer))
            for layer in range(manifest.num_layers + 1)
        ]
        for text, pair in PROOF:
            tokens = self.tokenize(text, pair)
            try:
                theirs = full_depth(self.segments, tokens)
            except Exception as error:  # onnxruntime raises its own classes, without a common base
                raise StoreError(f"{artifact.path}: loads, but does not run: {error}") from None
            try:
                ours = full_depth(native, tokens)
            except ValueError as error:
                raise NoKernelsError(str(error)) from None
            for a, b in zip(theirs, ours, strict=True):
                for x, y in ((a.logits, b.logits), (a.distances, b.distances)):
                    if x is not None and y is not None and not np.abs(x - y).max() < MAX_NATIVE_DIFFERENCE:
                        raise NoKernelsError("the kernels differ from ONNX Runtime on this model")
        return native, Through(kernels, model, manifest, prototypes)

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
