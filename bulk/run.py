"""A run: a pool classifies the slices of a source, and the answers are written as parts, in order."""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from de3.bulk.formats import check_names
from de3.bulk.parts import Parts
from de3.bulk.pool import Pool
from de3.bulk.source import Slice, Source
from de3.columns import Answers, Times

PART_ROWS = 2**16
PART_CHARS = 2**26  # a part is complete once it has this many characters


@dataclass
class Summary:
    """Statistics of a run.

    Attributes:
        rows, reasons: number of all rows, and of those that cannot be classified, by reason; both include an earlier,
            interrupted run.
        earlier: number of rows of the earlier run.
        answered: number of rows that this run answered.
        parts: number of parts, including those of an earlier run.
        seconds: duration of this run.
        truncated: number of texts that this run truncated.
        layers: number of answers of each model by exit layer, by the prefix of its columns.
        times: see Answers.
    """

    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    earlier: int = 0
    answered: int = 0
    parts: int = 0
    seconds: float = 0.0
    truncated: int = 0
    layers: dict[str, Counter[int]] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        """Number of rows that cannot be classified."""
        return self.reasons.total()

    def json(self) -> dict[str, Any]:
        """The statistics that are kept with the output; `exits` are those of this run, for several models by name."""
        counts = {"rows": self.rows, "refused": self.refused, "earlier": self.earlier}
        counts["truncated"] = self.truncated
        exits = {prefix[:-1]: dict(sorted(layers.items())) for prefix, layers in self.layers.items()}
        return counts | {"exits": exits.get("", exits), "seconds": round(self.seconds, 3)}

    def add(self, one: Slice, answers: Answers) -> None:
        """Add the answers to a slice."""
        self.answered += one.rows - len(one.refused)
        first = next(iter(answers.times))  # other models truncate the same texts
        self.truncated += sum(map(bool, answers.values[f"{first}truncated"]))
        for prefix, times in answers.times.items():
            layers = (layer for layer in answers.values[f"{prefix}exit_layer"] if layer is not None)
            self.layers.setdefault(prefix, Counter()).update(layers)
            self.times.setdefault(prefix, Times()).add(times.model_s, times.full_depth_s)


def classify(
    source: Source,
    pool: Pool,
    parts: Parts,
    rename: Callable[[str], str],
    part_rows: int = PART_ROWS,
    progress: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Classify the rows of a source, except those in parts that an earlier run has written.

    Args:
        rename: maps the name of an answers' column to its name in the output.
        part_rows: rows of a part, rounded up to whole slices.
        progress: called after each slice with the statistics so far.

    Raises ValueError if a file cannot be read, the rows do not fit the output's format, a process or its engine fails,
    the server refuses the options or does not answer, no row of the first slice has a text, or a column of the input
    has the name of an answers' column, which is noticed before the slice is classified.
    """
    summary, started = Summary(), perf_counter()
    waiting = deque[tuple[int, Slice, Future[Answers] | None]]()
    slices, part = _numbered(source, part_rows), _Part(parts, rename)
    while True:
        while len(waiting) < 2 * pool.size + 1 and (following := next(slices, None)) is not None:
            number, one = following
            with _process_errors():
                parts.types = parts.types or _types(pool, parts.drops_refused, rename)
                check_names(one, parts.types)
                waiting.append((number, one, None if parts.has(number) else pool.submit(one.texts)))
        if not waiting:
            break
        number, one, future = waiting.popleft()
        summary.rows += one.rows
        summary.parts = number + 1
        if future is not None:
            with _process_errors():
                answers = future.result()
            one.merge_errors(answers.values["error"])
            summary.add(one, answers)
            part.add(number, one, answers)
        else:
            summary.earlier += one.rows
        progress(summary)
    part.end()
    summary.reasons = parts.reasons(summary.parts)
    summary.seconds = perf_counter() - started
    return summary


def _types(pool: Pool, drops_refused: bool, rename: Callable[[str], str]) -> dict[str, str]:
    """The types of the answers' columns, by their names in the output."""
    types = pool.submit([]).result().types
    return {rename(name): kind for name, kind in types.items() if name != "error" or not drops_refused}


@contextmanager
def _process_errors() -> Iterator[None]:
    """Raise ValueError for a process that has ended, or whose engine failed."""
    try:
        yield
    except (BrokenProcessPool, RuntimeError) as error:
        reason = "perhaps for lack of memory" if isinstance(error, BrokenProcessPool) else error
        raise ValueError(
            f"a process failed, {reason}; the parts written so far remain, and the same command continues from them"
        ) from None


def _numbered(source: Source, part_rows: int) -> Iterator[tuple[int, Slice]]:
    """Yield the slices, each with the number of its part."""
    number = rows = chars = 0
    for one in source.slices():
        yield number, one
        rows += one.rows
        chars += one.chars
        if rows >= part_rows or chars >= PART_CHARS:
            number, rows, chars = number + 1, 0, 0


class _Part:
    """The part that is being collected."""

    def __init__(self, parts: Parts, rename: Callable[[str], str]) -> None:
        self._parts, self._rename = parts, rename
        self._number = -1
        self._slices: list[Slice] = []
        self._values: dict[str, list[Any]] = {}

    def add(self, number: int, one: Slice, answers: Answers) -> None:
        """Add a slice to part `number`; if that is another part, the current one is written first."""
        if number != self._number:
            self.end()
            self._number = number
        self._slices.append(one)
        values = one.drop_refused(answers.values) if self._parts.drops_refused else answers.values
        for name, column in values.items():
            self._values.setdefault(self._rename(name), []).extend(column)

    def end(self) -> None:
        """Write the part, if it has slices."""
        if self._slices:
            self._parts.write(self._number, self._slices, self._values)
        self._slices, self._values = [], {}
