"""Short runs of the soak test and of each fault: nothing is lost, and a loss would be reported."""

import json
from pathlib import Path

import pytest

from lab import faults
from lab.cli import app as lab_app
from lab.soak import Soak
from tests.commands import invoke
from tests.fixtures import make_rows
from tests.serving import free_port


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("".join(text + "\n" for text, _ in make_rows(300, 8) if text.strip()))
    return path


@pytest.mark.slow
def test_a_short_soak(store: Path, texts: Path, tmp_path: Path) -> None:
    result = invoke(
        f"soak --texts {texts} --store {store} --model tiny --minutes 0.15 --reload-s 2 "
        f"--port {free_port()} --out {tmp_path}",
        lab_app,
    )
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["problems"] == [], result.output
    assert found["requests"]["one text 200"] > 0 and found["reloads"] >= 1  # a busy machine sends little
    assert (tmp_path / "soak.png").exists()


def test_growth_is_from_the_second_quarter_to_the_last() -> None:
    found = Soak(memory=[(i, 100.0 if i < 10 else 200 + i) for i in range(40)])
    assert found.growth_mb() == pytest.approx(20, abs=1)  # the start does not count
    assert Soak().growth_mb() == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f.__name__ for f in faults.FAULTS])
def test_nothing_accepted_is_lost(
    fault: str, store: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "PROCESS_KILLS", 2)
    result = invoke(
        f"faults --texts {texts} --store {store} --model tiny --port {free_port()} --out {tmp_path} "
        f"--only {fault}",
        lab_app,
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "faults.json").read_text())
    if row["lost"] is None:
        pytest.skip(row["happened"])


def test_a_fault_that_fails_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: faults.Testbed) -> faults.Row:
        raise ValueError("timed out")

    monkeypatch.setattr(faults, "FAULTS", (broken,))
    (row,) = faults.faults(faults.Testbed(tmp_path, "tiny", [], 0, tmp_path))
    assert (row.happened, row.lost) == ("FAILED: timed out", 1)
