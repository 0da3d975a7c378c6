"""de3 calibrate: a new calibration of a model, as a new version of it."""

import shutil
from pathlib import Path

import pytest

from de3.model_store.store import Store
from tests.commands import de3
from tests.fixtures import make_rows, write_rows


def test_a_new_calibration_is_a_new_version_of_the_same_model(store: Path, tmp_path: Path) -> None:
    mine = tmp_path / "store"
    shutil.copytree(store, mine)
    tune, certify = (
        write_rows(tmp_path / f"{part}.jsonl", make_rows(n, seed))
        for part, n, seed in (("t", 120, 31), ("c", 150, 32))
    )
    de3(f"calibrate tiny-int8 --tune {tune} --certify {certify} --store {mine} --max-loss 3")
    old, new = (Store(mine).open(f"tiny-int8:{version}").manifest for version in (1, 2))
    assert new.calibration is not None and old.calibration is not None
    # With so few samples, both files certify.
    assert (new.calibration.tune_size, new.calibration.certify_size) == (120, 270)
    assert new.calibration != old.calibration
    assert (new.files, new.labels, new.export) == (old.files, old.labels, old.export)
    default = new.calibration.default
    assert (new.defaults.tau, new.defaults.signal, new.defaults.lam) == (
        default.tau,
        default.signal,
        default.lam,
    )
    assert new.risk is not None and new.risk != old.risk


def test_a_calibration_on_unknown_labels_publishes_nothing(store: Path, tmp_path: Path) -> None:
    mine = tmp_path / "store"
    shutil.copytree(store, mine)
    odd = write_rows(tmp_path / "odd.jsonl", [("a film", "mixed")])
    with pytest.raises(ValueError, match="mixed"):
        de3(f"calibrate tiny --tune {odd} --certify {odd} --store {mine}")
    assert [p.name for p in (mine / "tiny").iterdir()] == ["1"]


def test_a_certificate_needs_its_own_samples(store: Path, tmp_path: Path) -> None:
    same = write_rows(tmp_path / "same.jsonl", make_rows(60, 35))
    with pytest.raises(ValueError, match=r"60 of its texts are in .*same.jsonl too"):
        de3(f"calibrate tiny --tune {same} --certify {same} --store {store}")
