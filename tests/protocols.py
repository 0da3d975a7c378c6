"""The protocols: paths, bodies, names of fields, and answers, as tests/test_contract.py needs them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ALL = ("classes", "labels", "value", "spans")


def _text_of(error: Any) -> str:
    """The message of an error of /classify."""
    message: str = error["error"]["message"]
    return message


@dataclass(frozen=True)
class Case:
    """A protocol.

    Attributes:
        path: with {model}, if the path names it.
        body: a request with some texts.
        texts, one: the name of the texts in errors, and of a single one, with {} for its index.
        kinds: the kinds of answers that it can give.
        answers: the answers in a response, one for each text, without what depends on time; None: it gives one answer
            for all texts.
        options: the object in the body with options; "": the body itself.
        message: the message of an error.
        error: fields of an error.
        takes: how it reads a text with more tokens than the model: "windows", "cut", or "whole", which is refused.
        no_cut: the option that refuses such a text.
        cut: the option of other servers that truncates it, and its value; guards do not obey it.
        optional: an empty list, empty texts, or no texts at all are answered.
        required: the name that is missing in an empty body, if it is not `texts`.
    """

    path: str
    body: Callable[[list[Any]], dict[str, Any]]
    texts: str
    one: str
    kinds: tuple[str, ...] = ALL
    answers: Callable[[Any], list[Any]] | None = None
    options: str = ""
    message: Callable[[Any], str] = _text_of
    error: frozenset[str] = field(default=frozenset({"error"}))
    takes: str = "cut"
    no_cut: str = ""
    cut: tuple[str, Any] | None = None
    optional: bool = False
    required: str = ""


def _rows(answer: Any) -> list[Any]:
    """The rows of /classify: what they say, not when."""
    return [{key: value for key, value in row.items() if key != "index"} for row in answer["data"]]


def _tensor(texts: Any) -> dict[str, Any]:
    shape = [len(texts) if isinstance(texts, list) else 1]
    return {"name": "text", "datatype": "BYTES", "shape": shape, "data": texts}


def _columns(answer: Any) -> list[Any]:
    """The rows of output tensors, which may have several values for each text."""
    return list(zip(*(_split(one) for one in answer["outputs"]), strict=True))


def _split(tensor: Any) -> list[Any]:
    count = tensor["shape"][0]
    width = len(tensor["data"]) // count
    return [tensor["data"][i * width : (i + 1) * width] for i in range(count)]


CASES = {
    "classify": Case(
        "/classify",
        lambda texts: {"input": texts},
        "input",
        "input[{}]",
        answers=_rows,
        no_cut="truncate",
        cut=("truncate_prompt_tokens", -1),
    ),
    "sglang": Case(
        "/v1/classify",
        lambda texts: {"text": texts},
        "text",
        "text[{}]",
        ("classes", "labels", "value"),
        answers=lambda answer: [row["embedding"] for row in answer],
        takes="whole",
        cut=("truncate", True),
        required="input",
    ),
    "hugging face": Case(
        "/",
        lambda texts: {"inputs": texts},
        "inputs",
        "inputs[{}]",
        answers=list,
        options="parameters",
        no_cut="truncation",
        cut=("truncation", True),
        message=lambda error: error["error"],
    ),
    "tei": Case(
        "/predict",
        lambda texts: {"inputs": [[text] for text in texts] if isinstance(texts, list) else texts},
        "inputs",
        "inputs[{}]",
        ("classes", "labels", "value"),
        answers=list,
        message=lambda error: error["error"],
        error=frozenset({"error", "error_type"}),
        takes="whole",
        cut=("truncate", True),
    ),
    "kserve": Case(
        "/v1/models/{model}:predict",
        lambda texts: {"instances": texts},
        "instances",
        "instances[{}]",
        ("classes", "labels", "value"),
        answers=lambda answer: answer["predictions"],
        options="parameters",
        message=lambda error: error["error"],
    ),
    "open inference": Case(
        "/v2/models/{model}/infer",
        lambda texts: {"inputs": [_tensor(texts)]},
        "inputs: text",
        "inputs: text[{}]",
        ("classes", "labels", "value"),
        answers=_columns,
        required="inputs",
        no_cut="truncate",
        cut=("truncate", True),
        options="parameters",
        message=lambda error: error["error"],
    ),
    "detectors": Case(
        "/api/v1/text/contents",
        lambda texts: {"contents": texts},
        "contents",
        "contents[{}]",
        ("classes", "labels", "spans"),
        answers=list,
        options="detector_params",
        message=lambda error: error["message"],
        error=frozenset({"code", "message"}),
        takes="windows",
    ),
    "guardrail": Case(
        "/beta/litellm_basic_guardrail_api",
        lambda texts: {"texts": texts},
        "texts",
        "texts[{}]",
        ("classes", "labels", "spans"),
        options="additional_provider_specific_params",
        takes="windows",
        optional=True,
    ),
    "moderations": Case(
        "/v1/moderations",
        lambda texts: {"input": texts},
        "input",
        "input[{}]",
        ("classes", "labels"),
        answers=lambda answer: answer["results"],
        takes="windows",
    ),
}
