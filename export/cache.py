"""A cache of artifacts made from stock classifiers: each is made once, and the least recently used are removed."""

import hashlib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from de3.export.classifier import Precision, check_folder, convert
from de3.export.hub import fetch
from de3.model_store.manifest import SCHEMA_VERSION
from de3.model_store.store import Artifact, Store, StoreError

FORMAT = 1  # of what classifier.py writes; a change makes every artifact anew
DEFAULT_GB = 20.0
LOCK = ".lock"


def cache_folder() -> Path:
    """The folder of artifacts in DE3_CACHE, or by the XDG specification in ~/.cache/de3."""
    base = os.environ.get("DE3_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "de3"
    return Path(base).expanduser() / "classifiers"  # nothing else is removed from the cache


def artifact_of(name: str, precision: Precision, folder: Path, limit_gb: float = DEFAULT_GB) -> Artifact:
    """The artifact of a stock classifier, by folder or hub id, made if the cache in `folder` has none.

    Raises ValueError, which says what to do, for a classifier that cannot be served.
    """
    source = fetch(name)
    check_folder(name, source)
    model = model_name(name)
    place = folder / _key(source, model, precision)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the cache {folder} cannot be written ({error}): set DE3_CACHE to another folder"
        ) from None
    store = Store(place)
    with FileLock(place / LOCK):  # a second server waits for the first, and makes nothing
        artifact = _existing(store, model)
        if artifact is None:
            shutil.rmtree(place / model, ignore_errors=True)  # of a start that was interrupted
            convert(name, source, store, model, precision, _shown(name))
            artifact = store.open(model)
        os.utime(place)
    _evict(folder, place, int(limit_gb * 1e9))
    return artifact


def model_name(name: str) -> str:
    """The name under which a classifier is served: the last part of its id or path, in lower case."""
    last = Path(name.partition("@")[0]).expanduser().resolve().name.lower()
    return re.sub(r"[^a-z0-9._-]", "-", last).lstrip("._-")[:64] or "model"


def _shown(name: str) -> str:
    """The source that is stored: a hub id, or the last part of a path."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name


def _existing(store: Store, model: str) -> Artifact | None:
    try:
        return store.open(model)
    except StoreError:
        return None


def _key(source: Path, model: str, precision: Precision) -> str:
    """A hash of all that the artifact is made from."""
    digest = hashlib.sha256(f"{FORMAT} {SCHEMA_VERSION} {model} {precision}".encode())
    for path in sorted([*source.glob("*.json"), *source.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _evict(folder: Path, used: Path, limit: int) -> None:
    """Remove the least recently used artifacts until the others fit into `limit` bytes beside `used`."""
    sizes = {}
    for place in folder.iterdir():
        if place.is_dir():
            with suppress(OSError):  # another process may remove it
                files = [path.stat() for path in place.rglob("*") if path.is_file()]
                sizes[place] = (place.stat().st_mtime, sum(file.st_size for file in files))
    total = sum(size for _, size in sizes.values())
    for place in sorted(sizes, key=lambda p: sizes[p]):
        if total <= limit:
            break
        if place != used:
            total -= sizes[place][1]
            shutil.rmtree(place, ignore_errors=True)
