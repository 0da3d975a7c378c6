"""A loaded model, with everything that is needed to serve it."""

from dataclasses import dataclass, field
from itertools import count
from typing import Any

from de3.model_store.model import Model
from de3.runtime.engine.timing import Timing
from de3.runtime.ood import OodMonitor
from de3.runtime.rules import Rules

# Longest time between two checks of the queue, seconds, unless one layer of one text takes longer.
MAX_STEP_S = 0.004
# A model is fast if it runs FAST texts of FAST_TOKENS tokens through all layers in one step.
FAST, FAST_TOKENS = 4, 32


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model, its speed on this machine, the rules that choose its τ, and its OOD monitor.

    Attributes:
        is_fast: see FAST.
        number: of no other loaded model in this process, also after it is unloaded.
        plans: how it answers requests without options (plan.plan_of), by their kind and tenant.
    """

    model: Model
    timing: Timing
    rules: Rules
    monitor: OodMonitor
    plans: dict[Any, Any] = field(default_factory=dict, init=False, compare=False)
    number: int = field(default_factory=count().__next__, init=False, compare=False)
    is_fast: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        is_fast = FAST * self.timing.full_depth_s(FAST_TOKENS) <= MAX_STEP_S
        object.__setattr__(self, "is_fast", is_fast)

    def group_s(self, tokens: int) -> float:
        """Step time of a text this long in a group, seconds.

        The first text of a group waits for the last. For a fast model, all layers of a group must therefore fit into a
        step. For other models, where this would leave no room for a second text, only one layer must fit.
        """
        return self.timing.full_depth_s(tokens) if self.is_fast else self.timing.layer_s(tokens)
