"""The training loop: saves the best epoch as a checkpoint and can resume after every epoch."""

import hashlib
import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from de3.data.examples import Example, save_examples
from de3.data.split import Split
from de3.progress import Meter, console, warn
from de3.training import augment, prototypes
from de3.training import loss as losses
from de3.training.checkpoint import Checkpoint, is_finished, read_record, write_record
from de3.training.encoded import Encoded, encode, training_batches
from de3.training.evaluate import exit_scores, exit_table, weaknesses
from de3.training.model import De3Model
from de3.training.predict import predict
from de3.training.settings import TrainSettings

RESUME = "resume.safetensors"


def train(
    model: De3Model,
    tokenizer: Any,
    split: Split,
    settings: TrainSettings,
    out: Path,
    teacher: Path | None = None,
    resume: bool = False,
    command: str | None = None,
) -> De3Model:
    """Train, write the best epoch to `out` as a checkpoint, and return it.

    The best epoch has the highest accuracy on `split.tune` (micro F1 for a multi-label model), averaged over the exits
    with the weights of the loss. `out` also receives the two held-out parts, which `de3 export` and `de3 evaluate`
    read, and, until the training is finished, the state from which `resume` continues.

    teacher: checkpoint to distill from. resume: continue after the last complete epoch in `out`; a finished checkpoint
    is returned as it is. command: the command that resumes this run, recorded in the checkpoint.

    Raises ValueError if `out` is a file or has a checkpoint that this run does not continue, if the settings ask for
    augmentation without a teacher, if the teacher does not fit the data, or if the training diverges.
    """
    names = model.config.label_names
    if settings.augment and teacher is None:
        raise ValueError("--augment needs a --teacher to label the altered texts")
    identity = _identity(settings, model, split, teacher)
    # Check everything before anything is written.
    _check_out(out, identity, resume)
    opened = open_teacher(teacher, split, names) if teacher is not None and not is_finished(out) else None
    if resume and is_finished(out):
        console.print(f"{out} is finished: there is nothing to resume", markup=False, soft_wrap=True)
        finished: De3Model = Checkpoint(out).model
        return finished
    out.mkdir(parents=True, exist_ok=True)
    save_examples(out / "tune.jsonl", split.tune, names)
    save_examples(out / "certify.jsonl", split.certify, names)
    tokenizer.save_pretrained(out)
    record = {"settings": asdict(settings), "identity": identity, "command": command}
    write_record(out, finished=False, **record)
    max_length = min(settings.max_length, model.config.max_tokens)
    train_data, teacher_logits = _training_data(model, tokenizer, split, settings, opened)
    del opened  # frees its memory
    tune_data = encode(split.tune, tokenizer, max_length, "tune", len(names))
    pad_id = tokenizer.pad_token_id

    run = _Run(model, settings, train_data, pad_id, teacher_logits, out, identity)
    weights = run.weights.cpu().numpy()
    if resume:
        run.load()
    while run.epoch < settings.epochs:
        if settings.patience and run.epoch - run.best_epoch >= settings.patience:
            console.print(f"no improvement for {settings.patience} epochs: stopping")
            break
        started = time.monotonic()
        mean_loss = run.one_epoch()
        recorded = predict(model, tune_data, pad_id, what="tune", bf16=settings.bf16)
        measure, by_exit = exit_scores(recorded)
        score = float(by_exit @ weights)
        run.history.append({"loss": mean_loss, f"tune_{measure}": by_exit.tolist(), "score": score})
        console.print(
            f"epoch {run.epoch}/{settings.epochs}  loss {mean_loss:.4f}  score {score:.4f}  "
            f"tune {measure.replace('_', ' ')} by exit {' '.join(f'{a:.3f}' for a in by_exit)}  "
            f"({time.monotonic() - started:.0f} s)",
            soft_wrap=True,
        )
        if score > run.best:
            run.best, run.best_epoch = score, run.epoch
            model.save_pretrained(out)
        run.save()

    model = Checkpoint(out, unfinished=True).model
    if settings.augment:
        train_data = encode(split.train, tokenizer, max_length, "train")
    prototypes.finish(
        model, train_data, pad_id, settings.prototypes, settings.head_lr, settings.seed, settings.bf16
    )
    model.save_pretrained(out)
    recorded = predict(model, tune_data, pad_id, what="tune", bf16=settings.bf16)
    console.print(exit_table(recorded, "tuning "))
    warn(weaknesses(recorded, names))
    write_record(out, finished=True, best_epoch=run.best_epoch, history=run.history, **record)
    (out / RESUME).unlink()
    return model


def _training_data(
    model: De3Model,
    tokenizer: Any,
    split: Split,
    settings: TrainSettings,
    teacher: Checkpoint | None,
) -> tuple[Encoded, torch.Tensor | None]:
    """The training data with its altered copies, and the logits of a teacher for both, (n, num_labels)."""
    logits = None
    examples = list(split.train)
    if settings.augment:
        examples += altered(model, tokenizer, split.train, settings)
    if teacher is not None:
        logits = teach(teacher, examples, split, settings)
        # The only label of an altered text is the teacher's answer.
        n = len(split.train)
        labels = logits[n:].argmax(-1).tolist()
        examples[n:] = [Example(e.text, label) for e, label in zip(examples[n:], labels, strict=True)]
    max_length = min(settings.max_length, model.config.max_tokens)
    return encode(examples, tokenizer, max_length, "train", model.config.num_labels), logits


class _Run:
    """The state of a training run, in memory and on disk."""

    def __init__(
        self,
        model: De3Model,
        settings: TrainSettings,
        data: Encoded,
        pad_id: int,
        teacher_logits: torch.Tensor | None,
        out: Path,
        identity: str,
    ) -> None:
        self.model, self.settings, self.data, self.pad_id = model, settings, data, pad_id
        self.teacher_logits, self.out, self.identity = teacher_logits, out, identity
        self.lengths = [len(ids) for ids in data.ids]
        self.weights = losses.layer_weights(model.config.exit_layers, settings.weights).to(model.device)
        self.epoch, self.step, self.best, self.best_epoch = 0, 0, -math.inf, 0
        self.history: list[dict[str, Any]] = []
        if model.config.thresholds is not None:
            model.start_at(data.labels)
        self.total_steps = settings.epochs * math.ceil(len(data) / settings.batch_size)
        self.optimizer = torch.optim.AdamW(self._groups(), fused=True)
        self.meter = Meter()

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups by learning rate and weight decay; biases and norms do not decay."""
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, p in self.model.named_parameters():
            groups.setdefault((name.startswith("encoder."), p.ndim > 1), []).append(p)
        s = self.settings
        return [
            {
                "params": ps,
                "base_lr": s.lr if in_encoder else s.head_lr,
                "lr": 0.0,
                "weight_decay": s.weight_decay if decays else 0.0,
            }
            for (in_encoder, decays), ps in groups.items()
        ]

    def one_epoch(self) -> float:
        """Train one epoch; returns its mean loss. Raises ValueError as soon as a loss is not finite."""
        s = self.settings
        # The seed depends on the epoch, so that a resumed run equals an uninterrupted one.
        seed = s.seed * 1_000_003 + self.epoch
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        batches = training_batches(self.lengths, s.batch_size, seed)
        self.model.train()
        sum_of_losses = 0.0
        with self.meter.epoch(self.epoch + 1, self.settings.epochs, len(batches)) as meter:
            for i, rows in enumerate(batches, 1):
                sum_of_losses += self._one_step(rows)
                if not math.isfinite(sum_of_losses):
                    raise ValueError(
                        f"the training diverged in epoch {self.epoch + 1}: repeat it with a lower --lr"
                    )
                meter.step(i, sum_of_losses / i)
        self.epoch += 1
        return sum_of_losses / len(batches)

    def _one_step(self, rows: list[int]) -> float:
        s, model = self.settings, self.model
        inputs, labels = self.data.batch(rows, self.pad_id)
        inputs = {k: v.to(model.device) for k, v in inputs.items()}
        labels = labels.to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=s.bf16):
            out = model(**inputs)
        if model.prototypical:
            model.update_prototypes(out.embedded.detach(), labels)
        distances = model.distances(out.embedded)  # to the prototypes after this batch's update
        teacher = self.teacher_logits[rows].to(model.device) if self.teacher_logits is not None else None
        loss = losses.total(
            out.logits, distances, labels, self.weights, s.alpha, teacher, s.distill, s.temperature
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def _rate(self) -> float:
        """The learning rate's factor: linear warm-up, then linear decay to 0."""
        warmup = max(1, round(self.settings.warmup * self.total_steps))
        if self.step < warmup:
            return (self.step + 1) / warmup
        return max(0.0, (self.total_steps - self.step) / max(1, self.total_steps - warmup))

    # The state is a single file, tensors with JSON metadata, so that it can be replaced atomically and
    # resuming needs no pickle.
    _COUNTERS = ("epoch", "step", "best", "best_epoch", "history")

    def save(self) -> None:
        """Write the state to `out`/resume.safetensors, atomically."""
        names = {p: n for n, p in self.model.named_parameters()}
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for p, state in self.optimizer.state.items():
            tensors |= {f"{key}.{names[p]}": value for key, value in state.items()}
        counters = {k: getattr(self, k) for k in self._COUNTERS}
        new = self.out / "resume.new"
        save_file(
            {k: v.detach().clone().contiguous() for k, v in tensors.items()},
            new,
            {"identity": self.identity, "counters": json.dumps(counters)},
        )
        new.replace(self.out / RESUME)

    def load(self) -> None:
        """Restore the state from `out`/resume.safetensors; without this file, training starts from the beginning."""
        file = self.out / RESUME
        if not file.exists():
            message = f"no state to resume in {self.out}: starting from the beginning"
            console.print(message, markup=False, soft_wrap=True)
            return
        for k, v in json.loads(_metadata(file)["counters"]).items():
            setattr(self, k, v)
        tensors = load_file(file)
        self.model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        for name, p in self.model.named_parameters():
            if f"step.{name}" in tensors:
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[p] = {key: tensors[f"{key}.{name}"].to(p.device) for key in keys}
        console.print(f"resuming after epoch {self.epoch}")


def _identity(settings: TrainSettings, model: De3Model, split: Split, teacher: Path | None) -> str:
    """A digest of a run's settings, configuration, data and teacher, so that its state cannot resume another run."""
    parts = (settings, model.config.to_json_string(), split, teacher and teacher.resolve())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _check_out(out: Path, identity: str, resume: bool) -> None:
    """Raise ValueError if a run may not write to `out`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder, which need not exist")
    has_other = (out / "config.json").exists() and read_record(out) is None and not (out / RESUME).exists()
    if has_other:
        raise ValueError(f"--out {out}: contains the model of another training run: choose another --out")
    if resume:
        file = out / RESUME
        before = _metadata(file)["identity"] if file.exists() else (read_record(out) or {}).get("identity")
        if before is not None and before != identity:
            raise ValueError(
                f"{out} belongs to a run with other settings or data: use the same ones, or another folder"
            )
    elif (out / "config.json").exists() or read_record(out) is not None:
        what = "a finished checkpoint" if is_finished(out) else "a training run that --resume continues"
        raise ValueError(f"{out} has {what}: choose another --out, or delete the folder")


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def altered(
    model: De3Model, tokenizer: Any, examples: list[Example], settings: TrainSettings
) -> list[Example]:
    """Altered copies of examples, with the label 0 until the teacher labels them."""
    table = model.encoder.get_input_embeddings().weight.detach()
    nearest_words = augment.neighbours([e.text for e in examples], tokenizer, table)
    texts = augment.augment(examples, nearest_words, settings.augment, settings.seed)
    return [Example(text, 0) for text in texts]


def open_teacher(teacher: Path, split: Split, names: list[str]) -> Checkpoint:
    """The teacher's checkpoint.

    Raises ValueError if it has other labels, is multi-label, or may have been trained on samples held out here.
    """
    opened = Checkpoint(teacher)
    if opened.config.thresholds is not None:
        raise ValueError(
            f"--teacher {teacher}: is a multi-label model, but the labels here are mutually exclusive"
        )
    if (theirs := opened.names) != names:
        raise ValueError(
            f"{teacher} has the labels {theirs}, this run {names}: they must be the same, in the same order"
        )
    for part in ("tune", "certify"):
        if opened.held_out(part) != getattr(split, part):
            raise ValueError(
                f"{teacher} held out different samples from this run, so it may have been trained on them: "
                "train it on the same data with the same --seed and --held-back"
            )
    return opened


def teach(
    teacher: Checkpoint, examples: list[Example], split: Split, settings: TrainSettings
) -> torch.Tensor:
    """The teacher's logits for the training examples, (n, num_labels), cached in the teacher's folder."""
    model = teacher.model
    max_length = min(settings.max_length, model.config.max_tokens)
    digest = hashlib.sha256((teacher.folder / "model.safetensors").read_bytes())
    digest.update(repr((max_length, settings.bf16, [e.text for e in examples])).encode())
    cache = teacher.folder / f"logits-{digest.hexdigest()[:16]}.safetensors"
    if not cache.exists():
        data = encode(examples, teacher.tokenizer, max_length, "train for the teacher")
        recorded = predict(
            model, data, teacher.tokenizer.pad_token_id, what="train with the teacher", bf16=settings.bf16
        )
        accuracy = recorded.correct[: len(split.train), -1].mean()
        console.print(f"the teacher's accuracy on train: {accuracy:.4f}")
        draft = cache.with_suffix(".part")  # a run that is killed leaves no file that looks complete
        save_file({"logits": torch.from_numpy(recorded.logits[:, -1].copy())}, draft)
        draft.replace(cache)
    logits: torch.Tensor = load_file(cache)["logits"]
    return logits
