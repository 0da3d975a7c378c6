"""LiteLLM's generic guardrail API, which blocks texts or lets them pass: POST /beta/litellm_basic_guardrail_api."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BeforeValidator, Field

from de3.model_store.manifest import Manifest
from de3.server.engine.job import Job
from de3.server.engine.request import Text
from de3.server.errors import RequestError
from de3.server.fields import JsonObject, check_count, check_fields, load_json
from de3.server.http.detectors import Detection
from de3.server.http.protocol import Call, Protocol
from de3.server.options import OptionFields

EXAMPLE = '{"texts": ["a text"]}'
PARAMETERS = "additional_provider_specific_params"


@dataclass(slots=True, eq=False)
class GuardrailRequest(Detection):
    """A request in this protocol.

    Attributes:
        label: the label to block; None: the labels that detectors would detect.
    """

    input_name: ClassVar[str] = "texts"
    hint: ClassVar[str] = "give label, the label to block"

    label: str | None = None

    def check(self, manifest: Manifest) -> None:
        """Set the windows, the safe labels and the flag for a model.

        Raises RequestError for a regression model, and for a label that the model does not have.
        """
        if self.label is not None:
            if self.fits(manifest) and self.label not in manifest.labels:
                labels = ", ".join(manifest.labels[:20])
                raise RequestError(
                    f"{PARAMETERS}: label: {self.label[:100]!r} is not a label of {manifest.full_name}: {labels}",
                    PARAMETERS,
                )
            self.safe = frozenset(manifest.labels) - {self.label}
        Detection.check(self, manifest)  # super() does not work in a dataclass with slots


def _texts(value: Any) -> list[Text]:
    """The texts that are not blank: a message may be empty, or have images or tool calls only."""
    if not isinstance(value, list | None):
        raise ValueError("must be a list of texts, or null")
    if wrong := [i for i, text in enumerate(value or []) if not isinstance(text, str)]:
        raise ValueError(f"[{wrong[0]}]: must be a text")
    return [Text(text) for text in value or [] if text.strip()]


class GuardrailParameters(OptionFields):
    """The parameters of the guardrail in LiteLLM's configuration; the exit options are also accepted."""

    model: str | None = None
    label: str | None = None
    threshold: float | None = Field(None, ge=0, le=1)


class GuardrailFields(JsonObject):
    """The fields of a body that are read. Later versions of LiteLLM may send others."""

    texts: Annotated[list[Text], BeforeValidator(_texts)]
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
        fields.texts,
        parameters.options,
        parameters.model,
        threshold=parameters.threshold,
        label=parameters.label,
    )


def serialize(_: str, job: Job) -> bytes:
    """{"action": "NONE"}, or {"action": "BLOCKED", "blocked_reason"} if a label is detected in any of the texts."""
    assert isinstance(job.request, GuardrailRequest)
    manifest = job.model.manifest
    found = [one for outcome in job.outcomes() for one in job.request.found(outcome, manifest.labels)]
    if not found:
        return orjson.dumps({"action": "NONE"})
    label, prob = max(found, key=lambda one: one[1])
    reason = f"{label} with probability {prob:.2f}, by {manifest.full_name}"
    return orjson.dumps({"action": "BLOCKED", "blocked_reason": reason})


GUARDRAIL = Protocol(parse, serialize, example=EXAMPLE)
