"""Trained models of the studies, with recorded exits. Models that exist in a folder are not trained again.

runs/mrpc-minilm-D-0/                           a checkpoint, as de3 train writes it
runs/mrpc-minilm-D-0/states-unseen.safetensors  recorded exits of the unseen samples
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from de3.data.examples import Example, input_of, label_order, to_examples
from de3.data.split import Split, split
from de3.exits.recorded import Recorded
from de3.progress import console, track
from de3.training.checkpoint import Checkpoint, is_finished
from de3.training.config import CheckpointConfig
from de3.training.encoded import Encoded, encode, evaluation_batches
from de3.training.model import De3Model
from de3.training.pretrained import quiet
from de3.training.recipe import by_size
from de3.training.settings import TrainSettings
from de3.training.trainer import train
from lab.experiments.tasks import TASKS, minilm

FOLDS = 5
SST2_ROWS = 24_000
MPNET = {"sst2": (3e-5, 2)}  # learning rate and epochs
SETTINGS = {"alpha", "gamma", "pooling", "prototypes", "weights"}
NAME = re.compile(r"([a-z0-9]+)-(minilm|mpnet)-([TD]+|none)((?:-[a-z]+=[a-z0-9.]+)*)-(\d+)(?:-fold(\d))?")


@dataclass(frozen=True)
class Cell:
    """The data and the training of one model.

    Attributes:
        task: a key of TASKS.
        encoder: minilm or mpnet.
        recipe: a letter for each component: T for distillation from a teacher, with altered copies of the texts; D for
            the paper's DAR; "none" for no component. Other training settings (alpha, gamma, pooling, prototypes,
            weights) follow after commas: "D,pooling=cls".
        fold: number, from 0 to FOLDS − 1, of the fold that is held out and measured; None: the split of de3 train,
            measured on dev or test.
    """

    task: str
    encoder: str = "minilm"
    recipe: str = "D"
    seed: int = 0
    fold: int | None = None

    @property
    def name(self) -> str:
        """The name of the model's folder."""
        fold = "" if self.fold is None else f"-fold{self.fold}"
        return f"{self.task}-{self.encoder}-{self.recipe.replace(',', '-')}-{self.seed}{fold}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """The cell with this folder name; raises ValueError for another form of name, or an unknown setting."""
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name}: not a cell; an example is mrpc-minilm-D-0")
        task, encoder, letters, more, seed, fold = match.groups()
        if unknown := set(re.findall(r"-([a-z]+)=", more)) - SETTINGS:
            raise ValueError(
                f"{name}: unknown setting {unknown.pop()}; there are {', '.join(sorted(SETTINGS))}"
            )
        return cls(task, encoder, letters + more.replace("-", ","), int(seed), int(fold) if fold else None)

    @property
    def letters(self) -> str:
        """The letters of the recipe, without its other settings."""
        return self.recipe.split(",")[0]

    @property
    def more(self) -> dict[str, str]:
        """The other settings of the recipe: values by name."""
        return dict(pair.split("=") for pair in self.recipe.split(",")[1:])


def grouped(cells: Sequence[Cell]) -> dict[tuple[str, str, str, bool], list[Cell]]:
    """Cells by task, encoder, recipe and whether they are folds; the cells of a group differ in seed or fold."""
    groups: dict[tuple[str, str, str, bool], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.encoder, cell.recipe, cell.fold is not None), []).append(cell)
    return groups


@dataclass(frozen=True)
class States:
    """The pooled states and the recorded exits of texts.

    Attributes:
        pooled: pooled hidden state h^(m) of every exit, (n, exits, hidden), float16.
        recorded: the outputs of every exit.
    """

    pooled: NDArray[np.float16]
    recorded: Recorded

    def without(self, exits: int) -> Self:
        """The same states without the first `exits` exits."""
        r = self.recorded
        arrays = (r.logits[:, exits:], r.distances[:, exits:], r.labels)
        return type(self)(self.pooled[:, exits:], Recorded(r.exit_layers[exits:], *arrays, r.tokens))

    def rows(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> Self:
        """A subset of the texts."""
        return type(self)(self.pooled[which], self.recorded.rows(which))


class Trained:
    """A cell's model and its states."""

    def __init__(self, cell: Cell, root: Path, runs: Path, encoders: Path | None = None) -> None:
        """Train the cell, unless `runs`, the folder of the trained models, has it.

        root: folder of the data sets. encoders: a folder with all-mpnet-base-v2, needed to train an mpnet cell. Raises
        ValueError if `encoders` is needed and None, or if a fold of a task with fragments must be trained.
        """
        quiet()
        self.cell, self.root, self.folder = cell, root, runs / cell.name
        if not is_finished(self.folder):
            console.print(f"training {cell.name}", highlight=False)
            _train(cell, root, runs, self.folder, _encoder(cell, encoders))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint."""
        return Checkpoint(self.folder)

    @property
    def model(self) -> De3Model:
        """The model, in evaluation mode."""
        model: De3Model = self.checkpoint.model
        return model

    @property
    def config(self) -> CheckpointConfig:
        """The checkpoint's configuration."""
        return self.checkpoint.config

    def examples(self, part: str) -> list[Example]:
        """The samples of a part: train, held-out (whole texts only) or unseen."""
        held = self.checkpoint.held_out("tune")
        if self.cell.fold is None:
            held += self.checkpoint.held_out("certify")
        if part == "held-out":
            return [example for example in held if not example.is_fragment]
        if part == "unseen" and self.cell.fold is not None:
            return self.checkpoint.held_out("certify")
        split, names = _parts(self.cell, self.root)
        return (
            to_examples(TASKS[self.cell.task].unseen(self.root), names) if part == "unseen" else split.train
        )

    def states(self, part: str) -> States:
        """The states of a part; see `examples`."""
        return self.of(self.examples(part), part)

    def of(self, examples: list[Example], what: str) -> States:
        """The states of these samples, cached in the checkpoint's folder.

        what: name of the cache file; one name must always stand for the same samples.
        """
        file = self.folder / f"states-{what}.safetensors"
        if not file.exists():
            tokenizer = self.checkpoint.tokenizer
            encoded = encode(examples, tokenizer, self.config.max_tokens, what)
            save_file(
                _run(self.model, encoded, tokenizer.pad_token_id, what), new := file.with_suffix(".new")
            )
            new.replace(file)
        return _states(self.config, load_file(file))


def _states(config: CheckpointConfig, tensors: dict[str, Tensor]) -> States:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    return States(arrays.pop("pooled"), Recorded(config.exit_layers, **arrays))


@torch.no_grad()
def _run(model: De3Model, encoded: Encoded, pad_id: int, what: str) -> dict[str, Tensor]:
    """Run the model; returns the tensors of `States` by name.

    Training texts run in bfloat16, because they are many and are only used for fitting.
    """
    model.eval()
    n, exits, labels = len(encoded), len(model.config.exit_layers), model.config.num_labels
    pooled = torch.zeros(n, exits, model.config.hidden_size, dtype=torch.float16)
    logits, distances = torch.zeros(n, exits, labels), torch.full((n, exits, labels), torch.nan)
    for rows in track(evaluation_batches([len(ids) for ids in encoded.ids], 64), f"Running {what}"):
        inputs, _ = encoded.batch(rows, pad_id)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "train"):
            h = model.pooled(**inputs)
        pooled[rows] = h.half()
        logits[rows] = torch.stack([f(h[:, i]) for i, f in enumerate(model.classifiers)], 1)
        spaces = model.distances(model.embed(h))
        distances[rows, : spaces.shape[1]] = spaces
    tokens = torch.tensor([len(ids) for ids in encoded.ids])
    return {
        "pooled": pooled,
        "logits": logits,
        "distances": distances,
        "labels": encoded.labels,
        "tokens": tokens,
    }


def _encoder(cell: Cell, encoders: Path | None) -> str:
    if cell.encoder == "minilm":
        return minilm()
    if encoders is None:
        raise ValueError("--encoders: give the folder of all-mpnet-base-v2")
    return str(encoders / "all-mpnet-base-v2")


def _parts(cell: Cell, root: Path) -> tuple[Split, list[str]]:
    """The samples of a cell, split into parts, and the names of the labels."""
    task = TASKS[cell.task]
    rows = task.train(root)
    names = label_order(rows)
    examples = to_examples(rows, names)
    if cell.fold is not None:
        if task.fragments:
            raise ValueError(f"{cell.name}: folds would put a text and its fragments apart")
        fold_of = [hashlib.sha256(repr(e.text).encode()).digest()[0] % FOLDS for e in examples]
        of = [[e for e, fold in zip(examples, fold_of, strict=True) if fold == k] for k in range(FOLDS)]
        tune = (cell.fold + 1) % FOLDS
        rest = [e for k, part in enumerate(of) if k not in (cell.fold, tune) for e in part]
        half = len(of[tune]) // 2  # to choose the epoch; the other half is trained on
        return Split(rest + of[tune][half:], of[tune][:half], of[cell.fold]), names
    parts = split(examples, 0, fragments=task.fragments)
    if task.fragments:
        parts = Split(parts.train[:SST2_ROWS], parts.tune, parts.certify)
    return parts, names


def _train(cell: Cell, root: Path, runs: Path, out: Path, encoder: str) -> None:
    parts, names = _parts(cell, root)
    recipe, letters = by_size(len(parts.train)), cell.letters
    settings = TrainSettings(
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        # A teacher's altered copies double the steps of an epoch.
        epochs=3 if "T" in letters else recipe.epochs,
        patience=recipe.patience,
        alpha=0.1 if "D" in letters else 0.0,
        augment=1 if "T" in letters else 0,
        distill=0.9,
        seed=cell.seed,
    )
    if cell.encoder == "mpnet":
        lr, epochs = MPNET.get(cell.task, (5e-5, 4))
        epochs = epochs // 2 if "T" in letters else epochs  # the same number of steps
        settings = replace(settings, lr=lr, epochs=epochs, patience=0)
    gamma, pooling = float(cell.more.get("gamma", 0.01)), cell.more.get("pooling", "mean")
    alpha, how = float(cell.more.get("alpha", settings.alpha)), cell.more.get("prototypes", "refit")
    weights = cell.more.get("weights", "depth")
    settings = replace(settings, alpha=alpha, prototypes=how, weights=weights)
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    layers = AutoConfig.from_pretrained(encoder).num_hidden_layers
    model = De3Model.from_encoder(
        encoder,
        names,
        exit_layers=list(range(layers + 1)),
        input=input_of(parts.train),
        gamma=gamma,
        pooling=pooling,
    )
    teacher = runs / Cell(cell.task, "mpnet", "D").name if "T" in letters else None
    train(model, tokenizer, parts, settings, out, teacher, resume=out.exists())


def main(
    root: Annotated[Path, typer.Argument(help="Folder of the data sets.")],
    runs: Annotated[Path, typer.Argument(help="Folder of the trained models.")],
    names: Annotated[
        list[str], typer.Argument(help="Cells, such as mrpc-minilm-D-0 or rte-minilm-D-0-fold3.")
    ],
    encoders: Annotated[Path | None, typer.Option(help="Folder that contains all-mpnet-base-v2.")] = None,
    keep_train: Annotated[bool, typer.Option(help="Record the training samples too.")] = False,
) -> None:
    """Train cells, and record their exits on held-out and unseen samples."""
    for name in names:
        trained = Trained(Cell.parse(name), root, runs, encoders)
        for part in ("held-out", "unseen", *(["train"] if keep_train else [])):
            correct = trained.states(part).recorded.correct.mean(0)
            print(f"{name} {part}: {' '.join(f'{100 * c:.1f}' for c in correct)}", flush=True)
