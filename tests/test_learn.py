"""Exits that a server learns from live traffic: records, fits, learned versions, restarts, and the promise."""

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.exits.promise import Profile, Promise, error_of
from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy
from de3.export import fit
from de3.export import learn as learning
from de3.export.classifier import Stock, convert
from de3.model_store import records as files
from de3.model_store.manifest import Learned, Manifest, base_of
from de3.model_store.model import Model
from de3.model_store.records import Records, joined, read
from de3.model_store.segments import ForwardPass
from de3.model_store.store import Artifact, Store
from de3.server.audit.auditor import LEARN_TEXTS, Traffic
from de3.server.audit.ledger import Audited, Ledger, Settled
from de3.server.learn import fitting, learner
from de3.server.learn.fitting import FitError, run_fit
from de3.server.learn.journal import LEARNED_FROM, Journal, LearnFolder
from de3.server.learn.learner import FIRST_FIT, InService, Learner, result_of
from de3.server.learn.record import HeldOut, Record
from de3.server.learn.reservoir import Reservoir
from de3.server.rules import Rules
from de3.server.settings import Settings
from de3.training.data import Example
from tests.commands import de3, refusal
from tests.fixtures import made_once, make_rows, save_encoder
from tests.serving import Server, process, serving, until, url_when_ready
from tests.stock import fine_tuned

LABELS = ["negative", "positive"]
FIRST = LEARNED_FROM + 1  # the first learned version


@pytest.fixture(scope="module")
def stock_store(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    """A store with a fine-tuned classifier whose only exit is the last layer: `base` in int8, `plain` in fp32."""
    examples = [Example(text, int(label)) for text, label in make_rows(600, 5)]
    stock = fine_tuned(tmp_path_factory, "stock-learn", encoder, LABELS, examples, 4)

    def make(folder: Path) -> None:
        convert(Stock.open("stock", stock), Store(folder), "base", "int8")
        convert(Stock.open("stock", stock), Store(folder), "plain", "fp32")

    return made_once(tmp_path_factory, "learn-store", make)


def texts_of(count: int, seed: int) -> list[str]:
    """Distinct texts, each with a number at its end; fewer than `count` if some would be empty."""
    return [f"{text} {number}" for number, (text, _) in enumerate(make_rows(count, seed)) if text.strip()]


def records_of(model: Model, texts: Sequence[str], clients: Sequence[str] = ("one",)) -> Records:
    """Records of texts, as a server would make them; the texts are from the clients in turn."""
    manifest, n = model.manifest, len(texts)
    states = np.zeros((n, manifest.num_layers, manifest.hidden_size), np.float16)
    logits = np.zeros((n, len(manifest.labels)), np.float32)
    for i, text in enumerate(texts):
        steps = model.full_depth(model.tokenize(text))
        states[i] = [model.pooled(step.hidden) for step in steps[:-1]]
        logits[i] = steps[-1].logits
    number = np.arange(n)
    owners = (number % len(clients)).astype(np.int32)
    keys = number.astype(np.uint64)
    texts_by = [float(n) / len(clients)] * len(clients)
    return Records(
        base_of(manifest), states, logits, np.ones(n), keys, number, owners, list(clients), texts_by
    )


@pytest.fixture(scope="module")
def base(stock_store: Path) -> Artifact:
    return Store(stock_store).open("base")


@pytest.fixture(scope="module")
def some(base: Artifact) -> Records:
    return records_of(Model(base, "onnxruntime"), texts_of(400, 6), ("one", "two"))


# Run fits at the priority of the tests: at the lowest one, they would wait for everything else on the machine.
PROGRAM = "from de3.export import learn; learn._run_at_idle = lambda: None; learn.child()"
NORMAL_PRIORITY = f"""
from de3.server.learn import fitting
fitting.IDLE_CORES, fitting.PROGRAM = -1.0, "{PROGRAM}"
"""
SERVE = """
from de3.cli import app
app()
"""


@pytest.fixture(autouse=True)
def at_normal_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "PROGRAM", PROGRAM)
    monkeypatch.setattr(fitting, "IDLE_CORES", -1.0)


def record(
    number: int = 0, client: str = "one", share: float = 1.0, shape: tuple[int, int] = (2, 3)
) -> Record:
    return Record(client, share, number, np.full(shape, number, np.float16), np.zeros(2, np.float32))


def reservoir(capacity: int, half_life: float = 1e9) -> Reservoir:
    size = 2 * 2 * 3 + 4 * 2 + 36
    return Reservoir("base", (2, 3), 2, capacity * size, half_life)


# The states


def test_pooled_states_are_the_means_of_the_hidden_states_alone_and_in_a_group(store: Path) -> None:
    model = Model(Store(store).open("tiny-int8"))
    tokens = [model.tokenize(text) for text in texts_of(9, 7)]
    alone = []
    for one in tokens:
        steps = model.full_depth(one)
        alone.append(np.stack([step.hidden[0].mean(0) for step in steps[:-1]]))
    assert model.forward is not None
    last = model.manifest.num_layers
    group = [ForwardPass(t, 0.0, Entropy(), last, True, states=model.empty_states()) for t in tokens]
    for _ in range(2):  # preempted halfway
        model.forward(group, layers=last // 2 + 1)
    for one, expected, token in zip(group, alone, tokens, strict=True):
        assert one.states is not None
        np.testing.assert_allclose(one.states, expected, rtol=1e-4, atol=1e-5)
        single = ForwardPass(token, 0.0, Entropy(), last, True, states=model.empty_states())
        model.forward([single])
        assert single.states is not None and single.states.tobytes() == one.states.tobytes()


# The reservoir


def test_a_reservoir_keeps_everything_until_it_is_full_and_stays_within_its_limit() -> None:
    kept = reservoir(20)
    for number in range(100):
        kept.add(record(number))
        assert len(kept) == min(number + 1, 20)
    found = kept.records()
    assert found.states.nbytes + found.logits.nbytes <= 20 * (2 * 2 * 3 + 4 * 2 + 36)
    assert (found.states[:, 0, 0].astype(int) == found.keys).all()  # states and keys are of the same records


def test_newer_texts_replace_older_ones() -> None:
    kept = reservoir(100, half_life=1000)
    for number in range(20_000):
        kept.add(record(number % 1000))
    numbers = kept.records().numbers
    assert numbers.min() > 20_000 - 15_000 and numbers.max() > 19_000
    assert 500 < 20_000 - np.median(numbers) < 2000  # the median age is the half-life


def test_a_text_that_was_drawn_rarely_stands_for_more_texts() -> None:
    kept = reservoir(400)
    for _ in range(2000):
        kept.add(record(1, share=1.0))
        kept.add(record(2, share=0.25))
    keys = kept.records().keys
    assert 0.72 < (keys == 2).mean() < 0.88  # expected: 4 of 5


def test_a_client_with_most_of_the_texts_leaves_half_of_the_room_to_others() -> None:
    kept = reservoir(100)
    for number in range(5000):
        kept.add(record(number % 500, "loud"))
        if number % 50 == 0:
            kept.add(record(number % 500, f"quiet-{number % 3}"))
    found = kept.records()
    loud = (found.clients == found.names.index("loud")).sum()
    assert loud <= 51  # nearly half of the 100 quiet texts are kept
    kept = reservoir(10)
    for number in range(100):
        kept.add(record(number, "only"))
    assert len(kept) == 10


def test_names_of_clients_are_bounded() -> None:
    kept = reservoir(10)
    for number in range(3000):
        kept.add(record(0, f"client-{number}"))
    assert len(kept.records().names) <= 1025


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1.0, 0.5, 0.05])), max_size=60))
def test_a_reservoir_counts_its_clients(steps: list[tuple[int, float]]) -> None:
    kept = reservoir(7)
    for number, (client, share) in enumerate(steps):
        kept.add(record(number, f"client-{client}", share))
    found = kept.records()
    held = np.bincount(found.clients, minlength=len(kept._held)) if len(found) else kept._held
    assert (held == kept._held).all() and len(found) == min(len(steps), 7)
    assert (np.diff(found.numbers) >= 0).all()
    assert kept.texts == pytest.approx(sum(1 / share for _, share in steps))


# Files of records


def test_records_survive_a_file_that_only_the_owner_can_read(some: Records, tmp_path: Path) -> None:
    some.write(tmp_path / "r")
    found = read(tmp_path / "r", 2**30)
    for name in ("states", "logits", "shares", "keys", "numbers", "clients"):
        assert (getattr(found, name) == getattr(some, name)).all()
    assert (found.base, found.names) == (some.base, some.names)
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def spoiled(some: Records, **fields: Any) -> Records:
    return replace(some, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"states": lambda r: r.states.astype(np.float32)}, "states must be F16"),
        ({"logits": lambda r: r.logits[:, :0]}, "logits must be"),
        ({"logits": lambda r: r.logits[:0]}, "it has 0 records"),
        ({"numbers": lambda r: r.numbers + 2**60}, "not in order"),
        ({"texts": lambda _: [1.0]}, "names of clients are damaged"),
        ({"texts": lambda _: [1.0, float("nan")]}, "names of clients are damaged"),
        ({"states": lambda r: r.states[:-1]}, "states must be"),
        ({"logits": lambda r: np.full_like(r.logits, np.nan)}, "logits is not finite"),
        ({"shares": lambda r: np.zeros(len(r))}, "a share must be above 0"),
        ({"shares": lambda r: np.full(len(r), 2.0)}, "at most 1"),
        ({"numbers": lambda r: r.numbers[::-1].copy()}, "not in order"),
        ({"clients": lambda r: np.full(len(r), 9, np.int32)}, "not among the names"),
        ({"clients": lambda r: np.full(len(r), -1, np.int32)}, "not among the names"),
        ({"names": lambda _: [1, 2]}, "names of clients are damaged"),
    ],
)
def test_a_damaged_file_of_records_is_refused(
    some: Records, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    spoiled(some, **{name: make(some) for name, make in fields.items()}).write(tmp_path / "r")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "r", 2**30)


def test_a_foreign_or_cut_file_of_records_is_refused(some: Records, tmp_path: Path) -> None:
    path = tmp_path / "r"
    with pytest.raises(FileNotFoundError):
        read(path, 2**30)
    some.write(path)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read(path, 100)
    for data in (path.read_bytes()[:-7], b"", b"{}", b"\xff" * 100):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged"):
            read(path, 2**30)
    path.write_bytes(files.save({"x": np.zeros(1)}))
    with pytest.raises(ValueError, match="not a file of records"):
        read(path, 2**30)
    with pytest.raises(ValueError, match="another model"):
        some.check("other", 1, 2, 3)
    with pytest.raises(ValueError, match="shapes"):
        some.check(some.base, 1, 2, 3)


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
    return learning.fit_exits(some, base.manifest, 1, 0.05)


def test_a_fit_is_tested_on_texts_that_it_did_not_see(some: Records) -> None:
    fits, tests = learning._split(some, 1, 0)
    assert not set(fits.keys.tolist()) & set(tests.keys.tolist())
    assert len(tests) == round(learning.HELD_OUT * len(some)) and len(fits) + len(tests) == len(some)
    assert (learning._split(some, 2, 0)[1].keys != tests.keys).any()  # each attempt has its own split
    copies = replace(some, keys=some.keys // 4)
    fits, tests = learning._split(copies, 1, 0)
    assert not set(fits.keys.tolist()) & set(tests.keys.tolist())
    assert len(tests) == 160  # as many, although most texts are repeats


@pytest.mark.parametrize("count", [100, 300, 900])
def test_a_fold_remembers_nothing_of_the_texts_that_it_leaves_out(count: int) -> None:
    """A fold's fit starts from a fit to all texts. Answers are random: on the texts left out it is right by chance."""
    rng = np.random.default_rng(count)
    hidden = rng.normal(size=(count, 1, 256)).astype(np.float16)
    logits = rng.normal(size=(count, 2)).astype(np.float32) * 3
    texts = learning.RecordedStates([], logits, None, None, states=hidden)
    axes, agreed = dict[Any, Any](), list[float]()
    near = next(fit._fitted(texts, "mean", 0, (1e-4,), axes))[1]
    for k in range(4):
        part, others = (
            texts.part(np.flatnonzero(rows))
            for rows in (np.arange(count) % 4 == k, np.arange(count) % 4 != k)
        )
        weight, bias = next(fit._fitted(others, "mean", 0, (1e-4,), axes, near))[1]
        agreed.append(float(((part.pooled("mean", 0) @ weight.T + bias).argmax(1) == part.answers).mean()))
    assert np.mean(agreed) < 0.5 + 3 * 0.5 / count**0.5


def test_each_client_tests_in_proportion_to_its_traffic(some: Records) -> None:
    """One client has sent 9 of 10 texts, but has half of the records."""
    loud = replace(some, texts=[3600.0, 400.0])
    _, tests = learning._split(loud, 1, 0)
    counts = np.bincount(tests.clients)
    assert 6 < counts[0] / counts[1] < 14
    _, all_tests = learning._split(replace(some, texts=[400.0, 400.0]), 1, 0)
    assert len(all_tests) > 145


def test_after_a_change_only_new_texts_test_and_old_ones_are_at_most_as_many(some: Records) -> None:
    fits, tests = learning._split(some, 1, first_new=300)
    assert tests.numbers.min() >= 300
    assert (fits.numbers < 300).sum() == (fits.numbers >= 300).sum() == 60


def test_learned_exits_leave_full_depth_as_it_was(
    base: Artifact, fitted: learning.Fitted, tmp_path: Path
) -> None:
    path = learning.publish(base, fitted, Store(tmp_path), 3, 400, version=7)
    made = Store(tmp_path).open_path(path)
    manifest = made.manifest
    assert made.full_name == "base:7"
    assert manifest.learned is not None and manifest.learned.attempt == 3
    assert base_of(manifest) == base_of(base.manifest)
    assert manifest.exit_layers == list(range(manifest.num_layers + 1))
    for runtime in ("onnxruntime", "auto"):
        old, new = Model(base, runtime), Model(made, runtime)
        assert old.runtime == new.runtime
        for text in texts_of(20, 8):
            before, after = (model.full_depth(model.tokenize(text)) for model in (old, new))
            assert before[-1].logits is not None and after[-1].logits is not None
            assert before[-1].logits.tobytes() == after[-1].logits.tobytes()
            assert all(a.hidden.tobytes() == b.hidden.tobytes() for a, b in zip(before, after, strict=True))


def test_learned_exits_can_be_learned_anew(
    base: Artifact, some: Records, fitted: learning.Fitted, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    first = store.open_path(learning.publish(base, fitted, store, 1, 400, version=2))
    again = learning.fit_exits(some, first.manifest, 2, 0.05)
    second = store.open_path(learning.publish(first, again, store, 2, 400))
    assert base_of(second.manifest) == base_of(base.manifest)
    text = "a fine film"
    outputs = [model.full_depth(model.tokenize(text))[-1].logits for model in map(Model, (base, second))]
    assert outputs[0] is not None and outputs[1] is not None
    assert outputs[0].tobytes() == outputs[1].tobytes()


def test_the_model_answers_as_the_fit_measured(
    base: Artifact, fitted: learning.Fitted, some: Records, tmp_path: Path
) -> None:
    """On the held-out texts, the exits of the served model give the scores that the fit reports as evidence."""
    store = Store(tmp_path)
    model = Model(store.open_path(learning.publish(base, fitted, store, 1, 400, version=2)), "onnxruntime")
    signal, texts = model.manifest.default_signal, texts_of(400, 6)
    assert signal.name == "risk"
    worst = []
    for row in fitted.evidence[:50]:
        steps = model.full_depth(model.tokenize(texts[row["key"]]))
        labels = [int(step.logits.argmax()) for step in steps if step.logits is not None]
        assert [label != labels[-1] for label in labels] == row["differs"]
        rule, passed = ExitRule(0.0, signal), []
        for layer, step in enumerate(steps):
            assert step.logits is not None
            distances = None if step.distances is None else step.distances.tolist()
            passed.append(rule.read(layer, step.logits.tolist(), distances))
            score = signal.score(passed)
            if score is not None and row["scores"][layer] is not None:
                worst.append(abs(score - row["scores"][layer]))
    assert max(worst) < 0.05 and np.mean(worst) < 0.005


def test_too_few_records_are_refused(some: Records, base: Artifact) -> None:
    with pytest.raises(ValueError, match="too few"):
        learning.fit_exits(some.part(np.arange(8)), base.manifest, 1, 0.02)


def test_fp32_models_learn_too(stock_store: Path, tmp_path: Path) -> None:
    plain = Store(stock_store).open("plain")
    found = records_of(Model(plain, "onnxruntime"), texts_of(200, 6))
    fitted = learning.fit_exits(found, plain.manifest, 1, 0.1)
    made = Store(tmp_path)
    model = Model(made.open_path(learning.publish(plain, fitted, made, 1, 200)))
    assert model.runtime == "onnxruntime" and len(model.manifest.exit_layers) > 1


def test_exits_are_imported_from_the_records_of_several_servers(
    base: Artifact, stock_store: Path, some: Records, tmp_path: Path
) -> None:
    some.part(np.arange(250)).write(tmp_path / "a")
    some.part(np.arange(250, 400)).write(tmp_path / "b")
    store = tmp_path / "store"
    shutil.copytree(stock_store, store)
    said = de3(f"import base --records {tmp_path}/a --records {tmp_path}/b --name both --store {store}")
    assert "held-out records the exits allow" in said and "both/1" in said
    made = Store(store).open("both")
    assert made.manifest.learned is None and len(made.manifest.exit_layers) > 1
    with serving(store, models=["both"]) as server:  # like any other model
        assert server.classify(input="a film", tau=1).json()["data"][0]["exit"]["layer"] == 0
    (tmp_path / "b").write_bytes(b"no")
    assert "b: it is damaged" in refusal(f"import base --records {tmp_path}/b --name x --store {store}")
    assert "either --texts or --records" in refusal(f"import base --name x --store {store}")
    said = refusal(f"import base --records {tmp_path}/a --name x --store {store} --signal risk")
    assert "--signal: cannot be combined with --records" in said


@pytest.mark.slow
@pytest.mark.parametrize("family", ["modernbert", "deberta-v2", "mpnet", "distilbert"])
def test_every_family_learns(family: str, tmp_path: Path) -> None:
    """One of the families is ModernBERT, whose exits see the hidden states through a final norm."""
    save_encoder(tmp_path / "stock", family, labels=3)
    store = Store(tmp_path / "store")
    convert(Stock.open("stock", tmp_path / "stock"), store, "base", "int8")
    base = store.open("base")
    old = Model(base, "onnxruntime")
    found = records_of(old, texts_of(120, 6))
    fitted = learning.fit_exits(found, base.manifest, 1, 0.1)
    new = Model(store.open_path(learning.publish(base, fitted, store, 1, 120)), "onnxruntime")
    for text in texts_of(10, 14):
        before, after = (model.full_depth(model.tokenize(text)) for model in (old, new))
        assert before[-1].logits is not None and after[-1].logits is not None
        assert before[-1].logits.tobytes() == after[-1].logits.tobytes()
        for layer, (weight, bias) in enumerate(fitted.exits.classifiers):
            expected = weight @ new.pooled(after[layer].hidden) + bias
            np.testing.assert_allclose(after[layer].logits, expected, rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "labels"), [("multi_label_classification", 3), ("regression", 1)])
def test_labels_and_values_are_learned_too(kind: str, labels: int, tmp_path: Path) -> None:
    save_encoder(tmp_path / "stock", labels=labels, problem_type=kind)
    store = Store(tmp_path / "store")
    convert(Stock.open("stock", tmp_path / "stock"), store, "base", "int8")
    base = store.open("base")
    found = records_of(Model(base, "onnxruntime"), texts_of(120, 6))
    fitted = learning.fit_exits(found, base.manifest, 1, 0.1)
    made = store.open_path(learning.publish(base, fitted, store, 1, 120))
    assert not made.manifest.prototype_layers and made.manifest.default_signal.name == "risk"
    assert Model(made).full_depth(Model(made).tokenize("a film"))[0].logits is not None


# The process


def job(base: Artifact, records: Path, store: Path, **fields: Any) -> dict[str, Any]:
    plan = {
        "base": str(base.path),
        "records": str(records),
        "store": str(store),
        "version": 2,
        "attempt": 1,
        "rate": 0.05,
        "first_new": 0,
        "speedup": 1.0,
        "allowed": 1.0,
        "memory": 2**31,
    }
    return plan | fields


def test_a_fit_runs_in_a_process_of_its_own(base: Artifact, some: Records, tmp_path: Path) -> None:
    some.write(tmp_path / "r")
    found = asyncio.run(run_fit(job(base, tmp_path / "r", tmp_path / "store")))
    assert found["records"] == 400 and found["held_out"] == 160 == len(found["evidence"])
    assert Path(found["path"]) == tmp_path / "store/base/2"
    # Exits that are not faster than the served ones are not published.
    slow = job(base, tmp_path / "r", tmp_path / "store", version=3, speedup=1e6)
    found = asyncio.run(run_fit(slow))
    assert found["path"] is None and found["evidence"] == []
    assert not (tmp_path / "store/base/3").exists()


@pytest.mark.slow
def test_a_fit_that_cannot_be_made_says_why(
    base: Artifact, some: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r"
    path.write_bytes(b"no")
    with pytest.raises(FitError, match="damaged"):
        asyncio.run(run_fit(job(base, path, tmp_path)))
    replace(some, base="x").write(path)
    with pytest.raises(FitError, match="another model"):
        asyncio.run(run_fit(job(base, path, tmp_path)))
    some.write(path)
    with pytest.raises(FitError, match="ended with 1"):
        asyncio.run(run_fit({"base": "wrong"}))
    full = "def full(*_): raise MemoryError\nfrom de3.export import learn\nlearn.learn = full\nlearn.child()"
    monkeypatch.setattr(fitting, "PROGRAM", full)
    with pytest.raises(FitError, match="more than 2048 MiB"):
        asyncio.run(run_fit(job(base, path, tmp_path)))
    monkeypatch.setattr(fitting, "PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(fitting, "TIMEOUT_S", 0.2)
    with pytest.raises(FitError, match=r"takes more than 0\.2 s"):
        asyncio.run(run_fit(job(base, path, tmp_path)))
    monkeypatch.setattr(fitting, "TIMEOUT_S", 60.0)
    monkeypatch.setattr(fitting, "PROGRAM", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    with pytest.raises(FitError, match="killed, probably for lack of memory"):
        asyncio.run(run_fit(job(base, path, tmp_path)))


@pytest.mark.slow
def test_under_a_quota_a_fit_is_slowed_down(
    base: Artifact, some: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some.write(tmp_path / "r")
    stops = []
    stop = asyncio.subprocess.Process.send_signal

    def send(process: "asyncio.subprocess.Process", number: int) -> None:
        stops.append(number)
        stop(process, number)

    monkeypatch.setattr(asyncio.subprocess.Process, "send_signal", send)
    monkeypatch.setattr(fitting, "_has_quota", lambda: True)
    monkeypatch.setattr(fitting, "LONG_PAUSE_S", 0.02)
    found = asyncio.run(run_fit(job(base, tmp_path / "r", tmp_path / "store")))
    assert found["path"] is not None
    assert signal.SIGSTOP in stops and signal.SIGCONT in stops


# The learner


FOUND = ("records", "held_out", "speedup", "proved_speedup", "served_speedup", "seconds")


def learner_of(base: Artifact, folder: Path, **settings: Any) -> Learner:
    on = Settings(learn=True, guarantee=0.05, state_dir=folder, **settings)
    place = LearnFolder(folder)
    place.prepare()
    one = Learner(base, place, on)
    one.restore(place.records(one.name, one.base))
    return one


def filled(base: Artifact, folder: Path, some: Records, count: int) -> Learner:
    one = learner_of(base, folder)
    for i in range(count):
        k = i % len(some)
        one.add(Record("one", 1.0, i, some.states[k], some.logits[k]))
    return one


def test_a_fit_is_due_after_500_records_and_then_after_half_as_many_more(
    base: Artifact, some: Records, tmp_path: Path
) -> None:
    one = filled(base, tmp_path, some, FIRST_FIT - 1)
    assert not one.is_due
    one.add(record(0, shape=some.states.shape[1:]))  # type: ignore[arg-type]
    assert one.is_due
    assert one.begin() == 1
    assert not one.is_due and one.next_fit == 750
    one.end(result_of(1, dict.fromkeys(FOUND, 1), None))
    one.is_asked = True
    assert one.is_due


def test_a_change_of_the_traffic_asks_for_new_records(base: Artifact, some: Records, tmp_path: Path) -> None:
    one = filled(base, tmp_path, some, 1200)
    one.begin()
    one.observe(InService(2, 2.0, 2.0, 0))
    assert one.count == 1200
    one.observe(InService(2, 1.0, 1.0, 1))
    assert (one.count, one.next_fit, one.journal.first_new) == (0, FIRST_FIT, 1201)
    one.observe(InService(2, 1.0, 1.0, 1))
    one.observe(InService(3, 1.0, 1.0, 0))  # a new version is not a change of the traffic
    assert one.journal.first_new == 1201


def test_a_learner_continues_after_a_restart(base: Artifact, some: Records, tmp_path: Path) -> None:
    one = filled(base, tmp_path, some, 700)
    one.begin()
    one.save(all_records=True)
    again = learner_of(base, tmp_path)
    assert (len(again.reservoir), again.count, again.next_fit) == (700, 700, 750)
    assert again.journal.attempts == 1  # so no attempt uses another's part of the error probability
    found, saved = again.reservoir.records(), one.reservoir.records()
    assert (found.keys == saved.keys).all() and (found.states == saved.states).all()
    assert again.reservoir.texts == 700


def test_damaged_files_are_set_aside(base: Artifact, some: Records, tmp_path: Path) -> None:
    filled(base, tmp_path, some, 60).save(all_records=True)
    name = f"learned/base-{base_of(base.manifest)[:12]}"
    records, journal = tmp_path / f"{name}.records", tmp_path / f"{name}.json"
    records.write_bytes(b"no records")
    journal.write_text('{"attempts": -1}')
    one = learner_of(base, tmp_path)
    assert len(one.reservoir) == 0 and one.journal == Journal.model_validate({"base": base_of(base.manifest)})
    assert Path(f"{records}.old").exists() and Path(f"{journal}.old").exists()
    replace(some, base="x").write(records)
    assert len(learner_of(base, tmp_path).reservoir) == 0


def test_a_lost_journal_does_not_use_an_attempt_twice(
    base: Artifact, fitted: learning.Fitted, tmp_path: Path
) -> None:
    store = LearnFolder(tmp_path).store
    learning.publish(base, fitted, store, 6, 400, version=LEARNED_FROM + 6)
    assert learner_of(base, tmp_path).journal.attempts == 6


def test_a_change_is_remembered_after_a_restart(base: Artifact, some: Records, tmp_path: Path) -> None:
    one = filled(base, tmp_path, some, 1200)
    one.begin()
    one.observe(InService(2, 2.0, 2.0, 0))
    one.observe(InService(2, 1.0, 1.0, 1))
    assert one.needs_saving
    one.save(all_records=True)
    again = learner_of(base, tmp_path)
    assert (again.count, again.next_fit, again.journal.first_new) == (0, FIRST_FIT, 1201)


def test_records_that_come_while_others_are_saved_are_added_later(
    base: Artifact, some: Records, tmp_path: Path
) -> None:
    one = filled(base, tmp_path, some, 60)
    one.hold()
    one.add(Record("one", 1.0, 99, some.states[0], some.logits[0]))
    assert len(one.reservoir) == 60 and one.count == 61
    one.resume()
    assert len(one.reservoir) == 61
    one.resume()
    assert len(one.reservoir) == 61


def test_exits_that_a_model_came_with_count_as_an_attempt(
    store: Path, base: Artifact, tmp_path: Path
) -> None:
    with_exits = Store(store).open("tiny-int8")
    assert learner_of(with_exits, tmp_path / "a").journal.attempts == 1
    assert learner_of(base, tmp_path / "b").journal.attempts == 0


# The promise


def test_the_error_probabilities_of_all_attempts_sum_to_that_of_the_promise() -> None:
    assert sum(error_of(attempt) for attempt in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


def test_held_out_texts_prove_a_tau_but_are_no_audits(fitted: learning.Fitted, base: Artifact) -> None:
    """For every client, held-out texts prove the same τ as audits of the same texts, drawn with probability 1."""
    settings = Settings(guarantee=0.3, learn=True)
    manifest = _learned(base, fitted)
    one, other = (Ledger(manifest, Rules(manifest, settings), "native", 1.0, settings) for _ in range(2))
    rows = [HeldOut(**row) for row in fitted.evidence]
    one.count_held_out(rows)
    settled = [
        Settled(
            *(row.client, 1.0, 0, [row.key]),
            Audited(list(row.scores), list(row.differs), manifest.exit_layers, False),
        )
        for row in rows
    ]
    other.count(settled, other.standing.epoch, True)
    assert one.standing.promised == other.standing.promised
    assert one.rules.default.rule.tau > 0
    assert one.evidence.audits == 0 and other.evidence.audits == len(rows)
    assert one.speedup() > 1.0  # from the held-out texts, until there are audits


def _learned(base: Artifact, fitted: learning.Fitted) -> Manifest:
    layers = list(range(base.manifest.num_layers + 1))
    fields = {
        "exit_layers": layers,
        "prototype_layers": layers[:-1],
        "learned": Learned(base=base_of(base.manifest), attempt=1, records=400),
        **fitted.calibrated.fields(),
    }
    return Manifest.model_validate(base.manifest.model_copy(update=fields).model_dump())


def test_a_later_attempt_needs_more_evidence(fitted: learning.Fitted, base: Artifact) -> None:
    settings, manifest = Settings(guarantee=0.05, learn=True), _learned(base, fitted)
    taus = []
    for attempt in (1, 5, 40):
        assert manifest.learned is not None
        later = manifest.model_copy(
            update={"learned": manifest.learned.model_copy(update={"attempt": attempt})}
        )
        ledger = Ledger(later, Rules(later, settings), "native", 1.0, settings)
        ledger.count_held_out([HeldOut(**row) for row in fitted.evidence])
        assert ledger.promises is not None and ledger.promises.error == error_of(attempt)
        assert ledger.promises.of_all.copy().error == error_of(attempt)
        taus.append(ledger.rules.default.rule.tau)
    assert taus == sorted(taus, reverse=True)


def test_a_promise_saved_with_a_larger_error_keeps_only_its_evidence() -> None:
    taus = np.array([0.0, 0.5, 1.0])
    one = Promise(0.2, taus)
    for _ in range(70):
        one.add(1.0, Profile(np.zeros(3, bool), np.zeros(3, int)))
    one.advance()
    assert one.tau == 1.0
    strict = Promise(0.2, taus, error=error_of(40))
    strict.restore(one.evidence.copy(), one.saved())
    assert strict.tau == 0.0 and strict.evidence.audits == 70
    same = Promise(0.2, taus)
    same.restore(one.evidence.copy(), one.saved())
    assert same.tau == 1.0


def test_the_share_of_audits_falls_with_the_traffic() -> None:
    one = Traffic(processes=2)
    assert one.share == 1.0
    one.texts = LEARN_TEXTS // 2
    assert one.share == 1.0
    one.texts += 1
    assert one.share == 0.5
    one.texts = 8 * LEARN_TEXTS
    assert one.share == 1 / 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"learn": True}, "learn: needs guarantee"), ({"learn_canary": 1.0}, "less than 1")],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


# The server


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the first fit after 150 records, and later ones only on request."""
    monkeypatch.setattr(learner, "FIRST_FIT", 150)
    monkeypatch.setattr(learner, "GROWTH", 100)
    monkeypatch.setattr("de3.server.learn.learners.CHECK_S", 0.05)


def learning_server(store: Path, folder: Path, **settings: Any) -> Any:
    on = {
        "learn": True,
        "guarantee": 0.2,
        "state_dir": folder,
        "models": ["base"],
        "max_texts": 200,
    } | settings
    return serving(store, **on)


def report(server: Server) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/v1/models/base/learn")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def send(server: Server, texts: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(0, len(texts), 50):
        answer = server.classify(input=list(texts[i : i + 50]))
        assert answer.status_code == 200, answer.text
        rows += [row | {"model": answer.json()["model"]} for row in answer.json()["data"]]
    return rows


@pytest.mark.usefixtures("soon")
def test_a_server_learns_exits_and_serves_them_again_after_a_restart(
    stock_store: Path, base: Artifact, tmp_path: Path
) -> None:
    texts = texts_of(600, 9)
    full = Model(base, "auto")
    expected = {t: full.full_depth(full.tokenize(t))[-1].logits for t in texts}
    with learning_server(stock_store, tmp_path) as server:
        last = full.manifest.num_layers
        assert {row["exit"]["layer"] for row in send(server, texts[:160])} == {last}
        until(lambda: report(server)["fits"], "the first fit")
        fit = report(server)["fits"][0]
        assert fit["outcome"] == "served" and fit["version"] == FIRST and fit["attempt"] == 1, fit
        rows = send(server, texts)
        assert {row["model"] for row in rows} == {f"base:{FIRST}"}
        assert min(row["exit"]["layer"] for row in rows) < last
        for text, row in zip(texts, rows, strict=True):
            if row["exit"]["layer"] == last:
                logits = expected[text]
                assert logits is not None
                odds = np.exp(logits - logits.max())
                np.testing.assert_allclose(row["probs"], odds / odds.sum(), rtol=1e-6)
        until(lambda: server.metric("de3_learn_records", model="base") > 160, "more records")
        assert server.metric("de3_learn_fits_total", model="base", outcome="served") >= 1
        models = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [row["learned"]["attempt"] for row in models] == [1]
        said = report(server)
    with learning_server(stock_store, tmp_path) as server:
        rows = send(server, texts[:50])
        assert {row["model"] for row in rows} == {f"base:{said['serving']}"}
        until(lambda: report(server)["records"] >= said["records"], "the records")
        assert report(server)["fits"] == said["fits"]


@pytest.mark.usefixtures("soon")
def test_a_rollback_is_remembered_and_a_canary_waits_for_an_admin(stock_store: Path, tmp_path: Path) -> None:
    admin = {"admin_keys": "root " + "k" * 32}
    with learning_server(stock_store, tmp_path, learn_canary=0.5, **admin) as server:
        post = httpx.Client(base_url=server.url, headers={"Authorization": "Bearer " + "k" * 32})
        wrong = post.put("/v1/models/base/learn")
        assert wrong.status_code == 405 and wrong.headers["allow"] == "GET, POST"
        few = post.post("/v1/models/base/learn")
        assert few.status_code == 409 and "too few" in few.json()["error"]["message"]
        send(server, texts_of(80, 10))
        assert post.post("/v1/models/base/learn").json()["object"] == "learn"  # with fewer than 150 records
        until(lambda: report(server)["fits"], "the fit that was asked for")
        roles = {row["id"]: row["role"] for row in httpx.get(f"{server.url}/v1/models").json()["data"]}
        assert roles == {"base:1": "current", f"base:{FIRST}": "canary"}
        assert post.post("/v1/models/base/load", json={"version": FIRST}).status_code == 200
        assert report(server)["serving"] == FIRST
        assert post.post("/v1/models/base/rollback").json()["model"] == "base:1"
    with learning_server(stock_store, tmp_path, **admin) as server:
        assert send(server, ["a film"])[0]["model"] == "base:1"


@pytest.mark.usefixtures("soon")
def test_a_learned_version_that_cannot_be_loaded_does_not_stop_the_server(
    stock_store: Path, tmp_path: Path
) -> None:
    with learning_server(stock_store, tmp_path) as server:
        send(server, texts_of(160, 11))
        until(lambda: report(server)["fits"], "the first fit")
    version = tmp_path / f"learned/versions/base/{FIRST}"
    data = (version / "layer_01.onnx").read_bytes()
    (version / "layer_01.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with learning_server(stock_store, tmp_path) as server:
        assert send(server, ["a film"])[0]["model"] == "base:1"
    (version / "manifest.json").write_text("{}")
    with learning_server(stock_store, tmp_path) as server:
        assert send(server, ["a film"])[0]["model"] == "base:1"


@pytest.mark.usefixtures("soon")
def test_a_fit_does_not_undo_what_an_admin_did_meanwhile(
    stock_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During the fit, a model with the same name and other weights is loaded, for which the exits are of no use."""
    store = tmp_path / "store"
    shutil.copytree(stock_store / "base", store / "base")
    save_encoder(tmp_path / "other", labels=2)
    go = tmp_path / "go"
    wait = f"import time, pathlib\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)"
    monkeypatch.setattr(fitting, "PROGRAM", f"{wait}\n{fitting.PROGRAM}")
    admin = httpx.Client(headers={"Authorization": "Bearer " + "k" * 32}, timeout=60)
    keys = {"admin_keys": "root " + "k" * 32}
    with learning_server(store, tmp_path / "state", **keys) as server:
        send(server, texts_of(160, 15))
        until(lambda: report(server)["phase"] == "fitting", "the fit")
        convert(Stock.open("other", tmp_path / "other"), Store(tmp_path / "new"), "base", "int8")
        manifest = json.loads((tmp_path / "new/base/1/manifest.json").read_text()) | {"version": 2}
        shutil.copytree(tmp_path / "new/base/1", store / "base/2")
        (store / "base/2/manifest.json").write_text(json.dumps(manifest))
        assert admin.post(f"{server.url}/v1/models/base/load").json()["model"] == "base:2"
        assert report(server)["records"] == 0  # the previous model's records are of no use
        go.touch()
        until(server.service.shared.books.learners._fitting.done, "the end of the fit")  # type: ignore[attr-defined]
        assert send(server, ["a film"])[0]["model"] == "base:2"
        assert not list((tmp_path / "state/learned/versions/base").glob("[0-9]*"))
        # Nor does a canary with other weights replace the model for which exits are learned.
        load = {"version": 1, "role": "canary", "share": 0.5}
        assert admin.post(f"{server.url}/v1/models/base/load", json=load).status_code == 200
        assert report(server)["serving"] == 2


def test_a_server_that_does_not_learn_says_so(stock_store: Path) -> None:
    with serving(stock_store, models=["base"]) as server:
        answer = httpx.get(f"{server.url}/v1/models/base/learn")
        assert answer.status_code == 409 and "--learn" in answer.json()["error"]["message"]
        assert httpx.get(f"{server.url}/v1/models/other/learn").status_code == 404


@pytest.mark.usefixtures("soon")
def test_a_failed_fit_is_reported_and_the_server_goes_on(
    stock_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "PROGRAM", "raise SystemExit('no')")
    with learning_server(stock_store, tmp_path) as server:
        send(server, texts_of(160, 12))
        until(lambda: report(server)["fits"], "the first fit")
        fit = report(server)["fits"][0]
        assert fit["outcome"] == "failed" and "no" in fit["error"]
        assert report(server)["phase"] == "recording" and report(server)["next_fit_at"] == 15_000
        assert send(server, ["a film"])[0]["model"] == "base:1"
    (path,) = (tmp_path / "learned").glob("base-*.json")
    journal = json.loads(path.read_text())
    assert journal["attempts"] == 1


@pytest.mark.usefixtures("soon")
def test_a_full_disk_stops_a_fit_but_not_the_server(
    stock_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "secret"))

    monkeypatch.setattr(LearnFolder, "write", full)
    with learning_server(stock_store, tmp_path) as server:
        send(server, texts_of(160, 16))
        until(lambda: report(server)["fits"], "the first fit")
        assert report(server)["fits"][0]["error"] == "No space left on device"  # the path is not shown
        assert send(server, ["a film"])[0]["model"] == "base:1"


@pytest.mark.slow
def test_a_fit_runs_only_while_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = "learn._run_at_idle(); import os; print(os.sched_getscheduler(0)); raise SystemExit"
    monkeypatch.setattr(fitting, "PROGRAM", f"from de3.export import learn; {shown}")
    done = subprocess.run([sys.executable, "-c", fitting.PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) == os.SCHED_IDLE


KILLED = """
import os, signal, sys
from de3.server.learn import journal, learner, learners
learner.FIRST_FIT, learners.CHECK_S = 150, 0.05

def die(*given, **named):
    os.kill(os.getpid(), signal.SIGKILL)

run_fit, serve, fsync = learners.run_fit, learners.Learners._serve, os.fsync

async def after_fit(job):
    await run_fit(job)
    die()

async def after_serving(*given):
    await serve(*given)
    die()

step = sys.argv.pop()
if step == "saved":
    learners.run_fit = die
if step == "published":
    learners.run_fit = after_fit
if step == "served":
    learners.Learners._serve = after_serving
if step == "saving":
    journal.os.fsync = die
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["saving", "saved", "published", "served"])
def test_a_server_that_is_killed_at_any_step_learns_again(
    stock_store: Path, tmp_path: Path, step: str
) -> None:
    """No two fits have the same attempt number: each number stands for a part of the promise's error probability."""
    texts, attempts = texts_of(1200, 15), set[int]()
    arguments = ("--learn", "--guarantee", "0.2", "--state-dir", str(tmp_path), "--model", "base")
    for run, wanted in enumerate((step, step, "never")):
        with process(stock_store, *arguments, wanted, code=NORMAL_PRIORITY + KILLED + SERVE) as running:
            url = url_when_ready(running)
            for i in range(400 * run, 400 * run + 400, 50):
                with suppress(httpx.TransportError):
                    answer = httpx.post(f"{url}/classify", json={"input": texts[i : i + 50]})
                    assert answer.status_code == 200
            if wanted == step:
                assert running.wait(60) == -signal.SIGKILL
            else:
                path = f"{url}/v1/models/base/learn"
                until(lambda path=path: httpx.get(path).json()["fits"], "a fit")  # type: ignore[misc]
                found = httpx.get(path).json()
        folder = LearnFolder(tmp_path)
        for number in folder.versions("base"):
            learned = folder.store.open(f"base:{number}").manifest.learned
            assert learned is not None
            attempts.add(learned.attempt)
        assert len(attempts) == len(folder.versions("base"))
    assert found["fits"][-1]["outcome"] == "served" and found["serving"] > LEARNED_FROM
    # Two fits were begun and killed. If the beginning of a fit was not saved, its number is free: it proved nothing.
    assert found["fits"][-1]["attempt"] == (1 if step == "saving" else 3)


@pytest.mark.slow
def test_several_processes_learn_together(stock_store: Path, tmp_path: Path) -> None:
    from tests.test_processes import running

    if not hasattr(os, "sched_setaffinity") or sys.platform != "linux":
        pytest.skip("needs Linux")
    texts = texts_of(1400, 13)
    arguments = ("--learn", "--guarantee", "0.2", "--state-dir", str(tmp_path), "--model", "base")
    with running(stock_store, *arguments, code=NORMAL_PRIORITY + SERVE) as server:
        for i in range(0, 700, 50):
            assert httpx.post(server.url + "/classify", json={"input": texts[i : i + 50]}).status_code == 200
        url = f"{server.url}/v1/models/base/learn"
        until(lambda: httpx.get(url).json()["fits"], "the first fit")
        fit = httpx.get(url).json()["fits"][-1]
        assert fit["outcome"] == "served", fit
        for i in range(700, 1400, 50):
            answer = httpx.post(server.url + "/classify", json={"input": texts[i : i + 50]}).json()
            assert answer["model"].startswith("base:") and answer["model"] != "base:1"
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'de3_learn_fits_total{model="base",outcome="served"}' in metrics
