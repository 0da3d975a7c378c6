"""Finds stock classifiers by name: local folders, or repositories of the Hugging Face hub."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from de3.export.classifier import CONFIG, FILES, POOLING, Describe, OldFormError, check_files, describe
from de3.export.download import MAX_DOWNLOAD_BYTES, HubError, download, limit_of, list_files
from de3.export.weights import INDEX, WEIGHTS
from de3.model_store.sizes import read_config

ENCODER_FILES = (*FILES, POOLING)
# Including files that only transformers reads.
OLD_FILES = (
    *FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-*-of-*.bin",
)


def fetch(name: str, describe: Describe = describe, patterns: Collection[str] = FILES) -> Path:
    """The local folder of a classifier; name: a folder, or a hub repository to download, as id or id@revision.

    The file list and config.json are checked, the latter by `describe`, before the weights are downloaded. patterns:
    the files to download, FILES, OLD_FILES or ENCODER_FILES.

    Raises ValueError if there is no such folder or repository, if the hub cannot be reached, or if the model cannot be
    served; unless with OLD_FILES, OldFormError if only transformers can read its files.
    """

    check = partial(_check_files, name, patterns=patterns)

    def check_config(folder: Path) -> None:
        describe(name, read_config(folder / CONFIG))

    def checked(folder: Path) -> Path:
        check({path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()})
        check_config(folder)
        return folder

    repository, _, revision = name.partition("@")
    looks_like_path = name.startswith((".", "/", "~")) or repository.count("/") > 1 or "\\" in name
    if is_folder(name):
        return checked(Path(name).expanduser())
    if looks_like_path:
        raise ValueError(f"{name}: no such folder")
    try:
        if constants.HF_HUB_OFFLINE:  # use the files that were downloaded before
            config = hf_hub_download(repository, CONFIG, revision=revision or None, local_files_only=True)
            return checked(Path(config).parent)
        return _snapshot(repository, revision or "main", patterns, check, check_config)
    except HubError as error:
        raise ValueError(f"{name}: {error}") from None
    except HFValidationError:
        raise ValueError(f"{name}: no such folder here, and not a valid Hugging Face hub id") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{name}: no such folder here, and the hub cannot be reached: check the name, the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{name}: cannot be downloaded into {constants.HF_HUB_CACHE} ({error}): set HF_HOME to another folder"
        ) from None
    except ValueError:
        raise
    except Exception as error:  # from the HTTP client
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{name}: no such folder here, and it cannot be read from the hub ({type(error).__name__}: {reason}): "
            "check the name, or the network"
        ) from None


def is_folder(name: str) -> bool:
    """True if a name is the path of a folder."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # such as ~name for an unknown user
        return False


def _snapshot(
    repository: str,
    revision: str,
    patterns: Collection[str],
    check: Callable[[Mapping[str, int]], None],
    check_config: Callable[[Path], None],
) -> Path:
    listing = list_files(repository, revision)
    check({file.name: file.size or 0 for file in listing.files})
    plain = re.compile(r"[\w.-]+")  # names that cannot lead to another folder
    names = (file.name for file in listing.files if plain.fullmatch(file.name) or file.name == POOLING)
    wanted = set(_matching(names, patterns))
    if wanted & {WEIGHTS, INDEX}:  # transformers prefers these, too
        wanted = {name for name in wanted if not name.endswith(".bin")}
    files = {file.name: file for file in listing.files if file.name in wanted}
    folder = download(repository, listing.commit, [files[CONFIG]])
    check_config(folder)
    download(repository, listing.commit, files.values())
    if listing.commit != revision:
        _note_commit(folder.parents[1] / "refs", revision, listing.commit)
    return folder


def _matching(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _check_files(name: str, sizes: Mapping[str, int], *, patterns: Collection[str]) -> None:
    """Raise ValueError if a file is missing, or too large to be downloaded or hashed. sizes: bytes by file."""
    try:
        check_files(name, sizes)
    except OldFormError:
        if patterns is not OLD_FILES:
            raise
    read = _matching(sizes, patterns)
    for file in read:
        if sizes[file] > (limit := limit_of(file)):
            raise ValueError(f"{name}: its {file} has {sizes[file]} bytes; at most {limit} are allowed")
    if (total := sum(sizes[file] for file in read)) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{name}: its files have {total} bytes; at most {MAX_DOWNLOAD_BYTES} are allowed")


def _note_commit(refs: Path, revision: str, commit: str) -> None:
    """Record the commit of a branch or tag for offline use; writes only inside the folder `refs` of the hub's cache."""
    entry = refs / revision
    if not (entry.resolve().is_relative_to(refs.resolve()) and re.fullmatch("[0-9a-f]{40}", commit)):
        return
    with suppress(OSError):  # a read-only cache
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text(commit)
