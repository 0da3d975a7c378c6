"""Spans: the labelled parts of a text that a token classifier finds, and how sure it is of them.

Tokens are grouped as transformers' token-classification pipeline groups them. The names of labels may begin with B-
(the first token of a span) or I- (a further one); O is a token outside of all spans.

- none: each token is a span.
- simple: neighbouring tokens of one label are a span; a token whose label begins with B- begins a new one.
- first, average, max: the tokens of a word have one label: that of its first token, that of the mean of their
  probabilities, or that of the token with the highest probability. The words are then grouped like tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Aggregation = Literal["none", "simple", "first", "average", "max"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
OUTSIDE = "O"
MAX_TOKEN_LABELS = 1000  # labels of a token classifier: each token of a text has a logit for each
Array = NDArray[np.float32]


class Span(NamedTuple):
    """The characters [start, end) of a text, in Unicode code points, and their label and its probability."""

    start: int
    end: int
    label: str
    score: float


class Unsure(NamedTuple):
    """How unsure an exit is of a text's tokens; p is a token's highest probability.

    Attributes:
        largest, total: the largest and the sum of 1 − p, over the tokens that can change a span.
        tokens: number of these tokens.
        found: the most probable label of one of them is not that of tokens outside of spans.
    """

    largest: float
    total: float
    tokens: int
    found: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of a text are.

    Attributes:
        offsets: characters [start, end) of each token, (T, 2); (0, 0) for special tokens.
        is_special: true for the special tokens around the text, (T,).
        is_subword: true for the tokens of a word but the first, (T,).
    """

    offsets: NDArray[np.int32]
    is_special: NDArray[np.bool_]
    is_subword: NDArray[np.bool_]

    def part(self, rows: NDArray[np.intp]) -> "Layout":
        """The layout of some tokens."""
        return Layout(self.offsets[rows], self.is_special[rows], self.is_subword[rows])


@dataclass(frozen=True)
class SpanRule:
    """How spans are made from the labels of tokens, and which of them are the answer.

    Attributes:
        labels: names of the labels, in the order of the logits.
        aggregation: see the module.
        kept: labels of spans to return; None: all but those ignored.
        ignored: labels of spans that are never returned.
        min_scores: lowest score of the spans to return, by label; the label "" stands for all others.
        merges: spans are merged before their scores count (see `merged`), so that no part of one is left out.
    """

    labels: tuple[str, ...]
    aggregation: Aggregation = "simple"
    kept: frozenset[str] | None = None
    ignored: frozenset[str] = frozenset({OUTSIDE})
    min_scores: Mapping[str, float] = field(default_factory=dict)
    merges: bool = False

    @cached_property
    def names(self) -> list[str]:
        """The labels that spans can have, in order."""
        return list(dict.fromkeys(self._name(k) for k in range(len(self.labels)) if not self._is_ignored(k)))

    @cached_property
    def outside(self) -> int:
        """Index of the label of tokens outside of spans; −1: none."""
        return self.labels.index(OUTSIDE) if OUTSIDE in self.labels else -1

    @cached_property
    def _tags(self) -> list[str]:
        """The name of each label without B- or I-, by which tokens are grouped."""
        return [name[2:] if name.startswith(("B-", "I-")) else name for name in self.labels]

    @cached_property
    def _groups(self) -> list[str]:
        """The name of each label in spans: without the part before the first hyphen, such as E- in other schemes."""
        return [name.split("-", 1)[-1] for name in self.labels]

    @cached_property
    def _begins(self) -> list[bool]:
        return [name.startswith("B-") for name in self.labels]

    @cached_property
    def _plain(self) -> NDArray[np.bool_]:
        """True for the labels that cannot be in the answer, (K,)."""
        return np.array([self._is_ignored(k) for k in range(len(self.labels))])

    def _name(self, label: int) -> str:
        return self.labels[label] if self.aggregation == "none" else self._groups[label]

    def _is_ignored(self, label: int) -> bool:
        return self._name(label) in self.ignored

    def _chosen(self, spans: list[Span]) -> list[Span]:
        """The spans to return; merged first if `merges` is set."""
        asked = [
            s for s in spans if s.label not in self.ignored and (self.kept is None or s.label in self.kept)
        ]
        least, others = self.min_scores, self.min_scores.get("", 0.0)
        return [s for s in (merged(asked) if self.merges else asked) if s.score >= least.get(s.label, others)]

    def counted(self, layout: Layout) -> NDArray[np.bool_]:
        """True for the tokens that can change a span, (T,)."""
        can = ~layout.is_special
        return can & ~layout.is_subword if self.aggregation == "first" else can

    def spans(self, logits: Array, layout: Layout) -> list[Span]:
        """The spans of a text, in order. logits: of its tokens, (T, K)."""
        rows = np.flatnonzero(~layout.is_special)
        best = logits.argmax(-1)
        # Most texts. A mean of probabilities may have a label that no token has, if several labels are ignored.
        is_sure = self.aggregation != "average" or self._plain.sum() == 1
        if not len(rows) or (is_sure and self._plain[best[rows]].all()):
            return []
        if self.aggregation in ("none", "simple"):
            found = best[rows].tolist()
            scores = probabilities(logits[rows])[np.arange(len(rows)), found].tolist()
            bounds = layout.offsets[rows].tolist()
        else:
            found, scores, bounds = self._words(probabilities(logits[rows]), layout, rows)
        if self.aggregation == "none":
            spans = [
                Span(start, end, self.labels[k], score)
                for k, score, (start, end) in zip(found, scores, bounds, strict=True)
            ]
        else:
            spans = self._grouped(found, scores, bounds)
        return self._chosen(spans)

    def _words(
        self, probs: Array, layout: Layout, rows: NDArray[np.intp]
    ) -> tuple[list[int], list[float], list[list[int]]]:
        """The label and score of each word, and its characters. rows: the tokens in `probs`."""
        starts = np.flatnonzero(~layout.is_subword[rows]).tolist()
        starts = starts if starts[:1] == [0] else [0, *starts]
        found, scores, bounds = [], [], []
        offsets = layout.offsets[rows].tolist()
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            part = probs[start:end]
            if self.aggregation == "first":
                word = part[0]
            elif self.aggregation == "max":
                word = part[int(part.max(-1).argmax())]
            else:
                word = part.mean(0)
            label = int(word.argmax())
            found.append(label)
            scores.append(float(word[label]))
            bounds.append([offsets[start][0], offsets[end - 1][1]])
        return found, scores, bounds

    def _grouped(
        self, found: Sequence[int], scores: Sequence[float], bounds: Sequence[Sequence[int]]
    ) -> list[Span]:
        """Neighbours of one label as spans, whose score is the mean."""
        spans, first = list[Span](), 0
        tags = [self._tags[label] for label in found]
        for i in range(1, len(found) + 1):
            if i < len(found) and tags[i] == tags[i - 1] and not self._begins[found[i]]:
                continue
            mean = sum(scores[first:i]) / (i - first)
            spans.append(Span(bounds[first][0], bounds[i - 1][1], self._groups[found[first]], mean))
            first = i
        return spans


class TokenReading:
    """The token labels of an exit for a text, from which its spans are made when they are needed.

    Attributes:
        logits: (T, K); empty after finish().
        layout: of the tokens.
        rule: how the spans are made.
    """

    __slots__ = ("_spans", "layout", "logits", "rule")

    def __init__(self, logits: Array, layout: Layout, rule: SpanRule) -> None:
        self.logits, self.layout, self.rule = logits, layout, rule
        self._spans: list[Span] | None = None

    @property
    def spans(self) -> list[Span]:
        """The spans, in order."""
        if self._spans is None:
            self._spans = self.rule.spans(self.logits, self.layout)
        return self._spans

    def finish(self) -> None:
        """Make the spans, and release the logits, which take more memory than anything else of a text."""
        _ = self.spans
        self.logits = np.empty((0, len(self.rule.labels)), np.float32)


def probabilities(logits: Array) -> Array:
    """Class probabilities, (T, K) float32, of logits (T, K)."""
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(odds / odds.sum(-1, keepdims=True))


def unsure_of(logits: Array, counted: NDArray[np.bool_], outside: int) -> Unsure:
    """How unsure an exit is of the counted tokens, (T,), of a text, by its logits (T, K). outside: see SpanRule."""
    rows = logits[counted]
    if not len(rows):
        return Unsure(0.0, 0.0, 0, False)
    best = rows.argmax(-1)
    odds = small_exp(rows - rows[np.arange(len(rows)), best][:, None])
    odds[np.arange(len(rows)), best] = 0
    # In the order of the labels, then of the tokens, as in C; sum() might add in another order.
    others = np.add.accumulate(odds, axis=-1)[:, -1]
    unsure = (others / (np.float32(1) + others)).astype(np.float64)
    return Unsure(
        float(unsure.max()),
        float(np.add.accumulate(unsure)[-1]),
        len(rows),
        bool((best != outside).any()),
    )


def small_exp(x: Array) -> Array:
    """e^x for x ≤ 0 in float32, with the operations of `native/rule.c: small_exp`, and so with the same bits."""
    c = np.float32
    x = np.maximum(x, c(-80))
    whole = (x * c(1.44269504) + c(12582912)) - c(12582912)
    r = (x - whole * c(0.693359375)) + whole * c(2.12194440e-4)
    y = c(1.98756915e-4) * r + c(1.39819995e-3)
    for factor in (8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 0.5):
        y = y * r + c(factor)
    return np.asarray(np.ldexp(((y * r) * r + r) + c(1), whole.astype(np.int32)))


def merged(spans: Sequence[Span]) -> list[Span]:
    """The spans in order, with those merged that overlap, or that are neighbours of one label without a gap.

    A merged span has the label and the score of its longest part.
    """
    found: list[Span] = []
    for span in sorted(spans, key=lambda one: (one.start, one.end)):
        last = found[-1] if found else None
        if last is not None and (
            span.start < last.end or (span.start == last.end and span.label == last.label)
        ):
            longest = max(last, span, key=lambda one: one.end - one.start)
            found[-1] = longest._replace(start=last.start, end=max(last.end, span.end))
        else:
            found.append(span)
    return found


def redacted(text: str, spans: Sequence[Span], templates: Mapping[str, str] | None = None) -> str:
    """The text with each span replaced by [LABEL], or by its label's template.

    Spans that `merged` merges are replaced together.
    """
    parts, at = [], 0
    for span in merged(spans):
        parts += [text[at : span.start], (templates or {}).get(span.label, f"[{span.label}]")]
        at = span.end
    return "".join([*parts, text[at:]])
