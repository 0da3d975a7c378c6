"""A report on a new classifier: accuracy and recall by label, at full depth and at its default τ."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape

from de3.data.tables import TextOrPair
from de3.exits import calibration
from de3.exits.calibration import Samples
from de3.exits.kinds import Classes
from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index
from de3.exits.signals import Entropy
from de3.model_store.printable import printable
from de3.progress import console, empty_table, warn
from de3.training.measures import measures_of

WEAKEST = 5  # number of labels, or pairs of labels, shown
MAX_FALL = 0.05  # largest fall in a label's recall that causes no warning
RESAMPLES = 200  # number of bootstrap resamples
SHOWN = 60  # maximum number of characters shown of a label or text
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Answers:
    """The labels of n texts, and a model's answers to them: labels and answers (n, K), groups (n,)."""

    labels: Bools
    answers: Bools
    groups: NDArray[np.int64]

    @property
    def right(self) -> Bools:
        """True where the answer has all labels of a text and no others, (n,)."""
        return np.asarray((self.answers == self.labels).all(-1))

    @property
    def recall(self) -> NDArray[np.float64]:
        """The share of each label's texts whose answer has the label, (K,); NaN for a label without texts."""
        with np.errstate(invalid="ignore"):
            return np.asarray((self.answers & self.labels).sum(0) / self.labels.sum(0))

    def accuracy(self) -> str:
        """The accuracy with its 95% interval, %."""
        size = calibration.effective_size(self.right, self.groups)
        share = float(self.right.mean())
        low, high = calibration.wilson(share * size, size)
        return f"{100 * share:.1f}% ({100 * low:.1f} … {100 * high:.1f})"

    def macro_f1(self) -> str:
        """Macro-F1 over the labels that occur, %, with its 95% interval from a bootstrap over groups."""
        rng, count = np.random.default_rng(0), int(self.groups.max()) + 1
        drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)[:, self.groups]
        weights = np.concatenate([np.ones((1, len(self.groups))), drawn])
        hits = weights @ (self.answers & self.labels)
        given = weights @ (self.answers.astype(np.int64) + self.labels)
        occurs = self.labels.any(0) | self.answers.any(0)
        f1 = (2 * hits / np.maximum(given, 1e-9))[:, occurs].mean(-1)
        low, high = np.quantile(f1[1:], (0.025, 0.975))
        return f"{100 * f1[0]:.1f} ({100 * low:.1f} … {100 * high:.1f})"


def report(
    samples: Samples,
    scores: NDArray[np.float64],
    tau: float,
    names: Sequence[str],
    texts: Sequence[TextOrPair],
    what: str,
) -> None:
    """Print the accuracy, macro-F1 and recall of a model on n texts.

    scores: those of the default signal, (n, exits). tau: the default τ. names: the labels. what: description of the
    texts.
    """
    recorded, groups = samples.recorded, np.unique(samples.groups, return_inverse=True)[1]
    rows, index = np.arange(len(scores)), exit_index(scores, tau)

    def of(answers: NDArray[np.generic]) -> Answers:
        return Answers(_one_hot(recorded.labels, len(names)), _one_hot(answers, len(names)), groups)

    full, early = of(recorded.answers[:, -1]), of(recorded.answers[rows, index])
    measure = measures_of(recorded.kind).right_if
    outcome = calibration.outcome(samples, scores, tau, Entropy())
    console.print(
        f"{len(texts)} {what}: at full depth, {measure} {full.accuracy()}, macro-F1 {full.macro_f1()}; at the default "
        f"τ = {tau:g}, {measure} {early.accuracy()}, macro-F1 {early.macro_f1()}, "
        f"{calibration.times(outcome.speedup)} in layers, "
        f"{100 * outcome.disagreement:.1f}% of the answers differ from full depth",
        soft_wrap=True,
        highlight=False,
    )
    _show_weakest(full, early, names)
    if isinstance(recorded.kind, Classes):
        _show_confused(recorded.labels, recorded.answers[:, -1], names, texts)
    if fallen := _fallen(full, early, names):
        warn(
            [
                f"at the default τ, {fallen}. The default τ limits the accuracy lost over all texts, not over those of "
                "one label; for a lower τ, set a smaller --max-loss"
            ]
        )


def compare(models: Sequence[tuple[Recorded, NDArray[np.int64], list[int]]], names: Sequence[str]) -> None:
    """Compare two models' answers to the same n texts, and print the result.

    models: the baseline, then the model; for each, its outputs, the index of each text's exit, (n,), and the indices of
    its labels that are compared. names: these labels.
    """
    before, after = (
        Answers(
            _one_hot(r.labels, count)[:, labels], _one_hot(r.answers[rows, index], count)[:, labels], rows
        )
        for r, index, labels in models
        for rows, count in [(np.arange(len(index)), r.logits.shape[-1])]
    )
    low, high = calibration.paired_interval(after.right, before.right)
    changed = (before.answers != after.answers).any(-1).mean()
    console.print(
        f"at the defaults, the baseline's accuracy is {before.accuracy()}, and this model's {after.accuracy()}: "
        f"{100 * (after.right.mean() - before.right.mean()):+.2f} points ({100 * low:+.2f} … {100 * high:+.2f}); "
        f"{100 * changed:.1f}% of the answers differ",
        soft_wrap=True,
        highlight=False,
    )
    if fallen := _fallen(before, after, names):
        warn([fallen])


def _fallen(before: Answers, after: Answers, names: Sequence[str]) -> str:
    """A message about labels whose recall falls by more than MAX_FALL; empty if there are none."""
    fall = before.recall - after.recall
    lost = fall * before.labels.sum(0)
    fallen = [
        k for k in np.argsort(-fall).tolist() if fall[k] > MAX_FALL and lost[k] > 1.5
    ]  # not a single text
    if not fallen:
        return ""
    shown = ", ".join(
        f"{names[k]!r} ({100 * before.recall[k]:.0f} → {100 * after.recall[k]:.0f}% of {before.labels[:, k].sum()})"
        for k in fallen[:WEAKEST]
    )
    return f"the recall of {len(fallen)} of {len(names)} labels falls by more than {100 * MAX_FALL:g} points: {shown}"


def _one_hot(answers: NDArray[np.generic], count: int) -> Bools:
    if answers.ndim == 2:
        return answers.astype(np.bool_)
    return np.asarray(answers[:, None] == np.arange(count))


def _show_weakest(full: Answers, early: Answers, names: Sequence[str]) -> None:
    recall, size = full.recall, full.labels.sum(0)
    order = [k for k in np.argsort(recall, kind="stable").tolist() if size[k]][:WEAKEST]
    title = "Labels with the lowest recall" if len(names) > WEAKEST else "Recall by label"
    table = empty_table(("", "texts", "full depth", "95% interval", "default τ"), title)
    for k in order:
        low, high = calibration.wilson(recall[k] * size[k], size[k])
        shares = f"{100 * recall[k]:.0f}%", f"{100 * low:.0f} … {100 * high:.0f}"
        table.add_row(_shown(names[k]), str(size[k]), *shares, f"{100 * early.recall[k]:.0f}%")
    console.print(table)


def _show_confused(
    labels: NDArray[np.int64],
    answers: NDArray[np.int64],
    names: Sequence[str],
    texts: Sequence[TextOrPair],
) -> None:
    """Print the pairs of labels that full depth confuses most often, with an example of each."""
    wrong = np.flatnonzero(labels != answers)
    pairs, first, counts = np.unique(
        np.stack([labels[wrong], answers[wrong]], 1), axis=0, return_index=True, return_counts=True
    )
    if not len(wrong):
        return
    table = empty_table(("", "", "texts", ""), "Labels that full depth confuses most often")
    table.columns[0].header, table.columns[1].header, table.columns[3].header = (
        "label",
        "answer",
        "for example",
    )
    for i in np.argsort(-counts, kind="stable")[:WEAKEST]:
        text = texts[wrong[first[i]]]
        label, answer = (_shown(names[k]) for k in pairs[i])
        table.add_row(
            label, answer, str(counts[i]), _shown(text if isinstance(text, str) else " / ".join(text))
        )
    console.print(table)


def _shown(text: str) -> str:
    """The beginning of a label or text, as shown in a table."""
    return escape(printable(text[:SHOWN] + ("…" if len(text) > SHOWN else "")))
