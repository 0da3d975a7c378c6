"""Token classifiers in the protocols of other services, each with its client or a transcript of what it sends."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient

from de3.exits.spans import Layout, SpanRule, TokenReading
from de3.export.classifier import Stock, convert
from de3.model_store.store import Store
from de3.server.engine.request import Text
from de3.server.errors import RequestError
from de3.server.http import detectors, gliner, guardrail, hugging_face, moderations
from tests.fixtures import BAD, GOOD, installed, made_once, save_tokenizer
from tests.serving import Server, serving
from tests.test_guards import LITELLM, NEMO, output_of

# Labels of words in GOOD and the ending "s", of "not" after them, and of words in BAD.
LABELS = ["O", "B-PERSON", "I-PERSON", "B-CITY"]
TEXT = "😀 the Good not film,\r\nit was é dull and Bad warm"
FOUND = [("PERSON", "Good not"), ("CITY", "dull"), ("CITY", "Bad"), ("PERSON", "warm")]
NOTHING = "the film and the plot"
CONTENTS, GUARDRAIL, EXTRACT = "/api/v1/text/contents", "/beta/litellm_basic_guardrail_api", "/v1/extract"
PARAMETERS = "additional_provider_specific_params"


def save_finder(folder: Path) -> None:
    """Save a token classifier with a random encoder, whose head is fitted to the labels of words."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

    torch.manual_seed(5)
    size = save_tokenizer(folder)
    config = BertConfig(
        vocab_size=size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABELS)),
        label2id={label: k for k, label in enumerate(LABELS)},
    )
    model = BertForTokenClassification(config).eval()
    model.bert.embeddings.word_embeddings.weight.data *= 10  # words count more than their positions
    words = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(range(size))
    labels = torch.tensor(
        [1 if w in (*GOOD, "##s") else 3 if w in BAD else 2 if w == "not" else 0 for w in words]
    )
    ids = torch.cat([torch.full((200, 1), 2), torch.randint(1, size, (200, 30)), torch.full((200, 1), 3)], 1)
    with torch.no_grad():
        states = model.bert(ids).last_hidden_state.reshape(-1, 64).double()
        wanted = torch.nn.functional.one_hot(labels[ids].reshape(-1), 4).double() * 5
        found = torch.linalg.lstsq(torch.cat([states, torch.ones(len(states), 1)], 1), wanted).solution
        model.classifier.weight.copy_(found[:-1].T)
        model.classifier.bias.copy_(found[-1])
        assert (model(ids).logits.argmax(-1) == labels[ids]).all()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint_of_finder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "finder", save_finder)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, store: Path, checkpoint_of_finder: Path) -> Path:
    """A store with a classifier, tiny, and two equal token classifiers, finder and another."""

    def make(folder: Path) -> None:
        shutil.copytree(store / "tiny", folder / "tiny")
        for name in ("finder", "another"):
            convert(Stock.open(name, checkpoint_of_finder), Store(folder), name, "fp32")

    return made_once(tmp_path_factory, "finder-store", make)


@pytest.fixture(scope="module")
def server(both: Path) -> Iterator[Server]:
    with serving(both, models=["finder"], max_texts=8) as running:
        yield running


@pytest.fixture(scope="module")
def server_of_both(both: Path) -> Iterator[Server]:
    with serving(both, models=["tiny", "finder"], default_model=None, aliases=["texts=tiny"]) as running:
        running.service.models.default = None  # as if the models were found in the store
        yield running


def post(server: Server, path: str, body: Any) -> Any:
    answer = httpx.post(server.url + path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def places(text: str, found: list[tuple[str, str]]) -> list[tuple[str, int, int]]:
    """The label and the characters of each span. found: the label and the text of each."""
    starts = [text.index(part) for _, part in found]
    return [(label, start, start + len(part)) for start, (label, part) in zip(starts, found, strict=True)]


def spans_of(server: Server, text: str) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = post(server, "/classify", {"input": text})["data"][0]["spans"]
    return spans


def message_of(answer: httpx.Response) -> str:
    assert answer.status_code == 422, answer.text
    body = answer.json()
    error = body.get("error", body)
    message: str = error["message"] if isinstance(error, dict) else error
    return message


def test_the_model_finds_what_its_head_was_fitted_to(server: Server) -> None:
    spans = spans_of(server, TEXT)
    assert [(one["label"], one["start"], one["end"]) for one in spans] == places(TEXT, FOUND)


def test_parts_of_a_word_are_redacted_together(server: Server) -> None:
    parts = spans_of(server, "a goods")
    assert [one["text"] for one in parts] == ["good", "s"]
    for least in (0, parts[0]["score"] - 1e-6):  # the score of the longest part counts
        (row,) = post(server, "/classify", {"input": "a goods", "redact": True, "min_score": least})["data"]
        assert row["text"] == "a [PERSON]"
        assert [(one["start"], one["end"], one["score"]) for one in row["spans"]] == [
            (2, 7, parts[0]["score"])
        ]
    more = {"input": "a goods", "redact": True, "min_score": max(one["score"] for one in parts) + 1e-6}
    assert post(server, "/classify", more)["data"][0]["text"] == "a goods"


# Hugging Face


@pytest.mark.parametrize("strategy", [None, "none", "simple", "first", "average", "max"])
def test_hugging_faces_client_gets_what_transformers_finds(
    server: Server, checkpoint_of_finder: Path, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import pipeline

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # fixtures.py sets it
    chosen = {} if strategy is None else {"aggregation_strategy": strategy}
    ours = InferenceClient(server.url).token_classification(TEXT, stride=8, **chosen)
    find = pipeline("token-classification", str(checkpoint_of_finder), device="cpu")
    theirs = find(TEXT, **{"aggregation_strategy": "simple"} | chosen)
    assert len(ours) == len(theirs) == len(FOUND) + (strategy == "none")
    for one, other in zip(ours, theirs, strict=True):
        assert (one.start, one.end, one.word) == (other["start"], other["end"], TEXT[one.start : one.end])
        assert (one.entity, one.entity_group) == (other.get("entity"), other.get("entity_group"))
        assert one.score == pytest.approx(other["score"], abs=1e-3)  # a fitted head has large weights


def test_hugging_faces_client_ignores_labels(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    client = InferenceClient(server.url)
    found = client.token_classification(TEXT, ignore_labels=["O", "PERSON"])
    assert [(one.entity_group, one.word) for one in found] == [one for one in FOUND if one[0] == "CITY"]
    everything = client.token_classification(TEXT, ignore_labels=[])  # then even O is not ignored
    assert [one.entity_group for one in everything if one.entity_group != "O"] == [
        label for label, _ in FOUND
    ]
    assert any(one.entity_group == "O" for one in everything)


def test_a_text_gets_a_list_and_a_list_gets_a_list_of_lists(server: Server) -> None:
    for path in ("/", "/classify"):
        one = post(server, path, {"inputs": TEXT})
        assert [row["word"] for row in one] == [part for _, part in FOUND]
        assert post(server, path, {"inputs": [TEXT]}) == [one]
        assert post(server, path, {"inputs": [NOTHING, TEXT]}) == [[], one]


@pytest.mark.parametrize(
    ("model", "parameters", "says"),
    [
        (
            "tiny",
            {"aggregation_strategy": "simple"},
            "aggregation_strategy: tiny:1 is not a token classifier",
        ),
        ("tiny", {"ignore_labels": ["O"]}, "ignore_labels: tiny:1 is not a token classifier"),
        ("tiny", {"stride": 4}, "stride: tiny:1 is not a token classifier"),
        ("finder", {"top_k": 1}, "top_k: finder:1 is a token classifier: a text has no probabilities"),
        ("finder", {"function_to_apply": "sigmoid"}, "function_to_apply: finder:1 is a token classifier"),
        (
            "finder",
            {"ignore_labels": ["B-PERSON"]},
            "ignore_labels: finder:1 finds no 'B-PERSON'; it finds CITY, P",
        ),
        (
            "finder",
            {"aggregation_strategy": "last"},
            "aggregation_strategy: input should be 'none', 'simple', ",
        ),
        ("finder", {"stride": -1}, "stride: input should be greater than or equal to 0"),
    ],
)
def test_parameters_of_the_other_task_are_refused(
    server_of_both: Server, model: str, parameters: dict[str, Any], says: str
) -> None:
    for path in ("/", "/classify"):
        body = {"inputs": TEXT, "model": model, "parameters": parameters}
        answer = httpx.post(server_of_both.url + path, json=body)
        assert answer.status_code == 422 and says in answer.text, answer.text


# vLLM's semantic router


def accepted(text: str, body: bytes, labels: set[str]) -> list[tuple[str, int, int]]:
    """The spans that the router accepts; fails the test where it would reject the response.

    As decodeTokenSpansResponse and alignTokenSpans in src/semantic-router/pkg/classification/http_token_classifier.go.
    """
    spans = json.loads(body)
    assert isinstance(spans, list)  # or an object with spans
    found = []
    for span in spans:
        label = span["entity_group"].removeprefix("B-").removeprefix("I-")
        assert label in labels and label != "O"
        assert 0 <= span["start"] < span["end"] <= len(text)
        assert span["word"] == text[span["start"] : span["end"]]
        assert 0 <= span["score"] <= 1
        found.append((label, span["start"], span["end"]))
    assert len(set(found)) == len(found)
    return found


@pytest.mark.parametrize(
    "text", [TEXT, NOTHING, "e\u0301 good \u200b🇩🇪 du\u200bll\x00 bad", f"{NOTHING} " * 20 + "good"]
)
def test_the_semantic_routers_contract_token_spans(server: Server, text: str) -> None:
    """The request is the router's httpClassifyRequest, {"inputs": text}; `accepted` parses answers as it does."""
    answer = httpx.post(f"{server.url}/classify", content=json.dumps({"inputs": text}))
    expected = [
        (m[0].lower() in GOOD, *m.span())
        for m in re.finditer(r"good( not)?|du\u200b?ll|bad|warm", text, re.I)
    ]
    found = accepted(text, answer.content, {"PERSON", "CITY"})
    assert [one[1:] for one in found] == [one[1:] for one in expected]


def test_spans_that_the_router_would_refuse_are_left_out() -> None:
    """Tokenizers of bytes make several tokens of one emoji, and a token may have no characters."""
    offsets = np.array([[0, 1], [0, 1], [1, 1], [1, 2]], np.int32)
    logits = np.zeros((4, 2), np.float32)
    logits[:, 1] = 3, 3, 3, 4
    layout = Layout(offsets, np.zeros(4, bool), np.zeros(4, bool))
    tokens = TokenReading(logits, layout, SpanRule(("O", "B-X")))
    outcome = SimpleNamespace(
        reading=SimpleNamespace(tokens=tokens), windows=(), num_windows=1, reason="threshold"
    )
    item: Any = SimpleNamespace(text=Text("😀a"), outcome=outcome)
    assert [(one["word"], one["start"]) for one in hugging_face._entities(item)] == [("😀", 0), ("a", 1)]


# FMS Guardrails' detectors


def test_spans_are_detections(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "MAX_CHARS", 10)  # the limit on texts that are repeated for each label
    rows = post(server, CONTENTS, {"contents": [NOTHING, TEXT], "detector_params": {}})
    spans = spans_of(server, TEXT)
    assert rows == [
        [],
        [
            {"start": s["start"], "end": s["end"], "text": s["text"], "score": s["score"]}
            | {"detection": s["label"], "detection_type": s["label"]}
            for s in spans
        ],
    ]
    assert post(server, CONTENTS, {"contents": [NOTHING]}) == [[]]
    least = sorted(s["score"] for s in spans)[1]
    for params, kept in (
        ({"labels": ["CITY"]}, [s for s in spans if s["label"] == "CITY"]),
        ({"threshold": least - 1e-6}, [s for s in spans if s["score"] >= least]),  # scores are rounded
    ):
        (row,) = post(server, CONTENTS, {"contents": [TEXT], "detector_params": params})
        assert [one["start"] for one in row] == [one["start"] for one in kept], params


# LiteLLM's generic guardrail


def guarded(server: Server, texts: Any, **params: Any) -> Any:
    sent = {"input_type": "request", "texts": texts, "request_data": {}, "images": None, "tools": None}
    return post(server, GUARDRAIL, sent | {"litellm_version": "9", PARAMETERS: params})


def test_litellms_guardrail_redacts_or_blocks(server: Server) -> None:
    """The answers that GenericGuardrailAPIResponse.from_dict reads, in LiteLLM's types of the generic guardrail API."""
    redacted = "😀 the [PERSON] film,\r\nit was é [CITY] and [CITY] [PERSON]"
    sent = ["", TEXT, " \n", NOTHING]
    done = guarded(server, sent)
    assert done == {"action": "GUARDRAIL_INTERVENED", "texts": ["", redacted, " \n", NOTHING]}
    assert guarded(server, sent, policy="redact") == done
    for nothing in (None, [], ["", " "], [NOTHING]):
        assert guarded(server, nothing) == {"action": "NONE"}
    cities = guarded(server, [TEXT], labels=["CITY"])
    assert cities["texts"] == [redacted.replace("[PERSON] film", "Good not film").replace("[PERSON]", "warm")]
    first, *_, best = sorted(spans_of(server, TEXT), key=lambda one: one["score"])
    reason = f"{best['label']} with probability {best['score']:.2f}, by finder:1"
    assert guarded(server, sent, policy="block") == {"action": "BLOCKED", "blocked_reason": reason}
    assert guarded(server, [NOTHING], policy="block") == {"action": "NONE"}
    some = guarded(server, [TEXT], threshold=first["score"] + 1e-6)["texts"]  # scores are rounded
    assert some[0].count("[") == len(FOUND) - 1


# NeMo Guardrails' rail gliner


def extracted(server: Server, text: str, **fields: Any) -> Any:
    """The answer to a request as nemoguardrails/library/gliner/request.py: gliner_request sends it."""
    sent = {"text": text, "threshold": 0.5, "chunk_length": 384, "overlap": 128, "flat_ner": False}
    return post(server, EXTRACT, sent | fields)


def test_the_gliner_rails_server(server: Server) -> None:
    answer = extracted(server, TEXT)
    assert answer["tagged_text"] == (
        "😀 the [Good not](PERSON) film,\r\nit was é [dull](CITY) and [Bad](CITY) [warm](PERSON)"
    )
    assert answer["entities"] == [
        {"value": s["text"], "suggested_label": s["label"], "score": s["score"]}
        | {"start_position": s["start"], "end_position": s["end"]}
        for s in spans_of(server, TEXT)
    ]
    assert answer["total_entities"] == len(FOUND)
    some = extracted(server, TEXT, labels=["city"])  # NeMo's examples have labels in lower case
    assert {one["suggested_label"] for one in some["entities"]} == {"city"}
    assert [one["value"] for one in some["entities"]] == ["dull", "Bad"]
    assert extracted(server, TEXT, labels=[]) == answer
    # The model finds the parts of this word separately; the rail would write [PERSON][PERSON].
    assert [one["text"] for one in spans_of(server, "a goods")] == ["good", "s"]
    assert extracted(server, "a goods")["tagged_text"] == "a [goods](PERSON)"
    for nothing in ("", " \n", NOTHING):
        assert extracted(server, nothing) == {"entities": [], "total_entities": 0, "tagged_text": nothing}
    scores = [one["score"] for one in answer["entities"]]
    assert len(extracted(server, TEXT, threshold=min(scores) + 1e-6)["entities"]) == len(FOUND) - 1


# All of them


def bodies(text: str) -> dict[str, Any]:
    """A body of each protocol that can return spans."""
    return {
        "/": {"inputs": text},
        CONTENTS: {"contents": [text]},
        GUARDRAIL: {"texts": [text]},
        EXTRACT: {"text": text},
    }


@pytest.mark.parametrize("path", bodies(""))
def test_a_text_is_read_whole_or_refused(server: Server, path: str) -> None:
    long = f"{NOTHING} " * 60 + "good"
    assert "PERSON" in json.dumps(post(server, path, bodies(long)[path]))
    answer = httpx.post(server.url + path, json=bodies("good " + f"{NOTHING} " * 300)[path])
    assert re.search(r"has (more than )?\d+ tokens", message_of(answer)), answer.text
    cut = {"inputs": "good " + f"{NOTHING} " * 300, "parameters": {"truncation": True}}
    assert [one["word"] for one in post(server, "/", cut)] == ["good"]


@pytest.mark.parametrize(
    ("protocol", "request_type", "fields"),
    [
        (hugging_face, hugging_face.TaskRequest, {}),
        (detectors, detectors.ContentsRequest, {}),
        (guardrail, guardrail.GuardrailRequest, {"policy": "block"}),
        (gliner, gliner.ExtractRequest, {}),
    ],
)
def test_unread_windows_are_an_error(protocol: ModuleType, request_type: Any, fields: Any) -> None:
    layout = Layout(np.array([[0, 1]], np.int32), np.zeros(1, bool), np.zeros(1, bool))
    tokens = TokenReading(np.array([[1, 0]], np.float32), layout, SpanRule(("O", "X")))
    request = request_type([Text("a")], **fields)

    def job(ran: int, windows: int) -> Any:
        outcome = SimpleNamespace(
            reading=SimpleNamespace(tokens=tokens),
            windows=[None] * ran,
            num_windows=windows,
            reason="deadline",
        )
        manifest = SimpleNamespace(is_spans=True, labels=["O", "X"])
        item = SimpleNamespace(text=request.texts[0], outcome=outcome)
        model = SimpleNamespace(manifest=manifest)
        return SimpleNamespace(request=request, model=model, items=[item], outcomes=lambda: [outcome])

    with pytest.raises(RequestError, match=r"latency_budget_ms: only 1 of a text's 2 windows") as error:
        protocol.serialize("", job(1, 2))
    assert error.value.cause == "budget"
    protocol.serialize("", job(0, 1))  # a single window, which exited in time


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"query": "a", "texts": ["b"]}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/score", {"text_1": "a", "text_2": ["b"]}),
    ],
)
def test_protocols_without_spans_refuse_a_token_classifier(server: Server, path: str, body: Any) -> None:
    says = "model: finder:1 is a token classifier, and this protocol has no spans; use /classify"
    assert message_of(httpx.post(server.url + path, json=body)) == says


def test_open_inference_lists_no_outputs_of_a_token_classifier(server: Server) -> None:
    metadata = httpx.get(f"{server.url}/v2/models/finder").json()
    assert metadata["outputs"] == [] and [one["name"] for one in metadata["inputs"]] == ["text"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (
            CONTENTS,
            {"detector_params": {"safe_labels": ["O"]}},
            "detector_params: safe_labels: finder:1 is a token c",
        ),
        (
            CONTENTS,
            {"detector_params": {"labels": ["B"]}},
            "detector_params: labels: finder:1 finds no 'B'; it finds C",
        ),
        (
            CONTENTS,
            {"detector_params": {"labels": ["C"], "model": "tiny"}},
            "detector_params: labels: tiny:1 is not a to",
        ),
        (
            GUARDRAIL,
            {PARAMETERS: {"label": "CITY"}},
            f"{PARAMETERS}: label: finder:1 is a token classifier: give la",
        ),
        (GUARDRAIL, {PARAMETERS: {"labels": ["B"]}}, f"{PARAMETERS}: labels: finder:1 finds no 'B'"),
        (
            GUARDRAIL,
            {PARAMETERS: {"labels": ["B"], "model": "tiny"}},
            f"{PARAMETERS}: labels: tiny:1 is not a token",
        ),
        (
            GUARDRAIL,
            {PARAMETERS: {"policy": "redact", "model": "tiny"}},
            f"{PARAMETERS}: policy: tiny:1 is not a to",
        ),
        (GUARDRAIL, {PARAMETERS: {"policy": "mask"}}, "policy: input should be 'redact' or 'block'"),
        (EXTRACT, {"labels": ["IBAN"]}, "labels: finder:1 finds no 'IBAN'; it finds CITY, PERSON"),
        (EXTRACT, {"labels": ["", "CITY"]}, "labels: finder:1 finds no ''"),
        (EXTRACT, {"labels": ["O"]}, "labels: finder:1 finds no 'O'"),
        (EXTRACT, {"model": "tiny"}, "model: tiny:1 is not a token classifier: it finds no entities"),
        (EXTRACT, {"text": 1}, "text: must be a text"),
        (EXTRACT, {"threshold": 2}, "threshold: input should be less than or equal to 1"),
    ],
)
def test_errors_name_the_field(server_of_both: Server, path: str, body: Any, says: str) -> None:
    named = {CONTENTS: "detector_params", GUARDRAIL: PARAMETERS}.get(path)
    inner = body[named] if named else body
    inner.setdefault("model", "finder")
    answer = httpx.post(server_of_both.url + path, json=bodies(TEXT)[path] | body)
    assert message_of(answer).startswith(says), answer.text
    assert "Good" not in answer.text
    error = answer.json().get("error", {})
    if "param" in error:
        assert error["param"] == says.partition(":")[0]


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/", {"parameters": {"aggregation_strategy": "first"}}, "finder"),
        ("/", {"parameters": {"stride": 1}}, "finder"),
        ("/", {"parameters": {"top_k": 1}}, "tiny"),
        ("/", {}, None),
        ("/classify", {"input": TEXT, "redact": True}, "finder"),
        ("/classify", {"input": TEXT}, None),
        ("/classify", {"text": TEXT}, "tiny"),
        ("/predict", {"inputs": TEXT}, "tiny"),
        ("/v1/moderations", {"input": TEXT}, "tiny"),
        (CONTENTS, {}, None),
        (CONTENTS, {"detector_params": {"labels": ["CITY"]}}, "finder"),
        (CONTENTS, {"detector_params": {"safe_labels": ["negative"]}}, "tiny"),
        (GUARDRAIL, {PARAMETERS: {}}, None),
        (GUARDRAIL, {PARAMETERS: {"policy": "redact"}}, "finder"),
        (GUARDRAIL, {PARAMETERS: {"labels": ["CITY"]}}, "finder"),
        (GUARDRAIL, {PARAMETERS: {"label": "positive"}}, "tiny"),
        (EXTRACT, {}, "finder"),
    ],
)
def test_a_request_without_a_model_goes_to_the_one_that_can_answer(
    server_of_both: Server, path: str, body: Any, model: str | None
) -> None:
    before = {
        name: server_of_both.metric("de3_tokens_total", model=f"{name}:1") for name in ("tiny", "finder")
    }
    answer = httpx.post(server_of_both.url + path, json=bodies(TEXT).get(path, {}) | body)
    if model is None:
        assert message_of(answer).startswith("model: is required, as several are served: tiny, finder")
        return
    assert answer.status_code == 200, answer.text
    after = {name: server_of_both.metric("de3_tokens_total", model=f"{name}:1") for name in before}
    assert [name for name in before if after[name] > before[name]] == [model]


def test_one_token_classifier_does_not_answer_in_place_of_another(both: Path) -> None:
    with serving(both, models=["finder", "another"]) as running:
        for path in (CONTENTS, GUARDRAIL, EXTRACT):
            answer = httpx.post(running.url + path, json=bodies(TEXT)[path])
            assert message_of(answer).startswith("model: is required, as several are served: finder, another")


def test_no_token_classifier_answers_moderations(both: Path) -> None:
    """Not even one of two labels."""
    manifest = Store(both).open("finder").manifest.model_copy(update={"labels": ["O", "B-PERSON"]})
    assert not moderations.ModerationRequest([Text("a")]).fits(manifest)


# The clients themselves

RAIL = """
import asyncio, json, sys
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.library.gliner.actions import gliner_mask_pii
from nemoguardrails.testing.fake_model import FakeLLMModel

url, texts = sys.argv[1], json.loads(sys.argv[2])

def config(entities):
    return RailsConfig.from_content(yaml_content=f'''
rails:
  config:
    gliner: {{server_endpoint: "{url}/v1/extract", threshold: 0.5, input: {{entities: {json.dumps(entities)}}}}}
  input:
    flows: [gliner detect pii on input]
''')

def masked(text, entities):
    done = asyncio.run(gliner_mask_pii(source="input", text=text, config=config(entities)))
    return done.metadata["masked_text"]

said = []
for text in texts:
    rails = LLMRails(config([]), llm=FakeLLMModel(responses=["an answer"]))
    said.append(rails.generate(messages=[{"role": "user", "content": text}])["content"])
print(json.dumps([said, [masked(texts[0], []), masked(texts[0], ["city"])]]))
"""


@pytest.mark.slow
def test_the_gliner_rail_of_nemo_guardrails_blocks_and_masks(server: Server, tmp_path: Path) -> None:
    site = installed(tmp_path / "nemoguardrails", NEMO)
    said, masked = json.loads(output_of(RAIL, site, server, ["good not , good and dull", NOTHING]))
    assert said == ["I'm sorry, I can't respond to that.", "an answer"]
    assert masked == ["[PERSON] , [PERSON] and [CITY]", "good not , good and [CITY]"]


PROXY = """
import asyncio, json, sys
from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api.generic_guardrail_api import GenericGuardrailAPI

url, texts = sys.argv[1], json.loads(sys.argv[2])

async def said(**params):
    guard = GenericGuardrailAPI(api_base=url, additional_provider_specific_params=params)
    try:
        return (await guard.apply_guardrail({"texts": texts}, {}, "request"))["texts"]
    except Exception as error:
        return str(error)

async def main():
    return [await said(), await said(labels=["CITY"]), await said(policy="block"), await said(labels=["x"])]

print(json.dumps(asyncio.run(main())))
"""


@pytest.mark.slow
def test_litellm_redacts_or_blocks(server: Server, tmp_path: Path) -> None:
    site = installed(tmp_path / "litellm", LITELLM)
    texts = ["", "good not , dull", NOTHING]
    redacted, cities, blocked, failed = json.loads(output_of(PROXY, site, server, texts))
    assert redacted == ["", "[PERSON] , [CITY]", NOTHING]
    assert cities == ["", "good not , [CITY]", NOTHING]
    assert re.search(r"(PERSON|CITY) with probability [01]\.\d\d, by finder:1$", blocked)
    assert "422" in failed  # it fails closed
