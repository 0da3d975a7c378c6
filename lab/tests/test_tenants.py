"""Short runs of the measurements of many tenants."""

from pathlib import Path

from de3.data.examples import Example
from lab.learn import WINDOW, Answer
from lab.tenants import table
from lab.tests.commands import lab
from tests.fixtures import make_rows, write_rows
from tests.serving import free_port
from tests.stock import fine_tuned


def cells(output: str) -> list[list[str]]:
    """The cells of a printed table, without its head."""
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in output.splitlines()
        if line.startswith("│")
    ]


def test_counting_is_measured_for_few_and_many_tenants(store: Path) -> None:
    rows = cells(lab(f"tenants count --store {store} --model tiny"))
    assert [row[0] for row in rows] == ["1", "9", "256"]
    assert all(float(all_audited) > float(some) > 0 for _, all_audited, some in rows)


def test_single_texts_are_answered_beside_batches(store: Path) -> None:
    rows = cells(lab(f"tenants p99 --store {store} --model tiny --seconds 0.5 --port {free_port()}"))
    assert [row[:2] for row in rows] == [["1", "1"], ["1", "256"], ["2", "1"], ["2", "256"]]
    for *_, answered, requests, batches in rows:
        assert answered == requests != "0" != batches


def test_texts_of_tenants_are_sent_to_a_server_that_learns(encoder: Path, tmp_path: Path) -> None:
    examples = [Example(text, int(label)) for text, label in make_rows(600, 5)]
    stock = fine_tuned("stock-learn", encoder, ["negative", "positive"], examples, 4)
    texts = write_rows(
        tmp_path / "texts.jsonl", [(f"{k} {text}", x) for k, (text, x) in enumerate(make_rows(60, 6))]
    )
    output = lab(f"tenants version {stock} --texts {texts} --tenants 3 --per-second 500 --port {free_port()}")
    ((_, _, _, count, first, last),) = cells(output)
    assert (count, first, last) == ("60", "1.00×", "1.00×")


def test_the_speed_up_of_each_version() -> None:
    answers = [Answer(6, "a", 1.0, "m:0")] * 700
    answers += [Answer(layer, "a", 1.0, "m:1") for layer in (3, 2) for _ in range(WINDOW)]
    fits = [
        {"version": 1, "outcome": "waits", "held_out": 200, "proved_speedup": 1.0},
        {"version": 1, "outcome": "served", "held_out": 1200, "proved_speedup": 2.5},
    ]
    assert table(answers, fits)[1] == [
        ["m:0", "–", "–", "700", "1.00×", "1.00×"],
        ["m:1", "1,200", "2.50×", "1,000", "2.00×", "3.00×"],
    ]
