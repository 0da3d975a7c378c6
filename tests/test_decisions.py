"""Questions: /v1/decisions and /v1/systemone, the file that binds them to models, and a decision server as upstream."""

import json
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from de3.runtime.engine.request import Text
from de3.runtime.errors import RequestError
from de3.runtime.questions import Option, Question, body_of, probabilities_in
from de3.runtime.upstream.client import Asked, Reply
from de3.runtime.upstream.usage import Query
from de3.server.http.decisions import answer_row
from de3.server.main import _check_questions
from de3.server.processes.messages import decode, encode
from de3.server.questions import Source, _between, read_questions, source_of
from de3.server.settings import Settings
from tests.serving import Server, serving
from tests.upstream import LABELS, Service, model_of, opinion, served

FILE = """
[[questions]]
type = "predicate"
model = "tiny-int8"
name = "blamed"
instructions = "Does it blame?"

[[questions]]
type = "predicate"
model = "tiny-int8"
name = "surely blamed"
labels = ["blame"]
threshold = 0.9

[[questions]]
type = "predicate"
model = "labels"
name = "any"
labels = ["LABEL_0", "LABEL_2"]
threshold = 0.5

[[questions]]
type = "choice"
model = "tiny-int8"
instructions = { ask = "tone", of = ["the text"] }
choices = [{ value = true, description = "all is well", is = "safe" }, { value = "blame" }]

[[questions]]
type = "score"
model = "value"
name = "quality"
levels = [{ label = "bad", is = -1 }, { label = "fair", is = 0 }, { label = "good", is = 0.5 }]

[[questions]]
type = "score"
model = "tiny-int8"
name = "severity"
instructions = "How severe?"
levels = [{ label = "none", is = "safe" }, { label = "much", is = "blame" }]
"""
FLAG = "tiny-int8=blame@0.7"
PREDICATE = {"type": "predicate", "name": "blamed"}
TONE = {
    "type": "choice",
    "instructions": [{"type": "input_json", "data": {"of": ["the text"], "ask": "tone"}}],
    "choices": [{"value": "blame"}, {"value": True, "description": "all is well"}],
}
QUALITY = {"type": "score", "name": "quality", "levels": [{"label": one} for one in ("bad", "fair", "good")]}
SEVERITY = {"type": "score", "instructions": "How severe?", "levels": [{"label": "none"}, {"label": "much"}]}
ANY = {"type": "predicate", "name": "any", "instructions": "Is there any?"}
SURELY = {"type": "predicate", "name": "surely blamed"}
ALL = [PREDICATE, SURELY, ANY, TONE, QUALITY, SEVERITY]
TEXT = "a dull plot , but a good film"
KEY = "alice-has-a-long-key"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.toml"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def server(kinds: Path, file: Path) -> Iterator[Server]:
    with serving(kinds, flags=[FLAG], questions=file, default_model="tiny-int8") as running:
        yield running


def ask(server: Server, questions: Any, path: str = "/v1/decisions", **fields: Any) -> httpx.Response:
    given = {"state" if isinstance(questions, dict) else "input": TEXT} | fields
    return httpx.post(server.url + path, json=given | {"questions": questions})


def answers(server: Server, questions: Any, **fields: Any) -> Any:
    answer = ask(server, questions, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["answers"]


def classified(server: Server, model: str, text: str = TEXT, **options: Any) -> Any:
    body = {"input": text, "model": model, **options}
    return httpx.post(server.url + "/classify", json=body).json()["data"][0]


def test_each_question_is_answered_as_its_model_classifies(server: Server) -> None:
    own, full = (classified(server, "tiny-int8", **options) for options in ({}, {"tau": 0}))
    labels, value = classified(server, "labels"), classified(server, "value")["value"]
    blamed, surely, anything, tone, quality, severity = answers(server, ALL)
    near = pytest.approx
    assert blamed["probability"] == near(own["probs"][1], abs=1e-6) and blamed["name"] == "blamed"
    assert surely["probability"] == near(full["probs"][1], abs=1e-6)
    assert anything["probability"] == near(max(labels["probs"][0], labels["probs"][2]), abs=1e-6)
    safe = next(one["probability"] for one in tone["probabilities"] if one["value"] is True)
    assert safe == near(
        full["probs"][0], abs=1e-6
    )  # a flag at 0.7 does not say which of two is more probable
    assert tone["choice"] == (True if full["label"] == "safe" else "blame") and tone["name"] is None
    clamped = min(max(value, -1), 0.5)
    assert sum(p * at for p, at in zip(_probs(quality), (-1, 0, 0.5), strict=True)) == near(clamped, abs=1e-5)
    assert [one["label"] for one in quality["probabilities"]] == ["bad", "fair", "good"]
    assert severity["score"] == near(full["probs"][1], abs=1e-6)


def _probs(answer: Any) -> list[float]:
    return [one["probability"] for one in answer["probabilities"]]


def test_both_forms_give_the_same_answers_and_an_id_changes_none(server: Server) -> None:
    asked = {
        "x": {"type": "noul", "instructions": "Does it blame?", "criteria": None},
        "blamed": {
            "type": "choice",
            "instructions": {"of": ["the text"], "ask": "tone"},
            "criteria": {"safe": None, "blame": None},
        },
        "": {},
        "severity": {"type": "score", "instructions": "How severe?", "criteria": ["none", "much"]},
    }
    del asked[""]
    blamed, _, _, tone, _, severity = answers(server, ALL)
    for path in ("/v1/systemone", "/v1/decisions"):
        found = answers(server, asked, path=path)
        assert found["x"]["noul"] == blamed["probability"]
        assert found["x"]["x_exit"] == blamed["x_exit"]
        assert found["blamed"]["probabilities"]["blame"] == _probs(tone)[0]
        assert found["severity"]["score"] == severity["score"]
        assert found["severity"]["legend"] == {"0": "none", "1": "much"}
        assert found["severity"]["confidence"] == severity["confidence"]
    renamed = answers(server, {"any": asked["x"]})
    assert renamed["any"] == found["x"]


def test_exits_hold_only_for_answers_that_they_promise(server: Server) -> None:
    """A predicate's threshold must be that of the model's flag; otherwise all layers run, unless the client asks."""
    (own,) = answers(server, [SURELY], tau=1)
    assert own["x_exit"]["layer"] < own["x_exit"]["num_layers"], "the client's own tau holds"
    texts = ["a good film", "a lovely scene", "superb and charming and fine"]
    found = [answers(server, ALL, input=text) for text in texts]
    for row in found:
        assert [row[i]["x_exit"]["layer"] for i in (1, 3, 5)] == [3, 3, 3]
    assert any(row[0]["x_exit"]["reason"] == "threshold" for row in found)


@pytest.mark.parametrize(
    ("labels", "threshold", "own", "keeps"),
    [
        (["blame"], 0.7, ("blame", 0.7), True),
        (None, 0.7, ("blame", 0.7), True),
        (["blame"], 0.5, ("blame", 0.7), False),
        (["safe"], 0.7, ("blame", 0.7), False),
        (["blame"], 0.5, None, True),
        (["blame"], 0.7, None, False),
    ],
)
def test_which_predicates_keep_the_promise_of_exits(
    server: Server, labels: list[str] | None, threshold: float, own: tuple[str, float] | None, keeps: bool
) -> None:
    from de3.runtime.flags import Wanted
    from de3.server.questions import Binding

    manifest = server.service.current("tiny-int8").model.manifest
    flag = None if own is None else Wanted([own[0]], own[1])
    binding = Binding(type="predicate", model="m", name="a", labels=labels, threshold=threshold)
    source = source_of(binding.question, binding, manifest, flag)
    assert source.keeps == keeps
    assert source.wanted == (None if keeps else Wanted(labels or ["blame"], threshold))


def test_a_model_answers_questions_that_its_labels_fit_without_a_file(server: Server) -> None:
    rows = httpx.get(server.url + "/v1/models").json()
    listed = {row["name"]: row["questions"] for row in rows["data"]}
    assert listed["value"] == listed["spans"] == []
    assert [row["name"] for row in listed["labels"]] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    flag, choice = listed["tiny-int8"]
    assert (flag["name"], flag["threshold"]) == ("blame", 0.7)
    assert {one["name"] for one in rows["models"]} == {row["id"] for row in rows["data"]}
    named = {"type": "predicate", "name": "blame", "instructions": "Is it?"}
    of_labels = {"type": "choice", "choices": [{"value": one} for one in reversed(choice["choices"])]}
    first, second = answers(server, [named, of_labels], model="tiny-int8")
    assert first["probability"] == answers(server, [PREDICATE])[0]["probability"]
    assert [one["value"] for one in second["probabilities"]] == ["blame", "safe"]
    asked = {"a": {"type": "noul", "instructions": "LABEL_1"}}
    assert "a" in answers(server, asked, model="labels")


def many(count: int, **more: Any) -> list[Any]:
    return [{"value": str(i), **more} for i in range(count)]


BROKEN: list[tuple[dict[str, Any], int, str]] = [
    ({"questions": []}, 422, "questions: has 0; 1 to 400"),
    ({"questions": [PREDICATE | {"name": f"{i}"} for i in range(401)]}, 422, "questions: has 401"),
    ({"questions": "a"}, 422, "questions: must be a list"),
    ({"questions": [1]}, 422, "questions[0]: must be an object"),
    ({"questions": [PREDICATE, PREDICATE]}, 422, "questions[1].name: 'blamed' is that of questions[0]"),
    ({"questions": [PREDICATE | {"name": ""}]}, 422, "questions[0].name: must be"),
    ({"questions": [{"name": "blamed"}]}, 422, "questions[0].type: must be predicate, choice or score"),
    ({"questions": [PREDICATE | {"type": "noul"}]}, 422, "questions[0].type: must be predicate"),
    ({"questions": [TONE | {"name": "blamed"}]}, 422, "questions[0].type: 'blamed' is a predicate"),
    ({"questions": [ANY, TONE | {"choices": many(256)}]}, 422, "questions[1].choices: has 256; 2 to 255"),
    ({"questions": [TONE | {"choices": many(1)}]}, 422, "questions[0].choices: has 1"),
    (
        {"questions": [TONE | {"choices": [{"value": 1}, {"value": "a"}]}]},
        422,
        "questions[0].choices[0].value: m",
    ),
    (
        {"questions": [TONE | {"choices": many(2) + many(1)}]},
        422,
        "questions[0].choices[2].value: is that of",
    ),
    (
        {"questions": [TONE | {"choices": many(2, description=1)}]},
        422,
        "questions[0].choices[0].description: ",
    ),
    ({"questions": [QUALITY | {"levels": [{"label": True}] * 2}]}, 422, "questions[0].levels[0].label: must"),
    (
        {"questions": [QUALITY | {"levels": [{"label": "a"}, {"label": "b"}]}]},
        422,
        "questions[0].levels: must be bad, fair",
    ),
    (
        {"questions": [SEVERITY | {"levels": [{"label": str(i)} for i in range(11)]}]},
        422,
        "questions[0].levels",
    ),
    (
        {"questions": [{"type": "predicate", "instructions": "Is it?"}]},
        422,
        "questions[0]: no model is bound",
    ),
    ({"questions": [TONE | {"choices": many(2)}]}, 422, "questions[0]: no model is bound"),
    ({"input": ""}, 422, "input: must not be empty"),
    ({"input": 1}, 422, "input: must be a text"),
    ({"input": [{"role": "user"}]}, 422, "input[0]: must be a message"),
    ({"input": [{"type": "function_call", "name": "a"}]}, 422, "input[0]: must be a message"),
    (
        {"input": [{"content": "a"}, {"content": [{"type": "input_image", "image_url": "a"}]}]},
        422,
        "input[1].content[0].type: must be input_text, output_text or input_json",
    ),
    ({"input": [{"content": [{"type": "input_json", "data": "a"}]}]}, 422, "input[0].content[0].data: must"),
    ({"temperature": 0}, 422, "temperature: unknown field"),
    ({"tau": 2}, 422, "tau: "),
    ({"thresholds": 0.9}, 422, "thresholds: is that of the model"),
    ({"model": "other"}, 404, "model: no model 'other' is served"),
    ({"model": "spans", "questions": [{"type": "predicate", "name": "X"}]}, 422, "questions[0]: no model"),
]


@pytest.mark.parametrize(("fields", "status", "says"), BROKEN, ids=[says for _, _, says in BROKEN])
def test_errors_name_the_field(server: Server, fields: dict[str, Any], status: int, says: str) -> None:
    body = {"input": TEXT, "questions": [PREDICATE], "model": "tiny-int8"} | fields
    answer = httpx.post(server.url + "/v1/decisions", content=json.dumps(body))
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"].startswith(says)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"questions": {}}, "questions: has 0"),
        ({"questions": {"": {"type": "noul"}}}, "questions: has an empty id"),
        ({"questions": {"a": {"type": "boolean"}}}, "questions.a.type: must be noul, choice or score"),
        ({"questions": {"a": {"type": "noul", "criteria": {"yes": "a"}}}}, "questions.a.criteria: must be"),
        ({"questions": {"a": {"type": "choice", "criteria": {"b": None}}}}, "questions.a.criteria: has 1"),
        (
            {"questions": {"a": {"type": "choice", "criteria": {"b": 1, "c": None}}}},
            "questions.a.criteria.b: ",
        ),
        (
            {"questions": {"a": {"type": "score", "criteria": {"0": "b"}}}},
            "questions.a.criteria: must be a list",
        ),
        ({"questions": {"a": {"type": "score", "criteria": ["b", None]}}}, "questions.a.criteria[1]: must"),
        ({"questions": {"a": {"type": "noul", "instructions": 1}}}, "questions.a.instructions: must be"),
        ({"state": None}, "state: must be a text, an object or an array"),
        ({"state": {"a": 2**70}}, "state: has an integer of more than 64 bits"),
    ],
    ids=str,
)
def test_errors_of_system_one_have_its_form(server: Server, fields: dict[str, Any], says: str) -> None:
    body = {"state": TEXT, "questions": {"a": {"type": "noul", "instructions": "Does it blame?"}}, "more": 1}
    answer = httpx.post(server.url + "/v1/systemone", json=body | fields)
    assert answer.status_code == 422, answer.text
    (detail,) = answer.json()["detail"]
    assert detail["msg"].startswith(says) and detail["loc"][0] == "body"


def test_large_deep_and_compressed_bodies(server: Server) -> None:
    def post(content: bytes, **headers: str) -> httpx.Response:
        return httpx.post(server.url + "/v1/systemone", content=content, headers=headers)

    asked = b', "questions": {"a": {"type": "noul", "instructions": "Does it blame?"}}}'
    assert post(b'{"state": {"a": "' + b"b" * 10_000_000 + b'"}' + asked).status_code == 413
    deep = post(b'{"state": ' + b"[" * 5000 + b"]" * 5000 + asked)
    assert deep.status_code == 400 and "detail" in deep.json()
    small = b'{"state": "a good film"' + asked
    packed = zstandard.compress(small)
    assert post(packed).json() == post(small).json()
    assert post(zstandard.compress(b" " * 2**30 + small)).status_code == 413
    assert post(packed[:-4]).status_code in (400, 422)
    assert post(b"\x1f\x8b" + packed).status_code == 415


def test_texts_longer_than_a_model_takes_are_read_in_windows_or_refused(server: Server) -> None:
    long = "a good film " * 60
    (whole,) = answers(server, [PREDICATE], input=long + "a dull and boring mess , bad and awful " * 4)
    (start,) = answers(server, [PREDICATE], input=long)
    assert whole["probability"] > 0.7 > start["probability"] and not whole["x_truncated"]
    (cut,) = answers(server, [PREDICATE], input=long, long="truncate")
    assert cut["x_truncated"]
    refused = ask(server, [PREDICATE], input=long * 30)
    assert refused.status_code == 422 and refused.json()["error"]["message"].startswith(
        "input: has more than"
    )


def test_the_parts_of_messages_are_one_text(server: Server) -> None:
    parts = [
        {"role": "system", "content": "a dull plot"},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "it is"},
                {"type": "input_json", "data": {"b": 1, "a": []}},
            ],
        },
        {"role": "assistant", "type": "message", "content": [{"type": "output_text", "text": "good"}]},
    ]
    joined = 'a dull plot\n\nit is\n\n{"a":[],"b":1}\n\ngood'
    assert answers(server, ALL, input=parts) == answers(server, ALL, input=joined)


def test_the_client_of_openai(server: Server) -> None:
    client = openai.OpenAI(api_key="none", base_url=server.url + "/v1")
    found = client.decisions.create(
        model="tiny-int8", input=TEXT, questions=ALL, safety_identifier="a", prompt_cache_key="b"
    )
    assert [one.type for one in found.answers] == [one["type"] for one in ALL]
    assert found.answers[0].probability == answers(server, [PREDICATE])[0]["probability"]
    assert found.usage.total_tokens == found.usage.input_tokens > 0
    with pytest.raises(openai.UnprocessableEntityError, match="questions"):
        client.decisions.create(model="tiny-int8", input=TEXT, questions=[])


def test_keys_and_rates_count_each_question(kinds: Path, file: Path) -> None:
    options: dict[str, Any] = {"api_keys": f"alice {KEY}", "rate_limit": "8/hour", "questions": file}
    with serving(kinds, flags=[FLAG], **options) as server:

        def post(path: str, body: Any, key: str = KEY) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.post(server.url + path, json=body, headers=headers)

        wrong = post("/v1/systemone", {}, "wrong")
        assert wrong.status_code == 401 and wrong.json()["detail"]["error_type"] == "authentication_error"
        body = {"input": TEXT, "questions": ALL}
        assert post("/v1/decisions", body).status_code == 200
        limited = post("/v1/decisions", body)
        assert limited.status_code == 429 and "retry-after" in limited.headers
        assert limited.json()["error"]["type"] == "RateLimitError"
        other = post(
            "/v1/systemone", {"state": TEXT, "questions": {str(i): {"type": "noul"} for i in range(9)}}
        )
        assert other.json()["detail"]["error_type"] == "rate_limit_error"


WRONG = [
    ("", "has neither questions nor upstream"),
    ("questions = 1", "questions: "),
    ('[[questions]]\ntype = "predicate"\nmodel = "labels"', "questions.0.name: is required"),
    (
        '[[questions]]\ntype = "predicate"\nmodel = "labels"\nname = "a"\nchoices = ["b", "c"]',
        "questions.0.choices",
    ),
    (
        '[[questions]]\ntype = "choice"\nmodel = "labels"\nname = "a"\nthreshold = 0.5',
        "questions.0.labels, thr",
    ),
    ('[[questions]]\ntype = "predicate"\nmodel = "labels"\nname = "a"\ncriteria = {yes = "b"}', "criteria"),
    (
        '[[questions]]\ntype = "choice"\nmodel = "m"\nname = "a"\nchoices = [{is = "b"}, "c"]',
        "questions.0.choices",
    ),
    (
        '[[questions]]\ntype = "choice"\nmodel = "m"\nname = "a"\nchoices = ["b", "b"]',
        "choices: two are the same",
    ),
    ('[[questions]]\ntype = "predicate"\nmodel = "labels"\nname = "a"\nlabel = "b"', "unknown field"),
    (
        FILE + '[[questions]]\ntype = "predicate"\nmodel = "labels"\nname = "any"',
        "another question has the name",
    ),
    (
        FILE + '[[questions]]\ntype = "predicate"\nmodel = "m"\ninstructions = "Does it blame?"',
        "instructions and",
    ),
    ('[[questions]]\ntype = "predicate"\nmodel = "m"\nname = "a"', "questions.0.model: m is not served"),
    (
        '[[questions]]\ntype = "predicate"\nmodel = "labels"\nname = "a"',
        "are required, as labels has no flag",
    ),
    ('[[questions]]\ntype = "predicate"\nmodel = "spans"\nname = "a"', "is a token classifier"),
    ('[[questions]]\ntype = "predicate"\nmodel = "value"\nname = "a"', "is a regression model"),
    ('[[questions]]\ntype = "predicate"\nmodel = "labels"\nname = "a"\nlabels = ["b"]', "'b' is not a label"),
    (
        '[[questions]]\ntype = "choice"\nmodel = "labels"\nname = "a"\nchoices = ["b", "c"]',
        "must be the labels of",
    ),
    (
        '[[questions]]\ntype = "score"\nmodel = "value"\nname = "a"\nlevels = [{label = "b", is = 1}, "c"]',
        "number",
    ),
    (
        '[upstream]\nkind = "chat"\nurl = "https://a"\nmodel = "b"\nprompt = "{text}"',
        "upstream.kind: must be",
    ),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[says for _, says in WRONG])
def test_a_file_that_is_wrong_is_refused_at_the_start(
    kinds: Path, tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "questions.toml"
    path.write_text(text)
    settings = Settings(store=kinds, questions=path)
    from de3.model_store.store import Store

    manifests = [Store(kinds).open(name).manifest for name in ("labels", "value", "spans", "tiny-int8")]
    with pytest.raises(ValueError, match="questions") as error:
        _check_questions(settings, manifests)
    assert says in str(error.value)


def test_a_slow_binding_is_named_at_the_start(
    kinds: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from de3.model_store.store import Store

    manifests = [Store(kinds).open(name).manifest for name in ("labels", "value", "tiny-int8")]
    _check_questions(Settings(store=kinds, questions=file, flags=[FLAG]), manifests)
    slow = [one for one in caplog.messages if "full depth" in one]
    assert "questions.1" in slow[0] and "--flag tiny-int8=blame@0.9" in slow[0] and "questions.3" in slow[1]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=10, unique=True), st.floats(-200, 200))
def test_a_value_is_divided_between_the_two_nearest_levels(points: list[float], value: float) -> None:
    points.sort()
    probs = _between(value, points)
    assert sum(p > 0 for p in probs) <= 2 and sum(probs) == pytest.approx(1)
    clamped = min(max(value, points[0]), points[-1])
    assert sum(p * at for p, at in zip(probs, points, strict=True)) == pytest.approx(clamped, abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10).filter(any))
def test_scores_and_confidences_are_within_their_bounds(weights: list[float]) -> None:
    probs = [one / sum(weights) for one in weights]
    options = [Option(str(i)) for i in range(len(probs))]
    for form in ("decisions", "systemone"):
        score = answer_row(form, Question("score", None, options), probs)  # type: ignore[arg-type]
        assert 0 <= score["score"] <= len(probs) - 1 and 0 <= score["confidence"] <= 1
        choice = answer_row(form, Question("choice", None, options), probs)  # type: ignore[arg-type]
        assert 0 <= choice["confidence"] <= 1
        assert probs[int(choice["choice"])] == max(probs)


class Decisions:
    """A decision server, which is sure of the label that `opinion` gives, and refuses what it is told to."""

    def __init__(self, form: str) -> None:
        self.form, self.refuses = form, ""
        self.service = Service(opinion)
        self.service.respond = self._respond
        self.url = self.service.url.replace("/v1/chat/completions", f"/v1/{form}")

    def _respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        state = json.dumps(body["state"] if self.form == "systemone" else body["input"])
        asked = body["questions"]
        rows = asked.values() if isinstance(asked, dict) else asked
        found = [self._answer(opinion(state.strip('"')), row) for row in rows]
        given: Any = dict(zip(asked, found, strict=True)) if isinstance(asked, dict) else found
        content = json.dumps({"model": "m", "answers": given, "usage": {"input_tokens": 7}}).encode()
        handler.send_response(200)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _answer(self, label: str, row: Any) -> Any:
        if self.refuses and row.get("instructions") == self.refuses:
            return {"type": "refusal"}
        kind = row["type"]
        if kind in ("noul", "predicate"):
            return {"type": kind, "noul" if kind == "noul" else "probability": 0.25}
        if kind == "choice" and self.form == "systemone":
            return {"type": kind, "probabilities": {one: float(one == label) for one in row["criteria"]}}
        if kind == "choice":
            probs = [
                {"value": one["value"], "probability": float(one["value"] == label)} for one in row["choices"]
            ]
            return {"type": kind, "probabilities": probs}
        count = len(row["criteria" if self.form == "systemone" else "levels"])
        if self.form == "systemone":
            return {"type": kind, "probabilities": {str(i): 1 / count for i in range(count)}}
        return {"type": kind, "probabilities": [{"value": i, "probability": 1 / count} for i in range(count)]}


@pytest.fixture(params=["decisions", "systemone"])
def decisions(request: pytest.FixtureRequest) -> Decisions:
    return Decisions(request.param)


def with_upstream(path: Path, decisions: Decisions) -> dict[str, Any]:
    """Settings of a server with these questions, and this upstream for others."""
    path.write_text(FILE + f'[upstream]\nkind = "{decisions.form}"\nurl = "{decisions.url}"\nmodel = "jev"\n')
    return {"questions": path, "upstreams": read_questions(path).upstreams, "flags": [FLAG]}


FUNNY = {"type": "predicate", "instructions": "Is it funny?"}
LEVELS = {
    "type": "score",
    "instructions": "How long?",
    "levels": [{"label": one} for one in ("a", "b", "c", "d")],
}


def test_what_no_model_is_bound_to_is_asked_of_a_decision_server(
    kinds: Path, tmp_path: Path, decisions: Decisions
) -> None:
    tone = {"type": "choice", "instructions": "Tone?", "choices": [{"value": one} for one in LABELS]}
    options = with_upstream(tmp_path / "questions.toml", decisions)
    with serving(kinds, default_model="tiny-int8", **options) as server:
        found = answers(server, [FUNNY, PREDICATE, tone, LEVELS], input="a good film")
        (sent,) = decisions.service.requests
        assert sent["model"] == "jev" and len(sent["questions"]) == 3
        assert [one["x_exit"]["reason"] == "upstream" for one in found] == [True, False, True, True]
        assert found[0]["probability"] == 0.25 and found[2]["choice"] == opinion("a good film")
        assert found[3]["score"] == pytest.approx(1.5) and found[3]["confidence"] == pytest.approx(0)
        decisions.refuses = "Is it funny?"
        alone = answers(server, [FUNNY | {"name": "funny"}])
        assert alone == [{"type": "refusal", "name": "funny"}]
        assert (
            answers(server, [PREDICATE])[0]["x_model"] == "tiny-int8:1"
            and len(decisions.service.requests) == 2
        )
        assert server.metric("de3_upstream_calls_total", model="questions", kind="uncertain") == 2
        decisions.service.is_broken = True
        decisions.service.respond = None
        failed = ask(server, [FUNNY, PREDICATE])
        assert failed.status_code == 502 and "questions: its upstream" in failed.json()["error"]["message"]
        assert answers(server, [PREDICATE])
        assert ask(server, [FUNNY], model="other").status_code == 404


def test_what_processes_tell_each_other_about_questions_is_whole() -> None:
    questions = [
        Question("score", {"a": [1]}, [Option("a", ["b"]), Option({"c": 1})], None, "questions[0]", "x")
    ]
    query = Query(Text("a"), "uncertain", "client", asked=Asked({"b": None}, questions))
    assert decode(Query, json.loads(encode(query))) == query
    reply = Reply(0, answers=[[0.5, 0.5], None])
    assert decode(Reply, json.loads(encode(reply))) == reply


def test_a_model_that_is_unloaded_answers_no_more_questions_and_again_once_it_is_loaded(
    kinds: Path, file: Path
) -> None:
    root = "root-has-a-long-key"
    options: dict[str, Any] = {"questions": file, "flags": [FLAG], "admin_keys": f"root {root}"}
    with serving(kinds, default_model="tiny-int8", **options) as server:

        def change(what: str) -> None:
            headers = {"authorization": f"Bearer {root}"}
            answer = httpx.post(f"{server.url}/v1/models/labels/{what}", json={}, headers=headers, timeout=60)
            assert answer.status_code == 200, answer.text

        before = answers(server, [ANY, PREDICATE])
        change("unload")
        gone = ask(server, [PREDICATE, ANY])
        assert gone.status_code == 404
        assert gone.json()["error"]["message"].startswith("questions[1].model: no model 'labels' is served")
        assert answers(server, [PREDICATE]) == before[1:]
        change("load")
        assert answers(server, [ANY, PREDICATE]) == before


def test_a_choice_of_a_text_and_a_boolean_of_one_name_is_not_sent_to_a_map(
    kinds: Path, tmp_path: Path
) -> None:
    options = with_upstream(tmp_path / "questions.toml", Decisions("systemone"))
    with serving(kinds, default_model="tiny-int8", **options) as server:
        answer = ask(server, [TONE | {"choices": [{"value": True}, {"value": "true"}]}])
        assert answer.status_code == 422 and answer.json()["error"]["param"] == "questions[0]"


def test_a_decision_server_is_the_last_layer_of_a_model(
    store: Path, tmp_path: Path, decisions: Decisions
) -> None:
    upstream = {"kind": decisions.form, "url": decisions.url, "model": "jev", "prompt": "What is its tone?"}
    of = model_of(tmp_path, LABELS, upstream | {"criteria": {"mixed": "both"}})
    with served(tmp_path, store, of) as server:
        for text in ("a good film", "a dull plot", "the scene"):
            row = classified(server, "tickets", text, tau=0)
            assert (row["label"], row["exit"]["reason"]) == (opinion(text), "upstream")
        assert "What is its tone?" in json.dumps(decisions.service.requests[0])


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"answers": []},
        {"answers": [1]},
        {"answers": [{"type": "choice"}]},
        {"answers": [{"type": "predicate", "probability": 1.5}]},
        {"answers": [{"type": "predicate", "probability": True}]},
        {"answers": [{"type": "predicate", "probability": "1"}]},
    ],
    ids=str,
)
def test_an_answer_of_a_decision_server_is_checked(content: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        probabilities_in("decisions", content, [Question("predicate")])


def test_probabilities_that_do_not_add_up_are_refused() -> None:
    question = Question("choice", None, [Option("a"), Option("b")])
    content = {"answers": {"0": {"type": "choice", "probabilities": {"a": 0.5, "b": 0.6}}}}
    with pytest.raises(ValueError, match="add up"):
        probabilities_in("systemone", content, [question])


def test_meanings_are_sent_in_both_forms() -> None:
    predicate = Question("predicate", None, [Option(True, {"a": 1}), Option(False, "no")])
    score = Question("score", ["How", "much?"], [Option("a", "little"), Option({"b": 1})])
    both: Sequence[Question] = [predicate, score]
    sent = body_of("systemone", {"text": "a"}, both)
    assert sent["questions"]["0"] == {"type": "noul", "criteria": {"true": {"a": 1}, "false": "no"}}
    assert sent["questions"]["1"]["criteria"] == ["a: little", {"b": 1}] and sent["state"] == {"text": "a"}
    sent = body_of("decisions", {"text": "a"}, both)
    assert (
        'Answer true if: {"a":1}' in sent["questions"][0]["instructions"] and sent["input"] == '{"text":"a"}'
    )
    assert sent["questions"][1]["levels"] == [{"label": "a", "description": "little"}, {"label": '{"b":1}'}]


def test_a_question_for_a_model_that_cannot_answer_it_any_more_is_refused(server: Server) -> None:
    """A version with other labels may have replaced that for which the file was checked."""
    from de3.server.questions import Binding

    binding = Binding(type="predicate", model="labels", name="a", labels=["gone"])
    manifest = server.service.current("labels").model.manifest
    with pytest.raises(RequestError, match="is not a label"):
        source_of(Question("predicate", where="questions[0]"), binding, manifest, None)
    assert Source().keeps
