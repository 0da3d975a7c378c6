"""The log, as text or JSON lines."""

import logging
import sys
import threading
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

from de3.model_store.printable import printable

log = logging.getLogger("de3")


def configure(style: str, process: int | None = None) -> None:
    """Log to standard error; does nothing if the log is already configured.

    style: text, or json (one object per line, also for Python's warnings and uncaught errors). process: number of this
    process; None if the server has only one.
    """
    handler = logging.StreamHandler()
    static = {} if process is None else {"process": process}
    if style == "json":
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = sys.unraisablehook = _uncaught_in_thread
        handler.setFormatter(
            JsonFormatter(
                "%(levelname)s %(name)s %(message)s",
                rename_fields={"levelname": "level", "name": "logger"},
                reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
                timestamp="time",
                static_fields=static,
            )
        )
    else:
        number = "" if process is None else f"[{process}] "
        handler.setFormatter(TextFormatter(f"%(asctime)s {number}%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs the URL of every call


def _uncaught(*error: Any) -> None:
    """Log an uncaught error: its type, its message, and its traceback."""
    log.critical("uncaught error", exc_info=error)


def _uncaught_in_thread(hook: Any) -> None:
    """Log an uncaught error of a thread, or an error that no code could catch."""
    _uncaught(hook.exc_type, hook.exc_value, hook.exc_traceback)


class TextFormatter(logging.Formatter):
    """Formats a record as one line, followed by its indented traceback, so that no traceback line looks like a record.

    Control characters from clients or model files are escaped.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The first line of a record."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """The record with its traceback."""
        return "\n    ".join(map(printable, super().format(record).split("\n")))


class JsonFormatter(OrjsonFormatter):
    """Formats a record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        return printable(super().format(record))
