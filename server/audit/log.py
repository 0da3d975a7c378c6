"""The log of audits: what each audited text showed at every exit, a line of JSON each."""

import logging
import os
import time
from collections.abc import Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import orjson

from server.engine.work import Outcome, Served, Text

MAX_BYTES = 100 * 2**20  # of a file, of which there are two


class AuditLog:
    """A file, and its predecessor.

    Attributes:
        has_texts: whether texts are logged too.
    """

    def __init__(self, path: Path, log_texts: bool) -> None:
        """Raises ValueError for a file that cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _end_line(path)
            self._handler = _Handler(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"log_audits: {path} cannot be written: {error.strerror}") from None
        self.has_texts = log_texts

    def write(self, served: Served, share: float, outcome: Outcome, text: Text | None) -> None:
        """Write an audit: the outcome of a text that passed every exit.

        share: the probability with which it was drawn.
        """
        passed = outcome.passed
        row: dict[str, Any] = {
            "time": round(time.time(), 3),
            "model": served.model.full_name,
            "share": share,
            "tokens": outcome.tokens,
            "layers": [reading.layer for reading in passed],
            "logits": [_short(reading.logits) for reading in passed],
            "distances": [None if r.distances is None else _short(r.distances) for r in passed],
        }
        if self.has_texts and text is not None:
            row["text"] = text.text
            if text.text_pair is not None:
                row["text_pair"] = text.text_pair
        line = orjson.dumps(row).decode()
        self._handler.emit(logging.LogRecord("de3.audits", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


class _Handler(RotatingFileHandler):
    """Says once that the file cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called for an error in emit."""
        if self.handles_errors:
            self.handles_errors = False
            logging.getLogger("de3").exception(
                "--log-audits: cannot be written; further errors are not logged"
            )

    handles_errors = True


def _end_line(path: Path) -> None:
    """End a last line that a killed server left torn, so that it does not spoil the next one."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _short(values: Sequence[float]) -> list[float]:
    """Values with the precision that float32 has."""
    return [float(f"{value:.7g}") for value in values]
