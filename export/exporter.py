"""Export of a checkpoint as an artifact: build the segments, check and calibrate them, and publish a version."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from de3.data.examples import Example, with_original
from de3.exits.calibration import paired_interval
from de3.exits.recorded import Recorded
from de3.exits.rule import ExitRule, exit_index
from de3.export.build import manifest_of
from de3.export.calibrate import CalibrationPart, calibrate
from de3.export.errors import ExportError
from de3.export.record import record
from de3.export.trained import Trained
from de3.model_store.architecture import Precision, precision_of
from de3.model_store.manifest import NAME, Manifest
from de3.model_store.model import Model
from de3.model_store.store import Artifact, Draft, Store
from de3.progress import console, empty_table, warn
from de3.runtime.flags import guard_of
from de3.training.checkpoint import Checkpoint
from de3.training.evaluate import weaknesses

MIN_SAME_EXIT = 0.8  # share of samples; below it, export warns


@dataclass(frozen=True)
class ExportSettings:
    """Options of an export; raises ValueError for invalid ones.

    Attributes:
        name: name of the model in the store.
        quantize: "int8" or "none".
        max_loss: largest accuracy loss against full depth at the default signal and τ, as a fraction.
        max_int8_loss: largest accuracy loss of any exit in int8 against fp32, as a fraction.
        flag: a flag as in the setting --flag, for which missed texts are certified; None: none.
    """

    name: str
    quantize: str = "int8"
    max_loss: float = 0.01
    max_int8_loss: float = 0.01
    flag: str | None = None

    def __post_init__(self) -> None:
        _ = self.precision
        if not 0 <= self.max_loss <= 1:  # also rejects NaN
            raise ValueError(f"--max-loss must be from 0 to 100 points, got {100 * self.max_loss:g}")
        if not NAME.fullmatch(self.name):
            raise ValueError(
                "--name must have at most 64 lower-case letters, digits, dots, dashes and underscores, got "
                f"{self.name!r}"
            )

    @property
    def precision(self) -> Precision:
        """The precision of the artifact; raises ValueError for any other value of `quantize`."""
        return precision_of(self.quantize)


@dataclass(frozen=True, slots=True)
class CalibrationSamples:
    """Samples that choose and certify a model's exit rule.

    Attributes:
        tune: the tuning samples, or cross-fitted outputs of those that the exits were fitted to.
        certify: the certifying samples.
        is_crossed: the outputs in `tune` are of all samples, and certify; the samples `certify`, some of them, only
            show what int8 changes.
        self_labelled: see `calibrate`.
    """

    tune: Sequence[Example] | CalibrationPart
    certify: Sequence[Example]
    is_crossed: bool = False
    self_labelled: bool = False


def export(checkpoint: Path, store: Store, settings: ExportSettings) -> Path:
    """Export a checkpoint into a store as the model's next version; returns its folder.

    The risk is fitted, and the signal chosen, on the tuning samples that training held out; the signal and τ are
    certified on the certifying samples (see `calibrate`).

    Raises ExportError if the segments differ too much from the PyTorch model, or int8 from fp32, and ValueError if the
    checkpoint cannot be exported. In both cases nothing is published.
    """
    opened = Checkpoint(checkpoint)
    held_out = CalibrationSamples(opened.held_out("tune"), opened.held_out("certify"))
    from de3.export.parity import parity

    trained = Trained(opened)
    with store.new_version(settings.name) as draft, store.new_version(settings.name) as reference:
        exported = write(trained, settings.precision, draft, settings.name)
        is_int8 = settings.precision == "int8"
        plain = write(trained, "fp32", reference, settings.name) if is_int8 else exported
        proof = {"parity": parity(opened, plain, held_out.certify)}
        return certified(draft, exported, plain, held_out, settings, proof)


def write(trained: Trained, precision: Precision, draft: Draft, name: str) -> Model:
    """Write the checkpoint's files into a draft; returns the model, which has no calibration yet."""
    architecture, config = trained.architecture(precision), trained.checkpoint.config
    for file, data in trained.files(architecture):
        draft.write({file: data})
    manifest = manifest_of(
        architecture,
        draft,
        name,
        thresholds=config.thresholds,
        input=config.input,
    )
    return Model(Artifact(draft.path, manifest))


def certified(
    draft: Draft,
    exported: Model,
    plain: Model,
    held_out: CalibrationSamples,
    settings: ExportSettings,
    proof: dict[str, Any],
) -> Path:
    """Calibrate a model on held-out samples and publish it; returns its folder.

    draft: has the model's files. exported: the model, which runs the samples. plain: the model in fp32; the same object
    as `exported` if that is fp32. proof: results of other checks, for the manifest.
    Raises ExportError if an exit loses too much in int8.
    """
    tune, certify, is_crossed = held_out.tune, held_out.certify, held_out.is_crossed
    is_int8 = exported is not plain
    tuning = tune if isinstance(tune, CalibrationPart) else _tuning(exported, tune, is_int8)
    recorded = record(exported, certify, "the certifying samples", for_fit=True)
    if is_int8:
        # Only int8 changes answers: in fp32, full depth is the imported classifier itself.
        recorded = with_original(recorded, certify)
        expected = record(plain, certify, "fp32 for comparison", for_fit=True)
        if exported.manifest.is_spans:
            proof["int8"] = int8_spans(recorded, expected, settings.max_int8_loss)
        else:
            proof["int8"] = int8_loss(recorded, expected, settings.max_int8_loss, is_crossed)
    warn(weaknesses(tuning.samples.recorded if is_crossed else recorded, exported.manifest.labels))
    certifying = CalibrationPart.of(recorded, certify)
    calibrated = calibrate(
        tuning,
        None if is_crossed else certifying,
        settings.max_loss,
        self_labelled=held_out.self_labelled,
        may_pool=tuning is not tune,
        guard=guard_of(settings.flag, exported.manifest),
        exit_cost=exported.manifest.exit_cost,
    )
    final = Manifest.model_validate({**exported.manifest.model_dump(), **calibrated.fields()})
    if is_int8:
        whole = certifying.is_whole
        rule = ExitRule(final.defaults.tau, final.default_signal, kind=final.kind)
        proof["int8"]["same_exit"] = same_exit(recorded.rows(whole), expected.rows(whole), rule)
    return draft.publish(final.model_copy(update={"export": proof}))


def _tuning(exported: Model, tune: Sequence[Example], is_int8: bool) -> CalibrationPart:
    recorded = record(exported, tune, "the tuning samples", for_fit=True)
    return CalibrationPart.of(with_original(recorded, tune) if is_int8 else recorded, tune)


def same_exit(int8: Recorded, reference: Recorded, rule: ExitRule) -> float:
    """Share of samples with the same exit and answer in int8 and fp32; warns if it is below MIN_SAME_EXIT."""
    rows = np.arange(len(int8.labels))
    index, expected = (exit_index(rule.signal.scores(r), rule.tau) for r in (int8, reference))
    differs = int8.differs_from(reference.answers[rows, expected])[rows, index]
    share = float(((index == expected) & ~differs).mean())
    message = f"{100 * share:.1f}% of the certifying samples have the same exit and answer as in fp32"
    if share < MIN_SAME_EXIT:
        warn(
            [f"{message}: the reported numbers are those of int8; compare them with those of --quantize none"]
        )
    else:
        console.print(message)
    return share


def int8_spans(int8: Recorded, reference: Recorded, allowed: float) -> dict[str, Any]:
    """Print and return the share of texts whose spans at full depth differ between int8 and fp32.

    Warns if it is above `allowed`, a fraction: most such spans are those of which the classifier is unsure.
    """
    share = float((int8.answers[:, -1] != reference.answers[:, -1]).mean())
    message = f"int8 changes the spans of {100 * share:.1f}% of the certifying samples at full depth"
    if share > allowed:
        warn(
            [
                f"{message}; --quantize none serves the classifier in fp32, which takes about three times as long"
            ]
        )
    else:
        console.print(message)
    return {"unlike": share}


def int8_loss(int8: Recorded, reference: Recorded, allowed: float, is_fitted: bool = False) -> dict[str, Any]:
    """Print and return the accuracy of each exit in int8 and fp32, on the same samples.

    is_fitted: the exits were fitted to these samples, so that their accuracy is too high.

    Raises ExportError if the 95% interval of an exit's loss lies entirely above `allowed`, a fraction.
    """
    quantized, full = int8.correct.mean(0), reference.correct.mean(0)
    of = "of the samples that exits were fitted to" if is_fitted else "certifying samples"
    title = f"Correct answers by exit, int8 and fp32, % ({len(int8.labels)} {of})"
    table = empty_table(("layer", "fp32", "int8", "loss", "95% interval"), title)
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
