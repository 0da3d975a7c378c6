"""How an audit runs: through all layers in few calls of the kernels, every exit evaluated.

In Python the exits of one text take the GIL for as long as several requests do.
"""

from collections.abc import Callable

from model_store.segments import ForwardPass
from server.engine.group import outcome_of_pass
from server.engine.queue import WorkQueue
from server.engine.work import Item, Outcome

STEP_S = 0.001  # a request that comes waits as long, unless one layer takes longer


def run_audit(item: Item, queue: WorkQueue, occupy: Callable[[float], None]) -> Outcome | None:
    """Run a text that was tokenized before to full depth, with the kernels; calls and result as of `run.run`."""
    job, rule, tokens = item.job, item.rule, item.tokens
    through, timing = job.model.through, job.served.timing
    assert through is not None and tokens is not None
    if item.forward is None:
        thresholds = rule.thresholds.table if rule.thresholds is not None else None
        deepest = job.model.manifest.num_layers
        item.forward = ForwardPass(tokens, rule.tau, rule.signal, deepest, True, thresholds=thresholds)
        item.num_tokens = len(tokens)
    one, layer_s = item.forward, timing.layer_s(len(tokens))
    layers = max(1, int(STEP_S / layer_s)) if layer_s > 0 else job.model.manifest.num_layers
    while True:
        occupy(layer_s * layers)
        through([one], None, layers + (one.layer == 0))  # the embeddings take next to no time
        item.model_s = one.seconds
        if one.exit_layer >= 0:
            item.forward = None  # its hidden states
            return outcome_of_pass(item, one)
        if job.is_dropped:
            return None
        if queue.has_more_urgent_than(item):
            queue.requeue(item)
            return None
