"""APIs for guardrails with classifiers, and windows with a flag; their clients are in test_span_doors.py."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.exits.flags import Flag
from de3.exits.kinds import CLASSES, Labels, Value
from de3.exits.reading import ClassReading, ValueReading
from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy
from de3.exits.windows import Span, combination, exits_of
from de3.model_store.store import Store
from de3.runtime.classification import Classification
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.plan import how_long
from de3.runtime.engine.request import Text
from de3.runtime.errors import RequestError
from de3.runtime.flags import Wanted
from de3.runtime.options import AskedLong
from de3.server.http.detectors import MAX_CHARS, ContentsRequest, safe_labels
from tests.serving import Server, serving

# The tests' model labels GOOD as "negative" and BAD as "positive", so here a guard blocks "positive".
GOOD, BAD = "a superb fine film , good and lovely and charming", "a dull plot , bad and boring and awful"
FILLER = " ".join(["the film and the plot"] * 30)
LONG = f"{GOOD} {FILLER} {FILLER} {BAD} {BAD} {BAD} {FILLER}"
NO_SIGNALS = (0.0, 0.0, None, None, 0.1)
CONTENTS = "/api/v1/text/contents"
GUARDRAIL, PARAMETERS = "/beta/litellm_basic_guardrail_api", "additional_provider_specific_params"


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    options: dict[str, Any] = {"tau": 0, "max_texts": 8, "aliases": ["omni-moderation-latest=tiny-int8"]}
    with serving(store, models=["tiny-int8", "tiny"], default_model="tiny-int8", **options) as running:
        yield running


def post(server: Server, path: str, body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body)


def probs(server: Server, text: str, model: str = "tiny-int8") -> dict[str, float]:
    row = server.classify(input=text, model=model).json()["data"][0]
    return dict(zip(("negative", "positive"), row["probs"], strict=True))


@pytest.mark.parametrize(
    ("path", "params", "status", "says"),
    [
        (CONTENTS, {"threshold": 2}, 422, "threshold: "),
        (CONTENTS, {"safe_labels": ["x"]}, 422, "detector_params: safe"),
        (GUARDRAIL, {"model": "x"}, 404, "model: no model 'x' is served"),
        (GUARDRAIL, {"label": "x"}, 422, f"{PARAMETERS}: label: 'x' is not a label of tiny-int8:1: "),
    ],
)
def test_errors_name_the_field(server: Server, path: str, params: Any, status: int, says: str) -> None:
    body = {"contents": ["a"], "detector_params": params} if path == CONTENTS else {PARAMETERS: params}
    answer = post(server, path, body)
    body = answer.json()
    message = body["message"] if path == CONTENTS else body["error"]["message"]
    assert answer.status_code == status and message.startswith(says), answer.text


def test_detectors_of_fms(server: Server) -> None:
    def found(text: str, **params: Any) -> list[dict[str, Any]]:
        params = {"safe_labels": ["negative"]} | params
        (rows,) = post(server, CONTENTS, {"contents": [text], "detector_params": params}).json()
        return list(rows)

    score = probs(server, BAD)["positive"]
    (row,) = found(BAD)
    labels = dict.fromkeys(("detection", "detection_type"), "positive")
    assert row == labels | {"start": 0, "end": len(BAD), "text": BAD, "score": score}
    for text, threshold, count in (
        (GOOD, None, 0),
        (GOOD, 0.0, 1),
        (BAD, score - 1e-6, 1),  # the score is rounded
        (BAD, score + 1e-6, 0),
    ):
        assert len(found(text, threshold=threshold)) == count
    (row,) = found(LONG)
    assert row["detection"] == "positive"
    assert 0 < row["start"] < LONG.index(BAD) < row["end"] < len(LONG)
    assert row["text"] == LONG[row["start"] : row["end"]] and "metadata" not in row
    whole = server.classify(input=row["text"], truncate=False).json()["usage"]
    assert whole["prompt_tokens"] == 64  # of a window, no more and no less
    assert len(found(GOOD, threshold=0.0, safe_labels=[])) == 2


def test_the_header_detector_id_picks_the_model(store: Path) -> None:
    with serving(store, default_model=None, aliases=["guard=tiny"]) as server:
        listed = httpx.get(f"{server.url}/v1/models").json()["data"]
        shown = {row["name"]: (row["aliases"], row["is_default"]) for row in listed}
        assert shown == {"tiny": (["guard"], False), "tiny-int8": ([], False)}

        def detected(header: str, **params: Any) -> httpx.Response:
            params = {"tau": 0, "safe_labels": ["negative"]} | params
            body = {"contents": [BAD], "detector_params": params}
            return httpx.post(server.url + CONTENTS, json=body, headers={"detector-id": header})

        for asked, model in (("guard", "tiny"), ("tiny-int8:1", "tiny-int8")):
            score = server.classify(input=BAD, model=model, tau=0).json()["data"][0]["probs"][1]
            for answer in (detected(asked), detected("", model=asked), detected(asked, model=asked)):
                assert answer.json()[0][0]["score"] == score, answer.text
        assert detected("other").status_code == 404
        assert detected("").json()["message"].startswith("model: is required, as several are served: tiny, ")
        assert "is not the model in the header" in detected("tiny", model="tiny-int8").json()["message"]


@pytest.mark.parametrize(
    ("labels", "safe"),
    [
        ("INJECTION SAFE", "SAFE"),
        ("LABEL_0 LABEL_1", "LABEL_0"),
        ("jailbreak benign harmful", "benign"),
        ("not_allowed allowed", None),
        ("safe benign", None),
        ("notable harmful", None),
        ("negative positive", None),
    ],
)
def test_a_safe_label_is_recognized_by_its_name(labels: str, safe: str | None) -> None:
    manifest: Any = SimpleNamespace(
        labels=labels.split(), thresholds=None, tolerance=None, is_spans=False, full_name="m:1"
    )
    request = ContentsRequest([Text("a")])
    if safe is None:  # a guess might let everything pass
        with pytest.raises(RequestError, match="the names of m:1's labels do not show which mean safe"):
            request.for_model(manifest)
        return
    planned = request.for_model(manifest)
    others = [x for x in manifest.labels if x != safe]
    assert (planned.safe, planned.flag) == ({safe}, Wanted(others))
    planned = request.for_model(manifest, Wanted([safe], 0.8))  # the settings say otherwise
    assert (planned.safe, planned.threshold, planned.flag) == ({*others}, 0.8, Wanted([safe], 0.8))
    manifest.thresholds = [0.5] * len(manifest.labels)
    assert safe_labels(manifest) == set()


def test_labels_that_are_not_safe_count_together_and_unread_windows_are_an_error() -> None:
    """Neither of two attacks is the most probable, but one of them is certain."""
    labels = ["BENIGN", "INJECTION", "JAILBREAK"]
    reading = ClassReading(1, [0.0] * 3, [0.02, 0.49, 0.49], 1, *NO_SIGNALS)
    request = ContentsRequest([Text("a")], safe=frozenset(["BENIGN"]))
    rule = ExitRule(0.5, Entropy())
    one: Any = SimpleNamespace(reading=reading, reason="last_layer", windows=(), num_windows=1, rule=rule)
    one.check_all_ran = partial(Outcome.check_all_ran, one)
    assert request.found(one, labels) == [("INJECTION", pytest.approx(0.98))]
    request = replace(request, threshold=0.4)
    assert request.found(one, labels) == [("INJECTION", 0.49), ("JAILBREAK", 0.49)]
    request = replace(request, threshold=0.99)
    assert request.found(one, labels) == []
    unread: Any = SimpleNamespace(
        reading=reading, reason="deadline", windows=[None] * 2, num_windows=3, rule=rule
    )
    unread.check_all_ran = partial(Outcome.check_all_ran, unread)
    with pytest.raises(RequestError, match=r"latency_budget_ms: only 2 of a text's 3 windows"):
        request.found(unread, labels)
    request = replace(request, threshold=0.4)  # found before the deadline
    assert len(request.found(unread, labels)) == 2
    windows = combination(CLASSES, [Span(i, i + 1, 1) for i in range(3)], Flag([1, 2], 0.5))
    for probs_of in ([0.9, 0.1, 0.0], [0.2, 0.4, 0.4], [0.5, 0.5, 0.0]):
        windows.add(ClassReading(1, [0.0] * 3, probs_of, 0, *NO_SIGNALS))
    assert windows.decisive == 1


def test_a_requests_own_threshold_and_safe_labels() -> None:
    manifest: Any = SimpleNamespace(
        labels=["SAFE", "A", "B"], thresholds=None, tolerance=None, is_spans=False, full_name="m:1"
    )
    for threshold, expected in ((0.3, 0.3), (None, 0.8)):
        request = ContentsRequest([Text("a")], threshold=threshold)
        planned = request.for_model(manifest, Wanted(["A", "B"], 0.8))
        assert (planned.safe, planned.threshold) == ({"SAFE"}, expected)
    # Without a safe label, all labels together are certain; that detects nothing.
    one: Any = SimpleNamespace(
        reading=ClassReading(1, [0.0] * 3, [0.4, 0.3, 0.3], 0, *NO_SIGNALS), check_all_ran=lambda: None
    )
    assert ContentsRequest([Text("a")], safe=frozenset()).found(one, manifest.labels) == []
    assert ContentsRequest([Text("a")], safe=frozenset(["SAFE"])).found(one, manifest.labels) == [
        ("A", pytest.approx(0.6))
    ]


def test_litellms_guardrail_blocks(server: Server) -> None:
    def guarded(texts: Any, **params: Any) -> Any:
        more = {"input_type": "request", "request_data": {}, "images": ["aGk="], "litellm_version": "9"}
        answer = post(server, GUARDRAIL, {"texts": texts, PARAMETERS: {"label": "positive"} | params} | more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    score = probs(server, BAD)["positive"]
    reason = f"positive with probability {score:.2f}, by tiny-int8:1"
    for texts in ([BAD], [GOOD, "", BAD, GOOD]):
        assert guarded(texts) == {"action": "BLOCKED", "blocked_reason": reason}
    for nothing in (None, [], ["", " \n"], [GOOD]):
        assert guarded(nothing) == {"action": "NONE"}
    assert guarded(["\u200b"], threshold=1e-9) == {"action": "NONE"}
    for threshold, action in ((score - 1e-6, "BLOCKED"), (score + 1e-6, "NONE")):  # scores are rounded
        assert guarded([BAD], threshold=threshold)["action"] == action
    assert guarded([BAD], label="negative") == {"action": "NONE"}
    reason = guarded([GOOD], label="negative", model="tiny")["blocked_reason"]
    assert reason == f"negative with probability {probs(server, GOOD, 'tiny')['negative']:.2f}, by tiny:1"
    assert guarded([LONG])["action"] == "BLOCKED"


def test_a_response_of_detectors_has_a_limit(store: Path) -> None:
    manifest, half = Store(store).open("tiny").manifest, "a" * (MAX_CHARS // 2)
    safe = frozenset(["negative"])
    ContentsRequest([Text(half)], safe=safe).for_model(manifest)
    with pytest.raises(RequestError, match="give a higher threshold or shorter texts"):
        ContentsRequest([Text(half), Text("a")], safe=safe).for_model(
            manifest
        )  # both labels can have a probability of 0.5
    ContentsRequest([Text(half)] * 2, threshold=0.51, safe=safe).for_model(manifest)


def test_moderation_by_two_classes_under_openais_name(server: Server) -> None:
    body = {"input": [GOOD, BAD], "model": "omni-moderation-latest", "safe_labels": ["negative"]}
    answer = post(server, "/v1/moderations", body).json()
    assert answer["model"] == "tiny-int8:1"
    for text, result, flagged in zip([GOOD, BAD], answer["results"], [False, True], strict=True):
        assert result["flagged"] is flagged and result["categories"] == {"positive": flagged}
        assert result["category_scores"] == {"positive": probs(server, text)["positive"]}
    predicted = [{"0": probs(server, GOOD)["negative"], "1": probs(server, GOOD)["positive"]}]
    for name in ("omni-moderation-latest", "omni-moderation-latest:1", "tiny-int8:1"):
        assert httpx.get(f"{server.url}/v1/models/{name}").json()["id"] == "tiny-int8:1"
        answer = post(server, f"/v1/models/{name}:predict", {"instances": [GOOD]}).json()
        assert answer == {"predictions": predicted}, name


# Windows with a flag


def windows(server: Server, text: str, **fields: Any) -> dict[str, Any]:
    answer = server.classify(input=text, long="windows", flag="positive", **fields)
    assert answer.status_code == 200, answer.text
    row: dict[str, Any] = answer.json()["data"][0]
    return row


def test_the_most_alarming_window_decides_and_the_first_over_the_threshold_is_the_last_to_run(
    server: Server,
) -> None:
    row = windows(server, LONG, flag_threshold=0.9999999)
    assert row["windows"]["run"] == row["windows"]["of"] > 2 and not row["flag"]["flagged"]
    flag = row["flag"]
    alone = probs(server, LONG[flag["start"] : flag["end"]])  # as a separate text
    assert flag["label"] == "positive" and flag["prob"] == pytest.approx(alone["positive"], abs=0.05)
    assert row["label"] == max(alone, key=alone.__getitem__) and row["probs"][1] == flag["prob"]
    # Without a flag, the answer is the mean over all windows, so its probability is lower.
    combined = server.classify(input=LONG, long="windows").json()["data"][0]
    assert combined["probs"][1] < flag["prob"]

    early = windows(server, f"{BAD} {BAD} {BAD} {FILLER} {GOOD} {FILLER}", flag_threshold=0.5)
    assert early["flag"]["flagged"] and early["flag"]["window"] == 0 == early["flag"]["start"]
    assert early["windows"]["run"] == 1 < early["windows"]["of"]


def test_wrong_flags_are_refused(server: Server) -> None:
    for fields, says in (
        ({"flag": "other"}, "flag: 'other' is not a label of tiny-int8: negative, positive"),
        ({"flag_threshold": 0.5}, "flag_threshold: needs flag"),
    ):
        answer = server.classify(input=GOOD, **fields)
        assert answer.status_code == 422 and answer.json()["error"]["message"].startswith(says), answer.text


def test_how_a_long_text_is_read_when_a_guard_shares_the_pass() -> None:
    def planned_with(*served: str, long: AskedLong | None = None) -> tuple[int, bool]:
        """The windows and truncation for models that are each a guard, plain or spans, perhaps with a setting."""
        models: Any = [
            SimpleNamespace(
                rules=SimpleNamespace(
                    long=setting or None, flag=Flag((0,), (0.5,)) if kind == "guard" else None
                ),
                model=SimpleNamespace(manifest=SimpleNamespace(max_tokens=512, is_spans=kind == "spans")),
            )
            for kind, _, setting in (one.partition("=") for one in served)
        ]
        return how_long(Classification([Text("a")], long=long), models)

    whole, cut, refused = (16, True), (1, True), (1, False)  # /classify says what was not read
    for served, expected, asked in (
        (("plain",), cut, cut),
        (("guard",), whole, whole),
        (("spans",), whole, cut),
        (("guard", "plain"), whole, whole),
        (("plain", "guard"), whole, whole),
        (("spans", "plain"), cut, cut),
        (("guard=error",), refused, refused),
        (("guard=truncate", "plain"), cut, cut),
        (("guard=truncate", "plain=windows"), whole, cut),
        (("plain=windows",), whole, cut),
    ):
        assert planned_with(*served) == expected, served
        assert planned_with(*served, long="may truncate") == asked, served
        assert planned_with(*served, long="truncate") == cut
        assert planned_with(*served, long="error") == refused


# Few, so that windows are often equal, and at the threshold.
SHARES = st.sampled_from([0.01, 0.25, 0.5, 0.75, 0.99])


@given(st.lists(SHARES, min_size=1, max_size=16), SHARES, st.booleans())
def test_a_value_is_flagged_in_any_window(found: list[float], at: float, is_below: bool) -> None:
    flag = Flag((0,), (at,), is_below)
    combined = combination(Value(0.1), [Span(i, i + 1, 1) for i in range(len(found))], flag)
    readings = [ValueReading(3, value) for value in found]
    for one in readings:
        combined.add(one)
    assert flag.is_raised(combined.reading(readings[-1])) == any(flag.is_raised(one) for one in readings)
    assert combined.decisive == found.index(min(found) if is_below else max(found))


def test_windows_after_a_flagged_one_are_not_in_the_mean_cost() -> None:
    flag = Flag((0,), (0.5,))
    windows = [[ValueReading(3, value)] * 2 for value in (0.1, 0.9, 0.9)]
    found = exits_of(
        Value(0.1), [Span(i, i + 1, 1) for i in range(3)], flag, windows, [[None, None]] * 3, [1, 4]
    )
    assert (found.scores, found.costs) == ([None], [4])


@given(st.lists(SHARES, min_size=1, max_size=16), SHARES, st.booleans())
def test_a_flag_is_settled_by_the_first_window(found: list[float], at: float, has_labels: bool) -> None:
    flag, readings = Flag((1,), (at,)), []
    kind: Any = Labels.of([0.5, 0.5]) if has_labels else CLASSES
    combined = combination(kind, [Span(i, i + 1, 1) for i in range(len(found))], flag)
    for p in found:
        readings.append(kind.read(3, [0.0, 0.0], None))
        readings[-1].probs = [1 - p, p]
        combined.add(readings[-1])
        if combined.is_settled(0.75):
            break
    ran = found[: len(readings)]
    assert len(ran) == next((i for i, p in enumerate(found, 1) if p >= at), len(found))
    assert combined.decisive == ran.index(max(ran))
    assert combined.reading(readings[-1]).probs[1] == max(ran)
