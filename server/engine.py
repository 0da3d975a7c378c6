"""The engine: threads that take one text at a time straight through its layers until it exits.

On a CPU, batching short texts buys nothing: one unpadded sample at a time for each core has both the highest
throughput and the lowest latency (docs/design.md). ONNX Runtime releases the GIL while a layer runs, so the
threads share the sessions and scale with the cores.
"""

import logging
from collections.abc import Callable
from threading import Thread
from time import perf_counter

from exits import rule
from exits.rule import Reading
from model_store.model import Model
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
                outcome = run(item)
                if outcome is not None:
                    if self._observe:
                        self._observe(item.job.model, outcome)
                    item.job.finish(item, outcome)
            except ApiError as error:
                item.job.fail(error)
            except BaseException:  # a panic in a library's Rust is no Exception; the thread must live on
                log.exception("an item failed")
                item.job.fail(RuntimeError("an item failed"))


def run(item: Item) -> Outcome | None:
    """Take one text through its layers until it exits; None if its job was dropped on the way."""
    job, model = item.job, item.job.model
    started = perf_counter()
    try:
        tokens = model.tokenize(item.text.text, item.text.text_pair, job.truncate)
    except ValueError as error:
        where = f"input[{item.index}]" if len(job.items) > 1 else "input"
        raise ApiError(422, f"{where}: {error}", where, "too_long") from None
    tokenized = perf_counter()

    last, deepest = model.manifest.num_layers, model.deepest_exit(job.rule.max_layer)
    passed: list[tuple[int, Reading]] = []
    step = model.segments[0].embed(tokens)
    for segment in model.segments:
        if segment.layer > 0:
            if job.dropped:
                return None
            step = segment.run(step.hidden)
        if step.logits is None:
            continue
        reading = rule.read(step.logits, step.distances, job.rule.lam)
        passed.append((segment.layer, reading))
        if segment.layer == last:
            reason = "last_layer"
        elif job.rule.exits(reading):
            reason = "threshold"
        elif segment.layer == deepest:
            reason = "max_layer"
        else:
            continue
        break
    return Outcome(
        layer=segment.layer,
        reason=reason,
        reading=reading,
        passed=passed,
        tokens=len(tokens),
        truncated=tokens.truncated,
        queue_s=started - job.submitted,
        tokenize_s=tokenized - started,
        model_s=perf_counter() - tokenized,
    )
