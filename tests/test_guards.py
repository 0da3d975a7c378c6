"""APIs for guardrails: NeMo Guardrails with each of its engines, KServe's and FMS's routes, and windows with a flag."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits.reading import Reading
from de3.exits.windows import Combination, Flag
from de3.model_store.store import Store
from de3.model_store.tokenizer import TextTokenizer, Windows
from de3.server.engine.request import Text
from de3.server.errors import RequestError
from de3.server.http import detectors
from de3.server.http.detectors import safe_labels
from tests.fixtures import installed
from tests.serving import Server, serving

# The tests' model labels GOOD as "negative" and BAD as "positive", so here a guard blocks "positive".
GOOD, BAD = "a superb fine film , good and lovely and charming", "a dull plot , bad and boring and awful"
FILLER = " ".join(["the film and the plot"] * 30)
NO_SIGNALS = (0.0, 0.0, None, None, 0.1)
PREDICT, CONTENTS = "/v1/models/tiny-int8:predict", "/api/v1/text/contents"
GUARDRAIL, PARAMETERS = "/beta/litellm_basic_guardrail_api", "additional_provider_specific_params"


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    aliases = ["omni-moderation-latest=tiny-int8"]
    models = ["tiny-int8", "tiny"]
    with serving(
        store, models=models, default_model="tiny-int8", tau=0, max_texts=8, aliases=aliases
    ) as running:
        yield running


def post(server: Server, path: str, body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body)


def probs(server: Server, text: str, model: str = "tiny-int8") -> dict[str, float]:
    row = server.classify(input=text, model=model).json()["data"][0]
    labels = httpx.get(f"{server.url}/v1/models").json()["data"][0]["labels"]
    return dict(zip(labels, row["probs"], strict=True))


# The routes


def test_kserve_predicts(server: Server) -> None:
    answer = post(server, PREDICT, {"instances": [GOOD, BAD]})
    assert answer.status_code == 200
    for text, found in zip((GOOD, BAD), answer.json()["predictions"], strict=True):
        assert list(found.values()) == list(probs(server, text).values())
        assert list(found) == [str(k) for k in range(len(found))]
    body = {"instances": [GOOD], "parameters": {"tau": 0.1}}
    assert post(server, "/v1/models/tiny-int8:1:predict", body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (PREDICT, {"instances": "a"}, 422, "instances: must be a list of texts"),
        ("/v1/models/other:predict", {"instances": ["a"]}, 404, "model: "),
        (CONTENTS, {"contents": ["a"], "detector_params": {"threshold": 2}}, 422, "threshold: "),
        (
            CONTENTS,
            {"contents": ["a"], "detector_params": {"safe_labels": ["x"]}},
            422,
            "detector_params: safe",
        ),
        (GUARDRAIL, {"texts": "a"}, 422, "texts: must be a list of texts, or null"),
        (GUARDRAIL, {PARAMETERS: {"treshold": 0.5}}, 422, "treshold: unknown field; known fields: "),
        (GUARDRAIL, {PARAMETERS: {"threshold": 2}}, 422, "threshold: "),
        (GUARDRAIL, {PARAMETERS: {"model": "x"}}, 404, "model: no model 'x' is served"),
        (
            GUARDRAIL,
            {PARAMETERS: {"label": "x"}},
            422,
            f"{PARAMETERS}: label: 'x' is not a label of tiny-int8:1: ",
        ),
    ],
)
def test_errors_name_the_field(server: Server, path: str, body: Any, status: int, says: str) -> None:
    answer = post(server, path, body)
    body = answer.json()
    message = body["error"]["message"] if path == GUARDRAIL else body.get("error") or body["message"]
    assert answer.status_code == status and message.startswith(says), answer.text
    assert body.keys() == ({"code", "message"} if path == CONTENTS else {"error"})


def test_detectors_of_fms(server: Server) -> None:
    texts = [GOOD, BAD]
    for threshold in (None, 0.0, 0.9999):
        params = {} if threshold is None else {"threshold": threshold}
        found = post(server, CONTENTS, {"contents": texts, "detector_params": params}).json()
        for text, rows in zip(texts, found, strict=True):
            safe, *others = probs(server, text).items()  # the first label counts as safe
            expected = [(label, p) for label, p in others if p >= (0.5 if threshold is None else threshold)]
            assert [(row["detection_type"], row["score"]) for row in rows] == expected
            assert all((row["start"], row["end"], row["text"]) == (0, len(text), text) for row in rows)
            assert safe[0] not in {row["detection"] for row in rows}
    score = probs(server, BAD)["positive"]
    for threshold, count in ((score - 1e-6, 1), (score + 1e-6, 0)):  # the score is rounded
        params = {"threshold": threshold}
        (rows,) = post(server, CONTENTS, {"contents": [BAD], "detector_params": params}).json()
        assert len(rows) == count
    long = f"{GOOD} {FILLER} {FILLER} {BAD} {BAD} {BAD} {FILLER}"
    ((row,),) = post(server, CONTENTS, {"contents": [long]}).json()
    assert row["detection"] == "positive" and 0 < row["start"] < long.index(BAD) < row["end"] < len(long)
    assert row["text"] == long[row["start"] : row["end"]] and "metadata" not in row
    params = {"threshold": 0.0, "safe_labels": []}
    (rows,) = post(server, CONTENTS, {"contents": [GOOD], "detector_params": params}).json()
    assert len(rows) == len(probs(server, GOOD))


def test_the_header_detector_id_picks_the_model(store: Path) -> None:
    with serving(store, default_model=None, aliases=["guard=tiny"]) as server:
        listed = {row["name"]: row["aliases"] for row in httpx.get(f"{server.url}/v1/models").json()["data"]}
        assert listed == {"tiny": ["guard"], "tiny-int8": []}

        def detected(header: str, **params: Any) -> httpx.Response:
            body = {"contents": [BAD], "detector_params": {"tau": 0, **params}}
            return httpx.post(server.url + CONTENTS, json=body, headers={"detector-id": header})

        for asked, model in (("tiny", "tiny"), ("guard", "tiny"), ("tiny-int8:1", "tiny-int8")):
            score = server.classify(input=BAD, model=model, tau=0).json()["data"][0]["probs"][1]
            for answer in (detected(asked), detected("", model=asked), detected(asked, model=asked)):
                assert answer.json()[0][0]["score"] == score, answer.text
        assert (detected("other").status_code, detected("").status_code) == (404, 422)
        assert detected("").json()["message"].startswith("model: is required, as several are served: tiny, ")
        other = detected("tiny", model="tiny-int8")
        says = "detector_params: model: 'tiny-int8' is not the model in the header detector-id, 'tiny';"
        assert other.status_code == 422 and other.json()["message"].startswith(says)


def guarded(server: Server, texts: Any, **params: Any) -> dict[str, str]:
    more = {
        "input_type": "request",
        "request_data": {},
        "images": ["aGk="],
        "litellm_version": "9",
        PARAMETERS: params,
    }
    answer = post(server, GUARDRAIL, {"texts": texts} | more)
    assert answer.status_code == 200, answer.text
    decision: dict[str, str] = answer.json()
    return decision


@pytest.mark.parametrize(
    ("labels", "safe"),
    [
        ("INJECTION SAFE", "SAFE"),
        ("safe unsafe", "safe"),
        ("LABEL_0 LABEL_1", "LABEL_0"),
        ("toxic non-toxic", "non-toxic"),
        ("spam not_spam", "not_spam"),
        ("hate nothate", "nothate"),
        ("jailbreak benign harmful", "benign"),
        ("negative positive", "negative"),
        ("not_allowed allowed", None),
        ("unsafe fine", None),
        ("safe benign", None),
        ("notable harmful", None),
    ],
)
def test_a_safe_label_is_recognized_by_its_name(labels: str, safe: str | None) -> None:
    manifest: Any = SimpleNamespace(
        labels=labels.split(), thresholds=None, tolerance=None, is_spans=False, full_name="m:1"
    )
    assert safe_labels(manifest) == (None if safe is None else {safe})
    request = detectors.ContentsRequest([Text("a")])
    if safe is None:  # a guess might let everything pass
        with pytest.raises(RequestError, match="the names of m:1's labels do not show which mean safe"):
            request.check(manifest)
        request.safe = frozenset(manifest.labels[:1])
    request.check(manifest)
    assert request.flag == (
        manifest.labels[1:] if safe is None else [x for x in manifest.labels if x != safe],
        None,
    )
    manifest.thresholds = [0.5] * len(manifest.labels)
    assert safe_labels(manifest) == set()


def test_labels_that_are_not_safe_count_together_and_unread_windows_are_an_error() -> None:
    """Neither of two attacks is the most probable, but one of them is certain."""
    labels, reading = (
        ["BENIGN", "INJECTION", "JAILBREAK"],
        Reading(1, [0.0] * 3, [0.02, 0.49, 0.49], 1, *NO_SIGNALS),
    )
    request = detectors.ContentsRequest([Text("a")], safe=frozenset(["BENIGN"]))
    one: Any = SimpleNamespace(reading=reading, reason="last_layer", windows=(), num_windows=1)
    assert request.found(one, labels) == [("INJECTION", pytest.approx(0.98))]
    request.threshold = 0.4
    assert request.found(one, labels) == [("INJECTION", 0.49), ("JAILBREAK", 0.49)]
    request.threshold = 0.99
    assert request.found(one, labels) == []
    unread: Any = SimpleNamespace(reading=reading, reason="deadline", windows=[None] * 2, num_windows=3)
    with pytest.raises(RequestError, match=r"latency_budget_ms: only 2 of a text's 3 windows") as error:
        request.found(unread, labels)
    assert error.value.cause == "budget"
    request.threshold = 0.4  # found before the deadline
    assert len(request.found(unread, labels)) == 2
    windows = Combination([1, 1, 1], None, Flag([1, 2], 0.5))
    for probs_of in ([0.9, 0.1, 0.0], [0.2, 0.4, 0.4], [0.5, 0.5, 0.0]):
        windows.add(Reading(1, [0.0] * 3, probs_of, 0, *NO_SIGNALS))
    assert windows.decisive == 1


@pytest.mark.parametrize("path", [CONTENTS, GUARDRAIL, "/v1/moderations"])
def test_a_guard_reads_all_of_a_text_or_refuses_it(server: Server, path: str) -> None:
    field = {CONTENTS: "contents", GUARDRAIL: "texts"}.get(path, "input")

    def asked(text: str) -> httpx.Response:
        return post(server, path, {field: [text]})

    found = asked(f"{GOOD} {FILLER} {FILLER} {BAD} {BAD} {BAD} {FILLER}")
    assert found.status_code == 200 and "positive" in found.text and '"flagged":false' not in found.text
    for padding in (f" {FILLER}" * 60, " " * 2**17):
        refused = asked(GOOD + padding + BAD)
        assert refused.status_code == 422 and f"{field}: has more than " in refused.text, refused.text


def test_litellms_guardrail_blocks(server: Server) -> None:
    bad, good = probs(server, BAD), probs(server, GOOD)
    blocked = {
        "action": "BLOCKED",
        "blocked_reason": f"positive with probability {bad['positive']:.2f}, by tiny-int8:1",
    }
    for texts in ([BAD], [GOOD, "", BAD, GOOD]):
        assert guarded(server, texts) == blocked
    for nothing in (None, [], ["", " \n"], [GOOD]):
        assert guarded(server, nothing) == {"action": "NONE"}
    assert post(server, GUARDRAIL, {}).json() == {"action": "NONE"}
    score = bad["positive"]
    for threshold, action in ((score - 1e-6, "BLOCKED"), (score + 1e-6, "NONE")):  # scores are rounded
        assert guarded(server, [BAD], threshold=threshold)["action"] == action
    assert guarded(server, [BAD], label="negative") == {"action": "NONE"}
    reason = guarded(server, [GOOD], label="negative", model="tiny")["blocked_reason"]
    assert reason == f"negative with probability {probs(server, GOOD, 'tiny')['negative']:.2f}, by tiny:1"
    assert good["negative"] > 0.5
    long = f"{GOOD} {FILLER} {FILLER} {BAD} {BAD} {BAD} {FILLER}"
    assert guarded(server, [long])["action"] == "BLOCKED"


def test_a_response_of_detectors_has_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(120, 0.01, 200), (119, 0.01, 422), (60, 0.51, 200), (59, 0.51, 422)]
    for limit, threshold, status in (*cases, (119, 0.5, 422)):  # both labels can have a probability of 0.5
        monkeypatch.setattr(detectors, "MAX_CHARS", limit)
        params = {"threshold": threshold, "safe_labels": ["negative"] * 9}
        body = {"contents": ["a " * 15] * 2, "detector_params": params}
        answer = post(server, CONTENTS, body)
        assert answer.status_code == status, (limit, threshold, answer.text)


def test_moderation_by_two_classes_under_openais_name(server: Server) -> None:
    from openai import NotFoundError, OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    found = client.moderations.create(input=[GOOD, BAD], model="omni-moderation-latest")
    assert found.model == "tiny-int8:1"
    for text, result, flagged in zip([GOOD, BAD], found.results, [False, True], strict=True):
        raw, score = result.model_dump(), probs(server, text)["positive"]
        assert result.flagged is flagged is (score > 0.5)
        for field, value in (("categories", flagged), ("category_scores", score)):
            given = {
                name: one for name, one in raw[field].items() if one is not None
            }  # OpenAI's own have none
            assert given == {"positive": value}
    for name in ("omni-moderation-latest", "omni-moderation-latest:1", "tiny-int8", "tiny-int8:1"):
        model = client.models.retrieve(name)
        assert (model.id, model.object, model.owned_by) == ("tiny-int8:1", "model", "de3"), name
        predicted = post(server, f"/v1/models/{name}:predict", {"instances": [GOOD]})
        assert predicted.status_code == 200, name
    with pytest.raises(NotFoundError, match="no model 'other' is served; available: tiny-int8:1, tiny:1"):
        client.models.retrieve("other")


# NeMo Guardrails

RAIL = """
import asyncio, json, sys
from nemoguardrails.library.hf_classifier.backends import get_backend
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.testing.fake_model import FakeLLMModel

url, texts = sys.argv[1], json.loads(sys.argv[2])
said = {}
for engine, blocked in (("vllm", "positive"), ("kserve", "1"), ("fms", "positive")):
    yaml = f'''
rails:
  config:
    hf_classifier:
      guard: {{engine: {engine}, model: tiny-int8, base_url: "{url}", threshold: 0.5, blocked_labels: ["{blocked}"]}}
  input:
    flows:
      - hf classifier check input $classifier="guard"
'''
    config = RailsConfig.from_content(yaml_content=yaml)
    said[engine] = []
    for text in texts:
        rails = LLMRails(config, llm=FakeLLMModel(responses=["an answer"]))
        answer = rails.generate(messages=[{"role": "user", "content": text}])
        said[engine].append(answer["content"])
print(json.dumps(said))
"""


# NeMo Guardrails requires older versions of packages that other tests need (huggingface_hub). So it is installed in a
# separate folder, without its requirements, but with the packages that its import needs.
NEMO = "nemoguardrails>=0.24,<0.26 aiohttp-retry dataclasses-json fastembed lark loguru marshmallow<4 nest-asyncio"
NEMO += " prompt_toolkit py_rust_stemmers simpleeval typing-inspect wcwidth"


def output_of(code: str, site: Path, server: Server, texts: Sequence[str] = (GOOD, BAD)) -> str:
    """The last line that a client's program prints. site: folder with its packages."""
    done = subprocess.run(
        [sys.executable, "-c", code, server.url, json.dumps(texts)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_an_input_rail_of_nemo_guardrails_blocks(server: Server, tmp_path: Path) -> None:
    site = installed(tmp_path / "nemoguardrails", NEMO)
    assert list(probs(server, GOOD)) == ["negative", "positive"]
    said = json.loads(output_of(RAIL, site, server))
    refusal = "I'm sorry, I can't respond to that."
    assert said == {engine: ["an answer", refusal] for engine in ("vllm", "kserve", "fms")}


# LiteLLM

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


@pytest.mark.slow
def test_guardrails_of_litellm_block(store: Path, tmp_path: Path) -> None:
    site = installed(tmp_path / "litellm", LITELLM)
    with serving(store, default_model=None, tau=0) as server:
        said = json.loads(output_of(PROXY, site, server))
        scores = {model: probs(server, BAD, model)["positive"] for model in ("tiny", "tiny-int8")}
    for model, score in scores.items():
        (good, bad), (ibm_good, ibm_bad) = said[model]
        assert good is ibm_good is None
        assert bad == f"positive with probability {score:.2f}, by {model}:1"
        assert f"POSITIVE (score: {score:.3f})" in ibm_bad
    assert all("404" in problem for problems in said["other"] for problem in problems)  # it fails closed


# Windows with a flag


def windows(server: Server, text: str, **fields: Any) -> dict[str, Any]:
    answer = server.classify(input=text, long="windows", flag="positive", **fields)
    assert answer.status_code == 200, answer.text
    row: dict[str, Any] = answer.json()["data"][0]
    return row


def test_the_most_alarming_window_decides(server: Server) -> None:
    text = f"{GOOD} {FILLER} {BAD} {BAD} {BAD} {FILLER}"
    row = windows(server, text, flag_threshold=0.9999999)
    assert row["windows"]["run"] == row["windows"]["of"] > 2 and not row["flag"]["flagged"]
    flag = row["flag"]
    part = text[flag["start"] : flag["end"]]
    alone = probs(server, part)  # as a separate text
    assert flag["label"] == "positive" and flag["prob"] == pytest.approx(alone["positive"], abs=0.05)
    assert row["label"] == max(alone, key=alone.__getitem__) and row["probs"][1] == flag["prob"]
    # Without a flag, the answer is the mean over all windows, so its probability is lower.
    combined = server.classify(input=text, long="windows").json()["data"][0]
    assert combined["probs"][1] < flag["prob"]


def test_the_first_window_over_the_threshold_is_the_last_to_run(server: Server) -> None:
    early = windows(server, f"{BAD} {BAD} {BAD} {FILLER} {GOOD} {FILLER}", flag_threshold=0.5)
    assert early["flag"]["flagged"] and early["flag"]["window"] == 0 == early["flag"]["start"]
    assert early["windows"]["run"] == 1 < early["windows"]["of"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"flag": "other"}, "flag: 'other' is not a label of tiny-int8: negative, positive"),
        ({"flag_threshold": 0.5}, "flag_threshold: needs flag"),
        ({"flag": "negative", "flag_threshold": 1.0}, "flag_threshold: "),
        ({"flag": ""}, "flag: "),
    ],
)
def test_wrong_flags_are_refused(server: Server, fields: dict[str, Any], says: str) -> None:
    answer = server.classify(input=GOOD, **fields)
    assert answer.status_code == 422 and answer.json()["error"]["message"].startswith(says), answer.text


# Few, so that windows are often equal, and at the threshold.
SHARES = st.sampled_from([0.01, 0.25, 0.5, 0.75, 0.99])


@given(st.lists(SHARES, min_size=1, max_size=16), SHARES, st.booleans())
def test_a_flag_is_settled_by_the_first_window(found: list[float], at: float, has_labels: bool) -> None:
    flag, readings = Flag([1], at), []
    combination = Combination([1] * len(found), [0.0, 0.0] if has_labels else None, flag)
    for p in found:
        readings.append(Reading(3, [0.0, p], [1 - p, p], int(p > 0.5), 0.0, 0.0, None, None, 0.1))
        combination.add(readings[-1])
        if combination.is_settled(0.75):
            break
    ran = found[: len(readings)]
    assert len(ran) == next((i for i, p in enumerate(found, 1) if p >= at), len(found))
    assert combination.decisive == ran.index(max(ran))
    assert combination.reading(readings[-1]).probs[1] == max(ran)


@settings(max_examples=30)
@given(
    st.lists(
        st.sampled_from(["good", "film ,", "plot\n", "don't", "  the ", "dull.", "é", "漢字"]),
        min_size=80,
        max_size=900,
    )
)
def test_the_characters_of_windows_cover_the_text(tokenizer: TextTokenizer, words: list[str]) -> None:
    text = " ".join(words)
    found = tokenizer.start(text, None, True, 16).all()
    if not isinstance(found, Windows):
        return
    spans = [found.chars(i) for i in range(len(found))]
    assert spans[0][0] == len(text) - len(text.lstrip()) and all(a < b for a, b in spans)
    assert all(
        one[0] < two[0] <= one[1]
        for one, two in pairwise(spans)  # no gap between windows
    )
    if not found.truncated:
        assert spans[-1][1] == len(text.rstrip())


@pytest.fixture(scope="module")
def tokenizer(store: Path) -> TextTokenizer:
    return TextTokenizer.of(Store(store).open("tiny-int8"))
