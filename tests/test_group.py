"""Groups: texts that share steps exit, join and are preempted between layers; answers are the same as alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partialmethod
from pathlib import Path
from threading import Event, current_thread
from typing import Any
from unittest import mock

import pytest

from de3.exits.rule import ExitRule
from de3.exits.signals import Edr
from de3.model_store.forward import NativeForward
from de3.model_store.model import Model
from de3.model_store.store import Store
from de3.model_store.tokenizer import PIECE
from de3.runtime.engine.engine import Engine
from de3.runtime.engine.group import run_group
from de3.runtime.engine.job import Item, Job, Result
from de3.runtime.engine.queue import WorkQueue
from de3.runtime.engine.run import run
from de3.runtime.engine.served import MAX_STEP_S
from de3.runtime.errors import RequestError
from tests import jobs
from tests.serving import until

pytestmark = pytest.mark.usefixtures("kernels")
TEXTS = ["good", "a dull film and it was bad", "it was not bad", "fine", "a good plot , but dull people"]
SHARE = MAX_STEP_S / 8


@pytest.fixture(scope="module")
def model(kernels: Any, store: Path) -> Model:
    return Model(Store(store).open("tiny-int8"), "native")


def job(
    model: Model, texts: list[str] = TEXTS, due: float = 0.0, layer_s: float = 0.0, **options: Any
) -> Job:
    """A job of texts that are all due at `due`.

    layer_s: seconds that a layer takes for one text; 0: a step has time for one layer of all texts.
    """
    layer_s = layer_s or MAX_STEP_S / len(texts)
    return jobs.job(
        texts, [0.0] * len(texts), model=model, group_s=SHARE, layer_s=layer_s, submitted=due, **options
    )


class Steps:
    """Runs a group; before step n it calls `before[n]`, if that exists.

    Attributes:
        seconds: time reserved for each step, tokenizing included.
        results: result of each item that has finished.
        alone: items that must run alone because their group failed.
    """

    def __init__(self, queue: WorkQueue, before: dict[int, Any] | None = None) -> None:
        self.queue, self.before = queue, before or {}
        self.seconds, self.results, self.alone = list[float](), dict[Item, Result](), list[Item]()

    def run(self) -> list[Item]:
        items = self.queue.next()
        self.alone = run_group(items, self.queue, 1, self.occupy, self.results.update)
        return items

    def occupy(self, seconds: float) -> None:
        self.before.get(len(self.seconds), lambda: None)()
        self.seconds.append(seconds)


class Charged(WorkQueue):
    charged = 0.0

    def charge(self, spent: Sequence[tuple[Job, float]]) -> None:
        self.charged += sum(seconds for _, seconds in spent)
        super().charge(spent)


def queue_of(*jobs: Job) -> WorkQueue:
    queue = WorkQueue(100)
    for one in jobs:
        queue.put(one)
    return queue


def answers(results: dict[Item, Result], number: int = 0) -> dict[str, Any]:
    """The exit layer, reason, τ, OOD flag and readings of each text, bit for bit, by text.

    Of the exits before the last, the kernels give only what decides. number: index of the model among those that answer
    on one pass.
    """
    found = {}
    for item, outcomes in results.items():
        assert isinstance(outcomes, list)
        outcome = outcomes[number]
        decision = outcome.layer, outcome.reason, outcome.rule.tau, outcome.is_far
        before = [(r.layer, r.label, r.margin, r.score, r.nearest) for r in outcome.passed[:-1]]
        found[item.text.text] = decision, before, outcome.passed[-1]
    return found


def alone(model: Model, texts: list[str], **options: Any) -> dict[str, Any]:
    return answers({item: run(item, WorkQueue(1)) or [] for item in job(model, texts, **options).items})


def test_long_texts_and_shadows_run_alone(model: Model) -> None:
    fits, long = job(model, ["a" * 2 * PIECE, "a" * (2 * PIECE + 1)]).items
    assert fits.can_share and not long.can_share
    assert not job(model, is_shadow=True).passes[0].in_groups


def test_all_layers_run_in_one_step_if_they_fit(model: Model) -> None:
    steps = Steps(queue_of(job(model, layer_s=MAX_STEP_S / 100)))
    steps.run()
    assert answers(steps.results) == alone(model, TEXTS)
    assert len(steps.seconds) == 2 and min(steps.seconds) > 0.9 * MAX_STEP_S  # one step tokenizes


def test_an_urgent_text_preempts_a_group_and_is_joined_by_it(model: Model) -> None:
    queue = Charged(100)
    queue.put(job(model, due=5.0))
    urgent = job(model, ["an urgent one"], due=1.0)
    steps = Steps(queue, {1: lambda: queue.put(urgent)})
    items = steps.run()
    assert len(steps.seconds) == 2 and not steps.results  # tokenized and one layer run, then preempted
    assert [item.layer for item in items] == [2] * len(TEXTS) and len(queue) == len(TEXTS) + 1
    later = Steps(queue)
    assert later.run() == [*urgent.items, *items]  # the group joined the urgent text before layer 2
    assert answers(later.results) == alone(model, ["an urgent one", *TEXTS]) and len(queue) == 0
    times = [(one.tokenize_s, one.model_s) for both in later.results.values() for one in both]  # type: ignore[union-attr]
    assert min(map(min, times)) > 0
    # Each step of a text is charged once, whether it ran before or after the preemption.
    assert queue.charged == pytest.approx(sum(map(sum, times)), rel=1e-9)


def test_several_models_exit_where_each_would_alone(model: Model) -> None:
    """Also if their pass is preempted, and if its group fails: then each text runs alone, from the start."""
    rules = [ExitRule(tau, model.manifest.signal("entropy", None)) for tau in (0.0, 0.9, 0.3)]

    def three(due: float) -> Job:
        return job(model, due=due, rule=rules[0], others=[job(model, rule=one) for one in rules[1:]])

    def fail() -> None:
        raise MemoryError

    queue = queue_of(three(5.0))
    preempted = Steps(queue, {1: lambda: queue.put(job(model, ["an urgent one"], due=1.0))})
    preempted.run()
    assert not preempted.results and len(queue) == len(TEXTS) + 1
    resumed = Steps(queue)
    del resumed.results[resumed.run()[0]]  # the urgent one's
    queue.put(three(5.0))
    failed, results = Steps(queue, {2: fail}), dict[Item, Result]()
    failed.run()
    assert len(failed.alone) == len(TEXTS) and not any(item.can_share for item in failed.alone)
    for item in failed.alone:
        results[item] = outcomes = run(item, queue) or []
        assert len({one.tokenize_s for one in outcomes}) == 1  # of one pass
    for number, rule in enumerate(rules):
        expected = alone(model, TEXTS, rule=rule)
        assert answers(resumed.results, number) == answers(results, number) == expected
    layers = [[one[0][0] for one in answers(results, number).values()] for number in range(len(rules))]
    assert len({tuple(each) for each in layers}) == len(rules)


def test_a_text_found_to_be_longer_than_a_step_is_resumed(model: Model) -> None:
    queue = queue_of(long := job(model, ["good"], due=5.0))
    long.passes[0].deepest.group_s = lambda _: 2 * MAX_STEP_S  # found once the text is tokenized
    steps = Steps(queue, {1: lambda: queue.put(job(model, ["an urgent one"], due=1.0))})
    (item,) = steps.run()
    assert item.layer == 2 and len(queue) == 2
    Steps(queue).run()
    rest = Steps(queue)
    assert rest.run() == [item] and answers(rest.results) == alone(model, ["good"])


def test_dropped_texts_leave_between_two_steps(model: Model) -> None:
    dropped, stays = job(model, TEXTS[:2], layer_s=SHARE), job(model, TEXTS[2:], layer_s=SHARE)
    queue = queue_of(dropped, stays)
    steps = Steps(queue, {2: lambda: queue.drop(dropped)})
    steps.run()
    assert steps.results.keys() == set(stays.items) and len(queue) == 0


def test_a_text_that_may_not_be_truncated_fails_alone(model: Model) -> None:
    new = job(model, ["good", "a film " * 40, "bad"], truncate=False)
    steps = Steps(queue_of(new))
    _, long, _ = steps.run()
    error = steps.results.pop(long)
    assert isinstance(error, RequestError) and error.field == "input[1]"
    assert answers(steps.results) == alone(model, ["good", "bad"])


def test_texts_that_turn_out_long_leave_their_group(model: Model) -> None:
    # Once the texts are tokenized, a layer of each turns out to take far longer than predicted.
    queue = queue_of(new := job(model, ["good", "bad", "dull"], layer_s=1.0))
    steps = Steps(queue)
    assert steps.run() == new.items and not steps.alone
    assert list(steps.results) == new.items[:1]
    assert [len(queue.next()) for _ in range(2)] == [1, 1]  # each alone, so it can be preempted


@pytest.mark.parametrize("first", [0, 2])
def test_at_its_deadline_a_text_ends_at_the_first_layer_where_every_model_has_an_answer(
    model: Model, first: int
) -> None:
    late = copy(model)
    late.exits = copy(model.exits)
    late.exits.layers = [layer for layer in model.exits.layers if layer >= first]
    rule = ExitRule(1e-9, model.manifest.signal("entropy", None))  # all exits are read; none is sure enough
    new = job(model, TEXTS[:1], rule=rule, others=[job(late, TEXTS[:1], rule=rule)])
    (item,) = new.items
    item.ends = 0.0
    outcomes = run(item, queue_of()) or []
    assert [(one.layer, one.reason) for one in outcomes] == [(first, "deadline")] * 2


class Loop:
    """An engine of one thread, and the callbacks for the event loop.

    Attributes:
        done: names of the threads that reported each job, and its error.
    """

    def __init__(self) -> None:
        self.engine, self.soon = Engine(1, 100), list[Callable[[], None]]()
        self.done = list[tuple[str, Exception | None]]()

    def submit(self, new: Job, then: Callable[[], object] = lambda: None) -> None:
        def done(error: Exception | None) -> None:
            self.done.append((current_thread().name, error))
            then()

        new.on_done = done
        self.engine.submit(new)

    def run(self) -> int:
        """Run all callbacks; returns their number."""
        ran = 0
        while self.soon:
            self.soon.pop(0)()
            ran += 1
        return ran


@pytest.fixture
def loop() -> Iterator[Loop]:
    """It ends with all jobs answered and nothing pending."""
    one = Loop()
    one.engine.start(call_soon=one.soon.append)
    until(lambda: one.engine.queue._waiting == 1, "the thread to wait")
    yield one
    one.engine.stop()
    assert len(one.engine.queue) == 0 and one.engine.problem() == "engine thread 0 has ended"


@contextmanager
def busy(loop: Loop, model: Model) -> Iterator[None]:
    """The thread is busy."""
    began, ends = Event(), Event()
    loop.submit(job(model, ["a" * (2 * PIECE + 1)]), lambda: (began.set(), ends.wait()))
    assert loop.run() <= 1
    assert began.wait(30)
    yield
    ends.set()


HERE = current_thread().name
RULE = ExitRule(1e-9, Edr(1.0))


def test_short_texts_run_on_the_event_loop_a_step_at_a_time(loop: Loop, model: Model) -> None:
    new = job(model, rule=RULE)  # a layer per step
    loop.submit(new)
    assert loop.soon and not loop.done
    assert loop.run() == model.manifest.num_layers
    assert loop.done == [(HERE, None)]
    assert answers({item: [outcome] for item in new.items if (outcome := item.heads[0].outcome)}) == alone(
        model, TEXTS, rule=RULE
    )
    loop.submit(job(model, ["a" * (2 * PIECE + 1)], rule=RULE))
    assert loop.run() == 1
    until(lambda: loop.done[1:] == [("engine-0", None)], "the thread to run a long text")
    loop.submit(job(model))
    assert not loop.soon
    until(lambda: loop.done[2:] == [("engine-0", None)], "the thread to run texts at full depth")


def test_a_busy_thread_takes_the_short_texts(loop: Loop, model: Model) -> None:
    with busy(loop, model):
        loop.submit(job(model, TEXTS[:1], rule=RULE))
        loop.run()
        assert len(loop.done) == len(loop.engine.queue) == 1
    until(lambda: loop.done[1:] == [("engine-0", None)], "the thread to run the short text")


def test_texts_that_the_event_loop_has_not_run_are_answered_at_the_end(loop: Loop, model: Model) -> None:
    for _ in range(2):
        loop.submit(job(model, rule=RULE))
    loop.soon[0]()  # one step
    loop.engine.stop()
    assert loop.done == [("engine-0", None)] * 2
    loop.run()


def test_while_the_event_loop_runs_texts_the_thread_waits(loop: Loop, model: Model) -> None:
    def run(one: NativeForward, forward: Any, *given: Any) -> None:
        queue = loop.engine.queue
        queue.put(jobs.job(["good"], [0.0], model=model, is_shadow=True))
        loop.submit(job(model, ["a" * (2 * PIECE + 1)], rule=RULE))
        queue._changed.acquire()
        queue._changed.notify()
        queue._changed.release()
        until(lambda: queue._waiting == 1, "the thread to wait again")
        forward(one, *given)
        assert (len(queue), len(queue._shadows)) == (1, 1)

    forward = NativeForward.__call__
    with mock.patch.object(NativeForward, "__call__", partialmethod(run, forward)):
        loop.submit(job(model, TEXTS[:1], layer_s=SHARE / 100, rule=RULE))
        loop.soon.pop(0)()
    assert loop.done[:1] == [(HERE, None)]
    loop.run()
    until(lambda: loop.done[1:] == [("engine-0", None)], "the thread to run a long text")
    until(lambda: not loop.engine.queue._shadows, "the thread to take the shadow")


def test_texts_that_fail_on_the_event_loop_run_alone_on_the_thread(loop: Loop, model: Model) -> None:
    with mock.patch.object(NativeForward, "__call__", side_effect=RuntimeError("forged")):
        loop.submit(job(model, TEXTS[:2], rule=RULE))
        loop.run()
    until(lambda: loop.done == [("engine-0", None)], "the thread to run them")
    until(lambda: loop.engine.queue._waiting == 1, "the thread to wait")
    with mock.patch.object(loop.engine, "_run", side_effect=RuntimeError("forged")):
        loop.submit(job(model, TEXTS[:2], rule=RULE))
        loop.run()
    assert str(loop.done[1][1]) == "forged"
    loop.submit(job(model, TEXTS[:2], rule=RULE))
    loop.run()
    assert loop.done[-1] == (HERE, None)
