"""Check of the sizes in a config.json, which is untrusted, before a model of that size is built."""

import json
from pathlib import Path
from typing import Any

from de3.model_store.part import MAX_LABELS, MAX_LAYERS, MAX_WIDTH

MAX_BYTES = 2**24
# The largest allowed sizes, by their names in the families' configurations.
MAXIMA = {
    "num_labels": MAX_LABELS,
    **dict.fromkeys(("num_hidden_layers", "n_layers"), MAX_LAYERS - 1),
    **dict.fromkeys(("hidden_size", "dim", "embedding_size", "metric_dim"), MAX_WIDTH),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), MAX_WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_heads"), MAX_WIDTH),
    "max_position_embeddings": 2**20,
    "vocab_size": 2**22,
}


def read_config(file: Path) -> Any:
    """The parsed config.json; raises ValueError if it is too large or not JSON, and OSError if it cannot be read."""
    with file.open("rb") as opened:
        data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{file}: cannot be read: more than {MAX_BYTES} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None


def check_sizes(name: str, config: dict[str, Any]) -> None:
    """Raise ValueError, with a message that begins with `name`, for an invalid size or id2label.

    A size, if it is set, must be a whole number from 1 to its maximum in MAXIMA.
    """
    for field, most in MAXIMA.items():
        value = config.get(field)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(
                f"{name}: its config.json says {field} {value!r:.50}; it must be a whole number from 1 to {most}"
            )
    labels = config.get("id2label")
    if labels is None:
        return
    if not isinstance(labels, dict) or len(labels) > MAX_LABELS:
        raise ValueError(
            f"{name}: id2label in its config.json must be an object with at most {MAX_LABELS} labels"
        )
    if not all(key.isdecimal() and key.isascii() and len(key) < 10 for key in map(str, labels)):
        raise ValueError(f"{name}: id2label in its config.json must have whole numbers as keys")
