"""Reads models and tokenizers with PyTorch and transformers, without running code from their repositories."""

from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import cached_file, logging

from de3.model_store.families import family
from de3.model_store.sizes import check_sizes, read_config
from de3.training.config import looks_like_path, model_type
from de3.training.model import De3Model, check_loaded


def quiet() -> None:
    """Silence the progress bars and the warnings of transformers; errors are still raised."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(folder: Path) -> De3Model:
    """The model of a checkpoint, in float32, in evaluation mode; raises ValueError for unusable weights."""
    quiet()
    try:
        model, loaded = De3Model.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the weights cannot be loaded: {error}") from None
    check_loaded(loaded, str(folder))
    _check_weights(model, loaded["unexpected_keys"], folder)
    opened: De3Model = model.eval()
    return opened


def _check_weights(model: De3Model, unexpected: Iterable[str], folder: Path) -> None:
    """Raise ValueError if the file has weights that the model lacks, or if a weight is not finite."""
    if surplus := sorted(unexpected):
        raise ValueError(
            f"{folder}: its file has {len(surplus)} weights that are not in the model of its config.json, such as "
            f"{surplus[0]}: the two do not match"
        )
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(
                f"{folder}: {name} is not finite: the training diverged; repeat it with a lower --lr"
            )


def open_encoder(name: str) -> tuple[Any, Any]:
    """The configuration and the tokenizer of an encoder from a folder or the hub.

    Raises ValueError for an encoder that cannot be used.
    """
    quiet()
    folder = Path(name)
    if folder.is_dir():
        kind = model_type(folder)
        if kind is None:
            raise ValueError(
                f"--encoder {name}: the folder has no config.json with a model_type, so it is not a Hugging Face model"
            )
        if kind == "de3-bert":
            raise ValueError(
                f"--encoder {name} is a checkpoint from de3 train; give the encoder that it was trained from, "
                "or use the checkpoint as --teacher"
            )
    elif looks_like_path(name):
        raise ValueError(f"--encoder {name}: no such folder")
    try:
        check_config(f"--encoder {name}", name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        family(config.to_dict())
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, split_special_tokens=True)
    except StrictDataclassError as error:
        raise ValueError(f"--encoder {name}: {' '.join(str(error).split())}") from None
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--encoder {name}: no such folder, and it cannot be read from the Hugging Face hub ({reason})"
        ) from None
    check_tokenizer(f"--encoder {name}", tokenizer, config)
    return config, tokenizer


def check_config(name: str, source: str) -> None:
    """Raise ValueError for a config.json that is not a JSON object or has sizes above the limits.

    Without this check, transformers would create 10⁹ label names, or a million layers, before it reads the weights.
    name: start of the messages. source: folder or hub id. Raises OSError if the file cannot be read.
    """
    config = read_config(Path(cached_file(source, "config.json")))
    if not isinstance(config, dict):
        raise ValueError(f"{name}: its config.json is not a JSON object")
    check_sizes(name, config)
    if isinstance(config.get("encoder"), dict):  # a checkpoint from de3 train
        check_sizes(name, config["encoder"])


def check_tokenizer(name: str, tokenizer: Any, config: Any) -> None:
    """Raise ValueError for a slow tokenizer, or one with more tokens than the encoder's config.vocab_size."""
    if not tokenizer.is_fast:
        raise ValueError(f"{name}: it has a slow tokenizer; a fast one (tokenizer.json) is needed")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the encoder has {config.vocab_size}: they do not match"
        )


def rewrite(name: str, source: Path, folder: Path) -> None:
    """Save a classifier to `folder` as model.safetensors and tokenizer.json, without running pickled code.

    name: the classifier's name, for messages. source: its folder, whose config.json has been checked.

    Raises ValueError, whose message begins with `name`, if the classifier cannot be read.
    """
    quiet()
    try:
        tokenizer = _tokenizer(name, source)
        model, loaded = _model(name, source)
    except StrictDataclassError as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name}: cannot be read: {str(error).partition(chr(10))[0]}") from None
    check_loaded(loaded, name)
    check_tokenizer(name, tokenizer, model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model(name: str, source: Path) -> tuple[Any, Any]:
    """The classifier, and the loading report of from_pretrained."""
    architectures = read_config(source / "config.json").get("architectures") or ()
    is_spans = any(str(one).endswith("ForTokenClassification") for one in architectures)
    kind = AutoModelForTokenClassification if is_spans else AutoModelForSequenceClassification
    try:
        return kind.from_pretrained(  # type: ignore[no-any-return]
            source,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            weights_only=True,
        )
    except UnpicklingError:  # its message suggests loading the file without this protection
        raise ValueError(
            f"{name}: its pytorch_model.bin is damaged, or holds more than weights, which could run code; save the "
            "model as model.safetensors"
        ) from None
    except (EOFError, LookupError) as error:  # from the unpickler
        raise ValueError(
            f"{name}: its weights are damaged ({type(error).__name__}: {error!s:.200})"
        ) from None


def _tokenizer(name: str, source: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, split_special_tokens=True)
    except Exception as error:  # transformers raises many types for missing or damaged files
        raise ValueError(
            f"{name}: its tokenizer cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]}); "
            "save its tokenizer.json there"
        ) from None
