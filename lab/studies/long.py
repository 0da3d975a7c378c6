"""Texts longer than the model's window: truncated, or split into windows whose answers are combined."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.exits.kinds import CLASSES
from de3.exits.reading import ClassReading
from de3.exits.rule import ExitRule
from de3.exits.windows import EXPECTED_CHANGE, MAX_WINDOWS, OVERLAP, Span, combination, spans
from de3.loadtest.texts import Sample
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.progress import track

Exits = list[tuple[int, list[float], list[float] | None]]  # layer, logits, distances


@dataclass(frozen=True, slots=True)
class Window:
    """A window: its number of tokens, how many of them are in no earlier window, and its recorded exits."""

    tokens: int
    new: int
    exits: Exits

    def read(self, rule: ExitRule) -> ClassReading:
        """The reading at the exit that the window takes."""
        passed: list[ClassReading] = []
        for layer, logits, distances in self.exits:
            passed.append(CLASSES.read(layer, logits, distances))
            if rule.exits(rule.signal.score(passed)):
                break
        return passed[-1]


@dataclass(frozen=True, slots=True)
class Text:
    """A labelled text, split into windows."""

    label: int
    windows: list[Window]


def record(model: Model, samples: Sequence[Sample], max_tokens: int, overlap: float = OVERLAP) -> list[Text]:
    """Record all exits of up to MAX_WINDOWS windows of each text with a known label; duplicates are dropped."""
    index = {name: k for k, name in enumerate(model.manifest.labels)}
    frame, texts = model.tokenizer.frames[False], []
    unique = {sample.text: sample for sample in samples if sample.label in index}
    for sample in track(unique.values(), f"Running windows of {max_tokens} tokens", len(unique)):
        ids = model.tokenizer.encode([(sample.text, None)], special=False)[0].ids
        windows = []
        for span in spans(len(ids), max_tokens - frame.size, overlap)[:MAX_WINDOWS]:
            inside, types = frame.around([ids[span.start : span.end]])
            tokens = Tokens(np.array([inside], np.int64), np.array([types], np.int64), False)
            exits: Exits = [
                (
                    layer,
                    step.logits.tolist(),
                    None if step.distances is None else step.distances.tolist(),
                )
                for layer, step in enumerate(model.full_depth(tokens))
                if step.logits is not None
            ]
            windows.append(Window(len(tokens), span.new, exits))
        texts.append(Text(index[str(sample.label)], windows))
    return texts


@dataclass(frozen=True, slots=True)
class Answer:
    """A text's label, the number of windows that ran, and their work: the sum of exit layer × tokens."""

    label: int
    windows: int
    work: int


Strategy = Callable[[Text, ExitRule], Answer]


def _run(
    text: Text,
    rule: ExitRule,
    change: float | None = None,
    order: Callable[[int], list[int]] = lambda n: list(range(n)),
    weighted: bool = True,
) -> Answer:
    """Run windows in an order until their combination is settled.

    change: argument of `is_settled`; None: run all windows. weighted: weight windows by their new tokens.
    """
    windows = [text.windows[n] for n in order(len(text.windows))]
    news = [window.new if weighted else 1 for window in windows]
    combined = combination(CLASSES, [Span(0, new, new) for new in news])
    count = work = 0
    for window in windows:
        reading = window.read(rule)
        combined.add(reading)
        count, work = count + 1, work + reading.layer * window.tokens
        if change is not None and combined.is_settled(change):
            break
    answer = combined.reading(reading).answer
    assert isinstance(answer, int)
    return Answer(answer, count, work)


def _combined(
    text: Text, rule: ExitRule, how: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]
) -> Answer:
    """Run all windows and combine them: how(probabilities (windows, K), weights (windows, 1)) gives scores (K,)."""
    readings = [window.read(rule) for window in text.windows]
    probs = np.array([r.probs for r in readings])
    scores = how(probs, np.array([[window.new] for window in text.windows]))
    work = sum(r.layer * window.tokens for r, window in zip(readings, text.windows, strict=True))
    return Answer(int(scores.argmax()), len(readings), work)


def _first_and_last(count: int) -> list[int]:
    return [0] if count == 1 else [0, count - 1]


def _last_second(count: int) -> list[int]:
    return [*_first_and_last(count), *range(1, count - 1)]


EXACTLY, EXPECTED = "until settled exactly", f"until settled by {EXPECTED_CHANGE:g}"
STRATEGIES: dict[str, Strategy] = {
    "truncate": partial(_run, order=lambda _: [0]),
    "last window": partial(_run, order=lambda n: [n - 1]),
    "first and last": partial(_run, order=_first_and_last),
    "all: mean by new tokens": _run,
    "all: mean": partial(_run, weighted=False),
    "all: mean of log p by new tokens": partial(
        _combined, how=lambda p, w: (w * np.log(np.maximum(p, 1e-9))).sum(0)
    ),
    "all: maximum": partial(_combined, how=lambda p, _: p.max(0)),
    EXACTLY: partial(_run, change=1.0),
    EXPECTED: partial(_run, change=EXPECTED_CHANGE),
    "until settled by 0.5": partial(_run, change=0.5),
    "until settled by 0.25": partial(_run, change=0.25),
    "by 0.5, the last window second": partial(_run, change=0.5, order=_last_second),
}
ALL = "all: mean by new tokens"


def compare(texts: Sequence[Text], rule: ExitRule) -> dict[str, dict[str, float]]:
    """Run every strategy on the texts; returns results by strategy.

    Results: accuracy, difference from truncation with the half-width of its paired 95% interval, windows per text, work
    relative to truncation, and share of answers that differ from the strategy ALL's.
    """
    answers = {name: [run(text, rule) for text in texts] for name, run in STRATEGIES.items()}
    labels = np.array([text.label for text in texts])
    given = {name: np.array([a.label for a in rows]) for name, rows in answers.items()}
    work = {name: sum(a.work for a in rows) for name, rows in answers.items()}
    right = {name: (labels == of).astype(float) for name, of in given.items()}
    rows = {}
    for name in STRATEGIES:
        difference = right[name] - right["truncate"]
        rows[name] = {
            "count": len(texts),
            "accuracy": float(right[name].mean()),
            "difference": float(difference.mean()),
            "interval": float(1.96 * difference.std() / len(texts) ** 0.5),
            "windows": float(np.mean([a.windows for a in answers[name]])),
            "work": work[name] / work["truncate"],
            "unlike_all": float((given[name] != given[ALL]).mean()),
        }
    return rows


def rows_of(sets: Mapping[str, Sequence[Text]], rule: ExitRule, served: str) -> list[dict[str, Any]]:
    """The results of `compare` on every second text of each set; "chose" is `difference` on the other texts.

    The other texts are those on which a strategy may be chosen. All strategies run on the long texts of all sets;
    truncation and the `served` strategy also run on all texts, and on the long texts of each set.
    """
    together = "all sets" if len(sets) > 1 else next(iter(sets))
    cases = [(together, list(sets.values()), True), (together, list(sets.values()), False)]
    if len(sets) > 1:
        cases += [(name, [texts], True) for name, texts in sets.items()]
    rows: list[dict[str, Any]] = []
    for number, (name, parts, is_long) in enumerate(cases):
        chose, reported = (
            compare([t for texts in parts for t in texts[half::2] if len(t.windows) > 1 or not is_long], rule)
            for half in (0, 1)
        )
        rows += [
            {
                "set": name,
                "texts": "long" if is_long else "all",
                "strategy": strategy,
                "chose": chose[strategy]["difference"],
                **reported[strategy],
            }
            for strategy in (STRATEGIES if number == 0 else ("truncate", served))
        ]
    return rows
