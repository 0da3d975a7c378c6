"""The request log: one line for each classification request."""

import logging
from dataclasses import asdict
from typing import Any

from de3.runtime.engine.head import Part
from de3.server.http.exchange import Exchange

log = logging.getLogger("de3.requests")


class RequestLog:
    """Logs a line for each request; the texts, which are user data, only if `with_texts` is set, and never if they are
    redacted.

    style: see logs.configure.
    """

    def __init__(self, style: str, with_texts: bool) -> None:
        self._style, self._with_texts = style, with_texts

    def __call__(self, exchange: Exchange) -> None:
        """Log one request: a line for each model that answers."""
        parts = [None] if exchange.job is None else exchange.job.parts
        for number, model in enumerate(exchange.models):
            self._log(exchange, model, parts[number] if number < len(parts) else None)

    def _log(self, exchange: Exchange, model: str, part: Part | None) -> None:
        ms = 1000 * (exchange.ended - exchange.started)
        fields: dict[str, Any] = {
            "request_id": exchange.id,
            "model": model,
            "status": exchange.status,
            "duration_ms": round(ms, 3),
        }
        if exchange.owner:
            fields["owner"] = exchange.owner
        if exchange.cause:
            fields["cause"] = exchange.cause
        if exchange.job is not None and part is not None:
            job, outcomes = exchange.job, part.outcomes()
            waited = max((o.upstream_s for o in outcomes), default=0.0)
            fields |= {
                "texts": len(job.request.texts),
                "tokens": sum(o.tokens for o in outcomes),
                "tau": part.choice.rule.tau,
                "exit_layers": [o.layer for o in outcomes],
                "exit_reasons": sorted({o.reason for o in outcomes}),
                "queue_ms": round(1000 * max((o.queue_s for o in outcomes), default=0.0), 3),
                "model_ms": round(1000 * sum(o.model_s for o in outcomes), 3),
                **({"upstream_ms": round(1000 * waited, 3)} if waited else {}),
            }
            if self._with_texts and not job.request.is_private:
                fields["input"] = [asdict(text) for text in job.request.texts]
        if self._style == "json":
            log.info("request", extra=fields)
        else:
            log.info(" ".join(f"{name}={value!r}" for name, value in fields.items()))
