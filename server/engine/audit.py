"""Audits of a model that the kernels run: in threads of their own, while nothing else is pending.

Their layers run at the lowest priority of the system, some texts together: on the engine's threads, a text at a time,
they made others wait (docs/design.md).
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Thread

from de3.model_store.segments import ForwardPass
from de3.server.engine.group import outcome_of_pass
from de3.server.engine.queue import MAX_GROUP, WorkQueue
from de3.server.engine.work import MAX_STEP_S, Item, Job, Outcome, Served
from de3.server.errors import RequestError

log = logging.getLogger("de3.engine")
STEP_S = 0.001  # between two looks at the queue, unless one layer takes longer
# A server that is overloaded for long audits slowly, but does not go blind.
MOST_WAIT_S = 1.0
STOP_S = 5.0


class AuditThreads:
    """Threads that run audits; they start with the first one."""

    def __init__(
        self,
        count: int,
        queue: WorkQueue,
        finish: Callable[[Sequence[tuple[Item, Outcome]]], None],
    ) -> None:
        """queue: audits run while it is empty. finish: called with the outcomes of a group."""
        self._queue, self._finish = queue, finish
        self._pending: deque[Item] = deque()
        self._changed = Condition()
        self._closed = False
        self._threads = [
            Thread(target=self._work, name=f"audits-{number}", daemon=True) for number in range(count)
        ]

    def put(self, job: Job) -> None:
        """Enqueue a job; raises RequestError once the server stops."""
        with self._changed:
            if self._closed:
                raise RequestError("the server stops", cause="queue_full")
            self._pending += job.items
            self._changed.notify_all()
            if self._threads[0].ident is None:
                for thread in self._threads:
                    thread.start()

    def drop(self, gone: Sequence[Served]) -> None:
        """Drop what is pending for some models; called by the event loop, which owns the futures."""
        with self._changed:
            for item in [item for item in self._pending if item.job.served in gone]:
                item.job.is_dropped = True
                item.job.future.cancel()
                self._pending.remove(item)

    def close(self) -> None:
        """Accept nothing more, forget what is pending, and end the threads."""
        with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_S)

    def _work(self) -> None:
        while self._step():  # which forgets what it ran: a thread that waits keeps no model alive
            pass

    def _step(self) -> bool:
        items = self._next()
        try:
            if items:
                self._finish(run_audits(items, self._queue, lambda: self._closed))
        except BaseException as error:  # a panic in a library's Rust is no Exception; the thread must live on
            log.exception("audits failed")
            for job in {id(item.job): item.job for item in items}.values():
                job.fail(RuntimeError(str(error)))
        return bool(items)

    def _next(self) -> list[Item]:
        """Wait for an audit; it comes with others of its model that fit into a step. Empty once closed."""
        with self._changed:
            while not self._pending and not self._closed:
                self._changed.wait()
            items, left = list[Item](), MAX_STEP_S
            while self._pending and len(items) < MAX_GROUP:
                item = self._pending[0]
                left -= item.group_s
                if items and (left < 0 or item.job.served is not items[0].job.served):
                    break
                items.append(self._pending.popleft())
            return items


def run_audits(
    items: Sequence[Item], queue: WorkQueue, stops: Callable[[], bool] = lambda: False
) -> list[tuple[Item, Outcome]]:
    """Run texts of one model, which were tokenized before, to full depth; the outcomes of those that are not dropped.

    Every exit is evaluated. Waits between two steps while anything is pending in the queue. stops: whether to give up.
    """
    served, rule = items[0].job.served, items[0].rule
    through, timing, num_layers = served.model.through, served.timing, served.model.manifest.num_layers
    assert through is not None
    thresholds = rule.thresholds.table if rule.thresholds is not None else None
    passes = []
    for item in items:
        assert item.tokens is not None
        item.num_tokens = len(item.tokens)
        passes.append(
            ForwardPass(item.tokens, rule.tau, rule.signal, num_layers, True, thresholds=thresholds)
        )
    layer_s = sum(timing.layer_s(len(one.tokens)) for one in passes)
    layers = max(1, int(STEP_S / layer_s)) if layer_s > 0 else num_layers
    while passes[0].layer <= num_layers:
        queue.wait_until_empty(MOST_WAIT_S)
        if stops() or all(item.job.is_dropped for item in items):
            return []
        # The embeddings take next to no time.
        through(passes, None, layers + (passes[0].layer == 0), at_idle=True)
    results = []
    for item, one in zip(items, passes, strict=True):
        item.layer, item.model_s = one.layer, one.seconds
        if not item.job.is_dropped:
            results.append((item, outcome_of_pass(item, one)))
    return results
