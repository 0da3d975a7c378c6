"""The engine's answer to one text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from de3.exits.reading import Reading
from de3.exits.rule import ExitReason, ExitRule


@dataclass(frozen=True, slots=True)
class Window:
    """A window that ran, of a text with several; fields as in Outcome."""

    layer: int
    passed: list[Reading]
    tokens: int
    model_s: float


class Decisive(NamedTuple):
    """With a flag: the window whose answer is that of the text, and its characters [start, end) of the longer text."""

    window: int
    start: int
    end: int


@dataclass(slots=True)
class Outcome:
    """The exit of a text, its answer, and its times in seconds.

    Attributes:
        layer: the exit's layer; for several windows, that of the last one that ran.
        rule: the rule in force there; its τ may be lower than the job's if the text is far.
        reading: the answer; for several windows the combined one, with the signals of the last one.
        passed: readings of the exits passed, ending with the exit; for several windows, those of all that ran.
        tokens: of the windows that ran.
        windows: those that ran, of a text with several.
        num_windows: number of windows of the text.
        decisive: with a flag, for a text with several windows.
        is_far: it was far from every prototype at some exit.
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
