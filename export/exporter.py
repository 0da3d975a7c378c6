"""Export of a checkpoint as an artifact: build its segments, verify, calibrate and publish them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.numpy import save as save_tensors
from tokenizers import Tokenizer

from de3.exits.calibration import paired_interval
from de3.exits.recorded import Recorded
from de3.exits.rule import ExitRule, exit_index
from de3.export.build import architecture_of, build
from de3.export.calibrate import CHOICES, Part, calibrate
from de3.export.record import record
from de3.model_store.architecture import Architecture
from de3.model_store.manifest import NAME, SCHEMA_VERSION, Defaults, FileEntry, Manifest
from de3.model_store.model import Model
from de3.model_store.store import Artifact, Draft, Store
from de3.training.checkpoint import Checkpoint
from de3.training.data import Example, check_apart, encode, with_original
from de3.training.evaluate import weaknesses
from de3.training.model import De3Model
from de3.training.predict import predict
from de3.training.progress import console, warn

MAX_FP32_DIFFERENCE = 1e-3
MIN_SAME_EXIT = 0.8  # share of samples; below it a warning is given


class ExportError(ValueError):
    """The exported model differs too much from the checkpoint; nothing was published."""


@dataclass(frozen=True)
class ExportSettings:
    """Options of an export; validates itself.

    Attributes:
        quantize: "int8" or "none".
        max_loss: largest accuracy loss against full depth at the default (λ, τ), a fraction.
        max_int8_loss: largest accuracy loss of any exit in int8, a fraction.
        signal: the default signal, or auto.
    """

    name: str
    quantize: str = "int8"
    max_loss: float = 0.01
    max_int8_loss: float = 0.01
    signal: str = "auto"

    def __post_init__(self) -> None:
        if self.quantize not in ("int8", "none"):
            raise ValueError(f"--quantize must be int8 or none, got {self.quantize!r}")
        if not NAME.fullmatch(self.name):
            raise ValueError(
                "--name must have at most 64 lower-case letters, digits, dots, dashes and underscores, got "
                f"{self.name!r}"
            )
        if self.signal not in CHOICES:
            raise ValueError(f"--signal must be one of {', '.join(CHOICES)}, got {self.signal!r}")


def export(
    checkpoint: Path,
    store: Store,
    settings: ExportSettings,
    tune_file: Path | None = None,
    certify_file: Path | None = None,
) -> Path:
    """Export a checkpoint into a store as the model's next version; returns its folder.

    The signal is fitted and chosen on tune_file, and the reported numbers come from certify_file. The defaults are
    the parts that training held out.

    Raises ExportError if the segments differ too much from the PyTorch model, and ValueError if the checkpoint cannot
    be exported. In both cases nothing is published.
    """
    opened = Checkpoint(checkpoint)
    model, tokenizer = opened.model, opened.tokenizer
    tokenizer_json = plain_tokenizer(checkpoint)
    _check_prototypes(model)
    tune, certify = opened.held_out("tune", tune_file), opened.held_out("certify", certify_file)
    if tune_file or certify_file:  # the defaults are disjoint
        check_apart(
            tune,
            certify,
            tune_file or checkpoint / "tune.jsonl",
            certify_file or checkpoint / "certify.jsonl",
        )
    int8 = settings.quantize == "int8"
    architecture = architecture_of(model, int8, "token_type_ids" in tokenizer.model_input_names)
    segments = build(model, architecture)
    with store.new_version(settings.name) as draft:
        draft.write({name: segment.SerializeToString() for name, segment in segments.items()})
        draft.write(
            {
                "prototypes.safetensors": save_tensors(_prototypes(model)),
                "tokenizer.json": tokenizer_json.encode(),
            }
        )
        manifest = _manifest(model, architecture, draft, settings)
        exported = Model(Artifact(draft.path, manifest), "onnxruntime")
        proof: dict[str, Any] = {"parity": parity(model, tokenizer, exported, certify, int8)}
        tuned = record(exported, tune, "the tuning samples")
        certified = record(exported, certify, "the certifying samples")
        if int8 or opened.is_finetuned:  # otherwise full depth is the imported classifier itself
            tuned, certified = with_original(tuned, tune), with_original(certified, certify)
            if opened.is_finetuned and (tuned.original is None or certified.original is None):
                raise ValueError(
                    f"{checkpoint} was fine-tuned from another classifier, and the given samples lack its "
                    'answers ("original", as in tune.jsonl and certify.jsonl there)'
                )
        if int8:
            encoded = encode(certify, tokenizer, manifest.max_tokens, num_labels=len(manifest.labels))
            reference = predict(model, encoded, tokenizer.pad_token_id, what="fp32 for comparison")
            proof["int8"] = int8_loss(certified, reference, settings.max_int8_loss)
        warn(weaknesses(certified, opened.names))
        certifying = Part.of(certified, certify)
        own = opened.self_labelled and certify_file is None
        calibrated = calibrate(Part.of(tuned, tune), certifying, settings.max_loss, settings.signal, own)
        final = manifest.model_copy(update=calibrated.fields())
        if int8:
            whole = certifying.is_whole
            rule = ExitRule(final.defaults.tau, final.default_signal)
            proof["int8"]["same_exit"] = same_exit(certified.rows(whole), reference.rows(whole), rule)
        # Validate: model_copy does not.
        return draft.publish(Manifest.model_validate({**final.model_dump(), "export": proof}))


def _check_prototypes(model: De3Model) -> None:
    for layer, seen in zip(model.config.prototype_layers, model.prototype_seen, strict=True):
        missing = [name for name, s in zip(model.config.label_names, seen.tolist(), strict=True) if not s]
        if missing:
            raise ValueError(
                f"layer {layer} has no prototype for {', '.join(missing[:5])}: the training data has no sample of it"
            )


def _prototypes(model: De3Model) -> dict[str, Any]:
    layers = model.config.prototype_layers
    return {
        f"layer_{m:02}": np.ascontiguousarray(p)
        for m, p in zip(layers, model.prototypes.numpy(), strict=True)
    }


def plain_tokenizer(checkpoint: Path) -> str:
    """The checkpoint's tokenizer.json without padding and truncation."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return str(tokenizer.to_str())


def _manifest(
    model: De3Model, architecture: Architecture, draft: Draft, settings: ExportSettings
) -> Manifest:
    config = model.config
    return Manifest(
        **dict(architecture),
        schema_version=SCHEMA_VERSION,
        name=settings.name,
        version=draft.next_version(),
        created=int(time.time()),
        thresholds=config.thresholds,
        tolerance=config.tolerance,
        input=config.input,
        defaults=Defaults(tau=0, signal="entropy"),
        calibration=None,
        export={},
        files={name: FileEntry.model_validate(entry) for name, entry in draft.entries().items()},
    )


def parity_samples(examples: Sequence[Example], model: Model, count: int = 48) -> list[Example]:
    """Examples of many lengths up to max_tokens: a spread of the given ones, and longer ones joined from them."""
    by_length = sorted(examples, key=lambda e: len(repr(e.text)))
    chosen = [
        by_length[i] for i in np.linspace(0, len(by_length) - 1, min(count, len(by_length))).astype(int)
    ]
    long = " ".join(e.text if isinstance(e.text, str) else e.text[0] for e in by_length[::-1][:400])
    limit = model.manifest.max_tokens
    return chosen + [Example(long[: 3 * n], 0) for n in (64, 128, 256, 512) if n < limit] + [Example(long, 0)]


@torch.no_grad()
def parity(
    model: De3Model, tokenizer: Any, exported: Model, examples: Sequence[Example], int8: bool
) -> dict[str, Any]:
    """Run the segments and the PyTorch model on the same samples; print and return the largest differences.

    Raises ExportError if fp32 differs by more than 1e-3 (times the tolerance, if it is above 1). For int8,
    int8_loss compares accuracies instead.
    """
    exits, spaces = model.config.exit_layers, model.config.prototype_layers
    largest = {"logits": [0.0] * len(exits), "distances": [0.0] * len(spaces)}
    samples = parity_samples(examples, exported)
    lengths = []
    for example in samples:
        encoded = encode(
            [example], tokenizer, exported.manifest.max_tokens, num_labels=model.config.num_labels
        )
        inputs, _ = encoded.batch([0], tokenizer.pad_token_id)
        expected = model(**inputs)
        text, pair = example.text if isinstance(example.text, tuple) else (example.text, None)
        tokens = exported.tokenize(text, pair)
        if tokens.ids[0].tolist() != encoded.ids[0]:
            raise ExportError(f"the exported tokenizer differs from the checkpoint's on {text[:80]!r}")
        lengths.append(len(tokens))
        steps = exported.full_depth(tokens)
        for output, layers, values in (
            ("logits", exits, expected.logits[0].numpy()),
            ("distances", spaces, expected.distances[0].numpy()),
        ):
            for j, layer in enumerate(layers):
                difference = float(np.abs(getattr(steps[layer], output) - values[j]).max())
                largest[output][j] = max(largest[output][j], difference)
    span = f"{min(lengths)} to {max(lengths)} tokens"
    table = Table(title=f"Largest difference from PyTorch, {len(samples)} samples of {span}")
    for column in ("layer", "logits", "distances"):
        table.add_column(column, justify="right")
    for j, layer in enumerate(exits):
        distances = f"{largest['distances'][j]:.1e}" if layer in spaces else "–"
        table.add_row(str(layer), f"{largest['logits'][j]:.1e}", distances)
    console.print(table)
    worst = max(largest["logits"] + largest["distances"])
    allowed = MAX_FP32_DIFFERENCE * max(
        1.0, model.config.tolerance or 0.0
    )  # values have the scale of the tolerance
    if not int8 and not worst <= allowed:  # "not <=" catches NaN
        raise ExportError(f"the segments differ from the PyTorch model by {worst:.1e}, above {allowed:g}")
    return {"samples": len(samples), "longest": max(lengths), **largest}


def same_exit(int8: Recorded, reference: Recorded, rule: ExitRule) -> float:
    """Share of samples with the same exit and answer in int8 and fp32; warns if it is small."""
    rows = np.arange(len(int8.labels))
    index, expected = (exit_index(rule.signal.scores(r), rule.tau) for r in (int8, reference))
    ours, theirs = int8.answers[rows, index], reference.answers[rows, expected]
    unlike = ours != theirs if int8.tolerance is None else ~(np.abs(ours - theirs) <= int8.tolerance)
    same = (index == expected) & ~(unlike if unlike.ndim == 1 else unlike.any(-1))
    share = float(same.mean())
    message = f"{100 * share:.1f}% of the certifying samples have the same exit and answer as in fp32"
    if share < MIN_SAME_EXIT:
        warn([f"{message}: the reported numbers are those of int8; compare them with --quantize none"])
    else:
        console.print(message)
    return share


def int8_loss(int8: Recorded, reference: Recorded, allowed: float) -> dict[str, Any]:
    """Accuracy of each exit in int8 and fp32, on the same samples.

    Raises ExportError if the loss of an exit is above `allowed` with 95% confidence.
    """
    quantized, full = int8.correct.mean(0), reference.correct.mean(0)
    table = Table(title=f"Accuracy by exit, int8 and fp32 ({len(int8.labels)} certifying samples)")
    for column in ("layer", "fp32", "int8", "loss", "95% interval"):
        table.add_column(column, justify="right")
    intervals = [paired_interval(a, b) for a, b in zip(reference.correct.T, int8.correct.T, strict=True)]
    for layer, a, b, (low, high) in zip(int8.exit_layers, full, quantized, intervals, strict=True):
        span = f"{100 * low:+.2f} … {100 * high:+.2f}"
        table.add_row(str(layer), f"{100 * a:.2f}", f"{100 * b:.2f}", f"{100 * (a - b):+.2f}", span)
    console.print(table)
    low, worst = max((low, j) for j, (low, _) in enumerate(intervals))
    if low > allowed:
        raise ExportError(
            f"int8 costs exit {int8.exit_layers[worst]} at least {100 * low:.2f} points of accuracy, more than "
            f"{100 * allowed:.2f}: export with --quantize none, or raise --max-int8-loss"
        )
    return {"fp32_accuracy": full.tolist(), "int8_accuracy": quantized.tolist()}
