"""LiteLLM's generic guardrail API: POST /beta/litellm_basic_guardrail_api.

A classifier blocks texts or lets them pass. A token classifier redacts the spans that it finds or, with the policy
`block`, blocks texts that have any.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import BeforeValidator, Field

from de3.exits.spans import redacted
from de3.model_store.manifest import Manifest
from de3.model_store.part import MAX_LABELS
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Text
from de3.runtime.fields import JsonObject, check_count, check_fields, is_blank, load_json
from de3.runtime.flags import Wanted
from de3.runtime.options import OptionFields
from de3.server.http.detectors import Detection
from de3.server.http.protocol import Call, Protocol

EXAMPLE = '{"texts": ["a text"]}'
PARAMETERS = "additional_provider_specific_params"


@dataclass(frozen=True, slots=True, eq=False)
class GuardrailRequest(Detection):
    """A request in this protocol.

    Attributes:
        label: the label to block; None: the labels that detectors would detect.
        policy: what a token classifier does with texts that have spans; None: redact them.
        given: the texts as sent, including blank ones.
    """

    input_name: ClassVar[str] = "texts"
    params: ClassVar[str] = f"{PARAMETERS}: "
    hint: ClassVar[str] = "give label, the label to block"

    label: str | None = None
    policy: Literal["redact", "block"] | None = None
    given: Sequence[str] = ()

    def fits(self, manifest: Manifest) -> bool:
        """True for a token classifier, or a model with classes or labels, if it has the given parameters."""
        if manifest.is_spans:
            return self.label is None
        return self.policy != "redact" and Detection.fits(self, manifest)

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """With the safe labels and the flag, or the options for spans.

        Raises RequestError for a regression model, and for a parameter or label that the model does not have.
        """
        name, safe, templates = manifest.full_name, self.safe, self.templates
        if manifest.is_spans:
            if self.label is not None:
                raise self.refusal(
                    "label", f"{name} is a token classifier: give labels, those of the spans to find"
                )
            templates = None if self.policy == "block" else {}
        elif self.policy == "redact":
            raise self.refusal("policy", f"{name} is not a token classifier: it can only block texts")
        elif self.label is not None and manifest.has_classes:
            if self.label not in manifest.labels:
                labels = ", ".join(manifest.labels[:20])
                raise self.refusal("label", f"{self.label[:100]!r} is not a label of {name}: {labels}")
            safe = frozenset(manifest.labels) - {self.label}
        # super() does not work in a dataclass with slots.
        return Detection.for_model(replace(self, safe=safe, templates=templates), manifest, flag)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list | None):
        raise ValueError("must be a list of texts, or null")
    if wrong := [i for i, text in enumerate(value or []) if not isinstance(text, str)]:
        raise ValueError(f"[{wrong[0]}]: must be a text")
    return value or []


class GuardrailParameters(OptionFields):
    """The parameters of the guardrail in LiteLLM's configuration; the exit options are also accepted."""

    model: str | None = None
    label: str | None = None
    labels: list[str] | None = Field(None, min_length=1, max_length=MAX_LABELS)
    policy: Literal["redact", "block"] | None = None
    threshold: float | None = Field(None, ge=0, le=1)


class GuardrailFields(JsonObject):
    """The fields of a body that are read. Later versions of LiteLLM may send others."""

    texts: Annotated[list[str], BeforeValidator(_texts)]
    additional_provider_specific_params: dict[str, Any] | None


def parse(call: Call) -> GuardrailRequest:
    """The request in a call; raises RequestError if it is invalid."""
    value = load_json(call.body)
    check_count(value, "texts", call.max_texts)
    if isinstance(value, dict):
        value = {name: value.get(name) for name in ("texts", PARAMETERS)}
    fields = check_fields(GuardrailFields, value, EXAMPLE)
    given = fields.additional_provider_specific_params or {}
    parameters = check_fields(GuardrailParameters, given, '{"threshold": 0.5}')
    return GuardrailRequest(
        # A message may be empty, or have images or tool calls only.
        [Text(text) for text in fields.texts if not is_blank(text)],
        parameters.options,
        parameters.model,
        threshold=parameters.threshold,
        labels=parameters.labels,
        label=parameters.label,
        policy=parameters.policy,
        given=fields.texts,
    )


def serialize(_: str, job: Job) -> bytes:
    """{"action": "NONE"} or, if anything is detected in any of the texts, {"action": "BLOCKED", "blocked_reason"}.

    Or {"action": "GUARDRAIL_INTERVENED", "texts"}, with all texts, those with spans redacted.
    """
    assert isinstance(job.request, GuardrailRequest)
    request, manifest = job.request, job.first.model.manifest
    found = [one for outcome in job.first.outcomes() for one in request.found(outcome, manifest.labels)]
    if not found:
        return orjson.dumps({"action": "NONE"})
    if request.is_private:
        return orjson.dumps({"action": "GUARDRAIL_INTERVENED", "texts": _redacted(request.given, job)})
    label, prob = max(found, key=lambda one: one[1])
    reason = f"{label} with probability {prob:.2f}, by {manifest.full_name}"
    return orjson.dumps({"action": "BLOCKED", "blocked_reason": reason})


def _redacted(texts: Sequence[str], job: Job) -> list[str]:
    outcomes = iter(job.first.outcomes())
    return [redacted(text, next(outcomes).reading.spans) if not is_blank(text) else text for text in texts]


GUARDRAIL = Protocol(parse, serialize, example=EXAMPLE)
