"""vLLM's score API, with a model that takes pairs and has one output: POST /score and /v1/score."""

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field, create_model

from de3.runtime.answer import significant
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Text
from de3.runtime.errors import RequestError
from de3.runtime.fields import check_count, check_fields, checked_text, load_json
from de3.runtime.options import OptionFields, long_of
from de3.server.http.protocol import Call, Protocol
from de3.server.http.rerank import PairsRequest, pairs, scores_of

EXAMPLE = '{"text_1": "a text", "text_2": ["a text"]}'
# The names under which vLLM accepts the first and the second texts.
NAMES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRequest(PairsRequest):
    """A request in this protocol, with the options for its response.

    Attributes:
        second: the field of the second texts, for error messages.
        raw: respond with the model's outputs instead of their sigmoid.
        id: the client's `request_id`, from which the response gets its id; None: use the server's request id.
    """

    second: str = NAMES[0][1]
    raw: bool = False
    id: str | None = None

    def name_of(self, index: int) -> str:
        """The name of a pair in error messages, by its index: its second text."""
        return f"{self.second}[{index}]"


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        return [checked_text(value, "", "a text, or a list of texts")]
    if not value:
        raise ValueError("must not be an empty list; give at least one text")
    return [checked_text(text, f"[{i}]") for i, text in enumerate(value)]


class ScoreFields(OptionFields):
    """The fields of a body besides the texts; the exit options are an extension."""

    model: str | None = Field(None, description="name, or name:version; default: the server's")
    use_activation: bool | None = Field(
        None, description="false: the model's outputs instead of their sigmoid"
    )
    request_id: str | None = Field(None, max_length=128, description="id of the response")
    truncate_prompt_tokens: Literal[-1] | None = Field(
        None,
        description="truncate pairs to the model's limit (the default, unless the model's settings say otherwise)",
    )
    truncation_side: Literal["right"] | None = Field(
        None, description="accepted; texts are truncated at their end"
    )
    max_tokens_per_query: Literal[0] | None = Field(None, description="accepted; there is no such limit")
    max_tokens_per_doc: Literal[0] | None = Field(None, description="accepted; there is no such limit")
    user: Any = Field(None, description="accepted and ignored")
    priority: Any = Field(None, description="accepted and ignored")
    padding: Any = Field(None, description="accepted and ignored")
    cache_salt: Any = Field(None, description="accepted and ignored")
    mm_processor_kwargs: Any = Field(None, description="accepted and ignored")


Texts = Annotated[list[str], BeforeValidator(_texts)]
KINDS: dict[tuple[str, str], type[ScoreFields]] = {
    names: create_model("ScoreFields", __base__=ScoreFields, **dict.fromkeys(names, (Texts, ...)))  # type: ignore[call-overload]
    for names in NAMES
}


def parse(call: Call) -> ScoreRequest:
    """The request in a call; raises RequestError if it is invalid."""
    value = load_json(call.body)
    names = NAMES[0]
    if isinstance(value, dict):
        names = next((pair for pair in NAMES if value.keys() >= {*pair}), names)
    for name in names:
        check_count(value, name, call.max_texts)
    fields = check_fields(KINDS[names], value, EXAMPLE)
    first, second = names
    ones, others = getattr(fields, first), getattr(fields, second)
    if len(ones) not in (1, len(others)):
        raise RequestError(
            f"{first}: {len(ones)} texts for {len(others)} in {second}; must be one, or as many as in {second}",
            first,
        )
    if len(ones) == 1:
        texts = pairs(ones[0], others, first)
    else:
        texts = [Text(*both) for both in zip(ones, others, strict=True)]
    return ScoreRequest(
        texts,
        fields.options,
        fields.model,
        long_of(fields.truncate_prompt_tokens),
        second=second,
        raw=fields.use_activation is False,
        id=fields.request_id,
    )


def serialize(request_id: str, job: Job) -> bytes:
    """{"id", "object", "created", "model", "data", "usage"}: the scores of the pairs, in the order of the request."""
    request, tokens = job.request, job.tokens
    assert isinstance(request, ScoreRequest)
    scores = [score if request.raw else significant(score) for score in scores_of(job, request.raw)]
    body = {
        "id": f"score-{request.id or request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": job.first.model.full_name,
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }
    return orjson.dumps(body)


SCORE = Protocol(parse, serialize, example=EXAMPLE)
