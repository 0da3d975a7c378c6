"""The JSON protocol of /classify, a superset of vLLM's and SGLang's."""

import time
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from de3.exits.reading import Reading
from de3.exits.signals import edr
from de3.exits.windows import MAX_WINDOWS
from de3.model_store.manifest import Manifest
from de3.server.engine.job import Item, Job
from de3.server.engine.outcome import Outcome
from de3.server.engine.request import Request, Text
from de3.server.errors import RequestError
from de3.server.http import hugging_face, sglang
from de3.server.http.fields import (
    OptionFields,
    check_count,
    check_fields,
    checked_text,
    known_fields,
    load_json,
    one_or_more,
)
from de3.server.http.protocol import Call, Protocol
from de3.server.http.response import ClassifiedText, ClassifyResponse, PassedExit


@dataclass(slots=True, eq=False)
class Classification(Request):
    """A request in this protocol, with the options for its response.

    Attributes:
        id: the client's `request_id`, for the id of the response; None: the server's request id.
        raw: respond with logits instead of probabilities.
        top_k: number of labels to list as `top`, the most probable first; 0: none.
    """

    id: str | None = None
    raw: bool = False
    top_k: int = 0

    def check(self, manifest: Manifest) -> None:
        """Raise RequestError for `top_k` with a regression model, which has no labels to rank."""
        if self.top_k and manifest.tolerance is not None:
            raise RequestError(
                f"top_k: {manifest.name}:{manifest.version} is a regression model: it has no labels to rank",
                "top_k",
            )


def _texts(value: Any) -> list[Text]:
    return one_or_more(value, text_of)


def text_of(value: Any, where: str) -> Text:
    """The text or pair in a JSON value; raises ValueError for any other value, and for a blank text.

    where: position of the value, for the message.
    """
    if not isinstance(value, dict):
        return Text(checked_text(value, where, "a text, or an object with text and text_pair"))
    if len(value) != 2 or "text" not in value or "text_pair" not in value:
        missing = [key for key in ("text", "text_pair") if key not in value]
        surplus = sorted({*islice(value, 6)} - {"text", "text_pair"})  # the first few of perhaps 100,000
        problem = f"{' and '.join(missing)} missing" if missing else f"unknown field {surplus[0][:100]!r}"
        raise ValueError(f"{where}: an object must have exactly text and text_pair: {problem}")
    return Text(
        checked_text(value["text"], f"{where}.text"), checked_text(value["text_pair"], f"{where}.text_pair")
    )


class TextPair(BaseModel):
    """Two texts that are classified together."""

    model_config = ConfigDict(extra="forbid")

    text: str
    text_pair: str


# For the schema only. `_texts` checks the values, as a pydantic model for each text would be slower.
OneText = Annotated[str, Field(min_length=1)] | TextPair
OneOrMore = OneText | Annotated[list[OneText], Field(min_length=1)]
Long = Literal["truncate", "windows", "error"]


class ClassifyFields(OptionFields):
    """The fields of /classify that most requests use; ClassifyRequest adds the others."""

    model: str | None = Field(
        None,
        description="name (its current version, or a canary) or name:version; required if several models are "
        "served and none is the default",
    )
    input: Annotated[list[Text], BeforeValidator(_texts, json_schema_input_type=OneOrMore)] = Field(
        description="a text, a pair, or a list of them"
    )
    truncate: bool = Field(True, description="false: the same as long: error")
    long: Long | None = Field(
        None,
        description="how to handle texts longer than the model's limit: truncate (the default), windows (run "
        "overlapping windows until their combined answer is settled), or error",
    )
    flag: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="a label to watch for: with long: windows, the answer is that of the window where it is most "
        "probable, and the first window that reaches flag_threshold is the last to run",
    )
    flag_threshold: float | None = Field(
        None, gt=0, lt=1, description="default: 0.5, or the label's threshold in a multi-label model"
    )
    explain: bool = Field(False, description="report every exit passed")
    ood: bool = Field(
        False, description="report how far a text is from the calibration's distribution, as ood_score"
    )

    @model_validator(mode="after")
    def _check_long(self) -> "ClassifyFields":
        if (
            self.long is not None
            and "truncate" in self.model_fields_set
            and self.truncate == (self.long == "error")
        ):
            raise ValueError(
                f"long: {self.long} contradicts truncate: {str(self.truncate).lower()}; give one of them "
                "(truncate: false is the same as long: error)"
            )
        return self

    @model_validator(mode="after")
    def _check_flag(self) -> "ClassifyFields":
        if self.flag_threshold is not None and self.flag is None:
            raise ValueError("flag_threshold: needs flag, the label to watch for")
        return self


class ClassifyRequest(ClassifyFields):
    """A request to classify one or more texts."""

    raw: bool = Field(False, description="logits instead of probabilities, in probs")
    top_k: int | None = Field(None, ge=1, description="report this many of the most probable labels, as top")
    request_id: str | None = Field(None, max_length=128, description="id of the response")
    use_activation: bool | None = Field(None, description="false: the same as raw: true")
    activation: bool | None = Field(None, description="the former name of use_activation")
    truncate_prompt_tokens: Literal[-1] | None = Field(
        None, description="accepted; texts are truncated to the model's limit"
    )
    truncation_side: Literal["right"] | None = Field(
        None, description="accepted; texts are truncated at their end"
    )
    add_special_tokens: Literal[True] | None = Field(None, description="accepted; the model needs them")
    user: Any = Field(None, description="accepted and ignored")
    rid: Any = Field(None, description="accepted and ignored")
    priority: Any = Field(None, description="accepted and ignored")
    padding: Any = Field(None, description="accepted and ignored")
    cache_salt: Any = Field(None, description="accepted and ignored")
    mm_processor_kwargs: Any = Field(None, description="accepted and ignored")


DISPLAY_LAM = 1.0  # λ of the reported EDR if the signal has no λ, or λ = 0
EXAMPLE = '{"input": "a text"}'
COMMON_FIELDS = frozenset(known_fields(ClassifyFields))
IGNORED = frozenset({"user", "rid", "priority", "padding", "cache_salt", "mm_processor_kwargs"})


def parse(call: Call) -> Request:
    """The request in a call; raises RequestError if its body is not JSON or is invalid."""
    value = load_json(call.body)
    if isinstance(value, dict):
        text = value.get("input")
        if (
            len(value) == 1 and isinstance(text, str) and text.strip()
        ):  # most requests: a single text, without options
            return Classification([Text(text)])
        if "input" not in value:
            if "inputs" in value:
                return hugging_face.request_of(value, call.max_texts, nests_one=False)
            if "text" in value:
                return sglang.request_of(value, call.max_texts)
        check_count(value.get("input"), "input", call.max_texts)
        if not value.keys() <= COMMON_FIELDS:
            return _with_all_fields(value)
    return _request(check_fields(ClassifyFields, value, EXAMPLE))


def _with_all_fields(value: dict[str, Any]) -> Classification:
    for field in value.keys() & IGNORED:
        del value[field]
    return request_of(check_fields(ClassifyRequest, value, EXAMPLE))


def request_of(fields: ClassifyRequest) -> Classification:
    """The request that these fields describe."""
    request = _request(fields)
    request.id = fields.request_id
    request.raw = fields.raw or fields.use_activation is False or fields.activation is False
    request.top_k = fields.top_k or 0
    return request


def _request(fields: ClassifyFields) -> Classification:
    return Classification(
        fields.input,
        fields.options,
        fields.model,
        fields.truncate and fields.long != "error",
        fields.explain,
        fields.ood,
        MAX_WINDOWS if fields.long == "windows" else 1,
        None if fields.flag is None else (fields.flag, fields.flag_threshold),
    )


def serialize(request_id: str, job: Job) -> bytes:
    """The body of the response for a finished job: one row for each text, in order."""
    request = job.request
    if isinstance(request, hugging_face.TaskRequest):
        return hugging_face.serialize(request_id, job)
    if isinstance(request, sglang.LogitsRequest):
        return sglang.serialize(request_id, job)
    assert isinstance(request, Classification)
    tokens = job.tokens
    body: ClassifyResponse = {
        "id": f"classify-{request.id or request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": job.model.full_name,
        "data": [row_of(item, job, request) for item in job.items],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }
    # The certificate holds only for texts that fit into a single window.
    certificate = job.choice.certificate
    if certificate is not None and all(outcome.num_windows == 1 for outcome in job.outcomes()):
        body["certificate"] = certificate
    if request.explain:
        body["tau_choice"] = job.choice.row()
    return orjson.dumps(body)


def row_of(item: Item, job: Job, request: Classification) -> ClassifiedText:
    """The answer to one text, as a row of `data`."""
    outcome, labels = item.outcome, job.model.manifest.labels
    assert outcome is not None  # the job is finished
    reading, rule, signal = outcome.reading, outcome.rule, outcome.rule.signal
    lam = signal.lam or DISPLAY_LAM
    row: ClassifiedText = {
        "index": item.index,
        "label": labels[reading.label],
        "probs": _probs(reading, request.raw),
        "num_classes": len(labels),
        "exit": {
            "layer": outcome.layer,
            "num_layers": job.model.manifest.num_layers,
            "reason": outcome.reason,
            "tau": rule.tau,
            "signal": signal.name,
            "lambda": signal.lam,
            "score": reading.score,
            "entropy": reading.entropy,  # NaN for a regression model; null in JSON
            "distance_ratio": reading.distance_ratio,
            "edr": edr(reading, lam),
        },
    }
    if reading.value is not None:
        row["value"] = reading.value
    if reading.labels is not None:
        row["labels"] = [labels[k] for k in reading.labels]
    if request.top_k:
        values = row["probs"] or []
        best = sorted(range(len(values)), key=lambda k: -values[k])[: request.top_k]
        row["top"] = [{"label": labels[k], "prob": values[k]} for k in best]
    if outcome.truncated:
        row["truncated"] = True
    if outcome.windows:
        layers = [window.layer for window in outcome.windows]
        row["windows"] = {"run": len(layers), "of": outcome.num_windows, "layers": layers}
    if job.flag is not None:
        prob = reading.probs[job.flag.label]
        row["flag"] = {"label": labels[job.flag.label], "prob": prob, "flagged": prob >= job.flag.threshold}
        if (decisive := outcome.decisive) is not None:
            row["flag"] |= {"window": decisive.window, "start": decisive.start, "end": decisive.end}
    if request.ood:
        row["ood_score"] = job.served.monitor.score(outcome.passed)
    if outcome.is_far:
        row["out_of_distribution"] = True
    if request.explain:
        row["layers"] = _passed_exits(outcome, labels, lam, request.raw)
    return row


def _probs(reading: Reading, raw: bool) -> list[float] | None:
    if reading.value is not None:
        return None
    return reading.logits if raw else reading.probs


def _passed_exits(outcome: Outcome, labels: list[str], lam: float, raw: bool) -> list[PassedExit]:
    """A row for every exit passed, with the window's index if the text has several windows."""
    rows: list[PassedExit] = []
    windows = [window.passed for window in outcome.windows] or [outcome.passed]
    for number, passed in enumerate(windows):
        for reading in passed:
            row: PassedExit = {
                "layer": reading.layer,
                "label": labels[reading.label],
                "probs": _probs(reading, raw),
                "score": reading.score,
                "entropy": reading.entropy,
                "distance_ratio": reading.distance_ratio,
                "edr": edr(reading, lam),
            }
            if reading.value is not None:
                row["value"] = reading.value
            if outcome.windows:
                row["window"] = number
            rows.append(row)
    return rows


CLASSIFY = Protocol(parse, serialize)
