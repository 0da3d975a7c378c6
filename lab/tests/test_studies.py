"""The studies of any model: most of their commands on a tiny model, and their simulations on synthetic exits."""

import json
from pathlib import Path

import numpy as np
import pytest

from de3.exits.calibration import Samples
from de3.exits.recorded import Recorded
from de3.exits.signals import Entropy
from lab.studies.deadlines import Costs, deadlines
from lab.studies.guarantee import guarantee
from lab.tests.commands import lab
from tests.fixtures import make_rows, write_rows
from tests.stock import save_encoder


def test_the_studies_run_on_any_model(store: Path, checkpoint: Path, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", make_rows(80, 34))
    away = tmp_path / "away.txt"
    away.write_text("".join(f"zebra quartz {i} umbrella\n" for i in range(60)))
    tune, certify = checkpoint / "tune.jsonl", checkpoint / "certify.jsonl"
    common = f"--store {store} --model tiny --text-column text --json {tmp_path}/numbers.json"

    lab(f"study guarantee {tune} {certify} --trials 20 {common}")
    rows = json.loads((tmp_path / "numbers.json").read_text())
    assert [row["wish"] for row in rows] == [0.02, 0.05, 0.1]

    lab(f"study far {certify} {texts} {away} --switches 2 {common}")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert all(0 <= x <= 1 for row in numbers["auroc"].values() for x in row.values())
    speeds = {name: row["speedup"] for name, row in numbers["policy"]["away"].items()}
    assert speeds["flag"] >= speeds["deepen"] >= speeds["far to full depth"]

    lab(f"study state {tune} {certify} {common}")
    rows = json.loads((tmp_path / "numbers.json").read_text())
    assert len(rows) == 6 and all(row["all"] <= row["limit"] for row in rows)

    many = write_rows(tmp_path / "many.jsonl", make_rows(1700, 6))
    of = f"--store {store} --model tiny --text-column text"
    assert "chosen at" in lab(f"study placement {many} {of} --splits 2")

    lab(f"study deadlines {texts} {common}")
    assert len(json.loads((tmp_path / "numbers.json").read_text())) == 9


def test_certificates_of_imports_are_compared(tmp_path: Path) -> None:
    stock = save_encoder(tmp_path / "stock", layers=1, labels=2)
    texts = write_rows(tmp_path / "texts.jsonl", make_rows(500, 8))
    said = lab(f"study certificates {stock} --texts {texts} --size 300 --repetitions 2")
    assert [said.count(f"│ {scheme} ") for scheme in ("60, 20, 20", "60, 40", "100")] == [3, 3, 3]


def known(n: int) -> Recorded:
    """n samples, two exits, no prototypes: the more certain the first exit, the more often it agrees with the last."""
    generator = np.random.default_rng(5)
    margin = generator.exponential(2.0, n)
    labels = generator.integers(2, size=n)
    flip = generator.random(n) < 0.5 * np.exp(-margin)
    sign = np.where(labels == 1, 1.0, -1.0)
    first = np.where(flip, -sign, sign) * margin
    logits = np.zeros((n, 2, 2), np.float32)
    logits[:, 0, 1], logits[:, 1, 1] = first, 9 * sign
    return Recorded([1, 2], logits, np.full_like(logits, np.nan), labels)


@pytest.mark.parametrize("copies", [1, 8])
def test_guarantees_are_kept_and_an_oracle_is_not_beaten_by_those_who_keep_them(copies: int) -> None:
    """This also holds for groups, here of equal samples: only the number of groups counts."""
    rows = np.repeat(np.arange(1500), copies)
    population = Samples(known(1500).rows(rows), rows)
    taus = [(i / 60) ** 2 for i in range(45)]
    found = guarantee(population, Entropy(), 750, [0.02, 0.05], 50, start_layers=0.5, taus=taus)
    for row in found:
        assert row["broken"] <= 0.12  # 5% are expected at most; 50 trials may have more by chance
        assert 0.7 < row["of_oracle_layers"] < 1.05
        assert row["speedup"] > 1
    assert found[1]["speedup"] > found[0]["speedup"]


def test_no_simulated_answer_passes_its_deadline() -> None:
    found = known(300)
    costs = Costs(0.001, 0.001)
    alone = deadlines(found, 0.0, Entropy(), costs, [(0.5, 0.0), (2.5, 0.0), (3.5, 0.0)])
    assert [row["default"]["refused"] for row in alone] == [1, 0, 0]
    assert [row["default"]["layers"] for row in alone] == [0, 1, 2]
    loaded = deadlines(found, 0.0, Entropy(), costs, [(5.0, 3.0)])[0]["default"]
    assert 0 < loaded["refused"] < 1 and 1 <= loaded["layers"] < 2


@pytest.mark.slow
def test_long_texts_are_compared_with_their_beginnings(store: Path, tmp_path: Path) -> None:
    """For texts that begin with filler words, windows are more accurate than truncation."""
    rows = [(f"{'the a film movie ' * 16} {text} {text}", label) for text, label in make_rows(60, 3)]
    texts = write_rows(tmp_path / "texts.jsonl", [*rows, *make_rows(20, 4)])
    numbers = tmp_path / "numbers.json"
    lab(
        f"study long {texts} --store {store} --model tiny --text-column text --max-tokens 64 "
        f"--max-tokens 32 --json {numbers}"
    )
    found = json.loads(numbers.read_text())
    for size in (64, 32):
        at_0 = {
            r["strategy"]: r for r in found if (r["max_tokens"], r["tau"], r["texts"]) == (size, 0, "long")
        }
        assert at_0["truncate"]["work"] == 1 and at_0["truncate"]["accuracy"] < 0.7
        every, exact = at_0["all: mean by new tokens"], at_0["until settled exactly"]
        assert every["unlike_all"] == exact["unlike_all"] == 0
        assert 1 <= exact["work"] <= every["work"] > 1 and at_0["last window"]["difference"] > 0.1
