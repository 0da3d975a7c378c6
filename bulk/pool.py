"""Pools, which classify slices of texts: in processes on this machine, or with a running server."""

import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, Protocol

from de3.bulk.source import chars_of
from de3.client import Client, Input, Options, ServerError, batches
from de3.columns import Answers
from de3.library import Classifier
from de3.model_store.model import Model
from de3.model_store.store import Artifact
from de3.native.network import Memory, can_share_memory
from de3.server.processes.number import most_processes
from de3.server.settings import Settings

# Limits on one request, in texts and in characters: 2¹⁸ characters of 4 bytes are 1 MiB, a server's default body limit.
MAX_BATCH, MAX_BATCH_CHARS = 32, 2**18
PROBE = "-"


class Pool(Protocol):
    """Classifies slices of texts, several at a time.

    Attributes:
        size: number of slices that are classified at a time.
    """

    size: int

    def submit(self, texts: Sequence[Input | None]) -> "Future[Answers]":
        """Classify a slice; None: a row without a text. The answers have all columns, even if there are no texts."""

    def close(self) -> None:
        """Cancel the slices that have not started, and wait for the others."""


class LocalPool:
    """Processes, each with an engine; where possible they share one copy of the weights."""

    def __init__(self, artifact: Artifact, options: Options, threads: int | None = None) -> None:
        """threads: engine threads of all processes together; None: one per core.

        Raises ValueError if the model cannot be used.
        """
        settings = Settings.model_validate({"threads": threads or 0})
        self.size = most_processes(settings, [artifact])
        each = max(1, settings.engine_threads() // self.size)
        self._weights: int | None = None
        if self.size > 1 and can_share_memory():
            self._weights = os.memfd_create("de3-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Opening the model here reports errors at once, and fills the shared memory.
        model = Model(
            artifact, memory_of=lambda _: None if self._weights is None else Memory(self._weights, False)
        )
        has_kernels = model.runtime == "native"
        del model
        shared = self._weights if has_kernels else None
        opened = partial(_open, artifact, each, has_kernels, os.getpid(), shared, options)
        context = get_context("forkserver" if self.size > 1 else "spawn")
        if self.size > 1:
            context.set_forkserver_preload([__name__])
        self._processes = ProcessPoolExecutor(self.size, context, initializer=opened)

    def submit(self, texts: Sequence[Input | None]) -> "Future[Answers]":
        """Classify a slice in one of the processes."""
        return self._processes.submit(_answer, texts)

    def close(self) -> None:
        """Cancel the slices that have not started, and end the processes once the others are finished."""
        self._processes.shutdown(wait=True, cancel_futures=True)
        if self._weights is not None:
            os.close(self._weights)


_open_in_this_process: list[tuple[Classifier, Options]] = []  # one entry, only in the processes of the pool


def _open(
    artifact: Artifact, threads: int, is_proved: bool, parent: int, weights: int | None, options: Options
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the parent ends them
    Thread(target=_end_with_parent, daemon=True).start()
    memory = None
    if weights is not None:  # a file descriptor of the parent
        memory = Memory(os.open(f"/proc/{parent}/fd/{weights}", os.O_RDONLY | os.O_CLOEXEC), True)
    _open_in_this_process.append((Classifier(artifact, threads, is_proved, lambda _: memory), options))
    if memory is not None:
        os.close(memory.fd)  # the kernels have mapped it


def _end_with_parent() -> None:
    """End this process if its parent is killed; otherwise it would wait for work forever."""
    if (parent := parent_process()) is not None:
        try:
            parent.join()
        finally:
            os._exit(1)


def _answer(texts: Sequence[Input | None]) -> Answers:
    ((classifier, options),) = _open_in_this_process
    return classifier.answers_by_column(texts, **options)


class RemotePool:
    """Requests to a running server."""

    def __init__(self, client: Client, options: Mapping[str, Any], parallel: int) -> None:
        """options: options of each request. parallel: number of requests in flight."""
        self._client, self._options, self.size = client, options, parallel
        self._models: set[str] = set()  # names of the models that have answered
        self._threads = ThreadPoolExecutor(parallel)

    def submit(self, texts: Sequence[Input | None]) -> "Future[Answers]":
        """Classify a slice in consecutive requests of at most MAX_BATCH texts."""
        return self._threads.submit(self._answer, texts)

    def _answer(self, texts: Sequence[Input | None]) -> Answers:
        given = [(index, text) for index, text in enumerate(texts) if text is not None]
        rows: dict[int, dict[str, Any]] = {}
        with server_errors():
            for batch in batches([chars_of(text) for _, text in given], MAX_BATCH, MAX_BATCH_CHARS):
                self._ask(given[batch], rows)
            first = next((row for row in rows.values() if "error" not in row), None)
            if first is None:  # no answer shows the kind of the model
                self._ask([(-1, PROBE)], rows)
                first = rows.pop(-1)
                if "error" in first:
                    raise ValueError(f"the server refuses even the text {PROBE!r}: {first['error']}")
        answers = Answers.of("value" in first, "labels" in first, self._options.get("long") == "windows")
        answers.add([rows.get(index, {"error": "missing"}) for index in range(len(texts))])
        return answers

    def _ask(self, texts: list[tuple[int, Input]], rows: dict[int, dict[str, Any]]) -> None:
        """Classify texts, given with their indices, in one request or, if the server refuses it, in several.

        Adds the answers to `rows`, by index, or {"error": reason} for a refused text. Raises ServerError if the server
        refuses the options or does not answer, and ValueError if several models answer.
        """
        try:
            answer = self._client.classify([text for _, text in texts], **self._options)
        except ServerError as error:
            # Matches if a text is refused; group 1 is its index in a batch.
            named = re.fullmatch(r"input(?:\[([0-9]+)\])?(?:\..*)?", error.field or "")
            if error.status not in (413, 422) or (named is None and error.status == 422):
                raise
            if len(texts) == 1 or (named is not None and named[1] is not None):
                at = int(named[1]) if len(texts) > 1 and named is not None else 0
                rows[texts.pop(at)[0]] = {"error": re.sub(r"^input(\[[0-9]+\])?: ", "", error.message)}
                if texts:
                    self._ask(texts, rows)
            else:  # too many, or too large together
                half = len(texts) // 2
                self._ask(texts[:half], rows)
                self._ask(texts[half:], rows)
            return
        self._models.add(answer.model)
        if len(self._models) > 1:
            names = ", ".join(sorted(self._models))
            raise ValueError(f"several models answered ({names}): choose one with --model name:version")
        rows.update((index, row.raw) for (index, _), row in zip(texts, answer.rows, strict=True))

    def close(self) -> None:
        """Cancel the slices that have not started, and wait for the others."""
        self._threads.shutdown(wait=True, cancel_futures=True)


@contextmanager
def server_errors() -> Iterator[None]:
    """Turn a ServerError, from an error response or a server that does not answer, into a ValueError."""
    try:
        yield
    except ServerError as error:
        if error.status:
            raise ValueError(f"the server answered {error.status}: {error.message}") from None
        raise ValueError(
            f"{error.message}: start it with de3 serve, or give its address with --url"
        ) from None
