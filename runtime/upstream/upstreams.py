"""The upstreams of models: calls within their limits, with retries. They are in the process that counts."""

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from threading import Lock
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from de3.runtime.background import keep_running, run_once
from de3.runtime.errors import Cause, RequestError
from de3.runtime.fair_queue import Slots
from de3.runtime.networks import network_of
from de3.runtime.settings import RuntimeSettings
from de3.runtime.shares import Shares
from de3.runtime.upstream.breaker import Breaker
from de3.runtime.upstream.client import CallError, Client, Reply
from de3.runtime.upstream.usage import Query, UpstreamUsage
from de3.runtime.upstream_settings import UpstreamOf

log = logging.getLogger("de3")
ATTEMPTS = 3
BACKOFF_S = 0.25  # pause before the second attempt; it doubles, and is varied at random
REPEAT_SHARE = 0.02  # share of the audits that call twice
MIN_REPEATS = 50  # repeated audits before a warning
SAVE_S = 0.5  # interval between saves; a kill loses the calls since the last one
LOG_S = 60.0  # minimum time between two log lines about failures of one kind


class Caller:
    """Calls the upstream of one model.

    Attributes:
        usage: its calls so far.
    """

    def __init__(self, of: UpstreamOf, settings: RuntimeSettings) -> None:
        """Raises ValueError if the key is missing."""
        self.of, self._rate = of, settings.guarantee
        self._client, self._breaker = Client(of, of.upstream.key()), Breaker()
        self.usage = UpstreamUsage(of, settings.state_dir)
        self._calls = Slots(of.upstream.concurrency)
        # Audits leave room for texts that are waited for.
        self._audits = Slots(max(1, of.upstream.concurrency // 2))
        # Texts and audits for which calls are pending or in flight. Each process limits texts, too; see Admission.
        self._texts_room = Shares(2 * settings.max_queue, "texts for an upstream")
        self._audits_room = Shares(settings.max_queue, "audits by an upstream")
        self._was_away = self._has_warned = False
        self._logged: dict[str, float] = {}  # time of the last log line, by reason

    async def ask(self, query: Query, timeout_s: float, is_budget: bool = False) -> Reply:
        """The upstream's answer to a text.

        timeout_s: time for all attempts. is_budget: it is a latency budget, so nothing is tried if it is shorter than
        the usual latency of the client's calls. Raises RequestError if there is no answer.
        """
        ends = perf_counter() + timeout_s
        query = query._replace(client=network_of(query.client))  # an attacker can have many addresses in one
        if timeout_s <= (self.usage.usual_s(query.client) if is_budget else 0.0):
            raise RequestError(
                f"{self.of.name}: no time is left to ask its upstream", None, "upstream_timeout", 1
            )
        room = self._audits_room if query.kind == "audit" else self._texts_room
        try:
            room.take(query.client, 1)
        except RequestError:
            raise self._away(f"{room.total} texts wait for it", 1.0) from None
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._try(query, ends)
        except TimeoutError:
            raise RequestError(
                f"{self.of.name}: no answer of its upstream in time", None, "upstream_timeout", 1
            ) from None
        finally:
            room.release(query.client, 1)
        if query.is_audit and random.random() < REPEAT_SHARE:
            run_once("upstream", self._repeat(query._replace(kind="repeat"), reply.label))
        return reply

    @asynccontextmanager
    async def _turn(self, query: Query) -> AsyncIterator[None]:
        """Hold a slot for a call."""
        is_audit = query.kind in ("audit", "repeat")
        async with (
            self._audits.hold(query.client) if is_audit else nullcontext(),
            self._calls.hold(query.client),
        ):
            yield

    async def _try(self, query: Query, ends: float) -> Reply:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self._turn(query):  # not during a pause
                    self._check(query.client)
                    return await self._call(query if attempt == 1 else query._replace(kind="retry"))
            except CallError as error:
                # A reply without a label is tried once more.
                is_last = attempt == ATTEMPTS or (error.why == "reply" and attempt == 2)
                pause_s = (
                    BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5) if error.is_outage else 0.0
                )
                pause_s = max(pause_s, error.retry_after_s or 0.0)
                if (
                    is_last
                    or not error.may_retry
                    or self._breaker.is_open
                    or perf_counter() + pause_s >= ends
                ):
                    raise self._failed(error, query.client) from error
            await asyncio.sleep(pause_s)
        raise AssertionError("not reached")

    def _check(self, client: str) -> None:
        """Raise RequestError while the upstream is away, or while the client may not call it because of its quota."""
        if wait_s := self.usage.quota_wait_s(client):
            whose = "" if self.usage.quota_wait_s() else "a client's share of "
            why = f"{whose}max_calls_per_hour ({self.of.upstream.max_calls_per_hour}) is reached"
            self._log("quota", f"{why}; calls go on in {math.ceil(wait_s)} s")
            raise self._away(why, wait_s)
        if wait_s := self._breaker.wait_s(client):
            raise self._away("its last calls have failed", wait_s)

    async def _call(self, query: Query) -> Reply:
        """One call. If the time of its text ends first, it is cancelled, which says nothing about the upstream."""
        call, is_outage, error, started = self._breaker.begin(query.client), None, None, perf_counter()
        self.usage.called(query.kind, query.client)
        try:
            reply = await self._client.call(
                query.text, self.of.upstream.timeout_s, self.usage.used, query.asked
            )
            is_outage = False
        except CallError as failed:
            is_outage, error = failed.is_outage, failed
            self.usage.failed(failed.why)
            self._log(failed.why, str(failed))
            raise
        except asyncio.CancelledError:  # its latency is at least this
            self.usage.took(max(perf_counter() - started, self.usage.usual_s(query.client)), query.client)
            raise
        finally:
            is_certain, after_s = (False, None) if error is None else (error.is_certain, error.retry_after_s)
            is_alone = not is_certain and self._calls.is_alone(query.client)
            self._breaker.end(call, is_outage, after_s, is_certain, is_alone)
            self._note(str(error or ""))
        self.usage.took(perf_counter() - started, query.client)
        self.usage.totals.extracted += reply.is_extracted
        return reply

    def _log(self, why: str, message: str) -> None:
        """Log a failed call, at most every LOG_S for each reason."""
        now = perf_counter()
        if now >= self._logged.get(why, -LOG_S) + LOG_S:
            self._logged[why] = now
            log.warning("%s: a call of its upstream failed: %s", self.of.name, message)

    def _note(self, failure: str) -> None:
        """Log when the upstream stops working, and when it works again."""
        if self._breaker.is_open != self._was_away:
            self._was_away = self._breaker.is_open
            if self._was_away:
                log.error(
                    "%s: its upstream does not work (%s): calls are paused, and tried again by themselves",
                    *(self.of.name, failure),
                )
            else:
                log.info("%s: its upstream works again", self.of.name)

    async def _repeat(self, query: Query, label: int) -> None:
        """Ask for the answer to an audited text once more, and count whether the upstream disagrees with itself."""
        try:
            async with asyncio.timeout(self.of.upstream.timeout_s), self._turn(query):
                self._check(query.client)
                again = await self._call(query)
        except (RequestError, CallError, TimeoutError):
            return
        self.usage.totals.repeats += 1
        self.usage.totals.differing += again.label != label
        if self.warning is not None and not self._has_warned:
            self._has_warned = True
            log.warning("%s: %s", self.of.name, self.warning)

    @property
    def warning(self) -> str | None:
        """Set if the guarantee cannot be met by answers of the model, however good they are."""
        rate, totals = self.usage.self_disagreement, self.usage.totals
        if rate is None or self._rate is None or totals.repeats < MIN_REPEATS or self._rate >= rate / 2:
            return None
        return (
            f"two calls of its upstream for the same text differ in {100 * rate:.2g}% of the cases: a guarantee of "
            f"{100 * self._rate:g}% is below half of that, so hardly any text can be answered without a call"
        )

    def _away(self, why: str, wait_s: float) -> RequestError:
        return RequestError(
            f"{self.of.name}: its upstream cannot be asked: {why}",
            None,
            "upstream",
            max(1, math.ceil(wait_s)),
        )

    def _failed(self, error: CallError, client: str) -> RequestError:
        after_s = error.retry_after_s or self._breaker.wait_s(client) or 1.0
        retry = max(1, math.ceil(after_s)) if error.is_outage else None
        cause: Cause = "upstream_timeout" if error.why == "timeout" else "upstream"
        return RequestError(f"{self.of.name}: its upstream failed: {error}", None, cause, retry)

    @property
    def is_available(self) -> bool:
        """True unless calls are paused, or the quota is used up."""
        return not self._breaker.wait_s() and not self.usage.quota_wait_s()

    def report(self) -> dict[str, Any]:
        """The state of the upstream, for the report of the audits."""
        totals, usage = self.usage.totals, self.usage
        return {
            "kind": self.of.upstream.kind,
            "model": self.of.upstream.model,
            "available": self.is_available,
            "local_share": round(usage.local_share, 4),
            "local_texts": totals.local,
            "calls": dict(totals.calls),
            "failures": {why: count for why, count in totals.failures.items() if count},
            "extracted": totals.extracted,
            "usual_latency_s": round(usage.usual_s(), 4) or None,
            "tokens": {"input": totals.tokens[0], "output": totals.tokens[1]},
            "cost": round(totals.cost, 6),
            "saved": round(usage.saved, 6),
            "repeated": totals.repeats,
            "self_disagreement": usage.self_disagreement,
            "warning": self.warning,
        }

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


class Upstreams:
    """The upstreams of a server, by model name."""

    def __init__(self, settings: RuntimeSettings) -> None:
        """Raises ValueError if a key is missing."""
        self._by_name = {of.name: Caller(of, settings) for of in settings.upstreams}
        self._saving, self._has_failed = Lock(), False

    @property
    def all(self) -> Mapping[str, Caller]:
        """The callers by model name."""
        return self._by_name

    async def ask(self, name: str, query: Query, timeout_s: float, is_budget: bool) -> Reply:
        """The answer of a model's upstream; see Caller.ask."""
        return await self._by_name[name].ask(query, timeout_s, is_budget)

    def answered(self, name: str, local: int, others: int) -> None:
        """Count texts that were answered by a model, and by its upstream."""
        self._by_name[name].usage.answered(local, others)

    def report(self, name: str) -> dict[str, Any] | None:
        """The state of a model's upstream; None if it has none."""
        caller = self._by_name.get(name)
        return None if caller is None else caller.report()

    def start(self) -> None:
        """Start the task that saves the totals."""
        for name, caller in self._by_name.items():
            one = caller.of.upstream
            parts = urlsplit(one.url)  # its query may have a secret
            where = f"{parts.scheme}://{parts.netloc}{parts.path}"
            what = (
                "texts that no exit is sure of" if caller.of.labels else "questions that no model is bound to"
            )
            log.info("%s: %s go to %s (%s)", name, what, where, one.model or one.kind)
        if self._by_name:
            keep_running("upstream", self._save_often)

    async def _save_often(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            await asyncio.to_thread(self._save)

    def _save(self) -> None:
        with self._saving:  # one thread may still be saving when the server stops
            failed = list[OSError]()
            for caller in self._by_name.values():
                try:
                    caller.usage.save()
                except OSError as error:
                    failed.append(error)
            if failed and not self._has_failed:
                log.error("state_dir: cannot save the calls of upstreams: %s", failed[0])
            self._has_failed = bool(failed)

    def stop(self) -> None:
        """Save the totals; called after the last request."""
        self._save()
