"""A stock classifier → an artifact with early exits: its weights stay, and full depth gives its own answers."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from export.exporter import ExportSettings, export
from model_store.store import Store
from training import frozen, stock
from training.checkpoint import read_record, write_record
from training.data import Encoded, Example, Text, encode, input_of, save_examples
from training.model import De3Model
from training.progress import console
from training.split import Split, split

MAX_HELD_BACK = 4000
FEW_TEXTS = 500


def import_classifier(
    opened: stock.Stock,
    rows: Sequence[tuple[Text, str]],
    work: Path,
    store: Store,
    settings: ExportSettings,
    *,
    fragments: bool = False,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    bf16: bool = True,
) -> Path:
    """Fit exits to a stock classifier on texts, and publish it as the model's next version; returns its folder.

    rows: texts with their labels, or with "", in which case the model's own answers stand for them. groups: of related
    rows. work: a folder for the checkpoint and, until the end, for what has been computed: an interrupted run goes on
    from there.

    Raises ValueError for texts that cannot be used, and ExportError if the exported model is not the same.
    """
    _check_work(work)
    labelled = bool(rows[0][1])
    examples = [
        Example(text, label) for (text, _), label in zip(rows, _labels(rows, opened.names), strict=True)
    ]
    if groups is not None:
        examples = [replace(e, group=group) for e, group in zip(examples, groups, strict=True)]
    if len(examples) < FEW_TEXTS:
        raise ValueError(
            f"{len(examples)} texts are too few to fit exits and to certify them: give {FEW_TEXTS} or more"
        )
    parts = split(examples, seed, min(len(examples) // 5, MAX_HELD_BACK), fragments)
    console.print(
        f"{opened.family}, {opened.model.config.num_hidden_layers} layers; {len(parts.train)} texts to fit the exits, "
        f"{len(parts.tune)} to tune, {len(parts.certify)} to certify",
        highlight=False,
    )
    torch.manual_seed(seed)
    model = stock.with_exits(opened, "mean", input_of(examples))
    encoded = [
        encode(part, opened.tokenizer, opened.max_tokens, what)
        for part, what in ((parts.train, "fitting"), (parts.tune, "tuning"), (parts.certify, "certifying"))
    ]
    difference = stock.parity(opened, model, encoded[2])
    console.print(f"full depth is transformers' own model: largest difference of the logits {difference:.1e}")
    answers = _fit(model, encoded, opened.tokenizer.pad_token_id, work, seed, bf16)
    if not labelled:
        parts = _own_labels(parts, answers)
    _save(model, opened, parts, work, labelled)
    path = export(work, store, settings)
    shutil.rmtree(work / "states")
    return path


def _fit(
    model: De3Model, encoded: Sequence[Encoded], pad_id: int, work: Path, seed: int, bf16: bool
) -> list[list[int]]:
    """Fit the exits; returns the answers of full depth to each part, those of the held-out ones in float32."""
    computed = [
        frozen.states(model, part, pad_id, work / "states", what, bf16 and what == "fitting")
        for part, what in zip(encoded, ("fitting", "tuning", "certifying"), strict=True)
    ]
    frozen.fit(model, computed[0], computed[1], seed)
    return [states.answers.tolist() for states in computed]


def _labels(rows: Sequence[tuple[Text, str]], names: Sequence[str]) -> list[int]:
    """The labels as indices into the model's; of unlabelled rows 0."""
    found = {label for _, label in rows}
    if found == {""}:
        return [0] * len(rows)
    numbers = {str(i): i for i in range(len(names))}
    index = {name: i for i, name in enumerate(names)}
    known = index if found <= index.keys() else numbers
    if not found <= known.keys():
        raise ValueError(
            f"the data has labels such as {sorted(found - index.keys())[:5]}, the model {list(names)[:20]}: name the "
            "model's labels as the data does, with --label-names in the order of its logits"
        )
    return [known[label] for _, label in rows]


def _own_labels(parts: Split, answers: Sequence[Sequence[int]]) -> Split:
    labelled = (
        [replace(e, label=label) for e, label in zip(part, own, strict=True)]
        for part, own in zip((parts.train, parts.tune, parts.certify), answers, strict=True)
    )
    return Split(*labelled)


def _check_work(work: Path) -> None:
    """Raise ValueError for a folder that holds something else than an import."""
    if (work / "config.json").exists() and not (read_record(work) or {}).get("imported"):
        raise ValueError(f"{work} has a model that is not of an import: choose another --work")


def _save(model: De3Model, opened: stock.Stock, parts: Split, work: Path, labelled: bool) -> None:
    """Write the checkpoint, as de3 train would."""
    model.save_pretrained(work)
    opened.tokenizer.save_pretrained(work)
    for name, part in (("tune", parts.tune), ("certify", parts.certify)):
        save_examples(work / f"{name}.jsonl", part, opened.names)
    write_record(work, finished=True, imported=True, self_labelled=not labelled)
