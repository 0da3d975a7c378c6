"""Parsing that the protocols share: JSON bodies, texts and the exit options."""

import gc
from collections.abc import Callable
from functools import cache, cached_property
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from de3.exits.signals import MAX_LAM, SIGNALS, check_name
from de3.server.engine.request import Text
from de3.server.errors import RequestError
from de3.server.http.protocol import LARGE_BODY_BYTES
from de3.server.settings import MAX_BUDGET_MS, ExitOptions

MAX_BRACKETS = 2**17  # in a body, including those in texts: each may allocate a list or an object
ALLOWED = {
    "tau": " (allowed: 0 to 1)",
    "lambda": f" (allowed: 0 to {MAX_LAM:g})",
    "target_speedup": " (allowed: 1 or more)",
    "latency_budget_ms": f" (allowed: more than 0, at most {MAX_BUDGET_MS})",
    "max_disagreement": " (allowed: 0 to 1)",
    "truncate_prompt_tokens": " or null: texts are truncated to the model's limit",
    "truncation_side": " or null: texts are truncated at their end",
    "add_special_tokens": " or null: the model needs them",
}


MAX_THRESHOLDS = 10_000
THRESHOLD = "a number above 0 and below 1"
Threshold = Annotated[float, Field(gt=0, lt=1)]


def _thresholds(value: Any) -> Any:
    """The value, if it is a threshold, an object of thresholds, or None; raises ValueError at the first invalid one."""
    if isinstance(value, dict):
        if len(value) > MAX_THRESHOLDS:
            raise ValueError(f"has {len(value)} labels, at most {MAX_THRESHOLDS} are allowed")
        for name, one in value.items():
            if not _is_threshold(one):
                raise ValueError(f"[{name[:100]!r}]: must be {THRESHOLD}")
    elif value is not None and not _is_threshold(value):
        raise ValueError(f"must be {THRESHOLD}, or an object of such numbers by label")
    return value


def _is_threshold(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < 1


def _signal(value: Any) -> str:
    return check_name(value if isinstance(value, str) else "")


SignalName = Annotated[
    str, BeforeValidator(_signal), Field(json_schema_extra=lambda schema: schema.update(enum=[*SIGNALS]))
]


class OptionFields(BaseModel):
    """The exit options, which are the same in the JSON of every protocol."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    tau: float | None = Field(
        None, ge=0, le=1, description="exit at the first layer whose score is below tau; 0: never early"
    )
    signal: SignalName | None = Field(
        None,
        description=f"signal compared with tau: {', '.join(SIGNALS)} (see docs/signals.md); default: the model's",
    )
    lam: float | None = Field(
        None,
        ge=0,
        le=MAX_LAM,
        alias="lambda",
        description="of the signal edr: weight of the distance ratio against entropy; 0: entropy alone",
    )
    max_layer: int | None = Field(None, ge=0, description="deepest layer to run")
    target_speedup: float | None = Field(
        None, ge=1, description="instead of tau: the mean speed-up over full depth, by the calibration"
    )
    latency_budget_ms: float | None = Field(
        None,
        gt=0,
        le=MAX_BUDGET_MS,
        description="instead of tau: answer within this time, at the deepest exit reached by then",
    )
    best_effort: bool = Field(
        False, description="with a budget that cannot be met: answer at the first exit instead of 503"
    )
    max_disagreement: float | None = Field(
        None,
        ge=0,
        le=1,
        description="instead of tau: maximum rate of answers that differ from full depth, at 95% confidence",
    )

    thresholds: Annotated[
        float | dict[str, float] | None,
        BeforeValidator(_thresholds, json_schema_input_type=Threshold | dict[str, Threshold] | None),
    ] = Field(
        None,
        description="for a multi-label model: probability above which a label is assigned, for all labels or by name",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "OptionFields":
        _ = self.options
        return self

    @cached_property
    def options(self) -> ExitOptions:
        """The exit options in these fields; raises ValueError for options that cannot be combined."""
        if self.model_fields_set.isdisjoint(OPTION_NAMES):
            return NO_OPTIONS
        return ExitOptions(
            self.tau,
            self.signal,
            self.lam,
            self.max_layer,
            self.target_speedup,
            self.latency_budget_ms,
            self.max_disagreement,
            self.best_effort,
            self.thresholds,
        )


OPTION_NAMES, NO_OPTIONS = frozenset(OptionFields.model_fields), ExitOptions()
Fields = TypeVar("Fields", bound=BaseModel)


def load_json(body: bytes) -> Any:
    """The JSON value of a body; raises RequestError if it is not JSON in UTF-8 or has too many brackets."""
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise RequestError(f"the body has more than {MAX_BRACKETS} opening brackets, the limit")
    collects = len(body) > LARGE_BODY_BYTES and gc.isenabled()
    if collects:
        gc.disable()  # the collector would traverse up to MAX_BRACKETS new lists repeatedly
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
        raise _explain(error, example) from None


@cache
def known_fields(kind: type[BaseModel]) -> list[str]:
    """The field names of a JSON object of this kind."""
    return [field.alias or name for name, field in kind.model_fields.items()]


def check_count(texts: Any, field: str, most: int) -> None:
    """Raise RequestError if a list has too many texts, before any is checked."""
    if isinstance(texts, list) and len(texts) > most:
        raise RequestError(f"{field}: {len(texts)} texts, at most {most} are allowed", field)


def one_or_more(value: Any, text_of: Callable[[Any, str], Text]) -> list[Text]:
    """The texts of a field that is one text or a list of them; raises ValueError for an empty list.

    text_of: converts a value to a text, given its position in the field for messages; may raise ValueError.
    """
    if not isinstance(value, list):
        return [text_of(value, "")]
    if not value:
        raise ValueError("must not be an empty list; give at least one text")
    return [text_of(item, f"[{i}]") for i, item in enumerate(value)]


def checked_text(value: Any, where: str, expected: str = "a text") -> str:
    """The value if it is a text that is not blank; otherwise raises ValueError.

    where, expected: position of the value in the field, and a description of valid values, for the message.
    """
    if not isinstance(value, str):
        kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
        raise ValueError(f"{where}: must be {expected}; got {kinds.get(type(value), 'null')}")
    if not value.strip():
        raise ValueError(f"{where}: must not be {'only white space' if value else 'empty'}")
    return value


def _explain(error: ValidationError, example: str) -> RequestError:
    """A RequestError for the first of pydantic's errors, with the field's name and the allowed values."""
    first = error.errors(include_url=False)[0]
    kind, loc, message = first["type"], first["loc"], first["msg"]
    if not loc:
        # Either a model validator failed, whose message begins with a field, or the body is not an object.
        text = str(first["ctx"]["error"]) if kind == "value_error" else ""
        text = text or f"the body must be a JSON object like {example}"
        return RequestError(text, text.partition(":")[0] if kind == "value_error" else None)
    field = str(loc[0])[:100]
    if kind == "missing":
        return RequestError(f"{field}: is required", field)
    if kind == "value_error":  # from our validators; the message may begin with a position in the field
        inner = str(first["ctx"]["error"])
        return RequestError(f"{field}{inner if inner[:1] in '[:.' else ': ' + inner}", field)
    allowed = ALLOWED.get(field, "")
    return RequestError(f"{field}: {message[0].lower()}{message[1:]}{allowed}", field)
