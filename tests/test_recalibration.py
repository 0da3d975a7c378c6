"""de3 calibrate: a new calibration of a model, as a new version of it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from de3.data.examples import Example
from de3.data.tables import TextOrPair
from de3.export import recalibrate
from de3.export.seen import SEEN, hashes_of, warnings_of
from de3.model_store.store import Store
from tests.commands import de3, refusal
from tests.fixtures import make_rows, write_rows
from tests.test_signal_choice import without_risk
from tests.test_store import edit

pytestmark = pytest.mark.usefixtures("few_taus")


def test_a_new_calibration_is_a_new_version_of_the_same_model(store: Path, tmp_path: Path) -> None:
    """The first version has no risk."""
    mine = shutil.copytree(store, tmp_path / "store")
    edit(mine / "tiny-int8" / "1", lambda m: without_risk(m, "entropy"))
    tune, certify = (
        write_rows(tmp_path / f"{part}.jsonl", make_rows(n, seed))
        for part, n, seed in (("t", 120, 31), ("c", 150, 32))
    )
    said = de3(
        f"calibrate tiny-int8 --tune {tune} --certify {certify} --store {mine} --max-loss 3 --signal risk"
    )
    assert "τ limits the loss of accuracy, not the answers that differ" in said
    assert "270 texts, 270 independent: " in said
    old, new = (Store(mine).open(f"tiny-int8:{version}").manifest for version in (1, 2))
    assert new.calibration is not None and old.calibration is not None
    # With so few samples, both files certify.
    assert (new.calibration.tune_size, new.calibration.certify_size) == (120, 270)
    assert not new.calibration.self_labelled
    assert (new.files, new.labels, new.export) == (old.files, old.labels, old.export)
    default = new.calibration.default
    assert (new.defaults.tau, new.defaults.signal, new.defaults.lam) == (default.tau, "risk", None)
    assert {row.signal for row in new.calibration.table} == {"risk", "edr", "entropy"}
    assert old.risk is None and [row.layer for row in new.risk or ()] == [0, 1, 2]


def test_unlabelled_texts_calibrate_against_full_depth_and_related_ones_are_in_the_same_half(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, file = shutil.copytree(store, tmp_path / "store"), tmp_path / "texts.jsonl"
    fragments = [f"{text} {i}" for i, (text, _) in enumerate(make_rows(198, 33))]
    texts = [*fragments, *(f"the {text}" for text in fragments), "one odd pun", "odd pun two", "odd pun"]
    rows = [{"text": text, "user": i // 2} for i, text in enumerate(texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = f"calibrate tiny-int8 --texts {file} --store {mine} --max-loss 5"
    with pytest.raises(ValueError, match="independent texts: too few"):
        de3(command)
    monkeypatch.setattr(recalibrate, "MIN_TEXTS", 50)
    related = "independent: identical texts, and those of one group, are related"
    left_out = (
        "; fragments, which neither choose nor certify τ: 198; left out, as fragments of several texts: 1"
    )
    for option, size, groups, said in (
        ("", 399, 399, f"399 texts, 399 {related}\n"),
        ("--group-column user", 399, 200, f"399 texts, 200 {related}\n"),
        ("--fragments", 200, 200, f"398 texts, 200 {related}{left_out}\n"),
    ):
        output = de3(f"{command} {option}")
        assert said in output and "τ limits the loss of accuracy" not in output
        calibration = Store(mine).open("tiny-int8").manifest.calibration
        assert calibration is not None and calibration.self_labelled
        assert calibration.exit_accuracy[-1] == 1  # full depth's answers count as correct
        assert calibration.table[-1].disagreement > 0
        # A group in both halves would count twice.
        assert (calibration.certify_size, calibration.groups) == (size, groups)
    assert "cannot be combined" in refusal(f"{command} --fragments --group-column user")
    samples = f"calibrate tiny --tune {file} --certify {file} --store {mine}"
    assert "--fragments, --group-column: need --texts" in refusal(f"{samples} --fragments")


def test_a_model_without_early_exits_is_not_calibrated(tmp_path: Path) -> None:
    artifact: Any = SimpleNamespace(full_name="m:1", manifest=SimpleNamespace(exit_layers=[12]))
    with pytest.raises(ValueError, match="m:1 has no early exits"):
        recalibrate.recalibrate_on_texts(
            artifact, Store(tmp_path), [Example("good", 0)], tmp_path, 0.01, "auto"
        )


def test_unknown_labels_the_wrong_input_or_shared_samples_publish_no_calibration(
    store: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(store, tmp_path / "store")
    edit(mine / "tiny" / "1", lambda m: m.update(input="pair"))
    (bare := tmp_path / "bare.txt").write_text("a film")
    for file, message in (
        (write_rows(tmp_path / "odd.jsonl", [("a film", "mixed")]), "mixed"),
        (bare, r'bare.txt:1: each sample needs "text" and "label"; .* --texts'),
        (write_rows(tmp_path / "single.jsonl", make_rows(30, 36)), r"single.jsonl: .*pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            de3(f"calibrate tiny --tune {file} --certify {file} --store {mine}")
    with pytest.raises(ValueError, match=r"30 of its texts are in .*single.jsonl too"):
        de3(f"calibrate tiny-int8 --tune {file} --certify {file} --store {mine}")
    edit(mine / "tiny-int8" / "1", lambda m: m["export"].update({SEEN: hashes_of(["a film", "a book"])}))
    certify = write_rows(tmp_path / "fitted.jsonl", [("a film", "0"), ("a book", "1")])
    with pytest.raises(ValueError, match=r"fitted\.jsonl: about 100% of the texts are among those"):
        de3(f"calibrate tiny-int8 --tune {file} --certify {certify} --store {mine}")
    assert [path.name for path in mine.glob("tiny*/*")] == ["1", "1"]


@pytest.mark.parametrize(("fitted", "others"), [(3000, 0), (1500, 28_500), (500, 500), (0, 3000), (30, 2970)])
def test_a_calibration_on_the_texts_that_exits_were_fitted_to_warns(
    store: Path, fitted: int, others: int
) -> None:
    known: list[TextOrPair] = [(f"text {i}", "a film") for i in range(20_000)]
    manifest = Store(store).open("tiny").manifest.model_copy(update={"export": {SEEN: hashes_of(known)}})
    texts = [*known[:fitted], *(f"other {i}" for i in range(others))]
    share = fitted / (fitted + others)
    if share > 0.1:  # its certificate would be false
        with pytest.raises(ValueError, match=r"^texts\.jsonl: .* those that tiny:1's exits were fitted to"):
            warnings_of(manifest, texts, Path("texts.jsonl"))
    elif share < 0.02:
        assert warnings_of(manifest, texts, Path("texts.jsonl")) == []
    else:
        (said,) = warnings_of(manifest, texts, Path("texts.jsonl"))
        assert abs(float(said.split("%")[0].split()[-1]) / 100 - share) < 0.02
    for odd in ({}, {SEEN: 1}, {SEEN: [1]}, {SEEN: []}):
        assert warnings_of(manifest.model_copy(update={"export": odd}), known, Path()) == []


def test_a_classifier_that_is_not_in_the_store_is_to_be_imported(store: Path, tmp_path: Path) -> None:
    for name in (str(tmp_path), "my-org/my-guard"):
        hint = f"de3 import {name} --texts FILE --name NAME --flag X@0.8"
        assert hint in refusal(f"calibrate {name} --texts x.txt --store {store} --flag X@0.8")
    assert "de3 import my-org/my-guard --texts" in refusal(f"evaluate my-org/my-guard x.csv --store {store}")
