"""Batch size, epochs and learning rate by the size of the data; measured in lab/docs/experiments.md."""

from dataclasses import replace
from typing import Any

from de3.training.settings import Recipe

CHOICES = ("auto", "fixed")
FIXED = Recipe()


def choose(name: str, samples: int, **given: Any) -> Recipe:
    """The recipe for this many training samples, with the fields in `given` replaced.

    Raises ValueError for an unknown name.
    """
    if name not in CHOICES:
        raise ValueError(f"--recipe must be one of {', '.join(CHOICES)}, got {name!r}")
    return replace(FIXED if name == "fixed" else by_size(samples), **given)


def by_size(samples: int) -> Recipe:
    """Recipe by the size of the data: small sets need more steps per sample, and a higher rate."""
    if samples < 20_000:
        return Recipe(batch_size=32, epochs=5, lr=1e-4, patience=2)
    return FIXED
