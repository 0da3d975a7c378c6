"""The log: as text or as JSON lines."""

import logging

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

from de3.model_store.printable import printable


def configure(style: str) -> None:
    """Log to standard error: style text, or json, one object a line."""
    handler = logging.StreamHandler()
    if style == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(levelname)s %(name)s %(message)s",
                rename_fields={"levelname": "level", "name": "logger"},
                reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
                timestamp="time",
            )
        )
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class TextFormatter(logging.Formatter):
    """A record in one line; the lines of its traceback are indented, so that none looks like a record.

    What a client or a model's file puts into either is escaped.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The first line."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """All of it."""
        return "\n    ".join(map(printable, super().format(record).split("\n")))


class JsonFormatter(OrjsonFormatter):
    """A record as one object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """All of it."""
        return printable(super().format(record))
