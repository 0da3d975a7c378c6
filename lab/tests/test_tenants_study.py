"""The simulated tenants keep the guarantee beside a hostile one."""

from pathlib import Path

from lab.options import open_model
from lab.studies import tenants
from lab.studies.samples import recorded
from tests.fixtures import make_rows, write_rows


def test_tenants_keep_the_guarantee_beside_a_hostile_one(store: Path, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", make_rows(300, 35))
    loaded = open_model(store, "tiny")
    found = recorded(loaded, [texts], ("text", "label")).recorded
    rows = tenants.study(loaded.manifest, found, 0.2, 0.2, 3, 1500, 2)
    assert [row["tenant"] for row in rows] == [1, 2]
    assert all(row["mean"] <= 0.2 and row["speedup"] > 1 for row in rows)
