"""The encoder of a new classifier: that of a model in the store, or a stock encoder, converted without PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from de3.export.classifier import POOLING, OldFormError, Stock, convert, describe
from de3.export.hub import ENCODER_FILES, fetch
from de3.export.states import POOLINGS
from de3.model_store.architecture import Precision
from de3.model_store.sizes import read_config
from de3.model_store.store import Artifact, Store

describe_encoder = partial(describe, is_encoder=True)


@contextmanager
def encoder_of(name: str, store: Store, precision: Precision) -> Iterator[tuple[Artifact, tuple[str, ...]]]:
    """Yield an artifact with the encoder, and the poolings to try: only the one it was trained with, if known.

    name: a model in the store, the folder of an artifact, or the folder or hub id of a transformers or
    sentence-transformers model, of which only the encoder is used. precision: precision to which the encoder is
    converted; an encoder from the store must already have it.

    Raises ValueError for an encoder that cannot be used.
    """
    stored = store.find(name)
    if stored is not None:
        manifest = stored.manifest
        if manifest.precision != precision:
            wanted = "none" if manifest.precision == "fp32" else manifest.precision
            raise ValueError(f"--encoder {name}: it is {manifest.precision}: give --quantize {wanted}")
        yield stored, (manifest.pooling,)
        return
    try:
        source = fetch(name, describe_encoder, ENCODER_FILES)
    except OldFormError:  # whose hint, de3 import, needs a classifier
        raise ValueError(
            f"{name}: its weights or its tokenizer are in a format that only transformers reads; save them again with "
            "save_pretrained(…) of AutoModel and AutoTokenizer"
        ) from None
    with TemporaryDirectory(prefix="de3-") as folder:
        stock = Stock.open(name, source, describe_encoder)
        convert(stock, Store(Path(folder)), "encoder", precision)
        yield Store(Path(folder)).open("encoder"), _poolings(source)


def _poolings(folder: Path) -> tuple[str, ...]:
    """The pooling that sentence-transformers configured; both poolings if it configured none that an exit can use."""
    path = folder / POOLING
    config = read_config(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    mode = config.get("pooling_mode")
    for pooling, old in zip(POOLINGS, ("pooling_mode_mean_tokens", "pooling_mode_cls_token"), strict=True):
        if mode == pooling or (mode is None and config.get(old) is True):
            return (pooling,)
    return POOLINGS
