"""The running server's parts, and its life: loading, ready, draining."""

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from time import perf_counter

from starlette.types import ASGIApp, Receive, Scope, Send

from model_store.manifest import Manifest
from model_store.store import Artifact, Store
from server import memory
from server.access import Access
from server.engine import Engine
from server.errors import ApiError
from server.exchange import HEADER, Exchange, Reporter, request_id
from server.lane import Lane
from server.load import TICK_S, Controller
from server.logs import RequestLog
from server.manager import Manager
from server.metrics import Metrics
from server.models import Models, Served, find, others
from server.protocol import ClassifyRequest
from server.rules import Choice
from server.settings import Settings
from server.shares import Clients, Shares
from server.timing import run_longest
from server.traces import Traces, provider
from server.work import REPLY_S, Job

log = logging.getLogger("de3")
CHECK_S = 1.0  # between two looks at the engine threads
TRIM_CHECKS = 10  # between two times that free memory is handed back


class EngineError(Exception):
    """An engine thread ended or is stuck."""


class Service:
    """Settings, models, engine and metrics of one server.

    Manifests are read at construction, so that a wrong store or name fails before the port opens; the
    models themselves load after it did, so that /health answers meanwhile.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        store = Store(settings.store)
        self.artifacts: list[Artifact] = find(store, settings.models)
        deepest = max(a.manifest.num_layers for a in [*self.artifacts, *others(store)])
        self.metrics = Metrics(settings, deepest, lambda served: served.rules.in_force(self.level))
        self.access = Access(settings)
        self._clients = Clients(settings.trusted_proxies)
        self.texts_in_flight = Shares(settings.max_queue, "texts", self._wait_s)
        self.bytes_in_flight = Shares(settings.max_inflight_bytes, "bytes")
        self.lane = Lane()
        self.engine = Engine(settings.engine_threads(), self.texts_in_flight.most, self.metrics.observe)
        self.models = Models()
        self.manager = Manager(settings, self.models, self.metrics, self.engine.queue.drop_shadows)
        self.state = "loading"
        self.is_open = False  # once all models are loaded, and then for good
        self.metrics.watch(
            self.engine.queue.__len__,
            lambda: self.state == "ready",
            lambda: self.in_flight,
            lambda: self.level,
        )
        self.failure: Exception | None = None
        self.in_flight = 0
        self.lists: set[Job] = set()  # those with several texts
        self._short_s = 0.0  # of a short text through every layer
        self.controller: Controller | None = None
        self._ticks: asyncio.Task[None] | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self.shed = self._shed_response()
        self._reporters: list[Reporter] = []
        if settings.log_requests or settings.log_texts:
            self._reporters.append(RequestLog(settings.log_format, settings.log_texts))
        self.traces = Traces(provider()) if settings.traces else None
        if self.traces is not None:
            self._reporters.append(self.traces)

    async def load(self, on_failure: Callable[[], None]) -> None:
        """Load and warm up every model, then be ready; on failure keep the reason and call on_failure."""
        if self.is_open:  # before it was served, as on Ray
            return
        try:
            started = perf_counter()
            await self.manager.begin(self.artifacts)
            self._start_controller()
            models = [served.model for served in self.models.all]
            self.engine.start(lambda: run_longest(models))
            self._watchdog = asyncio.create_task(self._watch_engine(on_failure))
            # What is there now mostly stays: no collection need look at it again while requests wait.
            gc.collect()
            gc.freeze()
            self.is_open = True
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

    def _start_controller(self) -> None:
        """Keep the latency objective, if there is one."""
        if self.settings.slo_p99_ms is None:
            return
        first, threads = self.models.all[0], self.settings.engine_threads()
        share = first.rules.default.share(first.model.manifest.num_layers)
        guess = threads / (share * first.timing.full_depth_s(32) + REPLY_S)
        self._short_s = first.timing.full_depth_s(8)
        self.controller = Controller(self.settings.slo_p99_ms / 1000, self._levels, guess, threads)
        self._ticks = asyncio.create_task(self._tick(self.controller))

    def _levels(self) -> int:
        """The most steps by which any model's default τ can be raised."""
        return max(len(s.rules.steps) for s in self.models.all)

    async def _tick(self, controller: Controller) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            controller.tick(self.texts_in_flight.total, self.ahead(), self.engine.finished)

    async def _watch_engine(self, on_failure: Callable[[], None]) -> None:
        """End the server when an engine thread is lost: its supervisor starts a new one."""
        for check in count(1):
            if self.state == "stopping":
                return
            if (problem := self.engine.problem()) and self.state != "stopping":
                break
            await asyncio.sleep(CHECK_S)
            if check % TRIM_CHECKS == 0:
                gc.collect()  # little is not frozen
                await asyncio.to_thread(memory.trim)
        log.critical("%s: the server stops", problem)
        self.state = "failed"
        self.metrics.engine_failures.inc()
        self.failure = EngineError(problem)
        on_failure()

    def ahead(self) -> int:
        """Texts that a new short one finds before it: in flight, less what is done and what it overtakes."""
        later = self.engine.queue.later_than(perf_counter() + self._short_s)
        return max(0, self.texts_in_flight.total - sum(job.finished for job in self.lists) - later)

    @property
    def level(self) -> int:
        """The level of load: how many steps the default τ is raised."""
        return self.controller.level if self.controller else 0

    @contextmanager
    def holding(self, job: Job, client: str) -> Iterator[None]:
        """Count a client's texts as in flight; raises ApiError 429 or 503 when they would be too many."""
        self.texts_in_flight.take(client, len(job.items))
        if len(job.items) > 1:
            self.lists.add(job)
        try:
            yield
        finally:
            self.texts_in_flight.give_back(client, len(job.items))
            self.lists.discard(job)

    def report(self, x: Exchange) -> None:
        """Log and trace a request that is over, as far as that was asked for."""
        for reporter in self._reporters:
            reporter(x)

    def stop(self) -> None:
        """Finish what was accepted, and send what is left to tell of it."""
        if self.state != "failed":
            self.state = "stopping"
        self.manager.stop()
        self.engine.stop()
        if self.traces is not None:
            self.traces.stop()

    def drain(self) -> None:
        """From now on not ready; requests that were accepted are still answered."""
        if self.state != "failed":
            self.state = "draining"

    def check_open(self) -> None:
        """Raise ApiError 503 while the models load. A draining server still answers what reaches it."""
        if not self.is_open:
            raise ApiError(503, "the models are still loading", cause="loading", retry_after=1)

    def address(self, peer: tuple[str, int] | None) -> str:
        """The address, or the IPv6 network, of a connection's other end."""
        return self._clients.name({"client": peer, "headers": []})

    def _wait_s(self) -> int:
        return self.engine.retry_after_s()

    def client(self, scope: Scope, owner: str) -> str:
        """Who shares what is limited: the owner of an API key, else an address."""
        return f"key {owner}" if owner else self._clients.name(scope)

    def sheds(self, scope: Scope) -> bool:
        """Whether a new request must be refused to keep the latency objective.

        Not that of a client that has nothing in flight while others have: the queue serves it before them.
        """
        texts = self.texts_in_flight
        if self.controller is None or not self.controller.sheds(texts.total, self.ahead):
            return False
        try:
            client = self.client(scope, self.access.user(scope))
        except ApiError:
            return True
        return texts.held(client) > 0 or texts.total == 0

    def shed_error(self) -> ApiError:
        """Why a request is shed."""
        objective = self.settings.slo_p99_ms or 0
        message = f"overloaded: the objective of {objective:g} ms could not be kept"
        return ApiError(503, message, cause="shed", retry_after=1)

    def _shed_response(self) -> ASGIApp:
        """The answer to a request that is shed, made once: an overloaded server sends little else."""
        refused, requests = self.metrics.rejected.labels("shed"), self.metrics.requests.labels("none", "503")
        response = self.shed_error().response()
        body = {"type": "http.response.body", "body": response.body}

        async def shed(scope: Scope, _: Receive, send: Send) -> None:
            refused.inc()
            requests.inc()
            x = Exchange(request_id(scope), scope, status=503, cause="shed")
            headers = [*response.raw_headers, (HEADER, x.id.encode())]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send(body)
            x.ended = perf_counter()
            self.report(x)

        return shed

    def manifests(self) -> list[Manifest]:
        """Those of the served models, or of those that are being loaded."""
        if self.is_open:
            return [s.model.manifest for s in self.models.all]
        return [a.manifest for a in self.artifacts]

    def role(self, manifest: Manifest) -> dict[str, str | float]:
        """What a served version does, as /v1/models tells it; nothing while the models load."""
        if not self.is_open:
            return {}
        role = self.models.role_of(manifest)
        share = {"share": self.models.routes[manifest.name].share} if role == "canary" else {}
        return {"role": role, **share}

    def manifest(self, name: str) -> Manifest:
        """That of a name (its current version) or name:version; raises ApiError 404, or 503 while loading."""
        self.check_open()
        return self.models.current(name).model.manifest

    def choose(self, served: Served, request: ClassifyRequest) -> Choice:
        """The exit rule of a request: its own wish, else the server's; raises ApiError 422."""
        return served.rules.of(request, self.level)
