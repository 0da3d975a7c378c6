"""The engine: threads that each run a text, or a group of short ones, until it exits.

On a CPU, padded batches of short texts gain nothing, so texts are never padded (docs/design.md). ONNX Runtime and the
kernels release the GIL while a layer runs, so the threads share the model, and throughput scales with the cores. At a
layer boundary a text can be preempted by a more urgent one, so a long text does not delay short ones.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from threading import Thread
from time import perf_counter, sleep

from de3.runtime.background import report
from de3.runtime.engine.audit import Audit, AuditThreads
from de3.runtime.engine.deadlines import Deadlines
from de3.runtime.engine.group import failures, run_group
from de3.runtime.engine.job import Item, Job, Result
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.queue import WorkQueue
from de3.runtime.engine.run import run
from de3.runtime.engine.served import Served
from de3.runtime.errors import RequestError

# A client's deadlines are admitted only up to this lead in engine time over other clients.
MAX_LEAD_S = 0.1
STUCK_CHECKS = 30  # checks without progress, after which a thread counts as stuck
MAX_FAILURES = 100  # consecutive failed steps, after which a thread ends


Dispatch = Callable[[Callable[[], None]], object]


def call_here(callback: Callable[[], None]) -> None:
    """Run a callback directly, on the reporting thread."""
    callback()


def _call_each(callbacks: Iterable[Callable[[], object]]) -> None:
    """Run callbacks; an error of one does not affect the others."""
    for callback in callbacks:
        try:
            callback()
        except Exception as error:
            report("engine_callback", error)


class Engine:
    """A queue and the threads that process it.

    `observe` is called with a model and the outcomes of its texts that exited, by the thread that ran them.
    """

    def __init__(
        self,
        threads: int,
        max_queue: int,
        observe: Callable[[Served, Sequence[Outcome]], None] = lambda *_: None,
    ) -> None:
        self.threads = threads
        self.queue = WorkQueue(max_queue)
        self._observe = observe
        self._threads = [
            Thread(target=self._work, args=(i,), name=f"engine-{i}", daemon=True) for i in range(threads)
        ]
        self.deadlines = Deadlines(threads)
        self._audits = AuditThreads(threads, self.queue, self._report_audits)
        self._dispatch: Dispatch = call_here
        self._call_soon: Dispatch | None = None
        self._is_due = False  # _run_here() will be called
        self._finished = [0] * threads
        self._seconds = [0.0] * threads
        self._progress = [0] * threads  # steps and layers started
        self._busy = [False] * threads
        self._failures = [0] * threads  # consecutive failed steps
        self._checked: list[tuple[int, int]] = [(0, 0)] * threads

    def start(
        self,
        warm_up: Callable[[], object] = lambda: None,
        dispatch: Dispatch = call_here,
        call_soon: Dispatch | None = None,
    ) -> None:
        """Start the threads; each calls warm_up first.

        dispatch: runs the callbacks of jobs and audits, for example on an event loop. call_soon: calls back soon, on
        the thread that submits jobs: an engine with one thread then runs short texts there. None: it does not.
        """
        self._dispatch = dispatch
        self._call_soon = call_soon if self.threads == 1 else None
        self._warm_ups = [warm_up] * self.threads  # released after use, with the models that they refer to
        for thread in self._threads:
            thread.start()

    def problem(self) -> str:
        """The problem of the first thread that died or is stuck; empty if there is none. Call it once a second.

        A thread that ended, or that made no progress in STUCK_CHECKS checks while it had work, will not
        recover. Checks are counted, not seconds, so that a suspended process does not count as stuck.
        """
        for number, thread in enumerate(self._threads):
            if not thread.is_alive():
                return f"engine thread {number} has ended"
            if self._is_stuck(number):
                return f"engine thread {number} has made no progress for {STUCK_CHECKS} s"
        return ""

    def _is_stuck(self, number: int) -> bool:
        progress, checks = self._checked[number]
        is_still = self._busy[number] and self._progress[number] == progress
        self._checked[number] = (self._progress[number], checks + 1 if is_still else 0)
        return checks >= STUCK_CHECKS

    def retry_after_s(self) -> int:
        """Estimated seconds until the pending texts are finished, from the mean time per text so far; at least 1."""
        mean = sum(self._seconds) / max(1, self.finished)
        return max(1, math.ceil(len(self.queue) * mean / self.threads))

    def stop(self) -> None:
        """Finish the accepted jobs, then end the threads; stuck ones end with the process."""
        self.queue.close()
        for number, thread in enumerate(self._threads):
            while thread.is_alive() and not self._is_stuck(number):  # not alive if the models never loaded
                thread.join(1.0)
        self._audits.close()

    def submit(self, job: Job) -> None:
        """Accept a job; raises RequestError if the queue is full or closed, or if the deadline cannot be admitted."""
        if job.deadline is not None:
            self._admit(job)
        try:
            # A short text is for the event loop, unless a thread is busy, which then takes it. At full depth, it takes
            # so long that it is handed over.
            is_here = (
                self._call_soon is not None and job.passes[0].in_groups and job.first.choice.rule.tau > 0
            )
            self.queue.put(job, wakes=not is_here)
        except RequestError:
            self.deadlines.drop(job)
            raise
        if is_here:
            self._run_here_soon()

    def audit(self, audits: Sequence[Audit]) -> None:
        """Enqueue audits, which run while nothing else is pending, or slowly once they are overdue."""
        self._audits.put(audits)

    def _admit(self, job: Job) -> None:
        """Admit a job's deadline; raises RequestError if it cannot be met, or if the client is over its share."""
        predicted_s = sum(item.predicted_s for item in job.items)
        lead_s = self.queue.lead(job)
        # A single text may be admitted whatever its length; the predicted time of a batch adds to the lead.
        if lead_s > MAX_LEAD_S or (lead_s >= 0 and len(job.items) > 1 and lead_s + predicted_s > MAX_LEAD_S):
            message = (
                "latency_budget_ms: over your share of the engine's time while other clients wait; "
                "try again later, or without a budget"
            )
            raise RequestError(message, "latency_budget_ms", "over_share", retry_after_s=1)
        needed_s = self.deadlines.admit(job)
        if needed_s:
            budget_s = job.plan.budget_s
            assert budget_s is not None and job.deadline is not None
            needed_s += job.submitted + budget_s - job.deadline  # plus the time for the response
            message = (
                f"latency_budget_ms: {1000 * budget_s:g} ms cannot be met: the first exit would "
                f"take about {1000 * needed_s:.1f} ms now; allow more, or set best_effort"
            )
            raise RequestError(message, "latency_budget_ms", "budget", retry_after_s=1)
        job.admit()

    def drop(self, job: Job) -> None:
        """Drop a job; a running item stops at its next layer."""
        self.queue.drop(job)
        self.deadlines.drop(job)

    def drop_shadows(self, gone: Sequence[Served]) -> None:
        """Drop all pending shadow jobs, and the pending audits of unloaded models."""
        self.queue.drop_shadows()
        self._audits.drop(gone)

    def _report_audits(self, audits: Sequence[Audit]) -> None:
        self._dispatch(lambda: _call_each([partial(audit.on_done, audit) for audit in audits]))

    def _report(self, ended: Sequence[tuple[Job, Exception | None]], is_here: bool = False) -> None:
        """Report finished and failed jobs in one callback: waking an event loop costs a thread switch."""
        dispatch = call_here if is_here else self._dispatch
        dispatch(lambda: _call_each([partial(job.on_done, error) for job, error in ended]))

    @property
    def finished(self) -> int:
        """Number of texts that exited so far, except those of shadow jobs."""
        return sum(self._finished)

    def _work(self, number: int) -> None:
        try:
            self._warm_ups.pop()()
        except BaseException as error:  # the thread continues: only the first texts are slower
            report("engine", error)
        self._failures[number] = 0
        while self._step(number):  # a separate call, so that a waiting thread keeps no model alive
            if self._failures[number]:
                sleep(0.01)  # avoids a busy loop if every step fails
            if self._failures[number] > MAX_FAILURES:
                return  # the server then stops, too

    def _step(self, number: int) -> bool:
        """Take items from the queue, run and finish them; False once the queue is closed and empty. Never raises."""
        try:
            items = self.queue.next(self.threads)
        except BaseException as error:
            self._fail([], number, error)
            return True
        self._process(items, number)
        return bool(items)

    def _run_here(self) -> None:
        """Run short texts on the event loop for one step, if no thread runs any; then let the loop do its other work.

        Handing a text to another thread, and its answer back, takes as long as several layers.
        """
        self._is_due = False
        if items := self.queue.next_here(self.threads):
            self._process(items, 0, is_here=True)
            if self.queue.leave_here():
                self._run_here_soon()

    def _run_here_soon(self) -> None:
        if self._call_soon is not None and not self._is_due:
            self._is_due = True
            self._call_soon(self._run_here)

    def _process(self, items: list[Item], number: int, is_here: bool = False) -> None:
        """Run and finish items. Never raises."""
        try:
            self._busy[number] = True
            self._progress[number] += 1
            if items and (alone := self._run(items, number, is_here)):
                self._finish(alone, number, is_here)
            if not is_here:  # deadlines are admitted on the event loop, too, so not meanwhile
                self.deadlines.occupy(number, 0.0)
            self._failures[number] = 0
        except BaseException as error:
            self._fail(items, number, error)
        finally:
            self._busy[number] = False

    def _fail(self, items: Sequence[Item], number: int, error: BaseException) -> None:
        report("engine", error)
        for item in items:
            item.job.is_dropped = True
        self._report([(item.job, RuntimeError(str(error))) for item in items])
        self._failures[number] += 1

    def _run(self, items: list[Item], number: int, is_here: bool) -> Sequence[tuple[Item, Result | None]]:
        """Run items; returns the result of each that ran alone: an outcome, an error, or None if dropped or preempted.

        The results of a group are recorded as they come. On the event loop, a group runs for one step, and no item
        runs alone.
        """

        def occupy(seconds: float) -> None:
            if not is_here:
                self._progress[number] += 1
                self.deadlines.occupy(number, perf_counter() + seconds)

        def finish(results: Sequence[tuple[Item, Result]]) -> None:
            self._finish(results, number, is_here)

        alone = items
        if items[0].can_share:
            alone = run_group(items, self.queue, self.threads, occupy, finish, 1 if is_here else math.inf)
        if is_here and alone:
            self.queue.requeue(*alone)
            return []
        return [(item, self._run_alone(item, number)) for item in alone]

    def _run_alone(self, item: Item, number: int) -> Result | None:
        def occupy(seconds: float) -> None:
            self._progress[number] += 1
            if item.job.deadline is None:
                self.deadlines.occupy(number, perf_counter() + seconds)

        try:
            if item.job.deadline is not None and item.ends is None:
                item.ends = self.deadlines.begin(item, number)
            return run(item, self.queue, occupy)
        except RequestError as error:
            return error
        except BaseException:  # Rust panics are not Exceptions; the thread must survive
            failures.exception("an item failed")
            return RuntimeError("an item failed")

    def _finish(
        self, results: Sequence[tuple[Item, Result | None]], number: int, is_here: bool = False
    ) -> None:
        """Record the results of items, and report the jobs that finish or fail with them."""
        ended: list[tuple[Job, Exception | None]] = []
        outcomes = [(item, result) for item, result in results if isinstance(result, list)]
        if outcomes:  # counted first, so that the metrics include a text before its client has the answer
            self._count(outcomes)
        for item, found in outcomes:
            job = item.job
            if not job.is_shadow:
                self._finished[number] += 1
                self._seconds[number] += item.tokenize_s + item.model_s
            if job.finish(item, found):
                ended.append((job, None))
        for item, result in results:
            if not isinstance(result, Exception):
                continue
            job = item.job
            if not (job.request.keeps_errors and isinstance(result, RequestError)):
                job.is_dropped = True
                ended.append((job, result))
            elif job.finish(item, result):
                ended.append((job, None))
        if ended:
            self._report(ended, is_here)

    def _count(self, outcomes: Sequence[tuple[Item, Sequence[Outcome]]]) -> None:
        """Call `observe` for each model; its errors do not fail the request."""
        by_model: dict[int, tuple[Served, list[Outcome]]] = {}
        for item, found in outcomes:
            for head, outcome in zip(item.heads, found, strict=True):
                served = head.part.served
                by_model.setdefault(id(served), (served, []))[1].append(outcome)
        for served, of_model in by_model.values():
            try:
                self._observe(served, of_model)
            except BaseException as error:
                report("counting_texts", error)
