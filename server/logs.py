"""Logs: as text or as JSON lines, and one line for each request if that is asked for."""

import logging
from dataclasses import asdict
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

from server.exchange import Exchange

log = logging.getLogger("de3.requests")


def configure(style: str) -> None:
    """Log to standard error: style text, or json, one object a line."""
    handler = logging.StreamHandler()
    if style == "json":
        handler.setFormatter(
            OrjsonFormatter(
                "%(levelname)s %(name)s %(message)s",
                rename_fields={"levelname": "level", "name": "logger"},
                reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
                timestamp="time",
            )
        )
    else:
        handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _OneLine(logging.Formatter):
    """A message is one line, whatever is in it: a name from a model's file must not look like a line of its
    own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


class RequestLog:
    """Logs a line for each request. The texts themselves are users' data: only `with_texts` shows them."""

    def __init__(self, style: str, with_texts: bool) -> None:
        self._style, self._with_texts = style, with_texts

    def __call__(self, x: Exchange) -> None:
        """Log one request."""
        ms = 1000 * (x.ended - x.started)
        fields: dict[str, Any] = {
            "request_id": x.id,
            "model": x.model,
            "status": x.status,
            "duration_ms": round(ms, 3),
        }
        if x.owner:
            fields["owner"] = x.owner
        if x.cause:
            fields["cause"] = x.cause
        if x.job is not None:
            outcomes = [item.outcome for item in x.job.items if item.outcome]
            fields |= {
                "texts": len(x.job.items),
                "tokens": sum(o.tokens for o in outcomes),
                "tau": x.job.rule.tau,
                "exit_layers": [o.layer for o in outcomes],
                "exit_reasons": sorted({o.reason for o in outcomes}),
                "queue_ms": round(1000 * max((o.queue_s for o in outcomes), default=0.0), 3),
                "model_ms": round(1000 * sum(o.model_s for o in outcomes), 3),
            }
            if self._with_texts:
                fields["input"] = [asdict(item.text) for item in x.job.items]
        if self._style == "json":
            log.info("request", extra=fields)
        else:
            log.info(" ".join(f"{name}={value!r}" for name, value in fields.items()))
