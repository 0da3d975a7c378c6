"""Audits: answered texts that run once more, to full depth, in separate threads, while nothing else is pending.

The kernels run the layers of several texts together, at the lowest thread priority. When audits ran on the engine's
threads, one text at a time, they delayed other texts (docs/design.md). At the lowest priority, audits hardly run on a
machine that is never idle. So another thread runs overdue audits at normal priority, for a small share of the time.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Condition, Event, Thread
from time import perf_counter, sleep, thread_time

from de3.exits.reading import Reading
from de3.exits.rule import ExitRule
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.segments import Array, Tokens
from de3.model_store.tokenizer import Windows
from de3.runtime.background import Backoff, report
from de3.runtime.engine.queue import MAX_GROUP, WorkQueue
from de3.runtime.engine.served import MAX_STEP_S, Served

STEP_S = 0.001  # time between two checks of the queue, unless one layer takes longer
# Longest wait for an empty queue before each step: under sustained overload, audits are slow but do not stop.
MOST_WAIT_S = 1.0
OVERDUE_S = 2.0  # an audit that has waited longer runs at normal priority
OVERDUE_SHARE = 0.01  # limit on the share of the engine's time that such audits take
STOP_S = 5.0


@dataclass(slots=True, eq=False)
class Audit:
    """An answered text, to be run through every layer with every exit evaluated.

    Attributes:
        rule: reads and scores the exits; its τ is not used.
        tokens: the text's, or its windows, which run one after the other.
        on_done: called through the engine's `dispatch` once the audit has run, failed or been dropped; never if it is
            pending when the engine stops.
        states: array to fill in, as in ForwardPass; None: not needed.
        passed: the reading of every exit, once the audit has run; of a text in windows, empty.
        windows: the same for each of its windows.
        model_s: compute time, seconds.
        error: the error of an audit that failed; None otherwise.
        is_dropped: its model was unloaded before it ran, or the server is stopping.
        created: time of its creation (perf_counter seconds).
        tenant: the tenant that sent the text; tenants with pending audits get equal shares of the time.
    """

    served: Served
    rule: ExitRule
    tokens: Tokens | Windows
    on_done: Callable[["Audit"], None]
    states: Array | None = None
    passed: list[Reading] = field(default_factory=list)
    windows: list[list[Reading]] = field(default_factory=list)
    model_s: float = 0.0
    error: Exception | None = None
    is_dropped: bool = False
    created: float = field(default_factory=perf_counter)
    tenant: str = ""

    @property
    def in_group(self) -> bool:
        """True if the kernels can run it in a group."""
        has_kernels = self.served.model.encoder.forward is not None and self.rule.signal.code is not None
        return has_kernels and isinstance(self.tokens, Tokens)

    @property
    def parts(self) -> list[Tokens]:
        """The tokens of the text, or of each window."""
        if isinstance(self.tokens, Tokens):
            return [self.tokens]
        return [self.tokens[number] for number in range(len(self.tokens))]


class AuditThreads:
    """Threads that run audits; they start when the first audit is enqueued."""

    def __init__(self, threads: int, queue: WorkQueue, finish: Callable[[Sequence[Audit]], None]) -> None:
        """threads: number of engine threads. queue: audits run while it is empty. finish: called with audits that ran,
        failed or were dropped."""
        self._queue, self._finish = queue, finish
        self._pending: dict[str, deque[Audit]] = {}  # pending audits, by tenant
        self._spent: dict[str, float] = {}  # predicted seconds of its audits that ran, while some are pending
        self._changed = Condition()
        self._closed = Event()
        self._share = min(1.0, OVERDUE_SHARE * threads)  # share of one core
        self._paid = 0.0  # CPU time for which the thread of overdue audits has paused
        self._threads = [
            Thread(target=self._work, args=(number > 0,), name=f"audits-{number}", daemon=True)
            for number in range(1 + max(1, threads // 2))
        ]

    def put(self, audits: Sequence[Audit]) -> None:
        """Enqueue audits. Their number is not limited here, because the auditor draws fewer texts as it grows."""
        with self._changed:
            if self._closed.is_set():
                self._drop(audits)
                return
            for audit in audits:
                if audit.tenant not in self._spent:
                    self._spent[audit.tenant] = min(self._spent.values(), default=0.0)
                self._pending.setdefault(audit.tenant, deque()).append(audit)
            self._changed.notify_all()
            if self._threads[0].ident is None:
                for thread in self._threads:
                    thread.start()

    def drop(self, gone: Sequence[Served]) -> None:
        """Drop the pending audits of these models."""
        with self._changed:
            pending = [audit for queue in self._pending.values() for audit in queue]
            self._pending = {}
            for audit in pending:
                if audit.served not in gone:
                    self._pending.setdefault(audit.tenant, deque()).append(audit)
            self._spent = {name: self._spent[name] for name in self._pending}
        self._drop([audit for audit in pending if audit.served in gone])

    def _drop(self, audits: Sequence[Audit]) -> None:
        for audit in audits:
            audit.is_dropped = True
        if audits:
            self._finish(audits)

    def close(self) -> None:
        """Reject new audits, discard pending ones without reporting them, and wait up to STOP_S for each thread."""
        with self._changed:
            self._closed.set()
            self._pending.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_S)

    def _work(self, at_idle: bool) -> None:
        backoff = Backoff()
        while not self._closed.is_set():
            try:
                self._step(at_idle)  # a separate call, so that a waiting thread keeps no model alive
            except BaseException as error:  # Rust panics are not Exceptions; the thread must survive
                report("audits", error)
                sleep(backoff.pause_s())

    def _step(self, at_idle: bool) -> None:
        """Run the next audits, which then have a result or an error; returns at once if closed."""
        audits = self._next(at_idle)
        try:
            if audits:
                run_audits(audits, self._queue, self._closed.is_set, None if at_idle else self._pause)
        except BaseException as error:
            for audit in audits:
                audit.error = RuntimeError(str(error))
            raise
        finally:
            if audits:
                self._finish(audits)

    def _pause(self) -> None:
        """Pause the thread of overdue audits, in proportion to the CPU time of its last step."""
        self._closed.wait((thread_time() - self._paid) * (1 / self._share - 1))
        self._paid = thread_time()

    def _next(self, at_idle: bool) -> list[Audit]:
        """Wait for an audit; returns it with others of its model that fit into a step, or an empty list once closed.

        at_idle: if False, wait for an overdue audit instead.
        """
        with self._changed:
            while not self._closed.is_set():
                oldest = min((queue[0].created for queue in self._pending.values()), default=None)
                due = None if oldest is None else oldest + OVERDUE_S
                if due is not None and (at_idle or due <= perf_counter()):
                    break
                self._changed.wait(None if due is None else due - perf_counter())
            audits, left = list[Audit](), MAX_STEP_S if at_idle else STEP_S
            while self._pending and len(audits) < MAX_GROUP:
                name = min(self._pending, key=self._spent.__getitem__)
                queue = self._pending[name]
                audit = queue[0]
                left -= audit.served.group_s(len(audit.tokens)) if audit.in_group else left
                if audits and (left < 0 or not audit.in_group or audit.served is not audits[0].served):
                    break
                audits.append(queue.popleft())
                seconds = sum(audit.served.timing.full_depth_s(len(one)) for one in audit.parts)
                self._spent[name] += seconds
                if not queue:
                    del self._pending[name], self._spent[name]
                if not audit.in_group:
                    break
            return audits


def run_audits(
    audits: Sequence[Audit],
    queue: WorkQueue,
    stops: Callable[[], bool] = lambda: False,
    pause: Callable[[], None] | None = None,
) -> None:
    """Run audits of one model, and fill in their results. If there are several, each must have `in_group`.

    Before each step, waits up to MOST_WAIT_S while anything but shadow items is pending in the queue. stops: True once
    the server is stopping; the audits are then dropped. pause: called before each step instead of that wait; the audits
    then run at normal priority.
    """
    for tokens in zip(*(audit.parts for audit in audits), strict=True):
        if not _run(audits, tokens, queue, stops, pause):
            for audit in audits:
                audit.is_dropped = True
            return


def _run(
    audits: Sequence[Audit],
    tokens: Sequence[Tokens],
    queue: WorkQueue,
    stops: Callable[[], bool],
    pause: Callable[[], None] | None,
) -> bool:
    """Run the texts of audits, or one text's next window, and fill in the results; False if the server is stopping."""
    served, in_group = audits[0].served, audits[0].in_group
    model, num_layers = served.model, served.model.manifest.num_layers
    encoder = model.encoder
    forward = encoder.forward if in_group and encoder.forward is not None else encoder.layer_by_layer
    decisions = [
        Decision(
            *(model.exits, replace(a.rule, tau=0.0), num_layers),
            ask_all=True,
            states=a.states,
            layout=one.layout,
        )
        for a, one in zip(audits, tokens, strict=True)
    ]
    passes = [ForwardPass(one, [decision]) for one, decision in zip(tokens, decisions, strict=True)]
    layer_s = sum(served.timing.layer_s(len(one)) for one in tokens) if in_group else STEP_S
    layers = max(1, int(STEP_S / layer_s)) if layer_s > 0 else num_layers
    while decisions[0].reason is None:
        if pause is None:
            queue.wait_until_empty(MOST_WAIT_S)
        else:
            pause()
        if stops():
            return False
        # The time of the embeddings is negligible.
        forward(passes, layers + (passes[0].layer == 0), at_idle=pause is None)
    for audit, one in zip(audits, decisions, strict=True):
        audit.model_s += one.seconds
        if isinstance(audit.tokens, Tokens):
            audit.passed = one.readings
        else:
            audit.windows.append(one.readings)
        for reading in one.readings:
            reading.finish()  # here and not on the event loop
    return True
