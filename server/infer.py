"""From a request to its answer: what lies between the protocols and the engine.

Every protocol calls `infer`, and nothing below it knows HTTP.
"""

import asyncio
from dataclasses import replace
from time import perf_counter

from de3.exits.reading import differs
from de3.exits.windows import most_windows
from de3.server.engine.work import Job, Request, Served
from de3.server.errors import RequestError
from de3.server.service import Service


async def infer(request: Request, service: Service) -> Job:
    """Classify the texts of a request; the job that is done has the outcomes.

    Raises RequestError when the request is not answered. `request.cancel(error)` ends it, and raises error.
    """
    service.check_open()
    request.served = served = service.models.get(request.model)
    request.check(served.model.manifest)
    request.windows = min(request.windows, most_windows(served.model.manifest.max_tokens))
    _check_texts(request, served)
    level = service.admission.level
    choice = served.rules.of(request.options, level)
    request.job = job = Job(served, choice, request, asyncio.get_running_loop().create_future())
    with service.audits.watch(job), service.admission.admit(job):
        await _wait(job, service)
    shadow = service.models.shadow_of(served)
    if shadow is not None:
        _run_shadow(shadow, job, level, service)
    service.metrics.answered(job)
    return job


def _check_texts(request: Request, served: Served) -> None:
    """Raise RequestError for a single text where the model takes pairs, or the reverse."""
    takes = served.model.manifest.input
    if takes is None:
        return
    wants_pair = takes == "pair"
    for index, text in enumerate(request.texts):
        if (text.text_pair is not None) != wants_pair:
            what = (
                "pairs of texts, and this is a single text"
                if wants_pair
                else "single texts, and this is a pair"
            )
            name = request.name_of(index)
            raise RequestError(f"{name}: {served.model.full_name} takes {what}", name)


async def _wait(job: Job, service: Service) -> None:
    """Submit a job and wait until it is done, its time is up or it is cancelled."""
    service.engine.submit(job)
    timeout_s = service.settings.timeout_s
    expires_at = job.request.expires_at
    left_s = timeout_s if expires_at is None else expires_at - perf_counter()
    timer = job.future.get_loop().call_later(left_s, job.request.cancel, timed_out(timeout_s))
    try:
        await job.future
    except BaseException:
        # What is pending leaves the queue at once, and what runs stops at its next layer.
        service.engine.drop(job)
        raise
    finally:
        timer.cancel()


def timed_out(timeout_s: float) -> RequestError:
    """The error of a request whose time is up."""
    return RequestError(f"no answer within {timeout_s:g} s", cause="timeout")


def _run_shadow(shadow: Served, job: Job, level: int, service: Service) -> None:
    """Let a shadow model run the texts of a job that is done, and count where its answers differ.

    It runs while nothing else is pending and is preempted after each layer, so that a server without idle
    time runs none. Its answers go to nobody.
    """
    if len(job.items) > service.engine.queue.shadow_room:
        return
    future = asyncio.get_running_loop().create_future()
    try:
        _check_texts(job.request, shadow)
        choice = shadow.rules.of(job.request.options, level)
        request = Request(job.request.texts, windows=job.request.windows)
        second = Job(shadow, replace(choice, budget_s=None), request, future, is_shadow=True)
        service.engine.submit(second)
    except RequestError:  # texts that this version does not take, options that it cannot fulfil, or no room
        return
    # A text that a deadline cut short says nothing of the model: the shadow has none.
    answers = [
        None if item.outcome is None or item.outcome.reason == "deadline" else answer
        for item, answer in zip(job.items, job.answers(), strict=True)
    ]
    tolerance = job.model.manifest.tolerance
    names = job.model.full_name, shadow.model.full_name

    def compare(done: "asyncio.Future[None]") -> None:
        others = second.answers()
        second.release()
        if done.cancelled() or done.exception() is not None:
            return
        pairs = [(a, b) for a, b in zip(answers, others, strict=True) if a is not None]
        service.metrics.shadow_texts.labels(*names).inc(len(pairs))
        unlike = sum(differs(a, b, tolerance) for a, b in pairs)
        service.metrics.shadow_disagreements.labels(*names).inc(unlike)

    future.add_done_callback(compare)
