"""Texts longer than a window: windows, their combined answer, and when it is settled; in the engine and over HTTP."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits.kinds import CLASSES, Kind, Labels, Spans, Value
from de3.exits.reading import ClassReading, ValueReading, read
from de3.exits.rule import ExitRule
from de3.exits.signals import Edr
from de3.exits.spans import SpanRule
from de3.exits.windows import (
    EXPECTED_CHANGE,
    MAX_WINDOWS,
    OVERLAP,
    Combination,
    Span,
    capacity,
    combination,
    most_windows,
    spans,
)
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.model_store.store import Store
from de3.model_store.tokenizer import MAX_SHORTER, PIECE, TextTokenizer, Windows, max_chars
from de3.runtime.engine import run as engine
from de3.runtime.engine.head import Head
from de3.runtime.engine.job import Item, Job
from de3.runtime.engine.outcome import Outcome
from tests import jobs
from tests.fixtures import BAD, FILLER, GOOD
from tests.serving import Server
from tests.test_tokenizer import MADE, texts

ROOM = 62  # tokens of a single text in a window of the tests' models


def words(number: int, seed: int = 0) -> str:
    """A text of this many one-token words, mostly filler; the rest is from GOOD in the first third, then from BAD."""
    rng = random.Random(seed)
    return " ".join(
        rng.choice(FILLER if rng.random() < 0.7 else GOOD if n < number / 3 else BAD) for n in range(number)
    )


# Windows and their combined answer


@given(tokens=st.integers(1, 3000), room=st.integers(1, 200))
def test_windows_cover_a_text_and_overlap(tokens: int, room: int) -> None:
    assert [most_windows(size) for size in (64, 512, 1024, 8192, 32768)] == [16, 16, 8, 2, 2]
    found = spans(tokens, room)
    assert found[0].start == 0 and found[-1].end == tokens
    assert all(span.end - span.start == room for span in found[:-1])
    for before, after in pairwise(found):
        assert before.end - after.start == int(OVERLAP * room)
        assert after.new == after.end - before.end > 0
    assert sum(span.new for span in found) == tokens
    assert capacity(room, len(found)) >= tokens
    assert len(found) == 1 or capacity(room, len(found) - 1) < tokens


def reading(logits: list[float]) -> ClassReading:
    return read(3, logits, None)


def combined(*new: int, kind: Kind = CLASSES) -> Combination:
    """The combination of windows with these numbers of new tokens."""
    return combination(kind, [Span(0, n, n) for n in new])


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4)


@given(
    st.sampled_from(["classes", "labels", "value"]),
    st.lists(st.tuples(st.integers(1, 500), LOGITS), min_size=1, max_size=8),
    LOGITS,
    st.none() | st.integers(0, 3),
)
def test_windows_have_one_answer_which_is_final_once_it_is_settled(
    kind: str, rows: list[tuple[int, list[float]]], limits: list[float], sure_of: int | None
) -> None:
    """sure_of: once the label is settled, all remaining windows are confident in this one."""
    of = Labels(tuple(limits), np.array(limits).tobytes()) if kind == "labels" else CLASSES
    windows = combined(*(weight for weight, _ in rows), kind=Value(0.5) if kind == "value" else of)
    ran, final = list[tuple[int, Any]](), None
    for weight, logits in rows:
        if final is not None and sure_of is not None:
            logits = [900.0 if k == sure_of else 0.0 for k in range(4)]  # noqa: PLW2901
        one: Any = ValueReading(3, logits[0]) if kind == "value" else of.read(3, logits, None)
        ran.append((weight, one))
        windows.add(one)
        after: Any = windows.reading(one)
        total, is_last = sum(w for w, _ in ran), len(ran) == len(rows)
        if kind == "value":
            assert after.value == pytest.approx(sum(w * x.value for w, x in ran) / total)
            assert windows.is_settled(0.5) == is_last
            continue
        columns = list(zip(*(x.probs for _, x in ran), strict=True))
        if kind == "labels":  # a label is assigned if any window assigns it
            assert set(after.labels) == {k for _, x in ran for k in x.labels}
            assert after.probs == [max(column) for column in columns]
            assert after.label == max(range(4), key=after.logits.__getitem__)
            assert windows.is_settled() == (is_last or after.labels == [0, 1, 2, 3])
        else:
            means = [sum(w * p for (w, _), p in zip(ran, column, strict=True)) / total for column in columns]
            assert after.probs == pytest.approx(means) == reading(after.logits).probs
            assert windows.is_settled(0.5) or not windows.is_settled()
        answer = after.labels if kind == "labels" else after.label
        assert final in (None, answer)
        final = answer if windows.is_settled() else None
        assert final is not None or not is_last


def test_a_label_is_settled_as_soon_as_the_rest_cannot_change_it() -> None:
    windows = combined(60, 30, 10)
    windows.add(reading([0.0, 2.0]))  # 0.119, 0.881: leads by 60 · 0.762; 40 are left
    assert windows.is_settled()
    windows = combined(50, 50)
    windows.add(reading([0.0, 2.0]))
    assert not windows.is_settled() and windows.is_settled(0.75)
    windows = combined(50, 50)
    windows.add(sure := reading([0.0, 800.0]))  # a tie is possible, and would go to the first class
    assert np.isfinite(windows.reading(sure).logits).all()
    assert not windows.is_settled()
    windows = combined(1, 3, 1)
    for p in (0.55, 0.65):  # ahead by 0.1 + 3·0.3 = 1, exactly what the last window can change
        windows.add(replace(reading([1.0, 0.0]), probs=[p, 1 - p]))
    assert not windows.is_settled()


# Tokens


def layout_of(tokens: Tokens) -> list[tuple[list[int], bool]]:
    """Characters of each token, and whether it is a further one of a word, without special tokens."""
    layout = tokens.layout
    assert layout is not None
    inside = layout.part(np.flatnonzero(~layout.is_special))
    return list(zip(inside.offsets.tolist(), inside.is_subword.tolist(), strict=True))


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=20)
@given(text=texts, room=st.sampled_from([12, 60, 510]))
def test_windows_have_the_tokens_of_the_whole_text(kind: str, text: str, room: int) -> None:
    tokenizer = MADE[kind]
    limit = room + tokenizer.num_special_tokens_to_add(False)
    ours = TextTokenizer(tokenizer, limit)
    found = ours.start(text, None, True, MAX_WINDOWS, True).all()
    most = max_chars(limit, MAX_WINDOWS)
    encoding = tokenizer.encode(text[:most])
    whole = tokenizer.encode(text[:most], add_special_tokens=False).ids
    in_one_go = TextTokenizer(tokenizer, len(encoding) + 8).short(encoding, (text[:most], None), True, True)
    cut = ours.start(text, None, True).all()  # without windows
    if cut.truncated:
        start = len(ours.frames[False].before)
        inside = tokenizer.encode(text[: max_chars(limit, 1)]).offsets[start : start + room]
        assert cut.end == (inside[-1][1] if len(whole) > room else max_chars(limit, 1))
    if isinstance(found, Tokens):
        assert len(whole) <= room and found.truncated == (len(text) > most)
        assert found.ids.tolist() == in_one_go.ids.tolist()
        assert found.type_ids.tolist() == in_one_go.type_ids.tolist()
        assert layout_of(found) == layout_of(in_one_go)
        return
    assert len(whole) > room and 1 < len(found) <= MAX_WINDOWS
    assert list(found.spans) == spans(min(len(whole), capacity(room, MAX_WINDOWS)), room)
    assert found.truncated == (len(whole) > capacity(room, MAX_WINDOWS) or len(text) > most)
    rows = layout_of(in_one_go)
    assert found.end == (rows[found.spans[-1].end - 1][0][1] if found.truncated else None)
    for n, span in enumerate(found.spans):
        ids, types = ours.frames[False].around([whole[span.start : span.end]])
        assert found[n].ids[0].tolist() == ids and found[n].type_ids[0].tolist() == types
        assert layout_of(found[n]) == rows[span.start : span.end]
        assert len(found[n]) <= limit and found[n].truncated == found.truncated


def test_a_text_that_is_cut_by_its_characters_is_truncated_although_its_tokens_fit() -> None:
    tokenizer = TextTokenizer(MADE["wordpiece"], 64)  # 6,400 characters of two windows of 62 tokens
    for words, is_cut in ((79, False), (80, True)):
        text = ("k" * 80 + " ") * words
        found = tokenizer.start(text.strip().ljust(81 * words - 1), None, True, 2).all()
        assert isinstance(found, Windows) and len(found) == 2
        assert found.truncated == is_cut, words
    for chars, is_cut in ((6400, False), (6401, True)):
        assert tokenizer.start("a " * 5 + "k" * (chars - 10), None, True, 2).all().truncated == is_cut


def test_the_shorter_text_of_a_pair_is_whole_in_every_window() -> None:
    tokenizer = TextTokenizer(MADE["wordpiece"], 64)
    room = 64 - tokenizer.frames[True].size
    long, short = "good film " * 250, "a film " * 10
    ids = {text: tokenizer.encode([(text, None)], special=False)[0].ids for text in (long, short)}
    for pair in ((long, short), (short, long)):
        found = tokenizer.start(*pair, True, MAX_WINDOWS).all()
        assert isinstance(found, Windows) and list(found.spans) == spans(500, room - 20)
        for n, span in enumerate(found.spans):
            parts = [ids[t][span.start : span.end] if t is long else ids[t] for t in pair]
            assert found[n].ids[0].tolist() == tokenizer.frames[True].around(parts)[0]
    most = int(MAX_SHORTER * room)
    assert isinstance(tokenizer.start(long, "film " * most, True, 16).all(), Windows)
    for text in (long, "film " * (most + 1)):  # tokenized in several pieces, and in one
        with pytest.raises(ValueError, match=f"shorter text has more than {most} tokens"):
            tokenizer.start(text, "film " * (most + 1), True, 16).all()


# In the engine


@pytest.fixture(scope="module")
def model(store: Path) -> Model:
    return Model(Store(store).open("tiny"))


class Busy:
    """A queue that always, or never, reports a more urgent text."""

    def __init__(self, is_busy: bool) -> None:
        self.is_busy, self.requeued, self.charged = is_busy, 0, 0.0

    def has_more_urgent_than(self, item: Item, seconds: float = 0.0) -> bool:
        self.charged += seconds
        return self.is_busy

    def requeue(self, item: Item) -> None:
        self.requeued += 1

    def charge(self, spent: Sequence[tuple[Job, float]]) -> None:
        self.charged += sum(seconds for _, seconds in spent)


def item_of(model: Model, text: str, tau: float = 0.0, **options: Any) -> Item:
    rule = ExitRule(tau, Edr(1.0))
    (item,) = jobs.job([text], [1.0], model=model, windows=MAX_WINDOWS, rule=rule, **options).items
    return item


def run(item: Item, queue: Any) -> list[Outcome]:
    while (outcomes := engine.run(item, queue)) is None:
        pass
    return outcomes


def test_several_models_settle_apart_and_preemption_changes_no_bit(model: Model) -> None:
    text, taus = words(300, 2), (0.0, 0.9, 0.2)
    for queue in (Busy(False), Busy(True)):
        others = [item_of(model, text, tau).job for tau in taus[1:]]
        outcomes = run(item := item_of(model, text, taus[0], others=others), queue)
        for tau, ours in zip(taus, outcomes, strict=True):
            (alone,) = run(item_of(model, text, tau), Busy(False))
            assert (ours.reading.probs, ours.layer) == (alone.reading.probs, alone.layer)
            assert (ours.passed, ours.tokens) == (alone.passed, alone.tokens)
            assert [w.passed for w in ours.windows] == [w.passed for w in alone.windows]
            assert ours.model_s == pytest.approx(sum(w.model_s for w in ours.windows))
        assert len({len(one.windows) for one in outcomes}) > 1
        # Each step is charged once.
        assert queue.charged == pytest.approx(item.tokenize_s + item.model_s)
        steps = len(text) // PIECE + 3 * len(outcomes[0].windows)
        assert queue.requeued >= steps if queue.is_busy else not queue.requeued


def test_a_deadline_keeps_the_windows_that_ran(model: Model) -> None:
    text, depths = words(200), []
    for steps in (0, 2, 6, 10, 14, 1000):
        item, found = item_of(model, text, first_exit_s=[0.1], budget_s=1.0), None
        for _ in range(steps):
            found = found or engine.run(item, Busy(True))
        item.ends = 0.0
        (one,) = found or run(item, Busy(False))
        windows = combination(CLASSES, spans(200, ROOM))
        for window in one.windows:
            windows.add(window.passed[-1])
        assert one.probs == windows.reading(one.reading).probs  # type: ignore[union-attr]
        assert one.reason == "deadline" or windows.is_settled()
        assert [w.layer for w in one.windows[:-1]] == [3] * (len(one.windows) - 1)
        assert one.tokens >= sum(w.tokens for w in one.windows)
        depths.append(sum(1 + w.layer for w in one.windows))
    assert depths == sorted(depths) and depths[0] == 1 and len(set(depths)) > 3


def test_a_dropped_job_stops_between_its_layers(model: Model) -> None:
    item, queue = item_of(model, words(200)), Busy(True)
    while engine.run(item, queue) is None and item.num_ran < 1:
        pass
    item.job.is_dropped = True
    before = item.num_ran
    assert engine.run(item, queue) is None and item.num_ran == before and item.heads[0].outcome is None


# Over HTTP


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_a_long_text_is_answered_by_its_windows(server: Server, tau: float) -> None:
    """Up to the first at which the answer is settled; each text counts once, but all layers of its windows count."""
    texts, metrics = ["a good film", words(150), "dull"], ("de3_layers_run_total", "de3_exit_layer_count")
    before = [server.metric(metric, model="tiny-int8:1") for metric in metrics]
    answer = server.classify(input=texts, model="tiny-int8", long="windows", tau=tau, explain=True).json()
    short, row, last = answer["data"]
    assert "windows" not in short and "windows" not in last and "truncated" not in row
    windows, spans_ = row["windows"], spans(150, ROOM)
    exits = [[x for x in row["layers"] if x["window"] == n] for n in range(windows["run"])]
    assert [x for one in exits for x in one] == row["layers"]
    assert windows["layers"] == [one[-1]["layer"] for one in exits]
    together = combination(CLASSES, spans_)
    for ran, (*_, left) in enumerate(exits, 1):
        together.add(one := replace(reading([0.0, 0.0]), probs=left["probs"]))
        assert together.is_settled(EXPECTED_CHANGE if tau else 1.0) == (ran == windows["run"])
    assert windows["of"] == len(spans_) == 3 and (tau or set(windows["layers"]) == {3})
    assert row["probs"] == pytest.approx(together.reading(one).probs, abs=1.1e-6)  # of rounded ones
    tokens = sum(s.end - s.start + 2 for s in spans_[: windows["run"]])
    assert answer["usage"]["prompt_tokens"] == tokens + 5 + 3
    layers = [one["exit"]["layer"] for one in (short, last)] + windows["layers"]
    after = [server.metric(metric, model="tiny-int8:1") for metric in metrics]
    assert [b - a for a, b in zip(before, after, strict=True)] == [sum(layers), 3]


def test_long_and_truncate_must_not_contradict(server: Server) -> None:
    long = words(100)
    for truncate, what in ((False, "truncate"), (False, "windows"), (True, "error")):
        refused = server.classify(input="good", truncate=truncate, long=what)
        assert refused.status_code == 422 and refused.json()["error"]["param"] == "long"
    for options in (
        {"truncate": False},
        {"truncate": False, "truncate_prompt_tokens": -1},
        {"long": "error"},
        {"long": "error", "truncate": False},
    ):
        refused = server.classify(input=long, **options)
        assert refused.status_code == 422 and "102 tokens" in refused.text
    before = server.metric("de3_truncated_texts_total")
    for options in ({"truncate": True}, {"long": "truncate"}, {"long": None}):
        answer = server.classify(input=long, **options).json()
        assert answer["data"][0]["truncated"] is True and answer["usage"]["prompt_tokens"] == 64
    assert server.classify(input=long, long="windows", truncate=True).json()["data"][0]["windows"]["of"] == 2
    assert server.metric("de3_truncated_texts_total") == before + 3
    assert server.classify(input="good", long="cut").json()["error"]["param"] == "long"


def test_a_certificate_covers_single_windows_only(server: Server) -> None:
    options = {"max_disagreement": 0.5, "long": "windows"}
    assert "certificate" in server.classify(input=["good", "bad"], **options).json()
    assert "certificate" not in server.classify(input=["good", words(100)], **options).json()
    name = server.service.models.all[0].model.full_name
    before = server.metric("de3_calibrated_texts_total", model=name)
    server.classify(input=["good", words(100)], **options)
    assert server.metric("de3_calibrated_texts_total", model=name) == before + 1


def test_the_time_of_windows_is_predicted(server: Server) -> None:
    timing = server.service.models.all[0].timing
    one, many = timing.predict(4 * 300), timing.predict(4 * 300, MAX_WINDOWS)
    windows = sum(timing.full_depth_s(span.end - span.start + 2) for span in spans(300, ROOM))
    assert many - (one - timing.full_depth_s(300)) == pytest.approx(windows) and many > one
    assert timing.predict(100, MAX_WINDOWS) == timing.predict(100)
    longest = timing.predict(10**6, MAX_WINDOWS)
    assert longest == timing.predict(10**7, MAX_WINDOWS) > timing.predict(10**6)
    assert timing.predict_first_exit(10**6, MAX_WINDOWS) > timing.predict_first_exit(10**6)


def test_which_texts_in_windows_run_to_full_depth() -> None:
    """Those whose early exits nothing audits or certifies."""
    spans = Spans(SpanRule(("O", "X")))
    for kind, guarantee, one_window, learned, flag, is_deep in (
        (CLASSES, None, False, None, None, False),
        (CLASSES, 0.02, False, None, "flag", False),
        (CLASSES, None, True, None, "flag", True),  # under max_missed
        (CLASSES, 0.02, False, "learned", "flag", True),  # its held-out texts are in one window
        (CLASSES, 0.02, False, "learned", None, False),
        (CLASSES, None, False, "learned", "flag", False),
        (spans, None, False, None, None, False),
        (spans, 0.02, False, None, None, True),
    ):
        fields = {"one_window": one_window, "guarantee": guarantee, "certificate": None}
        choice = SimpleNamespace(rule=SimpleNamespace(kind=kind, flag=flag), **fields)
        part: Any = SimpleNamespace(
            choice=choice, model=SimpleNamespace(manifest=SimpleNamespace(learned=learned))
        )
        with mock.patch("de3.runtime.engine.head.WindowProgress"):
            (head := Head(part)).start_windows(mock.sentinel.windows)
        assert head.is_deep == is_deep
