"""Log of errors that clients could trigger repeatedly: at most one traceback a minute for each kind."""

import logging
import sys
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from traceback import walk_tb

PERIOD_S = 60.0
MAX_KINDS = 100  # kinds remembered; the oldest is forgotten first

Kind = tuple[str, type[BaseException], str, int]


@dataclass(slots=True)
class _Seen:
    """One kind of error: when it was last logged, and the number of errors since."""

    logged: float
    since: int = 0


class FailureLog:
    """Logs errors with their traceback. Errors of one kind have the same message, type and source line.

    Any thread may call it.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._seen: dict[Kind, _Seen] = {}
        self._lock = Lock()

    def exception(self, message: str, *values: object) -> None:
        """Log the error that is being handled; only count it if one of its kind was logged in the last PERIOD_S.

        The count is logged with the first error of the kind after that period. Outside an except block, does nothing.
        """
        error = sys.exception()
        if error is not None:
            self.log(message, *values, error=error)

    def log(self, message: str, *values: object, error: BaseException) -> None:
        """Like `exception`, for an error that has already been handled."""
        skipped = self._count(_kind(message, error))
        if skipped is None:
            return
        if skipped:
            message += f" (and {skipped} times since such an error was last logged)"
        self._log.error(message, *values, exc_info=error)

    def _count(self, kind: Kind) -> int | None:
        """Count an error; returns how many were skipped since one was logged, or None if this one is skipped too."""
        now = monotonic()
        with self._lock:
            seen = self._seen.get(kind)
            if seen is not None and now - seen.logged < PERIOD_S:
                seen.since += 1
                return None
            self._seen.pop(kind, None)
            if len(self._seen) >= MAX_KINDS:
                del self._seen[next(iter(self._seen))]
            self._seen[kind] = _Seen(now)
            return 0 if seen is None else seen.since


def _kind(message: str, error: BaseException) -> Kind:
    lines = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    return message, type(error), *(lines[-1] if lines else ("", 0))
