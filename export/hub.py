"""Finds stock classifiers by name: local folders, or repositories of the Hugging Face hub."""

import re
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from de3.export.classifier import CONFIG, FILES, check_files, describe
from de3.export.download import MAX_DOWNLOAD_BYTES, MAX_OTHER_BYTES, HubError, download, list_files
from de3.model_store.sizes import read_config


def fetch(name: str, label_names: list[str] | None = None, multi_label: bool = False) -> Path:
    """The local folder of a classifier; name: a folder, or a hub repository to download, as id or id@revision.

    The file list and config.json are checked before the weights are downloaded. label_names, multi_label: as in
    `describe`.

    Raises ValueError if there is no such folder or repository, if the hub cannot be reached, or if the model cannot be
    served, and OldFormError if only transformers can read its files.
    """
    repository, _, revision = name.partition("@")
    looks_like_path = name.startswith((".", "/", "~")) or repository.count("/") > 1 or "\\" in name
    if is_folder(name):
        folder = Path(name).expanduser()
        _check(name, folder, label_names, multi_label)
        return folder
    if looks_like_path:
        raise ValueError(f"{name}: no such folder")
    try:
        return _snapshot(name, repository, revision or None, label_names, multi_label)
    except HubError as error:
        raise ValueError(f"{name}: {error}") from None
    except HFValidationError:
        raise ValueError(f"{name}: no such folder here, and not an id of the Hugging Face hub") from None
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
    name: str, repository: str, revision: str | None, label_names: list[str] | None, multi_label: bool
) -> Path:
    if constants.HF_HUB_OFFLINE:  # use the files that were downloaded before
        folder = Path(hf_hub_download(repository, CONFIG, revision=revision, local_files_only=True)).parent
        _check(name, folder, label_names, multi_label)
        return folder
    listing = list_files(repository, revision or "main")
    _check_files(name, {file.name: file.size or 0 for file in listing.files})
    plain = re.compile(r"[\w.-]+")  # names that lead into no other folder
    files = {file.name: file for file in listing.files if _is_read(file.name) and plain.fullmatch(file.name)}
    folder = download(repository, listing.commit, [files[CONFIG]])
    describe(name, read_config(folder / CONFIG), label_names, multi_label)
    download(repository, listing.commit, files.values())
    if listing.commit != revision:
        _note_commit(folder.parents[1] / "refs", revision or "main", listing.commit)
    return folder


def _is_read(name: str) -> bool:
    """True for a file that is downloaded, read and hashed."""
    return any(fnmatch(name, pattern) for pattern in FILES)


def _check(name: str, folder: Path, label_names: list[str] | None, multi_label: bool) -> None:
    """Raise ValueError for a local folder whose model cannot be served."""
    _check_files(name, {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()})
    describe(name, read_config(folder / CONFIG), label_names, multi_label)


def _check_files(name: str, sizes: Mapping[str, int]) -> None:
    """Raise ValueError if a file is missing, or too large to be downloaded or hashed. sizes: bytes by file."""
    check_files(name, sizes)
    read = {file: size for file, size in sizes.items() if _is_read(file)}
    for file, size in read.items():
        if size > MAX_OTHER_BYTES and not file.endswith(".safetensors"):
            raise ValueError(f"{name}: its {file} has {size} bytes, at most {MAX_OTHER_BYTES} are allowed")
    if (total := sum(read.values())) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{name}: its files have {total} bytes, at most {MAX_DOWNLOAD_BYTES} are allowed")


def _note_commit(refs: Path, revision: str, commit: str) -> None:
    """Let the commit of a branch or tag be found offline; writes only inside the folder `refs` of the hub's cache."""
    entry = refs / revision
    if not (entry.resolve().is_relative_to(refs.resolve()) and re.fullmatch("[0-9a-f]{40}", commit)):
        return
    with suppress(OSError):  # a read-only cache
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text(commit)
