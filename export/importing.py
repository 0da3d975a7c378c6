"""Import of a stock classifier as an artifact with early exits; its weights and full-depth answers are unchanged."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from de3.export.exporter import ExportSettings, export
from de3.model_store.store import Store
from de3.model_store.tokenizer_check import check_tokenizer
from de3.tables import Text, labels_in
from de3.training import frozen, stock
from de3.training.checkpoint import read_record, write_record
from de3.training.data import Example, encode, input_of, label_of, save_examples, to_examples
from de3.training.frozen import States
from de3.training.model import De3Model
from de3.training.progress import console
from de3.training.settings import TrainSettings
from de3.training.split import Split, split
from de3.training.trainer import train

MAX_HELD_BACK = 4000
FEW_TEXTS = 500
MAX_FITTED = 20_000  # texts; their states are held in memory
PARTS = ("fitting", "tuning", "certifying")


@dataclass(frozen=True)
class ImportSettings:
    """Options of an import.

    Attributes:
        labelled: the texts have labels; otherwise the model's own answers are the labels.
        fragments: the texts contain fragments of each other.
        bf16: compute the states for fitting exits in bfloat16; the states for tuning and certifying are float32.
        finetune: also train the encoder, for better early exits, while full depth keeps the original's answers.
        epochs, lr: of finetune.
        command: command line that resumes the import, shown if its unfinished checkpoint is opened.
    """

    labelled: bool = False
    fragments: bool = False
    seed: int = 0
    bf16: bool = True
    finetune: bool = False
    epochs: int = 3
    lr: float = 3e-5
    command: str | None = None


def import_classifier(
    opened: stock.Stock,
    rows: Sequence[tuple[Text, str]],
    groups: Sequence[str] | None,
    work: Path,
    settings: ImportSettings,
    store: Store,
    exporting: ExportSettings,
) -> Path:
    """Fit exits to a stock classifier on texts, and publish it as a model's next version; returns its folder.

    rows: texts and labels, "" if unlabelled. groups: of related rows. work: folder for the checkpoint and, until the
    end, for intermediate results, from which an interrupted import resumes.

    Raises ValueError for unusable texts, and ExportError if the exported model differs.
    """
    _check_work(work, settings.finetune)
    if settings.finetune and (opened.thresholds is not None or opened.is_regression):
        kind = "regression" if opened.is_regression else "multi-label ones"
        raise ValueError(f"--finetune is for models whose classes exclude each other, not for {kind}")
    _check_export(opened, exporting)
    parts = _parts(rows, groups, opened, settings)
    stock.check_tolerance(opened, parts.certify[:FEW_TEXTS])
    layers = opened.model.config.num_hidden_layers
    console.print(
        f"{opened.family}, {layers} layers; {len(parts.train)} texts to fit the exits, {len(parts.tune)} to tune, "
        f"{len(parts.certify)} to certify",
        highlight=False,
    )
    torch.manual_seed(settings.seed)
    model = stock.with_exits(opened, "mean", input_of(parts.train))
    encoded = [
        encode(part, opened.tokenizer, opened.max_tokens, what, len(opened.names))
        for part, what in zip((parts.train, parts.tune, parts.certify), PARTS, strict=True)
    ]
    difference = stock.parity(opened, model, encoded[2])
    console.print(
        f"full depth matches transformers' model: largest difference of the logits {difference:.1e}"
    )
    computed = [
        frozen.states(
            model,
            part,
            opened.tokenizer.pad_token_id,
            work / "states",
            what,
            settings.bf16 and what == "fitting",
        )
        for part, what in zip(encoded, PARTS, strict=True)
    ]
    frozen.fit(model, computed[0], computed[1], settings.seed)
    answered = _answered(parts, computed, settings.labelled)
    if settings.finetune:
        _check_every_label(answered.train, opened.names)
        _finetune(model, opened, answered, computed[0], work, settings)
    else:
        _save(model, opened, answered, work, settings.labelled, settings.command)
    path = export(work, store, exporting)
    shutil.rmtree(work / "states")
    return path


def _check_export(opened: stock.Stock, exporting: ExportSettings) -> None:
    """Raise ValueError early for options and tokenizers that export or the store would refuse."""
    if opened.thresholds is not None and exporting.signal == "edr":
        raise ValueError("--signal edr: needs classes that exclude each other; give risk or entropy")
    if opened.is_regression and exporting.signal not in ("auto", "risk"):
        raise ValueError(f"--signal {exporting.signal}: needs classes; for a regression model give risk")
    if opened.tokenizer.truncation_side != "right":
        raise ValueError("its tokenizer truncates at the beginning; only truncation at the end can be served")
    tokenizer = Tokenizer.from_str(opened.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    check_tokenizer(str(tokenizer.to_str()).encode())


def _parts(
    rows: Sequence[tuple[Text, str]],
    groups: Sequence[str] | None,
    opened: stock.Stock,
    settings: ImportSettings,
) -> Split:
    """The texts, split by seed into those to fit, tune and certify on."""
    if opened.is_regression:
        examples = to_examples(rows, opened.names, regression=True)
    else:
        is_multi = opened.thresholds is not None
        found = {name for _, label in rows for name in labels_in(label, is_multi)}
        examples = to_examples(rows, _names_in(found, opened.names), is_multi)
    if groups is not None:
        examples = [replace(e, group=group) for e, group in zip(examples, groups, strict=True)]
    if len(examples) < FEW_TEXTS:
        raise ValueError(
            f"{len(examples)} texts are too few to fit and certify exits: give {FEW_TEXTS} or more"
        )
    parts = split(examples, settings.seed, min(len(examples) // 5, MAX_HELD_BACK), settings.fragments)
    if len(parts.train) > MAX_FITTED:
        console.print(
            f"{len(parts.train)} texts are more than needed to fit exits: {MAX_FITTED} of them are used"
        )
    return replace(parts, train=parts.train[:MAX_FITTED])


def _names_in(found: set[str], names: Sequence[str]) -> Sequence[str]:
    """The model's labels as they appear in the data: names, numbers, or "" if it has none."""
    for known in ([""], names, [str(i) for i in range(len(names))]):
        if found <= set(known):
            if known is not names and known != [""]:
                pairs = ", ".join(f"{k} is {name}" for k, name in list(enumerate(names))[:5])
                console.print(
                    f"the data's labels are numbers, taken as the model's indices: {pairs}", markup=False
                )
            return known
    raise ValueError(
        f"the data has labels such as {sorted(found - set(names))[:5]}, the model {list(names)[:20]}: name the "
        "model's labels as the data does, with --label-names in the order of its logits"
    )


def _check_every_label(examples: Sequence[Example], names: Sequence[str]) -> None:
    """Raise ValueError if the original never answers with some label: training would lose it."""
    found = {e.original for e in examples}
    missing = [name for k, name in enumerate(names) if k not in found]
    if missing:
        raise ValueError(
            f"--finetune: the model gives no text the label {', '.join(missing[:5])}: add such texts, or import "
            "without --finetune"
        )


def _answered(parts: Split, computed: Sequence[States], labelled: bool) -> Split:
    """The parts with the original's answers, which are also the labels unless the texts have their own."""

    def with_answers(part: list[Example], states: States) -> list[Example]:
        answers = [label_of(row) for row in states.answers.numpy()]
        part = [replace(e, original=answer) for e, answer in zip(part, answers, strict=True)]
        return part if labelled else [replace(e, label=a) for e, a in zip(part, answers, strict=True)]

    both = zip((parts.train, parts.tune, parts.certify), computed, strict=True)
    return Split(*(with_answers(part, states) for part, states in both))


def _check_work(work: Path, finetune: bool) -> None:
    """Raise ValueError for a file, and for a folder that holds the model of a training or of another kind of import."""
    if work.exists() and not work.is_dir():
        raise ValueError(f"--work {work}: is a file; give a folder (it is created)")
    record = read_record(work) or {}
    is_other = record.get("imported") is not True or bool(record.get("finetuned")) != finetune
    if (work / "config.json").exists() and is_other:
        raise ValueError(f"{work} holds the model of another training or import: choose another --work")


def _save(
    model: De3Model, opened: stock.Stock, parts: Split, work: Path, labelled: bool, command: str | None
) -> None:
    """Write the checkpoint, in the form of de3 train."""
    work.mkdir(parents=True, exist_ok=True)
    record = {"imported": True, "self_labelled": not labelled}
    write_record(work, finished=False, **record, command=command)
    model.save_pretrained(work)
    opened.tokenizer.save_pretrained(work)
    for name, part in (("tune", parts.tune), ("certify", parts.certify)):
        save_examples(work / f"{name}.jsonl", part, opened.names)
    write_record(work, finished=True, **record)


def _finetune(
    model: De3Model,
    opened: stock.Stock,
    parts: Split,
    states: States,
    work: Path,
    settings: ImportSettings,
) -> None:
    """Train the whole model to the original's probabilities, at every exit, and write the checkpoint."""
    how = TrainSettings(
        epochs=settings.epochs,
        batch_size=32,
        lr=settings.lr,
        distill=1.0,
        temperature=1.0,
        max_length=opened.max_tokens,
        seed=settings.seed,
        bf16=settings.bf16,
    )
    train(
        model,
        opened.tokenizer,
        parts,
        how,
        work,
        resume=read_record(work) is not None,
        command=settings.command,
        logits=states.logits,
        imported=True,
        finetuned=True,
        self_labelled=not settings.labelled,
    )
