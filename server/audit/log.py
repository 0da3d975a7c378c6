"""The audit log: one line of JSON for each audited text, with the outputs of every exit."""

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import orjson

from de3.exits.reading import Reading
from de3.server.engine.request import Text
from de3.server.engine.served import Served

log = logging.getLogger("de3")
MAX_BYTES = 100 * 2**20  # per file; there are at most two
MAX_LINE = 2**24


def line_of(
    served: Served, share: float, passed: list[Reading], tokens: int, text: Text | None
) -> str | None:
    """The line of an audit; None if a logit is not finite, as calibration would reject it.

    share: probability with which the text was drawn. passed: the readings of every exit. tokens: number of tokens.
    text: the text; None if texts are not logged.
    """
    if not all(math.isfinite(value) for reading in passed for value in reading.logits):
        return None
    row: dict[str, Any] = {
        "time": round(time.time(), 3),
        "model": served.model.full_name,
        "share": share,
        "tokens": tokens,
        "layers": [reading.layer for reading in passed],
        "logits": [_short(reading.logits) for reading in passed],
        "distances": [None if r.distances is None else _short(r.distances) for r in passed],
    }
    if text is not None:
        row["text"] = text.text
        if text.text_pair is not None:
            row["text_pair"] = text.text_pair
    return orjson.dumps(row).decode()


class AuditLog:
    """The log file; rotation keeps one earlier file."""

    def __init__(self, path: Path) -> None:
        """Open the file, and cut off an incomplete last line; raises ValueError if it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            self._handler = _Handler(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"log_audits: {path} cannot be written: {error.strerror}") from None

    def write(self, line: str) -> None:
        """Write a line."""
        self._handler.emit(logging.LogRecord("de3.audits", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


class _Handler(RotatingFileHandler):
    """A log file that only its owner may read, as texts are user data.

    Only the first of consecutive failed writes is reported, and then the first write that succeeds again. A line is
    written whole or not at all.
    """

    _lost = 0  # lines lost since the last one written
    _size = 0  # bytes of whole lines

    def _open(self) -> Any:
        stream = open(  # noqa: SIM115
            self.baseFilename, self.mode, encoding=self.encoding, opener=_private
        )
        self._size = os.fstat(stream.fileno()).st_size
        return stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        lost = self._lost
        super().emit(record)  # calls handleError on failure
        if self._lost > lost or self.stream is None:
            return
        self._size = os.fstat(self.stream.fileno()).st_size
        if lost:
            log.warning("--log-audits: written again; %d audits were not logged", lost)
            self._lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the first of consecutive failed writes, and remove the part of a line that was written."""
        self._lost += 1
        if self._lost == 1:
            log.error(
                "--log-audits: cannot be written; no audits are logged until it can: %s", sys.exception()
            )
        with suppress(OSError):
            if self.stream is not None:
                self.stream.close()  # also fails if its buffer holds the rest of the line
        self.stream = None  # the next write reopens the file
        with suppress(OSError):
            os.truncate(self.baseFilename, self._size)


def _cut_torn_line(path: Path) -> None:
    """Cut off an incomplete last line, which a killed server may leave."""
    with open(path, "ab+", opener=_private) as file:
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - MAX_LINE)
        file.seek(start)
        kept = start + file.read().rfind(b"\n") + 1
        if kept > start or start == 0:
            file.truncate(kept)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _short(values: Sequence[float]) -> list[float]:
    """float32 values, rounded to the 9 significant digits that identify them."""
    return [float(f"{value:.9g}") for value in values]
