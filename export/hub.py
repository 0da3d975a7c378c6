"""Finds stock classifiers by name: local folders, or repositories of the Hugging Face hub."""

import re
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from de3.export.classifier import CONFIG, FILES, check_files, describe
from de3.model_store.sizes import read_config

MAX_DOWNLOAD_BYTES = 2**34


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
        check_files(name, [path.name for path in folder.iterdir() if path.is_file()])
        describe(name, read_config(folder / CONFIG), label_names, multi_label)
        return folder
    if looks_like_path:
        raise ValueError(f"{name}: no such folder")
    try:
        return _snapshot(name, repository, revision or None, label_names, multi_label)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ValueError(f"{name}: {_reason(error, repository, revision)}") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{name}: no such folder here, and the hub cannot be reached: check the name, the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE"
        ) from None
    except ValueError:
        raise
    except Exception as error:  # from the HTTP client and its transports
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
    commit = revision
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except OfflineModeIsEnabled:
        pass  # use the files that were downloaded before
    else:
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        check_files(name, list(sizes))
        total = sum(size for file, size in sizes.items() if any(fnmatch(file, pattern) for pattern in FILES))
        if total > MAX_DOWNLOAD_BYTES:
            raise ValueError(
                f"{name}: its files have {total} bytes, at most {MAX_DOWNLOAD_BYTES} are allowed"
            )
        commit = info.sha
    config = read_config(Path(hf_hub_download(repository, CONFIG, revision=commit)))
    describe(name, config, label_names, multi_label)
    folder = Path(snapshot_download(repository, revision=commit, allow_patterns=list(FILES)))
    check_files(name, [path.name for path in folder.iterdir()])
    if commit and commit != revision:
        _note_commit(folder.parents[1] / "refs", revision or "main", commit)
    return folder


def _note_commit(refs: Path, revision: str, commit: str) -> None:
    """Let the commit of a branch or tag be found offline; writes only inside the folder `refs` of the hub's cache."""
    entry = refs / revision
    if not (entry.resolve().is_relative_to(refs.resolve()) and re.fullmatch("[0-9a-f]{40}", commit)):
        return
    with suppress(OSError):  # a read-only cache
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text(commit)


def _reason(error: Exception, repository: str, revision: str) -> str:
    if isinstance(error, GatedRepoError):
        return "access to it is restricted: accept its terms on the hub, and set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}"
    if isinstance(error, HFValidationError):
        return "no such folder here, and not an id of the Hugging Face hub"
    return "no such folder here, and no such repository on the hub; for a private one, set HF_TOKEN"
