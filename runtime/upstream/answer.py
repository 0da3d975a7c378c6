"""Asks the upstream for the answers to a request's texts of which no exit was sure."""

import asyncio
from math import log
from time import perf_counter
from typing import Protocol

from de3.exits.reading import ClassReading, read
from de3.runtime.engine.head import Head, Part
from de3.runtime.engine.job import Item, Job
from de3.runtime.engine.outcome import Outcome
from de3.runtime.errors import RequestError
from de3.runtime.settings import RuntimeSettings
from de3.runtime.upstream.client import Reply
from de3.runtime.upstream.undelivered import Undelivered, key_of
from de3.runtime.upstream.usage import Kind, Query

MIN_PROB = 1e-6  # probabilities below it are raised to it before their logarithm is taken


class Asks(Protocol):
    """The upstreams of a server: `Upstreams`, or a connection to the supervisor's."""

    async def ask(self, name: str, query: Query, timeout_s: float, is_budget: bool) -> Reply:
        """The answer of a model's upstream; raises RequestError. See Caller.ask."""

    def answered(self, name: str, local: int, others: int) -> None:
        """Count texts that were answered by a model, and by its upstream."""


async def ask_upstreams(
    job: Job, settings: RuntimeSettings, upstreams: Asks, undelivered: Undelivered | None = None
) -> None:
    """Complete the outcomes of a finished job with the answers of its models' upstreams.

    undelivered: keeps the answers if the request fails. Raises RequestError, which names the text, if an upstream fails
    and the text is not answered without it; the other texts' calls are finished first.
    """
    kept = undelivered or Undelivered()
    replies: dict[bytes, Reply] = {}
    expires_at = job.sender.expires_at or job.submitted + settings.timeout_s
    unsure = [
        (item, head, head.outcome)
        for part in job.parts
        if part.model.manifest.upstream is not None
        for item, head in job.rows(part)
        if head.outcome is not None and needs_upstream(part, head.outcome)
    ]

    async def ask(item: Item, head: Head, outcome: Outcome) -> None:
        key = key_of(head.part.model.manifest, item.text, job.client)
        known = kept.take(key)
        if (reply := await _ask(item, head, outcome, settings, upstreams, expires_at, known)) is not None:
            replies[key] = reply

    try:
        results = await asyncio.gather(*(ask(*one) for one in unsure), return_exceptions=True)
        if failed := [result for result in results if result is not None]:
            raise failed[0]
    except BaseException:  # also if the client is gone
        kept.add(replies)
        raise


def needs_upstream(part: Part, outcome: Outcome) -> bool:
    """True if a text goes to the upstream; otherwise, sets the reason of its outcome.

    It does unless an exit of the model was sure, the last one included, or the request limits the depth. With a flag,
    the last one is not enough: the text may have come to it because of a flagged answer.
    """
    if outcome.reason == "deadline" or part.choice.rule.max_layer is not None:
        return False
    last, rule = part.model.manifest.num_layers, outcome.rule
    ends = [window.passed[-1] for window in outcome.windows] or [outcome.passed[-1]]
    if any(end.layer == last and not (rule.flag is None and rule.exits(end.score)) for end in ends):
        return True  # with several windows, the last one may have exited earlier
    outcome.reason = "threshold"
    return False


async def _ask(
    item: Item,
    head: Head,
    outcome: Outcome,
    settings: RuntimeSettings,
    upstreams: Asks,
    expires_at: float,
    known: Reply | None,
) -> Reply | None:
    """Complete an outcome with the known answer, or with the upstream's, which is returned; None if there is none."""
    job, is_budget = item.job, item.job.deadline is not None
    manifest, ends = head.part.model.manifest, expires_at
    if job.deadline is not None:
        ends = min(ends, job.deadline)
    kind: Kind = "uncertain" if outcome.rule.tau > 0 else "learning"
    started = perf_counter()
    timeout_s = max(0.0, ends - started)
    try:
        query = Query(item.text, kind, job.client, head.is_drawn)
        reply = known or await upstreams.ask(manifest.name, query, timeout_s, is_budget)
    except RequestError as error:
        if is_budget:
            outcome.reason = "deadline"
        elif settings.without_upstream == "answer" and len(manifest.exit_layers) > 1:
            outcome.reason = "upstream_failed"
        elif job.request.keeps_errors:
            head.outcome, head.error = None, error
        else:
            name = job.request.name_of(item.index)
            raise RequestError(f"{name}: {error.message}", name, error.cause, error.retry_after_s) from None
        return None
    finally:
        outcome.upstream_s = perf_counter() - started
    reading = reading_of(reply, manifest.num_layers, len(manifest.labels))
    outcome.passed = [*outcome.passed, reading]
    outcome.reason, outcome.reading, outcome.layer = "upstream", reading, manifest.num_layers
    outcome.truncated, outcome.end, outcome.decisive = False, None, None  # the upstream reads the whole text
    return reply


def reading_of(reply: Reply, layer: int, labels: int) -> ClassReading:
    """An upstream's answer, as the reading of one more exit; layer: the model's last one. labels: K."""
    probs = reply.probs
    if probs is None:
        probs = [0.0] * labels
        probs[reply.label] = 1.0
    reading = read(layer, [log(max(p, MIN_PROB)) for p in probs], None)
    reading.probs, reading.label = probs, reply.label
    return reading
