"""Reranking with a model that takes pairs and has one output.

POST /rerank accepts bodies in the format of Text Embeddings Inference, Jina or Cohere. POST /v1/rerank and /v2/rerank
accept the formats of Jina and Cohere only, as vLLM does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import orjson
from pydantic import BeforeValidator, Field

from de3.exits.reading import sigmoid
from de3.model_store.manifest import Manifest
from de3.runtime.answer import significant
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Request, Text
from de3.runtime.errors import RequestError
from de3.runtime.fields import check_count, check_fields, checked_text, load_json
from de3.runtime.flags import Wanted
from de3.runtime.options import Long, OptionFields, long_of
from de3.server.http import tei
from de3.server.http.errors import openai_body
from de3.server.http.protocol import Call, Protocol

EXAMPLE = '{"query": "a text", "documents": ["a text"]}'
MAX_QUERY_CHARS = 2**20  # total over all documents, because the query is repeated before each


class PairsRequest(Request):
    """A request that a model of pairs with one output can answer."""

    def fits(self, manifest: Manifest) -> bool:
        """True for a model that scores a pair with a single number."""
        return manifest.tolerance is not None and manifest.input in ("pair", None)

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """The same request; raises RequestError for a model that does not score a pair with a single number."""
        if not self.fits(manifest):
            has = f"has {len(manifest.labels)} outputs"
            why = has if manifest.tolerance is None else "takes single texts"
            raise RequestError(
                f"model: {manifest.full_name} {why}; scoring needs a model of pairs with one output, "
                "such as a cross-encoder",
                "model",
            )
        return self


@dataclass(frozen=True, slots=True, eq=False)
class RerankRequest(PairsRequest):
    """A query and its documents, as pairs, with the options of the response.

    Attributes:
        is_tei: respond as Text Embeddings Inference does.
        top_n: number of documents to return; None: all.
        with_documents: return the documents, too.
        raw_scores: respond with the model's outputs instead of their sigmoid.
    """

    input_name: ClassVar[str] = "documents"

    is_tei: bool = False
    top_n: int | None = None
    with_documents: bool = False
    raw_scores: bool = False

    def name_of(self, index: int) -> str:
        """The name of a document in error messages, by its index."""
        return f"{'texts' if self.is_tei else 'documents'}[{index}]"


class TeiRerankRequest(RerankRequest):
    """A request in the format of Text Embeddings Inference, which by default refuses long texts."""

    __slots__ = ()
    usual_long: ClassVar[Long] = "error"


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of texts, at least one")
    return [
        checked_text(one["text"] if isinstance(one, dict) and one.keys() == {"text"} else one, f"[{i}]")
        for i, one in enumerate(value)
    ]


def pairs(query: str, documents: Sequence[str], name: str = "query") -> list[Text]:
    """The pairs of a query and each document; raises RequestError if the query is too long to repeat so often.

    name: the query's field.
    """
    if len(query) * len(documents) > MAX_QUERY_CHARS:
        raise RequestError(
            f"{name}: {len(query)} characters before each of {len(documents)} documents; at most {MAX_QUERY_CHARS} in "
            "all are allowed",
            name,
        )
    return [Text(query, document) for document in documents]


def scores_of(job: Job, raw: bool) -> list[float]:
    """The scores of a finished job's pairs: the sigmoid of the model's outputs, or the outputs themselves if `raw`."""
    values = [outcome.value for outcome in job.first.outcomes()]
    return values if raw else [sigmoid(value) for value in values]


Query = Annotated[str, BeforeValidator(lambda value: checked_text(value, ""))]
Texts = Annotated[list[str], BeforeValidator(_texts)]


class TeiFields(OptionFields):
    """A body in the format of Text Embeddings Inference; the exit options are an extension."""

    query: Query
    texts: Texts
    raw_scores: bool = Field(False, description="the model's outputs instead of their sigmoid")
    return_text: bool = Field(False, description="return the texts, too")
    truncate: bool | None = Field(
        False, description="truncate pairs that are too long instead of refusing them"
    )
    truncation_direction: Any = Field("right", description="accepted; texts are truncated at their end")


class RerankFields(OptionFields):
    """A body in the format of Jina, Cohere and vLLM; the exit options are an extension."""

    query: Query
    documents: Texts
    model: str | None = Field(None, description="name, or name:version; default: the server's")
    top_n: int | None = Field(None, ge=1, description="number of documents to return; default: all")
    return_documents: bool = Field(True, description="return the documents, too")
    raw_scores: bool = Field(False, description="the model's outputs instead of their sigmoid")
    truncate_prompt_tokens: Any = Field(
        None, description="accepted; pairs are truncated to the model's limit"
    )
    max_chunks_per_doc: Any = Field(None, description="accepted and ignored")
    max_tokens_per_doc: Any = Field(None, description="accepted and ignored")
    rank_fields: Any = Field(None, description="accepted and ignored")
    user: Any = Field(None, description="accepted and ignored")
    priority: Any = Field(None, description="accepted and ignored")


def parse(call: Call) -> RerankRequest:
    """The request in a call to /rerank; raises RequestError if it is invalid."""
    value = load_json(call.body)
    if isinstance(value, dict) and "texts" in value:
        check_count(value, "texts", call.max_texts)
        fields = check_fields(TeiFields, value, '{"query": "a text", "texts": ["a text"]}')
        return TeiRerankRequest(
            pairs(fields.query, fields.texts),
            fields.options,
            long=long_of(fields.truncate or None),
            is_tei=True,
            with_documents=fields.return_text,
            raw_scores=fields.raw_scores,
        )
    return _of_jina(value, call.max_texts)


def parse_jina(call: Call) -> RerankRequest:
    """The request in a call to /v1/rerank or /v2/rerank; raises RequestError if it is invalid."""
    return _of_jina(load_json(call.body), call.max_texts)


def _of_jina(value: Any, max_texts: int) -> RerankRequest:
    check_count(value, "documents", max_texts)
    fields = check_fields(RerankFields, value, EXAMPLE)
    return RerankRequest(
        pairs(fields.query, fields.documents),
        fields.options,
        fields.model,
        top_n=fields.top_n,
        with_documents=fields.return_documents,
        raw_scores=fields.raw_scores,
    )


def serialize(request_id: str, job: Job) -> bytes:
    """The documents by descending score; those with equal scores in the order of the request."""
    request = job.request
    assert isinstance(request, RerankRequest)
    scores = scores_of(job, request.raw_scores)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: request.top_n]
    rows: list[dict[str, Any]] = []
    for i in order:
        score = scores[i] if request.raw_scores else significant(scores[i])
        row: dict[str, Any] = {"index": i, "score" if request.is_tei else "relevance_score": score}
        if request.with_documents:
            text = request.texts[i].text_pair
            row |= {"text": text} if request.is_tei else {"document": {"text": text}}
        rows.append(row)
    if request.is_tei:
        return orjson.dumps(rows)
    body: Mapping[str, Any] = {
        "id": f"rerank-{request_id}",
        "model": job.first.model.full_name,
        "usage": {"prompt_tokens": job.tokens, "total_tokens": job.tokens},
        "results": rows,
    }
    return orjson.dumps(body)


TEI_OR_JINA = Protocol(parse, serialize, tei.error, example=EXAMPLE)
JINA = Protocol(parse_jina, serialize, openai_body, example=EXAMPLE)
