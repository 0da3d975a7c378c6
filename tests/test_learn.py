"""Exits that a server learns from live traffic: records, fits, learned versions, restarts, and the guarantee."""

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from de3.data.examples import Example
from de3.exits.criteria import Limits
from de3.exits.flags import Flag
from de3.exits.guarantee import Audited, error_of
from de3.exits.kinds import CLASSES
from de3.exits.recorded import Recorded
from de3.export import fit, recalibrate
from de3.export import learn as learning
from de3.export.classifier import Stock, convert
from de3.export.publish import as_stored
from de3.export.records import opened, thinned
from de3.export.records import texts_of as training_set
from de3.model_store import records as files
from de3.model_store.fitted import CLOSE, FAR, MOST_PIECES, NO_PIECE, FittedTexts, Marks, Pieces
from de3.model_store.manifest import LEARNED_FROM, Learned, Manifest, base_of
from de3.model_store.model import Model, fitted_of
from de3.model_store.records import Records, joined, read
from de3.model_store.store import Artifact, Store, StoreError
from de3.runtime.errors import RequestError
from de3.runtime.fit import Found, HeldOut, Job
from de3.runtime.rules import Rules
from de3.server.audit.ledger import Ledger
from de3.server.audit.ledgers import Ledgers
from de3.server.audit.tenant import Settled
from de3.server.learn import fitting
from de3.server.learn.fitting import FitError, run_fit
from de3.server.learn.journal import MAX_RESULTS, MAX_VOID, Journal, LearnFolder, Result
from de3.server.learn.learner import (
    FIRST_FIT,
    MAX_HELD,
    MAX_TESTS,
    MIN_RECORDS,
    Changes,
    InService,
    Learner,
    Waiting,
    result_of,
)
from de3.server.learn.learners import MIN_GAIN, Learners
from de3.server.learn.record import Record
from de3.server.learn.reservoir import OTHERS, Reservoir
from de3.server.manager import Change
from de3.server.settings import Settings
from tests.commands import de3, refusal
from tests.fixtures import made_once, make_rows, save_encoder
from tests.jobs import fit_job
from tests.serving import Server, serving, until

LABELS = ["negative", "positive"]
FIRST = LEARNED_FROM + 1  # the first learned version
CUT = 5
KEYS = "one " + "k" * 20
IDLE, SPARE, NEVER = fitting.IDLE_CORES, fitting.SPARE_CORES, -1.0


@pytest.fixture(scope="module")
def stock_store(encoder: Path) -> Path:
    """A store with a fine-tuned classifier whose only exit is the last layer."""
    from tests.stock import fine_tuned

    examples = [Example(text, int(label)) for text, label in make_rows(600, 5)]
    stock = fine_tuned("stock-learn", encoder, LABELS, examples, 4)
    return made_once(
        "learn-store",
        lambda folder: convert(Stock.open("stock", stock), Store(folder), "base", "int8"),
    )


def texts_of(count: int, seed: int) -> list[str]:
    """Distinct texts, each with a number at its end; fewer than `count` if some would be empty."""
    return [f"{text} {number}" for number, (text, _) in enumerate(make_rows(count, seed)) if text.strip()]


def records_of(model: Model, texts: Sequence[str], clients: Sequence[str] = ("one",)) -> Records:
    """Records of texts, as a server would make them; the texts are from the clients in turn."""
    manifest, n = model.manifest, len(texts)
    states = np.zeros((n, manifest.num_layers, manifest.hidden_size), np.float16)
    logits = np.zeros((n, len(manifest.labels)), np.float32)
    pieces, spreads = np.zeros((n, MOST_PIECES), np.uint32), np.zeros(n, np.float32)
    for i, text in enumerate(texts):
        tokens = model.tokenize(text)
        steps, marks = model.full_depth(tokens), model.marks(tokens)
        pieces[i], spreads[i] = marks.pieces, marks.spreads
        states[i] = [model.pooling.mean(step.hidden) for step in steps[:-1]]
        logits[i] = steps[-1].logits
    number = np.arange(n)
    owners = (number % len(clients)).astype(np.int32)
    keys = number.astype(np.uint64)
    texts_by = [float(n) / len(clients)] * len(clients)
    names, shares = list(clients), np.ones(n)
    rest = names, texts_by, np.zeros(n, np.bool_), np.zeros((n, 0), np.int32), pieces, spreads
    return Records(base_of(manifest), states, logits, shares, keys, number, owners, *rest)


@pytest.fixture(scope="module")
def base(stock_store: Path) -> Artifact:
    return Store(stock_store).open("base")


def version_of(base: Artifact, version: int, other_weights: bool = False) -> Artifact:
    """A stand-in for another version, with the same weights unless the hash of one of its files is changed."""
    files = dict(base.manifest.files)
    if other_weights:
        files["tokenizer.json"] = files[base.manifest.segment_files()[0]]
    return Artifact(base.path, base.manifest.model_copy(update={"version": version, "files": files}))


@pytest.fixture(scope="module")
def some(base: Artifact) -> Records:
    return records_of(Model(base, "onnxruntime"), texts_of(400, 6), ("one", "two"))


# Run fits at the priority of the tests: at the lowest one, they would wait for everything else on the machine.
PROGRAM = "from de3.export import fit_process as fit; fit._run_at_idle = lambda: None; fit.child()"


@pytest.fixture(autouse=True)
def at_normal_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROGRAM": PROGRAM, "IDLE_CORES": NEVER, "SPARE_CORES": float("inf")}.items():
        monkeypatch.setattr(fitting, name, value)


def record(
    number: int = 0, client: str = "one", share: float = 1.0, shape: tuple[int, int] = (2, 3)
) -> Record:
    states, logits = np.full(shape, number, np.float16), np.zeros(2, np.float32)
    return Record(client, share, number, pieces_with(number), 0.5, states, logits)


def pieces_with(*hashes: int) -> Pieces:
    """The word pieces of a text in which pieces with these hashes occur, as often as they are given."""
    pieces = [2**16 * piece + count for piece, count in sorted(Counter(hashes).items())][:MOST_PIECES]
    return np.array(pieces + [NO_PIECE] * (MOST_PIECES - len(pieces)), np.uint32)


def held(key: int | None, number: int = 10, client: str = "one", **fields: Any) -> HeldOut:
    """A held-out text of a fit that could read the texts up to CUT; all exits agree with full depth."""
    fields = {"audited": Audited([0.0, 0.0, 0.0, None], [[False] * 4]), "cut": CUT} | fields
    return HeldOut(client, key, number, **fields)


def reservoir(capacity: int, half_life: float = 1e9) -> Reservoir:
    size = 2 * 2 * 3 + 4 * (2 + MOST_PIECES) + 41
    return Reservoir("base", (2, 3), 2, capacity * size, half_life)


# The reservoir


def test_newer_texts_replace_older_ones_and_one_that_was_drawn_rarely_stands_for_more() -> None:
    kept = reservoir(400, half_life=500)
    for number in range(5000):
        kept.add(record(number))
    ages = 5000 - kept.records().numbers
    assert ages.min() < 25 and 425 < np.median(ages) < 600  # about the half-life
    kept = reservoir(400)
    for _ in range(2000):
        kept.add(record(1, share=1.0))
        kept.add(record(2, share=0.25))
    assert 0.72 < (kept.records().keys == 2).mean() < 0.88  # expected: 4 of 5


def test_a_client_with_most_of_the_texts_leaves_half_of_the_room_to_others() -> None:
    """Also after a restart."""
    kept = reservoir(100)
    for number in range(5000):
        kept.add(record(number % 500, "loud"))
        if number % 50 == 0:
            kept.add(record(number % 500, f"quiet-{number % 3}"))
        if number == 2500:
            saved, kept = kept.records(), reservoir(100)
            kept.restore(saved)
    found = kept.records()
    loud = (found.clients == found.names.index("loud")).sum()
    assert loud <= 51  # nearly half of the 100 quiet texts are kept


@examples(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1.0, 0.5, 0.05])), min_size=1, max_size=60))
def test_a_reservoir_counts_its_clients_and_continues_with_the_newest_of_saved_records(
    steps: list[tuple[int, float]],
) -> None:
    kept, small = reservoir(7), reservoir(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("de3.server.learn.reservoir.MAX_NAMES", 2)  # further clients count as one
        for number, (client, share) in enumerate(steps):
            kept.add(record(number, f"client-{client}", share))
            assert len(kept) == min(number + 1, 7)
        found = kept.records()
        small.restore(found)
    assert (np.diff(found.numbers) >= 0).all()
    assert (found.states[:, 0, 0].astype(np.uint64) == found.keys).all()
    first = list(dict.fromkeys(f"client-{client}" for client, _ in steps))
    assert found.names == first[:2] + [OTHERS] * (len(first) > 2)
    texts = [sum(1 / q for c, q in steps if f"client-{c}" == name) for name in first]
    assert found.texts == pytest.approx(texts[:2] + [sum(texts[2:])] * (len(first) > 2))
    assert kept.texts == pytest.approx(sum(texts))
    again = small.records()
    assert (again.names, again.texts, small.texts) == (found.names, found.texts, found.numbers[-1])
    for name in ("keys", "numbers", "clients", "states", "shares"):
        assert (getattr(again, name) == getattr(found, name)[-5:]).all()


# Files of records


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"states": lambda r: r.states.astype(np.float32)}, "states"),
        ({"logits": lambda r: r.logits[:, :0]}, "logits"),
        ({"numbers": lambda r: r.numbers + 2**60}, "not in order"),
        ({"texts": lambda _: [1.0, float("nan")]}, "client"),
        ({"states": lambda r: r.states[:-1]}, "states"),
        ({"logits": lambda r: np.full_like(r.logits, np.nan)}, "logits"),
        ({"shares": lambda r: np.zeros(len(r))}, "share"),
        ({"shares": lambda r: np.full(len(r), 2.0)}, "share"),
        ({"numbers": lambda r: r.numbers[::-1].copy()}, "not in order"),
        ({"clients": lambda r: np.full(len(r), 9, np.int32)}, "client"),
        ({"clients": lambda r: np.full(len(r), -1, np.int32)}, "client"),
        ({"names": lambda _: [1, 2]}, "client"),
        ({"names": lambda _: ["one"]}, "client"),
    ],
)
def test_a_damaged_file_of_records_is_refused(
    some: Records, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    replace(some, **{name: make(some) for name, make in fields.items()}).write(tmp_path / "r")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "r", 2**30)


def test_a_foreign_or_cut_file_of_records_is_refused(some: Records, tmp_path: Path) -> None:
    path = tmp_path / "r"
    with pytest.raises(FileNotFoundError):
        read(path, 2**30)
    some.write(path)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read(path, 100)
    for data, message in (
        (path.read_bytes()[:-7], "damaged"),
        (b"", "damaged"),
        (files.save({"x": np.zeros(1)}), "not a records file"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read(path, 2**30)
    for base, layers, message in (("other", 3, "another model"), (some.base, 1, "shapes")):
        with pytest.raises(ValueError, match=message):
            some.check(base, layers, 64, 2)


def test_records_of_several_servers_are_joined(some: Records) -> None:
    other = replace(some.part(np.arange(200)), names=["three", "four"])
    both = joined([some, other])
    assert len(both) == len(some) + 200 and both.names == ["one", "two", "three", "four"]
    assert (np.diff(both.numbers) == 1).all()
    newest = [both.names[k] for k in both.clients[-30:]]  # of both servers
    assert 5 <= sum(name in ("three", "four") for name in newest) <= 15
    with pytest.raises(ValueError, match="another model"):
        joined([some, replace(other, base="x")])


# Fits


@pytest.fixture(scope="module")
def fitted(some: Records, base: Artifact) -> learning.Fitted:
    return learning.fit_exits(some, base.manifest, 1, Limits(0.05))


def divided(records: Records, first_new: int = 0, by_client: bool = False) -> tuple[Records, Records]:
    """The records to which exits are fitted, and those that test them."""
    return learning._split(records, learning.cut_of(records, first_new, by_client), first_new)


def traffic(clients: Sequence[int], extra: Sequence[bool]) -> Records:
    """Records of texts of these clients, without what exits are fitted to."""
    n, numbers = len(clients), np.cumsum([not is_extra for is_extra in extra])
    empty = np.zeros((n, 0, 0), np.float16), np.zeros((n, 0), np.float32), np.ones(n)
    sample = *empty, np.zeros(n, np.uint64), numbers, np.array(clients, np.int32), ["a", "b", "c"], [1.0] * 3
    ids, pieces = np.zeros((n, 0), np.int32), np.zeros((n, MOST_PIECES), np.uint32)
    return Records("", *sample, np.array(extra), ids, pieces, np.zeros(n, np.float32))


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=60), st.integers(0, 30))
def test_no_record_can_be_both_read_by_a_fit_and_evidence(
    rows: list[tuple[int, bool]], first_new: int
) -> None:
    """Whoever sends a record, and whatever it says; texts that an upstream has answered undrawn are no evidence."""
    records = traffic(*zip(*rows, strict=True))
    for by_client in (False, True):
        fits, tests = divided(records, first_new, by_client)
        cut = learning.cut_of(records, first_new, by_client)
        assert (fits.numbers <= cut).all() and (tests.numbers > cut).all() and not tests.extra.any()
        assert (tests.numbers >= first_new).all()


def test_the_newest_are_fitted_and_tests_are_limited() -> None:
    for records in (traffic([0], [False]), traffic([0] * 9, [True] * 9)):
        assert learning.cut_of(records) == 0  # there is nothing to test on
    many = traffic([0, 1] * 15_000, [False] * 30_000)
    for by_client, most in ((False, 2000), (True, 4000)):  # for each client
        fits, tests = divided(many, by_client=by_client)
        assert tests.numbers.tolist() == list(range(30_001 - most, 30_001))
        assert fits.numbers.tolist() == list(range(10_001 - most, 30_001 - most))


@pytest.mark.parametrize("has_same_words", [False, True])
@pytest.mark.parametrize("has_upstream", [False, True])
@pytest.mark.parametrize("by_client", [False, True])
def test_texts_near_to_a_fitted_one_count_only_against_the_exits(
    some: Records,
    base: Artifact,
    by_client: bool,
    has_upstream: bool,
    has_same_words: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever sent them, at the fit and when the version is tested again; the speed-ups are those on other texts.

    If each client has a guarantee of its own, all its held-out records test, even if it sends far less than another.
    Texts with most of the words of many others, sent before the copies, hide none of them, even if comparing with all
    takes too much work. Copies in other words of the same meaning are near, too, if other clients have sent them.
    """
    monkeypatch.setattr("de3.model_store.fitted.MOST_COMPARED", 2000)
    pieces = np.stack([pieces_with(*range(10 * i, 10 * i + 10)) for i in range(400)])
    pieces[300:] = pieces[:100]
    pieces[300:, 9] = NO_PIECE  # nine of ten
    states, spreads = some.states.copy(), np.zeros(1600, np.float32)
    if not has_same_words:
        pieces[300:] = np.stack([pieces_with(*range(10 * i, 10 * i + 10)) for i in range(300, 400)])
        states[300:, 0] = states[:100, 0] + 0.01
        spreads[1500:] = 1.2 * some.states.shape[2] * 0.01**2 / CLOSE
    clients = np.concatenate([np.zeros(1200, np.int32), some.clients[:300], 1 - some.clients[:100]])
    decoys = np.stack(
        [
            pieces_with(*(p for p in range(250 * (i % 4), 250 * (i % 4 + 1)) if p % 10 < 9))
            for i in range(1200)
        ]
    )
    rows = np.concatenate([np.zeros(1200, np.int64), np.arange(400)])
    copied = replace(
        replace(some, states=states).part(rows),
        pieces=np.concatenate([decoys, pieces]),
        spreads=spreads,
        clients=clients,
        texts=[4800.0, 400.0] if by_client else some.texts,
        numbers=np.arange(1600),
        extra=np.arange(1600) < 1200,
    )
    if has_upstream:
        states = np.concatenate([copied.states, copied.states[:, -1:]], 1)
        base = replace(base, manifest=base.manifest.model_copy(update={"upstream": "0" * 64}))
        copied = replace(copied, states=states)
    found = learning.fit_exits(copied, base.manifest, 1, Limits(0.2), by_client=by_client)
    is_near = has_same_words or by_client
    assert [row.key for row in found.evidence] == [
        *range(240, 300),
        *([None] * 100 if is_near else range(300, 400)),
    ]
    assert {row.cut for row in found.evidence} == {1439}
    if not has_upstream:
        store = Store(tmp_path)
        made = store.open_path(learning.publish(base, found, store, 1, 400, version=FIRST))
        again = learning.test(made, copied, 0, by_client).evidence
        assert [(row.key, row.number) for row in again] == [(row.key, row.number) for row in found.evidence]


def test_too_few_records_are_refused(some: Records, base: Artifact) -> None:
    """Texts that are all near to each other are no new texts."""
    without_pieces = replace(some, pieces=np.full_like(some.pieces, NO_PIECE))
    similar = replace(some, spreads=some.spreads + 1e6)
    for few, by_client in ((some.part(np.arange(8)), False), (without_pieces, False), (similar, True)):
        with pytest.raises(ValueError, match="too few"):
            learning.fit_exits(few, base.manifest, 1, Limits(0.2), by_client=by_client)


def ledger_of(manifest: Manifest, **settings: Any) -> Ledger:
    on = Settings(guarantee=0.05, **settings)
    return Ledger(manifest, Rules(manifest, on), "native", 1.0, on)


def marked(pieces: Pieces) -> Marks:
    """The marks of a text whose embeddings are not near to any."""
    return Marks(pieces, np.zeros(1, np.float16), np.zeros((), np.float32))


def fitted_to(pieces: Pieces) -> FittedTexts:
    """The texts of client 0."""
    return FittedTexts(pieces, np.ones((len(pieces), 1), np.float16), np.zeros(len(pieces), np.uint64))


@given(
    st.lists(st.lists(st.integers(0, 20), max_size=16), max_size=8),
    st.lists(st.integers(0, 20), max_size=16),
    st.integers(0, 30),
)
def test_near_texts_share_most_of_their_word_pieces(
    fitted: list[list[int]], one: list[int], limit: int
) -> None:
    """Also a text that takes too much work to compare is near; and no further texts make it new."""

    def is_in(a: list[int], b: list[int]) -> bool:
        """True if b has nearly all pieces of a, and consists of them to nearly a half."""
        shared = {*a} & {*b}
        return len(shared) >= 0.9 * len({*a}) and sum(map(b.count, shared)) >= 0.45 * len(b)

    def is_near(texts: list[list[int]]) -> bool:
        return fitted_to(np.stack([pieces_with(*text) for text in [*texts, []]])[:-1]).is_near(
            marked(pieces_with(*one)), 1
        )

    expected = not one or any(
        len({*one} & {*text}) >= 0.7 * len({*one, *text}) or is_in(one, text) or is_in(text, one)
        for text in fitted
        if text
    )
    assert is_near(fitted) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("de3.model_store.fitted.MOST_COMPARED", limit)
        found = [is_near(fitted[:count]) for count in range(len(fitted) + 1)]
    assert found == sorted(found) and found[-1] >= expected
    assert found[-1] == (expected or sum(len({*one} & {*text}) for text in fitted) > limit)


@given(
    st.lists(st.tuples(st.floats(-9, 9, width=16), st.booleans()), max_size=20),
    st.floats(-9, 9, width=16),
    st.floats(0.125, 9, width=16),
    st.booleans(),
)
def test_texts_similar_to_those_of_other_clients_are_near(
    fitted: list[tuple[float, bool]], one: float, spread: float, has_clients: bool
) -> None:
    """Together, at least as much as one whose mean is close; no further texts make a near one new."""
    text = Marks(pieces_with(1), np.array([one, 3], np.float16), np.float32(spread))
    means = np.array([[each, 3] for each, _ in fitted], np.float16).reshape(-1, 2)
    clients = np.array([is_own for _, is_own in fitted], np.uint64)
    pieces = np.stack([pieces_with(2 + i) for i in range(20)])
    found = [
        FittedTexts(pieces[:n], means[:n], clients[:n]).is_near(text, 1 if has_clients else None)
        for n in range(len(fitted) + 1)
    ]
    assert found == sorted(found)
    shares = [(each - one) ** 2 / spread for each, is_own in fitted if not is_own]
    total = sum(min(1, max(0, (FAR - share) / (FAR - CLOSE))) for share in shares)
    if abs(total - 1) > 1e-3:
        assert found[-1] == (has_clients and total > 1)


def test_the_spread_of_a_text_is_the_variance_of_its_mean(base: Artifact) -> None:
    """If its tokens were drawn again: their own variance, by their number."""
    model = Model(base, "onnxruntime")
    tokens = model.tokenize("good weak fine dull not")
    found, rows = model.marks(tokens), model.full_depth(tokens)[0].hidden[0]
    np.testing.assert_allclose(found.means, rows.mean(0), atol=2e-3)
    drawn = rows[np.random.default_rng(0).integers(0, len(rows), (20_000, len(rows)))].mean(1)
    assert np.square(drawn - rows.mean(0)).sum(1).mean() == pytest.approx(float(found.spreads), rel=0.02)


@pytest.mark.parametrize(
    "means",
    [
        np.ones((2, 1), np.float16),
        np.ones((1, 1)),
        np.ones(1, np.float16),
        np.full((1, 1), np.inf, np.float16),
    ],
)
def test_damaged_means_of_fitted_texts_are_refused(means: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="means"):
        FittedTexts(pieces_with(1)[None], means, np.zeros(len(means), np.uint64))


@pytest.mark.parametrize("clients", [np.zeros(2, np.uint64), np.zeros(1), np.zeros((1, 1), np.uint64)])
def test_damaged_clients_of_fitted_texts_are_refused(clients: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="clients"):
        FittedTexts(pieces_with(1)[None], np.ones((1, 1), np.float16), clients)


@pytest.mark.parametrize(("length", "count"), [(12, 12_000), (300, 800)])
def test_no_number_of_decoys_hides_a_copy(length: int, count: int) -> None:
    """Texts with nearly all pieces of another one's text, and as many others, are not near to it: a copy of it is."""
    pieces = np.random.default_rng(0).permutation(2**16 - 1).tolist()
    own, decoy = pieces[:length], pieces[length // 10 : 3 * length]
    decoys = np.repeat(pieces_with(*decoy)[None], count, 0)
    assert not fitted_to(decoys).is_near(marked(pieces_with(*own)), 1)
    for copy in (own[1:], [*own, pieces[-1]]):
        fitted = fitted_to(np.concatenate([decoys, pieces_with(*copy)[None]]))
        assert fitted.is_near(marked(pieces_with(*own)), 1)


@pytest.mark.parametrize("added", [range(0), range(24), range(1000, 1024)])
def test_a_copy_of_a_long_text_is_near_whatever_is_added(added: Sequence[int]) -> None:
    """Of a long text, only the smallest hashes are known."""
    own = np.random.default_rng(0).choice(2**16 - 1, 400, replace=False).tolist()
    other = np.random.default_rng(1).choice(2**16 - 1, 400, replace=False).tolist()
    ours, copy = pieces_with(*own), pieces_with(*{*own, *added})
    for fitted, one in ((ours, copy), (copy, ours)):
        assert fitted_to(fitted[None]).is_near(marked(one), 1)
        assert not fitted_to(fitted[None]).is_near(marked(pieces_with(*other)), 1)


def test_risk_is_fitted_to_exits_that_did_not_see_the_text(base: Artifact) -> None:
    """Answers are random, so an exit is right by chance unless it was fitted to the text, or to a copy of it."""
    count, copies = 300, 3
    rng, keys = np.random.default_rng(count), np.arange(count) // copies
    states = rng.normal(size=(count, 1, 192)).astype(np.float16)[keys * copies]
    logits = rng.normal(size=(count, 2)).astype(np.float32)[keys * copies] * 3
    sample = states, logits, np.ones(count), keys.astype(np.uint64), keys, keys, [""], [1.0]
    pieces = np.zeros((count, MOST_PIECES), np.uint32)
    rest = np.zeros(count, np.bool_), np.zeros((count, 0), np.int32), pieces, np.zeros(count, np.float32)
    records = Records("", *sample, *rest)
    axes = dict[Any, Any]()
    classifier = next(fit.fitted(training_set(records, base.manifest), "mean", 0, (1e-4,), axes))[1]
    exits = fit.Exits("mean", [classifier], [], [])
    shuffled = records.part(rng.permutation(count))
    texts = training_set(shuffled, base.manifest)
    fold = np.random.default_rng(0).permutation(int(texts.groups.max()) + 1)[texts.groups] % 4
    apart = fit.cross_fitted(texts, exits, (1e-4,), 0, axes, fold, lambda exits: exits)
    assert (apart.labels == shuffled.logits.argmax(1)).all()  # in the order of the texts
    assert (apart.logits[:, 1] == shuffled.logits).all()
    assert (apart.answers[:, 0] == apart.labels).mean() < 0.5 + 3 * 0.5 / (count / copies) ** 0.5


def test_held_out_texts_prove_a_tau_once_their_e_value_is_1_over_the_error_probability() -> None:
    def speedups(texts: int) -> tuple[float, float]:
        """Proved and allowed by texts that exit at layer 2, and above τ = 0.9 at layer 0, half with other answers."""
        logits = np.tile(np.array([[0, 1], [0, 1], [1, 0], [1, 0]], np.float32), (texts, 1, 1))
        logits[::2, :2] = [1, 0]
        recorded = Recorded([0, 1, 2, 3], logits, np.full_like(logits, np.nan), np.zeros(texts, np.int64))
        scores = np.tile([0.9, 0.9, 0.0, np.nan], (texts, 1))
        # A further criterion, which no exit fails, does not hide the first.
        one, both = Limits(0.1), Limits(0.1, 0.1, Flag((0,), (0.9,)))
        found = [learning._speedups(recorded, scores, limits, error_of(4)) for limits in (one, both)]
        assert found[0][1] == found[1][1]
        return found[0]

    wealth = [np.mean([(1 + 0.1 * c) ** n for c in (0.25, 0.5, 0.75)]) for n in range(200)]
    enough = next(n for n, value in enumerate(wealth) if value >= 1 / error_of(4))
    assert (speedups(enough - 1), speedups(enough)) == ((1.0, 1.5), (1.5, 1.5))


def test_each_client_tests_in_proportion_to_its_traffic(some: Records) -> None:
    """One client has sent 9 of 10 texts, but has half of the records."""
    loud = replace(some, texts=[3600.0, 400.0])
    rng = np.random.default_rng(0)

    def tested(records: Records) -> NDArray[np.int32]:
        _, tests = divided(records)
        return tests.clients[thinned(tests, np.arange(len(tests)), rng)]

    counts = np.bincount(tested(loud))
    assert 6 < counts[0] / counts[1] < 14
    assert len(tested(replace(some, texts=[400.0, 400.0]))) > 145


def test_after_a_change_only_new_texts_test_and_old_ones_are_at_most_as_many(some: Records) -> None:
    fits, tests = divided(some, first_new=300)
    assert tests.numbers.tolist() == list(range(360, 400))
    assert (fits.numbers < 300).sum() == (fits.numbers >= 300).sum() == 60
    assert (np.diff(fits.numbers) > 0).all()


def check_full_depth(old: Model, new: Model, text: str) -> Sequence[Any]:
    """Check that two versions compute the same from a text, bit for bit; returns the steps of the new one."""
    before, after = (model.full_depth(model.tokenize(text)) for model in (old, new))
    for a, b in zip(before, after, strict=True):
        assert a.hidden.tobytes() == b.hidden.tobytes()
    assert before[-1].logits.tobytes() == after[-1].logits.tobytes()  # type: ignore[union-attr]
    return after


@pytest.fixture(scope="module")
def learned(
    base: Artifact, fitted: learning.Fitted, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, Artifact]:
    """Two versions with learned exits: FIRST, which is learned from the base, and the next, learned from FIRST."""
    store = Store(tmp_path_factory.mktemp("learned"))
    first = store.open_path(learning.publish(base, fitted, store, 3, 400, version=FIRST))
    return first, store.open_path(learning.publish(first, fitted, store, 4, 500))


def test_learned_exits_leave_full_depth_as_it_was(base: Artifact, learned: tuple[Artifact, Artifact]) -> None:
    for number, made in enumerate(learned):
        manifest = made.manifest
        assert made.full_name == f"base:{FIRST + number}"
        records, base_name = 400 + 100 * number, base_of(base.manifest)
        assert manifest.learned == Learned(base=base_name, attempt=3 + number, records=records, cut=239)
        assert base_of(manifest) == base_name
        assert manifest.exit_layers == list(range(manifest.num_layers + 1))
        for runtime in ("onnxruntime", "auto"):
            old, new = Model(base, runtime), Model(made, runtime)
            assert old.runtime == new.runtime and new.fitted is not None
            for text, is_near in ((texts_of(1, 6)[0], True), ("good weak fine dull not", False)):
                assert new.fitted.is_near(new.marks(new.tokenize(text)), None) == is_near
            for text in texts_of(6, 8):
                check_full_depth(old, new, text)


def test_the_model_answers_as_the_fit_measured(
    learned: tuple[Artifact, Artifact], fitted: learning.Fitted, some: Records
) -> None:
    """On the held-out texts, the exits of the served model give the scores that the fit reports as evidence."""
    model = Model(learned[1], "onnxruntime")
    signal, texts = model.manifest.default_signal, texts_of(400, 6)
    assert signal.name == "risk"
    worst = []
    for row in [row for row in fitted.evidence if row.key is not None][:50]:
        steps = model.full_depth(model.tokenize(texts[row.key]))
        labels = [int(step.logits.argmax()) for step in steps if step.logits is not None]
        assert [[label != labels[-1] for label in labels]] == row.audited.failures
        passed = list[Any]()
        for layer, step in enumerate(steps):
            assert step.logits is not None
            distances = None if step.distances is None else step.distances.tolist()
            passed.append(CLASSES.read(layer, step.logits.tolist(), distances))
            if signal.state_weights is not None:
                passed[-1].state_term = float(step.hidden[0].mean(0) @ signal.state_weights[layer])
            score = signal.score(passed)
            if score is not None and row.audited.scores[layer] is not None:
                worst.append(abs(score - row.audited.scores[layer]))
    assert max(worst) < 0.05 and np.mean(worst) < 0.005
    again = as_stored(fitted.exits, model.manifest.precision)
    np.testing.assert_allclose(again.spaces[0][0], fitted.exits.spaces[0][0], rtol=1e-5, atol=1e-9)


def test_exits_are_imported_from_the_records_of_several_servers(
    base: Artifact, stock_store: Path, some: Records, tmp_path: Path
) -> None:
    some.part(np.arange(250)).write(tmp_path / "a")
    some.part(np.arange(250, 400)).write(tmp_path / "b")
    store = tmp_path / "store"
    shutil.copytree(stock_store, store)
    assert (
        len(opened([tmp_path / "a", tmp_path / "b", tmp_path / "a"], base.manifest)) == 400
    )  # one counts once
    said = de3(f"import base --records {tmp_path}/a --records {tmp_path}/b --name both --store {store}")
    assert "held-out records the exits allow a speed-up of" in said and "both/1" in said
    made = Store(store).open("both")
    assert made.manifest.learned is None and len(made.manifest.exit_layers) > 1
    remembered = fitted_of(made)
    assert remembered is not None and remembered.means is not None and len(remembered.means) == 240
    assert {*map(bytes, remembered.means)} <= {*map(bytes, some.states[:, 0])}
    (tmp_path / "b").write_bytes(b"no")
    assert "b: it is damaged" in refusal(f"import base --records {tmp_path}/b --name x --store {store}")


def test_a_version_that_was_fitted_to_too_many_texts_is_refused(
    learned: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each audit would compare all of them."""
    fitted = fitted_of(learned[1])
    assert fitted is not None
    monkeypatch.setattr("de3.model_store.model.MAX_FITTED", len(fitted.pieces) - 1)
    with pytest.raises(StoreError, match=f"pieces has {len(fitted.pieces)} texts; at most"):
        fitted_of(learned[1])


def test_a_learned_version_is_calibrated_on_texts_that_its_exits_have_not_seen(
    learned: tuple[Artifact, Artifact], some: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalibrate, "MIN_TEXTS", 20)
    some.write(tmp_path / "records")
    fitted = fitted_of(learned[1])
    assert fitted is not None
    unseen = int((~fitted.are_near(some.marks, some.client_hashes)).sum())
    made = recalibrate.recalibrate_on_records(
        learned[1], Store(tmp_path), [tmp_path / "records"], 0.5, "auto"
    )
    calibration = Store(tmp_path).open_path(made).manifest.calibration
    assert calibration is not None and 0 < unseen < len(some) // 2
    assert calibration.tune_size == unseen // 2 and calibration.certify_size <= unseen


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"family": "modernbert"}, "fp32"),  # its exits see the hidden states through a final norm
        ({"problem_type": "multi_label_classification"}, "int8"),
        ({"labels": 1, "problem_type": "regression"}, "int8"),
        pytest.param({"family": "deberta-v2"}, "int8", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_model_learns(options: dict[str, Any], precision: Any, tmp_path: Path) -> None:
    save_encoder(tmp_path / "stock", **{"labels": 3} | options)
    store = Store(tmp_path / "store")
    convert(Stock.open("stock", tmp_path / "stock"), store, "base", precision)
    base = store.open("base")
    old = Model(base, "onnxruntime")
    fitted = learning.fit_exits(records_of(old, texts_of(60, 6)), base.manifest, 1, Limits(0.1))
    pairs = Artifact(base.path, base.manifest.model_copy(update={"input": "pair"}))
    new = Model(store.open_path(learning.publish(pairs, fitted, store, 1, 60)), "onnxruntime")
    assert bool(new.manifest.prototype_layers) == ("problem_type" not in options)
    for name in ("input", "source", "thresholds", "tolerance", "labels"):
        assert getattr(new.manifest, name) == getattr(pairs.manifest, name)
    for text in texts_of(5, 14):
        after = check_full_depth(old, new, text)
        for layer, (weight, bias) in enumerate(fitted.exits.classifiers):
            expected = weight @ new.pooling.mean(after[layer].hidden) + bias
            np.testing.assert_allclose(after[layer].logits, expected, rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]


# The process


def job(base: Artifact, records: Path, store: Path, **fields: Any) -> Job:
    return fit_job(base=base.path, records=records, store=store, **fields)


def fit_by(program: str, monkeypatch: pytest.MonkeyPatch, plan: Job | None = None) -> Found:
    """Run a fit whose process runs this program."""
    monkeypatch.setattr(fitting, "PROGRAM", program)
    return asyncio.run(run_fit(plan or fit_job()))


def test_exits_are_published_only_if_they_may_be_faster(
    base: Artifact, some: Records, fitted: learning.Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "fit_exits", lambda *_: fitted)
    for speedup, is_published in ((fitted.speedup - 0.01, True), (fitted.speedup, False)):
        plan = job(base, tmp_path, tmp_path, speedup=speedup)
        found = learning.learn(base, some, Store(tmp_path), plan)
        assert found.path == (tmp_path / "base/2" if is_published else None)
        assert found.evidence == (fitted.evidence if is_published else [])


def test_a_published_version_is_tested_on_newer_records_as_at_its_fit(
    learned: tuple[Artifact, Artifact], fitted: learning.Fitted, some: Records, tmp_path: Path
) -> None:
    """The server's process tests the exits in the artifact's files; the evidence is that of the fit."""
    some.write(tmp_path / "r")
    found = asyncio.run(run_fit(job(learned[0], tmp_path / "r", tmp_path, after=299))).evidence
    assert [row.number for row in found] == list(range(300, 400))
    at_fit = {row.number: row for row in fitted.evidence}
    for row in found:
        before = at_fit[row.number]
        found_again, at_first = row.audited, before.audited
        assert (row.client, row.key, found_again.failures) == (before.client, before.key, at_first.failures)
        scores = (np.array(one.scores, float) for one in (found_again, at_first))
        np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-6)
    assert learning.test(learned[0], some, 399) == Found()


def test_a_failed_fit_says_why(
    base: Artifact, some: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some.part(np.arange(1)).write(tmp_path / "r")
    plan = job(base, tmp_path / "r", tmp_path, memory=2**29)
    large = (
        "from de3.export import fit_process as fit; fit.learn.learn = lambda *_: bytes(2**30); fit.child()"
    )
    killed = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    for program, message in ((large, "512 MiB"), (killed, "killed, probably for lack of memory")):
        with pytest.raises(FitError, match=message):
            fit_by(program, monkeypatch, plan)
    monkeypatch.setattr(fitting, "TIMEOUT_S", 0.0)
    with pytest.raises(FitError, match="more than 0 s"):
        fit_by("import time; time.sleep(60)", monkeypatch)


def test_a_fit_ends_with_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "pid"
    program = f"import os, time; os.symlink(str(os.getpid()), {str(started)!r}); time.sleep(100)"
    monkeypatch.setattr(fitting, "PROGRAM", program)

    async def cancelled() -> None:
        running = asyncio.create_task(run_fit(fit_job()))
        await asyncio.to_thread(until, started.is_symlink, "the fit")
        running.cancel()
        ended, _ = await asyncio.wait([running], timeout=20)
        assert ended and running.cancelled()

    asyncio.run(cancelled())
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.readlink().name), 0)


def test_a_fit_knows_of_a_quota_and_does_not_write_unbuffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unbuffered, Python would lose the rest of a result whose write a pause has interrupted."""
    has_quota = list[bool]()

    async def note(_: object, is_limited: bool) -> None:
        has_quota.append(is_limited)

    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setattr(fitting, "cpu_quota", lambda: 1)
    monkeypatch.setattr(fitting, "_slow_down", note)
    found = fit_by('import sys; print(\'{"path": "%s"}\' % sys.stdout.write_through)', monkeypatch)
    assert (found.path, has_quota) == (Path("False"), [True]) and found.seconds > 0


@pytest.mark.parametrize(
    ("quota", "idle", "ticks", "signals", "policies"),
    [
        # All time is that of other processes; or all cores are idle, but there is a quota.
        (False, IDLE, [(100 * n, 100 * n, own) for n, own in enumerate((1, 1, 1, 2, 2, 3))], 3, 0),
        (True, IDLE, [(99 * n, 0, own) for n, own in enumerate((1, 2))], 1, 0),
        # In 8 or 20 ticks, of 100, one of two cores is idle; the fit itself runs as many.
        (False, NEVER, [(200 * n, 184 * n, 8 * n) for n in range(5)], 0, 0),
        (False, NEVER, [(200 * n, 160 * n, 20 * n) for n in range(5)], 0, 4),
    ],
)
def test_on_a_busy_machine_a_fit_is_paused_after_it_has_run_and_gets_the_lowest_priority_if_cores_are_idle(
    monkeypatch: pytest.MonkeyPatch, quota: bool, idle: float, ticks: list[Any], signals: int, policies: int
) -> None:
    """ticks: of all processors, those in use, and those of the fit; it has ended once there are no more.

    signals, policies: number of pauses, and of changes of the priority.
    """
    at, sent, changed = iter(ticks), list[int](), list[tuple[int, int]]()

    def times(_: int) -> Any:
        for tick in at:
            return tick
        raise ProcessLookupError

    waits = dict.fromkeys(("RUN_S", "PAUSE_S", "LONG_PAUSE_S"), 0.0)
    for name, value in {"_times": times, "IDLE_CORES": idle, "SPARE_CORES": SPARE, **waits}.items():
        monkeypatch.setattr(fitting, name, value)
    monkeypatch.setattr(os, "sysconf", lambda _: 2)
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, _: changed.append((pid, policy)))
    process: Any = SimpleNamespace(pid=7, returncode=None, send_signal=sent.append)
    asyncio.run(fitting._slow_down(process, quota))
    assert sent == [signal.SIGSTOP, signal.SIGCONT] * signals
    assert changed == [(7, os.SCHED_IDLE)] * policies


# The learner


FOUND = Found(records=1, held_out=1, speedup=1, proved_speedup=1, served_speedup=1, seconds=1)


def learner_of(base: Artifact, folder: Path, restored: bool = True, **settings: Any) -> Learner:
    on = Settings(learn=True, guarantee=0.05, state_dir=folder, **settings)
    place = LearnFolder(folder)
    place.prepare()
    one = Learner(base, place, on)
    if restored:
        one.restore(place.records(one.name, one.base))
    return one


def record_from(some: Records, k: int = 0, number: int = 1) -> Record:
    return Record("one", 1.0, number, some.pieces[k], some.spreads[k], some.states[k], some.logits[k])


def filled(base: Artifact, folder: Path, some: Records, count: int) -> Learner:
    one = learner_of(base, folder)
    for i in range(count):
        one.add(record_from(some, i % len(some), i))
    return one


def test_a_fit_is_due_after_500_records_and_then_after_half_as_many_more(
    base: Artifact, some: Records, tmp_path: Path
) -> None:
    one = filled(base, tmp_path, some, FIRST_FIT - 1)
    assert not one.is_due and not one.needs_saving
    one.add(record(0, shape=some.states.shape[1:]))  # type: ignore[arg-type]
    assert one.is_due and one.needs_saving
    assert one.begin() == 1
    assert not one.is_due and one.next_fit == 750
    for attempt in range(1, MAX_RESULTS + 3):
        for outcome in ("waits", "not_faster"):  # the result of an attempt replaces its earlier one
            one.end(result_of(attempt, FOUND, outcome))  # type: ignore[arg-type]
    assert [result.attempt for result in one.journal.results] == list(range(3, MAX_RESULTS + 3))
    for _ in range(750 - FIRST_FIT):
        one.add(record(0, shape=some.states.shape[1:]))  # type: ignore[arg-type]
    assert one.is_due
    waiting = Waiting(base, 1, FOUND, 1, [held(1)], 0, 700)
    one.wait_for_tests(waiting)
    assert not one.is_due and one.is_test_due and one.due_at == 1125  # a version that waits needs newer texts
    waiting.rows *= 204
    assert not one.is_test_due and waiting.next_test == 751  # a quarter more than it has
    one.wait_for_tests(replace(waiting, rows=[held(1)] * MAX_TESTS))
    assert one.waiting is None  # it does not wait for ever
    one.wait_for_tests(waiting)
    one.is_asked = True
    assert one.is_due
    one.count = 49  # the traffic has changed since
    assert not one.is_due


def test_a_change_of_the_traffic_asks_for_new_records(base: Artifact, some: Records, tmp_path: Path) -> None:
    one = filled(base, tmp_path, some, 1200)
    one.begin()
    one.save(all_records=True)
    one.wait_for_tests(Waiting(base, 1, FOUND, 1, [], 0, 1200))
    one.observe(Changes(2, 0, {}))
    assert one.count == 1200 and one.waiting is not None
    one.observe(Changes(2, 1, {}))
    assert (one.count, one.next_fit, one.journal.first_new) == (0, FIRST_FIT, 1201)
    assert one.waiting is None
    assert one.needs_saving
    one.observe(Changes(2, 1, {}))
    one.add(record_from(some))
    one.observe(Changes(3, 0, {}))  # a new version is not a change of the traffic
    assert (one.count, one.journal.first_new) == (1, 1201)
    one.save(all_records=True)
    again = learner_of(base, tmp_path)
    assert (again.count, again.next_fit, again.journal.first_new) == (1, FIRST_FIT, 1201)


def test_a_learner_continues_after_a_restart(base: Artifact, some: Records, tmp_path: Path) -> None:
    one = filled(base, tmp_path, some, 700)
    one.save(all_records=True)
    assert learner_of(base, tmp_path).is_due  # as no fit was begun
    one.begin()
    one.save()
    again = learner_of(base, tmp_path, restored=False)
    again.add(record_from(some))  # before the saved records are read
    again.restore(again._folder.records(again.name, again.base))
    assert again.count == 701
    again = learner_of(base, tmp_path)
    assert (len(again.reservoir), again.count, again.next_fit) == (700, 700, 750)
    assert not again.needs_saving
    assert again.journal.attempts == 1  # so no attempt uses another's part of the error probability
    found, saved = again.reservoir.records(), one.reservoir.records()
    for name in ("states", "logits", "shares", "keys", "numbers", "clients"):
        assert (getattr(found, name) == getattr(saved, name)).all()
    assert (found.base, found.names, again.reservoir.texts) == (saved.base, saved.names, 700)


def test_damaged_files_are_set_aside(base: Artifact, some: Records, tmp_path: Path) -> None:
    filled(base, tmp_path, some, 60).save(all_records=True)
    name = f"learned/base-{base_of(base.manifest)[:12]}"
    records, journal = tmp_path / f"{name}.records", tmp_path / f"{name}.json"
    records.write_bytes(b"no records")
    (draft := tmp_path / "learned/versions/base/.draft-of-a-fit-that-was-killed").mkdir(parents=True)
    for damaged in ('{"attempts": -1}', Journal(base="other", attempts=3).model_dump_json()):
        journal.write_text(damaged)
        one = learner_of(base, tmp_path)
        assert len(one.reservoir) == 0 and one.journal == Journal(base=base_of(base.manifest))
        Path(f"{journal}.old").unlink()
    assert Path(f"{records}.old").exists() and not draft.exists()
    assert (tmp_path / "learned").stat().st_mode & 0o777 == 0o700  # records are user data
    replace(some, base="x").write(records)
    assert len(learner_of(base, tmp_path).reservoir) == 0


def test_a_lost_journal_does_not_use_an_attempt_twice(
    base: Artifact, learned: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    assert learner_of(base, tmp_path / "new").journal.attempts == 0
    came_with = learner_of(learned[0], tmp_path / "new").journal
    assert came_with.attempts == 1  # the exits that the model came with
    shutil.copytree(learned[0].path.parent, LearnFolder(tmp_path).store.path / "base")
    assert learner_of(base, tmp_path).journal.attempts == 4
    assert LearnFolder(tmp_path).journal("base", "another base").attempts == 0


def test_a_learned_version_is_served_after_a_restart_unless_the_operator_changed_the_model(
    base: Artifact, learned: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    folder = LearnFolder(tmp_path)
    versions = Path(shutil.copytree(learned[0].path.parent, folder.store.path / "base"))
    one = learner_of(base, tmp_path)

    def restarted(artifact: Artifact = base) -> str:
        one.save()
        return LearnFolder(tmp_path).served_before(artifact).full_name

    assert LearnFolder(tmp_path).served_before(base) is base  # nothing was learned yet
    one.serve(base)
    assert restarted() == "base:1"
    one.serve(learned[0])
    assert restarted() == f"base:{FIRST}"
    assert restarted(version_of(base, 2)) == "base:2"
    assert restarted(version_of(base, 1, other_weights=True)) == "base:1"
    one.serve(version_of(base, 2))
    one.serve(learned[1])
    assert restarted() == "base:1" and restarted(version_of(base, 2)) == f"base:{FIRST + 1}"
    one.serve(version_of(base, 2))  # a rollback
    assert restarted(version_of(base, 2)) == "base:2"
    one.serve(learned[0])
    manifest = versions / f"{FIRST}/manifest.json"
    for damaged in (manifest.read_text().replace(base_of(base.manifest), "0" * 64), "{}"):
        assert restarted(version_of(base, 2)) == f"base:{FIRST}"
        manifest.write_text(damaged)
        assert restarted(version_of(base, 2)) == "base:2"
        shutil.copy(learned[0].path / "manifest.json", manifest)


def test_records_that_come_while_others_are_saved_are_added_later(
    base: Artifact, some: Records, tmp_path: Path
) -> None:
    one = filled(base, tmp_path, some, 60)
    one.hold()
    for _ in range(MAX_HELD + 2):  # more than are held back
        one.add(record_from(some))
    assert len(one.reservoir) == 60 and one.count == 62 + MAX_HELD
    one.observe(Changes(7, 1, {}))  # what is held back is from before the change
    assert one.journal.first_new == 61 + MAX_HELD
    assert one.resume(MAX_HELD - 1) and len(one.reservoir) == 59 + MAX_HELD
    one.add(record_from(some))
    assert len(one.reservoir) == 59 + MAX_HELD
    for _ in range(2):
        assert not one.resume(2) and len(one.reservoir) == 61 + MAX_HELD


# The guarantee


def test_held_out_texts_prove_a_tau_but_are_no_audits_and_later_attempts_need_more(
    learned: tuple[Artifact, Artifact],
) -> None:
    """The e-value of 160 texts that agree is 140. Attempt 2 needs 120, attempt 3 needs 240."""
    assert sum(error_of(attempt) for attempt in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)
    (first, _), taus = learned, []
    rows = [held(key, cut=239, number=240 + key) for key in range(160)]
    for attempt, learn in ((1, True), (2, True), (3, True), (3, False)):
        assert first.manifest.learned is not None
        one = first.manifest.learned.model_copy(update={"attempt": attempt})
        ledger = ledger_of(first.manifest.model_copy(update={"learned": one}), learn=learn)
        # Texts that were counted before do not count, nor those that are near to a fitted one.
        known = [replace(row, key=None) for row in rows]
        ledger.count_held_out([*rows[:120], *rows, *known], {"": 1})
        taus.append(ledger.rules.default.rule.tau)
        assert ledger.audits == 0
        assert (ledger.speedup() > 1) == (taus[-1] > 0)  # from the held-out texts, until there are audits
    assert [tau > 0 for tau in taus] == [True, True, False, True]
    with pytest.raises(ValueError, match="could be read by the fit"):
        held(1, number=CUT)
    with pytest.raises(ValueError, match="another fit"):
        ledger.count_held_out([held(1)], {"": 1})


def test_held_out_texts_prove_the_tau_of_their_tenant(learned: tuple[Artifact, Artifact]) -> None:
    """The speed-up is that of the traffic: a tenant without held-out texts starts at full depth."""
    manifest = learned[0].manifest
    ledger = ledger_of(manifest, learn=True, api_keys=KEYS)
    rows = [held(key, 240 + key, name, cut=239) for name in ("one", "gone") for key in range(400)]
    ledger.count_held_out([*rows, *rows[:1]], {"one": 3, "silent": 1})
    assert {name: tenant.index > 0 for name, tenant in ledger.tenants.items()} == {"one": True}
    assert ledger.speedup() == pytest.approx(manifest.num_layers / (manifest.num_layers / 4))


@pytest.mark.parametrize("reset", [False, True])
def test_texts_from_before_a_change_while_a_version_is_loaded_prove_nothing(
    learned: tuple[Artifact, Artifact], reset: bool
) -> None:
    """A change of one tenant's traffic is no change of another's."""
    manifest, settings = learned[0].manifest, Settings(guarantee=0.05, learn=True, api_keys=KEYS)  # type: ignore[arg-type]
    ledgers, rules = Ledgers(settings, lambda *_: None), Rules(manifest, settings)
    ledgers.serve(manifest, rules, "native", 1.0)
    current = ledgers.get(learned[0].full_name)
    assert current is not None

    def count(name: str, differs: bool) -> None:
        texts = Settled(name, current.tenant(name).epoch, 1.0, may_rise=True)
        for key in range(400):
            texts.add(key, Audited([0.0, 0.0, 0.0, None], [[differs] * 3 + [False]]), differs)
        current.count([texts])

    count("one", False)
    count("two", False)
    rows = [held(key, 240 + key, name, cut=239) for name in ("one", "two") for key in range(400)]
    ledgers.prepare("base:7", rows, current.manifest.full_name)
    count("one", True)
    assert current.changes() == {"one": 1}
    if reset:
        current.reset()
    ledgers.serve(manifest.model_copy(update={"version": 7}), rules, "native", 1.0)
    new = ledgers.get("base:7")
    assert new is not None
    assert {n for n in ("one", "two") if new.tenant(n).index > 0} == (set() if reset else {"two"})


# The learners of a server


class Around:
    """A stand-in for the rest of the server: the served versions, and the changes that the learners ask for."""

    def __init__(self, base: Artifact) -> None:
        self.speeds = {1: 1.5}
        self.found = Changes(1, 0, {})
        self.starts = [9.0]  # speed-ups with which a version would start; the last one stays
        self.others = dict[str, str]()  # bases of models with other weights
        self.prepared, self.changes = dict[str, Any](), list[dict[str, Any]]()
        self.tested = list[list[int | None]]()  # keys of the texts that tested a version
        self.conflicts = 0
        self.own = base_of(base.manifest)
        self.before_tests: Callable[[], object] = lambda: None  # called while a speed-up is computed

    def base(self, name: str) -> str | None:
        return self.others.get(name, self.own)

    def in_service(self, name: str, version: int) -> InService:
        assert name == "base"
        return InService(version, self.speeds.get(version, 1.0))

    def traffic_changes(self, name: str, version: int) -> Changes:
        return Changes(version, self.found.total, self.found.by_tenant)

    def versions(self, _: str) -> set[int]:
        return set(self.speeds)

    def start_speedup(self, manifest: Manifest, rows: Sequence[HeldOut], current: str) -> float:
        self.tested.append([row.key for row in rows])
        self.before_tests()
        return self.starts.pop(0) if len(self.starts) > 1 else self.starts[0]

    def prepare(self, name: str, rows: Sequence[HeldOut], current: str) -> None:
        self.prepared[name] = rows, current

    async def change(self, change: dict[str, Any]) -> dict[str, Any]:
        if self.conflicts:
            self.conflicts -= 1
            raise RequestError("an admin changes the models", cause="conflict")
        self.changes.append(change)
        return {}


@dataclass
class Learning:
    """Learners of a server that serves base:1, and the job of the fit that they ran."""

    learners: Learners
    around: Around
    folder: LearnFolder
    record: Record
    monkeypatch: pytest.MonkeyPatch
    base: Artifact
    job: Job | None = None
    outcome: str = ""  # wait for this one of the latest fit; empty: for any

    def add_records(self) -> None:
        """Add as many records as a fit or test needs."""
        for _ in range(MIN_RECORDS):
            self.learners.add("base:1", self.record)

    def fit(self, during: Callable[[], object] = lambda: None) -> Result:
        """Run a fit, which takes no time. during: called while it runs."""
        learner = self.learners.of("base")

        async def run_fit(job: Job) -> Found:
            self.job, learner = job, self.learners.of("base")
            saved = self.folder.journal("base", learner.base)  # no attempt may be used twice after a crash
            assert saved.attempts == job.attempt
            row = held(1, audited=Audited([0.5, None], [[True, False]]))
            if job.after is not None:
                newer = [replace(row, key=key) for key in (None, 7, 8)]
                return Found(
                    evidence=[*newer, replace(newer[0], audited=Audited([0.5, None], [[False, False]]))]
                )
            during()
            path = job.store / "base" / str(job.version)
            shutil.copytree(self.base.path, path)
            manifest = json.loads((path / "manifest.json").read_text()) | {"version": job.version}
            (path / "manifest.json").write_text(json.dumps(manifest))
            return FOUND.model_copy(update={"path": path, "evidence": [row]})

        async def run() -> None:
            self.learners.start()
            self.learners.report("base", starts=True)
            found = learner.journal

            def is_over() -> bool:
                return bool(found.results) and self.outcome in ("", found.results[-1].outcome)

            await asyncio.to_thread(until, is_over, "the fit", 10)
            fitting = self.learners._fitting
            assert fitting is not None
            await asyncio.to_thread(until, fitting.done, "its end")
            await asyncio.to_thread(self.learners.stop)

        self.monkeypatch.setattr("de3.server.learn.learners.run_fit", run_fit)
        asyncio.run(run())
        return learner.journal.results[-1]


@pytest.fixture
def learning_of_base(
    base: Artifact, some: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Learning:
    monkeypatch.setattr("de3.server.learn.learners.CHECK_S", 0.01)
    around = Around(base)
    settings = Settings(learn=True, guarantee=0.2, state_dir=tmp_path)
    learners = Learners(settings, around, around.change)
    learners.serve(base)
    learners.set_current({"base": 1})
    one = Learning(learners, around, LearnFolder(tmp_path), record_from(some), monkeypatch, base)
    one.add_records()
    return one


def test_a_fit_is_served_with_its_evidence(learning_of_base: Learning, base: Artifact) -> None:
    one = learning_of_base
    one.around.conflicts = 1
    result = one.fit()
    assert (result.outcome, result.version, result.attempt) == ("served", FIRST, 1)
    change = {"what": "load", "name": "base", "version": FIRST, "role": "current", "share": 0.0}
    assert one.around.changes == [change]
    rows = [held(1, audited=Audited([0.5, None], [[True, False]]))]
    assert one.around.prepared == {f"base:{FIRST}": (rows, "base:1")}
    assert one.learners.fits == {("base", "served"): 1}
    path = one.folder.records_path("base", base_of(base.manifest))
    assert len(read(path, 2**30)) == MIN_RECORDS and one.job.records == path
    assert one.job.base == base.path and one.job.memory > fitting.MEMORY_BYTES + 4 * base.size()
    assert (one.job.version, one.job.attempt, one.job.limits.differing, one.job.first_new) == (
        FIRST,
        1,
        0.2,
        0,
    )
    assert one.folder.journal("base", base_of(base.manifest)).latest == FIRST


def test_a_pin_holds_against_a_faster_version_until_it_is_lifted(
    learning_of_base: Learning, tmp_path: Path
) -> None:
    one = learning_of_base
    learner, pins = one.learners.of("base"), Store(Settings().store, tmp_path)
    pins.set_pin("base", 1)
    assert (one.fit().outcome, one.around.changes) == ("pinned", [])
    assert "another version is pinned" in learner.report()["message"]
    assert learner.waiting is not None
    pins.set_pin("base", None)
    one.add_records()
    one.outcome = "served"
    assert one.fit().outcome == "served"
    assert one.around.changes[0]["version"] == FIRST  # another fit may be due already


def test_a_version_waits_until_newer_texts_prove_that_it_starts_faster(learning_of_base: Learning) -> None:
    """Texts near to those of the fit count only against it; it is not served if it starts as fast as today's."""
    one = learning_of_base
    one.around.starts, one.outcome = [1.5 * MIN_GAIN - 1e-9, 1.0, 1.5 * MIN_GAIN], "served"
    one.around.before_tests = one.add_records
    result = one.fit()
    assert (result.version, result.attempt, result.held_out) == (FIRST, 1, 7)
    assert one.around.tested == [[1], [1, None, 7, 8], [1, None, 7, 8, None, 7, 8]]
    assert one.job is not None and one.job.base.name == str(FIRST)
    assert one.job.after is not None and one.job.after >= 2 * MIN_RECORDS
    assert [change["version"] for change in one.around.changes] == [FIRST]
    assert one.learners.fits == {("base", "waits"): 1, ("base", "served"): 1}
    assert one.learners.of("base").waiting is None


def test_texts_from_before_a_change_of_their_tenant_prove_nothing(
    learning_of_base: Learning, base: Artifact, some: Records, tmp_path: Path
) -> None:
    """The change of a tenant with few texts does not void what was learned from the others."""
    one = learning_of_base

    def during() -> None:
        one.around.found = Changes(1, 0, {"two": 1})

    assert one.fit(during).outcome == "served"
    journal = one.learners.of("base").journal
    assert one.around.tested == [[1]] and journal.void == {"two": MIN_RECORDS + 1}
    assert journal.first_new == 0
    keyless = learner_of(base, tmp_path / "keyless")  # without keys, all clients are one tenant
    for each, tenant in ((learner_of(base, tmp_path / "keys", api_keys=KEYS), "one"), (keyless, "")):
        for number in range(10):
            each.add(record_from(some, number))
        each.observe(Changes(1, 0, {tenant: 1}))
        assert not each.may_prove(held(1, 10)) and each.may_prove(held(1, 11))
    each.observe(Changes(1, 0, {str(number): 1 for number in range(MAX_VOID)}))
    each.observe(Changes(2, 0, {"another": 1}))  # the first one that a new version finds counts, too
    again = Journal.model_validate_json(each.journal.model_dump_json())
    assert again.void.keys() == {str(MAX_VOID - 1), "another"} and again.first_new > 1


def test_a_change_while_the_speed_up_is_computed_voids_the_tests(learning_of_base: Learning) -> None:
    one = learning_of_base

    def change() -> None:
        one.around.found = Changes(1, 0, {"": 1})

    one.around.before_tests = change
    assert one.fit().outcome == "served" and one.around.prepared == {f"base:{FIRST}": ([], "base:1")}


@pytest.mark.parametrize("change", ["traffic", "version", "weights", "unloaded"])
def test_a_fit_is_not_served_if_the_traffic_or_the_models_changed_meanwhile(
    learning_of_base: Learning, base: Artifact, change: str
) -> None:
    """The records of the model are saved nevertheless."""
    one, learners = learning_of_base, learning_of_base.learners

    def during() -> None:
        one.folder.records_path("base", base_of(base.manifest)).unlink()
        if change == "traffic":
            one.around.found = Changes(1, 1, {})
            return
        other = version_of(base, 2, other_weights=change == "weights")
        learners.serve(other)
        one.around.others["base:2"] = base_of(other.manifest)
        learners.set_current({} if change == "unloaded" else {"base": 2})
        for version in (1, 2):
            learners.add(f"base:{version}", one.record)

    result = one.fit(during)
    assert result.outcome == "outdated" and result.version is None
    assert not one.around.changes and not one.folder.versions("base")
    if change == "unloaded":
        assert learners.all == []
    else:  # records of other weights are of no use
        assert learners.of("base").count == {"traffic": 0, "version": 52, "weights": 1}[change]
    assert one.folder.records("base", base_of(base.manifest)) is not None


@pytest.mark.parametrize(("canary", "rival"), [({FIRST: 2.0}, 2.0), ({FIRST: 1.4}, 1.5), ({}, 1.5)])
def test_a_fit_has_to_beat_the_faster_of_the_current_version_and_its_canary(
    learning_of_base: Learning,
    learned: tuple[Artifact, Artifact],
    canary: dict[int, float],
    rival: float,
) -> None:
    one = learning_of_base
    one.learners.of("base").journal.latest = FIRST
    one.learners.serve(learned[0])
    one.around.speeds |= canary
    one.fit()
    assert one.job is not None and one.job.speedup == rival
    assert (one.job.base == learned[0].path) == (rival == 2)


def test_old_learned_versions_are_removed_unless_they_are_in_use(
    learning_of_base: Learning, learned: tuple[Artifact, Artifact]
) -> None:
    one = learning_of_base
    for version in range(FIRST, FIRST + 12):
        (one.folder.store.path / f"base/{version}").mkdir(parents=True)
    (one.folder.store.path / "base/.draft-of-a-fit-that-was-killed").mkdir()
    one.around.speeds[FIRST + 2] = 1.0
    one.learners.serve(learned[0])
    one.learners.set_current({"base": FIRST})
    assert one.fit().version == FIRST + 12
    left = [FIRST, FIRST + 2, *range(FIRST + 5, FIRST + 13)]
    assert {path.name for path in (one.folder.store.path / "base").iterdir()} == set(map(str, left))


def test_a_full_disk_stops_a_fit(learning_of_base: Learning, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/a/secret/file")

    monkeypatch.setattr(os, "fsync", full)
    result = learning_of_base.fit()
    message = "state_dir: cannot save the records: No space left on device"  # the path is not shown
    assert (result.outcome, result.error) == ("failed", message)
    assert not list(learning_of_base.folder.path.glob("*.records*"))


def test_an_error_names_no_folders(learning_of_base: Learning) -> None:
    def fail() -> None:
        raise FitError("/a/secret/records: it is damaged")

    assert learning_of_base.fit(fail).error == "records: it is damaged"


# The server


def report(server: Server) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/v1/models/base/learn")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def learner_in(server: Server) -> Learner:
    """The learner of the server's model, for waits: polling it costs less than requests."""
    learner: Learner = server.service.shared.audit_store.learners.of("base")  # type: ignore[attr-defined]
    return learner


def change(server: Server, what: str, **fields: Any) -> Any:
    """The answer to an admin's request."""
    headers = {"Authorization": "Bearer " + "k" * 32}
    return httpx.post(f"{server.url}/v1/models/base/{what}", headers=headers, json=fields).json()


def test_a_server_learns_exits_and_serves_them_again_after_a_restart(
    stock_store: Path, base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Path(shutil.copytree(stock_store, tmp_path / "store"))  # gets a pin
    monkeypatch.setattr("de3.server.learn.learners.CHECK_S", 0.05)
    options: dict[str, Any] = {"learn": True, "guarantee": 0.2, "state_dir": tmp_path, "models": ["base"]}
    keys, texts, last = {"admin_keys": "root " + "k" * 32}, texts_of(300, 9), base.manifest.num_layers
    with serving(store, **options, **keys) as server:
        assert "too few to fit exits" in change(server, "learn")["error"]["message"]
        rows = server.classify(input=texts[:140]).json()["data"]
        assert {row["exit"]["layer"] for row in rows} == {last}
        path = f"{server.url}/v1/models/base/audit"
        until(lambda: httpx.get(path).json()["tenants"], "the audits")
        audit = httpx.get(path).json()
        assert (audit["tau"], audit["tenants"][0]["tau"]) == ({"tau": 0.0, "reason": "no_exits"}, 0.0)
        assert change(server, "learn")["object"] == "learn"
        until(lambda: learner_in(server).journal.results, "the fit that was asked for")
        fit = report(server)["fits"][0]
        assert fit["outcome"] == "served" and fit["version"] == FIRST and fit["attempt"] == 1, fit
        assert fit["records"] == 140 and 40 < fit["held_out"] < 70
        (listed,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert (listed["id"], listed["learned"]["attempt"]) == (f"base:{FIRST}", 1)
        answer = server.classify(input=texts[140:]).json()
        assert answer["model"] == f"base:{FIRST}"
        assert min(row["exit"]["layer"] for row in answer["data"]) < last
        until(lambda: len(learner_in(server).reservoir) > 140, "more records")
        assert server.metric("de3_learn_records", model="base") > 140
        assert server.metric("de3_learn_fits_total", model="base", outcome="served") == 1
        said = report(server)
    with serving(store, **options, **keys) as server:
        assert server.classify(input="a film").json()["model"] == f"base:{said['serving']}" == f"base:{FIRST}"
        until(lambda: len(learner_in(server).reservoir) >= said["records"], "the records")
        assert report(server)["fits"] == said["fits"]
        back = change(server, "rollback")
        assert (back["model"], back["next_start"], back["reason"]) == ("base:1", "base:1", "pinned")
        with pytest.raises(RequestError, match="pinned to another version"):  # as a learner would ask for it
            asyncio.run(server.service.manager.plan(Change("load", "base", FIRST)))
    with serving(store, **options, **keys) as server:
        assert server.classify(input="a film").json()["model"] == "base:1"
        pinned = change(server, "load", version=FIRST)
        assert (pinned["next_start"], pinned["reason"]) == (f"base:{FIRST}", "pinned")
        assert change(server, "rollback")["model"] == "base:1"
        newest = change(server, "load")  # of a stock model, whose learned exits would otherwise be lost
        assert newest["model"] == newest["next_start"] == f"base:{FIRST}" and newest["reason"] == "learned"
        change(server, "rollback")
        assert "was served as version" in report(server)["message"]
        assert change(server, "load")["next_start"] == f"base:{FIRST}"
    (tmp_path / f"learned/versions/base/{FIRST}/layer_01.onnx").write_bytes(b"damaged")
    with serving(store, **options) as server:
        assert server.classify(input="a film").json()["model"] == "base:1"


@pytest.mark.slow
def test_a_fit_gets_a_small_share_of_a_busy_processor() -> None:
    shown = (
        "from de3.export.fit_process import _run_at_idle; _run_at_idle();"
        "import os; print(os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0))"
    )
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(os.SCHED_BATCH), "19"]
