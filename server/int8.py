"""Measures in the background, on live texts, how many answers of classifiers served by name int8 changes."""

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from de3.model_store.model import Model
from de3.model_store.store import Artifact
from de3.runtime.background import run_once
from de3.runtime.engine.request import Request, Text
from de3.runtime.prove import record, recorded
from de3.server.learn.fitting import FitError, run_idle

log = logging.getLogger("de3")
PROGRAM = "import os; os.nice(19); from de3.export.int8_process import child; child()"
TEXTS, MAX_CHARACTERS = 1024, 2**12  # texts to compare; longer ones are left out, which bounds the memory
MEMORY_BYTES, COPIES = 2**30, 12  # memory limit: the former, and so many times the size of the files
MAX_SHARE = 0.01  # above this share, the log has a warning


class Int8Check:
    """Compares int8 with fp32, once for each classifier: on the first TEXTS distinct texts that a process answers.

    Classifiers that return a number are left out, as nearly every number differs a little.
    """

    def __init__(self, artifacts: Sequence[Artifact], runtime: str, registry: CollectorRegistry) -> None:
        """artifacts: those served, of which the ones from the cache are compared. Reports the recorded results."""
        help_ = "Share of live texts whose full-depth answers int8 changes, for classifiers served by name"
        self._share = Gauge("de3_int8_disagreement_ratio", help_, ["model"], registry=registry)
        self._runtime = runtime
        self._waiting: dict[str, tuple[Artifact, dict[Text, None]]] = {}  # by name: artifact and texts so far
        for one in artifacts:
            is_stock = bool(one.sources) and one.manifest.upstream is None
            if is_stock and one.manifest.precision == "int8" and one.manifest.tolerance is None:
                if (found := recorded(one, runtime).get("int8")) is None:
                    self._waiting[one.manifest.name] = one, {}
                else:
                    self._report(one.full_name, found)

    def add(self, model: Model, request: Request) -> None:
        """Keep the texts of an answered request, unless they are private; once there are enough, a process compares."""
        name = model.manifest.name
        if name in self._waiting and not request.is_private:
            artifact, texts = self._waiting[name]
            texts.update((one, None) for one in request.texts if one.chars <= MAX_CHARACTERS)
            if len(texts) >= TEXTS:
                del self._waiting[name]  # until the comparison has ended
                run_once("int8", self._compare(artifact, list(texts)[:TEXTS]))

    async def _compare(self, artifact: Artifact, texts: Sequence[Text]) -> None:
        """Compare the answers in a process, and record the result in the cache. An error is logged, and ends it."""
        name, source = artifact.full_name, Path(next(iter(artifact.sources))).parent
        try:
            proved = await asyncio.to_thread(recorded, artifact, self._runtime)
            if "int8" not in proved:
                memory = MEMORY_BYTES + COPIES * artifact.size()
                arguments = [str(artifact.path.absolute()), str(source), self._runtime, memory]
                pairs = json.dumps([(one.text, one.text_pair) for one in texts]).encode()
                proved["int8"] = json.loads(await run_idle(PROGRAM, json.dumps(arguments), pairs))
                if not proved["int8"]:
                    # Another process compares; its result is read once more texts have come.
                    self._waiting[artifact.manifest.name] = artifact, {}
                    return
                await asyncio.to_thread(record, artifact, self._runtime, proved)
            self._report(name, proved["int8"])
        except (FitError, OSError) as error:
            log.warning("%s: cannot measure how many answers int8 changes: %s", name, error)

    def _report(self, name: str, found: dict[str, Any]) -> None:
        """Log and export a result."""
        self._share.labels(name).set(found["share"])
        log.log(
            logging.WARNING if found["share"] > MAX_SHARE else logging.INFO,
            "%s: int8 changes %.1f%% (%.1f to %.1f%%) of the answers to %d live texts; with --quantize none, de3 serve "
            "and de3 import change none, and take about three times as long",
            *(name, *(100 * found[key] for key in ("share", "lower", "upper")), found["texts"]),
        )
