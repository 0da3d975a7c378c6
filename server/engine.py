"""The engine: threads that take one text at a time straight through its layers until it exits.

On a CPU, batching short texts buys nothing: one unpadded sample at a time for each core has both the highest
throughput and the lowest latency (docs/design.md). ONNX Runtime releases the GIL while a layer runs, so the
threads share the sessions and scale with the cores. Between two layers a text gives way to one that is more
urgent, so a long text does not hold up short ones.
"""

import logging
from collections.abc import Callable
from threading import Thread
from time import perf_counter

from exits.rule import read
from model_store.model import Model, Tokens
from server.errors import ApiError
from server.queue import WorkQueue
from server.work import Item, Job, Outcome

log = logging.getLogger("de3.engine")


class Engine:
    """A queue and the threads that empty it.

    `observe` is called with every item that left, by the thread that ran it.
    """

    def __init__(
        self, threads: int, max_queue: int, observe: Callable[[Model, Outcome], None] | None = None
    ) -> None:
        self.queue = WorkQueue(max_queue)
        self._observe = observe
        self._threads = [Thread(target=self._work, name=f"engine-{i}", daemon=True) for i in range(threads)]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish what was accepted, then end the threads."""
        self.queue.close()
        for thread in self._threads:
            if thread.is_alive():  # not so if the models never loaded
                thread.join()

    def submit(self, job: Job) -> None:
        """Accept a job; raises QueueFullError."""
        self.queue.put(job)

    def drop(self, job: Job) -> None:
        """Give a job up; an item that runs stops at its next layer."""
        self.queue.drop(job)

    def _work(self) -> None:
        while item := self.queue.next():
            try:
                outcome = run(item, self.queue)
                if outcome is not None:
                    if self._observe:
                        self._observe(item.job.model, outcome)
                    item.job.finish(item, outcome)
            except ApiError as error:
                item.job.fail(error)
            except BaseException:  # a panic in a library's Rust is no Exception; the thread must live on
                log.exception("an item failed")
                item.job.fail(RuntimeError("an item failed"))


def run(item: Item, queue: WorkQueue) -> Outcome | None:
    """Take one text on through its layers until it exits.

    None if it did not come so far: its job was dropped, or something more urgent came, and it waits in the
    queue again.
    """
    job, model, rule = item.job, item.job.model, item.job.rule
    if item.tokens is None:
        item.tokens = _tokenize(item)
    started = perf_counter()
    last, deepest = model.manifest.num_layers, model.deepest_exit(rule.max_layer)
    may_leave_early = rule.tau > 0 or job.explain  # at τ = 0 only the deepest exit is needed
    for layer in range(item.layer, deepest + 1):
        segment = model.segments[layer]
        asked = segment.is_exit and (may_leave_early or layer == deepest)
        step = segment.embed(item.tokens, asked) if item.hidden is None else segment.run(item.hidden, asked)
        item.hidden = step.hidden
        if step.logits is not None:
            distances = None if step.distances is None else step.distances.tolist()
            reading = read(step.logits.tolist(), distances, rule.lam)
            item.passed.append((layer, reading))
            if layer == last:
                reason = "last_layer"
            elif rule.exits(reading):
                reason = "threshold"
            elif layer == deepest:
                reason = "max_layer"
            else:
                reason = ""
            if reason:
                break
        if job.dropped:
            return None
        if queue.has_more_urgent_than(item):
            item.layer = layer + 1
            item.model_s += perf_counter() - started
            queue.put_back(item)
            return None
    now = perf_counter()
    item.model_s += now - started
    item.hidden = None
    return Outcome(
        layer=layer,
        reason=reason,
        reading=reading,
        passed=item.passed,
        tokens=len(item.tokens),
        truncated=item.tokens.truncated,
        queue_s=now - job.submitted - item.tokenize_s - item.model_s,
        tokenize_s=item.tokenize_s,
        model_s=item.model_s,
    )


def _tokenize(item: Item) -> Tokens:
    """The text's tokens; raises ApiError 422 if it is too long and may not be cut."""
    started = perf_counter()
    job = item.job
    try:
        return job.model.tokenize(item.text.text, item.text.text_pair, job.truncate)
    except ValueError as error:
        where = f"input[{item.index}]" if len(job.items) > 1 else "input"
        raise ApiError(422, f"{where}: {error}", where, "too_long") from None
    finally:
        item.tokenize_s = perf_counter() - started
