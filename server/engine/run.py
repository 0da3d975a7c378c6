"""Runs one text by itself: tokenizes it, then runs layer after layer until it exits.

The windows of a text that has several run one after the other, until its answer is settled (`exits/windows.py`).
"""

from collections.abc import Callable
from time import perf_counter

from de3.exits.rule import ExitReason
from de3.exits.windows import EXPECTED_CHANGE
from de3.model_store.segments import Tokens
from de3.server.engine.job import Item
from de3.server.engine.outcome import Decisive, Outcome
from de3.server.engine.queue import WorkQueue
from de3.server.errors import RequestError

Result = Outcome | Exception


def run(item: Item, queue: WorkQueue, occupy: Callable[[float], None] = lambda _: None) -> Outcome | None:
    """Run one text through the layers until it exits, window by window if it has several; returns its outcome.

    Returns None if its job was dropped, or if it was preempted and requeued. Raises RequestError if it has no tokens,
    is too long and must not be truncated, or is a pair that cannot be split into windows. Calls `occupy(seconds)`
    before each stretch that cannot be preempted.
    """
    progress = item.progress
    if progress.tokens is None and not _tokenize(item, queue, occupy):
        return None
    while True:
        reason = _run_layers(item, queue, occupy)
        if reason is None:
            return None
        if progress.windows is None:
            return outcome_of(item, reason)
        progress.end_window()
        change = EXPECTED_CHANGE if progress.rule.tau > 0 else 1.0
        if reason == "deadline" or progress.windows.combination.is_settled(change):
            return outcome_of(item, reason)
        if item.job.is_dropped:
            return None
        if queue.has_more_urgent_than(item):
            queue.requeue(item)
            return None


def _run_layers(item: Item, queue: WorkQueue, occupy: Callable[[float], None]) -> ExitReason | None:
    """Run a text, or its current window, through the layers until it exits; returns the reason, or None as in run()."""
    job, model, rule, progress = item.job, item.job.model, item.job.choice.rule, item.progress
    assert progress.tokens is not None
    started = last = perf_counter()
    deepest = model.deepest_exit(rule.max_layer)
    # At τ = 0 only the deepest exit is needed.
    may_leave_early = rule.tau > 0 or item.asks_all_exits
    layer_s = job.served.timing.layer_s(len(progress.tokens))
    reason: ExitReason | None = None
    for layer in range(progress.layer, deepest + 1):
        if item.ends is not None and progress.has_answer and perf_counter() + layer_s > item.ends:
            reason = "deadline"
            break
        occupy(layer_s)
        segment = model.segments[layer]
        asked = segment.is_exit and (may_leave_early or layer == deepest)
        if progress.hidden is None:
            progress.num_tokens += len(progress.tokens)
            step = segment.embed(progress.tokens, asked)
        else:
            step = segment.run(progress.hidden, asked)
        progress.hidden = step.hidden
        if progress.states is not None and layer < len(progress.states):
            progress.states[layer] = model.pooled(step.hidden)
        if step.logits is not None:
            distances = None if step.distances is None else step.distances.tolist()
            progress.record(rule.read(layer, step.logits.tolist(), distances), job.monitor)
            reason = _exit_reason(item, deepest)
            if reason:
                break
        now = perf_counter()
        last, spent = now, now - last
        if job.is_dropped:
            queue.charge((job, spent))
            return None
        if queue.has_more_urgent_than(item, spent):
            progress.layer = layer + 1
            progress.model_s += now - started
            queue.requeue(item)
            return None
    now = perf_counter()
    progress.model_s += now - started
    queue.charge((job, now - last))
    progress.hidden = None
    return reason


def _exit_reason(item: Item, deepest: int) -> ExitReason | None:
    """The reason for a text to exit at the exit that was just evaluated; None if it continues."""
    reading = item.progress.passed[-1]
    if reading.layer == item.job.model.manifest.num_layers:
        return "last_layer"
    if item.progress.rule.exits(reading.score):
        return "threshold"
    return "max_layer" if reading.layer == deepest else None


def outcome_of(item: Item, reason: ExitReason) -> Outcome:
    """The outcome of an item that exited. If the item is sampled, also adds its first reading to the drift sample."""
    progress = item.progress
    assert progress.tokens is not None
    passed, ran, num_windows, combination, decisive = progress.passed, [], 1, None, None
    if progress.windows is not None:
        ran, num_windows = progress.windows.ran, len(progress.windows.all)
        passed, combination = [r for window in ran for r in window.passed], progress.windows.combination
        if item.job.flag is not None:
            decisive = Decisive(combination.decisive, *progress.windows.all.chars(combination.decisive))
    reading = passed[-1]  # at a deadline: the deepest answer so far
    if combination is not None:
        reading = combination.reading(last=reading)
    pending_s = perf_counter() - item.job.submitted - progress.tokenize_s - progress.model_s
    if item.is_sampled and item.job.monitor is not None:
        item.job.monitor.sample(passed[0])
    return Outcome(
        layer=reading.layer,
        reason=reason,
        rule=progress.rule,
        reading=reading,
        passed=passed,
        tokens=progress.num_tokens,
        truncated=progress.tokens.truncated,
        queue_s=0.0 if item.job.is_shadow else pending_s,  # shadow jobs report no queue time
        tokenize_s=progress.tokenize_s,
        model_s=progress.model_s,
        is_far=progress.is_far,
        windows=ran,
        num_windows=num_windows,
        decisive=decisive,
    )


def _tokenize(item: Item, queue: WorkQueue, occupy: Callable[[float], None]) -> bool:
    """Tokenize a text piece by piece; returns False if its job was dropped, or if it was preempted and requeued.

    Raises RequestError if it has no tokens, if it is too long and must not be truncated, or if it is a pair that cannot
    be split into windows.
    """
    job, text, progress = item.job, item.text, item.progress
    if progress.tokenization is None:
        request = job.request
        progress.tokenization = job.model.tokenizer.start(
            text.text, text.text_pair, request.truncate, request.windows
        )
    while True:
        occupy(job.served.timing.piece_s)
        started = perf_counter()
        try:
            tokens = progress.tokenization.step()
        except ValueError as error:
            queue.charge((job, perf_counter() - started))
            raise too_long_error(item, error) from None
        finally:
            spent = perf_counter() - started
            progress.tokenize_s += spent
        if tokens is not None:
            if isinstance(tokens, Tokens):
                item.start(tokens)
            else:
                progress.split(tokens, job.flag)
                item.is_short = False  # too long for a group
            progress.tokenization = None
            queue.charge((job, spent))
            return True
        if job.is_dropped:
            queue.charge((job, spent))
            return False
        if queue.has_more_urgent_than(item, spent):
            queue.requeue(item)
            return False


def too_long_error(item: Item, error: ValueError) -> RequestError:
    """The error for a text that cannot be tokenized, in most cases because it is longer than the model's limit."""
    field = item.job.request.name_of(item.index)
    return RequestError(f"{field}: {error}", field, "too_long")
