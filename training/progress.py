"""Progress bars for long operations, shown only on a terminal."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

console = Console(stderr=True)
T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over items, with a progress bar on a terminal; in a log a bar would only be noise."""
    if not console.is_terminal:
        yield from items
        return
    yield from rich_track(items, description, total, console=console, transient=True)
