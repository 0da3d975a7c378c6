"""Token classifiers in the protocols of other services, and clients that block or redact texts."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient

from de3.exits.kinds import Spans
from de3.exits.spans import Layout, SpanRule
from de3.export.classifier import Stock, convert
from de3.model_store.store import Store
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.request import Text
from de3.runtime.errors import RequestError
from de3.server.http import detectors, gliner, guardrail, hugging_face
from tests.fixtures import BAD, GOOD, installed, made_once, save_encoder
from tests.serving import Server, serving

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

    config = BertConfig.from_pretrained(save_encoder(folder, layers=2, tags=LABELS))
    torch.manual_seed(5)
    model, size = BertForTokenClassification(config).eval(), config.vocab_size
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


def finders(store: Path) -> Path:
    """A store with a classifier, tiny, and two equal token classifiers, finder and another."""

    def make(folder: Path) -> None:
        shutil.copytree(store / "tiny", folder / "tiny")
        (folder / ".stock").mkdir()
        save_finder(folder / ".stock")
        for name in ("finder", "another"):
            convert(Stock.open(name, folder / ".stock"), Store(folder), name, "fp32")

    return made_once("finder-store", make)


@pytest.fixture(scope="module")
def both(store: Path) -> Path:
    return finders(store)


@pytest.fixture(scope="module")
def server(both: Path) -> Iterator[Server]:
    with serving(both, models=["finder"], max_texts=8) as running:
        yield running


@pytest.fixture(scope="module")
def server_of_both(both: Path) -> Iterator[Server]:
    """Its default is tiny, as the first of the models, but the operator has not set it."""
    with serving(both, models=["tiny", "finder"], default_model=None) as running:
        yield running


def post(server: Server, path: str, body: Any) -> Any:
    answer = httpx.post(server.url + path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def spans_of(server: Server, text: str) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = post(server, "/classify", {"input": text})["data"][0]["spans"]
    return spans


def message_of(answer: httpx.Response) -> str:
    assert answer.status_code == 422, answer.text
    body = answer.json()
    error = body.get("error", body)
    message: str = error["message"] if isinstance(error, dict) else error
    return message


def bodies(text: str) -> dict[str, Any]:
    """A body of each protocol."""
    return {
        "/": {"inputs": text},
        CONTENTS: {"contents": [text]},
        GUARDRAIL: {"texts": [text]},
        EXTRACT: {"text": text},
        "/v1/rerank": {"query": text, "documents": [text]},
        "/score": {"text_1": text, "text_2": [text]},
    }


def test_hugging_faces_client_finds_spans_or_classifies(
    server_of_both: Server, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # fixtures.py sets it
    client = InferenceClient(server.url)
    found = client.token_classification(TEXT, stride=8)
    assert [(one.entity_group, one.word) for one in found] == FOUND
    spans = [(one["start"], one["end"], one["score"]) for one in spans_of(server, TEXT)]
    assert [(one.start, one.end, one.score) for one in found] == spans
    tokens = client.token_classification(TEXT, aggregation_strategy="none")
    assert [one.entity for one in tokens] == ["B-PERSON", "I-PERSON", "B-CITY", "B-CITY", "B-PERSON"]
    assert tokens[0].entity_group is None and tokens[1].word == "not"
    found = client.token_classification(TEXT, ignore_labels=["O", "PERSON"])
    assert [(one.entity_group, one.word) for one in found] == [one for one in FOUND if one[0] == "CITY"]
    everything = client.token_classification(TEXT, ignore_labels=[])  # then even O is not ignored
    assert {one.entity_group for one in everything} == {"O", "CITY", "PERSON"}

    (best,) = InferenceClient(server_of_both.url).text_classification("a good film", top_k=1)
    (row,) = server_of_both.classify(input="a good film").json()["data"]
    assert (best.label, best.score) == (row["label"], max(row["probs"]))


def test_spans_are_detections(server: Server) -> None:
    rows = post(server, CONTENTS, {"contents": [NOTHING, TEXT], "detector_params": {}})
    spans = spans_of(server, TEXT)
    expected = [
        {"start": s["start"], "end": s["end"], "text": s["text"], "score": s["score"]}
        | {"detection": s["label"], "detection_type": s["label"]}
        for s in spans
    ]
    assert rows == [[], expected]
    least = sorted(s["score"] for s in spans)[1]
    for params, kept in (
        ({"labels": ["CITY"]}, [s for s in spans if s["label"] == "CITY"]),
        ({"threshold": least - 1e-6}, [s for s in spans if s["score"] >= least]),  # scores are rounded
    ):
        (row,) = post(server, CONTENTS, {"contents": [TEXT], "detector_params": params})
        assert [one["start"] for one in row] == [one["start"] for one in kept], params


def test_litellms_guardrail_redacts_or_blocks(server: Server) -> None:
    """The answers that GenericGuardrailAPIResponse.from_dict reads, in LiteLLM's types of the generic guardrail API."""

    def guarded(texts: Any, **params: Any) -> Any:
        sent = {"input_type": "request", "texts": texts, "request_data": {}, "images": None, "tools": None}
        return post(server, GUARDRAIL, sent | {"litellm_version": "9", PARAMETERS: params})

    redacted = "😀 the [PERSON] film,\r\nit was é [CITY] and [CITY] [PERSON]"
    sent = ["", TEXT, " \n", NOTHING]
    done = guarded(sent)
    assert done == {"action": "GUARDRAIL_INTERVENED", "texts": ["", redacted, " \n", NOTHING]}
    assert guarded(sent, policy="redact") == done
    for nothing in (None, [], ["", " "], [NOTHING]):
        assert guarded(nothing) == guarded(nothing, policy="block") == {"action": "NONE"}
    cities = guarded([TEXT], labels=["CITY"])
    assert cities["texts"] == [redacted.replace("[PERSON] film", "Good not film").replace("[PERSON]", "warm")]
    first, *_, best = sorted(spans_of(server, TEXT), key=lambda one: one["score"])
    reason = f"{best['label']} with probability {best['score']:.2f}, by finder:1"
    assert guarded(sent, policy="block") == {"action": "BLOCKED", "blocked_reason": reason}
    some = guarded([TEXT], threshold=first["score"] + 1e-6)["texts"]  # scores are rounded
    assert some[0].count("[") == len(FOUND) - 1


def test_the_server_of_nemos_gliner_rail(server: Server) -> None:
    def extracted(text: str, **fields: Any) -> Any:
        """The answer to a request as nemoguardrails/library/gliner/request.py: gliner_request sends it."""
        sent = {"text": text, "threshold": 0.5, "chunk_length": 384, "overlap": 128, "flat_ner": False}
        return post(server, EXTRACT, sent | fields)

    answer = extracted(TEXT)
    assert answer["tagged_text"] == (
        "😀 the [Good not](PERSON) film,\r\nit was é [dull](CITY) and [Bad](CITY) [warm](PERSON)"
    )
    assert answer["entities"] == [
        {"value": s["text"], "suggested_label": s["label"], "score": s["score"]}
        | {"start_position": s["start"], "end_position": s["end"]}
        for s in spans_of(server, TEXT)
    ]
    assert answer["total_entities"] == len(FOUND)
    some = extracted(TEXT, labels=["city"])["entities"]  # NeMo's examples have labels in lower case
    assert [(one["suggested_label"], one["value"]) for one in some] == [("city", "dull"), ("city", "Bad")]
    assert extracted(TEXT, labels=[]) == answer
    # The model finds the parts of this word separately; the rail would write [PERSON][PERSON].
    assert extracted("a goods")["tagged_text"] == "a [goods](PERSON)"
    for nothing in ("", " \n", NOTHING):
        assert extracted(nothing) == {"entities": [], "total_entities": 0, "tagged_text": nothing}
    scores = [one["score"] for one in answer["entities"]]
    assert len(extracted(TEXT, threshold=min(scores) + 1e-6)["entities"]) == len(FOUND) - 1


@pytest.mark.parametrize("path", ["/", EXTRACT])  # test_contract.py has the other protocols
def test_a_text_is_read_whole_or_refused(server: Server, path: str) -> None:
    long = f"{NOTHING} " * 60 + "good"
    assert "PERSON" in json.dumps(post(server, path, bodies(long)[path]))
    answer = httpx.post(server.url + path, json=bodies("good " + f"{NOTHING} " * 300)[path])
    assert re.search(r"has (more than )?\d+ tokens", message_of(answer)), answer.text
    cut = {"inputs": "good " + f"{NOTHING} " * 300, "parameters": {"truncation": True}}
    assert [one["word"] for one in post(server, "/", cut)] == ["good"]


def job_of(request: Any, logits: list[list[float]], chars: list[list[int]], ran: int, windows: int) -> Any:
    """A finished job for a text, as far as protocols read it. chars: characters of each token."""
    special = np.zeros(len(logits), bool)
    layout = Layout(np.array(chars, np.int32), special, special)
    kind = Spans(SpanRule(("O", "B-X")))
    reading, rule = kind.read(0, np.array(logits, np.float32), layout), SimpleNamespace(kind=kind, flag=None)
    outcome = SimpleNamespace(
        reading=reading, rule=rule, windows=[None] * ran, num_windows=windows, reason="deadline"
    )
    outcome.check_all_ran = partial(Outcome.check_all_ran, outcome)
    model = SimpleNamespace(manifest=SimpleNamespace(is_spans=True, labels=["O", "B-X"]))
    return SimpleNamespace(request=request, first=SimpleNamespace(model=model, outcomes=lambda: [outcome]))


@pytest.mark.parametrize(
    ("protocol", "request_type", "fields"),
    [
        (hugging_face, hugging_face.TaskRequest, {}),
        (detectors, detectors.ContentsRequest, {}),
        (guardrail, guardrail.GuardrailRequest, {"policy": "block"}),
        (gliner, gliner.ExtractRequest, {}),
    ],
)
def test_unread_windows_are_an_error(protocol: Any, request_type: Any, fields: Any) -> None:
    request = request_type([Text("a")], **fields)
    with pytest.raises(RequestError, match=r"latency_budget_ms: only 1 of a text's 2 windows") as error:
        job = job_of(request, [[1, 0]], [[0, 1]], 1, 2)
        request.check(*job.first.outcomes())
        protocol.serialize("", job)
    assert error.value.cause == "budget"
    protocol.serialize("", job_of(request, [[1, 0]], [[0, 1]], 0, 1))  # a single window, which exited in time


def test_spans_that_vllms_semantic_router_would_refuse_are_left_out() -> None:
    """Tokenizers of bytes make several tokens of one emoji, and a token may have no characters."""
    request = hugging_face.TaskRequest([Text("😀a")])
    job = job_of(request, [[0, 3], [0, 3], [0, 3], [0, 4]], [[0, 1], [0, 1], [1, 1], [1, 2]], 0, 1)
    found = json.loads(hugging_face.serialize("", job))
    assert [(one["word"], one["start"]) for one in found] == [("😀", 0), ("a", 1)]


def test_open_inference_lists_no_outputs_of_a_token_classifier(server: Server) -> None:
    metadata = httpx.get(f"{server.url}/v2/models/finder").json()
    assert metadata["outputs"] == [] and [one["name"] for one in metadata["inputs"]] == ["text"]


@pytest.mark.parametrize(
    ("path", "model", "params", "says"),
    [
        ("/", "tiny", {"stride": 4}, "stride: tiny:1 is not a token classifier"),
        ("/", "finder", {"top_k": 1}, "top_k: finder:1 is a token classifier: a text has no prob"),
        ("/", "finder", {"ignore_labels": ["B-CITY"]}, "ignore_labels: finder:1 finds no 'B-CITY'; it"),
        (CONTENTS, "finder", {"safe_labels": ["O"]}, "detector_params: safe_labels: finder:1 is a token c"),
        (CONTENTS, "finder", {"labels": ["B"]}, "detector_params: labels: finder:1 finds no 'B'; it"),
        (CONTENTS, "tiny", {"labels": ["C"]}, "detector_params: labels: tiny:1 is not a token cl"),
        (GUARDRAIL, "finder", {"label": "CITY"}, f"{PARAMETERS}: label: finder:1 is a token classifier"),
        (GUARDRAIL, "tiny", {"policy": "redact"}, f"{PARAMETERS}: policy: tiny:1 is not a token"),
        (EXTRACT, "finder", {"labels": ["O"]}, "labels: finder:1 finds no 'O'; it finds CITY, PERSON"),
        (EXTRACT, "tiny", {}, "model: tiny:1 is not a token classifier: it finds no entities"),
        (EXTRACT, "finder", {"text": 1}, "text: must be a text"),
        ("/v1/rerank", "finder", {}, "model: finder:1 is a token classifier, and this protocol has no sp"),
        ("/score", "finder", {}, "model: finder:1 is a token classifier, and this protocol has no sp"),
    ],
)
def test_errors_name_the_field(
    server_of_both: Server, path: str, model: str, params: dict[str, Any], says: str
) -> None:
    named = {"/": "parameters", CONTENTS: "detector_params", GUARDRAIL: PARAMETERS}.get(path)
    inner = params if path == "/" else params | {"model": model}
    given = {"model": model} if path == "/" else {}
    given |= {named: inner} if named else inner
    answer = httpx.post(server_of_both.url + path, json=bodies(TEXT)[path] | given)
    assert message_of(answer).startswith(says), answer.text
    assert "Good" not in answer.text
    error = answer.json().get("error", {})
    if "param" in error:
        assert error["param"] == says.partition(":")[0]


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/", {"parameters": {"aggregation_strategy": "first"}}, "finder"),
        ("/", {"parameters": {"top_k": 1}}, "tiny"),
        ("/", {}, "tiny"),
        ("/classify", {"input": TEXT, "redact": True}, "finder"),
        (CONTENTS, {}, None),
        (CONTENTS, {"detector_params": {"safe_labels": ["negative"]}}, "tiny"),
        (GUARDRAIL, {PARAMETERS: {}}, None),
        (GUARDRAIL, {PARAMETERS: {"policy": "redact"}}, "finder"),
        (GUARDRAIL, {PARAMETERS: {"label": "positive"}}, "tiny"),
        (EXTRACT, {}, "finder"),
    ],
)
def test_a_request_without_a_model_goes_to_the_one_that_can_answer(
    server_of_both: Server, path: str, body: Any, model: str | None
) -> None:
    """A guard does not use a default that nobody has set."""

    def tokens() -> dict[str, float]:
        names = ("tiny", "finder")
        return {name: server_of_both.metric("de3_tokens_total", model=f"{name}:1") for name in names}

    before = tokens()
    answer = httpx.post(server_of_both.url + path, json=bodies(TEXT).get(path, {}) | body)
    if model is None:
        assert message_of(answer).startswith("model: is required, as several are served: tiny, finder")
        return
    assert answer.status_code == 200, answer.text
    assert [name for name, count in tokens().items() if count > before[name]] == [model]


def test_one_token_classifier_does_not_answer_in_place_of_another(both: Path) -> None:
    with serving(both, models=["finder", "another"]) as running:
        for path in (CONTENTS, GUARDRAIL, EXTRACT):
            answer = httpx.post(running.url + path, json=bodies(TEXT)[path])
            assert message_of(answer).startswith("model: is required, as several are served: finder, another")


# A client itself

# NeMo Guardrails requires older versions of packages that other tests need (huggingface_hub). So it is installed in a
# separate folder, without its requirements, but with the packages that its import needs.
NEMO = "nemoguardrails>=0.24,<0.26 aiohttp-retry dataclasses-json fastembed lark loguru marshmallow<4 nest-asyncio"
NEMO += " prompt_toolkit py_rust_stemmers simpleeval typing-inspect wcwidth"
RAILS = """
import asyncio, json, sys
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.library.gliner.actions import gliner_mask_pii
from nemoguardrails.testing.fake_model import FakeLLMModel

url, texts = sys.argv[1], json.loads(sys.argv[2])

def config(kind, settings, flow):
    return RailsConfig.from_content(yaml_content=f'''
rails:
  config:
    {kind}: {settings}
  input:
    flows:
      - {flow}
''')

def classifier(engine, blocked):
    guard = f'{{engine: {engine}, model: tiny, base_url: "{url}", threshold: 0.5, blocked_labels: ["{blocked}"]}}'
    return config("hf_classifier", f"{{guard: {guard}}}", 'hf classifier check input $classifier="guard"')

def finder(entities):
    settings = f'{{server_endpoint: "{url}/v1/extract", threshold: 0.5, input: {{entities: {json.dumps(entities)}}}}}'
    return config("gliner", settings, "gliner detect pii on input")

def said(rails):
    answers = []
    for text in texts:
        rail = LLMRails(rails, llm=FakeLLMModel(responses=["an answer"]))
        answers.append(rail.generate(messages=[{"role": "user", "content": text}])["content"])
    return answers

guards = [classifier("vllm", "positive"), classifier("kserve", "1"), classifier("fms", "positive"), finder(["city"])]
masked = asyncio.run(gliner_mask_pii(source="input", text=texts[1], config=finder([]))).metadata["masked_text"]
print(json.dumps([[said(rails) for rails in guards], masked]))
"""


@pytest.mark.slow
def test_rails_of_nemo_guardrails_block_and_mask(both: Path, tmp_path: Path) -> None:
    site = installed(tmp_path / "nemoguardrails", NEMO)
    texts = ["good , good and warm", "good , dull and bad and boring and awful"]
    flags = ["tiny=positive"]
    with serving(both, models=["tiny", "finder"], default_model="tiny", tau=0, flags=flags) as server:
        done = subprocess.run(
            [sys.executable, "-c", RAILS, server.url, json.dumps(texts)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"PYTHONPATH": str(site)},
        )
    assert done.returncode == 0, done.stderr[-2000:]
    said, masked = json.loads(done.stdout.splitlines()[-1])
    assert said == [["an answer", "I'm sorry, I can't respond to that."]] * 4
    assert masked == "[PERSON] , [CITY] and [CITY] and [CITY] and [CITY]"
