"""The model store: a folder of artifacts, <store>/<name>/<version>/, with integrity checks and atomic writes."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from de3.model_store.manifest import (
    EXITS,
    FITTED,
    LEARNED_FROM,
    NAME,
    OLD_VERSION,
    PROTOTYPES,
    SCHEMA_VERSION,
    TOKENIZER,
    VERSION,
    FileEntry,
    Manifest,
    unset_fields,
)
from de3.model_store.part import MAX_INT, first_error
from de3.model_store.printable import printable
from de3.model_store.regular_file import read_regular_file, write_private_file

log = logging.getLogger("de3")
MANIFEST = "manifest.json"
PIN = "pinned"  # the file with the number of a model's pinned version
NEWEST = "newest"  # the content of a file that pins no version
MAX_MANIFEST_BYTES = 2**21
MAX_ARTIFACT_BYTES = 2**32  # all loaded files together
MAX_MESSAGE = 500  # characters of an error message, which may quote an artifact
MAX_FILE_BYTES = {TOKENIZER: 2**26, PROTOTYPES: 2**28, EXITS: 2**30, FITTED: 2**28, "README.md": 2**20}
STALE_S = 86_400  # age of an abandoned draft: no export takes a day


class StoreError(ValueError):
    """An artifact is missing, damaged or does not match its manifest; the message names the file.

    The message may quote the artifact, so it is truncated and its control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        is_short = len(message) <= MAX_MESSAGE
        super().__init__(printable(message if is_short else message[:MAX_MESSAGE] + "…"))


class NoModelsError(StoreError):
    """The store does not exist, or has no models."""


class UnknownModelError(StoreError):
    """The store has no such model or version."""


@dataclass(frozen=True)
class Artifact:
    """One version of a model on disk; its manifest has been checked, its files have not.

    Attributes:
        proof: file that records that the artifact loads and runs on this machine; None if this is proved at each start.
        sources: the files that it was converted from, with their modification times (ns); empty if there are none.
    """

    path: Path
    manifest: Manifest
    proof: Path | None = None
    sources: dict[str, int] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """The name and version, as name:version."""
        return self.manifest.full_name

    def is_outdated(self) -> bool:
        """True if a file that it was converted from has been changed or removed since."""
        try:
            return any(Path(path).stat().st_mtime_ns != time_ns for path, time_ns in self.sources.items())
        except OSError:
            return True

    def read(self, name: str) -> bytes:
        """Read a file and check it against the manifest's hash; raises StoreError.

        The file is read once, so it cannot change between the check and its use.
        """
        path = self.path / name
        if name not in self.manifest.files:
            raise StoreError(f"{path}: the manifest does not list this file")
        entry, limit = self.manifest.files[name], MAX_FILE_BYTES.get(name, MAX_INT)
        if entry.bytes > limit:
            raise StoreError(f"{path}: {entry.bytes} bytes; at most {limit} are allowed")
        data = _read_inside(self.path, path, entry.bytes)
        if len(data) != entry.bytes:
            raise StoreError(f"{path}: damaged: {len(data)} bytes; the manifest says {entry.bytes}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise StoreError(f"{path}: damaged: its sha256 differs from the manifest's")
        return data

    def size(self) -> int:
        """Size on disk of the files that are loaded, in bytes; raises StoreError above MAX_ARTIFACT_BYTES."""
        total = 0
        for name in self.manifest.required_files():
            with suppress(OSError, RuntimeError):  # read() reports the error
                total += min(self.manifest.files[name].bytes, (self.path / name).stat().st_size)
        if total > MAX_ARTIFACT_BYTES:
            raise StoreError(f"{self.path}: {total} bytes; at most {MAX_ARTIFACT_BYTES} are allowed")
        return total

    def verify(self) -> None:
        """Read and check every file; raises StoreError for the first that is missing or damaged."""
        for name in self.manifest.files:
            self.read(name)


class Store:
    """A folder of artifacts."""

    def __init__(self, path: Path, state_dir: Path | None = None) -> None:
        """state_dir: folder for pins that cannot be written into the store; None: there is none."""
        self.path, self._state_dir = path, state_dir

    def versions(self) -> dict[str, list[int]]:
        """Versions by model name, both ascending (10 is newer than 9); raises NoModelsError if there is no store."""
        if not self.path.is_dir():
            raise NoModelsError(f"{self.path}: no such store; de3 import and de3 export create one")
        versions: dict[str, list[int]] = {}
        for folder in sorted(self.path.iterdir()):
            try:
                if NAME.fullmatch(folder.name) and folder.is_dir():
                    numbers = [
                        int(v.name) for v in folder.iterdir() if VERSION.fullmatch(v.name) and v.is_dir()
                    ]
                    if numbers:
                        versions[folder.name] = sorted(numbers)
            except PermissionError as error:
                _warn(f"{folder}: this model is left out: {error.strerror}")
        return versions

    def names(self) -> list[str]:
        """Every version as name:version."""
        return [f"{name}:{v}" for name, versions in self.versions().items() for v in versions]

    def open(self, model: str, unpinned: bool = False) -> Artifact:
        """The artifact of `name` (its pinned version, else its newest) or `name:version`; raises StoreError.

        unpinned: the newest version of `name` even if another one is pinned.
        """
        name, _, version = model.partition(":")
        versions = self.versions()
        if name not in versions:
            raise UnknownModelError(
                f"no model {name!r} in {self.path}; available: {', '.join(versions) or 'none'}"
            )
        if not version and ":" not in model:
            pinned, number = None if unpinned else self.pin(name), versions[name][-1]
            if pinned in versions[name]:
                number = pinned
            elif pinned is not None and (pinned <= LEARNED_FROM or self._state_dir is None):
                _warn(
                    f"{name} is pinned to version {pinned}, which does not exist; version {number} is used: "
                    f"de3 models load {name}:VERSION pins another one, and de3 models load {name} lifts the pin"
                )
        elif VERSION.fullmatch(version) and int(version) in versions[name]:
            number = int(version)
        else:
            existing = ", ".join(map(str, versions[name]))
            raise UnknownModelError(f"no version {version!r} of model {name!r}; available: {existing}")
        return self.open_path(self.path / name / str(number))

    def find(self, model: str) -> Artifact | None:
        """The artifact that open() returns, or the one in the folder of any version or model; None if there is none.

        Raises StoreError as open() and read_manifest() do.
        """
        with suppress(NoModelsError):
            if model.partition(":")[0] in self.versions():
                return self.open(model)
        path = Path(model)
        if (path / MANIFEST).is_file():
            return Artifact(path.absolute(), read_manifest(path))
        return Store(path.parent).open(path.name) if any(path.glob(f"*/{MANIFEST}")) else None

    def open_path(self, path: Path) -> Artifact:
        """The artifact in <store>/<name>/<version>.

        Raises StoreError for a path that leads elsewhere, and for a manifest that is invalid or of another version.
        """
        if path.resolve() != self.path.resolve() / path.parent.name / path.name:
            raise StoreError(f"{path}: leads outside the store, to {path.resolve()}")
        artifact = Artifact(path, read_manifest(path))
        if (artifact.manifest.name, str(artifact.manifest.version)) != (path.parent.name, path.name):
            raise StoreError(
                f"{path / MANIFEST}: this is the manifest of {artifact.full_name}, not of this folder"
            )
        return artifact

    def _pins(self, name: str) -> Iterator[Path]:
        """The files that can pin a model, the decisive one first."""
        if self._state_dir is not None:
            yield self._state_dir / "pins" / name
        yield self.path / name / PIN

    def pin(self, name: str) -> int | None:
        """The version of a model that is pinned; None if none is. An unusable file is ignored, with a warning."""
        for path in self._pins(name):
            try:
                text = read_regular_file(path, 64).decode().strip()
                if text != NEWEST and not VERSION.fullmatch(text):
                    raise ValueError(f"must hold the number of a version, or {NEWEST}")
                return None if text == NEWEST else int(text)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                _warn(f"{path}: this pin is ignored: {error}; de3 models load {name}:VERSION replaces it")
        return None

    def set_pin(self, name: str, version: int | None) -> None:
        """Pin a model to a version, or lift its pin (None).

        The pin is kept in the model's folder, or, if that does not exist or cannot be written, in the state folder.
        Raises OSError if neither is possible.
        """
        *states, own = self._pins(name)
        if version is None and not any(map(os.path.lexists, [*states, own])):
            return
        content = f"{version or NEWEST}\n".encode()
        try:
            write_private_file(own, content, 0o644)
        except OSError:
            if not states:
                raise
            states[0].parent.mkdir(parents=True, exist_ok=True)
            write_private_file(states[0], content)
        else:
            for path in states:
                path.unlink(missing_ok=True)

    @contextmanager
    def new_version(self, name: str) -> Iterator["Draft"]:
        """A draft of a model's new version; the draft's `publish` makes the whole version visible at once.

        Raises StoreError for an invalid name.
        """
        if not NAME.fullmatch(name):
            raise StoreError(f"model name {name!r} must match {NAME.pattern}")
        (self.path / name).mkdir(parents=True, exist_ok=True)
        for old in (self.path / name).glob(".draft-*"):  # left by an export that was killed
            if time.time() - old.stat().st_mtime > STALE_S:
                shutil.rmtree(old, ignore_errors=True)
        # The leading dot hides the draft from listings; on the same file system the rename is atomic.
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self.path / name))
        try:
            yield Draft(draft, self.path / name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@dataclass
class Draft:
    """A version being written, in a hidden folder next to the published ones."""

    path: Path
    model_path: Path

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files into the draft; raises OSError, which names the file."""
        for name, data in files.items():
            try:
                with (self.path / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # a full disk
                error.filename = error.filename or str(self.path / name)
                raise

    def next_version(self) -> int:
        """One more than the newest version of the model; 1 if there is none."""
        return 1 + max(
            (int(v.name) for v in self.model_path.iterdir() if VERSION.fullmatch(v.name)), default=0
        )

    def entries(self) -> dict[str, dict[str, object]]:
        """Hash and size of every file written so far, for the manifest."""
        return {
            p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size}
            for p in sorted(self.path.iterdir())
        }

    def publish(self, manifest: Manifest) -> Path:
        """Add the manifest and publish the version by one rename; returns its folder.

        Files that another version in the store has, such as the same encoder's, become links to that version's, so
        that the store keeps one copy. Raises OSError if the version already exists.
        """
        self._link(manifest)
        self.write({MANIFEST: _by_field(manifest).encode()})
        self.path.chmod(0o755)
        final = self.model_path / str(manifest.version)
        self.path.rename(final)  # fails if another export has taken the number
        directory = os.open(self.model_path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return final

    def _link(self, manifest: Manifest) -> None:
        """Replace files by links to equal files in the store, where the file system allows it."""
        names = {entry.sha256: name for name, entry in manifest.files.items()}
        link = self.path / ".link"
        with suppress(
            OSError
        ):  # the store's file system has no links, or a version was removed in the meantime
            for file in sorted(self.model_path.parent.glob(f"*/*/{MANIFEST}")):
                with suppress(StoreError):
                    for theirs, entry in read_manifest(file.parent).files.items():
                        if entry.sha256 in names:
                            os.link(file.parent / theirs, link)
                            ours = self.path / names[entry.sha256]
                            if _are_alike(link, ours, entry):
                                link.replace(self.path / names.pop(entry.sha256))
                            link.unlink(missing_ok=True)


@cache  # each warning once, as a pin is read often
def _warn(message: str) -> None:
    log.warning("%s", printable(message))


def _are_alike(link: Path, ours: Path, entry: FileEntry) -> bool:
    """True if a linked file has the content that its manifest says, and the owner and mode of ours."""
    a, b = link.lstat(), ours.lstat()
    if (a.st_mode, a.st_uid, a.st_size) != (b.st_mode, b.st_uid, entry.bytes):
        return False
    with link.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


def read_manifest(path: Path) -> Manifest:
    """The manifest in an artifact's folder; raises StoreError with the file and the reason."""
    file = path / MANIFEST
    data = _read_inside(path, file, MAX_MANIFEST_BYTES)
    try:
        raw = json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file}: not JSON: {error}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in (OLD_VERSION, SCHEMA_VERSION):
        raise StoreError(
            f"{file}: schema version {version!r}; this release reads {OLD_VERSION} and {SCHEMA_VERSION}: export the "
            "model again"
        )
    try:
        return Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise StoreError(f"{file}: {first_error(error, 'manifest')}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a duplicate key, of which other parsers may keep another value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return found


def _read_inside(folder: Path, path: Path, limit: int) -> bytes:
    """The bytes of a regular file in a folder.

    Raises StoreError if it leads outside the folder, is unreadable, or has more than `limit` bytes.

    The store may be mounted or linked to from anywhere, and a file may be a link to another file in its folder. So
    links are resolved first. The resolved path is then opened without following links, which may have been added since.
    """
    try:
        real = path.resolve(strict=True)
        if real.parent != folder.resolve(strict=True):
            raise StoreError(f"{path}: leads outside the artifact, to {real}")
        return read_regular_file(real, limit)
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path}: missing") from None
    except ValueError as error:
        raise StoreError(f"{path}: {error}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise StoreError(f"{path}: cannot be read: {error}") from None


def _by_field(manifest: Manifest) -> str:
    """The manifest as JSON with one line per field, for readable diffs; earlier releases can read it if possible."""
    fields = manifest.model_dump(by_alias=True, exclude=unset_fields(manifest)).items()
    return "{\n" + ",\n".join(f' "{k}": {json.dumps(v, ensure_ascii=False)}' for k, v in fields) + "\n}\n"
