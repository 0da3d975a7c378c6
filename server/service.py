"""The running server's parts, and its life: loading, ready, draining."""

import asyncio
import gc
import logging
import math
from collections.abc import Callable
from time import perf_counter

from model_store.store import Artifact, Store
from server.engine import Engine
from server.errors import ApiError
from server.metrics import Metrics
from server.models import Models, find, load
from server.settings import Settings

log = logging.getLogger("de3")


class Service:
    """Settings, models, engine and metrics of one server.

    Manifests are read at construction, so that a wrong store or name fails before the port opens; the
    models themselves load after it did, so that /health answers meanwhile.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.artifacts: list[Artifact] = find(Store(settings.store), settings.models)
        self.metrics = Metrics(max(a.manifest.num_layers for a in self.artifacts))
        self.engine = Engine(settings.engine_threads(), settings.max_queue, self.metrics.observe)
        self.models = Models([])
        self.state = "loading"
        self.metrics.watch(self.engine.queue.__len__, lambda: self.state == "ready", lambda: self.in_flight)
        self.failure: Exception | None = None
        self.in_flight = 0

    async def load(self, on_failure: Callable[[], None]) -> None:
        """Load and warm up every model, then be ready; on failure keep the reason and call on_failure."""
        try:
            started = perf_counter()
            self.models = Models(
                [await asyncio.to_thread(load, a, self.settings.runtime) for a in self.artifacts]
            )
            self.engine.start()
            # What is loaded stays: no collection need look at it again while requests wait.
            gc.collect()
            gc.freeze()
            if self.state == "loading":
                self.state = "ready"
            log.info(
                "ready in %.1f s: %s, %d engine threads",
                perf_counter() - started,
                ", ".join(f"{s.model.full_name} ({s.model.runtime})" for s in self.models.all),
                self.settings.engine_threads(),
            )
        except Exception as error:
            self.failure = error
            on_failure()

    def drain(self) -> None:
        """From now on not ready; requests that were accepted are still answered."""
        self.state = "draining"

    def check_open(self) -> None:
        """Raise ApiError 503 while the models load, or when too many requests are in flight.

        Before a body is read, so that bodies cannot fill the memory. A draining server still answers what
        reaches it.
        """
        if not self.models.all:
            raise ApiError(503, "the models are still loading", cause="loading", retry_after=1)

        if self.in_flight > self.settings.max_queue:
            raise self.overloaded()

    def overloaded(self) -> ApiError:
        """The answer of a server whose queue is full."""
        limit = self.settings.max_queue
        return ApiError(
            503,
            f"overloaded: {len(self.engine.queue)} texts wait and {self.in_flight} requests are in flight, "
            f"at most {limit} of each are allowed",
            cause="queue_full",
            retry_after=self.retry_after(),
        )

    def retry_after(self) -> int:
        """Seconds until the present queue will be empty, at least 1, by the mean time of a text so far."""
        seconds = [
            sample.value
            for metric in self.metrics.stage_latency.collect()
            for sample in metric.samples
            if sample.labels.get("stage") == "model" and sample.name.endswith(("_sum", "_count"))
        ]
        mean = sum(seconds[1::2]) / max(1.0, sum(seconds[0::2]))
        return max(1, math.ceil(len(self.engine.queue) * mean / self.settings.engine_threads()))
