"""Token classifiers: parity with transformers, speed, and the exits' two rates of disagreement."""

from collections.abc import Iterator, Sequence
from typing import Any

Spans = frozenset[tuple[int, int, str]]


def chars(spans: Spans) -> set[int]:
    """The characters inside the spans."""
    return {at for start, end, _ in spans for at in range(start, end)}


def recall(expected: Sequence[Spans], given: Sequence[Spans]) -> float:
    """Share of the characters in the expected spans of each text that are in a given one, whatever its label."""
    pairs = [(chars(a), chars(b)) for a, b in zip(expected, given, strict=True)]
    total = sum(len(wanted) for wanted, _ in pairs)
    return sum(len(wanted & found) for wanted, found in pairs) / total if total else 1.0


def rates(expected: Sequence[Spans], given: Sequence[Spans]) -> tuple[float, float]:
    """Share of the texts whose spans differ; and, of those where spans are expected, share with one missed."""
    differ = sum(a != b for a, b in zip(expected, given, strict=True))
    missed = [bool(a - b) for a, b in zip(expected, given, strict=True) if a]
    return differ / max(1, len(expected)), sum(missed) / max(1, len(missed))


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.2f}%"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(columns)} |"
    yield "| --- |" + " --- |" * (len(columns) - 1)
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
