"""A group: short texts that run through the kernels together, a few layers a step; each is computed by itself.

A large model's weights then come from memory once for all of them. Between two steps the group shrinks as texts
leave, are dropped or preempted, and takes in pending ones that are before the same layer.
"""

import logging
from collections.abc import Callable, Sequence
from time import perf_counter

from de3.model_store.segments import ForwardPass
from de3.server.engine.queue import WorkQueue
from de3.server.engine.run import Result, exit_reason, outcome_of, too_long_error
from de3.server.engine.work import MAX_STEP_S, Item, Outcome

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

    Calls `occupy(seconds)` before each stretch that cannot be preempted, and `finish` with the results as they come.
    Those that join are added to `items`. Returns those that have to run alone, from the start, as their group failed.
    """
    group = list(items)  # those that are neither finished nor requeued
    try:
        if group[0].layer == 0:
            occupy(MAX_STEP_S)
            _begin(group, queue, finish)
        while group:
            _step(group, queue, occupy, finish)
            if group:
                before = len(group)
                queue.join(group, threads)
                items += group[before:]
    except BaseException:  # one of them; which one shows when each runs alone
        log.exception("a group of texts failed; each runs alone")
        for item in group:
            item.restart()
    return group


def _begin(
    group: list[Item], queue: WorkQueue, finish: Callable[[Sequence[tuple[Item, Result]]], None]
) -> None:
    """Tokenize a group. Items that turn out to be too long for it leave it and are requeued, to run alone."""
    started = perf_counter()
    items, served = list(group), group[0].job.served
    model, monitor = served.model, items[0].job.monitor
    encodings = model.tokenizer.encode([(item.text.text, item.text.text_pair) for item in items])
    ready: list[Item] = []
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
        layer_s = served.timing.layer_s(len(tokens))
        if ready and seconds + layer_s > OVERRUN * MAX_STEP_S:
            too_long.append(item)
            continue
        seconds += layer_s
        deepest, caution = model.deepest_exit(rule.max_layer), monitor.caution if monitor else 1.0
        thresholds = rule.thresholds.table if rule.thresholds is not None else None
        item.tokens, item.num_tokens, item.group_s = tokens, len(tokens), served.group_s(len(tokens))
        item.forward = ForwardPass(
            tokens, rule.tau, rule.signal, deepest, item.asks_all_exits, caution, thresholds
        )
        ready.append(item)
    spent = (perf_counter() - started) / len(items)
    for item in items:  # those that fail or do not run have cost it, too
        item.tokenize_s = spent
        queue.charge(item.job, spent)
    for item in too_long:
        item.is_short = False
    group[:] = ready
    finish(failed)
    queue.requeue(*too_long)


def _step(
    group: list[Item],
    queue: WorkQueue,
    occupy: Callable[[float], None],
    finish: Callable[[Sequence[tuple[Item, Result]]], None],
) -> None:
    """Run as many layers as fit into a step. Items that have left, were dropped or preempted leave the group."""
    items, served, monitor = list(group), group[0].job.served, group[0].job.monitor
    through, first = served.model.through, group[0].layer
    assert through is not None
    passes = [item.forward for item in items if item.forward is not None]
    layer_s = sum(served.timing.layer_s(len(p.tokens)) for p in passes)
    layers = max(1, int(MAX_STEP_S / layer_s)) if layer_s > 0 else served.model.manifest.num_layers
    occupy(layer_s * layers)
    # The embeddings take next to no time.
    through(passes, monitor.limits if monitor else None, layers + (first == 0))
    left: list[tuple[Item, Result]] = []
    for item, one in zip(items, passes, strict=True):
        spent, item.model_s, item.layer = one.seconds - item.model_s, one.seconds, one.layer
        queue.charge(item.job, spent)
        if one.exit_layer >= 0:
            left.append((item, outcome_of_pass(item, one)))
    group[:] = [item for item in items if item.forward is not None and item.forward.exit_layer < 0]
    finish(left)
    for item in items:
        if item.job.is_dropped or item not in group:
            item.forward = None  # its hidden states
    group[:] = [item for item in group if item.forward is not None]
    # All have been charged: else the first of a client's texts would stay, and the others go.
    preempted = [item for item in group if queue.has_more_urgent_than(item)]
    group[:] = [item for item in group if item not in preempted]
    queue.requeue(*preempted)


def outcome_of_pass(item: Item, one: ForwardPass) -> Outcome:
    """The outcome of a pass through the kernels, which decided where it left."""
    manifest = item.job.model.manifest
    asked = [one.exit_layer]
    if item.asks_all_exits:
        asked = [m for m in manifest.exit_layers if m <= one.exit_layer]
    for layer in asked:
        distances = one.distances[layer].tolist() if layer in manifest.prototype_layers else None
        item.record(item.rule.read(layer, one.logits[layer].tolist(), distances))
    return outcome_of(item, exit_reason(item, one.deepest))
