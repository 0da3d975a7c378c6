"""The engine: threads that take one text at a time straight through its layers until it exits.

On a CPU, batching short texts buys nothing: one unpadded sample at a time for each core has both the highest
throughput and the lowest latency (docs/design.md). ONNX Runtime releases the GIL while a layer runs, so the
threads share the sessions and scale with the cores. Between two layers a text gives way to one that is more
urgent, so a long text does not hold up short ones.
"""

import logging
import math
from collections.abc import Callable, Sequence
from threading import Thread
from time import perf_counter, sleep

from exits.reading import read
from exits.rule import ExitReason
from model_store.model import Model
from model_store.segments import ForwardPass
from server.deadlines import Deadlines
from server.errors import ApiError
from server.queue import QueueFullError, WorkQueue
from server.work import Item, Job, Outcome, wake

log = logging.getLogger("de3.engine")


# Engine time that a client may have had or been promised more than others, and still get promises.
LEAD_S = 0.1
STUCK_CHECKS = 30  # without progress, after which a thread counts as stuck
OVERRUN = 1.5  # of the time predicted for texts that run together, by their tokens
MAX_FAILURES = 100  # steps in a row, after which a thread ends


class DeadlineError(Exception):
    """A deadline that cannot be kept; its argument: the seconds that it would take."""


class LeadError(Exception):
    """A deadline that is not promised, as others wait who have had less of the engine."""


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
        self._seconds = [0.0] * threads
        self._progress = [0] * threads  # steps and layers begun
        self._busy = [False] * threads
        self._failures = [0] * threads  # steps that failed in a row
        self._seen: list[tuple[int, int]] = [(0, 0)] * threads
        self.errors = 0  # of what the engine calls, which did not end a thread

    def start(self, warm_up: Callable[[], object] = lambda: None) -> None:
        """Start the threads; each calls warm_up first."""
        self._warm_ups = [warm_up] * self.threads  # each is let go of, with the models that it knows
        for thread in self._threads:
            thread.start()

    def problem(self) -> str:
        """What is wrong with the threads, empty if nothing is; to be asked about once a second.

        A thread that ended, or that made no progress in STUCK_CHECKS checks while it had work, will not come
        back. Checks are counted, not seconds: a process that was suspended has not been stuck.
        """
        for number, thread in enumerate(self._threads):
            if not thread.is_alive():
                return f"engine thread {number} has ended"
            if self._is_stuck(number):
                return f"engine thread {number} has made no progress for {STUCK_CHECKS} s"
        return ""

    def _is_stuck(self, number: int) -> bool:
        progress, checks = self._seen[number]
        is_still = self._busy[number] and self._progress[number] == progress
        self._seen[number] = (self._progress[number], checks + 1 if is_still else 0)
        return checks >= STUCK_CHECKS

    def retry_after_s(self) -> int:
        """Seconds until what waits now will be done, at least 1, by the mean time of a text so far."""
        mean = sum(self._seconds) / max(1, self.finished)
        return max(1, math.ceil(len(self.queue) * mean / self.threads))

    def stop(self) -> None:
        """Finish what was accepted, then end the threads; those that are stuck end with the process."""
        self.queue.close()
        for number, thread in enumerate(self._threads):
            while thread.is_alive() and not self._is_stuck(number):  # not alive if the models never loaded
                thread.join(1.0)

    def submit(self, job: Job) -> None:
        """Accept a job; raises QueueFullError, or for a deadline that is not promised DeadlineError or
        LeadError."""
        if job.deadline is not None:
            predicted = sum(item.predicted for item in job.items)
            lead = self.queue.lead(job)
            # One text may be promised however long it is; a batch counts as what is promised already.
            if lead > LEAD_S or (lead >= 0 and len(job.items) > 1 and lead + predicted > LEAD_S):
                raise LeadError
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
        try:
            self._warm_ups.pop()()
        except BaseException:
            log.exception("an engine thread could not warm up; it goes on")
        self._failures[number] = 0
        while self._step(number):  # which forgets what it ran: a thread that waits keeps no model alive
            if self._failures[number] > MAX_FAILURES:
                return  # and the server with it

    def _step(self, number: int) -> bool:
        """Run what is next; False once there is nothing more to come. No error ends the thread."""
        items: list[Item] = []
        try:
            items = self.queue.next(self.threads)
            self._busy[number] = True
            self._progress[number] += 1
            self._finish(self._run(items, number) if items else (), number)
            self.deadlines.held(number, 0.0)
        except BaseException as error:
            self.errors += 1
            log.exception("the engine failed; it goes on")
            for item in items:
                item.job.fail(RuntimeError(str(error)))
            self._failures[number] += 1
            sleep(0.01)  # it may fail at once again
            return True
        finally:
            self._busy[number] = False
        self._failures[number] = 0
        return bool(items)

    def _finish(self, results: Sequence[tuple[Item, Outcome | Exception | None]], number: int) -> None:
        """Record what came of items, and wake those who wait for them."""
        done: list[tuple[Job, Exception | None]] = []
        for item, result in results:
            if isinstance(result, Exception):
                item.job.fail(result)
            elif result is not None:
                if not item.job.is_shadow:
                    self._finished[number] += 1
                    self._seconds[number] += result.tokenize_s + result.model_s
                if item.job.finish(item, result):
                    done.append((item.job, None))
                self._tell(item, result)
        if done:
            wake(done)

    def _tell(self, item: Item, outcome: Outcome) -> None:
        """Call the observer, whose errors are no request's."""
        if self._observe is None:
            return
        try:
            self._observe(item.job.model, outcome)
        except BaseException:
            self.errors += 1
            if self.errors == 1:  # each text would have one
                log.exception("a text was answered, but not counted; further such errors are not logged")

    def _run(self, items: list[Item], number: int) -> Sequence[tuple[Item, Outcome | Exception | None]]:
        """What came of items: an outcome, an error, or None if dropped or preempted."""
        first = items[0]
        if first.layer == 0 and first.is_short and 0 < first.predicted <= first.job.together_s:
            self.deadlines.held(number, perf_counter() + sum(item.predicted for item in items))
            try:
                results = run_together(items, self.queue)
            except BaseException:  # one of them; which one shows when each runs alone
                log.exception("texts that ran together failed")
            else:
                for item in items:
                    self.queue.charge(item.job, item.tokenize_s + item.model_s)
                return results
        return [(item, self._alone(item, number)) for item in items]

    def _alone(self, item: Item, number: int) -> Outcome | Exception | None:
        def held(seconds: float) -> None:
            self._progress[number] += 1
            if item.job.deadline is None:
                self.deadlines.held(number, perf_counter() + seconds)

        try:
            if item.job.deadline is not None and item.ends is None:
                item.ends = self.deadlines.begin(item, number)
            return run(item, self.queue, held)
        except ApiError as error:
            return error
        except BaseException:  # a panic in a library's Rust is no Exception; the thread must live on
            log.exception("an item failed")
            return RuntimeError("an item failed")


def run_together(
    items: list[Item], queue: WorkQueue | None = None
) -> list[tuple[Item, Outcome | Exception | None]]:
    """Take short texts of one model through the kernels in one call; each is computed by itself.

    Texts that turn out to be longer than predicted go back into the queue, but for the first, and run alone.
    """
    started = perf_counter()
    model = items[0].job.model
    encodings = model.tokenizer.encode([(item.text.text, item.text.text_pair) for item in items])
    results: list[tuple[Item, Outcome | Exception | None]] = []
    ways: list[tuple[Item, ForwardPass]] = []
    seconds = 0.0
    for item, encoding in zip(items, encodings, strict=True):
        job, rule = item.job, item.job.rule
        if job.dropped:
            continue
        try:
            tokens = model.tokenizer.short(encoding, item.text.text_pair is not None, job.truncate)
        except ValueError as error:
            results.append((item, _too_long(item, error)))
            continue
        item.tokens = tokens
        seconds += job.layer_s(len(tokens)) * model.manifest.num_layers
        if queue is not None and ways and seconds > OVERRUN * job.together_s:
            item.is_short = False
            queue.put_back(item)
            continue
        deepest = model.deepest_exit(rule.max_layer)
        caution = job.watch.caution if job.watch else 1.0
        every = job.every or item.sampled
        ways.append((item, ForwardPass(tokens, rule.tau, rule.signal, deepest, every, caution)))
    for item in items:  # those that fail or wait again have cost it, too
        item.tokenize_s = (perf_counter() - started) / len(items)
    if ways:
        assert model.through is not None
        watch = items[0].job.watch  # they are of one model
        model.through([way for _, way in ways], watch.limits if watch else None)
    for item, way in ways:
        item.model_s = way.seconds
        results.append((item, _passed(item, way)))
    return results


def _passed(item: Item, way: ForwardPass) -> Outcome:
    """The outcome of a way through the kernels."""
    manifest, job = item.job.model.manifest, item.job
    asked = [way.exit_layer]
    if job.every or item.sampled:
        asked = [m for m in manifest.exit_layers if m <= way.exit_layer]
    for layer in asked:
        distances = way.distances[layer].tolist() if layer in manifest.prototype_layers else None
        item.say(layer, read(way.logits[layer].tolist(), distances))
    return _outcome(item, _reason(item, way.deepest))


def run(item: Item, queue: WorkQueue, held: Callable[[float], None] = lambda _: None) -> Outcome | None:
    """Take one text on through its layers until it exits. Calls `held(seconds)` before each stretch that
    cannot be preempted.

    None if its job was dropped, or if it was preempted and waits in the queue again.
    """
    job, model, rule = item.job, item.job.model, item.job.rule
    if item.tokens is None and not _tokenize(item, queue, held):
        return None
    assert item.tokens is not None
    started = last = perf_counter()
    deepest = model.deepest_exit(rule.max_layer)
    # At τ = 0 only the deepest exit is needed.
    may_leave_early = rule.tau > 0 or job.every or item.sampled
    layer_s = job.layer_s(len(item.tokens))
    reason: ExitReason | None = None
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
            item.say(layer, read(step.logits.tolist(), distances))
            reason = _reason(item, deepest)
            if reason:
                break
        now = perf_counter()
        last, spent = now, now - last
        if job.dropped:
            queue.charge(job, spent)
            return None
        if queue.has_more_urgent_than(item, spent):
            item.layer = layer + 1
            item.model_s += now - started
            queue.put_back(item)
            return None
    now = perf_counter()
    item.model_s += now - started
    queue.charge(job, now - last)
    item.hidden = None
    return _outcome(item, reason)


def _reason(item: Item, deepest: int) -> ExitReason | None:
    """Why an item leaves at the exit that it passed last; None if it does not."""
    layer, reading = item.passed[-1]
    if layer == item.job.model.manifest.num_layers:
        return "last_layer"
    if item.rule.exits(reading.score):
        return "threshold"
    return "max_layer" if layer == deepest else None


def _outcome(item: Item, reason: ExitReason | None) -> Outcome:
    assert item.tokens is not None and reason is not None
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


def _tokenize(item: Item, queue: WorkQueue, held: Callable[[float], None]) -> bool:
    """Find the text's tokens; False if its job was dropped or it was preempted. Raises ApiError 422 if it is
    too long and may not be cut."""
    job = item.job
    if item.tokenization is None:
        item.tokenization = job.model.tokenizer.start(item.text.text, item.text.text_pair, job.truncate)
    while True:
        held(job.piece_s)
        started = perf_counter()
        try:
            item.tokens = item.tokenization.step()
        except ValueError as error:
            queue.charge(job, perf_counter() - started)
            raise _too_long(item, error) from None
        finally:
            spent = perf_counter() - started
            item.tokenize_s += spent
        if item.tokens is not None:
            item.tokenization = None
            queue.charge(job, spent)
            return True
        if job.dropped:
            queue.charge(job, spent)
            return False
        if queue.has_more_urgent_than(item, spent):
            queue.put_back(item)
            return False


def _too_long(item: Item, error: ValueError) -> ApiError:
    where = f"input[{item.index}]" if len(item.job.items) > 1 else "input"
    return ApiError(422, f"{where}: {error}", where, "too_long")
