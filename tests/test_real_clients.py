"""Real clients, installed for these tests: LiteLLM's guardrails and Cohere's rerankers."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.export.classifier import Stock, convert
from de3.model_store.store import Store
from tests.fixtures import installed, save_encoder
from tests.serving import Server, serving

pytestmark = pytest.mark.slow
GOOD, BAD = "a superb fine film , good and lovely and charming", "a dull plot , bad and boring and awful"
QUERY, DOCUMENTS = "what is a good film ?", ["a dull plot", "a superb fine film", "the plot", "a dull plot"]
# An exact version, because 1.82.7 and 1.82.8 were published with malicious code; and what its import needs.
LITELLM = "litellm==1.80.17 fastuuid tiktoken importlib-metadata zipp"
PROXY = """
import asyncio, json, sys
from litellm.caching.caching import DualCache
from litellm.proxy._types import UserAPIKeyAuth
from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api.generic_guardrail_api import GenericGuardrailAPI
from litellm.proxy.guardrails.guardrail_hooks.ibm_guardrails.ibm_detector import IBMGuardrailDetector

url, texts = sys.argv[1], json.loads(sys.argv[2])

async def said(guard, text):
    data = {"messages": [{"role": "user", "content": text}]}
    try:
        if isinstance(guard, IBMGuardrailDetector):
            await guard.async_pre_call_hook(UserAPIKeyAuth(), DualCache(), data, "completion")
        else:
            assert await guard.apply_guardrail({"texts": [text]}, data, "request") == {"texts": [text]}
    except Exception as error:
        return str(error)

async def main():
    found = {}
    for model in ("tiny", "tiny-int8", "other"):
        params = {"model": model, "label": "positive", "threshold": 0.5}
        generic = GenericGuardrailAPI(api_base=url, additional_provider_specific_params=params)
        ibm = IBMGuardrailDetector(
            auth_token="none", base_url=url, detector_id=model, default_on=True, event_hook="pre_call"
        )
        found[model] = [[await said(guard, text) for text in texts] for guard in (generic, ibm)]
    return found

print(json.dumps(asyncio.run(main())))
"""
# The cohere package, and the packages that its import needs.
COHERE = "cohere>=5 fastavro"

CLIENT = """
import json, sys
import cohere

url, (query, *documents) = sys.argv[1], json.loads(sys.argv[2])
new = cohere.ClientV2(api_key="a", base_url=url)
old = cohere.Client(api_key="a", base_url=url)
first = new.rerank(model="ranker", query=query, documents=documents, top_n=3)
second = old.rerank(model="ranker", query=query, documents=documents, return_documents=True)
print(json.dumps([
    [[row.index, row.relevance_score] for row in first.results],
    [[row.index, row.relevance_score, row.document.text] for row in second.results],
]))
"""


def output_of(code: str, site: Path, server: Server, texts: Sequence[str]) -> Any:
    """The last line that a client's program prints, as JSON. site: folder with its packages."""
    done = subprocess.run(
        [sys.executable, "-c", code, server.url, json.dumps(texts)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_guardrails_of_litellm_block(store: Path, tmp_path: Path) -> None:
    site = installed(tmp_path / "litellm", LITELLM)
    with serving(store, default_model=None, tau=0, flags=["positive"]) as server:
        said = output_of(PROXY, site, server, [GOOD, BAD])
        answers = {name: server.classify(input=BAD, model=name).json() for name in ("tiny", "tiny-int8")}
    for name, answer in answers.items():
        ((good, bad), (ibm_good, ibm_bad)), score = said[name], answer["data"][0]["probs"][1]
        assert good is ibm_good is None
        assert bad == f"positive with probability {score:.2f}, by {name}:1"
        assert f"POSITIVE (score: {score:.3f})" in ibm_bad
    assert all("404" in problem for problems in said["other"] for problem in problems)  # it fails closed


def test_coheres_clients_rerank(tmp_path: Path) -> None:
    site = installed(tmp_path / "cohere", COHERE)
    stock = Stock.open("stock", save_encoder(tmp_path / "stock", labels=1))
    convert(stock, Store(tmp_path / "store"), "ranker", "int8")
    with serving(tmp_path / "store") as server:
        first, second = output_of(CLIENT, site, server, [QUERY, *DOCUMENTS])
        body = {"query": QUERY, "documents": DOCUMENTS}
        rows = httpx.post(f"{server.url}/v2/rerank", json=body).json()["results"]
    expected = [[row["index"], row["relevance_score"]] for row in rows]
    assert first == expected[:3]
    assert second == [[i, score, DOCUMENTS[i]] for i, score in expected]
