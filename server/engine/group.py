"""A group: short texts that run through the kernels together, a few layers a step; each is computed by itself.

A large model's weights then come from memory once for all of them. Between two steps the group shrinks as texts
leave, are dropped or preempted, and takes in pending ones that are before the same layer.
"""

import logging
from collections.abc import Callable, Sequence
from time import perf_counter

from model_store.segments import ForwardPass
from server.engine.queue import WorkQueue
from server.engine.run import Result, exit_reason, outcome_of, too_long_error
from server.engine.work import MAX_STEP_S, Item, Outcome

log = logging.getLogger("de3.engine")

OVERRUN = 1.5  # of MAX_STEP_S, once the tokens of a group are known


def run_group(
    items: list[Item],
    queue: WorkQueue,
    threads: int,
    occupy: Callable[[float], None],
    finish: Callable[[Sequence[tuple[Item, Result]]], None],
) -> list[Item]:
    """Run items of one model, before the same layer, until each has left, was dropped, or was preempted and requeued.

    Calls `occupy(seconds)` before each step, and `finish` with the results as they come. Those that join are added to
    `items`. Returns those that have to run alone, from the start, as their group failed.
    """
    group = list(items)
    try:
        if group[0].layer == 0:
            group = _begin(group, queue, finish)
        while group:
            group = _step(group, queue, occupy, finish)
            if group:
                joined = list(group)
                queue.join(joined, threads)
                items += joined[len(group) :]
                group = joined
    except BaseException:  # one of them; which one shows when each runs alone
        log.exception("a group of texts failed; each runs alone")
        for item in group:
            item.restart()
        return group
    return []


def _begin(
    items: list[Item], queue: WorkQueue, finish: Callable[[Sequence[tuple[Item, Result]]], None]
) -> list[Item]:
    """Tokenize items; the group that remains. Those that turn out to be too long for it are requeued, to run alone."""
    started = perf_counter()
    served = items[0].job.served
    model, monitor = served.model, items[0].job.monitor
    encodings = model.tokenizer.encode([(item.text.text, item.text.text_pair) for item in items])
    group: list[Item] = []
    too_long: list[Item] = []
    failed: list[tuple[Item, Result]] = []
    seconds = 0.0
    for item, encoding in zip(items, encodings, strict=True):
        job, rule = item.job, item.job.choice.rule
        if job.is_dropped:
            continue
        if job.request.windows > 1 and len(encoding) > model.tokenizer.max_tokens:
            too_long.append(item)
            continue
        try:
            tokens = model.tokenizer.short(encoding, item.text.text_pair is not None, job.request.truncate)
        except ValueError as error:
            failed.append((item, too_long_error(item, error)))
            continue
        seconds += served.timing.layer_s(len(tokens))
        if group and seconds > OVERRUN * MAX_STEP_S:
            too_long.append(item)
            continue
        deepest, caution = model.deepest_exit(rule.max_layer), monitor.caution if monitor else 1.0
        thresholds = rule.thresholds.table if rule.thresholds is not None else None
        item.tokens, item.num_tokens = tokens, len(tokens)
        item.forward = ForwardPass(
            tokens, rule.tau, rule.signal, deepest, item.asks_all_exits, caution, thresholds
        )
        group.append(item)
    spent = (perf_counter() - started) / len(items)
    for item in items:  # those that fail or do not run have cost it, too
        item.tokenize_s = spent
        queue.charge(item.job, spent)
    if failed:
        finish(failed)
    for item in too_long:  # last: from here on another thread may run them
        item.is_short = False
        queue.requeue(item)
    return group


def _step(
    group: list[Item],
    queue: WorkQueue,
    occupy: Callable[[float], None],
    finish: Callable[[Sequence[tuple[Item, Result]]], None],
) -> list[Item]:
    """Run as many layers as fit into a step; the group that remains."""
    served, monitor = group[0].job.served, group[0].job.monitor
    through = served.model.through
    assert through is not None
    passes = [item.forward for item in group if item.forward is not None]
    layer_s = sum(served.timing.layer_s(len(p.tokens)) for p in passes)
    most = served.model.manifest.num_layers + 1 - group[0].layer
    layers = min(most, max(1, int(MAX_STEP_S / layer_s))) if layer_s > 0 else most
    occupy(layer_s * layers)
    through(passes, monitor.limits if monitor else None, layers)
    spent = [one.seconds - item.model_s for item, one in zip(group, passes, strict=True)]
    for item, one in zip(group, passes, strict=True):
        item.model_s, item.layer = one.seconds, one.layer
    left = {item: _outcome(item, one) for item, one in zip(group, passes, strict=True) if one.exit_layer >= 0}
    finish(list(left.items()))
    staying = []
    for item, seconds in zip(group, spent, strict=True):
        if item in left or item.job.is_dropped:
            queue.charge(item.job, seconds)
        elif queue.has_more_urgent_than(item, seconds):
            queue.requeue(item)
        else:
            staying.append(item)
    return staying


def _outcome(item: Item, one: ForwardPass) -> Outcome:
    """The outcome of a pass through the kernels, which decided where it left."""
    manifest = item.job.model.manifest
    asked = [one.exit_layer]
    if item.asks_all_exits:
        asked = [m for m in manifest.exit_layers if m <= one.exit_layer]
    for layer in asked:
        distances = one.distances[layer].tolist() if layer in manifest.prototype_layers else None
        item.record(item.rule.read(layer, one.logits[layer].tolist(), distances))
    return outcome_of(item, exit_reason(item, one.deepest))
