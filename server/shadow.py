"""A shadow: a second model that runs the same texts, whose answers are compared and given to nobody."""

import asyncio

from server.engine import DeadlineError
from server.errors import ApiError
from server.models import Served
from server.protocol import ClassifyRequest
from server.queue import QueueFullError
from server.service import Service
from server.work import Job

LATER_S = 10.0  # a shadow's texts let everything pass that is due so much later than they
ROOM = 0.5  # of the queue; a fuller one takes no shadows


def run_beside(shadow: Served, job: Job, request: ClassifyRequest, service: Service) -> None:
    """Let a shadow run the texts of a job that is done, when there is time, and count other labels.

    It costs what a request costs, and whoever waits goes first; under load it runs none.
    """
    engine = service.engine
    if len(engine.queue) + len(job.items) > ROOM * engine.queue.limit:
        return
    try:
        rule = service.choose(shadow, request).rule
    except ApiError:  # a wish that this version cannot fulfil
        return
    future = asyncio.get_running_loop().create_future()
    second = Job(
        *(shadow.model, rule, True, False, False, job.texts, shadow.timing.predict, future),
        together_s=shadow.together_s,
        layer_s=shadow.timing.layer_s,
        first_s=shadow.timing.predict_first_exit,
    )
    for item in second.items:
        item.due += LATER_S

    def compare(done: "asyncio.Future[None]") -> None:
        if done.cancelled() or done.exception() is not None:
            return
        names, metrics = (job.model.full_name, shadow.model.full_name), service.metrics
        ours, theirs = _labels(job), _labels(second)
        metrics.shadow_texts.labels(*names).inc(len(ours))
        different = sum(a != b for a, b in zip(ours, theirs, strict=True))
        metrics.shadow_disagreements.labels(*names).inc(different)

    try:
        engine.submit(second)
    except (QueueFullError, DeadlineError):
        return
    future.add_done_callback(compare)


def _labels(job: Job) -> list[str]:
    names = job.model.manifest.labels
    return [names[item.outcome.reading.label] for item in job.items if item.outcome is not None]
