"""Runs one text by itself: tokenizes it, then runs layer after layer until it exits.

The windows of a text that has several run one after the other, until its answer is settled (`exits/windows.py`).
"""

from collections.abc import Callable
from time import perf_counter

from de3.exits.reading import SpansReading
from de3.model_store.segments import Tokens
from de3.runtime.engine.head import Head
from de3.runtime.engine.job import Item
from de3.runtime.engine.outcome import Decisive, Outcome, Window
from de3.runtime.engine.queue import WorkQueue
from de3.runtime.errors import RequestError


def run(
    item: Item, queue: WorkQueue, occupy: Callable[[float], None] = lambda _: None
) -> list[Outcome] | None:
    """Run one text through the layers until it exits, window by window if it has several; returns an outcome per head.

    Returns None if its job was dropped, or if it was preempted and requeued. Raises RequestError if it has no tokens,
    is too long and must not be truncated, or is a pair that cannot be split into windows. Calls `occupy(seconds)`
    before each stretch that cannot be preempted.
    """
    if item.forward is None and not _tokenize(item, queue, occupy):
        return None
    while _run_layers(item, queue, occupy):
        if item.windows is None or not item.next_window():
            return outcomes_of(item)
        if item.job.is_dropped:
            return None
        if queue.has_more_urgent_than(item):
            queue.requeue(item)
            return None
    return None


def _run_layers(item: Item, queue: WorkQueue, occupy: Callable[[float], None]) -> bool:
    """Run a text, or its current window, through the layers until it exits; False where run() returns None."""
    job, forward = item.job, item.forward
    assert forward is not None
    shared = item.shared
    layer_s, run_layer = shared.deepest.timing.layer_s(len(forward.tokens)), shared.encoder.layer_by_layer
    while True:
        is_due = item.ends is not None and perf_counter() + layer_s > item.ends
        if is_due and all(head.has_answer for head in item.heads):
            forward.end("deadline")
            return True
        occupy(layer_s)
        if forward.layer == 0:
            item.num_tokens += len(forward.tokens)
        before = forward.seconds
        run_layer([forward], layers=1)
        spent = forward.seconds - before
        item.model_s += spent
        item.layer = forward.layer
        if forward.is_done or job.is_dropped:
            queue.charge([(item, spent)])
            return forward.is_done
        if queue.has_more_urgent_than(item, spent):
            queue.requeue(item)
            return False


def outcomes_of(item: Item) -> list[Outcome]:
    """The outcomes of an item that exited, one for each head; releases its forward pass.

    The first readings of heads that are sampled are added to the drift sample.
    """
    outcomes = [_outcome_of(item, head) for head in item.heads]
    item.forward = None
    return outcomes


def _outcome_of(item: Item, head: Head) -> Outcome:
    decision, forward = head.decision, item.forward
    assert decision is not None and decision.reason is not None and forward is not None
    head.decision = None
    passed, ran, num_windows, combination, decisive = decision.readings, list[Window](), 1, None, None
    tokens, model_s = item.num_tokens, decision.seconds
    if head.windows is not None and item.windows is not None:
        ran, num_windows = head.windows.ran, len(item.windows)
        tokens, model_s = head.windows.tokens, head.windows.model_s
        passed, combination = [r for window in ran for r in window.passed], head.windows.combination
        if (number := combination.decisive) is not None:
            decisive = Decisive(number, *item.windows.chars(number))
    reading = passed[-1]  # at a deadline: the deepest answer so far
    if combination is not None:
        reading = combination.reading(last=reading)
    if isinstance(reading, SpansReading):
        for one in (*passed, reading):
            one.finish()  # here and not on the event loop, which a long text would block for 0.1 s
    pending_s = perf_counter() - item.job.submitted - item.tokenize_s - item.model_s
    if head.is_sampled and head.part.monitor is not None:
        head.part.monitor.sample(passed[0])
    return Outcome(
        layer=reading.layer,
        reason=decision.reason,
        rule=decision.rule,
        reading=reading,
        passed=passed,
        tokens=tokens,
        truncated=forward.tokens.truncated,
        queue_s=0.0 if item.job.is_shadow else pending_s,  # shadow jobs report no queue time
        tokenize_s=item.tokenize_s,
        model_s=model_s,
        is_far=decision.is_far,
        windows=ran,
        num_windows=num_windows,
        decisive=decisive,
        end=forward.tokens.end if item.windows is None else item.windows.end,
    )


def _tokenize(item: Item, queue: WorkQueue, occupy: Callable[[float], None]) -> bool:
    """Tokenize a text piece by piece; returns False if its job was dropped, or if it was preempted and requeued.

    Raises RequestError if it has no tokens, if it is too long and must not be truncated, or if it is a pair that cannot
    be split into windows.
    """
    job, text, plan, deepest = item.job, item.text, item.job.plan, item.shared.deepest
    if item.tokenization is None:
        item.tokenization = deepest.model.tokenizer.start(
            text.text, text.text_pair, plan.truncate, plan.windows, plan.has_layouts
        )
    while True:
        occupy(deepest.timing.piece_s)
        started = perf_counter()
        try:
            tokens = item.tokenization.step()
        except ValueError as error:
            queue.charge([(item, perf_counter() - started)])
            raise too_long_error(item, error) from None
        finally:
            spent = perf_counter() - started
            item.tokenize_s += spent
        if tokens is not None:
            if isinstance(tokens, Tokens):
                item.start(tokens)
            else:
                item.is_short = False  # too long for a group
                item.start_windows(tokens)
            item.tokenization = None
            queue.charge([(item, spent)])
            return True
        if job.is_dropped:
            queue.charge([(item, spent)])
            return False
        if queue.has_more_urgent_than(item, spent):
            queue.requeue(item)
            return False


def too_long_error(item: Item, error: ValueError) -> RequestError:
    """The error for a text that cannot be tokenized, in most cases because it is longer than the model's limit."""
    field = item.job.request.name_of(item.index)
    return RequestError(f"{field}: {error}", field, "too_long")
