"""Reranking: Text Embeddings Inference's, Jina's and Cohere's bodies, answers and errors, for a model of pairs."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.exits.reading import sigmoid
from de3.export.classifier import Stock, convert
from de3.model_store.store import Store
from de3.runtime.engine.request import Text
from de3.runtime.errors import RequestError
from de3.server.http.rerank import MAX_QUERY_CHARS, RerankRequest, pairs
from tests.fixtures import save_encoder
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


@pytest.fixture(scope="module")
def values(server: Server) -> list[float]:
    pairs = [{"text": QUERY, "text_pair": document} for document in DOCUMENTS]
    return [row["value"] for row in server.classify(input=pairs).json()["data"]]


@pytest.fixture(scope="module")
def scores(values: list[float]) -> list[float]:
    """The scores as they are sent."""
    return [float(f"{sigmoid(value):.6g}") for value in values]


@pytest.fixture(scope="module")
def order(values: list[float]) -> list[int]:
    """The documents, the best first; those with equal scores keep their order."""
    found = sorted(range(4), key=lambda i: -values[i])
    assert values[0] == values[3] and found.index(0) < found.index(3)
    return found


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body)


def test_text_embeddings_inference(
    server: Server, values: list[float], scores: list[float], order: list[int]
) -> None:
    answer = post(server, "/rerank", query=QUERY, texts=DOCUMENTS)
    assert answer.json() == [{"index": i, "score": scores[i]} for i in order]
    answer = post(server, "/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True, return_text=True)
    assert answer.json() == [{"index": i, "score": values[i], "text": DOCUMENTS[i]} for i in order]
    long = post(server, "/rerank", query=QUERY, texts=["good " * 300])
    assert long.status_code == 422 and long.json()["error_type"] == "validation"
    assert long.json()["error"].startswith("texts[0]: has ")
    cut = post(server, "/rerank", query=QUERY, texts=["good " * 300], truncate=True)
    assert cut.status_code == 200 and len(cut.json()) == 1
    blank = post(server, "/rerank", query=QUERY, texts=["a", " "])
    assert blank.json()["error"] == "texts[1]: must not be only white space or invisible characters"


def test_the_setting_for_long_texts_is_above_the_format(server: Server) -> None:
    long = [{"query": QUERY, name: ["good " * 300]} for name in ("texts", "documents")]
    for how, status in (("truncate", 200), ("error", 422)):
        with serving(server.service.settings.store, models=["ranker"], long_texts=[how]) as one:
            assert [httpx.post(f"{one.url}/rerank", json=body).status_code for body in long] == [
                status,
                status,
            ]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_jina_and_cohere(server: Server, scores: list[float], order: list[int], path: str) -> None:
    documents: list[Any] = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:]]
    answer = post(server, path, model="ranker", query=QUERY, documents=documents, top_n=2).json()
    assert answer["model"] == "ranker:1" and answer["id"].startswith("rerank-")
    assert answer["usage"]["total_tokens"] > 20
    assert answer["results"] == [
        {"index": i, "relevance_score": scores[i], "document": {"text": DOCUMENTS[i]}} for i in order[:2]
    ]
    answer = post(server, path, query=QUERY, documents=documents, return_documents=False, top_n=99).json()
    assert [row.keys() for row in answer["results"]] == [{"index", "relevance_score"}] * 4


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/score", ("text_1", "text_2")),
        ("/v1/score", ("queries", "documents")),
        ("/score", ("queries", "items")),
        ("/score", ("data_1", "data_2")),
    ],
)
def test_vllms_score(
    server: Server, values: list[float], scores: list[float], path: str, names: tuple[str, str]
) -> None:
    def scored(first: Any, second: Any, **fields: Any) -> dict[str, Any]:
        answer = post(server, path, **dict(zip(names, (first, second), strict=True)), **fields)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    defaults = {"user": None, "priority": 0, "truncate_prompt_tokens": -1, "max_tokens_per_doc": 0}
    body = scored(QUERY, DOCUMENTS, model="ranker", request_id="mine", padding=None, **defaults)
    assert body["data"] == [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
    assert (body["id"], body["object"], body["model"]) == ("score-mine", "list", "ranker:1")
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 20
    assert body["created"] > 1_700_000_000
    for first in ([QUERY], [QUERY] * 4):
        assert scored(first, DOCUMENTS)["data"] == body["data"]
    assert [row["score"] for row in scored(QUERY, DOCUMENTS, use_activation=False)["data"]] == values
    turned = scored([DOCUMENTS[0], QUERY], [QUERY, DOCUMENTS[0]], tau=0)["data"]
    assert turned[0]["score"] != turned[1]["score"] == scores[0]


QUERIED: dict[str, Any] = {"query": QUERY, "documents": ["a"]}
SCORED: dict[str, Any] = {"text_1": "a", "text_2": "a"}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/score", {}, "text_1: is required"),
        (
            "/score",
            {"queries": QUERY, "items": ["a", {"content": []}]},
            "items[1]: must be a text; got an ob",
        ),
        ("/score", {"data_1": QUERY, "data_2": ["a"] * 9}, "data_2: 9 texts; at most 8 are allowed"),
        ("/score", {"queries": ["a"] * 2, "documents": ["a"] * 3}, "queries: 2 texts for 3 in documents;"),
        ("/score", SCORED | {"instruction": "a"}, "instruction: unknown field; known fields: "),
        (
            "/score",
            {"text_1": "a" * (2**17 + 1), "text_2": ["a"] * 8},
            "text_1: 131073 characters before each",
        ),
        ("/v1/rerank", {"documents": DOCUMENTS}, "query: is required"),
        ("/v1/rerank", QUERIED | {"documents": []}, "documents: must be a list of texts, at least one"),
        (
            "/v1/rerank",
            QUERIED | {"documents": ["a", {"title": "a"}]},
            "documents[1]: must be a text; got an",
        ),
        ("/v1/rerank", QUERIED | {"documents": ["a"] * 9}, "documents: 9 texts; at most 8 are allowed"),
        ("/v1/rerank", {"query": QUERY, "texts": ["a"]}, "texts: unknown field; known fields: "),
        ("/v1/rerank", QUERIED | {"model": "tiny-int8"}, "model: tiny-int8:1 has 2 outputs"),
    ],
)
def test_errors_name_the_field(server: Server, path: str, body: dict[str, Any], says: str) -> None:
    answer = post(server, path, **body)
    assert answer.status_code == 422 and answer.json()["error"]["message"].startswith(says), answer.text
    assert answer.json()["error"]["param"] == says.partition(":")[0].partition("[")[0]


def test_a_model_of_single_texts_does_not_rerank(server: Server) -> None:
    manifest = server.service.models.get("ranker").model.manifest
    request = RerankRequest([Text(QUERY, document) for document in DOCUMENTS])
    for takes in ("pair", None):
        request.for_model(manifest.model_copy(update={"input": takes}))
    with pytest.raises(RequestError, match="takes single texts"):
        request.for_model(manifest.model_copy(update={"input": "text"}))
    longest = "a" * (MAX_QUERY_CHARS // 4)
    assert pairs(longest, "abcd") == [Text(longest, document) for document in "abcd"]
    with pytest.raises(RequestError, match="query"):
        pairs(longest, "abcde")


def test_a_moderation_without_a_model_gets_the_only_one_that_fits(server: Server) -> None:
    answer = post(server, "/v1/moderations", input=QUERY, safe_labels=["negative"])
    assert (answer.status_code, answer.json()["model"]) == (200, "tiny-int8:1")
