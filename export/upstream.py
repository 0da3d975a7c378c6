"""Makes the model of a .toml file with an upstream: an encoder, with or without the exits of a model in the store."""

import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from de3.export.build import manifest_of
from de3.export.cache import FORMAT, cached, files_of
from de3.export.encoder import describe_encoder, encoder_of
from de3.export.hub import ENCODER_FILES, fetch
from de3.model_store.architecture import Architecture, Precision
from de3.model_store.graph import stored
from de3.model_store.manifest import (
    EXITS,
    PROTOTYPES,
    SCHEMA_VERSION,
    TOKENIZER,
    Defaults,
    Manifest,
    fingerprint,
)
from de3.model_store.model import Weights, exit_weights, read_segments, unit_prototypes
from de3.model_store.segment_graph import build_exit, exit_tensors
from de3.model_store.store import Artifact, Draft, Store
from de3.runtime.upstream_settings import UpstreamModel

log = logging.getLogger("de3")
NEVER = -1e4  # logit of a label that the exits do not know


def artifact_of(of: UpstreamModel, path: Path, store: Store, precision: Precision, folder: Path) -> Artifact:
    """The artifact of a model with an upstream, from the cache in `folder`; made first if it is missing.

    path: the .toml file. precision: that to which an encoder is converted that is not in the store. Raises ValueError
    for an encoder that cannot be used.
    """
    base = store.find(of.encoder)
    if base is None:
        try:
            source = fetch(of.encoder, describe_encoder, ENCODER_FILES)
        except ValueError as error:
            raise ValueError(f"encoder: no model in {store.path} (--store) has this name; {error}") from None
        encoder = _hash_of(source) + precision
        sources = files_of(source)
    else:
        _check(of, base.manifest)
        encoder, sources = fingerprint(base.manifest), []
    parts = f"{FORMAT} {SCHEMA_VERSION} {of.name} {of.hash} {encoder}"
    place = folder / f"upstream-{hashlib.sha256(parts.encode()).hexdigest()[:24]}"
    return cached(of.encoder, place, of.name, partial(_make, of, base, store, precision), [path, *sources])


def _make(
    of: UpstreamModel, base: Artifact | None, store: Store, precision: Precision, target: Store
) -> None:
    if base is not None:
        with target.new_version(of.name) as draft:
            draft.publish(_with_exits(of, base, draft))
        return
    with encoder_of(of.encoder, store, precision) as (encoder, _), target.new_version(of.name) as draft:
        draft.publish(_without_exits(of, encoder, draft))


def _hash_of(source: Path) -> str:
    """Hash of the files of an encoder."""
    digest = hashlib.sha256()
    for path in files_of(source):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check(of: UpstreamModel, manifest: Manifest) -> None:
    """Raise ValueError unless the exits of a model can answer with the labels of the upstream."""
    if manifest.thresholds is not None or manifest.tolerance is not None:
        raise ValueError(f"encoder: {manifest.full_name} is not a model with mutually exclusive classes")
    if others := [label for label in manifest.labels if label not in of.labels]:
        raise ValueError(
            f"encoder: {manifest.full_name} has the label {others[0]!r}, which is not among the labels of {of.name}"
        )
    if unknown := [label for label in of.labels if label not in manifest.labels]:
        log.warning(
            "%s: %s does not know %d of the labels, such as %r, which only the upstream gives until exits are learned",
            *(of.name, manifest.full_name, len(unknown), unknown[0]),
        )


def _with_exits(of: UpstreamModel, base: Artifact, draft: Draft) -> Manifest:
    """Write a model into a draft, with the upstream's labels, which are mapped by name."""
    manifest, labels = base.manifest, of.labels
    known = [manifest.labels.index(label) if label in manifest.labels else -1 for label in labels]
    architecture = _architecture(manifest, {"labels": labels})
    written = {}
    for layer, weights in exit_weights(base).items():
        written[layer] = build_exit(architecture, layer, stored(_mapped(weights, known))).weights
    prototypes = {}
    for layer, rows in unit_prototypes(base).items():
        unknown = -rows.mean(0, keepdims=True)  # far from all others
        prototypes[f"layer_{layer:02}"] = np.ascontiguousarray(
            np.concatenate([rows, unknown])[known], np.float32
        )
    risk = manifest.label_risk or manifest.risk
    defaults = Defaults(tau=0, signal="entropy" if risk is None else "risk")
    _write(base, draft, written, prototypes)
    return _manifest(of, architecture, draft, risk=risk, defaults=defaults, source=manifest.source)


def _mapped(weights: Weights, known: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of an exit for other labels. known: index of each label among the old ones; −1: a new label."""
    matrix, bias = weights["classifier.weight"], weights["classifier.bias"]
    matrix = np.concatenate([matrix, np.zeros((len(matrix), 1), matrix.dtype)], 1)[:, known]
    bias = np.concatenate([bias, np.array([NEVER], bias.dtype)])[known]
    return {**weights, "classifier.weight": np.ascontiguousarray(matrix), "classifier.bias": bias}


def _without_exits(of: UpstreamModel, base: Artifact, draft: Draft) -> Manifest:
    """Write an encoder into a draft, with a last exit that knows nothing: its probabilities are all equal."""
    manifest, last = base.manifest, base.manifest.num_layers
    fields = {
        "labels": of.labels,
        "exit_layers": [last],
        "prototype_layers": [],
        "pooling": "mean",
        "head": None,
    }
    architecture = _architecture(manifest, fields)
    old = exit_weights(base)[last]
    zeros = np.zeros((manifest.hidden_size, len(of.labels)), np.float32), np.zeros(len(of.labels), np.float32)
    weights = {name: array for name, array in old.items() if name.startswith("final_norm.")}
    weights |= {"classifier.weight": zeros[0], "classifier.bias": zeros[1]}
    _write(base, draft, {last: build_exit(architecture, last, stored(weights)).weights}, {})
    return _manifest(of, architecture, draft)


def _architecture(manifest: Manifest, changed: dict[str, Any]) -> Architecture:
    return Architecture.model_validate({**dict(manifest.architecture), **changed})


def _write(
    base: Artifact,
    draft: Draft,
    exits: Mapping[int, Weights],
    prototypes: Mapping[str, np.ndarray[Any, Any]],
) -> None:
    for file, (graph, _) in zip(base.manifest.segment_files(), read_segments(base), strict=True):
        draft.write({file: graph})
    draft.write({EXITS: save_tensors(exit_tensors({layer: dict(one) for layer, one in exits.items()}))})
    draft.write({PROTOTYPES: save_tensors(dict(prototypes)), TOKENIZER: base.read(TOKENIZER)})


def _manifest(of: UpstreamModel, architecture: Architecture, draft: Draft, **fields: Any) -> Manifest:
    takes = {None: None, True: "pair", False: "text"}[of.upstream.takes_pairs]
    # Always the same, so that the evidence of audits is still valid if the cache was removed.
    same = {"version": 1, "created": 0}
    return manifest_of(architecture, draft, name=of.name, upstream=of.hash, input=takes, **same, **fields)
