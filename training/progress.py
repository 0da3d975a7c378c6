"""Progress bars for long work; silent where nobody is looking."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

console = Console(stderr=True)
T = TypeVar("T")


def track(work: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over work with a progress bar on a terminal; a bar in a log would only be noise."""
    if not console.is_terminal:
        yield from work
        return
    yield from rich_track(work, description, total, console=console, transient=True)
