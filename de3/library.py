"""Classifies texts in process, without a server: `de3.load`.

    import de3

    with de3.load("sst2") as model:
        for row in model.classify(["a fine film", "a dull one"], max_disagreement=0.02):
            print(row.label, row.exit.layer)

It runs the server's engine: options are named as in requests (but `lam` for `lambda`), and answers equal the server's,
bit for bit; the columns of a table are not rounded.
"""

import os
import re
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from threading import Event, Lock
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from de3.client import Input, Options, Row, with_lambda
from de3.columns import Answers, kind_of, prefixes
from de3.model_store.architecture import precision_of
from de3.model_store.encoder import Encoders
from de3.model_store.manifest import Manifest, fingerprint
from de3.model_store.store import Artifact, Store, StoreError, read_manifest
from de3.native.network import Memory
from de3.runtime.answer import ClassifiedText, row_of
from de3.runtime.classification import Classification, ClassifyRequest, request_of, text_of
from de3.runtime.engine.engine import Engine
from de3.runtime.engine.job import Job, job_of
from de3.runtime.engine.plan import check_texts
from de3.runtime.engine.request import Text
from de3.runtime.engine.served import Served
from de3.runtime.errors import RequestError
from de3.runtime.fields import check_fields
from de3.runtime.loading import by_depth
from de3.runtime.loading import load as load_model
from de3.runtime.settings import RuntimeSettings
from de3.runtime.upstream_settings import UpstreamModel, read_upstreams

if TYPE_CHECKING:
    import pyarrow

    from de3.runtime.upstream.calls import Calls, Placeholders

WINDOW = 2048  # texts per engine job; while one job runs, the next is queued
CHECK_S = 1.0  # interval between checks of the engine's threads
DEMO = Path(__file__).parent / "demo"  # the store of the demo model, sst2; in a checkout a link to models/
_SURROGATE = re.compile("[\ud800-\udfff]")


class InputError(ValueError):
    """A text or an option that cannot be used, or a text to which an upstream has no answer.

    Attributes:
        field: `input[3]` for the fourth text, or the name of the option, where `lam` is `lambda`; None if the error is
            about neither.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@overload
def load(  # type: ignore[overload-overlap]  # a str is also a sequence of str
    name: str | Path,
    *,
    store: str | Path | None = None,
    threads: int | None = None,
    quantize: Literal["int8", "none"] = "int8",
) -> "Classifier": ...
@overload
def load(
    name: Sequence[str | Path | Mapping[str, Any]],
    *,
    store: str | Path | None = None,
    threads: int | None = None,
    quantize: Literal["int8", "none"] = "int8",
) -> "Classifiers": ...


def load(
    name: str | Path | Sequence[str | Path | Mapping[str, Any]],
    *,
    store: str | Path | None = None,
    threads: int | None = None,
    quantize: Literal["int8", "none"] = "int8",
) -> "Classifier | Classifiers":
    """Load a classifier, or several.

    Args:
        name: a model in the store (name or name:version); the folder of an artifact or of a Hugging Face classifier;
            the id of one on the hub; or the .toml file of a model with an upstream. A Hugging Face classifier is
            converted once, and runs at full depth. A list of such names loads several, of which those with the same
            encoder classify on one pass; instead of a name, it may have a dict with `model`, the name, and exit
            options, which replace those of the calls.
        store: the model store. Default: $DE3_STORE, else `models`; de3.DEMO has the demo model, sst2.
        threads: engine threads. Default: one per core.
        quantize: precision of Hugging Face classifiers: int8, or none for fp32.

    Raises ValueError if there is no such classifier, or it cannot be used.
    """
    folder = Path(store if store is not None else os.environ.get("DE3_STORE", "models")).absolute()
    if isinstance(name, str | Path):
        upstreams = read_upstreams([str(name)])
        return Classifier(artifact_of(str(name), folder, quantize), threads, upstreams=upstreams)
    entries = [with_lambda(one) if isinstance(one, Mapping) else {"model": str(one)} for one in name]
    _request_of({"models": entries})  # before a classifier is converted
    upstreams = read_upstreams(entry["model"] for entry in entries)
    artifacts = [artifact_of(entry.pop("model"), folder, quantize) for entry in entries]
    return Classifiers(artifacts, threads, upstreams=upstreams, options=entries)


def artifact_of(name: str, store: Path, quantize: str = "int8", state_dir: Path | None = None) -> Artifact:
    """The artifact with a name, as `load` looks it up; raises ValueError if it cannot be found or used.

    state_dir: the server's state folder, which may pin models.
    """
    precision = precision_of(quantize, "quantize:")
    if upstreams := read_upstreams([name]):
        from de3.export import cache, upstream

        return upstream.artifact_of(upstreams[0], Path(name), Store(store), precision, cache.cache_folder())
    if (stored := Store(store, state_dir).find(name)) is not None:
        return stored
    from de3.export import cache

    try:
        return cache.artifact_of(name, precision, cache.cache_folder())
    except ValueError as error:
        if Path(name).exists():
            raise
        raise ValueError(
            f"{error}; the store {store} has no model {name!r} either: set store= (--store) or DE3_STORE"
        ) from None


class _Loaded:
    """Loaded models, and their own threads."""

    def __init__(
        self,
        artifacts: Sequence[Artifact],
        prefixes: Sequence[str],
        fields: Mapping[str, Any],
        threads: int | None,
        is_proved: bool,
        memory_of: Callable[[str], Memory | None],
        upstreams: Sequence[UpstreamModel],
        asks: bool,
    ) -> None:
        """prefixes: of each model's columns. fields: fields of every request. The others: see Classifier.

        Raises ValueError if an artifact or a field cannot be used, or if the encoders differ.
        """
        settings = RuntimeSettings(threads=threads or 0, upstreams=list(upstreams))
        self._prefixes, self._fields = prefixes, fields
        encoders, loaded = Encoders(), dict[Path, Served]()
        for one in sorted(artifacts, key=by_depth):
            loaded[one.path] = served = load_model(
                one, settings, is_proved=is_proved, memory_of=memory_of, encoders=encoders
            )
            served.monitor.drift = None  # nothing reads it
        self._all = [loaded[one.path] for one in artifacts]
        with _input_errors():
            request = _request_of(fields)
            job_of(self._all, request, 0, lambda _: None)
        self._calls: Calls | Placeholders | None = None
        if upstreams:
            from de3.runtime.upstream import calls

            self._calls = calls.Calls(settings) if asks else calls.Placeholders(settings)
            weakref.finalize(self, self._calls.close)
        self._engine = Engine(settings.engine_threads(), sys.maxsize)
        self._engine.start()
        self._pid = os.getpid()
        self._checking, self._checked = Lock(), monotonic()
        # The threads do not refer to the classifier, so it can be garbage-collected while they run. One of them may be
        # the thread that collects it, so the finalizer only closes the queue: it must not wait for the threads.
        self._end = weakref.finalize(self, self._engine.queue.close)

    @property
    def _manifests(self) -> list[Manifest]:
        return [served.model.manifest for served in self._all]

    @overload
    def answers(
        self,
        texts: Input | Iterable[Input | None],
        *,
        as_arrow: Literal[False] = False,
        **options: Unpack[Options],
    ) -> list[dict[str, Any]]: ...
    @overload
    def answers(
        self, texts: Input | Iterable[Input | None], *, as_arrow: Literal[True], **options: Unpack[Options]
    ) -> "pyarrow.Table": ...

    def answers(
        self, texts: Input | Iterable[Input | None], *, as_arrow: bool = False, **options: Unpack[Options]
    ) -> "list[dict[str, Any]] | pyarrow.Table":
        """The answers to texts, or to pairs of texts: a row for each text, in order, with the columns in docs/bulk.md.

        A text that cannot be classified, such as None or NaN, has the reason in `error`, and None in all other columns.
        The columns of several models begin with the model's name and `_`. as_arrow: a pyarrow table instead of rows.

        Raises InputError for an option that cannot be used, and ValueError and RuntimeError as classify() does.
        """
        found = self.answers_by_column(texts, **options)
        return found.table(self._manifests) if as_arrow else found.rows()

    def answers_by_column(self, texts: Input | Iterable[Input | None], **options: Unpack[Options]) -> Answers:
        """Like answers(), but by column, and with the time in each model."""
        request = replace(self._request(options), keeps_errors=True)
        given = list[Text | str]()
        for one in _iterable(texts):
            try:
                text = checked_text(one, "")
                for served in self._all:
                    check_texts(replace(request, texts=[text]), served)
            except (InputError, RequestError) as error:
                given.append(str(error).removeprefix("input").lstrip(".: "))
            else:
                given.append(text)
        return self._columns(request, given)

    def close(self) -> None:
        """End the threads; running calls end with RuntimeError, unless the engine has all their texts."""
        if self._end.alive:
            self._end()
            self._engine.stop()
            if self._calls is not None:
                self._calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, texts: Input | Iterable[Input], options: Mapping[str, Any]) -> list[list[Row]]:
        """Each model's answers to texts, in order."""
        request, given = self._request(options), _texts(list(_iterable(texts)))
        batch, found = _Batch(given), [list[ClassifiedText]() for _ in self._all]
        for job in self._run(request, batch.parts(_size(request, given))):
            for rows, more in zip(found, _rows(job), strict=True):
                rows.extend(more)
        return [
            [Row.parse({**rows[i], "index": index}) for index, i in enumerate(batch.order)] for rows in found
        ]

    def _columns(self, request: Classification, given: Sequence[Text | str], size: int = WINDOW) -> Answers:
        """The answers to texts, in order; a str is the reason why there is no text. size: texts per job."""
        texts = [one for one in given if isinstance(one, Text)]
        batch = _Batch(texts)
        both = zip(self._prefixes, self._manifests, strict=True)
        kinds = {prefix: kind_of(one, request.is_private) for prefix, one in both}
        found = Answers.of(kinds, request.long == "windows", request.ood, request.keeps_errors)
        for job in self._run(request, batch.parts(size)):
            found.add_job(job)
        answered, refused = iter(batch.order), count(len(set(texts)))
        found.add([one for one in given if isinstance(one, str)])
        found.reorder([next(answered if isinstance(one, Text) else refused) for one in given])
        return found

    def _request(self, options: Mapping[str, Any]) -> Classification:
        """The request with these options, without texts.

        Raises InputError, or RuntimeError if the classifier is closed or was loaded before a fork.
        """
        if os.getpid() != self._pid:
            raise RuntimeError(
                "the classifier was loaded before this process was forked: its threads did not survive the fork; "
                "load it in this process, for example when it is first needed"
            )
        if not self._end.alive:
            raise RuntimeError("the classifier is closed")
        for name in options:
            if name not in Options.__annotations__:
                known = ", ".join(Options.__annotations__)
                raise InputError(f"{name}: unknown option; known options: {known}", name)
        return _request_of({**self._fields, **with_lambda(options)})

    def _run(self, request: Classification, parts: Iterable[tuple[list[Text], list[int]]]) -> Iterator[Job]:
        """Yield the finished job of each part, in order, while the engine runs the next one.

        parts: texts and their indices in the call. Raises InputError for a text or an option that cannot be used.
        """
        running, source = deque[tuple[Job, _Done]](), iter(parts)
        failure: InputError | None = None
        try:
            with _input_errors():
                while failure is None:
                    try:
                        texts, indices = next(source)
                    except StopIteration:
                        break
                    except InputError as error:  # raised after the answers to the earlier texts
                        failure = error
                        break
                    done = _Done()
                    part = replace(request, texts=texts, indices=indices)
                    job = job_of(self._all, part, 0, done)
                    self._engine.submit(job)
                    running.append((job, done))
                    if len(running) > 1:
                        yield self._wait(running)
                while running:
                    yield self._wait(running)
            if failure is not None:
                raise failure
        finally:
            for job, _ in running:
                self._engine.drop(job)

    def _wait(self, running: "deque[tuple[Job, _Done]]") -> Job:
        """Wait for the first running job, and remove it from `running`; raises the error of a failed job."""
        job, done = running[0]
        while not done.event.wait(CHECK_S):
            self._check()
        if done.error is not None:
            raise done.error
        if self._calls is not None:
            self._calls.complete(job)  # meanwhile, the engine runs the next job
        running.popleft()
        return job

    def _check(self) -> None:
        """Raise RuntimeError if an engine thread has failed (see Engine.problem); checks at most once per CHECK_S."""
        with self._checking:
            if monotonic() - self._checked < CHECK_S:
                return
            self._checked = monotonic()
            if problem := self._engine.problem():
                raise RuntimeError(problem)


class Classifier(_Loaded):
    """A loaded classifier with its own threads; any number of threads may call it.

    Call close(), or leave that to the garbage collector. Pickling stores the artifact's path and fingerprint, not
    the model; each process loads the model once, however often it unpickles the classifier. After os.fork, the child
    must load its own classifier.
    """

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        is_proved: bool = False,
        memory_of: Callable[[str], Memory | None] = lambda _: None,
        upstreams: Sequence[UpstreamModel] = (),
        asks: bool = True,
    ) -> None:
        """threads: engine threads; None: one per core. is_proved, memory_of: see model_store.model.Model.

        upstreams: the models with an upstream. asks: call them; if false, their answers are Placeholders. Raises
        ValueError if the artifact cannot be used, or if the key of an upstream is missing.
        """
        super().__init__([artifact], [""], {}, threads, is_proved, memory_of, upstreams, asks)
        self._artifact, self._threads, self._upstreams = artifact, threads, upstreams
        self._served = self._all[0]

    @property
    def manifest(self) -> Manifest:
        """The model's labels, layers and calibration."""
        return self._served.model.manifest

    @property
    def name(self) -> str:
        """The model's name and version, as name:version."""
        return self._served.model.full_name

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the probabilities; for a regression model, the name of its output."""
        return self.manifest.labels

    def __repr__(self) -> str:
        labels, layers, precision = len(self.labels), self.manifest.num_layers, self.manifest.precision
        return f"<de3.Classifier {self.name}: labels={labels}, layers={layers}, precision={precision}>"

    def certificate(self, **options: Unpack[Options]) -> Mapping[str, Any] | None:
        """The certified bound on the rate of disagreement with these options, as in a response (docs/api.md).

        None without `max_disagreement`. The bound covers texts of a single window. Raises InputError for an invalid
        option, and RuntimeError if the classifier is closed or was loaded before a fork.
        """
        with _input_errors():
            return self._served.rules.choose(self._request(options).options, 0, "").certificate

    @overload
    def classify(
        self, texts: Input | Iterable[Input], *, as_arrow: Literal[False] = False, **options: Unpack[Options]
    ) -> list[Row]: ...
    @overload
    def classify(
        self, texts: Input | Iterable[Input], *, as_arrow: Literal[True], **options: Unpack[Options]
    ) -> "pyarrow.Table": ...

    def classify(
        self, texts: Input | Iterable[Input], *, as_arrow: bool = False, **options: Unpack[Options]
    ) -> "list[Row] | pyarrow.Table":
        """The answers to texts, or to pairs of texts, in order. Identical texts are classified only once.

        as_arrow: a pyarrow table (the bulk extra) instead of rows; docs/bulk.md has its columns.

        Raises InputError for a text or an option that cannot be used, ValueError for as_arrow without pyarrow, and
        RuntimeError if the classifier is closed or was loaded before a fork, or if its engine fails.
        """
        if as_arrow:
            request, given = self._request(options), _texts(list(_iterable(texts)))
            return self._columns(request, given, _size(request, given)).table(self._manifests)
        (rows,) = self._rows(texts, options)
        return rows

    @overload
    def stream(
        self,
        texts: Input | Iterable[Input],
        *,
        window: int = WINDOW,
        keep_errors: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Iterator[Row]: ...
    @overload
    def stream(
        self,
        texts: Input | Iterable[Input | None],
        *,
        window: int = WINDOW,
        keep_errors: Literal[True],
        **options: Unpack[Options],
    ) -> Iterator[dict[str, Any]]: ...

    def stream(
        self,
        texts: Input | Iterable[Input | None],
        *,
        window: int = WINDOW,
        keep_errors: bool = False,
        **options: Unpack[Options],
    ) -> Iterator[Row] | Iterator[dict[str, Any]]:
        """Yield the answers to texts, or to pairs of texts, in order, from an iterable of any length.

        window: texts to read at a time; two windows are read before the first answer.
        keep_errors: yield the rows of answers() instead, one window at a time, even for texts that cannot be used.

        Raises InputError for an option or a window that cannot be used; the iterator raises it for a text that cannot
        be used, after the answers to earlier windows. Both raise RuntimeError as classify() does.
        """
        request, batches = self._request(options), deque[_Batch]()
        if window < 1:
            raise InputError(f"window: must be at least 1, got {window}", "window")
        source = iter(_iterable(texts))
        windows = iter(lambda: list(islice(source, window)), [])
        if keep_errors:
            return (row for given in windows for row in self.answers(given, **options))

        def parts() -> Iterator[tuple[list[Text], list[int]]]:
            first = 0
            for given in windows:
                batches.append(_Batch(_texts(given, first), first))
                yield from batches[-1].parts(window)
                first += len(given)

        def rows() -> Iterator[Row]:
            for job in self._run(request, parts()):
                batch, (found,) = batches.popleft(), _rows(job)
                for index, i in enumerate(batch.order, batch.first):
                    yield Row.parse({**found[i], "index": index})

        return rows()

    def __reduce__(self) -> tuple[Any, ...]:
        artifact = self._artifact
        mark = fingerprint(artifact.manifest)
        return _loaded_once, (artifact.path.absolute(), mark, self._threads, self._upstreams)


class Classifiers(_Loaded):
    """Loaded classifiers: each text runs once through each of their encoders.

    Each answers as it would alone. Any number of threads may call it. Call close(), or leave that to the garbage
    collector. After os.fork, the child must load its own.
    """

    def __init__(
        self,
        artifacts: Sequence[Artifact],
        threads: int | None = None,
        is_proved: bool = False,
        memory_of: Callable[[str], Memory | None] = lambda _: None,
        upstreams: Sequence[UpstreamModel] = (),
        asks: bool = True,
        options: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """options: exit options of each artifact, with the names in JSON; default: none. The others: see Classifier.

        Raises ValueError if an artifact or an option cannot be used, if the encoders differ, or if two artifacts have
        the same name.
        """
        both = zip(artifacts, options or [{}] * len(artifacts), strict=True)
        models = [{**one, "model": artifact.full_name} for artifact, one in both]
        names = prefixes([artifact.manifest.name for artifact in artifacts])
        super().__init__(artifacts, names, {"models": models}, threads, is_proved, memory_of, upstreams, asks)

    @property
    def names(self) -> list[str]:
        """The models' names and versions, as name:version, in the order in which they answer."""
        return [served.model.full_name for served in self._all]

    def __repr__(self) -> str:
        return f"<de3.Classifiers {', '.join(self.names)}>"

    def classify(self, texts: Input | Iterable[Input], **options: Unpack[Options]) -> list[list[Row]]:
        """The answers of each model to texts, or to pairs of texts; the models are in the order of `names`.

        options: those of the models that were loaded without options of their own. Raises as Classifier.classify does.
        """
        return self._rows(texts, options)


class _Done:
    """Callback of the engine that records the end of a job; only the first call counts."""

    def __init__(self) -> None:
        self.event = Event()
        self.error: Exception | None = None

    def __call__(self, error: Exception | None) -> None:
        if not self.event.is_set():
            self.error = error
            self.event.set()


class _Batch:
    """Distinct texts of a call, the shortest first, so that the texts of a group have nearly the same length.

    Attributes:
        first: index in the call of the batch's first text.
        order: for each given text, in order, the index of its answer.
    """

    def __init__(self, texts: Sequence[Text], first: int = 0) -> None:
        at: dict[Text, int] = {}
        for index, text in enumerate(texts):
            at.setdefault(text, index)
        self.first, self._indices = first, sorted(at.values(), key=lambda index: texts[index].chars)
        self._texts = [texts[index] for index in self._indices]
        place = {text: i for i, text in enumerate(self._texts)}
        self.order = [place[text] for text in texts]

    def parts(self, size: int) -> Iterator[tuple[list[Text], list[int]]]:
        """Yield up to `size` texts at a time, with their indices in the call."""
        for start in range(0, len(self._texts), size):
            indices = [self.first + index for index in self._indices[start : start + size]]
            yield self._texts[start : start + size], indices


def _request_of(fields: Mapping[str, Any]) -> Classification:
    """The request with these fields, without texts; raises InputError."""
    with _input_errors():
        request = request_of(check_fields(ClassifyRequest, {"input": "-", **fields}, ""))
    return replace(request, texts=())


def _size(request: Classification, texts: Sequence[Text]) -> int:
    """Texts per job: a budget is for the whole call, so the engine must have all its texts."""
    return max(1, len(texts)) if request.options.latency_budget_ms is not None else WINDOW


def _iterable(texts: Input | Iterable[Input | None]) -> Iterable[Input | None]:
    """The texts of a list or column, or a single text or pair; raises InputError for a table."""
    if isinstance(texts, str | tuple | dict):
        return [texts]
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):
        raise InputError(
            f"input: must be texts; got a {type(texts).__name__}: give one of its columns", "input"
        )
    return texts.to_pylist() if hasattr(texts, "to_pylist") else texts  # a pyarrow column


def _texts(given: Sequence[Input | None], first: int = 0) -> list[Text]:
    """The texts, checked; raises InputError for one that cannot be used. first: index in the call of the first text."""
    return [checked_text(one, f"input[{index}]") for index, one in enumerate(given, first)]


def checked_text(one: Input | None, where: str) -> Text:
    """The text, checked; raises InputError, whose message begins with `where`, if it cannot be used."""
    value = {"text": one[0], "text_pair": one[1]} if isinstance(one, tuple) and len(one) == 2 else one
    if _is_missing(value):
        raise InputError(f"{where}: must not be empty", where)
    if not isinstance(value, str | dict | list | int | float):
        raise InputError(f"{where}: must be a text or a pair; got {type(value).__name__}", where)
    try:
        text = text_of(value, where)
    except ValueError as error:
        raise InputError(str(error), where) from None
    for part in (text.text, text.text_pair or ""):
        if not part.isascii() and (half := _SURROGATE.search(part)):
            message = f"{where}: has {half[0]!a}, half of a surrogate pair, which is not a character"
            raise InputError(message, where)
    return text


def _is_missing(value: object) -> bool:
    """True for None and NaN, including those of NumPy and pandas."""
    return not isinstance(value, str | dict | list) and str(value) in ("None", "nan", "<NA>", "NaT")


def _rows(job: Job) -> list[list[ClassifiedText]]:
    """Each model's answers to the texts of a finished job, which is released."""
    rows = [[row_of(*one) for one in job.rows(part)] for part in job.parts]
    job.release()
    return rows


@contextmanager
def _input_errors() -> Iterator[None]:
    """Turn a RequestError into an InputError, or into a RuntimeError if the classifier is closed."""
    try:
        yield
    except RequestError as error:
        if error.cause == "queue_full":  # the queue has no limit, so it is closed
            raise RuntimeError("the classifier is closed") from None
        raise InputError(error.message, error.field) from None


_loaded: dict[tuple[int, Path, str, int | None], Classifier] = {}
_loading = Lock()


def _loaded_once(
    path: Path, expected: str, threads: int | None, upstreams: Sequence[UpstreamModel] = ()
) -> Classifier:
    """The classifier that this process has already unpickled with these arguments, or a new one.

    It stays loaded until it is closed or the process ends. Raises StoreError if the artifact's fingerprint is not
    `expected`, which was pickled with the path.
    """
    key = os.getpid(), path, expected, threads  # a forked process has its own
    with _loading:
        if key not in _loaded or not _loaded[key]._end.alive:
            artifact = Artifact(path, read_manifest(path))
            if fingerprint(artifact.manifest) != expected:
                raise StoreError(f"{path}: is not the artifact whose classifier was pickled")
            _loaded[key] = Classifier(artifact, threads, upstreams=upstreams)
        return _loaded[key]
