"""SGLang's own format of /classify: bodies with `text`, answered with logits, which SGLang calls an embedding."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BeforeValidator, Field

from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Request, Text
from de3.runtime.fields import check_count, check_fields, one_or_more, plain_text
from de3.runtime.options import Long, OptionFields, long_of


@dataclass(frozen=True, slots=True, eq=False)
class LogitsRequest(Request):
    """A request in this protocol, with the options for its response.

    Attributes:
        is_batch: the response is a list with an entry for each text.
    """

    input_name: ClassVar[str] = "text"
    usual_long: ClassVar[Long] = "error"

    is_batch: bool = False


class LogitsFields(OptionFields):
    """The body of a request; the exit options are an extension."""

    model: str | None = None
    text: Annotated[list[Text], BeforeValidator(partial(one_or_more, plain_text))]
    truncate: bool = Field(False, description="truncate texts that are too long instead of refusing them")
    rid: Any = Field(None, description="accepted and ignored")


def request_of(value: dict[str, Any], max_texts: int) -> LogitsRequest:
    """The request in a JSON object; raises RequestError if it is invalid or has more than `max_texts` texts."""
    value.pop("rid", None)
    check_count(value, "text", max_texts)
    fields = check_fields(LogitsFields, value, '{"text": "a text"}')
    is_batch = isinstance(value["text"], list)
    return LogitsRequest(
        fields.text, fields.options, fields.model, long_of(fields.truncate or None), is_batch=is_batch
    )


def serialize(request_id: str, job: Job) -> bytes:
    """{"embedding", "meta_info"}; for a batch, a list of such objects."""
    assert isinstance(job.request, LogitsRequest)
    rows = [
        {
            "embedding": outcome.text_reading.logits,
            "meta_info": {"id": request_id, "prompt_tokens": outcome.tokens},
        }
        for outcome in job.first.outcomes()
    ]
    return orjson.dumps(rows if job.request.is_batch else rows[0])
