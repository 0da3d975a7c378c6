"""How a text runs by itself: tokenized, then layer by layer until it exits.

A text with several windows runs them one after the other, until its answer is settled (`exits/windows.py`).
"""

from collections.abc import Callable
from time import perf_counter

from de3.exits.rule import ExitReason
from de3.exits.windows import EXPECTED_CHANGE
from de3.model_store.segments import Tokens
from de3.server.engine.queue import WorkQueue
from de3.server.engine.work import Item, Outcome
from de3.server.errors import RequestError

Result = Outcome | Exception


def run(item: Item, queue: WorkQueue, occupy: Callable[[float], None] = lambda _: None) -> Outcome | None:
    """Run one text through the layers until it exits, window by window if it has several. Calls `occupy(seconds)`
    before each stretch that cannot be preempted.

    None if its job was dropped, or if it was preempted and requeued. Raises RequestError if it is too long.
    """
    if item.tokens is None and not _tokenize(item, queue, occupy):
        return None
    while True:
        reason = _run_layers(item, queue, occupy)
        if reason is None:
            return None
        if item.combination is None:
            return outcome_of(item, reason)
        item.end_window()
        change = EXPECTED_CHANGE if item.rule.tau > 0 else 1.0
        if reason == "deadline" or item.combination.is_settled(change):
            return outcome_of(item, reason)
        if item.job.is_dropped:
            return None
        if queue.has_more_urgent_than(item):
            queue.requeue(item)
            return None


def _run_layers(item: Item, queue: WorkQueue, occupy: Callable[[float], None]) -> ExitReason | None:
    """Run a text's window through the layers until it exits, and say why; None as in run()."""
    job, model, rule = item.job, item.job.model, item.job.choice.rule
    assert item.tokens is not None
    started = last = perf_counter()
    deepest = model.deepest_exit(rule.max_layer)
    # At τ = 0 only the deepest exit is needed.
    may_leave_early = rule.tau > 0 or item.asks_all_exits
    layer_s = job.served.timing.layer_s(len(item.tokens))
    reason: ExitReason | None = None
    for layer in range(item.layer, deepest + 1):
        if item.ends is not None and item.has_answer and perf_counter() + layer_s > item.ends:
            reason = "deadline"
            break
        occupy(layer_s)
        segment = model.segments[layer]
        asked = segment.is_exit and (may_leave_early or layer == deepest)
        if item.hidden is None:
            item.num_tokens += len(item.tokens)
            step = segment.embed(item.tokens, asked)
        else:
            step = segment.run(item.hidden, asked)
        item.hidden = step.hidden
        if step.logits is not None:
            distances = None if step.distances is None else step.distances.tolist()
            item.record(rule.read(layer, step.logits.tolist(), distances))
            reason = exit_reason(item, deepest)
            if reason:
                break
        now = perf_counter()
        last, spent = now, now - last
        if job.is_dropped:
            queue.charge(job, spent)
            return None
        if queue.has_more_urgent_than(item, spent):
            item.layer = layer + 1
            item.model_s += now - started
            queue.requeue(item)
            return None
    now = perf_counter()
    item.model_s += now - started
    queue.charge(job, now - last)
    item.hidden = None
    return reason


def exit_reason(item: Item, deepest: int) -> ExitReason | None:
    """Why an item leaves at the exit that it passed last; None if it does not."""
    reading = item.passed[-1]
    if reading.layer == item.job.model.manifest.num_layers:
        return "last_layer"
    if item.rule.exits(reading.score):
        return "threshold"
    return "max_layer" if reading.layer == deepest else None


def outcome_of(item: Item, reason: ExitReason | None) -> Outcome:
    """The outcome of an item that left."""
    assert item.tokens is not None and reason is not None
    passed, num_windows = item.passed, 1
    if item.windows is not None:
        passed, num_windows = [r for window in item.ran for r in window.passed], len(item.windows)
    reading = passed[-1]  # at a deadline: the deepest answer so far
    if item.combination is not None:
        reading = item.combination.reading(last=reading)
    pending_s = perf_counter() - item.job.submitted - item.tokenize_s - item.model_s
    if item.is_sampled and item.job.monitor is not None:
        item.job.monitor.sample(passed[0])
    return Outcome(
        layer=reading.layer,
        reason=reason,
        reading=reading,
        passed=passed,
        tokens=item.num_tokens,
        truncated=item.tokens.truncated,
        queue_s=0.0 if item.job.is_shadow else pending_s,  # shadow jobs report no queue time
        tokenize_s=item.tokenize_s,
        model_s=item.model_s,
        is_far=item.is_far,
        windows=item.ran,
        num_windows=num_windows,
    )


def _tokenize(item: Item, queue: WorkQueue, occupy: Callable[[float], None]) -> bool:
    """Tokenize a text piece by piece; False if its job was dropped or it was preempted. Raises RequestError
    if it is too long and may not be truncated."""
    job, text = item.job, item.text
    if item.tokenization is None:
        request = job.request
        item.tokenization = job.model.tokenizer.start(
            text.text, text.text_pair, request.truncate, request.windows
        )
    while True:
        occupy(job.served.timing.piece_s)
        started = perf_counter()
        try:
            tokens = item.tokenization.step()
        except ValueError as error:
            queue.charge(job, perf_counter() - started)
            raise too_long_error(item, error) from None
        finally:
            spent = perf_counter() - started
            item.tokenize_s += spent
        if tokens is not None:
            if isinstance(tokens, Tokens):
                item.tokens = tokens
            else:
                item.split(tokens)
            item.tokenization = None
            queue.charge(job, spent)
            return True
        if job.is_dropped:
            queue.charge(job, spent)
            return False
        if queue.has_more_urgent_than(item, spent):
            queue.requeue(item)
            return False


def too_long_error(item: Item, error: ValueError) -> RequestError:
    """What to tell of a text that is longer than the model takes."""
    field = item.job.request.name_of(item.index)
    return RequestError(f"{field}: {error}", field, "too_long")
