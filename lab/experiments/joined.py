"""A multi-label data set made from CLINC150: most texts have two questions, and the intents of both.

    python -m lab experiment joined DATA OUT

OUT gets train.jsonl, val.jsonl and test.jsonl, from CLINC150's parts of the same names; each question is in one text
only. Three of every five texts with an intent have two questions, of different intents, and two have one. The
out-of-scope questions, most of which are in CLINC150's test part, are spread over the parts in proportion to their
size; they have no label.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

Question = tuple[str, str]  # a question and its intent
Row = tuple[str, list[str]]  # a text and its labels

PARTS = ("train", "val", "test")
PAIRS = 3 / 4  # share of the questions that are in pairs


def main(
    root: Annotated[Path, typer.Argument(help="Folder of the data sets.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: int = 0,
) -> None:
    """Write the three parts as JSON lines of a text and its labels."""
    clinc = json.loads((root / "clinc150/data_full.json").read_text())
    rng = random.Random(seed)
    outside = [text for part in PARTS for text, _ in clinc[f"oos_{part}"]]
    rng.shuffle(outside)
    count = len(outside)
    total = sum(len(clinc[part]) for part in PARTS)
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        questions = [(text, intent) for text, intent in clinc[part]]
        share = round(count * len(questions) / total)
        without, outside = outside[:share], outside[share:]
        rows = join(questions, rng) + [(text, []) for text in without]
        rng.shuffle(rows)
        lines = (json.dumps({"text": text, "label": labels}, ensure_ascii=False) for text, labels in rows)
        (out / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        counts = [sum(len(labels) == n for _, labels in rows) for n in (2, 1, 0)]
        print(f"{part}: {counts[0]} texts with two labels, {counts[1]} with one, {counts[2]} with none")


def join(questions: Sequence[Question], rng: random.Random) -> list[Row]:
    """Join questions into texts, each question in one text: pairs of different intents, and single questions."""
    shuffled = list(questions)
    rng.shuffle(shuffled)
    rows: list[Row] = []
    pairs = int(len(shuffled) * PAIRS) // 2
    while len(rows) < pairs:
        text, intent = shuffled.pop()
        partner = next((i for i in range(len(shuffled) - 1, -1, -1) if shuffled[i][1] != intent), None)
        if partner is None:  # all remaining questions have the same intent
            shuffled.append((text, intent))
            break
        other, second = shuffled.pop(partner)
        rows.append((f"{text} {other}", sorted([intent, second])))
    return rows + [(text, [intent]) for text, intent in shuffled]
