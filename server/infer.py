"""Runs a server's requests: the step between the protocols and the engine.

Every protocol runs an `Inference`, and nothing below it depends on HTTP. `de3/library.py` does the same in process,
without a server.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from de3.exits.kinds import differs
from de3.model_store.manifest import Manifest
from de3.runtime.engine.head import Part
from de3.runtime.engine.job import Job, job_of
from de3.runtime.engine.plan import Plan, check_texts, with_spans
from de3.runtime.engine.request import NOBODY, Request, Sender, Text
from de3.runtime.engine.served import Served
from de3.runtime.errors import RequestError
from de3.runtime.upstream.answer import ask_upstreams, needs_upstream
from de3.runtime.upstream.client import Asked, Reply
from de3.runtime.upstream.usage import Query
from de3.server.questions import UPSTREAM
from de3.server.service import Service

# Maximum number of probabilities in a response: in TEI's format, 2 million take 2 s of the event loop and 0.8 GB.
MAX_PROBS = 2**18
MAX_SPANS = 2**17  # in a response, as about as many take 0.3 s of the event loop
MIN_ROW = (
    32  # with several models, a row counts as at least this many probabilities, as it takes about as long
)


@dataclass(slots=True, eq=False)
class Inference:
    """A request in flight, whose progress can be reported.

    Attributes:
        served: the models; empty before run().
        job: the job that the models run; None before run() and after release().
    """

    request: Request
    sender: Sender = NOBODY
    served: Sequence[Served] = ()
    job: Job | None = None
    _done: "asyncio.Future[None] | None" = None

    async def run(self, service: Service) -> Job:
        """Classify the texts; returns the finished job, which has the outcomes.

        Raises RequestError if the request is refused or times out, or the error of a text that fails the job.
        """
        if not service.is_open:
            service.check_open()
        request = self.request
        self.served = request.served(service.models.get)
        if request.others is not None and service.questions.upstreams:
            service.shared.upstreams.answered(UPSTREAM, request.weight - request.others, request.others)
        if not request.others:
            return await self._run(request, service)
        asking = asyncio.create_task(self._ask_others(request, service))
        asking.add_done_callback(_retrieved)
        try:
            job = await self._run(request, service)
            await asking
            return job
        finally:
            asking.cancel()

    async def _ask_others(self, request: Request, service: Service) -> None:
        """Have the decision server answer what no model does; raises RequestError if it does not, or not in time."""
        sender, waiting, upstreams = self.sender, service.admission.waiting, service.shared.upstreams
        ends = sender.expires_at or perf_counter() + service.settings.timeout_s

        async def ask(asked: Asked) -> Reply:
            query = Query(Text(""), "uncertain", sender.client, asked=asked)
            return await upstreams.ask(UPSTREAM, query, max(0.0, ends - perf_counter()), False)

        waiting.take(sender.client, 1)
        try:
            await request.ask_others(ask)
        finally:
            waiting.release(sender.client, 1)

    async def _run(self, request: Request, service: Service) -> Job:
        """Have the models answer; see run()."""
        served = self.served
        _check_response(request, [one.model.manifest for one in served])
        level = service.admission.level
        self._done = asyncio.get_running_loop().create_future()
        self.job = job = job_of(served, request, level, self._settle, self.sender)
        if not job.items:  # a guardrail may be sent only images
            return job
        if service.audits.is_on:
            with service.audits.watch(job):
                await self._answer(job, self._done, service)
        else:
            await self._answer(job, self._done, service)
        for part in job.parts:
            shadow = service.models.shadow_of(part.served)
            if shadow is not None:
                _run_shadow(shadow, job, part, level, service)
            service.metrics.answered(part)
            service.int8.add(part.model, job.request)
        return job

    async def _answer(self, job: Job, done: "asyncio.Future[None]", service: Service) -> None:
        """Run the texts of an accepted job, and have upstreams answer the rest; raises its error if it fails."""
        service.admission.admit(job)
        try:
            await self._wait(job, done, service)
        finally:
            service.admission.release(job)
        if job.plan.has_layouts:
            _check_spans(job)
        if service.settings.upstreams:
            await _complete(job, service)

    def _settle(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():  # the client disconnected, or another text failed first
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)

    async def _wait(self, job: Job, done: "asyncio.Future[None]", service: Service) -> None:
        """Submit a job and wait until it finishes; raises an error if it fails or times out."""
        service.engine.submit(job)
        expires_at = job.sender.expires_at
        left_s = service.settings.timeout_s if expires_at is None else expires_at - perf_counter()
        timer = asyncio.get_running_loop().call_later(left_s, lambda: self._settle(timed_out(service)))
        try:
            await done
        except BaseException:
            # Pending texts leave the queue at once; running ones stop at their next layer.
            service.engine.drop(job)
            raise
        finally:
            timer.cancel()

    def release(self) -> None:
        """Release the texts and their state, which refer to each other."""
        if self.job is not None:
            self.job.release()
            self.job = None


def _retrieved(task: "asyncio.Task[None]") -> None:
    """Note the error of a task, which is not reported if another one ends its request first."""
    if not task.cancelled():
        task.exception()


def _check_response(request: Request, manifests: Sequence[Manifest]) -> None:
    """Raise RequestError if the response could have more than MAX_PROBS probabilities; one text is always allowed."""
    if len(request.texts) == 1:
        return
    least = MIN_ROW if len(manifests) > 1 else 1
    each = sum(max(least, len(m.labels)) * (len(m.exit_layers) if request.explain else 1) for m in manifests)
    if len(request.texts) > (most := max(1, MAX_PROBS // each)):
        name, what = request.input_name, f"{each} probabilities for each text"
        raise RequestError(
            f"{name}: {len(request.texts)} texts; at most {most} are allowed with {what}", name
        )


def _check_spans(job: Job) -> None:
    """Raise RequestError if the response would have more than MAX_SPANS spans; one text's answer is always allowed."""
    explain, count = job.request.explain, 0
    for outcomes in (part.outcomes() for part in job.parts):
        for outcome in outcomes:
            readings = outcome.passed if explain else [outcome.reading]
            count += sum(len(one.spans) for one in readings)
    if count > MAX_SPANS and (explain or len(job.request.texts) > 1):
        name = job.request.input_name
        raise RequestError(
            f"{name}: {count} spans in the response; at most {MAX_SPANS} are allowed: send fewer texts at a time",
            name,
        )


async def _complete(job: Job, service: Service) -> None:
    """Have the upstreams of a finished job's models answer the texts of which no exit was sure, and count its texts.

    Nothing here takes time of the engine. Raises the RequestError of a text that is not answered.
    """
    upstreams, waiting = service.shared.upstreams, service.admission.waiting
    parts = [part for part in job.parts if part.model.manifest.upstream is not None]
    unsure = [sum(needs_upstream(part, outcome) for outcome in part.outcomes()) for part in parts]
    try:
        if total := sum(unsure):
            waiting.take(job.client, total)
            try:
                await ask_upstreams(job, service.settings, upstreams, service.undelivered)
            finally:
                waiting.release(job.client, total)
    finally:  # texts that are not answered, or not well, need the upstream, too
        for part, count in zip(parts, unsure, strict=True):
            upstreams.answered(part.model.manifest.name, len(part.heads) - count, count)
    for part in parts:
        service.metrics.texts.count(part.served, part.outcomes())


def timed_out(service: Service) -> RequestError:
    """The error for a request that timed out."""
    message, after_s = f"no answer within {service.settings.timeout_s:g} s", service.engine.retry_after_s()
    return RequestError(message, cause="timeout", retry_after_s=after_s)


def _run_shadow(shadow: Served, job: Job, part: Part, level: int, service: Service) -> None:
    """Run the texts of a finished job on a shadow model, and count the answers that differ.

    A shadow job runs only while nothing else is pending, and can be preempted after each layer, so a server without
    idle time runs none. Its answers are not returned. Does nothing if the shadow queue has no room, if the shadow
    cannot answer the request, or if nothing may keep the texts.
    """
    if job.request.is_private or len(job.items) > service.engine.queue.shadow_room:
        return
    # Texts that exited at a deadline are not compared, because the shadow runs without one.
    answers = [
        None if outcome.reason == "deadline" else answer
        for outcome, answer in zip(part.outcomes(), part.answers(), strict=True)
    ]
    kind = part.model.manifest.kind
    names = part.model.full_name, shadow.model.full_name

    def compare(error: Exception | None) -> None:
        if error is None:
            pairs = [(a, b) for a, b in zip(answers, second.first.answers(), strict=True) if a is not None]
            service.metrics.shadow_texts.labels(*names).inc(len(pairs))
            differing = sum(differs(kind, a, b) for a, b in pairs)
            service.metrics.shadow_disagreements.labels(*names).inc(differing)
        second.release()

    try:
        check_texts(job.request, shadow)
        choice = shadow.rules.choose(part.entry.options, level)
        choice = shadow.rules.with_flag(choice, part.entry.options, part.entry.flag)
        choice = with_spans(choice, job.request, shadow.model.manifest)
        request = Request(job.request.texts, spans=job.request.spans)
        plan = Plan([part.entry], [replace(choice, budget_s=None)], job.plan.windows)
        second = Job([shadow], plan, request, compare, is_shadow=True)
        service.engine.submit(second)
    except RequestError:  # texts or options that the shadow does not support, or a full queue
        return
