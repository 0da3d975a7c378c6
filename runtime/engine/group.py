"""A group: short texts that run through the kernels together, a few layers per step, for models with one encoder.

Each text gets the same result as if it ran alone. A large model's weights are read from memory once for the whole
group. Between two steps, texts that have exited or were dropped or preempted leave the group, and pending texts whose
next layer is the same join it.
"""

import logging
from collections.abc import Callable, Sequence
from math import inf
from time import perf_counter

from de3.model_store.forward import ForwardPass
from de3.model_store.part import MAX_LAYERS
from de3.runtime.engine.job import Item, Result
from de3.runtime.engine.queue import WorkQueue
from de3.runtime.engine.run import outcomes_of, too_long_error
from de3.runtime.engine.served import MAX_STEP_S
from de3.runtime.failures import FailureLog

failures = FailureLog(logging.getLogger("de3.engine"))

OVERRUN = 1.5  # limit on a group's time per layer, relative to MAX_STEP_S, once its tokens are known


def run_group(
    items: list[Item],
    queue: WorkQueue,
    threads: int,
    occupy: Callable[[float], None],
    finish: Callable[[Sequence[tuple[Item, Result]]], None],
    steps: float = inf,
) -> list[Item]:
    """Run a group of items of one encoder with the same next layer, for this many steps.

    Runs until each item has exited, been dropped, or been preempted and requeued, as all are after the last step. Calls
    `occupy(seconds)` before each stretch that cannot be preempted, and `finish` with the results as they come. Items
    that join are added to `items`. If the group fails, returns the unfinished items, which must run alone from the
    start; otherwise an empty list. threads: number of engine threads.
    """
    group = list(items)  # the items that are neither finished nor requeued
    try:
        if group[0].layer == 0:
            occupy(MAX_STEP_S)
            _begin(group, queue, finish)
        while group:
            _step(group, queue, occupy, finish)
            steps -= 1
            if steps <= 0:
                queue.requeue(*group)
                break
            if group:
                before = len(group)
                queue.join(group, threads)
                items += group[before:]
    except BaseException:  # one item caused it, and will fail again when each runs alone
        failures.exception("a group of texts failed; each runs alone")
        for item in group:
            item.restart()
        return group
    return []


def _begin(
    group: list[Item], queue: WorkQueue, finish: Callable[[Sequence[tuple[Item, Result]]], None]
) -> None:
    """Tokenize a group. Dropped and failed items leave it; items too long for it are requeued, to run alone."""
    started = perf_counter()
    items, served = list(group), group[0].shared.deepest
    model = served.model
    has_layouts = any(item.job.plan.has_layouts for item in items)
    pairs = [(item.text.text, item.text.text_pair) for item in items]
    encodings = model.tokenizer.encode(pairs, offsets=has_layouts)
    ready: list[Item] = []
    too_long: list[Item] = []
    failed: list[tuple[Item, Result]] = []
    seconds = 0.0
    for item, encoding in zip(items, encodings, strict=True):
        plan = item.job.plan
        if item.job.is_dropped:
            continue
        if plan.windows > 1 and len(encoding) > model.tokenizer.max_tokens:
            too_long.append(item)
            continue
        try:
            texts = item.text.text, item.text.text_pair
            tokens = model.tokenizer.short(encoding, texts, plan.truncate, plan.has_layouts)
        except ValueError as error:
            failed.append((item, too_long_error(item, error)))
            continue
        size = len(tokens)
        layer_s = served.timing.layer_s(size)
        if ready and seconds + layer_s > OVERRUN * MAX_STEP_S:
            too_long.append(item)
            continue
        seconds += layer_s
        item.group_s = served.group_s(size)
        item.start(tokens)
        item.num_tokens, item.is_grouped = size, True
        ready.append(item)
    spent = (perf_counter() - started) / len(items)
    for item in items:  # includes failed and requeued items
        item.tokenize_s = spent
    queue.charge([(item, spent) for item in items])
    for item in too_long:
        item.is_short = False
    group[:] = ready
    if failed:
        finish(failed)
    if too_long:
        queue.requeue(*too_long)


def _step(
    group: list[Item],
    queue: WorkQueue,
    occupy: Callable[[float], None],
    finish: Callable[[Sequence[tuple[Item, Result]]], None],
) -> None:
    """Run as many layers as fit into a step. Items that have exited or were dropped or preempted leave the group."""
    items, served = list(group), group[0].shared.deepest
    forward, first = group[0].shared.encoder.forward, group[0].layer
    assert forward is not None
    passes, layer_s = list[ForwardPass](), 0.0
    for item in items:
        if (one := item.forward) is not None:
            passes.append(one)
            layer_s += served.timing.layer_s(item.num_tokens)
    layers = max(1, int(MAX_STEP_S / layer_s)) if layer_s > 0 else MAX_LAYERS
    occupy(layer_s * layers)
    # The time of the embeddings is negligible.
    forward(passes, layers + (first == 0))
    left: list[tuple[Item, Result]] = []
    staying: list[Item] = []
    charged = list[tuple[Item, float]]()
    for item, one in zip(items, passes, strict=True):
        charged.append((item, one.seconds - item.model_s))
        item.model_s, item.layer = one.seconds, one.layer
        if one.is_done:
            left.append((item, outcomes_of(item)))
        else:
            staying.append(item)
    queue.charge(charged)
    group[:] = staying
    if left:
        finish(left)
    if not staying:
        return
    for item in staying:
        if item.job.is_dropped:
            item.forward = None
    group[:] = [item for item in staying if item.forward is not None]
    # Checked after all are charged: otherwise a client's first text would stay, and its others would be preempted.
    preempted = [item for item in group if queue.has_more_urgent_than(item)]
    group[:] = [item for item in group if item not in preempted]
    if preempted:
        queue.requeue(*preempted)
