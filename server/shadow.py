"""A shadow: a second model that runs the same texts, whose answers are compared and given to nobody."""

import asyncio

from server.errors import ApiError
from server.models import Served
from server.protocol import ClassifyRequest
from server.queue import QueueFullError
from server.service import Service
from server.work import Job


def run_beside(shadow: Served, job: Job, request: ClassifyRequest, service: Service) -> None:
    """Let a shadow run the texts of a job that is done, while nothing else waits, and count other labels.

    It gives way after each layer, and a server without idle time runs none.
    """
    if len(job.items) > service.engine.queue.shadow_room:
        return
    try:
        rule = service.choose(shadow, request).rule
    except ApiError:  # a wish that this version cannot fulfil
        return
    future = asyncio.get_running_loop().create_future()
    second = Job(
        *(shadow.model, rule, True, False, False, job.texts, shadow.timing.predict, future),
        layer_s=shadow.timing.layer_s,
        is_shadow=True,
    )

    ours, names = _labels(job), (job.model.full_name, shadow.model.full_name)

    def compare(done: "asyncio.Future[None]") -> None:
        if done.cancelled() or done.exception() is not None:
            return
        metrics, theirs = service.metrics, _labels(second)
        second.release()
        metrics.shadow_texts.labels(*names).inc(len(ours))
        different = sum(a != b for a, b in zip(ours, theirs, strict=True))
        metrics.shadow_disagreements.labels(*names).inc(different)

    try:
        service.engine.submit(second)
    except QueueFullError:
        return
    future.add_done_callback(compare)


def _labels(job: Job) -> list[str]:
    names = job.model.manifest.labels
    return [names[item.outcome.reading.label] for item in job.items if item.outcome is not None]
