"""Check of a config.json before transformers builds a model of that size."""

from pathlib import Path

from transformers.utils import cached_file

from de3.model_store.sizes import check_sizes, read_config


def check_config(name: str, source: str) -> None:
    """Raise ValueError for a model whose config.json has impossible sizes, and OSError if that cannot be read.

    transformers would make 10⁹ names of labels, or a million layers, before it looks at the weights.
    source: folder or hub id.
    """
    config = read_config(Path(cached_file(source, "config.json")))
    if not isinstance(config, dict):
        raise ValueError(f"{name}: its config.json is not a JSON object")
    check_sizes(name, config)
    if isinstance(config.get("encoder"), dict):  # a checkpoint of de3 train
        check_sizes(name, config["encoder"])
