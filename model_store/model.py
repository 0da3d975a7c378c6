"""An artifact opened for running: its tokenizer and its segments."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from tokenizers import Encoding, Tokenizer

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
from native import NoKernelsError

log = logging.getLogger("de3")
MAX_CHARS_PER_TOKEN = 100
# Both quantize activations on the way: a rounding error can become a difference of one step.
MAX_NATIVE_DIFFERENCE = 0.2
PROOF = (
    ("a", None),
    ("It was not what we had hoped for , but 3 of the 12 rooms were fine .", None),
    ("the quick brown fox jumps over the lazy dog", "a second text, of another kind"),
    ("one two three four five six seven eight nine ten " * 6, None),
)
# One text at a time on each engine thread: the tokenizer's own thread pool would only get in their way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Model:
    """A loaded artifact.

    Attributes:
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
        self._tokenizer = _tokenizer(artifact)
        self._special_tokens = {
            pair: self._tokenizer.num_special_tokens_to_add(is_pair=pair) for pair in (False, True)
        }
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

        Raises ValueError if the text is longer and `truncate` is false. So that no text can hold a thread for
        long, a text counts as too long from MAX_CHARS_PER_TOKEN characters for each token the model takes.
        """
        return self.tokens(self.encode([(text, text_pair)])[0], text, text_pair, truncate)

    def encode(self, texts: Sequence[tuple[str, str | None]]) -> list[Encoding]:
        """What the tokenizer makes of texts or pairs, for `tokens`.

        One call for many, and even for one: unlike Tokenizer.encode it leaves other Python threads alone.
        """
        most = MAX_CHARS_PER_TOKEN * self.manifest.max_tokens
        batch = [text[:most] if pair is None else (text[:most], pair[:most]) for text, pair in texts]
        return list(self._tokenizer.encode_batch_fast(batch))

    def tokens(self, encoding: Encoding, text: str, text_pair: str | None, truncate: bool) -> Tokens:
        """The tokens of a text's encoding; see `tokenize`."""
        limit = self.manifest.max_tokens
        most = MAX_CHARS_PER_TOKEN * limit
        long = len(text) > most or (text_pair is not None and len(text_pair) > most)
        if long and not truncate:
            raise ValueError(f"has more than {most} characters, the most allowed; let truncate be true")
        if len(encoding) > limit:
            pair = None if text_pair is None else text_pair[:most]
            encoding = self._cut(text[:most], pair, limit, truncate)
            long = True
        return Tokens(np.array([encoding.ids], np.int64), np.array([encoding.type_ids], np.int64), long)

    def _cut(self, text: str, text_pair: str | None, limit: int, truncate: bool) -> Encoding:
        """The encoding of a text or pair that is longer than `limit`, cut to it."""
        # The tokenizer's own truncation is a state that all threads share, so the parts are encoded and cut
        # by themselves, and then joined by the tokenizer's template.
        parts = [text] if text_pair is None else [text, text_pair]
        first, *rest = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        second = rest[0] if rest else None
        size, size_pair = len(first), 0 if second is None else len(second)
        room = limit - self._special_tokens[second is not None]
        if not truncate:
            found = size + size_pair + limit - room
            raise ValueError(f"has {found} tokens, the model takes at most {limit}; let truncate be true")
        # Longest first, as transformers does: take from the longer until both fit.
        keep = room if second is None else max(room - size_pair, min(size, room - room // 2))
        first.truncate(keep)
        if second is not None:
            second.truncate(room - keep)
        return self._tokenizer.post_process(first, second)

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


def _tokenizer(artifact: Artifact) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(artifact.read("tokenizer.json").decode())
    except StoreError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise StoreError(f"{artifact.path / 'tokenizer.json'}: not a tokenizer: {error}") from None
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise StoreError(f"{artifact.path / 'tokenizer.json'}: must not pad or truncate; export strips both")
    return tokenizer
