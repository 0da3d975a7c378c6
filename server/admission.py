"""Admission control: limits the texts in flight, sets the load level, and sheds requests."""

import asyncio
from collections.abc import Callable
from time import perf_counter

from de3.runtime.background import keep_running
from de3.runtime.engine.engine import Engine
from de3.runtime.engine.job import REPLY_S, Job
from de3.runtime.shares import Shares
from de3.server.models import Models
from de3.server.overload import TICK_S, Controller
from de3.server.settings import Settings


class Admission:
    """The texts in flight, shared between clients, and the load level that meets the latency objective.

    Attributes:
        texts: shares of the texts in flight. A text counts once for each model that answers it, and a request at most
            as much as the limit, so that a client alone may send any request.
        waiting: shares of the texts that wait for an upstream, which take no time of the engine.
    """

    def __init__(self, settings: Settings, models: Models) -> None:
        self._settings, self._models = settings, models
        self.texts = Shares(settings.max_queue, "texts", self._retry_after_s)
        self.waiting = Shares(settings.max_queue, "texts for an upstream")
        self._batches: set[Job] = set()  # jobs with several texts
        self._in_flight = 0  # texts, each counted once
        self._engine: Engine | None = None
        self._controller: Controller | None = None
        self._short_s = 0.0  # time of a short text at full depth

    def start(self, engine: Engine) -> None:
        """Start the load controller if there is a latency objective; called once the models are loaded."""
        self._engine = engine
        if self._settings.slo_p99_ms is None:
            return
        first, threads = self._models.all[0], engine.threads
        manifest = first.model.manifest
        share = 1.0 if manifest.upstream is not None else first.rules.default.share(manifest.num_layers)
        guess = threads / (share * first.timing.full_depth_s(32) + REPLY_S)
        self._short_s = first.timing.full_depth_s(8)
        objective_s = self._settings.slo_p99_ms / 1000
        controller = self._controller = Controller(objective_s, self._max_level, guess, threads)
        keep_running("load_control", lambda: self._tick(controller, engine))

    def _retry_after_s(self) -> int:
        return 1 if self._engine is None else self._engine.retry_after_s()

    def _max_level(self) -> int:
        """The highest load level of any model."""
        return max(len(served.rules.steps) for served in self._models.all)

    async def _tick(self, controller: Controller, engine: Engine) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            controller.tick(self._in_flight, self._queued_before_a_short_text(), engine.finished)

    def _queued_before_a_short_text(self) -> int:
        """Number of texts ahead of a new short text: those in flight, minus finished ones and those it overtakes."""
        assert self._engine is not None
        later = self._engine.queue.later_than(perf_counter() + self._short_s)
        return max(0, self._in_flight - sum(job.finished for job in self._batches) - later)

    @property
    def level(self) -> int:
        """The load level: number of steps by which the default τ is raised."""
        return self._controller.level if self._controller else 0

    def sheds(self, client: Callable[[], str | None]) -> bool:
        """True if a new request must be shed to meet the latency objective.

        A client without texts in flight is admitted while others have some, because the queue serves it first.
        client: returns the request's client, or None if it is unauthorized; called only under load.
        """
        controller, texts = self._controller, self.texts
        if controller is None or not controller.sheds(self._in_flight, self._queued_before_a_short_text):
            return False
        name = client()
        return name is None or texts.amount(name) > 0 or texts.total == 0

    def admit(self, job: Job) -> None:
        """Count a job's texts as in flight; raises RequestError if they exceed the client's share or the limit."""
        self.texts.take(job.client, min(job.weight, self.texts.limit))
        self._in_flight += len(job.items)
        if len(job.items) > 1:
            self._batches.add(job)

    def release(self, job: Job) -> None:
        """Stop counting the texts of an admitted job."""
        self.texts.release(job.client, min(job.weight, self.texts.limit))
        self._in_flight -= len(job.items)
        self._batches.discard(job)
