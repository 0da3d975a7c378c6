"""The answer to a classified text: its fields, from which /openapi.json is made, and their values."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import Annotated, Any, Literal, NotRequired, assert_never

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict  # pydantic accepts typing.TypedDict only since Python 3.12

from de3.exits.reading import ClassReading, LabelsReading, Reading, SpansReading, ValueReading
from de3.exits.rule import ExitReason
from de3.exits.signals import edr
from de3.exits.spans import Span, merged, redacted
from de3.runtime.classification import Classification
from de3.runtime.engine.head import Head
from de3.runtime.engine.job import Item
from de3.runtime.engine.outcome import Outcome
from de3.runtime.options import SignalName

DECIMALS = 6  # decimal places of the probabilities in an answer
MANY, TIE = 16, 1e-6  # see rounded
DISPLAY_LAM = 1.0  # λ of the reported EDR if the signal has no λ, or λ = 0


class Signals(TypedDict):
    """The signals at one exit."""

    score: Annotated[
        float | None,
        Field(description="the signal's value, compared with tau; null if it is undefined at this exit"),
    ]
    entropy: Annotated[float | None, Field(description="null for a regression model")]
    distance_ratio: Annotated[float | None, Field(description="null at an exit without prototypes")]
    edr: Annotated[float | None, Field(description="null at an exit without prototypes")]


class SpanOfText(TypedDict):
    """A labelled part of a text."""

    start: Annotated[
        int, Field(description="index of its first character in the text as sent, in code points")
    ]
    end: Annotated[int, Field(description="index of the character after it")]
    label: str
    score: Annotated[float, Field(description="mean probability of the label, over the tokens or words")]
    text: NotRequired[Annotated[str, Field(description="the characters; absent with redact")]]


class Answer(TypedDict):
    """The answer at one exit. A token classifier's has spans, and no label and probs."""

    label: NotRequired[str]
    spans: NotRequired[Annotated[list[SpanOfText], Field(description="for a token classifier, in order")]]
    value: NotRequired[Annotated[float, Field(description="the answer of a regression model")]]
    probs: NotRequired[
        Annotated[
            list[float] | None,
            Field(
                description="probabilities (with raw, logits) in the order of the model's labels; null for a "
                "regression model",
            ),
        ]
    ]


_Lambda = TypedDict(
    "_Lambda", {"lambda": Annotated[float | None, Field(description="null unless the signal is edr")]}
)


class Exit(Signals, _Lambda):
    """The exit of a text; for a text in several windows, the exit of the last window that ran."""

    layer: Annotated[int, Field(description="0 is the embeddings")]
    num_layers: int
    reason: ExitReason
    tau: float
    signal: Annotated[SignalName, Field(description="the signal compared with tau")]


class PassedExit(Signals, Answer):
    """An exit that a text passed; the last one is where it exited."""

    layer: int
    window: NotRequired[Annotated[int, Field(description="index of the window, if the text has several")]]


class Windows(TypedDict):
    """The windows of a text that is longer than the model's limit."""

    run: Annotated[int, Field(description="number of windows that ran before the answer was settled")]
    of: Annotated[int, Field(description="number of windows of the text")]
    layers: Annotated[list[int], Field(description="exit layer of each window that ran")]


class Flag(TypedDict):
    """Whether a text is flagged, the most probable label that it is flagged for, and the window that decides."""

    label: NotRequired[str]
    prob: NotRequired[
        Annotated[float, Field(description="probability of the labels; with several windows, the highest")]
    ]
    flagged: Annotated[
        bool | None,
        Field(
            description="the answer reaches the flag's threshold; null: what was read does not, but the latency budget "
            "or max_layer ended the run, or the text was truncated"
        ),
    ]
    window: NotRequired[
        Annotated[int, Field(description="index of the window with that probability, if there are several")]
    ]
    start: NotRequired[
        Annotated[
            int, Field(description="index of that window's first character (for a pair: in the longer text)")
        ]
    ]
    end: NotRequired[Annotated[int, Field(description="index of the character after that window")]]


class TopLabel(TypedDict):
    """One of the most probable labels."""

    label: str
    prob: float


class ClassifiedText(Answer):
    """The answer to one text."""

    index: int
    num_classes: int
    exit: Exit
    text: NotRequired[Annotated[str, Field(description="with redact: the text, with its spans replaced")]]
    labels: NotRequired[
        Annotated[list[str], Field(description="for a multi-label model: labels above their thresholds")]
    ]
    top: NotRequired[
        Annotated[list[TopLabel], Field(description="with top_k: the most probable labels, in order")]
    ]
    truncated: NotRequired[Annotated[bool, Field(description="the text was truncated")]]
    truncated_at: NotRequired[
        Annotated[
            int | None, Field(description="the number of a text's characters that were read; null for a pair")
        ]
    ]
    windows: NotRequired[
        Annotated[Windows, Field(description="with long: windows, if the text has several windows")]
    ]
    flag: NotRequired[Annotated[Flag, Field(description="with flag: the label to watch for")]]
    ood_score: NotRequired[
        Annotated[
            float | None,
            Field(
                description="with ood: near 1 for texts far from the calibration's distribution; null if no exit "
                "passed has prototypes",
            ),
        ]
    ]
    out_of_distribution: NotRequired[
        Annotated[
            bool, Field(description="the text was far from every prototype at an exit; needs --ood-policy")
        ]
    ]
    layers: NotRequired[Annotated[list[PassedExit], Field(description="with explain: every exit passed")]]


class Usage(TypedDict):
    """Number of tokens in all texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ModelResult(TypedDict):
    """The answer of a model: a row for each text, in order."""

    model: Annotated[str, Field(description="name:version")]
    data: list[ClassifiedText]
    certificate: NotRequired[
        Annotated[
            Mapping[str, Any],
            Field(
                description="with max_disagreement or max_missed: the certified bound on that rate; absent if a text "
                "has several windows",
            ),
        ]
    ]
    tau_choice: NotRequired[
        Annotated[
            dict[str, Any], Field(description="with explain: how tau was chosen, and the expected results")
        ]
    ]


class Envelope(TypedDict):
    """The part of a response that does not depend on the models."""

    id: str
    object: Literal["list"]
    created: int
    usage: Usage


class ClassifyResponse(Envelope, ModelResult):
    """The answer to a request."""


class ClassifySeveralResponse(Envelope):
    """The answer to a request with `models`."""

    results: Annotated[
        list[ModelResult], Field(description="the answer of each model, in the order of `models`")
    ]


def row_of(item: Item, head: Head, exact: bool = False) -> ClassifiedText:
    """A model's answer to a text of a finished job whose request is a Classification.

    exact: the probabilities and signals are not rounded.
    """
    part, outcome = head.part, head.outcome
    request, manifest = item.job.request, part.model.manifest
    assert isinstance(request, Classification)
    assert outcome is not None  # the job is finished
    reading, signal, labels = outcome.reading, outcome.rule.signal, manifest.labels
    lam = signal.lam or DISPLAY_LAM
    text = None if request.is_private else item.text.text
    row: ClassifiedText = {
        "index": item.index,
        **_answer(reading, labels, request.raw, exact, text),  # type: ignore[typeddict-item]  # as below
        "num_classes": len(labels),
        "exit": {
            "layer": outcome.layer,
            "num_layers": manifest.num_layers,
            "reason": outcome.reason,
            "tau": outcome.rule.tau,
            "signal": signal.name,
            "lambda": signal.lam,
            **_signals(reading, lam, exact),
        },
    }
    match reading:
        case SpansReading() if request.spans is not None and request.spans.templates is not None:
            row["text"] = redacted(item.text.text, reading.spans, request.spans.templates)
            row["spans"] = [span_row(span, text, exact) for span in merged(reading.spans)]
        case ValueReading():
            row["value"] = reading.value
        case LabelsReading():
            row["labels"] = [labels[k] for k in reading.labels]
    if request.top_k:
        of = outcome.text_reading.logits if request.raw else outcome.probs
        best = ranked(of, labels, request.top_k, request.raw or exact)
        row["top"] = [{"label": label, "prob": prob} for prob, label in best]
    if outcome.truncated:
        row["truncated"], row["truncated_at"] = True, outcome.end
    if outcome.windows:
        layers = [window.layer for window in outcome.windows]
        row["windows"] = {"run": len(layers), "of": outcome.num_windows, "layers": layers}
    if (flag := part.choice.rule.flag) is not None:
        is_raised = flag.is_raised(reading)
        row["flag"] = {
            "flagged": is_raised or (None if outcome.is_cut else False)
        }  # what is cut off is never safe
        if isinstance(reading, ClassReading | LabelsReading):
            prob = flag.prob(reading)
            label = labels[flag.label(reading)]
            row["flag"] |= {"label": label, "prob": prob if exact else round(prob, DECIMALS)}
        if (decisive := outcome.decisive) is not None:
            row["flag"] |= {"window": decisive.window, "start": decisive.start, "end": decisive.end}
    if request.ood:
        score = part.served.monitor.score(outcome.passed)
        row["ood_score"] = score if exact else significant(score)
    if outcome.is_far:
        row["out_of_distribution"] = True
    if request.explain:
        row["layers"] = _passed_exits(outcome, labels, lam, request.raw, exact, text)
    return row


def _passed_exits(
    outcome: Outcome, labels: list[str], lam: float, raw: bool, exact: bool, text: str | None
) -> list[PassedExit]:
    """A row for every exit passed, with the window's index if the text has several windows."""
    rows: list[PassedExit] = []
    windows = [window.passed for window in outcome.windows] or [outcome.passed]
    for number, passed in enumerate(windows):
        for reading in passed:
            row: PassedExit = {
                "layer": reading.layer,
                **_answer(reading, labels, raw, exact, text),
                **_signals(reading, lam, exact),  # type: ignore[typeddict-item]  # might have more keys
            }
            if isinstance(reading, ValueReading):
                row["value"] = reading.value
            if outcome.windows:
                row["window"] = number
            rows.append(row)
    return rows


def _answer(reading: Reading, labels: list[str], raw: bool, exact: bool, text: str | None) -> Answer:
    """The answer of an exit. text: for the spans of a token classifier; None to leave out their characters."""
    match reading:
        case ClassReading() | LabelsReading():
            shown = reading.probs if exact else rounded(reading.probs)
            return {"label": labels[reading.label], "probs": reading.logits if raw else shown}
        case ValueReading():
            return {"label": labels[0], "probs": None}
        case SpansReading():
            return {"spans": [span_row(span, text, exact) for span in reading.spans]}
        case _:
            assert_never(reading)


def span_row(span: Span, text: str | None, exact: bool = False) -> SpanOfText:
    """A span as it is sent. text: the text; None to leave out the span's characters."""
    score = span.score if exact else round(span.score, DECIMALS)
    row: SpanOfText = {"start": span.start, "end": span.end, "label": span.label, "score": score}
    if text is not None:
        row["text"] = text[span.start : span.end]
    return row


def _signals(reading: Reading, lam: float, exact: bool) -> Signals:
    number = _or_none if exact else significant
    return {
        "score": number(reading.score),
        "entropy": number(reading.entropy),
        "distance_ratio": number(reading.distance_ratio),
        "edr": number(edr(reading, lam)),
    }


def _or_none(number: float | None) -> float | None:
    """The number; None for NaN, such as the entropy of a regression model."""
    return None if number is None or isnan(number) else number


def rounded(probs: Sequence[float]) -> list[float]:
    """Probabilities as they are sent, with 6 decimals; decisions need the unrounded ones."""
    if len(probs) >= MANY:  # NumPy takes a sixth of the time, but is not exact near the middle of two results
        scaled = np.array(probs) * 10.0**DECIMALS
        if (np.abs(scaled % 1 - 0.5) > TIE).all():
            few: list[float] = (np.rint(scaled) / 10.0**DECIMALS).tolist()
            return few
    return [round(prob, DECIMALS) for prob in probs]


def significant(number: float | None) -> float | None:
    """A signal as it is sent, with 6 significant digits; None for NaN."""
    return None if number is None or isnan(number) else float(f"{number:.6g}")


def ranked(
    scores: Iterable[float], labels: Iterable[str], top: int | None, exact: bool
) -> list[tuple[float, str]]:
    """The labels with their scores, the highest first, at most `top` of them.

    exact: the scores, which may be logits, are not rounded.
    """
    best = sorted(zip(scores, labels, strict=True), key=lambda pair: -pair[0])[:top]
    return best if exact else [(round(score, DECIMALS), label) for score, label in best]
