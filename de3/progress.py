"""Output of commands: progress of long operations (a bar on a terminal, lines in a log), warnings, and tables."""

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import track as rich_track
from rich.table import Column, Table

console = Console(stderr=True)
T = TypeVar("T")
LOG_EVERY_S = 20.0


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over items and show progress: a bar on a terminal; in a log, a line at the start and every 20 s.

    total: the number of items, if `items` has no length; if neither is known, the log gets only the first line.
    """
    if console.is_terminal:
        yield from rich_track(items, description, total, console=console, transient=True)
        return
    count = total if total is not None else len(items) if isinstance(items, Sized) else None
    started = printed = time.monotonic()
    console.print(f"  {description} …", highlight=False, markup=False, soft_wrap=True)
    for done, item in enumerate(items):
        now = time.monotonic()
        if count and done and now - printed >= LOG_EVERY_S:
            printed = now
            left = duration((now - started) * (count - done) / done)
            console.print(f"  {description}: {100 * done // count}%, about {left} left", highlight=False)
        yield item


def warn(warnings: Iterable[str]) -> None:
    """Print warnings, one per line."""
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def empty_table(columns: Iterable[str], title: str | None = None, no_wrap: bool = False) -> Table:
    """An empty table of numbers: columns are right-aligned, except those headed "signal" or without a heading."""
    return Table(
        *(Column(c, justify="left" if c in ("signal", "") else "right", no_wrap=no_wrap) for c in columns),
        title=title,
    )


class Meter:
    """Training progress, and the time left at the average speed so far."""

    def __init__(self) -> None:
        self._spent_s, self._steps = 0.0, 0  # totals over all epochs of this process

    @contextmanager
    def epoch(self, epoch: int, epochs: int, steps: int) -> Iterator["Meter"]:
        """Track an epoch (number `epoch` of `epochs`, from 1) of this many steps; yields the meter."""
        self._epoch, self._epochs, self._total = epoch, epochs, steps
        self._last = self._printed = time.monotonic()
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        with self._bar:
            self._task = self._bar.add_task("", total=steps, epoch=f"{epoch}/{epochs}", loss=0.0, left="")
            yield self

    def step(self, number: int, loss: float) -> None:
        """Report that step `number` (from 1) is finished; loss: the mean over the epoch's steps so far."""
        now = time.monotonic()
        self._spent_s, self._steps, self._last = self._spent_s + now - self._last, self._steps + 1, now
        remaining = (self._epochs - self._epoch + 1) * self._total - number
        left = f"about {duration(remaining * self._spent_s / self._steps)} left"
        self._bar.update(self._task, completed=number, loss=loss, left=left)
        if not console.is_terminal and (self._steps == 1 or now - self._printed >= LOG_EVERY_S):
            self._printed = now
            console.print(
                f"  epoch {self._epoch}/{self._epochs} step {number}/{self._total} loss {loss:.4f}  {left}"
            )


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 row, 2,048 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """A duration as text: 40 s, 12 min, 2 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
