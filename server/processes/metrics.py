"""The metrics of a server of several processes, merged over all of them, including those that have ended."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector

from de3.runtime.background import run_once
from de3.runtime.errors import RequestError
from de3.server.audit.coordinator import Coordinator
from de3.server.metrics import BackgroundErrors, register_results
from de3.server.processes.channel import ChannelClosedError
from de3.server.processes.group import Group, Process
from de3.server.processes.samples import Family, families_from, families_of, growing, merged, text_of
from de3.server.settings import Settings
from de3.server.shared_run import SharedRun

SAMPLES_S = 1.0  # time for a process to send its metrics; after that, its last ones are used
KEEP_S = 0.5  # interval between reads of the counters; a killed process loses its counts since the last read


class SharedMetrics:
    """The metrics of the processes, and the supervisor's own.

    Attributes:
        replaced: counter of processes started to replace others that ended, including failed starts.
    """

    def __init__(self, group: Group, coordinator: Coordinator, settings: Settings) -> None:
        self._group = group
        self._departed: list[Family] = []  # counters of processes that have ended
        self._read_at = 0.0
        self._reading = asyncio.Lock()
        self._scraping = SharedRun[str]("metrics", group.size)
        self._registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        r.register(BackgroundErrors())
        Gauge("de3_processes", "Processes that serve models (--processes)", registry=r).set(group.size)
        self.replaced = Counter(
            "de3_replaced_processes", "Starts of a process that replaces one that ended", registry=r
        )
        register_results(r, coordinator, self._level, settings)

    def _level(self) -> int:
        return int(max((_gauge(p.samples, "de3_load_level") for p in self._group.all), default=0.0))

    async def keep(self) -> None:
        """Read the processes' metrics every KEEP_S, so that little is lost if one is killed; runs until cancelled.

        A read is skipped if a scrape has just read them.
        """
        while True:
            await asyncio.sleep(KEEP_S)
            if monotonic() - self._read_at > KEEP_S / 2:
                await self._read()

    def remove(self, process: Process) -> None:
        """Keep the counters and histograms of a process that has ended."""
        self._departed = merged([self._departed, growing(process.samples)])

    async def scrape(self) -> str:
        """The metrics in Prometheus's text format; raises RequestError if too many requests are waiting for them."""
        return await self._scraping.result(self._scrape)

    async def _scrape(self) -> str:
        await self._read()
        self._read_at = monotonic()
        parts = [process.samples for process in self._group.all]
        return await asyncio.to_thread(self._text, [self._departed, *parts])

    def _text(self, parts: list[list[Family]]) -> str:
        """These metrics and the supervisor's own as text; bounds for many tenants and versions take 0.1 s."""
        return text_of(merged([families_of(self._registry), *parts])).decode()

    async def _read(self) -> None:
        """Read the metrics of all processes that answer in time; later answers are for the next read."""

        async def read(process: Process) -> None:
            with suppress(ChannelClosedError, RequestError):
                process.samples = families_from(await process.channel.call("samples"))

        # One at a time, so that a scrape has all counts of answers that were sent before it.
        async with self._reading:
            waiting = []
            for process in self._group.all:
                if process.is_listening and (process.reading is None or process.reading.done()):
                    process.reading = run_once("reading_metrics", read(process))
                if process.reading is not None and not process.is_late:
                    waiting.append(process.reading)
            if waiting:
                await asyncio.wait(waiting, timeout=SAMPLES_S)


def _gauge(samples: Sequence[Family], name: str) -> float:
    return next((value for f in samples if f.name == name for _, _, value in f.samples), 0.0)
