"""The programs in examples/, as a user runs them."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas
import pytest
from pyarrow import parquet

import de3
from tests.fixtures import make_rows

ROOT = Path(__file__).parents[1]
TEXTS = [text for text, _ in make_rows(300, 29)]
TEXTS[7:11] = [None, "", float("nan"), "a 🎬 film"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("example", "package"), [("ray_data", "ray"), ("polars_frame", "polars"), ("daft_frame", "daft")]
)
def test_an_example_has_the_librarys_answers(store: Path, tmp_path: Path, example: str, package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    gold = ["of the file"] * len(TEXTS)
    pandas.DataFrame({"id": range(len(TEXTS)), "text": TEXTS, "label": gold}).to_parquet(source)
    command = [sys.executable, str(ROOT / f"examples/{example}.py"), str(source), str(out), "tiny-int8"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={
            "DE3_STORE": str(store),
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "RAY_ADDRESS": "local",  # else Ray joins a cluster that another test has just started
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = sorted(parquet.read_table(out).to_pylist(), key=lambda row: row["id"])
    with de3.load("tiny-int8", store=store) as model:
        expected = model.answers_by_column(TEXTS).values
    assert [i for i, label in enumerate(expected["label"][:12]) if label is None] == [7, 8, 9]
    for name in ("label", "exit_layer", "error"):
        assert [row[f"de3_{name}"] for row in rows] == expected[name]
    assert [row["label"] for row in rows] == gold
