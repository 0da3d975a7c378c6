"""A run: has a pool answer the slices of a source, and writes the parts in order."""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from de3.bulk.parts import Parts
from de3.bulk.pool import Pool
from de3.bulk.source import Slice, Source
from de3.columns import Answers

PART_ROWS = 2**16
PART_CHARS = 2**26  # a part with more characters ends


@dataclass
class Summary:
    """What a run did.

    Attributes:
        rows, refused: numbers of rows, those of an earlier run included in the first only.
        answered: number of rows that this run answered.
        parts: number of parts.
        layers: number of answers by exit layer.
        seconds: time of this run.
        model_s, full_depth_s: as in Answers.
    """

    rows: int = 0
    refused: int = 0
    answered: int = 0
    parts: int = 0
    layers: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    model_s: float = 0.0
    full_depth_s: float = 0.0

    def add(self, answers: Answers) -> None:
        """Count a slice's answers."""
        layers = answers.values.get("exit_layer", [])
        self.layers.update(layers)
        self.answered += len(layers)
        self.model_s += answers.model_s
        self.full_depth_s += answers.full_depth_s


def classify(
    source: Source,
    pool: Pool,
    parts: Parts,
    rename: Callable[[str], str],
    part_rows: int = PART_ROWS,
    progress: Callable[[int], None] = lambda _: None,
) -> Summary:
    """Answer all rows of a source whose parts an earlier run has not written.

    Args:
        rename: names the columns of the answers.
        part_rows: rows of a part, rounded up to whole slices.
        progress: called with the number of further rows that are done.

    Raises ValueError if a file cannot be read or written, or no row of the first slice can be classified.
    """
    summary, started = Summary(), perf_counter()
    waiting = deque[tuple[int, Slice, Future[Answers] | None]]()
    slices = _numbered(source, part_rows)
    part = _Part(parts, rename)
    is_over = False
    while True:
        while not is_over and len(waiting) < 2 * pool.size + 1:
            if (following := next(slices, None)) is None:
                is_over = True
                break
            number, one = following
            waiting.append((number, one, None if parts.has(number) else pool.submit(one.texts)))
        if not waiting:
            break
        number, one, future = waiting.popleft()
        summary.rows += one.rows
        summary.parts = number + 1
        if future is not None:
            answers = _result(future)
            if not summary.answered and not answers.values.get("label"):
                _check_first(one, answers)
            one.remove(answers.errors)
            summary.add(answers)
            summary.refused += len(one.refused)
            part.add(number, one, answers)
        progress(one.rows)
    part.end()
    summary.seconds = perf_counter() - started
    return summary


def _result(future: "Future[Answers]") -> Answers:
    try:
        return future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a process ended unexpectedly, perhaps for lack of memory; the parts that are written remain: "
            "the same command goes on"
        ) from None


def _check_first(one: Slice, answers: Answers) -> None:
    """Raise ValueError for a slice without a single answer: the columns or the model are probably the wrong ones."""
    reasons = [f"{refused.where}: {refused.reason}" for refused in one.refused[:1]]
    reasons += [f"{one.places[index]}: {reason}" for index, reason in answers.errors.items()][:1]
    if reasons:
        raise ValueError(f"none of the first {one.rows} rows can be classified: {reasons[0]}")


def _numbered(source: Source, part_rows: int) -> Iterator[tuple[int, Slice]]:
    """Yield the slices, each with the number of its part."""
    number = rows = chars = 0
    for one in source.slices():
        yield number, one
        rows += one.rows
        chars += sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in one.texts)
        if rows >= part_rows or chars >= PART_CHARS:
            number, rows, chars = number + 1, 0, 0


class _Part:
    """The part whose slices are being answered."""

    def __init__(self, parts: Parts, rename: Callable[[str], str]) -> None:
        self._parts, self._rename = parts, rename
        self._number = -1
        self._slices: list[Slice] = []
        self._values: dict[str, list[Any]] = {}
        self._types: dict[str, str] = {}

    def add(self, number: int, one: Slice, answers: Answers) -> None:
        """Add a slice; the one of another part ends this part."""
        if number != self._number:
            self.end()
            self._number = number
        self._slices.append(one)
        for name, kind in answers.types.items():
            column = self._rename(name)
            if column in (kept := _names(one)):
                raise ValueError(
                    f"{column}: is a column of the input and of the answers: "
                    f"choose others with --keep ({', '.join(kept)}), or rename the answers' with --prefix"
                )
            self._types[column] = kind
            self._values.setdefault(column, []).extend(answers.values[name])

    def end(self) -> None:
        """Write the part, if there is one."""
        if self._slices:
            self._parts.write(self._number, self._slices, self._values, self._types)
        self._slices, self._values = [], {name: [] for name in self._types}


def _names(one: Slice) -> list[str]:
    """The columns of the input that the output repeats."""
    if isinstance(one.kept, list):
        return list(one.kept[0]) if one.kept else []
    return list(one.kept.column_names)
