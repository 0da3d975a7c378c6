"""Flags: one-sided exits, and the guarantee about flagged texts that are missed."""

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.commands.options import say_published
from de3.data.examples import Example
from de3.exits import bound, calibration
from de3.exits.calibration import Samples
from de3.exits.criteria import Limits, criteria_of
from de3.exits.flags import Flag
from de3.exits.guarantee import profiles
from de3.exits.kinds import CLASSES, Labels, Spans, TextKind, Value
from de3.exits.reading import SpansReading, ValueReading
from de3.exits.recorded import Recorded, RecordedSpans
from de3.exits.signals import Entropy
from de3.exits.spans import SpanRule, Unsure
from de3.export import recalibrate
from de3.export.calibrate import _within_missed
from de3.export.guard_report import flag_table
from de3.model_store.manifest import Missed
from de3.model_store.store import Store, StoreError
from de3.runtime.errors import RequestError
from de3.runtime.flags import Wanted, certified_flag, flag_of, parsed
from de3.runtime.options import ExitOptions
from de3.runtime.rules import Rules
from de3.server.models import default_of
from de3.server.settings import Settings
from tests.commands import de3
from tests.fixtures import make_rows, write_rows
from tests.serving import Server, serving, until

NAMES = ["positive", "negative"]
TEXTS = [text for text, _ in make_rows(256, 61)]
NEGATIVE = {"models": ["tiny-int8"], "flags": ["tiny-int8=negative"]}


@given(
    st.data(),
    st.sampled_from([CLASSES, Labels.of([0.3, 0.5, 0.9]), Value(0.5)]),
    st.sets(st.integers(0, 2), min_size=1),
    st.booleans(),
)
def test_a_flag_of_arrays_and_its_failures_are_those_of_readings(
    data: st.DataObject, kind: TextKind, labels: set[int], is_below: bool
) -> None:
    count = 1 if isinstance(kind, Value) else 3
    values = st.floats(-4, 4, width=32)
    rows = data.draw(st.lists(st.lists(values, min_size=count, max_size=count), min_size=4, max_size=4))
    thresholds = data.draw(st.lists(st.sampled_from([0.3, 0.5, 0.8]), min_size=3, max_size=3))
    flag = Flag((0,), (thresholds[0],), is_below)
    if not isinstance(kind, Value):
        flag = Flag(tuple(sorted(labels)), tuple(thresholds[: len(labels)]))
    logits = np.array(rows, np.float32)[None]
    passed = [kind.read(j, row, None) for j, row in enumerate(logits[0].tolist())]
    recorded = Recorded([0, 1, 2, 3], logits, np.full_like(logits, np.nan), np.zeros(1), kind=kind)
    assert recorded.flagged(flag)[0].tolist() == [flag.is_raised(one) for one in passed]
    of_texts = criteria_of(kind, Limits(0.1, 0.2, flag))
    of_arrays = recorded.failures(flag)
    assert [one.limit for one in of_texts] == [0.1, 0.2] and len(of_arrays) == 2
    for criterion, (fails, found) in zip(of_texts, of_arrays, strict=True):
        expected = criterion.failures(passed)
        assert (fails.tolist(), found.tolist()) == (([], []) if expected is None else ([expected], [0]))


def test_a_token_that_may_be_in_a_span_keeps_a_text_from_exiting() -> None:
    """A text is flagged only for a span: here, the exits find words too improbable for one, a span, and nothing."""
    rule = SpanRule(("O", "X"))
    spans = [frozenset(), frozenset({(0, 1, "X")}), frozenset()]
    readings: list[Any] = []
    for layer, found in enumerate((True, True, False)):
        reading = SpansReading(layer, Unsure(0.1, 0.1, 1, found), None)
        readings.append(reading)
        assert Flag().blocks(reading) == found and not Flag().is_raised(reading)
    recorded = RecordedSpans.of(Spans(rule), [0, 1, 2], [readings], [1])
    recorded.spans[0] = spans
    assert recorded.blocked(Flag())[0].tolist() == [True, True, False]
    assert recorded.flagged(Flag())[0].tolist() == [False, True, False]


def test_what_is_bounded_for_a_kind_of_answers() -> None:
    flag = Flag((0,), (0.5,))
    for kind, limits, expected in (
        (CLASSES, Limits(0.1), [("disagreement", 0.1)]),
        (CLASSES, Limits(0.1, 0.2, flag), [("disagreement", 0.1), ("missed_flagged", 0.2)]),
        (CLASSES, Limits(None, 0.2, flag), [("disagreement", None), ("missed_flagged", 0.2)]),
        (Spans(SpanRule(("O", "X"))), Limits(0.1), [("disagreement", 0.1), ("missed", 0.1)]),
    ):
        assert [(one.name, one.limit) for one in criteria_of(kind, limits)] == expected


def test_what_is_not_a_number_is_flagged() -> None:
    for is_below in (False, True):
        flag = Flag((0,), (0.5,), is_below)
        assert flag.is_raised(ValueReading(0, math.nan))
        assert flag.raised(Value(0.1), np.full((2, 1), np.nan, np.float32)).all()


def test_labels_of_a_flag_count_once_in_the_models_order() -> None:
    manifest: Any = SimpleNamespace(labels=["A", "B", "C"], name="m")
    flag = flag_of(Wanted(["C", "B", "C"], 0.4), manifest, CLASSES)
    assert flag == Flag((1, 2), (0.4,))


def test_a_certificate_keeps_the_direction_of_its_flag() -> None:
    for is_below in (False, True):
        missed = SimpleNamespace(labels=[], threshold=0.3, is_below=is_below)
        wanted = certified_flag(SimpleNamespace(missed=missed))  # type: ignore[arg-type]
        assert wanted == Wanted([], 0.3, is_below)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=3, max_size=3), st.floats(0, 1))
def test_a_text_that_would_exit_with_a_flagged_answer_runs_to_the_last_layer(
    exits: list[tuple[float, bool]], tau: float
) -> None:
    scores, blocked = (
        [[*(score for score, _ in exits), None]],
        [[*(is_flagged for _, is_flagged in exits), True]],
    )
    at = next((j for j, (score, _) in enumerate(exits) if score < tau), 3)
    expected = 3 if blocked[0][at] else at
    found = profiles(scores, [[j != 3 for j in range(4)]], [0, 1, 2, 3], np.array([0.0, tau]), blocked)
    assert found.layers.tolist() == [[3, expected]]
    assert found.differs.tolist() == [[False, expected != 3]]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("guard=A,B@0.8", ("guard", Wanted(["A", "B"], 0.8))),
        ("A", ("", Wanted(["A"]))),
        ("a@b=X", ("a@b", Wanted(["X"]))),
        ("stars=>=4.5", ("stars", Wanted((), 4.5))),
        ("<=-1", ("", Wanted((), -1, True))),
        ("pii=*", ("pii", Wanted(["*"]))),
        ("A@1", ("", Wanted(["A"], 1.0))),
    ],
)
def test_a_setting_names_a_flag(setting: str, expected: tuple[str, Wanted]) -> None:
    assert parsed(setting) == expected
    assert parsed(str(expected[1])) == ("", expected[1])


@pytest.mark.parametrize(
    "setting", ["", "guard=", "guard=A@1.5", "guard=A@x", "stars=>=much", ">=nan", "guard=A@0"]
)
def test_a_setting_that_is_no_flag_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=r"flag: .*NAME=LABEL"):
        Settings(flags=[setting])


STARS = {"name": "stars", "labels": ["stars"], "tolerance": 0.5}


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({}, {"flags": ["dull"]}, "flag: 'dull' is not a label of tiny: negative, positive"),
        ({}, {"flags": [">=2"]}, "flag: tiny has labels"),
        (STARS, {"flags": ["good"]}, "flag: stars is a regression model"),
        ({}, {"flags": ["other=negative"], "guarantee_missed": 0.1}, "guarantee_missed: tiny has no flag"),
    ],
)
def test_a_flag_that_a_model_cannot_have_is_refused(
    store: Path, changes: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    manifest = Store(store).open("tiny").manifest.model_copy(update=changes)
    with pytest.raises(RequestError) as found:
        Rules(manifest, Settings(**options))
    assert found.value.message.startswith(says)


def rows_of(server: Server, **body: Any) -> list[dict[str, Any]]:
    answer = server.classify(**body)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


@pytest.mark.parametrize("runtime", ["native", "onnxruntime"])
def test_only_safe_answers_exit_early_so_no_false_alarm_is_added(store: Path, runtime: Any) -> None:
    with serving(store, **NEGATIVE, runtime=runtime) as server:
        for own in ({}, {"flag": "positive", "flag_threshold": 0.7}):
            full, early, safe = (
                rows_of(server, input=TEXTS, tau=tau, **flag)
                for tau, flag in ((0, own), (0.6, own), (0.6, own))
            )
            assert early == safe
            at_exit = [row["exit"]["reason"] == "threshold" for row in early]
            assert any(at_exit) and not all(at_exit)
            for one, other, is_early in zip(full, early, at_exit, strict=True):
                assert not (is_early and other["flag"]["flagged"])
                assert is_early or (one["label"], one["probs"]) == (other["label"], other["probs"])
                assert one["flag"]["flagged"] or not other["flag"]["flagged"]


def report_of(server: Server) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/v1/models/tiny-int8/audit").json())


def test_missed_texts_are_bounded_and_evidence_is_that_of_one_flag(store: Path, tmp_path: Path) -> None:
    on: dict[str, Any] = NEGATIVE | {"guarantee_missed": 0.2, "state_dir": tmp_path}
    with serving(store, **on) as server:
        (row,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert row["flag"] == {"labels": ["negative"], "threshold": None, "is_below": False}
        first = server.classify(input=TEXTS[:128], explain=True).json()
        assert first["tau_choice"]["guarantee"] == {"max_missed": 0.2, "confidence": 0.95, "reason": "start"}
        assert {row["exit"]["reason"] for row in first["data"]} == {"last_layer"}
        flagged = sum(row["flag"]["flagged"] for row in first["data"])
        until(lambda: report_of(server)["audits"] == 128, "the audits")
        assert report_of(server)["audits_flagged"] == flagged > 20
        for seed in range(3):
            server.classify(input=[text for text, _ in make_rows(256, 62 + seed)])
        until(lambda: report_of(server)["tau"]["tau"] > 0, "a τ above 0")
        rows = rows_of(server, input=TEXTS)
        assert any(row["exit"]["reason"] == "threshold" and not row["flag"]["flagged"] for row in rows)
        assert not any(row["exit"]["reason"] == "threshold" and row["flag"]["flagged"] for row in rows)
        until(lambda: not report_of(server)["pending"], "the audits")
        report = report_of(server)
        texts = [text for text, _ in make_rows(100, 70)]
        for own in ({}, {"latency_budget_ms": 60_000}, {"max_layer": 3}):
            other = rows_of(server, input=texts, flag="positive", **own)
            assert {row["exit"]["layer"] for row in other} == {3}
        assert report_of(server)["audits"] == report["audits"]  # they would outnumber those of the others
        assert report["guarantee"] == {"max_missed": 0.2, "confidence": 0.95, "reason": "evidence"}
        assert report["measured"]["missed_flagged"] <= report["measured"]["missed_flagged_upper"]
        metrics = [server.metric(f"de3_audit_missed{of}", model="tiny-int8:1") for of in ("", "_guarantee")]
        assert metrics == [report["measured"]["missed_flagged"], 0.2]
    with serving(store, **on) as server:
        assert report_of(server)["tau"] == report["tau"]
    with serving(store, **on, observe=True) as server:
        rows = rows_of(server, input=TEXTS)
        assert {row["exit"]["reason"] for row in rows} == {"last_layer"}
        observed = report_of(server)
        assert observed["guarantee"]["observed"] and observed["measured"]["speedup"] > 1
    with serving(store, **on | {"flags": ["negative@0.6"]}) as server:
        assert report_of(server)["tau"] == {"tau": 0.0, "reason": "start"}


def test_the_bound_is_that_of_the_flagged_texts_alone() -> None:
    """300 texts that full depth flags, of which the first exit misses 3 at τ = 0.2, and 700 others."""
    early, late = np.zeros((1000, 2), np.float32), np.zeros((1000, 2), np.float32)
    late[:300, 0], early[3:300, 0], early[:3, 1] = 2, 2, 2
    late[300:, 1], early[300:, 1] = 2, 2
    logits = np.stack([early, late], 1)
    samples = Samples.independent(
        Recorded([0, 1], logits, np.full_like(logits, np.nan), np.zeros(1000, np.int64))
    )
    scores, taus = np.full((1000, 2), 0.1), [0.0, 0.05, 0.2]
    expected = [0.0, bound.upper_bound(0, 300), bound.upper_bound(3, 300)]
    found = calibration.missed_bounds(samples, Flag((0,), (0.5,)), scores, taus)
    assert found == (300, pytest.approx(expected))
    assert calibration.missed_bounds(samples, Flag((0,), (0.99,)), scores, taus) == (0, [0.0, 1.0, 1.0])


def test_the_bound_of_missed_texts_does_not_fall_where_later_exits_find_them() -> None:
    """At τ = 0.2, 60 flagged texts leave at layer 1 as safe; at 0.5, their first exit flags them."""
    logits = np.tile(np.array([[2, 0], [-9, 0], [9, 0]], np.float32), (100, 1, 1))
    samples = Samples(
        Recorded([0, 1, 2], logits, np.full_like(logits, np.nan), np.zeros(100, np.int64)),
        np.arange(100) // 2,
    )
    scores = np.tile([0.3, 0.1, 1.0], (100, 1))
    scores[60:] = 1.0
    count, bounds = calibration.missed_bounds(samples, Flag((0,), (0.5,)), scores, [0.0, 0.2, 0.5])
    assert count == 50 and bounds[2] == bounds[1] > 0.6


@pytest.mark.parametrize(
    ("tau", "limit"), [(0.0, 0.0), (0.1, 0.02), (0.3, 0.05), (0.5, 0.05), (0.7, None), (0.95, None)]
)
def test_what_a_default_tau_is_certified_for(store: Path, tau: float, limit: float | None) -> None:
    """Of the next higher τ in the table."""
    manifest = Store(store).open("tiny-int8").manifest
    missed = {"labels": ["negative"], "threshold": None, "is_below": False, "flagged": 200}
    missed |= {"taus": [0, 0.1, 0.5, 0.9], "bounds": [0, 0.01, 0.04, 0.3]}
    defaults = manifest.defaults.model_copy(update={"tau": tau})
    fields: dict[str, Any] = {"missed": Missed.model_validate(missed), "defaults": defaults}
    rules = Rules(manifest.model_copy(update=fields), Settings())
    assert rules.max_missed == limit
    for observed, missed_at_most in ((False, 0.03), (True, 0.0)):
        guaranteed = Settings(flags=["negative"], guarantee_missed=0.03, observe=observed)
        assert Rules(manifest.model_copy(update=fields), guaranteed).max_missed == missed_at_most
    # It holds although full depth's answers are compared with another model's.
    assert manifest.calibration is not None
    other = manifest.calibration.model_copy(update={"original_disagreement": 0.01})
    rules = Rules(manifest.model_copy(update=fields | {"calibration": other}), Settings())
    options = ExitOptions(max_missed=0.05)
    chosen = rules.with_flag(rules.choose(options), options, parsed("negative")[1])
    assert chosen.certificate is not None and chosen.rule.tau == 0.5
    # Load raises τ only if it keeps no limit.
    for certified in (0.01, 0.2):
        bounds = fields["missed"].model_copy(update={"bounds": [0, *[certified] * 3]})
        low = manifest.defaults.model_copy(update={"tau": 0.1})
        rules = Rules(manifest.model_copy(update={"missed": bounds, "defaults": low}), Settings())
        assert bool(rules.steps) == (rules.max_missed is None) == (certified > 0.05)


def test_a_default_tau_is_not_raised_to_the_limit_on_missed_texts() -> None:
    missed = {"labels": ["a"], "threshold": None, "is_below": False, "flagged": 200}
    rows: Any = [SimpleNamespace(tau=tau) for tau in (0.0, 0.1, 0.5, 0.9)]
    for bounds, default, expected in (
        ([0, 0.01, 0.02, 0.3], 0.1, 0.1),
        ([0, 0.01, 0.02, 0.3], 0.9, 0.5),
        ([0, 0.03, 0.05, 0.3], 0.9, 0.5),
        ([0, 0.06, 0.07, 0.3], 0.9, 0.0),
    ):
        found = Missed.model_validate(missed | {"taus": [0, 0.1, 0.5, 0.9], "bounds": bounds})
        row = _within_missed(rows, next(one for one in rows if one.tau == default), found)
        assert row.tau == expected


@pytest.mark.usefixtures("few_taus")
def test_a_certificate_of_missed_texts_is_for_the_calibrations_flag(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recalibrate, "MIN_TEXTS", 50)
    examples = [Example(f"{text} {number}", 0) for number, (text, _) in enumerate(make_rows(600, 71))]
    path = recalibrate.recalibrate_on_texts(
        Store(store).open("tiny-int8"), Store(tmp_path), examples, tmp_path, 0.05, "risk", flag="negative@0.6"
    )
    say_published(path, tmp_path)
    assert "--max-missed 0.02" in capsys.readouterr().err
    missed = Store(tmp_path).open("tiny-int8").manifest.missed
    assert missed is not None and missed.flagged > 150 and missed.bounds[1] < 0.05
    assert missed.bounds[1] == pytest.approx(bound.upper_bound(0, missed.flagged, bound.CROSSED), abs=1e-6)
    # The default τ, whose loss may be 5%, keeps the limit that can be certified.
    assert missed.limit == 0.02 < missed.bounds[2]
    assert Store(tmp_path).open("tiny-int8").manifest.defaults.tau == missed.taus[1]
    for folder, options, limit in ((tmp_path, {}, 0.02), (store, {"flags": ["negative"]}, None)):
        with serving(folder, models=["tiny-int8"], **options) as server:
            (listed,) = httpx.get(f"{server.url}/v1/models").json()["data"]
            assert listed["max_missed"] == limit
            found = httpx.get(f"{server.url}/v1/models/tiny-int8/calibration").json()
            assert found.get("missed") == (missed.model_dump() if limit else None)
        assert ("nothing limits how many flagged texts" in caplog.text) == (limit is None)
    with serving(tmp_path, models=["tiny-int8"], max_missed=0.1) as server:
        answer = server.classify(input=TEXTS).json()
        certificate = answer["certificate"]
        assert certificate["max_missed"] == 0.1 >= certificate["bound"]
        assert certificate["flagged"] == missed.flagged
        early = [row for row in answer["data"] if row["exit"]["reason"] == "threshold"]
        assert early and not any(row["flag"]["flagged"] for row in early)
        tighter = server.classify(input=TEXTS, max_missed=0.05).json()["certificate"]
        assert 0 < tighter["bound"] <= 0.05
        assert server.classify(input="good", max_missed=0, explain=True).json()["tau_choice"]["tau"] == 0
        # A text in windows is not certified, also if max_layer cuts nothing off.
        for own in ({}, {"max_layer": 3}):
            (row,) = rows_of(server, input=" ".join(TEXTS), **own)
            assert set(row["windows"]["layers"]) == {3} and len(row["windows"]["layers"]) > 1, row
        for threshold, status in ((0.5, 422), (0.6, 200)):
            own = server.classify(input="good", max_missed=0.1, flag="negative", flag_threshold=threshold)
            assert own.status_code == status, own.text
        # A request that does not ask for it, but has another flag, runs to full depth: here, that of NeMo's fms rail.
        other = server.classify(input=TEXTS, flag="negative", flag_threshold=0.5).json()
        assert {row["exit"]["layer"] for row in other["data"]} == {3} and "certificate" not in other
        params = {"model": "tiny-int8", "threshold": 0.5, "safe_labels": ["positive"]}
        found = httpx.post(
            f"{server.url}/api/v1/text/contents", json={"contents": TEXTS, "detector_params": params}
        )
        assert found.status_code == 200, found.text
        # What max_layer cuts off is not safe, in any window; where a response cannot say so, it is an error.
        for more in ({}, {"long": "windows"}):
            rows = rows_of(server, input=[*TEXTS[:20], " ".join(TEXTS)], max_layer=1, tau=0, **more)
            assert all(row["exit"]["reason"] == "max_layer" for row in rows)
            assert {row["flag"]["flagged"] for row in rows} <= {None, True} and rows[0]["flag"][
                "flagged"
            ] is None
        cut = httpx.post(
            f"{server.url}/api/v1/text/contents",
            json={"contents": TEXTS[:1], "detector_params": params | {"max_layer": 1, "tau": 0}},
        )
        assert cut.status_code == 422 and "max_layer: a text was not decided by layer 1" in cut.text
        # Texts in several windows are not certified.
        options: dict[str, Any]
        for options in ({}, {"max_missed": 0.1}, {"tau": 0.6}):
            rows = rows_of(server, input=[" ".join(TEXTS)], long="windows", **options)
            layers = {layer for row in rows for layer in row["windows"]["layers"]}
            assert (layers == {3}) == ("tau" not in options), layers
    # Without --flag, the flag stays, but no certificate; another classifier on the same encoder is no guard.
    rows = write_rows(tmp_path / "texts.jsonl", make_rows(300, 72))
    said = de3(f"calibrate tiny-int8 --texts {rows} --store {tmp_path}")
    assert "--guarantee-missed 0.02" in said and "has no certificate of missed texts" in said
    with serving(tmp_path, models=["tiny-int8"], max_missed=0.1) as server:
        assert {row["exit"]["layer"] for row in rows_of(server, input=TEXTS)} == {3}
    assert "no early exit is certified to keep max_missed 0.1, so all texts run all layers" in caplog.text
    assert Store(tmp_path).open("tiny-int8").manifest.missed == missed.uncertified
    de3(f"fit {rows} --encoder tiny-int8 --name other --store {tmp_path}")
    other = Store(tmp_path).open("other").manifest
    assert other.missed is None and Rules(other, Settings()).flag is None
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path, {"flags": ["negative"]}, "with the flag negative@0.6, not with negative;"),
        (store, {}, "without a flag"),
    ]
    for folder, options, says in cases:
        with pytest.raises(RequestError, match=says):
            Rules(Store(folder).open("tiny-int8").manifest, Settings(**options, max_missed=0.1))


def test_a_flag_of_a_model_that_is_not_served_is_refused(store: Path) -> None:
    with pytest.raises(StoreError, match=r"--flag other=…: other is not served"):
        default_of(Settings(flags=["other=X"]), [Store(store).open("tiny")], are_named=True)
    with pytest.raises(ValueError, match="two flags"):
        Settings(flags=["tiny=positive", "tiny=negative"])


def test_recall_and_false_alarms_by_threshold(store: Path, tmp_path: Path) -> None:
    """Probabilities of 1 to 10% for the others, and of 11 to 100% in steps of 1% for 90 samples to find."""
    probs = np.arange(1, 101) / 100.5
    logits = np.zeros((100, 2, 2), np.float32)
    logits[:, 1, 0] = np.log(probs / (1 - probs))
    logits[:, 0] = [1, 0]  # the first exit flags every sample, except two
    logits[[60, 70], 0] = [-9, 0]
    labels = np.where(np.arange(100) < 10, 1, 0)
    recorded = Recorded([0, 1], logits, np.full_like(logits, np.nan), labels)
    bounds = {"labels": ["bad"], "threshold": 0.5, "is_below": False, "flagged": 200}
    missed = Missed.model_validate(bounds | {"taus": [0, 0.5, 1], "bounds": [0, 0.015, 0.9]})
    rows = []
    for certificate in (missed, None):
        table = flag_table(recorded, Flag((0,), (0.5,)), 1.0, Entropy(), certificate)
        rows.append(list(zip(*(list(column.cells) for column in table.columns), strict=True)))
    with_limits, rows = rows
    at_flag = next(row for row in with_limits if row[1] == "the flag")
    assert at_flag[-4:] == ("4.0% of 50", "0.0%", "4.0%", "4.0%") and len(at_flag) == 8
    assert ("0.05", "", "100.0%", "50.0%", "2.1% of 95") in rows
    assert ("0.5", "the flag", "55.6%", "0.0%", "4.0% of 50") in rows
    for row in rows:
        if row[1].startswith("recall"):
            assert float(row[2][:-1]) >= float(row[1].split()[1][:-1])
    assert ("0.199", "recall 90%", "90.0%", "0.0%", "2.5% of 81") in rows
    file = write_rows(tmp_path / "rows.jsonl", [(text, NAMES[int(of)]) for text, of in make_rows(60, 80)])
    said = de3(f"evaluate tiny-int8 {file} --store {store} --png {tmp_path}/plot.png --flag negative@0.6")
    assert "samples to find among 60" in said and "the flag" in said


def long_texts(count: int, seed: int) -> list[str]:
    """Texts of up to five windows, with single sentences between them."""
    rng, texts = random.Random(seed), [text for text, _ in make_rows(256, seed)]
    return [" ".join(rng.choices(texts, k=rng.choice([1, 8, 16, 30]))) for _ in range(count)]


def test_a_text_in_windows_is_evidence_as_a_whole(store: Path) -> None:
    """Its evidence is what the engine answers at each τ, whether it is gathered by audits or, at τ = 0, by answers."""
    texts = long_texts(60, 90)
    reports = dict[str, dict[str, Any]]()
    for name, choice in (("audits", {"tau": 0.6}), ("answers", {"guarantee_missed": 0.3})):
        with serving(store, **NEGATIVE, audit_share=1.0, **choice) as server:
            for half in (texts[:30], texts[30:]):
                assert server.classify(input=half, long="windows").status_code == 200
            until(lambda s=server: report_of(s)["audits"] == 60, "the audits")
            reports[name] = report_of(server)
            if name == "answers":
                continue
            full = rows_of(server, input=texts, long="windows", tau=0)
            assert max(row.get("windows", {"of": 1})["of"] for row in full) > 3
            flagged = {i for i, row in enumerate(full) if row["flag"]["flagged"]}
            assert reports[name]["audits_flagged"] == len(flagged) > 10
            rates = []
            for row in reports[name]["taus"][10::25]:
                found = rows_of(server, input=texts, long="windows", tau=row["tau"])
                missed = flagged - {i for i, one in enumerate(found) if one["flag"]["flagged"]}
                assert {i for i, one in enumerate(found) if one["flag"]["flagged"]} <= flagged
                unlike = sum(one["label"] != other["label"] for one, other in zip(found, full, strict=True))
                rates.append(len(missed) / len(flagged))
                assert row["missed_flagged"] == pytest.approx(rates[-1])
                assert row["disagreement"] == pytest.approx(unlike / 60)
            assert len(set(rates)) > 2
    # An answer at full depth stops at the first flagged window, so later ones are not counted on.
    exact = {row["tau"]: row["missed_flagged"] for row in reports["audits"]["taus"]}
    assert all(row["missed_flagged"] >= exact[row["tau"]] - 1e-12 for row in reports["answers"]["taus"])
