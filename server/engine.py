"""The engine: threads that take one text at a time straight through its layers until it exits.

On a CPU, batching short texts buys nothing: one unpadded sample at a time for each core has both the highest
throughput and the lowest latency (docs/design.md). ONNX Runtime releases the GIL while a layer runs, so the
threads share the sessions and scale with the cores. Between two layers a text gives way to one that is more
urgent, so a long text does not hold up short ones.
"""

import logging
from collections.abc import Callable, Sequence
from threading import Thread
from time import perf_counter

from exits.rule import read
from model_store.model import Model
from model_store.segments import Passage, Tokens
from server.deadlines import Deadlines
from server.errors import ApiError
from server.queue import QueueFullError, WorkQueue
from server.work import Item, Job, Outcome, wake

log = logging.getLogger("de3.engine")


class DeadlineError(Exception):
    """A deadline that cannot be kept; its argument: the seconds that it would take."""


class Engine:
    """A queue and the threads that empty it.

    `observe` is called with every item that left, by the thread that ran it.
    """

    def __init__(
        self, threads: int, max_queue: int, observe: Callable[[Model, Outcome], None] | None = None
    ) -> None:
        self.threads = threads
        self.queue = WorkQueue(max_queue)
        self._observe = observe
        self._threads = [
            Thread(target=self._work, args=(i,), name=f"engine-{i}", daemon=True) for i in range(threads)
        ]
        self.deadlines = Deadlines(threads)
        self._finished = [0] * threads

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        """Whether every thread runs."""
        return all(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Finish what was accepted, then end the threads."""
        self.queue.close()
        for thread in self._threads:
            if thread.is_alive():  # not so if the models never loaded
                thread.join()

    def submit(self, job: Job) -> None:
        """Accept a job; raises QueueFullError, or DeadlineError for a deadline that cannot be promised."""
        if job.deadline is not None:
            needed = self.deadlines.promise(job)
            if needed:
                raise DeadlineError(needed)
            job.hasten()
        try:
            self.queue.put(job)
        except QueueFullError:
            self.deadlines.drop(job)
            raise

    def drop(self, job: Job) -> None:
        """Give a job up; an item that runs stops at its next layer."""
        self.queue.drop(job)
        self.deadlines.drop(job)

    @property
    def finished(self) -> int:
        """Texts that left, so far, but for shadows'."""
        return sum(self._finished)

    def _work(self, number: int) -> None:
        while self._step(number):  # which forgets what it ran: a thread that waits keeps no model alive
            pass

    def _step(self, number: int) -> bool:
        """Run what is next; False once there is nothing more to come."""
        items = self.queue.next(self.threads)
        done: list[tuple[Job, Exception | None]] = []
        for item, result in self._run(items, number) if items else ():
            if isinstance(result, Exception):
                item.job.fail(result)
            elif result is not None:
                self._finished[number] += not item.job.is_shadow
                if item.job.finish(item, result):
                    done.append((item.job, None))
                if self._observe:
                    self._observe(item.job.model, result)
        if done:
            wake(done)
        self.deadlines.held(number, 0.0)
        return bool(items)

    def _run(self, items: list[Item], number: int) -> Sequence[tuple[Item, Outcome | Exception | None]]:
        """What came of items: an outcome, an error, or None if dropped or put back."""
        first = items[0]
        if first.layer == 0 and 0 < first.predicted <= first.job.together_s:
            self.deadlines.held(number, perf_counter() + sum(item.predicted for item in items))
            try:
                return run_together(items)
            except BaseException:  # one of them; which one shows when each runs alone
                log.exception("texts that ran together failed")
        return [(item, self._alone(item, number)) for item in items]

    def _alone(self, item: Item, number: int) -> Outcome | Exception | None:
        def held(seconds: float) -> None:
            self.deadlines.held(number, perf_counter() + seconds)

        try:
            if item.job.deadline is None:
                return run(item, self.queue, held)
            if item.ends is None:
                item.ends = self.deadlines.begin(item, number)
            return run(item, self.queue)
        except ApiError as error:
            return error
        except BaseException:  # a panic in a library's Rust is no Exception; the thread must live on
            log.exception("an item failed")
            return RuntimeError("an item failed")


def run_together(items: list[Item]) -> list[tuple[Item, Outcome | Exception | None]]:
    """Take short texts of one model through the kernels in one call; each is computed by itself."""
    started = perf_counter()
    model = items[0].job.model
    encodings = model.encode([(item.text.text, item.text.text_pair) for item in items])
    results: list[tuple[Item, Outcome | Exception | None]] = []
    ways: list[tuple[Item, Passage]] = []
    for item, encoding in zip(items, encodings, strict=True):
        job, rule = item.job, item.job.rule
        if job.dropped:
            continue
        try:
            tokens = model.tokens(encoding, item.text.text, item.text.text_pair, job.truncate)
        except ValueError as error:
            results.append((item, _too_long(item, error)))
            continue
        item.tokens = tokens
        deepest = model.deepest_exit(rule.max_layer)
        caution = job.watch.caution if job.watch else 1.0
        every = job.every or item.sampled
        ways.append((item, Passage(tokens, rule.tau, rule.lam, deepest, every, caution)))
    tokenize_s = (perf_counter() - started) / len(items)
    if ways:
        assert model.through is not None
        watch = items[0].job.watch  # they are of one model
        model.through([way for _, way in ways], watch.limits if watch else None)
    for item, way in ways:
        item.tokenize_s, item.model_s = tokenize_s, way.seconds
        results.append((item, _passed(item, way)))
    return results


def _passed(item: Item, way: Passage) -> Outcome:
    """The outcome of a way through the kernels."""
    manifest, job = item.job.model.manifest, item.job
    asked = [way.layer]
    if job.every or item.sampled:
        asked = [m for m in manifest.exit_layers if m <= way.layer]
    for layer in asked:
        distances = way.distances[layer].tolist() if layer in manifest.prototype_layers else None
        item.say(layer, read(way.logits[layer].tolist(), distances, job.rule.lam))
    return _outcome(item, _reason(item, way.deepest))


def run(item: Item, queue: WorkQueue, held: Callable[[float], None] = lambda _: None) -> Outcome | None:
    """Take one text on through its layers until it exits. `held` is told for how long it gives no way.

    None if it did not come so far: its job was dropped, or something more urgent came, and it waits in the
    queue again.
    """
    job, model, rule = item.job, item.job.model, item.job.rule
    if item.tokens is None:
        held(item.predicted / model.manifest.num_layers)
        item.tokens = _tokenize(item)
    started = perf_counter()
    deepest = model.deepest_exit(rule.max_layer)
    # At τ = 0 only the deepest exit is needed.
    may_leave_early = rule.tau > 0 or job.every or item.sampled
    layer_s = job.layer_s(len(item.tokens))
    reason = ""
    for layer in range(item.layer, deepest + 1):
        if item.ends is not None and item.passed and perf_counter() + layer_s > item.ends:
            reason = "deadline"
            break
        held(layer_s)
        segment = model.segments[layer]
        asked = segment.is_exit and (may_leave_early or layer == deepest)
        step = segment.embed(item.tokens, asked) if item.hidden is None else segment.run(item.hidden, asked)
        item.hidden = step.hidden
        if step.logits is not None:
            distances = None if step.distances is None else step.distances.tolist()
            item.say(layer, read(step.logits.tolist(), distances, rule.lam))
            reason = _reason(item, deepest)
            if reason:
                break
        if job.dropped:
            return None
        if queue.has_more_urgent_than(item):
            item.layer = layer + 1
            item.model_s += perf_counter() - started
            queue.put_back(item)
            return None
    item.model_s += perf_counter() - started
    item.hidden = None
    return _outcome(item, reason)


def _reason(item: Item, deepest: int) -> str:
    """Why an item leaves at the exit that it passed last; empty if it does not."""
    layer, reading = item.passed[-1]
    if layer == item.job.model.manifest.num_layers:
        return "last_layer"
    if item.rule.exits(reading):
        return "threshold"
    return "max_layer" if layer == deepest else ""


def _outcome(item: Item, reason: str) -> Outcome:
    assert item.tokens is not None
    layer, reading = item.passed[-1]  # at a deadline: the deepest answer so far
    waited = perf_counter() - item.job.submitted - item.tokenize_s - item.model_s  # of a shadow nobody's time
    if item.sampled and item.job.watch is not None:
        item.job.watch.sample(*item.passed[0])
    return Outcome(
        layer=layer,
        reason=reason,
        reading=reading,
        passed=item.passed,
        tokens=len(item.tokens),
        truncated=item.tokens.truncated,
        queue_s=0.0 if item.job.is_shadow else waited,
        tokenize_s=item.tokenize_s,
        model_s=item.model_s,
        is_far=item.is_far,
    )


def _tokenize(item: Item) -> Tokens:
    """The text's tokens; raises ApiError 422 if it is too long and may not be cut."""
    started = perf_counter()
    try:
        return item.job.model.tokenize(item.text.text, item.text.text_pair, item.job.truncate)
    except ValueError as error:
        raise _too_long(item, error) from None
    finally:
        item.tokenize_s = perf_counter() - started


def _too_long(item: Item, error: ValueError) -> ApiError:
    where = f"input[{item.index}]" if len(item.job.items) > 1 else "input"
    return ApiError(422, f"{where}: {error}", where, "too_long")
