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
from de3.client import Answer, Client, Input, Options, ServerError, batches
from de3.columns import Answers, Kind, prefixes
from de3.library import Classifier, Classifiers
from de3.model_store.encoder import Encoders
from de3.model_store.manifest import encoder_hashes
from de3.model_store.model import Model
from de3.model_store.store import Artifact
from de3.native.network import Memory, can_share_memory
from de3.runtime.child import ignore_working_directory
from de3.runtime.loading import by_depth
from de3.runtime.processes import most_processes
from de3.runtime.settings import RuntimeSettings
from de3.runtime.upstream_settings import UpstreamModel

# Limits on one request, in texts and in characters: 2¹⁸ characters of 4 bytes are 1 MiB, a server's default body limit.
MAX_BATCH, MAX_BATCH_CHARS = 32, 2**18
PROBES: tuple[Input, ...] = ("-", ("-", "-"))  # a text, and a pair


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

    def __init__(
        self,
        artifacts: Sequence[Artifact],
        options: Options,
        threads: int | None = None,
        upstreams: Sequence[UpstreamModel] = (),
    ) -> None:
        """artifacts: the models. threads: engine threads of all processes; None: one per core.

        upstreams: the models with an upstream, whose answers are Placeholders; see UpstreamPool. Raises ValueError if a
        model cannot be used, or if two have the same name.
        """
        prefixes([artifact.manifest.name for artifact in artifacts])
        settings = RuntimeSettings(threads=threads or 0)
        self.size = most_processes(settings, artifacts)
        each = max(1, settings.engine_threads() // self.size)
        self._weights: int | None = None
        if self.size > 1 and can_share_memory():
            self._weights = os.memfd_create("de3-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Opening the models here reports errors at once, and fills the shared memory.
        ordered, encoders = sorted(artifacts, key=by_depth), Encoders()
        key = encoder_hashes(ordered[0].manifest)[-1]

        def memory_of(encoder: str) -> Memory | None:
            return Memory(self._weights, False) if self._weights is not None and encoder == key else None

        models = [Model(artifact, memory_of=memory_of, encoders=encoders) for artifact in ordered]
        have_kernels = [model.runtime == "native" for model in models]
        del models
        shared = (key, os.getpid(), self._weights) if self._weights is not None and have_kernels[0] else None
        opened = partial(_open, artifacts, each, all(have_kernels), shared, options, upstreams)
        ignore_working_directory()
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


# One entry, only in the processes of the pool.
_open_in_this_process: list[tuple[Classifier | Classifiers, Options]] = []


def _open(
    artifacts: Sequence[Artifact],
    threads: int,
    is_proved: bool,
    weights: tuple[str, int, int] | None,
    options: Options,
    upstreams: Sequence[UpstreamModel],
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach all processes; the parent ends them
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    memories = dict[str, Memory]()
    if weights is not None:
        encoder, parent, fd = weights  # a file descriptor of the parent
        memories[encoder] = Memory(os.open(f"/proc/{parent}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC), True)
    settings = threads, is_proved, memories.get, upstreams, False
    one = Classifier(artifacts[0], *settings) if len(artifacts) == 1 else Classifiers(artifacts, *settings)
    _open_in_this_process.append((one, options))
    for memory in memories.values():
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

    def __init__(
        self, client: Client, models: Sequence[str], options: Mapping[str, Any], parallel: int
    ) -> None:
        """models: none for the server's default. options: of each request. parallel: number of requests in flight.

        Raises ValueError if two models have the same name.
        """
        self._client, self._models, self._options, self.size = client, models, options, parallel
        self._prefixes = prefixes([name.partition(":")[0] for name in models]) if len(models) > 1 else [""]
        self._answered: set[tuple[str, ...]] = set()  # names of the models that have answered
        self._threads = ThreadPoolExecutor(parallel)

    def submit(self, texts: Sequence[Input | None]) -> "Future[Answers]":
        """Classify a slice in consecutive requests of at most MAX_BATCH texts."""
        return self._threads.submit(self._answer, texts)

    def _answer(self, texts: Sequence[Input | None]) -> Answers:
        given = [(index, text) for index, text in enumerate(texts) if text is not None]
        rows: dict[int, list[dict[str, Any]] | str] = {}
        with server_errors():
            for batch in batches([chars_of(text) for _, text in given], MAX_BATCH, MAX_BATCH_CHARS):
                self._ask(given[batch], rows)
            first = next((row for row in rows.values() if not isinstance(row, str)), None)
            if first is None:  # no answer shows the kind of the model
                for probe in PROBES:
                    self._ask([(-1, probe)], rows)
                    if not isinstance(probed := rows.pop(-1), str):
                        first = probed
                        break
                else:
                    raise ValueError(f"the server refuses even the text {PROBES[0]!r}: {probed}")
        kinds = {p: _kind_of(row) for p, row in zip(self._prefixes, first, strict=True)}
        answers = Answers.of(kinds, self._options.get("long") == "windows")
        answers.add([rows.get(index, "missing") for index in range(len(texts))])
        return answers

    def _ask(self, texts: list[tuple[int, Input]], rows: dict[int, list[dict[str, Any]] | str]) -> None:
        """Classify texts, given with their indices, in one request or, if the server refuses it, in several.

        Adds to `rows`, by index, a row of each model, or the reason why a text is refused. Raises ServerError if the
        server refuses the options or does not answer, and ValueError if other models answer than before.
        """
        try:
            answers = ask(self._client, [text for _, text in texts], self._models, self._options)
        except ServerError as error:
            # Matches if a text is refused; group 1 is its index in a batch.
            named = re.fullmatch(r"input(?:\[([0-9]+)\])?(?:\..*)?", error.field or "")
            if error.status not in (413, 422) or (named is None and error.status == 422):
                raise
            if len(texts) == 1 or (named is not None and named[1] is not None):
                at = int(named[1]) if len(texts) > 1 and named is not None else 0
                rows[texts.pop(at)[0]] = re.sub(r"^input(\[[0-9]+\])?: ", "", error.message)
                if texts:
                    self._ask(texts, rows)
            else:  # too many, or too large together
                half = len(texts) // 2
                self._ask(texts[:half], rows)
                self._ask(texts[half:], rows)
            return
        self._answered.add(tuple(answer.model for answer in answers))
        if len(self._answered) > 1:
            names = ", ".join(sorted({name for names in self._answered for name in names}))
            raise ValueError(f"several models answered ({names}): choose one with --model name:version")
        for (index, _), *found in zip(texts, *(answer.rows for answer in answers), strict=True):
            rows[index] = [row.raw for row in found]

    def close(self) -> None:
        """Cancel the slices that have not started, and wait for the others."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _kind_of(row: Mapping[str, Any]) -> Kind:
    if "spans" in row:
        return "redacted" if "text" in row else "spans"
    if "value" in row:
        return "value"
    return "labels" if "labels" in row else "classes"


def ask(
    client: Client, texts: Sequence[Input], models: Sequence[str], options: Mapping[str, Any]
) -> list[Answer]:
    """The answer of each model; without `models`, of the server's default. Raises as Client.classify does."""
    if len(models) > 1:
        return client.classify_several(texts, models, **options)
    return [client.classify(texts, model=next(iter(models), None), **options)]


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
