"""An LRU cache of artifacts converted from stock classifiers."""

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout

from de3.export.classifier import FILES, Stock, convert, message_of
from de3.export.hub import fetch, is_folder
from de3.model_store.architecture import Precision
from de3.model_store.manifest import SCHEMA_VERSION
from de3.model_store.printable import printable
from de3.model_store.store import Artifact, Store, StoreError

log = logging.getLogger("de3")

FORMAT = 1  # format of the artifacts that classifier.py writes; changing it invalidates the cache
MAX_MESSAGE = 500
PROOF, USED = ".proof", ".used"
# Open files whose locks protect the artifacts that this process uses from removal.
_used: dict[Path, int] = {}


def cache_folder() -> Path:
    """The folder of cached artifacts: `classifiers` in $DE3_CACHE or, if unset, in ${XDG_CACHE_HOME:-~/.cache}/de3."""
    base = os.environ.get("DE3_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "de3"
    return Path(base).expanduser() / "classifiers"  # evict removes nothing outside it


def artifact_of(name: str, precision: Precision, folder: Path) -> Artifact:
    """The artifact of a stock classifier (a folder or hub id), from the cache in `folder`; converted first if missing.

    Raises ValueError, with a one-line message, for a classifier that cannot be served.
    """
    try:
        return _artifact_of(name, precision, folder)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = " ".join(message_of(name, error).split())
        raise ValueError(printable(message[:MAX_MESSAGE])) from None


def _artifact_of(name: str, precision: Precision, folder: Path) -> Artifact:
    source = fetch(name)
    model, shown = model_name(name), Path(name).expanduser().resolve().name if is_folder(name) else name
    place = folder / _key(source, shown, model, precision)

    def make(store: Store) -> None:
        convert(Stock.open(name, source), store, model, precision, shown)
        if place.name != _key(source, shown, model, precision):
            raise ValueError(f"{name}: its files changed while they were read; try again")

    return cached(name, place, model, make, files_of(source))


def cached(
    name: str, place: Path, model: str, make: Callable[[Store], None], sources: Iterable[Path]
) -> Artifact:
    """The artifact in a folder of the cache, which `make` first writes into a store there, if it is missing.

    name: for messages. place: its name is a hash of everything that determines the artifact. model: name of the model.
    sources: the files that the artifact was made from. Raises the errors of `make`, and ValueError if the cache cannot
    be written.
    """
    times = {str(path.absolute()): path.stat().st_mtime_ns for path in sources}
    artifact, folder = _existing(place, model), place.parent
    if artifact is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(_lock(place)).acquire()
        except OSError as error:
            raise ValueError(
                f"{name}: cannot write to the cache {folder} ({error}): set DE3_CACHE to another folder"
            ) from None
        with lock:  # a second server waits for the first, and then uses its artifact
            place.mkdir(exist_ok=True)
            artifact = _existing(place, model)
            if artifact is None:
                log.info("%s: converting it once, into %s", name, folder)
                shutil.rmtree(place / model, ignore_errors=True)  # left by an interrupted start
                try:
                    make(Store(place))
                except (ValueError, OSError):  # such as a full disk
                    shutil.rmtree(place, ignore_errors=True)
                    raise
                artifact = Store(place).open(model)
    with suppress(OSError):  # a read-only cache
        os.utime(place)
    return replace(artifact, proof=place / PROOF, sources=times)


def model_name(name: str) -> str:
    """The name under which a classifier is served: the last part of its id or path, in lower case."""
    last = Path(name if is_folder(name) else name.partition("@")[0]).expanduser().resolve().name.lower()
    return re.sub(r"[^a-z0-9._-]", "-", last).lstrip("._-")[:64] or "model"


def evict(folder: Path, limit_gb: float) -> None:
    """Remove the least recently used artifacts, except those that a process uses, until the cache fits the limit."""
    sizes = {}
    with suppress(OSError):
        for place in folder.iterdir():
            if place.is_dir():
                with suppress(OSError):  # another process may remove it
                    files = [path.stat() for path in place.rglob("*") if path.is_file()]
                    sizes[place] = (place.stat().st_mtime, sum(file.st_size for file in files))
    total = sum(size for _, size in sizes.values())
    for place in sorted(sizes, key=lambda p: sizes[p]):
        if total <= limit_gb * 1e9:
            break
        if _remove(place):
            total -= sizes[place][1]


def _remove(place: Path) -> bool:
    """Remove an artifact atomically, unless a process is converting or using it; true if it was removed."""
    try:
        with FileLock(_lock(place), timeout=0), (place / USED).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed = Path(mkdtemp(prefix=".removed-", dir=place.parent))
            place.rename(removed / place.name)
    except (OSError, Timeout):
        return False
    shutil.rmtree(removed, ignore_errors=True)
    return True


def _use(place: Path) -> None:
    """Keep an artifact from being removed until this process ends; raises OSError if that is not possible."""
    path = place / USED
    # Another process may remove the artifact before it is locked: repeat until the file in the folder is locked.
    while True:
        file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        if path in _used and os.path.samestat(os.fstat(_used[path]), os.fstat(file)):
            return os.close(file)
        fcntl.flock(file, fcntl.LOCK_SH)
        _used[path] = file


def _lock(place: Path) -> Path:
    return place.with_suffix(".lock")


def _existing(place: Path, model: str) -> Artifact | None:
    """The artifact in a folder of the cache, protected from removal; None if it is missing or incomplete."""
    try:
        _use(place)
    except FileNotFoundError:
        return None
    except OSError:  # a read-only cache, or a file system without locks
        pass
    try:
        artifact = Store(place).open(model)
        sizes = {name: (artifact.path / name).stat().st_size for name in artifact.manifest.files}
    except (StoreError, OSError):
        return None
    return artifact if all(sizes[k] == entry.bytes for k, entry in artifact.manifest.files.items()) else None


def files_of(source: Path) -> list[Path]:
    """The files of a classifier that determine its artifact."""
    return sorted({path for pattern in FILES for path in source.glob(pattern) if path.is_file()})


def _key(source: Path, shown: str, model: str, precision: Precision) -> str:
    """Hash of everything that determines the artifact."""
    digest = hashlib.sha256(f"{FORMAT} {SCHEMA_VERSION} {shown} {model} {precision}".encode())
    for path in files_of(source):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
