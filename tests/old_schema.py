"""Artifacts of schema 6, whose exits are in their segments, and of schema 7, from each other."""

import shutil
from pathlib import Path

from safetensors.numpy import save_file

from de3.model_store.graph import stored
from de3.model_store.manifest import EXITS, OLD_VERSION, SCHEMA_VERSION
from de3.model_store.model import exit_weights, read_segments
from de3.model_store.segment_graph import build_old_segment, exit_tensors, graph_name
from de3.model_store.store import Artifact, Store
from tests.test_hostile_models import edit, rehash


def _copy(artifact: Artifact, store: Path, schema: int) -> Path:
    """The folder of a copy of an artifact in a store, with this schema in its manifest, and without its exits' file."""
    manifest = artifact.manifest
    folder = Path(shutil.copytree(artifact.path, store / manifest.name / str(manifest.version)))
    (folder / EXITS).unlink(missing_ok=True)
    edit(folder, lambda m: (m.update(schema_version=schema), m["files"].pop(EXITS, None)))
    return folder


def as_old(artifact: Artifact, store: Path) -> Artifact:
    """A copy of an artifact of schema 7, in a store, as schema 6."""
    architecture, exits = artifact.manifest.architecture, exit_weights(artifact)
    folder = _copy(artifact, store, OLD_VERSION)
    for layer, (_, weights) in enumerate(read_segments(artifact)):
        segment = build_old_segment(architecture, layer, stored(weights | exits.get(layer, {})))
        name = architecture.segment_files()[layer]
        (folder / name).write_bytes(segment.model(graph_name(layer)).SerializeToString())
        rehash(folder, name)
    return Store(store).open(artifact.full_name)


def as_new(artifact: Artifact, store: Path) -> Artifact:
    """A copy of an artifact of schema 6, in a store, as schema 7."""
    folder = _copy(artifact, store, SCHEMA_VERSION)
    for name, (graph, _) in zip(artifact.manifest.segment_files(), read_segments(artifact), strict=True):
        (folder / name).write_bytes(graph)
        rehash(folder, name)
    save_file(exit_tensors(exit_weights(artifact)), folder / EXITS)
    rehash(folder, EXITS)
    return Store(store).open(artifact.full_name)
