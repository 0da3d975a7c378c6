"""The protocol of the GLiNER server of NeMo Guardrails' `gliner` rail: POST /v1/extract.

A token classifier answers it. `labels` are those of the spans to return, in any case; the answer has them as they were
sent. Spans that overlap are merged, and, unlike GLiNER's server, repeated ones are all returned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self

import orjson
from pydantic import BeforeValidator, Field

from de3.exits.kinds import Spans
from de3.exits.spans import merged
from de3.model_store.manifest import Manifest
from de3.model_store.part import MAX_LABELS
from de3.runtime.answer import DECIMALS
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Request, SpanOptions, Text
from de3.runtime.errors import RequestError
from de3.runtime.fields import check_fields, load_json
from de3.runtime.flags import Wanted
from de3.runtime.options import Long, OptionFields
from de3.server.http.protocol import Call, Protocol

EXAMPLE = '{"text": "a text"}'
THRESHOLD = 0.5  # as GLiNER's server


@dataclass(frozen=True, slots=True, eq=False)
class ExtractRequest(Request):
    """A request in this protocol.

    Attributes:
        asked: labels of the spans to return; None: all.
        threshold: lowest score of these spans.
        names: the names to return for the model's labels that are asked for by another name.
    """

    input_name: ClassVar[str] = "text"
    needs_a_set_default: ClassVar[bool] = True
    takes_spans: ClassVar[bool] = True
    usual_long: ClassVar[Long] = "windows"

    asked: Sequence[str] | None = None
    threshold: float = THRESHOLD
    names: Mapping[str, str] = field(default_factory=dict)

    def fits(self, manifest: Manifest) -> bool:
        """True for a token classifier."""
        return manifest.is_spans

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """With options for spans; raises RequestError for any other model than a token classifier.

        A label that the model does not have is refused when its rule is made, as the rail would miss it.
        """
        if not isinstance(kind := manifest.kind, Spans):
            raise RequestError(
                f"model: {manifest.full_name} is not a token classifier: it finds no entities", "model"
            )
        kept, asked = self.asked, dict[str, str]()
        if kept is not None:
            labels = {name.casefold(): name for name in kind.rule.names}
            kept = [labels.get(name.casefold(), name) for name in kept]
            asked = dict(zip(kept, self.asked or (), strict=True))
        names = "labels", "", "threshold", ""
        spans = SpanOptions(kept=kept, min_score=self.threshold, merges=True, names=names)
        return replace(self, spans=spans, names=asked)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


class ExtractFields(OptionFields):
    """The body of a request; `model` and the exit options are extensions."""

    text: Annotated[str, BeforeValidator(_text)]
    labels: list[str] | None = Field(None, max_length=MAX_LABELS, description="default: all of the model's")
    threshold: float | None = Field(None, ge=0, le=1, description="lowest score; default: 0.5")
    model: str | None = Field(None, description="name, or name:version; default: the server's")
    chunk_length: Any = Field(None, description="accepted and ignored: long texts are read in windows")
    overlap: Any = Field(None, description="accepted and ignored")
    flat_ner: Any = Field(None, description="accepted and ignored")


def parse(call: Call) -> ExtractRequest:
    """The request in a call; raises RequestError if it is invalid."""
    fields = check_fields(ExtractFields, load_json(call.body), EXAMPLE)
    return ExtractRequest(
        [Text(fields.text)],
        fields.options,
        fields.model,
        asked=fields.labels or None,  # an empty list must not mean that nothing is found
        threshold=THRESHOLD if fields.threshold is None else fields.threshold,
    )


def serialize(_: str, job: Job) -> bytes:
    """{"entities", "total_entities", "tagged_text"}: the spans, in order, and the text with [characters](label)."""
    assert isinstance(job.request, ExtractRequest)
    (item,), names = job.request.texts, job.request.names
    (outcome,) = job.first.outcomes()
    text, entities, tagged, at = item.text, list[dict[str, Any]](), "", 0
    for start, end, name, score in merged(outcome.reading.spans):
        value, label = text[start:end], names.get(name, name)
        entities.append(
            {
                "value": value,
                "suggested_label": label,
                "start_position": start,
                "end_position": end,
                "score": round(score, DECIMALS),
            }
        )
        tagged += f"{text[at:start]}[{value}]({label})"
        at = end
    return orjson.dumps(
        {"entities": entities, "total_entities": len(entities), "tagged_text": tagged + text[at:]}
    )


EXTRACT = Protocol(parse, serialize, example=EXAMPLE)
