"""Recipes: batch size, epochs, learning rate and patience by the size of the data (lab/docs/experiments.md)."""

from de3.training.settings import Recipe


def by_size(samples: int) -> Recipe:
    """The recipe for this many samples: small data sets need more steps per sample and a higher learning rate."""
    if samples < 20_000:
        return Recipe(batch_size=32, epochs=5, lr=1e-4, patience=2)
    return Recipe()
