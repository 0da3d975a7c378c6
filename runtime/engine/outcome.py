"""The engine's answer to one text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from de3.exits.reading import ClassReading, LabelsReading, Reading, SpansReading, TextReading, ValueReading
from de3.exits.rule import ExitReason, ExitRule
from de3.runtime.errors import RequestError


@dataclass(frozen=True, slots=True)
class Window:
    """A window that has run, of a text with several windows. Fields are as in Outcome."""

    layer: int
    passed: list[Reading]
    tokens: int
    model_s: float


class Decisive(NamedTuple):
    """Index of the window that decides the answer to a text with a flag, and the window's characters [start, end).

    The characters are those of the text, or of the longer text of a pair.
    """

    window: int
    start: int
    end: int


@dataclass(slots=True)
class Outcome:
    """The exit of a text, its answer, and its times in seconds.

    Attributes:
        layer: layer of the exit; with several windows, the exit layer of the last window that ran.
        rule: the rule in force there; its τ may be lower than the job's if is_far is set.
        reading: the answer; with several windows, the combined answer with the signals of the last window that ran.
        passed: readings of the exits passed, the text's exit last; with several windows, of all windows that ran.
        truncated: a part of the text was not read. end: the number of its characters that were; None if all of them
            were, and for a pair.
        tokens: number of tokens passed to the model; with several windows, those of every window that started.
        queue_s: time since the job was submitted, less tokenize_s and model_s; 0 for shadow jobs.
        is_far: the text was far from every prototype at some exit.
        windows: the windows that ran; empty unless the text has several.
        num_windows: number of windows of the text, run or not.
        decisive: the window that decides; None without a flag, or if the text has one window.
        upstream_s: time that the upstream took.
    """

    layer: int
    reason: ExitReason
    rule: ExitRule
    reading: Reading
    passed: list[Reading]
    tokens: int
    truncated: bool
    queue_s: float
    tokenize_s: float
    model_s: float
    is_far: bool = False
    windows: Sequence[Window] = ()
    num_windows: int = 1
    decisive: Decisive | None = None
    end: int | None = None
    upstream_s: float = 0.0

    @property
    def is_cut(self) -> bool:
        """True if a part of the text was not read, or the model might have flagged it in a deeper layer.

        Of a text in windows, max_layer may have cut off any.
        """
        at_max = self.reason == "max_layer" or (len(self.windows) > 0 and self.rule.max_layer is not None)
        return self.truncated or self.reason == "deadline" or (self.rule.flag is not None and at_max)

    def check_all_ran(self) -> None:
        """Raise RequestError if a latency budget ended before all windows ran or, with a flag, an answer is cut off."""
        if self.rule.flag is not None and self.is_cut and self.reason != "deadline" and not self.truncated:
            message = f"max_layer: a text was not decided by layer {self.layer}, so it is not safe; allow more layers"
            raise RequestError(message, "max_layer")
        ran, windows = max(1, len(self.windows)), self.num_windows
        if self.reason == "deadline" and (ran < windows or self.rule.flag is not None):
            what = (
                f"only {ran} of a text's {windows} windows were read"
                if ran < windows
                else "a text was not decided"
            )
            message = f"latency_budget_ms: {what} in time; allow more"
            raise RequestError(message, "latency_budget_ms", "budget", retry_after_s=1)

    @property
    def text_reading(self) -> TextReading:
        """The answer of a model that is not a token classifier."""
        assert not isinstance(self.reading, SpansReading)
        return self.reading

    @property
    def probs(self) -> list[float]:
        """The probabilities of a model with classes or labels."""
        assert isinstance(self.reading, ClassReading | LabelsReading)
        return self.reading.probs

    @property
    def value(self) -> float:
        """The answer of a regression model."""
        assert isinstance(self.reading, ValueReading)
        return self.reading.value
