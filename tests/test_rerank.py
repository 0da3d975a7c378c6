"""Reranking: Text Embeddings Inference's, Jina's and Cohere's bodies, answers and errors, for a model of pairs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.exits.reading import sigmoid
from de3.export.classifier import Stock, convert
from de3.model_store.store import Store
from de3.server.engine.request import Text
from de3.server.errors import RequestError
from de3.server.http.rerank import MAX_QUERY_CHARS, RerankRequest, pairs
from tests.fixtures import installed, save_encoder
from tests.serving import Server, serving

QUERY = "what is a good film ?"
DOCUMENTS = ["a dull plot", "a superb fine film", "the plot", "a dull plot"]


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("rerank")
    shutil.copytree(store / "tiny-int8", folder / "store/tiny-int8")
    stock = Stock.open("stock", save_encoder(folder / "stock", labels=1))
    convert(stock, Store(folder / "store"), "ranker", "int8")
    with serving(folder / "store", models=["ranker", "tiny-int8"], max_texts=8) as running:
        yield running


def values(server: Server) -> list[float]:
    pairs = [{"text": QUERY, "text_pair": document} for document in DOCUMENTS]
    return [row["value"] for row in server.classify(input=pairs).json()["data"]]


def test_a_ranker_without_exits_reports_the_signal_of_regression_models(server: Server) -> None:
    found = server.described(input="good", model="ranker", explain=True)["data"][0]["exit"]
    assert (found["signal"], found["score"], found["entropy"]) == ("risk", None, None)
    assert httpx.get(f"{server.url}/v1/models/ranker").json()["defaults"]["signal"] == "risk"


def shown(score: float) -> float:
    """A score as it is sent."""
    return float(f"{score:.6g}")


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body)


def test_text_embeddings_inference(server: Server) -> None:
    raw = values(server)
    scores = [sigmoid(value) for value in raw]
    order = sorted(range(4), key=lambda i: -scores[i])  # equal scores keep the order of their documents
    assert scores[0] == scores[3] and order.index(0) < order.index(3)
    answer = post(server, "/rerank", query=QUERY, texts=DOCUMENTS)
    assert answer.json() == [{"index": i, "score": shown(scores[i])} for i in order]
    answer = post(server, "/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True, return_text=True)
    assert answer.json() == [{"index": i, "score": raw[i], "text": DOCUMENTS[i]} for i in order]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_jina_and_cohere(server: Server, path: str) -> None:
    scores = [sigmoid(value) for value in values(server)]
    order = sorted(range(4), key=lambda i: -scores[i])
    documents: list[Any] = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:]]
    answer = post(server, path, model="ranker", query=QUERY, documents=documents, top_n=2).json()
    assert answer["model"] == "ranker:1" and answer["id"].startswith("rerank-")
    assert answer["usage"]["total_tokens"] > 20
    assert answer["results"] == [
        {"index": i, "relevance_score": shown(scores[i]), "document": {"text": DOCUMENTS[i]}}
        for i in order[:2]
    ]
    answer = post(server, path, query=QUERY, documents=documents, return_documents=False, top_n=99).json()
    assert [row.keys() for row in answer["results"]] == [{"index", "relevance_score"}] * 4


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
def test_vllms_score(server: Server, path: str, names: tuple[str, str]) -> None:
    def scored(first: Any, second: Any, **fields: Any) -> dict[str, Any]:
        answer = post(server, path, **dict(zip(names, (first, second), strict=True)), **fields)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    raw = values(server)
    scores = [shown(sigmoid(value)) for value in raw]
    defaults = {
        "user": None,
        "priority": 0,
        "truncate_prompt_tokens": -1,
        "max_tokens_per_doc": 0,
        "padding": None,
    }
    body = scored(QUERY, DOCUMENTS, model="ranker", request_id="mine", **defaults)
    assert body["data"] == [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
    assert (body["id"], body["object"], body["model"]) == ("score-mine", "list", "ranker:1")
    assert (
        body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 20
        and body["created"] > 1_700_000_000
    )
    for first in ([QUERY], [QUERY] * 4):
        assert scored(first, DOCUMENTS)["data"] == body["data"]
    assert [row["score"] for row in scored(QUERY, DOCUMENTS, use_activation=False)["data"]] == raw
    assert scored(QUERY, DOCUMENTS[1], tau=0)["data"] == [{"index": 0, "object": "score", "score": scores[1]}]
    turned = scored([DOCUMENTS[0], QUERY], [QUERY, DOCUMENTS[0]])["data"]
    assert turned[0]["score"] != turned[1]["score"] == scores[0]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "text_1: is required"),
        ({"text_1": QUERY}, "text_2: is required"),
        ({"text_1": "", "text_2": "a"}, "text_1: must not be empty"),
        ({"text_1": QUERY, "text_2": []}, "text_2: must not be an empty list"),
        ({"queries": QUERY, "items": ["a", {"content": []}]}, "items[1]: must be a text; got an object"),
        ({"data_1": QUERY, "data_2": ["a"] * 9}, "data_2: 9 texts; at most 8 are allowed"),
        ({"text_1": ["a"] * 9, "text_2": "a"}, "text_1: 9 texts; at most 8 are allowed"),
        (
            {"queries": ["a"] * 2, "documents": ["a"] * 3},
            "queries: 2 texts for 3 in documents; must be one, or",
        ),
        ({"text_1": ["a"] * 2, "text_2": "a"}, "text_1: 2 texts for 1 in text_2"),
        ({"text_1": "a", "text_2": "a", "tau": 2}, "tau: "),
        ({"text_1": "a", "text_2": "a", "max_tokens_per_doc": 3}, "max_tokens_per_doc: input should be 0"),
        ({"text_1": "a", "text_2": "a", "instruction": "a"}, "instruction: unknown field; known fields: "),
        ({"text_1": "a", "text_2": "a", "model": "tiny-int8"}, "model: tiny-int8:1 has 2 outputs"),
        (
            {"text_1": "a" * (MAX_QUERY_CHARS // 8 + 1), "text_2": ["a"] * 8},
            "text_1: 131073 characters before each",
        ),
    ],
)
def test_errors_of_score_name_the_field(server: Server, body: dict[str, Any], says: str) -> None:
    answer = post(server, "/score", **body)
    assert answer.status_code == 422 and answer.json()["error"]["message"].startswith(says), answer.text
    assert answer.json()["error"]["param"] == says.partition(":")[0].partition("[")[0]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"documents": DOCUMENTS}, "query: is required"),
        ({"query": "", "documents": DOCUMENTS}, "query: must not be empty"),
        ({"query": QUERY}, "documents: is required"),
        ({"query": QUERY, "documents": []}, "documents: must be a list of texts, at least one"),
        ({"query": QUERY, "documents": ["a", 1]}, "documents[1]: must be a text; got a number"),
        ({"query": QUERY, "documents": ["a", {"title": "a"}]}, "documents[1]: must be a text; got an object"),
        ({"query": QUERY, "documents": ["a"] * 9}, "documents: 9 texts; at most 8 are allowed"),
        ({"query": QUERY, "documents": ["a"], "top_n": 0}, "top_n: "),
        ({"query": QUERY, "documents": ["a"], "tau": 2}, "tau: "),
        ({"query": QUERY, "documents": ["a"], "other": 2}, "other: unknown field; known fields: "),
        ({"query": QUERY, "texts": ["a"]}, "texts: unknown field; known fields: "),
        ({"query": QUERY, "documents": ["a"], "model": "tiny-int8"}, "model: tiny-int8:1 has 2 outputs"),
    ],
)
def test_errors_name_the_field(server: Server, body: dict[str, Any], says: str) -> None:
    answer = post(server, "/v1/rerank", **body)
    assert answer.status_code == 422 and answer.json()["error"]["message"].startswith(says), answer.text


def test_a_model_of_single_texts_does_not_rerank(server: Server) -> None:
    manifest = server.service.models.get("ranker").model.manifest
    request = RerankRequest([Text(QUERY, document) for document in DOCUMENTS])
    for takes in ("pair", None):
        request.check(manifest.model_copy(update={"input": takes}))
    with pytest.raises(RequestError, match="takes single texts"):
        request.check(manifest.model_copy(update={"input": "text"}))
    longest = "a" * (MAX_QUERY_CHARS // 4)
    assert pairs(longest, "abcd") == [Text(longest, document) for document in "abcd"]
    with pytest.raises(RequestError, match="query"):
        pairs(longest, "abcde")


def test_a_moderation_without_a_model_gets_the_only_one_that_fits(server: Server) -> None:
    answer = post(server, "/v1/moderations", input=QUERY)
    assert (answer.status_code, answer.json()["model"]) == (200, "tiny-int8:1")
    refused = post(server, "/v1/moderations", input=QUERY, model="ranker")
    assert refused.status_code == 422 and refused.json()["error"]["param"] == "model"


def test_errors_have_the_form_of_the_peer(server: Server) -> None:
    answer = post(server, "/rerank", query=QUERY, texts=["good " * 300])
    assert answer.status_code == 422 and answer.json()["error_type"] == "validation"
    assert answer.json()["error"].startswith("texts[0]: has ")
    cut = post(server, "/rerank", query=QUERY, texts=["good " * 300], truncate=True)
    assert cut.status_code == 200 and len(cut.json()) == 1
    blank = post(server, "/rerank", query=QUERY, texts=["a", " "])
    assert blank.json()["error"] == "texts[1]: must not be only white space"


# The cohere package, and the packages that its import needs.
COHERE = "cohere>=5 fastavro"

CLIENT = """
import json, sys
import cohere

url, query, documents = json.loads(sys.argv[1])
new = cohere.ClientV2(api_key="a", base_url=url)
old = cohere.Client(api_key="a", base_url=url)
first = new.rerank(model="ranker", query=query, documents=documents, top_n=3)
second = old.rerank(model="ranker", query=query, documents=documents, return_documents=True)
print(json.dumps([
    [[row.index, row.relevance_score] for row in first.results],
    [[row.index, row.relevance_score, row.document.text] for row in second.results],
]))
"""


@pytest.mark.slow
def test_coheres_clients_rerank(server: Server, tmp_path: Path) -> None:
    site = installed(tmp_path / "cohere", COHERE)
    scores = [sigmoid(value) for value in values(server)]
    order = sorted(range(4), key=lambda i: -scores[i])
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps([server.url, QUERY, DOCUMENTS])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = json.loads(done.stdout)
    assert first == [[i, shown(scores[i])] for i in order[:3]]
    assert second == [[i, shown(scores[i]), DOCUMENTS[i]] for i in order]
