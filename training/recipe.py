"""Batch size, epochs and learning rate by the size of the data; measured in lab/docs/experiments.md."""

from dataclasses import dataclass, replace
from typing import Any

CHOICES = ("auto", "fixed")
HEAD_LR = 1e-3  # of the exits' heads
MULTI_LABEL_HEAD_LR = 1e-2


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        lr: the encoder's highest learning rate.
        patience: stop after this many epochs without improvement; 0: never.
    """

    batch_size: int
    epochs: int
    lr: float
    patience: int

    def __str__(self) -> str:
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        stops = f", stopping after {self.patience} without improvement" if self.patience else ""
        return f"batches of {self.batch_size}, {epochs}{stops}, learning rate {self.lr:g}"


FIXED = Recipe(batch_size=64, epochs=3, lr=5e-5, patience=0)


def choose(
    name: str,
    samples: int,
    batch_size: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    patience: int | None = None,
) -> Recipe:
    """The recipe for so many training samples; what is given replaces its part.

    Raises ValueError for an unknown name.
    """
    if name not in CHOICES:
        raise ValueError(f"--recipe must be one of {', '.join(CHOICES)}, got {name!r}")
    recipe = FIXED if name == "fixed" else by_size(samples)
    given: dict[str, Any] = {"batch_size": batch_size, "epochs": epochs, "lr": lr, "patience": patience}
    return replace(recipe, **{key: value for key, value in given.items() if value is not None})


def by_size(samples: int) -> Recipe:
    """Small sets need more steps a sample: smaller batches, more epochs and a higher rate."""
    if samples < 20_000:
        return Recipe(batch_size=32, epochs=5, lr=1e-4, patience=2)
    return FIXED
