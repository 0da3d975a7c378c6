"""Training settings. Those with a typer.Option are options of `de3 train`. Does not import PyTorch."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from typer import Option

WEIGHTS = ("depth", "uniform")
PROTOTYPES = ("refit", "means", "sliding")
MULTI_LABEL_HEAD_LR = 1e-2  # head_lr of a multi-label model
training_option = partial(Option, rich_help_panel="Training")
_by_recipe = partial(training_option, show_default="by number of samples")


@dataclass(frozen=True)
class Recipe:
    """Batch size, epochs, learning rate and patience of the training.

    Attributes:
        patience: training stops after this many epochs without a better tuning score; 0: never.
    """

    batch_size: Annotated[int, _by_recipe(help="Samples per step.")] = 64
    epochs: Annotated[int, _by_recipe(help="Passes over the data.")] = 3
    lr: Annotated[float, _by_recipe(help="Peak learning rate of the encoder.")] = 5e-5
    patience: int = 0

    def __str__(self) -> str:
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        stops = f", stopping after {self.patience} without improvement" if self.patience else ""
        return f"batches of {self.batch_size}, {epochs}{stops}, learning rate {self.lr:g}"


@dataclass(frozen=True)
class TrainSettings(Recipe):
    """All settings of the training. Raises ValueError for values outside their ranges.

    Attributes:
        head_lr: learning rate of the exits' heads.
        weight_decay: weight decay of all weights but biases and norms.
        warmup: share of the steps with learning-rate warm-up.
        alpha: α, weight of the distance-aware loss (Eq. 6).
        temperature: temperature of the distillation.
        prototypes: final prototypes: refit (retrain the prototype spaces on the finished encoder), means (only
            recompute the prototypes over the training data) or sliding (keep the moving averages).
    """

    head_lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.06
    alpha: float = 0.1
    weights: Annotated[str, training_option(help="Weights of the exits in the loss: depth or uniform.")] = (
        "depth"
    )
    distill: Annotated[
        float, training_option(help="Share of the loss that uses the teacher's logits instead of the label.")
    ] = 0.5
    temperature: float = 2.0
    augment: Annotated[
        int,
        training_option(
            help="Altered copies of each sample (words replaced, texts joined), labelled by the teacher."
        ),
    ] = 0
    max_length: Annotated[
        int, training_option(help="Truncate training and tuning texts to this many tokens.")
    ] = 128
    prototypes: str = "refit"
    bf16: Annotated[
        bool,
        training_option(
            help="Use bfloat16 autocast; --no-bf16 is faster on CPUs without bfloat16 instructions."
        ),
    ] = True
    seed: Annotated[int, Option(help="Seed of the split, the heads and the order of samples.")] = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.max_length < 3:
            raise ValueError("epochs and batch_size must be at least 1, max_length at least 3")
        if min(self.lr, self.head_lr) <= 0 or self.alpha < 0 or self.temperature <= 0:
            raise ValueError("learning rates and temperature must be above 0, alpha 0 or more")
        if not (0 <= self.distill <= 1 and 0 <= self.warmup < 1):
            raise ValueError("distill must be in [0, 1], warmup in [0, 1)")
        if min(self.augment, self.patience, self.weight_decay) < 0:
            raise ValueError("augment, patience and weight_decay must be 0 or more")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be {' or '.join(WEIGHTS)}, got {self.weights!r}")
        if self.prototypes not in PROTOTYPES:
            raise ValueError(f"prototypes must be one of {', '.join(PROTOTYPES)}, got {self.prototypes!r}")
