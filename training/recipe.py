"""Recipes: batch size, epochs, learning rate and patience by the size of the data (lab/docs/experiments.md)."""

from dataclasses import replace
from typing import Any

from de3.training.settings import Recipe

CHOICES = ("auto", "fixed")
FIXED = Recipe()


def choose(name: str, samples: int, **given: Any) -> Recipe:
    """The recipe for this many training samples, with the fields in `given` replaced.

    name: auto (by the number of samples) or fixed. Raises ValueError for any other name.
    """
    if name not in CHOICES:
        raise ValueError(f"--recipe must be one of {', '.join(CHOICES)}, got {name!r}")
    return replace(FIXED if name == "fixed" else by_size(samples), **given)


def by_size(samples: int) -> Recipe:
    """The recipe for this many samples: small data sets need more steps per sample and a higher learning rate."""
    if samples < 20_000:
        return Recipe(batch_size=32, epochs=5, lr=1e-4, patience=2)
    return FIXED
