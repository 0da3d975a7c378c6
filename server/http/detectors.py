"""The protocol of FMS Guardrails' detectors: POST /api/v1/text/contents.

A detection is a label of a text, or a span of a token classifier. `detector_params` may have `threshold` and
`safe_labels` or, for a token classifier, `labels`: those of the spans to detect.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import orjson
from pydantic import BeforeValidator, Field

from de3.exits.reading import ClassReading, LabelsReading, Reading, SpansReading, ValueReading
from de3.model_store.manifest import Manifest
from de3.model_store.part import MAX_LABELS
from de3.runtime.answer import DECIMALS
from de3.runtime.engine.job import Job
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.request import Request, SpanOptions, Text
from de3.runtime.errors import RequestError
from de3.runtime.fields import JsonObject, check_count, check_fields, load_json, one_or_more, plain_text
from de3.runtime.flags import Wanted
from de3.runtime.options import Long, OptionFields
from de3.server.http.errors import STATUSES
from de3.server.http.protocol import Call, Protocol

EXAMPLE = '{"contents": ["a text"]}'
THRESHOLD = 0.5
# Names of labels that mean that nothing was found.
SAFE = re.compile(
    r"(safe|benign|normal|legit|legitimate|ham|clean|harmless|acceptable|inoffensive|none|ok(ay)?|no"
    r"|sfw|compliant|(label|class)?[\W_]?0"
    r"|(not?|non)[\W_]?(toxic|hate|hateful|spam|offensive|harmful|jailbreak|injection|malicious|nsfw|abusive|unsafe).*)",
    re.IGNORECASE,
)
MAX_CHARS = 2**24  # characters of texts in a response; each detection repeats its text


def safe_labels(manifest: Manifest) -> frozenset[str] | None:
    """Labels that mean that nothing was found, by their names: none in a multi-label model; None: not known."""
    if manifest.thresholds is not None:
        return frozenset()
    named = frozenset(filter(SAFE.fullmatch, manifest.labels))
    return named if 0 < len(named) < len(manifest.labels) else None


@dataclass(frozen=True, slots=True, eq=False)
class Detection(Request):
    """A request for the labels of texts that are not safe, or for the spans of a token classifier.

    Long texts are split into windows, because a prompt injection may be anywhere in a text, and refused if they do not
    fit into them: no part may go unread.

    Attributes:
        threshold: lowest probability at which a label is a detection, or all labels that are not safe together if
            labels are mutually exclusive; None: 0.5, or a multi-label model's own thresholds.
        safe: names of labels that are never detections; None: see safe_labels.
        labels: labels of the spans to detect; None: all.
        templates: as in SpanOptions, for spans.
    """

    needs_a_set_default: ClassVar[bool] = True
    takes_spans: ClassVar[bool] = True
    usual_long: ClassVar[Long] = "windows"
    params: ClassVar[str] = (
        ""  # beginning of messages about a parameter: the field of the body that has it, if any
    )
    hint: ClassVar[str] = "name the safe ones in safe_labels"

    threshold: float | None = None
    safe: frozenset[str] | None = None
    labels: Sequence[str] | None = None
    templates: Mapping[str, str] | None = None

    def check(self, outcome: Outcome) -> None:
        """Nothing here: what was found counts, so `found` checks a text in which nothing was."""

    def fits(self, manifest: Manifest) -> bool:
        """True for a token classifier, or a model with classes or labels, if it has the given parameters."""
        if manifest.is_spans:
            return self.safe is None
        return manifest.has_classes and self.labels is None

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """With the safe labels and the flag, or the options for spans.

        The flag of the settings, if there is one, is the default. Raises RequestError for a regression model, for a
        parameter or label that the model does not have, and if it is not known which labels are safe.
        """
        name, labels = manifest.full_name, manifest.labels
        if manifest.is_spans:
            return replace(self, spans=self._spans_of(name))
        if self.labels is not None:
            raise self.refusal("labels", f"{name} is not a token classifier: it finds no spans")
        if manifest.tolerance is not None:
            raise RequestError(f"model: {name} is a regression model: it detects no labels", "model")
        safe, threshold = self.safe, self.threshold
        if safe is None and flag is not None:
            safe, threshold = (
                frozenset(labels) - {*flag.labels},
                flag.threshold if threshold is None else threshold,
            )
        safe = safe_labels(manifest) if safe is None else safe
        if safe is None:
            shown = ", ".join(labels[:20])
            raise RequestError(
                f"model: the names of {name}'s labels do not show which mean safe: {shown}; {self.hint}",
                "model",
            )
        if unknown := sorted(safe.difference(labels)):
            raise self.refusal("safe_labels", f"{unknown[0][:100]!r} is not a label of {name}")
        unsafe = [label for label in labels if label not in safe]
        # If all classes are unsafe, every text is flagged, and in windows the first would be the last to run.
        watches = unsafe and (safe or len(unsafe) == 1 or manifest.thresholds is not None)
        wanted = Wanted(unsafe, threshold) if watches else None
        return replace(self, safe=safe, threshold=threshold, flag=wanted)

    def _spans_of(self, name: str) -> SpanOptions:
        if self.safe is not None:
            what = (
                f"{name} is a token classifier: all its spans are detections, or those with the given labels"
            )
            raise self.refusal("safe_labels", what)
        names = (f"{self.params}labels", "", f"{self.params}threshold", "")
        return SpanOptions(
            kept=self.labels, min_score=self.threshold or 0.0, templates=self.templates, names=names
        )

    def refusal(self, field: str, problem: str) -> RequestError:
        """The error for a field of the parameters."""
        return RequestError(f"{self.params}{field}: {problem}", self.params.partition(":")[0] or field)

    def found(self, outcome: Outcome, labels: list[str]) -> list[tuple[str, float]]:
        """The detected labels of a text, with their probabilities. labels: the model's.

        If mutually exclusive labels reach the threshold only together, the most probable one has their probability.
        """
        found = self._found(outcome.reading, labels)
        if not found:
            outcome.check_all_ran()
        return found

    def _found(self, reading: Reading, labels: list[str]) -> list[tuple[str, float]]:
        if isinstance(reading, SpansReading):
            return [(span.label, span.score) for span in reading.spans]
        assert not isinstance(reading, ValueReading)  # see for_model
        unsafe = [k for k, label in enumerate(labels) if label not in (self.safe or ())]
        if self.threshold is None and isinstance(reading, LabelsReading):
            return [(labels[k], reading.probs[k]) for k in unsafe if k in reading.labels]
        least = THRESHOLD if self.threshold is None else self.threshold
        found = [(labels[k], reading.probs[k]) for k in unsafe if reading.probs[k] >= least]
        together = sum(reading.probs[k] for k in unsafe)
        if not found and self.safe and isinstance(reading, ClassReading) and together >= least:
            found = [(labels[max(unsafe, key=reading.probs.__getitem__)], together)]
        return found


@dataclass(frozen=True, slots=True, eq=False)
class ContentsRequest(Detection):
    """A request in this protocol."""

    input_name: ClassVar[str] = "contents"
    params: ClassVar[str] = "detector_params: "

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """As Detection.for_model; also raises RequestError if the response could be too long."""
        request = Detection.for_model(self, manifest, flag)  # super() does not work in a dataclass with slots
        if manifest.is_spans:  # a span repeats its own characters only
            return request
        most, params = len(manifest.labels), "detector_params"
        if manifest.thresholds is None:  # probabilities add up to 1
            most = min(
                most, int(1 / max(THRESHOLD if request.threshold is None else request.threshold, 1e-9))
            )
        chars = sum(text.chars for text in self.texts)
        if most * chars > MAX_CHARS:
            raise RequestError(
                f"{params}: threshold: {most} labels of texts with {chars} characters could be detections, and each "
                "repeats its text; give a higher threshold or shorter texts",
                params,
            )
        return request


def _contents(value: Any) -> list[Text]:
    if not isinstance(value, list):
        raise ValueError("must be a list of texts")
    return one_or_more(plain_text, value)


class Parameters(OptionFields):
    """`detector_params`; the exit options and `model` are extensions."""

    threshold: float | None = Field(None, ge=0, le=1)
    safe_labels: list[str] | None = Field(None, max_length=10_000)
    labels: list[str] | None = Field(None, min_length=1, max_length=MAX_LABELS)
    model: str | None = None


class ContentsFields(JsonObject):
    """The body of a request."""

    contents: Annotated[list[Text], BeforeValidator(_contents)]
    detector_params: dict[str, Any] | None = None


def parse(call: Call) -> ContentsRequest:
    """The request in a call; raises RequestError if it is invalid. The header `detector-id` may name the model."""
    value = load_json(call.body)
    check_count(value, "contents", call.max_texts)
    fields = check_fields(ContentsFields, value, EXAMPLE)
    parameters = check_fields(Parameters, fields.detector_params or {}, '{"threshold": 0.5}')
    model = dict(call.headers).get(b"detector-id", b"").decode("latin-1")
    if model and parameters.model not in (None, "", model):
        raise RequestError(
            f"detector_params: model: {parameters.model[:100]!r} is not the model in the header detector-id, "
            f"{model[:100]!r}; give only one of them",
            "detector_params",
        )
    return ContentsRequest(
        fields.contents,
        parameters.options,
        parameters.model or model or None,
        threshold=parameters.threshold,
        safe=None if parameters.safe_labels is None else frozenset(parameters.safe_labels),
        labels=parameters.labels,
    )


def serialize(_: str, job: Job) -> bytes:
    """The detections of each text: labels, other than safe ones, whose probability reaches the threshold, or spans."""
    assert isinstance(job.request, ContentsRequest)
    request, labels = job.request, job.first.model.manifest.labels
    both = zip(request.texts, job.first.outcomes(), strict=True)
    return orjson.dumps([_detections(text.text, outcome, labels, request) for text, outcome in both])


def _detections(
    text: str, outcome: Outcome, labels: list[str], request: ContentsRequest
) -> list[dict[str, Any]]:
    if isinstance(outcome.reading, SpansReading):
        outcome.check_all_ran()
        return [
            {
                "start": span.start,
                "end": span.end,
                "text": text[span.start : span.end],
                "detection": span.label,
                "detection_type": span.label,
                "score": round(span.score, DECIMALS),
            }
            for span in outcome.reading.spans
        ]
    start, end = (
        (0, len(text)) if outcome.decisive is None else (outcome.decisive.start, outcome.decisive.end)
    )
    row: dict[str, Any] = {"start": start, "end": end, "text": text[start:end]}
    more = {"metadata": {"truncated": True, "truncated_at": outcome.end}} if outcome.truncated else {}
    return [
        row | {"detection": label, "detection_type": label, "score": round(prob, DECIMALS)} | more
        for label, prob in request.found(outcome, labels)
    ]


def error(problem: RequestError) -> bytes:
    """The body of an error, {"code", "message"}."""
    return orjson.dumps({"code": STATUSES[problem.cause], "message": problem.message})


CONTENTS = Protocol(parse, serialize, error, example=EXAMPLE)
