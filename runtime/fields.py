"""Checks of JSON bodies that the protocols share: fields and texts."""

import gc
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from de3.exits.signals import MAX_LAM
from de3.runtime.engine.request import Text
from de3.runtime.errors import RequestError
from de3.runtime.options import MAX_BUDGET_MS

INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories of control and format characters, and of white space

LARGE_BODY_BYTES = 16 * 1024  # a larger body may take milliseconds to parse
MAX_BRACKETS = 2**17  # limit for a body, including its texts: each bracket may allocate a list or an object
# Allowed values, for messages.
ALLOWED = {
    "tau": " (allowed: 0 to 1)",
    "lambda": f" (allowed: 0 to {MAX_LAM:g})",
    "target_speedup": " (allowed: 1 or more)",
    "latency_budget_ms": f" (allowed: more than 0, at most {MAX_BUDGET_MS})",
    "max_disagreement": " (allowed: 0 to 1)",
    "max_missed": " (allowed: 0 to 1)",
    "truncate_prompt_tokens": " or null: texts are truncated to the model's limit",
    "truncation_side": " or null: texts are truncated at their end",
    "add_special_tokens": " or null: the model needs them",
}
Fields = TypeVar("Fields", bound=BaseModel)


class JsonObject(BaseModel):
    """A JSON object: refuses unknown fields, and values of the wrong type."""

    model_config = ConfigDict(extra="forbid", strict=True)


def load_json(body: bytes) -> Any:
    """The JSON value of a body; raises RequestError if it is not JSON in UTF-8 or has too many brackets."""
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise RequestError(f"the body has more than the limit of {MAX_BRACKETS} opening brackets")
    collects = len(body) > LARGE_BODY_BYTES and gc.isenabled()
    if collects:
        gc.disable()  # the garbage collector would traverse up to MAX_BRACKETS new lists repeatedly
    try:
        return from_json(body, cache_strings="none")
    except ValueError as error:
        raise RequestError(f"the body is not JSON in UTF-8: {error}", cause="not_json") from None
    finally:
        if collects:
            gc.enable()


def check_fields(kind: type[Fields], value: Any, example: str) -> Fields:
    """The validated fields of a JSON value; raises RequestError for an unknown field or an invalid value.

    kind: class of the fields. example: a valid object, for messages.

    Unknown fields are checked first: pydantic's errors for 100,000 of them would take a quarter of a second.
    """
    if isinstance(value, dict):
        known = known_fields(kind)
        for field in value:
            if field not in known:
                name = field[:100]
                message = f"{name}: unknown field; known fields: {', '.join(known)}"
                raise RequestError(message, name, "unknown_field")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise explain(first, first["loc"], f"the body must be a JSON object like {example}") from None


@cache
def known_fields(kind: type[BaseModel]) -> list[str]:
    """The field names of a JSON object of this kind."""
    return [field.alias or name for name, field in kind.model_fields.items()]


def check_count(value: Any, field: str, most: int) -> None:
    """Raise RequestError if a field of a JSON value is a list of too many texts, before any is checked."""
    texts = value.get(field) if isinstance(value, dict) else None
    if isinstance(texts, list) and len(texts) > most:
        raise RequestError(f"{field}: {len(texts)} texts; at most {most} are allowed", field)


def one_or_more(text_of: Callable[[Any, str], Text], value: Any) -> list[Text]:
    """The texts of a field that is one text or a list of them; raises ValueError for an empty list.

    text_of: converts a value to a text, given its position in the field for messages; may raise ValueError.
    """
    if not isinstance(value, list):
        return [text_of(value, "")]
    if not value:
        raise ValueError("must not be an empty list; give at least one text")
    return [text_of(item, f"[{i}]") for i, item in enumerate(value)]


def is_blank(text: str) -> bool:
    """True if nothing of the text can be seen: its answer would mean nothing."""
    return not "!" <= text[:1] <= "~" and all(unicodedata.category(char) in INVISIBLE for char in text)


def checked_text(value: Any, where: str, expected: str = "a text") -> str:
    """The value if it is a text that is not blank; otherwise raises ValueError.

    where, expected: position of the value in the field, and a description of valid values, for the message.
    """
    if not isinstance(value, str):
        kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
        raise ValueError(f"{where}: must be {expected}; got {kinds.get(type(value), 'null')}")
    if is_blank(value):
        raise ValueError(
            f"{where}: must not be {'only white space or invisible characters' if value else 'empty'}"
        )
    return value


def plain_text(value: Any, where: str) -> Text:
    """The text in a JSON value; raises ValueError as checked_text does."""
    return Text(checked_text(value, where))


def explain(first: Mapping[str, Any], loc: Sequence[int | str], no_object: str) -> RequestError:
    """The RequestError for a pydantic error, with the field's name and the allowed values.

    loc: the error's place in the body. no_object: the message for a body that is not an object.
    """
    kind, message = first["type"], first["msg"]
    # The message of our own validator: a field's may begin with a position in the field, a model's begins with a field.
    ours = str(first["ctx"]["error"]) if kind == "value_error" else ""
    if not loc:
        return RequestError(ours or no_object, ours.partition(":")[0] or None)
    field = str(loc[0])[:100]
    if kind == "missing":
        return RequestError(f"{field}: is required", field)
    if ours:
        return RequestError(f"{field}{ours if ours[0] in '[:.' else ': ' + ours}", field)
    return RequestError(f"{field}: {message[0].lower()}{message[1:]}{ALLOWED.get(field, '')}", field)
