"""How audits run: some together, through all layers in few calls of the kernels, every exit evaluated.

An audit by itself would take the GIL as often as a request does, and for longer.
"""

from collections.abc import Callable, Sequence

from model_store.segments import ForwardPass
from server.engine.group import outcome_of_pass
from server.engine.queue import WorkQueue
from server.engine.work import Item, Outcome

STEP_S = 0.001  # a request that comes waits as long at most, unless one layer takes longer


def run_audits(
    items: Sequence[Item], queue: WorkQueue, occupy: Callable[[float], None]
) -> list[tuple[Item, Outcome | None]]:
    """Run texts that were tokenized before to full depth, with the kernels; all are of one model, before one layer.

    Calls `occupy(seconds)` before each stretch that cannot be preempted. An outcome is None if the item's job was
    dropped, or if it was preempted and requeued.
    """
    served, rule = items[0].job.served, items[0].rule
    through, timing, num_layers = served.model.through, served.timing, served.model.manifest.num_layers
    assert through is not None
    thresholds = rule.thresholds.table if rule.thresholds is not None else None
    passes = []
    for item in items:
        assert item.tokens is not None
        if item.forward is None:
            item.num_tokens = len(item.tokens)
            item.forward = ForwardPass(
                item.tokens, rule.tau, rule.signal, num_layers, True, thresholds=thresholds
            )
        passes.append(item.forward)
    layer_s = sum(timing.layer_s(len(one.tokens)) for one in passes)
    layers = max(1, int(STEP_S / layer_s)) if layer_s > 0 else num_layers
    while True:
        occupy(layer_s * layers)
        through(passes, None, layers + (passes[0].layer == 0))  # the embeddings take next to no time
        for item, one in zip(items, passes, strict=True):
            item.layer, item.model_s = one.layer, one.seconds
        if passes[0].layer > num_layers:
            for item in items:
                item.forward = None  # its hidden states
            return [(item, outcome_of_pass(item, one)) for item, one in zip(items, passes, strict=True)]
        if queue.has_more_urgent_than(items[0]):
            queue.requeue(*items)
            return [(item, None) for item in items]
