"""Stock classifiers by name: a folder, or files of the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from de3.export.classifier import CONFIG, INDEX, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, describe
from de3.model_store.sizes import read_config

FILES = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors")


def looks_like_path(name: str) -> bool:
    """True for a name that can only be a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def fetch(name: str) -> Path:
    """The folder of a classifier: a path, or a snapshot of a hub repository, as id or id@revision.

    Its config.json is checked before its weights are downloaded. Raises ValueError, which says what to do, if there is
    no such folder or repository, or it cannot be served.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if looks_like_path(name):
        raise ValueError(f"{name}: no such folder")
    repository, _, revision = name.partition("@")
    where: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    try:
        describe(name, read_config(Path(hf_hub_download(filename=CONFIG, **where))))
        return Path(snapshot_download(allow_patterns=list(FILES), **where))
    except HFValidationError:
        raise ValueError(f"{name}: no such folder, and not an id of the Hugging Face hub") from None
    except GatedRepoError:
        raise ValueError(
            f"{name}: access to it is restricted: accept its terms on the hub, and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name}: no such folder, and no such repository on the hub; for a private one, set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{name}: {repository} has no revision {revision!r}") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{name}: no such folder, and the hub cannot be reached: check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None
    except EntryNotFoundError:
        raise ValueError(f"{name} has no config.json, so it is not a model of transformers") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(f"{name}: cannot be read from the hub: {reason}") from None
