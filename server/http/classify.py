"""The protocol of /classify, a superset of vLLM's and SGLang's: request and response as JSON."""

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
from de3.server.http.fields import OptionFields, check_count, check_fields, known_fields, load_json
from de3.server.http.protocol import Call, Protocol


@dataclass(slots=True, eq=False)
class Classification(Request):
    """A request, with what its response depends on.

    Attributes:
        id: the client's, for the response's id.
        raw: logits instead of probabilities.
        top_k: how many of the most probable labels to name besides; 0: none.
    """

    id: str | None = None
    raw: bool = False
    top_k: int = 0

    def check(self, manifest: Manifest) -> None:
        """Raise RequestError for a ranking of labels that the model has not."""
        if self.top_k and manifest.tolerance is not None:
            raise RequestError(
                f"top_k: {manifest.name}:{manifest.version} is a regression model: it has no labels to rank",
                "top_k",
            )


def _texts(value: Any) -> list[Text]:
    """The texts of `input`, which is one text or pair, or a list of them. Raises ValueError."""
    if not isinstance(value, list):
        return [_text(value, "")]
    if not value:
        raise ValueError("must not be an empty list; give at least one text")
    return [_text(item, f"[{i}]") for i, item in enumerate(value)]


def _text(value: Any, where: str) -> Text:
    if isinstance(value, dict):
        if len(value) != 2 or "text" not in value or "text_pair" not in value:
            missing = [key for key in ("text", "text_pair") if key not in value]
            surplus = sorted({*islice(value, 6)} - {"text", "text_pair"})  # it may have 100,000 fields
            problem = f"{' and '.join(missing)} missing" if missing else f"unknown field {surplus[0][:100]!r}"
            raise ValueError(f"{where}: an object must have exactly text and text_pair: {problem}")
        return Text(
            _string(value["text"], f"{where}.text"), _string(value["text_pair"], f"{where}.text_pair")
        )
    return Text(_string(value, where))


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
        what = kinds.get(type(value), "null")
        raise ValueError(f"{where}: must be a text, or an object with text and text_pair; got {what}")
    if not value.strip():
        raise ValueError(f"{where}: must not be empty")
    return value


class TextPair(BaseModel):
    """Two texts that are classified together."""

    model_config = ConfigDict(extra="forbid")

    text: str
    text_pair: str


# For the schema; `_texts` does the work, without a model for each text.
OneText = Annotated[str, Field(min_length=1)] | TextPair
OneOrMore = OneText | Annotated[list[OneText], Field(min_length=1)]
Long = Literal["truncate", "windows", "error"]


class ClassifyFields(OptionFields):
    """The fields of most requests."""

    model: str | None = Field(
        None,
        description="name (its current version, or a canary) or name:version; required where several models are "
        "served and none of them is the default",
    )
    input: Annotated[list[Text], BeforeValidator(_texts, json_schema_input_type=OneOrMore)] = Field(
        description="a text, a pair, or a list of them"
    )
    truncate: bool = Field(True, description="false: long is error")
    long: Long | None = Field(
        None,
        description="what to do with texts that are longer than the model takes: truncate (the default), windows (run "
        "overlapping windows until their combined answer is settled), or error",
    )
    explain: bool = Field(False, description="report every exit passed")
    ood: bool = Field(False, description="report how unlike the calibration's texts a text is, as ood_score")

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


class ClassifyRequest(ClassifyFields):
    """A request to classify one or more texts."""

    raw: bool = Field(False, description="logits in probs, instead of probabilities")
    top_k: int | None = Field(None, ge=1, description="report so many of the most probable labels, as top")
    request_id: str | None = Field(None, max_length=128, description="for the response's id")
    use_activation: bool | None = Field(None, description="false: as raw")
    activation: bool | None = Field(None, description="the former name of use_activation")
    truncate_prompt_tokens: Literal[-1] | None = Field(
        None, description="accepted; texts are cut to what the model takes"
    )
    truncation_side: Literal["right"] | None = Field(None, description="accepted; texts are cut at their end")
    add_special_tokens: Literal[True] | None = Field(None, description="accepted; the model needs them")
    user: Any = Field(None, description="accepted and ignored")
    rid: Any = Field(None, description="accepted and ignored")
    priority: Any = Field(None, description="accepted and ignored")
    padding: Any = Field(None, description="accepted and ignored")
    cache_salt: Any = Field(None, description="accepted and ignored")
    mm_processor_kwargs: Any = Field(None, description="accepted and ignored")


DISPLAY_LAM = 1.0  # of the EDR that is reported beside another signal
EXAMPLE = '{"input": "a text"}'
OFTEN = frozenset(known_fields(ClassifyFields))
IGNORED = frozenset({"user", "rid", "priority", "padding", "cache_salt", "mm_processor_kwargs"})


def parse(call: Call) -> Request:
    """The request in a call; raises RequestError for what is not JSON or has a wrong value."""
    value = load_json(call.body)
    if isinstance(value, dict):
        if "input" not in value:
            if "inputs" in value:
                return hugging_face.request_of(value, call.max_texts, nests_one=False)
            if "text" in value:
                return sglang.request_of(value, call.max_texts)
        check_count(value.get("input"), "input", call.max_texts)
        if not value.keys() <= OFTEN:
            return _with_all_fields(value)
    return _request(check_fields(ClassifyFields, value, EXAMPLE))


def _with_all_fields(value: dict[str, Any]) -> Classification:
    for field in value.keys() & IGNORED:
        del value[field]
    fields = check_fields(ClassifyRequest, value, EXAMPLE)
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
    )


def serialize(request_id: str, job: Job) -> bytes:
    """The response's body for a job that is done: one row for each text, in order."""
    request = job.request
    if isinstance(request, hugging_face.TaskRequest):
        return hugging_face.serialize(request_id, job)
    if isinstance(request, sglang.LogitsRequest):
        return sglang.serialize(request_id, job)
    assert isinstance(request, Classification)
    tokens = job.tokens
    body: dict[str, Any] = {
        "id": f"classify-{request.id or request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": job.model.full_name,
        "data": [_row(item, job, request) for item in job.items],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }
    certificate = job.served.rules.certificate(job.choice)
    # It speaks of texts that are one window.
    if certificate is not None and all(outcome.num_windows == 1 for outcome in job.outcomes()):
        body["certificate"] = certificate
    if request.explain:
        body["tau_choice"] = job.choice.row()
    return orjson.dumps(body)


def _row(item: Item, job: Job, request: Classification) -> dict[str, Any]:
    """The answer to one text."""
    outcome, manifest = item.outcome, job.model.manifest
    assert outcome is not None  # the job is done
    reading, rule, signal = outcome.reading, outcome.rule, outcome.rule.signal
    lam = signal.lam or DISPLAY_LAM
    row: dict[str, Any] = {
        "index": item.index,
        **_answer(reading, manifest.labels, request.raw),
        "num_classes": len(manifest.labels),
        "exit": {
            "layer": outcome.layer,
            "num_layers": manifest.num_layers,
            "reason": outcome.reason,
            "tau": rule.tau,
            "signal": signal.name,
            "lambda": signal.lam,
            **_signals(reading, lam),
        },
    }
    if reading.labels is not None:
        row["labels"] = [manifest.labels[k] for k in reading.labels]
    if request.top_k:
        values = row["probs"]
        best = sorted(range(len(values)), key=lambda k: -values[k])[: request.top_k]
        row["top"] = [{"label": manifest.labels[k], "prob": values[k]} for k in best]
    if outcome.truncated:
        row["truncated"] = True
    if outcome.windows:
        layers = [window.layer for window in outcome.windows]
        row["windows"] = {"run": len(layers), "of": outcome.num_windows, "layers": layers}
    if request.ood:
        row["ood_score"] = job.served.monitor.score(outcome.passed)
    if outcome.is_far:
        row["out_of_distribution"] = True
    if request.explain:
        row["layers"] = [
            {
                "layer": r.layer,
                **_signals(r, lam),
                **_answer(r, manifest.labels, request.raw),
                **place,
            }
            for r, place in _passed(outcome)
        ]
    return row


def _answer(reading: Reading, names: list[str], raw: bool) -> dict[str, Any]:
    """What one exit answers: a label and probabilities, or a value."""
    if reading.value is not None:
        return {"label": names[0], "value": reading.value, "probs": None}
    return {"label": names[reading.label], "probs": reading.logits if raw else reading.probs}


def _passed(outcome: Outcome) -> list[tuple[Reading, dict[str, int]]]:
    """The reading of every exit passed, and of a text with several windows in which one."""
    if not outcome.windows:
        return [(reading, {}) for reading in outcome.passed]
    return [(r, {"window": n}) for n, window in enumerate(outcome.windows) for r in window.passed]


def _signals(reading: Reading, lam: float) -> dict[str, Any]:
    """The signals of one exit, and the score that was compared with τ."""
    if reading.value is not None:
        return {"score": reading.score, "entropy": None, "distance_ratio": None, "edr": None}
    return {
        "score": reading.score,
        "entropy": reading.entropy,
        "distance_ratio": reading.distance_ratio,
        "edr": edr(reading, lam),
    }


CLASSIFY = Protocol(parse, serialize)
