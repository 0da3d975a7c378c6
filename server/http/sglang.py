"""The protocol of SGLang's own /classify, bodies with `text`: logits, which it calls an embedding."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BeforeValidator, Field

from de3.server.engine.job import Item, Job
from de3.server.engine.request import Request, Text
from de3.server.http.fields import OptionFields, check_count, check_fields


@dataclass(slots=True, eq=False)
class LogitsRequest(Request):
    """A request, with what its response depends on.

    Attributes:
        is_batch: whether the response is a list with an entry for each text.
    """

    input_name: ClassVar[str] = "text"

    is_batch: bool = False


def _texts(value: Any) -> tuple[list[Text], bool]:
    """The texts of `text`, which is one or a list of them, and whether they are a batch."""
    is_batch = isinstance(value, list)
    texts = value if is_batch else [value]
    if not texts:
        raise ValueError("must not be an empty list; give at least one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{f'[{i}]' if is_batch else ''}: must be a text that is not empty")
    return [Text(text) for text in texts], is_batch


class LogitsFields(OptionFields):
    """The body; the exit options are ours."""

    model: str | None = None
    text: Annotated[tuple[list[Text], bool], BeforeValidator(_texts)]
    truncate: bool = Field(False, description="cut texts that are too long instead of refusing them")
    rid: Any = Field(None, description="accepted and ignored")


def request_of(value: dict[str, Any], max_texts: int) -> LogitsRequest:
    """The request in a JSON object; raises RequestError."""
    value.pop("rid", None)
    check_count(value["text"], "text", max_texts)
    fields = check_fields(LogitsFields, value, '{"text": "a text"}')
    texts, is_batch = fields.text
    return LogitsRequest(texts, fields.options, fields.model, fields.truncate, is_batch=is_batch)


def serialize(request_id: str, job: Job) -> bytes:
    """{"embedding", "meta_info"}; of a batch a list of these."""
    assert isinstance(job.request, LogitsRequest)
    rows = [_row(item, request_id) for item in job.items]
    return orjson.dumps(rows if job.request.is_batch else rows[0])


def _row(item: Item, request_id: str) -> dict[str, Any]:
    assert item.outcome is not None  # the job is done
    meta_info = {"id": request_id, "prompt_tokens": item.outcome.tokens}
    return {"embedding": item.outcome.reading.logits, "meta_info": meta_info}
