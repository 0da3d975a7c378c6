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
from de3.server.http.rerank import MAX_QUERY_CHARS, RerankRequest
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


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"documents": DOCUMENTS}, "query: is required"),
        ({"query": "", "documents": DOCUMENTS}, "query: must not be empty"),
        ({"query": QUERY}, "documents: is required"),
        ({"query": QUERY, "documents": []}, "documents: must be a list of texts, at least one"),
        ({"query": QUERY, "documents": ["a", 1]}, "documents[1]: must be a text; got a number"),
        ({"query": QUERY, "documents": ["a", {"title": "a"}]}, "documents[1]: must be a text; got an object"),
        ({"query": QUERY, "documents": ["a"] * 9}, "documents: 9 texts, at most 8 are allowed"),
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
    longest = [Text("a" * (MAX_QUERY_CHARS // 4), "a")] * 4
    RerankRequest(longest).check(manifest)
    with pytest.raises(RequestError, match="query"):
        RerankRequest([*longest, longest[0]]).check(manifest)


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
